// The vector types of CUDA, aligned as on the device: a misaligned load of one of them is an error there.
#pragma once

#define GPUEM_VECTORS(name, scalar, align2, align4)                                                                    \
    struct name##1 { scalar x; };                                                                                      \
    struct alignas(align2) name##2 { scalar x, y; };                                                                   \
    struct name##3 { scalar x, y, z; };                                                                                \
    struct alignas(align4) name##4 { scalar x, y, z, w; };                                                             \
    inline name##1 make_##name##1(scalar x) { return {x}; }                                                            \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                               \
    inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                                  \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
GPUEM_VECTORS(char, signed char, 2, 4)
GPUEM_VECTORS(uchar, unsigned char, 2, 4)
GPUEM_VECTORS(short, short, 4, 8)
GPUEM_VECTORS(ushort, unsigned short, 4, 8)
GPUEM_VECTORS(int, int, 8, 16)
GPUEM_VECTORS(uint, unsigned, 8, 16)
GPUEM_VECTORS(longlong, long long, 16, 16)
GPUEM_VECTORS(ulonglong, unsigned long long, 16, 16)
GPUEM_VECTORS(float, float, 8, 16)
GPUEM_VECTORS(double, double, 16, 16)
#undef GPUEM_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
