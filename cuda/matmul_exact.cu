// Matrix product without tensor cores: f32 products stay f32 (src/ops/matmul.rs).
//
//   c[z, m, n] = sum over k of a[z, m, k] b[z, k, n]
//
// Layout: c is dense row-major of OUT; a and b, of IN, are read by their strides, in elements, so that transposed and
// spread-out factors need no copy.
// Grid: one dimension. A block of 256 threads computes a tile of 64 x 64, each thread 4 x 4 of it: tiles of a row of c
// first, then rows of tiles, then z.
// Invariants: every element of c is written exactly once; what lies outside a factor counts as zero.
// Numerics: f32, k ascending, one sum an element, rounded once to OUT: equal bits every time.
//
// The launcher (src/backend/matmul_exact.rs) defines the constants, A_K_FAST and B_K_FAST being along which size
// neighbouring threads read each factor; these are the forms that the compile check tries:
// variant: -DIN=float -DOUT=float -DA_K_FAST=1 -DB_K_FAST=0
// variant: -DIN=float -DOUT=float -DA_K_FAST=0 -DB_K_FAST=1
// variant: -DIN=__nv_bfloat16 -DOUT=__nv_bfloat16 -DA_K_FAST=1 -DB_K_FAST=1
// variant: -DIN=__nv_bfloat16 -DOUT=float -DA_K_FAST=0 -DB_K_FAST=0

#include <cuda_bf16.h>

typedef unsigned long long u64;

#define TILE 64
#define DEPTH 16

struct Scalars {
    u64 m, n, k;
    u64 a_z, a_m, a_k; // of a along z, m and k
    u64 b_z, b_k, b_n; // of b along z, k and n
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float &to, float x) { to = x; }
__device__ __forceinline__ void from_float(__nv_bfloat16 &to, float x) { to = __float2bfloat16_rn(x); }

// Where the element `at` of a slice of 64 x 16 lies: along the 64, and along k.
__device__ __forceinline__ int2 place(int at, bool k_fast) {
    return k_fast ? make_int2(at / DEPTH, at % DEPTH) : make_int2(at % TILE, at / TILE);
}

extern "C" __global__ void __launch_bounds__(256)
    matmul_exact(const IN *__restrict__ a, const IN *__restrict__ b, OUT *__restrict__ c,
                 const __grid_constant__ Scalars s) {
    // A row more than the tile's 64 keeps the threads that read along k on different banks.
    __shared__ float slice_a[DEPTH][TILE + 1], slice_b[DEPTH][TILE + 1];
    const u64 columns = (s.n + TILE - 1) / TILE, rows = (s.m + TILE - 1) / TILE;
    const u64 tile = blockIdx.x, z = tile / (rows * columns);
    const u64 first_row = tile / columns % rows * TILE, first_column = tile % columns * TILE;
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;

    float sums[4][4] = {};
    for (u64 start = 0; start < s.k; start += DEPTH) {
#pragma unroll
        for (int part = 0; part < 4; part++) {
            const int at = part * 256 + (int)threadIdx.x;
            const int2 of_a = place(at, A_K_FAST), of_b = place(at, B_K_FAST);
            const u64 m = first_row + of_a.x, a_k = start + of_a.y;
            const u64 n = first_column + of_b.x, b_k = start + of_b.y;
            slice_a[of_a.y][of_a.x] =
                m < s.m && a_k < s.k ? to_float(a[z * s.a_z + m * s.a_m + a_k * s.a_k]) : 0.0f;
            slice_b[of_b.y][of_b.x] =
                n < s.n && b_k < s.k ? to_float(b[z * s.b_z + b_k * s.b_k + n * s.b_n]) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            float left[4], right[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                left[i] = slice_a[k][row + i];
                right[i] = slice_b[k][column + i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u64 m = first_row + row + i, n = first_column + column + j;
            if (m < s.m && n < s.n) from_float(c[(z * s.m + m) * s.n + n], sums[i][j]);
        }
}
