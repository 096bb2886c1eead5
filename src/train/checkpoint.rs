//! Checkpoints: everything that a run needs to go on bit for bit, as one safetensors file a step.
//!
//! `DIR/checkpoint/step_00000100.safetensors` holds the parameters by their own names, the optimizers' state by
//! `adam.m.`, `adam.v.`, `muon.momentum.` and `average.N.` before the names, and in its metadata the step, the stream's
//! position, the training time, the recipe and the data.

use super::tensors_file::{self, TensorsFile};
use crate::data::folder::{DataFolder, Split};
use crate::data::stream::StreamPosition;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model;
use crate::optim::state_of;
use crate::recipe::Recipe;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Checkpoints that are kept; older ones are removed when a newer one is whole.
const KEEP: usize = 2;

/// The key of [`Progress`] in a checkpoint's metadata.
const PROGRESS: &str = "progress";

/// The longest recipe that is read from a checkpoint, in bytes.
const MAX_RECIPE_BYTES: usize = 1 << 20;

/// The data of a run, to go on with the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSource {
    /// The folder of shards, as an absolute path.
    pub dir: String,
    /// `byte`, or the tokenizer's model file as an absolute path.
    pub tokenizer: String,
    /// Name and bytes of each train shard.
    pub train: Vec<(String, u64)>,
}

impl DataSource {
    /// The shards of `folder`, and how their tokenizer was named.
    pub fn of(folder: &DataFolder, tokenizer: &str) -> Result<Self> {
        let absolute = |path: &Path| {
            std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).display().to_string()
        };
        let shard = |path: &PathBuf| {
            let bytes = fs::metadata(path).map_err(|error| Error::read(path, &error))?.len();
            Ok((path.file_name().unwrap_or_default().to_string_lossy().into_owned(), bytes))
        };
        Ok(Self {
            dir: absolute(folder.dir()),
            tokenizer: if tokenizer == "byte" { tokenizer.to_string() } else { absolute(tokenizer.as_ref()) },
            train: folder.shards(Split::Train).iter().map(shard).collect::<Result<_>>()?,
        })
    }
}

/// A run's progress beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Completed optimizer steps.
    pub step: usize,
    /// Where the training stream goes on.
    pub position: StreamPosition,
    /// Training time so far in milliseconds, validation left out.
    pub train_ms: f64,
    /// Mean loss of the last step in nats; `None` before the first.
    pub train_loss: Option<f64>,
    /// Steps of each row of optimizer state.
    pub state_steps: BTreeMap<String, u64>,
    /// The resolved recipe.
    pub recipe_toml: String,
    /// What it is trained on.
    pub data: DataSource,
}

impl Progress {
    /// The resolved recipe.
    pub fn recipe(&self, place: &Path) -> Result<Recipe> {
        if self.recipe_toml.len() > MAX_RECIPE_BYTES {
            let what = format!("recipe of {} bytes", self.recipe_toml.len());
            return Err(Error::input(what, place.display(), format!("at most {MAX_RECIPE_BYTES}")));
        }
        let recipe = Recipe::from_toml(&self.recipe_toml, place)?;
        model::check(&recipe)?;
        Ok(recipe)
    }
}

/// A checkpoint in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Progress and recipe.
    pub progress: Progress,
    /// Parameters.
    pub params: Vec<HostTensor>,
    /// Optimizer state, by name.
    pub state: Vec<HostTensor>,
}

impl Checkpoint {
    /// Writes the checkpoint of its step under `dir/checkpoint` and keeps of the others the newest one before it: later
    /// steps are of a run that this one has replaced.
    pub fn save(&self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join("checkpoint").join(format!("step_{:08}.safetensors", self.progress.step));
        let progress = serde_json::to_string(&self.progress)
            .map_err(|error| Error::failed(error, path.display(), "progress that JSON can hold"))?;
        let tensors: Vec<&HostTensor> = self.params.iter().chain(&self.state).collect();
        tensors_file::write(&path, &tensors, BTreeMap::from([(PROGRESS.to_string(), progress)]))?;
        let (upto, later): (Vec<_>, Vec<_>) = list(dir).into_iter().partition(|other| *other <= path);
        for old in upto.into_iter().rev().skip(KEEP).chain(later) {
            let _ = fs::remove_file(old);
        }
        Ok(path)
    }

    /// Reads one checkpoint file.
    pub fn load(path: &Path) -> Result<Self> {
        let (file, progress) = open(path)?;
        let is_state = |tensor: &HostTensor| state_of(&tensor.name).is_some();
        let (state, params) = file.read()?.into_iter().partition(is_state);
        Ok(Self { progress, params, state })
    }
}

/// Opens a checkpoint: its progress, and its tensors, which are known to fit its recipe but not yet read.
pub fn open(path: &Path) -> Result<(TensorsFile, Progress)> {
    let file = TensorsFile::open(path)?;
    let bad = |what: String| Error::input(what, path.display(), "a checkpoint that fairway wrote");
    let progress = file.metadata().get(PROGRESS).ok_or_else(|| bad("no progress in its metadata".into()))?;
    let progress: Progress =
        serde_json::from_str(progress).map_err(|error| bad(format!("bad progress ({error})")))?;
    file.expect(&progress.recipe(path)?, true)?;
    Ok((file, progress))
}

/// The newest checkpoint of a run for which `read` succeeds; of a newer one `warn` is told why it was passed over.
pub fn newest<T>(
    dir: &Path,
    warn: &mut dyn FnMut(&str),
    mut read: impl FnMut(&Path) -> Result<T>,
) -> Result<(PathBuf, T)> {
    for path in list(dir).into_iter().rev() {
        match read(&path) {
            Ok(value) => return Ok((path, value)),
            Err(error) => warn(&format!("{error}; taking an older checkpoint")),
        }
    }
    Err(Error::input("no whole checkpoint", dir.join("checkpoint").display(), "step_*.safetensors of a run"))
}

/// The checkpoints of a run, oldest first.
pub fn list(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir.join("checkpoint")) else { return Vec::new() };
    let is_checkpoint = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("step_") && name.ends_with(".safetensors")
    };
    let mut paths: Vec<_> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_checkpoint).collect();
    // As numbers: names have eight digits, steps may have nine.
    paths.sort_by_cached_key(|path| (path.as_os_str().len(), path.clone()));
    paths
}
