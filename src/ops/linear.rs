//! A linear layer without bias: `y[n, o] = x[n, i] w[o, i]^T`; several layers of one input; and a layer whose output is
//! added to rows, `y = e + s w x` with a scale `s[o]` for each channel, or none.

use super::tape::{primitive, record, record_many, tensor, unary};
use super::{Autodiff, Base, MatmulOps, Param, Plain, ResidualOps};
use burn::tensor::Tensor;

/// Linear layer, forward and backward.
pub trait LinearOps: Base + MatmulOps + ResidualOps {
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

    /// `e + s[row] (w x)` for the rows `e[n, o]` and the parameter `s[rows, o]` (or `[o]`, whose row is 0); `e + w x`
    /// without one.
    fn project_added(
        x: Tensor<Self, 2>,
        w: &Param<Self::Plain>,
        e: Tensor<Self, 2>,
        scale: Option<(&Param<Self::Plain>, usize)>,
    ) -> Tensor<Self, 2> {
        Self::project_added_forward(x, w, e, scale).0
    }

    /// [`Self::project_added`], and `w x` where the backward needs it.
    fn project_added_forward(
        x: Tensor<Self, 2>,
        w: &Param<Self::Plain>,
        e: Tensor<Self, 2>,
        scale: Option<(&Param<Self::Plain>, usize)>,
    ) -> (Tensor<Self, 2>, Option<Tensor<Self, 2>>) {
        added_forward(x, w, e, scale)
    }

    /// The gradient of `x` (that of `e` is the output's own); the weight's and the scale's are added to their buffers.
    /// `product` is what the forward gave.
    fn project_added_backward(
        x: Tensor<Self, 2>,
        product: Option<Tensor<Self, 2>>,
        w: &Param<Self::Plain>,
        scale: Option<(&Param<Self::Plain>, usize)>,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        added_backward(x, product, w, scale, grad)
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

    fn project_added(
        x: Tensor<Self, 2>,
        w: &Param<B>,
        e: Tensor<Self, 2>,
        scale: Option<(&Param<B>, usize)>,
    ) -> Tensor<Self, 2> {
        let (x, e) = (primitive(x), primitive(e));
        let input: Tensor<B, 2> = tensor(x.primitive.clone());
        let (y, product) = B::project_added_forward(input.clone(), w, tensor(e.primitive.clone()), scale);
        let (w, scale) = (w.clone(), scale.map(|(scale, row)| (scale.clone(), row)));
        record([x, e], y, move |grad| {
            let scale = scale.as_ref().map(|(scale, row)| (scale, *row));
            let (x, product) = (input.clone(), product.clone());
            let grad_x = B::project_added_backward(x, product, &w, scale, grad.clone());
            [primitive(grad_x), primitive(grad)]
        })
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

/// The reference forward of a layer whose output is added.
pub fn added_forward<B: LinearOps>(
    x: Tensor<B, 2>,
    w: &Param<B::Plain>,
    e: Tensor<B, 2>,
    scale: Option<(&Param<B::Plain>, usize)>,
) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
    let product = B::project(x, w);
    match scale {
        Some((scale, row)) => (B::scaled_add(e, product.clone(), scale, row), Some(product)),
        None => (e + product, None),
    }
}

/// The reference backward of a layer whose output is added, of what the reference forward has left.
pub fn added_backward<B: LinearOps>(
    x: Tensor<B, 2>,
    product: Option<Tensor<B, 2>>,
    w: &Param<B::Plain>,
    scale: Option<(&Param<B::Plain>, usize)>,
    grad: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let grad = match scale {
        Some((scale, row)) => {
            let product = product.unwrap_or_else(|| B::project(x.clone(), w));
            B::scaled_add_backward(product, scale, row, grad)
        }
        None => grad,
    };
    B::project_backward(x, w, grad)
}
