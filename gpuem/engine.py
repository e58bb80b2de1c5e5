"""One shard: for each tile, for each block of frames in it, all weights and fits of all analyses at once."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.backends import Block, Lost, Sums, Weights
from gpuem.errors import DataError, ReadError
from gpuem.formats.source import Box, Chunks, Piece, Runs, Source
from gpuem.storage.host import Files

OnError = Literal["stop", "mask"]
# images over frames that wait in memory for their turn, where they can be read again
WAITING_NBYTES = 64 << 20


@dataclass(frozen=True)
class Job:
    """What all shards of a run share.

    Parameters
    ----------
    source : Source
        The frames.
    files : Files
        Its open files.
    plan : tiles.Plan
        The cuts.
    backend : module
        `gpuem.backends.cpu` or `gpuem.backends.cuda`.
    weights : tuple of Weights
        What each analysis asked for.
    prepared : object
        The backend's form of the weights.
    skip : int
        Frame `skip` of the file belongs to scan position 0; negative where the first positions have no frame.
    wanted : (positions,) bool
        The region of interest.
    on_error : {"stop", "mask"}
        What to do with frames that can't be read.
    give_back : bool
        Unmap what was used, so that mapped files don't pile up.
    stop : threading.Event
        Set when the run is to end early.
    transfer : {"auto", "pinned", "gds"}
        How bytes reach a GPU.
    patience : float
        Seconds for which a shard is tried again where storage fails, and after which it seems to hang.
    facts : dict
        What becomes known only while it runs, as plain values for the result.
    """

    source: Source
    files: Files
    plan: tiles.Plan
    backend: ModuleType
    weights: tuple[Weights, ...]
    prepared: Any
    skip: int
    wanted: NDArray[np.bool_]
    on_error: OnError = "stop"
    give_back: bool = True
    stop: threading.Event = field(default_factory=threading.Event)
    transfer: str = "auto"
    patience: float = 120.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Partial:
    """What one shard leaves behind.

    Parameters
    ----------
    shard : int
        Which one.
    positions : (n,) int64
        Flat scan positions of its frames.
    sums : Sums
        One row per frame.
    lost : tuple of Lost
        What was lost on the way.
    seconds : dict of str to float
        Time by stage: read, copy, decode, compute, wait; those that can be told apart.
    worker : str
        Host, process and thread that ran it.
    began, ended : float
        When, in seconds of the epoch.
    group : tuple of int
        Shards whose images over frames were added up into the first of them; the others have none. Only all of them
        together are of use.
    """

    shard: int
    positions: NDArray[np.int64]
    sums: Sums
    lost: tuple[Lost, ...]
    seconds: dict[str, float]
    worker: str = ""
    began: float = 0.0
    ended: float = 0.0
    group: tuple[int, ...] = ()


class StoppedError(Exception):
    """The run ends early; a shard in work was dropped."""


def run_shard(job: Job, index: int, *, last_try: bool = False) -> Partial:
    """Run one shard.

    Parameters
    ----------
    job : Job
        What all shards share.
    index : int
        Which one.
    last_try : bool
        Frames whose bytes don't come are broken frames like others; else the shard is to be tried again.

    Raises
    ------
    ReadError
        Bytes don't come, and it is not the last try, or not one frame can be read.
    DataError
        A frame can't be read or holds NaN, and `on_error` is "stop".
    """
    began = time.time()
    shard = job.plan.shards[index]
    piece, tile = job.source.pieces[shard.piece], job.plan.tiles[shard.piece]
    before = job.files.read_seconds()
    sums = job.backend.new_sums(job.prepared, shard.frames)
    positions = np.empty(shard.frames, np.int64)
    lost: list[Lost] = []
    seconds = {"read": 0.0, "decode": 0.0, "compute": 0.0}
    done = 0
    extents = _extents(job.source, piece, tile, shard)
    # with a region of interest, only what is touched is read
    for extent in extents if job.wanted.all() else ():
        job.files.will_need(*extent)
    for box in tiles.boxes(piece, tile, shard):
        if job.stop.is_set():
            raise StoppedError
        keep = wanted_in(job, piece, box)
        if not keep.any():
            continue
        start = time.perf_counter()
        for item in job.backend.load(job.source, job.files, piece, box, keep):
            loaded = time.perf_counter()
            seconds["decode"] += loaded - start
            if isinstance(item, Lost):
                lost.append(_refuse_or_mask(job, item, last_try))
            else:
                good, bad = _without_unusable(job, item)
                lost.extend(bad)
                where = positions[done : done + good.indices.size]
                where[:] = good.indices - job.skip
                job.backend.add_frames(good.frames, job.prepared, sums, done, where)
                done += good.indices.size
            start = time.perf_counter()
            seconds["compute"] += start - loaded
    for extent in extents if job.give_back and isinstance(piece.layout, Runs) else ():
        job.files.release(*extent)
    _refuse_nothing(index, done, lost)
    seconds["read"] = job.files.read_seconds() - before
    seconds["decode"] = max(seconds["decode"] - seconds["read"], 0.0)
    found = filled(job.backend.fetch(sums), done)
    return Partial(index, positions[:done], found, tuple(lost), seconds, here(), began, time.time())


def _refuse_nothing(index: int, done: int, lost: list[Lost]) -> None:
    """Raise ReadError where no frame came: that is no bad spot of a disk; storage is away, and comes back perhaps."""
    if done == 0 and lost and all(item.reading for item in lost):
        raise ReadError(f"not one frame of shard {index} can be read: {lost[0].message}")


def here() -> str:
    """Host, process and thread: who runs a shard."""
    return f"{platform.node()}:{os.getpid()}:{threading.current_thread().name}"


def wanted_in(job: Job, piece: Piece, box: Box) -> NDArray[np.bool_]:
    """Which frames of a tile belong to wanted scan positions, in C order of the box."""
    where = tiles.frames_of(piece, box) - job.skip
    keep = (where >= 0) & (where < job.wanted.size)
    keep[keep] = job.wanted[where[keep]]
    return keep


def filled(sums: Sums, done: int) -> Sums:
    """Sums of a shard without the rows that no frame went to."""
    fits = tuple(rows[:done] for rows in sums.fits)
    return replace(sums, masks=sums.masks[:done], images=sums.images[:done], moments=sums.moments[:done], fits=fits)


def _without_unusable(job: Job, block: Block) -> tuple[Block, list[Lost]]:
    """The block without frames that hold NaN, infinity or too large counts, and those."""
    good, reason = job.backend.usable(block.frames)
    if good.all():
        return block, []
    frames = type(block.frames)(block.frames.pixels, block.frames.starts[good], block.frames.shape)
    return Block(frames, block.indices[good]), [_refuse_or_mask(job, Lost(block.indices[~good], reason))]


def _refuse_or_mask(job: Job, item: Lost, last_try: bool = True) -> Lost:
    if item.reading and not last_try:
        raise ReadError(item.message, tuple(item.indices.tolist()))
    if item.broken and job.on_error == "stop":
        name = job.source.files[0].path if job.source.files else "array"
        raise DataError(
            f"{name}: {describe(item.indices)}: {item.message}. "
            'To go on without them set on_error = "mask": they are then masked and counted',
            tuple(item.indices.tolist()),
        )
    return item


def describe(indices: NDArray[np.int64]) -> str:
    """Frame numbers for people: ``frame 7``, ``frames 3-5, 9 and 1,200 more``."""
    values = np.unique(indices)
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    names = [f"{r[0]}-{r[-1]}" if r.size > 1 else f"{r[0]}" for r in runs[:5]]
    rest = sum(r.size for r in runs[5:])
    return f"frame{'s' if values.size > 1 else ''} {', '.join(names)}" + (f" and {rest:,} more" if rest else "")


def _extents(source: Source, piece: Piece, tile: tuple[int, ...], shard: tiles.Shard) -> list[tuple[int, int, int]]:
    """Byte ranges (file, offset, length) that a shard will read."""
    layout = piece.layout
    if isinstance(layout, Runs):
        ends = np.cumsum(layout.frames)
        first, last = shard.first * tile[0], min(shard.last * tile[0], piece.frames)
        out = []
        for run in range(int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1):
            start = int(ends[run] - layout.frames[run])
            a, b = max(first, start) - start, min(last, int(ends[run])) - start
            stride = int(layout.stride[run])
            out.append((int(layout.file[run]), int(layout.offset[run]) + a * stride, (b - a) * stride))
        return out
    if isinstance(layout, Chunks) and layout.shape[-2:] == source.frame_shape and len(piece.nav) == 1:
        per_tile = -(-tile[0] // layout.shape[0])
        some = slice(shard.first * per_tile, shard.last * per_tile)
        used = np.flatnonzero(layout.length[some]) + some.start
        if used.size and (layout.file[used] == layout.file[used[0]]).all():
            low, high = layout.offset[used].min(), (layout.offset[used] + layout.length[used]).max()
            if high - low <= 2 * layout.length[used].sum():
                return [(int(layout.file[used[0]]), int(low), int(high - low))]
    return []


@dataclass
class Totals:
    """All partials combined.

    Parameters
    ----------
    sums : Sums
        One row per scan position; rows without a frame are 0 (of fits: NaN) and not `valid`.
    valid : (positions,) bool
        Which positions had a readable frame.
    lost : list of Lost
        What could not be read.
    nbytes : int
        Bytes of decoded frames that were used.
    seconds : dict of str to float
        Time per stage, summed over threads.
    waiting : dict of int to (total, maximum) or None
        Images over frames of float data that came before their turn, by shard; None: to be read when its turn comes.
    turn : int
        The shard whose image over frames comes next.
    """

    sums: Sums
    valid: NDArray[np.bool_]
    lost: list[Lost] = field(default_factory=list)
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    waiting: dict[int, tuple[NDArray[Any], NDArray[Any]] | None] = field(default_factory=dict)
    turn: int = 0


def combine(job: Job, partials: Iterable[Partial], read: Callable[[int], Partial] | None = None) -> Totals:
    """Put the partial results of all shards, in whatever order they come, where they belong.

    Parameters
    ----------
    job : Job
        The run.
    partials : iterable of Partial
        The results.
    read : callable
        Returns the result of a shard again, from disk: then few images wait in memory for their turn.
    """
    totals = _empty_totals(job)
    for partial in partials:
        _add(job, totals, partial, read)
    totals.lost.sort(key=lambda item: int(item.indices[0]))
    return totals


def folded(job: Job, partials: list[Partial]) -> list[Partial]:
    """The same results with one image over frames for all of them, where sums don't depend on the order.

    Images are most of what a shard leaves behind: what is added up where it arose has not to travel.
    """
    weights = job.prepared.weights
    if len(partials) < 2 or in_order(job) or not (weights.total or weights.maximum):
        return partials
    totals = _empty_totals(job, positions=0)
    for partial in partials:
        _add_images(totals, partial.sums.total, partial.sums.maximum)
    group = tuple(partial.shard for partial in partials)
    none = np.empty((0, 0), job.prepared.wide), np.empty((0, 0), job.prepared.dtype)
    images = [(totals.sums.total, totals.sums.maximum), *[none] * (len(partials) - 1)]
    return [
        replace(partial, sums=replace(partial.sums, total=total, maximum=maximum), group=group)
        for partial, (total, maximum) in zip(partials, images, strict=True)
    ]


def in_order(job: Job) -> bool:
    """Whether images over frames must be added in the order of shards: sums of floats depend on it."""
    return job.prepared.dtype.kind == "f" and bool(job.prepared.weights.total or job.prepared.weights.maximum)


def _add(job: Job, totals: Totals, partial: Partial, read: Callable[[int], Partial] | None = None) -> None:
    sums, part = totals.sums, partial.sums
    for name in ("masks", "images", "moments"):
        getattr(sums, name)[partial.positions] = getattr(part, name)
    for rows, found in zip(sums.fits, part.fits, strict=True):
        rows[partial.positions] = found
    if in_order(job):
        _add_in_order(totals, partial, read)
    else:
        _add_images(totals, part.total, part.maximum)
    totals.valid[partial.positions] = True
    totals.lost.extend(partial.lost)
    totals.nbytes += partial.positions.size * job.source.frame_nbytes
    for stage, seconds in partial.seconds.items():
        totals.seconds[stage] = totals.seconds.get(stage, 0.0) + seconds


def _add_in_order(totals: Totals, partial: Partial, read: Callable[[int], Partial] | None) -> None:
    """Add images over frames shard by shard; one that comes before its turn waits, in memory or on disk."""
    images = partial.sums.total, partial.sums.maximum
    full = sum(image.nbytes for pair in totals.waiting.values() if pair for image in pair) > WAITING_NBYTES
    totals.waiting[partial.shard] = None if full and read and partial.shard != totals.turn else images
    while totals.turn in totals.waiting:
        pair = totals.waiting.pop(totals.turn)
        if pair is None and read:
            sums = read(totals.turn).sums
            pair = sums.total, sums.maximum
        if pair:
            _add_images(totals, *pair)
        totals.turn += 1


def _add_images(totals: Totals, total: NDArray[Any], maximum: NDArray[Any]) -> None:
    sums = totals.sums
    if total.size:
        sums.total += total
    if maximum.size:
        np.maximum(sums.maximum, maximum, out=sums.maximum)


def _empty_totals(job: Job, positions: int | None = None) -> Totals:
    weights, shape, wide = job.prepared.weights, job.prepared.shape, job.prepared.wide
    dtype, positions = job.prepared.dtype, job.wanted.size if positions is None else positions
    lowest = -np.inf if dtype.kind == "f" else np.iinfo(dtype).min
    sums = Sums(
        np.zeros((positions, len(weights.masks)), wide),
        np.zeros((positions, len(weights.images)), np.float64),
        np.zeros((positions, len(weights.moments), 3), wide),
        np.zeros(shape if weights.total else (0, 0), wide),
        np.full(shape if weights.maximum else (0, 0), lowest, dtype),
        tuple(np.full((positions, fit.columns), np.nan, np.float32) for fit in weights.fits),
    )
    return Totals(sums, np.zeros(positions, np.bool_))
