//! Newton-Schulz's quintic iteration towards the nearest orthogonal matrix (spec/challenge.md section 7), on many
//! matrices of one shape.

use super::update::round_bf16;
use super::{Autodiff, MatmulOps, Plain, accumulate_type};
use burn::tensor::Tensor;

/// The iteration's constants.
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
    /// [`NewtonSchulzOps::newton_schulz`] with these constants.
    pub fn apply<B: NewtonSchulzOps>(self, g: Tensor<B, 3>) -> Tensor<B, 3> {
        B::newton_schulz(g, self)
    }

    /// The value as the iteration holds it.
    fn keep<B: MatmulOps, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        if self.bf16 { round_bf16(x) } else { x }
    }
}

/// Newton-Schulz's iteration.
pub trait NewtonSchulzOps: MatmulOps {
    /// The iteration on each of `g[n, rows, columns]`.
    ///
    /// `X = g / (|g|_F + eps)`, wide side last, then `A = X X^T`, `X = a X + (b A + c A A) X`. Computes in `g`'s own
    /// type with products accumulated in f32 (f64 for f64); singular values land near one, not on it.
    fn newton_schulz(g: Tensor<Self, 3>, iteration: NewtonSchulz) -> Tensor<Self, 3> {
        reference(g, iteration)
    }
}

impl<B: Plain> NewtonSchulzOps for Autodiff<B> {}

/// The reference, in Burn's ops.
pub fn reference<B: MatmulOps>(g: Tensor<B, 3>, iteration: NewtonSchulz) -> Tensor<B, 3> {
    let [n, rows, columns] = g.dims();
    let dtype = g.dtype();
    let [a, b, c] = iteration.coefficients;
    let times = |x: Tensor<B, 3>, y: Tensor<B, 3>| iteration.keep(B::matmul_as(x, y, dtype));
    let tall = rows > columns;
    let x = iteration.keep(if tall { g.swap_dims(1, 2) } else { g });
    let wide = x.clone().cast(accumulate_type(dtype));
    let norm = (wide.clone() * wide).sum_dim(2).sum_dim(1).sqrt().reshape([n, 1, 1]).cast(dtype);
    let norm = iteration.keep(iteration.keep(norm).add_scalar(iteration.eps));
    let mut x = iteration.keep(x / norm);
    for _ in 0..iteration.steps {
        let gram = times(x.clone(), x.clone().swap_dims(1, 2));
        // The challenge's order: (c A) A.
        let square = times(iteration.keep(gram.clone().mul_scalar(c)), gram.clone());
        let poly = iteration.keep(iteration.keep(gram.mul_scalar(b)) + square);
        x = iteration.keep(iteration.keep(x.clone().mul_scalar(a)) + times(poly, x));
    }
    if tall { x.swap_dims(1, 2) } else { x }
}
