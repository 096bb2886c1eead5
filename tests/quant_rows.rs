//! Protected rows: B, dd_dt, dd_A and trap of Mamba-3's in_proj as float16, the other rows coded as without protection.

mod artifact_common;

use artifact_common::Rng;
use burn::tensor::DType;
use fairway::artifact::assemble::{Prepared, layout};
use fairway::artifact::fit::{Limit, fit};
use fairway::artifact::{Artifact, Codec};
use fairway::backend::cpu::Cpu;
use fairway::data::tokenizer::Tokenizer;
use fairway::host::HostTensor;
use fairway::model::plan::Plan;
use fairway::model::{self, Model};
use fairway::quant::{Candidates, Cost, Hessians, QuantTensor, Scheme, Storage};
use fairway::recipe::{BuiltIn, PR1607, Recipe};
use half::f16;
use std::ops::Range;

const COLS: usize = 128;
/// Rows of z, x: 512; B, C: 16 each; dd_dt, dd_A, trap: 8 each; angle: 4.
const ROWS: usize = 572;
const PROTECTED: [Range<usize>; 2] = [512..528, 544..568];
const PARTS: [(Range<usize>, bool); 5] =
    [(0..512, false), (512..528, true), (528..544, false), (544..568, true), (568..572, false)];
const IN_PROJ: [&str; 2] = ["blocks.0.mamba3.mamba3.in_proj.weight", "blocks.1.mamba3.mamba3.in_proj.weight"];

/// Two Mamba-3 blocks and one of attention; in_proj and the MLPs are large enough to be coded.
fn recipe(protected: bool, as_written: bool) -> Recipe {
    Recipe {
        system: PR1607.into(),
        as_written,
        vocab_size: 260,
        num_layers: 3,
        model_dim: COLS,
        num_heads: 4,
        num_kv_heads: 2,
        mlp_mult: 5.0,
        mlp_type: "leaky_relu2".into(),
        mamba3_headdim: 32,
        mamba3_d_state: 16,
        bigram_buckets: 31,
        bigram_hash_dim: 8,
        fp16_inproj_rows: protected,
        ..Recipe::default()
    }
}

fn params(recipe: &Recipe) -> Vec<HostTensor> {
    let mut rng = Rng(41);
    let shapes = model::layout(recipe).unwrap();
    assert!(IN_PROJ.iter().all(|name| shapes.contains(&(name.to_string(), vec![ROWS, COLS]))));
    shapes.iter().map(|(name, shape)| rng.tensor(name, shape, 0.0, 0.1)).collect()
}

/// The Hessian of correlated inputs of a matrix.
fn hessians(name: &str) -> Hessians {
    let mut rng = Rng(43);
    let mut hessian = vec![0.0; COLS * COLS];
    for _ in 0..200 {
        let common = rng.normal();
        let x: Vec<f64> =
            (0..COLS).map(|i| f64::from(rng.normal() + common) * (0.5 + i as f64 / 64.0)).collect();
        for i in 0..COLS {
            (0..COLS).for_each(|j| hessian[i * COLS + j] += x[i] * x[j] / 200.0);
        }
    }
    (0..COLS).for_each(|i| hessian[i * COLS + i] += 0.05);
    Hessians::from([(name.to_owned(), hessian)])
}

fn prepared(recipe: &Recipe, scheme: &str) -> Prepared {
    Prepared::new(recipe, &params(recipe), scheme.parse().unwrap()).unwrap()
}

fn artifact(prepared: &Prepared) -> Artifact {
    prepared.artifact(&Tokenizer::byte()).unwrap()
}

fn part_name(whole: &str, rows: &Range<usize>) -> String {
    format!("{whole}[{}:{}]", rows.start, rows.end)
}

fn find<'a>(tensors: &'a [QuantTensor], name: &str) -> &'a QuantTensor {
    tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}"))
}

fn live<'a>(tensors: &'a [HostTensor], name: &str) -> &'a HostTensor {
    tensors.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no {name}"))
}

fn of_rows<'a, T>(values: &'a [T], rows: &Range<usize>) -> &'a [T] {
    &values[rows.start * COLS..rows.end * COLS]
}

