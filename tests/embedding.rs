//! The embedding on every device: rows to the bit, and its gradient against sums in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the reference's sums in f32, as the gradient is on every
//! device but for f64; at least twice the distance between neighbouring numbers. Errors are shares of the magnitudes
//! that a row's largest sum adds up.

mod common;

use burn::tensor::{DType, Int, Tensor, TensorData};
use common::{Random, Worst, affordable, all_pass, download, repeats, round, targets, upload, worst};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::{Autodiff, EmbeddingOps, Param, Plain, embedding};

/// How often which ids come.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Ids {
    /// All alike.
    Uniform,
    /// Small ones far more often, as in text.
    Skewed,
    /// The last one alone.
    One,
    /// Each as often as the others, ascending.
    Ascending,
    /// Every second one, descending.
    Halves,
}

/// Tokens, vocabulary, columns: vectors and not; parts and tiles full and not; more rounds of a tile than one; counts of
/// 32 warps, of 8, of 2.
const SHAPES: [([usize; 3], Ids); 16] = [
    ([1, 1, 1], Ids::One),
    ([5, 3, 4], Ids::Uniform),
    ([64, 2, 8], Ids::Ascending),
    ([65, 2, 8], Ids::One),
    ([128, 128, 3], Ids::Ascending),
    ([200, 3, 12], Ids::Halves),
    ([1023, 7, 3], Ids::Skewed),
    ([1025, 300, 112], Ids::Uniform),
    ([4096, 1024, 64], Ids::Skewed),
    ([4097, 257, 1], Ids::Halves),
    ([1500, 1024, 512], Ids::Skewed),
    ([2000, 4096, 128], Ids::Uniform),
    ([1200, 10_240, 20], Ids::Skewed),
    ([20_000, 512, 8], Ids::One),
    ([140_001, 40, 8], Ids::Skewed),
    ([300, 50_257, 4], Ids::Uniform),
];

/// The same where the device is fast: tiles of their most tokens and more of them than for fewer tokens; a whole
/// micro-batch, ids that lie in very many parts and none that lies in one alone.
const LARGE: [([usize; 3], Ids); 4] = [
    ([600_001, 5, 2], Ids::Uniform),
    ([65_536, 1024, 64], Ids::Skewed),
    ([65_536, 8192, 16], Ids::Uniform),
    ([33_000, 3, 24], Ids::Halves),
];

struct Case {
    vocab: usize,
    columns: usize,
    ids: Vec<i32>,
    w: Vec<f64>,
    grad: Vec<f64>,
}

impl Case {
    fn new([tokens, vocab, columns]: [usize; 3], kind: Ids, precision: Precision, seed: u64) -> Self {
        let mut random = Random(seed);
        let last = vocab - 1;
        let id = |(i, u): (usize, f64)| match kind {
            Ids::Uniform => ((u * vocab as f64) as usize).min(last),
            Ids::Skewed => ((u * u * u * vocab as f64) as usize).min(last),
            Ids::One => last,
            Ids::Ascending => i * vocab / tokens,
            Ids::Halves => (tokens - 1 - i) * vocab / tokens / 2 * 2,
        };
        let ids = (0..tokens).map(|i| id((i, random.uniform() / 2.0 + 0.5)) as i32).collect();
        let mut values = |count: usize| -> Vec<f64> {
            (0..count).map(|_| round(random.uniform() * 3.0, precision)).collect()
        };
        Self { vocab, columns, ids, w: values(vocab * columns), grad: values(tokens * columns) }
    }

    fn forward(&self) -> Vec<f64> {
        let row = |id: &i32| self.w[*id as usize * self.columns..][..self.columns].iter().copied();
        self.ids.iter().flat_map(row).collect()
    }

    /// The gradient of the table, and each row's scale.
    fn backward(&self) -> (Vec<f64>, Vec<f64>) {
        let mut sums = vec![0.0; self.vocab * self.columns];
        let mut sizes = sums.clone();
        for (id, grad) in self.ids.iter().zip(self.grad.chunks(self.columns)) {
            let first = *id as usize * self.columns;
            for (c, grad) in grad.iter().enumerate() {
                sums[first + c] += grad;
                sizes[first + c] += grad.abs();
            }
        }
        let largest = |row: &[f64]| row.iter().fold(f64::MIN_POSITIVE, |most, size| most.max(*size));
        (sums, sizes.chunks(self.columns).map(largest).collect())
    }

    fn error(&self, (sums, scales): &(Vec<f64>, Vec<f64>), got: &[f64]) -> Worst {
        worst(got, sums, self.columns, |row| scales[row])
    }

    fn on<B: Plain>(
        &self,
        device: &B::Device,
        precision: Precision,
    ) -> (Tensor<B, 1, Int>, Param<B>, Tensor<B, 2>) {
        let tokens = self.ids.len();
        let master = if precision == Precision::F64 { precision } else { Precision::F32 };
        let w = upload(&self.w, [self.vocab, self.columns], device, master);
        let ids = Tensor::from_data(TensorData::new(self.ids.clone(), [tokens]), device);
        let grad = upload(&self.grad, [tokens, self.columns], device, precision);
        (ids, Param::new("w", w, precision.dtype()), grad)
    }
}

