"""The CPU backend: Numba kernels, called on blocks of frames that stay in the cache while every kernel sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames, Sums, Weights
from gpuem.backends import cpu_kernels as kernels
from gpuem.backends.cpu_load import load
from gpuem.errors import DataError

__all__ = ["NAME", "Prepared", "add_frames", "finite", "load", "new_sums", "prepare"]

NAME = "cpu"
# the second-level cache of current processors holds 1 to 2 MiB per core
BLOCK_NBYTES = 1 << 20
# 32-bit totals hold this many frames of 16-bit pixels, signed or not
NARROW_FRAMES = 1 << 15


@dataclass(frozen=True)
class Prepared:
    """`Weights` in the form in which the kernels use them."""

    weights: Weights
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    narrow: NDArray[Any]
    wide: np.dtype[Any]
    mask_spans: NDArray[np.int64]
    whole: NDArray[np.int64]
    region_spans: NDArray[np.int64]
    images: NDArray[np.floating[Any]]
    limit: float


def prepare(weights: Weights, shape: tuple[int, int], dtype: np.dtype[Any]) -> Prepared:
    """Turn masks into spans of rows, choose accumulators, pad weight images.

    Parameters
    ----------
    weights : Weights
        What to compute of each frame.
    shape : tuple of int
        Detector shape (y, x).
    dtype : numpy.dtype
        Native type of the pixels.
    """
    narrow, wide = _accumulators(dtype)
    # single precision holds pixels of up to 16 bits exactly
    real = np.float32 if dtype.itemsize <= 2 or dtype == np.float32 else np.float64
    images = np.zeros((-(-len(weights.images) // 4) * 4, math.prod(shape)), real)
    for k, image in enumerate(weights.images):
        images[k] = image.ravel()
    masks = [(k, mask) for k, mask in enumerate(weights.masks)]
    regions = [(k, mask) for k, mask in enumerate(weights.moments) if mask is not None]
    return Prepared(
        weights,
        shape,
        dtype,
        np.zeros(2 * kernels.STRIP, narrow),
        wide,
        _spans(masks, shape, longest=1 << 16)[:, :3].copy(),
        np.array([k for k, mask in enumerate(weights.moments) if mask is None], np.int64),
        _spans(regions, shape, longest=kernels.STRIP),
        images,
        _safe_magnitude(shape, dtype),
    )


def new_sums(prepared: Prepared, frames: int) -> Sums:
    """Empty accumulators for a shard of `frames` frames."""
    weights, shape, dtype = prepared.weights, prepared.shape, prepared.dtype
    total = prepared.narrow.dtype if frames <= NARROW_FRAMES else prepared.wide
    lowest = -np.inf if dtype.kind == "f" else np.iinfo(dtype).min
    return Sums(
        np.zeros((frames, len(weights.masks)), prepared.wide),
        np.zeros((frames, len(weights.images)), np.float64),
        np.zeros((frames, len(weights.moments), 3), prepared.wide),
        np.zeros(shape if weights.total else (0, 0), total),
        np.full(shape if weights.maximum else (0, 0), lowest, dtype),
        {"columns": np.empty_like(prepared.narrow)},
    )


def add_frames(frames: Frames, prepared: Prepared, sums: Sums, at: int) -> None:
    """Add a block of frames to the accumulators of a shard.

    Parameters
    ----------
    frames : Frames
        Native pixels.
    prepared : Prepared
        What to compute.
    sums : Sums
        Accumulators; rows `at` to `at` + n belong to these frames.
    at : int
        Row of the first frame.

    Raises
    ------
    DataError
        64-bit integers too large to be summed exactly.
    """
    count = frames.starts.size
    if math.isfinite(prepared.limit):
        _check_magnitude(frames, prepared.limit)
    rows = slice(at, at + count)
    if prepared.images.size:
        kernels.image_sums(frames.pixels, frames.starts, prepared.images, sums.images[rows])
    kernels.all_sums(
        frames.pixels,
        frames.starts,
        max(1, BLOCK_NBYTES // (math.prod(prepared.shape) * prepared.dtype.itemsize)),
        prepared.shape,
        (prepared.whole, prepared.mask_spans, prepared.region_spans),
        sums.work["columns"],
        (sums.total.reshape(-1), sums.maximum.reshape(-1)),
        (sums.masks[rows], sums.moments[rows]),
    )


def finite(frames: Frames) -> NDArray[np.bool_]:
    """Which frames hold neither NaN nor infinity; all of them for integer pixels."""
    out = np.ones(frames.starts.size, np.bool_)
    if frames.pixels.dtype.kind == "f":
        kernels.all_finite(frames.pixels, frames.starts, math.prod(frames.shape), out)
    return out


def _accumulators(dtype: np.dtype[Any]) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Type of a sum over a strip or a span, and of a whole frame."""
    if dtype.kind == "f":
        return np.dtype(np.float64), np.dtype(np.float64)
    if dtype.itemsize <= 2:
        return np.dtype(np.uint32 if dtype.kind == "u" else np.int32), np.dtype(np.int64)
    return np.dtype(np.int64), np.dtype(np.int64)


def _spans(masks: list[tuple[int, NDArray[np.bool_]]], shape: tuple[int, int], longest: int) -> NDArray[np.int64]:
    """Runs of True in the rows of masks: (first pixel, end, mask, y, x), cut at `longest` pixels."""
    rows: list[tuple[int, int, int, int, int]] = []
    width = shape[1]
    for k, mask in masks:
        edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
        firsts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
        for (y, x), (_, end) in zip(firsts.tolist(), ends.tolist(), strict=True):
            for cut in range(x, end, longest):
                rows.append((y * width + cut, y * width + min(end, cut + longest), k, y, cut))
    # all masks of a row before the next row: the row is still in the first-level cache
    return np.array(sorted(rows), np.int64).reshape(-1, 5)


def _safe_magnitude(shape: tuple[int, int], dtype: np.dtype[Any]) -> float:
    """Largest pixel value with which no moment can overflow 64 bits; infinite where the type can't exceed it."""
    if dtype.kind == "f":
        return math.inf
    limit = 2.0**63 / (math.prod(shape) * max(shape))
    return math.inf if np.iinfo(dtype).max < limit else min(limit, 2.0**53)


def _check_magnitude(frames: Frames, limit: float) -> None:
    largest = np.empty(frames.starts.size, np.float64)
    kernels.largest_magnitude(frames.pixels, frames.starts, math.prod(frames.shape), largest)
    if largest.max(initial=0.0) >= limit:
        raise DataError(
            f"a pixel of {largest.max():.6g} counts: sums of {frames.shape[0]}x{frames.shape[1]} such pixels "
            f"don't fit into 64 bits (limit {limit:.6g}); convert the data to float64"
        )
