//! Attention from the mixer's input on, on every device: projections, norm, rotation, gain and attention, forward and in
//! every gradient, against a computation in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the host makes with inputs and intermediates rounded to the
//! device's precision, at least twice the distance between neighbouring numbers, and the rounding of long sums beside it.
//! Errors of projections and of normed heads are shares of the head's largest number, of the others shares of the
//! tensor's root mean square.

mod common;

use burn::tensor::Tensor;
use common::{
    Random, Worst, affordable, all_pass, download, epsilon, repeats, round, same, targets, upload, upload_as,
    worst,
};
use fairway::Result;
use fairway::backend::{Job, Precision, Target, guard, run};
use fairway::ops::attention::{Attended, Mask};
use fairway::ops::projected_attention::Heads;
use fairway::ops::qk_norm::QkNorm;
use fairway::ops::rope::RopeTable;
use fairway::ops::{
    Autodiff, LinearOps, NormedAttentionOps, Param, Plain, ProjectedAttentionOps, accumulate_type,
};

const BASE: f64 = 1e4;

/// Sequences, positions, the input's width, heads of q and of k, channels of a head, rotated ones.
type Sizes = [usize; 7];

/// A call; values that the precision has.
struct Case {
    sizes: Sizes,
    eps: f64,
    scale: f64,
    x: Vec<f64>,
    /// Of q, k and v, `[outputs, width]`.
    weights: [Vec<f64>; 3],
    gain: Option<Vec<f64>>,
    grad: Vec<f64>,
}

/// What the op gives, and the norm of each head's terms of the gain's gradient.
struct Results {
    y: Vec<f64>,
    grad_x: Vec<f64>,
    grad_weights: [Vec<f64>; 3],
    grad_gain: Vec<f64>,
    gain_scale: f64,
}

type Rounding<'a> = &'a dyn Fn(f64) -> f64;

/// `a[m, k] b[n, k]^T`.
fn times_transposed(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    a.chunks(k).flat_map(|a| b.chunks(k).map(move |b| dot(a, b))).collect()
}

