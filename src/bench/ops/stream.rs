use super::{Bench, Cost};
use crate::error::Result;
use crate::ops::stream::{self, Branch, Inputs, Mix, Norm, OutputGrads, Seen, Start};
use crate::ops::{Param, Plain};

/// The forms of `baseline`'s blocks: before the MLP, before the mixer, and that with a skip of the U-Net.
const FORMS: [(&str, usize, bool); 3] =
    [("add", 1, false), ("add, mix", 1, true), ("add twice, mix", 2, true)];

pub(super) fn time<P: Plain>(bench: &mut Bench<'_, P>) -> Result<()> {
    let (rows, columns) = (bench.rows, 512);
    let norm = Some(Norm { eps: crate::ops::rms_norm::EPS, scale: 1.0 });
    for (what, branches, mixes) in FORMS {
        let row = || bench.random([rows, columns]);
        let weight = |rows: usize| {
            let value = bench.random([rows, columns]);
            Param::<P>::new("w", value.clone().cast(burn::tensor::DType::F32), value.dtype())
        };
        let branch = |_| Branch { value: row(), scale: Some((weight(1), 0)) };
        let mix = mixes.then(|| Mix { start: Start::new(row()), weight: weight(2) });
        let inputs = Inputs { x: row(), branches: (0..branches).map(branch).collect(), mix };
        let seen = Seen {
            x: inputs.x.clone(),
            adds: mixes,
            branches: inputs.branches.clone(),
            mix: inputs.mix.clone().map(|mix| (mix.start.value(), mix.weight)),
            norm,
        };
        let (grad, grad_normed, sum) = (row(), row(), mixes.then(row));
        let size = format!("[{rows}, {columns}]");
        let bytes = |tensors: usize| Cost::bytes((tensors * rows * columns * grad.dtype().size()) as f64);
        let mixed = usize::from(mixes);
        let forward = bytes(3 + branches + mixed);
        bench.time(format!("stream, {what}: forward {size}"), forward, || {
            P::stream(inputs.clone(), norm, false)
        })?;
        bench.time(format!("stream, {what}: forward, reference {size}"), forward, || {
            stream::forward(inputs.clone(), norm, false)
        })?;
        // The gradient of the start is read and written.
        let backward = bytes(4 + 2 * branches + 3 * mixed);
        let grads = || OutputGrads { x: Some(grad.clone()), normed: Some(grad_normed.clone()), added: None };
        bench.time(format!("stream, {what}: backward {size}"), backward, || {
            P::stream_backward(seen.clone(), grads(), sum.clone())
        })?;
        bench.time(format!("stream, {what}: backward, reference {size}"), backward, || {
            stream::backward(seen.clone(), grads(), sum.clone())
        })?;
    }
    Ok(())
}