fn codes(tensor: &QuantTensor) -> Vec<i8> {
    let bytes = &tensor.parts[0].bytes;
    match tensor.storage {
        Storage::Ternary(packing) => packing.unpack(bytes, tensor.shape.iter().product()).unwrap(),
        _ => bytes.iter().map(|code| code.cast_signed()).collect(),
    }
}

fn in_float16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&value| f16::from_f32(value).to_f32()).collect()
}

#[test]
fn protected_rows_are_float16_and_the_others_are_coded_as_without() {
    let own = (2..8).map(|bits| (format!("int{bits}"), false));
    let gptq = (2..9).map(|bits| (format!("gptq-int{bits}"), false));
    let others = [("ternary", false), ("int6", true), ("gptq-int6", true)];
    let others = others.map(|(scheme, as_written)| (scheme.to_owned(), as_written));
    for (scheme, as_written) in own.chain(gptq).chain(others) {
        let of = |protected: bool| {
            let prepared = prepared(&recipe(protected, as_written), &scheme);
            assert!(prepared.takes_hessian(IN_PROJ[0]) == (scheme != "ternary"), "{scheme}");
            assert!(!prepared.takes_hessian(&part_name(IN_PROJ[0], &PROTECTED[0])));
            // The second block has no Hessian: its codes are searched for.
            let hessians = if scheme.starts_with("gptq") { hessians(IN_PROJ[0]) } else { Hessians::new() };
            artifact(&prepared.with_hessians(hessians)).tensors
        };
        let (without, with) = (of(false), of(true));
        assert_eq!(with.len(), without.len() + IN_PROJ.len() * (PARTS.len() - 1), "{scheme}");
        let weights = params(&recipe(true, as_written));
        for whole in &without {
            if !IN_PROJ.contains(&whole.name.as_str()) {
                assert_eq!(find(&with, &whole.name), whole, "{scheme}");
                continue;
            }
            assert!(whole.storage.is_coded() && with.iter().all(|tensor| tensor.name != whole.name));
            let (all_codes, restored) = (codes(whole), whole.dequantize().unwrap().to_f32());
            let weights = live(&weights, &whole.name).to_f32();
            for (rows, protected) in &PARTS {
                let part = find(&with, &part_name(&whole.name, rows));
                let got = part.dequantize().unwrap();
                assert_eq!(
                    (got.shape.as_slice(), got.dtype),
                    ([rows.len(), COLS].as_slice(), whole.original)
                );
                let got = got.to_f32();
                if *protected {
                    assert_eq!(part.storage, Storage::F16);
                    assert_eq!(got, in_float16(of_rows(&weights, rows)), "{scheme} {rows:?}");
                    continue;
                }
                assert_eq!(part.storage, whole.storage, "{scheme} {rows:?}");
                assert_eq!(codes(part), of_rows(&all_codes, rows), "{scheme} {rows:?}");
                if let Storage::Ternary(_) = whole.storage {
                    let is_near = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() * 3e-7;
                    assert!(got.iter().zip(of_rows(&restored, rows)).all(is_near), "{rows:?}");
                } else {
                    let scales = &whole.parts[1].bytes[2 * rows.start..2 * rows.end];
                    assert_eq!(part.parts[1].bytes, scales, "{scheme} {rows:?}");
                    assert_eq!(got, of_rows(&restored, rows), "{scheme} {rows:?}");
                }
            }
        }
    }
}

#[test]
fn gptq_of_divided_matrices_uses_the_hessian_of_the_whole() {
    let prepared = |hessians: Hessians| prepared(&recipe(true, false), "gptq-int4").with_hessians(hessians);
    let (with, without) = (artifact(&prepared(hessians(IN_PROJ[0]))), artifact(&prepared(Hessians::new())));
    for (name, is_other) in [(IN_PROJ[0], true), (IN_PROJ[1], false)] {
        let part = part_name(name, &PARTS[0].0);
        assert_eq!(find(&with.tensors, &part) != find(&without.tensors, &part), is_other, "{name}");
    }
}

