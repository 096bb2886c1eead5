//! Matrices whose rows are stored in parts: some rows protected, as float16, the others in codes.
//!
//! Each range of rows is a tensor of its own, `name[from:to]` with `to` excluded. The matrix is coded as a whole, protected rows
//! included, and cut afterwards: rules that choose one clip or one scale for a whole matrix, and rules that go by its size or its
//! Hessian, treat the rows as they would without protection, and a coded part restores to what its rows restored to.

use super::exports::Hessians;
use super::storage::{QuantTensor, Storage};
use super::{finite, to_f16};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// A range of a matrix's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    name: String,
    rows: Range<usize>,
    protected: bool,
}

/// How a matrix is divided by its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSplit {
    name: String,
    parts: Vec<Part>,
}

impl RowSplit {
    /// Of a matrix of so many rows with `protected` ranges, ascending and apart; rows beyond the last one do not count.
    pub fn new(name: &str, rows: usize, protected: &[Range<usize>]) -> Self {
        let mut parts = Vec::new();
        let mut add = |range: Range<usize>, protected: bool| {
            if !range.is_empty() {
                let name = format!("{name}[{}:{}]", range.start, range.end);
                parts.push(Part { name, rows: range, protected });
            }
        };
        let mut done = 0;
        for range in protected {
            let range = range.start.clamp(done, rows)..range.end.clamp(done, rows);
            add(done..range.start, false);
            done = range.end;
            add(range, true);
        }
        add(done..rows, false);
        Self { name: name.into(), parts }
    }

    /// The whole matrix's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Rows of the whole matrix.
    fn rows(&self) -> usize {
        self.parts.last().map_or(0, |part| part.rows.end)
    }
}

/// The name of the matrix that a part of that name belongs to; none for a name that no part has.
fn whole_name(name: &str) -> Option<&str> {
    let (whole, range) = name.strip_suffix(']')?.rsplit_once('[')?;
    let (from, to) = range.split_once(':')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(from) && is_number(to)).then_some(whole)
}

/// The Hessian of a tensor; a part has that of its matrix.
pub(super) fn hessian_of<'a>(hessians: &'a Hessians, name: &str) -> Option<&'a Vec<f64>> {
    hessians.get(name).or_else(|| hessians.get(whole_name(name)?))
}

/// The parts of each divided matrix as tensors of their own, where the matrix stands.
///
/// # Errors
/// A matrix of other than its split's rows.
pub fn split(tensors: Vec<HostTensor>, splits: &[RowSplit]) -> Result<Vec<HostTensor>> {
    let mut all = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let Some(split) = splits.iter().find(|split| split.name == tensor.name) else {
            all.push(tensor);
            continue;
        };
        let rows = split.rows();
        if tensor.shape.first() != Some(&rows) || rows == 0 || tensor.bytes.len() % rows != 0 {
            return Err(Error::input(
                format!("tensor {} has shape {:?}", tensor.name, tensor.shape),
                &tensor.name,
                format!("{rows} rows"),
            ));
        }
        let row = tensor.bytes.len() / rows;
        all.extend(split.parts.iter().map(|part| HostTensor {
            name: part.name.clone(),
            shape: with_rows(&tensor.shape, part.rows.len()),
            dtype: tensor.dtype,
            bytes: tensor.bytes[part.rows.start * row..part.rows.end * row].to_vec(),
        }));
    }
    Ok(all)
}

