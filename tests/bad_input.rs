//! What is wrong with what the user gives or the machine has: one line that names it, the promised exit status, and
//! nothing half-written in place of an older good file.

mod cli_common;

use cli_common::{Place, Ran, SMALL, text};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a folder holds, to see that a refused command left it alone.
fn listing(place: &Place) -> BTreeMap<PathBuf, Vec<u8>> {
    place.snapshot(".")
}

/// Each line must fail so, with these parts in its error, and change nothing.
#[track_caller]
fn all_fail(place: &Place, cases: &[(&str, i32, &[&str])]) {
    let before = listing(place);
    for (line, code, parts) in cases {
        let ran = place.line(line);
        assert_eq!(ran.stdout, "", "{line}");
        ran.fails(*code, parts);
        assert!(listing(place) == before, "{line} left something behind");
    }
}

/// A byte of a file set.
fn poke(path: &Path, at: usize, byte: u8) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] = byte;
    fs::write(path, bytes).unwrap();
}

/// A place with shards, a short run in `run` and its artifact in `model.fairway`.
fn trained() -> Place {
    let place = Place::with_data();
    place.train("run", "--steps 2").clean();
    place.line("export run --out model.fairway --json").json();
    place
}

#[test]
fn usage() {
    let place = Place::new();
    all_fail(
        &place,
        &[
            ("", 2, &["no command", "fairway --help"]),
            ("trian tiny", 2, &["trian", "usage: fairway"]),
            ("train", 2, &["RECIPE", "usage: fairway train"]),
            ("train tiny --stepps 3", 2, &["--stepps", "--steps", "usage: fairway train"]),
            ("train tiny baseline", 2, &["baseline", "usage: fairway train"]),
            ("train tiny --steps", 2, &["--steps <N>"]),
            ("export", 2, &["<RUN>"]),
            ("eval", 2, &["<MODEL>"]),
            ("sample x", 2, &["--prompt"]),
            ("inspect", 2, &["<WHAT>"]),
            ("data", 2, &["no command"]),
            ("data pakc x", 2, &["pakc"]),
            ("data pack --tokenizer byte --out d", 2, &["<FILE>"]),
            ("data pack x --out d", 2, &["--tokenizer"]),
            ("parity --only x", 2, &["--fixtures"]),
            ("recipes --jsno", 2, &["--jsno"]),
            ("eval x --mode sideways", 2, &["sideways", "--mode", "full"]),
            ("export x --quant int9", 2, &["int9"]),
            ("export x --codec zip", 2, &["zip", "brotli"]),
        ],
    );
}

#[cfg(unix)]
#[test]
fn arguments_that_are_not_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let place = trained();
    let bad = OsString::from_vec(b"r\xffn".to_vec());
    let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
    // Where a text is asked for.
    for line in
        ["train", "inspect", "train tiny --set", "sample run --prompt", "data pack x --out d --tokenizer"]
    {
        let ran = place.run(words(line).into_iter().chain([bad.clone()]));
        ran.fails(2, &["UTF-8"]);
    }
    // Where a path is asked for, it is a path like any other.
    for line in ["eval", "export", "train --resume", "data verify"] {
        let ran = place.run(words(line).into_iter().chain([bad.clone()]));
        ran.fails(2, &["r\u{fffd}n"]);
    }
    let mut args: Vec<OsString> =
        place.small("x", "--steps 1 --json").into_iter().map(OsString::from).collect();
    let at = args.iter().position(|arg| arg == "x").unwrap();
    args[at].clone_from(&bad);
    assert_eq!(place.run(args).json()["out"], "r\u{fffd}n");
    let after = |line: &str| [words(line), vec![bad.clone()]].concat();
    assert_eq!(
        place.run(after("train --device cpu --steps 2 --json --resume")).json()["steps"].as_u64(),
        Some(2)
    );
    place.run(after("eval --data data --device cpu --json")).json();
    place.run(after("export --json")).json();
}

