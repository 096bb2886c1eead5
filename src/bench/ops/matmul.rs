use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::Plain;

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, dtype) = (bench.rows, bench.dtype);
    for (inner, outer) in [(512, 512), (512, 1024), (1024, 512)] {
        let (a, b) = (bench.random([rows, inner]), bench.random([inner, outer]));
        let what = format!("matmul [{rows}, {inner}] [{inner}, {outer}]");
        let cost = Cost::operations(2.0 * (rows * inner * outer) as f64);
        bench.time(what, cost, || P::matmul_as(a.clone(), b.clone(), dtype))?;
    }
    Ok(())
}
