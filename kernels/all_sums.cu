// Every exact sum of a block of frames in one pass over their pixels: sum and maximum over frames, sums inside masks,
// and first moments inside regions.
//
// A thread owns ROWS groups of eight neighbouring pixels of a row (a strip of groups per block) and goes with them
// through its frames: sums over frames stay in registers, sums over a frame are added up over the warp and kept in
// shared memory, one cell per warp, until all frames are done.
//
// Integers are added to global memory with atomics: exact in any order. Floats would depend on the order, so the host
// launches them with one owner per result: grid (strips, 1) for the images, grid (1, frames) for the sums per frame.
#include "types.cuh"
#include "warp.cuh"
#include "group.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

// as many groups as leave room for two blocks on a multiprocessor, three without images
template <typename Pixel> struct Owned { static constexpr int ROWS = sizeof(Pixel) <= 2 ? 4 : sizeof(Pixel) == 4 ? 2 : 1; };
template <> struct Owned<f32> { static constexpr int ROWS = 1; };

// the type in which maxima are kept: there are no atomics below 32 bits
template <typename Pixel> struct Largest { typedef Pixel Type; };
template <> struct Largest<u8> { typedef u32 Type; };
template <> struct Largest<u16> { typedef u32 Type; };
template <> struct Largest<i8> { typedef i32 Type; };
template <> struct Largest<i16> { typedef i32 Type; };

__device__ __forceinline__ void add_to(i64* target, i64 value) {
    if (value) atomicAdd(reinterpret_cast<u64*>(target), static_cast<u64>(value));
}
__device__ __forceinline__ void add_to(f64* target, f64 value) { *target += value; }

// `seen` is what the target held a while ago: most values are no new maximum, and what was seen can only be too small
template <typename Type> __device__ __forceinline__ void raise_to(Type* target, Type seen, Type value) {
    if (value > seen) atomicMax(target, value);
}
__device__ __forceinline__ void raise_to(f32* target, f32 seen, f32 value) { *target = value > seen ? value : seen; }
__device__ __forceinline__ void raise_to(f64* target, f64 seen, f64 value) { *target = value > seen ? value : seen; }

template <typename Pixel, typename Wide> __device__ __forceinline__ Wide sum_of_warp(Wide value) {
    if constexpr (sizeof(Pixel) <= 2) return warp_sum_below_2_53(value);
    else return warp_sum(value);
}

// One frame's sums: columns 0 ... masks - 1 are sums inside masks, then come three columns (sum, y and x moment) for
// every region. `cells` are this warp's own.
template <typename Pixel>
__device__ __forceinline__ void add_columns(const Group<Pixel> (&groups)[Owned<Pixel>::ROWS], const u32* bits,
                                            const i32 (&y)[Owned<Pixel>::ROWS], const i32 (&x)[Owned<Pixel>::ROWS],
                                            int masks, int regions, typename Adds<Pixel>::Wide* cells) {
    typedef typename Adds<Pixel>::Narrow Narrow;
    typedef typename Adds<Pixel>::Wide Wide;
    constexpr int ROWS = Owned<Pixel>::ROWS;
    const bool first_lane = threadIdx.x % 32 == 0;
    for (int m = 0; m < masks; ++m) {
        u32 chosen = bits[m * THREADS + threadIdx.x];
        Narrow sum = 0, unused = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) add_chosen<false>(groups[r], chosen >> 8 * r, sum, unused);
        sum = warp_sum(sum);
        if (first_lane) cells[m] += static_cast<Wide>(sum);
    }
    for (int j = 0; j < regions; ++j) {
        u32 chosen = bits[(masks + j) * THREADS + threadIdx.x];
        Narrow all = 0;
        Wide sum_y = 0, sum_x = 0;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            Narrow sum = 0, moment = 0;
            add_chosen<true>(groups[r], chosen >> 8 * r, sum, moment);
            all += sum;
            sum_y += static_cast<Wide>(y[r]) * static_cast<Wide>(sum);
            sum_x += static_cast<Wide>(x[r]) * static_cast<Wide>(sum) + static_cast<Wide>(moment);
        }
        all = warp_sum(all);
        sum_y = sum_of_warp<Pixel>(sum_y);
        sum_x = sum_of_warp<Pixel>(sum_x);
        if (first_lane) {
            Wide* cell = cells + masks + 3 * j;
            cell[0] += static_cast<Wide>(all);
            cell[1] += sum_y;
            cell[2] += sum_x;
        }
    }
}

