// Norm of each head of q and of k, rotary position embedding, and q's gain, forward and backward (src/ops/qk_norm.rs).
//
//   forward    y = gain R (r x),                         r = 1 / sqrt(sum(x^2) / HEAD + eps), R the position's rotation
//   backward  gx = gain r (u - x r^2 sum(u x) / HEAD),   u = R^T gy; the gain's gradient is the rows' sum of r sum(u x)
//
// Layout: x, y, gy, gx of ELEMENT are rows of heads * HEAD, one for each of the n = b t tokens, so many elements apart
// (a row may be part of a wider one); cosines, sines f32 [t, HALF], table_row elements apart; gain ELEMENT [heads]
// (GAIN = 1; q's only); partials f32 [q_blocks, heads]. Of a head's channels the first 2 HALF rotate, channel i with
// channel i + HALF, and the rest pass. A thread holds WIDTH neighbouring pairs, CHUNKS times; what passes is paired
// too, one half of it with the other. WIDTH divides HALF and HEAD / 2 - HALF, and every row starts at a multiple of WIDTH
// elements' bytes.
// Grid: one dimension, the first q_blocks blocks for q, the others for k. LANES threads share a head; a block has SLOTS
// places for heads and takes whole tokens, so that a place's head stays the same. A block of the forward takes its
// tokens once; the blocks of the backward stride over all tokens and load the next before they compute.
// Invariants: every element of y, gx, partials and the gain's gradient is written exactly once; x and gy are read once;
// places without a head read and write nothing but take part in the sums.
// Numerics: f32, rounded once to ELEMENT at the end. A lane adds its pairs in order, the lanes are added by butterfly;
// of the gain's gradient a place adds its tokens in order, a block its places in order, qk_norm_gain's lanes every 32nd
// block in order, then each other by butterfly: equal bits every time.
//
// The launcher (src/backend/cuda_qk_norm.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=64 -DHALF=32 -DWIDTH=8 -DLANES=4 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=64 -DHALF=32 -DWIDTH=8 -DLANES=4 -DCHUNKS=1 -DGAIN=0
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=64 -DHALF=8 -DWIDTH=8 -DLANES=4 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=64 -DHALF=0 -DWIDTH=8 -DLANES=4 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=128 -DHALF=64 -DWIDTH=8 -DLANES=8 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=48 -DHALF=8 -DWIDTH=8 -DLANES=4 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=10 -DHALF=2 -DWIDTH=1 -DLANES=8 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=512 -DHALF=255 -DWIDTH=1 -DLANES=32 -DCHUNKS=8 -DGAIN=1
// variant: -DELEMENT=__nv_bfloat16 -DHEAD=256 -DHALF=127 -DWIDTH=1 -DLANES=32 -DCHUNKS=4 -DGAIN=1
// variant: -DELEMENT=float -DHEAD=64 -DHALF=32 -DWIDTH=4 -DLANES=8 -DCHUNKS=1 -DGAIN=1
// variant: -DELEMENT=float -DHEAD=256 -DHALF=128 -DWIDTH=4 -DLANES=32 -DCHUNKS=1 -DGAIN=0

#include <cuda_bf16.h>
#include "common/element.cuh"
#include "common/word.cuh"

#define THREADS 256
#define SLOTS (THREADS / LANES)
#define PAIRS (HEAD / 2 / WIDTH)
// Resident blocks of the backward on a multiprocessor (the launcher's grid): within their registers.
#define RESIDENT 2

#if GAIN
#define GAIN_PARAMETER const ELEMENT *__restrict__ gains,
#define PARTIALS_PARAMETER float *__restrict__ partials,
#else
#define GAIN_PARAMETER
#define PARTIALS_PARAMETER
#endif

// From one token to the next in elements: of x, of y or gy, and of gx.
struct Rows {
    u64 heads, x, y, gx;
};

struct Scalars {
    u64 tokens, time, eps, q_blocks, table_row;
    Rows q, k;
};

struct alignas(sizeof(ELEMENT) * WIDTH) Pack {
    ELEMENT values[WIDTH];
};
struct alignas(WIDTH < 4 ? 4 * WIDTH : 16) Angles {
    float values[WIDTH];
};

// Where a lane's k-th pairs begin: their first channels, and how far the second ones are from them.
__device__ __forceinline__ int first_channel(int lane, int k) {
    const int pair = (k * LANES + lane) * WIDTH;
    return pair < HALF ? pair : pair + HALF;
}
__device__ __forceinline__ int channel_distance(int lane, int k) {
    return (k * LANES + lane) * WIDTH < HALF ? HALF : HEAD / 2 - HALF;
}

