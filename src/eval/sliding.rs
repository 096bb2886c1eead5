//! Windows scored one by one, each from an empty state: full evaluation and the sliding window.

use super::ids_tensor;
use super::tally::{Tally, Text};
use super::windows::Window;
use crate::error::Result;
use crate::model::{Model, params};
use crate::ops::Plain;
use burn::tensor::Tensor;

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
    let mut batches = windows.chunks(pass.rows()).map(|batch| Batch::queue(model, text, batch, pass));
    let mut queued = batches.next();
    while let Some(Batch { windows, from, losses }) = queued {
        let count = losses.dims()[0];
        let losses = params::to_host("loss", &[count], losses)?.to_f64();
        progress(windows.len())?;
        // The device works on the next batch while this one is counted.
        queued = batches.next();
        for (window, losses) in windows.iter().zip(losses.chunks(count / windows.len())) {
            for position in window.from..window.to {
                tally.add(text, window.start + position, losses[position - from]);
            }
        }
    }
    Ok(())
}

/// Windows whose losses the device was asked for.
struct Batch<'a, P: Plain> {
    windows: &'a [Window],
    /// The first position whose loss there is; as many of each window.
    from: usize,
    losses: Tensor<P, 1>,
}

impl<'a, P: Plain> Batch<'a, P> {
    fn queue(model: &Model<P>, text: &Text, windows: &'a [Window], pass: &Pass) -> Self {
        let from = windows.iter().map(|window| window.from).min().unwrap_or(0);
        let to = windows.iter().map(|window| window.to).max().unwrap_or(0);
        let (scored, seq_len) = (to - from, pass.seq_len);
        let mut inputs = Vec::with_capacity(windows.len() * seq_len);
        let mut targets = Vec::with_capacity(windows.len() * scored);
        for Window { start, len, .. } in windows {
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
            let rows = hidden.reshape([windows.len(), seq_len, columns]).narrow(1, from, scored);
            hidden = rows.reshape([windows.len() * scored, columns]);
        }
        let losses = model.nll_at(hidden, ids_tensor::<P>(&targets, scored, device), pass.temperature);
        Self { windows, from, losses }
    }
}
