use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::Plain;
use crate::ops::attention::{self, Attended, Mask};

/// Over the tokens of the other timings in sequences of two lengths, as far as there are two of them; the reference at the
/// first only, as it takes long.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let mask = Mask::causal();
    for (time, heads, groups, size) in [(1024, 8, 4, 64), (4096, 8, 4, 64), (4096, 4, 2, 128)] {
        let batch = bench.rows / time;
        if batch < 2 {
            continue;
        }
        let (q, grad) = (bench.random([batch, time, heads, size]), bench.random([batch, time, heads, size]));
        let (k, v) = (bench.random([batch, time, groups, size]), bench.random([batch, time, groups, size]));
        let scale = 1.0 / (size as f64).sqrt();
        let what = |pass: &str| format!("attention {pass} [{batch}, {time}, {heads}/{groups}, {size}]");
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
    }
    Ok(())
}
