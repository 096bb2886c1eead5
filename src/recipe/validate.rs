//! What a recipe must satisfy before anything is built from it.

use super::{KEYS, PR1382, PR1607, PR1994, Recipe};
use crate::error::{Error, Result};

/// The most rows of a hashed table, so that its hash is exact in 32-bit integers ([`crate::ops::hash`]).
pub const MOST_BUCKETS: usize = 1 << 22;

impl Recipe {
    /// Checks each key's bounds and the keys together, so that nothing built from the recipe can fail because of it.
    /// The error names the keys.
    ///
    /// How large a model it describes is checked where the model is planned ([`crate::model::plan::Plan::of`]).
    pub fn validate(&self) -> Result<()> {
        for key in KEYS {
            let value = key.value(self);
            let shown = || super::set::excerpt(&super::set::to_toml_text(key.value(self)));
            if !key.admits(&value) {
                return self.refuse(format!("{} = {}", key.name, shown()), key.expected());
            }
            if !key.scope.holds(&self.system) && !key.is_default(self) {
                let what = format!("{} = {} in system {}", key.name, shown(), self.system);
                return self.refuse(what, format!("nothing: the key is of {}", key.scope.names()));
            }
        }
        self.divides("model_dim", self.model_dim, "num_heads", self.num_heads)?;
        self.divides("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)?;
        let rotated = match self.system.as_str() {
            PR1382 if self.rope_dims > 0 => self.rope_dims,
            _ => self.head_dim(),
        };
        if self.system != PR1607 {
            self.divides("rotated channels of an attention head", rotated, "RoPE's pairs", 2)?;
        }
        if self.head_dim() < 2 || rotated > self.head_dim() {
            let what =
                format!("rope_dims = {rotated} of heads of model_dim / num_heads = {}", self.head_dim());
            return self.refuse(what, "heads of at least 2 channels, no fewer than rotate".into());
        }
        if self.mlp_dim() == 0 {
            return self
                .refuse(format!("mlp_mult = {}", self.mlp_mult), "at least one hidden channel".into());
        }
        let spans = self.grad_accum_steps * self.train_seq_len;
        let batch = self.train_batch_tokens;
        self.divides("train_batch_tokens", batch, "grad_accum_steps * train_seq_len", spans)?;
        let (spans, sequence) = match self.eval_seq_len {
            0 => (spans, "train_seq_len"),
            len => (self.grad_accum_steps * len, "eval_seq_len"),
        };
        if self.val_batch_size < spans {
            return self.refuse(
                format!("val_batch_size = {}", self.val_batch_size),
                format!("at least grad_accum_steps * {sequence} = {spans}"),
            );
        }
        match self.system.as_str() {
            PR1994 => self.validate_pr1994(),
            PR1607 => self.validate_pr1607(),
            PR1382 => self.validate_pr1382(),
            _ => Ok(()),
        }
    }

    fn refuse(&self, what: String, expected: String) -> Result<()> {
        let name: String = self.name.chars().take(100).collect();
        Err(Error::input(what, format!("recipe {name}"), expected))
    }

    fn divides(&self, text: &str, whole: usize, parts: &str, part: usize) -> Result<()> {
        if part > 0 && whole.is_multiple_of(part) {
            return Ok(());
        }
        self.refuse(format!("{text} = {whole}"), format!("a multiple of {parts} = {part}"))
    }

    /// Refuses a list of layers that names one past the last.
    fn has_layers(&self, key: &str, layers: &[usize], count: usize, of: &str) -> Result<()> {
        match layers.iter().find(|layer| **layer >= count) {
            None => Ok(()),
            Some(layer) => {
                self.refuse(format!("{key} names layer {layer}"), format!("layers below {of} = {count}"))
            }
        }
    }

    fn has_buckets(&self, key: &str, buckets: usize) -> Result<()> {
        if buckets <= MOST_BUCKETS {
            return Ok(());
        }
        self.refuse(format!("{key} = {buckets}"), format!("at most {MOST_BUCKETS}"))
    }

    fn validate_pr1994(&self) -> Result<()> {
        let (count, of) = match self.num_unique_layers {
            0 => (self.num_layers, "num_layers"),
            unique => (unique, "num_unique_layers"),
        };
        let lists = [
            ("parallel_layer_positions", &self.parallel_layer_positions),
            ("attn_layer_positions", &self.attn_layer_positions),
            ("mamba2_layer_positions", &self.mamba2_layer_positions),
        ];
        for (index, (key, layers)) in lists.iter().enumerate() {
            self.has_layers(key, layers, count, of)?;
            for (other, others) in &lists[..index] {
                if let Some(layer) = layers.iter().find(|layer| others.contains(layer)) {
                    let what = format!("{key} and {other} both name layer {layer}");
                    return self.refuse(what, "each layer in one of them".into());
                }
            }
        }
        if self.num_unique_layers == 0 && self.num_loops > 1 {
            return self
                .refuse(format!("num_loops = {}", self.num_loops), "num_unique_layers above 0".into());
        }
        let inner = self.mamba2_expand * self.model_dim;
        self.divides("mamba2_expand * model_dim", inner, "mamba2_headdim", self.mamba2_headdim)?;
        self.has_taps("mamba2_d_conv", self.mamba2_d_conv)?;
        let heads = inner / self.mamba2_headdim;
        self.divides("heads of Mamba-2", heads, "mamba2_ngroups", self.mamba2_ngroups)?;
        if self.mamba2_ngroups > 1 && !self.mamba2_gated_norm {
            let what = format!("mamba2_ngroups = {}", self.mamba2_ngroups);
            return self.refuse(what, "1, or mamba2_gated_norm = true".into());
        }
        if self.mamba2_gated_norm && self.mamba2_kill_selectivity {
            let what = "mamba2_gated_norm and mamba2_kill_selectivity".into();
            return self.refuse(what, "one of them".into());
        }
        self.has_buckets("bigram_vocab_size", self.bigram_vocab_size)
    }

    fn has_taps(&self, key: &str, taps: usize) -> Result<()> {
        if taps >= 2 {
            return Ok(());
        }
        self.refuse(format!("{key} = {taps}"), "at least 2".into())
    }

    fn validate_pr1607(&self) -> Result<()> {
        let inner = self.mamba3_expand * self.model_dim;
        self.divides("mamba3_expand * model_dim", inner, "mamba3_headdim", self.mamba3_headdim)?;
        let heads = inner / self.mamba3_headdim;
        self.divides("heads of Mamba-3", heads, "mamba3_ngroups", self.mamba3_ngroups)?;
        if self.mamba3_d_state < 4 {
            let what = format!("mamba3_d_state = {}", self.mamba3_d_state);
            return self.refuse(what, "at least 4: a quarter of it are rotation angles".into());
        }
        self.has_layers("recur_layers", &self.recur_layers, self.num_layers, "num_layers")?;
        let known = ["even", "first", "last", "nemotron"];
        let placement = self.attn_placement.trim();
        if !known.contains(&placement) {
            let Some(super::Value::Layers(layers)) = super::set::parse_text(super::Kind::Layers, placement)
            else {
                let what = format!("attn_placement = {}", super::set::excerpt(placement));
                return self.refuse(what, format!("{}, or numbers of layers", known.join(", ")));
            };
            self.has_layers("attn_placement", &layers, self.num_layers, "num_layers")?;
        }
        if self.num_attn_layers > self.num_layers {
            let what = format!("num_attn_layers = {}", self.num_attn_layers);
            return self.refuse(what, format!("at most num_layers = {}", self.num_layers));
        }
        self.has_buckets("bigram_buckets", self.bigram_buckets)
    }

    fn validate_pr1382(&self) -> Result<()> {
        self.has_layers("mamba_layers", &self.mamba_layers, self.num_layers, "num_layers")?;
        if self.ve_enabled {
            self.has_layers("ve_layers", &self.ve_layers, self.num_layers, "num_layers")?;
        }
        self.has_taps("mamba_d_conv", self.mamba_d_conv)?;
        if self.mamba_expand * (self.model_dim as f64) < 1.0 {
            let what = format!("mamba_expand = {}", self.mamba_expand);
            return self.refuse(what, "at least one inner channel".into());
        }
        if self.muon_shards > 1 && !self.as_written {
            let what = format!("muon_shards = {}", self.muon_shards);
            return self.refuse(what, "1, or as_written = true".into());
        }
        self.has_buckets("bigram_vocab_size", self.bigram_vocab_size)
    }
}
