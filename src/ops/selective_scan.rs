//! The selective scan of Mamba-1 (S6, arXiv 2312.00752; spec/pr1382.md section 2).
//!
//! `u, delta[b, t, c]`, `a[c, n]`, `b, c[b, t, n]`, `state[b, c, n]`; with `h_{-1} = state`
//!
//! `h_t[c, n] = exp(delta_t[c] a[c, n]) h_{t-1}[c, n] + delta_t[c] u_t[c] b_t[n]`, `y_t[c] = sum_n c_t[n] h_t[c, n]`.
//!
//! `delta` is positive (after its softplus) and `a` negative; neither is needed. The reference cuts time into about
//! `sqrt(t)` chunks and steps through the positions of all chunks at once: first from zero states, for what each chunk
//! adds to the state it is given; then, with the states carried from chunk to chunk, from the true ones. The backward
//! does the same in reverse over states that it computes again. It walks over parts of the batch and of the channels.
//! Dynamics, sums and states are of `delta`'s type, at least f32.

use super::sequence::{pack, pad_time, parts, rows, unpack};
use super::tape::{primitive, record, tensor};
use super::{Autodiff, MatmulOps, Plain, accumulate_type};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use std::ops::Range;

/// The inputs of a selective scan, or their gradients.
#[derive(Clone, Debug)]
pub struct SelectiveScan<B: Backend> {
    /// Inputs `[b, t, c]`.
    pub u: Tensor<B, 3>,
    /// Step sizes `[b, t, c]`.
    pub delta: Tensor<B, 3>,
    /// Decay rates `[c, n]`.
    pub a: Tensor<B, 2>,
    /// What the inputs add to the state, `[b, t, n]`.
    pub b: Tensor<B, 3>,
    /// What the outputs read from the state, `[b, t, n]`.
    pub c: Tensor<B, 3>,
    /// The state before the first position, `[b, c, n]`.
    pub state: Tensor<B, 3>,
}

impl<B: SelectiveScanOps> SelectiveScan<B> {
    /// Scans: `y[b, t, c]` and, if asked for, the final state `[b, c, n]`.
    pub fn run(self, final_state: bool) -> (Tensor<B, 3>, Option<Tensor<B, 3>>) {
        let (shape, size, dtype) = (self.u.dims(), self.a.dims()[1], self.u.dtype());
        split(B::selective_scan(self, final_state), shape, size, dtype)
    }
}

/// The selective scan, forward and backward.
pub trait SelectiveScanOps: MatmulOps {
    /// States, and as many decays, that the reference holds at once.
    const SELECTIVE_SCAN_ELEMENTS: usize = 1 << 24;

    /// `y[b, t, c]` and, if asked for, the final state `[b, c, n]` after it, as one row ([`split`] parts them): in
    /// `u`'s type without the state, in the type of the dynamics with it.
    fn selective_scan(inputs: SelectiveScan<Self>, final_state: bool) -> Tensor<Self, 1> {
        let chunk = chunk_length(inputs.u.dims()[1]);
        forward(inputs, chunk, final_state)
    }

    /// The gradients of all inputs from that of the output.
    fn selective_scan_backward(
        inputs: SelectiveScan<Self>,
        final_state: bool,
        grad: Tensor<Self, 1>,
    ) -> SelectiveScan<Self> {
        let chunk = chunk_length(inputs.u.dims()[1]);
        backward(inputs, chunk, final_state, grad)
    }
}

impl<B: Plain> SelectiveScanOps for Autodiff<B> {
    fn selective_scan(inputs: SelectiveScan<Self>, final_state: bool) -> Tensor<Self, 1> {
        let SelectiveScan { u, delta, a, b, c, state } = inputs;
        let parents =
            [primitive(u), primitive(delta), primitive(a), primitive(b), primitive(c), primitive(state)];
        let [u, delta, a, b, c, state] = parents.each_ref().map(|p| p.primitive.clone());
        let inputs = SelectiveScan::<B> {
            u: tensor(u),
            delta: tensor(delta),
            a: tensor(a),
            b: tensor(b),
            c: tensor(c),
            state: tensor(state),
        };
        let output = B::selective_scan(inputs.clone(), final_state);
        record(parents, output, move |grad| {
            let grads = B::selective_scan_backward(inputs.clone(), final_state, grad);
            [
                primitive(grads.u),
                primitive(grads.delta),
                primitive(grads.a),
                primitive(grads.b),
                primitive(grads.c),
                primitive(grads.state),
            ]
        })
    }
}

