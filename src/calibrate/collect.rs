//! The sums over the inputs of a model's linear layers while it reads sequences.

use super::{Phase, Progress, Sequences};
use crate::error::{Error, Result};
use crate::model::ids_tensor;
use crate::model::{EMBEDDING, Model};
use crate::ops::Plain;
use crate::quant::Hessians;
use crate::quant::hessian::Hessian;
use std::collections::HashMap;

/// Positions of one forward at most (at least one sequence): rows of 4,096 channels then fill the 128 MB that some adapters bind.
/// The sums of so many are read from the device, and added in float64.
const FORWARD_TOKENS: usize = 8192;

/// The Hessian of every linear layer that runs and of whose weight `wanted` says so, over all tokens of each sequence but
/// the last. A layer that runs several times in a pass adds each of its runs. The head is a layer too, also where it is the
/// token embedding: its inputs are the last hidden rows.
///
/// # Errors
/// Input: no sequence, sequences without an input, ids that the model does not have; and errors of `progress`.
pub fn collect<P: Plain>(
    model: &Model<P>,
    sequences: &Sequences,
    wanted: &dyn Fn(&str) -> bool,
    progress: Progress<'_>,
) -> Result<Hessians> {
    let (count, inputs) = (sequences.count(), sequences.length.saturating_sub(1));
    if count == 0 || inputs == 0 {
        let what = format!("{count} sequences of {} tokens", sequences.length);
        return Err(Error::input(what, "the calibration", "a sequence of at least two tokens"));
    }
    let vocab = model.vocab_size();
    if let Some(id) = sequences.tokens.iter().find(|id| usize::from(**id) >= vocab) {
        return Err(Error::input(format!("token id {id}"), "the calibration", format!("ids below {vocab}")));
    }
    model.watch_inputs(|name, _| wanted(name));
    let sums = sums(model, sequences, inputs, progress);
    model.watch_inputs(|_, _| false);
    let finish = |(name, sum): (String, Hessian)| {
        let mut hessian = sum.finish(count);
        if name == EMBEDDING && !model.plan().untied {
            as_table_too(&mut hessian);
        }
        (name, hessian)
    };
    Ok(sums?.into_iter().map(finish).collect())
}

fn sums<P: Plain>(
    model: &Model<P>,
    sequences: &Sequences,
    inputs: usize,
    progress: Progress<'_>,
) -> Result<HashMap<String, Hessian>> {
    let count = sequences.count();
    let all: Vec<&[u16]> = sequences.iter().map(|sequence| &sequence[..inputs]).collect();
    let mut sums: HashMap<String, Hessian> = HashMap::new();
    let mut done = 0;
    for batch in all.chunks((FORWARD_TOKENS / inputs).max(1)) {
        let hidden = model.hidden::<P>(ids_tensor::<P>(&batch.concat(), inputs, model.device()), None, None);
        model.observe_head(hidden);
        for gram in model.take_grams()? {
            let size = gram.shape[0];
            sums.entry(gram.name.clone()).or_insert_with(|| Hessian::new(size)).add_product(&gram.to_f64());
        }
        done += batch.len();
        progress(Phase::Collect, done, count)?;
    }
    Ok(sums)
}

/// A tied embedding is read row by row too, where an error counts alike in every direction: as much of that as there is of
/// the head on average.
fn as_table_too(hessian: &mut [f64]) {
    let n = hessian.len().isqrt();
    let mean = hessian.iter().step_by(n + 1).sum::<f64>() / n.max(1) as f64;
    hessian.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += mean);
}
