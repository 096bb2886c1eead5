//! The selective scan in chunks: against the plain recurrence and a loop over numbers, its backward against Burn's own
//! differentiation of the recurrence, all in f64 on the CPU; states carried over a split; f32 against f64.

mod common;
mod sequence_common;

use burn::tensor::{DType, Tensor};
use fairway::backend::cpu::Cpu;
use fairway::ops::SelectiveScanOps;
use fairway::ops::selective_scan::{SelectiveScan, backward, forward, sequential, split};
use sequence_common::*;

#[derive(Clone, Copy, Debug)]
struct Size {
    batch: usize,
    time: usize,
    channels: usize,
    state_size: usize,
}

const SMALL: Size = Size { batch: 2, time: 1, channels: 6, state_size: 5 };

/// What the decays `exp(delta a)` are: `a` is spread over [-2, -0.1) times this, `delta` over [0.01, 1).
const RATES: [f64; 4] = [1.0, 1e-9, 1e4, 30.0];

impl Size {
    fn y(&self) -> usize {
        self.batch * self.time * self.channels
    }

    fn state(&self) -> usize {
        self.batch * self.channels * self.state_size
    }

    fn output(&self, final_state: bool) -> usize {
        self.y() + if final_state { self.state() } else { 0 }
    }

    /// Seeded inputs in the order of [`SelectiveScan`]'s fields.
    fn inputs(&self, seed: u64, rate: f64) -> [Tensor<Cpu, 1>; 6] {
        let of_state = self.batch * self.time * self.state_size;
        [
            random(seed, self.y()),
            between(seed + 1, self.y(), 0.01, 1.0),
            between(seed + 2, self.channels * self.state_size, -2.0 * rate, -0.1 * rate),
            random(seed + 3, of_state),
            random(seed + 4, of_state),
            random(seed + 5, self.state()),
        ]
    }

    fn scan<B: burn::tensor::backend::Backend>(&self, inputs: [Tensor<B, 1>; 6]) -> SelectiveScan<B> {
        let [u, delta, a, b, c, state] = inputs;
        let &Size { batch, time, channels, state_size } = self;
        SelectiveScan {
            u: u.reshape([batch, time, channels]),
            delta: delta.reshape([batch, time, channels]),
            a: a.reshape([channels, state_size]),
            b: b.reshape([batch, time, state_size]),
            c: c.reshape([batch, time, state_size]),
            state: state.reshape([batch, channels, state_size]),
        }
    }
}

/// Positions `start..end` of a scan's inputs.
fn slice(x: &SelectiveScan<Cpu>, start: usize, end: usize, state: Tensor<Cpu, 3>) -> SelectiveScan<Cpu> {
    let of = |x: &Tensor<Cpu, 3>| x.clone().narrow(1, start, end - start);
    SelectiveScan { u: of(&x.u), delta: of(&x.delta), a: x.a.clone(), b: of(&x.b), c: of(&x.c), state }
}

/// Outputs and final state, number by number.
fn by_numbers(size: &Size, inputs: &[Tensor<Cpu, 1>; 6]) -> Vec<f64> {
    let [u, delta, a, b, c, mut h] = inputs.each_ref().map(|x| values(x.clone()));
    let &Size { batch, time, channels, state_size } = size;
    let mut outputs = vec![0.0; size.y()];
    for i in 0..batch {
        for t in 0..time {
            for channel in 0..channels {
                let at = (i * time + t) * channels + channel;
                for n in 0..state_size {
                    let (state, row) =
                        ((i * channels + channel) * state_size + n, (i * time + t) * state_size + n);
                    let decay = (delta[at] * a[channel * state_size + n]).exp();
                    h[state] = decay * h[state] + delta[at] * b[row] * u[at];
                    outputs[at] += c[row] * h[state];
                }
            }
        }
    }
    outputs.extend(h);
    outputs
}

#[test]
fn the_scan_equals_the_recurrence_at_any_length() {
    for rate in RATES {
        for time in [1, 7, 64, 65, 130] {
            let size = Size { time, ..SMALL };
            let inputs = size.inputs(100, rate);
            let expected = row(by_numbers(&size, &inputs));
            let what = format!("rate {rate:e}, {time} positions");
            let plain = sequential(size.scan(inputs.clone()), true);
            assert_close(&format!("recurrence, {what}"), plain, expected.clone(), BOUND);
            let whole = Cpu::selective_scan(size.scan(inputs.clone()), true);
            assert_close(&what, whole.clone(), expected.clone(), BOUND);
            let outputs = Cpu::selective_scan(size.scan(inputs.clone()), false);
            assert_eq!(values(outputs), values(whole.narrow(0, 0, size.y())), "{what}, without the state");
            for chunk in [1, 5, 13, 64, 65, 200] {
                let got = forward(size.scan(inputs.clone()), chunk, true);
                assert_close(&format!("{what}, chunks of {chunk}"), got, expected.clone(), BOUND);
            }
        }
    }
}

