//! Calibration: the Hessians ([`crate::quant::hessian`]) of a model's linear layers, over text that the model writes
//! itself or over training data.

pub mod collect;
pub mod generate;
pub mod sequences;

pub use generate::Generation;
pub use sequences::Sequences;

use crate::backend::{self, Job, Target};
use crate::error::Result;
use crate::eval::text::Weights;
use crate::ops::Plain;
use crate::quant::Hessians;

/// Where the tokens come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Calibration {
    /// The model itself.
    Own(Generation),
    /// Given sequences.
    Given(Sequences),
}

/// The two parts of the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The model writes; counted in tokens.
    Write,
    /// The layers' inputs are summed up; counted in sequences.
    Collect,
}

/// What is told of the work (its part, done, in all); an error that it returns stops it.
pub type Progress<'a> = &'a mut dyn FnMut(Phase, usize, usize) -> Result<()>;

/// What calibration gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrated {
    /// The Hessians of the layers that were asked for and have run, by the names of their weights.
    pub hessians: Hessians,
    /// The tokens that they are of.
    pub sequences: Sequences,
}

/// Calibrates on the target the weights of which `wanted` says so by their names.
///
/// # Errors
/// Input: weights that are not the recipe's, sequences of no input or with ids that the model does not have.
pub fn run(
    weights: Weights,
    calibration: &Calibration,
    wanted: &dyn Fn(&str) -> bool,
    target: &Target,
    progress: Progress<'_>,
) -> Result<Calibrated> {
    let job = CalibrationJob { weights, calibration, wanted, progress };
    backend::guard(target, || backend::run(target, job))
}

struct CalibrationJob<'a> {
    weights: Weights<'a>,
    calibration: &'a Calibration,
    wanted: &'a dyn Fn(&str) -> bool,
    progress: Progress<'a>,
}

impl Job for CalibrationJob<'_> {
    type Output = Calibrated;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Calibrated> {
        let model = self.weights.model::<P>(device, target)?;
        let sequences = match self.calibration {
            Calibration::Own(generation) => generate::generate(&model, generation, self.progress)?,
            Calibration::Given(sequences) => sequences.clone(),
        };
        let hessians = collect::collect(&model, &sequences, self.wanted, self.progress)?;
        Ok(Calibrated { hessians, sequences })
    }
}
