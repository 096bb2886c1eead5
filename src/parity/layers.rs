//! `op.*` and `layer.*` of the mixers and other parts of the hybrids, built from the model's own modules: inputs `in.*`,
//! parameters `param.*` by the peers' names (some entries have them among the inputs), upstream gradients `cot.*`.

use super::case::{Case, integers};
use super::index::Section;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model::attention::{Attention, AttentionInputs, AttentionPlan};
use crate::model::embed::{Embed, EmbedPlan, HashPlan, smear};
use crate::model::init::Init;
use crate::model::mamba1::{Mamba1, Mamba1Plan};
use crate::model::mamba2::{Mamba2, Mamba2Form, Mamba2Plan};
use crate::model::mamba3::{Mamba3, Mamba3Pieces, Mamba3Plan};
use crate::model::mlp::{Mlp, MlpForm, MlpPlan};
use crate::model::params::{Params, from_host};
use crate::model::plan::RopePlan;
use crate::model::s4d::{S4d, S4dPlan};
use crate::model::spec::{Linears, Spec};
use crate::ops::hash::Hash;
use crate::ops::one_pole::OnePole;
use crate::ops::rms_norm::EPS;
use crate::ops::rope::RopeTable;
use crate::ops::scan::Scan;
use crate::ops::selective_scan::SelectiveScan;
use crate::ops::weight_form::{self, WeightForm};
use crate::ops::*;
use burn::tensor::{Int, Tensor};

type Tape<P> = Autodiff<P>;

fn tracked<P: Plain, const D: usize>(x: Tensor<P, D>) -> Tensor<Tape<P>, D> {
    Tensor::from_inner(x).require_grad()
}

/// The parameters of `specs`, each from the tensor that `named` calls it in the file.
fn params<P: Plain>(
    case: &Case<'_, P>,
    specs: &[Spec],
    named: impl Fn(&str) -> String,
) -> Result<Params<P>> {
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
fn give_grads<P: Plain>(case: &mut Case<'_, P>, params: &Params<P>, named: impl Fn(&str) -> String) -> Result<()> {
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

/// `op.*_mlp`: an MLP of two or three matrices, among the inputs or the parameters.
fn mlp_of<P: Plain>(
    case: &mut Case<'_, P>,
    form: MlpForm,
    linears: Linears,
    names: &'static [(&'static str, &'static str)],
) -> Result<()> {
    let dim = width(case)?;
    let hidden = matrix_shape(case, names[0].1)?[0];
    let plan = MlpPlan { prefix: "mlp".into(), dim, hidden, form };
    let find = |name: &str| names.iter().find(|(own, _)| *own == name).map_or(name, |(_, file)| *file).to_string();
    let params = params(case, &plan.specs(linears), find)?;
    let mlp = Mlp::new(&plan, &params);
    let grad = |name: &str| {
        let file = find(name);
        format!("grad.{}", file.split_once('.').map_or(file.as_str(), |(_, own)| own))
    };
    run_layer(case, &params, grad, |x, _| mlp.forward(x))
}

const SQUARED_INPUTS: &[(&str, &str)] = &[("mlp.fc.weight", "in.w_up"), ("mlp.proj.weight", "in.w_down")];
const SQUARED_PARAMS: &[(&str, &str)] =
    &[("mlp.fc.weight", "param.fc.weight"), ("mlp.proj.weight", "param.proj.weight")];
const GATED_INPUTS: &[(&str, &str)] = &[
    ("mlp.w_gate.weight", "in.w_gate"),
    ("mlp.w_up.weight", "in.w_up"),
    ("mlp.w_down.weight", "in.w_down"),
];
const GATED_PARAMS: &[(&str, &str)] = &[
    ("mlp.w_gate.weight", "param.w_gate.weight"),
    ("mlp.w_up.weight", "param.w_up.weight"),
    ("mlp.w_down.weight", "param.w_down.weight"),
];

const TERNARY: Linears = Linears { form: WeightForm::BitLinear, ..Linears::PLAIN };

/// `relu(x w_up^T)^2 w_down^T`.
pub(super) fn relu_squared_mlp<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["form"])?;
    config.formula("form", "relu(x Wu^T)^2 Wd^T")?;
    mlp_of(case, MlpForm::Squared(0.0), Linears::PLAIN, SQUARED_INPUTS)
}

/// `leaky_relu(x w_up^T, slope)^2 w_down^T`.
pub(super) fn leaky_mlp<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["form", "slope"])?;
    config.formula("form", "leaky_relu(x Wu^T, slope)^2 Wd^T")?;
    mlp_of(case, MlpForm::Squared(config.needed("slope")?), Linears::PLAIN, SQUARED_INPUTS)
}

