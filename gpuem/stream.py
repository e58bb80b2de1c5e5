"""Shards on a device that works ahead: the next tiles are read and copied while one is computed with.

Nothing is checked on the way: decoders and kernels note what they find wrong on the device. A shard that comes back
with such a note is run once more by `gpuem.engine.run_shard`, tile by tile and frame by frame, which says what is wrong
and where, or masks it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuem import engine, tiles
from gpuem.backends import Lost, cuda_device, cuda_load, cuda_plan
from gpuem.backends.cuda_load import Tile
from gpuem.backends.cuda_session import Returning, Session
from gpuem.engine import Job, Partial
from gpuem.errors import DataError


@dataclass(frozen=True)
class _Place:
    """Where a tile stands: its shard, and whether it is the first or the last of it."""

    shard: int
    first: bool
    last: bool


@dataclass
class _Shard:
    """A shard that was run, until its sums are back."""

    index: int
    returning: Returning | None = None
    indices: list[NDArray[np.int64]] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    rows: int = 0
    again: bool = False


def run(job: Job, shards: Iterable[int]) -> Iterator[Partial]:
    """Run shards one after another on the GPU, yield their results in that order.

    Raises
    ------
    DataError
        A frame can't be read or holds NaN, and `on_error` is "stop".
    DeviceError
        The GPU is full or lost.
    """
    with (
        cuda_device.explained(),
        Session(job.source, job.files, job.plan, job.prepared, job.transfer) as session,
    ):
        job.facts["gpu"] = asdict(cuda_device.gpu())
        job.facts["transfer"] = {"kind": session.transfer, "reason": session.why}
        job.facts["device_bytes"] = job.plan.device_nbytes
        waiting: deque[_Shard] = deque()
        sums = None
        for place, tile, arrived in session.stream(_tiles(job, shards)):
            if job.stop.is_set():
                raise engine.StoppedError
            if place.first:
                while len(waiting) >= cuda_plan.SUMS:
                    yield _finished(job, session, waiting.popleft())
                sums = session.begin()
                waiting.append(_Shard(place.shard))
            shard = waiting[-1]
            if isinstance(arrived, DataError):
                shard.again = True
            elif tile is not None and arrived is not None and sums is not None:
                session.add(tile, arrived, sums, shard.rows, tile.indices - job.skip)
                shard.indices.append(tile.indices)
                shard.lost += tile.lost
                shard.rows += tile.indices.size
            if place.last and sums is not None:
                shard.returning = session.end(sums)
        while waiting:
            yield _finished(job, session, waiting.popleft())


def _tiles(job: Job, shards: Iterable[int]) -> Iterator[tuple[_Place, Tile | None]]:
    """All tiles of all shards, in order; a shard in which no frame is wanted has one empty place."""
    for index in shards:
        shard = job.plan.shards[index]
        piece, shape = job.source.pieces[shard.piece], job.plan.tiles[shard.piece]
        wanted = []
        for box in tiles.boxes(piece, shape, shard):
            keep = engine.wanted_in(job, piece, box)
            if keep.any():
                wanted.append((box, keep))
        if not wanted:
            yield _Place(index, True, True), None
        for k, (box, keep) in enumerate(wanted):
            place = _Place(index, k == 0, k == len(wanted) - 1)
            yield place, cuda_load.describe(job.source, job.files, piece, box, keep)


def _finished(job: Job, session: Session, shard: _Shard) -> Partial:
    assert shard.returning is not None
    started = time.perf_counter()
    sums, good = shard.returning.result()
    waited = time.perf_counter() - started
    if shard.again or not good or any(item.broken for item in shard.lost):
        with session.compute:
            return engine.run_shard(job, shard.index)
    indices = np.concatenate([*shard.indices, np.empty(0, np.int64)])
    seconds = {**session.ring.seconds, "device": waited}
    session.ring.seconds.update(read=0.0, wait=0.0)
    return Partial(shard.index, indices - job.skip, engine.filled(sums, indices.size), tuple(shard.lost), seconds)
