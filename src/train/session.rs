//! The run: warm-up, steps, validation, logs, checkpoints, and the ways to stop (spec/challenge.md section 4).

use super::checkpoint::{self, Checkpoint, DataSource, Progress};
use super::log::{Metric, Metrics, RunLog, lines, logs_step};
use super::options::{Options, Status, Summary};
use super::{guards, resume, run, tensors_file};
use crate::backend::{self, Job, Target};
use crate::data::byte_table::ByteTable;
use crate::data::folder::{DataFolder, Split};
use crate::data::stream::{TokenStream, ValTokens};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::eval::{self, full::Score};
use crate::host::HostTensor;
use crate::model::{self, Model, params};
use crate::ops::Plain;
use crate::optim::schedule;
use crate::optim::step::{Span, Trainer, check_finite};
use crate::recipe::Recipe;
use crate::report::curve;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Trains on the target device. `observe` is told of every step.
///
/// On an interrupt the step is finished and a checkpoint saved before [`Error::Interrupted`] is returned.
pub fn train(options: Options, target: &Target, observe: &mut dyn FnMut(&Status)) -> Result<Summary> {
    model::check(&options.recipe)?;
    let micro_batch = options.micro_sequences()? * options.recipe.train_seq_len;
    let job = TrainJob { options, observe, started: Instant::now() };
    let trained = backend::guard(target, || backend::run(target, job));
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
    source: DataSource,
}

