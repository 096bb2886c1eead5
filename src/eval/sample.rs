//! Sampling: prefill once, then one token at a time from the cached state.

use super::ids_tensor;
use crate::error::{Error, Result};
use crate::model::{Model, init, params};
use crate::ops::Plain;
use burn::tensor::Tensor;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// How to sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Tokens to draw.
    pub tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Positions that the model sees at most (its training length).
    pub context: usize,
}

/// Continues `prompt` (token ids, at least one, with the BOS token first) and returns the new ids.
///
/// `on_token` is given each as it is drawn; an error that it returns stops the work. When the context is full, the
/// last half of it is read again as the start of a new one.
pub fn sample<P: Plain>(
    model: &Model<P>,
    prompt: &[u16],
    options: &Options,
    on_token: &mut dyn FnMut(u16) -> Result<()>,
) -> Result<Vec<u16>> {
    let vocab = model.vocab_size();
    if let Some(id) = prompt.iter().find(|id| usize::from(**id) >= vocab) {
        return Err(Error::input(format!("token id {id}"), "the prompt", format!("ids below {vocab}")));
    }
    if prompt.is_empty() {
        return Err(Error::input("nothing to continue", "the prompt", "at least one token"));
    }
    if !(options.temperature.is_finite() && options.temperature >= 0.0) {
        let what = format!("temperature {}", options.temperature);
        return Err(Error::input(what, "--temperature", "at least 0"));
    }
    let context = options.context.max(2);
    let tail = |seen: &[u16], len: usize| seen[seen.len().saturating_sub(len)..].to_vec();
    let mut rng = init::generator(options.seed, "sample");
    let mut seen = prompt.to_vec();
    let mut cache = model.cache::<P>(context);
    let mut logits = read(model, &tail(&seen, context), &mut cache)?;
    for left in (0..options.tokens).rev() {
        let id = draw(&logits, options.temperature, &mut rng);
        seen.push(id);
        on_token(id)?;
        if left == 0 {
            break;
        }
        logits = if cache.positions() < context {
            read(model, &[id], &mut cache)?
        } else {
            cache = model.cache::<P>(context);
            read(model, &tail(&seen, context / 2), &mut cache)?
        };
    }
    Ok(seen.split_off(prompt.len()))
}

/// Feeds `ids` to the model and returns the logits after the last of them.
fn read<P: Plain>(model: &Model<P>, ids: &[u16], cache: &mut crate::model::Cache<P>) -> Result<Vec<f64>> {
    let tensor = ids_tensor::<P>(ids, ids.len(), model.device());
    let hidden: Tensor<P, 2> = model.hidden(tensor, Some(cache), None);
    let last = hidden.narrow(0, ids.len() - 1, 1);
    let logits = model.logits::<P>(last);
    let vocab = logits.dims()[1];
    Ok(params::to_host("logits", &[vocab], logits.reshape([vocab]))?.to_f64())
}

/// One id from `softmax(logits / temperature)`, or the likeliest at temperature 0 (the first of equals).
pub(crate) fn draw(logits: &[f64], temperature: f64, rng: &mut ChaCha8Rng) -> u16 {
    let best = (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
    if temperature == 0.0 {
        return best as u16;
    }
    let weights: Vec<f64> = logits.iter().map(|z| ((z - logits[best]) / temperature).exp()).collect();
    let mut rest = rng.random::<f64>() * weights.iter().sum::<f64>();
    for (id, weight) in weights.iter().enumerate() {
        rest -= weight;
        if rest < 0.0 {
            return id as u16;
        }
    }
    best as u16
}
