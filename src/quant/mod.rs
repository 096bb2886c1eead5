//! Quantisers: a model's tensors as the few bytes that an artifact stores, and back.
//!
//! A [`QuantTensor`] says how one tensor is stored ([`Storage`]) and holds the stored parts (codes, scales, or the
//! values themselves). [`quantize`] makes them by a [`Scheme`]; [`QuantTensor::dequantize`] gives the weights that the
//! reloaded model computes with. Both follow the challenge's export (`spec/challenge.md` section 4).

pub mod int8;

use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use half::{bf16, f16};
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

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

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As it was, in its own element type (integers, and floats that no rule converts).
    Raw,
    /// Values as float32.
    F32,
    /// Values as float16.
    F16,
    /// A matrix: int8 codes, and one float16 scale a row.
    Int8Row,
    /// A tensor of any rank: int8 codes, and one float32 scale.
    Int8Tensor,
}

/// One stored part of a tensor, as its storage and shape imply it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartSpec {
    /// `values`, `codes` or `scales`.
    pub name: &'static str,
    /// Element type.
    pub dtype: HostType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Bytes of the part.
    pub bytes: usize,
}

impl Storage {
    /// The name that people and scripts see: `f32`, `f16`, `int8/row`, `int8/tensor`, `raw`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8Row => "int8/row",
            Self::Int8Tensor => "int8/tensor",
        }
    }

    /// The parts of a tensor of element type `original` and sizes `shape`, in order.
    ///
    /// # Errors
    /// A shape whose size overflows, a shape that this storage cannot hold, or a quantised tensor that was not a
    /// float. `name` is the tensor's and `place` the file's or command's, for the message.
    pub fn parts(
        self,
        original: HostType,
        shape: &[usize],
        name: &str,
        place: &str,
    ) -> Result<Vec<PartSpec>> {
        let is_float = matches!(original, HostType::F64 | HostType::F32 | HostType::F16 | HostType::BF16);
        if self != Self::Raw && !is_float {
            return Err(Error::input(
                format!("tensor {name} of {original:?} stored as {}", self.label()),
                place,
                "a float tensor",
            ));
        }
        let part = |part: &'static str, dtype: HostType, shape: &[usize]| {
            shape
                .iter()
                .try_fold(dtype.size(), |bytes, &n| bytes.checked_mul(n))
                .map(|bytes| PartSpec { name: part, dtype, shape: shape.to_vec(), bytes })
                .ok_or_else(|| {
                    Error::input(
                        format!("tensor {name} of shape {shape:?}"),
                        place,
                        "a size that fits in memory",
                    )
                })
        };
        match self {
            Self::Raw => Ok(vec![part("values", original, shape)?]),
            Self::F32 => Ok(vec![part("values", HostType::F32, shape)?]),
            Self::F16 => Ok(vec![part("values", HostType::F16, shape)?]),
            Self::Int8Row => match shape {
                [rows, _] => {
                    Ok(vec![part("codes", HostType::I8, shape)?, part("scales", HostType::F16, &[*rows])?])
                }
                _ => Err(Error::input(
                    format!("tensor {name} of shape {shape:?} stored as int8/row"),
                    place,
                    "two dimensions",
                )),
            },
            Self::Int8Tensor => {
                Ok(vec![part("codes", HostType::I8, shape)?, part("scales", HostType::F32, &[])?])
            }
        }
    }
}

/// A tensor as an artifact stores it.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantTensor {
    /// The peers' own name of the tensor (spec files).
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Element type of the weights before they were quantised; the dequantised values are rounded to it.
    pub original: HostType,
    /// How it is stored.
    pub storage: Storage,
    /// The stored parts, as [`Storage::parts`] lists them; each is named by its role.
    pub parts: Vec<HostTensor>,
}

impl QuantTensor {
    /// Bytes of all parts: the tensor's share of the payload before compression.
    pub fn payload_bytes(&self) -> usize {
        self.parts.iter().map(|part| part.bytes.len()).sum()
    }

