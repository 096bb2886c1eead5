//! The count of bytes against the challenge's cap: the artifact, and our code in two ways.

use super::{Codec, Sizes};
use crate::error::{Error, Result};
use std::sync::OnceLock;

/// The challenge's cap on artifact and code together, in bytes (decimal).
pub const CAP_BYTES: u64 = 16_000_000;

/// The sources that this library was built from, joined by the build script.
static SOURCES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sources.bin"));

/// An artifact's place in the budget; the names are those of `export --json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Budget {
    /// Size of the artifact.
    pub bytes: u64,
    /// Size of the tensors before compression.
    pub payload_bytes: u64,
    /// Size of our packed source ([`code_bytes`]).
    pub bytes_code: u64,
    /// Size of everything shipped beside the artifact ([`shipped_bytes`]).
    pub bytes_code_all: u64,
    /// Artifact and packed source: what the cap is held against.
    pub bytes_total: u64,
    /// Whether that is at most [`CAP_BYTES`].
    pub under_cap: bool,
}

impl Budget {
    /// The budget of an artifact of these sizes.
    pub fn of(sizes: &Sizes) -> Result<Self> {
        let bytes_code = code_bytes()?;
        let bytes_total = sizes.bytes + bytes_code;
        Ok(Self {
            bytes: sizes.bytes,
            payload_bytes: sizes.payload_bytes,
            bytes_code,
            bytes_code_all: shipped_bytes()?,
            bytes_total,
            under_cap: bytes_total <= CAP_BYTES,
        })
    }
}

/// The sources that the running program was built from, by path: `src/`, `wgsl/`, `cuda/`, the built-in recipes,
/// `Cargo.toml` and the build script. Tests and third-party crates are not among them, as the challenge counts neither.
pub fn source_files() -> Vec<(&'static str, &'static [u8])> {
    let mut rest = SOURCES;
    let mut files = Vec::new();
    while let Some((name, after)) = next_line(rest) {
        let Some((len, after)) = next_line(after) else { break };
        let Some((content, after)) = len.parse().ok().and_then(|len| after.split_at_checked(len)) else {
            break;
        };
        files.push((name, content));
        rest = after;
    }
    files
}

fn next_line(bytes: &'static [u8]) -> Option<(&'static str, &'static [u8])> {
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    Some((std::str::from_utf8(&bytes[..end]).ok()?, &bytes[end + 1..]))
}

/// Size of our packed source: all of [`source_files`] in one brotli stream, names included.
pub fn code_bytes() -> Result<u64> {
    static PACKED: OnceLock<Result<u64>> = OnceLock::new();
    PACKED.get_or_init(|| Ok(Codec::Brotli.compress(SOURCES)?.len() as u64)).clone()
}

/// Size of everything that a user needs beside the artifact: the running executable, which holds all crates, kernels
/// and recipes. (The operating system's and the GPU driver's libraries are not counted.)
pub fn shipped_bytes() -> Result<u64> {
    let failed = |error: std::io::Error| {
        Error::failed(format!("cannot find its size ({error})"), "the running executable", "a readable file")
    };
    let path = std::env::current_exe().map_err(failed)?;
    Ok(std::fs::metadata(path).map_err(failed)?.len())
}
