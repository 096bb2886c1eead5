//! RMS norm on every device: forward and backward against a computation in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the reference itself makes in the device's precision, at
//! least twice the distance between neighbouring numbers. Errors are shares of a row's scale: the largest |y|, and
//! for the gradient r max|gy| (the gradient itself may cancel to nothing).

mod common;

use burn::tensor::Tensor;
use common::{Random, Worst, affordable, all_pass, download, epsilon, repeats, round};
use common::{targets, upload, worst};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target, guard, run};
use fairway::ops::{Autodiff, Plain, rms_norm};

/// Rows and columns: one lane to whole blocks, vectors and not, the last group of rows full and not.
const SHAPES: [[usize; 2]; 16] = [
    [1, 1],
    [3, 2],
    [3, 5],
    [1000, 64],
    [65, 96],
    [7, 513],
    [130, 512],
    [33, 1024],
    [257, 768],
    [9, 1023],
    [12, 2048],
    [5, 4097],
    [4, 8192],
    [2, 16_384],
    [1, 16_383],
    [70_000, 4],
];
const EPS: [f64; 3] = [rms_norm::EPS, 1e-5, 0.1];

/// Rows of different magnitudes, one of zeros, and their output gradients; values that the precision has.
struct Case {
    rows: usize,
    columns: usize,
    eps: f64,
    x: Vec<f64>,
    grad: Vec<f64>,
}

impl Case {
    fn new([rows, columns]: [usize; 2], eps: f64, precision: Precision, seed: u64) -> Self {
        let mut random = Random(seed);
        let scale = |row: usize| if row == 2 { 0.0 } else { [1.0, 30.0, 1.0, 1e-3, 1e-5][row % 5] };
        let mut values = |scale: &dyn Fn(usize) -> f64| -> Vec<f64> {
            let value = |i| round(random.uniform() * scale(i / columns), precision);
            (0..rows * columns).map(value).collect()
        };
        let x = values(&scale);
        let grad = values(&|_| 1.0);
        Self { rows, columns, eps, x, grad }
    }

    /// `1 / rms` of each row.
    fn inverse_rms(&self) -> Vec<f64> {
        let mean_square = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>() / self.columns as f64;
        self.x.chunks(self.columns).map(|row| 1.0 / (mean_square(row) + self.eps).sqrt()).collect()
    }

    fn forward(&self) -> Vec<f64> {
        let r = self.inverse_rms();
        self.x.iter().enumerate().map(|(i, x)| x * r[i / self.columns]).collect()
    }

    fn backward(&self) -> Vec<f64> {
        let r = self.inverse_rms();
        let rows = self.x.chunks(self.columns).zip(self.grad.chunks(self.columns)).zip(r);
        let row = |((x, grad), r): ((&[f64], &[f64]), f64)| -> Vec<f64> {
            let mean = x.iter().zip(grad).map(|(x, g)| x * g).sum::<f64>() / self.columns as f64;
            x.iter().zip(grad).map(|(x, g)| r * g - x * r * r * r * mean).collect()
        };
        rows.flat_map(row).collect()
    }

    fn worst_forward(&self, y: &[f64]) -> Worst {
        let exact = self.forward();
        let scales: Vec<f64> =
            exact.chunks(self.columns).map(|row| largest(row).max(f64::MIN_POSITIVE)).collect();
        worst(y, &exact, self.columns, |row| scales[row])
    }

