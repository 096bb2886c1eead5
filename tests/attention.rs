//! Attention on every device: forward and backward, with windows and documents, against a computation in f64 on the
//! host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the reference's own arithmetic, carried out on the host with
//! inputs and intermediates rounded to the device's precision and f32 sums, for the root of the mean square and for the
//! worst element alike. The least is the rounding of the result itself.

mod common;

use burn::tensor::{Int, Tensor, TensorData};
use common::{
    Random, affordable, all_pass, download, epsilon, errors, repeats, root_mean_square, round, same, targets,
    upload,
};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::attention::{Attended, Mask};
use fairway::ops::{AttentionOps, Autodiff, Plain};

#[derive(Debug, Clone, Copy)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    groups: usize,
    size: usize,
    window: Option<usize>,
    documents: bool,
}

const fn sizes(
    [batch, queries, keys, heads, groups, size]: [usize; 6],
    window: Option<usize>,
    documents: bool,
) -> Sizes {
    Sizes { batch, queries, keys, heads, groups, size, window, documents }
}

/// Around the edges of the kernels' tiles (32, 64, 128, 192), continued from a cache, with every head size that they take
/// and some that they do not, windows shorter and longer than a block and than the sequence, documents, and both.
const CASES: [Sizes; 43] = [
    sizes([1, 1, 1, 1, 1, 64], None, false),
    sizes([2, 7, 7, 4, 2, 32], None, false),
    sizes([1, 63, 63, 3, 3, 64], None, false),
    sizes([2, 64, 64, 2, 1, 64], None, false),
    sizes([1, 65, 65, 2, 2, 128], None, false),
    sizes([1, 127, 127, 4, 1, 32], None, false),
    sizes([1, 128, 128, 1, 1, 64], None, false),
    sizes([1, 129, 129, 2, 1, 64], None, false),
    sizes([1, 193, 193, 2, 1, 128], None, false),
    sizes([1, 192, 192, 8, 4, 64], None, false),
    sizes([2, 333, 333, 8, 2, 64], None, false),
    sizes([1, 700, 700, 2, 1, 64], None, false),
    sizes([1, 300, 300, 2, 2, 128], None, false),
    sizes([1, 300, 300, 4, 2, 32], None, false),
    sizes([2, 1, 77, 4, 2, 64], None, false),
    sizes([2, 5, 300, 4, 2, 64], None, false),
    sizes([1, 129, 500, 2, 1, 128], None, false),
    sizes([1, 200, 201, 2, 1, 32], None, false),
    sizes([1, 300, 300, 2, 1, 64], Some(1), false),
    sizes([1, 300, 300, 2, 1, 64], Some(17), false),
    sizes([1, 500, 500, 2, 1, 64], Some(130), false),
    sizes([1, 130, 300, 2, 1, 128], Some(4096), false),
    sizes([3, 400, 400, 2, 1, 64], None, true),
    sizes([2, 130, 400, 4, 2, 32], None, true),
    sizes([2, 400, 400, 2, 1, 64], Some(100), true),
    sizes([1, 300, 300, 2, 2, 128], Some(150), true),
    sizes([2, 70, 70, 6, 3, 24], Some(20), true),
    sizes([1, 1, 1, 2, 1, 16], None, false),
    sizes([1, 131, 131, 4, 1, 16], None, false),
    sizes([2, 70, 200, 4, 2, 16], Some(40), true),
    sizes([1, 33, 97, 3, 1, 128], None, true),
    sizes([1, 97, 97, 2, 1, 128], Some(33), false),
    sizes([1, 257, 257, 2, 2, 32], Some(64), false),
    sizes([1, 3, 150, 4, 4, 32], Some(2), false),
    // Small ones of several blocks with documents, and with a window too.
    sizes([1, 150, 150, 2, 1, 64], None, true),
    sizes([1, 97, 150, 2, 1, 32], None, true),
    sizes([1, 140, 140, 2, 1, 64], Some(100), true),
    sizes([1, 90, 90, 2, 2, 128], Some(50), true),
    sizes([1, 130, 130, 2, 1, 32], Some(70), true),
    // Small ones of several blocks of queries and of keys, and of so many heads that an H100's multiprocessors each have
    // several.
    sizes([1, 193, 193, 1, 1, 64], None, false),
    sizes([1, 130, 130, 1, 1, 128], None, false),
    sizes([25, 9, 9, 16, 8, 64], None, false),
    sizes([25, 7, 7, 16, 16, 128], None, false),
];

