//! Matrix products of bf16 on Hopper's tensor cores: how `cuda/matmul.cu` is launched, or `cuda/matmul_pingpong.cu`
//! where that is faster.

use super::cuda_pingpong::{self, Form};
use super::launch_cuda::{
    Arguments, CudaKernel, TensorMap, TensorMapSwizzle, element, known_element, launch, multiprocessors,
};
use super::probe_cuda;
use super::source::Source;
use super::tensor::{begins_at, copied, empty, has_aligned_rows};
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

/// What becomes of each element of a product before it is stored (`cuda/matmul.cu`). The tensors have the product's
/// sizes and type, and are dense.
#[derive(Debug, Clone, Copy)]
pub(super) enum Epilogue<'a> {
    /// Nothing.
    None,
    /// `max(x, 0)^2`.
    Squared,
    /// `x 2 sqrt(e)`, `e` being what `Squared` gave.
    SquaredBackward(&'a CubeTensor<CudaRuntime>),
    /// `leaky_relu(x)^2` with this slope below zero; `x` itself is written to the tensor.
    LeakySquared(f64, &'a CubeTensor<CudaRuntime>),
    /// `x 2 (e < 0 ? slope^2 e : e)`, `e` being what `LeakySquared` wrote.
    LeakySquaredBackward(f64, &'a CubeTensor<CudaRuntime>),
    /// `e + scale[n] x` for an `e` and a scale for each column, of bf16 or f32; `e + x` without.
    Added(&'a CubeTensor<CudaRuntime>, Option<&'a CubeTensor<CudaRuntime>>),
    /// `cap tanh(x / cap)`.
    Softcap(f64),
}

impl<'a> Epilogue<'a> {
    /// Its number in the kernel, its slope if it has one, and the tensor beside the product if there is one.
    pub(super) fn parts(self) -> (u8, Option<f64>, Option<&'a CubeTensor<CudaRuntime>>) {
        match self {
            Self::None => (0, None, None),
            Self::Squared => (1, None, None),
            Self::SquaredBackward(e) => (2, None, Some(e)),
            Self::LeakySquared(slope, e) => (3, Some(slope), Some(e)),
            Self::LeakySquaredBackward(slope, e) => (4, Some(slope), Some(e)),
            Self::Added(e, _) => (6, None, Some(e)),
            Self::Softcap(_) => (9, None, None),
        }
    }

    /// The scales of `n` columns, if there are any, dense and at a place where two are read at a time.
    fn scale(self, n: usize) -> Option<CubeTensor<CudaRuntime>> {
        let Self::Added(_, Some(scale)) = self else { return None };
        assert_eq!(scale.meta.num_elements(), n, "a scale for each column");
        let in_pairs = begins_at(scale, 2 * scale.elem_size());
        Some(if in_pairs && scale.is_contiguous() { scale.clone() } else { copied(scale.clone()) })
    }

    /// What else the kernel is compiled with, beside a slope.
    fn constant(self) -> Option<(&'static str, String)> {
        match self {
            Self::Added(_, Some(scale)) => Some(("SCALE", element(scale.dtype).to_string())),
            Self::Softcap(cap) => Some(("CAP", format!("{:e}f", cap as f32))),
            _ => None,
        }
    }
}

/// A factor as the kernel reads it: rows of consecutive elements, with k as its last size or not.
pub(super) struct Factor {
    tensor: CubeTensor<CudaRuntime>,
    pub(super) k_major: bool,
    /// `[z, rows, columns]`.
    pub(super) shape: [usize; 3],
    /// From one row to the next, in elements; more than the columns only where z is 1.
    pitch: usize,
}

impl Factor {
    /// The factor whose last two sizes are `[rows, k]` (or `[k, rows]`), in place where it or its transpose has rows of
    /// consecutive elements.
    pub(super) fn new(x: &CubeTensor<CudaRuntime>, k_last: bool) -> Self {
        let (sizes, strides) = layout(x);
        let rank = sizes.len();
        let batch = sizes[..rank - 2].iter().product();
        let (mut swapped, mut swapped_strides) = (sizes.clone(), strides.clone());
        swapped.swap(rank - 2, rank - 1);
        swapped_strides.swap(rank - 2, rank - 1);
        for (sizes, strides, k_major) in [(&sizes, &strides, k_last), (&swapped, &swapped_strides, !k_last)] {
            if let Some(pitch) = pitch(sizes, strides) {
                let shape = [batch, sizes[rank - 2], sizes[rank - 1]];
                return Self { tensor: x.clone(), k_major, shape, pitch };
            }
        }
        let shape = [batch, sizes[rank - 2], sizes[rank - 1]];
        Self { tensor: into_contiguous(x.clone()), k_major: k_last, shape, pitch: shape[2] }
    }

    /// Whether the copy engine can read it.
    pub(super) fn is_aligned(&self) -> bool {
        has_aligned_rows(&self.tensor, self.pitch)
    }

    pub(super) fn map(&self) -> TensorMap<'_> {
        let strides = vec![self.shape[1] * self.pitch, self.pitch, 1];
        TensorMap { strides, ..map(&self.tensor, self.shape, [1, DEPTH, 64]) }
    }

    /// The factor without gaps between its rows.
    fn dense(self) -> Self {
        let [batch, rows, columns] = self.shape;
        if self.pitch == columns {
            return Self { tensor: dense_view(&self.tensor, self.shape), ..self };
        }
        let strides = [rows * self.pitch, self.pitch, 1];
        let rows =
            CubeTensor { meta: Box::new(Metadata::new([batch, rows, columns], strides)), ..self.tensor };
        Self { tensor: into_contiguous(rows), pitch: columns, ..self }
    }
}

fn layout(x: &CubeTensor<CudaRuntime>) -> (Vec<usize>, Vec<usize>) {
    (x.meta.shape().iter().copied().collect(), x.meta.strides().iter().copied().collect())
}

/// From one row to the next, if the last size is of consecutive elements and the outer ones are dense over the rows; if
/// there is one matrix only, its rows may have gaps.
fn pitch(sizes: &[usize], strides: &[usize]) -> Option<usize> {
    let rank = sizes.len();
    let (rows, columns) = (sizes[rank - 2], sizes[rank - 1]);
    if is_dense(sizes, strides) {
        return Some(columns);
    }
    let is_one = sizes[..rank - 2].iter().all(|size| *size == 1);
    let pitch = if rows == 1 { columns } else { strides[rank - 2] };
    (is_one && (columns == 1 || strides[rank - 1] == 1) && pitch >= columns).then_some(pitch)
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
pub(super) fn dense_view(x: &CubeTensor<CudaRuntime>, shape: [usize; 3]) -> CubeTensor<CudaRuntime> {
    let strides = [shape[1] * shape[2], shape[2], 1];
    CubeTensor { meta: Box::new(Metadata::new(shape, strides)), ..x.clone() }
}

pub(super) fn map(tensor: &CubeTensor<CudaRuntime>, shape: [usize; 3], tile: [usize; 3]) -> TensorMap<'_> {
    TensorMap::dense(tensor, &shape, &tile, TensorMapSwizzle::B128)
}

/// The width of a tile and the number of parts of k, from a cost fitted to measured shapes (README, the kernel table):
/// a block takes `slices alpha + beta` for a tile, a sum of parts a pass over the output.
pub(super) fn choose(
    m: usize,
    n: usize,
    k: usize,
    z: usize,
    splits: bool,
    multiprocessors: usize,
) -> (usize, usize) {
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

/// Whether the tensor cores take this: bf16 on compute capability 9.0, of which there is something.
pub(super) fn fits(x: &CubeTensor<CudaRuntime>) -> bool {
    x.dtype == DType::BF16
        && probe_cuda::is_hopper(x.device.index)
        && x.meta.shape().iter().all(|size| *size > 0)
}

/// Whether the kernel takes a product of these: bf16 on compute capability 9.0, to bf16 or f32, with no factor spread
/// over a batch.
pub(super) fn takes(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
) -> bool {
    let sizes = |x: &CubeTensor<CudaRuntime>| -> Vec<usize> { x.meta.shape().iter().copied().collect() };
    let (a_sizes, b_sizes, c_sizes) = (sizes(a), sizes(b), sizes(c));
    let outer = a_sizes.len() - 2;
    fits(a)
        && known_element(c.dtype).is_some()
        && a_sizes[..outer] == b_sizes[..outer]
        && c_sizes.iter().all(|size| *size > 0)
}

/// `c = a b` over the last two sizes, into a dense `c`.
pub(super) fn product(a: &CubeTensor<CudaRuntime>, b: &CubeTensor<CudaRuntime>, c: &CubeTensor<CudaRuntime>) {
    multiply(a, b, c, Epilogue::None, false);
}

/// [`product`] with an epilogue.
pub(super) fn product_with(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
    epilogue: Epilogue,
) {
    multiply(a, b, c, epilogue, false);
}

/// `c += a b`, in place.
pub(super) fn product_added(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
) {
    multiply(a, b, c, Epilogue::None, true);
}

fn multiply(
    a: &CubeTensor<CudaRuntime>,
    b: &CubeTensor<CudaRuntime>,
    c: &CubeTensor<CudaRuntime>,
    epilogue: Epilogue,
    accumulate: bool,
) {
    let (mut a, mut b) = (Factor::new(a, true), Factor::new(b, false));
    let [z, rows, columns] = a.shape;
    let (m, k) = if a.k_major { (rows, columns) } else { (columns, rows) };
    let n = if b.k_major { b.shape[1] } else { b.shape[2] };
    let multiprocessors = multiprocessors(c);
    // A long sum into few tiles (a weight's gradient) is split over the multiprocessors.
    let few = m.div_ceil(128) * n.div_ceil(128) * z < multiprocessors && k > 4096;
    let (number, slope, beside) = epilogue.parts();
    let splits = few && c.dtype == DType::F32 && number == 0;
    let (width, parts) = choose(m, n, k, z, splits, multiprocessors);
    let c = dense_view(c, [z, m, n]);
    let beside = beside.map(|e| {
        assert!(e.dtype == c.dtype && e.meta.num_elements() == z * m * n, "what an epilogue has beside c");
        dense_view(e, [z, m, n])
    });
    let scale = epilogue.scale(n);
    // What the parts of k leave, or what is yet to be added.
    let summed = parts > 1 || accumulate;
    let out = if summed { empty(&c, [z * parts, m, n], DType::F32) } else { c.clone() };
    let sizes = [m, n, k, z, parts].map(|size| size as u64);
    let flag = |on: bool| u8::from(on).to_string();
    let mut constants = vec![
        ("A_K_MAJOR", flag(a.k_major)),
        ("B_K_MAJOR", flag(b.k_major)),
        ("OUT", element(out.dtype).to_string()),
        ("EPILOGUE", number.to_string()),
    ];
    constants.extend(slope.map(|slope| ("SLOPE", format!("{:e}f", slope as f32))));
    constants.extend(epilogue.constant());
    let aligned = |x: &CubeTensor<CudaRuntime>| has_aligned_rows(x, n);
    if a.is_aligned() && b.is_aligned() && aligned(&out) && beside.as_ref().is_none_or(aligned) {
        let chunk = 128 / out.elem_size();
        let written = |x, depth| map(x, [depth, m, n], [1, 16, chunk]);
        let mut maps = vec![a.map(), b.map(), written(&out, z * parts)];
        maps.extend(beside.as_ref().map(|e| written(e, z)));
        let (kernel, blocks) = match Form::choose([m, n, k, z], [a.k_major, b.k_major], out.dtype, number) {
            Some(form) => {
                maps.iter_mut().for_each(|map| map.prefetch = cuda_pingpong::PREFETCH);
                (form.kernel(constants), form.blocks(m, n, multiprocessors))
            }
            None => {
                let tiles = m.div_ceil(128) * n.div_ceil(width) * z * parts;
                (kernel(width, constants), tiles.min(multiprocessors))
            }
        };
        let operations = 2.0 * (m * n) as f64 * (k * z) as f64;
        let buffers: Vec<_> = scale.iter().collect();
        let arguments = Arguments { maps: &maps, buffers: &buffers, scalars: &sizes, operations };
        launch(kernel, [blocks as u32, 1, 1], arguments);
    } else {
        let kernel =
            CudaKernel { source: &MATMUL, entry: "matmul_any", constants, block: 128, shared_bytes: 0 };
        let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, (z * parts) as u32];
        (a, b) = (a.dense(), b.dense());
        let mut buffers = vec![&a.tensor, &b.tensor, &out];
        buffers.extend(beside.iter().chain(&scale));
        launch(kernel, grid, Arguments { buffers: &buffers, scalars: &sizes, ..Default::default() });
    }
    if summed {
        sum_parts(&out, &c, [m * n, z, parts], accumulate, multiprocessors);
    }
}

/// The kernel with tiles of this width, for what else it is compiled with.
pub(super) fn kernel(width: usize, mut constants: Vec<(&'static str, String)>) -> CudaKernel {
    let (stages, staging) = stages(width);
    let own = [("TILE_N", width), ("STAGES", stages), ("STAGING", staging)];
    constants.extend(own.map(|(name, value)| (name, value.to_string())));
    let shared_bytes = 1024 + stages * ((2 + width / 64) * 8192 + 16) + 8 * (staging * 2048 + 8);
    CudaKernel { source: &MATMUL, entry: "matmul", constants, block: 384, shared_bytes }
}

/// Adds the parts of a product in order, to what `c` holds if so asked.
pub(super) fn sum_parts(
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
