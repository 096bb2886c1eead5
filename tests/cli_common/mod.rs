//! Running the program in a folder of its own, on small shards, with a recipe that trains in milliseconds.

#![allow(dead_code)]

use fairway::data::pack::{PackOptions, pack};
use fairway::data::quiet;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What the tests change of `tiny`: 7,892 parameters, 4 sequences of 16 tokens a step.
pub const SMALL: [&str; 12] = [
    "model_dim=16",
    "num_layers=2",
    "num_heads=2",
    "num_kv_heads=1",
    "train_seq_len=16",
    "train_batch_tokens=64",
    "val_batch_size=64",
    "val_loss_every=5",
    "train_log_every=10",
    "grad_accum_steps=1",
    "warmdown_iters=100",
    "warmup_steps=0",
];

/// Parameters of the small recipe.
pub const SMALL_PARAMS: u64 = 7892;

/// A folder that goes when the test ends.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A folder with shards of the byte tokenizer in `data`: 4 documents, the first for validation.
    pub fn with_data() -> Self {
        let place = Self::new();
        place.pack("data", "byte", 4);
        place
    }

    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir().join(name)
    }

    /// Packs `documents` of text into shards in `name`, the first of them for validation.
    pub fn pack(&self, name: &str, tokenizer: &str, documents: u64) {
        let files: Vec<_> = (0..documents)
            .map(|n| {
                let path = self.path(format!("{name}-{n}.txt"));
                fs::write(&path, text(n, 2500)).unwrap();
                path
            })
            .collect();
        let options =
            PackOptions { val_docs: Some(1), ..PackOptions::new(files, tokenizer, self.path(name)) };
        pack(&options, &quiet).unwrap();
    }

    /// The program in this folder.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fairway"));
        self.quieten(&mut command);
        command
    }

    /// Nothing of the user's own environment reaches the program, nor its cache.
    pub fn quieten(&self, command: &mut Command) {
        for key in fairway::recipe::keys() {
            key.env.into_iter().for_each(|name| {
                command.env_remove(name);
            });
        }
        command.env_remove("DATA_PATH").env_remove("TOKENIZER_PATH");
        command.env("FAIRWAY_CACHE", self.path("cache")).current_dir(self.dir()).stdin(Stdio::null());
    }

    /// Runs the program to its end.
    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Ran {
        Ran::of(self.command().args(args))
    }

    /// Runs a line of words.
    pub fn line(&self, line: &str) -> Ran {
        self.run(line.split_whitespace())
    }

    /// The arguments that train the small recipe on `data` into `out`, and then `more`.
    pub fn small(&self, out: &str, more: &str) -> Vec<String> {
        let sets = SMALL.iter().flat_map(|set| ["--set", set]);
        let words = "train tiny --data data --device cpu --out".split(' ').chain([out]).chain(sets);
        words.chain(more.split_whitespace()).map(String::from).collect()
    }

    /// Trains the small recipe into `out`.
    pub fn train(&self, out: &str, more: &str) -> Ran {
        self.run(self.small(out, more))
    }

    /// A folder with shards and a short run in `run` whose embedding and MLP have more than 65,536 elements each.
    pub fn with_large_run() -> Self {
        let place = Self::with_data();
        let more = "--set model_dim=256 --set num_layers=1 --set mlp_mult=2 --set val_loss_every=0 --steps 6";
        place.train("run", more).clean();
        place
    }

    pub fn read(&self, name: impl AsRef<Path>) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub fn read_text(&self, name: impl AsRef<Path>) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    /// The names in a folder, sorted.
    pub fn names(&self, name: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The objects of a `metrics.jsonl`.
    pub fn metrics(&self, out: &str) -> Vec<Value> {
        let text = self.read_text(Path::new(out).join("metrics.jsonl"));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Bytes of every file below a folder, by path.
    pub fn snapshot(&self, name: impl AsRef<Path>) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut folders = vec![self.path(name)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let bytes = fs::read(&path).unwrap();
                    found.insert(path, bytes);
                }
            }
        }
        found
    }
}

/// Repeatable words: enough structure for a small model to learn something.
pub fn text(seed: u64, bytes: usize) -> String {
    const WORDS: [&str; 12] =
        ["the", "model", "reads", "a", "text", "and", "learns", "how", "words", "follow", "each", "other"];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let mut text = String::new();
    while text.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(WORDS[(state >> 33) as usize % WORDS.len()]);
        text.push(if (state >> 50).is_multiple_of(9) { '\n' } else { ' ' });
    }
    text
}

/// A finished program.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub time: Duration,
}

impl Ran {
    pub fn of(command: &mut Command) -> Self {
        let started = Instant::now();
        let output = command.output().unwrap();
        Self::from(output, started)
    }

