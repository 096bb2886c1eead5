//! The challenge's environment names: from the process, or from a file of `NAME=value` lines.

use super::set::{excerpt, nearest, read_text};
use super::{KEYS, Key, Recipe};
use crate::error::{Error, Result};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Names that the systems' scripts and launchers know and that change nothing in training here.
const WITHOUT_EFFECT: &[&str] = &[
    "ALPHA_INIT",
    "ALPHA_LEARNED",
    "CONF_GATE_THRESHOLD",
    "EVAL_BATCH_SEQS",
    "EVAL_STRIDE",
    "EVAL_TEMP",
    "FP16_EMBED",
    "GPTQ_BLOCK_SIZE",
    "GPTQ_CALIB_BATCHES",
    "GPTQ_DAMP",
    "GPTQ_GEN_LEN",
    "GPTQ_GEN_TEMP",
    "GPTQ_LITE",
    "GPTQ_NUM_SEQS",
    "LOCAL_RANK",
    "LOGIT_CHUNK_TOKENS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX",
    "MATCHED_FINEWEB_REPO_ID",
    "MLX_EAGER_EVAL",
    "MLX_MAX_MICROBATCH_TOKENS",
    "MUON_BETA2",
    "NCCL_IB_DISABLE",
    "OUT_DIR",
    "PER_CONTEXT_ALPHA",
    "QUANT_BITS_MLP",
    "RANK",
    "RUN_ID",
    "SWEEP_MODE",
    "TARGET_MB",
    "TRIGRAM_SIDE_MEMORY",
    "TTT_BATCH_SEQS",
    "TTT_CHUNK_TOKENS",
    "TTT_ENABLED",
    "TTT_EPOCHS",
    "TTT_FREEZE_BLOCKS",
    "TTT_GRAD_CLIP",
    "TTT_LR",
    "TTT_MOMENTUM",
    "TTT_OPTIMIZER",
    "USE_GPTQ",
    "USE_LZMA",
    "USE_ZSTD",
    "WORLD_SIZE",
];

const DATA_PATH: &str = "DATA_PATH";
const TOKENIZER_PATH: &str = "TOKENIZER_PATH";

/// What an environment said beyond the recipe's keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EnvReport {
    /// The names that set a key, in the order of the keys.
    pub applied: Vec<&'static str>,
    /// Known names that have no effect here, a line each.
    pub warnings: Vec<String>,
    /// `DATA_PATH`: the folder of shards, for a run without `--data`.
    pub data_path: Option<PathBuf>,
    /// `TOKENIZER_PATH`: the tokenizer's model, for a run without `--tokenizer`.
    pub tokenizer_path: Option<PathBuf>,
}

impl Recipe {
    /// Applies the known names among `vars` (as `std::env::vars_os()` gives them) and ignores all others.
    ///
    /// On an error the recipe is unchanged.
    pub fn apply_env_map<N: AsRef<OsStr>, V: AsRef<OsStr>>(
        &mut self,
        vars: impl IntoIterator<Item = (N, V)>,
    ) -> Result<EnvReport> {
        let mut report = EnvReport::default();
        let mut found = Vec::new();
        for (name, value) in vars {
            let (Some(name), value) = (name.as_ref().to_str(), value.as_ref()) else { continue };
            match name {
                DATA_PATH => report.data_path = Some(value.into()),
                TOKENIZER_PATH => report.tokenizer_path = Some(value.into()),
                _ => {
                    let Some(index) = KEYS.iter().position(|key| key.env == Some(name)) else { continue };
                    let text = value.to_str().ok_or_else(|| {
                        Error::input(
                            "not UTF-8",
                            format!("environment variable {name}"),
                            KEYS[index].expected(),
                        )
                    })?;
                    found.push((index, text.to_string()));
                }
            }
        }
        // The order of an environment means nothing; the table's lets one list follow another.
        found.sort_by_key(|(index, _)| *index);
        let mut recipe = self.clone();
        for (index, text) in found {
            let key = &KEYS[index];
            let name = key.env.unwrap_or(key.name);
            if !key.scope.holds(&recipe.system) {
                report.warnings.push(foreign(key, "environment variable", &recipe));
                continue;
            }
            recipe.put_text(key, &text, format_args!("environment variable {name}"))?;
            report.applied.push(name);
        }
        *self = recipe;
        Ok(report)
    }

