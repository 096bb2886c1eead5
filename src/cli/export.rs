//! `fairway export`.

use super::args::DeviceArgs;
use super::fitting::{self, Packing, Written};
use super::source::Source;
use super::{calibration, export_loss, output};
use crate::artifact::assemble::{Contents, Prepared};
use crate::artifact::{Artifact, Budget, Codec};
use crate::error::{Error, Result};
use crate::quant::{KEEP_FLOAT_MAX_NUMEL, Scheme, TensorLoss};
use crate::train::log::lines;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Quantise and pack a run into one self-contained artifact
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  fairway export runs/tiny-1 --codec lzma --out model.fairway\n  \
    fairway export runs/a --quant gptq-int6 --data data/datasets/fineweb10B_sp1024\n  \
    fairway export runs/a --quant int6 --budget 16000000")]
pub struct Args {
    /// The run's folder
    run: PathBuf,
    /// Quantisation: fp16, int8 (the challenge's), intN, gptq-intN (N from 2 to 8), ternary
    #[arg(long, value_name = "SCHEME", default_value = "int8")]
    quant: String,
    /// Compression: brotli, lzma, zstd, zlib, xz9 (lzma with xz's preset 9, as the PRs have it) [default: brotli; with
    /// --budget the first that fits, else the smallest]
    #[arg(long, value_name = "CODEC")]
    codec: Option<String>,
    /// The most bytes that artifact and packed source may have together: if no codec is enough, codes of +-1 are pruned, those
    /// of the least effect first, until it fits
    #[arg(long, value_name = "BYTES")]
    budget: Option<u64>,
    /// What GPTQ is calibrated with: text that the model writes itself (so many sequences), or the training shards of a folder
    /// [default: self]
    #[arg(long, value_name = "self[:SEQS]|DIR")]
    calibrate: Option<PathBuf>,
    /// Score the live model and the artifact on the beginning of this folder's fineweb_val_*.bin
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The artifact's file [default: RUN/model.fairway]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// List the loss of every tensor
    #[arg(long)]
    verbose: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
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
    /// What GPTQ was calibrated with.
    calibration: Option<calibration::Report>,
    /// Time for the codes, GPTQ's after calibration.
    quantise_seconds: f64,
    /// Time for compression, fitting and writing.
    pack_seconds: f64,
    /// What quantisation costs each tensor.
    losses: Vec<TensorLoss>,
    /// What it costs the model, if there was data.
    bpb: Option<export_loss::Scores>,
    /// Tensors in codes.
    #[serde(skip)]
    coded: usize,
    /// What `--budget` did.
    #[serde(skip_serializing_if = "Option::is_none")]
    fit: Option<fitting::Report>,
    /// The challenge's lines about it.
    #[serde(skip)]
    log: Vec<String>,
}

pub fn run(args: Args) -> Result<()> {
    let scheme: Scheme = args.quant.parse()?;
    let packing = Packing::parse(args.codec.as_deref(), args.budget)?;
    let calibrate = calibration::Tokens::parse(args.calibrate.as_deref(), scheme)?;
    let out = args.out.unwrap_or_else(|| args.run.join("model.fairway"));
    if out.is_dir() {
        // Said before minutes of work, not after them.
        return Err(Error::write(&out, &ErrorKind::IsADirectory.into()));
    }
    let source = load(&args.run)?;
    let calibrate = calibrate.map(|tokens| tokens.open(&source)).transpose()?;
    let text = args.data.map(|data| export_loss::text(&source, &data)).transpose()?;
    // Packing alone needs none.
    let computes = calibrate.is_some() || text.is_some();
    let target = computes.then(|| args.device.target()).transpose()?;
    if let Some(target) = target.as_ref().filter(|_| !args.json) {
        DeviceArgs::announce(target);
    }
    let contents = &source.contents;
    let mut prepared = Prepared::new(&contents.recipe, &contents.params, scheme)?;
    let mut calibration = None;
    if let (Some(plan), Some(target)) = (calibrate, &target) {
        let (hessians, report) = plan.run(&source, &|name| prepared.takes_hessian(name), target)?;
        prepared = prepared.with_hessians(hessians);
        calibration = Some(report);
    }
    let (report, whole) = write(contents, &prepared, &out, scheme, packing)?;
    if report.coded == 0 && !matches!(scheme, Scheme::Fp16 | Scheme::Int8) {
        output::warn(&format!(
            "--quant {scheme} has coded nothing: no matrix has more than {KEEP_FLOAT_MAX_NUMEL} elements"
        ));
    }
    let mut report = Report { calibration, ..report };
    if let (Some(text), Some(target)) = (text, &target) {
        let scores = export_loss::scores(&source, &out, &text, target)?;
        if let (Some(fit), Some(whole)) = (&mut report.fit, &whole) {
            fit.score(whole, scores.artifact, &text, target)?;
        }
        report.bpb = Some(scores);
    }
    if args.json {
        return output::json(&report);
    }
    report.print(args.verbose);
    Ok(())
}

