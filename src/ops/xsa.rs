//! Exclusive self attention: what attention adds beyond the position's own value (spec/pr1382.md section 2).
//!
//! `y[b, t, h, d]`, `v[b, t, g, d]`, head `i` reads group `i / (h/g)`: with `u = v / max(|v|, 1e-12)`,
//! `z = y - (y.u) u`, in f32 (f64 for f64).

use super::tape::{primitive, record, tensor};
use super::{Autodiff, Plain, accumulate_type, reciprocal};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// The least length that a value is divided by.
const LEAST_LENGTH: f64 = 1e-12;

/// Exclusive self attention's projection, forward and backward.
pub trait XsaOps: Backend {
    /// `y[b, t, h, d]` without its part along `v[b, t, g, d]`.
    fn exclude_self(y: Tensor<Self, 4>, v: Tensor<Self, 4>) -> Tensor<Self, 4> {
        forward(y, v)
    }

    /// The gradients of `y` and `v`.
    fn exclude_self_backward(
        y: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        grad: Tensor<Self, 4>,
    ) -> [Tensor<Self, 4>; 2] {
        backward(y, v, grad)
    }
}

impl<B: Plain> XsaOps for Autodiff<B> {
    fn exclude_self(y: Tensor<Self, 4>, v: Tensor<Self, 4>) -> Tensor<Self, 4> {
        let parents = [primitive(y), primitive(v)];
        let inputs: [Tensor<B, 4>; 2] = parents.each_ref().map(|p| tensor(p.primitive.clone()));
        let [y, v] = inputs.clone();
        record(parents, B::exclude_self(y, v), move |grad| {
            let [y, v] = inputs.clone();
            B::exclude_self_backward(y, v, grad).map(primitive)
        })
    }
}

/// Heads `[b, t, h, d]` as `[b t, g, h/g, d]`.
fn by_group<B: Backend>(x: Tensor<B, 4>, groups: usize) -> Tensor<B, 4> {
    let [batch, time, heads, size] = x.dims();
    x.reshape([batch * time, groups, heads / groups, size])
}

/// The directions `u[b t, g, 1, d]` of the values, and the lengths `[b t, g, 1, 1]` that they were divided by.
fn directions<B: Backend>(v: Tensor<B, 4>) -> [Tensor<B, 4>; 2] {
    let [batch, time, groups, size] = v.dims();
    let v = v.reshape([batch * time, groups, 1, size]);
    let length = (v.clone() * v.clone()).sum_dim(3).sqrt().clamp_min(LEAST_LENGTH);
    [v * reciprocal(length.clone()), length]
}

/// The reference forward.
pub fn forward<B: Backend>(y: Tensor<B, 4>, v: Tensor<B, 4>) -> Tensor<B, 4> {
    let (dims, dtype) = (y.dims(), y.dtype());
    let wide = accumulate_type(dtype);
    let groups = v.dims()[2];
    let [u, _] = directions(v.cast(wide));
    let y = by_group(y.cast(wide), groups);
    let along = (y.clone() * u.clone()).sum_dim(3);
    (y - along * u).reshape(dims).cast(dtype)
}

/// The reference backward: `gy = gz - (gz.u) u`; with `gu = -sum over heads ((y.u) gz + (gz.u) y)`,
/// `gv = (gu - (gu.u) u) / |v|`.
pub fn backward<B: Backend>(y: Tensor<B, 4>, v: Tensor<B, 4>, grad: Tensor<B, 4>) -> [Tensor<B, 4>; 2] {
    let (dims, v_dims, dtype) = (y.dims(), v.dims(), y.dtype());
    let wide = accumulate_type(dtype);
    let groups = v_dims[2];
    let [u, length] = directions(v.cast(wide));
    let (y, grad) = (by_group(y.cast(wide), groups), by_group(grad.cast(wide), groups));
    let along_y = (y.clone() * u.clone()).sum_dim(3);
    let along_grad = (grad.clone() * u.clone()).sum_dim(3);
    let grad_y = grad.clone() - along_grad.clone() * u.clone();
    let grad_u = (grad * along_y + y * along_grad).sum_dim(2).neg();
    // A value shorter than the least length is divided by a constant.
    let turns = length.clone().greater_elem(LEAST_LENGTH).float().cast(wide);
    let along_u = (grad_u.clone() * u.clone()).sum_dim(3) * turns;
    let grad_v = (grad_u - along_u * u) * reciprocal(length);
    [grad_y.reshape(dims).cast(dtype), grad_v.reshape(v_dims).cast(dtype)]
}
