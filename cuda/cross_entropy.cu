// Softcapped cross-entropy on rows of logits, forward and backward (src/ops/cross_entropy.rs).
//
//   z = cap tanh(x / cap)                 (z = x without a cap)
//   forward   lse = log sum_v exp(z[v]),  nll = lse - z[target]
//   backward  gx[v] = (exp(z[v] - lse) - [v = target]) gnll (1 - tanh(x[v] / cap)^2)
//
// x are the products of a chunk of hidden rows and the head, made by the GEMM just before, while they still lie in the
// L2; the launcher takes chunk after chunk, so that all logits never exist at once.
//
// Layout: x is dense row-major [rows, vocab] of f32, WIDTH divides vocab and every row starts at a multiple of 4 WIDTH
// bytes. target, lse, nll and gnll are [n] of all rows, of which the chunk's begin at `first`. gx is dense row-major
// [.., vocab] of ELEMENT, in which the chunk's rows begin at `to`.
// Grid: one dimension. LANES threads (32, or 256: the block) share a row; a block of 256 takes 256 / LANES rows.
// Invariants: the chunk's elements of nll and lse, or of gx, are each written exactly once. A target outside the
// vocabulary gives a loss of NaN.
// Numerics: f32. A lane adds exp(z - m) in a fixed order under its running maximum m; lanes, then warps, are joined in a
// fixed tree: equal bits every time. gx is rounded once to ELEMENT.
//
// The launcher (src/backend/cuda_cross_entropy.rs) defines the constants; these are the forms that the compile check
// tries:
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=4 -DLANES=32 -DCAPPED=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=4 -DLANES=256 -DCAPPED=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1 -DLANES=32 -DCAPPED=0
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=32 -DCAPPED=0
// variant: -DELEMENT=float -DWIDTH=1 -DLANES=256 -DCAPPED=1

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"


#define THREADS 256
#define BATCH 8 // loads in flight a thread
#define LOWEST (-3.402823466e38f)
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fffffff)

struct Scalars {
    u64 first, rows, vocab; // the chunk's rows among all of them, and columns
    u64 to;                 // the chunk's first row in gx
    u64 cap, inverse_cap;   // floats
};

struct alignas(4 * WIDTH) Logits {
    float at[WIDTH];
};
struct alignas(sizeof(ELEMENT) * WIDTH) Gradients {
    ELEMENT at[WIDTH];
};

// Gradients in f32 show what the fast forms of tanh and exp leave out, those in bf16 do not.
constexpr bool EXACT = sizeof(ELEMENT) == 4;

__device__ __forceinline__ float exponential(float x) { return EXACT ? expf(x) : __expf(x); }

// tanh(x / cap); 0 without a cap, so that the slope 1 - tanh^2 is 1.
__device__ __forceinline__ float squashed(float x, const Scalars &s) {
    if (!CAPPED) return 0.0f;
    x *= float_of(s.inverse_cap);
    return EXACT ? (float)tanh((double)x) : tanhf(x);
}

__device__ __forceinline__ float capped(float x, const Scalars &s) {
    return CAPPED ? float_of(s.cap) * squashed(x, s) : x;
}

// The sum of exp(z - most) over some z, none of them above `most`.
struct Sum {
    float most, sum;

    __device__ __forceinline__ void join(Sum other) {
        const float top = fmaxf(most, other.most);
        sum = sum * exponential(most - top) + other.sum * exponential(other.most - top);
        most = top;
    }
};

// Joins the sums of a row's lanes; right in the first of them. Every thread of the block must call it.
__device__ __forceinline__ Sum row_sum(Sum sum) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const float most = __shfl_down_sync(0xffffffffu, sum.most, step);
        sum.join({most, __shfl_down_sync(0xffffffffu, sum.sum, step)});
    }
    if constexpr (LANES > 32) {
        static_assert(LANES == 32 || LANES == THREADS, "a warp or the block shares a row");
        __shared__ Sum warps[THREADS / 32];
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < THREADS / 32; i++) sum.join(warps[i]);
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_forward(const float *__restrict__ x, const int *__restrict__ target, float *__restrict__ nll,
                          float *__restrict__ lse, const __grid_constant__ Scalars s) {
    const u64 row = (u64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int lane = threadIdx.x % LANES;
    const bool inside = row < s.rows;
    const int packs = inside ? (int)(s.vocab / WIDTH) : 0;
    x += row * s.vocab;
    const Logits *from = reinterpret_cast<const Logits *>(x);
    Sum sum = {LOWEST, 0.0f};
    for (int start = lane; start < packs; start += LANES * BATCH) {
        Logits some[BATCH]; // all loads before the first use
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            some[k] = {};
            if (start + k * LANES < packs) some[k] = from[start + k * LANES];
        }
        float most = sum.most;
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const bool is_there = start + k * LANES < packs;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                some[k].at[j] = is_there ? capped(some[k].at[j], s) : -INFINITE;
                most = fmaxf(most, some[k].at[j]);
            }
        }
        sum.sum *= exponential(sum.most - most);
        sum.most = most;
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) sum.sum += exponential(some[k].at[j] - most);
        }
    }
    sum = row_sum(sum);
    if (inside && lane == 0) {
        const u64 at = s.first + row;
        const unsigned column = (unsigned)target[at];
        const float total = sum.most + logf(sum.sum);
        lse[at] = total;
        nll[at] = column < s.vocab ? total - capped(x[column], s) : NOT_A_NUMBER;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_backward(const float *__restrict__ x, const int *__restrict__ target,
                           const float *__restrict__ lse, const float *__restrict__ gnll, ELEMENT *__restrict__ gx,
                           const __grid_constant__ Scalars s) {
    const u64 row = (u64)blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    if (row >= s.rows) return;
    const int lane = threadIdx.x % LANES, packs = (int)(s.vocab / WIDTH);
    const u64 at = s.first + row;
    const int column = target[at];
    const float total = lse[at], grad = gnll[at];
    const Logits *from = reinterpret_cast<const Logits *>(x + row * s.vocab);
    Gradients *to = reinterpret_cast<Gradients *>(gx + (s.to + row) * s.vocab);
    for (int start = lane; start < packs; start += LANES * BATCH) {
        Logits some[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            some[k] = {};
            if (start + k * LANES < packs) some[k] = from[start + k * LANES];
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const int pack = start + k * LANES;
            if (pack >= packs) break;
            Gradients grads;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const float value = some[k].at[j], t = squashed(value, s);
                const float p = exponential((CAPPED ? float_of(s.cap) * t : value) - total);
                const float rest = p - (pack * WIDTH + j == column ? 1.0f : 0.0f);
                from_float(grads.at[j], rest * grad * fmaf(-t, t, 1.0f));
            }
            to[pack] = grads;
        }
    }
}