/// `a[m, k] b[k, n]`, added to what `c[m, n]` holds.
fn add_product(c: &mut [f64], a: impl Fn(usize, usize) -> f64, b: &[f64], [m, n, k]: [usize; 3]) {
    for i in 0..m {
        let c = &mut c[i * n..][..n];
        for j in 0..k {
            let by = a(i, j);
            c.iter_mut().zip(&b[j * n..][..n]).for_each(|(c, b)| *c += by * b);
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Case {
    /// `scales` are those of the weights' heads, one after the other.
    fn new(sizes: Sizes, eps: f64, gain: bool, scales: &[f64], precision: Precision, seed: u64) -> Self {
        let [batch, time, width, heads, groups, size, _] = sizes;
        let mut random = Random(seed);
        let mut values = |n: usize, scale: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..n).map(|i| round(random.uniform() * scale(i), precision)).collect()
        };
        let x = values(batch * time * width, &|_| 1.0);
        let own = |i: usize| scales[i / (size * width) % scales.len()] / (width as f64).sqrt();
        let weights = [heads, groups, groups].map(|heads| values(heads * size * width, &own));
        let gain = gain.then(|| values(heads, &|_| 2.0));
        let grad = values(batch * time * heads * size, &|_| 1.0);
        Self { sizes, eps, scale: 1.0 / (size as f64).sqrt(), x, weights, gain, grad }
    }

    /// Heads of q, of k, of v.
    fn heads(&self, which: usize) -> usize {
        if which == 0 { self.sizes[3] } else { self.sizes[4] }
    }

    fn gain(&self, which: usize, head: usize) -> f64 {
        let of_q = self.gain.as_ref().filter(|_| which == 0);
        of_q.map_or(1.0, |gain| gain[head % gain.len()])
    }

    fn inverse_rms(&self, x: &[f64]) -> f64 {
        1.0 / (dot(x, x) / x.len() as f64 + self.eps).sqrt()
    }

    /// Turned by the angles of the head's position, `back` the other way.
    fn turned(&self, which: usize, head: usize, x: &[f64], back: bool, at: Rounding) -> Vec<f64> {
        let [_, time, .., rotated] = self.sizes;
        let (position, half) = (head / self.heads(which) % time, rotated / 2);
        let mut y = x.to_vec();
        for i in 0..half {
            let angle = position as f64 * BASE.powf(-2.0 * i as f64 / rotated as f64);
            let (cos, sin) = (at(angle.cos()), at(if back { -angle.sin() } else { angle.sin() }));
            y[i] = at(at(x[i] * cos) + at(x[i + half] * sin));
            y[i + half] = at(at(x[i + half] * cos) - at(x[i] * sin));
        }
        y
    }

    /// Heads normed and turned, before the gain.
    fn normed(&self, which: usize, raw: &[f64], at: Rounding) -> Vec<f64> {
        let of_head = |(head, x): (usize, &[f64])| {
            let r = self.inverse_rms(x);
            let normed: Vec<f64> = x.iter().map(|x| at(x * r)).collect();
            self.turned(which, head, &normed, false, at)
        };
        raw.chunks(self.sizes[5]).enumerate().flat_map(of_head).collect()
    }

    fn projected(&self, at: Rounding) -> ([Vec<f64>; 3], [Vec<f64>; 2], Vec<f64>) {
        let raw = self.weights.each_ref().map(|w| {
            let y = times_transposed(&self.x, w, self.sizes[2]);
            y.into_iter().map(at).collect::<Vec<f64>>()
        });
        let turned = self.normed(0, &raw[0], at);
        let size = self.sizes[5];
        let q = turned.iter().enumerate().map(|(i, x)| at(x * self.gain(0, i / size))).collect();
        let k = self.normed(1, &raw[1], at);
        (raw, [q, k], turned)
    }

    /// The whole op, what it stores rounded by `at`, and the weights of attention too.
    fn results(&self, at: Rounding) -> Results {
        let [batch, time, width, heads, groups, size, _] = self.sizes;
        let rows = batch * time;
        let (raw, normed, turned) = self.projected(at);
        let [q, k] = &normed;
        let v = &raw[2];
        let mut y = vec![0.0; rows * heads * size];
        let mut grads = [heads, groups, groups].map(|heads| vec![0.0; rows * heads * size]);
        for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let of_q = (row * heads + head) * size..(row * heads + head + 1) * size;
            let first = row / time * time;
            let seen: Vec<_> = (first..=row)
                .map(|row| {
                    let start = (row * groups + head / (heads / groups)) * size;
                    start..start + size
                })
                .collect();
            let scores: Vec<f64> =
                seen.iter().map(|of_k| self.scale * dot(&q[of_q.clone()], &k[of_k.clone()])).collect();
            let most = scores.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            let share: Vec<f64> = scores.iter().map(|s| at((s - most).exp()) / sum).collect();
            for (share, of_k) in share.iter().zip(&seen) {
                let v = &v[of_k.clone()];
                y[of_q.clone()].iter_mut().zip(v).for_each(|(y, v)| *y += share * v);
            }
            y[of_q.clone()].iter_mut().for_each(|y| *y = at(*y));
            let grad = &self.grad[of_q.clone()];
            let along = dot(grad, &y[of_q.clone()]);
            for (share, of_k) in share.iter().zip(&seen) {
                let of_score = at(share * (dot(grad, &v[of_k.clone()]) - along));
                for (i, grad) in grad.iter().enumerate() {
                    let (i_q, i_k) = (of_q.start + i, of_k.start + i);
                    grads[0][i_q] += self.scale * of_score * k[i_k];
                    grads[1][i_k] += self.scale * of_score * q[i_q];
                    grads[2][i_k] += share * grad;
                }
            }
        }
        grads.iter_mut().flatten().for_each(|grad| *grad = at(*grad));

        let mut grad_gain = vec![0.0; heads];
        let mut terms = 0.0;
        for (i, (turned, grad)) in turned.iter().zip(&grads[0]).enumerate() {
            grad_gain[i / size % heads] += at(turned * grad);
            terms += (turned * grad).powi(2);
        }
        for which in [0, 1] {
            let rows = raw[which].chunks(size).zip(grads[which].chunks_mut(size));
            for (head, (x, grad)) in rows.enumerate() {
                let by = self.gain(which, head);
                let u: Vec<f64> = grad.iter().map(|grad| at(grad * by)).collect();
                let u = self.turned(which, head, &u, true, at);
                let r = self.inverse_rms(x);
                let along = r * r * dot(&u, x) / size as f64;
                grad.iter_mut()
                    .zip(u.iter().zip(x))
                    .for_each(|(grad, (u, x))| *grad = at(r * (u - x * along)));
            }
        }

        let mut grad_x = vec![0.0; rows * width];
        let mut grad_weights = self.weights.each_ref().map(|w| vec![0.0; w.len()]);
        for ((grad, w), grad_w) in grads.iter().zip(&self.weights).zip(&mut grad_weights) {
            let outputs = w.len() / width;
            add_product(&mut grad_x, |i, j| grad[i * outputs + j], w, [rows, width, outputs]);
            add_product(grad_w, |i, j| grad[j * outputs + i], &self.x, [outputs, width, rows]);
        }
        grad_x.iter_mut().for_each(|grad| *grad = at(*grad));
        let gain_scale = (terms / heads as f64).sqrt();
        Results { y, grad_x, grad_weights, grad_gain, gain_scale }
    }
}

