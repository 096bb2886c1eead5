// Gated pairs of bf16 (src/ops/mlp.rs) in the epilogues of the matrix products: sums g and u of the same row and column
// of two products, side by side in one tile (7, 10), and their gradients (8). Wants product.cuh.
//   7   c = silu(g) u; e is written too: g and u themselves
//   8   c[0] = x u silu'(g), c[1] = x silu(g), x being the product and g, u what 7 wrote to e: the backward of 7
//   10  as 7, without e
// Layout: e, and c of 8, are [2, m, n] for their tensor maps, the gate's part first; in memory the two parts' rows
// alternate, [m, 2, n], so that they are one operand of the products that follow.
// Numerics: f32 from the sums to one rounding; the fast forms of exp and division (2 units in the last place of f32), no
// exponential of a positive number. A NaN stays one.

__device__ __forceinline__ float sigmoid(float x) {
    const float e = __expf(-fabsf(x));
    return __fdividef(x < 0.0f ? e : 1.0f, 1.0f + e);
}

__device__ __forceinline__ float low_half(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(u32 x) { return __uint_as_float(x & 0xffff0000u); }

// silu(g) u of two neighbours.
__device__ __forceinline__ u32 gated(const float *g, const float *u) {
    return pack(g[0] * sigmoid(g[0]) * u[0], g[1] * sigmoid(g[1]) * u[1]);
}

// The gradients of two neighbours' g and u, which become them.
__device__ __forceinline__ void ungated(const float *x, u32 &g, u32 &u) {
    const float2 gate = make_float2(low_half(g), high_half(g)), other = make_float2(low_half(u), high_half(u));
    const float2 s = make_float2(sigmoid(gate.x), sigmoid(gate.y));
    g = pack(x[0] * other.x * (s.x * fmaf(gate.x, 1.0f - s.x, 1.0f)),
             x[1] * other.y * (s.y * fmaf(gate.y, 1.0f - s.y, 1.0f)));
    u = pack(x[0] * (gate.x * s.x), x[1] * (gate.y * s.y));
}

// Where lane l's address lies in the j-th 16 columns of a buffer, for store_matrices and load_matrices.
__device__ __forceinline__ u32 matrices(u32 buffer, int j, int lane) {
    return buffer + lane % 16 * 128 + ((2 * j + lane / 16) ^ (lane % 8)) * 16;
}

// Sends a warp's two staged chunks to both parts of a [2, m, n].
__device__ __forceinline__ void send_pair(const TensorMap &map, u32 staging, u32 column, u32 row, u64 m, u64 n,
                                          int lane) {
    fence_async();
    __syncwarp();
    if (lane == 0) {
        if (row < m && column < n) {
            copy_out(map, staging, column, row, 0);
            copy_out(map, staging + CHUNK, column, row, 1);
        }
        copy_out_commit();
    }
}

// 7, 10: a warp's 16 rows of TILE_N / 2 columns of c (and e), of whose sums the gate's come first; two buffers.
__device__ __forceinline__ void write_gated(const float *d, const TensorMap &c_map, const TensorMap &e_map,
                                            u32 staging, u32 column, u32 row, u64 m, u64 n, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS / 2; chunk++) {
        const float *g = d + chunk * (COLUMNS / 2), *u = g + TILE_N / 4;
        const u32 at = column + chunk * COLUMNS;
        if (lane == 0) copy_out_wait();
        __syncwarp();
        if (WRITES_E) {
            stage_chunk<true>(g, staging, lane);
            stage_chunk<true>(u, staging + CHUNK, lane);
            send_pair(e_map, staging, at, row, m, n, lane);
            if (lane == 0) copy_out_wait();
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < 4; j++, g += 8, u += 8) {
            store_matrices(matrices(staging, j, lane), gated(g, u), gated(g + 2, u + 2), gated(g + 4, u + 4),
                           gated(g + 6, u + 6));
        }
        fence_async();
        __syncwarp();
        if (lane == 0) {
            if (row < m && at < n) copy_out(c_map, staging, at, row, 0);
            copy_out_commit();
        }
    }
}

// 8: fetches a chunk of g and of u to a warp's two buffers, once what they held is on its way out; one thread.
__device__ __forceinline__ void fetch_pair(const TensorMap &e_map, u32 staging, u32 barrier, u32 column, u32 row) {
    copy_out_wait();
    barrier_expect(barrier, 2 * CHUNK);
    copy_in(staging, e_map, barrier, column, row, 0);
    copy_in(staging + CHUNK, e_map, barrier, column, row, 1);
}

// 8: a warp's 16 rows of a chunk, whose g and u have come to its two buffers.
__device__ __forceinline__ void write_ungated(const float *d, const TensorMap &c_map, u32 staging, u32 column, u32 row,
                                              u64 m, u64 n, int lane) {
#pragma unroll
    for (int j = 0; j < 4; j++, d += 8) {
        const u32 place = matrices(staging, j, lane);
        uint4 g = load_matrices(place), u = load_matrices(place + CHUNK);
        ungated(d, g.x, u.x);
        ungated(d + 2, g.y, u.y);
        ungated(d + 4, g.z, u.z);
        ungated(d + 6, g.w, u.w);
        store_matrices(place, g.x, g.y, g.z, g.w);
        store_matrices(place + CHUNK, u.x, u.y, u.z, u.w);
    }
    send_pair(c_map, staging, column, row, m, n, lane);
}
