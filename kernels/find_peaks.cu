// Peaks of the correlation of whole frames with a kernel: frames without their mean, transforms times that of the
// kernel, then maxima, filters and places between the pixels. gpuem/backends/peaks.py tells what they mean.
//
// A frame's peaks are the same whatever else is in the block, and in the same order: candidates are gathered in any
// order, but every one has a key of its own, its height above its place.
#include "types.cuh"
#include "warp.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
// steps on the fine grid until the climb is given up, in pixels
constexpr int MOST_STEPS = 3;
// rows that a warp takes at once, so that a weight is loaded once for all of them
constexpr int ROWS = 4;

// pixels, starts  frame f begins at pixels[starts[f]]
// out             (frames, size): pixels minus their mean; counted from the first pixel on, so that a constant frame
//                 becomes exactly nothing
// grid            (frames), 256 threads
template <typename Pixel>
__global__ void __launch_bounds__(THREADS) level_frames(const Pixel* pixels, const i64* starts, int size, f32* out) {
    __shared__ f64 sums[WARPS];
    const Pixel* frame = pixels + starts[blockIdx.x];
    const f64 first = static_cast<f64>(frame[0]);
    f64 sum = 0;
    for (int p = threadIdx.x; p < size; p += THREADS) sum += static_cast<f64>(frame[p]) - first;
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    f64 total = 0;
    for (int w = 0; w < WARPS; ++w) total += sums[w];
    const f64 level = first + total / size;
    f32* to = out + static_cast<i64>(blockIdx.x) * size;
    for (int p = threadIdx.x; p < size; p += THREADS) to[p] = static_cast<f32>(static_cast<f64>(frame[p]) - level);
}

// spectra    (frames, size) in place: m |m|^(power - 1) with m = spectrum of the frame times `kernel`, smoothed, scaled
// kernel     (size) conjugate spectrum of the kernel
// smoothing  (size)
// grid       (frames, parts of a spectrum), 256 threads; HYBRID: the power isn't 1
template <bool HYBRID>
__global__ void __launch_bounds__(THREADS)
    multiply_spectra(float2* spectra, const float2* kernel, const f32* smoothing, int size, f32 power, f32 scale) {
    float2* spectrum = spectra + static_cast<i64>(blockIdx.x) * size;
    const f32 half = (power - 1.0f) * 0.5f;
    for (int p = blockIdx.y * THREADS + threadIdx.x; p < size; p += gridDim.y * THREADS) {
        const float2 a = spectrum[p], b = kernel[p];
        float2 m = make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
        f32 factor = smoothing[p];
        if (HYBRID) {
            const f32 size2 = m.x * m.x + m.y * m.y;
            // nothing stays nothing, also where a small power makes large numbers of small ones
            if (size2 > 0.0f) factor *= powf(size2, half);
            else m = make_float2(0.0f, 0.0f);
        }
        factor *= scale;
        spectrum[p] = make_float2(m.x * factor, m.y * factor);
    }
}

// what every thread of the block gives; two barriers, the second so that `parts` can be used again
__device__ __forceinline__ u64 block_max(u64 value, u64* parts) {
    for (int distance = 16; distance; distance /= 2) {
        const u64 other = __shfl_xor_sync(0xffffffffu, value, distance);
        value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) value = parts[w] > value ? parts[w] : value;
    __syncthreads();
    return value;
}

__device__ __forceinline__ u32 block_sum(u32 value, u64* parts) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    u32 total = 0;
    for (int w = 0; w < WARPS; ++w) total += static_cast<u32>(parts[w]);
    __syncthreads();
    return total;
}

// Heights above zero are ordered as their bits are; of equal ones the first in the order of pixels is the largest key.
__device__ __forceinline__ u64 key_of(f32 height, u32 place) {
    return static_cast<u64>(__float_as_uint(height)) << 32 | (0xffffffffu - place);
}
__device__ __forceinline__ f32 height_of(u64 key) { return __uint_as_float(static_cast<u32>(key >> 32)); }
__device__ __forceinline__ int place_of(u64 key) { return static_cast<int>(0xffffffffu - static_cast<u32>(key)); }

