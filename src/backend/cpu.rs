//! The CPU: every op is its reference, on burn-ndarray.

use crate::ops::*;

/// The CPU's backend.
pub type Cpu = burn_ndarray::NdArray<f32>;

crate::plain_backend!(Cpu);

impl ActivationOps for Cpu {}
impl AngleOps for Cpu {}
impl AttentionOps for Cpu {
    // 8 MB of f32 scores: a block stays near the caches.
    const SCORE_ELEMENTS: usize = 1 << 21;
}
impl ConvOps for Cpu {
    const CONV_ELEMENTS: usize = 1 << 21;
}
impl CrossEntropyOps for Cpu {
    const LOGIT_ELEMENTS: usize = 1 << 21;
}
impl EmbeddingOps for Cpu {
    const ONE_HOT_ELEMENTS: usize = 1 << 21;
}
impl LinearOps for Cpu {}
impl MlpOps for Cpu {}
impl MatmulOps for Cpu {}
impl NewtonSchulzOps for Cpu {}
impl NormedAttentionOps for Cpu {}
impl OnePoleOps for Cpu {
    const ONE_POLE_ELEMENTS: usize = 1 << 21;
}
impl ParamOps for Cpu {}
impl ProjectedAttentionOps for Cpu {}
impl ReduceOps for Cpu {}
impl QkNormOps for Cpu {}
impl ResidualOps for Cpu {}
impl RmsNormOps for Cpu {}
impl RopeOps for Cpu {}
impl ScanOps for Cpu {
    const SCAN_ELEMENTS: usize = 1 << 21;
}
impl SelectiveScanOps for Cpu {
    const SELECTIVE_SCAN_ELEMENTS: usize = 1 << 21;
}
impl UpdateOps for Cpu {}
impl StreamOps for Cpu {}
impl XsaOps for Cpu {}
