//! What a run is asked for, and what it tells.

use super::log::Echo;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::recipe::Recipe;
use serde::Serializer;
use std::path::{Path, PathBuf};

/// What to train, on what, and where to leave it.
pub struct Options {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The folder of shards.
    pub data: PathBuf,
    /// The shards' tokenizer.
    pub tokenizer: Tokenizer,
    /// How the tokenizer was named (`byte`, or a path), for the log.
    pub tokenizer_name: String,
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from the newest checkpoint in this folder.
    pub resume: Option<PathBuf>,
    /// Tokens of one forward and backward at most; the whole span if absent.
    pub micro_batch: Option<usize>,
    /// Steps between checkpoints; 0 saves only at the end and when interrupted.
    pub save_every: usize,
    /// Where the log's lines are shown.
    pub echo: Echo,
    /// Where warnings are shown, a line each; they are in the log too.
    pub warn: Echo,
}

impl Options {
    /// Sequences of one forward and backward.
    pub(super) fn micro_sequences(&self) -> Result<usize> {
        let (span, time) = (self.recipe.span_tokens(), self.recipe.train_seq_len);
        let tokens = self.micro_batch.unwrap_or(span);
        if tokens < time {
            return Err(Error::input(
                format!("micro-batch of {tokens} tokens"),
                "--micro-batch",
                format!("at least one sequence of train_seq_len={time} tokens"),
            ));
        }
        Ok(tokens.min(span) / time)
    }
}

/// How far a run is, for a progress bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Status {
    /// Completed steps.
    pub step: usize,
    /// Steps of the run (if no wallclock cap ends it sooner).
    pub iterations: usize,
    /// Loss of the last step in nats.
    pub train_loss: f64,
    /// The last validation's bits per byte; NaN before the first.
    pub val_bpb: f64,
    /// Training tokens per second.
    pub tokens_per_s: f64,
    /// Estimated seconds to the end.
    pub left_s: f64,
    /// How much of the run is done, 0 to 1.
    pub fraction: f64,
}

/// What a run reached.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Completed optimizer steps.
    pub steps: usize,
    /// Mean loss of the last step in nats.
    pub train_loss: Option<f64>,
    /// Validation loss in nats per token at the end.
    pub val_loss: f64,
    /// Validation bits per byte at the end.
    pub val_bpb: f64,
    /// Training tokens per second, validation left out.
    pub tokens_per_s: Option<f64>,
    /// Mean time of a step in milliseconds.
    pub step_ms: Option<f64>,
    /// Seconds from the start of the run to its first finished step.
    pub first_step_s: Option<f64>,
    /// Most device memory held, in bytes: on a GPU the pools, which grow to the peak of use.
    pub peak_memory_bytes: Option<u64>,
    /// The run's folder.
    #[serde(serialize_with = "lossy")]
    pub out: PathBuf,
}

/// A path as text: a name that is not UTF-8 is no reason to lose a report.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
