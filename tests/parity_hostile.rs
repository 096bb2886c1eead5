//! `parity --fixtures` on folders that are broken in every way a user's may be, and on numbers that are wrong.

use burn::tensor::DType;
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::parity::{self, Options, Report, Row};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn core() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn run(dir: &Path) -> Result<Report> {
    let options = Options { only: None, tokenizers: None, precision: DType::F64 };
    parity::run::<Cpu>(dir, &options, &Default::default(), &mut |_| {})
}

/// An entry of the core set's indices.
fn entry_of(name: &str) -> Value {
    let indices = ["index.json", "index_seeds.json"].map(|file| -> Value {
        serde_json::from_slice(&fs::read(core().join(file)).expect("an index")).expect("JSON")
    });
    let entry = indices.iter().find_map(|index| index["fixtures"].get(name));
    entry.expect("a fixture of the core set").clone()
}

/// A tensor of a test's own folder.
type Raw = (Dtype, Vec<usize>, Vec<u8>);

fn f64s(shape: &[usize], f: impl Fn(usize) -> f64) -> Raw {
    let bytes = (0..shape.iter().product()).flat_map(|i| f(i).to_le_bytes()).collect();
    (Dtype::F64, shape.to_vec(), bytes)
}

fn i64s(shape: &[usize], f: impl Fn(usize) -> i64) -> Raw {
    let bytes = (0..shape.iter().product()).flat_map(|i| f(i).to_le_bytes()).collect();
    (Dtype::I64, shape.to_vec(), bytes)
}

/// A folder of one fixture `x`.
struct Folder {
    dir: tempfile::TempDir,
    entry: Value,
    tensors: BTreeMap<String, Raw>,
}

impl Folder {
    fn new(entry: Value, tensors: &[(&str, Raw)]) -> Self {
        let tensors = tensors.iter().map(|(name, raw)| (name.to_string(), raw.clone())).collect();
        Self { dir: tempfile::tempdir().unwrap(), entry, tensors }
    }

    /// A copy of a fixture of the core set.
    fn of(name: &str) -> Self {
        let mut entry = entry_of(name);
        entry.as_object_mut().unwrap().remove("tensors");
        let bytes = fs::read(core().join(format!("{name}.safetensors"))).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let raw = |view: &TensorView| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        let tensors = file.iter().map(|(name, view)| (name.to_string(), raw(&view))).collect();
        Self { dir: tempfile::tempdir().unwrap(), entry, tensors }
    }

    fn change(mut self, change: impl FnOnce(&mut Value, &mut BTreeMap<String, Raw>)) -> Self {
        change(&mut self.entry, &mut self.tensors);
        self
    }

    fn write(&self) -> &Path {
        let index = json!({"fixtures": {"x": self.entry}}).to_string();
        fs::write(self.dir.path().join("index_mine.json"), index).unwrap();
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        fs::write(self.dir.path().join("x.safetensors"), bytes).unwrap();
        self.dir.path()
    }

    fn run(&self) -> Report {
        run(self.write()).expect("a report")
    }

    /// Runs and returns the one row that failed.
    fn failure(&self) -> Row {
        let report = self.run();
        let failed: Vec<&Row> = report.rows.iter().filter(|row| !row.ok).collect();
        assert_eq!(failed.len(), 1, "{failed:#?}");
        failed[0].clone()
    }
}

fn rms_norm_folder() -> Folder {
    Folder::of("rmsnorm_weight")
}

