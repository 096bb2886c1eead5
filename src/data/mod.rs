//! Data: shards, tokenizers, the byte table, the token streams, and the making of corpora.

pub mod byte_table;
pub mod demo;
pub mod demo_list;
pub mod documents;
pub mod fetch;
pub mod folder;
mod hub;
pub mod pack;
mod prose;
pub mod shard;
pub mod stream;
pub mod tokenizer;
pub mod verify;

use crate::error::Result;

/// Told of progress as (done, total) in one unit, mostly bytes. An error that it returns (such as
/// [`Error::Interrupted`](crate::error::Error::Interrupted)) stops the work, which then leaves nothing half-written.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) -> Result<()> + Sync);

/// Progress that nobody watches.
pub fn quiet(_done: u64, _total: u64) -> Result<()> {
    Ok(())
}
