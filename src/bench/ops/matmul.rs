use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::{Plain, accumulate_type};

/// Products of activations with weights, and of two activations along the tokens (the gradients of weights); those of a
/// linear layer in f32 as well, whatever the activations' type.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, dtype) = (bench.rows, bench.dtype);
    for (inner, outer) in [(512, 512), (512, 1024), (512, 2048), (1024, 512), (2048, 512)] {
        let (a, b) = (bench.random([rows, inner]), bench.random([inner, outer]));
        let what = format!("matmul [{rows}, {inner}] [{inner}, {outer}]");
        let cost = Cost::operations(2.0 * (rows * inner * outer) as f64);
        bench.time(what, cost, || P::matmul_as(a.clone(), b.clone(), dtype))?;
    }
    let wide = accumulate_type(dtype);
    for (outer, inner) in [(512, 512), (512, 2048), (2048, 512)] {
        let (grad, x) = (bench.random([rows, outer]), bench.random([rows, inner]));
        let what = format!("matmul [{rows}, {outer}]^T [{rows}, {inner}] as f32");
        let cost = Cost::operations(2.0 * (rows * inner * outer) as f64);
        bench.time(what, cost, || P::matmul_as(grad.clone().transpose(), x.clone(), wide))?;
    }
    let (inner, outer) = (512, 1024);
    let [x, grad, w] =
        [[rows, inner], [rows, outer], [outer, inner]].map(|shape| bench.random(shape).cast(wide));
    let cost = Cost::operations(2.0 * (rows * inner * outer) as f64);
    let what = |form: String| format!("matmul {form} in f32");
    bench.time(what(format!("[{rows}, {inner}] [{outer}, {inner}]^T")), cost, || {
        P::matmul_as(x.clone(), w.clone().transpose(), wide)
    })?;
    bench.time(what(format!("[{rows}, {outer}] [{outer}, {inner}]")), cost, || {
        P::matmul_as(grad.clone(), w.clone(), wide)
    })?;
    bench.time(what(format!("[{rows}, {outer}]^T [{rows}, {inner}]")), cost, || {
        P::matmul_as(grad.clone().transpose(), x.clone(), wide)
    })?;
    Ok(())
}