#[test]
fn a_folder_without_a_readable_index_is_an_error_of_one_line() {
    let index = |text: &str| {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("index.json"), text).unwrap();
        dir
    };
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for (text, what) in [
        ("", "not JSON"),
        ("{\"fixtures\": ", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("{}", "no object fixtures"),
        ("{\"fixtures\": []}", "no object fixtures"),
        ("{\"fixtures\": {}}", "no fixture is listed"),
        ("{\"fixtures\": {\"a\": {\"tol\": NaN}}}", "not JSON"),
        (&nested, "not JSON"),
    ] {
        let dir = index(text);
        let error = run(dir.path()).unwrap_err();
        let line = error.to_string();
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(line.starts_with(what) && !line.contains('\n') && line.contains(", expected "), "{line}");
        assert!(line.contains(dir.path().to_str().unwrap()), "{line}");
    }
    let empty = tempfile::tempdir().unwrap();
    let error = run(empty.path()).unwrap_err().to_string();
    assert!(error.starts_with("no index, "), "{error}");
    let error = run(&empty.path().join("absent")).unwrap_err();
    assert!(error.to_string().starts_with("cannot read") && error.exit_code() == 2, "{error}");
    let dir = index("{\"fixtures\": {\"a\": {}}}");
    fs::write(dir.path().join("index_more.json"), "{\"fixtures\": {\"a\": {}}}").unwrap();
    let error = run(dir.path()).unwrap_err().to_string();
    assert!(error.starts_with("fixture a is listed twice, ") && error.contains("index_more.json"), "{error}");
}

#[test]
fn a_broken_entry_is_a_failed_row_and_the_others_go_on() {
    let folder = rms_norm_folder();
    folder.write();
    let good = folder.entry.clone();
    let index = json!({"fixtures": {
        "a_missing": good,
        "../x": good,
        "b_text": "no entry",
        "c_null": null,
        "x": good,
        "y_truncated": good,
        "z_no_kind": {"tol": 1},
        "z_other_kind": {"kind": "op.unheard_of"},
    }});
    let dir = folder.dir.path();
    fs::write(dir.join("index_mine.json"), index.to_string()).unwrap();
    let bytes = fs::read(dir.join("x.safetensors")).unwrap();
    fs::write(dir.join("y_truncated.safetensors"), &bytes[..bytes.len() - 1]).unwrap();
    for name in ["b_text", "c_null", "z_no_kind", "z_other_kind"] {
        fs::write(dir.join(format!("{name}.safetensors")), &bytes).unwrap();
    }
    let report = run(dir).unwrap();
    let reasons = [
        ("../x", "no file name"),
        ("a_missing", "cannot read"),
        ("b_text", "no kind"),
        ("c_null", "no kind"),
        ("y_truncated", "not a safetensors file"),
        ("z_no_kind", "no kind"),
        ("z_other_kind", "unknown kind op.unheard_of"),
    ];
    assert_eq!((report.passed, report.failed), (3, reasons.len()), "{report:#?}");
    for (name, reason) in reasons {
        let row = report.rows.iter().find(|row| row.fixture == name).unwrap();
        let note = row.note.as_deref().unwrap();
        assert!(!row.ok && row.tensor == "*" && note.starts_with(reason) && !note.contains('\n'), "{row:?}");
    }
}

#[test]
fn a_wrong_number_fails_its_own_row_with_the_place() {
    let folder = Folder::of("chal64_tiny_tied").change(|_, tensors| {
        let (_, _, bytes) = tensors.get_mut("grad.blocks.2.attn.c_k.weight").unwrap();
        let at = 8 * (5 * 32 + 7);
        let value = f64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) + 1e-6;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    });
    let row = folder.failure();
    assert_eq!(row.tensor, "grad.blocks.2.attn.c_k.weight");
    assert!(row.error.unwrap() > 1e-6 && row.tolerance == Some(1e-9), "{row:?}");
    assert!(row.note.unwrap().starts_with("worst at [5, 7]: "));
}

