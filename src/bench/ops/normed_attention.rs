use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::attention::{Attended, Mask};
use crate::ops::normed_attention::apart;
use crate::ops::qk_norm::QkNorm;
use crate::ops::rms_norm::EPS;
use crate::ops::rope::RopeTable;
use crate::ops::{Param, Plain, accumulate_type};
use burn::tensor::Tensor;

/// The backward, and beside it attention's and the norm's one after the other; queries, keys and values are columns of one
/// matrix, as their projections leave them.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (dtype, device) = (bench.dtype, bench.device);
    for (time, heads, groups, size) in [(1024, 8, 4, 64), (4096, 8, 4, 64), (4096, 4, 2, 128)] {
        let batch = bench.rows / time;
        if batch < 2 {
            continue;
        }
        let (of_q, of_k) = (heads * size, groups * size);
        let joined: Tensor<P, 2> = bench.random([batch * time, of_q + 2 * of_k]);
        let [q, k, v] = [(0, of_q), (of_q, of_k), (of_q + of_k, of_k)]
            .map(|(start, width)| joined.clone().narrow(1, start, width));
        let gain = Tensor::<P, 1>::ones([heads], (device, accumulate_type(dtype)));
        let how = QkNorm {
            batch,
            heads,
            groups,
            rope: RopeTable::new(0, time, size, 1e4, device, accumulate_type(dtype)),
            gain: Some(Param::new("gain", gain, dtype)),
            eps: EPS,
        };
        let (mask, scale) = (Mask::causal(), 1.0 / (size as f64).sqrt());
        let before = [q.clone(), k.clone()];
        let [q, k] = P::qk_norm(q, k, &how);
        let v = v.reshape([batch, time, groups, size]);
        let (y, log_sums) = P::attention_forward(q.clone(), k.clone(), v.clone(), &mask, scale);
        let attended = Attended { q, k, v, y, log_sums };
        let grad = bench.random([batch, time, heads, size]);
        let what =
            |how: &str| format!("normed_attention backward{how} [{batch}, {time}, {heads}/{groups}, {size}]");
        let cost = Cost::operations(5.0 * (size * heads * batch * time * time) as f64);
        bench.time(what(""), cost, || {
            let (before, attended) = (before.clone(), attended.clone());
            P::normed_attention_backward(before, attended, grad.clone(), &how, &mask, scale)
        })?;
        bench.time(what(", apart"), cost, || {
            apart::<P>(before.clone(), attended.clone(), grad.clone(), &how, &mask, scale)
        })?;
    }
    Ok(())
}
