"""From merged sums to maps: each analysis gets its own columns, and one that fails doesn't take the others along."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpuem.analyses import Analysis, Map, View
from gpuem.backends import Sums
from gpuem.engine import Job, Totals
from gpuem.errors import DataError, GpuemError
from gpuem.messages import in_a_line, shown

log = logging.getLogger("gpuem")


def finish(view: View, analyses: Sequence[Analysis], job: Job, totals: Totals) -> tuple[dict[str, Map], dict[str, str]]:
    """Hand every analysis its own columns of the sums, collect the maps.

    Returns
    -------
    maps : dict of str to Map
        All maps, and ``valid``.
    failed : dict of str to str
        Analyses whose maps could not be made, and why. The frames are read by then: the maps of the others are kept.

    Raises
    ------
    DataError
        Not one frame could be read.
    GpuemError
        All analyses failed.
    """
    if not totals.valid.any():
        why = "; ".join(item.message for item in totals.lost[:3]) or "no frame of the file lies inside the scan"
        raise DataError(f"not one frame could be read: {why}")
    maps: dict[str, Map] = {}
    failed: dict[str, Exception] = {}
    masks = images = moments = fits = 0
    for analysis, own in zip(analyses, job.weights, strict=True):
        sums = Sums(
            totals.sums.masks[:, masks : (masks := masks + len(own.masks))],
            totals.sums.images[:, images : (images := images + len(own.images))],
            totals.sums.moments[:, moments : (moments := moments + len(own.moments))],
            totals.sums.total,
            totals.sums.maximum,
            totals.sums.fits[fits : (fits := fits + len(own.fits))],
        )
        try:
            found = _checked(analysis.finish(view, sums, totals.valid))
        except Exception as error:
            failed[analysis.name] = error
            log.debug("%s", analysis.name, exc_info=True)
            continue
        for name, item in found.items():
            maps[f"{analysis.name}/{name}" if name else analysis.name] = item
    if len(failed) == len(analyses):
        first, cause = next(iter(failed.items()))
        if isinstance(cause, GpuemError):
            raise cause
        raise GpuemError(f"{first}: its maps could not be made: {_words(cause)}") from cause
    valid = totals.valid.reshape(view.scan_shape)
    maps["valid"] = Map(valid, view.scan, "", "a frame was read at this scan position")
    return maps, {name: _words(error) for name, error in failed.items()}


def _checked(found: Any) -> dict[str, Map]:
    """What an analysis made, if it can be saved; raises DataError, so that the maps of others can be."""
    if not isinstance(found, Mapping):
        raise DataError(f"finish returned {shown(found)}; needed is a dictionary of gpuem.Map")
    for name, item in found.items():
        if not isinstance(name, str) or not isinstance(item, Map):
            raise DataError(f"finish returned {shown(name)}: {shown(item)}; needed are names and gpuem.Map")
        data = np.asarray(item.data)
        if data.shape != tuple(axis.size for axis in item.axes) or data.dtype.kind not in "biufc":
            raise DataError(
                f"map {name!r} holds {data.dtype} of shape {data.shape}, and its axes are "
                f"{tuple(axis.size for axis in item.axes)}; needed are numbers of that shape"
            )
        json.dumps(dict(item.attributes))
    return dict(found)


def _words(error: Exception) -> str:
    return in_a_line(error) if isinstance(error, GpuemError) else f"{type(error).__name__}: {in_a_line(error)}"
