//! The fused ops' references: each explicit backward against Burn's own differentiation of the forward, in f64 on the
//! CPU; how they cut their work and add up gradients; and the few exact ones on every device.
//!
//! What they compute is held against other people's numbers in `parity.rs`.

mod common;

use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_autodiff::grads::Gradients;
use common::{Random, targets};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target, run};
use fairway::ops::cross_entropy::softcap;
use fairway::ops::hash::Hash;
use fairway::ops::rope::{RopeTable, rotate};
use fairway::ops::*;
use fairway::optim::round_bf16;
use half::bf16;

type Tape = Autodiff<Cpu>;

/// Two orders of the same f64 sums differ by some 1e-15 of the largest element.
const BOUND: f64 = 1e-12;

fn device() -> burn_ndarray::NdArrayDevice {
    burn_ndarray::NdArrayDevice::Cpu
}

/// Seeded f64 values in [-1, 1).
fn random<const D: usize>(seed: u64, shape: [usize; D]) -> Tensor<Cpu, D> {
    let mut random = Random(seed);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| random.uniform()).collect();
    Tensor::from_data(TensorData::new(values, shape), (&device(), DType::F64))
}

fn integers<B: Base>(values: &[i64], device: &B::Device) -> Tensor<B, 1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

fn leaf<const D: usize>(x: &Tensor<Cpu, D>) -> Tensor<Tape, D> {
    Tensor::from_inner(x.clone()).require_grad()
}

fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    x.into_data().to_vec().expect("f64 values")
}

/// The largest error is within `BOUND` of the largest expected element (of 0.01 where all of it cancels).
fn assert_close<const D: usize>(what: &str, got: Tensor<Cpu, D>, expected: Tensor<Cpu, D>) {
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let (got, expected) = (values(got), values(expected));
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(got.iter().all(|v| v.is_finite()), "{what}: not finite");
    assert!(worst <= BOUND * largest.max(0.01), "{what}: error {worst:e} of {largest:e}");
}

/// Output and input gradients of `f`, for the upstream gradient `cot`.
fn differentiate<const D: usize, const O: usize, const N: usize>(
    inputs: &[Tensor<Cpu, D>; N],
    cot: &Tensor<Cpu, O>,
    f: impl FnOnce([Tensor<Tape, D>; N]) -> Tensor<Tape, O>,
) -> (Tensor<Cpu, O>, Vec<Tensor<Cpu, D>>, Gradients) {
    let leaves = inputs.each_ref().map(leaf);
    let y = f(leaves.clone());
    let grads = (y.clone() * Tensor::from_inner(cot.clone())).backward();
    let found = leaves.iter().map(|leaf| leaf.grad(&grads).expect("a gradient")).collect();
    (y.inner(), found, grads)
}

/// The op and its plainly differentiated counterpart agree in the output and in every input's gradient.
fn assert_same<const D: usize, const O: usize, const N: usize>(
    what: &str,
    inputs: [Tensor<Cpu, D>; N],
    cot: Tensor<Cpu, O>,
    op: impl FnOnce([Tensor<Tape, D>; N]) -> Tensor<Tape, O>,
    plain: impl FnOnce([Tensor<Tape, D>; N]) -> Tensor<Tape, O>,
) -> Gradients {
    let (y, found, _) = differentiate(&inputs, &cot, op);
    let (expected_y, expected, grads) = differentiate(&inputs, &cot, plain);
    assert_close(what, y, expected_y);
    for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert_close(&format!("{what}, gradient of input {index}"), found, expected);
    }
    grads
}

/// The gradient that a parameter has accumulated is the leaf's.
fn assert_grad<const D: usize>(what: &str, param: &Param<Cpu>, leaf: &Tensor<Tape, D>, grads: &Gradients) {
    let found = param.grad::<D>().unwrap_or_else(|| panic!("{what}: no gradient of {}", param.name()));
    assert_close(
        &format!("{what}, gradient of {}", param.name()),
        found,
        leaf.grad(grads).expect("a gradient"),
    );
}

