//! Attention on Hopper: how `cuda/attention_forward.cu`, `cuda/attention_rows.cu` and `cuda/attention_backward.cu` are
//! launched. bf16 heads of 32, 64 or 128 channels; f32 is `cuda_attention_exact`'s, anything else the reference's.

use super::cuda::Cuda;
use super::launch_cuda::{
    Arguments, CudaKernel, TensorMap, TensorMapPrefetch, TensorMapSwizzle, float_word, launch,
    launch_strided, multiprocessors,
};
use super::source::Source;
use super::tensor::{aligned, copied, dense, empty, is_aligned, primitive, tensor};
use super::views::layout;
use super::{cuda_attention_exact, cuda_matmul};
use crate::ops::AttentionOps;
use crate::ops::attention::{self, Attended, Mask};
use burn::tensor::{DType, Tensor};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

static FORWARD: Source = Source::new("attention_forward.cu", include_str!("../../cuda/attention_forward.cu"));
static ROWS: Source = Source::new("attention_rows.cu", include_str!("../../cuda/attention_rows.cu"));
static BACKWARD: Source =
    Source::new("attention_backward.cu", include_str!("../../cuda/attention_backward.cu"));

/// Queries of the forward's tile, keys of the backward's block.
const TILE: usize = 192;
const KEY_BLOCK: usize = 128;

/// Bytes of keys and values that the forward walks together: what stays in the L2 cache.
const SECTION_BYTES: usize = 16 << 20;

impl AttentionOps for Cuda {
    fn attention_forward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        let [y, log_sums] = if let Some(call) = Call::new([&q, &k, &v], mask, scale) {
            call.forward([q, k, v].map(Heads::new))
        } else if let Some(call) = cuda_attention_exact::takes([&q, &k, &v], mask, scale) {
            cuda_attention_exact::forward(&call, [q, k, v])
        } else {
            return (attention::forward(q, k, v, mask, scale), None);
        };
        (tensor(y), Some(tensor(log_sums)))
    }

    fn attention_backward(
        attended: Attended<Self>,
        grad: Tensor<Self, 4>,
        mask: &Mask<Self>,
        scale: f64,
    ) -> [Tensor<Self, 4>; 3] {
        match backward_into(&attended, &grad, mask, scale, None) {
            Some(grads) => grads.map(tensor),
            None => attention::backward(attended, grad, mask, scale),
        }
    }
}

/// [`AttentionOps::attention_backward`] by the kernels, if they take these; the gradient of `v` into the place given,
/// `[b, t, g, d]`, whose rows of `g d` elements may lie apart.
pub(super) fn backward_into(
    attended: &Attended<Cuda>,
    grad: &Tensor<Cuda, 4>,
    mask: &Mask<Cuda>,
    scale: f64,
    place: Option<CubeTensor<CudaRuntime>>,
) -> Option<[CubeTensor<CudaRuntime>; 3]> {
    let inputs = [&attended.q, &attended.k, &attended.v];
    let log_sums = attended.log_sums.clone()?;
    let Some(call) = Call::new(inputs, mask, scale) else {
        let call = cuda_attention_exact::takes(inputs, mask, scale)?;
        return cuda_attention_exact::backward(&call, attended, log_sums, grad.clone(), place);
    };
    let place = match place {
        Some(place) => Some(Heads::at(place)?),
        None => None,
    };
    let grad = if grad.dtype() == DType::BF16 { grad.clone() } else { grad.clone().cast(DType::BF16) };
    let [y, grad] = [attended.y.clone(), grad].map(|x| aligned(dense(x)));
    let inputs = inputs.map(|x| Heads::new(x.clone()));
    Some(call.backward(inputs, &y, &grad, &dense(log_sums), place))
}

/// What q and k were before [`crate::ops::qk_norm`], whose backward then follows attention's in the same kernel.
pub(super) struct Norm {
    /// `[b, t, h, d]`, `[b, t, g, d]`, bf16.
    pub before: [CubeTensor<CudaRuntime>; 2],
    /// Cosines and sines `[t, half]` and the elements from one row to the next, a multiple of 16 bytes; none where
    /// nothing rotates.
    pub tables: Option<([CubeTensor<CudaRuntime>; 2], usize)>,
    /// `[h]`, bf16.
    pub gain: Option<CubeTensor<CudaRuntime>>,
    /// Of the norm.
    pub eps: f32,
}

