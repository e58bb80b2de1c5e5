"""Tiles in host memory: plain native pixels are used where the file is mapped, all else is decoded to scratch.

Where frames are to be corrected, that is done a few at a time, into scratch of its own.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import codecs, tiles
from gpuem.backends import Block, Frames, Lost
from gpuem.backends.chunk_grid import chunk_grid
from gpuem.backends.cpu_correct import correct
from gpuem.errors import DataError
from gpuem.formats.source import Box, Chunks, Correction, Piece, Resident, Runs, Source, Strided
from gpuem.storage.host import Files

# reading over a small gap is cheaper than another read
GAP_NBYTES = 1 << 16
_memory = threading.local()
_NOTHING = np.empty(0, np.uint8)


def load(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_]) -> Iterator[Block | Lost]:
    """Read, decode and correct the wanted frames of one tile.

    What a thread gets is valid until it asks for the next.

    Parameters
    ----------
    source : Source
        What the piece belongs to.
    files : Files
        Its files.
    piece : Piece
        Where the frames are.
    box : tuple of slice
        The tile, over the nav axes of the piece.
    keep : (n,) bool
        Which frames of the tile are wanted, in C order of the box.
    """
    decoded = _load_raw(source, files, piece, box, keep)
    return decoded if source.correction is None else _corrected(source, source.correction, decoded)


def _corrected(source: Source, correction: Correction, decoded: Iterator[Block | Lost]) -> Iterator[Block | Lost]:
    """Corrected copies of decoded frames, as many at a time as stay in the cache."""
    at_once = tiles.corrected_frames(source)
    for item in decoded:
        if isinstance(item, Lost):
            yield item
            continue
        raw = item.frames
        for first in range(0, raw.starts.size, at_once):
            some = slice(first, first + at_once)
            frames = Frames(raw.pixels, raw.starts[some], raw.shape)
            out = _scratch("corrected", (frames.starts.size, math.prod(raw.shape)), source.dtype)
            yield Block(correct(frames, correction, out), item.indices[some])


def _load_raw(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_]) -> Iterator[Block | Lost]:
    """Read and decode the wanted frames of one tile."""
    indices = tiles.frames_of(piece, box)
    if isinstance(piece.layout, Resident):
        there, layout = _brought_back(piece.layout, indices[keep] - piece.start)
        yield from _load_raw(source, there, replace(piece, layout=layout), box, keep)
        return
    if isinstance(piece.layout, Runs):
        yield from _load_runs(source, files, piece, piece.layout, indices[keep])
        return
    if isinstance(piece.layout, Chunks):
        pixels, lost = _load_chunks(source, files, piece, piece.layout, box, keep)
        for item in lost:
            yield item
            keep = keep & ~np.isin(indices, item.indices)
    else:
        try:
            pixels = _load_array(source, files, piece, box)
        except DataError as error:
            yield from _frame_by_frame(source, files, piece, box, keep, error)
            return
    size = math.prod(source.frame_shape)
    yield Block(Frames(pixels.reshape(-1), np.flatnonzero(keep) * size, source.frame_shape), indices[keep])


class _DeviceBytes(Files):
    """Bytes in the memory of a GPU, read like a file."""

    def __init__(self, data: Any) -> None:
        super().__init__(())
        self._data = data

    def path(self, k: int) -> Path:
        return Path("GPU memory")

    def view(self, k: int) -> NDArray[np.uint8]:
        return np.asarray(self._data.get())

    def read(self, k: int, offset: int, length: int) -> NDArray[np.uint8]:
        return np.asarray(self._data[offset : offset + length].get())


def _brought_back(layout: Resident, frames: NDArray[np.int64]) -> tuple[Files, Runs | Chunks]:
    """A stretch of a GPU's memory that holds these frames, as a file, and how they lie in it."""
    inner = layout.inner
    if isinstance(inner, Chunks):
        return _DeviceBytes(layout.data), replace(inner, file=np.zeros_like(inner.file))
    ends = np.cumsum(inner.frames)
    run = np.searchsorted(ends, frames, side="right")
    at = inner.offset[run] + (frames - (ends - inner.frames)[run]) * inner.stride[run]
    low, high = int(at.min()) // 16 * 16, int(at.max()) + inner.frame_bytes
    moved = replace(inner, file=np.zeros_like(inner.file), offset=inner.offset - low)
    return _DeviceBytes(layout.data[low:high]), moved


