//! What a recipe must satisfy before anything is built from it.

use super::{KEYS, Recipe};
use crate::error::{Error, Result};

/// The most parameters a recipe may describe: far over what fits the challenge, far under what a host can hold.
const MOST_PARAMS: u64 = 1_000_000_000;

impl Recipe {
    /// Checks each key's bounds and the keys together, so that nothing built from the recipe can fail or be absurdly
    /// large because of it. The error names the keys.
    pub fn validate(&self) -> Result<()> {
        let refuse = |what: String, expected: String| {
            let name: String = self.name.chars().take(100).collect();
            Err(Error::input(what, format!("recipe {name}"), expected))
        };
        for key in KEYS {
            let value = key.value(self);
            if !key.admits(&value) {
                let shown = super::set::excerpt(&super::set::to_toml_text(value));
                return refuse(format!("{} = {shown}", key.name), key.expected());
            }
        }
        let divides = |whole: usize, part: usize, text: &str, parts: &str| {
            if whole.is_multiple_of(part) {
                return Ok(());
            }
            refuse(format!("{text} = {whole}"), format!("a multiple of {parts} = {part}"))
        };
        divides(self.model_dim, self.num_heads, "model_dim", "num_heads")?;
        divides(self.num_heads, self.num_kv_heads, "num_heads", "num_kv_heads")?;
        divides(self.head_dim(), 2, "head width model_dim / num_heads", "RoPE's pairs")?;
        let spans = self.grad_accum_steps * self.train_seq_len;
        divides(self.train_batch_tokens, spans, "train_batch_tokens", "grad_accum_steps * train_seq_len")?;
        if self.val_batch_size < spans {
            return refuse(
                format!("val_batch_size = {}", self.val_batch_size),
                format!("at least grad_accum_steps * train_seq_len = {spans}"),
            );
        }
        if self.param_count() > MOST_PARAMS {
            return refuse(
                format!(
                    "{} parameters by num_layers, model_dim, mlp_mult and vocab_size",
                    self.param_count()
                ),
                format!("at most {MOST_PARAMS}"),
            );
        }
        Ok(())
    }
}
