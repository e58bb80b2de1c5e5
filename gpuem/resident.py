"""Data that stays in the memory of the GPU: read once, then computed with as often as one likes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.backends import Weights, cuda, cuda_device, cuda_load, cuda_plan
from gpuem.backends.cuda_load import Tile
from gpuem.backends.cuda_session import Session
from gpuem.errors import DataError, DeviceError, PlanError
from gpuem.formats.source import Chunks, Piece, Resident, Runs, Source, Stitched
from gpuem.storage.host import Files
from gpuem.storage.pinned import ALIGNED, Arrived, Extent, Load
from gpuem.tiles import Plan

Array = Any


def bring(source: Source, files: Files, *, packed: bool) -> Source:
    """The same frames in the memory of the GPU.

    Parameters
    ----------
    source : Source
        The frames; a correction stays to be applied when they are used.
    files : Files
        Its files.
    packed : bool
        Keep the bytes as they are stored, where the GPU can decode them: smaller, and decoded in every run.

    Raises
    ------
    PlanError
        They don't fit; with the numbers.
    DataError
        A frame can't be read or decoded.
    DeviceError
        There is no GPU, or it fails.
    """
    reason = cuda_device.why_not()
    if reason:
        raise DeviceError(f"to_device: {reason}")
    raw = replace(source, dtype=source.raw_dtype, correction=None)
    free = cuda_device.gpu().free
    shards, cuts = tiles.cut(raw, cuda_plan.SIZES)
    plan = Plan(shards, cuts, min(os.cpu_count() or 1, cuda_plan.READERS), {})
    there = [isinstance(piece.layout, Resident) for piece in raw.pieces]
    as_stored = [
        _stored(piece) if packed and not already and _packable(raw, piece) else None
        for piece, already in zip(raw.pieces, there, strict=True)
    ]
    size = sum(
        0 if already else piece.frames * raw.frame_nbytes if stored is None else stored.nbytes
        for piece, stored, already in zip(raw.pieces, as_stored, there, strict=True)
    )
    prepared = cuda.prepare(Weights(), raw.frame_shape, raw.dtype)
    beside = sum(cuda.plan(raw, prepared, tiles.Limits(0, 0, plan.threads, 1 << 62)).device_nbytes.values())
    if size + beside > free:
        raise PlanError(
            f"the data takes {size / 1e9:,.2f} GB of the GPU's memory and {beside / 1e9:,.2f} GB while it is read; "
            f"{free / 1e9:,.2f} GB are free. Stream it instead (gpuem.run without to_device), "
            f"{'' if packed else 'keep it packed, '}or take a part of it"
        )
    with cuda_device.explained(), Session(raw, files, plan, prepared) as session:
        pieces: list[Piece] = []
        for number, (piece, stored) in enumerate(zip(raw.pieces, as_stored, strict=True)):
            if isinstance(piece.layout, Resident):
                pieces.append(piece)
            elif stored is None:
                pieces += _decoded(raw, files, session, number, cuts[number])
            else:
                pieces.append(_as_stored(session, piece, stored))
        session.compute.synchronize()
    return replace(source, pieces=tuple(pieces))


@dataclass
class _Rows:
    """A workspace whose decoded frames go straight to their rows of the resident array."""

    session: Session
    rows: Array
    frames: int = 0

    def scratch(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if purpose != "pixels":
            return self.session.scratch(purpose, shape, dtype)
        return self.rows[self.frames : self.frames + shape[0]].view(dtype)

    def even(self, frame: int) -> Array:
        return self.session.even(frame)

    def tables(self) -> dict[str, Array]:
        return {}


def _decoded(source: Source, files: Files, session: Session, number: int, cut: tuple[int, ...]) -> Iterator[Piece]:
    """Read and decode one piece; pieces of neighbouring frames, without those that were never written."""
    import cupy

    piece = source.pieces[number]
    rows = cupy.empty((piece.frames, source.frame_nbytes), np.uint8)
    work = _Rows(session, rows)
    found: list[NDArray[np.int64]] = []
    with session.compute:
        codes = cupy.zeros(max(1, _codes(source, number, cut)), np.int32)
    reported: list[Tile] = []

    def wanted() -> Iterator[tuple[None, Tile]]:
        for k in range(math.prod(tiles.grid(piece, cut))):
            box = tiles.box(piece, cut, k)
            keep = np.ones(math.prod(s.stop - s.start for s in box), np.bool_)
            yield None, cuda_load.describe(source, files, piece, box, keep, copy=True)

    done = 0
    for _, tile, arrived in session.stream(wanted()):
        if isinstance(arrived, DataError):
            raise arrived
        assert tile is not None
        broken = [item for item in tile.lost if item.broken]
        if broken:
            raise DataError(broken[0].message, tuple(broken[0].indices.tolist()))
        if tile.indices.size and arrived is not None:
            with session.compute:
                tile.decode(arrived, work, codes[done : done + tile.chunks])
            reported.append(tile)
            done += tile.chunks
            work.frames += tile.indices.size
            found.append(tile.indices)
    with session.compute:
        _refuse_broken(codes.get()[:done], reported)
    indices = np.concatenate([*found, np.empty(0, np.int64)])
    flat = rows.reshape(-1)
    for run in np.split(np.arange(indices.size), np.flatnonzero(np.diff(indices) != 1) + 1):
        if run.size:
            layout = Runs.one(int(run[0]) * source.frame_nbytes, run.size, source.frame_nbytes, source.frame_nbytes)
            yield Piece(int(indices[run[0]]), (run.size,), Resident(flat, layout), source.raw_dtype)


def _codes(source: Source, number: int, cut: tuple[int, ...]) -> int:
    """Most chunks of piece `number` that report a code."""
    piece = source.pieces[number]
    shard = tiles.Shard(0, number, 0, math.prod(tiles.grid(piece, cut)), piece.frames)
    cuts = tuple(cut for _ in source.pieces)
    return cuda_plan.chunks_of_shard(source, (shard,), cuts)


def _refuse_broken(codes: NDArray[np.int32], reported: Sequence[Tile]) -> None:
    at = 0
    for tile in reported:
        if codes[at : at + tile.chunks].any():
            first, last = int(tile.indices[0]), int(tile.indices[-1])
            raise DataError(
                f"chunks among frames {first} to {last} can't be decoded. Which, and why, is said by gpuem.run, which "
                'also goes on without them: on_error = "mask"',
                tuple(tile.indices.tolist()),
            )
        at += tile.chunks


def _packable(source: Source, piece: Piece) -> bool:
    """Whether a piece can stay as it is stored; parts of frames are put together once."""
    return cuda_load.on_device(source, piece) and not isinstance(piece.layout, Stitched)


@dataclass(frozen=True)
class _Stored:
    """Bytes of a piece as few extents, and the piece's layout in them."""

    extents: tuple[Extent, ...]
    nbytes: int
    layout: Any = field(repr=False)


