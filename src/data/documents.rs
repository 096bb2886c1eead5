//! Documents out of files: JSONL with a `text` field, or plain text with one document a file; either may be
//! gzipped. Read in batches of bounded size, in order; parsing is left to the threads that encode.

use super::Progress;
use crate::error::{Error, Result};
use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The longest document, or line of JSONL, that is read: it must lie in memory whole.
pub const MAX_DOCUMENT_BYTES: u64 = 1 << 30;
/// A batch is complete when it has so many bytes or documents: enough work for every core, little memory.
const BATCH_BYTES: usize = 16 << 20;
const BATCH_DOCS: usize = 1 << 14;

/// A document as it stands in its file.
#[derive(Debug)]
pub struct RawDocument {
    path: Arc<Path>,
    /// Line in a JSONL file, from 1; 0 for a plain text.
    line: u64,
    bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Row {
    text: String,
}

impl RawDocument {
    /// The document's text. Text that is not UTF-8 is an error with the byte's offset in the (unpacked) file; a
    /// line that is not a JSON object with a string `text` is one with its number.
    pub fn into_text(self) -> Result<String> {
        if self.line == 0 {
            return String::from_utf8(self.bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to();
                Error::input(format!("not UTF-8 at byte {at}"), self.path.display(), "UTF-8 text")
            });
        }
        match serde_json::from_slice::<Row>(&self.bytes) {
            Ok(row) => Ok(row.text),
            // The library counts lines within the row, which has only one.
            Err(error) => {
                let reason = error.to_string();
                let reason = reason.split(" at line ").next().unwrap_or_default();
                Err(Error::input(
                    format!("line {} column {}: {reason}", self.line, error.column()),
                    self.path.display(),
                    "a JSON object with a string `text` on each line",
                ))
            }
        }
    }

    /// Where the document stands, for messages.
    pub fn place(&self) -> String {
        match self.line {
            0 => self.path.display().to_string(),
            line => format!("{} line {line}", self.path.display()),
        }
    }
}

/// Counts what is read of a file as it lies on disk.
struct Counted<R> {
    inner: R,
    read: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// A file that is being read.
struct Open {
    path: Arc<Path>,
    reader: Box<dyn BufRead + Send>,
    lines: bool,
    line: u64,
}

/// Reads the documents of several files in order.
pub struct Documents {
    files: Vec<PathBuf>,
    /// How many of them were opened.
    opened: usize,
    open: Option<Open>,
    total: u64,
    read: Arc<AtomicU64>,
}

impl Documents {
    /// Will read `files`, each of which must be a regular file.
    pub fn open(files: &[PathBuf]) -> Result<Self> {
        let mut total = 0;
        for path in files {
            let meta = std::fs::metadata(path).map_err(|error| Error::read(path, &error))?;
            if !meta.is_file() {
                return Err(Error::input("not a file", path.display(), "JSONL or plain text"));
            }
            total += meta.len();
        }
        Ok(Self { files: files.to_vec(), opened: 0, open: None, total, read: Arc::default() })
    }

    /// Bytes of all files on disk.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }

    /// Bytes of the files that were read so far.
    pub fn read_bytes(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The next documents; empty at the end.
    pub fn next_batch(&mut self) -> Result<Vec<RawDocument>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH_DOCS && bytes < BATCH_BYTES {
            let Some(document) = self.next_document()? else { break };
            bytes += document.bytes.len();
            batch.push(document);
        }
        Ok(batch)
    }

    /// How many documents there are, counting no further than `limit`.
    pub fn count_up_to(mut self, limit: u64, progress: Progress) -> Result<u64> {
        let mut count = 0;
        while count < limit {
            match self.next_batch()?.len() as u64 {
                0 => break,
                more => count += more,
            }
            progress(0, self.total)?;
        }
        Ok(count.min(limit))
    }

    fn next_document(&mut self) -> Result<Option<RawDocument>> {
        loop {
            let open = match &mut self.open {
                Some(open) => open,
                None => {
                    let Some(path) = self.files.get(self.opened) else { return Ok(None) };
                    self.opened += 1;
                    self.open.insert(open_file(path, &self.read)?)
                }
            };
            let document = open.next_document()?;
            if document.is_none() || !open.lines {
                self.open = None;
            }
            if document.is_some() {
                return Ok(document);
            }
        }
    }
}

impl Open {
    fn next_document(&mut self) -> Result<Option<RawDocument>> {
        let read_error = |error: io::Error| Error::read(&self.path, &error);
        if !self.lines {
            let mut bytes = Vec::new();
            (&mut self.reader).take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).map_err(read_error)?;
            check_length(bytes.len(), &self.path)?;
            return Ok(Some(RawDocument { path: self.path.clone(), line: 0, bytes }));
        }
        loop {
            let mut bytes = Vec::new();
            let mut limited = (&mut self.reader).take(MAX_DOCUMENT_BYTES + 1);
            if limited.read_until(b'\n', &mut bytes).map_err(read_error)? == 0 {
                return Ok(None);
            }
            self.line += 1;
            check_length(bytes.len(), &self.path)?;
            if self.line == 1 && bytes.starts_with(b"\xef\xbb\xbf") {
                bytes.drain(..3);
            }
            // Blank lines, such as a last one, are no documents.
            if !bytes.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some(RawDocument { path: self.path.clone(), line: self.line, bytes }));
            }
        }
    }
}

