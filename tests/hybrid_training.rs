//! How the three hybrid systems train, against values worked out by hand: weight forms, groups, Muon's variants, storage
//! in bfloat16, clipping, averages. In f64 on the CPU.

use burn::tensor::{DType, Int, Tensor, TensorData};
use fairway::backend::cpu::Cpu;
use fairway::model::Model;
use fairway::model::plan::Plan;
use fairway::ops::Param;
use fairway::ops::hash::Hash;
use fairway::ops::weight_form::{self, WeightForm};
use fairway::optim::averages::{Averages, Averaging};
use fairway::optim::muon::{Muon, MuonConfig, MuonParam, NewtonSchulz};
use fairway::optim::schedule::{lr_multiplier, muon_momentum};
use fairway::optim::{Group, Optimizers, group_of};
use fairway::recipe::{PR1382, PR1607, PR1994, Recipe};
use half::bf16;

fn device() -> burn_ndarray::NdArrayDevice {
    burn_ndarray::NdArrayDevice::Cpu
}

fn matrix(rows: &[&[f64]]) -> Tensor<Cpu, 2> {
    let values: Vec<f64> = rows.concat();
    Tensor::from_data(TensorData::new(values, [rows.len(), rows[0].len()]), (&device(), DType::F64))
}

fn row(values: &[f64]) -> Tensor<Cpu, 1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (&device(), DType::F64))
}

fn values<const D: usize>(x: Tensor<Cpu, D>) -> Vec<f64> {
    x.into_data().to_vec().expect("f64 values")
}

#[track_caller]
fn assert_close(found: &[f64], expected: &[f64], bound: f64) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= bound, "element {index}: {found:e}, expected {expected:e}");
    }
}

fn tiny(system: &str) -> Recipe {
    let own = match system {
        PR1994 => Recipe {
            num_unique_layers: 2,
            num_loops: 2,
            parallel_layer_positions: vec![0, 1],
            parallel_ssm_type: "mamba2_kill".into(),
            mamba2_kill_selectivity: true,
            mamba2_headdim: 8,
            mamba2_d_state: 4,
            bigram_vocab_size: 13,
            bigram_dim: 8,
            ternary_body: true,
            mlp_type: "swiglu".into(),
            ..Recipe::default()
        },
        PR1607 => Recipe {
            mamba3_headdim: 8,
            mamba3_d_state: 8,
            bigram_buckets: 13,
            bigram_hash_dim: 8,
            recur_layers: vec![1, 2],
            recur_start_frac: 0.0,
            ..Recipe::default()
        },
        _ => Recipe {
            mamba_layers: vec![0, 3],
            mamba_d_state: 4,
            rope_dims: 4,
            bigram_vocab_size: 13,
            bigram_dim: 8,
            muon_wd: 0.04,
            ..Recipe::default()
        },
    };
    Recipe {
        system: system.into(),
        vocab_size: 17,
        num_layers: 4,
        model_dim: 16,
        num_heads: 2,
        num_kv_heads: 1,
        ..own
    }
}

fn built(recipe: &Recipe) -> Model<Cpu> {
    Model::<Cpu>::new(recipe, &device(), DType::F64).expect("a model")
}

/// Accumulates the gradients of one batch of 2 x 8 tokens.
fn accumulate(model: &Model<Cpu>) {
    let ids = |seed: usize| -> Tensor<Cpu, 2, Int> {
        let values: Vec<i64> = (0..16).map(|i| ((i * i + seed * (i + 3)) % 17) as i64).collect();
        Tensor::from_data(TensorData::new(values, [2, 8]), &device())
    };
    model.accumulate(ids(1), ids(2), &row(&[1.0 / 16.0]));
}

fn get(model: &Model<Cpu>, name: &str) -> Vec<f64> {
    values(model.params().get(name).unwrap_or_else(|| panic!("no {name}")).flat())
}