def _stored(piece: Piece) -> _Stored:
    layout = piece.layout
    assert isinstance(layout, Runs | Chunks)
    if isinstance(layout, Runs):
        length = (layout.frames - 1) * layout.stride + layout.frame_bytes
        used = np.arange(length.size)
    else:
        length = layout.length
        used = np.flatnonzero(length)
        # in the order of the file
        used = used[np.lexsort((layout.offset[used], layout.file[used]))]
    apart = np.zeros(max(used.size - 1, 0), np.bool_)
    extents, positions, nbytes = cuda_load.gather(
        layout.file[used], layout.offset[used], length[used], apart, cuda_load.GAP_NBYTES
    )
    offset = np.zeros(length.size, np.int64)
    offset[used] = positions
    return _Stored(extents, nbytes, replace(layout, offset=offset, file=np.zeros(length.size, np.int64)))


def _as_stored(session: Session, piece: Piece, stored: _Stored) -> Piece:
    """Copy stored bytes to the device, slot by slot."""
    import cupy

    data = cupy.empty(stored.nbytes, np.uint8)
    room = session.ring.nbytes // ALIGNED * ALIGNED - ALIGNED

    def loads() -> Iterator[tuple[tuple[int, int], Load]]:
        for extent in stored.extents:
            for start in range(0, extent.length, room):
                count = min(room, extent.length - start)
                part = Extent(extent.file, extent.offset + start, count, 0)
                yield (extent.at + start, count), Load((part,), count)

    for (at, count), arrived in session.ring.stream(loads()):
        if isinstance(arrived, DataError):
            raise arrived
        assert isinstance(arrived, Arrived)
        data[at : at + count].data.copy_from_device_async(arrived.data.data, count, session.compute)
    return replace(piece, layout=Resident(data, stored.layout))
