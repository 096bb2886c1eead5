//! `data.byte_table`: the bytes that each token of a tokenizer stands for.

use super::case::Case;
use crate::data::byte_table::ByteTable;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::ops::Plain;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// The largest file that is taken for a tokenizer model.
const LARGEST_MODEL: u64 = 32 << 20;

/// The three tables of the tokenizer `config.model_sha256`.
pub(super) fn byte_table<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    let sha256 = config.text("model_sha256")?;
    let sha256 = sha256.ok_or_else(|| Error::input("no model_sha256", "config", "a tokenizer's SHA-256"))?;
    let beside = || case.dir.join("../tokenizers");
    let tokenizer = find(&case.options.tokenizers.clone().unwrap_or_else(beside), sha256)?;
    let expected = case.tensors.peek("base_bytes").map_or(0, HostTensor::numel);
    let table = ByteTable::new(&tokenizer, expected)?;
    let bytes: Vec<f64> = table.base_bytes.iter().map(|bytes| f64::from(*bytes)).collect();
    let flags = |flags: &[bool]| flags.iter().map(|flag| f64::from(u8::from(*flag))).collect();
    for (name, values) in [
        ("base_bytes", bytes),
        ("has_leading_space", flags(&table.has_leading_space)),
        ("is_boundary", flags(&table.is_boundary)),
    ] {
        case.give_host(HostTensor::from_f64(name, &[values.len()], &values));
    }
    Ok(())
}

/// The tokenizer of a folder whose model file has this SHA-256.
fn find(dir: &Path, sha256: &str) -> Result<Tokenizer> {
    let absent = |what: String| {
        Error::input(what, dir.display(), format!("a tokenizer model of SHA-256 {sha256} (--tokenizers DIR)"))
    };
    let listed = fs::read_dir(dir).map_err(|error| absent(format!("cannot read ({error})")))?;
    let mut paths: Vec<PathBuf> = listed.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.is_file()) {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LARGEST_MODEL + 1).read_to_end(&mut bytes));
        // A file that cannot be read is not the one; if none is, the error says what was looked for.
        if read.is_err() || bytes.len() as u64 > LARGEST_MODEL {
            continue;
        }
        let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        if digest.eq_ignore_ascii_case(sha256) {
            return Tokenizer::from_model_bytes(&bytes, &path.display().to_string());
        }
    }
    Err(absent("no such tokenizer".into()))
}
