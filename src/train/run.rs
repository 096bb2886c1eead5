//! A run's folder: what training leaves in it, and how scoring, sampling and export read it.
//!
//! `recipe.toml` (resolved), `tokenizer.json` (kind and pieces), `train.log`, `metrics.jsonl`, `curve.svg`,
//! `checkpoint/`, and at the end `final.safetensors` (the parameters by the peers' names).

use super::checkpoint::{Checkpoint, list, read_tensors};
use crate::data::tokenizer::{Piece, PieceKind, Tokenizer};
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::host::HostTensor;
use crate::recipe::Recipe;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// The final parameters' file.
pub const FINAL: &str = "final.safetensors";

/// The longest `tokenizer.json` that is read, in bytes.
const MAX_TOKENIZER_BYTES: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct TokenizerFile {
    kind: String,
    pieces: Vec<(String, f32, u8)>,
}

/// Saves a tokenizer beside the run, so that the run stands alone.
pub fn save_tokenizer(dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let pieces = tokenizer.pieces().iter().map(|p| (p.text.clone(), p.score, p.kind as u8)).collect();
    let file = TokenizerFile { kind: tokenizer.kind().to_string(), pieces };
    let path = dir.join("tokenizer.json");
    let text = serde_json::to_vec(&file)
        .map_err(|error| Error::failed(error, path.display(), "pieces that JSON can hold"))?;
    write_atomic(&path, &text)
}

/// The tokenizer that [`save_tokenizer`] wrote.
pub fn load_tokenizer(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("tokenizer.json");
    let size = fs::metadata(&path).map_err(|error| Error::read(&path, &error))?.len();
    if size > MAX_TOKENIZER_BYTES {
        return Err(Error::input(format!("{size} bytes"), path.display(), "a tokenizer of at most 64 MiB"));
    }
    let text = fs::read(&path).map_err(|error| Error::read(&path, &error))?;
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

/// A trained model in host memory, from a run's folder.
#[derive(Debug)]
pub struct TrainedRun {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The parameters.
    pub params: Vec<HostTensor>,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The file that the parameters came from.
    pub source: PathBuf,
}

impl TrainedRun {
    /// Reads a run: its final parameters, or those of its newest checkpoint that is whole.
    pub fn load(dir: &Path, warn: &mut dyn FnMut(&str)) -> Result<Self> {
        let recipe = Recipe::load(&dir.join("recipe.toml").display().to_string())?;
        let tokenizer = load_tokenizer(dir)?;
        let source = dir.join(FINAL);
        if source.exists() {
            let (params, _) = read_tensors(&source)?;
            return Ok(Self { recipe, params, tokenizer, source });
        }
        let checkpoint = Checkpoint::latest(dir, warn)?;
        let source = list(dir).pop().unwrap_or_default();
        Ok(Self { recipe, params: checkpoint.params, tokenizer, source })
    }
}