/// The same with PR #1607's slope of 0.5 and names.
pub(super) fn leaky_mlp_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    mlp_of(case, MlpForm::Squared(0.5), Linears::PLAIN, SQUARED_PARAMS)
}

/// `(silu(x w_gate^T) (x w_up^T)) w_down^T`.
pub(super) fn swiglu_mlp<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["form"])?;
    config.formula("form", "(silu(x Wg^T) * (x Wu^T)) Wd^T")?;
    mlp_of(case, MlpForm::SwiGlu, Linears::PLAIN, GATED_INPUTS)
}

/// The same with ternary weights.
pub(super) fn swiglu_ternary<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    mlp_of(case, MlpForm::SwiGlu, TERNARY, GATED_PARAMS)
}

/// A linear layer with ternary weights.
pub(super) fn bit_linear<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let shape = matrix_shape(case, "param.weight")?;
    let params = params(case, &[TERNARY.weight("w", shape)], |_| "param.weight".into())?;
    let weight = params.iter().next().cloned().expect("one parameter");
    run_layer(case, &params, |_| "grad.weight".into(), |x, _| Tape::<P>::project(x, &weight))
}

/// A linear layer with weights that training quantises, in PR #1607's form and PR #1382's (there not in evaluation).
fn fake_int6<P: Plain>(case: &mut Case<'_, P>, form: WeightForm) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let shape = matrix_shape(case, "in.w")?;
    let spec = Spec { form, ..Spec::new("w", &shape, Init::Linear) };
    let params = params(case, &[spec], |_| "in.w".into())?;
    let weight = params.iter().next().cloned().expect("one parameter");
    case.give("out.wq", &shape, Some(weight.compute::<2>()))?;
    if case.tensors.peek("out.y_eval").is_some() {
        weight.set_form(WeightForm::Full);
        let (x, mut shape) = case.matrix("in.x")?;
        let y = P::project(x, &weight);
        shape.pop();
        shape.push(y.dims()[1]);
        case.give("out.y_eval", &shape, Some(y))?;
        weight.set_form(form);
    }
    run_layer(case, &params, |_| "grad.w".into(), |x, _| Tape::<P>::project(x, &weight))
}

/// PR #1607's.
pub(super) fn fake_int6_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    fake_int6(case, WeightForm::fake_int_symmetric(6))
}

/// PR #1382's.
pub(super) fn fake_int6_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    fake_int6(case, weight_form::WeightForm::fake_int6_asymmetric())
}

/// An attention layer with its projections, by the options of a system.
fn attention<P: Plain>(
    case: &mut Case<'_, P>,
    plan: AttentionPlan,
    linears: Linears,
    rope: RopePlan,
    named: impl Fn(&str) -> String,
    grads: impl Fn(&str) -> String,
) -> Result<()> {
    multiple("width", plan.dim, plan.heads)?;
    multiple("heads", plan.heads, plan.groups)?;
    if rope.rotated < 2 || rope.rotated > plan.dim / plan.heads || !rope.rotated.is_multiple_of(2) {
        let what = format!("{} rotated channels", rope.rotated);
        return Err(Error::input(what, "config", "an even number within a head"));
    }
    let time = case.host("in.x")?.shape.iter().rev().nth(1).copied().unwrap_or(1);
    let params = params(case, &plan.specs(linears), named)?;
    let attention = Attention::new(&plan, &params);
    let base = rope.base_for(time);
    let table = RopeTable::<P>::new(0, time, rope.rotated, base, case.device, case.dtype);
    run_layer(case, &params, grads, |x, batch| {
        let inputs = AttentionInputs { batch, rope: &table, value_embedding: None, first_values: None };
        attention.forward(x, inputs, None).0
    })
}

fn attention_plan(dim: usize, heads: usize, groups: usize) -> AttentionPlan {
    AttentionPlan {
        prefix: "attn".into(),
        dim,
        heads,
        groups,
        gain: 1.0,
        rms_eps: EPS,
        silu_values: false,
        exclude_self: false,
        gated: false,
        value_residual: false,
    }
}

/// PR #1994's: ternary weights.
pub(super) fn attention_1994<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "heads", "kv", "rope_base"])?;
    let plan = attention_plan(size(config, "d")?, size(config, "heads")?, size(config, "kv")?);
    let rope =
        RopePlan { rotated: plan.dim / plan.heads, base: config.needed("rope_base")?, grows_from: None };
    attention(case, plan, TERNARY, rope, without("attn", "param"), without("attn", "grad"))
}