impl Sizes {
    /// Multiply-adds of a product, without the keys that a window hides.
    fn work(&self) -> usize {
        let Self { batch, queries, keys, heads, size, window, .. } = *self;
        batch * queries * keys.min(window.unwrap_or(keys)) * heads * size
    }
}

/// What a result is made of: rounding of results, and of every step of a sum.
#[derive(Clone, Copy)]
struct Arithmetic {
    narrow: Precision,
    wide: Precision,
}

impl Arithmetic {
    fn exact() -> Self {
        Self { narrow: Precision::F64, wide: Precision::F64 }
    }

    /// What the ops' contract asks for in that precision: sums in f32 (f64 for f64).
    fn of(narrow: Precision) -> Self {
        let wide = if narrow == Precision::F64 { Precision::F64 } else { Precision::F32 };
        Self { narrow, wide }
    }

    fn narrow(self, x: f64) -> f64 {
        round(x, self.narrow)
    }

    fn wide(self, x: f64) -> f64 {
        round(x, self.wide)
    }

    fn dot(self, a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
        a.zip(b).fold(0.0, |sum, (a, b)| self.wide(sum + a * b))
    }
}

/// Inputs, output gradient and document starts; values that the precision has.
struct Case {
    sizes: Sizes,
    scale: f64,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    grad: Vec<f64>,
    starts: Vec<i64>,
}

/// `y`, the logarithms of the sums, and the gradients of q, k and v.
struct Results {
    y: Vec<f64>,
    log_sums: Vec<f64>,
    grads: [Vec<f64>; 3],
}

impl Case {
    fn new(sizes: Sizes, precision: Precision, seed: u64) -> Self {
        let Sizes { batch, queries, keys, heads, groups, size, .. } = sizes;
        let mut random = Random(seed);
        // Uniform numbers times 2 have scores of some units, so that rows are neither flat nor of one key.
        let mut values =
            |n: usize| -> Vec<f64> { (0..n).map(|_| round(2.0 * random.uniform(), precision)).collect() };
        let (of_queries, of_keys) = (batch * queries * heads * size, batch * keys * groups * size);
        let (q, k, v) = (values(of_queries), values(of_keys), values(of_keys));
        let grad = values(of_queries);
        let mut starts = vec![0; batch * keys];
        for at in 0..batch * keys {
            let position = at % keys;
            // Some four documents a sequence, a position of its own among them.
            let begins = random.uniform().abs() < 4.0 / keys as f64
                || position == keys / 2
                || position == keys / 2 + 1;
            starts[at] = match position {
                0 => 0,
                _ if begins => position as i64,
                _ => starts[at - 1],
            };
        }
        Self { sizes, scale: 1.0 / (size as f64).sqrt(), q, k, v, grad, starts }
    }

    /// The first key that a query sees, and its own position.
    fn seen(&self, batch: usize, query: usize) -> (usize, usize) {
        let Sizes { queries, keys, window, documents, .. } = self.sizes;
        let position = query + keys - queries;
        let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
        let start = if documents { self.starts[batch * keys + position] as usize } else { 0 };
        (first.max(start), position)
    }

