//! `fairway bench`.

use super::args::DeviceArgs;
use super::output;
use crate::backend::{self, DeviceChoice, Job, Target};
use crate::bench::{self, Row};
use crate::error::Result;
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
    #[command(after_help = "Example: fairway bench step tiny --device cpu")]
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
    if !json {
        DeviceArgs::announce(&target);
    }
    let rows = backend::guard(&target, || backend::run(&target, BenchJob(args.what)))?;
    if json {
        return output::json(&serde_json::json!({ "rows": rows }));
    }
    let number = |value: Option<f64>| value.map_or("-".to_string(), |value| format!("{value:.3}"));
    let cells = |row: &Row| {
        let ms = format!("{:.4}", row.ms);
        vec![row.what.clone(), ms, number(row.floor_ms), number(row.tflops), number(row.gbps)]
    };
    let cells: Vec<_> = rows.iter().map(cells).collect();
    output::table(&["what", "ms", "floor ms", "TFLOP/s", "GB/s"], &cells);
    Ok(())
}

struct BenchJob(What);

impl Job for BenchJob {
    type Output = Vec<Row>;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Vec<Row>> {
        let dtype = target.precision.dtype();
        match self.0 {
            What::Ops { rows, .. } => {
                let on_cuda = matches!(target.choice, DeviceChoice::Cuda(_));
                let rows = rows.map_or(if on_cuda { 65_536 } else { 4096 }, |rows| rows as usize);
                bench::ops::run::<P>(device, dtype, rows)
            }
            What::Step { recipe, sets, micro_batch, .. } => {
                let mut recipe = Recipe::load(&recipe)?;
                sets.iter().try_for_each(|assignment| recipe.set(assignment))?;
                crate::model::check(&recipe)?;
                bench::step::run::<P>(&recipe, micro_batch, device, dtype)
            }
        }
    }
}
