//! A run's folder: what training leaves in it, and how scoring, sampling, export and inspection read it.
//!
//! `recipe.toml` (resolved), `tokenizer.json` (kind and pieces), `train.log`, `metrics.jsonl`, `curve.svg`,
//! `checkpoint/`, and at the end `final.safetensors` (the parameters by the peers' names).

use super::checkpoint::{self, Checkpoint};
use super::tensors_file::{Entry, TensorsFile};
use crate::data::tokenizer::{Piece, PieceKind, Tokenizer};
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::host::HostTensor;
use crate::model;
use crate::optim::state_of;
use crate::recipe::Recipe;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The final parameters' file.
pub const FINAL: &str = "final.safetensors";

/// The key of the completed steps in that file's metadata.
pub const STEPS: &str = "steps";

/// The longest `tokenizer.json` and `recipe.toml` that are read, in bytes.
const MAX_TOKENIZER_BYTES: u64 = 16 << 20;
const MAX_RECIPE_BYTES: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct TokenizerFile {
    kind: String,
    pieces: Vec<(String, f32, u8)>,
}

/// Saves what a run is beside what it learns, so that its folder stands alone.
pub fn save_identity(dir: &Path, recipe: &Recipe, tokenizer: &Tokenizer) -> Result<()> {
    let pieces = tokenizer.pieces().iter().map(|p| (p.text.clone(), p.score, p.kind as u8)).collect();
    let file = TokenizerFile { kind: tokenizer.kind().to_string(), pieces };
    let path = dir.join("tokenizer.json");
    let text = serde_json::to_vec(&file)
        .map_err(|error| Error::failed(error, path.display(), "pieces that JSON can hold"))?;
    write_atomic(&path, &text)?;
    write_atomic(&dir.join("recipe.toml"), recipe.to_toml().as_bytes())
}

/// The recipe of the run in `dir`.
pub fn load_recipe(dir: &Path) -> Result<Recipe> {
    let path = dir.join("recipe.toml");
    let text = String::from_utf8(read_small(&path, MAX_RECIPE_BYTES)?)
        .map_err(|_| Error::input("not a text file", path.display(), "the recipe that fairway saved"))?;
    let recipe = Recipe::from_toml(&text, &path)?;
    model::check(&recipe)?;
    Ok(recipe)
}

/// The tokenizer of the run in `dir`.
pub fn load_tokenizer(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let text = read_small(&path, MAX_TOKENIZER_BYTES)?;
    let bad = |error: String| Error::input(error, path.display(), "the tokenizer that fairway saved");
    let file: TokenizerFile = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    let place = path.display().to_string();
    let pieces: Result<Vec<Piece>> = file
        .pieces
        .into_iter()
        .map(|(text, score, kind)| {
            let kind = PieceKind::from_code(kind.into()).ok_or_else(|| bad(format!("piece kind {kind}")))?;
            Ok(Piece { text, score, kind })
        })
        .collect();
    Tokenizer::from_pieces(&file.kind, pieces?, &place)
}

/// A file of at most `limit` bytes.
fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>> {
    // Asked before it is opened: opening a pipe would wait for its writer.
    if !fs::metadata(path).map_err(|error| Error::read(path, &error))?.is_file() {
        return Err(Error::input("not a regular file", path.display(), "a file of a run"));
    }
    let mut bytes = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(limit + 1).read_to_end(&mut bytes));
    read.map_err(|error| Error::read(path, &error))?;
    if bytes.len() as u64 > limit {
        return Err(Error::input("file too large", path.display(), format!("at most {limit} bytes")));
    }
    Ok(bytes)
}

/// A trained model in host memory, from a run's folder.
#[derive(Debug)]
pub struct TrainedRun {
    /// The resolved recipe, its recurrence settled as it was at the end.
    pub recipe: Recipe,
    /// The parameters.
    pub params: Vec<HostTensor>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The file that the parameters came from.
    pub source: PathBuf,
}

impl TrainedRun {
    /// Reads a run: its final parameters, or those of its newest checkpoint that is whole. `warn` is told of checkpoints
    /// that are not.
    pub fn load(dir: &Path, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        let (mut recipe, tokenizer) = (load_recipe(dir)?, load_tokenizer(dir)?);
        let last = dir.join(FINAL);
        let (source, params) = if last.exists() {
            let file = TensorsFile::open(&last)?;
            file.expect(&recipe, false)?;
            let steps = file.metadata().get(STEPS).and_then(|steps| steps.parse().ok());
            recipe.settle_recurrence(steps.unwrap_or(recipe.iterations));
            (last, file.read()?)
        } else {
            let (path, checkpoint) = checkpoint::newest(dir, warn, Checkpoint::load)?;
            recipe.settle_recurrence(checkpoint.progress.step);
            (path, checkpoint.params)
        };
        Ok(Self { recipe, params, tokenizer, source })
    }
}

/// What a run's folder holds, without its parameters in memory.
#[derive(Debug)]
pub struct RunInspection {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The parameters' names, shapes and types.
    pub tensors: Vec<Entry>,
    /// The file that the parameters are in.
    pub source: PathBuf,
    /// The size of that file.
    pub bytes: u64,
}

impl RunInspection {
    /// Looks into the folder as [`TrainedRun::load`] would, checksums included, in little memory.
    pub fn of(dir: &Path, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        let recipe = load_recipe(dir)?;
        load_tokenizer(dir)?;
        let last = dir.join(FINAL);
        let (source, mut tensors) = if last.exists() {
            let file = TensorsFile::open(&last)?;
            file.expect(&recipe, false)?;
            let tensors = file.entries().to_vec();
            file.verify()?;
            (last, tensors)
        } else {
            checkpoint::newest(dir, warn, |path| {
                let (file, _) = checkpoint::open(path)?;
                let tensors = file.entries().to_vec();
                file.verify()?;
                Ok(tensors)
            })?
        };
        tensors.retain(|entry| state_of(&entry.name).is_none());
        let bytes = fs::metadata(&source).map_err(|error| Error::read(&source, &error))?.len();
        Ok(Self { recipe, tensors, source, bytes })
    }
}
