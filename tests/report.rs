//! What a run leaves: the challenge's log lines, `metrics.jsonl`, `curve.svg`.

use fairway::recipe::Recipe;
use fairway::report::curve::{Point, draw};
use fairway::train::log::{Metric, Metrics, RunLog, lines, logs_step, to_nowhere};
use std::path::Path;
use std::sync::{Arc, Mutex};

#[test]
fn the_lines_are_the_challenges() {
    let recipe = Recipe::default();
    assert_eq!(
        lines::header(&recipe, fairway::model::param_count(&recipe).unwrap(), 1),
        [
            "model_params:17059912",
            "world_size:1 grad_accum_steps:8",
            "attention_mode:gqa num_heads:8 num_kv_heads:4",
            "tie_embeddings:True embed_lr:0.05 head_lr:0.0 matrix_lr:0.04 scalar_lr:0.04",
            "train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000",
            "seed:1337",
        ]
    );
    let untied = Recipe { tie_embeddings: false, matrix_lr: 1e-5, ..recipe };
    assert_eq!(
        lines::header(&untied, 1, 1)[3],
        "tie_embeddings:False embed_lr:0.6 head_lr:0.008 matrix_lr:1e-05 scalar_lr:0.04"
    );
    assert_eq!(
        lines::val_bpb_enabled("sentencepiece", Path::new("./t/fineweb_1024_bpe.model")),
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./t/fineweb_1024_bpe.model"
    );
    assert_eq!(
        lines::train_loader(Path::new("./data/datasets/fineweb10B_sp1024/"), 80),
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80"
    );
    assert_eq!(
        lines::val_loader(Path::new("./d/fineweb_val_*.bin"), 62_021_632),
        "val_loader:shards pattern=./d/fineweb_val_*.bin tokens:62021632"
    );
    assert_eq!(lines::warmup_step(1, 20), "warmup_step:1/20");
    assert_eq!(
        lines::validated(0, 20_000, 6.93698, 4.09778, 0.0),
        "step:0/20000 val_loss:6.9370 val_bpb:4.0978 train_time:0ms step_avg:0.00ms"
    );
    assert_eq!(
        lines::validated(13_780, 20_000, 2.0606, 1.2172, 600_037.7),
        "step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms"
    );
    assert_eq!(
        lines::trained(2, 20_000, 16.87634, 83.4),
        "step:2/20000 train_loss:16.8763 train_time:83ms step_avg:41.70ms"
    );
    assert_eq!(lines::trained(1, 5, f64::NAN, 1.0), "step:1/5 train_loss:nan train_time:1ms step_avg:1.00ms");
    assert_eq!(
        lines::stopping_early(13_780, 20_000, 600_037.7),
        "stopping_early: wallclock_cap train_time:600038ms step:13780/20000"
    );
    assert_eq!(
        lines::peak_memory(10_184 << 20, (10_201 << 20) - 1),
        "peak memory allocated: 10184 MiB reserved: 10200 MiB"
    );
}

#[test]
fn the_export_lines_are_the_challenges_with_the_codecs_name() {
    assert_eq!(
        lines::serialized(67_224_983, 47_642),
        [
            "Serialized model: 67224983 bytes",
            "Code size: 47642 bytes",
            "Total submission size: 67272625 bytes"
        ]
    );
    assert_eq!(
        lines::serialized_quantised("int8", "zlib", 15_815_847, [67_212_320, 17_178_912, 17_224_025], 47_642),
        [
            "Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)",
            "Total submission size int8+zlib: 15863489 bytes"
        ]
    );
    assert_eq!(
        lines::roundtrip("int8", "zlib", 2.07269931, 1.2243657, 1401.2),
        [
            "final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms",
            "final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570"
        ]
    );
    assert!(
        lines::roundtrip("int8", "brotli", 1.0, 1.0, 1.0)[0]
            .starts_with("final_int8_brotli_roundtrip val_loss")
    );
}

#[test]
fn the_logged_steps_are_the_challenges() {
    let logged: Vec<_> = (1..=45).filter(|&step| logs_step(step, 20, false)).collect();
    assert_eq!(logged, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 40]);
    assert!(logs_step(13, 20, true));
    assert!(!logs_step(1, 0, true));
}

