//! Checkpoints: everything that a run needs to go on bit for bit, as one safetensors file a step.
//!
//! `DIR/checkpoint/step_00000100.safetensors` holds the parameters by their own names, the optimizers' state by
//! `adam.m.`, `adam.v.` and `muon.momentum.` before the names, and in its metadata the step, the stream's position, the
//! training time, the recipe and a SHA-256 of the tensors.

use crate::data::stream::StreamPosition;
use crate::error::{Error, Result};
use crate::files;
use crate::host::{HostTensor, HostType};
use crate::optim::STATE_PREFIXES;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

/// Checkpoints that are kept; older ones are removed when a newer one is whole.
const KEEP: usize = 2;

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
    /// Writes the checkpoint of its step under `dir/checkpoint` and removes all but the newest ones.
    pub fn save(&self, dir: &Path) -> Result<PathBuf> {
        let folder = dir.join("checkpoint");
        let path = folder.join(format!("step_{:08}.safetensors", self.progress.step));
        let progress = serde_json::to_string(&self.progress)
            .map_err(|error| Error::failed(error, path.display(), "progress that JSON can hold"))?;
        let tensors: Vec<&HostTensor> = self.params.iter().chain(&self.state).collect();
        write_tensors(&path, &tensors, HashMap::from([("progress".to_string(), progress)]))?;
        for old in list(dir).into_iter().rev().skip(KEEP) {
            let _ = fs::remove_file(old);
        }
        Ok(path)
    }

    /// Reads one checkpoint file.
    pub fn load(path: &Path) -> Result<Self> {
        let (tensors, metadata) = read_tensors(path)?;
        let bad = |what: String| Error::input(what, path.display(), "a checkpoint that fairway wrote");
        let progress = metadata.get("progress").ok_or_else(|| bad("no progress in its metadata".into()))?;
        let progress = serde_json::from_str(progress).map_err(|error| bad(format!("bad progress ({error})")))?;
        let is_state = |tensor: &HostTensor| STATE_PREFIXES.iter().any(|prefix| tensor.name.starts_with(prefix));
        let (state, params) = tensors.into_iter().partition(is_state);
        Ok(Self { progress, params, state })
    }

    /// The newest checkpoint of a run that is whole; a broken newer one is told to `warn` and passed over.
    pub fn latest(dir: &Path, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        for path in list(dir).into_iter().rev() {
            match Self::load(&path) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(error) => warn(&error.to_string()),
            }
        }
        Err(Error::input("no checkpoint that is whole", dir.join("checkpoint").display(), "step_*.safetensors"))
    }
}

/// The checkpoints of a run, oldest first.
pub fn list(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir.join("checkpoint")) else { return Vec::new() };
    let is_checkpoint = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("step_") && name.ends_with(".safetensors")
    };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_checkpoint).collect();
    paths.sort();
    paths
}

fn digest(tensors: &[&HostTensor]) -> String {
    let mut hasher = Sha256::new();
    for tensor in tensors {
        hasher.update(tensor.name.as_bytes());
        hasher.update(&tensor.bytes);
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes tensors as safetensors with a SHA-256 of them in its metadata, whole or not at all.
pub fn write_tensors(path: &Path, tensors: &[&HostTensor], mut metadata: HashMap<String, String>) -> Result<()> {
    let mut sorted = tensors.to_vec();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    metadata.insert("sha256".into(), digest(&sorted));
    let views: Result<Vec<_>, _> = sorted
        .iter()
        .map(|tensor| {
            let dtype = match tensor.dtype {
                HostType::F64 => Dtype::F64,
                HostType::F32 => Dtype::F32,
                HostType::F16 => Dtype::F16,
                HostType::BF16 => Dtype::BF16,
                HostType::I8 => Dtype::I8,
                HostType::I32 => Dtype::I32,
                HostType::I64 => Dtype::I64,
                HostType::U8 => Dtype::U8,
            };
            Ok((tensor.name.as_str(), TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes)?))
        })
        .collect();
    let bytes = views
        .and_then(|views| safetensors::serialize(views, Some(metadata)))
        .map_err(|error| Error::failed(error, path.display(), "tensors that safetensors can hold"))?;
    files::write_atomic(path, &bytes)
}

/// Reads a safetensors file, sizes and (where it has one) SHA-256 checked.
pub fn read_tensors(path: &Path) -> Result<(Vec<HostTensor>, HashMap<String, String>)> {
    let bytes = fs::read(path).map_err(|error| Error::read(path, &error))?;
    let bad = |what: String| Error::input(what, path.display(), "a whole safetensors file");
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| bad(format!("broken ({error})")))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| bad(format!("broken ({error})")))?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let dtype = match view.dtype() {
            Dtype::F64 => HostType::F64,
            Dtype::F32 => HostType::F32,
            Dtype::F16 => HostType::F16,
            Dtype::BF16 => HostType::BF16,
            Dtype::I8 => HostType::I8,
            Dtype::I32 => HostType::I32,
            Dtype::I64 => HostType::I64,
            Dtype::U8 => HostType::U8,
            other => return Err(bad(format!("tensor {name} has type {other:?}"))),
        };
        let (shape, bytes) = (view.shape().to_vec(), view.data().to_vec());
        tensors.push(HostTensor { name: name.to_string(), shape, dtype, bytes });
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let metadata = header.metadata().clone().unwrap_or_default();
    if let Some(sha256) = metadata.get("sha256")
        && *sha256 != digest(&tensors.iter().collect::<Vec<_>>())
    {
        return Err(bad("its tensors do not match its SHA-256".into()));
    }
    Ok((tensors, metadata))
}
