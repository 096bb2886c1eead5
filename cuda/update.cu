// The optimizers' elementwise steps over many tensors in one launch (src/ops/update.rs), one PART a compilation:
//
//   ADAM        g = s grad, m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2,
//               w' = d w - size m' / (sqrt(v' / (1 - b2^t)) + eps),      size = lr / (1 - b1^t), d = 1 - lr decay
//   MOMENTUM    g = s grad, buffer' = mu buffer + g, u = g + mu buffer' (Nesterov) or buffer'
//   ORTHOGONAL  w' = d w - lr (ratio u)
//   SQUARES     sums of squares of parts of all tensors
//   CLIP        s = min(1, clip / (sqrt(sum of SQUARES' sums) + 1e-6))
//   BLEND       y = p a + q b
//
// s is one number on the device (1 where the flag SCALED is off and the pointer means nothing). A copy of w' in bf16
// is written beside it where the flag COPY is on; where FRESH is on, m, v or buffer are zeros that are not read (their
// pointers mean nothing); where BF16 is on, what is stored (in MOMENTUM also g, in u too) is rounded to bf16 first.
//
// Layout: every tensor is dense, f32, of any length; copies are bf16. u is [n, elements] of ELEMENT, the tensors of a
// launch being its rows from `start` on. WIDTH > 1: every tensor, and every row of u, starts at a multiple of WIDTH
// elements.
// Parameters: what all tensors share, then the pointers of tensor 0, of tensor 1, ..., then the scalars. TENSORS is
// EACH(0)EACH(1)...EACH(COUNT - 1); EACH is defined as what is to be written for each: parameters, then cases. With
// 4,096 bytes of parameters, COUNT is 24 (ADAM), 48 (MOMENTUM, ORTHOGONAL, BLEND) or 96 (SQUARES) at most.
// Grid: 256 threads. ADAM, BLEND: a block takes 256 WIDTH elements of one tensor, SQUARES: 256 * 32; tensor i has the
// blocks from slots[i].first on. MOMENTUM, ORTHOGONAL: block (x, y) takes 256 WIDTH elements of tensor y. CLIP: one
// block of 1024 threads.
// Invariants: each element of each output is written exactly once, from what is in the inputs before the launch.
// Numerics: f32, each operation rounded as it stands above, so that the bits are those of the reference in f32. Sums
// in a fixed order: a thread's elements, the block's threads by butterfly, its warps in order, the blocks by CLIP.
//
// The launcher (src/backend/cuda_update.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DPART=ADAM -DWIDTH=4 -DCOUNT=3 -DTENSORS=EACH(0)EACH(1)EACH(2)
// variant: -DPART=ADAM -DWIDTH=1 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=MOMENTUM -DELEMENT=__nv_bfloat16 -DWIDTH=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=MOMENTUM -DELEMENT=float -DWIDTH=1 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=ORTHOGONAL -DELEMENT=__nv_bfloat16 -DWIDTH=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=ORTHOGONAL -DELEMENT=float -DWIDTH=1 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=SQUARES -DWIDTH=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=SQUARES -DWIDTH=1 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=CLIP -DWIDTH=1
// variant: -DPART=BLEND -DWIDTH=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=BLEND -DWIDTH=1 -DCOUNT=1 -DTENSORS=EACH(0)

#include <cuda_bf16.h>
#include "common/pack.cuh"

#define ADAM 1
#define MOMENTUM 2
#define ORTHOGONAL 3
#define SQUARES 4
#define CLIP 5
#define BLEND 6

#define THREADS 256
#define SQUARES_ELEMENTS (THREADS * 32) // of a block
#define SQUARES_LOADS 8                 // in flight a thread
#define CLIP_THREADS 1024

// Flags.
#define FRESH 1
#define BF16 2
#define COPY 4

__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float kept(float x, bool bf16) { return bf16 ? rounded(x) : x; }

#if PART == ADAM || PART == SQUARES || PART == BLEND
// The tensor that this block works on: the last whose first block is not after it.
template <typename Slot> __device__ __forceinline__ int tensor_of_block(const Slot (&slots)[COUNT]) {
    int tensor = 0;
#pragma unroll
    for (int i = 1; i < COUNT; i++) tensor += blockIdx.x >= slots[i].first;
    return tensor;
}
#endif

#if PART == ADAM

