// Several matrices side by side in one (src/ops/linear.rs): the weights of projections of one input, and the gradients
// of their outputs, as one operand of a product.
//
//   y[r, first_j + c] = x_j[r, c] for c < w_j, first_j = w_0 + ... + w_(j-1); zeros where x_j is not there
//
// Layout: in units of UNIT, a plain type of 16 bytes or of one element; every start, width and stride is a whole number
// of them. y is dense [rows, sum w_j]; x_j has rows of w_j units, `stride` apart. Weights [o_j, i] one under the other
// are one row of o_j i each.
// Grid: one dimension of 256 threads, a unit a thread.
// Invariants: every unit of y is written exactly once; nothing is read of an x_j that is not there.
//
// The launcher (src/backend/cuda_linear.rs) defines the constants; these are the forms that the compile check tries:
// variant: -DUNIT=uint4 -DSOURCES=2
// variant: -DUNIT=uint4 -DSOURCES=3
// variant: -DUNIT=uint4 -DSOURCES=4
// variant: -DUNIT=ushort1 -DSOURCES=2
// variant: -DUNIT=ushort1 -DSOURCES=3
// variant: -DUNIT=ushort1 -DSOURCES=4
// variant: -DUNIT=uint1 -DSOURCES=3

#include "common/word.cuh"

struct Part {
    u64 width, stride;
    u64 present; // 0: zeros
};

struct Scalars {
    u64 rows, width; // of y
    Part parts[SOURCES];
};

// Whether column `c` of y is in this part, and then its unit; else `c` becomes what is left of it.
__device__ __forceinline__ bool take(const UNIT *x, const Part &part, u32 row, u32 &c, UNIT &unit) {
    if (c >= part.width) {
        c -= (u32)part.width;
        return false;
    }
    if (part.present) unit = x[row * part.stride + c];
    return true;
}

extern "C" __global__ void __launch_bounds__(256)
    pack(const UNIT *__restrict__ a, const UNIT *__restrict__ b,
#if SOURCES > 2
         const UNIT *__restrict__ c,
#endif
#if SOURCES > 3
         const UNIT *__restrict__ d,
#endif
         UNIT *__restrict__ y, const __grid_constant__ Scalars s) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= s.rows * s.width) return;
    const u32 row = (u32)at / (u32)s.width; // fewer than 2^32 units
    u32 column = (u32)at - row * (u32)s.width;
    UNIT unit = {};
    if (!take(a, s.parts[0], row, column, unit) && !take(b, s.parts[1], row, column, unit)) {
#if SOURCES > 2
        if (!take(c, s.parts[2], row, column, unit)) {
#if SOURCES > 3
            take(d, s.parts[3], row, column, unit);
#endif
        }
#endif
    }
    y[at] = unit;
}
