//! The model as a whole: its size, its cache, its gradients where no fixture of the core set reaches, in f64 on the CPU.

use burn::tensor::{DType, Int, Tensor, TensorData};
use fairway::backend::cpu::Cpu;
use fairway::host::HostTensor;
use fairway::model::{EMBEDDING, HEAD, Model, SKIPS};
use fairway::ops::{Autodiff, Base, Plain, reduce};
use fairway::recipe::Recipe;

const ROWS: usize = 3;
const TIME: usize = 11;

fn device() -> burn_ndarray::NdArrayDevice {
    burn_ndarray::NdArrayDevice::Cpu
}

fn small(layers: usize) -> Recipe {
    Recipe {
        vocab_size: 17,
        num_layers: layers,
        model_dim: 24,
        num_heads: 4,
        num_kv_heads: 2,
        as_written: false,
        ..Recipe::default()
    }
}

/// A model whose parameters are all far from their special starts (zeros, ones).
fn model(recipe: &Recipe) -> Model<Cpu> {
    let model = Model::<Cpu>::new(recipe, &device(), DType::F64).expect("a model");
    let mut state = 9u64;
    let mut draw = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    };
    for param in model.params().iter() {
        let values: Vec<f64> = (0..param.numel()).map(|_| 0.6 * draw()).collect();
        param.set_flat(Tensor::from_data(TensorData::new(values, [param.numel()]), (&device(), DType::F64)));
    }
    model
}

