//! What `fairway export` says of the losses: those of the tensors, and of the whole model in bits per byte.

use super::source::Source;
use super::{eval, output};
use crate::backend::Target;
use crate::data::stream::ValTokens;
use crate::error::Result;
use crate::eval::tally::Score;
use crate::quant::TensorLoss;
use std::path::Path;

/// The first validation tokens, so many at most (a sequence at least), that both models are scored on. Their losses differ by far
/// less than either varies from text to text, so that few are enough, also on a CPU.
const TOKENS: usize = 65_536;

/// Tensors of the short table.
const SHORT: usize = 8;

/// Prints the tensors' losses: of those that lose the most, or of all in the model's order.
pub fn print(losses: &[TensorLoss], all: bool) {
    let mut shown: Vec<&TensorLoss> = losses.iter().collect();
    if !all {
        shown.retain(|loss| loss.mean_squared > 0.0);
        shown.sort_by(|a, b| size(b).total_cmp(&size(a)));
        shown.truncate(SHORT);
        output::line(format!("the largest losses ({} of {} tensors):", shown.len(), losses.len()));
    }
    let percent = |share: f64| format!("{:.3}%", 100.0 * share);
    let cells = |loss: &&TensorLoss| {
        vec![
            loss.name.clone(),
            loss.storage.to_string(),
            format!("{:.3e}", loss.mean_squared),
            percent(loss.relative),
            loss.relative_output.map_or("-".into(), percent),
        ]
    };
    let rows: Vec<_> = shown.iter().map(cells).collect();
    output::table(&["tensor", "form", "mean squared", "of weight", "of output"], &rows);
}

/// By what the tensors are compared.
fn size(loss: &TensorLoss) -> f64 {
    loss.relative_output.unwrap_or(loss.relative)
}

/// The scores of the live model and of the artifact that was written.
#[derive(Debug, serde::Serialize)]
pub struct Scores {
    live: f64,
    /// Of the artifact that was written.
    pub artifact: f64,
    /// What the artifact has more.
    loss: f64,
    tokens: u64,
}

/// The text that both are scored on.
pub fn text(source: &Source, data: &Path) -> Result<ValTokens> {
    Ok(eval::val_tokens(&source.contents, data)?.limit(TOKENS))
}

/// Scores one model.
pub fn score(source: &Source, text: &ValTokens, target: &Target) -> Result<Score> {
    let batch = source.contents.recipe.val_batch_tokens().min(TOKENS);
    eval::score(source, text, batch, target)
}

/// Scores both, the artifact as its file has it.
pub fn scores(source: &Source, file: &Path, text: &ValTokens, target: &Target) -> Result<Scores> {
    let live = score(source, text, target)?;
    let artifact = score(&Source::load(file)?, text, target)?;
    Ok(Scores {
        live: live.val_bpb,
        artifact: artifact.val_bpb,
        loss: artifact.val_bpb - live.val_bpb,
        tokens: live.tokens,
    })
}

impl Scores {
    /// For people.
    pub fn print(&self) {
        let Self { live, artifact, loss, tokens } = self;
        output::line(format!(
            "val_bpb: live {live:.5}, artifact {artifact:.5}, loss {loss:+.5} (the first {tokens} validation tokens)"
        ));
    }
}
