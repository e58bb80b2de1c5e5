"""The direct beam as a sample of frames shows it: centre, radius, and how sure they are.

Where it is. For circles of many radii r around every place, also off the detector, with D the mean of the pattern
inside r and B the mean between r and 1.5 r, both over good pixels only, the score is (D - B) sqrt(n) h^0.7, n good
pixels inside. By Cauchy and Schwarz it is largest for the circle that coincides with the brightest disk. h, the square
of the mean of I - B inside over the mean of its square, is 1 for an even disk and small for a circle around many disks.
Of several that reach three quarters of the best the one nearest to the centre of inversion of the pattern is taken.
Where that centre lies elsewhere, and is masked or darker than all around it (beam stop), it is the answer.

Its centre. The mean pattern near the rim of the disk is fitted (`beam_fits`): the edge, or where there is no sharp edge
the centre of mass of the bright disk. Both are linear in small changes of a frame: t_i = G (frame_i - mean), so that
each frame tells its own centre c + t_i.

How sure. sigma is the scatter of the t_i about a plane over the scan, divided by the square root of the number of
frames: counting noise, camera noise and what the specimen does to the disk alike, whatever the gain. Few frames do not
tell their scatter, and a model that does not fit has an error of its own: so sigma is at least what the residuals of
the edge's fit make of G, each pixel by itself or each sector of the edge as a whole. ``spread`` is how far the beam
wanders from frame to frame (descan): the square root of the covariance of the t_i from the two halves of a
checkerboard, in which noise cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.beam_fits import Fit, fit_edge, fit_mass
from gpuem.analyses.beam_search import CONTRAST, SEARCH, SIGNIFICANT, Disk, inversion, is_hidden, search, sharpen, stray
from gpuem.errors import DataError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pair = tuple[float, float]

RIVAL = 0.75
"""Disks with this part of the highest score may be the direct beam, too."""

FEW = 16
"""Fewer frames do not tell their own scatter."""

FINEST = 0.002
"""No centre is said to be better known than this, in px: pixels are not points."""

_BLOCK = 1 << 22
"""Bytes of frames in double precision at once."""

_GIVE = "give center = [y, x] (px)"


@dataclass(frozen=True)
class DirectBeam:
    """The direct beam on the detector.

    Parameters
    ----------
    center : (float, float)
        Mean over the frames, (y, x) in px.
    sigma : (float, float)
        One standard error of `center`.
    radius : float
        Of the disk at half height, in px; without a visible edge that of a uniform disk with the same second moment.
    spread : (float, float)
        Standard deviation of the beam's place from frame to frame, without the noise, in px: how far descan moves it.
    method : {"edge", "mass", "symmetry"}
        Fit of the disk's edge; centre of mass of the bright disk; centre of inversion, where the beam itself is hidden.
    counts : float
        Of the disk above its surroundings, mean per frame; 0 where it is hidden.
    frames : int
        How many were looked at.
    """

    center: Pair
    sigma: Pair
    radius: float
    spread: Pair
    method: str
    counts: float
    frames: int

    def describe(self) -> str:
        """A sentence with the numbers."""
        (y, x), (sy, sx), (wy, wx) = self.center, self.sigma, self.spread
        how = {
            "edge": f"radius {self.radius:.2f} px, from its edge",
            "mass": f"radius {self.radius:.2f} px (second moment), from its centre of mass",
            "symmetry": "hidden; from the symmetry of the pattern",
        }[self.method]
        text = f"direct beam at ({y:.2f}, {x:.2f}) +- ({sy:.2g}, {sx:.2g}) px (y, x), {how}, {self.frames:,} frames"
        return text + (f"; it wanders by ({wy:.2g}, {wx:.2g}) px over the scan" if max(wy, wx) > 0.05 else "")

    @property
    def attributes(self) -> dict[str, Any]:
        """Plain values for a map's attributes."""
        return {
            "direct_beam_y": self.center[0],
            "direct_beam_x": self.center[1],
            "direct_beam_sigma_y": self.sigma[0],
            "direct_beam_sigma_x": self.sigma[1],
            "direct_beam_radius": self.radius,
            "direct_beam_spread_y": self.spread[0],
            "direct_beam_spread_x": self.spread[1],
            "direct_beam_method": self.method,
        }


