//! The run: warm-up, steps, validation, logs, checkpoints, and the ways to stop (spec/challenge.md section 4).

use super::checkpoint::{Checkpoint, Progress, write_tensors};
use super::log::{Echo, Metric, Metrics, RunLog, lines, logs_step};
use super::step::{Span, Trainer};
use super::{guards, run};
use crate::backend::{self, Job, Target};
use crate::data::byte_table::ByteTable;
use crate::data::folder::{DataFolder, Split};
use crate::data::stream::{TokenStream, ValTokens};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::eval::{self, full::Score};
use crate::host::HostTensor;
use crate::model::{Model, params};
use crate::ops::Plain;
use crate::optim::{OptimizerState, Optimizers, STATE_PREFIXES, schedule};
use crate::recipe::Recipe;
use crate::report::curve;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Instant;

/// What to train, on what, and where to leave it.
pub struct Options {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The folder of shards.
    pub data: PathBuf,
    /// The shards' tokenizer.
    pub tokenizer: Tokenizer,
    /// How the tokenizer was named (`byte`, or a path), for the log.
    pub tokenizer_name: String,
    /// The run's folder.
    pub out: PathBuf,
    /// Go on from the newest checkpoint in this folder.
    pub resume: Option<PathBuf>,
    /// Tokens of one forward and backward at most; the whole span if absent.
    pub micro_batch: Option<usize>,
    /// Steps between checkpoints; 0 saves only at the end and when interrupted.
    pub save_every: usize,
    /// Where the log's lines are shown.
    pub echo: Echo,
}

/// How far a run is, for a progress bar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Status {
    /// Completed steps.
    pub step: usize,
    /// Steps of the run (if no wallclock cap ends it sooner).
    pub iterations: usize,
    /// Loss of the last step in nats.
    pub train_loss: f64,
    /// The last validation's bits per byte; NaN before the first.
    pub val_bpb: f64,
    /// Training tokens per second.
    pub tokens_per_s: f64,
    /// Estimated seconds to the end.
    pub left_s: f64,
    /// How much of the run is done, 0 to 1.
    pub fraction: f64,
}

/// What a run reached.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Summary {
    /// Completed optimizer steps.
    pub steps: usize,
    /// Mean loss of the last step in nats.
    pub train_loss: Option<f64>,
    /// Validation loss in nats per token at the end.
    pub val_loss: f64,
    /// Validation bits per byte at the end.
    pub val_bpb: f64,
    /// Training tokens per second, validation left out.
    pub tokens_per_s: Option<f64>,
    /// Mean time of a step in milliseconds.
    pub step_ms: Option<f64>,
    /// Seconds from the start of the run to its first finished step.
    pub first_step_s: Option<f64>,
    /// Most device memory in use, in bytes.
    pub peak_memory_bytes: Option<u64>,
    /// The run's folder.
    pub out: PathBuf,
}

/// Trains on the target device. `observe` is told of every step.
///
/// On an interrupt the step is finished and a checkpoint saved before [`Error::Interrupted`] is returned.
pub fn train(options: Options, target: &Target, observe: &mut dyn FnMut(&Status)) -> Result<Summary> {
    let micro_batch = micro_sequences(&options)? * options.recipe.train_seq_len;
    let trained = backend::run(target, TrainJob { options, observe, started: Instant::now() });
    trained.map_err(|error| {
        if !backend::is_out_of_memory(&error) {
            return error;
        }
        Error::failed(
            format!("out of memory on {}", target.label),
            format!("--micro-batch {micro_batch}"),
            format!("a micro-batch that fits: try --micro-batch {}", micro_batch.div_ceil(2)),
        )
    })
}

