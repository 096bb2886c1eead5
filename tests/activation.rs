//! Activations on every device, forward and backward, against f64 on the host: element by element.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the reference makes in f32 (rounded to the device's precision at
//! the end), at least twice the distance between neighbouring numbers. An error is a share of the element's own
//! magnitude; of silu's derivative, which has a zero, of what is multiplied by it. WGSL promises exp to 3 + 2|x| units in
//! the last place and log to 2^-21: on wgpu an error is a share of one at least, and the tolerance 2^-20.

mod common;

use burn::tensor::{DType, Tensor};
use common::{Random, affordable, all_pass, download, epsilon, round, targets, upload_as as upload, worst};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::Plain;

const SLOPES: [f64; 3] = [0.0, 0.5, -0.25];

/// The least scale of an element: what is zero must come out as zero.
const LEAST: f64 = 1e-30;

/// Three inputs of one shape: `x`, a gate (or the output of the sigmoid), the output's gradient.
#[derive(Debug, Clone)]
struct Inputs<B: Plain> {
    x: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    grad: Tensor<B, 2>,
}

/// One op: on a device, on the host for an element `(x, gate, grad)`, and the scale of its error.
struct Op {
    name: String,
    device: Box<OnDevice>,
    host: Box<OnHost>,
    scale: Box<OnHost>,
}

type OnDevice = dyn Fn(&dyn Run) -> Vec<Vec<f64>>;
type OnHost = dyn Fn(f64, f64, f64) -> Vec<f64>;

/// The ops behind one interface for every backend.
trait Run {
    fn leaky(&self, slope: f64) -> Vec<f64>;
    fn leaky_backward(&self, slope: f64) -> Vec<f64>;
    fn silu(&self) -> Vec<f64>;
    fn silu_backward(&self) -> Vec<f64>;
    fn logistic(&self) -> Vec<f64>;
    fn logistic_backward(&self) -> Vec<f64>;
    fn softplus(&self) -> Vec<f64>;
    fn softplus_backward(&self) -> Vec<f64>;
    fn gate(&self) -> Vec<f64>;
    fn gate_backward(&self) -> Vec<Vec<f64>>;
}

impl<B: Plain> Run for Inputs<B> {
    fn leaky(&self, slope: f64) -> Vec<f64> {
        download(B::leaky_relu_squared(self.x.clone(), slope))
    }
    fn leaky_backward(&self, slope: f64) -> Vec<f64> {
        download(B::leaky_relu_squared_backward(self.x.clone(), slope, self.grad.clone()))
    }
    fn silu(&self) -> Vec<f64> {
        download(B::silu(self.x.clone()))
    }
    fn silu_backward(&self) -> Vec<f64> {
        download(B::silu_backward(self.x.clone(), self.grad.clone()))
    }
    fn logistic(&self) -> Vec<f64> {
        download(B::logistic(self.x.clone()))
    }
    fn logistic_backward(&self) -> Vec<f64> {
        download(B::logistic_backward(self.gate.clone(), self.grad.clone()))
    }
    fn softplus(&self) -> Vec<f64> {
        download(B::softplus(self.x.clone()))
    }
    fn softplus_backward(&self) -> Vec<f64> {
        download(B::softplus_backward(self.x.clone(), self.grad.clone()))
    }
    fn gate(&self) -> Vec<f64> {
        download(B::silu_gate(self.x.clone(), self.gate.clone()))
    }
    fn gate_backward(&self) -> Vec<Vec<f64>> {
        B::silu_gate_backward(self.x.clone(), self.gate.clone(), self.grad.clone()).map(download).into()
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu_slope(x: f64) -> f64 {
    sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))
}

