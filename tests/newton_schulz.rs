//! Newton-Schulz's iteration on every device against a computation in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the reference itself makes in the device's precision, over
//! enough matrices to be typical of it.

mod common;

use burn::tensor::Tensor;
use common::{Random, Worst, affordable, all_pass, download, epsilon, repeats, round};
use common::{targets, upload, worst};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::Plain;
use fairway::ops::newton_schulz::{NewtonSchulz, reference};

/// Matrices, rows, columns: wide, tall and square, with and without whole packs and tiles.
const SHAPES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [4, 1, 7],
    [5, 7, 1],
    [4, 3, 5],
    [2, 17, 33],
    [2, 33, 17],
    [3, 64, 64],
    [2, 130, 70],
    [1, 70, 130],
    [2, 96, 200],
    [2, 200, 96],
    [3, 136, 264],
];

/// The same where the device is fast: several tiles of 128 a side, the last full, partly filled or less than half; long
/// sums, and short ones.
const LARGE: [[usize; 3]; 8] = [
    [2, 384, 384],
    [3, 264, 520],
    [3, 520, 264],
    [1, 136, 1000],
    [2, 8, 200],
    [2, 200, 8],
    [1, 328, 320],
    [1, 136, 144],
];

/// Matrices of different magnitudes, the third of zeros.
fn matrices([n, rows, columns]: [usize; 3], precision: Precision, seed: u64) -> Vec<f64> {
    let mut random = Random(seed);
    let scale = |z: usize| if z == 2 { 0.0 } else { [1.0, 30.0, 1.0, 1e-3, 0.1][z % 5] };
    (0..n * rows * columns)
        .map(|i| round(random.uniform() * scale(i / (rows * columns)), precision))
        .collect()
}

/// `x[a, k] y[k, b]`.
fn product(x: &[f64], y: &[f64], [a, k, b]: [usize; 3]) -> Vec<f64> {
    let mut z = vec![0.0; a * b];
    for i in 0..a {
        for (t, y) in y.chunks(b).enumerate() {
            let x = x[i * k + t];
            z[i * b..][..b].iter_mut().zip(y).for_each(|(z, y)| *z += x * y);
        }
    }
    z
}

fn transposed(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
}

