// Sums of many binary masks as a product of matrices on tensor cores: frames x pixels times pixels x masks.
//
// Pixels are split into bytes, masks are bytes of 0 or 1, and 32-bit integers hold the products: exact. A warp takes
// 16 frames and 8 * TILES masks through a part of the pixels and adds what it found to global memory with atomics.
#include "types.cuh"
#include "group.cuh"
#include "mma.cuh"

// the same lane of all frames: eight pixels' lower (or upper) bytes as the two words a fragment wants
template <typename Pixel> __device__ __forceinline__ void bytes_of(const Group<Pixel>& group, u32 (&low)[2], u32 (&high)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (sizeof(Pixel) == 1) {
            low[half] = group.words[half];
            high[half] = 0;
        } else {
            low[half] = __byte_perm(group.words[2 * half], group.words[2 * half + 1], 0x6420);
            high[half] = __byte_perm(group.words[2 * half], group.words[2 * half + 1], 0x7531);
        }
    }
}

// pixels, starts   as in all_sums, but only a frame's first pixel lies at a multiple of ALIGN bytes
// per_warp         pixels of a warp, a multiple of 128; at most 2^22, so that 32 bits hold its sums
// mask_bits        (masks rounded up to 8 * TILES, bit_words): bit k of word w chooses pixel 32 w + k
// columns          (frames, width_columns), the first `masks` of them are added to
// grid             (parts of the pixels, groups of 16 frames, groups of 8 * TILES masks), 128 threads
template <typename Pixel, int ALIGN, int TILES>
__global__ void __launch_bounds__(128)
    mask_sums(const Pixel* pixels, const i64* starts, int frames, int size, int per_warp, const u32* mask_bits,
              int bit_words, int masks, i64* columns, int width_columns) {
    const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4;
    const int part = blockIdx.x * 4 + threadIdx.x / 32;
    const int frame = blockIdx.y * 16 + row, mask = blockIdx.z * 8 * TILES;
    // rows beyond the last frame repeat it and are dropped at the end
    const Pixel* upper = pixels + starts[min(frame, frames - 1)];
    const Pixel* lower = pixels + starts[min(frame + 8, frames - 1)];
    i32 low[TILES][4] = {}, high[TILES][4] = {};
    const int end = min(size, (part + 1) * per_warp);
    for (int base = part * per_warp; base < end; base += 128) {
        const int mine = base + 32 * quarter;
        u32 bits[TILES];
#pragma unroll
        for (int n = 0; n < TILES; ++n)
            bits[n] = mine < size ? __ldg(mask_bits + static_cast<i64>(mask + 8 * n + row) * bit_words + mine / 32) : 0;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const int pixel = mine + 8 * step, count = min(GROUP, size - pixel);
            u32 low_a[2], high_a[2], low_b[2], high_b[2];
            bytes_of(load_group<Pixel, ALIGN>(upper + pixel, count), low_a, high_a);
            bytes_of(load_group<Pixel, ALIGN>(lower + pixel, count), low_b, high_b);
            const u32 low_bytes[4] = {low_a[0], low_b[0], low_a[1], low_b[1]};
            const u32 high_bytes[4] = {high_a[0], high_b[0], high_a[1], high_b[1]};
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
                const u32 chosen[2] = {bytes_of_bits(bits[n] >> 8 * step), bytes_of_bits(bits[n] >> (8 * step + 4))};
                mma_u8(low[n], low_bytes, chosen);
                if constexpr (sizeof(Pixel) == 2) mma_u8(high[n], high_bytes, chosen);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int f = frame + 8 * (k / 2), m = mask + 8 * n + 2 * quarter + k % 2;
            const i64 sum = low[n][k] + 256LL * high[n][k];
            if (f < frames && m < masks && sum)
                atomicAdd(reinterpret_cast<u64*>(columns + static_cast<i64>(f) * width_columns + m), static_cast<u64>(sum));
        }
    }
}