fn ops() -> Vec<Op> {
    type Host = fn(f64, f64, f64) -> f64;
    let one = |name: &str, device: fn(&dyn Run) -> Vec<f64>, host: Host, scale: Host| Op {
        name: name.into(),
        device: Box::new(move |run| vec![device(run)]),
        host: Box::new(move |x, gate, grad| vec![host(x, gate, grad)]),
        scale: Box::new(move |x, gate, grad| vec![scale(x, gate, grad)]),
    };
    let own = |name: &str, device: fn(&dyn Run) -> Vec<f64>, host: Host| one(name, device, host, host);
    let softplus: Host = |x, _, _| x.max(0.0) + (-x.abs()).exp().ln_1p();
    let mut ops = vec![
        own("silu", |run| run.silu(), |x, _, _| x * sigmoid(x)),
        one("silu backward", |run| run.silu_backward(), |x, _, g| g * silu_slope(x), |_, _, g| g),
        own("logistic", |run| run.logistic(), |x, _, _| sigmoid(x)),
        own("logistic backward", |run| run.logistic_backward(), |_, y, g| g * y * (1.0 - y)),
        own("softplus", |run| run.softplus(), softplus),
        own("softplus backward", |run| run.softplus_backward(), |x, _, g| g * sigmoid(x)),
        own("silu_gate", |run| run.gate(), |x, gate, _| x * gate * sigmoid(gate)),
        Op {
            name: "silu_gate backward".into(),
            device: Box::new(|run| run.gate_backward()),
            host: Box::new(|x, gate, g| vec![g * gate * sigmoid(gate), g * x * silu_slope(gate)]),
            scale: Box::new(|x, gate, g| vec![g * gate * sigmoid(gate), g * x]),
        },
    ];
    for slope in SLOPES {
        let leaky = move |x: f64| if x < 0.0 { slope * x } else { x };
        ops.push(Op {
            name: format!("leaky_relu_squared {slope}"),
            device: Box::new(move |run| vec![run.leaky(slope)]),
            host: Box::new(move |x, _, _| vec![leaky(x).powi(2)]),
            scale: Box::new(move |x, _, _| vec![leaky(x).powi(2)]),
        });
        let backward = move |x: f64, g: f64| 2.0 * g * if x < 0.0 { slope * slope * x } else { x };
        ops.push(Op {
            name: format!("leaky_relu_squared {slope} backward"),
            device: Box::new(move |run| vec![run.leaky_backward(slope)]),
            host: Box::new(move |x, _, g| vec![backward(x, g)]),
            scale: Box::new(move |x, _, g| vec![backward(x, g)]),
        });
    }
    ops
}

/// Values that the precision has: of many magnitudes, the zero, and far out on both sides; the gate between 0 and 1 in a
/// third of the elements.
fn values(count: usize, precision: Precision, seed: u64) -> [Vec<f64>; 3] {
    let mut random = Random(seed);
    let mut draw = |spread: [f64; 4]| -> Vec<f64> {
        (0..count).map(|i| round(random.uniform() * spread[i % 4], precision)).collect()
    };
    let (mut x, mut gate, grad) =
        (draw([1.0, 5.0, 25.0, 0.01]), draw([1.0, 8.0, 20.0, 1.0]), draw([1.0, 30.0, 1.0, 0.1]));
    x[0] = 0.0;
    for i in (0..count).step_by(3) {
        gate[i] = round(gate[i].abs() / 32.0, precision);
    }
    [x, gate, grad]
}

/// The worst error of an op's outputs, each element against its own scale, `least` at least.
fn worst_of(
    op: &Op,
    found: &[Vec<f64>],
    [x, gate, grad]: &[Vec<f64>; 3],
    columns: usize,
    least: f64,
) -> common::Worst {
    let host = |f: &OnHost, output: usize| -> Vec<f64> {
        x.iter().zip(gate).zip(grad).map(|((x, gate), grad)| f(*x, *gate, *grad)[output]).collect()
    };
    let outputs = found.iter().enumerate().map(|(output, found)| {
        let (exact, scale) = (host(&op.host, output), host(&op.scale, output));
        assert_eq!(found.len(), exact.len(), "{}", op.name);
        let one = worst(found, &exact, 1, |i| scale[i].abs().max(least));
        common::Worst { row: one.row / columns, column: one.row % columns, ..one }
    });
    outputs.reduce(|a, b| if b.error > a.error || b.error.is_nan() { b } else { a }).expect("an output")
}