// A lane's pairs of one head as they lie in memory.
struct Packs {
    Pack a[CHUNKS], b[CHUNKS];

    __device__ __forceinline__ void load(const ELEMENT *head, int lane, bool inside) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
            if (inside && k * LANES + lane < PAIRS) {
                const ELEMENT *from = head + first_channel(lane, k);
                a[k] = *reinterpret_cast<const Pack *>(from);
                b[k] = *reinterpret_cast<const Pack *>(from + channel_distance(lane, k));
            }
    }
};

// The same as floats, zeros where there are none.
struct Pairs {
    float a[CHUNKS * WIDTH], b[CHUNKS * WIDTH];

    __device__ __forceinline__ Pairs(const Packs &packs, int lane, bool inside) {
#pragma unroll
        for (int i = 0; i < CHUNKS * WIDTH; i++) {
            const bool here = inside && i / WIDTH * LANES + lane < PAIRS;
            a[i] = here ? to_float(packs.a[i / WIDTH].values[i % WIDTH]) : 0.0f;
            b[i] = here ? to_float(packs.b[i / WIDTH].values[i % WIDTH]) : 0.0f;
        }
    }

    __device__ __forceinline__ void store(ELEMENT *head, int lane, bool inside) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++)
            if (inside && k * LANES + lane < PAIRS) {
                Pack first, second;
#pragma unroll
                for (int j = 0; j < WIDTH; j++) {
                    from_float(first.values[j], a[k * WIDTH + j]);
                    from_float(second.values[j], b[k * WIDTH + j]);
                }
                ELEMENT *to = head + first_channel(lane, k);
                *reinterpret_cast<Pack *>(to) = first;
                *reinterpret_cast<Pack *>(to + channel_distance(lane, k)) = second;
            }
    }

    // Turns by the angles of one position (their rows of the tables), or with BACK the other way.
    template <bool BACK>
    __device__ __forceinline__ void rotate(const float *cosines, const float *sines, int lane, bool inside) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const int pair = (k * LANES + lane) * WIDTH;
            if (!inside || pair >= HALF) continue;
            const Angles cosine = *reinterpret_cast<const Angles *>(cosines + pair);
            const Angles sine = *reinterpret_cast<const Angles *>(sines + pair);
#pragma unroll
            for (int j = 0; j < WIDTH; j++) {
                const float c = cosine.values[j], s = BACK ? -sine.values[j] : sine.values[j];
                float &x = a[k * WIDTH + j], &y = b[k * WIDTH + j];
                const float turned = fmaf(y, s, x * c);
                y = fmaf(-x, s, y * c);
                x = turned;
            }
        }
    }

    __device__ __forceinline__ float dot(const Pairs &other) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < CHUNKS * WIDTH; i++) sum = fmaf(b[i], other.b[i], fmaf(a[i], other.a[i], sum));
        return sum;
    }
};

// The sum over a head's lanes, the same bits in each. Every thread of the warp calls it.
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, const Scalars &s) {
    return 1.0f / sqrtf(sum_of_squares / (float)HEAD + float_of(s.eps));
}

// What a thread works on: a head of a token of each of its block's rounds.
struct Place {
    bool is_k, has_head;
    int lane, head, heads;
    // Tokens of a round; the round's first token and the thread's own one of the block's first round.
    int tokens, round, token;

