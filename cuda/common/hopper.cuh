// Hopper's asynchronous machinery in thin wrappers: shared-memory barriers (mbarrier), the copy engine (TMA)
// with rank-3 tensor maps, and the warpgroup product (wgmma) on bf16 operands in shared memory or registers.
//
// Shared memory is addressed by 32-bit addresses of the shared window. `parity` is the phase bit of a barrier: a wait
// returns once the phase of that parity is over; a fresh barrier passes a wait for parity 1. Wants word.cuh.

// A CUtensorMap: a kernel takes it as `const __grid_constant__`.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void *pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// ---- barriers -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for that many bytes of copies too.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!done);
}

// A barrier of those threads of the block, in whole warps, that come to it under that number (1 to 15).
__device__ __forceinline__ void sync_threads(u32 number, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Counts as having come there, without waiting.
__device__ __forceinline__ void arrive_threads(u32 number, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// Fetches a map itself.
__device__ __forceinline__ void prefetch(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One box to shared memory; its bytes count towards the barrier. What lies outside the tensor arrives as zeros.
__device__ __forceinline__ void copy_in(u32 to, const TensorMap &map, u32 barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// One box to the L2.
__device__ __forceinline__ void prefetch_box(const TensorMap &map, int x, int y, int z) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map), "r"(x), "r"(y),
                 "r"(z)
                 : "memory");
}

// One box to global memory, as a bulk group of its own after `copy_out_commit`. What lies outside is not written.
__device__ __forceinline__ void copy_out(const TensorMap &map, u32 from, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(from), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

__device__ __forceinline__ void copy_out_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until the thread's groups have read their shared memory.
__device__ __forceinline__ void copy_out_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Waits until the thread's groups are written.
__device__ __forceinline__ void copy_out_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Consecutive bytes, a multiple of 16, to shared memory; they count towards the barrier.
__device__ __forceinline__ void copy_bytes_in(u32 to, const void *from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Consecutive bytes to global memory, and floats added to those there; in groups as `copy_out`.
__device__ __forceinline__ void copy_bytes_out(void *to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void add_floats_out(float *to, u32 from, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

// Orders this thread's view of global memory with the copy engine's.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Shows this thread's writes to shared memory to the copy engine and the tensor cores (before a barrier).
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// What store_matrices stores.
__device__ __forceinline__ uint4 load_matrices(u32 address) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_pair(u32 address, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}

__device__ __forceinline__ float2 load_pair(u32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

// ---- warpgroup products ---------------------------------------------------------------------------------------------

// Moves registers between the warpgroups of a block.
template <int COUNT> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// An operand of 128-byte rows with the 128-byte swizzle, 1024-byte aligned: 8 rows (1024 bytes) follow each other, and
// where the rows run along k (the operand is not K-major), 64 columns end after 8192 bytes.
__device__ __forceinline__ u64 operand(u32 address) {
    return ((u64)(address & 0x3ffff) >> 4) | (512ull << 16) | (64ull << 32) | (1ull << 62);
}

// Where the copy engine puts a row's 16-byte chunk in a tile of rows of 64 or 128 bytes with the swizzle of that span.
__device__ __forceinline__ u32 swizzled(u32 row_bytes, u32 row, u32 chunk) {
    return row * row_bytes + 16 * (row_bytes == 128 ? chunk ^ (row & 7) : chunk ^ ((row >> 1) & 3));
}

// An operand of rows of 64 or 128 bytes with the swizzle of that span. Where it is not K-major, `next` bytes lie
// between tiles that adjoin along its other dimension.
__device__ __forceinline__ u64 operand(u32 row_bytes, u32 address, u32 next) {
    const u64 swizzle = row_bytes == 128 ? 1 : 2;
    return (u64)((address & 0x3ffff) >> 4) | ((u64)(next >> 4) << 16) | ((u64)(8 * row_bytes >> 4) << 32) |
           (swizzle << 62);
}

// Two floats as a pair of bf16, `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ void product_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the last PENDING groups of products are done.
template <int PENDING> __device__ __forceinline__ void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of d over this place.
template <int COUNT> __device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define REGISTERS_HALF "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_0 \
    REGISTERS_HALF ", " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_32 \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_64 \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_96 \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLOATS_8(i)                                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),       \
        "+f"(d[i + 7])
#define FLOATS_16 FLOATS_8(0), FLOATS_8(8)
#define FLOATS_32(i) FLOATS_8(i), FLOATS_8(i + 8), FLOATS_8(i + 16), FLOATS_8(i + 24)
#define FLOATS_64 FLOATS_32(0), FLOATS_32(32)
#define FLOATS_96 FLOATS_64, FLOATS_32(64)
#define FLOATS_128 FLOATS_96, FLOATS_32(96)

// d = a b (+ d if `add`): 64 x N x 16, d in the warpgroup's registers: lane l of warp w holds, for columns
// 8 j + 2 (l % 4) + {0, 1}, row 16 w + l / 4 in d[4 j + {0, 1}] and row 16 w + l / 4 + 8 in d[4 j + {2, 3}].
// A_ALONG, B_ALONG: 0 for an operand that is K-major, 1 for one that is not.
#define PRODUCT(N, COUNT, REGISTERS, FLOATS, A, B, ADD, TA, TB)                                                       \
    template <int A_ALONG, int B_ALONG>                                                                               \
    __device__ __forceinline__ void product(float (&d)[COUNT], u64 a, u64 b, int add) {                               \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, %" #A ", %" #B        \
                     ", p, 1, 1, %" #TA ", %" #TB ";\n}"                                                              \
                     : FLOATS                                                                                         \
                     : "l"(a), "l"(b), "r"(add), "n"(A_ALONG), "n"(B_ALONG));                                         \
    }
PRODUCT(32, 16, REGISTERS_HALF, FLOATS_16, 16, 17, 18, 19, 20)
PRODUCT(64, 32, REGISTERS_0, FLOATS_32(0), 32, 33, 34, 35, 36)
PRODUCT(128, 64, REGISTERS_0 ", " REGISTERS_32, FLOATS_64, 64, 65, 66, 67, 68)
PRODUCT(192, 96, REGISTERS_0 ", " REGISTERS_32 ", " REGISTERS_64, FLOATS_96, 96, 97, 98, 99, 100)
PRODUCT(256, 128, REGISTERS_0 ", " REGISTERS_32 ", " REGISTERS_64 ", " REGISTERS_96, FLOATS_128, 128, 129, 130, 131,
        132)

// The same with a from registers: columns 16 k ... 16 k + 15 of a product's d, packed in order, are such an a.
#define PRODUCT_OF_REGISTERS(N, COUNT, REGISTERS, FLOATS, A0, A1, A2, A3, B, ADD, TB)                                 \
    template <int B_ALONG>                                                                                            \
    __device__ __forceinline__ void product_of_registers(float (&d)[COUNT], const u32 *a, u64 b, int add) {           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                               \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, {%" #A0 ", %" #A1     \
                     ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}"                                          \
                     : FLOATS                                                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_ALONG));                   \
    }
PRODUCT_OF_REGISTERS(32, 16, REGISTERS_HALF, FLOATS_16, 16, 17, 18, 19, 20, 21, 22)
PRODUCT_OF_REGISTERS(64, 32, REGISTERS_0, FLOATS_32(0), 32, 33, 34, 35, 36, 37, 38)
PRODUCT_OF_REGISTERS(128, 64, REGISTERS_0 ", " REGISTERS_32, FLOATS_64, 64, 65, 66, 67, 68, 69, 70)
