"""Which site of a lattice is the direct beam: by symmetry, brightness and place, with the runner-up and a confidence.

Strain hardly depends on the choice, since all sites lie on one lattice; the maps of the centre, the orders (h k) and
descan do. Five things speak for a site c, each as a log likelihood ratio against an ordinary site:

* Friedel pairs: ln I(c + g) - ln I(c - g) is 0 about the direct beam, or g.t where the crystal is tilted (the Laue
  centre lies elsewhere). Only pairs both of whose ends can be seen count, so that the edges of the detector and
  shadows don't pull; one pair alone never excludes a site. How much symmetry is worth is told by the pattern: where
  every site is as symmetric as the others (a smooth envelope), nothing.
  A tilted crystal can be symmetric about its Laue centre alone, so that symmetry never decides against all else.
* Brightness over that of its neighbours, against how much ordinary sites differ from theirs: usually more, but a disk
  that is weaker than all its like is outstanding too. Behind a mask, or where no disk is seen, it says little.
* Brightness over that of the brightest: the direct beam is seldom faint.
* Further grains: the direct beam lies on the lattices of all of them.
* The middle of the detector and that of the disks (which a tilt and the edges move), weakly.

The confidence is the likelihood over the sum of those of all sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ODDS = 5.0
"""So many times likelier than the next one must a choice be that needs no warning."""

_MOST = 120
"""Sites that are tried: the brightest and those that are hidden."""

_BROKEN = 0.1
"""Part of pairs that may be broken by a shadow or a defect."""

_ALIKE = 0.05
"""Least difference (of logarithms) that counts: disks cut or overlapped by neighbours are measured to that."""

_CORRELATED = 0.5
"""Weight of pairs: neighbouring ones tell partly the same."""

_MOST_SYMMETRY = 7.0
"""Log likelihood ratio that symmetry can make at most: one in a thousand patterns is symmetric about another site."""

_FAINT = 1.0
"""Power of the brightness over that of the brightest that a site's likelihood goes with."""

_TILT = 1.0
"""Usual ln of the ratio of opposite disks at the edge of the pattern."""

_MIDDLE = 0.3
"""Usual distance of the direct beam from the middle of the detector, in parts of its smaller side."""

_AMONG = 0.7
"""Usual distance of the direct beam from the middle of the disks, in parts of their mean distance from there."""

_BOOST = (0.8, 1.0)
"""ln of the direct beam over its neighbours: what is usual, and the spread."""

_HIDDEN = {"dark": -2.5, "edge": -2.0, "masked": 2.0}
"""Log likelihood ratio of a site without a disk, one at the edge, and the only one behind a mask or a beam stop."""


@dataclass(frozen=True, eq=False)
class SiteCounts:
    """All sites of a lattice on the detector, and how bright they are.

    Parameters
    ----------
    hk : (n, 2) int64
        Indices.
    places : (n, 2) float64
        (y, x) in px.
    intensity, sigma : (n,) float64
        Mean counts per pixel over the local background and the standard error; NaN where too little is seen.
    level : (n,) float64
        Mean counts per pixel, background included; NaN where too little is seen.
    covered : (n,) float64
        Part of the disk that lies on good pixels.
    masked : (n,) bool
        Hidden by bad pixels, not by the edge of the detector.
    """

    hk: NDArray[np.int64]
    places: Array
    intensity: Array
    sigma: Array
    level: Array
    covered: Array
    masked: NDArray[np.bool_]


