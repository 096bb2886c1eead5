//! `op.*`: one op with its upstream gradient. The peers' layout of heads is `[batch, heads, time, size]`.

use super::case::{Case, integers};
use crate::error::{Error, Result};
use crate::ops::cross_entropy::softcap;
use crate::ops::qk_norm::QkNorm;
use crate::ops::rms_norm::EPS;
use crate::ops::rope::RopeTable;
use crate::ops::{
    AttentionOps, Autodiff, CrossEntropyOps, Param, Plain, QkNormOps, RmsNormOps, RopeOps, reduce,
};
use burn::tensor::{DType, Tensor};

fn tracked<P: Plain, const D: usize>(x: Tensor<P, D>) -> Tensor<Autodiff<P>, D> {
    Tensor::from_inner(x).require_grad()
}

fn lifted<P: Plain, const D: usize>(x: Tensor<P, D>) -> Tensor<Autodiff<P>, D> {
    Tensor::from_inner(x)
}

/// `y = rms_norm(x) w` over the last dimension; without `in.w`, `w` is 1.
pub(super) fn rms_norm<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["eps"])?;
    let eps = config.number("eps")?.unwrap_or(EPS);
    let (x, shape) = case.matrix("in.x")?;
    case.expect_shape("cot.y", &shape)?;
    let (cot, _) = case.matrix("cot.y")?;
    let columns = x.dims()[1];
    let x = tracked(x);
    let mut y = Autodiff::<P>::rms_norm(x.clone(), eps);
    let mut weight = None;
    if case.tensors.peek("in.w").is_some() {
        case.expect_shape("in.w", &[columns])?;
        let w = tracked(case.float::<1>("in.w")?);
        y = y * w.clone().reshape([1, columns]);
        weight = Some(w);
    }
    case.give("out.y", &shape, Some(y.clone().inner()))?;
    let grads = (y * lifted(cot)).backward();
    case.give("grad.x", &shape, x.grad(&grads))?;
    case.give("grad.w", &[columns], weight.and_then(|w| w.grad(&grads)))
}

/// Heads `[batch, heads, time, size]` of the file as `[batch, time, heads, size]`.
fn heads<P: Plain>(case: &Case<'_, P>, name: &str) -> Result<Tensor<P, 4>> {
    Ok(case.float::<4>(name)?.swap_dims(1, 2))
}

/// Gives heads `[batch, time, heads, size]` as the file has them.
fn give_heads<P: Plain>(case: &mut Case<'_, P>, name: &str, x: Option<Tensor<P, 4>>) -> Result<()> {
    let x = x.map(|x| x.swap_dims(1, 2));
    let shape = x.as_ref().map(|x| x.dims()).unwrap_or_default();
    case.give(name, &shape, x)
}

/// Half-split rotary embedding of the first `rot` channels, positions from 0.
pub(super) fn rope<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["base", "rot", "sign"])?;
    config.formula("sign", "x1*c+x2*s, -x1*s+x2*c")?;
    let x = heads(case, "in.x")?;
    let [_, time, _, size] = x.dims();
    let rotated = config.count("rot")?.unwrap_or(size);
    let table = table(case, time, size, rotated, config.needed("base")?)?;
    let cot = like(case, "cot.y", "in.x")?;
    let x = tracked(x);
    let y = Autodiff::<P>::rope(x.clone(), &table);
    give_heads(case, "out.y", Some(y.clone().inner()))?;
    let grads = (y * lifted(cot)).backward();
    give_heads(case, "grad.x", x.grad(&grads))
}

fn table<P: Plain>(
    case: &Case<'_, P>,
    time: usize,
    size: usize,
    rotated: usize,
    base: f64,
) -> Result<RopeTable<P>> {
    if rotated == 0 || rotated > size || !rotated.is_multiple_of(2) {
        let expected = format!("an even number from 2 to the head's {size}");
        return Err(Error::input(format!("{rotated} rotated channels"), "config", expected));
    }
    if base <= 0.0 {
        return Err(Error::input(format!("base = {base}"), "config", "a number above 0"));
    }
    Ok(RopeTable::new(0, time, rotated, base, case.device, case.dtype))
}

/// Heads of the same shape as another tensor.
fn like<P: Plain>(case: &Case<'_, P>, name: &str, other: &str) -> Result<Tensor<P, 4>> {
    let shape = case.host(other)?.shape.clone();
    case.expect_shape(name, &shape)?;
    heads(case, name)
}

/// `in.q[b, h, t, d]`, `in.k` and `in.v` `[b, g, t, d]`, and the scale.
fn attention_inputs<P: Plain>(case: &Case<'_, P>) -> Result<([Tensor<P, 4>; 3], f64)> {
    let (q, k) = (heads(case, "in.q")?, heads(case, "in.k")?);
    let v = like(case, "in.v", "in.k")?;
    let ([batch, time, count, size], [.., groups, _]) = (q.dims(), k.dims());
    if k.dims() != [batch, time, groups, size] || !count.is_multiple_of(groups) {
        return Err(Error::input(
            format!("in.k has shape {:?}", case.host("in.k")?.shape),
            "the file",
            format!("[{batch}, a divisor of {count}, {time}, {size}]"),
        ));
    }
    let standard = 1.0 / (size as f64).sqrt();
    let scale = case.entry.section("config")?.number("scale")?.unwrap_or(standard);
    Ok(([q, k, v], scale))
}

