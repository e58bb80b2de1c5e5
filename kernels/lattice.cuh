// The small systems of a lattice fit, in double precision: a disk's nuisances by a thread, the lattice by a warp.
// gpuem/backends/lattice_fit.py tells what is computed, cpu_lattice.py does the same in the same order of decisions.
#include "types.cuh"
#include "warp.cuh"

// disks that lie so many standard deviations off their lattice pull no harder than at that distance
constexpr f64 HUBER = 3;
// a disk counts as found where its intensity is so many standard deviations above nothing
constexpr f64 FOUND = 3;
// a step moves no disk by more than this, in radii
constexpr f64 LONGEST = 0.5;
// after a longer step, in px, the blurred probe is used once more, so often at most
constexpr f64 FAR = 1;
constexpr int AGAIN = 2;
// a fit goes on until its steps are this part of what counts as converged
constexpr f64 NEAR = 0.1;

// what is noted of every disk; PULL_*: its part in the system of the lattice
enum Noted {
    LEVEL, GROUND, INFO_YY, INFO_YX, INFO_XX, SCORE_Y, SCORE_X, ROBUST, LEVEL_VARIANCE, MISFIT, CHI2, PIXELS,
    PULL_YY, PULL_YX, PULL_XX, PULL_Y, PULL_X, NOTED
};
// sums over a disk's window: upper triangle of the products of background, gradient y and x, intensity, place y and x,
// row by row; their products with what is left of the pixels; its square; number of pixels
constexpr int MATRIX = 21, SUMS = 29;
// columns of the priors, numbers of a fit, and what is found: as in lattice_fit.py
enum Priors { MODEL_ERROR, GRADIENT, BACKGROUND, BACKGROUND_PRECISION, OFFSET, INSIDE_ERROR, PRIORS };
enum Numbers { GAIN, READ, SATURATION, RADIUS, LEAST_DISKS, CONVERGED, START_INFORMATION };
constexpr int COLUMNS = 14;

__device__ __forceinline__ f64 nothing() { return __longlong_as_double(0x7ff8000000000000LL); }
__device__ __forceinline__ f64 infinity() { return __longlong_as_double(0x7ff0000000000000LL); }

// The disks of one lattice; column by column, so that neighbouring threads read neighbouring numbers.
struct Disks {
    f64* noted;
    f32* sums;
    const f64 *sites, *priors;
    int count;

    __device__ __forceinline__ f64& at(int column, int k) const { return noted[column * count + k]; }
    __device__ __forceinline__ bool known(int k) const { return at(INFO_YY, k) + at(INFO_XX, k) > 0; }
    // of (1, h, k)
    __device__ __forceinline__ f64 order(int part, int k) const { return part ? sites[2 * k + part - 1] : 1; }
    // c + h a + k b
    __device__ __forceinline__ f64 place(const f64* lattice, int axis, int k) const {
        return fma(order(2, k), lattice[4 + axis], fma(order(1, k), lattice[2 + axis], lattice[axis]));
    }
};

// A lattice while it is fitted; what a block shares of it.
struct Lattice {
    f64 theta[6], start[6];
    // lower triangle row by row, after `solve` its Cholesky factor; right-hand side, after it the step
    f64 normal[MATRIX], step[6];
    f64 inverse[6][6];
    // how far the step would move a disk; how much the disks of the lattice that was kept explain
    f64 moved, explained;
    int fits;
};

// upper triangle of six by six, row by row; of the lower one column by column
__device__ __forceinline__ constexpr int upper(int row, int column) { return row * (13 - row) / 2 + column - row; }
// lower triangle, row by row
__device__ __forceinline__ constexpr int lower(int row, int column) { return row * (row + 1) / 2 + column; }

