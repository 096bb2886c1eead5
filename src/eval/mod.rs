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

use crate::ops::Plain;
use burn::tensor::{Int, Tensor, TensorData};

/// Token ids `[batch, time]` on a device.
pub fn ids_tensor<B: burn::tensor::backend::Backend>(
    ids: &[u16],
    time: usize,
    device: &B::Device,
) -> Tensor<B, 2, Int> {
    let values: Vec<i32> = ids.iter().map(|id| i32::from(*id)).collect();
    Tensor::from_data(TensorData::new(values, [ids.len() / time, time]), device)
}

/// Waits until the device has done all work that it was given.
pub fn wait<P: Plain>(device: &P::Device) -> crate::Result<()> {
    P::sync(device)
        .map_err(|error| crate::Error::failed(format!("work failed ({error})"), "the device", "it to finish"))
}
