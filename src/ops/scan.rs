//! Linear attention with a scalar decay per head, cut into chunks: the scan of Mamba-2 (SSD, arXiv 2405.21060) and
//! Mamba-3 (spec/pr1607.md section 2).
//!
//! `q, k[b, t, g, n]`, `v[b, t, h, p]`, `log_decay, weight, diagonal[b, t, h]`, `state[b, h, p, n]`, `h` a multiple of
//! `g`, head `i` reads group `i / (h/g)`. With `a_t = exp(log_decay_t)`, `w = weight`, `d = diagonal` and
//! `H_{-1} = state`
//!
//! `H_t = a_t H_{t-1} + w_t v_t k_t^T`, `y_t = a_t H_{t-1} q_t + d_t (q_t . k_t) v_t`, so that
//! `y_t = sum_{s<t} a_{s+1} .. a_t w_s (q_t . k_s) v_s + d_t (q_t . k_t) v_t + a_0 .. a_t state q_t`.
//!
//! The reference takes chunks of `Q` positions: inside a chunk `y = (q k^T * mixing) v`, for all chunks at once, and
//! between chunks the recurrence of `H`. The logarithm of a product of decays is always a sum over just its own
//! positions, never a difference of two longer sums: decays near 0 and near 1 lose nothing. Dynamics, sums and states
//! are of `log_decay`'s type, at least f32.

use super::sequence::{lower_triangle, pack, pad_time, parts, rows, unpack};
use super::tape::{primitive, record, tensor};
use super::{Autodiff, MatmulOps, Plain, accumulate_type};
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use std::ops::Range;

/// The inputs of a scan, or their gradients.
#[derive(Clone, Debug)]
pub struct Scan<B: Backend> {
    /// Queries (Mamba's C) `[b, t, g, n]`.
    pub q: Tensor<B, 4>,
    /// Keys (Mamba's B) `[b, t, g, n]`.
    pub k: Tensor<B, 4>,
    /// Values (Mamba's x) `[b, t, h, p]`.
    pub v: Tensor<B, 4>,
    /// Logarithms of the decays `[b, t, h]`, finite.
    pub log_decay: Tensor<B, 3>,
    /// What a position's key and value weigh in the state, `[b, t, h]`.
    pub weight: Tensor<B, 3>,
    /// What they weigh in the position's own output, `[b, t, h]`.
    pub diagonal: Tensor<B, 3>,
    /// The state before the first position, `[b, h, p, n]`.
    pub state: Tensor<B, 4>,
}

impl<B: ScanOps> Scan<B> {
    /// Scans: `y[b, t, h, p]` and, if asked for, the final state `[b, h, p, n]`.
    pub fn run(self, chunk: usize, final_state: bool) -> (Tensor<B, 4>, Option<Tensor<B, 4>>) {
        let (shape, size, dtype) = (self.v.dims(), self.k.dims()[3], self.v.dtype());
        split(B::scan(self, chunk, final_state), shape, size, dtype)
    }
}

/// The scan, forward and backward.
pub trait ScanOps: MatmulOps {
    /// Elements of the mixing matrices and states that the reference holds of each at once.
    const SCAN_ELEMENTS: usize = 1 << 24;

    /// `y[b, t, h, p]` and, if asked for, the final state `[b, h, p, n]` after it, as one row ([`split`] parts them):
    /// in `v`'s type without the state, in the type of the dynamics with it. `chunk` changes no more than rounding.
    fn scan(inputs: Scan<Self>, chunk: usize, final_state: bool) -> Tensor<Self, 1> {
        forward(inputs, chunk, final_state)
    }

    /// The gradients of all inputs from that of the output.
    fn scan_backward(
        inputs: Scan<Self>,
        chunk: usize,
        final_state: bool,
        grad: Tensor<Self, 1>,
    ) -> Scan<Self> {
        backward(inputs, chunk, final_state, grad)
    }
}

