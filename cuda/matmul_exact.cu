// Matrix product without tensor cores: f32 products stay f32 (src/ops/matmul.rs).
//
//   c[z, m, n] = f(sum over k of a[z, m, k] b[z, k, n])
//
// Layout: c, and e where there is one, are dense row-major of OUT; a and b, of IN, are read by their strides, in
// elements, so that transposed and spread-out factors need no copy. With `parts` = p > 1, c is an f32 workspace
// [z p, m, n]: its block z p + i holds the sum over the i-th part of k, and matmul_sum (matmul.cu) adds the parts.
// f is the EPILOGUE, of the numbers of matmul.cu:
//   0  x, or if `add` what c holds + x
//   1  max(x, 0)^2
//   2  x 2 sqrt(e): the backward of 1 on an input gradient, e being 1's output
//   3  leaky_relu(x)^2 with SLOPE below zero; e is written too: x itself
//   4  x 2 (e < 0 ? SLOPE^2 e : e): the backward of 3, e being what 3 wrote there
// Grid: one dimension. A block of 256 threads computes a tile of TILE_M x TILE_N, each 64 or 128, over one part of k:
// tiles of a row of c first, then rows of tiles, then parts, then z. A thread has 4 x 4 elements of each quarter of
// 64 x 64.
// Schedule: k goes by in slices of 16 through two buffers in shared memory: the next one is on its way, straight into
// its buffer (rows of f32 along m or n) or through registers (what must be converted or turned), while this one is
// multiplied; one barrier a slice.
// Banks: a buffer has a row of the tile's length for each k, its element j at j ^ 8 (k / 4 % 4). Four threads that turn
// rows of 16 k, eight rows a warp, then write to 32 banks; readers of 16 bytes find theirs whole. Lanes are spread over
// rows and columns so that each half of a warp reads at most 128 bytes of either factor, neighbours the same.
// Invariants: every element of c (and of e, if EPILOGUE is 3) is written exactly once; what lies outside a factor, or
// outside the part of k, counts as zero and is not read.
// Numerics: f32, k ascending within a part, one sum an element, rounded once to OUT: equal bits every time, and for
// every tile.
//
// The launcher (src/backend/cuda_matmul_exact.rs) defines the constants: A_K_FAST and B_K_FAST say along which size
// neighbouring threads read each factor, A_WIDTH and B_WIDTH how many elements lie side by side at multiples of their
// size there (4, or 1), C_WIDTH the same of c and e. These are the forms that the compile check tries:
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=1 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=0 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=0 -DB_K_FAST=1 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=1 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=1
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=2
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=1 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=4 -DSLOPE=5e-1f
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=1 -DA_WIDTH=1 -DB_WIDTH=1 -DC_WIDTH=1 -DEPILOGUE=3 -DSLOPE=5e-1f
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=0 -DB_K_FAST=0 -DA_WIDTH=1 -DB_WIDTH=1 -DC_WIDTH=1 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=128 -DTILE_N=64 -DA_K_FAST=1 -DB_K_FAST=1 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=64 -DTILE_N=128 -DA_K_FAST=0 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=1 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=64 -DTILE_N=64 -DA_K_FAST=1 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=float -DOUT=float -DTILE_M=64 -DTILE_N=64 -DA_K_FAST=0 -DB_K_FAST=1 -DA_WIDTH=1 -DB_WIDTH=1 -DC_WIDTH=1 -DEPILOGUE=0
// variant: -DIN=__nv_bfloat16 -DOUT=__nv_bfloat16 -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=1 -DB_K_FAST=1 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=__nv_bfloat16 -DOUT=float -DTILE_M=128 -DTILE_N=128 -DA_K_FAST=0 -DB_K_FAST=0 -DA_WIDTH=4 -DB_WIDTH=4 -DC_WIDTH=4 -DEPILOGUE=0
// variant: -DIN=__nv_bfloat16 -DOUT=__nv_bfloat16 -DTILE_M=64 -DTILE_N=64 -DA_K_FAST=1 -DB_K_FAST=0 -DA_WIDTH=1 -DB_WIDTH=1 -DC_WIDTH=1 -DEPILOGUE=2

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"

#define THREADS 256
#define DEPTH 16 // of a slice along k

struct Scalars {
    u64 m, n, k, parts;
    u64 a_z, a_m, a_k; // of a along z, m and k
    u64 b_z, b_n, b_k; // of b along z, n and k
    u64 add;
};

template <typename T> struct alignas(sizeof(T) * 4) Four {
    T at[4];
};

__device__ __forceinline__ int within(u64 count, int most) { return count < (u64)most ? (int)count : most; }

// The row of a buffer for a k: what element `j` of it is moved by.
__device__ __forceinline__ constexpr int turn(int k) { return k / 4 % 4 * 8; }