    __device__ __forceinline__ explicit Place(const Scalars &s) {
        const int slot = threadIdx.x / LANES;
        is_k = blockIdx.x >= s.q_blocks;
        lane = threadIdx.x % LANES;
        heads = (int)(is_k ? s.k.heads : s.q.heads);
        head = slot % heads;
        tokens = SLOTS / heads;
        has_head = slot < tokens * heads;
        round = (int)(blockIdx.x - (is_k ? s.q_blocks : 0)) * tokens;
        token = round + slot / heads;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    qk_norm_forward(const ELEMENT *__restrict__ q, const ELEMENT *__restrict__ k, const float *__restrict__ cosines,
                    const float *__restrict__ sines, GAIN_PARAMETER ELEMENT *__restrict__ q_out,
                    ELEMENT *__restrict__ k_out, const __grid_constant__ Scalars s) {
    const Place at(s);
    const bool inside = at.has_head && at.token < (int)s.tokens;
    const u64 token = inside ? at.token : 0, table = token % (unsigned)s.time * s.table_row;
    Packs packs;
    packs.load((at.is_k ? k + token * s.k.x : q + token * s.q.x) + at.head * HEAD, at.lane, inside);
    Pairs x(packs, at.lane, inside);
    float by = inverse_rms(lane_sum(x.dot(x)), s);
#if GAIN
    if (!at.is_k) by *= to_float(gains[at.head]);
#endif
    x.rotate<false>(cosines + table, sines + table, at.lane, inside);
#pragma unroll
    for (int i = 0; i < CHUNKS * WIDTH; i++) {
        x.a[i] *= by;
        x.b[i] *= by;
    }
    x.store((at.is_k ? k_out + token * s.k.y : q_out + token * s.q.y) + at.head * HEAD, at.lane, inside);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    qk_norm_backward(const ELEMENT *__restrict__ q, const ELEMENT *__restrict__ k, const ELEMENT *__restrict__ q_grad,
                     const ELEMENT *__restrict__ k_grad, const float *__restrict__ cosines,
                     const float *__restrict__ sines, GAIN_PARAMETER ELEMENT *__restrict__ q_out,
                     ELEMENT *__restrict__ k_out, PARTIALS_PARAMETER const __grid_constant__ Scalars s) {
    const Place at(s);
    const Rows rows = at.is_k ? s.k : s.q;
    const ELEMENT *const x_in = (at.is_k ? k : q) + at.head * HEAD;
    const ELEMENT *const grad_in = (at.is_k ? k_grad : q_grad) + at.head * HEAD;
    ELEMENT *const out = (at.is_k ? k_out : q_out) + at.head * HEAD;
    const int step = (int)(at.is_k ? gridDim.x - s.q_blocks : s.q_blocks) * at.tokens, tokens = (int)s.tokens;
    float gain = 1.0f, gain_sum = 0.0f;
#if GAIN
    if (!at.is_k) gain = to_float(gains[at.head]);
#endif

    int token = at.token;
    bool inside = at.has_head && token < tokens;
    Packs x_packs, grad_packs;
    x_packs.load(x_in + (u64)token * rows.x, at.lane, inside);
    grad_packs.load(grad_in + (u64)token * rows.y, at.lane, inside);
    for (int round = at.round; round < tokens; round += step) {
        const int next = token + step;
        const bool next_inside = at.has_head && next < tokens;
        Packs next_x, next_grad;
        next_x.load(x_in + (u64)next * rows.x, at.lane, next_inside);
        next_grad.load(grad_in + (u64)next * rows.y, at.lane, next_inside);

        const Pairs x(x_packs, at.lane, inside);
        Pairs u(grad_packs, at.lane, inside);
        const u64 table = (inside ? token % (int)s.time : 0) * s.table_row;
        u.rotate<true>(cosines + table, sines + table, at.lane, inside);
        const float r = inverse_rms(lane_sum(x.dot(x)), s), product = lane_sum(u.dot(x));
        gain_sum = fmaf(r, product, gain_sum);
        const float by = gain * r, curvature = by * (r * r * (product / (float)HEAD));
#pragma unroll
        for (int i = 0; i < CHUNKS * WIDTH; i++) {
            u.a[i] = u.a[i] * by - x.a[i] * curvature;
            u.b[i] = u.b[i] * by - x.b[i] * curvature;
        }
        u.store(out + (u64)token * rows.gx, at.lane, inside);
        x_packs = next_x;
        grad_packs = next_grad;
        token = next;
        inside = next_inside;
    }

#if GAIN
    __shared__ float sums[SLOTS];
    if (at.is_k) return;
    if (at.lane == 0) sums[threadIdx.x / LANES] = gain_sum;
    __syncthreads();
    if (threadIdx.x < at.heads) {
        float sum = 0.0f;
        for (int i = 0; i < at.tokens; i++) sum += sums[i * at.heads + threadIdx.x];
        partials[(u64)blockIdx.x * at.heads + threadIdx.x] = sum;
    }
#endif
}

// The gain's gradient from the blocks' parts: one warp a head.
extern "C" __global__ void __launch_bounds__(32)
    qk_norm_gain(const float *__restrict__ partials, float *__restrict__ grad, const __grid_constant__ Scalars s) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < (int)s.q_blocks; i += 32) sum += partials[(u64)i * s.q.heads + blockIdx.x];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) grad[blockIdx.x] = sum;
}
