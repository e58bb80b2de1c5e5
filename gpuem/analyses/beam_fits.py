"""Fits of one bright disk of a mean pattern: its edge, or its centre of mass. Positions are (y, x) in px.

Edge: pixels within a band around the rim are fitted by least squares with the model

    A_k S((R - d) / s) + B_k,   S(u) = 1 / (1 + exp(-u)),   d the distance from the centre,

centre, R and s common, an intensity A_k and a background B_k for each sector k of the band: structure inside the disk
and slopes around it don't pull, sectors behind a beam stop or off the detector are left out. An arc is enough.

Mass: sum w(x - c) (I - b) (x - c) = 0, with b the median of a ring around, w a window of twice the radius at half
height with a soft rim, and only pixels whose mirror image about c is good as well: what hides one side hides both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pair = tuple[float, float]

VISIBLE = 0.9
"""An edge (10 to 90 %) wider than this part of the radius is none."""

_RISE = 4.394
"""From 10 to 90 % S takes so many s."""


@dataclass(frozen=True)
class Fit:
    """A fitted disk.

    Parameters
    ----------
    center, radius : (float, float), float
        In px.
    method : {"edge", "mass"}
        Which fit.
    counts : float
        Of the disk above its surroundings, those that are on good pixels.
    y, x : (p,) int
        Pixels that took part.
    weights : (2, p) array
        How the centre (y, x) follows these pixels.
    halves : (2, 2, p) array
        The same from either half of a checkerboard alone.
    error : (2,) array or None
        Standard error from what the model leaves of the pixels; the centre of mass has no model.
    pixel : float
        Error (rms, px) that the frames do not tell: a beam far smaller than a pixel can be anywhere in it, and the rim
        of a beam stop is not known to the pixel.
    """

    center: Pair
    radius: float
    method: str
    counts: float
    y: NDArray[np.int64]
    x: NDArray[np.int64]
    weights: Array
    halves: Array
    error: Array | None
    pixel: float = 0.0


# ---- the edge


def fit_edge(mean: Array, good: Mask, center: Pair, radius: float) -> Fit | None:
    """Fit the edge of a disk near `center`; None where there is no sharp one."""
    radius = half_height(mean, good, center, radius)
    if radius < 2.0:
        return None
    p = np.array([*center, radius, max(0.3, 0.08 * radius)])
    for _ in range(3):
        band = _Band(mean, good, p)
        if band.values.size < 16:
            return None
        p = band.fit(p)
        if band.drop_odd_sectors(p):
            p = band.fit(p)
        if not (0.4 * radius < p[2] < 2.5 * radius and math.dist(p[:2], center) < 2 * radius):
            return None
    _, heights, _ = band.solve(p)
    if _RISE * p[3] > VISIBLE * p[2] or not (heights > 0).any() or p[2] < 1.8:
        return None
    return band.result(p, mean, good)


class _Band:
    """Pixels around the edge of a disk, and the model of what is there."""

    def __init__(self, mean: Array, good: Mask, p: Array) -> None:
        wide = max(3.0, 3 * _RISE / 2 * p[3], 0.3 * p[2])
        y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
        self.y, self.x = np.nonzero(good & (np.abs(np.hypot(y - p[0], x - p[1]) - p[2]) <= wide))
        self.values = mean[self.y, self.x]
        self.count = int(np.clip(p[2], 4, 12))
        turn = np.arctan2(self.y - p[0], self.x - p[1]) / (2 * math.pi) + 0.5
        self.sector = np.minimum((turn * self.count).astype(np.int64), self.count - 1)
        self._keep([k for k in range(self.count) if self._sees_both_sides(k, p)])
        # counting noise grows with the counts
        top = float(np.percentile(self.values, 90)) if self.values.size else 1.0
        self.weight = 1 / np.maximum(self.values, 0.05 * abs(top) + 1e-300)
        self._smooth_weights(p)

    def _sees_both_sides(self, k: int, p: Array) -> bool:
        distance = np.hypot(self.y - p[0], self.x - p[1])[self.sector == k]
        return bool((distance < p[2]).sum() >= 3 and (distance > p[2]).sum() >= 3)

    def _keep(self, sectors: list[int]) -> None:
        use = np.isin(self.sector, sectors)
        self.y, self.x, self.values = self.y[use], self.x[use], self.values[use]
        self.sector = np.searchsorted(sectors, self.sector[use]) if sectors else self.sector[use]
        self.count = len(sectors)
        if hasattr(self, "weight"):
            self.weight = self.weight[use]

    def _smooth_weights(self, p: Array) -> None:
        """Weights from the mean inside and outside: those of single pixels would favour what lies low by chance."""
        if not self.values.size:
            return
        inside = np.hypot(self.y - p[0], self.x - p[1]) < p[2]
        high = float(self.values[inside].mean()) if inside.any() else 1.0
        low = float(self.values[~inside].mean()) if (~inside).any() else 0.0
        step = self._step(p)[0]
        self.weight = 1 / np.maximum(low + (high - low) * step, 0.05 * abs(high) + 1e-300)

    def _step(self, p: Array) -> tuple[Array, Array, Array]:
        """S, its derivative over its argument, and the distance."""
        distance = np.maximum(np.hypot(self.y - p[0], self.x - p[1]), 1e-6)
        u = np.clip((p[2] - distance) / p[3], -40, 40)
        step = 1 / (1 + np.exp(-u))
        return step, step * (1 - step), distance

    def solve(self, p: Array) -> tuple[Array, Array, Array]:
        """Residuals, intensities of the sectors, and the design: four slopes, then the linear columns."""
        step, slope, distance = self._step(p)
        hot = np.eye(self.count)[self.sector]
        linear = np.concatenate([hot * step[:, None], hot], axis=1)
        root = np.sqrt(self.weight)[:, None]
        normal = (linear * root).T @ (linear * root)
        normal[np.diag_indices_from(normal)] += 1e-9 * np.trace(normal) / len(normal)
        found = np.linalg.solve(normal, linear.T @ (self.weight * self.values))
        height = found[: self.count][self.sector] * slope / p[3]
        slopes = np.column_stack([
            height * (self.y - p[0]) / distance, height * (self.x - p[1]) / distance, height,
            -height * (p[2] - distance) / p[3],
        ])  # fmt: skip
        return self.values - linear @ found, found[: self.count], np.concatenate([slopes, linear], axis=1)

    def _normal(self, design: Array, use: Mask | slice = slice(None)) -> Array:
        chosen = design[use]
        normal = chosen.T @ (self.weight[use][:, None] * chosen)
        scale = np.sqrt(np.maximum(np.diag(normal), 1e-300))
        normal += np.diag(1e-10 * scale**2)
        return np.asarray(normal)

    def fit(self, p: Array) -> Array:
        """Levenberg-Marquardt from `p`."""
        residual, _, design = self.solve(p)
        cost, damping = float(self.weight @ residual**2), 1e-3
        for _ in range(40):
            normal = self._normal(design)
            normal[np.arange(4), np.arange(4)] *= 1 + damping
            move = np.linalg.solve(normal, design.T @ (self.weight * residual))[:4]
            trial = p + np.clip(move, -0.2 * p[2], 0.2 * p[2])
            trial[2], trial[3] = max(trial[2], 0.5), np.clip(trial[3], 0.15, p[2])
            tried = self.solve(trial)
            now = float(self.weight @ tried[0] ** 2)
            if now <= cost:
                p, residual, design, cost, damping = trial, tried[0], tried[2], now, max(damping / 5, 1e-9)
                if np.abs(move).max() < 1e-5:
                    break
            else:
                damping *= 8
                if damping > 1e6:
                    break
        return p

    def drop_odd_sectors(self, p: Array) -> bool:
        """Leave out sectors that a beam stop cuts or something else crosses; whether there were any."""
        residual, heights, _ = self.solve(p)
        rms = np.array([np.sqrt(np.mean(residual[self.sector == k] ** 2)) for k in range(self.count)])
        middle = float(np.median(heights))
        fair = (heights > 0.3 * middle) & (heights < 3 * middle) & (rms < 3 * np.median(rms) + 1e-12)
        if fair.all() or fair.sum() < 3:
            return False
        self._keep(np.flatnonzero(fair).tolist())
        return True

    def result(self, p: Array, mean: Array, good: Mask) -> Fit | None:
        """The disk, and how its centre follows the pixels."""
        residual, _, design = self.solve(p)
        try:
            weights: Array = np.asarray(
                np.linalg.solve(self._normal(design), (design * self.weight[:, None]).T)[:2], np.float64
            )
            halves = np.zeros((2, *weights.shape))
            for k in range(2):
                use = (self.y + self.x) % 2 == k
                halves[k][:, use] = np.linalg.solve(
                    self._normal(design, use), (design[use] * self.weight[use][:, None]).T
                )[:2]
        except np.linalg.LinAlgError:
            return None
        single = 1.15 * np.sqrt((weights**2 * residual**2).sum(axis=1))
        # structure inside the disk makes whole sectors disagree; four of them fix the four parameters
        shared = np.zeros(2)
        if self.count > 5:
            sums = np.array([np.bincount(self.sector, w * residual) for w in weights])
            shared = np.sqrt((sums**2).sum(axis=1) * self.count / (self.count - 4))
        error = np.maximum(single, shared)
        y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
        inside = good & (np.hypot(y - p[0], x - p[1]) <= p[2])
        around = float(np.median(self.values[np.hypot(self.y - p[0], self.x - p[1]) > p[2]]))
        counts = float((mean[inside] - around).sum())
        return Fit(
            (float(p[0]), float(p[1])), float(p[2]), "edge", counts, self.y, self.x, weights, halves, error
        )  # fmt: skip


def half_height(mean: Array, good: Mask, center: Pair, radius: float) -> float:
    """Radius at which the mean over circles falls through the middle between disk and surroundings."""
    y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
    distance = np.hypot(y - center[0], x - center[1])
    near = good & (distance < 2.2 * radius + 2)
    ring = np.rint(2 * distance[near]).astype(np.int64)
    count = np.bincount(ring)
    profile = np.bincount(ring, mean[near]) / np.maximum(count, 1)
    at = np.arange(count.size) / 2
    inside, outside = (at <= 1.1 * radius) & (count > 2), (at > 1.3 * radius) & (count > 0)
    if not inside.any() or not outside.any():
        return radius
    # a disk may be dark inside (beam stop, structure), so the brightest rings say how bright it is
    high = float(np.percentile(profile[inside], 80))
    level = 0.5 * (high + float(np.median(profile[outside])))
    above = np.flatnonzero((profile >= level) & (count > 0) & (at <= 1.4 * radius))
    return float(at[above[-1]]) + 0.25 if above.size else radius


# ---- the centre of mass


def fit_mass(mean: Array, good: Mask, center: Pair, radius: float) -> Fit | None:
    """Centre of mass of a bright disk near `center`; None where too little of it can be seen."""
    reach = 2 * max(half_height(mean, good, center, radius), 0.6) + 1.0
    # the rest of a large detector would only cost time
    low = [max(0, math.floor(c - 2.5 * reach - 3)) for c in center]
    high = [math.ceil(c + 2.5 * reach + 4) for c in center]
    cut = np.s_[low[0] : max(high[0], low[0]), low[1] : max(high[1], low[1])]
    mean, good = mean[cut], good[cut]
    center = (center[0] - low[0], center[1] - low[1])
    whole, doubt = good, 0.0
    if reach > 6:
        good = good & ~_dark(mean, good, center, reach)
    at = _settle(mean, good, center, reach, radius)
    if at is None:
        return None
    if not np.array_equal(whole, good) and (other := _settle(mean, whole, center, reach, radius)) is not None:
        # the rim of a beam stop is not known to the pixel: a third of what leaving it out has changed
        doubt = math.dist(at, other) / 3
    _, total, window, base = _moment(mean, good, at, reach)
    if total <= 0 or (window > 0).sum() < 3:
        return None
    # how the condition changes with c: -total for a window that holds all of the beam
    slope = np.empty((2, 2))
    for k in range(2):
        step = np.eye(2)[k] * 0.5
        ends = [_moment(mean, good, at + sign * step, reach)[0] for sign in (1, -1)]
        slope[:, k] = ends[0] - ends[1]
    use = window > 0
    y, x = np.mgrid[: mean.shape[0], : mean.shape[1]]
    lever = np.stack([(y - at[0])[use], (x - at[1])[use]]) * window[use]
    try:
        weights: Array = np.asarray(-np.linalg.solve(slope, lever), np.float64)
    except np.linalg.LinAlgError:
        return None
    if not (np.linalg.eigvalsh(-(slope + slope.T) / 2) > 0.2 * total).all():
        weights = lever / total
    net = (mean[use] - base) * window[use]
    square = (y - at[0])[use] ** 2 + (x - at[1])[use] ** 2
    moment = max(float((net * square).sum() / total), 0.0)
    even = (y[use] + x[use]) % 2 == 0
    halves = np.stack([2 * weights * even, 2 * weights * ~even])
    return Fit(
        (float(at[0]) + low[0], float(at[1]) + low[1]), math.sqrt(2 * moment), "mass", total, y[use] + low[0],
        x[use] + low[1], weights, halves, None,
        math.hypot(_pixel_error(moment / 2 - 1 / 12), doubt),
    )  # fmt: skip


def _dark(mean: Array, good: Mask, center: Pair, reach: float) -> Mask:
    """Pixels behind a beam stop: below a third of what is usual at their distance from the centre or farther out."""
    y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
    ring = np.rint(np.hypot(y - center[0], x - center[1])).astype(np.int64)
    usual = np.array([
        np.median(mean[here]) if (here := good & (ring == k)).any() else -np.inf for k in range(math.ceil(reach) + 1)
    ])  # fmt: skip
    usual = np.maximum.accumulate(usual[::-1])[::-1]
    # single pixels of few counts are dark by chance
    padded, pixels = np.pad(mean * good, 1), np.pad(good.astype(np.float64), 1)
    height, width = mean.shape
    cuts = [np.s_[j : j + height, k : k + width] for j in range(3) for k in range(3)]
    smooth = sum(padded[cut] for cut in cuts) / np.maximum(sum(pixels[cut] for cut in cuts), 1)
    near = ring < usual.size
    limit = np.where(near, usual[np.minimum(ring, usual.size - 1)], -np.inf)
    return np.asarray((smooth < limit / 3) & near)


def _pixel_error(variance: float) -> float:
    """Error (rms) of the centre of mass of a Gaussian beam on pixels as large as 1.

    The sum over pixels aliases: exp(-2 pi^2 k^2 variance) sin(2 pi k x) / (pi k) for k = 1, 2, ...; without a width
    that is x less the nearest whole number, whose rms is 1 / sqrt(12). Wings and background make the measured variance
    too large by some percent, hence the factor 1.4.
    """
    k = np.arange(1, 20)
    return 1.4 * float(np.sqrt(np.sum(np.exp(-4 * np.pi**2 * k**2 * max(variance, 0.0)) / (2 * np.pi**2 * k**2))))


def _settle(mean: Array, good: Mask, center: Pair, reach: float, radius: float) -> Array | None:
    """The place about which first moments vanish; None where the iteration leaves the disk or the pattern."""
    height, width = mean.shape
    at = np.array(center)
    for _ in range(60):
        if not (-0.5 <= at[0] <= height - 0.5 and -0.5 <= at[1] <= width - 0.5):
            return None
        before, (first, total, _, _) = at, _moment(mean, good, at, reach)
        at = at + first / max(total, 1e-300)
        if math.dist(before, at) > 2 * reach or math.dist(at, center) > 3 * radius + 3:
            return None
        if math.dist(before, at) < 1e-5:
            break
    return at


def _moment(mean: Array, good: Mask, at: Array, reach: float) -> tuple[Array, float, Array, float]:
    """First moments about `at` of what exceeds the background, its sum, the window, the background."""
    height, width = mean.shape
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - at[0], x - at[1])
    ring = good & (distance > reach + 0.5) & (distance < 1.4 * reach + 1.5)
    base = float(np.median(mean[ring])) if ring.any() else float(mean[good].min())
    window = np.clip(reach + 0.5 - distance, 0, 1)
    mirror_y, mirror_x = (np.rint(2 * c - g).astype(np.int64) for c, g in zip(at, (y, x), strict=True))
    on = (mirror_y >= 0) & (mirror_y < height) & (mirror_x >= 0) & (mirror_x < width) & good
    on[on] = good[mirror_y[on], mirror_x[on]]
    window = window * on
    net = (mean - base) * window
    first = np.array([(net * (y - at[0])).sum(), (net * (x - at[1])).sum()])
    return first, float(net.sum()), window, base