    /// As the reference computes, step by step, in the given arithmetic.
    fn results(&self, on: Arithmetic) -> Results {
        let Sizes { batch, queries, keys, heads, groups, size, .. } = self.sizes;
        let mut y = vec![0.0; self.q.len()];
        let mut log_sums = vec![0.0; batch * heads * queries];
        let mut grad_q = vec![0.0; self.q.len()];
        let mut grad_k = vec![0.0; self.k.len()];
        let mut grad_v = vec![0.0; self.k.len()];
        for (b, head, query) in (0..batch)
            .flat_map(|b| (0..heads).flat_map(move |head| (0..queries).map(move |query| (b, head, query))))
        {
            let (first, last) = self.seen(b, query);
            let row = ((b * queries + query) * heads + head) * size;
            let of_key = |key: usize| ((b * keys + key) * groups + head / (heads / groups)) * size;
            let q: Vec<f64> = self.q[row..row + size].iter().map(|q| on.narrow(q * self.scale)).collect();
            let key = |key: usize| self.k[of_key(key)..][..size].iter().copied();
            let value = |key: usize| self.v[of_key(key)..][..size].iter().copied();
            let scores: Vec<f64> = (first..=last).map(|j| on.dot(q.iter().copied(), key(j))).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exp: Vec<f64> = scores.iter().map(|score| on.wide(on.wide(score - top).exp())).collect();
            let sum = exp.iter().fold(0.0, |sum, e| on.wide(sum + e));
            let inverse = on.wide(1.0 / sum);
            log_sums[(b * heads + head) * queries + query] = top + sum.ln();
            let of_column = |c: usize| (first..=last).map(move |j| self.v[of_key(j) + c]);
            for c in 0..size {
                let product = on.dot(exp.iter().map(|e| on.narrow(*e)), of_column(c));
                y[row + c] = on.narrow(on.wide(product * inverse));
            }
            let grad: Vec<f64> = self.grad[row..row + size].iter().map(|g| on.wide(g * inverse)).collect();
            let delta = on.dot(grad.iter().copied(), y[row..row + size].iter().copied());
            let grad: Vec<f64> = grad.into_iter().map(|g| on.narrow(g)).collect();
            let mut of_q = vec![0.0; size];
            for (j, e) in (first..=last).zip(&exp) {
                let of_score = on.wide(on.dot(grad.iter().copied(), value(j)) - delta);
                let of_score = on.narrow(on.wide(of_score * e));
                for c in 0..size {
                    let at = of_key(j) + c;
                    grad_v[at] = on.wide(grad_v[at] + on.narrow(*e) * grad[c]);
                    grad_k[at] = on.wide(grad_k[at] + of_score * q[c]);
                    of_q[c] = on.wide(of_q[c] + of_score * self.k[at]);
                }
            }
            for c in 0..size {
                grad_q[row + c] = on.narrow(on.wide(of_q[c] * self.scale));
            }
        }
        let narrow = |x: Vec<f64>| x.into_iter().map(|x| on.narrow(x)).collect();
        Results { y, log_sums, grads: [grad_q, narrow(grad_k), narrow(grad_v)] }
    }
}

/// Prints the share of the tolerance that a result uses; whether it is within. `low` and `own` are the reference's: with
/// everything rounded to the precision, and with sums as the CPU adds them in f32.
fn check(what: &str, got: &[f64], exact: &[f64], [low, own]: [&[f64]; 2], precision: Precision) -> bool {
    let ([rms, worst], at) = errors(got, exact);
    let (low, own) = (errors(low, exact).0, errors(own, exact).0);
    let low = [low[0].max(own[0]), low[1].max(own[1])];
    // What may cancel to nothing has the scale of what it is made of, in bf16 a hundredth: that is summed in f32.
    let least = if precision == Precision::Bf16 { 1e-2 } else { 1.0 };
    let largest = exact.iter().fold(least, |largest: f64, x| largest.max(x.abs()));
    let size = root_mean_square(exact).max(least);
    // Half a unit of the largest element; in f64 and f32 sums in another order are off by some units.
    let [of_rms, of_worst] = match precision {
        Precision::Bf16 => [0.125, 0.5],
        Precision::F32 => [4.0, 16.0],
        Precision::F64 => [16.0, 64.0],
    };
    let tolerances = [
        (2.0 * low[0]).max(of_rms * epsilon(precision) * size),
        (2.0 * low[1]).max(of_worst * epsilon(precision) * largest),
    ];
    let shares = [rms / tolerances[0], worst / tolerances[1]];
    let within = shares.iter().all(|share| *share <= 1.0);
    println!(
        "    {what:<9} rms {rms:>9.2e} {:>4.0}%   worst {worst:>9.2e} {:>4.0}%  [{at}]: {:.6e}, expected {:.6e}{}",
        100.0 * shares[0],
        100.0 * shares[1],
        got[at],
        exact[at],
        if within { "" } else { "  FAILED" }
    );
    within
}

