//! `quant.export_1994`, `quant.export_1607` and `quant.mixed_int6_1382`: the PRs' exports of a state dict.

use super::super::case::Case;
use super::super::index::Section;
use super::super::recipe::env_recipe;
use super::{inputs, same_names, same_stats};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::ops::Plain;
use crate::quant::{CONTROL_PATTERNS, Context, Export, QuantTensor, Stats, Storage, quantize_by};
use crate::recipe::{BuiltIn, PR1382, PR1607, PR1994};

/// How far gamma, a mean in another order than the peer's, may be off.
const GAMMA_TOLERANCE: f64 = 1e-6;

/// PR #1994's: codes, scales, packed bytes, what is kept, the weights restored, counts and lists.
pub(in crate::parity) fn export_1994<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let packed = case.entry.section("packed_ternary_meta")?;
    let context = Context {
        controls: controls(case, PR1994, CONTROL_PATTERNS.map(String::from).to_vec())?,
        bit_linear: packed.iter().map(|(name, _)| name.to_string()).collect(),
        ..Context::default()
    };
    let quantized = quantize_by(Export::Pr1994, &inputs(case)?, &context)?;
    give_parts(case, &quantized);
    for tensor in &quantized {
        case.give_host(HostTensor { name: format!("back.{}", tensor.name), ..tensor.dequantize()? });
    }
    let is_ternary = |tensor: &&QuantTensor| matches!(tensor.storage, Storage::Ternary(_));
    let ours = quantized.iter().filter(is_ternary).map(|tensor| tensor.name.as_str());
    same_names(case, "packed_ternary_meta".into(), packed.iter().map(|(name, _)| name), ours);
    for tensor in quantized.iter().filter(is_ternary) {
        let meta = packed.get(&tensor.name).and_then(|meta| meta.get("gamma")?.as_f64());
        let (Some(theirs), Some(ours)) = (meta, tensor.parts.get(1)) else { continue };
        let ours = ours.to_f64()[0];
        let error = (ours - theirs).abs() / theirs.abs().max(f64::MIN_POSITIVE);
        let note = format!("{ours:e}, expected {theirs:e}");
        case.fact(format!("packed_ternary_meta.{}.gamma", tensor.name), error, GAMMA_TOLERANCE, Some(note));
    }
    check_lists(case, &quantized)
}

/// PR #1607's second round, with its own flags unless the config has others.
pub(in crate::parity) fn export_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["bits", "mlp_bits", "search_clip", "fp16_embed"])?;
    let bits = |key, usual: usize| -> Result<u32> {
        let bits = config.count(key)?.unwrap_or(usual);
        u32::try_from(bits).map_err(|_| Error::input(format!("{key} = {bits}"), "config", "2 to 8"))
    };
    let recipe = env_recipe(case.entry, PR1607)?;
    if recipe.fp16_inproj_rows {
        // The names that the peer gives the parts of a matrix are not among what is known of it.
        return Err(Error::input("FP16_INPROJ_ROWS = 1", "env", "0: matrices in one part"));
    }
    let usual = recipe.quant_bits;
    let export = Export::Pr1607 {
        bits: bits("bits", usual)?,
        mlp_bits: bits("mlp_bits", 0)?,
        search_clip: config.flag("search_clip", true)?,
        fp16_embed: config.flag("fp16_embed", true)?,
    };
    let own = match BuiltIn::find(PR1607) {
        Some(recipe) => recipe.recipe()?.control_tensor_name_patterns,
        None => CONTROL_PATTERNS.map(String::from).to_vec(),
    };
    let context = Context { controls: controls(case, PR1607, own)?, ..Context::default() };
    let quantized = quantize_by(export, &inputs(case)?, &context)?;
    give_parts(case, &quantized);
    for tensor in &quantized {
        case.give_host(HostTensor { name: format!("back.{}", tensor.name), ..tensor.dequantize()? });
    }
    check_lists(case, &quantized)
}

