//! Norm, rotation and gain of queries and keys on every device: forward, backward and the gain's gradient against a
//! computation in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error that the composition of the three ops makes with inputs and
//! intermediates rounded to the device's precision, at least twice the distance between neighbouring numbers. Errors are
//! shares of a head's scale: the largest |y|, and for the gradient r |gain| max|gy| (it may cancel to nothing).

mod common;

use burn::tensor::Tensor;
use common::{
    Random, Worst, affordable, all_pass, download, epsilon, repeats, round, same, targets, upload, worst,
};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target, guard, run};
use fairway::ops::qk_norm::{self, QkNorm};
use fairway::ops::rope::RopeTable;
use fairway::ops::{Autodiff, Param, Plain, QkNormOps, accumulate_type};

/// Sequences, positions, heads of q and of k, channels of a head, rotated ones.
type Sizes = [usize; 6];

/// Vectors and not, all and some and no channels rotated, places of a block left over, more heads than one block takes,
/// tokens for one round and for many.
const CASES: [Sizes; 14] = [
    [1, 1, 1, 1, 2, 2],
    [2, 5, 3, 1, 64, 64],
    [1, 7, 8, 4, 64, 16],
    [3, 100, 8, 4, 64, 64],
    [5, 1024, 8, 4, 64, 64],
    [2, 33, 4, 4, 128, 128],
    [3, 301, 2, 1, 48, 16],
    [2, 17, 6, 3, 10, 4],
    [1, 9, 2, 2, 64, 0],
    [1, 9, 5, 5, 96, 64],
    [4, 5, 16, 8, 32, 32],
    [1, 4, 70, 7, 128, 64],
    [2, 300, 2, 1, 256, 254],
    [9, 1, 12, 2, 20, 8],
];
const EPS: [f64; 3] = [1.192_092_895_507_812_5e-7, 1e-5, 0.1];
const BASE: f64 = 1e4;

/// Heads of different magnitudes, some of zeros, their output gradients, and the gain; values that the precision has.
struct Case {
    sizes: Sizes,
    eps: f64,
    inputs: [Vec<f64>; 2],
    grads: [Vec<f64>; 2],
    gain: Vec<f64>,
}

/// What the op gives: outputs, gradients of q and k, of the gain.
struct Results {
    outputs: [Vec<f64>; 2],
    grads: [Vec<f64>; 2],
    gain: Vec<f64>,
}

