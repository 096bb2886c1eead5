//! Score-first test-time training of a low-rank change of the weights, begun anew with each document.
//!
//! `w + b a` takes the place of the weights `w[o, i]` that mixers begin with, `a[r, i]` random and `b[o, r]` zero at a
//! document's first token; both learn by Adam from what is scored of the document: `gb = gw a^T`, `ga = b^T gw`. A
//! document begins with the token that says so; its windows do not reach into the one before, and nothing of another
//! document's training reaches it. The first window scores no more than a chunk, so that what follows is scored by what
//! has learned from it, also in documents that are no longer than a window.

use super::ids_tensor;
use super::sliding::{self, Pass, Progress};
use super::tally::{Tally, Text};
use super::ttt;
use super::windows::{Window, Windows};
use crate::error::Result;
use crate::host::HostTensor;
use crate::model::{EMBEDDING, Model, init, params};
use crate::ops::{Param, Plain, accumulate_type};
use crate::optim::adam::{Adam, AdamConfig};
use burn::tensor::Tensor;
use rand::Rng;
use std::ops::Range;

/// What ends the names of the weights that mixers begin with.
const CHANGED: [&str; 3] = [".c_q.weight", ".c_v.weight", ".in_proj.weight"];

/// How the change learns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Its rank.
    pub rank: usize,
    /// Targets of a document that are scored before each training.
    pub chunk_tokens: usize,
    /// Steps on each chunk.
    pub epochs: usize,
    /// Adam's learning rate.
    pub lr: f64,
    /// Targets from one window to the next.
    pub stride: usize,
    /// The token that begins a document.
    pub bos: u16,
    /// Of the random start.
    pub seed: u64,
}

/// The targets of each document: those that its own tokens are the inputs of.
pub fn documents(tokens: &[u16], bos: u16) -> Vec<Range<usize>> {
    let total = tokens.len().saturating_sub(1);
    let mut starts: Vec<usize> = (0..total).filter(|at| *at == 0 || tokens[*at] == bos).collect();
    starts.push(total);
    starts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// A document's windows, chunk by chunk, up to the last chunk that has some.
struct Document {
    targets: Range<usize>,
    chunks: Vec<Vec<Window>>,
}

impl Document {
    fn new(targets: Range<usize>, seq_len: usize, options: &Options) -> Result<Self> {
        let count = targets.len().div_ceil(options.chunk_tokens);
        let mut chunks = vec![Vec::new(); count];
        let windows = Windows::each_once_after(options.chunk_tokens, targets.len(), seq_len, options.stride)?;
        for window in windows {
            let chunk = window.targets().start / options.chunk_tokens;
            chunks[chunk].push(Window { start: window.start + targets.start, ..window });
        }
        while chunks.last().is_some_and(Vec::is_empty) {
            chunks.pop();
        }
        Ok(Self { targets, chunks })
    }
}

/// The windows of a text, document by document.
pub struct Documents(Vec<Document>);

impl Documents {
    /// Cuts a text. Errors (input): a stride that [`Windows::each_once_after`] refuses.
    pub fn new(text: &Text, seq_len: usize, options: &Options) -> Result<Self> {
        let documents = documents(text.tokens, options.bos).into_iter();
        documents.map(|targets| Document::new(targets, seq_len, options)).collect::<Result<_>>().map(Self)
    }

    /// Number of windows.
    pub fn windows(&self) -> usize {
        self.0.iter().flat_map(|document| &document.chunks).map(Vec::len).sum()
    }
}

/// Scores every target once into `tally`: the first chunks of all documents, then the rest of each, training between its
/// chunks. The model has its own weights again in the end.
pub fn score<P: Plain>(
    model: &Model<P>,
    text: &Text,
    documents: &Documents,
    (pass, options): (&Pass, &Options),
    tally: &mut Tally,
    progress: Progress<'_>,
) -> Result<()> {
    let first = documents.0.iter().filter_map(|document| document.chunks.first());
    let first: Vec<Window> = first.flatten().copied().collect();
    sliding::score(model, text, &first, pass, tally, progress)?;
    let mut change = Change::new(model, options);
    for Document { targets, chunks } in documents.0.iter().filter(|document| document.chunks.len() > 1) {
        change.begin();
        for (index, windows) in chunks.iter().enumerate().skip(1) {
            let start = targets.start + (index - 1) * options.chunk_tokens;
            change.learn(&text.tokens[start..=start + options.chunk_tokens], pass.seq_len);
            sliding::score(model, text, windows, pass, tally, progress)?;
            ttt::check_finite(tally, "a document's training")?;
        }
    }
    change.end();
    Ok(())
}

/// One weight and its change.
struct Changed<P: Plain> {
    weight: Param<P>,
    own: Tensor<P, 1>,
    a: Param<P>,
    b: Param<P>,
    start: [Tensor<P, 2>; 2],
}

impl<P: Plain> Changed<P> {
    fn new(weight: Param<P>, options: &Options) -> Self {
        let (outputs, inputs) = (weight.shape()[0], weight.shape()[1]);
        let own = weight.flat();
        let (device, dtype) = (own.device(), own.dtype());
        let mut rng = init::generator(options.seed, &format!("low_rank.{}", weight.name()));
        let bound = 1.0 / (inputs as f32).sqrt();
        let count = options.rank * inputs;
        let values: Vec<f32> = (0..count).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect();
        let values = HostTensor::from_f32("a", &[count], &values);
        let a: Tensor<P, 2> = params::from_host::<P>(&values, &device, dtype).reshape([options.rank, inputs]);
        let b = Tensor::zeros([outputs, options.rank], (&device, dtype));
        Self {
            a: Param::new("a", a.clone(), dtype),
            b: Param::new("b", b.clone(), dtype),
            start: [a, b],
            own,
            weight,
        }
    }

    fn begin(&self) {
        self.a.set(self.start[0].clone());
        self.b.set(self.start[1].clone());
        self.weight.set_flat(self.own.clone());
    }

    /// Hands the weight's gradient on to the change.
    fn share_gradient(&self) {
        if let Some(grad) = self.weight.take_grad::<2>() {
            let (a, b) = (self.a.value::<2>(), self.b.value::<2>());
            let dtype = grad.dtype();
            self.b.accumulate(P::matmul_as(grad.clone(), a.transpose(), dtype));
            self.a.accumulate(P::matmul_as(b.transpose(), grad, dtype));
        }
    }

    fn apply(&self) {
        let dtype = self.own.dtype();
        let change = P::matmul_as(self.b.value::<2>(), self.a.value::<2>(), dtype);
        self.weight.set_flat(self.own.clone() + change.reshape([self.weight.numel()]));
    }
}

/// The change of all weights, and its optimizer.
struct Change<'a, P: Plain> {
    model: &'a Model<P>,
    options: &'a Options,
    weights: Vec<Changed<P>>,
    adam: Adam<P>,
}

