//! Token embedding: `y[n, c] = w[id[n], c]`.

use super::tape::rooted;
use super::{Autodiff, Base, MatmulOps, Param, Plain, accumulate_type};
use burn::tensor::{DType, Int, Tensor};

/// One-hot rows of one product of the reference backward: see `ROWS` of [`super::reduce`].
const ONE_HOT_ROWS: usize = 1 << 15;

/// Embedding, forward and backward.
pub trait EmbeddingOps: Base + MatmulOps {
    /// One-hot elements that the reference backward holds at once: 64 MB of f32, since some adapters bind no more than
    /// 128 MB.
    const ONE_HOT_ELEMENTS: usize = 1 << 24;

    /// Rows of the parameter `w[v, c]` by `ids[n]`.
    fn embed(ids: Tensor<Self, 1, Int>, w: &Param<Self::Plain>) -> Tensor<Self, 2> {
        forward::<Self>(ids, w)
    }

    /// Adds the gradient of `w` to its buffer: `gw[v] = sum over n with id[n] = v of gy[n]`.
    fn embed_backward(ids: Tensor<Self, 1, Int>, w: &Param<Self::Plain>, grad: Tensor<Self, 2>) {
        backward::<Self>(ids, w, grad);
    }
}

impl<B: Plain> EmbeddingOps for Autodiff<B> {
    fn embed(ids: Tensor<Self, 1, Int>, w: &Param<B>) -> Tensor<Self, 2> {
        let ids = ids.inner();
        let output = B::embed(ids.clone(), w);
        // Also where this weight is frozen: what follows has weights of its own, which untracked inputs would leave
        // without gradients.
        let weight = w.clone();
        rooted(output, move |grad| B::embed_backward(ids.clone(), &weight, grad))
    }
}

/// The reference forward.
pub fn forward<B: EmbeddingOps>(ids: Tensor<B, 1, Int>, w: &Param<B::Plain>) -> Tensor<B, 2> {
    B::lift(w.compute::<2>()).select(0, ids)
}

/// The reference backward: a product with one-hot rows, in chunks, whose sum has a fixed order on every device.
pub fn backward<B: EmbeddingOps>(ids: Tensor<B, 1, Int>, w: &Param<B::Plain>, grad: Tensor<B, 2>) {
    if !w.is_trainable() {
        return;
    }
    let (vocab, rows) = (w.shape()[0], ids.dims()[0]);
    let columns = grad.dims()[1];
    let chunk = (B::ONE_HOT_ELEMENTS / vocab).min(ONE_HOT_ROWS).clamp(1, rows);
    for start in (0..rows).step_by(chunk) {
        let len = chunk.min(rows - start);
        let hot = one_hot(ids.clone().narrow(0, start, len), vocab, grad.dtype());
        let part = grad.clone().slice([start..start + len, 0..columns]);
        let dtype = accumulate_type(grad.dtype());
        w.accumulate::<2>(B::lower(B::matmul_as(hot.transpose(), part, dtype)));
    }
}

/// `ids[n]` as rows of `[n, classes]` with a single one each.
pub fn one_hot<B: burn::tensor::backend::Backend>(
    ids: Tensor<B, 1, Int>,
    classes: usize,
    dtype: DType,
) -> Tensor<B, 2> {
    let rows = ids.dims()[0];
    let classes_of = Tensor::<B, 1, Int>::arange(0..classes as i64, &ids.device());
    let ids = ids.reshape([rows, 1]).expand([rows, classes]);
    ids.equal(classes_of.reshape([1, classes]).expand([rows, classes])).float().cast(dtype)
}
