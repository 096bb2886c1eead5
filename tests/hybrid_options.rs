//! What each option of the hybrid systems changes, in f64 on the CPU.

mod hybrids_common;

use burn::tensor::DType;
use fairway::backend::cpu::Cpu;
use fairway::model::plan::{Plan, Skip};
use fairway::model::{Model, param_count};
use fairway::recipe::{PR1607, Recipe};
use hybrids_common::*;

fn schedule(recipe: &Recipe, recurrent: bool) -> (Vec<usize>, Vec<(usize, usize, usize)>) {
    let plan = Plan::of(recipe).unwrap();
    let visits = plan.schedule(recurrent);
    let skip = |(index, skip): (usize, Option<Skip>)| skip.map(|skip| (index, skip.from, skip.row));
    let skips = visits.iter().map(|visit| visit.skip).enumerate().filter_map(skip).collect();
    (visits.iter().map(|visit| visit.block).collect(), skips)
}

#[test]
fn blocks_run_in_the_order_of_the_spec_with_its_skips() {
    let hinge = built_in("pr1607", &[]);
    assert_eq!(schedule(&hinge, false), ((0..8).collect(), vec![(4, 3, 0), (5, 2, 1)]));
    let order = vec![0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 6, 7];
    assert_eq!(schedule(&hinge, true), (order, vec![(6, 5, 0), (7, 4, 1), (8, 3, 2)]));
    // A schedule that is longer than the skip weights keeps to their last row.
    let long = built_in("pr1607", &["num_layers=4", "recur_layers=1,2", "recur_repeats=5"]);
    let order = vec![0, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 3];
    assert_eq!(schedule(&long, true), (order, vec![(7, 6, 0), (8, 5, 1), (9, 4, 1), (10, 3, 1)]));

    let looped = (0..3).flat_map(|_| 0..7).collect();
    assert_eq!(schedule(&built_in("pr1994", &[]), false), (looped, vec![]));
    let unet = built_in("pr1994", &["num_unique_layers=0", "num_loops=1", "parallel_layer_positions=0-8"]);
    let mirrored = vec![(4, 3, 0), (5, 2, 1), (6, 1, 2), (7, 0, 3)];
    assert_eq!(schedule(&unet, false), ((0..9).collect(), mirrored));
    let deep = (0..9).map(|row| (9 + row, 8 - row, row)).collect();
    assert_eq!(schedule(&built_in("pr1382", &[]), false), ((0..18).collect(), deep));
}

#[test]
fn the_recurrence_begins_at_its_share_of_the_run() {
    let hinge = built_in("pr1607", &[]);
    assert!(!hinge.recurs_at(349) && hinge.recurs_at(350) && hinge.recurs_at(999));
    let settled = |steps: usize| {
        let mut recipe = hinge.clone();
        recipe.settle_recurrence(steps);
        recipe.recurs_at(0)
    };
    // The last of 350 steps is number 349.
    assert!(!settled(0) && !settled(350) && settled(351) && settled(1000));
    assert!(!built_in("pr1607", &["recur_layers="]).recurs_at(999));
}

#[test]
fn attention_layers_stand_where_they_are_placed() {
    let placed = |layers: usize, count: usize, placement: &str| {
        let recipe = Recipe {
            num_layers: layers,
            num_attn_layers: count,
            attn_placement: placement.into(),
            ..tiny(PR1607)
        };
        recipe.attention_layers()
    };
    assert_eq!(placed(8, 1, "even"), [4]);
    assert_eq!(placed(8, 2, "even"), [3, 5]);
    assert_eq!(placed(8, 3, "even"), [2, 4, 6]);
    // Python's round: halves to even.
    assert_eq!((placed(5, 1, "even"), placed(7, 1, "even")), (vec![2], vec![4]));
    assert_eq!((placed(8, 2, "first"), placed(8, 2, "last")), (vec![0, 1], vec![6, 7]));
    assert_eq!((placed(2, 3, "even"), placed(2, 3, "nemotron")), (vec![0, 1], vec![1]));
    assert_eq!((placed(8, 2, "1,6"), placed(8, 0, "even")), (vec![1, 6], vec![]));
}

