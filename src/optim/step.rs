//! One training step: gradients accumulated over the spans of the stream, then one update.

use super::averages::Averages;
use super::{Optimizers, Rounding};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::{Model, ids_tensor, params};
use crate::ops::{Plain, accumulate_type};
use crate::recipe::Recipe;
use burn::tensor::Tensor;

/// One span of the token stream: inputs and, one further, targets.
pub type Span = (Vec<u16>, Vec<u16>);

/// Refuses a loss that is not finite; `what` names it, `step` is the step that it belongs to.
pub fn check_finite(what: &str, loss: f64, step: usize) -> Result<()> {
    if loss.is_finite() { Ok(()) } else { Err(Error::diverged(format!("{what} is {loss}"), step)) }
}

/// A model in training.
pub struct Trainer<P: Plain> {
    /// The model.
    pub model: Model<P>,
    /// Its optimizers.
    pub optimizers: Optimizers<P>,
    /// The averages of its weights.
    pub averages: Averages<P>,
    /// Whether steps quantise the linear weights that the source system quantises late in training.
    pub quantised: bool,
    /// Tokens of one sequence.
    pub seq_len: usize,
    /// Sequences of one forward and backward; a limit on memory, without an effect beyond the order of sums.
    pub micro_sequences: usize,
}

impl<P: Plain> Trainer<P> {
    /// The recipe's training of a model, from its present weights.
    pub fn new(model: Model<P>, recipe: &Recipe, micro_sequences: usize) -> Self {
        Self {
            optimizers: Optimizers::new(recipe, &model),
            averages: Averages::new(recipe, &model, Rounding::of(recipe).storage),
            quantised: false,
            model,
            seq_len: recipe.train_seq_len,
            micro_sequences,
        }
    }

    /// Optimizers and averages as at the start, for the weights as they are.
    pub fn start_anew(&mut self, recipe: &Recipe) {
        self.optimizers = Optimizers::new(recipe, &self.model);
        self.averages = Averages::new(recipe, &self.model, Rounding::of(recipe).storage);
    }

    /// Whether the model now computes with quantised weights.
    pub fn is_quantised(&self) -> bool {
        self.model.is_late_quantised()
    }

    /// Makes the model compute with quantised weights, or with full ones.
    pub fn set_quantised(&self, on: bool) {
        self.model.set_late_quantised(on);
    }

    /// The gradient of the mean loss over all tokens of `spans`, accumulated in the parameters, and that loss in nats.
    pub fn accumulate(&self, spans: &[Span]) -> Result<f64> {
        let tokens: usize = spans.iter().map(|(x, _)| x.len()).sum();
        // A tensor, not a scalar: Burn differentiates a division by a scalar in f32.
        let share = HostTensor::from_f64("share", &[1], &[1.0 / tokens as f64]);
        let dtype = accumulate_type(self.model.compute_type());
        let share: Tensor<P, 1> = params::from_host(&share, self.model.device(), dtype);
        let mut sum: Option<Tensor<P, 1>> = None;
        for (inputs, targets) in spans {
            let part = self.micro_sequences.max(1) * self.seq_len;
            for (inputs, targets) in inputs.chunks(part).zip(targets.chunks(part)) {
                let device = self.model.device();
                let ids = ids_tensor::<P>(inputs, self.seq_len, device);
                let targets = ids_tensor::<P>(targets, self.seq_len, device);
                let value = self.model.accumulate(ids, targets, &share);
                sum = Some(match sum {
                    Some(sum) => sum + value,
                    None => value,
                });
            }
        }
        match sum {
            Some(sum) => Ok(params::to_host("loss", &[1], sum)?.to_f64()[0]),
            None => Ok(f64::NAN),
        }
    }

    /// One step: the mean loss before the update, in nats. `step` (from 1) is for the message if it is not finite,
    /// in which case nothing is updated.
    pub fn step(&mut self, spans: &[Span], lr_mul: f64, muon_momentum: f64, step: usize) -> Result<f64> {
        self.set_quantised(self.quantised);
        let places = self.optimizers.reserve();
        let loss = self.accumulate(spans)?;
        check_finite("training loss", loss, step)?;
        drop(places);
        self.optimizers.step(lr_mul, muon_momentum);
        self.averages.update(step, lr_mul);
        Ok(loss)
    }
}