fn ids<B: Base>(seed: usize, vocab: usize, shape: [usize; 2], device: &B::Device) -> Tensor<B, 2, Int> {
    let values: Vec<i64> =
        (0..shape[0] * shape[1]).map(|i| ((i * i + seed * (i + 3)) % vocab) as i64).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    x.into_data().to_vec().expect("f64 values")
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// The mean loss of a batch, plain.
fn loss(model: &Model<Cpu>) -> f64 {
    let batch = |seed| ids::<Cpu>(seed, model.vocab_size(), [ROWS, TIME], &device());
    let nll = model.nll::<Cpu>(batch(1), batch(2));
    values(nll).iter().sum::<f64>() / (ROWS * TIME) as f64
}

/// Accumulates the gradients of that loss.
fn backward<P: Plain>(model: &Model<P>) {
    let batch = |seed| ids::<Autodiff<P>>(seed, model.vocab_size(), [ROWS, TIME], model.device());
    let nll = model.nll::<Autodiff<P>>(batch(1), batch(2));
    reduce::sum(nll).mul_scalar(1.0 / (ROWS * TIME) as f64).backward();
}

#[test]
fn the_baseline_has_17059912_parameters() {
    let recipe = Recipe::load("baseline").unwrap();
    let model = Model::<Cpu>::new(&recipe, &device(), DType::F32).unwrap();
    assert_eq!(model.params().numel(), 17_059_912);
    assert_eq!(fairway::model::param_count(&recipe).unwrap(), 17_059_912);
    let block: usize =
        model.params().iter().filter(|p| p.name().starts_with("blocks.3.")).map(|p| p.numel()).sum();
    assert_eq!(block, 1_837_064);
    let names: Vec<&str> = model.params().iter().map(|param| param.name()).collect();
    assert_eq!(&names[..3], [EMBEDDING, SKIPS, "blocks.0.attn_scale"]);
}

#[test]
fn the_closed_form_counts_what_is_built() {
    for layers in 1..6 {
        for tie_embeddings in [true, false] {
            let recipe = Recipe { tie_embeddings, ..small(layers) };
            let model = Model::<Cpu>::new(&recipe, &device(), DType::F64).unwrap();
            assert_eq!(
                model.params().numel() as u64,
                fairway::model::param_count(&recipe).unwrap(),
                "{layers} layers"
            );
            assert_eq!(model.params().get(HEAD).is_some(), !tie_embeddings);
            assert_eq!(model.params().get(SKIPS).is_some(), layers > 1);
        }
    }
}

#[test]
fn prefill_and_single_steps_with_a_cache_equal_the_full_forward() {
    // The rotation's table grows on the way (16 positions, then 32).
    for (layers, time) in [(1, 5), (4, 21), (5, 19)] {
        let recipe = Recipe { tie_embeddings: layers != 5, ..small(layers) };
        let model = model(&recipe);
        let ids = ids::<Cpu>(3, recipe.vocab_size, [2, time], &device());
        let full = model.logits::<Cpu>(model.hidden::<Cpu>(ids.clone(), None, None));
        let full = full.reshape([2, time, recipe.vocab_size]);
        for prefill in [1, 3, time - 1] {
            let mut cache = model.cache::<Cpu>(time);
            let mut parts = Vec::new();
            let mut start = 0;
            while start < time {
                let len = if start == 0 { prefill } else { 1 };
                let part = ids.clone().narrow(1, start, len);
                let hidden = model.hidden::<Cpu>(part, Some(&mut cache), None);
                parts.push(model.logits::<Cpu>(hidden).reshape([2, len, recipe.vocab_size]));
                start += len;
                assert_eq!(cache.positions(), start);
            }
            let stepped = values(Tensor::cat(parts, 1));
            let error = largest_difference(&stepped, &values(full.clone()));
            assert!(error < 1e-12, "{layers} layers, prefill {prefill}: {error:e}");
        }
    }
}

#[test]
fn a_token_does_not_see_those_after_it_nor_other_rows() {
    let model = model(&small(4));
    let logits = |ids| values(model.logits::<Cpu>(model.hidden::<Cpu>(ids, None, None)));
    let first = ids::<Cpu>(3, 17, [2, 9], &device());
    let mut changed: Vec<i64> = first.clone().into_data().to_vec().unwrap();
    changed[6] = (changed[6] + 1) % 17;
    let second = Tensor::from_data(TensorData::new(changed, [2, 9]), &device());
    let (a, b) = (logits(first), logits(second));
    assert!(largest_difference(&a[..6 * 17], &b[..6 * 17]) < 1e-14, "earlier positions");
    assert!(largest_difference(&a[9 * 17..], &b[9 * 17..]) < 1e-14, "the other row");
    for position in 6..9 {
        let range = position * 17..(position + 1) * 17;
        assert!(largest_difference(&a[range.clone()], &b[range]) > 1e-4, "position {position}");
    }
}

#[test]
fn gradients_are_the_loss_s_differences_for_any_depth_and_head() {
    let step = 1e-5;
    for (layers, tie_embeddings) in [(1, true), (1, false), (2, true), (3, false), (5, false)] {
        let recipe = Recipe { tie_embeddings, logit_softcap: 4.0, mlp_mult: 3.0, ..small(layers) };
        let model = model(&recipe);
        backward(&model);
        for param in model.params().iter() {
            let grad =
                values(param.take_flat_grad().unwrap_or_else(|| panic!("no gradient of {}", param.name())));
            let start = values(param.flat());
            let set = |values: &[f64]| {
                let data = TensorData::new(values.to_vec(), [values.len()]);
                param.set_flat(Tensor::from_data(data, (&device(), DType::F64)));
            };
            for at in [0, start.len() / 2 + 1, start.len() - 1] {
                let moved = |by: f64| {
                    let mut values = start.clone();
                    values[at] += by;
                    set(&values);
                    loss(&model)
                };
                let slope = (moved(step) - moved(-step)) / (2.0 * step);
                let error = (slope - grad[at]).abs();
                let what = format!("{} [{at}] of {layers} layers", param.name());
                // Central differences: step^2 of the third derivative, and 1e-16 / step of rounding.
                assert!(
                    error < 1e-7 * grad[at].abs().max(0.01),
                    "{what}: {slope:e}, gradient {:e}",
                    grad[at]
                );
            }
            set(&start);
        }
    }
}

#[test]
fn a_frozen_embedding_leaves_the_others_their_gradients() {
    let model = model(&Recipe { tie_embeddings: false, ..small(2) });
    backward(&model);
    let grads = |model: &Model<Cpu>| -> Vec<Option<Vec<f64>>> {
        model.params().iter().map(|param| param.take_flat_grad().map(values)).collect()
    };
    let all = grads(&model);
    let frozen = model.params().get(EMBEDDING).unwrap();
    frozen.set_trainable(false);
    backward(&model);
    let rest = grads(&model);
    assert_eq!(rest[0], None);
    assert_eq!(all[1..], rest[1..]);
    assert!(rest[1..].iter().all(Option::is_some));
}

#[test]
fn the_norms_epsilon_is_the_recipe_s() {
    let hidden = |rms_eps| {
        let model = model(&Recipe { rms_eps, ..small(2) });
        values(model.hidden::<Cpu>(ids::<Cpu>(1, 17, [1, 4], &device()), None, None))
    };
    let (default, same, other) =
        (hidden(Recipe::default().rms_eps), hidden(1.1920928955078125e-7), hidden(0.5));
    assert_eq!(default, same);
    assert!(largest_difference(&default, &other) > 0.05);
    // Rows have a mean square of x^2 / (x^2 + eps).
    let mean_square = |values: &[f64]| values[..24].iter().map(|v| v * v).sum::<f64>() / 24.0;
    assert!((mean_square(&default) - 1.0).abs() < 1e-5 && mean_square(&other) < 0.95);
}

#[test]
fn parameters_go_to_host_memory_and_back_and_strangers_are_refused() {
    let from = model(&small(3));
    let host = from.params().to_host().unwrap();
    let to = Model::<Cpu>::new(&small(3), &device(), DType::F64).unwrap();
    to.params().load(&host, "a test").unwrap();
    assert_eq!(loss(&from), loss(&to));
    let refused = |tensors: &[HostTensor], what: &str| {
        let error = to.params().load(tensors, "a test").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().starts_with(what), "{error}");
    };
    refused(&host[1..], "tensor tok_emb.weight is missing");
    refused(&[&host[..], &host[..1]].concat(), "tensor tok_emb.weight is there twice");
    refused(&[&host[..], &[HostTensor::from_f32("extra", &[1], &[0.0])]].concat(), "unknown tensor extra");
    let mut wrong = host.clone();
    wrong[0].shape = vec![24, 17];
    refused(&wrong, "tensor tok_emb.weight has shape [24, 17]");
}