#[test]
fn ternary_weights_and_their_gradients() {
    // The mean magnitude is 0.5: quotients 1, -2, 0.2, 0.8.
    let w = matrix(&[&[0.5, -1.0], &[0.1, 0.4]]);
    let g = matrix(&[&[1.0, 2.0], &[3.0, 4.0]]);
    let used = |w: &Tensor<Cpu, 2>, form| values(weight_form::apply(w.clone(), form));
    let grad = |w: &Tensor<Cpu, 2>, form| values(weight_form::gradient(w.clone(), g.clone(), form));
    for form in [WeightForm::BitLinear, WeightForm::ScaledTernary] {
        assert_close(&used(&w, form), &[0.5, -0.5, 0.0, 0.5], 1e-15);
    }
    // 0.5 g + sign(w) (1 - 2 + 4) / 4.
    assert_close(&grad(&w, WeightForm::BitLinear), &[1.25, 0.25, 2.25, 2.75], 1e-14);
    // g + sign(w) (0 + 2 - 0.6 + 0.8) / 4.
    assert_close(&grad(&w, WeightForm::ScaledTernary), &[1.55, 1.45, 3.55, 4.55], 1e-14);
    // Ties go to even: quotients 0.5, -1.5, 1.5, 0.5.
    let ties = matrix(&[&[0.25, -0.75], &[0.75, 0.25]]);
    assert_eq!(used(&ties, WeightForm::BitLinear), [0.0, -0.5, 0.5, 0.0]);
    // Zeros, and magnitudes below the floor: the scale is a constant.
    let zeros = matrix(&[&[0.0, 0.0], &[0.0, 0.0]]);
    assert_eq!(used(&zeros, WeightForm::BitLinear), [0.0; 4]);
    assert_close(&grad(&zeros, WeightForm::BitLinear), &[1e-8, 2e-8, 3e-8, 4e-8], 1e-22);
    let small = matrix(&[&[8e-9, 8e-9], &[-8e-9, 1e-9]]);
    assert_close(&used(&small, WeightForm::BitLinear), &[1e-8, 1e-8, -1e-8, 0.0], 1e-22);
    assert_close(&grad(&small, WeightForm::BitLinear), &[1e-8, 2e-8, 3e-8, 4e-8], 1e-22);
    assert_close(&grad(&small, WeightForm::ScaledTernary), &[1.0, 2.0, 3.0, 4.0], 1e-15);
}

#[test]
fn fake_int6_codes() {
    let symmetric = WeightForm::fake_int_symmetric(6);
    assert_eq!(symmetric, WeightForm::FakeInt { low: -31, high: 31, floor: 1.0 / 31.0 });
    assert_eq!(
        WeightForm::fake_int_symmetric(5),
        WeightForm::FakeInt { low: -15, high: 15, floor: 1.0 / 15.0 }
    );
    assert_eq!(
        WeightForm::fake_int6_asymmetric(),
        WeightForm::FakeInt { low: -32, high: 31, floor: 1.0 / 31.0 }
    );
    // Steps of 1, 2 and the floor of 1/31; halves to even.
    let w =
        matrix(&[&[31.0, -15.5, 0.5, 1.5], &[-62.0, 3.0, 5.0, -1.1], &[0.01, -0.02, 0.5 / 31.0, 1.5 / 31.0]]);
    for form in [symmetric, WeightForm::fake_int6_asymmetric()] {
        let used = values(weight_form::apply(w.clone(), form));
        assert_eq!(used[..8], [31.0, -16.0, 0.0, 2.0, -62.0, 4.0, 4.0, -2.0], "{form:?}");
        assert_close(&used[8..], &[0.0, -1.0 / 31.0, 0.0, 2.0 / 31.0], 1e-17);
        assert_eq!(values(weight_form::gradient(w.clone(), w.clone(), form)), values(w.clone()));
    }
}

