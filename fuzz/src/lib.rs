//! The readers of fairway, compiled from its own sources without models, backends and Burn, so that a fuzzer builds in
//! a minute; and the limits that every input is held to.

#![allow(dead_code, reason = "the readers are compiled without all that uses them")]

#[path = "../../src/artifact/mod.rs"]
pub mod artifact;
/// The readers of data.
#[path = "../../src/data"]
pub mod data {
    pub mod shard;
    pub mod tokenizer;
}
#[path = "../../src/error.rs"]
pub mod error;
#[path = "../../src/files.rs"]
pub mod files;
#[path = "../../src/host.rs"]
pub mod host;
/// How tensors are stored.
#[path = "../../src/quant"]
pub mod quant {
    pub mod clip;
    pub mod quantile;
    pub mod stats;
    pub mod storage;
    pub mod ternary;

    pub use stats::Stats;
    pub use storage::{PartSpec, QuantTensor, Storage};
}
#[path = "../../src/recipe/mod.rs"]
pub mod recipe;

pub mod hostile;
pub mod limits;

pub use error::{Error, Result};