#[test]
fn a_log_is_one_line_a_call_and_goes_on_when_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("runs/a");
    let shown = Arc::new(Mutex::new(Vec::new()));
    let sink = shown.clone();
    let mut log =
        RunLog::open(&run, false, Box::new(move |l| sink.lock().unwrap().push(l.to_string()))).unwrap();
    log.line("seed:1\ndata\t'x'").unwrap();
    log.lines("a = 1\nb = 2\n").unwrap();
    assert_eq!(*shown.lock().unwrap(), ["seed:1 data 'x'", "a = 1", "b = 2"]);
    let read = || std::fs::read_to_string(run.join("train.log")).unwrap();
    assert_eq!(read(), "seed:1 data 'x'\na = 1\nb = 2\n");
    drop(log);
    RunLog::open(&run, true, to_nowhere()).unwrap().line("resumed").unwrap();
    assert_eq!(read(), "seed:1 data 'x'\na = 1\nb = 2\nresumed\n");
    RunLog::open(&run, false, to_nowhere()).unwrap();
    assert_eq!(read(), "");

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = RunLog::open(&file, false, to_nowhere()).err().unwrap();
    assert_eq!(error.exit_code(), 1);
}

fn metric(step: usize) -> Metric {
    Metric {
        step,
        train_loss: step as f64 + 0.1,
        lr_mul: 1.0,
        step_ms: 2.5,
        tokens_per_s: 1000.0,
        ..Metric::default()
    }
}

#[test]
fn metrics_are_one_object_a_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut metrics = Metrics::create(dir.path()).unwrap();
    metrics
        .record(Metric { val_loss: Some(6.9), val_bpb: Some(f64::INFINITY), ..Metric::default() })
        .unwrap();
    // serde_json reads these digits one rounding off: a resumed file must keep them all the same.
    metrics.record(Metric { step_ms: 140.77288517410003, ..metric(10) }).unwrap();
    metrics.record(Metric { train_loss: f64::NAN, ..metric(20) }).unwrap();
    metrics.record(metric(20)).unwrap();
    metrics
        .record(Metric { step: 20, val_loss: Some(2.0), val_bpb: Some(1.25), ..Metric::default() })
        .unwrap();
    metrics.record(metric(30)).unwrap();
    let expected = "\
{\"step\":0,\"train_loss\":null,\"lr_mul\":null,\"step_ms\":null,\"tokens_per_s\":null,\"val_loss\":6.9,\"val_bpb\":null}
{\"step\":10,\"train_loss\":10.1,\"lr_mul\":1.0,\"step_ms\":140.77288517410003,\"tokens_per_s\":1000.0}
{\"step\":20,\"train_loss\":20.1,\"lr_mul\":1.0,\"step_ms\":2.5,\"tokens_per_s\":1000.0,\"val_loss\":2.0,\"val_bpb\":1.25}
{\"step\":30,\"train_loss\":30.1,\"lr_mul\":1.0,\"step_ms\":2.5,\"tokens_per_s\":1000.0}
";
    assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    let rows = Metrics::read(&path).unwrap();
    assert_eq!(rows[2..], metrics.rows()[2..]);
    assert!(rows[0].train_loss.is_nan() && rows[0].val_bpb.unwrap().is_nan());
    assert_eq!(rows[1].val_loss, None);
    drop(metrics);

    // Resumed at step 20: the line after it goes, the line of it can still be completed.
    let mut metrics = Metrics::resume(dir.path(), 20).unwrap();
    metrics.record(Metric { step: 20, val_loss: Some(3.0), ..Metric::default() }).unwrap();
    metrics.record(metric(25)).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let steps: Vec<_> = Metrics::read(&path).unwrap().iter().map(|row| row.step).collect();
    assert_eq!(steps, [0, 10, 20, 25]);
    assert!(text.contains("\"val_loss\":3.0,\"val_bpb\":1.25}\n{\"step\":25,"));
    assert!(expected.starts_with(text.split_inclusive('\n').take(2).collect::<String>().as_str()));
}

#[test]
fn damaged_metrics_are_named_and_a_torn_end_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    std::fs::write(&path, "{\"step\":1,\"train_loss\":2}\n{\"step\":2,\"tra").unwrap();
    assert_eq!(Metrics::read(&path).unwrap().len(), 1);
    let mut metrics = Metrics::resume(dir.path(), 5).unwrap();
    metrics.record(metric(5)).unwrap();
    assert_eq!(Metrics::read(&path).unwrap().len(), 2);
    for bad in ["{\"step\":1}\nx\n", "{\"step\":1}\n{\"step\":-2}\n", "{\"step\":1}\n{\"train_loss\":2}\n"] {
        std::fs::write(&path, bad).unwrap();
        let error = Metrics::read(&path).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("metrics.jsonl line 2"), "{error}");
    }
    std::fs::write(&path, vec![b'['; 1 << 20]).unwrap();
    assert!(Metrics::read(&path).unwrap_err().to_string().contains("line 1"));
    assert_eq!(Metrics::resume(&dir.path().join("new"), 3).unwrap().rows(), []);
}

