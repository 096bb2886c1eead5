// Token embedding, and its gradient by sorted segments (src/ops/embedding.rs).
//
//   forward    y[n, c] = w[id[n], c]
//   backward  gw[v, c] = sum over n with id[n] = v of gy[n, c]
//
// The backward sorts the tokens by id, those of one id staying in order, and adds up the sorted rows. Entries:
//   embedding_forward  the rows of the table
//   embedding_count    for each tile of tokens: ranks[n], how many of the tile's tokens before n have its id;
//                      counts[tile, v], and wide[tile, v / 256] the same over 256 ids
//   embedding_starts   counts[tile, v] becomes the number of tokens of v before the tile; starts[v], the number of
//                      tokens of ids below v; starts[vocab], of all
//   embedding_order    order[place] = (n, id): tokens of id v at places starts[v] to starts[v + 1], n ascending
//   embedding_sums     each PART places of the order, summed id by id: ids that lie within one part go to gw. Where an
//                      id goes on from the part before, or only into the next, the sum goes to edges[part, 0 or 1]
//   embedding_join     the sums of ids that lie in several parts, by part; zeros for ids that no token has
//
// Layout: w, y and gy are dense row-major [vocab, c], [n, c] and [n, c] of ELEMENT, gw is [vocab, c] and edges
// [parts, 2, c] of f32. WIDTH divides c, and rows start at multiples of WIDTH elements' bytes. ids are i32.
// Grid: one dimension. count: a block of 1024 threads a tile of `tile` tokens, with vocab words of shared memory;
// starts: a block of 256 a 256 ids; the others: 256 threads a block, a thread taking FETCH packs of WIDTH elements of y;
// a token; a pack of a part; a pack of an id.
// Invariants: every element of y and gw is written exactly once. The parts have a fixed length, so that an id that is
// a large share of all tokens is no longer work than others. A token with an id outside the table gets NaN, and its
// gradient is left out.
// Numerics: f32. The order of every sum follows from the ids alone: tokens ascending within a part, then parts
// ascending. No atomics: equal bits every time.
//
// The launcher (src/backend/cuda_embedding.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1
// variant: -DELEMENT=float -DWIDTH=4
// variant: -DELEMENT=float -DWIDTH=1

#include <cuda_bf16.h>

typedef unsigned long long u64;
typedef unsigned int u32;

#define THREADS 256
#define COUNTERS 1024 // threads that count a tile
#define BIN 256       // ids of an element of `wide`
#define PART 64       // places of the order that are summed together
#define BATCH 8       // loads in flight a thread
#define FETCH 4       // packs of a thread of the forward
#define ALL 0xffffffffu

struct Scalars {
    u64 tokens, vocab, columns;
    u64 tile, tiles; // tokens of a tile, and how many tiles
};

struct alignas(sizeof(ELEMENT) * WIDTH) Pack {
    ELEMENT at[WIDTH];
};
struct alignas(WIDTH > 1 ? 16 : 4) Sums {
    float at[WIDTH];
};

__device__ __forceinline__ void add(Sums &sums, const Pack &pack) {
#pragma unroll
    for (int j = 0; j < WIDTH; j++) sums.at[j] += (float)pack.at[j];
}

__device__ __forceinline__ void add(Sums &sums, const Sums &others) {
#pragma unroll
    for (int j = 0; j < WIDTH; j++) sums.at[j] += others.at[j];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_forward(const int *__restrict__ ids, const ELEMENT *__restrict__ w, ELEMENT *__restrict__ y,
                      const __grid_constant__ Scalars s) {
    const u32 packs = (u32)(s.columns / WIDTH), total = (u32)s.tokens * packs;
    const u32 first = blockIdx.x * (THREADS * FETCH) + threadIdx.x;
    const Pack *table = reinterpret_cast<const Pack *>(w);
    Pack some[FETCH];
#pragma unroll
    for (int k = 0; k < FETCH; k++) {
        const u32 at = first + k * THREADS;
        if (at >= total) break;
        const u32 token = at / packs, id = (u32)ids[token];
        if (id < s.vocab) {
            some[k] = table[(u64)id * packs + (at - token * packs)];
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) some[k].at[j] = (ELEMENT)__int_as_float(0x7fffffff);
        }
    }
#pragma unroll
    for (int k = 0; k < FETCH; k++) {
        const u32 at = first + k * THREADS;
        if (at < total) reinterpret_cast<Pack *>(y)[at] = some[k];
    }
}