#[test]
fn norms_rotations_and_exclusion_are_the_layers_own() {
    let recipe = built_in("pr1382", &[]);
    let plan = Plan::of(&recipe).unwrap();
    for (layer, block) in plan.blocks.iter().enumerate() {
        let attention = [12, 13, 14].contains(&layer);
        assert_eq!(block.has_attention(), attention, "layer {layer}");
        let expected = if attention { 1.0 / (layer as f64 + 1.0).sqrt() } else { 1.0 };
        assert_eq!(block.norm_scale, expected, "layer {layer}");
    }
    let plain = Plan::of(&Recipe { ln_scale: false, ..recipe.clone() }).unwrap();
    assert!(plain.blocks.iter().all(|block| block.norm_scale == 1.0));
    let excluded = |xsa_last_n: usize| -> Vec<usize> {
        let plan = Plan::of(&Recipe { xsa_last_n, ..recipe.clone() }).unwrap();
        let excludes = |layer: &usize| format!("{:?}", plan.blocks[*layer]).contains("exclude_self: true");
        (0..18).filter(excludes).collect()
    };
    assert_eq!(
        (excluded(11), excluded(5), excluded(4), excluded(3)),
        (vec![12, 13, 14], vec![13, 14], vec![14], vec![])
    );

    // spec/pr1382.md: base (L / 1024)^(16/14) beyond 1,024 positions.
    assert_eq!((plan.rope.rotated, plan.rope.base_for(1024)), (16, 10_000.0));
    assert!((plan.rope.base_for(2048) - 22_081.79).abs() < 0.01, "{}", plan.rope.base_for(2048));
    let rope = |recipe: &Recipe| Plan::of(recipe).unwrap().rope;
    assert_eq!(rope(&built_in("pr1382", &["rope_dims=0"])).rotated, 64);
    let fraction = |share: &str| rope(&built_in("pr1607", &[share])).rotated;
    let rotated =
        ["rope_fraction=1", "rope_fraction=0.5", "rope_fraction=0.3", "rope_fraction=0"].map(fraction);
    assert_eq!(rotated, [64, 32, 18, 2]);
    assert_eq!(rope(&built_in("pr1607", &[])).base_for(1 << 16), 10_000.0);
}

#[test]
fn a_longer_sequence_turns_slower_only_beyond_the_rotation_s_own_length() {
    let model = |rope_train_seq_len: usize| model(&Recipe { rope_train_seq_len, ..pr1382() });
    assert_eq!(apart(&model(11), &model(1024)), 0.0);
    assert!(apart(&model(10), &model(1024)) > 1e-6);
}

#[test]
fn repeated_blocks_change_nothing_before_the_recurrence_and_something_after_it() {
    let recurring = model(&pr1607());
    let plain = model(&Recipe { recur_layers: vec![], ..pr1607() });
    assert!(recurring.is_recurrent() && !plain.is_recurrent());
    assert!(apart(&recurring, &plain) > 1e-4);
    recurring.set_recurrent(false);
    assert_eq!(apart(&recurring, &plain), 0.0);
    plain.set_recurrent(true);
    assert!(!plain.is_recurrent());
}

#[test]
fn an_untied_mlp_of_the_same_weights_is_the_block_s_own() {
    let tied = model(&pr1607());
    let untied = model(&Recipe { recur_mode: "untie_mlp".into(), ..pr1607() });
    assert!(apart(&tied, &untied) > 1e-4);
    for layer in [1, 2] {
        for name in ["fc.weight", "proj.weight"] {
            let own = get(&tied, &format!("blocks.{layer}.mlp.{name}"));
            set(&untied, &format!("recur_mlps.{layer}.{name}"), own);
        }
    }
    assert_eq!(apart(&tied, &untied), 0.0);
}

#[test]
fn values_of_the_first_attention_go_on_only_from_the_first_half() {
    // Attention in layers 2 and 3 of 5: the first half is 0 and 1.
    let with = model(&Recipe { value_residual: true, ..pr1382() });
    assert_eq!(apart(&with, &model(&pr1382())), 0.0);
    let early = |value_residual| model(&Recipe { value_residual, mamba_layers: vec![0, 4], ..pr1382() });
    let with = early(true);
    assert!(apart(&with, &early(false)) > 1e-5);
    // sigmoid(-800) is 0.
    fill(&with, "vrl_alpha", -800.0);
    assert_eq!(apart(&with, &early(false)), 0.0);
}

