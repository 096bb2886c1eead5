//! The embedding on NVIDIA GPUs: how `cuda/embedding.cu` is launched.

use super::cuda::Cuda;
use super::launch_cuda::{Arguments, CudaKernel, launch};
use super::source::Source;
use super::tensor::{LOAD_BYTES, dense, dense_int, empty, load_width, tensor};
use crate::ops::{EmbeddingOps, Param, embedding};
use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

/// `cuda/embedding.cu`.
static EMBEDDING: Source = Source::new("embedding.cu", include_str!("../../cuda/embedding.cu"));

/// Threads of a block: that counts a tile, and of the other kernels; the file's `COUNTERS` and `THREADS`.
const COUNTERS: usize = 1024;
const THREADS: usize = 256;

/// Ids of an element of `wide`, places that are summed together, and packs of a thread of the forward: the file's `BIN`,
/// `PART` and `FETCH`.
const BIN: usize = 256;
const PART: usize = 64;
const FETCH: usize = 4;

/// The most tiles of tokens: a thread walks over all of them.
const TILES: usize = 128;

/// The most ids that one block can count in its shared memory of 227 KB.
const COUNTED: usize = 56 * 1024;

impl EmbeddingOps for Cuda {
    const ONE_HOT_ELEMENTS: usize = 1 << 26;

    fn embed(ids: Tensor<Self, 1, Int>, w: &Param<Self>) -> Tensor<Self, 2> {
        let ([tokens], table) = (ids.dims(), w.compute::<2>());
        let [vocab, columns] = table.dims();
        let (Some(element), true) = (element(table.dtype()), takes(&ids, columns)) else {
            return embedding::forward(ids, w);
        };
        let (ids, table) = (dense_int(ids), dense(table));
        let y = empty(&table, [tokens, columns], table.dtype);
        let form = Form { element, width: load_width(&[&table, &y], columns) };
        let sizes = Sizes { tokens, vocab, columns };
        let blocks = (tokens * columns / form.width).div_ceil(THREADS * FETCH);
        form.launch("embedding_forward", blocks, &[&ids, &table, &y], &sizes);
        tensor(y)
    }

    fn embed_backward(ids: Tensor<Self, 1, Int>, w: &Param<Self>, grad: Tensor<Self, 2>) {
        let ([tokens], [vocab, columns]) = (ids.dims(), [w.shape()[0], w.shape()[1]]);
        if !w.is_trainable() || tokens == 0 {
            return;
        }
        let fits = takes(&ids, columns) && (1..=COUNTED).contains(&vocab) && vocab * columns < 1 << 31;
        let (Some(element), true) = (element(grad.dtype()), fits) else {
            return embedding::backward(ids, w, grad);
        };
        assert_eq!(grad.dims(), [tokens, columns], "a gradient for each token");
        let (ids, grad) = (dense_int(ids), dense(grad));
        let sizes = Sizes { tokens, vocab, columns };
        let words = |count: usize| empty(&grad, [count], DType::U32);
        let floats = |shape: [usize; 2]| empty(&grad, shape, DType::F32);
        let (tiles, parts) = (sizes.tiles(), tokens.div_ceil(PART));
        let (ranks, counts) = (words(tokens), words(tiles * vocab));
        let (wide, starts, order) = (words(tiles * vocab.div_ceil(BIN)), words(vocab + 1), words(2 * tokens));
        let (grad_w, edges) = (floats([vocab, columns]), floats([2 * parts, columns]));

        let sums = Form { element, width: load_width(&[&grad], columns) };
        let joins = Form { element: "float", width: load_width(&[&grad_w], columns) };
        joins.launch("embedding_count", tiles, &[&ids, &ranks, &counts, &wide], &sizes);
        joins.launch("embedding_starts", vocab.div_ceil(BIN), &[&counts, &wide, &starts], &sizes);
        let blocks = tokens.div_ceil(THREADS);
        joins.launch("embedding_order", blocks, &[&ids, &ranks, &counts, &starts, &order], &sizes);
        let blocks = (parts * (columns / sums.width)).div_ceil(THREADS);
        sums.launch("embedding_sums", blocks, &[&order, &starts, &grad, &grad_w, &edges], &sizes);
        let blocks = (vocab * (columns / joins.width)).div_ceil(THREADS);
        joins.launch("embedding_join", blocks, &[&starts, &edges, &grad_w], &sizes);
        w.accumulate::<2>(tensor(grad_w));
    }
}

/// The kernels' element type for a tensor's.
fn element(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::BF16 => Some("__nv_bfloat16"),
        DType::F32 => Some("float"),
        _ => None,
    }
}

/// Whether the kernels, which count rows' elements in 32 bits, take so many.
fn takes(ids: &Tensor<Cuda, 1, Int>, columns: usize) -> bool {
    let tokens = ids.dims()[0];
    ids.dtype() == DType::I32 && tokens > 0 && columns > 0 && tokens * columns < 1 << 31
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    tokens: usize,
    vocab: usize,
    columns: usize,
}

impl Sizes {
    /// Tokens of a tile: as many rounds of a block as keep the number of tiles within its bound.
    fn tile(&self) -> usize {
        COUNTERS * self.tokens.div_ceil(COUNTERS * TILES)
    }

    fn tiles(&self) -> usize {
        self.tokens.div_ceil(self.tile())
    }
}

/// A kernel's element type, and elements of one load of it.
struct Form {
    element: &'static str,
    width: usize,
}

impl Form {
    fn launch(
        &self,
        entry: &'static str,
        blocks: usize,
        buffers: &[&CubeTensor<CudaRuntime>],
        sizes: &Sizes,
    ) {
        debug_assert!(self.width <= LOAD_BYTES / 2);
        let constants = vec![("ELEMENT", self.element.to_string()), ("WIDTH", self.width.to_string())];
        let (block, shared_bytes) =
            if entry == "embedding_count" { (COUNTERS, 4 * sizes.vocab) } else { (THREADS, 0) };
        let kernel = CudaKernel { source: &EMBEDDING, entry, constants, block: block as u32, shared_bytes };
        let scalars =
            [sizes.tokens, sizes.vocab, sizes.columns, sizes.tile(), sizes.tiles()].map(|size| size as u64);
        let arguments = Arguments { buffers, scalars: &scalars, ..Default::default() };
        launch(kernel, [blocks as u32, 1, 1], arguments);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_tokens_within_their_bound() {
        for tokens in [1, 1023, 1024, 1025, 65_536, 131_072, 131_073, 1 << 20, 3_000_001] {
            let sizes = Sizes { tokens, vocab: 1, columns: 1 };
            let (tile, tiles) = (sizes.tile(), sizes.tiles());
            assert!(tiles <= TILES && tile.is_multiple_of(COUNTERS), "{tokens}: {tiles} of {tile}");
            assert!(tile * tiles >= tokens && tile * (tiles - 1) < tokens, "{tokens}: {tiles} of {tile}");
        }
    }

    #[test]
    fn the_sizes_are_the_file_s() {
        for (name, size) in
            [("COUNTERS", COUNTERS), ("THREADS", THREADS), ("BIN", BIN), ("PART", PART), ("FETCH", FETCH)]
        {
            let line = format!("#define {name} {size}");
            assert!(
                EMBEDDING.text().lines().any(|have| have.split(" //").next().unwrap().trim() == line),
                "{line}"
            );
        }
    }
}
