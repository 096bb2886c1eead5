//! Attention from the projections on, on every device: its gradients against a computation in f64 on the host, and the
//! whole beside its parts one after the other.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the reference's own arithmetic, carried out on the host with
//! inputs and intermediates rounded to the device's precision and f32 sums. The least is some roundings of the result
//! itself.

mod common;
mod normed_attention_common;

use burn::tensor::{DType, Int, Tensor, TensorData};
use common::{
    Random, affordable, all_pass, download, epsilon, errors, repeats, root_mean_square, round, same, targets,
    upload, upload_as,
};
use fairway::Result;
use fairway::backend::{DeviceChoice, Job, Precision, Target, guard, run};
use fairway::ops::attention::{Attended, Mask};
use fairway::ops::qk_norm::QkNorm;
use fairway::ops::rope::RopeTable;
use fairway::ops::{
    AttentionOps, Autodiff, LinearOps, NormedAttentionOps, Param, Plain, QkNormOps, accumulate_type,
};
use normed_attention_common::{Arithmetic, BASE, Case, EPS, Results, START, Sizes, masked, plain};

/// For every device: all, some and no channels rotated, with and without a gain, groups, a window, documents.
const SMALL: [Sizes; 5] = [
    plain([2, 7, 4, 2, 32, 32], true),
    plain([1, 9, 2, 2, 128, 0], false),
    masked([1, 33, 2, 1, 64, 16], Some(5), false),
    masked([2, 20, 6, 3, 24, 8], None, true),
    plain([1, 1, 2, 1, 64, 64], true),
];

/// For CUDA: around the edges of the kernel's blocks (64, 128), every head size that it takes, with chunks of its tables
/// full, in part and empty, up to 8 heads a group and more than it takes, and what goes through the norm's own kernel.
const LARGE: [Sizes; 33] = [
    plain([2, 63, 2, 1, 64, 64], true),
    plain([1, 64, 4, 4, 64, 16], true),
    plain([1, 65, 2, 1, 64, 0], false),
    plain([2, 127, 2, 2, 32, 32], true),
    plain([1, 128, 4, 1, 64, 64], true),
    plain([1, 129, 8, 2, 64, 48], false),
    plain([2, 333, 4, 2, 64, 64], true),
    plain([1, 700, 2, 1, 64, 64], true),
    plain([3, 260, 2, 2, 64, 32], false),
    plain([1, 300, 8, 1, 32, 16], true),
    plain([3, 130, 2, 1, 32, 0], true),
    plain([1, 64, 2, 1, 128, 128], true),
    plain([2, 65, 2, 2, 128, 80], true),
    plain([1, 129, 2, 1, 128, 0], true),
    plain([2, 193, 3, 1, 128, 128], true),
    plain([1, 300, 4, 1, 128, 32], false),
    plain([1, 66, 40, 1, 64, 64], true),
    plain([2, 70, 4, 2, 64, 8], true),
    masked([1, 300, 2, 1, 64, 64], Some(1), false),
    masked([1, 500, 4, 2, 64, 32], Some(130), false),
    masked([2, 200, 2, 1, 128, 64], Some(70), false),
    masked([3, 400, 2, 1, 64, 64], None, true),
    masked([2, 130, 4, 2, 32, 32], None, true),
    masked([2, 300, 2, 2, 128, 128], Some(150), true),
    masked([2, 260, 4, 2, 64, 64], Some(100), true),
    masked([1, 300, 2, 1, 32, 16], Some(17), true),
    // Small ones of several blocks.
    masked([1, 130, 2, 1, 64, 64], None, true),
    masked([1, 90, 2, 1, 128, 64], Some(40), true),
    masked([1, 100, 2, 1, 64, 32], Some(50), true),
    masked([1, 100, 2, 1, 128, 64], Some(45), false),
    plain([1, 130, 2, 1, 64, 64], true),
    plain([1, 130, 1, 1, 128, 128], true),
    plain([1, 140, 4, 2, 32, 32], true),
];

