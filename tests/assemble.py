"""Reads a Source the slow, obvious way, without storage or engine: the reference that format tests compare."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.codecs.chunks import decode
from gpuem.formats.source import Calls, Chunks, Piece, Runs, Source, Stitched, Strided
from gpuem.formats.stitch import written


def read_bytes(source: Source, file: int, offset: int, length: int) -> NDArray[np.uint8]:
    """Exactly `length` bytes of a file."""
    with source.files[file].path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(length)
    assert len(data) == length, f"{source.files[file].path}: {length} bytes at {offset} end beyond the file"
    return np.frombuffer(data, np.uint8)


def assemble(source: Source, missing: float = 0) -> NDArray[Any]:
    """All frames as an array (scan..., y, x) of the source's dtype; what no piece holds becomes `missing`."""
    frames = np.full((source.frames, *source.frame_shape), missing, source.dtype)
    for piece in source.pieces:
        frames[piece.start : piece.start + piece.frames] = _piece(source, piece, missing)
    return frames.reshape(*source.scan_shape, *source.frame_shape)


def covered(source: Source) -> NDArray[np.bool_]:
    """Which frames any piece holds, shape (frames,)."""
    held = np.zeros(source.frames, bool)
    for piece in source.pieces:
        assert not held[piece.start : piece.start + piece.frames].any(), "two pieces hold one frame"
        there = written(piece, source.frame_shape) if isinstance(piece.layout, Stitched) else None
        held[piece.start : piece.start + piece.frames] = True if there is None else there
    return held


def _piece(source: Source, piece: Piece, missing: float) -> NDArray[Any]:
    shape = (*piece.nav, *source.frame_shape)
    layout = piece.layout
    if isinstance(layout, Runs):
        array = _runs(source, piece, layout)
    elif isinstance(layout, Chunks):
        array = _chunks(source, piece, layout, shape, missing)
    elif isinstance(layout, Strided):
        raw = read_bytes(source, layout.file, 0, source.files[layout.file].size)
        array = np.ndarray(shape, piece.stored, raw, layout.offset, layout.strides)
    elif isinstance(layout, Stitched):
        array = _stitched(source, piece, layout, missing)
    else:
        assert isinstance(layout, Calls)
        array = layout.read(tuple(slice(0, n) for n in shape))
        # a box from the middle must agree with the whole
        box = tuple(slice(n // 3, max(n // 3 + 1, n - 1)) for n in shape)
        np.testing.assert_array_equal(layout.read(box), array[box])
    return array.reshape(piece.frames, *source.frame_shape).astype(source.dtype)


def _stitched(source: Source, piece: Piece, layout: Stitched, missing: float) -> NDArray[Any]:
    array = np.full((piece.frames, *source.frame_shape), layout.fill, piece.stored)
    for part in layout.parts:
        own = _piece(replace(source, frame_shape=part.shape, dtype=piece.stored), part.piece, missing)
        (y, x), (top, left), (rows, columns) = part.at, part.inside, part.size
        box = own[part.first : part.first + piece.frames, top : top + rows, left : left + columns]
        array[:, y : y + rows, x : x + columns] = box
    if layout.missing is not None:
        array[layout.missing] = missing
    return array


def _runs(source: Source, piece: Piece, layout: Runs) -> NDArray[Any]:
    runs = zip(layout.file, layout.offset, layout.frames, layout.stride, strict=True)
    places = [(file, int(offset + k * stride)) for file, offset, count, stride in runs for k in range(count)]
    return np.stack([read_bytes(source, file, at, layout.frame_bytes).view(piece.stored) for file, at in places])


def _chunks(source: Source, piece: Piece, layout: Chunks, shape: tuple[int, ...], missing: float) -> NDArray[Any]:
    array = np.full(shape, missing, piece.stored)
    grid = [range(0, n, c) for n, c in zip(shape, layout.shape, strict=True)]
    nbytes = math.prod(layout.shape) * piece.stored.itemsize
    places = list(itertools.product(*grid))
    assert len(places) == len(layout.file) == len(layout.offset) == len(layout.length) == len(layout.skipped)
    for k, corner in enumerate(places):
        if layout.length[k] == 0:
            continue
        raw = read_bytes(source, int(layout.file[k]), int(layout.offset[k]), int(layout.length[k]))
        chunk = decode(piece.codec, int(layout.skipped[k]), raw, nbytes).view(piece.stored).reshape(layout.shape)
        box = tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, layout.shape, shape, strict=True))
        array[box] = chunk[tuple(slice(0, s.stop - s.start) for s in box)]
    return array
