//! The norm of each head of queries and of keys, their rotation, and the queries' gain: what stands between their
//! projections and attention (spec/challenge.md section 4).
//!
//! `q[b t, h d]` and `k[b t, g d]` to `[b, t, h, d]` and `[b, t, g, d]`: [`super::rms_norm`] of each head's `d` channels,
//! [`super::rope`], and for the queries `head_gain` of [`super::residual`].

use super::rope::RopeTable;
use super::tape::{primitive, record_many, tensor};
use super::{Autodiff, Param, Plain, ResidualOps, RmsNormOps, RopeOps};
use burn::tensor::Tensor;

/// Sizes, rotation, gain and epsilon of one call.
#[derive(Debug, Clone)]
pub struct QkNorm<P: Plain> {
    /// Sequences.
    pub batch: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of the keys.
    pub groups: usize,
    /// The rotation of the sequences' positions; channels past its width, all where that is 0, do not rotate.
    pub rope: RopeTable<P>,
    /// `[heads]`
    pub gain: Option<Param<P>>,
    /// Of the norm.
    pub eps: f64,
}

/// Norm, rotation and gain, forward and backward.
pub trait QkNormOps: RmsNormOps + RopeOps + ResidualOps {
    /// `q[b t, h d]`, `k[b t, g d]` to `[b, t, h, d]`, `[b, t, g, d]`.
    fn qk_norm(q: Tensor<Self, 2>, k: Tensor<Self, 2>, how: &QkNorm<Self::Plain>) -> [Tensor<Self, 4>; 2] {
        forward(q, k, how)
    }

    /// The gradients of `q` and `k` from those of the outputs; the gain's is added to its buffer.
    fn qk_norm_backward(
        q: Tensor<Self, 2>,
        k: Tensor<Self, 2>,
        grads: [Tensor<Self, 4>; 2],
        how: &QkNorm<Self::Plain>,
    ) -> [Tensor<Self, 2>; 2] {
        backward(q, k, grads, how)
    }
}

impl<B: Plain> QkNormOps for Autodiff<B> {
    fn qk_norm(q: Tensor<Self, 2>, k: Tensor<Self, 2>, how: &QkNorm<B>) -> [Tensor<Self, 4>; 2] {
        let parents = [primitive(q), primitive(k)];
        let inputs: [Tensor<B, 2>; 2] = parents.each_ref().map(|p| tensor(p.primitive.clone()));
        let [q, k] = inputs.clone();
        let outputs = B::qk_norm(q, k, how);
        let (how, shapes) = (how.clone(), outputs.each_ref().map(|y| y.dims()));
        let outputs = record_many(parents, outputs.map(primitive), move |grads| {
            let [q, k] = inputs.clone();
            // An output that nothing has used has no gradient.
            let [of_q, of_k] = grads.map(|grad| grad.map(tensor::<B, 4>));
            let zeros = |shape| Tensor::zeros(shape, (&q.device(), q.dtype()));
            let grads = [of_q.unwrap_or_else(|| zeros(shapes[0])), of_k.unwrap_or_else(|| zeros(shapes[1]))];
            B::qk_norm_backward(q, k, grads, &how).map(|grad| Some(primitive(grad)))
        });
        outputs.map(tensor)
    }
}

/// Heads `x[b t, n d]`, normed and rotated, as `[b, t, n, d]`.
fn turned<B: QkNormOps>(x: Tensor<B, 2>, heads: usize, how: &QkNorm<B::Plain>) -> Tensor<B, 4> {
    let [rows, width] = x.dims();
    let size = width / heads;
    let x = B::rms_norm(x.reshape([rows * heads, size]), how.eps);
    let x = x.reshape([how.batch, rows / how.batch, heads, size]);
    if how.rope.rotated() == 0 { x } else { B::rope(x, &how.rope) }
}

/// The reference forward.
pub fn forward<B: QkNormOps>(q: Tensor<B, 2>, k: Tensor<B, 2>, how: &QkNorm<B::Plain>) -> [Tensor<B, 4>; 2] {
    let (q, k) = (turned(q, how.heads, how), turned(k, how.groups, how));
    match &how.gain {
        Some(gain) => [B::head_gain(q, gain), k],
        None => [q, k],
    }
}

/// The reference backward: the gain's, the rotation's and the norm's one after the other; what the gain multiplied is
/// computed again.
pub fn backward<B: QkNormOps>(
    q: Tensor<B, 2>,
    k: Tensor<B, 2>,
    grads: [Tensor<B, 4>; 2],
    how: &QkNorm<B::Plain>,
) -> [Tensor<B, 2>; 2] {
    let back = |x: Tensor<B, 2>, grad: Tensor<B, 4>| {
        let ([rows, width], [.., heads, size]) = (x.dims(), grad.dims());
        let grad = if how.rope.rotated() == 0 { grad } else { B::rope_backward(grad, &how.rope) };
        let (x, grad) = (x.reshape([rows * heads, size]), grad.reshape([rows * heads, size]));
        B::rms_norm_backward(x, grad, how.eps).reshape([rows, width])
    };
    let [of_q, of_k] = grads;
    let of_q = match &how.gain {
        Some(gain) => B::head_gain_backward(turned(q.clone(), how.heads, how), gain, of_q),
        None => of_q,
    };
    [back(q, of_q), back(k, of_k)]
}