#[test]
fn numbers_out_of_range() {
    let place = trained();
    let flags = [
        (
            "train tiny --data data --device cpu --out x",
            &["--steps", "--seed", "--micro-batch", "--save-every"][..],
        ),
        ("eval run --data data --device cpu", &["--micro-batch"]),
        ("sample run --prompt a --device cpu", &["--tokens", "--temperature", "--seed"]),
        ("demo --device cpu --out x", &["--minutes"]),
        ("data pack data-0.txt --tokenizer byte --out x", &["--val-docs", "--shard-tokens"]),
        ("data fetch --out x", &["--train-shards"]),
    ];
    let before = listing(&place);
    for (line, flags) in flags {
        for flag in flags {
            for value in
                ["-1", "nan", "NaN", "inf", "-inf", "abc", "", "1e999", "99999999999999999999999", "0x10"]
            {
                let words = line.split(' ').chain([*flag, value]);
                let huge_tokens = value.starts_with("999") && ["--temperature", "--minutes"].contains(flag);
                if huge_tokens {
                    continue;
                }
                place.run(words).fails(2, &[flag]);
            }
        }
    }
    all_fail(
        &place,
        &[
            (
                "train tiny --data data --device cpu --out x --micro-batch 0",
                2,
                &["--micro-batch", "train_seq_len"],
            ),
            (
                "train tiny --data data --device cpu --out x --micro-batch 127",
                2,
                &["--micro-batch", "train_seq_len=128"],
            ),
            ("train tiny --data data --device cpu --out x --steps 18446744073709551615", 2, &["iterations"]),
            ("train tiny --data data --device cpu --out x --seed 18446744073709551615", 2, &["seed"]),
            ("eval run --data data --device cpu --micro-batch 0", 2, &["--micro-batch", "train_seq_len=16"]),
            ("data pack data-0.txt --tokenizer byte --out x --shard-tokens 0", 2, &["--shard-tokens"]),
            ("demo --device cpu --out x --minutes 0", 2, &["--minutes"]),
            ("demo --device cpu --out x --minutes 1e300", 2, &["--minutes"]),
        ],
    );
    // Recipe keys are numbers, too.
    for key in
        ["matrix_lr", "iterations", "model_dim", "beta1", "max_wallclock_seconds", "adam_eps", "rope_base"]
    {
        for value in ["-1", "nan", "inf", "abc", ""] {
            let ran = place.line(&format!("train tiny --data data --device cpu --out x --set {key}={value}"));
            ran.fails(2, &[key, "--set"]);
        }
    }
    assert!(listing(&place) == before);
}

#[test]
fn shards() {
    let place = trained();
    let train = "train tiny --data bad --tokenizer byte --device cpu --steps 1 --out x";
    let eval = "eval run --data bad --device cpu";
    // Each damage is done to a fresh copy in `bad`.
    let damaged = |damage: &dyn Fn(&Path)| {
        let bad = place.path("bad");
        let _ = fs::remove_dir_all(&bad);
        fs::create_dir(&bad).unwrap();
        for name in place.names("data") {
            fs::copy(place.path("data").join(&name), bad.join(&name)).unwrap();
        }
        damage(&bad);
    };
    let (train_shard, val_shard) = ("fineweb_train_000000.bin", "fineweb_val_000000.bin");
    for (shard, lines) in [(train_shard, &[train][..]), (val_shard, &[train, eval])] {
        let place_of = format!("bad/{shard}");
        for line in lines {
            let check = |parts: &[&str]| all_fail(&place, &[(line, 2, parts)]);
            damaged(&|bad| fs::remove_file(bad.join(shard)).unwrap());
            check(&["shards", "bad", if shard == train_shard { "fineweb_train_" } else { "fineweb_val_" }]);
            damaged(&|bad| {
                let bytes = fs::read(bad.join(shard)).unwrap();
                fs::write(bad.join(shard), &bytes[..bytes.len() - 1]).unwrap();
            });
            check(&[&place_of, "header counts"]);
            damaged(&|bad| fs::write(bad.join(shard), &fs::read(bad.join(shard)).unwrap()[..600]).unwrap());
            check(&[&place_of, "600 bytes"]);
            damaged(&|bad| fs::write(bad.join(shard), b"").unwrap());
            check(&[&place_of, "0 bytes"]);
            damaged(&|bad| poke(&bad.join(shard), 0, 0));
            check(&[&place_of, "magic", "20240520"]);
            damaged(&|bad| poke(&bad.join(shard), 4, 2));
            check(&[&place_of, "version 2", "expected 1"]);
            damaged(&|bad| poke(&bad.join(shard), 9, 0xff));
            check(&[&place_of, "header counts"]);
            // An id of 260 among byte's 260.
            damaged(&|bad| {
                poke(&bad.join(shard), 1024 + 21, 1);
                poke(&bad.join(shard), 1024 + 20, 4);
            });
            check(&[&place_of, "token id 260 at token 10", "260"]);
            damaged(&|bad| {
                fs::remove_file(bad.join(shard)).unwrap();
                fs::create_dir(bad.join(shard)).unwrap();
            });
            check(&[&place_of]);
        }
    }
    // A text with too few tokens for one sequence.
    fs::write(place.path("short.txt"), "short").unwrap();
    place.line("data pack short.txt short.txt --tokenizer byte --out few --val-docs 1 --json").json();
    all_fail(
        &place,
        &[
            (
                "train tiny --data few --device cpu --steps 1 --out x",
                2,
                &["validation split of 6 tokens", "129"],
            ),
            ("train tiny --data nowhere --device cpu --out x", 2, &["nowhere", "a folder of token shards"]),
            (
                "train tiny --data data-0.txt --device cpu --out x",
                2,
                &["data-0.txt", "a folder of token shards"],
            ),
            ("train tiny --data run --device cpu --out x", 2, &["no shards", "fineweb_train_*.bin"]),
            ("eval run --data nowhere --device cpu", 2, &["nowhere"]),
            ("data verify nowhere", 2, &["nowhere"]),
            ("data verify run", 2, &["run"]),
            ("data verify model.fairway", 2, &["model.fairway"]),
        ],
    );
    damaged(&|bad| poke(&bad.join(train_shard), 1024 + 40, 99));
    all_fail(&place, &[("data verify bad", 2, &["bad"])]);
    // The record beside the shards.
    for record in ["", "{", "[]", "{\"format\":2}"] {
        damaged(&|bad| fs::write(bad.join("fairway_data.json"), record).unwrap());
        all_fail(&place, &[(train, 2, &["fairway_data.json"]), (eval, 2, &["fairway_data.json"])]);
    }
}

