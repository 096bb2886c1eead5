// The gradients of causal attention with grouped keys and values in f32 without tensor cores (src/ops/attention.rs).
//
//   P = exp(scale q k^T - lse) over the keys that a query sees, delta = rowsum(gy y)
//   gS = P (gy v^T - delta), gq = scale gS k, gk = scale gS^T q, gv = P^T gy
//
// Who sees whom: attention_exact_forward.cu. Run in this order:
//   attention_exact_backward_queries: gq, and delta for the other. Grid (b h, ceil(tq / ROWS)): a block takes ROWS
//     queries of a head and walks over the key blocks that they see.
//   attention_exact_backward_keys: gk and gv. Grid (b g, ceil(tk / ROWS)): a block takes ROWS keys of a group and walks
//     over the query blocks that see them, head after head of the group.
// Each block computes the scores that it needs anew: seven products for the formula's five, but no sum over blocks.
// Layout: q f32 [b, tq, h, HEAD], k, v and gv f32 [b, tk, g, HEAD] by strides; y, gy, gq like q, gk like k, dense;
// lse, delta f32 [b, h, tq], starts i32 [b, tk], dense. Head i reads group i / (h / g).
// Invariants: every element of gq, delta, gk and gv is written exactly once; a warp's scores are read by it only; a tile
// is overwritten only after a barrier that follows its last use, its copy shown by another before the next.
// Numerics: f32 throughout; sums ascending over channels, keys, queries and heads: equal bits every time.
//
// The launcher (src/backend/cuda_attention_exact.rs) defines the constants; these the compile check tries:
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=16 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=32 -DWINDOW=0 -DDOCUMENTS=1
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=128 -DWINDOW=1 -DDOCUMENTS=1

#define LANE_ROWS 4
#define LANE_COLUMNS (HEAD == 128 ? 4 : 8)
#include "common/word.cuh"
#include "common/attention_seen.cuh"
#include "common/attention_exact.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_exact_backward_queries(const float *__restrict__ q, const float *__restrict__ k,
                                     const float *__restrict__ v, const float *__restrict__ y,
                                     const float *__restrict__ gy, const float *__restrict__ lse,
                                     STARTS_PARAMETER float *__restrict__ delta, float *__restrict__ gq,
                                     const __grid_constant__ Scalars s) {
    extern __shared__ __align__(16) float memory[];
    __shared__ float log_sums[ROWS], dots[ROWS];
    __shared__ int first_keys[ROWS];
    float *const q_tile = memory, *const gy_tile = q_tile + ROWS * HEAD, *const k_tile = gy_tile + ROWS * HEAD;
    float *const v_tile = k_tile + COLUMNS * HEAD, *const score_tile = v_tile + COLUMNS * HEAD;
    const Lane at;
    const int head = (int)(blockIdx.x % s.heads), batch = (int)(blockIdx.x / s.heads);
    const int group = head / (int)(s.heads / s.groups), queries = (int)s.queries, keys = (int)s.keys;
    const int offset = keys - queries, first_query = (int)(gridDim.y - 1 - blockIdx.y) * ROWS;
    const float scale = float_of(s.scale);
    const float *const k_head = k + batch * s.k.batch + group * s.k.head;
    const float *const v_head = v + batch * s.v.batch + group * s.v.head;
    const u64 dense_row = s.heads * HEAD, dense_head = (u64)batch * queries * dense_row + (u64)head * HEAD;

    const int first_block = first_seen(starts, s, batch, first_query + offset) / COLUMNS;
    const int last_block = (min(first_query + ROWS, queries) - 1 + offset) / COLUMNS;
    load_tile<ROWS, 1>(q_tile, q + batch * s.q.batch + head * s.q.head, s.q.time, first_query, queries);
    load_tile<ROWS, 1>(gy_tile, gy + dense_head, dense_row, first_query, queries);
    load_tile<COLUMNS, 4>(v_tile, v_head, s.v.time, first_block * COLUMNS, keys);
    // In the order of the product with v: where a query sees one key only, or almost, both are the same bits.
    if (threadIdx.x < ROWS) {
        const int query = first_query + (int)threadIdx.x;
        const u64 place = ((u64)batch * s.heads + head) * queries + query, row = dense_head + query * dense_row;
        float dot = 0.0f;
        if (query < queries) {
#pragma unroll 4
            for (int channel = 0; channel < HEAD; channel += 4) {
                const Floats<4> a = load<4>(gy + row + channel), b = load<4>(y + row + channel);
#pragma unroll
                for (int n = 0; n < 4; n++) dot = fmaf(a.at[n], b.at[n], dot);
            }
            delta[place] = dot;
        }
        dots[threadIdx.x] = dot;
        log_sums[threadIdx.x] = query < queries ? lse[place] : infinity();
        first_keys[threadIdx.x] = first_seen(starts, s, batch, query + offset);
    }
    copies_done();
    __syncthreads();
    load_tile<COLUMNS, 4>(k_tile, k_head, s.k.time, first_block * COLUMNS, keys);

    float log_sum[LANE_ROWS], dot[LANE_ROWS], sums[LANE_ROWS][LANE_CHANNELS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++) {
        log_sum[i] = log_sums[at.tile_row(i)];
        dot[i] = dots[at.tile_row(i)];
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++) sums[i][j] = 0.0f;
    }

    // The warp's queries: the positions of the first and of the last, and what these see first.
    const int position = first_query + at.warp_row + offset;
    const int last_position = min(position + WARP_ROWS, keys) - 1;
    const int first_key = first_keys[at.warp_row], last_first_key = first_keys[at.warp_row + WARP_ROWS - 1];
    for (int block = first_block; block <= last_block; block++) {
        const int key = block * COLUMNS;
        const bool sees = position < keys && key <= last_position && key + COLUMNS > first_key;
        float gp[LANE_ROWS][LANE_COLUMNS];
        if (sees) rows_by_columns(gp, gy_tile, v_tile, at);
        copies_done();
        __syncthreads();
        if (block < last_block) load_tile<COLUMNS, 4>(v_tile, v_head, s.v.time, key + COLUMNS, keys);
        if (sees) {
            float scores[LANE_ROWS][LANE_COLUMNS];
            rows_by_columns(scores, q_tile, k_tile, at);
            const bool all = key + COLUMNS - 1 <= position && !((WINDOW || DOCUMENTS) && key < last_first_key);
#pragma unroll
            for (int i = 0; i < LANE_ROWS; i++) {
                // From the thread's first column on.
                const int begin = key + 4 * at.column;
                const int last = first_query + at.tile_row(i) + offset - begin;
                const int first = first_keys[at.tile_row(i)] - begin;
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; j++) {
                    const int column = j / 4 * 32 + j % 4;
                    const float p = exp2_fast(fmaf(scores[i][j], scale, -log_sum[i]) * LOG2_E);
                    gp[i][j] = all || (column <= last && column >= first) ? p * (gp[i][j] - dot[i]) : 0.0f;
                }
            }
            store_scores(score_tile, gp, at);
            scores_by_channels(sums, score_tile, k_tile, at);
        }
        copies_done();
        __syncthreads();
        if (block < last_block) load_tile<COLUMNS, 4>(k_tile, k_head, s.k.time, key + COLUMNS, keys);
    }

