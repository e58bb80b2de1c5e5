"""Shards on Dask workers: those of a scheduler that is there, or started here, one per GPU or on the processors.

Dask brings shards to workers and results back, notices workers that come and go, and starts them again. Which worker
gets which shard next is decided here (`gpuem.executors.dispatch`), so that retries, hanging reads and nearness are the
same everywhere. Results are small: they travel over plain TCP to the process that combines them.
"""

from __future__ import annotations

import logging
import queue
import statistics
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Future, KilledWorker, LocalCluster

from gpuem.engine import Job, Partial, in_order
from gpuem.errors import DeviceError, ResumableError
from gpuem.executors import dask_shards, local
from gpuem.executors.dispatch import Dispatch, Report, Task
from gpuem.executors.dask_shards import Answer, Post
from gpuem.recipe import Run

log = logging.getLogger("gpuem")
# shards that wait at a worker while others are in work there: it must not wait for the network
WAITING = 1
# a task takes at least so many seconds where shards are quick: handing one out costs about one thousandth of that
TASK_SECONDS = 0.2
# shards of a task at most
MOST_SHARDS = 32
# how often workers that came or went are looked for, in seconds
LOOK = 1.0
# nobody is there to work, for so long: the run ends
ALONE = 60.0
# results are small, so nothing is spilled to disk; a worker that doesn't answer is given up soon
SETTINGS: dict[str, Any] = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.scheduler.worker-ttl": "60s",
    "distributed.comm.timeouts.connect": "30s",
    "distributed.comm.timeouts.tcp": "30s",
    "distributed.scheduler.allowed-failures": 100,
    "distributed.scheduler.work-stealing": False,
    "distributed.admin.tick.limit": "60s",
}


Ended = queue.SimpleQueue[tuple[str, Future]]


@dataclass
class Worker:
    """A Dask worker as this process sees it."""

    address: str
    name: str
    host: str
    threads: int
    under_way: dict[Future, list[Task]] = field(default_factory=dict)


@contextmanager
def crew(options: Run) -> Iterator[DaskCrew]:
    """The workers that ``[run]`` names or wants started.

    Raises
    ------
    ResumableError
        The scheduler doesn't answer, or no worker comes.
    DeviceError
        GPUs are wanted and can't be had.
    """
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        if options.scheduler is not None:
            client = _connect(options.scheduler, options.patience)
        else:
            cluster = stack.enter_context(_cluster(options))
            client = Client(cluster, set_as_default=False)
        stack.callback(_close, client)
        yield DaskCrew(client, options)


