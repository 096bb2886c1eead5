use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::{Plain, reduce};
use burn::tensor::{Distribution, Tensor};

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    for n in [bench.rows, bench.rows * 128] {
        let x = Tensor::<P, 1>::random([n], Distribution::Normal(0.0, 1.0), bench.device);
        let cost = Cost::bytes((n * x.dtype().size()) as f64);
        bench.time(format!("total [{n}]"), cost, || P::total(x.clone()))?;
        bench.time(format!("total, reference [{n}]"), cost, || reduce::sum(x.clone()))?;
    }
    Ok(())
}
