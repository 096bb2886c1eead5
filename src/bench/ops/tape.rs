use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::rms_norm::EPS;
use crate::ops::{Autodiff, Plain, RmsNormOps};
use burn::tensor::Tensor;

/// The tape's own cost: a node recorded and walked back, over a tensor too small to matter.
pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let small = bench.random([1, 64]);
    bench.time("rms_norm [1, 64] recorded and walked back", Cost::default(), || {
        let x = Tensor::<Autodiff<P>, 2>::from_inner(small.clone()).require_grad();
        <Autodiff<P> as RmsNormOps>::rms_norm(x, EPS).backward()
    })
}
