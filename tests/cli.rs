//! The commands beside `train`: what they print, and that what one writes the others read.

mod cli_common;

use cli_common::{Place, Ran, SMALL_PARAMS, check_xml, keys, number, text};
use fairway::artifact::{Artifact, Codec};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of the shared folder, or why a test is skipped.
fn shared(name: &str) -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let path = std::env::var_os("FAIRWAY_SHARED").map_or_else(beside, PathBuf::from).join(name);
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// A number of one of the rows that `inspect` and others list.
fn sum(rows: &Value, each: impl Fn(&Value) -> u64) -> u64 {
    rows.as_array().unwrap().iter().map(each).sum()
}

fn elements(row: &Value) -> u64 {
    row["shape"].as_array().unwrap().iter().map(|size| size.as_u64().unwrap()).product()
}

#[test]
fn every_command_has_help_with_an_example() {
    let place = Place::new();
    let commands = |help: &str| -> Vec<String> {
        let list = help.split("Commands:\n").nth(1).unwrap_or_default();
        let rows = list.lines().take_while(|line| line.starts_with("  "));
        let names = rows
            .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|word| !word.is_empty()));
        names.filter(|name| *name != "help").map(String::from).collect()
    };
    let help = place.line("--help").clean().stdout;
    assert!(help.contains("Example"), "{help}");
    let top = commands(&help);
    let promised =
        ["demo", "train", "export", "eval", "sample", "inspect", "recipes", "data", "devices", "parity"];
    assert!(promised.iter().all(|name| top.iter().any(|found| found == name)), "{top:?}");
    for name in top {
        let help = place.line(&format!("{name} --help")).clean().stdout;
        assert!(help.contains("Example") && help.contains(&format!("fairway {name}")), "{help}");
        for action in commands(&help) {
            let help = place.line(&format!("{name} {action} --help")).clean().stdout;
            assert!(help.contains("Example") && help.contains(&format!("fairway {name} {action}")), "{help}");
        }
    }
}

#[test]
fn version_says_version_and_commit() {
    let line = Place::new().line("--version").clean().stdout;
    let rest = line.strip_prefix(concat!("fairway ", env!("CARGO_PKG_VERSION"), " (")).unwrap();
    let commit = rest.strip_suffix(")\n").unwrap();
    let is_hash = commit.len() >= 7 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    assert!(is_hash || commit == "unknown", "{line}");
}

#[test]
fn recipes_and_devices_list_what_there_is() {
    let place = Place::new();
    let recipes = place.line("recipes --json").json();
    let rows = recipes["recipes"].as_array().unwrap();
    for row in rows {
        assert_eq!(keys(row), ["aliases", "name", "params", "summary"]);
        assert!(row["aliases"].is_array() && !row["summary"].as_str().unwrap().is_empty());
        let inspected = place.line(&format!("inspect {} --json", row["name"].as_str().unwrap())).json();
        assert_eq!(inspected["params"], row["params"]);
    }
    let params = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap()["params"].as_u64();
    assert_eq!(params("baseline"), Some(17_059_912));
    assert!(params("tiny").unwrap() < 1_000_000);
    let hybrids = [("ternary-loop", 61_657_752), ("mamba3-hinge", 26_216_040), ("mamba1-unet", 27_191_065)];
    for (name, count) in hybrids {
        assert_eq!(params(name), Some(count), "{name}");
    }
    let table = place.line("recipes").clean().stdout;
    assert!(table.lines().any(|line| line.starts_with("baseline") && line.contains("17059912")), "{table}");

    let devices = place.line("devices --json").json();
    let rows = devices["devices"].as_array().unwrap();
    for row in rows {
        for key in ["name", "backend", "precision", "note"] {
            assert!(row[key].is_string(), "{key}: {row}");
        }
        assert!(row["memory_bytes"].is_null() || row["memory_bytes"].as_u64().unwrap() > 0);
    }
    for backend in ["cpu", "wgpu", "cuda"] {
        // Each is there, or a row says why it is not.
        let row = rows.iter().find(|row| row["backend"] == backend).unwrap();
        assert!(row["usable"] == true || !row["note"].as_str().unwrap().is_empty(), "{row}");
    }
    assert!(
        rows[0]["backend"] == "cpu" && rows[0]["usable"] == true && rows[0]["precision"] == "f32",
        "{devices}"
    );
    place.line("devices").clean();
}