impl Norm {
    /// Pairs of channels that rotate.
    fn half(&self) -> usize {
        self.tables.as_ref().map_or(0, |([cos, _], _)| cos.meta.shape()[1])
    }
}

/// What the backward gives.
pub(super) struct Grads {
    /// The gradients of q, k and v, of the first two before the norm where that was asked for.
    pub of: [CubeTensor<CudaRuntime>; 3],
    /// Parts `[parts, h]` of the gain's, where there is one.
    pub gain_parts: Option<CubeTensor<CudaRuntime>>,
}

/// [`backward_into`] and on through the norm, if the kernels take these: the gradients of q, k and v into the places given.
pub(super) fn normed_backward_into(
    attended: &Attended<Cuda>,
    grad: &Tensor<Cuda, 4>,
    mask: &Mask<Cuda>,
    scale: f64,
    places: [CubeTensor<CudaRuntime>; 3],
    norm: &Norm,
) -> Option<Grads> {
    let inputs = [&attended.q, &attended.k, &attended.v];
    let call = Call::new(inputs, mask, scale).filter(|call| call.takes(norm))?;
    let log_sums = attended.log_sums.clone()?;
    let [q, k, v] = places.map(Heads::at);
    let places = [Some(q?), Some(k?), Some(v?)];
    let grad = if grad.dtype() == DType::BF16 { grad.clone() } else { grad.clone().cast(DType::BF16) };
    let [y, grad] = [attended.y.clone(), grad].map(|x| aligned(dense(x)));
    let inputs = inputs.map(|x| Heads::new(x.clone()));
    Some(call.backward_to(inputs, &y, &grad, &dense(log_sums), places, Some(norm)))
}

/// From one sequence, and from one position, of `[b, t, n, d]` to the next, if the copy engine reads these strides (in
/// elements of two bytes) as rows of `n d` elements.
fn row_strides([batch, time, heads, size]: [usize; 4], strides: [usize; 4]) -> Option<[usize; 2]> {
    let row = heads * size;
    let are_rows = strides[3] == 1 && (heads == 1 || strides[2] == size);
    // Where there is one, its stride says nothing.
    let of_time = if time == 1 { row } else { strides[1] };
    let of_batch = if batch == 1 { of_time * time } else { strides[0] };
    let fits = |stride: usize| stride >= row && (2 * stride).is_multiple_of(16);
    (are_rows && fits(of_time) && fits(of_batch)).then_some([of_batch, of_time])
}

/// Heads `[b, t, n, d]` as the copy engine reads them: where they lie if it can, else a dense copy.
struct Heads {
    tensor: CubeTensor<CudaRuntime>,
    shape: [usize; 4],
    strides: [usize; 2],
}

impl Heads {
    fn new(x: Tensor<Cuda, 4>) -> Self {
        Self::of(primitive(x))
    }

    fn of(x: CubeTensor<CudaRuntime>) -> Self {
        Self::at(x.clone()).unwrap_or_else(|| {
            let (shape, _) = layout::<_, 4>(&x);
            let row = shape[2] * shape[3];
            Self { tensor: copied(x), shape, strides: [shape[1] * row, row] }
        })
    }

    /// Where they lie, if the copy engine can reach them there.
    fn at(x: CubeTensor<CudaRuntime>) -> Option<Self> {
        let (shape, strides) = layout(&x);
        let strides = row_strides(shape, strides).filter(|_| is_aligned(&x))?;
        Some(Self { tensor: x, shape, strides })
    }

    fn map(&self) -> TensorMap<'_> {
        let [batch, time, heads, size] = self.shape;
        TensorMap {
            tensor: &self.tensor,
            shape: vec![batch, time, heads * size],
            strides: vec![self.strides[0], self.strides[1], 1],
            tile: vec![1, 64, size.min(64)],
            swizzle: swizzle(size),
            prefetch: TensorMapPrefetch::B256,
        }
    }

    /// Uninitialised dense heads on the device of these.
    fn like(&self, shape: [usize; 4]) -> Self {
        let row = shape[2] * shape[3];
        Self { tensor: empty(&self.tensor, shape, DType::BF16), shape, strides: [shape[1] * row, row] }
    }
}

/// Sizes and mask of a call that kernels take.
pub(super) struct Call {
    pub(super) batch: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) heads: usize,
    pub(super) groups: usize,
    pub(super) size: usize,
    pub(super) scale: f32,
    pub(super) window: Option<usize>,
    pub(super) starts: Option<CubeTensor<CudaRuntime>>,
}

