//! Causal depthwise convolution along time, optionally followed by SiLU (spec/pr1994.md, spec/pr1382.md section 2).
//!
//! `x[b, t, c]`, `history[b, k-1, c]` (the inputs before the first position, zeros at a sequence's start), parameters
//! `w` of `c k` elements (`[c, k]`, or the peers' `[c, 1, k]`) and perhaps `bias[c]`:
//!
//! `z_t = bias + sum_j w[:, j] x_{t - (k-1) + j}`, `y = z` or `y = z sigmoid(z)`.
//!
//! Computed in f32 (f64 for f64) with the parameters' master values; the reference walks over parts of the batch.

use super::sequence::{parts, rows, sum_to_last};
use super::tape::{primitive, record, tensor};
use super::{Autodiff, Base, Param, Plain, accumulate_type, reciprocal};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use std::ops::Range;

/// Causal depthwise convolution, forward and backward.
pub trait ConvOps: Base {
    /// Elements of `x` that the reference takes at once.
    const CONV_ELEMENTS: usize = 1 << 24;

    /// `x[b, t, c]` after `history[b, k-1, c]` to `y[b, t, c]`; `k` is at least 2.
    fn causal_conv(
        x: Tensor<Self, 3>,
        history: Tensor<Self, 3>,
        weight: &Param<Self::Plain>,
        bias: Option<&Param<Self::Plain>>,
        silu: bool,
    ) -> Tensor<Self, 3> {
        forward(x, history, &Filter::new(weight, bias), silu)
    }

    /// The gradients of `x` and `history`; the parameters' are added to their buffers.
    fn causal_conv_backward(
        x: Tensor<Self, 3>,
        history: Tensor<Self, 3>,
        weight: &Param<Self::Plain>,
        bias: Option<&Param<Self::Plain>>,
        silu: bool,
        grad: Tensor<Self, 3>,
    ) -> [Tensor<Self, 3>; 2] {
        let grads = backward(x, history, &Filter::new(weight, bias), silu, grad);
        if weight.is_trainable() {
            weight.accumulate_flat(Self::lower(grads.weight));
        }
        if let Some(bias) = bias.filter(|bias| bias.is_trainable()) {
            bias.accumulate_flat(Self::lower(grads.bias));
        }
        [grads.x, grads.history]
    }
}

impl<B: Plain> ConvOps for Autodiff<B> {
    fn causal_conv(
        x: Tensor<Self, 3>,
        history: Tensor<Self, 3>,
        weight: &Param<B>,
        bias: Option<&Param<B>>,
        silu: bool,
    ) -> Tensor<Self, 3> {
        let parents = [primitive(x), primitive(history)];
        let inputs: [Tensor<B, 3>; 2] = parents.each_ref().map(|p| tensor(p.primitive.clone()));
        let [x, history] = inputs.clone();
        let output = B::causal_conv(x, history, weight, bias, silu);
        let (weight, bias) = (weight.clone(), bias.cloned());
        record(parents, output, move |grad| {
            let [x, history] = inputs.clone();
            B::causal_conv_backward(x, history, &weight, bias.as_ref(), silu, grad).map(primitive)
        })
    }
}

/// The history for the inputs after `x`: the last `k-1` of those before it and its own.
pub fn next_history<B: Backend>(x: Tensor<B, 3>, history: Tensor<B, 3>) -> Tensor<B, 3> {
    let (time, kept) = (x.dims()[1], history.dims()[1]);
    if time >= kept {
        return x.narrow(1, time - kept, kept);
    }
    Tensor::cat(vec![history.narrow(1, time, kept - time), x], 1)
}

/// The parameters' values.
pub struct Filter<B: Backend> {
    /// The taps `[c, k]`, the last on the position itself.
    pub weight: Tensor<B, 2>,
    /// The bias `[c]`.
    pub bias: Option<Tensor<B, 1>>,
}

impl<B: Base> Filter<B> {
    /// The master values of `weight`, of `c k` elements in that order, and of `bias[c]`.
    pub fn new(weight: &Param<B::Plain>, bias: Option<&Param<B::Plain>>) -> Self {
        let (channels, count) = (weight.shape()[0], weight.numel());
        let weight = B::lift(weight.flat().reshape([channels, count / channels]));
        Self { weight, bias: bias.map(|bias| B::lift(bias.flat())) }
    }
}

/// Tap `j` of `[c, k]` as `[1, 1, c]`.
fn tap<B: Backend>(weight: &Tensor<B, 2>, j: usize) -> Tensor<B, 3> {
    let channels = weight.dims()[0];
    weight.clone().narrow(1, j, 1).reshape([1, 1, channels])
}

/// Sizes of one call, and how the reference cuts it.
struct Cut {
    batch: usize,
    time: usize,
    channels: usize,
    width: usize,
    batch_part: usize,
    dtype: DType,
}

impl Cut {
    fn new<B: Backend>(
        x: &Tensor<B, 3>,
        history: &Tensor<B, 3>,
        weight: &Tensor<B, 2>,
        limit: usize,
    ) -> Self {
        let [batch, time, channels] = x.dims();
        let width = weight.dims()[1];
        assert!(width >= 2, "a convolution of width {width}");
        assert_eq!(weight.dims()[0], channels, "channels of a convolution's weight");
        assert_eq!(history.dims(), [batch, width - 1, channels], "history of a convolution of width {width}");
        let batch_part = (limit / (time * channels)).clamp(1, batch);
        Self { batch, time, channels, width, batch_part, dtype: accumulate_type(x.dtype()) }
    }

