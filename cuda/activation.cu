// Elementwise activations, forward and backward (src/ops/activation.rs).
//
//   leaky_relu_squared  y = l^2, l = x below zero times SLOPE           gx = 2 gy (x < 0 ? SLOPE^2 x : x)
//   silu                y = x s(x), s the logistic sigmoid              gx = gy s (1 + x (1 - s))
//   logistic            y = s(x)                                        gx = gy y (1 - y), from y
//   softplus            y = max(x, 0) + log(1 + exp(-|x|))              gx = gy s(x)
//   silu_gate           y = x g s(g)                                    gx = gy g s(g), gg = gy x s (1 + g (1 - s))
//
// Layout: every tensor is [n, c] of ELEMENT with a stride of its own from row to row; a dense tensor of any rank is one
// row. WIDTH elements (16 bytes, or one) divide c, all strides and all starts.
// Grid: one dimension of 256 threads. A block takes 512 consecutive packs of WIDTH elements (silu_gate_backward, with its
// three inputs, 256), a thread every 256th of them: its loads are all under way before the first is used.
// Invariants: every element of an output is written exactly once, nothing past the last pack is read or written.
// Numerics: f32, rounded once to ELEMENT at the end; no exponential of a positive number. f32 elements take expf and a
// true division, bf16 ones the fast forms (2 units in the last place of f32). A NaN stays one.
//
// The launcher (src/backend/cuda_activation.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1
// variant: -DELEMENT=float -DWIDTH=4
// variant: -DELEMENT=float -DWIDTH=1

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"

#define THREADS 256

struct Scalars {
    u64 packs;      // of a tensor, fewer than 2^32
    u64 columns;    // packs of a row
    u64 strides[5]; // in packs, of the tensors in the order of the kernel's pointers
    u64 slope;      // of leaky_relu_squared, a float's bits
};

struct alignas(sizeof(ELEMENT) * WIDTH) Pack {
    ELEMENT at[WIDTH];
};

__device__ __forceinline__ float small_exp(float x) {
    if constexpr (sizeof(ELEMENT) == 2) return __expf(x);
    return expf(x);
}

__device__ __forceinline__ float divide(float a, float b) {
    if constexpr (sizeof(ELEMENT) == 2) return __fdividef(a, b);
    return a / b;
}

__device__ __forceinline__ float sigmoid(float x) {
    const float e = small_exp(-fabsf(x));
    return divide(x < 0.0f ? e : 1.0f, 1.0f + e);
}

// d silu(x) / dx, from x and s(x).
__device__ __forceinline__ float silu_slope(float x, float s) { return s * fmaf(x, 1.0f - s, 1.0f); }

// Applies f(in[INPUTS], out[OUTPUTS]) to every element.
template <int INPUTS, int OUTPUTS, typename F>
__device__ __forceinline__ void each(const ELEMENT *const (&in)[INPUTS], ELEMENT *const (&out)[OUTPUTS],
                                     const Scalars &s, F f) {
    constexpr int PACKS = INPUTS > 2 ? 1 : 2;
    u32 row[PACKS], column[PACKS];
    Pack packs[PACKS][INPUTS];
    const u64 first = (u64)blockIdx.x * (PACKS * THREADS) + threadIdx.x;
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        const u64 at = first + k * THREADS;
        if (at >= s.packs) break;
        row[k] = (u32)at / (u32)s.columns;
        column[k] = (u32)at - row[k] * (u32)s.columns;
#pragma unroll
        for (int i = 0; i < INPUTS; i++) {
            packs[k][i] = reinterpret_cast<const Pack *>(in[i])[row[k] * s.strides[i] + column[k]];
        }
    }
#pragma unroll
    for (int k = 0; k < PACKS; k++) {
        if (first + k * THREADS >= s.packs) break;
        Pack results[OUTPUTS];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            float x[INPUTS], y[OUTPUTS];
#pragma unroll
            for (int i = 0; i < INPUTS; i++) x[i] = to_float(packs[k][i].at[j]);
            f(x, y);
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++) from_float(results[o].at[j], y[o]);
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            reinterpret_cast<Pack *>(out[o])[row[k] * s.strides[INPUTS + o] + column[k]] = results[o];
        }
    }
}

// Kernels of one input, of two, and the two of the gate. `x[]` are the inputs in order, `y[]` the outputs.
#define KERNEL_1(NAME, BODY)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(const ELEMENT *__restrict__ a, ELEMENT *__restrict__ to, const __grid_constant__ Scalars s) {            \
        each<1, 1>({a}, {to}, s, [&](const float *x, float *y) { BODY });                                             \
    }
#define KERNEL_2(NAME, BODY)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        NAME(const ELEMENT *__restrict__ a, const ELEMENT *__restrict__ b, ELEMENT *__restrict__ to,                  \
             const __grid_constant__ Scalars s) {                                                                     \
        each<2, 1>({a, b}, {to}, s, [&](const float *x, float *y) { BODY });                                          \
    }

__device__ __forceinline__ float below(float x, float slope) {
    return slope == 0.0f && x < 0.0f ? 0.0f : slope * x; // no NaN of infinity
}

KERNEL_1(leaky_relu_squared_forward, {
    const float slope = float_of(s.slope);
    const float l = x[0] < 0.0f ? below(x[0], slope) : x[0];
    y[0] = l * l;
})
// x, gy
KERNEL_2(leaky_relu_squared_backward, {
    const float slope = float_of(s.slope);
    y[0] = 2.0f * x[1] * (x[0] < 0.0f ? below(x[0], slope * slope) : x[0]);
})
KERNEL_1(silu_forward, { y[0] = x[0] * sigmoid(x[0]); })
KERNEL_2(silu_backward, { y[0] = x[1] * silu_slope(x[0], sigmoid(x[0])); })
KERNEL_1(logistic_forward, { y[0] = sigmoid(x[0]); })
// y, gy
KERNEL_2(logistic_backward, { y[0] = x[1] * x[0] * (1.0f - x[0]); })
KERNEL_1(softplus_forward, { y[0] = (x[0] < 0.0f ? 0.0f : x[0]) + log1pf(small_exp(-fabsf(x[0]))); })
KERNEL_2(softplus_backward, { y[0] = x[1] * sigmoid(x[0]); })
// x, gate
KERNEL_2(silu_gate_forward, { y[0] = x[0] * (x[1] * sigmoid(x[1])); })

// gx and the gate's gradient.
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_gate_backward(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ gate, const ELEMENT *__restrict__ gy,
                       ELEMENT *__restrict__ gx, ELEMENT *__restrict__ grad_gate, const __grid_constant__ Scalars s) {
    each<3, 2>({x, gate, gy}, {gx, grad_gate}, s, [&](const float *from, float *to) {
        const float sigma = sigmoid(from[1]);
        to[0] = from[2] * (from[1] * sigma);
        to[1] = from[2] * from[0] * silu_slope(from[1], sigma);
    });
}
