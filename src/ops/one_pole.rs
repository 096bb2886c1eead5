//! A one-pole filter per channel: what the state-space layer of PR #1994 comes to (spec/pr1994.md section 2).
//!
//! `u[b, t, h, p]`, `log_decay[h]`, `state[b, h, p]`; with `a = exp(log_decay)` and `s_{-1} = state`
//!
//! `s_t = a_h s_{t-1} + u_t`, output `s[b, t, h, p]`.
//!
//! The reference multiplies chunks of `Q` positions by the matrix of powers `a^(i-j)`, all chunks of a head at once, and
//! carries the state from chunk to chunk. The backward is the same filter in reverse. Powers, sums and states are of
//! `log_decay`'s type, at least f32.

use super::sequence::{lower_triangle, pack, pad_time, parts, rows, sum_to_last, unpack};
use super::tape::{primitive, record, tensor};
use super::{Autodiff, MatmulOps, Plain, accumulate_type};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor};
use std::ops::Range;

/// The inputs of a one-pole filter, or their gradients.
#[derive(Clone, Debug)]
pub struct OnePole<B: Backend> {
    /// Inputs `[b, t, h, p]`.
    pub u: Tensor<B, 4>,
    /// Logarithm of each head's decay `[h]`: at most 0, finite.
    pub log_decay: Tensor<B, 1>,
    /// The state before the first position, `[b, h, p]`.
    pub state: Tensor<B, 3>,
}

impl<B: OnePoleOps> OnePole<B> {
    /// Filters: `s[b, t, h, p]` and, if asked for, the final state `[b, h, p]`.
    pub fn run(self, chunk: usize, final_state: bool) -> (Tensor<B, 4>, Option<Tensor<B, 3>>) {
        let (shape, dtype) = (self.u.dims(), self.u.dtype());
        split(B::one_pole(self, chunk, final_state), shape, dtype)
    }
}

/// The one-pole filter, forward and backward.
pub trait OnePoleOps: MatmulOps {
    /// Elements of `u` that the reference takes at once.
    const ONE_POLE_ELEMENTS: usize = 1 << 24;

    /// `s[b, t, h, p]` and, if asked for, the final state `[b, h, p]` after it, as one row ([`split`] parts them): in
    /// `u`'s type without the state, in the state's with it. `chunk` changes no more than rounding.
    fn one_pole(inputs: OnePole<Self>, chunk: usize, final_state: bool) -> Tensor<Self, 1> {
        forward(inputs, chunk, final_state)
    }

    /// The gradients of all inputs from that of the output.
    fn one_pole_backward(
        inputs: OnePole<Self>,
        chunk: usize,
        final_state: bool,
        grad: Tensor<Self, 1>,
    ) -> OnePole<Self> {
        backward(inputs, chunk, final_state, grad)
    }
}

impl<B: Plain> OnePoleOps for Autodiff<B> {
    fn one_pole(inputs: OnePole<Self>, chunk: usize, final_state: bool) -> Tensor<Self, 1> {
        let parents = [primitive(inputs.u), primitive(inputs.log_decay), primitive(inputs.state)];
        let [u, log_decay, state] = parents.each_ref().map(|p| p.primitive.clone());
        let inputs = OnePole::<B> { u: tensor(u), log_decay: tensor(log_decay), state: tensor(state) };
        let output = B::one_pole(inputs.clone(), chunk, final_state);
        record(parents, output, move |grad| {
            let grads = B::one_pole_backward(inputs.clone(), chunk, final_state, grad);
            [primitive(grads.u), primitive(grads.log_decay), primitive(grads.state)]
        })
    }
}

/// Parts a filter's output into `s`, of shape `[b, t, h, p]`, as `dtype`, and the final state `[b, h, p]` if it is
/// there.
pub fn split<B: Backend>(
    flat: Tensor<B, 1>,
    s: [usize; 4],
    dtype: DType,
) -> (Tensor<B, 4>, Option<Tensor<B, 3>>) {
    let [batch, _, heads, size] = s;
    unpack(flat, s, [batch, heads, size], dtype)
}

