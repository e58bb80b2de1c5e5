"""Tiles in host memory: read, decoded, corrected.

Frames that follow one another come a few at a time, in memory that is used again and again: they are still in the
caches when they are computed with. All else is decoded to scratch, a tile at once.
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
from gpuem.backends.stitch import place_part, without
from gpuem.errors import DataError, ReadError
from gpuem.formats.source import (
    Box,
    Chunks,
    Correction,
    Piece,
    Resident,
    Runs,
    Source,
    Stitched,
    Strided,
    part_of,
)
from gpuem.storage.host import GAP_NBYTES, Files

ALIGNED = 64
_memory = threading.local()
_NOTHING = np.empty(0, np.uint8)
_BYTE = np.dtype(np.uint8)


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
    if isinstance(piece.layout, Stitched):
        yield from _load_stitched(source, files, piece, piece.layout, box, keep)
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
            if isinstance(error, ReadError) and source.remote:
                yield Lost(indices[keep], str(error), reading=True)
            else:
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

    def remote(self, k: int) -> bool:
        return False

    def announce(self, k: int, offset: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        pass

    def read_into(self, k: int, offset: int, out: NDArray[np.uint8]) -> None:
        out[:] = self._data[offset : offset + out.size].get()


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
    """An array of undefined content in memory that this thread used for the tile before: fresh pages are slow.

    It begins on a cache line: vectors that straddle two cost twice.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if getattr(_memory, purpose, _NOTHING).size < nbytes:
        memory = np.empty(nbytes + ALIGNED, np.uint8)
        start = -memory.ctypes.data % ALIGNED
        setattr(_memory, purpose, memory[start : start + nbytes])
    found: NDArray[Any] = getattr(_memory, purpose)[:nbytes].view(dtype).reshape(shape)
    return found


def _load_runs(
    source: Source, files: Files, piece: Piece, runs: Runs, indices: NDArray[np.int64]
) -> Iterator[Block | Lost]:
    """Frames one after another, a few at a time."""
    ends = np.cumsum(runs.frames)
    local = indices - piece.start
    first, last = np.searchsorted(ends, local[[0, -1]], side="right").tolist() if local.size else (0, -1)
    for run in range(first, last + 1):
        begin = int(ends[run] - runs.frames[run])
        mine = slice(*np.searchsorted(local, (begin, int(ends[run]))).tolist())
        if mine.start == mine.stop:
            continue
        file, stride = int(runs.file[run]), int(runs.stride[run])
        at = int(runs.offset[run]) + (local[mine] - begin) * stride
        files.announce(file, at, np.full_like(at, runs.frame_bytes))
        for some in _few(at, runs.frame_bytes, stride, tiles.read_frames(piece, source, stride)):
            yield from _read_frames(source, files, piece, (file, at[some], stride), indices[mine][some])


def _few(at: NDArray[np.int64], length: int, stride: int, most: int) -> Iterator[slice]:
    """Cuts between frames of `length` bytes at ascending offsets: at most so many of them, and little in between."""
    if at[-1] - at[0] == (at.size - 1) * stride:
        yield from (slice(k, k + most) for k in range(0, at.size, most))
        return
    # a small gap is read along, a large one is not
    step = np.diff(at, prepend=at[0] - length)
    cost = np.cumsum(np.where(step - length <= GAP_NBYTES, step, _aligned(length)))
    room = most * max(tiles.read_distance(length, stride), _aligned(length))
    start = 0
    while start < at.size:
        before = int(cost[start - 1]) if start else 0
        count = min(int(np.searchsorted(cost, before + room, side="right")) - start, most)
        count = count // 4 * 4 if count > 4 else max(1, count)
        yield slice(start, start + count)
        start += count


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNED) * ALIGNED