@dataclass(frozen=True)
class Origin:
    """The site that is the direct beam.

    Parameters
    ----------
    hk : (int, int)
        Its indices.
    place : (float, float)
        (y, x) in px.
    confidence : float
        Its likelihood over the sum of those of all sites.
    brightness : float
        Over that of its neighbours; NaN where it isn't known.
    pairs : int
        Friedel pairs of which both ends are seen.
    state : {"disk", "dark", "edge", "masked"}
        Whether a disk is seen there, and why not.
    runner : (y, x, confidence) or None
        The next likely site.
    """

    hk: tuple[int, int]
    place: tuple[float, float]
    confidence: float
    brightness: float
    pairs: int
    state: str = "disk"
    runner: tuple[float, float, float] | None = None

    @property
    def sure(self) -> bool:
        """Whether the next likely site is much less likely."""
        return self.runner is None or self.confidence >= ODDS * self.runner[2]

    def describe(self) -> str:
        """The choice in words, with the numbers."""
        text = f"confidence {self.confidence:.2f} ({self.pairs} Friedel pairs"
        if math.isfinite(self.brightness):
            text += f", {self.brightness:.2g} times as bright as its neighbours"
        text += ")"
        if self.runner is not None:
            text += f", next ({self.runner[0]:.1f}, {self.runner[1]:.1f}) px with {self.runner[2]:.2f}"
        return text

    def doubt(self) -> str:
        """What is said of a place where no disk is seen."""
        return {
            "dark": "hidden: no disk is seen there (beam stop?), its place is the centre of Friedel pairs",
            "masked": "hidden by bad pixels (beam stop?), its place is the centre of Friedel pairs",
            "edge": "cut by the edge of the detector",
        }.get(self.state, "")


def rank_origins(found: SiteCounts, shape: tuple[int, int], others: Sequence[tuple[Array, Array]] = ()) -> list[Origin]:
    """Sites that may be the direct beam, the likeliest first, each with the next likely one (of the first: the second).

    Parameters
    ----------
    found : SiteCounts
        All sites on the detector.
    shape : (int, int)
        Of the detector.
    others : sequence of ((2,), (2, 2))
        Centres and bases of further grains.
    """
    log, error, state = _logarithms(found)
    chosen = _candidates(found, state)
    symmetry, pairs = _symmetry(found, log, error, chosen)
    symmetry = np.logaddexp(symmetry - symmetry.max(), -_MOST_SYMMETRY)
    boost, excess = _brightness(found, log, state, chosen)
    seen = np.array([state[n] == "disk" for n in chosen])
    if seen.any():
        boost[seen] += _FAINT * (log[chosen[seen]] - log[chosen[seen]].max())
    places = found.places[chosen]
    away = np.hypot(*(places - (np.array(shape) - 1) / 2).T) / (_MIDDLE * min(shape))
    total = symmetry + boost - 0.5 * away**2 - 0.5 * _off_middle(found, log, error, chosen) ** 2
    for center, basis in others:
        total += _coincidence(places, center, basis)
    chance = np.exp(total - total.max())
    chance /= chance.sum()
    order = np.argsort(-chance, kind="stable")
    ranked = []
    for rank, n in enumerate(order.tolist()):
        next_one = order[1 if rank == 0 else 0] if len(order) > 1 else None
        runner = None if next_one is None else (*places[next_one].tolist(), float(chance[next_one]))
        (h, k), (y, x) = found.hk[chosen[n]].tolist(), places[n].tolist()
        bright = float(np.exp(excess[n])) if state[chosen[n]] == "disk" else math.nan
        ranked.append(Origin((h, k), (y, x), float(chance[n]), bright, int(pairs[n]), state[chosen[n]], runner))
    return ranked


def _logarithms(found: SiteCounts) -> tuple[Array, Array, list[str]]:
    """Ln of the intensity down to the noise (NaN where nothing can be seen), its error, and what is seen."""
    known = np.isfinite(found.intensity)
    floor = np.where(known, np.maximum(2 * found.sigma, 1e-4 * np.nanmax(found.intensity, initial=1e-30)), np.nan)
    value = np.fmax(found.intensity, floor)
    log = np.log(value)
    error = np.minimum(found.sigma / value, 1.0)
    dark = known & (found.intensity < 3 * found.sigma)
    error[dark] = 1.0
    # in the shadow of a beam stop it's darker than between the disks elsewhere
    ground = found.level[known] - np.maximum(found.intensity[known], 0)
    shadow = dark & (found.level < 0.5 * np.median(ground)) if known.any() else dark
    state = np.where(known, "disk", np.where(found.masked, "masked", "edge"))
    state[dark] = "dark"
    log[shadow] = np.nan
    state[shadow] = "masked"
    return log, error, [str(v) for v in state]