/// Sizes of one call, how the reference cuts it, and the powers of every head's decay.
struct Cut<B: Backend> {
    batch: usize,
    time: usize,
    heads: usize,
    size: usize,
    /// Positions of a chunk.
    length: usize,
    chunks: usize,
    batch_part: usize,
    dtype: DType,
    /// `a^(i-j)` for `i >= j`, else zero: `[h, Q, Q]`.
    within: Tensor<B, 3>,
    /// `a^(i+1)` for `i` in `0..Q`: `[h, Q]`.
    powers: Tensor<B, 2>,
}

impl<B: OnePoleOps> Cut<B> {
    fn new(inputs: &OnePole<B>, chunk: usize) -> Self {
        let [batch, time, heads, size] = inputs.u.dims();
        let length = chunk.clamp(1, time);
        let chunks = time.div_ceil(length);
        let dtype = accumulate_type(inputs.log_decay.dtype());
        let device = inputs.u.device();
        let log_decay = inputs.log_decay.clone().cast(dtype);

        let index = Tensor::<B, 1, Int>::arange(0..length as i64, &device);
        let row = index.clone().reshape([length, 1]).expand([length, length]);
        let column = index.clone().reshape([1, length]).expand([length, length]);
        let distance = (row - column).clamp_min(0).float().cast(dtype).reshape([1, length, length]);
        let lower = lower_triangle::<B>(length, 0, &device, dtype).unsqueeze::<3>();
        let within = (log_decay.clone().reshape([heads, 1, 1]) * distance).exp() * lower;
        let count = index.add_scalar(1).float().cast(dtype).reshape([1, length]);
        let powers = (log_decay.reshape([heads, 1]) * count).exp();
        let batch_part = (B::ONE_POLE_ELEMENTS / (chunks * length * heads * size)).clamp(1, batch);
        Self { batch, time, heads, size, length, chunks, batch_part, dtype, within, powers }
    }

    /// Filters `x[n, t, h, p]`, a part of the batch, forwards from `first[n, h, p]` or backwards from zeros.
    fn filter(&self, x: Tensor<B, 4>, first: Option<Tensor<B, 3>>) -> Tensor<B, 4> {
        let (n, backwards) = (x.dims()[0], first.is_none());
        let (heads, length, chunks, size) = (self.heads, self.length, self.chunks, self.size);
        let x = pad_time(x, chunks * length).reshape([n, chunks, length, heads, size]);
        let x = x.permute([3, 2, 1, 0, 4]).reshape([heads, length, chunks * n * size]);
        let (matrix, edge) =
            if backwards { (self.within.clone().transpose(), 0) } else { (self.within.clone(), length - 1) };
        let own = B::matmul_as(matrix, x, self.dtype);

        // What enters each chunk: the filter's value at the position beside it.
        let added = own.clone().narrow(1, edge, 1).reshape([heads, chunks, n * size]);
        let whole = self.powers.clone().narrow(1, length - 1, 1).reshape([heads, 1, 1]);
        let mut value = match first {
            Some(first) => first.swap_dims(0, 1).reshape([heads, 1, n * size]),
            None => Tensor::zeros([heads, 1, n * size], (&own.device(), self.dtype)),
        };
        let mut entering = Vec::with_capacity(chunks);
        for step in 0..chunks {
            let chunk = if backwards { chunks - 1 - step } else { step };
            entering.push(value.clone());
            value = value * whole.clone() + added.clone().narrow(1, chunk, 1);
        }
        if backwards {
            entering.reverse();
        }
        let entering = Tensor::cat(entering, 1).reshape([heads, 1, chunks * n * size]);
        let powers = if backwards { self.powers.clone().flip([1]) } else { self.powers.clone() };
        let s = own + powers.reshape([heads, length, 1]) * entering;
        let s = s.reshape([heads, length, chunks, n, size]).permute([3, 2, 1, 0, 4]);
        s.reshape([n, chunks * length, heads, size]).narrow(1, 0, self.time)
    }

    /// The filtered inputs of a part of the batch, and the state before it.
    fn filtered(&self, inputs: &OnePole<B>, part: &Range<usize>) -> (Tensor<B, 4>, Tensor<B, 3>) {
        let state = rows(&inputs.state, part, self.dtype);
        (self.filter(rows(&inputs.u, part, self.dtype), Some(state.clone())), state)
    }
}

