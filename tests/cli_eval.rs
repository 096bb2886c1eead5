//! `eval`'s modes, `compare`, `submission` and training over several seeds, as a user runs them.

mod cli_common;

use cli_common::{Place, number};
use serde_json::Value;
use std::fs;

/// A place with shards and a short run in `run`.
fn trained() -> Place {
    let place = Place::with_data();
    place.train("run", "--steps 20").clean();
    place
}

fn eval(place: &Place, more: &str) -> Value {
    place.line(&format!("eval run --data data --device cpu --json {more}")).json()
}

#[test]
fn sliding_scores_each_token_of_full_once_and_the_prs_some_again() {
    let place = trained();
    let full = eval(&place, "");
    let tokens = number(&full, "tokens");
    // A stride of the whole window is full evaluation.
    let same = eval(&place, "--mode sliding --stride 16");
    for key in ["val_loss", "val_bpb", "tokens", "bytes"] {
        assert_eq!(full[key], same[key], "{key}");
    }
    let sliding = eval(&place, "--mode sliding --stride 3");
    assert_eq!((&sliding["tokens"], &sliding["bytes"]), (&full["tokens"], &full["bytes"]));
    assert_ne!(sliding["val_loss"], full["val_loss"]);
    // The default stride is no longer than the window.
    assert_eq!(eval(&place, "--mode sliding")["val_loss"], full["val_loss"]);
    // 3 does not divide the targets, a multiple of 16: windows at the end are scored again.
    let targets = tokens as usize;
    let starts = targets.div_ceil(3);
    let again = eval(&place, "--mode sliding --stride 3 --windows pr1382");
    let short = |start: usize| if start == 0 { 16 } else { 3.min(targets - start) };
    assert_eq!(number(&again, "tokens") as usize, (0..starts).map(|i| short(3 * i)).sum::<usize>());
    let again = eval(&place, "--mode sliding --stride 3 --windows pr1607");
    let whole = (targets - 16) / 3 + 1 + usize::from(!(targets - 16).is_multiple_of(3));
    assert_eq!(number(&again, "tokens") as usize, 16 + 3 * (whole - 1));
    // The batch has no effect; the temperature has.
    let small = eval(&place, "--mode sliding --stride 3 --micro-batch 16");
    assert!((number(&small, "val_loss") - number(&sliding, "val_loss")).abs() < 1e-6);
    let hot = eval(&place, "--temperature 3");
    assert!(number(&hot, "val_loss") > number(&full, "val_loss"), "{hot}");
}

#[test]
fn training_on_what_is_scored_helps_and_says_when_there_is_nothing_to_train_on() {
    let place = trained();
    let plain = eval(&place, "--mode sliding --stride 16");
    for rule in ["--ttt-optimizer sgd --ttt-lr 0.05", "--ttt-optimizer adamw --ttt-lr 0.003"] {
        let ttt = format!("--mode ttt --stride 16 --ttt-chunk 160 --ttt-batch 2 --ttt-epochs 2 {rule}");
        let score = eval(&place, &ttt);
        assert_eq!(score["tokens"], plain["tokens"]);
        assert!(number(&score, "val_loss") < number(&plain, "val_loss"), "{rule}: {score} {plain}");
        // The same again, to the bit: the run on disk is as it was.
        assert_eq!(eval(&place, &ttt)["val_loss"], score["val_loss"]);
    }
    // The one document of the text begins with its first token.
    let score = eval(&place, "--mode ttt --stride 16 --ttt-low-rank 2 --ttt-chunk 32 --ttt-epochs 3");
    assert_eq!(score["tokens"], plain["tokens"]);
    assert!(number(&score, "val_loss") < number(&plain, "val_loss"), "{score} {plain}");
    let ran = place.line("eval run --data data --device cpu --json --mode ttt --stride 16");
    assert!(ran.stderr.contains("one chunk of --ttt-chunk 32768"), "{ran:?}");
    assert_eq!(ran.json()["val_loss"], plain["val_loss"]);
    for (more, warning) in [
        ("--ttt-chunk 8", "--ttt-chunk 8 is no whole window of 16 tokens"),
        ("--ttt-low-rank 2 --ttt-chunk 4096", "no document is longer than --ttt-chunk 4096"),
    ] {
        let ran =
            place.line(&format!("eval run --data data --device cpu --json --mode ttt --stride 16 {more}"));
        assert!(ran.stderr.contains(warning), "{ran:?}");
        assert!((number(&ran.json(), "val_loss") - number(&plain, "val_loss")).abs() < 1e-6, "{more}");
    }
}