impl<B: Plain> ScanOps for Autodiff<B> {
    fn scan(inputs: Scan<Self>, chunk: usize, final_state: bool) -> Tensor<Self, 1> {
        let Scan { q, k, v, log_decay, weight, diagonal, state } = inputs;
        let parents = [
            primitive(q),
            primitive(k),
            primitive(v),
            primitive(log_decay),
            primitive(weight),
            primitive(diagonal),
            primitive(state),
        ];
        let [q, k, v, log_decay, weight, diagonal, state] = parents.each_ref().map(|p| p.primitive.clone());
        let inputs = Scan::<B> {
            q: tensor(q),
            k: tensor(k),
            v: tensor(v),
            log_decay: tensor(log_decay),
            weight: tensor(weight),
            diagonal: tensor(diagonal),
            state: tensor(state),
        };
        let output = B::scan(inputs.clone(), chunk, final_state);
        record(parents, output, move |grad| {
            let grads = B::scan_backward(inputs.clone(), chunk, final_state, grad);
            [
                primitive(grads.q),
                primitive(grads.k),
                primitive(grads.v),
                primitive(grads.log_decay),
                primitive(grads.weight),
                primitive(grads.diagonal),
                primitive(grads.state),
            ]
        })
    }
}

/// Parts a scan's output into `y`, of shape `[b, t, h, p]`, as `dtype`, and the final state `[b, h, p, state_size]` if
/// it is there.
pub fn split<B: Backend>(
    flat: Tensor<B, 1>,
    y: [usize; 4],
    state_size: usize,
    dtype: DType,
) -> (Tensor<B, 4>, Option<Tensor<B, 4>>) {
    let [batch, _, heads, size] = y;
    unpack(flat, y, [batch, heads, size, state_size], dtype)
}

/// Sizes of one call, and how the reference cuts it.
struct Cut {
    batch: usize,
    time: usize,
    groups: usize,
    per_group: usize,
    heads: usize,
    head_size: usize,
    state_size: usize,
    /// Positions of a chunk.
    length: usize,
    chunks: usize,
    batch_part: usize,
    dtype: DType,
}

impl Cut {
    fn new<B: ScanOps>(inputs: &Scan<B>, chunk: usize) -> Self {
        let [batch, time, heads, head_size] = inputs.v.dims();
        let [.., groups, state_size] = inputs.q.dims();
        let length = chunk.clamp(1, time);
        let chunks = time.div_ceil(length);
        let of_one = chunks * heads * (length * length).max(head_size * state_size);
        Self {
            batch,
            time,
            groups,
            per_group: heads / groups,
            heads,
            head_size,
            state_size,
            length,
            chunks,
            batch_part: (B::SCAN_ELEMENTS / of_one).clamp(1, batch),
            dtype: accumulate_type(inputs.log_decay.dtype()),
        }
    }

    /// `[b, t, heads, size]` of a part of the batch as chunks `[m, heads, Q, size]`, `m` counting them over the part.
    fn cut<B: Backend>(&self, x: &Tensor<B, 4>, part: &Range<usize>) -> Tensor<B, 4> {
        let [_, _, heads, size] = x.dims();
        let x = pad_time(rows(x, part, self.dtype), self.chunks * self.length);
        x.reshape([part.len() * self.chunks, self.length, heads, size]).swap_dims(1, 2)
    }

    /// The same for one number a position and head: `[m, h, Q, 1]`. Positions after the last have zeros: no decay, no
    /// weight, no output.
    fn cut_scalar<B: Backend>(&self, x: &Tensor<B, 3>, part: &Range<usize>) -> Tensor<B, 4> {
        let [batch, time, heads] = x.dims();
        self.cut(&x.clone().reshape([batch, time, heads, 1]), part)
    }

    /// The inverse of [`Self::cut`], as `dtype`.
    fn join<B: Backend>(&self, x: Tensor<B, 4>, dtype: DType) -> Tensor<B, 4> {
        let [m, heads, _, size] = x.dims();
        let x = x.swap_dims(1, 2).reshape([m / self.chunks, self.chunks * self.length, heads, size]);
        x.narrow(1, 0, self.time).cast(dtype)
    }

    /// The inverse of [`Self::cut_scalar`], as `dtype`.
    fn join_scalar<B: Backend>(&self, x: Tensor<B, 4>, dtype: DType) -> Tensor<B, 3> {
        let x = self.join(x, dtype);
        let [batch, time, heads, _] = x.dims();
        x.reshape([batch, time, heads])
    }

