//! The named parameters of a model, and their way to and from host memory.

use super::plan::{Bank, Plan};
use super::spec::Spec;
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::ops::{Param, Plain, accumulate_type};
use crate::recipe::Recipe;
use burn::tensor::{DType, Tensor, TensorData};
use half::bf16;
use rayon::prelude::*;
use std::collections::HashMap;

/// A model's parameters in their order.
///
/// In host memory they have the peers' names and shapes: matrices that the source system keeps in one tensor (a bank)
/// are one there.
#[derive(Debug, Clone)]
pub struct Params<P: Plain> {
    params: Vec<Param<P>>,
    index: HashMap<String, usize>,
    banks: Vec<Bank>,
}

/// A reading of a parameter: its row of elements, if it has one.
type Reading<'a, P> = &'a dyn Fn(&Param<P>) -> Option<Tensor<P, 1>>;

impl<P: Plain> Params<P> {
    /// The parameters of a plan at their initial values. Masters are f32 (f64 where the model computes in f64).
    pub fn init(plan: &Plan, recipe: &Recipe, device: &P::Device, compute_type: DType) -> Self {
        let host = |spec: &Spec| {
            let mut values = spec.init.values(recipe.seed, &spec.name, &spec.shape);
            if recipe.as_written && spec.bf16 {
                values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
            }
            HostTensor::from_f32(&spec.name, &spec.shape, &values)
        };
        let hosts: Vec<HostTensor> = plan.specs.par_iter().map(host).collect();
        let param = |(spec, host): (&Spec, HostTensor)| {
            let flat = from_host::<P>(&host, device, accumulate_type(compute_type));
            let param = Param::of_shape(&spec.name, &spec.shape, flat, compute_type);
            param.set_form(spec.form);
            param
        };
        Self::of(plan.specs.iter().zip(hosts).map(param).collect(), plan.banks.clone())
    }

    /// Parameters of different names, and which of them are one tensor in host memory.
    pub fn of(params: Vec<Param<P>>, banks: Vec<Bank>) -> Self {
        let index = params.iter().enumerate().map(|(index, param)| (param.name().into(), index)).collect();
        Self { params, index, banks }
    }

    /// Each parameter.
    pub fn iter(&self) -> impl Iterator<Item = &Param<P>> {
        self.params.iter()
    }

    /// The parameter of that name.
    pub fn get(&self, name: &str) -> Option<&Param<P>> {
        self.index.get(name).map(|index| &self.params[*index])
    }

    /// The parameter of a name that the layout has.
    pub(super) fn named(&self, name: &str) -> Param<P> {
        self.get(name).unwrap_or_else(|| unreachable!("{name} is not in the layout")).clone()
    }

    /// Number of elements of all parameters.
    pub fn numel(&self) -> usize {
        self.params.iter().map(Param::numel).sum()
    }

    /// Drops every accumulated gradient.
    pub fn clear_grads(&self) {
        self.params.iter().for_each(Param::clear_grad);
    }

    /// The bank that a parameter belongs to.
    pub fn bank_of(&self, name: &str) -> Option<&Bank> {
        self.banks.iter().find(|bank| bank.members.iter().any(|member| member == name))
    }

    /// The master values in host memory, in order, by the peers' names.
    pub fn to_host(&self) -> Result<Vec<HostTensor>> {
        self.read(&|param| Some(param.flat()))
    }

    /// Readings in host memory, in order, by the peers' names; a parameter without one is left out, a member of a bank
    /// of which another has one is zero.
    pub fn read(&self, reading: Reading<'_, P>) -> Result<Vec<HostTensor>> {
        let mut tensors: Vec<HostTensor> = Vec::new();
        let mut done: Vec<&str> = Vec::new();
        for param in &self.params {
            match self.bank_of(param.name()) {
                None => {
                    let flat = reading(param);
                    tensors.extend(flat.map(|flat| to_host(param.name(), param.shape(), flat)).transpose()?);
                }
                Some(bank) if done.contains(&bank.name.as_str()) => {}
                Some(bank) => {
                    done.push(&bank.name);
                    tensors.extend(self.read_bank(bank, reading)?);
                }
            }
        }
        Ok(tensors)
    }

    fn read_bank(&self, bank: &Bank, reading: Reading<'_, P>) -> Result<Option<HostTensor>> {
        let members: Vec<Param<P>> = bank.members.iter().map(|name| self.named(name)).collect();
        let rows: Vec<Option<Tensor<P, 1>>> = members.iter().map(reading).collect();
        if rows.iter().all(Option::is_none) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let mut dtype = HostType::F32;
        for (param, row) in members.iter().zip(rows) {
            let row = row.unwrap_or_else(|| param.flat().zeros_like());
            let host = to_host(param.name(), param.shape(), row)?;
            dtype = host.dtype;
            bytes.extend(host.bytes);
        }
        let shape = [&[members.len()], members[0].shape()].concat();
        Ok(Some(HostTensor { name: bank.name.clone(), shape, dtype, bytes }))
    }

    /// Sets every master value from `tensors`: each name once, of the parameter's shape, and none left over.
    pub fn load(&self, tensors: &[HostTensor], place: &str) -> Result<()> {
        let mut by_name: HashMap<&str, &HostTensor> = HashMap::new();
        for tensor in tensors {
            let known = self.get(&tensor.name).is_some_and(|_| self.bank_of(&tensor.name).is_none())
                || self.banks.iter().any(|bank| bank.name == tensor.name);
            if !known {
                let what = format!("unknown tensor {}", tensor.name);
                return Err(Error::input(what, place, "only the parameters of the recipe"));
            }
            if by_name.insert(&tensor.name, tensor).is_some() {
                let what = format!("tensor {} is there twice", tensor.name);
                return Err(Error::input(what, place, "each parameter of the recipe once"));
            }
        }
        let named = |name: &str| {
            by_name.get(name).copied().ok_or_else(|| {
                let what = format!("tensor {name} is missing");
                Error::input(what, place, "each parameter of the recipe once")
            })
        };
        let set = |param: &Param<P>, tensor: &HostTensor| {
            param.set_flat(from_host(tensor, &param.flat().device(), param.master_type()));
        };
        for param in self.params.iter().filter(|param| self.bank_of(param.name()).is_none()) {
            let tensor = named(param.name())?;
            tensor.expect_shape(param.shape(), place)?;
            set(param, tensor);
        }
        for bank in &self.banks {
            let tensor = named(&bank.name)?;
            let members: Vec<Param<P>> = bank.members.iter().map(|name| self.named(name)).collect();
            tensor.expect_shape(&[&[members.len()], members[0].shape()].concat(), place)?;
            let size = tensor.bytes.len() / members.len();
            for (param, bytes) in members.iter().zip(tensor.bytes.chunks(size.max(1))) {
                let part = HostTensor {
                    name: param.name().into(),
                    shape: param.shape().to_vec(),
                    dtype: tensor.dtype,
                    bytes: bytes.to_vec(),
                };
                set(param, &part);
            }
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
