//! Weights in host memory scored on a device that is chosen at run time.

mod common;
mod eval_common;
mod hybrids_common;

use eval_common::{pass, table, tokens};
use fairway::backend::{DeviceChoice, Precision, resolve};
use fairway::eval::method::{Method, Walk};
use fairway::eval::tally::Text;
use fairway::eval::text::{self, Weights};
use fairway::eval::ttt::{self, Rule};
use fairway::eval::windows::Windows;
use fairway::host::HostTensor;
use fairway::model::AHEAD;
use fairway::recipe::Recipe;
use hybrids_common::{model, pr1382};

const LEN: usize = 6;

#[test]
fn heads_that_only_training_uses_have_no_part_in_test_time_training() {
    let (tokens, table) = (tokens(62), table());
    let text = Text { tokens: &tokens, table: &table };
    let target = resolve(&DeviceChoice::Cpu, Some(Precision::F64)).unwrap();
    // The clipped norm of the whole gradient would tell of them.
    let options = ttt::Options {
        chunk_tokens: 14,
        batch_seqs: 2,
        rule: Rule::Sgd { momentum: 0.9 },
        lr: 0.05,
        ..ttt::Options::of(Windows::EachOnce, LEN)
    };
    let walk = Walk::Training { windows: Windows::EachOnce, stride: LEN, options };
    let method = Method { walk, pass: pass(LEN, 4, 1.0) };
    let score = |recipe: &Recipe, params: &[HostTensor]| {
        let weights = Weights { recipe, params, place: "the test" };
        text::score(weights, &text, &method, &target, &mut |_, _| Ok(())).unwrap().val_loss
    };
    let with = Recipe { mtp_num_heads: 2, mtp_loss_weight: 0.5, ..pr1382() };
    let params = model(&with).params().to_host().unwrap();
    let kept: Vec<HostTensor> =
        params.iter().filter(|param| !param.name.starts_with(AHEAD)).cloned().collect();
    assert_eq!(kept.len() + 2, params.len());
    let without = Recipe { mtp_num_heads: 0, ..with.clone() };
    assert_eq!(score(&with, &params), score(&without, &kept));
}
