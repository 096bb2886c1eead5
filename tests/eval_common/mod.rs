//! What the tests of evaluation share: a text, and scores by the plainest means, one window at a time, f64 on the CPU.

#![allow(dead_code)]

use crate::common::round;
use crate::hybrids_common::{VOCAB, device, model, values};
use burn::tensor::{DType, Int, Tensor, TensorData};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target};
use fairway::data::byte_table::ByteTable;
use fairway::eval::method::Method;
use fairway::eval::sliding::Pass;
use fairway::eval::tally::Text;
use fairway::eval::windows::Window;
use fairway::host::HostTensor;
use fairway::model::{Cache, Model};
use fairway::ops::{Autodiff, Plain, rounded};
use fairway::recipe::Recipe;

/// Tokens that repeat themselves a little, so that there is something to learn.
pub fn tokens(count: usize) -> Vec<u16> {
    let mut state = 77u64;
    let mut draw = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let mut tokens: Vec<u16> = vec![1];
    while tokens.len() < count {
        let last = usize::from(tokens[tokens.len() - 1]);
        let next = if draw(3) > 0 { (last * 5 + 3) % VOCAB } else { draw(VOCAB) };
        tokens.push(next as u16);
    }
    tokens
}

/// Bytes of each kind: none, some, with a leading space, behind a boundary.
pub fn table() -> ByteTable {
    ByteTable {
        base_bytes: (0..VOCAB).map(|id| if id < 3 { 0 } else { (id % 4 + 1) as u16 }).collect(),
        has_leading_space: (0..VOCAB).map(|id| id > 2 && id % 3 == 0).collect(),
        is_boundary: (0..VOCAB).map(|id| id < 3).collect(),
    }
}

pub fn pass(seq_len: usize, rows: usize, temperature: f64) -> Pass {
    Pass { seq_len, batch_tokens: rows * seq_len, temperature }
}

/// The model of [`model`] on another device.
pub fn model_on<P: Plain>(recipe: &Recipe, device: &P::Device, dtype: DType) -> Model<P> {
    let there = Model::<P>::new(recipe, device, dtype).expect("a model");
    there.params().load(&model(recipe).params().to_host().unwrap(), "the test").unwrap();
    there
}

/// The model of [`model`] with its matrices rounded to bf16.
pub fn model_in_bf16(recipe: &Recipe) -> Model<Cpu> {
    let model = model(recipe);
    let rounded = |tensor: &HostTensor| match tensor.shape.len() {
        0 | 1 => tensor.clone(),
        _ => {
            let values: Vec<f64> = tensor.to_f64().iter().map(|x| round(*x, Precision::Bf16)).collect();
            HostTensor::from_f64(tensor.name.clone(), &tensor.shape, &values)
        }
    };
    let params: Vec<HostTensor> = model.params().to_host().unwrap().iter().map(rounded).collect();
    model.params().load(&params, "the test").unwrap();
    model
}

/// The most that a mean loss may be off in bf16: twice the root of the mean square of the errors that the reference itself
/// makes in single losses (DESIGN.md, parity rule), over windows of `seq_len` side by side.
pub fn bound_in_bf16(recipe: &Recipe, tokens: &[u16], seq_len: usize) -> f64 {
    let of = |model: &Model<Cpu>, rounds: bool| -> Vec<f64> {
        let windows = tokens[..tokens.len() - 1].chunks(seq_len).enumerate();
        let one = |(number, ids): (usize, &[u16])| {
            let from = number * seq_len + 1;
            let hidden = || model.hidden(Tensor::from_inner(row(ids)), None, None);
            let hidden: Tensor<Autodiff<Cpu>, 2> = if rounds { rounded(hidden) } else { hidden() };
            let logits = values(model.logits(hidden).inner());
            let targets = &tokens[from..from + ids.len()];
            logits.chunks(VOCAB).zip(targets).map(|(z, target)| loss(z, *target, 1.0)).collect::<Vec<_>>()
        };
        windows.flat_map(one).collect()
    };
    let (low, exact) = (of(&model_in_bf16(recipe), true), of(&model(recipe), false));
    let square: f64 = low.iter().zip(&exact).map(|(a, b)| (a - b) * (a - b)).sum();
    2.0 * (square / exact.len() as f64).sqrt()
}

/// One sequence on the CPU.
pub fn row(tokens: &[u16]) -> Tensor<Cpu, 2, Int> {
    let values: Vec<i64> = tokens.iter().map(|id| i64::from(*id)).collect();
    Tensor::from_data(TensorData::new(values, [1, tokens.len()]), &device())
}

