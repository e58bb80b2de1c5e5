// What one thread calls: atomics, integers and the vectors inside them, loads, conversions.
#pragma once

namespace gpuem_cpu {
// a and b as vectors of Part
template <typename Part, typename Of>
inline unsigned by_parts(unsigned a, unsigned b, Of of) {
    constexpr unsigned bits = 8 * sizeof(Part);
    unsigned result = 0;
    for (unsigned at = 0; at < 32; at += bits)
        result |= (unsigned(of(long(Part(a >> at)), long(Part(b >> at)))) & ((1u << bits) - 1)) << at;
    return result;
}

template <typename Part>
constexpr long saturate(long value) {
    constexpr long bits = 8 * sizeof(Part);
    constexpr long low = std::is_signed_v<Part> ? -(1l << (bits - 1)) : 0;
    constexpr long high = low + (1l << bits) - 1;
    return value < low ? low : value > high ? high : value;
}

template <typename To, typename From>
inline To convert(From value) {  // as the device: to the nearest end when out of range, NaN becomes 0
    if (value != value) return 0;
    constexpr From edge = From(uint64_t(1) << (8 * sizeof(To) - 1));
    constexpr To largest = std::is_signed_v<To> ? To(~(uint64_t(1) << (8 * sizeof(To) - 1))) : To(~To(0));
    if (value >= (std::is_signed_v<To> ? edge : 2 * edge)) return largest;
    if (value <= (std::is_signed_v<To> ? -edge : From(0))) return std::is_signed_v<To> ? To(To(-1) - largest) : To(0);
    return To(value);
}

template <typename To, typename From>
inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

template <typename A, typename B, int parts>
inline unsigned dot(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < parts; ++i) c += unsigned(int(A(a >> 8 * sizeof(A) * i)) * int(B(b >> 8 * i)));
    return c;
}

// The error that the device may make, up to two units in the last place, in a direction that nobody can rely on.
inline float nearly(float value) {
    unsigned bits = bits_of<unsigned>(value);
    if (!isnormal(value) || (bits & 0x7fffff) < 2 || (bits & 0x7fffff) > 0x7ffffd) return value;
    return bits_of<float>(bits + bits * 0x9E3779B9u % 5 - 2);
}

template <typename T>
inline const T* loadable(const T* pointer) {
    static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "no such load");
    return pointer;
}
}  // namespace gpuem_cpu

// ---- atomics: one fiber runs at a time -----------------------------------------------------------------------------
#define GPUEM_ATOMIC(name, T, formula)                                                                                 \
    inline T atomic##name(T* address, T value) {                                                                       \
        T old = *address;                                                                                              \
        *address = formula;                                                                                            \
        return old;                                                                                                    \
    }
#define GPUEM_ATOMIC_INTEGERS(name, formula)                                                                           \
    GPUEM_ATOMIC(name, int, formula)                                                                                   \
    GPUEM_ATOMIC(name, unsigned, formula)                                                                              \
    GPUEM_ATOMIC(name, unsigned long long, formula)
#define GPUEM_ATOMIC_ALL_INTEGERS(name, formula)                                                                       \
    GPUEM_ATOMIC_INTEGERS(name, formula)                                                                               \
    GPUEM_ATOMIC(name, long long, formula)
inline int atomicAdd(int* address, int value) {  // wraps as on the device
    int old = *address;
    *address = int(unsigned(old) + unsigned(value));
    return old;
}
GPUEM_ATOMIC(Add, unsigned, old + value)
GPUEM_ATOMIC(Add, unsigned long long, old + value)
GPUEM_ATOMIC(Add, float, old + value)
GPUEM_ATOMIC(Add, double, old + value)
GPUEM_ATOMIC(Sub, int, int(unsigned(old) - unsigned(value)))
GPUEM_ATOMIC(Sub, unsigned, old - value)
GPUEM_ATOMIC_ALL_INTEGERS(Max, value > old ? value : old)
GPUEM_ATOMIC_ALL_INTEGERS(Min, value < old ? value : old)
GPUEM_ATOMIC_ALL_INTEGERS(And, old & value)
GPUEM_ATOMIC_ALL_INTEGERS(Or, old | value)
GPUEM_ATOMIC_ALL_INTEGERS(Xor, old ^ value)
GPUEM_ATOMIC_INTEGERS(Exch, value)
GPUEM_ATOMIC(Exch, float, value)
GPUEM_ATOMIC(Inc, unsigned, old >= value ? 0 : old + 1)
#define GPUEM_CAS(T)                                                                                                   \
    inline T atomicCAS(T* address, T compare, T value) {                                                               \
        T old = *address;                                                                                              \
        if (old == compare) *address = value;                                                                          \
        return old;                                                                                                    \
    }
GPUEM_CAS(int)
GPUEM_CAS(unsigned)
GPUEM_CAS(unsigned long long)
GPUEM_CAS(unsigned short)
#undef GPUEM_CAS
#undef GPUEM_ATOMIC
#undef GPUEM_ATOMIC_INTEGERS
#undef GPUEM_ATOMIC_ALL_INTEGERS

