//! `FILE|RUN`: an artifact, or the folder of a run.

use super::output;
use crate::artifact::assemble::Contents;
use crate::artifact::container::{Container, Kind};
use crate::artifact::{self, Artifact};
use crate::data::byte_table::ByteTable;
use crate::error::Result;
use crate::eval::text::Weights;
use crate::train::run::TrainedRun;
use std::path::Path;

/// A model as a file or folder holds it.
pub struct Source {
    /// What scoring and sampling need.
    pub contents: Contents,
    /// Quantisation and codec of an artifact; none of a run.
    pub packing: Option<(String, String)>,
    /// The file or folder.
    place: String,
}

impl Source {
    /// Reads an artifact or a run.
    pub fn load(path: &Path) -> Result<Self> {
        let place = path.display().to_string();
        if path.is_dir() {
            return Ok(Self { contents: of_run(path)?, packing: None, place });
        }
        let artifact = Artifact::read(path)?;
        let codec = Container::open(path)?.section(Kind::TensorData).codec.to_string();
        Self::of_artifact(&artifact, &codec, &place)
    }

    /// What an artifact holds that `codec` packs; `place` is the file, for errors.
    pub fn of_artifact(artifact: &Artifact, codec: &str, place: &str) -> Result<Self> {
        let packing = Some((artifact.quant.clone(), codec.to_owned()));
        Ok(Self { contents: artifact.contents(place)?, packing, place: place.to_owned() })
    }

    /// The weights for a device.
    pub fn weights(&self) -> Weights<'_> {
        Weights { recipe: &self.contents.recipe, params: &self.contents.params, place: &self.place }
    }
}

fn of_run(path: &Path) -> Result<Contents> {
    let run = TrainedRun::load(path, &mut |line| output::warn(line))?;
    let byte_table = ByteTable::new(&run.tokenizer, run.recipe.vocab_size)?;
    Ok(Contents { recipe: run.recipe, tokenizer: run.tokenizer, byte_table, params: run.params })
}

/// Whether the file is an artifact (a folder or anything else is not).
pub fn is_artifact(path: &Path) -> bool {
    path.is_file() && artifact::is_artifact(path)
}
