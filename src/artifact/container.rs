//! The one file that is an artifact: a header of fixed-size entries, then the compressed sections, with nothing
//! between them and nothing behind.
//!
//! ```text
//! "FAIRWAY"  7 bytes
//! version    u8, 2
//! sections   u8, 4
//! for each section, in ascending order of kind:
//!   kind u8, codec u8, raw length u32, stored length u32, first 8 bytes of the SHA-256 of the stored bytes
//! first 8 bytes of the SHA-256 of everything above
//! the stored bytes of each section, in the same order: its blocks' streams (see `codec`)
//! ```
//!
//! Integers are little-endian. Nothing is allocated on the word of a length: lengths are checked against the caps
//! below and the file's size, and buffers grow with the bytes that really come.

use super::codec::{Codec, SectionReader};
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Take};
use std::path::{Path, PathBuf};

/// What the file starts with.
pub const MAGIC: [u8; 7] = *b"FAIRWAY";
/// The format that this library writes, and the only one that it reads.
pub const VERSION: u8 = 2;
/// The largest file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// The most that all sections together may decompress to, in bytes.
pub const MAX_RAW_BYTES: u64 = 1 << 30;
/// The most that each section but the tensors' data may decompress to, in bytes.
pub const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Bytes of a truncated SHA-256.
const DIGEST_BYTES: usize = 8;
const ENTRY_BYTES: usize = 2 + 4 + 4 + DIGEST_BYTES;
/// Bytes of the header that come before the entries.
const PREAMBLE_BYTES: usize = MAGIC.len() + 2;
/// Bytes of the whole header.
pub const HEADER_BYTES: usize = PREAMBLE_BYTES + Kind::ALL.len() * ENTRY_BYTES + DIGEST_BYTES;

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The recipe, the quantisation's name, and notes.
    Recipe,
    /// The byte table and the tokenizer's pieces.
    Vocabulary,
    /// Names, shapes and storage of the tensors, and the order of their parts in the data.
    TensorTable,
    /// The parts' bytes.
    TensorData,
}

impl Kind {
    /// All kinds, in the order that a file has them.
    pub const ALL: [Self; 4] = [Self::Recipe, Self::Vocabulary, Self::TensorTable, Self::TensorData];

    /// The kind's number in the header.
    pub fn id(self) -> u8 {
        match self {
            Self::Recipe => 1,
            Self::Vocabulary => 2,
            Self::TensorTable => 3,
            Self::TensorData => 4,
        }
    }

    /// The most that a section of this kind may decompress to, in bytes.
    pub fn cap(self) -> u64 {
        if self == Self::TensorData { MAX_RAW_BYTES } else { MAX_TABLE_BYTES }
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recipe => "recipe",
            Self::Vocabulary => "vocabulary",
            Self::TensorTable => "tensor table",
            Self::TensorData => "tensor data",
        }
    }
}

/// A section as [`seal`] takes it: its header entry need not be true, so that tests can say what they like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Number of the kind ([`Kind::id`]).
    pub kind: u8,
    /// Number of the codec ([`Codec::id`]).
    pub codec: u8,
    /// Length after decompression, in bytes.
    pub raw_len: u32,
    /// The compressed bytes.
    pub stored: Vec<u8>,
}

impl Sealed {
    /// Compresses a section and checks that it decompresses to the same bytes. `cuts` as in
    /// [`Codec::compress_section`].
    pub fn pack(kind: Kind, codec: Codec, raw: &[u8], cuts: &[usize]) -> Result<Self> {
        let cap = kind.cap();
        let raw_len =
            u32::try_from(raw.len()).ok().filter(|&len| u64::from(len) <= cap).ok_or_else(|| {
                Error::input(
                    format!("{} of {} bytes", kind.name(), raw.len()),
                    "artifact",
                    format!("at most {cap} bytes"),
                )
            })?;
        let stored = codec.compress_section(raw, cuts)?;
        // Decompressing costs little beside compressing, and a fault found here is found before the weights are gone.
        let back = codec.decompress_section(&stored, u64::from(raw_len));
        if !back.is_ok_and(|back| back == raw) {
            return Err(Error::failed(
                format!("{} does not decompress to what was compressed", kind.name()),
                format!("codec {codec}"),
                "the same bytes (try another --codec)",
            ));
        }
        Ok(Self { kind: kind.id(), codec: codec.id(), raw_len, stored })
    }
}

