//! A run's log: `train.log` with the challenge's lines (spec/challenge.md section 5), `metrics.jsonl` with its numbers.

use crate::error::{Error, Result};
use crate::recipe::{PR1382, Recipe};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Where a log shows its lines beside the file: stdout, a progress bar's own printer, or nowhere.
pub type Echo = Box<dyn FnMut(&str) + Send>;

/// An [`Echo`] to stdout, line by line. A closed pipe does not stop the run: the file has every line.
pub fn to_stdout() -> Echo {
    Box::new(|line| {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    })
}

/// An [`Echo`] to nowhere, for `--json`.
pub fn to_nowhere() -> Echo {
    Box::new(|_| {})
}

/// `DIR/train.log`: each line is in the file, and shown, when the call returns.
pub struct RunLog {
    path: PathBuf,
    file: File,
    echo: Echo,
}

impl RunLog {
    /// Opens `dir/train.log`, creating `dir`: empty for a new run, to append to for a resumed one.
    pub fn open(dir: &Path, resumed: bool, echo: Echo) -> Result<Self> {
        let path = dir.join("train.log");
        let mut options = OpenOptions::new();
        if resumed {
            options.append(true).create(true);
        } else {
            options.write(true).create(true).truncate(true);
        }
        let opened = std::fs::create_dir_all(dir).and_then(|()| options.open(&path));
        let file = opened.map_err(|error| Error::write(&path, &error))?;
        Ok(Self { path, file, echo })
    }

    /// Writes one line; control characters in it (a file name may hold some) become spaces.
    pub fn line(&mut self, line: &str) -> Result<()> {
        let line = printable(line);
        (self.echo)(&line);
        self.write(line)
    }

    /// Writes one line to the file alone.
    pub fn note(&mut self, line: &str) -> Result<()> {
        self.write(printable(line))
    }

    fn write(&mut self, mut line: String) -> Result<()> {
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|error| Error::write(&self.path, &error))
    }

    /// Writes each line of `text`, as of the resolved recipe.
    pub fn lines(&mut self, text: &str) -> Result<()> {
        text.lines().try_for_each(|line| self.line(line))
    }
}

