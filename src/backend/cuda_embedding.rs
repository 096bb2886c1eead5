//! The embedding on NVIDIA GPUs: how `cuda/embedding.cu` is launched.

use super::cuda::Cuda;
use super::cuda_linear::is_addable;
use super::launch_cuda::{Arguments, CudaKernel, element, known_element, launch};
use super::source::Source;
use super::tensor::{LOAD_BYTES, dense, dense_int, empty, load_width, primitive, tensor};
use crate::ops::{EmbeddingOps, Param, embedding};
use burn::tensor::ops::FloatTensorOps;
use burn::tensor::{DType, Int, Tensor};
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;

type Buffer = CubeTensor<CudaRuntime>;

/// `cuda/embedding.cu`.
static EMBEDDING: Source = Source::new("embedding.cu", include_str!("../../cuda/embedding.cu"));

/// Threads of a block that sorts, and of the other kernels; the file's `SORTERS` and `THREADS`.
const SORTERS: usize = 1024;
const THREADS: usize = 256;

/// Places that are summed together, warps that join the parts of an id, and packs of a thread of the forward: the file's
/// `PART`, `SPLITS` and `FETCH`.
const PART: usize = 64;
const SPLITS: usize = 4;
const FETCH: usize = 4;

/// Shared memory that is left to what the kernels have beside their counts.
const BESIDE: usize = 1024;

/// The most tokens of a tile: its counts have 16 bits.
const MOST_OF_TILE: usize = 32 * 1024;

impl EmbeddingOps for Cuda {
    const ONE_HOT_ELEMENTS: usize = 1 << 26;

    fn embed(ids: Tensor<Self, 1, Int>, w: &Param<Self>) -> Tensor<Self, 2> {
        let ([tokens], table) = (ids.dims(), w.compute::<2>());
        let [vocab, columns] = table.dims();
        let (Some(element), true) = (known_element(table.dtype()), takes(&ids, columns)) else {
            return embedding::forward(ids, w);
        };
        let (ids, table) = (dense_int(ids), dense(table));
        let y = empty(&table, [tokens, columns], table.dtype);
        let form = Form { element, width: load_width(&[&table, &y], columns) };
        let sizes = Sizes { tokens, vocab, columns };
        let blocks = (tokens * columns / form.width).div_ceil(THREADS * FETCH);
        form.launch("embedding_forward", [blocks, 1], THREADS, None, &[&ids, &table, &y], &sizes);
        tensor(y)
    }

    fn embed_backward(ids: Tensor<Self, 1, Int>, w: &Param<Self>, grad: Tensor<Self, 2>) {
        let ([tokens], [vocab, columns]) = (ids.dims(), [w.shape()[0], w.shape()[1]]);
        if !w.is_trainable() || tokens == 0 {
            return;
        }
        let sizes = Sizes { tokens, vocab, columns };
        let most = primitive(grad.clone()).client.properties().hardware.max_shared_memory_size;
        let shared = most - BESIDE;
        let fits = takes(&ids, columns) && vocab > 0 && sizes.places() <= shared && vocab * columns < 1 << 31;
        let (Some(element), true) = (known_element(grad.dtype()), fits) else {
            return embedding::backward(ids, w, grad);
        };
        assert_eq!(grad.dims(), [tokens, columns], "a gradient for each token");
        let (ids, grad) = (dense_int(ids), dense(grad));
        let (starts, order) = sorted(&ids, &sizes, shared);
        Param::accumulate_with([w], |[sum]| {
            // In place where nobody else holds it.
            let (own, other) = match sum {
                Some(sum) if is_addable(&sum) => (Some(sum), None),
                other => (None, other),
            };
            let sums = summed(&starts, &order, &grad, own, element, &sizes);
            [match other {
                Some(other) => Self::float_add(other, sums),
                None => sums,
            }]
        });
    }
}

/// The sums of each id's rows, added into `to` if it is there: `[vocab, columns]`.
fn summed(
    starts: &Buffer,
    order: &Buffer,
    grad: &Buffer,
    to: Option<Buffer>,
    element: &'static str,
    sizes: &Sizes,
) -> Buffer {
    let Sizes { tokens, vocab, columns } = *sizes;
    let add = Some(("ADD", usize::from(to.is_some())));
    let to = to.unwrap_or_else(|| empty(grad, [vocab, columns], DType::F32));
    let form = Form { element, width: load_width(&[grad], columns) };
    let (packs, parts) = (columns / form.width, tokens.div_ceil(PART));
    let edges = empty(grad, [2 * parts, columns], DType::F32);
    let blocks = (parts * packs).div_ceil(THREADS);
    form.launch("embedding_sums", [blocks, 1], THREADS, add, &[order, starts, grad, &to, &edges], sizes);
    let blocks = (vocab * packs).div_ceil(32);
    form.launch("embedding_join", [blocks, 1], 32 * SPLITS, add, &[starts, &edges, &to], sizes);
    to
}

