// Merlin raw frames (R64), twin of gpuem/codecs/merlin.py: big-endian 64-bit words whose pixels stand in reverse order,
// a stored row through one row of every chip, the last chip first, the chips of a quad's lower half turned.
//
// Grid (any, any): groups of pixels along x, frames along y; block any. Threads side by side write pixels side by
// side, 8 bytes each (16 for 24 bits) where `out` is aligned to them. `starts`: where each frame's data begin in `raw`,
// at any address. `pitch`: pixels from frame to frame. width / chips_x is divisible by 64.
#include "types.cuh"
#include "store.cuh"

template <int BITS> struct Counter;
template <> struct Counter<1> { typedef u8 Pixel; };
template <> struct Counter<6> { typedef u8 Pixel; };
template <> struct Counter<12> { typedef u16 Pixel; };
template <> struct Counter<24> { typedef u32 Pixel; };

struct Words {
    u32 low, high;
};

__device__ __forceinline__ Words load_word(const u8* at) {
    if (is_aligned(at, 8)) {
        u64 word = __ldg(reinterpret_cast<const u64*>(at));
        return {static_cast<u32>(word), static_cast<u32>(word >> 32)};
    }
    Words word = {0, 0};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        word.low |= static_cast<u32>(__ldg(at + k)) << 8 * k;
        word.high |= static_cast<u32>(__ldg(at + k + 4)) << 8 * k;
    }
    return word;
}

// eight pixels of one bit from one byte, in the image's order
__device__ __forceinline__ Words eight_bits(const u8* at, bool turned) {
    u32 bits = turned ? __brev(__ldg(at)) >> 24 : __ldg(at);
    return {(bits & 15) * 0x00204081u & 0x01010101u, (bits >> 4) * 0x00204081u & 0x01010101u};
}

// eight pixels of one byte: a word read from its end, or from its beginning
__device__ __forceinline__ Words eight_pixels(const u8* at, bool turned) {
    Words word = load_word(at);
    if (turned) return word;
    return {__byte_perm(word.high, 0, 0x0123), __byte_perm(word.low, 0, 0x0123)};
}

// four pixels of two bytes
__device__ __forceinline__ Words four_pixels(const u8* at, bool turned) {
    Words word = load_word(at);
    if (turned) return {__byte_perm(word.low, 0, 0x2301), __byte_perm(word.high, 0, 0x2301)};
    return {__byte_perm(word.high, 0, 0x0123), __byte_perm(word.low, 0, 0x0123)};
}

// Where a group of pixels stands in a stored frame: which row of a chip, counted through the frame, and which group.
struct Place {
    u32 row_of_chip, group;
    bool turned;
};

__device__ __forceinline__ Place find(u32 index, u32 rows, u32 groups, u32 chips_y, u32 chips_x) {
    u32 line = index / groups, chip_x = line % chips_x, y = line / chips_x, chip_y = y / rows;
    bool turned = chip_y > 0;
    u32 row = turned ? rows * chips_y - 1 - y : y, group = index - line * groups;
    u32 chips = chips_y * chips_x, slot = chips - 1 - (chip_y * chips_x + chip_x);
    return {row * chips + slot, turned ? groups - 1 - group : group, turned};
}

// Two counts of 24 bits from the two times 12 bits that a word holds of each half.
__device__ __forceinline__ Words join(u32 upper, u32 lower) {
    return {((upper & 0xffff) << 12) + (lower & 0xffff), (upper >> 16 << 12) + (lower >> 16)};
}

template <int BITS>
__global__ void merlin(const u8* __restrict__ raw, const i64* __restrict__ starts, int frames,
                       typename Counter<BITS>::Pixel* __restrict__ out, i64 pitch, int height, int width, int chips_y,
                       int chips_x) {
    constexpr u32 SIZE = sizeof(*out), PIXELS = BITS < 12 ? 8 : 4;
    // stored bytes of a group, in one of the two frames that 24 bits take
    constexpr u32 STORED = BITS == 1 ? 1 : 8;
    u32 all = static_cast<u32>(height) * width / PIXELS, rows = height / chips_y, groups = width / chips_x / PIXELS;
    // the rows of a single chip follow one another: one long row
    if (chips_y * chips_x == 1) rows = 1, groups = all;
    for (u32 index = blockIdx.x * blockDim.x + threadIdx.x; index < all; index += gridDim.x * blockDim.x) {
        Place place = find(index, rows, groups, chips_y, chips_x);
        // the bytes of a word of single bits stand in reverse order, too
        u32 group = BITS == 1 ? place.group ^ 7 : place.group;
        i64 at = (static_cast<i64>(place.row_of_chip) * groups + group) * STORED;
        for (int frame = blockIdx.y; frame < frames; frame += gridDim.y) {
            const u8* from = raw + starts[frame] + at;
            auto* to = out + frame * pitch + static_cast<i64>(index) * PIXELS;
            if constexpr (BITS == 24) {
                Words upper = four_pixels(from, place.turned);
                Words lower = four_pixels(from + static_cast<i64>(all) * STORED, place.turned);
                Words first = join(upper.low, lower.low), second = join(upper.high, lower.high);
                store_pixels<SIZE>(to, {first.low, first.high, second.low, second.high});
            } else {
                Words pixels = BITS == 1    ? eight_bits(from, place.turned)
                               : BITS == 6  ? eight_pixels(from, place.turned)
                                            : four_pixels(from, place.turned);
                store_pixels<SIZE>(to, {pixels.low, pixels.high});
            }
        }
    }
}