    /// `[m, h, Q, p]` with the heads of a group side by side: `[m, g, Q, (h/g) p]`.
    fn grouped<B: Backend>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [m, _, length, size] = x.dims();
        let x = x.reshape([m, self.groups, self.per_group, length, size]).swap_dims(2, 3);
        x.reshape([m, self.groups, length, self.per_group * size])
    }

    /// The inverse of [`Self::grouped`].
    fn ungrouped<B: Backend>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [m, _, length, columns] = x.dims();
        let size = columns / self.per_group;
        let x = x.reshape([m, self.groups, length, self.per_group, size]).swap_dims(2, 3);
        x.reshape([m, self.heads, length, size])
    }

    /// States `[m, h, p, n]` with the heads of a group one below the other: `[m, g, (h/g) p, n]`.
    fn stacked<B: Backend>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let m = x.dims()[0];
        x.reshape([m, self.groups, self.per_group * self.head_size, self.state_size])
    }

    /// The inverse of [`Self::stacked`].
    fn unstacked<B: Backend>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let m = x.dims()[0];
        x.reshape([m, self.heads, self.head_size, self.state_size])
    }

    /// `[m, h, Q, Q]` times a matrix per group `[m, g, Q, Q]`.
    fn times_group<B: Backend>(&self, x: Tensor<B, 4>, by: Tensor<B, 4>) -> Tensor<B, 4> {
        let [m, heads, length, _] = x.dims();
        let x = x.reshape([m, self.groups, self.per_group, length, length]);
        (x * by.reshape([m, self.groups, 1, length, length])).reshape([m, heads, length, length])
    }

    /// The sum over a group's heads: `[m, h, Q, Q]` to `[m, g, Q, Q]`.
    fn sum_group<B: Backend>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [m, _, length, _] = x.dims();
        let x = x.reshape([m, self.groups, self.per_group, length * length]).sum_dim(2);
        x.reshape([m, self.groups, length, length])
    }

    /// A product of each row of `x[m, h, Q, 1]` with `by[Q, Q]`.
    fn sums<B: ScanOps>(&self, x: Tensor<B, 4>, by: Tensor<B, 2>) -> Tensor<B, 4> {
        let [m, heads, length, _] = x.dims();
        let sums = B::matmul_as(x.reshape([m * heads, length]), by, self.dtype);
        sums.reshape([m, heads, length, 1])
    }
}

/// A part of the batch in chunks, and what every chunk's decays come to.
struct Chunks<B: Backend> {
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    /// `[m, h, Q, 1]`.
    weight: Tensor<B, 4>,
    /// `[m, h, Q, 1]`.
    diagonal: Tensor<B, 4>,
    /// The state before the first chunk.
    state: Tensor<B, 4>,
    /// `[i, j]` is one where `i >= j`, or where `i > j`.
    lower: Tensor<B, 2>,
    strict: Tensor<B, 2>,
    /// `a_{j+1} .. a_i` for `i > j`, else zero: `[m, h, Q, Q]`.
    within: Tensor<B, 4>,
    /// `a_0 .. a_i`: `[m, h, Q, 1]`.
    since_start: Tensor<B, 4>,
    /// `a_{j+1} .. a_{Q-1}`: `[m, h, Q, 1]`.
    to_end: Tensor<B, 4>,
    /// All of a chunk's decays: `[m, h, 1, 1]`.
    whole: Tensor<B, 4>,
}

