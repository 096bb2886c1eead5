//! Parity with other people's numbers: every fixture of a folder, built, run and compared.
//!
//! A folder holds `index*.json` and one safetensors file for each fixture that they list. A fixture's `kind` names what
//! to build from the entry's `config`, `env` and other keys; its inputs (`in.*`, `param.*`, `cot.*`) go in under the
//! peers' own names, and every other tensor of the file (`out.*`, `grad.*`, `act.*`, ...) is expected of the result.

mod case;
mod compare;
mod data;
mod eval;
mod fixture;
mod index;
mod layers;
mod model;
mod ops;
mod optim;
mod quant;
mod recipe;
mod train;

use crate::error::{Error, Result};
use crate::ops::Plain;
use burn::tensor::DType;
use case::Case;
use index::Index;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Runs only the fixtures whose names match this glob (`*`: any characters, `?`: one).
    pub only: Option<String>,
    /// The folder of tokenizer models, which are found by their SHA-256; `../tokenizers` beside the fixtures if none.
    pub tokenizers: Option<PathBuf>,
    /// The type to compute in: f64 is compared with an entry's `tol`, any other with its `tol_f32`.
    pub precision: DType,
}

/// One comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The fixture's name.
    pub fixture: String,
    /// The tensor, or the entry's key, that is compared; `*` where the whole fixture cannot be.
    pub tensor: String,
    /// The largest error over the largest magnitude of the expected tensor (absolute where `note` says so); none where
    /// there is nothing to measure.
    pub error: Option<f64>,
    /// The most that the entry allows, never widened here.
    pub tolerance: Option<f64>,
    /// Whether the error is within the tolerance.
    pub ok: bool,
    /// Why a row failed, and where; or how it was measured.
    pub note: Option<String>,
}

/// Every row of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The rows, fixture by fixture in the order of their names.
    pub rows: Vec<Row>,
    /// Rows that are ok.
    pub passed: usize,
    /// Rows that are not.
    pub failed: usize,
}

/// Runs every fixture that the index files of `dir` list on a device; `on_row` is told of each row as it is known.
///
/// Errors (input): a folder without a readable index, or a glob that matches no name. A fixture that cannot be read or
/// run is no error but a row that failed, with the reason.
pub fn run<P: Plain>(
    dir: &Path,
    options: &Options,
    device: &P::Device,
    on_row: &mut dyn FnMut(&Row),
) -> Result<Report> {
    let index = Index::load(dir)?;
    let mut rows = Vec::new();
    for (name, entry) in index.matching(options.only.as_deref())? {
        let case = Case::<P>::open(dir, &index, name, entry, options, device);
        let found = case.map_or_else(|error| vec![refused(name, &error)], |case| case.rows(solve::<P>));
        found.iter().for_each(&mut *on_row);
        rows.extend(found);
    }
    let passed = rows.iter().filter(|row| row.ok).count();
    Ok(Report { passed, failed: rows.len() - passed, rows })
}

/// The row of a fixture that cannot be run.
fn refused(fixture: &str, error: &Error) -> Row {
    Row {
        fixture: fixture.into(),
        tensor: "*".into(),
        error: None,
        tolerance: None,
        ok: false,
        note: Some(error.to_string()),
    }
}

