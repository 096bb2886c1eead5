//! MLPs on every device: the squared one and the gated one; forward and backward against f64 on the host, with gradients
//! that add up.
//!
//! Tolerance: as in tests/linear.rs.

mod common;

use burn::tensor::{DType, Tensor};
use common::matrix::{Ledger, Matrix, PERIOD, grad, poison, through_the_tape};
use common::{affordable, all_pass, download, repeats, round};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target};
use fairway::ops::mlp::GatedHidden;
use fairway::ops::{ActivationOps, Autodiff, LinearOps, MlpOps, Param, Plain};

struct Squared;

impl Job for Squared {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let (dtype, label) = (precision.dtype(), &target.label);
        println!("\nsquared_mlp, {label} {precision}");
        let mut good = true;
        let shapes =
            [[1, 8, 8, 8], [33, 13, 7, 5], [129, 72, 40, 24], [300, 64, 136, 64], [4200, 64, 200, 48]];
        for (seed, [n, i, h, o]) in shapes.into_iter().enumerate() {
            if !affordable(n * h * i.max(o)) {
                continue;
            }
            for slope in [0.0, 0.5, -0.25] {
                let matrix = |rows, columns, scale: f64, k| {
                    Matrix::random(rows, columns, scale, precision, 100 * seed as u64 + k)
                };
                let x = matrix(n, i, 1.0, 0);
                let inner = matrix(h, i, (1.0 / i as f64).sqrt(), 1);
                let last = matrix(o, h, (1.0 / h as f64).sqrt(), 2);
                let grad_y = matrix(n, o, 1.0, 3);
                // `to` rounds what the reference stores.
                let pass = |to: &dyn Fn(Matrix) -> Matrix| {
                    let before = to(x.times(&inner.transposed()));
                    let hidden = to(before.map(|v| if v < 0.0 { slope * v } else { v }.powi(2)));
                    let grad_hidden = to(grad_y.times(&last));
                    let grad_before = grad_hidden
                        .with(&before, |g, v| 2.0 * g * if v < 0.0 { slope * slope * v } else { v });
                    let grad_before = to(grad_before);
                    [
                        to(hidden.times(&last.transposed())),
                        to(grad_before.times(&inner)),
                        grad_before.transposed().times(&x),
                        grad_y.transposed().times(&hidden),
                    ]
                };
                let exact = pass(&|m| m);
                let rounded = pass(&|m| m.map(|v| round(v, precision)));

                let (w1, w2) = (inner.param::<B>("w1", device, dtype), last.param::<B>("w2", device, dtype));
                let (x, grad_y) = (x.upload::<B>(device, dtype), grad_y.upload::<B>(device, dtype));
                let clear = || poison::<B>(n * (h + i + o) + h * i, device, dtype);
                let both = || {
                    clear();
                    let (y, hidden) = B::squared_mlp_forward(x.clone(), &w1, &w2, slope);
                    clear();
                    let grad_x = B::squared_mlp_backward(x.clone(), hidden, &w1, &w2, slope, grad_y.clone());
                    [download(y), download(grad_x), grad(&w1), grad(&w2)]
                };
                let case = format!("{n}x{i}x{h}x{o} slope {slope}");
                let mut ledger = Ledger { target, case, good: true };
                let found = both();
                let terms = [h, h, n, n];
                for (j, what) in ["y", "gx", "gw1", "gw2"].into_iter().enumerate() {
                    ledger.check(what, &found[j], &exact[j], &rounded[j], terms[j]);
                }
                let [_, _, twice_1, twice_2] = both();
                for (j, twice) in [(2, twice_1), (3, twice_2)] {
                    let double = |m: &Matrix| m.map(|v| 2.0 * v);
                    ledger.check("gw twice", &twice, &double(&exact[j]), &double(&rounded[j]), 2 * n);
                }
                for _ in 0..repeats() {
                    w1.clear_grad();
                    w2.clear_grad();
                    assert!(both() == found, "{label} {precision} {}: other bits", ledger.case);
                }

                // Through the tape.
                w1.clear_grad();
                w2.clear_grad();
                let tracked = Tensor::<Autodiff<B>, 2>::from_inner(x.clone()).require_grad();
                let y = <Autodiff<B> as MlpOps>::squared_mlp(tracked.clone(), &w1, &w2, slope);
                assert!(download(y.clone().inner()) == found[0], "{label} {precision}: y through the tape");
                let grads = (y * Tensor::from_inner(grad_y.clone())).sum().backward();
                let through = download(tracked.grad(&grads).expect("a gradient of x"));
                assert!(
                    [through, grad(&w1), grad(&w2)] == found[1..],
                    "{label} {precision}: through the tape"
                );
                good &= ledger.good;
            }
        }
        Ok(good)
    }
}

