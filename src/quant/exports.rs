//! Which tensor is stored in which form: the exports of the challenge and of the three PRs, and our own.
//!
//! | export | small (at most 65,536 elements) | large |
//! |---|---|---|
//! | challenge | float32 if a control tensor, else float16 | int8, a scale a row |
//! | fp16 | the same, at any size | the same |
//! | PR #1994 | the same; the BitLinear matrices of any size 2-bit ternary | int8 |
//! | PR #1607 | the same; the embedding float16 at any size | int6 by clip search; after GPTQ, its restored weights again |
//! | PR #1382 | float16, all of them | attention, MLP and Mamba int6 by GPTQ or clip search, the rest int8 |
//! | ours | float32 if a control tensor, else float16 | matrices by GPTQ or clip search without floors, tables int8 without floors |

use super::clip::{self, Coded, Rule};
use super::gptq;
use super::storage::{QuantTensor, Storage};
use super::ternary::{Packing, Ternary};
use super::{KEEP_FLOAT_MAX_NUMEL, finite, to_f16};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};

/// Hessians ([`super::hessian`]) by the name of the weight, each [columns, columns].
pub type Hessians = HashMap<String, Vec<f64>>;

/// A system's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Export {
    /// The challenge's `int8_clean_per_row_v1`.
    Challenge,
    /// Every float tensor as float16, control tensors as float32.
    Fp16,
    /// PR #1994's `int8_clean_per_row_v1+packed_ternary`.
    Pr1994,
    /// PR #1607's, codes of `bits` bits (6), of `mlp_bits` for names with `mlp` (0: no other), with or without clip
    /// search, the embedding as float16 or as any other tensor.
    Pr1607 {
        /// Bits of a code, 2 to 8.
        bits: u32,
        /// Bits of an MLP's codes, 2 to 8, or 0 for those of the others.
        mlp_bits: u32,
        /// Whether clips are searched for.
        search_clip: bool,
        /// Whether the embedding is kept as float16.
        fp16_embed: bool,
    },
    /// PR #1382's `mixed_quantize_int6`.
    Pr1382,
    /// Ours, matrices in codes of so many bits.
    Own {
        /// Bits of a code, 2 to 8.
        bits: u32,
    },
    /// Ours, matrices in ternary codes.
    OwnTernary(Packing),
}

/// PR #1607's export with its own defaults.
pub const PR1607: Export = Export::Pr1607 { bits: 6, mlp_bits: 0, search_clip: true, fp16_embed: true };

/// What a tensor becomes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Raw,
    F32,
    F16,
    Int { rule: Rule, bits: u32 },
    Ternary { packing: Packing, bit_linear: bool },
}

/// Everything that decides the forms of a model's tensors.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// Fragments of the names of control tensors.
    pub controls: Vec<String>,
    /// The weights of BitLinear layers, which are ternary in every forward pass.
    pub bit_linear: HashSet<String>,
    /// Hessians; a matrix without one is coded by clip search.
    pub hessians: Hessians,
}

impl Context {
    fn is_control(&self, name: &str) -> bool {
        self.controls.iter().any(|p| !p.is_empty() && name.contains(p.as_str()))
    }

    /// Float32 for a control tensor, float16 for another of float32 or bfloat16, else as it is.
    fn kept(&self, tensor: &HostTensor) -> Form {
        match tensor.dtype {
            _ if self.is_control(&tensor.name) => Form::F32,
            HostType::F32 | HostType::BF16 => Form::F16,
            _ => Form::Raw,
        }
    }
}

impl Export {
    /// Whether a tensor's codes depend on its Hessian, where there is one.
    pub fn takes_hessian(self, tensor: &HostTensor, context: &Context) -> bool {
        let form = self.form(tensor, context);
        tensor.shape.len() == 2 && matches!(form, Form::Int { rule, .. } if rule != Rule::Challenge)
    }

    /// Whether a tensor becomes codes.
    pub fn codes(self, tensor: &HostTensor, context: &Context) -> bool {
        matches!(self.form(tensor, context), Form::Int { .. } | Form::Ternary { .. })
    }