/// The tokens by their ids: the number of tokens of smaller ids for each id, and `(token, id)` in that order.
fn sorted(ids: &Buffer, sizes: &Sizes, shared: usize) -> (Buffer, Buffer) {
    let words = |count: usize| empty(ids, [count], DType::U32);
    let (tiles, pairs) = (sizes.tiles(), sizes.pairs());
    let (ranks, counts) = (words(sizes.tokens), words(tiles * pairs));
    let (starts, order) = (words(sizes.vocab + 1), words(2 * sizes.tokens));
    // Of which these kernels have nothing.
    let form = Form { element: element(DType::F32), width: 1 };
    let counting = Some(("COUNTING", sizes.counting(shared)));
    form.launch("embedding_count", [tiles, 1], SORTERS, counting, &[ids, &ranks, &counts], sizes);
    let blocks = sizes.tile().div_ceil(sizes.span());
    let buffers = [ids, &ranks, &counts, &starts, &order];
    form.launch("embedding_order", [blocks, tiles], SORTERS, None, &buffers, sizes);
    (starts, order)
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
    /// Tiles of tokens, if their bound allows: each block of `embedding_order` reads the counts of all.
    fn most_tiles(&self) -> usize {
        if self.vocab <= 4096 { 16 } else { 8 }
    }

    /// Tokens of a tile: whole rounds of a block.
    fn tile(&self) -> usize {
        (SORTERS * self.tokens.div_ceil(SORTERS * self.most_tiles())).min(MOST_OF_TILE)
    }

    fn tiles(&self) -> usize {
        self.tokens.div_ceil(self.tile())
    }

    /// Tokens of a block of `embedding_order`: whole rounds of it, such that there are some 64 blocks or more.
    fn span(&self) -> usize {
        SORTERS * (self.tile() / SORTERS).div_ceil(64 / self.most_tiles())
    }

    /// Ids, two at a time.
    fn pairs(&self) -> usize {
        self.vocab.div_ceil(2)
    }

    /// Shared memory for a place of each id.
    fn places(&self) -> usize {
        2 * self.pairs() * 4
    }

    /// Warps of a block that count, each with counts of its own: a power of two, as many as fit into `shared` bytes.
    fn counting(&self, shared: usize) -> usize {
        let fits = |warps: &usize| warps * self.pairs() * 4 <= shared;
        [32, 16, 8, 4, 2].into_iter().find(fits).unwrap_or(1)
    }

    /// Dynamic shared memory of a kernel.
    fn shared_bytes(&self, entry: &str, counting: usize) -> usize {
        match entry {
            "embedding_count" => counting * self.pairs() * 4,
            "embedding_order" => self.places(),
            _ => 0,
        }
    }
}

/// A kernel's element type, and elements of one load of it.
struct Form {
    element: &'static str,
    width: usize,
}

impl Form {
    /// `constant`: what the entry is compiled for beside that.
    fn launch(
        &self,
        entry: &'static str,
        [x, y]: [usize; 2],
        block: usize,
        constant: Option<(&'static str, usize)>,
        buffers: &[&Buffer],
        sizes: &Sizes,
    ) {
        debug_assert!(self.width <= LOAD_BYTES / 2);
        let mut constants = vec![("ELEMENT", self.element.to_string()), ("WIDTH", self.width.to_string())];
        constants.extend(constant.map(|(name, value)| (name, value.to_string())));
        let shared_bytes = sizes.shared_bytes(entry, constant.map_or(0, |(_, value)| value));
        let kernel = CudaKernel { source: &EMBEDDING, entry, constants, block: block as u32, shared_bytes };
        let Sizes { tokens, vocab, columns } = *sizes;
        let scalars =
            [tokens, vocab, columns, sizes.tile(), sizes.tiles(), sizes.span()].map(|size| size as u64);
        let arguments = Arguments { buffers, scalars: &scalars, ..Default::default() };
        launch(kernel, [x as u32, y as u32, 1], arguments);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_tokens_within_their_bounds() {
        for tokens in [1, 1023, 1024, 1025, 65_536, 131_072, 131_073, 1 << 20, 3_000_001] {
            for vocab in [1, 1024, 8192] {
                let sizes = Sizes { tokens, vocab, columns: 1 };
                let (tile, tiles, span) = (sizes.tile(), sizes.tiles(), sizes.span());
                let most = sizes.most_tiles().max(tokens.div_ceil(MOST_OF_TILE));
                assert!(tiles <= most && tile.is_multiple_of(SORTERS), "{tokens}: {tiles} of {tile}");
                assert!(tile * tiles >= tokens && tile * (tiles - 1) < tokens, "{tokens}: {tiles} of {tile}");
                assert!(
                    tile <= MOST_OF_TILE && span.is_multiple_of(SORTERS) && span <= tile,
                    "{tokens}: {span}"
                );
            }
        }
        let baseline = Sizes { tokens: 65_536, vocab: 1024, columns: 512 };
        assert_eq!((baseline.tile(), baseline.tiles(), baseline.span()), (4096, 16, 1024));
    }

    #[test]
    fn as_many_warps_count_as_have_room() {
        let counting = |vocab| Sizes { tokens: 1, vocab, columns: 1 }.counting(226 * 1024);
        assert_eq!([1, 1024, 8192, 50_257, 57_000].map(counting), [32, 32, 8, 2, 2]);
        assert_eq!(Sizes { tokens: 1, vocab: 7, columns: 1 }.shared_bytes("embedding_count", 4), 64);
    }

    #[test]
    fn the_sizes_are_the_file_s() {
        for (name, size) in
            [("SORTERS", SORTERS), ("THREADS", THREADS), ("PART", PART), ("SPLITS", SPLITS), ("FETCH", FETCH)]
        {
            let line = format!("#define {name} {size}");
            assert!(
                EMBEDDING.text().lines().any(|have| have.split(" //").next().unwrap().trim() == line),
                "{line}"
            );
        }
    }
}
