use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::{Param, Plain, accumulate_type, linear, mlp};
use burn::tensor::{Distribution, Tensor};

/// Linear layers: one, one whose output is added to rows with a scale, three of one input (q, k and v of `baseline`), and
/// the squared MLP. Gradients of weights add up from run to run, as over micro-batches.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let rows = bench.rows;
    let weight = |bench: &Bench<'_, P>, shape: [usize; 2]| {
        let normal = Distribution::Normal(0.0, (1.0 / shape[1] as f64).sqrt());
        let value = Tensor::<P, 2>::random(shape, normal, bench.device).cast(accumulate_type(bench.dtype));
        Param::<P>::new("weight", value, bench.dtype)
    };
    let products = |count: usize, inner: usize, outer: usize| {
        Cost::operations(2.0 * (count * rows * inner * outer) as f64)
    };

    let x = bench.random([rows, 512]);
    let (w, grad) = (weight(bench, [1024, 512]), bench.random([rows, 1024]));
    bench.time(format!("project backward [{rows}, 512] to 1024"), products(2, 512, 1024), || {
        P::project_backward(x.clone(), &w, grad.clone())
    })?;

    let (e, scale) = (bench.random([rows, 1024]), weight(bench, [1, 1024]));
    let what = |form: &str| format!("{form} [{rows}, 512] to 1024");
    bench.time(what("project forward"), products(1, 512, 1024), || P::project(x.clone(), &w))?;
    bench.time(what("project_added forward"), products(1, 512, 1024), || {
        P::project_added(x.clone(), &w, e.clone(), Some((&scale, 0)))
    })?;
    bench.time(what("project_added forward, reference"), products(1, 512, 1024), || {
        linear::added_forward::<P>(x.clone(), &w, e.clone(), Some((&scale, 0)))
    })?;
    bench.time(what("project_added backward"), products(2, 512, 1024), || {
        P::project_added_backward(x.clone(), None, &w, Some((&scale, 0)), grad.clone())
    })?;

    let widths = [512, 256, 256];
    let weights = widths.map(|width| weight(bench, [width, 512]));
    let weights = weights.each_ref();
    let grads = widths.map(|width| bench.random([rows, width]));
    let grads = || grads.clone().map(Some);
    let what = |form: &str| format!("project_many {form} [{rows}, 512] to 512, 256, 256");
    bench.time(what("forward"), products(1, 512, 1024), || P::project_many(x.clone(), weights))?;
    bench.time(what("forward, one by one"), products(1, 512, 1024), || {
        weights.map(|w| P::project(x.clone(), w))
    })?;
    bench.time(what("backward"), products(2, 512, 1024), || {
        P::project_many_backward(x.clone(), weights, grads())
    })?;
    bench.time(what("backward, one by one"), products(2, 512, 1024), || {
        linear::backward_one_by_one(x.clone(), weights, grads())
    })?;

    let (inner, last) = (weight(bench, [1024, 512]), weight(bench, [512, 1024]));
    let grad = bench.random([rows, 512]);
    for slope in [0.0, 0.5] {
        let what = |form: &str| format!("squared_mlp {form} [{rows}, 512], hidden 1024, slope {slope}");
        bench.time(what("forward"), products(2, 512, 1024), || {
            P::squared_mlp_forward(x.clone(), &inner, &last, slope)
        })?;
        bench.time(what("forward, reference"), products(2, 512, 1024), || {
            mlp::forward(x.clone(), &inner, &last, slope)
        })?;
        let (_, hidden) = P::squared_mlp_forward(x.clone(), &inner, &last, slope);
        bench.time(what("backward"), products(4, 512, 1024), || {
            let (x, hidden, grad) = (x.clone(), hidden.clone(), grad.clone());
            P::squared_mlp_backward(x, hidden, &inner, &last, slope, grad)
        })?;
        let (_, hidden) = mlp::forward::<P>(x.clone(), &inner, &last, slope);
        bench.time(what("backward, reference"), products(4, 512, 1024), || {
            mlp::backward(x.clone(), hidden.clone(), &inner, &last, slope, grad.clone())
        })?;
    }
    Ok(())
}
