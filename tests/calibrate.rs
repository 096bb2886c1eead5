//! Calibration: what a model writes for it, the Hessians over that, and training data in its place.

mod common;
mod eval_common;
mod hybrids_common;

use burn::tensor::Tensor;
use common::all_pass;
use eval_common::{losses, model_in_bf16, model_on, row};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{DeviceChoice, Job, Precision, Target, resolve};
use fairway::calibrate::collect::collect;
use fairway::calibrate::generate::generate;
use fairway::calibrate::{self, Calibration, Generation, Phase, Sequences};
use fairway::data::folder::{DataFolder, Split};
use fairway::data::shard::ShardWriter;
use fairway::eval::text::Weights;
use fairway::model::{EMBEDDING, HEAD, Model, init};
use fairway::ops::{Autodiff, Plain, rounded};
use fairway::quant::Hessians;
use fairway::recipe::Recipe;
use hybrids_common::{VOCAB, model, pr1607, pr1994, smooth_forms, systems, tiny, values};
use rand::Rng;
use std::path::Path;

const LENGTH: usize = 12;

fn generation(sequences: usize, temperature: f64, seed: u64) -> Generation {
    Generation { sequences, length: LENGTH, temperature, seed }
}

fn write<P: Plain>(model: &Model<P>, how: &Generation) -> Sequences {
    generate(model, how, &mut |_, _, _| Ok(())).unwrap()
}

fn hessians<P: Plain>(model: &Model<P>, sequences: &Sequences) -> Hessians {
    collect(model, sequences, &|_| true, &mut |_, _, _| Ok(())).unwrap()
}

/// The logits after each token but the last of a sequence, by one forward.
fn logits(model: &Model<Cpu>, sequence: &[u16]) -> Vec<Vec<f64>> {
    let hidden = model.hidden::<Cpu>(row(&sequence[..sequence.len() - 1]), None, None);
    values(model.logits::<Cpu>(hidden)).chunks(VOCAB).map(<[f64]>::to_vec).collect()
}

#[test]
fn every_token_is_drawn_from_what_one_forward_says_of_it() {
    const SEED: u64 = 5;
    for (name, recipe) in systems() {
        let model = model(&recipe);
        let written = write(&model, &generation(3, 0.8, SEED));
        assert_eq!((written.count(), written.length), (3, LENGTH));
        for (number, sequence) in written.iter().enumerate() {
            // The sequence's own draws: a token of all alike, then a point in each distribution.
            let mut draws = init::generator(SEED, &format!("calibration {number}"));
            assert_eq!(usize::from(sequence[0]), draws.random_range(0..VOCAB), "{name}");
            for (logits, token) in logits(&model, sequence).iter().zip(&sequence[1..]) {
                let weights: Vec<f64> = logits.iter().map(|z| (z / 0.8).exp()).collect();
                let point = draws.random::<f64>() * weights.iter().sum::<f64>();
                let below: f64 = weights[..usize::from(*token)].iter().sum();
                let upto = below + weights[usize::from(*token)];
                let close = 1e-9 * upto;
                assert!((below - close..=upto + close).contains(&point), "{name}: {below} {point} {upto}");
            }
        }
        let likeliest = write(&model, &generation(2, 0.0, SEED));
        for sequence in likeliest.iter() {
            for (logits, token) in logits(&model, sequence).iter().zip(&sequence[1..]) {
                let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                assert!(most - logits[usize::from(*token)] < 1e-9, "{name}");
            }
        }
    }
}

#[test]
fn the_seed_decides_and_fewer_sequences_are_the_beginning_of_more() {
    for (name, recipe) in systems() {
        let model = model(&recipe);
        let written = write(&model, &generation(4, 0.8, 1));
        assert_eq!(written, write(&model, &generation(4, 0.8, 1)), "{name}");
        assert_ne!(written, write(&model, &generation(4, 0.8, 2)), "{name}");
        assert_ne!(written, write(&model, &generation(4, 0.3, 1)), "{name}");
        // More than are written side by side.
        let more = write(&model, &generation(35, 0.8, 1));
        assert_eq!(written.tokens, more.tokens[..4 * LENGTH], "{name}");
        assert_eq!(more.count(), 35);
        let mut different: Vec<&[u16]> = more.iter().collect();
        different.sort_unstable();
        different.dedup();
        assert!(different.len() > 30, "{name}: {} of 35 sequences differ", different.len());
    }
    let model = model(&tiny("challenge"));
    for (sequences, length, temperature) in [(0, 4, 0.8), (1, 1, 0.8), (1, 4, -1.0), (1, 4, f64::NAN)] {
        let how = Generation { sequences, length, temperature, seed: 1 };
        assert_eq!(generate(&model, &how, &mut |_, _, _| Ok(())).unwrap_err().exit_code(), 2, "{how:?}");
    }
}

