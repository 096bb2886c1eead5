//! Packing documents into shards (`spec/challenge.md` section 2): each document is BOS and its tokens, no EOS; the
//! documents keep their order and lie back to back over the borders of shards; the first ones are the validation
//! split, and the change of split begins a new shard.

use super::Progress;
use super::byte_table::ByteTable;
use super::documents::{Documents, RawDocument};
use super::folder::{DataFolder, DataInfo, Split, Staging, TokenizerInfo};
use super::shard::{MAX_TOKENS, ShardReport, ShardWriter, digest_shards};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;

/// Validation documents unless told otherwise: the challenge's number.
pub const DEFAULT_VAL_DOCS: u64 = 50_000;
/// Tokens of a full shard unless told otherwise: the challenge's number.
pub const DEFAULT_SHARD_TOKENS: u64 = 100_000_000;

/// What to pack, and how.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// JSONL with a `text` field (`.jsonl`, `.ndjson`) or plain text with one document a file; gzip is recognised.
    pub files: Vec<PathBuf>,
    /// `byte` or a SentencePiece model file.
    pub tokenizer: String,
    /// The folder that the shards go to.
    pub out: PathBuf,
    /// So many first documents are the validation split, even if they are all there are; 0 puts all in train
    /// shards. `None`: the first [`DEFAULT_VAL_DOCS`], but of fewer than ten times as many documents only a tenth
    /// (at least one, if there are two).
    pub val_docs: Option<u64>,
    /// Tokens of a full shard; the last of a split is smaller.
    pub shard_tokens: u64,
}

impl PackOptions {
    /// The challenge's numbers.
    pub fn new(files: Vec<PathBuf>, tokenizer: &str, out: PathBuf) -> Self {
        let tokenizer = tokenizer.to_string();
        Self { files, tokenizer, out, val_docs: None, shard_tokens: DEFAULT_SHARD_TOKENS }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PackReport {
    /// The folder of the shards.
    pub out: PathBuf,
    /// Documents of both splits.
    pub docs: u64,
    /// Documents of the validation split.
    pub val_docs: u64,
    /// Tokens of both splits, a BOS for each document included.
    pub tokens: u64,
    /// Bytes that the tokens decode to, as the byte table counts them for bits-per-byte.
    pub bytes: u64,
    /// UTF-8 bytes of the documents before they were encoded (a tokenizer that normalises loses some).
    pub raw_bytes: u64,
    /// The shards in the order of their names.
    pub shards: Vec<ShardReport>,
    /// SHA-256 of all shards, one behind the other in that order (`cat fineweb_*.bin | sha256sum`).
    pub sha256: String,
}

/// Packs files. The output depends on nothing but the documents, the tokenizer and the options; memory is bounded by
/// some batches of documents. On failure the shards that `out` held before are as they were.
pub fn pack(options: &PackOptions, progress: Progress) -> Result<PackReport> {
    if options.files.is_empty() {
        return Err(Error::input("nothing to pack", "FILE", "at least one JSONL or text file"));
    }
    let tokenizer = Tokenizer::load(&options.tokenizer)?;
    let documents = Documents::open(&options.files)?;
    let val_docs = match options.val_docs {
        Some(count) => count,
        None => {
            // No more is read here than is needed to know that there are documents enough.
            let enough = DEFAULT_VAL_DOCS * 10;
            let count = Documents::open(&options.files)?.count_up_to(enough, progress)?;
            if count > 1 { (count / 10).max(1) } else { 0 }
        }
    };
    let mut writer = PackWriter::create(&options.out, &tokenizer, val_docs, options.shard_tokens, "pack")?;
    encode_all(documents, &tokenizer, &writer.byte_table.clone(), progress, &mut |document| {
        writer.push(&document)
    })?;
    writer.finish()
}

/// A document, encoded.
#[derive(Debug)]
pub(super) struct Encoded {
    /// BOS and the tokens of the text.
    pub tokens: Vec<u16>,
    /// Bytes that they decode to.
    pub bytes: u64,
    /// UTF-8 bytes of the text.
    pub raw_bytes: u64,
    /// Where the document stands.
    pub place: String,
}

/// BOS and the tokens of `text`.
pub(super) fn encode(text: &str, place: String, tokenizer: &Tokenizer, table: &ByteTable) -> Encoded {
    let mut tokens = vec![tokenizer.bos()];
    tokenizer.encode_into(text, &mut tokens);
    Encoded { bytes: table.count(&tokens), raw_bytes: text.len() as u64, tokens, place }
}

/// Encodes `documents` on all cores and hands them to `sink` in their order; one thread reads ahead.
pub(super) fn encode_all(
    mut documents: Documents,
    tokenizer: &Tokenizer,
    table: &ByteTable,
    progress: Progress,
    sink: &mut dyn FnMut(Encoded) -> Result<()>,
) -> Result<()> {
    let total = documents.total_bytes();
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<Result<(Vec<RawDocument>, u64)>>(1);
        scope.spawn(move || {
            loop {
                let batch = documents.next_batch().map(|batch| (batch, documents.read_bytes()));
                let last = batch.as_ref().map_or(true, |(batch, _)| batch.is_empty());
                // The other end is gone when the work failed there.
                if sender.send(batch).is_err() || last {
                    break;
                }
            }
        });
        for batch in receiver {
            let (batch, read) = batch?;
            let one = |document: RawDocument| {
                let place = document.place();
                Ok(encode(&document.into_text()?, place, tokenizer, table))
            };
            let encoded: Vec<Result<Encoded>> = batch.into_par_iter().map(one).collect();
            for document in encoded {
                sink(document?)?;
            }
            progress(read, total)?;
        }
        Ok(())
    })
}

