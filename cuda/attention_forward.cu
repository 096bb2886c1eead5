// Causal attention with grouped keys and values, forward (src/ops/attention.rs).
//
//   y = softmax(scale q k^T) v over the keys that a query sees, lse = log sum exp(scale q k^T) over the same
//
// Query i stands at position p = i + tk - tq and sees the keys first(p) ... p: first is 0, or with WINDOW
// p - window + 1, or with DOCUMENTS starts[p], whichever is larger. `starts` never decreases in a sequence; scale > 0.
// Layout: q, y bf16 [b, tq, h, HEAD], k, v bf16 [b, tk, g, HEAD] through tensor maps [b, t, heads * HEAD] in boxes of
// [1, 64, COLUMNS], zeros outside; lse f32 [b, h, tq], starts i32 [b, tk], dense. Head i reads group i / (h / g).
// Grid: any number of blocks (one a multiprocessor): they share out the tiles of ROWS queries of a head, longest first
// within a section of heads whose keys and values stay in the L2 cache, in alternating direction.
// Roles: the first three warpgroups consume: each owns 64 of a tile's rows and walks the key blocks from the last that
// it sees to the first, the product of the next scores beside that of the last probabilities; the fourth copies (one
// thread), up to two tiles of queries and two blocks of keys and values ahead.
// Invariants: every element of y and lse is written exactly once; each consumer waits for and releases every block that
// is copied, also those that it skips; y leaves through its rows' place in q's tile.
// Numerics: bf16 operands, f32 scores, softmax and sums; the probabilities are rounded to bf16 for the product with
// v, not for their sum. No order depends on timing: equal bits every time.
//
// The launcher (src/backend/cuda_attention.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=0
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=1
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=32 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=32 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=128 -DWINDOW=1 -DDOCUMENTS=1

#include <cuda_bf16.h>
// Scores, probabilities and y of a consumer fill its registers.
#define KEYS (HEAD == 128 ? 64 : 128)
#include "common/word.cuh"
#include "common/hopper.cuh"
#include "common/attention_seen.cuh"
#include "common/attention.cuh"

#define CONSUMERS 3
#define THREADS (128 * CONSUMERS + 128)
// Registers of a thread: the multiprocessor's 65,536, most of them for the consumers.
#define COPY_REGISTERS 32
#define CONSUMER_REGISTERS 160
#define ROWS (64 * CONSUMERS)
// Tiles of queries, and of keys and of values, in shared memory. A third of the latter is slower (0.63 ms for 0.57).
#define TILES 2
#define STAGES 2

// The part of the work that is one tile.
struct Tile {
    int batch, head, first_query;

    __device__ __forceinline__ Tile(const Scalars &s, int index) {
        const int blocks = ((int)s.queries + ROWS - 1) / ROWS, all_heads = (int)(s.batch * s.heads),
                  section = (int)s.section;
        const int start = index / (section * blocks) * section, rest = index - start * blocks;
        const int here = min(section, all_heads - start);
        const int place = start + rest % here;
        first_query = (blocks - 1 - rest / here) * ROWS;
        batch = place / (int)s.heads;
        head = place % (int)s.heads;
    }
};

// The key blocks that `rows` queries from `first` on see: last to first, none where there are no such queries.
struct Range {
    int last, first;

    __device__ __forceinline__ Range(const int *starts, const Scalars &s, int batch, int query, int rows) {
        const int offset = (int)s.keys - (int)s.queries;
        const bool any = query < (int)s.queries;
        last = any ? (min(query + rows, (int)s.queries) - 1 + offset) / KEYS : -1;
        first = any ? first_seen(starts, s, batch, query + offset) / KEYS : 0;
    }
};

