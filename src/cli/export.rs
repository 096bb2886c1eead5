//! `fairway export`.

use super::output;
use super::source::Source;
use crate::artifact::{Artifact, Budget, Codec};
use crate::error::{Error, Result};
use crate::quant::Scheme;
use crate::train::log::lines;
use std::path::{Path, PathBuf};

/// Quantise and pack a run into one self-contained artifact
#[derive(clap::Args)]
#[command(after_help = "Example: fairway export runs/tiny-1 --codec lzma --out model.fairway")]
pub struct Args {
    /// The run's folder
    run: PathBuf,
    /// Quantisation: fp16, int8, int6, ternary
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
    #[serde(serialize_with = "output::path")]
    out: PathBuf,
    /// The challenge's lines about it.
    #[serde(skip)]
    log: Vec<String>,
}

pub fn run(args: Args) -> Result<()> {
    let scheme: Scheme = args.quant.parse()?;
    let codec: Codec = args.codec.parse()?;
    let out = args.out.unwrap_or_else(|| args.run.join("model.fairway"));
    let report = pack(&args.run, &out, scheme, codec)?;
    if args.json {
        return output::json(&report);
    }
    let Report { budget, params, log, .. } = report;
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
    log.iter().for_each(output::line);
    let verdict = if budget.under_cap { "under" } else { "OVER" };
    output::line(format!("{verdict} the cap of 16000000 bytes; {params} parameters; {}", out.display()));
    Ok(())
}

/// Packs the run in folder `run` into the artifact `out`.
pub fn pack(run: &Path, out: &Path, scheme: Scheme, codec: Codec) -> Result<Report> {
    if !run.is_dir() {
        return Err(Error::input("not a run", run.display(), "the folder of a run"));
    }
    let contents = Source::load(run)?.contents;
    let artifact = Artifact::assemble(&contents.recipe, &contents.tokenizer, &contents.params, scheme)?;
    let sizes = artifact.write(out, codec)?;
    let budget = Budget::of(&sizes)?;
    let (quant, codec) = (scheme.to_string(), codec.to_string());
    let float_payload = artifact.stats().baseline_tensor_bytes as u64;
    let raw = sizes.sections.iter().map(|(_, _, raw)| raw).sum();
    let payload = [float_payload, sizes.payload_bytes, raw];
    let log = lines::serialized_quantised(&quant, &codec, sizes.bytes, payload, budget.bytes_code);
    Ok(Report {
        budget,
        params: contents.params.iter().map(|tensor| tensor.numel()).sum(),
        quant,
        codec,
        out: out.to_path_buf(),
        log: log.into(),
    })
}
