//! `fairway submission`.

use super::args::DeviceArgs;
use super::source::{self, Source};
use super::{eval, export, output};
use crate::artifact::Codec;
use crate::data::folder::DataFolder;
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::quant::Scheme;
use crate::report::losses::{self, Loss};
use crate::report::submission::{ARTIFACT, Author, Run, Submission, check_folder};
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
    let mut runs = Vec::new();
    for dir in &args.runs {
        if !dir.is_dir() {
            return Err(Error::input("not a run", dir.display(), "the folder of a run"));
        }
        runs.push(Run { dir: dir.clone(), seed: load_recipe(dir)?.seed, loss: losses::read(dir)? });
    }
    let recipe = load_recipe(&args.runs[0])?;
    let artifact = args.out.join(ARTIFACT);
    place_artifact(args.artifact.as_deref(), &args.runs[0], &artifact)?;
    let artifact_bytes = fs::metadata(&artifact).map_err(|error| Error::read(&artifact, &error))?.len();
    let scored = args.data.as_deref().map(|data| score(&artifact, data, &args.device)).transpose()?;
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
        "bytes_total:{} bytes_code:{} ({verdict} the cap of 16000000 bytes)",
        written.bytes_total, written.bytes_code
    ));
    Ok(())
}

/// Brings the artifact into the folder: the one that is named, the first run's own, or a new one.
fn place_artifact(named: Option<&Path>, run: &Path, place: &Path) -> Result<()> {
    let own = run.join(ARTIFACT);
    let from = match named {
        Some(file) => file,
        None if own.exists() => &own,
        None => return export::pack(run, place, Scheme::Int8, Codec::Brotli).map(drop),
    };
    if !source::is_artifact(from) {
        return Err(Error::input("not an artifact", from.display(), "what `fairway export` wrote"));
    }
    write_atomic(place, &fs::read(from).map_err(|error| Error::read(from, &error))?)
}

fn score(artifact: &Path, data: &Path, device: &DeviceArgs) -> Result<Loss> {
    let target = device.target()?;
    let source = Source::load(artifact)?;
    let recipe = &source.contents.recipe;
    let val = DataFolder::open(data)?.val(recipe.val_seq_len(), recipe.vocab_size)?;
    let score = eval::score(&source, &val, recipe.val_batch_tokens(), &target)?;
    Ok(Loss { val_loss: score.val_loss, val_bpb: Some(score.val_bpb) })
}