#[test]
fn open_gates_and_scales_of_zero_are_as_if_the_option_were_off() {
    let off = model(&pr1382());
    let on = |change: fn(&mut Recipe)| {
        let mut recipe = pr1382();
        change(&mut recipe);
        model(&recipe)
    };
    let gated = on(|r| r.gated_attention = true);
    assert!(apart(&gated, &off) > 1e-4);
    fill(&gated, "attn_gate.weight", 0.0);
    fill(&gated, "attn_gate.bias", 800.0);
    assert_eq!(apart(&gated, &off), 0.0);

    let dtg = on(|r| r.dtg_enabled = true);
    assert!(apart(&dtg, &off) > 1e-4);
    fill(&dtg, "dtg_gate.weight", 0.0);
    fill(&dtg, "dtg_gate.bias", 800.0);
    assert!(apart(&dtg, &off) < 1e-13);

    let embedding = on(|r| (r.ve_enabled, r.ve_dim, r.ve_layers) = (true, 8, vec![3]));
    assert!(apart(&embedding, &off) > 1e-5);
    fill(&embedding, "ve_shared.scale", 0.0);
    assert_eq!(apart(&embedding, &off), 0.0);
    // In layers of Mamba blocks it is built and never used.
    let unused = on(|r| (r.ve_enabled, r.ve_dim, r.ve_layers) = (true, 8, vec![0, 4]));
    assert_eq!(apart(&unused, &off), 0.0);
    accumulate(&unused);
    let grads = take_grads(&unused);
    assert!(grads["ve_layer_scales.0"].is_none() && grads["ve_layer_scales.1"].is_none());

    let no_hash = on(|r| r.bigram_vocab_size = 0);
    let hashed = on(|_| ());
    assert!(apart(&hashed, &no_hash) > 1e-5);
    fill(&hashed, "bigram.scale", 0.0);
    assert!(apart(&hashed, &no_hash) < 1e-13);

    let no_smear = on(|r| r.use_smeargate = false);
    let smeared = on(|_| ());
    assert!(apart(&smeared, &no_smear) > 1e-5);
    fill(&smeared, "smear.gate", -800.0);
    assert_eq!(apart(&smeared, &no_smear), 0.0);
    // PR #1607's gate is on the position itself.
    let (smeared, no_smear) = (model(&pr1607()), model(&Recipe { use_smeargate: false, ..pr1607() }));
    assert!(apart(&smeared, &no_smear) > 1e-5);
    fill(&smeared, "smeargate.gate", 800.0);
    assert!(apart(&smeared, &no_smear) < 1e-13);
}

#[test]
fn the_kill_form_is_a_filter_that_discards_what_it_projects_for_step_b_and_c() {
    let recipe = Recipe { ternary_body: false, ..pr1994("mamba2_kill") };
    let (kill, changed) = (model(&recipe), model(&recipe));
    // in_proj: x 48, z 48, B 5, C 5, dt 6 rows of 24.
    for block in 0..2 {
        let name = format!("blocks.{block}.s4d.in_proj.weight");
        let mut rows = get(&changed, &name);
        assert_eq!(rows.len(), (2 * 48 + 2 * 5 + 6) * 24);
        rows[96 * 24..].iter_mut().for_each(|v| *v += 1.0);
        set(&changed, &name, rows);
    }
    assert_eq!(apart(&kill, &changed), 0.0);
    accumulate(&kill);
    let grad = take_grads(&kill).remove("blocks.0.s4d.in_proj.weight").flatten().unwrap();
    assert!(grad[96 * 24..].iter().all(|v| *v == 0.0) && grad[..96 * 24].iter().all(|v| *v != 0.0));
    // With selectivity they matter.
    let (selective, changed) = (model(&pr1994("mamba2")), model(&pr1994("mamba2")));
    fill(&changed, "s4d.dt_bias", 0.9);
    let mut rows = get(&changed, "blocks.0.s4d.in_proj.weight");
    rows[96 * 24..].iter_mut().for_each(|v| *v += 1.0);
    set(&changed, "blocks.0.s4d.in_proj.weight", rows);
    assert!(apart(&selective, &changed) > 1e-4);

    // B . C = 0 leaves convolution, skip and gate; only the product of the two matters.
    let without = model(&Recipe { mamba2_skip_scan: true, ..recipe.clone() });
    assert!(apart(&kill, &without) > 1e-5);
    let scaled = model(&recipe);
    for block in 0..2 {
        for (part, factor) in [("_B_const", 4.0), ("_C_const", 0.25)] {
            let name = format!("blocks.{block}.s4d.{part}");
            let values = get(&scaled, &name).into_iter().map(|v| v * factor).collect();
            set(&scaled, &name, values);
        }
    }
    assert!(apart(&kill, &scaled) < 1e-13);
    fill(&kill, "_B_const", 0.0);
    assert!(apart(&kill, &without) < 1e-14);
}