fn poison<B: Plain>(case: &Case, device: &B::Device) {
    let (tokens, vocab, columns) = (case.ids.len(), case.vocab, case.columns);
    let sizes =
        [[tokens, columns], [vocab, columns], [tokens.div_ceil(64) * 2, columns], [tokens, 2], [tokens, 1]];
    let poison: Vec<Tensor<B, 2>> =
        sizes.map(|shape| Tensor::full(shape, f32::NAN, (device, DType::F32))).into_iter().collect();
    drop(poison);
}

fn tolerance(case: &Case, exact: &(Vec<f64>, Vec<f64>), precision: Precision) -> f64 {
    if precision == Precision::F64 {
        return 64.0 * f64::EPSILON;
    }
    let (ids, w, grad) = case.on::<Cpu>(&burn_ndarray::NdArrayDevice::Cpu, Precision::F32);
    embedding::backward(ids, &w, grad);
    let got = download(w.take_grad::<2>().expect("a gradient"));
    2.0 * case.error(exact, &got).error.max(f64::from(f32::EPSILON))
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
            "{:>18} {:<9} {:>9} {:>9} {:>6}  worst element",
            "shape", "ids", "error", "tolerance", "share"
        );
        let large = if matches!(target.choice, DeviceChoice::Cuda(_)) { LARGE.as_slice() } else { &[] };
        for (number, &(shape, kind)) in SHAPES.iter().chain(large).enumerate() {
            let [tokens, vocab, columns] = shape;
            if !affordable(tokens.max(vocab) * columns) {
                continue;
            }
            let case = Case::new(shape, kind, precision, number as u64);
            let exact = case.backward();
            let tolerance = tolerance(&case, &exact, precision);
            let (ids, w, grad) = case.on::<B>(device, precision);
            poison::<B>(&case, device);
            assert!(download(B::embed(ids.clone(), &w)) == case.forward(), "{shape:?}: a row differs");
            let backward = || {
                poison::<B>(&case, device);
                B::embed_backward(ids.clone(), &w, grad.clone());
                download(w.take_grad::<2>().expect("a gradient"))
            };
            let got = backward();
            assert_eq!(got.len(), case.w.len());
            let worst = case.error(&exact, &got);
            let share = worst.error / tolerance;
            let within = share <= 1.0;
            println!(
                "{:>18} {:<9} {:>9.2e} {tolerance:>9.2e} {:>5.0}%  [{}, {}]: {:.8e}, expected {:.8e}{}",
                format!("{}x{}x{}", shape[0], shape[1], shape[2]),
                format!("{kind:?}"),
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
                let again = backward();
                assert!(
                    again.iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{shape:?}: gw differs"
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

struct TapeAndViews;

impl Job for TapeAndViews {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let case = Case::new([200, 40, 24], Ids::Skewed, target.precision, 5);
        let (ids, w, grad) = case.on::<B>(device, target.precision);
        let explicit = |ids: Tensor<B, 1, Int>, grad: Tensor<B, 2>| {
            B::embed_backward(ids, &w, grad);
            download(w.take_grad::<2>().expect("a gradient"))
        };
        let expected = explicit(ids.clone(), grad.clone());
        let through = || {
            let ids = Tensor::<Autodiff<B>, 1, Int>::from_inner(ids.clone());
            let y = <Autodiff<B> as EmbeddingOps>::embed(ids, &w);
            (y * Tensor::from_inner(grad.clone())).sum().backward()
        };
        through();
        assert!(download(w.grad::<2>().expect("a gradient")) == expected, "on {}", target.label);
        // Added to what is there: doubling is exact.
        through();
        let twice: Vec<f64> = expected.iter().map(|g| 2.0 * g).collect();
        // And where somebody else holds it, not in its place.
        let held = w.grad::<2>().expect("a gradient");
        through();
        assert!(download(held) == twice, "on {}", target.label);
        let sum = download(w.take_grad::<2>().expect("a gradient"));
        let thrice = expected.iter().zip(twice).map(|(g, twice)| match target.precision {
            Precision::F64 => g + twice,
            _ => round(g + twice, Precision::F32),
        });
        assert!(sum.into_iter().eq(thrice), "on {}", target.label);
        w.set_trainable(false);
        through();
        assert!(w.take_grad::<2>().is_none(), "on {}", target.label);
        w.set_trainable(true);

        // Gradients and ids that are no dense tensors of their own.
        let dense =
            |t: Tensor<B, 2>| upload::<B, 2>(&download(t.clone()), t.dims(), device, target.precision);
        let few = ids.clone().narrow(0, 9, 24);
        let views = [
            grad.clone().slice([3..27, 0..24]),
            grad.clone().slice([0..24, 0..24]).transpose(),
            grad.slice([5..6, 0..24]).expand([24, 24]),
        ];
        for (number, view) in views.into_iter().enumerate() {
            let expected = explicit(few.clone(), dense(view.clone()));
            assert!(explicit(few.clone(), view) == expected, "view {number} on {}", target.label);
        }
        let rows = download(B::embed(few, &w));
        assert!(rows == case.forward()[9 * 24..33 * 24], "on {}", target.label);
        Ok(())
    }
}

#[test]
fn the_tape_adds_the_explicit_gradient_and_any_layout_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, TapeAndViews)).unwrap();
    }
}
