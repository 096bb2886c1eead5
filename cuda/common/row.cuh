// Rows of floats in registers: LANES threads (a power of two) share a row of `length` packs of WIDTH elements, and
// lane l holds the packs l, l + LANES, ..., at most CHUNKS of them, as f32. Wants element.cuh and word.cuh.

struct alignas(sizeof(ELEMENT) * WIDTH) Pack {
    ELEMENT values[WIDTH];
};

struct Row {
    float at[CHUNKS * WIDTH];

    // Loads the row's packs before any is used; past its end, zeros.
    __device__ __forceinline__ void load(const ELEMENT *row, int length, int lane) {
        Pack packs[CHUNKS];
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const int i = k * LANES + lane;
            if (i < length) packs[k] = reinterpret_cast<const Pack *>(row)[i];
        }
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const bool inside = k * LANES + lane < length;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) at[k * WIDTH + j] = inside ? to_float(packs[k].values[j]) : 0.0f;
        }
    }

    __device__ __forceinline__ void store(ELEMENT *row, int length, int lane) const {
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) {
            const int i = k * LANES + lane;
            if (i >= length) break;
            Pack pack;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) from_float(pack.values[j], at[k * WIDTH + j]);
            reinterpret_cast<Pack *>(row)[i] = pack;
        }
    }

    // This lane's part of the row's inner product with another.
    __device__ __forceinline__ float dot(const Row &other) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < CHUNKS * WIDTH; i++) sum = fmaf(at[i], other.at[i], sum);
        return sum;
    }
};

// The sum of a value per lane over a row's lanes, the same bits in each lane and each launch. Every thread of the
// block must call it, once a kernel.
__device__ __forceinline__ float2 row_sum(float2 value) {
#pragma unroll
    for (int step = (LANES < 32 ? LANES : 32) / 2; step > 0; step /= 2) {
        value.x += __shfl_xor_sync(0xffffffffu, value.x, step);
        value.y += __shfl_xor_sync(0xffffffffu, value.y, step);
    }
    if constexpr (LANES > 32) {
        __shared__ float2 warps[32];
        const int warp = threadIdx.x / 32;
        if (threadIdx.x % 32 == 0) warps[warp] = value;
        __syncthreads();
        const int first = threadIdx.x / LANES * (LANES / 32);
        value = warps[first];
        for (int i = 1; i < LANES / 32; i++) {
            value.x += warps[first + i].x;
            value.y += warps[first + i].y;
        }
    }
    return value;
}
