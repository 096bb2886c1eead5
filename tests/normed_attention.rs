//! Attention from the projections on, on every device: the same bits as its parts one after the other, forward and in
//! every gradient, whether or not the gradients lie side by side.

mod common;

use burn::tensor::{DType, Tensor};
use common::{Random, download, round, targets, upload_as};
use fairway::Result;
use fairway::backend::{Job, Precision, Target, guard, run};
use fairway::ops::attention::Mask;
use fairway::ops::qk_norm::QkNorm;
use fairway::ops::rope::RopeTable;
use fairway::ops::{
    AttentionOps, Autodiff, LinearOps, NormedAttentionOps, Param, Plain, QkNormOps, accumulate_type,
};

fn random_tensor<B: Plain, const D: usize>(
    random: &mut Random,
    shape: [usize; D],
    device: &B::Device,
    precision: Precision,
) -> Tensor<B, D> {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| round(random.uniform(), precision)).collect();
    upload_as(&values, shape, device, accumulate_type(precision.dtype()))
}

/// Batch, positions, heads, groups, size and rotated channels.
const CASES: [[usize; 6]; 5] = [
    [2, 100, 4, 2, 64, 64],
    [3, 33, 2, 2, 32, 8],
    [1, 130, 8, 1, 128, 0],
    [2, 5, 2, 1, 10, 4],
    [2, 70, 4, 2, 16, 16],
];

struct AgainstItsParts;

impl Job for AgainstItsParts {
    type Output = ();

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<()> {
        type T<B> = Autodiff<B>;
        let (precision, dtype) = (target.precision, target.precision.dtype());
        for (number, [batch, time, heads, groups, size, rotated]) in CASES.into_iter().enumerate() {
            let mut random = Random(number as u64);
            let (rows, columns) = (batch * time, 48);
            let x = random_tensor::<B, 2>(&mut random, [rows, columns], device, precision).cast(dtype);
            let grad =
                random_tensor::<B, 2>(&mut random, [rows, heads * size], device, precision).cast(dtype);
            let mut weight = |outputs: usize| {
                Param::<B>::new("w", random_tensor(&mut random, [outputs, columns], device, precision), dtype)
            };
            let weights = [weight(heads * size), weight(groups * size), weight(groups * size)];
            let gain = Param::<B>::new(
                "gain",
                random_tensor::<B, 1>(&mut random, [heads], device, precision),
                dtype,
            );
            let rope = match rotated {
                0 => {
                    let none = Tensor::empty([time, 0], (device, DType::F32));
                    RopeTable { cos: none.clone(), sin: none }
                }
                _ => RopeTable::new(0, time, rotated, 1e4, device, accumulate_type(dtype)),
            };
            let how = QkNorm { batch, heads, groups, rope, gain: Some(gain.clone()), eps: 1e-6 };
            let results = [false, true].map(|together| {
                let leaf = Tensor::<T<B>, 2>::from_inner(x.clone()).require_grad();
                let [q, k, v] = T::<B>::project_many(leaf.clone(), weights.each_ref());
                let y = if together {
                    T::<B>::normed_attention(q, k, v, &how, &Mask::causal(), 0.125)
                } else {
                    let [q, k] = T::<B>::qk_norm(q, k, &how);
                    let v = v.reshape(k.dims());
                    T::<B>::attention_forward(q, k, v, &Mask::causal(), 0.125).0
                };
                let y = y.reshape([rows, heads * size]);
                let value = download(y.clone().inner());
                let grads = (y * Tensor::from_inner(grad.clone())).sum().backward();
                let mut found = vec![value, download(leaf.grad(&grads).expect("a gradient of x"))];
                found.extend(
                    weights.iter().chain([&gain]).map(|w| download(w.take_flat_grad().expect("a gradient"))),
                );
                found
            });
            let [apart, together] = results;
            for (index, (apart, together)) in apart.iter().zip(&together).enumerate() {
                let same = apart.iter().zip(together).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(
                    same && apart.iter().all(|x| x.is_finite()),
                    "case {number}, result {index} on {}",
                    target.label
                );
            }
        }
        Ok(())
    }
}

#[test]
fn it_is_its_parts_one_after_the_other() {
    for target in targets() {
        guard(&target, || run(&target, AgainstItsParts)).unwrap();
    }
}