/// PR #1607's: SiLU on the values.
pub(super) fn attention_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "heads", "kv", "rope_base", "rope_fraction"])?;
    let plan = attention_plan(size(config, "d")?, size(config, "heads")?, size(config, "kv")?);
    let plan = AttentionPlan { silu_values: true, ..plan };
    let fraction = config.number("rope_fraction")?.unwrap_or(1.0);
    let head_dim = (plan.dim / plan.heads) as f64;
    let rotated = ((head_dim * fraction) as usize / 2 * 2).max(2);
    let rope = RopePlan { rotated, base: config.needed("rope_base")?, grows_from: None };
    attention(case, plan, Linears::PLAIN, rope, without("attn", "param"), without("attn", "grad"))
}

/// PR #1382's: partial rotation with a base that grows, and its exclusive form; weights by the banks' parts.
pub(super) fn attention_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["head_dim", "heads", "kv", "rope_base", "rope_dims", "train_seq_len", "xsa"])?;
    let (heads, head_dim) = (size(config, "heads")?, size(config, "head_dim")?);
    let exclude_self = config.count("xsa")?.unwrap_or(0) != 0;
    let plan = AttentionPlan { exclude_self, ..attention_plan(heads * head_dim, heads, size(config, "kv")?) };
    let rotated = config.count("rope_dims")?.filter(|dims| *dims > 0).unwrap_or(head_dim);
    let grows_from = Some(config.count("train_seq_len")?.unwrap_or(1024));
    let rope = RopePlan { rotated, base: config.needed("rope_base")?, grows_from };
    let part = |name: &str| match name {
        "attn.c_q.weight" => "q_w",
        "attn.c_k.weight" => "k_w",
        "attn.c_v.weight" => "v_w",
        "attn.proj.weight" => "out_w",
        _ => "q_gain",
    };
    let (named, grads) = (|name: &str| format!("in.{}", part(name)), |name: &str| format!("grad.{}", part(name)));
    attention(case, plan, Linears::PLAIN, rope, named, grads)
}

/// PR #1382's rotation of `in.x[b, t, h, d]`, and its table.
pub(super) fn rope_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["L", "base", "head_dim", "rope_dims", "train_seq_len"])?;
    let x = case.float::<4>("in.x")?;
    let [_, time, _, head_dim] = x.dims();
    let rotated = config.count("rope_dims")?.filter(|dims| *dims > 0).unwrap_or(head_dim);
    if rotated > head_dim || !rotated.is_multiple_of(2) {
        let what = format!("{rotated} rotated channels");
        return Err(Error::input(what, "config", "an even number within a head"));
    }
    let grows_from = Some(config.count("train_seq_len")?.unwrap_or(1024));
    let plan = RopePlan { rotated, base: config.needed("base")?, grows_from };
    let table = RopeTable::<P>::new(0, time, rotated, plan.base_for(time), case.device, case.dtype);
    case.give("out.cos", &[time, rotated / 2], Some(table.cos.clone()))?;
    case.give("out.sin", &[time, rotated / 2], Some(table.sin.clone()))?;
    let shape = x.dims();
    case.expect_shape("cot.y", &shape)?;
    let cot = case.float::<4>("cot.y")?;
    let x = tracked(x);
    let y = Tape::<P>::rope(x.clone(), &table);
    case.give("out.y", &shape, Some(y.clone().inner()))?;
    let grads = (y * Tensor::from_inner(cot)).backward();
    case.give("grad.x", &shape, x.grad(&grads))
}

/// What lies along the position's own value removed: `in.y[b, t, h, d]`, `in.v[b, t, g, d]`.
pub(super) fn exclude_self<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let (y, v) = (case.float::<4>("in.y")?, case.float::<4>("in.v")?);
    let ([batch, time, heads, head_dim], [.., groups, _]) = (y.dims(), v.dims());
    case.expect_shape("in.v", &[batch, time, groups, head_dim])?;
    multiple("heads", heads, groups)?;
    case.expect_shape("cot.y", &y.dims())?;
    let cot = case.float::<4>("cot.y")?;
    let [y, v] = [y, v].map(tracked);
    let out = Tape::<P>::exclude_self(y.clone(), v.clone());
    case.give("out.y", &out.dims(), Some(out.clone().inner()))?;
    let grads = (out * Tensor::from_inner(cot)).backward();
    case.give("grad.y", &y.dims(), y.grad(&grads))?;
    case.give("grad.v", &v.dims(), v.grad(&grads))
}

fn smear_of<P: Plain>(case: &mut Case<'_, P>, own: bool) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let dim = width(case)?;
    let params = params(case, &[Spec::new("gate", &[dim], Init::Constant(0.0))], |_| "param.gate".into())?;
    let gate = params.iter().next().cloned().expect("one parameter");
    run_layer(case, &params, |_| "grad.gate".into(), |x, batch| smear(x, &gate, batch, own, None))
}

/// PR #1607's smear gate: on the row itself.
pub(super) fn smear_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    smear_of(case, true)
}

