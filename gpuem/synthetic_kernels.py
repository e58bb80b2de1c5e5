"""Kernels of the synthetic patterns: disks into a frame, and what pixels say of them.

`probe` is an array of radius, edge, dark rings, structure's amplitude, the matrix (xx, xy, yx, yy) that makes an
ellipse a circle, and the half sizes (y, x) of a box that holds the disk. `waves` has the structure of each disk as
(wave vector y, x, phase). Sites are centres (y, x) in px.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numpy.typing import NDArray

from gpuem.codecs.compiled import compiled

Array = NDArray[np.float64]
RING_DEPTH = 0.6
"""How much of the beam the dark rings of a patterned probe take."""

helper = numba.njit(nogil=True, error_model="numpy")


@helper
def _disk(dy: float, dx: float, probe: Array, wave: Array) -> tuple[float, float, float]:
    """Value of a disk at an offset from its centre, and its derivatives along y and x."""
    radius, edge, rings, amplitude = probe[0], probe[1], probe[2], probe[3]
    x = probe[4] * dx + probe[5] * dy
    y = probe[6] * dx + probe[7] * dy
    d = math.hypot(y, x)
    value = (radius - d) / edge + 0.5
    if value <= 0:
        return 0.0, 0.0, 0.0
    slope = -1 / edge
    if value >= 1:
        value, slope = 1.0, 0.0
    if rings > 0:
        turns = 2 * math.pi * rings / radius
        ring = 1 - 0.5 * RING_DEPTH * (1 - math.cos(turns * d))
        slope = slope * ring - value * 0.5 * RING_DEPTH * turns * math.sin(turns * d)
        value *= ring
    along = slope / d if d > 0 else 0.0
    vy, vx = along * (probe[5] * x + probe[7] * y), along * (probe[4] * x + probe[6] * y)
    if amplitude > 0:
        angle = wave[0] * dy + wave[1] * dx + wave[2]
        fringe, bend = 1 + amplitude * math.sin(angle), amplitude * math.cos(angle) * value
        value, vy, vx = value * fringe, vy * fringe + bend * wave[0], vx * fringe + bend * wave[1]
    return value, vy, vx


@compiled
def _box(cy: float, cx: float, probe: Array, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels that a disk may reach: y0, y1, x0, x1, ends excluded."""
    y0, y1 = max(math.ceil(cy - probe[8]), 0), min(math.floor(cy + probe[8]) + 1, shape[0])
    x0, x1 = max(math.ceil(cx - probe[9]), 0), min(math.floor(cx + probe[9]) + 1, shape[1])
    return int(y0), int(max(y0, y1)), int(x0), int(max(x0, x1))


@compiled
def add_disks(sites: Array, intensities: Array, probe: Array, waves: Array, out: Array) -> None:
    """Add every disk to a frame."""
    for n in range(len(sites)):
        y0, y1, x0, x1 = _box(sites[n, 0], sites[n, 1], probe, out.shape)
        for y in range(y0, y1):
            for x in range(x0, x1):
                out[y, x] += intensities[n] * _disk(y - sites[n, 0], x - sites[n, 1], probe, waves[n])[0]


@compiled
def products(sites: Array, probe: Array, waves: Array, weights: Array) -> Array:
    """Sums over pixels of weight times products of all (value, -d/dy, -d/dx) of every disk, and 1 as the last one."""
    count = len(sites)
    sums = np.zeros((3 * count + 1, 3 * count + 1))
    boxes = np.zeros((count, 4), np.int64)
    planes = np.zeros((count, int(2 * probe[8]) + 2, int(2 * probe[9]) + 2, 3))
    for n in range(count):
        y0, y1, x0, x1 = _box(sites[n, 0], sites[n, 1], probe, weights.shape)
        boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3] = y0, y1, x0, x1
        for y in range(y0, y1):
            for x in range(x0, x1):
                value, vy, vx = _disk(y - sites[n, 0], x - sites[n, 1], probe, waves[n])
                own = planes[n, y - y0, x - x0]
                own[0], own[1], own[2] = value, -vy, -vx
                for i in range(3):
                    sums[3 * n + i, 3 * count] += weights[y, x] * own[i]
    for n in range(count):
        for m in range(n + 1):
            # beyond itself only disks that overlap
            y0, x0 = max(boxes[n, 0], boxes[m, 0]), max(boxes[n, 2], boxes[m, 2])
            for y in range(y0, min(boxes[n, 1], boxes[m, 1])):
                for x in range(x0, min(boxes[n, 3], boxes[m, 3])):
                    p = planes[n, y - boxes[n, 0], x - boxes[n, 2]]
                    q = planes[m, y - boxes[m, 0], x - boxes[m, 2]]
                    for i in range(3):
                        for j in range(3):
                            sums[3 * n + i, 3 * m + j] += weights[y, x] * p[i] * q[j]
            for i in range(3):
                for j in range(3):
                    sums[3 * m + j, 3 * n + i] = sums[3 * n + i, 3 * m + j]
    sums[3 * count, : 3 * count] = sums[: 3 * count, 3 * count]
    sums[3 * count, 3 * count] = weights.sum()
    return sums
