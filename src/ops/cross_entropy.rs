//! Cross-entropy over softcapped logits of the output head, without the logits ever being whole in memory.
//!
//! `z = cap tanh(h w^T / cap)` (or `h w^T` without a cap), `nll[n] = logsumexp(z[n]) - z[n, target[n]]` in nats, for
//! hidden rows `h[n, c]`, head `w[v, c]`, `target[n]`; logits and sums in f32 (f64 for f64). Rows are taken in chunks.

use super::embedding::one_hot;
use super::tape::{primitive, record, tensor};
use super::{Autodiff, Base, MatmulOps, Param, Plain, accumulate_type};
use burn::tensor::{DType, Int, Tensor, activation::log_softmax};
use std::ops::Range;

/// Softcapped cross-entropy with the head's product, forward and backward.
pub trait CrossEntropyOps: Base + MatmulOps {
    /// Logits that the reference holds at once, in each of some six tensors: 64 MB of f32, since some adapters bind no
    /// more than 128 MB.
    const LOGIT_ELEMENTS: usize = 1 << 24;

    /// `z[n, v]`, for sampling: in f32 (f64 for f64).
    fn capped_logits(h: Tensor<Self, 2>, w: &Param<Self::Plain>, cap: Option<f64>) -> Tensor<Self, 2> {
        let dtype = accumulate_type(h.dtype());
        logits(h, Self::lift(w.compute()), dtype, cap)
    }

    /// The loss of each row in nats: `nll[n]`.
    fn cross_entropy(
        h: Tensor<Self, 2>,
        w: &Param<Self::Plain>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
    ) -> Tensor<Self, 1> {
        forward::<Self>(h, Self::lift(w.compute()), targets, cap)
    }

    /// The same, and each row's `logsumexp(z[n])` where the device's backward has a use for it.
    fn cross_entropy_and_lse(
        h: Tensor<Self, 2>,
        w: &Param<Self::Plain>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
    ) -> (Tensor<Self, 1>, Option<Tensor<Self, 1>>) {
        (Self::cross_entropy(h, w, targets, cap), None)
    }

    /// The gradient of `h` from that of `nll`; the head's is added to its buffer. `lse` is what
    /// [`Self::cross_entropy_and_lse`] gave, or nothing.
    fn cross_entropy_backward(
        h: Tensor<Self, 2>,
        w: &Param<Self::Plain>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
        lse: Option<Tensor<Self, 1>>,
        grad: Tensor<Self, 1>,
    ) -> Tensor<Self, 2> {
        drop(lse); // the reference has it anew
        let mut accumulate = |part| w.accumulate::<2>(Self::lower(part));
        let trainable = w.is_trainable();
        backward::<Self>(h, Self::lift(w.compute()), targets, cap, grad, trainable.then_some(&mut accumulate))
    }
}

impl<B: Plain> CrossEntropyOps for Autodiff<B> {
    fn cross_entropy(
        h: Tensor<Self, 2>,
        w: &Param<B>,
        targets: Tensor<Self, 1, Int>,
        cap: Option<f64>,
    ) -> Tensor<Self, 1> {
        let (weight, targets) = (w.clone(), targets.inner());
        let tracked = primitive(h);
        let h: Tensor<B, 2> = tensor(tracked.primitive.clone());
        let (nll, lse) = B::cross_entropy_and_lse(h.clone(), w, targets.clone(), cap);
        record([tracked], nll, move |grad| {
            let (h, targets, lse) = (h.clone(), targets.clone(), lse.clone());
            [primitive(B::cross_entropy_backward(h, &weight, targets, cap, lse, grad))]
        })
    }
}

/// `cap tanh(z / cap)`, or `z` without a cap; and its derivative.
pub fn softcap<B: burn::tensor::backend::Backend, const D: usize>(
    z: Tensor<B, D>,
    cap: Option<f64>,
) -> Tensor<B, D> {
    match cap {
        // Not a division: Burn differentiates one by a scalar with the scalar rounded to f32.
        Some(cap) => z.mul_scalar(1.0 / cap).tanh().mul_scalar(cap),
        None => z,
    }
}

fn chunks<B: CrossEntropyOps>(rows: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let chunk = (B::LOGIT_ELEMENTS / vocab.max(1)).clamp(1, rows.max(1));
    (0..rows).step_by(chunk).map(move |start| start..(start + chunk).min(rows))
}

fn logits<B: MatmulOps>(h: Tensor<B, 2>, w: Tensor<B, 2>, dtype: DType, cap: Option<f64>) -> Tensor<B, 2> {
    softcap(B::matmul_as(h, w.transpose(), dtype), cap)
}

/// The reference forward.
pub fn forward<B: CrossEntropyOps>(
    h: Tensor<B, 2>,
    w: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
    cap: Option<f64>,
) -> Tensor<B, 1> {
    let dtype = accumulate_type(h.dtype());
    let ([rows, columns], vocab) = (h.dims(), w.dims()[0]);
    let parts = chunks::<B>(rows, vocab).map(|range| {
        let part = h.clone().slice([range.clone(), 0..columns]);
        let target = targets.clone().slice([range.clone()]).reshape([range.len(), 1]);
        let log_p = log_softmax(logits(part, w.clone(), dtype, cap), 1);
        log_p.gather(1, target).neg().reshape([range.len()])
    });
    Tensor::cat(parts.collect(), 0)
}

/// The reference backward: `gz = (softmax(z) - onehot) gnll (1 - tanh^2)`, `gh = gz w`, `gw += gz^T h`.
pub fn backward<B: CrossEntropyOps>(
    h: Tensor<B, 2>,
    w: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
    cap: Option<f64>,
    grad: Tensor<B, 1>,
    mut accumulate: Option<&mut dyn FnMut(Tensor<B, 2>)>,
) -> Tensor<B, 2> {
    let (dtype, wide) = (h.dtype(), accumulate_type(h.dtype()));
    let ([rows, columns], vocab) = (h.dims(), w.dims()[0]);
    let mut parts = Vec::new();
    for range in chunks::<B>(rows, vocab) {
        let part = h.clone().slice([range.clone(), 0..columns]);
        let target = targets.clone().slice([range.clone()]);
        let z = logits(part.clone(), w.clone(), wide, cap);
        let p = burn::tensor::activation::softmax(z.clone(), 1);
        let grad_nll = grad.clone().slice([range.clone()]).reshape([range.len(), 1]).cast(wide);
        let mut grad_z = (p - one_hot(target, vocab, wide)) * grad_nll;
        if let Some(cap) = cap {
            let tanh = z.mul_scalar(1.0 / cap);
            grad_z = grad_z * (tanh.clone() * tanh).neg().add_scalar(1.0);
        }
        let grad_z = grad_z.cast(dtype);
        if let Some(accumulate) = accumulate.as_mut() {
            accumulate(B::matmul_as(grad_z.clone().transpose(), part, wide));
        }
        parts.push(B::matmul_as(grad_z, w.clone(), dtype));
    }
    Tensor::cat(parts, 0)
}
