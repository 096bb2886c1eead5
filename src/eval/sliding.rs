//! Windows scored one by one, each from an empty state: full evaluation and the sliding window.

use super::ids_tensor;
use super::tally::{Tally, Text};
use super::windows::Window;
use crate::error::Result;
use crate::model::{Model, params};
use crate::ops::Plain;

/// How windows are put through the model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass {
    /// Positions of a window. Shorter ones are filled up behind their end, which changes nothing before it, but for a
    /// rotation that depends on the length: that is the full length's, as the PRs have it.
    pub seq_len: usize,
    /// Positions of one forward at most (at least one window): a limit on memory, without an effect on the score.
    pub batch_tokens: usize,
    /// Divides the logits.
    pub temperature: f64,
}

impl Pass {
    /// Sequences of one forward.
    pub fn rows(&self) -> usize {
        (self.batch_tokens / self.seq_len.max(1)).max(1)
    }
}

/// What is told of the work (windows done so far); an error that it returns stops it.
pub type Progress<'a> = &'a mut dyn FnMut(usize) -> Result<()>;

/// Scores the windows in batches into `tally`. Only the positions that some window of the batch scores reach the head.
pub fn score<P: Plain>(
    model: &Model<P>,
    text: &Text,
    windows: &[Window],
    pass: &Pass,
    tally: &mut Tally,
    progress: Progress<'_>,
) -> Result<()> {
    for batch in windows.chunks(pass.rows()) {
        let from = batch.iter().map(|window| window.from).min().unwrap_or(0);
        let to = batch.iter().map(|window| window.to).max().unwrap_or(0);
        let (scored, seq_len) = (to - from, pass.seq_len);
        let mut inputs = Vec::with_capacity(batch.len() * seq_len);
        let mut targets = Vec::with_capacity(batch.len() * scored);
        for Window { start, len, .. } in batch {
            let seen = &text.tokens[*start..start + len + 1];
            let target = |position: usize| seen.get(position + 1).copied().unwrap_or(0);
            inputs.extend_from_slice(&seen[..*len]);
            inputs.resize(inputs.len() + seq_len - len, 0);
            targets.extend((from..to).map(target));
        }
        let device = model.device();
        let mut hidden = model.hidden::<P>(ids_tensor::<P>(&inputs, seq_len, device), None, None);
        if scored < seq_len {
            let columns = hidden.dims()[1];
            let rows = hidden.reshape([batch.len(), seq_len, columns]).narrow(1, from, scored);
            hidden = rows.reshape([batch.len() * scored, columns]);
        }
        let losses = model.nll_at(hidden, ids_tensor::<P>(&targets, scored, device), pass.temperature);
        let losses = params::to_host("loss", &[targets.len()], losses)?.to_f64();
        for (window, losses) in batch.iter().zip(losses.chunks(scored)) {
            for position in window.from..window.to {
                tally.add(text, window.start + position, losses[position - from]);
            }
        }
        progress(batch.len())?;
    }
    Ok(())
}