#[test]
fn tokenizers() {
    let place = trained();
    fs::write(place.path("empty.model"), b"").unwrap();
    fs::write(place.path("noise.model"), text(3, 5000)).unwrap();
    // Shards of another tokenizer, as the record beside them says.
    fs::create_dir(place.path("other")).unwrap();
    for name in place.names("data") {
        fs::copy(place.path("data").join(&name), place.path("other").join(&name)).unwrap();
    }
    let record = place.read_text("data/fairway_data.json");
    let other = record
        .replace("\"byte\"", "\"sentencepiece\"")
        .replace("\"vocab_size\": 260", "\"vocab_size\": 1024");
    assert_ne!(record, other);
    fs::write(place.path("other/fairway_data.json"), other).unwrap();
    let base = "train tiny --device cpu --steps 1 --out x";
    all_fail(
        &place,
        &[
            (&format!("{base} --data data --tokenizer nothing.model"), 2, &["nothing.model"]),
            (&format!("{base} --data data --tokenizer data"), 2, &["data"]),
            (&format!("{base} --data data --tokenizer empty.model"), 2, &["empty.model"]),
            (&format!("{base} --data data --tokenizer noise.model"), 2, &["noise.model"]),
            (
                &format!("{base} --data other --tokenizer byte"),
                2,
                &["byte", "does not match the shards", "other"],
            ),
            (&format!("{base} --data other"), 2, &["no tokenizer for the shards in other", "--tokenizer"]),
            (&format!("{base} --data data --set vocab_size=100"), 2, &["100"]),
            ("eval run --data other --device cpu", 2, &["other", "sentencepiece", "byte"]),
            ("eval model.fairway --data other --device cpu", 2, &["other", "sentencepiece", "byte"]),
            ("submission run --out x --data other --device cpu", 2, &["other", "sentencepiece", "byte"]),
            ("data pack data-0.txt --tokenizer noise.model --out x", 2, &["noise.model"]),
            ("data pack data-0.txt --tokenizer nothing.model --out x", 2, &["nothing.model"]),
        ],
    );
}

