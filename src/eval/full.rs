//! The challenge's score: windows of the training length side by side (spec/challenge.md section 3).

use super::ids_tensor;
use crate::data::byte_table::{ByteTable, bits_per_byte};
use crate::data::stream::ValTokens;
use crate::error::Result;
use crate::model::{Model, params};
use crate::ops::Plain;
use std::time::Instant;

/// A score over validation tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Mean loss in nats per target.
    pub val_loss: f64,
    /// Bits per byte of text; NaN where the targets have no bytes.
    pub val_bpb: f64,
    /// Targets scored.
    pub tokens: u64,
    /// Bytes of those targets.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Scores every whole window of `val`, in batches of `batch_tokens` (at least one window).
///
/// `progress` is told (windows done, windows in all); an error that it returns stops the work.
pub fn score<P: Plain>(
    model: &Model<P>,
    val: &ValTokens,
    table: &ByteTable,
    batch_tokens: usize,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Score> {
    let started = Instant::now();
    let time = val.seq_len();
    let batch = (batch_tokens / time).max(1);
    let (mut nll, mut tokens, mut bytes) = (0.0, 0u64, 0u64);
    for start in (0..val.sequences()).step_by(batch) {
        let end = (start + batch).min(val.sequences());
        let (inputs, targets) = val.batch(start..end);
        let ids = ids_tensor::<P>(inputs, time, model.device());
        let losses = model.nll::<P>(ids, ids_tensor::<P>(targets, time, model.device()));
        // Each loss is added in f64, in the order of the tokens: the score does not depend on the size of the batches.
        nll = params::to_host("loss", &[targets.len()], losses)?
            .to_f64()
            .iter()
            .fold(nll, |sum, loss| sum + loss);
        tokens += targets.len() as u64;
        bytes += inputs.iter().zip(targets).map(|(x, y)| u64::from(table.bytes_of(*x, *y))).sum::<u64>();
        progress(end, val.sequences())?;
    }
    Ok(Score {
        val_loss: nll / tokens as f64,
        val_bpb: bits_per_byte(nll, bytes),
        tokens,
        bytes,
        seconds: started.elapsed().as_secs_f64(),
    })
}