#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++) {
        const int query = first_query + at.tile_row(i);
        if (query < queries) store_channels(gq + dense_head + query * dense_row, sums[i], scale, at);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_exact_backward_keys(const float *__restrict__ q, const float *__restrict__ k,
                                  const float *__restrict__ v, const float *__restrict__ gy,
                                  const float *__restrict__ lse, const float *__restrict__ delta,
                                  STARTS_PARAMETER float *__restrict__ gk, float *__restrict__ gv,
                                  const __grid_constant__ Scalars s) {
    extern __shared__ __align__(16) float memory[];
    __shared__ float log_sums[COLUMNS], dots[COLUMNS];
    __shared__ int first_keys[COLUMNS];
    float *const k_tile = memory, *const v_tile = k_tile + ROWS * HEAD, *const q_tile = v_tile + ROWS * HEAD;
    float *const gy_tile = q_tile + COLUMNS * HEAD, *const score_tile = gy_tile + COLUMNS * HEAD;
    const Lane at;
    const int group = (int)(blockIdx.x % s.groups), batch = (int)(blockIdx.x / s.groups);
    const int ratio = (int)(s.heads / s.groups), queries = (int)s.queries, keys = (int)s.keys;
    const int offset = keys - queries, first_of_keys = (int)blockIdx.y * ROWS;
    const int last_of_keys = min(first_of_keys + ROWS, keys) - 1;
    const float scale = float_of(s.scale);
    const u64 dense_row = s.heads * HEAD;

    load_tile<ROWS, 1>(k_tile, k + batch * s.k.batch + group * s.k.head, s.k.time, first_of_keys, keys);
    load_tile<ROWS, 1>(v_tile, v + batch * s.v.batch + group * s.v.head, s.v.time, first_of_keys, keys);

    // The blocks of queries that see a key of these.
    const int first_block = max(0, first_of_keys - offset) / COLUMNS;
    int end = (queries + COLUMNS - 1) / COLUMNS;
    if (WINDOW || DOCUMENTS) {
        // What a block sees first does not decrease from block to block.
        const int blocks = end;
        end = first_block;
        for (int seen = THREADS; seen == THREADS; end += seen) {
            const int block = end + (int)threadIdx.x;
            seen = __syncthreads_count(block < blocks &&
                                       first_seen(starts, s, batch, block * COLUMNS + offset) <= last_of_keys);
        }
    }
    const int blocks = max(0, end - first_block), steps = ratio * blocks;

    const auto load_queries = [&](int step) {
        const int head = group * ratio + step / blocks, query = (first_block + step % blocks) * COLUMNS;
        load_tile<COLUMNS, 4>(q_tile, q + batch * s.q.batch + head * s.q.head, s.q.time, query, queries);
    };
    const auto load_gradients = [&](int step) {
        const int head = group * ratio + step / blocks, query = (first_block + step % blocks) * COLUMNS;
        load_tile<COLUMNS, 4>(gy_tile, gy + (u64)batch * queries * dense_row + (u64)head * HEAD, dense_row, query,
                              queries);
    };

    float gk_sums[LANE_ROWS][LANE_CHANNELS], gv_sums[LANE_ROWS][LANE_CHANNELS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++)
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++) gk_sums[i][j] = gv_sums[i][j] = 0.0f;
    if (steps > 0) load_gradients(0);
    copies_done();
    __syncthreads();
    if (steps > 0) load_queries(0);

    // The warp's keys.
    const int first_key = first_of_keys + at.warp_row, last_key = first_key + WARP_ROWS - 1;
    for (int step = 0; step < steps; step++) {
        const int head = group * ratio + step / blocks, query = (first_block + step % blocks) * COLUMNS;
        // What the queries are told; a query past the end has no probabilities.
        if (threadIdx.x < COLUMNS) {
            const int own = query + (int)threadIdx.x;
            const u64 place = ((u64)batch * s.heads + head) * queries + own;
            log_sums[threadIdx.x] = own < queries ? lse[place] : infinity();
            dots[threadIdx.x] = own < queries ? delta[place] : 0.0f;
            first_keys[threadIdx.x] = first_seen(starts, s, batch, own + offset);
        }
        float gp[LANE_ROWS][LANE_COLUMNS];
        const bool is_before = first_key <= query + COLUMNS - 1 + offset;
        if (is_before) rows_by_columns(gp, v_tile, gy_tile, at);
        copies_done();
        __syncthreads();
        const bool sees = is_before && last_key >= first_keys[0];
        if (sees) {
            float scores[LANE_ROWS][LANE_COLUMNS];
            rows_by_columns(scores, k_tile, q_tile, at);
            const bool all = last_key <= query + offset &&
                             !((WINDOW || DOCUMENTS) && first_key < first_keys[COLUMNS - 1]);
#pragma unroll
            for (int j = 0; j < LANE_COLUMNS; j++) {
                const int column = at.tile_column(j);
                const float log_sum = log_sums[column], dot = dots[column];
                const int first = first_keys[column], last = query + column + offset;
#pragma unroll
                for (int i = 0; i < LANE_ROWS; i++) {
                    const int key = first_of_keys + at.tile_row(i);
                    const float p = exp2_fast(fmaf(scores[i][j], scale, -log_sum) * LOG2_E);
                    scores[i][j] = all || (key <= last && key >= first) ? p : 0.0f;
                    gp[i][j] = scores[i][j] * (gp[i][j] - dot);
                }
            }
            store_scores(score_tile, scores, at);
            scores_by_channels(gv_sums, score_tile, gy_tile, at);
        }
        __syncthreads();
        if (step + 1 < steps) load_gradients(step + 1);
        if (sees) {
            store_scores(score_tile, gp, at);
            scores_by_channels(gk_sums, score_tile, q_tile, at);
        }
        copies_done();
        __syncthreads();
        if (step + 1 < steps) load_queries(step + 1);
    }

#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++) {
        const int key = first_of_keys + at.tile_row(i);
        if (key >= keys) continue;
        store_channels(gk + (((u64)batch * keys + key) * s.groups + group) * HEAD, gk_sums[i], scale, at);
        store_channels(gv + batch * s.gv.batch + key * s.gv.time + group * s.gv.head, gv_sums[i], 1.0f, at);
    }
}
