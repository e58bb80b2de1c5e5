"""A GPU that isn't there: streams that run as late as they may, memory that is counted and spoiled.

Nothing of CuPy's shape is in here: operations in queues, what must run before what, which memory they touch.
"""

from __future__ import annotations

import ctypes
import random
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FRESH, FREED = 0xCB, 0xDD
ALIGNED = 512  # what CuPy's pool hands out begins, and is counted, in steps of this many bytes
DRIVER_ERRORS = {
    1: ("InvalidValue", "INVALID_VALUE", "invalid argument"),
    2: ("MemoryAllocation", "OUT_OF_MEMORY", "out of memory"),
    35: (
        "InsufficientDriver",
        "SYSTEM_DRIVER_MISMATCH",
        "CUDA driver version is insufficient for CUDA runtime version",
    ),
    100: ("NoDevice", "NO_DEVICE", "no CUDA-capable device is detected"),
    209: ("NoKernelImageForDevice", "NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"),
    400: ("InvalidResourceHandle", "INVALID_HANDLE", "invalid resource handle"),
    500: ("SymbolNotFound", "NOT_FOUND", "named symbol not found"),
    600: ("NotReady", "NOT_READY", "device not ready"),
    700: ("IllegalAddress", "ILLEGAL_ADDRESS", "an illegal memory access was encountered"),
}
_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


class CUDARuntimeError(RuntimeError):
    """An error of the runtime; `status` is its number."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"cudaError{DRIVER_ERRORS[status][0]}: {DRIVER_ERRORS[status][2]}")


class CUDADriverError(RuntimeError):
    """An error of the driver; `status` is its number."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"CUDA_ERROR_{DRIVER_ERRORS[status][1]}: {DRIVER_ERRORS[status][2]}")


class OutOfMemoryError(MemoryError):
    """More device memory was asked for than there is."""

    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        allowed = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes{allowed}).")


class Storage:
    """Bytes that begin as garbage and live for as long as anything, also a queued operation, may touch them."""

    def __init__(self, nbytes: int) -> None:
        address = ctypes.c_void_p()
        # exactly as long as asked for: under a sanitizer the next byte is forbidden
        if _libc.posix_memalign(ctypes.byref(address), ctypes.c_size_t(ALIGNED), ctypes.c_size_t(nbytes)):
            raise MemoryError(f"the host has no {nbytes} bytes for the stand-in")
        self.nbytes, self.address = nbytes, address.value or 0
        self.fill(FRESH)
        weakref.finalize(self, _libc.free, address).atexit = False

    def fill(self, value: int) -> None:
        ctypes.memset(self.address, value, self.nbytes)

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.nbytes


@dataclass(eq=False)
class Recording:
    """One record of an event: done when its queue has come so far, at a time of `time.perf_counter`."""

    queue: Queue
    done: bool = False
    at: float = 0.0


@dataclass(eq=False)
class Operation:
    """Work in a queue: what it does, which memory that touches, what it waits for or marks as done."""

    work: Callable[[], None] | None = None
    touches: tuple[Storage, ...] = ()
    waits_for: Recording | None = None
    marks: Recording | None = None


@dataclass(eq=False)
class Queue:
    """What a stream has still to do, in order."""

    number: int
    operations: deque[Operation] = field(default_factory=deque)