/// Sequences of one forward and backward.
fn micro_sequences(options: &Options) -> Result<usize> {
    let (span, time) = (options.recipe.span_tokens(), options.recipe.train_seq_len);
    let tokens = options.micro_batch.unwrap_or(span);
    if tokens < time {
        return Err(Error::input(
            format!("micro-batch of {tokens} tokens"),
            "--micro-batch",
            format!("at least one sequence of train_seq_len={time} tokens"),
        ));
    }
    Ok(tokens.min(span) / time)
}

struct TrainJob<'a> {
    options: Options,
    observe: &'a mut dyn FnMut(&Status),
    started: Instant,
}

impl Job for TrainJob<'_> {
    type Output = Summary;

    fn run<P: Plain>(self, device: &P::Device, target: &Target) -> Result<Summary> {
        Session::<P>::open(self.options, device, target, self.started)?.run(self.observe)
    }
}

/// What a run needs of its data.
struct Data {
    stream: TokenStream,
    val: ValTokens,
    table: ByteTable,
}

struct Session<'a, P: Plain> {
    recipe: Recipe,
    out: PathBuf,
    save_every: usize,
    target: &'a Target,
    trainer: Trainer<P>,
    data: Data,
    log: RunLog,
    metrics: Metrics,
    /// Completed steps, and the training time that they took.
    step: usize,
    train_ms: f64,
    train_loss: Option<f64>,
    /// Steps and time of this process, for its speed.
    first_step: usize,
    first_ms: f64,
    started: Instant,
    first_step_s: Option<f64>,
    peak: Option<backend::MemoryUse>,
    last_val: Option<Score>,
}

impl<'a, P: Plain> Session<'a, P> {
    fn open(options: Options, device: &P::Device, target: &'a Target, started: Instant) -> Result<Self> {
        let micro_sequences = micro_sequences(&options)?;
        let Options { recipe, out, .. } = options;
        recipe.validate()?;
        let folder = DataFolder::open(&options.data)?;
        folder.check_tokenizer(&options.tokenizer)?;
        let data = Data {
            stream: folder.train(recipe.vocab_size)?,
            val: folder.val(recipe.train_seq_len, recipe.vocab_size)?,
            table: ByteTable::new(&options.tokenizer, recipe.vocab_size)?,
        };
        let mut warnings = Vec::new();
        let checkpoint = match &options.resume {
            Some(dir) => Some(Checkpoint::latest(dir, &mut |line| warnings.push(line.to_string()))?),
            None => None,
        };
        if let Some(checkpoint) = &checkpoint {
            check_same_run(&recipe, &checkpoint.progress.recipe_toml)?;
        }
        let model = Model::<P>::new(&recipe, device, target.precision.dtype())?;
        let optimizers = Optimizers::new(&recipe, &model);
        let trainer = Trainer { model, optimizers, seq_len: recipe.train_seq_len, micro_sequences };
        let resumed = options.resume.as_ref() == Some(&out);
        let metrics = match &checkpoint {
            Some(checkpoint) if resumed => Metrics::resume(&out, checkpoint.progress.step)?,
            _ => Metrics::create(&out)?,
        };
        let log = RunLog::open(&out, resumed, options.echo)?;
        let mut session = Self {
            recipe,
            out,
            save_every: options.save_every,
            target,
            trainer,
            data,
            log,
            metrics,
            step: 0,
            train_ms: 0.0,
            train_loss: None,
            first_step: 0,
            first_ms: 0.0,
            started,
            first_step_s: None,
            peak: None,
            last_val: None,
        };
        crate::files::write_atomic(&session.out.join("recipe.toml"), session.recipe.to_toml().as_bytes())?;
        run::save_tokenizer(&session.out, &options.tokenizer)?;
        session.log_header(&folder, &options.tokenizer, &options.tokenizer_name)?;
        for warning in warnings {
            session.log.line(&format!("warning: {warning}"))?;
        }
        if let Some(checkpoint) = checkpoint {
            session.restore(checkpoint)?;
        }
        Ok(session)
    }