    /// Applies the `NAME=value` lines of a file: `export`, quotes, comments and line continuations as in a shell,
    /// literal values only. The last of equal names wins.
    ///
    /// An unknown name is an error, a known one without effect here a warning. On an error the recipe is unchanged.
    pub fn apply_env_file(&mut self, path: &Path) -> Result<EnvReport> {
        let text = read_text(path)?;
        let mut report = EnvReport::default();
        let mut last: Vec<(usize, String, String)> = Vec::new();
        for (number, line) in text.trim_start_matches('\u{feff}').lines().enumerate() {
            let place = format!("{} line {}", path.display(), number + 1);
            for (name, value) in assignments(line, &place)? {
                match name.as_str() {
                    DATA_PATH => report.data_path = Some(value.into()),
                    TOKENIZER_PATH => report.tokenizer_path = Some(value.into()),
                    name if WITHOUT_EFFECT.contains(&name) => {
                        report.warnings.push(format!("{name} ({place}) has no effect here"));
                    }
                    name => {
                        let index = known(name, &place)?;
                        last.retain(|(other, ..)| *other != index);
                        last.push((index, value, place.clone()));
                    }
                }
            }
        }
        last.sort_by_key(|(index, ..)| *index);
        let mut recipe = self.clone();
        for (index, value, place) in last {
            let key = &KEYS[index];
            if !key.scope.holds(&recipe.system) {
                report.warnings.push(foreign(key, &place, &recipe));
                continue;
            }
            recipe.put_text(key, &value, place)?;
            report.applied.push(key.env.unwrap_or(key.name));
        }
        *self = recipe;
        Ok(report)
    }
}

/// What is said of a name that belongs to another system than the recipe's.
fn foreign(key: &Key, place: &str, recipe: &Recipe) -> String {
    let name = key.env.unwrap_or(key.name);
    format!("{name} ({place}) has no effect in system {}: it is of {}", recipe.system, key.scope.names())
}

fn known(name: &str, place: &str) -> Result<usize> {
    KEYS.iter().position(|key| key.env == Some(name)).ok_or_else(|| {
        let all = KEYS.iter().filter_map(|key| key.env);
        let near =
            nearest(name, all.chain(WITHOUT_EFFECT.iter().copied()).chain([DATA_PATH, TOKENIZER_PATH]));
        Error::input(
            format!("unknown name {}", excerpt(name)),
            place,
            format!("a name of the challenge; the nearest is {near}"),
        )
    })
}

/// The assignments of one shell line: words `NAME=value`, with `export` before them or not.
fn assignments(line: &str, place: &str) -> Result<Vec<(String, String)>> {
    words(line, place)?
        .into_iter()
        .filter(|word| word != "export")
        .map(|word| {
            let named = word.split_once('=').filter(|(name, _)| {
                name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            });
            named
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .ok_or_else(|| Error::input(format!("cannot read {}", excerpt(&word)), place, "NAME=value"))
        })
        .collect()
}

/// Splits a line into words as a shell does, without expanding anything.
fn words(line: &str, place: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    // None between words; Some("") is a word that is empty so far, as "" is.
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (Some('\''), c) => word.get_or_insert_default().push(c),
            (_, '$' | '`') => {
                return Err(Error::input(
                    format!("cannot expand {}", excerpt(line)),
                    place,
                    "a literal value",
                ));
            }
            (Some(_), '\\') => match chars.next() {
                Some(c @ ('"' | '\\' | '$' | '`')) => word.get_or_insert_default().push(c),
                Some(c) => word.get_or_insert_default().extend(['\\', c]),
                None => break,
            },
            (Some(_), c) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                word.get_or_insert_default();
                quote = Some(c);
            }
            // At the end of a line it only says that the command goes on.
            (None, '\\') => {
                if let Some(c) = chars.next() {
                    word.get_or_insert_default().push(c);
                }
            }
            (None, '#') if word.is_none() => break,
            (None, c) if c.is_whitespace() || c == ';' => words.extend(word.take()),
            (None, c) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(Error::input("a quote is not closed", place, "NAME=value on one line"));
    }
    words.extend(word);
    Ok(words)
}
