//! NVIDIA GPUs: kernels from `cuda/`, the references in Burn's ops for the rest. Activations bf16 or f32.

use super::launch_cuda::{Arguments, CudaKernel, float_word, known_element, launch};
use super::matmul::matmul;
use super::source::Source;
use super::tensor::{dense, empty, load_width, tensor};
use super::{cuda_matmul, cuda_matmul_exact, guard, kernel_cache};
use crate::error::Result;
use crate::ops::*;
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::Runtime;
use cubecl::client::ComputeClient;
use cubecl::cuda::{CudaDevice, CudaRuntime};

/// The client of the CUDA device of that number; panics (on cubecl's thread) without a working driver.
pub(super) fn client(index: usize) -> ComputeClient<CudaRuntime> {
    CudaRuntime::client(&CudaDevice::new(index))
}

/// Starts the CUDA device of that number, once.
pub(super) fn open(index: usize, label: &str) -> Result<CudaDevice> {
    kernel_cache::configure();
    guard::catch(|| client(index)).map_err(|message| guard::device_error(&message, label))?;
    Ok(CudaDevice::new(index))
}

/// The backend of NVIDIA GPUs. Its float element is f32; tensors of activations are cast to bf16.
pub type Cuda = burn_cuda::Cuda<f32, i32>;

crate::plain_backend!(Cuda);

impl AngleOps for Cuda {}
// 256 MB or 1 GB of f32 at once: few launches count more here than memory.
impl ConvOps for Cuda {
    const CONV_ELEMENTS: usize = 1 << 28;
}
impl OnePoleOps for Cuda {
    const ONE_POLE_ELEMENTS: usize = 1 << 28;
}
impl ParamOps for Cuda {}
impl ResidualOps for Cuda {}
impl RopeOps for Cuda {}
impl ScanOps for Cuda {
    const SCAN_ELEMENTS: usize = 1 << 28;
}
impl SelectiveScanOps for Cuda {
    const SELECTIVE_SCAN_ELEMENTS: usize = 1 << 28;
}
impl XsaOps for Cuda {}

impl MatmulOps for Cuda {
    fn matmul_as<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>, out: DType) -> Tensor<Self, D> {
        matmul(a, b, out, product)
    }
}

/// `c = a b` over the last two sizes, into a dense `c`: bf16 on Hopper's tensor cores; f32, and bf16 on other cards,
/// without tensor cores.
pub(super) fn product(a: &CubeTensor<CudaRuntime>, b: &CubeTensor<CudaRuntime>, c: &CubeTensor<CudaRuntime>) {
    if cuda_matmul::takes(a, b, c) {
        cuda_matmul::product(a, b, c);
    } else {
        cuda_matmul_exact::product(a, b, c);
    }
}

/// [`product`] with an epilogue.
pub(super) fn product_with(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
    epilogue: cuda_matmul::Epilogue,
) {
    if cuda_matmul::takes(a, b, c) {
        cuda_matmul::product_with(a, b, c, epilogue);
    } else {
        cuda_matmul_exact::product_with(a, b, c, epilogue);
    }
}

/// `c += a b`, in place: an f32 `c`.
pub(super) fn product_added(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
) {
    if cuda_matmul::takes(a, b, c) {
        cuda_matmul::product_added(a, b, c);
    } else {
        cuda_matmul_exact::product_added(a, b, c);
    }
}

impl RmsNormOps for Cuda {
    fn rms_norm(x: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        let [rows, columns] = x.dims();
        let dtype = x.dtype();
        if rows == 0 {
            return x;
        }
        let Some(element) = rms_norm_element(dtype, rows, columns) else { return rms_norm::forward(x, eps) };
        let x = dense(x);
        let y = empty(&x, [rows, columns], dtype);
        rms_norm_kernel("rms_norm_forward", element, &[&x, &y], rows, columns, eps);
        tensor(y)
    }

    fn rms_norm_backward(x: Tensor<Self, 2>, grad: Tensor<Self, 2>, eps: f64) -> Tensor<Self, 2> {
        let [rows, columns] = x.dims();
        let dtype = x.dtype();
        if rows == 0 {
            return grad;
        }
        let Some(element) = rms_norm_element(dtype, rows, columns) else {
            return rms_norm::backward(x, grad, eps);
        };
        let (x, grad) = (dense(x), dense(grad.cast(dtype)));
        let grad_x = empty(&x, [rows, columns], dtype);
        rms_norm_kernel("rms_norm_backward", element, &[&x, &grad, &grad_x], rows, columns, eps);
        tensor(grad_x)
    }
}

