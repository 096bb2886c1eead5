//! The one-pole filter in chunks: against the plain recurrence and powers of the decay, its backward against Burn's own
//! differentiation of the recurrence, all in f64 on the CPU; states carried over a split; f32 against f64.

mod common;
mod sequence_common;

use burn::tensor::{DType, Tensor};
use fairway::backend::cpu::Cpu;
use fairway::ops::OnePoleOps;
use fairway::ops::one_pole::{OnePole, backward, forward, sequential, split};
use fairway::ops::scan::Scan;
use sequence_common::*;

#[derive(Clone, Copy, Debug)]
struct Size {
    batch: usize,
    time: usize,
    heads: usize,
    size: usize,
}

const SMALL: Size = Size { batch: 2, time: 1, heads: 4, size: 3 };

impl Size {
    fn s(&self) -> usize {
        self.batch * self.time * self.heads * self.size
    }

    fn state(&self) -> usize {
        self.batch * self.heads * self.size
    }

    fn output(&self, final_state: bool) -> usize {
        self.s() + if final_state { self.state() } else { 0 }
    }

    /// Seeded inputs in the order of [`OnePole`]'s fields.
    fn inputs(&self, seed: u64, decays: Decays) -> [Tensor<Cpu, 1>; 3] {
        [random(seed, self.s()), decays.logarithms(seed + 1, self.heads), random(seed + 2, self.state())]
    }

    fn filter<B: burn::tensor::backend::Backend>(&self, inputs: [Tensor<B, 1>; 3]) -> OnePole<B> {
        let [u, log_decay, state] = inputs;
        let &Size { batch, time, heads, size } = self;
        OnePole {
            u: u.reshape([batch, time, heads, size]),
            log_decay,
            state: state.reshape([batch, heads, size]),
        }
    }
}

/// Positions `start..end` of a filter's inputs.
fn slice(x: &OnePole<Cpu>, start: usize, end: usize, state: Tensor<Cpu, 3>) -> OnePole<Cpu> {
    OnePole { u: x.u.clone().narrow(1, start, end - start), log_decay: x.log_decay.clone(), state }
}

#[test]
fn a_single_input_decays_by_powers() {
    let (time, log_decays) = (100, [-1e-9, -0.03, -1e4]);
    let mut u = vec![0.0; time * 3];
    u[..3].fill(2.0);
    let inputs = [row(u), row(log_decays.to_vec()), row(vec![0.0; 3])];
    let size = Size { batch: 1, time, heads: 3, size: 1 };
    let expected =
        (0..time).flat_map(|t| log_decays.map(|log_decay| 2.0 * (log_decay * t as f64).exp())).collect();
    let expected = row(expected);
    assert_close("chunks", Cpu::one_pole(size.filter(inputs.clone()), 7, false), expected.clone(), 1e-14);
    assert_close("recurrence", sequential(size.filter(inputs), false), expected, 1e-14);
}

#[test]
fn chunks_equal_the_recurrence_at_any_length() {
    for decays in ALL_DECAYS {
        for time in [1, 7, 64, 65, 130] {
            let size = Size { time, ..SMALL };
            let inputs = size.inputs(100, decays);
            let expected = sequential(size.filter(inputs.clone()), true);
            for chunk in [1, 5, 13, 64, 65, 200] {
                let got = forward(size.filter(inputs.clone()), chunk, true);
                let what = format!("{decays:?}, {time} positions in chunks of {chunk}");
                assert_close(&what, got.clone(), expected.clone(), BOUND);
                let outputs = forward(size.filter(inputs.clone()), chunk, false);
                assert_eq!(values(outputs), values(got.narrow(0, 0, size.s())), "{what}, without the state");
            }
        }
    }
}

#[test]
fn backward_is_the_derivative_of_the_recurrence() {
    for decays in ALL_DECAYS {
        for (time, chunk) in [(1, 64), (7, 64), (64, 64), (65, 64), (130, 64), (130, 13), (65, 7)] {
            for final_state in [true, false] {
                let size = Size { time, ..SMALL };
                let inputs = size.inputs(200, decays);
                let cot = random(210, size.output(final_state));
                assert_same(
                    &format!("{decays:?}, {time} positions in chunks of {chunk}, final state {final_state}"),
                    &inputs,
                    &cot,
                    |x| Tape::one_pole(size.filter(x), chunk, final_state),
                    |x| sequential(size.filter(x), final_state),
                );
            }
        }
    }
}

#[test]
fn parts_of_the_batch_make_the_whole() {
    let size = Size { batch: 2, time: 130, heads: 32, size: 200 };
    const { assert!(Cpu::ONE_POLE_ELEMENTS / (3 * 64 * 32 * 200) == 1, "the sizes no longer cut the batch") };
    let whole = size.filter(size.inputs(300, Decays::Mixed));
    let (s, state) = whole.clone().run(64, true);
    let cot = random(310, size.output(true));
    let grads = backward(whole.clone(), 64, true, cot.clone());
    let (cot, cot_state) = split(cot, whole.u.dims(), DType::F64);
    let mut log_decay = whole.log_decay.zeros_like();
    for index in 0..size.batch {
        let one = OnePole {
            u: whole.u.clone().narrow(0, index, 1),
            log_decay: whole.log_decay.clone(),
            state: whole.state.clone().narrow(0, index, 1),
        };
        let (own, own_state) = one.clone().run(64, true);
        assert_close("outputs", s.clone().narrow(0, index, 1), own, BOUND);
        let of = |x: &Option<Tensor<Cpu, 3>>| x.clone().expect("a state").narrow(0, index, 1);
        assert_close("states", of(&state), own_state.expect("a state"), BOUND);
        let cot = cot.clone().narrow(0, index, 1).flatten::<1>(0, 3);
        let cot = Tensor::cat(vec![cot, of(&cot_state).flatten(0, 2)], 0);
        let own = backward(one, 64, true, cot);
        assert_close("gradient of u", grads.u.clone().narrow(0, index, 1), own.u, BOUND);
        assert_close("gradient of state", grads.state.clone().narrow(0, index, 1), own.state, BOUND);
        log_decay = log_decay + own.log_decay;
    }
    assert_close("gradient of log_decay", grads.log_decay, log_decay, BOUND);
}

