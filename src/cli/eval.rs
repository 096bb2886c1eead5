//! `fairway eval`.

use super::args::{self, DeviceArgs};
use super::eval_method::MethodArgs;
use super::source::Source;
use super::{output, progress};
use crate::artifact::assemble::Contents;
use crate::backend::Target;
use crate::data::folder::DataFolder;
use crate::data::stream::ValTokens;
use crate::error::{Error, Result};
use crate::eval::method::{Method, Walk};
use crate::eval::sliding::Pass;
use crate::eval::tally::{Score, Text};
use crate::eval::text;
use crate::train::{guards, log::lines};
use std::path::{Path, PathBuf};

/// Score an artifact or a run with the challenge's exact bits per byte
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  fairway eval model.fairway --data data/datasets/fineweb10B_sp1024\n  \
    fairway eval runs/a --mode sliding --stride 64\n  \
    fairway eval runs/a --mode sliding --windows pr1607 --temperature 0.9\n  \
    fairway eval runs/a --stateful\n  \
    fairway eval runs/a --mode ttt --ttt-optimizer adamw --ttt-lr 0.0005\n  \
    fairway eval runs/a --mode ttt --ttt-low-rank 8")]
pub struct Args {
    /// An artifact, or the folder of a run
    model: PathBuf,
    /// Folder with fineweb_val_*.bin [default: the demo corpus, built if absent]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    #[command(flatten)]
    method: MethodArgs,
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
    args.method.check()?;
    let target = args.device.target()?;
    let source = Source::load(&args.model)?;
    let contents = &source.contents;
    let recipe = &contents.recipe;
    let seq_len = recipe.val_seq_len();
    let batch_tokens = args.micro_batch.unwrap_or_else(|| recipe.val_batch_tokens());
    if batch_tokens < seq_len {
        let key = if recipe.eval_seq_len == 0 { "train_seq_len" } else { "eval_seq_len" };
        return Err(Error::input(
            format!("micro-batch of {batch_tokens} tokens"),
            "--micro-batch",
            format!("at least one sequence of {key}={seq_len} tokens"),
        ));
    }
    let method = args.method.method(seq_len, batch_tokens, contents.tokenizer.bos())?;
    let data = match args.data {
        Some(data) => data,
        None => args::demo_data()?,
    };
    let val = val_tokens(contents, &data)?;
    if !args.json {
        DeviceArgs::announce(&target);
    }
    if let Some(warning) = args.method.warning(recipe, &method, val.tokens())? {
        output::warn(&warning);
    }
    let score = score_by(&source, &val, &method, &target)?;
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
        let last = match method.walk {
            Walk::Windows { stride, .. } | Walk::Stateful { stride, .. } if stride < seq_len => {
                lines::sliding(quant, stride, loss, bpb, ms)
            }
            Walk::Training { .. } | Walk::LowRank(_) => lines::test_time_training(loss, bpb, ms),
            _ => lines::roundtrip(quant, codec, loss, bpb, ms),
        };
        last.iter().for_each(output::line);
    }
    Ok(())
}

/// The validation tokens of a folder, in sequences of the model's length.
pub(super) fn val_tokens(contents: &Contents, data: &Path) -> Result<ValTokens> {
    let folder = DataFolder::open(data)?;
    check_tokenizer(contents, &folder)?;
    folder.val(contents.recipe.val_seq_len(), contents.recipe.vocab_size)
}

/// Refuses shards that were made with another kind or size of tokenizer than the model's.
pub(super) fn check_tokenizer(contents: &Contents, folder: &DataFolder) -> Result<()> {
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

/// Scores whole windows side by side on the target, with a progress bar.
pub fn score(source: &Source, val: &ValTokens, batch_tokens: usize, target: &Target) -> Result<Score> {
    let pass = Pass { seq_len: val.seq_len(), batch_tokens, temperature: 1.0 };
    score_by(source, val, &Method::full(pass), target)
}

/// Scores a model on the target, with a progress bar.
fn score_by(source: &Source, val: &ValTokens, method: &Method, target: &Target) -> Result<Score> {
    let text = Text { tokens: val.tokens(), table: &source.contents.byte_table };
    let bar = progress::bar("eval", 0);
    let mut show = |done, windows| {
        bar.set_length(windows as u64);
        bar.set_position(done as u64);
        guards::check_interrupt("the score is not complete")
    };
    let scored = text::score(source.weights(), &text, method, target, &mut show);
    bar.finish_and_clear();
    scored
}
