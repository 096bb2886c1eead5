//! Sums with a fixed order: Burn's own whole-tensor sum adds with float atomics on GPUs, in an order that varies.

use super::tape::{primitive, record, tensor};
use super::{Autodiff, Base, Plain};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// The sum of a tensor, forward and backward.
pub trait ReduceOps: Base {
    /// The sum of `x[n]` as `[1]`.
    fn total(x: Tensor<Self, 1>) -> Tensor<Self, 1> {
        sum(x)
    }
}

impl<B: Plain> ReduceOps for Autodiff<B> {
    fn total(x: Tensor<Self, 1>) -> Tensor<Self, 1> {
        let x = primitive(x);
        let value: Tensor<B, 1> = tensor(x.primitive.clone());
        let sizes = value.dims();
        record([x], B::total(value), move |grad| [primitive(grad.expand(sizes))])
    }
}

/// Rows that one sum over a first dimension takes: it walks along them, and a software Vulkan driver (llvmpipe) ends a
/// shader's loop after 65,535 rounds, without a word.
const ROWS: usize = 1 << 14;

/// The sum over the rows of `x[n, c]` as `[1, c]`.
pub fn sum_rows<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let [rows, _] = x.dims();
    if rows <= ROWS {
        return x.sum_dim(0);
    }
    let part = |start| x.clone().narrow(0, start, ROWS.min(rows - start)).sum_dim(0);
    sum_rows(Tensor::cat((0..rows).step_by(ROWS).map(part).collect(), 0))
}

/// The sum of all elements of `x[n, c]` as `[1]`: rows first, then the rows' sums.
pub fn sum_all<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 1> {
    sum_rows(x.sum_dim(1)).reshape([1])
}

/// The sum of `x[n]` as `[1]`, through rows of some hundreds of elements.
pub fn sum<B: Backend>(x: Tensor<B, 1>) -> Tensor<B, 1> {
    let n = x.dims()[0];
    let width = (1..=n.min(512)).rev().find(|width| n.is_multiple_of(*width)).unwrap_or(1);
    sum_all(x.reshape([n / width, width]))
}
