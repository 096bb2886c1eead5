use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::{Plain, activation};

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, columns, slope) = (bench.rows, 1024, 0.5);
    let x = bench.random([rows, columns]);
    let (gate, grad) = (bench.random([rows, columns]), bench.random([rows, columns]));
    let bytes = |tensors: usize| Cost::bytes((tensors * rows * columns * x.dtype().size()) as f64);
    let what = |op: &str| format!("{op} [{rows}, {columns}]");

    bench.time(what("leaky_relu_squared forward"), bytes(2), || P::leaky_relu_squared(x.clone(), slope))?;
    bench.time(what("leaky_relu_squared forward, reference"), bytes(2), || {
        activation::leaky_relu_squared_forward(x.clone(), slope)
    })?;
    bench.time(what("leaky_relu_squared backward"), bytes(3), || {
        P::leaky_relu_squared_backward(x.clone(), slope, grad.clone())
    })?;
    bench.time(what("leaky_relu_squared backward, reference"), bytes(3), || {
        activation::leaky_relu_squared_backward(x.clone(), slope, grad.clone())
    })?;
    bench.time(what("silu_gate forward"), bytes(3), || P::silu_gate(x.clone(), gate.clone()))?;
    bench.time(what("silu_gate forward, reference"), bytes(3), || {
        activation::silu_gate(x.clone(), gate.clone())
    })?;
    bench.time(what("silu_gate backward"), bytes(5), || {
        P::silu_gate_backward(x.clone(), gate.clone(), grad.clone())
    })?;
    bench.time(what("silu_gate backward, reference"), bytes(5), || {
        activation::silu_gate_backward(x.clone(), gate.clone(), grad.clone())
    })?;
    bench.time(what("silu forward"), bytes(2), || P::silu(x.clone()))?;
    bench.time(what("softplus backward"), bytes(3), || P::softplus_backward(x.clone(), grad.clone()))?;
    Ok(())
}