/// A run whose embedding becomes int8 codes: 260 x 256 elements, of values far above the scales' floor of 1/127.
fn train_wide(place: &Place) -> Value {
    let more = "--set model_dim=256 --set num_layers=1 --set mlp_mult=1 --set tied_embed_init_std=1 --set val_loss_every=0 --steps 4 --json";
    place.train("run", more).json()
}

#[test]
fn every_codec_and_scheme_exports_an_artifact_that_scores_as_the_live_model() {
    let place = Place::with_data();
    let live = train_wide(&place);
    let mut payloads = Vec::new();
    for (quant, codec) in
        [("int8", "brotli"), ("int8", "lzma"), ("int8", "zstd"), ("int8", "zlib"), ("fp16", "brotli")]
    {
        let report = place
            .line(&format!("export run --quant {quant} --codec {codec} --out out/{codec}.{quant} --json"))
            .json();
        let listed = [
            "bpb",
            "bytes",
            "bytes_code",
            "bytes_code_all",
            "bytes_total",
            "calibration",
            "codec",
            "losses",
            "out",
            "pack_seconds",
            "params",
            "payload_bytes",
            "quant",
            "quantise_seconds",
            "under_cap",
        ];
        assert_eq!(keys(&report), listed);
        let file = fs::metadata(place.path(format!("out/{codec}.{quant}"))).unwrap().len();
        let count = |key: &str| report[key].as_u64().unwrap();
        assert_eq!(count("bytes"), file);
        assert_eq!(count("bytes_total"), file + count("bytes_code"));
        assert_eq!(report["under_cap"], Value::Bool(true));
        assert_eq!((&report["quant"], &report["codec"]), (&quant.into(), &codec.into()));
        assert!(count("bytes_code") > 50_000 && count("bytes_code_all") > count("bytes_code"));
        payloads.push((quant, count("payload_bytes")));

        let score = place.line(&format!("eval out/{codec}.{quant} --data data --device cpu --json")).json();
        assert_eq!(keys(&score), ["bytes", "seconds", "tokens", "val_bpb", "val_loss"]);
        let off = number(&score, "val_bpb") - number(&live, "val_bpb");
        assert!(off.abs() < if quant == "int8" { 0.02 } else { 0.002 }, "{quant} {codec}: {off}");

        let inspected = place.line(&format!("inspect out/{codec}.{quant} --json")).json();
        assert_eq!(keys(&inspected), ["bytes", "params", "quant", "recipe", "tensors"]);
        assert_eq!(inspected["bytes"].as_u64(), Some(file));
        assert_eq!(inspected["quant"], quant);
        assert_eq!(inspected["params"], report["params"]);
        assert_eq!(sum(&inspected["tensors"], elements), count("params"));
        assert_eq!(sum(&inspected["tensors"], |row| row["bytes"].as_u64().unwrap()), count("payload_bytes"));
        assert_eq!(inspected["recipe"]["model_dim"].as_u64(), Some(256));
    }
    assert!(payloads[..4].iter().all(|(_, bytes)| *bytes == payloads[0].1), "{payloads:?}");
    assert!(payloads[4].1 > payloads[0].1 + 60_000, "codes are half of float16: {payloads:?}");

    // For people: the challenge's lines, and by default the artifact lies with its run.
    let lines = place.line("export run --codec zlib").clean().stdout;
    assert!(lines.contains("\nSerialized model int8+zlib: ") && lines.contains(" payload_ratio:"), "{lines}");
    assert!(lines.contains("\nTotal submission size int8+zlib: "), "{lines}");
    assert_eq!(place.read("run/model.fairway"), place.read("out/zlib.int8"));
    let lines = place.line("eval run/model.fairway --data data --device cpu").clean().stdout;
    assert!(lines.starts_with("device: cpu ") && lines.contains("\nval_loss:"), "{lines}");
    assert!(lines.contains("\nfinal_int8_zlib_roundtrip val_loss:"), "{lines}");
    assert!(lines.contains("\nfinal_int8_zlib_roundtrip_exact val_loss:"), "{lines}");
}