#[test]
fn hashes_of_neighbouring_tokens() {
    let tokens = [5i64, 1023, 0, 65_535, 7, 7, 40_000];
    let ids = || Tensor::<Cpu, 2, Int>::from_data(TensorData::new(tokens.to_vec(), [1, 7]), &device());
    let rows = |hash: Hash, buckets: usize, triple: bool| -> Vec<i64> {
        hash.buckets(ids(), None, 0, buckets, triple).into_data().convert::<i64>().to_vec().unwrap()
    };
    let before = |i: usize, places: usize| if i >= places { tokens[i - places] } else { 0 };
    let product: Vec<i64> = (0..7).map(|i| (92_821 * before(i, 1) + tokens[i]) % 4096).collect();
    // By hand: 92,821 * 5 + 1,023 = 465,128 = 113 * 4,096 + 2,280.
    assert_eq!(product[..2], [5, 2280]);
    assert_eq!(rows(Hash::Product, 4096, false), product);
    let word = |token: i64, factor: i32| (token as i32).wrapping_mul(factor);
    let pair = |i: usize| word(tokens[i], 36_313) ^ word(before(i, 1), 27_191);
    let pairs: Vec<i64> =
        (0..7).map(|i| if i < 1 { 2047 } else { i64::from(pair(i).rem_euclid(2047)) }).collect();
    assert_eq!(rows(Hash::Xor, 2048, false), pairs);
    let triple = |i: usize| i64::from((pair(i) ^ word(before(i, 2), 51_497)).rem_euclid(2047));
    let triples: Vec<i64> = (0..7).map(|i| if i < 2 { 2047 } else { triple(i) }).collect();
    assert_eq!(rows(Hash::Xor, 2048, true), triples);
}

#[test]
fn parameters_are_dealt_out_as_the_source_systems_do() {
    let count = |name: &str, group: Group| {
        let recipe = Recipe::load(name).unwrap();
        let plan = Plan::of(&recipe).unwrap();
        let own = plan.specs.iter().filter(|spec| group_of(&recipe, &spec.name, spec.shape.len()) == group);
        own.count()
    };
    // spec/pr1994.md section 3: 9 matrices a block.
    assert_eq!((count("pr1994", Group::Matrix), count("pr1994", Group::Embedding)), (63, 1));
    assert_eq!(count("pr1994", Group::Scalar), 148 - 64);
    // 7 blocks of 4 matrices, one of 6, the projection of the hashed pairs.
    assert_eq!((count("pr1607", Group::Matrix), count("pr1607", Group::Embedding)), (35, 1));
    // 15 blocks of 4; 3 of 6 in banks; E and the hashed table.
    assert_eq!((count("pr1382", Group::MambaMatrix), count("pr1382", Group::Matrix)), (60, 18));
    assert_eq!(count("pr1382", Group::Embedding), 2);
    for (system, name, rank, group) in [
        ("pr1994", "bigram_hash.embed.weight", 2, Group::Matrix),
        ("pr1994", "bigram_hash.scale", 0, Group::Scalar),
        ("pr1994", "blocks.0.s4d.conv1d.weight", 3, Group::Scalar),
        ("pr1994", "blocks.0.resid_mix", 2, Group::Scalar),
        ("pr1994", "blocks.1.attn.A_im", 2, Group::Scalar),
        ("pr1607", "bigram_hash.table.weight", 2, Group::Scalar),
        ("pr1607", "blocks.0.mamba3.mamba3.B_bias", 3, Group::Scalar),
        ("pr1607", "ve_shared.embed.weight", 2, Group::Embedding),
        ("pr1607", "ve_shared.proj.weight", 2, Group::Matrix),
        ("pr1607", "recur_mlps.3.fc.weight", 2, Group::Nothing),
        ("pr1382", "mamba_blocks.0.A_log", 2, Group::Scalar),
        ("pr1382", "bigram.proj.weight", 2, Group::Scalar),
        ("pr1382", "ve_shared.embed.weight", 2, Group::Embedding),
        ("pr1382", "ve_shared.proj.weight", 2, Group::Scalar),
        ("pr1382", "mtp_heads.0.weight", 2, Group::Matrix),
        ("pr1382", "blocks.0.attn.attn_gate.weight", 2, Group::Scalar),
        ("pr1382", "skip_weights", 2, Group::Scalar),
    ] {
        assert_eq!(group_of(&Recipe::load(system).unwrap(), name, rank), group, "{name} of {system}");
    }
}

const EXACT: NewtonSchulz =
    NewtonSchulz { steps: 3, coefficients: [3.4445, -4.7750, 2.0315], eps: 1e-7, bf16: false };