    fn log_header(&mut self, folder: &DataFolder, tokenizer: &Tokenizer, name: &str) -> Result<()> {
        self.log.lines(&self.recipe.to_toml())?;
        self.log.line(&format!("device: {} precision:{} ({})", self.target.label, self.target.precision, self.target.why))?;
        self.log.line(&lines::val_bpb_enabled(tokenizer.kind(), name.as_ref()))?;
        self.log.line(&lines::train_loader(folder.dir(), folder.shards(Split::Train).len()))?;
        let targets = self.data.val.sequences() * self.data.val.seq_len();
        self.log.line(&lines::val_loader(&folder.dir().join("fineweb_val_*.bin"), targets as u64))?;
        let params = self.trainer.model.params().numel() as u64;
        lines::header(&self.recipe, params, 1).iter().try_for_each(|line| self.log.line(line))
    }

    fn run(mut self, observe: &mut dyn FnMut(&Status)) -> Result<Summary> {
        if self.step == 0 {
            self.warm_up()?;
        }
        (self.first_step, self.first_ms) = (self.step, self.train_ms);
        let mut stop_after = None;
        let mut clock = Instant::now();
        loop {
            let last = self.step == self.recipe.iterations || stop_after.is_some_and(|stop| self.step >= stop);
            let every = self.recipe.val_loss_every;
            if last || (every > 0 && self.step.is_multiple_of(every)) {
                self.train_ms += milliseconds(clock);
                self.validate()?;
                clock = Instant::now();
            }
            if last {
                break;
            }
            let elapsed = self.train_ms + milliseconds(clock);
            let lr_mul = schedule::lr_multiplier(&self.recipe, self.step, elapsed);
            let momentum = schedule::muon_momentum(&self.recipe, self.step);
            let spans = self.spans()?;
            let loss = self.trainer.step(&spans, lr_mul, momentum, self.step + 1)?;
            eval::wait::<P>(self.trainer.model.device())?;
            self.step += 1;
            self.train_loss = Some(loss);
            self.first_step_s.get_or_insert_with(|| self.started.elapsed().as_secs_f64());
            self.note_memory();

            let train_ms = self.train_ms + milliseconds(clock);
            let cap = self.recipe.wallclock_cap();
            if stop_after.is_none() && cap.is_some_and(|cap| train_ms >= cap * 1000.0) {
                stop_after = Some(self.step);
            }
            let status = self.status(train_ms);
            if logs_step(self.step, self.recipe.train_log_every, stop_after.is_some()) {
                self.log.line(&lines::trained(self.step, self.recipe.iterations, loss, train_ms))?;
                self.metrics.record(Metric {
                    step: self.step,
                    train_loss: loss,
                    lr_mul,
                    step_ms: train_ms / self.step as f64,
                    tokens_per_s: status.tokens_per_s,
                    ..Metric::default()
                })?;
            }
            observe(&status);
            let due = self.save_every > 0 && self.step.is_multiple_of(self.save_every);
            if due || guards::interrupted() {
                self.train_ms += milliseconds(clock);
                let path = self.checkpoint()?;
                guards::check_interrupt(&format!("step {} saved in {}", self.step, path.display()))?;
                clock = Instant::now();
            }
        }
        if stop_after.is_some() && self.step < self.recipe.iterations {
            let line = lines::stopping_early(self.step, self.recipe.iterations, self.train_ms);
            self.log.line(&line)?;
        }
        self.finish()
    }

    /// Real steps to prime the device, after which weights, optimizers and data are as before.
    fn warm_up(&mut self) -> Result<()> {
        let steps = self.recipe.warmup_steps;
        if steps == 0 {
            return Ok(());
        }
        let initial = self.trainer.model.params().to_host()?;
        let position = self.data.stream.position();
        for step in 0..steps {
            let spans = self.spans()?;
            self.trainer.step(&spans, 1.0, schedule::muon_momentum(&self.recipe, 0), 0)?;
            if steps <= 20 || (step + 1).is_multiple_of(10) || step + 1 == steps {
                self.log.line(&lines::warmup_step(step + 1, steps))?;
            }
            guards::check_interrupt("nothing is saved yet")?;
        }
        self.trainer.model.params().load(&initial, "the weights before the warm-up")?;
        self.trainer.optimizers = Optimizers::new(&self.recipe, &self.trainer.model);
        self.data.stream.seek(position)
    }

