//! The challenge's score: windows of the training length side by side (spec/challenge.md section 3).

use super::sliding::{self, Pass};
pub use super::tally::Score;
use super::tally::{Tally, Text};
use super::windows::Windows;
use crate::data::byte_table::ByteTable;
use crate::data::stream::ValTokens;
use crate::error::Result;
use crate::model::Model;
use crate::ops::Plain;

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
    let text = Text { tokens: val.tokens(), table };
    let seq_len = val.seq_len();
    let windows = Windows::EachOnce.list(text.targets(), seq_len, seq_len)?;
    let pass = Pass { seq_len, batch_tokens, temperature: 1.0 };
    let mut tally = Tally::default();
    let mut done = 0;
    sliding::score(model, &text, &windows, &pass, &mut tally, &mut |count| {
        done += count;
        progress(done, windows.len())
    })?;
    Ok(tally.score())
}
