//! Adam with torch's semantics (spec/challenge.md section 7), one instance per group of parameters.

use super::OptimizerState;
pub use crate::ops::update::AdamConfig;
use crate::ops::update::AdamInput;
use crate::ops::{Param, Plain};
use burn::tensor::Tensor;

struct Slot<P: Plain> {
    param: Param<P>,
    /// Keeps the parameter and its moments rounded to bf16 after each update, as a source system that stores them so.
    bf16: bool,
    moments: Option<[Tensor<P, 1>; 2]>,
    steps: u64,
}

/// Adam over a group of parameters with one learning rate.
pub struct Adam<P: Plain> {
    config: AdamConfig,
    lr: f64,
    slots: Vec<Slot<P>>,
}

impl<P: Plain> Adam<P> {
    /// Adam over `params` (kept in bf16, or not) at the base learning rate `lr`.
    pub fn new(params: Vec<(Param<P>, bool)>, lr: f64, config: AdamConfig) -> Self {
        let slot = |(param, bf16)| Slot { param, bf16, moments: None, steps: 0 };
        Self { config, lr, slots: params.into_iter().map(slot).collect() }
    }

    /// One update from the accumulated gradients times `grad_scale`, at `lr_mul` times the base rate; takes them. A
    /// parameter that no gradient has reached stays.
    pub fn step(&mut self, lr_mul: f64, grad_scale: Option<Tensor<P, 1>>) {
        Self::step_all(std::slice::from_mut(self), lr_mul, grad_scale);
    }

    /// [`Self::step`] of several groups at once.
    pub fn step_all(groups: &mut [Self], lr_mul: f64, grad_scale: Option<Tensor<P, 1>>) {
        let mut reached = Vec::new();
        let mut inputs = Vec::new();
        for Self { config, lr, slots } in groups {
            for slot in slots {
                let Some(grad) = slot.param.take_flat_grad() else { continue };
                slot.steps += 1;
                inputs.push(AdamInput {
                    value: slot.param.flat(),
                    grad,
                    moments: slot.moments.take(),
                    config: *config,
                    lr: *lr * lr_mul,
                    steps: slot.steps,
                    bf16: slot.bf16,
                    copy: slot.param.copy_type(),
                });
                reached.push(slot);
            }
        }
        for (slot, output) in reached.into_iter().zip(P::adam_step(inputs, grad_scale)) {
            slot.param.set_updated(output.updated);
            slot.moments = Some(output.moments);
        }
    }

    /// The state of each parameter that has one.
    pub(super) fn state(&self, out: &mut OptimizerState<P>) {
        for slot in &self.slots {
            if let Some([m, v]) = &slot.moments {
                out.push(format!("adam.m.{}", slot.param.name()), m.clone(), slot.steps);
                out.push(format!("adam.v.{}", slot.param.name()), v.clone(), slot.steps);
            }
        }
    }

    /// Memory of the size of each moment that does not exist yet.
    pub(super) fn reserve(&self, out: &mut Vec<Tensor<P, 1>>) {
        let missing = self.slots.iter().filter(|slot| slot.moments.is_none());
        out.extend(missing.flat_map(|slot| [slot.param.reserve(), slot.param.reserve()]));
    }

    /// Sets the state from what [`Self::state`] gave; a parameter without one starts anew.
    pub(super) fn restore(&mut self, from: &mut OptimizerState<P>) {
        for slot in &mut self.slots {
            let name = slot.param.name();
            let (m, v) = (from.take(&format!("adam.m.{name}")), from.take(&format!("adam.v.{name}")));
            (slot.moments, slot.steps) = match (m, v) {
                (Some((m, steps)), Some((v, _))) => (Some([m, v]), steps),
                _ => (None, 0),
            };
        }
    }
}
