// bf16 matrix products with f32 sums, for every operand layout of a linear layer (src/ops/linear.rs).
//
//   c[z, m, n] = f(sum over k of a[z, m, k] b[z, n, k])
//
//   forward          y[t, o]  = x[t, i] w[o, i]^T       a = x and b = w, both K-major
//   input gradient   gx[t, i] = gy[t, o] w[o, i]        a = gy K-major, b = w not
//   weight gradient  gw[o, i] (+)= gy[t, o]^T x[t, i]   a = gy and b = x, neither K-major; k split over blocks
//
// Layout: all dense, row-major. a is [z, m, k] if A_K_MAJOR, else [z, k, m]; b is [z, n, k] if B_K_MAJOR, else
// [z, k, n]; c, and e where there is one, [z, m, n] of OUT. With `splits` = s > 1, c is an f32 workspace [z s, m, n]:
// its block z s + i holds the sum over the i-th part of k, and matmul_sum adds the parts. f is the EPILOGUE:
//   0  x
//   1  max(x, 0)^2: the squared ReLU. Its derivative is 2 sqrt(f), so a backward needs nothing but the stored output
//   2  x 2 sqrt(e): the backward of 1 on an input gradient, e being 1's output
//   3  leaky_relu(x)^2 with SLOPE below zero; e is written too: x itself, which the backward needs
//   4  x 2 (e < 0 ? SLOPE^2 e : e): the backward of 3, e being what 3 wrote there
//   6  e + scale[n] x, the scales of type SCALE in a buffer after the others; or e + x, without SCALE
//   7, 8, 10  gated pairs (common/gated.cuh; `matmul` only, z is 1): for 7 and 10 b is [2, n, k], for 7 and 8 e is
//      [2, m, n], and so is c for 8, as their tensor maps have them. A tile of 7 and 10 is TILE_N / 2 columns of c
//   9  CAP tanh(x / CAP)
//
// Entries:
//   matmul      (if TILE_N is defined) wants rows of a, b, c and e of a multiple of 16 bytes, for the copy engine
//   matmul_any  (if not) takes every shape, several times slower; grid and shapes beside it
//   matmul_sum  (if not) adds the parts of k in order, and what the output held
//
// matmul. Grid: one dimension, at most a block an SM; 384 threads. A tile is 128 x TILE_N. A block walks over tiles:
// one thread of warpgroup 0 keeps a ring of STAGES slices of a and b, 64 along k, filled; warpgroups 1 and 2 multiply
// 64 of the tile's rows each out of it, sums in registers. At a tile's end every warp hands its 16 rows to the copy
// engine in chunks 128 bytes wide, through STAGING buffers of its own, while the next tile's slices arrive.
// Order: consecutive blocks start on one GPC (seen on an H100), and its reads of the same lines are merged before the
// L2 while they come close in time. So tiles that share rows of a or b over the same part of k are consecutive, and
// parts interleave their slices. Clusters with multicast, which the hardware spreads over the GPCs, were slower.
// Shared bytes: SHARED_BYTES. Tensor maps: rank 3, 128-byte swizzle; boxes of a and b [1, 64, 64], of c and e
// [1, 16, 128 / sizeof(OUT)].
// Invariants: every element of c (and of e, if EPILOGUE is 3) is written exactly once; what of a box lies outside a
// tensor arrives as zeros or is not written. A slice is released by each of the 8 multiplying warps once the tensor
// cores have read it.
// Numerics: f32 sums on the tensor cores, 16 of k at a time, ascending (they truncate: about 1e-5 of a sum of random
// signs over 16,384 k); one rounding to OUT at the end. No atomics: the order of every sum follows from the shape, the
// splits and the entry, so that equal calls give equal bits.
//
// The launcher defines the constants; these are the forms that the compile check tries:
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=0 -DB_K_MAJOR=0 -DOUT=float -DEPILOGUE=0
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=1
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=2
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DTILE_N=192 -DSTAGES=4 -DSTAGING=3 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=float -DEPILOGUE=0
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=2
// variant: -DTILE_N=192 -DSTAGES=4 -DSTAGING=3 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=2
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=4 -DSLOPE=5e-1f
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DTILE_N=192 -DSTAGES=4 -DSTAGING=3 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=6 -DSCALE=__nv_bfloat16
// variant: -DTILE_N=192 -DSTAGES=4 -DSTAGING=3 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=6 -DSCALE=float
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=6
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=7
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=7
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=10
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=10
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=8
// variant: -DTILE_N=128 -DSTAGES=6 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=8
// variant: -DTILE_N=256 -DSTAGES=4 -DSTAGING=2 -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=float -DEPILOGUE=9 -DCAP=3e1f
// variant: -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=0
// variant: -DA_K_MAJOR=0 -DB_K_MAJOR=0 -DOUT=float -DEPILOGUE=0
// variant: -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=2
// variant: -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DA_K_MAJOR=1 -DB_K_MAJOR=0 -DOUT=__nv_bfloat16 -DEPILOGUE=4 -DSLOPE=5e-1f
// variant: -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=__nv_bfloat16 -DEPILOGUE=6 -DSCALE=__nv_bfloat16
// variant: -DA_K_MAJOR=1 -DB_K_MAJOR=1 -DOUT=float -DEPILOGUE=9 -DCAP=3e1f

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"
#include "common/hopper.cuh"
#include "common/product.cuh"

