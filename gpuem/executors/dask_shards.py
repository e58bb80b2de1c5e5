"""What runs on a Dask worker: a job that arrived as bytes, kept as long as its run lasts; shard after shard of it."""

from __future__ import annotations

import os
import pickle
import platform
import queue
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import SchedulerPlugin, WorkerPlugin, get_worker
from numpy.typing import NDArray

from gpuem import backends, engine, identity, recipe, tiles
from gpuem.backends import Weights
from gpuem.engine import Job, Partial, StoppedError
from gpuem.errors import DeviceError, GpuemError, InputError, ReadError
from gpuem.executors import copies, local, memory
from gpuem.executors.dispatch import Task
from gpuem.formats.remote import Url
from gpuem.formats.source import Calls, Resident, Source
from gpuem.identity import version as version
from gpuem.recipe import Run
from gpuem.storage.host import Files

if TYPE_CHECKING:
    from distributed import Scheduler, Worker


@dataclass(frozen=True)
class Parcel:
    """What a worker needs to make the job again."""

    source: Source
    ends: copies.Ends
    weights: tuple[Weights, ...]
    skip: int
    positions: int
    wanted: NDArray[np.uint8] | None
    options: Run


@dataclass(frozen=True)
class Answer:
    """How a worker would run the job.

    Parameters
    ----------
    who : str
        Its machine and process, as the log names it.
    host : str
        Its machine.
    version : str
        Of gpuem.
    device : str
        ``cuda`` or ``cpu``; empty where it can't run the job.
    why : str
        Why it has no GPU, or can't run the job.
    threads : int
        Shards that it runs at once.
    cuts : str
        A checksum of how it cuts the data.
    facts : dict
        Of its device, for the result.
    kind : str
        Name of the error that keeps it from running the job.
    """

    who: str
    host: str
    version: str
    device: str = ""
    why: str = ""
    threads: int = 0
    cuts: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    kind: str = ""


def pack(job: Job, options: Run) -> bytes:
    """A job as bytes.

    Raises
    ------
    InputError
        The data lies in this process.
    """
    for piece in job.source.pieces:
        if isinstance(piece.layout, Resident):
            raise InputError("the data lies on the GPU of this process, which workers don't see: open the file itself")
        if isinstance(piece.layout, Calls) and not job.source.files:
            raise InputError(
                "the data is an array in this process, which workers don't see: save it (.npy) and open the file"
            )
    wanted = None if job.wanted.all() else np.packbits(job.wanted)
    ends = copies.ends(job.source, job.files)
    # workers have a current folder of their own
    files = tuple(f if isinstance(f.path, Url) else replace(f, path=f.path.absolute()) for f in job.source.files)
    source = replace(job.source, files=files)
    return pickle.dumps(Parcel(source, ends, job.weights, job.skip, job.wanted.size, wanted, options))


def who(worker: Worker) -> str:
    """The machine and the process of a worker; threads that are workers are told apart by a number."""
    _, thread, number = worker.address.partition("inproc://")
    return f"{platform.node()}:{os.getpid()}" + (f".{number.rpartition('/')[2]}" if thread else "")


class Hands(WorkerPlugin):
    """A plugin: every worker, also one that comes later, gets the job, and lets go of it at the end.

    Parameters
    ----------
    run : str
        Name of the run.
    parcel : bytes
        What `pack` made; it is unpacked when the worker is asked for its plan.
    own : bool
        Whether workers were started for this run alone, by the process that sends them the job.
    """

    def __init__(self, run: str, parcel: bytes, *, own: bool = False) -> None:
        self.run, self.parcel, self.own = run, parcel, own

    def setup(self, worker: Worker) -> None:
        """Take the job."""
        self._who = who(worker)
        if self.own and worker.nanny and threading.current_thread() is threading.main_thread():
            # a terminal sends Ctrl-C to all; who started them ends them
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._job: Job | None = None
        self._session: Any = None
        self._open = ExitStack()
        # two locks: planning doesn't wait for what is in work on the GPU
        self._planning, self._device = threading.Lock(), threading.Lock()
        self._places: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._over = threading.Event()

    def teardown(self, worker: Worker) -> None:
        """Close its files, free its buffers, as soon as the shard in work has noticed."""
        self._over.set()
        if self._job is not None:
            self._job.stop.set()
        threading.Thread(target=self._close, name="gpuem-closing", daemon=True).start()

    def settle(self, threads: int, neighbours: int) -> Job:
        """Plan the job for this worker, beside so many others on its machine."""
        with self._planning:
            if self._job is None:
                self._job = unpacked(pickle.loads(self.parcel), threads, neighbours)
                for place in range(self.at_once):
                    self._places.put(place)
            return self._job

    @property
    def at_once(self) -> int:
        """Shards that this worker runs at once."""
        assert self._job is not None
        return 1 if self._job.backend.NAME == "cuda" else self._job.plan.threads

    def work(self, tasks: list[Task]) -> list[Partial | BaseException]:
        """Run shards one after another; what came of each. What a failure kept from being run is left out."""
        place = self._places.get()
        partials: list[Partial] = []
        failed: list[BaseException] = []
        try:
            for partial in self._partials(tasks):
                partials.append(replace(partial, worker=f"{self._who}:{place}"))  # noqa: PERF401
        except BaseException as error:  # noqa: BLE001 - it belongs to one shard; who hands them out decides what it means
            if isinstance(error, ReadError) and self._job is not None:
                self._job.files.reopen()
            failed.append(sendable(error))
        finally:
            self._places.put(place)
        return [*(engine.folded(self._job, partials) if self._job is not None else ()), *failed]

    def _partials(self, tasks: list[Task]) -> Iterator[Partial]:
        job = self._job
        assert job is not None
        if job.backend.NAME != "cuda":
            for task in tasks:
                yield engine.run_shard(job, task.shard, last_try=task.last_try)
            return
        # shards of one kind in one stretch: between stretches the device stands still
        first = 0
        for k, task in enumerate(tasks):
            if k + 1 == len(tasks) or tasks[k + 1].last_try != task.last_try:
                yield from self._on_device(job, [t.shard for t in tasks[first : k + 1]], task.last_try)
                first = k + 1

    def _on_device(self, job: Job, shards: list[int], last_try: bool) -> Iterator[Partial]:
        """Shards on the GPU of this worker; buffers and kernels stay for the next ones."""
        from gpuem import stream

        with self._device:
            try:
                if self._over.is_set():
                    raise StoppedError
                if self._session is None:
                    self._session = self._open.enter_context(stream.session(job))
                yield from stream.run(job, shards, self._session, last_try=last_try)
            except BaseException:
                # after an error nothing on the device is to be trusted
                self._session = None
                self._open.close()
                raise

    def _close(self) -> None:
        with self._device:
            self._session = None
            self._open.close()
        if self._job is not None:
            self._job.files.close()


