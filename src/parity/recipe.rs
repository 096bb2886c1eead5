//! The recipe that an entry's `kind`, `config`, `env` and other keys describe.

use super::case::Case;
use super::index::{Entry, Section};
use crate::error::{Error, Result};
use crate::model;
use crate::ops::Plain;
use crate::recipe::{CHALLENGE, PR1382, PR1607, PR1994, Recipe, keys};
use serde_json::Value;

/// The arguments of the peers' models that decide what they compute.
const NEEDED: [&str; 9] = [
    "vocab_size",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_mult",
    "tie_embeddings",
    "logit_softcap",
    "rope_base",
];

/// The arguments that only decide what they start from, and the norms' epsilon, where it is not float32's.
const OPTIONAL: [&str; 3] = ["tied_embed_init_std", "qk_gain_init", "rms_eps"];

/// Further arguments of a system's model, by their own names and the recipe's.
type Own = &'static [(&'static str, &'static str)];

const OF_PR1994: Own = &[
    ("attn_layer_positions", "attn_layer_positions"),
    ("bigram_dim", "bigram_dim"),
    ("bigram_vocab_size", "bigram_vocab_size"),
    ("mamba2_layer_positions", "mamba2_layer_positions"),
    ("num_loops", "num_loops"),
    ("num_unique_layers", "num_unique_layers"),
    ("parallel_layer_positions", "parallel_layer_positions"),
];

const OF_PR1607: Own = &[
    ("bigram_buckets", "bigram_buckets"),
    ("bigram_hash_dim", "bigram_hash_dim"),
    ("mamba3_chunk_size", "mamba3_chunk_size"),
    ("mamba3_d_state", "mamba3_d_state"),
    ("mamba3_expand", "mamba3_expand"),
    ("mamba3_headdim", "mamba3_headdim"),
    ("mamba3_ngroups", "mamba3_ngroups"),
    ("num_attn_layers", "num_attn_layers"),
    ("rope_fraction", "rope_fraction"),
    ("use_bigram_hash", "use_bigram_hash"),
    ("use_ortho_init", "use_ortho_init"),
    ("use_smeargate", "use_smeargate"),
    ("ve_dim", "ve_dim"),
    ("ve_enabled", "ve_enabled"),
];

const OF_PR1382: Own = &[
    ("bigram_dim", "bigram_dim"),
    ("bigram_vocab_size", "bigram_vocab_size"),
    ("dtg", "dtg_enabled"),
    ("gated_attention", "gated_attention"),
    ("ln_scale", "ln_scale"),
    ("mamba_d_conv", "mamba_d_conv"),
    ("mamba_d_state", "mamba_d_state"),
    ("mamba_expand", "mamba_expand"),
    ("mamba_layers", "mamba_layers"),
    ("mtp_loss_weight", "mtp_loss_weight"),
    ("mtp_num_heads", "mtp_num_heads"),
    ("rope_dims", "rope_dims"),
    ("value_residual", "value_residual"),
    ("ve_dim", "ve_dim"),
    ("ve_enabled", "ve_enabled"),
    ("ve_layers", "ve_layers"),
    ("xsa_last_n", "xsa_last_n"),
];

/// The system of a kind, and the arguments that its model has beyond the challenge's.
fn system(kind: &str) -> (&'static str, Own) {
    match kind.rsplit('.').next() {
        Some(PR1994) => (PR1994, OF_PR1994),
        Some(PR1607 | "hessians_1607") => (PR1607, OF_PR1607),
        Some(PR1382) => (PR1382, OF_PR1382),
        _ => (CHALLENGE, &[]),
    }
}

