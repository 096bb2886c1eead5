//! Gradient descent with momentum, as torch has it: `b = mu b + g`, `w -= lr b`, the first `b` being the first `g`.

use super::round_bf16;
use crate::ops::{Param, Plain};
use burn::tensor::Tensor;

struct Slot<P: Plain> {
    param: Param<P>,
    /// Keeps the parameter and its momentum rounded to bf16 after each update, as a source system that stores them so.
    bf16: bool,
    momentum: Option<Tensor<P, 1>>,
}

/// SGD over a group of parameters with one learning rate.
pub struct Sgd<P: Plain> {
    lr: f64,
    momentum: f64,
    slots: Vec<Slot<P>>,
}

impl<P: Plain> Sgd<P> {
    /// SGD over `params` (kept in bf16, or not) at the base learning rate `lr`.
    pub fn new(params: Vec<(Param<P>, bool)>, lr: f64, momentum: f64) -> Self {
        let slot = |(param, bf16)| Slot { param, bf16, momentum: None };
        Self { lr, momentum, slots: params.into_iter().map(slot).collect() }
    }

    /// One update from the accumulated gradients times `grad_scale`, at `lr_mul` times the base rate; takes them. A
    /// parameter that no gradient has reached stays.
    pub fn step(&mut self, lr_mul: f64, grad_scale: Option<Tensor<P, 1>>) {
        let (mut reached, mut grads) = (Vec::new(), Vec::new());
        for slot in &mut self.slots {
            let Some(grad) = slot.param.take_flat_grad() else { continue };
            grads.push(match &grad_scale {
                Some(scale) => grad * scale.clone(),
                None => grad,
            });
            reached.push(slot);
        }
        let keep = |x: Tensor<P, 1>, bf16: bool| if bf16 { round_bf16(x) } else { x };
        // Those that have a momentum already, all at once.
        let old: Vec<_> = reached.iter_mut().map(|slot| slot.momentum.take()).collect();
        let pairs = old.iter().zip(&grads).filter_map(|(old, grad)| Some([old.clone()?, grad.clone()]));
        let mut blended = blend(pairs.collect(), [self.momentum, 1.0]).into_iter();
        let momenta: Vec<Tensor<P, 1>> = old
            .iter()
            .zip(grads)
            .zip(&reached)
            .map(|((old, grad), slot)| {
                let new = if old.is_some() { blended.next().unwrap_or(grad) } else { grad };
                keep(new, slot.bf16)
            })
            .collect();
        let steps = reached.iter().zip(&momenta).map(|(slot, step)| [slot.param.flat(), step.clone()]);
        let values = blend::<P>(steps.collect(), [1.0, -self.lr * lr_mul]);
        for ((slot, momentum), value) in reached.into_iter().zip(momenta).zip(values) {
            slot.param.set_flat(keep(value, slot.bf16));
            slot.momentum = Some(momentum);
        }
    }
}

fn blend<P: Plain>(pairs: Vec<[Tensor<P, 1>; 2]>, weights: [f64; 2]) -> Vec<Tensor<P, 1>> {
    if pairs.is_empty() { Vec::new() } else { P::blend(pairs, weights) }
}
