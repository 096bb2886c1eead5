//! Which CUDA devices there are, found without starting any runtime: a missing driver, compiler or header is a reason
//! to tell, where cubecl would panic on a thread of its own.

use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
};
use cudarc::driver::{result, sys};
use std::sync::OnceLock;

/// A CUDA device.
#[derive(Debug, Clone)]
pub(super) struct CudaProbe {
    pub name: String,
    pub memory_bytes: Option<u64>,
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    pub driver: String,
}

impl CudaProbe {
    /// Why the kernels do not run on it, if they do not.
    pub fn missing(&self) -> Option<String> {
        let (major, minor) = self.capability;
        (major < 8).then(|| format!("compute capability {major}.{minor}, and bf16 needs 8.0"))
    }
}

/// The machine's CUDA devices in the driver's order, or why there are none.
pub(super) fn devices() -> Result<&'static [CudaProbe], &'static str> {
    static DEVICES: OnceLock<Result<Vec<CudaProbe>, String>> = OnceLock::new();
    // cudarc panics where a library lacks a function that it should have.
    let probe = || super::guard::catch(probe).and_then(|devices| devices);
    DEVICES.get_or_init(probe).as_deref().map_err(String::as_str)
}

/// Whether the device of that number has the instructions of Hopper (compute capability 9.0).
pub(super) fn is_hopper(index: usize) -> bool {
    devices().is_ok_and(|devices| devices.get(index).is_some_and(|device| device.capability == (9, 0)))
}

fn probe() -> Result<Vec<CudaProbe>, String> {
    // SAFETY: loads the driver's library, whose initialisation has no conditions, and no symbol of it.
    if !unsafe { sys::is_culib_present() } {
        return Err("the NVIDIA driver's library libcuda is not there".into());
    }
    result::init().map_err(|e| format!("the NVIDIA driver does not start ({})", code(e)))?;
    let count = result::device::get_count().map_err(|e| format!("no CUDA device ({})", code(e)))?;
    if count == 0 {
        return Err("the NVIDIA driver has no device".into());
    }
    // SAFETY: as above, for the compiler's library.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err("the CUDA compiler's library libnvrtc is not there".into());
    }
    let headers = cubecl::cuda::install::cuda_path().map(|path| path.join("include"));
    if !headers.as_ref().is_some_and(|path| path.join("cuda_fp16.h").is_file()) {
        return Err("CUDA's headers are not there (set CUDA_PATH to the CUDA installation)".into());
    }
    (0..count)
        .map(|index| device(index).map_err(|e| format!("CUDA device {index} fails ({})", code(e))))
        .collect()
}

fn device(index: i32) -> Result<CudaProbe, result::DriverError> {
    let device = result::device::get(index)?;
    // SAFETY: `device` comes from the driver itself.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // SAFETY: likewise.
    let memory = unsafe { result::device::total_mem(device) };
    let mut version = 0;
    // SAFETY: the driver writes one integer.
    let known = unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok();
    let driver =
        if known { format!("CUDA {}.{}", version / 1000, version % 1000 / 10) } else { "CUDA".into() };
    Ok(CudaProbe {
        name: result::device::get_name(device)?,
        memory_bytes: memory.ok().map(|bytes| bytes as u64),
        capability: (major.unsigned_abs(), minor.unsigned_abs()),
        driver,
    })
}

fn code(error: result::DriverError) -> String {
    format!("{:?}", error.0)
}
