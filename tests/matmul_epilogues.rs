//! Products with something done to them before they are stored, beside those of tests/mlp.rs: added to rows with a scale
//! for each channel, and softcapped; forward and backward against f64 on the host.
//!
//! Tolerance: as in tests/linear.rs.

mod common;

use burn::tensor::{DType, Tensor};
use common::matrix::{Ledger, Matrix, PERIOD, grad, poison, through_the_tape};
use common::{affordable, all_pass, download, repeats, round};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target};
use fairway::ops::{Autodiff, LinearOps, Param, Plain, ResidualOps, accumulate_type};

/// The scale of a projection that is added.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    None,
    /// A parameter `[o]`.
    Alone,
    /// The second row of a parameter `[3, o]`.
    Row,
}

impl Scale {
    const ALL: [Self; 3] = [Self::None, Self::Alone, Self::Row];

    /// The parameter of these scales, and the row.
    fn param<B: Plain>(self, s: &Matrix, device: &B::Device, dtype: DType) -> Option<(Param<B>, usize)> {
        let flat = |m: &Matrix| -> Tensor<B, 1> {
            let elements = m.at.len();
            m.upload::<B>(device, accumulate_type(dtype)).reshape([elements])
        };
        match self {
            Self::None => None,
            Self::Alone => Some((Param::of_shape("s", &[s.columns], flat(s), dtype), 0)),
            Self::Row => {
                // What is in the other rows shows if it is taken.
                let at = [vec![7.0; s.columns], s.at.clone(), vec![-9.0; s.columns]].concat();
                let rows = Matrix { rows: 3, columns: s.columns, at };
                Some((Param::of_shape("s", &[3, s.columns], flat(&rows), dtype), 1))
            }
        }
    }
}

struct AddedCase {
    x: Matrix,
    w: Matrix,
    e: Matrix,
    s: Matrix,
    grad_y: Matrix,
}

struct AddedFound {
    y: Matrix,
    grad_x: Matrix,
    grad_w: Matrix,
    grad_s: Matrix,
}

impl AddedCase {
    fn new([n, i, o]: [usize; 3], precision: Precision, seed: u64) -> Self {
        let matrix =
            |rows, columns, scale: f64, k| Matrix::random(rows, columns, scale, precision, 100 * seed + k);
        Self {
            x: matrix(n, i, 1.0, 0),
            w: matrix(o, i, (3.0 / i as f64).sqrt(), 1),
            e: matrix(n, o, 1.0, 2),
            // Of both signs and sizes.
            s: matrix(1, o, 2.0, 3),
            grad_y: matrix(n, o, 1.0, 4),
        }
    }

    /// `to` rounds what the reference stores.
    fn pass(&self, scale: Scale, to: &dyn Fn(Matrix) -> Matrix) -> AddedFound {
        let (s, columns) = (&self.s, self.s.columns);
        let scaled = |m: &Matrix| match scale {
            Scale::None => m.clone(),
            _ => {
                let at = m.at.iter().enumerate().map(|(k, v)| v * s.at[k % columns]).collect();
                to(Matrix { at, ..*m })
            }
        };
        let product = to(self.x.times(&self.w.transposed()));
        let branch = scaled(&self.grad_y);
        let each = to(product.with(&self.grad_y, |p, g| p * g));
        let sums = (0..columns).map(|k| each.at.iter().skip(k).step_by(columns).sum()).collect();
        AddedFound {
            y: to(self.e.plus(&scaled(&product))),
            grad_x: to(branch.times(&self.w)),
            grad_w: branch.transposed().times(&self.x),
            grad_s: Matrix { rows: 1, columns, at: sums },
        }
    }
}

struct Added;