// Runs `body` for every tile of this block.
template <class Body> __device__ __forceinline__ void for_tiles(const Scalars &s, Body body) {
    const int tiles = ((int)s.queries + ROWS - 1) / ROWS * (int)(s.batch * s.heads);
    for (int turn = 0;; turn++) {
        const int index = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (turn * gridDim.x >= tiles) break;
        if (index < tiles) body(index);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                      const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap y_map, const void *,
                      const void *, const void *, const void *, float *__restrict__ lse,
                      STARTS_PARAMETER const __grid_constant__ Scalars s) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(8) u64 barriers[2 * TILES + 4 * STAGES];
    __shared__ int first_keys[ROWS];
    // A tile's batch, head, first query, last and first block.
    __shared__ int4 work[TILES][2];
    const u32 q_tiles = shared_address(memory), k_tiles = q_tiles + TILES * tile_bytes(ROWS);
    const u32 v_tiles = k_tiles + STAGES * tile_bytes(KEYS);
    const u32 q_full = shared_address(barriers), q_empty = q_full + 8 * TILES, k_full = q_empty + 8 * TILES;
    const u32 k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < TILES; i++) {
            barrier_init(q_full + 8 * i, 1);
            barrier_init(q_empty + 8 * i, CONSUMERS);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(k_full + 8 * i, 1);
            barrier_init(v_full + 8 * i, 1);
            barrier_init(k_empty + 8 * i, 4 * CONSUMERS);
            barrier_init(v_empty + 8 * i, 4 * CONSUMERS);
        }
        barrier_init_done();
    }
    __syncthreads();

    if (threadIdx.x >= 128 * CONSUMERS) {
        registers_down<COPY_REGISTERS>();
        if (threadIdx.x != 128 * CONSUMERS) return;
        Ring<TILES> at_q;
        Ring<STAGES> at;
        for_tiles(s, [&](int index) {
            const Tile tile(s, index);
            const Range range(starts, s, tile.batch, tile.first_query, ROWS);
            const int group = tile.head / ((int)s.heads / (int)s.groups);
            barrier_wait(q_empty + 8 * at_q.stage(), at_q.parity() ^ 1);
            work[at_q.stage()][0] = make_int4(tile.batch, tile.head, tile.first_query, range.last);
            work[at_q.stage()][1].x = range.first;
            barrier_expect(q_full + 8 * at_q.stage(), tile_bytes(ROWS));
            load_tile(q_tiles + at_q.stage() * tile_bytes(ROWS), ROWS, q_map, q_full + 8 * at_q.stage(), tile.head,
                      tile.first_query, tile.batch);
            at_q.advance();
            for (int block = range.last; block >= range.first; block--) {
                const u32 to = at.stage() * tile_bytes(KEYS);
                barrier_wait(k_empty + 8 * at.stage(), at.parity() ^ 1);
                barrier_expect(k_full + 8 * at.stage(), tile_bytes(KEYS));
                load_tile(k_tiles + to, KEYS, k_map, k_full + 8 * at.stage(), group, block * KEYS, tile.batch);
                barrier_wait(v_empty + 8 * at.stage(), at.parity() ^ 1);
                barrier_expect(v_full + 8 * at.stage(), tile_bytes(KEYS));
                load_tile(v_tiles + to, KEYS, v_map, v_full + 8 * at.stage(), group, block * KEYS, tile.batch);
                at.advance();
            }
        });
    } else {
        registers_up<CONSUMER_REGISTERS>();
        const int consumer = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
        const int offset = (int)s.keys - (int)s.queries;
        const float scale = float_of(s.scale), scale_2 = scale * LOG2_E;
        Ring<TILES> at_q;
        Ring<STAGES> at;
        float scores[KEYS / 2];
        u32 packed[KEYS / 4];
        float y[HEAD / 2];

        const auto release = [&](u32 barrier) {
            if (lane == 0) barrier_arrive(barrier);
        };
        // The consumers issue their products one after the other, so that the softmax of one runs beside the products of
        // the others (b16 h8 g4 t4096 d64: 0.63 ms without, 0.57 with). Each takes one turn a block, and one a tile.
        const auto my_turn = [&]() { sync_threads(1 + CONSUMERS + consumer, 256); };
        const auto your_turn = [&]() { arrive_threads(1 + CONSUMERS + (consumer + 1) % CONSUMERS, 256); };
        if (consumer == CONSUMERS - 1) your_turn();
        for_tiles(s, [&](int) {
            barrier_wait(q_full + 8 * at_q.stage(), at_q.parity());
            const int4 tile = work[at_q.stage()][0];
            const int batch = tile.x, head = tile.y, first_query = tile.z, first_block = work[at_q.stage()][1].x;
            const int query = first_query + 64 * consumer;
            const Range mine(starts, s, batch, query, 64);
            // The first key that each of the warp's 16 rows sees.
            const int warp_row = 64 * consumer + thread / 32 * 16;
            if ((WINDOW || DOCUMENTS) && lane < 16)
                first_keys[warp_row + lane] = first_seen(starts, s, batch, first_query + warp_row + lane + offset);
            __syncwarp();
            const int warp_key = first_query + warp_row + offset;
            const u32 q_tile = q_tiles + at_q.stage() * tile_bytes(ROWS);
            float maximum[2] = {-infinity(), -infinity()}, sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < HEAD / 2; i++) y[i] = 0.0f;

            const auto skip = [&]() {
                my_turn();
                your_turn();
                barrier_wait(k_full + 8 * at.stage(), at.parity());
                release(k_empty + 8 * at.stage());
                barrier_wait(v_full + 8 * at.stage(), at.parity());
                release(v_empty + 8 * at.stage());
                at.advance();
            };
            const auto start_scores = [&](Ring<STAGES> at) {
                barrier_wait(k_full + 8 * at.stage(), at.parity());
                const u32 k_tile = k_tiles + at.stage() * tile_bytes(KEYS);
                product_begin();
#pragma unroll
                for (int k = 0; k < HEAD / 16; k++)
                    product<0, 0>(scores, columns_as_k(q_tile, ROWS, 64 * consumer, k),
                                  columns_as_k(k_tile, KEYS, 0, k), k);
                product_commit();
            };
            const auto scores_done = [&](Ring<STAGES> at) {
                pin(scores);
                release(k_empty + 8 * at.stage());
            };
            const auto start_values = [&]() {
                barrier_wait(v_full + 8 * at.stage(), at.parity());
                const u32 v_tile = v_tiles + at.stage() * tile_bytes(KEYS);
                product_begin();
#pragma unroll
                for (int k = 0; k < KEYS / 16; k++)
                    product_of_registers<1>(y, packed + 4 * k, rows_as_k(v_tile, KEYS, 0, k), 1);
                product_commit();
            };
            const auto values_done = [&]() {
                product_wait<0>();
                pin(y);
                release(v_empty + 8 * at.stage());
                at.advance();
            };
            // Scores to exponentials; what is summed so far shrinks by `shrink`.
            const auto softmax = [&](int block, float(&shrink)[2]) {
                const int key = block * KEYS + lane % 4 * 2;
                if (block * KEYS + KEYS - 1 > warp_key ||
                    ((WINDOW || DOCUMENTS) && block * KEYS < first_keys[warp_row + 15])) {
                    const int row = lane / 4;
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        // From this thread's first column on.
                        const int last = warp_key + row + 8 * r - key;
                        const int first = WINDOW || DOCUMENTS ? first_keys[warp_row + row + 8 * r] - key : 0;
#pragma unroll
                        for (int i = 0; i < KEYS / 4; i++) {
                            const int column = i / 2 * 8 + i % 2;
                            float &score = scores[i / 2 * 4 + 2 * r + i % 2];
                            if (column > last || ((WINDOW || DOCUMENTS) && column < first)) score = -infinity();
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float top = maximum[r];
#pragma unroll
                    for (int i = 2 * r; i < KEYS / 2; i += 4) top = fmaxf(top, fmaxf(scores[i], scores[i + 1]));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                    // A row that has seen no key yet: any finite value does.
                    const float base = top == -infinity() ? 0.0f : top, shift = base * scale_2;
                    // Exactly 1 where the maximum stays: anything else would add up over the blocks.
                    shrink[r] = exp2_fast((maximum[r] - base) * scale_2);
                    maximum[r] = top;
                    float part = 0.0f;
#pragma unroll
                    for (int i = 2 * r; i < KEYS / 2; i += 4) {
                        scores[i] = exp2_fast(fmaf(scores[i], scale_2, -shift));
                        scores[i + 1] = exp2_fast(fmaf(scores[i + 1], scale_2, -shift));
                        part += scores[i] + scores[i + 1];
                    }
                    sum[r] = fmaf(sum[r], shrink[r], part);
                }
            };
            const auto pack_scores = [&]() {
#pragma unroll
                for (int i = 0; i < KEYS / 4; i++) packed[i] = pack(scores[2 * i], scores[2 * i + 1]);
            };

            int block = tile.w;
            for (; block > mine.last && block >= first_block; block--) skip();
            if (mine.last >= 0) {
                float shrink[2];
                my_turn();
                start_scores(at);
                your_turn();
                product_wait<0>();
                scores_done(at);
                softmax(block, shrink);
                pack_scores();
                for (block--; block >= mine.first; block--) {
                    my_turn();
                    start_scores(at.ahead(1));
                    start_values();
                    your_turn();
                    product_wait<1>();
                    scores_done(at.ahead(1));
                    softmax(block, shrink);
                    values_done();
#pragma unroll
                    for (int i = 0; i < HEAD / 2; i++) y[i] *= shrink[i / 2 % 2];
                    pack_scores();
                }
                my_turn();
                start_values();
                your_turn();
                values_done();
            } else {
                my_turn();
                your_turn();
            }
            for (; block >= first_block; block--) skip();

            float inverse[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = query + thread / 32 * 16 + lane / 4 + 8 * r;
                sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
                sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
                inverse[r] = 1.0f / sum[r];
                if (lane % 4 == 0 && row < (int)s.queries)
                    lse[((u64)batch * s.heads + head) * s.queries + row] = fmaf(maximum[r], scale, __logf(sum[r]));
            }
            store_rows(q_tile, ROWS, 64 * consumer, y, inverse[0], inverse[1], 1 + consumer, y_map, head, query,
                       (int)s.queries, batch);
            if (thread == 0) {
                copy_out_commit();
                copy_out_wait();
                barrier_arrive(q_empty + 8 * at_q.stage());
            }
            at_q.advance();
        });
    }
}
