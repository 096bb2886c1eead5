//! `fairway sample`.

use super::args::DeviceArgs;
use super::output;
use super::source::Source;
use crate::backend::Target;
use crate::error::{Error, Result};
use crate::eval::sample::Options;
use crate::eval::text::{self, Continued};
use crate::train::guards;
use std::path::PathBuf;

/// Continue a text
#[derive(clap::Args)]
#[command(after_help = "Example: fairway sample model.fairway --prompt 'The type' --tokens 200")]
pub struct Args {
    /// An artifact, or the folder of a run
    model: PathBuf,
    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Tokens to draw
    #[arg(long, allow_hyphen_values = true, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, allow_hyphen_values = true, value_name = "T", default_value_t = 0.8)]
    temperature: f64,
    /// Seed of the draws
    #[arg(long, allow_hyphen_values = true, value_name = "S", default_value_t = 1337)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> Result<()> {
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(Error::input(format!("temperature {}", args.temperature), "--temperature", "at least 0"));
    }
    let target = args.device.target()?;
    let source = Source::load(&args.model)?;
    if !args.json {
        DeviceArgs::announce(&target);
    }
    let options = Options {
        tokens: args.tokens,
        temperature: args.temperature,
        seed: args.seed,
        context: source.contents.recipe.train_seq_len,
    };
    let sampled = continue_text(&source, &args.prompt, options, &target, !args.json)?;
    if args.json {
        let (text, tokens_per_s) = (sampled.text, sampled.tokens_per_s);
        return output::json(&serde_json::json!({ "text": text, "tokens_per_s": tokens_per_s }));
    }
    output::line("");
    Ok(())
}

/// Continues `prompt` on the target; `show` prints the text as it comes.
pub fn continue_text(
    source: &Source,
    prompt: &str,
    options: Options,
    target: &Target,
    show: bool,
) -> Result<Continued> {
    let mut on_text = |part: &str| {
        if show {
            // What an untrained model writes must not steer a terminal.
            let is_plain = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
            output::part(&part.replace(|c| !is_plain(c), "\u{fffd}"));
        }
        guards::check_interrupt("the sample is not complete")
    };
    text::continue_text(source.weights(), &source.contents.tokenizer, prompt, &options, target, &mut on_text)
}