impl Job for Added {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let (dtype, label) = (precision.dtype(), &target.label);
        println!("\nproject_added, {label} {precision}");
        let mut good = true;
        // For the copy engine and not, one tile and several.
        let shapes = [[1, 8, 8], [3, 5, 7], [129, 72, 40], [200, 65, 130], [70, 24, 136], [900, 64, 200]];
        for (seed, shape) in shapes.into_iter().enumerate() {
            let [n, i, o] = shape;
            if !affordable(n * i * o) {
                continue;
            }
            let case = AddedCase::new(shape, precision, seed as u64);
            for scale in Scale::ALL {
                let exact = case.pass(scale, &|m| m);
                let rounded = case.pass(scale, &|m| m.map(|v| round(v, precision)));
                let w = case.w.param::<B>("w", device, dtype);
                let scales = scale.param::<B>(&case.s, device, dtype);
                let by = || scales.as_ref().map(|(scale, row)| (scale, *row));
                let [x, e, grad_y] = [&case.x, &case.e, &case.grad_y].map(|m| m.upload::<B>(device, dtype));
                let clear = || poison::<B>(n * (i + 2 * o) + o * i, device, dtype);
                let grad_s = || by().map(|(s, _)| download(s.flat_grad().expect("a gradient of s")));
                let both = || {
                    clear();
                    let (y, product) = B::project_added_forward(x.clone(), &w, e.clone(), by());
                    let y = download(y);
                    clear();
                    let grad_x = B::project_added_backward(x.clone(), product, &w, by(), grad_y.clone());
                    (y, download(grad_x), grad(&w), grad_s())
                };
                let drop_grads = || {
                    w.clear_grad();
                    scales.iter().for_each(|(s, _)| s.clear_grad());
                };
                let case_name = format!("{n}x{i}x{o} {scale:?}");
                let mut ledger = Ledger { target, case: case_name, good: true };
                let found = both();
                ledger.check("y", &found.0, &exact.y, &rounded.y, i);
                ledger.check("gx", &found.1, &exact.grad_x, &rounded.grad_x, o);
                ledger.check("gw", &found.2, &exact.grad_w, &rounded.grad_w, n);
                let check_scale = |ledger: &mut Ledger, what: &str, found: &Option<Vec<f64>>, times: f64| {
                    let Some(found) = found else { return };
                    let from = if scale == Scale::Row { o } else { 0 };
                    let outside = [&found[..from], &found[from + o..]].concat();
                    assert!(outside.iter().all(|g| *g == 0.0), "{label} {precision}: other rows' gradients");
                    let [exact, rounded] = [&exact, &rounded].map(|f| f.grad_s.map(|v| times * v));
                    ledger.check(what, &found[from..from + o], &exact, &rounded, n + i);
                };
                check_scale(&mut ledger, "gw of s", &found.3, 1.0);
                let twice = both();
                let [exact_twice, rounded_twice] = [&exact, &rounded].map(|f| f.grad_w.map(|v| 2.0 * v));
                ledger.check("gw twice", &twice.2, &exact_twice, &rounded_twice, 2 * n);
                check_scale(&mut ledger, "gw of s twice", &twice.3, 2.0);
                for _ in 0..repeats() {
                    drop_grads();
                    assert!(both() == found, "{label} {precision} {}: other bits", ledger.case);
                }

                // Through the tape: the gradient of e is that of the output.
                drop_grads();
                let [on_tape, added] =
                    [&x, &e].map(|m| Tensor::<Autodiff<B>, 2>::from_inner(m.clone()).require_grad());
                let y = <Autodiff<B> as LinearOps>::project_added(on_tape.clone(), &w, added.clone(), by());
                assert!(download(y.clone().inner()) == found.0, "{label} {precision}: y through the tape");
                let grads = (y * Tensor::from_inner(grad_y.clone())).sum().backward();
                let [through, of_e] = [on_tape, added].map(|m| download(m.grad(&grads).expect("a gradient")));
                assert!(of_e == case.grad_y.at, "{label} {precision}: the gradient of e");
                assert!((through, grad(&w), grad_s()) == (found.1, found.2, found.3), "through the tape");

                // Frozen ones.
                drop_grads();
                w.set_trainable(false);
                scales.iter().for_each(|(s, _)| s.set_trainable(false));
                both_frozen::<B>(&x, &e, &w, by(), &grad_y);
                assert!(w.flat_grad().is_none(), "a frozen weight's gradient");
                assert!(by().is_none_or(|(s, _)| s.flat_grad().is_none()), "a frozen scale's gradient");
                good &= ledger.good;
            }
        }
        Ok(good)
    }
}

fn both_frozen<B: Plain>(
    x: &Tensor<B, 2>,
    e: &Tensor<B, 2>,
    w: &Param<B>,
    scale: Option<(&Param<B>, usize)>,
    grad_y: &Tensor<B, 2>,
) {
    let (_, product) = B::project_added_forward(x.clone(), w, e.clone(), scale);
    B::project_added_backward(x.clone(), product, w, scale, grad_y.clone());
}

#[test]
fn an_added_projection_agrees_with_the_host() {
    all_pass(|| Added);
}

/// So many rows of bf16 that `cuda/matmul_pingpong.cu` takes the product, and wide tiles of `cuda/matmul.cu`.
struct ManyRows;

