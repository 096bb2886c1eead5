//! What the challenge's exporter counts.

use super::storage::{QuantTensor, Storage};
use crate::host::HostType;

/// What the challenge's exporter counts over a state dict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Elements of all tensors.
    pub param_count: usize,
    /// Tensors.
    pub num_tensors: usize,
    /// Tensors that became integer codes (the challenge's `num_float_tensors`; PR #1994 does not count ternary ones).
    pub num_float_tensors: usize,
    /// Tensors that are not floats.
    pub num_nonfloat_tensors: usize,
    /// Bytes of all tensors in their original element types.
    pub baseline_tensor_bytes: usize,
    /// Bytes of all stored parts that count ([`Storage::payload_bytes`]; the challenge's `int8_payload_bytes`).
    pub payload_bytes: usize,
}

impl Stats {
    /// Counts a quantised model.
    pub fn of(tensors: &[QuantTensor]) -> Self {
        let mut stats = Self { num_tensors: tensors.len(), ..Self::default() };
        for tensor in tensors {
            let numel: usize = tensor.shape.iter().product();
            stats.param_count += numel;
            stats.baseline_tensor_bytes += numel * tensor.original.size();
            stats.payload_bytes += tensor.payload_bytes();
            let is_integer = tensor.storage.is_coded() && !matches!(tensor.storage, Storage::Ternary(_));
            stats.num_float_tensors += usize::from(is_integer);
            stats.num_nonfloat_tensors += usize::from(matches!(
                tensor.original,
                HostType::I8 | HostType::I32 | HostType::I64 | HostType::U8
            ));
        }
        stats
    }
}