/// Parts a scan's output into `y`, of shape `[b, t, c]`, as `dtype`, and the final state `[b, c, state_size]` if it is
/// there.
pub fn split<B: Backend>(
    flat: Tensor<B, 1>,
    y: [usize; 3],
    state_size: usize,
    dtype: DType,
) -> (Tensor<B, 3>, Option<Tensor<B, 3>>) {
    let [batch, _, channels] = y;
    unpack(flat, y, [batch, channels, state_size], dtype)
}

/// Positions of a chunk where the time is cut into about as many chunks: the fewest steps in all.
fn chunk_length(time: usize) -> usize {
    (1..time).find(|length| length * length >= time).unwrap_or(1)
}

/// Sizes of one call, and how the reference cuts it.
struct Cut {
    batch: usize,
    time: usize,
    channels: usize,
    state_size: usize,
    /// Positions of a chunk.
    length: usize,
    chunks: usize,
    batch_part: usize,
    channel_part: usize,
    dtype: DType,
}

impl Cut {
    fn new<B: SelectiveScanOps>(inputs: &SelectiveScan<B>, chunk: usize) -> Self {
        let [batch, time, channels] = inputs.u.dims();
        let state_size = inputs.a.dims()[1];
        let length = chunk.clamp(1, time);
        let chunks = time.div_ceil(length);
        let of_channel = chunks * length * state_size;
        let channel_part = (B::SELECTIVE_SCAN_ELEMENTS / of_channel).clamp(1, channels);
        let batch_part = (B::SELECTIVE_SCAN_ELEMENTS / (of_channel * channel_part)).clamp(1, batch);
        let dtype = accumulate_type(inputs.delta.dtype());
        Self { batch, time, channels, state_size, length, chunks, batch_part, channel_part, dtype }
    }

    /// `x[b, t, size]` of a part of the batch as positions of all its chunks, `[Q, m, size]`. Positions after the last
    /// have zeros: no decay, no input, no output.
    fn cut<B: Backend>(&self, x: &Tensor<B, 3>, part: &Range<usize>) -> Tensor<B, 3> {
        let size = x.dims()[2];
        let x = pad_time(rows(x, part, self.dtype), self.chunks * self.length);
        x.reshape([part.len() * self.chunks, self.length, size]).swap_dims(0, 1)
    }

    /// The inverse of [`Self::cut`] for the positions one by one, each of `[m, size]`.
    fn join<B: Backend>(&self, positions: Vec<Tensor<B, 2>>, dtype: DType) -> Tensor<B, 3> {
        let [m, size] = positions[0].dims();
        let x: Tensor<B, 3> = Tensor::stack(positions, 1);
        let x = x.reshape([m / self.chunks, self.chunks * self.length, size]);
        x.narrow(1, 0, self.time).cast(dtype)
    }
}

/// A part of the batch and of the channels, as the positions of all its chunks.
struct Steps<B: Backend> {
    /// `[Q, m, c]`.
    u: Tensor<B, 3>,
    /// `[Q, m, c]`.
    delta: Tensor<B, 3>,
    /// `[1, c, n]`.
    a: Tensor<B, 3>,
    /// `[Q, m, n]`.
    b: Tensor<B, 3>,
    /// `[Q, m, n]`.
    c: Tensor<B, 3>,
    /// The decays at every position of all chunks, `[m, c, n]`: their exponentials are most of the work.
    decays: Vec<Tensor<B, 3>>,
    /// The decays of whole chunks, `[m, c, n]`.
    whole: Tensor<B, 3>,
    /// The states before all chunks, `[m, c, n]`, and after the last, `[part, c, n]`.
    before: Tensor<B, 3>,
    last: Tensor<B, 3>,
    chunks: usize,
}