#[test]
fn what_is_expected_and_not_given_fails_and_so_does_what_is_not_used() {
    let extra = |name: &'static str, raw: Raw| {
        let folder = rms_norm_folder().change(|_, tensors| drop(tensors.insert(name.into(), raw)));
        folder.failure()
    };
    for (name, raw) in [("out.z", f64s(&[3], |_| 0.0)), ("in.mask", f64s(&[3], |_| 1.0))] {
        let row = extra(name, raw);
        assert_eq!((row.tensor.as_str(), row.error), (name, None));
        assert_eq!(row.note.as_deref(), Some("this kind gives no such result"));
    }
    let row = rms_norm_folder().change(|_, t| drop(t.insert("out.y".into(), f64s(&[10], |_| 0.0)))).failure();
    assert_eq!(row.note.as_deref(), Some("the result has shape [2, 5, 24], expected [10]"));
    let row = rms_norm_folder()
        .change(|_, t| drop(t.insert("out.y".into(), f64s(&[2, 5, 24], |_| f64::NAN))))
        .failure();
    assert_eq!(
        row.note.as_deref(),
        Some("the fixture itself holds a number that is not finite at [0, 0, 0]")
    );
    let listed = json!({"out.gone": ["float64", [2]], "in.w": ["float64", [25]]});
    let report = rms_norm_folder().change(|entry, _| entry["tensors"] = listed).run();
    let notes: Vec<&str> =
        report.rows.iter().filter(|row| !row.ok).filter_map(|row| row.note.as_deref()).collect();
    assert_eq!(
        notes,
        ["the file's shape is [24], the index says [25]", "the index lists it, the file does not hold it"]
    );
    let only_inputs =
        rms_norm_folder().change(|_, tensors| tensors.retain(|name, _| !name.starts_with("out")));
    assert_eq!(only_inputs.run().failed, 0);
    let nothing = only_inputs.change(|_, tensors| tensors.retain(|name, _| !name.starts_with("grad")));
    assert!(nothing.failure().note.unwrap().starts_with("no result to compare"));
}

#[test]
fn a_result_that_is_not_finite_fails() {
    let row = rms_norm_folder().change(|entry, tensors| {
        entry["config"]["eps"] = json!(0.0);
        tensors.insert("in.x".into(), f64s(&[2, 5, 24], |_| 0.0));
        tensors.retain(|name, _| !name.starts_with("grad"));
    });
    let row = row.failure();
    assert_eq!(row.error, None);
    assert!(row.note.unwrap().starts_with("the result holds NaN at [0, 0, 0]"));
}

type Change = fn(&mut Value, &mut BTreeMap<String, Raw>);

