// Sums over the lanes of a warp; every lane gets the result. Whole warps only.
#include "types.cuh"

__device__ __forceinline__ u32 warp_sum(u32 value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(0xffffffffu, value);
#else
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
#endif
}

__device__ __forceinline__ i32 warp_sum(i32 value) { return static_cast<i32>(warp_sum(static_cast<u32>(value))); }

__device__ __forceinline__ i64 warp_sum(i64 value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// in a fixed order: the same bits every time
__device__ __forceinline__ f64 warp_sum(f64 value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ __forceinline__ f32 warp_sum(f32 value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// for |value| < 2^53: two 32-bit reductions instead of ten shuffles
__device__ __forceinline__ i64 warp_sum_below_2_53(i64 value) {
    u32 low = warp_sum(static_cast<u32>(value) & 0x7ffffffu);
    i32 high = warp_sum(static_cast<i32>(value >> 27));
    return static_cast<i64>(high) * (1 << 27) + low;
}