#[test]
fn forms_without_codes_and_the_challenges_int8_stay_whole() {
    for scheme in ["fp16", "int8"] {
        let [with, without] =
            [true, false].map(|protected| artifact(&prepared(&recipe(protected, false), scheme)));
        assert_eq!(with.tensors, without.tensors, "{scheme}");
        let contents = with.contents("here").unwrap();
        assert!(contents.params.iter().any(|param| param.name == IN_PROJ[0]));
    }
    // So do matrices too small to be coded.
    let small = Recipe { model_dim: 64, ..recipe(true, false) };
    let mut rng = Rng(3);
    let shapes = model::layout(&small).unwrap();
    let params: Vec<HostTensor> =
        shapes.iter().map(|(name, shape)| rng.tensor(name, shape, 0.0, 0.1)).collect();
    let stored = Artifact::assemble(&small, &Tokenizer::byte(), &params, Scheme::Int(6)).unwrap();
    assert_eq!(find(&stored.tensors, IN_PROJ[0]).storage, Storage::F16);
    assert!(stored.tensors.iter().all(|tensor| !tensor.name.contains('[')));
}

#[test]
fn an_artifact_with_protected_rows_is_written_inspected_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.fwy");
    for (scheme, as_written, dtype) in
        [("int6", false, "int6/row"), ("int6", true, "int6/row"), ("ternary", false, "ternary/5trit")]
    {
        let recipe = recipe(true, as_written);
        let artifact = artifact(&prepared(&recipe, scheme));
        for (name, codec) in Codec::ALL {
            artifact.write(&path, codec).unwrap();
            assert_eq!(Artifact::read(&path).unwrap(), artifact, "{scheme} {name}");
        }
        let seen = Artifact::inspect(&path).unwrap();
        let brief: Vec<_> = seen
            .tensors
            .iter()
            .filter(|row| row.name.starts_with(IN_PROJ[1]))
            .map(|row| (row.name.clone(), row.shape.clone(), row.dtype.as_str()))
            .collect();
        let expected = PARTS.map(|(rows, protected)| {
            let dtype = if protected { "f16" } else { dtype };
            (part_name(IN_PROJ[1], &rows), vec![rows.len(), COLS], dtype)
        });
        assert_eq!(brief, expected);
        let shapes = model::layout(&recipe).unwrap();
        assert_eq!(layout(&recipe, &seen.tensors, "here").unwrap(), shapes);
        assert_eq!(seen.params, model::param_count(&recipe).unwrap());

        let contents = Artifact::read(&path).unwrap().contents("here").unwrap();
        assert!(contents.recipe.fp16_inproj_rows);
        let read: Vec<_> =
            contents.params.iter().map(|param| (param.name.clone(), param.shape.clone())).collect();
        assert_eq!(read, shapes);
        let device = burn_ndarray::NdArrayDevice::Cpu;
        let model = Model::<Cpu>::new(&contents.recipe, &device, DType::F64).unwrap();
        model.params().load(&contents.params, "here").unwrap();
        let loaded = model.params().to_host().unwrap();
        let weights = params(&recipe);
        for name in IN_PROJ {
            let loaded = live(&loaded, name).to_f32();
            assert_eq!(loaded, live(&contents.params, name).to_f32());
            for (rows, protected) in PARTS {
                let part = find(&artifact.tensors, &part_name(name, &rows)).dequantize().unwrap().to_f32();
                assert_eq!(of_rows(&loaded, &rows), part, "{scheme} {rows:?}");
                if protected {
                    assert_eq!(part, in_float16(of_rows(&live(&weights, name).to_f32(), &rows)));
                }
            }
        }
    }
}

