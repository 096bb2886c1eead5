//! The CPU as a device: its name, its memory.

use super::guard::MemoryUse;
use std::fs;

/// The processor's name and its number of threads.
pub(super) fn name() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {threads} thread{}", if threads == 1 { "" } else { "s" })
}

/// Bytes of main memory, where Linux tells them.
pub(super) fn memory_bytes() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemTotal:")
}

/// The process's resident memory now, and at most so far, where Linux tells them.
pub(super) fn memory_use() -> Option<MemoryUse> {
    let of = |key| kilobytes("/proc/self/status", key);
    Some(MemoryUse { in_use: of("VmRSS:")?, reserved: of("VmHWM:")? })
}

/// The value, in bytes, of a line `key N kB`.
fn kilobytes(path: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
