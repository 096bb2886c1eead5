// The backward of the norm, rotation and gain of queries and keys (qk_norm.cu) within attention's, on a row's f32
// gradient where a product leaves it.
//
//   gx = gain r (u - x r^2 sum(u x) / HEAD),   u = R^T gy,   r = 1 / sqrt(sum(x^2) / HEAD + eps)
//
// HALF: pairs of channels that rotate, a multiple of 8: a channel and its partner are then in one thread.
// Four lanes have a row: lane l the columns 8 j + 2 (l % 4) + {0, 1}, in `g` at 2 j + {0, 1}, in `x` as one pair.
// Tiles of x, and of the cosines and sines, are the copy engine's boxes of ROW_BYTES a row; HEAD / 2 floats take the
// bytes of HEAD bf16, so that all three have the same form.

#define HEADS_OF_GROUP 32

struct NormScalars : Scalars {
    u64 eps;
};

// The kernel's parameters.
#if NORM
#define SCALARS NormScalars
#define NORM_MAPS const __grid_constant__ TensorMap q_before_map, const __grid_constant__ TensorMap k_before_map,
#define NORM_POINTERS const void *, const void *,
#else
#define SCALARS Scalars
#define NORM_MAPS
#define NORM_POINTERS
#endif
#if HALF
#define ANGLE_MAPS const __grid_constant__ TensorMap cosines_map, const __grid_constant__ TensorMap sines_map,
#define ANGLE_POINTERS const void *, const void *,
#else
#define ANGLE_MAPS
#define ANGLE_POINTERS
#endif
#if GAIN
#define GAIN_PARAMETERS const __nv_bfloat16 *__restrict__ gains, float *__restrict__ partials,
#else
#define GAIN_PARAMETERS
#endif

#if NORM

// Where a tile's boxes are: the one of the first columns and, of heads that take two, the one of the others.
struct Sides {
    u32 left, right;

    // Of one piece.
    __device__ __forceinline__ static Sides of(u32 tile, int rows) { return {tile, tile + rows * ROW_BYTES}; }
    __device__ __forceinline__ u32 at(int side) const { return side == 0 ? left : right; }
};

// Boxes side by side of a tile of angles.
#define ANGLE_SIDES ((HALF + COLUMNS / 2 - 1) / (COLUMNS / 2))

__device__ __forceinline__ constexpr u32 angle_bytes(int rows) { return ANGLE_SIDES * rows * ROW_BYTES; }

// A tile of rows before the norm, of the cosines or of the sines; rows past the end are zeros.
__device__ __forceinline__ void load_before(const Sides &to, int rows, const TensorMap &map, u32 barrier, int head,
                                            int row, int batch) {
#pragma unroll
    for (int side = 0; side < HEAD / COLUMNS; side++)
#pragma unroll
        for (int r = 0; r < rows; r += 64)
            copy_in(to.at(side) + r * ROW_BYTES, map, barrier, head * HEAD + side * COLUMNS, row + r, batch);
}
__device__ __forceinline__ void load_angles(const Sides &to, int rows, const TensorMap &map, u32 barrier, int row) {
#pragma unroll
    for (int side = 0; side < ANGLE_SIDES; side++)
#pragma unroll
        for (int r = 0; r < rows; r += 64)
            copy_in(to.at(side) + r * ROW_BYTES, map, barrier, side * (COLUMNS / 2), row + r, 0);
}

// The rows of a tile that a thread has part of, before the norm: at `row`, which is a warp's first, plus lane / 4, and
// 8 further where it has two.
template <int ROWS> struct Before {
    u32 x[ROWS][HEAD / 8];

    // Every thread of the warp calls it.
    __device__ __forceinline__ void load(const Sides &tile, int row) {
        const int lane = threadIdx.x % 32;
        constexpr int chunks = 4 / ROWS;
#pragma unroll
        for (int j = 0; j < HEAD / 8; j += chunks) {
            const int side = j / (COLUMNS / 8), chunk = j % (COLUMNS / 8) + lane / (8 * ROWS);
            const uint4 m = load_matrices(tile.at(side) + swizzled(ROW_BYTES, row + lane % (8 * ROWS), chunk));
            if constexpr (ROWS == 2) {
                x[0][j] = m.x, x[1][j] = m.y, x[0][j + 1] = m.z, x[1][j + 1] = m.w;
            } else {
                x[0][j] = m.x, x[0][j + 1] = m.y, x[0][j + 2] = m.z, x[0][j + 3] = m.w;
            }
        }
    }
};

