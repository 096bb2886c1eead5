//! Sums over the inputs of linear layers, which calibration reads: on every device, for every way in which a weight is
//! applied.

mod common;

use burn::tensor::Tensor;
use common::{Random, all_pass, download, round, upload, upload_as};
use fairway::Result;
use fairway::backend::{Job, Precision, Target};
use fairway::ops::{Param, Plain};

const ROWS: usize = 72;
const INPUTS: usize = 32;
const OUTPUTS: usize = 64;

struct Watched;

/// x^T x of `x[n, columns]`.
fn gram(x: &[f64], columns: usize) -> Vec<f64> {
    let mut sum = vec![0.0; columns * columns];
    for row in x.chunks(columns) {
        for (a, sums) in row.iter().zip(sum.chunks_mut(columns)) {
            sums.iter_mut().zip(row).for_each(|(sum, b)| *sum += a * b);
        }
    }
    sum
}

/// The largest error over the largest element.
fn off(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    got.iter().zip(expected).fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / largest
}

impl Job for Watched {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        let mut random = Random(41);
        let mut values =
            |n: usize| -> Vec<f64> { (0..n).map(|_| round(random.uniform() - 0.3, precision)).collect() };
        let x = values(ROWS * INPUTS);
        let mut weight = |name: &str, shape: [usize; 2]| -> Param<B> {
            let master = if precision == Precision::F64 { precision.dtype() } else { Precision::F32.dtype() };
            let value: Tensor<B, 2> = upload_as(&values(shape[0] * shape[1]), shape, device, master);
            Param::new(name, value, precision.dtype())
        };
        let weights = ["one", "q", "k", "v", "inner"].map(|name| weight(name, [OUTPUTS, INPUTS]));
        let [one, q, k, v, inner] = &weights;
        let last = &weight("last", [INPUTS, OUTPUTS]);
        let input = || upload::<B, 2>(&x, [ROWS, INPUTS], device, precision);
        let apply = || {
            B::project(input(), one);
            B::project_many(input(), [q, k, v]);
            B::squared_mlp(input(), inner, last, 0.5);
        };
        apply();
        assert!(weights.iter().all(|w| w.take_gram().is_none()), "not watched");
        weights.iter().for_each(|w| w.set_watched(true));
        last.set_watched(true);
        // Twice: a layer that runs again adds.
        apply();
        apply();
        weights.iter().for_each(|w| w.set_watched(false));
        last.set_watched(false);
        apply();
        // The products of what the device was given are exact in f32 or wider; only their sums are rounded.
        let close = if precision == Precision::F64 { 1e-13 } else { 1e-5 };
        let twice = |x: &[f64], columns| gram(x, columns).into_iter().map(|s| 2.0 * s).collect::<Vec<f64>>();
        let expected = twice(&x, INPUTS);
        let mut good = true;
        for w in &weights {
            let error = off(&download(w.take_gram().expect("watched")), &expected);
            println!("{} {precision} {}: {error:.1e} of {close:.0e}", target.label, w.name());
            good &= error < close && w.take_gram().is_none();
        }
        // The MLP's hidden row is rounded to the device's precision before it is squared and after.
        let inner = download(inner.compute::<2>());
        let hidden: Vec<f64> = x
            .chunks(INPUTS)
            .flat_map(|x| inner.chunks(INPUTS).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>()))
            .map(|h| if h < 0.0 { 0.25 * h * h } else { h * h })
            .collect();
        let close = if precision == Precision::Bf16 { 0.02 } else { close };
        let error = off(&download(last.take_gram().expect("watched")), &twice(&hidden, OUTPUTS));
        println!("{} {precision} last: {error:.1e} of {close:.0e}", target.label);
        Ok(good && error < close)
    }
}

#[test]
fn a_watched_weight_sums_up_its_inputs() {
    all_pass(|| Watched);
}
