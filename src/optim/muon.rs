//! Muon: momentum, orthogonalised by Newton-Schulz (spec/challenge.md sections 4 and 7).

use super::{OptimizerState, round_bf16};
use crate::ops::{MatmulOps, Param, Plain, accumulate_type};
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

/// One matrix's update before it is orthogonalised: of which slot, from which row.
struct Part<P: Plain> {
    slot: usize,
    rows: usize,
    update: Tensor<P, 2>,
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
        let gradient = |slot: &Slot<P>| {
            let grad = slot.muon.param.take_grad::<2>()?;
            let grad = match &grad_scale {
                Some(scale) => grad * scale.clone().reshape([1, 1]),
                None => grad,
            };
            Some(kept(grad, slot.muon.bf16_state))
        };
        let grads: Vec<Option<Tensor<P, 2>>> = self.slots.iter().map(gradient).collect();
        let passes = self.slots.iter().map(|slot| slot.muon.lrs.len()).max().unwrap_or(0);
        for pass in 0..passes {
            self.pass(pass, &grads, lr_mul, momentum);
        }
    }

    fn pass(&mut self, pass: usize, grads: &[Option<Tensor<P, 2>>], lr_mul: f64, momentum: f64) {
        let sharded = self.config.shards > 1;
        let buffer_of = usize::from(sharded && pass > 0);
        let mut shapes: BTreeMap<[usize; 2], Vec<Part<P>>> = BTreeMap::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let (Some(grad), true) = (grads[index].clone(), pass < slot.muon.lrs.len()) else { continue };
            let buffer = match slot.momentum[buffer_of].take() {
                Some(buffer) => buffer.mul_scalar(momentum) + grad.clone(),
                None => grad.clone(),
            };
            let buffer = kept(buffer, slot.muon.bf16_state);
            let update = match self.config.nesterov {
                true => kept(grad + buffer.clone().mul_scalar(momentum), slot.muon.bf16_state),
                false => buffer.clone(),
            };
            slot.momentum[buffer_of] = Some(buffer);
            let [rows, columns] = update.dims();
            let shards = if slot.muon.whole || pass > 0 { 1 } else { self.config.shards };
            let height = rows.div_ceil(shards);
            for start in (0..rows).step_by(height) {
                let len = height.min(rows - start);
                let update = update.clone().narrow(0, start, len);
                shapes.entry([len, columns]).or_default().push(Part { slot: index, rows: start, update });
            }
        }
        let mut done: BTreeMap<usize, Vec<(usize, Tensor<P, 2>)>> = BTreeMap::new();
        for ([rows, columns], parts) in shapes {
            let (places, updates): (Vec<(usize, usize)>, Vec<Tensor<P, 2>>) =
                parts.into_iter().map(|part| ((part.slot, part.rows), part.update)).unzip();
            let master = updates[0].dtype();
            let stacked = Tensor::stack::<3>(updates, 0).cast(self.config.dtype);
            let orthogonal = self.config.newton_schulz.apply(stacked);
            for (position, (slot, start)) in places.into_iter().enumerate() {
                let part = orthogonal.clone().narrow(0, position, 1).reshape([rows, columns]).cast(master);
                done.entry(slot).or_default().push((start, part));
            }
        }
        for (index, mut parts) in done {
            parts.sort_by_key(|(start, _)| *start);
            let update = Tensor::cat(parts.into_iter().map(|(_, part)| part).collect(), 0);
            let MuonParam { param, lrs, bf16, .. } = &self.slots[index].muon;
            let lr = lrs[pass] * lr_mul;
            let [rows, columns] = update.dims();
            let ratio = (rows as f64 / columns as f64).max(1.0).sqrt();
            let update = self.config.newton_schulz.keep(update.mul_scalar(ratio));
            let mut value = param.value::<2>();
            if self.config.weight_decay != 0.0 {
                value = value.mul_scalar(1.0 - lr * self.config.weight_decay);
            }
            param.set(kept(value - update.mul_scalar(lr), *bf16));
        }
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

fn kept<P: Plain>(x: Tensor<P, 2>, bf16: bool) -> Tensor<P, 2> {
    if bf16 { round_bf16(x) } else { x }
}

/// Quintic Newton-Schulz iteration towards the nearest orthogonal matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NewtonSchulz {
    /// Iterations.
    pub steps: usize,
    /// `a`, `b` and `c` of `X = a X + (b A + c A A) X`.
    pub coefficients: [f64; 3],
    /// Added to the Frobenius norm.
    pub eps: f64,
    /// Rounds every intermediate to bf16, as the challenge's own iteration does: singular values then differ by some
    /// hundredths from those of wider types.
    pub bf16: bool,
}

impl Default for NewtonSchulz {
    fn default() -> Self {
        Self { steps: 5, coefficients: [3.4445, -4.7750, 2.0315], eps: 1e-7, bf16: false }
    }
}

impl NewtonSchulz {
    /// The iteration on each of `g[n, rows, columns]`.
    ///
    /// `X = g / (|g|_F + eps)`, wide side last, then `A = X X^T`, `X = a X + (b A + c A A) X`. Computes in `g`'s own
    /// type with products accumulated in f32 (f64 for f64); singular values land near one, not on it.
    pub fn apply<B: MatmulOps>(self, g: Tensor<B, 3>) -> Tensor<B, 3> {
        let [n, rows, columns] = g.dims();
        let dtype = g.dtype();
        let [a, b, c] = self.coefficients;
        let times = |x: Tensor<B, 3>, y: Tensor<B, 3>| self.keep(B::matmul_as(x, y, dtype));
        let tall = rows > columns;
        let x = self.keep(if tall { g.swap_dims(1, 2) } else { g });
        let wide = x.clone().cast(accumulate_type(dtype));
        let norm = (wide.clone() * wide).sum_dim(2).sum_dim(1).sqrt().reshape([n, 1, 1]).cast(dtype);
        let norm = self.keep(self.keep(norm).add_scalar(self.eps));
        let mut x = self.keep(x / norm);
        for _ in 0..self.steps {
            let gram = times(x.clone(), x.clone().swap_dims(1, 2));
            // The challenge's order: (c A) A.
            let square = times(self.keep(gram.clone().mul_scalar(c)), gram.clone());
            let poly = self.keep(self.keep(gram.mul_scalar(b)) + square);
            x = self.keep(self.keep(x.clone().mul_scalar(a)) + times(poly, x));
        }
        if tall { x.swap_dims(1, 2) } else { x }
    }

    /// The value as the iteration holds it.
    fn keep<B: MatmulOps, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        if self.bf16 { round_bf16(x) } else { x }
    }
}
