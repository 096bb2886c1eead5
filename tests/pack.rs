//! Packing and verifying: the shards of documents to the byte, the split, the counts; failures leave older shards
//! as they were.

use fairway::data::folder::{DataFolder, Split};
use fairway::data::pack::{PackOptions, PackReport, pack};
use fairway::data::quiet;
use fairway::data::shard::Shard;
use fairway::data::tokenizer::Tokenizer;
use fairway::data::verify::{VerifyOptions, VerifyReport, verify};
use fairway::error::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The reference data beside the checkout, where it stands.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FAIRWAY_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("skipped: {} is absent", path.display());
        return None;
    }
    Some(path)
}

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// JSONL of the texts.
    fn jsonl(&self, texts: &[&str]) -> PathBuf {
        let row = |text: &&str| serde_json::json!({ "text": text, "source": 1 }).to_string() + "\n";
        self.file("docs.jsonl", texts.iter().map(row).collect::<String>())
    }

    fn options(&self, files: Vec<PathBuf>) -> PackOptions {
        PackOptions::new(files, "byte", self.out())
    }

    fn pack(&self, files: Vec<PathBuf>, val_docs: u64, shard_tokens: u64) -> Result<PackReport> {
        let options = PackOptions { val_docs: Some(val_docs), shard_tokens, ..self.options(files) };
        pack(&options, &quiet)
    }

    fn verify(&self, files: Vec<PathBuf>, tokenizer: Option<&str>) -> Result<VerifyReport> {
        let tokenizer = tokenizer.map(str::to_string);
        verify(&VerifyOptions { data: self.out(), files, tokenizer }, &quiet)
    }

    /// Every file of the output folder with its content.
    fn content(&self) -> Vec<(String, Vec<u8>)> {
        let name = |entry: &fs::DirEntry| entry.file_name().into_string().unwrap();
        let entries = fs::read_dir(self.out()).unwrap().map(|entry| entry.unwrap());
        let mut content: Vec<_> =
            entries.map(|entry| (name(&entry), fs::read(entry.path()).unwrap())).collect();
        content.sort();
        content
    }

    fn tokens(&self, split: Split) -> Vec<Vec<u16>> {
        let folder = DataFolder::open(&self.out()).unwrap();
        folder.shards(split).iter().map(|path| Shard::open(path).unwrap().tokens().to_vec()).collect()
    }
}

#[test]
fn documents_lie_back_to_back_with_bos_before_each() {
    let case = Case::new();
    let docs = case.jsonl(&["ab", "", "c\0d", "efgh"]);
    let report = case.pack(vec![docs.clone()], 1, 4).unwrap();
    // byte260: id = byte + 4; BOS 1; no EOS; the change of split begins a new shard.
    let byte = |c: char| c as u16 + 4;
    assert_eq!(case.tokens(Split::Val), [vec![1, byte('a'), byte('b')]]);
    assert_eq!(
        case.tokens(Split::Train),
        [vec![1, 1, byte('c'), 4], vec![byte('d'), 1, byte('e'), byte('f')], vec![byte('g'), byte('h')]]
    );
    assert_eq!((report.docs, report.val_docs, report.tokens), (4, 1, 13));
    assert_eq!((report.bytes, report.raw_bytes), (9, 9));
    let names: Vec<&str> = report.shards.iter().map(|shard| shard.file.as_str()).collect();
    let train = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"];
    assert_eq!(names, [&train[..], &["fineweb_val_000000.bin"]].concat());
    // What `cat fineweb_*.bin | sha256sum` prints.
    if cfg!(unix) {
        let script = format!("cat {}/fineweb_*.bin | sha256sum", case.out().display());
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).starts_with(&report.sha256));
    }

    let verified = case.verify(vec![docs], None).unwrap();
    assert_eq!((verified.docs, verified.tokens), (4, 13));
    assert_eq!((verified.bytes, verified.raw_bytes), (Some(9), Some(9)));
    assert_eq!((&verified.shards, &verified.sha256), (&report.shards, &report.sha256));
    // One shard by itself, with no tokenizer known.
    let data = case.out().join(train[0]);
    let one = verify(&VerifyOptions { data, files: vec![], tokenizer: None }, &quiet).unwrap();
    assert_eq!((one.docs, one.tokens, one.bytes), (2, 4, None));
    assert_eq!(one.sha256, report.shards[0].sha256);
}

