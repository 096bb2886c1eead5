//! Files that were trouble once, or near it, through the readers as the fuzz targets call them (`fuzz/`): none may panic,
//! hang or take more memory than its size explains.
//!
//! A new one, found by `fuzz/run`, goes into `tests/hostile/` by the name of its target: `shard-*`, `tokenizer-*` and
//! `recipe-*` as they are, `artifact-*` as `cargo +nightly fuzz run seeds -- --seal INPUT FILE` writes it.

#[path = "../fuzz/src/hostile.rs"]
#[allow(dead_code, reason = "what makes inputs for the fuzzer")]
mod hostile;
// Its allocator ends this process where a reader takes too much: the last name printed is the file's.
#[path = "../fuzz/src/limits.rs"]
mod limits;

use fairway::{artifact, data, error, recipe};
use std::path::Path;
use std::time::{Duration, Instant};

/// One test, as the limits are the process's.
#[test]
fn files_that_were_trouble_once_are_none() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile");
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in &files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let check = match name.split('-').next() {
            Some("artifact") => hostile::artifact,
            Some("shard") => hostile::shard,
            Some("tokenizer") => hostile::tokenizer,
            Some("recipe") => hostile::recipe,
            _ => panic!("{name} is for no reader"),
        };
        eprintln!("{name}");
        let start = Instant::now();
        check(&std::fs::read(file).unwrap());
        assert!(start.elapsed() < Duration::from_secs(5), "{name} took {:?}", start.elapsed());
    }
    assert!(!files.is_empty());
    recipes_of_the_largest_size_stay_small();
}

/// Files of the largest size that is read, of one thing over and over: at most 256 MiB each.
fn recipes_of_the_largest_size_stay_small() {
    let size = 1 << 20;
    let filled = |start: &str, with: &str, end: &str| {
        let times = (size - start.len() - end.len()) / with.len();
        format!("{start}{}{end}", with.repeat(times))
    };
    let cases = [
        filled("recur_layers = \"", "0-65535,", "0\""),
        filled("recur_layers = [", "0,", "]"),
        filled("control_tensor_name_patterns = [", "'',", "]"),
        filled("x = [", "[],", "]"),
        filled("x = [", "{a=1},", "]"),
        filled("x = ", "[", ""),
        filled("x = ", "{a=", ""),
        filled("x", ".x", " = 1"),
        filled("", "[[a]]\n", ""),
        filled("", "#", ""),
        filled("", "\n", ""),
        filled("", "\"", ""),
        (0..size / 9).map(|n| format!("{n:x}=1\n")).collect(),
        (0..size / 9).map(|n| format!("[{n:x}]\n")).collect(),
    ];
    for text in cases {
        assert!(text.len() <= size);
        let shown: String = text.chars().take(40).collect();
        eprintln!("{shown:?} over and over");
        let read = limits::within(256 << 20, || recipe::Recipe::from_toml(&text, Path::new("large.toml")));
        // Only comments and empty lines say nothing wrong.
        assert_eq!(read.is_ok(), text.starts_with(['#', '\n']), "{shown:?}");
    }
}
