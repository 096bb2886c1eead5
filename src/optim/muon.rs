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
}

struct Slot<P: Plain> {
    param: Param<P>,
    momentum: Option<Tensor<P, 2>>,
}

/// Muon over a group of matrices with one learning rate.
pub struct Muon<P: Plain> {
    config: MuonConfig,
    lr: f64,
    slots: Vec<Slot<P>>,
}

impl<P: Plain> Muon<P> {
    /// Muon over the matrices `params` at the base learning rate `lr`.
    pub fn new(params: Vec<Param<P>>, lr: f64, config: MuonConfig) -> Self {
        let slots = params.into_iter().map(|param| Slot { param, momentum: None }).collect();
        Self { config, lr, slots }
    }

    /// One update from the accumulated gradients times `grad_scale`, at `lr_mul` times the base rate; takes them.
    ///
    /// `buf = mu buf + g`, `u = g + mu buf` (or `buf`), `w -= lr sqrt(max(1, rows/columns)) newton_schulz(u)`. Matrices
    /// of one shape go through the iteration together.
    pub fn step(&mut self, lr_mul: f64, momentum: f64, grad_scale: Option<Tensor<P, 1>>) {
        let lr = self.lr * lr_mul;
        let mut shapes: BTreeMap<[usize; 2], Vec<(usize, Tensor<P, 2>)>> = BTreeMap::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let Some(grad) = slot.param.take_grad::<2>() else { continue };
            let grad = match &grad_scale {
                Some(scale) => grad * scale.clone().reshape([1, 1]),
                None => grad,
            };
            let buffer = match slot.momentum.take() {
                Some(buffer) => buffer.mul_scalar(momentum) + grad.clone(),
                None => grad.clone(),
            };
            let update = match self.config.nesterov {
                true => grad + buffer.clone().mul_scalar(momentum),
                false => buffer.clone(),
            };
            slot.momentum = Some(buffer);
            shapes.entry(update.dims()).or_default().push((index, update));
        }
        for ([rows, columns], updates) in shapes {
            let (indices, updates): (Vec<usize>, Vec<Tensor<P, 2>>) = updates.into_iter().unzip();
            let master = updates[0].dtype();
            let stacked = Tensor::stack::<3>(updates, 0).cast(self.config.dtype);
            let iteration = self.config.newton_schulz;
            let ratio = (rows as f64 / columns as f64).max(1.0).sqrt();
            let orthogonal = iteration.keep(iteration.apply(stacked).mul_scalar(ratio)).cast(master);
            for (position, index) in indices.into_iter().enumerate() {
                let param = &self.slots[index].param;
                let update = orthogonal.clone().narrow(0, position, 1).reshape([rows, columns]);
                let mut value = param.value::<2>();
                if self.config.weight_decay != 0.0 {
                    value = value.mul_scalar(1.0 - lr * self.config.weight_decay);
                }
                param.set(value - update.mul_scalar(lr));
            }
        }
    }

    /// The momentum of each matrix that has one.
    pub(super) fn state(&self, out: &mut OptimizerState<P>) {
        for slot in &self.slots {
            if let Some(buffer) = &slot.momentum {
                let flat = buffer.clone().reshape([slot.param.numel()]);
                out.push(format!("muon.momentum.{}", slot.param.name()), flat, 0);
            }
        }
    }

    /// Sets the momentum from what [`Self::state`] gave; a matrix without one starts anew.
    pub(super) fn restore(&mut self, from: &mut OptimizerState<P>) {
        for slot in &mut self.slots {
            let flat = from.take(&format!("muon.momentum.{}", slot.param.name()));
            let [rows, columns] = [slot.param.shape()[0], slot.param.shape()[1]];
            slot.momentum = flat.map(|(flat, _)| flat.reshape([rows, columns]));
        }
    }
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
