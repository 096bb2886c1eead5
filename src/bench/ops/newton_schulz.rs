use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::Plain;
use crate::ops::newton_schulz::{self, NewtonSchulz};
use burn::tensor::Tensor;

/// The batches of `baseline`'s matrices; where there are few rows, one matrix each.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let iteration = NewtonSchulz { bf16: true, ..NewtonSchulz::default() };
    for [count, rows, columns] in [[18, 512, 512], [18, 256, 512], [9, 1024, 512], [9, 512, 1024]] {
        let count = if bench.rows < 65_536 { 1 } else { count };
        let g: Tensor<P, 3> = bench.random([count, rows, columns]);
        let (short, long) = (rows.min(columns) as f64, rows.max(columns) as f64);
        // Of the two symmetric products only the half that has to be computed.
        let once = short * short * (long + short + 2.0 * long);
        let cost = Cost::operations(once * (iteration.steps * count) as f64);
        let size = format!("[{count}, {rows}, {columns}]");
        bench.time(format!("newton_schulz {size}"), cost, || P::newton_schulz(g.clone(), iteration))?;
        bench.time(format!("newton_schulz, reference {size}"), cost, || {
            newton_schulz::reference(g.clone(), iteration)
        })?;
    }
    Ok(())
}
