//! Softcapped cross-entropy on every device: losses and gradients against a computation in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the reference, in f32 on the CPU and on the device, and with the
//! gradient of the logits and that of `h` rounded to the device's precision; at least twice the distance between
//! neighbouring numbers.
//! Errors are shares of a row's scale: for a loss what its largest logit adds up in magnitude, for `gh` and `gw` what
//! the largest of their sums does, each term with its condition (an exponential of `z` is off by as many last places as
//! `z` has units, `1 - tanh^2` by one of `tanh`). Losses of bf16 rows may also be off by what tensor cores truncate: a
//! last place of f32 for each 16 terms. WGSL promises exp to 3 + 2|x| units in the last place, and tanh as a quotient of
//! such: on wgpu the tolerance is 2^-18 at least.

mod common;

use burn::tensor::{DType, Int, Tensor, TensorData};
use common::{Random, Worst, affordable, all_pass, download, epsilon, repeats, round, same};
use common::{targets, upload, worst};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::{Autodiff, CrossEntropyOps, Param, Plain, cross_entropy};

/// Rows, vocabulary, columns and cap: vectors and not, a warp and a block for a row, tails of all of these.
const SHAPES: [([usize; 3], Option<f64>); 12] = [
    ([1, 2, 1], None),
    ([3, 5, 7], Some(0.7)),
    ([13, 37, 3], None),
    ([70, 1024, 64], Some(30.0)),
    ([33, 1000, 24], Some(3.0)),
    ([9, 1001, 40], Some(30.0)),
    ([129, 1024, 512], Some(30.0)),
    ([31, 2049, 16], Some(20.0)),
    ([17, 4096, 128], None),
    ([300, 300, 300], Some(15.0)),
    // More than CUDA's chunk of logits.
    ([1100, 8192, 8], Some(30.0)),
    ([19, 4096, 32], Some(30.0)),
];

/// More than CUDA's group of chunks, with a tail; minutes on the other devices.
const GROUPS: [([usize; 3], Option<f64>); 2] =
    [([33_001, 1024, 16], Some(30.0)), ([4500, 8192, 8], Some(4.0))];

struct Case {
    rows: usize,
    vocab: usize,
    columns: usize,
    cap: Option<f64>,
    h: Vec<f64>,
    w: Vec<f64>,
    targets: Vec<i32>,
    grad: Vec<f64>,
}

/// What the op gives, row-major.
struct Found {
    nll: Vec<f64>,
    grad_h: Vec<f64>,
    grad_w: Vec<f64>,
}

/// [`Found`] on the host; the same with roundings; and each row's scale.
struct Exact {
    found: Found,
    rounded: Found,
    scales: [Vec<f64>; 3],
}

impl Case {
    fn new([rows, vocab, columns]: [usize; 3], cap: Option<f64>, precision: Precision, seed: u64) -> Self {
        let mut random = Random(seed);
        let mut values = |count: usize, scale: f64| -> Vec<f64> {
            (0..count).map(|_| round(random.uniform() * scale, precision)).collect()
        };
        let (h, w) = (values(rows * columns, 3.0), values(vocab * columns, 1.0));
        let mut grad = values(rows, 1.0);
        // A loss's gradient is no activation: f32 where these are bf16.
        grad.iter_mut().for_each(|g| *g = round(*g * 1.01, Precision::F32));
        grad[rows / 2] = if rows > 2 { 0.0 } else { 1.0 };
        let targets = values(rows, 0.5);
        let targets = targets.iter().map(|u| (((u + 0.5) * vocab as f64) as usize).min(vocab - 1) as i32);
        let mut targets: Vec<i32> = targets.collect();
        targets[rows - 1] = vocab as i32 - 1;
        Self { rows, vocab, columns, cap, h, w, targets, grad }
    }

