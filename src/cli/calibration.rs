//! `--calibrate` of `fairway export`.

use super::source::Source;
use super::{eval, output, progress};
use crate::backend::Target;
use crate::calibrate::{self, Calibration, Generation, Phase, Sequences};
use crate::data::folder::DataFolder;
use crate::error::{Error, Result};
use crate::quant::{Hessians, Scheme};
use crate::train::guards;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// The most sequences that `self:N` takes.
const MOST_SEQUENCES: usize = 65_536;

/// Where the tokens come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokens {
    /// The model writes them, so many sequences if it is said.
    Own(Option<usize>),
    /// The training shards of a folder.
    Data(PathBuf),
}

impl Tokens {
    /// What the flag says, or `self` where it is not there; refused for a scheme that has no use for it.
    pub fn parse(flag: Option<&Path>, scheme: Scheme) -> Result<Option<Self>> {
        let Some(flag) = flag else { return Ok(scheme.needs_hessians().then_some(Self::Own(None))) };
        if !scheme.needs_hessians() {
            let what = format!("a calibration for --quant {scheme}, which has no use for it");
            return Err(Error::input(what, "--calibrate", "--quant gptq-intN"));
        }
        let text = flag.to_str();
        if text == Some("self") {
            return Ok(Some(Self::Own(None)));
        }
        let Some(count) = text.and_then(|text| text.strip_prefix("self:")) else {
            return Ok(Some(Self::Data(flag.to_path_buf())));
        };
        match count.parse() {
            Ok(count @ 1..=MOST_SEQUENCES) => Ok(Some(Self::Own(Some(count)))),
            _ => Err(Error::input(
                format!("{count:?} sequences"),
                "--calibrate",
                format!("self, self:N with N from 1 to {MOST_SEQUENCES}, or a folder of shards"),
            )),
        }
    }

    /// What is to be read, checked.
    pub fn open(self, source: &Source) -> Result<Plan> {
        let recipe = &source.contents.recipe;
        let own = Generation::of(recipe);
        Ok(match self {
            Self::Own(count) => {
                let generation = Generation { sequences: count.unwrap_or(own.sequences), ..own };
                Plan { from: "self".into(), calibration: Calibration::Own(generation) }
            }
            Self::Data(dir) => {
                let folder = DataFolder::open(&dir)?;
                eval::check_tokenizer(&source.contents, &folder)?;
                let sequences = Sequences::of_data(&folder, recipe.vocab_size, own.sequences, own.length)?;
                Plan { from: dir.display().to_string(), calibration: Calibration::Given(sequences) }
            }
        })
    }
}

/// What calibration is to read.
pub struct Plan {
    from: String,
    calibration: Calibration,
}

/// What it has read.
#[derive(Debug, serde::Serialize)]
pub struct Report {
    /// `self`, or the folder.
    from: String,
    sequences: usize,
    /// Of each sequence.
    tokens: usize,
    /// Of what the model wrote itself.
    temperature: Option<f64>,
    seed: Option<u64>,
    hessians: usize,
    seconds: f64,
}

impl Plan {
    /// Calibrates the weights of which `wanted` says so, with a progress bar.
    pub fn run(
        self,
        source: &Source,
        wanted: &dyn Fn(&str) -> bool,
        target: &Target,
    ) -> Result<(Hessians, Report)> {
        let started = Instant::now();
        let bar = progress::bar("calibrate", 0);
        let mut show = |phase, done, total| {
            bar.set_prefix(match phase {
                Phase::Write => "calibrate: the model writes",
                Phase::Collect => "calibrate: inputs of its layers",
            });
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            guards::check_interrupt("the calibration is not complete")
        };
        let run = calibrate::run(source.weights(), &self.calibration, wanted, target, &mut show);
        bar.finish_and_clear();
        let calibrated = run?;
        let own = match self.calibration {
            Calibration::Own(generation) => Some(generation),
            Calibration::Given(_) => None,
        };
        let report = Report {
            from: self.from,
            sequences: calibrated.sequences.count(),
            tokens: calibrated.sequences.length,
            temperature: own.map(|own| own.temperature),
            seed: own.map(|own| own.seed),
            hessians: calibrated.hessians.len(),
            seconds: started.elapsed().as_secs_f64(),
        };
        Ok((calibrated.hessians, report))
    }
}

impl Report {
    /// For people.
    pub fn print(&self) {
        let from = match (self.temperature, self.seed) {
            (Some(temperature), Some(seed)) => {
                format!("that the model wrote (temperature {temperature}, seed {seed})")
            }
            _ => format!("of {}", self.from),
        };
        output::line(format!(
            "calibration: {} sequences of {} tokens {from}; {} Hessians in {:.1} s",
            self.sequences, self.tokens, self.hessians, self.seconds
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_read() {
        let parse = |text: &str, scheme| Tokens::parse(Some(Path::new(text)), scheme);
        assert_eq!(Tokens::parse(None, Scheme::Int8).unwrap(), None);
        assert_eq!(Tokens::parse(None, Scheme::Gptq(4)).unwrap(), Some(Tokens::Own(None)));
        assert_eq!(parse("self", Scheme::Gptq(6)).unwrap(), Some(Tokens::Own(None)));
        assert_eq!(parse("self:5", Scheme::Gptq(6)).unwrap(), Some(Tokens::Own(Some(5))));
        assert_eq!(parse("./self", Scheme::Gptq(6)).unwrap(), Some(Tokens::Data("./self".into())));
        for text in ["self:", "self:0", "self:-1", "self:x", "self:65537"] {
            assert_eq!(parse(text, Scheme::Gptq(6)).unwrap_err().exit_code(), 2, "{text}");
        }
        for scheme in [Scheme::Int8, Scheme::Int(6), Scheme::Fp16, Scheme::Ternary] {
            assert_eq!(parse("self", scheme).unwrap_err().exit_code(), 2, "{scheme}");
        }
    }
}
