"""What was given for a strain measurement, compared with what the sample shows: lattice vectors and centre.

The rule for vectors: the same lattice, in whatever basis, and lattices whose sites are a part of the other's (every
second disk; forbidden or superlattice reflections in between) are taken. Any other lattice is refused where it explains
less than `REFUSED` of the brightness of disks that the found one explains, in the tenth of the sampled frames where it
does best, and warned of below `WARNED`. Where no lattice is found there is nothing to compare with.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample
from gpuem.analyses.lattice_finding import FRAMES, OTHER, FoundLattice, find_lattice, search
from gpuem.analyses.lattice_origin import ODDS, Origin
from gpuem.analyses.lattice_voting import SAME, TOLERANCE
from gpuem.analyses.probe_finding import FoundProbe
from gpuem.analyses.reference_lattice import check_reference
from gpuem.errors import DataError, RecipeError

if TYPE_CHECKING:
    from gpuem.analyses.strain import Strain

log = logging.getLogger("gpuem")
Array = NDArray[np.float64]
# of the brightness that the found lattice explains
REFUSED, WARNED = 0.5, 0.8
# a found lattice with a smaller score, or in less than half of the frames, refuses nothing
TRUSTED = 0.5
# disks nearer to each other than so many radii can't be told apart
CLOSEST = 0.7
# a given centre may be off its disk by so much of the shortest distance of disks
OFF = 0.25
# and is told to be off beyond this, in px or in radii
NOT_ON = 2.0, 0.5


def given_lattices(
    asked: Strain, pairs: Sequence[tuple[tuple[float, float], tuple[float, float]]], sample: Sample, probe: FoundProbe,
    good: NDArray[np.bool_],
) -> list[FoundLattice]:  # fmt: skip
    """The lattices that were given, where the sample shows them; then the best one that it shows besides."""
    bases = []
    for a, b in pairs:
        basis = check_reference(np.array([a, b], np.float64), f"{asked.name}: lattice")
        nearest = min(np.hypot(*v) for v in (*basis, basis[0] + basis[1], basis[0] - basis[1]))
        if nearest < max(CLOSEST * probe.radius, 2.0):
            raise RecipeError(
                f"{asked.name}: a = {a}, b = {b} px (y, x): disks {nearest:.3g} px apart with a radius of "
                f"{probe.radius:.3g} px can't be told apart; are a, b and radius in px of the frames as they are read?"
            )
        bases.append(basis)
    try:
        found = find_lattice(sample.frames, probe, good, center=asked.center)
    except DataError as error:
        log.warning(
            "%s: a and b are taken as given, the sample shows no lattice to compare with: %s", asked.name, error
        )
        found = []
    taken = [_as_given(asked, basis, found, sample, probe, good) for basis in bases]
    shown = [np.array([lattice.a, lattice.b]) for lattice in taken]
    others = [f for f in found if not any(_same(_steps(basis, _basis(f))) for basis in shown)]
    return taken + [replace(other, kind="second") for other in others[:1]]


def _as_given(
    asked: Strain, basis: Array, found: Sequence[FoundLattice], sample: Sample, probe: FoundProbe,
    good: NDArray[np.bool_],
) -> FoundLattice:  # fmt: skip
    """A given basis with the frames and centres of the found lattice that it belongs to."""
    for same in (True, False):
        for lattice in found:
            steps = _steps(basis, _basis(lattice))
            if steps is None or _same(steps) != same:
                continue
            # a second choice may be chance, and so all the more what is a part of it
            if same or lattice.kind == "grain":
                return _belonging(asked, basis, steps, lattice)
    if found:
        _refuse_other(asked, basis, found[0], sample, probe, good)
    # where it is in which frames nobody knows
    count = len(sample.frames)
    every, centers = np.arange(count), np.tile(probe.center, (count, 1))
    a, b = _vectors(basis)
    return FoundLattice(probe.center, a, b, 1.0, 1.0, every, centers, np.tile(basis, (count, 1, 1)), count, "grain")


def _belonging(asked: Strain, basis: Array, steps: Array, lattice: FoundLattice) -> FoundLattice:
    """The given basis as the data have it: exactly as given unless that is far off; told where it is another cell."""
    shown, times = steps @ _basis(lattice), abs(float(np.linalg.det(steps)))
    off = float((np.linalg.norm(shown - basis, axis=1) / np.linalg.norm(shown, axis=1)).max())
    (a, b), data = _vectors(basis), _told(lattice)
    if times > 1.5:
        log.warning(
            "%s: a = %s, b = %s px span every %.0f. disk of the lattice in the data, %s; the others aren't used",
            asked.name, _text(a), _text(b), times, data,
        )  # fmt: skip
    elif times < 0.75:
        log.warning(
            "%s: a = %s, b = %s px have %.0f sites for each of the lattice found in the data, %s; are there disks?",
            asked.name, _text(a), _text(b), 1 / times, data,
        )  # fmt: skip
    if off > SAME:
        log.warning(
            "%s: a = %s, b = %s px are %.0f %% off the lattice in the data, %s; the latter is where fits begin",
            asked.name, _text(a), _text(b), 100 * off, data,
        )  # fmt: skip
        basis = shown
    a, b = _vectors(basis)
    return replace(lattice, a=a, b=b, bases=steps @ lattice.bases, score=1.0, share=1.0, kind="grain")


def _steps(basis: Array, found: Array) -> Array | None:
    """Steps N with basis = N found: whole numbers, or those of the inverse; None for another lattice."""
    for target, source, invert in ((basis, found, False), (found, basis, True)):
        exact = target @ np.linalg.inv(source)
        whole = np.rint(exact)
        off = np.linalg.norm((exact - whole) @ source, axis=1)
        least = min(float(np.hypot(*v)) for v in (*source, source[0] + source[1], source[0] - source[1]))
        near = (off <= OTHER * np.linalg.norm(target, axis=1)).all() and (off <= OFF * least).all()
        if near and abs(np.linalg.det(whole)) > 0.5:
            return np.asarray(np.linalg.inv(whole) if invert else whole, np.float64)
    return None


def _same(steps: Array | None) -> bool:
    """Whether steps lead to the same lattice and not to a part of it."""
    return steps is not None and abs(abs(float(np.linalg.det(steps))) - 1) < 0.1


def _refuse_other(
    asked: Strain, basis: Array, best: FoundLattice, sample: Sample, probe: FoundProbe, good: NDArray[np.bool_]
) -> None:
    """Refuse or warn of a lattice that has nothing to do with the one in the data, by what it explains."""
    count = len(sample.frames)
    chosen = np.unique(np.linspace(0, count - 1, min(count, FRAMES)).astype(np.int64))
    reach = TOLERANCE * math.sqrt(min(abs(np.linalg.det(basis)), abs(np.linalg.det(_basis(best)))))
    shares = np.sort(_explained(search(sample.frames[chosen], probe, good), basis, reach))
    own = float(shares[-max(1, round(0.1 * shares.size)) :].mean())
    (a, b), sure = _vectors(basis), best.score >= TRUSTED and 2 * best.frames.size >= best.looked
    text = (
        f"{asked.name}: the lattice a = {_text(a)}, b = {_text(b)} px (y, x) that was given explains "
        f"{100 * own:.0f} % of the brightness of the disks where it does best; the data show {_told(best)}, which "
        f"explains {100 * best.share:.0f} %"
    )
    if own < REFUSED * best.share and sure:
        raise RecipeError(
            f"{text}. Give a and b in px of the frames as they are read (binned?), or leave them out; the picture of "
            "gpuem check without a and b shows what is found"
        )
    if own < WARNED * best.share:
        log.warning("%s: is it the right lattice (picture of gpuem check)?", text)
    else:
        log.info("%s", text)


def _explained(peaks: Array, basis: Array, reach: float) -> Array:
    """Part of the brightness of each frame's peaks, a few very strong ones held down, that lies on a lattice."""
    heights = np.nan_to_num(peaks[..., 2])
    ranked = -np.sort(-heights, axis=1)
    w = np.minimum(heights, ranked[:, min(4, ranked.shape[1] - 1), None] + 1e-300)
    best = np.zeros(len(peaks))
    for k in range(min(4, peaks.shape[1])):
        # one of the brightest is on it
        exact = (peaks[..., :2] - peaks[:, k : k + 1, :2]) @ np.linalg.inv(basis)
        off = np.hypot(*np.moveaxis((exact - np.rint(exact)) @ basis, -1, 0))
        own = np.where(np.arange(peaks.shape[1]) == k, 0.0, w)
        with np.errstate(invalid="ignore"):
            share = (own * (off < reach)).sum(axis=1) / np.maximum(own.sum(axis=1), 1e-300)
        best = np.maximum(best, share)
    return best


