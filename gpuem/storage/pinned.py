"""Bytes of files in device memory, through a ring of page-locked slots or straight from the disk.

A slot is a piece of page-locked host memory and its twin on the device. Reader threads fill the next slots while one is
copied and another one is computed with; nothing waits for anything but what it needs:

    host side of a slot     may be filled again when its last copy is done          (event `copied`)
    device side of a slot   may be overwritten when nothing computes with it        (event `used`)
    computing               begins when the copy is done                            (event `copied`)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, DeviceError
from gpuem.storage.host import Files

# several threads read one slot in pieces of this size: one thread alone is slower than the bus
PIECE_NBYTES = 4 << 20
# what lies in a slot begins here, so that vector loads are aligned
ALIGNED = 16
Tag = TypeVar("Tag")


@dataclass(frozen=True)
class Extent:
    """Bytes of a file and where they go in a slot."""

    file: int
    offset: int
    length: int
    at: int


@dataclass
class Times:
    """When what happened to a load: on the host as (first, last) of `time.perf_counter`, on the device as events.

    Parameters
    ----------
    asked : float
        When it was asked for, on the host.
    reads : list of (float, float)
        Reading, one for each task of a reader thread.
    decodes : list of (float, float)
        Decoding on the host, in reader threads.
    began, copied, used : event
        The copy could begin; it was done; nothing computes any more with what was copied. None: there was no such
        moment.
    """

    asked: float = 0.0
    reads: list[tuple[float, float]] = field(default_factory=list)
    decodes: list[tuple[float, float]] = field(default_factory=list)
    began: Any = None
    copied: Any = None
    used: Any = None


@dataclass
class Load:
    """What is to be brought to the device at once.

    Parameters
    ----------
    extents : tuple of Extent
        Bytes to read.
    nbytes : int
        Bytes of a slot that they take.
    tables : tuple of arrays
        Small arrays that go along.
    fill : callable, optional
        Writes the first `nbytes` bytes itself, in a reader thread, instead of extents.
    times : Times
        How long all that took; filled in on the way.
    """

    extents: tuple[Extent, ...] = ()
    nbytes: int = 0
    tables: tuple[NDArray[Any], ...] = ()
    fill: Callable[[NDArray[np.uint8]], None] | None = None
    times: Times = field(default_factory=Times)


@dataclass(frozen=True)
class Arrived:
    """A load on the device, valid until the next one is asked for: its bytes and its tables."""

    data: Any
    tables: tuple[Any, ...]


class Direct(Protocol):
    """Reads from disk to device memory; what `read` returns raises DataError by ``.wait()``."""

    def read(self, file: int, offset: int, length: int, target: Any) -> Any:
        """Begin to read."""


@dataclass
class _Slot:
    """Memory, and the events of its last load: every load has its own, for they also tell how long it took."""

    host: NDArray[np.uint8]
    device: Any
    copied: Any
    used: Any


# when a task of a reader thread began, how many seconds of it were reading, and when it ended
_Spent = tuple[float, float, float]


@dataclass
class Ring(Generic[Tag]):
    """Slots, and the threads that fill them.

    Parameters
    ----------
    files : Files
        Where bytes come from.
    slots, nbytes : int
        Number of slots, and bytes of one.
    readers : int
        Reader threads.
    compute : stream
        Where the caller computes with what arrives.
    direct : Direct, optional
        Reads extents to the device without host memory in between.
    """

    files: Files
    slots: int
    nbytes: int
    readers: int
    compute: Any
    direct: Direct | None = None

    def __post_init__(self) -> None:
        import cupy

        self._copy = cupy.cuda.Stream(non_blocking=True)
        self._ring = []
        for _ in range(self.slots):
            host = page_locked(self.nbytes)
            used = _timing_event()
            # nothing is copied before what the caller's streams had under way
            used.record(self.compute)
            self._ring.append(_Slot(host, cupy.empty(self.nbytes, np.uint8), _copied_event(), used))
        self._pool = ThreadPoolExecutor(self.readers, thread_name_prefix="gpuem-read")

    def stream(self, loads: Iterable[tuple[Tag, Load | None]]) -> Iterator[tuple[Tag, Arrived | DataError | None]]:
        """Bring loads to the device, in their order, the next ones read ahead; one such stream at a time.

        Parameters
        ----------
        loads : iterable of (tag, Load or None)
            What to bring; a tag without a load is handed on in its turn.

        Yields
        ------
        tag
            As given.
        arrived : Arrived, DataError or None
            The load, usable on the `compute` stream until the next is asked for; or why it could not be read.
        """
        # a stream before this one may have been left in the middle: its last slot is free when nothing computes
        self.compute.synchronize()
        ahead: deque[tuple[Tag, Load | None, _Slot | None, list[Future[_Spent]]]] = deque()
        taken = 0
        try:
            for tag, load in loads:
                slot = None
                if load is not None:
                    slot = self._ring[taken % self.slots]
                    taken += 1
                ahead.append((tag, load, slot, [] if load is None or slot is None else self._fill(load, slot)))
                # one slot is being computed with, all others are filled
                while sum(item[1] is not None for item in ahead) >= self.slots:
                    yield from self._arrive(*ahead[0])
                    ahead.popleft()
            while ahead:
                yield from self._arrive(*ahead[0])
                ahead.popleft()
        finally:
            # whoever streams next must not find a slot that is still being filled for this one
            wait([task for *_, tasks in ahead for task in tasks if not task.cancel()])

    def close(self) -> None:
        """Stop reading; pieces in work are finished first."""
        self._pool.shutdown(cancel_futures=True)
        self._copy.synchronize()

    def _fill(self, load: Load, slot: _Slot) -> list[Future[_Spent]]:
        """Begin to fill a slot; every task first waits until the slot is free."""
        load.times.asked = time.perf_counter()
        if load.fill is not None:
            return [self._pool.submit(self._fill_by_call, slot, load.fill, load.nbytes)]
        tasks = []
        for extent in load.extents:
            if self.direct is not None:
                tasks.append(self._pool.submit(self._read_directly, slot, extent))
                continue
            for start in range(0, extent.length, PIECE_NBYTES):
                count = min(PIECE_NBYTES, extent.length - start)
                tasks.append(self._pool.submit(self._read, slot, extent, start, count))
        return tasks

    def _read(self, slot: _Slot, extent: Extent, start: int, count: int) -> _Spent:
        slot.copied.synchronize()
        started = time.perf_counter()
        self.files.read_into(
            extent.file, extent.offset + start, slot.host[extent.at + start : extent.at + start + count]
        )
        ended = time.perf_counter()
        return started, ended - started, ended

    def _fill_by_call(self, slot: _Slot, fill: Callable[[NDArray[np.uint8]], None], nbytes: int) -> _Spent:
        slot.copied.synchronize()
        started, before = time.perf_counter(), self.files.read_seconds()
        fill(slot.host[:nbytes])
        return started, self.files.read_seconds() - before, time.perf_counter()

    def _read_directly(self, slot: _Slot, extent: Extent) -> _Spent:
        # reads from the disk are in no stream: the host must see that the slot is free
        slot.used.synchronize()
        assert self.direct is not None
        started = time.perf_counter()
        target = slot.device[extent.at : extent.at + extent.length]
        self.direct.read(extent.file, extent.offset, extent.length, target).wait()
        ended = time.perf_counter()
        return started, ended - started, ended

    def _arrive(
        self, tag: Tag, load: Load | None, slot: _Slot | None, tasks: list[Future[_Spent]]
    ) -> Iterator[tuple[Tag, Arrived | DataError | None]]:
        if load is None or slot is None:
            yield tag, None
            return
        times, failed = load.times, None
        for task in tasks:
            try:
                first, reading, last = task.result()
            except DataError as error:
                failed = failed or error
                continue
            times.reads.append((first, first + reading))
            times.decodes.append((first + reading, last))
        # tables are written here, where all of them are known; the last copy out of this slot is over
        slot.copied.synchronize()
        if failed is not None:
            yield tag, failed
            return
        places = self._place_tables(load, slot)
        first = load.nbytes if self.direct is not None and load.fill is None else 0
        self._copy.wait_event(slot.used)
        end = places[-1][1] if places else load.nbytes
        slot.copied, slot.used = times.copied, times.used = _copied_event(), _timing_event()
        if end > first:
            times.began = _timing_event()
            times.began.record(self._copy)
            slot.device[first:end].data.copy_from_host_async(slot.host[first:].ctypes.data, end - first, self._copy)
        slot.copied.record(self._copy)
        self.compute.wait_event(slot.copied)
        tables = (
            slot.device[a:b].view(table.dtype).reshape(table.shape)
            for (a, b), table in zip(places, load.tables, strict=True)
        )
        yield tag, Arrived(slot.device[: load.nbytes], tuple(tables))
        slot.used.record(self.compute)

    def _place_tables(self, load: Load, slot: _Slot) -> list[tuple[int, int]]:
        """Write the tables behind the data; first and end byte of each."""
        places, at = [], load.nbytes
        for table in load.tables:
            at = -(-at // ALIGNED) * ALIGNED
            slot.host[at : at + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
            places.append((at, at + table.nbytes))
            at += table.nbytes
        return places


def _timing_event() -> Any:
    import cupy

    return cupy.cuda.Event()


def _copied_event() -> Any:
    import cupy

    # readers wait asleep for a slot: spinning ones would take the processors from those that read
    return cupy.cuda.Event(block=True)


def page_locked(nbytes: int) -> NDArray[np.uint8]:
    """Host memory that the GPU reads and writes by itself; raises DeviceError where the system gives none."""
    import cupy

    try:
        return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"{nbytes / 1e6:,.0f} MB of page-locked host memory can't be had ({error}): end what else uses the host's "
            "memory, or raise what the job may lock (ulimit -l, the control group)"
        ) from error


def slot_nbytes(load_nbytes: int, tables: Iterable[int]) -> int:
    """Bytes of a slot for a load and the tables (bytes of each) that go with it."""
    return sum(-(-n // ALIGNED) * ALIGNED for n in (load_nbytes, *tables))
