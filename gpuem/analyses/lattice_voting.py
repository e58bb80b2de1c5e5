"""Which lattice a set of peaks lies on: bases by votes of differences, judged by what they explain and leave empty.

Peaks are (frames, k, 3): y, x in px and height, NaN where there are fewer. A basis is (2, 2), rows a, b, each (y, x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SAME = 0.04
"""Bases that differ by less, relative to their length, are one lattice, strained or turned a little."""

TOLERANCE = 0.15
"""A peak belongs to a site when it's nearer than this part of the lattice vectors."""

FAINT = 0.25
"""A site with less than this part of what peaks at its distance have counts as partly empty."""

_UNIMODULAR = np.array([n for n in np.reshape(list(product((-1, 0, 1), repeat=4)), (-1, 2, 2))
                        if abs(n[0, 0] * n[1, 1] - n[0, 1] * n[1, 0]) == 1])  # fmt: skip

# strained by 4 % and turned by 4 degrees, each way
_STRETCHED = [
    np.array([[1 + p, q + 0.5 * r], [0.5 * r - q, 1 + s]])
    for p, q, r, s in product((-0.04, 0.04), (-0.07, 0.07), (-0.04, 0.04), (-0.04, 0.04))
]


@dataclass(frozen=True)
class Trial:
    """A lattice, fitted to each frame.

    Parameters
    ----------
    basis : (2, 2)
        Median over the frames that have it.
    score : float
        Share, times how many of the sites are filled, times the root of the part of frames that have it.
    share : float
        Part of the correlation intensity, other than the direct beam's, that lies on its sites.
    has : (frames,) bool
        Frames that have it.
    thetas : (frames, 3, 2)
        Centre, a, b of every frame.
    shares : (frames,) float64
        Share of every frame.
    """

    basis: Array
    score: float
    share: float
    has: NDArray[np.bool_]
    thetas: Array
    shares: Array


def canonical(basis: Array) -> Array:
    """The shortest basis; a the one closest to +x, b turned from it towards +y by 60 (hexagonal) to 120 degrees."""
    u, v = reduced(basis)
    longest = 1.03 * math.hypot(*v)
    short = [w for w in (u, v, u - v, u + v) if math.hypot(*w) <= longest]
    # of the long one of a 1:3 cell neither sum nor difference is a third direction alike
    if len(short) > 2 and math.hypot(*u) < 0.9 * math.hypot(*v):
        short = short[:2]
    every = [s * w for w in short for s in (1.0, -1.0)]
    a = max(every, key=lambda w: w[1] / math.hypot(*w))
    cell = abs(u[0] * v[1] - u[1] * v[0])

    def angle(w: Array) -> float:
        return math.atan2(a[1] * w[0] - a[0] * w[1], float(a @ w))

    fit = [w for w in every if angle(w) > 0 and abs(a[1] * w[0] - a[0] * w[1]) > 0.5 * cell]
    return np.stack([a, min(fit, key=lambda w: (round(abs(angle(w) - math.pi / 2), 1), angle(w)))])


def reduced(basis: Array) -> Array:
    """The shortest basis of a lattice (Lagrange, Gauss), the shorter vector first."""
    u, v = np.asarray(basis, dtype=np.float64)
    for _ in range(100):
        if u @ u > v @ v:
            u, v = v, u
        times = np.rint(u @ v / max(float(u @ u), 1e-12))
        if times == 0:
            break
        v = v - times * u
    return np.stack([u, v])


def distance(a: Array, b: Array) -> float:
    """Largest relative difference of two bases' vectors, over all descriptions of the first."""
    turned = _UNIMODULAR @ reduced(a)
    target = reduced(b)
    off = np.linalg.norm(turned - target, axis=2) / np.linalg.norm(target, axis=1)
    return float(off.max(axis=1).min())


