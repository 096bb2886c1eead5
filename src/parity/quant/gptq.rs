//! `quant.gptq` and `quant.gptq_int6`: GPTQ with given Hessians.

use super::super::case::Case;
use super::super::compare::Tolerance;
use super::{codes, finite, half_scales, matrix, narrow};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::ops::Plain;
use crate::quant::clip::{BITS, Rule, max_code};
use crate::quant::gptq::{self, Choice, Factor, solve};
use crate::quant::hessian::DAMP;

/// `in.W[o, i]` with given scales `in.scale[o]`, columns in their own order, codes of two's complement; losses are
/// |(W - restored) X^T|^2.
pub(in crate::parity) fn gptq<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let config = case.entry.section("config")?;
    config.only(&["bits", "damp", "loss_gptq", "loss_rtn", "scale", "sym"])?;
    config.formula("scale", "absmax/(2^(b-1)-1) per row")?;
    if !config.flag("sym", true)? {
        return Err(Error::input("sym = false", "config", "true: the steps have no offset"));
    }
    let bits = bits(config.count("bits")?)?;
    let damp = config.number("damp")?.unwrap_or(DAMP);
    if case.entry.top().number("tol_codes")?.is_some() {
        case.tolerate("out.Q", Tolerance::Relative(case.entry.bound("tol_codes")?));
    }
    let (weights, [rows, columns]) = matrix(case, "in.W")?;
    case.expect_shape("in.H", &[columns, columns])?;
    case.expect_shape("in.scale", &[rows])?;
    let inputs = match case.tensors.peek("in.X").is_some() {
        true => Some(matrix(case, "in.X")?),
        false => None,
    };
    if let Some((_, [_, channels])) = &inputs
        && *channels != columns
    {
        return Err(Error::input(format!("in.X of {channels} columns"), "the file", columns));
    }
    let hessian = finite(case.host("in.H")?)?;
    let scales = finite(case.host("in.scale")?)?;
    let factor = Factor::new(&hessian, columns, damp, false).ok_or_else(not_positive)?;
    let (least, most) = (-max_code(bits) - 1, max_code(bits));
    let steps: Vec<Vec<f64>> = scales.iter().map(|scale| vec![*scale]).collect();
    let solved = solve(&weights, &factor, &steps, (least, most), Choice::Matrix);
    let nearest = |(at, weight): (usize, &f64)| {
        (weight / scales[at / columns]).round_ties_even().clamp(least.into(), most.into()) as i8
    };
    let rounded: Vec<i8> = weights.iter().enumerate().map(nearest).collect();
    let restored = |codes: &[i8]| -> Vec<f64> {
        codes.iter().enumerate().map(|(at, &code)| f64::from(code) * scales[at / columns]).collect()
    };
    let shape = [rows, columns];
    case.give_host(HostTensor::from_f64("out.W_hat", &shape, &restored(&solved.codes)));
    for (key, codes) in [("loss_gptq", &solved.codes), ("loss_rtn", &rounded)] {
        let Some(theirs) = config.number(key)? else { continue };
        let Some((inputs, _)) = &inputs else {
            return Err(Error::input("no tensor in.X", "the file", "the inputs that losses are of"));
        };
        let loss = output_loss(&weights, &restored(codes), inputs, columns);
        let error = (loss - theirs).abs() / theirs.abs().max(f64::MIN_POSITIVE);
        let bound = case.entry.bound("tol")?;
        case.fact(key.into(), error, bound, Some(format!("{loss:e}, expected {theirs:e}")));
    }
    case.give_host(codes("out.Q".into(), &shape, &solved.codes));
    case.give_host(codes("out.Q_rtn".into(), &shape, &rounded));
    Ok(())
}

/// The sum of ((w - r) x)^2 over the rows x of the inputs and the rows of the weights.
fn output_loss(weights: &[f64], restored: &[f64], inputs: &[f64], columns: usize) -> f64 {
    let difference: Vec<f64> = weights.iter().zip(restored).map(|(w, r)| w - r).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let rows = difference.chunks(columns);
    rows.flat_map(|row| inputs.chunks(columns).map(move |x| dot(row, x).powi(2))).sum()
}

/// Both PRs' GPTQ and clip search on `in.w[o, i]` with `in.hessian[i, i]`.
///
/// The peer computed in float32: where an entry says how many of its codes differ from those of float64, and allows 0.2 % more,
/// as many of `out.q` may differ here. `out.q_float64` must be equal.
pub(in crate::parity) fn gptq_int6<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    case.entry.section("config")?.only(&[])?;
    let (weights, [rows, columns]) = matrix(case, "in.w")?;
    case.expect_shape("in.hessian", &[columns, columns])?;
    let hessian = finite(case.host("in.hessian")?)?;
    let weights = narrow(&weights);
    let top = case.entry.top();
    if let Some(known) = top.count("codes_differing_between_peer_f32_and_f64")? {
        let more = if case.entry.says("plus 0.2 %") { (0.002 * weights.len() as f64).floor() } else { 0.0 };
        case.tolerate("out.q", Tolerance::Differing(known as f64 + more));
        case.tolerate("out.q_float64", Tolerance::Relative(0.0));
    }
    if let Some(theirs) = top.count("dead_columns")? {
        let dead = (0..columns).filter(|i| hessian[i * columns + i] == 0.0).count();
        case.fact(
            "dead_columns".into(),
            dead.abs_diff(theirs) as f64,
            0.0,
            Some(format!("{dead}, expected {theirs}")),
        );
    }
    let solved = gptq::rows(&weights, columns, &hessian, 6, Rule::Pr1382).ok_or_else(not_positive)?;
    let searched = Rule::Pr1382.rows(&weights, columns, 6);
    let shape = [rows, columns];
    for name in ["out.q", "out.q_float64"] {
        case.give_host(codes(name.into(), &shape, &solved.codes));
    }
    case.give_host(half_scales("out.scale".into(), &solved.scales));
    case.give_host(codes("out.percentile_q".into(), &shape, &searched.codes));
    case.give_host(half_scales("out.percentile_scale".into(), &searched.scales));
    Ok(())
}

fn bits(bits: Option<usize>) -> Result<u32> {
    let found = bits.and_then(|bits| u32::try_from(bits).ok()).filter(|bits| BITS.contains(bits));
    found.ok_or_else(|| Error::input(format!("bits = {bits:?}"), "config", "2 to 8"))
}

fn not_positive() -> Error {
    Error::input("a Hessian that is not positive definite", "the file", "one that Cholesky factors")
}
