// A lattice fitted to all pixels of all its disks at once, in every frame: sums over windows in single precision,
// small systems in double precision. gpuem/backends/lattice_fit.py tells the model.
#include "types.cuh"
#include "warp.cuh"
#include "lattice.cuh"

constexpr int WARPS = 4;

// A frame, and which of its pixels count.
template <typename Pixel> struct Image {
    const Pixel* pixels;
    const f32* good;
    int height, width;
    f32 saturation;
};

// A probe in (phases + 1)^2 phases at the `size` pixels of a window, and where no other disk reaches; `shading` may be
// null.
struct Probe {
    const f32 *planes, *window, *shading;
    const i32* places;
    int size, phases;
};

// what is known of a disk before the step, and how its pixels are weighed
struct Known { f32 level, ground, gain, floor, inside; };

// From 32 numbers of every lane to the sum of the lane-th of them over the warp, in a fixed order.
template <int HALF> __device__ __forceinline__ f32 transposed_sums(f32 (&values)[32]) {
    const bool other = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const f32 send = other ? values[i] : values[i + HALF], keep = other ? values[i + HALF] : values[i];
        values[i] = keep + __shfl_xor_sync(0xffffffffu, send, HALF);
    }
    if constexpr (HALF > 1) return transposed_sums<HALF / 2>(values);
    return values[0];
}

// The sums of a window (see `SUMS`) around a disk at (y, x), the lane-th of them; by a whole warp.
template <typename Pixel>
__device__ __forceinline__ f32 window_sums(const Image<Pixel>& image, const Probe& probe, f64 y, f64 x,
                                           const Known& known, f32 scale) {
    // the same window on every device, where rounding puts a place on this or that side of a whole pixel
    const int top = static_cast<int>(floor(y + 1e-6)), left = static_cast<int>(floor(x + 1e-6)), phases = probe.phases;
    const f64 fine_y = (y - top) * phases, fine_x = (x - left) * phases;
    const int at_y = min(static_cast<int>(fine_y), phases - 1), at_x = min(static_cast<int>(fine_x), phases - 1);
    // fractions of a phase, of a pixel
    const f32 u = static_cast<f32>(fine_y - at_y), v = static_cast<f32>(fine_x - at_x);
    const f32 sub_y = static_cast<f32>(y - top), sub_x = static_cast<f32>(x - left), steps = static_cast<f32>(phases);
    const f32* plane = probe.planes + static_cast<i64>(at_y * (phases + 1) + at_x) * probe.size;
    const f32* next = plane + static_cast<i64>(phases + 1) * probe.size;
    f32 sums[32];
#pragma unroll
    for (int s = 0; s < 32; ++s) sums[s] = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < probe.size; i += 32) {
        const int dy = __ldg(probe.places + i), dx = __ldg(probe.places + probe.size + i);
        const int row = top + dy, column = left + dx;
        f32 value = 0, mask = 0;
        if (row >= 0 && column >= 0 && row < image.height && column < image.width) {
            const int at = row * image.width + column;
            value = static_cast<f32>(__ldg(image.pixels + at));
            const bool counts = value < image.saturation && !(image.good && !(__ldg(image.good + at) > 0));
            mask = counts ? __ldg(probe.window + i) : 0.0f;
            value = counts ? value : 0.0f;
        }
        const f32 a = __ldg(plane + i), ab = __ldg(plane + probe.size + i) - a;
        const f32 c = __ldg(next + i), cd = __ldg(next + probe.size + i) - c;
        const f32 above = fmaf(v, ab, a), down = fmaf(v, cd, c) - above;
        f32 t = fmaf(u, down, above), p = down * steps, q = fmaf(u, cd - ab, ab) * steps;
        // the disk moves one way, what lies under a fixed pixel the other
        if (probe.shading) {
            // at this pixel and the ones before it; the window's pixel lies sub_y, sub_x before the place of its factor
            const f32* shading = probe.shading + i;
            const f32 g = __ldg(shading + probe.size), k = __ldg(shading + 3 * probe.size);
            const f32 ge = __ldg(shading) - g, kh = __ldg(shading + 2 * probe.size) - k;
            const f32 far = fmaf(sub_x, kh, k), nearer = fmaf(sub_x, ge, g) - far, factor = fmaf(sub_y, nearer, far);
            p = fmaf(p, factor, t * nearer);
            q = fmaf(q, factor, t * fmaf(sub_y, ge - kh, kh));
            t *= factor;
        }
        const f32 lit = known.level * t, mu = lit + known.ground, rest = value - mu;
        const f32 w = __fdividef(mask, fmaf(known.inside * lit, lit, fmaf(known.gain, mu, known.floor)));
        const f32 columns[6] = {1, t * (dy - sub_y) * scale, t * (dx - sub_x) * scale, t, p, q};
#pragma unroll
        for (int r = 0; r < 6; ++r) {
            const f32 weighed = w * columns[r];
#pragma unroll
            for (int s = r; s < 6; ++s) sums[upper(r, s)] = fmaf(weighed, columns[s], sums[upper(r, s)]);
            sums[MATRIX + r] = fmaf(weighed, rest, sums[MATRIX + r]);
        }
        sums[27] = fmaf(w * rest, rest, sums[27]);
        sums[28] += mask;
    }
    return transposed_sums<16>(sums);
}

