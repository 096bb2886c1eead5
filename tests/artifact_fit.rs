//! An artifact fitted into a budget: the codec, the pruned codes and their costs, and what cannot be met.

mod artifact_common;

use artifact_common::{Rng, sample};
use fairway::artifact::fit::{CODECS, Limit, SLACK, fit};
use fairway::artifact::{Artifact, Codec, Fitted};
use fairway::error::Result;
use fairway::host::HostTensor;
use fairway::quant::gptq::output_loss;
use fairway::quant::{Candidates, Context, Cost, Export, Hessians, QuantTensor, quantize_by};

const CODE: u64 = 1000;

/// Matrices of a small model, and the Hessian of one of them.
fn live() -> (Vec<HostTensor>, Hessians) {
    let mut rng = Rng(17);
    let live = vec![
        rng.tensor("blocks.0.attn.c_q.weight", &[260, 256], 0.0, 0.5),
        rng.tensor("blocks.0.mlp.fc.weight", &[256, 260], 0.0, 0.1),
        rng.tensor("blocks.0.attn_scale", &[64], 1.0, 0.1),
    ];
    let n = 256;
    let mut hessian = vec![0.0; n * n];
    for _ in 0..300 {
        let x: Vec<f64> = (0..n).map(|i| f64::from(rng.normal()) * (1.0 + i as f64 / 64.0)).collect();
        for i in 0..n {
            (0..n).for_each(|j| hessian[i * n + j] += x[i] * x[j] / 300.0);
        }
    }
    (0..n).for_each(|i| hessian[i * n + i] += 0.05);
    (live, [("blocks.0.attn.c_q.weight".to_owned(), hessian)].into())
}

struct Model {
    live: Vec<HostTensor>,
    hessians: Hessians,
    artifact: Artifact,
}

fn model(bits: u32) -> Model {
    let (live, hessians) = live();
    let context =
        Context { hessians: hessians.clone(), controls: vec!["attn_scale".into()], ..Context::default() };
    let tensors = quantize_by(Export::Own { bits }, &live, &context).unwrap();
    Model { live, hessians, artifact: Artifact { tensors, ..sample() } }
}

impl Model {
    fn limit(&self, budget: u64, codec: Option<Codec>) -> Limit<'_> {
        Limit {
            budget,
            code_bytes: CODE,
            codec,
            live: &self.live,
            hessians: &self.hessians,
            cost: Cost::Error,
        }
    }

    fn fit(&self, budget: u64, codec: Option<Codec>) -> Result<Fitted> {
        fit(self.artifact.clone(), &self.limit(budget, codec), &mut |_| Ok(()))
    }

    fn candidates(&self) -> Candidates {
        Candidates::of(&self.live, &self.artifact.tensors, &self.hessians, Cost::Error).unwrap()
    }
}

#[test]
fn what_fits_is_left_as_it_is() {
    let model = model(6);
    let (file, sizes) = model.artifact.pack(Codec::Brotli).unwrap();
    let fitted = model.fit(sizes.bytes + CODE, None).unwrap();
    assert_eq!((fitted.codec, fitted.pruned, fitted.tried.len()), (Codec::Brotli, None, 1));
    assert_eq!((fitted.file, fitted.sizes), (file, sizes));
    assert_eq!(fitted.artifact, model.artifact);
}

#[test]
fn pruning_is_nearly_the_least_that_fits() {
    let model = model(4);
    let codec = Codec::Zlib;
    let whole = model.artifact.pack(codec).unwrap().1.bytes;
    for cut in [1, 300, whole / 50, whole / 12] {
        let budget = whole - cut + CODE;
        let fitted = model.fit(budget, Some(codec)).unwrap();
        let pruned = fitted.pruned.unwrap();
        println!("{whole} bytes - {cut}: {} of {} codes", pruned.codes, pruned.candidates);
        assert!(fitted.sizes.bytes + CODE <= budget);
        assert_eq!(fitted.sizes.bytes as usize, fitted.file.len());
        // It is what the candidates say.
        let candidates = model.candidates();
        assert_eq!(candidates.len(), pruned.candidates);
        assert_eq!(fitted.artifact.tensors, candidates.prune(&model.artifact.tensors, pruned.codes));
        assert!(0 < pruned.codes && pruned.codes <= pruned.candidates);
        // Nearly all of the room is used, or a step of the search less does not fit. (The note's number can be a digit longer.)
        let room = budget - CODE;
        let fewer = pruned.codes.saturating_sub(candidates.len().div_ceil(4096));
        let less = Artifact {
            tensors: candidates.prune(&model.artifact.tensors, fewer),
            notes: fitted.artifact.notes.clone(),
            ..model.artifact.clone()
        };
        let less = less.pack(codec).unwrap().1.bytes;
        let spare = room - fitted.sizes.bytes;
        assert!(spare <= room / SLACK || less + 4 > room, "{fewer} codes would do: {less} in {room}");
        // It reads back, and says what was done.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.fwy");
        std::fs::write(&path, &fitted.file).unwrap();
        let read = Artifact::read(&path).unwrap();
        assert_eq!(read, fitted.artifact);
        assert!(read.notes["pruned"].starts_with(&format!("{} of ", pruned.codes)));
        let changed = |a: &QuantTensor, b: &QuantTensor| {
            a.parts[0].bytes.iter().zip(&b.parts[0].bytes).filter(|(a, b)| a != b).count()
        };
        let all: usize = model.artifact.tensors.iter().zip(&read.tensors).map(|(a, b)| changed(a, b)).sum();
        assert_eq!(all, pruned.codes);
    }
}

