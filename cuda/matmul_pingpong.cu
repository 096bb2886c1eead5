// matmul.cu's product on a schedule that hides the epilogue: for long a and little k, where an epilogue weighs most.
//
//   c[z, m, n] = f(sum over k of a[z, m, k] b[z, n, k])
//
// Layout, f, tensor maps and numerics are those of `matmul` in matmul.cu, without splits; it too wants rows of a
// multiple of 16 bytes.
//
// Grid: one dimension, at most a block an SM; 384 threads. A panel is the TILE_N columns of b that a tile's products
// need; c has ceil(n / TILE_N) z of them. With `panels` <= blocks, blocks / panels of them share a panel and take its
// tiles of ROWS rows in turn; otherwise a block takes every gridDim-th panel whole. Consecutive blocks have different
// panels, so that they read the same rows of a at the same time, which one GPC's blocks then fetch from the L2 once.
// One thread of warpgroup 0 fetches. Warpgroups 1 and 2 take the block's tiles by turns, a whole tile each: one
// multiplies while the other's sums go through the epilogue, its part of e having arrived meanwhile.
// PANEL > 0: b's panel stays in shared memory, PANEL slices of 64 along k (k <= 64 PANEL); the ring has slices of a.
// PANEL = 0: the ring has slices of a and b, for every k.
// AHEAD > 0: so many tiles ahead, a block's share of a's rows is fetched to the L2; helps where reads come late.
// Shared bytes: SHARED_BYTES.
// EPILOGUE 5, this kernel's only, of a tile of 64 rows: common/epilogue_qk_norm.cuh.
// Invariants: as in matmul.cu. A warpgroup begins a tile only when the other has seen all slices of the tile before:
// the turns keep every barrier at most one phase away from whoever waits for it.
//
// The launcher (src/backend/cuda_pingpong.rs) defines the constants; these are the forms that it chooses from, which
// the compile check tries:
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=1 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=1 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=1
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=2
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=4 -DSLOPE=5e-1f
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=64 -DHALF=32 -DGAIN=1
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=64 -DHALF=32 -DGAIN=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=64 -DHALF=8 -DGAIN=1
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=64 -DHALF=0 -DGAIN=1
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=32 -DHALF=16 -DGAIN=1
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=128 -DHALF=64 -DGAIN=1
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=5 -DHEAD=128 -DHALF=64 -DGAIN=0
// variant: -DROWS=128 -DTILE_N=128 -DPANEL=0 -DSTAGES=5 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=128 -DTILE_N=128 -DPANEL=0 -DSTAGES=5 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=6 -DSCALE=__nv_bfloat16
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=7
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=8 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=10
// variant: -DROWS=64 -DTILE_N=128 -DPANEL=8 -DSTAGES=4 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=8
// variant: -DROWS=128 -DTILE_N=128 -DPANEL=0 -DSTAGES=5 -DAHEAD=0 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=6 -DSCALE=__nv_bfloat16

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"
#include "common/hopper.cuh"
#include "common/product.cuh"
#if EPILOGUE == 5
#include "common/epilogue_qk_norm.cuh"
#endif
#include "common/gated.cuh"

#define HALVES (ROWS / 64)
#define B_BOXES (TILE_N / 64)
#define PANEL_SLICE (B_BOXES * BOX)
#define SLICE (HALVES * BOX + (PANEL ? 0 : PANEL_SLICE)) // of the ring
#define WARPS 8                                          // that multiply
#define SIDES (UNGATES ? 2 : 1)                          // of e and c
#define BUFFERS (HALVES * CHUNKS * SIDES)                // of such a warp, for its rows of c, and of e before
#define SHARED_BYTES (1024 + PANEL * (PANEL_SLICE + 8) + STAGES * (SLICE + 16) + WARPS * (BUFFERS * CHUNK + 8))

static_assert(ROWS % 64 == 0 && TILE_N % 64 == 0, "a form of tile");
static_assert(SHARED_BYTES <= 232448, "what a block may have");
static_assert(!(GATES || UNGATES) || (TILE_N % 128 == 0 && sizeof(OUT) == 2), "a form of pairs");

struct Scalars {
    u64 m, n, k;
    u64 batches; // z
    u64 splits;  // 1
#if EPILOGUE == 5
    HeadScalars heads;
#endif
};

// What a block multiplies: in panels panel0, panel0 + gridDim, ... the tiles row0, row0 + step, ...
struct Walk {
    u32 rows, columns, slices, panels; // of c, in tiles; of k; columns of all z
    u32 step, row0, panel0;
    u32 mine, total; // the block's tiles in a panel, and in all of its panels

    __device__ __forceinline__ explicit Walk(const Scalars &s) {
        rows = (u32)((s.m + ROWS - 1) / ROWS);
        columns = (u32)((s.n + TILE_COLUMNS - 1) / TILE_COLUMNS);
        slices = (u32)((s.k + DEPTH - 1) / DEPTH);
        panels = columns * (u32)s.batches;
        step = max(gridDim.x / panels, 1u);
        panel0 = blockIdx.x % panels;
        row0 = blockIdx.x / panels;
        mine = row0 < step && row0 < rows ? (rows - row0 + step - 1) / step : 0;
        total = mine * ((panels - panel0 + gridDim.x - 1) / gridDim.x);
    }
};

