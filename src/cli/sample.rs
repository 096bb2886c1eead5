//! `fairway sample`.

use super::args::DeviceArgs;
use super::{output, source};
use crate::artifact::assemble::Contents;
use crate::backend::{self, Job, Target};
use crate::error::{Error, Result};
use crate::eval::sample::{self, Options};
use crate::ops::Plain;
use crate::train::guards;
use std::path::PathBuf;
use std::time::Instant;

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
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f64,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 1337)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// A continued text and how fast it came.
pub struct Sampled {
    /// Prompt and continuation.
    pub text: String,
    /// Tokens drawn per second, the prompt's reading included.
    pub tokens_per_s: f64,
}

pub fn run(args: Args) -> Result<()> {
    if !args.temperature.is_finite() || args.temperature < 0.0 {
        return Err(Error::input(format!("temperature {}", args.temperature), "--temperature", "at least 0"));
    }
    let target = args.device.target()?;
    let contents = source::load(&args.model)?;
    let options = Options {
        tokens: args.tokens,
        temperature: args.temperature,
        seed: args.seed,
        context: contents.recipe.train_seq_len,
    };
    let sampled = continue_text(&contents, args.model, &args.prompt, options, &target, !args.json)?;
    if args.json {
        let (text, tokens_per_s) = (sampled.text, sampled.tokens_per_s);
        return output::json(&serde_json::json!({ "text": text, "tokens_per_s": tokens_per_s }));
    }
    output::line("");
    Ok(())
}

/// Continues `prompt` on the target; `show` prints the text as it comes.
pub fn continue_text(
    contents: &Contents,
    place: PathBuf,
    prompt: &str,
    options: Options,
    target: &Target,
    show: bool,
) -> Result<Sampled> {
    backend::run(target, SampleJob { contents, place, prompt, options, show })
}

struct SampleJob<'a> {
    contents: &'a Contents,
    place: PathBuf,
    prompt: &'a str,
    options: Options,
    show: bool,
}

impl Job for SampleJob<'_> {
    type Output = Sampled;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Sampled> {
        let model = source::model::<P>(self.contents, &self.place, device, target.precision.dtype())?;
        let tokenizer = &self.contents.tokenizer;
        let mut prompt = vec![tokenizer.bos()];
        tokenizer.encode_into(self.prompt, &mut prompt);
        let started = Instant::now();
        let (mut ids, mut shown) = (prompt.clone(), 0);
        let mut on_token = |id| {
            ids.push(id);
            if self.show {
                let bytes = tokenizer.decode(&ids);
                // What may still be a character's first bytes waits for the rest.
                let whole = whole_characters(&bytes);
                output::part(&String::from_utf8_lossy(&bytes[shown..whole]));
                shown = whole;
            }
            guards::check_interrupt("the sample is not complete")
        };
        let new = sample::sample(&model, &prompt, &self.options, &mut on_token)?;
        let seconds = started.elapsed().as_secs_f64();
        let text = String::from_utf8_lossy(&tokenizer.decode(&ids)).into_owned();
        Ok(Sampled { text, tokens_per_s: new.len() as f64 / seconds })
    }
}

/// Length of `bytes` without an unfinished UTF-8 character at its end.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(&bytes[bytes.len().saturating_sub(4)..]) {
        Ok(_) => bytes.len(),
        Err(_) => {
            let lead = bytes.iter().rev().take(4).position(|b| b & 0xC0 != 0x80);
            match lead {
                Some(back) => {
                    let need = match bytes[bytes.len() - 1 - back] {
                        0xF0.. => 4,
                        0xE0.. => 3,
                        0xC0.. => 2,
                        _ => 1,
                    };
                    if back + 1 < need { bytes.len() - 1 - back } else { bytes.len() }
                }
                None => bytes.len(),
            }
        }
    }
}
