"""The lattice that strain is measured from: found, checked, and described by the same basis everywhere.

Lattice vectors are (y, x) in px; a basis is a (2, 2) array with rows a, b.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, RecipeError

PARALLEL = 1e-6
"""Vectors the sine of whose angle is smaller are parallel as far as float32 can tell."""

CHUNK = 1 << 18
"""Positions looked at together, so that temporaries stay small."""

STRETCH = 1.25
"""Lattices that differ by a larger stretch in some direction are not one crystal's."""

TURN = 0.01
"""What a rotation (rad^2) counts beside a stretch (squared): a quarter turn as much as a strain of 16 %."""

Vector = tuple[float, float]


def crystal_angle(reference: NDArray[Any], direction: tuple[int, int], matrix: NDArray[Any] | None = None) -> float:
    """Angle of the axes whose x lies along h a0 + k b0, in degrees for `axes_matrix`.

    Parameters
    ----------
    reference : (2, 2) array
        Rows a0, b0, each (y, x) in px.
    direction : (h, k)
        The reflection that x shall point to: normal to the planes (h k) of the crystal.
    matrix : (2, 2) array, optional
        What acts on (x, y) before, that is, `ellipse_matrix`.
    """
    check_reference(reference)
    if not any(direction):
        raise RecipeError("crystal direction (0, 0) has no direction: give a reflection (h, k), such as (1, 0)")
    y, x = np.asarray(direction, dtype=np.float64) @ np.asarray(reference, dtype=np.float64)
    along = (np.eye(2) if matrix is None else np.asarray(matrix, dtype=np.float64)) @ [x, y]
    return math.degrees(math.atan2(along[1], along[0]))


def check_reference(reference: NDArray[Any], what: str = "reference lattice") -> NDArray[np.float64]:
    """The reference (rows a0, b0) as float64; raises RecipeError where it spans no lattice."""
    found = np.asarray(reference, dtype=np.float64)
    if found.shape != (2, 2) or not np.isfinite(found).all():
        raise RecipeError(f"{what}: two finite vectors (y, x) are needed, found {found.tolist()}")
    lengths = np.hypot(found[:, 0], found[:, 1])
    if not abs(found[0, 1] * found[1, 0] - found[0, 0] * found[1, 1]) > PARALLEL * lengths.prod():
        (ay, ax), (by, bx) = found.tolist()
        raise RecipeError(
            f"{what}: a = ({ay:g}, {ax:g}) and b = ({by:g}, {bx:g}) px (y, x) are parallel or zero and span no "
            "lattice; give two vectors in different directions"
        )
    return found


def median_reference(
    a: NDArray[Any], b: NDArray[Any], valid: NDArray[np.bool_], region: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """The reference lattice as the median of each component over valid positions.

    The median and not the mean: a wrong lattice among the reference's positions doesn't move it, and its larger error
    (by 1.25) is nothing beside that of a single position.

    Parameters
    ----------
    a, b : (n, 2) array
        Lattice vectors (y, x) in px; rows that aren't finite are left out.
    valid : (n,) bool
        Positions with a lattice.
    region : (n,) bool, optional
        Positions of the reference region; all by default.

    Returns
    -------
    (2, 2) float64
        Rows a0, b0. Raises RecipeError where the region is empty, DataError where it holds no lattice.
    """
    wanted = valid if region is None else valid & region
    if region is not None and not region.any():
        raise RecipeError(
            f"reference region: none of the {region.size} scan positions lies in it; choose a region inside the scan, "
            'or reference = "median"'
        )
    keep = np.empty(len(a), np.bool_)
    for start in range(0, len(a), CHUNK):
        part = slice(start, start + CHUNK)
        keep[part] = wanted[part] & np.isfinite(a[part]).all(axis=1) & np.isfinite(b[part]).all(axis=1)
    if not keep.any():
        of = valid.size if region is None else int(region.sum())
        raise DataError(
            f"reference: none of its {of} scan positions has a valid lattice ({int(valid.sum())} of {valid.size} in "
            "the whole scan have one); choose a region of crystal, or give the vectors of the reference"
        )
    # one component at a time: of a large scan only a quarter is copied
    middle = [[np.median(v[:, i][keep], overwrite_input=True) for i in (0, 1)] for v in (a, b)]
    return check_reference(np.array(middle), f"median of {int(keep.sum())} lattices of the reference")


def same_basis(a: Vector, b: Vector, a0: Vector, b0: Vector) -> NDArray[np.int64]:
    """Describe a lattice by the basis closest to a given one.

    Parameters
    ----------
    a, b : (float, float)
        A basis of the lattice; y, x in px.
    a0, b0 : (float, float)
        What it shall be close to, such as the basis of another grain or position.

    Returns
    -------
    (2, 2) int64
        N, of determinant 1 or -1: N[0, 0] a + N[0, 1] b belongs to a0, N[1, 0] a + N[1, 1] b to b0, with the
        handedness of a0, b0. Of all bases the one that needs the least stretch to become a0, b0; of those alike by
        symmetry, the least rotation. So grains turned against each other get the same description. Raises DataError
        where the stretch exceeds `STRETCH`: that is another lattice.
    """
    steps0, wanted = _reduced(check_reference(np.array([a0, b0]), "basis to be matched"))
    steps, reduced = _reduced(check_reference(np.array([a, b]), "basis"))
    hand = np.sign(np.linalg.det(wanted) * np.linalg.det(reduced))
    best, least = np.eye(2, dtype=np.int64), math.inf
    stretch: NDArray[np.float64] = np.ones(2)
    # between shortest bases of lattices that are nearly the same, no entry is larger than 1
    for entries in product((-1, 0, 1), repeat=4):
        trial = np.reshape(entries, (2, 2))
        if trial[0, 0] * trial[1, 1] - trial[0, 1] * trial[1, 0] != hand:
            continue
        t = np.linalg.solve(wanted, trial @ reduced)
        values = np.asarray(np.linalg.svd(t, compute_uv=False), dtype=np.float64)
        cost = ((values - 1) ** 2).sum() + TURN * math.atan2(t[0, 1] - t[1, 0], t[0, 0] + t[1, 1]) ** 2
        if cost < least:
            best, least, stretch = trial, cost, values
    if not 1 / STRETCH < stretch.min() <= stretch.max() < STRETCH:
        area, area0 = abs(np.linalg.det(reduced)), abs(np.linalg.det(wanted))
        raise DataError(
            f"the lattice of a = {tuple(a)}, b = {tuple(b)} px has no basis near a0 = {tuple(a0)}, b0 = {tuple(b0)} px "
            f"(it takes stretches of {stretch.min():.3g} and {stretch.max():.3g}; cells of {area:.4g} and {area0:.4g} "
            "px^2): it's another lattice; give a basis of this one"
        )
    found: NDArray[np.int64] = np.rint(np.linalg.inv(steps0)).astype(np.int64) @ best @ steps
    return found


def _reduced(basis: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The shortest basis of a lattice (Lagrange, Gauss) and the integer steps to it."""
    steps: NDArray[np.int64] = np.eye(2, dtype=np.int64)
    while True:
        now: NDArray[np.float64] = steps @ basis
        if now[0] @ now[0] > now[1] @ now[1]:
            steps, now = steps[::-1], now[::-1]
        times = int(np.rint(now[0] @ now[1] / (now[0] @ now[0])))
        if times == 0:
            return steps, now
        steps = steps - np.array([[0, 0], [times, 0]], dtype=np.int64) @ steps
