// RMS norm without a weight, forward and backward (src/ops/rms_norm.rs).
//
//   forward    y = r x,                          r = 1 / sqrt(sum(x^2) / c + eps)
//   backward  gx = r gy - x (r^3 sum(x gy) / c)
//
// Layout: x, y, gy, gx are dense row-major [n, c] of ELEMENT, c <= LANES * CHUNKS * WIDTH; WIDTH divides c, and every
// row starts at a multiple of WIDTH elements' bytes (16 where WIDTH > 1).
// Grid: one dimension. LANES threads share a row, a block of THREADS takes THREADS / LANES rows; the row stays in
// registers, so that each tensor crosses the memory bus once.
// Invariants: every element of the output is written exactly once; threads of rows past the last read and write
// nothing but take part in the sums.
// Numerics: f32, rounded once to ELEMENT at the end. A lane adds its elements in a fixed order, the lanes are added by
// butterfly, a row's warps in order: equal bits every time.
//
// The launcher (src/backend/cuda.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=8 -DCHUNKS=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=32 -DCHUNKS=2
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=32 -DCHUNKS=4
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=512 -DCHUNKS=4
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1 -DLANES=1024 -DCHUNKS=16
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=16 -DCHUNKS=1
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=32 -DCHUNKS=4
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=64 -DCHUNKS=4
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=1024 -DCHUNKS=4
// variant: -DELEMENT=float -DWIDTH=1 -DLANES=1 -DCHUNKS=1
// variant: -DELEMENT=float -DWIDTH=1 -DLANES=1024 -DCHUNKS=16

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"
#include "common/row.cuh"

#define THREADS (LANES > 256 ? LANES : 256)

struct Scalars {
    u64 rows, columns, eps;
};

struct Place {
    int lane, length;
    bool inside;
    u64 offset;

    __device__ __forceinline__ explicit Place(const Scalars &s) {
        const u64 row = (u64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
        lane = threadIdx.x % LANES;
        inside = row < s.rows;
        length = inside ? (int)s.columns / WIDTH : 0;
        offset = inside ? row * s.columns : 0;
    }
};

__device__ __forceinline__ float inverse_rms(float sum_of_squares, const Scalars &s) {
    return 1.0f / sqrtf(sum_of_squares / (float)s.columns + float_of(s.eps));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_forward(const ELEMENT *__restrict__ x, ELEMENT *__restrict__ y, const __grid_constant__ Scalars s) {
    const Place at(s);
    Row row;
    row.load(x + at.offset, at.length, at.lane);
    const float r = inverse_rms(row_sum(make_float2(row.dot(row), 0.0f)).x, s);
#pragma unroll
    for (int i = 0; i < CHUNKS * WIDTH; i++) row.at[i] *= r;
    row.store(y + at.offset, at.length, at.lane);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_backward(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ gy, ELEMENT *__restrict__ gx,
                      const __grid_constant__ Scalars s) {
    const Place at(s);
    Row row, grad;
    row.load(x + at.offset, at.length, at.lane);
    grad.load(gy + at.offset, at.length, at.lane);
    const float2 sum = row_sum(make_float2(row.dot(row), row.dot(grad)));
    const float r = inverse_rms(sum.x, s);
    const float curvature = r * r * r * (sum.y / (float)s.columns);
#pragma unroll
    for (int i = 0; i < CHUNKS * WIDTH; i++) grad.at[i] = grad.at[i] * r - row.at[i] * curvature;
    grad.store(gx + at.offset, at.length, at.lane);
}
