"""Virtual detectors: the counts of each frame inside a mask."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, InstanceOf, model_validator
from pydantic.json_schema import SkipJsonSchema

from gpuem.analyses import Map, View
from gpuem.analyses.model import Centered, Name
from gpuem.axes import to_pixels
from gpuem.backends import Sums, Weights
from gpuem.errors import RecipeError
from gpuem.formats.array import read_array

log = logging.getLogger("gpuem")
_FIELDS = {
    "disk": {"center", "outer", "unit"},
    "annulus": {"center", "inner", "outer", "unit"},
    "sectors": {"center", "inner", "outer", "unit", "sectors", "start"},
    "rectangle": {"center", "height", "width", "unit"},
    "point": {"center"},
    "mask": {"mask"},
}
_NEEDED = {
    "disk": ("outer",),
    "annulus": ("outer",),
    "sectors": ("outer", "sectors"),
    "rectangle": ("height", "width"),
    "point": ("center",),
    "mask": ("mask",),
}


class VirtualDetector(Centered):
    """A virtual detector: for every scan position, the counts inside a mask on the detector.

    A pixel belongs to a disk when its centre lies at most `outer` from the detector's centre point (inclusive); an
    annulus is disk(outer) minus disk(inner). Sums of integer data are exact.

    Parameters
    ----------
    name : str
        Name of the map; sectors give ``name/0``, ``name/1``, ...
    shape : {"annulus", "disk", "rectangle", "point", "sectors", "mask"}
        Shape of the mask.
    center : tuple of float or "auto"
        Centre (y, x) in px; default the geometric one, ((H-1)/2, (W-1)/2); "auto": the direct beam, measured in a
        sample of frames. The maps' attributes say where the detector lies: ``center_y``, ``center_x``, ``outer_px``...
    inner, outer : float
        Radii, in `unit`.
    unit : str
        ``px`` (default), or ``mrad`` or ``1/A`` where the detector is calibrated.
    height, width : float
        Full edges of the rectangle, in `unit`.
    sectors : int
        Number of equal angular sectors of the annulus.
    start : float
        Where sector 0 begins, in degrees from the x axis, turning from x towards y (clockwise on the screen).
    mask : path or array
        A .npy or .tif file, or an array (y, x). Booleans and 0/1 select pixels, exactly; other numbers are
        weights, kept in single precision for pixels of up to 16 bits. Of a mask of 0 and 255 (or another whole
        number) alone a warning says so: programs for images write masks like that.
    """

    kind: Literal["virtual"] = "virtual"
    name: Name = "virtual"
    shape: Literal["annulus", "disk", "rectangle", "point", "sectors", "mask"] = "annulus"
    inner: float = Field(default=0.0, ge=0)
    outer: float | None = Field(default=None, gt=0)
    unit: str = "px"
    height: float | None = Field(default=None, gt=0)
    width: float | None = Field(default=None, gt=0)
    sectors: int | None = Field(default=None, ge=2, le=360)
    start: float = 0.0
    mask: Path | SkipJsonSchema[InstanceOf[np.ndarray[Any, Any]]] | None = None

    @model_validator(mode="after")
    def _fields_fit_shape(self) -> VirtualDetector:
        missing = [key for key in _NEEDED[self.shape] if getattr(self, key) is None]
        if missing:
            raise ValueError(f'shape "{self.shape}" needs {" and ".join(missing)}')
        unused = self.model_fields_set - _FIELDS[self.shape] - {"kind", "name", "shape", "measured"}
        if unused:
            raise ValueError(f'shape "{self.shape}" has no {", ".join(sorted(unused))}')
        if self.outer is not None and self.inner >= self.outer:
            raise ValueError(f"inner radius {self.inner:g} must be smaller than outer radius {self.outer:g}")
        return self

    def weights(self, view: View) -> Weights:
        """The mask, or one mask per sector, or one weight image."""
        mask = self._mask(view)
        if mask.dtype != np.bool_:
            return Weights(images=(mask,))
        masks = self._split(view, mask) if self.sectors else (mask,)
        for k, one in enumerate(masks):
            if not one.any():
                part = f" sector {k}" if self.sectors else ""
                raise RecipeError(
                    f"{self.name}: the {self.shape}{part} covers no pixel of the detector "
                    f"({view.frame_shape[0]}x{view.frame_shape[1]}); check center, radii and unit"
                )
        return Weights(masks=masks)

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """One map, or one per sector."""
        values = sums.images if sums.images.shape[1] else sums.masks
        names = [str(k) for k in range(values.shape[1])] if self.sectors else [""]
        place = self.place(view)
        return {
            name: Map(
                view.scan_map(values[:, k], valid),
                view.scan,
                "counts",
                f"counts inside {self.shape}" + (f", sector {name}" if name else ""),
                place,
            )
            for k, name in enumerate(names)
        }

    def place(self, view: View) -> dict[str, Any]:
        """Where the detector lies: shape, centre and lengths in px, and the lengths as they were given."""
        facts: dict[str, Any] = {"shape": self.shape}
        if self.shape == "mask":
            return {**facts, "pixels": int(np.count_nonzero(self._mask(view)))}
        facts |= self.center_facts(view)
        for key in ("inner", "outer", "height", "width"):
            value = getattr(self, key)
            if key in _FIELDS[self.shape] and value is not None:
                facts |= {key: value, f"{key}_px": self._pixels(view, value)}
        facts |= {"unit": self.unit} if "unit" in _FIELDS[self.shape] else {}
        return facts | ({"sectors": self.sectors, "start_deg": self.start} if self.sectors else {})

    def _mask(self, view: View) -> NDArray[Any]:
        if self.mask is not None:
            return _load_mask(self.mask, view.frame_shape, self.name)
        cy, cx = self.center_in(view)
        height, width = view.frame_shape
        y, x = np.ogrid[:height, :width]
        if self.shape == "point":
            return np.asarray((y == math.floor(cy + 0.5)) & (x == math.floor(cx + 0.5)))
        if self.shape == "rectangle":
            half_y, half_x = (self._pixels(view, edge) / 2 for edge in (self.height, self.width))
            return np.asarray((abs(y - cy) <= half_y) & (abs(x - cx) <= half_x))
        return disk(view.frame_shape, (cy, cx), self._pixels(view, self.outer), self._pixels(view, self.inner))

    def _split(self, view: View, mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], ...]:
        assert self.sectors is not None
        cy, cx = self.center_in(view)
        y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
        turned = (np.degrees(np.arctan2(y - cy, x - cx)) - self.start) % 360.0
        sector = np.minimum((turned / (360.0 / self.sectors)).astype(int), self.sectors - 1)
        return tuple(mask & (sector == k) for k in range(self.sectors))

    def _pixels(self, view: View, value: float | None) -> float:
        assert value is not None
        return to_pixels(value, self.unit, view.detector)


def _load_mask(mask: Path | NDArray[Any], shape: tuple[int, int], name: str) -> NDArray[Any]:
    """A mask as bool where it only selects, else as float weights."""
    array, where = (mask, "array") if isinstance(mask, np.ndarray) else (read_array(mask, f"{name}: mask"), str(mask))
    if array.shape != shape:
        raise RecipeError(f"{name}: mask {where} has shape {array.shape}, the detector {shape}; they must be equal")
    if array.dtype.kind not in "buif":
        raise RecipeError(f"{name}: mask {where} holds {array.dtype}, not numbers")
    # weights are kept in single precision
    if array.dtype.kind == "f" and not (np.abs(array) < 1e30).all():
        raise RecipeError(
            f"{name}: mask {where} holds NaN, infinity or weights of 1e30 and more; set those pixels to 0"
        )
    if not array.any():
        raise RecipeError(f"{name}: mask {where} selects no pixel")
    _warn_of_image(array, f"{name}: mask {where}")
    binary = array.dtype == np.bool_ or np.isin(array, (0, 1)).all()
    return array.astype(np.bool_ if binary else np.float64)


def _warn_of_image(array: NDArray[Any], what: str) -> None:
    """Say so where a mask holds 0 and 255, as programs for images write it: such weights are hardly meant."""
    if array.dtype == np.bool_:
        return
    level = array.reshape(-1)[int(np.argmax(array != 0))]
    if (array.dtype.kind in "ui" or level == 255) and level != 1 and np.isin(array, (0, level)).all():
        log.warning(
            "%s holds only 0 and %g: numbers other than 0 and 1 are weights, so each count is counted %g times. "
            "To select pixels give 0 and 1, or booleans (mask > 0)", what, level, level,
        )  # fmt: skip


def disk(shape: tuple[int, int], center: tuple[float, float], outer: float, inner: float = 0.0) -> NDArray[np.bool_]:
    """Disk (or annulus) on a detector of `shape`: inner < distance <= outer, the disk inclusive when `inner` is 0."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    distance2 = (y - center[0]) ** 2 + (x - center[1]) ** 2
    return np.asarray((distance2 <= outer**2) & ((distance2 > inner**2) | (inner <= 0)))
