// The residual stream and its norm in one pass over its rows (src/ops/stream.rs).
//
//   forward    t = x + sum_i s_i y_i          (s_i = 1 for a branch without a scale)
//              z = m0 t + m1 x0               (z = t without MIX)
//              n = g r z,                     r = 1 / sqrt(sum(z^2) / c + eps)
//   backward  gz = g2 + g (r gn - z (r^3 sum(z gn) / c))
//             gt = m0 gz + g1                 (gt = gz without MIX)
//             gx = gt,  gy_i = s_i gt,  gx0 = m1 gz + the sum so far
//             gm0 = sum t gz,  gm1 = sum x0 gz,  gs_i = sum y_i gt, over all rows
//   g2, gn, g1 are the gradients of z, n and t.
//
// Layout: all [n, c] tensors dense row-major of ELEMENT, c <= LANES * CHUNKS * WIDTH; WIDTH divides c, and every row
// starts at a multiple of WIDTH elements' bytes (16 where WIDTH > 1). Weights are rows [c] of ELEMENT: s_i at
// an offset, m0 and m1 one after the other. What a launch has not is never read or written (see the flags); its
// pointer may be any.
// Grid: one dimension. LANES threads share a row, a block holds THREADS / LANES groups of them, and goes over the rows
// in steps of the grid. Rows and weights stay in registers: each tensor crosses the memory bus once. The backward's
// column sums stay in registers over all rows of a group, are added over the block's groups in shared memory, and
// leave as one row of `partials[blocks, SLOTS, c]` (f32) a block; stream_sum adds those.
// Slots: gm0, gm1 (with MIX), then gs_0, gs_1 (as many as BRANCHES).
// Invariants: every element of each output of the launch is written exactly once; threads of rows past the last read
// and write nothing but take part in the sums. All threads of a block make the same number of steps.
// Numerics: f32. t is rounded to ELEMENT where it is written and used rounded then; z is always rounded, and the norm
// sees the rounded z. The backward reads t (without MIX t is z), or makes it again from x and y_i by the same
// operations, and so sees the forward's z to the bit. A lane adds its elements in a fixed order, lanes are added by
// butterfly, warps, groups and blocks in order: equal bits every time.
//
// The launcher (src/backend/cuda_stream.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=1 -DMIX=0 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=1 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=0 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=0 -DMIX=0 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=1 -DMIX=0 -DNORM=0
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=64 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=0
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=32 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=128 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=8 -DLANES=512 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1 -DLANES=4 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=__nv_bfloat16 -DWIDTH=1 -DLANES=512 -DCHUNKS=4 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=128 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=float -DWIDTH=4 -DLANES=512 -DCHUNKS=1 -DBRANCHES=2 -DMIX=1 -DNORM=1
// variant: -DELEMENT=float -DWIDTH=1 -DLANES=512 -DCHUNKS=4 -DBRANCHES=2 -DMIX=1 -DNORM=1

#include <cuda_bf16.h>
#include "common/word.cuh"

// Which entry points are compiled: the sum of 1 (forward), 2 (backward), 4 (sum); all where nothing is said.
#ifndef PASS
#define PASS 7
#endif

#define THREADS (LANES > 256 ? LANES : 256)
#define GROUPS (THREADS / LANES)
#define SIZE (CHUNKS * WIDTH)
#define SLOTS (2 * MIX + BRANCHES)

// What a launch has.
#define HAS_SCALE(i) (1 << (i))      // s_i
#define HAS_T 4                      // forward: t is written; backward: x is t
#define HAS_Z 8                      // forward: z is written (else it is x); backward: g2
#define HAS_G1 16
#define HAS_X0 32                    // gx0
#define HAS_SUM 64                   // the sum so far of gx0
#define HAS_SLOT(i) (128 << (i))

struct Scalars {
    u64 rows, columns, eps, norm_scale, flags, scale_0, scale_1;
};

