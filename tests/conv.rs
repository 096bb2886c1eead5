//! The causal depthwise convolution: against a loop over numbers, its backward against Burn's own differentiation of a
//! plain convolution, all in f64 on the CPU; history carried over a split; gradients of the parameters' buffers.

mod common;
mod sequence_common;

use burn::tensor::{DType, Tensor};
use fairway::backend::cpu::Cpu;
use fairway::ops::conv::next_history;
use fairway::ops::{ConvOps, Param};
use sequence_common::*;

#[derive(Clone, Copy, Debug)]
struct Size {
    batch: usize,
    time: usize,
    channels: usize,
    width: usize,
}

impl Size {
    fn count(&self) -> usize {
        self.batch * self.time * self.channels
    }

    /// Seeded x, history, taps and bias.
    fn inputs(&self, seed: u64) -> [Tensor<Cpu, 1>; 4] {
        [
            random(seed, self.count()),
            random(seed + 1, self.batch * (self.width - 1) * self.channels),
            random(seed + 2, self.channels * self.width),
            random(seed + 3, self.channels),
        ]
    }

    fn x<B: burn::tensor::backend::Backend>(&self, x: Tensor<B, 1>) -> Tensor<B, 3> {
        x.reshape([self.batch, self.time, self.channels])
    }

    fn history<B: burn::tensor::backend::Backend>(&self, history: Tensor<B, 1>) -> Tensor<B, 3> {
        history.reshape([self.batch, self.width - 1, self.channels])
    }

    /// The parameters, the taps in one of the two shapes.
    fn params(
        &self,
        weight: &Tensor<Cpu, 1>,
        bias: &Tensor<Cpu, 1>,
        middle: bool,
    ) -> (Param<Cpu>, Param<Cpu>) {
        let dtype = weight.dtype();
        let weight = weight.clone();
        let weight = if middle {
            Param::new("w", weight.reshape([self.channels, 1, self.width]), dtype)
        } else {
            Param::new("w", weight.reshape([self.channels, self.width]), dtype)
        };
        (weight, Param::new("b", bias.clone(), dtype))
    }

    /// The convolution in Burn's own ops, position by position of the taps.
    fn plain(
        &self,
        [x, history, weight, bias]: [Tensor<Tape, 1>; 4],
        with_bias: bool,
        silu: bool,
    ) -> Tensor<Tape, 1> {
        let inputs = Tensor::cat(vec![self.history(history), self.x(x)], 1);
        let weight: Tensor<Tape, 2> = weight.reshape([self.channels, self.width]);
        let mut z: Tensor<Tape, 3> =
            bias.reshape([1, 1, self.channels]).mul_scalar(if with_bias { 1.0 } else { 0.0 })
                + self.x(Tensor::from_inner(row(vec![0.0; self.count()])));
        for j in 0..self.width {
            let tap = weight.clone().narrow(1, j, 1).reshape([1, 1, self.channels]);
            z = z + inputs.clone().narrow(1, j, self.time) * tap;
        }
        // Not Burn's own SiLU: on burn-ndarray it computes f64 in f32.
        let y = if silu { z.clone() / z.neg().exp().add_scalar(1.0) } else { z };
        y.reshape([self.count()])
    }
}

#[test]
fn outputs_are_the_weighted_sums_of_the_last_inputs() {
    for (time, width) in [(1, 4), (2, 4), (3, 4), (7, 4), (65, 3), (20, 2)] {
        let size = Size { batch: 2, time, channels: 3, width };
        let inputs = size.inputs(100);
        let [x, history, weight, bias] = inputs.each_ref().map(|x| values(x.clone()));
        let at = |b: usize, t: i64, c: usize| match usize::try_from(t) {
            Ok(t) => x[(b * time + t) * 3 + c],
            Err(_) => history[(b * (width - 1) + (t + width as i64 - 1) as usize) * 3 + c],
        };
        let mut expected = Vec::new();
        for b in 0..2 {
            for t in 0..time as i64 {
                for c in 0..3 {
                    let lags =
                        (0..width).map(|lag| weight[c * width + width - 1 - lag] * at(b, t - lag as i64, c));
                    expected.push(bias[c] + lags.sum::<f64>());
                }
            }
        }
        let [x, history, weight, bias] = inputs;
        let (weight, bias) = size.params(&weight, &bias, true);
        let y = Cpu::causal_conv(size.x(x), size.history(history), &weight, Some(&bias), false);
        assert_close(&format!("{size:?}"), y.flatten(0, 2), row(expected), 1e-14);
    }
}

/// Output and gradients of x, history, taps and bias of the op.
fn differentiate_op(
    size: &Size,
    inputs: &[Tensor<Cpu, 1>; 4],
    cot: &Tensor<Cpu, 1>,
    [middle, with_bias, silu]: [bool; 3],
) -> (Tensor<Cpu, 1>, Vec<Tensor<Cpu, 1>>) {
    let [x, history, weight, bias] = inputs.clone();
    let (weight, bias) = size.params(&weight, &bias, middle);
    let (y, grads) = differentiate(&[x, history], cot, |[x, history]| {
        let y =
            Tape::causal_conv(size.x(x), size.history(history), &weight, with_bias.then_some(&bias), silu);
        y.flatten(0, 2)
    });
    let mut grads = grads.to_vec();
    grads.push(weight.flat_grad().expect("a gradient of the taps"));
    grads.push(bias.flat_grad().unwrap_or_else(|| bias.flat().zeros_like()));
    assert_eq!(bias.flat_grad().is_some(), with_bias);
    (y, grads)
}

