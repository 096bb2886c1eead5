// What the forward and the backward of attention share: the launch's scalars, rings of buffers, tiles of a head. Wants
// hopper.cuh.
//
// HEAD: a head's size d, 32, 64 or 128. KEYS: keys of a block. WINDOW, DOCUMENTS: 0 or 1.

struct Scalars {
    // section: heads (over the batch) that the forward walks together. gq_row: elements from one query of gq to the next.
    u64 batch, queries, keys, heads, groups, scale, window, section, gq_row;
};

// A place in a ring of DEPTH buffers: which buffer, and the parity of its barrier's phase.
template <int DEPTH> struct Ring {
    u32 count = 0;
    __device__ __forceinline__ u32 stage() const { return count % DEPTH; }
    __device__ __forceinline__ u32 parity() const { return count / DEPTH % 2; }
    __device__ __forceinline__ Ring ahead(int by) const {
        Ring other;
        other.count = count + (u32)by;
        return other;
    }
    __device__ __forceinline__ void advance() { count++; }
};

// Queries of a block of the backward, and the rows that it is told of them: lse / ln 2, rowsum(gy y), first key seen.
#define QUERIES (HEAD == 128 ? 64 : 128)
#define STATS (2 + DOCUMENTS)
// Columns and bytes of a box's row: the swizzle's span. Every box has 64 rows.
#define COLUMNS (HEAD < 64 ? HEAD : 64)
#define ROW_BYTES (2 * COLUMNS)

__device__ __forceinline__ int query_blocks(const Scalars &s) { return ((int)s.queries + QUERIES - 1) / QUERIES; }

// Bytes of a tile of so many rows of a head: what the copy engine writes for boxes of ROW_BYTES a row, at a multiple of
// 1,024 bytes. Where a head takes two boxes side by side, the left columns' tile comes first.
__device__ __forceinline__ constexpr u32 tile_bytes(int rows) { return rows * HEAD * 2; }

__device__ __forceinline__ void load_tile(u32 to, int rows, const TensorMap &map, u32 barrier, int head, int row,
                                          int batch) {
#pragma unroll
    for (int column = 0; column < HEAD; column += COLUMNS)
#pragma unroll
        for (int r = 0; r < rows; r += 64)
            copy_in(to + tile_bytes(rows) * column / HEAD + r * ROW_BYTES, map, barrier, head * HEAD + column, row + r,
                    batch);
}

// The operand of a tile of `rows` rows, from row `row` on, for the columns 16 step ... as k.
__device__ __forceinline__ u64 columns_as_k(u32 tile, int rows, int row, int step) {
    const int column = 16 * step;
    return operand(
        ROW_BYTES,
        tile + tile_bytes(rows) / HEAD * (column / COLUMNS * COLUMNS) + row * ROW_BYTES + column % COLUMNS * 2, 16);
}

// The operand of a tile of `rows` rows for the rows 16 step ... as k, from column `column` (0 or COLUMNS) on.
__device__ __forceinline__ u64 rows_as_k(u32 tile, int rows, int column, int step) {
    const u32 side = rows * ROW_BYTES;
    return operand(ROW_BYTES, tile + column / COLUMNS * side + 16 * step * ROW_BYTES, side);
}

// Writes a warpgroup's 64 rows of a head, from row `row` of a tile of `rows` rows on, as bf16 (times `by`, for the
// rows at 0 and 8), and copies them out where there are any. Every thread of the warpgroup calls it; thread 0
// has issued the copy, uncommitted, when it returns.
__device__ __forceinline__ void store_rows(u32 tile, int rows, int row, const float (&d)[HEAD / 2], float by_0,
                                           float by_8, u32 id, const TensorMap &map, int head, int to_row, int length,
                                           int batch) {
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const u32 at = row + thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {
        u32 m[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float by = i % 2 ? by_8 : by_0;
            m[i] = pack(d[8 * k + 2 * i] * by, d[8 * k + 2 * i + 1] * by);
        }
        const u32 chunk = 2 * k + lane / 16;
        store_matrices(tile + chunk / (COLUMNS / 8) * (rows * ROW_BYTES) +
                           swizzled(ROW_BYTES, at, chunk % (COLUMNS / 8)),
                       m[0], m[1], m[2], m[3]);
    }
    fence_async();
    sync_threads(id, 128);
    if (thread == 0 && to_row < length)
#pragma unroll
        for (int column = 0; column < HEAD; column += COLUMNS)
            copy_out(map, tile + column / COLUMNS * (rows * ROW_BYTES) + row * ROW_BYTES, head * HEAD + column, to_row,
                     batch);
}