/// The loss of `target` under `softmax(logits / temperature)`.
pub fn loss(logits: &[f64], target: u16, temperature: f64) -> f64 {
    let scaled: Vec<f64> = logits.iter().map(|z| z / temperature).collect();
    let largest = scaled.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
    let sum: f64 = scaled.iter().map(|z| (z - largest).exp()).sum();
    largest + sum.ln() - scaled[usize::from(target)]
}

/// The losses of every position of a window, going on from `cache`.
pub fn losses(
    model: &Model<Cpu>,
    tokens: &[u16],
    [start, end]: [usize; 2],
    temperature: f64,
    cache: &mut Cache<Cpu>,
) -> Vec<f64> {
    let hidden = model.hidden::<Cpu>(row(&tokens[start..end]), Some(cache), None);
    let logits = values(model.logits::<Cpu>(hidden));
    let rows = logits.chunks(VOCAB).zip(&tokens[start + 1..=end]);
    rows.map(|(logits, target)| loss(logits, *target, temperature)).collect()
}

/// The targets that a window scores and their losses: the window alone, its rotation that of `seq_len`.
pub fn score_window(
    model: &Model<Cpu>,
    tokens: &[u16],
    window: &Window,
    seq_len: usize,
    temperature: f64,
) -> Vec<(usize, f64)> {
    let mut cache = model.cache::<Cpu>(seq_len);
    let all = losses(model, tokens, [window.start, window.start + window.len], temperature, &mut cache);
    (window.from..window.to).map(|position| (window.start + position, all[position])).collect()
}

/// Mean loss, bits per byte and counts, by their definitions.
pub fn summed(text: &Text, scored: &[(usize, f64)]) -> (f64, f64, u64, u64) {
    let nll: f64 = scored.iter().map(|(_, loss)| loss).sum();
    let bytes = |target: &usize| {
        let (x, y) = (usize::from(text.tokens[*target]), usize::from(text.tokens[target + 1]));
        let space = text.table.has_leading_space[y] && !text.table.is_boundary[x];
        u64::from(text.table.base_bytes[y]) + u64::from(space)
    };
    let bytes: u64 = scored.iter().map(|(target, _)| bytes(target)).sum();
    let n = scored.len() as f64;
    (nll / n, nll / n / 2f64.ln() * (n / bytes as f64), scored.len() as u64, bytes)
}

/// A score, and the losses that it is to be of.
pub struct Scoring {
    pub name: String,
    pub recipe: Recipe,
    pub method: Method,
    pub expected: Vec<(usize, f64)>,
}

/// Scores of the same tokens on a device, twice to the same bits, against what the CPU has in f64.
pub struct ScoresAlike {
    pub tokens: Vec<u16>,
    pub cases: Vec<Scoring>,
    /// The most that a mean loss may be off in f64, and in f32: losses are some 3 nats each, through models of tiny width.
    pub bounds: [f64; 2],
    /// The same in bf16, where it is not [`bound_in_bf16`]'s: that knows nothing of models that train in between.
    pub in_bf16: Option<f64>,
}

impl Job for ScoresAlike {
    type Output = bool;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<bool> {
        let table = table();
        let text = Text { tokens: &self.tokens, table: &table };
        let mut good = true;
        for Scoring { name, recipe, method, expected } in &self.cases {
            let bound = match target.precision {
                Precision::F64 => self.bounds[0],
                Precision::F32 => self.bounds[1],
                Precision::Bf16 => {
                    self.in_bf16.unwrap_or_else(|| bound_in_bf16(recipe, &self.tokens, method.pass.seq_len))
                }
            };
            let score = || {
                let there = model_on::<P>(recipe, device, target.precision.dtype());
                method.score(&there, recipe, &text, &mut |_, _| Ok(()))
            };
            let (expected, first, again) = (summed(&text, expected), score()?, score()?);
            let off = (first.val_loss - expected.0).abs();
            println!("{} {}: {name} {off:.1e} of {bound:.1e}", target.label, target.precision);
            good &= off < bound && (first.tokens, first.bytes) == (expected.2, expected.3);
            good &= first.val_loss.to_bits() == again.val_loss.to_bits();
        }
        Ok(good)
    }
}

/// The largest difference between recorded losses and expected ones of the same targets in the same order.
pub fn apart(got: &[(usize, f64)], expected: &[(usize, f64)]) -> f64 {
    let targets = |scored: &[(usize, f64)]| scored.iter().map(|(target, _)| *target).collect::<Vec<_>>();
    assert_eq!(targets(got), targets(expected));
    got.iter().zip(expected).map(|((_, a), (_, b))| (a - b).abs()).fold(0.0, f64::max)
}

pub fn host(name: &str, values: &[f64]) -> HostTensor {
    HostTensor::from_f64(name, &[values.len()], values)
}
