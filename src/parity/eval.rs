//! `eval.*`: a model's score by windows side by side, by the peer's sliding window, and by its test-time training.

use super::case::Case;
use super::compare::Tolerance;
use super::index::Section;
use super::model::build;
use super::recipe::recipe;
use crate::data::byte_table::ByteTable;
use crate::error::{Error, Result};
use crate::eval::sliding::{self, Pass};
use crate::eval::tally::{Score, Tally, Text};
use crate::eval::ttt::{self, Rule};
use crate::eval::windows::{Window, Windows};
use crate::host::HostTensor;
use crate::model::Model;
use crate::ops::Plain;
use crate::recipe::{PR1382, PR1607, Recipe};
use burn::tensor::DType;

/// Of float32 runs whose entry states none: what the entries of the same models' losses and gradients state.
const TOLERANCE_F32: f64 = 2e-3;

/// Sequences of one forward: not all, so that windows are batched as in use.
const ROWS: usize = 5;

/// Runs what the entry's `results` hold: `full`, `sliding`, `ttt`.
pub(super) fn evaluation<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let seq_len = match case.entry.top().count("seq_len")? {
        Some(len @ 1..) => len,
        _ => return Err(Error::input("no seq_len", "entry", "the tokens of a window")),
    };
    let top = case.entry.top();
    let has = top.number("tol_f32")?.is_some();
    let bound = match case.dtype {
        DType::F64 => case.entry.bound("tol")?,
        _ if has => case.entry.bound("tol_f32")?,
        _ => TOLERANCE_F32,
    };
    case.tolerate("", Tolerance::Relative(bound));
    for name in ["out.windows", "out.times_scored"] {
        case.tolerate(name, Tolerance::Relative(0.0));
    }
    let recipe = recipe(case, [1, 1, seq_len])?;
    let (tokens, _) = case.ids("in.tokens", recipe.vocab_size)?;
    let tokens: Vec<u16> = tokens.into_iter().map(|id| id as u16).collect();
    let table = byte_table(case, recipe.vocab_size)?;
    let text = Text { tokens: &tokens, table: &table };
    if text.targets() < seq_len {
        return Err(Error::input(format!("{} tokens", tokens.len()), "in.tokens", "more than seq_len"));
    }
    let results = case.entry.section("results")?;
    results.only(&["full", "sliding", "ttt"])?;
    let [full, sliding, training] =
        [results.inner("full")?, results.inner("sliding")?, results.inner("ttt")?];
    let model = build(case, &recipe, &case.tensors, "param.")?;
    let run = Run { recipe: &recipe, model: &model, text, seq_len, bound, is_start: is_start(case) };
    if !run.is_start {
        let note = "param.* are the weights after the training, as after_ttt.*: those before it, which every loss of \
                    the entry is of, are not in the file";
        case.fact("param.*".into(), f64::NAN, 0.0, Some(note.into()));
    }
    run.full(case, full)?;
    run.sliding(case, sliding)?;
    run.training(case, training)
}

/// The tables of the fixture's own tokens.
fn byte_table<P: Plain>(case: &Case<'_, P>, vocab: usize) -> Result<ByteTable> {
    let read = |name: &str| {
        case.expect_shape(name, &[vocab])?;
        Ok::<_, Error>(case.ids(name, 1 << 16)?.0)
    };
    let flags = |name: &str| Ok::<_, Error>(read(name)?.into_iter().map(|flag| flag != 0).collect());
    Ok(ByteTable {
        base_bytes: read("in.base_bytes")?.into_iter().map(|bytes| bytes as u16).collect(),
        has_leading_space: flags("in.leading_space")?,
        is_boundary: flags("in.boundary")?,
    })
}

/// Whether the file holds the weights from which training began: not where every one equals what training made of it.
fn is_start<P: Plain>(case: &Case<'_, P>) -> bool {
    let pairs = case.tensors.iter().filter_map(|(name, after)| {
        let own = name.strip_prefix("after_ttt.")?;
        Some((case.tensors.peek(&format!("param.{own}"))?, after))
    });
    let same: Vec<bool> = pairs.map(|(start, after)| start.to_f64() == after.to_f64()).collect();
    same.is_empty() || same.contains(&false)
}

struct Run<'a, P: Plain> {
    recipe: &'a Recipe,
    model: &'a Model<P>,
    text: Text<'a>,
    seq_len: usize,
    bound: f64,
    is_start: bool,
}

