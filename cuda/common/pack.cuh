// Elements of rows of any length, WIDTH at a time, as floats: whole packs by one load, the last of a row one by one.
// A row that is read or written in packs starts at a multiple of their size. Wants element.cuh and word.cuh.

// The nearest bf16, ties to even.
__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

template <typename T> struct alignas(sizeof(T) * WIDTH) Pack {
    T values[WIDTH];
};

// A pack in global memory as what one instruction moves. Spelled out: of stores of structs through a pointer chosen among
// several, the compiler makes one of each element.
__device__ __forceinline__ void load_word(uint4 &x, const void *from) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(__cvta_generic_to_global(from)));
}
__device__ __forceinline__ void load_word(uint2 &x, const void *from) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(__cvta_generic_to_global(from)));
}
__device__ __forceinline__ void load_word(unsigned &x, const void *from) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)));
}
__device__ __forceinline__ void load_word(unsigned short &x, const void *from) {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(x) : "l"(__cvta_generic_to_global(from)));
}
__device__ __forceinline__ void store_word(void *to, uint4 x) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}
__device__ __forceinline__ void store_word(void *to, uint2 x) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y)
                 : "memory");
}
__device__ __forceinline__ void store_word(void *to, unsigned x) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(x) : "memory");
}
__device__ __forceinline__ void store_word(void *to, unsigned short x) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "h"(x) : "memory");
}

template <int BYTES> struct Word;
template <> struct Word<16> {
    typedef uint4 Type;
};
template <> struct Word<8> {
    typedef uint2 Type;
};
template <> struct Word<4> {
    typedef unsigned Type;
};
template <> struct Word<2> {
    typedef unsigned short Type;
};

template <typename T> union Packed {
    Pack<T> pack;
    typename Word<sizeof(Pack<T>)>::Type word;
    __device__ __forceinline__ Packed() {}
};

struct Floats {
    float at[WIDTH];
};

// The elements from `start` (a multiple of WIDTH) of a row of `length`; past its end, zeros. WHOLE: it is known that none
// lies past it.
template <bool WHOLE = false, typename T> __device__ __forceinline__ Floats load(const T *row, u64 start, u64 length) {
    Floats x;
    if (WHOLE || start + WIDTH <= length) {
        Packed<T> packed;
        load_word(packed.word, row + start);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) x.at[j] = to_float(packed.pack.values[j]);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) x.at[j] = start + j < length ? to_float(row[start + j]) : 0.0f;
    }
    return x;
}

// Nothing is written past the row's end.
template <bool WHOLE = false, typename T>
__device__ __forceinline__ void store(T *row, u64 start, u64 length, const Floats &x) {
    if (WHOLE || start + WIDTH <= length) {
        Packed<T> packed;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) from_float(packed.pack.values[j], x.at[j]);
        store_word(row + start, packed.word);
    } else {
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            if (start + j < length) from_float(row[start + j], x.at[j]);
        }
    }
}

// The sum over a block of THREADS threads (whole warps), the same bits in each thread and each launch. Every thread
// of the block must call it, once a kernel.
template <int THREADS> __device__ __forceinline__ float block_sum(float x) {
    __shared__ float warps[THREADS / 32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = warps[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; i++) x += warps[i];
    return x;
}