// WIDTH elements: words of memory, or one element. (Of elements in pairs the compiler would give each a register.)
#if WIDTH > 1
typedef uint4 Load;
#else
typedef ELEMENT Load;
#endif

__device__ __forceinline__ unsigned word_of(const uint4 &load, int i) {
    return i == 0 ? load.x : i == 1 ? load.y : i == 2 ? load.z : load.w;
}

__device__ __forceinline__ float element_of(float load, int) { return load; }
__device__ __forceinline__ float element_of(__nv_bfloat16 load, int) { return __bfloat162float(load); }
__device__ __forceinline__ float element_of(const uint4 &load, int j) {
    if (sizeof(ELEMENT) == 4) return __uint_as_float(word_of(load, j));
    const unsigned pair = word_of(load, j / 2);
    return __uint_as_float(j % 2 ? pair & 0xffff0000u : pair << 16);
}

// Two elements of a word from j on, or one.
__device__ __forceinline__ unsigned word(const float *values, int word) {
    if (sizeof(ELEMENT) == 4) return __float_as_uint(values[word]);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * word], values[2 * word + 1]);
    return *reinterpret_cast<const unsigned *>(&pair);
}
__device__ __forceinline__ void join(uint4 &load, const float *values) {
    load = make_uint4(word(values, 0), word(values, 1), word(values, 2), word(values, 3));
}
__device__ __forceinline__ void join(float &load, const float *values) { load = values[0]; }
__device__ __forceinline__ void join(__nv_bfloat16 &load, const float *values) { load = __float2bfloat16_rn(values[0]); }

__device__ __forceinline__ float rounded(float x) {
    return sizeof(ELEMENT) == 4 ? x : __bfloat162float(__float2bfloat16_rn(x));
}

// A row as it lies in memory, spread over its lanes.
struct Packs {
    Load at[CHUNKS];

    // Zeros past the row's end, and everywhere without `has`.
    __device__ __forceinline__ void load(bool has, const ELEMENT *row, int length, int lane) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            at[k] = Load();
            if (has && k * LANES + lane < length) at[k] = reinterpret_cast<const Load *>(row)[k * LANES + lane];
        }
    }

    __device__ __forceinline__ float get(int i) const { return element_of(at[i / WIDTH], i % WIDTH); }
};

__device__ __forceinline__ void store(const float (&values)[SIZE], ELEMENT *row, int length, int lane) {
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
        Load load;
        join(load, values + k * WIDTH);
        if (k * LANES + lane < length) reinterpret_cast<Load *>(row)[k * LANES + lane] = load;
    }
}

// The weights of a lane's columns; a scale that the launch has not is 1.
struct Weights {
    Packs s0, s1, m0, m1;
    bool has_0, has_1;

    __device__ __forceinline__ Weights(const ELEMENT *scale_0, const ELEMENT *scale_1, const ELEMENT *mix,
                                       const Scalars &s, int lane)
        : has_0(s.flags & HAS_SCALE(0)), has_1(s.flags & HAS_SCALE(1)) {
        const int length = (int)s.columns / WIDTH;
        s0.load(BRANCHES > 0 && has_0, scale_0 + s.scale_0, length, lane);
        s1.load(BRANCHES > 1 && has_1, scale_1 + s.scale_1, length, lane);
        m0.load(MIX, mix, length, lane);
        m1.load(MIX, mix + s.columns, length, lane);
    }

    __device__ __forceinline__ float scale_0(int i) const { return has_0 ? s0.get(i) : 1.0f; }
    __device__ __forceinline__ float scale_1(int i) const { return has_1 ? s1.get(i) : 1.0f; }

    __device__ __forceinline__ float add(float t, float y0, float y1, int i) const {
        if (BRANCHES > 0) t = fmaf(scale_0(i), y0, t);
        if (BRANCHES > 1) t = fmaf(scale_1(i), y1, t);
        return t;
    }

