"""Numba kernels over blocks of frames: compiled once, cached, without the GIL, one thread each.

A frame is a contiguous stretch of the flat array `pixels`, found by `starts`. Integer pixels are accumulated in 32-bit
lanes over as many terms as surely fit, then in 64 bits: exact. Inner loops are written so that LLVM can turn them into
vector code: few arrays, no branches, 32-bit casts everywhere (Numba would widen to 64 bits otherwise).
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# 65535 * 256 * 257 / 2 < 2^32: twice-accumulated uint16 columns of a band fit in 32 bits; int16 in 31
BAND = 256
# columns per strip: the accumulators of a strip stay in the first-level cache, at distances known to the compiler
STRIP = 256
# pixels whose products with a weight are added in the weight's own precision before they go to float64
PANEL = 512

kernel = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
# sums of floats may be reordered into vector lanes: the order then depends on the processor, never on the tiling
reduction = numba.njit(
    nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath={"reassoc", "nsz", "contract"}
)


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def frame_sum(pixels: Any, starts: Any, total: Any) -> None:
    """Add every frame to `total` (y*x,), frame after frame."""
    cast = total.dtype.type
    size = total.size
    quads = starts.size // 4 * 4
    for i in range(0, quads, 4):
        a = pixels[starts[i] : starts[i] + size]
        b = pixels[starts[i + 1] : starts[i + 1] + size]
        c = pixels[starts[i + 2] : starts[i + 2] + size]
        d = pixels[starts[i + 3] : starts[i + 3] + size]
        for p in range(size):
            total[p] = cast(cast(cast(cast(total[p] + cast(a[p])) + cast(b[p])) + cast(c[p])) + cast(d[p]))
    for i in range(quads, starts.size):
        a = pixels[starts[i] : starts[i] + size]
        for p in range(size):
            total[p] = cast(total[p] + cast(a[p]))


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def frame_max(pixels: Any, starts: Any, maximum: Any) -> None:
    """Raise `maximum` (y*x,) to the brightest value that each pixel had."""
    size = maximum.size
    quads = starts.size // 4 * 4
    for i in range(0, quads, 4):
        a = pixels[starts[i] : starts[i] + size]
        b = pixels[starts[i + 1] : starts[i + 1] + size]
        c = pixels[starts[i + 2] : starts[i + 2] + size]
        d = pixels[starts[i + 3] : starts[i + 3] + size]
        for p in range(size):
            maximum[p] = max(max(maximum[p], a[p]), max(max(b[p], c[p]), d[p]))
    for i in range(quads, starts.size):
        a = pixels[starts[i] : starts[i] + size]
        for p in range(size):
            maximum[p] = max(maximum[p], a[p])


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def moments(pixels: Any, starts: Any, shape: Any, columns: Any, out: Any) -> None:
    """Sum, y- and x-weighted sum of whole frames, added to `out` (n, 3).

    Column sums are accumulated twice: the second accumulator holds the running sum of the first, that is
    sum((rows - y) * pixel), from which the y-moment follows without one multiplication per pixel.
    `columns` is scratch of 2 * STRIP elements in the accumulator's type.
    """
    height, width = shape
    cast = columns.dtype.type
    wide = out.dtype.type
    for i in range(starts.size):
        for x0 in range(0, width, STRIP):
            n = min(STRIP, width - x0)
            for y0 in range(0, height, BAND):
                m = min(BAND, height - y0)
                _accumulate_twice(pixels, starts[i] + y0 * width + x0, width, m, n, columns, cast)
                band = wide(0)
                band_x = wide(0)
                twice = wide(0)
                for x in range(n):
                    column = wide(columns[x])
                    band += column
                    band_x += wide(x) * column
                    twice += wide(columns[STRIP + x])
                out[i, 0] += band
                out[i, 1] += wide(m + y0) * band - twice
                out[i, 2] += band_x + wide(x0) * band


@numba.njit(nogil=True, boundscheck=False, error_model="numpy", inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def _accumulate_twice(pixels: Any, start: Any, width: Any, rows: Any, n: Any, columns: Any, cast: Any) -> None:
    """Column sums of a band into columns[:n], their running sums into columns[STRIP : STRIP + n]."""
    for x in range(2 * STRIP):
        columns[x] = cast(0)
    quads = rows // 4 * 4
    for y in range(0, quads, 4):
        row = start + y * width
        a = pixels[row : row + n]
        b = pixels[row + width : row + width + n]
        c = pixels[row + 2 * width : row + 2 * width + n]
        d = pixels[row + 3 * width : row + 3 * width + n]
        for x in range(n):
            s1 = cast(columns[x] + cast(a[x]))
            s2 = cast(s1 + cast(b[x]))
            s3 = cast(s2 + cast(c[x]))
            s4 = cast(s3 + cast(d[x]))
            columns[x] = s4
            columns[x + STRIP] = cast(columns[x + STRIP] + cast(cast(s1 + s2) + cast(s3 + s4)))
    for y in range(quads, rows):
        a = pixels[start + y * width : start + y * width + n]
        for x in range(n):
            s1 = cast(columns[x] + cast(a[x]))
            columns[x] = s1
            columns[x + STRIP] = cast(columns[x + STRIP] + s1)


@reduction  # type: ignore[untyped-decorator, unused-ignore]
def mask_sums(pixels: Any, starts: Any, spans: Any, narrow: Any, out: Any) -> None:
    """Add to `out` (n, masks) the sums over spans (first pixel, end, mask) of at most 65536 pixels.

    `narrow` is an array of the type in which a span surely fits; only its type is used.
    """
    cast = narrow.dtype.type
    wide = out.dtype.type
    for i in range(starts.size):
        for k in range(spans.shape[0]):
            span = pixels[starts[i] + spans[k, 0] : starts[i] + spans[k, 1]]
            s = cast(0)
            for p in range(span.size):
                s = cast(s + cast(span[p]))
            out[i, spans[k, 2]] += wide(s)


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


@reduction  # type: ignore[untyped-decorator, unused-ignore]
def image_sums(pixels: Any, starts: Any, images: Any, out: Any) -> None:
    """Add to `out` (n, images) the sums of pixel times weight, `images` (4k, y*x) in float32 or float64.

    Four frames and four images at a time: sixteen accumulators stay in registers and every loaded value is used four
    times. A panel is added up in the weights' precision, panels in float64.
    """
    cast = images.dtype.type
    n, size = starts.size, images.shape[1]
    for p0 in range(0, size, PANEL):
        p1 = min(p0 + PANEL, size)
        for i in range(0, n, 4):
            a = pixels[starts[i] + p0 : starts[i] + p1]
            b = pixels[starts[min(i + 1, n - 1)] + p0 : starts[min(i + 1, n - 1)] + p1]
            c = pixels[starts[min(i + 2, n - 1)] + p0 : starts[min(i + 2, n - 1)] + p1]
            d = pixels[starts[min(i + 3, n - 1)] + p0 : starts[min(i + 3, n - 1)] + p1]
            for k in range(0, images.shape[0], 4):
                w, x, y, z = images[k, p0:p1], images[k + 1, p0:p1], images[k + 2, p0:p1], images[k + 3, p0:p1]
                aw = ax = ay = az = bw = bx = by = bz = cast(0)
                cw = cx = cy = cz = dw = dx = dy = dz = cast(0)
                for p in range(p1 - p0):
                    va, vb, vc, vd = cast(a[p]), cast(b[p]), cast(c[p]), cast(d[p])
                    ww, wx, wy, wz = w[p], x[p], y[p], z[p]
                    aw, ax, ay, az = aw + va * ww, ax + va * wx, ay + va * wy, az + va * wz
                    bw, bx, by, bz = bw + vb * ww, bx + vb * wx, by + vb * wy, bz + vb * wz
                    cw, cx, cy, cz = cw + vc * ww, cx + vc * wx, cy + vc * wy, cz + vc * wz
                    dw, dx, dy, dz = dw + vd * ww, dx + vd * wx, dy + vd * wy, dz + vd * wz
                sums = ((aw, ax, ay, az), (bw, bx, by, bz), (cw, cx, cy, cz), (dw, dx, dy, dz))
                for f in range(min(4, n - i)):
                    for j in range(min(4, out.shape[1] - k)):
                        out[i + f, k + j] += sums[f][j]


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def all_sums(
    pixels: Any, starts: Any, block: Any, shape: Any, spans: Any, columns: Any, images: Any, frames: Any
) -> None:
    """Every kernel on a block of frames before the next block, while it is in the cache.

    Parameters
    ----------
    pixels : (m,) array
        Pixels of all frames.
    starts : (n,) int64
        First pixel of each frame.
    block : int
        Frames that fit into the second-level cache.
    shape : tuple of int
        Detector shape (y, x).
    spans : tuple of int64 arrays
        Regions whose moments are those of the whole detector (k,), spans of masks (k, 3), spans of regions (k, 5).
    columns : (2 * STRIP,) array
        Scratch; its type is that of sums that surely fit.
    images : tuple of flat arrays
        Total and maximum over frames; empty where not wanted.
    frames : tuple of arrays
        Mask sums (n, masks) and moments (n, regions, 3), added to.
    """
    whole, mask_spans, region_spans = spans
    total, maximum = images
    masks, regions = frames
    for first in range(0, starts.size, block):
        last = min(first + block, starts.size)
        some = starts[first:last]
        for k in range(whole.size):
            moments(pixels, some, shape, columns, regions[first:last, whole[k]])
        if total.size:
            frame_sum(pixels, some, total)
        if maximum.size:
            frame_max(pixels, some, maximum)
        if mask_spans.shape[0]:
            mask_sums(pixels, some, mask_spans, columns, masks[first:last])
        if region_spans.shape[0]:
            moments_in_spans(pixels, some, region_spans, columns, regions[first:last])


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def all_finite(pixels: Any, starts: Any, size: Any, out: Any) -> None:
    """out[i]: frame i holds neither NaN nor infinity."""
    for i in range(starts.size):
        finite = True
        for p in range(size):
            finite &= math.isfinite(pixels[starts[i] + p])
        out[i] = finite


@kernel  # type: ignore[untyped-decorator, unused-ignore]
def largest_magnitude(pixels: Any, starts: Any, size: Any, out: Any) -> None:
    """out[i]: the largest distance from zero in frame i, as float64."""
    for i in range(starts.size):
        largest = 0.0
        for p in range(size):
            largest = max(largest, abs(np.float64(pixels[starts[i] + p])))
        out[i] = largest
