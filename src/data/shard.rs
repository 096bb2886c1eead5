//! One shard file: a header of 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens
//! as little-endian uint16 (`spec/challenge.md` section 2).

use crate::error::{Error, Result};
use crate::files;
use memmap2::Mmap;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// First int32 of a shard.
pub const MAGIC: i32 = 20_240_520;
/// Second int32 of a shard.
pub const VERSION: i32 = 1;
/// Bytes before the first token.
pub const HEADER_BYTES: usize = 1024;
/// The most tokens that the header's third int32 can count.
pub const MAX_TOKENS: u64 = i32::MAX as u64;
/// Tokens of one piece of parallel work: long enough to amortise the hand-over, short enough to share out.
const SCAN_CHUNK: usize = 1 << 18;

/// A shard file, memory-mapped and checked: magic, version, and a token count that is at least 1 and agrees with
/// the file's size to the byte.
///
/// The file must not be shortened while it is open (nothing here does: shards are replaced by renaming).
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    map: Mmap,
    /// The tokens in the machine's own order, where the map cannot be read as `u16` in place.
    decoded: Option<Vec<u16>>,
}

impl Shard {
    /// Maps and checks `path`; a one-line error names the file, what is wrong and what was expected.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::read(path, &error))?;
        let meta = file.metadata().map_err(|error| Error::read(path, &error))?;
        if !meta.is_file() {
            return Err(Error::input("not a file", path.display(), "a token shard"));
        }
        if meta.len() <= HEADER_BYTES as u64 {
            return Err(Error::input(
                format!("shard of {} bytes", meta.len()),
                path.display(),
                format!("a header of {HEADER_BYTES} bytes and at least one token"),
            ));
        }
        // SAFETY: the mapping is read-only. A shard is never written in place, only replaced by a rename, which
        // leaves this mapping on the older file.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::read(path, &error))?;
        check_header(path, &map)?;
        let mut shard = Self { path: path.to_path_buf(), map, decoded: None };
        if cfg!(target_endian = "big") || shard.in_place().is_none() {
            let pairs = shard.map[HEADER_BYTES..].chunks_exact(2);
            shard.decoded = Some(pairs.map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect());
        }
        Ok(shard)
    }

    /// The file that this is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file, header included.
    pub fn file_bytes(&self) -> &[u8] {
        &self.map
    }

    /// The token ids, in order.
    pub fn tokens(&self) -> &[u16] {
        match &self.decoded {
            Some(tokens) => tokens,
            None => self.in_place().unwrap_or_default(),
        }
    }

    /// The mapped tokens as they lie in memory, where they are aligned.
    fn in_place(&self) -> Option<&[u16]> {
        // SAFETY: every bit pattern is a u16, and `align_to` keeps to whole, aligned elements.
        let (before, tokens, after) = unsafe { self.map[HEADER_BYTES..].align_to::<u16>() };
        (before.is_empty() && after.is_empty()).then_some(tokens)
    }

    /// Checks that every id is below `vocab`; the error names the first that is not, and where it stands.
    pub fn check_vocab(&self, vocab: usize) -> Result<()> {
        let found = self.tokens().par_chunks(SCAN_CHUNK).enumerate().find_map_first(|(index, chunk)| {
            // The maximum is one vectorised pass; the place is looked for only where there is one.
            let too_large = |id: &&u16| usize::from(**id) >= vocab;
            chunk.iter().max().filter(too_large)?;
            chunk.iter().position(|id| too_large(&id)).map(|place| (index * SCAN_CHUNK + place, chunk[place]))
        });
        match found {
            None => Ok(()),
            Some((place, id)) => Err(Error::input(
                format!("token id {id} at token {place}"),
                self.path.display(),
                format!(
                    "ids below the vocabulary size {vocab} (shards and tokenizer of the same vocabulary)"
                ),
            )),
        }
    }

    /// How many tokens are `id`.
    pub fn count(&self, id: u16) -> u64 {
        let count = |chunk: &[u16]| chunk.iter().filter(|token| **token == id).count() as u64;
        self.tokens().par_chunks(SCAN_CHUNK).map(count).sum()
    }

    /// SHA-256 of the whole file, in hexadecimal.
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.map))
    }
}

/// Bytes as lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn check_header(path: &Path, bytes: &[u8]) -> Result<()> {
    let word = |index: usize| {
        let at = index * 4;
        i32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    let bad = |what: String, expected: String| Err(Error::input(what, path.display(), expected));
    if word(0) != MAGIC {
        return bad(format!("magic number {} in a shard", word(0)), MAGIC.to_string());
    }
    if word(1) != VERSION {
        return bad(format!("shard version {}", word(1)), VERSION.to_string());
    }
    if word(2) < 1 {
        return bad(format!("header counts {} tokens", word(2)), "at least 1".into());
    }
    let size = HEADER_BYTES as u64 + 2 * word(2) as u64;
    if bytes.len() as u64 != size {
        let what = format!("shard of {} bytes whose header counts {} tokens", bytes.len(), word(2));
        return bad(what, format!("{size} bytes"));
    }
    Ok(())
}

/// Writes a shard token by token: beside its path, synced and renamed over it by [`finish`](Self::finish).
/// Dropped before that, it removes its unfinished file and leaves an older shard as it was.
#[derive(Debug)]
pub struct ShardWriter {
    path: PathBuf,
    partial: PathBuf,
    writer: Option<BufWriter<File>>,
    tokens: u64,
    buffer: Vec<u8>,
}

