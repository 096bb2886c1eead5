//! The named parameters of a model, and their way to and from host memory.

use super::EMBEDDING;
use super::init::Init;
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::ops::{Param, Plain, accumulate_type};
use crate::recipe::Recipe;
use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;

/// A parameter as the model's layout states it.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The peers' own name (spec files).
    pub name: String,
    /// Sizes, outermost first; one or two of them.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
}

impl Spec {
    /// A parameter of that name, shape and start.
    pub fn new(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), init }
    }
}

/// A model's parameters in their order.
#[derive(Debug, Clone)]
pub struct Params<P: Plain>(Vec<Param<P>>);

impl<P: Plain> Params<P> {
    /// The parameters of a layout at their initial values. Masters are f32 (f64 where the model computes in f64).
    pub fn init(layout: &[Spec], recipe: &Recipe, device: &P::Device, compute_type: DType) -> Self {
        let param = |spec: &Spec| {
            let mut values = spec.init.values(recipe.seed, &spec.name, &spec.shape);
            if recipe.as_written && spec.name == EMBEDDING {
                // The challenge keeps its embedding in bf16 from the start.
                values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
            }
            let host = HostTensor::from_f32(&spec.name, &spec.shape, &values);
            let flat = from_host::<P>(&host, device, accumulate_type(compute_type));
            match *spec.shape {
                [n] => Param::new(&spec.name, flat.reshape([n]), compute_type),
                [rows, columns] => Param::new(&spec.name, flat.reshape([rows, columns]), compute_type),
                _ => unreachable!("{} is neither a vector nor a matrix", spec.name),
            }
        };
        Self(layout.iter().map(param).collect())
    }

    /// Each parameter.
    pub fn iter(&self) -> impl Iterator<Item = &Param<P>> {
        self.0.iter()
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Param<P>> {
        self.0.iter().find(|param| param.name() == name)
    }

    /// The parameter of a name that the layout has.
    pub(super) fn named(&self, name: &str) -> Param<P> {
        self.get(name).unwrap_or_else(|| unreachable!("{name} is not in the layout")).clone()
    }

    /// Number of elements of all parameters.
    pub fn numel(&self) -> usize {
        self.0.iter().map(Param::numel).sum()
    }

    /// Drops every accumulated gradient.
    pub fn clear_grads(&self) {
        self.0.iter().for_each(Param::clear_grad);
    }

    /// The master values in host memory, in order.
    pub fn to_host(&self) -> Result<Vec<HostTensor>> {
        self.0.iter().map(|param| to_host(param.name(), param.shape(), param.flat())).collect()
    }

    /// Sets every master value from `tensors`: each name once, of the parameter's shape, and none left over.
    pub fn load(&self, tensors: &[HostTensor], place: &str) -> Result<()> {
        for param in &self.0 {
            let mut named = tensors.iter().filter(|tensor| tensor.name == param.name());
            let (Some(tensor), None) = (named.next(), named.next()) else {
                let problem = format!("tensor {} is missing or there twice", param.name());
                return Err(Error::input(problem, place, "each parameter of the recipe once"));
            };
            tensor.expect_shape(param.shape(), place)?;
            param.set_flat(from_host(tensor, &param.flat().device(), param.master_type()));
        }
        if let Some(extra) = tensors.iter().find(|tensor| self.get(&tensor.name).is_none()) {
            return Err(Error::input(
                format!("unknown tensor {}", extra.name),
                place,
                "only the parameters of the recipe",
            ));
        }
        Ok(())
    }
}

/// A row of elements in host memory, as F64 or (from anything narrower) F32.
pub fn to_host<P: Plain>(name: &str, shape: &[usize], flat: Tensor<P, 1>) -> Result<HostTensor> {
    let lost = |error: String| {
        Error::failed(format!("cannot read tensor {name} ({error})"), "the device", "to read it")
    };
    let wide = flat.dtype() == DType::F64;
    let flat = if wide { flat } else { flat.cast(DType::F32) };
    let data = flat.try_into_data().map_err(|error| lost(error.to_string()))?;
    if wide {
        let values = data.to_vec::<f64>().map_err(|error| lost(format!("{error:?}")))?;
        return Ok(HostTensor::from_f64(name, shape, &values));
    }
    let values = data.to_vec::<f32>().map_err(|error| lost(format!("{error:?}")))?;
    Ok(HostTensor::from_f32(name, shape, &values))
}

/// A host tensor on a device as one row of all elements, as F64 or F32.
pub fn from_host<P: Plain>(tensor: &HostTensor, device: &P::Device, dtype: DType) -> Tensor<P, 1> {
    let shape = [tensor.numel()];
    if dtype == DType::F64 {
        return Tensor::from_data(TensorData::new(tensor.to_f64(), shape), (device, DType::F64));
    }
    let values = match tensor.dtype {
        HostType::F32 => {
            tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        _ => tensor.to_f32(),
    };
    let value: Tensor<P, 1> = Tensor::from_data(TensorData::new(values, shape), (device, DType::F32));
    value.cast(dtype)
}
