//! Test-time training of a low-rank change: against host arithmetic, and document by document.

mod common;
mod eval_common;
mod hybrids_common;

use burn::tensor::{DType, Tensor, TensorData};
use common::all_pass;
use eval_common::{apart, model_on, pass, row, score_window, summed, table, tokens};
use fairway::Result;
use fairway::backend::cpu::Cpu;
use fairway::backend::{Job, Precision, Target};
use fairway::eval::low_rank::{self, Documents, Options, documents};
use fairway::eval::method::{Method, Walk};
use fairway::eval::tally::{Tally, Text};
use fairway::eval::windows::{Window, Windows};
use fairway::model::{Model, init};
use fairway::ops::Plain;
use fairway::recipe::Recipe;
use hybrids_common::{device, get, model, pr1382, pr1607, set, tiny, values};
use rand::Rng;

const LEN: usize = 6;
const BOS: u16 = 1;

fn options() -> Options {
    Options { rank: 2, chunk_tokens: 9, epochs: 2, lr: 0.05, stride: 4, bos: BOS, seed: 7 }
}

/// Chunks that are shorter than a window.
fn short_chunks() -> Options {
    Options { chunk_tokens: 4, epochs: 1, lr: 0.02, stride: 2, ..options() }
}

/// Documents of 4, 31, 20 and 1 targets; the token that begins them is nowhere else.
fn text() -> Vec<u16> {
    let mut text: Vec<u16> = tokens(57).into_iter().map(|id| if id == BOS { 2 } else { id }).collect();
    for start in [0, 4, 35, 55] {
        text[start] = BOS;
    }
    text
}

fn run(model: &Model<Cpu>, tokens: &[u16], options: &Options) -> Vec<(usize, f64)> {
    let table = table();
    let text = Text { tokens, table: &table };
    let documents = Documents::new(&text, LEN, options).unwrap();
    let mut tally = Tally::recording();
    let mut done = 0;
    let pass = pass(LEN, 3, 1.0);
    low_rank::score(model, &text, &documents, (&pass, options), &mut tally, &mut |count| {
        done += count;
        Ok(())
    })
    .unwrap();
    assert_eq!(done, documents.windows());
    let mut scored = tally.record().to_vec();
    scored.sort_by_key(|(target, _)| *target);
    scored
}

