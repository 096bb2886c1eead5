//! The recipe: one struct with every knob of a run and its one default.
//!
//! The table of keys (`table.rs`) is the only place that knows a key: a row gives its meaning, name, type, default, environment name
//! and bounds, and TOML ([`Recipe::load`], [`Recipe::to_toml`]), `--set` ([`Recipe::set`]), the challenge's environment
//! ([`Recipe::apply_env_map`], [`Recipe::apply_env_file`]), help ([`keys`]) and [`Recipe::validate`] follow from it.

mod builtin;
mod env;
mod knob;
mod set;
mod table;
mod validate;

pub use builtin::{BuiltIn, builtin};
pub use env::EnvReport;
pub use knob::{Key, Kind, Limit, Scope, Value};

pub use table::Recipe;
pub use validate::MOST_BUCKETS;

use table::KEYS;

/// The systems that a recipe can describe: the challenge's own model and the three hybrids, by their pull requests.
pub const SYSTEMS: [&str; 4] = [CHALLENGE, PR1994, PR1607, PR1382];
/// The challenge's baseline (spec/challenge.md section 4).
pub const CHALLENGE: &str = "challenge";
/// kill-Mamba-2 beside attention with ternary weights, looped (spec/pr1994.md).
pub const PR1994: &str = "pr1994";
/// Mamba-3 with a layer of attention and hinge recurrence (spec/pr1607.md).
pub const PR1607: &str = "pr1607";
/// Mamba-1 and attention in a U-Net (spec/pr1382.md).
pub const PR1382: &str = "pr1382";

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

    /// Hidden width of the MLP: mlp_mult * model_dim, rounded down.
    pub fn mlp_dim(&self) -> usize {
        (self.mlp_mult * self.model_dim as f64) as usize
    }

    /// PR #1607's attention layers, ascending: `round(i L / (n + 1))` for `even`, halves to even.
    pub fn attention_layers(&self) -> Vec<usize> {
        let (count, layers) = (self.num_attn_layers, self.num_layers);
        let even = |i: usize| (i as f64 * layers as f64 / (count as f64 + 1.0)).round_ties_even() as usize;
        let mut chosen: Vec<usize> = match self.attn_placement.trim() {
            _ if count == 0 => Vec::new(),
            "even" => (1..=count).map(even).collect(),
            "first" => (0..count.min(layers)).collect(),
            "last" => (layers.saturating_sub(count)..layers).collect(),
            "nemotron" => (1..=count).map(|i| even(i).max(1)).collect(),
            text => match set::parse_text(Kind::Layers, text) {
                Some(Value::Layers(layers)) => layers,
                _ => Vec::new(),
            },
        };
        chosen.sort_unstable();
        chosen.dedup();
        // Placed past the end there is no such layer, as in the source.
        chosen.retain(|layer| *layer < layers);
        chosen
    }

    /// Whether the recurrence is on in the step after `step` completed ones.
    pub fn recurs_at(&self, step: usize) -> bool {
        let done = step as f64 / self.iterations.max(1) as f64;
        !self.recur_layers.is_empty() && self.recur_start_frac < 1.0 && done >= self.recur_start_frac
    }

    /// Settles the recurrence as it was in the last of `steps` completed steps: on from the start, or never.
    pub fn settle_recurrence(&mut self, steps: usize) {
        if !self.recur_layers.is_empty() {
            self.recur_start_frac = if self.recurs_at(steps.saturating_sub(1)) { 0.0 } else { 1.0 };
        }
    }

    /// Whether the average of the weights takes their place before the last validation, not after it.
    pub fn averages_before_validation(&self) -> bool {
        self.system == PR1994
    }

    /// Whether validation computes with the quantised weights of late training.
    pub fn validates_quantised(&self) -> bool {
        self.system == PR1607
    }

    /// Muon's decoupled weight decay.
    pub fn muon_decay(&self) -> f64 {
        match self.system.as_str() {
            PR1607 => self.weight_decay,
            PR1382 => self.muon_wd,
            _ => 0.0,
        }
    }

    /// Adam's decoupled weight decay.
    pub fn adam_decay(&self) -> f64 {
        if self.system == PR1382 { self.adam_wd } else { 0.0 }
    }

    /// Tokens of one validation sequence.
    pub fn val_seq_len(&self) -> usize {
        if self.eval_seq_len == 0 { self.train_seq_len } else { self.eval_seq_len }
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
    /// (val_batch_size / grad_accum_steps, rounded down to a multiple of the sequence).
    pub fn val_batch_tokens(&self) -> usize {
        let tokens = self.val_batch_size.checked_div(self.grad_accum_steps).unwrap_or(0);
        let time = self.val_seq_len();
        tokens.checked_div(time).unwrap_or(0).saturating_mul(time)
    }

    /// The wallclock cap in seconds, if there is one.
    pub fn wallclock_cap(&self) -> Option<f64> {
        (self.max_wallclock_seconds > 0.0).then_some(self.max_wallclock_seconds)
    }
}