// The angles of the same rows, in pairs of neighbouring channels.
template <int ROWS> struct Angles {
    float2 cosine[ROWS][HALF / 8 + (HALF == 0)], sine[ROWS][HALF / 8 + (HALF == 0)];

    __device__ __forceinline__ void load(const Sides &cosines, const Sides &sines, int row) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < HALF / 8; j++) {
                const int side = 2 * j / (COLUMNS / 8), chunk = 2 * j % (COLUMNS / 8) + lane % 4 / 2;
                const u32 at = swizzled(ROW_BYTES, row + lane / 4 + 8 * r, chunk) + lane % 2 * 8;
                cosine[r][j] = load_pair(cosines.at(side) + at);
                sine[r][j] = load_pair(sines.at(side) + at);
            }
    }

    __device__ __forceinline__ void turn_back(int r, float (&g)[HEAD / 4]) const {
#pragma unroll
        for (int i = 0; i < HALF / 4; i++) {
            const float c = i % 2 ? cosine[r][i / 2].y : cosine[r][i / 2].x;
            const float s = i % 2 ? sine[r][i / 2].y : sine[r][i / 2].x;
            const float first = g[i], second = g[i + HALF / 4];
            g[i] = fmaf(-second, s, first * c);
            g[i + HALF / 4] = fmaf(first, s, second * c);
        }
    }
};

// Makes of a row's u its gx, and gives the row's term of the gain's gradient. Every thread of the warp calls it.
__device__ __forceinline__ float norm_backward(float (&g)[HEAD / 4], const u32 (&x)[HEAD / 8], float gain, float eps) {
    float squares = 0.0f, product = 0.0f;
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++) {
        const float low = __uint_as_float(x[j] << 16), high = __uint_as_float(x[j] & 0xffff0000);
        squares = fmaf(high, high, fmaf(low, low, squares));
        product = fmaf(g[2 * j + 1], high, fmaf(g[2 * j], low, product));
    }
#pragma unroll
    for (int step = 2; step > 0; step /= 2) {
        squares += __shfl_xor_sync(0xffffffffu, squares, step);
        product += __shfl_xor_sync(0xffffffffu, product, step);
    }
    const float r = 1.0f / sqrtf(squares / (float)HEAD + eps);
    const float by = gain * r, curvature = by * (r * r * (product / (float)HEAD));
#pragma unroll
    for (int j = 0; j < HEAD / 8; j++) {
        const float low = __uint_as_float(x[j] << 16), high = __uint_as_float(x[j] & 0xffff0000);
        g[2 * j] = fmaf(g[2 * j], by, -low * curvature);
        g[2 * j + 1] = fmaf(g[2 * j + 1], by, -high * curvature);
    }
    return r * product;
}

// What the keys' norm takes, where the loop over the steps leaves room: behind the last step a stage is free once the
// step before it is done, the other one after the last, and with the last part of gq the buffers of gS.
struct KeyTiles {
    static constexpr bool COSINES_EARLY = HEAD < 128;
    Sides before, cosines, sines;

    __device__ __forceinline__ KeyTiles(u32 q_tiles, u32 gy_tiles, u32 gs_tiles, int steps) {
        const u32 first = steps % STAGES * tile_bytes(QUERIES), second = tile_bytes(QUERIES) - first;
        if (COSINES_EARLY) {
            before = {q_tiles + first, 0};
            cosines = {gy_tiles + first, 0};
            sines = {q_tiles + second, 0};
        } else {
            before = {q_tiles + first, gy_tiles + first};
            cosines = {q_tiles + second, gy_tiles + second};
            sines = {gs_tiles, gs_tiles + GS_BYTES};
        }
    }
};

// The gradient of a warp's 16 keys from `row` of their tiles on, in a product's registers, from that (unscaled) of what
// the norm and the rotation made of them.
__device__ __forceinline__ void norm_keys(float (&gk)[HEAD / 2], const KeyTiles &tiles, int row, float scale,
                                          float eps) {
    Before<2> before;
    Angles<2> angles;
    before.load(tiles.before, row);
    angles.load(tiles.cosines, tiles.sines, row);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float g[HEAD / 4];
#pragma unroll
        for (int i = 0; i < HEAD / 4; i++) g[i] = gk[i / 2 * 4 + 2 * r + i % 2] * scale;
        angles.turn_back(r, g);
        norm_backward(g, before.x[r], 1.0f, eps);
#pragma unroll
        for (int i = 0; i < HEAD / 4; i++) gk[i / 2 * 4 + 2 * r + i % 2] = g[i];
    }
}

#endif
