//! Muon: momentum, orthogonalised by Newton-Schulz (spec/challenge.md sections 4 and 7).

use super::OptimizerState;
pub use crate::ops::newton_schulz::NewtonSchulz;
use crate::ops::update::{MomentumConfig, MomentumInput, OrthogonalInput};
use crate::ops::{Param, Plain};
use burn::tensor::{DType, Tensor};
use std::collections::BTreeMap;

/// Muon's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MuonConfig {
    /// The iteration that orthogonalises.
    pub newton_schulz: NewtonSchulz,
    /// Looks ahead by the updated momentum (the challenge always does); else the momentum is the update.
    pub nesterov: bool,
    /// Decoupled weight decay: `w *= 1 - lr wd` before the update; 0 for none.
    pub weight_decay: f64,
    /// The type that Newton-Schulz computes in.
    pub dtype: DType,
    /// Ranks of the source system whose row blocks of a matrix are orthogonalised one by one; 1 takes it whole.
    pub shards: usize,
}

/// A matrix and how it is updated.
pub struct MuonParam<P: Plain> {
    /// The matrix.
    pub param: Param<P>,
    /// The base learning rates of its updates, one after the other in each step from the same gradient.
    pub lrs: Vec<f64>,
    /// Keeps the matrix rounded to bf16.
    pub bf16: bool,
    /// Keeps its gradient and momentum rounded to bf16.
    pub bf16_state: bool,
    /// Whether the source system deals it to one rank as a whole, not by rows.
    pub whole: bool,
}

struct Slot<P: Plain> {
    muon: MuonParam<P>,
    /// The momentum, and that of updates after the first where those have one of their own.
    momentum: [Option<Tensor<P, 2>>; 2],
}

/// What stands before a matrix's name in the names of its momenta.
const STATE_NAMES: [&str; 2] = ["muon.momentum.", "muon.momentum2."];

/// Muon over a group of matrices.
pub struct Muon<P: Plain> {
    config: MuonConfig,
    slots: Vec<Slot<P>>,
}

impl<P: Plain> Muon<P> {
    /// Muon over `matrices`.
    pub fn new(matrices: Vec<MuonParam<P>>, config: MuonConfig) -> Self {
        let slots = matrices.into_iter().map(|muon| Slot { muon, momentum: [None, None] }).collect();
        Self { config, slots }
    }

    /// Each matrix's update from the accumulated gradients times `grad_scale`, at `lr_mul` times the base rates; takes
    /// them.
    ///
    /// `buf = mu buf + g`, `u = g + mu buf` (or `buf`), `w -= lr sqrt(max(1, rows/columns)) newton_schulz(u)`. Matrices
    /// of one shape go through the iteration together. Of several updates in a step the later ones use the same
    /// gradient and advance the momentum again; on several ranks the source system gives them whole matrices and a
    /// momentum of their own (spec/pr1382.md section 6, quirk C; there from each rank's own gradient, here from the mean).
    pub fn step(&mut self, lr_mul: f64, momentum: f64, grad_scale: Option<Tensor<P, 1>>) {
        let grads: Vec<Option<Tensor<P, 2>>> =
            self.slots.iter().map(|slot| slot.muon.param.take_grad::<2>()).collect();
        let passes = self.slots.iter().map(|slot| slot.muon.lrs.len()).max().unwrap_or(0);
        for pass in 0..passes {
            self.pass(pass, &grads, lr_mul, momentum, &grad_scale);
        }
    }

    fn pass(
        &mut self,
        pass: usize,
        grads: &[Option<Tensor<P, 2>>],
        lr_mul: f64,
        momentum: f64,
        grad_scale: &Option<Tensor<P, 1>>,
    ) {
        // Matrices of one shape whose rows are orthogonalised in the same parts.
        let mut groups: BTreeMap<([usize; 2], usize), Vec<usize>> = BTreeMap::new();
        for (index, slot) in self.slots.iter().enumerate() {
            if let (Some(grad), true) = (&grads[index], pass < slot.muon.lrs.len()) {
                let shards = if slot.muon.whole || pass > 0 { 1 } else { self.config.shards };
                groups.entry((grad.dims(), shards)).or_default().push(index);
            }
        }
        let buffer_of = usize::from(self.config.shards > 1 && pass > 0);
        let MuonConfig { newton_schulz, nesterov, weight_decay, dtype, .. } = self.config;
        for (([rows, _], shards), members) in groups {
            let input = |index: &usize| {
                let (slot, grad) = (&mut self.slots[*index], grads[*index].clone()?);
                let (buffer, bf16) = (slot.momentum[buffer_of].take(), slot.muon.bf16_state);
                Some(MomentumInput { grad, buffer, bf16 })
            };
            let inputs = members.iter().filter_map(input).collect();
            let config = MomentumConfig { momentum, nesterov, dtype };
            let (buffers, updates) = P::momentum_step(inputs, config, grad_scale.clone());
            for (index, buffer) in members.iter().zip(buffers) {
                self.slots[*index].momentum[buffer_of] = Some(buffer);
            }
            let orthogonal = if shards > 1 {
                let height = rows.div_ceil(shards);
                let part = |start: usize| {
                    let part = updates.clone().narrow(1, start, height.min(rows - start));
                    newton_schulz.apply(part)
                };
                Tensor::cat((0..rows).step_by(height).map(part).collect(), 1)
            } else {
                newton_schulz.apply(updates)
            };
            let input = |index: &usize| {
                let MuonParam { param, lrs, bf16, .. } = &self.slots[*index].muon;
                let lr = lrs[pass] * lr_mul;
                OrthogonalInput {
                    value: param.value(),
                    lr,
                    weight_decay,
                    bf16: *bf16,
                    copy: param.copy_type(),
                }
            };
            let inputs = members.iter().map(input).collect();
            let updated = P::orthogonal_step(inputs, orthogonal, newton_schulz.bf16);
            for (index, updated) in members.into_iter().zip(updated) {
                self.slots[index].muon.param.set_updated(updated);
            }
        }
    }

    /// Memory of the size of each momentum that does not exist yet.
    pub(super) fn reserve(&self, out: &mut Vec<Tensor<P, 1>>) {
        let missing = self.slots.iter().filter(|slot| slot.momentum[0].is_none());
        out.extend(missing.map(|slot| slot.muon.param.reserve()));
    }

    /// The momentum of each matrix that has one.
    pub(super) fn state(&self, out: &mut OptimizerState<P>) {
        for slot in &self.slots {
            for (name, buffer) in STATE_NAMES.iter().zip(&slot.momentum) {
                if let Some(buffer) = buffer {
                    let flat = buffer.clone().reshape([slot.muon.param.numel()]);
                    out.push(format!("{name}{}", slot.muon.param.name()), flat, 0);
                }
            }
        }
    }

    /// Sets the momentum from what [`Self::state`] gave; a matrix without one starts anew.
    pub(super) fn restore(&mut self, from: &mut OptimizerState<P>) {
        for slot in &mut self.slots {
            let param = &slot.muon.param;
            let [rows, columns] = [param.shape()[0], param.shape()[1]];
            slot.momentum = STATE_NAMES.map(|name| {
                let flat = from.take(&format!("{name}{}", param.name()));
                flat.map(|(flat, _)| flat.reshape([rows, columns]))
            });
        }
    }
}