impl Report {
    fn print(&self, verbose: bool) {
        let Self { budget, params, quant, codec, log, out, .. } = self;
        if let Some(calibration) = &self.calibration {
            calibration.print();
        }
        output::line(format!(
            "quantised in {:.1} s, packed in {:.1} s",
            self.quantise_seconds, self.pack_seconds
        ));
        export_loss::print(&self.losses, verbose);
        let row = |name: &str, bytes: u64| vec![name.to_string(), bytes.to_string()];
        output::table(
            &["what", "bytes"],
            &[
                row("payload before compression", budget.payload_bytes),
                row(&format!("artifact ({quant}, {codec})"), budget.bytes),
                row("code, packed source", budget.bytes_code),
                row("code, everything shipped", budget.bytes_code_all),
                row("total (artifact + packed source)", budget.bytes_total),
            ],
        );
        log.iter().for_each(output::line);
        if let Some(bpb) = &self.bpb {
            bpb.print();
        }
        if let Some(fit) = &self.fit {
            fit.print();
        }
        let verdict = if budget.under_cap { "under" } else { "OVER" };
        output::line(format!("{verdict} the cap of 16000000 bytes; {params} parameters; {}", out.display()));
    }
}

fn load(run: &Path) -> Result<Source> {
    if !run.is_dir() {
        return Err(Error::input("not a run", run.display(), "the folder of a run"));
    }
    Source::load(run)
}

/// Packs the run in folder `run` into the artifact `out` by a scheme that needs no calibration.
pub fn pack(run: &Path, out: &Path, scheme: Scheme, codec: Codec) -> Result<Report> {
    let contents = load(run)?.contents;
    let prepared = Prepared::new(&contents.recipe, &contents.params, scheme)?;
    Ok(write(&contents, &prepared, out, scheme, Packing::by(codec))?.0)
}

/// Writes the artifact; given back with its report is what it was before codes were pruned, if some were.
fn write(
    contents: &Contents,
    prepared: &Prepared,
    out: &Path,
    scheme: Scheme,
    packing: Packing,
) -> Result<(Report, Option<Artifact>)> {
    let started = Instant::now();
    let artifact = prepared.artifact(&contents.tokenizer)?;
    let quantise_seconds = started.elapsed().as_secs_f64();
    let Written { artifact, codec, sizes, fit, whole } = packing.write(artifact, prepared, out)?;
    let pack_seconds = started.elapsed().as_secs_f64() - quantise_seconds;
    let losses = prepared.losses(&artifact)?;
    let budget = Budget::of(&sizes)?;
    let (quant, codec) = (scheme.to_string(), codec.to_string());
    let float_payload = artifact.stats().baseline_tensor_bytes as u64;
    let raw = sizes.sections.iter().map(|(_, _, raw)| raw).sum();
    let payload = [float_payload, sizes.payload_bytes, raw];
    let log = lines::serialized_quantised(&quant, &codec, sizes.bytes, payload, budget.bytes_code);
    let report = Report {
        budget,
        params: contents.params.iter().map(|tensor| tensor.numel()).sum(),
        quant,
        codec,
        out: out.to_path_buf(),
        calibration: None,
        quantise_seconds,
        pack_seconds,
        losses,
        coded: artifact.tensors.iter().filter(|tensor| tensor.storage.is_coded()).count(),
        bpb: None,
        fit,
        log: log.into(),
    };
    Ok((report, whole))
}