impl<B: ScanOps> Chunks<B> {
    fn new(cut: &Cut, inputs: &Scan<B>, part: &Range<usize>) -> Self {
        let (length, device) = (cut.length, inputs.v.device());
        let lower = lower_triangle::<B>(length, 0, &device, cut.dtype);
        let strict = lower_triangle::<B>(length, 1, &device, cut.dtype);
        let log_decay = cut.cut_scalar(&inputs.log_decay, part);
        let [m, heads, ..] = log_decay.dims();

        // Row i keeps the log decays up to i; its product with `strict` sums those after j.
        let square = [1, 1, length, length];
        let up_to = log_decay.clone().swap_dims(2, 3) * lower.clone().reshape(square);
        let log_within = B::matmul_as(up_to.reshape([m * heads * length, length]), strict.clone(), cut.dtype);
        let log_within = log_within.reshape([m, heads, length, length]);
        let to_end = log_within.clone().narrow(2, length - 1, 1).swap_dims(2, 3).exp();
        let since_start = cut.sums(log_decay, lower.clone().transpose()).exp();
        Self {
            q: cut.cut(&inputs.q, part),
            k: cut.cut(&inputs.k, part),
            v: cut.cut(&inputs.v, part),
            weight: cut.cut_scalar(&inputs.weight, part),
            diagonal: cut.cut_scalar(&inputs.diagonal, part),
            state: rows(&inputs.state, part, cut.dtype),
            within: log_within.exp() * strict.clone().reshape(square),
            whole: since_start.clone().narrow(2, length - 1, 1),
            lower,
            strict,
            since_start,
            to_end,
        }
    }

    /// What `q_i . k_j` weighs in `y_i`: decays times weight below the diagonal, the diagonal's own weight on it.
    fn mixing(&self) -> Tensor<B, 4> {
        let length = self.within.dims()[2];
        let eye = (self.lower.clone() - self.strict.clone()).reshape([1, 1, length, length]);
        self.within.clone() * self.weight.clone().swap_dims(2, 3) + self.diagonal.clone() * eye
    }

    /// The states before every chunk, `[m, h, p, n]`, and the one after the last.
    fn states(&self, cut: &Cut) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let weighted = cut.grouped(self.v.clone() * (self.weight.clone() * self.to_end.clone()));
        let added = cut.unstacked(B::matmul_as(weighted.transpose(), self.k.clone(), cut.dtype));
        carry(added, &self.whole, self.state.clone(), cut.chunks, false)
    }
}

/// The recurrence between chunks, forwards or backwards in time: `x <- whole_c x + added_c` from `x = first`, over
/// `added[m, h, p, n]`. Gives `x` before each chunk's step, in the chunks' order, and after the last.
fn carry<B: Backend>(
    added: Tensor<B, 4>,
    whole: &Tensor<B, 4>,
    first: Tensor<B, 4>,
    chunks: usize,
    backwards: bool,
) -> (Tensor<B, 4>, Tensor<B, 4>) {
    let [m, heads, size, state_size] = added.dims();
    let shape = [m / chunks, chunks, heads, size * state_size];
    let added = added.reshape(shape);
    let whole = whole.clone().reshape([m / chunks, chunks, heads, 1]);
    let mut x = first.reshape([m / chunks, 1, heads, size * state_size]);
    let mut before = Vec::with_capacity(chunks);
    for step in 0..chunks {
        let chunk = if backwards { chunks - 1 - step } else { step };
        before.push(x.clone());
        x = x * whole.clone().narrow(1, chunk, 1) + added.clone().narrow(1, chunk, 1);
    }
    if backwards {
        before.reverse();
    }
    let before = Tensor::cat(before, 1).reshape([m, heads, size, state_size]);
    (before, x.reshape([m / chunks, heads, size, state_size]))
}

/// The reference forward.
pub fn forward<B: ScanOps>(inputs: Scan<B>, chunk: usize, final_state: bool) -> Tensor<B, 1> {
    if inputs.v.dims()[1] == 1 {
        return sequential(inputs, final_state);
    }
    let cut = Cut::new(&inputs, chunk);
    let dtype = if final_state { cut.dtype } else { inputs.v.dtype() };
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for part in parts(cut.batch, cut.batch_part) {
        let x = Chunks::new(&cut, &inputs, &part);
        let (before, last) = x.states(&cut);
        let scores = B::matmul_as(x.q.clone(), x.k.clone().transpose(), cut.dtype);
        let own = B::matmul_as(cut.times_group(x.mixing(), scores), x.v, cut.dtype);
        let carried = B::matmul_as(x.q, cut.stacked(before).transpose(), cut.dtype);
        outputs.push(cut.join(own + cut.ungrouped(carried) * x.since_start, dtype));
        states.push(last);
    }
    pack(Tensor::cat(outputs, 0), final_state.then(|| Tensor::cat(states, 0)))
}