/// Position `q` of `x[Q, m, size]` as a column per chunk `[m, size, 1]`.
fn column<B: Backend>(x: &Tensor<B, 3>, q: usize) -> Tensor<B, 3> {
    let [_, m, size] = x.dims();
    x.clone().narrow(0, q, 1).reshape([m, size, 1])
}

/// Position `q` of `x[Q, m, size]` as a row per chunk `[m, 1, size]`.
fn row<B: Backend>(x: &Tensor<B, 3>, q: usize) -> Tensor<B, 3> {
    let [_, m, size] = x.dims();
    x.clone().narrow(0, q, 1).reshape([m, 1, size])
}

impl<B: SelectiveScanOps> Steps<B> {
    fn new(cut: &Cut, inputs: &SelectiveScan<B>, part: &Range<usize>, channels: &Range<usize>) -> Self {
        let own = |x: &Tensor<B, 3>| x.clone().narrow(2, channels.start, channels.len());
        let delta = cut.cut(&own(&inputs.delta), part);
        let a = rows(&inputs.a, channels, cut.dtype).unsqueeze::<3>();
        let m = part.len() * cut.chunks;
        let total = delta.clone().sum_dim(0).reshape([m, channels.len(), 1]);
        let state = rows(&inputs.state, part, cut.dtype).narrow(1, channels.start, channels.len());
        let mut steps = Self {
            u: cut.cut(&own(&inputs.u), part),
            b: cut.cut(&inputs.b, part),
            c: cut.cut(&inputs.c, part),
            decays: (0..cut.length).map(|q| (column(&delta, q) * a.clone()).exp()).collect(),
            whole: (total * a.clone()).exp(),
            before: Tensor::zeros([m, channels.len(), cut.state_size], (&delta.device(), cut.dtype)),
            last: state.clone(),
            delta,
            a,
            chunks: cut.chunks,
        };
        let mut added = steps.before.clone();
        for q in 0..cut.length {
            added = steps.step(added, q);
        }
        (steps.before, steps.last) = carry(added, &steps.whole, state, cut.chunks, false);
        steps
    }

    /// The states `[m, c, n]` after position `q` from those before.
    fn step(&self, state: Tensor<B, 3>, q: usize) -> Tensor<B, 3> {
        state * self.decays[q].clone() + column(&self.delta, q) * column(&self.u, q) * row(&self.b, q)
    }
}

/// The recurrence between chunks, forwards or backwards in time: `x <- whole_c x + added_c` from `x = first`, over
/// `added[m, c, n]`. Gives `x` before each chunk's step, in the chunks' order, and after the last.
fn carry<B: Backend>(
    added: Tensor<B, 3>,
    whole: &Tensor<B, 3>,
    first: Tensor<B, 3>,
    chunks: usize,
    backwards: bool,
) -> (Tensor<B, 3>, Tensor<B, 3>) {
    let [m, channels, size] = added.dims();
    let shape = [m / chunks, chunks, channels, size];
    let (added, whole) = (added.reshape(shape), whole.clone().reshape(shape));
    let mut x = first.reshape([m / chunks, 1, channels, size]);
    let mut before = Vec::with_capacity(chunks);
    for step in 0..chunks {
        let chunk = if backwards { chunks - 1 - step } else { step };
        before.push(x.clone());
        x = x * whole.clone().narrow(1, chunk, 1) + added.clone().narrow(1, chunk, 1);
    }
    if backwards {
        before.reverse();
    }
    (Tensor::cat(before, 1).reshape([m, channels, size]), x.reshape([m / chunks, channels, size]))
}