fn check_length(bytes: usize, path: &Path) -> Result<()> {
    if bytes as u64 <= MAX_DOCUMENT_BYTES {
        return Ok(());
    }
    let limit = format!("documents of at most {MAX_DOCUMENT_BYTES} bytes (split it, or use JSONL)");
    Err(Error::input("document is too long", path.display(), limit))
}

/// Opens a file: gzipped if it begins as gzip does, JSONL if it is called so.
fn open_file(path: &Path, read: &Arc<AtomicU64>) -> Result<Open> {
    let file = File::open(path).map_err(|error| Error::read(path, &error))?;
    let mut source = Counted { inner: file, read: read.clone() };
    let mut head = Vec::new();
    (&mut source).take(2).read_to_end(&mut head).map_err(|error| Error::read(path, &error))?;
    let gzipped = head == [0x1f, 0x8b];
    let whole = BufReader::with_capacity(1 << 20, Cursor::new(head).chain(source));
    let reader: Box<dyn BufRead + Send> = if gzipped {
        Box::new(BufReader::with_capacity(1 << 20, MultiGzDecoder::new(whole)))
    } else {
        Box::new(whole)
    };
    Ok(Open { lines: is_jsonl(path), path: path.into(), reader, line: 0 })
}

/// Whether the name, without `.gz`, ends in `.jsonl` or `.ndjson`.
fn is_jsonl(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.ends_with(".jsonl") || name.ends_with(".ndjson")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn texts(files: &[PathBuf]) -> Result<Vec<String>> {
        let mut documents = Documents::open(files)?;
        let mut texts = Vec::new();
        loop {
            let batch = documents.next_batch()?;
            if batch.is_empty() {
                assert_eq!(documents.read_bytes(), documents.total_bytes());
                return Ok(texts);
            }
            for document in batch {
                texts.push(document.into_text()?);
            }
        }
    }

    #[test]
    fn jsonl_gzip_and_text_are_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let rows = b"\xef\xbb\xbf{\"text\":\"a\\nb\",\"id\":[1]}\n\n{\"id\":2,\"text\":\"\"}";
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all("{\"text\":\"\\u00e9\"}\r\n".as_bytes()).unwrap();
        let gzip = gzip.finish().unwrap();
        let files = [
            file("a.jsonl", rows),
            file("b.JSONL.gz", &[gzip.clone(), gzip].concat()),
            file("c.txt", b"one\n\ntwo\n"),
            file("d", b""),
        ];
        assert_eq!(texts(&files).unwrap(), ["a\nb", "", "\u{e9}", "\u{e9}", "one\n\ntwo\n", ""]);
        assert_eq!(Documents::open(&files).unwrap().count_up_to(100, &crate::data::quiet).unwrap(), 6);
        assert_eq!(Documents::open(&files).unwrap().count_up_to(4, &crate::data::quiet).unwrap(), 4);
    }

    #[test]
    fn bad_documents_name_file_and_place() {
        let dir = tempfile::tempdir().unwrap();
        let cases: [(&str, &[u8], &str); 6] = [
            ("a.jsonl", b"{\"text\":\"x\"}\n{\"text\":3}\n", "line 2 column 9: invalid type: integer `3`"),
            ("b.jsonl", b"\n{\"body\":\"x\"}\n", "line 2 column 12: missing field `text`"),
            ("c.jsonl", b"{\"text\":\"x\"", "line 1 column 11: EOF"),
            ("d.jsonl", b"{\"text\":\"\xff\"}", "line 1 column"),
            ("e.txt", b"ab\xffc", "not UTF-8 at byte 2"),
            ("f.txt.gz", b"\x1f\x8b\x08\x00", "cannot read"),
        ];
        for (name, bytes, message) in cases {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = texts(&[path]).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let error = error.to_string();
            assert!(error.starts_with(message) && error.contains(name), "{error}");
        }
        let missing = dir.path().join("missing.txt");
        assert!(texts(&[missing]).unwrap_err().to_string().contains("missing.txt"));
        assert!(texts(&[dir.path().to_path_buf()]).unwrap_err().to_string().starts_with("not a file"));
    }
}
