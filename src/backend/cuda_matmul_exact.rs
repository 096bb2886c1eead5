//! Matrix products without tensor cores on CUDA, f32 above all: how `cuda/matmul_exact.cu` is launched.

use super::cuda_matmul::{Epilogue, sum_parts};
use super::launch_cuda::{Arguments, CudaKernel, element, launch_strided, multiprocessors};
use super::matmul_exact::{Layout, prepared};
use super::source::Source;
use super::tensor::empty;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

type Buffer = CubeTensor<CudaRuntime>;

/// `cuda/matmul_exact.cu`.
static MATMUL_EXACT: Source = Source::new("matmul_exact.cu", include_str!("../../cuda/matmul_exact.cu"));

/// Along k, of one slice in shared memory.
const DEPTH: usize = 16;

/// Elements that lie side by side for one load.
const PACK: usize = 4;

/// `c = a b` over the last two sizes, bf16 or f32 factors multiplied in f32, into a dense `c` of bf16 or f32.
pub(super) fn product(a: &Buffer, b: &Buffer, c: &Buffer) {
    multiply(a, b, c, Epilogue::None, false);
}

/// [`product`] with an epilogue.
pub(super) fn product_with(a: &Buffer, b: &Buffer, c: &Buffer, epilogue: Epilogue) {
    multiply(a, b, c, epilogue, false);
}

/// `c += a b`, in place.
pub(super) fn product_added(a: &Buffer, b: &Buffer, c: &Buffer) {
    multiply(a, b, c, Epilogue::None, true);
}

/// How a block reads a factor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Side {
    /// Along k, or along the outer size (m or n).
    k_fast: bool,
    /// Elements side by side at multiples of their size along that one; 0: they are apart.
    width: usize,
    /// Along z, the outer size and k.
    strides: [usize; 3],
}

impl Side {
    /// Of a factor of `[z, outer, k]` elements, whose first one is element `start` of its memory.
    fn new(
        [z, outer, k]: [usize; 3],
        [along_z, along_outer, along_k]: [usize; 3],
        start: Option<usize>,
    ) -> Self {
        // The stride of a size of one is never used.
        let (k_unit, outer_unit) = (k == 1 || along_k == 1, outer == 1 || along_outer == 1);
        let k_fast = k_unit && (!outer_unit || k > outer);
        let (fast, slow) = if k_fast { (k_unit, (outer, along_outer)) } else { (outer_unit, (k, along_k)) };
        let used = |size: usize, stride: usize| if size > 1 { stride } else { 0 };
        let (along_z, slow) = (used(z, along_z), used(slow.0, slow.1));
        let aligned = [along_z, slow].iter().all(|stride| stride.is_multiple_of(PACK))
            && start.is_some_and(|start| start.is_multiple_of(PACK));
        let width = match fast {
            true if aligned => PACK,
            true => 1,
            false => 0,
        };
        let strides = match (k_fast, fast) {
            (true, _) => [along_z, slow, 1],
            (false, true) => [along_z, 1, slow],
            (false, false) => [along_z, along_outer, slow],
        };
        Self { k_fast, width, strides }
    }

    /// Whether the kernel's 32-bit steps reach all of a matrix of these sizes.
    fn is_within(&self, outer: usize, k: usize) -> bool {
        let last = outer.saturating_sub(1) * self.strides[1] + k.saturating_sub(1) * self.strides[2];
        last < 1 << 32
    }
}

/// The number of the element at which a tensor begins; nothing where that is between two.
fn start(x: &Buffer) -> Option<usize> {
    let bytes = x.handle.offset_start.unwrap_or(0) as usize;
    bytes.is_multiple_of(x.elem_size()).then(|| bytes / x.elem_size())
}

/// How a product is shared out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Schedule {
    /// Rows and columns of a block's tile.
    tile: [usize; 2],
    /// Parts of k.
    parts: usize,
}

/// The tiles, and what they take in cycles of a multiprocessor: for a slice, beside the others of its block.
const TILES: [([usize; 2], usize, usize); 4] =
    [([128, 128], 2400, 3000), ([128, 64], 1300, 2200), ([64, 128], 1300, 2200), ([64, 64], 720, 1600)];