#[test]
fn the_squared_mlp_agrees_with_the_host() {
    all_pass(|| Squared);
}

fn silu(v: f64) -> f64 {
    v / (1.0 + (-v).exp())
}

/// The derivative of silu.
fn silu_slope(v: f64) -> f64 {
    let s = 1.0 / (1.0 + (-v).exp());
    s * (1.0 + v * (1.0 - s))
}

/// Sizes of rows, inputs, hidden and outputs of a gated MLP, and its numbers.
struct GatedCase {
    x: Matrix,
    gate: Matrix,
    up: Matrix,
    last: Matrix,
    grad_y: Matrix,
}

/// What one computes of a gated MLP.
struct GatedFound {
    gate: Matrix,
    up: Matrix,
    activated: Matrix,
    y: Matrix,
    grad_gate: Matrix,
    grad_up: Matrix,
    grad_x: Matrix,
}

impl GatedCase {
    fn new([n, i, h, o]: [usize; 4], precision: Precision, seed: u64) -> Self {
        let matrix =
            |rows, columns, scale: f64, k| Matrix::random(rows, columns, scale, precision, 100 * seed + k);
        // Gates on both sides of zero, up to some 6.
        let inner = |k| matrix(h, i, 4.0 * (1.0 / i as f64).sqrt(), k);
        Self {
            x: matrix(n, i, 1.0, 0),
            gate: inner(1),
            up: inner(2),
            last: matrix(o, h, (1.0 / h as f64).sqrt(), 3),
            grad_y: matrix(n, o, 1.0, 4),
        }
    }

    /// `to` rounds what the reference stores.
    fn pass(&self, to: &dyn Fn(Matrix) -> Matrix) -> GatedFound {
        let gate = to(self.x.times(&self.gate.transposed()));
        let up = to(self.x.times(&self.up.transposed()));
        let gated = to(gate.map(silu));
        let activated = to(gated.with(&up, |a, b| a * b));
        let grad_hidden = to(self.grad_y.times(&self.last));
        let grad_up = to(grad_hidden.with(&gated, |g, s| g * s));
        let grad_gated = to(grad_hidden.with(&up, |g, u| g * u));
        let grad_gate = to(grad_gated.with(&gate, |g, v| g * silu_slope(v)));
        let parts = [to(grad_gate.times(&self.gate)), to(grad_up.times(&self.up))];
        let grad_x = to(parts[0].plus(&parts[1]));
        let y = to(activated.times(&self.last.transposed()));
        GatedFound { gate, up, activated, y, grad_gate, grad_up, grad_x }
    }
}

struct Gated;

