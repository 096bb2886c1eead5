//! A whole training step of a recipe on random tokens.

use super::{Row, median_ms};
use crate::error::Result;
use crate::model::{Model, init};
use crate::ops::Plain;
use crate::optim::schedule;
use crate::recipe::Recipe;
use crate::train::step::{Span, Trainer};
use burn::tensor::DType;
use rand::Rng;

/// Times one optimizer step, and its forward and backward alone, in micro-batches of at most `micro_batch` tokens.
pub fn run<P: Plain>(
    recipe: &Recipe,
    micro_batch: usize,
    device: &P::Device,
    dtype: DType,
) -> Result<Vec<Row>> {
    let model = Model::<P>::new(recipe, device, dtype)?;
    let seq_len = recipe.train_seq_len;
    let micro_sequences = (micro_batch.min(recipe.span_tokens()) / seq_len).max(1);
    let mut trainer = Trainer::new(model, recipe, micro_sequences);
    let mut rng = init::generator(recipe.seed, "bench");
    let mut tokens = |n: usize| -> Vec<u16> {
        (0..n).map(|_| rng.random_range(0..recipe.vocab_size as u32) as u16).collect()
    };
    let spans: Vec<Span> = (0..recipe.grad_accum_steps)
        .map(|_| (tokens(recipe.span_tokens()), tokens(recipe.span_tokens())))
        .collect();
    // 6 operations a weight and token; attention 6 x layers x time x width a token (causal, forward and backward).
    let per_token = 6.0 * trainer.model.params().numel() as f64
        + (6 * recipe.num_layers * recipe.train_seq_len * recipe.model_dim) as f64;
    let operations = per_token * recipe.train_batch_tokens as f64;
    let name = format!("{}, {} tokens", recipe.name, recipe.train_batch_tokens);
    let row = |what: String, ms: f64| Row {
        what,
        ms,
        floor_ms: None,
        tflops: Some(operations / ms / 1e9),
        gbps: None,
    };
    let accumulate = median_ms::<P>(device, || {
        trainer.model.params().clear_grads();
        trainer.accumulate(&spans).map(drop)
    })?;
    let momentum = schedule::muon_momentum(recipe, 0);
    let step = median_ms::<P>(device, || trainer.step(&spans, 1.0, momentum, 1).map(drop))?;
    Ok(vec![row(format!("forward and backward of {name}"), accumulate), row(format!("step of {name}"), step)])
}
