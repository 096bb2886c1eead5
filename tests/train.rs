//! `fairway train`: what a run leaves and says, which settings win, and that the same run gives the same weights.

mod cli_common;

use cli_common::{Place, Ran, Running, SMALL, SMALL_PARAMS, check_xml, keys, number, tensors};
use fairway::recipe::Recipe;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Whether `line` is `pattern`, where `{2}` stands for a number with two decimals.
fn fits(line: &str, pattern: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('{') else { return line == pattern };
    let (decimals, rest) = rest.split_once('}').unwrap();
    let Some(line) = line.strip_prefix(start) else { return false };
    let end = line.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(line.len());
    let found = line[..end].split_once('.').map_or(0, |(_, after)| after.len());
    end > 0 && found == decimals.parse::<usize>().unwrap() && fits(&line[end..], rest)
}

/// The recipe that [`Place::train`] trains, before the flags.
fn small() -> Recipe {
    let mut recipe = Recipe::load("tiny").unwrap();
    SMALL.iter().for_each(|set| recipe.set(set).unwrap());
    recipe
}

#[test]
fn a_run_leaves_its_files_and_logs_in_the_challenges_words() {
    let place = Place::with_data();
    let ran = place.train("run", "--steps 12").clean();
    let files = [
        "checkpoint",
        "curve.svg",
        "final.safetensors",
        "metrics.jsonl",
        "recipe.toml",
        "tokenizer.json",
        "train.log",
    ];
    assert_eq!(place.names("run"), files);
    assert_eq!(place.names("run/checkpoint"), ["step_00000012.safetensors"]);

    // Not a terminal: plain lines, the same as in the file.
    assert!(!ran.stdout.contains(['\r', '\x1b']), "{ran:?}");
    let log = place.read_text("run/train.log");
    let rest = ran.stdout.strip_prefix(&log).expect("stdout begins with the log");
    let mut rest = rest.lines();
    assert_eq!(rest.next(), Some("run: run"));
    assert!(fits(rest.next().unwrap(), "tokens_per_s:{0} step_ms:{2}"), "{ran:?}");

    let recipe = Recipe { iterations: 12, ..small() };
    let log = log.strip_prefix(&recipe.to_toml()).expect("the resolved recipe comes first");
    let val = fairway::data::shard::Shard::open(&place.path("data/fineweb_val_000000.bin")).unwrap();
    let targets = (val.tokens().len() - 1) / 16 * 16;
    let expected = [
        "val_bpb:enabled tokenizer_kind=byte tokenizer_path=byte",
        "train_loader:dataset:data train_shards:1",
        &format!("val_loader:shards pattern=data/fineweb_val_*.bin tokens:{targets}"),
        "model_params:7892",
        "world_size:1 grad_accum_steps:1",
        "attention_mode:gqa num_heads:2 num_kv_heads:1",
        "tie_embeddings:True embed_lr:0.05 head_lr:0.0 matrix_lr:0.04 scalar_lr:0.04",
        "train_batch_tokens:64 train_seq_len:16 iterations:12 warmup_steps:0 max_wallclock_seconds:0.000",
        "seed:1337",
        "step:0/12 val_loss:{4} val_bpb:{4} train_time:0ms step_avg:0.00ms",
    ];
    let mut lines = log.lines();
    assert!(lines.next().unwrap().starts_with("device: cpu "), "{log}");
    let trained = |step| format!("step:{step}/12 train_loss:{{4}} train_time:{{0}}ms step_avg:{{2}}ms");
    let validated =
        |step| format!("step:{step}/12 val_loss:{{4}} val_bpb:{{4}} train_time:{{0}}ms step_avg:{{2}}ms");
    let steps = (1..=10).flat_map(|step| [Some(trained(step)), (step % 5 == 0).then(|| validated(step))]);
    let last = [validated(12), "peak memory allocated: {0} MiB reserved: {0} MiB".to_string()];
    let expected = expected.into_iter().map(String::from).chain(steps.flatten()).chain(last);
    for pattern in expected {
        let line = lines.next().unwrap_or_default();
        assert!(fits(line, &pattern), "{line:?} is not {pattern:?}");
    }
    assert_eq!(lines.next(), None);

    let rows = place.metrics("run");
    let steps: Vec<u64> = rows.iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]);
    for row in &rows {
        let step = row["step"].as_u64().unwrap();
        let mut wanted = vec!["lr_mul", "step", "step_ms", "tokens_per_s", "train_loss"];
        if [0, 5, 10, 12].contains(&step) {
            wanted.extend(["val_bpb", "val_loss"]);
            // As many bytes as tokens: the validation text has one BOS, at its start.
            let bpb = number(row, "val_loss") / std::f64::consts::LN_2;
            assert!((number(row, "val_bpb") - bpb).abs() < 1e-9, "{row}");
        }
        assert_eq!(keys(row), wanted);
        if step > 0 {
            // All 12 steps are within the warm-down of 100.
            assert!((number(row, "lr_mul") - (13 - step) as f64 / 100.0).abs() < 1e-12, "{row}");
            assert!(number(row, "step_ms") > 0.0 && number(row, "tokens_per_s") > 0.0, "{row}");
        }
    }
    let [first, last] = [&rows[1], &rows[11]].map(|row| number(row, "train_loss"));
    assert!((first - 260f64.ln()).abs() < 0.05 && last < first - 0.3, "{first} to {last}");

    let curve = place.read_text("run/curve.svg");
    check_xml(&curve);
    for label in ["<svg", "train loss", "validation bits per byte"] {
        assert!(curve.contains(label), "no {label:?} in the curve");
    }
    assert!(curve.matches("<polyline").count() >= 2, "two series");

    assert_eq!(Recipe::load(place.path("run/recipe.toml").to_str().unwrap()).unwrap(), recipe);

    let found = tensors(&place.path("run/final.safetensors"));
    let mut wanted = fairway::model::layout(&recipe).unwrap();
    wanted.sort();
    assert_eq!(
        found.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect::<Vec<_>>(),
        wanted
    );
    assert_eq!(found.values().map(|(_, values)| values.len() as u64).sum::<u64>(), SMALL_PARAMS);
}