impl<'a, P: Plain> Change<'a, P> {
    fn new(model: &'a Model<P>, options: &'a Options) -> Self {
        let is_changed = |name: &str| CHANGED.iter().any(|end| name.ends_with(end));
        for param in model.params().iter() {
            // The embedding's gradient goes nowhere, but without it nothing before the first change is on the tape.
            param.set_trainable(is_changed(param.name()) || param.name() == EMBEDDING);
        }
        let changed = model.params().iter().filter(|param| is_changed(param.name()));
        let weights: Vec<Changed<P>> = changed.map(|param| Changed::new(param.clone(), options)).collect();
        let adam = adam(&weights, options);
        Self { model, options, weights, adam }
    }

    fn begin(&mut self) {
        self.weights.iter().for_each(Changed::begin);
        self.adam = adam(&self.weights, self.options);
    }

    fn end(&self) {
        self.weights.iter().for_each(Changed::begin);
    }

    /// Trains on a chunk: its inputs, and one token more as the last target.
    fn learn(&mut self, tokens: &[u16], seq_len: usize) {
        let device = self.model.device();
        let (inputs, targets) = (&tokens[..tokens.len() - 1], &tokens[1..]);
        let share = HostTensor::from_f64("share", &[1], &[1.0 / inputs.len() as f64]);
        let share = params::from_host::<P>(&share, device, accumulate_type(self.model.compute_type()));
        for _ in 0..self.options.epochs {
            for (inputs, targets) in inputs.chunks(seq_len).zip(targets.chunks(seq_len)) {
                let ids = ids_tensor::<P>(inputs, inputs.len(), device);
                self.model.accumulate(ids, ids_tensor::<P>(targets, targets.len(), device), &share);
            }
            self.weights.iter().for_each(Changed::share_gradient);
            self.adam.step(1.0, None);
            self.weights.iter().for_each(Changed::apply);
            self.model.params().clear_grads();
        }
    }
}

fn adam<P: Plain>(weights: &[Changed<P>], options: &Options) -> Adam<P> {
    let config = AdamConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0 };
    let params = weights.iter().flat_map(|changed| [changed.a.clone(), changed.b.clone()]);
    Adam::new(params.map(|param| (param, false)).collect(), options.lr, config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_begin_with_their_token_and_have_every_target_once() {
        assert_eq!(documents(&[1, 5, 6, 1, 7, 1], 1), [0..3, 3..5]);
        assert_eq!(documents(&[5, 6, 1, 1, 7], 1), [0..2, 2..3, 3..4]);
        assert_eq!(documents(&[5, 6, 7], 9).first(), Some(&(0..2)));
        assert!(documents(&[5], 1).is_empty());
        for seed in 0..50u16 {
            let tokens: Vec<u16> = (0..40).map(|i| (i * i + seed * i) % 7).collect();
            let all: Vec<usize> = documents(&tokens, 1).into_iter().flatten().collect();
            assert!(all.into_iter().eq(0..39));
        }
    }
}
