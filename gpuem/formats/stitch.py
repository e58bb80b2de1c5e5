"""Pieces taken apart and put together: which frames they hold, ranges of them, and boxes of frames side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.formats.source import Chunks, Part, Piece, Runs, Step, Stitched, stored_layout

Gap = tuple[int, int, int, int]


def written(piece: Piece, frame: tuple[int, int]) -> NDArray[np.bool_] | None:
    """Which frames of a piece can be had as far as its description says; None where all can."""
    layout = stored_layout(piece.layout)
    if isinstance(layout, Stitched):
        there = np.ones(piece.frames, np.bool_) if layout.missing is None else ~layout.missing
        for part in layout.parts:
            own = written(part.piece, part.shape)
            there &= True if own is None else own[part.first : part.first + piece.frames]
        return there
    if not isinstance(layout, Chunks) or layout.length.all():
        return None
    grid = [-(-n // c) for n, c in zip((*piece.nav, *frame), layout.shape, strict=True)]
    whole = (layout.length.reshape(grid) > 0).all(axis=(-2, -1))
    for axis, n in enumerate(piece.nav):
        whole = np.repeat(whole, layout.shape[axis], axis).take(range(n), axis)
    return np.asarray(whole.reshape(-1))


def without(piece: Piece, frame: tuple[int, int], missing: NDArray[np.bool_]) -> Piece:
    """The same piece, of whose frames some can't be had."""
    if not missing.any():
        return piece
    part = Part(replace(piece, start=0), frame, 0, (0, 0), frame, (0, 0))
    return Piece(piece.start, piece.nav, Stitched((part,), (), 0, missing), piece.stored.newbyteorder("="))