/// Changes of good fixtures, each with the beginning of the reason for which the whole fixture fails.
const BROKEN: &[(&str, &str, Change)] = &[
    ("rmsnorm_weight", "no tensor in.x", |_, t| drop(t.remove("in.x"))),
    ("rmsnorm_weight", "no tensor cot.y", |_, t| drop(t.remove("cot.y"))),
    ("rmsnorm_weight", "tensor in.x is a scalar", |_, t| drop(t.insert("in.x".into(), f64s(&[], |_| 1.0)))),
    ("rmsnorm_weight", "tensor in.x has shape [0, 24]", |_, t| {
        t.insert("in.x".into(), f64s(&[0, 24], |_| 1.0));
    }),
    ("rmsnorm_weight", "tensor in.w has shape [23]", |_, t| {
        drop(t.insert("in.w".into(), f64s(&[23], |_| 1.0)))
    }),
    ("rmsnorm_weight", "eps = \"small\", config", |e, _| e["config"]["eps"] = json!("small")),
    ("rmsnorm_weight", "unknown key centred, config", |e, _| e["config"]["centred"] = json!(true)),
    ("rmsnorm_weight", "config = 3", |e, _| e["config"] = json!(3)),
    ("rope", "17 rotated channels", |e, _| e["config"]["rot"] = json!(17)),
    ("rope", "32 rotated channels", |e, _| e["config"]["rot"] = json!(32)),
    ("rope", "rot = -2", |e, _| e["config"]["rot"] = json!(-2)),
    ("rope", "base = -10", |e, _| e["config"]["base"] = json!(-10)),
    ("rope", "sign = \"x1*c-x2*s, x1*s+x2*c\"", |e, _| e["config"]["sign"] = json!("x1*c-x2*s, x1*s+x2*c")),
    ("rope", "tensor in.x has shape [11, 16]", |_, t| {
        drop(t.insert("in.x".into(), f64s(&[11, 16], |_| 1.0)))
    }),
    (
        "attn_causal_gqa",
        "in.k has shape [2, 3, 11, 16], the file, expected [2, a divisor of 4, 11, 16]",
        |_, t| {
            for name in ["in.k", "in.v", "grad.k", "grad.v"] {
                t.insert(name.into(), f64s(&[2, 3, 11, 16], |_| 1.0));
            }
        },
    ),
    ("attn_causal_gqa", "in.k has shape [2, 2, 12, 16]", |_, t| {
        for name in ["in.k", "in.v"] {
            t.insert(name.into(), f64s(&[2, 2, 12, 16], |_| 1.0));
        }
    }),
    ("attn_causal_gqa", "tensor in.v has shape [2, 2, 11, 8]", |_, t| {
        t.insert("in.v".into(), f64s(&[2, 2, 11, 8], |_| 1.0));
    }),
    ("attn_qknorm_rope_gain_gqa", "tensor in.gain has shape [3]", |_, t| {
        t.insert("in.gain".into(), f64s(&[3], |_| 1.0));
    }),
    ("attn_qknorm_rope_gain_gqa", "order = \"rope first\"", |e, _| {
        e["config"]["order"] = json!("rope first")
    }),
    ("relu2_mlp", "tensor in.w_down has shape [12, 19]", |_, t| {
        t.insert("in.w_down".into(), f64s(&[12, 19], |_| 1.0));
    }),
    ("softcap_xent", "in.target holds 37, the file, expected 0 to 36", |_, t| {
        t.insert("in.target".into(), i64s(&[13], |_| 37));
    }),
    ("softcap_xent", "in.target holds -1", |_, t| drop(t.insert("in.target".into(), i64s(&[13], |_| -1)))),
    ("softcap_xent", "tensor in.target of F64", |_, t| {
        drop(t.insert("in.target".into(), f64s(&[13], |_| 1.0)))
    }),
    ("softcap_xent", "reduction = none", |e, _| e["config"]["reduction"] = json!("none")),
    ("softcap_xent", "cap, config", |e, _| e["config"]["cap"] = json!(-30.0)),
    ("adamw3", "betas, config, expected two numbers", |e, _| e["config"]["betas"] = json!([0.9])),
    ("adamw3", "no lr, config", |e, _| drop(e["config"].as_object_mut().unwrap().remove("lr"))),
    ("adamw3", "tensor in.grad1 has shape [4, 5]", |_, t| {
        t.insert("in.grad1".into(), f64s(&[4, 5], |_| 1.0));
    }),
    ("adamw3", "no tensor in.grad0", |_, t| drop(t.remove("in.grad0"))),
    ("muon3_tall", "tensor in.p0 has shape [90]", |_, t| {
        drop(t.insert("in.p0".into(), f64s(&[90], |_| 1.0)))
    }),
    ("muon3_tall", "scale = \"0.2 sqrt(max(rows,cols))\"", |e, _| {
        e["config"]["scale"] = json!("0.2 sqrt(max(rows,cols))");
    }),
    ("muon3_tall", "no tensor in.p0", |_, t| drop(t.remove("in.p0"))),
    ("newton_schulz5_wide", "steps = 1000000000", |e, _| e["config"]["steps"] = json!(1_000_000_000)),
    ("newton_schulz5_wide", "coef, config, expected three numbers", |e, _| {
        e["config"]["coef"] = json!([1, 2])
    }),
    ("chal_bpb_luts_sp1024", "no model_sha256", |e, _| e["config"]["model_sha256"] = Value::Null),
    ("chal_int8_roundtrip", "tensor a.weight holds NaN", |_, t| {
        t.insert("in.a.weight".into(), f64s(&[300, 260], |_| f64::NAN));
    }),
    ("chal_int8_roundtrip", "unknown key percentile, config", |e, _| e["config"]["percentile"] = json!(99)),
    ("chal64_tiny_tied", "model_dim = 32, config", |e, _| e["config"]["num_heads"] = json!(5)),
    ("chal64_tiny_tied", "num_heads = 4, config", |e, _| e["config"]["num_kv_heads"] = json!(3)),
    ("chal64_tiny_tied", "num_layers = 0, config", |e, _| e["config"]["num_layers"] = json!(0)),
    ("chal64_tiny_tied", "num_layers = 5.5, config", |e, _| e["config"]["num_layers"] = json!(5.5)),
    ("chal64_tiny_tied", "no rope_base, config", |e, _| e["config"]["rope_base"] = Value::Null),
    ("chal64_tiny_tied", "unknown key num_experts, config", |e, _| e["config"]["num_experts"] = json!(2)),
    ("chal64_tiny_tied", "unknown name NUM_EXPERTS, env", |e, _| e["env"] = json!({"NUM_EXPERTS": 2})),
    ("chal64_tiny_tied", "unknown key recur_enabled, attrs", |e, _| {
        e["attrs"] = json!({"recur_enabled": true})
    }),
    ("chal64_tiny_tied", "param.* has 37556 elements, the file, expected the 470048772", |e, _| {
        e["config"]["model_dim"] = json!(8192);
        e["config"]["num_layers"] = json!(1);
    }),
    ("chal64_tiny_tied", "tensor tok_emb.weight has shape [31, 32]", |e, _| {
        e["config"]["vocab_size"] = json!(32)
    }),
    ("chal64_tiny_tied", "tensor blocks.3.attn.q_gain is missing", |_, t| {
        t.remove("param.blocks.3.attn.q_gain");
    }),
    ("chal64_tiny_tied", "unknown tensor lm_head.weight", |_, t| {
        t.insert("param.lm_head.weight".into(), f64s(&[31, 32], |_| 1.0));
    }),
    ("chal64_tiny_tied", "in.ids holds 31, the file, expected 0 to 30", |_, t| {
        t.insert("in.ids".into(), i64s(&[2, 19], |i| i as i64));
    }),
    ("chal64_tiny_tied", "in.ids is no matrix", |_, t| drop(t.insert("in.ids".into(), i64s(&[38], |_| 1)))),
    ("chal64_tiny_tied", "tensor in.targets has shape [2, 18]", |_, t| {
        t.insert("in.targets".into(), i64s(&[2, 18], |_| 1));
    }),
    ("tr_chal_train5_f64", "another steps than in.ids has, hyper, expected 5", |e, _| {
        e["hyper"]["steps"] = json!(6);
    }),
    ("tr_chal_train5_f64", "ema is set, hyper, expected 0 or nothing", |e, _| {
        e["hyper"]["ema"] = json!(0.999)
    }),
    ("tr_chal_train5_f64", "unknown key swa, hyper", |e, _| e["hyper"]["swa"] = json!(1)),
    ("tr_chal_train5_f64", "no tok_lr, hyper", |e, _| e["hyper"]["tok_lr"] = Value::Null),
    ("tr_chal_train5_f64", "4 values of lr_mul", |e, _| e["lr_mul"] = json!([1, 1, 1, 1])),
    ("tr_chal_train5_f64", "muon_momentum = 1.5", |e, _| e["hyper"]["muon_momentum"] = json!(1.5)),
    ("tr_chal_train5_f32", "no tensor in.ids", |_, _| {}),
];

