//! The tokens that calibration is given.

use crate::data::folder::{DataFolder, Split};
use crate::data::shard::Shard;
use crate::data::stream::TokenStream;
use crate::error::{Error, Result};

/// Sequences of one length, one behind the other. All tokens of each but its last are inputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    /// Token ids.
    pub tokens: Vec<u16>,
    /// Tokens of a sequence.
    pub length: usize,
}

impl Sequences {
    /// Number of sequences.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.length.max(1)
    }

    /// Each sequence.
    pub fn iter(&self) -> impl Iterator<Item = &[u16]> {
        self.tokens.chunks_exact(self.length.max(1))
    }

    /// As many sequences of training data, or as many as there are: spread evenly over the first shards that hold enough.
    ///
    /// # Errors
    /// Input: no training shards or too few tokens for one sequence, ids that reach `vocab`.
    pub fn of_data(folder: &DataFolder, vocab: usize, count: usize, length: usize) -> Result<Self> {
        // A sequence has an input and a target at least.
        let (count, length) = (count.max(1), length.max(2));
        let place = folder.dir().display();
        let shards = folder.shards(Split::Train);
        if shards.is_empty() {
            return Err(Error::input("no train shards", place, "fineweb_train_*.bin"));
        }
        let wanted = count as u64 * length as u64;
        let (mut held, mut used) = (0, 0);
        for shard in shards {
            held += Shard::open(shard)?.tokens().len() as u64;
            used += 1;
            if held >= wanted {
                break;
            }
        }
        let fitting = held / length as u64;
        if fitting == 0 {
            let what = format!("{held} training tokens");
            return Err(Error::input(what, place, format!("at least one sequence of {length} tokens")));
        }
        let count = (count as u64).min(fitting);
        // The first of every so many spans.
        let apart = usize::try_from(fitting / count).unwrap_or(usize::MAX);
        let mut stream = TokenStream::open(&shards[..used], vocab)?;
        let mut tokens = Vec::with_capacity(count as usize * length);
        for _ in 0..count {
            // A batch of n inputs is n + 1 tokens of the stream.
            let (inputs, targets) = stream.next_batch(length - 1, 0, apart)?;
            tokens.extend(inputs);
            tokens.extend(targets.last());
        }
        Ok(Self { tokens, length })
    }
}