    /// History and inputs of a part of the batch, `[n, k-1 + t, c]`.
    fn inputs<B: Backend>(
        &self,
        x: &Tensor<B, 3>,
        history: &Tensor<B, 3>,
        part: &Range<usize>,
    ) -> Tensor<B, 3> {
        Tensor::cat(vec![rows(history, part, self.dtype), rows(x, part, self.dtype)], 1)
    }

    /// The convolution of `inputs[n, k-1 + t, c]`, before SiLU.
    fn convolve<B: Backend>(&self, inputs: &Tensor<B, 3>, filter: &Filter<B>) -> Tensor<B, 3> {
        let weight = filter.weight.clone().cast(self.dtype);
        let term = |j| inputs.clone().narrow(1, j, self.time) * tap(&weight, j);
        let sum = (1..self.width).fold(term(0), |sum, j| sum + term(j));
        match &filter.bias {
            Some(bias) => sum + bias.clone().cast(self.dtype).reshape([1, 1, self.channels]),
            None => sum,
        }
    }
}

/// `1 / (1 + exp(-z))`.
fn sigmoid<B: Backend>(z: Tensor<B, 3>) -> Tensor<B, 3> {
    reciprocal(z.neg().exp().add_scalar(1.0))
}

/// The reference forward.
pub fn forward<B: ConvOps>(
    x: Tensor<B, 3>,
    history: Tensor<B, 3>,
    filter: &Filter<B>,
    silu: bool,
) -> Tensor<B, 3> {
    let cut = Cut::new(&x, &history, &filter.weight, B::CONV_ELEMENTS);
    let outputs = parts(cut.batch, cut.batch_part).map(|part| {
        let z = cut.convolve(&cut.inputs(&x, &history, &part), filter);
        let y = if silu { z.clone() * sigmoid(z) } else { z };
        y.cast(x.dtype())
    });
    Tensor::cat(outputs.collect(), 0)
}

/// The gradients of a convolution's inputs and parameters.
pub struct Grads<B: Backend> {
    /// Of the inputs `[b, t, c]`.
    pub x: Tensor<B, 3>,
    /// Of the inputs before them, `[b, k-1, c]`.
    pub history: Tensor<B, 3>,
    /// Of the taps, `c k` elements.
    pub weight: Tensor<B, 1>,
    /// Of the bias `[c]`.
    pub bias: Tensor<B, 1>,
}

/// The reference backward: with `sigma = sigmoid(z)`, `gz = gy sigma (1 + z (1 - sigma))` after SiLU, else `gz = gy`;
/// `gx_s = sum_j w[:, j] gz_{s + (k-1) - j}`, `gw[:, j] = sum_t gz_t x_{t - (k-1) + j}`, `gbias = sum_t gz_t`.
pub fn backward<B: ConvOps>(
    x: Tensor<B, 3>,
    history: Tensor<B, 3>,
    filter: &Filter<B>,
    silu: bool,
    grad: Tensor<B, 3>,
) -> Grads<B> {
    let cut = Cut::new(&x, &history, &filter.weight, B::CONV_ELEMENTS);
    let (time, width) = (cut.time, cut.width);
    let (mut grad_x, mut grad_history) = (Vec::new(), Vec::new());
    let mut sums: Option<Vec<Tensor<B, 1>>> = None;
    for part in parts(cut.batch, cut.batch_part) {
        let inputs = cut.inputs(&x, &history, &part);
        let mut grad_z = rows(&grad, &part, cut.dtype);
        if silu {
            let z = cut.convolve(&inputs, filter);
            let sigma = sigmoid(z.clone());
            let slope = sigma.clone() * (z * sigma.neg().add_scalar(1.0)).add_scalar(1.0);
            grad_z = grad_z * slope;
        }
        // One sum a tap, and the bias's.
        let of_taps = (0..width).map(|j| sum_to_last(inputs.clone().narrow(1, j, time) * grad_z.clone()));
        let own: Vec<_> = of_taps.chain([sum_to_last(grad_z.clone())]).collect();
        sums = Some(match sums {
            Some(sums) => sums.into_iter().zip(own).map(|(sum, own)| sum + own).collect(),
            None => own,
        });

        let weight = filter.weight.clone().cast(cut.dtype);
        let zeros = Tensor::zeros([part.len(), width - 1, cut.channels], (&grad_z.device(), cut.dtype));
        let padded = Tensor::cat(vec![zeros.clone(), grad_z, zeros], 1);
        let term = |j| padded.clone().narrow(1, width - 1 - j, time + width - 1) * tap(&weight, j);
        let grads = (1..width).fold(term(0), |sum, j| sum + term(j));
        grad_history.push(grads.clone().narrow(1, 0, width - 1).cast(history.dtype()));
        grad_x.push(grads.narrow(1, width - 1, time).cast(x.dtype()));
    }
    let mut sums = sums.expect("a batch");
    let bias = sums.pop().expect("the bias's sum");
    let weight = Tensor::stack::<2>(sums, 1).reshape([cut.channels * width]);
    Grads { x: Tensor::cat(grad_x, 0), history: Tensor::cat(grad_history, 0), weight, bias }
}