#[test]
fn backward_is_the_derivative_of_the_recurrence() {
    for rate in RATES {
        for time in [1, 2, 7, 64, 65, 130] {
            for final_state in [true, false] {
                let size = Size { time, ..SMALL };
                let inputs = size.inputs(200, rate);
                let cot = random(210, size.output(final_state));
                assert_same(
                    &format!("rate {rate:e}, {time} positions, final state {final_state}"),
                    &inputs,
                    &cot,
                    |x| Tape::selective_scan(size.scan(x), final_state),
                    |x| sequential(size.scan(x), final_state),
                );
            }
        }
    }
}

#[test]
fn gradients_are_the_same_in_chunks_of_any_length() {
    let size = Size { time: 65, ..SMALL };
    let inputs = size.scan(size.inputs(300, 1.0));
    let cot = random(310, size.output(true));
    let expected = backward(inputs.clone(), 1, true, cot.clone());
    for chunk in [5, 13, 64, 65, 200] {
        let got = backward(inputs.clone(), chunk, true, cot.clone());
        let what = format!("chunks of {chunk}");
        assert_close(&what, got.u, expected.u.clone(), BOUND);
        assert_close(&what, got.delta, expected.delta.clone(), BOUND);
        assert_close(&what, got.a, expected.a.clone(), BOUND);
        assert_close(&what, got.b, expected.b.clone(), BOUND);
        assert_close(&what, got.c, expected.c.clone(), BOUND);
        assert_close(&what, got.state, expected.state.clone(), BOUND);
    }
}

/// One sequence and some channels of a scan's inputs, or of their gradients.
fn part(x: &SelectiveScan<Cpu>, sequence: usize, start: usize, count: usize) -> SelectiveScan<Cpu> {
    let one = |x: &Tensor<Cpu, 3>| x.clone().narrow(0, sequence, 1);
    SelectiveScan {
        u: one(&x.u).narrow(2, start, count),
        delta: one(&x.delta).narrow(2, start, count),
        a: x.a.clone().narrow(0, start, count),
        b: one(&x.b),
        c: one(&x.c),
        state: one(&x.state).narrow(1, start, count),
    }
}

#[test]
fn parts_of_the_batch_and_of_the_channels_make_the_whole() {
    // 144 positions of 8 states: 1820 channels at once. The first is cut by sequences, the second by channels.
    const { assert!(Cpu::SELECTIVE_SCAN_ELEMENTS / (144 * 8) == 1820) };
    for (batch, channels) in [(3, 700), (1, 2000)] {
        let size = Size { batch, time: 144, channels, state_size: 8 };
        let whole = size.scan(size.inputs(400, 1.0));
        let (y, state) = whole.clone().run(true);
        let state = state.expect("a state");
        let cot = random(410, size.output(true));
        let grads = backward(whole.clone(), 12, true, cot.clone());
        let (cot, cot_state) = split(cot, whole.u.dims(), 8, DType::F64);
        let cot_state = cot_state.expect("a state");
        let half = channels / 2;
        let mut grad_a = whole.a.zeros_like();
        for index in 0..batch {
            let mut sums = Vec::new();
            let mut rows = Vec::new();
            for start in [0, half] {
                let one = part(&whole, index, start, half);
                let outputs = |x: &Tensor<Cpu, 3>| x.clone().narrow(0, index, 1).narrow(2, start, half);
                let states = |x: &Tensor<Cpu, 3>| x.clone().narrow(0, index, 1).narrow(1, start, half);
                let (own, own_state) = one.clone().run(true);
                assert_close("outputs", outputs(&y), own, BOUND);
                assert_close("states", states(&state), own_state.expect("a state"), BOUND);
                let cot = vec![outputs(&cot).flatten::<1>(0, 2), states(&cot_state).flatten(0, 2)];
                let own = backward(one, 12, true, Tensor::cat(cot, 0));
                let found = part(&grads, index, start, half);
                assert_close("gradient of u", found.u, own.u, BOUND);
                assert_close("gradient of delta", found.delta, own.delta, BOUND);
                assert_close("gradient of state", found.state, own.state, BOUND);
                sums.push((own.b, own.c));
                rows.push(own.a);
            }
            let [(b, c), (more_b, more_c)] = sums.try_into().expect("two halves");
            assert_close("gradient of b", grads.b.clone().narrow(0, index, 1), b + more_b, BOUND);
            assert_close("gradient of c", grads.c.clone().narrow(0, index, 1), c + more_c, BOUND);
            grad_a = grad_a + Tensor::cat(rows, 0);
        }
        assert_close("gradient of a", grads.a, grad_a, BOUND);
    }
}

