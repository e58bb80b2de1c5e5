"""Whole-frame correlation on the CPU: transforms of a few frames at a time, then peaks frame by frame."""

from __future__ import annotations

import functools
import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames
from gpuem.backends.peaks import PeakSearch
from gpuem.codecs.compiled import compiled

# frames in single precision, their transforms and their correlations stay in the caches
BLOCK_NBYTES = 1 << 20
# steps on the fine grid until the climb is given up: three pixels
MOST_STEPS = 3

kernel = compiled
helper = numba.njit(nogil=True, boundscheck=False, error_model="numpy")
# sums of floats may be reordered into vector lanes
reduction: Any = functools.partial(compiled, fastmath={"reassoc", "nsz", "contract"})
fast_helper = numba.njit(nogil=True, boundscheck=False, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})


def run(search: PeakSearch, frames: Frames, positions: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Peaks of a block of frames, see `find_peaks`; where in the scan they are makes no difference."""
    find_peaks(frames.pixels, frames.starts, frames.shape, search, out)


def find_peaks(
    pixels: NDArray[Any], starts: NDArray[np.int64], shape: tuple[int, int], search: PeakSearch, out: NDArray[Any]
) -> None:
    """Correlate frames with a kernel and list the peaks.

    Parameters
    ----------
    pixels, starts, shape : array, (n,) int64, tuple of int
        The frames: any real type; computed in single precision.
    search : PeakSearch
        Kernel, filters.
    out : (n, search.columns) float32
        Number of peaks, then (y, x, height) of each, brightest first; NaN where there are fewer.
    """
    block = max(1, BLOCK_NBYTES // (4 * math.prod(shape)))
    workspace = _Workspace(search, shape)
    for first in range(0, starts.size, block):
        some = starts[first : first + block]
        correlation = correlate(pixels, some, shape, search)
        _peaks(correlation, workspace.numbers, workspace.candidates, workspace.fine, out[first : first + some.size])


def correlate(
    pixels: NDArray[Any], starts: NDArray[np.int64], shape: tuple[int, int], search: PeakSearch
) -> NDArray[np.float32]:
    """Correlations (n, y, x) of frames with the kernel; pixel (y, x) belongs to a disk centred on (y, x)."""
    real = np.empty((starts.size, *shape), np.float32)
    _gather(pixels, starts, real.reshape(starts.size, -1))
    spectra = np.fft.rfft2(real)
    _multiply(spectra, search.spectrum, search.smoothing, np.float32(search.power))
    return np.fft.irfft2(spectra, s=shape).astype(np.float32, copy=False)


class _Workspace:
    """Numbers of a search as the kernels take them, and their scratch."""

    def __init__(self, search: PeakSearch, shape: tuple[int, int]) -> None:
        how = {"none": 0, "parabola": 1, "upsample": search.factor}[search.subpixel]
        if search.subpixel == "upsample" and search.factor == 1:
            how = 1
        self.numbers = (
            search.edge, np.float32(search.min_absolute), np.float32(search.min_relative), search.relative_to,
            search.spacing, search.max_peaks, how,
        )  # fmt: skip
        # no two neighbours are both maxima
        most = -(-shape[0] // 2) * -(-shape[1] // 2)
        self.candidates = (
            np.empty(most, np.float32),
            np.empty(most, np.int64),
            np.empty(search.relative_to, np.float32),
        )
        steps = 2 * MOST_STEPS * search.factor + 1
        self.fine = (
            np.empty((steps, shape[0]), np.float32),
            np.empty(steps, np.bool_),
            np.empty(shape[0], np.float32),
            np.empty(shape[1], np.float32),
        )


@reduction  # type: ignore[untyped-decorator, unused-ignore]
def _gather(pixels: Any, starts: Any, out: Any) -> None:
    """Frames in single precision minus their mean, without which rounding errors would be those of the background."""
    for i in range(starts.size):
        frame = pixels[starts[i] : starts[i] + out.shape[1]]
        row = out[i]
        # from the first pixel on, so that a constant frame becomes exactly nothing
        level = np.float64(frame[0])
        total = np.float64(0)
        for p in range(row.size):
            total += np.float64(frame[p]) - level
        level += total / row.size
        for p in range(row.size):
            row[p] = np.float32(np.float64(frame[p]) - level)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _multiply(spectra: Any, spectrum: Any, smoothing: Any, power: Any) -> None:
    """Turn transforms of frames into those of their correlations, in place."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(spectra.shape[0]):
        for y in range(spectra.shape[1]):
            row, factor, gauss = spectra[i, y], spectrum[y], smoothing[y]
            if power == one:
                for x in range(row.size):
                    row[x] = row[x] * factor[x] * gauss[x]
            else:
                half = (power - one) * np.float32(0.5)
                for x in range(row.size):
                    m = row[x] * factor[x]
                    size2 = m.real * m.real + m.imag * m.imag
                    row[x] = m * (size2**half * gauss[x]) if size2 > zero else np.complex64(0)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def _peaks(correlation: Any, numbers: Any, candidates: Any, fine: Any, out: Any) -> None:
    edge, absolute, relative, nth, spacing, most, how = numbers
    values, places, brightest = candidates
    width = correlation.shape[2]
    for i in range(correlation.shape[0]):
        image = correlation[i]
        out[i, :] = np.nan
        found = _maxima(image, edge, max(absolute, np.float32(0)), values, places)
        found = _relative(found, relative, brightest[:nth], values, places)
        order = np.argsort(-values[:found], kind="mergesort")
        kept = 0
        for k in order:
            y, x = places[k] // width, places[k] % width
            near = False
            for j in range(kept):
                dy, dx = y - np.int64(out[i, 1 + 3 * j]), x - np.int64(out[i, 2 + 3 * j])
                near = near or dy * dy + dx * dx < spacing * spacing
            if near:
                continue
            out[i, 1 + 3 * kept], out[i, 2 + 3 * kept], out[i, 3 + 3 * kept] = y, x, values[k]
            kept += 1
            if kept == most:
                break
        out[i, 0] = kept
        if how == 0:
            continue
        for j in range(kept):
            y, x = np.int64(out[i, 1 + 3 * j]), np.int64(out[i, 2 + 3 * j])
            py, px, top = _parabolas(image, y, x)
            if how > 1:
                py, px, top = _climb(image, (py, px, top), how, fine)
            out[i, 1 + 3 * j], out[i, 2 + 3 * j], out[i, 3 + 3 * j] = py, px, top
        _sort(out[i, 1:], kept)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _maxima(image: Any, edge: Any, above: Any, values: Any, places: Any) -> Any:
    """Values and flat positions of the local maxima that lie off the edge and above a value; how many."""
    height, width = image.shape
    found = 0
    for y in range(edge, height - edge):
        row = image[y]
        up = image[max(y - 1, 0)]
        down = image[min(y + 1, height - 1)]
        for x in range(edge, width - edge):
            v = row[x]
            if not v > above or (x > 0 and not v > row[x - 1]) or (x < width - 1 and not v >= row[x + 1]):
                continue
            left, right = max(x - 1, 0), min(x + 1, width - 1)
            if y > 0 and not (v > up[left] and v > up[x] and v > up[right]):
                continue
            if y < height - 1 and not (v >= down[left] and v >= down[x] and v >= down[right]):
                continue
            values[found] = v
            places[found] = y * width + x
            found += 1
    return found


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _relative(found: Any, part: Any, brightest: Any, values: Any, places: Any) -> Any:
    """Keep those that reach `part` of the last of the `brightest`; how many are left, in the same order."""
    if found == 0:
        return 0
    n = min(brightest.size, found)
    brightest[:] = -np.inf
    for k in range(found):
        v = values[k]
        if v <= brightest[n - 1]:
            continue
        j = n - 1
        while j > 0 and brightest[j - 1] < v:
            brightest[j] = brightest[j - 1]
            j -= 1
        brightest[j] = v
    least = part * brightest[n - 1]
    kept = 0
    for k in range(found):
        if values[k] >= least:
            values[kept] = values[k]
            places[kept] = places[k]
            kept += 1
    return kept


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _vertex(before: Any, at: Any, after: Any) -> Any:
    """Where a parabola through three points has its maximum, from the middle one, and how much higher it is there."""
    slope = 0.5 * (np.float64(after) - np.float64(before))
    bend = 2.0 * np.float64(at) - np.float64(before) - np.float64(after)
    if not bend > 0.0:
        return 0.0, 0.0
    shift = min(max(slope / bend, -0.5), 0.5)
    return shift, slope * shift - 0.5 * bend * shift * shift


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _parabolas(image: Any, y: Any, x: Any) -> Any:
    """Maximum of a parabola along each axis; on the border the pixel itself, along the axis that ends there."""
    height, width = image.shape
    top = np.float64(image[y, x])
    py, px = np.float64(y), np.float64(x)
    if 0 < y < height - 1:
        shift, more = _vertex(image[y - 1, x], image[y, x], image[y + 1, x])
        py += shift
        top += more
    if 0 < x < width - 1:
        shift, more = _vertex(image[y, x - 1], image[y, x], image[y, x + 1])
        px += shift
        top += more
    return py, px, top


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _between(at: Any, out: Any) -> None:
    """Weights of all pixels of a periodic row in the value at a place between them: the Dirichlet kernel.

    sin(pi d) / (n sin(pi d / n)) for odd n; cos(pi d / n) times that for even n, where the highest frequency is
    shared between +1/2 and -1/2.
    """
    n = out.size
    whole = np.floor(at + 0.5)
    rest = at - whole
    nearest = np.int64(whole) % n
    if abs(rest) < 1e-9:
        out[:] = np.float32(0)
        out[nearest] = np.float32(1)
        return
    scale = np.sin(np.pi * rest) / n
    # sin and cos of pi (rest - k) / n by rotation, so that there is one sine per row and not one per pixel
    turn_s, turn_c = np.sin(np.pi / n), np.cos(np.pi / n)
    s, c = np.sin(np.pi * rest / n), np.cos(np.pi * rest / n)
    even = n % 2 == 0
    for k in range(n):
        # sin(pi (rest - k)) = (-1)^k sin(pi rest)
        value = scale / s
        if even:
            value *= c
        position = nearest + k
        if position >= n:
            position -= n
        out[position] = np.float32(value if k % 2 == 0 else -value)
        s, c = s * turn_c - c * turn_s, c * turn_c + s * turn_s


@fast_helper  # type: ignore[untyped-decorator, unused-ignore]
def _column(image: Any, weights: Any, out: Any) -> None:
    """The correlation along a column that lies between the pixels, at the pixels' rows."""
    for y in range(image.shape[0]):
        row = image[y]
        total = np.float32(0)
        for x in range(row.size):
            total += row[x] * weights[x]
        out[y] = total


@fast_helper  # type: ignore[untyped-decorator, unused-ignore]
def _dot(a: Any, b: Any) -> Any:
    total = np.float64(0)
    for k in range(a.size):
        total += np.float64(a[k]) * np.float64(b[k])
    return total


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _fine_row(image: Any, place: Any, factor: Any, fine: Any, out: Any) -> None:
    """Values at fine row place[0] and the fine columns place[1] - 1, place[1] and place[1] + 1."""
    columns, known, along_y, along_x = fine
    fy, fx, first = place
    _between(fy / factor, along_y)
    for k in range(3):
        slot = fx - 1 + k - first
        if not known[slot]:
            _between((fx - 1 + k) / factor, along_x)
            _column(image, along_x, columns[slot])
            known[slot] = True
        out[k] = _dot(columns[slot], along_y)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _climb(image: Any, start: Any, factor: Any, fine: Any) -> Any:
    """Nearest maximum of the upsampled correlation, from `start` (y, x, height); that itself where none is near."""
    columns, known = fine[:2]
    known[:] = False
    fy, fx = np.int64(np.floor(start[0] * factor + 0.5)), np.int64(np.floor(start[1] * factor + 0.5))
    reach = columns.shape[0] // 2
    first, y0 = fx - reach, fy
    grid = np.empty((3, 3), np.float64)
    while abs(fy - y0) < reach and abs(fx - first - reach) < reach:
        best_y, best_x = 1, 1
        for k in range(3):
            _fine_row(image, (fy - 1 + k, fx, first), factor, fine, grid[k])
        for j in range(3):
            for k in range(3):
                if grid[j, k] > grid[best_y, best_x]:
                    best_y, best_x = j, k
        if best_y == 1 and best_x == 1:
            dy, more_y = _vertex(grid[0, 1], grid[1, 1], grid[2, 1])
            dx, more_x = _vertex(grid[1, 0], grid[1, 1], grid[1, 2])
            return (fy + dy) / factor, (fx + dx) / factor, grid[1, 1] + more_y + more_x
        fy += best_y - 1
        fx += best_x - 1
    return start


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _sort(peaks: Any, count: Any) -> None:
    """Brightest first again: between the pixels a peak may be higher than another."""
    for k in range(1, count):
        y, x, v = peaks[3 * k], peaks[3 * k + 1], peaks[3 * k + 2]
        j = k
        while j > 0 and peaks[3 * j - 1] < v:
            for c in range(3):
                peaks[3 * j + c] = peaks[3 * j - 3 + c]
            j -= 1
        peaks[3 * j], peaks[3 * j + 1], peaks[3 * j + 2] = y, x, v