/// A case's tensors on a device.
struct Uploaded<B: Plain> {
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    grad: Tensor<B, 4>,
    mask: Mask<B>,
    scale: f64,
}

impl<B: Plain> Uploaded<B> {
    fn new(case: &Case, device: &B::Device, precision: Precision) -> Self {
        let Sizes { batch, queries, keys, heads, groups, size, window, documents } = case.sizes;
        let of_queries = |x| upload(x, [batch, queries, heads, size], device, precision);
        let of_keys = |x| upload(x, [batch, keys, groups, size], device, precision);
        let starts = documents.then(|| {
            let data = TensorData::new(case.starts.clone(), [batch, keys]);
            Tensor::<B, 2, Int>::from_data(data.convert::<B::IntElem>(), device)
        });
        Self {
            q: of_queries(&case.q),
            k: of_keys(&case.k),
            v: of_keys(&case.v),
            grad: of_queries(&case.grad),
            mask: Mask { window, documents: starts },
            scale: case.scale,
        }
    }

    /// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
    fn poison(&self) {
        let poison = [&self.q, &self.k, &self.v, &self.grad].map(|x| x.full_like(f32::NAN));
        drop(poison);
        let device = self.q.device();
        drop(Tensor::<B, 1>::full([self.q.shape().num_elements() * 4 + 4096], f32::NAN, &device));
    }

    fn forward(&self) -> (Tensor<B, 4>, Option<Tensor<B, 3>>) {
        self.poison();
        B::attention_forward(self.q.clone(), self.k.clone(), self.v.clone(), &self.mask, self.scale)
    }

    fn backward(&self, y: Tensor<B, 4>, log_sums: Option<Tensor<B, 3>>) -> [Vec<f64>; 3] {
        self.poison();
        let (q, k, v) = (self.q.clone(), self.k.clone(), self.v.clone());
        let attended = Attended { q, k, v, y, log_sums };
        B::attention_backward(attended, self.grad.clone(), &self.mask, self.scale).map(download)
    }
}

/// Whether kernels of ours run there for heads of that size whatever the card is (128 channels in f32 take more shared
/// memory than small cards have).
fn has_kernels(target: &Target, size: usize) -> bool {
    let in_f32 = target.precision == Precision::F32 && matches!(size, 16 | 32 | 64);
    matches!(target.choice, DeviceChoice::Cuda(_)) && in_f32
}

struct AgainstTheHost;