    /// The spans of the next step.
    fn spans(&mut self) -> Result<Vec<Span>> {
        let tokens = self.recipe.span_tokens();
        (0..self.recipe.grad_accum_steps).map(|_| self.data.stream.next_batch(tokens, 0, 1)).collect()
    }

    fn validate(&mut self) -> Result<()> {
        let batch = self.recipe.val_batch_tokens().min(self.trainer.micro_sequences * self.trainer.seq_len);
        let place = format!("validation at step {}", self.step);
        let mut progress = |_, _| guards::check_interrupt(&place);
        let scored =
            eval::full::score(&self.trainer.model, &self.data.val, &self.data.table, batch, &mut progress);
        let score = match scored {
            Err(Error::Interrupted { .. }) => {
                let path = self.checkpoint()?;
                return guards::check_interrupt(&format!("step {} saved in {}", self.step, path.display()));
            }
            other => other?,
        };
        self.note_memory();
        let (loss, bpb) = (score.val_loss, score.val_bpb);
        self.log.line(&lines::validated(self.step, self.recipe.iterations, loss, bpb, self.train_ms))?;
        self.metrics.record(Metric {
            step: self.step,
            val_loss: Some(loss),
            val_bpb: Some(bpb),
            ..Metric::default()
        })?;
        self.last_val = Some(score);
        Ok(())
    }

    fn note_memory(&mut self) {
        if let Some(now) = backend::memory_use(self.target) {
            let before = self.peak.get_or_insert(now);
            before.in_use = before.in_use.max(now.in_use);
            before.reserved = before.reserved.max(now.reserved);
        }
    }

    /// Tokens per second of this process, over training time.
    fn tokens_per_s(&self, train_ms: f64) -> f64 {
        let (steps, ms) = (self.step - self.first_step, train_ms - self.first_ms);
        (steps * self.recipe.train_batch_tokens) as f64 / (ms / 1000.0)
    }

    fn status(&self, train_ms: f64) -> Status {
        let step_ms = train_ms / self.step as f64;
        let by_steps = (self.recipe.iterations - self.step) as f64 * step_ms / 1000.0;
        let by_clock = self.recipe.wallclock_cap().map(|cap| cap - train_ms / 1000.0);
        let left_s = by_clock.map_or(by_steps, |left| left.clamp(0.0, by_steps));
        let done = train_ms / 1000.0;
        Status {
            step: self.step,
            iterations: self.recipe.iterations,
            train_loss: self.train_loss.unwrap_or(f64::NAN),
            val_bpb: self.last_val.map_or(f64::NAN, |score| score.val_bpb),
            tokens_per_s: self.tokens_per_s(train_ms),
            left_s,
            fraction: done / (done + left_s),
        }
    }

    fn checkpoint(&self) -> Result<PathBuf> {
        let state = self.trainer.optimizers.state();
        let mut state_steps = BTreeMap::new();
        let mut rows = Vec::new();
        for (name, row, steps) in state.rows() {
            state_steps.insert(name.clone(), *steps);
            rows.push(params::to_host(name, &row.dims(), row.clone())?);
        }
        let progress = Progress {
            step: self.step,
            position: self.data.stream.position(),
            train_ms: self.train_ms,
            train_loss: self.train_loss,
            state_steps,
            recipe_toml: self.recipe.to_toml(),
        };
        Checkpoint { progress, params: self.trainer.model.params().to_host()?, state: rows }.save(&self.out)
    }