def candidates(peaks: Array, least: float, blur: float) -> list[Array]:
    """Bases made of the commonest differences of peaks, reduced, each once.

    Parameters
    ----------
    peaks : (frames, k, 3)
    least : float
        Shortest vector, px.
    blur : float
        Differences that are nearer than this, px, vote together.
    """
    strong = peaks[:, :36]
    d = (strong[:, :, None, :2] - strong[:, None, :, :2]).reshape(-1, 2)
    # so that strong pairs don't decide alone
    h = np.sqrt(np.maximum(strong[..., 2], 0))
    w = np.sqrt(h[:, :, None] * h[:, None, :]).reshape(len(strong), -1)
    # frames without a peak have no vote
    w = (w / np.maximum(np.nan_to_num(w).max(axis=1, keepdims=True), 1e-30)).ravel()
    use = np.isfinite(w) & (np.hypot(d[:, 0], d[:, 1]) > least)
    d, w = d[use], w[use]
    if not w.size:
        return []
    reach = float(np.abs(d).max()) / 1.5
    step = max(blur / 2, reach / 300)
    half = math.ceil(reach / step)
    edges = (np.arange(2 * half + 2) - half - 0.5) * step
    votes, _, _ = np.histogram2d(d[:, 0], d[:, 1], (edges, edges), weights=w)
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / 2) ** 2)
    for axis in (0, 1):
        votes = np.apply_along_axis(np.convolve, axis, votes, kernel, "same")
    vectors = _voted(votes, step, half, least)
    found: list[Array] = []
    for i in range(len(vectors)):
        for j in range(i):
            pair = reduced(np.stack([vectors[i], vectors[j]]))
            short, long = (math.hypot(*v) for v in pair)
            area = abs(pair[0, 0] * pair[1, 1] - pair[0, 1] * pair[1, 0])
            if short > least and area > 0.8 * short * long and not any(distance(pair, f) < 0.03 for f in found):
                found.append(pair)
    return found[:60]


def _voted(votes: Array, step: float, half: int, least: float) -> list[Array]:
    """Vectors with the most votes, one of each opposite pair."""
    left = votes.copy()
    left[:half] = 0
    left[half, : half + 1] = 0
    clear = max(2, round(0.4 * least / step))
    vectors: list[Array] = []
    while len(vectors) < 14:
        y, x = divmod(int(left.argmax()), left.shape[1])
        if left[y, x] <= 0.02 * votes.max():
            break
        box = np.s_[max(y - 2, 0) : min(y + 3, left.shape[0]), max(x - 2, 0) : min(x + 3, left.shape[1])]
        ys, xs = np.mgrid[box]
        total = votes[box].sum()
        vectors.append(
            np.array([(ys * votes[box]).sum() / total - half, (xs * votes[box]).sum() / total - half]) * step
        )
        left[max(y - clear, 0) : y + clear + 1, max(x - clear, 0) : x + clear + 1] = 0
    return vectors


def variants(basis: Array) -> list[Array]:
    """Lattices whose cells are half or double."""
    a, b = basis
    return [
        reduced(np.stack(pair))
        for pair in ((a / 2, b), (a, b / 2), (a, (a + b) / 2), (2 * a, b), (a, 2 * b), (a + b, a - b), (a / 2, b / 2))
    ]