impl Case {
    fn new(sizes: Sizes, eps: f64, precision: Precision, seed: u64) -> Self {
        let [batch, time, heads, groups, size, _] = sizes;
        let mut random = Random(seed);
        let scale = |head: usize| if head % 7 == 5 { 0.0 } else { [1.0, 30.0, 1.0, 1e-3, 1e-5][head % 5] };
        let mut values = |n: usize, scale: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..n).map(|i| round(random.uniform() * scale(i / size), precision)).collect()
        };
        let lengths = [heads, groups].map(|heads| batch * time * heads * size);
        let inputs = lengths.map(|n| values(n, &scale));
        let grads = lengths.map(|n| values(n, &|_| 1.0));
        let gain = values(heads, &|_| 2.0);
        Self { sizes, eps, inputs, grads, gain }
    }

    /// Heads of q, of k.
    fn heads(&self, which: usize) -> usize {
        self.sizes[2 + which]
    }

    fn gain(&self, which: usize, head: usize) -> f64 {
        if which == 0 { self.gain[head % self.heads(0)] } else { 1.0 }
    }

    fn inverse_rms(&self, x: &[f64]) -> f64 {
        1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + self.eps).sqrt()
    }

    /// Turned by the angles of the head's position, `back` the other way; `at` rounds the angles and every step.
    fn turned(&self, which: usize, head: usize, x: &[f64], back: bool, at: &dyn Fn(f64) -> f64) -> Vec<f64> {
        let [_, time, .., rotated] = self.sizes;
        let (position, half) = (head / self.heads(which) % time, rotated / 2);
        let mut y = x.to_vec();
        for i in 0..half {
            let angle = position as f64 * BASE.powf(-2.0 * i as f64 / rotated as f64);
            let (cos, sin) = (at(angle.cos()), at(if back { -angle.sin() } else { angle.sin() }));
            y[i] = at(at(x[i] * cos) + at(x[i + half] * sin));
            y[i + half] = at(at(x[i + half] * cos) - at(x[i] * sin));
        }
        y
    }

    /// The three ops one after the other, with the results of each rounded by `at`.
    fn results(&self, at: &dyn Fn(f64) -> f64) -> Results {
        let size = self.sizes[4];
        let mut gain = vec![0.0; self.gain.len()];
        let mut results = [0, 1].map(|which| {
            let (mut outputs, mut grads) = (Vec::new(), Vec::new());
            let rows = self.inputs[which].chunks(size).zip(self.grads[which].chunks(size));
            for (head, (x, grad)) in rows.enumerate() {
                let r = self.inverse_rms(x);
                let normed: Vec<f64> = x.iter().map(|x| at(x * r)).collect();
                let turned = self.turned(which, head, &normed, false, at);
                let by = self.gain(which, head);
                outputs.extend(turned.iter().map(|x| at(x * by)));
                if which == 0 {
                    let sum: f64 = turned.iter().zip(grad).map(|(x, grad)| at(x * grad)).sum();
                    gain[head % self.heads(0)] += sum;
                }
                let grad: Vec<f64> = grad.iter().map(|grad| at(grad * by)).collect();
                let grad = self.turned(which, head, &grad, true, at);
                let mean = x.iter().zip(&grad).map(|(x, grad)| x * grad).sum::<f64>() / size as f64;
                grads.extend(x.iter().zip(&grad).map(|(x, grad)| at(r * grad - x * r * r * r * mean)));
            }
            (outputs, grads)
        });
        let [(q, grad_q), (k, grad_k)] = results.each_mut().map(std::mem::take);
        Results { outputs: [q, k], grads: [grad_q, grad_k], gain }
    }

    fn worst_outputs(&self, got: &[Vec<f64>; 2], exact: &Results) -> Worst {
        let of = |which: usize| {
            let size = self.sizes[4];
            let exact = &exact.outputs[which];
            let scales: Vec<f64> =
                exact.chunks(size).map(|row| largest(row).max(f64::MIN_POSITIVE)).collect();
            worst(&got[which], exact, size, |row| scales[row])
        };
        worse(of(0), of(1))
    }

    fn worst_grads(&self, got: &[Vec<f64>; 2], exact: &Results) -> Worst {
        let of = |which: usize| {
            let size = self.sizes[4];
            let rows = self.inputs[which].chunks(size).zip(self.grads[which].chunks(size)).enumerate();
            let scales: Vec<f64> = rows
                .map(|(head, (x, grad))| {
                    let by = self.gain(which, head).abs().max(1e-3);
                    self.inverse_rms(x) * by * largest(grad)
                })
                .collect();
            worst(&got[which], &exact.grads[which], size, |row| scales[row])
        };
        worse(of(0), of(1))
    }

    /// The gain's gradient is a sum over all tokens: its scale is the root of the sum of the squares.
    fn worst_gain(&self, got: &[f64], exact: &Results) -> Worst {
        let [batch, time, _, _, size, _] = self.sizes;
        let scale = ((batch * time * size) as f64).sqrt();
        worst(got, &exact.gain, self.gain.len(), |_| scale)
    }
}

