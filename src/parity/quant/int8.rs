//! `quant.int8`: the challenge's int8 export and its way back, on the tensors `in.*`.

use super::super::case::Case;
use super::super::compare::Tolerance;
use super::super::recipe::env_recipe;
use super::{inputs, same_names, same_stats};
use crate::error::Result;
use crate::host::HostTensor;
use crate::ops::Plain;
use crate::quant::{QuantTensor, Scheme, Stats, Storage, quantize};
use crate::recipe::CHALLENGE;

/// Compares codes, scales, what is kept as floats, the weights restored, and the counts and lists of the entry. All of
/// it is float32 on the host, whatever the device.
pub(in crate::parity) fn int8<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&["keys", "stats"])?;
    let recipe = env_recipe(case.entry, CHALLENGE)?;
    if case.entry.top().number("tol_codes")?.is_some() {
        case.tolerate("quantized.", Tolerance::Relative(case.entry.bound("tol_codes")?));
    }
    let tensors = inputs(case)?;
    let quantized = quantize(Scheme::Int8, &tensors, &recipe.int8_keep_float_fp32_name_patterns)?;
    for tensor in &quantized {
        let parts = match tensor.storage {
            storage if storage.is_coded() => ["quantized", "scales"].as_slice(),
            _ => &["passthrough"],
        };
        for (part, values) in parts.iter().zip(&tensor.parts) {
            case.give_host(HostTensor { name: format!("{part}.{}", tensor.name), ..values.clone() });
        }
        case.give_host(HostTensor { name: format!("back.{}", tensor.name), ..tensor.dequantize()? });
    }
    check_lists(case, &quantized)?;
    let stats = case.entry.section("config")?.inner("stats")?;
    same_stats(case, stats, &Stats::of(&quantized))
}

/// The names under each key of the challenge's dictionary.
fn check_lists<P: Plain>(case: &mut Case<'_, P>, quantized: &[QuantTensor]) -> Result<()> {
    let keys = case.entry.section("config")?.inner("keys")?;
    keys.formula("__quant_format__", "int8_clean_per_row_v1")?;
    let lists: [(&str, &dyn Fn(Storage) -> bool); 6] = [
        ("quantized", &Storage::is_coded),
        ("scales", &Storage::is_coded),
        ("dtypes", &Storage::is_coded),
        ("qmeta", &|storage| storage == Storage::Int8Row),
        ("passthrough", &|storage| !storage.is_coded()),
        ("passthrough_orig_dtypes", &|storage| storage == Storage::F16),
    ];
    for (key, belongs) in lists {
        let Some(theirs) = keys.texts(key)? else { continue };
        let ours = quantized.iter().filter(|tensor| belongs(tensor.storage));
        same_names(case, format!("keys.{key}"), theirs, ours.map(|tensor| tensor.name.as_str()));
    }
    Ok(())
}