fn param<const D: usize>(value: &Tensor<Cpu, D>) -> Param<Cpu> {
    Param::new("w", value.clone(), DType::F64)
}

#[test]
fn squared_activation_backward_is_the_derivative() {
    for slope in [0.0, 0.5, -0.25] {
        let (x, cot) = (random(1, [9, 13]), random(2, [9, 13]));
        let what = format!("leaky_relu^2 with slope {slope}");
        let plain = |[x]: [Tensor<Tape, 2>; 1]| activation::leaky_relu_squared_forward(x, slope);
        assert_same(&what, [x], cot, |[x]| Tape::leaky_relu_squared(x, slope), plain);
    }
}

#[test]
fn rms_norm_backward_is_the_derivative() {
    for (shape, eps) in [([1, 1], 1e-3), ([5, 2], rms_norm::EPS), ([7, 64], rms_norm::EPS), ([40, 33], 0.1)] {
        let (x, cot) = (random(3, shape), random(4, shape));
        let what = format!("rms_norm {shape:?}");
        assert_same(&what, [x], cot, |[x]| Tape::rms_norm(x, eps), |[x]| rms_norm::forward(x, eps));
    }
}

#[test]
fn rope_backward_is_the_derivative() {
    for (rotated, size) in [(8, 8), (4, 10), (2, 3)] {
        let table = RopeTable::<Cpu>::new(3, 11, rotated, 500.0, &device(), DType::F64);
        let (x, cot) = (random(5, [2, 11, 3, size]), random(6, [2, 11, 3, size]));
        let plain = |x| rotate(x, Tape::lift(table.cos.clone()), Tape::lift(table.sin.clone()));
        assert_same(&format!("rope {rotated}"), [x], cot, |[x]| Tape::rope(x, &table), |[x]| plain(x));
    }
}

#[test]
fn a_range_of_a_rope_table_is_the_table_of_the_range() {
    let whole = RopeTable::<Cpu>::new(0, 64, 6, 1e4, &device(), DType::F64);
    for (start, len) in [(0, 64), (0, 1), (17, 30), (63, 1)] {
        let (range, own) =
            (whole.range(start, len), RopeTable::new(start, len, 6, 1e4, &device(), DType::F64));
        assert_eq!(values(range.cos), values(own.cos), "cosines {start}+{len}");
        assert_eq!(values(range.sin), values(own.sin), "sines {start}+{len}");
    }
    // Channel i turns by base^(-2i/r) a position.
    let angle: f64 = 17.0 * 1e4f64.powf(-4.0 / 6.0);
    let row = values(whole.range(17, 1).cos);
    assert!((row[2] - angle.cos()).abs() < 1e-15, "{row:?}");
}

/// Attention over all heads and positions at once: keys and values repeated, one mask.
fn naive_attention([q, k, v]: [Tensor<Tape, 4>; 3], scale: f64) -> Tensor<Tape, 4> {
    let ([_, queries, heads, _], [_, keys, groups, _]) = (q.dims(), k.dims());
    let indices: Vec<i64> = (0..heads).map(|head| (head / (heads / groups)) as i64).collect();
    let spread = |x: Tensor<Tape, 4>| x.select(2, integers::<Tape>(&indices, &device())).swap_dims(1, 2);
    let scores = q.swap_dims(1, 2).matmul(spread(k).transpose()).mul_scalar(scale);
    let future: Vec<bool> =
        (0..queries).flat_map(|query| (0..keys).map(move |key| key > query + keys - queries)).collect();
    let future =
        Tensor::<Tape, 2, burn::tensor::Bool>::from_data(TensorData::new(future, [queries, keys]), &device());
    let scores =
        scores.clone().mask_fill(future.reshape([1, 1, queries, keys]).expand(scores.dims()), -1e300);
    softmax(scores, 3).matmul(spread(v)).swap_dims(1, 2)
}

