// Who does what when in attention's backward: the query blocks of a key block, their turns, and who has the last one.

// The query blocks that see the keys of a block: `first` to before `end`.
struct Range {
    int first, end;

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
