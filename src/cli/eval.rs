//! `fairway eval`.

use super::args::{self, DeviceArgs};
use super::source::Source;
use super::{output, progress};
use crate::artifact::assemble::Contents;
use crate::backend::Target;
use crate::data::folder::DataFolder;
use crate::data::stream::ValTokens;
use crate::error::{Error, Result};
use crate::eval::full::Score;
use crate::eval::text;
use crate::train::{guards, log::lines};
use std::path::PathBuf;

/// Score an artifact or a run with the challenge's exact bits per byte
#[derive(clap::Args)]
#[command(after_help = "Example: fairway eval model.fairway --data data/datasets/fineweb10B_sp1024")]
pub struct Args {
    /// An artifact, or the folder of a run
    model: PathBuf,
    /// Folder with fineweb_val_*.bin [default: the demo corpus, built if absent]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// How to walk over the tokens: full (windows side by side)
    #[arg(long, value_name = "MODE", default_value = "full")]
    mode: String,
    /// Tokens of one forward at most: a limit on memory
    #[arg(long, allow_hyphen_values = true, value_name = "TOKENS")]
    micro_batch: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: Args) -> Result<()> {
    if args.mode != "full" {
        return Err(Error::input(format!("mode {}", args.mode), "--mode", "full"));
    }
    let target = args.device.target()?;
    let source = Source::load(&args.model)?;
    let contents = &source.contents;
    let time = contents.recipe.train_seq_len;
    let batch = args.micro_batch.unwrap_or_else(|| contents.recipe.val_batch_tokens());
    if batch < time {
        return Err(Error::input(
            format!("micro-batch of {batch} tokens"),
            "--micro-batch",
            format!("at least one sequence of train_seq_len={time} tokens"),
        ));
    }
    let data = match args.data {
        Some(data) => data,
        None => args::demo_data()?,
    };
    let folder = DataFolder::open(&data)?;
    check_tokenizer(contents, &folder)?;
    let val = folder.val(time, contents.recipe.vocab_size)?;
    if !args.json {
        DeviceArgs::announce(&target);
    }
    let score = score(&source, &val, batch, &target)?;
    if args.json {
        return output::json(&serde_json::json!({
            "val_loss": score.val_loss,
            "val_bpb": score.val_bpb,
            "tokens": score.tokens,
            "bytes": score.bytes,
            "seconds": score.seconds,
        }));
    }
    output::line(format!(
        "val_loss:{:.8} val_bpb:{:.8} tokens:{} bytes:{} seconds:{:.1}",
        score.val_loss, score.val_bpb, score.tokens, score.bytes, score.seconds
    ));
    if let Some((quant, codec)) = &source.packing {
        let (loss, bpb, ms) = (score.val_loss, score.val_bpb, score.seconds * 1000.0);
        lines::roundtrip(quant, codec, loss, bpb, ms).iter().for_each(output::line);
    }
    Ok(())
}

/// Refuses shards that were made with another kind or size of tokenizer than the model's.
fn check_tokenizer(contents: &Contents, folder: &DataFolder) -> Result<()> {
    let Some(info) = folder.info() else { return Ok(()) };
    let (kind, size) = (contents.tokenizer.kind(), contents.tokenizer.vocab_size());
    if info.tokenizer.kind == kind && info.tokenizer.vocab_size == size {
        return Ok(());
    }
    Err(Error::input(
        format!("shards of a {} tokenizer of {} ids", info.tokenizer.kind, info.tokenizer.vocab_size),
        folder.dir().display(),
        format!("shards of the model's {kind} tokenizer of {size} ids"),
    ))
}

/// Scores a model on the target, with a progress bar.
pub fn score(source: &Source, val: &ValTokens, batch_tokens: usize, target: &Target) -> Result<Score> {
    let bar = progress::bar("eval", val.sequences() as u64);
    let mut show = |done, _| {
        bar.set_position(done as u64);
        guards::check_interrupt("the score is not complete")
    };
    let scored =
        text::score(source.weights(), val, &source.contents.byte_table, batch_tokens, target, &mut show);
    bar.finish_and_clear();
    scored
}
