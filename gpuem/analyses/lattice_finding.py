"""The lattice as the data show it: basis, centre and grains, from peaks of a sample of frames.

Frames are correlated with the probe's disk minus a ring; the differences of peaks vote for vectors, pairs of these are
fitted to every frame and judged by the share of the correlation intensity on their sites and by how many sites are
empty (`lattice_voting`). Frames that another lattice explains form another grain. Positions and vectors are (y, x) in
px; site (h, k) lies at center + h a + k b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.lattice_voting import SAME, Trial, candidates, canonical, distance, follow, judge, variants
from gpuem.analyses.probe_finding import FoundProbe, plausible
from gpuem.backends.cpu_correlate import find_peaks
from gpuem.backends.peaks import PeakSearch, soft_disk, wrapped, zero_mean_kernel
from gpuem.errors import DataError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

FRAMES = 64
"""Frames of a sample that are searched for peaks."""

SIGMAS = 4.5
"""Height of a peak over its standard error."""

OTHER = 0.12
"""A second choice differs by more than this from the lattices of all grains: else it's one of them, strained."""

GRAINS = 6
"""Most grains that are told apart."""

GIVE = "give a= and b= (px, (y, x)), or choose a region of the scan that is crystal"

COVERED = 0.6
"""Part of a disk that must lie on good pixels of the detector."""

Kind = Literal["grain", "second"]


@dataclass(frozen=True, eq=False)
class FoundLattice:
    """A lattice that a sample of frames shows.

    Parameters
    ----------
    center, a, b : (float, float)
        Medians over its frames; a is the vector closer to +x, b is turned from it towards +y.
    score, share : float
        What it explains of the correlation intensity apart from the direct beam's (share), times the part of its sites
        that is filled and the root of the part of the frames that have it (score).
    frames : (n,) int64
        Indices into the sample of the frames that have it, among those that were looked at.
    centers, bases : (n, 2), (n, 2, 2)
        Centre, and a and b, of each of them: to a few tenths of a px.
    looked : int
        Number of frames that were looked at.
    kind : {"grain", "second"}
        A grain of the sample; or the second choice, which explains it worse.
    """

    center: tuple[float, float]
    a: tuple[float, float]
    b: tuple[float, float]
    score: float
    share: float
    frames: NDArray[np.int64]
    centers: Array
    bases: Array
    looked: int
    kind: Kind = "grain"

    def describe(self) -> str:
        """A sentence with the numbers."""
        (ay, ax), (by, bx) = self.a, self.b
        angle = math.degrees(math.atan2(ax * by - ay * bx, ax * bx + ay * by))
        return (
            f"lattice a = ({ay:.2f}, {ax:.2f}), b = ({by:.2f}, {bx:.2f}) px (y, x), |a| {math.hypot(ay, ax):.2f}, |b| "
            f"{math.hypot(by, bx):.2f}, angle {angle:.1f} deg, explains {100 * self.share:.0f} % (score "
            f"{self.score:.2f}) in {self.frames.size} of {self.looked} frames"
        )


def find_lattice(
    frames: NDArray[Any], probe: FoundProbe, good: Mask, *, center: tuple[float, float] | None = None
) -> list[FoundLattice]:
    """Find the lattices of a sample: its grains, the one with the most frames first, then the second choice.

    Parameters
    ----------
    frames : (n, y, x) array
        Sample, native type; `FRAMES` of them are looked at.
    probe : FoundProbe
        Disk of the direct beam.
    good : (y, x) bool
        Pixels that count.
    center : (float, float), optional
        Of the direct beam; that of the probe by default.

    Raises
    ------
    DataError
        No frame shows a lattice.
    """
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).astype(np.int64))
    peaks = search(frames[chosen], probe, good)
    start = np.asarray(probe.center if center is None else center, dtype=np.float64)
    starts = _starts(peaks, start, 4 * probe.radius)
    grains, best, runners = _grains(peaks, starts, probe)
    if grains and np.linalg.norm(grains[0][0].basis, axis=1).min() < 2.4 * probe.radius:
        # disks that overlap, or touch: their rims are told apart where the disks aren't
        rims = search(frames[chosen], probe, good, rim=True)
        again = _grains(rims, _starts(rims, start, 4 * probe.radius), probe)
        if again[0] and again[0][0][0].score > grains[0][0].score:
            grains, best, runners = again
    if not grains:
        counts = np.isfinite(peaks[..., 2]).sum(axis=1)
        tried = f", the best of {runners} bases explains too little" if runners else ""
        raise DataError(
            f"lattice: none of {len(chosen)} frames shows one; {int(np.median(counts))} peaks in a frame (median; most "
            f"{int(counts.max())}), probe radius {probe.radius:.1f} px{tried}. Vacuum or amorphous? {GIVE}"
        )
    found = [_told(t, members, chosen, start, "grain") for t, members in grains]
    if best is not None:
        found.append(_told(best, np.flatnonzero(best.has), chosen, start, "second"))
    return found