#[test]
fn recipes() {
    let place = Place::with_data();
    let write = |name: &str, content: &[u8]| fs::write(place.path(name), content).unwrap();
    write("typo.toml", b"modle_dim = 16\n");
    write("type.toml", b"model_dim = \"wide\"\n");
    write("heads.toml", b"model_dim = 16\nnum_heads = 3\n");
    write("broken.toml", b"iterations = 3\nmodel_dim = = 16\n");
    write("bytes.toml", b"\xff\xfe\x00");
    write("long.toml", &vec![b'#'; (1 << 20) + 1]);
    write("unknown.env", b"ITERATIONS=3\nMATRIX_RL=0.1\n");
    write("value.env", b"ITERATIONS=many\n");
    write("shell.env", b"ITERATIONS=$(nproc)\n");
    write("words.env", b"ITERATIONS 3\n");
    write("bytes.env", b"SEED=\xff\n");
    let base = "train tiny --data data --device cpu --steps 1 --out x";
    let from = |recipe: &str| format!("train {recipe} --data data --device cpu --steps 1 --out x");
    all_fail(
        &place,
        &[
            (&from("typo.toml"), 2, &["unknown key modle_dim", "typo.toml", "the nearest is model_dim"]),
            (&from("type.toml"), 2, &["model_dim = \"wide\"", "type.toml", "an integer"]),
            (&from("heads.toml"), 2, &["model_dim = 16", "num_heads = 3"]),
            (&from("broken.toml"), 2, &["not TOML", "broken.toml line 2"]),
            (&from("bytes.toml"), 2, &["bytes.toml", "UTF-8"]),
            (&from("long.toml"), 2, &["long.toml", "at most 1048576 bytes"]),
            (&from("none.toml"), 2, &["none.toml"]),
            (&from("tinny"), 2, &["unknown recipe", "tinny", "tiny, baseline"]),
            (&from("data"), 2, &["unknown recipe", "data"]),
            ("inspect typo.toml", 2, &["unknown key modle_dim", "typo.toml"]),
            ("inspect heads.toml", 2, &["num_heads = 3"]),
            ("inspect tinny", 2, &["unknown recipe"]),
            (&format!("{base} --set modle_dim=16"), 2, &["unknown key modle_dim", "--set", "model_dim"]),
            (&format!("{base} --set model_dim"), 2, &["model_dim", "--set", "key=value"]),
            (&format!("{base} --set num_heads=3"), 2, &["num_heads = 3"]),
            (&format!("{base} --set num_kv_heads=4"), 2, &["num_kv_heads = 4", "num_heads"]),
            (&format!("{base} --set train_batch_tokens=1000"), 2, &["train_batch_tokens = 1000"]),
            (&format!("{base} --set val_batch_size=1"), 2, &["val_batch_size = 1"]),
            (&format!("{base} --set num_layers=1024 --set model_dim=16384"), 2, &["parameters", "at most"]),
            (
                &format!("{base} --from-env unknown.env"),
                2,
                &["unknown name MATRIX_RL", "unknown.env line 2", "MATRIX_LR"],
            ),
            (
                &format!("{base} --from-env value.env"),
                2,
                &["iterations = many", "value.env line 1", "an integer"],
            ),
            (&format!("{base} --from-env shell.env"), 2, &["shell.env line 1", "a literal value"]),
            (&format!("{base} --from-env words.env"), 2, &["words.env line 1", "NAME=value"]),
            (&format!("{base} --from-env bytes.env"), 2, &["bytes.env", "UTF-8"]),
            (&format!("{base} --from-env none.env"), 2, &["none.env"]),
            (&format!("{base} --from-env data"), 2, &["data"]),
        ],
    );
    let mut command = place.command();
    command.args(format!("{base} --from-env").split(' ')).env("NUM_LAYERS", "-3");
    Ran::of(&mut command).fails(2, &["num_layers = -3", "environment variable NUM_LAYERS"]);
}

