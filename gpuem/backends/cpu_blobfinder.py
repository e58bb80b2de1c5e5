"""The fast correlation of LiberTEM-blobfinder and its lattice fit, to reproduce its numbers.

What it does is known from its documentation and from measurements (version 0.6.1): windows are cut at whole pixels and
put on a logarithmic scale, convolved (not correlated) with a template in periodic windows, and the maximum's
surroundings averaged. The logarithm makes weak disks count; the centre of mass of 5x5 pixels pulls positions towards
whole pixels. For better positions use `cpu_guided`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames
from gpuem.codecs.compiled import compiled

Pattern = Literal["circular", "radial gradient", "background subtraction"]
# half width of what the centre of mass is taken of
PATCH = 2
# pixels nearer to the refined position don't count for the elevation
NEAR = 1.5
# windows that are transformed at once stay in the second-level cache
BLOCK_NBYTES = 1 << 19

helper: Any = numba.njit(nogil=True, boundscheck=False, error_model="numpy")


@dataclass(frozen=True, eq=False)
class BlobfinderFit:
    """Correlation near expected disks and a lattice fit as libertem-blobfinder does them; on the processor only.

    Parameters
    ----------
    start : (6,) float64
        Centre, a and b as (y, x) in px.
    sites : (m, 2) int64
        Where disks are expected, in whole pixels (y, x).
    image : (2c, 2c) float32
        See `template`.
    """

    start: NDArray[np.float64]
    sites: NDArray[np.int64]
    image: NDArray[np.float32]

    @classmethod
    def of(cls, start: NDArray[np.float64], indices: NDArray[np.float64], radius: float) -> BlobfinderFit:
        """For a lattice and its reflections (h, k), with the radial gradient as the disk."""
        places = start[:2] + indices @ start[2:].reshape(2, 2)
        return cls(start, places.astype(np.int64), template("radial gradient", radius))

    @property
    def columns(self) -> int:
        """Centre, a, b, the mean distance of the disks from their sites, and the number of disks."""
        return 8


def run(fit: BlobfinderFit, frames: Frames, positions: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Fit the lattice of every frame."""
    found = np.empty((frames.starts.size, len(fit.sites), 6))
    register(frames.pixels, frames.starts, frames.shape, fit.sites, fit.image, found)
    lattices, used = fit_lattices(found, fit.start)
    out[:, :7] = lattices
    out[:, 7] = used.sum(axis=1)


def template(
    pattern: Pattern, radius: float, search: float | None = None, outer: float | None = None
) -> NDArray[np.float32]:
    """Image of the disk, (2c, 2c) px with its centre on pixel (c, c), c the search radius rounded up.

    Parameters
    ----------
    pattern : str
        "circular": a disk with an edge of 1 px. "radial gradient": rises from 0 in the middle to 1 at the rim.
        "background subtraction": the disk minus a ring up to `outer`, with a sum of zero.
    radius : float
        Radius of the disk in px.
    search : float, optional
        How far from a site a disk is looked for, in px; default twice the radius.
    outer : float, optional
        Outer radius of the ring in px; default 1.5 times the radius.
    """
    outer = 1.5 * radius if outer is None else outer
    if search is None:
        search = max(2 * radius, outer) if pattern == "background subtraction" else 2 * radius
    c = math.ceil(search)
    y, x = np.ogrid[-c:c, -c:c]
    r = np.hypot(y, x)
    if pattern == "radial gradient":
        rim = np.where(r < radius + 0.5, 2 * (radius - r), 0.0)
        return np.asarray(np.where(r < radius - 0.5, r / radius, rim), np.float32)
    disk: NDArray[Any] = np.clip(radius + 0.5 - r, 0, 1)
    if pattern == "circular":
        return np.asarray(disk, np.float32)
    ring = np.clip(outer + 0.5 - r, 0, 1) * np.clip(r - radius + 0.5, 0, 1)
    return np.asarray(disk - ring * (disk.sum() / ring.sum()), np.float32)


