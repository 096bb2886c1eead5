//! The training stream and the validation tokens (`spec/challenge.md` sections 2 and 3).

use super::folder::check_shards;
use super::shard::Shard;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::PathBuf;

/// A place in the training stream: the next token is number `offset` of shard `shard`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPosition {
    /// Index of the shard in the sorted list.
    pub shard: usize,
    /// Token in that shard, below its number of tokens.
    pub offset: u64,
}

/// The training tokens: all shards in the order of their names, one behind the other, for ever from the start
/// again. Nothing is shuffled.
///
/// Headers and sizes of all shards are checked when the stream is opened, the ids of a shard when it is reached.
#[derive(Debug)]
pub struct TokenStream {
    paths: Vec<PathBuf>,
    /// Tokens of each shard.
    counts: Vec<u64>,
    total: u64,
    vocab: usize,
    position: StreamPosition,
    current: Option<(usize, Shard)>,
}

impl TokenStream {
    /// A stream over `paths`, already sorted, at its first token; ids must be below `vocab`.
    pub fn open(paths: &[PathBuf], vocab: usize) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::input("no train shards", "the training stream", "fineweb_train_*.bin"));
        }
        let counts = check_shards(paths)?;
        let total = counts.iter().sum();
        let position = StreamPosition { shard: 0, offset: 0 };
        Ok(Self { paths: paths.to_vec(), counts, total, vocab, position, current: None })
    }

    /// Number of shards.
    pub fn shards(&self) -> usize {
        self.paths.len()
    }

    /// Tokens of all shards: after so many the stream is back at its start.
    pub fn tokens(&self) -> u64 {
        self.total
    }

    /// Where the next token is read.
    pub fn position(&self) -> StreamPosition {
        self.position
    }

    /// Continues at a position that [`position`](Self::position) gave for the same shards.
    pub fn seek(&mut self, position: StreamPosition) -> Result<()> {
        match self.counts.get(position.shard) {
            Some(count) if position.offset < *count => {
                self.position = position;
                Ok(())
            }
            _ => Err(Error::input(
                format!("stream position {} of shard {} does not exist", position.offset, position.shard),
                self.paths[position.shard.min(self.paths.len() - 1)].display(),
                "the shards that the position was saved with",
            )),
        }
    }

    /// One rank's tokens of the next batch: inputs `x` and targets `y`, `local_tokens` each, `y` being one further
    /// in the stream.
    ///
    /// Each call moves the stream by `(local_tokens + 1) * world` tokens, of which rank `rank` has the span of that
    /// number; x is the span without its last token, y without its first. An error leaves the position as it was.
    pub fn next_batch(
        &mut self,
        local_tokens: usize,
        rank: usize,
        world: usize,
    ) -> Result<(Vec<u16>, Vec<u16>)> {
        if local_tokens == 0 || rank >= world {
            let what = format!("batch of {local_tokens} tokens for rank {rank} of {world}");
            return Err(Error::input(what, "the training stream", "at least 1 token, rank below world size"));
        }
        let span = local_tokens as u64 + 1;
        let start = self.position;
        let result = (|| {
            self.skip(u128::from(span) * rank as u128);
            let mut x = self.take(span)?;
            self.skip(u128::from(span) * (world - 1 - rank) as u128);
            let y = x[1..].to_vec();
            x.truncate(local_tokens);
            Ok((x, y))
        })();
        if result.is_err() {
            self.position = start;
        }
        result
    }

    /// Moves on by `count` tokens without reading them.
    fn skip(&mut self, count: u128) {
        // Whole rounds lead back to the same place.
        let mut left = (count % u128::from(self.total)) as u64;
        while left > 0 {
            let step = left.min(self.counts[self.position.shard] - self.position.offset);
            self.advance(step);
            left -= step;
        }
    }

    /// Moves on by at most the rest of the current shard.
    fn advance(&mut self, step: u64) {
        self.position.offset += step;
        if self.position.offset == self.counts[self.position.shard] {
            self.position = StreamPosition { shard: (self.position.shard + 1) % self.paths.len(), offset: 0 };
        }
    }

    /// Reads `count` tokens, over as many shards and rounds as it takes.
    fn take(&mut self, count: u64) -> Result<Vec<u16>> {
        let mut out = Vec::new();
        let size = usize::try_from(count).unwrap_or(usize::MAX);
        if out.try_reserve_exact(size).is_err() {
            return Err(Error::failed(
                format!("no memory for a batch of {count} tokens"),
                "the training stream",
                "fewer tokens a batch",
            ));
        }
        while out.len() < size {
            let offset = self.position.offset as usize;
            let tokens = self.current_shard()?.tokens();
            let step = (tokens.len() - offset).min(size - out.len());
            out.extend_from_slice(&tokens[offset..offset + step]);
            self.advance(step as u64);
        }
        Ok(out)
    }

    /// The shard of the current position, its ids checked.
    fn current_shard(&mut self) -> Result<&Shard> {
        let index = self.position.shard;
        if !matches!(&self.current, Some((open, _)) if *open == index) {
            self.current = None;
            let shard = Shard::open(&self.paths[index])?;
            if shard.tokens().len() as u64 != self.counts[index] {
                return Err(Error::input(
                    format!("shard of {} tokens was replaced", shard.tokens().len()),
                    self.paths[index].display(),
                    format!("{} tokens, as when the stream was opened", self.counts[index]),
                ));
            }
            shard.check_vocab(self.vocab)?;
            self.current = Some((index, shard));
        }
        match &self.current {
            Some((_, shard)) => Ok(shard),
            None => Err(Error::failed("no shard is open", self.paths[index].display(), "an open shard")),
        }
    }
}