    fn exact(&self, precision: Precision) -> Exact {
        let Self { rows, vocab, columns, cap, .. } = *self;
        let zeros = || Found {
            nll: Vec::with_capacity(rows),
            grad_h: vec![0.0; rows * columns],
            grad_w: vec![0.0; vocab * columns],
        };
        let (mut found, mut rounded, mut sizes) = (zeros(), zeros(), zeros());
        let (mut z, mut tanh) = (vec![0.0; vocab], vec![0.0; vocab]);
        for row in 0..rows {
            let h = &self.h[row * columns..][..columns];
            let (mut largest, mut size_of_largest) = (0.0f64, 0.0f64);
            for v in 0..vocab {
                let terms = h.iter().zip(&self.w[v * columns..][..columns]).map(|(h, w)| h * w);
                let (sum, size) =
                    terms.fold((0.0, 0.0f64), |(sum, size), term| (sum + term, size + term.abs()));
                (largest, size_of_largest) = (largest.max(sum.abs()), size_of_largest.max(size));
                tanh[v] = cap.map_or(0.0, |cap| (sum / cap).tanh());
                z[v] = cap.map_or(sum, |cap| cap * tanh[v]);
            }
            let most = z.iter().fold(f64::NEG_INFINITY, |most, z| most.max(*z));
            let lse = most + z.iter().map(|z| (z - most).exp()).sum::<f64>().ln();
            let target = self.targets[row] as usize;
            found.nll.push(lse - z[target]);
            rounded.nll.push(round(lse - z[target], precision.master()));
            sizes.nll.push(size_of_largest + lse.abs() + 1.0);
            for v in 0..vocab {
                let hot = if v == target { 1.0 } else { 0.0 };
                let (p, slope) = ((z[v] - lse).exp(), 1.0 - tanh[v] * tanh[v]);
                let exact = (p - hot) * slope * self.grad[row];
                let near = round(exact, precision);
                // A last place of the logits and of the tangent, seen in what follows from them.
                let by_logit = p * slope * (1.0 + largest);
                let by_tanh = (p - hot).abs() * 2.0 * tanh[v] * tanh[v];
                let size = exact.abs() + (by_logit + by_tanh) * self.grad[row].abs();
                for (c, h) in h.iter().enumerate() {
                    let (w, of_h, of_w) = (self.w[v * columns + c], row * columns + c, v * columns + c);
                    found.grad_h[of_h] += exact * w;
                    rounded.grad_h[of_h] += near * w;
                    sizes.grad_h[of_h] += size * w.abs();
                    found.grad_w[of_w] += exact * h;
                    rounded.grad_w[of_w] += near * h;
                    sizes.grad_w[of_w] += size * h.abs();
                }
            }
        }
        rounded.grad_h.iter_mut().for_each(|g| *g = round(*g, precision));
        let largest = |sizes: &[f64]| -> Vec<f64> {
            let row = |row: &[f64]| row.iter().fold(f64::MIN_POSITIVE, |most, size| most.max(*size));
            sizes.chunks(columns).map(row).collect()
        };
        let scales = [sizes.nll.clone(), largest(&sizes.grad_h), largest(&sizes.grad_w)];
        Exact { found, rounded, scales }
    }

    fn on<B: Plain>(&self, device: &B::Device, precision: Precision) -> Inputs<B> {
        let Self { rows, vocab, columns, .. } = *self;
        Inputs {
            h: upload(&self.h, [rows, columns], device, precision),
            w: Param::new(
                "w",
                upload::<B, 2>(&self.w, [vocab, columns], device, precision.master()),
                precision.dtype(),
            ),
            targets: Tensor::from_data(TensorData::new(self.targets.clone(), [rows]), device),
            grad: upload(&self.grad, [rows], device, precision.master()),
        }
    }
}

trait Master {
    /// The precision of masters and losses.
    fn master(self) -> Precision;
}

impl Master for Precision {
    fn master(self) -> Precision {
        if self == Precision::F64 { self } else { Precision::F32 }
    }
}

struct Inputs<B: Plain> {
    h: Tensor<B, 2>,
    w: Param<B>,
    targets: Tensor<B, 1, Int>,
    grad: Tensor<B, 1>,
}

impl<B: Plain> Inputs<B> {
    fn backward(&self, cap: Option<f64>, lse: Option<Tensor<B, 1>>) -> [Vec<f64>; 2] {
        let (h, targets, grad) = (self.h.clone(), self.targets.clone(), self.grad.clone());
        let grad_h = B::cross_entropy_backward(h, &self.w, targets, cap, lse, grad);
        let grad_w = self.w.take_grad::<2>().expect("a gradient of the head");
        [download(grad_h), download(grad_w)]
    }

