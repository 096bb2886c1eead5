//! Each op that has a kernel of its own, forward and backward, beside its reference; and the matrix product.

use super::{Row, copy_rate, median_ms};
use crate::error::Result;
use crate::ops::rms_norm::{self, EPS};
use crate::ops::{Autodiff, Plain};
use burn::tensor::{DType, Distribution, Tensor};

/// Times the ops over `rows` rows (of tokens), activations of type `dtype`.
pub fn run<P: Plain>(device: &P::Device, dtype: DType, rows: usize) -> Result<Vec<Row>> {
    let rate = copy_rate::<P>(device, (rows * 512).min(1 << 26))?;
    let mut found = vec![Row {
        what: format!("copy of {} MiB", (rows * 512 * 4) >> 20),
        ms: 8.0 * (rows * 512).min(1 << 26) as f64 / rate * 1000.0,
        floor_ms: None,
        tflops: None,
        gbps: Some(rate / 1e9),
    }];
    let size = dtype.size() as f64;
    for columns in [64, 512, 1024] {
        let random = || -> Tensor<P, 2> {
            Tensor::<P, 2>::random([rows, columns], Distribution::Normal(0.0, 1.0), device).cast(dtype)
        };
        let (x, grad) = (random(), random());
        let elements = (rows * columns) as f64;
        let mut row = |what: &str, tensors: f64, work: &dyn Fn() -> Tensor<P, 2>| -> Result<()> {
            let ms = median_ms::<P>(device, || {
                drop(work());
                Ok(())
            })?;
            let bytes = tensors * elements * size;
            found.push(Row {
                what: format!("{what} [{rows}, {columns}]"),
                ms,
                floor_ms: Some(bytes / rate * 1000.0),
                tflops: None,
                gbps: Some(bytes / ms / 1e6),
            });
            Ok(())
        };
        row("rms_norm forward", 2.0, &|| P::rms_norm(x.clone(), EPS))?;
        row("rms_norm forward, reference", 2.0, &|| rms_norm::forward(x.clone(), EPS))?;
        row("rms_norm backward", 3.0, &|| P::rms_norm_backward(x.clone(), grad.clone(), EPS))?;
        row("rms_norm backward, reference", 3.0, &|| rms_norm::backward(x.clone(), grad.clone(), EPS))?;
    }
    for (inner, outer) in [(512, 512), (512, 1024), (1024, 512)] {
        let random = |shape: [usize; 2]| -> Tensor<P, 2> {
            Tensor::<P, 2>::random(shape, Distribution::Normal(0.0, 1.0), device).cast(dtype)
        };
        let (a, b) = (random([rows, inner]), random([inner, outer]));
        let ms = median_ms::<P>(device, || {
            drop(P::matmul_as(a.clone(), b.clone(), dtype));
            Ok(())
        })?;
        let operations = 2.0 * (rows * inner * outer) as f64;
        found.push(Row {
            what: format!("matmul [{rows}, {inner}] [{inner}, {outer}]"),
            ms,
            floor_ms: None,
            tflops: Some(operations / ms / 1e9),
            gbps: None,
        });
    }
    // The tape's own cost: a node recorded and walked back, over a tensor too small to matter.
    let small = Tensor::<P, 2>::random([1, 64], Distribution::Default, device).cast(dtype);
    let ms = median_ms::<P>(device, || {
        let x = Tensor::<Autodiff<P>, 2>::from_inner(small.clone()).require_grad();
        drop(<Autodiff<P> as crate::ops::RmsNormOps>::rms_norm(x, EPS).backward());
        Ok(())
    })?;
    let what = "rms_norm [1, 64] recorded and walked back".to_string();
    found.push(Row { what, ms, floor_ms: None, tflops: None, gbps: None });
    Ok(found)
}
