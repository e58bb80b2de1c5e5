// Chunks of LZ4 blocks as HDF5 filters 32004 and 32008 store them: u64 bytes in all, u32 bytes of a block, then for
// every block a u32 length and the block, all big-endian. One warp decodes one block, its lanes copy side by side.
//
// The bytes are untrusted. No length is believed before it was compared with both buffers, so nothing is read outside
// the chunk and nothing is written outside its output. Every lane holds the same position and takes the same way.
#include "types.cuh"

// the codes of gpuem.codecs.bitshuffle, and one more: sound so far, but a block is too large for this kernel
constexpr int BAD_HEADER = -1, BAD_BLOCK = -2, TOO_SHORT = -3, TOO_LONG = -4, TOO_LARGE = -5;
constexpr u32 LANES = 32, WHOLE_WARP = 0xffffffffu;

__device__ __forceinline__ u32 lane_of_warp() { return threadIdx.x % LANES; }

__device__ __forceinline__ u32 big_endian(const u8* at) {
    return static_cast<u32>(at[0]) << 24 | static_cast<u32>(at[1]) << 16 | static_cast<u32>(at[2]) << 8 | at[3];
}

// A token's 15 means that more bytes follow: add them, as many as are 255 and one that isn't. False where they don't
// end or the length exceeds `limit`, which is checked for every 32 bytes, so 32 bits suffice.
__device__ __forceinline__ bool extend(const u8* src, u32& i, u32 end, u32 limit, u32& length) {
    while (i < end) {
        // lanes behind the end repeat the last byte: if that is 255, none of them ends the length
        u32 byte = src[i + min(lane_of_warp(), end - 1 - i)];
        u32 smaller = __ballot_sync(WHOLE_WARP, byte != 255);
        u32 full = smaller ? __ffs(smaller) - 1 : LANES;
        length += 255 * full;
        if (length > limit) return false;
        i += full;
        if (smaller) {
            length += __shfl_sync(WHOLE_WARP, byte, full);
            ++i;
            return true;
        }
    }
    return false;
}

// Copy bytes that don't overlap.
__device__ __forceinline__ void copy(u8* to, const u8* from, u32 count) {
    u32 head = 0, words = 0;
    if (count >= 64) {
        // words where they are aligned in `to`, each from two of `from`; 4 bytes at both ends keep these inside
        head = 4 + static_cast<u32>(-reinterpret_cast<u64>(to)) % 4, words = (count - head - 4) / 4;
        u32 shift = static_cast<u32>(reinterpret_cast<u64>(from + head)) % 4;
        const u32* source = reinterpret_cast<const u32*>(from + head - shift);
        u32* target = reinterpret_cast<u32*>(to + head);
#pragma unroll 1
        for (u32 k = lane_of_warp(); k < words; k += LANES)
            target[k] = __funnelshift_r(source[k], source[k + 1], 8 * shift);
    }
    // most stretches are short: unrolled loops would only fill the instruction cache
#pragma unroll 1
    for (u32 k = lane_of_warp(); k < count - 4 * words; k += LANES) {
        u32 byte = k < head ? k : k + 4 * words;
        to[byte] = from[byte];
    }
}

// What lane d - 1 holds for divisions by d: a number up to 32 times it, without its lowest 16 bits, is the quotient.
__device__ __forceinline__ u32 inverse_of_lane() { return 65536 / (lane_of_warp() + 1) + 1; }

// Repeat at `to` the `count` bytes that begin `distance` before it and may overlap. What lies before `to` is visible.
__device__ __forceinline__ void repeat(u8* to, u32 distance, u32 count, u32 inverses) {
    if (distance < count && distance < LANES) {
        // every byte is one of the `distance` before: the one at the remainder
        u32 inverse = __shfl_sync(WHOLE_WARP, inverses, distance - 1), lane = lane_of_warp();
        u32 remainder = lane - distance * (lane * inverse >> 16);
        if (lane < count) to[lane] = *(to + remainder - distance);
        if (count <= LANES) return;
        __syncwarp();
        to += LANES, count -= LANES;
        // it repeats after each multiple, too: the largest one that is written
        distance *= LANES * inverse >> 16;
    }
    // as much as doesn't overlap, then twice as much
#pragma unroll 1
    for (; count > distance; distance *= 2) {
        copy(to, to - distance, distance);
        __syncwarp();
        to += distance, count -= distance;
    }
    copy(to, to - distance, count);
}

