//! The recipe: defaults, TOML, `--set`, the challenge's environment, built-ins, validation.

use fairway::error::Error;
use fairway::recipe::{BuiltIn, CHALLENGE, Key, Kind, Recipe, Value, builtin, keys};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("FAIRWAY_SHARED").map(PathBuf::from);
    let root = root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let path = root.join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {} is not there", path.display());
    None
}

fn message(error: Error) -> String {
    assert_eq!(error.exit_code(), 2, "{error}");
    let line = error.to_string();
    assert!(!line.contains('\n') && line.len() < 500, "{line}");
    line
}

fn refused(assignment: &str) -> String {
    let mut recipe = Recipe::default();
    let line = message(recipe.set(assignment).unwrap_err());
    assert_eq!(recipe, Recipe::default(), "a refused value must change nothing");
    line
}

fn from_env_file(text: &str) -> (Recipe, Result<fairway::recipe::EnvReport, String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("env.sh");
    std::fs::write(&path, text).unwrap();
    let mut recipe = Recipe::default();
    let report = recipe.apply_env_file(&path).map_err(message);
    (recipe, report)
}

#[test]
fn the_defaults_are_the_challenges_baseline() {
    // spec/challenge.md section 4, "Env vars and defaults", word for word.
    let spec = "SEED 1337; VAL_BATCH_SIZE 524288; VAL_LOSS_EVERY 1000; TRAIN_LOG_EVERY 200; ITERATIONS 20000; \
        WARMDOWN_ITERS 1200; WARMUP_STEPS 20; TRAIN_BATCH_TOKENS 524288; TRAIN_SEQ_LEN 1024; \
        MAX_WALLCLOCK_SECONDS 600; QK_GAIN_INIT 1.5; VOCAB_SIZE 1024; NUM_LAYERS 9; NUM_KV_HEADS 4; MODEL_DIM 512; \
        NUM_HEADS 8; MLP_MULT 2; TIE_EMBEDDINGS 1; ROPE_BASE 10000; LOGIT_SOFTCAP 30; EMBED_LR 0.6; HEAD_LR 0.008; \
        TIED_EMBED_LR 0.05; TIED_EMBED_INIT_STD 0.005; MATRIX_LR 0.04; SCALAR_LR 0.04; MUON_MOMENTUM 0.95; \
        MUON_BACKEND_STEPS 5; MUON_MOMENTUM_WARMUP_START 0.85; MUON_MOMENTUM_WARMUP_STEPS 500; BETA1 0.9; BETA2 0.95; \
        ADAM_EPS 1e-8; GRAD_CLIP_NORM 0; \
        CONTROL_TENSOR_NAME_PATTERNS attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights; \
        INT8_KEEP_FLOAT_FP32_NAME_PATTERNS attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights; \
        GRAD_ACCUM_STEPS 8";
    let stated: Vec<(&str, &str)> = spec.split("; ").map(|v| v.trim().split_once(' ').unwrap()).collect();
    let mut recipe = Recipe::default();
    let report = recipe.apply_env_map(stated.iter().copied()).unwrap();
    assert_eq!(recipe, Recipe::default());
    assert_eq!(report.applied.len(), stated.len());
    // Names of the hybrids' scripts, for what the challenge's has no name for.
    let more = ["LR_WARMUP_STEPS", "MLP_TYPE", "VAL_TOKENS"];
    let known = |key: &&Key| key.scope.holds(CHALLENGE) && key.env.is_some_and(|env| !more.contains(&env));
    assert_eq!(keys().iter().filter(known).count(), stated.len());
    for key in keys() {
        assert!(key.env.is_none_or(|env| env.to_lowercase() == key.name), "{}", key.name);
        assert!(key.doc.ends_with('.') && key.doc.len() < 220, "{}", key.doc);
    }
}

#[test]
fn sizes_follow_in_closed_form() {
    let baseline = Recipe::default();
    let count = |recipe: &Recipe| fairway::model::param_count(recipe).unwrap();
    assert_eq!(count(&baseline), 17_059_912);
    assert_eq!((baseline.head_dim(), baseline.kv_dim(), baseline.mlp_dim()), (64, 256, 1024));
    assert_eq!((baseline.span_tokens(), baseline.val_batch_tokens()), (65_536, 65_536));
    assert_eq!((baseline.token_lr(), baseline.wallclock_cap()), (0.05, Some(600.0)));
    let untied = Recipe { tie_embeddings: false, max_wallclock_seconds: 0.0, ..baseline };
    assert_eq!(count(&untied), 17_059_912 + 524_288);
    assert_eq!((untied.token_lr(), untied.wallclock_cap()), (0.6, None));
    assert_eq!(count(&Recipe::load("tiny").unwrap()), 494_344);
    let absurd = Recipe { model_dim: usize::MAX, num_layers: usize::MAX, num_heads: 0, ..Recipe::default() };
    assert!(fairway::model::param_count(&absurd).is_err());
    assert_eq!(absurd.head_dim(), 0);
}