    fn run(&self, cap: Option<f64>) -> Found {
        let (nll, lse) = B::cross_entropy_and_lse(self.h.clone(), &self.w, self.targets.clone(), cap);
        let [grad_h, grad_w] = self.backward(cap, lse);
        Found { nll: download(nll), grad_h, grad_w }
    }
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
fn poison<B: Plain>(case: &Case, device: &B::Device) {
    let Case { rows, vocab, columns, .. } = *case;
    let sizes =
        [[rows, columns], [rows, columns], [vocab, columns], [rows, 1], [rows, 1], [rows.min(8192), vocab]];
    let poison: Vec<Tensor<B, 2>> =
        sizes.map(|shape| Tensor::full(shape, f32::NAN, (device, DType::F32))).into_iter().collect();
    drop(poison);
}

fn errors(case: &Case, exact: &Exact, found: &Found) -> [Worst; 3] {
    let [nll, grad_h, grad_w] = &exact.scales;
    [
        worst(&found.nll, &exact.found.nll, 1, |row| nll[row]),
        worst(&found.grad_h, &exact.found.grad_h, case.columns, |row| grad_h[row]),
        worst(&found.grad_w, &exact.found.grad_w, case.columns, |row| grad_w[row]),
    ]
}

/// What the reference makes of a case in f32 on a device.
fn in_f32<B: Plain>(case: &Case, device: &B::Device) -> Found {
    let inputs = case.on::<B>(device, Precision::F32);
    let (h, w, targets) = (inputs.h.clone(), inputs.w.compute(), inputs.targets.clone());
    let nll = download(cross_entropy::forward(h.clone(), w.clone(), targets.clone(), case.cap));
    let mut grad_w = None;
    let mut keep = |part: Tensor<B, 2>| {
        grad_w = Some(match grad_w.take() {
            Some(sum) => sum + part,
            None => part,
        });
    };
    let grad_h = cross_entropy::backward(h, w, targets, case.cap, inputs.grad, Some(&mut keep));
    Found { nll, grad_h: download(grad_h), grad_w: download(grad_w.expect("a gradient")) }
}

/// By the reference in f32 on the CPU and on the device itself, whose products add up in another order, and with
/// everything rounded to the precision.
fn tolerances<B: Plain>(case: &Case, exact: &Exact, device: &B::Device, precision: Precision) -> [f64; 3] {
    if precision == Precision::F64 {
        return [256.0 * f64::EPSILON; 3];
    }
    let cpu = in_f32::<Cpu>(case, &burn_ndarray::NdArrayDevice::Cpu);
    let references =
        [&cpu, &in_f32::<B>(case, device), &exact.rounded].map(|found| errors(case, exact, found));
    let largest = |i: usize| references.iter().map(|errors| errors[i].error).fold(0.0, f64::max);
    let least = f64::from(f32::EPSILON);
    let mut tolerances: [f64; 3] = std::array::from_fn(|i| 2.0 * largest(i).max(least));
    if precision == Precision::Bf16 {
        tolerances[0] = tolerances[0].max((case.columns as f64 / 16.0 + 1.0) * f64::from(f32::EPSILON));
    }
    tolerances
}

struct AgainstTheHost;

impl Job for AgainstTheHost {
    /// Whether all rows were within their tolerance.
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let mut good = true;
        println!("\n{} {precision}", target.label);
        println!(
            "{:>15} {:>5}  {:<4} {:>9} {:>9} {:>6}  worst element",
            "shape", "cap", "what", "error", "tolerance", "share"
        );
        let is_cuda = matches!(target.choice, DeviceChoice::Cuda(_));
        let is_wgpu = matches!(target.choice, DeviceChoice::Wgpu(_));
        let shapes = SHAPES.into_iter().chain(GROUPS.into_iter().filter(|_| is_cuda));
        for (number, (shape, cap)) in shapes.enumerate() {
            if !affordable(shape.iter().product()) {
                continue;
            }
            let case = Case::new(shape, cap, precision, number as u64);
            let exact = case.exact(precision);
            // WGSL's exp may be off by 3 + 2|x| units in the last place: 32 of them at |x| = 14.
            let coarse = if is_wgpu { 2f64.powi(-18) } else { 0.0 };
            let tolerances =
                tolerances::<B>(&case, &exact, device, precision).map(|tolerance| tolerance.max(coarse));
            let inputs = case.on::<B>(device, precision);
            poison::<B>(&case, device);
            let found = inputs.run(cap);
            assert_eq!(
                [found.nll.len(), found.grad_h.len(), found.grad_w.len()],
                [case.rows, case.h.len(), case.w.len()]
            );
            for ((what, worst), tolerance) in
                ["nll", "gh", "gw"].into_iter().zip(errors(&case, &exact, &found)).zip(tolerances)
            {
                let share = worst.error / tolerance;
                let within = share <= 1.0;
                println!(
                    "{:>15} {:>5}  {what:<4} {:>9.2e} {tolerance:>9.2e} {:>5.0}%  [{}, {}]: {:.8e}, expected {:.8e}{}",
                    format!("{}x{}x{}", shape[0], shape[1], shape[2]),
                    cap.map_or("-".to_string(), |cap| cap.to_string()),
                    worst.error,
                    100.0 * share,
                    worst.row,
                    worst.column,
                    worst.got,
                    worst.expected,
                    if within { "" } else { "  FAILED" }
                );
                good &= within;
            }
            for _ in 0..repeats() {
                poison::<B>(&case, device);
                let again = inputs.run(cap);
                assert!(same(&again.nll, &found.nll), "{shape:?}: nll differs");
                assert!(same(&again.grad_h, &found.grad_h), "{shape:?}: gh differs");
                assert!(same(&again.grad_w, &found.grad_w), "{shape:?}: gw differs");
            }
            let [grad_h, grad_w] = inputs.backward(cap, None);
            assert!(same(&grad_h, &found.grad_h) && same(&grad_w, &found.grad_w), "{shape:?}: without lse");
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
        let shape = [130, 1024, 64];
        if !affordable(shape.iter().product()) {
            return Ok(());
        }
        let case = Case::new(shape, Some(30.0), target.precision, 3);
        let inputs = case.on::<B>(device, target.precision);
        let Found { nll, grad_h, grad_w } = inputs.run(case.cap);
        let h = Tensor::<Autodiff<B>, 2>::from_inner(inputs.h.clone()).require_grad();
        let targets = Tensor::<Autodiff<B>, 1, Int>::from_inner(inputs.targets.clone());
        let through =
            <Autodiff<B> as CrossEntropyOps>::cross_entropy(h.clone(), &inputs.w, targets.clone(), case.cap);
        assert!(same(&download(through.clone().inner()), &nll));
        let weighted = || through.clone() * Tensor::from_inner(inputs.grad.clone());
        let grads = weighted().sum().backward();
        assert!(same(&download(h.grad(&grads).expect("a gradient of h")), &grad_h));
        assert!(same(&download(inputs.w.take_grad::<2>().expect("a gradient of the head")), &grad_w));

        // A frozen head: the same gradient of h, and none of its own.
        inputs.w.set_trainable(false);
        let frozen = <Autodiff<B> as CrossEntropyOps>::cross_entropy(h.clone(), &inputs.w, targets, case.cap);
        let grads = (frozen * Tensor::from_inner(inputs.grad.clone())).sum().backward();
        assert!(same(&download(h.grad(&grads).expect("a gradient of h")), &grad_h));
        assert!(inputs.w.take_grad::<2>().is_none());
        Ok(())
    }
}

#[test]
fn the_tape_gives_the_explicit_backward_and_a_frozen_head_gets_none() {
    for target in targets() {
        guard(&target, || run(&target, ThroughAutodiff)).unwrap();
    }
}

struct Views;

impl Job for Views {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let precision = target.precision;
        let case = Case::new([40, 72, 40], Some(8.0), precision, 9);
        let whole = case.on::<B>(device, precision);
        let dense = |t: Tensor<B, 2>| upload::<B, 2>(&download(t.clone()), t.dims(), device, precision);
        let (rows, w) = (whole.h.clone(), &whole.w);
        let views = [
            ("rows from an offset", rows.clone().slice([7..31, 0..40])),
            ("transposed", rows.clone().transpose()),
            ("one row expanded", rows.slice([1..2, 0..40]).expand([9, 40])),
        ];
        for (name, view) in views {
            let n = view.dims()[0];
            let targets = whole.targets.clone().narrow(0, 40 - n, n);
            let grad = whole.grad.clone().narrow(0, 3, 1).expand([n]);
            let both = [view.clone(), dense(view)].map(|h| Inputs {
                h,
                w: w.clone(),
                targets: targets.clone(),
                grad: grad.clone(),
            });
            let [got, expected] = both.map(|inputs| inputs.run(case.cap));
            // Not to the bit: products may add in another order where rows are not aligned.
            let near = |a: &[f64], b: &[f64]| {
                let largest = b.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                worst(a, b, b.len(), |_| largest).error <= 8.0 * epsilon(precision)
            };
            assert!(near(&got.nll, &expected.nll), "{name}: nll on {} {precision}", target.label);
            assert!(near(&got.grad_h, &expected.grad_h), "{name}: gh on {} {precision}", target.label);
            assert!(near(&got.grad_w, &expected.grad_w), "{name}: gw on {} {precision}", target.label);
        }
        Ok(())
    }
}

#[test]
fn any_layout_of_the_inputs_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}
