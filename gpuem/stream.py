"""Shards on a device that works ahead: the next tiles are read and copied while one is computed with.

Nothing is checked on the way: decoders and kernels note what they find wrong on the device. A shard that comes back
with such a note is run once more by `gpuem.engine.run_shard`, tile by tile and frame by frame, which says what is wrong
and where, or masks it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gpuem import engine, tiles
from gpuem.backends import Lost, cuda_device, cuda_load, cuda_plan
from gpuem.backends.cuda_load import Tile
from gpuem.backends.cuda_session import Passage, Returning, Session, copying
from gpuem.engine import Job, Partial
from gpuem.errors import DataError
from gpuem.storage.pinned import Times


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
    began: float = 0.0
    loads: list[Times] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)


@contextmanager
def session(job: Job) -> Iterator[Session]:
    """What shards of a job need on the GPU, to be kept from one `run` to the next: buffers, streams, reader threads.

    Where a run on it ended with a DeviceError, a new one is needed.

    Raises
    ------
    DeviceError
        The GPU is absent, full or lost.
    """
    job.facts["gpu"] = asdict(cuda_device.gpu())
    with cuda_device.explained(), Session(job.source, job.files, job.plan, job.prepared, job.transfer) as made:
        job.facts["transfer"] = {"kind": made.transfer, "reason": made.why}
        job.facts["device_bytes"] = job.plan.device_nbytes
        yield made


# in `run` the name stands for the session that was given
_session = session


def run(
    job: Job, shards: Iterable[int], session: Session | None = None, *, last_try: bool = False
) -> Iterator[Partial]:
    """Run shards one after another on the GPU, yield their results in that order.

    So a shard that raises is the first that didn't come; those behind it may have been begun, and are dropped.

    Parameters
    ----------
    job : Job
        The job.
    shards : iterable of int
        Which shards.
    session : Session
        What `session` made for this job; it is left open. Default: a new one, closed at the end.
    last_try : bool
        Frames whose bytes don't come are broken frames like others; see `gpuem.engine.run_shard`.

    Yields
    ------
    Partial
        With `began`, when the shard before was done or, for the first one, when its first byte was asked for; `ended`,
        when its sums were on the host; and `seconds`. Stages of one shard run at the same time, so they are more than
        that together: ``read``, ``copy``, ``decode`` and ``compute`` say how long each was at work, ``wait`` how long
        even the busiest of disk, bus and kernels stood still.

    Raises
    ------
    ReadError
        Bytes don't come, and it is not the last try.
    DataError
        A frame can't be read or holds NaN, and `on_error` is "stop".
    DeviceError
        The GPU is full or lost.
    """
    with ExitStack() as own:
        own.enter_context(cuda_device.explained())
        held = session or own.enter_context(_session(job))
        waiting: deque[_Shard] = deque()
        sums, before = None, 0.0
        for place, tile, arrived in held.stream(_tiles(job, shards)):
            if job.stop.is_set():
                raise engine.StoppedError
            if place.first:
                while len(waiting) >= cuda_plan.SUMS:
                    yield (found := _finished(job, held, waiting.popleft(), before, last_try))
                    before = found.ended
                sums = held.begin()
                asked = tile.load.times.asked if tile is not None else time.perf_counter()
                waiting.append(_Shard(place.shard, began=time.time() - (time.perf_counter() - asked)))
            shard = waiting[-1]
            if tile is not None:
                shard.loads.append(tile.load.times)
            if isinstance(arrived, DataError):
                shard.again = True
            elif tile is not None and arrived is not None and sums is not None:
                passage = held.add(tile, arrived, sums, shard.rows, tile.indices - job.skip)
                shard.passages += [] if passage is None else [passage]
                shard.indices.append(tile.indices)
                shard.lost += tile.lost
                shard.rows += tile.indices.size
            if place.last and sums is not None:
                shard.returning = held.end(sums)
        while waiting:
            yield (found := _finished(job, held, waiting.popleft(), before, last_try))
            before = found.ended


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


def _finished(job: Job, session: Session, shard: _Shard, before: float, last_try: bool) -> Partial:
    """The result of a shard, once it is there; the shard before it was done at `before`."""
    assert shard.returning is not None
    sums, good = shard.returning.result()
    began = max(shard.began, before)
    seconds, ended = _seconds(session, shard), session.clock.at(shard.returning.event)
    if shard.again or not good or any(item.broken for item in shard.lost):
        with session.compute:
            found = engine.run_shard(job, shard.index, last_try=last_try)
        # both attempts cost time
        found = replace(found, began=began, seconds=_added(seconds, found.seconds))
    else:
        indices = np.concatenate([*shard.indices, np.empty(0, np.int64)])
        own = engine.filled(sums, indices.size)
        found = Partial(shard.index, indices - job.skip, own, tuple(shard.lost), seconds, engine.here(), began, ended)
    found = replace(found, ended=max(found.ended, began))
    busiest = max(seconds["read"], seconds["copy"], seconds["decode"] + seconds["compute"])
    wait = 0.0 if shard.again else max(found.ended - began - busiest, 0.0)
    return replace(found, seconds={**found.seconds, "wait": wait})


def _seconds(session: Session, shard: _Shard) -> dict[str, float]:
    """How long each stage was at work for a shard whose sums are back."""
    assert shard.returning is not None
    found = {
        "read": _covered([span for times in shard.loads for span in times.reads]),
        "copy": sum(copying(times) for times in shard.loads),
        "decode": _covered([span for times in shard.loads for span in times.decodes]),
        "compute": 0.0,
    }
    for passage in shard.passages:
        # what comes after a tile is seen to be over only when the sums are: they are copied behind the last one
        end = shard.returning.event if passage is shard.passages[-1] else passage.times.used
        found = _added(found, passage.seconds(end))
    return found


def _added(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {stage: one.get(stage, 0.0) + other.get(stage, 0.0) for stage in {**one, **other}}


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds in which at least one of the spans was under way: several threads read at once."""
    total, reached = 0.0, -np.inf
    for first, last in sorted(spans):
        total += max(last - max(first, reached), 0.0)
        reached = max(reached, last)
    return float(total)