/// Causal attention with grouped keys and values.
pub(super) fn causal_attention<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&["scale"])?;
    let (inputs, scale) = attention_inputs(case)?;
    let cot = like(case, "cot.y", "in.q")?;
    let [q, k, v] = inputs.map(tracked);
    let y = Autodiff::<P>::causal_attention(q.clone(), k.clone(), v.clone(), scale);
    give_heads(case, "out.y", Some(y.clone().inner()))?;
    let grads = (y * lifted(cot)).backward();
    for (name, x) in [("grad.q", q), ("grad.k", k), ("grad.v", v)] {
        give_heads(case, name, x.grad(&grads))?;
    }
    Ok(())
}

/// The challenge's attention between its projections: norm of q and k, rotation, gain of q, causal attention.
pub(super) fn normed_attention<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["base", "eps", "order", "scale"])?;
    config.formula("order", "rmsnorm(q,k) -> rope -> q*gain[h] -> causal softmax")?;
    let eps = config.number("eps")?.unwrap_or(EPS);
    let ([q, k, v], scale) = attention_inputs(case)?;
    let [_, time, count, size] = q.dims();
    let table = table(case, time, size, size, config.needed("base")?)?;
    case.expect_shape("in.gain", &[count])?;
    let gain = Param::new("gain", case.float::<1>("in.gain")?, case.dtype);
    let cot = like(case, "cot.y", "in.q")?;
    let [q, k, v] = [q, k, v].map(tracked);
    let [batch, _, groups, _] = k.dims();
    let rows = |x: &Tensor<Autodiff<P>, 4>, heads: usize| x.clone().reshape([batch * time, heads * size]);
    let how = QkNorm { batch, heads: count, groups, rope: table, gain: Some(gain.clone()), eps };
    let [normed_q, normed_k] = Autodiff::<P>::qk_norm(rows(&q, count), rows(&k, groups), &how);
    let y = Autodiff::<P>::causal_attention(normed_q, normed_k, v.clone(), scale);
    give_heads(case, "out.y", Some(y.clone().inner()))?;
    let grads = (y * lifted(cot)).backward();
    for (name, x) in [("grad.q", q), ("grad.k", k), ("grad.v", v)] {
        give_heads(case, name, x.grad(&grads))?;
    }
    case.give("grad.gain", &[count], gain.take_flat_grad())
}

/// Cross-entropy over softcapped logits `in.h[n, c] in.w[v, c]^T` for `in.target[n]`, averaged or summed.
pub(super) fn cross_entropy<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["cap", "reduction"])?;
    let cap = config.number("cap")?;
    if cap.is_some_and(|cap| cap <= 0.0) {
        return Err(Error::input("cap", "config", "a number above 0, or null"));
    }
    let (h, shape) = case.matrix("in.h")?;
    let w = case.float::<2>("in.w")?;
    let ([rows, columns], vocab) = (h.dims(), w.dims()[0]);
    case.expect_shape("in.w", &[vocab, columns])?;
    let share = match config.text("reduction")? {
        None | Some("mean") => 1.0 / rows as f64,
        Some("sum") => 1.0,
        Some(other) => {
            return Err(Error::input(format!("reduction = {other}"), "config", "mean or sum"));
        }
    };
    case.expect_shape("in.target", &shape[..shape.len() - 1])?;
    let (targets, _) = case.ids("in.target", vocab)?;
    if case.host("cot.loss")?.numel() != 1 {
        return Err(Error::input("cot.loss", "the file", "one element"));
    }
    let (cot, _) = case.flat("cot.loss")?;
    if case.expects("out.logits", &[&shape[..shape.len() - 1], &[vocab]].concat()) {
        let wide: DType = crate::ops::accumulate_type(case.dtype);
        let z = softcap(P::matmul_as(h.clone(), w.clone().transpose(), wide), cap);
        case.give("out.logits", &[&shape[..shape.len() - 1], &[vocab]].concat(), Some(z))?;
    }
    let w = Param::new("w", w, case.dtype);
    let h = tracked(h);
    let targets = integers::<Autodiff<P>, 1>(targets, [rows], case.device);
    let nll = Autodiff::<P>::cross_entropy(h.clone(), &w, targets, cap);
    case.give("out.nll", &shape[..shape.len() - 1], Some(nll.clone().inner()))?;
    let loss = reduce::sum(nll).mul_scalar(share);
    case.give("out.loss", &[1], Some(loss.clone().inner()))?;
    let grads = (loss * lifted(cot)).backward();
    case.give("grad.h", &shape, h.grad(&grads))?;
    case.give("grad.w", w.shape(), w.take_flat_grad())
}