impl Job for Gated {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let (dtype, label) = (precision.dtype(), &target.label);
        println!("\ngated_mlp, {label} {precision}");
        let mut good = true;
        // Whole loads, with one tile and several and tails; and what the copy engine cannot read.
        let shapes = [
            [1, 8, 8, 8],
            [33, 13, 7, 5],
            [70, 24, 40, 12],
            [129, 72, 40, 24],
            [300, 64, 136, 64],
            [45, 20, 136, 16],
            [1100, 64, 200, 48],
        ];
        for (seed, shape) in shapes.into_iter().enumerate() {
            let [n, i, h, o] = shape;
            if !affordable(n * h * i.max(o)) {
                continue;
            }
            let case = GatedCase::new(shape, precision, seed as u64);
            let (exact, rounded) = (case.pass(&|m| m), case.pass(&|m| m.map(|v| round(v, precision))));
            let [gate, up, last] = [("gate", &case.gate), ("up", &case.up), ("last", &case.last)]
                .map(|(name, w)| w.param::<B>(name, device, dtype));
            let params = [&gate, &up, &last];
            let (x, grad_y) = (case.x.upload::<B>(device, dtype), case.grad_y.upload::<B>(device, dtype));
            let clear = || poison::<B>(n * (3 * h + i + o) + 2 * h * i, device, dtype);
            let both = || {
                clear();
                let (y, hidden) = B::gated_mlp_forward(x.clone(), &gate, &up, &last);
                let GatedHidden { gate: g, up: u, activated } = hidden.clone();
                let seen = [g, u, activated, y].map(download);
                clear();
                let grad_x =
                    download(B::gated_mlp_backward(x.clone(), hidden, &gate, &up, &last, grad_y.clone()));
                (seen, grad_x, params.map(grad))
            };
            let mut ledger = Ledger { target, case: format!("{n}x{i}x{h}x{o}"), good: true };
            let found = both();
            let (seen, grad_x, grads) = &found;
            ledger.check("gate", &seen[0], &exact.gate, &rounded.gate, i);
            ledger.check("up", &seen[1], &exact.up, &rounded.up, i);
            ledger.check("activated", &seen[2], &exact.activated, &rounded.activated, i);
            ledger.check("y", &seen[3], &exact.y, &rounded.y, h);
            ledger.check("gx", grad_x, &exact.grad_x, &rounded.grad_x, 2 * h);
            let weights = |found: &GatedFound, times: f64| {
                let x = case.x.map(|v| times * v);
                let grad_y = case.grad_y.map(|v| times * v);
                [
                    found.grad_gate.transposed().times(&x),
                    found.grad_up.transposed().times(&x),
                    grad_y.transposed().times(&found.activated),
                ]
            };
            let (once, once_rounded) = (weights(&exact, 1.0), weights(&rounded, 1.0));
            for (j, what) in ["gw gate", "gw up", "gw last"].into_iter().enumerate() {
                ledger.check(what, &grads[j], &once[j], &once_rounded[j], n);
            }
            let (_, _, twice) = both();
            let (exact_twice, rounded_twice) = (weights(&exact, 2.0), weights(&rounded, 2.0));
            for (j, what) in ["gw gate twice", "gw up twice", "gw last twice"].into_iter().enumerate() {
                ledger.check(what, &twice[j], &exact_twice[j], &rounded_twice[j], 2 * n);
            }
            for _ in 0..repeats() {
                params.iter().for_each(|w| w.clear_grad());
                assert!(both() == found, "{label} {precision} {}: other bits", ledger.case);
            }
            // Without what a backward needs, and through the tape.
            clear();
            let alone = download(B::gated_mlp(x.clone(), &gate, &up, &last));
            assert!(alone == found.0[3], "{label} {precision} {}: y alone", ledger.case);
            params.iter().for_each(|w| w.clear_grad());
            let tracked = Tensor::<Autodiff<B>, 2>::from_inner(x.clone()).require_grad();
            let y = <Autodiff<B> as MlpOps>::gated_mlp(tracked.clone(), &gate, &up, &last);
            assert!(download(y.clone().inner()) == found.0[3], "{label} {precision}: y through the tape");
            let tape = (y * Tensor::from_inner(grad_y.clone())).sum().backward();
            let through = download(tracked.grad(&tape).expect("a gradient of x"));
            assert!(
                (through, params.map(grad)) == (found.1.clone(), found.2.clone()),
                "{label} {precision} {}: through the tape",
                ledger.case
            );
            // A frozen weight's gradient is not there, the others' are as before.
            params.iter().for_each(|w| w.clear_grad());
            up.set_trainable(false);
            let (_, hidden) = B::gated_mlp_forward(x.clone(), &gate, &up, &last);
            B::gated_mlp_backward(x.clone(), hidden, &gate, &up, &last, grad_y.clone());
            assert!(up.flat_grad().is_none(), "a frozen weight's gradient");
            ledger.check("gw by frozen", &grad(&gate), &once[0], &once_rounded[0], n);
            good &= ledger.good;
        }
        Ok(good)
    }
}

#[test]
fn the_gated_mlp_agrees_with_the_host() {
    all_pass(|| Gated);
}

/// The MLPs with so many rows of bf16 that `cuda/matmul_pingpong.cu` takes their products, and tiles of every width of
/// `cuda/matmul.cu`.
struct ManyRows;

