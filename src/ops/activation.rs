//! Activations: of the MLPs, of gates, and of the state space layers' steps. Elementwise; those with an exponential in
//! f32 (f64 for f64).

use super::tape::{primitive, record, tensor, unary};
use super::{Autodiff, Plain, accumulate_type, magnitude, reciprocal};
use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Activations, forward and backward.
pub trait ActivationOps: Backend {
    /// `leaky_relu(x)^2` with this slope below zero; `relu(x)^2` at 0.
    fn leaky_relu_squared(x: Tensor<Self, 2>, slope: f64) -> Tensor<Self, 2> {
        leaky_relu_squared_forward(x, slope)
    }

    /// The gradient of `x`: `2 x gy` above zero, `2 slope^2 x gy` below.
    fn leaky_relu_squared_backward(x: Tensor<Self, 2>, slope: f64, grad: Tensor<Self, 2>) -> Tensor<Self, 2> {
        leaky_relu_squared_backward(x, slope, grad)
    }

    /// `x silu(gate)`: the gated pair of SwiGLU, and the gate of the state space layers.
    fn silu_gate<const D: usize>(x: Tensor<Self, D>, gate: Tensor<Self, D>) -> Tensor<Self, D> {
        silu_gate(x, gate)
    }

    /// The gradients of `x` and `gate`: `gy silu(gate)` and `gy x s (1 + gate (1 - s))`, `s = sigmoid(gate)`.
    fn silu_gate_backward<const D: usize>(
        x: Tensor<Self, D>,
        gate: Tensor<Self, D>,
        grad: Tensor<Self, D>,
    ) -> [Tensor<Self, D>; 2] {
        silu_gate_backward(x, gate, grad)
    }

    /// `x sigmoid(x)`.
    fn silu<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        silu(x)
    }

    /// The gradient of `x`.
    fn silu_backward<const D: usize>(x: Tensor<Self, D>, grad: Tensor<Self, D>) -> Tensor<Self, D> {
        silu_backward(x, grad)
    }

    /// The logistic sigmoid, `1 / (1 + exp(-x))`.
    fn logistic<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        sigmoid(x)
    }

    /// The gradient of `x` from the output `y`: `gy y (1 - y)`.
    fn logistic_backward<const D: usize>(y: Tensor<Self, D>, grad: Tensor<Self, D>) -> Tensor<Self, D> {
        logistic_backward(y, grad)
    }

    /// `log(1 + exp(x))`.
    fn softplus<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        softplus(x)
    }

    /// The gradient of `x`: `gy sigmoid(x)`.
    fn softplus_backward<const D: usize>(x: Tensor<Self, D>, grad: Tensor<Self, D>) -> Tensor<Self, D> {
        softplus_backward(x, grad)
    }
}

impl<B: Plain> ActivationOps for Autodiff<B> {
    fn leaky_relu_squared(x: Tensor<Self, 2>, slope: f64) -> Tensor<Self, 2> {
        unary(
            x,
            |x| B::leaky_relu_squared(x, slope),
            move |x, grad| B::leaky_relu_squared_backward(x, slope, grad),
        )
    }

    fn silu_gate<const D: usize>(x: Tensor<Self, D>, gate: Tensor<Self, D>) -> Tensor<Self, D> {
        let parents = [primitive(x), primitive(gate)];
        let inputs: [Tensor<B, D>; 2] = parents.each_ref().map(|p| tensor(p.primitive.clone()));
        let [x, gate] = inputs.clone();
        record(parents, B::silu_gate(x, gate), move |grad| {
            let [x, gate] = inputs.clone();
            B::silu_gate_backward(x, gate, grad).map(primitive)
        })
    }

    fn silu<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        unary(x, B::silu, B::silu_backward)
    }

    fn logistic<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        unary(x, B::logistic, |x, grad| B::logistic_backward(B::logistic(x), grad))
    }

    fn softplus<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        unary(x, B::softplus, B::softplus_backward)
    }
}

/// The reference forward.
pub fn leaky_relu_squared_forward<B: Backend>(x: Tensor<B, 2>, slope: f64) -> Tensor<B, 2> {
    let leaky = leaky_relu(x, slope);
    leaky.clone() * leaky
}

/// The reference backward.
pub fn leaky_relu_squared_backward<B: Backend>(
    x: Tensor<B, 2>,
    slope: f64,
    grad: Tensor<B, 2>,
) -> Tensor<B, 2> {
    leaky_relu(x, slope * slope).mul_scalar(2.0) * grad
}

fn leaky_relu<B: Backend>(x: Tensor<B, 2>, slope: f64) -> Tensor<B, 2> {
    let positive = burn::tensor::activation::relu(x.clone());
    if slope == 0.0 {
        return positive;
    }
    positive + x.clamp_max(0.0).mul_scalar(slope)
}

/// `1 / (1 + exp(-x))`, from the half of exp that cannot overflow.
pub fn sigmoid<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = x.cast(accumulate_type(dtype));
    // exp(min(x, 0)) / (1 + exp(-|x|)): no exponential of a positive number.
    let top = x.clone().clamp_max(0.0).exp();
    (top * reciprocal(magnitude(x).neg().exp().add_scalar(1.0))).cast(dtype)
}

/// `x sigmoid(x)`.
pub fn silu<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = x.cast(accumulate_type(dtype));
    (x.clone() * sigmoid(x)).cast(dtype)
}

/// `x silu(gate)`.
pub fn silu_gate<B: Backend, const D: usize>(x: Tensor<B, D>, gate: Tensor<B, D>) -> Tensor<B, D> {
    x * silu(gate)
}

/// The gradients of `x` and `gate`.
pub fn silu_gate_backward<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    gate: Tensor<B, D>,
    grad: Tensor<B, D>,
) -> [Tensor<B, D>; 2] {
    [grad.clone() * silu(gate.clone()), silu_backward(gate, grad * x)]
}

/// The gradient of the logistic sigmoid's input from its output.
pub fn logistic_backward<B: Backend, const D: usize>(y: Tensor<B, D>, grad: Tensor<B, D>) -> Tensor<B, D> {
    grad * y.clone() * y.neg().add_scalar(1.0)
}

/// The gradient of softplus' input.
pub fn softplus_backward<B: Backend, const D: usize>(x: Tensor<B, D>, grad: Tensor<B, D>) -> Tensor<B, D> {
    grad * sigmoid(x)
}

/// The gradient of silu's input.
pub fn silu_backward<B: Backend, const D: usize>(x: Tensor<B, D>, grad: Tensor<B, D>) -> Tensor<B, D> {
    let dtype = x.dtype();
    let wide = accumulate_type(dtype);
    let x = x.cast(wide);
    let s = sigmoid(x.clone());
    (grad.cast(wide) * s.clone() * (x * s.neg().add_scalar(1.0)).add_scalar(1.0)).cast(dtype)
}

/// `log(1 + exp(x))` as `max(x, 0) + log1p(exp(-|x|))`.
pub fn softplus<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = x.cast(accumulate_type(dtype));
    (burn::tensor::activation::relu(x.clone()) + magnitude(x).neg().exp().log1p()).cast(dtype)
}
