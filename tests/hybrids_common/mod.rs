//! What the tests of the hybrid systems as models share: tiny recipes of each, and a model's numbers, in f64 on the CPU.

#![allow(dead_code)]

use burn::tensor::{DType, Int, Tensor, TensorData};
use fairway::backend::cpu::Cpu;
use fairway::model::Model;
use fairway::recipe::{PR1382, PR1607, PR1994, Recipe};
use std::collections::BTreeMap;

pub const VOCAB: usize = 17;

pub fn device() -> burn_ndarray::NdArrayDevice {
    burn_ndarray::NdArrayDevice::Cpu
}

/// A small recipe of a system: 4 layers of width 24, heads of 6.
pub fn tiny(system: &str) -> Recipe {
    Recipe {
        system: system.into(),
        vocab_size: VOCAB,
        num_layers: 4,
        model_dim: 24,
        num_heads: 4,
        num_kv_heads: 2,
        rope_dims: if system == PR1382 { 4 } else { 16 },
        as_written: false,
        ..Recipe::default()
    }
}

/// PR #1994: every block attention beside a state space layer.
pub fn pr1994(ssm: &str) -> Recipe {
    Recipe {
        num_unique_layers: 2,
        num_loops: 2,
        parallel_layer_positions: vec![0, 1],
        parallel_ssm_type: ssm.into(),
        mamba2_kill_selectivity: ssm == "mamba2_kill",
        mamba2_headdim: 8,
        mamba2_d_state: 5,
        mamba2_chunk_size: 4,
        s4d_d_state: 3,
        mlp_type: "swiglu".into(),
        ..tiny(PR1994)
    }
}

/// PR #1607 with its recurrence on from the start.
pub fn pr1607() -> Recipe {
    Recipe {
        mamba3_headdim: 8,
        mamba3_d_state: 8,
        mamba3_chunk_size: 4,
        bigram_buckets: 31,
        bigram_hash_dim: 8,
        recur_layers: vec![1, 2],
        recur_repeats: 2,
        recur_start_frac: 0.0,
        mlp_type: "leaky_relu2".into(),
        ..tiny(PR1607)
    }
}

/// PR #1382: attention in layers 2 and 3 of 5, the rotation's base growing beyond 8 positions.
pub fn pr1382() -> Recipe {
    Recipe {
        num_layers: 5,
        mamba_layers: vec![0, 1, 4],
        mamba_d_state: 3,
        bigram_vocab_size: 29,
        bigram_dim: 8,
        rope_train_seq_len: 8,
        mlp_type: "leaky_relu2".into(),
        ..tiny(PR1382)
    }
}

/// One of each system.
pub fn systems() -> Vec<(&'static str, Recipe)> {
    vec![
        ("challenge", tiny("challenge")),
        ("pr1994", pr1994("mamba2_kill")),
        ("pr1607", pr1607()),
        // Its rotation depends on the length of the sequence from 8 on.
        ("pr1382", pr1382()),
    ]
}

/// Every mixer form and option, but those whose gradient is no derivative: ternary weights and the DTG gate.
pub fn smooth_forms() -> Vec<(&'static str, Recipe)> {
    let alone = |layers: usize| Recipe {
        num_unique_layers: 0,
        num_loops: 1,
        num_layers: layers,
        parallel_layer_positions: vec![],
        mamba2_layer_positions: vec![0, 1],
        ..pr1994("mamba2")
    };
    let attention = Recipe { mamba_layers: vec![0, 5], num_layers: 6, ..pr1382() };
    vec![
        ("attention || kill, looped", pr1994("mamba2_kill")),
        ("attention || Mamba-2, looped", pr1994("mamba2")),
        ("attention || S4D-Lin, parallel residual", Recipe { parallel_residual: true, ..pr1994("s4d_lin") }),
        (
            "Mamba-2, attention, S4D-Lin in a U-Net with hashed pairs",
            Recipe { attn_layer_positions: vec![2], bigram_vocab_size: 29, bigram_dim: 8, ..alone(4) },
        ),
        ("official Mamba-2 in two groups", Recipe { mamba2_gated_norm: true, mamba2_ngroups: 2, ..alone(2) }),
        ("Mamba-2 without its scan", Recipe { mamba2_skip_scan: true, ..alone(2) }),
        ("Mamba-3, recurring", pr1607()),
        (
            "Mamba-3 in two groups, value embedding, untied MLPs",
            Recipe {
                mamba3_ngroups: 2,
                num_attn_layers: 2,
                ve_enabled: true,
                ve_dim: 8,
                rope_fraction: 0.7,
                recur_mode: "untie_mlp".into(),
                ..pr1607()
            },
        ),
        (
            "Mamba-3 without recurrence, hash and smear gate",
            Recipe {
                recur_layers: vec![],
                use_bigram_hash: false,
                use_smeargate: false,
                parallel_residual: true,
                tie_embeddings: false,
                ..pr1607()
            },
        ),
        ("Mamba-1", pr1382()),
        (
            "attention with every option",
            Recipe {
                trigram: true,
                gated_attention: true,
                value_residual: true,
                ve_enabled: true,
                ve_dim: 8,
                ve_layers: vec![1, 3],
                xsa_last_n: 4,
                mtp_num_heads: 2,
                ..attention.clone()
            },
        ),
        (
            "attention with plain norms, no smear gate, an untied head",
            Recipe {
                ln_scale: false,
                use_smeargate: false,
                xsa_last_n: 0,
                rope_dims: 0,
                bigram_vocab_size: 0,
                tie_embeddings: false,
                mlp_type: "swiglu".into(),
                ..attention
            },
        ),
    ]
}

