//! The example programs, as `cargo test` has built them: one trains and saves, the other loads and samples.

mod cli_common;

use cli_common::{Place, Ran, text};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// The example of that name, beside this test; none where only this test was built.
fn example(name: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let built =
        test.parent()?.parent()?.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    if !built.exists() {
        println!("skipped: {} is not built (`cargo test` without `--test` builds it)", built.display());
        return None;
    }
    Some(built)
}

fn run(place: &Place, name: &str, args: &[&str]) -> Option<Ran> {
    let mut command = Command::new(example(name)?);
    place.quieten(&mut command);
    Some(Ran::of(command.args(args)))
}

#[test]
fn one_trains_on_a_text_and_the_other_samples_from_the_artifact() {
    let place = Place::new();
    fs::write(place.path("mine.txt"), text(1, 12_000)).unwrap();
    let Some(ran) = run(&place, "train_and_save", &["mine.txt", "out"]) else { return };
    let ran = ran.ok();
    let last = ran.stdout.lines().last().unwrap();
    let words: Vec<&str> = last.split(' ').collect();
    let (bytes, bpb): (u64, f64) = (words[0].parse().unwrap(), words[2].parse().unwrap());
    assert!(last.ends_with(" bits per byte: out/model.fairway"), "{last}");
    assert_eq!(bytes, fs::metadata(place.path("out/model.fairway")).unwrap().len());
    // Twelve words: far below the eight bits of a model that knows nothing.
    assert!(bpb > 0.5 && bpb < 4.5, "{last}");
    assert_eq!(ran.number("val_bpb"), bpb);

    let sampled = run(&place, "load_and_sample", &["out/model.fairway", "the model "]).unwrap().ok();
    let (device, text) = sampled.stdout.split_once('\n').unwrap();
    assert!(device.starts_with("on ") && text.starts_with("the model "), "{sampled:?}");
    assert!(text.trim_end().ends_with(" tokens per second"), "{sampled:?}");
    // It has learnt the words' letters, if not the words.
    let letters = text.chars().filter(|c| c.is_ascii_lowercase() || *c == ' ').count();
    assert!(letters * 10 > text.chars().count() * 8, "{text:?}");
}

#[test]
fn without_arguments_they_work_on_a_text_of_their_own() {
    let place = Place::new();
    let Some(ran) = run(&place, "train_and_save", &[]) else { return };
    ran.ok();
    let sampled = run(&place, "load_and_sample", &[]).unwrap().ok();
    assert!(sampled.stdout.contains("\nA model "), "{sampled:?}");
}

#[test]
fn what_they_cannot_read_is_an_error_in_one_line() {
    let place = Place::new();
    fs::write(place.path("noise.fairway"), "noise").unwrap();
    for (name, arg) in
        [("train_and_save", "none.txt"), ("load_and_sample", "noise.fairway"), ("load_and_sample", "none")]
    {
        let Some(ran) = run(&place, name, &[arg]) else { return };
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.starts_with("Error: ") && ran.stderr.contains(arg), "{ran:?}");
    }
}