/// `cuda/rms_norm.cu`.
static RMS_NORM: Source = Source::new("rms_norm.cu", include_str!("../../cuda/rms_norm.cu"));

/// The widest row that the kernel holds in a block's registers.
const RMS_NORM_COLUMNS: usize = 16_384;

/// The kernel's element type for a tensor, if it takes that tensor.
fn rms_norm_element(dtype: DType, rows: usize, columns: usize) -> Option<&'static str> {
    known_element(dtype).filter(|_| rows > 0 && (1..=RMS_NORM_COLUMNS).contains(&columns))
}

/// How a row is spread over threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spread {
    /// Elements of one load.
    pub(super) width: usize,
    /// Threads that share a row.
    pub(super) lanes: usize,
    /// Loads of one thread.
    pub(super) chunks: usize,
}

impl Spread {
    fn new(columns: usize, width: usize) -> Self {
        // What keeps the backward, which holds two rows, clear of spills (`.ci/cuda` prints the registers).
        Self::of(columns, width, if width > 1 { 4 } else { 16 })
    }

    /// Up to a warp takes a row with one load a thread, then a warp with at most `most` loads, then more warps.
    pub(super) fn of(columns: usize, width: usize, most: usize) -> Self {
        let loads = columns.div_ceil(width);
        let mut lanes = loads.next_power_of_two().min(32);
        while lanes * most < loads {
            lanes *= 2;
        }
        Self { width, lanes, chunks: loads.div_ceil(lanes).next_power_of_two() }
    }

    pub(super) fn threads(self) -> usize {
        self.lanes.max(256)
    }
}

fn rms_norm_kernel(
    entry: &'static str,
    element: &str,
    buffers: &[&CubeTensor<CudaRuntime>],
    rows: usize,
    columns: usize,
    eps: f64,
) {
    let spread = Spread::new(columns, load_width(buffers, columns));
    let constants = vec![
        ("ELEMENT", element.to_string()),
        ("WIDTH", spread.width.to_string()),
        ("LANES", spread.lanes.to_string()),
        ("CHUNKS", spread.chunks.to_string()),
    ];
    let kernel =
        CudaKernel { source: &RMS_NORM, entry, constants, block: spread.threads() as u32, shared_bytes: 0 };
    let blocks = rows.div_ceil(spread.threads() / spread.lanes) as u32;
    let scalars = [rows as u64, columns as u64, float_word(eps as f32)];
    launch(kernel, [blocks, 1, 1], Arguments { buffers, scalars: &scalars, ..Default::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_covers_the_row_within_a_block_and_the_register_budget() {
        for width in [1, 4, 8] {
            for columns in (1..=RMS_NORM_COLUMNS).filter(|c| c.is_multiple_of(width)) {
                let spread = Spread::new(columns, width);
                let Spread { lanes, chunks, .. } = spread;
                assert!(lanes * chunks * width >= columns, "{columns} {spread:?}");
                assert!(lanes.is_power_of_two() && lanes <= 1024 && chunks <= 16, "{columns} {spread:?}");
                assert!(chunks * width <= 32, "{columns} {spread:?}");
                assert!(spread.threads().is_multiple_of(lanes) && spread.threads() <= 1024);
            }
        }
        assert_eq!(Spread::new(512, 8), Spread { width: 8, lanes: 32, chunks: 2 });
        assert_eq!(Spread::new(64, 8), Spread { width: 8, lanes: 8, chunks: 1 });
    }

    #[test]
    fn the_compile_check_tries_the_forms_of_common_widths_and_the_extremes() {
        let variants: Vec<&str> = RMS_NORM.variants().collect();
        for (element, size, columns) in [
            ("__nv_bfloat16", 2, 64),
            ("__nv_bfloat16", 2, 512),
            ("__nv_bfloat16", 2, 1024),
            ("__nv_bfloat16", 2, 16_384),
            ("float", 4, 64),
            ("float", 4, 512),
            ("float", 4, 1024),
            ("float", 4, 16_384),
        ] {
            let Spread { width, lanes, chunks } = Spread::new(columns, 16 / size);
            let form = format!("-DELEMENT={element} -DWIDTH={width} -DLANES={lanes} -DCHUNKS={chunks}");
            assert!(
                variants.contains(&form.as_str()),
                "{form} of {columns} columns is not among {variants:?}"
            );
        }
        for element in ["__nv_bfloat16", "float"] {
            let Spread { lanes, chunks, .. } = Spread::new(16_383, 1);
            let form = format!("-DELEMENT={element} -DWIDTH=1 -DLANES={lanes} -DCHUNKS={chunks}");
            assert!(variants.contains(&form.as_str()), "{form}");
        }
    }
}
