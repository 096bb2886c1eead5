//! Sums on NVIDIA GPUs: how `cuda/reduce.cu` is launched.

use super::cuda::Cuda;
use super::launch_cuda::{Arguments, CudaKernel, launch};
use super::source::Source;
use super::tensor::{dense, empty, is_aligned, tensor};
use crate::ops::{ReduceOps, reduce};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/reduce.cu`.
static REDUCE: Source = Source::new("reduce.cu", include_str!("../../cuda/reduce.cu"));

/// The most elements that one block sums; of more, each block takes the least.
const MOST: usize = 1 << 17;
const LEAST: usize = 1 << 14;

/// The most blocks; one block sums theirs.
const BLOCKS: usize = 1024;
const _: () = assert!(BLOCKS <= MOST);

impl ReduceOps for Cuda {
    fn total(x: Tensor<Self, 1>) -> Tensor<Self, 1> {
        if x.dtype() != DType::F32 || x.dims()[0] == 0 {
            return reduce::sum(x);
        }
        let mut x = dense(x);
        loop {
            x = slices(&x);
            if x.meta.num_elements() == 1 {
                return tensor(x);
            }
        }
    }
}

/// Elements of a slice of packs of `width`, and how many slices, for `n` elements.
fn split(n: usize, width: usize) -> (usize, usize) {
    let packs = n / width;
    let blocks = if n <= MOST { 1 } else { n.div_ceil(LEAST).min(BLOCKS) };
    let slice = packs.div_ceil(blocks);
    (slice, packs.div_ceil(slice))
}

/// The sums of the slices of a vector.
fn slices(x: &CubeTensor<CudaRuntime>) -> CubeTensor<CudaRuntime> {
    let n = x.meta.num_elements();
    let width = if is_aligned(x) && n.is_multiple_of(4) { 4 } else { 1 };
    let (slice, blocks) = split(n, width);
    let sums = empty(x, [blocks], DType::F32);
    let kernel = CudaKernel {
        source: &REDUCE,
        entry: "reduce_sum",
        constants: vec![("WIDTH", width.to_string())],
        block: 1024,
        shared_bytes: 0,
    };
    let scalars = [(n / width) as u64, slice as u64];
    let arguments = Arguments { buffers: &[x, &sums], scalars: &scalars, ..Default::default() };
    launch(kernel, [blocks as u32, 1, 1], arguments);
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_the_vector_and_none_is_empty() {
        for n in [1, 3, 4, 65_536, MOST, MOST + 1, MOST + 4, 1 << 24, 100_000_007, 1 << 30] {
            for width in [1, 4].into_iter().filter(|width| n.is_multiple_of(*width)) {
                let (slice, blocks) = split(n, width);
                assert!(
                    slice * blocks * width >= n && slice * (blocks - 1) * width < n,
                    "{n}: {slice} {blocks}"
                );
                assert!(blocks <= BLOCKS, "{n}: {blocks}");
            }
        }
    }
}