    // Forward and backward have z from here, so that both have the same bits.
    __device__ __forceinline__ float mix(float t, float x0, int i) const {
        return rounded(MIX ? fmaf(m0.get(i), t, __fmul_rn(m1.get(i), x0)) : t);
    }
};

// The row of a group at a step.
struct Place {
    u64 offset;
    int length;
    bool inside;

    __device__ __forceinline__ Place(u64 first, const Scalars &s) {
        const u64 row = first + threadIdx.x / LANES;
        inside = row < s.rows;
        offset = inside ? row * s.columns : 0;
        length = inside ? (int)s.columns / WIDTH : 0;
    }
};

// The sum over a row's lanes, the same bits in each of them. Every thread of the group calls it at every step, with
// `turn` 0 and 1 in turn: a warp may write the next step's sums while others still read this one's. Groups do not wait
// for each other: each has a barrier of its own.
__device__ __forceinline__ float2 step_sum(float2 value, int turn) {
#pragma unroll
    for (int step = (LANES < 32 ? LANES : 32) / 2; step > 0; step /= 2) {
        value.x += __shfl_xor_sync(0xffffffffu, value.x, step);
        value.y += __shfl_xor_sync(0xffffffffu, value.y, step);
    }
    if constexpr (LANES > 32) {
        __shared__ float2 warps[2][THREADS / 32];
        if (threadIdx.x % 32 == 0) warps[turn][threadIdx.x / 32] = value;
        asm volatile("bar.sync %0, %1;" ::"r"(1 + (int)threadIdx.x / LANES), "n"(LANES) : "memory");
        const int first = threadIdx.x / LANES * (LANES / 32);
        value = warps[turn][first];
        for (int i = 1; i < LANES / 32; i++) {
            value.x += warps[turn][first + i].x;
            value.y += warps[turn][first + i].y;
        }
    }
    return value;
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, const Scalars &s) {
    return 1.0f / sqrtf(sum_of_squares / (float)s.columns + float_of(s.eps));
}

#if PASS & 1
extern "C" __global__ void __launch_bounds__(THREADS)
    stream_forward(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ y0, const ELEMENT *__restrict__ y1,
                   const ELEMENT *__restrict__ x0, const ELEMENT *__restrict__ scale_0,
                   const ELEMENT *__restrict__ scale_1, const ELEMENT *__restrict__ mix, ELEMENT *__restrict__ t,
                   ELEMENT *__restrict__ z, ELEMENT *__restrict__ n, const __grid_constant__ Scalars s) {
    const int lane = threadIdx.x % LANES;
    const Weights w(scale_0, scale_1, mix, s, lane);
    const u64 step = (u64)gridDim.x * GROUPS;
    int turn = 0;
    for (u64 first = (u64)blockIdx.x * GROUPS; first < s.rows; first += step, turn ^= 1) {
        const Place at(first, s);
        Packs in, y0s, y1s, start;
        in.load(true, x + at.offset, at.length, lane);
        y0s.load(BRANCHES > 0, y0 + at.offset, at.length, lane);
        y1s.load(BRANCHES > 1, y1 + at.offset, at.length, lane);
        start.load(MIX, x0 + at.offset, at.length, lane);
        float row[SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; i++) row[i] = w.add(in.get(i), y0s.get(i), y1s.get(i), i);
        if (s.flags & HAS_T) {
            store(row, t + at.offset, at.length, lane);
#pragma unroll
            for (int i = 0; i < SIZE; i++) row[i] = rounded(row[i]);
        }
#pragma unroll
        for (int i = 0; i < SIZE; i++) row[i] = w.mix(row[i], start.get(i), i);
        if (s.flags & HAS_Z) store(row, z + at.offset, at.length, lane);
        if (NORM) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < SIZE; i++) sum = fmaf(row[i], row[i], sum);
            const float r = inverse_rms(step_sum(make_float2(sum, 0.0f), turn).x, s) * float_of(s.norm_scale);
#pragma unroll
            for (int i = 0; i < SIZE; i++) row[i] *= r;
            store(row, n + at.offset, at.length, lane);
        }
    }
}

