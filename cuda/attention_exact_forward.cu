// Causal attention with grouped keys and values in f32 without tensor cores, forward (src/ops/attention.rs).
//
//   y = softmax(scale q k^T) v over the keys that a query sees, lse = log sum exp(scale q k^T) over the same
//
// Query i stands at position p = i + tk - tq and sees the keys first(p) ... p: first is 0, or with WINDOW
// p - window + 1, or with DOCUMENTS starts[p], whichever is larger. `starts` never decreases in a sequence; scale > 0.
// Layout: q f32 [b, tq, h, HEAD], k, v f32 [b, tk, g, HEAD] by strides, y like q but dense, lse f32 [b, h, tq],
// starts i32 [b, tk], dense. Head i reads group i / (h / g).
// Grid: (b h, ceil(tq / ROWS)): a block takes ROWS queries of a head, those that see most keys first.
// A block walks over the blocks of COLUMNS keys that its queries see, first to last: scores, softmax, probabilities
// times values. The next keys arrive during the latter product, the next values during the former.
// Invariants: every element of y and lse is written exactly once; a warp's probabilities are read by that warp only; a
// tile is overwritten only after a barrier that follows its last use.
// Numerics: f32 throughout; a score's channels and a row's keys ascending, the eight threads of a row by butterfly:
// equal bits every time.
//
// The launcher (src/backend/cuda_attention_exact.rs) defines the constants; these the compile check tries:
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=16 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=32 -DWINDOW=0 -DDOCUMENTS=1
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=128 -DWINDOW=1 -DDOCUMENTS=1

#define LANE_ROWS (HEAD == 128 ? 4 : 8)
#define LANE_COLUMNS 8
#include "common/word.cuh"
#include "common/attention_seen.cuh"
#include "common/attention_exact.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_exact_forward(const float *__restrict__ q, const float *__restrict__ k, const float *__restrict__ v,
                            float *__restrict__ y, float *__restrict__ lse,
                            STARTS_PARAMETER const __grid_constant__ Scalars s) {
    extern __shared__ __align__(16) float memory[];
    __shared__ int first_keys[ROWS];
    float *const q_tile = memory, *const k_tile = q_tile + ROWS * HEAD, *const v_tile = k_tile + COLUMNS * HEAD;
    float *const exponentials = v_tile + COLUMNS * HEAD;
    const Lane at;
    const int head = (int)(blockIdx.x % s.heads), batch = (int)(blockIdx.x / s.heads);
    const int group = head / (int)(s.heads / s.groups), queries = (int)s.queries, keys = (int)s.keys;
    const int offset = keys - queries, first_query = (int)(gridDim.y - 1 - blockIdx.y) * ROWS;
    const float scale = float_of(s.scale), scale_2 = scale * LOG2_E;
    const float *const k_head = k + batch * s.k.batch + group * s.k.head;
    const float *const v_head = v + batch * s.v.batch + group * s.v.head;

    const int first_block = first_seen(starts, s, batch, first_query + offset) / COLUMNS;
    const int last_block = (min(first_query + ROWS, queries) - 1 + offset) / COLUMNS;
    load_tile<ROWS, 1>(q_tile, q + batch * s.q.batch + head * s.q.head, s.q.time, first_query, queries);
    load_tile<COLUMNS, 4>(k_tile, k_head, s.k.time, first_block * COLUMNS, keys);
    if (threadIdx.x < ROWS) first_keys[threadIdx.x] = first_seen(starts, s, batch, first_query + threadIdx.x + offset);
    copies_done();
    __syncthreads();
    load_tile<COLUMNS, 4>(v_tile, v_head, s.v.time, first_block * COLUMNS, keys);

    // The warp's queries: the positions of the first and of the last, and what these see first.
    const int position = first_query + at.warp_row + offset;
    const int last_position = min(position + WARP_ROWS, keys) - 1;
    const int first_key = first_keys[at.warp_row], last_first_key = first_keys[at.warp_row + WARP_ROWS - 1];
    float maximum[LANE_ROWS], sum[LANE_ROWS], sums[LANE_ROWS][LANE_CHANNELS];
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++) {
        maximum[i] = -infinity();
        sum[i] = 0.0f;
#pragma unroll
        for (int j = 0; j < LANE_CHANNELS; j++) sums[i][j] = 0.0f;
    }

    for (int block = first_block; block <= last_block; block++) {
        const int key = block * COLUMNS;
        const bool sees = position < keys && key <= last_position && key + COLUMNS > first_key;
        float scores[LANE_ROWS][LANE_COLUMNS];
        if (sees) rows_by_columns(scores, q_tile, k_tile, at);
        copies_done();
        __syncthreads();
        if (block < last_block) load_tile<COLUMNS, 4>(k_tile, k_head, s.k.time, key + COLUMNS, keys);
        if (sees) {
            if (key + COLUMNS - 1 > position || ((WINDOW || DOCUMENTS) && key < last_first_key)) {
#pragma unroll
                for (int i = 0; i < LANE_ROWS; i++) {
                    // From the thread's first column on.
                    const int begin = key + 4 * at.column;
                    const int last = first_query + at.tile_row(i) + offset - begin;
                    const int first = first_keys[at.tile_row(i)] - begin;
#pragma unroll
                    for (int j = 0; j < LANE_COLUMNS; j++) {
                        const int column = j / 4 * 32 + j % 4;
                        if (column > last || column < first) scores[i][j] = -infinity();
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < LANE_ROWS; i++) {
                float top = scores[i][0];
#pragma unroll
                for (int j = 1; j < LANE_COLUMNS; j++) top = fmaxf(top, scores[i][j]);
                top = fmaxf(maximum[i], row_maximum(top));
                // A row that has seen no key yet: any finite value does.
                const float base = top == -infinity() ? 0.0f : top;
                // Exactly 1 where the maximum stays: anything else would add up over the blocks.
                const float shrink = exp2_fast((maximum[i] - base) * scale_2);
                maximum[i] = top;
                float part = 0.0f;
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; j++) {
                    scores[i][j] = exp2_fast((scores[i][j] - base) * scale_2);
                    part += scores[i][j];
                }
                sum[i] = fmaf(sum[i], shrink, part);
#pragma unroll
                for (int j = 0; j < LANE_CHANNELS; j++) sums[i][j] *= shrink;
            }
            store_scores(exponentials, scores, at);
            scores_by_channels(sums, exponentials, v_tile, at);
        }
        copies_done();
        __syncthreads();
        if (block < last_block) load_tile<COLUMNS, 4>(v_tile, v_head, s.v.time, key + COLUMNS, keys);
    }

#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++) {
        const int query = first_query + at.tile_row(i);
        const float total = row_sum(sum[i]);
        if (query >= queries) continue;
        store_channels(y + (((u64)batch * queries + query) * s.heads + head) * HEAD, sums[i], 1.0f / total, at);
        if (at.column == 0)
            lse[((u64)batch * s.heads + head) * queries + query] = fmaf(maximum[i], scale, logf(total));
    }
}