/// The reference forward, in chunks of `chunk` positions.
pub fn forward<B: SelectiveScanOps>(
    inputs: SelectiveScan<B>,
    chunk: usize,
    final_state: bool,
) -> Tensor<B, 1> {
    if inputs.u.dims()[1] == 1 {
        return sequential(inputs, final_state);
    }
    let cut = Cut::new(&inputs, chunk);
    let dtype = if final_state { cut.dtype } else { inputs.u.dtype() };
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for part in parts(cut.batch, cut.batch_part) {
        let (mut own_outputs, mut own_states) = (Vec::new(), Vec::new());
        for channels in parts(cut.channels, cut.channel_part) {
            let steps = Steps::new(&cut, &inputs, &part, &channels);
            let mut state = steps.before.clone();
            let mut positions = Vec::with_capacity(cut.length);
            for q in 0..cut.length {
                state = steps.step(state, q);
                let y = B::matmul_as(state.clone(), column(&steps.c, q), cut.dtype);
                positions.push(y.squeeze_dim(2));
            }
            own_outputs.push(cut.join(positions, dtype));
            own_states.push(steps.last);
        }
        outputs.push(Tensor::cat(own_outputs, 2));
        states.push(Tensor::cat(own_states, 1));
    }
    pack(Tensor::cat(outputs, 0), final_state.then(|| Tensor::cat(states, 0)))
}

/// The reference backward. With `g_t` the gradient of `h_t`, `g_t = c_t gy_t + exp(delta_{t+1} a) g_{t+1}`, and
/// `w_t = g_t exp(delta_t a) h_{t-1}`, the gradient of `delta_t a`: `gc_t = sum_c gy_t h_t`,
/// `gb_t = sum_c g_t delta_t u_t`, `gu_t = delta_t sum_n g_t b_t`, `gdelta_t = sum_n (w_t a + g_t b_t u_t)`,
/// `ga = sum_t w_t delta_t`.
pub fn backward<B: SelectiveScanOps>(
    inputs: SelectiveScan<B>,
    chunk: usize,
    final_state: bool,
    grad: Tensor<B, 1>,
) -> SelectiveScan<B> {
    let cut = Cut::new(&inputs, chunk);
    let (grad, grad_last) = split(grad, inputs.u.dims(), cut.state_size, inputs.u.dtype());
    assert_eq!(grad_last.is_some(), final_state, "the gradient of a selective scan's output");
    let mut found: [Vec<Tensor<B, 3>>; 5] = Default::default();
    let mut grad_a: Vec<Option<Tensor<B, 2>>> = vec![None; cut.channels.div_ceil(cut.channel_part)];
    for part in parts(cut.batch, cut.batch_part) {
        let [mut own_u, mut own_delta, mut own_state] = [const { Vec::new() }; 3];
        let mut sums: Option<[Tensor<B, 3>; 2]> = None;
        for (channels, sum_a) in parts(cut.channels, cut.channel_part).zip(&mut grad_a) {
            let steps = Steps::new(&cut, &inputs, &part, &channels);
            let own = |x: &Tensor<B, 3>, dim| x.clone().narrow(dim, channels.start, channels.len());
            let last = match &grad_last {
                Some(last) => own(&rows(last, &part, cut.dtype), 1),
                None => steps.last.zeros_like(),
            };
            let grads = backward_of_part(&cut, &steps, cut.cut(&own(&grad, 2), &part), last);
            own_u.push(cut.join(grads.u, inputs.u.dtype()));
            own_delta.push(cut.join(grads.delta, inputs.delta.dtype()));
            own_state.push(grads.state.cast(inputs.state.dtype()));
            let [b, c] = [grads.b, grads.c].map(|x| cut.join(x, cut.dtype));
            sums = Some(match sums {
                Some([sum_b, sum_c]) => [sum_b + b, sum_c + c],
                None => [b, c],
            });
            *sum_a = Some(match sum_a.take() {
                Some(sum) => sum + grads.a,
                None => grads.a,
            });
        }
        let [b, c] = sums.expect("channels");
        found[0].push(Tensor::cat(own_u, 2));
        found[1].push(Tensor::cat(own_delta, 2));
        found[2].push(b.cast(inputs.b.dtype()));
        found[3].push(c.cast(inputs.c.dtype()));
        found[4].push(Tensor::cat(own_state, 1));
    }
    let [u, delta, b, c, state] = found.map(|parts| Tensor::cat(parts, 0));
    let a = Tensor::cat(grad_a.into_iter().flatten().collect(), 0).cast(inputs.a.dtype());
    SelectiveScan { u, delta, a, b, c, state }
}

