//! `baseline` on every device against f64 on the CPU: the loss and the gradient of every parameter, from the same weights
//! and tokens.
//!
//! Tolerance (DESIGN.md, parity rule): twice the error of the same model on the CPU in the device's precision, for bf16
//! with the results and gradients of all its ops rounded. Errors are a tensor's, as a share of its gradient's size; small
//! tensors of one kind (scales, gains, skips) are taken together, as one of them alone is a matter of luck.

mod common;

use burn::tensor::{DType, Int, Tensor, TensorData};
use common::{Random, affordable, download, epsilon, round, targets};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target, guard, run};
use fairway::host::HostTensor;
use fairway::model::Model;
use fairway::ops::{Autodiff, Plain, reduce, rounded};
use fairway::recipe::Recipe;
use std::collections::BTreeMap;

/// A recipe, and the sequences of a batch.
#[derive(Clone)]
struct Case {
    recipe: Recipe,
    rows: usize,
}

/// Gradients of fewer elements are taken together with those of their kind.
const SMALL: usize = 1024;

impl Case {
    /// Of two of the heads of `baseline`, and of a depth with a skip.
    fn small() -> Self {
        let recipe = Recipe {
            vocab_size: 192,
            num_layers: 3,
            model_dim: 128,
            num_heads: 2,
            num_kv_heads: 1,
            train_seq_len: 96,
            train_batch_tokens: 768,
            val_batch_size: 768,
            ..Recipe::load("baseline").unwrap()
        };
        Self { recipe, rows: 3 }
    }

    /// `baseline` as it is, but for its depth.
    fn wide() -> Self {
        Self { recipe: Recipe { num_layers: 3, ..Recipe::load("baseline").unwrap() }, rows: 1 }
    }

    /// Multiply-adds of the largest product: a layer's with its MLP, or the head's.
    fn work(&self) -> usize {
        let Recipe { train_seq_len, model_dim, vocab_size, .. } = self.recipe;
        self.rows * train_seq_len * model_dim * self.recipe.mlp_dim().max(vocab_size)
    }

    /// Weights as bf16 has them, all far from zero.
    fn weights(&self) -> Vec<HostTensor> {
        let model = Model::<Cpu>::new(&self.recipe, &Default::default(), DType::F64).unwrap();
        let mut random = Random(11);
        let moved = |tensor: &HostTensor| {
            let values: Vec<f64> = tensor
                .to_f64()
                .iter()
                .map(|value| {
                    let near = if *value == 0.0 { 0.02 } else { 0.3 * value };
                    round(value + near * random.uniform(), Precision::Bf16)
                })
                .collect();
            HostTensor::from_f64(tensor.name.clone(), &tensor.shape, &values)
        };
        model.params().to_host().unwrap().iter().map(moved).collect()
    }

    /// The loss and every gradient.
    fn gradients<B: Plain>(
        &self,
        weights: &[HostTensor],
        device: &B::Device,
        dtype: DType,
        rounds: bool,
    ) -> Result<Gradients> {
        let model = Model::<B>::new(&self.recipe, device, dtype)?;
        model.params().load(weights, "the test")?;
        let time = self.recipe.train_seq_len;
        let ids = |seed: u64| -> Tensor<Autodiff<B>, 2, Int> {
            let mut random = Random(seed);
            let id = |_| ((random.uniform() * 0.5 + 0.5) * self.recipe.vocab_size as f64) as i64;
            let values: Vec<i64> = (0..self.rows * time).map(id).collect();
            Tensor::from_data(TensorData::new(values, [self.rows, time]), device)
        };
        let forward = || reduce::sum(model.nll::<Autodiff<B>>(ids(1), ids(2)));
        let loss = if rounds { rounded(forward) } else { forward() };
        let loss = loss.mul_scalar(1.0 / (self.rows * time) as f64);
        let value = download(loss.clone().inner())[0];
        loss.backward();
        let grad = |param: &fairway::ops::Param<B>| {
            let grad = param.take_flat_grad().unwrap_or_else(|| panic!("no gradient of {}", param.name()));
            (param.name().to_string(), download(grad))
        };
        Ok(Gradients { loss: value, of: model.params().iter().map(grad).collect() })
    }
}

