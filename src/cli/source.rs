//! `FILE|RUN`: an artifact, or the folder of a run.

use super::output;
use crate::artifact::{self, Artifact, assemble::Contents};
use crate::data::byte_table::ByteTable;
use crate::error::Result;
use crate::model::Model;
use crate::ops::Plain;
use crate::train::run::TrainedRun;
use burn::tensor::DType;
use std::path::Path;

/// Reads what scoring and sampling need from an artifact or a run.
pub fn load(path: &Path) -> Result<Contents> {
    if path.is_dir() {
        let run = TrainedRun::load(path, &mut |line| output::warn(line))?;
        let byte_table = ByteTable::new(&run.tokenizer, run.recipe.vocab_size)?;
        return Ok(Contents {
            recipe: run.recipe,
            tokenizer: run.tokenizer,
            byte_table,
            params: run.params,
        });
    }
    Artifact::read(path)?.contents(&path.display().to_string())
}

/// Whether the file is an artifact (a folder or anything else is not).
pub fn is_artifact(path: &Path) -> bool {
    path.is_file() && artifact::is_artifact(path)
}

/// The model with its weights on a device.
pub fn model<P: Plain>(contents: &Contents, place: &Path, device: &P::Device, dtype: DType) -> Result<Model<P>> {
    let model = Model::<P>::new(&contents.recipe, device, dtype)?;
    model.params().load(&contents.params, &place.display().to_string())?;
    Ok(model)
}
