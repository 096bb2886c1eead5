// Causal attention with grouped keys and values, backward (src/ops/attention.rs; attention_forward.cu has the formula).
//
//   P = exp(scale q k^T - lse), gv = P^T gy, gS = P (gy v^T - rowsum(gy y)), gq = scale gS k, gk = scale gS^T q
//
// attention_rows.cu runs before it and gives lse / ln 2 and rowsum(gy y) in `stats`, and `turns` of zeros.
// With NORM gq and gk go on through the backward of what made q and k, which qk_norm.cu describes
// (src/ops/normed_attention.rs): the norm of each head, the rotation of HALF pairs of channels, q's gain (GAIN = 1).
//
// Layout: q, gy bf16 [b, tq, h, HEAD], k, v, gk, gv bf16 [b, tk, g, HEAD] through tensor maps [b, t, heads * HEAD] in
// boxes of [1, 64, COLUMNS], zeros outside; gq bf16 [b, tq, h, HEAD], a query after gq_row elements, each at a multiple
// of 8 bytes; starts i32 [b, tk]. With m = ceil(tq / QUERIES) blocks of queries: stats f32 [b, h, m, STATS, QUERIES],
// turns u32 [b, h, m], and the workspace sums f32 [b, h, m, QUERIES * HEAD] in the order of the warpgroups' registers
// (`finish_part`). With NORM also q and k as before the norm, bf16 through maps like those of q and k; with HALF > 0
// cosines, sines f32 [tk, HALF] through maps [1, tk, HALF] in boxes of [1, 64, COLUMNS / 2]; with GAIN gains bf16 [h],
// and partials f32 [b, key blocks, h]: the gain's gradient by the queries that a block finishes.
// Grid: (ceil(tk / KEYS), g, b) blocks: block x owns the x-th key block from the end and walks all the heads of its
// group and the query blocks that see its keys, first to last.
// Roles: warpgroup 0 copies in (warps 0 and 3) and adds gq's parts to memory (warps 1 and 2); warpgroups 1 and 2 own 64
// keys each. Scores stand transposed, keys as rows, so that P and gS leave the registers only for gq: gS goes through
// shared memory, and its product runs a step later, so that the two need not march in step.
// Order: a query block's sums take their parts from its last key block to its first, one after the other: `turns`
// counts them. A part waits only for blocks earlier in the grid's order, which the device starts first; the first part
// overwrites, and whoever adds the last one writes gq at its end.
// Invariants: every element of gq, gk, gv, partials is written exactly once; queries past the end have lse = inf, so
// P = 0 there. With NORM there are as many queries as keys (every block has steps), h / g <= 32, HALF a multiple of 8.
// Numerics: bf16 operands, f32 for everything else, the norm's backward too: P and gS are rounded to bf16 for their
// products, and gS takes the unrounded P where registers allow it (HEAD < 128). The gain's gradient is added over a
// warp's rows, a block's query blocks, its warps. The order of every sum is fixed: equal bits every time.
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
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=32 -DGAIN=1
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=8 -DGAIN=1
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=0 -DGAIN=0
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=1 -DNORM=1 -DHALF=32 -DGAIN=1
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=0 -DNORM=1 -DHALF=24 -DGAIN=0
// variant: -DHEAD=32 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=16 -DGAIN=1
// variant: -DHEAD=32 -DWINDOW=1 -DDOCUMENTS=1 -DNORM=1 -DHALF=8 -DGAIN=0
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=64 -DGAIN=1
// variant: -DHEAD=128 -DWINDOW=1 -DDOCUMENTS=1 -DNORM=1 -DHALF=64 -DGAIN=1
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=40 -DGAIN=1
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=0 -DNORM=1 -DHALF=16 -DGAIN=0

#ifndef NORM
#define NORM 0
#define HALF 0
#define GAIN 0
#endif

#include <cuda_bf16.h>
#define KEYS 128
#include "common/word.cuh"
#include "common/hopper.cuh"
#include "common/attention_seen.cuh"
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
// Query blocks whose gq is under way from memory at the end, in the place of q's, gy's and gS's tiles and of the sums;
// with NORM each with its queries as before the norm. Their angles take the place of k's and v's tiles.
#define PARTS (!NORM ? 4 : HEAD == 128 ? 2 : 3)
#define PART_BYTES (SUM_BYTES + (NORM ? QUERIES * HEAD * 2 : 0))

