use super::{Bench, Cost};
use crate::error::Result;
use crate::model::Model;
use crate::ops::update::{self, AdamConfig, AdamInput, MomentumConfig, MomentumInput, OrthogonalInput};
use crate::ops::{Param, Plain, accumulate_type};
use crate::optim::{Group, Optimizers, group_of};
use crate::recipe::Recipe;
use burn::tensor::{DType, Tensor};
use std::collections::BTreeMap;

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let mut recipe = Recipe::load("baseline")?;
    if bench.rows < 65_536 {
        recipe.set("num_layers=1")?;
    }
    let model = Model::<P>::new(&recipe, bench.device, bench.dtype)?;
    adam(bench, &recipe, &model)?;
    muon(bench, &recipe, &model)?;
    gradients(bench, &model)?;
    step(bench, &recipe, &model)
}

/// Whether Muon updates a parameter; else Adam does.
fn is_muon<P: Plain>(recipe: &Recipe, param: &Param<P>) -> bool {
    group_of(recipe, param.name(), param.shape().len()) == Group::Matrix
}

/// Of `baseline`'s embedding and vectors.
fn adam<P: Plain>(bench: &mut Bench<'_, P>, recipe: &Recipe, model: &Model<P>) -> Result<()> {
    let params: Vec<&Param<P>> = model.params().iter().filter(|param| !is_muon(recipe, param)).collect();
    let config = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };
    let input = |param: &&Param<P>| {
        let row = || wide(bench.random([param.numel()]));
        let (value, grad, m) = (row(), row(), row());
        let moments = Some([m.clone(), m.clone() * m]);
        let copy = param.copy_type();
        AdamInput { value, grad, moments, config, lr: 1e-3, steps: 10, bf16: true, copy }
    };
    let inputs: Vec<AdamInput<P>> = params.iter().map(input).collect();
    let bytes = |param: &&Param<P>| param.numel() * (28 + copy_bytes(param));
    let cost = Cost::bytes(params.iter().map(bytes).sum::<usize>() as f64);
    let elements: usize = params.iter().map(|param| param.numel()).sum();
    let size = format!("{} tensors, {elements} in all", params.len());
    bench.time(format!("adam_step {size}"), cost, || P::adam_step(inputs.clone(), None))?;
    bench.time(format!("adam_step, reference {size}"), cost, || update::adam_step(inputs.clone(), None))
}

fn copy_bytes<P: Plain>(param: &Param<P>) -> usize {
    param.copy_type().map_or(0, |copy| copy.size())
}

/// The steps before and after Newton-Schulz of `baseline`'s matrices, shape by shape.
fn muon<P: Plain>(bench: &mut Bench<'_, P>, recipe: &Recipe, model: &Model<P>) -> Result<()> {
    let mut shapes: BTreeMap<[usize; 2], usize> = BTreeMap::new();
    for param in model.params().iter().filter(|param| is_muon(recipe, param)) {
        *shapes.entry([param.shape()[0], param.shape()[1]]).or_default() += 1;
    }
    let dtype = bench.dtype;
    let copy = (dtype == DType::BF16).then_some(dtype);
    let config = MomentumConfig { momentum: 0.95, nesterov: true, dtype };
    for ([rows, columns], count) in shapes {
        let matrix = || wide(bench.random([rows, columns]));
        let grad = |_| MomentumInput { grad: matrix(), buffer: Some(matrix()), bf16: false };
        let grads: Vec<MomentumInput<P>> = (0..count).map(grad).collect();
        let value = |_| OrthogonalInput { value: matrix(), lr: 0.04, weight_decay: 0.0, bf16: false, copy };
        let values: Vec<OrthogonalInput<P>> = (0..count).map(value).collect();
        let updates: Tensor<P, 3> = bench.random([count, rows, columns]);
        let cost = |bytes: usize| Cost::bytes((count * rows * columns * bytes) as f64);
        let size = format!("{count} x [{rows}, {columns}]");
        let moved = cost(12 + dtype.size());
        bench
            .time(format!("momentum_step {size}"), moved, || P::momentum_step(grads.clone(), config, None))?;
        bench.time(format!("momentum_step, reference {size}"), moved, || {
            update::momentum_step(grads.clone(), config, None)
        })?;
        let moved = cost(8 + dtype.size() + copy.map_or(0, |copy| copy.size()));
        bench.time(format!("orthogonal_step {size}"), moved, || {
            P::orthogonal_step(values.clone(), updates.clone(), true)
        })?;
        bench.time(format!("orthogonal_step, reference {size}"), moved, || {
            update::orthogonal_step(values.clone(), updates.clone(), true)
        })?;
    }
    Ok(())
}

/// What clips, and what averages, all of `baseline`'s parameters.
fn gradients<P: Plain>(bench: &mut Bench<'_, P>, model: &Model<P>) -> Result<()> {
    let row = |param: &Param<P>| wide(bench.random([param.numel()]));
    let rows: Vec<Tensor<P, 1>> = model.params().iter().map(row).collect();
    let averages: Vec<Tensor<P, 1>> = model.params().iter().map(row).collect();
    let elements = model.params().numel();
    let cost = |bytes: usize| Cost::bytes((elements * bytes) as f64);
    let size = format!("{} tensors, {elements} in all", rows.len());
    bench.time(format!("clip_factor {size}"), cost(4), || P::clip_factor(rows.clone(), 1.0))?;
    bench
        .time(format!("clip_factor, reference {size}"), cost(4), || update::clip_factor(rows.clone(), 1.0))?;
    let pairs: Vec<[Tensor<P, 1>; 2]> =
        averages.into_iter().zip(&rows).map(|(average, row)| [average, row.clone()]).collect();
    bench.time(format!("blend {size}"), cost(12), || P::blend(pairs.clone(), [0.999, 0.001]))?;
    bench.time(format!("blend, reference {size}"), cost(12), || update::blend(pairs.clone(), [0.999, 0.001]))
}

/// All of `baseline`'s update.
fn step<P: Plain>(bench: &mut Bench<'_, P>, recipe: &Recipe, model: &Model<P>) -> Result<()> {
    let grad = |param: &Param<P>| wide(bench.random([param.numel()]));
    let grads: Vec<Tensor<P, 1>> = model.params().iter().map(grad).collect();
    // Values, gradients and state are read, values, copies and state written; one moment or two.
    let bytes = |param: &Param<P>| {
        let state = if is_muon(recipe, param) { 1 } else { 2 };
        param.numel() * (12 + 8 * state + copy_bytes(param))
    };
    let cost = Cost::bytes(model.params().iter().map(bytes).sum::<usize>() as f64);
    let optimizers = std::cell::RefCell::new(Optimizers::new(recipe, model));
    bench.time(format!("optimizer step of baseline, {} layers", recipe.num_layers), cost, || {
        for (param, grad) in model.params().iter().zip(&grads) {
            param.accumulate_flat(grad.clone());
        }
        optimizers.borrow_mut().step(1.0, 0.95);
    })
}

/// In the type of master values.
fn wide<P: Plain, const D: usize>(x: Tensor<P, D>) -> Tensor<P, D> {
    let dtype = accumulate_type(x.dtype());
    x.cast(dtype)
}
