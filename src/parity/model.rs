//! `model.*`: a whole model's loss, logits, activations and every parameter's gradient.

use super::case::{Case, integers};
use super::fixture::Tensors;
use super::recipe::{placed, recipe};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::params::from_host;
use crate::model::{Model, param_count};
use crate::ops::{Base, Param, Plain, accumulate_type};
use crate::recipe::Recipe;
use burn::tensor::{Int, Tensor};

/// The model of a recipe with the parameters that `tensors` hold under `prefix`.
pub(super) fn build<P: Plain>(
    case: &Case<'_, P>,
    recipe: &Recipe,
    tensors: &Tensors,
    prefix: &str,
) -> Result<Model<P>> {
    let named = tensors.iter().filter_map(|(name, _)| Some((name, name.strip_prefix(prefix)?)));
    let params: Vec<HostTensor> = named
        .filter_map(|(name, own)| tensors.input(name).map(|tensor| (own, tensor)))
        // The peers' models of one block, or of no attention, have tensors of no rows.
        .filter(|(_, tensor)| tensor.numel() > 0)
        .map(|(own, tensor)| HostTensor { name: own.into(), ..tensor.clone() })
        .collect();
    let elements: usize = params.iter().map(HostTensor::numel).sum();
    // A small file must not make a large model; what is missing within reason is named below.
    let described = param_count(recipe).map_err(|error| placed(error, "config"))?;
    if described > 2 * elements as u64 + (1 << 20) {
        return Err(Error::input(
            format!("{prefix}* has {elements} elements"),
            "the file",
            format!("the {described} of the config"),
        ));
    }
    let model = Model::new(recipe, case.device, case.dtype)?;
    model.params().load(&params, "the file")?;
    Ok(model)
}

/// Ids and targets of one batch, as integers on the device.
pub(super) type Batch<B> = [Tensor<B, 2, Int>; 2];

/// Adds to the gradients those of a batch's mean loss in nats, as one of `spans` batches of a step; gives that share of
/// the loss, `[1]`.
pub(super) fn accumulate<P: Plain>(model: &Model<P>, [ids, targets]: Batch<P>, spans: usize) -> Tensor<P, 1> {
    let [batch, time] = ids.dims();
    let share = HostTensor::from_f64("share", &[1], &[1.0 / (batch * time * spans) as f64]);
    let share = from_host::<P>(&share, model.device(), accumulate_type(model.compute_type()));
    model.accumulate(ids, targets, &share)
}

/// Ids of `[batch, time]` on a device.
pub(super) fn batch<B: Base>(values: [&[i64]; 2], shape: [usize; 2], device: &B::Device) -> Batch<B> {
    values.map(|values| integers(values.to_vec(), shape, device))
}

/// Runs the model of any system on `in.ids[b, t]` and `in.targets[b, t]`.
pub(super) fn model<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let &[batch_size, time] = case.host("in.ids")?.shape.as_slice() else {
        return Err(Error::input("in.ids is no matrix", "the file", "[batch, time]"));
    };
    let recipe = recipe(case, [1, batch_size, time])?;
    case.expect_shape("in.targets", &[batch_size, time])?;
    let (ids, _) = case.ids("in.ids", recipe.vocab_size)?;
    let (targets, _) = case.ids("in.targets", recipe.vocab_size)?;
    let model = build(case, &recipe, &case.tensors, "param.")?;

    // The plain forward gives the activations and the logits, the tracked one the loss and the gradients.
    let mut activations = Vec::new();
    let mut trace = |name: &str, x| activations.push((name.to_string(), x));
    let [plain, _] = batch::<P>([&ids, &targets], [batch_size, time], case.device);
    let hidden = model.hidden::<P>(plain, None, Some(&mut trace));
    for (index, (name, activation)) in activations.into_iter().enumerate() {
        let name = format!("act.{index:02}.{name}");
        case.give(&name, &[batch_size, time, recipe.model_dim], Some(activation))?;
    }
    let shape = [batch_size, time, recipe.vocab_size];
    if case.expects("out.logits", &shape) {
        case.give("out.logits", &shape, Some(model.logits::<P>(hidden)))?;
    }

    let inputs = batch::<P>([&ids, &targets], [batch_size, time], case.device);
    case.give("out.loss", &[1], Some(accumulate(&model, inputs, 1)))?;
    for grad in model.params().read(&Param::take_flat_grad)? {
        case.give_host(HostTensor { name: format!("grad.{}", grad.name), ..grad });
    }
    Ok(())
}