/// What runs the fixtures of a kind.
type Solve<P> = fn(&mut Case<'_, P>) -> Result<()>;

/// Every kind that is known.
fn kinds<P: Plain>() -> Vec<(&'static str, Solve<P>)> {
    vec![
        ("data.byte_table", data::byte_table),
        ("eval.eval_1382", eval::evaluation),
        ("eval.eval_1607", eval::evaluation),
        ("eval.eval_1994", eval::evaluation),
        ("eval.eval_challenge", eval::evaluation),
        ("eval.hessians_1607", quant::hessians_1607),
        ("layer.mamba2", layers::mixers::mamba2_official),
        ("model.challenge", model::model),
        ("model.pr1382", model::model),
        ("model.pr1607", model::model),
        ("model.pr1994", model::model),
        ("op.attn1382_xsa0", layers::attention::attention_1382),
        ("op.attn1382_xsa1", layers::attention::attention_1382),
        ("op.attn1607_siluv", layers::attention::attention_1607),
        ("op.attn1994_ternary", layers::attention::attention_1994),
        ("op.attn_causal_gqa", ops::causal_attention),
        ("op.attn_qknorm_rope_gain_gqa", ops::normed_attention),
        ("op.bigram1382", layers::tokens::hashed_1382),
        ("op.bigram1382_trigram", layers::tokens::hashed_1382_triples),
        ("op.bigram1607", layers::tokens::hashed_1607),
        ("op.bigram_hash_ids", layers::tokens::hash_ids),
        ("op.bitlinear_ste", layers::linear::bit_linear),
        ("op.causal_conv1d", layers::mixers::causal_conv),
        ("op.causal_conv1d_silu", layers::mixers::causal_conv_silu),
        ("op.fake_int6_1382", layers::linear::fake_int6_1382),
        ("op.fake_int6_1607", layers::linear::fake_int6_1607),
        ("op.kill_mamba2_core", layers::mixers::kill_core),
        ("op.leakyrelu2_mlp", layers::linear::leaky_mlp),
        ("op.mamba1_block", layers::mixers::mamba1_block),
        ("op.mamba1_scan", layers::mixers::mamba1_scan),
        ("op.mamba2_layer_full", layers::mixers::mamba2_layer),
        ("op.mamba2_layer_kill", layers::mixers::mamba2_layer),
        ("op.mamba2_layer_kill_ternary", layers::mixers::mamba2_layer),
        ("op.mamba3_layer", layers::mixers::mamba3_layer),
        ("op.mamba3_siso_core", layers::mixers::mamba3_core),
        ("op.mlp1607_leaky2", layers::linear::leaky_mlp_1607),
        ("op.relu2_mlp", layers::linear::relu_squared_mlp),
        ("op.rmsnorm", ops::rms_norm),
        ("op.rmsnorm_gated", layers::mixers::gated_norm),
        ("op.rope", ops::rope),
        ("op.rope1382", layers::attention::rope_1382),
        ("op.s4d_lin_layer", layers::mixers::s4d_layer),
        ("op.smear1382", layers::tokens::smear_1382),
        ("op.smear1607", layers::tokens::smear_1607),
        ("op.softcap_xent", ops::cross_entropy),
        ("op.ssd", layers::mixers::ssd),
        ("op.swiglu_mlp", layers::linear::swiglu_mlp),
        ("op.swiglu_ternary", layers::linear::swiglu_ternary),
        ("op.xsa", layers::attention::exclude_self),
        ("optim.adamw", optim::adamw),
        ("optim.muon", optim::muon),
        ("optim.newton_schulz", optim::newton_schulz),
        ("quant.export_1607", quant::export_1607),
        ("quant.export_1994", quant::export_1994),
        ("quant.gptq", quant::gptq),
        ("quant.gptq_int6", quant::gptq_int6),
        ("quant.int6_clip_search", quant::clip_search),
        ("quant.int8", quant::int8),
        ("quant.mixed_int6_1382", quant::mixed_1382),
        ("quant.pack_ternary_1994", quant::pack_ternary),
        ("train.challenge", train::train),
        ("train.pr1382", train::train),
        ("train.pr1607", train::train),
        ("train.pr1994", train::train),
    ]
}

/// Whether `name` is that of `kind`: evaluations have their case's own name behind the system's.
fn is_of_kind(kind: &str, name: &str) -> bool {
    let rest = kind.strip_prefix(name);
    rest.is_some_and(|rest| rest.is_empty() || name.starts_with("eval.") && rest.starts_with('_'))
}

/// Runs what the entry's kind names.
fn solve<P: Plain>(case: &mut Case<'_, P>) -> Result<()> {
    let kind = case.entry.kind()?;
    let kinds = kinds::<P>();
    match kinds.iter().find(|(name, _)| is_of_kind(kind, name)) {
        Some((_, solve)) => solve(case),
        None => {
            let known: Vec<&str> = kinds.iter().map(|(name, _)| *name).collect();
            Err(Error::input(format!("unknown kind {kind}"), "the entry", known.join(", ")))
        }
    }
}