/// What a case has found: prints a line for each tensor, and knows whether all were within their tolerance.
struct Ledger<'a> {
    target: &'a Target,
    case: String,
    /// The longest sum behind an element, and the rounding of one of its steps beyond the usual.
    terms: usize,
    good: bool,
}

impl Ledger<'_> {
    /// Holds what the device got and the rounded host's against the exact, each row of `columns` by its scale.
    fn check(&mut self, what: &str, [got, low, exact]: [&[f64]; 3], columns: usize, scales: &[f64]) {
        let precision = self.target.precision;
        assert_eq!((got.len(), low.len()), (exact.len(), exact.len()), "{what}");
        let of =
            |x: &[f64]| worst(x, exact, columns, |row| scales[row % scales.len()].max(f64::MIN_POSITIVE));
        let (Worst { error, row, column, got, expected }, low) = (of(got), of(low).error);
        let unit = if precision == Precision::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let sums = (16.0 * (self.terms as f64).sqrt() + 64.0) * unit;
        let tolerance = 2.0 * low.max(epsilon(precision)) + sums;
        let within = error <= tolerance;
        println!(
            "{:>32} {what:<10} {error:.2e} of {tolerance:.2e}, {:>3.0}%  [{row}, {column}]: {got:.7e}, expected {expected:.7e}{}",
            self.case,
            100.0 * error / tolerance,
            if within { "" } else { "  FAILED" }
        );
        self.good &= within;
    }

    fn check_heads(&mut self, what: &str, tensors: [&[f64]; 3], size: usize) {
        let largest = |row: &[f64]| row.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        let scales: Vec<f64> = tensors[2].chunks(size).map(largest).collect();
        self.check(what, tensors, size, &scales);
    }

    fn check_tensor(&mut self, what: &str, tensors: [&[f64]; 3], columns: usize) {
        let exact = tensors[2];
        let scale = (dot(exact, exact) / exact.len() as f64).sqrt();
        self.check(what, tensors, columns, &[scale]);
    }
}

/// A case's tensors on a device.
struct Uploaded<B: Plain> {
    sizes: Sizes,
    x: Tensor<B, 2>,
    grad: Tensor<B, 4>,
    weights: [Param<B>; 3],
    gain: Option<Param<B>>,
    how: QkNorm<B>,
    scale: f64,
}

