// Stored pixels to native ones: any byte order, any alignment, and dark and gain on the way.
#include "types.cuh"

template <int SIZE> struct Word;
template <> struct Word<1> { typedef u8 Type; };
template <> struct Word<2> { typedef u16 Type; };
template <> struct Word<4> { typedef u32 Type; };
template <> struct Word<8> { typedef u64 Type; };

// the pixel at any address, its bytes reversed where SWAP
template <typename Stored, bool SWAP> __device__ __forceinline__ Stored pixel_at(const u8* at) {
    typedef typename Word<sizeof(Stored)>::Type Bits;
    union { Bits bits; Stored value; } both;
    if (!SWAP && reinterpret_cast<u64>(at) % sizeof(Stored) == 0) {
        both.bits = *reinterpret_cast<const Bits*>(at);
        return both.value;
    }
    Bits bits = 0;
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(Stored)); ++k)
        bits |= static_cast<Bits>(static_cast<Bits>(at[k]) << 8 * (SWAP ? sizeof(Stored) - 1 - k : k));
    both.bits = bits;
    return both.value;
}

// bytes, at    frame f is stored from byte at[f] of `bytes` on
// size         pixels of a frame
// dark, gain   (size) or null: out = (pixel - dark) * gain, each step rounded in the precision of `out`
// out          (frames, pitch)
// grid         (frames, parts of a frame), 256 threads
template <typename Stored, typename Out, bool SWAP>
__global__ void __launch_bounds__(256)
    convert(const u8* bytes, const i64* at, i64 size, const Out* dark, const Out* gain, Out* out, i64 pitch) {
    const u8* from = bytes + at[blockIdx.x];
    Out* to = out + blockIdx.x * pitch;
    for (i64 p = blockIdx.y * 256LL + threadIdx.x; p < size; p += gridDim.y * 256LL) {
        Out value = static_cast<Out>(pixel_at<Stored, SWAP>(from + p * sizeof(Stored)));
        if (dark) value = static_cast<Out>(value - dark[p]);
        if (gain) value = static_cast<Out>(value * gain[p]);
        to[p] = value;
    }
}