class Device:
    """A device with its knobs.

    Parameters
    ----------
    schedule : str
        When queued operations run. "late": when something waits for them; "early": at once; "random(seed)": some of
        them, at every call.
    order : str
        The order of threads in kernels; see `emulation.build`. With a random schedule every launch draws its own.
    memory_nbytes : int
        Device memory; more is an OutOfMemoryError.
    compute_capability, multiprocessors, devices
        What the device says about itself.
    driver_error : int
        35: no driver; 100: no device. Every call then raises CUDARuntimeError, as CuPy does.
    """

    def __init__(
        self,
        schedule: str = "late",
        *,
        order: str = "ascending",
        memory_nbytes: int = 1 << 32,
        compute_capability: str = "90",
        multiprocessors: int = 4,
        devices: int = 1,
        driver_error: int = 0,
    ) -> None:
        drawn = re.fullmatch(r"late|early|random\((\d+)\)", schedule)
        if not drawn:
            raise ValueError(f"schedule {schedule!r}: late, early or random(seed)")
        self.schedule, self.order, self.memory_nbytes = schedule, order, memory_nbytes
        self.compute_capability, self.multiprocessors = compute_capability, multiprocessors
        self.devices, self.driver_error = devices, driver_error
        self.random = random.Random(int(drawn[1])) if drawn[1] else None
        self.live_bytes = self.peak_bytes = self.pool_bytes = self.pinned_bytes = self.peak_pinned_bytes = 0
        self.launches: list[str] = []
        self.pageable_bytes = 0  # copied "asynchronously" from or to memory that isn't pinned
        self._failing_allocations: dict[int, None] = {}
        self._failing_launch: tuple[int, int] | None = None
        self._allocations = 0
        self._lock = threading.RLock()
        self._depth = 0
        self._dead: deque[tuple[Storage, Queue | None, int]] = deque()
        self._pinned: weakref.WeakSet[Storage] = weakref.WeakSet()
        self.queues: list[Queue] = []
        self.null_queue = self.new_queue()

    # ---- knobs for failures

    def fail_allocation(self, after: int = 0) -> None:
        """Raise OutOfMemoryError at an allocation of device memory: the next one, or `after` more."""
        self._failing_allocations[self._allocations + after] = None

    def fail_launch(self, after: int = 0, status: int = 700) -> None:
        """Raise CUDADriverError at a launch: the next one, or `after` more; 700 is ILLEGAL_ADDRESS."""
        self._failing_launch = (len(self.launches) + after, status)

    def require(self) -> None:
        """Raise what every call raises where there is no driver or no device."""
        if self.driver_error:
            raise CUDARuntimeError(self.driver_error)

    def note_launch(self, name: str) -> None:
        self.launches.append(name)
        if self._failing_launch and self._failing_launch[0] == len(self.launches) - 1:
            raise CUDADriverError(self._failing_launch[1])

    # ---- streams

    def new_queue(self) -> Queue:
        with self.locked():
            self.queues.append(Queue(len(self.queues)))
            return self.queues[-1]

    def enqueue(self, queue: Queue, operation: Operation) -> None:
        with self.locked():
            queue.operations.append(operation)
            if self.schedule == "early":
                self.drain(queue)
            self.wander()

    def record(self, queue: Queue) -> Recording:
        recording = Recording(queue)
        self.enqueue(queue, Operation(marks=recording))
        return recording

    def wander(self) -> None:
        """With a random schedule: run some operations of some streams."""
        if self.random is None:
            return
        with self.locked():
            for queue in self.random.sample(self.queues, len(self.queues)):
                for _ in range(self.random.choice((0, 0, 1, 3))):
                    self._step(queue)

    def drain(self, queue: Queue, until: Recording | None = None) -> None:
        """Run a queue to its end, or until a recording is done."""
        with self.locked():
            while queue.operations and not (until and until.done):
                self._step(queue)

    def synchronize(self) -> None:
        with self.locked():
            for queue in self.queues:
                self.drain(queue)

    def _step(self, queue: Queue) -> None:
        if not queue.operations:
            return
        operation = queue.operations.popleft()
        if operation.waits_for and not operation.waits_for.done:
            self.drain(operation.waits_for.queue, operation.waits_for)
        if operation.work:
            operation.work()
        if operation.marks:
            operation.marks.done, operation.marks.at = True, time.perf_counter()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One thread at a time; what died meanwhile is seen to at the outermost entry and exit."""
        with self._lock:
            self._depth += 1
            try:
                if self._depth == 1:
                    self._bury()
                yield
                if self._depth == 1:
                    self._bury()
            finally:
                self._depth -= 1

    # ---- memory

    def allocate(self, nbytes: int) -> Storage:
        """Device memory, counted; the caller says when its last owner dies: `free`."""
        self.require()
        self.wander()
        with self.locked():
            number, self._allocations = self._allocations, self._allocations + 1
            size = -(-nbytes // ALIGNED) * ALIGNED
            if number in self._failing_allocations or self.live_bytes + size > self.memory_nbytes:
                raise OutOfMemoryError(size, self.live_bytes, self.memory_nbytes)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.pool_bytes = max(self.pool_bytes, self.live_bytes)
            return Storage(nbytes)

    def allocate_pinned(self, nbytes: int) -> Storage:
        self.require()
        with self.locked():
            storage = Storage(nbytes)
            self._pinned.add(storage)
            self.pinned_bytes += nbytes
            self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
            return storage

    def pinned(self, address: int, nbytes: int) -> Storage | None:
        """The pinned memory at an address; None where it isn't pinned."""
        with self.locked():
            for storage in self._pinned:
                if storage.holds(address):
                    if address + nbytes > storage.address + storage.nbytes:
                        raise CUDARuntimeError(1)
                    return storage
        return None

    def free(self, storage: Storage, queue: Queue | None) -> None:
        """The last owner died. `queue` is where the memory was allocated; None for pinned memory.

        Called by the garbage collector, at any moment: noted only, and done when it may be.
        """
        self._dead.append((storage, queue, storage.nbytes))
        if self._lock.acquire(blocking=False):
            try:
                if self._depth == 0:
                    with self.locked():
                        pass
            finally:
                self._lock.release()

    def free_pool(self) -> None:
        with self.locked():
            self.pool_bytes = self.live_bytes

    def _bury(self) -> None:
        while self._dead:
            storage, queue, nbytes = self._dead.popleft()
            if queue is None:
                self.pinned_bytes -= nbytes
            else:
                self.live_bytes -= -(-nbytes // ALIGNED) * ALIGNED
            pending = {o for q in self.queues for o in q.operations if storage in o.touches}
            # the pool hands the memory out again at once, but only to the stream in which it was allocated: what
            # must run before that stream's next operation is safe, all else finds garbage
            if queue is not None and pending <= _ordered_before_end(queue):
                if pending:
                    queue.operations.append(Operation(lambda s=storage: s.fill(FREED), (storage,)))
            elif pending:
                storage.fill(FREED)


def _ordered_before_end(queue: Queue) -> set[Operation]:
    """Queued operations that will have run when a stream comes to the end of its queue."""
    found: set[Operation] = set()
    seen: set[Recording] = set()
    rest: list[Iterable[Operation]] = [queue.operations]
    while rest:
        for operation in rest.pop():
            found.add(operation)
            recording = operation.waits_for
            if recording and not recording.done and recording not in seen:
                seen.add(recording)
                rest.append(_until(recording))
    return found


def _until(recording: Recording) -> Iterator[Operation]:
    for operation in recording.queue.operations:
        yield operation
        if operation.marks is recording:
            return