/// PR #1382's: on the row before.
pub(super) fn smear_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    smear_of(case, false)
}

/// A hashed table on `in.ids[b, t]`; `in.x` is not used and its gradient is 0.
fn hashed<P: Plain>(case: &mut Case<'_, P>, hash: Hash, triples: bool) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["buckets", "d", "dim", "vocab"])?;
    let (buckets, dim) = (size(config, "buckets")?, size(config, "d")?);
    let (width, vocab) = (size(config, "dim")?, size(config, "vocab")?);
    let table = if hash == Hash::Product { "table" } else { "embed" };
    let plan = HashPlan { prefix: "hash", table, hash, triples, buckets, width, scaled: hash == Hash::Xor };
    let plan = EmbedPlan { vocab, dim, std: 0.0, hash: Some(plan), smear: None, values: None, rms_eps: EPS };
    let specs = plan.hash_specs(Linears::PLAIN, Init::Linear, Init::Linear);
    let params = params(case, &specs, without("hash", "param"))?;
    let (ids, shape) = case.ids("in.ids", vocab)?;
    let &[batch, time] = shape.as_slice() else {
        return Err(Error::input("in.ids is no matrix", "the file", "[batch, time]"));
    };
    let ids = integers::<Tape<P>, 2>(ids, [batch, time], case.device);
    let y = Embed::hashed(&plan, &params, ids);
    let out = [batch, time, dim];
    case.expect_shape("cot.y", &out)?;
    let (cot, _) = case.matrix("cot.y")?;
    case.give("out.y", &out, Some(y.clone().inner()))?;
    (y * Tensor::from_inner(cot)).backward();
    if case.tensors.input("in.x").is_some() {
        let (x, shape) = case.flat("in.x")?;
        case.give("grad.x", &shape, Some(x.zeros_like()))?;
    }
    give_grads(case, &params, without("hash", "grad"))
}

/// PR #1607's table.
pub(super) fn hashed_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    hashed(case, Hash::Product, false)
}

/// PR #1382's table.
pub(super) fn hashed_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    hashed(case, Hash::Xor, false)
}

/// PR #1382's table with triples.
pub(super) fn hashed_1382_triples<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    hashed(case, Hash::Xor, true)
}

/// The rows of hashed tables: `in.ids.NAME_bROWS[b, t]` to `out.HASH.NAME_bROWS`.
pub(super) fn hash_ids<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let names: Vec<String> =
        case.tensors.iter().filter_map(|(name, _)| name.strip_prefix("in.ids.")).map(String::from).collect();
    for name in names {
        let buckets: Option<usize> = name.rsplit_once("_b").and_then(|(_, rows)| rows.parse().ok());
        let Some(buckets) = buckets.filter(|rows| (1..=crate::recipe::MOST_BUCKETS).contains(rows)) else {
            return Err(Error::input(format!("in.ids.{name}"), "the file", "a name that ends in _bROWS"));
        };
        let (ids, shape) = case.ids(&format!("in.ids.{name}"), 65_536)?;
        let &[batch, time] = shape.as_slice() else {
            return Err(Error::input(format!("in.ids.{name}"), "the file", "[batch, time]"));
        };
        let ids = integers::<P, 2>(ids, [batch, time], case.device);
        for (system, hash, triple) in [
            ("pr1607", Hash::Product, false),
            ("pr1382_bigram", Hash::Xor, false),
            ("pr1382_trigram", Hash::Xor, true),
        ] {
            let rows: Tensor<P, 2, Int> = hash.buckets(ids.clone(), None, 0, buckets, triple);
            let rows = rows.into_data().iter::<i64>().map(|row| row as f64).collect::<Vec<_>>();
            case.give_host(HostTensor::from_f64(&format!("out.{system}.{name}"), &shape, &rows));
        }
    }
    Ok(())
}

/// A causal depthwise convolution of `in.x[b, t, c]` by `in.w[c, k]` and `in.b[c]`.
fn conv<P: Plain>(case: &mut Case<'_, P>, silu: bool) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["layout"])?;
    config.formula("layout", "x[B,T,C] w[C,K]; w[:,K-1] is lag 0")?;
    let channels = width(case)?;
    let [rows, taps] = matrix_shape(case, "in.w")?;
    if rows != channels || taps < 2 {
        return Err(Error::input(format!("in.w is [{rows}, {taps}]"), "the file", format!("[{channels}, 2 or more]")));
    }
    let specs = [Spec::new("w", &[rows, taps], Init::Linear), Spec::new("b", &[rows], Init::Linear)];
    let params = params(case, &specs, |name| format!("in.{name}"))?;
    let [w, b] = ["w", "b"].map(|name| params.get(name).cloned().expect("a parameter"));
    run_layer(case, &params, |name| format!("grad.{name}"), |x, batch| {
        let [rows, _] = x.dims();
        let history = Tensor::zeros([batch, taps - 1, channels], (&x.device(), x.dtype()));
        let x = x.reshape([batch, rows / batch, channels]);
        Tape::<P>::causal_conv(x, history, &w, Some(&b), silu).reshape([rows, channels])
    })
}

