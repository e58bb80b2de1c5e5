"""Correlation at expected sites on the CPU: a window per site, whole shifts, then a paraboloid between them.

The window is copied into rows as long as those of the kernel, which are padded with zeros: the correlation at one
shift is then a single dot product over contiguous memory.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames
from gpuem.backends.peaks import GuidedFit
from gpuem.codecs.compiled import compiled

# a site counts if this part of the kernel's positive weight lies on the frame when it is centred there
LEAST_ON_FRAME = 0.5
# neighbours of the maximum say nothing on how it stands out
NEAR = 1.5

helper: Any = numba.njit(nogil=True, boundscheck=False, error_model="numpy")
fast_helper: Any = numba.njit(
    nogil=True, boundscheck=False, error_model="numpy", fastmath={"reassoc", "nsz", "contract"}
)


def run(fit: GuidedFit, frames: Frames, positions: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Disks of a block of frames, see `guide`; where in the scan they are makes no difference."""
    guide(frames.pixels, frames.starts, frames.shape, fit, out)


def guide(
    pixels: NDArray[Any], starts: NDArray[np.int64], shape: tuple[int, int], fit: GuidedFit, out: NDArray[Any]
) -> None:
    """Find the disks of frames near the fit's sites.

    Parameters
    ----------
    pixels, starts, shape : array, (n,) int64, tuple of int
        The frames: any real type; computed in single precision.
    fit : GuidedFit
        Sites, kernel, search.
    out : (n, fit.columns) array
        Of each site (y, x, height, elevation), see `guided`.
    """
    tables = spread(fit.kernel, fit.search)
    scratch = workspace(fit.kernel.shape[0], fit.search)
    _frames(pixels, starts, shape, fit.sites, tables, (fit.search, fit.normalised, fit.logarithm), scratch, out)


def spread(kernel: NDArray[np.float32], search: int) -> NDArray[np.float32]:
    """The kernel (m, m), its positive part, the square of that, and where it isn't zero.

    Returns
    -------
    (4, m, m + 2 search) float32
        Rows as long as the window's, zeros behind the kernel: products with windows are then sums over adjacent pixels.
    """
    m = kernel.shape[0]
    if kernel.shape != (m, m) or m % 2 == 0:
        raise ValueError(f"kernel of {kernel.shape} px; must be square with an odd number of pixels")
    tables = np.zeros((4, m, m + 2 * search), np.float32)
    tables[0, :, :m] = kernel
    tables[1, :, :m] = np.maximum(kernel, 0)
    tables[2, :, :m] = np.maximum(kernel, 0) ** 2
    tables[3, :, :m] = kernel != 0
    return tables


