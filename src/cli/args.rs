//! Arguments that several commands share.

use super::{output, progress};
use crate::backend::{self, DeviceChoice, Precision, Target};
use crate::data::demo::{self, DemoOptions};
use crate::data::folder::DataFolder;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Where to compute.
#[derive(clap::Args)]
pub struct DeviceArgs {
    /// Device: auto (CUDA, else a hardware wgpu adapter, else the CPU), cpu, wgpu[:N], cuda[:N]
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: String,
    /// Arithmetic: f64 (cpu), f32, bf16 (cuda); default f32 on cpu and wgpu, bf16 activations on cuda
    #[arg(long, value_name = "PRECISION")]
    precision: Option<String>,
}

impl DeviceArgs {
    /// The device asked for, at `default`'s precision unless the user named one.
    pub fn resolve(&self, default: impl Fn(&Target) -> Precision) -> Result<Target> {
        let choice: DeviceChoice = self.device.parse()?;
        let precision: Option<Precision> = self.precision.as_deref().map(str::parse).transpose()?;
        let target = backend::resolve(&choice, precision)?;
        if precision.is_none() && default(&target) != target.precision {
            return backend::resolve(&choice, Some(default(&target)));
        }
        Ok(target)
    }

    /// The device asked for, at its own default precision.
    pub fn target(&self) -> Result<Target> {
        self.resolve(|target| target.precision)
    }

    /// Prints which device was taken and why.
    pub fn announce(target: &Target) {
        output::line(format!("device: {} precision:{} ({})", target.label, target.precision, target.why));
    }
}

/// The folder that generated data is kept in: `FAIRWAY_CACHE`, or the user's cache folder.
pub fn cache_dir() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("FAIRWAY_CACHE")
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| dir.join("fairway")))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/fairway")))
        .unwrap_or_else(|| PathBuf::from(".fairway-cache"))
}

/// Where the demo corpus is kept.
pub fn demo_dir() -> PathBuf {
    cache_dir().join("demo")
}

/// The folder of the demo corpus of the `byte` tokenizer, built if absent.
pub fn demo_data() -> Result<PathBuf> {
    let dir = demo_dir();
    if !demo::is_built(&dir, &Tokenizer::byte()) {
        demo::build(&DemoOptions::new(dir.clone()), &progress::callback("demo corpus"))?;
    }
    Ok(dir)
}

/// The tokenizer named by `--tokenizer`, or the one that the shards' folder implies.
///
/// Without a name: `byte` where the folder's record says so, else the model of the recipe's vocabulary size where the
/// challenge's layout keeps it (`../../tokenizers/fineweb_<V>_bpe.model` beside the folder).
pub fn tokenizer(named: Option<&str>, data: &Path, vocab_size: usize) -> Result<(Tokenizer, String)> {
    if let Some(name) = named {
        return Ok((Tokenizer::load(name)?, name.to_string()));
    }
    let folder = DataFolder::open(data)?;
    if folder.info().is_some_and(|info| info.tokenizer.kind == "byte") {
        return Ok((Tokenizer::byte(), "byte".into()));
    }
    let model = format!("tokenizers/fineweb_{vocab_size}_bpe.model");
    let places = [data.join("../..").join(&model), data.join("..").join(&model), data.join(&model)];
    match places.iter().find(|path| path.exists()) {
        Some(path) => {
            let name = path.display().to_string();
            Ok((Tokenizer::load(&name)?, name))
        }
        None => Err(Error::input(
            format!("no tokenizer for the shards in {}", data.display()),
            "--tokenizer",
            "`byte`, or the .model file that the shards were made with",
        )),
    }
}
