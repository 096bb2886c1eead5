//! The chunked scan: against the plain recurrence and the formula itself, its backward against Burn's own
//! differentiation of the recurrence, all in f64 on the CPU; states carried over a split; f32 against f64.

mod common;
mod sequence_common;

use burn::tensor::{DType, Tensor};
use fairway::backend::cpu::Cpu;
use fairway::ops::ScanOps;
use fairway::ops::scan::{Scan, backward, forward, sequential, split};
use sequence_common::*;

#[derive(Clone, Copy, Debug)]
struct Size {
    batch: usize,
    time: usize,
    groups: usize,
    heads: usize,
    head_size: usize,
    state_size: usize,
}

const SMALL: Size = Size { batch: 2, time: 1, groups: 2, heads: 4, head_size: 3, state_size: 5 };

impl Size {
    fn y(&self) -> usize {
        self.batch * self.time * self.heads * self.head_size
    }

    fn state(&self) -> usize {
        self.batch * self.heads * self.head_size * self.state_size
    }

    fn output(&self, final_state: bool) -> usize {
        self.y() + if final_state { self.state() } else { 0 }
    }

    /// Seeded inputs in the order of [`Scan`]'s fields.
    fn inputs(&self, seed: u64, decays: Decays) -> [Tensor<Cpu, 1>; 7] {
        let of_groups = self.batch * self.time * self.groups * self.state_size;
        let of_heads = self.batch * self.time * self.heads;
        [
            random(seed, of_groups),
            random(seed + 1, of_groups),
            random(seed + 2, self.y()),
            decays.logarithms(seed + 3, of_heads),
            random(seed + 4, of_heads),
            random(seed + 5, of_heads),
            random(seed + 6, self.state()),
        ]
    }

    fn scan<B: burn::tensor::backend::Backend>(&self, inputs: [Tensor<B, 1>; 7]) -> Scan<B> {
        let [q, k, v, log_decay, weight, diagonal, state] = inputs;
        let &Size { batch, time, groups, heads, head_size, state_size } = self;
        Scan {
            q: q.reshape([batch, time, groups, state_size]),
            k: k.reshape([batch, time, groups, state_size]),
            v: v.reshape([batch, time, heads, head_size]),
            log_decay: log_decay.reshape([batch, time, heads]),
            weight: weight.reshape([batch, time, heads]),
            diagonal: diagonal.reshape([batch, time, heads]),
            state: state.reshape([batch, heads, head_size, state_size]),
        }
    }
}

/// Positions `start..end` of a scan's inputs.
fn slice(x: &Scan<Cpu>, start: usize, end: usize, state: Tensor<Cpu, 4>) -> Scan<Cpu> {
    let of_four = |x: &Tensor<Cpu, 4>| x.clone().narrow(1, start, end - start);
    let of_three = |x: &Tensor<Cpu, 3>| x.clone().narrow(1, start, end - start);
    Scan {
        q: of_four(&x.q),
        k: of_four(&x.k),
        v: of_four(&x.v),
        log_decay: of_three(&x.log_decay),
        weight: of_three(&x.weight),
        diagonal: of_three(&x.diagonal),
        state,
    }
}

/// Outputs and final state by the formula: a sum over all earlier positions for each.
fn by_the_formula(size: &Size, inputs: &[Tensor<Cpu, 1>; 7]) -> Vec<f64> {
    let [q, k, v, log_decay, weight, diagonal, state] = inputs.each_ref().map(|x| values(x.clone()));
    let &Size { batch, time, groups, heads, head_size, state_size } = size;
    let (mut outputs, mut last) = (vec![0.0; size.y()], vec![0.0; size.state()]);
    for b in 0..batch {
        for h in 0..heads {
            let at = |t: usize| (b * time + t) * heads + h;
            let key = |t: usize, n: usize| ((b * time + t) * groups + h / (heads / groups)) * state_size + n;
            // The product of the decays after position `from` up to `to`, with -1 before the first.
            let decay = |from: i64, to: usize| {
                (0..=to).filter(|r| *r as i64 > from).map(|r| log_decay[at(r)]).sum::<f64>().exp()
            };
            let dot = |t: usize, s: usize| (0..state_size).map(|n| q[key(t, n)] * k[key(s, n)]).sum::<f64>();
            for p in 0..head_size {
                let value = |t: usize| v[at(t) * head_size + p];
                let first = |n: usize| state[((b * heads + h) * head_size + p) * state_size + n];
                for t in 0..time {
                    let mut y = diagonal[at(t)] * dot(t, t) * value(t);
                    for s in 0..t {
                        y += decay(s as i64, t) * weight[at(s)] * dot(t, s) * value(s);
                    }
                    let read: f64 = (0..state_size).map(|n| first(n) * q[key(t, n)]).sum();
                    outputs[at(t) * head_size + p] = y + decay(-1, t) * read;
                }
                for n in 0..state_size {
                    let mut sum = decay(-1, time - 1) * first(n);
                    for s in 0..time {
                        sum += decay(s as i64, time - 1) * weight[at(s)] * value(s) * k[key(s, n)];
                    }
                    last[((b * heads + h) * head_size + p) * state_size + n] = sum;
                }
            }
        }
    }
    outputs.extend(last);
    outputs
}

