//! `eval.hessians_1607`: what calibration collects of a model's linear layers.

use super::super::case::Case;
use super::super::model::build;
use super::super::recipe::recipe;
use crate::calibrate::Sequences;
use crate::calibrate::collect::collect;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::ops::Plain;
use std::collections::BTreeMap;

/// The Hessian of every linear layer over `in.sequences[n, t]`, of which all but the last token are inputs, with the recurrence
/// on.
pub(in crate::parity) fn hessians_1607<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let &[count, length] = case.host("in.sequences")?.shape.as_slice() else {
        return Err(Error::input("in.sequences is no matrix", "the file", "[sequences, tokens]"));
    };
    if length < 2 {
        return Err(Error::input(format!("sequences of {length} tokens"), "the file", "at least 2 tokens"));
    }
    let mut recipe = recipe(case, [1, count, length - 1])?;
    recipe.recur_start_frac = 0.0;
    let (tokens, _) = case.ids("in.sequences", recipe.vocab_size)?;
    let model = build(case, &recipe, &case.tensors, "param.")?;
    model.set_recurrent(true);
    let tokens = tokens.into_iter().map(|id| id as u16).collect();
    // A narrow weight of many inputs would have a sum far larger than itself: only what the file holds too.
    let wanted = |name: &str| {
        let shape = model.params().get(name).map(|param| param.shape());
        let expects = |inputs| case.expects(&format!("out.hessian.{name}"), &[inputs, inputs]);
        matches!(shape, Some(&[_, inputs]) if expects(inputs))
    };
    let hessians = collect(&model, &Sequences { tokens, length }, &wanted, &mut |_, _, _| Ok(()))?;
    let in_order: BTreeMap<String, Vec<f64>> = hessians.into_iter().collect();
    for (name, hessian) in in_order {
        let size = hessian.len().isqrt();
        case.give_host(HostTensor::from_f64(format!("out.hessian.{name}"), &[size, size], &hessian));
    }
    Ok(())
}
