// Token embedding, and its gradient by sorted segments (src/ops/embedding.rs).
//
//   forward    y[n, c] = w[id[n], c]
//   backward  gw[v, c] = sum over n with id[n] = v of gy[n, c]
//
// The backward sorts the tokens by id, those of one id staying in order, and adds up the sorted rows. Entries:
//   embedding_forward  the rows of the table
//   embedding_count    for each tile of tokens: ranks[n], how many of the tile's tokens before n have its id;
//                      counts[tile, v], how many of all
//   embedding_order    starts[v], the number of tokens of ids below v; starts[vocab], of all; and order[place] = (n, id):
//                      tokens of id v at places starts[v] to starts[v + 1], n ascending
//   embedding_sums     each PART places of the order, summed id by id: ids that lie within one part go to gw. Where an
//                      id goes on from the part before, or only into the next, the sum goes to edges[part, 0 or 1]
//   embedding_join     the sums of ids that lie in several parts, by part; zeros for ids that no token has
//
// Layout: w, y and gy are dense row-major [vocab, c], [n, c] and [n, c] of ELEMENT, gw is [vocab, c] and edges
// [parts, 2, c] of f32. WIDTH divides c, and rows start at multiples of WIDTH elements' bytes. ids are i32. counts has
// two ids a word, the first in the lower half: a tile has 32,768 tokens at most.
// Grid: forward: 256 threads, each FETCH packs of WIDTH elements of y. count: a block of 1024 threads a tile of `tile`
// tokens, COUNTING warps of which count a share of it each, in shared memory of COUNTING ceil(vocab / 2) words. order:
// block (x, y) of 1024 threads takes the x-th `span` tokens of tile y, with 2 ceil(vocab / 2) words. sums: 256 threads,
// each a pack of a part. join: 128 threads, 32 packs of ids by SPLITS warps that share the parts of each.
// Invariants: every element of y is written exactly once, and so is every one of gw, or added to where ADD is 1 (in sums
// or join: what is zero is then left alone). The parts have a fixed length, so that an id that is a large share of all
// tokens is no longer work than others. A token with an id outside the table gets NaN, and its gradient is left out.
// Numerics: f32. The order of every sum follows from the ids alone: tokens ascending within a part; of the parts every
// SPLITS-th, ascending, then these sums; what gw holds before is added to the whole. No atomics: equal bits every time.
//
// The launcher (src/backend/cuda_embedding.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DADD=0
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DADD=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1 -DADD=0
// variant: -DELEMENT=float -DWIDTH=4 -DADD=1
// variant: -DELEMENT=float -DWIDTH=4 -DCOUNTING=32
// variant: -DELEMENT=float -DWIDTH=4 -DCOUNTING=1
// variant: -DELEMENT=float -DWIDTH=1 -DADD=1

#include <cuda_bf16.h>
#include "common/word.cuh"

typedef unsigned short u16;

#define THREADS 256
#define SORTERS 1024 // threads of a block that sorts
#define PART 64      // places of the order that are summed together
#define SPLITS 4     // warps that join the parts of an id
#define BATCH 8      // loads in flight a thread
#define FETCH 4      // packs of a thread of the forward
#define ROUNDS 4     // of 32 tokens that a warp counts, their ids in flight
#define ALL 0xffffffffu

struct Scalars {
    u64 tokens, vocab, columns;
    u64 tile, tiles; // tokens of a tile, and how many tiles
    u64 span;        // tokens of a block of embedding_order
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

#ifdef COUNTING
extern "C" __global__ void __launch_bounds__(SORTERS)
    embedding_count(const int *__restrict__ ids, u32 *__restrict__ ranks, u32 *__restrict__ counts,
                    const __grid_constant__ Scalars s) {
    extern __shared__ u32 seen[]; // by each counting warp, two ids a word
    const u32 vocab = (u32)s.vocab, pairs = (vocab + 1) / 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u32 i = threadIdx.x; i < COUNTING * pairs; i += SORTERS) seen[i] = 0;
    __syncthreads();
    u16 *own = reinterpret_cast<u16 *>(seen + warp * pairs);
    const u64 share = s.tile / COUNTING; // a multiple of 32
    const u64 first = min(blockIdx.x * s.tile + warp * share, s.tokens);
    const u64 last = warp < COUNTING ? min(first + share, s.tokens) : first;
    for (u64 start = first; start < last; start += 32 * ROUNDS) {
        int some[ROUNDS];
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            const u64 token = start + k * 32 + lane;
            some[k] = token < last ? ids[token] : -1;
        }
#pragma unroll
        for (int k = 0; k < ROUNDS; k++) {
            const int id = some[k];
            const bool counts_in = (u32)id < vocab;
            const u32 same = __match_any_sync(ALL, id);
            const int leader = __ffs(same) - 1;
            u32 before = 0;
            if (counts_in && lane == leader) {
                before = own[id];
                own[id] = (u16)(before + __popc(same));
            }
            const u32 rank = __shfl_sync(ALL, before, leader) + __popc(same & ((1u << lane) - 1));
            if (counts_in) ranks[start + k * 32 + lane] = rank;
            __syncwarp();
        }
    }
    __syncthreads();
    // What each warp has counted becomes what the warps before it have; halves of a word do not carry.
    for (u32 i = threadIdx.x; i < pairs; i += SORTERS) {
        u32 sum = 0;
#pragma unroll
        for (int start = 0; start < COUNTING; start += BATCH) {
            u32 some[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++) some[k] = start + k < COUNTING ? seen[(start + k) * pairs + i] : 0;
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                if (start + k < COUNTING) seen[(start + k) * pairs + i] = sum;
                sum += some[k];
            }
        }
        counts[(u64)blockIdx.x * pairs + i] = sum;
    }
    __syncthreads();
    for (u64 token = first + lane; token < last && warp > 0; token += 32) {
        const int id = ids[token];
        if ((u32)id < vocab) ranks[token] += own[id];
    }
}
#endif