fn muon(param: &Param<Cpu>, lrs: &[f64], shards: usize, weight_decay: f64) -> Muon<Cpu> {
    let config = MuonConfig { newton_schulz: EXACT, nesterov: true, weight_decay, dtype: DType::F64, shards };
    let one =
        MuonParam { param: param.clone(), lrs: lrs.to_vec(), bf16: false, bf16_state: false, whole: false };
    Muon::new(vec![one], config)
}

fn start() -> Tensor<Cpu, 2> {
    matrix(&[&[0.3, -0.2, 0.5], &[0.1, 0.9, -0.4], &[-0.7, 0.2, 0.6], &[0.4, 0.4, 0.1], &[0.8, -0.5, 0.2]])
}

fn gradient() -> Tensor<Cpu, 2> {
    matrix(&[&[1.0, 0.2, -0.3], &[-0.4, 0.5, 0.7], &[0.6, -0.1, 0.2], &[0.3, 0.8, -0.9], &[-0.2, 0.1, 0.4]])
}

/// Newton-Schulz of rows `from..to`.
fn orthogonal(x: &Tensor<Cpu, 2>, from: usize, to: usize) -> Tensor<Cpu, 2> {
    let part = x.clone().narrow(0, from, to - from);
    EXACT.apply(part.reshape([1, to - from, 3])).reshape([to - from, 3])
}

#[test]
fn row_shards_are_orthogonalised_one_by_one() {
    let param = Param::<Cpu>::new("w", start(), DType::F64);
    param.accumulate(gradient());
    // 5 rows over 2 ranks: 3 and 2.
    muon(&param, &[0.1], 2, 0.0).step(0.5, 0.9, None);
    let update = gradient().mul_scalar(1.9);
    let parts = Tensor::cat(vec![orthogonal(&update, 0, 3), orthogonal(&update, 3, 5)], 0);
    let scale = (5.0f64 / 3.0).sqrt();
    let expected = values(start() - parts.mul_scalar(0.05 * scale));
    assert_close(&values(param.value::<2>()), &expected, 1e-14);
    let whole = values(start() - orthogonal(&update, 0, 5).mul_scalar(0.05 * scale));
    assert!(whole.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1e-3), "shards make a difference");
}

#[test]
fn a_double_update_is_two_updates_from_one_gradient() {
    let (mu, decay, scale) = (0.9, 0.04, (5.0f64 / 3.0).sqrt());
    let once = |w: Tensor<Cpu, 2>, buffer: &Tensor<Cpu, 2>, g: &Tensor<Cpu, 2>, lr: f64| {
        let update = g.clone() + buffer.clone().mul_scalar(mu);
        w.mul_scalar(1.0 - lr * decay) - orthogonal(&update, 0, 5).mul_scalar(lr * scale)
    };
    let param = Param::<Cpu>::new("w", start(), DType::F64);
    let mut double = muon(&param, &[0.1, 0.06], 1, decay);
    let (mut w, mut buffer) = (start(), gradient().zeros_like());
    for (step, share) in [1.0, -0.5].into_iter().enumerate() {
        let g = gradient().mul_scalar(share);
        param.accumulate(g.clone());
        double.step(0.5, mu, None);
        for lr in [0.05, 0.03] {
            buffer = buffer.mul_scalar(mu) + g.clone();
            w = once(w, &buffer, &g, lr);
        }
        assert_close(&values(param.value::<2>()), &values(w.clone()), 1e-14);
        assert!(param.flat_grad().is_none(), "step {step} takes the gradient");
    }
    // On several ranks the second update is of the whole matrix, with a momentum of its own (quirk C).
    let param = Param::<Cpu>::new("w", start(), DType::F64);
    param.accumulate(gradient());
    muon(&param, &[0.1, 0.06], 2, decay).step(1.0, mu, None);
    let update = gradient().mul_scalar(1.0 + mu);
    let parts = Tensor::cat(vec![orthogonal(&update, 0, 3), orthogonal(&update, 3, 5)], 0);
    let first = start().mul_scalar(1.0 - 0.1 * decay) - parts.mul_scalar(0.1 * scale);
    let second = once(first, &gradient(), &gradient(), 0.06);
    assert_close(&values(param.value::<2>()), &values(second), 1e-14);
}

