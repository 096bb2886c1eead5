//! Evaluation that carries state space layers' states from window to window.
//!
//! The windows are those that score every target once. Attention sees its own window only, positions from 0, as in
//! training; the embedding's last tokens and every state space layer go on from the position where the window begins. A
//! window that overlaps the next is run in two pieces, and the state between them is what the next one begins with.
//!
//! The text may be cut into several streams that run side by side, each from an empty state: faster on a GPU, and the
//! score of as many first windows without what is before them.

use super::ids_tensor;
use super::sliding::Progress;
use super::tally::{Tally, Text};
use super::windows::{Window, Windows};
use crate::error::{Error, Result};
use crate::model::{Cache, Model, params};
use crate::ops::Plain;
use burn::tensor::Tensor;
use std::ops::Range;

/// How the state goes on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Positions of a window.
    pub seq_len: usize,
    /// Targets that each window but the first scores; `seq_len` sets the windows side by side.
    pub stride: usize,
    /// Parts of the text that run side by side.
    pub streams: usize,
    /// Divides the logits.
    pub temperature: f64,
}

/// The parts of a text: `streams` of `targets` each, the last of them cut by the end of the text.
#[derive(Debug, Clone, PartialEq)]
pub struct Streams {
    streams: usize,
    targets: usize,
    /// The windows of each.
    pub windows: Vec<Window>,
}

impl Streams {
    /// Cuts `total` targets into as many parts.
    ///
    /// Errors (input): no part or more than targets, or a stride that [`Windows::list`] refuses.
    pub fn new(total: usize, options: &Options) -> Result<Self> {
        if !(1..=total).contains(&options.streams) {
            let what = format!("{} streams", options.streams);
            return Err(Error::input(what, "--streams", format!("1 to the {total} targets")));
        }
        let targets = total.div_ceil(options.streams);
        let windows = Windows::EachOnce.list(targets, options.seq_len, options.stride)?;
        // Rounded up, fewer parts may be enough.
        Ok(Self { streams: total.div_ceil(targets), targets, windows })
    }

    /// The places in the text of some of a stream's positions, stream by stream.
    fn places(&self, positions: Range<usize>) -> impl Iterator<Item = usize> + '_ {
        (0..self.streams)
            .flat_map(move |stream| positions.clone().map(move |position| stream * self.targets + position))
    }
}

/// Scores every target once into `tally`, in the order of the streams' windows. `progress` is told of each window.
pub fn score<P: Plain>(
    model: &Model<P>,
    text: &Text,
    options: &Options,
    tally: &mut Tally,
    progress: Progress<'_>,
) -> Result<()> {
    let streams = Streams::new(text.targets(), options)?;
    let mut cache = model.cache::<P>(options.seq_len);
    for (index, window) in streams.windows.iter().enumerate() {
        let until = streams.windows.get(index + 1).map_or(window.len, |next| next.start - window.start);
        let read = |from: usize, to: usize, cache: &mut Cache<P>| {
            read(model, text, &streams, window.start + from..window.start + to, cache)
        };
        let mut hidden = read(0, until, &mut cache);
        if until < window.len {
            let rest = read(until, window.len, &mut cache.clone());
            hidden = Tensor::cat(vec![hidden, rest], 1);
        }
        cache.next_window();

        let [rows, _, columns] = hidden.dims();
        let scored = window.to - window.from;
        let hidden = hidden.narrow(1, window.from, scored).reshape([rows * scored, columns]);
        let targets: Vec<u16> =
            streams.places(window.targets()).map(|target| token(text, target + 1)).collect();
        let device = model.device();
        let losses = model.nll_at(hidden, ids_tensor::<P>(&targets, scored, device), options.temperature);
        let losses = params::to_host("loss", &[targets.len()], losses)?.to_f64();
        for (target, loss) in streams.places(window.targets()).zip(losses) {
            if target < text.targets() {
                tally.add(text, target, loss);
            }
        }
        progress(1)?;
    }
    Ok(())
}

/// The token of that number; 0 behind the end, where the last stream has run out of text.
fn token(text: &Text, index: usize) -> u16 {
    text.tokens.get(index).copied().unwrap_or(0)
}

/// Hidden rows `[streams, t, c]` of positions of each stream.
fn read<P: Plain>(
    model: &Model<P>,
    text: &Text,
    streams: &Streams,
    positions: Range<usize>,
    cache: &mut Cache<P>,
) -> Tensor<P, 3> {
    let time = positions.len();
    let ids: Vec<u16> = streams.places(positions).map(|place| token(text, place)).collect();
    let hidden = model.hidden::<P>(ids_tensor::<P>(&ids, time, model.device()), Some(cache), None);
    let columns = hidden.dims()[1];
    hidden.reshape([streams.streams, time, columns])
}
