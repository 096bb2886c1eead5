//! The MLPs of rows `x[n, i]`: the squared one, `y = w2 leaky_relu(w1 x)^2` with weights `w1[h, i]` and `w2[o, h]`, and
//! the gated one (SwiGLU), `y = w_last (silu(w_gate x) w_up x)` with `w_gate[h, i]`, `w_up[h, i]` and `w_last[o, h]`.

use super::tape::{primitive, record, rounds, tensor};
use super::{ActivationOps, Autodiff, LinearOps, Param, Plain};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// What the backward needs of the hidden rows, `[n, h]`.
#[derive(Debug, Clone)]
pub struct Hidden<B: Backend> {
    /// `w1 x`; none where the backward follows from `activated` alone.
    pub before: Option<Tensor<B, 2>>,
    /// `leaky_relu(w1 x)^2`.
    pub activated: Tensor<B, 2>,
}

/// What the backward needs of the hidden rows of a gated MLP, `[n, h]`.
#[derive(Debug, Clone)]
pub struct GatedHidden<B: Backend> {
    /// `w_gate x`.
    pub gate: Tensor<B, 2>,
    /// `w_up x`.
    pub up: Tensor<B, 2>,
    /// `silu(w_gate x) w_up x`.
    pub activated: Tensor<B, 2>,
}

/// The squared and the gated MLP, forward and backward.
pub trait MlpOps: LinearOps + ActivationOps {
    /// `x[n, i]` to `y[n, o]`, for this slope below zero.
    fn squared_mlp(
        x: Tensor<Self, 2>,
        inner: &Param<Self::Plain>,
        last: &Param<Self::Plain>,
        slope: f64,
    ) -> Tensor<Self, 2> {
        Self::squared_mlp_forward(x, inner, last, slope).0
    }

    /// [`Self::squared_mlp`], and what its backward needs.
    fn squared_mlp_forward(
        x: Tensor<Self, 2>,
        inner: &Param<Self::Plain>,
        last: &Param<Self::Plain>,
        slope: f64,
    ) -> (Tensor<Self, 2>, Hidden<Self>) {
        forward(x, inner, last, slope)
    }

    /// The gradient of `x`; the weights' are added to their buffers.
    fn squared_mlp_backward(
        x: Tensor<Self, 2>,
        hidden: Hidden<Self>,
        inner: &Param<Self::Plain>,
        last: &Param<Self::Plain>,
        slope: f64,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        backward(x, hidden, inner, last, slope, grad)
    }

    /// `x[n, i]` to `y[n, o]`, for three different weights.
    fn gated_mlp(
        x: Tensor<Self, 2>,
        gate: &Param<Self::Plain>,
        up: &Param<Self::Plain>,
        last: &Param<Self::Plain>,
    ) -> Tensor<Self, 2> {
        Self::gated_mlp_forward(x, gate, up, last).0
    }

    /// [`Self::gated_mlp`], and what its backward needs.
    fn gated_mlp_forward(
        x: Tensor<Self, 2>,
        gate: &Param<Self::Plain>,
        up: &Param<Self::Plain>,
        last: &Param<Self::Plain>,
    ) -> (Tensor<Self, 2>, GatedHidden<Self>) {
        gated_forward(x, gate, up, last)
    }

    /// The gradient of `x`; the weights' are added to their buffers.
    fn gated_mlp_backward(
        x: Tensor<Self, 2>,
        hidden: GatedHidden<Self>,
        gate: &Param<Self::Plain>,
        up: &Param<Self::Plain>,
        last: &Param<Self::Plain>,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        gated_backward(x, hidden, gate, up, last, grad)
    }
}

impl<B: Plain> MlpOps for Autodiff<B> {
    fn squared_mlp(x: Tensor<Self, 2>, inner: &Param<B>, last: &Param<B>, slope: f64) -> Tensor<Self, 2> {
        if rounds() {
            return forward(x, inner, last, slope).0;
        }
        let x = primitive(x);
        let input: Tensor<B, 2> = tensor(x.primitive.clone());
        let (y, hidden) = B::squared_mlp_forward(input.clone(), inner, last, slope);
        let (inner, last) = (inner.clone(), last.clone());
        record([x], y, move |grad| {
            let (x, hidden) = (input.clone(), hidden.clone());
            [primitive(B::squared_mlp_backward(x, hidden, &inner, &last, slope, grad))]
        })
    }

    fn gated_mlp(x: Tensor<Self, 2>, gate: &Param<B>, up: &Param<B>, last: &Param<B>) -> Tensor<Self, 2> {
        if rounds() {
            return gated_forward(x, gate, up, last).0;
        }
        let x = primitive(x);
        let input: Tensor<B, 2> = tensor(x.primitive.clone());
        let (y, hidden) = B::gated_mlp_forward(input.clone(), gate, up, last);
        let (gate, up, last) = (gate.clone(), up.clone(), last.clone());
        record([x], y, move |grad| {
            let (x, hidden) = (input.clone(), hidden.clone());
            [primitive(B::gated_mlp_backward(x, hidden, &gate, &up, &last, grad))]
        })
    }
}

/// The reference forward.
pub fn forward<B: MlpOps>(
    x: Tensor<B, 2>,
    inner: &Param<B::Plain>,
    last: &Param<B::Plain>,
    slope: f64,
) -> (Tensor<B, 2>, Hidden<B>) {
    let before = B::project(x, inner);
    let activated = B::leaky_relu_squared(before.clone(), slope);
    (B::project(activated.clone(), last), Hidden { before: Some(before), activated })
}

/// The reference backward, of what the reference forward has left.
pub fn backward<B: MlpOps>(
    x: Tensor<B, 2>,
    hidden: Hidden<B>,
    inner: &Param<B::Plain>,
    last: &Param<B::Plain>,
    slope: f64,
    grad: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let grad = B::project_backward(hidden.activated, last, grad);
    let before = hidden.before.expect("the reference forward leaves it");
    B::project_backward(x, inner, B::leaky_relu_squared_backward(before, slope, grad))
}

/// The reference forward of the gated MLP.
pub fn gated_forward<B: MlpOps>(
    x: Tensor<B, 2>,
    gate: &Param<B::Plain>,
    up: &Param<B::Plain>,
    last: &Param<B::Plain>,
) -> (Tensor<B, 2>, GatedHidden<B>) {
    let [gate, up] = B::project_many(x, [gate, up]);
    let activated = B::silu_gate(up.clone(), gate.clone());
    (B::project(activated.clone(), last), GatedHidden { gate, up, activated })
}

/// The reference backward of the gated MLP, of what the reference forward has left.
pub fn gated_backward<B: MlpOps>(
    x: Tensor<B, 2>,
    hidden: GatedHidden<B>,
    gate: &Param<B::Plain>,
    up: &Param<B::Plain>,
    last: &Param<B::Plain>,
    grad: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let grad = B::project_backward(hidden.activated, last, grad);
    let [grad_up, grad_gate] = B::silu_gate_backward(hidden.up, hidden.gate, grad);
    B::project_many_backward(x, [gate, up], [Some(grad_gate), Some(grad_up)]).expect("gradients of both")
}
