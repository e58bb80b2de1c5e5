// Sums of pixel times weight for real weights: fused multiply-adds for a few images, tensor cores for many.
//
// Products are added in the weights' precision over at most PANEL pixels, panels in double precision. The order of all
// additions is fixed, so the same frames give the same bits whatever else is in the block.
#include "types.cuh"
#include "warp.cuh"
#include "group.cuh"
#include "mma.cuh"

constexpr int PANEL = 4096;
// frames and images of a warp: 32 sums, so that every lane keeps the total of one
constexpr int FRAMES = 4;
constexpr int IMAGES = 8;

__device__ __forceinline__ f32 product_added(f32 a, f32 b, f32 sum) { return fmaf(a, b, sum); }
__device__ __forceinline__ f64 product_added(f64 a, f64 b, f64 sum) { return fma(a, b, sum); }

template <typename Real> __device__ __forceinline__ Real lanes_added(Real value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// pixels, starts  as in mask_sums
// images          (images rounded up to 8, pitch), zero beyond `size` and beyond the last image
// out             (frames, images), overwritten
// grid            (groups of 16 frames, groups of 8 images), 256 threads: two halves of the panels, four warps each
template <typename Pixel, typename Real, int ALIGN>
__global__ void __launch_bounds__(256, sizeof(Real) == 4 ? 2 : 1)
    image_sums(const Pixel* pixels, const i64* starts, int frames, int size, const Real* images, i64 pitch, int count,
               f64* out) {
    __shared__ f64 halves[2][4 * FRAMES * IMAGES];
    const int lane = threadIdx.x % 32, quad = threadIdx.x / 32 % 4, half = threadIdx.x / 128;
    const int frame = (blockIdx.x * 4 + quad) * FRAMES, image = blockIdx.y * IMAGES;
    const Pixel* from[FRAMES];
#pragma unroll
    for (int f = 0; f < FRAMES; ++f) from[f] = pixels + starts[min(frame + f, frames - 1)];
    f64 total = 0;
    for (int panel = half * PANEL; panel < size; panel += 2 * PANEL) {
        Real sums[FRAMES][IMAGES] = {};
        const int end = min(size, panel + PANEL);
        for (int pixel = panel + GROUP * lane; pixel < end; pixel += 32 * GROUP) {
            Group<Pixel> groups[FRAMES];
#pragma unroll
            for (int f = 0; f < FRAMES; ++f) groups[f] = load_group<Pixel, ALIGN>(from[f] + pixel, min(GROUP, size - pixel));
#pragma unroll
            for (int k = 0; k < GROUP; ++k) {
                Real value[FRAMES];
#pragma unroll
                for (int f = 0; f < FRAMES; ++f) value[f] = static_cast<Real>(groups[f][k]);
#pragma unroll
                for (int i = 0; i < IMAGES; ++i) {
                    const Real weight = __ldg(images + (image + i) * pitch + pixel + k);
#pragma unroll
                    for (int f = 0; f < FRAMES; ++f) sums[f][i] = product_added(value[f], weight, sums[f][i]);
                }
            }
        }
#pragma unroll
        for (int f = 0; f < FRAMES; ++f)
#pragma unroll
            for (int i = 0; i < IMAGES; ++i) {
                const Real sum = lanes_added(sums[f][i]);
                if (lane == f * IMAGES + i) total += static_cast<f64>(sum);
            }
    }
    halves[half][quad * 32 + lane] = total;
    __syncthreads();
    const int f = frame + lane / IMAGES, i = image + lane % IMAGES;
    if (half == 0 && f < frames && i < count)
        out[static_cast<i64>(f) * count + i] = halves[0][quad * 32 + lane] + halves[1][quad * 32 + lane];
}

// a whole number below 2^23 as float: its bits under those of 2^23, and 2^23 taken off again
__device__ __forceinline__ u32 float_bits(u32 whole) {
    return __float_as_uint(__uint_as_float(0x4b000000u | whole) - 8388608.0f);
}

// Two pixels as two bfloat16, their lower bytes (and, scaled by 256, their upper bytes): exact, 8 bits each.
template <typename Pixel> __device__ __forceinline__ void halves_of(const Group<Pixel>& group, int pair, u32& low, u32& high) {
    const u32 a = static_cast<u32>(group[2 * pair]), b = static_cast<u32>(group[2 * pair + 1]);
    low = __byte_perm(float_bits(a & 0xffu), float_bits(b & 0xffu), 0x7632);
    high = __byte_perm(float_bits(a & 0xff00u), float_bits(b & 0xff00u), 0x7632);
}

// The same with weights as sums of three bfloat16 (24 bits of them, as a float has), for pixels of u8 and u16.
// parts   (3, images rounded up to 16, pitch) bfloat16, the largest part first; zero where nothing is
// grid    (groups of 16 frames, groups of 16 images), 512 threads: 16 warps share the pixels, panel by panel
template <typename Pixel, int ALIGN>
__global__ void __launch_bounds__(512)
    image_sums_tensor(const Pixel* pixels, const i64* starts, int frames, int size, const u16* parts, int padded,
                      i64 pitch, int count, f64* out) {
    constexpr int STEP = 256;
    __shared__ f64 found[16][16 * 16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, quarter = lane % 4;
    const int frame = blockIdx.x * 16, image = blockIdx.y * 16;
    const Pixel* upper = pixels + starts[min(frame + row, frames - 1)];
    const Pixel* lower = pixels + starts[min(frame + row + 8, frames - 1)];
    f64 total[2][4] = {};
    for (int panel = warp * STEP; panel < size; panel += 16 * STEP) {
        // few additions in single precision: tensor cores cut off where others round
        f32 sums[2][4] = {};
        for (int base = panel; base < min(size, panel + STEP); base += 32) {
            const int pixel = base + GROUP * quarter, inside = min(GROUP, size - pixel);
            const Group<Pixel> a = load_group<Pixel, ALIGN>(upper + pixel, inside);
            const Group<Pixel> b = load_group<Pixel, ALIGN>(lower + pixel, inside);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                u32 low[4], high[4];
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    halves_of(a, 2 * step + k, low[2 * k], high[2 * k]);
                    halves_of(b, 2 * step + k, low[2 * k + 1], high[2 * k + 1]);
                }
#pragma unroll
                for (int n = 0; n < 2; ++n)
#pragma unroll
                    for (int part = 0; part < 3; ++part) {
                        const u16* weights = parts + (static_cast<i64>(part) * padded + image + 8 * n + row) * pitch;
                        const uint2 pair = inside > 0 ? __ldg(reinterpret_cast<const uint2*>(weights + pixel + 4 * step))
                                                      : make_uint2(0, 0);
                        const u32 pairs[2] = {pair.x, pair.y};
                        mma_bf16(sums[n], low, pairs);
                        if constexpr (sizeof(Pixel) == 2) mma_bf16(sums[n], high, pairs);
                    }
            }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int k = 0; k < 4; ++k) total[n][k] += static_cast<f64>(sums[n][k]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int k = 0; k < 4; ++k) found[warp][(row + 8 * (k / 2)) * 16 + 8 * n + 2 * quarter + k % 2] = total[n][k];
    __syncthreads();
    const int f = threadIdx.x / 16, i = threadIdx.x % 16;
    if (threadIdx.x < 256 && frame + f < frames && image + i < count) {
        f64 sum = 0;
        for (int w = 0; w < 16; ++w) sum += found[w][f * 16 + i];
        out[static_cast<i64>(frame + f) * count + image + i] = sum;
    }
}