fn printable(line: &str) -> String {
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Whether the challenge logs the training loss after `step` completed steps: the first ten, every `every`-th, and the
/// one at which the run stops early; none when `every` is 0.
pub fn logs_step(step: usize, every: usize, stopping: bool) -> bool {
    every > 0 && (step <= 10 || step.is_multiple_of(every) || stopping)
}

/// The challenge's log lines, word for word: other people's tools read them.
pub mod lines {
    use super::*;

    /// `value` with so many decimals, not-a-number spelt as Python does.
    fn fixed(value: f64, decimals: usize) -> String {
        if value.is_nan() { "nan".into() } else { format!("{value:.decimals$}") }
    }

    /// A float as Python prints it: the shortest digits that read back, `1e-05` below 0.0001 and from 1e16.
    fn python(value: f64) -> String {
        let magnitude = value.abs();
        if value.is_nan() || magnitude == 0.0 || magnitude.is_infinite() || (1e-4..1e16).contains(&magnitude)
        {
            return format!("{value:?}").to_lowercase();
        }
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
        format!("{digits}e{sign}{exponent:0>2}")
    }

    /// How validation counts bytes: `kind` is `sentencepiece` or `byte`.
    pub fn val_bpb_enabled(kind: &str, tokenizer: &Path) -> String {
        format!("val_bpb:enabled tokenizer_kind={kind} tokenizer_path={}", tokenizer.display())
    }

    /// The folder of the training shards, by its last name, and their number.
    pub fn train_loader(dir: &Path, shards: usize) -> String {
        let name = dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy();
        format!("train_loader:dataset:{name} train_shards:{shards}")
    }

    /// The validation shards' glob pattern and the targets that are scored.
    pub fn val_loader(pattern: &Path, tokens: u64) -> String {
        format!("val_loader:shards pattern={} tokens:{tokens}", pattern.display())
    }

    /// The lines about the model, its optimizer and its schedule, for `params` trainable parameters on `world_size` ranks.
    pub fn header(recipe: &Recipe, params: u64, world_size: usize) -> [String; 6] {
        let tied = if recipe.tie_embeddings { "True" } else { "False" };
        let head_lr = if recipe.tie_embeddings { 0.0 } else { recipe.head_lr };
        [
            format!("model_params:{params}"),
            format!("world_size:{world_size} grad_accum_steps:{}", recipe.grad_accum_steps),
            format!("attention_mode:gqa num_heads:{} num_kv_heads:{}", recipe.num_heads, recipe.num_kv_heads),
            format!(
                "tie_embeddings:{tied} embed_lr:{} head_lr:{} matrix_lr:{} scalar_lr:{}",
                python(recipe.token_lr()),
                python(head_lr),
                python(recipe.matrix_lr),
                python(recipe.scalar_lr)
            ),
            format!(
                "train_batch_tokens:{} train_seq_len:{} iterations:{} warmup_steps:{} max_wallclock_seconds:{}",
                recipe.train_batch_tokens,
                recipe.train_seq_len,
                recipe.iterations,
                recipe.warmup_steps,
                fixed(recipe.max_wallclock_seconds, 3)
            ),
            format!("seed:{}", recipe.seed),
        ]
    }

    /// The `done`-th of `steps` warm-up steps, from 1.
    pub fn warmup_step(done: usize, steps: usize) -> String {
        format!("warmup_step:{done}/{steps}")
    }

    fn clock(step: usize, train_ms: f64) -> String {
        let average = train_ms / step.max(1) as f64;
        format!("train_time:{}ms step_avg:{}ms", fixed(train_ms, 0), fixed(average, 2))
    }

    /// A validation after `step` completed steps: loss in nats per token, bits per byte, training time so far in ms.
    pub fn validated(step: usize, iterations: usize, val_loss: f64, val_bpb: f64, train_ms: f64) -> String {
        let [loss, bpb] = [val_loss, val_bpb].map(|v| fixed(v, 4));
        format!("step:{step}/{iterations} val_loss:{loss} val_bpb:{bpb} {}", clock(step, train_ms))
    }

    /// A training loss, in nats per token, of the `step`-th step, from 1.
    pub fn trained(step: usize, iterations: usize, train_loss: f64, train_ms: f64) -> String {
        format!("step:{step}/{iterations} train_loss:{} {}", fixed(train_loss, 4), clock(step, train_ms))
    }

    /// The average of the weights takes their place.
    pub const APPLYING_AVERAGE: &str = "ema:applying EMA weights";

    /// The score of the averaged weights.
    pub fn averaged(val_loss: f64, val_bpb: f64, eval_ms: f64) -> String {
        let [loss, bpb] = [val_loss, val_bpb].map(|value| fixed(value, 4));
        format!("DIAGNOSTIC post_ema val_loss:{loss} val_bpb:{bpb} eval_time:{}ms", fixed(eval_ms, 0))
    }

    /// The recurrence is on from this step, `done` of the run.
    pub fn recurrence(step: usize, done: f64, order: &[usize]) -> String {
        format!("depth_recurrence:enabled at step {step} frac={} schedule={order:?}", fixed(done, 2))
    }

    /// Training quantises its linear weights from this step.
    pub fn late_qat(recipe: &Recipe, step: usize, lr_mul: f64) -> String {
        if recipe.system == PR1382 {
            return format!("late_qat:enabled step:{step} scale:{}", fixed(lr_mul, 4));
        }
        let bits = recipe.quant_bits;
        format!("late_qat:enabled bits={bits} at step {step} scale={}", fixed(lr_mul, 4))
    }

    /// The run stops at its wallclock cap after `step` steps.
    pub fn stopping_early(step: usize, iterations: usize, train_ms: f64) -> String {
        let time = fixed(train_ms, 0);
        format!("stopping_early: wallclock_cap train_time:{time}ms step:{step}/{iterations}")
    }

    /// The most device memory in use, and held from the device, in bytes; printed in whole MiB.
    pub fn peak_memory(allocated: u64, reserved: u64) -> String {
        format!("peak memory allocated: {} MiB reserved: {} MiB", allocated >> 20, reserved >> 20)
    }

    /// The sizes of the float model and of the packed source, in bytes.
    pub fn serialized(model: u64, code: u64) -> [String; 3] {
        [
            format!("Serialized model: {model} bytes"),
            format!("Code size: {code} bytes"),
            format!("Total submission size: {} bytes", model.saturating_add(code)),
        ]
    }

    /// The sizes of the artifact, in bytes: the `file`, its quantised tensors (`payload`), the container before
    /// compression (`raw`), the packed source (`code`); `float_payload` is what the tensors took before quantisation.
    pub fn serialized_quantised(
        quant: &str,
        codec: &str,
        file: u64,
        [float_payload, payload, raw]: [u64; 3],
        code: u64,
    ) -> [String; 2] {
        let ratio = fixed(float_payload as f64 / payload.max(1) as f64, 2);
        [
            format!(
                "Serialized model {quant}+{codec}: {file} bytes (payload:{payload} raw_torch:{raw} payload_ratio:{ratio}x)"
            ),
            format!("Total submission size {quant}+{codec}: {} bytes", file.saturating_add(code)),
        ]
    }

    /// The score of the artifact, read back: `final_int8_zlib_roundtrip` with the quantisation and codec that were used.
    pub fn roundtrip(quant: &str, codec: &str, val_loss: f64, val_bpb: f64, eval_ms: f64) -> [String; 2] {
        last(&format!("final_{quant}_{codec}_roundtrip"), "", [val_loss, val_bpb, eval_ms])
    }

    /// The score by a sliding window: PR #1382's `final_int6_sliding_window` with the quantisation that was used.
    pub fn sliding(quant: &str, stride: usize, val_loss: f64, val_bpb: f64, eval_ms: f64) -> [String; 2] {
        let stride = format!(" stride:{stride}");
        last(&format!("final_{quant}_sliding_window"), &stride, [val_loss, val_bpb, eval_ms])
    }

    /// The score of test-time training: PR #1382's `final_ttt_sliding`.
    pub fn test_time_training(val_loss: f64, val_bpb: f64, eval_ms: f64) -> [String; 2] {
        last("final_ttt_sliding", "", [val_loss, val_bpb, eval_ms])
    }

    fn last(name: &str, more: &str, [val_loss, val_bpb, eval_ms]: [f64; 3]) -> [String; 2] {
        let scores =
            |decimals| format!("val_loss:{} val_bpb:{}", fixed(val_loss, decimals), fixed(val_bpb, decimals));
        [
            format!("{name} {}{more} eval_time:{}ms", scores(4), fixed(eval_ms, 0)),
            format!("{name}_exact {}", scores(8)),
        ]
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn floats_print_as_python_prints_them() {
            let cases = [
                (0.05, "0.05"),
                (0.0, "0.0"),
                (1.0, "1.0"),
                (1e-4, "0.0001"),
                (1e-5, "1e-05"),
                (1.5e-8, "1.5e-08"),
                (1e15, "1000000000000000.0"),
                (1e16, "1e+16"),
                (2.5e100, "2.5e+100"),
                (0.1 + 0.2, "0.30000000000000004"),
                (f64::INFINITY, "inf"),
                (f64::NAN, "nan"),
            ];
            for (value, text) in cases {
                assert_eq!(python(value), text);
            }
        }

        #[test]
        fn decimals_round_half_to_even_as_c_does() {
            let rounded: Vec<_> = [0.5, 1.5, 2.5, 3.5].into_iter().map(|v| fixed(v, 0)).collect();
            assert_eq!(rounded, ["0", "2", "2", "4"]);
            assert_eq!(fixed(f64::NAN, 4), "nan");
            assert_eq!(fixed(f64::INFINITY, 4), "inf");
            assert_eq!(fixed(0.00005, 4), "0.0001");
        }
    }
}

/// One line of `metrics.jsonl`: a step whose loss was logged or validated. A number that is unknown or not finite is
/// written as `null`, and `null` is read as NaN.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Metric {
    /// Completed optimizer steps.
    pub step: usize,
    /// Mean loss of the step's tokens in nats; NaN at step 0.
    #[serde(with = "or_null", default = "unknown")]
    pub train_loss: f64,
    /// The learning rates' multiplier at the step.
    #[serde(with = "or_null", default = "unknown")]
    pub lr_mul: f64,
    /// Time of a step, in milliseconds.
    #[serde(with = "or_null", default = "unknown")]
    pub step_ms: f64,
    /// Training tokens per second.
    #[serde(with = "or_null", default = "unknown")]
    pub tokens_per_s: f64,
    /// Validation loss in nats per token, where validated.
    #[serde(with = "some_or_null", default, skip_serializing_if = "Option::is_none")]
    pub val_loss: Option<f64>,
    /// Validation bits per byte, where validated.
    #[serde(with = "some_or_null", default, skip_serializing_if = "Option::is_none")]
    pub val_bpb: Option<f64>,
}

