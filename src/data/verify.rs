//! Checking shards: their format, ids, counts and checksums, and, with the texts that they were made from, every
//! token and the byte count.

use super::Progress;
use super::byte_table::ByteTable;
use super::documents::Documents;
use super::folder::{DataFolder, DataInfo, Split};
use super::pack::{Encoded, encode_all};
use super::shard::{HEADER_BYTES, Shard, ShardReport, digest_shards};
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use rayon::prelude::*;
use std::path::PathBuf;

/// The begin-of-document id of the challenge's tokenizers, where no tokenizer is given.
const CHALLENGE_BOS: u16 = 1;

/// What to check.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// A folder of shards, or one shard.
    pub data: PathBuf,
    /// The texts that the shards were packed from, in the same order; may be empty.
    pub files: Vec<PathBuf>,
    /// `byte` or a SentencePiece model file. Needed for the byte count and for texts, unless the folder's record
    /// says that its shards are of `byte`.
    pub tokenizer: Option<String>,
}

/// What was found: all of it correct, or there would be an error.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// Documents: the tokens that are BOS.
    pub docs: u64,
    /// Tokens of all shards.
    pub tokens: u64,
    /// Bytes that the tokens decode to, as the byte table counts them; `None` without a tokenizer.
    pub bytes: Option<u64>,
    /// UTF-8 bytes of the given texts, every token of which was compared; `None` without texts.
    pub raw_bytes: Option<u64>,
    /// The shards in the order of their names.
    pub shards: Vec<ShardReport>,
    /// SHA-256 of all shards, one behind the other in that order.
    pub sha256: String,
}

/// Checks shards; the first thing that is wrong is the error, with its file and place.
///
/// Checked are each header (to its last zero), size and count; the ids, against the tokenizer's or the recorded
/// vocabulary; that each split begins with BOS; what `fairway_data.json` records, where the folder has one; and,
/// where texts are given, that encoding them again gives every token of the validation and then the train shards.
pub fn verify(options: &VerifyOptions, progress: Progress) -> Result<VerifyReport> {
    // A single shard is a split of its own, with no record beside it that would be about it alone.
    let (splits, info, folder) = if options.data.is_file() {
        (vec![vec![options.data.clone()]], None, None)
    } else {
        let folder = DataFolder::open(&options.data)?;
        let splits = [Split::Val, Split::Train].map(|split| folder.shards(split).to_vec());
        (splits.to_vec(), folder.info().cloned(), Some(folder))
    };
    let recorded_byte = info.as_ref().is_some_and(|info| info.tokenizer.kind == "byte");
    let tokenizer = match &options.tokenizer {
        Some(spec) => Some(Tokenizer::load(spec)?),
        None => recorded_byte.then(Tokenizer::byte),
    };
    if let (Some(folder), Some(tokenizer)) = (&folder, &tokenizer) {
        folder.check_tokenizer(tokenizer)?;
    }
    if tokenizer.is_none() && !options.files.is_empty() {
        return Err(Error::input("texts to compare but no tokenizer", "--tokenizer", "byte or a model file"));
    }
    let table = tokenizer.as_ref().map(|known| ByteTable::new(known, known.vocab_size())).transpose()?;
    let vocab = tokenizer.as_ref().map(Tokenizer::vocab_size);
    let vocab = vocab.or(info.as_ref().map(|info| info.tokenizer.vocab_size));
    let bos = tokenizer.as_ref().map_or(CHALLENGE_BOS, Tokenizer::bos);

    let mut found = Counts::default();
    let total_bytes = splits.iter().flatten().map(|path| Ok(Shard::open(path)?.file_bytes().len() as u64));
    let total_bytes = total_bytes.sum::<Result<u64>>()?;
    for split in &splits {
        let mut previous = None;
        for path in split {
            let shard = Shard::open(path)?;
            if let Some(place) = shard.file_bytes()[12..HEADER_BYTES].iter().position(|byte| *byte != 0) {
                let what = format!("byte {} of the header is not 0", place + 12);
                return Err(Error::input(what, path.display(), "zeros behind magic, version and count"));
            }
            if let Some(vocab) = vocab {
                shard.check_vocab(vocab)?;
            }
            if previous.is_none() && folder.is_some() && shard.tokens().first() != Some(&bos) {
                let first = shard.tokens().first().copied().unwrap_or_default();
                return Err(Error::input(
                    format!("first token is {first}"),
                    path.display(),
                    format!("BOS {bos}"),
                ));
            }
            found.add(&shard, bos, previous, table.as_ref());
            previous = shard.tokens().last().copied();
            progress(found.file_bytes, total_bytes)?;
        }
    }
    let mut paths: Vec<PathBuf> = splits.concat();
    paths.sort();
    let (shards, sha256) = digest_shards(&paths)?;
    let bytes = table.is_some().then_some(found.bytes);
    if let Some(info) = &info {
        compare_with_record(info, &found, bytes, &sha256, options)?;
    }
    let raw_bytes = match (&tokenizer, &table) {
        (Some(tokenizer), Some(table)) if !options.files.is_empty() => {
            Some(compare_texts(options, &splits.concat(), tokenizer, table, progress)?)
        }
        _ => None,
    };
    Ok(VerifyReport { docs: found.docs, tokens: found.tokens, bytes, raw_bytes, shards, sha256 })
}