def _read_frames(
    source: Source, files: Files, piece: Piece, where: tuple[int, NDArray[np.int64], int], indices: NDArray[np.int64]
) -> Iterator[Block | Lost]:
    """A few frames of a run (file, offsets, stride)."""
    file, at, stride = where
    assert isinstance(piece.layout, Runs)
    try:
        raw, starts = _read_spans(files, file, at, piece.layout.frame_bytes)
    except DataError as error:
        if at.size == 1 or _all_or_nothing(files, file, error):
            yield Lost(indices, str(error), reading=isinstance(error, ReadError))
            return
        # which of them is it?
        for k in range(at.size):
            yield from _read_frames(source, files, piece, (file, at[k : k + 1], stride), indices[k : k + 1])
        return
    yield Block(_frames_at(source, piece, raw, starts, stride), indices)


def _all_or_nothing(files: Files, file: int, error: DataError) -> bool:
    """Whether it is not worth finding out which bytes of a read failed: networks don't fail by place."""
    return isinstance(error, ReadError) and files.remote(file)


def _read_spans(
    files: Files, file: int, at: NDArray[np.int64], length: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Frames of `length` bytes at ascending offsets, read to scratch, and where each begins there."""
    low = int(at[0])
    starts = at - low
    cuts = np.flatnonzero(np.diff(at) > length + GAP_NBYTES) + 1
    if not cuts.size:
        raw = _scratch("raw", (_aligned(int(starts[-1]) + length),), _BYTE)
        files.read_into(file, low, raw[: int(starts[-1]) + length])
        return raw, starts
    firsts, lasts = np.concatenate([[0], cuts]), np.concatenate([cuts, [at.size]]) - 1
    sizes = at[lasts] + length - at[firsts]
    places = np.concatenate([[0], np.cumsum(-(-sizes // ALIGNED) * ALIGNED)])
    raw = _scratch("raw", (int(places[-1]),), _BYTE)
    for offset, size, place in zip(at[firsts].tolist(), sizes.tolist(), places.tolist(), strict=False):
        files.read_into(file, offset, raw[place : place + size])
    span = np.repeat(np.arange(firsts.size), lasts - firsts + 1)
    return raw, at - at[firsts][span] + places[span]


def _frames_at(source: Source, piece: Piece, raw: NDArray[np.uint8], at: NDArray[np.int64], stride: int) -> Frames:
    """Frames whose stored bytes begin at offsets `at` of `raw`, which are a multiple of the stride apart or aligned."""
    item, size = piece.stored.itemsize, math.prod(source.frame_shape)
    plain = not piece.codec and piece.stored == source.raw_dtype
    if plain and (stride % item == 0 or at.size == 1):
        return Frames(raw.view(source.raw_dtype), at // item, source.frame_shape)
    pixels = _scratch("pixels", (at.size, *source.frame_shape), source.raw_dtype)
    if piece.codec:
        codecs.unpack(piece.codec, raw, at, pixels)
    else:
        step = int(at[1] - at[0]) if at.size > 1 else size * item
        if (np.diff(at) == step).all():
            stored = np.ndarray((at.size, size), piece.stored, raw, int(at[0]), (step, item))
            np.copyto(pixels.reshape(at.size, size), stored)
        else:
            for begin, out in zip(at.tolist(), pixels.reshape(at.size, size), strict=True):
                out[:] = np.ndarray(size, piece.stored, raw, begin)
    return Frames(pixels.reshape(-1), np.arange(at.size, dtype=np.int64) * size, source.frame_shape)


def _load_stitched(
    source: Source, files: Files, piece: Piece, layout: Stitched, box: Box, keep: NDArray[np.bool_]
) -> Iterator[Block | Lost]:
    """Frames put together from their parts; one that lacks a part is lost."""
    indices, left = tiles.frames_of(piece, box), keep.copy()
    gone = without(piece, layout, indices[keep])
    if gone is not None:
        yield gone
        left = left & ~np.isin(indices, gone.indices)
    pixels = _scratch("stitched", (indices.size, *source.frame_shape), source.raw_dtype)
    for y, x, rows, columns in layout.gaps:
        pixels[:, y : y + rows, x : x + columns] = layout.fill
    for part in layout.parts:
        if not left.any():
            return
        own, inner = part_of(source, piece, part)
        if isinstance(inner.layout, Runs):
            found = _load_runs(own, files, inner, inner.layout, indices[left])
        else:
            found = _load_raw(own, files, inner, tiles.part_box(part, box), left)
        for item in found:
            if isinstance(item, Lost):
                yield item
                left = left & ~np.isin(indices, item.indices)
            else:
                place_part(item.frames, np.searchsorted(indices, item.indices), part, pixels)
    if left.any():
        size = math.prod(source.frame_shape)
        yield Block(Frames(pixels.reshape(-1), np.flatnonzero(left) * size, source.frame_shape), indices[left])


def _load_chunks(
    source: Source, files: Files, piece: Piece, chunks: Chunks, box: Box, keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], list[Lost]]:
    """Decode all chunks of a tile that hold a wanted frame into one array (tile..., y, x)."""
    grid = chunk_grid(source, piece, chunks, box, keep)
    decoded = _scratch("decoded", (grid.index.size, *chunks.shape), piece.stored)
    broken = _decode(piece, chunks, files, grid.index, grid.needed & grid.written, decoded)
    lost = [Lost(frames, "chunk was never written", broken=False) for frames in grid.unwritten()]
    # chunks that one failed read should have brought are one loss
    for reason in dict.fromkeys(broken[k] for k in sorted(broken)):
        frames = [grid.frames(k) for k in sorted(broken) if broken[k] == reason]
        lost.append(Lost(np.unique(np.concatenate(frames)), *reason))
    if grid.follow_one_another:
        return decoded.astype(source.raw_dtype, copy=False), lost
    pixels = _scratch("pixels", (*grid.wanted.shape, *source.frame_shape), source.raw_dtype)
    for k in np.flatnonzero(grid.needed & grid.written).tolist():
        where = grid.place(k)
        pixels[where] = decoded[k][grid.inside(k)]
    return pixels, lost


def _decode(
    piece: Piece, chunks: Chunks, files: Files, index: NDArray[np.int64], needed: NDArray[np.bool_], out: NDArray[Any]
) -> dict[int, tuple[str, bool, bool]]:
    """Read and decode the needed chunks into `out`; of those that can't be, what `Lost` says."""
    rows = np.flatnonzero(needed)
    bytes_out = out.reshape(index.size, -1).view(np.uint8)
    broken: dict[int, tuple[str, bool, bool]] = {}
    groups = _neighbours(chunks, index[rows])
    for file in np.unique(chunks.file[index[rows]]).tolist():
        own = index[rows][chunks.file[index[rows]] == file]
        files.announce(file, chunks.offset[own], chunks.length[own])
    while groups:
        group = groups.pop()
        mine = rows[group]
        at, lengths = chunks.offset[index[mine]], chunks.length[index[mine]]
        file, low = int(chunks.file[index[mine[0]]]), int(at.min())
        try:
            raw = files.read(file, low, int((at + lengths).max()) - low)
        except DataError as error:
            # which of them is it?
            if group.size > 1 and not _all_or_nothing(files, file, error):
                groups.extend(np.split(group, group.size))
            else:
                broken.update(dict.fromkeys(mine.tolist(), (str(error), True, isinstance(error, ReadError))))
            continue
        together = mine.size == mine[-1] - mine[0] + 1
        target = bytes_out[mine[0] : mine[-1] + 1] if together else np.empty((mine.size, bytes_out.shape[1]), np.uint8)
        found = codecs.decode_many(piece.codec, chunks.skipped[index[mine]], raw, at - low, lengths, target)
        if not together:
            bytes_out[mine] = target
        where = f"{files.path(file)}: chunk at byte"
        broken.update({int(mine[k]): (f"{where} {at[k]}: {why}", True, False) for k, why in found.items()})
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
        yield Lost(indices, str(error), reading=isinstance(error, ReadError))
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
    assert not isinstance(layout, Runs | Chunks | Stitched | Resident)
    if layout.concurrent:
        return np.ascontiguousarray(layout.read(whole), source.raw_dtype)
    with files.one_at_a_time:
        return np.ascontiguousarray(layout.read(whole), source.raw_dtype)