/// Without an activation.
pub(super) fn causal_conv<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    conv(case, false)
}

/// With SiLU.
pub(super) fn causal_conv_silu<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    conv(case, true)
}

/// `rms_norm(x silu(z)) w`, groups of channels apart.
pub(super) fn gated_norm<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["eps", "groups"])?;
    let (eps, groups) = (config.number("eps")?.unwrap_or(EPS), config.count("groups")?.unwrap_or(1));
    let (x, shape) = case.matrix("in.x")?;
    let [rows, columns] = x.dims();
    multiple("width", columns, groups)?;
    case.expect_shape("in.z", &shape)?;
    case.expect_shape("in.w", &[columns])?;
    case.expect_shape("cot.y", &shape)?;
    let ((z, _), (cot, _)) = (case.matrix("in.z")?, case.matrix("cot.y")?);
    let weight = Param::new("w", case.float::<1>("in.w")?, case.dtype);
    let [x, z] = [x, z].map(tracked);
    let gated = Tape::<P>::silu_gate(x.clone(), z.clone()).reshape([rows * groups, columns / groups]);
    let normed = Tape::<P>::rms_norm(gated, eps).reshape([rows, columns]);
    let y = normed * Tape::<P>::weight(&weight, [1, columns]);
    case.give("out.y", &shape, Some(y.clone().inner()))?;
    let grads = (y * Tensor::from_inner(cot)).backward();
    case.give("grad.x", &shape, x.grad(&grads))?;
    case.give("grad.z", &shape, z.grad(&grads))?;
    case.give("grad.w", &[columns], weight.take_flat_grad())
}

/// Positions that the scans take at once here: results do not depend on it.
const CHUNK: usize = 16;

/// The Mamba-2 scan: `in.x[b, t, h, p]`, `in.dt_raw[b, t, h]`, `in.B` and `in.C[b, t, g, n]`, `in.A_log`, `in.dt_bias`,
/// `in.D[h]`.
pub(super) fn ssd<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["dual_form_max_abs_diff", "form"])?;
    config.formula("form", "dt=softplus(dt_raw+dt_bias); A=-exp(A_log); h=exp(dt A)h+dt x B^T; y=C h + D x")?;
    let x = case.float::<4>("in.x")?;
    let [batch, time, heads, head_dim] = x.dims();
    let b = case.float::<4>("in.B")?;
    let [.., groups, size] = b.dims();
    case.expect_shape("in.B", &[batch, time, groups, size])?;
    case.expect_shape("in.C", &[batch, time, groups, size])?;
    multiple("heads", heads, groups)?;
    case.expect_shape("in.dt_raw", &[batch, time, heads])?;
    for name in ["in.A_log", "in.dt_bias", "in.D"] {
        case.expect_shape(name, &[heads])?;
    }
    let c = case.float::<4>("in.C")?;
    let [x, b, c] = [x, b, c].map(tracked);
    let raw = tracked(case.float::<3>("in.dt_raw")?);
    let row = |name: &str| Ok::<_, Error>(tracked(case.float::<1>(name)?));
    let (a_log, dt_bias, skip) = (row("in.A_log")?, row("in.dt_bias")?, row("in.D")?);
    let dt = Tape::<P>::softplus(raw.clone() + dt_bias.clone().reshape([1, 1, heads]));
    let a = a_log.clone().exp().neg();
    let state = [batch, heads, head_dim, size];
    let scan = Scan {
        q: c.clone(),
        k: b.clone(),
        v: x.clone(),
        log_decay: dt.clone() * a.clone().reshape([1, 1, heads]),
        weight: dt.clone(),
        diagonal: dt.clone(),
        state: Tensor::zeros(state, (case.device, case.dtype)),
    };
    let (y, last) = scan.run(CHUNK, true);
    let y = y + x.clone() * skip.clone().reshape([1, 1, heads, 1]);
    let last = last.ok_or_else(|| Error::input("no final state", "the scan", "one"))?;
    case.give("out.A", &[heads], Some(a.inner()))?;
    case.give("out.dt", &[batch, time, heads], Some(dt.inner()))?;
    case.give("out.y", &x.dims(), Some(y.clone().inner()))?;
    case.give("out.h_final", &state, Some(last.clone().inner()))?;
    case.expect_shape("cot.y", &x.dims())?;
    let mut loss = total(y, case.float::<4>("cot.y")?);
    if case.tensors.peek("cot.h_final").is_some() {
        case.expect_shape("cot.h_final", &state)?;
        loss = loss + total(last, case.float::<4>("cot.h_final")?);
    }
    let grads = loss.backward();
    for (name, x) in [("grad.x", x), ("grad.B", b), ("grad.C", c)] {
        case.give(name, &x.dims(), x.grad(&grads))?;
    }
    case.give("grad.dt_raw", &raw.dims(), raw.grad(&grads))?;
    for (name, x) in [("grad.A_log", a_log), ("grad.dt_bias", dt_bias), ("grad.D", skip)] {
        case.give(name, &[heads], x.grad(&grads))?;
    }
    Ok(())
}