/// The reference's error in f32, rounded to the precision at the end.
fn reference_error(op: &Op, precision: Precision) -> f64 {
    if precision == Precision::F64 {
        // Against which the host's own f64 is no better a measure.
        return 64.0 * f64::EPSILON;
    }
    let inputs = values(4096, precision, 99);
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let [x, gate, grad] = inputs.each_ref().map(|v| upload::<Cpu, 2>(v, [64, 64], &device, DType::F32));
    let found = (op.device)(&Inputs::<Cpu> { x, gate, grad });
    let found: Vec<Vec<f64>> =
        found.into_iter().map(|v| v.into_iter().map(|v| round(v, precision)).collect()).collect();
    worst_of(op, &found, &inputs, 64, LEAST).error.max(epsilon(precision))
}

/// How the inputs lie.
#[derive(Debug, Clone, Copy)]
enum Layout {
    Dense,
    /// Columns of wider matrices: rows with gaps.
    Columns,
    /// Gate and x beside each other in one matrix, as two projections of one input leave them.
    Halves,
    /// The transpose of a dense matrix.
    Turned,
}

struct AgainstTheHost;

impl Job for AgainstTheHost {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let (precision, dtype) = (target.precision, target.precision.dtype());
        println!("\n{} {precision}", target.label);
        let ops = ops();
        let is_wgpu = matches!(target.choice, DeviceChoice::Wgpu(_));
        let (least, coarse) = if is_wgpu { (1.0, 2f64.powi(-20)) } else { (LEAST, 0.0) };
        let tolerances: Vec<f64> =
            ops.iter().map(|op| coarse.max(2.0 * reference_error(op, precision))).collect();
        let shapes = [[1, 1], [3, 5], [1, 4096], [129, 256], [40, 1024], [1000, 33], [7, 24]];
        let layouts = [Layout::Dense, Layout::Columns, Layout::Halves, Layout::Turned];
        let mut good = true;
        for (seed, shape) in shapes.into_iter().enumerate() {
            let [rows, columns] = shape;
            if !affordable(rows * columns) {
                continue;
            }
            let inputs = values(rows * columns, precision, seed as u64);
            for layout in layouts {
                let within = |parts: &[&[f64]]| -> Tensor<B, 2> {
                    let row =
                        |r: usize| parts.iter().flat_map(move |p| &p[r * columns..][..columns]).copied();
                    let wide: Vec<f64> = (0..rows).flat_map(row).collect();
                    upload(&wide, [rows, parts.len() * columns], device, dtype)
                };
                let nan = vec![f64::NAN; rows * columns];
                let column = |x: &Tensor<B, 2>, at: usize| {
                    x.clone().slice([0..rows, at * columns..(at + 1) * columns])
                };
                let [x, gate, grad] = &inputs;
                let turned = |v: &[f64]| {
                    let turned: Vec<f64> = (0..v.len()).map(|i| v[i % rows * columns + i / rows]).collect();
                    upload::<B, 2>(&turned, [columns, rows], device, dtype).transpose()
                };
                let [x, gate, grad] = match layout {
                    Layout::Dense => [x, gate, grad].map(|v| upload::<B, 2>(v, shape, device, dtype)),
                    Layout::Columns => [x, gate, grad].map(|v| column(&within(&[&nan, v, &nan]), 1)),
                    Layout::Halves => {
                        let wide = within(&[gate, x]);
                        [column(&wide, 1), column(&wide, 0), upload::<B, 2>(grad, shape, device, dtype)]
                    }
                    Layout::Turned => [turned(x), turned(gate), turned(grad)],
                };
                let on_device = Inputs::<B> { x, gate, grad };
                for (op, tolerance) in ops.iter().zip(&tolerances) {
                    let poison: Vec<Tensor<B, 2>> = (0..4)
                        .map(|_| Tensor::full([rows, 2 * columns], f32::NAN, (device, dtype)))
                        .collect();
                    drop(poison);
                    let found = (op.device)(&on_device);
                    let worst = worst_of(op, &found, &inputs, columns, least);
                    let passed = worst.error <= *tolerance;
                    if !passed || (rows, columns) == (129, 256) {
                        println!(
                            "{:>9} {layout:?} {:<32} error {:.2e} of {tolerance:.2e}, {:>3.0}%  [{}, {}]: {:.7e}, expected {:.7e}{}",
                            format!("{rows}x{columns}"),
                            op.name,
                            worst.error,
                            100.0 * worst.error / tolerance,
                            worst.row,
                            worst.column,
                            worst.got,
                            worst.expected,
                            if passed { "" } else { "  FAILED" }
                        );
                    }
                    good &= passed;
                    assert!(
                        (op.device)(&on_device) == found,
                        "{}: other bits, {shape:?} {layout:?}",
                        op.name
                    );
                }
            }
        }
        Ok(good)
    }
}

