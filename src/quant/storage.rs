//! How a tensor is stored, and what it restores to.

use super::clip;
use super::ternary::{Packing, Ternary};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use half::{bf16, f16};

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
    /// A matrix: codes of so many bits (2 to 7), each in a byte of its own, and one float16 scale a row. Denser packing
    /// of the bits is the compressor's business: it sees whole codes.
    IntRow(u8),
    /// A tensor of any rank: codes of so many bits (2 to 7), each in a byte of its own, and one float32 scale.
    IntTensor(u8),
    /// Ternary codes, packed, and one float64 scale: the mean magnitude of the weights.
    Ternary(Packing),
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
    /// The name that people and scripts see: `f32`, `f16`, `int8/row`, `int6/row`, `int8/tensor`, `ternary/2bit`, `raw`.
    pub fn label(self) -> &'static str {
        const ROWS: [&str; 6] = ["int2/row", "int3/row", "int4/row", "int5/row", "int6/row", "int7/row"];
        const TENSORS: [&str; 6] =
            ["int2/tensor", "int3/tensor", "int4/tensor", "int5/tensor", "int6/tensor", "int7/tensor"];
        let of = |labels: [&'static str; 6], bits: u8| {
            labels.get(usize::from(bits).wrapping_sub(2)).copied().unwrap_or("int/unknown")
        };
        match self {
            Self::Raw => "raw",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Int8Row => "int8/row",
            Self::Int8Tensor => "int8/tensor",
            Self::IntRow(bits) => of(ROWS, bits),
            Self::IntTensor(bits) => of(TENSORS, bits),
            Self::Ternary(Packing::TwoBits) => "ternary/2bit",
            Self::Ternary(Packing::FiveTrits) => "ternary/5trit",
        }
    }

    /// The largest code of integers of fewer than 8 bits; the smallest is that of two's complement, one further.
    fn code_limit(self) -> Option<i8> {
        match self {
            Self::IntRow(bits) | Self::IntTensor(bits) => Some(clip::max_code(bits.into())),
            _ => None,
        }
    }

    /// Whether a tensor is stored as codes with scales.
    pub fn is_coded(self) -> bool {
        !matches!(self, Self::Raw | Self::F32 | Self::F16)
    }

    /// A matrix of `bits` bits with a scale a row.
    pub(super) fn int_row(bits: u32) -> Self {
        if bits >= 8 { Self::Int8Row } else { Self::IntRow(bits as u8) }
    }

    /// A tensor of any rank of `bits` bits with one scale.
    pub(super) fn int_tensor(bits: u32) -> Self {
        if bits >= 8 { Self::Int8Tensor } else { Self::IntTensor(bits as u8) }
    }

    /// Bytes of a payload as the systems count it: a ternary matrix's scale, a Python float among PR #1994's names, is not
    /// counted.
    pub fn payload_bytes<'a>(self, parts: impl IntoIterator<Item = (&'a str, usize)>) -> usize {
        let counted = |part: &str| !matches!(self, Self::Ternary(_)) || part == "codes";
        parts.into_iter().filter(|(part, _)| counted(part)).map(|(_, bytes)| bytes).sum()
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
            Self::Int8Row | Self::IntRow(2..=7) => match shape {
                [rows, _] => {
                    Ok(vec![part("codes", HostType::I8, shape)?, part("scales", HostType::F16, &[*rows])?])
                }
                _ => Err(Error::input(
                    format!("tensor {name} of shape {shape:?} stored as {}", self.label()),
                    place,
                    "two dimensions",
                )),
            },
            Self::Int8Tensor | Self::IntTensor(2..=7) => {
                Ok(vec![part("codes", HostType::I8, shape)?, part("scales", HostType::F32, &[])?])
            }
            Self::IntRow(bits) | Self::IntTensor(bits) => {
                Err(Error::input(format!("tensor {name} in codes of {bits} bits"), place, "2 to 7 bits"))
            }
            Self::Ternary(packing) => {
                let codes = part("codes", HostType::I8, shape)?.bytes;
                let packed = part("codes", HostType::U8, &[packing.bytes(codes)])?;
                Ok(vec![packed, part("scales", HostType::F64, &[])?])
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
    /// The tensor's share of the payload before compression ([`Storage::payload_bytes`]).
    pub fn payload_bytes(&self) -> usize {
        self.storage.payload_bytes(self.parts.iter().map(|part| (part.name.as_str(), part.bytes.len())))
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
    /// Parts that do not fit the shape, codes beyond their bits, and a scale or weight that is not a finite number.
    pub fn dequantize(&self) -> Result<HostTensor> {
        self.check()?;
        let values = match (self.storage, self.parts.as_slice()) {
            (Storage::Ternary(packing), [codes, scales]) => {
                self.unpack(packing, &codes.bytes, scales)?.restore()
            }
            (storage, [codes, scales]) if storage.is_coded() => {
                let scales = self.finite_scales(scales)?;
                if let Some(most) = storage.code_limit() {
                    let beyond = |c: &&u8| c.cast_signed() > most || c.cast_signed() < -most - 1;
                    if let Some(code) = codes.bytes.iter().find(beyond) {
                        return Err(Error::input(
                            format!("tensor {} has a code {}", self.name, code.cast_signed()),
                            &self.name,
                            format!("{} to {most}", -most - 1),
                        ));
                    }
                }
                let row = codes.bytes.len().div_ceil(scales.len().max(1)).max(1);
                let rows = codes.bytes.chunks(row).zip(&scales);
                rows.flat_map(|(row, &scale)| row.iter().map(move |&c| f32::from(c.cast_signed()) * scale))
                    .collect()
            }
            (_, parts) => parts.first().map(HostTensor::to_f32).unwrap_or_default(),
        };
        let rounded = rounded(values.into_iter(), self.original);
        if let Some(at) = rounded.iter().position(|weight| !weight.is_finite()) {
            return Err(Error::input(
                format!("tensor {} restores to {} at element {at}", self.name, rounded[at]),
                &self.name,
                "finite weights",
            ));
        }
        Ok(HostTensor::from_f32(self.name.clone(), &self.shape, &rounded))
    }

    fn finite_scales(&self, scales: &HostTensor) -> Result<Vec<f32>> {
        let scales = scales.to_f32();
        if scales.iter().any(|s| !s.is_finite()) {
            return Err(Error::input(
                format!("tensor {} has a scale that is not finite", self.name),
                &self.name,
                "finite scales",
            ));
        }
        Ok(scales)
    }

    pub(super) fn unpack(&self, packing: Packing, packed: &[u8], scales: &HostTensor) -> Result<Ternary> {
        let gamma = self.finite_scales(scales)?.first().copied().unwrap_or_default();
        let count = self.shape.iter().product();
        let codes = packing.unpack(packed, count).ok_or_else(|| {
            Error::input(
                format!("tensor {} has bytes that pack no ternary codes", self.name),
                &self.name,
                "codes from -1 to 1, the last byte filled up as packing does",
            )
        })?;
        Ok(Ternary { codes, gamma })
    }
}

/// Values rounded to a 16-bit element type, if that is what they are to be.
pub(super) fn rounded(values: impl Iterator<Item = f32>, dtype: HostType) -> Vec<f32> {
    match dtype {
        HostType::F16 => values.map(|v| f16::from_f32(v).to_f32()).collect(),
        HostType::BF16 => values.map(|v| bf16::from_f32(v).to_f32()).collect(),
        _ => values.collect(),
    }
}