// The sums of a value per thread over all threads before, and over all; every thread of the block must call it.
__device__ __forceinline__ u32 sum_before(u32 value, u32 &total) {
    __shared__ u32 warps[SORTERS / 32];
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
    const u32 of_lane = warps[lane];
    total = __reduce_add_sync(ALL, of_lane);
    return __reduce_add_sync(ALL, lane < warp ? of_lane : 0) + sum - value;
}

extern "C" __global__ void __launch_bounds__(SORTERS)
    embedding_order(const int *__restrict__ ids, const u32 *__restrict__ ranks, const u32 *__restrict__ counts,
                    u32 *__restrict__ starts, int2 *__restrict__ order, const __grid_constant__ Scalars s) {
    static_assert(SORTERS == 1024, "a warp adds up the warps' sums");
    extern __shared__ u32 places[]; // of each id's first token in the tile
    const u32 vocab = (u32)s.vocab, pairs = (vocab + 1) / 2, tiles = (u32)s.tiles, tile = blockIdx.y;
    const bool tells = blockIdx.x == 0 && tile == 0;
    const u64 end = min((tile + 1) * s.tile, s.tokens);
    u64 token = tile * s.tile + blockIdx.x * s.span;
    const u64 last = min(token + s.span, end);
    token += threadIdx.x;
    int id = token < last ? ids[token] : -1;
    u32 rank = token < last ? ranks[token] : 0;
    u32 base = 0;
    for (u32 chunk = 0; chunk < pairs; chunk += SORTERS) {
        const u32 i = chunk + threadIdx.x;
        u32 low = 0, high = 0, low_before = 0, high_before = 0; // of the pair's ids: in all tiles, in those before
        for (u32 start = 0; start < tiles && i < pairs; start += BATCH) {
            u32 some[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++) some[k] = start + k < tiles ? counts[(u64)(start + k) * pairs + i] : 0;
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                if (start + k == tile) {
                    low_before = low;
                    high_before = high;
                }
                low += some[k] & 0xffff;
                high += some[k] >> 16;
            }
        }
        u32 inside;
        const u32 start = base + sum_before(low + high, inside);
        base += inside;
        if (i < pairs) {
            places[2 * i] = start + low_before;
            places[2 * i + 1] = start + low + high_before;
            if (tells) {
                starts[2 * i] = start;
                if (2 * i + 1 < vocab) starts[2 * i + 1] = start + low;
            }
        }
    }
    if (tells && threadIdx.x == 0) starts[vocab] = base;
    __syncthreads();
    while (token < last) {
        if ((u32)id < vocab) order[places[id] + rank] = make_int2((int)token, id);
        token += SORTERS;
        if (token < last) {
            id = ids[token];
            rank = ranks[token];
        }
    }
}

#ifdef ADD
__device__ __forceinline__ void put(Sums *to, Sums sums) {
    if (ADD) add(sums, *to);
    *to = sums;
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
    int2 tokens[BATCH], next[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; k++) next[k] = order[min(first + k, last - 1)];
    for (u32 start = first; start < last; start += BATCH) {
        Pack some[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            tokens[k] = next[k];
            some[k] = rows[(u64)tokens[k].x * packs];
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) next[k] = order[min(start + BATCH + k, last - 1)];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            if (start + k >= last) break;
            if (tokens[k].y != id) {
                if (continued) {
                    *to_edge = sums;
                } else {
                    put(to_id + (u64)id * packs, sums);
                }
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
    } else if (goes_on) {
        to_edge[packs] = sums;
    } else {
        put(to_id + (u64)id * packs, sums);
    }
}

extern "C" __global__ void __launch_bounds__(32 * SPLITS)
    embedding_join(const u32 *__restrict__ starts, const float *__restrict__ edges, float *__restrict__ gw,
                   const __grid_constant__ Scalars s) {
    __shared__ Sums splits[SPLITS - 1][32];
    const u32 packs = (u32)(s.columns / WIDTH), split = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 at = blockIdx.x * 32 + lane, id = at / packs, pack = at - id * packs;
    const u32 start = id < s.vocab ? starts[id] : 0, end = id < s.vocab ? starts[id + 1] : 0;
    const u32 first = start / PART, last = start < end ? (end - 1) / PART : first;
    Sums sums = {};
    if (first < last) {
        const Sums *from = reinterpret_cast<const Sums *>(edges) + pack;
        for (u32 part = first + split; part <= last; part += SPLITS * BATCH) {
            Sums some[BATCH];
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                const u32 other = min(part + k * SPLITS, last);
                some[k] = from[((u64)other * 2 + (other == first)) * packs];
            }
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                if (part + k * SPLITS <= last) add(sums, some[k]);
            }
        }
    }
    if (split > 0) splits[split - 1][lane] = sums;
    __syncthreads();
    // Where an id lies within one part, embedding_sums has written it.
    if (split > 0 || id >= s.vocab || (start < end && first == last)) return;
    Sums *to = reinterpret_cast<Sums *>(gw) + at;
    if (start < end) {
#pragma unroll
        for (int k = 0; k < SPLITS - 1; k++) add(sums, splits[k][lane]);
        put(to, sums);
    } else if (!ADD) {
        *to = {};
    }
}
#endif
