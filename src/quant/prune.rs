//! Pruning: integer codes of +-1 become 0, those that cost the least first, so that what is left compresses better.
//!
//! What a code costs is the change of its layer's squared error. With E = w - r, r the restored weights, and H the layer's Hessian
//! (`hessian`), the error is the sum of e H e^T over the rows e of E. A code q in column j of a row of step s adds d = q s to one
//! entry of e when it becomes 0, which changes the error by 2 d (E H)_j + d^2 H_jj. Without a Hessian H is the identity, times
//! the mean diagonal of the Hessians that other tensors have, so that both can be compared. Costs can be negative: what
//! GPTQ adds to a column to make up for others need not be what is best for the whole row. That several codes of a row are
//! pruned is not taken into account.
//!
//! PR #1382 prunes only its codes of 6 bits, by s^2, ties in the order of the state dict (`spec/pr1382.md` section 7).

use super::exports::Hessians;
use super::hessian::{mean_diagonal, times};
use super::rows::hessian_of;
use super::storage::{QuantTensor, Storage};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use rayon::prelude::*;
use std::collections::HashMap;

/// By what codes are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// The change of the layer's squared error.
    Error,
    /// The square of the step, of codes of 6 bits (PR #1382).
    Step,
}

/// A code of +-1.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    cost: f64,
    tensor: u32,
    element: u32,
}

/// All codes of a model that can be pruned, the cheapest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidates(Vec<Candidate>);

impl Candidates {
    /// The codes of +-1 of `stored`, which was made of `live` (looked up by name).
    ///
    /// # Errors
    /// A tensor without its live weights, or with other sizes; those of [`QuantTensor::dequantize`].
    pub fn of(live: &[HostTensor], stored: &[QuantTensor], hessians: &Hessians, cost: Cost) -> Result<Self> {
        let live: HashMap<&str, &HostTensor> = live.iter().map(|t| (t.name.as_str(), t)).collect();
        let mut diagonals: Vec<(&String, f64)> = hessians
            .iter()
            .map(|(name, h)| (name, mean_diagonal(h, h.len().isqrt())))
            .filter(|(_, mean)| mean.is_finite())
            .collect();
        // In the order of their names: a map has none of its own.
        diagonals.sort_by_key(|(name, _)| *name);
        let count = diagonals.len();
        let usual =
            if count == 0 { 1.0 } else { diagonals.iter().map(|(_, mean)| mean).sum::<f64>() / count as f64 };
        let tensors: Result<Vec<Vec<Candidate>>> = stored
            .par_iter()
            .enumerate()
            .map(|(number, tensor)| {
                if !is_prunable(tensor.storage, cost) {
                    return Ok(Vec::new());
                }
                let weights = live.get(tensor.name.as_str()).filter(|live| live.shape == tensor.shape);
                let weights = weights.ok_or_else(|| {
                    Error::input("no live weights", &tensor.name, "those that its codes were made of")
                })?;
                let hessian = hessian_of(hessians, &tensor.name);
                of_tensor(number as u32, tensor, weights, hessian, usual, cost)
            })
            .collect();
        let mut candidates = tensors?.concat();
        // The order of the tensors and their elements decides between equals.
        candidates.par_sort_by(|a, b| a.cost.total_cmp(&b.cost));
        Ok(Self(candidates))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The sum of the costs of the first `count`.
    pub fn cost(&self, count: usize) -> f64 {
        self.0.iter().take(count).map(|candidate| candidate.cost).sum()
    }

    /// The bytes by which the entropy of the codes, of each tensor by itself, falls when the first 0, `step`, 2 `step`, ...
    /// candidates are pruned, and at last all: about what a codec saves.
    pub fn savings(&self, stored: &[QuantTensor], step: usize) -> Vec<f64> {
        // Codes of -1, 0 and 1. Where n_k codes of n are k, the entropy is n log n less the sum of all n_k log n_k.
        let count = |tensor: &QuantTensor| {
            let codes = tensor.parts.first().map_or(&[][..], |codes| &codes.bytes);
            [-1i8, 0, 1].map(|code| codes.iter().filter(|byte| byte.cast_signed() == code).count())
        };
        let mut counts: Vec<[usize; 3]> = stored.par_iter().map(count).collect();
        let bits = |counts: &[[usize; 3]]| -> f64 {
            counts.iter().flatten().map(|&n| n as f64 * (n.max(1) as f64).log2()).sum()
        };
        let before = bits(&counts);
        let mut savings = vec![0.0];
        for pruned in self.0.chunks(step.max(1)) {
            for &Candidate { tensor, element, .. } in pruned {
                let code = stored[tensor as usize].parts[0].bytes[element as usize].cast_signed();
                let [minus, zero, plus] = &mut counts[tensor as usize];
                *(if code < 0 { minus } else { plus }) -= 1;
                *zero += 1;
            }
            savings.push((bits(&counts) - before) / 8.0);
        }
        savings
    }

    /// The same tensors with the first `count` candidates pruned.
    pub fn prune(&self, stored: &[QuantTensor], count: usize) -> Vec<QuantTensor> {
        let mut pruned = stored.to_vec();
        for candidate in self.0.iter().take(count) {
            pruned[candidate.tensor as usize].parts[0].bytes[candidate.element as usize] = 0;
        }
        pruned
    }
}

fn is_prunable(storage: Storage, cost: Cost) -> bool {
    match storage {
        Storage::IntRow(6) | Storage::IntTensor(6) => true,
        Storage::IntRow(_) | Storage::IntTensor(_) | Storage::Int8Row | Storage::Int8Tensor => {
            cost == Cost::Error
        }
        // A ternary matrix's step follows from how many of its codes are 0.
        Storage::Raw | Storage::F32 | Storage::F16 | Storage::Ternary(_) => false,
    }
}

fn of_tensor(
    number: u32,
    tensor: &QuantTensor,
    live: &HostTensor,
    hessian: Option<&Vec<f64>>,
    usual: f64,
    cost: Cost,
) -> Result<Vec<Candidate>> {
    let restored = tensor.dequantize()?.to_f32();
    let [codes, scales] = tensor.parts.as_slice() else { return Ok(Vec::new()) };
    let scales = scales.to_f32();
    let cols = codes.bytes.len().div_ceil(scales.len().max(1)).max(1);
    let weights = live.to_f32();
    let error: Vec<f64> = weights.iter().zip(&restored).map(|(w, r)| f64::from(*w) - f64::from(*r)).collect();
    let hessian = hessian.filter(|h| h.len() == cols * cols && matches!(*tensor.shape, [_, n] if n == cols));
    let product = hessian.filter(|_| cost == Cost::Error).map(|hessian| times(&error, hessian, cols));
    let candidate = |(element, code): (usize, &u8)| {
        let code = code.cast_signed();
        if code.unsigned_abs() != 1 {
            return None;
        }
        let (row, column) = (element / cols, element % cols);
        let change = f64::from(code) * f64::from(scales[row]);
        let cost = match (&product, hessian, cost) {
            (_, _, Cost::Step) => change * change,
            (Some(product), Some(hessian), _) => {
                2.0 * change * product[(row, column)] + change * change * hessian[column * cols + column]
            }
            _ => usual * (2.0 * change * error[element] + change * change),
        };
        Some(Candidate { cost, tensor: number, element: element as u32 })
    };
    Ok(codes.bytes.iter().enumerate().filter_map(candidate).collect())
}
