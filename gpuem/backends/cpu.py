"""The CPU backend: Numba kernels, called on blocks of frames that stay in the cache while every kernel sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.backends import Frames, Sums, Weights, cpu_fits, reason_unusable, sums_fit
from gpuem.backends import cpu_kernels as kernels
from gpuem.backends.cpu_load import load
from gpuem.backends.cpu_vectors import LANES, PITCH
from gpuem.formats.source import Source
from gpuem.tiles import Limits, Plan

__all__ = ["NAME", "Prepared", "add_frames", "fetch", "load", "new_sums", "plan", "prepare", "usable"]

NAME = "cpu"
# who does here what a kernel of that name does on a GPU
TWINS = {
    "all_finite": "backends.cpu_kernels:all_finite",
    "all_sums": "backends.cpu_kernels:all_sums",
    "bitshuffle_lz4": "codecs.bitshuffle:bitshuffle_lz4_many",
    "convert": "backends.cpu_correct:correct",
    "find_peaks": "backends.cpu_correlate:find_peaks",
    "guided": "backends.cpu_guided:guide",
    "image_sums": "backends.cpu_kernels:image_sums",
    "lattice_fit": "backends.cpu_lattice:fit_frames",
    "lz4": "codecs.chunks:decode",
    "magnitudes": "backends.cpu_kernels:magnitudes",
    "mask_sums": "backends.cpu_kernels:mask_sums",
    "merlin": "codecs.merlin:decode",
    "patch_dead": "backends.cpu_correct:correct",
    "place_chunks": "backends.chunk_grid:ChunkGrid",
    "place_part": "backends.stitch:place_part",
    "unshuffle": "codecs.planes:unshuffle_bytes",
}
# the second-level cache of current processors holds 1 to 2 MiB per core
BLOCK_NBYTES = 1 << 20
# groups of LANES pixels whose sum fits into 32 bits for 16-bit pixels, signed or not
SECTION = (1 << 15) // LANES
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
    mask_tables: tuple[NDArray[Any], ...]
    whole: NDArray[np.int64]
    region_spans: NDArray[np.int64]
    images: NDArray[np.floating[Any]]

    @property
    def linear(self) -> bool:
        """Whether anything but fits is wanted of the pixels."""
        wanted = self.weights
        return bool(wanted.total or wanted.maximum or wanted.masks or wanted.images or wanted.moments)


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
    images = _zeros((-(-len(weights.images) // 4) * 4, math.prod(shape)), np.dtype(real))
    for k, image in enumerate(weights.images):
        images[k] = image.ravel()
    regions = [(k, mask) for k, mask in enumerate(weights.moments) if mask is not None]
    return Prepared(
        weights,
        shape,
        dtype,
        np.zeros(8 * PITCH, narrow),
        wide,
        _mask_tables(weights.masks, shape),
        np.array([k for k, mask in enumerate(weights.moments) if mask is None], np.int64),
        _spans(regions, shape, longest=kernels.STRIP),
        images,
    )


def plan(source: Source, prepared: Prepared, limits: Limits) -> Plan:
    """Cut a source into work for the threads of this process; raises PlanError where it doesn't fit."""
    one = new_sums(prepared, 1)
    per_position = sum(array.nbytes for array in (one.masks, one.images, one.moments)) + 8
    fits = sum(array.nbytes for array in one.fits)
    return tiles.plan(source, limits, per_position, one.total.nbytes + one.maximum.nbytes, fits)


def fetch(sums: Sums) -> Sums:
    """The accumulators of a shard in host memory, where they are."""
    return sums


def new_sums(prepared: Prepared, frames: int) -> Sums:
    """Empty accumulators for a shard of `frames` frames."""
    weights, shape, dtype = prepared.weights, prepared.shape, prepared.dtype
    total = prepared.narrow.dtype if frames <= NARROW_FRAMES else prepared.wide
    lowest = -np.inf if dtype.kind == "f" else np.iinfo(dtype).min
    maximum = _zeros(shape if weights.maximum else (0, 0), dtype)
    maximum[...] = lowest
    return Sums(
        np.zeros((frames, len(weights.masks)), prepared.wide),
        np.zeros((frames, len(weights.images)), np.float64),
        np.zeros((frames, len(weights.moments), 3), prepared.wide),
        _zeros(shape if weights.total else (0, 0), total),
        maximum,
        tuple(np.zeros((frames, fit.columns), np.float32) for fit in weights.fits),
    )


