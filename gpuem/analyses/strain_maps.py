"""From the lattices of all frames to maps of strain."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Map, View
from gpuem.analyses.deformation import MEASURES, strain
from gpuem.analyses.reference_lattice import median_reference
from gpuem.analyses.strain_errors import NO_ERRORS, StrainErrors
from gpuem.axes import Axis
from gpuem.backends import Fit, Sums, Weights
from gpuem.backends.lattice_fit import COLUMNS
from gpuem.errors import DataError

if TYPE_CHECKING:
    from gpuem.analyses.lattice_model import Model
    from gpuem.analyses.strain import Strain

log = logging.getLogger("gpuem")
CHI2, DISKS, COUNTS, GRAIN = (COLUMNS.index(name) for name in ("chi2", "disks", "counts", "grain"))
_SIGMAS = COLUMNS.index("exx_sigma")
# positions at a time, so that nothing but the maps grows with the scan
_CHUNK = 1 << 16
_TEXT = {
    "exx": "strain along x (columns)",
    "eyy": "strain along y (rows)",
    "exy": "shear strain, half the change of the angle between x and y",
    "rotation": "rotation of the lattice, positive from x towards y",
}


@dataclass(frozen=True, eq=False)
class Picture:
    """What was found in the sample, to be shown before the run.

    Parameters
    ----------
    mean : (y, x) array
        Mean pattern of the sample.
    lines : tuple of str
        The same in words.
    second : tuple or None
        Second choice of a lattice: center, a, b, score.
    scores : tuple of float
        Score of every lattice.
    runner : tuple or None
        Second choice of the direct beam: y, x in px, confidence.
    """

    mean: NDArray[np.float64]
    lines: tuple[str, ...]
    second: tuple[Any, ...] | None = None
    scores: tuple[float, ...] = ()
    runner: tuple[float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class StrainFit:
    """A strain analysis for which everything is known.

    Parameters
    ----------
    asked : Strain
        What was asked for.
    model : Model
        Probe, lattices, reflections, noise.
    fit : Fit
        What is computed of every frame.
    max_chi2 : float
        Larger reduced chi^2 is no crystal.
    region : (positions,) bool or None
        Scan positions of the reference.
    reference : (2, 2) array or None
        Vectors a0, b0 (y, x) of the reference, where they are given.
    picture : Picture
        What was found, for people.
    facts : mapping
        What the maps' attributes tell.
    errors : StrainErrors
        What sigma of the fit leaves out.
    """

    asked: Strain
    model: Model
    fit: Fit
    max_chi2: float
    region: NDArray[np.bool_] | None
    reference: NDArray[np.float64] | None
    picture: Picture
    facts: Mapping[str, Any] = field(default_factory=dict)
    errors: StrainErrors = NO_ERRORS

    @property
    def name(self) -> str:
        """Name of the maps."""
        return self.asked.name

    def weights(self, view: View) -> Weights:
        """The fit of every frame."""
        return Weights(fits=(self.fit,))

    def map_nbytes(self, view: View) -> int:
        """Bytes per scan position: four maps and their sigma, masks, what saving one map takes; others are views."""
        rows = 0 if self.fit.columns == len(COLUMNS) else 4 * len(COLUMNS)
        return 2 * 16 + 4 + 8 + rows

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """Strain against the reference, with errors and quality."""
        rows = self._lattices(sums.fits[0], valid)
        sigma = self.errors.sigma(rows[:, _SIGMAS : _SIGMAS + 4])
        known = self._known(rows, sigma, valid)
        out = np.full((len(rows), 4), np.nan, np.float32)
        facts: dict[str, Any] = dict(self.facts)
        several = len(self.model.lattices) > 1
        for grain in range(len(self.model.lattices)):
            mine = known & (rows[:, GRAIN] == grain) if several else known
            if not mine.any() and several:
                continue
            reference, how = self._reference(rows, mine)
            suffix = f"_{grain}" if several else ""
            facts[f"reference{suffix}"] = how
            if how == "region" and isinstance(self.asked.reference, tuple):
                facts["reference_region"] = [*self.asked.reference]
            facts[f"reference_a{suffix}"], facts[f"reference_b{suffix}"] = reference[0].tolist(), reference[1].tolist()
            _fill(rows, mine, reference, self.model.axes, self.asked.measure, out)
        known &= np.isfinite(out).all(axis=1)
        out[~known] = np.nan
        rows[~known, :CHI2] = np.nan
        sigma[~known] = np.nan
        if not known.any():
            log.warning("%s: not one scan position shows the lattice; see %s/chi2 and %s/disks", *(self.name,) * 3)
        return self._maps(view, rows, (out, sigma), known, facts)

    def _lattices(self, found: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Rows of `COLUMNS`, whatever the registration found."""
        if found.shape[1] == len(COLUMNS):
            return found
        from gpuem.analyses.positions import lattices_of

        return lattices_of(self.asked.registration, found, valid, self.model, self.asked.power)

    def _known(
        self, rows: NDArray[np.float32], sigma: NDArray[np.float32], valid: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Where there is a lattice to be believed."""
        known = valid.copy()
        with np.errstate(invalid="ignore"):
            for start in range(0, len(rows), _CHUNK):
                part = rows[start : start + _CHUNK]
                largest = sigma[start : start + _CHUNK, :3].max(axis=1)
                fits = np.isfinite(part[:, :CHI2]).all(axis=1) & (largest <= self.asked.max_sigma)
                # where there is none, it can't be too large
                known[start : start + _CHUNK] &= fits & ~(part[:, CHI2] > self.max_chi2)
        return known

    def _reference(self, rows: NDArray[np.float32], mine: NDArray[np.bool_]) -> tuple[NDArray[np.float64], str]:
        """The reference lattice, and where it is from."""
        start = self.model.lattices[0, 2:].reshape(2, 2)
        if self.reference is not None:
            return self.reference, "given"
        if not mine.any():
            return start, "sample"
        a, b = rows[:, 2:4], rows[:, 4:6]
        if self.region is not None:
            try:
                return median_reference(a, b, mine, self.region), "region"
            except DataError as error:
                # hours of computing must not be lost for it
                log.warning("%s: %s. The median of the whole scan is taken instead", self.name, error)
                return median_reference(a, b, mine), "median, as no lattice was found in the region"
        return median_reference(a, b, mine), "median"

    def _maps(
        self, view: View, rows: Any, strains: Any, known: NDArray[np.bool_], facts: Mapping[str, Any]
    ) -> dict[str, Map]:
        out, sigma = strains
        shape = view.scan_shape
        facts = {**facts, "measure": self.asked.measure, "positions_valid": int(known.sum())}
        measure = MEASURES[self.asked.measure]
        maps: dict[str, Map] = {}
        for k, (name, text) in enumerate(_texts(self.asked, float(facts["axes_deg"])).items()):
            unit = "deg" if name == "rotation" else ""
            what = f"{text}; {measure}" if unit == "" else text
            maps[name] = Map(out[:, k].reshape(shape), view.scan, unit, what, facts)
        for k, name in enumerate(_TEXT):
            unit = "deg" if name == "rotation" else ""
            maps[f"{name}_sigma"] = Map(
                sigma[:, k].reshape(shape), view.scan, unit, f"one standard deviation of {name}"
            )
        vector = (*view.scan, Axis("component", 2))
        for name, first, text in (
            ("a", 2, "lattice vector a (y, x) on the detector"),
            ("b", 4, "lattice vector b (y, x) on the detector"),
            ("center", 0, "direct beam (y, x) on the detector"),
        ):
            maps[name] = Map(rows[:, first : first + 2].reshape(*shape, 2), vector, "px", text)
        maps["chi2"] = Map(rows[:, CHI2].reshape(shape), view.scan, "", "reduced chi^2 of the pixels that were fitted")
        maps["disks"] = Map(rows[:, DISKS].reshape(shape), view.scan, "", "disks that were found")
        maps["counts"] = Map(rows[:, COUNTS].reshape(shape), view.scan, "counts", "brightness of all disks, per pixel")
        if len(self.model.lattices) > 1:
            grain = Map(rows[:, GRAIN].reshape(shape), view.scan, "", "which of the lattices was taken, from 0")
            maps["grain"] = grain
        maps["valid"] = Map(known.reshape(shape), view.scan, "", "the lattice was found here")
        return maps


def _texts(asked: Strain, degrees: float) -> dict[str, str]:
    """What the maps are, along which axes."""
    if asked.axes == 0:
        return _TEXT
    along = f" along the reflection {tuple(asked.axes)}," if isinstance(asked.axes, tuple) else ""
    axes = f"x{along} at {degrees:.1f} deg from the detector's columns towards its rows"
    return {
        "exx": f"strain along x; {axes}",
        "eyy": f"strain along y, at 90 deg to x towards the rows; {axes}",
        "exy": f"{_TEXT['exy']}; {axes}",
        "rotation": _TEXT["rotation"],
    }


def _fill(
    rows: Any, mine: NDArray[np.bool_], reference: NDArray[np.float64], axes: Any, measure: Any, out: Any
) -> None:
    """Strain of the positions `mine`, a few at a time."""
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        here = np.flatnonzero(mine[part]) + start
        if here.size:
            a, b = rows[here, 2:4].astype(np.float64), rows[here, 4:6].astype(np.float64)
            out[here] = strain(a, b, reference, matrix=axes, measure=measure)