#[test]
fn attention_in_blocks_equals_attention_at_once_with_every_gradient() {
    // Queries in blocks of 256 and, for the third and fifth, the batch in parts; groups of 1, 2 and 4 heads; from a cache.
    for [batch, queries, keys, heads, groups, size] in [
        [1, 1, 1, 1, 1, 2],
        [2, 7, 7, 4, 4, 6],
        [5, 300, 300, 8, 4, 3],
        [2, 257, 257, 4, 1, 5],
        [3, 513, 601, 6, 3, 2],
        [2, 1, 300, 4, 2, 4],
        [1, 256, 256, 2, 2, 1],
    ] {
        let scores = heads * queries.min(256) * keys;
        let is_cut = Cpu::SCORE_ELEMENTS / scores < batch;
        assert_eq!(is_cut, batch >= 5 || queries == 513, "the sizes no longer cut the batch");
        let q = random(7, [batch, queries, heads, size]);
        let kv = |seed| random(seed, [batch, keys, groups, size]);
        let cot = random(10, [batch, queries, heads, size]);
        let what = format!("attention {queries} of {keys}, {heads}/{groups}");
        assert_same(
            &what,
            [q, kv(8), kv(9)],
            cot,
            |[q, k, v]| Tape::causal_attention(q, k, v, 1.3),
            |inputs| naive_attention(inputs, 1.3),
        );
    }
}

#[test]
fn scores_of_a_million_stay_finite() {
    let [q, k, v] = [11, 12, 13].map(|seed| random(seed, [1, 40, 2, 4]));
    let inputs = [q.mul_scalar(1e3), k.mul_scalar(1e3), v];
    let cot = random(14, [1, 40, 2, 4]);
    let (y, grads, _) = differentiate(&inputs, &cot, |[q, k, v]| Tape::causal_attention(q, k, v, 1.0));
    let (expected, ..) = differentiate(&inputs, &cot, |inputs| naive_attention(inputs, 1.0));
    assert_close("large scores", y, expected);
    assert!(grads.into_iter().flat_map(values).all(f64::is_finite));
}

#[test]
fn linear_backward_is_the_derivative() {
    let (x, w, cot) = (random(15, [11, 5]), random(16, [7, 5]), random(17, [11, 7]));
    let (param, plain) = (param(&w), leaf(&w));
    let product = |x: Tensor<Tape, 2>| x.matmul(plain.clone().transpose());
    let grads = assert_same("linear", [x], cot, |[x]| Tape::project(x, &param), |[x]| product(x));
    assert_grad("linear", &param, &plain, &grads);
}

#[test]
fn embedding_adds_up_the_gradients_of_repeated_ids() {
    // 5000 rows of 512 ids: more one-hot elements than are held at once.
    for (vocab, rows) in [(3, 1), (7, 40), (512, 5000)] {
        let ids: Vec<i64> = (0..rows as i64).map(|i| (i * i + 3 * i) % (vocab - 1)).collect();
        let ids = integers::<Tape>(&ids, &device());
        let (w, cot) = (random(18, [vocab as usize, 3]), random(19, [rows, 3]));
        let (param, plain) = (param(&w), leaf(&w));
        let y = Tape::embed(ids.clone(), &param);
        (y.clone() * Tensor::from_inner(cot.clone())).backward();
        let expected = plain.clone().select(0, ids);
        let grads = (expected.clone() * Tensor::from_inner(cot)).backward();
        assert_close("embedding", y.inner(), expected.inner());
        assert_grad("embedding", &param, &plain, &grads);
    }
    const { assert!(5000 * 512 > Cpu::ONE_HOT_ELEMENTS) };
}

#[test]
fn residual_mix_backward_is_the_derivative() {
    let inputs = [random(20, [9, 6]), random(21, [9, 6])];
    let (w, cot) = (random(22, [2, 6]), random(23, [9, 6]));
    let (param, plain) = (param(&w), leaf(&w));
    let sum = |[x, x0]: [Tensor<Tape, 2>; 2]| {
        x * plain.clone().narrow(0, 0, 1) + x0 * plain.clone().narrow(0, 1, 1)
    };
    let grads = assert_same("mix", inputs, cot, |[x, x0]| Tape::residual_mix(x, x0, &param), sum);
    assert_grad("mix", &param, &plain, &grads);
}