def workspace(size: int, search: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scratch for a kernel of `size` px: the window with what of it is on the frame, and the correlations."""
    side = size + 2 * search
    return np.empty((3, side, side), np.float32), np.empty((2 * search + 1, 2 * search + 1), np.float32)


@compiled  # type: ignore[untyped-decorator, unused-ignore]
def _frames(pixels: Any, starts: Any, shape: Any, sites: Any, tables: Any, how: Any, scratch: Any, out: Any) -> None:
    for i in range(starts.size):
        guided(pixels, starts[i], shape, sites, tables, how, scratch, out[i].reshape((sites.shape[0], 4)))


@helper  # type: ignore[untyped-decorator, unused-ignore]
def guided(pixels: Any, start: Any, shape: Any, sites: Any, tables: Any, how: Any, scratch: Any, out: Any) -> None:
    """Find the disks of one frame near their sites. Compiled; to be called from compiled code, allocates nothing.

    Where the kernel reaches over the edge of the frame, its negative part that is on the frame is scaled to balance the
    positive one, so that a constant background gives nothing there either, and what is found is divided by the norm of
    what is left of the positive part, as in a least-squares fit: otherwise cut disks would be drawn onto the frame,
    where there is more of it. A disk of which half is cut off is still found some 0.2 px too far inside.

    Parameters
    ----------
    pixels, start, shape : array, int, tuple of int
        The frame is `pixels[start : start + y * x]`.
    sites : (n, 2) float64
        Expected positions (y, x) in px; may lie off the frame or be NaN.
    tables : (4, m, m + 2 search) float32
        See `spread`.
    how : tuple
        Search in px (int), normalised (bool), logarithm (bool), see `GuidedFit`.
    scratch : tuple of array
        See `workspace`.
    out : (n, 4) float32 or float64
        Of each site: y and x in px; height of the correlation, in counts of the disk (normalised: 1 for a perfect
        match; logarithm: no unit) at that position; elevation: slope of the steepest cone whose tip is the largest
        value and that lies above all others farther than 1.5 px, at least 0. NaN where less than half of the disk
        could lie on the frame; elevation 0 and a whole-pixel position where the maximum is at the search's border or
        nothing is there.
    """
    search, normalised, logarithm = how
    window, found = scratch
    half = tables.shape[1] // 2
    for k in range(sites.shape[0]):
        y, x = sites[k]
        out[k, :] = np.nan
        # written so that NaN is refused as well
        if not (-0.5 <= y < shape[0] - 0.5 and -0.5 <= x < shape[1] - 0.5):
            continue
        cy, cx = np.int64(np.floor(y + 0.5)), np.int64(np.floor(x + 0.5))
        top, left = cy - half - search, cx - half - search
        inside = _cut(pixels, start, shape, (top, left), window, logarithm)
        if not inside and _on_frame(tables, window, search) < LEAST_ON_FRAME:
            continue
        _correlate(tables, window, found, inside)
        if normalised:
            _normalise(tables, window, found, inside)
        py, px, height, elevation = _evaluate(found)
        out[k, 0], out[k, 1], out[k, 2], out[k, 3] = cy - search + py, cx - search + px, height, elevation


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _cut(pixels: Any, start: Any, shape: Any, corner: Any, window: Any, logarithm: Any) -> Any:
    """Copy a window into window[0], zeros off the frame, where window[1] is 0 too. Whether all of it is on the frame.

    Where it is, window[1] is left as it was.
    """
    height, width = shape
    top, left = corner
    side = window.shape[1]
    values, there = window[0], window[1]
    inside = top >= 0 and left >= 0 and top + side <= height and left + side <= width
    y0, y1 = max(-top, 0), min(height - top, side)
    x0, x1 = max(-left, 0), min(width - left, side)
    if not inside:
        values[:] = np.float32(0)
        there[:] = np.float32(0)
        for y in range(y0, y1):
            there[y, x0:x1] = np.float32(1)
    least = np.float32(np.inf)
    for y in range(y0, y1):
        at = start + (top + y) * width + left
        source = pixels[at + x0 : at + max(x1, x0)]
        row = values[y, x0:x1]
        for x in range(row.size):
            row[x] = np.float32(source[x])
        if logarithm:
            for x in range(row.size):
                least = min(least, row[x])
    if logarithm:
        for y in range(y0, y1):
            for x in range(x0, x1):
                values[y, x] = np.log(values[y, x] - least + np.float32(1))
    return inside


@fast_helper  # type: ignore[untyped-decorator, unused-ignore]
def _dot(a: Any, b: Any, at: Any) -> Any:
    total = np.float32(0)
    part = b[at : at + a.size]
    for p in range(a.size):
        total += a[p] * part[p]
    return total


@fast_helper  # type: ignore[untyped-decorator, unused-ignore]
def _three_dots(a: Any, b: Any, at: Any) -> Any:
    """With b at three neighbouring places: the kernel is loaded once."""
    t0, t1, t2 = np.float32(0), np.float32(0), np.float32(0)
    p0, p1, p2 = b[at : at + a.size], b[at + 1 : at + 1 + a.size], b[at + 2 : at + 2 + a.size]
    for p in range(a.size):
        t0 += a[p] * p0[p]
        t1 += a[p] * p1[p]
        t2 += a[p] * p2[p]
    return t0, t1, t2


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _used(tables: Any, search: Any) -> Any:
    """Length of the kernel's padded rows without the padding of the last one."""
    return tables.shape[1] * tables.shape[2] - 2 * search


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _on_frame(tables: Any, window: Any, search: Any) -> Any:
    """Part of the kernel's positive weight that lies on the frame when it is centred on the site."""
    part, whole = np.float32(0), np.float32(0)
    for y in range(tables.shape[1]):
        for x in range(tables.shape[1]):
            weight = tables[1, y, x]
            whole += weight
            part += weight * window[1, y + search, x + search]
    return part / whole


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _correlate(tables: Any, window: Any, found: Any, inside: Any) -> None:
    """The kernel's product with the window at every shift."""
    shifts, side = found.shape[0], window.shape[1]
    length = _used(tables, shifts // 2)
    weights, positive = tables[0].reshape(-1)[:length], tables[1].reshape(-1)[:length]
    squares = tables[2].reshape(-1)[:length]
    values, there = window[0].reshape(-1), window[1].reshape(-1)
    norm = np.float32(0)
    for p in range(length):
        norm += squares[p]
    for dy in range(shifts):
        for dx in range(0, shifts - 2, 3):
            found[dy, dx], found[dy, dx + 1], found[dy, dx + 2] = _three_dots(weights, values, dy * side + dx)
        for dx in range(shifts // 3 * 3, shifts):
            found[dy, dx] = _dot(weights, values, dy * side + dx)
        if inside:
            continue
        for dx in range(shifts):
            at = dy * side + dx
            weight = _dot(positive, there, at)
            balance = weight - _dot(weights, there, at)
            disk = _dot(positive, values, at)
            ring = disk - found[dy, dx]
            # without a ring there is no background to subtract: no disk either
            found[dy, dx] = np.float32(0)
            if balance > np.float32(0) and weight > np.float32(0):
                found[dy, dx] = (disk - ring * (weight / balance)) * np.sqrt(norm / _dot(squares, there, at))


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _normalise(tables: Any, window: Any, found: Any, inside: Any) -> None:
    """Divide by the norms of the kernel and of what it lies on, minus its mean: Pearson's correlation."""
    shifts, side = found.shape[0], window.shape[1]
    length = _used(tables, shifts // 2)
    weights, support = tables[0].reshape(-1)[:length], tables[3].reshape(-1)[:length]
    if inside:
        window[1][:] = np.float32(1)
    values, there, squares = window[0].reshape(-1), window[1].reshape(-1), window[2].reshape(-1)
    norm = _dot(weights, weights, 0)
    # differences from a pixel of the window: squares of large counts would leave nothing of the differences
    level = values[values.size // 2]
    for p in range(values.size):
        values[p] = (values[p] - level) * there[p]
        squares[p] = values[p] * values[p]
    for dy in range(shifts):
        for dx in range(shifts):
            at = dy * side + dx
            count = max(_dot(support, there, at), np.float32(1))
            total = _dot(support, values, at)
            square = _dot(support, squares, at)
            spread2 = square - total * total / count
            # what is left of two equal sums is rounding
            if spread2 > np.float32(1e-6) * square:
                found[dy, dx] /= np.sqrt(spread2 * norm)
            else:
                found[dy, dx] = np.float32(0)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _evaluate(found: Any) -> Any:
    """Position (y, x) of the maximum in the map of shifts, its height and its elevation."""
    shifts = found.shape[0]
    y, x = 0, 0
    for dy in range(shifts):
        for dx in range(shifts):
            if found[dy, dx] > found[y, x]:
                y, x = dy, dx
    height = np.float64(found[y, x])
    if y == 0 or x == 0 or y == shifts - 1 or x == shifts - 1:
        return np.float64(y), np.float64(x), height, 0.0
    elevation = np.inf
    for dy in range(shifts):
        for dx in range(shifts):
            distance = np.sqrt(np.float64((dy - y) * (dy - y) + (dx - x) * (dx - x)))
            if distance >= NEAR:
                elevation = min(elevation, (height - found[dy, dx]) / distance)
    py, px, more = _paraboloid(found[y - 1 : y + 2, x - 1 : x + 2])
    return y + py, x + px, height + more, max(elevation, 0.0) if elevation < np.inf else 0.0


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _paraboloid(near: Any) -> Any:
    """Maximum of the paraboloid of central differences of 3x3 values: shift (y, x) from the middle, and rise."""
    top = np.float64(near[1, 1])
    g_y = 0.5 * (np.float64(near[2, 1]) - near[0, 1])
    g_x = 0.5 * (np.float64(near[1, 2]) - near[1, 0])
    h_yy = np.float64(near[2, 1]) + near[0, 1] - 2 * top
    h_xx = np.float64(near[1, 2]) + near[1, 0] - 2 * top
    h_yx = 0.25 * (np.float64(near[2, 2]) - near[2, 0] - near[0, 2] + near[0, 0])
    determinant = h_yy * h_xx - h_yx * h_yx
    if not (h_yy < 0 and determinant > 0):
        return 0.0, 0.0, 0.0
    y = (h_yx * g_x - h_xx * g_y) / determinant
    x = (h_yx * g_y - h_yy * g_x) / determinant
    y, x = min(max(y, -1.0), 1.0), min(max(x, -1.0), 1.0)
    return y, x, g_y * y + g_x * x + 0.5 * (h_yy * y * y + h_xx * x * x) + h_yx * y * x
