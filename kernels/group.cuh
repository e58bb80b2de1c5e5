// Eight neighbouring pixels of a row as 32-bit words: loaded as wide as their address allows, summed without unpacking
// where there is an instruction for it.
#include "types.cuh"

constexpr int GROUP = 8;

// how a pixel is added up: within a thread, and over a frame
template <typename Pixel> struct Adds { typedef i64 Narrow; typedef i64 Wide; };
template <> struct Adds<u8> { typedef u32 Narrow; typedef i64 Wide; };
template <> struct Adds<u16> { typedef u32 Narrow; typedef i64 Wide; };
template <> struct Adds<i8> { typedef i32 Narrow; typedef i64 Wide; };
template <> struct Adds<i16> { typedef i32 Narrow; typedef i64 Wide; };
template <> struct Adds<f32> { typedef f64 Narrow; typedef f64 Wide; };
template <> struct Adds<f64> { typedef f64 Narrow; typedef f64 Wide; };

template <typename Pixel> struct Group {
    static constexpr int WORDS = GROUP * sizeof(Pixel) / 4;
    u32 words[WORDS];

    __device__ __forceinline__ Pixel operator[](int k) const {
        if constexpr (sizeof(Pixel) == 1) return static_cast<Pixel>(words[k / 4] >> 8 * (k % 4));
        if constexpr (sizeof(Pixel) == 2) return static_cast<Pixel>(words[k / 2] >> 16 * (k % 2));
        if constexpr (sizeof(Pixel) == 4) return bits_as<Pixel>(words[k]);
        if constexpr (sizeof(Pixel) == 8)
            return bits_as<Pixel>(static_cast<u64>(words[2 * k + 1]) << 32 | words[2 * k]);
    }

    __device__ __forceinline__ void put(int k, Pixel value) {
        if constexpr (sizeof(Pixel) == 1) words[k / 4] |= static_cast<u32>(static_cast<u8>(value)) << 8 * (k % 4);
        if constexpr (sizeof(Pixel) == 2) words[k / 2] |= static_cast<u32>(static_cast<u16>(value)) << 16 * (k % 2);
        if constexpr (sizeof(Pixel) == 4) words[k] = bits_as<u32>(value);
        if constexpr (sizeof(Pixel) == 8) {
            u64 bits = bits_as<u64>(value);
            words[2 * k] = static_cast<u32>(bits);
            words[2 * k + 1] = static_cast<u32>(bits >> 32);
        }
    }

    template <typename To, typename From> static __device__ __forceinline__ To bits_as(From value) {
        static_assert(sizeof(To) == sizeof(From), "");
        union { From from; To to; } both;
        both.from = value;
        return both.to;
    }
};

// pixels [at, at + count); the words behind them are 0. ALIGN: bytes that divide the address of every whole group.
template <typename Pixel, int ALIGN> __device__ __forceinline__ Group<Pixel> load_group(const Pixel* at, int count) {
    Group<Pixel> group;
    if (count == GROUP && ALIGN >= 4) {
#pragma unroll
        for (int w = 0; w < Group<Pixel>::WORDS; w += ALIGN >= 16 ? 4 : ALIGN / 4) {
            const u32* from = reinterpret_cast<const u32*>(at) + w;
            if constexpr (ALIGN >= 16 && Group<Pixel>::WORDS >= 4) {
                uint4 four = __ldg(reinterpret_cast<const uint4*>(from));
                group.words[w] = four.x, group.words[w + 1] = four.y;
                group.words[w + 2] = four.z, group.words[w + 3] = four.w;
            } else if constexpr (ALIGN >= 8) {
                uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
                group.words[w] = two.x, group.words[w + 1] = two.y;
            } else {
                group.words[w] = __ldg(from);
            }
        }
        return group;
    }
#pragma unroll
    for (int w = 0; w < Group<Pixel>::WORDS; ++w) group.words[w] = 0;
#pragma unroll
    for (int k = 0; k < GROUP; ++k)
        if (k < count) group.put(k, __ldg(at + k));
    return group;
}

// four bits as four bytes of 0 or 1
__device__ __forceinline__ u32 bytes_of_bits(u32 bits) { return (bits & 0xfu) * 0x00204081u & 0x01010101u; }

// sum + the pixels of 1 or 2 bytes times eight whole numbers of 0 to 127, one a byte, exact
template <typename Pixel, typename Narrow>
__device__ __forceinline__ Narrow dot(const Group<Pixel>& group, u32 low, u32 high, Narrow sum) {
    Narrow first = static_cast<Narrow>(low), second = static_cast<Narrow>(high);
    if constexpr (sizeof(Pixel) == 1) {
        sum = __dp4a(static_cast<Narrow>(group.words[0]), first, sum);
        return __dp4a(static_cast<Narrow>(group.words[1]), second, sum);
    } else {
        sum = __dp2a_lo(static_cast<Narrow>(group.words[0]), first, sum);
        sum = __dp2a_hi(static_cast<Narrow>(group.words[1]), first, sum);
        sum = __dp2a_lo(static_cast<Narrow>(group.words[2]), second, sum);
        return __dp2a_hi(static_cast<Narrow>(group.words[3]), second, sum);
    }
}

// add the pixels whose bit is set to `sum`, and, where FIRST_MOMENT, k times the k-th of them to `moment`
template <bool FIRST_MOMENT, typename Pixel, typename Narrow>
__device__ __forceinline__ void add_chosen(const Group<Pixel>& group, u32 bits, Narrow& sum, Narrow& moment) {
    if constexpr (sizeof(Pixel) <= 2) {
        // bytes of 0 or 1 as weights; times 255 they are masks of the weights 0 to 7
        u32 low = bytes_of_bits(bits), high = bytes_of_bits(bits >> 4);
        sum = dot(group, low, high, sum);
        if constexpr (FIRST_MOMENT) moment = dot(group, low * 255u & 0x03020100u, high * 255u & 0x07060504u, moment);
    } else {
#pragma unroll
        for (int k = 0; k < GROUP; ++k) {
            Narrow value = bits >> k & 1u ? static_cast<Narrow>(group[k]) : Narrow(0);
            sum += value;
            if constexpr (FIRST_MOMENT) moment += Narrow(k) * value;
        }
    }
}

// `largest` raised to the larger of both, pixel by pixel
template <typename Pixel> __device__ __forceinline__ void raise(Group<Pixel>& largest, const Group<Pixel>& group) {
    constexpr bool SIGNED = static_cast<Pixel>(-1) < static_cast<Pixel>(0);
    if constexpr (sizeof(Pixel) <= 2) {
#pragma unroll
        for (int w = 0; w < Group<Pixel>::WORDS; ++w) {
            u32 a = largest.words[w], b = group.words[w];
            if constexpr (sizeof(Pixel) == 1) largest.words[w] = SIGNED ? __vmaxs4(a, b) : __vmaxu4(a, b);
            if constexpr (sizeof(Pixel) == 2) largest.words[w] = SIGNED ? __vmaxs2(a, b) : __vmaxu2(a, b);
        }
    } else {
#pragma unroll
        for (int k = 0; k < GROUP; ++k) {
            Pixel value = group[k];
            if (value > largest[k]) largest.put(k, value);
        }
    }
}
