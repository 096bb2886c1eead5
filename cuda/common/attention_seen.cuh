// What all kernels of attention share: who sees whom, and exponentials. WINDOW, DOCUMENTS: 0 or 1. Wants word.cuh.

#define LOG2_E 1.44269504f

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if DOCUMENTS
#define STARTS_PARAMETER const int *__restrict__ starts,
#else
#define STARTS_PARAMETER
constexpr const int *starts = nullptr;
#endif

// The first position that the query at `position` of batch `b` sees; of the scalars `window` counts the positions that a
// query sees, its own one too.
template <class Sizes>
__device__ __forceinline__ int first_seen(const int *starts, const Sizes &s, int b, int position) {
    int first = 0;
    if (WINDOW) first = max(first, position - (int)s.window + 1);
    if (DOCUMENTS) first = max(first, starts[(u64)b * s.keys + min(position, (int)s.keys - 1)]);
    return first;
}
