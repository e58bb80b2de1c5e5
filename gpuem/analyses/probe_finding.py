"""The probe as the data show it: centre, radius and edge of the direct beam's disk, found in a mean pattern.

Where a circle of radius R around c is the edge of a disk, the mean on a circle just inside exceeds that just outside by
the disk's intensity; neighbours, even overlapping ones, and a slope of the background hardly matter to the difference.
Its maximum over c and R gives the disk. Least squares then refine it, on an annulus around the edge, with

    T(r) = clip((R - r) / edge + 1/2, 0, 1)

and, as linear nuisances, an intensity and a background for each sector of the annulus (structure inside the disk and
slopes don't pull) and the disks that overlap it. Positions are (y, x) in px.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

LARGEST = 512
"""Frames with more pixels along an axis are binned for the coarse search."""

MOST_RADIUS = 72.0
"""Largest circle of the search, in (binned) px."""

SIGNIFICANT = 8.0
"""Intensity of a disk over its standard error; the best of 1e6 places in mere noise reaches 5.5."""

MOST_PIXELS = 2000
"""About so many pixels of an annulus are fitted: enough for 0.01 px."""

GIVE = "give center= and radius= (px), or a vacuum pattern"

_NOISE_MEDIAN = 0.4549
"""Median of the square of a standard normal number."""


@dataclass(frozen=True)
class FoundProbe:
    """Disk of the direct beam.

    Parameters
    ----------
    center : (float, float)
        Of the direct beam, (y, x) in px.
    radius, edge : float
        Radius at half height and full width of the linear edge, in px.
    notes : tuple of str
        What the user should know of how it was found.
    """

    center: tuple[float, float]
    radius: float
    edge: float
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """A sentence with the numbers."""
        y, x = self.center
        text = (
            f"direct beam at ({y:.2f}, {x:.2f}) px (y, x), probe radius {self.radius:.2f} px, edge {self.edge:.1f} px"
        )
        return "; ".join((text, *self.notes))


@dataclass(frozen=True)
class _Disk:
    center: tuple[float, float]
    height: float


def find_probe(mean: NDArray[Any], good: Mask) -> FoundProbe:
    """Find the disk of the direct beam.

    Parameters
    ----------
    mean : (y, x) array
        Mean pattern of a sample of the scan, or a vacuum pattern; any real type.
    good : (y, x) bool
        Pixels that count. Single hot and dead pixels are found besides.

    Raises
    ------
    DataError
        The pattern is empty or shows nothing with the edge of a disk.
    """
    values = np.asarray(mean, dtype=np.float64)
    if values.ndim != 2 or values.shape != good.shape:
        raise ValueError(f"mean pattern of shape {values.shape}, mask of good pixels of shape {good.shape}")
    usable = good & np.isfinite(values)
    values = np.where(usable, values, 0.0)
    top = float(values[usable].max()) if usable.any() else 0.0
    if top <= 0 or top == float(values[usable].min()):
        raise DataError(
            f"probe: the mean pattern of {values.shape[0]}x{values.shape[1]} px is empty ({int(usable.sum())} good "
            f"pixels, all {top:g}); look at the data, or {GIVE}"
        )
    usable = plausible(values, usable)
    noise = _noise(values, usable)
    radius, disks = _coarse(values, usable, noise)
    if not disks:
        raise DataError(f"probe: no disk rises above the noise of the mean pattern, whose maximum is {top:.3g}; {GIVE}")
    direct, pairs = _direct(disks, radius, values, usable)
    hidden = direct is None
    if direct is None or _saturated(values, usable, direct.center, radius):
        others = [d for d in disks if d is not direct][:6]
        fits = [f for d in others if (f := _refine(values, usable, noise, d, radius, disks)) is not None]
        if fits:
            # strain blurs the outer ones
            size, edge = float(np.median([f[2] for f in fits])), min(f[3] for f in fits)
            why = "hidden (beam stop?), its place is the centre of Friedel pairs" if hidden else "saturated"
            place = pairs if direct is None else direct.center
            if direct is not None and (own := _refine(values, usable, noise, direct, radius, disks)) is not None:
                place = (own[0], own[1])
            return FoundProbe(place, size, edge, (f"direct beam {why}; disk of {len(fits)} others",))
        direct = direct or disks[0]
    found = _refine(values, usable, noise, direct, radius, disks)
    if found is None:
        y, x = direct.center
        raise DataError(
            f"probe: nothing in the mean pattern has the edge of a disk; the sharpest drop, at ({y:.0f}, {x:.0f}) px "
            f"with radius {radius:.1f} px, is {direct.height:.3g} of {top:.3g} counts and not sharp or not significant "
            f"(an amorphous halo?); {GIVE}"
        )
    return FoundProbe((float(found[0]), float(found[1])), float(found[2]), float(found[3]))


def plausible(mean: Array, good: Mask) -> Mask:
    """Good pixels without single or paired hot and dead ones.

    A disk of radius 2 px or more gives each of its pixels three neighbours that are about as bright.
    """
    height, width = mean.shape
    padded = np.full((height + 2, width + 2), np.nan)
    padded[1:-1, 1:-1] = np.where(good, mean, np.nan)
    around = np.stack(
        [padded[1 + j : 1 + j + height, 1 + i : 1 + i + width] for j in (-1, 0, 1) for i in (-1, 0, 1) if j or i]
    )
    upper = np.sort(np.where(np.isnan(around), -np.inf, around), axis=0)[-3]
    lower = np.sort(np.where(np.isnan(around), np.inf, around), axis=0)[2]
    strong = 0.1 * float(np.sort(upper[np.isfinite(upper)])[-9:].min()) if upper.size > 9 else 0.0
    hot = (mean > 3 * np.maximum(upper, 0)) & (mean > strong) & np.isfinite(upper)
    dead = (mean < 0.3 * lower) & np.isfinite(lower) & (lower > strong / 10)
    return np.asarray(good & ~hot & ~dead)


def _noise(mean: Array, good: Mask) -> float:
    """Variance of a pixel of the mean over its value, from differences of neighbours, most of which see no edge."""
    a, b = mean[:, 1:], mean[:, :-1]
    total = a + b
    use = good[:, 1:] & good[:, :-1] & (total > 0)
    return float(np.median((a - b)[use] ** 2 / total[use])) / _NOISE_MEDIAN if use.any() else 0.0


# ---- the coarse search


def _binned(mean: Array, good: Mask) -> tuple[Array, Array, int]:
    """Sums of good pixels and their number, over squares of `factor` px."""
    factor = -(-max(mean.shape) // LARGEST)
    if factor == 1:
        return mean * good, good.astype(np.float64), 1
    rows, columns = (n // factor * factor for n in mean.shape)
    cut = np.s_[:rows, :columns]
    shape = (rows // factor, factor, columns // factor, factor)
    sums: list[Array] = [(v[cut].reshape(shape)).sum(axis=(1, 3)) for v in (mean * good, good.astype(np.float64))]
    return sums[0], sums[1], factor


def _circles(shape: tuple[int, int]) -> Array:
    """Radii of the circles: 1 px apart, then 9 %."""
    most = min(MOST_RADIUS, 0.5 * max(shape))
    radii = [0.0, 1.0]
    while radii[-1] < most:
        radii.append(max(radii[-1] + 1, radii[-1] * 1.09))
    return np.array(radii)


def _coarse(mean: Array, good: Mask, noise: float) -> tuple[float, list[_Disk]]:
    """Radius of the sharpest circle, and the disks of that radius, the strongest first."""
    sums, counts, factor = _binned(mean, good)
    radii = _circles(sums.shape)
    inner, outer, drop = [], [], []
    means = _circle_means(sums, counts, radii)
    for j in range(1, len(radii) - 1):
        fall = means[j - 1][0] - means[j + 1][0]
        use = (means[j - 1][1] > 0.5) & (means[j + 1][1] > 0.5)
        error = np.sqrt(noise * np.maximum(means[j - 1][0], 0) / max(2 * math.pi * radii[j - 1], 1)) / factor
        drop.append(np.where(use, fall - 2 * error, -np.inf).astype(np.float32))
        inner.append(float(drop[-1].max()))
        outer.append(int(drop[-1].argmax()))
    best = int(np.argmax(inner))
    if not math.isfinite(inner[best]):
        raise DataError(f"probe: too few good pixels, {int(good.sum())} of {good.size}; {GIVE}")
    y, x = divmod(outer[best], sums.shape[1])
    # a patterned probe has sharp rings inside; its disk ends at the outermost
    at = [float(drop[j][_box(y, x, 0.8 * radii[j + 1])].max()) for j in range(len(drop))]
    best = max(j for j in range(best, len(drop)) if j == best or at[j] >= 0.6 * inner[best])
    top = max(range(best, min(best + 2, len(drop))), key=lambda j: at[j])
    scale = radii[top + 1]
    disks = _maxima(drop[top].astype(np.float64), scale)
    to_full = (factor - 1) / 2
    full = [_Disk((d.center[0] * factor + to_full, d.center[1] * factor + to_full), d.height) for d in disks]
    return float(scale * factor), full


def _box(y: int, x: int, half: float) -> tuple[slice, slice]:
    near = max(1, round(half))
    return np.s_[max(y - near, 0) : y + near + 1, max(x - near, 0) : x + near + 1]


def _circle_means(sums: Array, counts: Array, radii: Array) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Mean on circles of each radius around each pixel, and the part of the circle that is on good pixels."""
    reach = math.ceil(radii[-1]) + 2
    shape = tuple(-(-(n + reach) // 32) * 32 for n in sums.shape)
    y, x = (np.fft.fftfreq(n, 1 / n) for n in shape)
    d = np.hypot(y[:, None], x[None, :]).astype(np.float32)
    both = np.fft.rfft2(np.stack([sums, counts]).astype(np.float32), s=shape)
    full = float(counts.max())
    cut = np.s_[: sums.shape[0], : sums.shape[1]]
    means = []
    for radius in radii:
        ring = np.clip(1 - np.abs(d - np.float32(radius)) / max(1.0, 0.04 * radius), 0, None).astype(np.float32)
        spectrum = np.fft.rfft2(ring / ring.sum())
        total, covered = np.fft.irfft2(both * spectrum, s=shape)[:, cut[0], cut[1]]
        means.append((total / np.maximum(covered, 1e-3 * full), covered / full))
    return means


def _maxima(image: Array, radius: float) -> list[_Disk]:
    """The highest places of an image, a radius apart, down to 5 % of the highest; parabolas between pixels."""
    left = image.copy()
    least, reach = 0.05 * float(image.max()), max(1, round(1.0 * radius))
    found: list[_Disk] = []
    while len(found) < 60:
        y, x = divmod(int(left.argmax()), image.shape[1])
        if not left[y, x] > least:
            break
        # what remains on the border of a square that was cleared is no maximum
        around = image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        if image[y, x] >= around.max():
            place = (y + _vertex(image[max(y - 1, 0) : y + 2, x]), x + _vertex(image[y, max(x - 1, 0) : x + 2]))
            found.append(_Disk(place, float(image[y, x])))
        left[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = -np.inf
    return found


def _vertex(three: Array) -> float:
    """Maximum of a parabola through three values, from the middle one."""
    if three.size != 3 or not np.isfinite(three).all():
        return 0.0
    bend = 2 * three[1] - three[0] - three[2]
    return float(np.clip(0.5 * (three[2] - three[0]) / bend, -0.5, 0.5)) if bend > 0 else 0.0


# ---- which of them is the direct beam


def _direct(disks: list[_Disk], radius: float, mean: Array, good: Mask) -> tuple[_Disk | None, tuple[float, float]]:
    """The direct beam, None where it is hidden; the centre of Friedel pairs."""
    first = disks[0]
    if len(disks) < 3 or first.height > 2 * disks[1].height:
        return first, first.center
    places = np.array([d.center for d in disks])
    i, j = np.triu_indices(len(disks), 1)
    middles = (places[i] + places[j]) / 2
    near = np.hypot(*(middles[:, None] - middles[None]).transpose(2, 0, 1)) < max(1.5, 0.3 * radius)
    winner = near[int(near.sum(axis=1).argmax())]
    center = middles[winner].mean(axis=0)
    pairs = (float(center[0]), float(center[1]))
    distance = np.hypot(*(places - center).T)
    closest = int(distance.argmin())
    if distance[closest] < 0.5 * radius and disks[closest].height > 0.5 * first.height:
        return disks[closest], pairs
    y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
    here = np.hypot(y - center[0], x - center[1]) < radius
    lit = good & (mean > 1e-3 * first.height)
    if winner.sum() >= 2 and here.any() and 1 - lit[here].mean() > 0.3:
        return None, pairs
    return first, pairs


def _saturated(mean: Array, good: Mask, center: tuple[float, float], radius: float) -> bool:
    """Whether a third of the disk has exactly the value of its brightest pixel."""
    y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
    inside = mean[good & (np.hypot(y - center[0], x - center[1]) < 0.8 * radius)]
    return bool(inside.size > 6 and (inside == inside.max()).mean() > 1 / 3)


# ---- the fine fit


def _edge(d: Array, radius: float, edge: float) -> Array:
    return np.asarray(np.clip((radius - d) / edge + 0.5, 0, 1))


class _Annulus:
    """Pixels around the edge of a disk, and the linear model of what is there."""

    def __init__(self, mean: Array, good: Mask, disk: _Disk, radius: float, disks: list[_Disk]) -> None:
        (cy, cx), wide = disk.center, max(3.0, 0.45 * radius)
        low, high = [], []
        for c, n in zip((cy, cx), mean.shape, strict=True):
            low.append(max(0, math.floor(c - radius - wide)))
            high.append(min(n, math.ceil(c + radius + wide) + 1))
        y, x = np.mgrid[low[0] : high[0], low[1] : high[1]].astype(np.float64)
        d = np.hypot(y - cy, x - cx)
        use = good[low[0] : high[0], low[1] : high[1]] & (np.abs(d - radius) <= wide)
        thin = slice(None, None, max(1, int(use.sum()) // MOST_PIXELS))
        self.y, self.x = y[use][thin], x[use][thin]
        self.values = mean[low[0] : high[0], low[1] : high[1]][use][thin]
        count = int(np.clip(radius, 4, 12))
        angle = np.arctan2(self.y - cy, self.x - cx) / (2 * math.pi) + 0.5
        self.sector = np.minimum((angle * count).astype(np.int64), count - 1)
        self.count = count
        self.radius = radius
        far = 2 * radius + wide
        self.others = [
            o.center
            for o in disks
            if o is not disk and radius < math.hypot(o.center[0] - cy, o.center[1] - cx) < far and o.height > 0
        ][:12]
        self.used = np.ones(self.values.size, np.bool_)

    def solve(self, p: Array) -> tuple[Array, Array]:
        """Residuals for centre, radius and edge `p`, and intensities of the sectors."""
        one_hot = np.eye(self.count)[self.sector]
        own = _edge(np.hypot(self.y - p[0], self.x - p[1]), p[2], p[3])
        others = [_edge(np.hypot(self.y - a, self.x - b), p[2], p[3]) for a, b in self.others]
        design = np.concatenate([one_hot * own[:, None], one_hot, np.reshape(others, (-1, own.size)).T], axis=1)
        design = design[self.used]
        normal = design.T @ design
        normal[np.diag_indices_from(normal)] += 1e-9 * np.trace(normal) / len(normal)
        linear = np.linalg.solve(normal, design.T @ self.values[self.used])
        return self.values[self.used] - design @ linear, linear[: self.count]

    def fit(self, p: Array) -> Array:
        """Levenberg-Marquardt from `p`."""
        residual, _ = self.solve(p)
        cost, damping = float(residual @ residual), 1e-2
        steps = np.array([0.02, 0.02, 0.02, 0.02])
        for _ in range(25):
            slopes = np.stack([(self.solve(p + d)[0] - self.solve(p - d)[0]) / 0.04 for d in np.diag(steps)], axis=1)
            normal = slopes.T @ slopes
            normal[np.diag_indices(4)] *= 1 + damping
            normal[np.diag_indices(4)] += 1e-300
            move = np.clip(-np.linalg.solve(normal, slopes.T @ residual), -0.2 * self.radius, 0.2 * self.radius)
            trial = p + move
            trial[2], trial[3] = max(trial[2], 0.5), np.clip(trial[3], 0.1, 4 * self.radius)
            tried, _ = self.solve(trial)
            if tried @ tried < cost:
                p, residual, cost, damping = trial, tried, float(tried @ tried), damping / 5
                if np.abs(move).max() < 1e-4:
                    break
            else:
                damping *= 10
                if damping > 1e6:
                    break
        return p


def _refine(
    mean: Array, good: Mask, noise: float, disk: _Disk, radius: float, disks: list[_Disk]
) -> tuple[float, float, float, float] | None:
    """Centre y, x, radius and edge of a disk by least squares; None where there is none."""
    p = np.array([*disk.center, radius, max(1.0, 0.15 * radius)])
    for _ in range(2):
        ring = _Annulus(mean, good, _Disk((p[0], p[1]), disk.height), float(p[2]), [d for d in disks if d is not disk])
        if ring.values.size < 12:
            return None
        p = ring.fit(p)
        residual, heights = ring.solve(p)
        # sectors cut by a beam stop or crossed by something else
        rms = np.array([np.sqrt(np.mean(residual[ring.sector == k] ** 2)) if (ring.sector == k).any() else np.inf
                        for k in range(ring.count)])  # fmt: skip
        middle = np.median(heights)
        fair = (heights > 0.3 * middle) & (heights < 3 * middle) & (rms < 4 * np.median(rms) + 1e-12)
        if 2 * fair.sum() > ring.count and not fair.all():
            ring.used = fair[ring.sector]
            p = ring.fit(p)
            residual, _ = ring.solve(p)
    level = float(np.median(heights))
    floor = noise * float(ring.values.mean()) * len(p)
    error = math.sqrt((float(residual @ residual) / residual.size + floor) / max(residual.size / 4, 1))
    moved = math.hypot(p[0] - disk.center[0], p[1] - disk.center[1])
    sharp = p[3] < max(2.0, min(0.9 * p[2], 6 + 0.1 * p[2])) and 1.2 < p[2] < 1.6 * radius + 1 and moved < radius
    spread = np.count_nonzero(heights > 0.2 * level)
    if not (sharp and level > SIGNIFICANT * error and 3 * spread > 2 * ring.count):
        return None
    return float(p[0]), float(p[1]), float(p[2]), float(p[3])
