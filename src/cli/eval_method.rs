//! The options of `fairway eval` that say how the tokens are walked over.

use crate::error::{Error, Result};
use crate::eval::low_rank;
use crate::eval::method::{Method, Walk};
use crate::eval::sliding::Pass;
use crate::eval::ttt::{self, Rule};
use crate::eval::windows::{Windows, check_stride};
use crate::model::plan::Plan;
use crate::recipe::Recipe;

/// The highest rank of a change of the weights.
const HIGHEST_RANK: usize = 1024;

/// How the tokens are walked over.
#[derive(clap::Args)]
pub struct MethodArgs {
    /// full (windows side by side), sliding (overlapping windows), ttt (sliding, training on what is scored already)
    #[arg(long, value_name = "MODE", default_value = "full")]
    mode: String,
    /// Tokens from one window to the next, which are those that it scores [default: 64; 32 with --windows pr1607]
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    stride: Option<usize>,
    /// Where windows begin: each-once scores every token of `full` once; pr1382 and pr1607 do as those PRs, which score
    /// some at the end again [default: each-once]
    #[arg(long, value_name = "WINDOWS")]
    windows: Option<String>,
    /// Carry the states of state space layers over windows; attention sees its own window
    #[arg(long)]
    stateful: bool,
    /// Parts of the text that --stateful runs side by side, each from an empty state
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    streams: Option<usize>,
    /// Divides the logits
    #[arg(long, allow_hyphen_values = true, value_name = "T", default_value_t = 1.0)]
    temperature: f64,
    /// ttt learns a change of this rank of the weights, anew for each document, by Adam
    #[arg(long, allow_hyphen_values = true, value_name = "RANK")]
    ttt_low_rank: Option<usize>,
    /// Optimizer of ttt: sgd or adamw [default: sgd; adamw with --windows pr1607]
    #[arg(long, value_name = "RULE")]
    ttt_optimizer: Option<String>,
    /// Its learning rate [default: 0.002; 0.01 with --ttt-low-rank]
    #[arg(long, allow_hyphen_values = true, value_name = "LR")]
    ttt_lr: Option<f64>,
    /// What sgd keeps of the last steps, from 0 to below 1 [default: 0.9]
    #[arg(long, allow_hyphen_values = true, value_name = "MU")]
    ttt_momentum: Option<f64>,
    /// Its passes over each chunk [default: 3; 1 with --windows pr1607 or --ttt-low-rank]
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    ttt_epochs: Option<usize>,
    /// Tokens scored before each training [default: 32768; 32 windows with --windows pr1607; 256 with --ttt-low-rank]
    #[arg(long, allow_hyphen_values = true, value_name = "TOKENS")]
    ttt_chunk: Option<usize>,
    /// Sequences of one step [default: 32]
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    ttt_batch: Option<usize>,
    /// First blocks that do not train [default: 0; 2 with --windows pr1382]
    #[arg(long, allow_hyphen_values = true, value_name = "N")]
    ttt_freeze: Option<usize>,
    /// Largest norm of a step's gradient, 0 for no limit [default: 1; 0 with --windows pr1607]
    #[arg(long, allow_hyphen_values = true, value_name = "NORM")]
    ttt_clip: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Full,
    Sliding,
    Ttt,
}

impl MethodArgs {
    fn mode(&self) -> Result<Mode> {
        match self.mode.as_str() {
            "full" => Ok(Mode::Full),
            "sliding" => Ok(Mode::Sliding),
            "ttt" => Ok(Mode::Ttt),
            other => Err(Error::input(format!("mode {other}"), "--mode", "full, sliding or ttt")),
        }
    }

    fn windows(&self) -> Result<Windows> {
        self.windows.as_deref().map_or(Ok(Windows::EachOnce), str::parse)
    }

