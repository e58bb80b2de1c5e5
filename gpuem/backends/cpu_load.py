"""Tiles in host memory: plain native pixels are used where the file is mapped, all else is decoded to scratch."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import codecs, tiles
from gpuem.backends import Block, Frames, Lost
from gpuem.errors import DataError
from gpuem.formats.source import Box, Chunks, Piece, Runs, Source, Strided
from gpuem.storage.host import Files

# reading over a small gap is cheaper than another read
GAP_NBYTES = 1 << 16
_memory = threading.local()
_NOTHING = np.empty(0, np.uint8)


def load(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_]) -> Iterator[Block | Lost]:
    """Read and decode the wanted frames of one tile.

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
    indices = tiles.frames_of(piece, box)
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
        pixels = _scratch("pixels", (at.size, *source.frame_shape), source.dtype)
        codecs.unpack(piece.codec, data, at, pixels)
    elif piece.stored == source.dtype and at[0] % item == 0 and stride % item == 0:
        return Frames(data[: data.size // item * item].view(source.dtype), at // item, source.frame_shape)
    else:
        pixels = _scratch("pixels", (at.size, size), source.dtype)
        count = int((at[-1] - at[0]) // stride) + 1 if stride else 1
        stored = np.ndarray((count, size), piece.stored, data, int(at[0]), (stride, item))
        np.copyto(pixels, stored if count == at.size else stored[(at - at[0]) // stride])
    return Frames(pixels.reshape(-1), np.arange(at.size, dtype=np.int64) * size, source.frame_shape)


def _load_chunks(
    source: Source, files: Files, piece: Piece, chunks: Chunks, box: Box, keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], list[Lost]]:
    """Decode all chunks of a tile that hold a wanted frame into one array (tile..., y, x)."""
    nav, extent = len(piece.nav), (*piece.nav, *source.frame_shape)
    whole = (*box, slice(0, source.frame_shape[0]), slice(0, source.frame_shape[1]))
    first = [s.start // c for s, c in zip(whole, chunks.shape, strict=True)]
    counts = [-(-s.stop // c) - f for s, c, f in zip(whole, chunks.shape, first, strict=True)]
    corners = np.indices(counts).reshape(len(counts), -1) + np.reshape(first, (-1, 1))
    index = np.ravel_multi_index(tuple(corners), [-(-n // c) for n, c in zip(extent, chunks.shape, strict=True)])
    wanted = keep.reshape([s.stop - s.start for s in box])

    def place(corner: NDArray[np.int64]) -> tuple[slice, ...]:
        """The part of the tile that a chunk fills."""
        return tuple(
            slice(k * c - w.start, min(k * c + c, n) - w.start)
            for k, c, n, w in zip(corner.tolist(), chunks.shape, extent, whole, strict=True)
        )

    if _chunks_follow_one_another(chunks.shape, counts, whole):
        needed = wanted.reshape(index.size, -1).any(axis=1)
    else:
        needed = np.array([wanted[place(corner)[:nav]].any() for corner in corners.T])
    written = chunks.length[index] > 0
    decoded = _scratch("decoded", (index.size, *chunks.shape), piece.stored)
    broken = _decode(piece, chunks, files, index, needed & written, decoded)
    lost = []
    for k in np.flatnonzero(needed & ~written).tolist() + sorted(broken):
        where = place(corners[:, k])
        frames = [slice(s.start + b.start, s.stop + b.start) for s, b in zip(where[:nav], box, strict=True)]
        affected = tiles.frames_of(piece, frames)[wanted[where[:nav]].reshape(-1)]
        if k in broken:
            lost.append(Lost(affected, broken[k]))
        else:
            lost.append(Lost(affected, "chunk was never written", broken=False))
    if _chunks_follow_one_another(chunks.shape, counts, whole):
        return decoded.astype(source.dtype, copy=False), lost
    pixels = _scratch("pixels", (*wanted.shape, *source.frame_shape), source.dtype)
    for k in np.flatnonzero(needed & written).tolist():
        where = place(corners[:, k])
        pixels[where] = decoded[k][tuple(slice(0, s.stop - s.start) for s in where)]
    return pixels, lost


def _chunks_follow_one_another(chunk: tuple[int, ...], counts: list[int], whole: Box) -> bool:
    """Whether chunks laid end to end are the tile: none hangs over, and before an axis that is cut all are 1 long."""
    fits = counts[-2:] == [1, 1] and all(
        n * c == s.stop - s.start for n, c, s in zip(counts, chunk, whole, strict=True)
    )
    return fits and all(n == 1 or all(c == 1 for c in chunk[:axis]) for axis, n in enumerate(counts))


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
        yield from load(source, files, piece, one, np.ones(1, np.bool_))


def _load_array(source: Source, files: Files, piece: Piece, box: Box) -> NDArray[Any]:
    """A tile of a strided or self-answering array, as contiguous native pixels."""
    layout = piece.layout
    whole = (*box, slice(0, source.frame_shape[0]), slice(0, source.frame_shape[1]))
    if isinstance(layout, Strided):
        shape = (*piece.nav, *source.frame_shape)
        array = np.ndarray(shape, piece.stored, files.view(layout.file), layout.offset, layout.strides)[whole]
        return np.ascontiguousarray(array, source.dtype)
    assert not isinstance(layout, Runs | Chunks)
    if layout.concurrent:
        return np.ascontiguousarray(layout.read(whole), source.dtype)
    with files.one_at_a_time:
        return np.ascontiguousarray(layout.read(whole), source.dtype)