// From a window's sums to the information and score of the disk's place: background, gradient and intensity are
// eliminated in this order, with their priors. Notes the intensity and background of the next step. By one thread.
__device__ void eliminate(const Disks& disks, int k, const f64* numbers, bool first) {
    f64 m[MATRIX], right[6];
    const f32* sums = disks.sums + SUMS * k;
#pragma unroll
    for (int s = 0; s < MATRIX; ++s) m[s] = sums[s];
#pragma unroll
    for (int r = 0; r < 6; ++r) right[r] = sums[MATRIX + r];
    for (int column = INFO_YY; column <= ROBUST; ++column) disks.at(column, k) = 0;
    disks.at(CHI2, k) = disks.at(PIXELS, k) = 0;
    if (m[upper(0, 0)] <= 0 || m[upper(3, 3)] <= 0) return;

    const f64* prior = disks.priors + PRIORS * k;
    f64 level = disks.at(LEVEL, k), ground = disks.at(GROUND, k);
    if (!first) {
        m[upper(0, 0)] += prior[BACKGROUND_PRECISION];
        right[0] += prior[BACKGROUND_PRECISION] * (prior[BACKGROUND] - ground);
    }
    if (first || level <= 0 || prior[GRADIENT] <= 0) {
#pragma unroll
        for (int c = 1; c < 3; ++c) {
#pragma unroll
            for (int i = 0; i < 6; ++i) m[i < c ? upper(i, c) : upper(c, i)] = i == c;
            right[c] = 0;
        }
    } else {
        const f64 added = 1 / (prior[GRADIENT] * level * level);
        m[upper(1, 1)] += added;
        m[upper(2, 2)] += added;
    }
    f64 explained = 0, inverse[4], change[4];
    bool positive = true;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        positive = positive && m[upper(p, p)] > 0;
        inverse[p] = 1 / m[upper(p, p)];
        explained = fma(right[p] * right[p], inverse[p], explained);
#pragma unroll
        for (int i = p + 1; i < 6; ++i) {
            const f64 factor = -m[upper(p, i)] * inverse[p];
#pragma unroll
            for (int j = i; j < 6; ++j) m[upper(i, j)] = fma(factor, m[upper(p, j)], m[upper(i, j)]);
            right[i] = fma(factor, right[p], right[i]);
        }
    }
    if (!positive) return;
#pragma unroll
    for (int p = 3; p >= 0; --p) {
        f64 rest = right[p];
#pragma unroll
        for (int j = p + 1; j < 4; ++j) rest = fma(-m[upper(p, j)], change[j], rest);
        change[p] = rest * inverse[p];
    }
    const f64 found = fmax(level + change[3], 0.0);
    ground = fmax(ground + change[0], 0.0);
    f64 scale = 1;
    if (first) {
        // all pixels counted alike: their variance is about that in the middle of the rim
        scale = 1 / fmax(fma(numbers[GAIN], fma(0.5, found, ground), numbers[READ]), 1e-6);
        level = found;
    }
    disks.at(LEVEL, k) = found;
    disks.at(GROUND, k) = ground;
    disks.at(LEVEL_VARIANCE, k) = inverse[3] / scale;
    const f64 square = level * level * scale;
    disks.at(INFO_YY, k) = m[upper(4, 4)] * square;
    disks.at(INFO_YX, k) = m[upper(4, 5)] * square;
    disks.at(INFO_XX, k) = m[upper(5, 5)] * square;
    disks.at(SCORE_Y, k) = right[4] * level * scale;
    disks.at(SCORE_X, k) = right[5] * level * scale;
    if (disks.at(INFO_YY, k) > 0) {
        disks.at(CHI2, k) = (sums[27] - explained) * scale;
        disks.at(PIXELS, k) = sums[28] - 4.0f;
    }
}