/// The iteration on the host, nothing rounded.
fn exact(g: &[f64], [n, rows, columns]: [usize; 3], iteration: NewtonSchulz) -> Vec<f64> {
    let [a, b, c] = iteration.coefficients;
    let (short, long) = (rows.min(columns), rows.max(columns));
    let matrix = |g: &[f64]| {
        let norm = g.iter().map(|x| x * x).sum::<f64>().sqrt() + iteration.eps;
        let g: Vec<f64> = g.iter().map(|x| x / norm).collect();
        let mut x = if rows > columns { transposed(&g, rows, columns) } else { g };
        for _ in 0..iteration.steps {
            let gram = product(&x, &transposed(&x, short, long), [short, long, short]);
            let square = product(&gram, &gram, [short; 3]);
            let poly: Vec<f64> =
                gram.iter().zip(square).map(|(gram, square)| b * gram + c * square).collect();
            let change = product(&poly, &x, [short, short, long]);
            x.iter_mut().zip(change).for_each(|(x, change)| *x = a * *x + change);
        }
        if rows > columns { transposed(&x, short, long) } else { x }
    };
    assert_eq!(g.len(), n * rows * columns);
    g.chunks(rows * columns).flat_map(matrix).collect()
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
fn poison<B: Plain>(shape: [usize; 3], device: &B::Device, precision: Precision) {
    let poison: Vec<Tensor<B, 3>> =
        (0..6).map(|_| Tensor::full(shape, f32::NAN, (device, precision.dtype()))).collect();
    drop(poison);
}

fn worst_of(got: &[f64], expected: &[f64], columns: usize) -> Worst {
    worst(got, expected, columns, |_| 1.0)
}

/// The largest error of the reference where it rounds as the device does.
fn reference_error([n, rows, columns]: [usize; 3], iteration: NewtonSchulz, precision: Precision) -> f64 {
    let rounds = iteration.bf16 || precision == Precision::Bf16;
    if precision == Precision::F64 && !rounds {
        // Against which the host's own f64 is no better a measure.
        return 512.0 * f64::EPSILON;
    }
    let shape = [n.max(4096usize.div_ceil(rows * columns)), rows, columns];
    let g = matrices(shape, precision, 7);
    let x = upload::<Cpu, 3>(&g, shape, &burn_ndarray::NdArrayDevice::Cpu, Precision::F32);
    let x = download(reference(x, NewtonSchulz { bf16: rounds, ..iteration }));
    worst_of(&x, &exact(&g, shape, iteration), columns).error.max(epsilon(precision))
}

struct AgainstTheHost;

impl Job for AgainstTheHost {
    /// Whether all matrices were within their tolerance.
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let mut good = true;
        println!("\n{} {precision}", target.label);
        println!(
            "{:>12} {:>5} {:>6} {:>9} {:>9} {:>6}  worst element",
            "shape", "steps", "bf16", "error", "tolerance", "share"
        );
        let large = if matches!(target.choice, DeviceChoice::Cuda(_)) { LARGE.as_slice() } else { &[] };
        for (number, &shape) in SHAPES.iter().chain(large).enumerate() {
            if !affordable(shape.iter().product::<usize>() * shape[1].min(shape[2])) {
                continue;
            }
            for (steps, bf16) in [(0, false), (5, false), (5, true)] {
                let iteration = NewtonSchulz { steps, bf16, ..NewtonSchulz::default() };
                let [_, rows, columns] = shape;
                let g = matrices(shape, precision, number as u64);
                let tolerance = 2.0 * reference_error(shape, iteration, precision);
                let uploaded = upload::<B, 3>(&g, shape, device, precision);
                poison::<B>(shape, device, precision);
                poison::<B>([shape[0], rows.min(columns), rows.min(columns)], device, precision);
                let found = B::newton_schulz(uploaded.clone(), iteration);
                assert_eq!((found.dims(), found.dtype()), (shape, precision.dtype()));
                let x = download(found);
                let worst = worst_of(&x, &exact(&g, shape, iteration), columns);
                let share = worst.error / tolerance;
                let within = share <= 1.0;
                println!(
                    "{:>12} {steps:>5} {bf16:>6} {:>9.2e} {tolerance:>9.2e} {:>5.0}%  [{}, {}]: {:.8e}, expected {:.8e}{}",
                    format!("{}x{rows}x{columns}", shape[0]),
                    worst.error,
                    100.0 * share,
                    worst.row,
                    worst.column,
                    worst.got,
                    worst.expected,
                    if within { "" } else { "  FAILED" }
                );
                good &= within;
                for _ in 0..repeats() {
                    let again = download(B::newton_schulz(uploaded.clone(), iteration));
                    let same = again.iter().zip(&x).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{shape:?} with {iteration:?} differs");
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

struct Views;

impl Job for Views {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let precision = target.precision;
        let shape = [4, 24, 40];
        let x = upload::<B, 3>(&matrices(shape, precision, 1), shape, device, precision);
        // One step: the sums' order, which a layout may change on the CPU, is not blown up by many.
        let iteration = NewtonSchulz { steps: 1, ..NewtonSchulz::default() };
        let views = [
            ("matrices from an offset", x.clone().slice([1..2, 0..24, 0..40])),
            ("an offset that is no whole pack", x.clone().slice([0..4, 3..24, 0..40])),
            ("columns from an offset", x.clone().slice([0..4, 0..24, 1..38])),
            ("transposed", x.clone().swap_dims(1, 2)),
            ("one matrix expanded", x.clone().slice([1..2, 0..24, 0..40]).expand([3, 24, 40])),
        ];
        for (name, view) in views {
            let dense = upload::<B, 3>(&download(view.clone()), view.dims(), device, precision);
            let columns = view.dims()[2];
            let expected = download(B::newton_schulz(dense, iteration));
            let worst = worst_of(&download(B::newton_schulz(view, iteration)), &expected, columns);
            let within = worst.error <= 8.0 * epsilon(precision);
            assert!(within, "{name} on {} {precision}: {worst:?}", target.label);
        }
        let none = Tensor::<B, 3>::empty([0, 8, 16], (device, precision.dtype()));
        assert_eq!(B::newton_schulz(none, NewtonSchulz { steps: 0, ..iteration }).dims(), [0, 8, 16]);
        Ok(())
    }
}

#[test]
fn any_layout_of_the_input_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}