    fn from(output: Output, started: Instant) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
            time: started.elapsed(),
        }
    }

    /// The program succeeded, with nothing but warnings on stderr.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        assert!(self.stderr.lines().all(|line| line.starts_with("warning: ")), "{self:#?}");
        self
    }

    /// It succeeded without a warning.
    #[track_caller]
    pub fn clean(self) -> Self {
        let ran = self.ok();
        assert_eq!(ran.stderr, "", "{ran:#?}");
        ran
    }

    /// It succeeded; its stdout is exactly one JSON object on one line.
    #[track_caller]
    pub fn json(self) -> Value {
        let ran = self.ok();
        let value: Value =
            serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:#?}"));
        assert!(
            value.is_object() && ran.stdout.ends_with('\n') && ran.stdout.lines().count() == 1,
            "{ran:#?}"
        );
        value
    }

    /// It failed with this exit status: the last line of stderr is the only error, in one line that has `parts` in it.
    #[track_caller]
    pub fn fails(self, code: i32, parts: &[&str]) -> String {
        assert_eq!(self.code, Some(code), "{self:#?}");
        let lines: Vec<_> = self.stderr.lines().collect();
        let (last, before) = lines.split_last().unwrap_or_else(|| panic!("{self:#?}"));
        assert!(self.stderr.ends_with('\n') && last.starts_with("error: "), "{self:#?}");
        assert!(before.iter().all(|line| line.starts_with("warning: ")), "{self:#?}");
        assert!(code == 130 || last.contains(", expected "), "{self:#?}");
        for part in parts {
            assert!(last.contains(part), "no {part:?} in {last:?}");
        }
        last.to_string()
    }

    /// The number after `key:` in the last line of stdout that has it.
    #[track_caller]
    pub fn number(&self, key: &str) -> f64 {
        let word =
            self.stdout.split_whitespace().rev().find_map(|word| word.strip_prefix(key)?.strip_prefix(':'));
        word.and_then(|word| word.trim_end_matches("ms").parse().ok())
            .unwrap_or_else(|| panic!("{key}: {self:#?}"))
    }
}

/// A program that is still running, its stdout read line by line.
pub struct Running {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    seen: String,
    started: Instant,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let started = Instant::now();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout, seen: String::new(), started }
    }

    /// Waits for a line of stdout that begins so.
    #[track_caller]
    pub fn wait_for(&mut self, start: &str) {
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).unwrap();
            self.seen.push_str(&line);
            if line.starts_with(start) {
                return;
            }
            if read == 0 {
                let mut errors = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
                panic!("no line {start:?} in {:?} {errors:?}", self.seen);
            }
        }
    }

    /// Sends Ctrl-C's signal, `times` at once.
    pub fn interrupt(&self, times: usize) {
        let id = self.child.id().to_string();
        let status = Command::new("kill").arg("-INT").args(vec![id; times]).status();
        assert!(status.unwrap().success());
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Ran {
        self.stdout.read_to_string(&mut self.seen).unwrap();
        let output = self.child.wait_with_output().unwrap();
        let ran = Ran::from(output, self.started);
        Ran { stdout: self.seen, ..ran }
    }
}

/// A float of a JSON object.
#[track_caller]
pub fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key} in {value}"))
}

/// The keys of a JSON object, sorted.
pub fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The file of a safetensors' tensors by name, as floats.
pub fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats =
        |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    file.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), floats(view.data())))).collect()
}

/// Panics unless `text` is one well-formed XML element: tags closed in order, attributes quoted, no bare `<` or `&`.
#[track_caller]
pub fn check_xml(text: &str) {
    let mut open: Vec<&str> = Vec::new();
    let (mut rest, mut roots) = (text.trim(), 0);
    while let Some(start) = rest.find('<') {
        let between = &rest[..start];
        assert!(!open.is_empty() || between.trim().is_empty(), "text outside of the root: {between:?}");
        for entity in between.split('&').skip(1) {
            let name = entity.split(';').next().unwrap();
            assert!(
                name.starts_with('#') || ["amp", "lt", "gt", "quot", "apos"].contains(&name),
                "{entity:?}"
            );
        }
        let end = start + rest[start..].find('>').expect("a tag ends");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if tag.starts_with(['?', '!']) {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.trim()), "closing tag");
            continue;
        }
        let name = tag.split([' ', '\n', '/']).next().unwrap();
        assert!(!name.is_empty() && tag.matches('"').count() % 2 == 0, "{tag:?}");
        roots += usize::from(open.is_empty());
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "unclosed {open:?}, then {rest:?}");
    assert_eq!(roots, 1);
}