impl ShardWriter {
    /// Starts a shard that will be `path`; its folder must exist.
    pub fn create(path: &Path) -> Result<Self> {
        let partial = files::beside(path);
        let file = File::create(&partial).map_err(|error| Error::write(path, &error))?;
        let mut shard = Self {
            path: path.to_path_buf(),
            partial,
            writer: Some(BufWriter::with_capacity(1 << 20, file)),
            tokens: 0,
            buffer: Vec::new(),
        };
        shard.put(&[0; HEADER_BYTES])?;
        Ok(shard)
    }

    /// Tokens written so far.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Appends tokens. A shard holds at most [`MAX_TOKENS`].
    pub fn push(&mut self, tokens: &[u16]) -> Result<()> {
        if self.tokens + tokens.len() as u64 > MAX_TOKENS {
            let limit = format!("at most {MAX_TOKENS} tokens in one shard");
            return Err(Error::input("too many tokens", self.path.display(), limit));
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        for chunk in tokens.chunks(1 << 15) {
            buffer.clear();
            buffer.extend(chunk.iter().flat_map(|token| token.to_le_bytes()));
            self.put(&buffer)?;
        }
        self.buffer = buffer;
        self.tokens += tokens.len() as u64;
        Ok(())
    }

    /// Completes the header, syncs, and puts the shard in its place; returns its number of tokens.
    pub fn finish(mut self) -> Result<u64> {
        if self.tokens == 0 {
            return Err(Error::failed("a shard without tokens", self.path.display(), "at least one token"));
        }
        let mut header = Vec::with_capacity(12);
        for word in [MAGIC, VERSION, self.tokens as i32] {
            header.extend(word.to_le_bytes());
        }
        let written = (|| {
            let Some(mut writer) = self.writer.take() else { return Ok(()) };
            writer.seek(SeekFrom::Start(0))?;
            writer.write_all(&header)?;
            writer.flush()?;
            writer.get_ref().sync_all()?;
            drop(writer);
            fs::rename(&self.partial, &self.path)
        })();
        written.map_err(|error| {
            let _ = fs::remove_file(&self.partial);
            Error::write(&self.path, &error)
        })?;
        Ok(self.tokens)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.writer {
            Some(writer) => writer.write_all(bytes).map_err(|error| Error::write(&self.path, &error)),
            None => Ok(()),
        }
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        if let Some(writer) = self.writer.take() {
            // Nothing of an abandoned shard is worth flushing.
            drop(writer.into_parts());
            let _ = fs::remove_file(&self.partial);
        }
    }
}

/// One shard of a report.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ShardReport {
    /// File name.
    pub file: String,
    /// Number of tokens.
    pub tokens: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// The SHA-256 of each shard and of them all, one behind the other: of a folder's `fineweb_*.bin` in the order of
/// their names, what `cat fineweb_*.bin | sha256sum` prints. Of a single shard both are the same.
pub fn digest_shards(paths: &[PathBuf]) -> Result<(Vec<ShardReport>, String)> {
    let mut all = Sha256::new();
    let mut reports = Vec::with_capacity(paths.len());
    for path in paths {
        let shard = Shard::open(path)?;
        let (own, ()) = rayon::join(|| shard.sha256(), || all.update(shard.file_bytes()));
        reports.push(ShardReport {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            tokens: shard.tokens().len() as u64,
            sha256: own,
        });
    }
    Ok((reports, hex(&all.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_the_header_and_the_tokens_to_the_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fineweb_val_000000.bin");
        let mut writer = ShardWriter::create(&path).unwrap();
        writer.push(&[1, 258]).unwrap();
        writer.push(&[65535]).unwrap();
        assert_eq!(writer.tokens(), 3);
        assert!(!path.exists(), "a shard appears only when it is whole");
        assert_eq!(writer.finish().unwrap(), 3);
        let bytes = fs::read(&path).unwrap();
        // 20240520 = 0x0134d888.
        assert_eq!(bytes[..12], [0x88, 0xd8, 0x34, 0x01, 1, 0, 0, 0, 3, 0, 0, 0]);
        assert!(bytes[12..HEADER_BYTES].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[HEADER_BYTES..], [1, 0, 2, 1, 255, 255]);
        let shard = Shard::open(&path).unwrap();
        assert_eq!(shard.tokens(), [1, 258, 65535]);
        assert_eq!((shard.count(258), shard.count(7)), (1, 0));
        let (reports, all) = digest_shards(std::slice::from_ref(&path)).unwrap();
        assert_eq!((reports[0].tokens, &reports[0].sha256), (3, &all));
        assert_eq!(all, hex(&Sha256::digest(&bytes)));
    }

    #[test]
    fn an_abandoned_writer_leaves_the_older_shard_and_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        fs::write(&path, b"older").unwrap();
        let mut writer = ShardWriter::create(&path).unwrap();
        writer.push(&[1; 5000]).unwrap();
        drop(writer);
        assert!(ShardWriter::create(&path).unwrap().finish().is_err(), "an empty shard is refused");
        assert_eq!(fs::read(&path).unwrap(), b"older");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_first_id_out_of_range_is_found_across_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.bin");
        let mut tokens = vec![1023_u16; 3 * SCAN_CHUNK];
        tokens[2 * SCAN_CHUNK + 5] = 1024;
        tokens[2 * SCAN_CHUNK + 9] = 2000;
        let mut writer = ShardWriter::create(&path).unwrap();
        writer.push(&tokens).unwrap();
        writer.finish().unwrap();
        let shard = Shard::open(&path).unwrap();
        shard.check_vocab(2001).unwrap();
        let error = shard.check_vocab(1024).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let place = format!("token id 1024 at token {}", 2 * SCAN_CHUNK + 5);
        assert!(error.to_string().starts_with(&place), "{error}");
    }
}
