//! The three hybrid systems as models, in f64 on the CPU: sizes, caches, causality, gradients, checkpointing.

mod hybrids_common;

use burn::tensor::{DType, Tensor, TensorData};
use fairway::backend::cpu::Cpu;
use fairway::model::{Model, layout, param_count};
use fairway::recipe::Recipe;
use hybrids_common::*;

#[test]
fn the_systems_have_their_parameters() {
    // spec/pr1994.md section 6, spec/pr1607.md section 4, spec/pr1382.md section 5.
    let block = |layout: &[(String, Vec<usize>)], prefix: &str| -> usize {
        let own = layout.iter().filter(|(name, _)| name.starts_with(prefix));
        own.map(|(_, shape)| shape.iter().product::<usize>()).sum()
    };
    let shape = |layout: &[(String, Vec<usize>)], name: &str| -> Vec<usize> {
        layout.iter().find(|(own, _)| own == name).unwrap_or_else(|| panic!("no {name}")).1.clone()
    };
    let recipe = built_in("pr1994", &[]);
    assert_eq!(param_count(&recipe).unwrap(), 61_657_752);
    let tensors = layout(&recipe).unwrap();
    assert_eq!(tensors.len(), 148);
    assert_eq!(block(&tensors, "blocks.3."), 8_733_352);
    assert_eq!(shape(&tensors, "blocks.6.s4d.in_proj.weight"), [2192, 512]);
    assert_eq!(shape(&tensors, "blocks.6.s4d.conv1d.weight"), [1024, 1, 4]);
    assert!(tensors.iter().all(|(name, _)| name != "skip_weights" && !name.starts_with("blocks.7.")));

    let recipe = built_in("pr1607", &[]);
    assert_eq!(param_count(&recipe).unwrap(), 26_216_040);
    let tensors = layout(&recipe).unwrap();
    assert_eq!((block(&tensors, "blocks.3."), block(&tensors, "blocks.4.")), (3_248_288, 2_361_352));
    assert_eq!(shape(&tensors, "blocks.7.mamba3.mamba3.in_proj.weight"), [2240, 512]);
    assert_eq!(shape(&tensors, "blocks.7.mamba3.mamba3.B_bias"), [16, 1, 64]);
    assert_eq!(shape(&tensors, "skip_weights"), [1, 4, 512]);

    let recipe = built_in("pr1382", &[]);
    assert_eq!(param_count(&recipe).unwrap(), 27_191_065);
    let tensors = layout(&recipe).unwrap();
    assert_eq!((block(&tensors, "mamba_blocks.14."), block(&tensors, "blocks.2.")), (1_283_328, 2_056));
    for (name, sizes) in [
        ("qo_bank", [6, 512, 512].as_slice()),
        ("kv_bank", &[6, 256, 512]),
        ("mlp_up_bank", &[3, 1536, 512]),
        ("mlp_down_bank", &[3, 512, 1536]),
        ("skip_weights", &[9, 512]),
        ("mamba_blocks.0.in_proj.weight", &[1600, 512]),
        ("bigram.embed.weight", &[2048, 128]),
    ] {
        assert_eq!(shape(&tensors, name), sizes, "{name}");
    }
    assert_eq!(param_count(&built_in("pr1382", &["ve_enabled=1", "ve_dim=128"])).unwrap(), 27_354_908);
}