// A disk's part in the system of the lattice, from which it may lie off by the variance of its place. By one thread.
__device__ void pull(const Disks& disks, int k, bool plain) {
    f64 yy = 0, yx = 0, xx = 0, y = 0, x = 0;
    if (disks.known(k)) {
        if (plain) disks.at(ROBUST, k) = 1;
        const f64 a = disks.at(INFO_YY, k), b = disks.at(INFO_YX, k), c = disks.at(INFO_XX, k);
        const f64 own = disks.priors[PRIORS * k + OFFSET], robust = disks.at(ROBUST, k);
        const f64 share = robust / ((1 + own * a) * (1 + own * c) - own * own * b * b);
        const f64 m = (1 + own * c) * share, o = -own * b * share, q = (1 + own * a) * share;
        const f64 score_y = disks.at(SCORE_Y, k), score_x = disks.at(SCORE_X, k);
        yy = m * a + o * b, yx = m * b + o * c, xx = o * b + q * c;
        y = m * score_y + o * score_x, x = o * score_y + q * score_x;
    }
    disks.at(PULL_YY, k) = yy, disks.at(PULL_YX, k) = yx, disks.at(PULL_XX, k) = xx;
    disks.at(PULL_Y, k) = y, disks.at(PULL_X, k) = x;
}

// Sum the parts of all disks: every lane an entry of the matrix or of the right-hand side, disks in their order. Not
// unrolled: that would take registers from the pixels.
__device__ void assemble(const Disks& disks, Lattice& lattice, f64 prior) {
    const int lane = threadIdx.x % 32;
    if (lane < MATRIX) {
        int i = 0;
        while (lower(i + 1, 0) <= lane) ++i;
        const int j = lane - lower(i, 0);
        f64 sum = i == j ? prior : 0;
#pragma unroll 1
        for (int k = 0; k < disks.count; ++k)
            sum = fma(disks.order(i / 2, k) * disks.order(j / 2, k), disks.at(PULL_YY + i % 2 + j % 2, k), sum);
        lattice.normal[lane] = sum;
    } else if (lane < MATRIX + 6) {
        const int i = lane - MATRIX;
        f64 sum = prior * (lattice.start[i] - lattice.theta[i]);
#pragma unroll 1
        for (int k = 0; k < disks.count; ++k) sum = fma(disks.order(i / 2, k), disks.at(PULL_Y + i % 2, k), sum);
        lattice.step[i] = sum;
    }
    __syncwarp();
}

// Solve with a Cholesky factor (lower triangle, its diagonal inverted), in place. By one thread.
__device__ __forceinline__ void substitute(const f64 (&factor)[MATRIX], f64 (&step)[6]) {
#pragma unroll
    for (int i = 0; i < 6; ++i) {
#pragma unroll
        for (int k = 0; k < i; ++k) step[i] = fma(-factor[lower(i, k)], step[k], step[i]);
        step[i] *= factor[lower(i, i)];
    }
#pragma unroll
    for (int i = 5; i >= 0; --i) {
#pragma unroll
        for (int k = i + 1; k < 6; ++k) step[i] = fma(-factor[lower(k, i)], step[k], step[i]);
        step[i] *= factor[lower(i, i)];
    }
}

// Replace the matrix by its Cholesky factor, its diagonal inverted, and the right-hand side by the step; false if the
// matrix isn't positive. Every lane of a warp computes all of it: that takes no longer than one, and all know it.
__device__ bool solve(Lattice& lattice) {
    f64 factor[MATRIX], step[6];
#pragma unroll
    for (int s = 0; s < MATRIX; ++s) factor[s] = lattice.normal[s];
#pragma unroll
    for (int i = 0; i < 6; ++i) step[i] = lattice.step[i];
    __syncwarp();
    bool positive = true;
#pragma unroll
    for (int i = 0; i < 6; ++i) {
#pragma unroll
        for (int j = 0; j <= i; ++j) {
            f64 rest = factor[lower(i, j)];
#pragma unroll
            for (int k = 0; k < j; ++k) rest = fma(-factor[lower(i, k)], factor[lower(j, k)], rest);
            if (i == j) positive = positive && rest > 0;
            factor[lower(i, j)] = i == j ? rsqrt(rest) : rest * factor[lower(j, j)];
        }
    }
    if (!positive) return false;
    substitute(factor, step);
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int s = 0; s < MATRIX; ++s) lattice.normal[s] = factor[s];
#pragma unroll
        for (int i = 0; i < 6; ++i) lattice.step[i] = step[i];
    }
    __syncwarp();
    return true;
}

