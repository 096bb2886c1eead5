//! Scoring and sampling.

pub mod full;
pub mod low_rank;
pub mod method;
pub mod sample;
pub mod sliding;
pub mod stateful;
pub mod statistics;
pub mod tally;
pub mod text;
pub mod ttt;
pub mod unigram;
pub mod windows;

use crate::model::ids_tensor;
use crate::ops::Plain;

/// Waits until the device has done all work that it was given.
pub fn wait<P: Plain>(device: &P::Device) -> crate::Result<()> {
    P::sync(device)
        .map_err(|error| crate::Error::failed(format!("work failed ({error})"), "the device", "it to finish"))
}