/// `sum(y cot)`.
fn total<P: Plain, const D: usize>(y: Tensor<Tape<P>, D>, cot: Tensor<P, D>) -> Tensor<Tape<P>, 1> {
    let elements: usize = y.dims().iter().product();
    reduce::sum((y * Tensor::from_inner(cot)).reshape([elements]))
}

/// The kill variant's scan: `in.u[b, t, h, p]` after convolution and SiLU, before skip and gate.
pub(super) fn kill_core<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let u = case.float::<4>("in.u")?;
    let [batch, _, heads, head_dim] = u.dims();
    let size = case.host("in.B_const")?.numel();
    for (name, len) in
        [("in.A_log", heads), ("in.dt_bias", heads), ("in.B_const", size), ("in.C_const", size)]
    {
        case.expect_shape(name, &[len])?;
    }
    case.expect_shape("cot.y", &u.dims())?;
    let row = |name: &str| Ok::<_, Error>(tracked(case.float::<1>(name)?));
    let (a_log, dt_bias) = (row("in.A_log")?, row("in.dt_bias")?);
    let (b, c) = (row("in.B_const")?, row("in.C_const")?);
    let u = tracked(u);
    let step = Tape::<P>::softplus(dt_bias.clone());
    let log_decay = a_log.clone().exp().neg() * step.clone();
    let state = Tensor::zeros([batch, heads, head_dim], (case.device, case.dtype));
    let (s, _) = OnePole { u: u.clone(), log_decay, state }.run(CHUNK, false);
    let gain = step * (b.clone() * c.clone()).sum_dim(0);
    let y = s * gain.reshape([1, 1, heads, 1]);
    case.give("out.y", &u.dims(), Some(y.clone().inner()))?;
    let grads = total(y, case.float::<4>("cot.y")?).backward();
    case.give("grad.u", &u.dims(), u.grad(&grads))?;
    let rows =
        [("grad.A_log", a_log), ("grad.dt_bias", dt_bias), ("grad.B_const", b), ("grad.C_const", c)];
    for (name, x) in rows {
        case.give(name, &x.dims(), x.grad(&grads))?;
    }
    Ok(())
}

/// The Mamba-1 scan with its step, skip and gate: `in.u`, `in.delta`, `in.z[b, d, t]`; `in.A[d, n]`; `in.B`,
/// `in.C[b, n, t]`; `in.D`, `in.delta_bias[d]`.
pub(super) fn mamba1_scan<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let u = case.float::<3>("in.u")?;
    let [batch, channels, time] = u.dims();
    let [rows, size] = matrix_shape(case, "in.A")?;
    if rows != channels {
        return Err(Error::input(format!("in.A has {rows} rows"), "the file", format!("{channels}")));
    }
    for (name, shape) in [
        ("in.delta", vec![batch, channels, time]),
        ("in.z", vec![batch, channels, time]),
        ("cot.y", vec![batch, channels, time]),
        ("in.B", vec![batch, size, time]),
        ("in.C", vec![batch, size, time]),
        ("in.D", vec![channels]),
        ("in.delta_bias", vec![channels]),
    ] {
        case.expect_shape(name, &shape)?;
    }
    // Time before channels, as the op has them.
    let turned = |name: &str| Ok::<_, Error>(tracked(case.float::<3>(name)?.swap_dims(1, 2)));
    let (u, raw, z) = (turned("in.u")?, turned("in.delta")?, turned("in.z")?);
    let (b, c) = (turned("in.B")?, turned("in.C")?);
    let row = |name: &str| Ok::<_, Error>(tracked(case.float::<1>(name)?));
    let (skip, bias) = (row("in.D")?, row("in.delta_bias")?);
    let a = tracked(case.float::<2>("in.A")?);
    let delta = Tape::<P>::softplus(raw.clone() + bias.clone().reshape([1, 1, channels]));
    let state = Tensor::zeros([batch, channels, size], (case.device, case.dtype));
    let scan = SelectiveScan { u: u.clone(), delta, a: a.clone(), b: b.clone(), c: c.clone(), state };
    let (y, last) = scan.run(true);
    let y = Tape::<P>::silu_gate(y + u.clone() * skip.clone().reshape([1, 1, channels]), z.clone());
    let back = |x: Tensor<P, 3>| x.swap_dims(1, 2);
    case.give("out.y", &[batch, channels, time], Some(back(y.clone().inner())))?;
    case.give("out.last_state", &[batch, channels, size], last.map(|last| last.inner()))?;
    let grads = total(y, case.float::<3>("cot.y")?.swap_dims(1, 2)).backward();
    for (name, x) in [("grad.u", u), ("grad.delta", raw), ("grad.z", z), ("grad.B", b), ("grad.C", c)] {
        let [batch, time, rows] = x.dims();
        case.give(name, &[batch, rows, time], x.grad(&grads).map(back))?;
    }
    case.give("grad.A", &[channels, size], a.grad(&grads))?;
    for (name, x) in [("grad.D", skip), ("grad.delta_bias", bias)] {
        case.give(name, &[channels], x.grad(&grads))?;
    }
    Ok(())
}