/// The reference backward. With `S = q k^T`, `M` the mixing, `e_i`, `f_j` and `T` the products of decays since the
/// chunk's start, to its end and over all of it, `H` the state before the chunk and `G` the gradient of the state after:
/// inside, `gA = gy v^T`, `gv = (S M)^T gy`, `gS = gA M`, `gM = gA S`; of the carried part, `gq = e gy H`; of what the
/// chunk adds to the state, `gv = f w k G^T`, `gk = f w v G`; and `G <- T G + (e gy)^T q`. A product of decays has the
/// gradient of its logarithm spread over its own positions.
pub fn backward<B: ScanOps>(inputs: Scan<B>, chunk: usize, final_state: bool, grad: Tensor<B, 1>) -> Scan<B> {
    let cut = Cut::new(&inputs, chunk);
    let (grad, grad_last) = split(grad, inputs.v.dims(), cut.state_size, inputs.v.dtype());
    assert_eq!(grad_last.is_some(), final_state, "the gradient of a scan's output");
    let mut found: Vec<Scan<B>> = Vec::new();
    for part in parts(cut.batch, cut.batch_part) {
        let last = match &grad_last {
            Some(last) => rows(last, &part, cut.dtype),
            None => rows(&inputs.state, &part, cut.dtype).zeros_like(),
        };
        let grads = backward_of_part(&cut, Chunks::new(&cut, &inputs, &part), cut.cut(&grad, &part), last);
        found.push(Scan {
            q: cut.join(grads.q, inputs.q.dtype()),
            k: cut.join(grads.k, inputs.k.dtype()),
            v: cut.join(grads.v, inputs.v.dtype()),
            log_decay: cut.join_scalar(grads.log_decay, inputs.log_decay.dtype()),
            weight: cut.join_scalar(grads.weight, inputs.weight.dtype()),
            diagonal: cut.join_scalar(grads.diagonal, inputs.diagonal.dtype()),
            state: grads.state.cast(inputs.state.dtype()),
        });
    }
    fn joined<B: Backend, const D: usize>(
        found: &[Scan<B>],
        of: impl Fn(&Scan<B>) -> &Tensor<B, D>,
    ) -> Tensor<B, D> {
        Tensor::cat(found.iter().map(|grads| of(grads).clone()).collect(), 0)
    }
    Scan {
        q: joined(&found, |x| &x.q),
        k: joined(&found, |x| &x.k),
        v: joined(&found, |x| &x.v),
        log_decay: joined(&found, |x| &x.log_decay),
        weight: joined(&found, |x| &x.weight),
        diagonal: joined(&found, |x| &x.diagonal),
        state: joined(&found, |x| &x.state),
    }
}

/// Gradients in chunks: as in [`Chunks`], but for the state, `[part, h, p, n]`.
struct Grads<B: Backend> {
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    log_decay: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    diagonal: Tensor<B, 4>,
    state: Tensor<B, 4>,
}

