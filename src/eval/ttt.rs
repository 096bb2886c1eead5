//! Score-first test-time training: the text is cut into chunks; each is scored, and only then trained on.
//!
//! A chunk's windows are those whose first scored target lies in it, so that every target of a chunk is scored before
//! the update that is its first use as a target. Nothing is trained after the last chunk (spec/challenge.md section 1).

use super::ids_tensor;
use super::sliding::{self, Pass, Progress};
use super::tally::{Tally, Text};
use super::windows::{Window, Windows};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::{Model, params};
use crate::ops::{Param, Plain, accumulate_type};
use crate::optim::Rounding;
use crate::optim::adam::{Adam, AdamConfig};
use crate::optim::sgd::Sgd;
use crate::recipe::Recipe;
use std::collections::BTreeSet;
use std::f64::consts::PI;

/// What updates the weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// Gradient descent with this momentum.
    Sgd {
        /// What is kept of the last steps.
        momentum: f64,
    },
    /// AdamW with torch's other constants.
    AdamW {
        /// Decoupled weight decay.
        weight_decay: f64,
    },
}

/// How the model trains on what it has scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Targets of a chunk.
    pub chunk_tokens: usize,
    /// Passes over a chunk's whole sequences.
    pub epochs: usize,
    /// Sequences of one step.
    pub batch_seqs: usize,
    /// The optimizer.
    pub rule: Rule,
    /// Its learning rate.
    pub lr: f64,
    /// Whether the rate falls by half a cosine from the first chunk to 0 at the last.
    pub cosine: bool,
    /// Largest norm of the whole gradient; 0 does not clip.
    pub clip: f64,
    /// Blocks from the first that stay as they are.
    pub freeze_blocks: usize,
}

impl Options {
    /// What goes with windows of `seq_len`: PR #1607's AdamW step on each batch of 32 windows side by side, or PR #1382's
    /// SGD over chunks of 32,768 tokens, which freezes two blocks there and none where windows are our own.
    pub fn of(windows: Windows, seq_len: usize) -> Self {
        let pr1382 = Self {
            chunk_tokens: 32_768,
            epochs: 3,
            batch_seqs: 32,
            rule: Rule::Sgd { momentum: 0.9 },
            lr: 0.002,
            cosine: true,
            clip: 1.0,
            freeze_blocks: 2,
        };
        match windows {
            Windows::Pr1382 => pr1382,
            Windows::EachOnce => Self { freeze_blocks: 0, ..pr1382 },
            Windows::Pr1607 => Self {
                chunk_tokens: 32 * seq_len,
                epochs: 1,
                rule: Rule::AdamW { weight_decay: 0.01 },
                cosine: false,
                clip: 0.0,
                freeze_blocks: 0,
                ..pr1382
            },
        }
    }
}

/// The windows that test-time training scores: PR #1607's are side by side whatever the stride.
pub fn windows(windows: Windows, total: usize, seq_len: usize, stride: usize) -> Result<Vec<Window>> {
    match windows {
        Windows::EachOnce => windows.list(total, seq_len, stride),
        Windows::Pr1382 => Windows::pr1382_training(total, seq_len, stride),
        Windows::Pr1607 => Windows::EachOnce.list(total, seq_len, seq_len),
    }
}

/// Number of chunks of `total` targets.
pub fn chunks(total: usize, chunk_tokens: usize) -> usize {
    total.div_ceil(chunk_tokens.max(1))
}

/// What is scored, and how the model trains on it.
#[derive(Debug, Clone, Copy)]
pub struct Course<'a> {
    /// The windows, in an order in which their first scored targets do not decrease.
    pub windows: &'a [Window],
    /// How they are put through the model.
    pub pass: &'a Pass,
    /// How it trains between chunks.
    pub options: &'a Options,
}

/// Scores the windows into `tally`, training the model between chunks. The weights stay as they are in the end.
///
/// Errors (failed): a loss that is not a number.
pub fn score<P: Plain>(
    model: &Model<P>,
    recipe: &Recipe,
    text: &Text,
    course: &Course<'_>,
    tally: &mut Tally,
    progress: Progress<'_>,
) -> Result<()> {
    let Course { windows, pass, options } = *course;
    let total = text.targets();
    let count = chunks(total, options.chunk_tokens);
    let mut student = Student::new(model, recipe, options);
    let mut left = windows;
    for chunk in 0..count {
        let end = ((chunk + 1) * options.chunk_tokens).min(total);
        let last = chunk + 1 == count;
        let own = left.iter().take_while(|window| last || window.targets().start < end).count();
        let (own, rest) = left.split_at(own);
        left = rest;
        if own.is_empty() {
            continue;
        }
        sliding::score(model, text, own, pass, tally, progress)?;
        check_finite(tally, &format!("test-time training, chunk {} of {count}", chunk + 1))?;
        if !last {
            let lr_mul = match options.cosine {
                true => 0.5 * (1.0 + (PI * chunk as f64 / (count - 1) as f64).cos()),
                false => 1.0,
            };
            student.learn(&text.tokens[chunk * options.chunk_tokens..end + 1], pass, lr_mul);
        }
    }
    Ok(())
}