#[test]
fn the_split_never_takes_all_documents_unless_told_to() {
    // (documents, --val-docs, validation documents)
    for (count, val_docs, expected) in
        [(1, None, 0), (5, None, 1), (30, None, 3), (30, Some(0), 0), (30, Some(7), 7), (30, Some(99), 30)]
    {
        let case = Case::new();
        let docs = case.jsonl(&vec!["x"; count]);
        let report = pack(&PackOptions { val_docs, ..case.options(vec![docs]) }, &quiet).unwrap();
        assert_eq!((report.docs, report.val_docs), (count as u64, expected), "{count} {val_docs:?}");
        let folder = DataFolder::open(&case.out()).unwrap();
        assert_eq!(folder.shards(Split::Val).len(), usize::from(expected > 0));
        assert_eq!(folder.shards(Split::Train).len(), usize::from(expected < count as u64));
    }
}

#[test]
fn many_files_give_the_same_shards_as_one_thread_would_write() {
    let case = Case::new();
    // More than one batch of documents, of very different lengths, in JSONL and in plain text.
    let text = |index: usize| format!("{index} ").repeat(index * index % 97);
    let texts: Vec<String> = (0..40_000).map(text).collect();
    let docs = case.jsonl(&texts.iter().map(String::as_str).collect::<Vec<_>>());
    let plain = case.file("plain.txt", "one document\n\nin a file\n");
    let report = case.pack(vec![docs, plain], 10_000, 1_000_000).unwrap();
    let tokenizer = Tokenizer::byte();
    let mut expected = Vec::new();
    for text in texts.iter().map(String::as_str).chain(["one document\n\nin a file\n"]) {
        expected.push(1);
        tokenizer.encode_into(text, &mut expected);
    }
    let (val, train) = (case.tokens(Split::Val), case.tokens(Split::Train));
    assert_eq!([val.concat(), train.concat()].concat(), expected);
    assert_eq!((report.docs, report.val_docs), (40_001, 10_000));
    assert_eq!(report.tokens, report.bytes + report.docs);
    assert!(train.len() > 2 && train[..train.len() - 1].iter().all(|shard| shard.len() == 1_000_000));
}

#[test]
fn a_failed_pack_leaves_the_older_shards_and_no_litter() {
    let case = Case::new();
    let good = case.jsonl(&["older", "shards"]);
    case.pack(vec![good.clone()], 1, 1000).unwrap();
    let before = case.content();
    let bad_row = case.file("bad.jsonl", "{\"text\":\"fine\"}\n{\"text\":1}\n");
    let bad_text = case.file("bad.txt", b"fine\xff");
    for (bad, message) in [(bad_row, "line 2 column"), (bad_text, "not UTF-8 at byte 4")] {
        let error = case.pack(vec![good.clone(), bad.clone()], 1, 2).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let line = error.to_string();
        assert!(line.starts_with(message) && line.contains(&*bad.to_string_lossy()), "{line}");
        assert_eq!(case.content(), before);
    }
    let stopped =
        pack(&case.options(vec![good.clone()]), &|_, _| Err(Error::Interrupted { place: "here".into() }));
    assert_eq!(stopped.unwrap_err().exit_code(), 130);
    assert!(
        case.pack(vec![case.file("none.jsonl", "\n")], 1, 10)
            .unwrap_err()
            .to_string()
            .starts_with("no docum")
    );
    let nowhere = PackOptions {
        out: case.dir.path().join("new"),
        ..case.options(vec![case.file("e.txt.gz", [0x1f, 0x8b])])
    };
    assert!(pack(&nowhere, &quiet).is_err() && !nowhere.out.exists());
    assert!(case.pack(vec![], 1, 10).is_err() && case.pack(vec![good.clone()], 1, 0).is_err());
    assert!(case.pack(vec![good], 1, 1 << 31).unwrap_err().to_string().contains("--shard-tokens"));
    assert_eq!(case.content(), before);
    // A good one replaces them, all of them.
    let shorter = case.jsonl(&["new"]);
    case.pack(vec![shorter], 0, 1000).unwrap();
    assert_eq!(
        case.content().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["fairway_data.json", "fineweb_train_000000.bin"]
    );
}

#[test]
fn shards_of_other_origin_are_not_replaced() {
    let case = Case::new();
    let docs = case.jsonl(&["a", "b"]);
    case.pack(vec![docs.clone()], 1, 1000).unwrap();
    fs::remove_file(case.out().join("fairway_data.json")).unwrap();
    let before = case.content();
    let error = case.pack(vec![docs], 1, 1000).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().starts_with("folder holds shards but no"), "{error}");
    assert_eq!(case.content(), before);
}