impl<B: Plain> Uploaded<B> {
    fn new(case: &Case, device: &B::Device, precision: Precision) -> Self {
        let [batch, time, width, heads, groups, size, rotated] = case.sizes;
        let (dtype, wide) = (precision.dtype(), accumulate_type(precision.dtype()));
        let weights = [0, 1, 2].map(|which| {
            let shape = [case.heads(which) * size, width];
            Param::new(
                format!("w{which}"),
                upload_as::<B, 2>(&case.weights[which], shape, device, wide),
                dtype,
            )
        });
        let gain = case
            .gain
            .as_ref()
            .map(|gain| Param::new("gain", upload_as::<B, 1>(gain, [heads], device, wide), dtype));
        // From a longer table, as models have it.
        let rope = match rotated {
            0 => {
                let none = Tensor::empty([time, 0], (device, wide));
                RopeTable { cos: none.clone(), sin: none }
            }
            _ => RopeTable::new(0, time + 3, rotated, BASE, device, wide).range(0, time),
        };
        let how = QkNorm { batch, heads, groups, rope, gain: gain.clone(), eps: case.eps };
        let x = upload(&case.x, [batch * time, width], device, precision);
        let grad = upload(&case.grad, [batch, time, heads, size], device, precision);
        Self { sizes: case.sizes, x, grad, weights, gain, how, scale: case.scale }
    }

    /// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
    fn poison(&self) {
        let [batch, time, _, heads, groups, size, _] = self.sizes;
        let device = self.x.device();
        let columns = [(heads + 2 * groups) * size, (heads + groups) * size, heads * size];
        let filled = columns.map(|columns| {
            let fill = |dtype| Tensor::<B, 2>::full([batch * time, columns], f32::NAN, (&device, dtype));
            [fill(self.x.dtype()), fill(accumulate_type(self.x.dtype()))]
        });
        drop(filled);
    }

    /// Projections, and queries and keys after the norm.
    fn heads(&self, x: &Tensor<B, 2>) -> ([Vec<f64>; 3], [Vec<f64>; 2]) {
        self.poison();
        let Heads { before: [q, k], normed, values } =
            B::project_heads(x.clone(), self.weights.each_ref(), &self.how);
        let [batch, time, _, heads, groups, size, _] = self.sizes;
        assert_eq!(q.dims(), [batch * time, heads * size]);
        assert_eq!((k.dims(), values.dims()), ([batch * time, groups * size], [batch * time, groups * size]));
        assert_eq!(normed[0].dims(), [batch, time, heads, size]);
        assert_eq!(normed[1].dims(), [batch, time, groups, size]);
        ([q, k, values].map(download), normed.map(download))
    }

    /// The gradients of all parameters that have one.
    fn take_grads(&self) -> impl Iterator<Item = Vec<f64>> {
        let params = self.weights.iter().chain(&self.gain);
        params.filter(|p| p.is_trainable()).map(|p| {
            let grad = p.take_flat_grad().expect("a gradient of a parameter");
            assert_eq!(grad.dtype(), p.master_type());
            download(grad)
        })
    }

    /// The same as [`Self::through_the_tape`] without a tape.
    fn explicit_backward(&self) -> Vec<Vec<f64>> {
        self.poison();
        let (weights, mask) = (self.weights.each_ref(), Mask::causal());
        let Heads { before, normed: [q, k], values } = B::project_heads(self.x.clone(), weights, &self.how);
        let v = values.reshape(k.dims());
        let (y, log_sums) = B::attention_forward(q.clone(), k.clone(), v.clone(), &mask, self.scale);
        let value = download(y.clone());
        let attended = Attended { q, k, v, y, log_sums };
        let (x, grad) = (self.x.clone(), self.grad.clone());
        let grad_x =
            B::projected_attention_backward(x, weights, before, attended, grad, &self.how, &mask, self.scale);
        [value, download(grad_x)].into_iter().chain(self.take_grads()).collect()
    }

    /// The output, and by the tape the gradients of x, of the weights and of the gain. `apart`: the projections and what
    /// follows them as ops of their own.
    fn through_the_tape(&self, apart: bool) -> Vec<Vec<f64>> {
        type T<B> = Autodiff<B>;
        self.poison();
        let leaf = Tensor::<T<B>, 2>::from_inner(self.x.clone()).require_grad();
        let (weights, mask) = (self.weights.each_ref(), Mask::causal());
        let y = if apart {
            let [q, k, v] = T::<B>::project_many(leaf.clone(), weights);
            T::<B>::normed_attention(q, k, v, &self.how, &mask, self.scale)
        } else {
            T::<B>::projected_attention(leaf.clone(), weights, &self.how, &mask, self.scale)
        };
        let value = download(y.clone().inner());
        self.poison();
        let grads = (y * Tensor::from_inner(self.grad.clone())).sum().backward();
        let mut found = vec![value, download(leaf.grad(&grads).expect("a gradient of x"))];
        found.extend(self.take_grads());
        found
    }
}