impl Job for AgainstTheHost {
    /// Whether all results were within their tolerance.
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let mut good = true;
        println!("\n{} {precision}", target.label);
        for (number, sizes) in CASES.into_iter().enumerate() {
            if !affordable(sizes.work()) {
                continue;
            }
            let case = Case::new(sizes, precision, number as u64);
            let (exact, low) = (case.results(Arithmetic::exact()), case.results(Arithmetic::of(precision)));
            let on_device = Uploaded::<B>::new(&case, device, precision);
            let (y, log_sums) = on_device.forward();
            let grads = on_device.backward(y.clone(), log_sums.clone());
            println!("  {sizes:?}");
            assert!(log_sums.is_some() || !has_kernels(target, sizes.size), "{sizes:?}: no kernel took it");
            let y_values = download(y.clone());
            // In f64 the host's own is no better a measure.
            let own = (precision != Precision::F64).then(|| {
                let case = Uploaded::<Cpu>::new(&case, &burn_ndarray::NdArrayDevice::Cpu, Precision::F32);
                let (y, log_sums) = case.forward();
                (download(y.clone()), case.backward(y, log_sums))
            });
            let own = own.unwrap_or_else(|| (low.y.clone(), low.grads.clone()));
            good &= check("y", &y_values, &exact.y, [&low.y, &own.0], precision);
            for (i, name) in ["grad q", "grad k", "grad v"].into_iter().enumerate() {
                good &= check(name, &grads[i], &exact.grads[i], [&low.grads[i], &own.1[i]], precision);
            }
            let sums_values = log_sums.clone().map(download);
            if let Some(got) = &sums_values {
                // In f32, from products of the precision's numbers.
                let worst = errors(got, &exact.log_sums).0[1];
                println!("    log sums  worst {worst:.2e} of 2e-5");
                good &= worst <= 2e-5;
            }
            for _ in 0..repeats() {
                let (again, sums) = on_device.forward();
                assert!(same(&download(again), &y_values), "{sizes:?}: y differs");
                assert!(sums.map(download) == sums_values, "{sizes:?}: the log sums differ");
                let again = on_device.backward(y.clone(), log_sums.clone());
                assert!(again.iter().zip(&grads).all(|(a, b)| same(a, b)), "{sizes:?}: gradients differ");
            }
        }
        Ok(good)
    }
}

#[test]
fn every_device_agrees_with_the_host() {
    all_pass(|| AgainstTheHost);
}

struct ThroughAutodiff;

impl Job for ThroughAutodiff {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        for number in [10, 16, 20, 24, 36] {
            if !affordable(CASES[number].work()) {
                continue;
            }
            let case = Case::new(CASES[number], target.precision, 3);
            let plain = Uploaded::<B>::new(&case, device, target.precision);
            let track = |x: &Tensor<B, 4>| Tensor::<Autodiff<B>, 4>::from_inner(x.clone()).require_grad();
            let inputs = [&plain.q, &plain.k, &plain.v].map(track);
            let [q, k, v] = inputs.clone();
            let mask = Mask {
                window: plain.mask.window,
                documents: plain.mask.documents.clone().map(Tensor::from_inner),
            };
            let (y, none) = Autodiff::<B>::attention_forward(q, k, v, &mask, plain.scale);
            assert!(none.is_none(), "the log sums are no tracked output");
            let (expected, log_sums) = plain.forward();
            assert!(same(&download(y.clone().inner()), &download(expected.clone())), "{:?}", CASES[number]);
            let grads = (y * Tensor::from_inner(plain.grad.clone())).sum().backward();
            let explicit = plain.backward(expected, log_sums);
            for (x, explicit) in inputs.iter().zip(explicit) {
                let through = download(x.grad(&grads).expect("a gradient of each input"));
                assert!(same(&through, &explicit), "{:?} on {}", CASES[number], target.label);
            }
        }
        Ok(())
    }
}

#[test]
fn the_tape_gives_the_explicit_backward() {
    for target in targets() {
        guard(&target, || run(&target, ThroughAutodiff)).unwrap();
    }
}

/// Heads that lie in memory otherwise than dense ones: the results are the same bits where the device reads the same
/// numbers, so any layout that a kernel takes the wrong way shows.
struct Views {
    batch: usize,
    time: usize,
}