#[test]
fn losses_and_pruning_know_the_parts() {
    let prepared = prepared(&recipe(true, false), "gptq-int6").with_hessians(hessians(IN_PROJ[0]));
    let stored = artifact(&prepared);
    let losses = prepared.losses(&stored).unwrap();
    let names: Vec<&str> = stored.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(losses.iter().map(|loss| loss.name.as_str()).collect::<Vec<_>>(), names);
    for (rows, protected) in &PARTS {
        let of = |whole: &str| losses.iter().find(|loss| loss.name == part_name(whole, rows)).unwrap();
        let (first, second) = (of(IN_PROJ[0]), of(IN_PROJ[1]));
        let output = first.relative_output.unwrap();
        assert!(second.relative_output.is_none());
        // A code's step is 6 sigma / 62, float16's error at most 2^-11 of each weight.
        let limit = if *protected { 0.0..0.0005 } else { 0.01..0.1 };
        assert!(limit.contains(&first.relative) && limit.contains(&second.relative), "{first:?} {second:?}");
        assert!(output > 0.0 && output < limit.end, "{first:?}");
    }

    let (live_parts, hessians) = (prepared.params(), prepared.hessians());
    let candidates = Candidates::of(live_parts, &stored.tensors, hessians, Cost::Error).unwrap();
    let is_prunable =
        |tensor: &&QuantTensor| tensor.storage.is_coded() && !matches!(tensor.storage, Storage::Ternary(_));
    let ones = |tensor: &QuantTensor| codes(tensor).iter().filter(|code| code.unsigned_abs() == 1).count();
    assert_eq!(candidates.len(), stored.tensors.iter().filter(is_prunable).map(ones).sum::<usize>());
    let pruned = candidates.prune(&stored.tensors, candidates.len());
    for (before, after) in stored.tensors.iter().zip(&pruned) {
        if is_prunable(&before) {
            assert_eq!(ones(after), 0, "{}", after.name);
        } else {
            assert_eq!(before, after);
        }
    }
    // The costs of a part are by its matrix's Hessian.
    let name = part_name(IN_PROJ[0], &PARTS[0].0);
    let (live, part) = (live(live_parts, &name).clone(), find(&stored.tensors, &name).clone());
    let cost = |hessians: &Hessians| {
        let (live, part) = (std::slice::from_ref(&live), std::slice::from_ref(&part));
        let candidates = Candidates::of(live, part, hessians, Cost::Error).unwrap();
        candidates.cost(candidates.len())
    };
    let by_own = Hessians::from([(name.clone(), hessians[IN_PROJ[0]].clone())]);
    assert_eq!(cost(hessians), cost(&by_own));
    assert_ne!(cost(hessians), cost(&Hessians::from([("other".to_owned(), hessians[IN_PROJ[0]].clone())])));

    let whole = stored.pack(Codec::Zlib).unwrap().1.bytes;
    let limit = Limit {
        budget: whole - 500,
        code_bytes: 0,
        codec: Some(Codec::Zlib),
        live: live_parts,
        hessians,
        cost: prepared.cost(),
    };
    let fitted = fit(stored.clone(), &limit, &mut |_| Ok(())).unwrap();
    assert!(fitted.sizes.bytes <= whole - 500 && fitted.pruned.is_some());
    for rows in PROTECTED {
        let name = part_name(IN_PROJ[1], &rows);
        assert_eq!(find(&fitted.artifact.tensors, &name), find(&stored.tensors, &name));
    }
    fitted.artifact.contents("here").unwrap();
}

