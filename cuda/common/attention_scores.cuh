// The scores of attention's backward in a consumer's registers, element by element: transposed, 64 keys as rows, a
// block's QUERIES as columns. A thread has, of the keys lane / 4 and lane / 4 + 8 of its warp's 16, the columns
// 8 i + 2 (lane % 4) + {0, 1} at 4 i + {0, 1} and 4 i + {2, 3}; as bf16, in pairs, at 2 i and 2 i + 1.
// stat: a query block's STATS rows, as attention_rows.cu has them.

// The thread's first column.
__device__ __forceinline__ int score_column() { return threadIdx.x % 4 * 2; }

// P: exp(scale score - lse), scale_2 being scale / ln 2.
__device__ __forceinline__ void exponentials(float (&scores)[QUERIES / 2], const float *stat, float scale_2) {
    const int column = score_column();
#pragma unroll
    for (int i = 0; i < QUERIES / 8; i++) {
        const float2 shift = *reinterpret_cast<const float2 *>(stat + 8 * i + column);
        scores[4 * i] = exp2_fast(fmaf(scores[4 * i], scale_2, -shift.x));
        scores[4 * i + 1] = exp2_fast(fmaf(scores[4 * i + 1], scale_2, -shift.y));
        scores[4 * i + 2] = exp2_fast(fmaf(scores[4 * i + 2], scale_2, -shift.x));
        scores[4 * i + 3] = exp2_fast(fmaf(scores[4 * i + 3], scale_2, -shift.y));
    }
}

// Zeros where a query does not see the key. first_key: of the consumer's 64; key: the thread's first; position: the first
// query's.
__device__ __forceinline__ void hide_unseen(float (&scores)[QUERIES / 2], const float *stat, const Scalars &s,
                                            int first_key, int key, int position) {
    const int column = score_column();
    bool edge = first_key + 63 > position;
    if (WINDOW && !DOCUMENTS) edge |= first_key <= position + QUERIES - 1 - (int)s.window;
    if (DOCUMENTS) edge |= first_key < __float_as_int(stat[2 * QUERIES + QUERIES - 1]);
    if (edge) {
#pragma unroll
        for (int i = 0; i < QUERIES / 8; i++) {
            int2 from = make_int2(0, 0);
            if (DOCUMENTS)
                from = *reinterpret_cast<const int2 *>(stat + 2 * QUERIES + 8 * i + column);
            else if (WINDOW)
                from = make_int2(position + 8 * i + column + 1 - (int)s.window,
                                 position + 8 * i + column + 2 - (int)s.window);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int at = key + e / 2 * 8, query = position + 8 * i + column + e % 2;
                if (at > query || ((WINDOW || DOCUMENTS) && at < (e % 2 ? from.y : from.x))) scores[4 * i + e] = 0.0f;
            }
        }
    }
}

__device__ __forceinline__ void round_scores(u32 (&p)[QUERIES / 4], const float (&scores)[QUERIES / 2]) {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) p[i] = pack(scores[2 * i], scores[2 * i + 1]);
}

// gS = P (gP - rowsum(gy y)), rounded, from the rounded P.
__device__ __forceinline__ void score_gradients(u32 (&gs)[QUERIES / 4], const u32 (&p)[QUERIES / 4],
                                                const float (&gp)[QUERIES / 2], const float *stat) {
    const int column = score_column();
#pragma unroll
    for (int i = 0; i < QUERIES / 8; i++) {
        const float2 delta = *reinterpret_cast<const float2 *>(stat + QUERIES + 8 * i + column);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float low = __uint_as_float(p[2 * i + r] << 16), high = __uint_as_float(p[2 * i + r] & 0xffff0000);
            gs[2 * i + r] = pack(low * (gp[4 * i + 2 * r] - delta.x), high * (gp[4 * i + 2 * r + 1] - delta.y));
        }
    }
}

// The same from P as it is, which is rounded beside it.
__device__ __forceinline__ void score_gradients(u32 (&gs)[QUERIES / 4], u32 (&p)[QUERIES / 4],
                                                const float (&scores)[QUERIES / 2], const float (&gp)[QUERIES / 2],
                                                const float *stat) {
    const int column = score_column();
#pragma unroll
    for (int i = 0; i < QUERIES / 8; i++) {
        const float2 delta = *reinterpret_cast<const float2 *>(stat + QUERIES + 8 * i + column);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int e = 4 * i + 2 * r;
            p[2 * i + r] = pack(scores[e], scores[e + 1]);
            gs[2 * i + r] = pack(scores[e] * (gp[e] - delta.x), scores[e + 1] * (gp[e + 1] - delta.y));
        }
    }
}
