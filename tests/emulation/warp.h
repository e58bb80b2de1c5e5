// What the lanes of a warp, or all threads of a block, do together; products of matrices on tensor cores.
#pragma once

namespace gpuem_cpu {
inline unsigned lane() { return machine.current->number % 32; }

struct Shuffle {
    uint64_t value, result;
    unsigned source;
    static void combine(void* const* operands, Lanes present) {
        for (Lanes rest = present; rest; rest &= rest - 1) {
            Shuffle& own = *static_cast<Shuffle*>(operands[__builtin_ctz(rest)]);
            // what a lane outside the mask holds is undefined: garbage that shows
            const bool there = present >> own.source & 1;
            own.result = there ? static_cast<Shuffle*>(operands[own.source])->value : 0xCDCDCDCDCDCDCDCDull;
        }
    }
};

template <typename T>
inline T shuffle(Lanes mask, T value, unsigned source) {
    Shuffle own = {0, 0, source};
    memcpy(&own.value, &value, sizeof(T));
    collective(mask, &own, Shuffle::combine);
    memcpy(&value, &own.result, sizeof(T));
    return value;
}

inline unsigned segment(int width) {
    if (width < 1 || width > 32 || (width & (width - 1)))
        fail("a shuffle of width %d: it must be a power of two up to 32", width);
    return lane() & ~unsigned(width - 1);
}
inline unsigned source_at(int at, int width) { return segment(width) | (unsigned(at) & unsigned(width - 1)); }
inline unsigned source_up(unsigned delta, int width) {
    return lane() >= uint64_t(segment(width)) + delta ? lane() - delta : lane();
}
inline unsigned source_down(unsigned delta, int width) {
    return uint64_t(lane()) + delta < segment(width) + unsigned(width) ? lane() + delta : lane();
}
inline unsigned source_xor(int bits, int width) {
    unsigned other = lane() ^ unsigned(bits);
    return other < segment(width) + unsigned(width) ? other : lane();
}

struct Vote {
    unsigned predicate, result;
    static void combine(void* const* operands, Lanes present) {
        unsigned result = 0;
        for (Lanes rest = present; rest; rest &= rest - 1)
            if (static_cast<Vote*>(operands[__builtin_ctz(rest)])->predicate) result |= rest & -rest;
        for (Lanes rest = present; rest; rest &= rest - 1)
            static_cast<Vote*>(operands[__builtin_ctz(rest)])->result = result;
    }
};

inline unsigned vote(Lanes mask, bool predicate) {
    Vote own = {predicate, 0};
    collective(mask, &own, Vote::combine);
    return own.result;
}
inline Lanes existing(Lanes mask) { return mask & machine.warp_state[machine.current->number / 32].exist; }

inline void no_operands(void* const*, Lanes) {}

template <typename T, typename Step>
struct Reduce {
    T value;
    static void combine(void* const* operands, Lanes present) {
        T total = static_cast<Reduce*>(operands[__builtin_ctz(present)])->value;
        for (Lanes rest = present & (present - 1); rest; rest &= rest - 1)
            total = Step::of(total, static_cast<Reduce*>(operands[__builtin_ctz(rest)])->value);
        for (Lanes rest = present; rest; rest &= rest - 1)
            static_cast<Reduce*>(operands[__builtin_ctz(rest)])->value = total;
    }
};
template <typename Step, typename T>
inline T reduce(Lanes mask, T value) {
    Reduce<T, Step> own = {value};
    collective(mask, &own, Reduce<T, Step>::combine);
    return own.value;
}
struct Sum { template <typename T> static T of(T a, T b) { return T(unsigned(a) + unsigned(b)); } };
struct Smaller { template <typename T> static T of(T a, T b) { return b < a ? b : a; } };
struct Larger { template <typename T> static T of(T a, T b) { return a < b ? b : a; } };
struct BitAnd { template <typename T> static T of(T a, T b) { return a & b; } };
struct BitOr { template <typename T> static T of(T a, T b) { return a | b; } };
struct BitXor { template <typename T> static T of(T a, T b) { return a ^ b; } };

// ---- matrix products of a warp, fragments as the PTX ISA lays them out ---------------------------------------------
inline float from_bf16(unsigned half) {
    unsigned bits = half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// m16n8k32 u8: lane = 4 g + t; a register holds four k of one row, b register four k of column g
struct ProductU8 {
    int* d;
    const unsigned *a, *b;
    static void combine(void* const* operands, Lanes) {
        unsigned char left[16][32], right[32][8];
        for (unsigned lane = 0; lane < 32; ++lane) {
            const ProductU8& own = *static_cast<ProductU8*>(operands[lane]);
            unsigned g = lane >> 2, t = lane & 3;
            for (unsigned byte = 0; byte < 4; ++byte) {
                for (unsigned r = 0; r < 4; ++r)
                    left[g + 8 * (r & 1)][16 * (r >> 1) + 4 * t + byte] = (unsigned char)(own.a[r] >> 8 * byte);
                for (unsigned r = 0; r < 2; ++r)
                    right[16 * r + 4 * t + byte][g] = (unsigned char)(own.b[r] >> 8 * byte);
            }
        }
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned r = 0; r < 4; ++r) {
                unsigned row = (lane >> 2) + 8 * (r >> 1), column = 2 * (lane & 3) + (r & 1);
                int* d = static_cast<ProductU8*>(operands[lane])->d;
                unsigned total = unsigned(d[r]);
                for (unsigned k = 0; k < 32; ++k) total += unsigned(left[row][k]) * right[k][column];
                d[r] = int(total);
            }
    }
};

// m16n8k16 bf16: two k in a register, the lower half-word holds the lower k
struct ProductBf16 {
    float* d;
    const unsigned *a, *b;
    static void combine(void* const* operands, Lanes) {
        float left[16][16], right[16][8];
        for (unsigned lane = 0; lane < 32; ++lane) {
            const ProductBf16& own = *static_cast<ProductBf16*>(operands[lane]);
            unsigned g = lane >> 2, t = lane & 3;
            for (unsigned half = 0; half < 2; ++half) {
                for (unsigned r = 0; r < 4; ++r)
                    left[g + 8 * (r & 1)][8 * (r >> 1) + 2 * t + half] = from_bf16(own.a[r] >> 16 * half & 0xffff);
                for (unsigned r = 0; r < 2; ++r)
                    right[8 * r + 2 * t + half][g] = from_bf16(own.b[r] >> 16 * half & 0xffff);
            }
        }
        for (unsigned lane = 0; lane < 32; ++lane)
            for (unsigned r = 0; r < 4; ++r) {
                unsigned row = (lane >> 2) + 8 * (r >> 1), column = 2 * (lane & 3) + (r & 1);
                float* d = static_cast<ProductBf16*>(operands[lane])->d;
                double total = d[r];
                for (unsigned k = 0; k < 16; ++k) total += double(left[row][k]) * right[k][column];
                d[r] = float(total);
            }
    }
};

template <typename Product, typename Result>
inline void matrix_product(Result* d, const unsigned* a, const unsigned* b) {
    if (existing(~0u) != ~0u) fail("a matrix product needs a full warp of 32 lanes");
    Product own = {d, a, b};
    collective(~0u, &own, Product::combine);
}
}  // namespace gpuem_cpu

