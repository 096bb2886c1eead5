//! How many bytes of text each token stands for, and bits-per-byte: spec/challenge.md section 3.

use super::tokenizer::{PieceKind, Tokenizer};
use crate::error::{Error, Result};

/// The challenge's three look-up tables, by token id.
///
/// A scored target counts its own bytes, and one more for the space it begins with unless the token before it
/// is a boundary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByteTable {
    /// UTF-8 bytes of the piece without a leading space; 1 for a byte piece; 0 for a boundary.
    pub base_bytes: Vec<u16>,
    /// The piece begins with a space (U+2581).
    pub has_leading_space: Vec<bool>,
    /// Control, unknown and unused pieces, and ids beyond the tokenizer's.
    pub is_boundary: Vec<bool>,
}

impl ByteTable {
    /// The tables of `tokenizer` for a model of `vocab_size` ids.
    ///
    /// Errors (input): `vocab_size` is smaller than the tokenizer's, or more than 65,536.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self> {
        let pieces = tokenizer.pieces();
        if !(pieces.len()..=1 << 16).contains(&vocab_size) {
            let expected = format!("{} (the tokenizer's) to 65536", pieces.len());
            return Err(Error::input(format!("vocabulary of {vocab_size} ids"), "vocab_size", expected));
        }
        let mut table = Self {
            base_bytes: vec![0; vocab_size],
            has_leading_space: vec![false; vocab_size],
            is_boundary: vec![true; vocab_size],
        };
        for (id, piece) in pieces.iter().enumerate() {
            let (bytes, leading) = match piece.kind {
                PieceKind::Control | PieceKind::Unknown | PieceKind::Unused => continue,
                PieceKind::Byte => (1, false),
                PieceKind::Normal | PieceKind::UserDefined => match piece.text.strip_prefix('\u{2581}') {
                    Some(rest) => (rest.len(), true),
                    None => (piece.text.len(), false),
                },
            };
            // A piece has at most 256 bytes.
            table.base_bytes[id] = bytes as u16;
            table.has_leading_space[id] = leading;
            table.is_boundary[id] = false;
        }
        Ok(table)
    }

    /// Bytes of `target` after `previous`; ids beyond the table are boundaries.
    pub fn bytes_of(&self, previous: u16, target: u16) -> u32 {
        let (previous, target) = (usize::from(previous), usize::from(target));
        let after_boundary = self.is_boundary.get(previous).copied().unwrap_or(true);
        let space = self.has_leading_space.get(target).copied().unwrap_or(false) && !after_boundary;
        u32::from(self.base_bytes.get(target).copied().unwrap_or(0)) + u32::from(space)
    }

    /// Bytes of all targets of a stream: tokens 1 to the end, each after the one before it.
    pub fn count(&self, tokens: &[u16]) -> u64 {
        tokens.windows(2).map(|pair| u64::from(self.bytes_of(pair[0], pair[1]))).sum()
    }
}

/// Bits per byte of text: `nll_sum_nats`, the summed negative log-likelihood of the scored targets in nats, over
/// ln 2 and their `bytes`.
///
/// This is the challenge's (val_loss / ln 2) * (N / bytes) with val_loss = sum / N. Without bytes there is no such
/// number: NaN, so that a report shows it as unknown and no comparison holds.
pub fn bits_per_byte(nll_sum_nats: f64, bytes: u64) -> f64 {
    if bytes == 0 { f64::NAN } else { nll_sum_nats / std::f64::consts::LN_2 / bytes as f64 }
}