// ---- integers ------------------------------------------------------------------------------------------------------
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll((unsigned long long)value) : 64; }
inline unsigned __brev(unsigned value) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (value >> i & 1) << (31 - i);
    return result;
}
inline unsigned long long __brevll(unsigned long long value) {
    return (unsigned long long)__brev(unsigned(value)) << 32 | __brev(unsigned(value >> 32));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    if (selector & 0x8888) gpuem_cpu::fail("__byte_perm with selector %04x: bit 3 of a digit is not defined", selector);
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift < 32 ? shift : 32) >> 32);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift < 32 ? shift : 32));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
inline unsigned __usad(unsigned a, unsigned b, unsigned c) { return c + (a > b ? a - b : b - a); }

inline int __dp4a(int a, int b, int c) { return int(gpuem_cpu::dot<signed char, signed char, 4>(a, b, c)); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    return gpuem_cpu::dot<unsigned char, unsigned char, 4>(a, b, c);
}
inline int __dp4a(char4 a, char4 b, int c) { return __dp4a(gpuem_cpu::bits_of<int>(a), gpuem_cpu::bits_of<int>(b), c); }
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
    return __dp4a(gpuem_cpu::bits_of<unsigned>(a), gpuem_cpu::bits_of<unsigned>(b), c);
}
#define GPUEM_DP2A(name, shift)                                                                                        \
    inline int name(int a, int b, int c) {                                                                             \
        return int(gpuem_cpu::dot<short, signed char, 2>(a, unsigned(b) >> shift, c));                                 \
    }                                                                                                                  \
    inline unsigned name(unsigned a, unsigned b, unsigned c) {                                                         \
        return gpuem_cpu::dot<unsigned short, unsigned char, 2>(a, b >> shift, c);                                     \
    }                                                                                                                  \
    inline int name(short2 a, char4 b, int c) {                                                                        \
        return name(gpuem_cpu::bits_of<int>(a), gpuem_cpu::bits_of<int>(b), c);                                        \
    }                                                                                                                  \
    inline unsigned name(ushort2 a, uchar4 b, unsigned c) {                                                            \
        return name(gpuem_cpu::bits_of<unsigned>(a), gpuem_cpu::bits_of<unsigned>(b), c);                              \
    }
GPUEM_DP2A(__dp2a_lo, 0)
GPUEM_DP2A(__dp2a_hi, 16)
#undef GPUEM_DP2A

#define GPUEM_PARTS(name, Part, formula)                                                                               \
    inline unsigned name(unsigned left, unsigned right) {                                                              \
        return gpuem_cpu::by_parts<Part>(left, right, [](long a, long b) { return formula; });                         \
    }
