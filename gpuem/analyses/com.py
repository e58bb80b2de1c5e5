"""Centre of mass of every frame, the deflection field, its divergence and curl."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gpuem.analyses import Map, Sample, View
from gpuem.analyses.model import Centered, Name
from gpuem.analyses.robust import ABOVE_NOISE, dark_noise, lonely, outliers_of_fit
from gpuem.analyses.virtual import disk
from gpuem.axes import Axis, to_pixels
from gpuem.backends import Sums, Weights
from gpuem.errors import RecipeError

log = logging.getLogger("gpuem")
# frames that tell the noise of the camera
NOISE_FRAMES = 64
Regression = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


class CenterOfMass(Centered):
    """Centre of mass of every frame: where the beam is deflected to.

    Maps of scan shape: ``y``, ``x`` (px from the centre of pixel (0, 0)), ``shift_y``, ``shift_x`` (from the centre),
    ``field_y``, ``field_x`` (the shift after flip, rotation and descan correction), ``magnitude``, ``divergence``,
    ``curl`` (of the field, per scan pixel; only for 2-D scans of at least 2x2), ``counts`` (inside the mask) and
    ``valid``. A frame without counts has shift 0 and is not valid; a position without a frame is NaN and not valid.
    ``regression`` is the 3x2 descan plane that was subtracted: rows 1, y, x; columns field y, field x.

    A frame has counts where their sum is positive; for floats, and integers below 0 (corrected data, cameras with read
    noise), where it exceeds 5 times the noise that the camera alone gives to the sum: the square root of the number of
    pixels times the noise of a dark pixel. That is the lower quartile over all pixels of their scatter between
    successive frames of a sample of 64; where most pixels see no electron it is 0. A centre of mass off the detector is
    no beam's, and not valid either. Such frames take part in no fit.

    Fits leave out what contradicts everything else: descan plane and mean frames farther than 10 robust standard
    deviations (and 1/2 px) from a fit of least absolute distances; rotation and flip those so far from the median of
    their 8 neighbours. Nothing is left out where that would be more than a quarter. The rest is fitted by plain least
    squares, so that data without outliers give the same numbers as without the test. Their own values stay in the maps;
    the attributes count them: ``frames_without_counts``, ``descan_left_out``, ``rotation_left_out``.

    Parameters
    ----------
    name : str
        Name of the maps.
    center : tuple of float or "auto"
        Reference (y, x) in px; default the geometric centre; "auto": the direct beam, measured in a sample of frames.
    radius, inner_radius : float
        Only pixels with inner_radius < distance <= radius from the centre count; default all.
    unit : str
        Unit of the radii: ``px``, or ``mrad`` or ``1/A`` where the detector is calibrated.
    flip : bool or "auto"
        Mirror the detector's y axis first.
    rotation : float or "auto"
        Then turn the vectors by this angle in degrees, positive from x towards y. It is the angle by which the
        detector's axes must be turned onto the scan's. "auto" finds the angle with the smallest curl in closed form
        and picks of the two opposite ones that in which atoms attract electrons (divergence skewed to the negative);
        strong defocus can turn that by 180 degrees. The attribute ``curl_to_divergence`` of the maps says how sure it
        is: far below 1 certain, near 1 the data don't tell.
    descan : {"none", "mean", "plane"} or 3x2 numbers
        What to subtract from the field: nothing, its mean, a plane fitted to it, or a given plane.
    compatible : {"gpuem", "libertem"}
        "libertem": default centre H//2, W//2; counts are what is not 0; frames without counts take part in the descan
        fit, and outliers; "auto" on a grid of whole degrees with a histogram of the divergence.
    """

    kind: Literal["com"] = "com"
    name: Name = "com"
    radius: float | None = Field(default=None, gt=0)
    inner_radius: float = Field(default=0.0, ge=0)
    unit: str = "px"
    rotation: float | Literal["auto"] = 0.0
    flip: bool | Literal["auto"] = False
    descan: Literal["none", "mean", "plane"] | Regression = "none"
    compatible: Literal["gpuem", "libertem"] = "gpuem"

    @model_validator(mode="after")
    def _radii_fit(self) -> CenterOfMass:
        if self.inner_radius and self.radius is None:
            raise ValueError("inner_radius needs radius")
        if self.radius is not None and self.inner_radius >= self.radius:
            raise ValueError(f"inner_radius {self.inner_radius:g} must be smaller than radius {self.radius:g}")
        return self

    def sample_frames(self, view: View) -> int:
        """All for the direct beam; a few for the noise, where counts can be negative."""
        noisy = self.compatible == "gpuem" and view.dtype.kind in "if"
        return max(super().sample_frames(view), NOISE_FRAMES if noisy else 0)

    def look(self, view: View, sample: Sample) -> Self:
        """With the direct beam as its centre, and the noise of a dark pixel, where they are wanted."""
        found = super().look(view, sample)
        signed = view.dtype.kind == "f" or (view.dtype.kind == "i" and bool((sample.frames < 0).any()))
        if self.compatible == "libertem" or not signed:
            return found
        return found.model_copy(update={"measured": {**found.measured, "dark_noise": dark_noise(sample.frames)}})

    def weights(self, view: View) -> Weights:
        """Sum and first moments inside the mask."""
        if "auto" in (self.rotation, self.flip) and not _is_image(view):
            raise RecipeError(
                f'{self.name}: rotation or flip "auto" needs a 2-D scan of at least 2x2 positions; this one is '
                f"{' x '.join(map(str, view.scan_shape))}: give scan, or a rotation in degrees"
            )
        mask = self._mask(view)
        if mask is not None and not mask.any():
            assert self.radius is not None
            outer = to_pixels(self.radius, self.unit, view.detector)
            raise RecipeError(
                f"{self.name}: radius {outer:g} px around {self.center_in(view)} covers no pixel of the detector"
            )
        return Weights(moments=(mask,))

    def place(self, view: View) -> dict[str, Any]:
        """Where the mask lies: centre and radii in px, and the radii as they were given."""
        facts = self.center_facts(view)
        if self.radius is None:
            return {**facts, "shape": "detector"}
        outer, inner = (to_pixels(r, self.unit, view.detector) for r in (self.radius, self.inner_radius))
        given = {"radius": self.radius, "inner_radius": self.inner_radius, "unit": self.unit}
        return {**facts, "shape": "disk", **given, "outer_px": outer, "inner_px": inner}

    def center_in(self, view: View) -> tuple[float, float]:
        """The centre (y, x) in px."""
        if self.center is None and self.compatible == "libertem":
            return float(view.frame_shape[0] // 2), float(view.frame_shape[1] // 2)
        return super().center_in(view)

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """All maps of the centre of mass."""
        moments = sums.moments[:, 0].astype(np.float64)
        com, counted, facts = self._com(view, moments, valid)
        shift = com - np.array(self.center_in(view))
        fitted = valid if self.compatible == "libertem" else counted
        flip, rotation, found = self._orientation(view, shift, fitted)
        vectors = turn(shift, rotation, flip)
        plane, left_out = self._plane(view, vectors, fitted)
        vectors = vectors - _design(view) @ plane
        found = {"rotation_deg": rotation, "flip": flip} | self.place(view) | facts | found | left_out
        self._say(found, int(valid.sum()))
        maps = {
            "y": self._map(view, com[:, 0], "centre of mass, y, from the centre of pixel (0, 0)", found),
            "x": self._map(view, com[:, 1], "centre of mass, x, from the centre of pixel (0, 0)", found),
            "shift_y": self._map(view, shift[:, 0], "centre of mass, y, from the centre", found),
            "shift_x": self._map(view, shift[:, 1], "centre of mass, x, from the centre", found),
            "field_y": self._map(view, vectors[:, 0], "deflection along scan y, descan corrected", found),
            "field_x": self._map(view, vectors[:, 1], "deflection along scan x, descan corrected", found),
            "magnitude": self._map(view, np.hypot(vectors[:, 0], vectors[:, 1]), "length of the deflection", found),
            **self._derivatives(view, vectors),
            "counts": Map(view.scan_map(moments[:, 0], valid), view.scan, "counts", "counts inside the mask", found),
            "valid": Map(counted.reshape(view.scan_shape), view.scan, "", "a frame with counts was read here", facts),
        }
        terms = Axis("term", 3), Axis("component", 2)
        maps["regression"] = Map(plane, terms, "px", "subtracted plane: rows 1, scan y, scan x; columns field y, x")
        return maps

    def _mask(self, view: View) -> NDArray[np.bool_] | None:
        if self.radius is None:
            return None
        outer, inner = (to_pixels(r, self.unit, view.detector) for r in (self.radius, self.inner_radius))
        return disk(view.frame_shape, self.center_in(view), outer, inner)

    def _com(
        self, view: View, moments: NDArray[np.float64], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], dict[str, Any]]:
        """Centre of mass (the centre without counts), which frames have counts, and what decided that."""
        com = np.broadcast_to(np.array(self.center_in(view)), (valid.size, 2)).copy()
        if self.compatible == "libertem":
            counted = valid & (moments[:, 0] != 0)
            np.divide(moments[:, 1:], moments[:, :1], out=com, where=counted[:, None])
            com[~valid] = np.nan
            return com, counted, {}
        mask = self._mask(view)
        pixels = math.prod(view.frame_shape) if mask is None else np.count_nonzero(mask)
        least = ABOVE_NOISE * float(self.measured.get("dark_noise", 0.0)) * math.sqrt(pixels)
        counted = valid & (moments[:, 0] > least)
        np.divide(moments[:, 1:], moments[:, :1], out=com, where=counted[:, None])
        edge = np.array(view.frame_shape) - 0.5
        impossible = counted & ~((com >= -0.5) & (com <= edge)).all(axis=1)
        com[impossible] = self.center_in(view)
        counted &= ~impossible
        com[~valid] = np.nan
        return com, counted, {"least_counts": least, "frames_without_counts": int((valid & ~counted).sum())}

    def _say(self, found: dict[str, Any], frames: int) -> None:
        """What took no part in the fits."""
        if found.get("frames_without_counts") and found["least_counts"]:
            log.info(
                "%s: %s of %s frames have no counts above the noise (%.4g) or a centre of mass off the detector: not "
                "valid, and in no fit",
                self.name, f"{found['frames_without_counts']:,}", f"{frames:,}", found["least_counts"],
            )  # fmt: skip
        for key, what in (("descan_left_out", f'descan = "{self.descan}"'), ("rotation_left_out", "rotation")):
            if found.get(key):
                log.info("%s: %s: %s frames left out that contradict the others", self.name, what, f"{found[key]:,}")

    def _map(self, view: View, values: NDArray[Any], text: str, found: dict[str, Any] | None = None) -> Map:
        return Map(values.reshape(view.scan_shape), view.scan, "px", text, found or {})

    def _derivatives(self, view: View, vectors: NDArray[np.float64]) -> dict[str, Map]:
        if not _is_image(view):
            return {}
        divergence, curl = divergence_and_curl(vectors.reshape(*view.scan_shape, 2))
        return {
            "divergence": Map(divergence, view.scan, "px/px", "divergence of the deflection, per scan pixel"),
            "curl": Map(curl, view.scan, "px/px", "curl dFy/dx - dFx/dy of the deflection, per scan pixel"),
        }

    def _orientation(
        self, view: View, shift: NDArray[np.float64], fitted: NDArray[np.bool_]
    ) -> tuple[bool, float, dict[str, Any]]:
        """Flip, rotation in degrees, and how sure they are where they are "auto"."""
        if self.rotation != "auto" and self.flip != "auto":
            return self.flip, self.rotation, {}
        vectors = np.where(fitted[:, None], shift, np.nan).reshape(*view.scan_shape, 2)
        counts = {}
        if self.compatible == "gpuem":
            alone = lonely(vectors)
            vectors[alone] = np.nan
            counts = {"rotation_left_out": int(alone.sum())}
        flips = (False, True) if self.flip == "auto" else (self.flip,)
        angle = None if self.rotation == "auto" else self.rotation
        best = min((guess_rotation(vectors, f, angle, self.compatible) for f in flips), key=lambda found: found[0])
        sure = float(np.sqrt(best[0] / best[3])) if best[3] else 1.0
        return best[1], best[2], {"curl_to_divergence": sure, **counts}

    def _plane(
        self, view: View, vectors: NDArray[np.float64], fitted: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """What is to be subtracted, and how many frames took no part in its fit."""
        plane: NDArray[np.float64] = np.zeros((3, 2))
        if isinstance(self.descan, tuple):
            return np.array(self.descan), {}
        if self.descan == "none" or (self.descan == "mean" and not fitted.any()):
            return plane, {}
        terms = 1 if self.descan == "mean" else 3
        design, wanted = _design(view)[fitted, :terms], vectors[fitted]
        facts: dict[str, Any] = {}
        if self.compatible == "gpuem" and len(design) > terms:
            far = outliers_of_fit(design, wanted)
            design, wanted, facts = design[~far], wanted[~far], {"descan_left_out": int(far.sum())}
        if terms == 1:
            plane[0] = wanted.mean(axis=0)
            return plane, facts
        if np.linalg.matrix_rank(design) < 3:
            # known only now: the other maps must not be lost for it
            log.warning(
                '%s: descan = "plane" needs frames with counts that don\'t lie on one line; the field is NaN', self.name
            )
            return np.full((3, 2), np.nan), facts
        return np.asarray(np.linalg.lstsq(design, wanted, rcond=None)[0]), facts


def turn(vectors: NDArray[np.float64], degrees: float, flip: bool) -> NDArray[np.float64]:
    """Vectors (..., 2) as (y, x): y mirrored where `flip`, then turned from x towards y."""
    y, x = (-vectors[..., 0] if flip else vectors[..., 0]), vectors[..., 1]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.stack([c * y + s * x, c * x - s * y], axis=-1)


def divergence_and_curl(vectors: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Divergence and curl dFy/dx - dFx/dy of a field (y, x, 2), central differences, one-sided at the edges."""
    y_y, y_x = np.gradient(vectors[..., 0])
    x_y, x_x = np.gradient(vectors[..., 1])
    return np.asarray(y_y + x_x), np.asarray(y_x - x_y)


