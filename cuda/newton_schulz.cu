// The elementwise steps of Newton-Schulz's iteration on n matrices at once (src/ops/newton_schulz.rs). Its products are
// newton_schulz_product.cu's, which takes `scale` and `combine` into them, or for types and shapes that it does not take
// those of any other product.
//
//   newton_schulz_squares    sums[z, p] = sum of round(x)^2 over the p-th part of x[z]
//   newton_schulz_normalise  y[z] = round(x[z]) / (sqrt(sum over p of sums[z, p]) + eps)
//   newton_schulz_scale      y = w x
//   newton_schulz_combine    y = w x + v
//
// Layout: x, v, y are dense [n, elements] of ELEMENT, sums [n, parts] f32. WIDTH > 1: every matrix starts at a multiple
// of WIDTH elements.
// Grid: 256 threads. squares and normalise: block (x, y) takes matrix y; in squares the part x, in normalise 256 WIDTH
// elements. The others take the n matrices as one row, 256 WIDTH elements a block.
// Invariants: every element of the outputs is written exactly once.
// Numerics: f32, and each operation's result rounded to bf16 if ELEMENT is bf16 or ROUNDS is 1 (also the norm, before
// and after eps is added): the points where the challenge's own iteration, which computes in bf16, rounds. Sums of
// squares in f32, in a fixed order: a thread's elements, the block's threads by butterfly, its warps in order, the parts
// by the same.
//
// The launcher (src/backend/cuda_newton_schulz.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DROUNDS=1 -DWIDTH=8
// variant: -DELEMENT=__nv_bfloat16 -DROUNDS=1 -DWIDTH=1
// variant: -DELEMENT=float -DROUNDS=0 -DWIDTH=4
// variant: -DELEMENT=float -DROUNDS=1 -DWIDTH=1

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"
#include "common/pack.cuh"

#define THREADS 256

struct Scalars {
    u64 elements; // of a matrix; of all matrices in scale and combine
    u64 parts;    // of a matrix
    u64 weight;   // w, or eps
};

__device__ __forceinline__ float kept(float x) { return ROUNDS ? rounded(x) : x; }

extern "C" __global__ void __launch_bounds__(THREADS)
    newton_schulz_squares(const ELEMENT *__restrict__ x, float *__restrict__ sums, const __grid_constant__ Scalars s) {
    const u64 stride = s.parts * THREADS * WIDTH;
    const ELEMENT *matrix = x + blockIdx.y * s.elements;
    float sum = 0.0f;
    for (u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * WIDTH; i < s.elements; i += stride) {
        const Floats some = load(matrix, i, s.elements);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            const float at = kept(some.at[j]);
            sum = fmaf(at, at, sum);
        }
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) sums[blockIdx.y * s.parts + blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    newton_schulz_normalise(const ELEMENT *__restrict__ x, const float *__restrict__ sums, ELEMENT *__restrict__ y,
                            const __grid_constant__ Scalars s) {
    float sum = 0.0f;
    for (u64 i = threadIdx.x; i < s.parts; i += THREADS) sum += sums[blockIdx.y * s.parts + i];
    sum = block_sum<THREADS>(sum);
    const float norm = kept(__fadd_rn(kept(__fsqrt_rn(sum)), float_of(s.weight)));
    const u64 start = ((u64)blockIdx.x * THREADS + threadIdx.x) * WIDTH, matrix = blockIdx.y * s.elements;
    if (start >= s.elements) return;
    Floats some = load(x + matrix, start, s.elements);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) some.at[j] = kept(__fdiv_rn(kept(some.at[j]), norm));
    store(y + matrix, start, s.elements, some);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    newton_schulz_scale(const ELEMENT *__restrict__ x, ELEMENT *__restrict__ y, const __grid_constant__ Scalars s) {
    const u64 start = ((u64)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    if (start >= s.elements) return;
    Floats some = load(x, start, s.elements);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) some.at[j] = kept(__fmul_rn(some.at[j], float_of(s.weight)));
    store(y, start, s.elements, some);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    newton_schulz_combine(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ v, ELEMENT *__restrict__ y,
                          const __grid_constant__ Scalars s) {
    const u64 start = ((u64)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    if (start >= s.elements) return;
    Floats some = load(x, start, s.elements);
    const Floats other = load(v, start, s.elements);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        some.at[j] = kept(__fadd_rn(kept(__fmul_rn(some.at[j], float_of(s.weight))), kept(other.at[j])));
    }
    store(y, start, s.elements, some);
}
