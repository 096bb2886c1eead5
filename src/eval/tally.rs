//! The sum that a score is made of.

use crate::data::byte_table::{ByteTable, bits_per_byte};
use std::time::Instant;

/// A score over validation tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Mean loss in nats per scored target.
    pub val_loss: f64,
    /// Bits per byte of text; NaN where the targets have no bytes.
    pub val_bpb: f64,
    /// Targets scored; one that is scored twice counts twice.
    pub tokens: u64,
    /// Bytes of those targets.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

/// Validation tokens and what their bytes are.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// The tokens: the target of position `p` is token `p + 1`.
    pub tokens: &'a [u16],
    /// The bytes of each.
    pub table: &'a ByteTable,
}

impl Text<'_> {
    /// Number of targets.
    pub fn targets(&self) -> usize {
        self.tokens.len().saturating_sub(1)
    }
}

/// Losses, targets and bytes so far.
///
/// Each loss is added in f64 in the order of the windows: the score does not depend on how they are batched.
#[derive(Debug, Clone)]
pub struct Tally {
    nll: f64,
    tokens: u64,
    bytes: u64,
    started: Instant,
    record: Option<Vec<(usize, f64)>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { nll: 0.0, tokens: 0, bytes: 0, started: Instant::now(), record: None }
    }
}

impl Tally {
    /// A tally that keeps every loss.
    pub fn recording() -> Self {
        Self { record: Some(Vec::new()), ..Self::default() }
    }

    /// Counts the loss of a target.
    pub fn add(&mut self, text: &Text, target: usize, loss: f64) {
        self.nll += loss;
        self.tokens += 1;
        self.bytes += u64::from(text.table.bytes_of(text.tokens[target], text.tokens[target + 1]));
        if let Some(record) = &mut self.record {
            record.push((target, loss));
        }
    }

    /// The targets and their losses in the order in which they were counted; nothing if they were not kept.
    pub fn record(&self) -> &[(usize, f64)] {
        self.record.as_deref().unwrap_or_default()
    }

    /// Whether every loss so far is a number.
    pub fn is_finite(&self) -> bool {
        self.nll.is_finite()
    }

    /// The score.
    pub fn score(&self) -> Score {
        Score {
            val_loss: self.nll / self.tokens as f64,
            val_bpb: bits_per_byte(self.nll, self.bytes),
            tokens: self.tokens,
            bytes: self.bytes,
            seconds: self.started.elapsed().as_secs_f64(),
        }
    }
}
