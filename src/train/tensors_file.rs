//! Named tensors in a safetensors file with a SHA-256 over all that it says, read a piece at a time: no length in it is
//! believed before it is checked.

use crate::error::{Error, Result};
use crate::files;
use crate::host::{HostTensor, HostType};
use crate::model;
use crate::model::plan::Plan;
use crate::optim::averages::Averaging;
use crate::optim::state_of;
use crate::recipe::Recipe;
use safetensors::tensor::{Dtype, Metadata, TensorView};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// The longest header that is read, in bytes: three times what the deepest and longest-named recipe gives.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// Bytes hashed at a time.
const CHUNK: usize = 1 << 20;
/// The key of the checksum in a file's metadata.
const SHA256: &str = "sha256";

const TYPES: [(HostType, Dtype); 8] = [
    (HostType::F64, Dtype::F64),
    (HostType::F32, Dtype::F32),
    (HostType::F16, Dtype::F16),
    (HostType::BF16, Dtype::BF16),
    (HostType::I8, Dtype::I8),
    (HostType::I32, Dtype::I32),
    (HostType::I64, Dtype::I64),
    (HostType::U8, Dtype::U8),
];

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The tensor's name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: HostType,
    /// Bytes of its elements.
    pub bytes: usize,
    /// Where they start in the file.
    offset: u64,
}

/// An open file whose header was read and agrees with the file's size; no tensor is in memory.
#[derive(Debug)]
pub struct TensorsFile {
    path: PathBuf,
    file: File,
    entries: Vec<Entry>,
    metadata: BTreeMap<String, String>,
    sha256: String,
}

impl TensorsFile {
    /// Opens a file that [`write()`] wrote; only its header is read.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |what: String| Error::input(what, path.display(), "a whole safetensors file of fairway");
        let unreadable = |error: std::io::Error| Error::read(path, &error);
        // Asked before it is opened: opening a pipe would wait for its writer.
        let status = fs::metadata(path).map_err(unreadable)?;
        if !status.is_file() {
            return Err(bad("not a regular file".into()));
        }
        let mut file = File::open(path).map_err(unreadable)?;
        let mut length = [0; 8];
        if status.len() < length.len() as u64 {
            return Err(bad(format!("only {} bytes", status.len())));
        }
        file.read_exact(&mut length).map_err(unreadable)?;
        let length = u64::from_le_bytes(length);
        let start = length.saturating_add(8);
        if length > MAX_HEADER_BYTES || start > status.len() {
            return Err(bad(format!("header of {length} bytes in a file of {}", status.len())));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(unreadable)?;
        // Shapes, sizes and offsets are checked against each other by the library.
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|error| bad(format!("broken header ({error})")))?;
        let size = start.checked_add(header.data_len() as u64);
        if size != Some(status.len()) {
            return Err(bad(format!("{} bytes whose header tells of another size", status.len())));
        }
        let mut entries = Vec::new();
        for (name, info) in header.tensors() {
            let Some((dtype, _)) = TYPES.iter().find(|(_, dtype)| *dtype == info.dtype) else {
                return Err(bad(format!("tensor {name} of type {:?}", info.dtype)));
            };
            let (from, to) = info.data_offsets;
            let offset = start + from as u64;
            entries.push(Entry { name, shape: info.shape.clone(), dtype: *dtype, bytes: to - from, offset });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        let mut metadata: BTreeMap<_, _> =
            header.metadata().clone().unwrap_or_default().into_iter().collect();
        let sha256 = metadata.remove(SHA256).ok_or_else(|| bad("no SHA-256 in its metadata".into()))?;
        Ok(Self { path: path.to_path_buf(), file, entries, metadata, sha256 })
    }

    /// The file's tensors by name.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What the file says beside its tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Refuses tensors other than the recipe's parameters, each once, and (if `state`) rows of optimizer state of them.
    ///
    /// What passes takes no more memory than the recipe itself asks for.
    pub fn expect(&self, recipe: &Recipe, state: bool) -> Result<()> {
        let names = self.entries.iter().map(|entry| (entry.name.as_str(), entry.shape.as_slice()));
        let is_state = |name: &str| state && state_of(name).is_some();
        let (rows, params): (Vec<_>, Vec<_>) = names.partition(|(name, _)| is_state(name));
        let place = self.path.display().to_string();
        expect_params(recipe, &params, &place)?;
        let plan = Plan::of(recipe)?;
        let sizes: HashMap<&str, usize> =
            plan.specs.iter().map(|spec| (spec.name.as_str(), spec.shape.iter().product())).collect();
        let last_row = Averaging::of(recipe).last_row();
        for (name, shape) in rows {
            let of = state_of(name).filter(|(_, number)| *number <= last_row);
            let size = of.and_then(|(param, _)| sizes.get(param));
            if size.is_none_or(|size| *shape != [*size]) {
                let what = format!("optimizer state {name} of shape {shape:?}");
                return Err(Error::input(what, place, "a row for a parameter of the recipe"));
            }
        }
        Ok(())
    }