struct Slot {
    u64 elements, first;
    u64 flags;
    u64 keep1, keep2; // b1 and 1 - b1, b2 and 1 - b2
    u64 rate;         // size and d
    u64 root;         // 1 - b2^t and eps
};

struct Scalars {
    u64 scaled;
    Slot slots[COUNT];
};

struct Pointers {
    const float *value, *grad, *m, *v;
    float *new_value, *new_m, *new_v;
    bf16 *copy;
};

#define EACH(i)                                                                                                       \
    const float *value##i, const float *grad##i, const float *m##i, const float *v##i, float *new_value##i,           \
        float *new_m##i, float *new_v##i, bf16 *copy##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_adam(const float *scale, TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i:                                                                                                           \
        p = {value##i, grad##i, m##i, v##i, new_value##i, new_m##i, new_v##i, copy##i};                               \
        break;
    const int tensor = tensor_of_block(s.slots);
    Pointers p = {};
    switch (tensor) { TENSORS }
    const Slot &slot = s.slots[tensor];
    const u64 start = ((blockIdx.x - slot.first) * THREADS + threadIdx.x) * WIDTH;
    if (start >= slot.elements) return;
    Floats value = load(p.value, start, slot.elements), grad = load(p.grad, start, slot.elements), m = {}, v = {};
    const bool fresh = slot.flags & FRESH, rounds = slot.flags & BF16;
    if (!fresh) {
        m = load(p.m, start, slot.elements);
        v = load(p.v, start, slot.elements);
    }
    const float factor = s.scaled ? *scale : 1.0f;
    const float size = float_of(slot.rate), decay = second_of(slot.rate);
    const float second = float_of(slot.root), eps = second_of(slot.root);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        const float g = times(grad.at[j], factor);
        const float first_part = times(g, second_of(slot.keep1)), second_part = times(times(g, g), second_of(slot.keep2));
        m.at[j] = kept(fresh ? first_part : plus(times(m.at[j], float_of(slot.keep1)), first_part), rounds);
        v.at[j] = kept(fresh ? second_part : plus(times(v.at[j], float_of(slot.keep2)), second_part), rounds);
        const float root = plus(__fsqrt_rn(__fdiv_rn(v.at[j], second)), eps);
        const float change = __fdiv_rn(times(m.at[j], size), root);
        value.at[j] = kept(__fsub_rn(times(value.at[j], decay), change), rounds);
    }
    store(p.new_m, start, slot.elements, m);
    store(p.new_v, start, slot.elements, v);
    store(p.new_value, start, slot.elements, value);
    if (slot.flags & COPY) store(p.copy, start, slot.elements, value);
}

#elif PART == MOMENTUM

struct Scalars {
    u64 elements; // of each tensor
    u64 start;    // the row of u of tensor 0
    u64 scaled, nesterov;
    u64 momentum;
    u64 flags[COUNT];
};

struct Pointers {
    const float *grad, *buffer;
    float *new_buffer;
};

#define EACH(i) const float *grad##i, const float *buffer##i, float *new_buffer##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_momentum(const float *scale, ELEMENT *u, TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i: p = {grad##i, buffer##i, new_buffer##i}; break;
    Pointers p = {};
    switch (blockIdx.y) { TENSORS }
    const u64 start = ((u64)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    if (start >= s.elements) return;
    const bool fresh = s.flags[blockIdx.y] & FRESH, rounds = s.flags[blockIdx.y] & BF16;
    Floats grad = load(p.grad, start, s.elements), buffer = {}, update;
    if (!fresh) buffer = load(p.buffer, start, s.elements);
    const float factor = s.scaled ? *scale : 1.0f, momentum = float_of(s.momentum);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        const float g = kept(times(grad.at[j], factor), rounds);
        buffer.at[j] = fresh ? g : kept(plus(times(buffer.at[j], momentum), g), rounds);
        update.at[j] = s.nesterov ? kept(plus(g, times(buffer.at[j], momentum)), rounds) : buffer.at[j];
    }
    store(p.new_buffer, start, s.elements, buffer);
    store(u + (s.start + blockIdx.y) * s.elements, start, s.elements, update);
}

#elif PART == ORTHOGONAL

struct Slot {
    u64 rate; // lr and d
    u64 flags;
};

struct Scalars {
    u64 elements; // of each tensor
    u64 start;    // the row of u of tensor 0
    u64 ratio;
    u64 rounds; // whether ratio u is rounded to bf16
    Slot slots[COUNT];
};

