//! The plans of the four systems: the challenge's baseline and the three hybrids (spec/challenge.md section 4,
//! spec/pr1994.md, spec/pr1607.md, spec/pr1382.md).

use super::AHEAD;
use super::attention::AttentionPlan;
use super::block::{BlockPlan, Branch, MixerPlan};
use super::embed::{EmbedPlan, HashPlan, SmearPlan, ValueEmbeddingPlan};
use super::init::Init;
use super::mamba1::{Mamba1Plan, both_from_64};
use super::mamba2::{Mamba2Form, Mamba2Plan};
use super::mamba3::Mamba3Plan;
use super::mlp::{MlpForm, MlpPlan};
use super::plan::{AheadPlan, Bank, Plan, RopePlan, Skip, Visit, head_spec, skip_spec, unet};
use super::s4d::S4dPlan;
use super::spec::{Linears, Spec};
use crate::ops::hash::Hash;
use crate::ops::weight_form::WeightForm;
use crate::recipe::{PR1382, PR1607, PR1994, Recipe};

/// The plan of a valid recipe.
pub(super) fn plan(recipe: &Recipe) -> Plan {
    match recipe.system.as_str() {
        PR1994 => pr1994(recipe),
        PR1607 => pr1607(recipe),
        PR1382 => pr1382(recipe),
        _ => challenge(recipe),
    }
}

/// The shortest side is at least 16: where PR #1607 starts a linear layer orthogonally.
fn least_16(shape: [usize; 2]) -> bool {
    shape.iter().all(|size| *size >= 16)
}

fn embed(recipe: &Recipe) -> EmbedPlan {
    EmbedPlan {
        vocab: recipe.vocab_size,
        dim: recipe.model_dim,
        std: if recipe.tie_embeddings { recipe.tied_embed_init_std as f32 } else { 1.0 },
        hash: None,
        smear: None,
        values: None,
        rms_eps: recipe.rms_eps,
    }
}

fn mlp(recipe: &Recipe, prefix: String) -> MlpPlan {
    let form = match recipe.mlp_type.as_str() {
        "swiglu" => MlpForm::SwiGlu,
        "leaky_relu2" => MlpForm::Squared(recipe.mlp_leaky_slope),
        _ => MlpForm::Squared(0.0),
    };
    MlpPlan { prefix, dim: recipe.model_dim, hidden: recipe.mlp_dim(), form }
}

fn attention(recipe: &Recipe, prefix: String) -> AttentionPlan {
    AttentionPlan {
        prefix,
        dim: recipe.model_dim,
        heads: recipe.num_heads,
        groups: recipe.num_kv_heads,
        gain: recipe.qk_gain_init as f32,
        rms_eps: recipe.rms_eps,
        silu_values: false,
        exclude_self: false,
        gated: false,
        value_residual: false,
    }
}

/// A block with mix, scales and MLP: `mixers` are named by their scales.
fn block(recipe: &Recipe, name: &str, mixers: Vec<(MixerPlan, &str)>) -> BlockPlan {
    let scale = |scale: &str| Some(format!("{name}.{scale}"));
    BlockPlan {
        mix: scale("resid_mix"),
        mixers: mixers.into_iter().map(|(part, own)| Branch { part, scale: scale(own) }).collect(),
        mlp: Some(Branch { part: mlp(recipe, format!("{name}.mlp")), scale: scale("mlp_scale") }),
        parallel: recipe.parallel_residual,
        norm_scale: 1.0,
        gate: None,
        value_layer: None,
        checkpoint: recipe.checkpoint_blocks,
        name: name.into(),
    }
}

/// The parameters of a block whose linear layers are all of one kind.
fn block_specs(block: &BlockPlan, dim: usize, linears: Linears, orthogonal: bool) -> Vec<Spec> {
    let mut specs = block.own_specs(dim);
    for mixer in &block.mixers {
        specs.extend(match &mixer.part {
            MixerPlan::Attention(plan) => plan.specs(linears),
            MixerPlan::Mamba1(plan) => plan.specs(orthogonal),
            MixerPlan::Mamba2(plan) => plan.specs(linears),
            MixerPlan::Mamba3(plan) => plan.specs(linears),
            MixerPlan::S4d(plan) => plan.specs(),
        });
    }
    specs.extend(block.mlp.iter().flat_map(|mlp| mlp.part.specs(linears)));
    specs
}

fn full_rope(recipe: &Recipe) -> RopePlan {
    RopePlan { rotated: recipe.head_dim(), base: recipe.rope_base, grows_from: None }
}

