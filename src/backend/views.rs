//! How tensors lie in their buffers, and views made by hand: of parts of a matrix, of its transpose, of several matrices
//! that lie beside each other, or one under the other, in one buffer.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::server::Handle;
use cubecl::zspace::metadata::Metadata;
use std::fmt::{self, Write};

/// Sizes and strides of a tensor of rank `N`.
pub(super) fn layout<R: CubeRuntime, const N: usize>(x: &CubeTensor<R>) -> ([usize; N], [usize; N]) {
    (std::array::from_fn(|i| x.meta.shape()[i]), std::array::from_fn(|i| x.meta.strides()[i]))
}

/// The sizes of a matrix.
pub(super) fn sizes<R: CubeRuntime>(x: &CubeTensor<R>) -> [usize; 2] {
    layout(x).0
}

/// From one row of a matrix to the next, in elements, if those of a row are consecutive; a single row is dense.
pub(super) fn pitch<R: CubeRuntime>(x: &CubeTensor<R>) -> Option<usize> {
    let ([rows, columns], [row, column]) = layout(x);
    (columns == 1 || column == 1).then_some(if rows == 1 { columns } else { row })
}

/// The transpose of a matrix.
pub(super) fn transposed<R: CubeRuntime>(x: &CubeTensor<R>) -> CubeTensor<R> {
    let ([rows, columns], [row, column]) = layout(x);
    CubeTensor { meta: Box::new(Metadata::new([columns, rows], [column, row])), ..x.clone() }
}

/// Columns `from..from + width` of a matrix.
pub(super) fn columns<R: CubeRuntime>(x: &CubeTensor<R>, from: usize, width: usize) -> CubeTensor<R> {
    let [rows, all] = sizes(x);
    part(x, [0, from], [0, all - from - width], [rows, width])
}

/// Rows `from..from + count` of a matrix.
pub(super) fn rows<R: CubeRuntime>(x: &CubeTensor<R>, from: usize, count: usize) -> CubeTensor<R> {
    let [all, columns] = sizes(x);
    part(x, [from, 0], [all - from - count, 0], [count, columns])
}

fn part<R: CubeRuntime>(
    x: &CubeTensor<R>,
    before: [usize; 2],
    after: [usize; 2],
    shape: [usize; 2],
) -> CubeTensor<R> {
    let (_, strides) = layout::<_, 2>(x);
    let bytes =
        |skipped: [usize; 2]| ((skipped[0] * strides[0] + skipped[1] * strides[1]) * x.elem_size()) as u64;
    let handle = x.handle.clone().offset_start(bytes(before)).offset_end(bytes(after));
    CubeTensor { handle, meta: Box::new(Metadata::new(shape, strides)), ..x.clone() }
}

/// Where a matrix lies: its first element's byte in its buffer, its sizes and its strides in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    start: usize,
    shape: [usize; 2],
    strides: [usize; 2],
}

impl Place {
    fn of<R: CubeRuntime>(x: &CubeTensor<R>) -> Option<Self> {
        (x.meta.shape().len() == 2).then(|| {
            let (shape, strides) = layout(x);
            Self { start: x.handle.offset_start.unwrap_or(0) as usize, shape, strides }
        })
    }
}

/// The matrix whose columns are those of the given ones, in order, if they lie so in one buffer.
pub(super) fn side_by_side<R: CubeRuntime>(parts: &[&CubeTensor<R>]) -> Option<CubeTensor<R>> {
    joined(parts, beside)
}

/// The dense matrix whose rows are those of the given ones, in order, if they lie so in one buffer.
pub(super) fn one_under_the_other<R: CubeRuntime>(parts: &[&CubeTensor<R>]) -> Option<CubeTensor<R>> {
    joined(parts, under)
}

fn joined<R: CubeRuntime>(
    parts: &[&CubeTensor<R>],
    join: impl Fn(&[Place], usize) -> Option<Place>,
) -> Option<CubeTensor<R>> {
    let (first, last) = (parts.first()?, parts.last()?);
    let memory = memory(&first.handle)?;
    if parts.iter().any(|part| part.dtype != first.dtype || self::memory(&part.handle) != Some(memory)) {
        return None;
    }
    let places = parts.iter().map(|part| Place::of(part)).collect::<Option<Vec<Place>>>()?;
    let place = join(&places, first.elem_size())?;
    let mut handle = first.handle.clone();
    handle.offset_end = last.handle.offset_end;
    let meta = Box::new(Metadata::new(place.shape, place.strides));
    Some(CubeTensor { handle, meta, ..(*first).clone() })
}

