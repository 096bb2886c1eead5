// What attention's backward is told about each query (attention_backward.cu, run next), and its turns set back.
//
//   stats: lse / ln 2, delta = rowsum(gy y), and with DOCUMENTS the first position that the query sees (an i32)
//
// Layout: y, gy bf16 [b, tq, h, HEAD], dense; lse f32 [b, h, tq]; starts i32 [b, tk]. With m = ceil(tq / QUERIES):
// stats f32 [b, h, m, STATS, QUERIES], turns u32 [b, h, m].
// Grid: HEAD / 8 threads a row, 256 a block: ceil(b m QUERIES h HEAD / 2048) blocks.
// Invariants: every element of stats and turns is written; a query past the end has lse = inf and delta = 0.
// Numerics: f32; a thread adds its 8 products in order, the threads are added by butterfly: equal bits every time.
//
// The launcher (src/backend/cuda_attention.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DHEAD=32 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=64 -DWINDOW=0 -DDOCUMENTS=0
// variant: -DHEAD=64 -DWINDOW=1 -DDOCUMENTS=1
// variant: -DHEAD=128 -DWINDOW=0 -DDOCUMENTS=1

#include <cuda_bf16.h>
#define KEYS 128
#include "common/word.cuh"
#include "common/hopper.cuh"
#include "common/attention_seen.cuh"
#include "common/attention.cuh"

extern "C" __global__ void __launch_bounds__(256)
    attention_rows(const uint4 *__restrict__ y, const uint4 *__restrict__ gy, const float *__restrict__ lse,
                   STARTS_PARAMETER float *__restrict__ stats, u32 *__restrict__ turns,
                   const __grid_constant__ Scalars s) {
    constexpr int LANES = HEAD / 8;
    const u64 index = ((u64)blockIdx.x * 256 + threadIdx.x) / LANES;
    const int lane = threadIdx.x % LANES, blocks = query_blocks(s), head = (int)(index % s.heads);
    const u64 place = index / s.heads;
    const int query = (int)(place % (blocks * QUERIES)), batch = (int)(place / (blocks * QUERIES));
    float sum = 0.0f;
    const bool inside = batch < (int)s.batch && query < (int)s.queries;
    if (inside) {
        const u64 at = (((u64)batch * s.queries + query) * s.heads + head) * LANES + lane;
        const uint4 a = y[at], b = gy[at];
        const u32 as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum = fmaf(__uint_as_float(as[i] << 16), __uint_as_float(bs[i] << 16), sum);
            sum = fmaf(__uint_as_float(as[i] & 0xffff0000), __uint_as_float(bs[i] & 0xffff0000), sum);
        }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane != 0 || batch >= (int)s.batch) return;
    const u64 all_head = (u64)batch * s.heads + head, block = all_head * blocks + query / QUERIES;
    float *to = stats + block * (STATS * QUERIES) + query % QUERIES;
    to[0] = inside ? lse[all_head * s.queries + query] * LOG2_E : infinity();
    to[QUERIES] = sum;
#if DOCUMENTS
    to[2 * QUERIES] = __int_as_float(first_seen(starts, s, batch, query + (int)s.keys - (int)s.queries));
#endif
    if (query % QUERIES == 0) turns[block] = 0;
}
