// Frames of a part of the detector to their place in whole frames.
#include "types.cuh"

// pixels    of the part; frame i begins at pixel starts[i] + first, a row of it every `pitch` pixels
// out       whole frames, one every `size` pixels; the part's first pixel goes to `corner`, its rows every `row` pixels
// grid      (frames, parts of a frame), 256 threads
template <typename Bits>
__global__ void __launch_bounds__(256)
    place_part(const Bits* pixels, const i64* starts, i64 first, int pitch, int rows, int columns, Bits* out, i64 size,
               i64 corner, int row) {
    const Bits* from = pixels + starts[blockIdx.x] + first;
    Bits* to = out + blockIdx.x * size + corner;
    const u32 count = static_cast<u32>(rows) * columns, wide = columns;
    for (u32 p = blockIdx.y * 256u + threadIdx.x; p < count; p += gridDim.y * 256u) {
        const u32 y = p / wide, x = p % wide;
        to[static_cast<i64>(y) * row + x] = from[static_cast<i64>(y) * pitch + x];
    }
}