# ---- the centre


def given_centre(
    asked: Strain, ranked: Sequence[Origin], lattice: FoundLattice, wander: float, radius: float
) -> Origin:
    """The site that a given centre is; refused between disks, warned of where the data show another."""
    given = np.array(asked.center)
    off = [float(np.hypot(*(given - one.place))) for one in ranked]
    own = ranked[int(np.argmin(off))]
    least, best = min(off), ranked[0]
    basis = _basis(lattice)
    spacing = min(float(np.hypot(*v)) for v in (*basis, basis[0] + basis[1], basis[0] - basis[1]))
    y, x = given.tolist()
    where = (
        f"{asked.name}: center = ({y:.4g}, {x:.4g}) px (y, x) lies {least:.3g} px from the nearest disk, "
        f"at ({own.place[0]:.4g}, {own.place[1]:.4g}) px, of a lattice of disks {spacing:.4g} px apart"
    )
    shown = f"the data show the direct beam at ({best.place[0]:.4g}, {best.place[1]:.4g}) px, {best.describe()}"
    if least > OFF * spacing + wander / 2 and 2 * lattice.frames.size >= lattice.looked:
        raise RecipeError(f"{where}: no disk is there. Give the centre of a disk, or leave center out: {shown}")
    if least > max(NOT_ON[0], NOT_ON[1] * radius) + wander / 2:
        log.warning("%s; %s", where, shown)
    elif own is not best and best.confidence >= ODDS * own.confidence:
        log.warning(
            "%s: center = (%.4g, %.4g) px is taken as given (confidence %.2g), but %s. Strain hardly depends on it",
            asked.name, y, x, own.confidence, shown,
        )  # fmt: skip
    elif own.state == "dark":
        log.warning("%s: no disk is seen at center = (%.4g, %.4g) px (beam stop?); %s", asked.name, y, x, shown)
    return own


# ---- in words


def _basis(lattice: FoundLattice) -> Array:
    return np.array([lattice.a, lattice.b])


def _vectors(basis: Array) -> tuple[tuple[float, float], tuple[float, float]]:
    (ay, ax), (by, bx) = basis.tolist()
    return (ay, ax), (by, bx)


def _text(v: tuple[float, float]) -> str:
    return f"({v[0]:.4g}, {v[1]:.4g})"


def _told(lattice: FoundLattice) -> str:
    """The found lattice with its lengths."""
    a, b = lattice.a, lattice.b
    return (
        f"a = {_text(a)}, b = {_text(b)} px (y, x), |a| {math.hypot(*a):.4g} px, |b| {math.hypot(*b):.4g} px, in "
        f"{lattice.frames.size} of {lattice.looked} frames"
    )