impl Schedule {
    /// The cheapest by the instructions that a slice takes: the blocks of the busiest multiprocessor, one after the
    /// other (two hide each other's waits, one alone cannot), and the pass that adds the parts.
    fn choose([m, n, k, z]: [usize; 4], splits: bool, apart: bool, multiprocessors: usize) -> Self {
        let slices = k.div_ceil(DEPTH);
        let mut best = (usize::MAX, Self { tile: [64, 64], parts: 1 });
        for (tile, slice, rest) in TILES {
            // Elements that lie apart take the registers of a large tile.
            if apart && tile != [64, 64] {
                continue;
            }
            let count = m.div_ceil(tile[0]) * n.div_ceil(tile[1]) * z;
            let most = if splits { slices.min(4 * multiprocessors / count.max(1)).max(1) } else { 1 };
            for parts in 1..=most {
                let blocks = (count * parts).div_ceil(multiprocessors);
                let slice = if blocks == 1 { slice * 5 / 4 } else { slice };
                let sum = if parts > 1 { 8000 + parts * z * m * n / 180 } else { 0 };
                let cost = blocks * (slices.div_ceil(parts) * slice + rest) + sum;
                if cost < best.0 {
                    best = (cost, Self { tile, parts });
                }
            }
        }
        best.1
    }

    fn blocks(&self, m: usize, n: usize, z: usize) -> usize {
        m.div_ceil(self.tile[0]) * n.div_ceil(self.tile[1]) * z * self.parts
    }
}

