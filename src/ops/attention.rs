//! Causal attention with grouped keys and values (GQA).
//!
//! `q[b, tq, h, d]`, `k` and `v` `[b, tk, g, d]`, `h` a multiple of `g`, head `i` reads group `i / (h/g)`. Query `i`
//! stands at position `i + tk - tq` and sees the keys up to its own: `tq = tk` is the full forward, `tq < tk` goes on
//! from a cache of the first `tk - tq` positions. A [`Mask`] keeps it to the last of them or to its own document.
//! `y = softmax(scale q k^T) v`, scores and softmax in f32 (f64 for f64).
//!
//! The reference walks over blocks of queries and parts of the batch, so that only a bounded number of scores exists
//! at once; its backward computes the scores again.

use super::tape::{primitive, record, tensor};
use super::{Autodiff, MatmulOps, Plain, accumulate_type, reciprocal};
use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Int, Tensor};
use std::ops::Range;

/// Queries of one block of the reference.
const QUERY_BLOCK: usize = 256;

/// Which of the keys up to its own position a query sees.
#[derive(Debug, Clone)]
pub struct Mask<B: Backend> {
    /// The last so many positions, its own one among them (at least 1); all where there is none.
    pub window: Option<usize>,
    /// For each of the positions `[b, tk]` the first of its document, where that begins: a number that does not decrease
    /// along a sequence and is at most the position itself. What is before it is not seen.
    pub documents: Option<Tensor<B, 2, Int>>,
}

impl<B: Backend> Mask<B> {
    /// All keys up to the query's own position.
    pub fn causal() -> Self {
        Self { window: None, documents: None }
    }
}

impl<B: Backend> Default for Mask<B> {
    fn default() -> Self {
        Self::causal()
    }
}

/// What the backward gets of the forward.
#[derive(Debug, Clone)]
pub struct Attended<B: Backend> {
    /// `[b, tq, h, d]`
    pub q: Tensor<B, 4>,
    /// `[b, tk, g, d]`
    pub k: Tensor<B, 4>,
    /// `[b, tk, g, d]`
    pub v: Tensor<B, 4>,
    /// `[b, tq, h, d]`
    pub y: Tensor<B, 4>,
    /// The logarithms `[b, h, tq]` of the sums of the exponentials of each query's scaled scores, where the device's
    /// forward gives them.
    pub log_sums: Option<Tensor<B, 3>>,
}

/// Causal attention, forward and backward.
pub trait AttentionOps: MatmulOps {
    /// Scores that the reference holds at once.
    const SCORE_ELEMENTS: usize = 1 << 26;

    /// `q[b, tq, h, d]`, `k, v[b, tk, g, d]` to `y[b, tq, h, d]` and what its backward wants as
    /// [`Attended::log_sums`].
    fn attention_forward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        (forward(q, k, v, mask, scale), None)
    }

    /// The gradients of `q`, `k` and `v` from that of `y`.
    fn attention_backward(
        attended: Attended<Self>,
        grad: Tensor<Self, 4>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> [Tensor<Self, 4>; 3] {
        backward(attended, grad, mask, scale)
    }

    /// [`Self::attention_forward`]'s `y` over all keys up to the query's own position.
    fn causal_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        scale: f64,
    ) -> Tensor<Self, 4> {
        Self::attention_forward(q, k, v, &Mask::causal(), scale).0
    }
}

impl<B: Plain> AttentionOps for Autodiff<B> {
    fn attention_forward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        let parents = [primitive(q), primitive(k), primitive(v)];
        let [q, k, v]: [Tensor<B, 4>; 3] = parents.each_ref().map(|p| tensor(p.primitive.clone()));
        let mask = Mask { window: mask.window, documents: mask.documents.clone().map(Tensor::inner) };
        let (y, log_sums) = B::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale);
        let attended = Attended { q, k, v, y: y.clone(), log_sums };
        let y = record(parents, y, move |grad| {
            B::attention_backward(attended.clone(), grad, &mask, scale).map(primitive)
        });
        (y, None)
    }
}

/// Sizes of one call, and how the reference cuts it.
struct Blocks {
    batch: usize,
    queries: usize,
    keys: usize,
    groups: usize,
    per_group: usize,
    size: usize,
    batch_part: usize,
}

impl Blocks {
    fn new<B: AttentionOps>(q: &Tensor<B, 4>, k: &Tensor<B, 4>) -> Self {
        let [batch, queries, heads, size] = q.dims();
        let [_, keys, groups, _] = k.dims();
        let scores_of_one = heads * queries.min(QUERY_BLOCK) * keys;
        let batch_part = (B::SCORE_ELEMENTS / scores_of_one.max(1)).clamp(1, batch);
        Self { batch, queries, keys, groups, per_group: heads / groups, size, batch_part }
    }