#ifdef TILE_N

#include "common/gated.cuh"

#define TILE_M 128
#define A_BOXES (TILE_M / 64) // of a slice
#define B_BOXES (TILE_N / 64)
#define SLICE ((A_BOXES + B_BOXES) * BOX)
#define WARPS 8 // that multiply
#define GROUP 8 // rows of tiles that are walked together
#define SHARED_BYTES (1024 + STAGES * (SLICE + 16) + WARPS * (STAGING * CHUNK + 8))

static_assert(TILE_N % 64 == 0 && CHUNKS % STAGING == 0, "a form of tile");
static_assert(!(GATES || UNGATES) || (TILE_N % 128 == 0 && STAGING == 2 && sizeof(OUT) == 2), "a form of pairs");
static_assert(SHARED_BYTES <= 232448, "what a block may have");

struct Scalars {
    u64 m, n, k;
    u64 batches; // z of a and b
    u64 splits;  // parts of k, none without a slice
};

// The tiles of a launch, numbered in the order in which the blocks take them: part by part, GROUP rows at a time.
struct Walk {
    u32 rows, columns, splits, slices, total; // slices: of all of k

    __device__ __forceinline__ explicit Walk(const Scalars &s) {
        rows = (u32)((s.m + TILE_M - 1) / TILE_M);
        columns = (u32)((s.n + TILE_COLUMNS - 1) / TILE_COLUMNS);
        splits = (u32)s.splits;
        slices = (u32)((s.k + DEPTH - 1) / DEPTH);
        total = rows * columns * splits * (u32)s.batches;
    }

    // Where a tile is: z of c, and its first row and column.
    __device__ __forceinline__ void place(u32 index, u32 &part, u32 &row, u32 &column) const {
        part = index / (rows * columns);
        index -= part * (rows * columns);
        const u32 group = index / (GROUP * columns);
        index -= group * (GROUP * columns);
        const u32 height = min(GROUP, rows - group * GROUP);
        column = index / height;
        row = (group * GROUP + index - column * height) * TILE_M;
        column *= TILE_COLUMNS;
    }

    // The first slice of a tile's part of k, which has every `splits`-th. No division where k is whole: the
    // multiplying warps would wait for it.
    __device__ __forceinline__ u32 first(u32 index) const {
        return splits > 1 ? index / (rows * columns) % splits : 0;
    }
};

// The block's shared memory, by address, and where a thread is in the ring of slices.
struct Ring {
    u32 slices, staging, full, empty, extra; // full, empty: a barrier a slice; extra: one a warp, for e
    int stage = 0;
    u32 parity = 0;