def measure_direct_beam(
    frames: NDArray[Any], hidden: Mask | None = None, coordinates: NDArray[Any] | None = None
) -> DirectBeam:
    """Measure the direct beam.

    Parameters
    ----------
    frames : (n, y, x) or (y, x) array
        Frames of one scan, any real type; NaN counts as hidden.
    hidden : (y, x) bool, optional
        Pixels that don't count: beam stop, dead pixels. Single hot and dead pixels are found besides.
    coordinates : (n, k) array, optional
        Scan coordinates of the frames; a plane over them is descan, not error. Default their order.

    Raises
    ------
    DataError
        There is nothing to measure: no counts, no disk above the noise, or too much of it hidden.
    """
    frames = frames[None] if frames.ndim == 2 else frames
    mean = np.mean(frames, axis=0, dtype=np.float64)
    good = np.isfinite(mean) if hidden is None else np.isfinite(mean) & ~hidden
    mean = np.where(good, mean, 0.0)
    if not good.any() or not mean.max() > 0 or mean[good].max() == mean[good].min():
        raise DataError(
            f"direct beam: the mean of {len(frames):,} frames of {mean.shape[0]}x{mean.shape[1]} px is empty "
            f"({int(good.sum()):,} good pixels, all {float(mean[good].max()) if good.any() else 0:g}); {_GIVE}"
        )
    good &= ~stray(mean, good)
    noise = _noise(frames, mean, good)
    disk, symmetric = _choose(mean, good, noise)
    if disk is None:
        return _by_symmetry(frames, mean, good, symmetric)
    fit = fit_edge(mean, good, disk.center, disk.radius) or fit_mass(mean, good, disk.center, disk.radius)
    if fit is None:
        raise DataError(
            f"direct beam: the brightest disk, at ({disk.center[0]:.0f}, {disk.center[1]:.0f}) px with radius "
            f"{disk.radius:.1f} px, is {disk.difference:.3g} counts above {disk.around:.3g} around it and has neither "
            f"an edge nor enough good pixels on both sides of its centre; {_GIVE}"
        )
    sigma, spread = _uncertainty(frames, fit, noise, coordinates)
    return DirectBeam(fit.center, sigma, fit.radius, spread, fit.method, fit.counts, len(frames))


