// Disks near the sites where they are expected: products with a kernel at whole shifts, then a paraboloid.
// gpuem/backends/cpu_guided.py tells what is found, and what is done where the kernel reaches over the frame's edge.
#include "types.cuh"
#include "warp.cuh"

constexpr int WARPS = 4;
// a site counts if this part of the kernel's positive weight lies on the frame when it is centred there
constexpr f64 LEAST_ON_FRAME = 0.5;
// neighbours of the maximum say nothing on how it stands out
constexpr f64 NEAR = 1.5;

// The kernel, and sums over all of it: positive part, its square, square.
struct Kernel {
    const f32* weights;
    int size;
    f64 positive, positive2, all2;
};

// A window as large as the kernel at all shifts. On the frame are its rows y0 to y1 and columns x0 to x1; nothing else
// is in memory.
struct Window {
    f32* values;
    int side, y0, y1, x0, x1;
};

// by a whole warp; row by row in single precision, rows in double precision, as below
__device__ Kernel summed(const f32* weights, int size) {
    f64 positive = 0, positive2 = 0, all2 = 0;
    for (int p = threadIdx.x % 32; p < size * size; p += 32) {
        const f64 w = weights[p], plus = fmax(w, 0.0);
        positive += plus;
        positive2 += plus * plus;
        all2 += w * w;
    }
    return {weights, size, warp_sum(positive), warp_sum(positive2), warp_sum(all2)};
}

// pixels of the frame in single precision, or log(1 + pixel - least pixel)
template <typename Pixel>
__device__ void cut(const Pixel* corner, int width, bool logarithm, const Window& window) {
    const int lane = threadIdx.x % 32;
    f32 least = __uint_as_float(0x7f800000u);
    for (int y = window.y0; y < window.y1; ++y)
        for (int x = window.x0 + lane; x < window.x1; x += 32) {
            const f32 value = static_cast<f32>(corner[static_cast<i64>(y) * width + x]);
            window.values[y * window.side + x] = value;
            least = fminf(least, value);
        }
    if (!logarithm) return;
    for (int step = 16; step; step /= 2) least = fminf(least, __shfl_xor_sync(0xffffffffu, least, step));
    // every lane its own pixels again
    for (int y = window.y0; y < window.y1; ++y)
        for (int x = window.x0 + lane; x < window.x1; x += 32) {
            f32& value = window.values[y * window.side + x];
            value = logf(value - least + 1.0f);
        }
}

// what of the kernel lies on the frame when it is shifted by (dy, dx)
struct Part {
    int y0, y1, x0, x1;
    __device__ __forceinline__ Part(const Kernel& kernel, const Window& window, int dy, int dx)
        : y0(max(0, window.y0 - dy)), y1(min(kernel.size, window.y1 - dy)), x0(max(0, window.x0 - dx)),
          x1(min(kernel.size, window.x1 - dx)) {}
};

// part of the kernel's positive weight that lies on the frame when it is centred on the site; by a whole warp
__device__ f64 on_frame(const Kernel& kernel, const Window& window, int search) {
    const Part part(kernel, window, search, search);
    f64 sum = 0;
    for (int y = part.y0; y < part.y1; ++y)
        for (int x = part.x0 + static_cast<int>(threadIdx.x % 32); x < part.x1; x += 32)
            sum += fmaxf(kernel.weights[y * kernel.size + x], 0.0f);
    return warp_sum(sum) / kernel.positive;
}

// the kernel's product with a window that lies on the frame
__device__ f64 product(const Kernel& kernel, const Window& window, int dy, int dx) {
    f64 total = 0;
    for (int y = 0; y < kernel.size; ++y) {
        const f32 *weights = kernel.weights + y * kernel.size, *values = window.values + (y + dy) * window.side + dx;
        f32 sum = 0;
        for (int x = 0; x < kernel.size; ++x) sum = fmaf(__ldg(weights + x), values[x], sum);
        total += static_cast<f64>(sum);
    }
    return total;
}