/// A parameter's name, and its values before and after a step.
type Moved = (String, Vec<f64>, Vec<f64>);

/// A model after one step with a fresh optimizer.
fn stepped(recipe: &Recipe) -> (Model<Cpu>, Vec<Moved>) {
    let model = built(recipe);
    let names: Vec<String> = model.params().iter().map(|param| param.name().to_string()).collect();
    let before: Vec<Vec<f64>> = names.iter().map(|name| get(&model, name)).collect();
    accumulate(&model);
    Optimizers::new(recipe, &model).step(1.0, 0.9);
    let after: Vec<Vec<f64>> = names.iter().map(|name| get(&model, name)).collect();
    let rows = names.into_iter().zip(before).zip(after).map(|((name, before), after)| (name, before, after));
    (model, rows.collect())
}

#[test]
fn repeated_mlps_are_trained_unless_as_written() {
    for as_written in [true, false] {
        let recipe = Recipe { recur_mode: "untie_mlp".into(), as_written, ..tiny(PR1607) };
        let (model, rows) = stepped(&recipe);
        assert!(model.params().iter().all(|param| param.flat_grad().is_none()), "no gradient is left over");
        let extra: Vec<_> = rows.iter().filter(|(name, ..)| name.starts_with("recur_mlps.")).collect();
        assert_eq!(extra.len(), 4);
        for (name, before, after) in extra {
            assert_eq!(before != after, !as_written, "{name}, as_written = {as_written}");
        }
        let (_, before, after) = rows.iter().find(|(name, ..)| name == "blocks.1.mlp.proj.weight").unwrap();
        assert!(before != after);
    }
}

#[test]
fn what_the_source_keeps_in_bf16_stays_in_bf16_as_written() {
    let is_bf16 = |values: &[f64]| values.iter().all(|v| bf16::from_f64(*v).to_f64() == *v);
    for system in [PR1994, PR1607, PR1382] {
        for as_written in [true, false] {
            let recipe = Recipe { as_written, ..tiny(system) };
            let (model, rows) = stepped(&recipe);
            let mut kept = 0;
            for (spec, (name, before, after)) in model.plan().specs.iter().zip(&rows) {
                assert_eq!(&spec.name, name);
                if spec.bf16 && as_written {
                    assert!(is_bf16(before) && is_bf16(after), "{name} of {system}");
                    kept += 1;
                }
                if name == "tok_emb.weight" {
                    assert!(spec.bf16 && before != after, "{system}");
                    assert_eq!(is_bf16(after), as_written, "{system}");
                }
            }
            let other = match system {
                PR1994 => "blocks.0.s4d.dt_bias",
                PR1607 => "blocks.0.mamba3.mamba3.in_proj.weight",
                _ => "mamba_blocks.0.in_proj.weight",
            };
            assert!(!is_bf16(&get(&model, other)), "{other} is in float32");
            if as_written {
                // E and the bodies' 9 matrices of 2 blocks, and the hashed table; E and table; E, table and 4 of each
                // of 2 Mamba blocks (spec files, on types).
                let expected = match system {
                    PR1994 => 1 + 18 + 1,
                    PR1607 => 2,
                    _ => 2 + 8,
                };
                assert_eq!(kept, expected, "{system}");
            }
        }
    }
}

#[test]
fn clipping_is_by_the_norm_of_all_gradients() {
    let scale = |clip: f64, factor: f64| {
        let recipe = Recipe { grad_clip_norm: clip, ..tiny(PR1382) };
        let model = built(&recipe);
        // Norms 3 and 4 in two groups of different optimizers.
        let [a, b] =
            ["tok_emb.weight", "mamba_blocks.0.in_proj.weight"].map(|name| model.params().get(name).unwrap());
        for (param, value) in [(a, 3.0), (b, -4.0)] {
            let mut grad = vec![0.0; param.numel()];
            grad[5] = value * factor;
            param.accumulate_flat(row(&grad));
        }
        Optimizers::new(&recipe, &model).clip_scale().map(|scale| values(scale)[0])
    };
    assert!((scale(0.3, 1.0).unwrap() - 0.3 / (5.0 + 1e-6)).abs() < 1e-15);
    assert!((scale(0.3, 0.1).unwrap() - 0.3 / (0.5 + 1e-6)).abs() < 1e-15);
    assert_eq!((scale(0.3, 0.05), scale(0.0, 1.0)), (Some(1.0), None));
    assert_eq!(Recipe::load("pr1382").unwrap().grad_clip_norm, 0.3);
}

