//! Linear layers on every device: one projection, several of one input; forward and backward against f64 on the host, with
//! gradients that add up and inputs that are views.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the same computation in f64 on the host with each intermediate
//! rounded to the device's precision, at least twice the distance between neighbouring numbers of the tensor's own type,
//! and the rounding of f32 sums beside it (those of bf16 are on tensor cores, which truncate). Errors are shares of the
//! tensor's root mean square.

mod common;

use burn::tensor::{DType, Tensor};
use common::matrix::{Ledger, Matrix, PERIOD, grad, poison, through_the_tape};
use common::{affordable, all_pass, download, repeats, round, targets};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::update::Updated;
use fairway::ops::weight_form::WeightForm;
use fairway::ops::{Autodiff, LinearOps, Param, Plain, accumulate_type};

/// Rows, inputs and outputs: for the copy engine and not, one tile and several, few rows and so many that a weight's
/// gradient is split.
const SHAPES: [[usize; 3]; 10] = [
    [1, 1, 1],
    [1, 8, 8],
    [3, 5, 7],
    [129, 72, 40],
    [200, 65, 130],
    [257, 512, 320],
    [64, 300, 8],
    [4300, 64, 96],
    [5001, 33, 16],
    [4200, 16, 24],
];

struct One;

impl Job for One {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let (dtype, label) = (precision.dtype(), &target.label);
        println!("\nproject, {label} {precision}");
        let mut good = true;
        for (seed, [n, i, o]) in SHAPES.into_iter().enumerate() {
            if !affordable(n * i * o) {
                continue;
            }
            let matrix =
                |rows, columns, k| Matrix::random(rows, columns, 1.0, precision, 10 * seed as u64 + k);
            let (x, w) = (matrix(n, i, 0), matrix(o, i, 1));
            let (first, second) = (matrix(n, o, 2), matrix(n, o, 3));
            let rounded = |m: &Matrix| m.map(|v| round(v, precision));
            let param = w.param::<B>("w", device, dtype);
            let on_device = x.upload::<B>(device, dtype);
            let mut ledger = Ledger { target, case: format!("{n}x{i}x{o}"), good: true };
            let clear = || poison::<B>(n * (i + o) + o * i, device, dtype);

            clear();
            let y = download(B::project(on_device.clone(), &param));
            let exact = x.times(&w.transposed());
            ledger.check("y", &y, &exact, &rounded(&exact), i);

            clear();
            let grad_y = first.upload::<B>(device, dtype);
            let grad_x = download(B::project_backward(on_device.clone(), &param, grad_y.clone()));
            let exact_x = first.times(&w);
            ledger.check("gx", &grad_x, &exact_x, &rounded(&exact_x), o);
            let exact_w = first.transposed().times(&x);
            let once = grad(&param);
            ledger.check("gw", &once, &exact_w, &exact_w, n);

            // Added to what is there; a reader's copy stays as it is.
            let kept = param.grad::<2>().expect("a gradient");
            B::project_backward(on_device.clone(), &param, second.upload::<B>(device, dtype));
            let both = exact_w.plus(&second.transposed().times(&x));
            ledger.check("gw + gw", &grad(&param), &both, &both, 2 * n);
            assert!(download(kept) == once, "{label} {precision}: a gradient that was read has changed");
            let twice = grad(&param);
            B::project_backward(on_device.clone(), &param, grad_y.clone());
            let thrice = both.plus(&exact_w);
            ledger.check("gw in place", &grad(&param), &thrice, &thrice, 3 * n);

            // The same again: equal bits, in place and not.
            for _ in 0..repeats() {
                param.clear_grad();
                let again = B::project_backward(on_device.clone(), &param, grad_y.clone());
                assert!(download(again) == grad_x && grad(&param) == once, "{label} {precision}: other bits");
                let kept = param.grad::<2>();
                B::project_backward(on_device.clone(), &param, second.upload::<B>(device, dtype));
                assert!(grad(&param) == twice, "{label} {precision}: other bits of a sum");
                drop(kept);
            }

            // Columns of wider matrices; 256 elements on lie at a multiple of every alignment.
            for from in [256, 3] {
                param.clear_grad();
                let x = x.upload_within::<B>(from, device, dtype);
                let grad_y = first.upload_within::<B>(from, device, dtype);
                let case = format!("{n}x{i}x{o} within {from}");
                let mut views = Ledger { target, case, good: true };
                let y = B::project(x.clone(), &param);
                views.check("y", &download(y), &exact, &rounded(&exact), i);
                let grad_x = B::project_backward(x, &param, grad_y);
                views.check("gx", &download(grad_x), &exact_x, &rounded(&exact_x), o);
                views.check("gw", &grad(&param), &exact_w, &exact_w, n);
                good &= views.good;
            }

            param.clear_grad();
            param.set_trainable(false);
            B::project_backward(on_device, &param, grad_y);
            assert!(param.flat_grad().is_none(), "a frozen weight's gradient");
            good &= ledger.good;
        }
        Ok(good)
    }
}

