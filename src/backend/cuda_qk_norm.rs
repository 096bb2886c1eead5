//! Norm, rotation and gain of queries and keys: how `cuda/qk_norm.cu` is launched. bf16 or f32; q and k in one launch.

use super::cuda::Cuda;
use super::launch_cuda::{
    Arguments, CudaKernel, element, float_word, known_element, launch_strided, multiprocessors,
};
use super::source::Source;
use super::tensor::{LOAD_BYTES, begins_at, copied, dense, empty, primitive, tensor};
use super::views::{layout, pitch};
use crate::ops::QkNormOps;
use crate::ops::qk_norm::{self, QkNorm};
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/qk_norm.cu`.
static QK_NORM: Source = Source::new("qk_norm.cu", include_str!("../../cuda/qk_norm.cu"));

/// Threads of a block; blocks of the backward that a multiprocessor holds.
const THREADS: usize = 256;
const RESIDENT: usize = 2;

/// Pairs of channels that a thread holds at most.
const MOST_PAIRS: usize = 8;

impl QkNormOps for Cuda {
    fn qk_norm(q: Tensor<Self, 2>, k: Tensor<Self, 2>, how: &QkNorm<Self>) -> [Tensor<Self, 4>; 2] {
        let Some(call) = Call::new(&q, &k, how) else { return qk_norm::forward(q, k, how) };
        let width = call.spread.width;
        call.forward([q, k].map(|x| Rows::new(x, width))).map(tensor)
    }

    fn qk_norm_backward(
        q: Tensor<Self, 2>,
        k: Tensor<Self, 2>,
        grads: [Tensor<Self, 4>; 2],
        how: &QkNorm<Self>,
    ) -> [Tensor<Self, 2>; 2] {
        let [of_q, of_k] = &grads;
        match backward_into(&q, &k, [of_q, of_k], how, None) {
            Some(grads) => grads.map(tensor),
            None => qk_norm::backward(q, k, grads, how),
        }
    }
}

/// [`QkNormOps::qk_norm_backward`] by the kernel, if it takes these; the gradients into the places given, whose rows may
/// lie apart.
pub(super) fn backward_into(
    q: &Tensor<Cuda, 2>,
    k: &Tensor<Cuda, 2>,
    grads: [&Tensor<Cuda, 4>; 2],
    how: &QkNorm<Cuda>,
    places: Option<[CubeTensor<CudaRuntime>; 2]>,
) -> Option<[CubeTensor<CudaRuntime>; 2]> {
    let call = Call::new(q, k, how)?;
    let (dtype, width) = (q.dtype(), call.spread.width);
    let places = match places {
        Some([q, k]) => Some([Rows::at(q, width)?, Rows::at(k, width)?]),
        None => None,
    };
    let grads = grads.map(|grad| if grad.dtype() == dtype { grad.clone() } else { grad.clone().cast(dtype) });
    let inputs = call.rows([q, k]);
    let (grads, partials) = call.backward(inputs, grads.map(|grad| Rows::of_heads(grad, width)), places);
    if let (Some(gain), Some(partials)) = (&how.gain, partials)
        && gain.is_trainable()
    {
        gain.accumulate::<1>(tensor(call.gain_grad(&partials)));
    }
    Some(grads)
}

/// A row for each token, so many elements apart.
pub(super) struct Rows {
    pub tensor: CubeTensor<CudaRuntime>,
    pub stride: usize,
}

impl Rows {
    /// `[n, c]`, where it lies or as a dense copy, so that every row begins at a multiple of so many elements.
    fn new(x: Tensor<Cuda, 2>, elements: usize) -> Self {
        let columns = x.dims()[1];
        let x = primitive(x);
        Self::at(x.clone(), elements).unwrap_or_else(|| Self { tensor: copied(x), stride: columns })
    }

    /// `[n, c]` where it lies, if every row begins at a multiple of so many elements.
    fn at(x: CubeTensor<CudaRuntime>, elements: usize) -> Option<Self> {
        let stride = pitch(&x);
        Self::beginning_at(elements, x, stride)
    }

    /// `[b, t, h, d]` as rows `[b t, h d]`, likewise.
    fn of_heads(x: Tensor<Cuda, 4>, elements: usize) -> Self {
        let x = primitive(x);
        let (shape, strides) = layout(&x);
        let rows = Self::beginning_at(elements, x.clone(), token_stride(shape, strides));
        rows.unwrap_or_else(|| Self { tensor: copied(x), stride: shape[2] * shape[3] })
    }

    fn beginning_at(elements: usize, tensor: CubeTensor<CudaRuntime>, stride: Option<usize>) -> Option<Self> {
        let starts = begins_at(&tensor, elements * tensor.elem_size());
        let stride = stride.filter(|stride| starts && stride.is_multiple_of(elements))?;
        Some(Self { tensor, stride })
    }
}

/// From one token of `[b, t, h, d]` to the next, if it is the same everywhere and a token's heads are one row.
fn token_stride([batch, time, heads, size]: [usize; 4], strides: [usize; 4]) -> Option<usize> {
    let are_rows = (size == 1 || strides[3] == 1) && (heads == 1 || strides[2] == size);
    let stride = match (batch, time) {
        (1, 1) => heads * size,
        (_, 1) => strides[0],
        _ => strides[1],
    };
    (are_rows && (batch == 1 || time == 1 || strides[0] == time * stride)).then_some(stride)
}

/// How a head is spread over threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spread {
    /// Neighbouring pairs of channels of one load.
    width: usize,
    /// Threads that share a head.
    lanes: usize,
    /// Loads of one thread.
    chunks: usize,
}

impl Spread {
    /// Of a head of `size` channels whose first `2 half` rotate, with loads of at most `widest` channels.
    fn new(size: usize, half: usize, widest: usize) -> Self {
        let rest = size / 2 - half;
        let fits = |width: &usize| half.is_multiple_of(*width) && rest.is_multiple_of(*width);
        let width = [8, 4, 2, 1].into_iter().filter(|width| *width <= widest).find(fits).unwrap_or(1);
        let loads = (size / 2).div_ceil(width);
        let lanes = loads.next_power_of_two().min(32);
        Self { width, lanes, chunks: loads.div_ceil(lanes).next_power_of_two() }
    }

    /// Heads of one block.
    fn slots(self) -> usize {
        THREADS / self.lanes
    }
}

/// Sizes and tables of a call that the kernels take.
pub(super) struct Call {
    tokens: usize,
    time: usize,
    heads: usize,
    groups: usize,
    size: usize,
    half: usize,
    spread: Spread,
    dtype: DType,
    pub eps: f32,
    /// Cosines and sines, as far apart in both; none where nothing rotates.
    pub tables: Option<[Rows; 2]>,
    pub gain: Option<CubeTensor<CudaRuntime>>,
}

impl Call {
    pub fn new(q: &Tensor<Cuda, 2>, k: &Tensor<Cuda, 2>, how: &QkNorm<Cuda>) -> Option<Self> {
        let ([tokens, width], dtype) = (q.dims(), q.dtype());
        let (heads, groups, half) = (how.heads, how.groups, how.rope.rotated() / 2);
        let size = width / heads.max(1);
        let gain = how.gain.as_ref().map(|gain| gain.compute::<1>());
        let fits = known_element(dtype).is_some()
            && k.dtype() == dtype
            && gain.as_ref().is_none_or(|gain| gain.dtype() == dtype)
            && (1..1 << 30).contains(&tokens)
            && heads.min(groups) > 0
            && size >= 2
            && size.is_multiple_of(2)
            && 2 * half <= size
            && k.dims()[1] == groups * size;
        if !fits {
            return None;
        }
        // A place of a block for each head.
        let spread = Spread::new(size, half, LOAD_BYTES / dtype.size());
        if spread.chunks * spread.width > MOST_PAIRS || heads.max(groups) > spread.slots() {
            return None;
        }
        let table = |x: &Tensor<Cuda, 2>| {
            let x = if x.dtype() == DType::F32 { x.clone() } else { x.clone().cast(DType::F32) };
            Rows::new(x, spread.width.min(4))
        };
        let tables = (half > 0).then(|| [table(&how.rope.cos), table(&how.rope.sin)]);
        let tables = match tables {
            Some([cos, sin]) if cos.stride != sin.stride => {
                Some([cos, sin].map(|x| Rows { tensor: copied(x.tensor), stride: half }))
            }
            tables => tables,
        };
        Some(Self {
            tokens,
            time: tokens / how.batch,
            heads,
            groups,
            size,
            half,
            spread,
            dtype,
            eps: how.eps as f32,
            tables,
            gain: gain.map(dense),
        })
    }

    /// q and k as the kernels read them.
    pub fn rows(&self, inputs: [&Tensor<Cuda, 2>; 2]) -> [Rows; 2] {
        inputs.map(|x| Rows::new(x.clone(), self.spread.width))
    }

    fn kernel(&self, entry: &'static str, block: usize) -> CudaKernel {
        let number = |n: usize| n.to_string();
        let constants = vec![
            ("ELEMENT", element(self.dtype).to_string()),
            ("HEAD", number(self.size)),
            ("HALF", number(self.half)),
            ("WIDTH", number(self.spread.width)),
            ("LANES", number(self.spread.lanes)),
            ("CHUNKS", number(self.spread.chunks)),
            ("GAIN", number(self.gain.is_some().into())),
        ];
        CudaKernel { source: &QK_NORM, entry, constants, block: block as u32, shared_bytes: 0 }
    }

    /// The scalars of all kernels; the strides are those of x, of y or gy, and of gx.
    fn scalars(&self, q_blocks: usize, q: [usize; 3], k: [usize; 3]) -> Vec<u64> {
        let table_row = self.tables.as_ref().map_or(0, |[cos, _]| cos.stride);
        let mut words: Vec<u64> = [self.tokens, self.time].map(|size| size as u64).to_vec();
        words.push(float_word(self.eps));
        words.extend([q_blocks, table_row].map(|size| size as u64));
        for (heads, strides) in [(self.heads, q), (self.groups, k)] {
            words.push(heads as u64);
            words.extend(strides.map(|stride| stride as u64));
        }
        words
    }

    /// Launches the forward or the backward: `inputs`, the tables, the gain, `outputs`.
    fn launch(
        &self,
        kernel: CudaKernel,
        blocks: [usize; 2],
        scalars: &[u64],
        inputs: &[&CubeTensor<CudaRuntime>],
        outputs: &[&CubeTensor<CudaRuntime>],
    ) {
        // Where nothing rotates the tables are never read.
        let tables = match &self.tables {
            Some([cos, sin]) => [&cos.tensor, &sin.tensor],
            None => [inputs[0]; 2],
        };
        let buffers: Vec<_> = inputs.iter().copied().chain(tables).chain(&self.gain).collect();
        let buffers: Vec<_> = buffers.into_iter().chain(outputs.iter().copied()).collect();
        let grid = [(blocks[0] + blocks[1]) as u32, 1, 1];
        launch_strided(kernel, grid, Arguments { buffers: &buffers, scalars, ..Default::default() });
    }

    fn forward(&self, [q, k]: [Rows; 2]) -> [CubeTensor<CudaRuntime>; 2] {
        let batch = self.tokens / self.time;
        let [q_out, k_out] = [self.heads, self.groups].map(|heads| Rows {
            tensor: empty(&q.tensor, [batch, self.time, heads, self.size], self.dtype),
            stride: heads * self.size,
        });
        let blocks = [self.heads, self.groups].map(|heads| self.tokens.div_ceil(self.spread.slots() / heads));
        let scalars = self.scalars(blocks[0], [q.stride, q_out.stride, 0], [k.stride, k_out.stride, 0]);
        let kernel = self.kernel("qk_norm_forward", THREADS);
        let outputs = [&q_out.tensor, &k_out.tensor];
        self.launch(kernel, blocks, &scalars, &[&q.tensor, &k.tensor], &outputs);
        [q_out.tensor, k_out.tensor]
    }

    /// The gradients of `q` and `k`, in their places if they have some, and the blocks' parts `[blocks, heads]` of the gain's where there is one.
    fn backward(
        &self,
        [q, k]: [Rows; 2],
        [q_grad, k_grad]: [Rows; 2],
        places: Option<[Rows; 2]>,
    ) -> ([CubeTensor<CudaRuntime>; 2], Option<CubeTensor<CudaRuntime>>) {
        // The kernel writes each wherever its rows lie.
        let [q_out, k_out] = places.unwrap_or_else(|| {
            [self.heads, self.groups].map(|heads| Rows {
                tensor: empty(&q.tensor, [self.tokens, heads * self.size], self.dtype),
                stride: heads * self.size,
            })
        });
        let resident = RESIDENT * multiprocessors(&q.tensor);
        let rounds = [self.heads, self.groups].map(|heads| self.tokens.div_ceil(self.spread.slots() / heads));
        let blocks = share(resident, rounds);
        let scalars = self.scalars(
            blocks[0],
            [q.stride, q_grad.stride, q_out.stride],
            [k.stride, k_grad.stride, k_out.stride],
        );
        let partials = self.gain.as_ref().map(|_| empty(&q.tensor, [blocks[0], self.heads], DType::F32));
        let kernel = self.kernel("qk_norm_backward", THREADS);
        let inputs = [&q, &k, &q_grad, &k_grad].map(|rows| &rows.tensor);
        let outputs: Vec<_> = [&q_out.tensor, &k_out.tensor].into_iter().chain(&partials).collect();
        self.launch(kernel, blocks, &scalars, &inputs, &outputs);
        ([q_out.tensor, k_out.tensor], partials)
    }

    /// The gain's gradient from its parts `[parts, heads]`.
    pub fn gain_grad(&self, partials: &CubeTensor<CudaRuntime>) -> CubeTensor<CudaRuntime> {
        let grad = empty(partials, [self.heads], DType::F32);
        let scalars = self.scalars(partials.meta.shape()[0], [0; 3], [0; 3]);
        let kernel = self.kernel("qk_norm_gain", 32);
        let buffers = [partials, &grad];
        let arguments = Arguments { buffers: &buffers, scalars: &scalars, ..Default::default() };
        launch_strided(kernel, [self.heads as u32, 1, 1], arguments);
        grad
    }
}

/// Blocks for q and for k: as many as are resident, shared out by the rounds that each has to do, never more than those.
fn share(resident: usize, [q, k]: [usize; 2]) -> [usize; 2] {
    let of_q = (resident * q / (q + k)).clamp(1, resident - 1);
    [of_q.min(q), (resident - of_q).min(k)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_covers_the_head_in_whole_loads() {
        for size in (2..=512).step_by(2) {
            for half in 0..=size / 2 {
                for widest in [1, 2, 4, 8] {
                    let spread = Spread::new(size, half, widest);
                    let Spread { width, lanes, chunks } = spread;
                    assert!(half.is_multiple_of(width) && (size / 2 - half).is_multiple_of(width));
                    assert!(
                        width <= widest && lanes * chunks * width >= size / 2,
                        "{size} {half} {spread:?}"
                    );
                    assert!(lanes.is_power_of_two() && lanes <= 32 && chunks * width <= MOST_PAIRS);
                }
            }
        }
    }

    #[test]
    fn the_compile_check_tries_the_forms_of_the_recipes_heads() {
        let variants: Vec<&str> = QK_NORM.variants().collect();
        for (element, bytes, size, half) in [
            ("__nv_bfloat16", 2, 64, 32),
            ("__nv_bfloat16", 2, 64, 8),
            ("__nv_bfloat16", 2, 64, 0),
            ("__nv_bfloat16", 2, 128, 64),
            ("float", 4, 64, 32),
        ] {
            let Spread { width, lanes, chunks } = Spread::new(size, half, LOAD_BYTES / bytes);
            let form = format!(
                "-DELEMENT={element} -DHEAD={size} -DHALF={half} -DWIDTH={width} -DLANES={lanes} -DCHUNKS={chunks} -DGAIN=1"
            );
            assert!(variants.contains(&form.as_str()), "{form} is not among {variants:?}");
        }
        assert!(QK_NORM.text().contains(&format!("#define THREADS {THREADS}\n")));
        assert!(QK_NORM.text().contains(&format!("#define RESIDENT {RESIDENT}\n")));
    }

    #[test]
    fn both_get_blocks_and_none_without_a_round() {
        assert_eq!(share(264, [8192, 4096]), [176, 88]);
        for (q, k) in [(1, 1), (1, 1000), (1000, 1), (3, 7), (100_000, 1)] {
            let [of_q, of_k] = share(264, [q, k]);
            assert!((1..=q).contains(&of_q) && (1..=k).contains(&of_k) && of_q + of_k <= 264, "{q} {k}");
        }
    }

    #[test]
    fn tokens_of_heads_are_rows() {
        assert_eq!(token_stride([2, 7, 8, 64], [3584, 512, 64, 1]), Some(512));
        assert_eq!(token_stride([2, 7, 4, 64], [7168, 1024, 64, 1]), Some(1024));
        assert_eq!(token_stride([3, 1, 4, 64], [999, 5, 64, 1]), Some(999));
        assert_eq!(token_stride([1, 1, 4, 64], [9, 5, 64, 1]), Some(256));
        assert_eq!(token_stride([2, 7, 4, 64], [256, 512, 64, 1]), None);
        assert_eq!(token_stride([2, 7, 8, 64], [3584, 64, 448, 1]), None);
    }
}
