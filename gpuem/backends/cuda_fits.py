"""Fits on the GPU: which function computes which kind, and the arrays of a fit on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Fit, cuda_correlate, cuda_lattice
from gpuem.backends.cuda_kernels import DeviceFrames
from gpuem.backends.lattice_fit import LatticeFit
from gpuem.backends.peaks import GuidedFit, PeakSearch
from gpuem.errors import DeviceError

Array = Any
Tables = Mapping[str, Array]
# kind of a fit -> function(fit, tables, frames, positions, out); a module that computes a kind enters it here
KINDS: dict[type, Callable[[Any, Tables, DeviceFrames, Array, Array], None]] = {
    PeakSearch: cuda_correlate.run_search,
    GuidedFit: cuda_correlate.run_guided,
    LatticeFit: cuda_lattice.run,
}
# and, where there is something to say: arrays on the device that aren't fields; bytes of scratch for frames of a shape;
# why this machine can't compute it, in words
HOST_TABLES: dict[type, Callable[[Any], dict[str, NDArray[Any]]]] = {PeakSearch: cuda_correlate.search_tables}
SCRATCH: dict[type, Callable[[Any, tuple[int, int]], int]] = {
    PeakSearch: cuda_correlate.search_scratch_nbytes,
    GuidedFit: cuda_correlate.guided_scratch_nbytes,
    LatticeFit: cuda_lattice.scratch_nbytes,
}
WHY_NOT: dict[type, Callable[[], str]] = {PeakSearch: cuda_correlate.why_not}


def check(fits: Iterable[Fit]) -> None:
    """Refuse, before anything is allocated or read, what can't be computed here.

    Raises
    ------
    DeviceError
        Nothing computes a kind of fit on the GPU, or something is missing on this machine that it needs.
    """
    for kind in {type(fit): None for fit in fits}:
        if kind not in KINDS:
            known = ", ".join(one.__name__ for one in KINDS)
            raise DeviceError(
                f"{kind.__name__} can't be computed on the GPU, which does {known}; compute on the processor: "
                'device = "cpu"'
            )
        reason = WHY_NOT[kind]() if kind in WHY_NOT else ""
        if reason:
            raise DeviceError(f'{kind.__name__}: {reason}. Or compute on the processor: device = "cpu"')


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
    """The arrays of a fit, in C order: those among its fields, by their names, unless its kind has others."""
    if type(fit) in HOST_TABLES:
        return {name: np.ascontiguousarray(value) for name, value in HOST_TABLES[type(fit)](fit).items()}
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


def scratch_nbytes(fit: Fit, shape: tuple[int, int]) -> int:
    """Bytes on the device beside frames, tables and results while a fit of frames (y, x) is computed."""
    return SCRATCH[type(fit)](fit, shape) if type(fit) in SCRATCH else 0