// Sums of all windows of the lattice; warps take disks in turn.
template <typename Pixel>
__device__ __forceinline__ void look(const Image<Pixel>& image, const Probe& probe, const Disks& disks,
                                     const f64* theta, const f64* numbers, bool first) {
    const int lane = threadIdx.x % 32;
    const f32 scale = static_cast<f32>(1 / numbers[RADIUS]);
    for (int k = threadIdx.x / 32; k < disks.count; k += WARPS) {
        const f64 y = disks.place(theta, 0, k), x = disks.place(theta, 1, k);
        f32 sum = 0;
        // not a number compares false
        if (y >= -1 && y <= image.height && x >= -1 && x <= image.width) {
            const f32 level = static_cast<f32>(disks.at(LEVEL, k)), ground = static_cast<f32>(disks.at(GROUND, k));
            const f64* prior = disks.priors + PRIORS * k;
            Known known = {level, ground, static_cast<f32>(numbers[GAIN]),
                           fmaf(static_cast<f32>(prior[MODEL_ERROR]) * level, level, static_cast<f32>(numbers[READ])),
                           static_cast<f32>(prior[INSIDE_ERROR])};
            // nothing is known yet: all pixels count alike
            if (first) known.gain = 0, known.floor = 1, known.inside = 0;
            Probe own = probe;
            if (own.shading) own.shading += static_cast<i64>(k) * 4 * probe.size;
            sum = window_sums(image, own, y, x, known, scale);
        }
        if (lane < SUMS) disks.sums[SUMS * k + lane] = sum;
    }
}

// pixels, starts   frame f begins at pixels[starts[f]]
// positions        (frames) flat scan positions
// probe, window, shading, places       ((16 + 1)^2, size), (size), (sites, 4, size), (2, size)
// coarse, coarse_window, coarse_places the same of the blurred probe
// sites, priors    (sites, 2), (sites, PRIORS): those of lattice g are first[g] to first[g + 1]
// theta            (lattices, 6) where to start, for scan position (0, 0); drift (2, 2) per scan position
// good             (height, width) or null
// most             sites of the largest lattice
// scratch          null: shared memory holds `most` times (8 NOTED + 4 SUMS) bytes; else (blocks, so much)
// out              (frames, COLUMNS)
// grid             blocks that take frames in turn, 128 threads
template <typename Pixel>
__global__ void __launch_bounds__(32 * WARPS, 4)
    lattice_fit(const Pixel* pixels, const i64* starts, const i64* positions, int frames, int height, int width,
                const f32* probe, const f32* window, const f32* shading, const i32* places, int size, int phases,
                const f32* coarse, const f32* coarse_window, const i32* coarse_places, int coarse_size,
                int coarse_phases, const f64* sites, const i64* first, const f64* priors, const f64* theta,
                int lattices, const f64* drift, i64 scan_width, const f32* good, const f64* axes, const f64* numbers,
                int blurred_steps, int sharp_steps, int most, f64* scratch, f32* out) {
    DYNAMIC_SHARED(f64, shared);
    __shared__ Lattice lattice;
    constexpr int NUMBERS = NOTED + (SUMS + 1) / 2;
    f64* noted = scratch ? scratch + static_cast<i64>(blockIdx.x) * most * NUMBERS : shared;
    f32* sums = reinterpret_cast<f32*>(noted + static_cast<i64>(most) * NOTED);
    for (int f = blockIdx.x; f < frames; f += gridDim.x) {
        const Image<Pixel> image = {pixels + starts[f], good, height, width, static_cast<f32>(numbers[SATURATION])};
        for (int g = 0; g < lattices; ++g) {
            const i64 begin = first[g];
            const int count = static_cast<int>(first[g + 1] - begin);
            const Disks disks = {noted, sums, sites + 2 * begin, priors + PRIORS * begin, count};
            if (threadIdx.x < 6) {
                const int axis = threadIdx.x;
                const i64 y = positions[f] / scan_width, x = positions[f] % scan_width;
                f64 value = theta[6 * g + axis];
                if (axis < 2) value += drift[2 * axis] * y + drift[2 * axis + 1] * x;
                lattice.theta[axis] = lattice.start[axis] = value;
            }
            if (threadIdx.x == 0) lattice.fits = 0, lattice.moved = 0;
            for (int k = threadIdx.x; k < disks.count; k += 32 * WARPS)
                for (int column = 0; column < NOTED; ++column) disks.at(column, k) = 0;
            __syncthreads();
            for (int step = 0; step < 2 * (blurred_steps + sharp_steps); ++step) {
                // this and all that the loop depends on is the same for all threads of the block
                const bool blurred = step < blurred_steps || (step < blurred_steps + AGAIN && lattice.moved > FAR);
                // member by member: a choice between two structures would put both into memory
                const Probe now = {blurred ? coarse : probe, blurred ? coarse_window : window,
                                   blurred ? nullptr : shading + begin * 4 * size, blurred ? coarse_places : places,
                                   blurred ? coarse_size : size, blurred ? coarse_phases : phases};
                look(image, now, disks, lattice.theta, numbers, step == 0);
                __syncthreads();
                for (int k = threadIdx.x; k < disks.count; k += 32 * WARPS) eliminate(disks, k, numbers, step == 0);
                __syncthreads();
                if (threadIdx.x < 32) lattice_step(disks, lattice, numbers, blurred);
                __syncthreads();
                if (!lattice.fits) break;
                if (step + 1 >= blurred_steps + sharp_steps && lattice.moved <= NEAR * numbers[CONVERGED]) break;
            }
            if (threadIdx.x < 32) conclude(disks, lattice, numbers, axes, g, out + static_cast<i64>(f) * COLUMNS);
            // what the next lattice overwrites
            __syncthreads();
        }
    }
}
