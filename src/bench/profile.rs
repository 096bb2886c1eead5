//! The kernels of one training step: how often each is launched, how long it takes, and the least that it could take.

use super::step::Bench;
use crate::backend::profile::{self, Launch};
use crate::error::Result;
use crate::eval;
use crate::ops::Plain;
use crate::recipe::Recipe;
use burn::tensor::{DType, Tensor};
use serde::Serialize;

/// Launches of one kernel on tensors of one size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kernel {
    /// The kernel and its tensors' sizes.
    pub what: String,
    /// Launches in the step.
    pub launches: usize,
    /// Time of all of them in milliseconds, what an empty launch takes left out.
    pub ms: f64,
    /// Share of the sum over all kernels.
    pub share: f64,
    /// Milliseconds that moving its tensors once takes, where its tensors are known.
    pub floor_ms: Option<f64>,
    /// Arithmetic rate in 10^12 operations a second, where the count is known.
    pub tflops: Option<f64>,
}

/// The kernels of one step of a recipe, the longest first. [`profile::begin`] comes before the device is opened.
pub fn run<P: Plain>(
    recipe: &Recipe,
    micro_batch: usize,
    device: &P::Device,
    dtype: DType,
) -> Result<Vec<Kernel>> {
    let mut bench = Bench::<P>::new(recipe, micro_batch, device, dtype)?;
    for _ in 0..2 {
        bench.step()?;
    }
    let empty = launch_ms::<P>(device, 32)?;
    let elements = 1 << 24;
    let rate = 8.0 * elements as f64 / (launch_ms::<P>(device, elements)? - empty) * 1000.0;
    bench.step()?;
    eval::wait::<P>(device)?;
    Ok(kernels(profile::take()?, empty, rate))
}

/// The time of a launch that reads and writes so many f32; what was profiled before is dropped.
fn launch_ms<P: Plain>(device: &P::Device, elements: usize) -> Result<f64> {
    let x = Tensor::<P, 1>::zeros([elements], device);
    eval::wait::<P>(device)?;
    profile::take()?;
    for _ in 0..50 {
        drop(x.clone().add_scalar(1.0));
    }
    eval::wait::<P>(device)?;
    let mut times: Vec<f64> = profile::take()?.iter().map(|launch| launch.ms).collect();
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(0.0))
}

fn kernels(launches: Vec<Launch>, empty: f64, rate: f64) -> Vec<Kernel> {
    let mut kernels: Vec<Kernel> = Vec::new();
    let mut operations: Vec<f64> = Vec::new();
    for launch in launches {
        let index = kernels.iter().position(|kernel| kernel.what == launch.what).unwrap_or_else(|| {
            let what = launch.what.clone();
            operations.push(0.0);
            kernels.push(Kernel { what, launches: 0, ms: 0.0, share: 0.0, floor_ms: None, tflops: None });
            kernels.len() - 1
        });
        let kernel = &mut kernels[index];
        kernel.launches += 1;
        kernel.ms += (launch.ms - empty).max(0.0);
        if let Some(bytes) = launch.bytes {
            *kernel.floor_ms.get_or_insert(0.0) += bytes / rate * 1000.0;
        }
        operations[index] += launch.operations.unwrap_or(0.0);
    }
    let sum: f64 = kernels.iter().map(|kernel| kernel.ms).sum();
    for (kernel, operations) in kernels.iter_mut().zip(operations) {
        kernel.share = kernel.ms / sum.max(f64::MIN_POSITIVE);
        kernel.tflops = (operations > 0.0 && kernel.ms > 0.0).then(|| operations / kernel.ms / 1e9);
    }
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    kernels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_of_one_kernel_and_size_are_one_row() {
        let launch = |what: &str, ms, bytes, operations| Launch { what: what.into(), ms, bytes, operations };
        let rows = kernels(
            vec![
                launch("a [1]", 1.01, Some(1e9), None),
                launch("b", 0.005, None, None),
                launch("a [1]", 2.01, Some(1e9), None),
                launch("m [2]", 1.01, Some(1e9), Some(1e12)),
            ],
            0.01,
            1e12,
        );
        assert_eq!(rows.len(), 3);
        assert_eq!((rows[0].what.as_str(), rows[0].launches, rows[0].floor_ms), ("a [1]", 2, Some(2.0)));
        assert!((rows[0].ms - 3.0).abs() < 1e-9 && (rows[0].share - 0.75).abs() < 1e-9);
        assert!((rows[1].tflops.unwrap() - 1000.0).abs() < 1e-6);
        assert_eq!((rows[2].what.as_str(), rows[2].ms), ("b", 0.0));
    }
}