def _noise(frames: NDArray[Any], mean: Array, good: Mask) -> Array:
    """Variance of each pixel of the mean: from the frames, or from neighbours where there are few."""
    if len(frames) >= FEW:
        # some rows at a time: the sample in double precision would be several times as large
        step = max(1, _BLOCK // (8 * len(frames) * mean.shape[1]))
        rows = [frames[:, k : k + step].var(axis=0, dtype=np.float64) for k in range(0, mean.shape[0], step)]
        return np.concatenate(rows) / len(frames)
    total, difference = mean[:, 1:] + mean[:, :-1], mean[:, 1:] - mean[:, :-1]
    use = good[:, 1:] & good[:, :-1] & (total > 0)
    # the median of the square of a standard normal number is 0.4549
    part = float(np.median(difference[use] ** 2 / total[use])) / 0.4549 if use.any() else 0.0
    return part * np.abs(mean)


# ---- where it is


def _choose(mean: Array, good: Mask, noise: Array) -> tuple[Disk | None, tuple[Pair, float]]:
    """The disk of the direct beam, None where it is hidden; centre of inversion and how well it is one."""
    disks = search(mean, good, noise)
    symmetric = inversion(mean, good, SEARCH)
    best = disks[0] if disks else None
    elsewhere = best is None or math.dist(symmetric[0], best.center) > best.radius
    radius = best.radius if best else 0.05 * max(mean.shape)
    if elsewhere and symmetric[1] > 0.6 and is_hidden(mean, good, symmetric[0], radius):
        return None, inversion(mean, good)
    if best is None:
        raise DataError(
            f"direct beam: no disk rises {SIGNIFICANT:g} standard errors and {CONTRAST:.0%} above its surroundings in "
            f"the mean pattern, whose values reach from {float(mean[good].min()):.3g} to "
            f"{float(mean[good].max()):.3g}; {_GIVE}"
        )
    rivals = [disk for disk in disks if disk.score >= RIVAL * best.score]
    if len(rivals) > 1 and symmetric[1] > 0.6:
        best = min(rivals, key=lambda disk: math.dist(disk.center, symmetric[0]))
    return sharpen(mean, good, best), symmetric


def _by_symmetry(frames: NDArray[Any], mean: Array, good: Mask, symmetric: tuple[Pair, float]) -> DirectBeam:
    """A hidden beam: centre of inversion; sigma from the scatter among parts of the frames, a tenth of a px without."""
    groups = min(8, len(frames))
    places = np.array(
        [inversion(np.where(good, frames[k::groups].mean(axis=0, dtype=np.float64), 0), good)[0] for k in range(groups)]
    )
    if groups > 3:
        sy, sx = (max(float(v), 0.02) for v in places.std(axis=0, ddof=1) / math.sqrt(groups))
    else:
        sy = sx = 0.1
    return DirectBeam(symmetric[0], (sy, sx), 0.0, (0.0, 0.0), "symmetry", 0.0, len(frames))


# ---- how sure


def _uncertainty(frames: NDArray[Any], fit: Fit, noise: Array, coordinates: NDArray[Any] | None) -> tuple[Pair, Pair]:
    """One standard error of the centre, and how far the beam wanders from frame to frame; (y, x) each."""
    n = len(frames)
    pixel = math.hypot(fit.pixel, FINEST)
    if fit.error is None:
        floor = np.hypot(np.sqrt((fit.weights**2 * noise[fit.y, fit.x]).sum(axis=1)), pixel)
    else:
        floor = fit.error
    whole, halves = np.empty((n, 2)), np.empty((n, 2, 2))
    for first in range(0, n, 64):
        part = frames[first : first + 64][:, fit.y, fit.x].astype(np.float64)
        whole[first : first + 64] = part @ fit.weights.T
        halves[first : first + 64] = np.einsum("np,hcp->nhc", part, fit.halves)
    if n < FEW:
        return (float(floor[0]), float(floor[1])), (0.0, 0.0)
    where = np.arange(n)[:, None] if coordinates is None else np.asarray(coordinates, np.float64).reshape(n, -1)
    design = np.column_stack([np.ones(n), (where - where.mean(axis=0)) / np.maximum(np.ptp(where, axis=0), 1)])
    left = whole - design @ np.linalg.lstsq(design, whole, rcond=None)[0]
    free = max(n - np.linalg.matrix_rank(design), 1)
    error = np.hypot(np.sqrt((left**2).sum(axis=0) / free / n), pixel)
    if fit.error is not None:
        error = np.maximum(error, floor)
    centred = halves - halves.mean(axis=0)
    spread = np.sqrt(np.maximum((centred[:, 0] * centred[:, 1]).sum(axis=0) / (n - 1), 0))
    # what noise alone makes of the covariance is no wandering
    doubt = np.sqrt((centred[:, 0] ** 2).sum(axis=0) * (centred[:, 1] ** 2).sum(axis=0)) / (n - 1) / math.sqrt(n)
    spread = np.where(spread**2 > 3 * doubt, spread, 0.0)
    return (float(error[0]), float(error[1])), (float(spread[0]), float(spread[1]))
