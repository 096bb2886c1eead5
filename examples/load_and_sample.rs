//! Loads an artifact and samples from it on the best device.
//!
//! `cargo run --release --example load_and_sample -- [FILE [PROMPT]]`: FILE as `train_and_save` leaves it.

use fairway::artifact::Artifact;
use fairway::backend::{self, DeviceChoice};
use fairway::eval::sample::Options;
use fairway::eval::text::{Weights, continue_text};
use std::io::Write;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let file = args.next().unwrap_or_else(|| "runs/example/model.fairway".into());
    let prompt = args.next().unwrap_or_else(|| "A model ".into());

    let contents = Artifact::read(file.as_ref())?.contents(&file)?;
    let target = backend::resolve(&DeviceChoice::Auto, None)?;
    println!("on {} ({})", target.label, target.why);

    let weights = Weights { recipe: &contents.recipe, params: &contents.params, place: &file };
    let options =
        Options { tokens: 200, temperature: 0.5, seed: 1337, context: contents.recipe.train_seq_len };
    let mut show = |part: &str| {
        print!("{part}");
        // A closed pipe ends the output, not the work.
        let _ = std::io::stdout().flush();
        Ok(())
    };
    let sampled = continue_text(weights, &contents.tokenizer, &prompt, &options, &target, &mut show)?;
    println!("\n{:.0} tokens per second", sampled.tokens_per_s);
    Ok(())
}
