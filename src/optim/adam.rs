//! Adam with torch's semantics (spec/challenge.md section 7), one instance per group of parameters.

use super::{OptimizerState, round_bf16};
use crate::ops::{Param, Plain};
use burn::tensor::Tensor;

/// Adam's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay (AdamW); 0 for plain Adam.
    pub weight_decay: f64,
}

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

    /// One update from the accumulated gradients times `grad_scale`, at `lr_mul` times the base rate; takes them.
    ///
    /// `m = b1 m + (1-b1) g`, `v = b2 v + (1-b2) g^2`, `p -= lr (m/(1-b1^t)) / (sqrt(v/(1-b2^t)) + eps)`. A parameter
    /// that no gradient has reached stays.
    pub fn step(&mut self, lr_mul: f64, grad_scale: Option<Tensor<P, 1>>) {
        let AdamConfig { beta1, beta2, eps, weight_decay } = self.config;
        let lr = self.lr * lr_mul;
        for slot in &mut self.slots {
            let bf16 = slot.bf16;
            let keep = |x: Tensor<P, 1>| if bf16 { round_bf16(x) } else { x };
            let Some(grad) = slot.param.take_flat_grad() else { continue };
            let grad = match &grad_scale {
                Some(scale) => grad * scale.clone(),
                None => grad,
            };
            slot.steps += 1;
            let square = grad.clone() * grad.clone();
            let [m, v] = match slot.moments.take() {
                Some([m, v]) => [
                    m.mul_scalar(beta1) + grad.mul_scalar(1.0 - beta1),
                    v.mul_scalar(beta2) + square.mul_scalar(1.0 - beta2),
                ],
                None => [grad.mul_scalar(1.0 - beta1), square.mul_scalar(1.0 - beta2)],
            };
            let [m, v] = [keep(m), keep(v)];
            let steps = slot.steps as i32;
            let size = lr / (1.0 - beta1.powi(steps));
            let root = v.clone().div_scalar(1.0 - beta2.powi(steps)).sqrt().add_scalar(eps);
            let mut value = slot.param.flat();
            if weight_decay != 0.0 {
                value = value.mul_scalar(1.0 - lr * weight_decay);
            }
            slot.param.set_flat(keep(value - m.clone().mul_scalar(size) / root));
            slot.moments = Some([m, v]);
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