fn beside(parts: &[Place], size: usize) -> Option<Place> {
    let first = *parts.first()?;
    let [rows, _] = first.shape;
    let mut width = 0;
    for part in parts {
        let same = part.shape[0] == rows && (rows == 1 || part.strides[0] == first.strides[0]);
        let follows = part.start == first.start + width * size;
        if !same || !follows || (part.strides[1] != 1 && part.shape[1] != 1) {
            return None;
        }
        width += part.shape[1];
    }
    let pitch = if rows == 1 { width } else { first.strides[0] };
    (pitch >= width).then_some(Place { start: first.start, shape: [rows, width], strides: [pitch, 1] })
}

fn under(parts: &[Place], size: usize) -> Option<Place> {
    let first = *parts.first()?;
    let [_, columns] = first.shape;
    let mut count = 0;
    for part in parts {
        let [rows, own] = part.shape;
        let dense = (rows == 1 || part.strides[0] == columns) && (columns == 1 || part.strides[1] == 1);
        if own != columns || !dense || part.start != first.start + count * columns * size {
            return None;
        }
        count += rows;
    }
    Some(Place { start: first.start, shape: [count, columns], strides: [columns, 1] })
}

/// The number of the memory behind a handle, the same for all that share it.
///
/// cubecl tells it in its debug text only (`... { value: 17 } ...`); were that to change, nothing would be found to
/// share memory.
pub(super) fn memory(handle: &Handle) -> Option<u64> {
    let mut text = Number::default();
    // Stops with an error once the number is over.
    let _ = write!(text, "{:?}", handle.memory);
    text.value
}

/// Reads the first `value: <number>` of what is written to it and refuses the rest.
#[derive(Default)]
struct Number {
    seen: String,
    value: Option<u64>,
}

impl Write for Number {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.seen.push_str(text);
        let Some((_, rest)) = self.seen.split_once("value: ") else { return Ok(()) };
        let Some(end) = rest.find(|c: char| !c.is_ascii_digit()) else { return Ok(()) };
        self.value = rest[..end].parse().ok();
        Err(fmt::Error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cubecl::stream_id::StreamId;

    fn place(start: usize, shape: [usize; 2], strides: [usize; 2]) -> Place {
        Place { start, shape, strides }
    }

    #[test]
    fn handles_of_one_memory_are_told_from_others() {
        let a = Handle::new(StreamId::current(), 64);
        let b = Handle::new(StreamId::current(), 64);
        assert!(memory(&a).is_some());
        assert_eq!(memory(&a), memory(&a.clone().offset_start(16)));
        assert_ne!(memory(&a), memory(&b));
    }

    #[test]
    fn matrices_side_by_side_are_one() {
        let (a, b) = (place(32, [5, 8], [24, 1]), place(48, [5, 4], [24, 1]));
        assert_eq!(beside(&[a, b], 2), Some(place(32, [5, 12], [24, 1])));
        assert_eq!(beside(&[b, a], 2), None);
        assert_eq!(beside(&[a, Place { start: 50, ..b }], 2), None);
        assert_eq!(beside(&[a, Place { strides: [20, 1], ..b }], 2), None);
        assert_eq!(beside(&[a, Place { shape: [4, 4], ..b }], 2), None);
        assert_eq!(beside(&[a, Place { strides: [24, 2], ..b }], 2), None);
        // Matrices one under the other: rows that reach into those of the other.
        assert_eq!(beside(&[place(0, [5, 8], [8, 1]), place(16, [5, 8], [8, 1])], 2), None);
        assert_eq!(
            beside(&[place(0, [1, 8], [8, 1]), place(16, [1, 8], [8, 1])], 2),
            Some(place(0, [1, 16], [16, 1]))
        );
    }

    #[test]
    fn matrices_one_under_the_other_are_one() {
        let (a, b) = (place(0, [3, 7], [7, 1]), place(84, [2, 7], [7, 1]));
        assert_eq!(under(&[a, b], 4), Some(place(0, [5, 7], [7, 1])));
        assert_eq!(under(&[a, Place { start: 88, ..b }], 4), None);
        assert_eq!(under(&[a, Place { shape: [2, 6], ..b }], 4), None);
        assert_eq!(under(&[Place { strides: [8, 1], ..a }, b], 4), None);
        assert_eq!(under(&[b, a], 4), None);
    }
}