/// The file of these sections, with true stored lengths and checksums.
///
/// # Panics
/// On more than 255 sections or a section of 4 GiB, which no caller can have.
pub fn seal(sections: &[Sealed]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.push(VERSION);
    file.push(u8::try_from(sections.len()).expect("few sections"));
    for section in sections {
        file.extend([section.kind, section.codec]);
        file.extend(section.raw_len.to_le_bytes());
        file.extend(u32::try_from(section.stored.len()).expect("bounded section").to_le_bytes());
        file.extend(digest(Sha256::new_with_prefix(&section.stored)));
    }
    file.extend(digest(Sha256::new_with_prefix(&file)));
    sections.iter().for_each(|section| file.extend_from_slice(&section.stored));
    file
}

fn digest(hasher: Sha256) -> [u8; DIGEST_BYTES] {
    let full: [u8; 32] = hasher.finalize().into();
    std::array::from_fn(|i| full[i])
}

/// One section of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: Kind,
    /// How it is compressed.
    pub codec: Codec,
    /// Length after decompression, in bytes.
    pub raw_len: u64,
    /// Length in the file, in bytes.
    pub stored_len: u64,
    offset: u64,
    digest: [u8; DIGEST_BYTES],
}

/// An artifact file whose header and checksums are good.
#[derive(Debug)]
pub struct Container {
    file: File,
    path: PathBuf,
    /// Size of the file.
    pub bytes: u64,
    /// The sections, one of each kind, in the order of [`Kind::ALL`].
    pub sections: [Section; Kind::ALL.len()],
}

impl Container {
    /// Opens a file, checks its header and every section's checksum. Reads it once, in small pieces.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |what: String, expected: String| Error::input(what, path.display(), expected);
        // Asked before it is opened: opening a pipe would wait for its writer.
        let metadata = std::fs::metadata(path).map_err(|error| Error::read(path, &error))?;
        if !metadata.is_file() {
            return Err(bad("not a regular file".into(), "an artifact".into()));
        }
        let file = File::open(path).map_err(|error| Error::read(path, &error))?;
        let bytes = metadata.len();
        if bytes > MAX_FILE_BYTES {
            return Err(bad(
                format!("{bytes} bytes"),
                format!("an artifact of at most {MAX_FILE_BYTES} bytes"),
            ));
        }
        let mut header = Vec::with_capacity(HEADER_BYTES);
        (&file)
            .take(HEADER_BYTES as u64)
            .read_to_end(&mut header)
            .map_err(|error| Error::read(path, &error))?;
        let sections = parse_header(&header, path)?;
        let expected = sections.iter().fold(HEADER_BYTES as u64, |sum, section| sum + section.stored_len);
        if bytes != expected {
            let what = if bytes < expected { "cut short" } else { "too long" };
            return Err(bad(
                format!("artifact is {what}: {bytes} bytes"),
                format!("the {expected} bytes that its header declares"),
            ));
        }
        let container = Self { file, path: path.to_path_buf(), bytes, sections };
        container.sections.iter().try_for_each(|section| container.verify(section))?;
        Ok(container)
    }

    /// The section of a kind.
    pub fn section(&self, kind: Kind) -> &Section {
        &self.sections[usize::from(kind.id() - 1)]
    }

    fn stored(&self, section: &Section) -> Result<BufReader<Take<&File>>> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(section.offset)).map_err(|error| Error::read(&self.path, &error))?;
        Ok(BufReader::with_capacity(1 << 16, file.take(section.stored_len)))
    }

    fn verify(&self, section: &Section) -> Result<()> {
        let mut hasher = Sha256::new();
        std::io::copy(&mut self.stored(section)?, &mut hasher)
            .map_err(|error| Error::read(&self.path, &error))?;
        if digest(hasher) == section.digest {
            return Ok(());
        }
        Err(Error::input(
            format!("checksum of the {} does not match", section.kind.name()),
            self.path.display(),
            "an undamaged artifact",
        ))
    }

    /// A decoder at the start of a section. What it gives is bounded by what the caller asks for; the caller ends
    /// with [`SectionReader::finish`]. One decoder at a time: they share the file's position.
    pub fn stream(&self, kind: Kind) -> Result<SectionReader<BufReader<Take<&File>>>> {
        let section = self.section(kind);
        SectionReader::new(section.codec, self.stored(section)?, section.raw_len)
            .map_err(|error| self.broken(kind, &error))
    }

    /// A whole section, decompressed: for the small tables.
    pub fn table(&self, kind: Kind) -> Result<Vec<u8>> {
        let section = self.section(kind);
        let mut reader = self.stream(kind)?;
        reader
            .read_vec(section.raw_len)
            .and_then(|raw| reader.finish().map(|()| raw))
            .map_err(|error| self.broken(kind, &error))
    }

    /// The error that a section does not decompress to its declared length.
    pub fn broken(&self, kind: Kind, error: &std::io::Error) -> Error {
        let section = self.section(kind);
        Error::input(
            format!("{} of the artifact does not decompress ({error})", kind.name()),
            self.path.display(),
            format!("one {} stream of exactly {} bytes", section.codec, section.raw_len),
        )
    }
}