/// Gradients of a part: position by position `[m, c]` or `[m, n]`, of `a` `[c, n]`, of the state `[part, c, n]`.
struct Grads<B: Backend> {
    u: Vec<Tensor<B, 2>>,
    delta: Vec<Tensor<B, 2>>,
    b: Vec<Tensor<B, 2>>,
    c: Vec<Tensor<B, 2>>,
    a: Tensor<B, 2>,
    state: Tensor<B, 3>,
}

/// The gradients of a part from those of its output, `[Q, m, c]`, and of its final state.
fn backward_of_part<B: SelectiveScanOps>(
    cut: &Cut,
    steps: &Steps<B>,
    grad: Tensor<B, 3>,
    last: Tensor<B, 3>,
) -> Grads<B> {
    let product = |a: Tensor<B, 3>, b: Tensor<B, 3>| B::matmul_as(a, b, cut.dtype);
    // The states before every position, and the gradients of the states after the chunks.
    let mut states = vec![steps.before.clone()];
    for q in 0..cut.length {
        states.push(steps.step(states[q].clone(), q));
    }
    let mut added = steps.before.zeros_like();
    for q in (0..cut.length).rev() {
        added = (added + column(&grad, q) * row(&steps.c, q)) * steps.decays[q].clone();
    }
    let (mut carried, grad_state) = carry(added, &steps.whole, last, steps.chunks, true);

    let [mut u, mut delta, mut b, mut c] = [const { Vec::new() }; 4];
    let mut sum_a = steps.before.zeros_like();
    for q in (0..cut.length).rev() {
        let (delta_q, u_q, grad_q) = (column(&steps.delta, q), column(&steps.u, q), column(&grad, q));
        let state = states.pop().expect("the state after each position");
        c.push(product(grad_q.clone().swap_dims(1, 2), state).squeeze_dim(1));
        let grad_h = carried + grad_q * row(&steps.c, q);
        let input = delta_q.clone() * u_q.clone();
        b.push(product(input.swap_dims(1, 2), grad_h.clone()).squeeze_dim(1));
        let read = product(grad_h.clone(), column(&steps.b, q));
        u.push((read.clone() * delta_q.clone()).squeeze_dim(2));
        carried = grad_h * steps.decays[q].clone();
        let grad_log = carried.clone() * states[q].clone();
        let rate = (grad_log.clone() * steps.a.clone()).sum_dim(2);
        delta.push((rate + read * u_q).squeeze_dim(2));
        sum_a = sum_a + grad_log * delta_q;
    }
    for positions in [&mut u, &mut delta, &mut b, &mut c] {
        positions.reverse();
    }
    Grads { u, delta, b, c, a: sum_a.sum_dim(0).squeeze_dim(0), state: grad_state }
}

/// The plain recurrence, one position after the other: the reference of one-token steps and of tests.
pub fn sequential<B: Backend>(inputs: SelectiveScan<B>, final_state: bool) -> Tensor<B, 1> {
    let [batch, time, channels] = inputs.u.dims();
    let size = inputs.a.dims()[1];
    let wide = accumulate_type(inputs.delta.dtype());
    let dtype = if final_state { wide } else { inputs.u.dtype() };
    let a = inputs.a.cast(wide).reshape([1, channels, size]);
    let mut state = inputs.state.cast(wide);
    let mut outputs = Vec::with_capacity(time);
    for t in 0..time {
        let at = |x: &Tensor<B, 3>, shape: [usize; 3]| x.clone().narrow(1, t, 1).cast(wide).reshape(shape);
        let delta = at(&inputs.delta, [batch, channels, 1]);
        let input = delta.clone() * at(&inputs.u, [batch, channels, 1]);
        state = state * (delta * a.clone()).exp() + input * at(&inputs.b, [batch, 1, size]);
        let y = (state.clone() * at(&inputs.c, [batch, 1, size])).sum_dim(2);
        outputs.push(y.reshape([batch, 1, channels]).cast(dtype));
    }
    pack(Tensor::cat(outputs, 1), final_state.then_some(state))
}