#[test]
fn verify_finds_what_is_wrong() {
    let case = Case::new();
    let docs = case.jsonl(&["first text", "second text", "third text"]);
    case.pack(vec![docs.clone()], 1, 8).unwrap();
    let fails = |files: Vec<PathBuf>, tokenizer: Option<&str>, message: &str| {
        let error = case.verify(files, tokenizer).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(error.to_string().starts_with(message), "{error}");
    };
    let shorter = case.file("shorter.jsonl", "{\"text\":\"first text\"}\n");
    fails(vec![shorter], None, "token 0 is beyond the end of the texts");
    let other = case.file("other.jsonl", "{\"text\":\"first text\"}\n{\"text\":\"sEcond text\"}\n");
    fails(vec![other], None, &format!("token 2 is {}", u16::from(b'e') + 4));
    let longer = case.file("longer.txt", "more");
    fails(vec![docs.clone(), longer], None, "shards end before the text");
    if let Some(model) = shared("tokenizers/fineweb_1024_bpe.model") {
        fails(vec![], model.to_str(), "tokenizer sentencepiece of 1024 ids");
    }

    // One flipped byte: of a token, then of the header's zeros; then an id beyond the vocabulary.
    let shard = case.out().join("fineweb_train_000001.bin");
    let good = fs::read(&shard).unwrap();
    for (place, value, message) in [
        (1024, 99, "SHA-256 of the shards is"),
        (700, 1, "byte 700 of the header is not 0"),
        (1025, 1, "token id 3"),
    ] {
        let mut bad = good.clone();
        bad[place] = value;
        fs::write(&shard, bad).unwrap();
        fails(vec![], None, message);
    }
    fs::remove_file(&shard).unwrap();
    fails(vec![], None, "number of tokens of the shards is");
    // Without the record nothing says how many there were, but not which tokenizer either.
    fs::remove_file(case.out().join("fairway_data.json")).unwrap();
    assert_eq!(case.verify(vec![], None).unwrap().bytes, None);
    fails(vec![docs], None, "texts to compare but no tokenizer, --tokenizer");
}

/// Real text with the challenge's tokenizer, against the numbers of an independent implementation
/// (`chal_bpb_luts_sp1024` in the fixtures' index).
#[test]
fn gov_web_small_packs_to_the_reference_shard() {
    let (Some(text), Some(model)) =
        (shared("corpora/gov_web_small.jsonl.gz"), shared("tokenizers/fineweb_1024_bpe.model"))
    else {
        return;
    };
    let case = Case::new();
    let options = PackOptions { val_docs: Some(0), ..case.options(vec![text.clone()]) };
    let options = PackOptions { tokenizer: model.to_string_lossy().into_owned(), ..options };
    let report = pack(&options, &quiet).unwrap();
    assert_eq!((report.docs, report.val_docs, report.tokens), (631, 0, 1_175_411));
    assert_eq!((report.bytes, report.raw_bytes), (3_016_723, 3_016_733));
    assert_eq!(report.shards.len(), 1);
    assert_eq!(report.sha256, "74b92492ba1e51a265eee13a581130f2bcec9dc821f60a1744732dfb6ae93ff8");
    let verified = case.verify(vec![text], model.to_str()).unwrap();
    assert_eq!((verified.docs, verified.bytes, verified.raw_bytes), (631, Some(3_016_723), Some(3_016_733)));
    // In shards of another size the counts over their borders are the same.
    let report =
        pack(&PackOptions { val_docs: None, shard_tokens: 100_003, ..options.clone() }, &quiet).unwrap();
    assert_eq!((report.val_docs, report.shards.len(), report.bytes), (63, 12, 3_016_723));
    assert_eq!(case.verify(vec![], model.to_str()).unwrap().bytes, Some(3_016_723));
    // The shards are refused to another tokenizer.
    let folder = DataFolder::open(&case.out()).unwrap();
    folder.check_tokenizer(&Tokenizer::load(&options.tokenizer).unwrap()).unwrap();
    let error = folder.check_tokenizer(&Tokenizer::byte()).unwrap_err();
    assert!(error.exit_code() == 2 && error.to_string().contains("does not match the shards"), "{error}");
}