// How far a disk lies off the lattice after the step (chi^2 of two numbers), and its robust weight. By one thread.
__device__ void outlier(const Disks& disks, int k, const f64* step) {
    const f64 a = disks.at(INFO_YY, k), b = disks.at(INFO_YX, k), c = disks.at(INFO_XX, k);
    const f64 area = a * c - b * b;
    f64 square = 0;
    if (area > 1e-9 * a * c) {
        const f64 move_y = disks.place(step, 0, k), move_x = disks.place(step, 1, k);
        const f64 y = disks.at(SCORE_Y, k) - a * move_y - b * move_x;
        const f64 x = disks.at(SCORE_X, k) - b * move_y - c * move_x;
        // the distance is A^-1 (y, x); its variance A^-1 + s^2
        const f64 own = disks.priors[PRIORS * k + OFFSET], each = 1 / area;
        const f64 off_y = (c * y - b * x) * each, off_x = (a * x - b * y) * each;
        const f64 v00 = c * each + own, v01 = -b * each, v11 = a * each + own;
        square = (v11 * off_y * off_y - 2 * v01 * off_y * off_x + v00 * off_x * off_x) / (v00 * v11 - v01 * v01);
        if (square > HUBER * HUBER) disks.at(ROBUST, k) = HUBER / sqrt(square);
    }
    disks.at(MISFIT, k) = square;
}

// Take the step, shortened where it moves a disk too far; how far it would move any disk. By a whole warp.
__device__ f64 move(const Disks& disks, Lattice& lattice, f64 longest) {
    const int lane = threadIdx.x % 32;
    f64 far = 0;
    for (int k = lane; k < disks.count; k += 32) {
        const f64 y = disks.place(lattice.step, 0, k), x = disks.place(lattice.step, 1, k);
        far = fmax(far, sqrt(y * y + x * x));
    }
    for (int distance = 16; distance; distance /= 2) far = fmax(far, __shfl_xor_sync(0xffffffffu, far, distance));
    const f64 share = far > 0 ? fmin(1.0, longest / far) : 1;
    if (lane < 6) lattice.theta[lane] = fma(share, lattice.step[lane], lattice.theta[lane]);
    return far;
}

// One step of the lattice from what is known of its disks; notes whether there is one and how long it is. The second
// turn of a sharp step weighs outliers less. By a whole warp.
__device__ void lattice_step(const Disks& disks, Lattice& lattice, const f64* numbers, bool blurred) {
    const int lane = threadIdx.x % 32;
    bool fits = true;
    for (int turn = 0; fits && turn < (blurred ? 1 : 2); ++turn) {
        for (int k = lane; k < disks.count; k += 32) {
            if (turn == 1) outlier(disks, k, lattice.step);
            pull(disks, k, turn == 0);
        }
        __syncwarp();
        assemble(disks, lattice, numbers[START_INFORMATION]);
        fits = solve(lattice);
    }
    const f64 moved = fits ? move(disks, lattice, LONGEST * numbers[RADIUS]) : 0;
    if (lane == 0) {
        lattice.fits = fits;
        if (fits) lattice.moved = moved;
    }
}