#[test]
fn a_runs_own_last_validation_is_its_score_whatever_the_batch() {
    let place = Place::with_data();
    for (run, more) in [("a", ""), ("b", "--micro-batch 16"), ("c", "--set val_batch_size=2048")] {
        let report = place.train(run, &format!("--steps 6 {more} --json")).json();
        for batch in ["", "--micro-batch 16", "--micro-batch 100000"] {
            let score = place.line(&format!("eval {run} --data data --device cpu --json {batch}")).json();
            for key in ["val_loss", "val_bpb"] {
                assert_eq!(score[key], report[key], "{run} {batch}");
            }
        }
    }
    let score = place.line("eval a --data data --device cpu --json").json();
    let val = fairway::data::shard::Shard::open(&place.path("data/fineweb_val_000000.bin")).unwrap();
    let targets = (val.tokens().len() - 1) / 16 * 16;
    assert_eq!(
        (score["tokens"].as_u64(), score["bytes"].as_u64()),
        (Some(targets as u64), Some(targets as u64))
    );
    let bpb = number(&score, "val_loss") / std::f64::consts::LN_2;
    assert!((number(&score, "val_bpb") - bpb).abs() < 1e-12, "{score}");
    // In double precision it is nearly the same, and not the same.
    let wide = place.line("eval a --data data --device cpu --precision f64 --json").json();
    let off = (number(&wide, "val_loss") - number(&score, "val_loss")).abs();
    assert!(off > 0.0 && off < 1e-4, "{off}");
}

#[test]
fn samples_are_decided_by_their_seed_and_go_beyond_the_context() {
    let place = Place::with_data();
    place.train("run", "--steps 20").clean();
    place.line("export run --out model.fairway --json").json();
    let sample = |args: &[&str]| {
        let base = ["sample", "model.fairway", "--device", "cpu", "--json"];
        let report = place.run(base.iter().chain(args)).json();
        assert_eq!(keys(&report), ["text", "tokens_per_s"]);
        report
    };
    let words = |args: &[&str]| sample(args)["text"].as_str().unwrap().to_string();
    // 60 tokens, where the model sees 16 at most.
    let drawn = words(&["--prompt", "the model", "--tokens", "60", "--seed", "3"]);
    assert!(drawn.starts_with("the model") && drawn.chars().count() > 30, "{drawn:?}");
    assert_eq!(drawn, words(&["--prompt", "the model", "--tokens", "60", "--seed", "3"]));
    assert_ne!(drawn, words(&["--prompt", "the model", "--tokens", "60", "--seed", "4"]));
    assert_ne!(
        drawn,
        words(&["--prompt", "the model", "--tokens", "60", "--seed", "3", "--temperature", "0.3"])
    );
    let likeliest = words(&["--prompt", "the model", "--tokens", "40", "--temperature", "0"]);
    assert_eq!(
        likeliest,
        words(&["--prompt", "the model", "--tokens", "40", "--temperature", "0", "--seed", "9"])
    );
    // Fewer tokens are the beginning of more: nothing else depends on their number.
    let shorter = words(&["--prompt", "the model", "--tokens", "20", "--temperature", "0"]);
    assert!(likeliest.starts_with(&shorter), "{likeliest:?} {shorter:?}");
    let long = text(7, 200);
    assert!(
        words(&["--prompt", &long, "--tokens", "5"]).starts_with(&long),
        "a prompt longer than the context"
    );
    assert!(
        words(&["--prompt", "\u{e9}\u{20ac}\u{1f600}", "--tokens", "5"])
            .starts_with("\u{e9}\u{20ac}\u{1f600}")
    );
    assert_eq!(words(&["--prompt", "a", "--tokens", "0"]), "a");
    words(&["--prompt", "", "--tokens", "5"]);
    assert!(number(&sample(&["--prompt", "a"]), "tokens_per_s") > 0.0);

    let shown = place
        .line("sample model.fairway --device cpu --prompt the --tokens 40 --temperature 0")
        .clean()
        .stdout;
    let (device, shown) = shown.split_once('\n').unwrap();
    assert!(device.starts_with("device: cpu ") && shown.starts_with("the"), "{shown:?}");
    place.line("sample run --device cpu --prompt the --tokens 4 --json").json();
}