def search(frames: NDArray[Any], probe: FoundProbe, good: Mask, rim: bool = False) -> Array:
    """Significant peaks (n, k, 3) of frames: y, x, height in counts; NaN where a frame has fewer."""
    shape = frames.shape[1], frames.shape[2]
    kernel = _kernel(probe, shape, rim)
    spacing = max(2.0, 0.9 * probe.radius)
    plan = PeakSearch(wrapped(kernel, shape), subpixel="parabola", min_relative=2e-4, spacing=spacing, max_peaks=96)
    pixels = _filled_in(frames, good)
    rows = np.empty((len(frames), plan.columns), np.float32)
    starts = np.arange(len(frames), dtype=np.int64) * (shape[0] * shape[1])
    find_peaks(pixels.reshape(-1), starts, shape, plan, rows)
    peaks = rows[:, 1:].reshape(len(frames), -1, 3).astype(np.float64)
    error = _errors(pixels, peaks, kernel, _gain(frames, good))
    spots = np.clip(np.rint(np.nan_to_num(peaks[..., :2])).astype(np.int64), 0, np.array(shape) - 1)
    inside = coverage(good, probe, spots) > COVERED
    peaks[~(inside & (peaks[..., 2] > SIGMAS * error))] = np.nan
    # those that are left first, in order of height
    order = np.argsort(np.where(np.isnan(peaks[..., 2]), np.inf, -peaks[..., 2]), axis=1, kind="stable")
    return np.take_along_axis(peaks, order[..., None], axis=1)