#include "common/attention_scores.cuh"
#include "common/attention_order.cuh"
#include "common/attention_norm.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_backward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap gy_map,
                       const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
                       const __grid_constant__ TensorMap gk_map, const __grid_constant__ TensorMap gv_map,
                       NORM_MAPS ANGLE_MAPS const void *, const void *, const void *, const void *, const void *,
                       const void *, NORM_POINTERS ANGLE_POINTERS STARTS_PARAMETER const float *__restrict__ stats,
                       u32 *turns, float *sums, __nv_bfloat16 *__restrict__ gq_out,
                       GAIN_PARAMETERS const __grid_constant__ SCALARS s) {
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ __align__(16) float stat_tiles[STAGES][STATS][QUERIES];
#if GAIN
    __shared__ float gain_sums[8][HEADS_OF_GROUP];
#endif
    __shared__ __align__(8) Range shared_range;
    __shared__ __align__(8) u64 barriers[3 * STAGES + 11 + 2 * PARTS];
    const u32 k_tile = shared_address(memory), v_tile = k_tile + tile_bytes(KEYS), q_tiles = v_tile + tile_bytes(KEYS);
    const u32 gy_tiles = q_tiles + STAGES * tile_bytes(QUERIES), gs_tiles = gy_tiles + STAGES * tile_bytes(QUERIES);
    const u32 sum_tile = gs_tiles + 2 * GS_BYTES;
    const u32 q_full = shared_address(barriers), gy_full = q_full + 8 * STAGES, empty = gy_full + 8 * STAGES;
    const u32 kv_full = empty + 8 * STAGES, sum_full = kv_full + 8, sum_empty = sum_full + 16;
    const u32 gs_full = sum_empty + 8, gs_empty = gs_full + 16, part_full = gs_empty + 16,
              part_empty = part_full + 8 * PARTS;
    const u32 before_full = part_empty + 8 * PARTS, angles_full = before_full + 8, angles_empty = angles_full + 8;
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
        barrier_init(before_full, 1);
        barrier_init(angles_full, 1);
        barrier_init(angles_empty, 8);
        barrier_init_done();
    }
    const Range of_block(starts, s, batch, block);
    if (threadIdx.x == 0) shared_range = of_block;
    __syncthreads();

    if (threadIdx.x < 128) {
        registers_down<COPY_REGISTERS>();
        const Range range = Range::read(shared_range);
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
#if NORM
            const u32 steps = at.count;
            const KeyTiles key_tiles(q_tiles, gy_tiles, gs_tiles, steps);
            barrier_expect(before_full, tile_bytes(KEYS) + 2 * angle_bytes(KEYS));
            barrier_wait(empty + 8 * at.stage(), at.parity() ^ 1);
            load_before(key_tiles.before, KEYS, k_before_map, before_full, group, block * KEYS, batch);
#if HALF
            if (KeyTiles::COSINES_EARLY)
                load_angles(key_tiles.cosines, KEYS, cosines_map, before_full, block * KEYS);
            at.advance();
            barrier_wait(empty + 8 * at.stage(), at.parity() ^ 1);
            if (!KeyTiles::COSINES_EARLY) {
                load_angles(key_tiles.cosines, KEYS, cosines_map, before_full, block * KEYS);
                for (Ring<2> at_gs = Ring<2>().ahead(steps); at_gs.count < steps + 2; at_gs.advance())
                    barrier_wait(gs_empty + 8 * at_gs.stage(), at_gs.parity() ^ 1);
            }
            load_angles(key_tiles.sines, KEYS, sines_map, before_full, block * KEYS);
#endif
#endif
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
#if HALF
                Ring<1> at_angles;
#endif
                for_last(starts, s, batch, group, block, range, [&](int head, int m) {
#if HALF
                    // The same for all heads of the group.
                    if (head == group * ratio) {
                        barrier_wait(angles_empty, at_angles.parity() ^ 1);
                        barrier_expect(angles_full, 2 * angle_bytes(QUERIES));
                        load_angles(Sides::of(k_tile, QUERIES), QUERIES, cosines_map, angles_full, m * QUERIES);
                        load_angles(Sides::of(v_tile, QUERIES), QUERIES, sines_map, angles_full, m * QUERIES);
                        at_angles.advance();
                    }
#endif
                    const u32 to = q_tiles + at.stage() * PART_BYTES, full = part_full + 8 * at.stage();
                    barrier_wait(part_empty + 8 * at.stage(), at.parity() ^ 1);
                    barrier_expect(full, PART_BYTES);
                    copy_bytes_in(to, sums + (((u64)batch * s.heads + head) * blocks + m) * (QUERIES * HEAD), SUM_BYTES,
                                  full);
#if NORM
                    load_before(Sides::of(to + SUM_BYTES, QUERIES), QUERIES, q_before_map, full, head, m * QUERIES,
                                batch);
#endif
                    at.advance();
                });
            }
        }
    } else {
        registers_up<CONSUMER_REGISTERS>();
        const Range range = Range::read(shared_range);
        const int steps = ratio * max(0, range.end - range.first);
        const int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = thread % 32;
        const float scale = float_of(s.scale), scale_2 = scale * LOG2_E;
        const int first_key = block * KEYS + 64 * consumer;
        Ring<STAGES> at;
        Ring<2> at_gs;
        float scores[QUERIES / 2], gp[QUERIES / 2], gk[HEAD / 2], gv[HEAD / 2], gq[PART_COLUMNS / 2];
        u32 p[QUERIES / 4], gs[QUERIES / 4];
#pragma unroll
        for (int i = 0; i < HEAD / 2; i++) gk[i] = gv[i] = 0.0f;

        // Past the last step the product runs too, on whatever is there or arrives, and nobody looks at it: a branch
        // around it would make the compiler serialise all the loop's products.
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
            exponentials(scores, stat, scale_2);
            hide_unseen(scores, stat, s, first_key, first_key + thread / 32 * 16 + lane / 4, m * QUERIES + offset);
#if HEAD == 128
            // No registers for f32 probabilities here: gS takes the rounded ones.
            round_scores(p, scores);

            // gv += P^T gy, beside gS.
            product_begin();
#pragma unroll
            for (int k = 0; k < QUERIES / 16; k++)
                product_of_registers<1>(gv, p + 4 * k, rows_as_k(gy_tile, QUERIES, 0, k), 1);
            product_commit();
            product_wait<1>();
            pin(gp);
            score_gradients(gs, p, gp, stat);
#else
            product_wait<0>();
            pin(gp);
            score_gradients(gs, p, scores, gp, stat);
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
#if NORM
        barrier_wait(before_full, 0);
        norm_keys(gk, KeyTiles(q_tiles, gy_tiles, gs_tiles, steps), 64 * consumer + thread / 32 * 16, scale,
                  float_of(s.eps));
#endif
        const float gk_scale = NORM ? 1.0f : scale;
        store_rows(k_tile, KEYS, 64 * consumer, gk, gk_scale, gk_scale, 2 + consumer, gk_map, group, first_key,
                   (int)s.keys, batch);
        if (thread == 0) {
            copy_out_commit();
            if (NORM) copy_out_wait();
        }

        // gq of the query blocks that have all their parts now.
        sync_threads(4, 256 + 64);
        // The thread's first row in a block's tile.
        const int warp_row = thread / 32 * 16 + (OWN_ROWS == 1 ? 8 : QUERIES == 128 ? 64 : 0) * consumer;
        const int first_column = OWN_ROWS == 1 || QUERIES == 128 ? 0 : consumer * PART_COLUMNS;
        Ring<PARTS> at_part;
#if NORM
        Angles<OWN_ROWS> angles;
#endif
#if HALF
        Ring<1> at_angles;
#endif
#if GAIN
        // Lane i's is of the group's i-th head.
        float gain_sum = 0.0f;
#endif
        for_last(starts, s, batch, group, block, Range::read(shared_range), [&](int head, int m) {
            float rows[OWN_ROWS][2 * CHUNKS];
            const u32 part = q_tiles + at_part.stage() * PART_BYTES;
#if GAIN
            const float gain = __bfloat162float(gains[head]);
            float terms = 0.0f;
#elif NORM
            constexpr float gain = 1.0f;
#endif
#if HALF
            if (head == group * ratio) {
                barrier_wait(angles_full, at_angles.parity());
                angles.load(Sides::of(k_tile, QUERIES), Sides::of(v_tile, QUERIES), warp_row);
                __syncwarp();
                if (lane == 0) barrier_arrive(angles_empty);
                at_angles.advance();
            }
#endif
            barrier_wait(part_full + 8 * at_part.stage(), at_part.parity());
            load_rows(rows, part, consumer);
#if NORM
            Before<OWN_ROWS> before;
            before.load(Sides::of(part + SUM_BYTES, QUERIES), warp_row);
#endif
            __syncwarp();
            if (lane == 0) barrier_arrive(part_empty + 8 * at_part.stage());
            at_part.advance();
            const int query = m * QUERIES + warp_row + lane / 4;
#pragma unroll
            for (int r = 0; r < OWN_ROWS; r++) {
#pragma unroll
                for (int i = 0; i < 2 * CHUNKS; i++) rows[r][i] *= scale;
                const bool inside = query + 8 * r < (int)s.queries;
#if NORM
                angles.turn_back(r, rows[r]);
                const float term = norm_backward(rows[r], before.x[r], gain, float_of(s.eps));
#endif
#if GAIN
                if (inside) terms += term;
#endif
                store_row(gq_out + ((u64)batch * s.queries + query + 8 * r) * s.gq_row + head * HEAD + first_column,
                          rows[r], inside);
            }
#if GAIN
#pragma unroll
            for (int step = 4; step < 32; step *= 2) terms += __shfl_xor_sync(0xffffffffu, terms, step);
            if (lane == head - group * ratio) gain_sum += terms;
#endif
        });
#if GAIN
        gain_sums[threadIdx.x / 32 - 4][lane] = gain_sum;
        sync_threads(1, 256);
        if (consumer == 0 && thread < ratio) {
            float sum = 0.0f;
#pragma unroll
            for (int warp = 0; warp < 8; warp++) sum += gain_sums[warp][thread];
            partials[((u64)batch * gridDim.x + block) * s.heads + group * ratio + thread] = sum;
        }
#endif
        if (thread == 0) copy_out_wait();
    }
}