#[test]
fn a_state_carried_over_a_split_gives_the_whole() {
    for rate in RATES {
        let size = Size { time: 130, ..SMALL };
        let whole = size.scan(size.inputs(500, rate));
        let (expected, last) = whole.clone().run(true);
        for at in [1, 64, 100, 129] {
            let (head, state) = slice(&whole, 0, at, whole.state.clone()).run(true);
            let (tail, state) = slice(&whole, at, 130, state.expect("a state")).run(true);
            let what = format!("rate {rate:e}, split at {at}");
            assert_close(&what, Tensor::cat(vec![head, tail], 1), expected.clone(), BOUND);
            assert_close(&what, state.expect("a state"), last.clone().expect("a state"), BOUND);
        }
        // One token at a time.
        let (mut state, mut steps) = (whole.state.clone(), Vec::new());
        for t in 0..130 {
            let (y, next) = slice(&whole, t, t + 1, state).run(true);
            state = next.expect("a state");
            steps.push(y);
        }
        assert_close("steps", Tensor::cat(steps, 1), expected, BOUND);
        assert_close("steps", state, last.expect("a state"), BOUND);
    }
}

#[test]
fn f32_is_near_f64() {
    // The worst is 3.5e-7.
    for rate in RATES {
        for time in [65, 130, 512] {
            let size = Size { time, state_size: 16, ..SMALL };
            let inputs = size.inputs(600, rate);
            let cot = random(610, size.output(true));
            let what = format!("rate {rate:e}, {time} positions");
            assert_f32_near_f64(&what, &inputs, &cot, 1e-6, |x| Tape::selective_scan(size.scan(x), true));
        }
    }
}

#[test]
fn outputs_have_the_inputs_type_and_gradients_that_of_their_own() {
    let size = Size { time: 70, ..SMALL };
    let mut inputs = size.inputs(700, 1.0);
    for index in [0, 3, 4] {
        inputs[index] = inputs[index].clone().cast(DType::F32);
    }
    let wide = inputs.each_ref().map(|x| x.clone().cast(DType::F64));
    let (expected, expected_state) = size.scan(wide.clone()).run(true);
    let (y, state) = size.scan(inputs.clone()).run(true);
    let state = state.expect("a state");
    assert_eq!((y.dtype(), state.dtype()), (DType::F32, DType::F64));
    assert_close("outputs", y, expected, 1e-7);
    assert_close("state", state, expected_state.expect("a state"), BOUND);
    let (y, state) = size.scan(inputs.clone()).run(false);
    assert_eq!(y.dtype(), DType::F32);
    assert!(state.is_none());

    let cot = random(710, size.output(false));
    let run = |x: &[Tensor<Cpu, 1>; 6]| {
        differentiate(x, &cot, |x| Tape::selective_scan(size.scan(x), false).cast(DType::F64)).1
    };
    for (index, (found, expected)) in run(&inputs).into_iter().zip(run(&wide)).enumerate() {
        assert_eq!(found.dtype(), inputs[index].dtype(), "input {index}");
        assert_close(&format!("gradient of input {index}"), found, expected, 2e-7);
    }
}

#[test]
fn equal_runs_are_equal_bit_for_bit() {
    let size = Size { time: 200, channels: 32, state_size: 16, ..SMALL };
    let inputs = size.inputs(800, 1.0).map(|x| x.cast(DType::F32));
    let cot = random(810, size.output(true)).cast(DType::F32);
    let run = || {
        let (y, grads) = differentiate(&inputs, &cot, |x| Tape::selective_scan(size.scan(x), true));
        (values(y), grads.map(values))
    };
    assert_eq!(run(), run());
}