#[test]
fn one_projection_agrees_with_the_host() {
    all_pass(|| One);
}

/// How the outputs' gradients lie.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Layout {
    /// Each by itself.
    Apart,
    /// Columns of one matrix, in order.
    Together,
    /// Columns of one matrix, in the other order.
    Turned,
    /// The middle (or last) one is not there.
    Missing,
}

struct Many<const N: usize>([usize; N]);

impl<const N: usize> Job for Many<N> {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let (dtype, label, widths) = (precision.dtype(), &target.label, self.0);
        println!("\nproject_many {widths:?}, {label} {precision}");
        let rounded = |m: &Matrix| m.map(|v| round(v, precision));
        let mut good = true;
        for (n, i) in [(1, 8), (37, 24), (300, 129), (4200, 64)] {
            if n * widths.iter().sum::<usize>() > 3 << 20 {
                continue; // minutes on a software adapter
            }
            if !affordable(n * i * widths.iter().sum::<usize>()) {
                continue;
            }
            let seed = (n + i) as u64;
            let x = Matrix::random(n, i, 1.0, precision, seed);
            let weights: [Matrix; N] =
                std::array::from_fn(|j| Matrix::random(widths[j], i, 1.0, precision, seed + 10 + j as u64));
            let grads: [Matrix; N] =
                std::array::from_fn(|j| Matrix::random(n, widths[j], 1.0, precision, seed + 20 + j as u64));
            let params: [Param<B>; N] =
                std::array::from_fn(|j| weights[j].param::<B>(&format!("w{j}"), device, dtype));
            let on_device = x.upload::<B>(device, dtype);
            let clear = || poison::<B>((n + 300) * widths.iter().sum::<usize>(), device, dtype);
            let sum = widths.iter().sum::<usize>();

            clear();
            let outputs = B::project_many(on_device.clone(), params.each_ref());
            let mut ledger = Ledger { target, case: format!("{n}x{i}"), good: true };
            for ((output, w), j) in outputs.into_iter().zip(&weights).zip(0..) {
                let exact = x.times(&w.transposed());
                assert_eq!(output.dims(), [n, w.rows]);
                ledger.check(&format!("y{j}"), &download(output), &exact, &rounded(&exact), i);
            }
            for layout in [Layout::Apart, Layout::Together, Layout::Turned, Layout::Missing] {
                let upload = || -> [Option<Tensor<B, 2>>; N] {
                    let mut parts: Vec<&Matrix> = grads.iter().collect();
                    if layout == Layout::Turned {
                        parts.reverse();
                    }
                    let wide = Matrix::beside(&parts).upload::<B>(device, dtype);
                    std::array::from_fn(|j| {
                        let before = match layout {
                            Layout::Turned => widths[j + 1..].iter().sum::<usize>(),
                            _ => widths[..j].iter().sum::<usize>(),
                        };
                        match layout {
                            Layout::Missing if j == N / 2 => None,
                            Layout::Apart | Layout::Missing => Some(grads[j].upload::<B>(device, dtype)),
                            _ => Some(wide.clone().slice([0..n, before..before + widths[j]])),
                        }
                    })
                };
                let there = |j: usize| layout != Layout::Missing || j != N / 2;
                let case = format!("{n}x{i} {layout:?}");
                let mut ledger = Ledger { target, case, good: true };
                let backward = || {
                    clear();
                    let grad_x = B::project_many_backward(on_device.clone(), params.each_ref(), upload());
                    download(grad_x.expect("a gradient of x"))
                };
                params.iter().for_each(Param::clear_grad);
                let grad_x = backward();
                let parts: Vec<Matrix> =
                    (0..N).filter(|j| there(*j)).map(|j| grads[j].times(&weights[j])).collect();
                let total = |f: &dyn Fn(&Matrix) -> Matrix| {
                    parts[1..].iter().fold(f(&parts[0]), |sum, part| f(&sum.plus(&f(part))))
                };
                // The reference rounds each part and each sum of parts.
                ledger.check("gx", &grad_x, &total(&Matrix::clone), &total(&rounded), sum);
                let once: Vec<Option<Vec<f64>>> =
                    params.iter().map(|w| Some(download(w.grad::<2>()?))).collect();
                for times in [1.0, 2.0, 3.0] {
                    for j in 0..N {
                        let exact = grads[j].transposed().times(&x).map(|v| v * times);
                        match params[j].grad::<2>() {
                            Some(found) if there(j) => {
                                let what = format!("{times} gw{j}");
                                ledger.check(&what, &download(found), &exact, &exact, 3 * n);
                            }
                            found => assert!(found.is_none() && !there(j), "the gradient of w{j}"),
                        }
                    }
                    backward();
                }
                params.iter().for_each(Param::clear_grad);
                assert!(backward() == grad_x, "{label} {precision} {layout:?}: other bits of gx");
                for (w, once) in params.iter().zip(&once) {
                    let again = w.grad::<2>().map(download);
                    assert!(again == *once, "{label} {precision} {layout:?}: other bits of {}", w.name());
                }
                // A gradient that somebody holds stays; one that others do not share is added to.
                let kept = params[0].grad::<2>().expect("a gradient");
                backward();
                assert!(Some(download(kept)) == once[0], "{label} {precision}: a gradient that was read");
                good &= ledger.good;
            }

            // A frozen weight, and a new value.
            params.iter().for_each(Param::clear_grad);
            params[0].set_trainable(false);
            let all = || grads.each_ref().map(|g| Some(g.upload::<B>(device, dtype)));
            B::project_many_backward(on_device.clone(), params.each_ref(), all());
            assert!(params[0].flat_grad().is_none(), "a frozen weight's gradient");
            let exact = grads[N - 1].transposed().times(&x);
            ledger.check("gw by frozen", &grad(&params[N - 1]), &exact, &exact, n);
            let new = Matrix::random(widths[N - 1], i, 1.0, precision, seed + 30);
            let master = if dtype == DType::F64 { dtype } else { DType::F32 };
            params[N - 1].set(new.upload::<B>(device, master));
            let [.., last] = &B::project_many(on_device.clone(), params.each_ref())[..] else {
                unreachable!("N outputs")
            };
            let exact = x.times(&new.transposed());
            ledger.check("new value", &download(last.clone()), &exact, &rounded(&exact), i);
            good &= ledger.good;
        }
        Ok(good)
    }
}