// frames      pixels of frame f begin at pixels[starts[f]]; every row of it at a multiple of ALIGN bytes
// per_block   frames of a block; at most 2^15, so that 32 bits hold sums of 16-bit pixels over them
// mask_bytes  (masks + regions, height * groups per row): bit k of a byte chooses pixel k of a group
// columns     (frames, masks + 3 * regions), added to
// total, maximum  (height * width), added to and raised; not used unless IMAGES
template <typename Pixel, int ALIGN, bool IMAGES>
__global__ void __launch_bounds__(THREADS, ALIGN < 8 ? 1 : IMAGES ? 2 : 3)
    all_sums(const Pixel* pixels, const i64* starts, int frames, int per_block, int height, int width,
             const u8* mask_bytes, int masks, int regions, typename Adds<Pixel>::Wide* columns,
             typename Adds<Pixel>::Wide* total, typename Largest<Pixel>::Type* maximum) {
    typedef typename Adds<Pixel>::Narrow Narrow;
    typedef typename Adds<Pixel>::Wide Wide;
    constexpr int ROWS = Owned<Pixel>::ROWS;
    const int thread = threadIdx.x, warp = thread / 32;
    const int width_groups = (width + GROUP - 1) / GROUP, all_groups = height * width_groups;
    const int first = blockIdx.y * per_block, count = min(per_block, frames - first);
    const int width_columns = masks + 3 * regions;

    // sums per (frame, warp, column), then the mask bits of this strip, per (mask or region, thread)
    DYNAMIC_SHARED(Wide, cells);
    u32* bits = reinterpret_cast<u32*>(cells + count * WARPS * width_columns);
    for (int k = thread; k < count * WARPS * width_columns; k += THREADS) cells[k] = 0;

    for (int strip = blockIdx.x; strip * THREADS * ROWS < all_groups; strip += gridDim.x) {
        i32 y[ROWS], x[ROWS], inside[ROWS];
        Group<Pixel> largest[ROWS];
        Narrow sums[IMAGES ? ROWS : 1][GROUP];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int group = (strip * ROWS + r) * THREADS + thread;
            y[r] = group / width_groups;
            x[r] = group % width_groups * GROUP;
            inside[r] = group < all_groups ? min(GROUP, width - x[r]) : 0;
        }
        u32 used = 0;
        for (int m = 0; m < masks + regions; ++m) {
            u32 chosen = 0;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                int group = (strip * ROWS + r) * THREADS + thread;
                if (group < all_groups) chosen |= static_cast<u32>(mask_bytes[m * all_groups + group]) << 8 * r;
            }
            bits[m * THREADS + thread] = chosen;
            used |= chosen;
        }
        if constexpr (!IMAGES) {
            // what no mask chooses isn't read
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                if (!(used >> 8 * r & 0xffu)) inside[r] = 0;
        }
        __syncthreads();

        Group<Pixel> next[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            next[r] = load_group<Pixel, ALIGN>(pixels + starts[first] + y[r] * width + x[r], inside[r]);
        if constexpr (IMAGES) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                largest[r] = next[r];
#pragma unroll
                for (int k = 0; k < GROUP; ++k) sums[r][k] = 0;
            }
        }
        for (int f = 0; f < count; ++f) {
            Group<Pixel> groups[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) groups[r] = next[r];
            // the next frame is on its way while this one is added up
            i64 start = starts[first + min(f + 1, count - 1)];
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                next[r] = load_group<Pixel, ALIGN>(pixels + start + y[r] * width + x[r], inside[r]);
            if constexpr (IMAGES) {
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    raise(largest[r], groups[r]);
#pragma unroll
                    for (int k = 0; k < GROUP; ++k) sums[r][k] += static_cast<Narrow>(groups[r][k]);
                }
            }
            add_columns(groups, bits, y, x, masks, regions, cells + (f * WARPS + warp) * width_columns);
        }
        if constexpr (IMAGES) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                typedef typename Largest<Pixel>::Type Most;
                i64 pixel = static_cast<i64>(y[r]) * width + x[r];
                // several are on their way before the first is compared
                constexpr int AT_ONCE = sizeof(Pixel) <= 2 ? GROUP : GROUP / 2;
#pragma unroll
                for (int begin = 0; begin < GROUP; begin += AT_ONCE) {
                    Most seen[AT_ONCE];
#pragma unroll
                    for (int k = 0; k < AT_ONCE; ++k)
                        seen[k] = begin + k < inside[r] ? maximum[pixel + begin + k] : Most(0);
#pragma unroll
                    for (int k = begin; k < begin + AT_ONCE; ++k)
                        if (k < inside[r]) {
                            add_to(total + pixel + k, static_cast<Wide>(sums[r][k]));
                            raise_to(maximum + pixel + k, seen[k - begin], static_cast<Most>(largest[r][k]));
                        }
                }
            }
        }
        __syncthreads();
    }

    for (int k = thread; k < count * width_columns; k += THREADS) {
        int f = k / width_columns, column = k % width_columns;
        Wide sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += cells[(f * WARPS + w) * width_columns + column];
        add_to(columns + static_cast<i64>(first + f) * width_columns + column, sum);
    }
}
