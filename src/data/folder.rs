//! A folder of shards: which files it has, which tokenizer they were made with, and how a new set of shards takes
//! the place of an older one.

use super::shard::Shard;
use super::stream::{TokenStream, ValTokens};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::files;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The name of [`DataInfo`]'s file in a folder of shards.
pub const INFO_FILE: &str = "fairway_data.json";
/// More than any `fairway_data.json` needs.
const MAX_INFO_BYTES: u64 = 1 << 20;

/// The two sets of a corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// `fineweb_val_*.bin`
    Val,
    /// `fineweb_train_*.bin`
    Train,
}

impl Split {
    /// The name in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Val => "val",
            Self::Train => "train",
        }
    }

    /// The file name of the shard of that number.
    pub fn shard_name(self, index: usize) -> String {
        format!("fineweb_{}_{index:06}.bin", self.name())
    }

    /// Whether a file of that name belongs to this split.
    fn owns(self, name: &str) -> bool {
        name.starts_with(&format!("fineweb_{}_", self.name())) && name.ends_with(".bin")
    }
}

/// Which tokenizer shards were made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerInfo {
    /// `byte` or `sentencepiece`: [`Tokenizer::kind`].
    pub kind: String,
    /// Number of ids.
    pub vocab_size: usize,
    /// SHA-256 of the model file, in hexadecimal; absent for `byte`.
    pub sha256: Option<String>,
}

impl TokenizerInfo {
    /// What `tokenizer` is.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        Self {
            kind: tokenizer.kind().to_string(),
            vocab_size: tokenizer.vocab_size(),
            sha256: tokenizer.sha256().map(str::to_string),
        }
    }

    fn describe(&self) -> String {
        let sha256 =
            self.sha256.as_deref().map(|sha256| format!(" with SHA-256 {sha256}")).unwrap_or_default();
        format!("{} of {} ids{sha256}", self.kind, self.vocab_size)
    }
}

/// What `fairway_data.json` says of the shards beside it. Folders that this program did not make have none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataInfo {
    /// Version of this record: 1.
    pub format: u32,
    /// What made the shards: `pack` or `demo`.
    pub source: String,
    /// The tokenizer of the shards.
    pub tokenizer: TokenizerInfo,
    /// Documents of both splits.
    pub docs: u64,
    /// Documents of the validation split.
    pub val_docs: u64,
    /// Tokens of both splits.
    pub tokens: u64,
    /// Bytes that all tokens decode to, as the byte table counts them.
    pub bytes: u64,
    /// UTF-8 bytes of the documents before they were encoded.
    pub raw_bytes: u64,
    /// SHA-256 of all shards, one behind the other in the order of their names.
    pub sha256: String,
}

impl DataInfo {
    /// Reads the record of a folder; `None` where it has none.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(INFO_FILE);
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::read(&path, &error)),
        };
        let mut text = Vec::new();
        file.take(MAX_INFO_BYTES + 1).read_to_end(&mut text).map_err(|error| Error::read(&path, &error))?;
        if text.len() as u64 > MAX_INFO_BYTES {
            let limit = format!("at most {MAX_INFO_BYTES} bytes");
            return Err(Error::input("record of the shards is too long", path.display(), limit));
        }
        let info: Self = serde_json::from_slice(&text).map_err(|error| {
            Error::input(
                format!("bad record of the shards ({error})"),
                path.display(),
                "the JSON that fairway wrote",
            )
        })?;
        if info.format != 1 {
            let what = format!("record of the shards has format {}", info.format);
            return Err(Error::input(what, path.display(), "format 1"));
        }
        Ok(Some(info))
    }

    fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join(INFO_FILE);
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::failed(error, path.display(), "a record that JSON can hold"))?;
        files::write_atomic(&path, &text)
    }
}

/// A folder that holds shards: the challenge's own, or one that `fairway data` made.
#[derive(Debug, Clone)]
pub struct DataFolder {
    dir: PathBuf,
    train: Vec<PathBuf>,
    val: Vec<PathBuf>,
    info: Option<DataInfo>,
}

impl DataFolder {
    /// Lists the shards of `dir`, sorted by name; a folder that is absent or has none is an error.
    pub fn open(dir: &Path) -> Result<Self> {
        let (train, val) = (shard_files(dir, Split::Train)?, shard_files(dir, Split::Val)?);
        if train.is_empty() && val.is_empty() {
            return Err(Error::input(
                "no shards",
                dir.display(),
                "fineweb_train_*.bin and fineweb_val_*.bin (made by `fairway data`)",
            ));
        }
        Ok(Self { dir: dir.to_path_buf(), train, val, info: DataInfo::load(dir)? })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The shards of a split, sorted by name.
    pub fn shards(&self, split: Split) -> &[PathBuf] {
        match split {
            Split::Val => &self.val,
            Split::Train => &self.train,
        }
    }

    /// What is recorded of the shards; `None` for a folder that this program did not make.
    pub fn info(&self) -> Option<&DataInfo> {
        self.info.as_ref()
    }

    /// Refuses a tokenizer that is not the one the shards were made with. Where nothing is recorded any is
    /// accepted; ids beyond its vocabulary are then refused as shards are read.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        let Some(info) = &self.info else { return Ok(()) };
        let given = TokenizerInfo::of(tokenizer);
        if given == info.tokenizer {
            return Ok(());
        }
        Err(Error::input(
            format!("tokenizer {} does not match the shards", given.describe()),
            self.dir.display(),
            info.tokenizer.describe(),
        ))
    }