/// The inverse: a matrix is put where its first part stands. One of which there is no part is left for the model to find.
///
/// # Errors
/// Parts that are not all there, each once, in their order and each of its rows and of the same columns and element type, and
/// parts beside their whole matrix. `place` names the file.
pub fn join(tensors: Vec<HostTensor>, splits: &[RowSplit], place: &str) -> Result<Vec<HostTensor>> {
    let mut parts: HashMap<&str, (&RowSplit, &Part)> = HashMap::new();
    for split in splits {
        parts.extend(split.parts.iter().map(|part| (part.name.as_str(), (split, part))));
    }
    let names: HashSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    for tensor in &tensors {
        let Some(&(split, part)) = parts.get(tensor.name.as_str()) else { continue };
        let refuse = |expected: String| {
            Err(Error::input(format!("tensor {} of shape {:?}", tensor.name, tensor.shape), place, expected))
        };
        if names.contains(split.name.as_str()) {
            return refuse(format!("{} whole or in parts, not both", split.name));
        }
        if tensor.shape.first() != Some(&part.rows.len()) {
            return refuse(format!("{} rows", part.rows.len()));
        }
    }
    // Where each matrix stands, and how many of its rows are there.
    let mut begun: HashMap<&str, (usize, usize)> = HashMap::new();
    let mut joined: Vec<HostTensor> = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let Some(&(split, part)) = parts.get(tensor.name.as_str()) else {
            joined.push(tensor);
            continue;
        };
        let next = joined.len();
        let (at, rows) = *begun.entry(&split.name).or_insert((next, 0));
        let fits = |whole: &HostTensor| whole.shape[1..] == tensor.shape[1..] && whole.dtype == tensor.dtype;
        if part.rows.start != rows || !joined.get(at).is_none_or(fits) {
            return Err(Error::input(
                format!("tensor {} of shape {:?}", tensor.name, tensor.shape),
                place,
                format!("the parts of {} in their order and of the same columns", split.name),
            ));
        }
        begun.insert(&split.name, (at, part.rows.end));
        match joined.get_mut(at) {
            Some(whole) => {
                whole.shape[0] = part.rows.end;
                whole.bytes.extend(tensor.bytes);
            }
            None => joined.push(HostTensor { name: split.name.clone(), ..tensor }),
        }
    }
    for split in splits {
        if let Some((_, rows)) = begun.get(split.name.as_str()).filter(|(_, rows)| *rows != split.rows()) {
            return Err(Error::input(
                format!("tensor {} without its rows from {rows} on", split.name),
                place,
                format!("all parts of its {} rows", split.rows()),
            ));
        }
    }
    Ok(joined)
}

/// The quantised matrices in their parts, where they stand: the coded rows of each, and the protected ones as float16 of `live`,
/// the weights in the same parts.
///
/// # Errors
/// Parts without their weights, weights that are not finite or that float16 does not hold.
pub fn protect(
    quantized: Vec<QuantTensor>,
    live: &[HostTensor],
    splits: &[RowSplit],
) -> Result<Vec<QuantTensor>> {
    if splits.is_empty() {
        return Ok(quantized);
    }
    let live: HashMap<&str, &HostTensor> = live.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
    let mut all = Vec::with_capacity(quantized.len());
    for tensor in quantized {
        let Some(split) = splits.iter().find(|split| split.name == tensor.name) else {
            all.push(tensor);
            continue;
        };
        for part in &split.parts {
            if !part.protected {
                all.push(tensor.rows(part.rows.clone(), &part.name)?);
                continue;
            }
            let weights = live.get(part.name.as_str()).ok_or_else(|| {
                Error::input("no live weights", &part.name, "those that its float16 is made of")
            })?;
            let values = to_f16("values", &weights.shape, &finite(weights)?, &part.name)?;
            all.push(QuantTensor {
                name: part.name.clone(),
                shape: weights.shape.clone(),
                original: tensor.original,
                storage: Storage::F16,
                parts: vec![values],
            });
        }
    }
    Ok(all)
}

impl QuantTensor {
    /// The rows of that range, indices of the first dimension, as a tensor of their own that restores to what they restore to
    /// here.
    ///
    /// # Errors
    /// A range beyond the tensor, parts that do not fit its shape, bytes that pack no codes.
    pub fn rows(&self, range: Range<usize>, name: &str) -> Result<Self> {
        self.check()?;
        let rows = self.shape.first().copied().unwrap_or_default();
        if range.start >= range.end || range.end > rows {
            return Err(Error::input(
                format!("rows {} to {} of tensor {}", range.start, range.end, self.name),
                &self.name,
                format!("some of its {rows} rows"),
            ));
        }
        let parts = match (self.storage, self.parts.as_slice()) {
            (Storage::Ternary(packing), [codes, scales]) => {
                let row = self.shape[1..].iter().product::<usize>();
                let whole = self.unpack(packing, &codes.bytes, scales)?;
                let part = whole.part(range.start * row..range.end * row);
                let bytes = packing.pack(&part.codes);
                vec![
                    HostTensor { name: "codes".into(), shape: vec![bytes.len()], dtype: HostType::U8, bytes },
                    HostTensor::from_f64("scales", &[], &[part.gamma.into()]),
                ]
            }
            (_, parts) => parts.iter().map(|part| part_rows(part, rows, &range)).collect(),
        };
        let shape = with_rows(&self.shape, range.len());
        Ok(Self { name: name.into(), shape, original: self.original, storage: self.storage, parts })
    }
}

