//! `quant.int8`: the challenge's int8 export and its way back, on the tensors `in.*`.

use super::case::Case;
use super::compare::Tolerance;
use super::recipe::env_recipe;
use crate::error::Result;
use crate::host::HostTensor;
use crate::ops::Plain;
use crate::quant::{QuantTensor, Scheme, Stats, Storage, quantize};
use crate::recipe::CHALLENGE;
use std::collections::BTreeSet;

/// Compares codes, scales, what is kept as floats, the weights restored, and the counts and lists of the entry. All of
/// it is float32 on the host, whatever the device.
pub(super) fn int8<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&["keys", "stats"])?;
    let recipe = env_recipe(case.entry, CHALLENGE)?;
    if case.entry.top().number("tol_codes")?.is_some() {
        case.tolerate("quantized.", Tolerance::Relative(case.entry.bound("tol_codes")?));
    }
    let named: Vec<&str> = case.tensors.iter().filter_map(|(name, _)| name.strip_prefix("in.")).collect();
    let tensors = named.into_iter().map(|name| {
        let tensor = case.host(&format!("in.{name}"))?;
        Ok(HostTensor { name: name.into(), ..tensor.clone() })
    });
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let quantized = quantize(Scheme::Int8, &tensors, &recipe.int8_keep_float_fp32_name_patterns)?;
    for tensor in &quantized {
        let parts = match tensor.storage {
            Storage::Int8Row | Storage::Int8Tensor => ["quantized", "scales"].as_slice(),
            _ => &["passthrough"],
        };
        for (part, values) in parts.iter().zip(&tensor.parts) {
            case.give_host(HostTensor { name: format!("{part}.{}", tensor.name), ..values.clone() });
        }
        case.give_host(HostTensor { name: format!("back.{}", tensor.name), ..tensor.dequantize()? });
    }
    check_lists(case, &quantized)?;
    check_stats(case, &Stats::of(&quantized))
}

/// The names under each key of the challenge's dictionary.
fn check_lists<P: Plain>(case: &mut Case<'_, P>, quantized: &[QuantTensor]) -> Result<()> {
    let keys = case.entry.section("config")?.inner("keys")?;
    keys.formula("__quant_format__", "int8_clean_per_row_v1")?;
    let is_coded = |storage| matches!(storage, Storage::Int8Row | Storage::Int8Tensor);
    let lists: [(&str, &dyn Fn(Storage) -> bool); 6] = [
        ("quantized", &is_coded),
        ("scales", &is_coded),
        ("dtypes", &is_coded),
        ("qmeta", &|storage| storage == Storage::Int8Row),
        ("passthrough", &|storage| !is_coded(storage)),
        ("passthrough_orig_dtypes", &|storage| storage == Storage::F16),
    ];
    for (key, belongs) in lists {
        let Some(theirs) = keys.texts(key)? else { continue };
        let theirs: BTreeSet<&str> = theirs.into_iter().collect();
        let ours = quantized.iter().filter(|tensor| belongs(tensor.storage));
        let ours: BTreeSet<&str> = ours.map(|tensor| tensor.name.as_str()).collect();
        let differ: Vec<&str> = theirs.symmetric_difference(&ours).copied().collect();
        case.fact(
            format!("keys.{key}"),
            differ.len() as f64,
            0.0,
            Some(format!("differ: {}", differ.join(", "))),
        );
    }
    Ok(())
}

fn check_stats<P: Plain>(case: &mut Case<'_, P>, ours: &Stats) -> Result<()> {
    let stats = case.entry.section("config")?.inner("stats")?;
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
