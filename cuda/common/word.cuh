// Integers of known size, and floats among the words of a launch's scalars.

typedef unsigned long long u64;
typedef unsigned int u32;

// Of a scalar of the launch that holds a float's bits, or those of two: the one in its lower half, and the other.
__device__ __forceinline__ float float_of(u64 word) { return __uint_as_float((u32)word); }
__device__ __forceinline__ float second_of(u64 word) { return __uint_as_float((u32)(word >> 32)); }