#[test]
fn hostile_parts_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.fwy");
    let recipe = recipe(true, false);
    let good = artifact(&prepared(&recipe, "int6"));
    let whole = artifact(&prepared(&Recipe { fp16_inproj_rows: false, ..recipe.clone() }, "int6"));
    let whole = find(&whole.tensors, IN_PROJ[0]);
    let at = |tensors: &[QuantTensor], part: usize| {
        let name = part_name(IN_PROJ[0], &PARTS[part].0);
        tensors.iter().position(|tensor| tensor.name == name).unwrap()
    };
    // As the file's table shows it, and as scoring reads it.
    let refused = |what: &str, expected: &str, change: &dyn Fn(&mut Vec<QuantTensor>)| {
        let mut bad = good.clone();
        change(&mut bad.tensors);
        bad.write(&path, Codec::Zlib).unwrap();
        let seen = Artifact::inspect(&path).unwrap();
        let error = layout(&recipe, &seen.tensors, "here").unwrap_err();
        assert_eq!(error.exit_code(), 2, "{what}");
        assert!(error.to_string().contains(expected), "{what}: {error}");
        let error = Artifact::read(&path).unwrap().contents("here").unwrap_err();
        assert_eq!(error.exit_code(), 2, "{what}");
        assert!(error.to_string().contains("here"), "{what}: {error}");
    };
    for part in 0..4 {
        refused("a part missing", "in their order", &|tensors| drop(tensors.remove(at(tensors, part))));
        // Its elements in another tensor: their number is right.
        refused("a part of another name", "in their order", &|tensors| {
            let at = at(tensors, part);
            tensors[at].name = "other".into();
        });
    }
    refused("the last part missing", "without its rows from 568 on", &|tensors| {
        drop(tensors.remove(at(tensors, 4)));
    });
    refused("parts in another order", "in their order", &|tensors| {
        let (a, b) = (at(tensors, 1), at(tensors, 2));
        tensors.swap(a, b);
    });
    refused("a part of other rows", "expected 16 rows", &|tensors| {
        let at = at(tensors, 1);
        tensors[at].shape = vec![COLS, 16];
        tensors[at].parts[0].shape = vec![COLS, 16];
    });
    refused("a part of another rank", "of the same columns", &|tensors| {
        let at = at(tensors, 1);
        tensors[at].shape = vec![16, 16, 8];
        tensors[at].parts[0].shape = vec![16, 16, 8];
    });
    refused("whole and in parts", "not both", &|tensors| tensors.push(whole.clone()));
    refused("whole in the place of a part", "not both", &|tensors| {
        let at = at(tensors, 0);
        tensors[at] = whole.clone();
    });

    // Whole matrices are read under the key, but parts are not without it.
    let mut undivided = good.clone();
    undivided.tensors.retain(|tensor| !tensor.name.starts_with(IN_PROJ[0]));
    undivided.tensors.push(whole.clone());
    assert!(undivided.contents("here").unwrap().params.iter().any(|param| param.name == IN_PROJ[0]));
    let without = Recipe { fp16_inproj_rows: false, ..recipe.clone() };
    let contents = Artifact { recipe_toml: without.to_toml(), ..good.clone() }.contents("here").unwrap();
    let device = burn_ndarray::NdArrayDevice::Cpu;
    let model = Model::<Cpu>::new(&contents.recipe, &device, DType::F64).unwrap();
    let error = model.params().load(&contents.params, "here").unwrap_err();
    assert!(
        error.to_string().starts_with("unknown tensor blocks.0.mamba3.mamba3.in_proj.weight[0:512]"),
        "{error}"
    );
}

#[test]
fn the_protected_rows_of_the_full_size_model_cost_400_kb() {
    // spec/pr1607.md section 2: [z 1024 | x 1024 | B 64 | C 64 | dd_dt 16 | dd_A 16 | trap 16 | angle 16].
    let plain = BuiltIn::find(PR1607).unwrap().recipe().unwrap();
    assert!(!plain.fp16_inproj_rows && Plan::of(&plain).unwrap().protected.is_empty());
    let recipe = Recipe { fp16_inproj_rows: true, ..plain.clone() };
    let protected = Plan::of(&recipe).unwrap().protected;
    assert_eq!(protected.len(), 7);
    assert!(protected.iter().all(|matrix| matrix.rows == 2240 && matrix.ranges == [2048..2112, 2176..2224]));
    // Two groups have two rows of B for each channel of the state.
    let groups = Recipe { mamba3_ngroups: 2, ..recipe.clone() };
    assert_eq!(Plan::of(&groups).unwrap().protected[0].ranges, [2048..2176, 2304..2352]);

    let name = protected[6].name.clone();
    let params = [HostTensor::from_f32(name, &[2240, 512], &vec![0.01; 2240 * 512])];
    let payload = |recipe: &Recipe| {
        let prepared = Prepared::new(recipe, &params, Scheme::Int(6)).unwrap();
        artifact(&prepared).stats().payload_bytes
    };
    // Of 112 rows each two bytes an element instead of one, and no scale.
    assert_eq!(payload(&recipe) - payload(&plain), 112 * (512 - 2));
    assert_eq!(7 * 112 * (512 - 2), 399_840);
}