#[derive(Default)]
struct Counts {
    docs: u64,
    tokens: u64,
    bytes: u64,
    file_bytes: u64,
}

impl Counts {
    /// Adds a shard, whose first token follows `previous`.
    fn add(&mut self, shard: &Shard, bos: u16, previous: Option<u16>, table: Option<&ByteTable>) {
        /// Tokens of one piece of parallel work.
        const CHUNK: usize = 1 << 18;
        let tokens = shard.tokens();
        self.docs += shard.count(bos);
        self.tokens += tokens.len() as u64;
        self.file_bytes += shard.file_bytes().len() as u64;
        let Some(table) = table else { return };
        let starts = (0..tokens.len()).into_par_iter().step_by(CHUNK);
        // Each piece begins one token early, since a target's bytes depend on the token before it.
        let count = |start: usize| {
            let end = tokens.len().min(start + CHUNK);
            table.count(&tokens[start.saturating_sub(1)..end])
        };
        self.bytes += starts.map(count).sum::<u64>();
        if let (Some(previous), Some(first)) = (previous, tokens.first()) {
            self.bytes += u64::from(table.bytes_of(previous, *first));
        }
    }
}

fn compare_with_record(
    info: &DataInfo,
    found: &Counts,
    bytes: Option<u64>,
    sha256: &str,
    options: &VerifyOptions,
) -> Result<()> {
    let differ = |what: &str, found: &str, recorded: &str| {
        let expected = format!("{recorded}, as {} records", super::folder::INFO_FILE);
        Err(Error::input(format!("{what} of the shards is {found}"), options.data.display(), expected))
    };
    let numbers =
        [("number of tokens", found.tokens, info.tokens), ("number of documents", found.docs, info.docs)];
    let bytes = bytes.map(|bytes| ("byte count", bytes, info.bytes));
    for (what, found, recorded) in numbers.into_iter().chain(bytes) {
        if found != recorded {
            return differ(what, &found.to_string(), &recorded.to_string());
        }
    }
    if sha256 != info.sha256 {
        return differ("SHA-256", sha256, &info.sha256);
    }
    Ok(())
}

/// Encodes the texts again and compares them with the shards, token by token; returns their UTF-8 bytes.
fn compare_texts(
    options: &VerifyOptions,
    paths: &[PathBuf],
    tokenizer: &Tokenizer,
    table: &ByteTable,
    progress: Progress,
) -> Result<u64> {
    let documents = Documents::open(&options.files)?;
    let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>>>()?;
    let (mut shard, mut offset, mut raw_bytes) = (0, 0, 0);
    let mut compare = |document: Encoded| {
        raw_bytes += document.raw_bytes;
        let mut rest = document.tokens.as_slice();
        while !rest.is_empty() {
            let Some(current) = shards.get(shard) else {
                let what = "shards end before the text";
                return Err(Error::input(what, &document.place, "shards made from these texts"));
            };
            let packed = &current.tokens()[offset..];
            let count = packed.len().min(rest.len());
            if let Some(place) = (0..count).find(|place| packed[*place] != rest[*place]) {
                return Err(Error::input(
                    format!("token {} is {}", offset + place, packed[place]),
                    current.path().display(),
                    format!("{}, as {} is encoded", rest[place], document.place),
                ));
            }
            rest = &rest[count..];
            offset += count;
            if offset == current.tokens().len() {
                (shard, offset) = (shard + 1, 0);
            }
        }
        Ok(())
    };
    encode_all(documents, tokenizer, table, progress, &mut compare)?;
    match shards.get(shard) {
        None => Ok(raw_bytes),
        Some(current) => Err(Error::input(
            format!("token {offset} is beyond the end of the texts"),
            current.path().display(),
            "shards made from these texts",
        )),
    }
}
