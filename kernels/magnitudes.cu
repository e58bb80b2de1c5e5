// The largest distance from zero in a frame, and the sum of all distances: one block a frame.
#include "types.cuh"
#include "warp.cuh"

// out   (frames, 2)
template <typename Pixel>
__global__ void __launch_bounds__(256) magnitudes(const Pixel* pixels, const i64* starts, int size, f64* out) {
    __shared__ f64 largest[8], total[8];
    const Pixel* frame = pixels + starts[blockIdx.x];
    f64 most = 0, sum = 0;
    for (int p = threadIdx.x; p < size; p += 256) {
        const f64 distance = fabs(static_cast<f64>(frame[p]));
        most = fmax(most, distance);
        sum += distance;
    }
    for (int step = 16; step; step /= 2) most = fmax(most, __shfl_xor_sync(0xffffffffu, most, step));
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        largest[threadIdx.x / 32] = most;
        total[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; ++w) {
            most = fmax(most, largest[w]);
            sum += total[w];
        }
        out[2 * blockIdx.x] = most;
        out[2 * blockIdx.x + 1] = sum;
    }
}
