use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::Plain;
use crate::ops::attention::{self, Attended, Mask};
use burn::tensor::DType;

/// Sizes of a timing: sequences, positions, heads, groups and a head's channels.
struct Sizes {
    batch: usize,
    time: usize,
    heads: usize,
    groups: usize,
    size: usize,
}

/// Over the tokens of the other timings in sequences of two lengths, as far as there are two of them; the reference at the
/// first only, as it takes long. Where activations are narrower than f32, in f32 too, over fewer tokens.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let dtype = bench.dtype;
    for (time, heads, groups, size) in [(1024, 8, 4, 64), (4096, 8, 4, 64), (4096, 4, 2, 128)] {
        let batch = bench.rows / time;
        if batch >= 2 {
            time_one(bench, Sizes { batch, time, heads, groups, size }, dtype)?;
        }
    }
    if dtype == DType::BF16 && bench.rows >= 8 * 1024 {
        let sizes = Sizes { batch: 8, time: 1024, heads: 8, groups: 4, size: 64 };
        time_one(bench, sizes, DType::F32)?;
    }
    Ok(())
}

fn time_one<P: Plain>(bench: &mut Bench<'_, P>, sizes: Sizes, dtype: DType) -> Result<()> {
    let mask = Mask::causal();
    let Sizes { batch, time, heads, groups, size } = sizes;
    let random = |heads: usize| bench.random([batch, time, heads, size]).cast(dtype);
    let (q, k, v, grad) = (random(heads), random(groups), random(groups), random(heads));
    let scale = 1.0 / (size as f64).sqrt();
    let of = if dtype == bench.dtype { "" } else { " in f32" };
    let what = |pass: &str| format!("attention{of} {pass} [{batch}, {time}, {heads}/{groups}, {size}]");
    // Two products of half of all pairs forward, five backward.
    let pairs = (batch * heads * time * time) as f64 / 2.0;
    let cost = |products: f64| Cost::operations(products * 2.0 * size as f64 * pairs);
    bench.time(what("forward"), cost(2.0), || {
        P::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale)
    })?;
    let (y, log_sums) = P::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale);
    let attended = Attended { q, k, v, y, log_sums };
    bench.time(what("backward"), cost(5.0), || {
        P::attention_backward(attended.clone(), grad.clone(), &mask, scale)
    })?;
    if time == 1024 {
        let Attended { q, k, v, .. } = attended.clone();
        bench.time(what("forward, reference"), cost(2.0), || {
            attention::forward(q.clone(), k.clone(), v.clone(), &mask, scale)
        })?;
        bench.time(what("backward, reference"), cost(5.0), || {
            attention::backward(attended.clone(), grad.clone(), &mask, scale)
        })?;
    }
    Ok(())
}