    /// Refuses options that do not go together.
    pub fn check(&self) -> Result<()> {
        let (mode, windows) = (self.mode()?, self.windows()?);
        let refuse = |flag: &str, expected: &str| {
            Err(Error::input(format!("{flag} with --mode {}", self.mode), flag, expected))
        };
        if mode == Mode::Full && self.stride.is_some() {
            return refuse("--stride", "--mode sliding or ttt");
        }
        if mode == Mode::Full && self.windows.is_some() {
            return refuse("--windows", "--mode sliding or ttt");
        }
        if mode == Mode::Ttt && self.stateful {
            return refuse("--stateful", "--mode full or sliding");
        }
        if self.stateful && windows != Windows::EachOnce {
            let what = format!("--stateful with --windows {windows}");
            return Err(Error::input(what, "--windows", "each-once"));
        }
        if mode == Mode::Ttt && windows == Windows::Pr1607 && self.stride.is_some() {
            let what = "--stride with --mode ttt --windows pr1607";
            return Err(Error::input(what, "--stride", "no stride: these windows lie side by side"));
        }
        if self.streams.is_some() && !self.stateful {
            return Err(Error::input("--streams without --stateful", "--streams", "--stateful"));
        }
        if !(self.temperature > 0.0 && self.temperature <= 1e6) {
            let what = format!("temperature {}", self.temperature);
            return Err(Error::input(what, "--temperature", "a number above 0, at most 1000000"));
        }
        // Each with whether it is given, and whether it is of the training of the full weights alone.
        let training = [
            ("--ttt-low-rank", self.ttt_low_rank.is_some(), false),
            ("--ttt-lr", self.ttt_lr.is_some(), false),
            ("--ttt-epochs", self.ttt_epochs.is_some(), false),
            ("--ttt-chunk", self.ttt_chunk.is_some(), false),
            ("--ttt-optimizer", self.ttt_optimizer.is_some(), true),
            ("--ttt-momentum", self.ttt_momentum.is_some(), true),
            ("--ttt-batch", self.ttt_batch.is_some(), true),
            ("--ttt-freeze", self.ttt_freeze.is_some(), true),
            ("--ttt-clip", self.ttt_clip.is_some(), true),
        ];
        let given = || training.iter().filter(|(_, given, _)| *given);
        if let Some((flag, ..)) = given().next().filter(|_| mode != Mode::Ttt) {
            return refuse(flag, "--mode ttt");
        }
        let of_full = given().find(|(_, _, of_full)| *of_full).map(|(flag, ..)| *flag);
        match of_full.or((windows != Windows::EachOnce).then_some("--windows")) {
            Some(flag) if self.ttt_low_rank.is_some() => {
                let what = format!("{flag} with --ttt-low-rank");
                Err(Error::input(what, flag, "training of the full weights"))
            }
            _ => Ok(()),
        }
    }

    /// The method for windows of `seq_len` in forwards of at most `batch_tokens`, for documents that begin with `bos`.
    pub fn method(&self, seq_len: usize, batch_tokens: usize, bos: u16) -> Result<Method> {
        let pass = Pass { seq_len, batch_tokens, temperature: self.temperature };
        let (mode, windows) = (self.mode()?, self.windows()?);
        let common = if windows == Windows::Pr1607 { 32 } else { 64 };
        let stride = match mode {
            Mode::Full => seq_len,
            _ => self.stride.unwrap_or_else(|| seq_len.min(common)),
        };
        check_stride(seq_len, stride)?;
        let walk = match mode {
            Mode::Ttt if self.ttt_low_rank.is_some() => Walk::LowRank(self.low_rank(stride, bos)?),
            Mode::Ttt => Walk::Training { windows, stride, options: self.training(windows, seq_len)? },
            _ if self.stateful => Walk::Stateful { stride, streams: self.streams(&pass)? },
            _ => Walk::Windows { windows, stride },
        };
        Ok(Method { walk, pass })
    }

    fn streams(&self, pass: &Pass) -> Result<usize> {
        match self.streams.unwrap_or(1) {
            streams if streams <= pass.rows() => Ok(streams),
            streams => {
                let what = format!("{streams} streams of {} tokens", pass.seq_len);
                let expected = format!("at most {} by --micro-batch {}", pass.rows(), pass.batch_tokens);
                Err(Error::input(what, "--streams", expected))
            }
        }
    }

