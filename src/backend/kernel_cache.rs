//! Compiled CUDA kernels, kept on disk from run to run: compiling takes tens of milliseconds a kernel, and a training
//! step has hundreds, Burn's own included.
//!
//! cubecl appends to one file without a lock and does not note the GPU, so each GPU architecture has its own folders,
//! and each process of them all takes the first that no other one holds.

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
pub(super) fn configure(capability: Option<(u32, u32)>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut config = CubeClRuntimeConfig::default().override_from_env();
        let slot = capability.and_then(|capability| slot(&folder()?, capability));
        config.compilation.cache = slot.map(CacheConfig::File);
        let mut storage = CubeClRuntimeConfig::storage().lock();
        if storage.is_none() {
            *storage = Some(std::sync::Arc::new(config));
        }
    });
}

/// The user's folder for what can be made again.
fn folder() -> Option<PathBuf> {
    let of = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    Some(of("XDG_CACHE_HOME").or_else(|| of("HOME").map(|home| home.join(".cache")))?.join("fairway/kernels"))
}

/// The first free and writable folder for an architecture; held until the process ends.
fn slot(folder: &Path, (major, minor): (u32, u32)) -> Option<PathBuf> {
    (0..SLOTS).find_map(|number| {
        let slot = folder.join(format!("sm_{major}{minor}-{number}"));
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
        let first = slot(dir.path(), (9, 0)).unwrap();
        let second = slot(dir.path(), (9, 0)).unwrap();
        assert!(first.ends_with("sm_90-0") && second.ends_with("sm_90-1"));
        assert!(slot(dir.path(), (8, 0)).unwrap().ends_with("sm_80-0"));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(slot(&file, (9, 0)), None);
    }
}