impl ManyRows {
    /// The hidden rows of a squared MLP, and the gradient of its input, which has seen theirs.
    fn squared<B: Plain>(
        [n, i, h, o]: [usize; 4],
        slopes: &[f64],
        device: &B::Device,
        target: &Target,
    ) -> bool {
        if !affordable(n * h * i.max(o)) {
            return true;
        }
        let (precision, label, dtype) = (target.precision, &target.label, target.precision.dtype());
        let matrix = |rows, columns, scale: f64, seed| Matrix::random(rows, columns, scale, precision, seed);
        let (x, grad_y) = (matrix(PERIOD, i, 1.0, 1), matrix(PERIOD, o, 1.0, 2));
        let (inner, last) =
            (matrix(h, i, (1.0 / i as f64).sqrt(), 3), matrix(o, h, (1.0 / h as f64).sqrt(), 4));
        let (before, grad_hidden) = (x.times(&inner.transposed()), grad_y.times(&last));
        let params = [&inner, &last].map(|w| w.param::<B>("w", device, dtype));
        params.iter().for_each(|w| w.set_trainable(false));
        let [w1, w2] = &params;
        let [x, grad_y] = [x, grad_y].map(|m| m.repeated(n).upload::<B>(device, dtype));
        let mut good = true;
        for slope in slopes.iter().copied() {
            // `to` rounds what the reference stores.
            let pass = |to: &dyn Fn(Matrix) -> Matrix| {
                let before = to(before.clone());
                let activated = to(before.map(|v| if v < 0.0 { slope * v } else { v }.powi(2)));
                let grad_before = to(grad_hidden.clone())
                    .with(&before, |g, v| 2.0 * g * if v < 0.0 { slope * slope * v } else { v });
                let grad_x = to(to(grad_before).times(&inner));
                [before, activated, grad_x].map(|m| m.repeated(n))
            };
            let (exact, rounded) = (pass(&|m| m), pass(&|m| m.map(|v| round(v, precision))));
            let both = || {
                poison::<B>(n * h, device, dtype);
                let (_, hidden) = B::squared_mlp_forward(x.clone(), w1, w2, slope);
                let [before, activated] =
                    [hidden.before.clone(), Some(hidden.activated.clone())].map(|m| m.map(download));
                poison::<B>(n * h, device, dtype);
                let grad_x = B::squared_mlp_backward(x.clone(), hidden, w1, w2, slope, grad_y.clone());
                [before, activated, Some(download(grad_x))]
            };
            let case = format!("{n}x{i}x{h}x{o} slope {slope}");
            let mut ledger = Ledger { target, case, good: true };
            let found = both();
            for (j, (what, terms)) in [("before", i), ("activated", i), ("gx", h)].into_iter().enumerate() {
                if let Some(found) = &found[j] {
                    ledger.check(what, found, &exact[j], &rounded[j], terms);
                }
            }
            for _ in 0..repeats() {
                assert!(both() == found, "{label} {precision} {}: other bits", ledger.case);
            }
            good &= ledger.good;
        }
        good
    }

    /// The hidden rows of a gated MLP, and the gradient of its input, which has seen theirs.
    fn gated<B: Plain>([n, i, h, o]: [usize; 4], device: &B::Device, target: &Target) -> bool {
        if !affordable(n * h * i.max(o)) {
            return true;
        }
        let (precision, label, dtype) = (target.precision, &target.label, target.precision.dtype());
        let case = GatedCase::new([PERIOD, i, h, o], precision, (n + h) as u64);
        let (exact, rounded) = (case.pass(&|m| m), case.pass(&|m| m.map(|v| round(v, precision))));
        let params = [&case.gate, &case.up, &case.last].map(|w| w.param::<B>("w", device, dtype));
        params.iter().for_each(|w| w.set_trainable(false));
        let [gate, up, last] = &params;
        let [x, grad_y] = [&case.x, &case.grad_y].map(|m| m.repeated(n).upload::<B>(device, dtype));
        let both = || {
            poison::<B>(3 * n * h, device, dtype);
            let (y, hidden) = B::gated_mlp_forward(x.clone(), gate, up, last);
            let GatedHidden { gate: g, up: u, activated } = hidden.clone();
            let seen = [g, u, activated, y].map(download);
            poison::<B>(2 * n * h, device, dtype);
            let grad_x = B::gated_mlp_backward(x.clone(), hidden, gate, up, last, grad_y.clone());
            (seen, download(grad_x))
        };
        let mut ledger = Ledger { target, case: format!("{n}x{i}x{h}x{o}"), good: true };
        let found = both();
        let (seen, grad_x) = &found;
        let pairs = [
            ("gate", &seen[0], &exact.gate, &rounded.gate, i),
            ("up", &seen[1], &exact.up, &rounded.up, i),
            ("activated", &seen[2], &exact.activated, &rounded.activated, i),
            ("y", &seen[3], &exact.y, &rounded.y, h),
            ("gx", grad_x, &exact.grad_x, &rounded.grad_x, 2 * h),
        ];
        for (what, found, exact, rounded, terms) in pairs {
            ledger.check(what, found, &exact.repeated(n), &rounded.repeated(n), terms);
        }
        for _ in 0..repeats() {
            assert!(both() == found, "{label} {precision} {}: other bits", ledger.case);
        }
        poison::<B>(n * h, device, dtype);
        let alone = download(B::gated_mlp(x.clone(), gate, up, last));
        assert!(alone == found.0[3], "{label} {precision} {}: y alone", ledger.case);
        ledger.good
    }
}