/// The reference forward.
pub fn forward<B: OnePoleOps>(inputs: OnePole<B>, chunk: usize, final_state: bool) -> Tensor<B, 1> {
    if inputs.u.dims()[1] == 1 {
        return sequential(inputs, final_state);
    }
    let cut = Cut::new(&inputs, chunk);
    let dtype = if final_state { cut.dtype } else { inputs.u.dtype() };
    let outputs = parts(cut.batch, cut.batch_part).map(|part| cut.filtered(&inputs, &part).0.cast(dtype));
    let s: Tensor<B, 4> = Tensor::cat(outputs.collect(), 0);
    let last = final_state.then(|| s.clone().narrow(1, cut.time - 1, 1).squeeze_dim::<3>(1));
    pack(s, last)
}

/// The reference backward: with `r_t = gs_t + a r_{t+1}` (the final state's gradient is one of `s` at its position),
/// `gu = r`, `gstate = a r_0`, `glog_decay = a sum_t r_t s_{t-1}`.
pub fn backward<B: OnePoleOps>(
    inputs: OnePole<B>,
    chunk: usize,
    final_state: bool,
    grad: Tensor<B, 1>,
) -> OnePole<B> {
    let cut = Cut::new(&inputs, chunk);
    let (time, heads, size) = (cut.time, cut.heads, cut.size);
    let (grad, grad_last) = split(grad, inputs.u.dims(), inputs.u.dtype());
    assert_eq!(grad_last.is_some(), final_state, "the gradient of a one-pole filter's output");
    let decay = cut.powers.clone().narrow(1, 0, 1).reshape([heads]);
    let (mut grad_u, mut grad_state) = (Vec::new(), Vec::new());
    let mut sum: Option<Tensor<B, 1>> = None;
    for part in parts(cut.batch, cut.batch_part) {
        let n = part.len();
        let mut grads = rows(&grad, &part, cut.dtype);
        if let Some(last) = &grad_last {
            let last = rows(last, &part, cut.dtype).unsqueeze_dim::<4>(1);
            let end = grads.clone().narrow(1, time - 1, 1) + last;
            grads = grads.slice_assign([0..n, time - 1..time, 0..heads, 0..size], end);
        }
        let r = cut.filter(grads, None);
        let (s, state) = cut.filtered(&inputs, &part);
        let before = Tensor::cat(vec![state.unsqueeze_dim::<4>(1), s], 1).narrow(1, 0, time);
        let by_head = (r.clone() * before).sum_dim(3).squeeze_dim::<3>(3);
        let by_head = sum_to_last(by_head);
        sum = Some(match sum {
            Some(sum) => sum + by_head,
            None => by_head,
        });
        let first = r.clone().narrow(1, 0, 1).squeeze_dim::<3>(1);
        grad_state.push((first * decay.clone().reshape([1, heads, 1])).cast(inputs.state.dtype()));
        grad_u.push(r.cast(inputs.u.dtype()));
    }
    OnePole {
        u: Tensor::cat(grad_u, 0),
        log_decay: (sum.expect("a batch") * decay).cast(inputs.log_decay.dtype()),
        state: Tensor::cat(grad_state, 0),
    }
}

/// The plain recurrence, one position after the other: the reference of one-token steps and of tests.
pub fn sequential<B: Backend>(inputs: OnePole<B>, final_state: bool) -> Tensor<B, 1> {
    let [batch, time, heads, size] = inputs.u.dims();
    let wide = accumulate_type(inputs.log_decay.dtype());
    let dtype = if final_state { wide } else { inputs.u.dtype() };
    let decay = inputs.log_decay.cast(wide).exp().reshape([1, 1, heads, 1]);
    let mut state = inputs.state.cast(wide).reshape([batch, 1, heads, size]);
    let mut outputs = Vec::with_capacity(time);
    for t in 0..time {
        state = state * decay.clone() + inputs.u.clone().narrow(1, t, 1).cast(wide);
        outputs.push(state.clone().cast(dtype));
    }
    let last = final_state.then(|| state.reshape([batch, heads, size]));
    pack(Tensor::cat(outputs, 1), last)
}
