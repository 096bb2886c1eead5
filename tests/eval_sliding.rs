//! Full and sliding evaluation against one window at a time, on every device.

mod common;
mod eval_common;
mod hybrids_common;

use common::all_pass;
use eval_common::{ScoresAlike, Scoring, apart, pass, score_window, summed, table, tokens};
use fairway::backend::cpu::Cpu;
use fairway::eval::full;
use fairway::eval::method::{Method, Walk};
use fairway::eval::sliding;
use fairway::eval::tally::{Tally, Text};
use fairway::eval::windows::Windows;
use fairway::model::Model;
use fairway::recipe::Recipe;
use hybrids_common::{model, pr1607, pr1994, systems};

/// What is scored: 31 targets in windows of 12, whose last ones are cut short or overlap.
const TARGETS: usize = 31;
const LEN: usize = 12;

fn slow(model: &Model<Cpu>, text: &Text, method: &Method) -> Vec<(usize, f64)> {
    let Walk::Windows { windows, stride } = method.walk else { panic!("windows") };
    let list = windows.list(text.targets(), LEN, stride).unwrap();
    let score = |window| score_window(model, text.tokens, window, LEN, method.pass.temperature);
    list.iter().flat_map(score).collect()
}

#[test]
fn every_kind_of_windows_scores_what_one_window_at_a_time_does() {
    let (tokens, table) = (tokens(TARGETS + 1), table());
    let text = Text { tokens: &tokens, table: &table };
    for (name, recipe) in systems() {
        let model = model(&recipe);
        for windows in Windows::ALL {
            for (stride, rows, temperature) in [(5, 3, 1.0), (12, 1, 1.0), (1, 50, 0.9), (7, 2, 1.7)] {
                let pass = pass(LEN, rows, temperature);
                let method = Method { walk: Walk::Windows { windows, stride }, pass };
                let expected = slow(&model, &text, &method);
                let mut tally = Tally::recording();
                let list = windows.list(TARGETS, LEN, stride).unwrap();
                sliding::score(&model, &text, &list, &pass, &mut tally, &mut |_| Ok(())).unwrap();
                let off = apart(tally.record(), &expected);
                assert!(off < 1e-11, "{name} {windows} stride {stride} at {temperature}: {off:e}");

                let mut told = Vec::new();
                let mut progress = |done, all| {
                    told.push((done, all));
                    Ok(())
                };
                let score = method.score(&model, &recipe, &text, &mut progress).unwrap();
                assert_eq!(told.last(), Some(&(list.len(), list.len())));
                assert_eq!(told.len(), list.len().div_ceil(rows));
                let (loss, bpb, count, bytes) = summed(&text, &expected);
                assert_eq!((score.tokens, score.bytes), (count, bytes), "{name} {windows}");
                assert!((score.val_loss - loss).abs() < 1e-11 && (score.val_bpb - bpb).abs() < 1e-11);
            }
        }
    }
}

#[test]
fn a_stride_of_the_whole_window_is_full_evaluation_to_the_last_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fineweb_val_000000.bin");
    let tokens = tokens(3 * LEN + 5);
    let mut file = vec![0u8; 1024];
    for (at, word) in [20_240_520u32, 1, tokens.len() as u32].into_iter().enumerate() {
        file[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
    }
    file.extend(tokens.iter().flat_map(|id| id.to_le_bytes()));
    std::fs::write(&path, file).unwrap();
    let val = fairway::data::stream::ValTokens::open(&[path], LEN, hybrids_common::VOCAB).unwrap();
    assert_eq!(val.tokens().len(), 3 * LEN + 1, "cut to whole windows");

    let (recipe, table) = (pr1607(), table());
    let model = model(&recipe);
    let text = Text { tokens: val.tokens(), table: &table };
    let whole = full::score(&model, &val, &table, 2 * LEN, &mut |_, _| Ok(())).unwrap();
    for windows in Windows::ALL {
        let method = Method { walk: Walk::Windows { windows, stride: LEN }, pass: pass(LEN, 2, 1.0) };
        let score = method.score(&model, &recipe, &text, &mut |_, _| Ok(())).unwrap();
        assert_eq!((score.val_loss, score.val_bpb), (whole.val_loss, whole.val_bpb), "{windows}");
        assert_eq!((score.tokens, score.bytes), (whole.tokens, whole.bytes));
    }
    // Every token once, whatever the stride.
    for stride in 1..=LEN {
        let walk = Walk::Windows { windows: Windows::EachOnce, stride };
        let method = Method { walk, pass: pass(LEN, 4, 1.0) };
        let score = method.score(&model, &recipe, &text, &mut |_, _| Ok(())).unwrap();
        assert_eq!((score.tokens, score.bytes), (whole.tokens, whole.bytes), "stride {stride}");
    }
}

#[test]
fn an_interrupt_stops_the_work() {
    let (tokens, table, recipe) = (tokens(40), table(), pr1994("mamba2"));
    let text = Text { tokens: &tokens, table: &table };
    let method = Method::full(pass(4, 1, 1.0));
    let mut calls = 0;
    let stopped = method.score(&model(&recipe), &recipe, &text, &mut |_, _| {
        calls += 1;
        match calls {
            3 => Err(fairway::Error::Interrupted { place: "here".into() }),
            _ => Ok(()),
        }
    });
    assert_eq!((stopped.unwrap_err().exit_code(), calls), (130, 3));
}

#[test]
fn every_device_scores_alike() {
    let (tokens, table) = (tokens(TARGETS + 1), table());
    let text = Text { tokens: &tokens, table: &table };
    let ways = [(Windows::EachOnce, 5, 0.9), (Windows::Pr1382, 4, 1.0), (Windows::Pr1607, 12, 1.0)];
    let case = |(name, recipe): &(&str, Recipe), (windows, stride, temperature)| {
        let method = Method { walk: Walk::Windows { windows, stride }, pass: pass(LEN, 3, temperature) };
        let expected = slow(&model(recipe), &text, &method);
        Scoring { name: format!("{name} {windows}"), recipe: recipe.clone(), method, expected }
    };
    all_pass(|| ScoresAlike {
        tokens: tokens.clone(),
        cases: systems().iter().flat_map(|system| ways.map(|way| case(system, way))).collect(),
        bounds: [1e-11, 1e-4],
        in_bf16: None,
    });
}