/// Writes documents as shards into a folder, all or nothing.
pub(super) struct PackWriter {
    staging: Staging,
    out: PathBuf,
    pub byte_table: ByteTable,
    shard_tokens: u64,
    val_docs: u64,
    split: Split,
    /// Shards that the current split has so far.
    index: usize,
    shard: Option<ShardWriter>,
    info: DataInfo,
}

impl PackWriter {
    /// The first `val_docs` documents will be the validation split. `source` is noted in the folder's record.
    pub fn create(
        out: &Path,
        tokenizer: &Tokenizer,
        val_docs: u64,
        shard_tokens: u64,
        source: &str,
    ) -> Result<Self> {
        if shard_tokens == 0 || shard_tokens > MAX_TOKENS {
            let expected = format!("1 to {MAX_TOKENS}");
            return Err(Error::input(format!("shards of {shard_tokens} tokens"), "--shard-tokens", expected));
        }
        let info = DataInfo {
            format: 1,
            source: source.to_string(),
            tokenizer: TokenizerInfo::of(tokenizer),
            docs: 0,
            val_docs: 0,
            tokens: 0,
            bytes: 0,
            raw_bytes: 0,
            sha256: String::new(),
        };
        Ok(Self {
            staging: Staging::create(out)?,
            out: out.to_path_buf(),
            byte_table: ByteTable::new(tokenizer, tokenizer.vocab_size())?,
            shard_tokens,
            val_docs,
            split: Split::Val,
            index: 0,
            shard: None,
            info,
        })
    }

    /// Appends a document.
    pub fn push(&mut self, document: &Encoded) -> Result<()> {
        if self.split == Split::Val && self.info.docs == self.val_docs {
            self.flush()?;
            (self.split, self.index) = (Split::Train, 0);
        }
        self.info.docs += 1;
        self.info.val_docs += u64::from(self.split == Split::Val);
        self.info.tokens += document.tokens.len() as u64;
        self.info.bytes += document.bytes;
        self.info.raw_bytes += document.raw_bytes;
        let mut rest = document.tokens.as_slice();
        while !rest.is_empty() {
            let shard = match &mut self.shard {
                Some(shard) => shard,
                None => {
                    let path = self.staging.dir().join(self.split.shard_name(self.index));
                    self.shard.insert(ShardWriter::create(&path)?)
                }
            };
            let room = self.shard_tokens - shard.tokens();
            let (fits, more) = rest.split_at(rest.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            shard.push(fits)?;
            if shard.tokens() == self.shard_tokens {
                self.flush()?;
            }
            rest = more;
        }
        Ok(())
    }

    /// Completes the shard in hand, if any.
    fn flush(&mut self) -> Result<()> {
        if let Some(shard) = self.shard.take() {
            shard.finish()?;
            self.index += 1;
        }
        Ok(())
    }

    /// Puts the shards in their place and says what they are.
    pub fn finish(mut self) -> Result<PackReport> {
        self.flush()?;
        if self.info.docs == 0 {
            return Err(Error::input("no documents", self.out.display(), "at least one document to pack"));
        }
        let folder = DataFolder::open(self.staging.dir())?;
        // Sorted by name: train before val.
        let paths = [folder.shards(Split::Train), folder.shards(Split::Val)].concat();
        let (shards, sha256) = digest_shards(&paths)?;
        self.info.sha256.clone_from(&sha256);
        self.staging.commit(&self.info)?;
        Ok(PackReport {
            out: self.out,
            docs: self.info.docs,
            val_docs: self.info.val_docs,
            tokens: self.info.tokens,
            bytes: self.info.bytes,
            raw_bytes: self.info.raw_bytes,
            shards,
            sha256,
        })
    }
}