fn challenge(recipe: &Recipe) -> Plan {
    let (embed, dim, layers) = (embed(recipe), recipe.model_dim, recipe.num_layers);
    let block = |index: usize| {
        let name = format!("blocks.{index}");
        let mixer = MixerPlan::Attention(attention(recipe, format!("{name}.attn")));
        block(recipe, &name, vec![(mixer, "attn_scale")])
    };
    let blocks: Vec<BlockPlan> = (0..layers).map(block).collect();
    let mut specs = vec![embed.token_spec()];
    specs.extend(skip_spec(&[], layers / 2, dim));
    specs.extend(blocks.iter().flat_map(|block| block_specs(block, dim, Linears::PLAIN, false)));
    finish(recipe, Plan { embed, visits: unet(layers), ..plain(recipe, blocks, specs) })
}

/// A plan with no options.
fn plain(recipe: &Recipe, blocks: Vec<BlockPlan>, specs: Vec<Spec>) -> Plan {
    Plan {
        embed: embed(recipe),
        blocks,
        extra_mlps: Vec::new(),
        visits: Vec::new(),
        recurrent_visits: None,
        rope: full_rope(recipe),
        softcap: recipe.logit_softcap,
        untied: !recipe.tie_embeddings,
        ahead: None,
        rms_eps: recipe.rms_eps,
        specs,
        banks: Vec::new(),
        protected: Vec::new(),
    }
}

fn finish(recipe: &Recipe, mut plan: Plan) -> Plan {
    if plan.untied {
        plan.specs.push(head_spec(recipe.vocab_size, recipe.model_dim));
    }
    plan
}

fn pr1994(recipe: &Recipe) -> Plan {
    let (dim, looped) = (recipe.model_dim, recipe.num_unique_layers > 0);
    let mut embed = embed(recipe);
    embed.hash = xor_table(recipe, "bigram_hash", false);
    let body = match recipe.ternary_body {
        true => Linears { form: WeightForm::BitLinear, bf16: true, ..Linears::PLAIN },
        false => Linears { casted: true, ..Linears::PLAIN },
    };
    let s4d = |prefix: String| MixerPlan::S4d(S4dPlan { prefix, dim, state: recipe.s4d_d_state });
    let mamba2 = |prefix: String| MixerPlan::Mamba2(mamba2(recipe, prefix));
    let block = |index: usize| {
        let name = format!("blocks.{index}");
        let prefix = format!("{name}.attn");
        let attention = |prefix| MixerPlan::Attention(attention(recipe, prefix));
        let mixers = if recipe.parallel_layer_positions.contains(&index) {
            let beside = format!("{name}.s4d");
            let ssm = if recipe.parallel_ssm_type == "s4d_lin" { s4d(beside) } else { mamba2(beside) };
            vec![(attention(prefix), "attn_scale"), (ssm, "s4d_scale")]
        } else if recipe.attn_layer_positions.contains(&index) {
            vec![(attention(prefix), "attn_scale")]
        } else if recipe.mamba2_layer_positions.contains(&index) {
            vec![(mamba2(prefix), "attn_scale")]
        } else {
            vec![(s4d(prefix), "attn_scale")]
        };
        block(recipe, &name, mixers)
    };
    let count = if looped { recipe.num_unique_layers } else { recipe.num_layers };
    let blocks: Vec<BlockPlan> = (0..count).map(block).collect();
    let mut specs = vec![embed.token_spec()];
    let casted = Linears { casted: true, ..Linears::PLAIN };
    specs.extend(embed.hash_specs(casted, Init::Constant(0.0), Init::Constant(0.0)));
    let visits = if looped {
        (0..recipe.num_loops).flat_map(|_| (0..count).map(Visit::of)).collect()
    } else {
        specs.extend(skip_spec(&[], count / 2, dim));
        unet(count)
    };
    specs.extend(blocks.iter().flat_map(|block| block_specs(block, dim, body, false)));
    finish(recipe, Plan { embed, visits, ..plain(recipe, blocks, specs) })
}