impl Call {
    /// A call that the kernels for bf16 on Hopper take.
    fn new(inputs: [&Tensor<Cuda, 4>; 3], mask: &Mask<Cuda>, scale: f64) -> Option<Self> {
        let [q, k, v] = inputs;
        let ([batch, queries, heads, size], [_, _, groups, _]) = (q.dims(), k.dims());
        let fits = cuda_matmul::fits(&primitive(q.clone()))
            && [k, v].iter().all(|x| x.dtype() == DType::BF16)
            && matches!(size, 32 | 64 | 128)
            && batch < 1 << 16
            && groups < 1 << 16
            && queries.div_ceil(64) * batch * heads < 1 << 31;
        fits.then(|| Self::of(inputs, mask, scale)).flatten()
    }

    /// A call of sizes that kernels take: all of them.
    pub(super) fn of([q, k, _]: [&Tensor<Cuda, 4>; 3], mask: &Mask<Cuda>, scale: f64) -> Option<Self> {
        let ([batch, queries, heads, size], [_, keys, groups, _]) = (q.dims(), k.dims());
        let fits = queries.min(batch).min(groups) > 0
            && queries <= keys
            && heads.is_multiple_of(groups)
            && keys < 1 << 30
            && scale > 0.0
            && mask.window != Some(0);
        if !fits {
            return None;
        }
        let starts = match &mask.documents {
            None => None,
            Some(starts) => {
                assert_eq!(starts.dims(), [batch, keys], "a document's start for each position");
                let starts = into_contiguous(starts.clone().into_primitive());
                if starts.dtype != DType::I32 {
                    return None;
                }
                Some(starts)
            }
        };
        let window = mask.window.filter(|window| *window < keys);
        Some(Self { batch, queries, keys, heads, groups, size, scale: scale as f32, window, starts })
    }

    pub(super) fn kernel(
        &self,
        source: &'static Source,
        entry: &'static str,
        block: u32,
        shared: usize,
    ) -> CudaKernel {
        let flag = |on: bool| u8::from(on).to_string();
        let constants = vec![
            ("HEAD", self.size.to_string()),
            ("WINDOW", flag(self.window.is_some())),
            ("DOCUMENTS", flag(self.starts.is_some())),
        ];
        CudaKernel { source, entry, constants, block, shared_bytes: shared }
    }

    /// Whether the backward goes on through this norm: a channel and the one that it rotates with are in one thread, a
    /// warp's lanes have a group's heads.
    fn takes(&self, norm: &Norm) -> bool {
        let is_bf16 = norm.before.iter().chain(&norm.gain).all(|x| x.dtype == DType::BF16);
        let shapes = [self.heads, self.groups].map(|heads| [self.batch, self.keys, heads, self.size]);
        let same = norm.before.iter().zip(shapes).all(|(x, shape)| x.meta.shape().iter().eq(&shape));
        let tables = norm.tables.as_ref().is_none_or(|(tables, row)| {
            let fits = |x: &CubeTensor<CudaRuntime>| {
                x.meta.shape()[0] >= self.keys && x.dtype == DType::F32 && is_aligned(x)
            };
            tables.iter().all(fits) && *row >= norm.half() && row.is_multiple_of(4)
        });
        is_bf16
            && same
            && tables
            && norm.half().is_multiple_of(8)
            && self.queries == self.keys
            && self.heads / self.groups <= 32
    }

    /// The scalars of all three kernels; `query_row` is the backward's stride of `gq`.
    fn scalars(&self, query_row: usize) -> [u64; 9] {
        let per_head = self.keys * self.size * 4 * self.groups / self.heads;
        let section = (SECTION_BYTES / per_head.max(1)).clamp(1, self.batch * self.heads);
        let [batch, queries, keys, heads, groups, window, section, query_row] = [
            self.batch,
            self.queries,
            self.keys,
            self.heads,
            self.groups,
            self.window.unwrap_or(0),
            section,
            query_row,
        ]
        .map(|size| size as u64);
        [batch, queries, keys, heads, groups, float_word(self.scale), window, section, query_row]
    }

    /// Queries of a block of the backward.
    fn query_block(&self) -> usize {
        if self.size == 128 { 64 } else { 128 }
    }