    __device__ __forceinline__ explicit Ring(u32 shared) : slices((shared + 1023) & ~1023u) {
        staging = slices + STAGES * SLICE;
        full = staging + WARPS * STAGING * CHUNK;
        empty = full + STAGES * 8;
        extra = empty + STAGES * 8;
    }

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Fills the ring; one thread.
__device__ __forceinline__ void fetch(const TensorMap &a_map, const TensorMap &b_map, const Walk &walk, Ring ring) {
    for (u32 index = blockIdx.x; index < walk.total; index += gridDim.x) {
        u32 part, row, column;
        walk.place(index, part, row, column);
        const u32 batch = part / walk.splits;
        for (u32 slice = walk.first(index); slice < walk.slices; slice += walk.splits) {
            const u32 full = ring.full + ring.stage * 8, a = ring.slices + ring.stage * SLICE, b = a + A_BOXES * BOX;
            const u32 k = slice * DEPTH;
            barrier_wait(ring.empty + ring.stage * 8, ring.parity ^ 1);
            barrier_expect(full, SLICE);
#pragma unroll
            for (int i = 0; i < A_BOXES; i++) {
                const u32 m = row + i * 64;
                copy_in(a + i * BOX, a_map, full, A_K_MAJOR ? k : m, A_K_MAJOR ? m : k, batch);
            }
#pragma unroll
            for (int i = 0; i < B_BOXES; i++) {
                const u32 half = GATES ? i / (B_BOXES / 2) : 0, n = column + i * 64 - half * TILE_COLUMNS;
                copy_in(b + i * BOX, b_map, full, B_K_MAJOR ? k : n, B_K_MAJOR ? n : k, GATES ? half : batch);
            }
            ring.advance();
        }
    }
}

// Fetches e's chunks to a warp's buffers, once what they held is on its way out; one thread.
__device__ __forceinline__ void fetch_extra(const TensorMap &e_map, u32 staging, u32 barrier, u32 column, u32 row,
                                            u32 part) {
    copy_out_wait();
    barrier_expect(barrier, STAGING * CHUNK);
#pragma unroll
    for (int j = 0; j < STAGING; j++) copy_in(staging + j * CHUNK, e_map, barrier, column + j * COLUMNS, row, part);
}

// Multiplies what arrives in the ring and writes the tiles; a warpgroup.
__device__ __forceinline__ void multiply(const TensorMap &c_map, const TensorMap &e_map, const void *scale,
                                         const Walk &walk, const Scalars &s, Ring ring) {
    constexpr u32 a_step = A_K_MAJOR ? 2 : 128, b_step = B_K_MAJOR ? 2 : 128; // of 16 along k, in 16 bytes
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const u32 staging = ring.staging + warp * STAGING * CHUNK, extra = ring.extra + warp * 8;
    u32 extra_parity = 0;
    float d[TILE_N / 2];
    for (u32 index = blockIdx.x; index < walk.total; index += gridDim.x) {
        const u32 first = walk.first(index);
        u32 used = 0, part = 0, row = 0, column = 0;
        for (u32 slice = first; slice < walk.slices; slice += walk.splits) {
            const u32 at = ring.slices + ring.stage * SLICE;
            const u64 a = operand(at + group * BOX), b = operand(at + A_BOXES * BOX);
            barrier_wait(ring.full + ring.stage * 8, ring.parity);
            product_begin();
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k++) {
                product<!A_K_MAJOR, !B_K_MAJOR>(d, a + k * a_step, b + k * b_step, slice > first || k > 0);
            }
            product_commit();
            if (slice == first) { // the divisions run beside the products
                walk.place(index, part, row, column);
                row += group * 64 + warp % 4 * 16;
                if (READS_E && lane == 0) {
                    if (UNGATES) {
                        fetch_pair(e_map, staging, extra, column, row);
                    } else {
                        fetch_extra(e_map, staging, extra, column, row, part);
                    }
                }
                __syncwarp();
            }
            product_wait<1>();
            if (slice > first && lane == 0) barrier_arrive(used);
            __syncwarp();
            used = ring.empty + ring.stage * 8;
            ring.advance();
        }
        product_wait<0>();
        if (lane == 0) barrier_arrive(used);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TILE_N / 2; i++) asm volatile("" : "+f"(d[i])::"memory"); // no use before the wait
#ifdef SCALE
        scale_columns(d, static_cast<const SCALE *>(scale), column, s.n, lane);
#endif
        if constexpr (GATES) {
            write_gated(d, c_map, e_map, staging, column, row, s.m, s.n, lane);
            continue;
        }
        constexpr int step = UNGATES ? 1 : STAGING;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += step) {
            if constexpr (UNGATES) {
                const u32 at = column + chunk * COLUMNS;
                if (chunk > 0 && lane == 0) fetch_pair(e_map, staging, extra, at, row);
                __syncwarp();
                barrier_wait(extra, extra_parity);
                extra_parity ^= 1;
                write_ungated(d + chunk * (COLUMNS / 2), c_map, staging, at, row, s.m, s.n, lane);
                continue;
            }
            if constexpr (READS_E) {
                if (chunk > 0 && lane == 0) {
                    fetch_extra(e_map, staging, extra, column + chunk * COLUMNS, row, part);
                }
                __syncwarp();
                barrier_wait(extra, extra_parity);
                extra_parity ^= 1;
            } else {
                if (lane == 0) copy_out_wait();
                __syncwarp();
            }
            const float *sums = d + chunk * (COLUMNS / 2);
            const u32 at = column + chunk * COLUMNS;
            write_chunks<false, STAGING>(sums, c_map, staging, at, row, part, s.m, s.n, lane);
            if constexpr (WRITES_E) {
                if (lane == 0) copy_out_wait();
                __syncwarp();
                write_chunks<true, STAGING>(sums, e_map, staging, at, row, part, s.m, s.n, lane);
            }
        }
    }
    if (lane == 0) copy_out_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    matmul(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
           const __grid_constant__ TensorMap c_map,
#if HAS_E
           const __grid_constant__ TensorMap e_map, const bf16 *, const bf16 *, OUT *, OUT *,
#else
           const bf16 *, const bf16 *, OUT *,
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
            barrier_init(ring.empty + i * 8, WARPS);
        }
        for (int i = 0; i < WARPS; i++) barrier_init(ring.extra + i * 8, 1);
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_down<40>();
        if (threadIdx.x == 0) fetch(a_map, b_map, walk, ring);
    } else {
        registers_up<232>();
        multiply(c_map, e_map, scale, walk, s, ring);
    }
}

