//! `export` with GPTQ: its calibration, the losses that it reports, and what goes wrong, as a user runs it.

mod cli_common;

use cli_common::{Place, keys, number};
use serde_json::Value;
use std::fs;

fn export(place: &Place, more: &str) -> Value {
    place.line(&format!("export run --device cpu --json {more}")).json()
}

fn loss<'a>(report: &'a Value, name: &str) -> &'a Value {
    let rows = report["losses"].as_array().unwrap();
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name} in {report}"))
}

const MLP: [&str; 2] = ["blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight"];

#[test]
fn gptq_is_calibrated_by_the_model_or_by_data() {
    let place = Place::with_large_run();
    let report = export(&place, "--quant gptq-int4 --calibrate self:4 --out own");
    assert_eq!(report["quant"], "gptq-int4");
    let calibration = &report["calibration"];
    let listed = ["from", "hessians", "seconds", "seed", "sequences", "temperature", "tokens"];
    assert_eq!(keys(calibration), listed);
    assert_eq!(calibration["from"], "self");
    let counts = ["sequences", "tokens", "hessians", "seed"].map(|key| calibration[key].as_u64().unwrap());
    // The MLP's two matrices and the tied embedding; attention's are too small to be coded.
    assert_eq!(counts, [4, 16, 3, 1337]);
    assert_eq!(number(calibration, "temperature"), 0.8);
    let inspected = place.line("inspect own --json").json();
    let row =
        |name: &str| inspected["tensors"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
    for (name, dtype, scales) in [
        (MLP[0], "int4/row", "f16[512]"),
        (MLP[1], "int4/row", "f16[256]"),
        ("tok_emb.weight", "int8/row", "f16[260]"),
    ] {
        assert_eq!((&row(name)["dtype"], &row(name)["scales"]), (&dtype.into(), &scales.into()), "{name}");
        assert!(number(loss(&report, name), "relative_output") > 0.0, "{report}");
    }
    assert!(row("blocks.0.attn.c_q.weight")["scales"].is_null());

    // Decided by the seed: the same file again, another by other text.
    let again = export(&place, "--quant gptq-int4 --calibrate self:4 --out again");
    assert_eq!(place.read("own"), place.read("again"));
    assert_eq!(again["losses"], report["losses"]);
    let whole = export(&place, "--quant gptq-int4 --out whole");
    assert_eq!(whole["calibration"]["sequences"].as_u64(), Some(32));
    assert_ne!(place.read("own"), place.read("whole"));
    let data = export(&place, "--quant gptq-int4 --calibrate data --out by-data");
    assert_eq!(data["calibration"]["from"], "data");
    assert!(data["calibration"]["seed"].is_null() && data["calibration"]["temperature"].is_null());
    assert_ne!(place.read("by-data"), place.read("whole"));
}

#[test]
fn losses_are_those_of_the_file_that_was_written() {
    let place = Place::with_large_run();
    let live = place.line("eval run --data data --device cpu --json").json();
    let mut squared = Vec::new();
    for scheme in ["fp16", "int8", "int6", "gptq-int6", "gptq-int2", "ternary"] {
        let calibrate = if scheme.starts_with("gptq") { "--calibrate self:8" } else { "" };
        let report = export(&place, &format!("--quant {scheme} --data data --out file {calibrate}"));
        let score = place.line("eval file --data data --device cpu --json").json();
        let bpb = &report["bpb"];
        assert_eq!(keys(bpb), ["artifact", "live", "loss", "tokens"]);
        assert_eq!((&bpb["artifact"], &bpb["live"]), (&score["val_bpb"], &live["val_bpb"]), "{scheme}");
        assert_eq!(bpb["tokens"], score["tokens"]);
        assert!((number(bpb, "loss") - (number(bpb, "artifact") - number(bpb, "live"))).abs() < 1e-12);
        assert_eq!(report["calibration"].is_null(), calibrate.is_empty());

        // One row for each tensor, in order, and the form that the file has.
        let inspected = place.line("inspect file --json").json();
        let names = |rows: &Value, key: &str| -> Vec<(String, String)> {
            let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_string();
            rows.as_array().unwrap().iter().map(|row| (text(row, "name"), text(row, key))).collect()
        };
        assert_eq!(names(&report["losses"], "storage"), names(&inspected["tensors"], "dtype"), "{scheme}");
        for row in report["losses"].as_array().unwrap() {
            assert_eq!(keys(row), ["mean_squared", "name", "relative", "relative_output", "storage"]);
            assert!(number(row, "mean_squared") >= 0.0 && number(row, "relative") >= 0.0);
        }
        squared.push(number(loss(&report, MLP[0]), "mean_squared"));
    }
    // Float16, int6, GPTQ's int6 (farther from the weights than the nearest codes), its int2. (The challenge's int8 has a floor.)
    let rising = [0, 2, 3, 4].map(|at| squared[at]);
    assert!(rising.is_sorted_by(|a, b| a < b), "{squared:?}");
    // No data, no score.
    assert!(export(&place, "--quant int8 --out file")["bpb"].is_null());
}

#[test]
fn for_people_it_lists_the_largest_losses() {
    let place = Place::with_large_run();
    let line = "export run --device cpu --quant gptq-int3 --calibrate self:3 --data data";
    let text = place.line(line).clean().stdout;
    assert!(text.starts_with("device: cpu "), "{text}");
    let wrote = "\ncalibration: 3 sequences of 16 tokens that the model wrote (temperature 0.8, seed 1337); 3 Hessians in ";
    assert!(text.contains(wrote), "{text}");
    assert!(text.contains("\nval_bpb: live ") && text.contains(" validation tokens)\n"), "{text}");
    let table = |text: &str| -> Vec<String> {
        let rows = text.lines().skip_while(|line| !line.starts_with("tensor ")).skip(1);
        rows.take_while(|line| !line.starts_with("what ")).map(String::from).collect()
    };
    let short = table(&text);
    assert!(
        short.len() <= 8 && MLP.iter().all(|name| short[..2].iter().any(|row| row.starts_with(name))),
        "{text}"
    );
    let all = table(&place.line(&format!("{line} --verbose")).clean().stdout);
    let count = place.line("inspect run --json").json()["tensors"].as_array().unwrap().len();
    assert_eq!(all.len(), count, "{all:?}");
    // What computes nothing opens no device.
    let text = place.line("export run").clean().stdout;
    assert!(!text.contains("device:") && !text.contains("calibration:"), "{text}");
}

#[test]
fn calibrations_that_cannot_be() {
    let place = Place::with_large_run();
    fs::create_dir(place.path("empty")).unwrap();
    let fails = |line: &str, parts: &[&str]| {
        place.line(line).fails(2, parts);
    };
    fails("export run --calibrate self", &["--calibrate", "gptq-intN"]);
    fails("export run --quant int6 --calibrate data", &["--calibrate", "gptq-intN"]);
    for count in ["0", "-3", "x", "", "99999999999999999999"] {
        let line = format!("export run --quant gptq-int6 --device cpu --calibrate self:{count}");
        fails(&line, &["--calibrate", "self:N"]);
    }
    fails("export run --quant gptq-int1", &["gptq-int1", "--quant"]);
    fails("export run --quant gptq-int6 --device cpu --calibrate none", &["none"]);
    fails("export run --quant gptq-int6 --device cpu --calibrate empty", &["empty", "no shards"]);
    fails("export run --device cpu --data none", &["none"]);
    // Validation shards alone are not training data.
    fs::create_dir(place.path("val")).unwrap();
    fs::copy(place.path("data/fineweb_val_000000.bin"), place.path("val/fineweb_val_000000.bin")).unwrap();
    fails("export run --quant gptq-int6 --device cpu --calibrate val", &["no train shards", "val"]);
    assert!(!place.path("run/model.fairway").exists());
}

#[test]
fn a_scheme_that_codes_nothing_says_so() {
    let place = Place::with_data();
    place.train("run", "--steps 1").clean();
    let ran = place.line("export run --quant int4").ok();
    assert!(ran.stderr.contains("int4 has coded nothing") && ran.stderr.contains("65536"), "{ran:?}");
    place.line("export run").clean();
}