/// Every form, those included whose gradient is no derivative.
pub fn forms() -> Vec<(&'static str, Recipe)> {
    let mut forms = smooth_forms();
    forms.push(("ternary, looped", Recipe { ternary_body: true, ..pr1994("mamba2_kill") }));
    forms.push(("ternary Mamba-3", Recipe { use_ternary: true, ..pr1607() }));
    forms.push(("DTG gates", Recipe { dtg_enabled: true, value_residual: true, num_layers: 6, ..pr1382() }));
    forms
}

/// A model whose parameters are all far from their special starts (zeros, ones), the same for the same names.
pub fn model(recipe: &Recipe) -> Model<Cpu> {
    let model = Model::<Cpu>::new(recipe, &device(), DType::F64).expect("a model");
    for param in model.params().iter() {
        let mut state =
            param.name().bytes().fold(9u64, |state, byte| state.wrapping_mul(31) + u64::from(byte));
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        let _ = [draw(), draw()];
        let values: Vec<f64> = (0..param.numel()).map(|_| 0.6 * draw()).collect();
        set(&model, param.name(), values);
    }
    model
}

pub fn set(model: &Model<Cpu>, name: &str, values: Vec<f64>) {
    let param = model.params().get(name).unwrap_or_else(|| panic!("no {name}"));
    let shape = [values.len()];
    param.set_flat(Tensor::from_data(TensorData::new(values, shape), (&device(), DType::F64)));
}

pub fn fill(model: &Model<Cpu>, part: &str, value: f64) {
    let names: Vec<(String, usize)> = model
        .params()
        .iter()
        .filter(|param| param.name().contains(part))
        .map(|param| (param.name().to_string(), param.numel()))
        .collect();
    assert!(!names.is_empty(), "no parameter has {part} in its name");
    names.into_iter().for_each(|(name, count)| set(model, &name, vec![value; count]));
}

pub fn get(model: &Model<Cpu>, name: &str) -> Vec<f64> {
    values(model.params().get(name).unwrap_or_else(|| panic!("no {name}")).flat())
}

pub fn ids(seed: usize, shape: [usize; 2]) -> Tensor<Cpu, 2, Int> {
    let values: Vec<i64> =
        (0..shape[0] * shape[1]).map(|i| ((i * i + seed * (i + 3)) % VOCAB) as i64).collect();
    Tensor::from_data(TensorData::new(values, shape), &device())
}

pub fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    x.into_data().to_vec().expect("f64 values")
}

pub fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

pub fn logits(model: &Model<Cpu>, ids: Tensor<Cpu, 2, Int>) -> Vec<f64> {
    values(model.logits::<Cpu>(model.hidden::<Cpu>(ids, None, None)))
}

/// The largest difference of two models' logits.
pub fn apart(a: &Model<Cpu>, b: &Model<Cpu>) -> f64 {
    largest_difference(&logits(a, ids(3, [2, 11])), &logits(b, ids(3, [2, 11])))
}

pub const ROWS: usize = 2;
pub const TIME: usize = 9;

/// Training's objective on a batch; its gradients are added to the parameters'.
pub fn accumulate(model: &Model<Cpu>) -> f64 {
    let share =
        Tensor::from_data(TensorData::new(vec![1.0 / (ROWS * TIME) as f64], [1]), (&device(), DType::F64));
    values(model.accumulate(ids(1, [ROWS, TIME]), ids(2, [ROWS, TIME]), &share))[0]
}

/// The same without gradients.
pub fn objective(model: &Model<Cpu>) -> f64 {
    if model.plan().ahead.is_some() {
        let objective = accumulate(model);
        model.params().clear_grads();
        return objective;
    }
    let nll = values(model.nll::<Cpu>(ids(1, [ROWS, TIME]), ids(2, [ROWS, TIME])));
    nll.iter().sum::<f64>() / (ROWS * TIME) as f64
}

pub fn take_grads(model: &Model<Cpu>) -> BTreeMap<String, Option<Vec<f64>>> {
    let grad =
        |param: &fairway::ops::Param<Cpu>| (param.name().to_string(), param.take_flat_grad().map(values));
    model.params().iter().map(grad).collect()
}

pub fn built_in(name: &str, sets: &[&str]) -> Recipe {
    let mut recipe = Recipe::load(name).unwrap();
    sets.iter().for_each(|set| recipe.set(set).unwrap());
    recipe
}