// A thread's share of a factor's slices, TILE elements along the outer size (m or n) by DEPTH along k: units of four
// elements along the size that is read fastest.
template <int TILE, bool K_FAST, int WIDTH> struct Reader {
    static constexpr int UNITS = TILE * DEPTH / 4 / THREADS;
    static constexpr int ACROSS = K_FAST ? DEPTH / 4 : TILE / 4; // units side by side
    static constexpr int APART = THREADS / ACROSS;               // from a unit to the thread's next
    static constexpr bool COPIES = !K_FAST && WIDTH == 4 && sizeof(IN) == 4;

    const IN *from; // the first unit of the next slice
    u32 inner;      // from a unit's element to the next, of WIDTH 0
    u32 apart;      // from a unit to the thread's next
    u32 step;       // from slice to slice
    int k;          // of the first unit, within a slice
    int outer;      // of the first unit, within the tile
    int present;    // K_FAST: the thread's units whose row is there; else a unit's elements that are
    float staged[UNITS][4];

    // `x` at the tile's first element, with `rows` of its outer size from there on.
    __device__ __forceinline__ Reader(const IN *x, u64 rows, u64 along_outer, u64 along_k) {
        const int thread = threadIdx.x, left = within(rows, TILE);
        k = K_FAST ? thread % ACROSS * 4 : thread / ACROSS;
        outer = K_FAST ? thread / ACROSS : thread % ACROSS * 4;
        present = K_FAST ? (left - outer + APART - 1) / APART : max(0, min(4, left - outer));
        from = x + outer * along_outer + k * along_k;
        inner = (u32)along_outer;
        apart = APART * (u32)(K_FAST ? along_outer : along_k);
        step = DEPTH * (u32)along_k;
    }

    // Begins to read the next slice, which has `depth` of k or ends with more to come.
    __device__ __forceinline__ void read(float *slice, int depth) {
#pragma unroll
        for (int unit = 0; unit < UNITS; unit++) {
            const IN *at = from + unit * apart;
            const int along_k = max(0, min(4, depth - k)); // K_FAST
            const int count = K_FAST ? (unit < present ? along_k : 0) : (k + unit * APART < depth ? present : 0);
            if constexpr (COPIES) {
                // What is not there is neither read nor its address looked at.
                const int row = k + unit * APART;
                const u32 to = (u32)__cvta_generic_to_shared(slice + row * TILE + (outer ^ turn(row)));
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(at), "r"(count * 4)
                             : "memory");
            } else if (WIDTH == 4 && count == 4) {
                const Four<IN> four = *reinterpret_cast<const Four<IN> *>(at);
#pragma unroll
                for (int i = 0; i < 4; i++) staged[unit][i] = to_float(four.at[i]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 along = WIDTH == 0 ? i * inner : i;
                    staged[unit][i] = i < count ? to_float(at[along]) : 0.0f;
                }
            }
        }
        from += step;
    }

    // Ends it: what is in registers goes to the slice's buffer.
    __device__ __forceinline__ void write(float *slice) const {
        if constexpr (COPIES) {
            asm volatile("cp.async.wait_all;" ::: "memory");
        } else {
#pragma unroll
            for (int unit = 0; unit < UNITS; unit++) {
                const float *x = staged[unit];
                if constexpr (K_FAST) {
                    float *to = slice + k * TILE + ((outer + unit * APART) ^ turn(k));
#pragma unroll
                    for (int i = 0; i < 4; i++) to[i * TILE] = x[i];
                } else {
                    const int row = k + unit * APART;
                    float4 *to = reinterpret_cast<float4 *>(slice + row * TILE + (outer ^ turn(row)));
                    *to = make_float4(x[0], x[1], x[2], x[3]);
                }
            }
        }
    }
};

#define ROWS (TILE_M / 16)    // of a thread's elements
#define COLUMNS (TILE_N / 16)

#define READS_E (EPILOGUE == 2 || EPILOGUE == 4)
#define WRITES_E (EPILOGUE == 3)
#define HAS_E (READS_E || WRITES_E)

__device__ __forceinline__ float epilogue(float x, float e) {
#if EPILOGUE == 0
    return e + x; // e: what c holds, or zero
#elif EPILOGUE == 1
    x = x < 0.0f ? 0.0f : x; // NaN stays
    return x * x;
#elif EPILOGUE == 2
    return x * (2.0f * sqrtf(e));
#elif EPILOGUE == 3
    x = x < 0.0f ? (SLOPE) * x : x;
    return x * x;
#elif EPILOGUE == 4
    return x * (2.0f * (e < 0.0f ? (SLOPE) * (SLOPE) * e : e));
#else
#error "an epilogue that this kernel does not have"
#endif
}

