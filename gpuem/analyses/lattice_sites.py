"""Which reflections of a lattice are worth fitting, and how the direct beam wanders over the scan.

Positions and vectors are (y, x) in px; site (h, k) lies at center + h a + k b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.lattice_finding import COVERED, FoundLattice, coverage
from gpuem.analyses.lattice_origin import SiteCounts
from gpuem.analyses.probe_finding import FoundProbe, plausible
from gpuem.errors import DataError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

SIGMAS = 4.0
"""Intensity of a reflection over its standard error."""

SEEN = 3e-5
"""Part of the direct beam's intensity that is enough where it's three times its standard error."""

FRAMES = 128
"""Frames of a sample from which intensities are measured."""


@dataclass(frozen=True, eq=False)
class Sites:
    """Reflections worth fitting, sorted by distance from the direct beam.

    Parameters
    ----------
    hk : (n, 2) int64
        Their indices.
    intensity, sigma : (n,) float64
        Mean counts per pixel over the local background, and the standard error.
    covered : (n,) float64
        Part of the disk that lies on good pixels.
    overlap : float
        Radii of a disk that neighbours share, 2 - spacing / radius; 0 where they don't touch.
    """

    hk: NDArray[np.int64]
    intensity: Array
    sigma: Array
    covered: Array
    overlap: float

    def describe(self) -> str:
        """A sentence with the numbers."""
        text = f"{len(self.hk)} disks"
        cut = int(np.count_nonzero(self.covered < 0.98))
        if cut:
            text += f", {cut} of them cut by the edge or by bad pixels"
        return f"{text}, neighbours overlap by {self.overlap:.2f} radii" if self.overlap > 0 else text


def sites(
    lattice: FoundLattice, shape: tuple[int, int], probe: FoundProbe, mean: NDArray[Any], good: Mask,
    frames: NDArray[Any],
) -> Sites:  # fmt: skip
    """Reflections that lie on the detector and are there.

    Parameters
    ----------
    lattice : FoundLattice
        Where to look.
    shape : (int, int)
        Of the detector (y, x).
    probe : FoundProbe
        Disk.
    mean : (y, x) array
        Mean pattern of the sample.
    good : (y, x) bool
        Pixels that count.
    frames : (n, y, x) array
        Sample that `lattice.frames` are indices into.

    Raises
    ------
    DataError
        Fewer than three reflections, or all in one line.
    """
    found = measure_sites(lattice, shape, probe, mean, good, frames)
    basis = np.array([lattice.a, lattice.b])
    keep = np.isfinite(found.intensity)
    hk, covered = found.hk[keep], found.covered[keep]
    intensity, sigma = found.intensity[keep], found.sigma[keep]
    top = float(intensity.max(initial=0.0))
    there = (intensity > SIGMAS * sigma) | ((intensity > SEEN * top) & (intensity > 3 * sigma))
    there |= ~hk.any(axis=1)
    order = np.flatnonzero(there)
    order = order[np.argsort(np.hypot(*(hk[order] @ basis).T), kind="stable")]
    if len(order) < 3 or np.linalg.matrix_rank(hk[order]) < 2:
        (ay, ax), (by, bx), (y, x) = lattice.a, lattice.b, lattice.center
        raise DataError(
            f"lattice: {len(order)} of {len(hk)} reflections on the detector rise above the background, of the lattice "
            f"a = ({ay:.4g}, {ax:.4g}), b = ({by:.4g}, {bx:.4g}) px (y, x) around ({y:.4g}, {x:.4g}); three that "
            "aren't in one line are needed. Are center, a, b and radius right where they were given? Else choose a "
            "region that is crystal, or more frames"
        )
    a, b = basis
    spacing = min(math.hypot(*v) for v in (a, b, a - b, a + b))
    return Sites(hk[order], intensity[order], sigma[order], covered[order], max(0.0, 2 - spacing / probe.radius))


def measure_sites(
    lattice: FoundLattice, shape: tuple[int, int], probe: FoundProbe, mean: NDArray[Any], good: Mask,
    frames: NDArray[Any],
) -> SiteCounts:  # fmt: skip
    """How bright all sites of a lattice on the detector are, in the frames that have it; parameters as of `sites`."""
    if mean.shape != shape or good.shape != shape or frames.shape[1:] != shape:
        raise ValueError(f"detector {shape}, mean {mean.shape}, mask {good.shape}, frames {frames.shape[1:]}")
    basis, center = np.array([lattice.a, lattice.b]), np.array(lattice.center)
    hk = _all(basis, center, shape)
    places = center + hk @ basis
    usable = plausible(np.where(good, mean, 0).astype(np.float64), good)
    covered = coverage(usable, probe, places)
    seen = np.flatnonzero(covered >= COVERED)
    own = lattice.frames if lattice.frames.size else np.arange(len(frames))
    own = own[np.unique(np.linspace(0, own.size - 1, min(own.size, FRAMES)).astype(np.int64))]
    chosen = np.asarray(frames[own]).reshape(own.size, -1)
    intensity, sigma, level = np.full((3, len(hk)), np.nan)
    for n, (at, w) in zip(seen.tolist(), (_weights(n, places[seen], probe, usable) for n in range(seen.size)),
                          strict=True):  # fmt: skip
        pixels = chosen[:, at].astype(np.float64)
        values = pixels @ w
        intensity[n] = values.mean()
        # few frames tell little of the scatter: then counting is what is known
        scatter = values.std(ddof=1) if own.size >= 8 else math.sqrt(float(np.abs(pixels.mean(axis=0)) @ w**2))
        sigma[n] = scatter / math.sqrt(own.size)
        level[n] = (pixels @ np.maximum(w, 0)).mean()
    everything = coverage(np.ones_like(usable), probe, places)
    return SiteCounts(hk, places, intensity, sigma, level, covered, (covered < COVERED) & (everything >= COVERED))


def _all(basis: Array, center: Array, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Indices of all sites on the detector."""
    corners = np.array([[y, x] for y in (0, shape[0] - 1) for x in (0, shape[1] - 1)], dtype=np.float64)
    exact = (corners - center) @ np.linalg.inv(basis)
    low, high = np.floor(exact.min(axis=0)).astype(int), np.ceil(exact.max(axis=0)).astype(int)
    grid = np.mgrid[low[0] : high[0] + 1, low[1] : high[1] + 1].reshape(2, -1).T
    places = center + grid @ basis
    inside = np.all((places >= 0) & (places <= np.array(shape) - 1), axis=1)
    return np.asarray(grid[inside], np.int64)