struct Gradients {
    loss: f64,
    of: BTreeMap<String, Vec<f64>>,
}

impl Gradients {
    /// Each tensor's error as a share of its size, the small ones by kind.
    fn errors(&self, exact: &Gradients) -> BTreeMap<String, f64> {
        let mut squares: BTreeMap<String, [f64; 2]> = BTreeMap::new();
        assert_eq!(self.of.len(), exact.of.len());
        for (name, grad) in &self.of {
            let exact = &exact.of[name];
            assert_eq!(grad.len(), exact.len(), "{name}");
            let kind = name.rsplit('.').next().unwrap_or(name);
            let key = if grad.len() < SMALL { format!("every {kind}") } else { name.clone() };
            let entry = squares.entry(key).or_default();
            // Tensors taken together count alike, whatever their size.
            let size: f64 = exact.iter().map(|x| x * x).sum();
            let error: f64 = grad.iter().zip(exact).map(|(a, b)| (a - b) * (a - b)).sum();
            assert!(size > 0.0, "{name}: a gradient of zeros");
            entry[0] += error / size;
            entry[1] += 1.0;
        }
        squares.into_iter().map(|(name, [error, count])| (name, (error / count).sqrt())).collect()
    }
}

struct Whole {
    case: Case,
}

impl Job for Whole {
    type Output = bool;

    fn run<B: Plain>(self, device: &B::Device, target: &Target) -> Result<bool> {
        let (case, precision) = (self.case, target.precision);
        let weights = case.weights();
        let cpu = Default::default();
        let exact = case.gradients::<Cpu>(&weights, &cpu, DType::F64, false)?;
        let reference = match precision {
            Precision::Bf16 => case.gradients::<Cpu>(&weights, &cpu, DType::F64, true)?,
            _ => case.gradients::<Cpu>(&weights, &cpu, precision.dtype(), false)?,
        };
        let ours = case.gradients::<B>(&weights, device, precision.dtype(), false)?;
        let again = case.gradients::<B>(&weights, device, precision.dtype(), false)?;
        assert!(ours.loss.to_bits() == again.loss.to_bits() && ours.of == again.of, "two runs differ");
        let (allowed, errors) = (reference.errors(&exact), ours.errors(&exact));
        let mut good = true;
        for (name, error) in &errors {
            let tolerance = 2.0 * allowed[name].max(epsilon(precision));
            let share = error / tolerance;
            println!(
                "{} {precision} {name}: {error:.2e} of {tolerance:.2e} ({:.0}%)",
                target.label,
                100.0 * share
            );
            good &= share <= 1.0;
        }
        let error = (ours.loss / exact.loss - 1.0).abs();
        let tolerance = 2.0 * (reference.loss / exact.loss - 1.0).abs().max(epsilon(precision));
        println!(
            "{} {precision} loss {:.6}, exact {:.6}: {error:.2e} of {tolerance:.2e}",
            target.label, ours.loss, exact.loss
        );
        Ok(good && error <= tolerance)
    }
}

#[test]
fn the_loss_and_every_gradient_are_the_reference_s() {
    let failed: Vec<String> = targets()
        .into_iter()
        .filter(|target| {
            let cases = match target.precision {
                // Widths that the kernels are made for; too slow elsewhere.
                _ if target.label.contains("cuda") => vec![Case::small(), Case::wide()],
                _ => vec![Case::small()],
            };
            let mut cases = cases.into_iter().filter(|case| affordable(case.work()));
            !cases.all(|case| guard(target, || run(target, Whole { case })).unwrap())
        })
        .map(|target| format!("{} {}", target.label, target.precision))
        .collect();
    assert!(failed.is_empty(), "beyond the tolerance on {failed:?}");
}
