//! Scoring and sampling.

pub mod full;
pub mod sample;
pub mod text;
pub mod unigram;

use crate::model::ids_tensor;
use crate::ops::Plain;

/// Waits until the device has done all work that it was given.
pub fn wait<P: Plain>(device: &P::Device) -> crate::Result<()> {
    P::sync(device)
        .map_err(|error| crate::Error::failed(format!("work failed ({error})"), "the device", "it to finish"))
}
