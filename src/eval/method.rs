//! How a text is scored: the choice among full, sliding, stateful evaluation and test-time training, and its pass.

use super::sliding::{self, Pass};
use super::tally::{Score, Tally, Text};
use super::windows::{Window, Windows};
use super::{low_rank, stateful, ttt};
use crate::error::Result;
use crate::model::Model;
use crate::ops::Plain;
use crate::recipe::Recipe;

/// A way to walk over a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Walk {
    /// Windows from an empty state each; a stride of their length sets them side by side.
    Windows {
        /// Where they begin.
        windows: Windows,
        /// Targets that each but the first scores.
        stride: usize,
    },
    /// State space layers carry their state from window to window.
    Stateful {
        /// Targets that each window but the first scores.
        stride: usize,
        /// Parts of the text that run side by side.
        streams: usize,
    },
    /// The model trains on what it has scored.
    Training {
        /// Where windows begin.
        windows: Windows,
        /// Targets that each but the first scores.
        stride: usize,
        /// How it trains.
        options: ttt::Options,
    },
    /// A low-rank change of the weights learns from what is scored of each document.
    LowRank(low_rank::Options),
}

/// A whole way of scoring.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Method {
    /// The order and the state.
    pub walk: Walk,
    /// Windows' length, batches, temperature.
    pub pass: Pass,
}

/// What a method does with a text, before anything is computed.
enum Work {
    Windows(Vec<Window>),
    Stateful(stateful::Options, usize),
    Training(Vec<Window>, ttt::Options),
    LowRank(low_rank::Documents, low_rank::Options),
}

impl Method {
    /// Windows side by side.
    pub fn full(pass: Pass) -> Self {
        Self { walk: Walk::Windows { windows: Windows::EachOnce, stride: pass.seq_len }, pass }
    }

    fn work(&self, text: &Text) -> Result<Work> {
        let total = text.targets();
        let Pass { seq_len, temperature, .. } = self.pass;
        Ok(match self.walk {
            Walk::Windows { windows, stride } => Work::Windows(windows.list(total, seq_len, stride)?),
            Walk::Stateful { stride, streams } => {
                let options = stateful::Options { seq_len, stride, streams, temperature };
                let windows = stateful::Streams::new(total, &options)?.windows.len();
                Work::Stateful(options, windows)
            }
            Walk::Training { windows, stride, options } => {
                Work::Training(ttt::windows(windows, total, seq_len, stride)?, options)
            }
            Walk::LowRank(options) => {
                Work::LowRank(low_rank::Documents::new(text, seq_len, &options)?, options)
            }
        })
    }

    /// Scores `text`. `progress` is told (windows done, windows in all); an error that it returns stops the work.
    ///
    /// Errors (input): windows that do not fit the text. Test-time training leaves its weights in the model.
    pub fn score<P: Plain>(
        &self,
        model: &Model<P>,
        recipe: &Recipe,
        text: &Text,
        progress: &mut dyn FnMut(usize, usize) -> Result<()>,
    ) -> Result<Score> {
        let work = self.work(text)?;
        let windows = match &work {
            Work::Windows(windows) | Work::Training(windows, _) => windows.len(),
            Work::Stateful(_, windows) => *windows,
            Work::LowRank(documents, _) => documents.windows(),
        };
        let mut done = 0;
        let mut step = |count| {
            done += count;
            progress(done, windows)
        };
        let mut tally = Tally::default();
        match work {
            Work::Windows(list) => {
                sliding::score(model, text, &list, &self.pass, &mut tally, &mut step)?;
            }
            Work::Stateful(options, _) => stateful::score(model, text, &options, &mut tally, &mut step)?,
            Work::Training(list, options) => {
                let course = ttt::Course { windows: &list, pass: &self.pass, options: &options };
                ttt::score(model, recipe, text, &course, &mut tally, &mut step)?;
            }
            Work::LowRank(documents, options) => {
                let how = (&self.pass, &options);
                low_rank::score(model, text, &documents, how, &mut tally, &mut step)?;
            }
        }
        Ok(tally.score())
    }
}
