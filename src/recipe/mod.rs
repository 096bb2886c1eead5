//! The recipe: one struct with every knob of a run and its one default.
//!
//! The table below is the only place that knows a key: a row gives its meaning, name, type, default, environment name
//! and bounds, and TOML ([`Recipe::load`], [`Recipe::to_toml`]), `--set` ([`Recipe::set`]), the challenge's environment
//! ([`Recipe::apply_env_map`], [`Recipe::apply_env_file`]), help ([`keys`]) and [`Recipe::validate`] follow from it.

mod builtin;
mod env;
mod knob;
mod set;
mod validate;

pub use builtin::{BuiltIn, builtin};
pub use env::EnvReport;
pub use knob::{Key, Kind, Limit, Value};

use knob::Limit::{Any, Fraction, Int, List, OneOf, Positive, Text, Within};
use knob::{Knob, knobs};

/// The tensors that the challenge keeps out of Muon and in float32, by parts of their names.
fn control_patterns() -> Vec<String> {
    "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights"
        .split(',')
        .map(String::from)
        .collect()
}

knobs! {
    /// Name of the recipe, as `fairway recipes` lists it.
    name: String = "baseline".into(), None, Text(100);
    /// What the recipe is, in one line.
    summary: String = "The challenge's baseline: 9 attention blocks of width 512 with U-Net skips, Muon and Adam".into(), None, Text(200);
    /// The system that the keys describe.
    system: String = "challenge".into(), None, OneOf(&["challenge"]);
    /// Seed of the initial weights and of every sample.
    seed: u64 = 1337, Some("SEED"), Int(0, i64::MAX as i128);

    /// Token ids of the tokenizer.
    vocab_size: usize = 1024, Some("VOCAB_SIZE"), Int(1, 65_536);
    /// Transformer blocks; the first half feeds U-Net skips to the second.
    num_layers: usize = 9, Some("NUM_LAYERS"), Int(1, 1024);
    /// Width of the residual stream.
    model_dim: usize = 512, Some("MODEL_DIM"), Int(1, 16_384);
    /// Query heads of an attention layer.
    num_heads: usize = 8, Some("NUM_HEADS"), Int(1, 1024);
    /// Key and value heads of an attention layer, each shared by num_heads / num_kv_heads query heads.
    num_kv_heads: usize = 4, Some("NUM_KV_HEADS"), Int(1, 1024);
    /// Hidden width of the MLP in multiples of model_dim.
    mlp_mult: usize = 2, Some("MLP_MULT"), Int(1, 64);
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
    /// Steps of the linear warm-down to a learning rate of 0 at the end of the run.
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
    /// Steps between validations; 0 validates only at the end.
    val_loss_every: usize = 1000, Some("VAL_LOSS_EVERY"), Int(0, 1_000_000_000);
    /// Steps between logged training losses, after the first ten steps; 0 logs none.
    train_log_every: usize = 200, Some("TRAIN_LOG_EVERY"), Int(0, 1_000_000_000);

    /// Parts of the names of tensors that Adam trains and that stay float32.
    control_tensor_name_patterns: Vec<String> = control_patterns(), Some("CONTROL_TENSOR_NAME_PATTERNS"), List(256);
    /// Parts of the names of small tensors that int8 export keeps float32; follows the list above while equal to it.
    int8_keep_float_fp32_name_patterns: Vec<String> = control_patterns(), Some("INT8_KEEP_FLOAT_FP32_NAME_PATTERNS"), List(256);
    /// Keep in bfloat16 what the source system keeps in bfloat16 (here the embedding, its Adam state and Newton-Schulz).
    as_written: bool = true, None, Any;
}

/// Every key, in the order of the struct: for help, documentation and comparison.
pub fn keys() -> &'static [Key] {
    KEYS
}

impl Recipe {
    /// Width of one attention head: model_dim / num_heads (0 when num_heads is 0).
    pub fn head_dim(&self) -> usize {
        self.model_dim.checked_div(self.num_heads).unwrap_or(0)
    }

    /// Width of the keys, and of the values, of one token: num_kv_heads * head_dim.
    pub fn kv_dim(&self) -> usize {
        self.num_kv_heads.saturating_mul(self.head_dim())
    }

    /// Hidden width of the MLP: mlp_mult * model_dim.
    pub fn mlp_dim(&self) -> usize {
        self.mlp_mult.saturating_mul(self.model_dim)
    }

    /// Blocks before the middle, whose outputs the blocks after it take as skips.
    pub fn num_encoder_layers(&self) -> usize {
        self.num_layers / 2
    }

    /// Learning rate of the token embedding: tied_embed_lr when tied, else embed_lr.
    pub fn token_lr(&self) -> f64 {
        if self.tie_embeddings { self.tied_embed_lr } else { self.embed_lr }
    }

    /// Tokens of one span of the stream: train_batch_tokens / grad_accum_steps (0 when that is 0).
    pub fn span_tokens(&self) -> usize {
        self.train_batch_tokens.checked_div(self.grad_accum_steps).unwrap_or(0)
    }

    /// Tokens of one validation batch, whole sequences: the challenge's rule
    /// (val_batch_size / grad_accum_steps, rounded down to a multiple of train_seq_len).
    pub fn val_batch_tokens(&self) -> usize {
        let tokens = self.val_batch_size.checked_div(self.grad_accum_steps).unwrap_or(0);
        tokens.checked_div(self.train_seq_len).unwrap_or(0).saturating_mul(self.train_seq_len)
    }

    /// The wallclock cap in seconds, if there is one.
    pub fn wallclock_cap(&self) -> Option<f64> {
        (self.max_wallclock_seconds > 0.0).then_some(self.max_wallclock_seconds)
    }

    /// Trainable parameters, in closed form (17,059,912 for the baseline); saturates on absurd sizes.
    ///
    /// Embedding V*d (twice when untied); per block two d*d projections, two d*kv, q_gain, two d*hidden, four vectors'
    /// worth of scales and residual mix; one skip vector a pair of blocks.
    pub fn param_count(&self) -> u64 {
        let [d, kv, hidden] = [self.model_dim, self.kv_dim(), self.mlp_dim()].map(|v| v as u128);
        let embeddings = if self.tie_embeddings { 1 } else { 2 };
        let block = [
            d.saturating_mul(d).saturating_mul(2),
            d.saturating_mul(kv).saturating_mul(2),
            d.saturating_mul(hidden).saturating_mul(2),
            d.saturating_mul(4),
            self.num_heads as u128,
        ];
        let total = [
            (self.vocab_size as u128).saturating_mul(d).saturating_mul(embeddings),
            block.into_iter().fold(0, u128::saturating_add).saturating_mul(self.num_layers as u128),
            d.saturating_mul(self.num_encoder_layers() as u128),
        ];
        total.into_iter().fold(0, u128::saturating_add).try_into().unwrap_or(u64::MAX)
    }
}
