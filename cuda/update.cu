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
// EACH(0)EACH(1)...EACH(COUNT - 1); EACH is defined as what is to be written for each: parameters, then cases. With more
// than 4,096 bytes of them (34 tensors of ADAM), CUDA 12.1 or later is wanted.
// Grid: 256 threads. A block takes PACKS times 256 packs of WIDTH elements of one tensor (SQUARES: 256 * 32 elements), a
// thread every 256th pack, all loads before the first use. ADAM, SQUARES, BLEND: tensor i has the blocks from
// slots[i].first on. MOMENTUM, ORTHOGONAL: block (x, y) is the x-th of tensor y. CLIP: one block of 1024 threads.
// Invariants: each element of each output is written exactly once, from what is in the inputs before the launch.
// Numerics: f32, each operation rounded as it stands above, so that the bits are those of the reference in f32. Sums
// in a fixed order: a thread's elements, the block's threads by butterfly, its warps in order, the blocks by CLIP.
//
// The launcher (src/backend/cuda_update.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DPART=ADAM -DWIDTH=4 -DPACKS=2 -DCOUNT=3 -DTENSORS=EACH(0)EACH(1)EACH(2)
// variant: -DPART=ADAM -DWIDTH=1 -DPACKS=2 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=MOMENTUM -DELEMENT=__nv_bfloat16 -DWIDTH=4 -DPACKS=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=MOMENTUM -DELEMENT=float -DWIDTH=1 -DPACKS=4 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=ORTHOGONAL -DELEMENT=__nv_bfloat16 -DWIDTH=4 -DPACKS=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=ORTHOGONAL -DELEMENT=float -DWIDTH=1 -DPACKS=4 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=SQUARES -DWIDTH=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=SQUARES -DWIDTH=1 -DCOUNT=1 -DTENSORS=EACH(0)
// variant: -DPART=CLIP -DWIDTH=1
// variant: -DPART=BLEND -DWIDTH=4 -DPACKS=4 -DCOUNT=2 -DTENSORS=EACH(0)EACH(1)
// variant: -DPART=BLEND -DWIDTH=1 -DPACKS=4 -DCOUNT=1 -DTENSORS=EACH(0)

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"
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
    int tensor = 0, after = COUNT;
    while (after - tensor > 1) {
        const int middle = (tensor + after) / 2;
        if (slots[middle].first <= blockIdx.x) {
            tensor = middle;
        } else {
            after = middle;
        }
    }
    return tensor;
}
#endif

#ifdef PACKS
#define BLOCK_ELEMENTS ((u64)THREADS * WIDTH * PACKS)

// Does `work` on a block's elements, a thread's PACKS packs at once, or at a row's end pack by pack. `work` is
// work.run<COUNT, WHOLE>(start), of COUNT packs, the first at `start`, THREADS packs apart.
template <typename Work> __device__ __forceinline__ void over_block(const Work &work, u64 block, u64 length) {
    u64 start = block * BLOCK_ELEMENTS + threadIdx.x * WIDTH;
    if ((block + 1) * BLOCK_ELEMENTS <= length) {
        work.template run<PACKS, true>(start);
    } else {
        for (; start < length; start += THREADS * WIDTH) work.template run<1, false>(start);
    }
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

struct Work {
    Pointers p;
    const Slot &slot;
    float factor;

    template <int N, bool WHOLE> __device__ __forceinline__ void run(u64 start) const {
        const bool fresh = slot.flags & FRESH, rounds = slot.flags & BF16;
        const float keep1 = float_of(slot.keep1), new1 = second_of(slot.keep1);
        const float keep2 = float_of(slot.keep2), new2 = second_of(slot.keep2);
        const float size = float_of(slot.rate), decay = second_of(slot.rate);
        const float second = float_of(slot.root), eps = second_of(slot.root);
        Floats values[N], grads[N], ms[N] = {}, vs[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            const u64 at = start + i * THREADS * WIDTH;
            values[i] = load<WHOLE>(p.value, at, slot.elements);
            grads[i] = load<WHOLE>(p.grad, at, slot.elements);
            if (!fresh) {
                ms[i] = load<WHOLE>(p.m, at, slot.elements);
                vs[i] = load<WHOLE>(p.v, at, slot.elements);
            }
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const u64 at = start + i * THREADS * WIDTH;
            Floats value = values[i], m = ms[i], v = vs[i];
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const float g = times(grads[i].at[j], factor);
                const float first_part = times(g, new1), second_part = times(times(g, g), new2);
                m.at[j] = kept(fresh ? first_part : plus(times(m.at[j], keep1), first_part), rounds);
                v.at[j] = kept(fresh ? second_part : plus(times(v.at[j], keep2), second_part), rounds);
                const float root = plus(__fsqrt_rn(__fdiv_rn(v.at[j], second)), eps);
                const float change = __fdiv_rn(times(m.at[j], size), root);
                value.at[j] = kept(__fsub_rn(times(value.at[j], decay), change), rounds);
            }
            store<WHOLE>(p.new_m, at, slot.elements, m);
            store<WHOLE>(p.new_v, at, slot.elements, v);
            store<WHOLE>(p.new_value, at, slot.elements, value);
            if (slot.flags & COPY) store<WHOLE>(p.copy, at, slot.elements, value);
        }
    }
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
    over_block(Work{p, slot, s.scaled ? *scale : 1.0f}, blockIdx.x - slot.first, slot.elements);
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

struct Work {
    Pointers p;
    ELEMENT *u;
    const Scalars &s;
    u64 flags;
    float factor;

    template <int N, bool WHOLE> __device__ __forceinline__ void run(u64 start) const {
        const bool fresh = flags & FRESH, rounds = flags & BF16;
        const float momentum = float_of(s.momentum);
        Floats grads[N], buffers[N] = {};
#pragma unroll
        for (int i = 0; i < N; i++) {
            const u64 at = start + i * THREADS * WIDTH;
            grads[i] = load<WHOLE>(p.grad, at, s.elements);
            if (!fresh) buffers[i] = load<WHOLE>(p.buffer, at, s.elements);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const u64 at = start + i * THREADS * WIDTH;
            Floats buffer = buffers[i], update;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const float g = kept(times(grads[i].at[j], factor), rounds);
                buffer.at[j] = fresh ? g : kept(plus(times(buffer.at[j], momentum), g), rounds);
                update.at[j] = s.nesterov ? kept(plus(g, times(buffer.at[j], momentum)), rounds) : buffer.at[j];
            }
            store<WHOLE>(p.new_buffer, at, s.elements, buffer);
            store<WHOLE>(u, at, s.elements, update);
        }
    }
};