#[test]
fn parameter_counts_equal_the_fixtures() {
    let Some(path) = shared("fixtures/index_seeds.json") else { return };
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let entries = index.get("fixtures").unwrap_or(&index).as_object().unwrap();
    let mut checked = 0;
    for (name, entry) in entries.iter().filter(|(_, entry)| entry["kind"] == "model.challenge") {
        let mut recipe = Recipe::default();
        for (key, value) in entry["config"].as_object().unwrap() {
            recipe.set(&format!("{key}={value}")).unwrap();
        }
        let tensors = entry["tensors"].as_object().unwrap();
        let sizes = tensors.iter().filter(|(tensor, _)| tensor.starts_with("param.")).map(|(_, shape)| {
            shape[1].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product::<u64>()
        });
        assert_eq!(fairway::model::param_count(&recipe).unwrap(), sizes.sum::<u64>(), "{name}");
        checked += 1;
    }
    assert!(checked > 0);
}

#[test]
fn built_ins_load_are_valid_and_state_only_what_differs() {
    let names: Vec<_> = builtin().iter().map(|b| (b.name, b.aliases)).collect();
    let hybrids: [(&str, &[&str]); 3] =
        [("ternary-loop", &["pr1994"]), ("mamba3-hinge", &["pr1607"]), ("mamba1-unet", &["pr1382"])];
    assert_eq!(names[..5], [[("tiny", &[] as &[&str]), ("baseline", &[])].as_slice(), &hybrids].concat());
    for built_in in builtin() {
        let recipe = Recipe::load(built_in.name).unwrap();
        recipe.validate().unwrap();
        assert_eq!(recipe.name, built_in.name);
        assert!(!recipe.summary.is_empty());
        let table: toml::Table = built_in.toml.parse().unwrap();
        let follows = recipe.int8_keep_float_fp32_name_patterns == recipe.control_tensor_name_patterns;
        let base = match table.get("base").and_then(|base| base.as_str()) {
            Some(base) => Recipe::load(base).unwrap(),
            None => Recipe::default(),
        };
        for key in keys().iter().filter(|key| !["name", "summary"].contains(&key.name)) {
            if follows && key.name == "int8_keep_float_fp32_name_patterns" {
                continue;
            }
            let differs = key.value(&recipe) != key.value(&base);
            assert_eq!(table.contains_key(key.name), differs, "{} in {}", key.name, built_in.name);
        }
        for alias in built_in.aliases {
            assert_eq!(BuiltIn::find(alias), Some(built_in));
        }
    }
    assert_eq!(Recipe::load("baseline").unwrap(), Recipe::default());
    // Each file of the folder is compiled in.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/recipes");
    if let Ok(files) = std::fs::read_dir(folder) {
        let is_recipe = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "toml");
        assert_eq!(files.map(|file| file.unwrap().path()).filter(is_recipe).count(), builtin().len());
    }
}

#[test]
fn ablations_are_valid_and_differ_from_their_base() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/recipes/ablations");
    let Ok(files) = std::fs::read_dir(&folder) else {
        println!("skipped: {} is not there", folder.display());
        return;
    };
    let mut checked = 0;
    for path in files.map(|file| file.unwrap().path()) {
        let recipe = Recipe::load(path.to_str().unwrap()).unwrap();
        fairway::model::check(&recipe).unwrap();
        let table: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        let base = Recipe::load(table["base"].as_str().unwrap()).unwrap();
        let named = ["name", "summary"];
        let differs = |key: &&Key| !named.contains(&key.name) && key.value(&recipe) != key.value(&base);
        assert!(keys().iter().any(|key| differs(&key)), "{} changes nothing", path.display());
        assert!(!recipe.summary.is_empty(), "{}", path.display());
        checked += 1;
    }
    assert!(checked > 0);
}

