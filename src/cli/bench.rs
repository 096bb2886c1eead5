//! `fairway bench`.

use super::args::DeviceArgs;
use super::output;
use crate::backend::{self, DeviceChoice, Job, Target};
use crate::bench::profile::Kernel;
use crate::bench::{self, Row};
use crate::error::{Error, Result};
use crate::ops::Plain;
use crate::recipe::Recipe;
use clap::Subcommand;

/// Time ops or a whole step: medians after warm-up, with the floor beside each
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  fairway bench ops\n  fairway bench step tiny --device cpu")]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Each op with a kernel of its own, beside its reference
    #[command(after_help = "Example: fairway bench ops --device wgpu")]
    Ops {
        /// Rows (tokens) of the tensors [default: 65536 on cuda, 4096 elsewhere]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
        rows: Option<u32>,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// A training step of a recipe, on random tokens
    #[command(
        after_help = "Examples:\n  fairway bench step tiny --device cpu\n  fairway bench step baseline --profile"
    )]
    Step {
        /// A built-in recipe or a TOML file
        #[arg(default_value = "baseline")]
        recipe: String,
        /// Set a recipe key, as often as needed
        #[arg(long = "set", value_name = "KEY=VALUE")]
        sets: Vec<String>,
        /// Tokens of one forward and backward at most
        #[arg(long, value_name = "TOKENS", default_value_t = usize::MAX, hide_default_value = true)]
        micro_batch: usize,
        /// List the step's kernels instead: launches, time, floor; waits for the device after each launch
        #[arg(long)]
        profile: bool,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
}

pub fn run(args: Args) -> Result<()> {
    let (device, json) = match &args.what {
        What::Ops { device, json, .. } | What::Step { device, json, .. } => (device, *json),
    };
    let target = device.target()?;
    if let What::Step { profile: true, .. } = &args.what {
        if target.choice == DeviceChoice::Cpu {
            return Err(Error::input("--profile", "--device cpu", "a GPU, whose kernels it lists"));
        }
        backend::profile::begin();
    }
    if !json {
        DeviceArgs::announce(&target);
    }
    match backend::guard(&target, || backend::run(&target, BenchJob(args.what)))? {
        Report::Ops(rows) if json => output::json(&serde_json::json!({ "rows": rows }))?,
        Report::Step(report) if json => output::json(&report)?,
        Report::Kernels(kernels) if json => output::json(&serde_json::json!({ "kernels": kernels }))?,
        Report::Ops(rows) => print_rows(&rows),
        Report::Step(report) => {
            print_rows(&report.rows);
            if let Some(held) = report.held {
                let [first, second, last] = held.map(|bytes| bytes >> 20);
                output::line(format!("held after one step {first} MiB, two {second}, all {last}"));
            }
        }
        Report::Kernels(kernels) => print_kernels(&kernels),
    }
    Ok(())
}

fn number(value: Option<f64>) -> String {
    value.map_or("-".to_string(), |value| format!("{value:.3}"))
}

fn print_rows(rows: &[Row]) {
    let cells = |row: &Row| {
        let ms = format!("{:.4}", row.ms);
        vec![row.what.clone(), ms, number(row.floor_ms), number(row.tflops), number(row.gbps)]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    output::table(&["what", "ms", "floor ms", "TFLOP/s", "GB/s"], &cells);
}

fn print_kernels(kernels: &[Kernel]) {
    let cells = |kernel: &Kernel| {
        let share = format!("{:.2}", 100.0 * kernel.share);
        let ms = format!("{:.3}", kernel.ms);
        let (floor, rate) = (number(kernel.floor_ms), number(kernel.tflops));
        vec![kernel.what.clone(), kernel.launches.to_string(), ms, share, floor, rate]
    };
    let mut cells: Vec<_> = kernels.iter().map(cells).collect();
    let launches: usize = kernels.iter().map(|kernel| kernel.launches).sum();
    let ms = format!("{:.3}", kernels.iter().map(|kernel| kernel.ms).sum::<f64>());
    cells.push(vec!["all".into(), launches.to_string(), ms, "100.00".into(), "-".into(), "-".into()]);
    output::table(&["kernel", "launches", "ms", "share %", "floor ms", "TFLOP/s"], &cells);
}

enum Report {
    Ops(Vec<Row>),
    Step(bench::step::Report),
    Kernels(Vec<Kernel>),
}

struct BenchJob(What);

impl Job for BenchJob {
    type Output = Report;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Report> {
        let dtype = target.precision.dtype();
        match self.0 {
            What::Ops { rows, .. } => {
                let on_cuda = matches!(target.choice, DeviceChoice::Cuda(_));
                let rows = rows.map_or(if on_cuda { 65_536 } else { 4096 }, |rows| rows as usize);
                bench::ops::run::<P>(device, dtype, rows).map(Report::Ops)
            }
            What::Step { recipe, sets, micro_batch, profile, .. } => {
                let mut recipe = Recipe::load(&recipe)?;
                sets.iter().try_for_each(|assignment| recipe.set(assignment))?;
                crate::model::check(&recipe)?;
                if profile {
                    bench::profile::run::<P>(&recipe, micro_batch, device, dtype).map(Report::Kernels)
                } else {
                    let held = || backend::memory_use(target).map(|memory| memory.reserved);
                    bench::step::run::<P>(&recipe, micro_batch, device, dtype, &held).map(Report::Step)
                }
            }
        }
    }
}
