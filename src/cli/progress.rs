//! Progress bars on stderr, where it is a terminal; nothing otherwise.

use super::output;
use crate::error::Result;
use crate::train::{Status, guards, log};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Thousandths: the length of a bar whose end is a fraction.
const WHOLE: u64 = 1000;

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A bar over `total` units with a name before it. On anything but a terminal it draws nothing.
pub fn bar(name: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    bar.set_style(style("{prefix} [{bar:30}] {percent}% {msg} ({eta} left)"));
    bar.set_prefix(name.to_string());
    bar
}

/// The same for work whose end nobody knows: what was last said of it, and for how long it has run.
pub fn spinner(name: &str) -> ProgressBar {
    let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    spinner.set_style(style("{prefix} [{elapsed}] {msg}"));
    spinner.set_prefix(name.to_string());
    spinner.enable_steady_tick(Duration::from_secs(1));
    spinner
}

/// A callback of (done, total) for library calls that drives a bar and stops at Ctrl-C.
pub fn callback(name: &'static str) -> impl Fn(u64, u64) -> Result<()> + Sync {
    let bar = bar(name, 0);
    move |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        if done >= total {
            bar.finish_and_clear();
        }
        guards::check_interrupt(name)
    }
}

/// The bar of a training run.
pub struct TrainBar(ProgressBar);

impl TrainBar {
    /// A new bar, not shown in `--json` runs' stdout since it lives on stderr.
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(Some(WHOLE), ProgressDrawTarget::stderr());
        bar.set_style(style("[{bar:25}] {percent}% {msg}"));
        Self(bar)
    }

    /// An echo for the run's log that keeps the bar below the lines.
    pub fn echo(&self, quiet: bool) -> log::Echo {
        if quiet {
            return log::to_nowhere();
        }
        let bar = self.0.clone();
        let mut print = log::to_stdout();
        Box::new(move |line| bar.suspend(|| print(line)))
    }

    /// A warning on stderr that keeps the bar below it.
    pub fn warn(&self) -> log::Echo {
        let bar = self.0.clone();
        Box::new(move |line| bar.suspend(|| output::warn(line)))
    }

    /// Shows a step.
    pub fn show(&self, status: &Status) {
        let bpb = if status.val_bpb.is_finite() { format!("{:.4}", status.val_bpb) } else { "-".into() };
        let left = status.left_s.max(0.0) as u64;
        self.0.set_position((status.fraction * WHOLE as f64) as u64);
        self.0.set_message(format!(
            "step {}/{}  loss {:.4}  bpb {bpb}  {:.0} tokens/s  {}:{:02} left",
            status.step,
            status.iterations,
            status.train_loss,
            status.tokens_per_s,
            left / 60,
            left % 60
        ));
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
