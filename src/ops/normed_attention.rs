//! Attention over queries and keys as their projections leave them: [`super::qk_norm`], then [`super::attention`], with one
//! backward, which may leave the gradients of queries, keys and values side by side, as the projections' own backward
//! wants them.

use super::attention::{Attended, Mask};
use super::qk_norm::QkNorm;
use super::tape::{primitive, record, rounds, tensor};
use super::{AttentionOps, Autodiff, Plain, QkNormOps};
use burn::tensor::Tensor;

/// Norm, rotation, gain and attention, forward and backward.
pub trait NormedAttentionOps: AttentionOps + QkNormOps {
    /// `q[b t, h d]`, `k[b t, g d]`, `v[b t, g d]` to `y[b, t, h, d]`.
    fn normed_attention(
        q: Tensor<Self, 2>,
        k: Tensor<Self, 2>,
        v: Tensor<Self, 2>,
        how: &QkNorm<Self::Plain>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        let [q, k] = Self::qk_norm(q, k, how);
        let v = v.reshape(k.dims());
        Self::attention_forward(q, k, v, mask, scale).0
    }

    /// The gradients from that of `y`, what attention was given and gave, and what came before the norm; the gain's is
    /// added to its buffer.
    fn normed_attention_backward(
        [q, k]: [Tensor<Self, 2>; 2],
        attended: Attended<Self>,
        grad: Tensor<Self, 4>,
        how: &QkNorm<Self::Plain>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> [Tensor<Self, 2>; 3] {
        apart::<Self>([q, k], attended, grad, how, mask, scale)
    }
}

impl<B: Plain> NormedAttentionOps for Autodiff<B> {
    fn normed_attention(
        q: Tensor<Self, 2>,
        k: Tensor<Self, 2>,
        v: Tensor<Self, 2>,
        how: &QkNorm<B>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        if rounds() {
            let [q, k] = Self::qk_norm(q, k, how);
            let v = v.reshape(k.dims());
            return Self::attention_forward(q, k, v, mask, scale).0;
        }
        let parents = [primitive(q), primitive(k), primitive(v)];
        let [q, k, v]: [Tensor<B, 2>; 3] = parents.each_ref().map(|p| tensor(p.primitive.clone()));
        let before = [q, k];
        let mask = Mask { window: mask.window, documents: mask.documents.clone().map(Tensor::inner) };
        let [of_q, of_k] = before.clone();
        let [q, k] = B::qk_norm(of_q, of_k, how);
        let v = v.reshape(k.dims());
        let (y, log_sums) = B::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale);
        let attended = Attended { q, k, v, y: y.clone(), log_sums };
        let how = how.clone();
        record(parents, y, move |grad| {
            let (attended, before) = (attended.clone(), before.clone());
            B::normed_attention_backward(before, attended, grad, &how, &mask, scale).map(primitive)
        })
    }
}

/// The reference backward: attention's, then the norm's.
pub fn apart<B: AttentionOps + QkNormOps>(
    [q, k]: [Tensor<B, 2>; 2],
    attended: Attended<B>,
    grad: Tensor<B, 4>,
    how: &QkNorm<B::Plain>,
    mask: &Mask<B>,
    scale: f64,
) -> [Tensor<B, 2>; 3] {
    let shape = k.dims();
    let [of_q, of_k, of_v] = B::attention_backward(attended, grad, mask, scale);
    let [of_q, of_k] = B::qk_norm_backward(q, k, [of_q, of_k], how);
    [of_q, of_k, of_v.reshape(shape)]
}
