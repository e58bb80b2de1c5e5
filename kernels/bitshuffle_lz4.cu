// Bitshuffle with LZ4 (HDF5 filter 32008), twin of gpuem/codecs/bitshuffle.py: one warp decodes one block into shared
// memory and turns its bit planes into pixels in registers.
//
// Grid (chunks, any), block 32 x warps, shared memory SCRATCH x warps. Chunk c lies at raw[at[c], at[c] + length[c])
// and decodes to `chunk_nbytes` at out + c * pitch; both are multiples of a pixel, and where they are multiples of 16,
// pixels are written in strides of 16. `codes` is 0 before and for a sound chunk; TOO_LARGE says that its blocks exceed
// SCRATCH and it must be decoded elsewhere. The warps share the blocks of a chunk evenly, whatever the grid.
#include "types.cuh"
#include "lz4.cuh"
#include "store.cuh"

// what the bitshuffle library makes its blocks by default
constexpr u32 SCRATCH = 8192;

// 8 x 8 bits: bit k of byte j becomes bit j of byte k
__device__ __forceinline__ u64 transposed(u64 bits) {
    u64 swap = (bits ^ bits >> 7) & 0x00aa00aa00aa00aaull;
    bits ^= swap ^ swap << 7;
    swap = (bits ^ bits >> 14) & 0x0000cccc0000ccccull;
    bits ^= swap ^ swap << 14;
    swap = (bits ^ bits >> 28) & 0x00000000f0f0f0f0ull;
    return bits ^ swap ^ swap << 28;
}

// One byte of eight neighbouring pixels, from the eight planes of its bits, which lie `plane` bytes apart.
__device__ __forceinline__ u64 column(const u8* planes, u32 plane) {
    u64 bits = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) bits |= static_cast<u64>(planes[k * plane]) << 8 * k;
    return transposed(bits);
}

// Turn the bit planes of one block into pixels, eight at a time.
template <int SIZE> __device__ __forceinline__ void unshuffle_bits(const u8* planes, u32 nbytes, u8* out) {
    u32 plane = nbytes / (8 * SIZE);
    for (u32 group = lane_of_warp(); group < plane; group += LANES) {
        u32 left[SIZE], right[SIZE], words[2 * SIZE];
#pragma unroll
        for (int k = 0; k < SIZE; ++k) {
            u64 bytes = column(planes + 8 * k * plane + group, plane);
            left[k] = static_cast<u32>(bytes), right[k] = static_cast<u32>(bytes >> 32);
        }
        interleave(left, words);
        interleave(right, words + SIZE);
        store_pixels<SIZE>(out + 8 * SIZE * group, words);
    }
}

template <typename Pixel>
__global__ void bitshuffle_lz4(const u8* __restrict__ raw, const i64* __restrict__ at, const i64* __restrict__ length,
                               int chunks, u8* __restrict__ out, i64 chunk_nbytes, i64 pitch, int* codes) {
    DYNAMIC_SHARED(u8, shared);
    int warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    u8* scratch = shared + SCRATCH * warp;
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        auto decode = [scratch](const u8* block, u32 nbytes, u8* to, u32 count) {
            if (count > SCRATCH) return TOO_LARGE;
            // the lanes have read the block before
            __syncwarp();
            if (!lz4_block(block, nbytes, scratch, count)) return BAD_BLOCK;
            __syncwarp();
            unshuffle_bits<sizeof(Pixel)>(scratch, count, to);
            return 0;
        };
        report(codes + chunk, decode_share<8 * sizeof(Pixel)>(
                                    raw + at[chunk], length[chunk], out + chunk * pitch, chunk_nbytes,
                                    blockIdx.y * warps + warp, gridDim.y * warps, decode));
    }
}
