//! Score-first test-time training against one window and one step at a time, and proofs that no loss depends on what
//! comes after it.

mod common;
mod eval_common;
mod hybrids_common;

use burn::tensor::{DType, Int, Tensor, TensorData};
use common::all_pass;
use eval_common::{ScoresAlike, Scoring, apart, pass, score_window, table, tokens};
use fairway::backend::cpu::Cpu;
use fairway::eval::method::{Method, Walk};
use fairway::eval::tally::{Tally, Text};
use fairway::eval::ttt::{self, Course, Options, Rule};
use fairway::eval::windows::{Window, Windows};
use fairway::model::Model;
use fairway::recipe::Recipe;
use hybrids_common::{device, get, largest_difference, model, pr1382, pr1607, set, tiny, values};
use std::collections::BTreeMap;

const TARGETS: usize = 61;
const LEN: usize = 6;

/// Steps of this size leave a model of this size as smooth as it was: at 0.003 some steps make 1e-8 of a last bit of f64.
const ADAM_LR: f64 = 0.0003;

fn options() -> Options {
    Options {
        chunk_tokens: 14,
        epochs: 2,
        batch_seqs: 2,
        rule: Rule::Sgd { momentum: 0.9 },
        lr: 0.05,
        cosine: true,
        clip: 1.0,
        freeze_blocks: 0,
    }
}

fn run(
    model: &Model<Cpu>,
    recipe: &Recipe,
    tokens: &[u16],
    windows: &[Window],
    options: &Options,
    rows: usize,
) -> Vec<(usize, f64)> {
    let table = table();
    let text = Text { tokens, table: &table };
    let mut tally = Tally::recording();
    let pass = pass(LEN, rows, 1.0);
    let course = Course { windows, pass: &pass, options };
    ttt::score(model, recipe, &text, &course, &mut tally, &mut |_| Ok(())).unwrap();
    tally.record().to_vec()
}

fn sequences(tokens: &[u16]) -> Tensor<Cpu, 2, Int> {
    let values: Vec<i64> = tokens.iter().map(|id| i64::from(*id)).collect();
    Tensor::from_data(TensorData::new(values, [tokens.len() / LEN, LEN]), &device())
}

/// Weights in host memory, and the optimizers' formulas.
struct Slow {
    options: Options,
    frozen: Vec<&'static str>,
    momenta: BTreeMap<String, [Vec<f64>; 2]>,
    steps: i32,
}