def _weights(which: int, places: Array, probe: FoundProbe, good: Mask) -> tuple[NDArray[np.int64], Array]:
    """Flat pixels and weights whose sum is the mean in a disk minus that in a ring free of other disks."""
    center = places[which]
    reach = math.ceil(2 * probe.radius + 2)
    low = [max(0, math.floor(c) - reach) for c in center]
    high = [min(n, math.ceil(c) + reach + 1) for c, n in zip(center, good.shape, strict=True)]
    y, x = np.mgrid[low[0] : high[0], low[1] : high[1]]
    use = good[low[0] : high[0], low[1] : high[1]]
    d = np.hypot(y - center[0], x - center[1])
    rim = probe.radius + probe.edge / 2
    others = places[(np.hypot(*(places - center).T) < reach + 2 * rim) & (np.arange(len(places)) != which)]
    nearest = np.full(d.shape, np.inf)
    for oy, ox in others:
        nearest = np.minimum(nearest, np.hypot(y - oy, x - ox))
    disk = use & (d <= probe.radius)
    ring = use & (d > rim + 1) & (d < 2 * probe.radius + 1.5)
    free = ring & (nearest > rim + 1)
    # between disks that overlap nothing is free: what is farthest from all of them comes closest
    if free.sum() < 6:
        gap = np.minimum(d, nearest)
        free = use & (gap >= np.quantile(gap[use], 0.97)) & ~disk if use.any() else ring
    weight = disk / max(int(disk.sum()), 1) - free / max(int(free.sum()), 1)
    at = np.flatnonzero(weight)
    flat = (y * good.shape[1] + x).ravel()[at]
    return flat, weight.ravel()[at].astype(np.float64)


def centre_plane(positions: NDArray[np.int64], scan_shape: Sequence[int], centers: NDArray[Any]) -> Array:
    """The plane through the centres over the scan (descan), robust against wrong ones.

    Parameters
    ----------
    positions : (n,) int64
        Flat scan positions.
    scan_shape : tuple of int
        The last axis is the fast one, all others together the slow one.
    centers : (n, 2) array
        (y, x) in px; rows that aren't finite are left out.

    Returns
    -------
    (3, 2) float64
        Rows: at scan position 0, slope per slow step, slope per fast step; columns y, x. Slopes that the positions
        don't tell are 0. The centre at (i, j) is P[0] + i P[1] + j P[2].
    """
    fast = int(scan_shape[-1]) if len(scan_shape) else 1
    wanted = np.isfinite(centers).all(axis=1)
    if not wanted.any():
        raise DataError(f"descan: none of {len(centers)} frames has a centre; give center= (px, (y, x))")
    where, values = np.asarray(positions)[wanted], np.asarray(centers, dtype=np.float64)[wanted]
    slow, quick = (where // fast).astype(np.float64), (where % fast).astype(np.float64)
    middle = np.array([slow.mean(), quick.mean()])
    size = np.maximum([np.ptp(slow), np.ptp(quick)], 1.0)
    design = np.column_stack([np.ones(len(where)), (slow - middle[0]) / size[0], (quick - middle[1]) / size[1]])
    if len(where) < 6:
        plane = np.zeros((3, 2))
        plane[0] = np.median(values, axis=0)
        return plane
    weight = np.ones(len(where))
    solved = np.zeros((3, 2))
    for step in range(20):
        root = np.sqrt(weight)[:, None]
        solved = np.linalg.lstsq(design * root, values * root, rcond=1e-9)[0]
        off = np.hypot(*(values - design @ solved).T)
        scale = max(1.8 * float(np.median(off)), 1e-9)
        # Tukey's biweight once Cauchy has found what most agree on
        weight = 1 / (1 + (off / scale) ** 2) ** 2 if step < 8 else np.clip(1 - (off / (4 * scale)) ** 2, 1e-12, 1) ** 2
    slopes = solved[1:] / size[:, None]
    return np.concatenate([solved[:1] - middle[None] @ slopes, slopes])


def describe(probe: FoundProbe, lattices: Sequence[FoundLattice], found: Sites | None = None) -> list[str]:
    """What was found, in lines for people."""
    grains = [lattice for lattice in lattices if lattice.kind == "grain"]
    lines = [probe.describe()]
    for number, lattice in enumerate(grains):
        head = f"grain {number + 1}: " if len(grains) > 1 else ""
        lines.append(head + lattice.describe() + (f", {found.describe()}" if found is not None and number == 0 else ""))
    lines += [f"second choice: {lattice.describe()}" for lattice in lattices if lattice.kind == "second"]
    return lines