#[test]
fn a_written_recipe_reads_back_equal_to_the_last_bit() {
    let mut recipe = Recipe::load("tiny").unwrap();
    recipe.matrix_lr = 0.1 + 0.2;
    recipe.adam_eps = 1.000_000_000_000_000_2e-8;
    recipe.rope_base = 1e12;
    recipe.tied_embed_init_std = 5e-324;
    recipe.seed = i64::MAX as u64;
    recipe.summary = "a \"b\" 'c' # d \\ e = [1]".into();
    recipe.control_tensor_name_patterns = vec!["a,b".into(), "it's".into()];
    recipe.int8_keep_float_fp32_name_patterns = vec![];
    recipe.tie_embeddings = false;
    let text = recipe.to_toml();
    assert_eq!(Recipe::from_toml(&text, Path::new("recipe.toml")).unwrap(), recipe);
    assert_eq!(text.lines().count(), keys().iter().filter(|key| key.scope.holds(CHALLENGE)).count());
    assert!(Recipe::default().to_toml().contains("\nadam_eps = 1e-8 "));
    assert!(text.contains("\nnum_layers = 4 ") && text.contains("# Query heads of an attention layer."));
}

#[test]
fn a_toml_file_states_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.toml");
    std::fs::write(&path, "num_layers = 3\nrope_base = 500\nmatrix_lr = 2e-2\ntie_embeddings = false\n")
        .unwrap();
    let recipe = Recipe::load(path.to_str().unwrap()).unwrap();
    let expected = Recipe {
        name: "mine".into(),
        summary: String::new(),
        num_layers: 3,
        rope_base: 500.0,
        matrix_lr: 0.02,
        tie_embeddings: false,
        ..Recipe::default()
    };
    assert_eq!(recipe, expected);
    recipe.validate().unwrap();
}

#[test]
fn bad_toml_names_the_file_and_the_key() {
    let read = |text: &str| message(Recipe::from_toml(text, Path::new("my.toml")).unwrap_err());
    assert_eq!(
        read("num_layer = 3"),
        "unknown key num_layer, my.toml, expected a recipe key; the nearest is num_layers"
    );
    assert_eq!(read("num_layers = \"3\""), "num_layers = \"3\", my.toml, expected an integer from 1 to 1024");
    assert_eq!(read("num_layers = 3.0"), "num_layers = 3.0, my.toml, expected an integer from 1 to 1024");
    assert_eq!(read("matrix_lr = true"), "matrix_lr = true, my.toml, expected a number from 0 to 100");
    assert_eq!(read("tie_embeddings = 1"), "tie_embeddings = 1, my.toml, expected true or false");
    assert!(read("control_tensor_name_patterns = [1]").contains("expected a list of at most 256 texts"));
    assert!(read("system = \"pr9\"").contains("expected one of challenge"));
    assert!(read("name = \"a\\nb\"").contains("expected a text of one line"));
    assert!(read("beta1 = nan").contains("expected a number from 0 to below 1"));
    assert!(read("adam_eps = inf").contains("expected a number above 0, at most 1"));
    assert!(read("[optim]\nmatrix_lr = 1").contains("unknown key optim"));
    assert!(
        read("seed = 1\nseed 2").starts_with("not TOML (") && read("seed = 1\nseed 2").contains("line 2")
    );
    assert!(read("seed = 1\nseed = 2").contains("line 2"));
    assert!(read("seed = 99999999999999999999").starts_with("not TOML"));
    read(&format!("seed = {}", "[".repeat(1_000_000)));
    read(&format!("{} = 1", "k".repeat(1_000_000)));
    read(&format!("seed = {}1{}", "[".repeat(70), "]".repeat(70)));
}

