//! `export --budget`, as a user runs it: what fits, what is pruned and what that costs, and what cannot be met.

mod cli_common;

use cli_common::{Place, number};
use std::fs;

#[test]
fn a_budget_is_met_by_a_codec_or_by_pruning() {
    let place = Place::with_large_run();
    let export =
        |more: &str| place.line(&format!("export run --quant int6 --device cpu --json {more}")).json();
    let whole = export("--codec zlib --out whole");
    assert!(whole["fit"].is_null());
    let total = whole["bytes_total"].as_u64().unwrap();

    // Room enough: nothing but the default codec is tried.
    let fitted = export("--budget 16000000 --out fits");
    assert_eq!(fitted["codec"], "brotli");
    assert_eq!(fitted["fit"]["tried"].as_array().unwrap().len(), 1);
    assert!(fitted["fit"]["pruned"].is_null() && fitted["fit"]["bpb_cost"].is_null(), "{fitted}");

    let budget = total - 2000;
    let fitted = export(&format!("--codec zlib --budget {budget} --data data --out fitted"));
    assert_eq!(fitted["codec"], "zlib");
    let bytes = fs::metadata(place.path("fitted")).unwrap().len();
    assert_eq!(fitted["bytes"].as_u64(), Some(bytes));
    assert!(fitted["bytes_total"].as_u64().unwrap() <= budget, "{fitted}");
    let fit = &fitted["fit"];
    assert_eq!(fit["budget"].as_u64(), Some(budget));
    assert_eq!(fit["tried"][0]["bytes"], whole["bytes"]);
    let pruned = &fit["pruned"];
    let [codes, all] = ["codes", "candidates"].map(|key| pruned[key].as_u64().unwrap());
    assert!(0 < codes && codes <= all && number(pruned, "cost").is_finite(), "{pruned}");
    let cost = number(fit, "bpb_cost");
    // What pruning cost is the difference of the two files' scores.
    let [before, after] = ["whole", "fitted"].map(|file| {
        number(&place.line(&format!("eval {file} --data data --device cpu --json")).json(), "val_bpb")
    });
    assert_eq!(number(&fitted["bpb"], "artifact"), after);
    assert!(cost != 0.0 && (cost - (after - before)).abs() < 1e-12, "{cost} {before} {after}");
    let shown = place.line("inspect fitted").clean().stdout;
    assert!(shown.contains("\ncodec: zlib\n"), "{shown}");
    assert!(shown.contains(&format!("\npruned: {codes} of {all} codes of +-1\n")), "{shown}");

    let line = format!("export run --quant int6 --codec zlib --budget {budget} --out text");
    let text = place.line(&line).clean().stdout;
    assert!(text.contains(&format!("pruned {codes} of {all} codes of +-1")), "{text}");
    assert!(text.contains("not measured without --data"), "{text}");
    assert_eq!(place.read("text"), place.read("fitted"));
}

#[test]
fn budgets_that_cannot_be_met_leave_nothing_behind() {
    let place = Place::with_large_run();
    place
        .line("export run --budget 1000 --codec zstd --out none")
        .fails(2, &["--budget", "at least", "zstd"]);
    assert!(!place.path("none").exists());
    place.line("export run --quant fp16 --budget 100000 --codec zlib").fails(2, &["no codes to prune"]);
    place.line("export run --budget much").fails(2, &["--budget"]);
    place.line("export run --budget 10 --codec gzip").fails(2, &["gzip", "xz9"]);
}

#[test]
fn the_prs_setting_of_xz_is_there() {
    let place = Place::with_large_run();
    let report = place.line("export run --codec xz9 --out xz9 --json").json();
    assert_eq!(report["codec"], "xz9");
    let lzma = place.line("export run --codec lzma --out lzma --json").json();
    assert_ne!(report["bytes"], lzma["bytes"]);
    place.line("inspect xz9 --json").json();
    place.line("eval xz9 --data data --device cpu --json").json();
}