    /// Checks that the parts are exactly those that shape and storage imply.
    pub fn check(&self) -> Result<()> {
        let specs = self.storage.parts(self.original, &self.shape, &self.name, &self.name)?;
        let same = specs.len() == self.parts.len()
            && specs.iter().zip(&self.parts).all(|(spec, part)| {
                spec.dtype == part.dtype && spec.shape == part.shape && spec.bytes == part.bytes.len()
            });
        if same {
            return Ok(());
        }
        let got: Vec<String> = self
            .parts
            .iter()
            .map(|p| format!("{:?} {:?} of {} bytes", p.dtype, p.shape, p.bytes.len()))
            .collect();
        Err(Error::input(
            format!("tensor {} has parts [{}]", self.name, got.join("; ")),
            &self.name,
            format!("the parts of {} for shape {:?}", self.storage.label(), self.shape),
        ))
    }

    /// The weights as a float32 tensor: codes times scale in float32, rounded to the original element type.
    ///
    /// A tensor stored raw in a wider type (float64, int64) is rounded to float32.
    ///
    /// # Errors
    /// Parts that do not fit the shape, and a scale that is not a finite number.
    pub fn dequantize(&self) -> Result<HostTensor> {
        self.check()?;
        let values = match (self.storage, self.parts.as_slice()) {
            (Storage::Int8Row | Storage::Int8Tensor, [codes, scales]) => {
                let scales = scales.to_f32();
                if scales.iter().any(|s| !s.is_finite()) {
                    return Err(Error::input(
                        format!("tensor {} has a scale that is not finite", self.name),
                        &self.name,
                        "finite scales",
                    ));
                }
                let row = codes.bytes.len().div_ceil(scales.len().max(1)).max(1);
                let rows = codes.bytes.chunks(row).zip(&scales);
                rows.flat_map(|(row, &scale)| row.iter().map(move |&c| f32::from(c.cast_signed()) * scale))
                    .collect()
            }
            (_, parts) => parts.first().map(HostTensor::to_f32).unwrap_or_default(),
        };
        let rounded: Vec<f32> = match self.original {
            HostType::F16 => values.into_iter().map(|v| f16::from_f32(v).to_f32()).collect(),
            HostType::BF16 => values.into_iter().map(|v| bf16::from_f32(v).to_f32()).collect(),
            _ => values,
        };
        Ok(HostTensor::from_f32(self.name.clone(), &self.shape, &rounded))
    }
}

/// A quantisation scheme: what `--quant` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// The challenge's `int8_clean_per_row_v1`.
    Int8,
    /// Every float tensor as float16, control tensors as float32.
    Fp16,
}

impl Scheme {
    /// The schemes there are, by the names that `--quant` takes.
    pub const ALL: [(&'static str, Self); 2] = [("int8", Self::Int8), ("fp16", Self::Fp16)];
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Int8 => "int8",
            Self::Fp16 => "fp16",
        })
    }
}

impl FromStr for Scheme {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.iter().find(|(name, _)| *name == text).map(|&(_, scheme)| scheme).ok_or_else(|| {
            let known: Vec<&str> = Self::ALL.iter().map(|(name, _)| *name).collect();
            Error::input(
                format!("unknown quantisation {text:?}"),
                "--quant",
                format!("one of {}", known.join(", ")),
            )
        })
    }
}

/// Quantises a model's tensors, in their order.
///
/// `control_patterns` are name fragments ([`CONTROL_PATTERNS`] in the challenge): a small tensor whose name contains
/// one stays float32. Integer tensors pass through as they are.
///
/// # Errors
/// A weight that is not finite or too large for its stored type, a name used twice, bytes that do not fill the shape.
pub fn quantize(
    scheme: Scheme,
    tensors: &[HostTensor],
    control_patterns: &[String],
) -> Result<Vec<QuantTensor>> {
    let mut seen = HashSet::new();
    for tensor in tensors {
        if !seen.insert(tensor.name.as_str()) {
            return Err(Error::input(
                format!("two tensors named {}", tensor.name),
                &tensor.name,
                "names that differ",
            ));
        }
    }
    tensors
        .iter()
        .map(|tensor| {
            let is_control =
                control_patterns.iter().any(|p| !p.is_empty() && tensor.name.contains(p.as_str()));
            quantize_one(scheme, tensor, is_control)
        })
        .collect()
}