#[test]
fn recipes_of_the_hybrids() {
    let place = Place::with_data();
    fs::write(place.path("base.toml"), "base = \"pr9\"\n").unwrap();
    fs::write(place.path("layers.toml"), "system = \"pr1382\"\nmamba_layers = [1, 0]\n").unwrap();
    let line = |recipe: &str, sets: &str| {
        let sets: String = sets.split_whitespace().map(|set| format!(" --set {set}")).collect();
        format!("train {recipe} --data data --device cpu --steps 1 --out x --set vocab_size=260{sets}")
    };
    let cases: &[(&str, &str, &[&str])] = &[
        // A schedule that names a missing layer.
        (
            "pr1994",
            "parallel_layer_positions=0-7",
            &["parallel_layer_positions names layer 7", "num_unique_layers = 7"],
        ),
        (
            "pr1994",
            "attn_layer_positions=2",
            &["attn_layer_positions and parallel_layer_positions both name layer 2"],
        ),
        (
            "pr1994",
            "num_unique_layers=0 num_loops=1 mamba2_layer_positions=9",
            &["mamba2_layer_positions names layer 9", "num_layers = 9"],
        ),
        ("pr1994", "num_unique_layers=0", &["num_loops = 3", "num_unique_layers above 0"]),
        ("pr1382", "mamba_layers=0-18", &["mamba_layers names layer 18", "num_layers = 18"]),
        ("pr1382", "mamba_layers=3-1", &["mamba_layers = 3-1", "--set"]),
        ("pr1382", "mamba_layers=1,1", &["mamba_layers = 1,1", "ascending"]),
        ("pr1382", "ve_enabled=1 ve_layers=9,18", &["ve_layers names layer 18", "num_layers = 18"]),
        ("pr1607", "attn_placement=9", &["attn_placement names layer 9", "num_layers = 8"]),
        ("pr1607", "attn_placement=middle", &["attn_placement = middle", "even, first, last, nemotron"]),
        ("pr1607", "num_attn_layers=9", &["num_attn_layers = 9", "num_layers = 8"]),
        // A recurrence with no such layers.
        ("pr1607", "recur_layers=3,8", &["recur_layers names layer 8", "num_layers = 8"]),
        ("pr1607", "recur_layers=4,3", &["recur_layers = 4,3", "ascending"]),
        ("pr1607", "recur_mode=twice", &["recur_mode = twice", "block, untie_mlp"]),
        // Head counts that do not divide.
        ("pr1607", "num_heads=3", &["model_dim = 512", "num_heads = 3"]),
        ("pr1382", "num_kv_heads=3", &["num_heads = 8", "num_kv_heads = 3"]),
        ("pr1607", "mamba3_headdim=48", &["mamba3_expand * model_dim = 1024", "mamba3_headdim = 48"]),
        ("pr1607", "mamba3_ngroups=3", &["heads of Mamba-3 = 16", "mamba3_ngroups = 3"]),
        ("pr1994", "mamba2_headdim=48", &["mamba2_expand * model_dim = 1024", "mamba2_headdim = 48"]),
        ("pr1994", "mamba2_ngroups=2", &["mamba2_ngroups = 2", "mamba2_gated_norm = true"]),
        ("pr1994", "mamba2_gated_norm=1", &["mamba2_gated_norm and mamba2_kill_selectivity"]),
        ("pr1382", "rope_dims=5", &["rotated channels of an attention head = 5", "2"]),
        ("pr1382", "rope_dims=66", &["rope_dims = 66", "model_dim / num_heads = 64"]),
        // Sizes that an op does not support.
        ("pr1607", "mamba3_d_state=2", &["mamba3_d_state = 2", "at least 4"]),
        ("pr1607", "mamba3_d_state=1025", &["mamba3_d_state = 1025", "from 1 to 1024"]),
        ("pr1607", "mamba3_chunk_size=0", &["mamba3_chunk_size = 0", "from 1 to 4096"]),
        ("pr1994", "mamba2_d_state=0", &["mamba2_d_state = 0", "from 1 to 1024"]),
        ("pr1994", "mamba2_chunk_size=4097", &["mamba2_chunk_size = 4097", "from 1 to 4096"]),
        ("pr1994", "mamba2_d_conv=1", &["mamba2_d_conv = 1", "at least 2"]),
        ("pr1382", "mamba_d_conv=1", &["mamba_d_conv = 1", "at least 2"]),
        ("pr1382", "mamba_d_state=0", &["mamba_d_state = 0", "from 1 to 1024"]),
        ("pr1382", "mamba_expand=0.001", &["mamba_expand = 0.001", "at least one inner channel"]),
        ("pr1607", "bigram_buckets=8000000", &["bigram_buckets = 8000000", "at most 4194304"]),
        ("pr1382", "bigram_vocab_size=8000000", &["bigram_vocab_size = 8000000", "at most 4194304"]),
        ("pr1382", "muon_shards=2", &["muon_shards = 2", "as_written = true"]),
        // Keys of another system, and where a recipe starts.
        ("tiny", "ternary_body=1", &["ternary_body = true in system challenge", "pr1994"]),
        ("pr1607", "mamba_layers=0", &["mamba_layers = [0] in system pr1607", "pr1382"]),
        ("tiny", "system=pr7", &["system = pr7", "pr1994"]),
        ("base.toml", "", &["base = \"pr9\"", "base.toml", "one of tiny, baseline"]),
        ("layers.toml", "", &["mamba_layers = [1, 0]", "layers.toml", "ascending"]),
    ];
    let lines: Vec<(String, &[&str])> =
        cases.iter().map(|(recipe, sets, parts)| (line(recipe, sets), *parts)).collect();
    let all: Vec<(&str, i32, &[&str])> =
        lines.iter().map(|(line, parts)| (line.as_str(), 2, *parts)).collect();
    all_fail(&place, &all);
    let mut command = place.command();
    command.args(line("pr1607", "").split(' ').chain(["--from-env"])).env("RECUR_LAYERS", "3,x");
    Ran::of(&mut command).fails(2, &["recur_layers = 3,x", "environment variable RECUR_LAYERS"]);
}

