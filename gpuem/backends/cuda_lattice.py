"""The joint lattice fit on the GPU: a block per frame. What it computes: `gpuem.backends.lattice_fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpuem.backends import cuda_kernels as kernels
from gpuem.backends.cuda_kernels import NULL, DeviceFrames
from gpuem.backends.lattice_fit import LatticeFit

Array = Any
WARPS = 4
# what a block keeps of every disk: what is noted of it, sums over its window
DISK_NBYTES = 8 * 17 + 4 * 29 + 4
# for this beside what a block keeps of its lattice there is room in the shared memory that every block may have
SHARED_NBYTES = kernels.SHARED_NBYTES - 1024
# where there are more disks, they are kept in scratch; frames are then taken in turn by as many blocks as fit
SCRATCH_NBYTES = 64 << 20
# what the allocator may round up
ROUNDED_NBYTES = 512


def run(fit: LatticeFit, tables: Mapping[str, Array], frames: DeviceFrames, positions: Array, out: Array) -> None:
    """Fit the lattice of every frame; see `cpu_lattice.run`."""
    import cupy

    blocks = min(frames.count, _blocks(fit))
    nbytes = block_nbytes(fit)
    scratch = cupy.empty((blocks, nbytes // 8), np.float64) if nbytes > SHARED_NBYTES else None
    lattice_fit(frames, fit, tables, (positions, scratch), out)


def lattice_fit(
    frames: DeviceFrames, fit: LatticeFit, tables: Mapping[str, Array], given: tuple[Array, Array | None], out: Array
) -> None:
    """Fit every frame with every lattice, keep the lattice that explains most.

    Parameters
    ----------
    frames : DeviceFrames
        The frames; pixels are computed in single precision, small systems in double precision.
    fit : LatticeFit
        Sizes and steps.
    tables : mapping
        Its arrays on the device, by the names of its fields.
    given : tuple of device arrays
        Flat scan positions (n,) int64; scratch (blocks, `block_nbytes` / 8) float64, or None where shared memory is
        enough.
    out : (n, columns) float32 device array
        Overwritten: `gpuem.backends.lattice_fit.COLUMNS`.
    """
    positions, scratch = given
    good = tables["good"] if fit.good.size else NULL
    blocks = frames.count if scratch is None else scratch.shape[0]
    kernels.kernel("lattice_fit", (frames.of,))(
        (blocks,), (32 * WARPS,),
        (frames.pixels, frames.starts, positions, np.int32(frames.count), *map(np.int32, frames.shape),
         tables["probe"], tables["window"], tables["shading"], tables["pixels"], *_sizes(fit.probe),
         tables["coarse"], tables["coarse_window"], tables["coarse_pixels"], *_sizes(fit.coarse),
         tables["sites"], tables["first"], tables["priors"], tables["lattices"], np.int32(fit.lattices.shape[0]),
         tables["drift"], np.int64(fit.scan_width), good, tables["axes"], tables["numbers"],
         *map(np.int32, fit.steps), np.int32(_most(fit)), NULL if scratch is None else scratch, out),
        shared_mem=block_nbytes(fit) if scratch is None else 0,
    )  # fmt: skip


def scratch_nbytes(fit: LatticeFit, shape: tuple[int, int]) -> int:
    """Most bytes on the device beside frames and results while lattices are fitted."""
    nbytes = block_nbytes(fit)
    return _blocks(fit) * nbytes + ROUNDED_NBYTES if nbytes > SHARED_NBYTES else 0


def block_nbytes(fit: LatticeFit) -> int:
    """Bytes that a block needs for the disks of the largest lattice."""
    return _most(fit) * DISK_NBYTES


def _blocks(fit: LatticeFit) -> int:
    """Blocks that take frames in turn where disks are kept in scratch."""
    return max(1, SCRATCH_NBYTES // max(1, block_nbytes(fit)))


def _most(fit: LatticeFit) -> int:
    return int(np.diff(fit.first).max(initial=0))


def _sizes(planes: Array) -> tuple[np.int32, np.int32]:
    """Pixels of a window, and phases per pixel, of a tabulated probe."""
    phases, pixels = planes.shape
    return np.int32(pixels), np.int32(round(phases**0.5) - 1)
