"""Centre of mass of every frame, the deflection field, its divergence and curl."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gpuem.analyses import Map, View
from gpuem.analyses.model import Model, Name, center_on
from gpuem.analyses.virtual import disk
from gpuem.axes import Axis, to_pixels
from gpuem.backends import Sums, Weights
from gpuem.errors import RecipeError

log = logging.getLogger("gpuem")
Regression = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


class CenterOfMass(Model):
    """Centre of mass of every frame: where the beam is deflected to.

    Maps of scan shape: ``y``, ``x`` (px from the centre of pixel (0, 0)), ``shift_y``, ``shift_x`` (from the centre),
    ``field_y``, ``field_x`` (the shift after flip, rotation and descan correction), ``magnitude``, ``divergence``,
    ``curl`` (of the field, per scan pixel; only for 2-D scans of at least 2x2), ``counts`` (inside the mask) and
    ``valid``. A frame without counts has shift 0 and is not valid; a position without a frame is NaN and not valid.
    ``regression`` is the 3x2 descan plane that was subtracted: rows 1, y, x; columns field y, field x.

    Parameters
    ----------
    name : str
        Name of the maps.
    center : tuple of float
        Reference (y, x) in px; default the geometric centre.
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
        "libertem": default centre H//2, W//2; frames without counts take part in the descan fit; "auto" on a grid of
        whole degrees with a histogram of the divergence.
    """

    kind: Literal["com"] = "com"
    name: Name = "com"
    center: tuple[float, float] | None = None
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

    def weights(self, view: View) -> Weights:
        """Sum and first moments inside the mask."""
        if "auto" in (self.rotation, self.flip) and not _is_image(view):
            raise RecipeError(
                f'{self.name}: rotation or flip "auto" needs a 2-D scan of at least 2x2 positions; this one is '
                f"{' x '.join(map(str, view.scan_shape))}: give scan, or a rotation in degrees"
            )
        center = self._center(view)
        if self.radius is None:
            return Weights(moments=(None,))
        outer, inner = (to_pixels(r, self.unit, view.detector) for r in (self.radius, self.inner_radius))
        mask = disk(view.frame_shape, center, outer, inner)
        if not mask.any():
            raise RecipeError(f"{self.name}: radius {outer:g} px around {center} covers no pixel of the detector")
        return Weights(moments=(mask,))

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """All maps of the centre of mass."""
        center = np.array(self._center(view))
        moments = sums.moments[:, 0].astype(np.float64)
        counted = valid & (moments[:, 0] != 0)
        com = np.broadcast_to(center, (valid.size, 2)).copy()
        np.divide(moments[:, 1:], moments[:, :1], out=com, where=counted[:, None])
        com[~valid] = np.nan
        shift = com - center
        fitted = valid if self.compatible == "libertem" else counted
        flip, rotation, found = self._orientation(view, shift, fitted)
        vectors = turn(shift, rotation, flip)
        plane = self._plane(view, vectors, fitted)
        vectors = vectors - _design(view) @ plane
        found |= {"rotation_deg": rotation, "flip": flip, "center_y": float(center[0]), "center_x": float(center[1])}
        maps = {
            "y": self._map(view, com[:, 0], "centre of mass, y, from the centre of pixel (0, 0)"),
            "x": self._map(view, com[:, 1], "centre of mass, x, from the centre of pixel (0, 0)"),
            "shift_y": self._map(view, shift[:, 0], "centre of mass, y, from the centre", found),
            "shift_x": self._map(view, shift[:, 1], "centre of mass, x, from the centre", found),
            "field_y": self._map(view, vectors[:, 0], "deflection along scan y, descan corrected", found),
            "field_x": self._map(view, vectors[:, 1], "deflection along scan x, descan corrected", found),
            "magnitude": self._map(view, np.hypot(vectors[:, 0], vectors[:, 1]), "length of the deflection", found),
            **self._derivatives(view, vectors),
            "counts": Map(view.scan_map(moments[:, 0], valid), view.scan, "counts", "counts inside the mask"),
            "valid": Map(counted.reshape(view.scan_shape), view.scan, "", "a frame with counts was read here"),
        }
        terms = Axis("term", 3), Axis("component", 2)
        maps["regression"] = Map(plane, terms, "px", "subtracted plane: rows 1, scan y, scan x; columns field y, x")
        return maps

    def _center(self, view: View) -> tuple[float, float]:
        if self.center is None and self.compatible == "libertem":
            return float(view.frame_shape[0] // 2), float(view.frame_shape[1] // 2)
        return center_on(view, self.center, self.name)

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
        flips = (False, True) if self.flip == "auto" else (self.flip,)
        angle = None if self.rotation == "auto" else self.rotation
        best = min((guess_rotation(vectors, f, angle, self.compatible) for f in flips), key=lambda found: found[0])
        return best[1], best[2], {"curl_to_divergence": float(np.sqrt(best[0] / best[3])) if best[3] else 1.0}

    def _plane(self, view: View, vectors: NDArray[np.float64], fitted: NDArray[np.bool_]) -> NDArray[np.float64]:
        if isinstance(self.descan, tuple):
            return np.array(self.descan)
        plane: NDArray[np.float64] = np.zeros((3, 2))
        if self.descan == "mean" and fitted.any():
            plane[0] = vectors[fitted].mean(axis=0)
        if self.descan == "plane":
            design = _design(view)[fitted]
            if np.linalg.matrix_rank(design) < 3:
                # known only now: the other maps must not be lost for it
                log.warning(
                    '%s: descan = "plane" needs frames with counts that don\'t lie on one line; the field is NaN',
                    self.name,
                )
                return np.full((3, 2), np.nan)
            plane = np.asarray(np.linalg.lstsq(design, vectors[fitted], rcond=None)[0])
        return plane


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
