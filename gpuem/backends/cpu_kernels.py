"""Numba kernels over blocks of frames: compiled once, cached, without the GIL, one thread each.

A frame is a contiguous stretch of the flat array `pixels`, found by `starts`. Integer pixels are accumulated in 32-bit
lanes over as many terms as surely fit, then in 64 bits: exact. Inner loops are written so that LLVM can turn them into
vector code: few arrays, no branches, 32-bit casts everywhere (Numba would widen to 64 bits otherwise).
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np

from gpuem.backends.cpu_vectors import LANES, PITCH, accumulate4, dot4x4, fetch, masked_sum
from gpuem.codecs.compiled import compiled

# 65535 * 256 * 257 / 2 < 2^32: twice-accumulated uint16 columns of a band fit in 32 bits; int16 in 31
BAND = 256
# columns per strip: the accumulators of a strip stay in the first-level cache, at distances known to the compiler
STRIP = 256
# pixels whose products with a weight are added in the weight's own precision before they go to float64
PANEL = 1024

kernel = compiled
helper = numba.njit(nogil=True, boundscheck=False, error_model="numpy")
# sums of floats may be reordered into vector lanes: the order then depends on the processor, never on the tiling
reduction: Any = functools.partial(compiled, fastmath={"reassoc", "nsz", "contract"})


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def whole_frames(pixels: Any, starts: Any, shape: Any, total: Any, maximum: Any, columns: Any, out: Any) -> None:
    """Sum and maximum over frames, and moments of every frame, in one pass; what is None is left out.

    Column sums are accumulated twice: the second accumulator holds the running sum of the first, that is
    sum((rows - y) * pixel), from which the y-moment follows without one multiplication per pixel.

    Parameters
    ----------
    pixels, starts, shape : array, (n,) int64, tuple of int
        The frames.
    total, maximum : (y*x,) array or None
        Added to; raised.
    columns : (8 * PITCH,) array or None
        Scratch of the column sums, in a type in which those of a band fit.
    out : (n, 3) array
        Sum, y- and x-weighted sum of every frame are added; not used where `columns` is None.
    """
    height, width = shape
    for first in range(0, starts.size, 4):
        count = min(4, starts.size - first)
        for x0 in range(0, width, STRIP):
            n = min(STRIP, width - x0)
            for y0 in range(0, height, BAND):
                m = min(BAND, height - y0)
                if columns is not None:
                    columns[:] = 0
                if count == 4:
                    at = (starts[first], starts[first + 1], starts[first + 2], starts[first + 3])
                    _band_of_four(pixels, at, (x0, n, y0, m, width), total, maximum, columns)
                else:
                    for f in range(count):
                        _band_of_one(pixels, starts[first + f], f, (x0, n, y0, m, width), total, maximum, columns)
                if columns is not None:
                    _reduce_columns(columns, (x0, n, y0, m), out[first : first + count])


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _band_of_four(pixels: Any, at: Any, area: Any, total: Any, maximum: Any, columns: Any) -> None:
    x0, n, y0, m, width = area
    vectors = n // LANES * LANES
    quads = m // 4 * 4
    for y in range(y0, y0 + quads, 4):
        row = y * width + x0
        for f in range(4):
            for r in range(4, 8):
                fetch(pixels, at[f] + row + r * width, n)
        for x in range(0, vectors, LANES):
            where = row + x
            places = (at[0] + where, at[1] + where, at[2] + where, at[3] + where, where, x)
            accumulate4(pixels, places, width, 4, total, maximum, columns)
    for y in range(y0 + quads, y0 + m):
        row = y * width + x0
        for x in range(0, vectors, LANES):
            where = row + x
            places = (at[0] + where, at[1] + where, at[2] + where, at[3] + where, where, x)
            accumulate4(pixels, places, width, 1, total, maximum, columns)
    if vectors < n:
        for f in range(4):
            rest = (x0 + vectors, n - vectors, y0, m, width)
            _band_of_one(pixels, at[f], f, rest, total, maximum, None if columns is None else columns[vectors:])


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _band_of_one(pixels: Any, start: Any, f: Any, area: Any, total: Any, maximum: Any, columns: Any) -> None:
    """Pixel by pixel, in the same order of additions as four at a time: the same bits for floats too."""
    x0, n, y0, m, width = area
    for y in range(y0, y0 + m):
        row = y * width + x0
        for x in range(n):
            v = pixels[start + row + x]
            if total is not None:
                total[row + x] = total.dtype.type(total[row + x] + total.dtype.type(v))
            if maximum is not None:
                maximum[row + x] = max(maximum[row + x], v)
            if columns is not None:
                column = columns.dtype.type(columns[f * PITCH + x] + columns.dtype.type(v))
                columns[f * PITCH + x] = column
                columns[(4 + f) * PITCH + x] = columns.dtype.type(columns[(4 + f) * PITCH + x] + column)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _reduce_columns(columns: Any, area: Any, out: Any) -> None:
    x0, n, y0, m = area
    wide = out.dtype.type
    for f in range(out.shape[0]):
        band = wide(0)
        band_x = wide(0)
        twice = wide(0)
        for x in range(n):
            column = wide(columns[f * PITCH + x])
            band += column
            band_x += wide(x) * column
            twice += wide(columns[(4 + f) * PITCH + x])
        out[f, 0] += band
        out[f, 1] += wide(m + y0) * band - twice
        out[f, 2] += band_x + wide(x0) * band


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def mask_sums(pixels: Any, starts: Any, size: Any, tables: Any, narrow: Any, out: Any) -> None:
    """Add to `out` (n, masks) the sums of the pixels inside each mask.

    Parameters
    ----------
    pixels, starts, size : array, (n,) int64, int
        The frames and their number of pixels.
    tables : tuple of arrays
        Sections (s, 5): mask, rows of `groups`, rows of `edges`; groups (k, 2): first pixel, number of whole groups of
        LANES pixels; edges (e,): first pixel of a group of which only some lanes count; lanes (e * LANES,): which.
    narrow : array
        Its type holds the sums of a lane over a section.
    out : (n, masks) array
        Added to.
    """
    sections, groups, edges, lanes = tables
    if size < LANES:
        # a group would reach beyond the frame
        for i in range(starts.size):
            for s in range(sections.shape[0]):
                for p in range(size):
                    if lanes[sections[s, 3] * LANES + p]:
                        out[i, sections[s, 0]] += out.dtype.type(pixels[starts[i] + p])
        return
    for i in range(starts.size):
        for s in range(sections.shape[0]):
            mask, g0, g1, e0, e1 = sections[s]
            part = masked_sum(pixels, starts[i], (groups, g0, g1), (edges, e0, e1), lanes, narrow)
            out[i, mask] += out.dtype.type(part)


@reduction  # type: ignore[untyped-decorator, unused-ignore]
def moments_in_spans(pixels: Any, starts: Any, spans: Any, narrow: Any, out: Any) -> None:
    """Add to `out` (n, regions, 3) sum, y- and x-weighted sums over spans of at most 256 pixels of one row.

    A span is (first pixel, end, region, y, x of its first pixel).
    """
    cast = narrow.dtype.type
    wide = out.dtype.type
    for i in range(starts.size):
        for k in range(spans.shape[0]):
            span = pixels[starts[i] + spans[k, 0] : starts[i] + spans[k, 1]]
            s = cast(0)
            s_x = cast(0)
            for p in range(span.size):
                v = cast(span[p])
                s = cast(s + v)
                s_x = cast(s_x + cast(v * cast(p)))
            region = spans[k, 2]
            out[i, region, 0] += wide(s)
            out[i, region, 1] += wide(spans[k, 3]) * wide(s)
            out[i, region, 2] += wide(s_x) + wide(spans[k, 4]) * wide(s)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def image_sums(pixels: Any, starts: Any, images: Any, out: Any) -> None:
    """Add to `out` (n, images) the sums of pixel times weight, `images` (4k, y*x) in float32 or float64.

    A panel of pixels is added up in the weights' precision, panels in float64.
    """
    cast = images.dtype.type
    n, size = starts.size, images.shape[1]
    flat = images.reshape(-1)
    # four frames' pixels as real numbers, converted once for all images
    real = np.zeros(4 * PANEL, images.dtype)
    found = np.empty(16, np.float64)
    for p0 in range(0, size, PANEL):
        p1 = min(p0 + PANEL, size)
        groups = (p1 - p0) // LANES
        for i in range(0, n, 4):
            for f in range(min(4, n - i)):
                fetch(pixels, starts[min(i + 4 + f, n - 1)] + p0, p1 - p0)
                frame = pixels[starts[i + f] + p0 : starts[i + f] + p1]
                for p in range(p1 - p0):
                    real[f * PANEL + p] = cast(frame[p])
            for k in range(0, images.shape[0], 4):
                row = k * size + p0
                rows = (row, row + size, row + 2 * size, row + 3 * size)
                found[:] = 0
                dot4x4(real, (0, PANEL, 2 * PANEL, 3 * PANEL), flat, rows, groups, found)
                for f in range(min(4, n - i)):
                    for j in range(min(4, out.shape[1] - k)):
                        rest = 0.0
                        for p in range(groups * LANES, p1 - p0):
                            rest += np.float64(real[f * PANEL + p] * images[k + j, p0 + p])
                        out[i + f, k + j] += found[4 * f + j] + rest


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def all_sums(
    pixels: Any, starts: Any, block: Any, shape: Any, images: Any, whole: Any, masks: Any, regions: Any
) -> None:
    """Every kernel on a block of frames before the next block, while it is in the cache.

    Parameters
    ----------
    pixels, starts, shape : array, (n,) int64, tuple of int
        The frames.
    block : int
        Frames that fit into the second-level cache.
    images : tuple
        Sum and maximum over frames (y*x,), each None where not wanted.
    whole : tuple
        Scratch and results (n, 3) of `whole_frames`; the scratch is None where moments aren't wanted.
    masks : tuple
        Tables, an array of the type of a section's sum, and results (n, masks) of `mask_sums`.
    regions : tuple
        Spans (k, 5), an array of the type of a span's sum, and results (n, regions, 3) of `moments_in_spans`.
    """
    total, maximum = images
    columns, whole_out = whole
    for first in range(0, starts.size, block):
        last = min(first + block, starts.size)
        some = starts[first:last]
        if total is not None or maximum is not None or columns is not None:
            whole_frames(pixels, some, shape, total, maximum, columns, whole_out[first:last])
        if masks[0][0].shape[0]:
            mask_sums(pixels, some, shape[0] * shape[1], masks[0], masks[1], masks[2][first:last])
        if regions[0].shape[0]:
            moments_in_spans(pixels, some, regions[0], regions[1], regions[2][first:last])


@reduction  # type: ignore[untyped-decorator, unused-ignore]
def all_finite(pixels: Any, starts: Any, size: Any, out: Any) -> None:
    """out[i]: frame i holds neither NaN nor infinity; times zero, only those don't vanish."""
    nothing = pixels.dtype.type(0)
    for i in range(starts.size):
        frame = pixels[starts[i] : starts[i] + size]
        vanishing = nothing
        for p in range(size):
            vanishing += frame[p] * nothing
        out[i] = vanishing == nothing


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def magnitudes(pixels: Any, starts: Any, size: Any, out: Any) -> None:
    """out[i]: the largest distance from zero in frame i, and the sum of all distances, as float64."""
    for i in range(starts.size):
        largest = 0.0
        total = 0.0
        for p in range(size):
            distance = abs(np.float64(pixels[starts[i] + p]))
            largest = max(largest, distance)
            total += distance
        out[i, 0] = largest
        out[i, 1] = total
