// What the matrix products share (matmul.cu, matmul_pingpong.cu): the epilogue f, and how a warp writes its sums.
// Wants element.cuh, hopper.cuh, EPILOGUE, OUT, SLOPE, CAP or SCALE where the epilogue has one, and for the parts of tiles TILE_N.

#define READS_E (EPILOGUE == 2 || EPILOGUE == 4 || EPILOGUE == 6 || EPILOGUE == 8)
#define WRITES_E (EPILOGUE == 3 || EPILOGUE == 7)
#define HAS_E (READS_E || WRITES_E || EPILOGUE == 5)
#define GATES (EPILOGUE == 7 || EPILOGUE == 10) // gated.cuh
#define UNGATES (EPILOGUE == 8)

// RAW: what is written to e.
template <bool RAW = false> __device__ __forceinline__ float epilogue(float x, float e = 0.0f) {
    if (RAW) return x;
#if EPILOGUE == 1
    x = x < 0.0f ? 0.0f : x; // NaN stays
    return x * x;
#elif EPILOGUE == 2
    float root;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(e));
    return x * (2.0f * root);
#elif EPILOGUE == 3
    x = x < 0.0f ? (SLOPE) * x : x;
    return x * x;
#elif EPILOGUE == 4
    return x * (2.0f * (e < 0.0f ? (SLOPE) * (SLOPE) * e : e));
#elif EPILOGUE == 6
    return e + x;
#elif EPILOGUE == 9
    return (CAP) * tanhf(x * (1.0f / (CAP)));
#else
    return x;
#endif
}

#ifdef SCALE
__device__ __forceinline__ float2 scale_pair(const float *at) { return *reinterpret_cast<const float2 *>(at); }
__device__ __forceinline__ float2 scale_pair(const bf16 *at) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(at));
}
#endif

#ifdef TILE_N

#define DEPTH 64                         // of a slice along k: 128 bytes, the span of the swizzle
#define BOX 8192                         // bytes of 64 x 64 elements
#define CHUNK 2048                       // bytes of 16 rows of 128 bytes
#define COLUMNS (128 / (int)sizeof(OUT)) // of a chunk
#define CHUNKS (TILE_N / COLUMNS)        // of a warp's 16 rows
#define TILE_COLUMNS (GATES ? TILE_N / 2 : TILE_N) // of c in a tile

#ifdef SCALE
// Multiplies a warp's sums, whose tile begins at `column`, by their columns' scales; n is even, the scales aligned to two.
__device__ __forceinline__ void scale_columns(float (&d)[TILE_N / 2], const SCALE *scale, u32 column, u64 n, int lane) {
    column += lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < TILE_N / 8; j++) {
        const float2 by = column + j * 8 < n ? scale_pair(scale + column + j * 8) : make_float2(0.0f, 0.0f);
        d[4 * j] *= by.x;
        d[4 * j + 1] *= by.y;
        d[4 * j + 2] *= by.x;
        d[4 * j + 3] *= by.y;
    }
}
#endif

// Two neighbours, as bf16; `e` holds theirs.
template <bool RAW> __device__ __forceinline__ u32 pair(const float *x, u32 e) {
    const float low = epilogue<RAW>(x[0], __uint_as_float(e << 16));
    const float high = epilogue<RAW>(x[1], __uint_as_float(e & 0xffff0000u));
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const u32 *>(&both);
}

// Two neighbours, as f32, to where theirs of e lie.
template <bool RAW> __device__ __forceinline__ void stage_pair(u32 place, const float *x) {
    const float2 e = READS_E ? load_pair(place) : make_float2(0.0f, 0.0f);
    store_pair(place, epilogue<RAW>(x[0], e.x), epilogue<RAW>(x[1], e.y));
}

// A warp's 16 rows of COLUMNS columns, whose sums start at d[0], to a buffer's swizzled rows; e's lie there before.
template <bool RAW> __device__ __forceinline__ void stage_chunk(const float *d, u32 buffer, int lane) {
    if constexpr (sizeof(OUT) == 2) {
        const u32 row = buffer + lane % 16 * 128;
#pragma unroll
        for (int j = 0; j < 4; j++, d += 8) {
            const u32 place = row + ((2 * j + lane / 16) ^ (lane % 8)) * 16;
            const uint4 e = READS_E ? load_matrices(place) : make_uint4(0, 0, 0, 0);
            store_matrices(place, pair<RAW>(d, e.x), pair<RAW>(d + 2, e.y), pair<RAW>(d + 4, e.z),
                           pair<RAW>(d + 6, e.w));
        }
    } else {
        const u32 row = buffer + lane / 4 * 128 + lane % 2 * 8;
#pragma unroll
        for (int j = 0; j < 4; j++, d += 4) {
            const u32 place = row + ((2 * j + lane % 4 / 2) ^ (lane / 4)) * 16;
            stage_pair<RAW>(place, d);
            stage_pair<RAW>(place + 8 * 128, d + 2);
        }
    }
}

// Stages COUNT chunks of a warp's 16 rows, whose sums start at d[0], and sends them on their way; the warp. m, n: what
// is written ends there.
template <bool RAW, int COUNT>
__device__ __forceinline__ void write_chunks(const float *d, const TensorMap &map, u32 staging, u32 column, u32 row,
                                             u32 part, u64 m, u64 n, int lane) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) stage_chunk<RAW>(d + j * (COLUMNS / 2), staging + j * CHUNK, lane);
    fence_async();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            const u32 to = column + j * COLUMNS;
            if (row < m && to < n) copy_out(map, staging + j * CHUNK, to, row, part);
        }
        copy_out_commit();
    }
}

#endif