#[test]
fn inspect_tells_what_recipes_and_runs_are() {
    let place = Place::with_data();
    place.train("run", "--steps 2").clean();
    for what in ["tiny", "baseline", "run/recipe.toml", "run"] {
        let report = place.line(&format!("inspect {what} --json")).json();
        assert_eq!(keys(&report), ["bytes", "params", "quant", "recipe", "tensors"], "{what}");
        assert_eq!(sum(&report["tensors"], elements), report["params"].as_u64().unwrap(), "{what}");
        for row in report["tensors"].as_array().unwrap() {
            assert_eq!(keys(row), ["bytes", "dtype", "name", "shape"], "{what}");
            assert_eq!(row["bytes"].as_u64().unwrap(), 4 * elements(row), "{what}");
        }
        let text = place.line(&format!("inspect {what}")).clean().stdout;
        assert!(
            text.contains(&format!("parameters: {}\n", report["params"])) && text.contains("model_dim = ")
        );
    }
    let report = place.line("inspect run --json").json();
    assert_eq!(report["params"].as_u64(), Some(SMALL_PARAMS));
    assert_eq!(report["quant"], "none");
    assert_eq!(report["bytes"].as_u64(), Some(place.read("run/final.safetensors").len() as u64));
    // Before its end a run is its newest checkpoint, without the optimizers' state.
    fs::remove_file(place.path("run/final.safetensors")).unwrap();
    let early = place.line("inspect run --json").json();
    assert_eq!(early["tensors"], report["tensors"]);
    let checkpoint = place.read("run/checkpoint/step_00000002.safetensors").len() as u64;
    assert_eq!(early["bytes"].as_u64(), Some(checkpoint));
    assert_eq!(place.line("inspect baseline --json").json()["params"].as_u64(), Some(17_059_912));
}

/// Runs the program with at most 1 GiB of address space, which bounds its memory.
#[cfg(target_os = "linux")]
fn in_one_gib(place: &Place, line: &str) -> Ran {
    let mut command = Command::new("bash");
    place.quieten(&mut command);
    let program = env!("CARGO_BIN_EXE_fairway");
    command.args(["-c", &format!("ulimit -v 1048576; exec '{program}' {line}")]);
    Ran::of(&mut command)
}

#[cfg(target_os = "linux")]
#[test]
fn inspect_stays_below_one_gib_whatever_a_run_says() {
    let place = Place::with_data();
    place.train("run", "--steps 2").clean();
    in_one_gib(&place, "inspect run --json").json();
    let last = place.path("run/final.safetensors");
    let whole = fs::read(&last).unwrap();
    let header = |json: &[u8]| [&(json.len() as u64).to_le_bytes(), json].concat();

    // A header that promises the moon, and one as long as it may be.
    fs::write(&last, [&u64::MAX.to_le_bytes()[..], &[b' '; 100]].concat()).unwrap();
    in_one_gib(&place, "inspect run")
        .fails(2, &["header of 18446744073709551615 bytes", "final.safetensors"]);
    let mut entries: Vec<String> = vec![format!("\"__metadata__\":{{\"sha256\":\"{}\"}}", "0".repeat(64))];
    entries.extend(
        (0..290_000).map(|n| format!("\"t{n:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}")),
    );
    let json = format!("{{{}}}", entries.join(","));
    assert!(json.len() < 16 << 20 && json.len() > 14 << 20, "{}", json.len());
    fs::write(&last, header(json.as_bytes())).unwrap();
    in_one_gib(&place, "inspect run").fails(2, &["unknown or second tensor", "final.safetensors"]);
    let json = format!("{{\"__metadata__\":{{\"sha256\":\"{}\"}}}}", "0".repeat(17 << 20));
    fs::write(&last, header(json.as_bytes())).unwrap();
    in_one_gib(&place, "inspect run").fails(2, &["header of ", "final.safetensors"]);
    // A tensor of the whole address space in a file of nothing.
    let json = "{\"tok_emb.weight\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,18446744073709551615]}}";
    fs::write(&last, header(json.as_bytes())).unwrap();
    in_one_gib(&place, "inspect run").fails(2, &["broken header", "final.safetensors"]);

    // Files beside it.
    fs::write(&last, &whole).unwrap();
    let tokenizer = fs::read(place.path("run/tokenizer.json")).unwrap();
    let pieces = vec!["[\"\",0,1]"; 1_600_000].join(",");
    fs::write(
        place.path("run/tokenizer.json"),
        format!("{{\"kind\":\"sentencepiece\",\"pieces\":[{pieces}]}}"),
    )
    .unwrap();
    in_one_gib(&place, "inspect run").fails(2, &["tokenizer.json"]);
    fs::write(place.path("run/tokenizer.json"), vec![b' '; 17 << 20]).unwrap();
    in_one_gib(&place, "inspect run").fails(2, &["tokenizer.json", "at most 16777216 bytes"]);
    fs::write(place.path("run/tokenizer.json"), tokenizer).unwrap();
    in_one_gib(&place, "inspect run --json").json();

    // Weights of 1.3 GB, all there as the header says: read to their end, a piece at a time.
    let big = "vocab_size = 65536\nmodel_dim = 4800\nnum_heads = 2\nnum_kv_heads = 1\nnum_layers = 1\nmlp_mult = 1\n";
    fs::write(place.path("run/recipe.toml"), big).unwrap();
    let recipe = fairway::recipe::Recipe::from_toml(big, Path::new("big")).unwrap();
    let mut entries = vec![format!("\"__metadata__\":{{\"sha256\":\"{}\"}}", "0".repeat(64))];
    let mut offset = 0;
    for (name, shape) in fairway::model::layout(&recipe).unwrap() {
        let end = offset + 4 * shape.iter().product::<usize>();
        entries.push(format!(
            "{name:?}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{offset},{end}]}}"
        ));
        offset = end;
    }
    let json = header(format!("{{{}}}", entries.join(",")).as_bytes());
    fs::write(&last, &json).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&last).unwrap();
    file.set_len((json.len() + offset) as u64).unwrap();
    assert!(offset > 1 << 30);
    in_one_gib(&place, "inspect run").fails(2, &["does not match its SHA-256", "final.safetensors"]);
}