// higher than the neighbours before it in the order of pixels, not lower than those after it, as far as there are any
__device__ __forceinline__ bool is_maximum(const f32* image, int height, int width, int y, int x, f32 above) {
    const f32* row = image + static_cast<i64>(y) * width;
    const f32 v = row[x];
    if (!(v > above) || (x > 0 && !(v > row[x - 1])) || (x < width - 1 && !(v >= row[x + 1]))) return false;
    const int left = max(x - 1, 0), right = min(x + 1, width - 1);
    const f32 *up = row - width, *down = row + width;
    if (y > 0 && !(v > up[left] && v > up[x] && v > up[right])) return false;
    return y == height - 1 || (v >= down[left] && v >= down[x] && v >= down[right]);
}

// The n-th largest height, 0 < n <= found: bit by bit the largest number that n heights reach.
__device__ f32 nth_height(const u64* keys, int found, int n, u64* parts) {
    u32 bits = 0;
    for (int bit = 30; bit >= 0; --bit) {
        const u32 tried = bits | 1u << bit;
        u32 reaching = 0;
        for (int i = threadIdx.x; i < found; i += THREADS) reaching += static_cast<u32>(keys[i] >> 32) >= tried;
        if (block_sum(reaching, parts) >= static_cast<u32>(n)) bits = tried;
    }
    return __uint_as_float(bits);
}

struct Peak { f64 y, x, height; };
struct Vertex { f64 shift, more; };

// where a parabola through three points has its maximum, from the middle one, and how much higher it is there
__device__ __forceinline__ Vertex vertex(f64 before, f64 at, f64 after) {
    const f64 slope = 0.5 * (after - before), bend = 2.0 * at - before - after;
    if (!(bend > 0.0)) return {0.0, 0.0};
    const f64 shift = fmin(fmax(slope / bend, -0.5), 0.5);
    return {shift, slope * shift - 0.5 * bend * shift * shift};
}

// a parabola along each axis; on the border the pixel itself, along the axis that ends there
__device__ __forceinline__ Peak parabolas(const f32* image, int height, int width, int y, int x) {
    const f32* at = image + static_cast<i64>(y) * width + x;
    Peak peak = {static_cast<f64>(y), static_cast<f64>(x), static_cast<f64>(*at)};
    if (y > 0 && y < height - 1) {
        const Vertex found = vertex(at[-width], at[0], at[width]);
        peak.y += found.shift;
        peak.height += found.more;
    }
    if (x > 0 && x < width - 1) {
        const Vertex found = vertex(at[-1], at[0], at[1]);
        peak.x += found.shift;
        peak.height += found.more;
    }
    return peak;
}

// Weights of all n pixels of a periodic row in the value at a place between them, but for a factor, which is returned:
// sin(pi d) / (n sin(pi d / n)) for odd n, cos(pi d / n) times that for even n. By a whole warp.
__device__ f64 between(f64 at, int n, f32* out) {
    const f64 whole = floor(at + 0.5), rest = at - whole;
    const int lane = threadIdx.x % 32;
    int nearest = static_cast<int>(static_cast<i64>(whole) % n);
    if (nearest < 0) nearest += n;
    const bool exact = fabs(rest) < 1e-9;
    const f64 step = 1.0 / n;
    for (int p = lane; p < n; p += 32) {
        // by the shorter way around: the argument of the sine stays small, the sign is the same
        int d = p - nearest;
        if (2 * d > n) d -= n;
        if (2 * d < -n) d += n;
        f32 weight = d == 0 ? 1.0f : 0.0f;
        if (!exact) {
            const f32 turn = static_cast<f32>((rest - d) * step);
            weight = (n % 2 == 0 ? cospif(turn) : 1.0f) / sinpif(turn);
            if (d % 2 != 0) weight = -weight;
        }
        out[p] = weight;
    }
    return exact ? 1.0 : sinpi(rest) * step;
}