impl<P: Plain> Run<'_, P> {
    fn pass(&self, temperature: f64) -> Pass {
        Pass { seq_len: self.seq_len, batch_tokens: ROWS * self.seq_len, temperature }
    }

    fn score(&self, text: &Text, windows: &[Window], temperature: f64) -> Result<Tally> {
        let mut tally = Tally::recording();
        let pass = self.pass(temperature);
        sliding::score(self.model, text, windows, &pass, &mut tally, &mut |_| Ok(()))?;
        Ok(tally)
    }

    /// Compares a score with the numbers that a section states.
    fn compare(&self, case: &mut Case<'_, P>, name: &str, section: Section<'_>, score: &Score) -> Result<()> {
        for (key, ours) in [("tokens", score.tokens), ("bytes", score.bytes)] {
            if let Some(theirs) = section.number(key)? {
                let note = format!("{ours}, expected {theirs}");
                case.fact(format!("results.{name}.{key}"), (ours as f64 - theirs).abs(), 0.0, Some(note));
            }
        }
        if !self.is_start {
            return Ok(());
        }
        for (key, ours) in [("val_loss", score.val_loss), ("val_bpb", score.val_bpb)] {
            let theirs = section.needed(key)?;
            let note = format!("{ours}, expected {theirs}");
            let error = (ours - theirs).abs() / theirs.abs();
            case.fact(format!("results.{name}.{key}"), error, self.bound, Some(note));
        }
        Ok(())
    }

    fn full(&self, case: &mut Case<'_, P>, section: Section<'_>) -> Result<()> {
        section.only(&["tokens", "bytes", "val_loss", "val_bpb"])?;
        if section.iter().next().is_none() {
            return Ok(());
        }
        let total = self.text.targets() / self.seq_len * self.seq_len;
        let text = Text { tokens: &self.text.tokens[..total + 1], ..self.text };
        let windows = Windows::EachOnce.list(total, self.seq_len, self.seq_len)?;
        let tally = self.score(&text, &windows, 1.0)?;
        self.compare(case, "full", section, &tally.score())
    }

    fn windows(&self) -> Result<Windows> {
        match self.recipe.system.as_str() {
            PR1382 => Ok(Windows::Pr1382),
            PR1607 => Ok(Windows::Pr1607),
            other => Err(Error::input("a sliding window", "results", format!("only full in {other}"))),
        }
    }

    fn sliding(&self, case: &mut Case<'_, P>, section: Section<'_>) -> Result<()> {
        section.only(&["bytes", "stride", "temp", "tokens", "val_bpb", "val_loss", "windows"])?;
        if section.iter().next().is_none() {
            return Ok(());
        }
        let temperature = section.number("temp")?.unwrap_or(1.0);
        if temperature <= 0.0 {
            return Err(Error::input(format!("temp = {temperature}"), "sliding", "a number above 0"));
        }
        let list = self.windows()?.list(self.text.targets(), self.seq_len, stride(section)?)?;
        let tally = self.score(&self.text, &list, temperature)?;
        let mut times = vec![0.0; self.text.targets()];
        tally.record().iter().for_each(|(target, _)| times[*target] += 1.0);
        case.give_host(HostTensor::from_f64("out.times_scored", &[times.len()], &times));
        let rows: Vec<f64> =
            list.iter().flat_map(|window| [window.start, window.from, window.to]).map(|n| n as f64).collect();
        case.give_host(HostTensor::from_f64("out.windows", &[list.len(), 3], &rows));
        self.compare(case, "sliding", section, &tally.score())?;
        check_count(case, "sliding.windows", section.count("windows")?, list.len());
        Ok(())
    }

    /// PR #1382's test-time training; it leaves its weights in the model.
    fn training(&self, case: &mut Case<'_, P>, section: Section<'_>) -> Result<()> {
        const KEYS: [&str; 12] = [
            "all_starts",
            "stride",
            "ttt_batch_seqs",
            "ttt_chunk_tokens",
            "ttt_epochs",
            "ttt_freeze_blocks",
            "ttt_grad_clip",
            "ttt_lr",
            "ttt_momentum",
            "val_bpb",
            "val_loss",
            "windows",
        ];
        section.only(&KEYS)?;
        if section.iter().next().is_none() {
            return Ok(());
        }
        if self.recipe.system != PR1382 {
            return Err(Error::input("ttt", "results", "only in pr1382"));
        }
        let count = |key: &str| match section.count(key)? {
            Some(count @ 1..) => Ok(count),
            _ => Err(Error::input(format!("no {key}"), "ttt", "a whole number from 1")),
        };
        let options = ttt::Options {
            chunk_tokens: count("ttt_chunk_tokens")?,
            epochs: section.count("ttt_epochs")?.unwrap_or(0),
            batch_seqs: count("ttt_batch_seqs")?,
            rule: Rule::Sgd { momentum: section.needed("ttt_momentum")? },
            lr: section.needed("ttt_lr")?,
            cosine: true,
            clip: section.needed("ttt_grad_clip")?,
            freeze_blocks: section.count("ttt_freeze_blocks")?.unwrap_or(0),
        };
        let (total, stride) = (self.text.targets(), stride(section)?);
        let list = Windows::pr1382_training(total, self.seq_len, stride)?;
        check_count(case, "ttt.windows", section.count("windows")?, list.len());
        let all = Windows::Pr1382.list(total, self.seq_len, stride)?.len();
        check_count(case, "ttt.all_starts", section.count("all_starts")?, all);
        if !self.is_start {
            // Inputs, since nothing can be compared with them.
            let names: Vec<&str> = case.tensors.iter().map(|(name, _)| name).collect();
            for name in names.into_iter().filter(|name| name.starts_with("after_ttt.")) {
                case.tensors.input(name);
            }
            return Ok(());
        }
        // What the source keeps in bfloat16 is the runner's choice, as in `train.*`.
        let recipe = Recipe { as_written: false, ..self.recipe.clone() };
        let mut tally = Tally::default();
        let (pass, mut quiet) = (self.pass(1.0), |_| Ok(()));
        let course = ttt::Course { windows: &list, pass: &pass, options: &options };
        ttt::score(self.model, &recipe, &self.text, &course, &mut tally, &mut quiet)?;
        self.compare(case, "ttt", section, &tally.score())?;
        for tensor in self.model.params().to_host()? {
            case.give_host(HostTensor { name: format!("after_ttt.{}", tensor.name), ..tensor });
        }
        Ok(())
    }
}

fn stride(section: Section<'_>) -> Result<usize> {
    section.count("stride")?.ok_or_else(|| Error::input("no stride", "results", "a whole number"))
}

fn check_count<P: Plain>(case: &mut Case<'_, P>, key: &str, theirs: Option<usize>, ours: usize) {
    if let Some(theirs) = theirs {
        let note = format!("{ours}, expected {theirs}");
        case.fact(format!("results.{key}"), ours.abs_diff(theirs) as f64, 0.0, Some(note));
    }
}
