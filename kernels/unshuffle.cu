// HDF5's shuffle undone, twin of gpuem/codecs/planes.py:unshuffle_bytes: byte k of all items lies together, bytes that
// fill no item follow as they are.
//
// Grid (any, any), block any. Pitches: bytes from chunk to chunk, at any address; what is aligned to 4 bytes is read,
// and what is aligned to 8 or 16 written, in one stride.
#include "types.cuh"
#include "store.cuh"

// the bytes at[0, 4)
__device__ __forceinline__ u32 load_four(const u8* at) {
    if (is_aligned(at, 4)) return __ldg(reinterpret_cast<const u32*>(at));
    return static_cast<u32>(__ldg(at + 3)) << 24 | static_cast<u32>(__ldg(at + 2)) << 16 |
           static_cast<u32>(__ldg(at + 1)) << 8 | __ldg(at);
}

template <int SIZE>
__global__ void unshuffle(const u8* __restrict__ raw, u8* __restrict__ out, i64 nbytes, i64 raw_pitch, i64 out_pitch,
                          int chunks) {
    i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
    i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x, items = nbytes / SIZE;
    for (int chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y) {
        const u8* planes = raw + chunk * raw_pitch;
        u8* to = out + chunk * out_pitch;
        i64 done = 0;
        if constexpr (SIZE == 2 || SIZE == 4 || SIZE == 8) {
            if (is_aligned(to, SIZE)) {
                done = items / 4 * 4;
                for (i64 item = 4 * first; item < done; item += 4 * step) {
                    u32 bytes[SIZE], words[SIZE];
#pragma unroll
                    for (int k = 0; k < SIZE; ++k) bytes[k] = load_four(planes + k * items + item);
                    interleave(bytes, words);
                    store_pixels<SIZE>(to + item * SIZE, words);
                }
            }
        }
        for (i64 item = done + first; item < items; item += step)
            for (int k = 0; k < SIZE; ++k) to[item * SIZE + k] = __ldg(planes + k * items + item);
        for (i64 k = items * SIZE + first; k < nbytes; k += step) to[k] = __ldg(planes + k);
    }
}