extern "C" __global__ void __launch_bounds__(COUNTERS)
    embedding_count(const int *__restrict__ ids, u32 *__restrict__ ranks, u32 *__restrict__ counts,
                    u32 *__restrict__ wide, const __grid_constant__ Scalars s) {
    extern __shared__ u32 seen[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 vocab = (u32)s.vocab, bins = (vocab + BIN - 1) / BIN;
    for (u32 v = threadIdx.x; v < vocab; v += COUNTERS) seen[v] = 0;
    __syncthreads();
    const u64 first = blockIdx.x * s.tile, last = min(first + s.tile, s.tokens);
    for (u64 start = first; start < last; start += COUNTERS) {
        const u64 token = start + threadIdx.x;
        const int id = token < last ? ids[token] : -1;
        const bool counts_in = (u32)id < vocab;
        const u32 same = __match_any_sync(ALL, id);
        const int leader = __ffs(same) - 1;
        u32 rank = __popc(same & ((1u << lane) - 1));
        // The warps one after the other, as the tokens are.
        for (int turn = 0; turn < COUNTERS / 32; turn++) {
            if (turn == warp) {
                u32 before = 0;
                if (counts_in && lane == leader) {
                    before = seen[id];
                    seen[id] = before + __popc(same);
                }
                rank += __shfl_sync(ALL, before, leader);
            }
            __syncthreads();
        }
        if (counts_in) ranks[token] = rank;
    }
    for (u32 v = threadIdx.x; v < vocab; v += COUNTERS) counts[(u64)blockIdx.x * vocab + v] = seen[v];
    for (u32 bin = warp; bin < bins; bin += COUNTERS / 32) {
        u32 sum = 0;
#pragma unroll
        for (int k = 0; k < BIN / 32; k++) {
            const u32 v = bin * BIN + k * 32 + lane;
            sum += v < vocab ? seen[v] : 0;
        }
        sum = __reduce_add_sync(ALL, sum);
        if (lane == 0) wide[(u64)blockIdx.x * bins + bin] = sum;
    }
}

// The sums of a value per thread over all threads before, and over all; every thread of the block must call it.
__device__ __forceinline__ u32 sum_before(u32 value, u32 &total) {
    __shared__ u32 warps[THREADS / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 sum = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(ALL, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads(); // an earlier call's readers are done
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) {
        before += i < warp ? warps[i] : 0;
        total += warps[i];
    }
    return before + sum - value;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_starts(u32 *__restrict__ counts, const u32 *__restrict__ wide, u32 *__restrict__ starts,
                     const __grid_constant__ Scalars s) {
    static_assert(THREADS == BIN, "a thread an id, a block a bin");
    const u32 vocab = (u32)s.vocab, bins = (vocab + BIN - 1) / BIN, tiles = (u32)s.tiles;
    const u32 v = blockIdx.x * BIN + threadIdx.x;
    u32 below = 0;
    for (u32 i = threadIdx.x; i < tiles * blockIdx.x; i += THREADS) {
        const u32 tile = i / blockIdx.x;
        below += wide[tile * bins + (i - tile * blockIdx.x)];
    }
    u32 base, inside;
    sum_before(below, base);
    u32 count = 0;
    if (v < vocab) {
        for (u32 tile = 0; tile < tiles; tile += 2 * BATCH) {
            u32 some[2 * BATCH];
#pragma unroll
            for (int k = 0; k < 2 * BATCH; k++) {
                some[k] = tile + k < tiles ? counts[(u64)(tile + k) * vocab + v] : 0;
            }
#pragma unroll
            for (int k = 0; k < 2 * BATCH; k++) {
                if (tile + k < tiles) counts[(u64)(tile + k) * vocab + v] = count;
                count += some[k];
            }
        }
    }
    const u32 start = base + sum_before(count, inside);
    if (v < vocab) starts[v] = start;
    if (v == vocab - 1) starts[vocab] = start + count;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_order(const int *__restrict__ ids, const u32 *__restrict__ ranks, const u32 *__restrict__ counts,
                    const u32 *__restrict__ starts, int2 *__restrict__ order, const __grid_constant__ Scalars s) {
    const u64 token = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (token >= s.tokens) return;
    const int id = ids[token];
    if ((u32)id >= s.vocab) return;
    const u32 tile = (u32)token / (u32)s.tile;
    order[starts[id] + counts[(u64)tile * s.vocab + id] + ranks[token]] = make_int2((int)token, id);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_sums(const int2 *__restrict__ order, const u32 *__restrict__ starts, const ELEMENT *__restrict__ gy,
                   float *__restrict__ gw, float *__restrict__ edges, const __grid_constant__ Scalars s) {
    const u32 packs = (u32)(s.columns / WIDTH), at = blockIdx.x * THREADS + threadIdx.x;
    const u32 part = at / packs, pack = at - part * packs;
    const u32 total = starts[s.vocab], first = part * PART;
    if (first >= total) return;
    const u32 last = min(first + PART, total);
    const Pack *rows = reinterpret_cast<const Pack *>(gy) + pack;
    Sums *to_id = reinterpret_cast<Sums *>(gw) + pack;
    Sums *to_edge = reinterpret_cast<Sums *>(edges) + (u64)part * 2 * packs + pack;
    int id = order[first].y;
    bool continued = first > 0 && order[first - 1].y == id;
    Sums sums = {};
    for (u32 start = first; start < last; start += BATCH) {
        int2 tokens[BATCH];
        Pack some[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) tokens[k] = order[min(start + k, last - 1)];
#pragma unroll
        for (int k = 0; k < BATCH; k++) some[k] = rows[(u64)tokens[k].x * packs];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (start + k >= last) break;
            if (tokens[k].y != id) {
                *(continued ? to_edge : to_id + (u64)id * packs) = sums;
                sums = {};
                id = tokens[k].y;
                continued = false;
            }
            add(sums, some[k]);
        }
    }
    const bool goes_on = last < total && order[last].y == id;
    if (continued) {
        *to_edge = sums;
    } else {
        *(goes_on ? to_edge + packs : to_id + (u64)id * packs) = sums;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_join(const u32 *__restrict__ starts, const float *__restrict__ edges, float *__restrict__ gw,
                   const __grid_constant__ Scalars s) {
    const u32 packs = (u32)(s.columns / WIDTH), at = blockIdx.x * THREADS + threadIdx.x;
    const u32 id = at / packs, pack = at - id * packs;
    if (id >= s.vocab) return;
    const u32 start = starts[id], end = starts[id + 1];
    Sums sums = {};
    if (start < end) {
        const u32 first = start / PART, last = (end - 1) / PART;
        if (first == last) return; // embedding_sums has written it
        const Sums *from = reinterpret_cast<const Sums *>(edges) + pack;
        sums = from[((u64)first * 2 + 1) * packs];
        for (u32 part = first + 1; part <= last; part += BATCH) {
            Sums some[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++) some[k] = from[(u64)min(part + k, last) * 2 * packs];
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                if (part + k <= last) add(sums, some[k]);
            }
        }
    }
    reinterpret_cast<Sums *>(gw)[(u64)id * packs + pack] = sums;
}