def _connect(scheduler: str, patience: float) -> Client:
    where = {"address": scheduler} if "://" in scheduler else {"scheduler_file": scheduler}
    started = time.monotonic()
    # a job's scheduler may come up a little later than this
    while "scheduler_file" in where and not Path(scheduler).exists():
        if time.monotonic() - started > patience:
            raise ResumableError(
                f"scheduler {scheduler}: no such file after {patience:.0f} s; is the scheduler running?"
            )
        time.sleep(0.2)
    try:
        return Client(**where, timeout=max(patience, 5.0), set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ResumableError(f"scheduler {scheduler}: doesn't answer: {error}") from error


@contextmanager
def _cluster(options: Run) -> Iterator[LocalCluster]:
    """Workers on this machine, started now and ended with the context."""
    from gpuem.backends import cuda_device

    reason = cuda_device.why_not() if options.device != "cpu" else "device is cpu"
    quiet: dict[str, Any] = {"dashboard_address": None, "silence_logs": logging.ERROR}
    if not reason:
        try:
            from dask_cuda import LocalCUDACluster
        except ImportError as error:
            raise DeviceError(
                f"[run] workers with GPUs need dask-cuda ({error}): pip install 'gpuem[dask-cuda13]', or leave workers "
                "out for one GPU"
            ) from error
        count = None if options.workers == "all" else options.workers
        with LocalCUDACluster(n_workers=count, threads_per_worker=1, device_memory_limit=None, **quiet) as cluster:
            yield cluster
        return
    if options.device == "cuda":
        raise DeviceError(f'device = "cuda": {reason}')
    cpus = options.threads or local.cpus()
    count = cpus if options.workers == "all" else int(options.workers or 1)
    threads = max(1, cpus // count)
    with LocalCluster(
        n_workers=count, threads_per_worker=threads, processes=True, memory_limit=None, host="127.0.0.1", **quiet
    ) as made:
        yield made


def _close(client: Client) -> None:
    try:
        client.close(timeout=5)
    except (OSError, TimeoutError, RuntimeError) as error:
        log.debug("closing the Dask client: %s", error)


class DaskCrew:
    """Dask workers.

    Parameters
    ----------
    client : distributed.Client
        The connection to their scheduler.
    options : Run
        What ``[run]`` says.
    """

    name = "dask"

    def __init__(self, client: Client, options: Run) -> None:
        self.client, self.options = client, options
        self._run = f"gpuem-{uuid.uuid4().hex[:12]}"
        self._workers: dict[str, Worker] = {}
        self._gone_since: float | None = None
        self._seconds: deque[float] = deque(maxlen=100)

    def workers(self, job: Job) -> int:
        """How many shards are in work at once."""
        return sum(worker.threads for worker in self._workers.values())

    def settle(self, job: Job) -> Job:
        """Send the job to all workers; they plan it, and must agree.

        Raises
        ------
        DeviceError
            Workers see no GPU though one is wanted, or some do and others don't; by name.
        PlanError
            It doesn't fit into a worker's memory.
        """
        post = Post(self._run, dask_shards.pack(job, self.options))
        self.client.register_plugin(dask_shards.Hands(post), name=self._run)
        self._look(first=True)
        answers: dict[str, Answer] = self.client.run(dask_shards.plan, self._run)
        self._refuse_without_gpu(answers)
        first = next(iter(answers.values()))
        for address, answer in answers.items():
            if answer.cuts != first.cuts:
                raise DeviceError(f"{answer.who}: cuts the data otherwise than {first.who}; they run other versions")
            log.debug("%s: %s", address, answer.who)
        plan = replace(job.plan, shards=first.shards, tiles=first.tiles)
        job.facts.update(device=first.device, workers=len(answers), **first.facts)
        return replace(job, plan=plan)

    def run(self, job: Job, shards: Iterable[int], report: Report) -> Generator[Partial]:
        """Run shards on the workers, yield their results as they end.

        Raises
        ------
        ResumableError
            The scheduler is lost, nobody is left to work, or what failed may pass.
        """
        dispatch = Dispatch(
            shards,
            ahead=4 * self.workers(job) + 4 if in_order(job) else None,
            patience=job.patience,
            mask=job.on_error == "mask",
            near=dask_shards.near(job),
            report=report,
        )
        ended: Ended = queue.SimpleQueue()
        for worker in self._workers.values():
            report("joined", worker=worker.name)
        looked = 0.0
        try:
            left = dispatch.count
            while left:
                now = time.monotonic()
                if now - looked > LOOK:
                    self._look(dispatch, report)
                    looked = now
                self._hand_out(dispatch, ended)
                for address, future in _drained(ended, dispatch.pause(now)):
                    for partial in self._outcomes(dispatch, address, future, report):
                        left -= 1
                        yield partial
                    self._hand_out(dispatch, ended)
        finally:
            self._forget()

    def _hand_out(self, dispatch: Dispatch, ended: Ended) -> None:
        """Give every worker as many shards as it has room for, one task each in turn."""
        hungry = deque(self._workers.values())
        while hungry:
            worker = hungry.popleft()
            if len(worker.under_way) >= worker.threads + WAITING:
                continue
            taken = (
                dispatch.take(worker.address, time.monotonic(), worker.host) for _ in range(self._at_once(dispatch))
            )
            tasks = [task for task in taken if task is not None]
            if not tasks:
                continue
            key = f"{self._run}-{tasks[0].shard}-{uuid.uuid4().hex[:8]}"
            future = self.client.submit(
                dask_shards.work, self._run, tasks, key=key, workers=[worker.address], pure=False
            )
            worker.under_way[future] = tasks
            future.add_done_callback(lambda done, address=worker.address: ended.put((address, done)))
            hungry.append(worker)

    def _at_once(self, dispatch: Dispatch) -> int:
        """How many shards make a task: few at the end, so that all workers end together."""
        if not self._seconds:
            return 1
        quick = int(TASK_SECONDS / max(statistics.median(self._seconds), 1e-4))
        places = sum(worker.threads + WAITING for worker in self._workers.values())
        return max(1, min(quick, MOST_SHARDS, dispatch.waiting // (4 * max(places, 1))))

    def _outcomes(self, dispatch: Dispatch, address: str, future: Future, report: Report) -> Iterator[Partial]:
        """The results of a task; what failed is run again, or raises."""
        worker = self._workers.get(address)
        tasks = worker.under_way.pop(future, None) if worker else None
        if worker is None or tasks is None:
            return
        now = time.monotonic()
        if future.status != "finished":
            self._unfinished(dispatch, worker, future, tasks, report)
            return
        outcomes: list[Partial | BaseException] = future.result()
        dispatch.give_back([task.shard for task in tasks[len(outcomes) :]], address)
        for task, outcome in zip(tasks, outcomes, strict=False):
            if isinstance(outcome, BaseException):
                dispatch.failed(task.shard, address, outcome, now)
            elif dispatch.done(task.shard, address, now):
                self._seconds.append(outcome.ended - outcome.began)
                yield outcome

    def _unfinished(
        self, dispatch: Dispatch, worker: Worker, future: Future, tasks: list[Task], report: Report
    ) -> None:
        """A task without results: the scheduler forgot it, its worker died, or it could not even begin."""
        if future.status == "error":
            error = future.exception()
            if not isinstance(error, KilledWorker):
                dispatch.give_back([task.shard for task in tasks[1:]], worker.address)
                dispatch.failed(tasks[0].shard, worker.address, error, time.monotonic())
                return
        worker.under_way[future] = tasks
        self._look(dispatch, report)
        if worker.address in self._workers:
            del worker.under_way[future]
            dispatch.give_back([task.shard for task in tasks], worker.address)

    def _look(self, dispatch: Dispatch | None = None, report: Report | None = None, *, first: bool = False) -> None:
        """Find out which workers are there; those that went leave their shards to others."""
        if first:
            self._wait_for_workers()
        try:
            there = self.client.run_on_scheduler(dask_shards.workers_there)
        except (OSError, TimeoutError, RuntimeError) as error:
            raise ResumableError(f"the Dask scheduler is lost: {error}") from error
        for address in [address for address in self._workers if address not in there]:
            self._gone(self._workers[address], dispatch, "it doesn't answer any more")
        for address, (name, host, threads) in there.items():
            if address not in self._workers:
                self._workers[address] = Worker(address, name, host, threads)
                if report:
                    report("joined", worker=name)
        self._refuse_alone()

    def _gone(self, worker: Worker, dispatch: Dispatch | None, why: str) -> None:
        self._workers.pop(worker.address, None)
        for future in worker.under_way:
            future.cancel(force=True)
        if dispatch is not None:
            dispatch.lost(worker.address, time.monotonic(), why)

    def _refuse_alone(self) -> None:
        """Nobody left: wait a while for workers that are started again, then end."""
        if self._workers:
            self._gone_since = None
            return
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        if now - self._gone_since > ALONE:
            raise ResumableError(f"all Dask workers are gone for {ALONE:.0f} s")

    def _wait_for_workers(self) -> None:
        wanted = self.options.workers if isinstance(self.options.workers, int) else 1
        try:
            self.client.wait_for_workers(wanted, timeout=max(self.options.patience, 10.0))
        except (TimeoutError, OSError) as error:
            raise ResumableError(
                f"{wanted} Dask worker{'s' if wanted > 1 else ''} wanted, not there after {self.options.patience:.0f} s "
                "(patience); look at the workers' logs"
            ) from error

    def _refuse_without_gpu(self, answers: dict[str, Answer]) -> None:
        without = [f"{answer.who} ({answer.no_gpu})" for answer in answers.values() if answer.device != "cuda"]
        wanted = self.options.device == "cuda" or 0 < len(without) < len(answers)
        if without and wanted and self.options.device != "cpu":
            more = f" and {len(without) - 8} more" if len(without) > 8 else ""
            hint = "" if self.options.device == "cuda" else '; device = "cpu" uses none of the GPUs'
            raise DeviceError(
                f"{len(without)} of {len(answers)} workers see no GPU: {', '.join(without[:8])}{more}. "
                f"Start them with one (dask cuda worker){hint}"
            )

    def _forget(self) -> None:
        """Take back what is under way, and let the workers close files and free memory."""
        for worker in self._workers.values():
            for future in worker.under_way:
                future.cancel(force=True)
            worker.under_way.clear()
        try:
            self.client.unregister_worker_plugin(self._run)
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            log.debug("unregistering from Dask: %s", error)


def _drained(ended: Ended, longest: float) -> Iterator[tuple[str, Future]]:
    """All that ended by now; waits for the first."""
    try:
        yield ended.get(timeout=longest)
        while True:
            yield ended.get_nowait()
    except queue.Empty:
        return