fn mamba2(recipe: &Recipe, prefix: String) -> Mamba2Plan {
    let groups = recipe.mamba2_ngroups;
    Mamba2Plan {
        prefix,
        dim: recipe.model_dim,
        inner: recipe.mamba2_expand * recipe.model_dim,
        head_dim: recipe.mamba2_headdim,
        state: recipe.mamba2_d_state,
        taps: recipe.mamba2_d_conv,
        chunk: recipe.mamba2_chunk_size,
        skip_scan: recipe.mamba2_skip_scan,
        form: match (recipe.mamba2_gated_norm, recipe.mamba2_kill_selectivity) {
            (true, _) => Mamba2Form::Official { groups, norm_groups: groups },
            (false, true) => Mamba2Form::Kill,
            (false, false) => Mamba2Form::Selective,
        },
    }
}

fn xor_table(recipe: &Recipe, prefix: &'static str, triples: bool) -> Option<HashPlan> {
    (recipe.bigram_vocab_size > 0).then_some(HashPlan {
        prefix,
        table: "embed",
        hash: Hash::Xor,
        triples,
        buckets: recipe.bigram_vocab_size,
        width: recipe.bigram_dim,
        scaled: true,
    })
}

fn pr1607(recipe: &Recipe) -> Plan {
    let (dim, layers) = (recipe.model_dim, recipe.num_layers);
    let mut embed = embed(recipe);
    embed.hash = recipe.use_bigram_hash.then_some(HashPlan {
        prefix: "bigram_hash",
        table: "table",
        hash: Hash::Product,
        triples: false,
        buckets: recipe.bigram_buckets,
        width: recipe.bigram_hash_dim,
        scaled: false,
    });
    embed.smear = recipe.use_smeargate.then_some(SmearPlan::BeforeNorm);
    let attention_layers = recipe.attention_layers();
    embed.values = (recipe.ve_enabled && !attention_layers.is_empty()).then(|| ValueEmbeddingPlan {
        width: recipe.ve_dim,
        values: recipe.kv_dim(),
        layers: attention_layers.len(),
    });
    let form = if recipe.use_ternary { WeightForm::ScaledTernary } else { WeightForm::Full };
    let orthogonal = recipe.use_ortho_init.then_some(least_16 as fn([usize; 2]) -> bool);
    let linears = Linears { orthogonal, form, bf16: false, casted: !recipe.use_ternary };
    let block = |index: usize| {
        let name = format!("blocks.{index}");
        match attention_layers.iter().position(|layer| *layer == index) {
            Some(value_layer) => {
                let mixer = attention(recipe, format!("{name}.attn"));
                let mixer = MixerPlan::Attention(AttentionPlan { silu_values: true, ..mixer });
                let block = block(recipe, &name, vec![(mixer, "attn_scale")]);
                BlockPlan { value_layer: Some(value_layer), ..block }
            }
            None => {
                let mixer = MixerPlan::Mamba3(Mamba3Plan {
                    prefix: format!("{name}.mamba3.mamba3"),
                    dim,
                    inner: recipe.mamba3_expand * dim,
                    head_dim: recipe.mamba3_headdim,
                    state: recipe.mamba3_d_state,
                    groups: recipe.mamba3_ngroups,
                    chunk: recipe.mamba3_chunk_size,
                });
                block(recipe, &name, vec![(mixer, "m3_scale")])
            }
        }
    };
    let blocks: Vec<BlockPlan> = (0..layers).map(block).collect();
    let untied = recipe.recur_mode == "untie_mlp";
    let extra = |layer: &usize| mlp(recipe, format!("recur_mlps.{layer}"));
    let extra_mlps: Vec<MlpPlan> = recipe.recur_layers.iter().filter(|_| untied).map(extra).collect();
    let rows = layers / 2;
    let repeated =
        |layer: usize| untied.then(|| recipe.recur_layers.iter().position(|l| *l == layer)).flatten();
    let recurrent_visits = recipe.recur_layers.last().map(|last| {
        let mut order: Vec<usize> = (0..=*last).collect();
        (0..recipe.recur_repeats).for_each(|_| order.extend(&recipe.recur_layers));
        order.extend(last + 1..layers);
        half_skips(&order, rows, repeated)
    });

    let mut specs: Vec<Spec> = skip_spec(&[1], rows, dim).into_iter().collect();
    specs.push(embed.token_spec());
    specs.extend(embed.smear_specs());
    specs.extend(embed.hash_specs(linears, Init::Normal(0.01), Init::Constant(0.0)));
    specs.extend(blocks.iter().flat_map(|block| block_specs(block, dim, linears, false)));
    // The value embedding's projection starts orthogonally: the source's pass over all linear layers reaches it.
    let proj = linears.start([recipe.kv_dim(), recipe.ve_dim]);
    let proj = if proj == Init::Orthogonal { proj } else { Init::Constant(0.0) };
    specs.extend(embed.value_specs(linears, proj));
    specs.extend(extra_mlps.iter().flat_map(|mlp| mlp.specs(linears)));
    let head_dim = recipe.head_dim();
    let rotated = ((head_dim as f64 * recipe.rope_fraction) as usize / 2 * 2).max(2);
    let mixers = blocks.iter().flat_map(|block| &block.mixers).filter(|_| recipe.fp16_inproj_rows);
    let protected = mixers.filter_map(|mixer| match &mixer.part {
        MixerPlan::Mamba3(mixer) => Some(mixer.protected_rows()),
        _ => None,
    });
    let plan = Plan {
        embed,
        extra_mlps,
        protected: protected.collect(),
        visits: half_skips(&(0..layers).collect::<Vec<_>>(), rows, |_| None),
        recurrent_visits,
        rope: RopePlan { rotated, ..full_rope(recipe) },
        ..plain(recipe, blocks, specs)
    };
    finish(recipe, plan)
}

