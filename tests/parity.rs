//! `parity --fixtures`: the core set of other people's numbers on every device, and the full set where it is at hand.

mod common;

use common::targets;
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target, run};
use fairway::ops::Plain;
use fairway::parity::{self, Options, Report, Row};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const KINDS: [&str; 65] = [
    "data.byte_table",
    "eval.eval_1382_a",
    "eval.eval_1382_ttt",
    "eval.eval_1382_ttt_freeze2",
    "eval.eval_1607_a",
    "eval.eval_1607_exact",
    "eval.hessians_1607",
    "layer.mamba2",
    "model.challenge",
    "model.pr1382",
    "model.pr1607",
    "model.pr1994",
    "op.attn1382_xsa0",
    "op.attn1382_xsa1",
    "op.attn1607_siluv",
    "op.attn1994_ternary",
    "op.attn_causal_gqa",
    "op.attn_qknorm_rope_gain_gqa",
    "op.bigram1382",
    "op.bigram1382_trigram",
    "op.bigram1607",
    "op.bigram_hash_ids",
    "op.bitlinear_ste",
    "op.causal_conv1d",
    "op.causal_conv1d_silu",
    "op.fake_int6_1382",
    "op.fake_int6_1607",
    "op.kill_mamba2_core",
    "op.leakyrelu2_mlp",
    "op.mamba1_block",
    "op.mamba1_scan",
    "op.mamba2_layer_full",
    "op.mamba2_layer_kill",
    "op.mamba2_layer_kill_ternary",
    "op.mamba3_layer",
    "op.mamba3_siso_core",
    "op.mlp1607_leaky2",
    "op.relu2_mlp",
    "op.rmsnorm",
    "op.rmsnorm_gated",
    "op.rope",
    "op.rope1382",
    "op.s4d_lin_layer",
    "op.smear1382",
    "op.smear1607",
    "op.softcap_xent",
    "op.ssd",
    "op.swiglu_mlp",
    "op.swiglu_ternary",
    "op.xsa",
    "optim.adamw",
    "optim.muon",
    "optim.newton_schulz",
    "quant.export_1607",
    "quant.export_1994",
    "quant.gptq",
    "quant.gptq_int6",
    "quant.int6_clip_search",
    "quant.int8",
    "quant.mixed_int6_1382",
    "quant.pack_ternary_1994",
    "train.challenge",
    "train.pr1382",
    "train.pr1607",
    "train.pr1994",
];

fn core() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A place in the reference data, or nothing, saying so.
fn shared(name: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let path = std::env::var_os("FAIRWAY_SHARED").map_or_else(beside, PathBuf::from).join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn options(precision: Precision) -> Options {
    Options { only: None, tokenizers: shared("tokenizers"), precision: precision.dtype() }
}

fn run_cpu(dir: &Path, options: &Options) -> Result<Report> {
    let mut told = 0;
    let report = parity::run::<Cpu>(dir, options, &Default::default(), &mut |_| told += 1)?;
    assert_eq!(told, report.rows.len(), "every row is told as it is known");
    assert_eq!(report.passed + report.failed, told);
    Ok(report)
}

struct Parity(PathBuf, Options);

impl Job for Parity {
    type Output = Report;

    fn run<B: Plain>(self, device: &B::Device, _: &Target) -> Result<Report> {
        parity::run::<B>(&self.0, &self.1, device, &mut |_| {})
    }
}

/// The rows that failed, without the byte table's where there are no tokenizer models.
///
/// The losses of PR #1607's float32 run are held to 0.1, seven times what the entry allows: with Newton-Schulz in bfloat16
/// a change of the start by 1e-7 is another run. PyTorch's own runs of the entry from 250 such starts end between 3.994
/// and 4.104 (mean 4.051; the entry, one of the lowest, at 4.006), ours on the CPU from as many between 4.009 and 4.094
/// (mean 4.052). Without that rounding the run in float32 is within 2e-5 of the f64 entry.
///
/// The entries of PR #1382's test-time training hold the weights after it where those before it should be. The core set
/// has both with the weights that their seeds give (`*_start`).
fn failures(report: &Report) -> Vec<&Row> {
    let excused = |row: &Row| match row.fixture.as_str() {
        "chal_bpb_luts_sp1024" => shared("tokenizers").is_none(),
        "ev_eval_1382_ttt" | "ev_eval_1382_ttt_freeze2" => row.tensor == "param.*",
        "tr_seed1607_train5_f32" => {
            row.tensor.starts_with("out.") && row.error.is_some_and(|error| error < 0.1)
        }
        _ => false,
    };
    report.rows.iter().filter(|row| !row.ok && !excused(row)).collect()
}

fn index_of(dir: &Path) -> BTreeMap<String, Value> {
    let read = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(dir.join(name)).expect("an index")).expect("JSON")
    };
    let names = ["index.json", "index_seeds.json"];
    let entries = names.iter().flat_map(|name| read(name)["fixtures"].as_object().expect("fixtures").clone());
    entries.collect()
}