inline void __syncthreads() { gpuem_cpu::block_barrier(0); }
inline int __syncthreads_count(int predicate) { return gpuem_cpu::block_barrier(predicate); }
inline int __syncthreads_or(int predicate) { return gpuem_cpu::block_barrier(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return gpuem_cpu::block_barrier(!predicate) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { gpuem_cpu::collective(mask, nullptr, gpuem_cpu::no_operands); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { gpuem_cpu::fail("__trap"); }

#define GPUEM_SHUFFLES(T)                                                                                              \
    inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {                                         \
        return gpuem_cpu::shuffle(mask, value, gpuem_cpu::source_at(source, width));                                   \
    }                                                                                                                  \
    inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {                                  \
        return gpuem_cpu::shuffle(mask, value, gpuem_cpu::source_up(delta, width));                                    \
    }                                                                                                                  \
    inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {                                \
        return gpuem_cpu::shuffle(mask, value, gpuem_cpu::source_down(delta, width));                                  \
    }                                                                                                                  \
    inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {                                       \
        return gpuem_cpu::shuffle(mask, value, gpuem_cpu::source_xor(bits, width));                                    \
    }
GPUEM_SHUFFLES(int)
GPUEM_SHUFFLES(unsigned)
GPUEM_SHUFFLES(long)
GPUEM_SHUFFLES(unsigned long)
GPUEM_SHUFFLES(long long)
GPUEM_SHUFFLES(unsigned long long)
GPUEM_SHUFFLES(float)
GPUEM_SHUFFLES(double)
#undef GPUEM_SHUFFLES

inline unsigned __ballot_sync(unsigned mask, int predicate) { return gpuem_cpu::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return gpuem_cpu::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
    return gpuem_cpu::vote(mask, predicate != 0) == gpuem_cpu::existing(mask);
}
#define GPUEM_REDUCE(name, T, step)                                                                                    \
    inline T __reduce_##name##_sync(unsigned mask, T value) { return gpuem_cpu::reduce<gpuem_cpu::step>(mask, value); }
GPUEM_REDUCE(add, unsigned, Sum)
GPUEM_REDUCE(add, int, Sum)
GPUEM_REDUCE(min, unsigned, Smaller)
GPUEM_REDUCE(min, int, Smaller)
GPUEM_REDUCE(max, unsigned, Larger)
GPUEM_REDUCE(max, int, Larger)
GPUEM_REDUCE(and, unsigned, BitAnd)
GPUEM_REDUCE(or, unsigned, BitOr)
GPUEM_REDUCE(xor, unsigned, BitXor)
#undef GPUEM_REDUCE

inline void mma_u8(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    gpuem_cpu::matrix_product<gpuem_cpu::ProductU8>(d, a, b);
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    gpuem_cpu::matrix_product<gpuem_cpu::ProductBf16>(d, a, b);
}