/// The rows of a stored part that has as many as its tensor; one that has no rows, a single scale, is that of all of them.
fn part_rows(part: &HostTensor, rows: usize, range: &Range<usize>) -> HostTensor {
    if part.shape.is_empty() {
        return part.clone();
    }
    let row = part.bytes.len() / rows;
    HostTensor {
        name: part.name.clone(),
        shape: with_rows(&part.shape, range.len()),
        dtype: part.dtype,
        bytes: part.bytes[range.start * row..range.end * row].to_vec(),
    }
}

fn with_rows(shape: &[usize], rows: usize) -> Vec<usize> {
    [&[rows], &shape[1..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::ternary::Packing;
    use crate::quant::{Context, Export, quantize_by};

    fn numbered(name: &str, rows: usize, cols: usize) -> HostTensor {
        let values: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
        HostTensor::from_f32(name, &[rows, cols], &values)
    }

    fn row_split(name: &str, rows: usize, protected: &[(usize, usize)]) -> RowSplit {
        RowSplit::new(name, rows, &protected.iter().map(|&(from, to)| from..to).collect::<Vec<_>>())
    }

    fn names(tensors: &[HostTensor]) -> Vec<&str> {
        tensors.iter().map(|tensor| tensor.name.as_str()).collect()
    }

    #[test]
    fn ranges_cover_all_rows_once() {
        let parts = |rows: usize, protected: &[(usize, usize)]| -> Vec<(usize, usize, bool)> {
            let split = row_split("w", rows, protected);
            split.parts.iter().map(|part| (part.rows.start, part.rows.end, part.protected)).collect()
        };
        assert_eq!(
            parts(10, &[(2, 3), (5, 8)]),
            [(0, 2, false), (2, 3, true), (3, 5, false), (5, 8, true), (8, 10, false)]
        );
        assert_eq!(parts(10, &[(0, 4), (4, 10)]), [(0, 4, true), (4, 10, true)]);
        assert_eq!(parts(4, &[(3, 9)]), [(0, 3, false), (3, 4, true)]);
        assert_eq!(parts(4, &[(2, 2)]), [(0, 2, false), (2, 4, false)]);
        assert_eq!(parts(4, &[]), [(0, 4, false)]);
        assert!(parts(0, &[]).is_empty());
    }

    #[test]
    fn a_part_tells_its_matrix() {
        let split = row_split("a[1].weight", 9, &[(3, 5)]);
        assert!(split.parts.iter().all(|part| whole_name(&part.name) == Some("a[1].weight")));
        for name in ["a", "a]", "a[1]", "a[:]", "a[1:]", "a[:2]", "a[-1:2]", "a[1:2:3]", "a[1:2].b", ""] {
            assert_eq!(whole_name(name), None, "{name}");
        }
        let hessians = Hessians::from([("w".to_owned(), vec![1.0]), ("v[0:1]".to_owned(), vec![2.0])]);
        assert_eq!(hessian_of(&hessians, "w"), Some(&vec![1.0]));
        assert_eq!(hessian_of(&hessians, "w[2:5]"), Some(&vec![1.0]));
        assert_eq!(hessian_of(&hessians, "v[0:1]"), Some(&vec![2.0]));
        assert_eq!(hessian_of(&hessians, "v"), None);
    }

    #[test]
    fn matrices_are_split_and_joined() {
        let splits = [row_split("w", 5, &[(1, 2), (3, 4)]), row_split("v", 2, &[(0, 2)])];
        let tensors = vec![numbered("a", 2, 2), numbered("w", 5, 3), numbered("v", 2, 1)];
        let parts = split(tensors.clone(), &splits).unwrap();
        assert_eq!(names(&parts), ["a", "w[0:1]", "w[1:2]", "w[2:3]", "w[3:4]", "w[4:5]", "v[0:2]"]);
        assert_eq!((parts[3].shape.as_slice(), parts[3].to_f32()), ([1, 3].as_slice(), vec![6.0, 7.0, 8.0]));
        assert_eq!(join(parts.clone(), &splits, "here").unwrap(), tensors);
        // Whole matrices stay what they are, and a matrix that is not there at all is the model's to miss.
        assert_eq!(join(tensors.clone(), &splits, "here").unwrap(), tensors);
        assert_eq!(join(parts[..6].to_vec(), &splits, "here").unwrap(), tensors[..2]);
        for shape in [vec![6, 3], vec![], vec![5]] {
            let other = HostTensor { shape, ..numbered("w", 6, 3) };
            assert_eq!(split(vec![other], &splits).unwrap_err().exit_code(), 2);
        }

        let refused = |change: &dyn Fn(&mut Vec<HostTensor>)| {
            let mut bad = parts.clone();
            change(&mut bad);
            let error = join(bad, &splits, "here").unwrap_err();
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(error.to_string().contains(", here, "), "{error}");
            error.to_string()
        };
        // A part missing: the first, one between, the last.
        for at in [1, 2, 4] {
            assert!(refused(&|parts| drop(parts.remove(at))).contains("in their order"));
        }
        assert!(refused(&|parts| drop(parts.remove(5))).contains("without its rows from 4 on"));
        // Twice, in another order, of other rows, columns or type, and beside the whole.
        refused(&|parts| parts.push(parts[2].clone()));
        refused(&|parts| parts.swap(2, 3));
        assert!(refused(&|parts| parts[2].shape = vec![3, 1]).contains("expected 1 rows"));
        refused(&|parts| parts[2].shape = vec![]);
        refused(&|parts| parts[2].shape = vec![1, 4]);
        refused(&|parts| parts[2].shape = vec![1, 1, 3]);
        refused(&|parts| parts[2].dtype = HostType::I32);
        assert!(refused(&|parts| parts.push(numbered("w", 5, 3))).contains("not both"));
        assert!(refused(&|parts| parts.insert(0, numbered("w", 1, 1))).contains("not both"));
    }

    #[test]
    fn rows_of_every_storage_restore_as_in_the_whole() {
        let (rows, cols) = (300, 251);
        let values: Vec<f32> =
            (0..rows * cols).map(|i| ((i * 7919) % 20_011) as f32 / 90_000.0 - 0.11).collect();
        let matrix = HostTensor::from_f32("blocks.0.mlp.fc.weight", &[rows, cols], &values);
        let cube = HostTensor::from_f32("conv", &[rows, 1, cols], &values);
        let own = (2..=8).map(|bits| Export::Own { bits });
        let packings = [Packing::TwoBits, Packing::FiveTrits].map(Export::OwnTernary);
        for export in own.chain(packings).chain([Export::Fp16, Export::Challenge]) {
            let tensors = [matrix.clone(), cube.clone()];
            for whole in quantize_by(export, &tensors, &Context::default()).unwrap() {
                let all = whole.dequantize().unwrap().to_f32();
                for range in [0..1, 7..64, 299..300, 0..300] {
                    let part = whole.rows(range.clone(), "part").unwrap();
                    assert_eq!((part.storage, part.name.as_str()), (whole.storage, "part"));
                    let got = part.dequantize().unwrap();
                    assert_eq!(got.shape, with_rows(&whole.shape, range.len()));
                    let expected = &all[range.start * cols..range.end * cols];
                    let is_near = |(got, expected): (&f32, &f32)| match whole.storage {
                        // The step is computed anew from the mean magnitude.
                        Storage::Ternary(_) => (got - expected).abs() <= expected.abs() * 3e-7,
                        _ => got == expected,
                    };
                    assert!(got.to_f32().iter().zip(expected).all(is_near), "{export:?} {range:?}");
                }
                for range in [0..0, 300..301, 0..301] {
                    assert_eq!(whole.rows(range, "part").unwrap_err().exit_code(), 2);
                }
            }
        }
    }
}