/// The worst share of the tolerance that each kind uses.
fn worst_by_kind(dir: &Path, report: &Report) -> BTreeMap<String, f64> {
    let index = index_of(dir);
    let mut worst = BTreeMap::new();
    for row in &report.rows {
        let kind = index[&row.fixture]["kind"].as_str().expect("a kind").to_string();
        let (Some(error), Some(tolerance)) = (row.error, row.tolerance) else { continue };
        let share = if error == 0.0 { 0.0 } else { error / tolerance };
        let known: &mut f64 = worst.entry(kind).or_default();
        *known = known.max(share);
    }
    worst
}

#[test]
fn the_core_set_has_every_kind_in_less_than_11_mb() {
    let index = index_of(&core());
    let kinds: BTreeSet<&str> = index.values().filter_map(|entry| entry["kind"].as_str()).collect();
    assert_eq!(kinds, KINDS.into());
    let files: Vec<_> = fs::read_dir(core()).unwrap().map(|entry| entry.unwrap()).collect();
    let bytes: u64 = files.iter().map(|entry| entry.metadata().unwrap().len()).sum();
    assert!(bytes < 11_000_000, "{bytes} bytes");
    assert_eq!(files.len(), index.len() + 2, "a file for each fixture and two indices");
}

#[test]
fn the_core_set_passes_on_every_device() {
    for target in targets() {
        if target.precision == Precision::Bf16 {
            continue;
        }
        let report = run(&target, Parity(core(), options(target.precision))).expect("a run");
        assert!(report.rows.len() > 1200, "{} rows", report.rows.len());
        let failed = failures(&report);
        assert!(failed.is_empty(), "on {} in {}: {failed:#?}", target.label, target.precision);
        let worst = worst_by_kind(&core(), &report);
        for (kind, share) in &worst {
            println!("{} in {}: {kind} uses {share:.1e} of its tolerance", target.label, target.precision);
        }
        // Tight enough that a wrong formula cannot hide in the tolerance; training from f32 runs is compared loosely.
        if target.precision == Precision::F64 {
            for kind in KINDS {
                let bound = match kind.split('.').next() {
                    // The peer's own float32.
                    Some("layer") => 0.1,
                    Some("eval") if kind == "eval.hessians_1607" => 0.2,
                    Some("model" | "eval") => 0.02,
                    // A float32 mean, summed in another order than the peer's.
                    Some("quant") if kind.ends_with("_1994") => 0.2,
                    // Float32 runs; the losses of PR #1607's are excused above.
                    Some("train") => {
                        if kind == "train.pr1607" {
                            7.0
                        } else {
                            1.0
                        }
                    }
                    _ => 1e-4,
                };
                assert!(worst.get(kind).copied().unwrap_or(0.0) < bound, "{kind}: {worst:?}");
            }
        }
    }
}

