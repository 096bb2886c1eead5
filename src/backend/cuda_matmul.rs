//! Matrix products of bf16 on Hopper's tensor cores: how `cuda/matmul.cu` is launched.

use super::launch_cuda::{Arguments, CudaKernel, TensorMap, TensorMapSwizzle, launch};
use super::probe_cuda;
use super::source::Source;
use super::tensor::empty;
use burn::tensor::DType;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl::zspace::metadata::Metadata;

/// `cuda/matmul.cu`.
static MATMUL: Source = Source::new("matmul.cu", include_str!("../../cuda/matmul.cu"));

/// Along k, of one slice in shared memory.
const DEPTH: usize = 64;

/// The most terms of one f32 sum: the tensor cores truncate, about 1e-5 of a sum of random signs over so many.
const MOST_TERMS: usize = 16_384;

/// A factor as the kernel reads it: dense, with k as its last size or not.
struct Factor {
    tensor: CubeTensor<CudaRuntime>,
    k_major: bool,
    /// `[z, rows, columns]` of the dense tensor.
    shape: [usize; 3],
}

impl Factor {
    /// The factor whose last two sizes are `[rows, k]` (or `[k, rows]`), in place where it or its transpose is dense.
    fn new(x: &CubeTensor<CudaRuntime>, k_last: bool) -> Self {
        let sizes: Vec<usize> = x.meta.shape().iter().copied().collect();
        let strides: Vec<usize> = x.meta.strides().iter().copied().collect();
        let rank = sizes.len();
        let batch = sizes[..rank - 2].iter().product();
        let (mut swapped, mut swapped_strides) = (sizes.clone(), strides.clone());
        swapped.swap(rank - 2, rank - 1);
        swapped_strides.swap(rank - 2, rank - 1);
        if !is_dense(&sizes, &strides) && is_dense(&swapped, &swapped_strides) {
            let shape = [batch, swapped[rank - 2], swapped[rank - 1]];
            return Self { tensor: dense_view(x, shape), k_major: !k_last, shape };
        }
        let shape = [batch, sizes[rank - 2], sizes[rank - 1]];
        let x = if is_dense(&sizes, &strides) { x.clone() } else { into_contiguous(x.clone()) };
        Self { tensor: dense_view(&x, shape), k_major: k_last, shape }
    }

    /// Whether the copy engine can read it.
    fn is_aligned(&self) -> bool {
        is_aligned(&self.tensor, self.shape[2])
    }

    fn map(&self) -> TensorMap<'_> {
        map(&self.tensor, self.shape, [1, DEPTH, 64])
    }
}

/// Whether sizes and strides are those of a dense row-major tensor.
fn is_dense(sizes: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    sizes.iter().zip(strides).rev().all(|(size, stride)| {
        let fits = *size == 1 || *stride == expected;
        expected *= size;
        fits
    })
}

/// The elements of a dense tensor in other sizes.
fn dense_view(x: &CubeTensor<CudaRuntime>, shape: [usize; 3]) -> CubeTensor<CudaRuntime> {
    let strides = [shape[1] * shape[2], shape[2], 1];
    CubeTensor { meta: Box::new(Metadata::new(shape, strides)), ..x.clone() }
}

/// Whether rows of so many columns, and the tensor's start, lie at multiples of 16 bytes.
fn is_aligned(x: &CubeTensor<CudaRuntime>, columns: usize) -> bool {
    x.handle.offset_start.unwrap_or(0).is_multiple_of(16) && (columns * x.elem_size()).is_multiple_of(16)
}

fn map(tensor: &CubeTensor<CudaRuntime>, shape: [usize; 3], tile: [usize; 3]) -> TensorMap<'_> {
    TensorMap::dense(tensor, &shape, &tile, TensorMapSwizzle::B128)
}