#[test]
fn chunks_and_the_recurrence_compute_the_formula() {
    for decays in ALL_DECAYS {
        for (time, chunk) in [(1, 64), (2, 2), (7, 3), (20, 8)] {
            let size = Size { time, ..SMALL };
            let inputs = size.inputs(100, decays);
            let expected = row(by_the_formula(&size, &inputs));
            let what = format!("{decays:?}, {time} positions");
            let plain = sequential(size.scan(inputs.clone()), true);
            assert_close(&format!("recurrence, {what}"), plain, expected.clone(), BOUND);
            let chunked = Cpu::scan(size.scan(inputs), chunk, true);
            assert_close(&format!("chunks of {chunk}, {what}"), chunked, expected, BOUND);
        }
    }
}

#[test]
fn chunks_equal_the_recurrence_at_any_length() {
    for decays in ALL_DECAYS {
        for time in [1, 7, 64, 65, 130] {
            let size = Size { time, ..SMALL };
            let inputs = size.inputs(200, decays);
            let expected = sequential(size.scan(inputs.clone()), true);
            for chunk in [1, 5, 13, 64, 65, 200] {
                let got = forward(size.scan(inputs.clone()), chunk, true);
                let what = format!("{decays:?}, {time} positions in chunks of {chunk}");
                assert_close(&what, got.clone(), expected.clone(), BOUND);
                let outputs = forward(size.scan(inputs.clone()), chunk, false);
                assert_eq!(values(outputs), values(got.narrow(0, 0, size.y())), "{what}, without the state");
            }
        }
    }
}

#[test]
fn backward_is_the_derivative_of_the_recurrence() {
    for (groups, heads, all) in [(2, 4, &ALL_DECAYS[..]), (1, 1, &[Decays::Mixed]), (1, 3, &[Decays::Mixed])]
    {
        for &decays in all {
            for (time, chunk) in [(1, 64), (7, 64), (64, 64), (65, 64), (130, 64), (130, 13), (65, 7)] {
                for final_state in [true, false] {
                    let size = Size { time, groups, heads, ..SMALL };
                    let inputs = size.inputs(300, decays);
                    let cot = random(310, size.output(final_state));
                    assert_same(
                        &format!("{decays:?}, {size:?} in chunks of {chunk}, final state {final_state}"),
                        &inputs,
                        &cot,
                        |x| Tape::scan(size.scan(x), chunk, final_state),
                        |x| sequential(size.scan(x), final_state),
                    );
                }
            }
        }
    }
}

#[test]
fn parts_of_the_batch_make_the_whole() {
    let size = Size { batch: 3, time: 130, groups: 4, heads: 64, head_size: 2, state_size: 3 };
    const { assert!(Cpu::SCAN_ELEMENTS / (3 * 64 * 64 * 64) == 2, "the sizes no longer cut the batch") };
    let whole = size.scan(size.inputs(400, Decays::Mixed));
    let (y, state) = whole.clone().run(64, true);
    let cot = random(410, size.output(true));
    let grads = backward(whole.clone(), 64, true, cot.clone());
    let (cot, cot_state) = split(cot, whole.v.dims(), size.state_size, DType::F64);
    let sequence = |x: &Scan<Cpu>, index| Scan {
        q: x.q.clone().narrow(0, index, 1),
        k: x.k.clone().narrow(0, index, 1),
        v: x.v.clone().narrow(0, index, 1),
        log_decay: x.log_decay.clone().narrow(0, index, 1),
        weight: x.weight.clone().narrow(0, index, 1),
        diagonal: x.diagonal.clone().narrow(0, index, 1),
        state: x.state.clone().narrow(0, index, 1),
    };
    for index in 0..size.batch {
        let one = sequence(&whole, index);
        let (own, own_state) = one.clone().run(64, true);
        assert_close("outputs", y.clone().narrow(0, index, 1), own, BOUND);
        let of = |x: &Option<Tensor<Cpu, 4>>| x.clone().expect("a state").narrow(0, index, 1);
        assert_close("states", of(&state), own_state.expect("a state"), BOUND);
        let cot = cot.clone().narrow(0, index, 1).flatten::<1>(0, 3);
        let cot = Tensor::cat(vec![cot, of(&cot_state).flatten(0, 3)], 0);
        let (found, own) = (sequence(&grads, index), backward(one, 64, true, cot));
        assert_close("gradient of q", found.q, own.q, BOUND);
        assert_close("gradient of k", found.k, own.k, BOUND);
        assert_close("gradient of v", found.v, own.v, BOUND);
        assert_close("gradient of log_decay", found.log_decay, own.log_decay, BOUND);
        assert_close("gradient of weight", found.weight, own.weight, BOUND);
        assert_close("gradient of diagonal", found.diagonal, own.diagonal, BOUND);
        assert_close("gradient of state", found.state, own.state, BOUND);
    }
}

