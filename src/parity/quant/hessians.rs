//! `eval.hessians_1607`: what calibration collects of a model's linear layers.

use super::super::case::{Case, integers};
use super::super::model::build;
use super::super::recipe::recipe;
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::ops::Plain;
use crate::quant::hessian::Hessian;

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
    let inputs: Vec<i64> = tokens.chunks(length).flat_map(|row| &row[..length - 1]).copied().collect();
    // A narrow weight of many inputs would have a sum far larger than itself: only what the file holds too.
    model.watch_inputs(|name, inputs| case.expects(&format!("out.hessian.{name}"), &[inputs, inputs]));
    model.hidden::<P>(integers(inputs, [count, length - 1], case.device), None, None);
    for gram in model.take_grams()? {
        let mut hessian = Hessian::new(gram.shape[0]);
        hessian.add_product(&gram.to_f64());
        let name = format!("out.hessian.{}", gram.name);
        case.give_host(HostTensor::from_f64(name, &gram.shape, &hessian.finish(count)));
    }
    Ok(())
}
