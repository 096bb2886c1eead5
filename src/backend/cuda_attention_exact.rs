//! Attention in f32 without tensor cores, on any card: how `cuda/attention_exact_forward.cu` and
//! `cuda/attention_exact_backward.cu` are launched. Heads of 16, 32, 64 or 128 channels.

use super::cuda::Cuda;
use super::cuda_attention::Call;
use super::launch_cuda::{Arguments, float_word, launch_strided};
use super::source::Source;
use super::tensor::{aligned, copied, dense, empty, is_aligned, primitive};
use super::views::layout;
use crate::ops::attention::{Attended, Mask};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

static FORWARD: Source =
    Source::new("attention_exact_forward.cu", include_str!("../../cuda/attention_exact_forward.cu"));
static BACKWARD: Source =
    Source::new("attention_exact_backward.cu", include_str!("../../cuda/attention_exact_backward.cu"));

/// Threads of a block.
const THREADS: u32 = 128;

/// Static shared memory of the kernels at most.
const STATIC_BYTES: usize = 1024;

/// Blocks of the grid along y at most.
const MOST_BLOCKS: usize = 65_535;

/// A block's tile: rows that it holds, columns of each of those that it walks over (the kernels' `ROWS`, `COLUMNS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    rows: usize,
    columns: usize,
}

impl Tile {
    fn forward(size: usize) -> Self {
        Self { rows: if size == 128 { 64 } else { 128 }, columns: 64 }
    }

    fn backward(size: usize) -> Self {
        Self { rows: 64, columns: if size == 128 { 32 } else { 64 } }
    }

    /// Bytes of shared memory of so many tiles of rows and of columns, and one of scores.
    fn bytes(self, of_rows: usize, of_columns: usize, size: usize) -> usize {
        4 * ((of_rows * self.rows + of_columns * self.columns) * size + self.rows * self.columns)
    }
}

/// Dynamic shared memory of the forward: queries, keys, values, exponentials.
fn forward_bytes(size: usize) -> usize {
    Tile::forward(size).bytes(1, 2, size)
}

/// Of either kernel of the backward: queries and gradients, keys and values, scores or their gradients.
fn backward_bytes(size: usize) -> usize {
    Tile::backward(size).bytes(2, 2, size)
}

/// A call that the kernels take.
pub(super) fn takes(inputs: [&Tensor<Cuda, 4>; 3], mask: &Mask<Cuda>, scale: f64) -> Option<Call> {
    let [q, k, v] = inputs;
    let [batch, _, heads, size] = q.dims();
    let keys = k.dims()[1];
    if [q, k, v].iter().any(|x| x.dtype() != DType::F32) || !matches!(size, 16 | 32 | 64 | 128) {
        return None;
    }
    let shared = primitive(q.clone()).client.properties().hardware.max_shared_memory_size;
    let fits = forward_bytes(size).max(backward_bytes(size)) + STATIC_BYTES <= shared
        && keys.div_ceil(Tile::backward(size).rows) <= MOST_BLOCKS
        && batch * heads < 1 << 31;
    fits.then(|| Call::of(inputs, mask, scale)).flatten()
}

/// `y` and the logarithms of the sums.
pub(super) fn forward(call: &Call, inputs: [Tensor<Cuda, 4>; 3]) -> [CubeTensor<CudaRuntime>; 2] {
    let heads = inputs.map(Heads::new);
    let [q, k, v] = &heads;
    let y = empty(&q.tensor, [call.batch, call.queries, call.heads, call.size], DType::F32);
    let log_sums = empty(&q.tensor, [call.batch, call.heads, call.queries], DType::F32);
    let buffers: Vec<_> =
        [&q.tensor, &k.tensor, &v.tensor, &y, &log_sums].into_iter().chain(&call.starts).collect();
    let scalars = scalars(call, [q, k, v, v]);
    let kernel = call.kernel(&FORWARD, "attention_exact_forward", THREADS, forward_bytes(call.size));
    let grid = [call.batch * call.heads, call.queries.div_ceil(Tile::forward(call.size).rows), 1];
    let operations = 2.0 * call.product();
    let arguments = Arguments { buffers: &buffers, scalars: &scalars, operations, ..Default::default() };
    launch_strided(kernel, grid.map(|size| size as u32), arguments);
    [y, log_sums]
}

