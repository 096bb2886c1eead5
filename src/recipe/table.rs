//! The table of keys: the only place that knows them.

use super::knob::Limit::{Any, Fraction, Int, Layers, List, OneOf, OrNothing, Positive, Text, Within};
use super::knob::{Key, Knob, Scope, knobs};
use super::{CHALLENGE, PR1382, PR1607, PR1994, SYSTEMS};

/// The tensors that the challenge keeps out of Muon and in float32, by parts of their names.
fn control_patterns() -> Vec<String> {
    "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights"
        .split(',')
        .map(String::from)
        .collect()
}

/// The most layers that a recipe may name.
const MOST_LAYERS: usize = 1024;

const ALL: Scope = Scope::ALL;
const P1994: Scope = Scope::of(&[PR1994]);
const P1607: Scope = Scope::of(&[PR1607]);
const P1382: Scope = Scope::of(&[PR1382]);
const P1994_1382: Scope = Scope::of(&[PR1994, PR1382]);
const P1607_1382: Scope = Scope::of(&[PR1607, PR1382]);
const MIXED: Scope = Scope::of(&[CHALLENGE, PR1994, PR1607]);

knobs! {
    ALL => {
    /// Name of the recipe, as `fairway recipes` lists it.
    name: String = "baseline".into(), None, Text(100);
    /// What the recipe is, in one line.
    summary: String = "The challenge's baseline: 9 attention blocks of width 512 with U-Net skips, Muon and Adam".into(), None, Text(200);
    /// The system that the keys describe: the names and the order of its parts.
    system: String = CHALLENGE.into(), None, OneOf(&SYSTEMS);
    /// Seed of the initial weights and of every sample.
    seed: u64 = 1337, Some("SEED"), Int(0, i64::MAX as i128);

    /// Token ids of the tokenizer.
    vocab_size: usize = 1024, Some("VOCAB_SIZE"), Int(1, 65_536);
    /// Blocks; the first half feeds U-Net skips to the second.
    num_layers: usize = 9, Some("NUM_LAYERS"), Int(1, MOST_LAYERS as i128);
    /// Width of the residual stream.
    model_dim: usize = 512, Some("MODEL_DIM"), Int(1, 16_384);
    /// Query heads of an attention layer.
    num_heads: usize = 8, Some("NUM_HEADS"), Int(1, 1024);
    /// Key and value heads of an attention layer, each shared by num_heads / num_kv_heads query heads.
    num_kv_heads: usize = 4, Some("NUM_KV_HEADS"), Int(1, 1024);
    /// Hidden width of the MLP in multiples of model_dim, rounded down to whole channels.
    mlp_mult: f64 = 2.0, Some("MLP_MULT"), Within(0.001, 64.0);
    /// The MLP: W2 relu(W1 x)^2, W2 leaky_relu(W1 x)^2, or W_down (silu(W_gate x) W_up x).
    mlp_type: String = "relu2".into(), Some("MLP_TYPE"), OneOf(&["relu2", "leaky_relu2", "swiglu"]);
    /// Slope of leaky_relu2 below zero.
    mlp_leaky_slope: f64 = 0.5, None, Within(-100.0, 100.0);
    /// Whether the output head is the token embedding itself.
    tie_embeddings: bool = true, Some("TIE_EMBEDDINGS"), Any;
    /// Standard deviation of the initial token embedding when tied.
    tied_embed_init_std: f64 = 0.005, Some("TIED_EMBED_INIT_STD"), Within(0.0, 100.0);
    /// Added to the mean square under the root of every RMS norm; the default is float32's machine epsilon.
    rms_eps: f64 = f64::from(f32::EPSILON), None, Positive(1.0);
    /// Base of the rotary position frequencies.
    rope_base: f64 = 10_000.0, Some("ROPE_BASE"), Positive(1e12);
    /// Logits are c * tanh(logits / c) with this c.
    logit_softcap: f64 = 30.0, Some("LOGIT_SOFTCAP"), Positive(1e6);
    /// Initial per-head gain on normalised, rotated queries.
    qk_gain_init: f64 = 1.5, Some("QK_GAIN_INIT"), Within(-1e6, 1e6);
    /// Recomputes every block in the backward pass instead of keeping what it computed: less memory, more time.
    checkpoint_blocks: bool = false, None, Any;
    }

    MIXED => {
    /// The MLP takes the mixers' normed input, and all branches are added at once.
    parallel_residual: bool = false, None, Any;
    }

    P1994 => {
    /// Different blocks of a looped stack; 0 runs num_layers blocks with U-Net skips instead.
    num_unique_layers: usize = 0, Some("NUM_UNIQUE_LAYERS"), Int(0, MOST_LAYERS as i128);
    /// Times that the looped stack runs.
    num_loops: usize = 1, Some("NUM_LOOPS"), Int(1, 1024);
    /// Blocks that mix by attention beside a state space layer.
    parallel_layer_positions: Vec<usize> = vec![], Some("PARALLEL_LAYER_POSITIONS"), Layers(MOST_LAYERS);
    /// The state space layer beside attention.
    parallel_ssm_type: String = "s4d_lin".into(), Some("PARALLEL_SSM_TYPE"), OneOf(&["s4d_lin", "mamba2", "mamba2_kill"]);
    /// Blocks that mix by attention alone; those in no list mix by S4D-Lin.
    attn_layer_positions: Vec<usize> = vec![], Some("ATTN_LAYER_POSITIONS"), Layers(MOST_LAYERS);
    /// Blocks that mix by Mamba-2 alone.
    mamba2_layer_positions: Vec<usize> = vec![], Some("MAMBA2_LAYER_POSITIONS"), Layers(MOST_LAYERS);
    /// Every Mamba-2 with constant dt, B and C: a one-pole filter.
    mamba2_kill_selectivity: bool = false, Some("MAMBA2_KILL_SELECTIVITY"), Any;
    /// State size of Mamba-2.
    mamba2_d_state: usize = 64, None, Int(1, 1024);
    /// Width of one head of Mamba-2.
    mamba2_headdim: usize = 64, None, Int(1, 16_384);
    /// Inner width of Mamba-2 in multiples of model_dim.
    mamba2_expand: usize = 2, None, Int(1, 64);
    /// Taps of Mamba-2's convolution.
    mamba2_d_conv: usize = 4, None, Int(1, 64);
    /// Positions that Mamba-2 takes at once; results do not depend on it.
    mamba2_chunk_size: usize = 64, None, Int(1, 4096);
    /// Groups of heads that share B and C (mamba2_gated_norm only).
    mamba2_ngroups: usize = 1, None, Int(1, 1024);
    /// The official Mamba-2 layer instead: convolution over x, B and C, a gated norm before the output projection.
    mamba2_gated_norm: bool = false, None, Any;
    /// Leaves Mamba-2's scan out: convolution, skip and gate alone.
    mamba2_skip_scan: bool = false, None, Any;
    /// State size of S4D-Lin.
    s4d_d_state: usize = 16, None, Int(1, 1024);
    /// Ternary weights of the blocks' linear layers (BitLinear, but for S4D-Lin's).
    ternary_body: bool = false, Some("TERNARY_BODY"), Any;
    /// Decay of the average of the weights that replaces them at the end; 0 for none.
    ema_beta: f64 = 0.0, Some("EMA_BETA"), Fraction;
    /// Steps before the average begins to differ from the weights; nothing takes lr_warmup_steps.
    ema_warmup_offset: Option<usize> = None, Some("EMA_WARMUP_OFFSET"), OrNothing(1_000_000_000);
    }

    P1994_1382 => {
    /// Rows of the hashed table of token pairs; 0 for none.
    bigram_vocab_size: usize = 0, Some("BIGRAM_VOCAB_SIZE"), Int(0, 16_777_216);
    /// Width of the hashed table.
    bigram_dim: usize = 64, Some("BIGRAM_DIM"), Int(1, 16_384);
    }

    P1607 => {
    /// Adds a hashed table of token pairs to the embedding.
    use_bigram_hash: bool = true, Some("USE_BIGRAM_HASH"), Any;
    /// Rows of the hashed table.
    bigram_buckets: usize = 4096, Some("BIGRAM_BUCKETS"), Int(1, 16_777_216);
    /// Width of the hashed table.
    bigram_hash_dim: usize = 128, Some("BIGRAM_HASH_DIM"), Int(1, 16_384);
    /// State size of Mamba-3.
    mamba3_d_state: usize = 64, Some("MAMBA3_D_STATE"), Int(1, 1024);
    /// Inner width of Mamba-3 in multiples of model_dim.
    mamba3_expand: usize = 2, Some("MAMBA3_EXPAND"), Int(1, 64);
    /// Width of one head of Mamba-3.
    mamba3_headdim: usize = 64, Some("MAMBA3_HEADDIM"), Int(1, 16_384);
    /// Positions that Mamba-3 takes at once; results do not depend on it.
    mamba3_chunk_size: usize = 64, Some("MAMBA3_CHUNK_SIZE"), Int(1, 4096);
    /// Groups of heads that share B and C.
    mamba3_ngroups: usize = 1, Some("MAMBA3_NGROUPS"), Int(1, 1024);
    /// Attention blocks among the Mamba-3 blocks.
    num_attn_layers: usize = 1, Some("NUM_ATTN_LAYERS"), Int(0, MOST_LAYERS as i128);
    /// Where they stand: even, first, last, nemotron (even, but not first), or their numbers.
    attn_placement: String = "even".into(), Some("ATTN_PLACEMENT"), Text(4096);
    /// Share of an attention head's channels that rotate, rounded down to pairs, at least one pair.
    rope_fraction: f64 = 1.0, Some("ROPE_FRACTION"), Within(0.0, 1.0);
    /// Blocks that run again after the last of them, once the recurrence is on.
    recur_layers: Vec<usize> = vec![], Some("RECUR_LAYERS"), Layers(MOST_LAYERS);
    /// What a repeated block reuses: all of itself, or all but its MLP.
    recur_mode: String = "block".into(), Some("RECUR_MODE"), OneOf(&["block", "untie_mlp"]);
    /// Share of the steps after which the recurrence is on; from 1 on it never is.
    recur_start_frac: f64 = 0.35, Some("RECUR_START_FRAC"), Within(0.0, 1e6);
    /// Times that the blocks run again.
    recur_repeats: usize = 1, Some("RECUR_REPEATS"), Int(0, 1024);
    /// Ternary weights of every linear layer, with activation scales.
    use_ternary: bool = false, Some("USE_TERNARY"), Any;
    /// Muon's decoupled weight decay.
    weight_decay: f64 = 0.04, Some("WEIGHT_DECAY"), Within(0.0, 100.0);
    /// Shape of the warm-down.
    warmdown_shape: String = "linear".into(), Some("WARMDOWN_SHAPE"), OneOf(&["linear", "cosine"]);
    /// Share of the wallclock after which training quantises its linear weights; 0 never does.
    qat_start_frac: f64 = 0.0, Some("QAT_START_FRAC"), Within(0.0, 1.0);
    /// Bits of quantised weights in training.
    quant_bits: usize = 6, Some("QUANT_BITS"), Int(2, 8);
    /// Keeps the rows of B, dd_dt, dd_A and trap in Mamba-3's in_proj as float16 where an export codes the others (not int8).
    fp16_inproj_rows: bool = false, Some("FP16_INPROJ_ROWS"), Any;
    /// Averages the weights over the whole run.
    ema_enabled: bool = true, Some("EMA_ENABLED"), Any;
    }

    P1607_1382 => {
    /// Mixes each position's embedding with the one before.
    use_smeargate: bool = true, Some("USE_SMEARGATE"), Any;
    /// Orthogonal initial matrices.
    use_ortho_init: bool = true, Some("USE_ORTHO_INIT"), Any;
    /// Adds an embedding of the token to the values of attention.
    ve_enabled: bool = false, Some("VE_ENABLED"), Any;
    /// Width of the value embedding's table.
    ve_dim: usize = 64, Some("VE_DIM"), Int(1, 16_384);
    /// Decay of the average of the weights over the run.
    ema_decay: f64 = 0.997, Some("EMA_DECAY"), Fraction;
    /// Learning-rate multiplier below which training quantises its linear weights; 0 never does.
    late_qat_threshold: f64 = 0.15, Some("LATE_QAT_THRESHOLD"), Within(0.0, 1.0);
    /// Averages snapshots of the weights near the end (used only where the average over the run is off).
    swa_enabled: bool = true, Some("SWA_ENABLED"), Any;
    /// Steps between snapshots.
    swa_every: usize = 50, Some("SWA_EVERY"), Int(1, 1_000_000_000);
    }

    P1607 => {
    /// Learning-rate multiplier below which snapshots are taken.
    swa_start_frac: f64 = 0.4, Some("SWA_START_FRAC"), Within(0.0, 1.0);
    }

    P1382 => {
    /// Layers that are Mamba-1 blocks; the others are attention blocks.
    mamba_layers: Vec<usize> = vec![], Some("MAMBA_LAYERS"), Layers(MOST_LAYERS);
    /// State size of Mamba-1.
    mamba_d_state: usize = 32, Some("MAMBA_D_STATE"), Int(1, 1024);
    /// Taps of Mamba-1's convolution.
    mamba_d_conv: usize = 4, Some("MAMBA_D_CONV"), Int(1, 64);
    /// Inner width of Mamba-1 in multiples of model_dim, rounded down to whole channels.
    mamba_expand: f64 = 1.5, Some("MAMBA_EXPAND"), Within(0.001, 64.0);
    /// Muon's rate of Mamba-1's matrices; with as_written the rate of every matrix's second update.
    mamba_matrix_lr: f64 = 0.015, Some("MAMBA_MATRIX_LR"), Within(0.0, 100.0);
    /// Recomputes Mamba-1 blocks in the backward pass.
    mamba_grad_checkpoint: bool = false, Some("MAMBA_GRAD_CHECKPOINT"), Any;
    /// Adds the hash of three tokens to that of two.
    trigram: bool = false, Some("TRIGRAM"), Any;
    /// Removes from attention's output what lies along the position's own value, in attention layers among the last so many.
    xsa_last_n: usize = 11, Some("XSA_LAST_N"), Int(0, MOST_LAYERS as i128);
    /// Rotated channels of an attention head; 0 rotates all.
    rope_dims: usize = 16, Some("ROPE_DIMS"), Int(0, 16_384);
    /// Positions beyond which the rotation's base grows with the sequence (NTK).
    rope_train_seq_len: usize = 1024, None, Int(1, 131_072);
    /// Scales the normed inputs of attention layer g by 1/sqrt(g + 1).
    ln_scale: bool = true, Some("LN_SCALE"), Any;
    /// Attention layers that get the value embedding.
    ve_layers: Vec<usize> = vec![9, 10], Some("VE_LAYERS"), Layers(MOST_LAYERS);
    /// Gates a block's whole change by its input.
    dtg_enabled: bool = false, Some("DTG_ENABLED"), Any;
    /// Gates each head's output by the block's input.
    gated_attention: bool = false, Some("GATED_ATTENTION"), Any;
    /// Adds the first attention layer's values to those of later ones.
    value_residual: bool = false, Some("VALUE_RESIDUAL"), Any;
    /// Extra heads that predict tokens further ahead, in training only.
    mtp_num_heads: usize = 0, Some("MTP_NUM_HEADS"), Int(0, 64);
    /// Weight of the extra heads' mean loss.
    mtp_loss_weight: f64 = 0.2, Some("MTP_LOSS_WEIGHT"), Within(0.0, 100.0);
    /// Tokens of one validation sequence; 0 takes train_seq_len.
    eval_seq_len: usize = 0, Some("EVAL_SEQ_LEN"), Int(0, 131_072);
    /// Muon's decoupled weight decay.
    muon_wd: f64 = 0.04, Some("MUON_WD"), Within(0.0, 100.0);
    /// Decoupled weight decay of the embeddings, vectors and scalars (AdamW).
    adam_wd: f64 = 0.04, Some("ADAM_WD"), Within(0.0, 100.0);
    /// Ranks whose row blocks Newton-Schulz takes one by one, as the source system on so many GPUs (as_written only).
    muon_shards: usize = 1, None, Int(1, 1024);
    /// Quantises linear weights in training from the start.
    qat_enabled: bool = false, Some("QAT_ENABLED"), Any;
    /// Replaces the average over the run by the mean of the last snapshots.
    lawa_enabled: bool = false, Some("LAWA_ENABLED"), Any;
    /// Snapshots of that mean.
    lawa_k: usize = 10, Some("LAWA_K"), Int(1, 1000);
    /// Steps between them.
    lawa_freq: usize = 100, Some("LAWA_FREQ"), Int(1, 1_000_000_000);
    }

    ALL => {
    /// Adam's learning rate of the token embedding when the head is untied.
    embed_lr: f64 = 0.6, Some("EMBED_LR"), Within(0.0, 100.0);
    /// Adam's learning rate of the untied head.
    head_lr: f64 = 0.008, Some("HEAD_LR"), Within(0.0, 100.0);
    /// Adam's learning rate of the token embedding when tied.
    tied_embed_lr: f64 = 0.05, Some("TIED_EMBED_LR"), Within(0.0, 100.0);
    /// Muon's learning rate of the blocks' matrices.
    matrix_lr: f64 = 0.04, Some("MATRIX_LR"), Within(0.0, 100.0);
    /// Adam's learning rate of vectors, scalars and skip weights.
    scalar_lr: f64 = 0.04, Some("SCALAR_LR"), Within(0.0, 100.0);
    /// Muon's momentum after its warm-up.
    muon_momentum: f64 = 0.95, Some("MUON_MOMENTUM"), Fraction;
    /// Newton-Schulz iterations of Muon.
    muon_backend_steps: usize = 5, Some("MUON_BACKEND_STEPS"), Int(0, 100);
    /// Muon's momentum at step 0.
    muon_momentum_warmup_start: f64 = 0.85, Some("MUON_MOMENTUM_WARMUP_START"), Fraction;
    /// Steps over which Muon's momentum rises linearly; 0 starts at the full one.
    muon_momentum_warmup_steps: usize = 500, Some("MUON_MOMENTUM_WARMUP_STEPS"), Int(0, 1_000_000_000);
    /// Adam's decay of the first moment.
    beta1: f64 = 0.9, Some("BETA1"), Fraction;
    /// Adam's decay of the second moment.
    beta2: f64 = 0.95, Some("BETA2"), Fraction;
    /// Added to the root in Adam's denominator.
    adam_eps: f64 = 1e-8, Some("ADAM_EPS"), Positive(1.0);
    /// Largest norm of the whole gradient; 0 does not clip.
    grad_clip_norm: f64 = 0.0, Some("GRAD_CLIP_NORM"), Within(0.0, 1e12);

    /// Optimizer steps of the run.
    iterations: usize = 20_000, Some("ITERATIONS"), Int(0, 1_000_000_000);
    /// Steps over which the learning rate rises linearly at the start; 0 starts at the full one.
    lr_warmup_steps: usize = 0, Some("LR_WARMUP_STEPS"), Int(0, 1_000_000_000);
    /// Steps of the warm-down to a learning rate of 0 at the end of the run.
    warmdown_iters: usize = 1200, Some("WARMDOWN_ITERS"), Int(0, 1_000_000_000);
    /// Steps run to prime the device before the clock starts; weights, optimizer and data are restored after them.
    warmup_steps: usize = 20, Some("WARMUP_STEPS"), Int(0, 1_000_000);
    /// Tokens of one optimizer step.
    train_batch_tokens: usize = 524_288, Some("TRAIN_BATCH_TOKENS"), Int(1, 67_108_864);
    /// Tokens of one training sequence.
    train_seq_len: usize = 1024, Some("TRAIN_SEQ_LEN"), Int(1, 131_072);
    /// Spans of the token stream that make up one step (the challenge's 8 over its GPUs), each followed by one skipped input.
    grad_accum_steps: usize = 8, Some("GRAD_ACCUM_STEPS"), Int(1, 65_536);
    /// Training time in seconds at which the run stops and by which the learning rate warms down; 0 for no cap.
    max_wallclock_seconds: f64 = 600.0, Some("MAX_WALLCLOCK_SECONDS"), Within(0.0, 1e9);
    /// Tokens of one validation batch over all spans.
    val_batch_size: usize = 524_288, Some("VAL_BATCH_SIZE"), Int(1, 67_108_864);
    /// Validation tokens that are scored; 0 scores all.
    val_tokens: usize = 0, Some("VAL_TOKENS"), Int(0, i64::MAX as i128);
    /// Steps between validations; 0 validates only at the end.
    val_loss_every: usize = 1000, Some("VAL_LOSS_EVERY"), Int(0, 1_000_000_000);
    /// Steps between logged training losses, after the first ten steps; 0 logs none.
    train_log_every: usize = 200, Some("TRAIN_LOG_EVERY"), Int(0, 1_000_000_000);

    /// Parts of the names of tensors that Adam trains and that stay float32.
    control_tensor_name_patterns: Vec<String> = control_patterns(), Some("CONTROL_TENSOR_NAME_PATTERNS"), List(256);
    /// Parts of the names of small tensors that int8 export keeps float32; follows the list above while equal to it.
    int8_keep_float_fp32_name_patterns: Vec<String> = control_patterns(), Some("INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"), List(256);
    /// Does as the source system's code does where that is no design: bfloat16 copies of what it keeps so, Newton-Schulz
    /// in bfloat16, the double update of pr1382, the untrained MLPs of pr1607's untie_mlp.
    as_written: bool = true, None, Any;
    }
}
