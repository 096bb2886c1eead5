//! The residual stream: mixing with the input stream, and adding a branch with a scale per channel.
//!
//! `mix: y = m[0] x + m[1] x0` and `add: y = x + s[row] b`, rows `[n, c]`, parameters `m[2, c]`, `s[rows, c]` or `s[c]`;
//! `head_gain: y[b, t, h, d] = x[b, t, h, d] g[h]`. Sums for the parameters' gradients are f32 (f64 for f64).

use super::tape::{primitive, record, tensor, unary};
use super::{Autodiff, Base, Param, Plain, accumulate_type};
use burn::tensor::Tensor;

/// Residual mixing and scaling, forward and backward.
pub trait ResidualOps: Base {
    /// `m[0] x + m[1] x0` for the parameter `mix[2, c]`.
    fn residual_mix(x: Tensor<Self, 2>, x0: Tensor<Self, 2>, mix: &Param<Self::Plain>) -> Tensor<Self, 2> {
        let mix = Self::lift(mix.compute::<2>());
        x * mix.clone().narrow(0, 0, 1) + x0 * mix.narrow(0, 1, 1)
    }

    /// The gradients of `x` and `x0`; the parameter's is added to its buffer.
    fn residual_mix_backward(
        x: Tensor<Self, 2>,
        x0: Tensor<Self, 2>,
        mix: &Param<Self::Plain>,
        grad: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        if mix.is_trainable() {
            let rows = vec![sum_of_rows(x * grad.clone()), sum_of_rows(x0 * grad.clone())];
            mix.accumulate::<2>(Self::lower(Tensor::cat(rows, 0)));
        }
        let mix = Self::lift(mix.compute::<2>());
        [grad.clone() * mix.clone().narrow(0, 0, 1), grad * mix.narrow(0, 1, 1)]
    }

    /// `x + s[row] branch` for the parameter `scale[rows, c]` (or `[c]`, whose row is 0).
    fn scaled_add(
        x: Tensor<Self, 2>,
        branch: Tensor<Self, 2>,
        scale: &Param<Self::Plain>,
        row: usize,
    ) -> Tensor<Self, 2> {
        x + branch * Self::lift(scale.compute_rows().narrow(0, row, 1))
    }

    /// The gradient of `branch` (that of `x` is the output's own); the parameter's is added to its buffer.
    fn scaled_add_backward(
        branch: Tensor<Self, 2>,
        scale: &Param<Self::Plain>,
        row: usize,
        grad: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        if scale.is_trainable() {
            let sum = sum_of_rows(branch * grad.clone());
            scale.accumulate_rows(row..row + 1, Self::lower(sum));
        }
        grad * Self::lift(scale.compute_rows().narrow(0, row, 1))
    }

    /// Heads `x[b, t, h, d]` times the parameter `gain[h]`.
    fn head_gain(x: Tensor<Self, 4>, gain: &Param<Self::Plain>) -> Tensor<Self, 4> {
        let heads = x.dims()[2];
        x * Self::lift(gain.compute::<1>().reshape([1, 1, heads, 1]))
    }

    /// The gradient of `x`; the parameter's is added to its buffer.
    fn head_gain_backward(
        x: Tensor<Self, 4>,
        gain: &Param<Self::Plain>,
        grad: Tensor<Self, 4>,
    ) -> Tensor<Self, 4> {
        let [batch, time, heads, size] = x.dims();
        if gain.is_trainable() {
            let dtype = accumulate_type(x.dtype());
            let product = (x * grad.clone()).cast(dtype).reshape([batch * time, heads, size]);
            let sum = super::reduce::sum_rows(product.sum_dim(2).reshape([batch * time, heads]));
            gain.accumulate::<1>(Self::lower(sum.reshape([heads])));
        }
        grad * Self::lift(gain.compute::<1>().reshape([1, 1, heads, 1]))
    }
}

impl<B: Plain> ResidualOps for Autodiff<B> {
    fn residual_mix(x: Tensor<Self, 2>, x0: Tensor<Self, 2>, mix: &Param<B>) -> Tensor<Self, 2> {
        let (x, x0) = (primitive(x), primitive(x0));
        let plain = [tensor::<B, 2>(x.primitive.clone()), tensor(x0.primitive.clone())];
        let output = B::residual_mix(plain[0].clone(), plain[1].clone(), mix);
        let mix = mix.clone();
        record([x, x0], output, move |grad| {
            let [x, x0] = plain.clone();
            B::residual_mix_backward(x, x0, &mix, grad).map(primitive)
        })
    }

    fn scaled_add(
        x: Tensor<Self, 2>,
        branch: Tensor<Self, 2>,
        scale: &Param<B>,
        row: usize,
    ) -> Tensor<Self, 2> {
        let (x, branch) = (primitive(x), primitive(branch));
        let plain: Tensor<B, 2> = tensor(branch.primitive.clone());
        let output = B::scaled_add(tensor(x.primitive.clone()), plain.clone(), scale, row);
        let scale = scale.clone();
        record([x, branch], output, move |grad| {
            let branch = B::scaled_add_backward(plain.clone(), &scale, row, grad.clone());
            [primitive(grad), primitive(branch)]
        })
    }

    fn head_gain(x: Tensor<Self, 4>, gain: &Param<B>) -> Tensor<Self, 4> {
        let parameter = gain.clone();
        unary(x, |x| B::head_gain(x, gain), move |x, grad| B::head_gain_backward(x, &parameter, grad))
    }
}

/// The sum over rows `[n, c]` to `[1, c]`, accumulated in f32 (f64 for f64).
fn sum_of_rows<B: burn::tensor::backend::Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let dtype = accumulate_type(x.dtype());
    super::reduce::sum_rows(x.cast(dtype))
}