def fit_frames(peaks: Array, starts: Array, bases: Array) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Fit centre, a, b to each frame's peaks, from the inner sites outwards, beginning with `bases` (frames, 2, 2).

    Returns
    -------
    thetas : (frames, 3, 2)
        Centre, a, b.
    index : (frames, k, 2)
        Nearest site (h, k) of each peak.
    near : (frames, k) bool
        Whether the peak lies on it.
    """
    there = np.isfinite(peaks[..., 2])
    places = np.where(there[..., None], peaks[..., :2], 0.0)
    heights = np.sqrt(np.where(there, peaks[..., 2], 0.0))
    # so that the direct beam doesn't hold the lattice alone
    usual = heights.sum(axis=1, keepdims=True) / np.maximum(there.sum(axis=1, keepdims=True), 1)
    heights = np.minimum(heights, usual) + 1e-12
    thetas = np.concatenate([starts[:, None], bases], axis=1)
    area = np.linalg.det(bases)
    size = np.sqrt(np.abs(area))[:, None]
    index, near = np.zeros_like(places), there
    for order, tolerance in ((1.5, 0.25), (2.5, 0.2), (4.5, 0.17), (np.inf, TOLERANCE), (np.inf, TOLERANCE)):
        exact = (places - thetas[:, None, 0]) @ np.linalg.inv(thetas[:, 1:])
        index = np.rint(exact)
        off = np.hypot(*np.moveaxis((exact - index) @ thetas[:, 1:], -1, 0))
        near = there & (off < tolerance * size)
        far = np.hypot(*np.moveaxis(places - thetas[:, None, 0], -1, 0)) / size
        w = heights * (near & (far < order))
        design = np.concatenate([np.ones_like(index[..., :1]), index], axis=2)
        weighted = (design * w[..., None]).swapaxes(1, 2)
        normal = weighted @ design
        # little by little what isn't seen stays as it was
        keep = 1e-3 * heights.sum(axis=1)[:, None, None] * np.eye(3) / max(1, heights.shape[1]) + 1e-9 * np.eye(3)
        right = weighted @ places + keep @ thetas
        trial = np.linalg.solve(normal + keep, right)
        sane = np.abs(np.linalg.det(trial[:, 1:]) / area - 1) < 0.3
        thetas = np.where(sane[:, None, None], trial, thetas)
    return thetas, index, near


def judge(peaks: Array, starts: Array, basis: Array) -> Trial:
    """Fit a basis, (2, 2) or one for each frame, to all frames; say how well it explains those that have it."""
    bases = np.broadcast_to(np.asarray(basis, dtype=np.float64), (len(peaks), 2, 2))
    thetas, index, near = fit_frames(peaks, starts, bases)
    there = np.isfinite(peaks[..., 2])
    heights = np.where(there, peaks[..., 2], 0.0)
    # the direct beam lies on every lattice and says nothing of it
    size = np.sqrt(np.abs(np.linalg.det(bases)))[:, None]
    own = ~((np.hypot(*np.moveaxis(peaks[..., :2] - thetas[:, None, 0], -1, 0)) < 0.3 * size) & there)
    w = np.minimum(heights, _second(heights, own)[:, None]) * own
    on = near & own
    share = (w * on).sum(axis=1) / np.maximum(w.sum(axis=1), 1e-300)
    count, of = on.sum(axis=1), (there & own).sum(axis=1)
    chance = math.pi * TOLERANCE**2
    sure = count > of * chance + 2.5 * np.sqrt(of * chance) + 1
    plane = np.array([_spans(index[f][on[f]]) for f in range(len(peaks))])
    has = (share > 0.5) & (count >= 3) & sure & plane
    if not has.any():
        return Trial(np.median(bases, axis=0), 0.0, 0.0, has, thetas, share)
    total = float((w * on)[has].sum() / w[has].sum())
    filled = _filled(peaks[has], index[has], (on & has[:, None])[has], w[has])
    middle = np.median(thetas[has][:, 1:], axis=0)
    score = total * filled * math.sqrt(float(has.mean()))
    return Trial(middle, score, total, has, thetas, share)


def follow(peaks: Array, starts: Array, trial: Trial) -> Trial:
    """The same trial where strain and rotation vary: frames begin with the lattice of others that already have it."""
    for turn in range(4):
        if not trial.has.any() or trial.shares.min() > 0.999:
            return trial
        own = trial.thetas[trial.has & (trial.shares >= np.median(trial.shares)), 1:]
        # those that differ most from one another
        chosen = [int(np.linalg.norm(own - trial.basis, axis=(1, 2)).argmin())]
        off = np.full(len(own), np.inf)
        while len(chosen) < min(8, len(own)):
            off = np.minimum(off, np.linalg.norm(own - own[chosen[-1]], axis=(1, 2)))
            chosen.append(int(off.argmax()))
        starters = list(own[chosen])
        if turn == 0:
            starters += [trial.basis @ m for m in _STRETCHED]
        tried = [trial, *(judge(peaks, starts, b) for b in starters)]
        best = np.argmax([t.shares + 0.01 * t.has for t in tried], axis=0)
        bases = np.stack([t.thetas[:, 1:] for t in tried])[best, np.arange(len(peaks))]
        found = judge(peaks, starts, bases)
        if found.shares.sum() <= trial.shares.sum() + 1e-3:
            return found if found.score > trial.score else trial
        trial = found
    return trial


def _second(heights: Array, own: NDArray[np.bool_]) -> Array:
    """The fourth highest of each frame's: a few very strong ones don't decide alone."""
    ranked = -np.sort(-heights * own, axis=1)
    return np.asarray(ranked[:, min(3, ranked.shape[1] - 1)] + 1e-300)


def _spans(index: Array) -> bool:
    """Whether sites lie in more than one direction."""
    if len(index) < 2:
        return False
    h, k = index.T
    return bool(np.any(h[:, None] * k != k[:, None] * h))


def _filled(peaks: Array, index: Array, on: NDArray[np.bool_], w: Array) -> float:
    """How far sites are as bright as peaks at their distance; those too far out to be seen don't count."""
    h, k = (index[..., i][on].astype(np.int64) for i in (0, 1))
    value = w[on]
    most = int(min(max(np.abs(h).max(), np.abs(k).max()), 40))
    inside = (np.abs(h) <= most) & (np.abs(k) <= most)
    table = np.zeros((2 * most + 1, 2 * most + 1))
    np.add.at(table, (h[inside] + most, k[inside] + most), value[inside])
    table /= len(peaks)
    hits = np.zeros_like(table)
    np.add.at(hits, (h[inside] + most, k[inside] + most), 1.0)
    # chance hits don't say how far the reflections reach
    seen = hits >= 0.3 * len(peaks)
    cells = np.stack(np.meshgrid(*[np.arange(-most, most + 1)] * 2, indexing="ij"), axis=-1)
    return _occupied(table, seen, cells, (index[on], peaks[..., :2][on]))


