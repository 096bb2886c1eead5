//! `fairway train`.

use super::args::{self, DeviceArgs};
use super::{output, progress::TrainBar};
use crate::error::{Error, Result};
use crate::eval::statistics::Sample;
use crate::recipe::Recipe;
use crate::train::checkpoint::{self, DataSource};
use crate::train::run::load_recipe;
use crate::train::{self, Options, Summary, guards};
use std::path::{Path, PathBuf};

/// Train a recipe; writes DIR/{recipe.toml,train.log,metrics.jsonl,curve.svg,checkpoint/,final.safetensors}
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  fairway train tiny\n  \
    fairway train baseline --data data/datasets/fineweb10B_sp1024 --set iterations=200 --out runs/a\n  \
    fairway train tiny --seeds 1,2,3 --out runs/b\n  \
    fairway train --resume runs/a")]
pub struct Args {
    /// A built-in recipe (see `fairway recipes`) or a TOML file; with --resume the resumed run's own if absent
    #[arg(required_unless_present = "resume")]
    recipe: Option<String>,
    /// Set a recipe key, as often as needed; wins over --from-env
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Take the challenge's environment names (ITERATIONS, MATRIX_LR, ...): those that are set, or a FILE's NAME=value lines
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    from_env: Option<Option<PathBuf>>,
    /// Folder with fineweb_train_*.bin and fineweb_val_*.bin [default: the demo corpus, built if absent]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// The shards' tokenizer: a SentencePiece .model file, or `byte` [default: what the folder implies]
    #[arg(long, value_name = "FILE|byte")]
    tokenizer: Option<String>,
    /// Run N steps without a wallclock cap, as ITERATIONS=N does: the last warmdown_iters of them warm down; 0 writes the initial model
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    steps: Option<usize>,
    /// Seed of the initial weights
    #[arg(long, allow_hyphen_values = true, value_name = "S")]
    seed: Option<u64>,
    /// Train once with each of these seeds, into DIR/seed-A, DIR/seed-B, ...
    #[arg(long, value_delimiter = ',', value_name = "A,B,C", conflicts_with_all = ["seed", "resume"])]
    seeds: Vec<u64>,
    /// Tokens of one forward and backward at most: a limit on memory
    #[arg(long, allow_hyphen_values = true, value_name = "TOKENS")]
    micro_batch: Option<usize>,
    /// Steps between checkpoints (the last two are kept); 0 for only at the end and when interrupted
    #[arg(long, allow_hyphen_values = true, value_name = "N", default_value_t = 1000)]
    save_every: usize,
    /// The run's folder [default: the resumed one, or runs/RECIPE-N]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Go on from the newest whole checkpoint in DIR
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Print one JSON object instead of the log
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Data and tokenizer that the flags or the environment name.
#[derive(Default)]
struct Named {
    data: Option<PathBuf>,
    tokenizer: Option<String>,
}

pub fn run(args: Args) -> Result<()> {
    let (recipe, mut named) = resolve_recipe(&args)?;
    check_seeds(&args.seeds)?;
    let target = args.device.target()?;
    if let (Some(dir), None) = (&args.resume, &named.data) {
        let saved = resumed_data(dir)?;
        named.data = Some(saved.dir.into());
        named.tokenizer.get_or_insert(saved.tokenizer);
    }
    let data = match named.data {
        Some(data) => data,
        None => args::demo_data()?,
    };
    let out = match args.out.clone().or(args.resume.clone()) {
        Some(out) => out,
        None => free_run_dir(&recipe.name),
    };
    let train = |recipe: Recipe, out: PathBuf| {
        let (tokenizer, tokenizer_name) =
            args::tokenizer(named.tokenizer.as_deref(), &data, recipe.vocab_size)?;
        let bar = TrainBar::new();
        let options = Options {
            recipe,
            data: data.clone(),
            tokenizer,
            tokenizer_name,
            out,
            resume: args.resume.clone(),
            micro_batch: args.micro_batch,
            save_every: args.save_every,
            echo: bar.echo(args.json),
            warn: bar.warn(),
        };
        let trained = train::train(options, &target, &mut |status| bar.show(status));
        bar.finish();
        trained
    };
    if args.seeds.is_empty() {
        return report(&train(recipe, out)?, args.json);
    }
    let with_seed = |seed: &u64| {
        guards::check_interrupt("between two seeds")?;
        train(Recipe { seed: *seed, ..recipe.clone() }, out.join(format!("seed-{seed}")))
    };
    let runs = args.seeds.iter().map(with_seed).collect::<Result<Vec<Summary>>>()?;
    report_seeds(&args.seeds, runs, &out, args.json)
}

fn report(summary: &Summary, json: bool) -> Result<()> {
    if json {
        return output::json(summary);
    }
    output::line(format!("run: {}", summary.out.display()));
    if let Some(speed) = summary.tokens_per_s {
        output::line(format!("tokens_per_s:{speed:.0} step_ms:{:.2}", summary.step_ms.unwrap_or(f64::NAN)));
    }
    Ok(())
}

/// What runs of several seeds reached: means over them, and each.
#[derive(serde::Serialize)]
struct Seeds<'a> {
    /// The mean of each number, under the names of one run's report; the first step's time is the first run's.
    #[serde(flatten)]
    mean: Summary,
    val_loss_std: f64,
    seeds: &'a [u64],
    runs: &'a [Summary],
}

