//! The demo corpus: the same bytes everywhere, from crates that every build unpacks; a missing or changed crate is
//! one error that names it.

use fairway::data::demo::{self, DemoList, DemoOptions};
use fairway::data::demo_list;
use fairway::data::folder::DataFolder;
use fairway::data::quiet;
use fairway::data::tokenizer::Tokenizer;
use fairway::data::verify::{VerifyOptions, verify};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The checkout that this test was built from.
fn root() -> PathBuf {
    std::env::var_os("FAIRWAY_ROOT")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf(), PathBuf::from)
}

/// Writes `src/data/demo_crates.txt` anew where `FAIRWAY_WRITE_DEMO_LIST` is set: after a change of `Cargo.lock`
/// that a listed crate is part of, or of the rules for prose. The program must be built again afterwards.
#[test]
fn write_list() {
    if std::env::var_os("FAIRWAY_WRITE_DEMO_LIST").is_none() {
        println!("skipped: FAIRWAY_WRITE_DEMO_LIST is not set");
        return;
    }
    let list = demo_list::write_list(&root(), None, &root().join("src/data/demo_crates.txt")).unwrap();
    println!("{} crates, corpus {}", list.crates.len(), list.corpus);
}

#[test]
fn every_listed_crate_is_pinned_by_the_lock_file() {
    let list = DemoList::pinned();
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    assert!(list.crates.len() > 50 && list.corpus.len() == 64);
    for pinned in &list.crates {
        let entry = format!("name = \"{}\"\nversion = \"{}\"\n", pinned.name, pinned.version);
        assert!(lock.contains(&entry), "{} {}: write the list anew", pinned.name, pinned.version);
    }
    assert!(list.crates.windows(2).all(|pair| pair[0].name < pair[1].name));
}

#[test]
fn the_corpus_is_the_pinned_one_and_its_shards_hold_it() {
    // The checksums in the list are checked inside.
    let documents = demo::documents(None, &quiet).unwrap();
    let bytes: usize = documents.iter().map(String::len).sum();
    assert!((4_000_000..12_000_000).contains(&bytes), "{bytes}");
    assert_eq!(documents.iter().collect::<HashSet<_>>().len(), documents.len());
    let letters =
        documents.iter().flat_map(|text| text.bytes()).filter(|b| b.is_ascii_alphabetic() || *b == b' ');
    let share = letters.count() as f64 / bytes as f64;
    assert!(share > 0.92, "{share}");

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("demo");
    assert!(!demo::is_built(&out, &Tokenizer::byte()));
    let report = demo::build(&DemoOptions::new(out.clone()), &quiet).unwrap();
    assert!(demo::is_built(&out, &Tokenizer::byte()));
    assert_eq!((report.docs, report.bytes), (documents.len() as u64, bytes as u64));
    assert_eq!((report.raw_bytes, report.tokens), (report.bytes, report.bytes + report.docs));
    assert_eq!(report.shards.len(), 2);
    let verified =
        verify(&VerifyOptions { data: out.clone(), files: vec![], tokenizer: None }, &quiet).unwrap();
    assert_eq!((verified.docs, verified.bytes), (report.docs, Some(report.bytes)));

    // The validation split is the first documents, 250 KB and what is left of the last of them.
    let folder = DataFolder::open(&out).unwrap();
    let val = folder.val(1, 260).unwrap();
    let val_bytes = val.tokens().iter().filter(|id| **id >= 4).count();
    assert!((250_000..260_000).contains(&val_bytes), "{val_bytes}");
    let first: Vec<u8> = documents[..report.val_docs as usize].concat().into_bytes();
    assert_eq!(Tokenizer::byte().decode(val.tokens()), first);
    // No paragraph of it is in the training split.
    let paragraphs = |documents: &[String]| -> HashSet<String> {
        documents.iter().flat_map(|text| text.split("\n\n")).map(str::to_string).collect()
    };
    let (val, train) = documents.split_at(report.val_docs as usize);
    assert!(paragraphs(val).is_disjoint(&paragraphs(train)));

    // The shards are a record of their tokenizer: with another they are not this corpus.
    let info = fs::read_to_string(out.join("fairway_data.json")).unwrap();
    fs::write(out.join("fairway_data.json"), info.replace("\"byte\"", "\"sentencepiece\"")).unwrap();
    assert!(!demo::is_built(&out, &Tokenizer::byte()));
}

#[test]
fn a_missing_or_changed_crate_is_one_error_that_names_it() {
    let first = &DemoList::pinned().crates[0];
    let folder = format!("{}-{}", first.name, first.version);
    let from = tempfile::tempdir().unwrap();
    let out = from.path().join("out");
    let options = DemoOptions { from: Some(from.path().to_path_buf()), ..DemoOptions::new(out.clone()) };
    let missing = demo::build(&options, &quiet).unwrap_err();
    assert_eq!(missing.exit_code(), 2);
    let line = missing.to_string();
    assert!(
        line.starts_with(&format!("crate {folder} is not there")) && line.contains("cargo fetch"),
        "{line}"
    );

    fs::create_dir_all(from.path().join(&folder).join("src")).unwrap();
    let source = "//! This is the documentation of another crate, which is not the one that the list has.\n";
    fs::write(from.path().join(&folder).join("src/lib.rs"), source).unwrap();
    let changed = demo::build(&options, &quiet).unwrap_err();
    assert_eq!(changed.exit_code(), 2);
    let line = changed.to_string();
    assert!(
        line.starts_with(&format!("text of crate {folder} is not")) && line.contains("cargo fetch"),
        "{line}"
    );
    assert!(!out.exists(), "nothing is written");
}
