// Causal attention with grouped keys and values, backward (src/ops/attention.rs; attention_forward.cu has the formula).
//
//   P = exp(scale q k^T - lse), gv = P^T gy, gS = P (gy v^T - rowsum(gy y)), gq = scale gS k, gk = scale gS^T q
//
// attention_rows.cu runs before it and gives lse / ln 2 and rowsum(gy y) in `stats`, and `turns` of zeros.
//
// Layout: q, gy bf16 [b, tq, h, HEAD], k, v, gk, gv bf16 [b, tk, g, HEAD] through tensor maps [b, t, heads * HEAD] in
// boxes of [1, 64, COLUMNS], zeros outside; gq bf16 [b, tq, h, HEAD], a query after gq_row elements, each at a multiple
// of 8 bytes; starts i32 [b, tk]. With m = ceil(tq / QUERIES) blocks of queries: stats f32 [b, h, m, STATS, QUERIES],
// turns u32 [b, h, m], and the workspace sums f32 [b, h, m, QUERIES * HEAD] in the order of the warpgroups' registers
// (`finish_part`).
// Grid: (ceil(tk / KEYS), g, b) blocks: block x owns the x-th key block from the end and walks all the heads of its
// group and the query blocks that see its keys, first to last.
// Roles: warpgroup 0 copies in (warps 0 and 3) and adds gq's parts to memory (warps 1 and 2); warpgroups 1 and 2 own 64
// keys each. Scores stand transposed, keys as rows, so that P and gS leave the registers only for gq: gS goes through
// shared memory, and its product runs a step later, so that the two need not march in step.
// Order: a query block's sums take their parts from its last key block to its first, one after the other: `turns`
// counts them. A part waits only for blocks earlier in the grid's order, which the device starts first; the first part
// overwrites, and whoever adds the last one writes gq at its end.
// Invariants: every element of gq, gk, gv is written exactly once; queries past the end have lse = inf, so P = 0 there.
// Numerics: bf16 operands, f32 for everything else: P and gS are rounded to bf16 for their products, and gS takes the
// unrounded P where registers allow it (HEAD < 128). The order of every sum is fixed: equal bits every time.
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
#define KEYS 128
#include "common/hopper.cuh"
#include "common/attention.cuh"

#define THREADS 384
#define STAGES 2
// Registers of a thread: the multiprocessor's 65,536, most of them for the consumers.
#define COPY_REGISTERS (HEAD == 128 ? 24 : 40)
#define CONSUMER_REGISTERS (HEAD == 128 ? 240 : 232)
// A consumer's part of a query block's gq: 64 rows of all columns, or of half of them where a block has 64 rows.
#define PART_COLUMNS (QUERIES * HEAD / 128)
#define SUM_BYTES (QUERIES * HEAD * 4)
#define GS_BYTES (KEYS * QUERIES * 2)
// Query blocks whose gq is under way from memory at the end, in the place of q's, gy's and gS's tiles.
#define PARTS 4

// The query blocks that see the keys of a block: `first` to before `end`.
struct Range {
    int first, end;

    // Every thread of the block calls it.
    __device__ __forceinline__ Range(const int *starts, const Scalars &s, int batch, int block) {
        const int offset = (int)s.keys - (int)s.queries, blocks = query_blocks(s), last_key = block * KEYS + KEYS - 1;
        first = max(0, block * KEYS - offset) / QUERIES;
        end = blocks;
        if (WINDOW || DOCUMENTS) {
            // What a block sees first does not decrease from block to block.
            end = first;
            for (int seen = THREADS; seen == THREADS; end += seen) {
                const int m = end + threadIdx.x;
                seen =
                    __syncthreads_count(m < blocks && first_seen(starts, s, batch, m * QUERIES + offset) <= last_key);
            }
        }
    }
};

// Runs `body` for the heads of a group and the query blocks whose first key block this is: no part comes after it.
template <class Body> __device__ __forceinline__ void for_last(const int *starts, const Scalars &s, int batch,
                                                               int group, int block, const Range &range, Body body) {
    const int ratio = (int)s.heads / (int)s.groups, offset = (int)s.keys - (int)s.queries;
    for (int m = range.first; m < range.end; m++) {
        if (first_seen(starts, s, batch, m * QUERIES + offset) < block * KEYS) continue;
        for (int head = group * ratio; head < (group + 1) * ratio; head++) body(head, m);
    }
}

// Waits until `*turn` is `mine`.
__device__ __forceinline__ void wait_for(const u32 *turn, u32 mine) {
    u32 now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != mine);
}

