// What attention's kernels in f32 share: tiles in shared memory, and the products of a warp. Wants word.cuh.
//
// HEAD: a head's size d, 16, 32, 64 or 128. WINDOW, DOCUMENTS: 0 or 1. LANE_ROWS, LANE_COLUMNS: rows and columns of the
// scores that a thread holds.
//
// A block of four warps holds one tile of rows (of queries, or of keys) and walks over tiles of columns (of the other).
// A warp's 32 threads stand in 4 rows of 8: the thread in row r and column c has of its warp's 4 LANE_ROWS rows every
// fourth, from r on, and of the 8 LANE_COLUMNS columns 4 c ... 4 c + 3 and, with LANE_COLUMNS = 8, those 32 further. Of
// a head's HEAD channels it has HEAD / 8, PACK at a time, from PACK c on.
//
// A tile lies in shared memory in rows of HEAD floats (the probabilities in rows of COLUMNS), whose chunks of four are
// swizzled so that the threads of a warp, which read different rows at the same chunk, find them in different banks:
// chunk x of row n lies at x ^ n of the tile of rows, at x ^ (n / 4) of a tile of columns, within eight chunks.

#define THREADS 128
#define WARP_ROWS (4 * LANE_ROWS)
#define ROWS (4 * WARP_ROWS)
#define COLUMNS (8 * LANE_COLUMNS)
#define LANE_CHANNELS (HEAD / 8)
#define PACK (LANE_CHANNELS < 4 ? LANE_CHANNELS : 4)

// From one sequence, one position and one head of [b, t, n, HEAD] to the next, in elements: multiples of four.
struct Strides {
    u64 batch, time, head;
};

struct Scalars {
    u64 batch, queries, keys, heads, groups, scale, window;
    Strides q, k, v, gv;
};

// A thread's place: its warp's first row of the tile, and its own row and column of the warp's threads.
struct Lane {
    int warp_row, row, column;

    __device__ __forceinline__ Lane()
        : warp_row(threadIdx.x / 32 * WARP_ROWS), row(threadIdx.x % 32 / 8), column(threadIdx.x % 8) {}

    // The row of the tile that is the thread's i-th, the column that is its j-th, and the channel.
    __device__ __forceinline__ int tile_row(int i) const { return warp_row + row + 4 * i; }
    __device__ __forceinline__ int tile_column(int j) const { return 4 * column + j / 4 * 32 + j % 4; }
    __device__ __forceinline__ int channel(int j) const { return PACK * column + j / PACK * (8 * PACK) + j % PACK; }
};

template <int WIDTH> struct alignas(4 * WIDTH) Floats {
    float at[WIDTH];
};

template <int WIDTH> __device__ __forceinline__ Floats<WIDTH> load(const float *from) {
    return *reinterpret_cast<const Floats<WIDTH> *>(from);
}

// Where in a row of LENGTH floats chunk x lies, swizzled by a row's number.
template <int LENGTH> __device__ __forceinline__ int swizzled(int number, int chunk) {
    return 4 * (chunk ^ (number & ((LENGTH < 32 ? LENGTH : 32) / 4 - 1)));
}

// The same in the thread's i-th row of a tile of rows: two places in turns, in words that the compiler understands.
template <int LENGTH> __device__ __forceinline__ int swizzled_row(const Lane &at, int i, int chunk) {
    return swizzled<LENGTH>(at.row, chunk) ^ (i % 2 * (LENGTH < 32 ? 0 : 16));
}