/// The gradients of `q`, `k` and `v`, that of `v` in its place if it has one that the kernels reach.
pub(super) fn backward(
    call: &Call,
    attended: &Attended<Cuda>,
    log_sums: Tensor<Cuda, 3>,
    grad: Tensor<Cuda, 4>,
    place: Option<CubeTensor<CudaRuntime>>,
) -> Option<[CubeTensor<CudaRuntime>; 3]> {
    let heads = [&attended.q, &attended.k, &attended.v].map(|x| Heads::new(x.clone()));
    let [q, k, v] = &heads;
    let grad_v = match place {
        Some(place) => Heads::at(place)?,
        None => Heads::at(empty(&v.tensor, v.tensor.meta.shape().clone(), DType::F32))?,
    };
    let grad = if grad.dtype() == DType::F32 { grad } else { grad.cast(DType::F32) };
    let [y, grad] = [attended.y.clone(), grad].map(|x| aligned(dense(x)));
    let log_sums = dense(log_sums);
    let [grad_q, grad_k] = [q, k].map(|x| empty(&y, x.tensor.meta.shape().clone(), DType::F32));
    let delta = empty(&y, [call.batch, call.heads, call.queries], DType::F32);
    let scalars = scalars(call, [q, k, v, &grad_v]);
    let tile = Tile::backward(call.size);
    let run = |entry,
               buffers: &[&CubeTensor<CudaRuntime>],
               results: [&CubeTensor<CudaRuntime>; 2],
               grid: [usize; 2],
               products: f64| {
        let buffers: Vec<_> = buffers.iter().copied().chain(&call.starts).chain(results).collect();
        let operations = products * call.product();
        let arguments = Arguments { buffers: &buffers, scalars: &scalars, operations, ..Default::default() };
        let kernel = call.kernel(&BACKWARD, entry, THREADS, backward_bytes(call.size));
        launch_strided(kernel, [grid[0] as u32, grid[1] as u32, 1], arguments);
    };
    let inputs = [&q.tensor, &k.tensor, &v.tensor];
    // It computes what the other reads as `delta`.
    run(
        "attention_exact_backward_queries",
        &[inputs[0], inputs[1], inputs[2], &y, &grad, &log_sums],
        [&delta, &grad_q],
        [call.batch * call.heads, call.queries.div_ceil(tile.rows)],
        3.0,
    );
    run(
        "attention_exact_backward_keys",
        &[inputs[0], inputs[1], inputs[2], &grad, &log_sums, &delta],
        [&grad_k, &grad_v.tensor],
        [call.batch * call.groups, call.keys.div_ceil(tile.rows)],
        4.0,
    );
    Some([grad_q, grad_k, grad_v.tensor])
}

/// The scalars of all kernels: sizes, and the strides of `q`, `k`, `v` and the gradient of `v`.
fn scalars(call: &Call, heads: [&Heads; 4]) -> Vec<u64> {
    let sizes = [call.batch, call.queries, call.keys, call.heads, call.groups].map(|size| size as u64);
    let window = call.window.unwrap_or(0) as u64;
    let strides = heads.into_iter().flat_map(|heads| heads.strides).map(|stride| stride as u64);
    sizes.into_iter().chain([float_word(call.scale), window]).chain(strides).collect()
}

/// Heads `[b, t, n, d]` as the kernels read them, where they lie if they can: with the strides of b, t and n.
struct Heads {
    tensor: CubeTensor<CudaRuntime>,
    strides: [usize; 3],
}

impl Heads {
    fn new(x: Tensor<Cuda, 4>) -> Self {
        let [_, time, heads, size] = x.dims();
        let x = primitive(x);
        let strides = [time * heads * size, heads * size, size];
        Self::at(x.clone()).unwrap_or_else(|| Self { tensor: copied(x), strides })
    }

    fn at(x: CubeTensor<CudaRuntime>) -> Option<Self> {
        let (shape, strides) = layout(&x);
        let strides = head_strides(shape, strides).filter(|_| is_aligned(&x))?;
        Some(Self { tensor: x, strides })
    }
}

/// The strides of `[b, t, n, d]` but for the last, if every head's row is dense and begins at a multiple of 16 bytes.
fn head_strides(shape: [usize; 4], strides: [usize; 4]) -> Option<[usize; 3]> {
    // Where there is one of something, its stride says nothing.
    let outer: [usize; 3] = std::array::from_fn(|i| if shape[i] == 1 { 0 } else { strides[i] });
    let reached = strides[3] == 1 && outer.iter().all(|stride| stride.is_multiple_of(4));
    reached.then_some(outer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_the_shared_memory() {
        assert_eq!([16, 32, 64, 128].map(forward_bytes), [49_152, 65_536, 98_304, 114_688]);
        assert_eq!([16, 32, 64, 128].map(backward_bytes), [32_768, 49_152, 81_920, 106_496]);
    }

    #[test]
    fn heads_are_read_where_they_lie() {
        // Dense; columns of a projection; heads and positions swapped; one sequence, one position, one head.
        assert_eq!(head_strides([2, 7, 8, 64], [3584, 512, 64, 1]), Some([3584, 512, 64]));
        assert_eq!(head_strides([2, 7, 4, 64], [7168, 1024, 64, 1]), Some([7168, 1024, 64]));
        assert_eq!(head_strides([2, 7, 8, 64], [3584, 64, 448, 1]), Some([3584, 64, 448]));
        assert_eq!(head_strides([1, 1, 1, 16], [3, 5, 7, 1]), Some([0, 0, 0]));
        // Channels apart, rows that begin between multiples of 16 bytes.
        assert_eq!(head_strides([2, 7, 1, 64], [448, 1, 7, 7]), None);
        assert_eq!(head_strides([2, 7, 4, 64], [7 * 258, 258, 64, 1]), None);
    }
}