#[cfg(target_os = "linux")]
#[test]
fn inspect_stays_below_one_gib_whatever_an_artifacts_recipe_says() {
    let place = Place::with_data();
    place.train("run", "--steps 1").clean();
    place.line("export run --out model.fairway --json").json();
    let mut artifact = Artifact::read(&place.path("model.fairway")).unwrap();
    // Keys and tables, as many as are read, and one text that is too long to be.
    let most = (1 << 20) - 200;
    let cases =
        [("a=1\n", most), ("[a.b.c.d.e.f.g.h]\n", most), ("a=[[[[[[[[]]]]]]]]\n", most), ("#\n", 3 << 20)];
    for (line, len) in cases {
        let mut recipe = String::new();
        for n in 0.. {
            if recipe.len() > len {
                break;
            }
            recipe.push_str(&line.replacen('a', &format!("k{n:x}"), 1));
        }
        artifact.recipe_toml = recipe;
        artifact.write(&place.path("model.fairway"), Codec::Zstd).unwrap();
        in_one_gib(&place, "inspect model.fairway").fails(2, &["model.fairway"]);
    }
    // Layers that would be 64 GB if they were listed, and a text as long as a section may be.
    artifact.recipe_toml = format!("recur_layers = \"{}0\"", "0-65535,".repeat(most / 8));
    artifact.write(&place.path("model.fairway"), Codec::Zstd).unwrap();
    in_one_gib(&place, "inspect model.fairway").fails(2, &["recur_layers", "model.fairway"]);
    artifact.recipe_toml = "#".repeat((8 << 20) - 4096);
    artifact.write(&place.path("model.fairway"), Codec::Zstd).unwrap();
    in_one_gib(&place, "inspect model.fairway").fails(2, &["recipe of 8384512 bytes", "model.fairway"]);
}

#[cfg(target_os = "linux")]
#[test]
fn inspect_loads_no_library_of_a_gpu() {
    let place = Place::with_data();
    place.train("run", "--steps 1").clean();
    place.line("export run --out model.fairway --json").json();
    // The C library's loader writes down what it opens.
    let loaded = |line: &str| {
        let mut command = place.command();
        command.env("LD_DEBUG", "files").env("LD_DEBUG_OUTPUT", place.path("loaded")).args(line.split(' '));
        Ran::of(&mut command).ok();
        let name = place.names(".").into_iter().find(|name| name.starts_with("loaded."));
        name.map(|name| {
            let text = place.read_text(&name);
            fs::remove_file(place.path(name)).unwrap();
            text
        })
    };
    let is_gpu = |text: &str| {
        ["libcuda", "libvulkan", "libnvrtc", "libEGL", "libGL"].iter().any(|lib| text.contains(lib))
    };
    let control = loaded("devices --json");
    match control {
        Some(text) if is_gpu(&text) => (),
        _ => return println!("skipped: this machine's loader does not tell what `devices` opens"),
    }
    for what in ["baseline", "run", "model.fairway"] {
        let text = loaded(&format!("inspect {what} --json")).unwrap();
        assert!(text.contains("libc.so") && !is_gpu(&text), "inspect {what}");
    }
}