#[test]
fn the_closed_form_counts_what_is_built() {
    for (name, recipe) in forms() {
        let built = Model::<Cpu>::new(&recipe, &device(), DType::F64).unwrap();
        assert_eq!(built.params().numel() as u64, param_count(&recipe).unwrap(), "{name}");
        let host: Vec<(String, Vec<usize>)> =
            built.params().to_host().unwrap().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect();
        let mut expected = layout(&recipe).unwrap();
        let mut found = host;
        expected.sort();
        found.sort();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn prefill_and_single_steps_with_a_cache_equal_the_full_forward() {
    let time = 13;
    for (name, recipe) in forms() {
        let model = model(&recipe);
        let ids = ids(3, [2, time]);
        let full = logits(&model, ids.clone());
        // One long step and single ones; single ones alone; several at once; all but one.
        for lengths in [[5, 1].as_slice(), &[1, 1], &[2, 4], &[time - 1, 1]] {
            let mut cache = model.cache::<Cpu>(time);
            let mut parts = Vec::new();
            let mut start = 0;
            while start < time {
                let len = lengths[usize::from(start > 0)].min(time - start);
                let hidden = model.hidden::<Cpu>(ids.clone().narrow(1, start, len), Some(&mut cache), None);
                parts.push(model.logits::<Cpu>(hidden).reshape([2, len, VOCAB]));
                start += len;
                assert_eq!(cache.positions(), start);
            }
            let error = largest_difference(&values(Tensor::cat(parts, 1)), &full);
            assert!(error < 1e-11, "{name}, {lengths:?}: {error:e}");
        }
    }
}

#[test]
fn a_token_does_not_see_those_after_it_nor_other_rows() {
    for (name, recipe) in forms() {
        let model = model(&recipe);
        let first = ids(3, [2, 9]);
        let mut changed: Vec<i64> = first.clone().into_data().to_vec().unwrap();
        changed[6] = (changed[6] + 1) % VOCAB as i64;
        let second = Tensor::from_data(TensorData::new(changed, [2, 9]), &device());
        let (a, b) = (logits(&model, first), logits(&model, second));
        assert!(largest_difference(&a[..6 * VOCAB], &b[..6 * VOCAB]) < 1e-13, "{name}: earlier positions");
        assert!(largest_difference(&a[9 * VOCAB..], &b[9 * VOCAB..]) < 1e-13, "{name}: the other row");
        for position in 6..9 {
            let range = position * VOCAB..(position + 1) * VOCAB;
            let moved = largest_difference(&a[range.clone()], &b[range]);
            assert!(moved > 1e-6, "{name}, position {position}: {moved:e}");
        }
    }
}

/// The gradients of a model's parameters that `checked` admits are differences of its objective.
fn assert_gradients(name: &str, model: &Model<Cpu>, checked: impl Fn(&str) -> bool) {
    let step = 2e-5;
    accumulate(model);
    for (param, grad) in take_grads(model).into_iter().filter(|(param, _)| checked(param)) {
        let start = get(model, &param);
        // What no path reaches has no gradient, and then no slope.
        let grad = grad.unwrap_or_else(|| vec![0.0; start.len()]);
        for at in [start.len() / 3, start.len() - 1] {
            let moved = |by: f64| {
                let mut values = start.clone();
                values[at] += by;
                set(model, &param, values);
                objective(model)
            };
            let central = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
            // Richardson's: what is left is step^4 of the fifth derivative, and 1e-15 / step of rounding.
            let slope = (4.0 * central(step / 2.0) - central(step)) / 3.0;
            let error = (slope - grad[at]).abs();
            let bound = 3e-7 * grad[at].abs().max(0.01);
            assert!(error < bound, "{name}: {param} [{at}]: {slope:e}, gradient {:e}", grad[at]);
        }
        set(model, &param, start);
    }
}

#[test]
fn gradients_are_the_objective_s_differences() {
    for (name, recipe) in smooth_forms() {
        assert_gradients(name, &model(&recipe), |_| true);
    }
    // The DTG gate's input is a constant to it: in one block all but what is before the block are derivatives.
    let gated = Recipe { dtg_enabled: true, num_layers: 1, mamba_layers: vec![], ..pr1382() };
    let inside = |name: &str| name.starts_with("blocks.0.") && !name.ends_with("resid_mix");
    assert_gradients("DTG gate", &model(&gated), inside);
}

#[test]
fn checkpointed_blocks_give_the_same_loss_and_gradients() {
    let mut all = forms();
    let baseline = Recipe { num_layers: 5, rope_dims: 16, ..tiny("challenge") };
    all.push(("challenge", baseline));
    for (name, recipe) in all {
        let plain = model(&recipe);
        let checkpointed = model(&Recipe { checkpoint_blocks: true, ..recipe });
        let (a, b) = (accumulate(&plain), accumulate(&checkpointed));
        assert!((a - b).abs() < 1e-13, "{name}: {a} and {b}");
        let (a, b) = (take_grads(&plain), take_grads(&checkpointed));
        for (param, grad) in &a {
            match (grad, &b[param]) {
                (Some(x), Some(y)) => {
                    let error = largest_difference(x, y);
                    let scale = x.iter().fold(1e-3f64, |most, v| most.max(v.abs()));
                    assert!(error < 1e-11 * scale, "{name}: {param}: {error:e} of {scale:e}");
                }
                (x, y) => assert_eq!(x, y, "{name}: {param}"),
            }
        }
    }
    // PR #1382's own switch.
    let switched = model(&Recipe { mamba_grad_checkpoint: true, ..pr1382() });
    let checkpoints = |model: &Model<Cpu>| -> Vec<bool> {
        model.plan().blocks.iter().map(|block| block.checkpoint).collect()
    };
    assert_eq!(checkpoints(&switched), [true, true, false, false, true]);
    assert_eq!(accumulate(&switched), accumulate(&model(&Recipe { checkpoint_blocks: true, ..pr1382() })));
}