def _occupied(table: Array, hit: NDArray[np.bool_], cells: NDArray[Any], peaks: tuple[Array, Array]) -> float:
    """Mean over sites of their brightness, where it's less than usual at their distance, else 1."""
    # distances in px, by the metric that the peaks themselves have
    flat, places = peaks
    design = np.column_stack([np.ones(len(flat)), flat])
    solved = np.linalg.lstsq(design, places, rcond=None)[0]
    q = np.hypot(*np.moveaxis(cells @ solved[1:], -1, 0)).ravel()
    t = table.ravel()
    seen = hit.ravel()
    far = np.quantile(q[seen], 0.9) if seen.any() else 0.0
    # sites as far as peaks reach, on the detector as far as peaks show it
    spots = (cells @ solved[1:] + solved[0]).reshape(-1, 2)
    low, high = places.min(axis=0) - 1, places.max(axis=0) + 1
    use = (q > 0) & (q <= far) & (spots >= low).all(axis=1) & (spots <= high).all(axis=1)
    if use.sum() < 2:
        return 0.0
    wide = max(float(np.sqrt(abs(np.linalg.det(solved[1:])))), 0.25 * far)
    near = np.exp(-0.5 * ((q[use][:, None] - q[use][None]) / wide) ** 2)
    level = (near @ t[use] ** 2) / np.maximum(near @ t[use], 1e-300)
    return float(np.minimum(1, t[use] / np.maximum(FAINT * level, 1e-300)).mean())