#[test]
fn data_packs_and_verifies() {
    let place = Place::new();
    let documents: Vec<String> = (0..5).map(|n| text(n, 300) + "\u{20ac}\u{e9}").collect();
    let lines = documents.iter().map(|text| serde_json::json!({ "text": text, "source": "x" }).to_string());
    fs::write(place.path("docs.jsonl"), lines.collect::<Vec<_>>().join("\n")).unwrap();
    fs::write(place.path("more.txt"), text(9, 400)).unwrap();
    let raw: usize =
        documents.iter().map(String::len).sum::<usize>() + fs::read(place.path("more.txt")).unwrap().len();

    let report = place
        .line("data pack docs.jsonl more.txt --tokenizer byte --out d --val-docs 2 --shard-tokens 500 --json")
        .json();
    assert_eq!((report["docs"].as_u64(), report["val_docs"].as_u64()), (Some(6), Some(2)));
    // Each document is its bytes and a BOS.
    assert_eq!(
        (report["tokens"].as_u64(), report["bytes"].as_u64()),
        (Some(raw as u64 + 6), Some(raw as u64))
    );
    let shards = report["shards"].as_array().unwrap();
    assert_eq!(sum(&report["shards"], |shard| shard["tokens"].as_u64().unwrap()), raw as u64 + 6);
    assert!(
        shards.iter().all(|shard| shard["tokens"].as_u64().unwrap() <= 500) && shards.len() > 3,
        "{report}"
    );
    assert_eq!(report["sha256"].as_str().unwrap().len(), 64);
    let verified = place.line("data verify d --text docs.jsonl more.txt --json").json();
    for key in ["docs", "tokens", "bytes", "shards", "sha256"] {
        assert_eq!(verified[key], report[key], "{key}");
    }
    let shown = place.line("data verify d").clean().stdout;
    assert!(shown.contains(report["sha256"].as_str().unwrap()), "{shown}");
    // The order of the documents is kept: another order is other shards.
    let other =
        place.line("data pack more.txt docs.jsonl --tokenizer byte --out e --val-docs 2 --json").json();
    assert_ne!(other["sha256"], report["sha256"]);
    place.line("data verify d --text more.txt docs.jsonl").fails(2, &["d"]);

    place.line("data pack docs.jsonl --tokenizer byte --out all --val-docs 0").clean();
    assert_eq!(place.names("all"), ["fairway_data.json", "fineweb_train_000000.bin"]);
    let shard = place.read("all/fineweb_train_000000.bin");
    let words: Vec<i32> = shard[..12].chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect();
    let tokens = documents.iter().map(|text| text.len() + 1).sum::<usize>();
    assert_eq!(words, [20_240_520, 1, tokens as i32]);
    assert_eq!(shard.len(), 1024 + 2 * tokens);
    let first: Vec<u16> = shard[1024..1032].chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let bytes = documents[0].as_bytes();
    assert_eq!(first, [1, u16::from(bytes[0]) + 4, u16::from(bytes[1]) + 4, u16::from(bytes[2]) + 4]);

    place.line("train tiny --data d --tokenizer byte --device cpu --steps 2 --out run --set train_seq_len=64 --set train_batch_tokens=64").clean();
}

