use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::projected_attention;
use crate::ops::qk_norm::QkNorm;
use crate::ops::rms_norm::EPS;
use crate::ops::rope::RopeTable;
use crate::ops::{Param, Plain, accumulate_type};
use burn::tensor::{Distribution, Tensor};

/// Queries, keys and values of `baseline` from its mixer's input, queries and keys normed: together, and as projections and
/// norm one after the other.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (dtype, device) = (bench.dtype, bench.device);
    let wide = accumulate_type(dtype);
    let (width, heads, groups, size, time) = (512, 8, 4, 64, bench.rows.min(1024));
    let batch = bench.rows / time;
    let rows = batch * time;
    let weights = [heads, groups, groups].map(|heads| {
        let normal = Distribution::Normal(0.0, (1.0 / width as f64).sqrt());
        let value = Tensor::<P, 2>::random([heads * size, width], normal, device).cast(wide);
        Param::<P>::new("weight", value, dtype)
    });
    let weights = weights.each_ref();
    let gain = Tensor::<P, 1>::ones([heads], (device, wide));
    let how = QkNorm {
        batch,
        heads,
        groups,
        rope: RopeTable::new(0, time, size, 1e4, device, wide),
        gain: Some(Param::new("gain", gain, dtype)),
        eps: EPS,
    };
    let x = bench.random([rows, width]);
    let columns = (heads + 2 * groups) * size;
    let moved = rows * (width + columns + (heads + groups) * size) * dtype.size();
    let cost =
        Cost { bytes: Some(moved as f64), operations: Some(2.0 * (rows * width) as f64 * columns as f64) };
    let what =
        |form: &str| format!("project_heads{form} [{batch}, {time}, {width}] to {heads}/{groups}, {size}");
    bench.time(what(""), cost, || P::project_heads(x.clone(), weights, &how))?;
    bench.time(what(", projections and norm apart"), cost, || {
        projected_attention::project_heads::<P>(x.clone(), weights, &how)
    })
}
