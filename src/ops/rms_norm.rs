//! Root-mean-square norm without a weight (spec/challenge.md section 4).
//!
//! `y = x / sqrt(mean(x^2) + eps)` over each row of `x[n, c]`, computed in f32 (f64 for f64) and cast back.

use super::tape::unary;
use super::{Autodiff, Plain, accumulate_type, reciprocal};
use burn::tensor::Tensor;

/// The epsilon where none is named: the machine epsilon of float32.
pub const EPS: f64 = 1.192_092_895_507_812_5e-7;

/// RMS norm, forward and backward.
pub trait RmsNormOps: burn::tensor::backend::Backend {
    /// `x[n, c]` to `y[n, c]`.
    fn rms_norm(x: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        forward(x, eps)
    }

    /// The gradient of `x` from that of `y`.
    fn rms_norm_backward(x: Tensor<Self, 2>, grad: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        backward(x, grad, eps)
    }
}

impl<B: Plain> RmsNormOps for Autodiff<B> {
    fn rms_norm(x: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        unary(x, |x| B::rms_norm(x, eps), move |x, grad| B::rms_norm_backward(x, grad, eps))
    }
}

/// The reference forward.
pub fn forward<B: burn::tensor::backend::Backend>(x: Tensor<B, 2>, eps: f64) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = x.cast(accumulate_type(dtype));
    let scale = inverse_rms(x.clone(), eps);
    (x * scale).cast(dtype)
}

/// The reference backward: with `r = 1/rms`, `gx = r gy - x r^3 mean(x gy)`.
pub fn backward<B: burn::tensor::backend::Backend>(
    x: Tensor<B, 2>,
    grad: Tensor<B, 2>,
    eps: f64,
) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let columns = x.dims()[1] as f64;
    let (x, grad) = (x.cast(accumulate_type(dtype)), grad.cast(accumulate_type(dtype)));
    let scale = inverse_rms(x.clone(), eps);
    let projection = (x.clone() * grad.clone()).sum_dim(1).mul_scalar(1.0 / columns);
    let curvature = scale.clone() * scale.clone() * scale.clone() * projection;
    (grad * scale - x * curvature).cast(dtype)
}

fn inverse_rms<B: burn::tensor::backend::Backend>(x: Tensor<B, 2>, eps: f64) -> Tensor<B, 2> {
    let columns = x.dims()[1] as f64;
    reciprocal((x.clone() * x).sum_dim(1).mul_scalar(1.0 / columns).add_scalar(eps).sqrt())
}
