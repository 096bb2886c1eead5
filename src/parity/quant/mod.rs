//! `quant.*` and `eval.hessians_*`: quantisers, packings and exports, on the tensors `in.*`. All but the Hessians is
//! computed on the host, in the precision that the peers have, whatever the device.

mod clip;
mod exports;
mod gptq;
mod hessians;
mod int8;
mod ternary;

pub(super) use clip::clip_search;
pub(super) use exports::{export_1607, export_1994, mixed_1382};
pub(super) use gptq::{gptq, gptq_int6};
pub(super) use hessians::hessians_1607;
pub(super) use int8::int8;
pub(super) use ternary::pack_ternary;

use super::case::Case;
use super::index::Section;
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::ops::Plain;
use crate::quant::Stats;
use std::collections::BTreeSet;

/// Every tensor `in.*`, under the rest of its name.
fn inputs<P: Plain>(case: &Case<'_, P>) -> Result<Vec<HostTensor>> {
    let named: Vec<&str> = case.tensors.iter().filter_map(|(name, _)| name.strip_prefix("in.")).collect();
    let named = named.into_iter().map(|name| {
        let tensor = case.host(&format!("in.{name}"))?;
        Ok(HostTensor { name: name.into(), ..tensor.clone() })
    });
    named.collect()
}

/// A matrix of finite floats, and its sizes, neither of them 0.
fn matrix<P: Plain>(case: &Case<'_, P>, name: &str) -> Result<(Vec<f64>, [usize; 2])> {
    let tensor = case.host(name)?;
    match *tensor.shape {
        [rows, columns] if rows > 0 && columns > 0 => Ok((finite(tensor)?, [rows, columns])),
        _ => Err(Error::input(
            format!("tensor {name} has shape {:?}", tensor.shape),
            "the file",
            "two sizes above 0",
        )),
    }
}

fn finite(tensor: &HostTensor) -> Result<Vec<f64>> {
    let values = tensor.to_f64();
    match values.iter().all(|value| value.is_finite()) {
        true => Ok(values),
        false => {
            Err(Error::input(format!("tensor {} is not finite", tensor.name), "the file", "finite numbers"))
        }
    }
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|value| *value as f32).collect()
}

/// Codes in the shape of their tensor.
fn codes(name: String, shape: &[usize], codes: &[i8]) -> HostTensor {
    let bytes = codes.iter().map(|code| code.cast_unsigned()).collect();
    HostTensor { name, shape: shape.to_vec(), dtype: HostType::I8, bytes }
}

/// Scales as float16 stores them.
fn half_scales(name: String, scales: &[f32]) -> HostTensor {
    let bytes = scales.iter().flat_map(|scale| half::f16::from_f32(*scale).to_le_bytes()).collect();
    HostTensor { name, shape: vec![scales.len()], dtype: HostType::F16, bytes }
}

/// Compares two sets of names; the row says which are in one only.
fn same_names<'n, P: Plain>(
    case: &mut Case<'_, P>,
    key: String,
    theirs: impl IntoIterator<Item = &'n str>,
    ours: impl IntoIterator<Item = &'n str>,
) {
    let theirs: BTreeSet<&str> = theirs.into_iter().collect();
    let ours: BTreeSet<&str> = ours.into_iter().collect();
    let differ: Vec<&str> = theirs.symmetric_difference(&ours).copied().collect();
    case.fact(key, differ.len() as f64, 0.0, Some(format!("differ: {}", differ.join(", "))));
}

/// Compares the counts of an exporter.
fn same_stats<P: Plain>(case: &mut Case<'_, P>, stats: Section<'_>, ours: &Stats) -> Result<()> {
    for (key, ours) in [
        ("baseline_tensor_bytes", ours.baseline_tensor_bytes),
        ("int8_payload_bytes", ours.payload_bytes),
        ("num_float_tensors", ours.num_float_tensors),
        ("num_nonfloat_tensors", ours.num_nonfloat_tensors),
        ("num_tensors", ours.num_tensors),
        ("param_count", ours.param_count),
    ] {
        let Some(theirs) = stats.count(key)? else { continue };
        let note = format!("{ours}, expected {theirs}");
        case.fact(format!("stats.{key}"), ours.abs_diff(theirs) as f64, 0.0, Some(note));
    }
    Ok(())
}