impl Job for Views {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let (precision, Self { batch, time }) = (target.precision, self);
        let sizes = sizes([batch, time, time, 8, 4, 64], None, false);
        if !affordable(sizes.work()) {
            return Ok(());
        }
        let case = Case::new(sizes, precision, 5);
        let dense = Uploaded::<B>::new(&case, device, precision);
        let (y, log_sums) = dense.forward();
        let grads = dense.backward(y.clone(), log_sums.clone());
        // Columns of one packed projection; sequences and positions swapped; heads and positions swapped.
        let packed = |which: usize| {
            let rows = |x: &Tensor<B, 4>| {
                let [batch, time, heads, size] = x.dims();
                x.clone().reshape([batch * time, heads * size])
            };
            let all = Tensor::cat(vec![rows(&dense.q), rows(&dense.k), rows(&dense.v)], 1);
            let (start, heads) = [(0, 8), (512, 4), (768, 4)][which];
            all.narrow(1, start, heads * 64).reshape([batch, time, heads, 64])
        };
        // Through memory: a copy with those sizes swapped, and swapped back without one.
        let swapped = |x: &Tensor<B, 4>, a: usize, b: usize| {
            let there = x.clone().swap_dims(a, b);
            upload::<B, 4>(&download(there.clone()), there.dims(), device, precision).swap_dims(a, b)
        };
        let layouts: [(&str, [Tensor<B, 4>; 3]); 3] = [
            ("packed", [0, 1, 2].map(packed)),
            ("sequences and positions", [&dense.q, &dense.k, &dense.v].map(|x| swapped(x, 0, 1))),
            ("positions and heads", [&dense.q, &dense.k, &dense.v].map(|x| swapped(x, 1, 2))),
        ];
        for (name, [q, k, v]) in layouts {
            let view = Uploaded {
                q,
                k,
                v,
                grad: swapped(&dense.grad, 1, 2),
                mask: Mask::causal(),
                scale: dense.scale,
            };
            let (again, sums) = view.forward();
            let what = format!("{name} on {} {precision}", target.label);
            // Not to the bit on every device: Burn sums a view in another order on the CPU.
            let near = |got: &[f64], expected: &[f64]| {
                let ([_, worst], at) = errors(got, expected);
                let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
                assert!(worst <= 32.0 * epsilon(precision) * largest, "{what}: {worst:.2e} at {at}");
            };
            near(&download(again.clone()), &download(y.clone()));
            for (got, expected) in view.backward(again, sums).iter().zip(&grads) {
                near(got, expected);
            }
            if log_sums.is_some() {
                let (again, sums) = view.forward();
                assert!(same(&download(again.clone()), &download(y.clone())), "{what}: y");
                let equal = view.backward(again, sums).iter().zip(&grads).all(|(a, b)| same(a, b));
                assert!(equal, "{what}: gradients");
            }
        }
        Ok(())
    }
}

#[test]
fn any_layout_of_the_inputs_gives_the_same() {
    for target in targets() {
        for [batch, time] in [[3, 200], [2, 37]] {
            guard(&target, || run(&target, Views { batch, time })).unwrap();
        }
    }
}

/// A window as long as the sequence, and one document, are plain causal attention; a document alone is itself.
struct MasksThatHideNothing;

impl Job for MasksThatHideNothing {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let sizes = sizes([2, 150, 150, 2, 1, 64], None, false);
        if !affordable(sizes.work()) {
            return Ok(());
        }
        let case = Case::new(sizes, target.precision, 9);
        let plain = Uploaded::<B>::new(&case, device, target.precision);
        let y = download(plain.forward().0);
        let starts = Tensor::<B, 2, Int>::zeros([2, 150], device);
        for mask in [
            Mask { window: Some(150), documents: None },
            Mask { window: Some(usize::MAX), documents: None },
            Mask { window: None, documents: Some(starts.clone()) },
            Mask { window: Some(150), documents: Some(starts.clone()) },
        ] {
            let masked = Uploaded { mask, ..Uploaded::<B>::new(&case, device, target.precision) };
            let ([_, worst], at) = errors(&download(masked.forward().0), &y);
            assert!(worst <= 2.0 * epsilon(target.precision), "{worst:.2e} at {at} on {}", target.label);
        }
        // The second half as a document of its own is attention over that half alone.
        let halves = Tensor::cat(
            vec![
                Tensor::<B, 2, Int>::zeros([2, 75], device),
                Tensor::<B, 2, Int>::ones([2, 75], device).mul_scalar(75),
            ],
            1,
        );
        let mask = Mask { window: None, documents: Some(halves) };
        let masked = Uploaded { mask, ..Uploaded::<B>::new(&case, device, target.precision) };
        let half = |x: &Tensor<B, 4>| x.clone().narrow(1, 75, 75);
        let alone = B::causal_attention(half(&masked.q), half(&masked.k), half(&masked.v), masked.scale);
        let together = half(&masked.forward().0);
        let ([_, worst], at) = errors(&download(together), &download(alone));
        assert!(worst <= 4.0 * epsilon(target.precision), "{worst:.2e} at {at} on {}", target.label);
        Ok(())
    }
}

