//! The whole sum on every device against a sum in f64 on the host.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the reference in f32 on the CPU, at least twice the distance
//! between neighbouring numbers, as a share of the sum of magnitudes.

mod common;

use burn::tensor::Tensor;
use common::{Random, affordable, all_pass, download, epsilon, repeats, round, upload};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target};
use fairway::ops::{Autodiff, Plain, ReduceOps, reduce};

/// One block's vectors and not, the first lengths of several blocks, and many.
const LENGTHS: [usize; 11] = [1, 2, 31, 1023, 1028, 5003, 65_536, 131_072, 131_073, 131_076, 3_000_001];

/// The error of a sum, and what it may be.
fn error(values: &[f64], sum: f64, precision: Precision) -> (f64, f64) {
    let (exact, size) = (values.iter().sum::<f64>(), values.iter().map(|x| x.abs()).sum::<f64>());
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let reference = download(reduce::sum(upload::<Cpu, 1>(values, [values.len()], &device, precision)))[0];
    let error = |sum: f64| (sum - exact).abs() / size;
    // The host's own sum is no better a measure of f64.
    let least = if precision == Precision::F64 { values.len() as f64 } else { 1.0 } * epsilon(precision);
    (error(sum), 2.0 * error(reference).max(least))
}

struct Sums;

impl Job for Sums {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let precision = target.precision;
        if precision == Precision::Bf16 {
            println!("skipped: {} {precision}: losses and norms are f32", target.label);
            return Ok(true);
        }
        let mut good = true;
        for n in LENGTHS {
            if !affordable(n) {
                continue;
            }
            let mut random = Random(n as u64);
            let values: Vec<f64> = (0..n).map(|_| round(random.uniform() + 0.1, precision)).collect();
            let x = upload::<B, 1>(&values, [values.len()], device, precision);
            // Whole, and from an offset, aligned and not.
            for start in [0, 1, 4].into_iter().filter(|start| *start == 0 || n > 9) {
                let part = x.clone().narrow(0, start, n - start);
                let sum = download(B::total(part.clone()));
                let (error, tolerance) = error(&values[start..], sum[0], precision);
                let share = error / tolerance;
                println!(
                    "{} {precision} {start}..{n}: {:.9e}, {error:.2e} of {tolerance:.2e} ({:.0}%)",
                    target.label,
                    sum[0],
                    100.0 * share
                );
                good &= sum.len() == 1 && share <= 1.0;
                for _ in 0..repeats() {
                    let again = download(B::total(part.clone()))[0];
                    assert!(again.to_bits() == sum[0].to_bits(), "{start}..{n}: differs");
                }
            }
            let tracked = Tensor::<Autodiff<B>, 1>::from_inner(x).require_grad();
            let total = <Autodiff<B> as ReduceOps>::total(tracked.clone());
            let grads = total.mul_scalar(3.0).backward();
            let grad = download(tracked.grad(&grads).expect("a gradient"));
            assert!(grad.len() == n && grad.iter().all(|g| *g == 3.0), "{n}: the gradient");
        }
        // Columns of whole numbers, whose sums are exact in f32.
        for [rows, columns] in [[1, 3], [16_384, 2], [16_385, 3], [70_000, 4], [131_071, 1]] {
            if !affordable(rows * columns) {
                continue;
            }
            let mut random = Random(rows as u64);
            let values: Vec<f64> = (0..rows * columns).map(|_| (random.uniform() * 8.0).round()).collect();
            let x = upload::<B, 2>(&values, [rows, columns], device, precision);
            let sums = reduce::sum_rows(x).into_data().iter::<f64>().collect::<Vec<_>>();
            let exact = |c: usize| values.iter().skip(c).step_by(columns).sum::<f64>();
            assert_eq!(
                sums,
                (0..columns).map(exact).collect::<Vec<_>>(),
                "{} {rows}x{columns}",
                target.label
            );
        }
        Ok(good)
    }
}

#[test]
fn every_device_agrees_with_the_host() {
    all_pass(|| Sums);
}
