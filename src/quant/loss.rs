//! What quantisation costs a model, tensor by tensor.

use super::exports::Hessians;
use super::gptq::output_loss;
use super::rows::hessian_of;
use super::storage::QuantTensor;
use crate::error::Result;
use crate::host::HostTensor;
use rayon::prelude::*;

/// How far one restored tensor is from the live one.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct TensorLoss {
    /// The tensor's name.
    pub name: String,
    /// How it is stored ([`super::Storage::label`]).
    pub storage: &'static str,
    /// The mean of (w - restored)^2.
    pub mean_squared: f64,
    /// The root of the sum of (w - restored)^2 over that of w^2; 0 for a tensor of zeros that is restored as zeros.
    pub relative: f64,
    /// The same for the layer's output where there is a Hessian H: the root of the sum of (w - r) H (w - r)^T over that of
    /// w H w^T.
    pub relative_output: Option<f64>,
}

/// The loss of each tensor, `stored` being made of `live` in the same order.
///
/// # Errors
/// Those of [`QuantTensor::dequantize`].
pub fn losses(live: &[HostTensor], stored: &[QuantTensor], hessians: &Hessians) -> Result<Vec<TensorLoss>> {
    live.par_iter()
        .zip(stored)
        .map(|(live, stored)| loss(live, stored, hessian_of(hessians, &live.name)))
        .collect()
}

fn loss(live: &HostTensor, stored: &QuantTensor, hessian: Option<&Vec<f64>>) -> Result<TensorLoss> {
    let weights = live.to_f32();
    let restored = stored.dequantize()?.to_f32();
    let squared: f64 =
        weights.iter().zip(&restored).map(|(w, r)| (f64::from(*w) - f64::from(*r)).powi(2)).sum();
    let energy: f64 = weights.iter().map(|w| f64::from(*w).powi(2)).sum();
    let fits = |h: &&Vec<f64>| matches!(*live.shape, [_, cols] if h.len() == cols * cols);
    let relative_output = hessian.filter(fits).map(|hessian| {
        let zeros = vec![0.0; weights.len()];
        ratio(output_loss(&weights, &restored, hessian), output_loss(&weights, &zeros, hessian))
    });
    Ok(TensorLoss {
        name: live.name.clone(),
        storage: stored.storage.label(),
        mean_squared: squared / weights.len().max(1) as f64,
        relative: ratio(squared, energy),
        relative_output,
    })
}

fn ratio(squared: f64, energy: f64) -> f64 {
    if squared > 0.0 { (squared / energy).sqrt() } else { 0.0 }
}