// The same with what of the kernel is on the frame: its negative part is scaled to balance the positive one, and the
// result divided by what is left of the norm of the positive one.
__device__ f64 balanced_product(const Kernel& kernel, const Window& window, int dy, int dx) {
    const Part part(kernel, window, dy, dx);
    f64 weight = 0, balance = 0, weight2 = 0, disk = 0, ring = 0;
    for (int y = part.y0; y < part.y1; ++y) {
        const f32 *weights = kernel.weights + y * kernel.size, *values = window.values + (y + dy) * window.side + dx;
        f32 plus = 0, minus = 0, plus2 = 0, in_disk = 0, in_ring = 0;
        for (int x = part.x0; x < part.x1; ++x) {
            const f32 p = fmaxf(__ldg(weights + x), 0.0f), m = fmaxf(-__ldg(weights + x), 0.0f);
            plus += p;
            minus += m;
            plus2 = fmaf(p, p, plus2);
            in_disk = fmaf(p, values[x], in_disk);
            in_ring = fmaf(m, values[x], in_ring);
        }
        weight += static_cast<f64>(plus);
        balance += static_cast<f64>(minus);
        weight2 += static_cast<f64>(plus2);
        disk += static_cast<f64>(in_disk);
        ring += static_cast<f64>(in_ring);
    }
    // without a ring there is no background to subtract: no disk either
    if (!(balance > 0 && weight > 0)) return 0;
    return (disk - ring * (weight / balance)) * sqrt(kernel.positive2 / weight2);
}

// 1 / norms of the kernel and of what it lies on, minus its mean: Pearson's correlation; 0 where nothing varies
__device__ f64 normalisation(const Kernel& kernel, const Window& window, int dy, int dx, f32 level) {
    const Part part(kernel, window, dy, dx);
    f64 total = 0, square = 0;
    int count = 0;
    for (int y = part.y0; y < part.y1; ++y) {
        const f32 *weights = kernel.weights + y * kernel.size, *values = window.values + (y + dy) * window.side + dx;
        f32 sum = 0, sum2 = 0;
        for (int x = part.x0; x < part.x1; ++x) {
            if (__ldg(weights + x) == 0.0f) continue;
            // differences from a pixel: squares of large counts would leave nothing of the differences
            const f32 value = values[x] - level;
            ++count;
            sum += value;
            sum2 = fmaf(value, value, sum2);
        }
        total += static_cast<f64>(sum);
        square += static_cast<f64>(sum2);
    }
    const f64 spread2 = square - total * total / max(count, 1);
    // what is left of two equal sums is rounding
    return spread2 > 1e-6 * square ? 1 / sqrt(spread2 * kernel.all2) : 0;
}

struct Found { f64 y, x, height, elevation; };

// maximum of the paraboloid of central differences of 3 x 3 values, in rows `shifts` apart: where from the middle, how
// much higher (as `height`)
__device__ __forceinline__ Found paraboloid(const f32* at, int shifts) {
    const f64 top = at[0], up = at[-shifts], down = at[shifts], left = at[-1], right = at[1];
    const f64 g_y = 0.5 * (down - up), g_x = 0.5 * (right - left);
    const f64 h_yy = down + up - 2 * top, h_xx = right + left - 2 * top;
    const f64 h_yx = 0.25 * (static_cast<f64>(at[shifts + 1]) - at[shifts - 1] - at[-shifts + 1] + at[-shifts - 1]);
    const f64 determinant = h_yy * h_xx - h_yx * h_yx;
    if (!(h_yy < 0 && determinant > 0)) return {0, 0, 0, 0};
    const f64 y = fmin(fmax((h_yx * g_x - h_xx * g_y) / determinant, -1.0), 1.0);
    const f64 x = fmin(fmax((h_yx * g_y - h_yy * g_x) / determinant, -1.0), 1.0);
    return {y, x, g_y * y + g_x * x + 0.5 * (h_yy * y * y + h_xx * x * x) + h_yx * y * x, 0};
}

