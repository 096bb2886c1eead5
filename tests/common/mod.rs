//! What several tests share: the devices to run on, seeded numbers, and errors measured against a reference.

#![allow(dead_code)]

pub mod matrix;

use burn::tensor::{DType, Tensor, TensorData};
use fairway::backend::{DeviceChoice, Job, Precision, Target, devices, guard, resolve, run};
use fairway::ops::Plain;
use half::bf16;

/// Every device present in every precision that it has; a line `skipped: ...` for each backend that is missing, or is
/// not named in FAIRWAY_TEST_BACKENDS (`cuda`, `cpu wgpu`, ...) where that is set.
pub fn targets() -> Vec<Target> {
    let wanted = std::env::var("FAIRWAY_TEST_BACKENDS").ok();
    let mut targets = Vec::new();
    let mut counts = std::collections::HashMap::new();
    for info in devices() {
        let index: &mut usize = counts.entry(info.backend).or_default();
        let number = *index;
        *index += 1;
        if wanted.as_ref().is_some_and(|wanted| !wanted.split_whitespace().any(|name| name == info.backend)) {
            println!("skipped: {}: not among FAIRWAY_TEST_BACKENDS", info.backend);
            continue;
        }
        if !info.usable {
            println!("skipped: {}: {}", info.backend, info.note);
            continue;
        }
        let (choice, precisions): (_, &[Precision]) = match info.backend {
            "cpu" => (DeviceChoice::Cpu, &[Precision::F64, Precision::F32]),
            "wgpu" => (DeviceChoice::Wgpu(Some(number)), &[Precision::F32]),
            _ => (DeviceChoice::Cuda(Some(number)), &[Precision::F32, Precision::Bf16]),
        };
        targets
            .extend(precisions.iter().map(|p| resolve(&choice, Some(*p)).expect("a device that is there")));
    }
    targets
}

/// Runs a job on each of [`targets`]; what it gives is whether all was within its tolerance.
pub fn all_pass<J: Job<Output = bool>>(job: impl Fn() -> J) {
    let failed: Vec<String> = targets()
        .into_iter()
        .filter(|target| !guard(target, || run(target, job())).unwrap())
        .map(|target| format!("{} {}", target.label, target.precision))
        .collect();
    assert!(failed.is_empty(), "beyond the tolerance on {failed:?}");
}

/// The most work of a case that is to run: FAIRWAY_TEST_MOST, where that is set.
fn most() -> Option<usize> {
    let most = std::env::var("FAIRWAY_TEST_MOST").ok()?;
    Some(most.parse().unwrap_or_else(|_| panic!("FAIRWAY_TEST_MOST is {most:?}, expected a whole number")))
}

/// Whether a case of so much work is to run: always, but under FAIRWAY_TEST_MOST=N only with N at most, and otherwise a
/// line `skipped: ...`. Work is what a test counts: the multiply-adds of its case's largest product, or the elements of
/// its largest tensor. The variable is for compute-sanitizer, under which a kernel takes 100 to 1000 times as long
/// (`.ci/gpu`, whose limit is 3,000,000): of each kernel, cases with tails and with several tiles are within that.
pub fn affordable(work: usize) -> bool {
    let Some(most) = most().filter(|most| work > *most) else { return true };
    println!("skipped: a case of {work} multiply-adds or elements: more than FAIRWAY_TEST_MOST={most}");
    false
}

/// How often a case is repeated for the same bits: twice, under FAIRWAY_TEST_MOST once.
pub fn repeats() -> usize {
    if most().is_some() { 1 } else { 2 }
}

/// A tensor on a device: in f64, or through f32.
pub fn upload_as<B: Plain, const D: usize>(
    values: &[f64],
    shape: [usize; D],
    device: &B::Device,
    dtype: DType,
) -> Tensor<B, D> {
    if dtype == DType::F64 {
        return Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F64));
    }
    let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
    let tensor: Tensor<B, D> = Tensor::from_data(TensorData::new(values, shape), (device, DType::F32));
    tensor.cast(dtype)
}

/// [`upload_as`] in a precision's own type.
pub fn upload<B: Plain, const D: usize>(
    values: &[f64],
    shape: [usize; D],
    device: &B::Device,
    precision: Precision,
) -> Tensor<B, D> {
    upload_as(values, shape, device, precision.dtype())
}

/// A tensor's elements.
pub fn download<B: Plain, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Whether both are the same numbers to the bit.
pub fn same(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Seeded numbers (splitmix64).
pub struct Random(pub u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [-1, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }
}

/// The nearest value that a precision has.
pub fn round(value: f64, precision: Precision) -> f64 {
    match precision {
        Precision::F64 => value,
        Precision::F32 => f64::from(value as f32),
        // Not `from_f64`, which takes no notice of the last bits of a number near a tie.
        Precision::Bf16 => bf16::from_f32(value as f32).to_f64(),
    }
}

/// The distance from 1 to the next larger value.
pub fn epsilon(precision: Precision) -> f64 {
    match precision {
        Precision::F64 => f64::EPSILON,
        Precision::F32 => f64::from(f32::EPSILON),
        Precision::Bf16 => bf16::EPSILON.to_f64(),
    }
}

/// The largest error of some values, as a share of their row's scale, and where it is.
#[derive(Debug, Clone, Copy)]
pub struct Worst {
    pub error: f64,
    pub row: usize,
    pub column: usize,
    pub got: f64,
    pub expected: f64,
}

/// The worst element of `got` against `expected`, rows of `columns`, each row's errors divided by its scale.
pub fn worst(got: &[f64], expected: &[f64], columns: usize, scale: impl Fn(usize) -> f64) -> Worst {
    let mut worst = Worst { error: 0.0, row: 0, column: 0, got: 0.0, expected: 0.0 };
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let (row, column) = (i / columns, i % columns);
        let error = (got - expected).abs() / scale(row);
        // Not `error > worst.error`: a NaN is the worst there is, and stays.
        if !(error <= worst.error || worst.error.is_nan()) {
            worst = Worst { error, row, column, got: *got, expected: *expected };
        }
    }
    worst
}

/// The root of the mean square and the largest magnitude of errors, and where the largest is.
pub fn errors(got: &[f64], exact: &[f64]) -> ([f64; 2], usize) {
    assert_eq!(got.len(), exact.len());
    let (mut squares, mut worst, mut at) = (0.0, 0.0, 0);
    for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
        let error = (got - exact).abs();
        squares += error * error;
        // Not `error > worst`: a NaN is the worst there is, and stays.
        if !(error <= worst || f64::is_nan(worst)) {
            (worst, at) = (error, i);
        }
    }
    ([(squares / got.len() as f64).sqrt(), worst], at)
}

/// The root of the mean square; 0 of nothing.
pub fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|x| x * x).sum::<f64>() / values.len().max(1) as f64).sqrt()
}