#[test]
fn the_smallest_codec_is_taken_before_anything_is_pruned() {
    let model = model(6);
    let sizes = CODECS.map(|codec| (codec, model.artifact.pack(codec).unwrap().1.bytes));
    let &(smallest, least) = sizes.iter().min_by_key(|(_, bytes)| *bytes).unwrap();
    let fitted = model.fit(least - 200 + CODE, None).unwrap();
    assert_eq!((fitted.tried.as_slice(), fitted.codec), (&sizes[..], smallest));
    assert!(fitted.pruned.unwrap().codes > 0);
}

#[test]
fn a_budget_that_cannot_be_met_names_one_that_can() {
    let model = model(6);
    let line = model.fit(5000, Some(Codec::Zstd)).unwrap_err();
    assert_eq!(line.exit_code(), 2);
    let line = line.to_string();
    assert!(line.contains("--budget") && line.contains("zstd") && !line.contains('\n'), "{line}");
    let named = line.split("at least ").nth(1).and_then(|rest| rest.split(':').next()).unwrap();
    let named: u64 = named.parse().unwrap();
    let fitted = model.fit(named, Some(Codec::Zstd)).unwrap();
    assert!(fitted.sizes.bytes + CODE <= named);
    // Nothing but code fits in this one; and floats have no codes to prune.
    assert_eq!(model.fit(CODE - 1, Some(Codec::Zlib)).unwrap_err().exit_code(), 2);
    let tensors = quantize_by(Export::Fp16, &model.live, &Context::default()).unwrap();
    let floats = Model { artifact: Artifact { tensors, ..sample() }, ..model };
    let line = floats.fit(9000, Some(Codec::Zlib)).unwrap_err().to_string();
    assert!(line.contains("no codes to prune"), "{line}");
}

#[test]
fn fitting_does_not_depend_on_threads_and_stops_when_told() {
    let model = model(5);
    let whole = model.artifact.pack(Codec::Zstd).unwrap().1.bytes;
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| model.fit(whole - 500 + CODE, Some(Codec::Zstd)).unwrap())
    };
    let fitted = on(1);
    assert_eq!(fitted, on(3));
    assert_eq!(fitted, on(3));
    let mut lines = Vec::new();
    let stopped =
        fit(model.artifact.clone(), &model.limit(whole - 500 + CODE, Some(Codec::Zstd)), &mut |line| {
            lines.push(line.to_owned());
            if lines.len() == 2 {
                return Err(fairway::error::Error::Interrupted { place: "here".into() });
            }
            Ok(())
        });
    assert_eq!(stopped.unwrap_err().exit_code(), 130);
    assert!(lines[0].starts_with("zstd: ") && lines[1].contains("codes pruned"), "{lines:?}");
}

