"""How well this machine measures strain: what ``gpuem selftest strain`` runs and compares with the physical limit.

Patterns of known deformation (`gpuem.synthetic`) go through `gpuem.run` as any data would. Errors are those of the
lattice found, as a strain: RMS over the four components of G G0^-1; the bound is the least that any unbiased estimator
can have with these electrons. The pulls are (found - true) / sigma of exx, eyy, exy and the rotation: where the
reported sigma are true, their standard deviation is 1.

At few electrons the bound seems out of reach, since it looks at the true lattice only, while edges are kinks. With the
intensities known, and starting at the truth, Fisher scoring (96 patterns) and the posterior mean under a flat prior
(48 of these) both had 1.3 times the bound at 1e3 electrons. With free intensities scoring had 1.33 at 1e3, 1.13 at 1e4,
1.02 at 1e5 and 1.04 at 1e6.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import gpuem
from gpuem import job, synthetic
from gpuem.analyses import Analysis, deformation, reference_lattice
from gpuem.errors import DataError, GpuemError
from gpuem.results import Results

LEGEND = (
    "error: RMS of the four components of the lattice matrix, as strain; bound: Cramer and Rao's, for a fit that knows "
    "everything but the lattice, the intensities and the background; pulls: spread of error / sigma, should be 1"
)
DOSES = (1e3, 1e4, 1e5, 1e6)
"""Electrons per pattern."""

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "background": {"background": 10.0},
    "tilt": {"tilt": 1.0},
    "distortion": {"distortion": (1.03, 20.0)},
    "structure": {"structure": 0.3},
    "moving structure": {"structure": 0.3, "drift": 1.0},
}
"""What the patterns have beyond set K: a background of 5 % of the central disk, reflections that differ up to e^2-fold
from their Friedel mates, 3 % of ellipticity, fringes of 30 % in the disks, which stay or move over the scan."""

KNOWN = ("plain", "background", "tilt", "distortion")
"""Cases that are judged: their bound can be reached. That of structure takes the structure for known."""

MOST_RATIO, PULLS = 1.2, (0.9, 1.15)
"""What counts as good: error over bound, and standard deviation of the pulls."""

TIMED_FRAMES = 4096
"""Frames of the run that is timed, for "plain": enough that looking at the data beforehand is a small part."""

COLUMNS = ("patterns", "electrons", "valid", "error", "bound", "error / bound", "pulls", "patterns/s", "")


@dataclass(frozen=True)
class Row:
    """What was found for one kind of patterns.

    Parameters
    ----------
    case : str
        Key of `CASES`.
    dose : float
        Electrons per pattern.
    valid : float
        Fraction of positions with a lattice.
    error, bound : float
        RMS over the four components of G G0^-1.
    pull : float
        Standard deviation of (found - true) / sigma.
    rate : float
        Patterns per second, from frames in memory to maps, with the look beforehand.
    note : str
        Why there is no result; empty where there is one.
    """

    case: str
    dose: float
    valid: float
    error: float
    bound: float
    pull: float
    rate: float
    note: str = ""

    @property
    def ratio(self) -> float:
        """Error over bound."""
        return self.error / self.bound

    @property
    def judged(self) -> bool:
        """Whether the bound can be reached, so that the row is good or bad."""
        return self.case in KNOWN

    @property
    def good(self) -> bool:
        """Whether the error is near the bound, the sigma are true and every position has a lattice."""
        return self.valid == 1 and self.ratio <= MOST_RATIO and PULLS[0] <= self.pull <= PULLS[1]


def strain(
    doses: Sequence[float] = DOSES,
    cases: Iterable[str] = tuple(CASES),
    *,
    scan: tuple[int, ...] = (8, 32),
    seed: int = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    analysis: Analysis | None = None,
    progress: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measure the strain of synthetic patterns and compare with truth and bound.

    Parameters
    ----------
    doses : sequence of float
        Electrons per pattern.
    cases : sequence of str
        Keys of `CASES`.
    scan : tuple of int
        Scan shape of every run; 256 positions tell the error to 3 %.
    seed : int
        Of the patterns.
    device : {"auto", "cuda", "cpu"}
        Where to compute.
    analysis : Analysis, optional
        What measures; ``gpuem.Strain()`` by default.
    progress : callable
        Called with every row as soon as it is there.

    Returns
    -------
    list of Row
        One for every case and dose.
    """
    package: Any = gpuem
    tested: Analysis = package.Strain() if analysis is None else analysis
    rows = []
    warm = False
    for case in cases:
        for dose in doses:
            pattern = synthetic.Pattern(**{"dose": dose, **CASES[case]})
            frames, truth = synthetic.generate(pattern, scan, seed)
            if not warm:
                # what is compiled at the first call is no part of the speed
                _run(frames, tested, device)
                warm = True
            rows.append(_row(case, pattern, frames, truth, lambda data: _run(data, tested, device)))
            progress(rows[-1])
    return rows


def _run(frames: NDArray[np.uint16], analysis: Analysis, device: Literal["auto", "cuda", "cpu"]) -> tuple[Any, float]:
    """Maps of an analysis and the seconds they took; the error instead of the maps where there is one."""
    began = time.perf_counter()
    try:
        maps = _named(job.run(frames, analysis, device=device), analysis.name)
    except GpuemError as error:
        return error, math.nan
    return maps, time.perf_counter() - began


