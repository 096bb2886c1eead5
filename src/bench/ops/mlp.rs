use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::{Param, Plain, accumulate_type, mlp};
use burn::tensor::{Distribution, Tensor};

/// The gated MLP, and the plain products of the same sizes: forward it is the one of 2048 columns and the one of 512, and
/// backward these twice with the weights' gradients, so that what the activation costs is the rest. `alone` keeps nothing
/// for a backward.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, dim, hidden) = (bench.rows, 512, 1024);
    let weight = |bench: &Bench<'_, P>, shape: [usize; 2]| {
        let normal = Distribution::Normal(0.0, (1.0 / shape[1] as f64).sqrt());
        let value = Tensor::<P, 2>::random(shape, normal, bench.device).cast(accumulate_type(bench.dtype));
        Param::<P>::new("weight", value, bench.dtype)
    };
    let products = |count: usize| Cost::operations(2.0 * (count * rows * dim * hidden) as f64);
    let (x, grad) = (bench.random([rows, dim]), bench.random([rows, dim]));
    let [gate, up] = [(); 2].map(|()| weight(bench, [hidden, dim]));
    let (both, last) = (weight(bench, [2 * hidden, dim]), weight(bench, [dim, hidden]));

    bench.time(format!("project [{rows}, {dim}] to {}", 2 * hidden), products(2), || {
        P::project(x.clone(), &both)
    })?;
    let wide = bench.random([rows, hidden]);
    bench.time(format!("project [{rows}, {hidden}] to {dim}"), products(1), || {
        P::project(wide.clone(), &last)
    })?;
    let what = |form: &str| format!("gated_mlp {form} [{rows}, {dim}], hidden {hidden}");
    bench.time(what("forward"), products(3), || P::gated_mlp_forward(x.clone(), &gate, &up, &last))?;
    bench.time(what("forward, alone"), products(3), || P::gated_mlp(x.clone(), &gate, &up, &last))?;
    bench.time(what("forward, reference"), products(3), || {
        mlp::gated_forward::<P>(x.clone(), &gate, &up, &last)
    })?;
    let (_, seen) = P::gated_mlp_forward(x.clone(), &gate, &up, &last);
    bench.time(what("backward"), products(6), || {
        P::gated_mlp_backward(x.clone(), seen.clone(), &gate, &up, &last, grad.clone())
    })?;
    let (_, seen) = mlp::gated_forward::<P>(x.clone(), &gate, &up, &last);
    bench.time(what("backward, reference"), products(6), || {
        mlp::gated_backward::<P>(x.clone(), seen.clone(), &gate, &up, &last, grad.clone())
    })?;
    Ok(())
}
