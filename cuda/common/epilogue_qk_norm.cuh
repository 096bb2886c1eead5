// The norm of heads, their rotation and the queries' gain (qk_norm.cu's forward) as an epilogue of the joined projection of
// queries, keys and values: EPILOGUE 5 of matmul_pingpong.cu.
//
//   c = x,   e = gain R (r x),   r = 1 / sqrt(sum(x^2) / HEAD + eps), R the position's rotation,
//
// x being the projection's element as c has it, rounded to bf16, so that a backward that reads c finds what was normed.
//
// Layout: c [m, n] and e [m, normed] of bf16, both packed; a row is a token, m of them. Of n columns the first `heads`
// heads of HEAD channels are queries, those after them up to column `normed` keys; the rest, values, only c gets. Row
// i has the position i % time of the tables cosines, sines f32 [time, HALF], table_row elements apart (an even number).
// gains bf16 [heads] (GAIN = 1; queries' only). Of a head's channels the first 2 HALF rotate, channel i with channel
// i + HALF.
// HEAD is 32, 64 or 128, so that a tile's columns are whole heads; 8 divides HALF. A quad of lanes has a row's channels
// of each head, a lane columns 8 j + 2 (lane % 4) + {0, 1}: partners of a rotation lie in one lane.
// Invariants: e's columns are written exactly once; what a tile computes of values, or past n, is not written.
// Numerics: f32, in the order of qk_norm.cu but for the sum of squares (a lane adds its channels in order, the quad's
// lanes are added by butterfly) and its root (rsqrt, within 2 units in the last place). Rounded to bf16 at the end.
//
// The launcher (src/backend/cuda_projected_attention.rs) defines HEAD, HALF and GAIN.

#define TILE_HEADS (TILE_N / HEAD)

static_assert(TILE_N % HEAD == 0 && HALF % 8 == 0 && 2 * HALF <= HEAD && sizeof(OUT) == 2, "heads of a tile");

// What the kernel has after the tensor maps' buffers, and its gains.
#define HEAD_TABLES const float *__restrict__ cosines, const float *__restrict__ sines,
#if GAIN
#define HEAD_PARAMETERS HEAD_TABLES const bf16 *__restrict__ gains,
#define HEAD_GAINS gains
#else
#define HEAD_PARAMETERS HEAD_TABLES
#define HEAD_GAINS nullptr
#endif

struct HeadScalars {
    u64 heads, normed, time, table_row;
    u64 eps; // a float's bits
};

// A lane's part of what its rows and columns are multiplied by: row lane / 4 of a warp's 16, and that 8 further down. Stays
// in registers from tile to tile, as a block's tiles often have the same positions.
struct Heads {
    const HeadScalars &s;
    const float *cosines, *sines;
    const bf16 *gains;
    u32 column = ~0u, position = ~0u; // of the tile that the rest is of
    float2 cosine[2][HALF / 8 + 1], sine[2][HALF / 8 + 1]; // the last ones are not used
    float gain[TILE_HEADS];

    __device__ __forceinline__ Heads(const HeadScalars &s, const float *cosines, const float *sines, const bf16 *gains)
        : s(s), cosines(cosines), sines(sines), gains(gains) {}

    // Whether any of the tile's columns is normed.
    __device__ __forceinline__ bool has(u32 tile_column) const { return tile_column < s.normed; }

    // Fetches what the tile needs at this column and, for this warp, row, ahead of its products; clears d, which they
    // write: had it only what `apply` leaves, they would wait for each other (ptxas C7520), and left undefined it would
    // take registers beside that.
    __device__ __forceinline__ void begin(u32 tile_column, u32 row, int lane, float (&d)[TILE_N / 2]) {
#pragma unroll
        for (int i = 0; i < TILE_N / 2; i++) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(d[i]));
        const u32 time = (u32)s.time, first = row % time;
        if (!has(tile_column) || (tile_column == column && first == position)) return;
        column = tile_column;
        position = first;
#pragma unroll
        for (int i = 0; i < TILE_HEADS; i++) {
            const u32 head = tile_column / HEAD + i;
            gain[i] = GAIN && head < s.heads ? __bfloat162float(gains[head]) : 1.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u64 from = (row + lane / 4 + 8 * half) % time * s.table_row + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < HALF / 8; j++) {
                cosine[half][j] = __ldg(reinterpret_cast<const float2 *>(cosines + from + 8 * j));
                sine[half][j] = __ldg(reinterpret_cast<const float2 *>(sines + from + 8 * j));
            }
        }
    }

    // Makes of a warp's sums of 16 rows what e gets. Channel 8 j + 2 (lane % 4) + k of the lane's row `half` of head i is
    // at place(i, half, j) + k.
    __device__ __forceinline__ void apply(float (&y)[TILE_N / 2]) const {
        float by[TILE_HEADS][2];
#pragma unroll
        for (int i = 0; i < TILE_HEADS; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < HEAD / 8; j++) {
                    float *x = y + place(i, half, j);
                    const u32 rounded = pack(x[0], x[1]);
                    x[0] = __uint_as_float(rounded << 16);
                    x[1] = __uint_as_float(rounded & 0xffff0000u);
                    sum = fmaf(x[1], x[1], fmaf(x[0], x[0], sum));
                }
                by[i][half] = sum;
            }
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
#pragma unroll
            for (int i = 0; i < 2 * TILE_HEADS; i++) {
                by[i / 2][i % 2] += __shfl_xor_sync(0xffffffffu, by[i / 2][i % 2], step);
            }
        }
#pragma unroll
        for (int i = 0; i < TILE_HEADS; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float mean = by[i][half] / (float)HEAD;
                by[i][half] = rsqrtf(mean + float_of(s.eps)) * gain[i];
#pragma unroll
                for (int j = 0; j < HALF / 8; j++) {
                    float *a = y + place(i, half, j), *b = y + place(i, half, j + HALF / 8);
                    turn(a[0], b[0], cosine[half][j].x, sine[half][j].x);
                    turn(a[1], b[1], cosine[half][j].y, sine[half][j].y);
                }
#pragma unroll
                for (int j = 0; j < HEAD / 8; j++) {
                    float *x = y + place(i, half, j);
                    x[0] *= by[i][half];
                    x[1] *= by[i][half];
                }
            }
        }
    }

  private:
    __device__ __forceinline__ static constexpr int place(int i, int half, int j) {
        return i * (HEAD / 2) + 4 * j + 2 * half;
    }

    __device__ __forceinline__ static void turn(float &a, float &b, float cosine, float sine) {
        const float turned = fmaf(b, sine, a * cosine);
        b = fmaf(-a, sine, b * cosine);
        a = turned;
    }
};
