//! The CPU: every op is its reference, on burn-ndarray.

use crate::ops::*;

/// The CPU's backend.
pub type Cpu = burn_ndarray::NdArray<f32>;

crate::plain_backend!(Cpu);

impl ActivationOps for Cpu {}
impl AttentionOps for Cpu {
    // 8 MB of f32 scores: a block stays near the caches.
    const SCORE_ELEMENTS: usize = 1 << 21;
}
impl CrossEntropyOps for Cpu {
    const LOGIT_ELEMENTS: usize = 1 << 21;
}
impl EmbeddingOps for Cpu {
    const ONE_HOT_ELEMENTS: usize = 1 << 21;
}
impl LinearOps for Cpu {}
impl MatmulOps for Cpu {}
impl ResidualOps for Cpu {}
impl RmsNormOps for Cpu {}
impl RopeOps for Cpu {}