    /// Checks the SHA-256, a piece of the file in memory at a time.
    pub fn verify(mut self) -> Result<()> {
        let mut hasher = start_digest(&self.metadata);
        let mut chunk = vec![0; CHUNK];
        for entry in &self.entries {
            digest_name(&mut hasher, &entry.name, entry.dtype, &entry.shape);
            seek(&mut self.file, entry.offset, &self.path)?;
            let mut left = entry.bytes;
            while left > 0 {
                let part = &mut chunk[..left.min(CHUNK)];
                self.file.read_exact(part).map_err(|error| Error::read(&self.path, &error))?;
                hasher.update(&part[..]);
                left -= part.len();
            }
        }
        self.compare(hasher)
    }

    /// The tensors by name, and the metadata, SHA-256 checked. Call [`expect`](Self::expect) before: as much memory is
    /// taken as the file is long.
    pub fn read(mut self) -> Result<Vec<HostTensor>> {
        let mut hasher = start_digest(&self.metadata);
        let mut tensors = Vec::with_capacity(self.entries.len());
        for Entry { name, shape, dtype, bytes, offset } in std::mem::take(&mut self.entries) {
            digest_name(&mut hasher, &name, dtype, &shape);
            seek(&mut self.file, offset, &self.path)?;
            let mut elements = vec![0; bytes];
            self.file.read_exact(&mut elements).map_err(|error| Error::read(&self.path, &error))?;
            hasher.update(&elements);
            tensors.push(HostTensor { name, shape, dtype, bytes: elements });
        }
        self.compare(hasher)?;
        Ok(tensors)
    }

    fn compare(&self, hasher: Sha256) -> Result<()> {
        if finish_digest(hasher) == self.sha256 {
            return Ok(());
        }
        Err(Error::input(
            "its content does not match its SHA-256",
            self.path.display(),
            "the file as fairway wrote it",
        ))
    }
}

/// Refuses tensors (name and shape) that are not the recipe's parameters, each once. `place` names their file.
pub fn expect_params(recipe: &Recipe, tensors: &[(&str, &[usize])], place: &str) -> Result<()> {
    let mut missing: BTreeMap<String, Vec<usize>> = model::layout(recipe)?.into_iter().collect();
    for (name, shape) in tensors {
        let wanted = missing.remove(*name).ok_or_else(|| {
            Error::input(
                format!("unknown or second tensor {name}"),
                place,
                "each parameter of the recipe once",
            )
        })?;
        if wanted != *shape {
            return Err(Error::input(
                format!("tensor {name} has shape {shape:?}"),
                place,
                format!("{wanted:?}, as its recipe says"),
            ));
        }
    }
    match missing.keys().next() {
        None => Ok(()),
        Some(name) => {
            Err(Error::input(format!("no tensor {name}"), place, "each parameter of the recipe once"))
        }
    }
}

fn seek(file: &mut File, offset: u64, path: &Path) -> Result<()> {
    file.seek(SeekFrom::Start(offset)).map(|_| ()).map_err(|error| Error::read(path, &error))
}

/// What is hashed: each key and value of the metadata, then each tensor's name, type, shape and elements, all in the
/// order of the names, texts with a zero byte after them.
fn start_digest(metadata: &BTreeMap<String, String>) -> Sha256 {
    let mut hasher = Sha256::new();
    for (key, value) in metadata {
        hasher.update(format!("{key}\0{value}\0"));
    }
    hasher
}

fn digest_name(hasher: &mut Sha256, name: &str, dtype: HostType, shape: &[usize]) {
    hasher.update(format!("{name}\0{dtype:?}{shape:?}\0"));
}

fn finish_digest(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes tensors and metadata as safetensors, whole or not at all.
pub fn write(path: &Path, tensors: &[&HostTensor], metadata: BTreeMap<String, String>) -> Result<()> {
    let mut sorted = tensors.to_vec();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hasher = start_digest(&metadata);
    for tensor in &sorted {
        digest_name(&mut hasher, &tensor.name, tensor.dtype, &tensor.shape);
        hasher.update(&tensor.bytes);
    }
    let mut metadata: HashMap<String, String> = metadata.into_iter().collect();
    metadata.insert(SHA256.into(), finish_digest(hasher));
    let mut views = Vec::with_capacity(sorted.len());
    for tensor in sorted {
        let dtype =
            TYPES.iter().find(|(dtype, _)| *dtype == tensor.dtype).map_or(Dtype::U8, |(_, dtype)| *dtype);
        views.push((&tensor.name, TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes)));
    }
    let views: std::result::Result<Vec<_>, _> =
        views.into_iter().map(|(name, view)| Ok((name, view?))).collect();
    let bytes = views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error| Error::failed(error, path.display(), "tensors that safetensors can hold"))?;
    files::write_atomic(path, &in_order(bytes))
}

/// The same file with the keys of its header in order: safetensors takes the metadata as a hash map, whose order is
/// another in each run.
fn in_order(mut file: Vec<u8>) -> Vec<u8> {
    let Some((start, rest)) = file.split_first_chunk_mut::<8>() else { return file };
    let len = u64::from_le_bytes(*start) as usize;
    // A map of `serde_json` is sorted; the text has as many bytes in any order.
    if let Some(header) = rest.get_mut(..len)
        && let Ok(keys) =
            serde_json::from_slice::<BTreeMap<String, BTreeMap<String, serde_json::Value>>>(header)
        && let Ok(text) = serde_json::to_string(&keys)
        && text.len() <= len
    {
        header.fill(b' ');
        header[..text.len()].copy_from_slice(text.as_bytes());
    }
    file
}
