// Decoded chunks of a tile to frames: chunks may hang over the tile's edges and may cut frames.
#include "types.cuh"

// chunks    (chunks of the tile in C order of its grid, pixels of a chunk)
// shape     for each of the axes (scan..., y, x): extent of the tile, extent of a chunk, number of chunks, and where
//           the tile begins inside its first chunk
// out       the tile, in C order, a frame every `pitch` pixels
// grid      (frames, parts of a frame), 256 threads
template <typename Bits>
__global__ void __launch_bounds__(256)
    place_chunks(const Bits* chunks, const i64* shape, int axes, Bits* out, i64 pitch) {
    const i64 *extent = shape, *chunk = shape + axes, *count = shape + 2 * axes, *begin = shape + 3 * axes;
    const i64 size = extent[axes - 2] * extent[axes - 1];
    for (i64 p = blockIdx.y * 256LL + threadIdx.x; p < size; p += gridDim.y * 256LL) {
        // first the pixel's position along x and y, then the frame's along the axes of the scan; positions along an axis
        // fit 32 bits, by which dividing costs a quarter
        i64 which = 0, inside = 0, chunks_below = 1, pixels_below = 1;
        u32 left = static_cast<u32>(p);
        for (int axis = axes - 1; axis >= 0; --axis) {
            if (axis == axes - 3) left = blockIdx.x;
            const u32 wide = static_cast<u32>(extent[axis]), part = static_cast<u32>(chunk[axis]);
            const u32 position = left % wide + static_cast<u32>(begin[axis]);
            left /= wide;
            which += position / part * chunks_below;
            inside += position % part * pixels_below;
            chunks_below *= count[axis];
            pixels_below *= chunk[axis];
        }
        out[blockIdx.x * pitch + p] = chunks[which * pixels_below + inside];
    }
}