/// Prints the share of the tolerance that a result uses; whether it is within.
fn check(what: &str, got: &[f64], exact: &[f64], low: &[f64], precision: Precision) -> bool {
    let ([rms, worst], at) = errors(got, exact);
    let low = errors(low, exact).0;
    // What may cancel to nothing has the scale of what it is made of, in bf16 a hundredth: that is summed in f32.
    let least = if precision == Precision::Bf16 { 1e-2 } else { 1.0 };
    let largest = exact.iter().fold(least, |largest: f64, x| largest.max(x.abs()));
    let size = root_mean_square(exact).max(least);
    // Half a unit of the largest element; in f64 and f32 sums in another order are off by some units.
    let [of_rms, of_worst] = match precision {
        Precision::Bf16 => [0.125, 0.5],
        Precision::F32 => [16.0, 64.0],
        Precision::F64 => [64.0, 256.0],
    };
    let shares = [
        rms / (2.0 * low[0]).max(of_rms * epsilon(precision) * size),
        worst / (2.0 * low[1]).max(of_worst * epsilon(precision) * largest),
    ];
    let within = shares.iter().all(|share| *share <= 1.0);
    println!(
        "    {what:<6} rms {rms:>9.2e} {:>4.0}%   worst {worst:>9.2e} {:>4.0}%  [{at}]: {:.6e}, expected {:.6e}{}",
        100.0 * shares[0],
        100.0 * shares[1],
        got[at],
        exact[at],
        if within { "" } else { "  FAILED" }
    );
    within
}

/// The gain's gradient is a sum over all tokens: its errors are shares of the root of the sum of the squares. The
/// reference's own error is the larger of the one that it came out with, a matter of luck for so few numbers, and its
/// standard deviation: the tokens' errors, whose signs are random, by the root of the sum of their squares.
fn check_gain(got: &[f64], exact: &Results, low: &Results, precision: Precision) -> bool {
    let heads = exact.gain.len();
    // As in [`check`]: a single token's attention passes nothing on to the scores, but for roundings.
    let least_scale = if precision == Precision::Bf16 { 1e-2 } else { 1.0 };
    let scale = |head: usize| exact.gain_scale[head].max(least_scale);
    let largest = |worst: f64, share: f64| if share <= worst { worst } else { share };
    let worst = |got: &[f64]| {
        let shares = got.iter().zip(&exact.gain).enumerate().map(|(h, (a, b))| (a - b).abs() / scale(h));
        shares.fold(0.0, largest)
    };
    let deviation = |head: usize| {
        let parts = low.gain_parts.iter().zip(&exact.gain_parts).skip(head).step_by(heads);
        parts.map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt() / scale(head)
    };
    let reference = (0..heads).map(deviation).fold(worst(&low.gain), largest);
    let least = if precision == Precision::Bf16 { 1.0 } else { 64.0 };
    let (error, tolerance) = (worst(got), (2.0 * reference).max(least * epsilon(precision)));
    let within = error <= tolerance;
    println!(
        "    gain   worst {error:>9.2e} {:>4.0}%{}",
        100.0 * error / tolerance,
        if within { "" } else { "  FAILED" }
    );
    within
}

/// How q, k and v lie: each alone; columns of one matrix; such columns that begin between multiples of 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    Apart,
    Columns,
    Shifted,
}

/// A case's tensors on a device, and what attention gave.
struct Uploaded<B: Plain> {
    before: [Tensor<B, 2>; 2],
    attended: Attended<B>,
    grad: Tensor<B, 4>,
    gain: Param<B>,
    how: QkNorm<B>,
    mask: Mask<B>,
    scale: f64,
}

impl<B: Plain> Uploaded<B> {
    fn new(case: &Case, layout: Layout, device: &B::Device, precision: Precision) -> Self {
        let Sizes { batch, time, heads, groups, size, rotated, .. } = case.sizes;
        let rows = batch * time;
        let widths = [heads * size, groups * size, groups * size];
        let alone: [Tensor<B, 2>; 3] =
            [0, 1, 2].map(|i| upload(&case.inputs[i], [rows, widths[i]], device, precision));
        let inputs = if layout == Layout::Apart {
            alone
        } else {
            let shift = usize::from(layout == Layout::Shifted);
            let first = upload::<B, 2>(&vec![0.5; rows * (8 + shift)], [rows, 8 + shift], device, precision);
            let all = Tensor::cat([vec![first], alone.to_vec()].concat(), 1);
            let starts = [0, widths[0], widths[0] + widths[1]].map(|start| 8 + shift + start);
            [0, 1, 2].map(|i| all.clone().narrow(1, starts[i], widths[i]))
        };
        let dtype = accumulate_type(precision.dtype());
        let master = if precision == Precision::F64 { precision } else { Precision::F32 };
        let gain = Param::new("gain", upload(&case.gain, [heads], device, master), precision.dtype());
        let rope = match rotated {
            0 => {
                let none = Tensor::empty([time, 0], (device, dtype));
                RopeTable { cos: none.clone(), sin: none }
            }
            _ => RopeTable::new(0, START + time + 5, rotated, BASE, device, dtype).range(START, time),
        };
        let of_how = case.sizes.gain.then(|| gain.clone());
        let how = QkNorm { batch, heads, groups, rope, gain: of_how, eps: EPS };
        let starts = case.sizes.documents.then(|| {
            let data = TensorData::new(case.starts.clone(), [batch, time]);
            Tensor::<B, 2, Int>::from_data(data.convert::<B::IntElem>(), device)
        });
        let mask = Mask { window: case.sizes.window, documents: starts };
        let [q, k, v] = inputs;
        let before = [q.clone(), k.clone()];
        let [q, k] = B::qk_norm(q, k, &how);
        let v = v.reshape([batch, time, groups, size]);
        let (y, log_sums) = B::attention_forward(q.clone(), k.clone(), v.clone(), &mask, case.scale);
        let attended = Attended { q, k, v, y, log_sums };
        let grad = upload(&case.grad, [batch, time, heads, size], device, precision);
        Self { before, attended, grad, gain, how, mask, scale: case.scale }
    }