def _kernel(probe: FoundProbe, shape: tuple[int, int], rim: bool) -> NDArray[np.float32]:
    """The disk minus a ring around it; with `rim` only what is near the edge, inside minus outside."""
    half = min(math.ceil(1.6 * probe.radius + probe.edge + 1), (min(shape) - 1) // 2)
    disk = soft_disk(probe.radius, probe.edge, half)
    inner = probe.radius + probe.edge / 2 + 0.5
    if not rim:
        return zero_mean_kernel(disk, min(inner, half - 1.0), min(max(1.5 * probe.radius, inner + 1.5), half + 0.5))
    wide = max(1.0, 0.2 * probe.radius, probe.edge)
    inside = disk - soft_disk(max(probe.radius - wide, 0.5), probe.edge, half)
    outside = soft_disk(probe.radius + wide, probe.edge, half) - disk
    return np.asarray(inside / inside.sum() - outside / outside.sum(), np.float32)


def _filled_in(frames: NDArray[Any], good: Mask) -> NDArray[np.float32]:
    """Frames in single precision; in place of bad pixels the mean of good ones nearby."""
    pixels = np.ascontiguousarray(frames, dtype=np.float32)
    mean = pixels.mean(axis=0, dtype=np.float64)
    usable = plausible(mean, good & np.isfinite(mean))
    if usable.all():
        return pixels
    pixels = pixels.copy() if pixels is frames else pixels
    bad = np.argwhere(~usable)
    height, width = mean.shape
    y = bad[:, 0, None] + np.repeat([-2, -1, 0, 1, 2], 5)
    x = bad[:, 1, None] + np.tile([-2, -1, 0, 1, 2], 5)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    weight = (inside & usable[y, x]).astype(np.float32)
    total = weight.sum(axis=1)
    for frame in pixels:
        around = np.where(weight > 0, frame[y, x], 0).sum(axis=1)
        frame[bad[:, 0], bad[:, 1]] = np.where(total > 0, around / np.maximum(total, 1), 0)
    return pixels


def coverage(good: Mask, probe: FoundProbe, places: NDArray[Any]) -> Array:
    """Part of the disk that lies on good pixels of the detector, for places (..., 2)."""
    half = max(1, math.ceil(probe.radius + probe.edge))
    disk = soft_disk(probe.radius, probe.edge, half)
    shape = tuple(n + 2 * half for n in good.shape)
    padded = np.zeros(shape)
    padded[half : half + good.shape[0], half : half + good.shape[1]] = good
    spectrum = np.conj(np.fft.rfft2(wrapped(disk, (shape[0], shape[1])).astype(np.float64)))
    covered = np.fft.irfft2(np.fft.rfft2(padded) * spectrum, s=shape) / disk.sum()
    spots = np.rint(places).astype(np.int64)
    near = np.all((spots >= -half) & (spots < np.array(good.shape) + half), axis=-1)
    spots = np.clip(spots, -half, np.array(good.shape) - 1 + half) + half
    return np.where(near, covered[spots[..., 0], spots[..., 1]], 0.0)


def _gain(frames: NDArray[Any], good: Mask) -> float:
    """Variance of pixels over their value, where frames differ least; 1 where a single frame can't tell."""
    mean, var = frames.mean(axis=0, dtype=np.float64), frames.var(axis=0, dtype=np.float64)
    use = good & (mean > 0) & np.isfinite(var)
    if len(frames) < 4 or not use.any():
        return 1.0 if np.issubdtype(frames.dtype, np.integer) else 0.0
    return float(np.quantile(var[use] / mean[use], 0.25)) * len(frames) / (len(frames) - 1)


def _errors(pixels: NDArray[np.float32], peaks: Array, kernel: NDArray[np.float32], gain: float) -> Array:
    """Standard error of the height of each peak by counting."""
    shape, half = pixels.shape[1:], kernel.shape[0] // 2
    area = wrapped(kernel * kernel, (shape[0], shape[1]))
    spectrum = np.conj(np.fft.rfft2(area))
    spots = np.clip(np.rint(np.nan_to_num(peaks[..., :2])).astype(np.int64), 0, np.array(shape) - 1)
    # what a frame sees nowhere may still be seen once: half a count under the kernel
    least = float((kernel * kernel).max()) if half else 0.0
    errors = np.empty(peaks.shape[:2])
    for i, frame in enumerate(pixels):
        variance = np.fft.irfft2(np.fft.rfft2(np.maximum(frame, 0)) * spectrum, s=shape)
        errors[i] = np.sqrt(gain * np.maximum(variance[spots[i, :, 0], spots[i, :, 1]], least))
    return errors


def _starts(peaks: Array, center: Array, reach: float) -> Array:
    """A peak of each frame that is the direct beam, or at least on the lattice."""
    first = peaks[:, 0]
    d = np.hypot(*np.moveaxis(peaks[..., :2] - center, -1, 0))
    value = np.where(np.isnan(d), -np.inf, np.sqrt(np.maximum(np.nan_to_num(peaks[..., 2]), 0)) * np.exp(-d / reach))
    nearest = np.take_along_axis(peaks, value.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    second = np.nan_to_num(peaks[:, min(1, peaks.shape[1] - 1), 2])
    clear = first[:, 2] > 3 * second
    chosen = np.where(clear[:, None], first[:, :2], nearest[:, :2])
    return np.where(np.isnan(chosen), center, chosen)


def _grains(
    peaks: Array, starts: Array, probe: FoundProbe
) -> tuple[list[tuple[Trial, NDArray[np.int64]]], Trial | None, int]:
    """Lattices of the frames one after another; the second choice for the first of them; number of bases tried."""
    left = np.arange(len(peaks))
    grains: list[tuple[Trial, NDArray[np.int64]]] = []
    others: list[Trial] = []
    tried = 0
    while left.size and len(grains) < GRAINS:
        bases = candidates(peaks[left], max(2.0, 0.9 * probe.radius), max(1.0, 0.15 * probe.radius))
        trials = sorted((judge(peaks[left], starts[left], b) for b in bases), key=lambda t: -t.score)[:6]
        trials = sorted((*_followed(peaks[left], starts[left], trials[:2]), *trials[2:]), key=lambda t: -t.score)
        trials += [judge(peaks[left], starts[left], v) for t in trials[:2] if t.score > 0 for v in variants(t.basis)
                   if np.linalg.norm(v, axis=1).min() > max(2.0, 0.9 * probe.radius)]  # fmt: skip
        trials = sorted((t for t in trials if t.score > 0), key=lambda t: -t.score)
        if not tried:
            tried = len(bases)
            others = [_spread(t, left, len(peaks)) for t in trials[1:]]
        if not trials or trials[0].has.sum() < max(1, 0.03 * len(peaks)):
            break
        best = _spread(trials[0], left, len(peaks))
        grains.extend((best, members) for members in _linked(best, np.flatnonzero(best.has)))
        left = left[~trials[0].has]
    grains = _merged(grains)
    middles = [np.median(t.thetas[m, 1:], axis=0) for t, m in grains]
    second = next((t for t in others if all(distance(t.basis, b) > OTHER for b in middles)), None)
    return sorted(grains, key=lambda g: (-g[1].size, -g[0].score)), second, tried


def _followed(peaks: Array, starts: Array, trials: list[Trial]) -> list[Trial]:
    """Trials that frames don't all have, or not wholly, where the lattice may vary over the scan."""
    return [
        t if not t.has.any() or (t.has.mean() > 0.95 and t.share > 0.97) else follow(peaks, starts, t) for t in trials
    ]


def _spread(trial: Trial, left: NDArray[np.int64], count: int) -> Trial:
    """A trial of some frames, over all of them."""
    has, thetas = np.zeros(count, np.bool_), np.full((count, 3, 2), np.nan)
    has[left], thetas[left] = trial.has, trial.thetas
    return Trial(trial.basis, trial.score, trial.share, has, thetas, np.where(has, 1.0, 0.0))


def _linked(trial: Trial, members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Frames in groups between which the lattice jumps: strain and rotation that vary smoothly are one grain."""
    bases = trial.thetas[members, 1:]
    size = np.linalg.norm(bases, axis=2).mean()
    off = np.linalg.norm(bases[:, None] - bases[None], axis=3).max(axis=2) / size
    linked, groups = off < SAME, np.arange(len(members))
    for i in range(len(members)):
        groups[np.isin(groups, groups[linked[i]])] = groups[i]
    parts = [members[groups == g] for g in np.unique(groups)]
    large = [p for p in parts if p.size >= max(2, 0.03 * len(trial.has))]
    # strays are badly fitted ones, not grains
    return large if large else [members]


def _merged(grains: Sequence[tuple[Trial, NDArray[np.int64]]]) -> list[tuple[Trial, NDArray[np.int64]]]:
    """Grains found one after another that are the same lattice as one."""
    kept: list[tuple[Trial, NDArray[np.int64]]] = []
    for trial, members in grains:
        basis = np.median(trial.thetas[members, 1:], axis=0)
        for i, (other, theirs) in enumerate(kept):
            if distance(basis, np.median(other.thetas[theirs, 1:], axis=0)) < SAME:
                thetas = other.thetas.copy()
                thetas[members] = trial.thetas[members]
                kept[i] = (
                    Trial(other.basis, other.score, other.share, other.has | trial.has, thetas, other.shares),
                    np.sort(np.concatenate([theirs, members])),
                )
                break
        else:
            kept.append((trial, members))
    return kept


def _told(
    trial: Trial, members: NDArray[np.int64], chosen: NDArray[np.int64], start: Array, kind: Kind
) -> FoundLattice:
    """The lattice in words of the field: the canonical basis, the site nearest to the expected centre."""
    thetas = trial.thetas[members]
    middle = np.median(thetas[:, 1:], axis=0)
    wanted = canonical(middle)
    steps = np.rint(wanted @ np.linalg.inv(middle))
    bases = steps @ thetas[:, 1:]
    off = np.einsum("fi,fij->fj", start - thetas[:, 0], np.linalg.inv(bases))
    # the start may lie anywhere: the site nearest to it in most frames, lest they go to different ones
    phase = np.angle(np.exp(2j * np.pi * off).mean(axis=0)) / (2 * np.pi)
    # all by the same step unless the frame started on another site
    centers = thetas[:, 0] + np.einsum("fi,fij->fj", np.rint(off - phase), bases)
    center, (a, b) = np.median(centers, axis=0), np.median(bases, axis=0)
    return FoundLattice(
        (float(center[0]), float(center[1])), (float(a[0]), float(a[1])), (float(b[0]), float(b[1])),
        trial.score, trial.share, chosen[members], centers, bases, len(chosen), kind,
    )  # fmt: skip