#else // no tile: the entries for any shape

#define ANY_TILE 64
#define ANY_DEPTH 32
#define PITCH (ANY_DEPTH + 8) // of a row in shared memory: no bank conflicts

struct Scalars {
    u64 m, n, k;
    u64 batches, splits;
};

// A tile of 64 rows of an operand, 32 deep, to shared memory; zeros outside.
template <bool K_MAJOR>
__device__ __forceinline__ void load_tile(bf16 (*to)[PITCH], const bf16 *from, u64 row, u64 k, u64 rows, u64 last,
                                          u64 depth) {
#pragma unroll 4
    for (int i = 0; i < ANY_TILE * ANY_DEPTH / 128; i++) {
        const int at = threadIdx.x + i * 128;
        const int r = K_MAJOR ? at / ANY_DEPTH : at % ANY_TILE, c = K_MAJOR ? at % ANY_DEPTH : at / ANY_TILE;
        const bool inside = row + r < rows && k + c < last;
        const u64 place = K_MAJOR ? (row + r) * depth + k + c : (k + c) * rows + row + r;
        to[r][c] = inside ? from[place] : __float2bfloat16_rn(0.0f);
    }
}

// Grid: (tiles of 64 rows, tiles of 64 columns, batches * splits), 128 threads; each warp takes 32 x 32.
extern "C" __global__ void __launch_bounds__(128)
    matmul_any(const bf16 *__restrict__ a, const bf16 *__restrict__ b, OUT *__restrict__ c,
#if HAS_E
               OUT *__restrict__ e,
#endif
#ifdef SCALE
               const SCALE *__restrict__ scale,
#endif
               const __grid_constant__ Scalars s) {
    __shared__ __align__(16) bf16 a_tile[ANY_TILE][PITCH], b_tile[ANY_TILE][PITCH];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    const u64 row = (u64)blockIdx.x * ANY_TILE, column = (u64)blockIdx.y * ANY_TILE;
    const u64 batch = blockIdx.z / s.splits, split = blockIdx.z % s.splits;
    const u64 slices = (s.k + 63) / 64; // the same parts of k as in matmul
    const u64 last = min((split + 1) * slices / s.splits * 64, s.k);
    a += batch * s.m * s.k;
    b += batch * s.n * s.k;
    c += blockIdx.z * s.m * s.n;
    float d[2][4][4] = {};
    for (u64 k = split * slices / s.splits * 64; k < last; k += ANY_DEPTH) {
        load_tile<A_K_MAJOR>(a_tile, a, row, k, s.m, last, s.k);
        load_tile<B_K_MAJOR>(b_tile, b, column, k, s.n, last, s.k);
        __syncthreads();
#pragma unroll
        for (int step = 0; step < ANY_DEPTH; step += 16) {
            const int at = step + lane % 4 * 2;
            u32 x[2][4], y[4][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = warp_row + i * 16 + lane / 4;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    x[i][j] = *reinterpret_cast<const u32 *>(&a_tile[r + j % 2 * 8][at + j / 2 * 8]);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = warp_column + i * 8 + lane / 4;
                y[i][0] = *reinterpret_cast<const u32 *>(&b_tile[r][at]);
                y[i][1] = *reinterpret_cast<const u32 *>(&b_tile[r][at + 8]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                        "{%8, %9}, {%0, %1, %2, %3};"
                        : "+f"(d[i][j][0]), "+f"(d[i][j][1]), "+f"(d[i][j][2]), "+f"(d[i][j][3])
                        : "r"(x[i][0]), "r"(x[i][1]), "r"(x[i][2]), "r"(x[i][3]), "r"(y[j][0]), "r"(y[j][1]));
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int at = 0; at < 32; at++) {
        const int i = at / 16, j = at / 4 % 4, part = at % 4;
        const u64 r = row + warp_row + i * 16 + lane / 4 + part / 2 * 8;
        const u64 q = column + warp_column + j * 8 + lane % 4 * 2 + part % 2;
        if (r >= s.m || q >= s.n) continue;
#if READS_E
        const float other = (float)e[blockIdx.z * s.m * s.n + r * s.n + q];
#else
        const float other = 0.0f;
#endif
#if WRITES_E
        from_float(e[blockIdx.z * s.m * s.n + r * s.n + q], d[i][j][part]);
#endif
#ifdef SCALE
        d[i][j][part] *= (float)scale[q];
#endif
        from_float(c[r * s.n + q], epilogue(d[i][j][part], other));
    }
}

#if !HAS_E

#define SUM_BATCH 8 // loads in flight a thread

struct SumScalars {
    u64 elements;   // m n
    u64 batches, splits;
    u64 accumulate; // 1: the output is added to (after the parts), 0: overwritten
};

template <int WIDTH> struct alignas(4 * WIDTH) Floats {
    float at[WIDTH];
};
template <int WIDTH> struct alignas(sizeof(OUT) * WIDTH) Outs {
    OUT at[WIDTH];
};

template <int WIDTH> __device__ __forceinline__ void sum_parts(const float *parts, OUT *out, const SumScalars &s) {
    const u64 packs = s.elements / WIDTH, total = packs * s.batches;
    for (u64 i = (u64)blockIdx.x * 256 + threadIdx.x; i < total; i += (u64)gridDim.x * 256) {
        const u64 batch = i / packs, at = i - batch * packs;
        const Floats<WIDTH> *from = reinterpret_cast<const Floats<WIDTH> *>(parts) + batch * s.splits * packs + at;
        Floats<WIDTH> sum = {};
        for (u64 split = 0; split < s.splits; split += SUM_BATCH) {
            Floats<WIDTH> some[SUM_BATCH]; // all loads before the first addition
#pragma unroll
            for (int k = 0; k < SUM_BATCH; k++) {
                if (split + k < s.splits) some[k] = from[(split + k) * packs];
            }
#pragma unroll
            for (int k = 0; k < SUM_BATCH; k++) {
                if (split + k >= s.splits) break;
#pragma unroll
                for (int j = 0; j < WIDTH; j++) sum.at[j] += some[k].at[j];
            }
        }
        Outs<WIDTH> *to = reinterpret_cast<Outs<WIDTH> *>(out) + i;
        Outs<WIDTH> result;
        if (s.accumulate) result = *to;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            const float before = s.accumulate ? (float)result.at[j] : 0.0f;
            from_float(result.at[j], before + epilogue(sum.at[j]));
        }
        *to = result;
    }
}

// Grid: one dimension of 256 threads, any number of blocks.
extern "C" __global__ void __launch_bounds__(256)
    matmul_sum(const float *__restrict__ parts, OUT *__restrict__ out, const __grid_constant__ SumScalars s) {
    if (s.elements % 4 == 0) {
        sum_parts<4>(parts, out, s);
    } else {
        sum_parts<1>(parts, out, s);
    }
}

#endif
#endif
