//! `fairway parity`.

use super::args::DeviceArgs;
use super::output;
use crate::backend::{self, DeviceChoice, Job, Precision, Target};
use crate::error::Result;
use crate::ops::Plain;
use crate::parity::{self, Options, Report, Row};
use crate::train::guards;
use std::path::PathBuf;
use std::process::ExitCode;

/// Compare with other people's numbers: every fixture of a folder, tensor by tensor
#[derive(clap::Args)]
#[command(after_help = "Example: fairway parity --fixtures tests/fixtures --only 'chal*' --device cpu\n\n\
    Exit status 1 if a row fails. On the cpu the default precision is f64 and the tolerance an entry's `tol`;\n\
    elsewhere f32 and `tol_f32`.")]
pub struct Args {
    /// A folder with index*.json and the fixtures that it lists
    #[arg(long, value_name = "DIR")]
    fixtures: PathBuf,
    /// Only the fixtures whose names match (* and ?)
    #[arg(long, value_name = "GLOB")]
    only: Option<String>,
    /// Folder of tokenizer models, found by their SHA-256 [default: DIR/../tokenizers]
    #[arg(long, value_name = "DIR")]
    tokenizers: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> Result<ExitCode> {
    // Other people's numbers are f64: the CPU meets them in it, the other devices in the widest type that they have.
    let target = args.device.resolve(|target| match target.choice {
        DeviceChoice::Cpu => Precision::F64,
        _ => Precision::F32,
    })?;
    let json = args.json;
    if !json {
        DeviceArgs::announce(&target);
    }
    let report = backend::guard(&target, || backend::run(&target, ParityJob(args)))?;
    if json {
        output::json(&report)?;
    } else {
        output::line(format!("{} passed, {} failed", report.passed, report.failed));
    }
    guards::check_interrupt("after the last fixture")?;
    Ok(if report.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

struct ParityJob(Args);

impl Job for ParityJob {
    type Output = Report;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Report> {
        let Args { fixtures, only, tokenizers, json, .. } = self.0;
        let options = Options { only, tokenizers, precision: target.precision.dtype() };
        parity::run::<P>(&fixtures, &options, device, &mut |row| {
            if !json {
                output::line(show(row));
            }
        })
    }
}

fn show(row: &Row) -> String {
    let verdict = if row.ok { "ok  " } else { "FAIL" };
    let number = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.2e}"));
    let note = row.note.as_deref().map(|note| format!("  ({note})")).unwrap_or_default();
    format!(
        "{verdict} {} {} error {} of {}{note}",
        row.fixture,
        row.tensor,
        number(row.error),
        number(row.tolerance)
    )
}
