//! Attention over queries and keys as their projections leave them: [`super::qk_norm`], then [`super::attention`], with one
//! backward, which may leave the gradients of queries, keys and values side by side, as the projections' own backward
//! wants them.

use super::attention::{Attended, Mask};
use super::qk_norm::QkNorm;
use super::tape::{primitive, record, tensor};
use super::{AttentionOps, Autodiff, Plain, QkNormOps};
use burn::tensor::Tensor;

/// The gradients of `q[b t, h d]`, `k[b t, g d]` and `v[b, t, g, d]`.
pub type Grads<B> = (Tensor<B, 2>, Tensor<B, 2>, Tensor<B, 4>);

/// Norm, rotation, gain and attention, forward and backward.
pub trait NormedAttentionOps: AttentionOps + QkNormOps {
    /// `q[b t, h d]`, `k[b t, g d]`, `v[b, t, g, d]` to `y[b, t, h, d]`.
    fn normed_attention(
        q: Tensor<Self, 2>,
        k: Tensor<Self, 2>,
        v: Tensor<Self, 4>,
        how: &QkNorm<Self::Plain>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        let [q, k] = Self::qk_norm(q, k, how);
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
    ) -> Grads<Self> {
        let [of_q, of_k, of_v] = Self::attention_backward(attended, grad, mask, scale);
        let [of_q, of_k] = Self::qk_norm_backward(q, k, [of_q, of_k], how);
        (of_q, of_k, of_v)
    }
}

impl<B: Plain> NormedAttentionOps for Autodiff<B> {
    fn normed_attention(
        q: Tensor<Self, 2>,
        k: Tensor<Self, 2>,
        v: Tensor<Self, 4>,
        how: &QkNorm<B>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        let parents = [primitive(q), primitive(k), primitive(v)];
        let before: [Tensor<B, 2>; 2] = [0, 1].map(|i| tensor(parents[i].primitive.clone()));
        let v: Tensor<B, 4> = tensor(parents[2].primitive.clone());
        let mask = Mask { window: mask.window, documents: mask.documents.clone().map(Tensor::inner) };
        let [of_q, of_k] = before.clone();
        let [q, k] = B::qk_norm(of_q, of_k, how);
        let (y, log_sums) = B::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale);
        let attended = Attended { q, k, v, y: y.clone(), log_sums };
        let how = how.clone();
        record(parents, y, move |grad| {
            let (attended, before) = (attended.clone(), before.clone());
            let (q, k, v) = B::normed_attention_backward(before, attended, grad, &how, &mask, scale);
            [primitive(q), primitive(k), primitive(v)]
        })
    }
}
