//! How long each kernel of a piece of work takes, Burn's own included, by waiting for the device after every launch.
//!
//! cubecl writes such times to a log; [`begin`] directs it to a file of this process, before a device is first used.
//! What our own launches move and compute is noted beside it.

use crate::error::{Error, Result};
use cubecl::config::CubeClRuntimeConfig;
use cubecl::config::profiling::ProfilingLogLevel;
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One launch.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel, and the sizes of its tensors where they are known.
    pub what: String,
    /// From its launch to its end, in milliseconds; the launch and the wait themselves, some 10 us, included.
    pub ms: f64,
    /// Bytes of its tensors, where known.
    pub bytes: Option<f64>,
    /// Arithmetic operations, where known.
    pub operations: Option<f64>,
}

/// What is known of a launch beforehand.
struct Note {
    entry: &'static str,
    what: String,
    bytes: f64,
    operations: f64,
}

struct Profile {
    log: PathBuf,
    /// Bytes of the log that are of earlier work.
    seen: usize,
    notes: Vec<Note>,
}

static PROFILE: Mutex<Option<Profile>> = Mutex::new(None);

fn profile() -> MutexGuard<'static, Option<Profile>> {
    PROFILE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Profiles every device that this process opens from now on.
pub fn begin() {
    let log = std::env::temp_dir().join(format!("fairway-profile-{}.log", std::process::id()));
    let _ = fs::remove_file(&log);
    *profile() = Some(Profile { log, seen: 0, notes: Vec::new() });
}

/// Sets cubecl up to profile, if that was asked for.
pub(super) fn configure(config: &mut CubeClRuntimeConfig) {
    if let Some(profile) = profile().as_ref() {
        config.profiling.logger.level = ProfilingLogLevel::Basic;
        config.profiling.logger.file = Some(profile.log.clone());
    }
}

/// Notes a launch, if profiling.
pub(super) fn note(
    entry: &'static str,
    shapes: impl Fn() -> String,
    bytes: impl Fn() -> f64,
    operations: f64,
) {
    if let Some(profile) = profile().as_mut() {
        let what = format!("{entry} {}", shapes()).trim_end().to_string();
        profile.notes.push(Note { entry, what, bytes: bytes(), operations });
    }
}

/// The launches since the last call, in order, once the device has finished them (the caller waits for it).
pub fn take() -> Result<Vec<Launch>> {
    let mut guard = profile();
    let Some(profile) = guard.as_mut() else { return Ok(Vec::new()) };
    let text = profile.read()?;
    let notes = std::mem::take(&mut profile.notes);
    Ok(joined(&text, notes))
}

impl Profile {
    /// What the log has got since the last call; a thread of cubecl's writes it, a little later.
    fn read(&mut self) -> Result<String> {
        let fail = |error| Error::failed(error, self.log.display(), "a profile that can be read");
        let mut length = usize::MAX;
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let text = fs::read(&self.log).map_err(fail)?;
            if text.len() == length {
                let new = String::from_utf8_lossy(&text[self.seen.min(length)..]).into_owned();
                self.seen = length;
                return Ok(new);
            }
            length = text.len();
        }
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.log);
    }
}

/// Times of the log with what was noted of the launches: both are in order for each kernel.
fn joined(log: &str, notes: Vec<Note>) -> Vec<Launch> {
    let mut noted: HashMap<&str, VecDeque<Note>> = HashMap::new();
    for note in notes {
        noted.entry(note.entry).or_default().push_back(note);
    }
    let launch = |(name, ms): (&str, f64)| match noted.get_mut(name).and_then(VecDeque::pop_front) {
        Some(Note { what, bytes, operations, .. }) => {
            Launch { what, ms, bytes: Some(bytes), operations: (operations > 0.0).then_some(operations) }
        }
        None => Launch { what: name.to_string(), ms, bytes: None, operations: None },
    };
    log.lines().filter_map(timed).map(launch).collect()
}

/// The kernel and the time in milliseconds of a line `| 12.3us | name`.
fn timed(line: &str) -> Option<(&str, f64)> {
    let (time, name) = line.strip_prefix("| ")?.split_once(" | ")?;
    let time = time.trim();
    let unit = time.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = time.split_at(unit);
    let scale = match unit {
        "s" => 1000.0,
        "ms" => 1.0,
        "\u{b5}s" => 1e-3,
        "ns" => 1e-6,
        _ => return None,
    };
    Some((name.trim(), number.parse::<f64>().ok()? * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_joined_with_the_notes_of_their_launches_in_order() {
        let log = "| 12.5\u{b5}s    | matmul\n| 900ns | other<f32>\n| 1.25ms | matmul\ntable\n| x | matmul\n";
        let note =
            |what: &str, operations| Note { entry: "matmul", what: what.into(), bytes: 8.0, operations };
        let launches = joined(log, vec![note("matmul [2]", 0.0), note("matmul [4]", 3.0)]);
        let launch = |what: &str, ms, bytes, operations| Launch { what: what.into(), ms, bytes, operations };
        assert_eq!(
            launches,
            [
                launch("matmul [2]", 0.0125, Some(8.0), None),
                launch("other<f32>", 0.0009, None, None),
                launch("matmul [4]", 1.25, Some(8.0), Some(3.0)),
            ]
        );
    }
}