fn worse(a: Worst, b: Worst) -> Worst {
    if a.error >= b.error || a.error.is_nan() { a } else { b }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// A case's tensors on a device.
struct Uploaded<B: Plain> {
    inputs: [Tensor<B, 2>; 2],
    grads: [Tensor<B, 4>; 2],
    gain: Param<B>,
    how: QkNorm<B>,
}

impl<B: Plain> Uploaded<B> {
    fn new(case: &Case, device: &B::Device, precision: Precision) -> Self {
        let [batch, time, heads, groups, size, rotated] = case.sizes;
        let dtype = accumulate_type(precision.dtype());
        let master = if precision == Precision::F64 { precision } else { Precision::F32 };
        let gain = Param::new("gain", upload(&case.gain, [heads], device, master), precision.dtype());
        let input = |which: usize| {
            upload(&case.inputs[which], [batch * time, case.heads(which) * size], device, precision)
        };
        let grad = |which: usize| {
            upload(&case.grads[which], [batch, time, case.heads(which), size], device, precision)
        };
        // From a longer table, as models have it.
        let rope = match rotated {
            0 => {
                let none = Tensor::empty([time, 0], (device, dtype));
                RopeTable { cos: none.clone(), sin: none }
            }
            _ => RopeTable::new(0, time + 3, rotated, BASE, device, dtype).range(0, time),
        };
        let how = QkNorm { batch, heads, groups, rope, gain: Some(gain.clone()), eps: case.eps };
        Self { inputs: [input(0), input(1)], grads: [grad(0), grad(1)], gain, how }
    }

    /// Leaves freed memory full of NaN, so that an element that a kernel does not write shows.
    fn poison(&self) {
        drop(self.inputs.each_ref().map(|x| [x.full_like(f32::NAN), x.full_like(f32::NAN)]));
        drop(Tensor::<B, 1>::full([4096], f32::NAN, &self.inputs[0].device()));
    }

    fn forward(&self) -> [Vec<f64>; 2] {
        self.poison();
        let [q, k] = self.inputs.clone();
        B::qk_norm(q, k, &self.how).map(download)
    }

    /// The gradients of q and k, and the gain's from an empty buffer.
    fn backward(&self) -> ([Vec<f64>; 2], Vec<f64>) {
        self.poison();
        let [q, k] = self.inputs.clone();
        let grads = B::qk_norm_backward(q, k, self.grads.clone(), &self.how).map(download);
        let gain = self.gain.take_flat_grad().expect("a gradient of the gain");
        assert_eq!(gain.dtype(), self.gain.master_type());
        (grads, download(gain))
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
        for (number, sizes) in CASES.into_iter().enumerate() {
            let [batch, time, heads, _, size, _] = sizes;
            if !affordable(batch * time * heads * size) {
                continue;
            }
            let case = Case::new(sizes, EPS[number % EPS.len()], precision, number as u64);
            let (exact, low) = (case.results(&|x| x), case.results(&|x| round(x, precision)));
            let on_device = Uploaded::<B>::new(&case, device, precision);
            let outputs = on_device.forward();
            let (grads, gain) = on_device.backward();
            // What the reference makes of it with sums in f32.
            let own = Uploaded::<Cpu>::new(&case, &burn_ndarray::NdArrayDevice::Cpu, Precision::F32);
            let (own_outputs, (own_grads, own_gain)) = (own.forward(), own.backward());
            let own = match precision {
                // Against which the host's own f64 is no better a measure.
                Precision::F64 => [64.0 * f64::EPSILON; 3],
                _ => [
                    case.worst_outputs(&own_outputs, &exact).error,
                    case.worst_grads(&own_grads, &exact).error,
                    // A few numbers, whose errors may be small by luck.
                    case.worst_gain(&own_gain, &exact).error.max(2.0 * f64::from(f32::EPSILON)),
                ],
            };
            for (what, worst, low, own) in [
                (
                    "forward",
                    case.worst_outputs(&outputs, &exact),
                    case.worst_outputs(&low.outputs, &exact),
                    own[0],
                ),
                ("backward", case.worst_grads(&grads, &exact), case.worst_grads(&low.grads, &exact), own[1]),
                ("gain", case.worst_gain(&gain, &exact), case.worst_gain(&low.gain, &exact), own[2]),
            ] {
                let tolerance = 2.0 * low.error.max(own).max(epsilon(precision));
                let share = worst.error / tolerance;
                let within = share <= 1.0;
                println!(
                    "  {sizes:?} {what:<8} {:>9.2e} of {tolerance:>9.2e} {:>4.0}%  [{}, {}]: {:.8e}, expected {:.8e}{}",
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
            for _ in 0..repeats() {
                let again = on_device.forward();
                assert!(again.iter().zip(&outputs).all(|(a, b)| same(a, b)), "{sizes:?}: outputs differ");
                let (again, gain_again) = on_device.backward();
                assert!(again.iter().zip(&grads).all(|(a, b)| same(a, b)), "{sizes:?}: gradients differ");
                assert!(same(&gain_again, &gain), "{sizes:?}: the gain's gradients differ");
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
        for sizes in [[2, 17, 6, 3, 10, 4], [3, 100, 8, 4, 64, 64]] {
            let case = Case::new(sizes, 1e-5, target.precision, 3);
            let plain = Uploaded::<B>::new(&case, device, target.precision);
            let inputs = plain
                .inputs
                .each_ref()
                .map(|x| Tensor::<Autodiff<B>, 2>::from_inner(x.clone()).require_grad());
            let [q, k] = inputs.clone();
            let outputs = Autodiff::<B>::qk_norm(q, k, &plain.how);
            for (y, expected) in outputs.iter().zip(plain.forward()) {
                assert!(same(&download(y.clone().inner()), &expected), "{sizes:?}");
            }
            let [of_q, of_k] = plain.grads.clone().map(Tensor::from_inner);
            let [y_q, y_k] = outputs.clone();
            let grads = ((y_q * of_q.clone()).sum() + (y_k * of_k).sum()).backward();
            let gain = download(plain.gain.take_flat_grad().expect("a gradient of the gain"));
            let (explicit, explicit_gain) = plain.backward();
            assert!(same(&gain, &explicit_gain), "{sizes:?}: the gain's gradient");
            for (x, explicit) in inputs.iter().zip(&explicit) {
                let through = download(x.grad(&grads).expect("a gradient of each input"));
                assert!(same(&through, explicit), "{sizes:?} on {} {}", target.label, target.precision);
            }

            // Twice into one buffer is the sum; a frozen gain has none; keys that nothing uses have a gradient of zeros.
            plain.backward_only();
            plain.backward_only();
            let twice = download(plain.gain.take_flat_grad().expect("a gradient of the gain"));
            assert!(
                twice.iter().zip(&gain).all(|(twice, once)| *twice == 2.0 * once),
                "{sizes:?}: not added"
            );
            plain.gain.set_trainable(false);
            let [q, k] = inputs.clone();
            let [y_q, _] = Autodiff::<B>::qk_norm(q, k, &plain.how);
            let grads = (y_q * of_q).sum().backward();
            assert!(plain.gain.take_flat_grad().is_none(), "{sizes:?}: a frozen gain's gradient");
            assert!(same(&download(inputs[0].grad(&grads).expect("a gradient of q")), &explicit[0]));
            let of_k = download(inputs[1].grad(&grads).expect("a gradient of k"));
            assert!(of_k.iter().all(|grad| *grad == 0.0), "{sizes:?}: a gradient of unused keys");
        }
        Ok(())
    }
}

impl<B: Plain> Uploaded<B> {
    fn backward_only(&self) {
        let [q, k] = self.inputs.clone();
        drop(B::qk_norm_backward(q, k, self.grads.clone(), &self.how));
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

    /// Columns of one packed projection (in place and between multiples of 16 bytes), without a gain, gradients of
    /// swapped positions and heads.
    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        let precision = target.precision;
        for sizes in [[3, 50, 8, 4, 64, 64], [2, 30, 3, 1, 20, 4]] {
            let [batch, time, heads, groups, size, _] = sizes;
            let case = Case::new(sizes, 1e-5, precision, 11);
            let dense = Uploaded::<B>::new(&case, device, precision);
            let mut how = dense.how.clone();
            how.gain = None;
            let [q, k] = dense.inputs.clone();
            let outputs = B::qk_norm(q.clone(), k.clone(), &how).map(download);
            let grads = B::qk_norm_backward(q.clone(), k.clone(), dense.grads.clone(), &how).map(download);
            assert!(dense.gain.take_flat_grad().is_none());
            let swapped = dense.grads.clone().map(|x| {
                let there = x.swap_dims(1, 2);
                upload::<B, 4>(&download(there.clone()), there.dims(), device, precision).swap_dims(1, 2)
            });
            for shift in [0, 1] {
                let rows = batch * time;
                let first =
                    upload::<B, 2>(&vec![0.5; rows * (256 + shift)], [rows, 256 + shift], device, precision);
                let packed = Tensor::cat(vec![first.clone(), q.clone(), k.clone(), first], 1);
                let packed_q = packed.clone().narrow(1, 256 + shift, heads * size);
                let packed_k = packed.narrow(1, 256 + shift + heads * size, groups * size);
                let again = B::qk_norm(packed_q.clone(), packed_k.clone(), &how).map(download);
                let grads_again =
                    B::qk_norm_backward(packed_q, packed_k, swapped.clone(), &how).map(download);
                for (got, expected) in again.iter().zip(&outputs).chain(grads_again.iter().zip(&grads)) {
                    // Not to the bit: Burn sums a view in another order on the CPU.
                    let scale = largest(expected);
                    let worst = worst(got, expected, size, |_| scale);
                    let what = format!("{sizes:?} {shift} on {} {precision}", target.label);
                    assert!(worst.error <= 8.0 * epsilon(precision), "{what}: {worst:?}");
                }
            }
        }
        Ok(())
    }
}

#[test]
fn any_layout_of_the_inputs_gives_the_same() {
    for target in targets() {
        guard(&target, || run(&target, Views)).unwrap();
    }
}

#[test]
fn the_reference_backward_is_the_derivative_of_the_reference_forward() {
    let device = burn_ndarray::NdArrayDevice::Cpu;
    for sizes in [[1, 1, 1, 1, 2, 2], [2, 17, 6, 3, 16, 4], [2, 9, 4, 2, 64, 64]] {
        let case = Case::new(sizes, 1e-5, Precision::F64, 5);
        let plain = Uploaded::<Cpu>::new(&case, &device, Precision::F64);
        let inputs =
            plain.inputs.each_ref().map(|x| Tensor::<Autodiff<Cpu>, 2>::from_inner(x.clone()).require_grad());
        let [q, k] = inputs.clone();
        // On the tape, op by op.
        let [y_q, y_k] = qk_norm::forward::<Autodiff<Cpu>>(q, k, &plain.how);
        let [of_q, of_k] = plain.grads.clone().map(Tensor::from_inner);
        let grads = ((y_q * of_q).sum() + (y_k * of_k).sum()).backward();
        let gain = download(plain.gain.take_flat_grad().expect("a gradient of the gain"));
        let (explicit, explicit_gain) = plain.backward();
        assert!(same(&gain, &explicit_gain), "{sizes:?}");
        for (x, explicit) in inputs.iter().zip(&explicit) {
            let burn = download(x.grad(&grads).expect("a gradient of each input"));
            assert!(same(&burn, explicit), "{sizes:?}");
        }
    }
}