def _candidates(found: SiteCounts, state: list[str]) -> NDArray[np.int64]:
    """Indices of the sites that are tried; a site that was never seen counts only near others that were."""
    hidden = np.array([s in ("masked", "dark") for s in state])
    bright = np.argsort(-np.nan_to_num(np.where(hidden, -1.0, found.intensity), nan=-2.0), kind="stable")
    seen = np.array([s == "disk" for s in state])
    if not seen.any():
        return np.arange(len(found.hk))[:_MOST]
    low, high = found.hk[seen].min(axis=0), found.hk[seen].max(axis=0)
    inside = np.all((found.hk >= low) & (found.hk <= high), axis=1)
    some = bright[inside[bright] & ~hidden[bright]][:_MOST]
    return np.sort(np.concatenate([some, np.flatnonzero(hidden & inside)[:_MOST]]))


def _off_middle(found: SiteCounts, log: Array, error: Array, chosen: NDArray[np.int64]) -> Array:
    """Distance of sites from the middle of the disks, over what is usual."""
    seen = np.isfinite(log) & (error < 1)
    if seen.sum() < 3:
        return np.zeros(len(chosen))
    # strong ones don't decide alone
    weight = np.exp(0.5 * (log[seen] - log[seen].max()))
    middle = weight @ found.places[seen] / weight.sum()
    spread = math.sqrt(float(weight @ ((found.places[seen] - middle) ** 2).sum(axis=1) / weight.sum()))
    return np.asarray(np.hypot(*(found.places[chosen] - middle).T) / (_AMONG * max(spread, 1e-9)))


# ---- symmetry


def _pairs(found: SiteCounts, log: Array, error: Array, at: int) -> tuple[Array, Array, Array]:
    """g, ln I(c + g) - ln I(c - g) and its error for all pairs about a site, of which one end at least is a disk."""
    low = found.hk.min(axis=0)
    span = found.hk.max(axis=0) - low + 1
    table = np.full(span, -1)
    table[tuple((found.hk - low).T)] = np.arange(len(found.hk))
    g = found.hk - found.hk[at]
    half = (g[:, 0] > 0) | ((g[:, 0] == 0) & (g[:, 1] > 0))
    opposite = found.hk[at] - g - low
    inside = half & np.all((opposite >= 0) & (opposite < span), axis=1)
    plus = np.flatnonzero(inside)
    minus = table[tuple(opposite[plus].T)]
    use = (minus >= 0) & np.isfinite(log[plus]) & np.isfinite(log[minus])
    use &= (error[plus] < 1) | (error[minus] < 1)
    plus, minus = plus[use], minus[use]
    return g[plus].astype(np.float64), log[plus] - log[minus], np.hypot(error[plus], error[minus])


def _symmetry(
    found: SiteCounts, log: Array, error: Array, chosen: NDArray[np.int64]
) -> tuple[Array, NDArray[np.int64]]:
    """Log likelihood ratio by Friedel pairs, and the number of these."""
    every = [_pairs(found, log, error, int(at)) for at in chosen]
    fits = [_tilted(*pairs) for pairs in every]
    count = np.array([len(d) for _, d, _ in every])
    pooled = np.concatenate([np.abs(off) for off, _ in fits]) if fits else np.zeros(0)
    if pooled.size < 8:
        return np.zeros(len(chosen)), count
    usual = max(1.48 * float(np.median(pooled)), _ALIKE)
    best: Array = np.zeros(len(chosen))
    for scale in np.geomspace(_ALIKE, usual, 8):
        worth = np.array([
            _CORRELATED * _ratio(off, pairs[2], scale, usual).sum() - 0.5 * (tilt / _TILT) ** 2
            for (off, tilt), pairs in zip(fits, every, strict=True)
        ])  # fmt: skip
        if worth.max() > best.max() or not best.any():
            best = worth
    return best, count