// What this thread knows to be written is written for whoever finds `value` there.
__device__ __forceinline__ void publish(u32 *turn, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(value) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap gy_map,
                       const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                       const __grid_constant__ TensorMap gk_map, const __grid_constant__ TensorMap gv_map, const void *,
                       const void *, const void *, const void *, const void *, const void *,
                       STARTS_PARAMETER const float *__restrict__ stats, u32 *turns, float *sums,
                       __nv_bfloat16 *__restrict__ gq_out, const __grid_constant__ Scalars s) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(16) float stat_tiles[STAGES][STATS][QUERIES];
    __shared__ __align__(8) u64 barriers[3 * STAGES + 8 + 2 * PARTS];
    const u32 k_tile = shared_address(memory), v_tile = k_tile + tile_bytes(KEYS), q_tiles = v_tile + tile_bytes(KEYS);
    const u32 gy_tiles = q_tiles + STAGES * tile_bytes(QUERIES), gs_tiles = gy_tiles + STAGES * tile_bytes(QUERIES);
    const u32 sum_tile = gs_tiles + 2 * GS_BYTES;
    const u32 q_full = shared_address(barriers), gy_full = q_full + 8 * STAGES, empty = gy_full + 8 * STAGES;
    const u32 kv_full = empty + 8 * STAGES, sum_full = kv_full + 8, sum_empty = sum_full + 16;
    const u32 gs_full = sum_empty + 8, gs_empty = gs_full + 16, part_full = gs_empty + 16,
              part_empty = part_full + 8 * PARTS;
    const int block = gridDim.x - 1 - blockIdx.x, group = blockIdx.y, batch = blockIdx.z;
    const int offset = (int)s.keys - (int)s.queries, blocks = query_blocks(s);
    const int ratio = (int)s.heads / (int)s.groups;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(q_full + 8 * i, 2);
            barrier_init(gy_full + 8 * i, 1);
            barrier_init(empty + 8 * i, 8);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(gs_full + 8 * i, 8);
            barrier_init(gs_empty + 8 * i, 8);
            barrier_init(sum_full + 8 * i, 8);
        }
        for (int i = 0; i < PARTS; i++) {
            barrier_init(part_full + 8 * i, 1);
            barrier_init(part_empty + 8 * i, 8);
        }
        barrier_init(kv_full, 1);
        barrier_init(sum_empty, 1);
        barrier_init_done();
    }
    __syncthreads();
    const Range range(starts, s, batch, block);
    const int steps = ratio * max(0, range.end - range.first);

    if (threadIdx.x < 128) {
        registers_down<COPY_REGISTERS>();
        if (threadIdx.x == 0) {
            barrier_expect(kv_full, 2 * tile_bytes(KEYS));
            load_tile(k_tile, KEYS, k_map, kv_full, group, block * KEYS, batch);
            load_tile(v_tile, KEYS, v_map, kv_full, group, block * KEYS, batch);
            Ring<STAGES> at;
            for (int head = group * ratio; head < (group + 1) * ratio; head++)
                for (int m = range.first; m < range.end; m++) {
                    const u32 q = q_full + 8 * at.stage(), gy = gy_full + 8 * at.stage(),
                              to = at.stage() * tile_bytes(QUERIES);
                    barrier_wait(empty + 8 * at.stage(), at.parity() ^ 1);
                    barrier_expect(q, tile_bytes(QUERIES));
                    load_tile(q_tiles + to, QUERIES, q_map, q, head, m * QUERIES, batch);
                    barrier_expect(gy, tile_bytes(QUERIES));
                    load_tile(gy_tiles + to, QUERIES, gy_map, gy, head, m * QUERIES, batch);
                    at.advance();
                }
        } else if (threadIdx.x == 96) {
            Ring<STAGES> at;
            for (int head = group * ratio; head < (group + 1) * ratio; head++) {
                const float *stat = stats + (((u64)batch * s.heads + head) * blocks + range.first) * (STATS * QUERIES);
                for (int m = range.first; m < range.end; m++, stat += STATS * QUERIES) {
                    barrier_wait(empty + 8 * at.stage(), at.parity() ^ 1);
                    barrier_expect(q_full + 8 * at.stage(), STATS * QUERIES * 4);
                    copy_bytes_in(shared_address(stat_tiles[at.stage()]), stat, STATS * QUERIES * 4,
                                  q_full + 8 * at.stage());
                    at.advance();
                }
            }
        } else if (threadIdx.x >= 32 && threadIdx.x < 96) {
            // Two warps take turns at the steps: one waits for its turn while the other's additions are under way.
            const int writer = threadIdx.x / 32 - 1;
            int step = 0;
            for (int head = group * ratio; threadIdx.x % 32 == 0 && head < (group + 1) * ratio; head++)
                for (int m = range.first; m < range.end; m++, step++) {
                    if (step % 2 != writer) continue;
                    const u32 place = (batch * (u32)s.heads + head) * blocks + m;
                    // How many parts come before this block's.
                    const u32 turn = (min((m + 1) * QUERIES, (int)s.queries) - 1 + offset) / KEYS - block;
                    if (turn > 0) {
                        wait_for(turns + place, turn);
                        fence_async_global();
                    }
                    barrier_wait(sum_full + 8 * writer, step / 2 % 2);
                    float *to = sums + (u64)place * (QUERIES * HEAD);
                    if (turn > 0)
                        add_floats_out(to, sum_tile, SUM_BYTES);
                    else
                        copy_bytes_out(to, sum_tile, SUM_BYTES);
                    copy_out_commit();
                    copy_out_wait();
                    barrier_arrive(sum_empty);
                    copy_out_done();
                    fence_async_global();
                    publish(turns + place, turn + 1);
                }
            __syncwarp();
            sync_threads(4, 256 + 64);
            if (threadIdx.x == 32) {
                fence_async_global();
                Ring<PARTS> at;
                for_last(starts, s, batch, group, block, range, [&](int head, int m) {
                    barrier_wait(part_empty + 8 * at.stage(), at.parity() ^ 1);
                    barrier_expect(part_full + 8 * at.stage(), SUM_BYTES);
                    copy_bytes_in(q_tiles + at.stage() * SUM_BYTES,
                                  sums + (((u64)batch * s.heads + head) * blocks + m) * (QUERIES * HEAD), SUM_BYTES,
                                  part_full + 8 * at.stage());
                    at.advance();
                });
            }
        }
    } else {
        registers_up<CONSUMER_REGISTERS>();
        const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = thread % 32;
        const float scale = float_of(s.scale), scale_2 = scale * 1.44269504f;
        const int first_key = block * KEYS + 64 * consumer;
        Ring<STAGES> at;
        Ring<2> at_gs;
        float scores[QUERIES / 2], gp[QUERIES / 2], gk[HEAD / 2], gv[HEAD / 2], gq[PART_COLUMNS / 2];
        u32 p[QUERIES / 4], gs[QUERIES / 4];
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) gk[i] = gv[i] = 0.0f;

        // Past the last step the product runs too, on whatever is there, and nobody looks at it: a branch around it
        // would make the compiler serialise all the loop's products.
        const auto start_scores = [&](Ring<STAGES> at, bool any) {
            if (any) barrier_wait(q_full + 8 * at.stage(), at.parity());
            const u32 q_tile = q_tiles + at.stage() * tile_bytes(QUERIES);
            product_begin();
#pragma unroll
            for (int k = 0; k < HEAD / 16; k++)
                product<0, 0>(scores, columns_as_k(k_tile, KEYS, 64 * consumer, k), columns_as_k(q_tile, QUERIES, 0, k),
                              k);
            product_commit();
        };

        // This block's part of a query block's gq.
        const auto start_part = [&](Ring<2> at, bool any) {
            if (any) barrier_wait(gs_full + 8 * at.stage(), at.parity());
            const u32 gs_part = gs_tiles + at.stage() * GS_BYTES + (QUERIES == 128 ? consumer * (KEYS * 128) : 0);
            const int column = QUERIES == 128 ? 0 : consumer * PART_COLUMNS;
            product_begin();
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++)
                product<1, 1>(gq, operand(128, gs_part + 16 * k * 128, 16), rows_as_k(k_tile, KEYS, column, k), k);
            product_commit();
        };
        const auto finish_part = [&](Ring<2> at) {
            if (lane == 0) barrier_arrive(gs_empty + 8 * at.stage());
            barrier_wait(sum_empty, at.count % 2 ^ 1);
            // accumulator: [2 consumers][PART_COLUMNS / 8][128 threads][4]
            const u32 to = sum_tile + consumer * (SUM_BYTES / 2) + thread * 16;
#pragma unroll
            for (int i = 0; i < PART_COLUMNS / 8; i++)
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 2048), "f"(gq[4 * i]),
                             "f"(gq[4 * i + 1]), "f"(gq[4 * i + 2]), "f"(gq[4 * i + 3])
                             : "memory");
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(sum_full + 8 * (at.count % 2));
        };

        barrier_wait(kv_full, 0);
        start_scores(at, steps > 0);
        product_wait<0>();
        pin(scores);
        int m = range.first;
        for (int step = 0; step < steps; step++) {
            const u32 q_tile = q_tiles + at.stage() * tile_bytes(QUERIES),
                      gy_tile = gy_tiles + at.stage() * tile_bytes(QUERIES);
            const float *stat = stat_tiles[at.stage()][0];

            // gP = v gy^T, beside P.
            barrier_wait(gy_full + 8 * at.stage(), at.parity());
            product_begin();
#pragma unroll
            for (int k = 0; k < HEAD / 16; k++)
                product<0, 0>(gp, columns_as_k(v_tile, KEYS, 64 * consumer, k), columns_as_k(gy_tile, QUERIES, 0, k),
                              k);
            product_commit();
            const int column = lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < QUERIES / 8; i++) {
                const float2 shift = *reinterpret_cast<const float2 *>(stat + 8 * i + column);
                scores[4 * i] = exp2_fast(fmaf(scores[4 * i], scale_2, -shift.x));
                scores[4 * i + 1] = exp2_fast(fmaf(scores[4 * i + 1], scale_2, -shift.y));
                scores[4 * i + 2] = exp2_fast(fmaf(scores[4 * i + 2], scale_2, -shift.x));
                scores[4 * i + 3] = exp2_fast(fmaf(scores[4 * i + 3], scale_2, -shift.y));
            }
            const int position = m * QUERIES + offset;
            bool edge = first_key + 63 > position;
            if (WINDOW && !DOCUMENTS) edge |= first_key <= position + QUERIES - 1 - (int)s.window;
            if (DOCUMENTS) edge |= first_key < __float_as_int(stat[2 * QUERIES + QUERIES - 1]);
            if (edge) {
                const int key = first_key + thread / 32 * 16 + lane / 4;
#pragma unroll
                for (int i = 0; i < QUERIES / 8; i++) {
                    int2 from = make_int2(0, 0);
                    if (DOCUMENTS)
                        from = *reinterpret_cast<const int2 *>(stat + 2 * QUERIES + 8 * i + column);
                    else if (WINDOW)
                        from = make_int2(position + 8 * i + column + 1 - (int)s.window,
                                         position + 8 * i + column + 2 - (int)s.window);
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int at = key + e / 2 * 8, query = position + 8 * i + column + e % 2;
                        if (at > query || ((WINDOW || DOCUMENTS) && at < (e % 2 ? from.y : from.x)))
                            scores[4 * i + e] = 0.0f;
                    }
                }
            }