def add_frames(frames: Frames, prepared: Prepared, sums: Sums, at: int, positions: NDArray[np.int64]) -> None:
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
    positions : (n,) int64
        Flat scan positions of the frames.
    """
    count = frames.starts.size
    rows = slice(at, at + count)
    for fit, out in zip(prepared.weights.fits if count else (), sums.fits, strict=False):
        cpu_fits.run(fit, frames, positions, out[rows])
    if prepared.linear:
        _add_linear(frames, prepared, sums, rows)


def _add_linear(frames: Frames, prepared: Prepared, sums: Sums, rows: slice) -> None:
    count = frames.starts.size
    if prepared.images.size:
        kernels.image_sums(frames.pixels, frames.starts, prepared.images, sums.images[rows])
    weights, narrow, whole = prepared.weights, prepared.narrow, prepared.whole
    moments = np.zeros((count if whole.size else 0, 3), prepared.wide)
    kernels.all_sums(
        frames.pixels,
        frames.starts,
        max(4, BLOCK_NBYTES // (math.prod(prepared.shape) * prepared.dtype.itemsize)),
        prepared.shape,
        (sums.total.reshape(-1) if weights.total else None, sums.maximum.reshape(-1) if weights.maximum else None),
        (_zeros(narrow.shape, narrow.dtype) if whole.size else None, moments),
        (prepared.mask_tables, narrow, sums.masks[rows]),
        (prepared.region_spans, narrow, sums.moments[rows]),
    )
    if whole.size:
        sums.moments[rows, whole] = moments[:, None]


def usable(frames: Frames) -> tuple[NDArray[np.bool_], str]:
    """Which frames can be summed exactly, and what is wrong with the others: NaN, infinity, overflow."""
    dtype, shape = frames.pixels.dtype, frames.shape
    out = np.ones(frames.starts.size, np.bool_)
    if dtype.kind == "f":
        kernels.all_finite(frames.pixels, frames.starts, math.prod(shape), out)
    elif dtype.itemsize >= 4 and (dtype.itemsize == 8 or math.prod(shape) * max(shape) >= 2**31):
        found = np.empty((frames.starts.size, 2), np.float64)
        kernels.magnitudes(frames.pixels, frames.starts, math.prod(shape), found)
        out = sums_fit(found, shape)
    return out, reason_unusable(dtype)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros that begin on a cache line: vectors that straddle two lines cost twice."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


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
            rows.extend(
                (y * width + cut, y * width + min(end, cut + longest), k, y, cut) for cut in range(x, end, longest)
            )
    # all masks of a row before the next row: the row is still in the first-level cache
    return np.array(sorted(rows), np.int64).reshape(-1, 5)


def _mask_tables(masks: tuple[NDArray[np.bool_], ...], shape: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    """Masks as groups of LANES pixels: runs of whole groups, and groups of which only some lanes count."""
    lanes, size = LANES, math.prod(shape)
    groups: list[tuple[int, int]] = []
    sections, edges, chosen = [], [np.empty(0, np.int64)], [np.empty((0, lanes), np.uint8)]
    for k, mask in enumerate(masks):
        # the last group overlaps the one before it, whose lanes it leaves out
        positions = np.minimum(np.arange(0, size, lanes), max(size - lanes, 0))
        cells = np.zeros((positions.size, lanes), np.uint8)
        cells.reshape(-1)[:size] = mask.reshape(-1)
        if size % lanes and size > lanes:
            cells[-1] = np.roll(cells[-1], lanes - size % lanes)
        for first in range(0, positions.size, SECTION):
            part = cells[first : first + SECTION]
            whole = part.all(axis=1)
            some = np.flatnonzero(part.any(axis=1) & ~whole)
            turns = np.diff(np.pad(whole, 1).astype(np.int8))
            begins, ends = np.flatnonzero(turns == 1).tolist(), np.flatnonzero(turns == -1).tolist()
            runs = [(int(positions[first + a]), b - a) for a, b in zip(begins, ends, strict=True)]
            done = sum(e.size for e in edges)
            sections.append((k, len(groups), len(groups) + len(runs), done, done + some.size))
            groups.extend(runs)
            edges.append(positions[first + some])
            chosen.append(part[some])
    return (
        np.array(sections, np.int64).reshape(-1, 5),
        np.array(groups, np.int64).reshape(-1, 2),
        np.concatenate(edges),
        np.concatenate(chosen).reshape(-1),
    )