    /// Operations of one product of queries with the keys that they see (all of a document's, with documents).
    pub(super) fn product(&self) -> f64 {
        let seen =
            |query: usize| (query + 1 + self.keys - self.queries).min(self.window.unwrap_or(self.keys));
        let pairs: usize = (0..self.queries).map(seen).sum();
        2.0 * (self.batch * self.heads * self.size) as f64 * pairs as f64
    }

    /// `y` and the logarithms of the sums.
    fn forward(&self, [q, k, v]: [Heads; 3]) -> [CubeTensor<CudaRuntime>; 2] {
        let y = q.like(q.shape);
        let log_sums = empty(&q.tensor, [self.batch, self.heads, self.queries], DType::F32);
        let multiprocessors = multiprocessors(&q.tensor);
        let tiles = self.queries.div_ceil(TILE) * self.batch * self.heads;
        let kernel = self.kernel(&FORWARD, "attention_forward", 512, forward_bytes(self.size));
        let maps = [&q, &k, &v, &y].map(Heads::map);
        let buffers: Vec<_> = [&log_sums].into_iter().chain(&self.starts).collect();
        let scalars = self.scalars(0);
        let arguments =
            Arguments { maps: &maps, buffers: &buffers, scalars: &scalars, operations: 2.0 * self.product() };
        launch(kernel, [tiles.min(multiprocessors) as u32, 1, 1], arguments);
        drop(maps);
        [y.tensor, log_sums]
    }

    /// The gradients of `q`, `k` and `v`, that of `v` in its place if it has one.
    fn backward(
        &self,
        inputs: [Heads; 3],
        y: &CubeTensor<CudaRuntime>,
        grad: &CubeTensor<CudaRuntime>,
        log_sums: &CubeTensor<CudaRuntime>,
        place: Option<Heads>,
    ) -> [CubeTensor<CudaRuntime>; 3] {
        self.backward_to(inputs, y, grad, log_sums, [None, None, place], None).of
    }

    /// The same, each in its place if it has one, and on through the norm if there is one.
    fn backward_to(
        &self,
        [q, k, v]: [Heads; 3],
        y: &CubeTensor<CudaRuntime>,
        grad: &CubeTensor<CudaRuntime>,
        log_sums: &CubeTensor<CudaRuntime>,
        places: [Option<Heads>; 3],
        norm: Option<&Norm>,
    ) -> Grads {
        // The kernel writes each wherever its rows lie.
        let [grad_q, grad_k, grad_v] = places;
        let grad_q = grad_q.unwrap_or_else(|| q.like(q.shape));
        let [grad_k, grad_v] =
            [(grad_k, &k), (grad_v, &v)].map(|(place, x)| place.unwrap_or_else(|| q.like(x.shape)));
        let block = self.query_block();
        let blocks = self.queries.div_ceil(block);
        let rows = 2 + usize::from(self.starts.is_some());
        let workspace = |last: &[usize], dtype| {
            let shape: Vec<usize> = [&[self.batch, self.heads, blocks], last].concat();
            empty(y, shape, dtype)
        };
        let stats = workspace(&[rows, block], DType::F32);
        let turns = workspace(&[], DType::U32);
        let sums = workspace(&[block, self.size], DType::F32);
        let scalars = self.scalars(grad_q.strides[1]);

        let kernel = self.kernel(&ROWS, "attention_rows", 256, 0);
        let lanes = self.batch * blocks * block * self.heads * (self.size / 8);
        let buffers: Vec<_> =
            [y, grad, log_sums].into_iter().chain(&self.starts).chain([&stats, &turns]).collect();
        let arguments = Arguments { buffers: &buffers, scalars: &scalars, ..Default::default() };
        launch(kernel, [lanes.div_ceil(256) as u32, 1, 1], arguments);

        let mut kernel = self.kernel(&BACKWARD, "attention_backward", 384, backward_bytes(self.size));
        let row = self.heads * self.size;
        let grad = Heads { tensor: grad.clone(), shape: q.shape, strides: [self.queries * row, row] };
        let mut scalars = scalars.to_vec();
        let mut maps: Vec<_> = [&q, &grad, &k, &v, &grad_k, &grad_v].map(Heads::map).into();
        let mut buffers: Vec<_> = self.starts.iter().chain([&stats, &turns, &sums, &grad_q.tensor]).collect();
        let blocks = self.keys.div_ceil(KEY_BLOCK);
        let before = norm.map(|norm| norm.before.clone().map(Heads::of));
        let gain_parts = norm
            .and_then(|norm| norm.gain.as_ref())
            .map(|_| empty(y, [self.batch * blocks, self.heads], DType::F32));
        if let (Some(norm), Some(before)) = (norm, &before) {
            let constants = [("NORM", 1), ("HALF", norm.half()), ("GAIN", norm.gain.is_some().into())];
            kernel.constants.extend(constants.map(|(name, value)| (name, value.to_string())));
            scalars.push(float_word(norm.eps));
            maps.extend(before.iter().map(Heads::map));
            maps.extend(
                norm.tables
                    .iter()
                    .flat_map(|(tables, row)| tables.iter().map(|table| angles_map(table, *row, self.size))),
            );
            buffers.extend(norm.gain.iter().chain(&gain_parts));
        }
        let grid = [blocks, self.groups, self.batch].map(|size| size as u32);
        let operations = 5.0 * self.product();
        // gq may lie apart.
        launch_strided(
            kernel,
            grid,
            Arguments { maps: &maps, buffers: &buffers, scalars: &scalars, operations },
        );
        drop(maps);
        Grads { of: [grad_q, grad_k, grad_v].map(|heads| heads.tensor), gain_parts }
    }
}

