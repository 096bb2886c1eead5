//! The demo corpus: English prose from the Markdown files and doc comments of crates that every build of this
//! program unpacks, whatever its target, so that there is real text to train on wherever it was built.
//!
//! `demo_crates.txt` lists the crates with a SHA-256 of the text that each gives, and the SHA-256 of the whole
//! corpus, which therefore has the same bytes on every machine. It is written by
//! [`write_list`](super::demo_list::write_list).

use super::byte_table::ByteTable;
use super::folder::{DataInfo, Split, TokenizerInfo, shard_files};
use super::pack::{DEFAULT_SHARD_TOKENS, PackReport, PackWriter, encode};
use super::shard::hex;
use super::tokenizer::Tokenizer;
use super::{Progress, prose};
use crate::error::{Error, Result};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The list that is compiled in.
const LIST: &str = include_str!("demo_crates.txt");
/// The first documents are kept for validation until they have so many bytes.
const VAL_BYTES: u64 = 250_000;
/// A document ends behind the paragraph that brings it to so many bytes.
const DOCUMENT_BYTES: usize = 2500;
/// A document that long ends where its source file ends.
const FILE_BYTES: usize = 800;
/// Sources above this size hold generated tables.
const MAX_SOURCE_BYTES: u64 = 4 << 20;
/// Markdown files of these names are lists of changes, names or legal text.
const NO_PROSE: [&str; 11] = [
    "license",
    "licence",
    "copying",
    "notice",
    "changelog",
    "changes",
    "history",
    "releases",
    "news",
    "authors",
    "code_of_conduct",
];

/// What to build.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// The folder that the shards go to.
    pub out: PathBuf,
    /// `byte` or a SentencePiece model file.
    pub tokenizer: String,
    /// A folder with the crates' folders `NAME-VERSION`; `None`: cargo's registry.
    pub from: Option<PathBuf>,
}

impl DemoOptions {
    /// Shards of the `byte` tokenizer, from cargo's registry.
    pub fn new(out: PathBuf) -> Self {
        Self { out, tokenizer: "byte".into(), from: None }
    }
}

/// A crate of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinnedCrate {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SHA-256 of the text that it gives, in hexadecimal.
    pub sha256: String,
}

/// The compiled-in list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DemoList {
    /// SHA-256 of the corpus (each document and a zero byte), in hexadecimal.
    pub corpus: String,
    /// The crates, sorted.
    pub crates: Vec<PinnedCrate>,
}

impl DemoList {
    /// The list that is compiled in.
    pub fn pinned() -> Self {
        Self::parse(LIST)
    }

    fn parse(text: &str) -> Self {
        let mut list = Self { corpus: String::new(), crates: Vec::new() };
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["corpus", sha256] => list.corpus = sha256.to_string(),
                [name, version, sha256] => list.crates.push(PinnedCrate {
                    name: name.to_string(),
                    version: version.to_string(),
                    sha256: sha256.to_string(),
                }),
                _ => {}
            }
        }
        list
    }

    pub(super) fn render(&self) -> String {
        let mut text = format!(
            "# Crates whose documentation is the demo corpus: name, version, SHA-256 of the text taken from it.\n\
             # Written by `FAIRWAY_WRITE_DEMO_LIST=1 cargo test --release --test demo_corpus write_list`.\ncorpus {}\n",
            self.corpus
        );
        for pinned in &self.crates {
            text += &format!("{} {} {}\n", pinned.name, pinned.version, pinned.sha256);
        }
        text
    }
}

/// The paragraphs of a crate, file by file.
pub(super) struct CrateText {
    files: Vec<Vec<String>>,
}

impl CrateText {
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        for paragraph in self.files.iter().flat_map(|file| file.iter().map(String::as_str).chain(["\u{c}"])) {
            hasher.update(paragraph.as_bytes());
            hasher.update([0]);
        }
        hex(&hasher.finalize())
    }

    pub fn bytes(&self) -> usize {
        self.files.iter().flatten().map(String::len).sum()
    }
}

/// Writes the demo corpus as shards. About the first 250 KB are the validation split.
///
/// Errors (input): a crate of the list is absent, or its text is another; the error names it and `cargo fetch`.
pub fn build(options: &DemoOptions, progress: Progress) -> Result<PackReport> {
    let tokenizer = Tokenizer::load(&options.tokenizer)?;
    let list = DemoList::pinned();
    let documents = corpus(&list, options.from.as_deref(), progress)?;
    let mut val_bytes = 0;
    let before = |document: &&String| {
        let room = val_bytes < VAL_BYTES;
        val_bytes += document.len() as u64;
        room
    };
    let val_docs = documents.iter().take_while(before).count() as u64;
    let mut writer =
        PackWriter::create(&options.out, &tokenizer, val_docs, DEFAULT_SHARD_TOKENS, &source(&list))?;
    let table: ByteTable = writer.byte_table.clone();
    for batch in documents.chunks(1024) {
        let one = |text: &String| encode(text, String::new(), &tokenizer, &table);
        let encoded: Vec<_> = batch.par_iter().map(one).collect();
        for document in &encoded {
            writer.push(document)?;
        }
    }
    writer.finish()
}

/// Whether `dir` holds this demo corpus, complete and made with `tokenizer`.
pub fn is_built(dir: &Path, tokenizer: &Tokenizer) -> bool {
    let has_shards = |split| shard_files(dir, split).is_ok_and(|shards| !shards.is_empty());
    matches!(DataInfo::load(dir), Ok(Some(info))
        if info.source == source(&DemoList::pinned()) && info.tokenizer == TokenizerInfo::of(tokenizer))
        && has_shards(Split::Train)
        && has_shards(Split::Val)
}

fn source(list: &DemoList) -> String {
    format!("demo {}", list.corpus)
}

