//! Text that a model writes itself: many sequences side by side, one token at a time from the cached state.
//!
//! The PRs compute the whole sequence again for every token (966.8 s for PR #1607's 32 sequences of 4,096 tokens). Each
//! sequence has draws of its own, so that it does not depend on how many are written.

use super::{Phase, Progress, Sequences};
use crate::error::{Error, Result};
use crate::eval::sample::draw;
use crate::model::ids_tensor;
use crate::model::{Model, init, params};
use crate::ops::Plain;
use crate::recipe::{PR1382, PR1607, Recipe};
use rand::Rng;

/// Sequences that are written side by side: enough to share a step's reading of the weights, few enough for the keys and
/// values that attention keeps of them (0.6 GB for the baseline in f32).
const ABREAST: usize = 32;

/// What the model is to write.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generation {
    /// Sequences.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Generation {
    /// As the recipe's system has it: 32 sequences (PR #1382: 64) of the training length at temperature 0.8, drawn by the
    /// recipe's seed (as PR #1607 is written: by 1337, whatever the recipe's).
    pub fn of(recipe: &Recipe) -> Self {
        let is_1607_as_written = recipe.as_written && recipe.system == PR1607;
        Self {
            sequences: if recipe.system == PR1382 { 64 } else { 32 },
            length: recipe.train_seq_len.max(2),
            temperature: 0.8,
            seed: if is_1607_as_written { 1337 } else { recipe.seed },
        }
    }
}

/// Sequences whose first token is drawn evenly of all ids, and every further one from what the model says of those before it.
///
/// # Errors
/// Input: no sequence, fewer than two tokens, a temperature below 0; and errors of `progress`.
pub fn generate<P: Plain>(model: &Model<P>, how: &Generation, progress: Progress<'_>) -> Result<Sequences> {
    let &Generation { sequences, length, temperature, seed } = how;
    let is_whole = sequences > 0 && length > 1 && temperature.is_finite() && temperature >= 0.0;
    let Some(total) = sequences.checked_mul(length).filter(|_| is_whole) else {
        return Err(Error::input(
            format!("{sequences} sequences of {length} tokens at temperature {temperature}"),
            "the calibration",
            "a sequence, two tokens each and a temperature of at least 0",
        ));
    };
    let vocab = model.vocab_size();
    let mut tokens = vec![0u16; total];
    for (part, written) in tokens.chunks_mut(ABREAST * length).enumerate() {
        let rows = written.len() / length;
        let generator = |row: usize| init::generator(seed, &format!("calibration {}", part * ABREAST + row));
        let mut generators: Vec<_> = (0..rows).map(generator).collect();
        let mut last: Vec<u16> =
            generators.iter_mut().map(|draws| draws.random_range(0..vocab) as u16).collect();
        // The last token is no input.
        let mut cache = model.cache::<P>(length - 1);
        for position in 0..length {
            written.iter_mut().skip(position).step_by(length).zip(&last).for_each(|(token, id)| *token = *id);
            progress(Phase::Write, part * ABREAST * length + (position + 1) * rows, total)?;
            if position + 1 == length {
                break;
            }
            let ids = ids_tensor::<P>(&last, 1, model.device());
            let logits = model.logits::<P>(model.hidden::<P>(ids, Some(&mut cache), None));
            let columns = logits.dims()[1];
            let logits =
                params::to_host("logits", &[rows, columns], logits.reshape([rows * columns]))?.to_f64();
            let rows = logits.chunks(columns).zip(&mut generators);
            last = rows.map(|(logits, draws)| draw(logits, temperature, draws)).collect();
        }
    }
    Ok(Sequences { tokens, length })
}