fn multiply(a: &Buffer, b: &Buffer, c: &Buffer, epilogue: Epilogue, add: bool) {
    let (a, b, layout) = prepared(a, b, c);
    let Layout { z, m, n, k, a: of_a, b: of_b } = layout;
    let (number, slope, beside) = epilogue.parts();
    assert_eq!(a.dtype, b.dtype, "the factors of a product have one type");
    assert!(number <= 4 && !(add && number > 0), "an epilogue of f32 products");
    let left = Side::new([z, m, k], of_a, start(&a));
    let right = Side::new([z, n, k], [of_b[0], of_b[2], of_b[1]], start(&b));
    let fits = left.is_within(m, k) && right.is_within(n, k) && [m, n, k].iter().all(|size| *size < 1 << 31);
    assert!(fits, "a product of [{m}, {k}] and [{k}, {n}], expected factors of fewer than 2^32 elements");

    let multiprocessors = multiprocessors(c);
    let aligned = |x: &Buffer| start(x).is_some_and(|start| start.is_multiple_of(PACK));
    let apart = left.width == 0 || right.width == 0;
    let schedule = Schedule::choose([m, n, k, z], number == 0 && aligned(c), apart, multiprocessors);
    let parts = schedule.parts;
    let out = if parts > 1 { empty(c, [z * parts, m, n], DType::F32) } else { c.clone() };
    let packs = n.is_multiple_of(PACK) && aligned(&out) && beside.is_none_or(aligned);
    let mut constants = vec![
        ("IN", element(a.dtype).to_string()),
        ("OUT", element(out.dtype).to_string()),
        ("TILE_M", schedule.tile[0].to_string()),
        ("TILE_N", schedule.tile[1].to_string()),
        ("A_K_FAST", u8::from(left.k_fast).to_string()),
        ("B_K_FAST", u8::from(right.k_fast).to_string()),
        ("A_WIDTH", left.width.to_string()),
        ("B_WIDTH", right.width.to_string()),
        ("C_WIDTH", if packs { PACK } else { 1 }.to_string()),
        ("EPILOGUE", number.to_string()),
    ];
    constants.extend(slope.map(|slope| ("SLOPE", format!("{:e}f", slope as f32))));
    let kernel =
        CudaKernel { source: &MATMUL_EXACT, entry: "matmul_exact", constants, block: 256, shared_bytes: 0 };
    let mut scalars = vec![m, n, k, parts];
    scalars.extend(left.strides.into_iter().chain(right.strides));
    scalars.push(usize::from(add && parts == 1));
    let scalars: Vec<u64> = scalars.into_iter().map(|word| word as u64).collect();
    let mut buffers = vec![&a, &b, &out];
    if let Some(beside) = beside {
        assert!(
            beside.dtype == c.dtype && beside.meta.num_elements() == z * m * n,
            "what an epilogue has beside c"
        );
        buffers.push(beside);
    }
    let blocks = u32::try_from(schedule.blocks(m, n, z)).expect("a product of fewer than 2^32 tiles");
    let operations = 2.0 * (m * n) as f64 * (k * z) as f64;
    let arguments = Arguments { buffers: &buffers, scalars: &scalars, operations, ..Default::default() };
    launch_strided(kernel, [blocks, 1, 1], arguments);
    if parts > 1 {
        sum_parts(&out, c, [m * n, z, parts], add, multiprocessors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_read_along_what_is_side_by_side() {
        let side = |sizes, strides, start| {
            let Side { k_fast, width, strides } = Side::new(sizes, strides, Some(start));
            (k_fast, width, strides)
        };
        assert_eq!(side([1, 8, 12], [0, 12, 1], 0), (true, 4, [0, 12, 1]));
        assert_eq!(side([1, 8, 12], [0, 1, 8], 4), (false, 4, [0, 1, 8]));
        // Not at multiples of four: the start, the rows, the matrices.
        assert_eq!(side([1, 8, 12], [0, 12, 1], 3), (true, 1, [0, 12, 1]));
        assert_eq!(side([1, 8, 11], [0, 11, 1], 0), (true, 1, [0, 11, 1]));
        assert_eq!(side([2, 8, 12], [98, 12, 1], 0), (true, 1, [98, 12, 1]));
        assert_eq!(Side::new([1, 8, 12], [0, 12, 1], None).width, 1);
        // The strides of sizes of one count for nothing.
        assert_eq!(side([1, 1, 12], [7, 5, 1], 0), (true, 4, [0, 0, 1]));
        assert_eq!(side([1, 12, 1], [7, 1, 5], 0), (false, 4, [0, 1, 0]));
        assert_eq!(side([1, 1, 12], [0, 5, 3], 0), (false, 1, [0, 1, 3]));
        // Neither, and one that is the same throughout.
        assert_eq!(side([1, 8, 12], [0, 24, 2], 0), (false, 0, [0, 24, 2]));
        assert_eq!(side([3, 8, 12], [0, 0, 1], 0), (true, 4, [0, 0, 1]));
    }

    #[test]
    fn the_schedule_follows_the_shape() {
        let choose = |sizes| {
            let Schedule { tile, parts } = Schedule::choose(sizes, true, false, 132);
            (tile, parts)
        };
        // Forward and input gradients of 65,536 tokens, and the head's chunks: large tiles, whole sums.
        for sizes in
            [[65_536, 1024, 512, 1], [65_536, 512, 1024, 1], [65_536, 512, 512, 1], [8192, 1024, 512, 1]]
        {
            assert_eq!(choose(sizes), ([128, 128], 1), "{sizes:?}");
        }
        // Weight gradients: split over the card, twice.
        assert_eq!(choose([512, 1024, 65_536, 1]), ([128, 128], 8));
        assert_eq!(choose([512, 512, 65_536, 1]), ([128, 128], 16));
        // Small ones: in small tiles, never more parts than slices.
        assert_eq!(choose([96, 96, 64, 1]), ([64, 64], 1));
        for k in [0, 1, 16, 17, 5000, 100_000] {
            let schedule = Schedule::choose([7, 9, k, 1], true, false, 132);
            assert!(schedule.parts >= 1 && schedule.parts <= k.div_ceil(DEPTH).max(1), "{k}: {schedule:?}");
        }
        assert_eq!(Schedule::choose([512, 512, 65_536, 1], false, false, 132).parts, 1);
        assert_eq!(Schedule::choose([512, 512, 65_536, 1], true, true, 132).tile, [64, 64]);
        assert_eq!(Schedule { tile: [128, 64], parts: 3 }.blocks(129, 65, 2), 24);
    }

    #[test]
    fn the_compile_check_tries_the_forms_of_a_linear_layer() {
        // Forward, plain and squared; input gradient, plain and of the squared; weight gradient.
        for (a_k_fast, b_k_fast, epilogue) in [(1, 1, 0), (1, 1, 1), (1, 0, 0), (1, 0, 2), (0, 0, 0)] {
            let variant = format!(
                "-DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST={a_k_fast} \
                 -DB_K_FAST={b_k_fast} -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE={epilogue}"
            );
            assert!(MATMUL_EXACT.variants().any(|line| line == variant), "{variant}");
        }
    }
}