/// The gradients of a part from those of its output, `[m, h, Q, p]`, and of its final state.
fn backward_of_part<B: ScanOps>(cut: &Cut, x: Chunks<B>, grad: Tensor<B, 4>, last: Tensor<B, 4>) -> Grads<B> {
    let product = |a: Tensor<B, 4>, b: Tensor<B, 4>| B::matmul_as(a, b, cut.dtype);
    let [m, heads, length, _] = x.v.dims();

    // Inside the chunks.
    let mixing = x.mixing();
    let scores = product(x.q.clone(), x.k.clone().transpose());
    let attention = cut.times_group(mixing.clone(), scores.clone());
    let grad_v = product(attention.transpose(), grad.clone());
    let grad_attention = product(grad.clone(), x.v.clone().transpose());
    let grad_scores = cut.sum_group(grad_attention.clone() * mixing);
    let grad_mixing = cut.times_group(grad_attention, scores);
    let grad_q = product(grad_scores.clone(), x.k.clone());
    let grad_k = product(grad_scores.transpose(), x.q.clone());
    let eye = (x.lower.clone() - x.strict.clone()).reshape([1, 1, length, length]);
    let grad_diagonal = (grad_mixing.clone() * eye).sum_dim(3);
    let decayed = grad_mixing * x.within.clone();
    let grad_weight = decayed.clone().sum_dim(2).swap_dims(2, 3);
    let grad_log = (decayed * x.weight.clone().swap_dims(2, 3)).reshape([m * heads * length, length]);
    let spread = B::matmul_as(grad_log, x.strict.clone().transpose(), cut.dtype);
    let spread = spread.reshape([m, heads, length, length]) * x.lower.clone().reshape([1, 1, length, length]);
    let grad_decay = spread.sum_dim(2).swap_dims(2, 3);

    // The carried part of the outputs, from the states before the chunks.
    let (before, _) = x.states(cut);
    let carried = product(x.q.clone(), cut.stacked(before.clone()).transpose());
    let scaled = grad * x.since_start.clone();
    let grad_start = (cut.ungrouped(carried) * scaled.clone()).sum_dim(3);
    let scaled = cut.grouped(scaled);
    let grad_q = grad_q + product(scaled.clone(), cut.stacked(before.clone()));
    let added = cut.unstacked(product(scaled.transpose(), x.q));

    // The states after the chunks.
    let (after, grad_state) = carry(added, &x.whole, last, cut.chunks, true);
    let kept = (before * after.clone()).reshape([m, heads, 1, cut.head_size * cut.state_size]);
    let grad_whole = kept.sum_dim(3) * x.whole;
    let factor = x.weight * x.to_end.clone();
    let read = cut.ungrouped(product(x.k, cut.stacked(after.clone()).transpose()));
    let grad_factor = (x.v.clone() * read.clone()).sum_dim(3);
    let grad_k = grad_k + product(cut.grouped(x.v * factor.clone()), cut.stacked(after));
    let grad_end = grad_factor.clone() * factor.clone();

    let grad_decay =
        grad_decay + cut.sums(grad_start, x.lower) + cut.sums(grad_end, x.strict.transpose()) + grad_whole;
    Grads {
        q: grad_q,
        k: grad_k,
        v: grad_v + read * factor,
        log_decay: grad_decay,
        weight: grad_weight + grad_factor * x.to_end,
        diagonal: grad_diagonal,
        state: grad_state,
    }
}

/// The plain recurrence, one position after the other: the reference of one-token steps and of tests.
pub fn sequential<B: Backend>(inputs: Scan<B>, final_state: bool) -> Tensor<B, 1> {
    let [batch, time, heads, size] = inputs.v.dims();
    let [.., groups, state_size] = inputs.q.dims();
    let wide = accumulate_type(inputs.log_decay.dtype());
    let dtype = if final_state { wide } else { inputs.v.dtype() };
    let shape = [batch, groups, heads / groups, size, state_size];
    let mut state = inputs.state.cast(wide).reshape(shape);
    let mut outputs = Vec::with_capacity(time);
    for t in 0..time {
        let at = |x: &Tensor<B, 4>, shape: [usize; 5]| x.clone().narrow(1, t, 1).cast(wide).reshape(shape);
        let q = at(&inputs.q, [batch, groups, 1, 1, state_size]);
        let k = at(&inputs.k, [batch, groups, 1, 1, state_size]);
        let v = at(&inputs.v, [batch, groups, heads / groups, size, 1]);
        let scalar = |x: &Tensor<B, 3>| {
            x.clone().narrow(1, t, 1).cast(wide).reshape([batch, groups, heads / groups, 1, 1])
        };
        state = state * scalar(&inputs.log_decay).exp();
        let own = v.clone() * (q.clone() * k.clone()).sum_dim(4) * scalar(&inputs.diagonal);
        let y = (state.clone() * q).sum_dim(4) + own;
        outputs.push(y.reshape([batch, 1, heads, size]).cast(dtype));
        state = state + v * scalar(&inputs.weight) * k;
    }
    let state = final_state.then(|| state.reshape([batch, heads, size, state_size]));
    pack(Tensor::cat(outputs, 1), state)
}
