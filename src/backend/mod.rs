//! The devices: each one's backend with its kernels, the launchers for kernels in source form, and the choice of device.

pub mod cpu;
pub mod cuda;
pub mod device;
pub mod guard;
pub mod launch_cuda;
pub mod launch_wgsl;
pub mod profile;
pub mod source;
pub mod tensor;
pub mod wgpu;

mod cuda_activation;
mod cuda_attention;
mod cuda_attention_exact;
mod cuda_cross_entropy;
mod cuda_embedding;
mod cuda_gated;
mod cuda_linear;
mod cuda_matmul;
mod cuda_matmul_exact;
mod cuda_newton_schulz;
mod cuda_normed_attention;
mod cuda_pingpong;
mod cuda_projected_attention;
mod cuda_qk_norm;
mod cuda_reduce;
mod cuda_stream;
mod cuda_update;
mod kernel_cache;
mod matmul;
mod matmul_exact;
mod probe_cpu;
mod probe_cuda;
mod probe_wgpu;
mod views;

pub use device::{DeviceChoice, DeviceInfo, Job, Precision, Target, devices, resolve, run};
pub use guard::{MemoryUse, guard, is_out_of_memory, memory_use};
