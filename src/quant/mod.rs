//! Quantisers: a model's tensors as the few bytes that an artifact stores, and back.
//!
//! A [`QuantTensor`] says how one tensor is stored ([`Storage`]) and holds the stored parts (codes, scales, or the
//! values themselves). [`quantize_by`] makes them by a system's [`Export`]; [`QuantTensor::dequantize`] gives the weights
//! that the reloaded model computes with, [`losses`] what that costs each tensor, and [`rows`] keeps some rows of a matrix
//! as float16.

pub mod clip;
pub mod exports;
pub mod gptq;
pub mod hessian;
pub mod loss;
pub mod prune;
pub mod quantile;
pub mod rows;
pub mod scheme;
mod stats;
pub mod storage;
pub mod ternary;

pub use exports::{Context, Export, Hessians, quantize_by};
pub use loss::{TensorLoss, losses};
pub use prune::{Candidates, Cost};
pub use rows::RowSplit;
pub use scheme::Scheme;
pub use stats::Stats;
pub use storage::{PartSpec, QuantTensor, Storage};

use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use half::f16;

/// Float tensors of at most this many elements are never quantised (the challenge's
/// `INT8_KEEP_FLOAT_MAX_NUMEL`): they are kept as float16, or as float32 if they are control tensors.
pub const KEEP_FLOAT_MAX_NUMEL: usize = 65_536;

/// The challenge's control tensors: a tensor whose name contains one of these is kept as float32 where it is small.
pub const CONTROL_PATTERNS: [&str; 9] = [
    "attn_scale",
    "attn_scales",
    "mlp_scale",
    "mlp_scales",
    "resid_mix",
    "resid_mixes",
    "q_gain",
    "skip_weight",
    "skip_weights",
];

/// Quantises a model's tensors by our own rules for a scheme (the challenge's for int8), in their order.
///
/// `control_patterns` are name fragments ([`CONTROL_PATTERNS`] in the challenge): a small tensor whose name contains
/// one stays float32. Integer tensors pass through as they are.
///
/// # Errors
/// Those of [`quantize_by`].
pub fn quantize(
    scheme: Scheme,
    tensors: &[HostTensor],
    control_patterns: &[String],
) -> Result<Vec<QuantTensor>> {
    let context = Context { controls: control_patterns.to_vec(), ..Context::default() };
    quantize_by(scheme.export(), tensors, &context)
}

/// The values in float32, refused if one is not finite: its row, or the whole model, would be lost silently.
fn finite(tensor: &HostTensor) -> Result<Vec<f32>> {
    let values = tensor.to_f32();
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(at) => Err(Error::input(
            format!("tensor {} holds {} at element {at}", tensor.name, values[at]),
            &tensor.name,
            "finite weights",
        )),
    }
}

fn to_f16(part: &str, shape: &[usize], values: &[f32], tensor: &str) -> Result<HostTensor> {
    let mut bytes = Vec::with_capacity(values.len() * 2);
    for &value in values {
        let half = f16::from_f32(value);
        if half.is_infinite() {
            return Err(Error::input(
                format!("tensor {tensor} needs {value} among its {part}"),
                tensor,
                "magnitudes below 65,520, the most that float16 holds",
            ));
        }
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    Ok(HostTensor { name: part.into(), shape: shape.to_vec(), dtype: HostType::F16, bytes })
}