/// The Hessians of one token at a time, each layer's inputs added one by one, by their definition.
fn step_by_step(model: &Model<Cpu>, sequences: &Sequences) -> Hessians {
    model.watch_inputs(|_, _| true);
    for sequence in sequences.iter() {
        let mut cache = model.cache::<Cpu>(sequence.len() - 1);
        for token in &sequence[..sequence.len() - 1] {
            model.observe_head(model.hidden::<Cpu>(row(&[*token]), Some(&mut cache), None));
        }
    }
    finished(model, sequences)
}

/// The Hessians with what every op gives, and every matrix, rounded to bf16.
fn hessians_in_bf16(recipe: &Recipe, sequences: &Sequences) -> Hessians {
    let model = model_in_bf16(recipe);
    model.watch_inputs(|_, _| true);
    for sequence in sequences.iter() {
        let ids = Tensor::from_inner(row(&sequence[..sequence.len() - 1]));
        let hidden: Tensor<Autodiff<Cpu>, 2> = rounded(|| model.hidden(ids, None, None));
        model.observe_head(hidden.inner());
    }
    finished(&model, sequences)
}

/// The Hessians by their definition, of what the model's weights have observed.
fn finished(model: &Model<Cpu>, sequences: &Sequences) -> Hessians {
    let grams = model.take_grams().unwrap();
    model.watch_inputs(|_, _| false);
    let tied = model.params().get(HEAD).is_none();
    let finish = |name: &str, mut h: Vec<f64>, n: usize| {
        h.iter_mut().for_each(|x| *x /= sequences.count() as f64);
        let mean = |h: &[f64]| (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
        let damp = 0.01 * mean(&h).max(1e-6);
        (0..n).for_each(|i| h[i * n + i] += damp);
        if name == EMBEDDING && tied {
            let own = mean(&h);
            (0..n).for_each(|i| h[i * n + i] += own);
        }
        h
    };
    grams.iter().map(|g| (g.name.clone(), finish(&g.name, g.to_f64(), g.shape[0]))).collect()
}

/// The largest difference of two sets of Hessians of the same names, each over its largest element.
fn apart(got: &Hessians, expected: &Hessians) -> f64 {
    let names = |h: &Hessians| {
        let mut names: Vec<String> = h.keys().cloned().collect();
        names.sort();
        names
    };
    assert_eq!(names(got), names(expected));
    let one = |(name, expected): (&String, &Vec<f64>)| {
        assert_eq!(got[name].len(), expected.len(), "{name}");
        let most = expected.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        // A number that is none is as far as can be.
        let off = |(a, b): (&f64, &f64)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() };
        got[name].iter().zip(expected).map(off).fold(0.0, f64::max) / most
    };
    expected.iter().map(one).fold(0.0, f64::max)
}