// position of the maximum in the map of shifts, its height, its elevation; by a whole warp
__device__ Found evaluate(const f32* found, int shifts) {
    const int lane = threadIdx.x % 32, none = shifts * shifts;
    // of equal ones the first
    f32 height = 0;
    int at = none;
    for (int s = lane; s < shifts * shifts; s += 32)
        if (at == none || found[s] > height) height = found[s], at = s;
    for (int step = 16; step; step /= 2) {
        const f32 other = __shfl_xor_sync(0xffffffffu, height, step);
        const int where = __shfl_xor_sync(0xffffffffu, at, step);
        if (where != none && (at == none || other > height || (other == height && where < at))) height = other, at = where;
    }
    const int y = at / shifts, x = at % shifts;
    Found best = {static_cast<f64>(y), static_cast<f64>(x), static_cast<f64>(height), 0};
    if (y == 0 || x == 0 || y == shifts - 1 || x == shifts - 1) return best;
    f64 elevation = __longlong_as_double(0x7ff0000000000000LL);
    for (int s = lane; s < shifts * shifts; s += 32) {
        const int dy = s / shifts - y, dx = s % shifts - x;
        const f64 distance = sqrt(static_cast<f64>(dy * dy + dx * dx));
        if (distance >= NEAR) elevation = fmin(elevation, (best.height - found[s]) / distance);
    }
    for (int step = 16; step; step /= 2) elevation = fmin(elevation, __shfl_xor_sync(0xffffffffu, elevation, step));
    const Found more = paraboloid(found + at, shifts);
    // infinite where nothing is far enough
    best.elevation = elevation < __longlong_as_double(0x7ff0000000000000LL) ? fmax(elevation, 0.0) : 0.0;
    best.y += more.y;
    best.x += more.x;
    best.height += more.height;
    return best;
}

// pixels, starts  frame f begins at pixels[starts[f]]
// sites           (count, 2) expected positions (y, x); may lie off the frame or be NaN
// weights         (size, size), size odd
// search          shifts up to this many pixels along each axis
// scratch         (frames, 4 warps, side^2 + shifts^2), side = size + 2 search, shifts = 2 search + 1
// out             (frames, count, 4): y, x, height, elevation
// grid            (frames), 128 threads: a warp for every fourth site
template <typename Pixel>
__global__ void __launch_bounds__(32 * WARPS, 6)
    guided(const Pixel* pixels, const i64* starts, int height, int width, const f64* sites, int count,
           const f32* weights, int size, int search, int normalised, int logarithm, f32* scratch, f32* out) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = size + 2 * search, shifts = 2 * search + 1;
    const Pixel* frame = pixels + starts[blockIdx.x];
    const Kernel kernel = summed(weights, size);
    f32* values = scratch + (static_cast<i64>(blockIdx.x) * WARPS + warp) * (side * side + shifts * shifts);
    f32* found = values + side * side;
    for (int k = warp; k < count; k += WARPS) {
        const f64 y = sites[2 * k], x = sites[2 * k + 1];
        f32* to = out + (static_cast<i64>(blockIdx.x) * count + k) * 4;
        Found best = {0, 0, 0, 0};
        // written so that NaN is refused as well
        bool there = y >= -0.5 && y < height - 0.5 && x >= -0.5 && x < width - 0.5;
        if (there) {
            const int top = static_cast<int>(floor(y + 0.5)) - size / 2 - search;
            const int left = static_cast<int>(floor(x + 0.5)) - size / 2 - search;
            const Window window = {values, side, max(-top, 0), min(height - top, side), max(-left, 0), min(width - left, side)};
            const bool inside = window.y0 == 0 && window.x0 == 0 && window.y1 == side && window.x1 == side;
            there = inside || !(on_frame(kernel, window, search) < LEAST_ON_FRAME);
            if (there) {
                // what other lanes still read of the site before
                __syncwarp();
                cut(frame + static_cast<i64>(top) * width + left, width, logarithm, window);
                __syncwarp();
                for (int s = lane; s < shifts * shifts; s += 32) {
                    const int dy = s / shifts, dx = s % shifts;
                    f64 value = inside ? product(kernel, window, dy, dx) : balanced_product(kernel, window, dy, dx);
                    if (normalised) value *= normalisation(kernel, window, dy, dx, values[side / 2 * side + side / 2]);
                    found[s] = static_cast<f32>(value);
                }
                __syncwarp();
                best = evaluate(found, shifts);
                best.y += top + size / 2;
                best.x += left + size / 2;
            }
        }
        if (lane == 0) {
            const f32 nothing = __uint_as_float(0x7fc00000u);
            to[0] = there ? static_cast<f32>(best.y) : nothing;
            to[1] = there ? static_cast<f32>(best.x) : nothing;
            to[2] = there ? static_cast<f32>(best.height) : nothing;
            to[3] = there ? static_cast<f32>(best.elevation) : nothing;
        }
    }
}