#[test]
fn a_chunk_s_length_changes_nothing_but_rounding() {
    for chunk in [1, 3, 11, 64] {
        let mamba2 = |mamba2_chunk_size| model(&Recipe { mamba2_chunk_size, ..pr1994("mamba2") });
        let kill = |mamba2_chunk_size| model(&Recipe { mamba2_chunk_size, ..pr1994("mamba2_kill") });
        let mamba3 = |mamba3_chunk_size| model(&Recipe { mamba3_chunk_size, ..pr1607() });
        for (name, error) in [
            ("Mamba-2", apart(&mamba2(4), &mamba2(chunk))),
            ("kill", apart(&kill(4), &kill(chunk))),
            ("Mamba-3", apart(&mamba3(4), &mamba3(chunk))),
        ] {
            assert!(error < 1e-12, "{name} in chunks of {chunk}: {error:e}");
        }
    }
}

#[test]
fn a_parallel_residual_differs_only_by_what_the_mixers_add() {
    let (parallel, serial) =
        (model(&Recipe { parallel_residual: true, ..pr1994("mamba2_kill") }), model(&pr1994("mamba2_kill")));
    assert!(apart(&parallel, &serial) > 1e-4);
    for model in [&parallel, &serial] {
        fill(model, "attn_scale", 0.0);
        fill(model, "s4d_scale", 0.0);
    }
    assert!(apart(&parallel, &serial) < 1e-13);
}

#[test]
fn loops_share_their_blocks_and_a_hundred_percent_is_one_pass() {
    let once = Recipe { num_loops: 1, ..pr1994("s4d_lin") };
    let plain = Recipe { num_unique_layers: 0, num_layers: 2, ..once.clone() };
    let (looped, unet) = (model(&once), model(&plain));
    // Two layers in a U-Net: one skip from the first to the second.
    assert!(apart(&looped, &unet) > 1e-5);
    fill(&unet, "skip_weights", 0.0);
    assert_eq!(apart(&looped, &unet), 0.0);
    assert_eq!(param_count(&once).unwrap(), param_count(&pr1994("s4d_lin")).unwrap());
    assert!(apart(&looped, &model(&pr1994("s4d_lin"))) > 1e-4);
}

#[test]
fn heads_that_predict_further_ahead_add_their_mean_loss_by_its_weight() {
    let plain = accumulate(&model(&pr1382()));
    let ahead = |heads, weight| {
        let model = model(&Recipe { mtp_num_heads: heads, mtp_loss_weight: weight, ..pr1382() });
        fill(&model, "mtp_heads.", 0.0);
        accumulate(&model)
    };
    // Heads of zeros are uniform over the tokens, whatever their number.
    let uniform = (VOCAB as f64).ln();
    assert!((ahead(1, 0.2) - plain - 0.2 * uniform).abs() < 1e-12);
    assert!((ahead(3, 0.5) - plain - 0.5 * uniform).abs() < 1e-12);
    assert_eq!(ahead(2, 0.0), plain);
    // They are no part of what is evaluated.
    let with = model(&Recipe { mtp_num_heads: 2, ..pr1382() });
    assert_eq!(apart(&with, &model(&pr1382())), 0.0);
}