#define EACH(i) const float *grad##i, const float *buffer##i, float *new_buffer##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_momentum(const float *scale, ELEMENT *u, TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i: p = {grad##i, buffer##i, new_buffer##i}; break;
    Pointers p = {};
    switch (blockIdx.y) { TENSORS }
    ELEMENT *row = u + (s.start + blockIdx.y) * s.elements;
    over_block(Work{p, row, s, s.flags[blockIdx.y], s.scaled ? *scale : 1.0f}, blockIdx.x, s.elements);
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

struct Work {
    Pointers p;
    const ELEMENT *u;
    const Scalars &s;
    const Slot &slot;

    template <int N, bool WHOLE> __device__ __forceinline__ void run(u64 start) const {
        const float lr = float_of(slot.rate), decay = second_of(slot.rate), ratio = float_of(s.ratio);
        Floats values[N], updates[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const u64 at = start + i * THREADS * WIDTH;
            values[i] = load<WHOLE>(p.value, at, s.elements);
            updates[i] = load<WHOLE>(u, at, s.elements);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const u64 at = start + i * THREADS * WIDTH;
            Floats value = values[i];
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const float step = times(kept(times(updates[i].at[j], ratio), s.rounds), lr);
                value.at[j] = kept(__fsub_rn(times(value.at[j], decay), step), slot.flags & BF16);
            }
            store<WHOLE>(p.new_value, at, s.elements, value);
            if (slot.flags & COPY) store<WHOLE>(p.copy, at, s.elements, value);
        }
    }
};

#define EACH(i) const float *value##i, float *new_value##i, bf16 *copy##i,
extern "C" __global__ void __launch_bounds__(THREADS)
    update_orthogonal(const ELEMENT *u, TENSORS const __grid_constant__ Scalars s) {
#undef EACH
#define EACH(i)                                                                                                       \
    case i: p = {value##i, new_value##i, copy##i}; break;
    Pointers p = {};
    switch (blockIdx.y) { TENSORS }
    const ELEMENT *row = u + (s.start + blockIdx.y) * s.elements;
    over_block(Work{p, row, s, s.slots[blockIdx.y]}, blockIdx.x, s.elements);
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
                some[i] = load<true>(x, start + k + i * THREADS * WIDTH, slot.elements);
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

struct Work {
    Pointers p;
    u64 weights, elements;

    template <int N, bool WHOLE> __device__ __forceinline__ void run(u64 start) const {
        Floats as[N], bs[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            as[i] = load<WHOLE>(p.a, start + i * THREADS * WIDTH, elements);
            bs[i] = load<WHOLE>(p.b, start + i * THREADS * WIDTH, elements);
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                as[i].at[j] = plus(times(as[i].at[j], float_of(weights)), times(bs[i].at[j], second_of(weights)));
            }
            store<WHOLE>(p.y, start + i * THREADS * WIDTH, elements, as[i]);
        }
    }
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
    over_block(Work{p, s.weights, slot.elements}, blockIdx.x - slot.first, slot.elements);
}

#endif