def _scratch(purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of undefined content in memory that this thread used for the tile before: fresh pages are slow."""
    nbytes = math.prod(shape) * dtype.itemsize
    if getattr(_memory, purpose, _NOTHING).size < nbytes:
        setattr(_memory, purpose, np.empty(nbytes, np.uint8))
    found: NDArray[Any] = getattr(_memory, purpose)[:nbytes].view(dtype).reshape(shape)
    return found


def _load_runs(
    source: Source, files: Files, piece: Piece, runs: Runs, indices: NDArray[np.int64]
) -> Iterator[Block | Lost]:
    ends = np.cumsum(runs.frames)
    local = indices - piece.start
    of_run = np.searchsorted(ends, local, side="right")
    for run in range(int(of_run[0]), int(of_run[-1]) + 1) if local.size else ():
        mine = of_run == run
        if not mine.any():
            continue
        first_of_run = int(ends[run] - runs.frames[run])
        at = int(runs.offset[run]) + (local[mine] - first_of_run) * int(runs.stride[run])
        data = files.view(int(runs.file[run]))
        yield Block(_frames_at(source, piece, data, at, int(runs.stride[run])), indices[mine])


def _frames_at(source: Source, piece: Piece, data: NDArray[np.uint8], at: NDArray[np.int64], stride: int) -> Frames:
    """Frames whose stored bytes start at byte offsets `at` of mapped `data`."""
    item, size = piece.stored.itemsize, math.prod(source.frame_shape)
    if piece.codec:
        pixels = _scratch("pixels", (at.size, *source.frame_shape), source.raw_dtype)
        codecs.unpack(piece.codec, data, at, pixels)
    elif piece.stored == source.raw_dtype and at[0] % item == 0 and stride % item == 0:
        return Frames(data[: data.size // item * item].view(source.raw_dtype), at // item, source.frame_shape)
    else:
        pixels = _scratch("pixels", (at.size, size), source.raw_dtype)
        count = int((at[-1] - at[0]) // stride) + 1 if stride else 1
        stored = np.ndarray((count, size), piece.stored, data, int(at[0]), (stride, item))
        np.copyto(pixels, stored if count == at.size else stored[(at - at[0]) // stride])
    return Frames(pixels.reshape(-1), np.arange(at.size, dtype=np.int64) * size, source.frame_shape)


def _load_chunks(
    source: Source, files: Files, piece: Piece, chunks: Chunks, box: Box, keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], list[Lost]]:
    """Decode all chunks of a tile that hold a wanted frame into one array (tile..., y, x)."""
    grid = chunk_grid(source, piece, chunks, box, keep)
    decoded = _scratch("decoded", (grid.index.size, *chunks.shape), piece.stored)
    broken = _decode(piece, chunks, files, grid.index, grid.needed & grid.written, decoded)
    lost = [Lost(frames, "chunk was never written", broken=False) for frames in grid.unwritten()]
    lost += [Lost(grid.frames(k), broken[k]) for k in sorted(broken)]
    if grid.follow_one_another:
        return decoded.astype(source.raw_dtype, copy=False), lost
    pixels = _scratch("pixels", (*grid.wanted.shape, *source.frame_shape), source.raw_dtype)
    for k in np.flatnonzero(grid.needed & grid.written).tolist():
        where = grid.place(k)
        pixels[where] = decoded[k][tuple(slice(0, s.stop - s.start) for s in where)]
    return pixels, lost


def _decode(
    piece: Piece, chunks: Chunks, files: Files, index: NDArray[np.int64], needed: NDArray[np.bool_], out: NDArray[Any]
) -> dict[int, str]:
    """Read and decode the needed chunks into `out`; what is wrong with those that can't be."""
    rows = np.flatnonzero(needed)
    bytes_out = out.reshape(index.size, -1).view(np.uint8)
    broken: dict[int, str] = {}
    groups = _neighbours(chunks, index[rows])
    while groups:
        group = groups.pop()
        mine = rows[group]
        at, lengths = chunks.offset[index[mine]], chunks.length[index[mine]]
        file, low = int(chunks.file[index[mine[0]]]), int(at.min())
        try:
            raw = files.read(file, low, int((at + lengths).max()) - low)
        except DataError as error:
            # which of them is it?
            groups.extend(np.split(group, group.size) if group.size > 1 else [])
            broken.update({int(mine[0]): str(error)} if group.size == 1 else {})
            continue
        together = mine.size == mine[-1] - mine[0] + 1
        target = bytes_out[mine[0] : mine[-1] + 1] if together else np.empty((mine.size, bytes_out.shape[1]), np.uint8)
        found = codecs.decode_many(piece.codec, chunks.skipped[index[mine]], raw, at - low, lengths, target)
        if not together:
            bytes_out[mine] = target
        broken.update({int(mine[k]): f"{files.path(file)}: chunk at byte {at[k]}: {why}" for k, why in found.items()})
    return broken


def _neighbours(chunks: Chunks, index: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Chunks in groups that are read at once: in one file, one after the other, with little between them."""
    if index.size == 0:
        return []
    file, at, length = chunks.file[index], chunks.offset[index], chunks.length[index]
    gap = at[1:] - (at[:-1] + length[:-1])
    apart = (file[1:] != file[:-1]) | (gap < 0) | (gap > GAP_NBYTES)
    return np.split(np.arange(index.size), np.flatnonzero(apart) + 1)


def _frame_by_frame(
    source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_], error: DataError
) -> Iterator[Block | Lost]:
    """Frames of a tile that can't be had as a whole, one by one: which is it that is broken."""
    indices = tiles.frames_of(piece, box)
    if indices.size == 1:
        yield Lost(indices, str(error))
        return
    for k in np.flatnonzero(keep).tolist():
        corner = np.unravel_index(k, [s.stop - s.start for s in box])
        one = tuple(slice(s.start + int(c), s.start + int(c) + 1) for s, c in zip(box, corner, strict=True))
        yield from _load_raw(source, files, piece, one, np.ones(1, np.bool_))


def _load_array(source: Source, files: Files, piece: Piece, box: Box) -> NDArray[Any]:
    """A tile of a strided or self-answering array, as contiguous native pixels."""
    layout = piece.layout
    whole = (*box, slice(0, source.frame_shape[0]), slice(0, source.frame_shape[1]))
    if isinstance(layout, Strided):
        shape = (*piece.nav, *source.frame_shape)
        array = np.ndarray(shape, piece.stored, files.view(layout.file), layout.offset, layout.strides)[whole]
        return np.ascontiguousarray(array, source.raw_dtype)
    assert not isinstance(layout, Runs | Chunks | Resident)
    if layout.concurrent:
        return np.ascontiguousarray(layout.read(whole), source.raw_dtype)
    with files.one_at_a_time:
        return np.ascontiguousarray(layout.read(whole), source.raw_dtype)
