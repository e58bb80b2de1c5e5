// LZ4 as HDF5 filter 32004 stores it, twin of gpuem/codecs/chunks.py:_lz4: one warp decodes one block, of any size,
// straight into the output and reads repeated bytes back from there. A block that LZ4 couldn't make smaller is stored.
//
// Grid (chunks, any), block 32 x warps. Chunk c lies at raw[at[c], at[c] + length[c]) and decodes to `chunk_nbytes` at
// out + c * pitch, at any address. `codes` is 0 before and for a sound chunk.
#include "types.cuh"
#include "lz4.cuh"

__global__ void lz4(const u8* __restrict__ raw, const i64* __restrict__ at, const i64* __restrict__ length, int chunks,
                    u8* out, i64 chunk_nbytes, i64 pitch, int* codes) {
    int warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        auto decode = [](const u8* block, u32 nbytes, u8* to, u32 count) {
            if (nbytes != count) return lz4_block(block, nbytes, to, count) ? 0 : BAD_BLOCK;
            copy(to, block, count);
            return 0;
        };
        report(codes + chunk, decode_share<1>(raw + at[chunk], length[chunk], out + chunk * pitch, chunk_nbytes,
                                              blockIdx.y * warps + warp, gridDim.y * warps, decode));
    }
}
