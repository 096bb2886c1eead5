//! A whole training step of a recipe on random tokens.

use super::{Row, median_ms};
use crate::error::Result;
use crate::eval;
use crate::model::{Model, init};
use crate::ops::Plain;
use crate::optim::schedule;
use crate::optim::step::{Span, Trainer};
use crate::recipe::Recipe;
use burn::tensor::DType;
use rand::Rng;
use serde::Serialize;

/// A model in training and the spans of one step.
pub(super) struct Bench<P: Plain> {
    trainer: Trainer<P>,
    spans: Vec<Span>,
    momentum: f64,
}

impl<P: Plain> Bench<P> {
    /// The recipe's, in micro-batches of at most `micro_batch` tokens.
    pub(super) fn new(recipe: &Recipe, micro_batch: usize, device: &P::Device, dtype: DType) -> Result<Self> {
        let model = Model::<P>::new(recipe, device, dtype)?;
        let seq_len = recipe.train_seq_len;
        let micro_sequences = (micro_batch.min(recipe.span_tokens()) / seq_len).max(1);
        let trainer = Trainer::new(model, recipe, micro_sequences);
        let mut rng = init::generator(recipe.seed, "bench");
        let mut tokens = |n: usize| -> Vec<u16> {
            (0..n).map(|_| rng.random_range(0..recipe.vocab_size as u32) as u16).collect()
        };
        let spans = (0..recipe.grad_accum_steps)
            .map(|_| (tokens(recipe.span_tokens()), tokens(recipe.span_tokens())))
            .collect();
        Ok(Self { trainer, spans, momentum: schedule::muon_momentum(recipe, 0) })
    }

    /// Forwards and backwards of a step.
    fn micro_batches(&self) -> usize {
        let micro_batch = self.trainer.micro_sequences * self.trainer.seq_len;
        self.spans.iter().map(|(inputs, _)| inputs.len().div_ceil(micro_batch)).sum()
    }

    /// The gradients of one step.
    fn accumulate(&self) -> Result<()> {
        self.trainer.model.params().clear_grads();
        self.trainer.accumulate(&self.spans).map(drop)
    }

    /// One optimizer step.
    pub(super) fn step(&mut self) -> Result<()> {
        self.trainer.step(&self.spans, 1.0, self.momentum, 1).map(drop)
    }
}

/// The timings of a step and the device memory held for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The timings.
    pub rows: Vec<Row>,
    /// Bytes held from the device after the first step, the second (the first with optimizer state to replace) and all
    /// of them, where it can be told: equal, unless later ones asked for more.
    pub held: Option<[u64; 3]>,
}

/// Times one optimizer step, and its forward and backward alone, in micro-batches of at most `micro_batch` tokens; and
/// the same step over one sequence a micro-batch, which the host's queueing bounds. `held` tells the bytes held.
pub fn run<P: Plain>(
    recipe: &Recipe,
    micro_batch: usize,
    device: &P::Device,
    dtype: DType,
    held: &dyn Fn() -> Option<u64>,
) -> Result<Report> {
    let mut bench = Bench::<P>::new(recipe, micro_batch, device, dtype)?;
    let mut after_a_step = || {
        bench.step()?;
        eval::wait::<P>(device)?;
        Ok(held())
    };
    let (first, second) = (after_a_step()?, after_a_step()?);
    // 6 operations a weight and token; attention 6 x layers x time x width a token (causal, forward and backward).
    let per_token = 6.0 * bench.trainer.model.params().numel() as f64
        + (6 * recipe.num_layers * recipe.train_seq_len * recipe.model_dim) as f64;
    let row = |what: String, ms: f64, tokens: usize| {
        let tflops = Some(per_token * tokens as f64 / ms / 1e9);
        Row { what, ms, floor_ms: None, tflops, gbps: None }
    };
    let tokens = recipe.train_batch_tokens;
    let name = format!("{}, {tokens} tokens", recipe.name);
    let accumulate = median_ms::<P>(device, || bench.accumulate())?;
    let step = median_ms::<P>(device, || bench.step())?;
    let last = held();
    let mut rows = vec![
        row(format!("forward and backward of {name}"), accumulate, tokens),
        row(format!("step of {name}"), step, tokens),
    ];
    let mut short = recipe.clone();
    let micro_batches = bench.micro_batches();
    short.train_batch_tokens = micro_batches * recipe.train_seq_len;
    short.grad_accum_steps = micro_batches;
    if short.train_batch_tokens < tokens {
        let mut bench = Bench::<P>::new(&short, recipe.train_seq_len, device, dtype)?;
        let ms = median_ms::<P>(device, || bench.step())?;
        let what = format!("step of {}, {} tokens (host)", recipe.name, short.train_batch_tokens);
        rows.push(row(what, ms, short.train_batch_tokens));
    }
    Ok(Report {
        rows,
        held: first.zip(second).zip(last).map(|((first, second), last)| [first, second, last]),
    })
}