#[test]
fn scaled_add_backward_is_the_derivative_for_a_vector_and_for_a_row() {
    let inputs = || [random(24, [9, 6]), random(25, [9, 6])];
    let cot = || random(26, [9, 6]);
    let w = random(27, [6]);
    let (vector, plain) = (param(&w), leaf(&w));
    let sum = |[x, b]: [Tensor<Tape, 2>; 2]| x + b * plain.clone().reshape([1, 6]);
    let grads = assert_same("add", inputs(), cot(), |[x, b]| Tape::scaled_add(x, b, &vector, 0), sum);
    assert_grad("add", &vector, &plain, &grads);

    let w = random(28, [3, 6]);
    let (matrix, plain) = (param(&w), leaf(&w));
    let sum = |[x, b]: [Tensor<Tape, 2>; 2]| x + b * plain.clone().narrow(0, 1, 1);
    let grads = assert_same("add row", inputs(), cot(), |[x, b]| Tape::scaled_add(x, b, &matrix, 1), sum);
    assert_grad("add row", &matrix, &plain, &grads);
}

#[test]
fn head_gain_backward_is_the_derivative() {
    let (x, w, cot) = (random(29, [2, 5, 3, 4]), random(30, [3]), random(31, [2, 5, 3, 4]));
    let (param, plain) = (param(&w), leaf(&w));
    let product = |x: Tensor<Tape, 4>| x * plain.clone().reshape([1, 1, 3, 1]);
    let grads = assert_same("gain", [x], cot, |[x]| Tape::head_gain(x, &param), |[x]| product(x));
    assert_grad("gain", &param, &plain, &grads);
}

#[test]
fn cross_entropy_in_chunks_equals_all_logits_at_once_with_every_gradient() {
    // 4200 rows of 512 logits: more than are held at once.
    const { assert!(4200 * 512 > Cpu::LOGIT_ELEMENTS) };
    for (rows, vocab, cap) in [(1, 2, None), (13, 37, Some(0.7)), (13, 37, None), (4200, 512, Some(3.0))] {
        let (h, w) = (random(32, [rows, 3]).mul_scalar(4.0), random(33, [vocab, 3]));
        let cot = random(34, [rows]);
        let targets: Vec<i64> = (0..rows as i64).map(|i| (i * 7) % vocab as i64).collect();
        let targets = integers::<Tape>(&targets, &device());
        let (param, plain) = (param(&w), leaf(&w));
        let loss = |h: Tensor<Tape, 2>| {
            let z = softcap(h.matmul(plain.clone().transpose()), cap);
            log_softmax(z, 1).gather(1, targets.clone().reshape([rows, 1])).neg().reshape([rows])
        };
        let what = format!("cross-entropy {rows} x {vocab}, cap {cap:?}");
        let op = |h| Tape::cross_entropy(h, &param, targets.clone(), cap);
        let grads = assert_same(&what, [h], cot, |[h]| op(h), |[h]| loss(h));
        assert_grad(&what, &param, &plain, &grads);
    }
}

