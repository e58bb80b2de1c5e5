"""Analyses: each declares what it needs of a frame and turns the sums into maps.

An analysis is a frozen pydantic model; its fields are what a recipe may write. It has two methods: `weights` says what
is needed of each frame, `finish` makes maps of the sums. It never opens a file, never knows the device, never sees
another analysis. One that has to know the frames before it can say what it needs of each of them looks at a sample of
them first and becomes another analysis (`Looking`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gpuem.axes import Axis
from gpuem.backends import Sums, Weights
from gpuem.errors import RecipeError
from gpuem.messages import shown

if TYPE_CHECKING:
    from gpuem.analyses.direct_beam import DirectBeam


@dataclass(frozen=True)
class Map:
    """A result with its axes.

    Parameters
    ----------
    data : array
        The values; NaN (or False) where a scan position has no frame.
    axes : tuple of Axis
        One for every dimension of `data`.
    units : str
        Unit of the values.
    description : str
        What the values mean, in a sentence.
    attributes : mapping
        Plain values found on the way, such as a rotation angle.
    """

    data: NDArray[Any]
    axes: tuple[Axis, ...]
    units: str
    description: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """What an analysis may know of the data: axes and pixel type."""

    scan: tuple[Axis, ...]
    detector: tuple[Axis, ...]
    dtype: np.dtype[Any]

    @property
    def scan_shape(self) -> tuple[int, ...]:
        """Shape of the scan."""
        return tuple(axis.size for axis in self.scan)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Detector shape (y, x)."""
        return self.detector[0].size, self.detector[1].size

    def scan_map(self, values: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Values per scan position as a float64 map, NaN where `valid` is False (exact below 2^53)."""
        return np.where(valid, values.astype(np.float64), np.nan).reshape(self.scan_shape)


@dataclass(frozen=True)
class Sample:
    """Frames that analyses look at beforehand, spread evenly over the wanted scan positions.

    Parameters
    ----------
    frames : (n, y, x) array
        Corrected frames in their native type; at least one, none with NaN.
    positions : (n,) int64
        Their flat scan positions, each once.
    wanted : (positions,) bool or None
        The scan positions that are read, where that is known.
    scan_shape : tuple of int
        Shape of the scan; empty where it is not known.
    """

    frames: NDArray[Any]
    positions: NDArray[np.int64]
    wanted: NDArray[np.bool_] | None = None
    scan_shape: tuple[int, ...] = ()

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the frames."""
        return np.asarray(self.frames.mean(axis=0, dtype=np.float64))

    @cached_property
    def direct_beam(self) -> DirectBeam:
        """The direct beam, measured once for all who ask; raises DataError where there is nothing to measure."""
        from gpuem.analyses.direct_beam import measure_direct_beam

        known = bool(self.scan_shape)
        where = np.column_stack(np.unravel_index(self.positions, self.scan_shape)) if known else self.positions[:, None]
        return measure_direct_beam(self.frames, coordinates=where)


@runtime_checkable
class Analysis(Protocol):
    """What the engine asks of an analysis.

    It may also have ``map_nbytes(view)``: bytes per scan position of its maps and of what it makes them from; without
    it `gpuem.tiles.MAPS_NBYTES` are counted.
    """

    @property
    def name(self) -> str:
        """Name of its maps."""

    def weights(self, view: View) -> Weights:
        """What is needed of each frame; raises RecipeError where it doesn't fit the detector."""

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """Make maps of the sums.

        Parameters
        ----------
        view : View
            Axes and pixel type.
        sums : Sums
            The analysis's own columns, one row per scan position.
        valid : (positions,) bool
            Which positions had a readable frame.
        """


@runtime_checkable
class Looking(Protocol):
    """An analysis that looks at a sample of the frames before it says what it needs of each.

    It may also have ``sample_frames(view)``: how many frames it wants to see; 0: none, it is ready as it is. Without it
    it gets as many as `gpuem.look` takes at most.
    """

    @property
    def name(self) -> str:
        """Name of its maps."""

    def look(self, view: View, sample: Sample) -> Analysis:
        """The analysis with all that it needed to find out; raises RecipeError or DataError where it can't.

        Parameters
        ----------
        view : View
            Axes and pixel type.
        sample : Sample
            Frames, to be left as they are: other analyses look at them too.
        """


def listed(analyses: Any) -> list[Analysis | Looking]:
    """What was given as analyses, as a list; one alone may stand for itself.

    Raises
    ------
    RecipeError
        Something isn't an analysis: a class instead of an instance, a name, an object without the methods.
    """
    several = isinstance(analyses, Iterable) and not isinstance(analyses, str | bytes | Mapping | Analysis | Looking)
    found = list(analyses) if several else [analyses]
    for one in found:
        if isinstance(one, type):
            raise RecipeError(f"analyses: {one.__name__} is a class; write {one.__name__}(), with its arguments")
        if not isinstance(one, Analysis | Looking):
            raise RecipeError(
                f"analyses: {shown(one)} is no analysis, such as gpuem.Sum(): needed are name, weights(view) and "
                "finish(view, sums, valid), or look(view, sample)"
            )
        if not isinstance(one.name, str):
            raise RecipeError(f"analyses: {type(one).__name__}.name is {shown(one.name)}; needed is a text")
    return found


def fields(analysis: Any) -> dict[str, Any]:
    """What was asked of an analysis, by name: fields of a model or of a dataclass, attributes of any other object."""
    if hasattr(type(analysis), "model_fields"):
        return dict(analysis)
    if is_dataclass(analysis):
        return {item.name: getattr(analysis, item.name) for item in dataclass_fields(analysis)}
    own = {name: value for name, value in getattr(analysis, "__dict__", {}).items() if not name.startswith("_")}
    return {"name": analysis.name, **own}


def plain(value: Any) -> Any:
    """A value of a field as JSON has it; of what JSON lacks its type, or its text where that says what it is."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