#[test]
fn backward_is_the_derivative() {
    for options in (0..8).map(|i| [i & 1 == 0, i & 2 == 0, i & 4 == 0]) {
        for (time, width) in [(1, 4), (2, 4), (7, 4), (65, 4), (130, 3), (5, 2)] {
            let size = Size { batch: 3, time, channels: 5, width };
            let (inputs, cot) = (size.inputs(200), random(210, size.count()));
            let (y, found) = differentiate_op(&size, &inputs, &cot, options);
            let [_, with_bias, silu] = options;
            let (expected_y, expected) = differentiate(&inputs, &cot, |x| size.plain(x, with_bias, silu));
            let what = format!("{size:?}, [c, 1, k], bias, SiLU: {options:?}");
            assert_close(&what, y, expected_y, BOUND);
            for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
                assert_close(&format!("{what}, gradient {index}"), found, expected, BOUND);
            }
        }
    }
}

#[test]
fn parts_of_the_batch_make_the_whole() {
    let size = Size { batch: 3, time: 1000, channels: 900, width: 4 };
    const { assert!(Cpu::CONV_ELEMENTS / (1000 * 900) == 2, "the sizes no longer cut the batch") };
    let (inputs, cot) = (size.inputs(300), random(310, size.count()));
    let (y, found) = differentiate_op(&size, &inputs, &cot, [true; 3]);
    let (expected_y, expected) = differentiate(&inputs, &cot, |x| size.plain(x, true, true));
    assert_close("outputs", y, expected_y, BOUND);
    for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert_close(&format!("gradient {index}"), found, expected, BOUND);
    }
}

#[test]
fn a_history_carried_over_a_split_gives_the_whole() {
    let size = Size { batch: 2, time: 65, channels: 3, width: 4 };
    let [x, history, weight, bias] = size.inputs(400);
    let (weight, bias) = size.params(&weight, &bias, true);
    let (x, history) = (size.x(x), size.history(history));
    let conv = |x, history| Cpu::causal_conv(x, history, &weight, Some(&bias), true);
    let expected = conv(x.clone(), history.clone());
    for step in [1, 2, 3, 4, 64] {
        let (mut history, mut outputs) = (history.clone(), Vec::new());
        for start in (0..65).step_by(step) {
            let x = x.clone().narrow(1, start, step.min(65 - start));
            outputs.push(conv(x.clone(), history.clone()));
            history = next_history(x, history);
            assert_eq!(history.dims(), [2, 3, 3]);
        }
        assert_eq!(values(Tensor::cat(outputs, 1)), values(expected.clone()), "{step} at a time");
    }
}

#[test]
fn gradients_accumulate_and_frozen_parameters_get_none() {
    let size = Size { batch: 2, time: 9, channels: 3, width: 4 };
    let [x, history, weight, bias] = size.inputs(500);
    for middle in [true, false] {
        let (weight, bias) = size.params(&weight, &bias, middle);
        let run = || {
            let x = size.x(Tensor::<Tape, 1>::from_inner(x.clone())).require_grad();
            let history = size.history(Tensor::from_inner(history.clone()));
            Tape::causal_conv(x, history, &weight, Some(&bias), true).backward();
        };
        run();
        let once = [&weight, &bias].map(|param| param.flat_grad().expect("a gradient"));
        run();
        run();
        for (param, once) in [&weight, &bias].into_iter().zip(once) {
            assert_close(param.name(), param.flat_grad().expect("a gradient"), once.mul_scalar(3.0), 1e-14);
        }
        // The buffer has the parameter's own shape.
        if middle {
            assert_eq!(weight.take_grad::<3>().expect("a gradient").dims(), [3, 1, 4]);
        } else {
            assert_eq!(weight.take_grad::<2>().expect("a gradient").dims(), [3, 4]);
        }
        bias.clear_grad();
        weight.set_trainable(false);
        run();
        assert!(weight.flat_grad().is_none() && bias.flat_grad().is_some());
        bias.clear_grad();
        bias.set_trainable(false);
        run();
        assert!(bias.flat_grad().is_none());
    }
}

#[test]
fn f32_is_near_f64_and_large_values_stay_finite() {
    // The worst is 6e-7.
    let size = Size { batch: 2, time: 300, channels: 7, width: 4 };
    for scale in [1.0, 1e4] {
        let narrow = size.inputs(600).map(|x| x.mul_scalar(scale).cast(DType::F32));
        let wide = narrow.each_ref().map(|x| x.clone().cast(DType::F64));
        let cot = random(610, size.count()).cast(DType::F32);
        let (y, found) = differentiate_op(&size, &narrow, &cot, [true; 3]);
        let (expected_y, expected) = differentiate_op(&size, &wide, &cot.cast(DType::F64), [true; 3]);
        assert_close("outputs", y, expected_y, 2e-6);
        for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
            assert_eq!(found.dtype(), DType::F32);
            assert_close(&format!("gradient {index} at {scale:e}"), found, expected, 2e-6);
        }
    }
}
