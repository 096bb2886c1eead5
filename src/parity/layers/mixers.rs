//! State space layers, whole and in parts.

use super::{
    TERNARY, Tape, give_grads, matrix_shape, multiple, params, run_layer, size, total, tracked, width,
    without,
};
use crate::error::{Error, Result};
use crate::model::init::Init;
use crate::model::mamba1::{Mamba1, Mamba1Plan};
use crate::model::mamba2::{Mamba2, Mamba2Form, Mamba2Plan};
use crate::model::mamba3::{Mamba3, Mamba3Pieces, Mamba3Plan};
use crate::model::params::Params;
use crate::model::s4d::{S4d, S4dPlan};
use crate::model::spec::{Linears, Spec};
use crate::ops::one_pole::OnePole;
use crate::ops::rms_norm::EPS;
use crate::ops::scan::Scan;
use crate::ops::selective_scan::SelectiveScan;
use crate::ops::{ActivationOps, ConvOps, Param, ParamOps, Plain, RmsNormOps};
use crate::parity::case::Case;
use burn::tensor::Tensor;

/// A causal depthwise convolution of `in.x[b, t, c]` by `in.w[c, k]` and `in.b[c]`.
fn conv<P: Plain>(case: &mut Case<'_, P>, silu: bool) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["layout"])?;
    config.formula("layout", "x[B,T,C] w[C,K]; w[:,K-1] is lag 0")?;
    let channels = width(case)?;
    let [rows, taps] = matrix_shape(case, "in.w")?;
    if rows != channels || taps < 2 {
        return Err(Error::input(
            format!("in.w is [{rows}, {taps}]"),
            "the file",
            format!("[{channels}, 2 or more]"),
        ));
    }
    let specs = [Spec::new("w", &[rows, taps], Init::Linear), Spec::new("b", &[rows], Init::Linear)];
    let params = params(case, &specs, |name| format!("in.{name}"))?;
    let [w, b] = ["w", "b"].map(|name| params.get(name).cloned().expect("a parameter"));
    run_layer(
        case,
        &params,
        |name| format!("grad.{name}"),
        |x, batch| {
            let [rows, _] = x.dims();
            let history = Tensor::zeros([batch, taps - 1, channels], (&x.device(), x.dtype()));
            let x = x.reshape([batch, rows / batch, channels]);
            Tape::<P>::causal_conv(x, history, &w, Some(&b), silu).reshape([rows, channels])
        },
    )
}

/// Without an activation.
pub(in crate::parity) fn causal_conv<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    conv(case, false)
}

/// With SiLU.
pub(in crate::parity) fn causal_conv_silu<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    conv(case, true)
}

/// `rms_norm(x silu(z)) w`, groups of channels apart.
pub(in crate::parity) fn gated_norm<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn ssd<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["dual_form_max_abs_diff", "form"])?;
    config
        .formula("form", "dt=softplus(dt_raw+dt_bias); A=-exp(A_log); h=exp(dt A)h+dt x B^T; y=C h + D x")?;
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

/// The kill variant's scan: `in.u[b, t, h, p]` after convolution and SiLU, before skip and gate.
pub(in crate::parity) fn kill_core<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
    let rows = [("grad.A_log", a_log), ("grad.dt_bias", dt_bias), ("grad.B_const", b), ("grad.C_const", c)];
    for (name, x) in rows {
        case.give(name, &x.dims(), x.grad(&grads))?;
    }
    Ok(())
}

/// The Mamba-1 scan with its step, skip and gate: `in.u`, `in.delta`, `in.z[b, d, t]`; `in.A[d, n]`; `in.B`,
/// `in.C[b, n, t]`; `in.D`, `in.delta_bias[d]`.
pub(in crate::parity) fn mamba1_scan<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn mamba1_block<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn mamba2_layer<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn mamba2_official<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn mamba3_layer<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn mamba3_core<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
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
pub(in crate::parity) fn s4d_layer<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["d", "d_state"])?;
    let plan = S4dPlan { prefix: "s".into(), dim: size(config, "d")?, state: size(config, "d_state")? };
    let params = params(case, &plan.specs(), without("s", "param"))?;
    let s4d = S4d::new(&plan, &params);
    run_layer(case, &params, without("s", "grad"), |x, batch| s4d.forward(x, batch, None))
}
