// Pixels put together from their bytes in registers, and written as wide as the address allows.
#include "types.cuh"

__device__ __forceinline__ bool is_aligned(const void* at, int bytes) { return reinterpret_cast<u64>(at) % bytes == 0; }

// Four pixels of SIZE bytes, one behind the other in SIZE words, from words that hold byte k of all four.
template <int SIZE> __device__ __forceinline__ void interleave(const u32 (&bytes)[SIZE], u32* words) {
    static_assert(SIZE == 1 || SIZE == 2 || SIZE == 4 || SIZE == 8, "bytes of a number");
    if constexpr (SIZE == 1) {
        words[0] = bytes[0];
    } else if constexpr (SIZE == 2) {
        words[0] = __byte_perm(bytes[0], bytes[1], 0x5140);
        words[1] = __byte_perm(bytes[0], bytes[1], 0x7362);
    } else {
        constexpr int STRIDE = SIZE / 4;
#pragma unroll
        for (int k = 0; k < STRIDE; ++k) {
            const u32 *four = bytes + 4 * k, evens = 0x5140, odds = 0x7362;
            u32 low = __byte_perm(four[0], four[1], evens), high = __byte_perm(four[2], four[3], evens);
            words[k] = __byte_perm(low, high, 0x5410);
            words[k + STRIDE] = __byte_perm(low, high, 0x7632);
            low = __byte_perm(four[0], four[1], odds), high = __byte_perm(four[2], four[3], odds);
            words[k + 2 * STRIDE] = __byte_perm(low, high, 0x5410);
            words[k + 3 * STRIDE] = __byte_perm(low, high, 0x7632);
        }
    }
}

// Write pixels of SIZE bytes that lie one behind the other in 32-bit words; `at` is aligned to a pixel.
template <int SIZE, int WORDS> __device__ __forceinline__ void store_pixels(void* at, const u32 (&words)[WORDS]) {
    static_assert(WORDS % 2 == 0, "two or four words at a time");
    if (WORDS % 4 == 0 && is_aligned(at, 16)) {
#pragma unroll
        for (int w = 0; w + 3 < WORDS; w += 4)
            static_cast<uint4*>(at)[w / 4] = make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    } else if (SIZE == 8 || is_aligned(at, 8)) {
#pragma unroll
        for (int w = 0; w < WORDS; w += 2)
            static_cast<u64*>(at)[w / 2] = static_cast<u64>(words[w + 1]) << 32 | words[w];
    } else {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) {
            if constexpr (SIZE == 4) static_cast<u32*>(at)[w] = words[w];
            if constexpr (SIZE == 2) {
                static_cast<u16*>(at)[2 * w] = static_cast<u16>(words[w]);
                static_cast<u16*>(at)[2 * w + 1] = static_cast<u16>(words[w] >> 16);
            }
            if constexpr (SIZE == 1)
                for (int k = 0; k < 4; ++k) static_cast<u8*>(at)[4 * w + k] = static_cast<u8>(words[w] >> 8 * k);
        }
    }
}