/// The recipe of an entry's `env` and `config` for `ids[spans, batch, time]` in a step.
///
/// The norms' epsilon is float32's unless the config has another or a note says that the peer's was float64's, which is
/// what PyTorch takes for a model that computes in float64.
pub(super) fn recipe<P: Plain>(case: &Case<'_, P>, [spans, batch, time]: [usize; 3]) -> Result<Recipe> {
    let (system, own) = system(case.entry.kind()?);
    let mut recipe = env_recipe(case.entry, system)?;
    let config = case.entry.section("config")?;
    let names: Vec<&str> = own.iter().map(|(name, _)| *name).collect();
    config.only(&[NEEDED.as_slice(), &OPTIONAL, &names].concat())?;
    if let Some(key) = NEEDED.iter().find(|key| config.get(key).is_none()) {
        return Err(Error::input(format!("no {key}"), "config", "every argument of the model"));
    }
    for (key, value) in config.iter().filter(|(key, _)| !key.starts_with("note")) {
        let key = own.iter().find(|(name, _)| *name == key).map_or(key, |(_, key)| key);
        set(&mut recipe, key, value, "config")?;
    }
    if config.get("rms_eps").is_none() && case.entry.says("RMS eps = float64 machine epsilon") {
        recipe.rms_eps = f64::EPSILON;
    }
    attributes(case.entry, &mut recipe)?;
    recipe.train_seq_len = time;
    recipe.grad_accum_steps = spans;
    recipe.train_batch_tokens = spans * batch * time;
    recipe.val_batch_size = recipe.train_batch_tokens;
    checked(recipe, "config")
}

fn set(recipe: &mut Recipe, key: &str, value: &Value, place: &str) -> Result<()> {
    recipe.set(&format!("{key}={}", text(value))).map_err(|error| placed(error, place))
}

/// What an entry says of the peer's model beyond its arguments: attributes set afterwards, and the sizes of parts that
/// have no argument.
fn attributes(entry: &Entry, recipe: &mut Recipe) -> Result<()> {
    let attributes = entry.section("attrs")?;
    let known: &[&str] = if recipe.system == PR1607 { &["recur_enabled"] } else { &[] };
    attributes.only(known)?;
    if recipe.system == PR1607 {
        let on = attributes.flag("recur_enabled", false)?;
        recipe.recur_start_frac = if on { 0.0 } else { 1.0 };
    }
    let sizes: Section<'_> = entry.section("mamba2_args")?;
    let known: &[&str] = if recipe.system == PR1994 { &["chunk_size", "d_state", "headdim"] } else { &[] };
    sizes.only(known)?;
    for (key, value) in sizes.iter() {
        set(recipe, &format!("mamba2_{key}"), value, "mamba2_args")?;
    }
    match entry.top().count("rotary_train_seq_len")? {
        Some(length) if recipe.system == PR1382 => recipe.rope_train_seq_len = length,
        _ => {}
    }
    Ok(())
}

/// The recipe, if it can be built; `place` is where what it lacks comes from.
pub(super) fn checked(recipe: Recipe, place: &str) -> Result<Recipe> {
    model::check(&recipe).map_err(|error| placed(error, place))?;
    Ok(recipe)
}

/// A system's defaults under an entry's `env`. It does as its code is written; what is rounded to bf16 is the runner's
/// choice.
pub(super) fn env_recipe(entry: &Entry, system: &str) -> Result<Recipe> {
    let mut recipe = Recipe { name: "fixture".into(), system: system.into(), ..Recipe::default() };
    if matches!(system, PR1607 | PR1382) {
        recipe.mlp_type = "leaky_relu2".into();
    }
    let env = entry.section("env")?;
    let known = |name: &str| keys().iter().any(|key| key.env == Some(name));
    if let Some((name, _)) = env.iter().find(|(name, _)| !known(name)) {
        return Err(Error::input(format!("unknown name {name}"), "env", "the systems' names"));
    }
    let report = recipe.apply_env_map(env.iter().map(|(name, value)| (name, text(value))))?;
    match report.warnings.first() {
        Some(warning) => Err(Error::input(warning, "env", "names of the entry's system")),
        None => Ok(recipe),
    }
}

/// A value as a flag or an environment variable spells it.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), String::from)
}

/// The same error about another place.
pub(super) fn placed(error: Error, place: &str) -> Error {
    match error {
        Error::Input { what, expected, .. } => Error::input(what, place, expected),
        other => other,
    }
}