    fn form(self, tensor: &HostTensor, context: &Context) -> Form {
        if matches!(tensor.dtype, HostType::I8 | HostType::I32 | HostType::I64 | HostType::U8) {
            return Form::Raw;
        }
        let name = tensor.name.as_str();
        let is_small = tensor.numel() <= KEEP_FLOAT_MAX_NUMEL;
        let is_matrix = tensor.shape.len() == 2;
        let ternary = context.bit_linear.contains(name) && is_matrix && tensor.numel() > 0;
        match self {
            Self::Fp16 if context.is_control(name) => Form::F32,
            Self::Fp16 => Form::F16,
            Self::Pr1994 if ternary => Form::Ternary { packing: Packing::TwoBits, bit_linear: true },
            Self::OwnTernary(packing) if ternary => Form::Ternary { packing, bit_linear: true },
            Self::Pr1607 { fp16_embed: true, .. } if name.contains("tok_emb") => context.kept(tensor),
            Self::Pr1382 if is_small => Form::F16,
            _ if is_small => context.kept(tensor),
            Self::Challenge | Self::Pr1994 => Form::Int { rule: Rule::Challenge, bits: 8 },
            Self::Pr1607 { bits, mlp_bits, search_clip, .. } => Form::Int {
                rule: if search_clip { Rule::Pr1607 } else { Rule::Challenge },
                bits: if mlp_bits > 0 && name.contains("mlp") { mlp_bits } else { bits },
            },
            Self::Pr1382 if context.is_control(name) => Form::F32,
            Self::Pr1382 if is_body_1382(name) => Form::Int { rule: Rule::Pr1382, bits: 6 },
            Self::Pr1382 => Form::Int { rule: Rule::Challenge, bits: 8 },
            Self::Own { .. } | Self::OwnTernary(_) if is_table(name) || !is_matrix => {
                Form::Int { rule: Rule::Own, bits: 8 }
            }
            Self::Own { bits } => Form::Int { rule: Rule::Own, bits },
            Self::OwnTernary(packing) => Form::Ternary { packing, bit_linear: false },
        }
    }

    /// Whether weights that GPTQ restores are quantised once more, as any others (PR #1607).
    fn codes_twice(self) -> bool {
        matches!(self, Self::Pr1607 { .. })
    }
}

/// PR #1382's categories `mlp`, `attn` and `mamba`.
fn is_body_1382(name: &str) -> bool {
    let is_embedding = name.contains("tok_emb") || name.contains("lm_head");
    !is_embedding && [".mlp.", ".attn.", ".proj.", "mamba"].iter().any(|part| name.contains(part))
}

/// Tables that are looked up row by row, and heads: an error there meets every token.
fn is_table(name: &str) -> bool {
    ["emb", "table", "lm_head", "mtp_heads"].iter().any(|part| name.contains(part))
}

/// Quantises a model's tensors by an export's rules, in their order; tensors run in parallel.
///
/// # Errors
/// A weight that is not finite or too large for its stored type, a name used twice, bytes that do not fill the shape, a
/// Hessian of another size than its weight has columns.
pub fn quantize_by(export: Export, tensors: &[HostTensor], context: &Context) -> Result<Vec<QuantTensor>> {
    let (bits, mlp_bits) = match export {
        Export::Own { bits } => (bits, 0),
        Export::Pr1607 { bits, mlp_bits, .. } => (bits, mlp_bits),
        _ => (8, 0),
    };
    let asked = if mlp_bits == 0 { vec![bits] } else { vec![bits, mlp_bits] };
    if let Some(bits) = asked.iter().find(|bits| !clip::BITS.contains(bits)) {
        return Err(Error::input(format!("codes of {bits} bits"), "the quantisation", "2 to 8 bits"));
    }
    let mut seen = HashSet::new();
    if let Some(twice) = tensors.iter().find(|tensor| !seen.insert(tensor.name.as_str())) {
        return Err(Error::input(
            format!("two tensors named {}", twice.name),
            &twice.name,
            "names that differ",
        ));
    }
    tensors.par_iter().map(|tensor| quantize_one(export, tensor, context)).collect()
}