#if HEAD == 128
            // No registers for f32 probabilities here: gS takes the rounded ones.
#pragma unroll
            for (int i = 0; i < QUERIES / 4; i++) p[i] = pack(scores[2 * i], scores[2 * i + 1]);

            // gv += P^T gy, beside gS.
            product_begin();
#pragma unroll
            for (int k = 0; k < QUERIES / 16; k++)
                product_of_registers<1>(gv, p + 4 * k, rows_as_k(gy_tile, QUERIES, 0, k), 1);
            product_commit();
            product_wait<1>();
            pin(gp);
#pragma unroll
            for (int i = 0; i < QUERIES / 8; i++) {
                const float2 delta = *reinterpret_cast<const float2 *>(stat + QUERIES + 8 * i + column);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float low = __uint_as_float(p[2 * i + r] << 16),
                                high = __uint_as_float(p[2 * i + r] & 0xffff0000);
                    gs[2 * i + r] = pack(low * (gp[4 * i + 2 * r] - delta.x), high * (gp[4 * i + 2 * r + 1] - delta.y));
                }
            }
#else
            product_wait<0>();
            pin(gp);
#pragma unroll
            for (int i = 0; i < QUERIES / 8; i++) {
                const float2 delta = *reinterpret_cast<const float2 *>(stat + QUERIES + 8 * i + column);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int e = 4 * i + 2 * r;
                    p[2 * i + r] = pack(scores[e], scores[e + 1]);
                    gs[2 * i + r] = pack(scores[e] * (gp[e] - delta.x), scores[e + 1] * (gp[e + 1] - delta.y));
                }
            }
            // gv += P^T gy, beside gS's way to shared memory.
            product_begin();