#[test]
fn several_projections_agree_with_the_host() {
    // 256: Burn's slices are views there, so that gradients lie together.
    all_pass(|| Many([256, 256]));
    all_pass(|| Many([256, 256, 512]));
    all_pass(|| Many([64, 32, 8]));
    all_pass(|| Many([24, 136]));
    // Not joined.
    all_pass(|| Many([5, 12, 7]));
}

/// Products of so many rows that the kernels for those take them, with tails: of bf16 `cuda/matmul_pingpong.cu`
/// (`src/backend/cuda_pingpong.rs`) in all of its forms, of f32 `cuda/matmul_exact.cu` in large tiles.
struct ManyRows;

impl ManyRows {
    /// A projection and the gradient of its input.
    fn project<B: Plain>([n, i, o]: [usize; 3], device: &B::Device, target: &Target) -> bool {
        if !affordable(n * i * o) {
            return true;
        }
        let (precision, label) = (target.precision, &target.label);
        let matrix =
            |rows, columns, seed| Matrix::random(rows, columns, 1.0, precision, seed + (i + o) as u64);
        let rounded = |m: &Matrix| m.map(|v| round(v, precision));
        let (x, w, grad_y) = (matrix(PERIOD, i, 0), matrix(o, i, 1), matrix(PERIOD, o, 2));
        let param = w.param::<B>("w", device, precision.dtype());
        param.set_trainable(false);
        let upload = |m: &Matrix| m.repeated(n).upload::<B>(device, precision.dtype());
        let (on_device, grad_on_device) = (upload(&x), upload(&grad_y));
        let both = || {
            poison::<B>(n * i.max(o), device, precision.dtype());
            let y = download(B::project(on_device.clone(), &param));
            poison::<B>(n * i.max(o), device, precision.dtype());
            [y, download(B::project_backward(on_device.clone(), &param, grad_on_device.clone()))]
        };
        let mut ledger = Ledger { target, case: format!("{n}x{i}x{o}"), good: true };
        let found = both();
        let [y, grad_x] = [x.times(&w.transposed()), grad_y.times(&w)];
        ledger.check("y", &found[0], &y.repeated(n), &rounded(&y).repeated(n), i);
        ledger.check("gx", &found[1], &grad_x.repeated(n), &rounded(&grad_x).repeated(n), o);
        for _ in 0..repeats() {
            assert!(both() == found, "{label} {precision} {}: other bits", ledger.case);
        }
        ledger.good
    }