// Decode the LZ4 block src[0, end) into `room` bytes at `to`, which it must fill to the byte, by a whole warp. What its
// lanes have written is visible to each other after a __syncwarp().
__device__ __forceinline__ bool lz4_block(const u8* src, u32 end, u8* to, u32 room) {
    // LZ4 knows no longer blocks; below 2^31 no sum of two positions overflows
    if ((end | room) >> 31) return false;
    u32 i = 0, written = 0, lane = lane_of_warp(), inverses = inverse_of_lane();
    while (i < end) {
        // one load serves most sequences: token, up to 14 literals and the distance lie within 32 bytes
        u32 left = end - i, byte = src[i + min(lane, left - 1)], distance;
        u32 token = __shfl_sync(WHOLE_WARP, byte, 0), count = token >> 4;
        if (count < 15) {
            if (count >= left || count > room) return false;
            if (lane - 1 < count) to[lane - 1] = static_cast<u8>(byte);
            i += 1 + count;
            distance = __shfl_sync(WHOLE_WARP, byte, 1 + count) | __shfl_sync(WHOLE_WARP, byte, 2 + count) << 8;
        } else {
            ++i;
            if (!extend(src, i, end, room, count) || count > end - i || count > room) return false;
            copy(to, src + i, count);
            i += count;
            distance = end - i < 2 ? 0 : src[i] | static_cast<u32>(src[i + 1]) << 8;
        }
        to += count, written += count, room -= count;
        if (i == end) return room == 0;
        if (end - i < 2) return false;
        i += 2;
        count = token & 15;
        if (count == 15 && !extend(src, i, end, room, count)) return false;
        count += 4;
        if (distance == 0 || distance > written || count > room) return false;
        __syncwarp();
        repeat(to, distance, count, inverses);
        to += count, written += count, room -= count;
    }
    return false;
}

// Bytes of a block by the chunk's header, which must promise `nbytes` in blocks of whole groups; or a code.
template <int GROUP> __device__ __forceinline__ i64 block_bytes(const u8* raw, i64 length, i64 nbytes) {
    if (length < 12) return TOO_SHORT;
    u64 total = static_cast<u64>(big_endian(raw)) << 32 | big_endian(raw + 4);
    u32 block = big_endian(raw + 8);
    return total == static_cast<u64>(nbytes) && block > 0 && block % GROUP == 0
               ? static_cast<i64>(block)
               : BAD_HEADER;
}

// Where the block ends whose length stands at `i`, or TOO_SHORT where it doesn't lie in the chunk.
__device__ __forceinline__ i64 block_end(const u8* raw, i64 length, i64 i) {
    if (length - i < 4) return TOO_SHORT;
    i64 end = i + 4 + big_endian(raw + i);
    return end > length ? TOO_SHORT : end;
}

// Decode one worker's share of a chunk: a run of blocks, found by walking along the lengths. Blocks hold bytes of
// whole groups; what fills no group follows the last one as it is, and with it the chunk must end. The result is 0 or
// a code, the same whatever the other workers do. `decode` (block, its length, output, its bytes) decodes one block.
template <int GROUP, typename Decode>
__device__ __forceinline__ int decode_share(
    const u8* raw, i64 length, u8* out, i64 nbytes, int worker, int workers, Decode decode) {
    i64 size = block_bytes<GROUP>(raw, length, nbytes);
    if (size < 0) return static_cast<int>(size);
    i64 whole = nbytes / GROUP * GROUP, blocks = (whole + size - 1) / size, run = (blocks + workers - 1) / workers;
    i64 first = run * worker, last = first + run < blocks ? first + run : blocks, i = 12;
    // without a block the first worker checks the end
    if (first >= blocks && (blocks > 0 || worker > 0)) return 0;
    for (i64 k = 0; k < last; ++k) {
        i64 begin = i + 4, o = k * size;
        i = block_end(raw, length, i);
        if (i < 0) return TOO_SHORT;
        if (k < first) continue;
        i64 count = whole - o < size ? whole - o : size;
        int code = decode(raw + begin, static_cast<u32>(i - begin), out + o, static_cast<u32>(count));
        if (code) return code;
    }
    if (last < blocks) return 0;
    i64 rest = nbytes - whole;
    if (length - i != rest) return length - i < rest ? TOO_SHORT : TOO_LONG;
    for (i64 k = lane_of_warp(); k < rest; k += LANES) out[whole + k] = raw[i + k];
    return 0;
}

// Keep the lowest code: the same one whatever the order of the warps.
__device__ __forceinline__ void report(int* code, int found) {
    if (found && lane_of_warp() == 0) atomicMin(code, found);
}