fn unknown() -> f64 {
    f64::NAN
}

impl Default for Metric {
    fn default() -> Self {
        Self {
            step: 0,
            train_loss: unknown(),
            lr_mul: unknown(),
            step_ms: unknown(),
            tokens_per_s: unknown(),
            val_loss: None,
            val_bpb: None,
        }
    }
}

/// Not finite: `null`, both ways.
mod or_null {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        if value.is_finite() { serializer.serialize_f64(*value) } else { serializer.serialize_unit() }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

/// As [`or_null`], where an absent key means "not validated".
mod some_or_null {
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        super::or_null::serialize(&value.unwrap_or(f64::NAN), serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        super::or_null::deserialize(deserializer).map(Some)
    }
}

impl Metric {
    /// This line completed by what `earlier` knew of the same step.
    fn over(self, earlier: Self) -> Self {
        let known = |new: f64, old: f64| if new.is_nan() { old } else { new };
        Self {
            step: self.step,
            train_loss: known(self.train_loss, earlier.train_loss),
            lr_mul: known(self.lr_mul, earlier.lr_mul),
            step_ms: known(self.step_ms, earlier.step_ms),
            tokens_per_s: known(self.tokens_per_s, earlier.tokens_per_s),
            val_loss: self.val_loss.or(earlier.val_loss),
            val_bpb: self.val_bpb.or(earlier.val_bpb),
        }
    }
}

/// `DIR/metrics.jsonl`: one JSON object a logged step, steps ascending. Each is in the file when the call returns.
pub struct Metrics {
    path: PathBuf,
    file: File,
    rows: Vec<Metric>,
    /// Bytes of the file before its last line.
    last_line: u64,
    end: u64,
}

/// The longest line of `metrics.jsonl` and the most lines that are read: far over what a run writes.
const LONGEST_LINE: usize = 4096;
const MOST_LINES: usize = 2_000_000;

impl Metrics {
    /// An empty `dir/metrics.jsonl`, creating `dir`.
    pub fn create(dir: &Path) -> Result<Self> {
        Self::start(dir, Vec::new())
    }