    fn worst_backward(&self, grad_x: &[f64]) -> Worst {
        let rows = self.grad.chunks(self.columns).zip(self.inverse_rms());
        let scales: Vec<f64> = rows.map(|(grad, r)| r * largest(grad)).collect();
        worst(grad_x, &self.backward(), self.columns, |row| scales[row])
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
fn poison<B: Plain>(shape: [usize; 2], device: &B::Device, precision: Precision) {
    let poison: Vec<Tensor<B, 2>> =
        (0..3).map(|_| Tensor::full(shape, f32::NAN, (device, precision.dtype()))).collect();
    drop(poison);
}

/// The errors of the reference in the precision, over enough rows to be typical of it.
fn reference_errors([rows, columns]: [usize; 2], eps: f64, precision: Precision) -> [f64; 2] {
    if precision == Precision::F64 {
        // Against which the host's own f64 is no better a measure.
        return [64.0 * f64::EPSILON; 2];
    }
    let case = Case::new([rows.clamp(64, 2048), columns], eps, precision, 7);
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let shape = [case.rows, case.columns];
    // In f32, as the op's contract has it for every narrower type, and rounded at the end.
    let x = upload::<Cpu, 2>(&case.x, shape, &device, Precision::F32);
    let grad = upload::<Cpu, 2>(&case.grad, shape, &device, Precision::F32);
    let rounded =
        |t: Tensor<Cpu, 2>| download(t).into_iter().map(|v| round(v, precision)).collect::<Vec<_>>();
    let y = rounded(rms_norm::forward(x.clone(), eps));
    let grad_x = rounded(rms_norm::backward(x, grad, eps));
    [case.worst_forward(&y).error, case.worst_backward(&grad_x).error].map(|e| e.max(epsilon(precision)))
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
            "{:>13} {:>8}  {:<8} {:>9} {:>9} {:>6}  worst element",
            "shape", "eps", "pass", "error", "tolerance", "share"
        );
        for (number, shape) in SHAPES.into_iter().enumerate() {
            if !affordable(shape[0] * shape[1]) {
                continue;
            }
            let eps = EPS[number % EPS.len()];
            let case = Case::new(shape, eps, precision, number as u64);
            let tolerances = reference_errors(shape, eps, precision).map(|error| 2.0 * error);
            let x = upload::<B, 2>(&case.x, shape, device, precision);
            let grad = upload::<B, 2>(&case.grad, shape, device, precision);
            poison::<B>(shape, device, precision);
            let y = download(B::rms_norm(x.clone(), eps));
            poison::<B>(shape, device, precision);
            let grad_x = download(B::rms_norm_backward(x.clone(), grad.clone(), eps));
            let passes = [("forward", case.worst_forward(&y)), ("backward", case.worst_backward(&grad_x))];
            for ((pass, worst), tolerance) in passes.into_iter().zip(tolerances) {
                let share = worst.error / tolerance;
                let within = share <= 1.0;
                println!(
                    "{:>13} {eps:>8.1e}  {pass:<8} {:>9.2e} {tolerance:>9.2e} {:>5.0}%  [{}, {}]: {:.8e}, expected {:.8e}{}",
                    format!("{}x{}", shape[0], shape[1]),
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
            assert_eq!(y.len(), shape[0] * shape[1]);
            for _ in 0..repeats() {
                let again = download(B::rms_norm(x.clone(), eps));
                assert!(
                    again.iter().zip(&y).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{shape:?}: y differs"
                );
                let again = download(B::rms_norm_backward(x.clone(), grad.clone(), eps));
                assert!(
                    again.iter().zip(&grad_x).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{shape:?}: grad x differs"
                );
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
        for (shape, eps) in [([3, 5], 1e-5), ([33, 1024], rms_norm::EPS)] {
            let case = Case::new(shape, eps, target.precision, 3);
            let x = upload::<B, 2>(&case.x, shape, device, target.precision);
            let grad = upload::<B, 2>(&case.grad, shape, device, target.precision);
            let tracked = Tensor::<Autodiff<B>, 2>::from_inner(x.clone()).require_grad();
            let y = <Autodiff<B> as rms_norm::RmsNormOps>::rms_norm(tracked.clone(), eps);
            assert!(download(y.clone().inner()) == download(B::rms_norm(x.clone(), eps)), "{shape:?}");
            let grads = (y * Tensor::from_inner(grad.clone())).sum().backward();
            let through = download(tracked.grad(&grads).expect("a gradient of x"));
            let explicit = download(B::rms_norm_backward(x, grad, eps));
            assert!(through == explicit, "{shape:?} on {} {}", target.label, target.precision);
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

struct Views;

impl Job for Views {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let (precision, eps) = (target.precision, 1e-5);
        let (rows, columns) = (40, 128);
        let mut random = Random(1);
        let values: Vec<f64> = (0..rows * columns).map(|_| round(random.uniform(), precision)).collect();
        let x = upload::<B, 2>(&values, [rows, columns], device, precision);
        let dense = |t: Tensor<B, 2>| upload::<B, 2>(&download(t.clone()), t.dims(), device, precision);
        let views = [
            ("rows from an offset", x.clone().slice([8..31, 0..columns])),
            ("columns from an offset", x.clone().slice([0..rows, 3..98])),
            ("transposed", x.clone().transpose()),
            ("one row expanded", x.clone().slice([1..2, 0..columns]).expand([9, columns])),
        ];
        // Not to the bit: Burn sums a view in another order on the CPU.
        let check = |name: &str, got: Tensor<B, 2>, expected: Tensor<B, 2>| {
            let columns = got.dims()[1];
            let worst = worst(&download(got), &download(expected), columns, |_| 1.0);
            let within = worst.error <= 8.0 * epsilon(precision);
            assert!(within, "{name} on {} {precision}: {worst:?}", target.label);
        };
        for (name, view) in views {
            check(name, B::rms_norm(view.clone(), eps), B::rms_norm(dense(view.clone()), eps));
            let grad = view.clone().mul_scalar(0.5);
            let expected = B::rms_norm_backward(dense(view.clone()), dense(grad.clone()), eps);
            check(name, B::rms_norm_backward(view, grad, eps), expected);
        }
        let none = B::rms_norm(Tensor::<B, 2>::empty([0, 8], (device, precision.dtype())), eps);
        assert_eq!(none.dims(), [0, 8]);
        Ok(())
    }
}

#[test]
fn any_layout_of_the_input_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}

#[test]
fn the_reference_backward_is_the_derivative_of_the_reference_forward() {
    let device = burn_ndarray::NdArrayDevice::Cpu;
    // Columns are powers of two: Burn's derivative of `div_scalar` multiplies by a reciprocal in f32.
    for (shape, eps) in [([1, 1], 0.1), ([3, 4], 1e-5), ([33, 256], rms_norm::EPS)] {
        let case = Case::new(shape, eps, Precision::F64, 5);
        let x = upload::<Cpu, 2>(&case.x, shape, &device, Precision::F64);
        let grad = upload::<Cpu, 2>(&case.grad, shape, &device, Precision::F64);
        let tracked = Tensor::<Autodiff<Cpu>, 2>::from_inner(x.clone()).require_grad();
        let y = rms_norm::forward(tracked.clone(), eps);
        let grads = (y * Tensor::from_inner(grad.clone())).sum().backward();
        let burn = download(tracked.grad(&grads).expect("a gradient of x"));
        let ours = download(rms_norm::backward(x, grad, eps));
        let r = case.inverse_rms();
        let worst = worst(&ours, &burn, case.columns, |row| r[row]);
        println!("{shape:?}: {worst:?}");
        assert!(worst.error < 1e-14, "{shape:?}: {worst:?}");
    }
}
