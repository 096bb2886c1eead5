//! What goes wrong on a GPU, as one-line errors; and how much memory is in use.
//!
//! cubecl runs every device on a thread of its own. A failure there (no memory left, a kernel that does not compile)
//! panics on that thread, or is kept until the next synchronisation, and the caller sees a later panic without the
//! cause, or unwritten memory. [`guard`] collects all of these.

use super::device::{DeviceChoice, Target};
use super::{cuda, wgpu};
use crate::error::{Error, Result};
use burn_cubecl::CubeRuntime;
use cubecl::client::ComputeClient;
use cubecl::stream_id::StreamId;
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, resume_unwind, set_hook, take_hook};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What [`is_out_of_memory`] recognises an error by.
const OUT_OF_MEMORY: &str = "out of device memory";

/// Failures of device threads.
static FAILURES: Mutex<Vec<Failure>> = Mutex::new(Vec::new());

/// The streams of the guards that are open, one entry a guard. (cubecl gives each calling thread a stream.)
static OPEN: Mutex<Vec<StreamId>> = Mutex::new(Vec::new());

thread_local! {
    /// The last panic of this thread, within a guard, that came out of the device libraries.
    static SILENCED: RefCell<Option<String>> = const { RefCell::new(None) };
}

struct Failure {
    /// The guarded stream whose work failed; `None` for a device that did not start.
    stream: Option<StreamId>,
    message: String,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f`, which computes on `target`, and turns what fails on the device into one-line errors.
///
/// An allocation that fails becomes an error for which [`is_out_of_memory`] holds. Panics of the device libraries are
/// not printed; other panics (defects of this program) pass through. Ends by handing all queued work to the device,
/// without waiting for it: a kernel that fails while running is reported by the read or guard that comes after it.
/// After an error the device's tensors are not to be relied on.
pub fn guard<T>(target: &Target, f: impl FnOnce() -> Result<T>) -> Result<T> {
    if target.choice == DeviceChoice::Cpu {
        return f();
    }
    let outcome = catch(|| {
        let value = f()?;
        flush(target)?;
        Ok(value)
    });
    match outcome {
        Ok(result) => result,
        Err(failure) => Err(device_error(&failure, &target.label)),
    }
}

/// Runs `f`; a failure of a device library during it comes back as its message.
pub(super) fn catch<T>(f: impl FnOnce() -> T) -> std::result::Result<T, String> {
    install_hook();
    let open = Open::new();
    let outcome = catch_unwind(AssertUnwindSafe(f));
    drop(open);
    let silenced = SILENCED.take();
    if let Some(failure) = take_failure(Some(StreamId::current())) {
        return Err(failure);
    }
    outcome.or_else(|panic| match silenced {
        Some(message) => Err(take_failure(None).unwrap_or(message)),
        None => resume_unwind(panic),
    })
}

/// An open guard; it closes when dropped.
struct Open(StreamId);

impl Open {
    fn new() -> Self {
        let stream = StreamId::current();
        lock(&OPEN).push(stream);
        Self(stream)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut open = lock(&OPEN);
        if let Some(place) = open.iter().position(|stream| *stream == self.0) {
            open.swap_remove(place);
        }
    }
}

/// Puts a hook before the present one that collects device failures while a guard is open.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| {
            if !collect(info) {
                previous(info);
            }
        }));
    });
}

/// Whether the panic is a device's within a guard, and noted.
fn collect(info: &PanicHookInfo) -> bool {
    let open = lock(&OPEN).clone();
    if open.is_empty() {
        return false;
    }
    let stream = StreamId::current();
    let ours = open.contains(&stream);
    let message = message_of(info.payload());
    // A device thread runs each task under its caller's stream.
    if std::thread::current().name().is_some_and(is_device_thread) {
        lock(&FAILURES).push(Failure { stream: ours.then_some(stream), message });
        return true;
    }
    // Burn's checks of shapes fail by this program's mistakes.
    let mistake = message.contains("Tensor Operation Error");
    let silenced = ours && !mistake && info.location().is_some_and(|l| is_device_library(l.file()));
    if silenced {
        SILENCED.set(Some(message));
    }
    silenced
}

/// The names that cubecl gives its device threads.
fn is_device_thread(name: &str) -> bool {
    name.starts_with("DSD-") || name.starts_with("DSU-")
}

/// Whether a source file belongs to the libraries below this crate's ops.
fn is_device_library(file: &str) -> bool {
    let libraries = ["cubecl", "cubek", "burn", "wgpu", "cudarc", "naga"];
    file.split(['/', '\\']).any(|part| {
        libraries.iter().any(|name| part.strip_prefix(name).is_some_and(|rest| rest.starts_with(['-', '_'])))
    })
}

fn message_of(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        return (*text).to_string();
    }
    payload.downcast_ref::<String>().cloned().unwrap_or_else(|| "an unknown failure".into())
}

/// Takes a stream's failures: the one that tells most, if there is any.
fn take_failure(stream: Option<StreamId>) -> Option<String> {
    let mut failures = lock(&FAILURES);
    let (ours, others): (Vec<_>, Vec<_>) = failures.drain(..).partition(|failure| failure.stream == stream);
    *failures = others;
    // The first is the cause of those after it, but memory that ran out is the cause of all.
    let mut messages: Vec<String> = ours.into_iter().map(|failure| failure.message).collect();
    let place = messages.iter().position(|message| is_memory_message(message)).unwrap_or(0);
    (!messages.is_empty()).then(|| messages.swap_remove(place))
}

/// Hands the queued work to the device and reports what has failed so far.
fn flush(target: &Target) -> Result<()> {
    fn flush_client<R: CubeRuntime>(client: &ComputeClient<R>, target: &Target) -> Result<()> {
        client.flush().map_err(|error| device_error(&error.to_string(), &target.label))
    }
    match target.choice {
        DeviceChoice::Cuda(index) => flush_client(&cuda::client(index.unwrap_or(0)), target),
        DeviceChoice::Wgpu(index) => flush_client(&wgpu::client(index.unwrap_or(0))?, target),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(()),
    }
}

/// A device library's message as an error of this crate; `place` names the device.
pub(super) fn device_error(message: &str, place: &str) -> Error {
    if !is_memory_message(message) {
        let what = format!("the device failed ({})", first_lines(message));
        return Error::failed(what, place, "a working device and driver");
    }
    let size = message.split("buffer of size: ").nth(1).and_then(|rest| {
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse::<u64>().ok()
    });
    let what = match size {
        Some(bytes) => format!("{OUT_OF_MEMORY} (no {:.1} MB in one piece)", bytes as f64 / 1e6),
        None => OUT_OF_MEMORY.to_string(),
    };
    Error::failed(what, place, "less work at once, or a device with more memory")
}

/// Whether a device's memory ran out: what a smaller micro-batch can cure.
pub fn is_out_of_memory(error: &Error) -> bool {
    matches!(error, Error::Failed { what, .. } if what.starts_with(OUT_OF_MEMORY))
}

fn is_memory_message(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    [
        "can't allocate buffer",
        "out of memory",
        "out_of_memory",
        "outofmemory",
        "out-of-memory",
        "not enough memory",
    ]
    .iter()
    .any(|text| message.contains(text))
}

/// What a library's message says, without its backtrace and the source of the kernel, at most 400 characters.
fn first_lines(message: &str) -> String {
    let mut short = String::new();
    for line in message.lines().map(str::trim) {
        let frame = line.split_once(": ").is_some_and(|(n, _)| n.parse::<u32>().is_ok());
        if line.starts_with("[Source]") || line.starts_with("Backtrace") || frame {
            break;
        }
        if !line.is_empty() && line != "Caused by:" {
            short.push_str(if short.is_empty() { "" } else { " " });
            short.push_str(line);
        }
    }
    short.chars().take(400).collect()
}

/// Bytes of memory that a target's work takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// In use now: by tensors (GPU), by the process (CPU).
    pub in_use: u64,
    /// Taken from the device and kept for reuse (GPU); the most that the process has used so far (CPU).
    pub reserved: u64,
}

/// The memory in use on a target by this thread's work; `None` where it cannot be told.
pub fn memory_use(target: &Target) -> Option<MemoryUse> {
    fn of_client<R: CubeRuntime>(client: &ComputeClient<R>) -> Option<MemoryUse> {
        let usage = catch(|| client.memory_usage()).ok()?.ok()?;
        Some(MemoryUse { in_use: usage.bytes_in_use, reserved: usage.bytes_reserved })
    }
    match target.choice {
        DeviceChoice::Cuda(index) => of_client(&cuda::client(index.unwrap_or(0))),
        DeviceChoice::Wgpu(index) => of_client(&wgpu::client(index.unwrap_or(0)).ok()?),
        DeviceChoice::Auto | DeviceChoice::Cpu => super::probe_cpu::memory_use(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use burn::tensor::Tensor;

    #[test]
    fn a_failed_allocation_is_told_from_other_failures() {
        let memory = [
            "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: 21474836480\n   0: x\n",
            "wgpu error: Out of Memory\n\nCaused by:\n  In Device::create_buffer\n    Not enough memory left.\n",
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
        ];
        for message in memory {
            let error = device_error(message, "cuda:0 NVIDIA X");
            assert!(is_out_of_memory(&error), "{error}");
            assert_eq!(error.exit_code(), 1);
            assert!(error.to_string().contains(", cuda:0 NVIDIA X, "), "{error}");
        }
        let error = device_error(memory[0], "x").to_string();
        assert!(error.starts_with("out of device memory (no 21474.8 MB in one piece)"), "{error}");
        assert!(!is_out_of_memory(&device_error("Resource to exist.", "x")));
        assert!(!is_out_of_memory(&Error::input("out of device memory", "x", "y")));
    }

    #[test]
    fn a_message_is_cut_before_its_backtrace_and_source() {
        let message = "A compilation error\nCaused by:\n  [Compilation Error]\n    x.cu(3): error: y\n[Source]  \nfloat z;\n";
        assert_eq!(first_lines(message), "A compilation error [Compilation Error] x.cu(3): error: y");
        assert_eq!(first_lines("bad\nBacktrace:\n   0: f\n"), "bad");
        assert_eq!(first_lines("bad\n   0: f\n      at g.rs\n"), "bad");
        assert_eq!(first_lines(&"x".repeat(1000)).len(), 400);
    }

    #[test]
    fn only_the_device_libraries_are_silenced() {
        assert!(is_device_library("/root/.cargo/registry/src/index/cubecl-runtime-0.10.0/src/client.rs"));
        assert!(is_device_library(r"C:\x\burn-tensor-0.21.0\src\a.rs"));
        assert!(!is_device_library("src/model/block.rs"));
        assert!(!is_device_library("/home/burner/fairway/src/wgpu.rs"));
    }

    #[test]
    fn what_fails_on_a_device_thread_is_collected_by_the_guard_that_it_worked_for() {
        let on_device = |name: &str, stream: StreamId, message: &'static str| {
            let thread = std::thread::Builder::new().name(name.into());
            let _ = thread.spawn(move || stream.executes(|| panic!("{message}"))).unwrap().join();
        };
        let ours = StreamId::current();
        let failed = catch(|| {
            on_device("DSD-0-0", ours, "first");
            on_device("DSD-0-0", ours, "out of memory");
            on_device("DSD-0-0", ours, "last");
        });
        assert_eq!(failed, Err("out of memory".to_string()));
        // Another thread's guard does not hear of it, and nothing is left over.
        let failed = catch(|| std::thread::spawn(|| catch(|| 1)).join().unwrap());
        assert_eq!(failed, Ok(Ok(1)));
    }

    #[test]
    fn a_defect_of_this_program_is_not_swallowed() {
        let panic = catch_unwind(AssertUnwindSafe(|| catch(|| panic!("a defect")))).unwrap_err();
        assert_eq!(message_of(&*panic), "a defect");
        let device = Default::default();
        let mismatch = || Tensor::<Cpu, 2>::ones([2, 3], &device) + Tensor::ones([4, 5], &device);
        let panic = catch_unwind(AssertUnwindSafe(|| catch(mismatch))).unwrap_err();
        assert!(message_of(&*panic).contains("Tensor Operation Error"));
    }
}