    fn restore(&mut self, checkpoint: Checkpoint) -> Result<()> {
        let Checkpoint { progress, params, state } = checkpoint;
        let model = &self.trainer.model;
        model.params().load(&params, "the checkpoint")?;
        let mut restored = OptimizerState::default();
        for tensor in &state {
            let name = &tensor.name;
            let param = STATE_PREFIXES.iter().find_map(|prefix| model.params().get(name.strip_prefix(prefix)?));
            let Some(param) = param else {
                return Err(Error::input(format!("unknown state {name}"), "the checkpoint", "the recipe's own"));
            };
            tensor.expect_shape(&[param.numel()], "the checkpoint")?;
            let row = params::from_host(tensor, model.device(), param.master_type());
            let steps = progress.state_steps.get(name).copied().unwrap_or(0);
            restored.push(name.clone(), row, steps);
        }
        self.trainer.optimizers.restore(restored);
        self.data.stream.seek(progress.position)?;
        (self.step, self.train_ms, self.train_loss) = (progress.step, progress.train_ms, progress.train_loss);
        if self.step > self.recipe.iterations {
            return Err(Error::input(
                format!("iterations={} is before the checkpoint's step {}", self.recipe.iterations, self.step),
                "iterations",
                "more steps than are done",
            ));
        }
        let line = format!("resumed at step:{} train_time:{:.0}ms", self.step, self.train_ms);
        self.log.line(&line)
    }

    /// Leaves the final files and reports.
    fn finish(mut self) -> Result<Summary> {
        if let Some(peak) = self.peak {
            self.log.line(&lines::peak_memory(peak.in_use, peak.reserved))?;
        }
        self.checkpoint()?;
        let params = self.trainer.model.params().to_host()?;
        let tensors: Vec<&HostTensor> = params.iter().collect();
        write_tensors(&self.out.join(run::FINAL), &tensors, HashMap::new())?;
        let point = |row: &Metric| curve::Point {
            step: row.step,
            train_loss: Some(row.train_loss),
            val_bpb: row.val_bpb,
        };
        let points: Vec<curve::Point> = self.metrics.rows().iter().map(point).collect();
        curve::draw(&points, &self.out.join("curve.svg"), &self.recipe.name)?;
        let steps = self.step - self.first_step;
        let speed = |value: f64| (steps > 0).then_some(value);
        let score = self.last_val;
        Ok(Summary {
            steps: self.step,
            train_loss: self.train_loss,
            val_loss: score.map_or(f64::NAN, |score| score.val_loss),
            val_bpb: score.map_or(f64::NAN, |score| score.val_bpb),
            tokens_per_s: speed(self.tokens_per_s(self.train_ms)),
            step_ms: speed((self.train_ms - self.first_ms) / steps as f64),
            first_step_s: self.first_step_s,
            peak_memory_bytes: self.peak.map(|peak| peak.in_use),
            out: self.out,
        })
    }
}

/// Keys that may change when a run is resumed: how long it goes on, and what it reports on the way.
const FREE_KEYS: [&str; 8] = [
    "name",
    "summary",
    "iterations",
    "max_wallclock_seconds",
    "warmup_steps",
    "val_batch_size",
    "val_loss_every",
    "train_log_every",
];

/// Refuses a recipe that is not the checkpoint's where it would change what was computed so far.
fn check_same_run(recipe: &Recipe, saved: &str) -> Result<()> {
    let saved = Recipe::from_toml(saved, "the checkpoint".as_ref())?;
    for key in crate::recipe::keys().iter().filter(|key| !FREE_KEYS.contains(&key.name)) {
        if key.value(recipe) != key.value(&saved) {
            return Err(Error::input(
                format!("{} differs from the resumed run's", key.name),
                format!("recipe key {}", key.name),
                "the value that the run was started with",
            ));
        }
    }
    Ok(())
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