// The correlation along three columns between the pixels, at the pixels' rows; columns (3, height). By a whole warp.
__device__ void three_columns(const f32* image, int height, int width, const f32* weights, const f64 (&scale)[3],
                              f32* columns) {
    const int lane = threadIdx.x % 32;
    for (int y = 0; y < height; y += ROWS) {
        f32 sums[ROWS][3] = {};
        const f32* row[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) row[r] = image + static_cast<i64>(min(y + r, height - 1)) * width;
        for (int x = lane; x < width; x += 32) {
            f32 weight[3];
#pragma unroll
            for (int k = 0; k < 3; ++k) weight[k] = weights[k * width + x];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const f32 value = row[r][x];
#pragma unroll
                for (int k = 0; k < 3; ++k) sums[r][k] = fmaf(value, weight[k], sums[r][k]);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                const f32 sum = warp_sum(sums[r][k]);
                if (lane == 0 && y + r < height) columns[k * height + y + r] = static_cast<f32>(scale[k] * sum);
            }
    }
}

// Nearest maximum of the correlation upsampled by `factor`, from `start`; that itself where none is near. By a whole
// warp, all of whose lanes come to the same. scratch: 3 width + 6 height floats.
__device__ Peak climb(const f32* image, int height, int width, const Peak& start, int factor, f32* scratch) {
    f32 *along_x = scratch, *along_y = along_x + 3 * width, *columns = along_y + 3 * height;
    const int y0 = static_cast<int>(floor(start.y * factor + 0.5)), x0 = static_cast<int>(floor(start.x * factor + 0.5));
    const int lane = threadIdx.x % 32, reach = MOST_STEPS * factor;
    int fy = y0, fx = x0, known = x0 - 1;
    while (abs(fy - y0) < reach && abs(fx - x0) < reach) {
        f64 scale[3];
        if (fx != known) {
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 3; ++k) scale[k] = between(static_cast<f64>(fx - 1 + k) / factor, width, along_x + k * width);
            __syncwarp();
            three_columns(image, height, width, along_x, scale, columns);
            known = fx;
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 3; ++k) scale[k] = between(static_cast<f64>(fy - 1 + k) / factor, height, along_y + k * height);
        __syncwarp();
        f64 grid[3][3] = {};
        for (int y = lane; y < height; y += 32)
#pragma unroll
            for (int j = 0; j < 3; ++j)
#pragma unroll
                for (int k = 0; k < 3; ++k)
                    grid[j][k] += static_cast<f64>(along_y[j * height + y]) * static_cast<f64>(columns[k * height + y]);
#pragma unroll
        for (int j = 0; j < 3; ++j)
#pragma unroll
            for (int k = 0; k < 3; ++k) grid[j][k] = warp_sum(grid[j][k]) * scale[j];
        f64 best = grid[1][1];
        int step_y = 0, step_x = 0;
#pragma unroll
        for (int j = 0; j < 3; ++j)
#pragma unroll
            for (int k = 0; k < 3; ++k)
                if (grid[j][k] > best) best = grid[j][k], step_y = j - 1, step_x = k - 1;
        if (step_y == 0 && step_x == 0) {
            const Vertex y = vertex(grid[0][1], grid[1][1], grid[2][1]), x = vertex(grid[1][0], grid[1][1], grid[1][2]);
            return {(fy + y.shift) / factor, (fx + x.shift) / factor, grid[1][1] + y.more + x.more};
        }
        fy += step_y;
        fx += step_x;
    }
    return start;
}

// Takes out the brightest of `found` keys again and again, and with each all that are nearer than `spacing`, until
// `most` are taken or those left are lower than `least`: (y, x, height) in `kept`. How many.
__device__ int brightest(u64* keys, int found, int width, f64 spacing, int most, f32 least, f32* kept, u64* parts) {
    u64 last = 0;
    int count = 0;
    for (; count < most; ++count) {
        const int y = place_of(last) / width, x = place_of(last) % width;
        u64 best = 0;
        for (int i = threadIdx.x; i < found; i += THREADS) {
            const u64 key = keys[i];
            if (key == 0) continue;
            if (last != 0) {
                const i64 dy = place_of(key) / width - y, dx = place_of(key) % width - x;
                if (key == last || static_cast<f64>(dy * dy + dx * dx) < spacing * spacing) {
                    keys[i] = 0;
                    continue;
                }
            }
            best = key > best ? key : best;
        }
        best = block_max(best, parts);
        if (best == 0 || !(height_of(best) >= least)) break;
        if (threadIdx.x == 0) {
            kept[3 * count] = static_cast<f32>(place_of(best) / width);
            kept[3 * count + 1] = static_cast<f32>(place_of(best) % width);
            kept[3 * count + 2] = height_of(best);
        }
        last = best;
    }
    return count;
}

