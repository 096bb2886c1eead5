// Attention's backward over query blocks: those of a key block, their turns, who has the last one, and the way of its
// gq from the sums to memory.

// The query blocks that see the keys of a block: `first` to before `end`.
struct Range {
    int first, end;

    Range() = default;

    // From shared memory where it is needed, so that it takes no registers in between.
    __device__ __forceinline__ static Range read(const Range &shared) {
        Range range;
        asm volatile("ld.volatile.shared.v2.s32 {%0, %1}, [%2];"
                     : "=r"(range.first), "=r"(range.end)
                     : "r"(shared_address(&shared))
                     : "memory");
        return range;
    }

    // Every thread of the block calls it.
    __device__ __forceinline__ Range(const int *starts, const Scalars &s, int batch, int block) {
        const int offset = (int)s.keys - (int)s.queries, blocks = query_blocks(s), last_key = block * KEYS + KEYS - 1;
        first = max(0, block * KEYS - offset) / QUERIES;
        end = blocks;
        if (WINDOW || DOCUMENTS) {
            // What a block sees first does not decrease from block to block.
            end = first;
            for (int seen = THREADS; seen == THREADS; end += seen) {
                const int m = end + threadIdx.x;
                seen =
                    __syncthreads_count(m < blocks && first_seen(starts, s, batch, m * QUERIES + offset) <= last_key);
            }
        }
    }
};

// Runs `body` for the heads of a group and the query blocks whose first key block this is: no part comes after it.
template <class Body> __device__ __forceinline__ void for_last(const int *starts, const Scalars &s, int batch,
                                                               int group, int block, const Range &range, Body body) {
    const int ratio = (int)s.heads / (int)s.groups, offset = (int)s.keys - (int)s.queries;
    for (int m = range.first; m < range.end; m++) {
        if (first_seen(starts, s, batch, m * QUERIES + offset) < block * KEYS) continue;
        for (int head = group * ratio; head < (group + 1) * ratio; head++) body(head, m);
    }
}

// Waits until `*turn` is `mine`.
__device__ __forceinline__ void wait_for(const u32 *turn, u32 mine) {
    u32 now;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    } while (now != mine);
}

// What this thread knows to be written is written for whoever finds `value` there.
__device__ __forceinline__ void publish(u32 *turn, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(value) : "memory");
}

// A thread's share of a query block's gq at its end: rows, 8 apart, and chunks of 8 columns, two columns in each. The
// norm wants whole rows: where a consumer's part has half of the columns, it then takes half of the rows of both parts.
#define OWN_ROWS (NORM && HEAD == 128 ? 1 : 2)
#define CHUNKS (PART_COLUMNS / 4 / OWN_ROWS)

// From a query block's sums in shared memory.
__device__ __forceinline__ void load_rows(float (&rows)[OWN_ROWS][2 * CHUNKS], u32 sums, int consumer) {
    const u32 from = sums + threadIdx.x % 128 * 16 + consumer * (OWN_ROWS == 1 ? 8 : SUM_BYTES / 2);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        if constexpr (OWN_ROWS == 2) {
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(rows[0][2 * i]), "=f"(rows[0][2 * i + 1]), "=f"(rows[1][2 * i]),
                           "=f"(rows[1][2 * i + 1])
                         : "r"(from + i * 2048)
                         : "memory");
        } else {
            const float2 pair = load_pair(from + i * 2048);
            rows[0][2 * i] = pair.x;
            rows[0][2 * i + 1] = pair.y;
        }
    }
}

// A row's chunks to memory from `to` on. Even threads take the columns 8 i ..., odd ones the next 8: four each, two the
// neighbour's. Every thread of the warp calls it.
__device__ __forceinline__ void store_row(__nv_bfloat16 *to, const float (&row)[2 * CHUNKS], bool inside) {
    const int lane = threadIdx.x % 32;
    const bool odd = lane % 2;
#pragma unroll
    for (int i = 0; i < CHUNKS; i += 2) {
        const u32 here = pack(row[2 * i], row[2 * i + 1]), next = pack(row[2 * i + 2], row[2 * i + 3]);
        const u32 mine = odd ? next : here, got = __shfl_xor_sync(0xffffffffu, odd ? here : next, 1);
        if (inside)
            *reinterpret_cast<uint2 *>(to + 8 * (i + odd) + lane % 4 / 2 * 4) =
                odd ? make_uint2(got, mine) : make_uint2(mine, got);
    }
}