    fn batch_ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let (batch, part) = (self.batch, self.batch_part);
        (0..batch).step_by(part).map(move |start| start..(start + part).min(batch))
    }

    fn query_ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let queries = self.queries;
        (0..queries).step_by(QUERY_BLOCK).map(move |start| start..(start + QUERY_BLOCK).min(queries))
    }

    /// Keys that the block's last query sees.
    fn seen(&self, block: &Range<usize>) -> usize {
        block.end + self.keys - self.queries
    }

    /// `[n, tq, h, d]` (a block of queries) as `[n, g, (h/g) tq, d]`.
    fn grouped<B: AttentionOps>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [n, time, ..] = x.dims();
        let x = x.reshape([n, time, self.groups, self.per_group, self.size]);
        x.permute([0, 2, 3, 1, 4]).reshape([n, self.groups, self.per_group * time, self.size])
    }

    /// The inverse of [`Self::grouped`].
    fn ungrouped<B: AttentionOps>(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [n, _, rows, _] = x.dims();
        let time = rows / self.per_group;
        let x = x.reshape([n, self.groups, self.per_group, time, self.size]);
        x.permute([0, 3, 1, 2, 4]).reshape([n, time, self.groups * self.per_group, self.size])
    }

    /// Which of a block's scores `[1 or n, 1, 1, block, seen]` are of keys that the query does not see.
    fn hidden<B: AttentionOps>(
        &self,
        mask: &Mask<B>,
        part: &Range<usize>,
        block: &Range<usize>,
        device: &B::Device,
    ) -> Tensor<B, 5, Bool> {
        let (rows, seen) = (block.len(), self.seen(block));
        let first = block.start + self.keys - self.queries;
        let query = Tensor::<B, 1, Int>::arange(first as i64..(first + rows) as i64, device);
        let query = query.reshape([rows, 1]).expand([rows, seen]);
        let key = Tensor::<B, 1, Int>::arange(0..seen as i64, device).reshape([1, seen]).expand([rows, seen]);
        let mut hidden = key.clone().greater(query.clone());
        if let Some(window) = mask.window {
            assert!(window > 0, "a window of no position, not even the query's own");
            hidden = hidden.bool_or(key.clone().lower_equal(query.sub_scalar(window.min(self.keys) as i64)));
        }
        let Some(starts) = &mask.documents else { return hidden.reshape([1, 1, 1, rows, seen]) };
        let n = part.len();
        let starts = starts.clone().slice([part.clone(), first..first + rows]).reshape([n, rows, 1]);
        let before =
            key.reshape([1, rows, seen]).expand([n, rows, seen]).lower(starts.expand([n, rows, seen]));
        hidden.reshape([1, rows, seen]).expand([n, rows, seen]).bool_or(before).reshape([n, 1, 1, rows, seen])
    }

    /// For a block of grouped queries (already scaled) `exp(scores - max)`, `[n, g, (h/g) block, seen]`, and the
    /// reciprocal of its row sums `[n, g, (h/g) block, 1]`: the probabilities are their product.
    fn exponentials<B: AttentionOps>(
        &self,
        q: Tensor<B, 4>,
        k: Tensor<B, 4>,
        hidden: Tensor<B, 5, Bool>,
        dtype: DType,
    ) -> [Tensor<B, 4>; 2] {
        let (n, [.., rows, seen]) = (q.dims()[0], hidden.dims());
        let shape = [n, self.groups, self.per_group, rows, seen];
        let scores = B::matmul_as(q, k.transpose(), dtype).reshape(shape);
        let scores = scores.mask_fill(hidden.expand(shape), f32::NEG_INFINITY);
        let scores = scores.reshape([n, self.groups, self.per_group * rows, seen]);
        let exp = (scores.clone() - scores.max_dim(3)).exp();
        [exp.clone(), reciprocal(exp.sum_dim(3))]
    }
}

/// Keys or values `[b, t, g, d]` of a part of the batch as `[n, g, seen, d]`.
fn by_group<B: AttentionOps>(x: &Tensor<B, 4>, part: &Range<usize>, seen: usize) -> Tensor<B, 4> {
    let [_, _, groups, size] = x.dims();
    x.clone().slice([part.clone(), 0..seen, 0..groups, 0..size]).swap_dims(1, 2)
}