#[test]
fn artifacts() {
    let place = trained();
    let whole = place.read("model.fairway");
    let bad = place.path("bad.fairway");
    let lines = [
        "eval bad.fairway --data data --device cpu",
        "sample bad.fairway --prompt a --device cpu",
        "inspect bad.fairway",
    ];
    let check = |bytes: &[u8], lines: &[&str]| {
        fs::write(&bad, bytes).unwrap();
        for line in lines {
            let ran = place.line(line);
            assert_eq!(ran.stdout, "", "{line}");
            ran.fails(2, &["bad.fairway"]);
        }
    };
    // Cut short anywhere, its end doubled, one bit wrong anywhere.
    for len in [0, 1, 6, 7, 8, 50, 95, whole.len() / 2, whole.len() - 1] {
        check(&whole[..len], &lines);
    }
    check(&[&whole[..], b"\0"].concat(), &lines);
    for i in 0..60 {
        let mut bytes = whole.clone();
        bytes[i * (whole.len() - 1) / 59] ^= 1 << (i % 8);
        check(&bytes, &lines[i % 3..=i % 3]);
    }
    check(&text(1, 3000).into_bytes(), &lines);
    fs::remove_file(&bad).unwrap();
    fs::create_dir(&bad).unwrap();
    for line in lines {
        place.line(line).fails(2, &["bad.fairway"]);
    }
    all_fail(
        &place,
        &[
            ("eval none.fairway --data data --device cpu", 2, &["none.fairway"]),
            ("sample none.fairway --prompt a --device cpu", 2, &["none.fairway"]),
            ("inspect none.fairway", 2, &["none.fairway"]),
            ("export model.fairway", 2, &["not a run", "model.fairway"]),
            ("export none", 2, &["not a run", "none"]),
        ],
    );
}