#[test]
fn a_state_carried_over_a_split_gives_the_whole() {
    for decays in ALL_DECAYS {
        let size = Size { time: 130, ..SMALL };
        let whole = size.filter(size.inputs(400, decays));
        let (expected, last) = whole.clone().run(64, true);
        for at in [1, 63, 64, 100, 129] {
            let (head, state) = slice(&whole, 0, at, whole.state.clone()).run(64, true);
            let (tail, state) = slice(&whole, at, 130, state.expect("a state")).run(64, true);
            let what = format!("{decays:?}, split at {at}");
            assert_close(&what, Tensor::cat(vec![head, tail], 1), expected.clone(), BOUND);
            assert_close(&what, state.expect("a state"), last.clone().expect("a state"), BOUND);
        }
    }
}

#[test]
fn it_is_the_scan_of_constant_keys_and_queries() {
    // spec/pr1994.md: h_t = a h_{t-1} + Delta u_t B^T, y_t = h_t C is Delta (B . C) s_t.
    let (size, states) = (Size { time: 130, ..SMALL }, 6);
    let (tokens, delta) = (size.batch * size.time, 0.7);
    let [u, log_decay, _] = size.inputs(500, Decays::Middling);
    let constant = |seed| {
        let values = random(seed, states);
        (values.clone(), values.reshape([1, 1, 1, states]).expand([size.batch, size.time, 1, states]))
    };
    let ((read, q), (write, k)) = (constant(510), constant(511));
    let weight = row(vec![delta; tokens * size.heads]).reshape([size.batch, size.time, size.heads]);
    let scan = Scan {
        q,
        k,
        v: u.clone().reshape([size.batch, size.time, size.heads, size.size]),
        log_decay: log_decay.clone().reshape([1, 1, size.heads]).expand([size.batch, size.time, size.heads]),
        weight: weight.clone(),
        diagonal: weight,
        state: row(vec![0.0; size.state() * states]).reshape([size.batch, size.heads, size.size, states]),
    };
    let (expected, _) = scan.run(64, false);
    let state = row(vec![0.0; size.state()]);
    let (s, _) = size.filter([u, log_decay, state]).run(64, false);
    let gain = delta * values(read * write).iter().sum::<f64>();
    assert_close("the layer of PR #1994", s.mul_scalar(gain), expected, BOUND);
}

#[test]
fn f32_is_near_f64() {
    // The worst is 4e-7, but for the gradient of log_decay: 16,384 numbers a head that all but cancel (6.5e-6).
    for decays in ALL_DECAYS {
        for (time, chunk) in [(65, 64), (130, 32), (512, 64)] {
            let size = Size { time, size: 16, ..SMALL };
            let inputs = size.inputs(600, decays);
            let cot = random(610, size.output(true));
            let what = format!("{decays:?}, {time} positions in chunks of {chunk}");
            assert_f32_near_f64(&what, &inputs, &cot, 1e-5, |x| Tape::one_pole(size.filter(x), chunk, true));
        }
    }
}

#[test]
fn outputs_have_the_inputs_type_and_gradients_that_of_their_own() {
    let size = Size { time: 70, ..SMALL };
    let mut inputs = size.inputs(700, Decays::Mixed);
    inputs[0] = inputs[0].clone().cast(DType::F32);
    let wide = inputs.each_ref().map(|x| x.clone().cast(DType::F64));
    let (expected, expected_state) = size.filter(wide.clone()).run(16, true);
    let (s, state) = size.filter(inputs.clone()).run(16, true);
    let state = state.expect("a state");
    assert_eq!((s.dtype(), state.dtype()), (DType::F32, DType::F64));
    assert_close("outputs", s, expected, 1e-7);
    assert_close("state", state, expected_state.expect("a state"), BOUND);
    let (s, state) = size.filter(inputs.clone()).run(16, false);
    assert_eq!(s.dtype(), DType::F32);
    assert!(state.is_none());

    let cot = random(710, size.output(false));
    let run = |x: &[Tensor<Cpu, 1>; 3]| {
        differentiate(x, &cot, |x| Tape::one_pole(size.filter(x), 16, false).cast(DType::F64)).1
    };
    for (index, (found, expected)) in run(&inputs).into_iter().zip(run(&wide)).enumerate() {
        assert_eq!(found.dtype(), inputs[index].dtype(), "input {index}");
        assert_close(&format!("gradient of input {index}"), found, expected, 2e-7);
    }
}

#[test]
fn equal_runs_are_equal_bit_for_bit() {
    let size = Size { time: 200, size: 16, ..SMALL };
    let inputs = size.inputs(800, Decays::Mixed).map(|x| x.cast(DType::F32));
    let cot = random(810, size.output(true)).cast(DType::F32);
    let run = || {
        let (y, grads) = differentiate(&inputs, &cot, |x| Tape::one_pole(size.filter(x), 64, true));
        (values(y), grads.map(values))
    };
    assert_eq!(run(), run());
}