#[test]
fn costs_are_the_changes_of_the_error() {
    let mut model = model(3);
    model.artifact.tensors.truncate(1);
    let stored = &model.artifact.tensors;
    let weights = model.live[0].to_f32();
    let hessian = &model.hessians[&model.live[0].name];
    let loss =
        |tensors: &[QuantTensor]| output_loss(&weights, &tensors[0].dequantize().unwrap().to_f32(), hessian);
    let before = loss(stored);
    let candidates = model.candidates();
    assert!(candidates.len() > 10_000);
    let mut last = f64::NEG_INFINITY;
    for count in [1, 2, 3] {
        let predicted = candidates.cost(count) - candidates.cost(count - 1);
        let change = loss(&candidates.prune(stored, count)) - loss(&candidates.prune(stored, count - 1));
        if count == 1 {
            // One code alone: exactly what is predicted. (Later ones can share a row.)
            assert!((change - predicted).abs() < 1e-6 * before, "{change} {predicted}");
        }
        assert!(predicted >= last);
        last = predicted;
    }
    // Without a Hessian: the plain squared error, every code by itself, so that all of them add up.
    let plain = Candidates::of(&model.live, stored, &Hessians::new(), Cost::Error).unwrap();
    let squared = |tensors: &[QuantTensor]| -> f64 {
        let restored = tensors[0].dequantize().unwrap().to_f32();
        weights.iter().zip(&restored).map(|(w, r)| (f64::from(*w) - f64::from(*r)).powi(2)).sum()
    };
    for count in [1, 500, plain.len()] {
        let change = squared(&plain.prune(stored, count)) - squared(stored);
        assert!((change - plain.cost(count)).abs() < 1e-6 * (1.0 + change.abs()), "{count}: {change}");
    }
    // What the codes' entropy falls by.
    let entropy = |count: usize| {
        let mut counts = [0usize; 256];
        candidates.prune(stored, count)[0].parts[0]
            .bytes
            .iter()
            .for_each(|&code| counts[usize::from(code)] += 1);
        let all: usize = counts.iter().sum();
        let bits = |&n: &usize| if n > 0 { n as f64 * (all as f64 / n as f64).log2() } else { 0.0 };
        counts.iter().map(bits).sum::<f64>() / 8.0
    };
    let savings = candidates.savings(stored, 1000);
    assert_eq!(savings.len(), candidates.len().div_ceil(1000) + 1);
    for (at, saved) in savings.iter().enumerate() {
        let expected = entropy(0) - entropy((1000 * at).min(candidates.len()));
        assert!((saved - expected).abs() < 1e-6 * entropy(0), "{at}: {saved} {expected}");
    }
    // By Hessian is better for the layer's output than by plain error, and both than the other way round.
    let half = candidates.len() / 2;
    let by_hessian = loss(&candidates.prune(stored, half));
    let by_error = loss(&plain.prune(stored, half));
    println!("output loss {before:.4}; half pruned by Hessian {by_hessian:.4}, by plain error {by_error:.4}");
    assert!(by_hessian < by_error);
}

#[test]
fn pr_1382_prunes_by_the_step_in_the_order_of_the_state_dict() {
    let mut rng = Rng(4);
    // Steps at the floor of 1/31 but for two rows.
    let mut a = rng.tensor("blocks.0.mlp.fc.weight", &[256, 260], 0.0, 0.05).to_f32();
    a[..260].iter_mut().for_each(|w| *w *= 40.0);
    let live = vec![
        HostTensor::from_f32("blocks.0.mlp.fc.weight", &[256, 260], &a),
        rng.tensor("tok_emb.weight", &[300, 256], 0.0, 0.05),
        rng.tensor("blocks.1.mlp.fc.weight", &[256, 260], 0.0, 0.05),
    ];
    let stored = quantize_by(Export::Pr1382, &live, &Context::default()).unwrap();
    let candidates = Candidates::of(&live, &stored, &Hessians::new(), Cost::Step).unwrap();
    let ones = |t: usize, from: usize| {
        stored[t].parts[0]
            .bytes
            .iter()
            .enumerate()
            .skip(from)
            .filter(|(_, c)| matches!(c, 1 | 255))
            .map(|(i, _)| i)
            .collect::<Vec<_>>()
    };
    // The embedding is of 8 bits and stays.
    assert_eq!(candidates.len(), ones(0, 0).len() + ones(2, 0).len());
    let floored = ones(0, 260);
    let pruned = candidates.prune(&stored, floored.len() + 3);
    assert!(floored.iter().all(|&i| pruned[0].parts[0].bytes[i] == 0));
    assert!(ones(0, 0).iter().filter(|i| **i < 260).all(|&i| pruned[0].parts[0].bytes[i] != 0));
    let second = ones(2, 0);
    assert!(second[..3].iter().all(|&i| pruned[2].parts[0].bytes[i] == 0));
    assert!(second[3..].iter().all(|&i| pruned[2].parts[0].bytes[i] != 0));
    assert_eq!(pruned[1], stored[1]);
}