/// The average of the embedding after each of some steps, at which its elements all are `weights`.
fn averages(recipe: &Recipe, weights: &[(f64, f64)]) -> Vec<Option<f64>> {
    let model = built(recipe);
    let param = model.params().get("tok_emb.weight").unwrap();
    let fill = |value: f64| param.set_flat(param.flat().zeros_like().add_scalar(value));
    fill(1.0);
    let mut averages = Averages::new(recipe, &model, false);
    let after = |(index, (weight, lr_mul)): (usize, &(f64, f64))| {
        fill(*weight);
        averages.update(index + 1, *lr_mul);
        averages.average("tok_emb.weight").map(|average| values(average)[3])
    };
    weights.iter().enumerate().map(after).collect()
}

#[track_caller]
fn assert_averages(found: &[Option<f64>], expected: &[Option<f64>]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        match (found, expected) {
            (Some(a), Some(b)) => assert!((a - b).abs() < 1e-14, "{a}, expected {b}"),
            (a, b) => assert_eq!(a, b),
        }
    }
}

#[test]
fn averages_are_those_of_the_specs() {
    let weights = [(2.0, 1.0), (4.0, 1.0), (8.0, 0.3), (16.0, 0.2), (32.0, 0.1)];
    // From the start on, PR #1607's and #1382's: 0.9 a + 0.1 w from a = 1.
    let decayed = |a: f64, w: f64| 0.9 * a + 0.1 * w;
    let mut running = 1.0;
    let ema: Vec<Option<f64>> = weights
        .iter()
        .map(|(w, _)| {
            running = decayed(running, *w);
            Some(running)
        })
        .collect();
    for system in [PR1607, PR1382] {
        assert_averages(&averages(&Recipe { ema_decay: 0.9, ..tiny(system) }, &weights), &ema);
    }
    // PR #1994's is the weights up to the step before the offset: here 3 completed ones.
    let offset = Recipe { ema_beta: 0.9, lr_warmup_steps: 3, ..tiny(PR1994) };
    let third = decayed(4.0, 8.0);
    let fourth = decayed(third, 16.0);
    let expected = [2.0, 4.0, third, fourth, decayed(fourth, 32.0)].map(Some);
    assert_averages(&averages(&offset, &weights), &expected);
    let own = Recipe { ema_warmup_offset: Some(0), ..offset.clone() };
    assert_averages(&averages(&own, &weights), &ema);
    assert_averages(&averages(&Recipe { ema_beta: 0.0, ..offset }, &weights), &[None; 5]);

    // Snapshots every 2 steps at multipliers below 0.4, only where the other average is off.
    let swa = Recipe { ema_enabled: false, swa_every: 1, swa_start_frac: 0.25, ..tiny(PR1607) };
    assert_averages(&averages(&swa, &weights), &[None, None, None, Some(16.0), Some(24.0)]);
    let second = Recipe { swa_every: 2, swa_start_frac: 1.0, ..swa.clone() };
    let few = [(2.0, 0.5), (4.0, 0.5), (8.0, 0.5), (16.0, 1.0), (32.0, 0.5), (64.0, 0.5)];
    let expected = [None, Some(4.0), Some(4.0), Some(4.0), Some(4.0), Some(34.0)];
    assert_averages(&averages(&second, &few), &expected);
    assert_eq!(Averaging::of(&Recipe { swa_enabled: false, ..swa }), Averaging::Nothing);

    // The mean of the last 2 of one snapshot each step; until there are two, the other average.
    let lawa = Recipe { lawa_enabled: true, lawa_k: 2, lawa_freq: 1, ema_decay: 0.9, ..tiny(PR1382) };
    let expected = [ema[0], Some(3.0), Some(6.0), Some(12.0), Some(24.0)];
    assert_averages(&averages(&lawa, &weights), &expected);
    // PR #1382 collects its snapshots and never uses them.
    assert_eq!(Averaging::of(&tiny(PR1382)), Averaging::Ema { decay: 0.997, offset: 0 });
}

