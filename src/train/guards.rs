//! What stops a run before its end.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Asks every run of this process to finish its step, save and stop (a first Ctrl-C).
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Whether [`interrupt`] was called.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error once [`interrupt`] was called; `place` says where the work is left.
pub fn check_interrupt(place: &str) -> Result<()> {
    if interrupted() { Err(Error::Interrupted { place: place.to_string() }) } else { Ok(()) }
}

/// Refuses a loss that is not finite at `step` (from 1).
pub fn check_finite(loss: f64, step: usize) -> Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    Err(Error::failed(
        format!("training loss is {loss}"),
        format!("step {step}"),
        "a finite loss (resume from the last checkpoint with a lower learning rate)",
    ))
}
