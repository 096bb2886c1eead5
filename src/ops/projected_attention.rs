//! Attention from the mixer's input on: the projections of queries, keys and values ([`super::linear`]), with
//! [`super::normed_attention`] right after them, as one op, so that a device may norm queries and keys in the pass that
//! projects them. One node on the tape where the device joins projections.

use super::attention::{Attended, Mask};
use super::qk_norm::QkNorm;
use super::tape::{primitive, record, tensor};
use super::{Autodiff, Base, LinearOps, NormedAttentionOps, Param, Plain};
use burn::tensor::Tensor;

/// The projections of one input, queries and keys before and after [`super::qk_norm`].
#[derive(Debug, Clone)]
pub struct Heads<B: Base> {
    /// Queries `[b t, h d]` and keys `[b t, g d]` as projected.
    pub before: [Tensor<B, 2>; 2],
    /// Queries `[b, t, h, d]` and keys `[b, t, g, d]`, normed.
    pub normed: [Tensor<B, 4>; 2],
    /// Values `[b t, g d]`.
    pub values: Tensor<B, 2>,
}

/// Projections, norm, rotation, gain and attention, forward and backward.
pub trait ProjectedAttentionOps: LinearOps + NormedAttentionOps {
    /// `x[b t, c]` by the weights of queries `[h d, c]`, keys and values `[g d, c]`.
    fn project_heads(
        x: Tensor<Self, 2>,
        weights: [&Param<Self::Plain>; 3],
        how: &QkNorm<Self::Plain>,
    ) -> Heads<Self> {
        project_heads(x, weights, how)
    }

    /// `x[b t, c]` to `y[b, t, h, d]`.
    fn projected_attention(
        x: Tensor<Self, 2>,
        weights: [&Param<Self::Plain>; 3],
        how: &QkNorm<Self::Plain>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        let Heads { normed: [q, k], values, .. } = Self::project_heads(x, weights, how);
        let v = values.reshape(k.dims());
        Self::attention_forward(q, k, v, mask, scale).0
    }

    /// The gradient of `x` from that of `y`, what attention was given and gave, and queries and keys before the norm; those
    /// of the weights and the gain are added to their buffers.
    #[allow(clippy::too_many_arguments)]
    fn projected_attention_backward(
        x: Tensor<Self, 2>,
        weights: [&Param<Self::Plain>; 3],
        before: [Tensor<Self, 2>; 2],
        attended: Attended<Self>,
        grad: Tensor<Self, 4>,
        how: &QkNorm<Self::Plain>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 2> {
        let grads = Self::normed_attention_backward(before, attended, grad, how, mask, scale);
        Self::project_many_backward(x, weights, grads.map(Some)).expect("a gradient from each projection")
    }
}

impl<B: Plain> ProjectedAttentionOps for Autodiff<B> {
    fn projected_attention(
        x: Tensor<Self, 2>,
        weights: [&Param<B>; 3],
        how: &QkNorm<B>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        if !B::JOINS_PROJECTIONS {
            let [q, k, v] = Self::project_many(x, weights);
            return Self::normed_attention(q, k, v, how, mask, scale);
        }
        let x = primitive(x);
        let input: Tensor<B, 2> = tensor(x.primitive.clone());
        let mask = Mask { window: mask.window, documents: mask.documents.clone().map(Tensor::inner) };
        let Heads { before, normed: [q, k], values } = B::project_heads(input.clone(), weights, how);
        let v = values.reshape(k.dims());
        let (y, log_sums) = B::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale);
        let attended = Attended { q, k, v, y: y.clone(), log_sums };
        let (weights, how) = (weights.map(Param::clone), how.clone());
        record([x], y, move |grad| {
            let (x, attended, before) = (input.clone(), attended.clone(), before.clone());
            let weights = weights.each_ref();
            [primitive(B::projected_attention_backward(
                x, weights, before, attended, grad, &how, &mask, scale,
            ))]
        })
    }
}

/// The reference of [`ProjectedAttentionOps::project_heads`]: projections, then the norm.
pub fn project_heads<B: LinearOps + NormedAttentionOps>(
    x: Tensor<B, 2>,
    weights: [&Param<B::Plain>; 3],
    how: &QkNorm<B::Plain>,
) -> Heads<B> {
    let [q, k, values] = B::project_many(x, weights);
    let normed = B::qk_norm(q.clone(), k.clone(), how);
    Heads { before: [q, k], normed, values }
}
