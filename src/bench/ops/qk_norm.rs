use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::qk_norm::{self, QkNorm};
use crate::ops::rms_norm::EPS;
use crate::ops::rope::RopeTable;
use crate::ops::{Param, Plain, accumulate_type};
use burn::tensor::Tensor;

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, dtype, device) = (bench.rows, bench.dtype, bench.device);
    let (heads, groups, size, time) = (8, 4, 64, bench.rows.min(1024));
    let batch = rows / time;
    let rows = batch * time;
    let (q, k) = (bench.random([rows, heads * size]), bench.random([rows, groups * size]));
    let grads = [bench.random([batch, time, heads, size]), bench.random([batch, time, groups, size])];
    let gain = Tensor::<P, 1>::ones([heads], (device, accumulate_type(dtype)));
    let how = QkNorm {
        batch,
        heads,
        groups,
        rope: RopeTable::new(0, time, size, 1e4, device, accumulate_type(dtype)),
        gain: Some(Param::new("gain", gain, dtype)),
        eps: EPS,
    };
    let what = |pass: &str| format!("qk_norm {pass} [{batch}, {time}, {heads}/{groups}, {size}]");
    let bytes =
        |tensors: usize| Cost::bytes((tensors * rows * (heads + groups) * size * dtype.size()) as f64);
    bench.time(what("forward"), bytes(2), || P::qk_norm(q.clone(), k.clone(), &how))?;
    bench.time(what("forward, reference"), bytes(2), || qk_norm::forward::<P>(q.clone(), k.clone(), &how))?;
    bench.time(what("backward"), bytes(3), || {
        P::qk_norm_backward(q.clone(), k.clone(), grads.clone(), &how)
    })?;
    bench.time(what("backward, reference"), bytes(3), || {
        qk_norm::backward::<P>(q.clone(), k.clone(), grads.clone(), &how)
    })
}