#[test]
fn the_full_set_passes_in_every_kind_that_is_known() {
    let Some(dir) = shared("fixtures") else { return };
    let index = index_of(&dir);
    for precision in [Precision::F64, Precision::F32] {
        let report = run_cpu(&dir, &options(precision)).unwrap();
        let failed = failures(&report);
        for row in &report.rows {
            let kind = index[&row.fixture]["kind"].as_str().unwrap();
            let note = row.note.as_deref().unwrap_or_default();
            match KINDS.contains(&kind) {
                true => assert!(!failed.contains(&row), "{row:?}"),
                false => assert!(!row.ok && note.starts_with(&format!("unknown kind {kind}")), "{row:?}"),
            }
        }
        let run: BTreeSet<&str> = report.rows.iter().map(|row| row.fixture.as_str()).collect();
        assert_eq!(run.len(), index.len());
    }
}

#[test]
fn a_second_run_gives_the_same_errors_to_the_last_bit() {
    let options = Options { only: Some("*chal*".into()), ..options(Precision::F32) };
    assert_eq!(run_cpu(&core(), &options).unwrap(), run_cpu(&core(), &options).unwrap());
}

#[test]
fn only_takes_a_glob_of_names() {
    let run = |glob: &str| run_cpu(&core(), &Options { only: Some(glob.into()), ..options(Precision::F64) });
    let names = |glob: &str| -> Vec<String> {
        let mut names: Vec<String> = run(glob).unwrap().rows.into_iter().map(|row| row.fixture).collect();
        names.dedup();
        names
    };
    assert_eq!(names("rope"), ["rope"]);
    assert_eq!(names("muon3_????"), ["muon3_tall", "muon3_wide"]);
    assert_eq!(names("newton*tall"), ["newton_schulz5_tall"]);
    let error = run("nothing*").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert_eq!(
        error.to_string(),
        "no fixture is named nothing*, --only, expected a glob that matches at least one of the 80 names"
    );
}

#[test]
fn a_tokenizer_is_found_by_its_sha256_or_missed_with_the_reason() {
    let empty = tempfile::tempdir().unwrap();
    fs::write(empty.path().join("other.model"), b"not it").unwrap();
    let options = Options {
        only: Some("chal_bpb*".into()),
        tokenizers: Some(empty.path().into()),
        ..options(Precision::F64)
    };
    let report = run_cpu(&core(), &options).unwrap();
    assert_eq!((report.passed, report.failed), (0, 1));
    let note = report.rows[0].note.as_deref().unwrap();
    assert!(note.starts_with("no such tokenizer") && note.contains("4f5e8adb109c66b4"), "{note}");
    let Some(tokenizers) = shared("tokenizers") else { return };
    let report = run_cpu(&core(), &Options { tokenizers: Some(tokenizers), ..options }).unwrap();
    assert_eq!((report.passed, report.failed), (3, 0));
    assert!(report.rows.iter().all(|row| row.error == Some(0.0)));
}

#[test]
fn a_float32_run_needs_its_float64_sibling_and_is_compared_absolutely() {
    let options = Options { only: Some("tr_chal_train5_f32".into()), ..options(Precision::F64) };
    let report = run_cpu(&core(), &options).unwrap();
    assert_eq!(report.failed, 0);
    let losses = report.rows.iter().find(|row| row.tensor == "out.losses").unwrap();
    assert_eq!(losses.tolerance, Some(0.005043131039865756));
    assert_eq!(losses.note.as_deref(), Some("absolute"));
    assert!(losses.error.unwrap() > 1e-5, "f32 and f64 losses differ: {losses:?}");
    assert!(report.rows.iter().any(|row| row.tensor == "muon_momentum" && row.ok));
    assert!(report.rows.iter().any(|row| row.tensor == "groups.muon" && row.ok));
}