/// An op's name, its weight, and the op as a function of the weight.
type Weighted = (&'static str, Param<Cpu>, Box<dyn Fn(&Param<Cpu>) -> Tensor<Tape, 2>>);

/// Each op with a weight, as `f(weight)` to an output whose gradient is all ones.
fn weighted_ops() -> Vec<Weighted> {
    let x = || leaf(&random(40, [6, 4]));
    let ids = || integers::<Tape>(&[0, 2, 2, 1, 2, 0], &device());
    let matrix = |rows| param(&random(41, [rows, 4]));
    let vector = |size| param(&random(42, [size]));
    vec![
        ("project", matrix(3), Box::new(move |w| Tape::project(x(), w))),
        ("embed", matrix(3), Box::new(move |w| Tape::embed(ids(), w))),
        ("residual_mix", matrix(2), Box::new(move |w| Tape::residual_mix(x(), x(), w))),
        ("scaled_add", vector(4), Box::new(move |w| Tape::scaled_add(x(), x(), w, 0))),
        ("scaled_add row", matrix(3), Box::new(move |w| Tape::scaled_add(x(), x(), w, 2))),
        (
            "head_gain",
            vector(2),
            Box::new(move |w| Tape::head_gain(x().reshape([1, 6, 2, 2]), w).reshape([6, 4])),
        ),
        (
            "cross_entropy",
            matrix(3),
            Box::new(move |w| Tape::cross_entropy(x(), w, ids(), Some(2.0)).reshape([6, 1])),
        ),
    ]
}

#[test]
fn gradients_accumulate_over_backwards_and_a_frozen_weight_gets_none() {
    for (name, weight, op) in weighted_ops() {
        op(&weight).backward();
        let once = weight.flat_grad().unwrap_or_else(|| panic!("{name}: no gradient"));
        op(&weight).mul_scalar(2.0).backward();
        let thrice = weight.take_flat_grad().expect("a gradient");
        assert_close(name, thrice, once.mul_scalar(3.0));
        assert!(weight.flat_grad().is_none(), "{name}: taken");
        // One weight used twice in a graph.
        (op(&weight) + op(&weight)).backward();
        let twice = weight.take_flat_grad().expect("a gradient");

        weight.set_trainable(false);
        op(&weight).backward();
        assert!(weight.flat_grad().is_none(), "{name}: frozen");
        weight.set_trainable(true);
        op(&weight).backward();
        assert_close(name, twice, weight.take_flat_grad().expect("a gradient").mul_scalar(2.0));
    }
}

#[test]
fn a_row_s_gradient_leaves_the_other_rows_of_the_buffer_alone() {
    let weight = param(&random(43, [3, 4]));
    for row in [1, 1, 2] {
        let [x, branch] = [44, 45].map(|seed| leaf(&random(seed, [5, 4])));
        Tape::scaled_add(x, branch, &weight, row).backward();
    }
    let grad = values(weight.grad::<2>().expect("a gradient"));
    assert!(grad[..4].iter().all(|g| *g == 0.0), "{grad:?}");
    for (a, b) in grad[4..8].iter().zip(&grad[8..]) {
        assert!((a - 2.0 * b).abs() < 1e-12 && *b != 0.0, "{grad:?}");
    }
}

#[test]
fn sums_are_whole_for_any_length() {
    for n in [1, 2, 31, 512, 513, 1009, 4096, 5003, 65_537] {
        let x = random(46, [n]);
        let expected: f64 = values(x.clone()).iter().sum();
        let got = values(reduce::sum(x))[0];
        assert!((got - expected).abs() < 1e-11, "{n}: {got} against {expected}");
    }
}

/// Runs a one-row op on a device: values in, values out, in the target's precision.
struct Elementwise(Vec<f64>, Op);

#[derive(Clone, Copy)]
enum Op {
    RoundBf16,
    Reciprocal,
}

impl Job for Elementwise {
    type Output = Vec<f64>;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<Vec<f64>> {
        let n = self.0.len();
        let dtype = target.precision.dtype();
        let x: Tensor<B, 1> = match dtype {
            DType::F64 => Tensor::from_data(TensorData::new(self.0, [n]), (device, DType::F64)),
            _ => {
                let values: Vec<f32> = self.0.iter().map(|v| *v as f32).collect();
                let x = Tensor::<B, 1>::from_data(TensorData::new(values, [n]), (device, DType::F32));
                x.cast(dtype)
            }
        };
        let y = match self.1 {
            Op::RoundBf16 => round_bf16(x),
            Op::Reciprocal => reciprocal(x),
        };
        let y = if dtype == DType::F64 { y } else { y.cast(DType::F32) };
        Ok(y.into_data().iter::<f64>().collect())
    }
}

/// A normal f64 to 8 significant bits, ties to even, by its bits (`bf16::from_f64` drops the low 32 bits first).
fn round_f64(value: f64) -> f64 {
    let bits = value.to_bits();
    f64::from_bits((bits + (1 << 44) - 1 + ((bits >> 45) & 1)) & !((1 << 45) - 1))
}

#[test]
fn round_bf16_is_bf16_s_own_rounding_on_every_device() {
    // Every bf16 pattern of a range of exponents with low bits that round down, tie and round up.
    let mut values = vec![0.0];
    for exponent in (27..230).step_by(7) {
        for mantissa in 0..128u32 {
            for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234, 0xcdef] {
                let value = f32::from_bits((exponent << 23) | (mantissa << 16) | low);
                values.extend([f64::from(value), f64::from(-value)]);
            }
        }
    }
    let mut random = Random(50);
    values.extend((0..10_000).map(|_| f64::from(random.uniform() as f32)));
    for target in targets() {
        let mut values = values.clone();
        if target.precision == Precision::F64 {
            // Just beside a tie: rounding to f32 first would make a tie of it.
            values.extend([1.00390625 + 1e-12, 1.00390625 - 1e-12, 1.01171875 + 1e-12, -1.01171875 + 1e-12]);
        }
        let rounded = run(&target, Elementwise(values.clone(), Op::RoundBf16)).expect("a run");
        for (value, rounded) in values.iter().zip(rounded) {
            let expected = match target.precision {
                Precision::F64 => round_f64(*value),
                _ => bf16::from_f32(*value as f32).to_f64(),
            };
            assert_eq!(rounded, expected, "{value:e} on {} in {}", target.label, target.precision);
        }
    }
}