/// PR #1607's skips: the second half of the visits takes the outputs of the first, newest first, as long as fewer were
/// taken than are left (so half of them, rounded up); repeated visits of a block have the MLP that `repeated` names.
fn half_skips(order: &[usize], rows: usize, repeated: impl Fn(usize) -> Option<usize>) -> Vec<Visit> {
    let half = order.len() / 2;
    let visit = |(index, block): (usize, &usize)| {
        let taken = index.checked_sub(half).filter(|taken| 2 * taken < half && rows > 0);
        let again = order[..index].contains(block);
        Visit {
            skip: taken.map(|taken| Skip { from: half - 1 - taken, row: taken.min(rows - 1) }),
            mlp: repeated(*block).filter(|_| again),
            ..Visit::of(*block)
        }
    };
    order.iter().enumerate().map(visit).collect()
}

fn pr1382(recipe: &Recipe) -> Plan {
    let (dim, layers) = (recipe.model_dim, recipe.num_layers);
    let mut embed = embed(recipe);
    embed.hash = xor_table(recipe, "bigram", recipe.trigram);
    embed.smear = recipe.use_smeargate.then_some(SmearPlan::AfterNorm);
    embed.values = recipe.ve_enabled.then(|| ValueEmbeddingPlan {
        width: recipe.ve_dim,
        values: recipe.kv_dim(),
        layers: recipe.ve_layers.len(),
    });
    let is_mamba = |layer: usize| recipe.mamba_layers.contains(&layer);
    let ordinal = |layer: usize, mamba: bool| (0..layer).filter(|other| is_mamba(*other) == mamba).count();
    let block = |layer: usize| {
        if is_mamba(layer) {
            return mamba1_block(recipe, ordinal(layer, true));
        }
        let name = format!("blocks.{}", ordinal(layer, false));
        let mixer = MixerPlan::Attention(AttentionPlan {
            exclude_self: layer + recipe.xsa_last_n >= layers,
            gated: recipe.gated_attention,
            value_residual: recipe.value_residual,
            ..attention(recipe, format!("{name}.attn"))
        });
        let value_layer = recipe.ve_layers.iter().position(|own| *own == layer);
        BlockPlan {
            norm_scale: if recipe.ln_scale { 1.0 / (layer as f64 + 1.0).sqrt() } else { 1.0 },
            gate: recipe.dtg_enabled.then(|| format!("{name}.dtg_gate")),
            value_layer: value_layer.filter(|_| recipe.ve_enabled),
            ..block(recipe, &name, vec![(mixer, "attn_scale")])
        }
    };
    let blocks: Vec<BlockPlan> = (0..layers).map(block).collect();
    let mut visits = unet(layers);
    if recipe.value_residual {
        // The first attention of the first half, if it has one.
        let first = visits[..layers / 2].iter_mut().find(|visit| blocks[visit.block].has_attention());
        first.into_iter().for_each(|visit| visit.gives_values = true);
    }

    // Attention's matrices and the MLPs' live in banks, which the source starts orthogonally whatever their size.
    let always = |_: [usize; 2]| true;
    let orthogonal = recipe.use_ortho_init;
    let banked = Linears { orthogonal: orthogonal.then_some(always), ..Linears::PLAIN };
    let casted = Linears {
        orthogonal: orthogonal.then_some(both_from_64 as fn([usize; 2]) -> bool),
        casted: true,
        ..Linears::PLAIN
    };
    let start = |shape: [usize; 2]| match casted.start(shape) {
        Init::Orthogonal => Init::Orthogonal,
        _ => Init::Constant(0.0),
    };
    let mut specs: Vec<Spec> = skip_spec(&[], layers / 2, dim).into_iter().collect();
    let all: Vec<Spec> =
        blocks.iter().flat_map(|block| block_specs(block, dim, banked, orthogonal)).collect();
    let banks = banks(&blocks, &all);
    let in_bank = |spec: &Spec| banks.iter().any(|bank| bank.members.contains(&spec.name));
    let (mut members, rest): (Vec<Spec>, Vec<Spec>) = all.into_iter().partition(in_bank);
    let place = |spec: &Spec| {
        let position = |bank: &Bank| bank.members.iter().position(|member| *member == spec.name);
        banks.iter().enumerate().find_map(|(index, bank)| Some((index, position(bank)?)))
    };
    members.sort_by_key(place);
    specs.extend(members);
    specs.push(embed.token_spec());
    let proj = start([dim, recipe.bigram_dim]);
    specs.extend(embed.hash_specs(casted, Init::Constant(0.0), proj));
    specs.extend(embed.smear_specs());
    let (mamba, attention): (Vec<Spec>, Vec<Spec>) =
        rest.into_iter().partition(|spec| spec.name.starts_with("mamba_blocks."));
    specs.extend(attention);
    specs.extend(mamba);
    specs.extend(embed.value_specs(casted, start([recipe.kv_dim(), recipe.ve_dim])));
    let heads: Vec<String> = (0..recipe.mtp_num_heads).map(|k| format!("{AHEAD}{k}.weight")).collect();
    let head = |name: &String| Spec {
        casted: true,
        ..Spec::new(name, &[recipe.vocab_size, dim], Init::Constant(0.0))
    };
    specs.extend(heads.iter().map(head));
    let rotated = if recipe.rope_dims == 0 { recipe.head_dim() } else { recipe.rope_dims };
    let plan = Plan {
        embed,
        visits,
        rope: RopePlan { rotated, base: recipe.rope_base, grows_from: Some(recipe.rope_train_seq_len) },
        ahead: (!heads.is_empty()).then_some(AheadPlan { heads, weight: recipe.mtp_loss_weight }),
        banks,
        ..plain(recipe, blocks, specs)
    };
    finish(recipe, plan)
}

