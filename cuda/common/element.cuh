// Elements of either type as floats, and floats as elements: rounded to nearest, ties to even. Wants cuda_bf16.h.

typedef __nv_bfloat16 bf16;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float &to, float x) { to = x; }
__device__ __forceinline__ void from_float(bf16 &to, float x) { to = __float2bfloat16_rn(x); }
