"""Arguments of `gpuem.open`, checked: what can't be is refused with the key, the value and what is allowed."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpuem.errors import RecipeError
from gpuem.formats.remote import Place, Url, place
from gpuem.formats.source import Copy
from gpuem.messages import nearest, shown
from gpuem.paths import local_path

# a scan of 32768 x 32768; every position costs memory before the first frame is read
MOST_POSITIONS = 1 << 30
_CALIBRATION = ("scan_step", "scan_unit", "detector_step", "detector_unit")


def paths(path: Any) -> tuple[Place, ...]:
    """Paths and URLs of one data set, as they are given; raises RecipeError unless they can be."""
    if not isinstance(path, str | os.PathLike | Url | Sequence):
        raise RecipeError(f"path {shown(path)}: needed is a path or a URL, or a list of them; of an array: gpuem.run")
    found = tuple(place(p) for p in ([path] if isinstance(path, str | os.PathLike | Url) else path))
    if not found:
        raise RecipeError("path: no file is given")
    return found


def scan_shape(path: Place, scan: Any) -> tuple[int, ...] | None:
    """The scan as it is given; raises RecipeError unless it is a shape that can be."""
    if scan is None:
        return None
    if isinstance(scan, str | bytes | Mapping) or not isinstance(scan, Iterable):
        raise RecipeError(f"{path}: scan {shown(scan)}: needed are whole numbers, such as (256, 256)")
    shape = tuple(whole("scan", n) for n in scan)
    if not shape or min(shape) < 1:
        raise RecipeError(f"{path}: scan {list(shape)}: every axis needs at least one position")
    if math.prod(shape) > MOST_POSITIONS:
        raise RecipeError(
            f"{path}: scan {list(shape)} has {math.prod(shape):,} positions; gpuem takes up to {MOST_POSITIONS:,}"
        )
    return shape


def copies(given: Any) -> tuple[Copy, ...]:
    """Machines that have the files, too."""
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise RecipeError(f"copies {shown(given)}: needed is a list of dictionaries")
    return tuple(map(copy, given))


def copy(given: Any) -> Copy:
    """One of `copies`."""
    keys = dict(given) if isinstance(given, Mapping) else {}
    hosts, files = keys.pop("hosts", None), keys.pop("files", ["*"])
    texts = all(isinstance(v, list | tuple) and all(isinstance(s, str) for s in v) for v in (hosts, files))
    if set(keys) != {"folder"} or not texts:
        raise RecipeError(
            f"copies: {shown(given)}: needed are hosts (a list of patterns) and folder, and files (a list of patterns) "
            "where it isn't all"
        )
    named = (platform.node() if host == "localhost" else host for host in hosts or ())
    return Copy(tuple(named), local_path(keys["folder"]), tuple(files))


def whole(name: str, value: Any) -> int:
    """A whole number of an argument."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not abs(int(value)) < 2**62:
        raise RecipeError(f"{name} {shown(value)}: needed is a whole number")
    return int(value)


def calibration(given: Any) -> dict[str, Any]:
    """The argument of that name, its keys checked."""
    if not isinstance(given, Mapping):
        raise RecipeError(f"calibration {shown(given)}: needed is a dictionary of {', '.join(_CALIBRATION)}")
    for key in given:
        if key not in _CALIBRATION:
            near = nearest(str(key), _CALIBRATION) or f"; known: {', '.join(_CALIBRATION)}"
            raise RecipeError(f"calibration: {key!r} is unknown{near}")
    for part in ("scan", "detector"):
        if given.get(f"{part}_unit") is not None and given.get(f"{part}_step") is None:
            raise RecipeError(f"calibration: {part}_unit needs {part}_step, the size of a pixel")
    return dict(given)


def steps(step: Any) -> float | tuple[float, ...]:
    """The size of a pixel, along all axes or along each."""
    try:
        if isinstance(step, str | bool):
            raise TypeError
        return tuple(float(s) for s in step) if isinstance(step, Sequence | np.ndarray) else float(step)
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(f"pixel size {shown(step)}: one positive number, or one for each axis") from None
