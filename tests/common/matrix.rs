//! Matrices on the host in f64, parameters made of them, and what a device's tensors are held against.

use super::{Random, download, epsilon, round, worst};
use burn::tensor::{DType, Tensor, TensorData};
use fairway::backend::cpu::Cpu;
use fairway::backend::{Precision, Target};
use fairway::ops::{Autodiff, Param, Plain};

/// A matrix on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub at: Vec<f64>,
}

impl Matrix {
    pub fn random(rows: usize, columns: usize, scale: f64, precision: Precision, seed: u64) -> Self {
        let mut random = Random(seed);
        let at = (0..rows * columns).map(|_| round(random.uniform() * scale, precision)).collect();
        Self { rows, columns, at }
    }

    pub fn transposed(&self) -> Self {
        let at = (0..self.at.len()).map(|i| self.at[i % self.rows * self.columns + i / self.rows]).collect();
        Self { rows: self.columns, columns: self.rows, at }
    }

    pub fn times(&self, other: &Self) -> Self {
        assert_eq!(self.columns, other.rows);
        let mut at = vec![0.0; self.rows * other.columns];
        for (row, out) in self.at.chunks(self.columns).zip(at.chunks_mut(other.columns)) {
            for (x, other) in row.iter().zip(other.at.chunks(other.columns)) {
                out.iter_mut().zip(other).for_each(|(out, w)| *out += x * w);
            }
        }
        Self { rows: self.rows, columns: other.columns, at }
    }

    /// So many rows: these again and again.
    pub fn repeated(&self, rows: usize) -> Self {
        let at = self.at.iter().copied().cycle().take(rows * self.columns).collect();
        Self { rows, columns: self.columns, at }
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { at: self.at.iter().map(|x| f(*x)).collect(), ..*self }
    }

    pub fn with(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        assert_eq!((self.rows, self.columns), (other.rows, other.columns));
        Self { at: self.at.iter().zip(&other.at).map(|(a, b)| f(*a, *b)).collect(), ..*self }
    }

    pub fn plus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    /// The columns of several matrices side by side.
    pub fn beside(parts: &[&Self]) -> Self {
        let rows = parts[0].rows;
        let row = |r: usize| parts.iter().flat_map(move |p| &p.at[r * p.columns..][..p.columns]).copied();
        let at: Vec<f64> = (0..rows).flat_map(row).collect();
        Self { rows, columns: at.len() / rows, at }
    }

    pub fn upload<B: Plain>(&self, device: &B::Device, dtype: DType) -> Tensor<B, 2> {
        let shape = [self.rows, self.columns];
        if dtype == DType::F64 {
            return Tensor::from_data(TensorData::new(self.at.clone(), shape), (device, dtype));
        }
        let values: Vec<f32> = self.at.iter().map(|v| *v as f32).collect();
        Tensor::<B, 2>::from_data(TensorData::new(values, shape), (device, DType::F32)).cast(dtype)
    }

    /// On the device in columns `from..` of a wider matrix: a view where the device makes one.
    pub fn upload_within<B: Plain>(&self, from: usize, device: &B::Device, dtype: DType) -> Tensor<B, 2> {
        let side = Self { rows: self.rows, columns: from, at: vec![f64::NAN; self.rows * from] };
        let wide = Self::beside(&[&side, self, &side]).upload::<B>(device, dtype);
        wide.slice([0..self.rows, from..from + self.columns])
    }

    pub fn param<B: Plain>(&self, name: &str, device: &B::Device, dtype: DType) -> Param<B> {
        let master = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Param::new(name, self.upload::<B>(device, master), dtype)
    }
}

/// A weight's gradient.
pub fn grad<B: Plain>(w: &Param<B>) -> Vec<f64> {
    download(w.grad::<2>().unwrap_or_else(|| panic!("no gradient of {}", w.name())))
}

/// What `f` gives on the CPU in f32, and through the tape, its result times `factor`, the gradients of its inputs and of
/// those parameters that get one.
pub fn through_the_tape<const N: usize>(
    inputs: [&Matrix; N],
    params: &[&Param<Cpu>],
    factor: &Matrix,
    f: impl Fn([Tensor<Autodiff<Cpu>, 2>; N]) -> Tensor<Autodiff<Cpu>, 2>,
) -> Vec<Vec<f64>> {
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let upload = |m: &Matrix| Tensor::<Autodiff<Cpu>, 2>::from_inner(m.upload::<Cpu>(&device, DType::F32));
    params.iter().for_each(|param| param.clear_grad());
    let tracked = inputs.map(|m| upload(m).require_grad());
    let y = f(tracked.clone());
    let grads = (y.clone() * upload(factor)).sum().backward();
    let mut found = vec![download(y.inner())];
    found.extend(tracked.map(|x| download(x.grad(&grads).expect("a gradient"))));
    found.extend(params.iter().filter_map(|param| Some(download(param.flat_grad()?))));
    found
}

/// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
pub fn poison<B: Plain>(elements: usize, device: &B::Device, dtype: DType) {
    let types = [dtype, if dtype == DType::F64 { dtype } else { DType::F32 }];
    let poison: Vec<Tensor<B, 1>> =
        (0..6).map(|i| Tensor::full([elements], f32::NAN, (device, types[i % 2]))).collect();
    drop(poison);
}

/// What a case has found: prints a line for each tensor, and knows whether all were within their tolerance.
pub struct Ledger<'a> {
    pub target: &'a Target,
    pub case: String,
    pub good: bool,
}

impl Ledger<'_> {
    /// Holds `got` against `exact`; `rounded` is what the reference gives with rounded intermediates, `terms` the longest
    /// sum behind an element.
    pub fn check(&mut self, what: &str, got: &[f64], exact: &Matrix, rounded: &Matrix, terms: usize) {
        let precision = self.target.precision;
        // Gradients of weights are f32 where the activations are bf16.
        let is_wide = what.contains("gw") || what.contains("f32");
        let square = exact.at.iter().map(|x| x * x).sum::<f64>() / exact.at.len() as f64;
        let scale = square.sqrt().max(f64::MIN_POSITIVE);
        assert_eq!(got.len(), exact.at.len(), "{what}");
        let found = worst(got, &exact.at, exact.columns, |_| scale);
        let reference = worst(&rounded.at, &exact.at, exact.columns, |_| scale).error;
        // A sum of products of random signs, each partial sum rounded.
        let unit = if precision == Precision::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        let each = if precision == Precision::Bf16 { 16.0 } else { 4.0 };
        let own = if is_wide { unit } else { epsilon(precision) };
        let tolerance = 2.0 * reference.max(own) + (each * (terms as f64).sqrt() + 16.0) * unit;
        let within = found.error <= tolerance;
        println!(
            "{:>24} {what:<12} error {:.2e} of {tolerance:.2e}, {:>3.0}%  [{}, {}]: {:.7e}, expected {:.7e}{}",
            self.case,
            found.error,
            100.0 * found.error / tolerance,
            found.row,
            found.column,
            found.got,
            found.expected,
            if within { "" } else { "  FAILED" }
        );
        self.good &= within;
    }
}

/// Rows of which the others are copies, so that the host multiplies few of many: shares no factor with the distances
/// between a block's tiles.
pub const PERIOD: usize = 17;