#[test]
fn bad_recipe_files_name_the_file() {
    let unknown = message(Recipe::load("tinny").unwrap_err());
    assert!(
        unknown.starts_with("unknown recipe, tinny, expected one of tiny, baseline, ternary-loop, pr1994, ")
    );
    assert!(unknown.ends_with(", or the path of a .toml file"), "{unknown}");
    assert!(message(Recipe::load("absent/x.toml").unwrap_err()).contains("absent/x.toml"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.toml");
    std::fs::write(&path, [0xff, 0xfe, 0]).unwrap();
    assert!(message(Recipe::load(path.to_str().unwrap()).unwrap_err()).contains("expected UTF-8 text"));
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(message(Recipe::load(path.to_str().unwrap()).unwrap_err()).contains("file too large"));
}

#[test]
fn set_takes_any_key() {
    let mut recipe = Recipe::default();
    for assignment in [
        "train_batch_tokens = 65_536",
        "matrix_lr=.02",
        "tie_embeddings=False",
        "rope_base=50000",
        "name=a=b",
        "control_tensor_name_patterns=x, y,,",
        "int8_keep_float_fp32_name_patterns=[\"a,b\", 'c']",
    ] {
        recipe.set(assignment).unwrap();
    }
    assert_eq!((recipe.train_batch_tokens, recipe.matrix_lr, recipe.rope_base), (65_536, 0.02, 50_000.0));
    assert_eq!((recipe.tie_embeddings, recipe.name.as_str()), (false, "a=b"));
    assert_eq!(recipe.control_tensor_name_patterns, ["x", "y"]);
    assert_eq!(recipe.int8_keep_float_fp32_name_patterns, ["a,b", "c"]);
    // Every key takes its own default back, as `to_toml` writes it, but for the quotes of a text.
    for line in Recipe::default().to_toml().lines() {
        let (setting, _) = line.split_once(" # ").unwrap();
        recipe.set(&setting.trim().replace("= \"", "=").trim_end_matches('"').replace("= ", "=")).unwrap();
    }
    assert_eq!(recipe, Recipe::default());
}

#[test]
fn a_hybrid_s_recipe_is_written_and_set_like_any_other() {
    for name in ["pr1994", "pr1607", "pr1382"] {
        let recipe = Recipe::load(name).unwrap();
        let text = recipe.to_toml();
        assert_eq!(Recipe::from_toml(&text, Path::new("r.toml")).unwrap(), recipe, "{name}");
        let own = keys().iter().filter(|key| key.scope.holds(&recipe.system)).count();
        assert_eq!(text.lines().count(), own, "{name}: the keys of its system and no others");
        let mut other = Recipe::default();
        for line in text.lines() {
            let (setting, _) = line.split_once(" # ").unwrap();
            other.set(&setting.trim().replace("= \"", "=").trim_end_matches('"').replace("= ", "=")).unwrap();
        }
        assert_eq!(other, recipe, "{name} by --set");
    }
}

#[test]
fn a_list_of_layers_takes_numbers_and_ranges() {
    let mut recipe = Recipe::load("pr1382").unwrap();
    assert_eq!(recipe.mamba_layers, (0..12).chain(15..18).collect::<Vec<_>>());
    for (text, layers) in [
        ("0-3,5", vec![0, 1, 2, 3, 5]),
        ("7", vec![7]),
        ("", vec![]),
        ("[1, 2]", vec![1, 2]),
        ("4-4, 6", vec![4, 6]),
    ] {
        recipe.set(&format!("mamba_layers={text}")).unwrap();
        assert_eq!(recipe.mamba_layers, layers, "{text}");
    }
    let read = |text: &str| {
        Recipe::from_toml(&format!("system = \"pr1382\"\nmamba_layers = {text}"), Path::new("r.toml"))
    };
    assert_eq!(read("\"0-11,15\"").unwrap().mamba_layers, (0..12).chain([15]).collect::<Vec<_>>());
    assert_eq!(read("[3, 4]").unwrap().mamba_layers, [3, 4]);
    for bad in [
        "\"3-1\"",
        "\"1,1\"",
        "[4, 3]",
        "\"0-99999999999\"",
        "\"0-1-2\"",
        "\"-1\"",
        "[-1]",
        "[1.5]",
        "1024",
        "\"1024\"",
    ] {
        let line = message(read(bad).unwrap_err());
        assert!(
            line.starts_with("mamba_layers = ") && line.contains("different layers from 0 to 1023"),
            "{line}"
        );
    }
}

#[test]
fn a_file_may_start_from_a_built_in_recipe() {
    let read = |text: &str| Recipe::from_toml(text, Path::new("more.toml"));
    let base = Recipe::load("mamba3-hinge").unwrap();
    let recipe = read("base = \"pr1607\"\nrecur_layers = []\nsummary = \"x\"").unwrap();
    assert_eq!(recipe, Recipe { name: "more".into(), summary: "x".into(), recur_layers: vec![], ..base });
    recipe.validate().unwrap();
    for bad in ["base = \"pr9\"", "base = 3", "base = \"more.toml\""] {
        let line = message(read(bad).unwrap_err());
        assert!(line.starts_with("base = ") && line.contains("one of tiny, baseline"), "{line}");
    }
}

#[test]
fn keys_of_another_system_are_refused() {
    let mut recipe = Recipe::load("pr1607").unwrap();
    recipe.set("mamba_d_state=16").unwrap();
    assert_eq!(
        message(recipe.validate().unwrap_err()),
        "mamba_d_state = 16 in system pr1607, recipe mamba3-hinge, expected nothing: the key is of pr1382"
    );
    // Its default says nothing.
    recipe.set("mamba_d_state=32").unwrap();
    recipe.validate().unwrap();
    let line = message(read_baseline("ternary_body = true").validate().unwrap_err());
    assert!(line.starts_with("ternary_body = true in system challenge, "), "{line}");
}

fn read_baseline(text: &str) -> Recipe {
    Recipe::from_toml(text, Path::new("r.toml")).unwrap()
}

#[test]
fn the_pull_requests_own_environments_give_their_recipes() {
    // spec/pr1994.md section 10; spec/pr1607.md section 1; spec/pr1382.md section 1. Each on its system's defaults.
    let cases = [
        (
            "pr1994",
            "NUM_UNIQUE_LAYERS=7 NUM_LOOPS=3 PARALLEL_LAYER_POSITIONS=0,1,2,3,4,5,6 PARALLEL_SSM_TYPE=mamba2_kill \
             MAMBA2_KILL_SELECTIVITY=1 ATTN_LAYER_POSITIONS= MAMBA2_LAYER_POSITIONS= MLP_TYPE=swiglu MLP_MULT=8 \
             TERNARY_BODY=1 EMA_BETA=0.999 EMA_WARMUP_OFFSET= LR_WARMUP_STEPS=30 WARMDOWN_ITERS=1800 WARMUP_STEPS=0 \
             MATRIX_LR=0.045 MUON_BACKEND_STEPS=15 TIED_EMBED_INIT_STD=0.05 MAX_WALLCLOCK_SECONDS=3600 \
             VAL_LOSS_EVERY=0 BIGRAM_VOCAB_SIZE=0 SEED=1337 \
             CONTROL_TENSOR_NAME_PATTERNS=attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights,A_log,A_im,B_proj,C_proj,dt_log,D_skip,dt_bias,delta_bias,conv1d",
        ),
        (
            "pr1382",
            "MAMBA_LAYERS=0-11,15,16,17 NUM_LAYERS=18 MAMBA_D_STATE=32 MAMBA_D_CONV=4 MAMBA_EXPAND=1.5 \
             MAMBA_MATRIX_LR=.015 BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 WARMDOWN_ITERS=3500 TARGET_MB=15.9 SEED=42",
        ),
        (
            "pr1607",
            "NUM_LAYERS=8 NUM_ATTN_LAYERS=1 MAMBA3_D_STATE=64 RECUR_LAYERS=3,4 RECUR_MODE=block RECUR_REPEATS=2 \
             RECUR_START_FRAC=.35 ITERATIONS=1000 TRAIN_BATCH_TOKENS=524288 MAX_WALLCLOCK_SECONDS=0 \
             VAL_LOSS_EVERY=500 EVAL_STRIDE=0 TTT_ENABLED=0 SWEEP_MODE=0",
        ),
    ];
    for (name, env) in cases {
        let mut recipe = Recipe::load(name).unwrap();
        let expected = recipe.clone();
        let vars = env.split_whitespace().map(|var| var.split_once('=').unwrap());
        recipe.apply_env_map(vars).unwrap();
        assert_eq!(recipe, expected, "{name}");
    }
    // And they say something: on the defaults of the system the first is the recipe but for what the script changes.
    let mut recipe = Recipe { system: "pr1994".into(), ..Recipe::default() };
    let vars = cases[0].1.split_whitespace().map(|var| var.split_once('=').unwrap());
    recipe.apply_env_map(vars).unwrap();
    let named = Recipe::load("pr1994").unwrap();
    assert_eq!(recipe, Recipe { name: recipe.name.clone(), summary: recipe.summary.clone(), ..named });
}

#[test]
fn a_bad_set_names_the_key_and_what_it_expects() {
    assert_eq!(
        refused("MATRX_LR=1"),
        "unknown key MATRX_LR, --set, expected a recipe key; the nearest is matrix_lr"
    );
    assert_eq!(refused("matrix_lr"), "no = in matrix_lr, --set, expected key=value");
    assert_eq!(refused("matrix_lr=-0.1"), "matrix_lr = -0.1, --set, expected a number from 0 to 100");
    assert_eq!(refused("num_layers=0"), "num_layers = 0, --set, expected an integer from 1 to 1024");
    assert_eq!(refused("vocab_size=65537"), "vocab_size = 65537, --set, expected an integer from 1 to 65536");
    assert_eq!(refused("beta2=1"), "beta2 = 1, --set, expected a number from 0 to below 1");
    for bad in
        ["seed=-1", "seed=1e3", "seed=", "seed=9223372036854775808", "tie_embeddings=2", "scalar_lr=nan"]
    {
        refused(bad);
    }
    for bad in
        ["logit_softcap=0", "rope_base=inf", "grad_clip_norm=-1", "=", "control_tensor_name_patterns=[1"]
    {
        refused(bad);
    }
    refused(&format!("name={}", "x".repeat(101)));
    refused(&format!("{}=1", "é".repeat(100_000)));
}

#[test]
fn the_int8_list_follows_the_control_list_until_it_is_set_apart() {
    let mut recipe = Recipe::default();
    recipe.set("control_tensor_name_patterns=gate").unwrap();
    assert_eq!(recipe.int8_keep_float_fp32_name_patterns, ["gate"]);
    recipe.set("int8_keep_float_fp32_name_patterns=").unwrap();
    recipe.set("control_tensor_name_patterns=scale").unwrap();
    assert!(recipe.int8_keep_float_fp32_name_patterns.is_empty());
    // One environment states both at once: its order means nothing.
    let mut recipe = Recipe::default();
    let vars = [("INT8_KEEP_FLOAT_FP32_NAME_PATTERNS", "a"), ("CONTROL_TENSOR_NAME_PATTERNS", "b")];
    recipe.apply_env_map(vars).unwrap();
    assert_eq!(recipe.int8_keep_float_fp32_name_patterns, ["a"]);
    assert_eq!(recipe.control_tensor_name_patterns, ["b"]);
}

#[test]
fn the_process_environment_gives_its_known_names() {
    let mut recipe = Recipe::default();
    let vars = [
        ("PATH", "/bin"),
        ("ITERATIONS", "50"),
        ("RUN_ID", "x"),
        ("DATA_PATH", "/d a"),
        ("TOKENIZER_PATH", "t.model"),
        ("TIE_EMBEDDINGS", "0"),
        ("name", "no"),
    ];
    let report = recipe.apply_env_map(vars).unwrap();
    assert_eq!((recipe.iterations, recipe.tie_embeddings, recipe.name.as_str()), (50, false, "baseline"));
    assert_eq!(report.applied, ["TIE_EMBEDDINGS", "ITERATIONS"]);
    assert_eq!(report.data_path.as_deref(), Some(Path::new("/d a")));
    assert_eq!(report.tokenizer_path.as_deref(), Some(Path::new("t.model")));
    assert!(report.warnings.is_empty());

    let error = recipe.apply_env_map([("NUM_HEADS", "2"), ("MATRIX_LR", "fast")]).unwrap_err();
    assert_eq!(
        message(error),
        "matrix_lr = fast, environment variable MATRIX_LR, expected a number from 0 to 100"
    );
    assert_eq!(recipe.num_heads, 8, "a refused environment must change nothing");
}

#[test]
fn protected_rows_are_asked_for_by_flag_file_or_environment() {
    let plain = Recipe::load("pr1607").unwrap();
    assert!(!plain.fp16_inproj_rows && !plain.to_toml().contains("fp16_inproj_rows = true"));
    let expected = Recipe { fp16_inproj_rows: true, ..plain.clone() };
    expected.validate().unwrap();
    let mut set = plain.clone();
    set.set("fp16_inproj_rows=true").unwrap();
    assert_eq!(set, expected);
    assert_eq!(Recipe::from_toml(&set.to_toml(), Path::new("r.toml")).unwrap(), expected);

    let mut from_process = plain.clone();
    let report = from_process.apply_env_map([("FP16_INPROJ_ROWS", "1")]).unwrap();
    assert_eq!((report.applied, from_process), (vec!["FP16_INPROJ_ROWS"], expected.clone()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("env.sh");
    for (value, expected) in [("1", &expected), ("0", &plain)] {
        std::fs::write(&path, format!("export FP16_INPROJ_ROWS={value}\n")).unwrap();
        let mut from_file = plain.clone();
        let report = from_file.apply_env_file(&path).unwrap();
        assert_eq!((report.applied, report.warnings.len()), (vec!["FP16_INPROJ_ROWS"], 0));
        assert_eq!(&from_file, expected);
    }

    // Another system has no such rows.
    let (recipe, report) = from_env_file("FP16_INPROJ_ROWS=1");
    let report = report.unwrap();
    assert!(!recipe.fp16_inproj_rows && report.applied.is_empty());
    assert!(report.warnings[0].ends_with("has no effect in system challenge: it is of pr1607"), "{report:?}");
    let line = message(Recipe { fp16_inproj_rows: true, ..Recipe::default() }.validate().unwrap_err());
    assert!(line.starts_with("fp16_inproj_rows = true in system challenge, "), "{line}");
}

#[cfg(unix)]
#[test]
fn a_known_name_that_is_not_text_is_refused() {
    use std::os::unix::ffi::OsStrExt;
    let bytes = std::ffi::OsStr::from_bytes(&[0xff]);
    let mut recipe = Recipe::default();
    recipe.apply_env_map([("HOME", bytes)]).unwrap();
    let line = message(recipe.apply_env_map([("SEED", bytes)]).unwrap_err());
    assert!(line.starts_with("not UTF-8, environment variable SEED"), "{line}");
}

#[test]
fn an_environment_file_is_read_as_a_shell_reads_it() {
    let (recipe, report) = from_env_file(
        "#!/bin/sh\n\
         # a comment\n\
         \n\
         export ITERATIONS=100 # another\r\n\
         export SEED=1 NUM_LAYERS='4'; MODEL_DIM=\"256\" \\\n\
         CONTROL_TENSOR_NAME_PATTERNS=\"a#b,c d\"'e'\n\
         \tDATA_PATH=/data/with\\ space\n\
         TOKENIZER_PATH='$literal'\n\
         RUN_ID=\n\
         export SEED=42\n\
         MATRIX_LR=2e-2",
    );
    let report = report.unwrap();
    assert_eq!((recipe.iterations, recipe.seed, recipe.num_layers, recipe.model_dim), (100, 42, 4, 256));
    assert_eq!(recipe.matrix_lr, 0.02);
    assert_eq!(recipe.control_tensor_name_patterns, ["a#b", "c de"]);
    assert_eq!(report.data_path.as_deref(), Some(Path::new("/data/with space")));
    assert_eq!(report.tokenizer_path.as_deref(), Some(Path::new("$literal")));
    assert_eq!(report.warnings.len(), 1);
    assert!(
        report.warnings[0].starts_with("RUN_ID (")
            && report.warnings[0].ends_with("env.sh line 9) has no effect here")
    );
    assert_eq!(report.applied.len(), 6);
}

#[test]
fn a_bad_environment_file_names_the_line() {
    let cases = [
        (
            "SEED=1\nITERATION=3",
            "unknown name ITERATION",
            "env.sh line 2, expected a name of the challenge; the nearest is ITERATIONS",
        ),
        (
            "RUN_IDS=3",
            "unknown name RUN_IDS",
            "env.sh line 1, expected a name of the challenge; the nearest is RUN_ID",
        ),
        ("\n\nSEED=x", "seed = x", "env.sh line 3, expected an integer from 0 to 9223372036854775807"),
        ("SEED=1 2", "cannot read 2", "env.sh line 1, expected NAME=value"),
        ("SEED = 1", "cannot read SEED", "env.sh line 1, expected NAME=value"),
        ("torchrun train_gpt.py", "cannot read torchrun", "env.sh line 1, expected NAME=value"),
        ("1A=2", "cannot read 1A=2", "env.sh line 1, expected NAME=value"),
        ("SEED=${SEED:-1}", "cannot expand SEED=${SEED:-1}", "env.sh line 1, expected a literal value"),
        ("SEED='1", "a quote is not closed", "env.sh line 1, expected NAME=value on one line"),
        ("SEED=", "seed = ", "env.sh line 1, expected an integer from 0 to 9223372036854775807"),
        ("name=x", "unknown name name", "env.sh line 1, expected a name of the challenge; the nearest is"),
    ];
    for (text, what, place) in cases {
        let (recipe, report) =
            from_env_file(&format!("NUM_HEADS=4 {}{text}", if text.contains('\n') { "" } else { "\\\n" }));
        let line = report.unwrap_err();
        let place = if text.contains('\n') { place.into() } else { place.replace("line 1", "line 2") };
        assert!(line.starts_with(what) && line.contains(&place), "{text}: {line}");
        assert_eq!(recipe, Recipe::default());
    }
    let missing = Recipe::default().apply_env_file(Path::new("absent.env")).unwrap_err();
    assert!(message(missing).contains("absent.env"));
}

#[test]
fn contradictory_keys_are_named() {
    let check = |assignments: &[&str]| {
        let mut recipe = Recipe::default();
        assignments.iter().for_each(|a| recipe.set(a).unwrap());
        message(recipe.validate().unwrap_err())
    };
    assert_eq!(
        check(&["num_heads=7", "num_kv_heads=7"]),
        "model_dim = 512, recipe baseline, expected a multiple of num_heads = 7"
    );
    assert_eq!(
        check(&["num_kv_heads=3"]),
        "num_heads = 8, recipe baseline, expected a multiple of num_kv_heads = 3"
    );
    check(&["num_kv_heads=16"]);
    assert_eq!(
        check(&["model_dim=8"]),
        "rotated channels of an attention head = 1, recipe baseline, expected a multiple of RoPE's pairs = 2"
    );
    assert_eq!(
        check(&["train_seq_len=1000"]),
        "train_batch_tokens = 524288, recipe baseline, expected a multiple of grad_accum_steps * train_seq_len = 8000"
    );
    assert_eq!(
        check(&["val_batch_size=8191"]),
        "val_batch_size = 8191, recipe baseline, expected at least grad_accum_steps * train_seq_len = 8192"
    );
    let mut recipe = Recipe::default();
    ["model_dim=16384", "num_layers=1024"].iter().for_each(|a| recipe.set(a).unwrap());
    let line = message(fairway::model::check(&recipe).unwrap_err());
    assert!(line.contains("parameters by its sizes") && line.ends_with("at most 1000000000"), "{line}");
}

#[test]
fn fields_written_directly_are_checked_too() {
    let bad: [fn(&mut Recipe); 8] = [
        |r| r.num_layers = 0,
        |r| r.num_heads = 0,
        |r| r.grad_accum_steps = usize::MAX,
        |r| r.matrix_lr = f64::NAN,
        |r| r.beta1 = 1.0,
        |r| r.seed = u64::MAX,
        |r| r.name = "a\u{7}b".into(),
        |r| r.control_tensor_name_patterns = vec![String::new()],
    ];
    for change in bad {
        let mut recipe = Recipe::default();
        change(&mut recipe);
        message(recipe.validate().unwrap_err());
    }
}

#[test]
fn a_recipe_in_json_refuses_what_it_does_not_know() {
    let recipe: Recipe = serde_json::from_str("{\"num_layers\": 3}").unwrap();
    assert_eq!(recipe, Recipe { num_layers: 3, ..Recipe::default() });
    let text = serde_json::to_string(&recipe).unwrap();
    assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
    assert!(serde_json::from_str::<Recipe>("{\"layers\": 3}").is_err());
    assert!(serde_json::from_str::<Recipe>("{\"num_layers\": -3}").is_err());
}

#[test]
fn keys_describe_themselves() {
    let by_name = |name| keys().iter().find(|key| key.name == name).unwrap();
    let lr = by_name("matrix_lr");
    assert_eq!(
        (lr.kind, lr.env, lr.expected().as_str()),
        (Kind::Float, Some("MATRIX_LR"), "a number from 0 to 100")
    );
    assert_eq!(lr.value(&Recipe::default()), Value::Float(0.04));
    assert_eq!(by_name("as_written").env, None);
    for key in keys() {
        assert!(key.admits(&key.value(&Recipe::default())), "{}", key.name);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_admitted_float_survives_toml(lr in 0.0f64..100.0, bits in any::<u64>()) {
        let eps = f64::from_bits(bits);
        let mut recipe = Recipe { matrix_lr: lr, ..Recipe::default() };
        if eps > 0.0 && eps <= 1.0 {
            recipe.adam_eps = eps;
        }
        recipe.validate().unwrap();
        prop_assert_eq!(Recipe::from_toml(&recipe.to_toml(), Path::new("r.toml")).unwrap(), recipe);
    }

    #[test]
    fn no_text_makes_a_reader_panic(text in "(?s)([a-z_]{0,12}|[A-Z_]{0,12}|SEED|seed|=|'|\"|\\\\|#|;| |\n|\\[|.){0,12}") {
        let _ = Recipe::from_toml(&text, Path::new("x.toml"));
        let _ = Recipe::default().set(&text);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("e");
        std::fs::write(&path, &text).unwrap();
        let _ = Recipe::default().apply_env_file(&path);
        let _ = fairway::train::log::Metrics::read(&path);
    }
}