/// The reference forward.
pub fn forward<B: AttentionOps>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    mask: &Mask<B>,
    scale: f64,
) -> Tensor<B, 4> {
    let (dtype, wide) = (q.dtype(), accumulate_type(q.dtype()));
    let cut = Blocks::new(&q, &k);
    let heads = cut.groups * cut.per_group;
    let mut batches = Vec::new();
    for part in cut.batch_ranges() {
        let mut blocks = Vec::new();
        for block in cut.query_ranges() {
            let queries = q.clone().slice([part.clone(), block.clone(), 0..heads, 0..cut.size]);
            let (keys, values) =
                (by_group(&k, &part, cut.seen(&block)), by_group(&v, &part, cut.seen(&block)));
            let queries = cut.grouped(queries.mul_scalar(scale));
            let hidden = cut.hidden(mask, &part, &block, &q.device());
            let [exp, inverse] = cut.exponentials(queries, keys, hidden, wide);
            let y = B::matmul_as(exp.cast(dtype), values, wide) * inverse;
            blocks.push(cut.ungrouped(y.cast(dtype)));
        }
        batches.push(Tensor::cat(blocks, 1));
    }
    Tensor::cat(batches, 0)
}

/// The reference backward: with `P` the probabilities, `gv = P^T gy`, `gP = gy v^T`,
/// `gS = P (gP - rowsum(gy y))`, `gq = scale gS k`, `gk = scale gS^T q`.
pub fn backward<B: AttentionOps>(
    attended: Attended<B>,
    grad: Tensor<B, 4>,
    mask: &Mask<B>,
    scale: f64,
) -> [Tensor<B, 4>; 3] {
    let Attended { q, k, v, y, .. } = attended;
    let (dtype, wide) = (q.dtype(), accumulate_type(q.dtype()));
    let cut = Blocks::new(&q, &k);
    let heads = cut.groups * cut.per_group;
    let mut batches: [Vec<Tensor<B, 4>>; 3] = Default::default();
    for part in cut.batch_ranges() {
        let shape = [part.len(), cut.groups, cut.keys, cut.size];
        let mut grad_k = Tensor::<B, 4>::zeros(shape, (&q.device(), wide));
        let mut grad_v = grad_k.clone();
        let mut grad_q = Vec::new();
        for block in cut.query_ranges() {
            let ranges = [part.clone(), block.clone(), 0..heads, 0..cut.size];
            let queries = cut.grouped(q.clone().slice(ranges.clone()).mul_scalar(scale));
            let outputs = cut.grouped(y.clone().slice(ranges.clone())).cast(wide);
            let grads = cut.grouped(grad.clone().slice(ranges)).cast(wide);
            let seen = cut.seen(&block);
            let (keys, values) = (by_group(&k, &part, seen), by_group(&v, &part, seen));
            let hidden = cut.hidden(mask, &part, &block, &q.device());
            let [exp, inverse] = cut.exponentials(queries.clone(), keys.clone(), hidden, wide);

            // P = exp inverse; the reciprocal goes to the smaller side of every product.
            let grads = grads * inverse;
            let delta = (grads.clone() * outputs).sum_dim(3);
            let grads = grads.cast(dtype);
            let part_v = B::matmul_as(exp.clone().cast(dtype).transpose(), grads.clone(), wide);
            let grad_s = (B::matmul_as(grads, values.transpose(), wide) - delta) * exp;
            let grad_s = grad_s.cast(dtype);
            let part_k = B::matmul_as(grad_s.clone().transpose(), queries, wide);
            let part_q = B::matmul_as(grad_s, keys, wide).mul_scalar(scale).cast(dtype);
            grad_q.push(cut.ungrouped(part_q));
            grad_k = add_front(grad_k, part_k, seen);
            grad_v = add_front(grad_v, part_v, seen);
        }
        batches[0].push(Tensor::cat(grad_q, 1));
        batches[1].push(grad_k.swap_dims(1, 2).cast(dtype));
        batches[2].push(grad_v.swap_dims(1, 2).cast(dtype));
    }
    batches.map(|parts| Tensor::cat(parts, 0))
}

/// Adds `part[n, g, seen, d]` to the first `seen` positions of `sum[n, g, t, d]`.
fn add_front<B: AttentionOps>(sum: Tensor<B, 4>, part: Tensor<B, 4>, seen: usize) -> Tensor<B, 4> {
    let [n, groups, time, size] = sum.dims();
    if seen == time {
        return sum + part;
    }
    let front = sum.clone().slice([0..n, 0..groups, 0..seen, 0..size]) + part;
    sum.slice_assign([0..n, 0..groups, 0..seen, 0..size], front)
}