#[test]
fn a_broken_fixture_is_one_failed_row_with_the_reason() {
    let mut wrong = Vec::new();
    for (name, reason, change) in BROKEN {
        let report = Folder::of(name).change(change).run();
        let failed: Vec<&Row> = report.rows.iter().filter(|row| !row.ok).collect();
        let as_expected = |row: &Row| {
            let note = row.note.as_deref().unwrap_or_default();
            row.tensor == "*" && row.error.is_none() && note.starts_with(reason) && !note.contains('\n')
        };
        if failed.len() != 1 || !as_expected(failed[0]) {
            wrong.push(format!("{name}: expected {reason}, found {:?}", failed.first()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_tolerance_that_is_missing_or_negative_fails_every_row() {
    for (tol, reason) in [(Value::Null, "no tol, entry"), (json!(-1), "tol = -1"), (json!("1e-3"), "tol = ")]
    {
        let report = rms_norm_folder().change(|entry, _| entry["tol"] = tol).run();
        assert_eq!((report.passed, report.failed), (0, 3));
        assert!(report.rows.iter().all(|row| row.note.as_ref().unwrap().starts_with(reason)), "{report:?}");
    }
}

#[test]
fn another_grouping_schedule_or_list_than_the_peers_fails_its_row() {
    let fails = |name: &str, change: Change, tensor: &str| {
        let row = Folder::of(name).change(change).failure();
        assert_eq!(row.tensor, tensor, "{row:?}");
        assert!(row.note.is_some());
    };
    let train = "tr_chal_train5_f64";
    fails(train, |e, _| e["groups"]["muon"] = json!(["blocks.0.attn.c_q.weight"]), "groups.muon");
    fails(train, |e, _| e["lr_mul"] = json!([1, 1, 1, 1, 1]), "lr_mul");
    let int8 = "chal_int8_roundtrip";
    fails(int8, |e, _| e["config"]["keys"]["quantized"] = json!(["a.weight"]), "keys.quantized");
    fails(
        int8,
        |e, _| e["config"]["stats"]["int8_payload_bytes"] = json!(148_749),
        "stats.int8_payload_bytes",
    );
    // A code that is off by one is wrong, whatever the relative tolerance of the scales.
    fails(int8, |_, t| t.get_mut("quantized.c.bias").unwrap().2[7] ^= 1, "quantized.c.bias");
}

#[test]
fn a_quantiser_that_differs_in_one_code_count_or_list_fails_its_row() {
    let fails = |name: &str, change: Change, tensor: &str| {
        let row = Folder::of(name).change(change).failure();
        assert_eq!(row.tensor, tensor, "{row:?}");
        assert!(row.note.is_some());
    };
    let flip = |name: &str, tensor: &str| {
        let folder = Folder::of(name).change(|_, t| t.get_mut(tensor).unwrap().2[0] ^= 1);
        assert_eq!(folder.failure().tensor, tensor);
    };
    flip("q_int6_clip_search", "out.q.3.search1");
    flip("q_int6_clip_search", "out.q1382.0");
    flip("q_int6_clip_search", "out.vec_q.search0");
    flip("q_export_1607", "quantized.blocks.0.mamba3.mamba3.in_proj.weight");
    flip("q_export_1994", "packed_ternary.blocks.0.attn.c_q.weight");
    flip("q_mixed_int6_1382", "out.tok_emb.weight.q");
    flip("q_pack_ternary_1994", "out.packed.3_bf16");
    flip("q_gptq_int6_12x64", "out.q_float64");
    flip("q_gptq_int6_12x64", "out.percentile_q");
    flip("gptq_int8", "out.Q");
    flip("gptq_int8", "out.Q_rtn");
    // The peer's float32 codes may differ in 0.2 %, as its note says: in one of these 768, not in two.
    let gptq = |differ: usize, note: bool| {
        let folder = Folder::of("q_gptq_int6_12x64").change(|entry, t| {
            t.get_mut("out.q").unwrap().2[..differ].iter_mut().for_each(|code| *code ^= 1);
            if !note {
                entry.as_object_mut().unwrap().remove("note");
            }
        });
        folder.run().failed
    };
    assert_eq!([gptq(0, false), gptq(1, true), gptq(1, false), gptq(2, true)], [0, 0, 1, 1]);
    fails("q_gptq_int6_12x64", |e, _| e["dead_columns"] = json!(2), "dead_columns");
    fails("gptq_int8", |e, _| e["config"]["loss_gptq"] = json!(0.83), "loss_gptq");
    fails(
        "q_export_1607",
        |e, _| e["stats"]["int8_payload_bytes"] = json!(69_353),
        "stats.int8_payload_bytes",
    );
    fails("q_export_1607", |e, _| e["dtypes"] = json!({"tok_emb.weight": "bfloat16"}), "dtypes");
    let gamma = "packed_ternary_meta.blocks.0.attn.c_q.weight.gamma";
    fails(
        "q_export_1994",
        |e, _| e["packed_ternary_meta"]["blocks.0.attn.c_q.weight"]["gamma"] = json!(0.080_549_1),
        gamma,
    );
    let kind = "kinds.tok_emb.weight";
    fails("q_mixed_int6_1382", |e, _| e["kinds"]["tok_emb.weight"] = json!({"type": "int6"}), kind);
    fails("q_gptq_int6_12x64", |_, t| drop(t.remove("in.hessian")), "*");
    fails("q_int6_clip_search", |e, _| e["cases"][2]["bits"] = json!(9), "*");
    fails("q_export_1607", |e, _| e["config"] = json!({"bits": 1}), "*");
}

#[test]
fn sizes_that_the_core_set_does_not_have() {
    // y = x at eps 0 for rows of one element of magnitude 1; one head, one position; an id of the largest size.
    let ones = |shape: &[usize]| f64s(shape, |i| if i % 2 == 0 { 1.0 } else { -1.0 });
    let entry = json!({"kind": "op.rmsnorm", "config": {"eps": 0.0}, "tol": 1e-15});
    let zeros = f64s(&[3, 1], |_| 0.0);
    let tensors =
        [("in.x", ones(&[3, 1])), ("cot.y", ones(&[3, 1])), ("out.y", ones(&[3, 1])), ("grad.x", zeros)];
    assert_eq!(Folder::new(entry, &tensors).run().failed, 0);

    let entry = json!({"kind": "op.attn_causal_gqa", "tol": 1e-15});
    let one = |f: f64| f64s(&[1, 1, 1, 1], move |_| f);
    let tensors = [
        ("in.q", one(3.0)),
        ("in.k", one(-2.0)),
        ("in.v", one(0.5)),
        ("cot.y", one(4.0)),
        ("out.y", one(0.5)),
        ("grad.q", one(0.0)),
        ("grad.k", one(0.0)),
        ("grad.v", one(4.0)),
    ];
    assert_eq!(Folder::new(entry, &tensors).run().failed, 0);

    // Logits of zero: ln v, and a gradient of 1/v - 1 at the target.
    let entry = json!({"kind": "op.softcap_xent", "config": {"cap": null, "reduction": "sum"}, "tol": 1e-14});
    let v = 65_536;
    let tensors = [
        ("in.h", f64s(&[1, 1], |_| 1.0)),
        ("in.w", f64s(&[v, 1], |_| 0.0)),
        ("in.target", i64s(&[1], |_| 65_535)),
        ("cot.loss", f64s(&[1], |_| 1.0)),
        ("out.loss", f64s(&[1], |_| 65_536f64.ln())),
        ("grad.h", f64s(&[1, 1], |_| 0.0)),
        ("grad.w", f64s(&[v, 1], |i| 1.0 / 65_536.0 - if i == 65_535 { 1.0 } else { 0.0 })),
    ];
    assert_eq!(Folder::new(entry, &tensors).run().failed, 0);
}