    /// A weight's gradient, a sum over all rows, and what it becomes in place.
    fn weight<B: Plain>([n, i, o]: [usize; 3], device: &B::Device, target: &Target) -> bool {
        if !affordable(n * i * o) {
            return true;
        }
        let (precision, label) = (target.precision, &target.label);
        let matrix = |rows, columns, seed| Matrix::random(rows, columns, 1.0, precision, seed);
        let (x, grad_y) = (matrix(PERIOD, i, 5), matrix(PERIOD, o, 6));
        let param = matrix(o, i, 7).param::<B>("w", device, precision.dtype());
        let [on_device, grad_on_device] =
            [&x, &grad_y].map(|m| m.repeated(n).upload::<B>(device, precision.dtype()));
        let mut counted = x.clone();
        for (row, x) in counted.at.chunks_mut(i).enumerate() {
            let count = (n - row).div_ceil(PERIOD) as f64;
            x.iter_mut().for_each(|x| *x *= count);
        }
        let once = grad_y.transposed().times(&counted);
        let mut ledger = Ledger { target, case: format!("{n}x{i}x{o}"), good: true };
        let mut found: Option<Vec<Vec<f64>>> = None;
        for _ in 0..2 {
            param.clear_grad();
            let sums: Vec<Vec<f64>> = (0..3)
                .map(|_| {
                    poison::<B>(32 * i * o, device, precision.dtype());
                    B::project_backward(on_device.clone(), &param, grad_on_device.clone());
                    grad(&param)
                })
                .collect();
            for (sum, times) in sums.iter().zip([1.0, 2.0, 3.0]) {
                let exact = once.map(|v| v * times);
                ledger.check("gw", sum, &exact, &exact, 3 * n);
            }
            let found = found.get_or_insert_with(|| sums.clone());
            assert!(*found == sums, "{label} {precision} {}: other bits", ledger.case);
        }
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
        // Of y, of gx (1032 columns), of both with b streamed, and of the narrowest y with a fetched ahead.
        let shapes = [
            [8201, 264, 1032],
            [8201, 1032, 264],
            [16_139, 520, 520],
            [16_403, 328, 512],
            [16_403, 256, 512],
        ];
        let mut good = true;
        for shape in shapes {
            good &= Self::project::<B>(shape, device, target);
        }
        if target.precision == Precision::F32 {
            good &= Self::weight::<B>([8219, 1000, 500], device, target);
            good &= Self::weight::<B>([8201, 33, 65], device, target);
        }
        Ok(good)
    }
}

#[test]
fn many_rows_agree_with_the_host() {
    all_pass(|| ManyRows);
}

struct ThroughTheTape;

