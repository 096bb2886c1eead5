//! Each op that has a kernel of its own, forward and backward, beside its reference: one file an op.

mod activation;
mod attention;
mod cross_entropy;
mod embedding;
mod linear;
mod matmul;
mod mlp;
mod newton_schulz;
mod normed_attention;
mod projected_attention;
mod qk_norm;
mod reduce;
mod rms_norm;
mod stream;
mod tape;
mod update;

use super::{Row, copy_rate, median_ms};
use crate::error::Result;
use crate::ops::Plain;
use burn::tensor::{DType, Distribution, Tensor};

/// What the timings of all ops share.
struct Bench<'a, P: Plain> {
    device: &'a P::Device,
    /// Of the activations.
    dtype: DType,
    /// Tokens.
    rows: usize,
    /// The device's copy rate in bytes a second.
    rate: f64,
    found: Vec<Row>,
}

/// What a piece of work has to do at least.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    /// Bytes that it must read and write.
    bytes: Option<f64>,
    /// Arithmetic operations.
    operations: Option<f64>,
}

impl Cost {
    fn bytes(bytes: f64) -> Self {
        Self { bytes: Some(bytes), operations: None }
    }

    fn operations(operations: f64) -> Self {
        Self { bytes: None, operations: Some(operations) }
    }
}

impl<P: Plain> Bench<'_, P> {
    /// Normal random numbers of the activations' type.
    fn random<const D: usize>(&self, shape: [usize; D]) -> Tensor<P, D> {
        Tensor::<P, D>::random(shape, Distribution::Normal(0.0, 1.0), self.device).cast(self.dtype)
    }

    /// Times `work` and adds its row; what it gives is dropped.
    fn time<T>(&mut self, what: impl Into<String>, cost: Cost, work: impl Fn() -> T) -> Result<()> {
        let ms = median_ms::<P>(self.device, || {
            drop(work());
            Ok(())
        })?;
        self.found.push(Row {
            what: what.into(),
            ms,
            floor_ms: cost.bytes.map(|bytes| bytes / self.rate * 1000.0),
            tflops: cost.operations.map(|operations| operations / ms / 1e9),
            gbps: cost.bytes.map(|bytes| bytes / ms / 1e6),
        });
        Ok(())
    }
}

/// Times the ops over `rows` rows (of tokens), activations of type `dtype`.
pub fn run<P: Plain>(device: &P::Device, dtype: DType, rows: usize) -> Result<Vec<Row>> {
    let elements = (rows * 512).min(1 << 26);
    let rate = copy_rate::<P>(device, elements)?;
    let copy = Row {
        what: format!("copy of {} MiB", (elements * 4) >> 20),
        ms: 8.0 * elements as f64 / rate * 1000.0,
        floor_ms: None,
        tflops: None,
        gbps: Some(rate / 1e9),
    };
    let mut bench = Bench::<P> { device, dtype, rows, rate, found: vec![copy] };
    rms_norm::time(&mut bench)?;
    stream::time(&mut bench)?;
    matmul::time(&mut bench)?;
    cross_entropy::time(&mut bench)?;
    embedding::time(&mut bench)?;
    reduce::time(&mut bench)?;
    linear::time(&mut bench)?;
    mlp::time(&mut bench)?;
    activation::time(&mut bench)?;
    attention::time(&mut bench)?;
    qk_norm::time(&mut bench)?;
    normed_attention::time(&mut bench)?;
    projected_attention::time(&mut bench)?;
    tape::time(&mut bench)?;
    newton_schulz::time(&mut bench)?;
    update::time(&mut bench)?;
    Ok(bench.found)
}