/// The documents of the pinned corpus in their order.
///
/// The order is that of the documents' SHA-256: a shuffle that every machine knows, so that the first documents
/// are from the same mixture of crates as the rest.
pub fn documents(from: Option<&Path>, progress: Progress) -> Result<Vec<String>> {
    corpus(&DemoList::pinned(), from, progress)
}

fn corpus(list: &DemoList, from: Option<&Path>, progress: Progress) -> Result<Vec<String>> {
    let (done, total) = (AtomicU64::new(0), list.crates.len() as u64);
    let read = |pinned: &PinnedCrate| {
        let folder = format!("{}-{}", pinned.name, pinned.version);
        let dir = find_crate(&folder, from)?;
        let text = read_crate(&dir)?;
        if text.sha256() != pinned.sha256 {
            return Err(Error::input(
                format!("text of crate {folder} is not the pinned one"),
                dir.display(),
                "the crate as published (remove the folder, then `cargo fetch`)",
            ));
        }
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, total)?;
        Ok(text)
    };
    // Collected one by one, so that of several errors the first in the list is told.
    let texts: Vec<Result<CrateText>> = list.crates.par_iter().map(read).collect();
    let documents = split(texts.into_iter().collect::<Result<_>>()?);
    let sha256 = corpus_sha256(&documents);
    if sha256 != list.corpus {
        return Err(Error::failed(
            format!("demo corpus has SHA-256 {sha256}"),
            "demo_crates.txt",
            format!("{} (the list must be written again)", list.corpus),
        ));
    }
    Ok(documents)
}

pub(super) fn corpus_sha256(documents: &[String]) -> String {
    let mut hasher = Sha256::new();
    for document in documents {
        hasher.update(document.as_bytes());
        hasher.update([0]);
    }
    hex(&hasher.finalize())
}

/// Cuts the crates' texts in documents, without the paragraphs that were there before, and shuffles them.
pub(super) fn split(texts: Vec<CrateText>) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut documents = Vec::new();
    for text in texts {
        let mut document = String::new();
        for file in text.files {
            for paragraph in file {
                if !seen.insert(prose::fingerprint(&paragraph)) {
                    continue;
                }
                if !document.is_empty() {
                    document.push_str("\n\n");
                }
                document.push_str(&paragraph);
                if document.len() >= DOCUMENT_BYTES {
                    documents.push(std::mem::take(&mut document));
                }
            }
            if document.len() >= FILE_BYTES {
                documents.push(std::mem::take(&mut document));
            }
        }
        if !document.is_empty() {
            documents.push(document);
        }
    }
    documents.sort_by_cached_key(|document| Sha256::digest(document.as_bytes()));
    documents
}

/// The folder of a crate, under `from` or in one of cargo's registries.
pub(super) fn find_crate(folder: &str, from: Option<&Path>) -> Result<PathBuf> {
    let missing = |place: &Path, expected: &str| {
        Error::input(format!("crate {folder} is not there"), place.display(), expected)
    };
    if let Some(from) = from {
        let dir = from.join(folder);
        return if dir.is_dir() {
            Ok(dir)
        } else {
            Err(missing(from, "its folder (`cargo fetch` unpacks it)"))
        };
    }
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))
        .unwrap_or_else(|| PathBuf::from(".cargo"));
    let sources = home.join("registry").join("src");
    let mut registries: Vec<PathBuf> =
        fs::read_dir(&sources).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    registries.sort();
    registries.into_iter().map(|registry| registry.join(folder)).find(|dir| dir.is_dir()).ok_or_else(|| {
        missing(&sources, "its sources: run `cargo fetch` in fairway's folder, or give a copy with --from")
    })
}

/// The prose of a crate: its Markdown files and doc comments in the order of their paths.
pub(super) fn read_crate(dir: &Path) -> Result<CrateText> {
    let mut paths = Vec::new();
    list_files(dir, "", &mut paths)?;
    paths.sort();
    let mut text = CrateText { files: Vec::new() };
    for path in paths {
        let file = dir.join(&path);
        let meta = fs::symlink_metadata(&file).map_err(|error| Error::read(&file, &error))?;
        if !meta.is_file() || meta.len() > MAX_SOURCE_BYTES {
            continue;
        }
        let bytes = fs::read(&file).map_err(|error| Error::read(&file, &error))?;
        let Ok(content) = String::from_utf8(bytes) else { continue };
        let paragraphs: Vec<String> = if path.ends_with(".rs") {
            prose::doc_comments(&content).iter().flat_map(|comment| prose::paragraphs(comment)).collect()
        } else {
            prose::paragraphs(&content)
        };
        if !paragraphs.is_empty() {
            text.files.push(paragraphs);
        }
    }
    Ok(text)
}

/// Paths of Rust and Markdown files below `dir`, relative to the crate, separated by `/`. Tests and benchmarks have
/// no documentation.
fn list_files(dir: &Path, prefix: &str, found: &mut Vec<String>) -> Result<()> {
    let read_error = |error| Error::read(dir, &error);
    for entry in fs::read_dir(dir).map_err(read_error)? {
        let entry = entry.map_err(read_error)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let kind = entry.file_type().map_err(read_error)?;
        let path = format!("{prefix}{name}");
        if kind.is_dir() && !matches!(name.as_str(), "tests" | "benches" | "target" | "fuzz") {
            list_files(&entry.path(), &format!("{path}/"), found)?;
        }
        let lower = name.to_ascii_lowercase();
        let markdown = lower.ends_with(".md") && !NO_PROSE.iter().any(|word| lower.starts_with(word));
        if kind.is_file() && (markdown || name.ends_with(".rs")) {
            found.push(path);
        }
    }
    Ok(())
}