    /// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
    fn poison(&self) {
        let poison = [&self.before[0], &self.before[1]].map(|x| x.full_like(f32::NAN));
        drop(poison);
        let [rows, columns] = self.before[0].dims();
        for elements in [rows * columns * 4 + 4096, rows * columns * 2, 1 << 12] {
            drop(Tensor::<B, 1>::full([elements], f32::NAN, &self.grad.device()));
        }
    }

    fn backward_only(&self) -> [Tensor<B, 2>; 3] {
        let (before, attended) = (self.before.clone(), self.attended.clone());
        B::normed_attention_backward(before, attended, self.grad.clone(), &self.how, &self.mask, self.scale)
    }

    /// The gradients of q, k and v, and the gain's from an empty buffer, if it has one.
    fn backward(&self) -> ([Vec<f64>; 3], Option<Vec<f64>>) {
        self.poison();
        let grads = self.backward_only().map(download);
        (grads, self.gain.take_flat_grad().map(download))
    }
}

struct AgainstTheHost;

impl Job for AgainstTheHost {
    /// Whether all results were within their tolerance.
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let mut good = true;
        println!("\n{} {precision}", target.label);
        let is_cuda = matches!(target.choice, DeviceChoice::Cuda(_));
        let large = LARGE.into_iter().filter(|_| is_cuda);
        for (number, sizes) in SMALL.into_iter().chain(large).enumerate() {
            let Sizes { batch, time, heads, size, window, .. } = sizes;
            if !affordable(batch * time * time.min(window.unwrap_or(time)) * heads * size) {
                continue;
            }
            let layout = [Layout::Columns, Layout::Apart, Layout::Columns, Layout::Shifted][number % 4];
            println!("  {sizes:?} {layout:?}");
            let case = Case::new(sizes, precision, number as u64);
            let exact = case.results(Arithmetic::of(Precision::F64));
            let low = case.results(Arithmetic::of(precision));
            let on_device = Uploaded::<B>::new(&case, layout, device, precision);
            let (grads, gain) = on_device.backward();
            for (i, name) in ["grad q", "grad k", "grad v"].into_iter().enumerate() {
                good &= check(name, &grads[i], &exact.grads[i], &low.grads[i], precision);
            }
            assert_eq!(gain.is_some(), sizes.gain, "{sizes:?}: the gain's gradient");
            if let Some(gain) = &gain {
                good &= check_gain(gain, &exact, &low, precision);
            }
            for _ in 0..repeats() {
                let (again, gain_again) = on_device.backward();
                assert!(again.iter().zip(&grads).all(|(a, b)| same(a, b)), "{sizes:?}: gradients differ");
                let equal = match (&gain_again, &gain) {
                    (Some(again), Some(gain)) => same(again, gain),
                    (again, gain) => again.is_none() && gain.is_none(),
                };
                assert!(equal, "{sizes:?}: the gain's gradients differ");
            }
        }
        Ok(good)
    }
}

#[test]
fn every_device_agrees_with_the_host() {
    all_pass(|| AgainstTheHost);
}

struct GainsBuffer;

impl Job for GainsBuffer {
    type Output = ();

    /// Twice into one buffer is the sum; a frozen gain has no gradient and changes no other.
    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let sizes = plain([2, 40, 4, 2, 64, 64], true);
        let case = Case::new(sizes, target.precision, 7);
        let on_device = Uploaded::<B>::new(&case, Layout::Columns, device, target.precision);
        let (grads, gain) = on_device.backward();
        let gain = gain.expect("a gradient of the gain");
        on_device.backward_only();
        on_device.backward_only();
        let twice = download(on_device.gain.take_flat_grad().expect("a gradient of the gain"));
        assert!(gain.iter().all(|gain| *gain != 0.0), "a gain without a gradient on {}", target.label);
        assert!(twice.iter().zip(&gain).all(|(twice, once)| *twice == 2.0 * once), "{}", target.label);
        on_device.gain.set_trainable(false);
        let (again, none) = on_device.backward();
        assert!(none.is_none(), "a frozen gain's gradient on {}", target.label);
        assert!(again.iter().zip(&grads).all(|(a, b)| same(a, b)), "{}", target.label);
        Ok(())
    }
}