#define GPUEM_PARTS_OF(count, u, s)                                                                                    \
    GPUEM_PARTS(__vadd##count, u, a + b)                                                                               \
    GPUEM_PARTS(__vsub##count, u, a - b)                                                                               \
    GPUEM_PARTS(__vaddus##count, u, gpuem_cpu::saturate<u>(a + b))                                                     \
    GPUEM_PARTS(__vaddss##count, s, gpuem_cpu::saturate<s>(a + b))                                                     \
    GPUEM_PARTS(__vsubus##count, u, gpuem_cpu::saturate<u>(a - b))                                                     \
    GPUEM_PARTS(__vsubss##count, s, gpuem_cpu::saturate<s>(a - b))                                                     \
    GPUEM_PARTS(__vmaxu##count, u, a > b ? a : b)                                                                      \
    GPUEM_PARTS(__vmaxs##count, s, a > b ? a : b)                                                                      \
    GPUEM_PARTS(__vminu##count, u, a < b ? a : b)                                                                      \
    GPUEM_PARTS(__vmins##count, s, a < b ? a : b)                                                                      \
    GPUEM_PARTS(__vabsdiffu##count, u, a > b ? a - b : b - a)                                                          \
    GPUEM_PARTS(__vcmpeq##count, u, a == b ? -1l : 0l)                                                                 \
    GPUEM_PARTS(__vcmpne##count, u, a != b ? -1l : 0l)                                                                 \
    GPUEM_PARTS(__vcmpgtu##count, u, a > b ? -1l : 0l)                                                                 \
    GPUEM_PARTS(__vcmpgeu##count, u, a >= b ? -1l : 0l)                                                                \
    GPUEM_PARTS(__vcmpltu##count, u, a < b ? -1l : 0l)                                                                 \
    GPUEM_PARTS(__vcmpleu##count, u, a <= b ? -1l : 0l)
GPUEM_PARTS_OF(2, unsigned short, short)
GPUEM_PARTS_OF(4, unsigned char, signed char)
#undef GPUEM_PARTS
#undef GPUEM_PARTS_OF

#define GPUEM_MIN_MAX(result, A, B)                                                                                    \
    inline result min(A a, B b) {                                                                                      \
        result left = a, right = b;                                                                                    \
        return right < left ? right : left;                                                                            \
    }                                                                                                                  \
    inline result max(A a, B b) {                                                                                      \
        result left = a, right = b;                                                                                    \
        return left < right ? right : left;                                                                            \
    }
#define GPUEM_MIN_MAX_SIGNS(T)                                                                                         \
    GPUEM_MIN_MAX(T, T, T)                                                                                             \
    GPUEM_MIN_MAX(unsigned T, unsigned T, unsigned T)                                                                  \
    GPUEM_MIN_MAX(unsigned T, T, unsigned T)                                                                           \
    GPUEM_MIN_MAX(unsigned T, unsigned T, T)
GPUEM_MIN_MAX_SIGNS(int)
GPUEM_MIN_MAX_SIGNS(long)
GPUEM_MIN_MAX_SIGNS(long long)
#undef GPUEM_MIN_MAX_SIGNS
#undef GPUEM_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// ---- loads, stores, conversions ------------------------------------------------------------------------------------
// macros, so that a misaligned access is told by the kernel's line
#define __ldg(pointer) (*gpuem_cpu::loadable(pointer))
#define __ldca(pointer) (*gpuem_cpu::loadable(pointer))
#define __ldcg(pointer) (*gpuem_cpu::loadable(pointer))
#define __ldcs(pointer) (*gpuem_cpu::loadable(pointer))
#define __ldcv(pointer) (*gpuem_cpu::loadable(pointer))
#define __ldlu(pointer) (*gpuem_cpu::loadable(pointer))
#define __stwb(pointer, value) (void)(*(pointer) = (value))
#define __stcg(pointer, value) (void)(*(pointer) = (value))
#define __stcs(pointer, value) (void)(*(pointer) = (value))
#define __stwt(pointer, value) (void)(*(pointer) = (value))

#define GPUEM_FROM_FLOATING(To, name)                                                                                  \
    inline To __float2##name##_rn(float value) { return gpuem_cpu::convert<To>(nearbyintf(value)); }                   \
    inline To __float2##name##_rz(float value) { return gpuem_cpu::convert<To>(truncf(value)); }                       \
    inline To __float2##name##_rd(float value) { return gpuem_cpu::convert<To>(floorf(value)); }                       \
    inline To __float2##name##_ru(float value) { return gpuem_cpu::convert<To>(ceilf(value)); }                        \
    inline To __double2##name##_rn(double value) { return gpuem_cpu::convert<To>(nearbyint(value)); }                  \
    inline To __double2##name##_rz(double value) { return gpuem_cpu::convert<To>(trunc(value)); }                      \
    inline To __double2##name##_rd(double value) { return gpuem_cpu::convert<To>(floor(value)); }                      \
    inline To __double2##name##_ru(double value) { return gpuem_cpu::convert<To>(ceil(value)); }                       \
    inline float __##name##2float_rn(To value) { return float(value); }
GPUEM_FROM_FLOATING(int, int)
GPUEM_FROM_FLOATING(unsigned, uint)
GPUEM_FROM_FLOATING(long long, ll)
GPUEM_FROM_FLOATING(unsigned long long, ull)
#undef GPUEM_FROM_FLOATING
inline double __int2double_rn(int value) { return value; }
inline double __uint2double_rn(unsigned value) { return value; }
inline double __ll2double_rn(long long value) { return double(value); }
inline double __ull2double_rn(unsigned long long value) { return double(value); }
inline float __double2float_rn(double value) { return float(value); }
inline int __float_as_int(float value) { return gpuem_cpu::bits_of<int>(value); }
inline unsigned __float_as_uint(float value) { return gpuem_cpu::bits_of<unsigned>(value); }
inline float __int_as_float(int value) { return gpuem_cpu::bits_of<float>(value); }
inline float __uint_as_float(unsigned value) { return gpuem_cpu::bits_of<float>(value); }
inline long long __double_as_longlong(double value) { return gpuem_cpu::bits_of<long long>(value); }
inline double __longlong_as_double(long long value) { return gpuem_cpu::bits_of<double>(value); }
inline double __hiloint2double(int high, int low) {
    return gpuem_cpu::bits_of<double>(uint64_t(unsigned(high)) << 32 | unsigned(low));
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1 / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f ? 0 : gpuem_cpu::nearly(a / b); }
inline float rsqrtf(float a) { return 1 / sqrtf(a); }
inline double rsqrt(double a) { return 1 / sqrt(a); }
#if !defined(__GLIBC__) || (__GLIBC__ == 2 && __GLIBC_MINOR__ < 41)  // later ones have them
inline double sinpi(double a) { return sin(M_PI * remainder(a, 2)); }
inline double cospi(double a) { return cos(M_PI * remainder(a, 2)); }
inline float sinpif(float a) { return float(sinpi(a)); }
inline float cospif(float a) { return float(cospi(a)); }
#endif
inline float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1 : 0; }