class Farewell(SchedulerPlugin):
    """A plugin of the scheduler: when a client is gone, however it ended, workers let go of its job."""

    def __init__(self, client: str, run: str) -> None:
        self.client, self.run = client, run

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Called for every client that goes."""
        if client == self.client:
            scheduler.loop.add_callback(self._let_go, scheduler)

    async def _let_go(self, scheduler: Scheduler) -> None:
        if self.run in scheduler.worker_plugins:
            await scheduler.unregister_worker_plugin(comm=None, name=self.run)
        if f"{self.run}-farewell" in scheduler.plugins:
            scheduler.remove_plugin(f"{self.run}-farewell")


def plan(run: str, neighbours: int) -> Answer:
    """How this worker would run the job."""
    from gpuem.backends import cuda_device

    worker = get_worker()
    here = Answer(who(worker), platform.node(), version())
    hands: Hands | None = worker.plugins.get(run)
    try:
        if hands is None:
            raise DeviceError("it has not got the job")
        job = hands.settle(worker.state.nthreads, neighbours)
    except GpuemError as error:
        return replace(here, why=str(error), kind=type(error).__name__)
    device = job.backend.NAME
    return replace(
        here, device=device, why="" if device == "cuda" else cuda_device.why_not(), threads=hands.at_once,
        cuts=str(identity.of_cuts(job)), facts=_facts(job),
    )  # fmt: skip


def cuts(run: str) -> tuple[tuple[tiles.Shard, ...], tuple[tuple[int, ...], ...]]:
    """How this worker, which was asked for its plan, cuts the data."""
    job = _hands(run).settle(1, 1)
    return job.plan.shards, job.plan.tiles


def work(run: str, tasks: list[Task]) -> list[Partial | BaseException]:
    """Run shards on this worker; see `Hands.work`."""
    return _hands(run).work(tasks)


def _hands(run: str) -> Hands:
    hands: Hands | None = get_worker().plugins.get(run)
    if hands is None:
        raise DeviceError(f"this worker has not got the job of {run}, or the run is over")
    return hands


def unpacked(parcel: Parcel, threads: int, neighbours: int) -> Job:
    """The job, planned for so many threads of a worker that shares its machine with others."""
    options = parcel.options
    source = copies.found_here(parcel.source, parcel.ends, platform.node())
    backend = backends.select(options.device)
    if backend.NAME == "cuda":
        # they read for the GPU
        threads = options.threads or max(1, local.cpus() // neighbours)
    prepared = backend.prepare(sum(parcel.weights, Weights()), source.frame_shape, source.dtype)
    allowed = memory.available_memory(neighbours)
    if options.memory is not None:
        allowed = recipe.parse_memory(options.memory)
    on_device = None
    if options.device_memory is not None:
        on_device = recipe.parse_memory(options.device_memory, "device_memory")
    # maps are made where results are combined
    limits = tiles.Limits(0, 0, threads, allowed, on_device, 0)
    wanted = np.ones(parcel.positions, np.bool_)
    if parcel.wanted is not None:
        wanted = np.unpackbits(parcel.wanted, count=parcel.positions).astype(np.bool_)
    return Job(
        source, Files(source.files), backend.plan(source, prepared, limits), backend, parcel.weights, prepared,
        parcel.skip, wanted, options.on_error, transfer=options.transfer, patience=options.patience,
    )  # fmt: skip


def sendable(error: BaseException) -> BaseException:
    """An error as it can travel: what can't be pickled travels as its words; what nobody expected tells its place."""
    if isinstance(error, StoppedError):
        return DeviceError("the run was ended on this worker")
    if not isinstance(error, GpuemError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - whatever keeps it from travelling
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _facts(job: Job) -> dict[str, Any]:
    """Of the device, as results of one GPU have them."""
    if job.backend.NAME != "cuda":
        return {}
    from dataclasses import asdict

    from gpuem.backends import cuda_device, cuda_plan

    kind, why = cuda_plan.way(job.source, job.transfer)
    return {
        "gpu": asdict(cuda_device.gpu()),
        "transfer": {"kind": kind, "reason": why},
        "device_bytes": job.plan.device_nbytes,
    }
