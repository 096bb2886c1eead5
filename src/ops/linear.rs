//! A linear layer without bias: `y[n, o] = x[n, i] w[o, i]^T`; and several layers of one input.

use super::tape::{primitive, record_many, tensor, unary};
use super::{Autodiff, Base, MatmulOps, Param, Plain};
use burn::tensor::Tensor;

/// Linear layer, forward and backward.
pub trait LinearOps: Base + MatmulOps {
    /// Whether several projections of one input are one product here, with one backward. Where not, each is on the tape
    /// by itself.
    const JOINS_PROJECTIONS: bool = false;

    /// `x[n, i]` to `y[n, o]` for the weight `w[o, i]`.
    fn project(x: Tensor<Self, 2>, w: &Param<Self::Plain>) -> Tensor<Self, 2> {
        if w.is_watched() {
            w.observe(Self::lower(x.clone()));
        }
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

    /// The projections of one input by several different weights.
    fn project_many<const N: usize>(
        x: Tensor<Self, 2>,
        weights: [&Param<Self::Plain>; N],
    ) -> [Tensor<Self, 2>; N] {
        weights.map(|w| Self::project(x.clone(), w))
    }

    /// The gradient of `x` from those of the projections that there are; the weights' are added to their buffers.
    fn project_many_backward<const N: usize>(
        x: Tensor<Self, 2>,
        weights: [&Param<Self::Plain>; N],
        grads: [Option<Tensor<Self, 2>>; N],
    ) -> Option<Tensor<Self, 2>> {
        backward_one_by_one(x, weights, grads)
    }
}

impl<B: Plain> LinearOps for Autodiff<B> {
    fn project(x: Tensor<Self, 2>, w: &Param<B>) -> Tensor<Self, 2> {
        let weight = w.clone();
        unary(x, |x| B::project(x, w), move |x, grad| B::project_backward(x, &weight, grad))
    }

    fn project_many<const N: usize>(x: Tensor<Self, 2>, weights: [&Param<B>; N]) -> [Tensor<Self, 2>; N] {
        if !B::JOINS_PROJECTIONS {
            return weights.map(|w| Self::project(x.clone(), w));
        }
        let x = primitive(x);
        let input: Tensor<B, 2> = tensor(x.primitive.clone());
        let outputs = B::project_many(input.clone(), weights).map(primitive);
        let weights = weights.map(Param::clone);
        let backward = move |grads: [Option<_>; N]| {
            let grads = grads.map(|grad| grad.map(tensor));
            [B::project_many_backward(input.clone(), weights.each_ref(), grads).map(primitive)]
        };
        record_many([x], outputs, backward).map(tensor)
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

/// The reference backward of several projections: one after the other, from the last to the first.
pub fn backward_one_by_one<B: LinearOps, const N: usize>(
    x: Tensor<B, 2>,
    weights: [&Param<B::Plain>; N],
    grads: [Option<Tensor<B, 2>>; N],
) -> Option<Tensor<B, 2>> {
    let mut sum: Option<Tensor<B, 2>> = None;
    for (weight, grad) in weights.into_iter().zip(grads).rev() {
        if let Some(grad) = grad {
            let part = B::project_backward(x.clone(), weight, grad);
            sum = Some(match sum {
                Some(sum) => part + sum,
                None => part,
            });
        }
    }
    sum
}