impl Job for ManyRows {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let (precision, label, dtype) = (target.precision, &target.label, target.precision.dtype());
        if precision != Precision::Bf16 {
            println!("skipped: many rows, {label} {precision}: no form of its own");
            return Ok(true);
        }
        println!("\nmany rows, {label} {precision}");
        let mut good = true;
        // A panel of b in shared memory, both streamed, and tiles of 192 and 256 columns; such tiles of few rows, and more
        // of them than fit at once.
        let shapes = [
            [16_403, 328, 512],
            [8201, 512, 1024],
            [8201, 1032, 1024],
            [4227, 72, 1032],
            [4090, 520, 2040],
            [8, 8, 33_000],
            [8, 8, 34_056],
        ];
        for [n, i, o] in shapes {
            if !affordable(n * i * o) {
                continue;
            }
            let case = AddedCase::new([PERIOD, i, o], precision, (n + o) as u64);
            let w = case.w.param::<B>("w", device, dtype);
            let [x, e] = [&case.x, &case.e].map(|m| m.repeated(n).upload::<B>(device, dtype));
            for scale in Scale::ALL {
                let scales = scale.param::<B>(&case.s, device, dtype);
                let by = scales.as_ref().map(|(scale, row)| (scale, *row));
                let exact = case.pass(scale, &|m| m).y.repeated(n);
                let rounded = case.pass(scale, &|m| m.map(|v| round(v, precision))).y.repeated(n);
                let forward = || {
                    poison::<B>(n * o, device, dtype);
                    download(B::project_added(x.clone(), &w, e.clone(), by))
                };
                let mut ledger = Ledger { target, case: format!("{n}x{i}x{o} {scale:?}"), good: true };
                let found = forward();
                ledger.check("y", &found, &exact, &rounded, i);
                for _ in 0..repeats() {
                    assert!(forward() == found, "{label} {precision} {}: other bits", ledger.case);
                }
                good &= ledger.good;
            }
        }
        Ok(good)
    }
}

#[test]
fn many_rows_of_added_projections_agree_with_the_host() {
    all_pass(|| ManyRows);
}

struct Capped;

impl Job for Capped {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let (precision, label, dtype) = (target.precision, &target.label, target.precision.dtype());
        println!("\ncapped_logits, {label} {precision}");
        let mut good = true;
        for (seed, [n, c, v]) in [[1, 8, 8], [1, 64, 260], [3, 5, 7], [130, 72, 264]].into_iter().enumerate()
        {
            if !affordable(n * c * v) {
                continue;
            }
            for cap in [Some(30.0), Some(2.5), None] {
                let matrix = |rows, k| Matrix::random(rows, c, 2.0, precision, 10 * seed as u64 + k);
                let (h, w) = (matrix(n, 0), matrix(v, 1));
                let param = w.param::<B>("w", device, dtype);
                let on_device = h.upload::<B>(device, dtype);
                let z = || {
                    poison::<B>(n * v, device, dtype);
                    download(B::capped_logits(on_device.clone(), &param, cap))
                };
                let exact =
                    h.times(&w.transposed()).map(|z| cap.map_or(z, |cap: f64| cap * (z / cap).tanh()));
                let mut ledger = Ledger { target, case: format!("{n}x{c}x{v} {cap:?}"), good: true };
                let found = z();
                // A tanh within four units of f32 at 1 (some adapters make it of exponentials).
                let unit = if precision == Precision::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
                let rounded = exact.map(|z| z + 4.0 * unit * cap.unwrap_or(0.0));
                ledger.check("z in f32", &found, &exact, &rounded, c);
                assert!(z() == found, "{label} {precision} {}: other bits", ledger.case);
                good &= ledger.good;
            }
        }
        Ok(good)
    }
}

#[test]
fn capped_logits_agree_with_the_host() {
    all_pass(|| Capped);
}

/// On the CPU the ops are their compositions to the bit, on the tape too.
#[test]
fn the_reference_is_the_composition() {
    type Tape = Autodiff<Cpu>;
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let case = AddedCase::new([31, 24, 20], Precision::F32, 1);
    let w = case.w.param::<Cpu>("w", &device, DType::F32);
    let scales = Scale::Row.param::<Cpu>(&case.s, &device, DType::F32);
    let (s, row) = scales.as_ref().map(|(s, row)| (s, *row)).expect("a scale");
    let gradients = |f: &dyn Fn([Tensor<Tape, 2>; 2]) -> Tensor<Tape, 2>| {
        through_the_tape([&case.x, &case.e], &[&w, s], &case.grad_y, f)
    };
    let composed = gradients(&|[x, e]| Tape::scaled_add(e, Tape::project(x, &w), s, row));
    assert_eq!(composed.len(), 5);
    assert!(gradients(&|[x, e]| Tape::project_added(x, &w, e, Some((s, row)))) == composed);
    let composed = gradients(&|[x, e]| e + Tape::project(x, &w));
    assert_eq!(composed.len(), 4);
    assert!(gradients(&|[x, e]| Tape::project_added(x, &w, e, None)) == composed);
}