// Starts to copy 16 bytes to shared memory; zeros where nothing is inside.
__device__ __forceinline__ void copy_in(float *to, const float *from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

// Waits for all copies that this thread has started. A barrier after it shows them to the other threads.
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Starts to copy COUNT rows of a head, the first of them row `row` of `length`, to a tile whose rows are swizzled by
// their number / SPREAD; zeros past the end. The block.
template <int COUNT, int SPREAD>
__device__ __forceinline__ void load_tile(float *tile, const float *head, u64 stride, int row, int length) {
    constexpr int CHUNKS = HEAD / 4, AT_ONCE = THREADS / CHUNKS;
    const int chunk = threadIdx.x % CHUNKS;
    int own = threadIdx.x / CHUNKS;
    const float *from = head + (u64)(row + own) * stride + 4 * chunk;
    // Unrolled, the addresses would take dozens of registers throughout the walk.
#pragma unroll 1
    for (int part = 0; part < COUNT / AT_ONCE; part++) {
        const bool inside = row + own < length;
        copy_in(tile + own * HEAD + swizzled<HEAD>(own / SPREAD, chunk), inside ? from : head, inside);
        own += AT_ONCE;
        from += AT_ONCE * stride;
    }
}

// sums[i][j] = the product over the channels of the tile's row i with the column tile's row j, each the thread's.
__device__ __forceinline__ void rows_by_columns(float (&sums)[LANE_ROWS][LANE_COLUMNS], const float *rows,
                                                const float *columns, const Lane &at) {
    rows += at.tile_row(0) * HEAD;
    columns += at.tile_column(0) * HEAD;
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++)
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; j++) sums[i][j] = 0.0f;
#pragma unroll 2
    for (int chunk = 0; chunk < HEAD / 4; chunk++) {
        Floats<4> right[LANE_COLUMNS];
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; j++)
            right[j] = load<4>(columns + swizzled<HEAD>(at.column, chunk) + (j / 4 * 32 + j % 4) * HEAD);
#pragma unroll
        for (int i = 0; i < LANE_ROWS; i++) {
            const Floats<4> left = load<4>(rows + swizzled_row<HEAD>(at, i, chunk) + 4 * i * HEAD);
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int j = 0; j < LANE_COLUMNS; j++)
                    sums[i][j] = fmaf(left.at[k], right[j].at[k], sums[i][j]);
        }
    }
}

// The thread's scores to the warp's rows of a tile of rows of COLUMNS; the warp has read what lay there before.
__device__ __forceinline__ void store_scores(float *tile, const float (&scores)[LANE_ROWS][LANE_COLUMNS],
                                             const Lane &at) {
#pragma unroll
    for (int i = 0; i < LANE_ROWS; i++)
#pragma unroll
        for (int j = 0; j < LANE_COLUMNS; j += 4) {
            float *to = tile + at.tile_row(i) * COLUMNS + swizzled_row<COLUMNS>(at, i, at.column) + j / 4 * 32;
            *reinterpret_cast<float4 *>(to) =
                make_float4(scores[i][j], scores[i][j + 1], scores[i][j + 2], scores[i][j + 3]);
        }
    __syncwarp();
}

// sums[i][j] += the product over the columns of the scores' row i with channel j of the column tile.
__device__ __forceinline__ void scores_by_channels(float (&sums)[LANE_ROWS][LANE_CHANNELS], const float *scores,
                                                   const float *columns, const Lane &at) {
    scores += at.tile_row(0) * COLUMNS;
    columns += at.channel(0) % 4;
#pragma unroll 2
    for (int chunk = 0; chunk < COLUMNS / 4; chunk++) {
        Floats<4> left[LANE_ROWS];
#pragma unroll
        for (int i = 0; i < LANE_ROWS; i++)
            left[i] = load<4>(scores + swizzled_row<COLUMNS>(at, i, chunk) + 4 * i * COLUMNS);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float *row = columns + (4 * chunk + k) * HEAD;
            Floats<PACK> right[LANE_CHANNELS / PACK];
#pragma unroll
            for (int j = 0; j < LANE_CHANNELS / PACK; j++)
                right[j] = load<PACK>(row + swizzled<HEAD>(chunk, at.channel(0) / 4) + 8 * PACK * j);
#pragma unroll
            for (int i = 0; i < LANE_ROWS; i++)
#pragma unroll
                for (int j = 0; j < LANE_CHANNELS; j++)
                    sums[i][j] = fmaf(left[i].at[k], right[j / PACK].at[j % PACK], sums[i][j]);
        }
    }
}

// The thread's channels of row i, times `by`, to a head's row.
__device__ __forceinline__ void store_channels(float *row, const float (&channels)[LANE_CHANNELS], float by,
                                               const Lane &at) {
#pragma unroll
    for (int j = 0; j < LANE_CHANNELS; j += PACK) {
        Floats<PACK> pack;
#pragma unroll
        for (int k = 0; k < PACK; k++) pack.at[k] = channels[j + k] * by;
        *reinterpret_cast<Floats<PACK> *>(row + at.channel(j)) = pack;
    }
}

// The sum of the eight threads that have the same rows, in each the same bits.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float row_maximum(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
