//! The squared MLP: `y = w2 leaky_relu(w1 x)^2`, rows `x[n, i]`, weights `w1[h, i]` and `w2[o, h]`.

use super::tape::{primitive, record, tensor};
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

/// The squared MLP, forward and backward.
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
}

impl<B: Plain> MlpOps for Autodiff<B> {
    fn squared_mlp(x: Tensor<Self, 2>, inner: &Param<B>, last: &Param<B>, slope: f64) -> Tensor<Self, 2> {
        let x = primitive(x);
        let input: Tensor<B, 2> = tensor(x.primitive.clone());
        let (y, hidden) = B::squared_mlp_forward(input.clone(), inner, last, slope);
        let (inner, last) = (inner.clone(), last.clone());
        record([x], y, move |grad| {
            let (x, hidden) = (input.clone(), hidden.clone());
            [primitive(B::squared_mlp_backward(x, hidden, &inner, &last, slope, grad))]
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
