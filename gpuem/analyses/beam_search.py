"""Search of a mean pattern for bright disks, for its centre of inversion, and for pixels that show neither."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pair = tuple[float, float]

SIGNIFICANT = 8.0
"""Least intensity of the disk over its standard error; the best of 1e6 places in mere noise reaches 5.5."""

CONTRAST = 0.3
"""The disk exceeds its surroundings by at least this part of them."""

SEARCH = 64
"""Frames with more pixels along an axis are binned for the search; for a centre of inversion up to twice as many."""


@dataclass(frozen=True)
class Disk:
    """A bright disk: where, its radius (px), score, counts of a pixel above its surroundings, and these."""

    center: Pair
    radius: float
    score: float
    difference: float
    around: float


def search(mean: Array, good: Mask, noise: Array) -> list[Disk]:
    """Bright disks, the best first: significant ones, none inside another one."""
    factor = -(-max(mean.shape) // SEARCH)
    images = [_bin(image * good, factor) for image in (mean, np.ones(mean.shape), noise, mean**2 - noise)]
    size = max(images[0].shape)
    radii = [0.6 * 1.22**k for k in range(60) if 0.6 * 1.22**k < 0.5 * size]
    # circles may lie so far off the detector
    pad = math.ceil(0.35 * size)
    shape = tuple(-(-(n + 2 * pad + math.ceil(1.5 * radii[-1])) // 32) * 32 for n in images[0].shape)
    y, x = (np.fft.fftfreq(n, 1 / n) for n in shape)
    distance = np.hypot(y[:, None], x[None, :]).astype(np.float32)
    # single precision is enough for a search; numbers near 1
    scales = np.array([max(float(np.abs(image).max()), 1e-300) for image in images])
    stack = [np.pad(image / scale, pad).astype(np.float32) for image, scale in zip(images, scales, strict=True)]
    spectra = np.fft.rfft2(np.stack(stack), s=shape)
    cut = np.s_[:, : images[0].shape[0] + 2 * pad, : images[0].shape[1] + 2 * pad]
    found = []
    for radius in radii:
        (inside, area), (wide, far) = (
            (np.fft.irfft2(spectra * np.fft.rfft2(disk), s=shape)[cut] * scales[:, None, None], float(disk.sum()))
            for disk in (np.clip(r - distance + 0.5, 0, 1) for r in (radius, 1.5 * radius + 1))
        )
        found.append(_score(inside, wide - inside, area * factor**2, (far - area) * factor**2))
    score, difference, around = (np.stack(v) for v in zip(*found, strict=True))
    return _best(score, difference, around, np.array(radii), pad, factor)


def _score(inside: Array, ring: Array, area: float, ring_area: float) -> tuple[Array, Array, Array]:
    """Score, difference and surroundings of circles around all places; both sums of values, pixels, variances, squares.

    At least a fifth of the circle is on good pixels, and something of the ring.
    """
    n, m = np.maximum(inside[1], 1e-9), np.maximum(ring[1], 1e-9)
    around = ring[0] / m
    difference = inside[0] / n - around
    error = np.sqrt(np.maximum(inside[2], 0) / n**2 + np.maximum(ring[2], 0) / m**2) + 1e-300
    square = inside[3] / n - 2 * around * inside[0] / n + around**2
    even = np.minimum(difference**2 / np.maximum(square, 1e-3 * difference**2 + 1e-300), 1)
    usable = (n > 0.2 * area) & (m > 0.15 * ring_area) & (n >= 0.5)
    usable &= (difference > SIGNIFICANT * error) & (difference > CONTRAST * np.abs(around))
    return np.where(usable, difference * np.sqrt(n) * even**0.7, -np.inf), difference, around


def _bin(image: Array, factor: int) -> Array:
    """Sums over squares of `factor` px; the last ones may be smaller."""
    if factor == 1:
        return np.asarray(image)
    padded = np.pad(image, [(0, -n % factor) for n in image.shape])
    rows, columns = (n // factor for n in padded.shape)
    return np.asarray(padded.reshape(rows, factor, columns, factor).sum(axis=(1, 3)))


def _best(score: Array, difference: Array, around: Array, radii: Array, pad: int, factor: int) -> list[Disk]:
    """Up to twelve maxima over places and radii, each outside the disks before it."""
    left = score.max(axis=0)
    disks: list[Disk] = []
    scale = score.argmax(axis=0)
    y, x = np.indices(left.shape)
    while len(disks) < 12 and np.isfinite(left.max()):
        at = np.unravel_index(int(left.argmax()), left.shape)
        k = int(scale[at])
        place = tuple((float(c) - pad) * factor + (factor - 1) / 2 for c in at)
        values = (float(v[k][at]) for v in (score, difference, around))
        disks.append(Disk((place[0], place[1]), float(radii[k]) * factor, *values))
        left[np.hypot(y - at[0], x - at[1]) < 1.8 * radii[k] + 1] = -np.inf
        # circles that only contain this disk are no others
        left[(np.hypot(y - at[0], x - at[1]) < radii[scale] + radii[k]) & (radii[scale] > radii[k])] = -np.inf
    return disks


def sharpen(mean: Array, good: Mask, disk: Disk) -> Disk:
    """A small disk of a binned pattern, placed among the pixels themselves: those above half of its height."""
    factor = -(-max(mean.shape) // SEARCH)
    if factor == 1 or disk.radius > 4 * factor:
        return disk
    reach = math.ceil(disk.radius + factor)
    low = [max(0, round(c) - reach) for c in disk.center]
    cut = np.s_[low[0] : max(low[0], round(disk.center[0]) + reach + 1), low[1] : max(
        low[1], round(disk.center[1]) + reach + 1)]  # fmt: skip
    near = np.where(good[cut], mean[cut] - disk.around, 0.0)
    if not near.size or near.max() <= 0:
        return disk
    # the mean of the four brightest: one pixel may be bright by chance
    bright = near > 0.5 * float(np.sort(near, axis=None)[-4:].mean())
    y, x = np.nonzero(bright)
    weight = near[bright]
    place = (low[0] + float(np.average(y, weights=weight)), low[1] + float(np.average(x, weights=weight)))
    return replace(disk, center=place, radius=max(0.6, math.sqrt(bright.sum() / math.pi)))


def inversion(mean: Array, good: Mask, most: int = 2 * SEARCH) -> tuple[Pair, float]:
    """Centre of inversion of a pattern, and the correlation with its inverse there (1: perfect).

    With f the square root of the pattern minus its mean, 0 where hidden, sum f(x) f(s - x) over what sum f^2 there is
    of pixels x whose inverse s - x is good, is largest for s = 2 center.
    """
    factor = -(-max(mean.shape) // most)
    counts = _bin(good.astype(np.float64), factor)
    binned = _bin(mean * good, factor) / np.maximum(counts, 1)
    known = (counts > 0).astype(np.float64)
    root = np.sqrt(np.maximum(binned, 0))
    root = np.where(known > 0, root - root[known > 0].mean(), 0.0)
    shape = tuple(2 * n for n in root.shape)
    spectra = np.fft.rfft2(np.stack([root, root**2, known]), s=shape)
    product, energy, overlap = np.fft.irfft2(spectra * np.stack([spectra[0], spectra[2], spectra[2]]), s=shape)
    enough = (overlap > 0.3 * known.sum()) & (energy > 0.3 * float((root**2).sum()))
    value = np.where(enough, product / np.maximum(energy, 1e-12), -1.0)
    y, x = divmod(int(value.argmax()), value.shape[1])
    place = []
    for line, k in ((value[:, x], y), (value[y, :], x)):
        near = line[max(k - 1, 0) : k + 2]
        bend = 2 * near[1] - near[0] - near[2] if near.size == 3 else 0.0
        place.append((k + (float(0.5 * (near[2] - near[0]) / bend) if bend > 0 else 0.0)) / 2)
    to_full = (factor - 1) / 2
    return (place[0] * factor + to_full, place[1] * factor + to_full), float(value[y, x])


def is_hidden(mean: Array, good: Mask, center: Pair, radius: float) -> bool:
    """Whether a place is masked, or dark within bright surroundings: a beam stop."""
    y, x = np.ogrid[: mean.shape[0], : mean.shape[1]]
    distance = np.hypot(y - center[0], x - center[1])
    inside, ring = distance <= max(0.6 * radius, 1.5), (distance > 1.5 * radius) & (distance <= 3 * radius + 2)
    if not inside.any() or not (ring & good).any():
        return False
    if good[inside].mean() < 0.5:
        return True
    around = float(np.median(mean[ring & good]))
    return around > 0 and float(mean[inside & good].mean()) < 0.3 * around


def stray(mean: Array, good: Mask) -> Mask:
    """Pixels that are bright alone, in pairs, or in a line: no beam, however small, leaves its neighbours dark.

    A beam of a standard deviation of 0.25 px still puts 2 to 5 % of its brightest pixel's counts into the neighbours
    beside the two brightest. Where nothing else has counts such pixels are kept.
    """
    height, width = mean.shape
    padded = np.full((height + 2, width + 2), np.nan)
    padded[1:-1, 1:-1] = np.where(good, mean, np.nan)
    around = np.stack(
        [padded[1 + j : 1 + j + height, 1 + i : 1 + i + width] for j in (-1, 0, 1) for i in (-1, 0, 1) if j or i]
    )
    # NaN sorts to the end: the darker half of the neighbours is the local background
    rising = np.sort(around, axis=0)
    base = np.nan_to_num(rising[1])
    known = np.isfinite(around)
    excess = np.where(known, around - base, 0.0)
    two = np.sort(excess, axis=0)[-2:].sum(axis=0)
    left = excess.sum(axis=0) - two
    own = mean - base
    typical = float(np.median(np.abs(own[good]))) if good.any() else 0.0
    alone = good & (own > 20 * typical) & (left < 0.015 * own) & (mean > 3 * np.abs(base))
    rest = np.where(good & ~alone, mean, 0.0)
    return np.asarray(alone & bool(rest.max() > 0))
