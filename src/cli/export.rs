//! `fairway export`.

use super::{output, source};
use crate::artifact::{Artifact, Budget, Codec};
use crate::error::{Error, Result};
use crate::quant::Scheme;
use std::path::{Path, PathBuf};

/// Quantise and pack a run into one self-contained artifact
#[derive(clap::Args)]
#[command(after_help = "Example: fairway export runs/tiny-1 --codec lzma --out model.fairway")]
pub struct Args {
    /// The run's folder
    run: PathBuf,
    /// Quantisation: int8
    #[arg(long, value_name = "SCHEME", default_value = "int8")]
    quant: String,
    /// Compression: brotli, lzma, zstd, zlib
    #[arg(long, value_name = "CODEC", default_value = "brotli")]
    codec: String,
    /// The artifact's file [default: RUN/model.fairway]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was written.
#[derive(serde::Serialize)]
pub struct Report {
    /// Sizes against the cap.
    #[serde(flatten)]
    pub budget: Budget,
    params: usize,
    quant: String,
    codec: String,
    out: PathBuf,
}

pub fn run(args: Args) -> Result<()> {
    let scheme: Scheme = args.quant.parse()?;
    let codec: Codec = args.codec.parse()?;
    let out = args.out.unwrap_or_else(|| args.run.join("model.fairway"));
    let report = pack(&args.run, &out, scheme, codec)?;
    if args.json {
        return output::json(&report);
    }
    let Report { budget, params, .. } = report;
    let row = |name: &str, bytes: u64| vec![name.to_string(), bytes.to_string()];
    output::table(
        &["what", "bytes"],
        &[
            row("payload before compression", budget.payload_bytes),
            row(&format!("artifact ({scheme}, {codec})"), budget.bytes),
            row("code, packed source", budget.bytes_code),
            row("code, everything shipped", budget.bytes_code_all),
            row("total (artifact + packed source)", budget.bytes_total),
        ],
    );
    let verdict = if budget.under_cap { "under" } else { "OVER" };
    output::line(format!("{verdict} the cap of 16000000 bytes; {params} parameters; {}", out.display()));
    Ok(())
}

/// Packs the run in folder `run` into the artifact `out`.
pub fn pack(run: &Path, out: &Path, scheme: Scheme, codec: Codec) -> Result<Report> {
    if !run.is_dir() {
        return Err(Error::input("not a run", run.display(), "the folder of a run"));
    }
    let contents = source::load(run)?;
    let artifact = Artifact::assemble(&contents.recipe, &contents.tokenizer, &contents.params, scheme)?;
    let sizes = artifact.write(out, codec)?;
    Ok(Report {
        budget: Budget::of(&sizes)?,
        params: contents.params.iter().map(|tensor| tensor.numel()).sum(),
        quant: scheme.to_string(),
        codec: codec.to_string(),
        out: out.to_path_buf(),
    })
}