// The block's shared memory, by address, and where a thread is in the ring of slices.
struct Ring {
    u32 panel, slices, staging;
    u32 panel_full, full, empty, extra; // barriers: a slice of the panel; a slice of the ring, twice; a warp, for e
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ explicit Ring(u32 shared) : panel((shared + 1023) & ~1023u) {
        slices = panel + PANEL * PANEL_SLICE;
        staging = slices + STAGES * SLICE;
        full = staging + WARPS * BUFFERS * CHUNK;
        empty = full + STAGES * 8;
        extra = empty + STAGES * 8;
        panel_full = extra + WARPS * 8;
    }

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ void skip(u32 count) {
        for (stage += count; stage >= STAGES; stage -= STAGES) parity ^= 1;
    }
};

__device__ __forceinline__ void fetch_b(const TensorMap &b_map, u32 to, u32 full, u32 column, u32 k, u32 batch) {
#pragma unroll
    for (int i = 0; i < B_BOXES; i++) {
        const u32 half = GATES ? i / (B_BOXES / 2) : 0, n = column + i * 64 - half * TILE_COLUMNS;
        copy_in(to + i * BOX, b_map, full, B_K_MAJOR ? k : n, B_K_MAJOR ? n : k, GATES ? half : batch);
    }
}

// Fills the panel and the ring; one thread.
__device__ __forceinline__ void fetch(const TensorMap &a_map, const TensorMap &b_map, const Walk &walk, Ring ring) {
    if (walk.total == 0) return;
    for (u32 panel = walk.panel0; panel < walk.panels; panel += gridDim.x) {
        const u32 batch = panel / walk.columns, column = (panel - batch * walk.columns) * TILE_COLUMNS;
        if (PANEL) { // once all slices are released, so is the panel before
            Ring all = ring;
            for (int i = 0; i < STAGES; i++, all.advance()) barrier_wait(all.empty + all.stage * 8, all.parity ^ 1);
        }
        for (u32 row = walk.row0; row < walk.rows; row += walk.step) {
            for (u32 slice = 0; slice < walk.slices; slice++) {
                const u32 full = ring.full + ring.stage * 8, a = ring.slices + ring.stage * SLICE, k = slice * DEPTH;
                if (PANEL && row == walk.row0) {
                    const u32 there = ring.panel_full + slice * 8;
                    barrier_expect(there, PANEL_SLICE);
                    fetch_b(b_map, ring.panel + slice * PANEL_SLICE, there, column, k, batch);
                }
                barrier_wait(ring.empty + ring.stage * 8, ring.parity ^ 1);
                barrier_expect(full, SLICE);
#pragma unroll
                for (int i = 0; i < HALVES; i++) {
                    const u32 m = row * ROWS + i * 64;
                    copy_in(a + i * BOX, a_map, full, A_K_MAJOR ? k : m, A_K_MAJOR ? m : k, batch);
                }
                if (AHEAD && slice % walk.columns == column / TILE_COLUMNS) { // the blocks of a row share its slices
#pragma unroll
                    for (int i = 0; i < HALVES; i++) {
                        const u32 m = (row + AHEAD * walk.step) * ROWS + i * 64;
                        prefetch_box(a_map, A_K_MAJOR ? k : m, A_K_MAJOR ? m : k, batch);
                    }
                }
                if (!PANEL) fetch_b(b_map, a + HALVES * BOX, full, column, k, batch);
                ring.advance();
            }
        }
    }
}