def register(
    pixels: NDArray[Any],
    starts: NDArray[np.int64],
    shape: tuple[int, int],
    sites: NDArray[np.int64],
    image: NDArray[np.float32],
    out: NDArray[Any],
) -> None:
    """Find disks near whole-pixel sites.

    Parameters
    ----------
    pixels, starts, shape : array, (n,) int64, tuple of int
        The frames.
    sites : (m, 2) int64
        Where disks are expected, (y, x).
    image : (2c, 2c) float32
        See `template`; any other is taken point-mirrored, as the original does.
    out : (n, m, 6) float
        Of each frame and site: pixel (y, x) of the maximum, refined (y, x), height, elevation.
    """
    side = image.shape[0]
    spectrum = np.fft.rfft2(image)
    sites = np.ascontiguousarray(sites, np.int64)
    block = max(1, BLOCK_NBYTES // max(1, 4 * side * side * len(sites)))
    for first in range(0, starts.size, block):
        some = starts[first : first + block]
        windows = np.empty((some.size, len(sites), side, side), np.float32)
        _cut(pixels, some, shape, sites, windows)
        found = np.fft.irfft2(np.fft.rfft2(windows) * spectrum, s=(side, side))
        _evaluate(found, sites, out[first : first + some.size])


def fit_lattices(
    found: NDArray[Any],
    start: NDArray[np.float64],
    tolerance: float = 3.0,
    min_weight: float = 0.1,
    min_match: int = 3,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Fit a lattice to the disks of each frame, weighted by their elevation, twice; the second time from the first's.

    A disk belongs to the lattice if it lies within `tolerance` px of a site, times the square root of the order of
    the site, and if its elevation reaches `min_weight`.

    Parameters
    ----------
    found : (n, m, 6) float
        See `register`.
    start : (6,) float64
        Centre, a and b as (y, x) in px.

    Returns
    -------
    lattices : (n, 7) float64
        Centre, a, b and the mean distance of the disks from their sites, weighted; NaN and infinity where fewer
        than `min_match` disks belong to the lattice.
    used : (n, m) bool
        Which disks those are.
    """
    lattices = np.empty((len(found), 7))
    used = np.zeros(found.shape[:2], np.bool_)
    _fit(
        np.asarray(found, np.float64), np.asarray(start, np.float64), (tolerance, min_weight, min_match), lattices, used
    )
    return lattices, used


@compiled  # type: ignore[untyped-decorator, unused-ignore]
def _cut(pixels: Any, starts: Any, shape: Any, sites: Any, windows: Any) -> None:
    """Windows around the sites, zeros off the frame, as log(1 + pixel - least of the window)."""
    height, width = shape
    side = windows.shape[2]
    for i in range(starts.size):
        for k in range(sites.shape[0]):
            window = windows[i, k]
            top, left = sites[k, 0] - side // 2, sites[k, 1] - side // 2
            least = np.float32(np.inf)
            for y in range(side):
                for x in range(side):
                    value = np.float32(0)
                    if 0 <= top + y < height and 0 <= left + x < width:
                        value = np.float32(pixels[starts[i] + (top + y) * width + left + x])
                    window[y, x] = value
                    least = min(least, value)
            for y in range(side):
                for x in range(side):
                    window[y, x] = np.log(window[y, x] - least + np.float32(1))


@compiled  # type: ignore[untyped-decorator, unused-ignore]
def _evaluate(found: Any, sites: Any, out: Any) -> None:
    side = found.shape[2]
    half = side // 2
    for i in range(found.shape[0]):
        for k in range(found.shape[1]):
            # the template's centre is on pixel (c, c): results are turned back by as much
            image = found[i, k]
            y, x = 0, 0
            for v in range(side):
                for u in range(side):
                    if image[(v + half) % side, (u + half) % side] > image[(y + half) % side, (x + half) % side]:
                        y, x = v, u
            top = np.float64(image[(y + half) % side, (x + half) % side])
            shift_y, shift_x = _mass(image, y, x)
            elevation = np.inf
            for v in range(side):
                for u in range(side):
                    # from the refined position
                    distance = np.hypot(v - y - shift_y, u - x - shift_x)
                    if distance >= NEAR:
                        lower = top - np.float64(image[(v + half) % side, (u + half) % side])
                        elevation = min(elevation, lower / distance)
            out[i, k, 0], out[i, k, 1] = sites[k, 0] - half + y, sites[k, 1] - half + x
            out[i, k, 2], out[i, k, 3] = out[i, k, 0] + shift_y, out[i, k, 1] + shift_x
            out[i, k, 4], out[i, k, 5] = top, max(elevation, 0.0)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _mass(image: Any, y: Any, x: Any) -> Any:
    """Centre of mass, from (y, x), of the square around it minus its least value; smaller at the window's border."""
    side = image.shape[0]
    half = side // 2
    reach = min(min(PATCH, min(y, x)), min(side - 1 - y, side - 1 - x))
    least = np.inf
    for v in range(y - reach, y + reach + 1):
        for u in range(x - reach, x + reach + 1):
            least = min(least, np.float64(image[(v + half) % side, (u + half) % side]))
    total, m_y, m_x = 0.0, 0.0, 0.0
    for v in range(y - reach, y + reach + 1):
        for u in range(x - reach, x + reach + 1):
            value = np.float64(image[(v + half) % side, (u + half) % side]) - least
            total += value
            m_y += (v - y) * value
            m_x += (u - x) * value
    if total <= 0.0:
        return 0.0, 0.0
    return m_y / total, m_x / total


@compiled  # type: ignore[untyped-decorator, unused-ignore]
def _fit(found: Any, start: Any, rules: Any, lattices: Any, used: Any) -> None:
    tolerance, min_weight, min_match = rules
    normal = np.empty((3, 3), np.float64)
    right = np.empty((3, 2), np.float64)
    for i in range(found.shape[0]):
        lattice = lattices[i]
        lattice[:6] = start
        lattice[6] = np.inf
        good = True
        for _ in range(2):
            if good:
                count = _assign(found[i], lattice, tolerance, min_weight, used[i], normal, right)
                good = count >= min_match and _solve(normal, right)
                if good:
                    for c in range(3):
                        lattice[2 * c], lattice[2 * c + 1] = right[c, 0], right[c, 1]
        if not good:
            lattice[:6] = np.nan
            used[i, :] = False
            continue
        lattice[6] = _error(found[i], lattice, used[i])


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _index(lattice: Any, y: Any, x: Any) -> Any:
    """Coordinates (h, k) of a position in the lattice."""
    dy, dx = y - lattice[0], x - lattice[1]
    determinant = lattice[2] * lattice[5] - lattice[3] * lattice[4]
    return (dy * lattice[5] - dx * lattice[4]) / determinant, (dx * lattice[2] - dy * lattice[3]) / determinant


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _assign(found: Any, lattice: Any, tolerance: Any, min_weight: Any, used: Any, normal: Any, right: Any) -> Any:
    """Which disks belong to the lattice, and the normal equations of the fit to them; how many."""
    length_a, length_b = np.hypot(lattice[2], lattice[3]), np.hypot(lattice[4], lattice[5])
    normal[:] = 0.0
    right[:] = 0.0
    count = 0
    for k in range(found.shape[0]):
        y, x, weight = found[k, 2], found[k, 3], found[k, 5]
        h, j = _index(lattice, y, x)
        n_h, n_j = np.rint(h), np.rint(j)
        distance = np.hypot((h - n_h) * length_a, (j - n_j) * length_b) / np.sqrt(max(1.0, np.hypot(h, j)))
        used[k] = weight >= min_weight and distance < tolerance
        if not used[k]:
            continue
        count += 1
        row = (1.0, n_h, n_j)
        for p in range(3):
            for q in range(3):
                normal[p, q] += weight * row[p] * row[q]
            right[p, 0] += weight * row[p] * y
            right[p, 1] += weight * row[p] * x
    return count


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _solve(normal: Any, right: Any) -> Any:
    """Solve three equations by Cholesky, in place; False where the disks don't span a lattice."""
    for p in range(3):
        before = normal[p, p]
        for q in range(p):
            normal[p, p] -= normal[p, q] * normal[p, q]
        if not normal[p, p] > 1e-12 * before:
            return False
        normal[p, p] = np.sqrt(normal[p, p])
        for r in range(p + 1, 3):
            for q in range(p):
                normal[r, p] -= normal[r, q] * normal[p, q]
            normal[r, p] /= normal[p, p]
    for c in range(2):
        for p in range(3):
            for q in range(p):
                right[p, c] -= normal[p, q] * right[q, c]
            right[p, c] /= normal[p, p]
        for p in range(2, -1, -1):
            for q in range(p + 1, 3):
                right[p, c] -= normal[q, p] * right[q, c]
            right[p, c] /= normal[p, p]
    return True


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _error(found: Any, lattice: Any, used: Any) -> Any:
    total, weights = 0.0, 0.0
    for k in range(found.shape[0]):
        if used[k]:
            h, j = _index(lattice, found[k, 2], found[k, 3])
            h, j = np.rint(h), np.rint(j)
            dy = found[k, 2] - lattice[0] - h * lattice[2] - j * lattice[4]
            dx = found[k, 3] - lattice[1] - h * lattice[3] - j * lattice[5]
            total += found[k, 5] * np.hypot(dy, dx)
            weights += found[k, 5]
    return total / weights