struct Pointers {
    const float *value;
    float *new_value;
    bf16 *copy;
};

#define EACH(i) const float *value##i, float *new_value##i, bf16 *copy##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_orthogonal(const ELEMENT *u, TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i: p = {value##i, new_value##i, copy##i}; break;
    Pointers p = {};
    switch (blockIdx.y) { TENSORS }
    const u64 start = ((u64)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    if (start >= s.elements) return;
    const Slot &slot = s.slots[blockIdx.y];
    Floats value = load(p.value, start, s.elements);
    const Floats update = load(u + (s.start + blockIdx.y) * s.elements, start, s.elements);
    const float lr = float_of(slot.rate), decay = second_of(slot.rate), ratio = float_of(s.ratio);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        const float step = times(kept(times(update.at[j], ratio), s.rounds), lr);
        value.at[j] = kept(__fsub_rn(times(value.at[j], decay), step), slot.flags & BF16);
    }
    store(p.new_value, start, s.elements, value);
    if (slot.flags & COPY) store(p.copy, start, s.elements, value);
}

#elif PART == SQUARES

struct Slot {
    u64 elements, first;
};

struct Scalars {
    u64 start; // the first of the launch's sums: one a block
    Slot slots[COUNT];
};

#define EACH(i) const float *x##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_squares(float *sums, TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i: x = x##i; break;
    const int tensor = tensor_of_block(s.slots);
    const float *x = nullptr;
    switch (tensor) { TENSORS }
    const Slot &slot = s.slots[tensor];
    const u64 block = (blockIdx.x - slot.first) * SQUARES_ELEMENTS, start = block + threadIdx.x * WIDTH;
    float sum = 0.0f;
    for (int k = 0; k < SQUARES_ELEMENTS; k += SQUARES_LOADS * THREADS * WIDTH) {
        Floats some[SQUARES_LOADS];
        if (block + SQUARES_ELEMENTS <= slot.elements) {
#pragma unroll
            for (int i = 0; i < SQUARES_LOADS; i++) {
                const Pack<float> pack = *reinterpret_cast<const Pack<float> *>(x + start + k + i * THREADS * WIDTH);
#pragma unroll
                for (int j = 0; j < WIDTH; j++) some[i].at[j] = pack.values[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < SQUARES_LOADS; i++) some[i] = load(x, start + k + i * THREADS * WIDTH, slot.elements);
        }
#pragma unroll
        for (int i = 0; i < SQUARES_LOADS * WIDTH; i++) {
            const float at = some[i / WIDTH].at[i % WIDTH];
            sum = fmaf(at, at, sum);
        }
    }
    sum = block_sum<THREADS>(sum);
    if (threadIdx.x == 0) sums[s.start + blockIdx.x] = sum;
}

#elif PART == CLIP

struct Scalars {
    u64 count; // sums
    u64 clip;
};

extern "C" __global__ void __launch_bounds__(CLIP_THREADS)
    update_clip(const float *sums, float *factor, const __grid_constant__ Scalars s) {
    float sum = 0.0f;
    for (u64 i = threadIdx.x; i < s.count; i += CLIP_THREADS) sum += sums[i];
    sum = block_sum<CLIP_THREADS>(sum);
    if (threadIdx.x == 0) {
        const float x = times(__fdiv_rn(1.0f, plus(__fsqrt_rn(sum), 1e-6f)), float_of(s.clip));
        *factor = x > 1.0f ? 1.0f : x; // NaN stays
    }
}

#elif PART == BLEND

struct Slot {
    u64 elements, first;
};

struct Scalars {
    u64 weights; // p and q
    Slot slots[COUNT];
};

struct Pointers {
    const float *a, *b;
    float *y;
};

#define EACH(i) const float *a##i, const float *b##i, float *y##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_blend(TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i: p = {a##i, b##i, y##i}; break;
    const int tensor = tensor_of_block(s.slots);
    Pointers p = {};
    switch (tensor) { TENSORS }
    const Slot &slot = s.slots[tensor];
    const u64 start = ((blockIdx.x - slot.first) * THREADS + threadIdx.x) * WIDTH;
    if (start >= slot.elements) return;
    Floats a = load(p.a, start, slot.elements);
    const Floats b = load(p.b, start, slot.elements);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
        a.at[j] = plus(times(a.at[j], float_of(s.weights)), times(b.at[j], second_of(s.weights)));
    }
    store(p.y, start, slot.elements, a);
}

#endif