#[test]
fn reciprocals_are_rounded_correctly_on_every_device() {
    // Burn's own `recip` is a 12-bit estimate on burn-ndarray from 32 elements on.
    let mut random = Random(51);
    let values: Vec<f64> = (0..1000).map(|_| f64::from((random.uniform() * 8.0) as f32)).collect();
    for target in targets().into_iter().filter(|target| target.precision != Precision::Bf16) {
        let found = run(&target, Elementwise(values.clone(), Op::Reciprocal)).expect("a run");
        // WGSL divides to 2.5 units in the last place.
        let bound = if target.precision == Precision::F64 { 1e-16 } else { 3e-7 };
        for (value, found) in values.iter().zip(found) {
            let error = (found * value - 1.0).abs();
            assert!(error <= bound + f64::EPSILON, "1/{value:e} = {found:e} on {}: {error:e}", target.label);
        }
    }
}

/// The rows of pairs of tokens, and of the same pairs by the other hash.
struct Hashes(Vec<[i64; 2]>, usize);

impl Job for Hashes {
    type Output = [Vec<i64>; 2];

    fn run<B: Plain>(self, device: &B::Device, _: &Target) -> Result<[Vec<i64>; 2]> {
        let count = self.0.len();
        let ids = integers::<B>(self.0.as_flattened(), device).reshape([count, 2]);
        Ok([Hash::Product, Hash::Xor].map(|hash| {
            let rows = hash.buckets(ids.clone(), None, 0, self.1, false).narrow(1, 1, 1);
            rows.into_data().convert::<i64>().to_vec().expect("rows")
        }))
    }
}

#[test]
fn hashed_pairs_are_exact_on_every_device() {
    for target in targets() {
        for n in [31, 256, 4095, 4096, 10_240, 1 << 22] {
            // Every pair next to a multiple of n, where a remainder through f32 leaves the table.
            let next_to = |p: i64| [0, n - 1].map(|wanted| [p, (wanted - 92_821 * p).rem_euclid(n)]);
            let mut pairs: Vec<[i64; 2]> =
                (0..2048).flat_map(next_to).filter(|pair| pair[1] < 65_536).collect();
            pairs.extend([[65_535, 65_535], [960, 319], [949, 416], [181, 34], [0, 0]]);
            let products: Vec<i64> = pairs.iter().map(|[p, own]| (92_821 * p + own) % n).collect();
            let word = |token: i64, factor: i32| (token as i32).wrapping_mul(factor);
            let xor =
                |[p, own]: &[i64; 2]| i64::from(word(*own, 36_313) ^ word(*p, 27_191)).rem_euclid(n - 1);
            let xors: Vec<i64> = pairs.iter().map(xor).collect();
            let found = run(&target, Hashes(pairs, n as usize)).expect("a run");
            assert_eq!(found, [products, xors], "{n} rows on {} in {}", target.label, target.precision);
        }
    }
}
