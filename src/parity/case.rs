//! One fixture on its way: inputs onto the device, results back, rows out.

use super::compare::{Tolerance, compare};
use super::fixture::Tensors;
use super::index::{Entry, Index};
use super::{Options, Row, refused};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::model::params::{from_host, to_host};
use crate::ops::{Base, Plain};
use burn::tensor::{DType, Int, Tensor, TensorData};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// A fixture, where it runs, and what has come out so far.
pub(super) struct Case<'a, P: Plain> {
    /// Its name.
    pub name: &'a str,
    /// What the index says of it.
    pub entry: &'a Entry,
    /// The whole index.
    pub index: &'a Index,
    /// The folder.
    pub dir: &'a Path,
    /// What the user asked for.
    pub options: &'a Options,
    /// Where it runs.
    pub device: &'a P::Device,
    /// The type that it computes in.
    pub dtype: DType,
    /// The file's tensors.
    pub tensors: Tensors,
    tolerances: Vec<(&'static str, Tolerance)>,
    results: BTreeMap<String, HostTensor>,
    facts: Vec<Row>,
}

impl<'a, P: Plain> Case<'a, P> {
    /// Reads the fixture's file.
    pub fn open(
        dir: &'a Path,
        index: &'a Index,
        name: &'a str,
        entry: &'a Entry,
        options: &'a Options,
        device: &'a P::Device,
    ) -> Result<Self> {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(Error::input("no file name", "the fixture's name", "a name without folders"));
        }
        Ok(Self {
            name,
            entry,
            index,
            dir,
            options,
            device,
            dtype: options.precision,
            tensors: Tensors::load(&dir.join(format!("{name}.safetensors")))?,
            tolerances: Vec::new(),
            results: BTreeMap::new(),
            facts: Vec::new(),
        })
    }

    /// Runs `solve` and compares: a row for each tensor that the file holds and `solve` did not use as an input.
    pub fn rows(mut self, solve: impl FnOnce(&mut Self) -> Result<()>) -> Vec<Row> {
        let mut rows = self.missing().unwrap_or_else(|error| vec![refused(self.name, &error)]);
        if let Err(error) = solve(&mut self) {
            rows.push(refused(self.name, &error));
            return rows;
        }
        rows.append(&mut self.facts);
        let expected = self.tensors.iter().filter(|(name, _)| !self.tensors.is_input(name));
        rows.extend(expected.map(|(name, expected)| self.row(name, expected)));
        if rows.is_empty() {
            let error = Error::input("no result to compare", "the file", "tensors such as out.*");
            rows.push(refused(self.name, &error));
        }
        rows
    }

    /// Rows for tensors that the index lists and the file does not hold in that shape.
    fn missing(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (name, shape) in self.entry.tensors()? {
            let found = self.tensors.peek(name).map(|tensor| &tensor.shape);
            let note = match (found, &shape) {
                (None, _) => "the index lists it, the file does not hold it".to_string(),
                (Some(found), Some(shape)) if found != shape => {
                    format!("the file's shape is {found:?}, the index says {shape:?}")
                }
                _ => continue,
            };
            rows.push(Row { tensor: name.into(), note: Some(note), ..self.blank() });
        }
        Ok(rows)
    }

    fn blank(&self) -> Row {
        Row {
            fixture: self.name.into(),
            tensor: String::new(),
            error: None,
            tolerance: None,
            ok: false,
            note: None,
        }
    }

    fn row(&self, name: &str, expected: &HostTensor) -> Row {
        let row = Row { tensor: name.into(), ..self.blank() };
        let tolerance = match self.tolerance_of(name) {
            Ok(tolerance) => tolerance,
            Err(error) => return Row { note: Some(error.to_string()), ..row },
        };
        let row = Row { tolerance: Some(tolerance.bound()), ..row };
        if expected.numel() == 0 {
            return Row { error: Some(0.0), ok: true, note: Some("no elements".into()), ..row };
        }
        let Some(got) = self.results.get(name) else {
            return Row { note: Some("this kind gives no such result".into()), ..row };
        };
        let found = compare(got, expected, tolerance);
        let measured = match tolerance {
            Tolerance::Relative(_) => None,
            Tolerance::Absolute(_) => Some("absolute".to_string()),
            Tolerance::Differing(_) => Some("elements that differ".to_string()),
        };
        let notes: Vec<String> = measured.into_iter().chain(found.note).collect();
        let note = (!notes.is_empty()).then(|| notes.join("; "));
        Row { error: found.error, ok: found.ok, note, ..row }
    }

    fn tolerance_of(&self, name: &str) -> Result<Tolerance> {
        let set = self.tolerances.iter().rev().find(|(prefix, _)| name.starts_with(prefix));
        set.map_or_else(|| self.entry_tolerance(), |(_, tolerance)| Ok(*tolerance))
    }

    /// The entry's own bound for what this computes in.
    fn entry_tolerance(&self) -> Result<Tolerance> {
        let top = self.entry.top();
        // What must be equal in f64 must be so in any type.
        let exact = top.number("tol")? == Some(0.0) && top.number("tol_f32")?.is_none();
        let key = if self.dtype == DType::F64 || exact { "tol" } else { "tol_f32" };
        Ok(Tolerance::Relative(self.entry.bound(key)?))
    }

    /// Sets the tolerance of the tensors whose names begin with `prefix`.
    pub fn tolerate(&mut self, prefix: &'static str, tolerance: Tolerance) {
        self.tolerances.push((prefix, tolerance));
    }

    /// An input that must be there and have elements.
    pub fn host(&self, name: &str) -> Result<&HostTensor> {
        let tensor = self.tensors.input(name).ok_or_else(|| {
            Error::input(format!("no tensor {name}"), "the file", "every input of the kind")
        })?;
        if tensor.shape.contains(&0) {
            return Err(Error::input(
                format!("tensor {name} has shape {:?}", tensor.shape),
                "the file",
                "at least one element",
            ));
        }
        Ok(tensor)
    }

    /// An input of rank `D` as floats on the device.
    pub fn float<const D: usize>(&self, name: &str) -> Result<Tensor<P, D>> {
        let tensor = self.host(name)?;
        let Ok(shape) = <[usize; D]>::try_from(tensor.shape.as_slice()) else {
            return Err(Error::input(
                format!("tensor {name} has shape {:?}", tensor.shape),
                "the file",
                format!("{D} dimensions"),
            ));
        };
        Ok(from_host::<P>(tensor, self.device, self.dtype).reshape(shape))
    }

    /// An input of any rank from 1 as rows of its last dimension, and its shape.
    pub fn matrix(&self, name: &str) -> Result<(Tensor<P, 2>, Vec<usize>)> {
        let tensor = self.host(name)?;
        let Some(&columns) = tensor.shape.last() else {
            return Err(Error::input(
                format!("tensor {name} is a scalar"),
                "the file",
                "at least 1 dimension",
            ));
        };
        let rows = tensor.numel() / columns;
        let flat = from_host::<P>(tensor, self.device, self.dtype);
        Ok((flat.reshape([rows, columns]), tensor.shape.clone()))
    }

    /// An input of any rank in one row, and its shape.
    pub fn flat(&self, name: &str) -> Result<(Tensor<P, 1>, Vec<usize>)> {
        let tensor = self.host(name)?;
        Ok((from_host::<P>(tensor, self.device, self.dtype), tensor.shape.clone()))
    }

    /// Refuses an input of another shape.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<()> {
        self.host(name)?.expect_shape(shape, "the file")
    }

    /// Token ids or classes in `0..below`.
    pub fn ids(&self, name: &str, below: usize) -> Result<(Vec<i64>, Vec<usize>)> {
        let tensor = self.host(name)?;
        if !matches!(tensor.dtype, HostType::I64 | HostType::I32 | HostType::U8) {
            return Err(Error::input(format!("tensor {name} of {:?}", tensor.dtype), "the file", "integers"));
        }
        let ids: Vec<i64> = tensor.to_f64().into_iter().map(|id| id as i64).collect();
        match ids.iter().find(|id| !(0..below as i64).contains(id)) {
            Some(id) => {
                Err(Error::input(format!("{name} holds {id}"), "the file", format!("0 to {}", below - 1)))
            }
            None => Ok((ids, tensor.shape.clone())),
        }
    }

    /// Whether the file expects a tensor of this name in this shape: results that can be far larger than the file are
    /// made only then.
    pub fn expects(&self, name: &str, shape: &[usize]) -> bool {
        self.tensors.peek(name).is_some_and(|tensor| tensor.shape == shape)
    }

    /// A result; one that is absent stays without a value.
    pub fn give<const D: usize>(
        &mut self,
        name: &str,
        shape: &[usize],
        tensor: Option<Tensor<P, D>>,
    ) -> Result<()> {
        if let Some(tensor) = tensor {
            let elements: usize = tensor.dims().iter().product();
            self.give_host(to_host(name, shape, tensor.reshape([elements]))?);
        }
        Ok(())
    }

    /// A result in host memory.
    pub fn give_host(&mut self, tensor: HostTensor) {
        self.results.insert(tensor.name.clone(), tensor);
    }

    /// A result that the entry itself states, not the file: how far off, against a bound.
    pub fn fact(&mut self, key: String, error: f64, bound: f64, note: Option<String>) {
        let ok = error <= bound;
        let note = note.filter(|_| !ok);
        self.facts.push(Row {
            tensor: key,
            error: Some(error),
            tolerance: Some(bound),
            ok,
            note,
            ..self.blank()
        });
    }
}

/// Integers on a device's backend, tracked or not.
pub(super) fn integers<B: Base, const D: usize>(
    values: Vec<i64>,
    shape: [usize; D],
    device: &B::Device,
) -> Tensor<B, D, Int> {
    Tensor::from_data(TensorData::new(values, shape), device)
}