/// The width of a tile and the number of parts of k, from a cost fitted to measured shapes (README, the kernel table):
/// a block takes `slices alpha + beta` for a tile, a sum of parts a pass over the output.
fn choose(m: usize, n: usize, k: usize, z: usize, splits: bool, multiprocessors: usize) -> (usize, usize) {
    let slices = k.div_ceil(DEPTH);
    let mut best = (usize::MAX, 0, 0);
    for (width, alpha, beta) in [(128, 8, 35), (192, 13, 40), (256, 16, 50)] {
        let count = m.div_ceil(128) * n.div_ceil(width) * z;
        let least = if splits { slices.min(k.div_ceil(MOST_TERMS)) } else { 1 };
        let most = if splits { least.max(slices.min(multiprocessors / count)) } else { 1 };
        for parts in least..=most {
            let waves = (count * parts).div_ceil(multiprocessors);
            let sum = if parts > 1 { 100 + parts * z * m * n / 50_000 } else { 0 };
            let cost = waves * (slices.div_ceil(parts) * alpha + beta) + sum;
            if cost < best.0 {
                best = (cost, width, parts);
            }
        }
    }
    (best.1, best.2)
}

/// Stages of the ring of slices, and staging buffers of a warp, for a width of tile.
fn stages(width: usize) -> (usize, usize) {
    match width {
        128 => (6, 2),
        192 => (4, 3),
        _ => (4, 2),
    }
}

/// Whether the kernel takes a product of these: bf16 on compute capability 9.0, to bf16 or f32, with no factor spread
/// over a batch.
pub(super) fn takes(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
) -> bool {
    let is_hopper = probe_cuda::devices()
        .is_ok_and(|devices| devices.get(a.device.index).is_some_and(|device| device.capability == (9, 0)));
    let sizes = |x: &CubeTensor<CudaRuntime>| -> Vec<usize> { x.meta.shape().iter().copied().collect() };
    let (a_sizes, b_sizes, c_sizes) = (sizes(a), sizes(b), sizes(c));
    let outer = a_sizes.len() - 2;
    is_hopper
        && a.dtype == DType::BF16
        && matches!(c.dtype, DType::BF16 | DType::F32)
        && a_sizes[..outer] == b_sizes[..outer]
        && c_sizes.iter().chain(&a_sizes).all(|size| *size > 0)
}

/// `c = a b` over the last two sizes, into a dense `c`.
pub(super) fn product(a: &CubeTensor<CudaRuntime>, b: &CubeTensor<CudaRuntime>, c: &CubeTensor<CudaRuntime>) {
    product_into(a, b, c, false);
}

/// `c += a b` over the last two sizes, into a dense f32 `c`.
pub(super) fn add_product(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
) {
    product_into(a, b, c, true);
}

fn product_into(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
    accumulate: bool,
) {
    let (a, b) = (Factor::new(a, true), Factor::new(b, false));
    let [z, rows, columns] = a.shape;
    let (m, k) = if a.k_major { (rows, columns) } else { (columns, rows) };
    let n = if b.k_major { b.shape[1] } else { b.shape[2] };
    let multiprocessors =
        c.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(132) as usize;
    // A long sum into few tiles (a weight's gradient) is split over the multiprocessors.
    let few = m.div_ceil(128) * n.div_ceil(128) * z < multiprocessors && k > 4096;
    let (width, parts) = choose(m, n, k, z, few && c.dtype == DType::F32, multiprocessors);
    let c = dense_view(c, [z, m, n]);
    let through_sum = parts > 1 || accumulate;
    let out = if through_sum { empty(&c, [z * parts, m, n], DType::F32) } else { c.clone() };
    let sizes = [m, n, k, z, parts].map(|size| size as u64);
    let flag = |on: bool| u8::from(on).to_string();
    let mut constants = vec![
        ("A_K_MAJOR", flag(a.k_major)),
        ("B_K_MAJOR", flag(b.k_major)),
        ("OUT", element(out.dtype).to_string()),
        ("EPILOGUE", "0".to_string()),
    ];
    if a.is_aligned() && b.is_aligned() && is_aligned(&out, n) {
        let (stages, staging) = stages(width);
        let tiles = m.div_ceil(128) * n.div_ceil(width) * z * parts;
        for (name, value) in [("TILE_N", width), ("STAGES", stages), ("STAGING", staging)] {
            constants.push((name, value.to_string()));
        }
        let kernel = CudaKernel {
            source: &MATMUL,
            entry: "matmul",
            constants,
            block: 384,
            shared_bytes: 1024 + stages * ((2 + width / 64) * 8192 + 16) + 8 * (staging * 2048 + 8),
        };
        let chunk = 128 / out.elem_size();
        let maps = [a.map(), b.map(), map(&out, [z * parts, m, n], [1, 16, chunk])];
        let operations = 2.0 * (m * n) as f64 * (k * z) as f64;
        let arguments = Arguments { maps: &maps, scalars: &sizes, operations, ..Default::default() };
        launch(kernel, [tiles.min(multiprocessors) as u32, 1, 1], arguments);
    } else {
        let kernel =
            CudaKernel { source: &MATMUL, entry: "matmul_any", constants, block: 128, shared_bytes: 0 };
        let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, (z * parts) as u32];
        let buffers = [&a.tensor, &b.tensor, &out];
        launch(kernel, grid, Arguments { buffers: &buffers, scalars: &sizes, ..Default::default() });
    }
    if through_sum {
        sum_parts(&out, &c, [m * n, z, parts], accumulate, multiprocessors);
    }
}