#[test]
fn hessians_of_what_a_model_writes_are_those_of_the_steps_that_wrote_it() {
    let target = resolve(&DeviceChoice::Cpu, Some(Precision::F64)).unwrap();
    for (name, recipe) in smooth_forms().into_iter().chain(systems()) {
        let model = model(&recipe);
        let params = model.params().to_host().unwrap();
        let weights = Weights { recipe: &recipe, params: &params, place: "the test" };
        let mut phases = Vec::new();
        let mut told = |phase, done, total| {
            phases.push((phase, done, total));
            Ok(())
        };
        let how = Calibration::Own(generation(5, 0.8, 3));
        let calibrated = calibrate::run(weights, &how, &|_| true, &target, &mut told).unwrap();
        assert_eq!(phases.last(), Some(&(Phase::Collect, 5, 5)), "{name}");
        assert!(phases.contains(&(Phase::Write, 5 * LENGTH, 5 * LENGTH)), "{name}");
        assert_eq!(calibrated.sequences, write(&model, &generation(5, 0.8, 3)), "{name}");
        let off = apart(&calibrated.hessians, &step_by_step(&model, &calibrated.sequences));
        assert!(off < 1e-9, "{name}: {off:e}");

        // Every linear layer that is there, by the parts of their names.
        let parts = [
            "c_q",
            "c_k",
            "c_v",
            ".proj.",
            ".in_proj",
            ".out_proj",
            ".c_proj",
            ".dt_proj",
            ".mlp.",
            "attn_gate",
        ];
        let is_linear =
            |name: &str| name.ends_with(".weight") && parts.iter().any(|part| name.contains(part));
        let linear = model.params().iter().filter(|p| p.shape().len() == 2 && is_linear(p.name()));
        let missing: Vec<&str> =
            linear.map(|p| p.name()).filter(|name| !calibrated.hessians.contains_key(*name)).collect();
        assert!(missing.is_empty(), "{name}: {missing:?}");
        let head = if recipe.tie_embeddings { EMBEDDING } else { HEAD };
        assert!(calibrated.hessians.contains_key(head), "{name}");
        // Only what is asked for.
        let some = calibrate::run(weights, &how, &|name| name == head, &target, &mut |_, _, _| Ok(()));
        let some = some.unwrap().hessians;
        assert_eq!(some.len(), 1);
        assert_eq!(some[head], calibrated.hessians[head], "{name}");
        // The same tokens as data.
        let given = Calibration::Given(calibrated.sequences.clone());
        let again = calibrate::run(weights, &given, &|_| true, &target, &mut |_, _, _| Ok(())).unwrap();
        assert_eq!(again, calibrated, "{name}");
        // They are of the tokens: others give others.
        let other = write(&model, &generation(5, 0.8, 4));
        assert!(apart(&hessians(&model, &other), &calibrated.hessians) > 1e-3, "{name}");
    }
}

#[test]
fn a_layer_that_runs_again_adds_each_of_its_runs() {
    // Blocks 1 and 2 run three times: their inputs are those of three visits, the others' of one.
    let model = model(&pr1607());
    assert!(model.is_recurrent());
    let sequences = write(&model, &generation(4, 0.8, 7));
    // The mean square of what an RMS norm gives is 1, whatever the visit: the traces count the visits.
    let trace = |h: &[f64]| h.iter().step_by(h.len().isqrt() + 1).sum::<f64>();
    let per_row = |hessians: &Hessians, name: &str| {
        let n = hessians[name].len().isqrt() as f64;
        trace(&hessians[name]) / 1.01 / n / (LENGTH - 1) as f64
    };
    let looped = hessians(&model, &sequences);
    model.set_recurrent(false);
    let once = hessians(&model, &sequences);
    assert!(!model.is_recurrent());
    let mut seen = 0;
    for name in looped.keys().filter(|name| name.starts_with("blocks.") && name.contains("in_proj")) {
        let repeated = name.starts_with("blocks.1.") || name.starts_with("blocks.2.");
        let visits = if repeated { 3.0 } else { 1.0 };
        let (many, one) = (per_row(&looped, name), per_row(&once, name));
        assert!((many - visits).abs() < 0.01 * visits && (one - 1.0).abs() < 0.01, "{name}: {many} {one}");
        seen += usize::from(repeated);
    }
    assert!(seen > 0, "{:?}", looped.keys());
}

/// A folder with training shards of these tokens.
fn folder(dir: &Path, shards: &[&[u16]]) -> DataFolder {
    for (number, tokens) in shards.iter().enumerate() {
        let mut writer = ShardWriter::create(&dir.join(Split::Train.shard_name(number))).unwrap();
        writer.push(tokens).unwrap();
        writer.finish().unwrap();
    }
    DataFolder::open(dir).unwrap()
}