fn report_seeds(seeds: &[u64], runs: Vec<Summary>, out: &Path, json: bool) -> Result<()> {
    let mean = |value: &dyn Fn(&Summary) -> Option<f64>| {
        let values: Vec<f64> = runs.iter().filter_map(value).collect();
        (values.len() == runs.len()).then(|| Sample::of(&values).mean)
    };
    let losses = Sample::of(&runs.iter().map(|run| run.val_loss).collect::<Vec<_>>());
    let summary = Summary {
        steps: runs.iter().map(|run| run.steps).sum::<usize>() / runs.len(),
        train_loss: mean(&|run| run.train_loss),
        val_loss: losses.mean,
        val_bpb: mean(&|run| Some(run.val_bpb)).unwrap_or(f64::NAN),
        tokens_per_s: mean(&|run| run.tokens_per_s),
        step_ms: mean(&|run| run.step_ms),
        first_step_s: runs[0].first_step_s,
        peak_memory_bytes: runs.iter().filter_map(|run| run.peak_memory_bytes).max(),
        out: out.to_path_buf(),
    };
    if json {
        return output::json(&Seeds { mean: summary, val_loss_std: losses.std, seeds, runs: &runs });
    }
    let row = |(seed, run): (&u64, &Summary)| {
        vec![seed.to_string(), format!("{:.6}", run.val_loss), format!("{:.6}", run.val_bpb)]
    };
    let rows: Vec<Vec<String>> = seeds.iter().zip(&runs).map(row).collect();
    output::table(&["seed", "val_loss", "val_bpb"], &rows);
    output::line(format!(
        "runs: {} val_loss mean:{:.6} std:{:.6} val_bpb mean:{:.6}",
        out.display(),
        losses.mean,
        losses.std,
        summary.val_bpb
    ));
    Ok(())
}

/// Refuses seeds that would share a folder.
fn check_seeds(seeds: &[u64]) -> Result<()> {
    let twice = seeds.iter().enumerate().find(|(index, seed)| seeds[..*index].contains(seed));
    match twice {
        Some((_, seed)) => Err(Error::input(format!("seed {seed} twice"), "--seeds", "different seeds")),
        None => Ok(()),
    }
}

/// The recipe, then the environment, then the flags.
fn resolve_recipe(args: &Args) -> Result<(Recipe, Named)> {
    let mut recipe = match (&args.recipe, &args.resume) {
        (Some(name), _) => Recipe::load(name)?,
        (None, Some(dir)) => load_recipe(dir)?,
        (None, None) => return Err(Error::input("no recipe", "RECIPE", "a built-in recipe or a TOML file")),
    };
    let mut named = Named { data: args.data.clone(), tokenizer: args.tokenizer.clone() };
    if let Some(file) = &args.from_env {
        let report = match file {
            Some(file) => recipe.apply_env_file(file)?,
            None => recipe.apply_env_map(std::env::vars_os())?,
        };
        report.warnings.iter().for_each(|warning| output::warn(warning));
        named.data = named.data.or(report.data_path);
        named.tokenizer = named.tokenizer.or(report.tokenizer_path.map(|path| path.display().to_string()));
    }
    for assignment in &args.sets {
        recipe.set(assignment)?;
    }
    if let Some(steps) = args.steps {
        recipe.iterations = steps;
        recipe.max_wallclock_seconds = 0.0;
    }
    if let Some(seed) = args.seed {
        recipe.seed = seed;
    }
    crate::model::check(&recipe)?;
    Ok((recipe, named))
}

/// What the run in `dir` was trained on.
fn resumed_data(dir: &Path) -> Result<DataSource> {
    // Training itself will tell of the checkpoints that are passed over.
    let (_, data) = checkpoint::newest(dir, &mut |_| (), |path| Ok(checkpoint::open(path)?.1.data))?;
    Ok(data)
}

/// The first of `runs/NAME-1`, `runs/NAME-2`, ... that does not exist.
fn free_run_dir(name: &str) -> PathBuf {
    let safe: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let dir = |n| Path::new("runs").join(format!("{safe}-{n}"));
    (1..).map(dir).find(|dir| !dir.exists()).unwrap_or_else(|| dir(0))
}
