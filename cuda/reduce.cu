// The sum of all elements in a fixed order (src/ops/reduce.rs).
//
//   out[b] = sum of x[n] over the b-th slice of `slice` packs of WIDTH elements
//
// Layout: x is dense f32, WIDTH divides n, and x starts at a multiple of 4 WIDTH bytes.
// Grid: one dimension, 1024 threads; a block a slice, none of them empty. One block gives the sum; of several blocks'
// sums, a second launch.
// Numerics: f32. A thread adds every 1024th pack in order, element by element; the threads of a warp are added by
// butterfly, the warps by butterfly after them: equal bits every time.
//
// The launcher (src/backend/cuda_reduce.rs) defines the constant; these are the forms that the compile check tries:
// variant: -DWIDTH=4
// variant: -DWIDTH=1

#include "common/word.cuh"

#define THREADS 1024
#define BATCH 8 // loads in flight a thread
#define ALL 0xffffffffu

struct Scalars {
    u64 packs, slice; // in all, and of a block
};

struct alignas(4 * WIDTH) Pack {
    float at[WIDTH];
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL, x, step);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    reduce_sum(const float *__restrict__ x, float *__restrict__ out, const __grid_constant__ Scalars s) {
    __shared__ float warps[THREADS / 32];
    const Pack *from = reinterpret_cast<const Pack *>(x);
    const u64 first = blockIdx.x * s.slice, last = min(first + s.slice, s.packs);
    float sum = 0.0f;
    for (u64 start = first + threadIdx.x; start < last; start += THREADS * BATCH) {
        Pack some[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            some[k] = {};
            if (start + k * THREADS < last) some[k] = from[start + k * THREADS];
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) sum += some[k].at[j];
        }
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = warp_sum(warps[threadIdx.x]);
        if (threadIdx.x == 0) out[blockIdx.x] = sum;
    }
}