/// PR #1382's Mamba block, its residual included.
pub(super) fn mamba1_block<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "d_conv", "d_state", "expand"])?;
    let dim = size(config, "d")?;
    let plan = Mamba1Plan {
        prefix: "m".into(),
        dim,
        inner: (config.needed("expand")? * dim as f64) as usize,
        state: size(config, "d_state")?,
        taps: config.count("d_conv")?.unwrap_or(4).max(2),
        dt_rank: (dim / 16).max(1),
    };
    let params = params(case, &plan.specs(false), without("m", "param"))?;
    let mamba = Mamba1::new(&plan, &params);
    run_layer(case, &params, without("m", "grad"), |x, batch| {
        x.clone() + mamba.forward(Tape::<P>::rms_norm(x, EPS), batch, None)
    })
}

/// PR #1994's Mamba-2 layer in its forms.
pub(super) fn mamba2_layer<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "d_state", "headdim", "kill", "ternary"])?;
    let (dim, head_dim) = (size(config, "d")?, size(config, "headdim")?);
    multiple("inner width", 2 * dim, head_dim)?;
    let flag = |key: &str| Ok::<_, Error>(config.count(key)?.unwrap_or(0) != 0);
    let plan = Mamba2Plan {
        prefix: "m".into(),
        dim,
        inner: 2 * dim,
        head_dim,
        state: size(config, "d_state")?,
        taps: 4,
        chunk: CHUNK,
        skip_scan: false,
        form: if flag("kill")? { Mamba2Form::Kill } else { Mamba2Form::Selective },
    };
    let linears = if flag("ternary")? { TERNARY } else { Linears::PLAIN };
    run_mamba2(case, plan, linears)
}

/// The official Mamba-2 layer, as transformers has it.
pub(super) fn mamba2_official<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["cfg", "eps", "norm", "transformers"])?;
    config.formula("norm", "MambaRMSNormGated")?;
    let sizes = config.inner("cfg")?;
    sizes.only(&["chunk", "conv", "expand", "groups", "head_dim", "heads", "hidden", "state"])?;
    let (heads, head_dim, groups) = (size(sizes, "heads")?, size(sizes, "head_dim")?, size(sizes, "groups")?);
    multiple("heads", heads, groups)?;
    let plan = Mamba2Plan {
        prefix: "m".into(),
        dim: size(sizes, "hidden")?,
        inner: heads * head_dim,
        head_dim,
        state: size(sizes, "state")?,
        taps: size(sizes, "conv")?.max(2),
        chunk: size(sizes, "chunk")?,
        skip_scan: false,
        // Transformers norms over all channels, whatever the groups.
        form: Mamba2Form::Official { groups, norm_groups: 1 },
    };
    let params = params(case, &plan.specs(Linears::PLAIN), without("m", "param"))?;
    let mamba = Mamba2::new(&plan, &params);
    run_layer(case, &params, without("m", "grad.param"), |x, batch| mamba.forward(x, batch, None))
}

fn run_mamba2<P: Plain>(case: &mut Case<'_, P>, plan: Mamba2Plan, linears: Linears) -> Result<()> {
    let params = params(case, &plan.specs(linears), without("m", "param"))?;
    let mamba = Mamba2::new(&plan, &params);
    run_layer(case, &params, without("m", "grad"), |x, batch| mamba.forward(x, batch, None))
}

