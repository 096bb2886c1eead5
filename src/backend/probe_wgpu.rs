//! Which wgpu adapters there are, and opening one for cubecl.

use crate::error::{Error, Result};
use cubecl::wgpu::{AutoGraphicsApi, GraphicsApi, RuntimeOptions, WgpuDevice, WgpuSetup, init_device};
use std::collections::BTreeMap;
use std::sync::{Mutex, Once, PoisonError};
use wgpu::{Adapter, Backend, DeviceType, DownlevelFlags, Features, Instance};

/// Threads of a workgroup and storage buffers of a kernel that `wgsl/` uses: WebGPU's guaranteed minimum.
const THREADS: u32 = 256;
const BUFFERS: u32 = 8;

/// A wgpu adapter.
#[derive(Debug, Clone)]
pub(super) struct WgpuProbe {
    pub name: String,
    pub memory_bytes: Option<u64>,
    pub driver: String,
    /// Runs on the CPU (lavapipe, SwiftShader, WARP).
    pub software: bool,
    /// The lower, the sooner `auto` takes it.
    pub rank: usize,
    /// Why the kernels do not run on it, if they do not.
    pub missing: Option<String>,
}

/// The adapters of the platform's graphics interface (Metal on a Mac, else Vulkan), in the driver's order.
fn adapters() -> (Instance, Vec<Adapter>) {
    silence_device_select();
    let backends = AutoGraphicsApi::backend().into();
    let descriptor =
        wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() };
    let instance = Instance::new(descriptor);
    let adapters = pollster::block_on(instance.enumerate_adapters(backends));
    (instance, adapters)
}

/// Without a desktop, Mesa's device-select layer looks for one all the same and prints `error: XDG_RUNTIME_DIR ...`.
fn silence_device_select() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
            // SAFETY: before the process's first use of Vulkan, when no thread of a driver reads the environment;
            // Rust's own readers take a lock.
            unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
        }
    });
}

/// The name of the graphics interface.
pub(super) fn interface() -> &'static str {
    if AutoGraphicsApi::backend() == Backend::Metal { "Metal" } else { "Vulkan" }
}

/// The machine's adapters; none without a driver.
pub(super) fn devices() -> Vec<WgpuProbe> {
    adapters().1.iter().map(probe).collect()
}

fn probe(adapter: &Adapter) -> WgpuProbe {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let compute = adapter.get_downlevel_capabilities().flags.contains(DownlevelFlags::COMPUTE_SHADERS);
    let missing = if !compute {
        Some("no compute shaders".to_string())
    } else if limits.max_compute_invocations_per_workgroup < THREADS {
        Some(format!("workgroups of fewer than {THREADS} threads"))
    } else if limits.max_storage_buffers_per_shader_stage < BUFFERS {
        Some(format!("fewer than {BUFFERS} storage buffers a kernel"))
    } else {
        None
    };
    let rank = match info.device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    WgpuProbe {
        memory_bytes: memory_bytes(adapter),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
        software: info.device_type == DeviceType::Cpu,
        name: info.name,
        rank,
        missing,
    }
}

/// Bytes of the adapter's own memory (of the memory it shares, if it has none), where Vulkan tells them.
#[cfg(not(target_os = "macos"))]
fn memory_bytes(adapter: &Adapter) -> Option<u64> {
    // SAFETY: the adapter is alive; nothing of it is kept.
    let hal = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = hal.shared_instance().raw_instance();
    // SAFETY: the physical device is this instance's.
    let memory = unsafe { instance.get_physical_device_memory_properties(hal.raw_physical_device()) };
    memory.memory_heaps.iter().take(memory.memory_heap_count as usize).map(|heap| heap.size).max()
}

/// Metal tells no size of memory through wgpu.
#[cfg(target_os = "macos")]
fn memory_bytes(_: &Adapter) -> Option<u64> {
    None
}

/// Adapters opened so far: cubecl allows one device an adapter in a process.
static OPENED: Mutex<BTreeMap<usize, WgpuDevice>> = Mutex::new(BTreeMap::new());

/// Opens the adapter at `index` of [`devices`], once; `Error::Failed` where the driver refuses.
pub(super) fn open(index: usize) -> Result<WgpuDevice> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.get(&index) {
        return Ok(device.clone());
    }
    let place = format!("wgpu:{index}");
    let (instance, mut adapters) = adapters();
    if index >= adapters.len() {
        return Err(Error::failed("the adapter is gone", place, "the adapter that was there at start"));
    }
    let adapter = adapters.swap_remove(index);
    // cubecl generates code for what the adapter can do, so the device must have been asked for all of it; the limits
    // are the adapter's own, so that a buffer may be as large as it allows.
    let request = adapter.request_device(&wgpu::DeviceDescriptor {
        label: None,
        required_features: adapter.features().difference(Features::MAPPABLE_PRIMARY_BUFFERS),
        required_limits: adapter.limits(),
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        trace: wgpu::Trace::Off,
        // SAFETY: nothing here uses the experimental features; they come with "all of the adapter's".
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
    });
    let (device, queue) = pollster::block_on(request)
        .map_err(|e| Error::failed(format!("cannot open the adapter ({e})"), &place, "a working driver"))?;
    let backend = adapter.get_info().backend;
    let setup = WgpuSetup { instance, adapter, device, queue, backend };
    let device = super::guard::catch(|| init_device(setup, RuntimeOptions::default()))
        .map_err(|message| super::guard::device_error(&message, &place))?;
    opened.insert(index, device.clone());
    Ok(device)
}