#[test]
fn masks_that_hide_nothing_change_nothing() {
    for target in targets() {
        guard(&target, || run(&target, MasksThatHideNothing)).unwrap();
    }
}

/// The longest sequences, on devices with kernels for them: the last queries, and the gradients of the last keys, which
/// only those see, are what they are by themselves after a cache of all others.
struct LongSequences;

/// Queries that are compared.
const TAIL: usize = 5;

impl Job for LongSequences {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        if !matches!(target.choice, DeviceChoice::Cuda(_)) {
            println!("skipped: {}: long sequences take it too long", target.label);
            return Ok(true);
        }
        let precision = target.precision;
        let (time, heads, size) = (32_768, 2, 64);
        if !affordable(sizes([1, time, time, heads, 1, size], None, false).work()) {
            return Ok(true);
        }
        let mut good = true;
        let mut causal = None;
        for (window, documents) in [(None, false), (Some(20_000), false), (None, true), (Some(300), true)] {
            let whole = Case::new(sizes([1, time, time, heads, 1, size], window, documents), precision, 11);
            let last = |x: &[f64], row: usize| x[x.len() - TAIL * row..].to_vec();
            let tail = Case {
                sizes: sizes([1, TAIL, time, heads, 1, size], window, documents),
                scale: whole.scale,
                q: last(&whole.q, heads * size),
                k: whole.k.clone(),
                v: whole.v.clone(),
                grad: last(&whole.grad, heads * size),
                starts: whole.starts.clone(),
            };
            let (exact, low) = (tail.results(Arithmetic::exact()), tail.results(Arithmetic::of(precision)));
            let on_device = Uploaded::<B>::new(&whole, device, precision);
            let (y, log_sums) = on_device.forward();
            let grads = on_device.backward(y.clone(), log_sums);
            let y = download(y);
            println!(
                "  {} {precision}: {time} positions, window {window:?}, documents {documents}",
                target.label
            );
            good &= check("y", &last(&y, heads * size), &exact.y, [&low.y, &low.y], precision);
            for (i, name) in ["grad q", "grad k", "grad v"].into_iter().enumerate() {
                let row = if i == 0 { heads * size } else { size };
                let [got, exact, low] = [&grads[i], &exact.grads[i], &low.grads[i]].map(|x| last(x, row));
                good &= check(name, &got, &exact, [&low, &low], precision);
            }
            assert!(y.iter().chain(grads.iter().flatten()).all(|x| x.is_finite()));
            causal.get_or_insert_with(|| [vec![y], grads.to_vec()].concat());
        }
        // One document of everything goes another way to the same numbers.
        let whole = Case::new(sizes([1, time, time, heads, 1, size], None, false), precision, 11);
        let starts = Tensor::<B, 2, Int>::zeros([1, time], device);
        let mask = Mask { window: None, documents: Some(starts) };
        let masked = Uploaded { mask, ..Uploaded::<B>::new(&whole, device, precision) };
        let (y, log_sums) = masked.forward();
        let grads = masked.backward(y.clone(), log_sums);
        for (got, expected) in
            [vec![download(y)], grads.to_vec()].concat().iter().zip(causal.iter().flatten())
        {
            let ([_, worst], at) = errors(got, expected);
            let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
            println!("    one document: {worst:.2e} of {largest:.2e} at {at}");
            good &= worst <= 4.0 * epsilon(precision) * largest;
        }
        Ok(good)
    }
}

#[test]
fn the_longest_sequences_end_as_they_do_alone() {
    all_pass(|| LongSequences);
}
