//! Timings: medians after warm-up, with the floor beside each.

pub mod ops;
pub mod profile;
pub mod step;

use crate::error::Result;
use crate::eval;
use crate::ops::Plain;
use burn::tensor::{Distribution, Tensor};
use serde::Serialize;
use std::time::Instant;

/// Runs before the first timed one: kernels are compiled and memory is taken in them.
const WARM_UP: usize = 3;

/// Timed samples; their median counts.
const SAMPLES: usize = 7;

/// One timing.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What was timed, with its shape.
    pub what: String,
    /// Median time in milliseconds.
    pub ms: f64,
    /// The time that the bytes it must move take at this device's own copy rate, in milliseconds; none where arithmetic
    /// bounds it.
    pub floor_ms: Option<f64>,
    /// Arithmetic rate in 10^12 operations a second, where the count is known.
    pub tflops: Option<f64>,
    /// Rate of the bytes that it must move, in 10^9 a second, where the count is known.
    pub gbps: Option<f64>,
}

/// The median time of `work` in milliseconds: each sample is as many runs as take some 20 ms, then a wait for the device.
pub fn median_ms<P: Plain>(device: &P::Device, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut sample = |runs: usize| -> Result<f64> {
        eval::wait::<P>(device)?;
        let start = Instant::now();
        for _ in 0..runs {
            work()?;
        }
        eval::wait::<P>(device)?;
        Ok(start.elapsed().as_secs_f64() * 1000.0 / runs as f64)
    };
    sample(WARM_UP)?;
    let once = sample(1)?;
    let runs = ((20.0 / once.max(1e-3)) as usize).clamp(1, 200);
    let mut times = (0..SAMPLES).map(|_| sample(runs)).collect::<Result<Vec<f64>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[SAMPLES / 2])
}

/// The device's copy rate in bytes a second, read plus written, through one elementwise op over 64 Mi elements (1 Mi on
/// the CPU).
pub fn copy_rate<P: Plain>(device: &P::Device, elements: usize) -> Result<f64> {
    let x = Tensor::<P, 1>::random([elements], Distribution::Default, device);
    let ms = median_ms::<P>(device, || {
        drop(x.clone().add_scalar(1.0));
        Ok(())
    })?;
    Ok(8.0 * elements as f64 / (ms / 1000.0))
}