/// PR #1607's Mamba-3 layer.
pub(super) fn mamba3_layer<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "d_state", "expand", "headdim", "ngroups"])?;
    let (dim, head_dim) = (size(config, "d")?, size(config, "headdim")?);
    let inner = config.count("expand")?.unwrap_or(2) * dim;
    multiple("inner width", inner, head_dim)?;
    let groups = config.count("ngroups")?.unwrap_or(1);
    multiple("heads", inner / head_dim, groups)?;
    let plan = Mamba3Plan {
        prefix: "mamba3".into(),
        dim,
        inner,
        head_dim,
        state: size(config, "d_state")?.max(4),
        groups,
        chunk: CHUNK,
    };
    let named = |name: &str| format!("param.{name}");
    let params = params(case, &plan.specs(Linears::PLAIN), named)?;
    let mamba = Mamba3::new(&plan, &params);
    run_layer(case, &params, |name| format!("grad.{name}"), |x, batch| mamba.forward(x, batch, None))
}

/// What lies between the projections of a Mamba-3 layer, its pieces among the inputs.
pub(super) fn mamba3_core<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let x = case.float::<4>("in.x")?;
    let [batch, time, heads, head_dim] = x.dims();
    let size = case.host("in.B_norm")?.numel();
    let plan = Mamba3Plan {
        prefix: "m".into(),
        dim: 1,
        inner: heads * head_dim,
        head_dim,
        state: size,
        groups: 1,
        chunk: CHUNK,
    };
    let angles = size / 2 / 2;
    for (name, shape) in [
        ("in.z", vec![batch, time, heads, head_dim]),
        ("cot.y", vec![batch, time, heads, head_dim]),
        ("in.B", vec![batch, time, size]),
        ("in.C", vec![batch, time, size]),
        ("in.dd_dt", vec![batch, time, heads]),
        ("in.dd_A", vec![batch, time, heads]),
        ("in.trap", vec![batch, time, heads]),
        ("in.angle", vec![batch, time, angles]),
    ] {
        case.expect_shape(name, &shape)?;
    }
    let file = |name: &str| name.trim_start_matches("m.").trim_end_matches(".weight").to_string();
    let is_core = |spec: &Spec| !spec.name.contains("_proj");
    let specs: Vec<Spec> = plan.specs(Linears::PLAIN).into_iter().filter(is_core).collect();
    let params = params(case, &specs, |name| format!("in.{}", file(name)))?;
    let place = (case.device, case.dtype);
    // The core has no projections: empty ones stand in their place.
    let mut all: Vec<Param<P>> = params.iter().cloned().collect();
    for name in ["m.in_proj.weight", "m.out_proj.weight"] {
        all.push(Param::new(name, Tensor::<P, 2>::zeros([1, 1], place), case.dtype));
    }
    let mamba = Mamba3::new(&plan, &Params::of(all, Vec::new()));
    let heads_of = |name: &str| Ok::<_, Error>(tracked(case.float::<4>(name)?));
    let rows = |name: &str| Ok::<_, Error>(tracked(case.float::<3>(name)?));
    let (z, x) = (heads_of("in.z")?, heads_of("in.x")?);
    let (b, c) = (rows("in.B")?, rows("in.C")?);
    let (dt, a, trap, angle) = (rows("in.dd_dt")?, rows("in.dd_A")?, rows("in.trap")?, rows("in.angle")?);
    let pieces = Mamba3Pieces {
        z: z.clone(),
        x: x.clone(),
        b: b.clone().reshape([batch, time, 1, size]),
        c: c.clone().reshape([batch, time, 1, size]),
        dt: dt.clone(),
        a: a.clone(),
        trap: trap.clone(),
        angle: angle.clone(),
    };
    let y = mamba.core(pieces, None);
    case.give("out.y", &y.dims(), Some(y.clone().inner()))?;
    let grads = total(y, case.float::<4>("cot.y")?).backward();
    for (name, x) in [("grad.z", z), ("grad.x", x)] {
        case.give(name, &x.dims(), x.grad(&grads))?;
    }
    let rows = [
        ("grad.B", b),
        ("grad.C", c),
        ("grad.dd_dt", dt),
        ("grad.dd_A", a),
        ("grad.trap", trap),
        ("grad.angle", angle),
    ];
    for (name, x) in rows {
        case.give(name, &x.dims(), x.grad(&grads))?;
    }
    give_grads(case, &params, |name| format!("grad.{}", file(name)))
}

/// PR #1994's S4D-Lin layer.
pub(super) fn s4d_layer<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "d_state"])?;
    let plan = S4dPlan { prefix: "s".into(), dim: size(config, "d")?, state: size(config, "d_state")? };
    let params = params(case, &plan.specs(), without("s", "param"))?;
    let s4d = S4d::new(&plan, &params);
    run_layer(case, &params, without("s", "grad"), |x, batch| s4d.forward(x, batch, None))
}