#endif

#if PASS & 2
// Adds a lane's column sums of one slot over the block's groups, into the block's row of the slot.
__device__ __forceinline__ void leave(const float (&sums)[SIZE], float *to, int columns) {
    const int lane = threadIdx.x % LANES;
    if constexpr (GROUPS == 1) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            const int column = (i / WIDTH * LANES + lane) * WIDTH + i % WIDTH;
            if (column < columns) to[column] = sums[i];
        }
    } else {
        __shared__ float groups[GROUPS][LANES * SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            groups[threadIdx.x / LANES][(i / WIDTH * LANES + lane) * WIDTH + i % WIDTH] = sums[i];
        __syncthreads();
        for (int column = threadIdx.x; column < columns; column += THREADS) {
            float sum = groups[0][column];
            for (int group = 1; group < GROUPS; group++) sum += groups[group][column];
            to[column] = sum;
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)
    stream_backward(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ y0, const ELEMENT *__restrict__ y1,
                    const ELEMENT *__restrict__ x0, const ELEMENT *__restrict__ scale_0,
                    const ELEMENT *__restrict__ scale_1, const ELEMENT *__restrict__ mix,
                    const ELEMENT *__restrict__ g2, const ELEMENT *__restrict__ gn, const ELEMENT *__restrict__ g1,
                    const ELEMENT *__restrict__ so_far, ELEMENT *__restrict__ gx, ELEMENT *__restrict__ gy0,
                    ELEMENT *__restrict__ gy1, ELEMENT *__restrict__ gx0, float *__restrict__ partials,
                    const __grid_constant__ Scalars s) {
    const int lane = threadIdx.x % LANES;
    const u64 flags = s.flags;
    const bool makes_t = BRANCHES > 0 && MIX && !(flags & HAS_T);
    const bool takes_y0 = BRANCHES > 0 && (makes_t || flags & HAS_SLOT(2 * MIX));
    const bool takes_y1 = BRANCHES > 1 && (makes_t || flags & HAS_SLOT(2 * MIX + 1));
    const bool takes_t = NORM || makes_t || (MIX && flags & HAS_SLOT(0));
    const u64 step = (u64)gridDim.x * GROUPS;
    float gm0[SIZE] = {}, gm1[SIZE] = {}, gs0[SIZE] = {}, gs1[SIZE] = {};
    int turn = 0;
    for (u64 first = (u64)blockIdx.x * GROUPS; first < s.rows; first += step, turn ^= 1) {
        const Place at(first, s);
        // At every step, from the nearest cache: held beside the sums they would not fit in registers.
        asm volatile("" : "+l"(scale_0), "+l"(scale_1), "+l"(mix));
        const Weights w(scale_0, scale_1, mix, s, lane);
        Packs in, y0s, y1s, start, grad, grad_n, grad_t, sum;
        in.load(takes_t, x + at.offset, at.length, lane);
        y0s.load(takes_y0, y0 + at.offset, at.length, lane);
        y1s.load(takes_y1, y1 + at.offset, at.length, lane);
        start.load(MIX && takes_t, x0 + at.offset, at.length, lane);
        grad.load(flags & HAS_Z, g2 + at.offset, at.length, lane);
        grad_n.load(NORM, gn + at.offset, at.length, lane);
        grad_t.load(MIX && flags & HAS_G1, g1 + at.offset, at.length, lane);
        sum.load(MIX && flags & HAS_SUM, so_far + at.offset, at.length, lane);
        // In f32 where it is made again.
        float t[SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            t[i] = makes_t ? w.add(in.get(i), y0s.get(i), y1s.get(i), i) : in.get(i);
        float r = 0.0f, curvature = 0.0f;
        if (NORM) {
            float2 dots = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                const float z = w.mix(t[i], start.get(i), i);
                dots.x = fmaf(z, z, dots.x);
                dots.y = fmaf(z, grad_n.get(i), dots.y);
            }
            dots = step_sum(dots, turn);
            // Not of a row past the last: 1 / sqrt(eps) may be infinite.
            if (at.inside) r = inverse_rms(dots.x, s);
            curvature = r * r * r * (dots.y / (float)s.columns) * float_of(s.norm_scale);
            r *= float_of(s.norm_scale);
        }
        float gz[SIZE], gt[SIZE], out[SIZE];
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            gz[i] = grad.get(i);
            if (NORM) gz[i] += grad_n.get(i) * r - w.mix(t[i], start.get(i), i) * curvature;
            gt[i] = MIX ? fmaf(w.m0.get(i), gz[i], grad_t.get(i)) : gz[i];
        }
        store(gt, gx + at.offset, at.length, lane);
        if (MIX) {
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                gm0[i] = fmaf(t[i], gz[i], gm0[i]);
                gm1[i] = fmaf(start.get(i), gz[i], gm1[i]);
                out[i] = fmaf(w.m1.get(i), gz[i], sum.get(i));
            }
            if (flags & HAS_X0) store(out, gx0 + at.offset, at.length, lane);
        }
        if (BRANCHES > 0) {
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                gs0[i] = fmaf(y0s.get(i), gt[i], gs0[i]);
                out[i] = w.s0.get(i) * gt[i];
            }
            if (w.has_0) store(out, gy0 + at.offset, at.length, lane);
        }
        if (BRANCHES > 1) {
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                gs1[i] = fmaf(y1s.get(i), gt[i], gs1[i]);
                out[i] = w.s1.get(i) * gt[i];
            }
            if (w.has_1) store(out, gy1 + at.offset, at.length, lane);
        }
    }
    if (SLOTS > 0) {
        const int columns = (int)s.columns;
        float *to = partials + (u64)blockIdx.x * SLOTS * s.columns;
        if (MIX && flags & HAS_SLOT(0)) {
            leave(gm0, to, columns);
            leave(gm1, to + s.columns, columns);
        }
        if (BRANCHES > 0 && flags & HAS_SLOT(2 * MIX)) leave(gs0, to + 2 * MIX * s.columns, columns);
        if (BRANCHES > 1 && flags & HAS_SLOT(2 * MIX + 1)) leave(gs1, to + (2 * MIX + 1) * s.columns, columns);
    }
}

