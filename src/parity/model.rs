//! `model.challenge`: a whole model's loss, logits, activations and every parameter's gradient.

use super::case::{Case, integers};
use super::fixture::Tensors;
use super::index::Entry;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::Model;
use crate::ops::{Autodiff, Backend, Plain, reduce};
use crate::recipe::{Recipe, keys};
use burn::tensor::{Int, Tensor};
use serde_json::Value;

/// The arguments of the peers' model that decide what it computes.
const NEEDED: [&str; 9] = [
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_mult",
    "tie_embeddings",
    "logit_softcap",
    "rope_base",
];

/// The arguments that only decide what it starts from, and the norms' epsilon, where it is not float32's.
const OPTIONAL: [&str; 3] = ["tied_embed_init_std", "qk_gain_init", "rms_eps"];

/// The recipe of an entry's `env` and `config` for `ids[spans, batch, time]` in a step.
///
/// The norms' epsilon is float32's unless the config has another or a note says that the peer's was float64's, which is
/// what PyTorch takes for a model that computes in float64.
pub(super) fn recipe<P: Plain>(case: &Case<'_, P>, [spans, batch, time]: [usize; 3]) -> Result<Recipe> {
    let mut recipe = env_recipe(case.entry)?;
    let attributes = case.entry.section("attrs")?;
    if let Some((name, _)) = attributes.iter().next() {
        return Err(Error::input(format!("unknown attribute {name}"), "attrs", "none for this kind"));
    }
    let config = case.entry.section("config")?;
    config.only(&[NEEDED.as_slice(), &OPTIONAL].concat())?;
    if let Some(key) = NEEDED.iter().find(|key| config.get(key).is_none()) {
        return Err(Error::input(format!("no {key}"), "config", "every argument of the model"));
    }
    for (key, value) in config.iter().filter(|(key, _)| !key.starts_with("note")) {
        recipe.set(&format!("{key}={}", text(value))).map_err(|error| placed(error, "config"))?;
    }
    if config.get("rms_eps").is_none() && case.entry.says("RMS eps = float64 machine epsilon") {
        recipe.rms_eps = f64::EPSILON;
    }
    recipe.train_seq_len = time;
    recipe.grad_accum_steps = spans;
    recipe.train_batch_tokens = spans * batch * time;
    recipe.val_batch_size = recipe.train_batch_tokens;
    checked(recipe, "config")
}

/// The recipe, if it can be built; `place` is where what it lacks comes from.
pub(super) fn checked(recipe: Recipe, place: &str) -> Result<Recipe> {
    recipe.validate().map_err(|error| placed(error, place))?;
    Ok(recipe)
}

/// The challenge's defaults under an entry's `env`. Nothing is kept in bf16.
pub(super) fn env_recipe(entry: &Entry) -> Result<Recipe> {
    let mut recipe = Recipe { name: "fixture".into(), as_written: false, ..Recipe::default() };
    let env = entry.section("env")?;
    let known = |name: &str| keys().iter().any(|key| key.env == Some(name));
    if let Some((name, _)) = env.iter().find(|(name, _)| !known(name)) {
        return Err(Error::input(format!("unknown name {name}"), "env", "the challenge's names"));
    }
    recipe.apply_env_map(env.iter().map(|(name, value)| (name, text(value))))?;
    Ok(recipe)
}

/// A value as a flag or an environment variable spells it.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

/// The same error about another place.
fn placed(error: Error, place: &str) -> Error {
    match error {
        Error::Input { what, expected, .. } => Error::input(what, place, expected),
        other => other,
    }
}

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
        // The peers' model of one block has skip weights of no rows.
        .filter(|(_, tensor)| tensor.numel() > 0)
        .map(|(own, tensor)| HostTensor { name: own.into(), ..tensor.clone() })
        .collect();
    let elements: usize = params.iter().map(HostTensor::numel).sum();
    // A small file must not make a large model; what is missing within reason is named below.
    if recipe.param_count() > 2 * elements as u64 + (1 << 20) {
        return Err(Error::input(
            format!("{prefix}* has {elements} elements"),
            "the file",
            format!("the {} of the config", recipe.param_count()),
        ));
    }
    let model = Model::new(recipe, case.device, case.dtype)?;
    model.params().load(&params, "the file")?;
    Ok(model)
}

/// Ids and targets of one batch, as integers on the device.
pub(super) type Batch<B> = [Tensor<B, 2, Int>; 2];

/// The mean loss of a batch in nats, `[1]`.
pub(super) fn mean_loss<P: Plain, B: Backend<Plain = P>>(
    model: &Model<P>,
    [ids, targets]: Batch<B>,
) -> Tensor<B, 1> {
    let nll = model.nll::<B>(ids, targets);
    let share = 1.0 / nll.dims()[0] as f64;
    // Not a division: Burn differentiates one by a scalar with the scalar rounded to f32.
    reduce::sum(nll).mul_scalar(share)
}

/// Runs the model on `in.ids[b, t]` and `in.targets[b, t]`.
pub(super) fn challenge<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let &[batch, time] = case.host("in.ids")?.shape.as_slice() else {
        return Err(Error::input("in.ids is no matrix", "the file", "[batch, time]"));
    };
    let recipe = recipe(case, [1, batch, time])?;
    case.expect_shape("in.targets", &[batch, time])?;
    let (ids, _) = case.ids("in.ids", recipe.vocab_size)?;
    let (targets, _) = case.ids("in.targets", recipe.vocab_size)?;
    let model = build(case, &recipe, &case.tensors, "param.")?;

    // The plain forward gives the activations and the logits, the tracked one the loss and the gradients.
    let mut activations = Vec::new();
    let mut trace = |x| activations.push(x);
    let plain = integers::<P, 2>(ids.clone(), [batch, time], case.device);
    let hidden = model.hidden::<P>(plain, None, Some(&mut trace));
    for (index, activation) in activations.into_iter().enumerate() {
        let name = format!("act.{index:02}.blocks.{index}");
        case.give(&name, &[batch, time, recipe.model_dim], Some(activation))?;
    }
    let shape = [batch, time, recipe.vocab_size];
    if case.expects("out.logits", &shape) {
        case.give("out.logits", &shape, Some(model.logits::<P>(hidden)))?;
    }

    let tracked = [ids, targets].map(|values| integers(values, [batch, time], case.device));
    let loss = mean_loss::<P, Autodiff<P>>(&model, tracked);
    case.give("out.loss", &[1], Some(loss.clone().inner()))?;
    loss.backward();
    for param in model.params().iter() {
        case.give(&format!("grad.{}", param.name()), param.shape(), param.take_flat_grad())?;
    }
    Ok(())
}