fn quantize_one(scheme: Scheme, tensor: &HostTensor, is_control: bool) -> Result<QuantTensor> {
    let raw = Storage::Raw.parts(tensor.dtype, &tensor.shape, &tensor.name, &tensor.name)?;
    let expected: usize = raw.iter().map(|part| part.bytes).sum();
    if expected != tensor.bytes.len() {
        return Err(Error::input(
            format!("tensor {} has {} bytes", tensor.name, tensor.bytes.len()),
            &tensor.name,
            format!("{expected} bytes for shape {:?}", tensor.shape),
        ));
    }
    let storage = match (tensor.dtype, scheme) {
        (HostType::I8 | HostType::I32 | HostType::I64 | HostType::U8, _) => Storage::Raw,
        (_, Scheme::Fp16) if is_control => Storage::F32,
        (_, Scheme::Fp16) => Storage::F16,
        (dtype, Scheme::Int8) if tensor.numel() <= KEEP_FLOAT_MAX_NUMEL => match dtype {
            _ if is_control => Storage::F32,
            HostType::F32 | HostType::BF16 => Storage::F16,
            _ => Storage::Raw,
        },
        (_, Scheme::Int8) if tensor.shape.len() == 2 => Storage::Int8Row,
        (_, Scheme::Int8) => Storage::Int8Tensor,
    };
    let parts = match storage {
        Storage::Raw => vec![HostTensor { name: "values".into(), ..tensor.clone() }],
        Storage::F32 => vec![HostTensor::from_f32("values", &tensor.shape, &finite(tensor)?)],
        Storage::F16 => vec![to_f16("values", &tensor.shape, &finite(tensor)?, &tensor.name)?],
        Storage::Int8Row => {
            let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
            let (codes, scales) = int8::quantize_rows(&finite(tensor)?, cols);
            vec![int8_codes(&tensor.shape, &codes), to_f16("scales", &[rows], &scales, &tensor.name)?]
        }
        Storage::Int8Tensor => {
            let (codes, scale) = int8::quantize_whole(&finite(tensor)?);
            vec![int8_codes(&tensor.shape, &codes), HostTensor::from_f32("scales", &[], &[scale])]
        }
    };
    Ok(QuantTensor {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
        original: tensor.dtype,
        storage,
        parts,
    })
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

fn int8_codes(shape: &[usize], codes: &[i8]) -> HostTensor {
    let bytes = codes.iter().map(|c| c.cast_unsigned()).collect();
    HostTensor { name: "codes".into(), shape: shape.to_vec(), dtype: HostType::I8, bytes }
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

/// What the challenge's exporter counts over a state dict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Elements of all tensors.
    pub param_count: usize,
    /// Tensors.
    pub num_tensors: usize,
    /// Tensors that became int8 codes (the challenge's `num_float_tensors`).
    pub num_float_tensors: usize,
    /// Tensors that are not floats.
    pub num_nonfloat_tensors: usize,
    /// Bytes of all tensors in their original element types.
    pub baseline_tensor_bytes: usize,
    /// Bytes of all stored parts (the challenge's `int8_payload_bytes`).
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
            stats.num_float_tensors +=
                usize::from(matches!(tensor.storage, Storage::Int8Row | Storage::Int8Tensor));
            stats.num_nonfloat_tensors += usize::from(matches!(
                tensor.original,
                HostType::I8 | HostType::I32 | HostType::I64 | HostType::U8
            ));
        }
        stats
    }
}
