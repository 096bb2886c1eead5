use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::Plain;
use crate::ops::rms_norm::{self, EPS};

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let rows = bench.rows;
    for columns in [64, 512, 1024] {
        let (x, grad) = (bench.random([rows, columns]), bench.random([rows, columns]));
        let size = format!("[{rows}, {columns}]");
        let bytes = |tensors: usize| Cost::bytes((tensors * rows * columns * x.dtype().size()) as f64);
        bench.time(format!("rms_norm forward {size}"), bytes(2), || P::rms_norm(x.clone(), EPS))?;
        bench.time(format!("rms_norm forward, reference {size}"), bytes(2), || {
            rms_norm::forward(x.clone(), EPS)
        })?;
        bench.time(format!("rms_norm backward {size}"), bytes(3), || {
            P::rms_norm_backward(x.clone(), grad.clone(), EPS)
        })?;
        bench.time(format!("rms_norm backward, reference {size}"), bytes(3), || {
            rms_norm::backward(x.clone(), grad.clone(), EPS)
        })?;
    }
    Ok(())
}