/// Cosines or sines as the copy engine reads them, for heads of that size: boxes of half as many columns as those of the
/// heads, in as many bytes.
fn angles_map(table: &CubeTensor<CudaRuntime>, row: usize, size: usize) -> TensorMap<'_> {
    let [positions, half] = [table.meta.shape()[0], table.meta.shape()[1]];
    TensorMap {
        tensor: table,
        shape: vec![1, positions, half],
        strides: vec![positions * row, row, 1],
        tile: vec![1, 64, size.min(64) / 2],
        swizzle: swizzle(size),
        prefetch: TensorMapPrefetch::B256,
    }
}

/// Of a box's rows: as many bytes as they have.
fn swizzle(size: usize) -> TensorMapSwizzle {
    if size == 32 { TensorMapSwizzle::B64 } else { TensorMapSwizzle::B128 }
}

/// Dynamic shared memory of the forward: two tiles of queries, two stages of keys and values.
fn forward_bytes(size: usize) -> usize {
    let keys = if size == 128 { 64 } else { 128 };
    2 * TILE * size * 2 + 2 * 2 * keys * size * 2
}

/// Of the backward: keys and values, two stages of queries and gradients, two of score gradients, a block's sums.
fn backward_bytes(size: usize) -> usize {
    let queries = if size == 128 { 64 } else { 128 };
    2 * KEY_BLOCK * size * 2 + 4 * queries * size * 2 + 2 * KEY_BLOCK * queries * 2 + queries * size * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_packed_projection_are_read_where_they_lie() {
        // Dense; the keys of [b t, (8 + 2 4) 64]; sequences and positions swapped; one sequence, one position.
        assert_eq!(row_strides([2, 7, 8, 64], [3584, 512, 64, 1]), Some([3584, 512]));
        assert_eq!(row_strides([2, 7, 4, 64], [7168, 1024, 64, 1]), Some([7168, 1024]));
        assert_eq!(row_strides([2, 7, 4, 64], [256, 512, 64, 1]), Some([256, 512]));
        assert_eq!(row_strides([1, 7, 4, 64], [3, 256, 64, 1]), Some([1792, 256]));
        assert_eq!(row_strides([3, 1, 1, 32], [64, 5, 7, 1]), Some([64, 32]));
        // Heads apart, channels apart, rows that begin between multiples of 16 bytes, one row for all.
        assert_eq!(row_strides([2, 7, 8, 64], [3584, 64, 448, 1]), None);
        assert_eq!(row_strides([2, 7, 1, 64], [448, 1, 7, 7]), None);
        assert_eq!(row_strides([2, 7, 4, 64], [7 * 260, 260, 64, 1]), None);
        assert_eq!(row_strides([2, 7, 4, 64], [0, 256, 64, 1]), None);
    }

    #[test]
    fn a_block_has_the_shared_memory() {
        assert_eq!([32, 64, 128].map(forward_bytes), [57_344, 114_688, 163_840]);
        assert_eq!([32, 64, 128].map(backward_bytes), [131_072, 196_608, 196_608]);
    }
}