def _tilted(g: Array, d: Array, error: Array) -> tuple[Array, float]:
    """What a tilt of the crystal leaves of the differences, and the tilt as their size at the edge of the pattern."""
    if len(d) < 3:
        return d, 0.0
    weight = 1 / (_ALIKE**2 + error**2)
    solved: Array = np.zeros(2)
    robust: Array = np.ones(len(d))
    # the prior that there is none keeps it from following what it can't tell
    radius = float(np.sqrt((g**2).sum(axis=1).mean()))
    for _ in range(8):
        w = weight * robust
        normal = (g * w[:, None]).T @ g + (radius / _TILT) ** 2 * np.eye(2)
        solved = np.asarray(np.linalg.solve(normal, (g * w[:, None]).T @ d), np.float64)
        off = d - g @ solved
        scale = max(1.48 * float(np.median(np.abs(off))), _ALIKE)
        robust = np.asarray(1 / (1 + (off / (2 * scale)) ** 2), np.float64)
    return d - g @ solved, float(np.hypot(*solved)) * radius


def _ratio(off: Array, error: Array, scale: float, usual: float) -> Array:
    """Log likelihood ratio of every pair, bounded: `scale` about the direct beam, `usual` about any site."""
    ratio = np.exp(_student(off, np.hypot(scale, error)) - _student(off, np.hypot(usual, error)))
    return np.asarray(np.log((1 - _BROKEN) * ratio + _BROKEN))


def _student(off: Array, scale: Array | float) -> Array:
    """Ln of Student's density with 3 degrees of freedom, apart from a constant."""
    return np.asarray(-2 * np.log1p((off / scale) ** 2 / 3) - np.log(scale))


# ---- brightness


def _brightness(found: SiteCounts, log: Array, state: list[str], chosen: NDArray[np.int64]) -> tuple[Array, Array]:
    """Log likelihood ratio by the brightness over that of the neighbours, and ln of the latter ratio."""
    excess, exact = _excess(found, log)
    known = np.array([s == "disk" for s in state]) & np.isfinite(excess)
    sure = known & exact
    own = excess[sure if sure.sum() >= 5 else known]
    middle = float(np.median(own)) if own.size else 0.0
    spread = max(1.48 * float(np.median(np.abs(own - middle))), 0.1) if own.size >= 3 else 1.0
    worth: Array = np.zeros(len(chosen))
    # of many hidden ones (a gap of the detector) each may be it
    hidden = sum(state[at] == "masked" for at in chosen.tolist())
    for n, at in enumerate(chosen.tolist()):
        if state[at] != "disk":
            worth[n] = _HIDDEN[state[at]] - (math.log(hidden) if state[at] == "masked" else 0.0)
        elif known[at]:
            # of neighbours on one side only the slope isn't known
            wide = 0.0 if exact[at] else 1.0
            off = excess[at] - middle
            as_direct = _student(np.array(off - _BOOST[0]), math.hypot(_BOOST[1], wide))
            worth[n] = float(as_direct - _student(np.array(off), math.hypot(spread, wide)))
    return worth, excess[chosen]


def _excess(found: SiteCounts, log: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Ln of each site over its neighbours, and whether these lie on both sides of it (a slope doesn't matter then)."""
    index = {tuple(hk): n for n, hk in enumerate(found.hk.tolist())}
    excess, exact = np.full(len(log), np.nan), np.zeros(len(log), np.bool_)
    for n, (h, k) in enumerate(found.hk.tolist()):
        both, one = [], []
        for dh, dk in ((1, 0), (0, 1), (1, 1), (1, -1)):
            ends = [log[m] for m in (index.get((h + dh, k + dk)), index.get((h - dh, k - dk))) if m is not None]
            ends = [v for v in ends if np.isfinite(v)]
            one += ends
            if len(ends) == 2:
                both.append(sum(ends) / 2)
        if one and np.isfinite(log[n]):
            exact[n] = len(both) >= 2
            excess[n] = log[n] - float(np.median(both if exact[n] else one))
    return excess, exact


# ---- further grains


def _coincidence(places: Array, center: Array, basis: Array) -> Array:
    """Log likelihood ratio of sites by how near they are to one of another grain's."""
    exact = (places - center) @ np.linalg.inv(basis)
    off = np.hypot(*((exact - np.rint(exact)) @ basis).T)
    cell = abs(float(np.linalg.det(basis)))
    near = max(0.5, 0.04 * math.sqrt(cell))
    density = np.exp(-0.5 * (off / near) ** 2) * cell / (2 * math.pi * near**2)
    return np.asarray(np.log((1 - _BROKEN) * density + _BROKEN))