/// Around the edges of the kernel's tiles (64 rows, 128 columns), of its slices of k (64) and of its kinds of heads;
/// queries, keys and values in one tile and apart; one token; all, some and no channels rotated; the last ones for
/// other kernels.
const FEW: [(Sizes, bool); 12] = [
    ([1, 1, 8, 1, 1, 64, 64], true),
    ([2, 33, 64, 2, 1, 32, 16], true),
    ([1, 65, 72, 3, 1, 64, 64], true),
    ([3, 43, 136, 2, 1, 64, 0], true),
    ([1, 64, 128, 2, 2, 64, 16], false),
    ([2, 65, 72, 1, 1, 128, 128], true),
    ([1, 70, 40, 2, 1, 128, 32], false),
    ([1, 40, 200, 5, 5, 32, 32], true),
    ([5, 7, 48, 3, 1, 64, 48], true),
    ([2, 30, 20, 2, 1, 10, 4], true),
    ([2, 17, 64, 2, 1, 64, 12], true),
    ([1, 9, 528, 2, 1, 64, 64], true),
];

/// Several tiles for a block: at the same positions again, at others, at some of both; all of k that the kernel takes.
const MANY: [(Sizes, bool); 5] = [
    ([4, 1024, 64, 8, 4, 64, 64], true),
    ([3, 1111, 264, 8, 4, 64, 64], true),
    ([2, 2048, 72, 4, 2, 128, 128], false),
    ([33, 100, 512, 8, 4, 64, 16], true),
    ([1, 2500, 512, 6, 2, 32, 32], true),
];

/// Several tiles for a block all the same, the last with a tail, of few elements: more panels of 128 columns than half of
/// the multiprocessors of an H100 leave each panel one block. No more than 64 heads, which the norm's own kernel takes.
const PANELS: (Sizes, bool) = ([1, 130, 8, 46, 46, 64, 64], true);

/// Multiply-adds of the largest product of a call with that input.
fn work([batch, time, width, heads, groups, size, _]: Sizes) -> usize {
    batch * time * (width * (heads + 2 * groups)).max(time * heads) * size
}

const EPS: [f64; 3] = [1.192_092_895_507_812_5e-7, 1e-5, 0.1];

struct HeadsAgainstTheHost;

impl Job for HeadsAgainstTheHost {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        println!("\nheads, {} {precision}", target.label);
        let many = if precision == Precision::Bf16 { &MANY[..] } else { &[] };
        let mut good = true;
        let panels = many.first().map(|_| PANELS);
        for (number, (sizes, gain)) in FEW.iter().chain(many).chain(&panels).copied().enumerate() {
            let [batch, time, width, heads, groups, size, _] = sizes;
            // Of `PANELS` the elements: its sums are of eight terms.
            let terms = if (sizes, gain) == PANELS { 1 } else { width };
            if !affordable(batch * time * terms * (heads + 2 * groups) * size) {
                continue;
            }
            let scales = [1.0, 30.0, 1e-3, 1.0, 0.0, 1.0];
            let case = Case::new(sizes, EPS[number % 3], gain, &scales, precision, number as u64);
            let exact = case.projected(&|x| x);
            let low = case.projected(&|x| round(x, precision));
            let on_device = Uploaded::<B>::new(&case, device, precision);
            let found = on_device.heads(&on_device.x);
            let mut ledger = Ledger { target, case: format!("{sizes:?}"), terms: sizes[2], good: true };
            for (which, what) in ["q", "k", "v"].into_iter().enumerate() {
                ledger.check_heads(what, [&found.0[which], &low.0[which], &exact.0[which]], sizes[5]);
            }
            for (which, what) in ["q normed", "k normed"].into_iter().enumerate() {
                ledger.check_heads(what, [&found.1[which], &low.1[which], &exact.1[which]], sizes[5]);
            }
            good &= ledger.good;
            for _ in 0..repeats() {
                let again = on_device.heads(&on_device.x);
                let all_same = again.0.iter().zip(&found.0).chain(again.1.iter().zip(&found.1));
                assert!(all_same.into_iter().all(|(a, b)| same(a, b)), "{sizes:?}: other bits");
            }
            // What was normed is what was given as projected, to its last bit: the norm's own kernel makes the same of it,
            // but for the order of its sums.
            let Heads { before: [q, k], normed, .. } =
                B::project_heads(on_device.x.clone(), on_device.weights.each_ref(), &on_device.how);
            let again = B::qk_norm(q, k, &on_device.how);
            for (a, b) in normed.map(download).iter().zip(again.map(download)) {
                // A rotation's terms may cancel: what is left then has the f32 roundings of the largest.
                let largest = b.iter().fold(0.0, |largest: f64, b| largest.max(b.abs()));
                let least = 8.0 * f64::from(f32::EPSILON) * largest;
                let bound = |a: &f64, b: &f64| epsilon(precision) * a.abs().max(b.abs()) + least;
                let near = a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= bound(a, b));
                let others = a.iter().zip(&b).filter(|(a, b)| a != b).count();
                assert!(near && others * 100 <= a.len() + 100, "{sizes:?}: {others} of {} differ", a.len());
            }
        }
        Ok(good)
    }
}