impl Job for ThroughTheTape {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let (precision, dtype) = (target.precision, target.precision.dtype());
        let (n, i, widths) = (70, 64, [256, 256, 512]);
        let x = Matrix::random(n, i, 1.0, precision, 1).upload::<B>(device, dtype);
        let matrix = |o: usize, seed| Matrix::random(o, i, 1.0, precision, seed);
        let params: [Param<B>; 3] =
            std::array::from_fn(|j| matrix(widths[j], 2 + j as u64).param::<B>("w", device, dtype));
        let factors: [Tensor<B, 2>; 3] = std::array::from_fn(|j| {
            Matrix::random(n, widths[j], 1.0, precision, 9 + j as u64).upload::<B>(device, dtype)
        });
        // All of the outputs, and all but one.
        for used in [[true, true, true], [true, false, true]] {
            params.iter().for_each(Param::clear_grad);
            let tracked = Tensor::<Autodiff<B>, 2>::from_inner(x.clone()).require_grad();
            let outputs = <Autodiff<B> as LinearOps>::project_many(tracked.clone(), params.each_ref());
            let terms = outputs.into_iter().zip(&factors).zip(used).filter(|(_, used)| *used);
            let loss = terms
                .map(|((y, factor), _)| (y * Tensor::from_inner(factor.clone())).sum())
                .reduce(|sum, term| sum + term)
                .expect("terms");
            let through = download(tracked.grad(&loss.backward()).expect("a gradient of x"));
            let found: Vec<Option<Vec<f64>>> = params.iter().map(|w| w.grad::<2>().map(download)).collect();

            params.iter().for_each(Param::clear_grad);
            let grads: [Option<Tensor<B, 2>>; 3] =
                std::array::from_fn(|j| used[j].then(|| factors[j].clone()));
            let explicit = B::project_many_backward(x.clone(), params.each_ref(), grads).expect("a gradient");
            assert!(through == download(explicit), "{} {precision} {used:?}: gx", target.label);
            let explicit: Vec<Option<Vec<f64>>> =
                params.iter().map(|w| w.grad::<2>().map(download)).collect();
            assert!(found == explicit, "{} {precision} {used:?}: gradients of weights", target.label);
        }
        Ok(())
    }
}

/// Several projections follow every change of one of their weights, whichever way it comes.
struct AfterAChange;

impl Job for AfterAChange {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let dtype = target.precision.dtype();
        let random = |rows, seed| Matrix::random(rows, 64, 1.0, target.precision, seed);
        let x = random(96, 1).upload::<B>(device, dtype);
        let value = |seed| random(32, seed).upload::<B>(device, accumulate_type(dtype));
        let weights = [2, 3, 4].map(|seed| Param::<B>::new(format!("w{seed}"), value(seed), dtype));
        let agree = || {
            let [a, b, c] = weights.each_ref();
            let together = B::project_many(x.clone(), [a, b, c]).map(download::<B, 2>);
            let alone = [a, b, c].map(|w| download::<B, 2>(B::project(x.clone(), w)));
            assert_eq!(together, alone, "on {} in {}", target.label, target.precision);
            alone
        };
        let mut seen = vec![agree()];
        weights[0].set(value(5));
        seen.push(agree());
        let value = value(6);
        let copy = weights[1].copy_type().map(|dtype| value.clone().cast(dtype));
        weights[1].set_updated(Updated { value, copy });
        seen.push(agree());
        weights[2].set_form(WeightForm::fake_int_symmetric(6));
        seen.push(agree());
        Ok(seen.windows(2).all(|pair| pair[0] != pair[1]))
    }
}

#[test]
fn several_projections_follow_their_weights() {
    all_pass(|| AfterAChange);
}

#[test]
fn the_tape_gives_the_explicit_backward_of_several_projections() {
    for target in targets() {
        guard(&target, || run(&target, ThroughTheTape)).unwrap();
    }
}

/// On the CPU the ops are their compositions to the bit, on the tape too.
#[test]
fn the_reference_is_the_composition() {
    type Tape = Autodiff<Cpu>;
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let precision = Precision::F32;
    let matrix = |rows, columns, seed| Matrix::random(rows, columns, 1.0, precision, seed);
    let x = matrix(31, 24, 1);
    let params: Vec<Param<Cpu>> = [[40, 24], [16, 24], [16, 24]]
        .into_iter()
        .zip(2..)
        .map(|([o, i], seed)| matrix(o, i, seed).param::<Cpu>(&format!("w{seed}"), &device, DType::F32))
        .collect();
    let [a, b, c] = &params[..] else { unreachable!("three weights") };
    let all: Vec<&Param<Cpu>> = params.iter().collect();
    let gradients = |f: &dyn Fn(Tensor<Tape, 2>) -> Tensor<Tape, 2>| {
        through_the_tape([&x], &all, &matrix(31, 40, 9), |[x]| f(x))
    };
    let join = |[q, k, v]: [Tensor<Tape, 2>; 3]| q * Tensor::cat(vec![k.clone(), v, k.narrow(1, 0, 8)], 1);
    let composed = gradients(&|x| join([a, b, c].map(|w| Tape::project(x.clone(), w))));
    assert!(gradients(&|x| join(Tape::project_many(x, [a, b, c]))) == composed);
}