#pragma unroll
            for (int k = 0; k < QUERIES / 16; k++)
                product_of_registers<1>(gv, p + 4 * k, rows_as_k(gy_tile, QUERIES, 0, k), 1);
            product_commit();
#endif
            // gS as [QUERIES / 64][KEYS][64 queries], in one of two buffers.
            const u32 gs_tile = gs_tiles + at_gs.stage() * GS_BYTES;
            barrier_wait(gs_empty + 8 * at_gs.stage(), at_gs.parity() ^ 1);
            const u32 row = 64 * consumer + thread / 32 * 16 + lane % 16;
#pragma unroll
            for (int k = 0; k < QUERIES / 16; k++)
                store_matrices(gs_tile + k / 4 * (KEYS * 128) + swizzled(128, row, k % 4 * 2 + lane / 16), gs[4 * k],
                               gs[4 * k + 1], gs[4 * k + 2], gs[4 * k + 3]);
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(gs_full + 8 * at_gs.stage());
            product_wait<0>();
            pin(gv);

            // gk += gS^T q, the last step's part of gq (so that no consumer waits for the other's gS), the next scores.
            product_begin();
#pragma unroll
            for (int k = 0; k < QUERIES / 16; k++)
                product_of_registers<1>(gk, gs + 4 * k, rows_as_k(q_tile, QUERIES, 0, k), 1);
            product_commit();
            start_part(at_gs.ahead(-1), step > 0);
            start_scores(at.ahead(1), step + 1 < steps);
            product_wait<1>();
            pin(gq);
            pin(gk);
            if (lane == 0) barrier_arrive(empty + 8 * at.stage());
            if (step > 0) finish_part(at_gs.ahead(-1));
            product_wait<0>();
            pin(scores);
            at.advance();
            at_gs.advance();
            if (++m == range.end) m = range.first;
        }
        if (steps > 0) {
            start_part(at_gs.ahead(-1), true);
            product_wait<0>();
            pin(gq);
            finish_part(at_gs.ahead(-1));
        }
        // Both consumers are done with k's tile.
        sync_threads(1, 256);
        store_rows(v_tile, KEYS, 64 * consumer, gv, 1.0f, 1.0f, 2 + consumer, gv_map, group, first_key, (int)s.keys,
                   batch);
        store_rows(k_tile, KEYS, 64 * consumer, gk, scale, scale, 2 + consumer, gk_map, group, first_key, (int)s.keys,
                   batch);
        if (thread == 0) copy_out_commit();

        // gq of the query blocks that have all their parts now.
        sync_threads(4, 256 + 64);
        Ring<PARTS> at_part;
        for_last(starts, s, batch, group, block, range, [&](int head, int m) {
            const int query = m * QUERIES + (QUERIES == 128 ? 64 * consumer : 0) + thread / 32 * 16 + lane / 4;
            const int first_column = QUERIES == 128 ? 0 : consumer * PART_COLUMNS;
            const u32 from = q_tiles + at_part.stage() * SUM_BYTES + consumer * (SUM_BYTES / 2) + thread * 16;
            barrier_wait(part_full + 8 * at_part.stage(), at_part.parity());
#pragma unroll
            for (int i = 0; i < PART_COLUMNS / 8; i++)
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(gq[4 * i]), "=f"(gq[4 * i + 1]), "=f"(gq[4 * i + 2]), "=f"(gq[4 * i + 3])
                             : "r"(from + i * 2048)
                             : "memory");
            __syncwarp();
            if (lane == 0) barrier_arrive(part_empty + 8 * at_part.stage());
            at_part.advance();
#pragma unroll
            for (int i = 0; i < PART_COLUMNS / 8; i += 2) {
                // Even threads take the rows' columns 8 i ..., odd ones the next 8: four each, two the neighbour's.
                const bool odd = lane % 2;
                const int column = first_column + 8 * (i + odd) + lane % 4 / 2 * 4;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int e = 4 * i + 2 * r;
                    const u32 here = pack(gq[e] * scale, gq[e + 1] * scale),
                              next = pack(gq[e + 4] * scale, gq[e + 5] * scale);
                    const u32 mine = odd ? next : here, got = __shfl_xor_sync(0xffffffffu, odd ? here : next, 1);
                    if (query + 8 * r < (int)s.queries)
                        *reinterpret_cast<uint2 *>(gq_out + ((u64)batch * s.queries + query + 8 * r) * s.gq_row +
                                                   head * HEAD + column) =
                            odd ? make_uint2(got, mine) : make_uint2(mine, got);
                }
            }
        });
        if (thread == 0) copy_out_wait();
    }
}