def guess_rotation(
    vectors: NDArray[np.float64], flip: bool, angle: float | None, compatible: str
) -> tuple[float, bool, float, float]:
    """The rotation that leaves the least curl.

    Turning a field by t turns (curl, divergence) into (cos t curl + sin t div, cos t div - sin t curl). The mean square
    of the curl is therefore a quadratic form in (cos t, sin t): its smallest eigenvector is the answer, up to 180
    degrees. Of the two the one is taken in which the divergence is skewed to the negative: nuclei attract electrons.

    Returns
    -------
    residual : float
        Mean square of the curl that is left.
    flip : bool
        As given.
    degrees : float
        The rotation, in (-180, 180].
    divergence : float
        Mean square of the divergence after that rotation. A residual far below it says that the rotation is
        certain; one as large as it, that the data don't tell.
    """
    divergence, curl = divergence_and_curl(turn(vectors, 0.0, flip))
    if compatible == "libertem":
        divergence, curl = divergence[:-1, :-1], curl[:-1, :-1]
    known = np.isfinite(divergence) & np.isfinite(curl)
    divergence, curl = divergence[known], curl[known]
    if divergence.size == 0:
        log.warning('rotation "auto": no two neighbouring frames with counts; the field is NaN')
        return np.nan, flip, np.nan, np.nan
    form = np.array([[curl @ curl, curl @ divergence], [curl @ divergence, divergence @ divergence]]) / curl.size
    if angle is not None:
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        residual = float(np.array([c, s]) @ form @ np.array([c, s]))
        return residual, flip, angle, float(np.trace(form)) - residual
    if compatible == "libertem":
        grid = np.radians(np.arange(180))
        directions = np.stack([np.cos(grid), np.sin(grid)])
        residuals = ((form @ directions) * directions).sum(axis=0)
        degrees, residual = float(np.argmin(residuals)), float(residuals.min())
    else:
        values, axes = np.linalg.eigh(form)
        degrees, residual = float(np.degrees(np.arctan2(axes[1, 0], axes[0, 0]))), float(values[0])
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = c * divergence - s * curl
    if compatible == "libertem":
        largest = np.abs(turned).max()
        counts, _ = np.histogram(turned, bins=5, range=(-largest, largest) if largest else None)
        wrong = counts[0] < counts[-1]
    else:
        wrong = np.mean((turned - turned.mean()) ** 3) > 0
    degrees += 180.0 if wrong else 0.0
    return residual, flip, 180.0 - (180.0 - degrees) % 360.0, float(np.trace(form)) - residual


def _design(view: View) -> NDArray[np.float64]:
    """Rows (1, y, x) for every scan position, indices of the full scan; y is 0 where the scan has one axis."""
    index = np.indices(view.scan_shape).reshape(len(view.scan), -1)
    padded = np.zeros((2, index.shape[1]))
    padded[2 - min(2, len(index)) :] = index[-2:]
    return np.column_stack([np.ones(index.shape[1]), padded.T])


def _is_image(view: View) -> bool:
    return len(view.scan) == 2 and min(view.scan_shape) >= 2