def cut(piece: Piece, first: int, stop: int) -> Piece | None:
    """The frames of `piece` within ``[first, stop)``, counted as its `start` is; None where chunks would be cut."""
    low, high = max(first, piece.start), min(stop, piece.start + piece.frames)
    if high <= low:
        return replace(piece, nav=(0,))
    if high - low == piece.frames:
        return piece
    if isinstance(piece.layout, Runs) and len(piece.layout.file) == 1:
        runs = piece.layout
        offset = int(runs.offset[0] + (low - piece.start) * runs.stride[0])
        part = Runs.one(offset, high - low, int(runs.stride[0]), runs.frame_bytes, int(runs.file[0]))
        return replace(piece, start=low, nav=(high - low,), layout=part)
    if not isinstance(piece.layout, Chunks):
        return None
    chunks, row = piece.layout, math.prod(piece.nav[1:])
    a, b = (low - piece.start) / row, (high - piece.start) / row
    if a % chunks.shape[0] or (b % chunks.shape[0] and b != piece.nav[0]):
        return None
    size = len(chunks.file) // -(-piece.nav[0] // chunks.shape[0])
    rows = slice(int(a) // chunks.shape[0] * size, -(-int(b) // chunks.shape[0]) * size)
    part_of = {name: getattr(chunks, name)[rows] for name in ("file", "offset", "length", "skipped")}
    return replace(piece, start=low, nav=(int(b - a), *piece.nav[1:]), layout=replace(chunks, **part_of))


def flattened(piece: Piece) -> Piece | None:
    """The same frames with a single nav axis; None where chunks don't follow one another along it."""
    layout = piece.layout
    if len(piece.nav) == 1:
        return piece
    if isinstance(layout, Runs):
        return replace(piece, nav=(piece.frames,))
    if not isinstance(layout, Chunks):
        return None
    nav = len(piece.nav)
    chunk = [min(c, n) for c, n in zip(layout.shape[:nav], piece.nav, strict=True)]
    # one chunk may span all of the last axes, and a part of the one before that it divides, or that is the first
    axis = next((k for k, c in enumerate(chunk) if c > 1), nav - 1)
    if chunk[axis + 1 :] != list(piece.nav[axis + 1 :]) or (
        piece.nav[axis] % chunk[axis] and math.prod(piece.nav[:axis]) > 1
    ):
        return None
    # chunks that hang over the upper edges hold frames that aren't there
    if (
        any(c > n for c, n in zip(layout.shape[axis + 1 : nav], piece.nav[axis + 1 :], strict=True))
        or (layout.shape[axis] > piece.nav[axis] and math.prod(piece.nav[:axis]) > 1)
        or any(c > 1 for c in layout.shape[:axis])
    ):
        return None
    size = layout.shape[axis] * math.prod(layout.shape[axis + 1 : nav])
    return replace(piece, nav=(piece.frames,), layout=replace(layout, shape=(size, *layout.shape[nav:])))


def gaps(parts: Sequence[Part], frame: tuple[int, int]) -> tuple[Gap, ...]:
    """Boxes (y, x, rows, columns) of a frame that no part covers."""
    edges = sorted({0, frame[0], *(e for part in parts for e in (part.at[0], part.at[0] + part.size[0]))})
    found: list[Gap] = []
    for top, bottom in itertools.pairwise(edges):
        covering = sorted(
            (part.at[1], part.at[1] + part.size[1])
            for part in parts
            if part.at[0] <= top and part.at[0] + part.size[0] >= bottom
        )
        x = 0
        for first, stop in [*covering, (frame[1], frame[1])]:
            if first > x:
                found.append((top, x, bottom - top, first - x))
            x = max(x, stop)
    return tuple(found)


def taken(piece: Piece, shape: tuple[int, int], first: int, frames: int, box: Part) -> Stitched:
    """What `box` takes (inside, size, at) from `frames` frames of a piece, from `first` on, as parts of a frame."""
    layout = piece.layout
    if not isinstance(layout, Stitched):
        return Stitched((replace(box, piece=replace(piece, start=0), shape=shape, first=first),))
    parts = []
    for part in layout.parts:
        low = [max(a, b) for a, b in zip(part.at, box.inside, strict=True)]
        high = [min(p + s, i + z) for p, s, i, z in zip(part.at, part.size, box.inside, box.size, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            parts.append(
                replace(
                    part,
                    first=part.first + first,
                    inside=_pair(i + a - p for i, a, p in zip(part.inside, low, part.at, strict=True)),
                    size=_pair(b - a for a, b in zip(low, high, strict=True)),
                    at=_pair(t + a - i for t, a, i in zip(box.at, low, box.inside, strict=True)),
                )
            )
    missing = None if layout.missing is None else layout.missing[first : first + frames]
    return Stitched(tuple(parts), layout.gaps, layout.fill, missing)


def _pair(values: Iterable[int]) -> tuple[int, int]:
    y, x = values
    return y, x


def stitched(
    start: int, frames: int, made: Sequence[Stitched], frame: tuple[int, int], fill: float, stored: np.dtype[Any]
) -> Piece | None:
    """One piece of parts side by side; None where their frames are arranged in different ways."""
    parts = [part for one in made for part in one.parts]
    missing = np.zeros(frames, np.bool_)
    for one in made:
        if one.missing is not None:
            missing |= one.missing
    flat = [(part, flattened(part.piece)) for part in parts]
    nav: tuple[int, ...] = (frames,)
    if all(piece is not None for _, piece in flat):
        parts = [replace(part, piece=piece) for part, piece in flat if piece is not None]
    else:
        rests = {part.piece.nav[1:] for part in parts if not isinstance(part.piece.layout, Runs)}
        row = math.prod(next(iter(rests)))
        if len(rests) > 1 or frames % row or any(part.first % row for part in parts):
            return None
        nav = (frames // row, *next(iter(rests)))
    layout = Stitched(tuple(parts), gaps(parts, frame), fill, missing if missing.any() else None)
    return Piece(start, nav, layout, stored)


def merged(
    pieces: Mapping[int, Piece], shape: tuple[int, int], which: NDArray[np.int64], local: NDArray[np.int64]
) -> Piece | None:
    """One piece whose frame i is frame ``local[i]`` of ``pieces[which[i]]`` (-1: none), by a table of all frames.

    Parameters
    ----------
    pieces : mapping of int to Piece
        At least one.
    shape : tuple of int
        Shape of their frames.
    which, local : (n,) int64
        Where each frame comes from.

    Returns
    -------
    Piece or None
        None where they are not stored alike, or in chunks of several frames.
    """
    flat = {k: flattened(piece) for k, piece in pieces.items()}
    kinds = {None if piece is None else _kind(piece) for piece in flat.values()}
    kind = kinds.pop()
    if kinds or kind is None:
        return None
    stored, codec, chunk = kind
    per = math.prod(-(-n // c) for n, c in zip(shape, chunk[-2:], strict=True))
    count = which.size
    tables = {name: np.zeros((count, per), np.int64) for name in ("file", "offset", "length", "skipped")}
    for k, piece in flat.items():
        mine = which == k
        layout = stored_layout(piece.layout) if piece is not None else None
        if isinstance(layout, Chunks):
            for name, table in tables.items():
                table[mine] = getattr(layout, name).reshape(-1, per)[local[mine]]
        elif isinstance(layout, Runs):
            ends = np.cumsum(layout.frames)
            run = np.searchsorted(ends, local[mine], side="right")
            begin = (ends - layout.frames)[run]
            tables["file"][mine, 0] = layout.file[run]
            tables["offset"][mine, 0] = layout.offset[run] + (local[mine] - begin) * layout.stride[run]
    file, offset, length, skipped = (table.reshape(-1) for table in tables.values())
    if len(chunk) == 3:
        return Piece(0, (count,), Chunks(chunk, file, offset, length, skipped.astype(np.uint32)), stored, codec)
    size, ones = math.prod(shape) * stored.itemsize, np.ones(count, np.int64)
    return Piece(0, (count,), Runs(file, offset, ones, size * ones, size), stored, codec)


def _kind(piece: Piece) -> tuple[np.dtype[Any], tuple[Step, ...], tuple[int, ...]] | None:
    """What frames must have in common to be one piece; None where frames share chunks."""
    layout = piece.layout
    if isinstance(layout, Chunks):
        return (piece.stored, piece.codec, layout.shape) if layout.shape[0] == 1 else None
    whole = (1 << 62, 1 << 62)
    return (piece.stored, piece.codec, whole) if isinstance(layout, Runs) and not piece.codec else None
