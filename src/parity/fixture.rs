//! The tensors of one fixture's file.

use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use safetensors::{Dtype, SafeTensors};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The largest fixture file that is read.
const LARGEST_FILE: u64 = 4 << 30;

/// The tensors of a safetensors file by name, and which of them were used as inputs.
#[derive(Debug)]
pub(super) struct Tensors {
    by_name: BTreeMap<String, HostTensor>,
    used: RefCell<BTreeSet<String>>,
}

impl Tensors {
    /// Reads a whole file.
    ///
    /// Errors (input): no readable safetensors file, more than 4 GiB, an element type that fixtures do not have.
    pub fn load(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        File::open(path)
            .and_then(|file| file.take(LARGEST_FILE + 1).read_to_end(&mut bytes))
            .map_err(|error| Error::read(path, &error))?;
        if bytes.len() as u64 > LARGEST_FILE {
            return Err(Error::input("file too large", path.display(), "at most 4 GiB"));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(|error| {
            Error::input(format!("not a safetensors file ({error})"), path.display(), "a whole one")
        })?;
        let mut by_name = BTreeMap::new();
        for (name, view) in file.iter() {
            let (dtype, bytes) = elements(view.dtype(), view.data()).ok_or_else(|| {
                Error::input(
                    format!("tensor {name} of type {:?}", view.dtype()),
                    path.display(),
                    "floats of 16 to 64 bits or integers",
                )
            })?;
            let tensor = HostTensor { name: name.into(), shape: view.shape().to_vec(), dtype, bytes };
            by_name.insert(name.to_string(), tensor);
        }
        Ok(Self { by_name, used: RefCell::default() })
    }

    /// Every tensor by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &HostTensor)> {
        self.by_name.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// A tensor, without using it as an input.
    pub fn peek(&self, name: &str) -> Option<&HostTensor> {
        self.by_name.get(name)
    }

    /// A tensor as an input: it is not compared with any result.
    pub fn input(&self, name: &str) -> Option<&HostTensor> {
        let tensor = self.by_name.get(name)?;
        self.used.borrow_mut().insert(name.to_string());
        Some(tensor)
    }

    /// Whether a tensor was used as an input.
    pub fn is_input(&self, name: &str) -> bool {
        self.used.borrow().contains(name)
    }
}

/// A file's elements as one of the host's types; small integers without one become I64.
fn elements(dtype: Dtype, bytes: &[u8]) -> Option<(HostType, Vec<u8>)> {
    fn wide<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> Option<i64>) -> Option<(HostType, Vec<u8>)> {
        let values = bytes.chunks_exact(N).map(|chunk| f(chunk.try_into().ok()?).map(i64::to_le_bytes));
        values.collect::<Option<Vec<_>>>().map(|values| (HostType::I64, values.concat()))
    }
    let same = |dtype| Some((dtype, bytes.to_vec()));
    match dtype {
        Dtype::F64 => same(HostType::F64),
        Dtype::F32 => same(HostType::F32),
        Dtype::F16 => same(HostType::F16),
        Dtype::BF16 => same(HostType::BF16),
        Dtype::I8 => same(HostType::I8),
        Dtype::I32 => same(HostType::I32),
        Dtype::I64 => same(HostType::I64),
        Dtype::U8 | Dtype::BOOL => same(HostType::U8),
        Dtype::I16 => wide(bytes, |b| Some(i16::from_le_bytes(b).into())),
        Dtype::U16 => wide(bytes, |b| Some(u16::from_le_bytes(b).into())),
        Dtype::U32 => wide(bytes, |b| Some(u32::from_le_bytes(b).into())),
        Dtype::U64 => wide(bytes, |b| u64::from_le_bytes(b).try_into().ok()),
        _ => None,
    }
}