/// Refuses a loss that is not a number: training would only spread it.
pub(super) fn check_finite(tally: &Tally, place: &str) -> Result<()> {
    match tally.is_finite() {
        true => Ok(()),
        false => {
            Err(Error::failed("the loss is not a number", place, "finite losses (try a lower --ttt-lr)"))
        }
    }
}

enum Optimizer<P: Plain> {
    Sgd(Sgd<P>),
    AdamW(Adam<P>),
}

/// A model that trains, its optimizer's state going on from chunk to chunk.
struct Student<'a, P: Plain> {
    model: &'a Model<P>,
    options: &'a Options,
    optimizer: Optimizer<P>,
    params: Vec<Param<P>>,
}

impl<'a, P: Plain> Student<'a, P> {
    fn new(model: &'a Model<P>, recipe: &Recipe, options: &'a Options) -> Self {
        let frozen = frozen(model, options.freeze_blocks);
        for param in model.params().iter() {
            param.set_trainable(!frozen.contains(param.name()));
        }
        let storage = Rounding::of(recipe).storage;
        let slots: Vec<(Param<P>, bool)> = model
            .plan()
            .specs
            .iter()
            .filter(|spec| !frozen.contains(&spec.name))
            .filter_map(|spec| Some((model.params().get(&spec.name)?.clone(), spec.bf16 && storage)))
            .collect();
        let params = slots.iter().map(|(param, _)| param.clone()).collect();
        let optimizer = match options.rule {
            Rule::Sgd { momentum } => Optimizer::Sgd(Sgd::new(slots, options.lr, momentum)),
            Rule::AdamW { weight_decay } => {
                let config = AdamConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay };
                Optimizer::AdamW(Adam::new(slots, options.lr, config))
            }
        };
        Self { model, options, optimizer, params }
    }

    /// Trains on the whole sequences of a chunk: its inputs, and one token more as the last target.
    fn learn(&mut self, tokens: &[u16], pass: &Pass, lr_mul: f64) {
        let seq_len = pass.seq_len;
        let whole = (tokens.len() - 1) / seq_len * seq_len;
        let (inputs, targets) = (&tokens[..whole], &tokens[1..whole + 1]);
        let batch = self.options.batch_seqs.max(1).saturating_mul(seq_len);
        for _ in 0..self.options.epochs {
            for (inputs, targets) in inputs.chunks(batch).zip(targets.chunks(batch)) {
                self.accumulate(inputs, targets, pass);
                let grads: Vec<_> = self.params.iter().filter_map(Param::flat_grad).collect();
                let clips = self.options.clip > 0.0 && !grads.is_empty();
                let scale = clips.then(|| P::clip_factor(grads, self.options.clip));
                match &mut self.optimizer {
                    Optimizer::Sgd(sgd) => sgd.step(lr_mul, scale),
                    Optimizer::AdamW(adam) => adam.step(lr_mul, scale),
                }
                self.model.params().clear_grads();
            }
        }
    }

    /// The gradient of the mean loss of a batch, in as many forwards as the limit on memory asks for.
    fn accumulate(&self, inputs: &[u16], targets: &[u16], pass: &Pass) {
        let device = self.model.device();
        // A tensor, not a scalar: Burn differentiates a division by a scalar in f32.
        let share = HostTensor::from_f64("share", &[1], &[1.0 / inputs.len() as f64]);
        let share = params::from_host::<P>(&share, device, accumulate_type(self.model.compute_type()));
        let part = pass.rows() * pass.seq_len;
        for (inputs, targets) in inputs.chunks(part).zip(targets.chunks(part)) {
            let ids = ids_tensor::<P>(inputs, pass.seq_len, device);
            self.model.accumulate(ids, ids_tensor::<P>(targets, pass.seq_len, device), &share);
        }
    }
}

/// The parameters that stay as they are, as PR #1382 chooses them: for as many of the `blocks.N` as there are, all with
/// `blocks.N.` anywhere in their name (`mamba_blocks.N.` too); what the source keeps in a bank is never frozen.
fn frozen<P: Plain>(model: &Model<P>, blocks: usize) -> BTreeSet<String> {
    let names = || model.plan().specs.iter().map(|spec| spec.name.as_str());
    let number = |name: &str| name.strip_prefix("blocks.")?.split('.').next()?.parse::<usize>().ok();
    let there = names().filter_map(number).max().map_or(0, |last| last + 1);
    let parts: Vec<String> = (0..blocks.min(there)).map(|block| format!("blocks.{block}.")).collect();
    names()
        .filter(|name| parts.iter().any(|part| name.contains(part.as_str())))
        .filter(|name| model.params().bank_of(name).is_none())
        .map(String::from)
        .collect()
}
