//! What the tests of the ops along time share: seeded inputs as flat rows, errors relative to the largest element, and
//! an explicit backward against Burn's own differentiation.

#![allow(dead_code)]

use crate::common::Random;
use burn::tensor::{DType, Tensor, TensorData};
use fairway::backend::cpu::Cpu;
use fairway::ops::Autodiff;

pub type Tape = Autodiff<Cpu>;

/// Two orders of the same f64 sums, one of them through a hundred steps, differ by some 1e-15 of the largest element
/// (2e-14 in the worst case met).
pub const BOUND: f64 = 1e-12;

pub fn device() -> burn_ndarray::NdArrayDevice {
    burn_ndarray::NdArrayDevice::Cpu
}

pub fn row(values: Vec<f64>) -> Tensor<Cpu, 1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), (&device(), DType::F64))
}

/// Seeded f64 values in [-1, 1).
pub fn random(seed: u64, count: usize) -> Tensor<Cpu, 1> {
    let mut random = Random(seed);
    row((0..count).map(|_| random.uniform()).collect())
}

/// Seeded f64 values in [low, high).
pub fn between(seed: u64, count: usize, low: f64, high: f64) -> Tensor<Cpu, 1> {
    random(seed, count).mul_scalar((high - low) / 2.0).add_scalar((high + low) / 2.0)
}

/// Decays to test with, by the values of their logarithms.
#[derive(Clone, Copy, Debug)]
pub enum Decays {
    /// From 0.1 to 1.
    Middling,
    /// So near 1 that 1 minus the decay is below f32's precision.
    NearOne,
    /// `exp(-1e4)`.
    Zero,
    /// Some zero, some near 1, some between.
    Mixed,
}

pub const ALL_DECAYS: [Decays; 4] = [Decays::Middling, Decays::NearOne, Decays::Zero, Decays::Mixed];

impl Decays {
    pub fn logarithms(self, seed: u64, count: usize) -> Tensor<Cpu, 1> {
        let mut random = Random(seed);
        row((0..count)
            .map(|_| {
                let [choice, share] = [random.uniform(), (random.uniform() + 1.0) / 2.0];
                match self {
                    Self::Middling => -2.3 * share,
                    Self::NearOne => -1e-9 * share,
                    Self::Zero => -1e4,
                    Self::Mixed if choice < -0.9 => -1e4,
                    Self::Mixed if choice < 0.0 => -1e-4 * share,
                    Self::Mixed => -0.2 * share,
                }
            })
            .collect())
    }
}

pub fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    x.cast(DType::F64).into_data().to_vec().expect("f64 values")
}

/// The largest error, as a share of the largest expected element (of 0.01 where all of it cancels).
pub fn error<const D: usize>(got: Tensor<Cpu, D>, expected: Tensor<Cpu, D>) -> f64 {
    assert_eq!(got.dims(), expected.dims());
    let (got, expected) = (values(got), values(expected));
    assert!(got.iter().all(|v| v.is_finite()), "not finite");
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    worst / largest.max(0.01)
}

pub fn assert_close<const D: usize>(what: &str, got: Tensor<Cpu, D>, expected: Tensor<Cpu, D>, bound: f64) {
    let error = error(got, expected);
    assert!(error <= bound, "{what}: error {error:e} of the largest element, bound {bound:e}");
}

/// Output and input gradients of `f`, for the upstream gradient `cot`.
pub fn differentiate<const N: usize>(
    inputs: &[Tensor<Cpu, 1>; N],
    cot: &Tensor<Cpu, 1>,
    f: impl FnOnce([Tensor<Tape, 1>; N]) -> Tensor<Tape, 1>,
) -> (Tensor<Cpu, 1>, [Tensor<Cpu, 1>; N]) {
    let leaves = inputs.each_ref().map(|x| Tensor::<Tape, 1>::from_inner(x.clone()).require_grad());
    let y = f(leaves.clone());
    let cot = Tensor::from_inner(cot.clone().cast(y.dtype()));
    let grads = (y.clone() * cot).backward();
    // An input that the output does not depend on (the weight of a single position) is not reached.
    (y.inner(), leaves.map(|leaf| leaf.grad(&grads).unwrap_or_else(|| leaf.inner().zeros_like())))
}

/// The op and its plainly differentiated counterpart agree in the output and in every input's gradient.
pub fn assert_same<const N: usize>(
    what: &str,
    inputs: &[Tensor<Cpu, 1>; N],
    cot: &Tensor<Cpu, 1>,
    op: impl FnOnce([Tensor<Tape, 1>; N]) -> Tensor<Tape, 1>,
    plain: impl FnOnce([Tensor<Tape, 1>; N]) -> Tensor<Tape, 1>,
) {
    let (y, found) = differentiate(inputs, cot, op);
    let (expected_y, expected) = differentiate(inputs, cot, plain);
    assert_close(what, y, expected_y, BOUND);
    for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert_close(&format!("{what}, gradient of input {index}"), found, expected, BOUND);
    }
}

/// The op in f32 against itself in f64 on the same (rounded) inputs: output and gradients within `bound`.
pub fn assert_f32_near_f64<const N: usize>(
    what: &str,
    inputs: &[Tensor<Cpu, 1>; N],
    cot: &Tensor<Cpu, 1>,
    bound: f64,
    op: impl Fn([Tensor<Tape, 1>; N]) -> Tensor<Tape, 1>,
) {
    let narrow = inputs.each_ref().map(|x| x.clone().cast(DType::F32));
    let wide = narrow.each_ref().map(|x| x.clone().cast(DType::F64));
    let cot = cot.clone().cast(DType::F32);
    let (y, found) = differentiate(&narrow, &cot, &op);
    let (expected_y, expected) = differentiate(&wide, &cot.cast(DType::F64), &op);
    assert_eq!(y.dtype(), DType::F32);
    assert_close(what, y, expected_y, bound);
    for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert_eq!(found.dtype(), DType::F32);
        assert_close(&format!("{what}, gradient of input {index}"), found, expected, bound);
    }
}
