//! What stops a run before its end.

use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
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

/// Refuses parameters that are not finite, so that no checkpoint holds them; `step` made them.
pub fn check_finite_params(params: &[HostTensor], step: usize) -> Result<()> {
    let is_finite = |tensor: &&HostTensor| match tensor.dtype {
        HostType::F32 => {
            tensor.bytes.chunks_exact(4).all(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite())
        }
        _ => tensor.to_f64().iter().all(|value| value.is_finite()),
    };
    match params.iter().find(|tensor| !is_finite(tensor)) {
        None => Ok(()),
        Some(tensor) => Err(Error::diverged(format!("parameter {} is not finite", tensor.name), step)),
    }
}