fn mamba1_block(recipe: &Recipe, index: usize) -> BlockPlan {
    let name = format!("mamba_blocks.{index}");
    let dim = recipe.model_dim;
    let mixer = MixerPlan::Mamba1(Mamba1Plan {
        prefix: name.clone(),
        dim,
        inner: (recipe.mamba_expand * dim as f64) as usize,
        state: recipe.mamba_d_state,
        taps: recipe.mamba_d_conv,
        dt_rank: (dim / 16).max(1),
    });
    BlockPlan {
        name,
        mix: None,
        mixers: vec![Branch { part: mixer, scale: None }],
        mlp: None,
        parallel: false,
        norm_scale: 1.0,
        gate: None,
        value_layer: None,
        checkpoint: recipe.checkpoint_blocks || recipe.mamba_grad_checkpoint,
    }
}

/// PR #1382's banks over the attention blocks: queries then outputs, keys then values, the MLPs' two.
fn banks(blocks: &[BlockPlan], specs: &[Spec]) -> Vec<Bank> {
    let names: Vec<&str> =
        blocks.iter().filter(|block| block.has_attention()).map(|block| block.name.as_str()).collect();
    let of = |parts: &[&str]| -> Vec<String> {
        parts.iter().flat_map(|part| names.iter().map(move |name| format!("{name}.{part}.weight"))).collect()
    };
    let up = if specs.iter().any(|spec| spec.name.ends_with(".mlp.w_gate.weight")) {
        (["mlp.w_gate", "mlp.w_up"].as_slice(), ["mlp.w_down"].as_slice())
    } else {
        (["mlp.fc"].as_slice(), ["mlp.proj"].as_slice())
    };
    let bank = |name: &str, members: Vec<String>| Bank { name: name.into(), members };
    let banks = vec![
        bank("qo_bank", of(&["attn.c_q", "attn.proj"])),
        bank("kv_bank", of(&["attn.c_k", "attn.c_v"])),
        bank("mlp_up_bank", of(up.0)),
        bank("mlp_down_bank", of(up.1)),
    ];
    banks.into_iter().filter(|bank| !bank.members.is_empty()).collect()
}