#[test]
fn the_gains_gradient_is_added_to_its_buffer() {
    for target in targets() {
        guard(&target, || run(&target, GainsBuffer)).unwrap();
    }
}

fn random_tensor<B: Plain, const D: usize>(
    random: &mut Random,
    shape: [usize; D],
    device: &B::Device,
    precision: Precision,
) -> Tensor<B, D> {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| round(random.uniform(), precision)).collect();
    upload_as(&values, shape, device, accumulate_type(precision.dtype()))
}

/// Batch, positions, heads, groups, size and rotated channels.
const CASES: [[usize; 6]; 6] = [
    [2, 100, 4, 2, 64, 64],
    [3, 33, 2, 2, 32, 8],
    [1, 130, 8, 1, 128, 0],
    [2, 5, 2, 1, 10, 4],
    [2, 65, 4, 2, 32, 32],
    [2, 70, 4, 2, 16, 16],
];

/// Through the tape, from the projections' input to their weights: the same bits as the parts one after the other,
/// whether or not the gradients lie side by side. In bf16 CUDA's attention hands its gradients on to the norm unrounded:
/// there all but the output differ by roundings.
struct AgainstItsParts;

impl Job for AgainstItsParts {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        type T<B> = Autodiff<B>;
        let (precision, dtype) = (target.precision, target.precision.dtype());
        for (number, [batch, time, heads, groups, size, rotated]) in CASES.into_iter().enumerate() {
            if !affordable(batch * time * time * heads * size) {
                continue;
            }
            let mut random = Random(number as u64);
            let (rows, columns) = (batch * time, 48);
            let x = random_tensor::<B, 2>(&mut random, [rows, columns], device, precision).cast(dtype);
            let grad =
                random_tensor::<B, 2>(&mut random, [rows, heads * size], device, precision).cast(dtype);
            let mut weight = |outputs: usize| {
                Param::<B>::new("w", random_tensor(&mut random, [outputs, columns], device, precision), dtype)
            };
            let weights = [weight(heads * size), weight(groups * size), weight(groups * size)];
            let gain = Param::<B>::new(
                "gain",
                random_tensor::<B, 1>(&mut random, [heads], device, precision),
                dtype,
            );
            let rope = match rotated {
                0 => {
                    let none = Tensor::empty([time, 0], (device, DType::F32));
                    RopeTable { cos: none.clone(), sin: none }
                }
                _ => RopeTable::new(0, time, rotated, 1e4, device, accumulate_type(dtype)),
            };
            let how = QkNorm { batch, heads, groups, rope, gain: Some(gain.clone()), eps: 1e-6 };
            let results = [false, true].map(|together| {
                let leaf = Tensor::<T<B>, 2>::from_inner(x.clone()).require_grad();
                let [q, k, v] = T::<B>::project_many(leaf.clone(), weights.each_ref());
                let y = if together {
                    T::<B>::normed_attention(q, k, v, &how, &Mask::causal(), 0.125)
                } else {
                    let [q, k] = T::<B>::qk_norm(q, k, &how);
                    let v = v.reshape(k.dims());
                    T::<B>::attention_forward(q, k, v, &Mask::causal(), 0.125).0
                };
                let y = y.reshape([rows, heads * size]);
                let value = download(y.clone().inner());
                let grads = (y * Tensor::from_inner(grad.clone())).sum().backward();
                let mut found = vec![value, download(leaf.grad(&grads).expect("a gradient of x"))];
                found.extend(
                    weights.iter().chain([&gain]).map(|w| download(w.take_flat_grad().expect("a gradient"))),
                );
                found
            });
            let [apart, together] = results;
            for (index, (apart, together)) in apart.iter().zip(&together).enumerate() {
                let rounded = precision == Precision::Bf16 && index > 0;
                let near = if rounded {
                    errors(together, apart).0[0] <= 2.0 * epsilon(precision) * root_mean_square(apart)
                } else {
                    same(apart, together)
                };
                assert!(
                    near && apart.iter().all(|x| x.is_finite()),
                    "case {number}, result {index} on {}",
                    target.label
                );
            }
        }
        Ok(())
    }
}

#[test]
fn it_is_its_parts_one_after_the_other() {
    for target in targets() {
        guard(&target, || run(&target, AgainstItsParts)).unwrap();
    }
}
