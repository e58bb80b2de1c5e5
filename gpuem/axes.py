"""Scan and detector axes: names, pixel sizes, units. The only place that knows nm, mrad and 1/A.

Scan axes are (y, x), detector axes (y, x); y points down, x right, indices start at 0 and a pixel's centre lies on its
integer index.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import RecipeError

UNITS = ("px", "nm", "mrad", "1/A")
# sizes of pixels, and lengths in pixels, beyond which a number is a mistake and arithmetic overflows
SMALLEST, LARGEST, MOST_PIXELS = 1e-30, 1e30, 1e8
_ALIASES = {
    "um": ("nm", 1e3), "µm": ("nm", 1e3), "pm": ("nm", 1e-3), "A": ("nm", 0.1), "Å": ("nm", 0.1), "m": ("nm", 1e9),
    "rad": ("mrad", 1e3), "1/nm": ("1/A", 0.1), "nm^-1": ("1/A", 0.1), "A^-1": ("1/A", 1.0), "Å^-1": ("1/A", 1.0),
    "pixels": ("px", 1.0), "pixel": ("px", 1.0), "": ("px", 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """One axis of the scan or of the detector.

    Parameters
    ----------
    name : str
        ``scan_y``, ``scan_x``, ``detector_y`` or ``detector_x``.
    size : int
        Number of pixels.
    step : float
        Size of a pixel, in `unit`.
    unit : str
        ``px``, ``nm``, ``mrad`` or ``1/A``.
    origin : float
        Coordinate of pixel 0, in `unit`.
    """

    name: str
    size: int
    step: float = 1.0
    unit: str = "px"
    origin: float = 0.0

    @property
    def coordinates(self) -> NDArray[np.float64]:
        """Coordinate of every pixel's centre, in `unit`, shape (size,)."""
        return self.origin + self.step * np.arange(self.size, dtype=np.float64)


def scan_axes(shape: tuple[int, ...]) -> tuple[Axis, ...]:
    """Uncalibrated axes of a scan: (y, x), or names by position where it has another number of dimensions."""
    names = {1: ("scan_x",), 2: ("scan_y", "scan_x")}.get(len(shape), tuple(f"scan_{k}" for k in range(len(shape))))
    return tuple(Axis(name, size) for name, size in zip(names, shape, strict=True))


def detector_axes(shape: tuple[int, int]) -> tuple[Axis, ...]:
    """Uncalibrated axes (y, x) of a detector."""
    return Axis("detector_y", shape[0]), Axis("detector_x", shape[1])


def calibrate(axes: tuple[Axis, ...], step: float | tuple[float, ...], unit: str) -> tuple[Axis, ...]:
    """Axes with a pixel size.

    Parameters
    ----------
    axes : tuple of Axis
        The axes to calibrate, scan or detector.
    step : float or tuple of float
        Size of a pixel, one for all axes or one each.
    unit : str
        Its unit; lengths are kept in nm, angles in mrad, spatial frequencies in 1/A.

    Raises
    ------
    RecipeError
        The unit is unknown, or the step isn't a positive number.
    """
    unit, factor = canonical_unit(unit)
    steps = step if isinstance(step, tuple) else (step,) * len(axes)
    if len(steps) != len(axes) or not all(SMALLEST <= s * factor <= LARGEST for s in steps):
        raise RecipeError(
            f"pixel size {step!r}: one positive number, or one for each of {[a.name for a in axes]}, "
            f"{SMALLEST:g} to {LARGEST:g} {unit}"
        )
    return tuple(replace(a, step=s * factor, unit=unit) for a, s in zip(axes, steps, strict=True))


def canonical_unit(unit: str) -> tuple[str, float]:
    """The unit gpuem keeps for `unit` and the factor to it; raises RecipeError where it is unknown."""
    if not isinstance(unit, str):
        raise RecipeError(f"unit {unit!r}: needed is a text; known: {', '.join(UNITS)}")
    if unit in UNITS:
        return unit, 1.0
    if unit in _ALIASES:
        return _ALIASES[unit]
    raise RecipeError(f"unit {unit!r} is unknown; known: {', '.join([*UNITS, *filter(None, _ALIASES)])}")


def to_pixels(value: float, unit: str, detector: tuple[Axis, ...]) -> float:
    """A radius or distance on the detector, in pixels.

    Parameters
    ----------
    value : float
        The distance, in `unit`.
    unit : str
        ``px``, or a unit of the detector's calibration.
    detector : tuple of Axis
        The detector's axes (y, x).

    Raises
    ------
    RecipeError
        The detector isn't calibrated in that unit, or its pixels aren't square.
    """
    unit, factor = canonical_unit(unit)
    if unit == "px":
        return _within(value, value, unit)
    y, x = detector
    if y.unit != unit:
        raise RecipeError(
            f"{value:g} {unit}: the detector is calibrated in {y.unit}, not {unit}; give its pixel size, "
            f'in a recipe: [calibration] detector_step = 0.5, detector_unit = "{unit}"'
        )
    if abs(y.step - x.step) > 1e-6 * y.step:
        raise RecipeError(f"a radius in {unit} needs square pixels; these are {y.step:g} by {x.step:g} {unit}: use px")
    return _within(value * factor / y.step, value, unit)


def _within(pixels: float, value: float, unit: str) -> float:
    if not abs(pixels) <= MOST_PIXELS:
        raise RecipeError(f"{value:g} {unit} are {pixels:g} px, more than {MOST_PIXELS:g}: no detector is that large")
    return pixels