// images      (frames, height, width)
// edge        maxima whose pixel is nearer than this to the border pixels are left out
// above       heights begin above this, which is at least 0
// part, nth   least height as a part of the nth-largest height
// spacing     least distance from a brighter maximum
// most        peaks that are kept
// factor      0: pixels; 1: parabolas; more, with UPSAMPLE: points per pixel of the upsampled grid
// candidates  (frames, room): room for every second pixel of every second row, rounded up
// scratch     (frames, pitch): 3 floats for each of min(most, room) peaks; with UPSAMPLE then 8 (3 width + 6 height)
// out         (frames, 1 + 3 most): number of peaks, then (y, x, height), the brightest first; NaN where there are fewer
// grid        (frames), 256 threads
template <bool UPSAMPLE>
__global__ void __launch_bounds__(THREADS, 2)
    find_peaks(const f32* images, int height, int width, int edge, f32 above, f32 part, int nth, f64 spacing, int most,
               int factor, u64* candidates, f32* scratch, i64 pitch, f32* out) {
    __shared__ u64 parts[WARPS];
    __shared__ int found;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int room = ((height + 1) / 2) * ((width + 1) / 2);
    const f32* image = images + static_cast<i64>(blockIdx.x) * height * width;
    u64* keys = candidates + static_cast<i64>(blockIdx.x) * room;
    f32 *kept = scratch + blockIdx.x * pitch, *row = out + static_cast<i64>(blockIdx.x) * (1 + 3LL * most);
    if (threadIdx.x == 0) found = 0;
    for (i64 c = 1 + threadIdx.x; c < 1 + 3LL * most; c += THREADS) row[c] = __uint_as_float(0x7fc00000u);
    __syncthreads();
    for (int y = edge + warp; y < height - edge; y += WARPS)
        for (int x = edge + lane; x < width - edge; x += 32)
            if (is_maximum(image, height, width, y, x, above))
                keys[atomicAdd(&found, 1)] = key_of(image[static_cast<i64>(y) * width + x], y * width + x);
    __syncthreads();
    const int all = found;
    f32 least = 0.0f;
    if (all > 0 && part > 0.0f) least = part * nth_height(keys, all, min(nth, all), parts);
    const int count = brightest(keys, all, width, spacing, most, least, kept, parts);
    __syncthreads();
    if (factor > 0) {
        f32* own = kept + 3LL * min(most, room) + static_cast<i64>(warp) * (3LL * width + 6LL * height);
        for (int j = warp; j < count; j += WARPS) {
            Peak peak = parabolas(image, height, width, static_cast<int>(kept[3 * j]), static_cast<int>(kept[3 * j + 1]));
            if (UPSAMPLE) peak = climb(image, height, width, peak, factor, own);
            __syncwarp();
            if (lane == 0) {
                kept[3 * j] = static_cast<f32>(peak.y);
                kept[3 * j + 1] = static_cast<f32>(peak.x);
                kept[3 * j + 2] = static_cast<f32>(peak.height);
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) row[0] = static_cast<f32>(count);
    // the brightest first again: between the pixels a peak may be higher than another
    for (int j = threadIdx.x; j < count; j += THREADS) {
        const f32 own = kept[3 * j + 2];
        int rank = 0;
        for (int i = 0; i < count; ++i) rank += kept[3 * i + 2] > own || (kept[3 * i + 2] == own && i < j);
        for (int c = 0; c < 3; ++c) row[1 + 3LL * rank + c] = kept[3 * j + c];
    }
}