#[test]
fn states_go_on_over_windows_where_there_are_states() {
    let place = trained();
    let full = eval(&place, "");
    let ran = place.line("eval run --data data --device cpu --json --stateful");
    assert!(ran.stderr.contains("no state space layer"), "{ran:?}");
    let kept = ran.json();
    assert!((number(&kept, "val_loss") - number(&full, "val_loss")).abs() < 1e-5, "{kept} {full}");

    let hybrid = "--set system=pr1607 --set num_attn_layers=1 --set mamba3_headdim=8 --set mamba3_d_state=8 \
                  --set bigram_buckets=64 --set bigram_hash_dim=8 --set ema_enabled=false --set swa_enabled=false \
                  --steps 40";
    place.train("hybrid", hybrid).clean();
    let eval = |more: &str| place.line(&format!("eval hybrid --data data --device cpu --json {more}")).json();
    let (full, kept) = (eval(""), eval("--stateful"));
    assert_eq!(full["tokens"], kept["tokens"]);
    assert!((number(&kept, "val_loss") - number(&full, "val_loss")).abs() > 1e-4, "{kept} {full}");
    for more in ["--stateful --streams 4", "--stateful --mode sliding --stride 5"] {
        assert_eq!(eval(more)["tokens"], full["tokens"], "{more}");
    }
}

#[test]
fn lines_for_people_name_the_mode_as_the_prs_do() {
    let place = trained();
    place.line("export run --out model.fairway --json").json();
    let lines =
        |more: &str| place.line(&format!("eval model.fairway --data data --device cpu {more}")).ok().stdout;
    let sliding = lines("--mode sliding --stride 4");
    assert!(sliding.contains("\nfinal_int8_sliding_window val_loss:"), "{sliding}");
    assert!(sliding.contains(" stride:4 eval_time:"), "{sliding}");
    assert!(sliding.contains("\nfinal_int8_sliding_window_exact val_loss:"), "{sliding}");
    assert!(lines("--mode ttt --ttt-chunk 160").contains("\nfinal_ttt_sliding_exact val_loss:"));
    assert!(lines("").contains("\nfinal_int8_brotli_roundtrip_exact val_loss:"));
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let place = trained();
    for (more, parts) in [
        ("--stride 4", &["--stride", "--mode sliding"][..]),
        ("--windows pr1382", &["--windows", "--mode sliding"]),
        ("--mode sliding --stride 0", &["stride 0", "1 to the 16"]),
        ("--mode sliding --stride 17", &["stride 17", "1 to the 16"]),
        ("--mode sliding --windows some", &["windows some", "each-once, pr1382, pr1607"]),
        ("--mode sliding --stateful --windows pr1607", &["--windows", "each-once"]),
        ("--mode ttt --stateful", &["--stateful", "--mode full"]),
        ("--streams 2", &["--streams", "--stateful"]),
        ("--stateful --streams 0", &["0 streams", "--streams"]),
        ("--stateful --streams 5", &["5 streams of 16", "--streams", "at most 4", "--micro-batch 64"]),
        ("--mode ttt --windows pr1607 --stride 8", &["--stride", "side by side"]),
        ("--temperature 0", &["temperature 0", "--temperature"]),
        ("--temperature -1", &["--temperature"]),
        ("--temperature nan", &["--temperature"]),
        ("--mode sliding --ttt-lr 0.1", &["--ttt-lr", "--mode ttt"]),
        ("--mode ttt --ttt-lr -0.1", &["--ttt-lr", "a number from 0"]),
        ("--mode ttt --ttt-chunk 0", &["--ttt-chunk", "at least 1"]),
        ("--mode ttt --ttt-batch 0", &["--ttt-batch", "at least 1"]),
        ("--mode ttt --ttt-epochs 0", &["--ttt-epochs", "at least 1"]),
        ("--mode ttt --ttt-optimizer lion", &["lion", "sgd or adamw"]),
        ("--mode ttt --ttt-momentum 1", &["--ttt-momentum", "below 1"]),
        ("--mode ttt --ttt-optimizer adamw --ttt-momentum 0.5", &["--ttt-momentum", "sgd"]),
        ("--mode ttt --ttt-low-rank 0", &["--ttt-low-rank", "at least 1"]),
        ("--mode ttt --ttt-low-rank 4 --ttt-batch 2", &["--ttt-batch", "--ttt-low-rank"]),
        ("--mode ttt --ttt-low-rank 4 --windows pr1382", &["--windows", "--ttt-low-rank"]),
        ("--ttt-low-rank 4", &["--ttt-low-rank", "--mode ttt"]),
    ] {
        let ran = place.line(&format!("eval run --data data --device cpu {more}"));
        ran.fails(2, parts);
    }
}