#[test]
fn runs() {
    let place = trained();
    fs::create_dir(place.path("empty")).unwrap();
    let lines = [
        "eval RUN --data data --device cpu",
        "sample RUN --prompt a --device cpu",
        "inspect RUN",
        "export RUN --out x",
    ];
    let check = |run: &str, parts: &[&str], lines: &[&str]| {
        for line in lines {
            all_fail(&place, &[(&line.replace("RUN", run), 2, parts)]);
        }
    };
    check("empty", &["empty/recipe.toml"], &lines);
    check("data", &["data/recipe.toml"], &lines);
    all_fail(
        &place,
        &[
            ("train --resume empty --device cpu", 2, &["empty/recipe.toml"]),
            ("train --resume none --device cpu", 2, &["none/recipe.toml"]),
            ("train --resume model.fairway --device cpu", 2, &["model.fairway"]),
            ("train tiny --resume empty --device cpu", 2, &["no whole checkpoint", "empty/checkpoint"]),
        ],
    );
    let files = ["recipe.toml", "tokenizer.json", "final.safetensors"];
    for name in files {
        let path = place.path("run").join(name);
        let whole = fs::read(&path).unwrap();
        let place_of = format!("run/{name}");
        let is_weights = name == "final.safetensors";
        let mut wrong: Vec<Vec<u8>> = vec![b"\xff\xfe\xfd".repeat(9)];
        if name != "recipe.toml" {
            wrong.extend([vec![], b"{}".to_vec(), b"[1]".to_vec(), whole[..whole.len() / 2].to_vec()]);
        }
        if is_weights {
            wrong.push([&whole[..], b"\0"].concat());
            // A bit in the length, in the header, and in the first and last tensor.
            for at in [0, 7, 9, 40, 200, whole.len() - 8000, whole.len() - 1] {
                let mut bytes = whole.clone();
                bytes[at] ^= 2;
                wrong.push(bytes);
            }
        }
        for bytes in wrong {
            fs::write(&path, bytes).unwrap();
            check("run", &[&place_of], &lines);
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        check("run", &[&place_of], &lines);
        fs::remove_dir(&path).unwrap();
        if is_weights {
            // Its checkpoint is there.
            place.line("eval run --data data --device cpu --json").json();
        } else {
            check("run", &[&place_of], &lines);
        }
        fs::write(&path, whole).unwrap();
    }
    // A recipe of another model than the weights are.
    let recipe = place.read_text("run/recipe.toml");
    fs::write(place.path("run/recipe.toml"), recipe.replace("model_dim = 16", "model_dim = 32")).unwrap();
    check("run", &["run/final.safetensors", "shape"], &lines);
    fs::write(place.path("run/recipe.toml"), recipe.replace("num_layers = 2", "num_layers = 3")).unwrap();
    check("run", &["run/final.safetensors", "blocks.2"], &lines);
    fs::write(place.path("run/recipe.toml"), recipe).unwrap();
    place.line("inspect run --json").json();
}

#[test]
fn texts_to_pack() {
    let place = Place::new();
    fs::write(place.path("ok.txt"), "words").unwrap();
    fs::write(place.path("bytes.txt"), b"\xff\xfe").unwrap();
    fs::write(place.path("broken.jsonl"), "{\"text\":\"a\"}\n{\"text\":\n").unwrap();
    fs::write(place.path("other.jsonl"), "{\"text\":\"a\"}\n{\"body\":\"b\"}\n").unwrap();
    fs::write(place.path("empty.jsonl"), "").unwrap();
    fs::create_dir(place.path("folder")).unwrap();
    let line = |file: &str| format!("data pack ok.txt {file} --tokenizer byte --out d");
    all_fail(
        &place,
        &[
            (&line("none.txt"), 2, &["none.txt"]),
            (&line("folder"), 2, &["folder"]),
            (&line("bytes.txt"), 2, &["bytes.txt", "UTF-8"]),
            (&line("broken.jsonl"), 2, &["broken.jsonl", "2"]),
            (&line("other.jsonl"), 2, &["other.jsonl", "2", "text"]),
            ("data pack empty.jsonl --tokenizer byte --out d", 2, &["no documents"]),
            ("data pack ok.txt --tokenizer byte --out ok.txt/d", 1, &["ok.txt/d"]),
            ("data demo --from folder --out d", 2, &["folder"]),
        ],
    );
    // Older shards stay as they are when a later attempt fails.
    place.line("data pack ok.txt --tokenizer byte --out d").clean();
    all_fail(&place, &[(&line("broken.jsonl"), 2, &["broken.jsonl"])]);
}

#[test]
fn devices() {
    let place = trained();
    let found = place.line("devices --json").json();
    let has_cuda = found["devices"]
        .as_array()
        .unwrap()
        .iter()
        .any(|row| row["backend"] == "cuda" && row["usable"] == true);
    let train = "train tiny --data data --steps 1 --out x";
    let mut cases: Vec<(String, &[&str])> = vec![
        (format!("{train} --device wgpu:99"), &["wgpu:99", "--device", "cpu"]),
        (format!("{train} --device cuda:99"), &["cuda:99", "--device", "cpu"]),
        (format!("{train} --device gpu"), &["unknown device `gpu`", "--device", "wgpu[:N]"]),
        (format!("{train} --device cpu:1"), &["cpu:1", "--device"]),
        (format!("{train} --device wgpu:-1"), &["wgpu:-1", "--device"]),
        (format!("{train} --device cuda:99999999999999999999"), &["--device"]),
        (format!("{train} --device cpu --precision bf16"), &["bf16", "--precision", "f32 or f64"]),
        (format!("{train} --device cpu --precision f16"), &["f16", "--precision"]),
        ("eval run --data data --device wgpu:99".into(), &["wgpu:99", "--device"]),
        ("sample model.fairway --prompt a --device wgpu:99".into(), &["wgpu:99", "--device"]),
        ("parity --fixtures . --device wgpu:99".into(), &["wgpu:99", "--device"]),
        ("demo --device wgpu:99 --out x".into(), &["wgpu:99", "--device"]),
    ];
    if !has_cuda {
        cases.push((format!("{train} --device cuda"), &["no device cuda", "--device", "cpu"]));
        cases.push((format!("{train} --device auto --precision bf16"), &["bf16", "--precision"]));
    }
    for (line, parts) in &cases {
        all_fail(&place, &[(line.as_str(), 2, parts)]);
    }
}

/// Runs the program where no file can grow beyond so many KiB: what a full disk looks like to it.
#[cfg(unix)]
fn with_little_space<S: AsRef<str>>(place: &Place, kib: u32, args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = Command::new("bash");
    place.quieten(&mut command);
    // Without the trap the system would end the program instead of refusing to write.
    let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$@\"");
    command.args(["-c", &script, "bash", env!("CARGO_BIN_EXE_fairway")]);
    command.args(args.into_iter().map(|arg| arg.as_ref().to_string()));
    Ran::of(&mut command)
}

