//! `fairway submission`.

use super::args::DeviceArgs;
use super::source::{self, Source};
use super::{eval, export, output};
use crate::artifact::Codec;
use crate::artifact::budget::CAP_BYTES;
use crate::backend::Target;
use crate::data::stream::ValTokens;
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::quant::Scheme;
use crate::recipe::Recipe;
use crate::report::losses::{self, Loss};
use crate::report::submission::{ARTIFACT, Author, Run, Submission, begin, check_folder};
use crate::train::run::load_recipe;
use std::fs;
use std::path::{Path, PathBuf};

/// Write the challenge's submission folder: README.md, submission.json, logs, artifact and code
#[derive(clap::Args)]
#[command(
    after_help = "Example: fairway submission runs/a/seed-* --out submission --data data/datasets/fineweb10B_sp1024"
)]
pub struct Args {
    /// The runs' folders, one a seed
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The submission's folder
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The artifact [default: model.fairway of the first run; packed as int8 with brotli if it has none]
    #[arg(long, value_name = "FILE")]
    artifact: Option<PathBuf>,
    /// Score the artifact on this folder's fineweb_val_*.bin; else the record states the runs' own last validation
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Name of the author
    #[arg(long, default_value = "", value_name = "NAME")]
    author: String,
    /// The author's name on GitHub
    #[arg(long, default_value = "", value_name = "ID")]
    github_id: String,
    /// Name of the submission [default: the recipe's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// What it is, in a line [default: the recipe's summary]
    #[arg(long, value_name = "TEXT")]
    blurb: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> Result<()> {
    check_folder(&args.out)?;
    // Whatever may be wrong with the input is found before anything is written.
    let (recipes, runs): (Vec<Recipe>, Vec<Run>) =
        args.runs.iter().map(|dir| read_run(dir)).collect::<Result<_>>()?;
    let (run, recipe) = (&args.runs[0], &recipes[0]);
    let own = run.join(ARTIFACT);
    let packed = args.artifact.or_else(|| own.exists().then_some(own));
    if let Some(file) = packed.as_deref().filter(|file| !source::is_artifact(file)) {
        return Err(Error::input("not an artifact", file.display(), "what `fairway export` wrote"));
    }
    let loaded = packed.as_deref().map(Source::load).transpose()?;
    let scoring = match &args.data {
        Some(data) => {
            let target = args.device.target()?;
            let val = match &loaded {
                Some(source) => eval::val_tokens(&source.contents, data)?,
                None => eval::val_tokens(&Source::load(run)?.contents, data)?,
            };
            Some((val, target))
        }
        None => None,
    };
    for (dir, other) in args.runs.iter().zip(&recipes) {
        if *other != (Recipe { seed: other.seed, ..recipe.clone() }) {
            output::warn(&format!("{} was not trained by the recipe of {}", dir.display(), run.display()));
        }
    }

    begin(&args.out)?;
    let artifact = args.out.join(ARTIFACT);
    let source = match (&packed, loaded) {
        (Some(file), Some(source)) => {
            write_atomic(&artifact, &read(file)?)?;
            source
        }
        _ => {
            export::pack(run, &artifact, Scheme::Int8, Codec::Brotli)?;
            Source::load(&artifact)?
        }
    };
    let artifact_bytes = fs::metadata(&artifact).map_err(|error| Error::read(&artifact, &error))?.len();
    let scored = scoring.map(|(val, target)| score(&source, &val, &target)).transpose()?;
    if scored.is_none() {
        output::warn(
            "the record states the runs' losses before quantisation: --data DIR scores the artifact",
        );
    }
    for (flag, text) in [("--author", &args.author), ("--github-id", &args.github_id)] {
        if text.is_empty() {
            output::warn(&format!("{flag} is empty in submission.json"));
        }
    }
    let submission = Submission {
        author: Author {
            author: args.author,
            github_id: args.github_id,
            name: args.name.unwrap_or_else(|| recipe.name.clone()),
            blurb: args.blurb.unwrap_or_else(|| recipe.summary.clone()),
        },
        runs,
        recipe_toml: recipe.to_toml(),
        scored,
        artifact_bytes,
        packing: source.packing.unwrap_or_default(),
    };
    let written = submission.write(&args.out)?;
    if args.json {
        return output::json(&serde_json::json!({
            "dir": args.out.display().to_string(),
            "bytes_total": written.bytes_total,
            "bytes_code": written.bytes_code,
            "bytes": artifact_bytes,
            "under_cap": written.under_cap,
            "val_loss": written.loss.val_loss,
            "val_bpb": written.loss.val_bpb,
        }));
    }
    let verdict = if written.under_cap { "under" } else { "OVER" };
    output::line(format!("submission: {}", args.out.display()));
    output::line(format!(
        "bytes_total:{} bytes_code:{} ({verdict} the cap of {CAP_BYTES} bytes)",
        written.bytes_total, written.bytes_code
    ));
    Ok(())
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).map_err(|error| Error::read(file, &error))
}

/// A run's recipe, and what the submission takes from its folder.
fn read_run(dir: &Path) -> Result<(Recipe, Run)> {
    if !dir.is_dir() {
        return Err(Error::input("not a run", dir.display(), "the folder of a run"));
    }
    let recipe = load_recipe(dir)?;
    let run = Run { seed: recipe.seed, log: read(&dir.join("train.log"))?, loss: losses::read(dir)? };
    Ok((recipe, run))
}

fn score(source: &Source, val: &ValTokens, target: &Target) -> Result<Loss> {
    let score = eval::score(source, val, source.contents.recipe.val_batch_tokens(), target)?;
    Ok(Loss { val_loss: score.val_loss, val_bpb: Some(score.val_bpb) })
}