#[test]
fn compare_tests_means_and_applies_the_record_rule() {
    let place = Place::new();
    let run = |name: &str, loss: f64| {
        fs::create_dir_all(place.path(name)).unwrap();
        let row = format!("{{\"step\":3,\"val_loss\":{loss},\"val_bpb\":1.0}}\n");
        fs::write(place.path(name).join("metrics.jsonl"), row).unwrap();
    };
    for (name, loss) in [("a1", 1.870), ("a2", 1.871), ("a3", 1.872)] {
        run(name, loss);
    }
    // Other people's: logs and reports.
    fs::write(place.path("b1.log"), "final_int6_roundtrip_exact val_loss:1.88200000 val_bpb:1.1\n").unwrap();
    fs::write(place.path("b2.json"), "{\"val_loss\": 1.883}").unwrap();
    run("b3", 1.881);
    let found = place.line("compare a1 a2 a3 --against b1.log b2.json b3 --json").json();
    assert!((number(&found, "mean") - 1.871).abs() < 1e-12);
    assert!((number(&found, "std") - 0.001).abs() < 1e-12);
    assert!((number(&found, "delta_nats") + 0.011).abs() < 1e-12);
    // Equal spreads of three each: se = 0.001 sqrt(2/3), 4 degrees of freedom.
    assert!((number(&found, "t") + 11.0 * 1.5f64.sqrt()).abs() < 1e-6, "{found}");
    assert!(number(&found, "p") < 0.001 && found["record"] == true, "{found}");
    // The other way round it is worse.
    let worse = place.line("compare b1.log b2.json b3 --against a1 a2 a3 --json").json();
    assert_eq!((&worse["record"], &worse["p"]), (&Value::Bool(false), &found["p"]));
    let text = place.line("compare a1 a2 a3 --against b1.log b2.json b3").clean().stdout;
    assert!(text.contains("delta_nats:-0.011000") && text.contains("a record:"), "{text}");
    // One run has no spread.
    let ran = place.line("compare a1 --against b3 --json");
    assert!(ran.stderr.starts_with("warning: no t-test"), "{ran:?}");
    let single = ran.json();
    assert!(single["std"].is_null() && single["t"].is_null() && single["p"].is_null());
    assert_eq!(single["record"], false);
    place.line("compare a1 --against nothing").fails(2, &["nothing"]);
    // A run named twice would narrow the spread.
    place.line("compare a1 a2 ./a1 --against b3").fails(2, &["./a1 twice", "RUN"]);
    place.line("compare a1 a2 --against b3 b3").fails(2, &["b3 twice", "--against"]);
    run("a4", 1.870);
    let ran = place.line("compare a1 a4 --against b3 --json");
    assert!(ran.stderr.starts_with("warning: no t-test"), "{ran:?}");
    run("b4", 1.881);
    let ran = place.line("compare a1 a4 --against b3 b4 --json");
    assert!(ran.stderr.contains("without any spread"), "{ran:?}");
    let certain = ran.json();
    assert_eq!((&certain["t"], &certain["p"]), (&Value::Null, &0.0.into()));
    place.line("compare a1").fails(2, &["--against"]);
    place.line("compare --against a1").fails(2, &["compare"]);
}