def _named(results: Results, name: str) -> dict[str, NDArray[Any]]:
    """Maps of one analysis as flat arrays, without its name; vectors as (positions, 2)."""
    found = {key: results[key].data for key in results if key == "valid" or key.startswith(f"{name}/")}
    flat = {key.partition("/")[2] or f"read {key}": np.asarray(data) for key, data in found.items()}
    return {key: data.reshape(-1, 2) if key in ("a", "b", "center") else data.reshape(-1) for key, data in flat.items()}


def _row(
    case: str,
    pattern: synthetic.Pattern,
    frames: NDArray[np.uint16],
    truth: dict[str, Any],
    run: Callable[[NDArray[np.uint16]], tuple[Any, float]],
) -> Row:
    """Run, judge and time one kind of patterns."""
    maps, seconds = run(frames)
    dose = pattern.dose or math.nan
    count = frames.size // math.prod(pattern.frame)
    if isinstance(maps, GpuemError):
        return Row(case, dose, 0.0, math.nan, truth["bound"], math.nan, math.nan, str(maps))
    if case == "plain":
        times = -(-TIMED_FRAMES // count)
        _, seconds = run(np.concatenate([frames] * times))
        count *= times
    try:
        valid, error, pull = judge(maps, truth["theta"].reshape(-1, 6), pattern)
    except DataError as wrong:
        return Row(case, dose, 0.0, math.nan, truth["bound"], math.nan, count / seconds, str(wrong))
    return Row(case, dose, valid, error, truth["bound"], pull, count / seconds)


def judge(
    maps: dict[str, NDArray[Any]], theta: NDArray[np.float64], pattern: synthetic.Pattern
) -> tuple[float, float, float]:
    """Compare maps with truth.

    The basis that was found may be any of the lattice; the strain may refer to any reference: G0 = F^T G is read from
    the maps themselves (mean over the scan), so that what is judged is how strain follows the lattice.

    Parameters
    ----------
    maps : dict of arrays
        ``a``, ``b`` (n, 2) px; ``exx``, ``eyy``, ``exy``, ``rotation`` (deg) and their ``_sigma`` (n,); ``valid`` (n,).
    theta : (n, 6) array
        True lattices on the detector.
    pattern : Pattern
        What was seen.

    Returns
    -------
    valid : float
        Fraction of positions with a lattice.
    error : float
        RMS over the four components of G G0^-1.
    pull : float
        Standard deviation, about zero, of (found - true) / sigma over strain and rotation.
    """
    names = ("exx", "eyy", "exy", "rotation")
    measured = np.array([maps[name] for name in names], dtype=np.float64).T
    keep = maps["valid"].astype(bool) & np.isfinite(measured).all(axis=1)
    if not keep.any():
        raise DataError(f"not one of the {keep.size} positions has a lattice")
    found = np.stack([maps["a"], maps["b"]], axis=1)[keep].astype(np.float64)
    true, measured = theta[keep, 2:].reshape(-1, 2, 2), measured[keep]
    a, b = np.median(found, axis=0).tolist()
    a0, b0 = pattern.lattice.T[:, ::-1].tolist()
    steps = reference_lattice.same_basis((a[0], a[1]), (b[0], b[1]), (a0[0], a0[1]), (b0[0], b0[1]))
    found = steps @ found
    wrong = np.moveaxis((found - true)[:, :, ::-1], 1, 2) @ np.linalg.inv(pattern.lattice)
    expected = deformation.strain(true[:, 0], true[:, 1], _reference(found, measured), out=np.empty(measured.shape))
    sigma = np.array([maps[f"{name}_sigma"] for name in names], dtype=np.float64).T[keep]
    pulls = (measured - expected) / sigma
    return float(keep.mean()), float(np.sqrt((wrong**2).mean())), float(np.sqrt((pulls**2).mean()))


def _reference(found: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows a0, b0 (y, x) that strain maps refer to: G0 = F^T G with F = R U, mean over positions."""
    exx, eyy, exy, degrees = measured.T
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    gradient = np.array([[c, -s], [s, c]]).transpose(2, 0, 1) @ np.array([[1 + exx, exy], [exy, 1 + eyy]]).transpose(
        2, 0, 1
    )
    # rows of `found` are (y, x); of a row vector v in (x, y) order F^T v is v F
    reference: NDArray[np.float64] = (found[:, :, ::-1] @ gradient).mean(axis=0)[:, ::-1]
    return reference


def cells(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The table, as text: one tuple for every row, in the order of `COLUMNS`."""
    return [_cells(row) for row in rows]


def _cells(row: Row) -> tuple[str, ...]:
    if row.note:
        return row.case, f"{row.dose:,.0f}", "none", "", f"{row.bound:.2e}", "", "", "", row.note
    verdict = ("ok" if row.good else "WRONG") if row.judged else ""
    return (
        row.case,
        f"{row.dose:,.0f}",
        f"{100 * row.valid:.4g} %",
        f"{row.error:.2e}",
        f"{row.bound:.2e}",
        f"{row.ratio:.2f}",
        f"{row.pull:.2f}",
        # in the others the look at the sample takes most of the time
        f"{row.rate:,.0f}" if row.case == "plain" else "",
        verdict,
    )


def table(rows: Iterable[Row]) -> str:
    """The table as lines of text."""
    lines = [COLUMNS, *cells(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:]), line[-1]]).rstrip()
        for line in lines
    )
