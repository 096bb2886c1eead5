//! One optimizer step: gradients accumulated over the spans of the stream, then one update.

use super::guards::check_finite;
use crate::error::Result;
use crate::eval::ids_tensor;
use crate::host::HostTensor;
use crate::model::{Model, params};
use crate::ops::{Autodiff, Plain, accumulate_type, reduce};
use crate::optim::Optimizers;
use burn::tensor::Tensor;

/// One span of the token stream: inputs and, one further, targets.
pub type Span = (Vec<u16>, Vec<u16>);

/// A model in training.
pub struct Trainer<P: Plain> {
    /// The model.
    pub model: Model<P>,
    /// Its optimizers.
    pub optimizers: Optimizers<P>,
    /// Tokens of one sequence.
    pub seq_len: usize,
    /// Sequences of one forward and backward; a limit on memory, without an effect beyond the order of sums.
    pub micro_sequences: usize,
}

impl<P: Plain> Trainer<P> {
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
                let ids = ids_tensor::<Autodiff<P>>(inputs, self.seq_len, device);
                let targets = ids_tensor::<Autodiff<P>>(targets, self.seq_len, device);
                let loss = self.model.nll::<Autodiff<P>>(ids, targets) * Tensor::from_inner(share.clone());
                let value = reduce::sum(loss.clone().inner());
                sum = Some(match sum {
                    Some(sum) => sum + value,
                    None => value,
                });
                loss.backward();
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
        let loss = self.accumulate(spans)?;
        check_finite("training loss", loss, step)?;
        self.optimizers.step(lr_mul, muon_momentum);
        Ok(loss)
    }
}
