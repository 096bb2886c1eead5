//! `fairway demo`: the main job on real text with nothing else given.

use super::args::{self, DeviceArgs};
use super::source::Source;
use super::{eval, export, output, progress::TrainBar, sample};
use crate::artifact::Codec;
use crate::data::folder::{DataFolder, Split};
use crate::data::shard::Shard;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::eval::sample::Options as SampleOptions;
use crate::eval::unigram::unigram_bpb;
use crate::quant::Scheme;
use crate::recipe::Recipe;
use crate::train::{self, Options};
use std::path::PathBuf;

/// What the sample begins with: words that the corpus (documentation of Rust crates) knows.
const PROMPT: &str = "This function returns ";

/// Train a small model on real text, export it, reload it, score it and sample from it
#[derive(clap::Args)]
#[command(after_help = "Example: fairway demo --minutes 1 --out runs/demo")]
pub struct Args {
    /// Minutes of training
    #[arg(long, allow_hyphen_values = true, value_name = "M", default_value_t = 2.0)]
    minutes: f64,
    /// The run's folder
    #[arg(long, value_name = "DIR", default_value = "runs/demo")]
    out: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> Result<()> {
    if !(args.minutes > 0.0 && args.minutes <= 1e6) {
        return Err(Error::input(format!("{} minutes", args.minutes), "--minutes", "a number above 0"));
    }
    let target = args.device.target()?;
    let data = args::demo_data()?;
    let mut recipe = Recipe::load("tiny")?;
    // By the clock instead of by steps; a few validations on the way, for the curve.
    recipe.max_wallclock_seconds = args.minutes * 60.0;
    recipe.iterations = 1_000_000;
    recipe.val_loss_every = 250;
    let bar = TrainBar::new();
    let options = Options {
        recipe: recipe.clone(),
        data: data.clone(),
        tokenizer: Tokenizer::byte(),
        tokenizer_name: "byte".into(),
        out: args.out.clone(),
        resume: None,
        micro_batch: None,
        save_every: 0,
        echo: bar.echo(false),
        warn: bar.warn(),
    };
    let trained = train::train(options, &target, &mut |status| bar.show(status));
    bar.finish();
    let summary = trained?;

    let file = args.out.join("model.fairway");
    let budget = export::pack(&args.out, &file, Scheme::Int8, Codec::Brotli)?.budget;
    let source = Source::load(&file)?;
    let folder = DataFolder::open(&data)?;
    let val = folder.val(recipe.train_seq_len, recipe.vocab_size)?;
    let score = eval::score(&source, &val, recipe.val_batch_tokens(), &target)?;
    let first = folder.shards(Split::Train).first().map(|path| Shard::open(path)).transpose()?;
    let train_tokens = first.as_ref().map_or(&[][..], |shard| shard.tokens());
    let unigram = unigram_bpb(train_tokens, val.tokens(), &source.contents.byte_table);

    output::line(format!("\nsample after {PROMPT:?}:"));
    let options =
        SampleOptions { tokens: 200, temperature: 0.7, seed: recipe.seed, context: recipe.train_seq_len };
    let sampled = sample::continue_text(&source, PROMPT, options, &target, true)?;
    output::line("\n");
    let row = |what: &str, value: String| vec![what.to_string(), value];
    output::table(
        &["what", "value"],
        &[
            row("device", target.label.clone()),
            row("parameters", crate::model::param_count(&recipe)?.to_string()),
            row("steps", summary.steps.to_string()),
            row("training tokens per second", format!("{:.0}", summary.tokens_per_s.unwrap_or(f64::NAN))),
            row("val_bpb, unigram model", format!("{unigram:.4}")),
            row("val_bpb, live model", format!("{:.4}", summary.val_bpb)),
            row("val_bpb, artifact reloaded", format!("{:.4}", score.val_bpb)),
            row("artifact bytes (int8, brotli)", budget.bytes.to_string()),
            row("artifact + packed source bytes", budget.bytes_total.to_string()),
            row("sampled tokens per second", format!("{:.0}", sampled.tokens_per_s)),
            row("artifact", file.display().to_string()),
            row("curve", args.out.join("curve.svg").display().to_string()),
        ],
    );
    Ok(())
}