/// The validation tokens, cut to whole sequences: floor((n - 1) / seq_len) * seq_len + 1 of the n tokens of all
/// validation shards in the order of their names.
#[derive(Debug)]
pub struct ValTokens {
    tokens: Source,
    seq_len: usize,
    sequences: usize,
}

/// One shard is used where it lies; several are joined.
#[derive(Debug)]
enum Source {
    Mapped(Shard),
    Joined(Vec<u16>),
}

impl ValTokens {
    /// The tokens of `paths`, already sorted, for sequences of `seq_len`; ids must be below `vocab`. Fewer than
    /// `seq_len + 1` tokens are an error.
    pub fn open(paths: &[PathBuf], seq_len: usize, vocab: usize) -> Result<Self> {
        let [first, more @ ..] = paths else {
            return Err(Error::input("no val shards", "the validation tokens", "fineweb_val_*.bin"));
        };
        if seq_len == 0 {
            return Err(Error::input("sequence length 0", "the validation tokens", "at least 1"));
        }
        let shard = Shard::open(first)?;
        shard.check_vocab(vocab)?;
        let tokens = if more.is_empty() {
            Source::Mapped(shard)
        } else {
            // As long as the files on disk, which were checked to hold it.
            let mut joined = shard.tokens().to_vec();
            for path in more {
                let shard = Shard::open(path)?;
                shard.check_vocab(vocab)?;
                joined.extend_from_slice(shard.tokens());
            }
            Source::Joined(joined)
        };
        let mut val = Self { tokens, seq_len, sequences: 0 };
        let count = val.all().len();
        val.sequences = (count - 1) / seq_len;
        if val.sequences == 0 {
            return Err(Error::input(
                format!("validation split of {count} tokens"),
                first.display(),
                format!("at least {} for one sequence of {seq_len}", seq_len as u128 + 1),
            ));
        }
        Ok(val)
    }

    fn all(&self) -> &[u16] {
        match &self.tokens {
            Source::Mapped(shard) => shard.tokens(),
            Source::Joined(tokens) => tokens,
        }
    }

    /// The usable tokens: [`sequences`](Self::sequences) * seq_len + 1 of them.
    pub fn tokens(&self) -> &[u16] {
        &self.all()[..self.sequences * self.seq_len + 1]
    }

    /// Leaves the first sequences, of at most `tokens` targets but at least one; 0 leaves all.
    pub fn limit(mut self, tokens: usize) -> Self {
        if tokens > 0 {
            self.sequences = self.sequences.min((tokens / self.seq_len).max(1));
        }
        self
    }

    /// Tokens of a sequence.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Number of whole sequences; targets are `sequences * seq_len`.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// The sequences that rank `rank` of `world` scores: `[total * rank / world, total * (rank + 1) / world)`.
    pub fn partition(&self, rank: usize, world: usize) -> Range<usize> {
        let bound = |rank: usize| (self.sequences as u128 * rank as u128 / world.max(1) as u128) as usize;
        bound(rank).min(self.sequences)..bound(rank + 1).min(self.sequences)
    }

    /// Inputs and targets of consecutive sequences, each `len * seq_len` tokens; sequence i is row i of both.
    /// The range is cut to the sequences that there are.
    pub fn batch(&self, sequences: Range<usize>) -> (&[u16], &[u16]) {
        let end = sequences.end.min(self.sequences);
        let (start, end) = (sequences.start.min(end) * self.seq_len, end * self.seq_len);
        let tokens = self.tokens();
        (&tokens[start..end], &tokens[start + 1..end + 1])
    }
}
