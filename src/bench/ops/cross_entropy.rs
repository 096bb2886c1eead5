use super::embedding::ids;
use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::cross_entropy;
use crate::ops::{Param, Plain};
use burn::tensor::{Distribution, Tensor};

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, columns, cap) = (bench.rows, 512, Some(30.0));
    for vocab in [1024, 8192] {
        let rows = rows * 1024 / vocab;
        let h = bench.random([rows, columns]);
        let w: Tensor<P, 2> = Tensor::random([vocab, columns], Distribution::Normal(0.0, 0.1), bench.device);
        let w = Param::<P>::new("head", w, bench.dtype);
        let targets = ids::<P>(rows, vocab, bench.device);
        let grad = Tensor::<P, 1>::ones([rows], bench.device).mul_scalar(1.0 / rows as f64);
        let size = format!("[{rows}, {columns}] [{columns}, {vocab}]");
        // The backward makes the products again.
        let products = |count: usize| Cost::operations((2 * count * rows * columns * vocab) as f64);
        let (_, lse) = P::cross_entropy_and_lse(h.clone(), &w, targets.clone(), cap);
        bench.time(format!("capped_logits {size} as f32"), products(1), || {
            P::capped_logits(h.clone(), &w, cap)
        })?;
        bench.time(format!("capped_logits without a cap {size} as f32"), products(1), || {
            P::capped_logits(h.clone(), &w, None)
        })?;
        bench.time(format!("cross_entropy forward {size}"), products(1), || {
            P::cross_entropy(h.clone(), &w, targets.clone(), cap)
        })?;
        bench.time(format!("cross_entropy forward, reference {size}"), products(1), || {
            cross_entropy::forward(h.clone(), w.compute(), targets.clone(), cap)
        })?;
        bench.time(format!("cross_entropy backward {size}"), products(3), || {
            w.clear_grad();
            P::cross_entropy_backward(h.clone(), &w, targets.clone(), cap, lse.clone(), grad.clone())
        })?;
        bench.time(format!("cross_entropy backward, reference {size}"), products(3), || {
            w.clear_grad();
            let mut accumulate = |part| w.accumulate::<2>(part);
            let (h, targets, grad) = (h.clone(), targets.clone(), grad.clone());
            cross_entropy::backward(h, w.compute(), targets, cap, grad, Some(&mut accumulate))
        })?;
    }
    Ok(())
}
