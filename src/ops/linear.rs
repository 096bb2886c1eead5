//! A linear layer without bias: `y[n, o] = x[n, i] w[o, i]^T`.

use super::tape::unary;
use super::{Autodiff, Base, MatmulOps, Param, Plain};
use burn::tensor::Tensor;

/// Linear layer, forward and backward.
pub trait LinearOps: Base + MatmulOps {
    /// `x[n, i]` to `y[n, o]` for the weight `w[o, i]`.
    fn project(x: Tensor<Self, 2>, w: &Param<Self::Plain>) -> Tensor<Self, 2> {
        forward::<Self>(x, Self::lift(w.compute()))
    }

    /// The gradient of `x`; the weight's is added to its buffer.
    fn project_backward(
        x: Tensor<Self, 2>,
        w: &Param<Self::Plain>,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        let (grad_x, grad_w) = backward::<Self>(x, Self::lift(w.compute()), grad, w.is_trainable());
        if let Some(grad_w) = grad_w {
            w.accumulate(Self::lower(grad_w));
        }
        grad_x
    }
}

impl<B: Plain> LinearOps for Autodiff<B> {
    fn project(x: Tensor<Self, 2>, w: &Param<B>) -> Tensor<Self, 2> {
        let weight = w.clone();
        unary(x, |x| B::project(x, w), move |x, grad| B::project_backward(x, &weight, grad))
    }
}

/// The reference forward.
pub fn forward<B: MatmulOps>(x: Tensor<B, 2>, w: Tensor<B, 2>) -> Tensor<B, 2> {
    let dtype = x.dtype();
    B::matmul_as(x, w.transpose(), dtype)
}

/// The reference backward: `gx = gy w` and, if asked for, `gw = gy^T x` in f32 (f64 for f64).
pub fn backward<B: MatmulOps>(
    x: Tensor<B, 2>,
    w: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    weight: bool,
) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
    let dtype = x.dtype();
    let grad_w = weight.then(|| B::matmul_as(grad.clone().transpose(), x, super::accumulate_type(dtype)));
    (B::matmul_as(grad, w, dtype), grad_w)
}
