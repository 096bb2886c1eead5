//! `op.*` and `layer.*` of the mixers and other parts of the hybrids, built from the model's own modules: inputs `in.*`,
//! parameters `param.*` by the peers' names (some entries have them among the inputs), upstream gradients `cot.*`.

pub(super) mod attention;
pub(super) mod linear;
pub(super) mod mixers;
pub(super) mod tokens;

use super::case::Case;
use super::index::Section;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::params::{Params, from_host};
use crate::model::spec::{Linears, Spec};
use crate::ops::weight_form::WeightForm;
use crate::ops::{Autodiff, Param, Plain, reduce};
use burn::tensor::Tensor;

type Tape<P> = Autodiff<P>;

/// Linear layers with ternary weights.
const TERNARY: Linears = Linears { form: WeightForm::BitLinear, ..Linears::PLAIN };

fn tracked<P: Plain, const D: usize>(x: Tensor<P, D>) -> Tensor<Tape<P>, D> {
    Tensor::from_inner(x).require_grad()
}

/// `sum(y cot)`.
fn total<P: Plain, const D: usize>(y: Tensor<Tape<P>, D>, cot: Tensor<P, D>) -> Tensor<Tape<P>, 1> {
    let elements: usize = y.dims().iter().product();
    reduce::sum((y * Tensor::from_inner(cot)).reshape([elements]))
}

/// The parameters of `specs`, each from the tensor that `named` calls it in the file.
fn params<P: Plain>(case: &Case<'_, P>, specs: &[Spec], named: impl Fn(&str) -> String) -> Result<Params<P>> {
    let param = |spec: &Spec| {
        let name = named(&spec.name);
        let tensor = case.host(&name)?;
        // The peers' own shapes may have other sizes of one.
        if tensor.numel() as u64 != spec.numel() {
            let found = format!("tensor {name} has shape {:?}", tensor.shape);
            return Err(Error::input(found, "the file", format!("{:?}", spec.shape)));
        }
        let flat = from_host::<P>(tensor, case.device, case.dtype);
        let param = Param::of_shape(&spec.name, &tensor.shape, flat, case.dtype);
        param.set_form(spec.form);
        Ok(param)
    };
    Ok(Params::of(specs.iter().map(param).collect::<Result<_>>()?, Vec::new()))
}

/// Gives the parameters' gradients by the file's names.
fn give_grads<P: Plain>(
    case: &mut Case<'_, P>,
    params: &Params<P>,
    named: impl Fn(&str) -> String,
) -> Result<()> {
    for grad in params.read(&Param::take_flat_grad)? {
        case.give_host(HostTensor { name: named(&grad.name), ..grad });
    }
    Ok(())
}

/// Names without a prefix and a dot.
fn without<'a>(prefix: &'a str, outer: &'a str) -> impl Fn(&str) -> String + Copy + use<'a> {
    move |name: &str| {
        let own = name.strip_prefix(prefix).and_then(|name| name.strip_prefix('.')).unwrap_or(name);
        format!("{outer}.{own}")
    }
}

/// Runs a module on `in.x[b, t, c]` and gives `out.y`, `grad.x` and the parameters' gradients (by `grads`), for an
/// upstream gradient `cot.y`.
fn run_layer<P: Plain>(
    case: &mut Case<'_, P>,
    params: &Params<P>,
    grads: impl Fn(&str) -> String,
    forward: impl FnOnce(Tensor<Tape<P>, 2>, usize) -> Tensor<Tape<P>, 2>,
) -> Result<()> {
    let (x, shape) = case.matrix("in.x")?;
    let batch = if shape.len() == 3 { shape[0] } else { 1 };
    let x = tracked(x);
    let y = forward(x.clone(), batch);
    let out = [&shape[..shape.len() - 1], &[y.dims()[1]]].concat();
    case.expect_shape("cot.y", &out)?;
    let (cot, _) = case.matrix("cot.y")?;
    case.give("out.y", &out, Some(y.clone().inner()))?;
    let found = (y * Tensor::from_inner(cot)).backward();
    case.give("grad.x", &shape, x.grad(&found))?;
    give_grads(case, params, grads)
}

/// The width of `in.x`.
fn width<P: Plain>(case: &Case<'_, P>) -> Result<usize> {
    let shape = &case.host("in.x")?.shape;
    shape.last().copied().ok_or_else(|| Error::input("in.x is a scalar", "the file", "[batch, time, width]"))
}

/// The sizes of a parameter that must be a matrix.
fn matrix_shape<P: Plain>(case: &Case<'_, P>, name: &str) -> Result<[usize; 2]> {
    let shape = &case.host(name)?.shape;
    <[usize; 2]>::try_from(shape.as_slice())
        .map_err(|_| Error::input(format!("tensor {name} has shape {shape:?}"), "the file", "a matrix"))
}

/// A whole number of a section that must be there and above 0.
fn size(section: Section<'_>, key: &str) -> Result<usize> {
    section
        .count(key)?
        .filter(|count| *count > 0)
        .ok_or_else(|| Error::input(format!("no {key}"), "config", "a whole number above 0"))
}

/// Refuses a size that is no multiple of another.
fn multiple(what: &str, whole: usize, part: usize) -> Result<()> {
    if part > 0 && whole > 0 && whole.is_multiple_of(part) {
        return Ok(());
    }
    Err(Error::input(format!("{what} = {whole}"), "config", format!("a multiple of {part}")))
}