#[test]
fn training_data_is_read_in_sequences_spread_over_the_first_shards_that_hold_enough() {
    let tokens: Vec<u16> = (0..47).collect();
    let sequences = |shards: &[&[u16]], vocab: usize, count: usize, length: usize| {
        let place = tempfile::tempdir().unwrap();
        Sequences::of_data(&folder(place.path(), shards), vocab, count, length)
    };
    let starts = |read: &Sequences| read.iter().map(|sequence| sequence[0]).collect::<Vec<u16>>();
    let read = sequences(&[&tokens[..]], 47, 3, 5).unwrap();
    assert_eq!(starts(&read), [0, 15, 30]);
    assert!(read.iter().all(|sequence| sequence.windows(2).all(|pair| pair[1] == pair[0] + 1)));
    assert_eq!((read.count(), read.length, read.tokens.len()), (3, 5, 15));
    // Exactly as many as there are, and fewer than asked for.
    assert_eq!(sequences(&[&tokens[..15]], 47, 3, 5).unwrap().tokens, tokens[..15]);
    assert_eq!(starts(&sequences(&[&tokens[..]], 47, 100, 5).unwrap()), [0, 5, 10, 15, 20, 25, 30, 35, 40]);
    // Over the border of two shards; the third, whose ids the model does not have, is not needed.
    let split = [&tokens[..7], &tokens[7..20], &[60_000; 9]];
    assert_eq!(starts(&sequences(&split, 47, 3, 5).unwrap()), [0, 5, 10]);
    for (shards, vocab, what) in [(&split[..], 10, "id"), (&split[..1], 47, "7 training tokens")] {
        let length = if vocab == 47 { 8 } else { 5 };
        let error = sequences(shards, vocab, 3, length).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(what), "{error}");
    }

    // What a model wrote, as shards.
    let model = model(&pr1994("mamba2"));
    let written = write(&model, &generation(4, 0.8, 9));
    let place = tempfile::tempdir().unwrap();
    let data = folder(place.path(), &[&written.tokens]);
    assert_eq!(Sequences::of_data(&data, VOCAB, 4, LENGTH).unwrap(), written);
    for bad in [Sequences { tokens: vec![], length: 4 }, Sequences { tokens: vec![1; 4], length: 1 }] {
        assert_eq!(collect(&model, &bad, &|_| true, &mut |_, _, _| Ok(())).unwrap_err().exit_code(), 2);
    }
    let foreign = Sequences { tokens: vec![VOCAB as u16; 4], length: 4 };
    assert_eq!(collect(&model, &foreign, &|_| true, &mut |_, _, _| Ok(())).unwrap_err().exit_code(), 2);
}

#[test]
fn the_systems_have_their_own_numbers() {
    let of = |name: &str, seed: u64, as_written: bool| {
        Generation::of(&Recipe { seed, as_written, ..Recipe::load(name).unwrap() })
    };
    let expect = |sequences, length, seed| Generation { sequences, length, temperature: 0.8, seed };
    assert_eq!(of("mamba3-hinge", 7, true), expect(32, 4096, 1337));
    assert_eq!(of("mamba3-hinge", 7, false), expect(32, 4096, 7));
    assert_eq!(of("mamba1-unet", 7, true), expect(64, 2048, 7));
    assert_eq!(of("baseline", 7, true), expect(32, 1024, 7));
}

/// The largest distance of a layer's Hessian from the expected one, as a share of its norm.
fn distance(got: &Hessians, expected: &Hessians) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let one = |(name, expected): (&String, &Vec<f64>)| {
        let off = norm(&mut got[name].iter().zip(expected).map(|(a, b)| a - b));
        off / norm(&mut expected.iter().copied())
    };
    expected.iter().map(one).fold(0.0, f64::max)
}

struct OnDevice;

impl Job for OnDevice {
    type Output = bool;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<bool> {
        const SEQUENCES: usize = 24;
        let how = generation(SEQUENCES, 0.8, 11);
        let mut good = true;
        for (name, recipe) in systems() {
            let there = model_on::<P>(&recipe, device, target.precision.dtype());
            let written = write(&there, &how);
            let got = hessians(&there, &written);
            let expected = hessians(&model(&recipe), &written);
            let bound = match target.precision {
                Precision::F64 => 1e-9,
                Precision::F32 => 5e-4,
                // The parity rule: twice the reference's own error.
                Precision::Bf16 => 2.0 * distance(&hessians_in_bf16(&recipe, &written), &expected),
            };
            let off = distance(&got, &expected);
            println!("{} {}: {name} {off:.1e} of {bound:.1e}", target.label, target.precision);
            // The same again, to the bit.
            good &= off < bound && write(&there, &how) == written;
            good &= hessians(&there, &written) == got;
            // Likely tokens of the model itself, not of some other distribution: even ones would have a mean loss over ln(17).
            let model = model(&recipe);
            let nll: f64 = written
                .iter()
                .flat_map(|s| losses(&model, s, [0, LENGTH - 1], 0.8, &mut model.cache::<Cpu>(LENGTH - 1)))
                .sum();
            good &= nll / (SEQUENCES * (LENGTH - 1)) as f64 <= (VOCAB as f64).ln();
        }
        Ok(good)
    }
}

#[test]
fn every_device_calibrates() {
    all_pass(|| OnDevice);
}