/// Adds the parts of a product in order, and what `c` holds if it is to `accumulate`.
fn sum_parts(
    parts: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
    [elements, z, count]: [usize; 3],
    accumulate: bool,
    multiprocessors: usize,
) {
    let constants = vec![
        ("A_K_MAJOR", "1".to_string()),
        ("B_K_MAJOR", "1".to_string()),
        ("OUT", element(c.dtype).to_string()),
        ("EPILOGUE", "0".to_string()),
    ];
    let kernel = CudaKernel { source: &MATMUL, entry: "matmul_sum", constants, block: 256, shared_bytes: 0 };
    let width = if elements.is_multiple_of(4) { 4 } else { 1 };
    let blocks = (z * elements / width).div_ceil(256).clamp(1, 16 * multiprocessors);
    let scalars = [elements as u64, z as u64, count as u64, u64::from(accumulate)];
    launch(
        kernel,
        [blocks as u32, 1, 1],
        Arguments { buffers: &[parts, c], scalars: &scalars, ..Default::default() },
    );
}

fn element(dtype: DType) -> &'static str {
    if dtype == DType::BF16 { "__nv_bfloat16" } else { "float" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_follows_the_shape() {
        // Forward and input gradients of 65,536 tokens: the widest tile. Weight gradients: split over the card.
        for (n, k) in [(512, 512), (1024, 512), (2048, 512), (512, 2048)] {
            assert_eq!(choose(65_536, n, k, 1, false, 132), (256, 1), "{n} {k}");
        }
        assert_eq!(choose(512, 512, 65_536, 1, true, 132), (128, 8));
        assert_eq!(choose(512, 1024, 65_536, 1, true, 132), (128, 4));
        assert_eq!(choose(512, 2048, 65_536, 1, true, 132), (256, 4));
        // Never a part without a slice, nor a sum of too many terms.
        for k in [1, 63, 64, 65, 5000, 100_000] {
            let (_, parts) = choose(7, 9, k, 1, true, 132);
            assert!(
                parts >= 1 && parts <= k.div_ceil(DEPTH) && k.div_ceil(parts) <= 2 * MOST_TERMS,
                "{k}: {parts}"
            );
        }
    }

    #[test]
    fn strides_tell_dense_from_transposed() {
        assert!(
            is_dense(&[3, 4], &[4, 1]) && is_dense(&[1, 4], &[77, 1]) && is_dense(&[2, 3, 4], &[12, 4, 1])
        );
        assert!(!is_dense(&[3, 4], &[1, 3]) && !is_dense(&[2, 3, 4], &[24, 8, 1]));
    }
}
