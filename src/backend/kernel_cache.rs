//! Compiled CUDA kernels, kept on disk from run to run: compiling takes tens of milliseconds a kernel, and a training
//! step has hundreds, Burn's own included.
//!
//! cubecl appends to one file without a lock and notes neither GPU nor driver, so each architecture and driver has its
//! own folders, and a process takes the first of them that no other one holds.

use super::{probe_cuda, profile};
use cubecl::config::cache::CacheConfig;
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// Processes of one architecture that can have a cache at once.
const SLOTS: usize = 64;

/// Sets cubecl up, once a process and before its first use: its defaults, with a kernel cache where one can be
/// written. (Left alone, cubecl reads configuration files from the working folder and those above it, and panics on
/// a malformed one.)
pub(super) fn configure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut config = CubeClRuntimeConfig::default().override_from_env();
        let slot = architecture().and_then(|architecture| slot(&folder()?, &architecture));
        config.compilation.cache = slot.map(CacheConfig::File);
        profile::configure(&mut config);
        let mut storage = CubeClRuntimeConfig::storage().lock();
        if storage.is_none() {
            *storage = Some(std::sync::Arc::new(config));
        }
    });
}

/// The machine's CUDA devices and driver in a name, if all devices are of one architecture.
fn architecture() -> Option<String> {
    let devices = probe_cuda::devices().ok()?;
    let (major, minor) = devices.first()?.capability;
    let driver = devices.first()?.driver.replace(' ', "-").to_lowercase();
    let alike = devices.iter().all(|device| device.capability == (major, minor));
    alike.then(|| format!("sm_{major}{minor}-{driver}"))
}

/// The user's folder for what can be made again.
fn folder() -> Option<PathBuf> {
    let of = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    Some(
        of("XDG_CACHE_HOME")
            .or_else(|| of("HOME").map(|home| home.join(".cache")))?
            .join("fairway/kernels")
            .join(env!("CARGO_PKG_VERSION")),
    )
}

/// The first free and writable folder for an architecture; held until the process ends.
fn slot(folder: &Path, architecture: &str) -> Option<PathBuf> {
    (0..SLOTS).find_map(|number| {
        let slot = folder.join(format!("{architecture}-{number}"));
        fs::create_dir_all(&slot).ok()?;
        let lock = File::create(slot.join("lock")).ok()?;
        lock.try_lock().ok()?;
        std::mem::forget(lock);
        Some(slot)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_holder_has_its_own_folder_and_an_unwritable_place_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let first = slot(dir.path(), "sm_90").unwrap();
        let second = slot(dir.path(), "sm_90").unwrap();
        assert!(first.ends_with("sm_90-0") && second.ends_with("sm_90-1"));
        assert!(slot(dir.path(), "sm_80").unwrap().ends_with("sm_80-0"));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(slot(&file, "sm_90"), None);
    }
}