fn svg(points: &[Point], title: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("curve.svg");
    draw(points, &path, title).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.starts_with("<svg width=\"900\" height=\"500\"") && text.trim_end().ends_with("</svg>"));
    assert!(!text.contains("NaN") && !text.contains("inf\""), "a coordinate is not finite");
    text
}

fn point(step: usize, train_loss: f64, val_bpb: Option<f64>) -> Point {
    Point { step, train_loss: Some(train_loss), val_bpb }
}

#[test]
fn a_curve_has_its_lines_axes_and_legend() {
    let points: Vec<_> =
        (0..=300).map(|i| point(i, 2.0 + 5.0 / (1 + i) as f64, (i % 100 == 0).then_some(1.5))).collect();
    let text = svg(&points, "tiny <&> \"x\"\u{7}");
    for part in ["tiny &lt;&amp;&gt;", "train loss (nats per token)", "validation bits per byte", "step"] {
        assert!(text.contains(part), "{part}");
    }
    assert_eq!(text.matches("<circle").count(), 4, "one mark a validation");
    // One polyline of 301 points, each a pair of whole pixels.
    let longest = text
        .split("points=\"")
        .skip(1)
        .map(|p| p.split('"').next().unwrap())
        .max_by_key(|p| p.len())
        .unwrap();
    assert_eq!(longest.split_whitespace().count(), 301);
}

#[test]
fn a_short_spike_is_cut_and_a_long_one_is_not() {
    let with = |spike: std::ops::Range<usize>| -> Vec<_> {
        (1..=300).map(|i| point(i, if spike.contains(&i) { 17.0 } else { 6.0 }, None)).collect()
    };
    assert!(svg(&with(2..5), "").contains("cut at 6.90"));
    assert!(!svg(&with(2..100), "").contains("cut at"));
    assert!(!svg(&with(0..0), "").contains("cut at"));
}

#[test]
fn a_curve_stands_any_points() {
    assert!(svg(&[], "empty").contains("no points yet"));
    svg(&[Point { step: 7, ..Point::default() }], "nothing known");
    assert_eq!(svg(&[point(0, 6.9, None)], "one").matches("<circle").count(), 1);
    svg(&[point(5, 0.0, Some(0.0)), point(5, 0.0, Some(0.0))], "the same");
    let strange = [f64::NAN, f64::INFINITY, -f64::INFINITY, f64::MAX, f64::MIN, -0.0, 5e-324, 1e9, -1e9];
    let points: Vec<_> = strange.iter().enumerate().map(|(i, &v)| point(i, v, Some(v))).collect();
    svg(&points, "strange");
    svg(&[point(usize::MAX, 1.0, Some(1.0)), point(3, 2.0, None)], "far");
    svg(&[point(9, 1.0, None), point(3, 2.0, None)], "backwards");
    // Gaps: a loss that is not finite cuts the line in two.
    let gap: Vec<_> =
        (0..9).map(|i| point(i, if i == 4 { f64::NAN } else { 1.0 + i as f64 * 0.01 }, None)).collect();
    let lines = |text: &str| text.matches("stroke=\"#0072B2\"").count();
    assert_eq!(lines(&svg(&gap, "gap")), lines(&svg(&gap[..4], "whole")) + 1);
    let many: Vec<_> = (0..100_000).map(|i| point(i, 3.0 + (i % 7) as f64, None)).collect();
    assert!(svg(&many, "many").len() < 200_000);
}

#[test]
fn a_curve_that_cannot_be_written_says_where() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = draw(&[], &file.join("curve.svg"), "x").unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("curve.svg"));
}
