"""What a backend can be asked for, and which one is asked.

`cpu` (Numba) and `cuda` (CuPy) are modules with the same functions:

    prepare(weights, shape, dtype)            what stays the same for all frames: spans, padded weights
    plan(source, prepared, limits)            where the cuts are and what they cost
    load(source, files, piece, box, keep)     read and decode the wanted frames of a tile
    new_sums(prepared, frames)                empty accumulators for a shard
    add_frames(frames, prepared, sums, at, positions)
                                              sums, masks, moments and fits of a block of frames
    usable(frames)                            which frames can be summed exactly
    fetch(sums)                               the accumulators in host memory

What is linear in the frame is declared as weights; what is not, as a `Fit`, whose kind `cpu_fits` and `cuda_fits` know.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Device = Literal["auto", "cuda", "cpu"]
log = logging.getLogger("gpuem")


@dataclass(frozen=True)
class Frames:
    """Frames of native pixels in one flat array.

    Parameters
    ----------
    pixels : (m,) array
        Pixels; what lies between frames (headers, gaps) is skipped.
    starts : (n,) int64
        Index into `pixels` of each frame's first pixel; a frame's pixels are contiguous, rows first.
    shape : tuple of int
        Detector shape (y, x).
    """

    pixels: NDArray[Any]
    starts: NDArray[np.int64]
    shape: tuple[int, int]


@dataclass(frozen=True)
class Lost:
    """Frames that can't be had: `broken`, or never written; `reading` where the bytes didn't come, which may pass."""

    indices: NDArray[np.int64]
    message: str
    broken: bool = True
    reading: bool = False


@dataclass(frozen=True)
class Block:
    """Frames where the backend computes, in host or device memory, and their flat indices in file order."""

    frames: Frames
    indices: NDArray[np.int64]


class Fit(Protocol):
    """What is not linear in the frame and is found for each frame by itself, declared.

    A fit is a frozen dataclass (``eq=False``) of plain numbers and NumPy arrays, and knows nothing of frames. Who
    computes it is found by its type: `cpu_fits.KINDS` and `cuda_fits.KINDS`.
    """

    @property
    def columns(self) -> int:
        """How many float32 numbers it leaves behind for each frame."""


@dataclass(frozen=True)
class Weights:
    """What is needed of each frame, declared: the backend picks the cheapest exact way.

    Parameters
    ----------
    total : bool
        Sum over frames of every pixel.
    maximum : bool
        Maximum over frames of every pixel.
    masks : tuple of (y, x) bool
        Sum of each frame's pixels inside each mask; exact for integer data.
    images : tuple of (y, x) float
        Sum of each frame's pixels times a real weight.
    moments : tuple of (y, x) bool or None
        Sum, y-weighted and x-weighted sum of each frame inside each mask (None: the whole detector); exact for
        integer data.
    fits : tuple of Fit
        What is not linear in the frame, computed for each frame by itself.
    """

    total: bool = False
    maximum: bool = False
    masks: tuple[NDArray[np.bool_], ...] = ()
    images: tuple[NDArray[np.floating[Any]], ...] = ()
    moments: tuple[NDArray[np.bool_] | None, ...] = ()
    fits: tuple[Fit, ...] = ()

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.total or other.total,
            self.maximum or other.maximum,
            self.masks + other.masks,
            self.images + other.images,
            self.moments + other.moments,
            self.fits + other.fits,
        )


@dataclass
class Sums:
    """Results of `Weights`: int64 for integer data, float64 for float data.

    Parameters
    ----------
    masks : (n, masks) array
        Per frame, one column per mask.
    images : (n, images) float64
        Per frame, one column per weight image.
    moments : (n, regions, 3) array
        Per frame and region: sum, y-weighted sum, x-weighted sum.
    total, maximum : (y, x) array
        Over all frames.
    fits : tuple of (n, columns) float32
        For each fit what it found, one row per frame; NaN where there is no frame.
    """

    masks: NDArray[Any]
    images: NDArray[np.float64]
    moments: NDArray[Any]
    total: NDArray[Any]
    maximum: NDArray[Any]
    fits: tuple[NDArray[np.float32], ...] = ()


def sums_fit(magnitudes: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether exact sums of frames fit into 64 bits, from the largest pixel and the sum of each (n, 2).

    A moment is at most the frame's sum times the longer side; many such frames must fit into a total.
    """
    return np.asarray((magnitudes[:, 0] <= 2.0**32) & (magnitudes[:, 1] * max(shape) < 2.0**62))


def reason_unusable(dtype: np.dtype[Any]) -> str:
    """What is wrong with a frame of such pixels that can't be summed exactly."""
    if dtype.kind == "f":
        return "NaN or infinity among the pixels"
    return "counts too large for exact sums in 64 bits (a pixel beyond 2^32, or a frame's sum); convert to float64"


def select(device: Device) -> ModuleType:
    """The backend for `device`; says in the log what "auto" took and why.

    Raises
    ------
    DeviceError
        "cuda" was asked for and can't be had. There is never a silent run on the CPU instead.
    """
    from gpuem.backends import cpu

    if device == "cpu":
        return cpu
    from gpuem.backends import cuda_device

    reason = cuda_device.why_not()
    if reason and device == "auto":
        log.info("device: cpu (%s)", reason)
        return cpu
    gpu = cuda_device.gpu()
    from gpuem.backends import cuda

    log.info("device: cuda (%s)", gpu)
    return cuda
