"""What runs on a Dask worker: a job that arrived as bytes, kept as long as its run lasts; and one shard after another."""

from __future__ import annotations

import pickle
import platform
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import WorkerPlugin, get_worker
from numpy.typing import NDArray

from gpuem import backends, engine, identity, recipe, tiles
from gpuem.backends import Weights
from gpuem.engine import Job, Partial, StoppedError
from gpuem.errors import InputError, ReadError, ResumableError
from gpuem.executors import local
from gpuem.executors.dispatch import Task
from gpuem.formats.source import Calls, Source
from gpuem.recipe import Run
from gpuem.storage.host import Files

if TYPE_CHECKING:
    from distributed import Scheduler, Worker


@dataclass(frozen=True)
class Parcel:
    """What a worker needs to make the job again."""

    source: Source
    weights: tuple[Weights, ...]
    skip: int
    positions: int
    wanted: NDArray[np.uint8] | None
    options: Run


@dataclass(frozen=True)
class Post:
    """A job on its way: the name of its run, and its bytes."""

    run: str
    parcel: bytes


@dataclass(frozen=True)
class Answer:
    """How a worker would run the job.

    Parameters
    ----------
    who : str
        Host and name of the worker.
    device : str
        ``cuda`` or ``cpu``.
    no_gpu : str
        Why it has no GPU.
    shards, tiles : tuple
        Its cuts.
    cuts : str
        A checksum of them.
    facts : dict
        Of its device, for the result.
    """

    who: str
    device: str
    no_gpu: str
    shards: tuple[tiles.Shard, ...]
    tiles: tuple[tuple[int, ...], ...]
    cuts: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Kept:
    """A job on this worker, and what it holds open."""

    post: Post
    job: Job | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    open: ExitStack = field(default_factory=ExitStack)
    session: Any = None


# of the runs that this worker process works on
_runs: dict[str, _Kept] = {}


def pack(job: Job, options: Run) -> bytes:
    """A job as bytes.

    Raises
    ------
    InputError
        The data lies in this process.
    """
    if any(isinstance(piece.layout, Calls) for piece in job.source.pieces) and not job.source.files:
        raise InputError(
            "the data is an array in this process, which workers don't see: save it (.npy) and open the file"
        )
    wanted = None if job.wanted.all() else np.packbits(job.wanted)
    return pickle.dumps(Parcel(job.source, job.weights, job.skip, job.wanted.size, wanted, options))


class Hands(WorkerPlugin):
    """A plugin: every worker, also one that comes later, gets the job, and lets go of it at the end."""

    def __init__(self, post: Post) -> None:
        self.post = post

    def setup(self, worker: Worker) -> None:
        """Take the job; it is unpacked when the first shard comes."""
        _runs[self.post.run] = _Kept(self.post)

    def teardown(self, worker: Worker) -> None:
        """Close its files, free its buffers."""
        kept = _runs.pop(self.post.run, None)
        if kept is not None and kept.job is not None:
            kept.job.stop.set()
            kept.open.close()


def workers_there(dask_scheduler: Scheduler) -> dict[str, tuple[str, str, int]]:
    """Name, host and threads of all workers that answer, by address."""
    return {
        address: (str(state.name), str(state.extra.get("gpuem_host", state.host)), state.nthreads)
        for address, state in dask_scheduler.workers.items()
        if state.status.name == "running"
    }


def plan(run: str, dask_worker: Worker) -> Answer:
    """How this worker would run the job."""
    from gpuem.backends import cuda_device

    job = _job(_kept(run), dask_worker.state.nthreads)
    no_gpu = "" if job.backend.NAME == "cuda" else cuda_device.why_not() or ""
    facts = {"gpu": _gpu()} if job.backend.NAME == "cuda" else {}
    digest = str(identity.of_cuts(job))
    who = f"{platform.node()}:{dask_worker.name}"
    return Answer(who, job.backend.NAME, no_gpu, job.plan.shards, job.plan.tiles, digest, facts)


def work(run: str, tasks: list[Task]) -> list[Partial | BaseException]:
    """Run shards one after another; what came of each. What a failure kept from being run is left out."""
    kept = _kept(run)
    job = _job(kept, get_worker().state.nthreads)
    outcomes: list[Partial | BaseException] = []
    try:
        if job.backend.NAME == "cuda" and not any(task.last_try for task in tasks):
            outcomes += _on_device(kept, job, [task.shard for task in tasks])
        else:
            for task in tasks:
                outcomes.append(engine.run_shard(job, task.shard, last_try=task.last_try))  # noqa: PERF401
    except StoppedError:
        raise ResumableError("the run was ended") from None
    except BaseException as error:  # noqa: BLE001 - it belongs to one shard; who hands them out decides what it means
        if isinstance(error, ReadError):
            job.files.reopen()
        outcomes.append(error)
    return outcomes


def _on_device(kept: _Kept, job: Job, shards: list[int]) -> Iterator[Partial]:
    """Shards on the GPU of this worker; buffers and kernels stay for the next ones."""
    from gpuem import stream

    with kept.lock:
        try:
            if kept.session is None:
                kept.session = kept.open.enter_context(stream.session(job))
            yield from stream.run(job, shards, kept.session)
        except BaseException:
            # after an error nothing on the device is to be trusted
            kept.session = None
            kept.open.close()
            raise


def _kept(run: str) -> _Kept:
    if run not in _runs:
        raise ResumableError(f"the run {run} is over, or this worker joined without its job")
    return _runs[run]


def _job(kept: _Kept, threads: int) -> Job:
    """The job of a run on this worker, planned for it."""
    with kept.lock:
        if kept.job is None:
            kept.job = _unpacked(pickle.loads(kept.post.parcel), threads)
        return kept.job


def _unpacked(parcel: Parcel, threads: int) -> Job:
    options, source = parcel.options, parcel.source
    backend = backends.select(options.device)
    prepared = backend.prepare(sum(parcel.weights, Weights()), source.frame_shape, source.dtype)
    allowed = recipe.parse_memory(options.memory) if options.memory is not None else local.available_memory()
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


def _gpu() -> dict[str, Any]:
    from dataclasses import asdict

    from gpuem.backends import cuda_device

    return asdict(cuda_device.gpu())


def near(job: Job) -> dict[int, frozenset[str]]:
    """Hosts that hold the data of each shard, where the user said so."""
    return {}
