//! What a resumed run must have in common with the one that it continues, and its state put back.

use super::checkpoint::{DataSource, Progress};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::params;
use crate::ops::Plain;
use crate::optim::step::Trainer;
use crate::optim::{OptimizerState, state_of};
use crate::recipe::{Recipe, keys};

/// Keys that may change when a run is resumed: how long it goes on, and what it reports on the way.
const FREE_KEYS: [&str; 8] = [
    "name",
    "summary",
    "iterations",
    "max_wallclock_seconds",
    "warmup_steps",
    "val_batch_size",
    "val_loss_every",
    "train_log_every",
];

/// Refuses a recipe or data that are not the checkpoint's where that would change what was computed so far.
pub(super) fn check_same_run(recipe: &Recipe, data: &DataSource, saved: &Progress) -> Result<()> {
    let old = saved.recipe("the checkpoint".as_ref())?;
    for key in keys().iter().filter(|key| !FREE_KEYS.contains(&key.name)) {
        if key.value(recipe) != key.value(&old) {
            return Err(Error::input(
                format!("{} differs from the resumed run's", key.name),
                format!("recipe key {}", key.name),
                "the value that the run was started with",
            ));
        }
    }
    if data.train != saved.data.train {
        return Err(Error::input(
            format!("train shards of {} differ from the resumed run's", data.dir),
            "--data",
            format!("the shards that the run was started with, in {}", saved.data.dir),
        ));
    }
    if saved.step > recipe.iterations {
        return Err(Error::input(
            format!("iterations={} is before the checkpoint's step {}", recipe.iterations, saved.step),
            "recipe key iterations",
            "at least the steps that are done",
        ));
    }
    Ok(())
}

/// Puts parameters and optimizer state back.
pub(super) fn restore<P: Plain>(
    trainer: &mut Trainer<P>,
    recipe: &Recipe,
    progress: &Progress,
    weights: &[HostTensor],
    state: &[HostTensor],
) -> Result<()> {
    let model = &trainer.model;
    model.params().load(weights, "the checkpoint")?;
    let mut restored = OptimizerState::default();
    for tensor in state {
        let name = &tensor.name;
        let param = state_of(name).and_then(|(param, _)| model.params().get(param));
        let (Some(param), Some(steps)) = (param, progress.state_steps.get(name)) else {
            return Err(Error::input(format!("unknown state {name}"), "the checkpoint", "the recipe's own"));
        };
        tensor.expect_shape(&[param.numel()], "the checkpoint")?;
        restored.push(name.clone(), params::from_host(tensor, model.device(), param.master_type()), *steps);
    }
    trainer.optimizers.restore(&mut restored);
    trainer.averages.restore(&mut restored);
    model.set_recurrent(recipe.recurs_at(progress.step.saturating_sub(1)));
    Ok(())
}
