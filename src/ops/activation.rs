//! Activations of the MLPs.

use super::tape::unary;
use super::{Autodiff, Plain};
use burn::tensor::Tensor;

/// Activations, forward and backward.
pub trait ActivationOps: burn::tensor::backend::Backend {
    /// `relu(x)^2`, elementwise.
    fn relu_squared(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        relu_squared_forward(x)
    }

    /// The gradient of `x`: `2 relu(x) gy`.
    fn relu_squared_backward(x: Tensor<Self, 2>, grad: Tensor<Self, 2>) -> Tensor<Self, 2> {
        relu_squared_backward(x, grad)
    }
}

impl<B: Plain> ActivationOps for Autodiff<B> {
    fn relu_squared(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        unary(x, B::relu_squared, B::relu_squared_backward)
    }
}

/// The reference forward.
pub fn relu_squared_forward<B: burn::tensor::backend::Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let positive = burn::tensor::activation::relu(x);
    positive.clone() * positive
}

/// The reference backward.
pub fn relu_squared_backward<B: burn::tensor::backend::Backend>(
    x: Tensor<B, 2>,
    grad: Tensor<B, 2>,
) -> Tensor<B, 2> {
    burn::tensor::activation::relu(x).mul_scalar(2.0) * grad
}
