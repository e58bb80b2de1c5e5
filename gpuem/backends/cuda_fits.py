"""Fits on the GPU: which function computes which kind, and the arrays of a fit on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Fit
from gpuem.backends.cuda_kernels import DeviceFrames

Array = Any
Tables = Mapping[str, Array]
# kind of a fit -> function(fit, tables, frames, positions, out); a module that computes a kind enters it here
KINDS: dict[type, Callable[[Any, Tables, DeviceFrames, Array, Array], None]] = {}


def run(fit: Fit, tables: Tables, frames: DeviceFrames, positions: Array, out: Array) -> None:
    """Enqueue a fit of a block of frames on the current stream.

    Parameters
    ----------
    fit : Fit
        What to compute.
    tables : mapping
        Its arrays on the device, as `tables` made them.
    frames : DeviceFrames
        Native pixels.
    positions : (n,) int64 device array
        Flat scan positions of the frames.
    out : (n, columns) float32 device array
        The results; every value is written.
    """
    KINDS[type(fit)](fit, tables, frames, positions, out)


def host_tables(fit: Fit) -> dict[str, NDArray[Any]]:
    """The arrays among the fields of a fit, in C order, by the names of the fields."""
    values = ((item.name, getattr(fit, item.name)) for item in fields(fit))  # type: ignore[arg-type]
    return {name: np.ascontiguousarray(value) for name, value in values if isinstance(value, np.ndarray)}


def tables(fit: Fit) -> dict[str, Array]:
    """Copies of the arrays of a fit on the device; bool becomes uint8, which kernels take."""
    import cupy

    out = {}
    for name, table in host_tables(fit).items():
        given = table.view(np.uint8) if table.dtype == np.bool_ else table
        out[name] = cupy.empty(given.shape, given.dtype)
        out[name].set(given)
    return out


def table_nbytes(fit: Fit) -> int:
    """Bytes of `tables`."""
    return sum(table.nbytes for table in host_tables(fit).values())