#[cfg(unix)]
#[test]
fn no_space_while_saving_leaves_the_older_files() {
    let place = trained();
    let before = listing(&place);
    // The small model's weights have 33 kB, a checkpoint 90 kB.
    for (kib, file) in [(20, "run/final.safetensors"), (60, "run/checkpoint/step_00000003.safetensors")] {
        let ran = with_little_space(&place, kib, place.small("run", "--steps 3 --set seed=5"));
        ran.fails(1, &["cannot write", file, "enough space"]);
        let after = listing(&place);
        assert!(after.keys().all(|path| before.contains_key(path)), "litter: {:?}", after.keys());
        let name = if kib == 20 { "final.safetensors" } else { "checkpoint/step_00000002.safetensors" };
        assert!(
            kib != 20
                || after[&place.path(".").join("run").join(name)]
                    == before[&place.path(".").join("run").join(name)]
        );
        place.line("eval run --data data --device cpu --json").json();
    }
    // A checkpoint in the middle of a run, and nothing else yet.
    let ran = with_little_space(&place, 60, place.small("new", "--steps 9 --save-every 3"));
    ran.fails(1, &["cannot write", "new/checkpoint/step_00000003.safetensors"]);
    assert_eq!(place.names("new/checkpoint"), [""; 0]);
    assert!(!place.path("new/final.safetensors").exists());

    let artifact = place.read("model.fairway");
    let export = ["export", "run", "--out", "model.fairway"];
    with_little_space(&place, 4, export).fails(1, &["cannot write", "model.fairway"]);
    assert!(place.read("model.fairway") == artifact);
    let shards = place.snapshot("data");
    let pack = "data pack data-0.txt data-1.txt data-2.txt --tokenizer byte --out data --val-docs 1";
    with_little_space(&place, 4, pack.split(' ')).fails(1, &["cannot write", "data"]);
    assert!(place.snapshot("data") == shards);
    assert!(listing(&place).keys().all(|path| !path.to_string_lossy().contains("partial")));
}

#[test]
fn places_that_cannot_be_written() {
    let place = trained();
    fs::create_dir(place.path("folder")).unwrap();
    let train = |out: &str| place.small(out, "--steps 1").join(" ");
    all_fail(
        &place,
        &[
            (&train("data-0.txt"), 1, &["cannot write", "data-0.txt"]),
            (&train("data-0.txt/run"), 1, &["cannot write", "data-0.txt/run"]),
            ("export run --out folder", 1, &["cannot write", "folder"]),
            ("export run --out data-0.txt/model.fairway", 1, &["cannot write", "data-0.txt/model.fairway"]),
            ("data pack data-0.txt --tokenizer byte --out data-1.txt", 1, &["data-1.txt"]),
        ],
    );
    // Shards of somebody else are not replaced.
    fs::remove_file(place.path("data/fairway_data.json")).unwrap();
    all_fail(&place, &[("data pack data-0.txt --tokenizer byte --out data", 2, &["data", "a new folder"])]);
}

#[test]
fn the_small_recipe_is_what_the_cases_build_on() {
    // Were the tests' own recipe refused, every case above would fail for the wrong reason.
    let place = Place::with_data();
    place.train("run", "--steps 1").clean();
    assert!(SMALL.iter().all(|set| set.contains('=')));
}