// Multiplies every second tile of the block and writes it; a warpgroup.
__device__ __forceinline__ void multiply(const TensorMap &c_map, const TensorMap &e_map, const void *scale,
                                         const Walk &walk,
#if EPILOGUE == 5
                                         Heads heads,
#endif
                                         const Scalars &s, Ring ring) {
    constexpr u32 a_step = A_K_MAJOR ? 2 : 128, b_step = B_K_MAJOR ? 2 : 128; // of 16 along k, in 16 bytes
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const u32 staging = ring.staging + warp * BUFFERS * CHUNK, extra = ring.extra + warp * 8;
    u32 extra_parity = 0, last = ~0u;
    float d[HALVES][TILE_N / 2];
    ring.skip(group * walk.slices);
    for (u32 index = group; index < walk.total; index += 2) {
        const u32 ordinal = index / walk.mine, panel = walk.panel0 + ordinal * gridDim.x, part = panel / walk.columns;
        const u32 column = (panel - part * walk.columns) * TILE_COLUMNS;
        const u32 row = (walk.row0 + (index - ordinal * walk.mine) * walk.step) * ROWS + warp % 4 * 16;
        if (READS_E) {
            if (lane == 0) {
                copy_out_wait();
                barrier_expect(extra, BUFFERS * CHUNK);
#pragma unroll
                for (int i = 0; i < BUFFERS; i++) {
                    const int chunk = i / SIDES;
                    const u32 x = column + chunk % CHUNKS * COLUMNS, y = row + chunk / CHUNKS * 64;
                    copy_in(staging + i * CHUNK, e_map, extra, x, y, UNGATES ? i % SIDES : part);
                }
            }
            __syncwarp();
        }
#if EPILOGUE == 5
        heads.begin(column, row, lane, d[0]);
#endif
        const bool fresh = PANEL && ordinal != last;
        last = ordinal;
        if (index > 0) sync_threads(1 + group, 256); // its turn
        u32 used = 0;
        for (u32 slice = 0; slice < walk.slices; slice++) {
            const u32 at = ring.slices + ring.stage * SLICE;
            const u64 a = operand(at), b = operand(PANEL ? ring.panel + slice * PANEL_SLICE : at + HALVES * BOX);
            if (fresh) barrier_wait(ring.panel_full + slice * 8, ordinal & 1);
            barrier_wait(ring.full + ring.stage * 8, ring.parity);
            product_begin();
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k++) {
#pragma unroll
                for (int i = 0; i < HALVES; i++) {
                    product<!A_K_MAJOR, !B_K_MAJOR>(d[i], a + i * (BOX / 16) + k * a_step, b + k * b_step,
                                                    slice > 0 || k > 0);
                }
            }
            product_commit();
            if (slice + 1 == walk.slices && index + 1 < walk.total) arrive_threads(2 - group, 256); // the other's turn
            product_wait<1>();
            if (slice > 0 && lane == 0) barrier_arrive(used);
            __syncwarp();
            used = ring.empty + ring.stage * 8;
            ring.advance();
        }
        product_wait<0>();
        if (lane == 0) barrier_arrive(used);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < HALVES; i++) pin(d[i]);
        ring.skip(walk.slices); // the other's
#ifdef SCALE
#pragma unroll
        for (int i = 0; i < HALVES; i++) scale_columns(d[i], static_cast<const SCALE *>(scale), column, s.n, lane);
#endif
        if (READS_E) {
            barrier_wait(extra, extra_parity);
            extra_parity ^= 1;
        } else {
            if (lane == 0) copy_out_wait();
            __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < HALVES; i++) {
            const u32 y = row + i * 64;
            if constexpr (GATES) {
                write_gated(d[i], c_map, e_map, staging + i * 2 * CHUNK, column, y, s.m, s.n, lane);
            } else if constexpr (UNGATES) {
#pragma unroll
                for (int j = 0; j < CHUNKS; j++) {
                    const u32 buffers = staging + (i * CHUNKS + j) * 2 * CHUNK;
                    write_ungated(d[i] + j * (COLUMNS / 2), c_map, buffers, column + j * COLUMNS, y, s.m, s.n, lane);
                }
            } else {
                write_chunks<false, CHUNKS>(d[i], c_map, staging + i * CHUNKS * CHUNK, column, y, part, s.m, s.n, lane);
            }
        }
        if constexpr (WRITES_E && !GATES) {
            if (lane == 0) copy_out_wait();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < HALVES; i++) {
                const u32 buffers = staging + i * CHUNKS * CHUNK;
                write_chunks<true, CHUNKS>(d[i], e_map, buffers, column, row + i * 64, part, s.m, s.n, lane);
            }
        }
#if EPILOGUE == 5
        static_assert(HALVES == 1, "rows of one product");
        if (heads.has(column)) {
            heads.apply(d[0]);
            if (lane == 0) copy_out_wait();
            __syncwarp();
            write_chunks<true, CHUNKS>(d[0], e_map, staging, column, row, part, s.m, s.heads.normed, lane);
        }
#endif
    }
    if (lane == 0) copy_out_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    matmul_pingpong(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                    const __grid_constant__ TensorMap c_map,
#if HAS_E
                    const __grid_constant__ TensorMap e_map, const bf16 *, const bf16 *, OUT *, OUT *,
#else
                    const bf16 *, const bf16 *, OUT *,
#endif
#if EPILOGUE == 5
                    HEAD_PARAMETERS
#endif
#ifdef SCALE
                    const SCALE *scale,
#endif
                    const __grid_constant__ Scalars s) {
#if !HAS_E
    const TensorMap &e_map = c_map; // not used
#endif
#ifndef SCALE
    const void *scale = nullptr;
#endif
    extern __shared__ unsigned char shared[];
    const Ring ring(shared_address(shared));
    const Walk walk(s);
    if (threadIdx.x == 0) {
        prefetch(a_map);
        prefetch(b_map);
        prefetch(c_map);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(ring.full + i * 8, 1);
            barrier_init(ring.empty + i * 8, WARPS / 2);
        }
        for (int i = 0; i < WARPS; i++) barrier_init(ring.extra + i * 8, 1);
        for (int i = 0; i < PANEL; i++) barrier_init(ring.panel_full + i * 8, 1);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x == 0) fetch(a_map, b_map, walk, ring);
    } else {
        registers_up<232>();
#if EPILOGUE == 5
        multiply(c_map, e_map, scale, walk, Heads(s.heads, cosines, sines, HEAD_GAINS), s, ring);
#else
        multiply(c_map, e_map, scale, walk, s, ring);
#endif
    }
}
