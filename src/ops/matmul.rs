//! Matrix product with a chosen output type.
//!
//! `C[.., m, n] = A[.., m, k] B[.., k, n]`, accumulated in f32 (f64 for f64 inputs); no reduced-precision product
//! for f32 inputs (no TF32) on any device.

use super::Autodiff;
use super::Plain;
use burn::tensor::{DType, Tensor};

/// Matrix product.
pub trait MatmulOps: burn::tensor::backend::Backend {
    /// `a @ b` over the last two dimensions, as `out`.
    fn matmul_as<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>, out: DType) -> Tensor<Self, D> {
        a.matmul(b).cast(out)
    }
}

impl<B: Plain> MatmulOps for Autodiff<B> {}