/// `a[m, k] b[k, n]`.
fn product(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    let element = |i: usize| (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum();
    (0..m * n).map(element).collect()
}

fn transposed(a: &[f64], [rows, columns]: [usize; 2]) -> Vec<f64> {
    (0..rows * columns).map(|i| a[i % rows * columns + i / rows]).collect()
}

/// A weight, its change, and Adam's moments of both.
struct Slow {
    name: String,
    shape: [usize; 2],
    own: Vec<f64>,
    change: [Vec<f64>; 2],
    moments: [[Vec<f64>; 2]; 2],
}

impl Slow {
    fn new(model: &Model<Cpu>, name: &str, options: &Options) -> Self {
        let shape: [usize; 2] = model.params().get(name).unwrap().shape().try_into().unwrap();
        let [outputs, inputs] = shape;
        let mut rng = init::generator(options.seed, &format!("low_rank.{name}"));
        let bound = 1.0 / (inputs as f32).sqrt();
        let random = (0..options.rank * inputs).map(|_| f64::from(bound * (2.0 * rng.random::<f32>() - 1.0)));
        let change = [random.collect::<Vec<f64>>(), vec![0.0; outputs * options.rank]];
        let moments = change.each_ref().map(|part| [vec![0.0; part.len()], vec![0.0; part.len()]]);
        Self { name: name.into(), shape, own: get(model, name), change, moments }
    }

    fn step(&mut self, grad: &[f64], options: &Options, steps: i32) {
        let ([outputs, inputs], rank) = (self.shape, options.rank);
        let [a, b] = &self.change;
        let grad_b = product(grad, &transposed(a, [rank, inputs]), [outputs, inputs, rank]);
        let grad_a = product(&transposed(b, [outputs, rank]), grad, [rank, outputs, inputs]);
        for (part, grad) in [grad_a, grad_b].iter().enumerate() {
            let [m, v] = &mut self.moments[part];
            for (i, g) in grad.iter().enumerate() {
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let root = (v[i] / (1.0 - 0.95f64.powi(steps))).sqrt() + 1e-8;
                self.change[part][i] -= options.lr * m[i] / (1.0 - 0.9f64.powi(steps)) / root;
            }
        }
    }

    fn apply(&self, model: &Model<Cpu>, rank: usize) {
        let [outputs, inputs] = self.shape;
        let change = product(&self.change[1], &self.change[0], [outputs, rank, inputs]);
        set(model, &self.name, self.own.iter().zip(change).map(|(own, change)| own + change).collect());
    }
}

/// One document at a time, one window at a time; a chunk is trained on when its last window is scored.
fn slow(recipe: &Recipe, tokens: &[u16], options: &Options) -> Vec<(usize, f64)> {
    let mut scored = Vec::new();
    for targets in documents(tokens, options.bos) {
        let model = model(recipe);
        let names = model.params().iter().map(|param| param.name().to_string());
        let ends = ["c_q.weight", "c_v.weight", "in_proj.weight"];
        let names = names.filter(|name| ends.iter().any(|end| name.ends_with(end)));
        let mut changes: Vec<Slow> = names.map(|name| Slow::new(&model, &name, options)).collect();
        assert!(!changes.is_empty());
        let mut steps = 0;
        let windows =
            Windows::each_once_after(options.chunk_tokens, targets.len(), LEN, options.stride).unwrap();
        let mut trained = 0;
        for window in windows {
            let chunk = window.targets().start / options.chunk_tokens;
            while trained < chunk {
                let start = targets.start + trained * options.chunk_tokens;
                let end = start + options.chunk_tokens;
                assert!(
                    scored.iter().filter(|(target, _)| (start..end).contains(target)).count() == end - start
                );
                for _ in 0..options.epochs {
                    model.params().clear_grads();
                    let share = 1.0 / options.chunk_tokens as f64;
                    let share = Tensor::from_data(TensorData::new(vec![share], [1]), (&device(), DType::F64));
                    for from in (start..end).step_by(LEN) {
                        let to = (from + LEN).min(end);
                        model.accumulate(row(&tokens[from..to]), row(&tokens[from + 1..=to]), &share);
                    }
                    steps += 1;
                    for change in &mut changes {
                        let grad = model.params().get(&change.name).unwrap().take_flat_grad().unwrap();
                        change.step(&values(grad), options, steps);
                        change.apply(&model, options.rank);
                    }
                }
                trained += 1;
            }
            let window = Window { start: window.start + targets.start, ..window };
            scored.extend(score_window(&model, tokens, &window, LEN, 1.0));
        }
    }
    scored
}

#[test]
fn it_is_one_document_and_one_window_at_a_time() {
    let tokens = text();
    let lengths: Vec<usize> = documents(&tokens, BOS).iter().map(|targets| targets.len()).collect();
    assert_eq!(lengths, [4, 31, 20, 1]);
    for (name, recipe) in [("challenge", tiny("challenge")), ("pr1607", pr1607()), ("pr1382", pr1382())] {
        for options in [options(), short_chunks()] {
            let trained = model(&recipe);
            let got = run(&trained, &tokens, &options);
            let off = apart(&got, &slow(&recipe, &tokens, &options));
            assert!(off < 1e-8, "{name}: {off:e}");
            // It has its own weights again.
            for param in trained.params().iter() {
                let own = get(&model(&recipe), param.name());
                assert_eq!(values(param.flat()), own, "{name}: {}", param.name());
            }
            // Without a step it is plain evaluation, document by document, and with steps it is not.
            let plain = run(&model(&recipe), &tokens, &Options { lr: 0.0, ..options });
            assert!(apart(&got, &plain) > 1e-4, "{name} learns nothing");
            // Only the first chunk is scored by the weights as they are, also where a window is longer.
            for target in 4..4 + options.chunk_tokens.min(LEN) {
                assert_eq!(got[target].1, plain[target].1, "{name}: target {target}");
            }
            let after = 4 + options.chunk_tokens + options.stride;
            assert_ne!(got[after].1, plain[after].1, "{name}: target {after}");
        }
    }
}

#[test]
fn a_document_knows_nothing_of_another_nor_of_what_comes_after() {
    for options in [options(), short_chunks()] {
        knows_nothing(&options);
    }
}

fn knows_nothing(options: &Options) {
    let (tokens, recipe) = (text(), pr1607());
    let clean = run(&model(&recipe), &tokens, options);
    // The second document alone, with the token after it.
    let alone = run(&model(&recipe), &tokens[4..=35], options);
    let within: Vec<(usize, f64)> = clean[4..35].iter().map(|(target, loss)| (target - 4, *loss)).collect();
    assert!(apart(&alone, &within) < 1e-11);
    for poisoned in [6, 13, 14, 21, 22, 34, 40, 50] {
        let mut other = tokens.clone();
        for id in other[poisoned..].iter_mut().filter(|id| **id != BOS) {
            *id = (*id + 5) % hybrids_common::VOCAB as u16;
            // A document more would be another text.
            if *id == BOS {
                *id = 2;
            }
        }
        let dirty = run(&model(&recipe), &other, options);
        for ((target, before), (_, after)) in clean.iter().zip(&dirty) {
            if target + 1 < poisoned {
                assert_eq!(before.to_bits(), after.to_bits(), "target {target} knows of token {poisoned}");
            }
        }
        assert!(clean != dirty);
    }
}

struct OnDevice;

impl Job for OnDevice {
    type Output = bool;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<bool> {
        let (tokens, table, recipe) = (text(), table(), tiny("challenge"));
        let text = Text { tokens: &tokens, table: &table };
        let bound = match target.precision {
            Precision::F64 => 1e-8,
            Precision::F32 => 1e-3,
            Precision::Bf16 => 0.15,
        };
        let method = Method { walk: Walk::LowRank(options()), pass: pass(LEN, 3, 1.0) };
        let there = model_on::<P>(&recipe, device, target.precision.dtype());
        let score = method.score(&there, &recipe, &text, &mut |_, _| Ok(()))?;
        let expected = summed(&text, &slow(&recipe, &tokens, &options()));
        let off = (score.val_loss - expected.0).abs();
        println!("{} {}: {off:.1e}", target.label, target.precision);
        Ok(off < bound && (score.tokens, score.bytes) == (expected.2, expected.3))
    }
}

#[test]
fn every_device_learns_alike() {
    all_pass(|| OnDevice);
}