#[test]
fn a_sentencepiece_model_travels_with_the_run_and_the_artifact() {
    let Some(model) = shared("tokenizers/fineweb_1024_bpe.model") else { return };
    let place = Place::new();
    fs::copy(model, place.path("sp.model")).unwrap();
    place.pack("data", "byte", 4);
    fs::remove_dir_all(place.path("data")).unwrap();
    let report = place.line("data pack data-0.txt data-1.txt data-2.txt data-3.txt --tokenizer sp.model --out data --val-docs 1 --json").json();
    assert!(number(&report, "bytes") > 2.0 * number(&report, "tokens"), "{report}");
    let live = place.train("run", "--tokenizer sp.model --set vocab_size=1024 --steps 5 --json").json();
    let log = place.read_text("run/train.log");
    assert!(log.contains("val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=sp.model\n"), "{log}");
    place.line("export run --out model.fairway --quant fp16 --json").json();
    // The model file is not needed any more.
    fs::remove_file(place.path("sp.model")).unwrap();
    let [run, file] = ["run", "model.fairway"]
        .map(|what| place.line(&format!("eval {what} --data data --device cpu --json")).json());
    assert_eq!((&run["val_bpb"], &run["val_loss"]), (&live["val_bpb"], &live["val_loss"]));
    assert_eq!((&file["bytes"], &file["tokens"]), (&run["bytes"], &run["tokens"]));
    assert!(number(&run, "bytes") > 2.0 * number(&run, "tokens"), "{run}");
    assert!((number(&file, "val_bpb") - number(&run, "val_bpb")).abs() < 2e-3, "{file} {run}");
    for what in ["run", "model.fairway"] {
        let base =
            ["sample", what, "--device", "cpu", "--json", "--tokens", "6", "--temperature", "0", "--prompt"];
        let report = place.run(base.iter().chain(&["the model reads"])).json();
        assert!(report["text"].as_str().unwrap().starts_with("the model reads"), "{report}");
    }
}

/// Whether cargo's registry, which the demo corpus is made from, is there.
fn has_registry() -> bool {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
    let found = home.join("registry/src").is_dir();
    if !found {
        println!("skipped: cargo's registry with the sources of the demo corpus is not there");
    }
    found
}

#[test]
fn the_demo_trains_exports_scores_and_samples() {
    if !has_registry() {
        return;
    }
    let place = Place::new();
    let ran = place.line("demo --minutes 0.05 --device cpu --out demo").clean();
    for row in [
        "device ",
        "parameters ",
        "steps ",
        "training tokens per second ",
        "val_bpb, unigram model ",
        "val_bpb, live model ",
        "val_bpb, artifact reloaded ",
        "artifact bytes (int8, brotli) ",
        "artifact  ",
        "curve ",
    ] {
        assert!(ran.stdout.contains(&format!("\n{row}")), "{row:?}: {ran:?}");
    }
    assert!(
        ran.stdout.contains("\nstopping_early: wallclock_cap ") && ran.stdout.contains("\nsample after ")
    );
    let value = |row: &str| -> f64 {
        let line = ran.stdout.lines().find(|line| line.starts_with(row)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    let (live, reloaded) = (value("val_bpb, live model"), value("val_bpb, artifact reloaded"));
    assert!(live < 8.0 && (live - reloaded).abs() < 0.05, "{live} {reloaded}");
    assert!((4.0..6.0).contains(&value("val_bpb, unigram model")), "{ran:?}");
    assert_eq!(value("artifact bytes"), place.read("demo/model.fairway").len() as f64);
    check_xml(&place.read_text("demo/curve.svg"));

    // The corpus stays in the cache: it is what commands without --data take.
    let bytes = place.snapshot("cache");
    let mut args =
        place.small("run", "--steps 0 --set train_batch_tokens=16384 --set val_batch_size=16384 --json");
    let at = args.iter().position(|arg| arg == "--data").unwrap();
    args.drain(at..at + 2);
    let trained = place.run(args).json();
    assert!(place.read_text("run/train.log").contains("val_loader:shards pattern="));
    let score = place.line("eval run --device cpu --json").json();
    assert_eq!(score["val_bpb"], trained["val_bpb"]);
    assert!(number(&score, "bytes") > 2e5, "{score}");
    assert!(place.snapshot("cache") == bytes);
    // The command that writes it elsewhere writes the same.
    let report = place.line("data demo --out corpus --json").json();
    for key in ["docs", "tokens", "bytes", "shards", "sha256"] {
        assert!(!report[key].is_null(), "{key}");
    }
    for (path, bytes) in bytes {
        let name = path.file_name().unwrap();
        assert!(place.read(Path::new("corpus").join(name)) == bytes, "{name:?}");
    }
}

#[test]
fn warnings_leave_json_alone() {
    let place = Place::with_data();
    fs::write(place.path("run.env"), "ITERATIONS=2\nRANK=0\nWORLD_SIZE=8\n").unwrap();
    let ran = place.run(place.small("run", "--from-env run.env --json"));
    assert_eq!(ran.stderr.lines().count(), 2, "{ran:?}");
    assert_eq!(ran.json()["steps"].as_u64(), Some(2));
}