#[test]
fn several_seeds_are_several_runs_whose_submission_is_one_folder() {
    let place = Place::with_data();
    let report = place.train("runs", "--steps 6 --seeds 3,5 --json").json();
    assert_eq!(place.names("runs"), ["seed-3", "seed-5"]);
    assert_eq!(report["seeds"], serde_json::json!([3, 5]));
    let losses: Vec<f64> = (0..2).map(|i| number(&report["runs"][i], "val_loss")).collect();
    assert!(losses[0] != losses[1]);
    assert!((number(&report, "val_loss") - (losses[0] + losses[1]) / 2.0).abs() < 1e-12);
    let std = (losses[0] - losses[1]).abs() / 2f64.sqrt();
    assert!((number(&report, "val_loss_std") - std).abs() < 1e-9, "{report}");
    for key in ["steps", "train_loss", "val_bpb", "tokens_per_s", "step_ms", "first_step_s", "out"] {
        assert!(!report[key].is_null(), "{key}: {report}");
    }
    // Each is what its seed alone gives.
    let alone = place.train("alone", "--steps 6 --seed 5 --json").json();
    assert_eq!(alone["val_loss"], report["runs"][1]["val_loss"]);
    place.train("x", "--steps 2 --seeds 3,3").fails(2, &["seed 3 twice"]);
    place.train("x", "--steps 2 --seeds 3,y").fails(2, &["--seeds"]);
    place.train("x", "--steps 2 --seeds 3 --seed 4").fails(2, &["--seed"]);

    let line = "submission runs/seed-3 runs/seed-5 --out sub --author A --github-id a --json";
    let ran = place.line(line);
    assert!(ran.stderr.contains("before quantisation"), "{ran:?}");
    let written = ran.json();
    assert_eq!(written["dir"], "sub");
    let size = fs::metadata(place.path("sub/model.fairway")).unwrap().len();
    assert_eq!(written["bytes_total"].as_u64(), Some(size + written["bytes_code"].as_u64().unwrap()));
    let names = place.names("sub");
    for name in
        ["README.md", "model.fairway", "recipe.toml", "submission.json", "train_seed3.log", "train_seed5.log"]
    {
        assert!(names.iter().any(|found| found == name), "{name} in {names:?}");
    }
    let record: Value = serde_json::from_slice(&place.read("sub/submission.json")).unwrap();
    assert_eq!((&record["author"], &record["github_id"]), (&"A".into(), &"a".into()));
    assert!((number(&record, "val_loss") - number(&report, "val_loss")).abs() < 1e-12);
    // Scored, the record is the artifact's; the folder may be written again.
    let scored = place.line(&format!("{line} --data data --device cpu")).clean().json();
    let score = place.line("eval sub/model.fairway --data data --device cpu --json").json();
    assert_eq!(scored["val_loss"], score["val_loss"]);
    // Input that is no good is found before anything is written: an earlier submission stays whole.
    let whole = place.snapshot("sub");
    for out in ["sub", "half"] {
        let line = format!("submission runs/seed-3 --out {out} --data nothing --device cpu");
        place.line(&line).fails(2, &["nothing"]);
    }
    let mut spoilt = place.read("sub/model.fairway");
    *spoilt.last_mut().unwrap() ^= 1;
    fs::write(place.path("spoilt"), spoilt).unwrap();
    place.line("submission runs/seed-3 --out sub --artifact spoilt").fails(2, &["spoilt"]);
    assert!(place.snapshot("sub") == whole && !place.path("half").exists());
    place.train("other", "--steps 6 --set matrix_lr=0.01").clean();
    let ran = place.line("submission runs/seed-3 other --out mixed --json");
    assert!(ran.stderr.contains("other was not trained by the recipe of runs/seed-3"), "{ran:?}");
    assert!(!place.line("submission runs/seed-3 runs/seed-5 --out two").ok().stderr.contains("recipe"));
    // It trains again from the folder's own recipe.
    place.line("train sub/recipe.toml --data data --device cpu --steps 1 --out again").clean();
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/other"), "x").unwrap();
    place.line("submission runs/seed-3 --out full").fails(2, &["full", "other files"]);
    place.line("submission nothing --out sub2").fails(2, &["nothing"]);
}
