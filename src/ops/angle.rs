//! Running angles: sums along time modulo one turn (Mamba-3's data-dependent rotation, spec/pr1607.md section 2).
//!
//! `y[b, t, c] = (start[b, c] + sum over s <= t of x[b, s, c]) mod 2 pi`, in f32 (f64 for f64). Sums within a chunk are
//! products with a triangle of ones; each chunk starts from the angle where the one before ended, taken modulo a turn, so
//! that long sequences lose no digits.

use super::tape::unary;
use super::{Autodiff, MatmulOps, Plain, accumulate_type};
use burn::tensor::Tensor;
use std::f64::consts::TAU;

/// Positions summed by one product.
const CHUNK: usize = 64;

/// Running angles, forward and backward.
pub trait AngleOps: MatmulOps {
    /// `x[b, t, c]` summed along time from `start[b, c]`, which is a constant.
    fn running_angle(x: Tensor<Self, 3>, start: Tensor<Self, 2>) -> Tensor<Self, 3> {
        forward(x, start)
    }

    /// The gradient of `x`: `gx_t = sum over s >= t of gy_s`.
    fn running_angle_backward(grad: Tensor<Self, 3>) -> Tensor<Self, 3> {
        backward(grad)
    }
}

impl<B: Plain> AngleOps for Autodiff<B> {
    fn running_angle(x: Tensor<Self, 3>, start: Tensor<Self, 2>) -> Tensor<Self, 3> {
        let start = start.inner();
        unary(x, move |x| B::running_angle(x, start), |_, grad| B::running_angle_backward(grad))
    }
}

/// An angle in `[0, 2 pi)`.
fn turn<B: MatmulOps, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let turns = x.clone().mul_scalar(1.0 / TAU).floor();
    x - turns.mul_scalar(TAU)
}

/// `[b, t, c]` in chunks as `[q, b k c]`, zeros after the end; and `q`, `k`.
fn chunks<B: MatmulOps>(x: Tensor<B, 3>) -> (Tensor<B, 2>, [usize; 2]) {
    let [batch, time, channels] = x.dims();
    let chunk = CHUNK.min(time);
    let count = time.div_ceil(chunk);
    let missing = chunk * count - time;
    let x = if missing == 0 {
        x
    } else {
        let zeros = Tensor::zeros([batch, missing, channels], (&x.device(), x.dtype()));
        Tensor::cat(vec![x, zeros], 1)
    };
    let x = x.reshape([batch, count, chunk, channels]).permute([2, 0, 1, 3]);
    (x.reshape([chunk, batch * count * channels]), [chunk, count])
}

/// The inverse of [`chunks`], `[q, b, k, c]` to `[b, t, c]`.
fn joined<B: MatmulOps>(x: Tensor<B, 4>, time: usize) -> Tensor<B, 3> {
    let [chunk, batch, count, channels] = x.dims();
    let x = x.permute([1, 2, 0, 3]).reshape([batch, count * chunk, channels]);
    x.slice([0..batch, 0..time, 0..channels])
}

/// The reference forward.
pub fn forward<B: MatmulOps>(x: Tensor<B, 3>, start: Tensor<B, 2>) -> Tensor<B, 3> {
    let dtype = accumulate_type(x.dtype());
    let [batch, time, channels] = x.dims();
    let (x, [chunk, count]) = chunks(x.cast(dtype));
    let triangle = Tensor::<B, 2>::ones([chunk, chunk], (&x.device(), dtype)).tril(0);
    let sums = B::matmul_as(triangle, x, dtype).reshape([chunk, batch, count, channels]);
    let mut carried = turn(start.cast(dtype));
    let mut parts = Vec::with_capacity(count);
    for index in 0..count {
        let part = sums.clone().narrow(2, index, 1).reshape([chunk, batch, channels]);
        let angles = turn(part + carried.unsqueeze_dim(0));
        carried = angles.clone().narrow(0, chunk - 1, 1).reshape([batch, channels]);
        parts.push(angles.unsqueeze_dim(2));
    }
    joined(Tensor::cat(parts, 2), time)
}

/// The reference backward.
pub fn backward<B: MatmulOps>(grad: Tensor<B, 3>) -> Tensor<B, 3> {
    let dtype = accumulate_type(grad.dtype());
    let [batch, time, channels] = grad.dims();
    let (grad, [chunk, count]) = chunks(grad.cast(dtype));
    let triangle = Tensor::<B, 2>::ones([chunk, chunk], (&grad.device(), dtype)).triu(0);
    let sums = B::matmul_as(triangle, grad, dtype).reshape([chunk, batch, count, channels]);
    let mut carried = Tensor::<B, 3>::zeros([1, batch, channels], (&sums.device(), dtype));
    let mut parts = Vec::with_capacity(count);
    for index in (0..count).rev() {
        let part = sums.clone().narrow(2, index, 1).reshape([chunk, batch, channels]) + carried;
        carried = part.clone().narrow(0, 0, 1);
        parts.push(part.unsqueeze_dim(2));
    }
    parts.reverse();
    joined(Tensor::cat(parts, 2), time)
}
