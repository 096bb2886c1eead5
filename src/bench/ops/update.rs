use super::{Bench, Cost};
use crate::error::Result;
use crate::model::Model;
use crate::ops::update::{self, AdamConfig, AdamInput, MomentumConfig, MomentumInput, OrthogonalInput};
use crate::ops::{Param, Plain, accumulate_type};
use crate::optim::{Group, Optimizers, group_of};
use crate::recipe::Recipe;
use burn::tensor::{DType, Tensor};

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    adam(bench)?;
    muon(bench)?;
    gradients(bench)?;
    step(bench)
}

/// The embedding and 36 vectors, as `baseline` has them.
fn adam<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let sizes = [1024 * 512].into_iter().chain([512; 36]);
    let config = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };
    let copy = (bench.dtype == DType::BF16).then_some(DType::BF16);
    let input = |elements: usize| {
        let row = || wide(bench.random([elements]));
        let (value, grad, m) = (row(), row(), row());
        let moments = Some([m.clone(), m.clone() * m]);
        AdamInput { value, grad, moments, config, lr: 1e-3, steps: 10, bf16: true, copy }
    };
    let inputs: Vec<AdamInput<P>> = sizes.clone().map(input).collect();
    let bytes = 28 + copy.map_or(0, |copy| copy.size());
    let cost = Cost::bytes((sizes.sum::<usize>() * bytes) as f64);
    bench.time("adam_step [1024, 512] and 36 x [512]", cost, || P::adam_step(inputs.clone(), None))?;
    bench.time("adam_step, reference [1024, 512] and 36 x [512]", cost, || {
        update::adam_step(inputs.clone(), None)
    })
}

/// The steps before and after Newton-Schulz of 18 matrices.
fn muon<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (count, [rows, columns], dtype) = (18, [512, 512], bench.dtype);
    let copy = (dtype == DType::BF16).then_some(dtype);
    let matrix = || wide(bench.random([rows, columns]));
    let grad = |_| MomentumInput { grad: matrix(), buffer: Some(matrix()), bf16: false };
    let grads: Vec<MomentumInput<P>> = (0..count).map(grad).collect();
    let value = |_| OrthogonalInput { value: matrix(), lr: 0.04, weight_decay: 0.0, bf16: false, copy };
    let values: Vec<OrthogonalInput<P>> = (0..count).map(value).collect();
    let updates: Tensor<P, 3> = bench.random([count, rows, columns]);
    let config = MomentumConfig { momentum: 0.95, nesterov: true, dtype };
    let cost = |bytes: usize| Cost::bytes((count * rows * columns * bytes) as f64);
    let size = format!("{count} x [{rows}, {columns}]");
    let moved = cost(12 + dtype.size());
    bench.time(format!("momentum_step {size}"), moved, || P::momentum_step(grads.clone(), config, None))?;
    bench.time(format!("momentum_step, reference {size}"), moved, || {
        update::momentum_step(grads.clone(), config, None)
    })?;
    let moved = cost(8 + dtype.size() + copy.map_or(0, |copy| copy.size()));
    bench.time(format!("orthogonal_step {size}"), moved, || {
        P::orthogonal_step(values.clone(), updates.clone(), true)
    })?;
    bench.time(format!("orthogonal_step, reference {size}"), moved, || {
        update::orthogonal_step(values.clone(), updates.clone(), true)
    })
}

/// What clips, and what averages.
fn gradients<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (count, elements) = (54, 512 * 512);
    let row = |_| wide(bench.random([elements]));
    let rows: Vec<Tensor<P, 1>> = (0..count).map(row).collect();
    let cost = |bytes: usize| Cost::bytes((count * elements * bytes) as f64);
    let size = format!("{count} x [{elements}]");
    bench.time(format!("clip_factor {size}"), cost(4), || P::clip_factor(rows.clone(), 1.0))?;
    bench
        .time(format!("clip_factor, reference {size}"), cost(4), || update::clip_factor(rows.clone(), 1.0))?;
    let pairs: Vec<[Tensor<P, 1>; 2]> = rows.iter().map(|row| [row.clone(), row.clone()]).collect();
    bench.time(format!("blend {size}"), cost(12), || P::blend(pairs.clone(), [0.999, 0.001]))?;
    bench.time(format!("blend, reference {size}"), cost(12), || update::blend(pairs.clone(), [0.999, 0.001]))
}

/// All of `baseline`'s update; where there are few rows, of one layer.
fn step<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let mut recipe = Recipe::load("baseline")?;
    if bench.rows < 65_536 {
        recipe.set("num_layers=1")?;
    }
    let model = Model::<P>::new(&recipe, bench.device, bench.dtype)?;
    let grad = |param: &Param<P>| wide(bench.random([param.numel()]));
    let grads: Vec<Tensor<P, 1>> = model.params().iter().map(grad).collect();
    // Values, gradients and state are read, values, copies and state written; one moment or two.
    let bytes = |param: &Param<P>| {
        let state = match group_of(&recipe, param.name(), param.shape().len()) {
            Group::Matrix => 1,
            _ => 2,
        };
        param.numel() * (12 + 8 * state + param.copy_type().map_or(0, |copy| copy.size()))
    };
    let cost = Cost::bytes(model.params().iter().map(bytes).sum::<usize>() as f64);
    let optimizers = std::cell::RefCell::new(Optimizers::new(&recipe, &model));
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