fn quantize_one(export: Export, tensor: &HostTensor, context: &Context) -> Result<QuantTensor> {
    let raw = Storage::Raw.parts(tensor.dtype, &tensor.shape, &tensor.name, &tensor.name)?;
    let expected: usize = raw.iter().map(|part| part.bytes).sum();
    if expected != tensor.bytes.len() {
        return Err(Error::input(
            format!("tensor {} has {} bytes", tensor.name, tensor.bytes.len()),
            &tensor.name,
            format!("{expected} bytes for shape {:?}", tensor.shape),
        ));
    }
    let shape = tensor.shape.as_slice();
    let (storage, parts) = match export.form(tensor, context) {
        Form::Raw => (Storage::Raw, vec![HostTensor { name: "values".into(), ..tensor.clone() }]),
        Form::F32 => (Storage::F32, vec![HostTensor::from_f32("values", shape, &finite(tensor)?)]),
        Form::F16 => (Storage::F16, vec![to_f16("values", shape, &finite(tensor)?, &tensor.name)?]),
        Form::Int { rule, bits } => int_parts(export, tensor, rule, bits, context)?,
        Form::Ternary { packing, bit_linear } => {
            let weights = finite(tensor)?;
            let ternary =
                if bit_linear { Ternary::bit_linear(&weights) } else { Ternary::least_squares(&weights) };
            let bytes = packing.pack(&ternary.codes);
            let codes =
                HostTensor { name: "codes".into(), shape: vec![bytes.len()], dtype: HostType::U8, bytes };
            let scales = HostTensor::from_f64("scales", &[], &[ternary.gamma.into()]);
            (Storage::Ternary(packing), vec![codes, scales])
        }
    };
    Ok(QuantTensor {
        name: tensor.name.clone(),
        shape: shape.to_vec(),
        original: tensor.dtype,
        storage,
        parts,
    })
}

fn int_parts(
    export: Export,
    tensor: &HostTensor,
    rule: Rule,
    bits: u32,
    context: &Context,
) -> Result<(Storage, Vec<HostTensor>)> {
    let weights = finite(tensor)?;
    let &[rows, cols] = tensor.shape.as_slice() else {
        let coded = rule.whole(&weights, bits);
        let scales = HostTensor::from_f32("scales", &[], &coded.scales);
        return Ok((Storage::int_tensor(bits), vec![int_codes(&tensor.shape, &coded.codes), scales]));
    };
    let hessian = context.hessians.get(&tensor.name).filter(|_| rule != Rule::Challenge);
    if let Some(hessian) = hessian
        && hessian.len() != cols * cols
    {
        return Err(Error::input(
            format!("a Hessian of {} numbers", hessian.len()),
            &tensor.name,
            format!("{} for {cols} columns", cols * cols),
        ));
    }
    // A Hessian that cannot be factored even when damped says nothing: the search does without (PR #1607).
    let solved = hessian.and_then(|hessian| gptq::rows(&weights, cols, hessian, bits, rule));
    let coded = match solved {
        Some(coded) if export.codes_twice() => rule.rows(&restored(&coded, cols, tensor.dtype), cols, bits),
        Some(coded) => coded,
        None => rule.rows(&weights, cols, bits),
    };
    let scales = to_f16("scales", &[rows], &coded.scales, &tensor.name)?;
    Ok((Storage::int_row(bits), vec![int_codes(&tensor.shape, &coded.codes), scales]))
}

/// The weights that codes restore to, in the model's type.
fn restored(coded: &Coded, cols: usize, dtype: HostType) -> Vec<f32> {
    let rows = coded.codes.chunks(cols.max(1)).zip(&coded.scales);
    let values = rows.flat_map(|(row, &scale)| row.iter().map(move |&code| f32::from(code) * scale));
    super::storage::rounded(values, dtype)
}

fn int_codes(shape: &[usize], codes: &[i8]) -> HostTensor {
    let bytes = codes.iter().map(|c| c.cast_unsigned()).collect();
    HostTensor { name: "codes".into(), shape: shape.to_vec(), dtype: HostType::I8, bytes }
}