    fn low_rank(&self, stride: usize, bos: u16) -> Result<low_rank::Options> {
        let rank = count("--ttt-low-rank", self.ttt_low_rank, 8)?;
        if rank > HIGHEST_RANK {
            return Err(Error::input(rank, "--ttt-low-rank", format!("at most {HIGHEST_RANK}")));
        }
        Ok(low_rank::Options {
            rank,
            chunk_tokens: count("--ttt-chunk", self.ttt_chunk, 256)?,
            epochs: count("--ttt-epochs", self.ttt_epochs, 1)?,
            lr: number("--ttt-lr", self.ttt_lr, 0.01)?,
            stride,
            bos,
            seed: 1337,
        })
    }

    fn momentum(&self) -> Result<f64> {
        match self.ttt_momentum.unwrap_or(0.9) {
            momentum if (0.0..1.0).contains(&momentum) => Ok(momentum),
            momentum => Err(Error::input(momentum, "--ttt-momentum", "a number from 0 to below 1")),
        }
    }

    fn training(&self, windows: Windows, seq_len: usize) -> Result<ttt::Options> {
        let default = ttt::Options::of(windows, seq_len);
        let rule = match (self.ttt_optimizer.as_deref(), default.rule) {
            (Some("sgd"), _) | (None, Rule::Sgd { .. }) => Rule::Sgd { momentum: self.momentum()? },
            _ if self.ttt_momentum.is_some() => {
                return Err(Error::input("--ttt-momentum without sgd", "--ttt-momentum", "sgd"));
            }
            (Some("adamw"), Rule::Sgd { .. }) => Rule::AdamW { weight_decay: 0.01 },
            (None | Some("adamw"), rule) => rule,
            (Some(other), _) => {
                return Err(Error::input(format!("optimizer {other}"), "--ttt-optimizer", "sgd or adamw"));
            }
        };
        Ok(ttt::Options {
            rule,
            lr: number("--ttt-lr", self.ttt_lr, default.lr)?,
            clip: number("--ttt-clip", self.ttt_clip, default.clip)?,
            epochs: count("--ttt-epochs", self.ttt_epochs, default.epochs)?,
            chunk_tokens: count("--ttt-chunk", self.ttt_chunk, default.chunk_tokens)?,
            batch_seqs: count("--ttt-batch", self.ttt_batch, default.batch_seqs)?,
            freeze_blocks: self.ttt_freeze.unwrap_or(default.freeze_blocks),
            ..default
        })
    }

    /// What a user may not expect of the method on these tokens.
    pub fn warning(&self, recipe: &Recipe, method: &Method, tokens: &[u16]) -> Result<Option<String>> {
        let (targets, seq_len) = (tokens.len() - 1, method.pass.seq_len);
        Ok(match &method.walk {
            Walk::Training { options: ttt::Options { chunk_tokens, .. }, .. } => {
                if ttt::chunks(targets, *chunk_tokens) < 2 {
                    let chunk = format!("{targets} tokens are one chunk of --ttt-chunk {chunk_tokens}");
                    Some(format!("{chunk}: nothing is trained before they are scored"))
                } else if *chunk_tokens < seq_len {
                    let chunk = format!("--ttt-chunk {chunk_tokens} is no whole window of {seq_len} tokens");
                    Some(format!("{chunk}: nothing is trained"))
                } else {
                    None
                }
            }
            Walk::LowRank(low_rank::Options { chunk_tokens, bos, .. }) => {
                let documents = low_rank::documents(tokens, *bos);
                documents.iter().all(|targets| targets.len() <= *chunk_tokens).then(|| {
                    format!("no document is longer than --ttt-chunk {chunk_tokens}: nothing is trained")
                })
            }
            Walk::Stateful { .. } if !Plan::of(recipe)?.has_state() => {
                Some("--stateful: the model has no state space layer that could carry a state".into())
            }
            Walk::Stateful { .. } | Walk::Windows { .. } => None,
        })
    }
}

fn number(flag: &str, given: Option<f64>, default: f64) -> Result<f64> {
    match given.unwrap_or(default) {
        value if value.is_finite() && value >= 0.0 => Ok(value),
        value => Err(Error::input(value, flag, "a number from 0")),
    }
}

fn count(flag: &str, given: Option<usize>, default: usize) -> Result<usize> {
    match given.unwrap_or(default) {
        0 => Err(Error::input(0, flag, "at least 1")),
        value => Ok(value),
    }
}
