//! Stateful evaluation against one forward over the whole text, and against one token at a time, on every device.

mod common;
mod eval_common;
mod hybrids_common;

use common::all_pass;
use eval_common::{ScoresAlike, Scoring, apart, losses, pass, summed, table, tokens};
use fairway::backend::cpu::Cpu;
use fairway::eval::method::{Method, Walk};
use fairway::eval::stateful::{self, Options};
use fairway::eval::tally::{Tally, Text};
use fairway::eval::windows::Windows;
use fairway::model::Model;
use fairway::recipe::Recipe;
use hybrids_common::{model, pr1382, pr1607, pr1994};

const TARGETS: usize = 37;
const LEN: usize = 8;

fn options(stride: usize, streams: usize) -> Options {
    Options { seq_len: LEN, stride, streams, temperature: 1.0 }
}

fn score(model: &Model<Cpu>, text: &Text, options: &Options) -> Tally {
    let mut tally = Tally::recording();
    stateful::score(model, text, options, &mut tally, &mut |_| Ok(())).unwrap();
    tally
}

/// Models without attention, with all that is carried beside the scan: convolutions, hashes, smear gates, angles.
fn without_attention() -> Vec<(&'static str, Recipe)> {
    let mamba2 = Recipe {
        num_unique_layers: 0,
        num_loops: 1,
        num_layers: 2,
        parallel_layer_positions: vec![],
        mamba2_layer_positions: vec![0, 1],
        bigram_vocab_size: 29,
        bigram_dim: 8,
        ..pr1994("mamba2")
    };
    vec![
        ("Mamba-2 and S4D-Lin", Recipe { num_layers: 3, ..mamba2.clone() }),
        ("kill-Mamba-2", Recipe { mamba2_kill_selectivity: true, ..mamba2 }),
        ("Mamba-3", Recipe { num_attn_layers: 0, ..pr1607() }),
        ("Mamba-1", Recipe { mamba_layers: vec![0, 1, 2, 3, 4], trigram: true, ..pr1382() }),
    ]
}

fn hybrids() -> Vec<(&'static str, Recipe)> {
    vec![("pr1994", pr1994("mamba2_kill")), ("pr1607", pr1607()), ("pr1382", pr1382())]
}

#[test]
fn without_attention_it_is_one_forward_over_the_whole_text() {
    let (tokens, table) = (tokens(TARGETS + 1), table());
    let text = Text { tokens: &tokens, table: &table };
    for (name, recipe) in without_attention() {
        let model = model(&recipe);
        let whole = losses(&model, &tokens, [0, TARGETS], 1.0, &mut model.cache::<Cpu>(TARGETS));
        let whole: Vec<(usize, f64)> = whole.into_iter().enumerate().collect();
        for stride in [8, 5, 3, 1] {
            let tally = score(&model, &text, &options(stride, 1));
            let off = apart(tally.record(), &whole);
            assert!(off < 1e-10, "{name} stride {stride}: {off:e}");
        }
        // The test would find a state that is lost between windows.
        let walk = Walk::Windows { windows: Windows::EachOnce, stride: LEN };
        let method = Method { walk, pass: pass(LEN, 4, 1.0) };
        let anew = method.score(&model, &recipe, &text, &mut |_, _| Ok(())).unwrap();
        assert!((anew.val_loss - summed(&text, &whole).0).abs() > 1e-4, "{name} carries nothing");
    }
}

/// One token at a time: attention starts anew with each window, all else goes on from where the window begins.
fn step_by_step(model: &Model<Cpu>, tokens: &[u16], stride: usize, temperature: f64) -> Vec<(usize, f64)> {
    let windows = Windows::EachOnce.list(tokens.len() - 1, LEN, stride).unwrap();
    let mut scored = Vec::new();
    let mut at_start = model.cache::<Cpu>(LEN);
    for (index, window) in windows.iter().enumerate() {
        let mut cache = at_start.clone();
        for position in 0..window.len {
            let place = window.start + position;
            if windows.get(index + 1).is_some_and(|next| next.start == place) {
                at_start = cache.clone();
            }
            let loss = losses(model, tokens, [place, place + 1], temperature, &mut cache)[0];
            if (window.from..window.to).contains(&position) {
                scored.push((place, loss));
            }
        }
        if windows.get(index + 1).is_some_and(|next| next.start == window.start + window.len) {
            at_start = cache;
        }
        at_start.next_window();
    }
    scored
}

#[test]
fn with_attention_it_is_one_token_at_a_time() {
    let (tokens, table) = (tokens(TARGETS + 1), table());
    let text = Text { tokens: &tokens, table: &table };
    for (name, recipe) in hybrids() {
        let model = model(&recipe);
        for (stride, temperature) in [(8, 1.0), (3, 0.9), (5, 1.0)] {
            let expected = step_by_step(&model, &tokens, stride, temperature);
            let tally = score(&model, &text, &Options { temperature, ..options(stride, 1) });
            let off = apart(tally.record(), &expected);
            assert!(off < 1e-10, "{name} stride {stride}: {off:e}");
            assert!(tally.record().iter().map(|(target, _)| *target).eq(0..TARGETS));
        }
    }
}

#[test]
fn streams_are_parts_of_the_text_each_from_an_empty_state() {
    let (tokens, table) = (tokens(TARGETS + 1), table());
    let text = Text { tokens: &tokens, table: &table };
    let model = model(&pr1607());
    // Of 37 targets: 19 and 18, 13 and 13 and 11, then 8 parts of which the last has 2.
    for (streams, stride) in [(2, 8), (3, 5), (8, 2), (37, 1)] {
        let tally = score(&model, &text, &options(stride, streams));
        let mut got = tally.record().to_vec();
        got.sort_by_key(|(target, _)| *target);
        let part = TARGETS.div_ceil(streams);
        let mut expected = Vec::new();
        for start in (0..TARGETS).step_by(part) {
            let end = (start + part).min(TARGETS);
            let own = &tokens[start..=end];
            let text = Text { tokens: own, table: &table };
            // A part that the text's end cuts has the windows of a whole one.
            let mut filled = own.to_vec();
            filled.resize(part + 1, 0);
            let whole = Text { tokens: &filled, ..text };
            let scored = score(&model, &whole, &options(stride, 1));
            let inside = scored.record().iter().filter(|(target, _)| *target < text.targets());
            expected.extend(inside.map(|(target, loss)| (start + target, *loss)));
        }
        expected.sort_by_key(|(target, _)| *target);
        let off = apart(&got, &expected);
        assert!(off < 1e-11, "{streams} streams: {off:e}");
    }
    for streams in [0, TARGETS + 1] {
        let refused = stateful::Streams::new(TARGETS, &options(4, streams)).unwrap_err();
        assert!(refused.to_string().contains("--streams"), "{refused}");
    }
}

#[test]
fn every_device_carries_the_state() {
    let tokens = tokens(TARGETS + 1);
    let case = |(name, recipe): (&str, Recipe)| {
        let method = Method { walk: Walk::Stateful { stride: 5, streams: 1 }, pass: pass(LEN, 1, 1.0) };
        let expected = step_by_step(&model(&recipe), &tokens, 5, 1.0);
        Scoring { name: name.into(), recipe, method, expected }
    };
    all_pass(|| ScoresAlike {
        tokens: tokens.clone(),
        cases: hybrids().into_iter().map(case).collect(),
        bounds: [1e-10, 1e-4],
        in_bf16: None,
    });
}