#[test]
fn an_average_takes_the_weights_place_in_their_own_type() {
    for storage in [true, false] {
        let recipe = tiny(PR1607);
        let model = built(&recipe);
        let param = model.params().get("tok_emb.weight").unwrap();
        let mut averages = Averages::new(&recipe, &model, storage);
        let start = values(param.flat())[0];
        param.set_flat(param.flat().add_scalar(1.0));
        averages.update(1, 1.0);
        averages.apply();
        let expected = 0.997 * start + 0.003 * (start + 1.0);
        let expected = if storage { bf16::from_f64(expected).to_f64() } else { expected };
        assert_close(&get(&model, "tok_emb.weight")[..1], &[expected], 1e-15);
    }
}

#[test]
fn decay_is_the_systems_own() {
    let decay = |name: &str| {
        let recipe = Recipe::load(name).unwrap();
        (recipe.muon_decay(), recipe.adam_decay())
    };
    assert_eq!([decay("baseline"), decay("pr1994")], [(0.0, 0.0); 2]);
    assert_eq!((decay("pr1607"), decay("pr1382")), ((0.04, 0.0), (0.04, 0.04)));
    // Of a vector without a gradient nothing changes; with one, AdamW takes lr wd of it and lr of its sign.
    let recipe = Recipe { scalar_lr: 0.5, adam_wd: 0.1, as_written: false, ..tiny(PR1382) };
    let model = built(&recipe);
    let param = model.params().get("mamba_blocks.0.D").unwrap();
    param.accumulate_flat(row(&vec![2.0; param.numel()]));
    Optimizers::new(&recipe, &model).step(0.4, 0.9);
    let expected = 1.0 * (1.0 - 0.2 * 0.1) - 0.2 / (1.0 + 1e-8 / 2.0);
    assert_close(&get(&model, "mamba_blocks.0.D")[..2], &[expected; 2], 1e-14);
    assert_eq!(get(&model, "mamba_blocks.1.D")[0], 1.0);
}

#[test]
fn rates_and_momenta_follow_the_recipes() {
    let recipe = |name: &str| Recipe::load(name).unwrap();
    let ternary = Recipe { max_wallclock_seconds: 0.0, iterations: 4380, ..recipe("pr1994") };
    let mul = |step| lr_multiplier(&ternary, step, 0.0);
    assert_close(&[mul(0), mul(14), mul(29), mul(30)], &[1.0 / 30.0, 0.5, 1.0, 1.0], 1e-15);
    assert_close(&[mul(2580), mul(3480), mul(4379)], &[1.0, 0.5, 1.0 / 1800.0], 1e-15);
    // At 822 ms a step the hour's fall begins when 1,479.6 s are left.
    let hour =
        |elapsed_s: f64| lr_multiplier(&recipe("pr1994"), (elapsed_s / 0.822) as usize, elapsed_s * 1000.0);
    assert_eq!(hour(2100.0), 1.0);
    assert!((hour(2860.2) - 0.5).abs() < 1e-3, "{}", hour(2860.2));
    let hinge = recipe("pr1607");
    assert_close(
        &[lr_multiplier(&hinge, 0, 0.0), lr_multiplier(&hinge, 999, 0.0)],
        &[1000.0 / 3500.0, 1.0 / 3500.0],
        1e-15,
    );
    let momenta = |name: &str, steps: [usize; 3]| steps.map(|step| muon_momentum(&recipe(name), step));
    assert_close(&momenta("pr1994", [0, 250, 500]), &[0.85, 0.9, 0.95], 1e-15);
    assert_close(&momenta("pr1607", [0, 250, 900]), &[0.85, 0.92, 0.99], 1e-15);
    assert_close(&momenta("pr1382", [0, 750, 1500]), &[0.92, 0.955, 0.99], 1e-15);
}
