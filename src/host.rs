//! Tensors in host memory: what crosses between models, checkpoints, artifacts and fixtures.

use crate::error::{Error, Result};
use half::{bf16, f16};

/// The element types that files of this project hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum HostType {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit float (IEEE half).
    F16,
    /// 16-bit float (bfloat).
    BF16,
    /// 8-bit signed integer.
    I8,
    /// 32-bit signed integer.
    I32,
    /// 64-bit signed integer.
    I64,
    /// 8-bit unsigned integer.
    U8,
}

impl HostType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I8 | Self::U8 => 1,
        }
    }
}

/// A named, dense, row-major tensor; `bytes` are little-endian elements.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// The peers' own name of the tensor (spec files).
    pub name: String,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: HostType,
    /// Little-endian elements, row-major.
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// A float32 tensor.
    pub fn from_f32(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values do not fill the shape");
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name: name.into(), shape: shape.to_vec(), dtype: HostType::F32, bytes }
    }

    /// A float64 tensor.
    pub fn from_f64(name: impl Into<String>, shape: &[usize], values: &[f64]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values do not fill the shape");
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name: name.into(), shape: shape.to_vec(), dtype: HostType::F64, bytes }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The elements as f64, whatever the element type (exact for every type but large I64).
    pub fn to_f64(&self) -> Vec<f64> {
        fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
            bytes.chunks_exact(N).map(|c| f(c.try_into().expect("exact chunk"))).collect()
        }
        match self.dtype {
            HostType::F64 => each(&self.bytes, f64::from_le_bytes),
            HostType::F32 => each(&self.bytes, |b| f32::from_le_bytes(b).into()),
            HostType::F16 => each(&self.bytes, |b| f16::from_le_bytes(b).into()),
            HostType::BF16 => each(&self.bytes, |b| bf16::from_le_bytes(b).into()),
            HostType::I8 => each(&self.bytes, |b| i8::from_le_bytes(b).into()),
            HostType::I32 => each(&self.bytes, |b| i32::from_le_bytes(b).into()),
            HostType::I64 => each(&self.bytes, |b| i64::from_le_bytes(b) as f64),
            HostType::U8 => each(&self.bytes, |b: [u8; 1]| b[0].into()),
        }
    }

    /// The elements as f32 (rounded where the type is wider).
    pub fn to_f32(&self) -> Vec<f32> {
        self.to_f64().into_iter().map(|v| v as f32).collect()
    }

    /// Checks that the shape is the one asked for.
    pub fn expect_shape(&self, shape: &[usize], place: &str) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(Error::input(
            format!("tensor {} has shape {:?}", self.name, self.shape),
            place,
            format!("{shape:?}"),
        ))
    }
}