#[test]
fn json_is_one_object_with_the_listed_keys() {
    let place = Place::with_data();
    let report = place.train("run", "--steps 7 --json").json();
    let keys_wanted = [
        "first_step_s",
        "out",
        "peak_memory_bytes",
        "step_ms",
        "steps",
        "tokens_per_s",
        "train_loss",
        "val_bpb",
        "val_loss",
    ];
    assert_eq!(keys(&report), keys_wanted);
    assert_eq!((report["steps"].as_u64(), report["out"].as_str()), (Some(7), Some("run")));
    let rows = place.metrics("run");
    for key in ["train_loss", "val_loss", "val_bpb"] {
        assert_eq!(report[key], rows.last().unwrap()[key], "{key}");
    }
    for key in ["tokens_per_s", "step_ms", "first_step_s", "peak_memory_bytes"] {
        assert!(number(&report, key) > 0.0, "{key}");
    }
    // 64 tokens a step.
    let product = number(&report, "tokens_per_s") * number(&report, "step_ms");
    assert!((product / 64_000.0 - 1.0).abs() < 1e-6, "{product}");
    assert!(
        place.read_text("run/train.log").contains("step:7/7 val_loss:"),
        "the log is written all the same"
    );
}

#[test]
fn zero_steps_write_the_initial_model() {
    let place = Place::with_data();
    let report = place.train("run", "--steps 0 --json").json();
    assert_eq!(report["steps"].as_u64(), Some(0));
    for key in ["train_loss", "tokens_per_s", "step_ms", "first_step_s"] {
        assert!(report[key].is_null(), "{key}: {report}");
    }
    // Nearly uniform over 260 ids.
    assert!((number(&report, "val_loss") - 260f64.ln()).abs() < 0.02, "{report}");
    let found = tensors(&place.path("run/final.safetensors"));
    let all = |name: &str, value: f32| assert!(found[name].1.iter().all(|v| *v == value), "{name}");
    all("skip_weights", 1.0);
    for block in ["blocks.0", "blocks.1"] {
        for (name, value) in
            [("attn_scale", 1.0), ("mlp_scale", 1.0), ("attn.proj.weight", 0.0), ("mlp.proj.weight", 0.0)]
        {
            all(&format!("{block}.{name}"), value);
        }
        all(&format!("{block}.attn.q_gain"), 1.5);
        assert_eq!(found[&format!("{block}.resid_mix")].1, [[1.0; 16], [0.0; 16]].concat());
    }
    let embedding = &found["tok_emb.weight"].1;
    let square: f32 = embedding.iter().map(|v| v * v).sum();
    let deviation = (square / embedding.len() as f32).sqrt();
    assert!((deviation - 0.005).abs() < 0.0003, "{deviation}");
    check_xml(&place.read_text("run/curve.svg"));
    assert_eq!(place.names("run/checkpoint"), ["step_00000000.safetensors"]);
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_recipe() {
    let place = Place::with_data();
    let recipe = Recipe { iterations: 9, seed: 3, matrix_lr: 0.01, scalar_lr: 0.02, ..small() };
    fs::write(place.path("mine.toml"), recipe.to_toml()).unwrap();
    let lines = "# a run\nexport ITERATIONS=5 SEED=4\nMATRIX_LR='0.03'  # faster\nRANK=0\nRUN_ID=x\n";
    fs::write(place.path("run.env"), lines).unwrap();
    let resolved = |out: &str| Recipe::load(place.path(out).join("recipe.toml").to_str().unwrap()).unwrap();

    let base = "train mine.toml --data data --device cpu --tokenizer byte";
    place.line(&format!("{base} --steps 2 --out a")).clean();
    assert_eq!(resolved("a"), Recipe { iterations: 2, ..recipe.clone() });

    let ran = place.line(&format!("{base} --from-env run.env --out b")).ok();
    assert_eq!(resolved("b"), Recipe { iterations: 5, seed: 4, matrix_lr: 0.03, ..recipe.clone() });
    // Known names without effect here are warnings.
    let warned: Vec<_> = ran.stderr.lines().collect();
    assert!(warned.len() == 2 && warned[0].contains("RANK") && warned[1].contains("RUN_ID"), "{ran:?}");
    assert!(place.read_text("b/train.log").contains("iterations:5 "));

    let more = "--from-env run.env --set seed=6 --set matrix_lr=0.05 --steps 1";
    place.line(&format!("{base} {more} --out c")).ok();
    assert_eq!(resolved("c"), Recipe { iterations: 1, seed: 6, matrix_lr: 0.05, ..recipe.clone() });
    place.line(&format!("{base} {more} --seed 8 --out d")).ok();
    assert_eq!(resolved("d").seed, 8);

    // Without FILE the names that are set, DATA_PATH and TOKENIZER_PATH among them; unknown ones are the user's own.
    let mut command = place.command();
    command.args("train mine.toml --device cpu --from-env --json --out e".split(' '));
    let names = [
        ("ITERATIONS", "3"),
        ("SEED", "11"),
        ("DATA_PATH", "data"),
        ("TOKENIZER_PATH", "byte"),
        ("ITERATION", "x"),
    ];
    let report = Ran::of(command.envs(names)).json();
    assert_eq!(report["steps"].as_u64(), Some(3));
    assert_eq!(resolved("e"), Recipe { iterations: 3, seed: 11, ..recipe.clone() });
    // Without --from-env they mean nothing.
    let mut command = place.command();
    let ran = Ran::of(command.args(format!("{base} --out f").split(' ')).envs([("ITERATIONS", "3")]));
    ran.clean();
    assert_eq!(resolved("f"), recipe);
}

#[test]
fn warm_up_leaves_the_weights_that_a_run_without_it_has() {
    let place = Place::with_data();
    place.train("cold", "--steps 4").clean();
    let warm = place.train("warm", "--steps 4 --set warmup_steps=3").clean();
    for step in 1..=3 {
        assert!(warm.stdout.contains(&format!("\nwarmup_step:{step}/3\n")), "{warm:?}");
    }
    assert_eq!(place.read("cold/final.safetensors"), place.read("warm/final.safetensors"));
    // Nothing to be warm for.
    let none = place.train("none", "--steps 0 --set warmup_steps=3").clean();
    assert!(!none.stdout.contains("warmup_step:"), "{none:?}");
}

#[test]
fn a_micro_batch_changes_nothing_but_the_order_of_sums() {
    let place = Place::with_data();
    // 40 tokens hold two sequences of 16.
    let runs = [("whole", ""), ("parts", "--micro-batch 40"), ("single", "--micro-batch 16")];
    let losses = runs.map(|(out, more)| {
        let report = place.train(out, &format!("--steps 3 --json {more}")).json();
        let first = number(&place.metrics(out)[1], "train_loss");
        [first, number(&report, "train_loss"), number(&report, "val_loss")]
    });
    for other in &losses[1..] {
        assert!((other[0] - losses[0][0]).abs() < 1e-6, "{losses:?}");
        assert!(
            (other[1] - losses[0][1]).abs() < 1e-3 && (other[2] - losses[0][2]).abs() < 1e-3,
            "{losses:?}"
        );
    }
    // Several spans a step, each followed by a skipped input: other data, the same kind of result.
    let report = place.train("spans", "--steps 3 --set grad_accum_steps=2 --json").json();
    assert!((number(&report, "train_loss") - losses[0][1]).abs() < 0.3, "{report}");
}

#[test]
fn the_wallclock_schedule_warms_down_and_stops_at_the_cap() {
    let place = Place::with_data();
    let more = "--set iterations=1000000 --set max_wallclock_seconds=0.7 --set warmdown_iters=4 --set val_loss_every=0";
    let ran = place.train("run", &format!("{more} --set name=<b>&\"x\"")).clean();
    check_xml(&place.read_text("run/curve.svg"));
    let log = place.read_text("run/train.log");
    let stop = log.lines().find(|line| line.starts_with("stopping_early: ")).unwrap();
    assert!(fits(stop, "stopping_early: wallclock_cap train_time:{0}ms step:{0}/1000000"), "{stop}");
    let ms = ran.number("train_time");
    assert!((700.0..3000.0).contains(&ms), "{ms}");
    let rows = place.metrics("run");
    let last = rows.last().unwrap();
    assert!(number(last, "val_loss") > 0.0 && number(last, "step") < 1e5, "{last}");
    assert_eq!(number(&rows[0], "lr_mul"), 1.0);
    assert!(number(last, "lr_mul") < 0.7, "{last}");
    assert!(place.path("run/final.safetensors").exists());
}

#[test]
fn the_seed_decides_the_weights() {
    let place = Place::with_data();
    place.train("a", "--steps 3 --seed 5").clean();
    place.train("b", "--steps 3 --set seed=5").clean();
    place.train("c", "--steps 3 --seed 6").clean();
    let [a, b, c] = ["a", "b", "c"].map(|run| place.read(Path::new(run).join("final.safetensors")));
    assert!(a == b, "the same seed gives the same file");
    assert!(a != c, "another seed gives another");
}

#[test]
fn without_out_runs_are_numbered() {
    let place = Place::with_data();
    let mut args = place.small("x", "--steps 0 --json");
    let at = args.iter().position(|arg| arg == "--out").unwrap();
    args.drain(at..at + 2);
    assert_eq!(place.run(&args).json()["out"].as_str(), Some("runs/tiny-1"));
    assert_eq!(place.run(&args).json()["out"].as_str(), Some("runs/tiny-2"));
}

/// The training losses of a run's metrics by step, to the last bit.
fn losses(place: &Place, out: &str) -> Vec<(u64, String)> {
    let rows = place.metrics(out);
    rows.iter().map(|row| (row["step"].as_u64().unwrap(), row["train_loss"].to_string())).collect()
}

const LONG: &str = "--steps 150 --set val_loss_every=50 --set train_log_every=1";

#[cfg(unix)]
#[test]
fn interrupted_and_resumed_is_the_uninterrupted_run_to_the_last_bit() {
    let place = Place::with_data();
    place.train("whole", LONG).clean();

    let mut running = Running::start(place.command().args(place.small("cut", LONG)));
    running.wait_for("step:20/");
    // Two signals at once are one: `timeout` sends them so.
    running.interrupt(2);
    let ran = running.finish();
    let error = ran.fails(130, &["error: interrupted, step ", " saved in cut/checkpoint/step_000000"]);
    let step: usize = error.split("step ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((20..150).contains(&step), "{error}");
    assert_eq!(place.names("cut/checkpoint"), [format!("step_{step:08}.safetensors")]);
    assert!(!place.path("cut/final.safetensors").exists());
    check_xml(&place.read_text("cut/curve.svg"));

    // Recipe, data and tokenizer are the run's own.
    let ran = place.line("train --resume cut --device cpu --json");
    let report = ran.json();
    assert_eq!((report["steps"].as_u64(), report["out"].as_str()), (Some(150), Some("cut")));
    assert!(place.read("whole/final.safetensors") == place.read("cut/final.safetensors"), "the same weights");
    assert_eq!(losses(&place, "whole"), losses(&place, "cut"));
    let log = place.read_text("cut/train.log");
    assert!(log.contains(&format!("\nresumed at step:{step} train_time:")), "{log}");
    assert_eq!(log.matches("\nstep:10/150 train_loss:").count(), 1);
}

#[test]
fn checkpoints_go_on_too_and_a_broken_one_is_passed_over() {
    let place = Place::with_data();
    let more = "--steps 10 --save-every 3";
    place.train("whole", more).clean();
    assert_eq!(place.names("whole/checkpoint"), ["step_00000009.safetensors", "step_00000010.safetensors"]);
    let last = place.read("whole/final.safetensors");

    // As if the run had been killed after step 10, and the disk had lost a bit of what it saved last.
    let newest = place.path("whole/checkpoint/step_00000010.safetensors");
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&newest, &bytes).unwrap();
    fs::remove_file(place.path("whole/final.safetensors")).unwrap();

    // Scoring falls back as well; the warning is not on stdout.
    let ran = place.line("eval whole --data data --device cpu --json").ok();
    assert!(
        ran.stderr
            .starts_with("warning: its content does not match its SHA-256, whole/checkpoint/step_00000010")
    );
    ran.json();

    let elsewhere = place.snapshot("whole");
    let ran = place.line("train --resume whole --out copy --device cpu --json").ok();
    assert!(ran.stderr.contains("warning: ") && ran.stderr.contains("step_00000010.safetensors"), "{ran:?}");
    assert_eq!(ran.json()["steps"].as_u64(), Some(10));
    assert!(place.read("copy/final.safetensors") == last, "the same weights, in another folder");
    assert!(place.snapshot("whole") == elsewhere, "the resumed folder is only read");
    let log = place.read_text("copy/train.log");
    assert!(log.contains("resumed at step:9 ") && log.contains("\nwarning: its content"), "{log}");

    place.line("train --resume whole --device cpu").ok();
    assert!(place.read("whole/final.safetensors") == last, "the same weights, in place");
    assert_eq!(place.names("whole/checkpoint"), ["step_00000009.safetensors", "step_00000010.safetensors"]);
    place.line("train --resume whole --device cpu").clean();

    // Cut short, empty, and not a file: each is passed over until none is left.
    fs::remove_file(place.path("whole/final.safetensors")).unwrap();
    fs::write(&newest, &bytes[..middle]).unwrap();
    let older = place.path("whole/checkpoint/step_00000009.safetensors");
    fs::write(&older, b"").unwrap();
    fs::create_dir(place.path("whole/checkpoint/step_00000011.safetensors")).unwrap();
    let ran = place.line("train --resume whole --device cpu");
    ran.fails(2, &["no whole checkpoint", "whole/checkpoint"]);
    let ran = place.line("eval whole --data data --device cpu");
    assert_eq!(ran.stderr.matches("warning: ").count(), 3, "{ran:?}");
    ran.fails(2, &["no whole checkpoint"]);
}

#[test]
fn a_finished_run_can_go_on() {
    let place = Place::with_data();
    place.train("run", "--steps 6").clean();
    let report = place.line("train --resume run --device cpu --steps 9 --json").json();
    assert_eq!(report["steps"].as_u64(), Some(9));
    assert_eq!(place.metrics("run").last().unwrap()["step"].as_u64(), Some(9));
    assert_eq!(place.names("run/checkpoint"), ["step_00000006.safetensors", "step_00000009.safetensors"]);
    let ran = place.line("train --resume run --device cpu --steps 4");
    ran.fails(2, &["iterations", "step 9"]);
}

#[test]
fn resuming_with_what_would_change_the_past_is_refused() {
    let place = Place::with_data();
    place.train("run", "--steps 3").clean();
    let before = place.snapshot("run");
    for (set, key) in [
        ("--set model_dim=32", "model_dim"),
        ("--seed 9", "seed"),
        ("--set matrix_lr=0.01", "matrix_lr"),
        ("--set train_batch_tokens=128", "train_batch_tokens"),
    ] {
        let ran = place.line(&format!("train --resume run --device cpu --steps 6 {set}"));
        ran.fails(2, &[&format!("{key} differs from the resumed run's"), &format!("recipe key {key}")]);
    }
    place.pack("other", "byte", 6);
    let ran = place.line("train --resume run --device cpu --steps 6 --data other");
    ran.fails(2, &["--data", "differ from the resumed run's"]);
    let ran = place.line("train tiny --resume run --device cpu");
    ran.fails(2, &["differs from the resumed run's"]);
    assert!(place.snapshot("run") == before, "nothing was touched");
    // The same shards elsewhere are the same data.
    fs::rename(place.path("data"), place.path("moved")).unwrap();
    let ran = place.line("train --resume run --device cpu --steps 4");
    ran.fails(2, &["data", "a folder of token shards"]);
    place.line("train --resume run --device cpu --steps 4 --data moved").clean();
}

#[cfg(unix)]
#[test]
fn a_second_interrupt_exits_at_once() {
    let place = Place::with_data();
    // A step of a million tokens takes many seconds.
    let sets = "--set train_batch_tokens=1048576 --micro-batch 4096 --set val_loss_every=0 --steps 2";
    let words = format!("train tiny --data data --device cpu --out run {sets}");
    let mut running = Running::start(place.command().args(words.split(' ')));
    running.wait_for("seed:");
    std::thread::sleep(Duration::from_millis(200));
    running.interrupt(1);
    std::thread::sleep(Duration::from_millis(200));
    let second = Instant::now();
    running.interrupt(1);
    let ran = running.finish();
    assert!(second.elapsed() < Duration::from_secs(2), "{:?}", second.elapsed());
    assert!(ran.stderr.starts_with("warning: interrupted"), "{ran:?}");
    ran.fails(130, &["error: interrupted"]);
    assert!(!place.path("run/checkpoint").exists() && !place.path("run/final.safetensors").exists());
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint() {
    let place = Place::with_data();
    // 24 residual mixes of about 100 overflow float32.
    let more = "--set num_layers=24 --set scalar_lr=100 --set warmdown_iters=0 --set val_loss_every=0";
    let ran = place.train("run", &format!("{more} --save-every 1 --steps 20"));
    ran.fails(1, &["training loss is NaN", "step 2"]);
    assert_eq!(place.names("run/checkpoint"), ["step_00000001.safetensors"]);
    assert!(!place.path("run/final.safetensors").exists());
    let saved = tensors(&place.path("run/checkpoint/step_00000001.safetensors"));
    assert!(saved.values().flat_map(|(_, values)| values).all(|value| value.is_finite()));

    // Found by the validation after the last step, it stops the run just as well.
    let ran = place.train("last", &format!("{more} --steps 1 --json"));
    assert_eq!(ran.stdout, "");
    ran.fails(1, &["validation loss is NaN", "step 1"]);
    assert!(!place.path("last/final.safetensors").exists());
}

#[test]
fn a_new_run_takes_an_older_ones_place_when_its_weights_are_whole() {
    let place = Place::with_data();
    place.train("run", "--steps 12 --save-every 6").clean();
    let before = place.snapshot("run");
    // Refused, or stopped before it has saved anything: the older run is as it was.
    place.train("run", "--steps 4 --set model_dim=15").fails(2, &["model_dim"]);
    assert!(place.snapshot("run") == before);
    place
        .train("run", "--set num_layers=24 --set scalar_lr=100 --set warmdown_iters=0 --steps 5")
        .fails(1, &["NaN"]);
    let after = place.snapshot("run");
    for name in ["final.safetensors", "recipe.toml", "tokenizer.json", "checkpoint/step_00000012.safetensors"]
    {
        let path = place.path("run").join(name);
        assert!(before[&path] == after[&path], "{name}");
    }
    // Finished: nothing of the older one is left, though its steps were more.
    place.train("run", "--steps 4 --set model_dim=32").clean();
    assert_eq!(place.names("run/checkpoint"), ["step_00000004.safetensors"]);
    assert_eq!(place.metrics("run").last().unwrap()["step"].as_u64(), Some(4));
    let report = place.line("inspect run --json").json();
    assert_eq!(report["recipe"]["model_dim"].as_u64(), Some(32));
    place.line("eval run --data data --device cpu --json").json();
}

/// What the hybrids' recipes need to train in milliseconds: each with all of its parts, the recurrence from the middle on.
const HYBRIDS: [(&str, &str); 3] = [
    (
        "pr1994",
        "num_unique_layers=2 num_loops=2 parallel_layer_positions=0,1 mamba2_headdim=16 mamba2_d_state=8 \
         lr_warmup_steps=3 mlp_mult=2 ema_beta=0.9",
    ),
    (
        "pr1607",
        "num_layers=4 mamba3_headdim=16 mamba3_d_state=8 mamba3_chunk_size=8 bigram_buckets=64 bigram_hash_dim=8 \
         recur_layers=1,2 recur_start_frac=0.5 mlp_mult=2 ema_decay=0.9",
    ),
    (
        "pr1382",
        "num_layers=4 mamba_layers=0,3 mamba_d_state=4 bigram_vocab_size=64 bigram_dim=8 rope_dims=8 mlp_mult=2 \
         ema_decay=0.9 as_written=true muon_shards=2",
    ),
];

/// The words that train a hybrid's small recipe on `data` into `out`, and then `more`.
fn hybrid(recipe: &str, own: &str, out: &str, more: &str) -> Vec<String> {
    let common = "vocab_size=260 model_dim=32 num_heads=2 num_kv_heads=1 train_seq_len=16 train_batch_tokens=64 \
                  val_batch_size=64 grad_accum_steps=1 warmup_steps=0 max_wallclock_seconds=0 warmdown_iters=30 \
                  val_loss_every=20 train_log_every=1";
    let sets = common.split_whitespace().chain(own.split_whitespace()).flat_map(|set| ["--set", set]);
    let words = ["train", recipe, "--data", "data", "--tokenizer", "byte", "--device", "cpu", "--out", out];
    words.into_iter().chain(sets).chain(more.split_whitespace()).map(String::from).collect()
}

#[cfg(unix)]
#[test]
fn a_hybrid_interrupted_and_resumed_is_the_uninterrupted_run_to_the_last_bit() {
    let place = Place::with_data();
    for (recipe, own) in HYBRIDS {
        let [whole, cut] = ["whole", "cut"].map(|name| format!("{recipe}-{name}"));
        place.run(hybrid(recipe, own, &whole, "--steps 60")).clean();
        let mut running = Running::start(place.command().args(hybrid(recipe, own, &cut, "--steps 60")));
        running.wait_for("step:10/");
        running.interrupt(1);
        running.finish().fails(130, &["error: interrupted, step "]);
        assert!(!place.path(&cut).join("final.safetensors").exists());
        place.line(&format!("train --resume {cut} --device cpu")).clean();
        assert_eq!(losses(&place, &whole), losses(&place, &cut), "{recipe}");
        // Weights, averages, momenta and moments.
        let different = |file: &str| -> Vec<String> {
            let [a, b] = [&whole, &cut].map(|run| tensors(&place.path(run).join(file)));
            assert!(a.keys().eq(b.keys()), "{recipe}: the same tensors in {file}");
            a.iter().filter(|(name, tensor)| b[*name] != **tensor).map(|(name, _)| name.clone()).collect()
        };
        let state = "checkpoint/step_00000060.safetensors";
        for file in [state, "final.safetensors"] {
            assert_eq!(different(file), [""; 0], "{recipe}: {file}");
        }
        let a = tensors(&place.path(&whole).join(state));
        let count = |prefix: &str| a.keys().filter(|name| name.starts_with(prefix)).count();
        assert!(count("average.0.") > 10 && count("muon.momentum.") > 5 && count("adam.v.") > 5, "{recipe}");
        assert_eq!(count("muon.momentum2.") > 0, recipe == "pr1382", "two updates on two ranks");
    }
}

#[test]
fn a_hybrid_ends_with_its_averaged_weights_which_its_artifact_keeps() {
    let bf16 = |value: f32| half::bf16::from_f32(value).to_f32();
    let place = Place::with_data();
    for (recipe, own) in HYBRIDS {
        let report = place.run(hybrid(recipe, own, recipe, "--steps 40 --json")).json();
        let first = number(&place.metrics(recipe)[1], "train_loss");
        assert!(number(&report, "train_loss") < first - 0.5, "{recipe} learns: {first}, then {report}");
        let last = tensors(&place.path(recipe).join("final.safetensors"));
        let saved = tensors(&place.path(recipe).join("checkpoint/step_00000040.safetensors"));
        let mut compared = 0;
        for (name, (_, values)) in &last {
            let Some((_, average)) = saved.get(&format!("average.0.{name}")) else { continue };
            let same = |rounded: bool| {
                values.iter().zip(average).all(|(v, a)| *v == if rounded { bf16(*a) } else { *a })
            };
            assert!(same(false) || same(true), "{name} of {recipe} is its average");
            compared += 1;
        }
        assert!(compared > 10 && saved["tok_emb.weight"].1 != last["tok_emb.weight"].1, "{recipe}");

        // The last validation is of those weights; scoring, from the run or from its artifact, finds the same.
        let scored = place.line(&format!("eval {recipe} --data data --device cpu --json")).json();
        assert!(
            (number(&scored, "val_loss") - number(&report, "val_loss")).abs() < 1e-6,
            "{recipe}: {scored}"
        );
        let artifact = format!("{recipe}.fairway");
        place.line(&format!("export {recipe} --quant fp16 --out {artifact} --json")).json();
        let packed = place.line(&format!("eval {artifact} --data data --device cpu --json")).json();
        let moved = number(&packed, "val_loss") - number(&scored, "val_loss");
        // Ternary codes may flip where a weight is rounded to fp16.
        assert!(moved.abs() < 5e-3, "{recipe}: {moved}");
        for what in [recipe, &artifact] {
            let inspected = place.line(&format!("inspect {what} --json")).json();
            assert_eq!(inspected["params"].as_u64(), Some(last.values().map(|(_, v)| v.len() as u64).sum()));
        }
        place.line(&format!("sample {artifact} --prompt the --tokens 20 --device cpu --json")).json();
    }
    // The recurrence that began in the middle is on in the artifact, and off in that of a run which never reached it.
    let log = place.read_text("pr1607/train.log");
    assert!(
        log.contains("depth_recurrence:enabled at step 20 frac=0.50 schedule=[0, 1, 2, 1, 2, 1, 2, 3]"),
        "{log}"
    );
    let starts = |what: &str| {
        number(&place.line(&format!("inspect {what} --json")).json()["recipe"], "recur_start_frac")
    };
    assert_eq!(starts("pr1607.fairway"), 0.0);
    let (recipe, own) = HYBRIDS[1];
    place.run(hybrid(recipe, &format!("{own} recur_start_frac=1"), "never", "--steps 3")).clean();
    place.line("export never --quant fp16 --out never.fairway --json").json();
    assert_eq!(starts("never.fairway"), 1.0);
}