impl Slow {
    fn step(&mut self, model: &Model<Cpu>, inputs: &[u16], targets: &[u16], lr: f64) {
        let share =
            Tensor::from_data(TensorData::new(vec![1.0 / inputs.len() as f64], [1]), (&device(), DType::F64));
        model.params().clear_grads();
        model.accumulate(sequences(inputs), sequences(targets), &share);
        let mut grads: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for param in model.params().iter() {
            let name = param.name();
            let in_bank = model.params().bank_of(name).is_some();
            if self.frozen.iter().any(|part| name.contains(part)) && !in_bank {
                continue;
            }
            grads.extend(param.take_flat_grad().map(|grad| (name.to_string(), values(grad))));
        }
        let norm = grads.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let factor = match self.options.clip {
            clip if clip > 0.0 => (clip / (norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        self.steps += 1;
        let steps = self.steps;
        for (name, grad) in grads {
            let zeros = || vec![0.0; grad.len()];
            let [m, v] = self.momenta.entry(name.clone()).or_insert_with(|| [zeros(), zeros()]);
            let mut weights = get(model, &name);
            for (i, g) in grad.iter().enumerate() {
                let g = g * factor;
                match self.options.rule {
                    Rule::Sgd { momentum } => {
                        m[i] = momentum * m[i] + g;
                        weights[i] -= lr * m[i];
                    }
                    Rule::AdamW { weight_decay } => {
                        m[i] = 0.9 * m[i] + 0.1 * g;
                        v[i] = 0.999 * v[i] + 0.001 * g * g;
                        let root = (v[i] / (1.0 - 0.999f64.powi(steps))).sqrt() + 1e-8;
                        weights[i] -=
                            lr * weight_decay * weights[i] + lr * m[i] / (1.0 - 0.9f64.powi(steps)) / root;
                    }
                }
            }
            set(model, &name, weights);
        }
    }

    /// One window after another; when one belongs to a later chunk, the chunk before is trained on first.
    fn run(&mut self, model: &Model<Cpu>, tokens: &[u16], windows: &[Window]) -> Vec<(usize, f64)> {
        let total = tokens.len() - 1;
        let size = self.options.chunk_tokens;
        let chunks = total.div_ceil(size);
        let mut scored = Vec::new();
        let mut times = vec![0; total];
        for (index, window) in windows.iter().enumerate() {
            for (target, loss) in score_window(model, tokens, window, LEN, 1.0) {
                scored.push((target, loss));
                times[target] += 1;
            }
            let chunk = window.targets().start / size;
            let goes_on = windows.get(index + 1).is_some_and(|next| next.targets().start / size == chunk);
            if goes_on || chunk + 1 == chunks {
                continue;
            }
            let end = ((chunk + 1) * size).min(total);
            assert!(
                times[..end].iter().all(|times| *times > 0),
                "all of a chunk is scored before it is used"
            );
            let half = std::f64::consts::PI * chunk as f64 / (chunks - 1) as f64;
            let mul = if self.options.cosine { 0.5 * (1.0 + half.cos()) } else { 1.0 };
            let begin = chunk * size;
            let whole = (end - begin) / LEN;
            for _ in 0..self.options.epochs {
                for first in (0..whole).step_by(self.options.batch_seqs) {
                    let last = (first + self.options.batch_seqs).min(whole);
                    let (from, to) = (begin + first * LEN, begin + last * LEN);
                    self.step(model, &tokens[from..to], &tokens[from + 1..=to], self.options.lr * mul);
                }
            }
        }
        scored
    }
}

fn compare(name: &str, recipe: &Recipe, windows: &[Window], options: Options, frozen: Vec<&'static str>) {
    let tokens = tokens(TARGETS + 1);
    let expected_model = model(recipe);
    let mut slow = Slow { options, frozen, momenta: BTreeMap::new(), steps: 0 };
    let expected = slow.run(&expected_model, &tokens, windows);
    // Batches of windows and the limit on memory have no effect.
    for rows in [1, 3, 100] {
        let trained = model(recipe);
        let start: BTreeMap<String, Vec<f64>> =
            trained.params().iter().map(|p| (p.name().to_string(), values(p.flat()))).collect();
        let got = run(&trained, recipe, &tokens, windows, &options, rows);
        let off = apart(&got, &expected);
        assert!(off < 1e-9, "{name}, {rows} rows: {off:e}");
        let mut moved = 0.0f64;
        for param in trained.params().iter() {
            let (ours, theirs) = (values(param.flat()), get(&expected_model, param.name()));
            let off = largest_difference(&ours, &theirs);
            assert!(off < 1e-9, "{name}: {} {off:e}", param.name());
            let change = largest_difference(&ours, &start[param.name()]);
            let still = !param.is_trainable();
            assert!(!still || change == 0.0, "{name}: {} is frozen and moved", param.name());
            moved = moved.max(change);
        }
        assert!(moved > options.lr, "{name}: nothing is trained");
    }
}

#[test]
fn it_is_one_window_and_one_step_at_a_time() {
    let each_once = |stride| ttt::windows(Windows::EachOnce, TARGETS, LEN, stride).unwrap();
    let as_1382 = |stride| ttt::windows(Windows::Pr1382, TARGETS, LEN, stride).unwrap();
    // Three sequences a chunk: a step of two and one of one.
    let uneven = Options { chunk_tokens: 20, ..options() };
    compare("baseline", &tiny("challenge"), &each_once(2), uneven, vec![]);
    compare("pr1382", &pr1382(), &as_1382(4), options(), vec![]);
    // The two attention blocks are `blocks.0` and `blocks.1`: so many of the Mamba blocks freeze with them.
    let freeze = Options { freeze_blocks: 9, clip: 0.0, ..options() };
    compare("pr1382, frozen", &pr1382(), &as_1382(6), freeze, vec!["blocks.0.", "blocks.1."]);
    let adam = Options {
        rule: Rule::AdamW { weight_decay: 0.01 },
        lr: ADAM_LR,
        cosine: false,
        clip: 0.0,
        epochs: 1,
        chunk_tokens: 2 * LEN,
        ..options()
    };
    let as_1607 = ttt::windows(Windows::Pr1607, TARGETS, LEN, 1).unwrap();
    assert_eq!(as_1607.len(), TARGETS.div_ceil(LEN));
    compare("pr1607", &pr1607(), &as_1607, adam, vec![]);
    let frozen = Options { freeze_blocks: 1, ..adam };
    compare("pr1607, frozen", &pr1607(), &as_1607, frozen, vec!["blocks.0."]);
}

#[test]
fn no_loss_depends_on_a_later_token() {
    let recipe = pr1382();
    let tokens = tokens(TARGETS + 1);
    for windows in [Windows::EachOnce, Windows::Pr1382] {
        let list = ttt::windows(windows, TARGETS, LEN, 2).unwrap();
        let clean = run(&model(&recipe), &recipe, &tokens, &list, &options(), 4);
        // At the borders of chunks (14, 28, ...), beside them, and within.
        for poisoned in [1, 7, 13, 14, 15, 16, 27, 28, 29, 35, 42, 43, 57, 61] {
            let mut other = tokens.clone();
            other[poisoned..].iter_mut().for_each(|id| *id = (*id + 5) % hybrids_common::VOCAB as u16);
            let dirty = run(&model(&recipe), &recipe, &other, &list, &options(), 4);
            assert_eq!(dirty.len(), clean.len());
            let mut changed = 0;
            for ((target, before), (same, after)) in clean.iter().zip(&dirty) {
                assert_eq!(target, same);
                // The loss of target i is of token i + 1.
                if target + 1 < poisoned {
                    assert_eq!(
                        before.to_bits(),
                        after.to_bits(),
                        "{windows}: target {target} knows of token {poisoned}"
                    );
                }
                changed += usize::from(before != after);
            }
            assert!(changed > 0, "{windows}: token {poisoned} has no effect at all");
        }
    }
}

#[test]
fn what_is_scored_is_learned_from_afterwards_only() {
    let recipe = tiny("challenge");
    let tokens = tokens(TARGETS + 1);
    let list = ttt::windows(Windows::EachOnce, TARGETS, LEN, LEN).unwrap();
    let trained = run(&model(&recipe), &recipe, &tokens, &list, &options(), 4);
    let untrained = run(&model(&recipe), &recipe, &tokens, &list, &Options { lr: 0.0, ..options() }, 4);
    // The windows of the first chunk are 0, 6 and 12: targets 0 to 17. They are scored by the weights as they were.
    for ((target, a), (_, b)) in trained.iter().zip(&untrained) {
        assert_eq!(a == b, *target < 18, "target {target}");
    }
    // An early token reaches windows that cannot see it only through training.
    let mut other = tokens.clone();
    other[3] = (other[3] + 1) % hybrids_common::VOCAB as u16;
    for (lr, reaches) in [(0.05, true), (0.0, false)] {
        let options = Options { lr, ..options() };
        let clean = run(&model(&recipe), &recipe, &tokens, &list, &options, 4);
        let dirty = run(&model(&recipe), &recipe, &other, &list, &options, 4);
        let later =
            |scored: &[(usize, f64)]| scored.iter().skip(18).map(|(_, loss)| *loss).collect::<Vec<_>>();
        assert_eq!(later(&clean) != later(&dirty), reaches);
    }
    // Nothing is trained after the last chunk: one chunk leaves the weights as they are.
    let whole = Options { chunk_tokens: TARGETS, ..options() };
    let still = model(&recipe);
    let score = run(&still, &recipe, &tokens, &list, &whole, 4);
    assert_eq!(score, untrained);
    for param in still.params().iter() {
        assert_eq!(values(param.flat()), get(&model(&recipe), param.name()));
    }
}

#[test]
fn a_run_that_diverges_fails_with_the_reason() {
    let (recipe, table) = (tiny("challenge"), table());
    let tokens = tokens(TARGETS + 1);
    let text = Text { tokens: &tokens, table: &table };
    let walk = Walk::Training {
        windows: Windows::EachOnce,
        stride: LEN,
        options: Options { lr: f64::INFINITY, clip: 0.0, ..options() },
    };
    let method = Method { walk, pass: pass(LEN, 4, 1.0) };
    let error = method.score(&model(&recipe), &recipe, &text, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(error.exit_code(), 1);
    assert!(error.to_string().contains("--ttt-lr"), "{error}");
}

#[test]
fn every_device_trains_alike() {
    let tokens = tokens(TARGETS + 1);
    let adam = Options { rule: Rule::AdamW { weight_decay: 0.01 }, lr: ADAM_LR, ..options() };
    let list = ttt::windows(Windows::EachOnce, TARGETS, LEN, 3).unwrap();
    let case = |(name, recipe, options): (&str, Recipe, Options)| {
        let walk = Walk::Training { windows: Windows::EachOnce, stride: 3, options };
        let mut slow = Slow { options, frozen: vec![], momenta: BTreeMap::new(), steps: 0 };
        let expected = slow.run(&model(&recipe), &tokens, &list);
        Scoring { name: name.into(), recipe, method: Method { walk, pass: pass(LEN, 4, 1.0) }, expected }
    };
    all_pass(|| ScoresAlike {
        tokens: tokens.clone(),
        cases: [("pr1382", pr1382(), options()), ("pr1607", pr1607(), adam)].map(case).into(),
        bounds: [1e-9, 1e-3],
        in_bf16: Some(0.15),
    });
}
