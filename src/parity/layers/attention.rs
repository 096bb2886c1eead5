//! Attention with its projections, and what is in it.

use super::{TERNARY, Tape, multiple, params, run_layer, size, tracked, without};
use crate::error::{Error, Result};
use crate::model::attention::{Attention, AttentionInputs, AttentionPlan};
use crate::model::plan::RopePlan;
use crate::model::spec::Linears;
use crate::ops::rms_norm::EPS;
use crate::ops::rope::RopeTable;
use crate::ops::{Plain, RopeOps, XsaOps};
use crate::parity::case::Case;
use burn::tensor::Tensor;

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
pub(in crate::parity) fn attention_1994<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "heads", "kv", "rope_base"])?;
    let plan = attention_plan(size(config, "d")?, size(config, "heads")?, size(config, "kv")?);
    let rope =
        RopePlan { rotated: plan.dim / plan.heads, base: config.needed("rope_base")?, grows_from: None };
    attention(case, plan, TERNARY, rope, without("attn", "param"), without("attn", "grad"))
}

/// PR #1607's: SiLU on the values.
pub(in crate::parity) fn attention_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn attention_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
    let (named, grads) =
        (|name: &str| format!("in.{}", part(name)), |name: &str| format!("grad.{}", part(name)));
    attention(case, plan, Linears::PLAIN, rope, named, grads)
}

/// PR #1382's rotation of `in.x[b, t, h, d]`, and its table.
pub(in crate::parity) fn rope_1382<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn exclude_self<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