// One sigma of exx, eyy, exy and the rotation in degrees, to first order; by lanes 0 to 3 of a warp.
__device__ f64 sigma(const Lattice& lattice, const f64* axes, f64 scatter) {
    const f64* theta = lattice.theta;
    const int which = threadIdx.x % 32;
    const f64 ax = axes[0] * theta[3] + axes[1] * theta[2], ay = axes[2] * theta[3] + axes[3] * theta[2];
    const f64 bx = axes[0] * theta[5] + axes[1] * theta[4], by = axes[2] * theta[5] + axes[3] * theta[4];
    const f64 area = ax * by - ay * bx;
    f64 slopes[4];
#pragma unroll
    for (int column = 0; column < 4; ++column) {
        // rows of G^-1: what a change of a, of b contributes; of its y or x component on the detector
        const f64 inverse_x = (column < 2 ? by : -ay) / area, inverse_y = (column < 2 ? -bx : ax) / area;
        const f64 dx = axes[1 - column % 2], dy = axes[3 - column % 2];
        const f64 xy = -dy * inverse_x, yx = -dx * inverse_y;
        slopes[column] = which == 0   ? -dx * inverse_x
                         : which == 1 ? -dy * inverse_y
                         : which == 2 ? 0.5 * (xy + yx)
                                      : 0.5 * (yx - xy) * 57.29577951308232;
    }
    f64 variance = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) variance += slopes[i] * lattice.inverse[2 + i][2 + j] * slopes[j];
    return sqrt(fmax(variance, 0.0) * scatter);
}

// the inverse of the matrix of the last step, a column by a lane
__device__ void invert(Lattice& lattice) {
    const int lane = threadIdx.x % 32;
    if (lane < 6) {
        f64 factor[MATRIX], column[6];
#pragma unroll
        for (int s = 0; s < MATRIX; ++s) factor[s] = lattice.normal[s];
#pragma unroll
        for (int i = 0; i < 6; ++i) column[i] = i == lane;
        substitute(factor, column);
#pragma unroll
        for (int i = 0; i < 6; ++i) lattice.inverse[lane][i] = column[i];
    }
    __syncwarp();
}

// Write the row of a frame where the disks explain more than those of the lattices before. By a whole warp.
__device__ void conclude(const Disks& disks, Lattice& lattice, const f64* numbers, const f64* axes, int grain,
                         f32* row) {
    const int lane = threadIdx.x % 32;
    f64 explained = 0, counts = 0, chi2 = 0, pixels = 0, scatter = 0;
    i32 found = 0, scattered = 0;
    for (int k = lane; k < disks.count; k += 32) {
        chi2 += disks.at(CHI2, k);
        pixels += disks.at(PIXELS, k);
        const f64 robust = disks.at(ROBUST, k), variance = disks.at(LEVEL_VARIANCE, k), level = disks.at(LEVEL, k);
        if (disks.known(k) && variance > 0) {
            const f64 square = level * level / variance;
            explained += square;
            counts += level;
            found += square > FOUND * FOUND && robust > 0.5;
        }
        if (robust > 0 && disks.at(MISFIT, k) > 0) {
            scatter += disks.at(MISFIT, k) * robust;
            scattered += 2;
        }
    }
    explained = warp_sum(explained);
    if (!(explained > lattice.explained) && grain > 0) return;
    counts = warp_sum(counts), chi2 = warp_sum(chi2), pixels = warp_sum(pixels), scatter = warp_sum(scatter);
    found = warp_sum(found), scattered = warp_sum(scattered);
    scatter = scattered > 8 ? fmax(1.0, scatter / (scattered - 6)) : 1;
    const bool fits = lattice.fits && lattice.moved <= numbers[CONVERGED] && found >= numbers[LEAST_DISKS];
    if (fits) invert(lattice);
    if (lane < 6) row[lane] = static_cast<f32>(fits ? lattice.theta[lane] : nothing());
    if (lane < 4) row[6 + lane] = static_cast<f32>(fits ? sigma(lattice, axes, scatter) : nothing());
    if (lane == 0) {
        lattice.explained = explained;
        row[10] = static_cast<f32>(chi2 / fmax(pixels, 1.0));
        row[11] = static_cast<f32>(found);
        row[12] = static_cast<f32>(counts);
        row[13] = static_cast<f32>(grain);
    }
}