    /// The training stream, from its first token; `vocab` bounds the ids.
    pub fn train(&self, vocab: usize) -> Result<TokenStream> {
        self.need(Split::Train)?;
        TokenStream::open(&self.train, vocab)
    }

    /// The validation tokens for sequences of `seq_len`; `vocab` bounds the ids.
    pub fn val(&self, seq_len: usize, vocab: usize) -> Result<ValTokens> {
        self.need(Split::Val)?;
        ValTokens::open(&self.val, seq_len, vocab)
    }

    fn need(&self, split: Split) -> Result<()> {
        if self.shards(split).is_empty() {
            let expected = format!("fineweb_{}_*.bin", split.name());
            return Err(Error::input(format!("no {} shards", split.name()), self.dir.display(), expected));
        }
        Ok(())
    }
}

/// The shards of one split in `dir`, sorted by name; empty where there are none.
pub fn shard_files(dir: &Path, split: Split) -> Result<Vec<PathBuf>> {
    let failed = |error: &std::io::Error| {
        Error::input(format!("cannot read ({error})"), dir.display(), "a folder of token shards")
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| failed(&error))? {
        let entry = entry.map_err(|error| failed(&error))?;
        if entry.file_name().to_str().is_some_and(|name| split.owns(name)) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// A set of new shards on its way into a folder.
///
/// The shards are written in a folder inside the target and moved out of it when all are whole, so that a failed
/// or interrupted run leaves the older shards of the target as they were and none of its own. Only folders without
/// shards, and folders that this program made before, are taken as a target.
#[derive(Debug)]
pub struct Staging {
    target: PathBuf,
    staging: PathBuf,
    /// Whether the target was absent: it goes again if nothing comes of it.
    created: bool,
}

impl Staging {
    /// Prepares `target`, which is created if absent.
    pub fn create(target: &Path) -> Result<Self> {
        let created = !target.exists();
        fs::create_dir_all(target).map_err(|error| Error::write(target, &error))?;
        let foreign = !target.join(INFO_FILE).exists()
            && (!shard_files(target, Split::Train)?.is_empty()
                || !shard_files(target, Split::Val)?.is_empty());
        if foreign {
            return Err(Error::input(
                format!("folder holds shards but no {INFO_FILE}"),
                target.display(),
                "a new folder, or one whose shards `fairway data` wrote",
            ));
        }
        let staging = target.join(format!(".partial-{}", std::process::id()));
        let _ = fs::remove_dir_all(&staging);
        let staged = Self { target: target.to_path_buf(), staging, created };
        fs::create_dir(&staged.staging).map_err(|error| Error::write(&staged.staging, &error))?;
        Ok(staged)
    }

    /// Where new shards are written until [`commit`](Self::commit).
    pub fn dir(&self) -> &Path {
        &self.staging
    }

    /// Replaces the target's shards by the new ones and its record by `info`.
    pub fn commit(self, info: &DataInfo) -> Result<()> {
        let mut fresh = shard_files(&self.staging, Split::Train)?;
        fresh.extend(shard_files(&self.staging, Split::Val)?);
        let mut older = shard_files(&self.target, Split::Train)?;
        older.extend(shard_files(&self.target, Split::Val)?);
        let fail = |path: &Path, error: std::io::Error| Error::write(path, &error);
        for shard in &fresh {
            let Some(name) = shard.file_name() else { continue };
            let place = self.target.join(name);
            fs::rename(shard, &place).map_err(|error| fail(&place, error))?;
            older.retain(|path| *path != place);
        }
        for path in older {
            fs::remove_file(&path).map_err(|error| fail(&path, error))?;
        }
        info.save(&self.target)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.staging);
        if self.created {
            // Succeeds only where nothing was put into it.
            let _ = fs::remove_dir(&self.target);
        }
    }
}

/// Opens every path, so that a bad shard is found before any is used; returns the token counts.
pub(super) fn check_shards(paths: &[PathBuf]) -> Result<Vec<u64>> {
    paths.iter().map(|path| Ok(Shard::open(path)?.tokens().len() as u64)).collect()
}