#[test]
fn projected_heads_agree_with_the_host() {
    all_pass(|| HeadsAgainstTheHost);
}

struct AttentionAgainstTheHost;

impl Job for AttentionAgainstTheHost {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        println!("\nattention, {} {precision}", target.label);
        let few = [
            ([2, 9, 24, 2, 1, 32, 16], true),
            ([1, 70, 40, 4, 2, 64, 64], true),
            ([2, 67, 64, 3, 1, 64, 16], true),
            ([1, 33, 16, 2, 2, 128, 128], false),
            ([1, 12, 20, 2, 1, 10, 4], true),
        ];
        let many = [([3, 150, 256, 8, 4, 64, 64], true), ([2, 129, 512, 4, 2, 64, 0], false)];
        let many = if precision == Precision::Bf16 { &many[..] } else { &[] };
        let mut good = true;
        for (number, (sizes, gain)) in few.iter().chain(many).copied().enumerate() {
            if !affordable(work(sizes)) {
                continue;
            }
            let case = Case::new(sizes, EPS[number % 3], gain, &[1.0, 0.5, 2.0], precision, number as u64);
            let (exact, low) = (case.results(&|x| x), case.results(&|x| round(x, precision)));
            let on_device = Uploaded::<B>::new(&case, device, precision);
            let found = on_device.through_the_tape(false);
            let [batch, time, width, heads, groups, size, _] = sizes;
            let terms = (batch * time).max(width).max((heads + 2 * groups) * size);
            let mut ledger = Ledger { target, case: format!("{sizes:?}"), terms, good: true };
            ledger.check_tensor("y", [&found[0], &low.y, &exact.y], size);
            ledger.check_tensor("gx", [&found[1], &low.grad_x, &exact.grad_x], width);
            for (which, what) in ["gw q", "gw k", "gw v"].into_iter().enumerate() {
                let tensors = [&found[2 + which], &low.grad_weights[which], &exact.grad_weights[which]];
                ledger.check_tensor(what, tensors.map(Vec::as_slice), width);
            }
            if gain {
                let tensors = [&found[5], &low.grad_gain, &exact.grad_gain];
                ledger.check("gain", tensors.map(Vec::as_slice), heads, &[exact.gain_scale]);
            }
            good &= ledger.good;
            for _ in 0..repeats() {
                let again = on_device.through_the_tape(false);
                assert!(again.iter().zip(&found).all(|(a, b)| same(a, b)), "{sizes:?}: other bits");
            }
            // Without a tape, the same output.
            let (weights, how) = (on_device.weights.each_ref(), &on_device.how);
            let y =
                B::projected_attention(on_device.x.clone(), weights, how, &Mask::causal(), on_device.scale);
            assert!(same(&download(y), &found[0]), "{sizes:?}: another output without a tape");
        }
        Ok(good)
    }
}

