//! The fused operations that models are written in.
//!
//! One file per op. Each holds a small trait with the op's forward and its explicit backward, whose default bodies
//! are the reference, composed of Burn's tensor ops. A device overrides a body with a kernel. [`Autodiff`] implements
//! each trait once: its forward calls the device's forward and records a node whose gradient is the device's
//! backward, so model code never knows on which device, or whether with gradients, it runs.
//!
//! Weights are [`Param`]s: they are no parents on the tape. A backward adds a weight's gradient into the parameter's
//! own buffer.

pub mod activation;
pub mod angle;
pub mod attention;
pub mod conv;
pub mod cross_entropy;
pub mod embedding;
pub mod hash;
pub mod linear;
pub mod matmul;
pub mod mlp;
pub mod newton_schulz;
pub mod normed_attention;
pub mod one_pole;
pub mod param;
pub mod projected_attention;
pub mod qk_norm;
pub mod reduce;
pub mod residual;
pub mod rms_norm;
pub mod rope;
pub mod scan;
pub mod selective_scan;
mod sequence;
pub mod stream;
mod tape;
pub mod update;
pub mod weight_form;
pub mod xsa;

pub use activation::ActivationOps;
pub use angle::AngleOps;
pub use attention::AttentionOps;
pub use conv::ConvOps;
pub use cross_entropy::CrossEntropyOps;
pub use embedding::EmbeddingOps;
pub use linear::LinearOps;
pub use matmul::MatmulOps;
pub use mlp::MlpOps;
pub use newton_schulz::NewtonSchulzOps;
pub use normed_attention::NormedAttentionOps;
pub use one_pole::OnePoleOps;
pub use param::{Param, ParamOps};
pub use projected_attention::ProjectedAttentionOps;
pub use qk_norm::QkNormOps;
pub use reduce::ReduceOps;
pub use residual::ResidualOps;
pub use rms_norm::RmsNormOps;
pub use rope::RopeOps;
pub use scan::ScanOps;
pub use selective_scan::SelectiveScanOps;
pub use stream::StreamOps;
pub use tape::rounded;
pub use update::UpdateOps;
pub use xsa::XsaOps;

use burn::tensor::{DType, Tensor};

/// Differentiation over any device's backend.
pub type Autodiff<B> = burn_autodiff::Autodiff<B>;

/// What every backend here is: a Burn backend that knows the plain (gradient-free) backend beneath it.
pub trait Base: burn::tensor::backend::Backend {
    /// The device's own backend: `Self`, or what [`Autodiff`] wraps. Parameters live on it.
    type Plain: Backend<Plain = Self::Plain, Device = Self::Device>;

    /// A plain tensor as a constant of this backend (not tracked).
    fn lift<const D: usize>(tensor: Tensor<Self::Plain, D>) -> Tensor<Self, D>;

    /// The plain value of a tensor of this backend (leaves the tape).
    fn lower<const D: usize>(tensor: Tensor<Self, D>) -> Tensor<Self::Plain, D>;
}

/// A backend that has every fused op.
pub trait Backend:
    Base
    + ActivationOps
    + AngleOps
    + AttentionOps
    + ConvOps
    + CrossEntropyOps
    + EmbeddingOps
    + LinearOps
    + MatmulOps
    + NewtonSchulzOps
    + MlpOps
    + NormedAttentionOps
    + OnePoleOps
    + ParamOps
    + ProjectedAttentionOps
    + ReduceOps
    + QkNormOps
    + ResidualOps
    + RmsNormOps
    + RopeOps
    + ScanOps
    + SelectiveScanOps
    + UpdateOps
    + StreamOps
    + XsaOps
{
}

impl<B> Backend for B where
    B: Base
        + ActivationOps
        + AngleOps
        + AttentionOps
        + ConvOps
        + CrossEntropyOps
        + EmbeddingOps
        + LinearOps
        + MatmulOps
        + NewtonSchulzOps
        + MlpOps
        + NormedAttentionOps
        + OnePoleOps
        + ParamOps
        + ProjectedAttentionOps
        + ReduceOps
        + QkNormOps
        + ResidualOps
        + RmsNormOps
        + RopeOps
        + ScanOps
        + SelectiveScanOps
        + UpdateOps
        + StreamOps
        + XsaOps
{
}

/// A device's own backend, without gradients.
pub trait Plain: Backend<Plain = Self> {}

impl<B: Backend<Plain = B>> Plain for B {}

/// Declares a device's backend as its own plain backend.
#[macro_export]
macro_rules! plain_backend {
    ($backend:ty) => {
        impl $crate::ops::Base for $backend {
            type Plain = Self;

            fn lift<const D: usize>(
                tensor: ::burn::tensor::Tensor<Self, D>,
            ) -> ::burn::tensor::Tensor<Self, D> {
                tensor
            }

            fn lower<const D: usize>(
                tensor: ::burn::tensor::Tensor<Self, D>,
            ) -> ::burn::tensor::Tensor<Self, D> {
                tensor
            }
        }
    };
}

impl<B: Plain> Base for Autodiff<B> {
    type Plain = B;

    fn lift<const D: usize>(tensor: Tensor<B, D>) -> Tensor<Self, D> {
        Tensor::from_inner(tensor)
    }

    fn lower<const D: usize>(tensor: Tensor<Self, D>) -> Tensor<B, D> {
        tensor.inner()
    }
}

/// The type that an op on `dtype` computes in: f64 stays f64, everything narrower computes in f32.
pub fn accumulate_type(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// `1 / x`, rounded correctly.
///
/// Not Burn's `recip`: on x86 burn-ndarray takes the processor's 12-bit estimate for it, and for which elements depends
/// on where the memory begins, so that results of equal runs differ.
pub fn reciprocal<B: burn::tensor::backend::Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    x.ones_like() / x
}

/// `|x|`.
///
/// Not Burn's `abs`: burn-ndarray's takes the elements of a tensor whose dimensions were swapped in another order than
/// its own.
pub fn magnitude<B: burn::tensor::backend::Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    x.clone().clamp_min(0.0) - x.clamp_max(0.0)
}
