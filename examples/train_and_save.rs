//! Trains a tiny model on a text and saves its artifact.
//!
//! `cargo run --release --example train_and_save -- [TEXT [OUT]]`: TEXT is a file, OUT the run's folder.

use anyhow::Context;
use fairway::artifact::{Artifact, Codec};
use fairway::backend::{self, DeviceChoice};
use fairway::data::pack::{PackOptions, pack};
use fairway::data::{quiet, tokenizer::Tokenizer};
use fairway::quant::Scheme;
use fairway::recipe::Recipe;
use fairway::train::{self, Options, log, run::TrainedRun};
use std::fs;
use std::path::PathBuf;

/// What is learnt where no text is given.
const TEXT: &str = "A model reads a text and learns which letter follows. It starts with guesses, and every step \
    makes the right letter a little likelier. What it has learnt fits in a small file.\n";

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let text = match args.next() {
        Some(path) => fs::read_to_string(&path).with_context(|| path.display().to_string())?,
        None => TEXT.repeat(50),
    };
    let out = args.next().unwrap_or_else(|| "runs/example".into());

    // Shards of bytes: the first document, a tenth of the text, is for validation.
    let (val, train) = text.split_at(text.floor_char_boundary(text.len() / 10));
    let files = [("val.txt", val), ("train.txt", train)].map(|(name, text)| (out.join(name), text));
    fs::create_dir_all(&out)?;
    files.iter().try_for_each(|(path, text)| fs::write(path, text))?;
    let (data, files) = (out.join("data"), files.map(|(path, _)| path).to_vec());
    pack(&PackOptions { val_docs: Some(1), ..PackOptions::new(files, "byte", data.clone()) }, &quiet)?;

    let recipe = Recipe {
        model_dim: 64,
        train_seq_len: 64,
        iterations: 60,
        warmdown_iters: 30,
        val_batch_size: 1024,
        ..Recipe::load("tiny")?
    };
    let target = backend::resolve(&DeviceChoice::Auto, None)?;
    let options = Options {
        recipe,
        data,
        tokenizer: Tokenizer::byte(),
        tokenizer_name: "byte".into(),
        out: out.clone(),
        resume: None,
        micro_batch: None,
        save_every: 0,
        echo: log::to_stdout(),
        warn: Box::new(|line| eprintln!("warning: {line}")),
    };
    let summary = train::train(options, &target, &mut |_| ())?;

    let run = TrainedRun::load(&out, &mut |line| eprintln!("warning: {line}"))?;
    let artifact = Artifact::assemble(&run.recipe, &run.tokenizer, &run.params, Scheme::Int8)?;
    let file = out.join("model.fairway");
    let sizes = artifact.write(&file, Codec::Brotli)?;
    println!("{} bytes, {:.4} bits per byte: {}", sizes.bytes, summary.val_bpb, file.display());
    Ok(())
}
