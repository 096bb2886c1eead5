use super::{Bench, Cost};
use crate::error::Result;
use crate::model::init;
use crate::ops::embedding;
use crate::ops::{Param, Plain};
use burn::tensor::{Distribution, Int, Tensor, TensorData};
use rand::Rng;

/// Ids of which the small ones are frequent: the first is about a tenth of all.
pub(super) fn ids<P: Plain>(count: usize, vocab: usize, device: &P::Device) -> Tensor<P, 1, Int> {
    let mut rng = init::generator(0, "bench ids");
    let id = |_| (rng.random::<f64>().powi(3) * vocab as f64) as i32;
    let ids: Vec<i32> = (0..count).map(id).collect();
    Tensor::from_data(TensorData::new(ids, [count]), device)
}

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let rows = bench.rows;
    for (vocab, columns) in [(1024, 512), (10_240, 128)] {
        let w: Tensor<P, 2> = Tensor::random([vocab, columns], Distribution::Normal(0.0, 0.1), bench.device);
        let w = Param::<P>::new("table", w, bench.dtype);
        let ids = ids::<P>(rows, vocab, bench.device);
        let grad = bench.random([rows, columns]);
        let size = format!("[{rows}] of [{vocab}, {columns}]");
        let width = grad.dtype().size();
        let forward = Cost::bytes(((rows + vocab) * columns * width + 4 * rows) as f64);
        let backward = Cost::bytes((rows * columns * width + vocab * columns * 4 + 4 * rows) as f64);
        bench.time(format!("embed forward {size}"), forward, || P::embed(ids.clone(), &w))?;
        bench.time(format!("embed forward, reference {size}"), forward, || {
            embedding::forward(ids.clone(), &w)
        })?;
        bench.time(format!("embed backward {size}"), backward, || {
            w.clear_grad();
            P::embed_backward(ids.clone(), &w, grad.clone());
        })?;
        bench.time(format!("embed backward, reference {size}"), backward, || {
            w.clear_grad();
            embedding::backward(ids.clone(), &w, grad.clone());
        })?;
    }
    Ok(())
}