#[test]
fn every_device_agrees_with_the_host() {
    all_pass(|| AgainstTheHost);
}

/// Where exponentials overflow, at infinities and at NaN; and tensors of other ranks and of no elements.
struct Extremes;

impl Job for Extremes {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let dtype = target.precision.dtype();
        let label = format!("{} {}", target.label, target.precision);
        let far = [-1e4, -200.0, 200.0, 1e4];
        let x = upload::<B, 2>(&far, [1, 4], device, dtype);
        let near = |got: Vec<f64>, expected: [f64; 4], what: &str| {
            for (got, expected) in got.iter().zip(expected) {
                let within = (got - expected).abs() <= expected.abs() * epsilon(target.precision) + 1e-30;
                assert!(within, "{what} on {label}: {got} for {expected}");
            }
        };
        let far = far.map(|v| round(v, target.precision));
        near(download(B::logistic(x.clone())), [0.0, 0.0, 1.0, 1.0], "logistic");
        near(download(B::silu(x.clone())), [0.0, 0.0, far[2], far[3]], "silu");
        near(download(B::softplus(x.clone())), [0.0, 0.0, far[2], far[3]], "softplus");
        let ones = upload::<B, 2>(&[1.0; 4], [1, 4], device, dtype);
        near(download(B::silu_backward(x.clone(), ones.clone())), [0.0, 0.0, 1.0, 1.0], "silu backward");
        near(download(B::softplus_backward(x, ones)), [0.0, 0.0, 1.0, 1.0], "softplus backward");
        if !matches!(target.choice, DeviceChoice::Wgpu(_)) {
            // WGSL promises nothing for NaN.
            let nan = upload::<B, 2>(&[f64::NAN, 1.0], [1, 2], device, dtype);
            for y in [B::logistic(nan.clone()), B::silu(nan.clone()), B::silu_gate(nan.clone(), nan.clone())]
            {
                assert!(download(y)[0].is_nan(), "a NaN is lost on {label}");
            }
        }

        let cube = upload::<B, 2>(&[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0], [2, 4], device, dtype);
        let flat = download(B::silu(cube.clone()));
        let swapped = B::silu(cube.clone().reshape([2, 2, 2]).swap_dims(0, 2)).swap_dims(0, 2);
        assert!(download(swapped.reshape([2, 4])) == flat, "three sizes, swapped, on {label}");
        let wide = cube.clone().reshape([2, 2, 2]).slice([0..2, 0..1, 0..2]);
        let part = download(B::silu(wide).reshape([2, 2]));
        assert!(part == [flat[0], flat[1], flat[4], flat[5]], "part of three sizes on {label}");
        let none = B::silu(Tensor::<B, 3>::empty([0, 2, 8], (device, dtype)));
        assert_eq!(none.dims(), [0, 2, 8]);
        Ok(())
    }
}

#[test]
fn extremes_and_other_shapes() {
    for target in targets() {
        guard(&target, || run(&target, Extremes)).unwrap();
    }
}