fn parse_header(header: &[u8], path: &Path) -> Result<[Section; Kind::ALL.len()]> {
    let bad = |what: String, expected: String| Error::input(what, path.display(), expected);
    if !header.starts_with(&MAGIC) {
        return Err(bad("not an artifact".into(), "a file that `fairway export` wrote".into()));
    }
    let (version, count) = (header.get(MAGIC.len()), header.get(MAGIC.len() + 1));
    if version.is_some_and(|&v| v != VERSION) {
        return Err(bad(
            format!("artifact format {}", header[MAGIC.len()]),
            format!("format {VERSION} (a newer fairway, or an undamaged file)"),
        ));
    }
    if header.len() < HEADER_BYTES {
        return Err(bad(
            format!("artifact is cut short: {} bytes", header.len()),
            format!("a header of {HEADER_BYTES} bytes"),
        ));
    }
    let (signed, checksum) = header.split_at(HEADER_BYTES - DIGEST_BYTES);
    if usize::from(count.copied().unwrap_or(0)) != Kind::ALL.len()
        || digest(Sha256::new_with_prefix(signed)) != checksum
    {
        return Err(bad("checksum of the header does not match".into(), "an undamaged artifact".into()));
    }
    let mut offset = HEADER_BYTES as u64;
    let mut raw_total = 0;
    let mut sections = Vec::with_capacity(Kind::ALL.len());
    for (entry, kind) in signed[PREAMBLE_BYTES..].chunks_exact(ENTRY_BYTES).zip(Kind::ALL) {
        let word = |at: usize| u64::from(u32::from_le_bytes(std::array::from_fn(|i| entry[at + i])));
        if entry[0] != kind.id() {
            return Err(bad(
                format!("section of kind {}", entry[0]),
                format!("kind {}, the {}", kind.id(), kind.name()),
            ));
        }
        let codec = Codec::from_id(entry[1]).ok_or_else(|| {
            bad(
                format!("codec {} of the {}", entry[1], kind.name()),
                "codec 1 to 4 (or a newer fairway)".into(),
            )
        })?;
        let (raw_len, stored_len) = (word(2), word(6));
        raw_total += raw_len;
        let cap = kind.cap();
        if raw_len > cap || raw_total > MAX_RAW_BYTES {
            return Err(bad(
                format!("{} of {raw_len} bytes", kind.name()),
                format!("at most {cap} bytes, and {MAX_RAW_BYTES} in all"),
            ));
        }
        let digest = std::array::from_fn(|i| entry[10 + i]);
        sections.push(Section { kind, codec, raw_len, stored_len, offset, digest });
        offset += stored_len;
    }
    sections.try_into().map_err(|_| bad("sections missing".into(), format!("{} sections", Kind::ALL.len())))
}

/// Whether a file starts as an artifact does (so that a command can tell it from a recipe or a run's folder).
pub fn is_artifact(path: &Path) -> bool {
    let mut start = [0; MAGIC.len()];
    path.is_file()
        && File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok()
        && start == MAGIC
}