#[test]
fn training_quantises_late_what_the_source_systems_quantise() {
    let casted = |name: &str, sets: &[&str], least: u64| -> Vec<String> {
        let plan = Plan::of(&built_in(name, sets)).unwrap();
        let own = plan.specs.iter().filter(|spec| spec.casted && spec.numel() > least);
        own.map(|spec| spec.name.clone()).collect()
    };
    // spec/pr1607.md: 7 x 4 + 6; the projection of the hashed pairs has exactly 65,536 elements.
    assert_eq!(casted("pr1607", &[], 65_536).len(), 34);
    assert_eq!(casted("pr1607", &[], 65_535).len(), 35);
    // spec/pr1382.md: Mamba's in_proj and out_proj and the projection of the hashed pairs, not the banks.
    let own = casted("pr1382", &[], 0);
    assert_eq!(own.len(), 31);
    assert!(own.iter().all(|name| name.starts_with("mamba_blocks.") || name == "bigram.proj.weight"));

    let model = model(&pr1382());
    let before = logits(&model, ids(3, [2, 11]));
    model.set_late_quantised(true);
    assert!(
        model.is_late_quantised() && largest_difference(&logits(&model, ids(3, [2, 11])), &before) > 1e-4
    );
    let full = get(&model, "mamba_blocks.0.in_proj.weight");
    let used = values(model.params().get("mamba_blocks.0.in_proj.weight").unwrap().compute::<2>());
    for (full, used) in full.chunks(24).zip(used.chunks(24)) {
        let step = full.iter().fold(0.0f64, |most, v| most.max(v.abs() / 31.0)).max(1.0 / 31.0);
        for (full, used) in full.iter().zip(used) {
            let code = (full / step).round_ties_even().clamp(-32.0, 31.0);
            assert!((used - code * step).abs() < 1e-15, "{full} became {used}");
        }
    }
    assert_eq!(
        get(&model, "blocks.0.attn.c_q.weight"),
        values(model.params().get("blocks.0.attn.c_q.weight").unwrap().compute::<2>())
    );
    model.set_late_quantised(false);
    assert_eq!(logits(&model, ids(3, [2, 11])), before);
    // PR #1607's rule is by size: no matrix here has more than 65,536 elements.
    let small = self::model(&pr1607());
    let before = logits(&small, ids(3, [2, 11]));
    small.set_late_quantised(true);
    assert_eq!(logits(&small, ids(3, [2, 11])), before);
}

#[test]
fn banks_travel_as_one_tensor_and_come_back_apart() {
    let from = model(&pr1382());
    let host = from.params().to_host().unwrap();
    let bank = host.iter().find(|tensor| tensor.name == "qo_bank").unwrap();
    assert_eq!(bank.shape, [4, 24, 24]);
    let parts = ["blocks.0.attn.c_q", "blocks.1.attn.c_q", "blocks.0.attn.proj", "blocks.1.attn.proj"];
    let expected: Vec<f64> = parts.iter().flat_map(|part| get(&from, &format!("{part}.weight"))).collect();
    assert_eq!(bank.to_f64(), expected);
    let to = Model::<Cpu>::new(&pr1382(), &device(), DType::F64).unwrap();
    to.params().load(&host, "a test").unwrap();
    assert_eq!(apart(&from, &to), 0.0);
    let refused = |tensors: Vec<fairway::host::HostTensor>| {
        to.params().load(&tensors, "a test").unwrap_err().to_string()
    };
    let without = host.iter().filter(|tensor| tensor.name != "qo_bank").cloned().collect();
    assert!(refused(without).starts_with("tensor qo_bank is missing, a test"));
    let member = |tensor: &fairway::host::HostTensor| fairway::host::HostTensor {
        name: "blocks.0.attn.c_q.weight".into(),
        ..tensor.clone()
    };
    let extra = host.iter().cloned().chain([member(bank)]).collect();
    assert!(refused(extra).starts_with("unknown tensor blocks.0.attn.c_q.weight"));
}
