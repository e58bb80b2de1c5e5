"""Tiles in host memory: plain native pixels are used where the file is mapped, everything else is decoded to scratch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import codecs, tiles
from gpuem.backends import Block, Frames, Lost
from gpuem.errors import DataError
from gpuem.formats.source import Box, Chunks, Piece, Runs, Source, Strided
from gpuem.storage.host import Files


def load(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_]) -> Iterator[Block | Lost]:
    """Read and decode the wanted frames of one tile.

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
        pixels = _load_array(source, files, piece, box)
    size = math.prod(source.frame_shape)
    yield Block(Frames(pixels.reshape(-1), np.flatnonzero(keep) * size, source.frame_shape), indices[keep])


def _load_runs(
    source: Source, files: Files, piece: Piece, runs: Runs, indices: NDArray[np.int64]
) -> Iterator[Block | Lost]:
    ends = np.cumsum(runs.frames)
    local = indices - piece.start
    of_run = np.searchsorted(ends, local, side="right")
    for run in np.unique(of_run).tolist():
        mine = of_run == run
        first_of_run = int(ends[run] - runs.frames[run])
        at = int(runs.offset[run]) + (local[mine] - first_of_run) * int(runs.stride[run])
        data = files.view(int(runs.file[run]))
        yield Block(_frames_at(source, piece, data, at, int(runs.stride[run])), indices[mine])


def _frames_at(source: Source, piece: Piece, data: NDArray[np.uint8], at: NDArray[np.int64], stride: int) -> Frames:
    """Frames whose stored bytes start at byte offsets `at` of mapped `data`."""
    item, size = piece.stored.itemsize, math.prod(source.frame_shape)
    if piece.codec:
        pixels = np.empty((at.size, *source.frame_shape), source.dtype)
        codecs.unpack(piece.codec, data, at, pixels)
    elif piece.stored == source.dtype and at[0] % item == 0 and stride % item == 0:
        return Frames(data[: data.size // item * item].view(source.dtype), at // item, source.frame_shape)
    else:
        pixels = np.empty((at.size, size), source.dtype)
        count = int((at[-1] - at[0]) // stride) + 1 if stride else 1
        stored = np.ndarray((count, size), piece.stored, data, int(at[0]), (stride, item))
        np.copyto(pixels, stored if count == at.size else stored[(at - at[0]) // stride])
    return Frames(pixels.reshape(-1), np.arange(at.size, dtype=np.int64) * size, source.frame_shape)


def _load_chunks(
    source: Source, files: Files, piece: Piece, chunks: Chunks, box: Box, keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], list[Lost]]:
    """Decode all chunks of a tile that hold a wanted frame into one array (tile..., y, x)."""
    extent = (*piece.nav, *source.frame_shape)
    grid = tuple(-(-n // c) for n, c in zip(extent, chunks.shape, strict=True))
    nav = len(piece.nav)
    wanted = keep.reshape([s.stop - s.start for s in box])
    pixels = np.empty((*wanted.shape, *source.frame_shape), source.dtype)
    scratch = np.empty(chunks.shape, piece.stored)
    lost: list[Lost] = []
    whole = (*box, slice(0, source.frame_shape[0]), slice(0, source.frame_shape[1]))
    ranges = [range(s.start // c, -(-s.stop // c)) for s, c in zip(whole, chunks.shape, strict=True)]
    for corner in itertools.product(*ranges):
        stored = tuple(slice(k * c, min(k * c + c, n)) for k, c, n in zip(corner, chunks.shape, extent, strict=True))
        place = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(stored, whole, strict=True))
        if not wanted[place[:nav]].any():
            continue
        index = int(np.ravel_multi_index(corner, grid))
        affected = tiles.frames_of(piece, stored[:nav])[wanted[place[:nav]].reshape(-1)]
        if chunks.length[index] == 0:
            lost.append(Lost(affected, "chunk was never written", broken=False))
            continue
        # a chunk that is a whole frame, or several, is decoded where it belongs
        target = pixels[place] if pixels[place].shape == chunks.shape and piece.stored == source.dtype else None
        target = target if target is None or target.flags.c_contiguous else None
        try:
            chunk = _read_chunk(piece, chunks, files, index, scratch if target is None else target)
        except DataError as error:
            file = source.files[int(chunks.file[index])].path
            lost.append(Lost(affected, f"{file}: chunk at byte {chunks.offset[index]}: {error}"))
            continue
        if target is None:
            pixels[place] = chunk[tuple(slice(0, s.stop - s.start) for s in stored)]
    return pixels, lost


def _read_chunk(piece: Piece, chunks: Chunks, files: Files, index: int, out: NDArray[Any]) -> NDArray[Any]:
    """Read a chunk and decode it into `out`, an array of its shape."""
    raw = files.read(int(chunks.file[index]), int(chunks.offset[index]), int(chunks.length[index]))
    codecs.decode(piece.codec, int(chunks.skipped[index]), raw, out.nbytes, out=out.reshape(-1).view(np.uint8))
    return out


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