impl Job for ManyRows {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        if !matches!(target.choice, DeviceChoice::Cuda(_)) {
            println!("skipped: many rows, {} {}: no form of its own", target.label, target.precision);
            return Ok(true);
        }
        println!("\nmany rows, {} {}", target.label, target.precision);
        let mut good = Self::squared::<B>([8265, 264, 1016, 264], &[0.0, 0.5], device, target);
        good &= Self::squared::<B>([5479, 264, 1544, 264], &[0.0], device, target);
        // The ping-pong schedule, with few panels, with as much of k as they hold, and with many.
        good &= Self::gated::<B>([16_403, 264, 264, 264], device, target);
        good &= Self::gated::<B>([8265, 512, 520, 512], device, target);
        good &= Self::gated::<B>([1111, 320, 3992, 328], device, target);
        // The other one: its narrow tiles, and its widest forward and backward.
        good &= Self::gated::<B>([4227, 64, 264, 72], device, target);
        good &= Self::gated::<B>([4090, 520, 1016, 520], device, target);
        // Few rows: its widest tiles, one and several a block.
        good &= Self::squared::<B>([8, 8, 33_000, 8], &[0.0, 0.5], device, target);
        good &= Self::gated::<B>([8, 8, 33_000, 8], device, target);
        Ok(good)
    }
}

#[test]
fn many_rows_of_mlps_agree_with_the_host() {
    all_pass(|| ManyRows);
}

/// On the CPU the ops are their compositions to the bit, on the tape too.
#[test]
fn the_reference_is_the_composition() {
    type Tape = Autodiff<Cpu>;
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let matrix = |rows, columns, seed| Matrix::random(rows, columns, 1.0, Precision::F32, seed);
    let x = matrix(31, 24, 1);
    let params: Vec<Param<Cpu>> = [[40, 24], [40, 24], [16, 40]]
        .into_iter()
        .zip(2..)
        .map(|([o, i], seed)| matrix(o, i, seed).param::<Cpu>(&format!("w{seed}"), &device, DType::F32))
        .collect();
    let [a, b, last] = &params[..] else { unreachable!("three weights") };
    let all: Vec<&Param<Cpu>> = params.iter().collect();
    let gradients = |f: &dyn Fn(Tensor<Tape, 2>) -> Tensor<Tape, 2>| {
        through_the_tape([&x], &all, &matrix(31, 16, 9), |[x]| f(x))
    };
    for slope in [0.0, 0.5] {
        let composed =
            gradients(&|x| Tape::project(Tape::leaky_relu_squared(Tape::project(x, a), slope), last));
        assert!(gradients(&|x| Tape::squared_mlp(x, a, last, slope)) == composed, "slope {slope}");
    }
    let composed = gradients(&|x| {
        let [gate, up] = Tape::project_many(x, [a, b]);
        Tape::project(Tape::silu_gate(up, gate), last)
    });
    assert_eq!(composed.len(), 5);
    assert!(gradients(&|x| Tape::gated_mlp(x, a, b, last)) == composed);
}