    /// `dir/metrics.jsonl` without the lines after `step`, to go on from there; the lines kept are kept to the byte.
    pub fn resume(dir: &Path, step: usize) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let mut lines = if path.exists() { Self::parse(&path)? } else { Vec::new() };
        lines.retain(|(row, _)| row.step <= step);
        Self::start(dir, lines)
    }

    fn start(dir: &Path, lines: Vec<(Metric, Vec<u8>)>) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let (rows, texts): (Vec<_>, Vec<_>) = lines.into_iter().unzip();
        let end: usize = texts.iter().map(Vec::len).sum();
        let last_line = end - texts.last().map_or(0, Vec::len);
        // The older file stays until the shortened one is whole.
        crate::files::write_atomic(&path, &texts.concat())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| Error::write(&path, &e))?;
        Ok(Self { path, file, rows, last_line: last_line as u64, end: end as u64 })
    }

    fn text(row: &Metric) -> String {
        // Cannot fail: the keys are texts and the values numbers or null.
        serde_json::to_string(row).map(|text| text + "\n").unwrap_or_default()
    }

    /// Records a step. A second record of the last step completes its line (a step that is logged, then validated).
    pub fn record(&mut self, row: Metric) -> Result<()> {
        let mut row = row;
        if let Some(last) = self.rows.pop_if(|last| last.step == row.step) {
            row = row.over(last);
            self.end = self.last_line;
        }
        let text = Self::text(&row);
        let written = self.file.set_len(self.end).and_then(|()| self.file.write_all(text.as_bytes()));
        written.map_err(|error| Error::write(&self.path, &error))?;
        self.last_line = self.end;
        self.end += text.len() as u64;
        self.rows.push(row);
        Ok(())
    }

    /// Every step recorded so far, a resumed run's earlier ones included.
    pub fn rows(&self) -> &[Metric] {
        &self.rows
    }

    /// Reads a `metrics.jsonl`. A last line that was cut short, by a crash, is left out.
    pub fn read(path: &Path) -> Result<Vec<Metric>> {
        Ok(Self::parse(path)?.into_iter().map(|(row, _)| row).collect())
    }

    /// Each line's row and bytes.
    fn parse(path: &Path) -> Result<Vec<(Metric, Vec<u8>)>> {
        let mut reader = BufReader::new(File::open(path).map_err(|error| Error::read(path, &error))?);
        let mut lines = Vec::new();
        loop {
            let mut line = Vec::new();
            let read = reader.by_ref().take(LONGEST_LINE as u64).read_until(b'\n', &mut line);
            read.map_err(|error| Error::read(path, &error))?;
            let whole = line.last() == Some(&b'\n');
            if line.is_empty() || (!whole && line.len() < LONGEST_LINE) {
                return Ok(lines);
            }
            let row =
                if whole && lines.len() < MOST_LINES { serde_json::from_slice(&line).ok() } else { None };
            let row = row.ok_or_else(|| {
                let place = format!("{} line {}", path.display(), lines.len() + 1);
                Error::input("bad line", place, "one JSON object a line, with key step")
            })?;
            lines.push((row, line));
        }
    }
}