struct Session<'a, P: Plain> {
    recipe: Recipe,
    out: PathBuf,
    save_every: usize,
    target: &'a Target,
    trainer: Trainer<P>,
    data: Data,
    tokenizer: Tokenizer,
    log: RunLog,
    metrics: Metrics,
    /// Files of an older run in the folder, or older weights of this one: they go when newer ones are whole.
    replaced: Vec<PathBuf>,
    /// Completed steps, and the training time that they took.
    step: usize,
    train_ms: f64,
    train_loss: Option<f64>,
    /// The numbers of the last step.
    row: Metric,
    /// The step of the last checkpoint that was saved.
    saved: Option<usize>,
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
        let micro_sequences = options.micro_sequences()?;
        let Options { recipe, out, mut warn, tokenizer, .. } = options;
        let folder = DataFolder::open(&options.data)?;
        folder.check_tokenizer(&tokenizer)?;
        let mut data = Data {
            stream: folder.train(recipe.vocab_size)?,
            val: folder.val(recipe.val_seq_len(), recipe.vocab_size)?.limit(recipe.val_tokens),
            table: ByteTable::new(&tokenizer, recipe.vocab_size)?,
            source: DataSource::of(&folder, &options.tokenizer_name)?,
        };
        let mut warnings = Vec::new();
        let mut note = |line: &str| {
            warn(line);
            warnings.push(format!("warning: {line}"));
        };
        let resumed = match &options.resume {
            Some(dir) => Some(checkpoint::newest(dir, &mut note, Checkpoint::load)?.1),
            None => None,
        };
        if let Some(checkpoint) = &resumed {
            resume::check_same_run(&recipe, &data.source, &checkpoint.progress)?;
            data.stream.seek(checkpoint.progress.position)?;
        }
        // The ids of a shard are checked when it is reached: those of the first step before anything is written.
        let start = data.stream.position();
        data.stream.next_batch(recipe.span_tokens(), 0, 1)?;
        data.stream.seek(start)?;
        let model = Model::<P>::new(&recipe, device, target.precision.dtype())?;
        let trainer = Trainer::new(model, &recipe, micro_sequences);
        let in_place = options.resume.as_ref().is_some_and(|dir| is_same_folder(dir, &out));
        let metrics = match &resumed {
            Some(checkpoint) if in_place => Metrics::resume(&out, checkpoint.progress.step)?,
            _ => Metrics::create(&out)?,
        };
        let log = RunLog::open(&out, in_place, options.echo)?;
        let mut replaced = if in_place { Vec::new() } else { checkpoint::list(&out) };
        replaced.extend(Some(out.join(run::FINAL)).filter(|last| last.exists()));
        if in_place || replaced.is_empty() {
            run::save_identity(&out, &recipe, &tokenizer)?;
        }
        let mut session = Self {
            recipe,
            out,
            save_every: options.save_every,
            target,
            trainer,
            data,
            tokenizer,
            log,
            metrics,
            replaced,
            step: 0,
            train_ms: 0.0,
            train_loss: None,
            row: Metric::default(),
            saved: None,
            first_step: 0,
            first_ms: 0.0,
            started,
            first_step_s: None,
            peak: None,
            last_val: None,
        };
        session.log_header(&folder, &options.tokenizer_name)?;
        warnings.iter().try_for_each(|warning| session.log.note(warning))?;
        if let Some(Checkpoint { progress, params, state }) = resumed {
            resume::restore(&mut session.trainer, &session.recipe, &progress, &params, &state)?;
            (session.step, session.train_ms) = (progress.step, progress.train_ms);
            session.train_loss = progress.train_loss;
            session.row = Metric {
                step: progress.step,
                train_loss: progress.train_loss.unwrap_or(f64::NAN),
                ..Metric::default()
            };
            session
                .log
                .line(&format!("resumed at step:{} train_time:{:.0}ms", session.step, session.train_ms))?;
        }
        Ok(session)
    }

    fn log_header(&mut self, folder: &DataFolder, tokenizer_name: &str) -> Result<()> {
        self.log.lines(&self.recipe.to_toml())?;
        self.log.line(&format!(
            "device: {} precision:{} ({})",
            self.target.label, self.target.precision, self.target.why
        ))?;
        self.log.line(&lines::val_bpb_enabled(self.tokenizer.kind(), tokenizer_name.as_ref()))?;
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
            let last =
                self.step == self.recipe.iterations || stop_after.is_some_and(|stop| self.step >= stop);
            let every = self.recipe.val_loss_every;
            if last || (every > 0 && self.step.is_multiple_of(every)) {
                self.train_ms += milliseconds(clock);
                if last && self.recipe.averages_before_validation() {
                    self.take_average()?;
                }
                self.validate(false)?;
                clock = Instant::now();
            }
            if last {
                break;
            }
            let elapsed = self.train_ms + milliseconds(clock);
            let lr_mul = schedule::lr_multiplier(&self.recipe, self.step, elapsed);
            let momentum = schedule::muon_momentum(&self.recipe, self.step);
            let spans = self.spans()?;
            self.set_phase(lr_mul, elapsed)?;
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
            self.row = Metric {
                step: self.step,
                train_loss: loss,
                lr_mul,
                step_ms: train_ms / self.step as f64,
                tokens_per_s: status.tokens_per_s,
                ..Metric::default()
            };
            if logs_step(self.step, self.recipe.train_log_every, stop_after.is_some()) {
                self.log.line(&lines::trained(self.step, self.recipe.iterations, loss, train_ms))?;
                self.metrics.record(self.row)?;
            }
            observe(&status);
            let due = self.save_every > 0 && self.step.is_multiple_of(self.save_every);
            if due || guards::interrupted() {
                self.train_ms += milliseconds(clock);
                self.save_and_check_interrupt()?;
                clock = Instant::now();
            }
        }
        if stop_after.is_some() && self.step < self.recipe.iterations {
            let line = lines::stopping_early(self.step, self.recipe.iterations, self.train_ms);
            self.log.line(&line)?;
        }
        if !self.recipe.averages_before_validation() && self.trainer.averages.is_ready() {
            self.take_average()?;
            self.validate(true)?;
        }
        self.finish()
    }

    /// Real steps to prime the device, after which weights, optimizers and data are as before; none where no step follows.
    fn warm_up(&mut self) -> Result<()> {
        let steps = self.recipe.warmup_steps;
        if steps == 0 || self.step >= self.recipe.iterations {
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
        self.trainer.start_anew(&self.recipe);
        self.data.stream.seek(position)
    }

    /// What a step computes that earlier ones may not: the recurrence, quantised weights. Each is logged as it begins.
    fn set_phase(&mut self, lr_mul: f64, elapsed_ms: f64) -> Result<()> {
        let model = &self.trainer.model;
        if self.recipe.recurs_at(self.step) && !model.is_recurrent() {
            model.set_recurrent(true);
            let done = self.step as f64 / self.recipe.iterations.max(1) as f64;
            let order: Vec<usize> = model.plan().schedule(true).iter().map(|visit| visit.block).collect();
            self.log.line(&lines::recurrence(self.step, done, &order))?;
        }
        if schedule::is_quantised(&self.recipe, lr_mul, elapsed_ms) && !self.trainer.quantised {
            self.trainer.quantised = true;
            self.log.line(&lines::late_qat(&self.recipe, self.step, lr_mul))?;
        }
        Ok(())
    }

    /// Replaces the weights by their average at the end of the run, where there is one.
    fn take_average(&mut self) -> Result<()> {
        self.trainer.set_quantised(false);
        if self.trainer.averages.is_ready() {
            // What a resumed run goes on from are the weights before.
            self.checkpoint(self.trainer.model.params().to_host()?)?;
            self.log.line(lines::APPLYING_AVERAGE)?;
            self.trainer.averages.apply();
        }
        Ok(())
    }

    /// The spans of the next step.
    fn spans(&mut self) -> Result<Vec<Span>> {
        let tokens = self.recipe.span_tokens();
        (0..self.recipe.grad_accum_steps).map(|_| self.data.stream.next_batch(tokens, 0, 1)).collect()
    }

    /// Scores the weights as they are; `averaged` says that they are the average taken at the end.
    fn validate(&mut self, averaged: bool) -> Result<()> {
        let training = self.trainer.is_quantised();
        // PR #1607 validates with the weights that it trains with, PR #1382 with the full ones.
        self.trainer.set_quantised(training && self.recipe.validates_quantised() && !averaged);
        let batch = self.recipe.val_batch_tokens().min(self.trainer.micro_sequences * self.trainer.seq_len);
        let place = format!("validation at step {}", self.step);
        let mut progress = |_, _| guards::check_interrupt(&place);
        let scored =
            eval::full::score(&self.trainer.model, &self.data.val, &self.data.table, batch, &mut progress);
        let score = match scored {
            Err(Error::Interrupted { .. }) => {
                return self.save_and_check_interrupt();
            }
            other => other?,
        };
        self.trainer.set_quantised(training);
        check_finite("validation loss", score.val_loss, self.step)?;
        self.note_memory();
        let (loss, bpb) = (score.val_loss, score.val_bpb);
        self.log.line(&match averaged {
            true => lines::averaged(loss, bpb, score.seconds * 1000.0),
            false => lines::validated(self.step, self.recipe.iterations, loss, bpb, self.train_ms),
        })?;
        self.metrics.record(Metric { val_loss: Some(loss), val_bpb: Some(bpb), ..self.row })?;
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

    /// Saves a checkpoint; an error that says where it is if the run was interrupted.
    fn save_and_check_interrupt(&mut self) -> Result<()> {
        let path = self.checkpoint(self.trainer.model.params().to_host()?)?;
        guards::check_interrupt(&format!("step {} saved in {}", self.step, path.display()))
    }

    fn checkpoint(&mut self, params: Vec<HostTensor>) -> Result<PathBuf> {
        guards::check_finite_params(&params, self.step)?;
        let mut state_steps = BTreeMap::new();
        let mut state = Vec::new();
        for rows in [self.trainer.optimizers.state(), self.trainer.averages.state()] {
            for (name, row, steps) in rows.rows() {
                state_steps.insert(name.clone(), *steps);
                state.push(params::to_host(name, &row.dims(), row.clone())?);
            }
        }
        let progress = Progress {
            step: self.step,
            position: self.data.stream.position(),
            train_ms: self.train_ms,
            train_loss: self.train_loss,
            state_steps,
            recipe_toml: self.recipe.to_toml(),
            data: self.data.source.clone(),
        };
        let path = Checkpoint { progress, params, state }.save(&self.out)?;
        self.saved = Some(self.step);
        self.claim(&path)?;
        self.draw_curve()?;
        Ok(path)
    }

    /// Makes the folder this run's alone, now that its own weights are whole in the file `whole`.
    fn claim(&mut self, whole: &Path) -> Result<()> {
        if !self.replaced.is_empty() {
            run::save_identity(&self.out, &self.recipe, &self.tokenizer)?;
        }
        for old in self.replaced.drain(..).filter(|old| old != whole) {
            let _ = fs::remove_file(old);
        }
        Ok(())
    }

    fn draw_curve(&self) -> Result<()> {
        let point = |row: &Metric| curve::Point {
            step: row.step,
            train_loss: Some(row.train_loss),
            val_bpb: row.val_bpb,
        };
        let points: Vec<curve::Point> = self.metrics.rows().iter().map(point).collect();
        curve::draw(&points, &self.out.join("curve.svg"), &self.recipe.name)
    }

    /// Leaves the final files and reports.
    fn finish(mut self) -> Result<Summary> {
        if let Some(peak) = self.peak {
            self.log.line(&lines::peak_memory(peak.in_use, peak.reserved))?;
        }
        let params = self.trainer.model.params().to_host()?;
        guards::check_finite_params(&params, self.step)?;
        let last = self.out.join(run::FINAL);
        let metadata = BTreeMap::from([(run::STEPS.to_string(), self.step.to_string())]);
        tensors_file::write(&last, &params.iter().collect::<Vec<_>>(), metadata)?;
        self.claim(&last)?;
        if self.saved != Some(self.step) {
            self.checkpoint(params)?;
        }
        self.draw_curve()?;
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
            peak_memory_bytes: self.peak.map(|peak| peak.in_use.max(peak.reserved)),
            out: self.out,
        })
    }
}

fn is_same_folder(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