#[test]
fn a_state_carried_over_a_split_gives_the_whole() {
    for decays in ALL_DECAYS {
        let size = Size { time: 130, ..SMALL };
        let whole = size.scan(size.inputs(500, decays));
        let (expected, last) = whole.clone().run(64, true);
        for at in [1, 63, 64, 100, 129] {
            let (head, state) = slice(&whole, 0, at, whole.state.clone()).run(64, true);
            let (tail, state) = slice(&whole, at, 130, state.expect("a state")).run(64, true);
            let what = format!("{decays:?}, split at {at}");
            assert_close(&what, Tensor::cat(vec![head, tail], 1), expected.clone(), BOUND);
            assert_close(&what, state.expect("a state"), last.clone().expect("a state"), BOUND);
        }
        // One token at a time.
        let (mut state, mut steps) = (whole.state.clone(), Vec::new());
        for t in 0..130 {
            let (y, next) = slice(&whole, t, t + 1, state).run(64, true);
            state = next.expect("a state");
            steps.push(y);
        }
        assert_close("steps", Tensor::cat(steps, 1), expected, BOUND);
        assert_close("steps", state, last.expect("a state"), BOUND);
    }
}

#[test]
fn f32_is_near_f64() {
    // The worst is 3.5e-7. Differences of cumulative sums would lose 1e-3 beside a log decay of -1e4.
    for decays in ALL_DECAYS {
        for (time, chunk) in [(65, 64), (130, 32), (512, 64)] {
            let size = Size { time, head_size: 8, state_size: 16, ..SMALL };
            let inputs = size.inputs(600, decays);
            let cot = random(610, size.output(true));
            let what = format!("{decays:?}, {time} positions in chunks of {chunk}");
            assert_f32_near_f64(&what, &inputs, &cot, 1e-6, |x| Tape::scan(size.scan(x), chunk, true));
        }
    }
}

#[test]
fn outputs_have_the_values_type_and_gradients_that_of_their_inputs() {
    let size = Size { time: 70, ..SMALL };
    let mut inputs = size.inputs(700, Decays::Mixed);
    for x in &mut inputs[..3] {
        *x = x.clone().cast(DType::F32);
    }
    let wide = inputs.each_ref().map(|x| x.clone().cast(DType::F64));
    let (expected, expected_state) = size.scan(wide.clone()).run(16, true);
    let (y, state) = size.scan(inputs.clone()).run(16, true);
    let state = state.expect("a state");
    assert_eq!((y.dtype(), state.dtype()), (DType::F32, DType::F64));
    assert_close("outputs", y, expected, 1e-7);
    assert_close("state", state, expected_state.expect("a state"), BOUND);
    let (y, state) = size.scan(inputs.clone()).run(16, false);
    assert_eq!(y.dtype(), DType::F32);
    assert!(state.is_none());

    let loss = |x: [Tensor<Tape, 1>; 7]| {
        let shape = [size.batch, size.time, size.heads, size.head_size];
        let flat = Tape::scan(size.scan(x), 16, true);
        let (y, state) = split(flat, shape, size.state_size, DType::F64);
        Tensor::cat(vec![y.flatten(0, 3), state.expect("a state").flatten(0, 3)], 0)
    };
    let cot = random(710, size.output(true));
    let (_, found) = differentiate(&inputs, &cot, loss);
    let (_, expected) = differentiate(&wide, &cot, loss);
    for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert_eq!(found.dtype(), inputs[index].dtype(), "input {index}");
        assert_close(&format!("gradient of input {index}"), found, expected, 2e-7);
    }
}

#[test]
fn equal_runs_are_equal_bit_for_bit() {
    let size = Size { time: 200, head_size: 8, state_size: 8, ..SMALL };
    let inputs = size.inputs(800, Decays::Mixed).map(|x| x.cast(DType::F32));
    let cot = random(810, size.output(true)).cast(DType::F32);
    let run = || {
        let (y, grads) = differentiate(&inputs, &cot, |x| Tape::scan(size.scan(x), 64, true));
        (values(y), grads.map(values))
    };
    assert_eq!(run(), run());
}