#endif

#if PASS & 4
struct SumScalars {
    u64 blocks, stride, from, first, count, elements, has_old;
};

// Adds the blocks' partial sums into a parameter's gradient: the `elements` of `grad` are those of `old` (or 0), and
// elements [first, first + count) get theirs of partials[blocks, stride] from column `from` on.
//
// Grid: one block for 32 elements; 16 warps take every 16th partial row each and are added in order.
extern "C" __global__ void __launch_bounds__(512)
    stream_sum(const float *__restrict__ partials, const float *__restrict__ old, float *__restrict__ grad,
               const __grid_constant__ SumScalars s) {
    __shared__ float parts[16][32];
    const int part = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 element = (u64)blockIdx.x * 32 + lane;
    const bool adds = element >= s.first && element < s.first + s.count;
    float sum = 0.0f;
    if (adds) {
        const float *column = partials + s.from + (element - s.first);
#pragma unroll 4
        for (u64 block = part; block < s.blocks; block += 16) sum += column[block * s.stride];
    }
    parts[part][lane] = sum;
    __syncthreads();
    if (part == 0 && element < s.elements) {
        float total = s.has_old ? old[element] : 0.0f;
        if (adds) {
            float all = parts[0][lane];
            for (int i = 1; i < 16; i++) all += parts[i][lane];
            total += all;
        }
        grad[element] = total;
    }
}
#endif
