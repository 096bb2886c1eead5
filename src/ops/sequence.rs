//! What the ops along time share: parts of a batch, whole chunks, triangular matrices, and two results in one tensor.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use std::ops::Range;

/// Ranges of at most `size` that cover `0..total` in order.
pub(super) fn parts(total: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..total).step_by(size).map(move |start| start..(start + size).min(total))
}

/// A range of the first dimension, as `dtype`.
pub(super) fn rows<B: Backend, const D: usize>(
    x: &Tensor<B, D>,
    range: &Range<usize>,
    dtype: DType,
) -> Tensor<B, D> {
    x.clone().narrow(0, range.start, range.len()).cast(dtype)
}

/// `x[b, t, ...]` with zeros after its last position, up to position `time`.
pub(super) fn pad_time<B: Backend, const D: usize>(x: Tensor<B, D>, time: usize) -> Tensor<B, D> {
    let mut shape = x.dims();
    if shape[1] == time {
        return x;
    }
    shape[1] = time - shape[1];
    let zeros = Tensor::zeros(shape, (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zeros], 1)
}

/// `[size, size]` with ones where row - column is at least `offset`, zeros elsewhere.
pub(super) fn lower_triangle<B: Backend>(
    size: usize,
    offset: i64,
    device: &B::Device,
    dtype: DType,
) -> Tensor<B, 2> {
    let index = Tensor::<B, 1, Int>::arange(0..size as i64, device);
    let row = index.clone().reshape([size, 1]).expand([size, size]);
    let column = index.add_scalar(offset).reshape([1, size]).expand([size, size]);
    row.greater_equal(column).float().cast(dtype)
}

/// One row of all elements of `y` and then, if there is one, of the final state.
pub(super) fn pack<B: Backend, const D: usize, const S: usize>(
    y: Tensor<B, D>,
    state: Option<Tensor<B, S>>,
) -> Tensor<B, 1> {
    let y: Tensor<B, 1> = y.flatten(0, D - 1);
    match state {
        Some(state) => Tensor::cat(vec![y, state.flatten(0, S - 1)], 0),
        None => y,
    }
}

/// The inverse of [`pack`]: `y` as `dtype`, and the final state if `flat` holds one.
pub(super) fn unpack<B: Backend, const D: usize, const S: usize>(
    flat: Tensor<B, 1>,
    y: [usize; D],
    state: [usize; S],
    dtype: DType,
) -> (Tensor<B, D>, Option<Tensor<B, S>>) {
    let (count, rest): (usize, usize) = (y.iter().product(), state.iter().product());
    let found = flat.dims()[0];
    if found == count {
        return (flat.reshape(y).cast(dtype), None);
    }
    assert_eq!(found, count + rest, "an output {y:?} with a state {state:?} in {found} elements");
    let values = flat.clone().narrow(0, 0, count).reshape(y).cast(dtype);
    (values, Some(flat.narrow(0, count, rest).reshape(state)))
}

/// The sum over all but the last dimension.
pub(super) fn sum_to_last<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, 1> {
    let columns = x.dims()[D - 1];
    let rows = x.shape().num_elements() / columns;
    super::reduce::sum_rows(x.reshape([rows, columns])).reshape([columns])
}