/// PR #1382's without Hessians.
pub(in crate::parity) fn mixed_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let controls = controls(case, PR1382, CONTROL_PATTERNS.map(String::from).to_vec())?;
    let context = Context { controls, ..Context::default() };
    let quantized = quantize_by(Export::Pr1382, &inputs(case)?, &context)?;
    let kinds = case.entry.section("kinds")?;
    for tensor in &quantized {
        let name = &tensor.name;
        let parts = match tensor.storage.is_coded() {
            true => vec![format!("out.{name}.q"), format!("out.{name}.scale")],
            false => vec![format!("out.{name}")],
        };
        for (part, values) in parts.into_iter().zip(&tensor.parts) {
            case.give_host(HostTensor { name: part, ..values.clone() });
        }
        case.give_host(HostTensor { name: format!("back.{name}"), ..tensor.dequantize()? });
        let Some(theirs) = kinds.get(name) else { continue };
        let theirs = theirs.get("type").unwrap_or(theirs).as_str().unwrap_or_default();
        let ours = match tensor.storage {
            Storage::Int8Row | Storage::Int8Tensor => "int8",
            storage if storage.is_coded() => "int6",
            Storage::F32 => "passthrough_ctrl",
            _ => "passthrough",
        };
        let note = format!("{ours}, expected {theirs}");
        case.fact(format!("kinds.{name}"), f64::from(u8::from(ours != theirs)), 0.0, Some(note));
    }
    if kinds.iter().next().is_some() {
        let ours = quantized.iter().map(|tensor| tensor.name.as_str());
        same_names(case, "kinds".into(), kinds.iter().map(|(name, _)| name), ours);
    }
    Ok(())
}

/// The patterns of control tensors: the entry's own under `env`, else those that the system was run with.
fn controls<P: Plain>(case: &Case<'_, P>, system: &str, usual: Vec<String>) -> Result<Vec<String>> {
    let recipe = env_recipe(case.entry, system)?;
    let names = ["CONTROL_TENSOR_NAME_PATTERNS", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"];
    let env = case.entry.section("env")?;
    let is_set = names.iter().any(|name| env.get(name).is_some());
    Ok(if is_set { recipe.int8_keep_float_fp32_name_patterns } else { usual })
}

/// Every stored part under the names of the challenge's dictionary.
fn give_parts<P: Plain>(case: &mut Case<'_, P>, quantized: &[QuantTensor]) {
    for tensor in quantized {
        let parts = match tensor.storage {
            Storage::Ternary(_) => ["packed_ternary"].as_slice(),
            storage if storage.is_coded() => &["quantized", "scales"],
            _ => &["passthrough"],
        };
        for (part, values) in parts.iter().zip(&tensor.parts) {
            case.give_host(HostTensor { name: format!("{part}.{}", tensor.name), ..values.clone() });
        }
    }
}

/// The counts, and the names and element types under the keys that the entry has.
fn check_lists<P: Plain>(case: &mut Case<'_, P>, quantized: &[QuantTensor]) -> Result<()> {
    let is_integer = |storage: Storage| storage.is_coded() && !matches!(storage, Storage::Ternary(_));
    let lists: [(&'static str, &dyn Fn(Storage) -> bool); 3] = [
        ("dtypes", &is_integer),
        ("qmeta", &|storage| matches!(storage, Storage::Int8Row | Storage::IntRow(_))),
        ("passthrough_orig_dtypes", &|storage| storage == Storage::F16),
    ];
    for (key, belongs) in lists {
        let theirs: Section<'_> = case.entry.section(key)?;
        if theirs.iter().next().is_none() {
            continue;
        }
        let ours: Vec<&QuantTensor> = quantized.iter().filter(|tensor| belongs(tensor.storage)).collect();
        let names = ours.iter().map(|tensor| tensor.name.as_str());
        same_names(case, key.into(), theirs.iter().map(|(name, _)| name), names);
        for tensor in ours {
            let Some(theirs) = theirs.get(&tensor.name).and_then(|dtype| dtype.as_str()) else { continue };
            let ours = torch_name(tensor.original);
            let note = format!("{ours}, expected {theirs}");
            case.fact(format!("{key}.{}", tensor.name), f64::from(u8::from(ours != theirs)), 0.0, Some(note));
        }
    }
    let stats = case.entry.section("stats")?;
    same_stats(case, stats, &Stats::of(quantized))
}

/// PyTorch's name of a float type.
fn torch_name(dtype: HostType) -> &'static str {
    match dtype {
        HostType::F64 => "float64",
        HostType::F32 => "float32",
        HostType::F16 => "float16",
        HostType::BF16 => "bfloat16",
        _ => "an integer",
    }
}
