//! Any wgpu adapter (Vulkan, Metal), in f32: kernels from `wgsl/`, the references in Burn's ops for the rest.

use super::launch_wgsl::{WgslKernel, launch};
use super::matmul::matmul;
use super::source::Source;
use super::tensor::{dense, empty, load_width, tensor};
use super::{kernel_cache, matmul_exact, probe_wgpu};
use crate::error::Result;
use crate::ops::*;
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::wgpu::{WgpuDevice, WgpuRuntime};

/// Opens the adapter of that number, once.
pub(super) fn open(index: usize) -> Result<WgpuDevice> {
    kernel_cache::configure();
    probe_wgpu::open(index)
}

/// The client of the adapter of that number.
pub(super) fn client(index: usize) -> Result<ComputeClient<WgpuRuntime>> {
    Ok(WgpuRuntime::client(&open(index)?))
}

/// The backend of wgpu adapters.
pub type Wgpu = burn_wgpu::Wgpu<f32, i32, u32>;

crate::plain_backend!(Wgpu);

impl ActivationOps for Wgpu {}
impl AngleOps for Wgpu {}
impl AttentionOps for Wgpu {
    // 64 MB of f32 scores: some adapters (lavapipe, older Vulkan drivers) bind no more than 128 MB.
    const SCORE_ELEMENTS: usize = 1 << 24;
}
impl ConvOps for Wgpu {}
impl CrossEntropyOps for Wgpu {}
impl EmbeddingOps for Wgpu {}
impl LinearOps for Wgpu {}
impl NewtonSchulzOps for Wgpu {}
impl MlpOps for Wgpu {}
impl NormedAttentionOps for Wgpu {}
impl OnePoleOps for Wgpu {}
impl ParamOps for Wgpu {}
impl ProjectedAttentionOps for Wgpu {}
impl ReduceOps for Wgpu {}
impl QkNormOps for Wgpu {}
impl ResidualOps for Wgpu {}
impl RopeOps for Wgpu {}
impl ScanOps for Wgpu {}
impl SelectiveScanOps for Wgpu {}
impl UpdateOps for Wgpu {}
impl StreamOps for Wgpu {}
impl XsaOps for Wgpu {}

impl MatmulOps for Wgpu {
    fn matmul_as<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>, out: DType) -> Tensor<Self, D> {
        matmul(a, b, out, matmul_exact::wgpu)
    }
}

impl RmsNormOps for Wgpu {
    fn rms_norm(x: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        if x.dtype() != DType::F32 || x.shape().num_elements() == 0 {
            return rms_norm::forward(x, eps);
        }
        let [rows, columns] = x.dims();
        let x = dense(x);
        let y = empty(&x, [rows, columns], DType::F32);
        rms_norm_kernel("forward", &[&x, &y], rows, columns, eps);
        tensor(y)
    }

    fn rms_norm_backward(x: Tensor<Self, 2>, grad: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        if x.dtype() != DType::F32 || x.shape().num_elements() == 0 {
            return rms_norm::backward(x, grad, eps);
        }
        let [rows, columns] = x.dims();
        let (x, grad) = (dense(x), dense(grad.cast(DType::F32)));
        let grad_x = empty(&x, [rows, columns], DType::F32);
        rms_norm_kernel("backward", &[&x, &grad, &grad_x], rows, columns, eps);
        tensor(grad_x)
    }
}

/// `wgsl/rms_norm.wgsl`.
static RMS_NORM: Source = Source::new("rms_norm.wgsl", include_str!("../../wgsl/rms_norm.wgsl"));

fn rms_norm_kernel(
    entry: &'static str,
    buffers: &[&CubeTensor<WgpuRuntime>],
    rows: usize,
    columns: usize,
    eps: f64,
) {
    let width = load_width(buffers, columns);
    let length = columns / width;
    let kernel = rms_norm_variant(entry, width, length);
    let rows_each = u64::from(kernel.workgroup) / lanes(length) as u64;
    let scalars = [rows as u32, length as u32, (columns as f32).to_bits(), (eps as f32).to_bits()];
    launch(kernel, (rows as u64).div_ceil(rows_each), buffers, &scalars);
}

/// The kernel for rows of `length` elements of `width` floats.
fn rms_norm_variant(entry: &'static str, width: usize, length: usize) -> WgslKernel {
    let (element, inner) = if width == 4 { ("vec4<f32>", "dot(a, b)") } else { ("f32", "a * b") };
    let constants = vec![
        ("element", element.to_string()),
        ("inner", inner.to_string()),
        ("lanes", lanes(length).to_string()),
    ];
    WgslKernel { source: &RMS_NORM, entry, workgroup: 256, constants }
}

/// Threads that share a row of `length` elements: up to a whole workgroup, about four elements each.
fn lanes(length: usize) -> usize {
    length.div_ceil(4).next_power_of_two().min(256)
}

/// Every kernel of this backend, in each form that a call can give it: the entry point and the WGSL text.
///
/// For checks of the shaders without a device.
pub fn shaders() -> Vec<(&'static str, &'static str, String)> {
    let mut shaders = Vec::new();
    for entry in ["forward", "backward"] {
        for width in [1, 4] {
            for length in (0..=8).map(|lanes| 4 << lanes) {
                shaders.push((RMS_NORM.name(), entry, rms_norm_variant(entry, width, length).text()));
            }
        }
    }
    for (a_k_fast, b_k_fast) in [(false, false), (false, true), (true, false), (true, true)] {
        shaders.push(("matmul.wgsl", "matmul", matmul_exact::wgsl_variant(a_k_fast, b_k_fast).text()));
    }
    shaders
}