// COUNT elements of a row of c, at `at`.
template <int COUNT>
__device__ __forceinline__ void write_row(const float *x, OUT *c, OUT *e, u64 at, bool add) {
    struct alignas(sizeof(OUT) * COUNT) Pack {
        OUT at[COUNT];
    } pack, beside = {};
    if (READS_E) beside = *reinterpret_cast<const Pack *>(e + at);
    if (EPILOGUE == 0 && add) beside = *reinterpret_cast<const Pack *>(c + at);
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        from_float(pack.at[j], epilogue(x[j], to_float(beside.at[j])));
        if (WRITES_E) from_float(beside.at[j], x[j]);
    }
    *reinterpret_cast<Pack *>(c + at) = pack;
    if (WRITES_E) *reinterpret_cast<Pack *>(e + at) = beside;
}

extern "C" __global__ void __launch_bounds__(THREADS, TILE_M + TILE_N > 128 ? 2 : 3)
    matmul_exact(const IN *__restrict__ a, const IN *__restrict__ b, OUT *__restrict__ c,
#if HAS_E
                 OUT *__restrict__ e,
#endif
                 const __grid_constant__ Scalars s) {
    __shared__ __align__(16) float slices_a[2][DEPTH * TILE_M], slices_b[2][DEPTH * TILE_N];
    const u32 columns = (u32)((s.n + TILE_N - 1) / TILE_N), rows = (u32)((s.m + TILE_M - 1) / TILE_M);
    const u32 row_of_tiles = blockIdx.x / columns, slab = row_of_tiles / rows;
    const u32 z = slab / (u32)s.parts, part = slab % (u32)s.parts;
    const u32 first_row = row_of_tiles % rows * TILE_M, first_column = blockIdx.x % columns * TILE_N;
    const u64 all = (s.k + DEPTH - 1) / DEPTH;
    const u64 first = part * all / s.parts, last = (part + 1) * all / s.parts; // slices
    int left = (int)(min(last * DEPTH, s.k) - first * DEPTH);                 // of k, from this slice on

    Reader<TILE_M, A_K_FAST, A_WIDTH> of_a(a + z * s.a_z + first_row * s.a_m + first * DEPTH * s.a_k,
                                           s.m - first_row, s.a_m, s.a_k);
    Reader<TILE_N, B_K_FAST, B_WIDTH> of_b(b + z * s.b_z + first_column * s.b_n + first * DEPTH * s.b_k,
                                           s.n - first_column, s.b_n, s.b_k);

    // Bits 1 and 4 of the lane choose among four rows of elements, the others among eight columns.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = warp / 2 * 16 + (lane / 2 % 2 + lane / 16 * 2) * 4;
    const int column = warp % 2 * 32 + (lane % 2 + lane / 4 % 4 * 2) * 4;

    float sums[ROWS][COLUMNS] = {};
    of_a.read(slices_a[0], left);
    of_b.read(slices_b[0], left);
    of_a.write(slices_a[0]);
    of_b.write(slices_b[0]);
    __syncthreads();
    for (u32 stage = 0; left > 0; stage ^= 1) {
        left -= DEPTH;
        if (left > 0) {
            of_a.read(slices_a[stage ^ 1], left);
            of_b.read(slices_b[stage ^ 1], left);
        }
        const float *from_a = slices_a[stage], *from_b = slices_b[stage];
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float x[ROWS], y[COLUMNS];
#pragma unroll
            for (int i = 0; i < ROWS; i += 4) {
                const float4 four =
                    *reinterpret_cast<const float4 *>(from_a + k * TILE_M + (row ^ turn(k)) + i * 16);
                x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
            }
#pragma unroll
            for (int j = 0; j < COLUMNS; j += 4) {
                const float4 four =
                    *reinterpret_cast<const float4 *>(from_b + k * TILE_N + (column ^ turn(k)) + j * 16);
                y[j] = four.x, y[j + 1] = four.y, y[j + 2] = four.z, y[j + 3] = four.w;
            }
#pragma unroll
            for (int i = 0; i < ROWS; i++)
#pragma unroll
                for (int j = 0; j < COLUMNS; j++) sums[i][j] = fmaf(x[i], y[j], sums[i][j]);
        }
        if (left > 0) {
            of_a.write(slices_a[stage ^ 1]);
            of_b.write(slices_b[stage ^ 1]);
        }
        __syncthreads();
    }

#if !HAS_E
    OUT *const e = nullptr;
#endif
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const u32 m = first_row + row + i / 4 * 64 + i % 4;
        if (m >= s.m) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 4) {
            const u32 n = first_column + column + j * 16;
            const u64 at = (slab * s.m + m) * s.n + n;
            if (C_WIDTH == 4) {
                if (n < s.n) write_row<4>(&sums[i][j], c, e, at, s.add != 0);
            } else {
#pragma unroll
                for (int l = 0; l < 4; l++) {
                    if (n + l < s.n) write_row<1>(&sums[i][j + l], c, e, at + l, s.add != 0);
                }
            }
        }
    }
}
