// Dead pixels: the mean of good neighbours, which are already corrected.
#include "types.cuh"

template <bool CHOICE, typename First, typename Second> struct Either { typedef Second Type; };
template <typename First, typename Second> struct Either<true, First, Second> { typedef First Type; };

// Means of whole numbers, halves rounded up. Quotients and remainders are added separately: the sum itself could be too
// large for 64 bits.
template <typename Pixel> struct Mean {
    typedef typename Either<static_cast<Pixel>(-1) < static_cast<Pixel>(0), i64, u64>::Type Wide;
    Wide count, quotients = 0, rests = 0;
    __device__ __forceinline__ explicit Mean(int n) : count(n) {}
    __device__ __forceinline__ void add(Pixel value) {
        const Wide wide = static_cast<Wide>(value);
        // rounded down, where C++ rounds towards zero
        const Wide down = wide / count - (wide % count < 0 ? 1 : 0);
        quotients += down;
        rests += wide - down * count;
    }
    __device__ __forceinline__ Pixel value() const {
        return static_cast<Pixel>(quotients + (2 * rests + count) / (2 * count));
    }
};

struct FloatMean {
    f64 count, sum = 0;
    __device__ __forceinline__ explicit FloatMean(int n) : count(n) {}
    __device__ __forceinline__ void add(f64 value) { sum += value; }
    __device__ __forceinline__ f64 value() const { return sum / count; }
};
template <> struct Mean<f32> : FloatMean { using FloatMean::FloatMean; };
template <> struct Mean<f64> : FloatMean { using FloatMean::FloatMean; };

// dead         (count) dead pixels; the good neighbours of the k-th are neighbours[offsets[k]] ... [offsets[k + 1] - 1]
// grid         (frames, parts of the dead pixels), 256 threads
template <typename Pixel>
__global__ void __launch_bounds__(256)
    patch_dead(Pixel* pixels, const i64* starts, const i32* dead, int count, const i32* offsets, const i32* neighbours) {
    Pixel* frame = pixels + starts[blockIdx.x];
    for (int k = blockIdx.y * 256 + threadIdx.x; k < count; k += gridDim.y * 256) {
        Mean<Pixel> mean(offsets[k + 1] - offsets[k]);
        for (int j = offsets[k]; j < offsets[k + 1]; ++j) mean.add(frame[neighbours[j]]);
        frame[dead[k]] = static_cast<Pixel>(mean.value());
    }
}