#[test]
fn projected_attention_agrees_with_the_host() {
    all_pass(|| AttentionAgainstTheHost);
}

struct AgainstItsParts;

impl Job for AgainstItsParts {
    type Output = ();

    /// The same bits as its parts one after the other, but where the projection's epilogue norms, and as its explicit
    /// backward; frozen weights and a frozen gain get no gradient and change no other.
    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        for (number, sizes) in [[2, 30, 40, 4, 2, 64, 64], [1, 12, 20, 2, 1, 10, 4]].into_iter().enumerate() {
            let case = Case::new(sizes, 1e-5, true, &[1.0], target.precision, number as u64);
            let on_device = Uploaded::<B>::new(&case, device, target.precision);
            let together = on_device.through_the_tape(false);
            let what = format!("{sizes:?} on {} {}", target.label, target.precision);
            if target.precision != Precision::Bf16 || number == 1 {
                let apart = on_device.through_the_tape(true);
                assert!(apart.iter().zip(&together).all(|(a, b)| same(a, b)), "{what}: not its parts");
            }
            let explicit = on_device.explicit_backward();
            assert!(
                explicit.iter().zip(&together).all(|(a, b)| same(a, b)),
                "{what}: not the explicit backward"
            );
            on_device.weights[1].set_trainable(false);
            on_device.how.gain.as_ref().expect("a gain").set_trainable(false);
            let mut frozen = on_device.through_the_tape(false);
            assert!(on_device.weights[1].take_flat_grad().is_none(), "{what}: a frozen weight's gradient");
            assert!(
                on_device.gain.as_ref().expect("a gain").take_flat_grad().is_none(),
                "{what}: a frozen gain's"
            );
            frozen.insert(3, together[3].clone());
            assert_eq!(frozen.len(), 5, "{what}");
            for (index, (a, b)) in frozen.iter().zip(&together).enumerate() {
                // A frozen weight's neighbours are not added to as one matrix.
                let scale = dot(b, b).sqrt() / (b.len() as f64).sqrt();
                let worst = worst(a, b, b.len(), |_| scale);
                assert!(worst.error <= 64.0 * f64::from(f32::EPSILON), "{what}, {index}: {worst:?}");
            }
        }
        Ok(())
    }
}

#[test]
fn it_is_its_parts_one_after_the_other() {
    for target in targets() {
        guard(&target, || run(&target, AgainstItsParts)).unwrap();
    }
}

struct Views;

impl Job for Views {
    type Output = ();

    /// An input within a wider matrix, at a whole number of loads and not, and a table that goes on from earlier positions.
    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let precision = target.precision;
        let sizes: Sizes = [2, 45, 64, 2, 1, 64, 32];
        let [batch, time, width, .., rotated] = sizes;
        let case = Case::new(sizes, 1e-5, true, &[1.0], precision, 7);
        let mut on_device = Uploaded::<B>::new(&case, device, precision);
        let wide = accumulate_type(precision.dtype());
        on_device.how.rope = RopeTable::new(5, time, rotated, BASE, device, wide);
        let dense = on_device.heads(&on_device.x);
        on_device.how.rope = RopeTable::new(0, time + 9, rotated, BASE, device, wide).range(5, time);
        for before in [0, 8, 1] {
            let side = upload::<B, 2>(
                &vec![0.5; batch * time * before.max(1)],
                [batch * time, before.max(1)],
                device,
                precision,
            );
            let parts = if before == 0 {
                vec![on_device.x.clone(), side]
            } else {
                vec![side.clone(), on_device.x.clone(), side]
            };
            let view = Tensor::cat(parts, 1).narrow(1, before, width);
            let again = on_device.heads(&view);
            for (a, b) in again.0.iter().zip(&dense.0).chain(again.1.iter().zip(&dense.1)) {
                let scale = b.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
                let worst = worst(a, b, b.len(), |_| scale);
                let what = format!("{before} columns before, on {} {precision}", target.label);
                assert!(worst.error <= 8.0 * epsilon(precision), "{what}: {worst:?}");
            }
        }
        Ok(())
    }
}

#[test]
fn any_layout_of_the_input_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}
