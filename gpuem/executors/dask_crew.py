"""Shards on Dask workers, wherever these are.

Dask brings shards to workers and results back, and notices workers that come and go. Which worker gets which shard next
is decided here (`gpuem.executors.dispatch`), so that retries, hanging reads and nearness are the same everywhere.
Whatever a worker is asked comes back through one queue, so that nothing here ever waits for one of them.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace

from distributed import Client

from gpuem.engine import Job, Partial, in_order
from gpuem.errors import DeviceError, GpuemError, InputError, PlanError, ResumableError
from gpuem.executors import copies, dask_shards
from gpuem.executors.dask_line import LEAST_PATIENCE, WAITING, Ended, Line, Worker, some, words
from gpuem.executors.dask_shards import Answer, Hands
from gpuem.executors.dispatch import Dispatch, Report, Task, no_report
from gpuem.recipe import Run

log = logging.getLogger("gpuem")
# a task takes at least so many seconds where shards are quick: handing one out costs about one thousandth of that
TASK_SECONDS = 0.2
# shards of a task at most
MOST_SHARDS = 32
# how often workers that came or went are looked for, in seconds
LOOK = 1.0
# where nothing at all is finished for so many times the patience, and so many seconds, all hang
SILENCE, LEAST_SILENCE = 4.0, 60.0
# images over frames that may wait for their turn where sums depend on the order, in bytes
AHEAD_NBYTES = 256 << 20
_KINDS: dict[str, type[GpuemError]] = {"InputError": InputError, "PlanError": PlanError}


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
        self.line, self.options = Line(client), options
        self._run = ""
        self._workers: dict[str, Worker] = {}
        self._alone_since: float | None = None
        self._seconds: deque[float] = deque(maxlen=100)
        self._heard = 0.0
        self._cuts = ""

    def workers(self, job: Job) -> int:
        """How many shards are in work at once."""
        return sum(worker.places for worker in self._hired())

    def settle(self, job: Job) -> Job:
        """Send the job to all workers; they plan it, and must agree.

        Raises
        ------
        DeviceError
            Workers see no GPU though one is wanted, or some do and others don't, or they have another gpuem; by name.
        PlanError
            It doesn't fit into a worker's memory.
        ResumableError
            No worker answers.
        """
        self._forget()
        self._run, self._cuts = f"gpuem-{uuid.uuid4().hex[:12]}", ""
        try:
            wanted = self.options.workers if isinstance(self.options.workers, int) else 1
            self.line.wait_for_workers(wanted, max(self.options.patience, LEAST_PATIENCE))
            self.line.refuse_strangers()
            parcel = dask_shards.pack(job, self.options)
            self.line.register(Hands(self._run, parcel, own=self.options.scheduler is None))
            self._look()
            answers = self._answers()
            refuse_unfit(answers, self.options.device)
            self._cuts = answers[0].cuts
            shards, tiles = self.line.cuts(self._hired()[0], self._run)
        except BaseException:
            self._forget()
            raise
        job.facts.update(device=answers[0].device, workers=len(answers), **answers[0].facts)
        return replace(job, plan=replace(job.plan, shards=shards, tiles=tiles, threads=self.workers(job)))

    def run(self, job: Job, shards: Iterable[int], report: Report) -> Generator[Partial]:
        """Run shards on the workers, yield their results as they end.

        Raises
        ------
        ResumableError
            The scheduler is lost, nobody is left to work, or what failed may pass.
        """
        dispatch = Dispatch(
            shards,
            ahead=self._ahead(job) if in_order(job) else None,
            patience=job.patience,
            mask=job.on_error == "mask",
            near=copies.near(job.source, job.plan.shards, job.plan.tiles),
            report=report,
        )
        for worker in self._hired():
            _welcome(worker, report)
        looked = self._heard = time.monotonic()
        left, self._alone_since = dispatch.count, None
        try:
            while left:
                now = time.monotonic()
                if now - looked > LOOK:
                    self._look(dispatch, report)
                    looked = now
                self._hand_out(job, dispatch, self._hired())
                for ended in self.line.drained(dispatch.pause(now)):
                    for partial in self._outcomes(dispatch, ended, report):
                        left -= 1
                        yield partial
                    self._hand_out(job, dispatch, [ended.worker])
        finally:
            self._forget()

    def _hired(self) -> list[Worker]:
        """Workers that know the job, and suit it."""
        return [worker for worker in self._workers.values() if worker.answer and not worker.refused]

    def _ahead(self, job: Job) -> int:
        """How many shards may be done before their turn, also where more workers come."""
        weights = job.prepared.weights
        pixels: int = math.prod(job.prepared.shape)
        image = 8 * pixels * (bool(weights.total) + bool(weights.maximum))
        return max(4 * self.workers(job) + 4, AHEAD_NBYTES // max(image, 1))

    def _hand_out(self, job: Job, dispatch: Dispatch, workers: Iterable[Worker]) -> None:
        """Give workers as many shards as they have room for, one task each in turn."""
        hungry = deque(worker for worker in workers if worker.room > 0 and self._is_there(worker))
        at_once = self._at_once(dispatch) if hungry else 0
        while hungry:
            worker = hungry.popleft()
            if self._hand_to(job, dispatch, worker, at_once) and worker.room > 0:
                hungry.append(worker)

    def _hand_to(self, job: Job, dispatch: Dispatch, worker: Worker, at_once: int) -> bool:
        """Give a worker its next task, if there is one for it."""
        assert worker.answer is not None
        place = copies.place_of(job.source, worker.answer.host)
        fresh: list[Task] = []
        again: list[Task] = []
        for _ in range(at_once):
            task = dispatch.take(worker.who, time.monotonic(), place)
            if task is None:
                break
            (fresh if task.attempt == 1 else again).append(task)
        # what failed goes alone: if its worker dies of it, others are not blamed
        for tasks in ([fresh] if fresh else []) + [[task] for task in again]:
            self.line.ask(worker, tasks, dask_shards.work, self._run, tasks)
        return bool(fresh or again)

    def _at_once(self, dispatch: Dispatch) -> int:
        """How many shards make a task: few at the end, so that all workers end together."""
        if not self._seconds:
            return 1
        quick = int(TASK_SECONDS / max(statistics.median(self._seconds), 1e-4))
        places = sum(worker.places + WAITING for worker in self._hired())
        return max(1, min(quick, MOST_SHARDS, dispatch.waiting // (4 * max(places, 1))))

    def _outcomes(self, dispatch: Dispatch, ended: Ended, report: Report) -> Iterator[Partial]:
        """The results of a task; what failed is run again, or raises."""
        worker, outcome, now = ended.worker, ended.outcome, time.monotonic()
        if isinstance(outcome, BaseException):
            # perhaps its worker died, and all it had with it
            self._look(dispatch, report)
        tasks = worker.under_way.pop(ended.future, None)
        if tasks is None or not self._is_there(worker):
            return
        self._heard = now
        if isinstance(outcome, BaseException):
            outcome = [DeviceError(f"{worker.who}: the task didn't come back: {words(outcome)}")] if tasks else outcome
        if not tasks:
            self._hire(worker, outcome, report)
            return
        group = next((one.group for one in outcome if isinstance(one, Partial)), ())
        if not all(dispatch.is_open(shard) for shard in group):
            # another worker was faster with one of them, and their images are added up
            dispatch.give_back([shard for shard in group if dispatch.is_open(shard)], worker.who)
            outcome = [one for one in outcome if isinstance(one, BaseException)]
            tasks = [task for task in tasks if task.shard not in group]
        dispatch.give_back([task.shard for task in tasks[len(outcome) :]], worker.who)
        for task, one in zip(tasks, outcome, strict=False):
            if isinstance(one, BaseException):
                dispatch.failed(task.shard, worker.who, one, now)
            elif dispatch.done(task.shard, worker.who, now):
                self._seconds.append(one.ended - one.began)
                yield one

    def _is_there(self, worker: Worker) -> bool:
        return self._workers.get(worker.address) is worker

    def _hire(self, worker: Worker, answer: Answer | BaseException, report: Report) -> None:
        """A worker that came late answers: it works too, if it suits."""
        if isinstance(answer, BaseException):
            why = f"it can't take the job: {words(answer)}"
        else:
            worker.answer = answer
            why = unfit(answer) or ("" if answer.cuts == self._cuts else _otherwise(answer))
        worker.refused = bool(why)
        if why:
            report("excluded", worker=worker.who, why=why)
        else:
            _welcome(worker, report)

    def _look(self, dispatch: Dispatch | None = None, report: Report = no_report) -> None:
        """Find out which workers are there; those that went leave their shards to others, new ones are asked."""
        found = self.line.there()
        for address, worker in list(self._workers.items()):
            if address not in found or found[address][0] != worker.number:
                self._gone(worker, dispatch)
        hosts = [host for _, host, _ in found.values()]
        for address, (number, host, status) in found.items():
            if address not in self._workers and status == "running":
                worker = self._workers[address] = Worker(address, number)
                self.line.ask(worker, [], dask_shards.plan, self._run, hosts.count(host))
        if dispatch is not None:
            self._refuse_alone()

    def _gone(self, worker: Worker, dispatch: Dispatch | None) -> None:
        del self._workers[worker.address]
        waiting = list(worker.under_way.values())[worker.places :]
        self.line.cancel(worker)
        if dispatch is not None and worker.answer and not worker.refused:
            # what only waited there didn't end it
            dispatch.give_back([task.shard for tasks in waiting for task in tasks], worker.who)
            dispatch.lost(worker.who, time.monotonic())

    def _refuse_alone(self) -> None:
        """Nobody left, or nobody answers: wait a while for workers that are started again, then end."""
        now = time.monotonic()
        if self._hired():
            self._alone_since = None
        else:
            self._alone_since = self._alone_since or now
            if now - self._alone_since > max(self.options.patience, LEAST_PATIENCE):
                raise ResumableError(f"all Dask workers are gone for {now - self._alone_since:.0f} s")
        if now - self._heard > max(SILENCE * self.options.patience, LEAST_SILENCE):
            raise ResumableError(
                f"no Dask worker has finished anything for {now - self._heard:.0f} s: all seem to hang"
            )

    def _answers(self) -> list[Answer]:
        """What workers say to the job; those that take too long join later."""
        until = time.monotonic() + max(self.options.patience, LEAST_PATIENCE)
        while any(worker.answer is None for worker in self._workers.values()) and time.monotonic() < until:
            for ended in self.line.drained(LOOK):
                if ended.worker.under_way.pop(ended.future, None) is None or not self._is_there(ended.worker):
                    continue
                if isinstance(ended.outcome, BaseException):
                    self._look()
                    if self._is_there(ended.worker):
                        raise DeviceError(f"{ended.worker.who}: can't take the job: {words(ended.outcome)}")
                else:
                    ended.worker.answer = ended.outcome
            self._look()
        answers = [worker.answer for worker in self._workers.values() if worker.answer]
        if not answers:
            raise ResumableError(f"no Dask worker answered for {self.options.patience:.0f} s (patience)")
        return answers

    def _forget(self) -> None:
        """Take back what is under way, and let the workers close files and free memory."""
        self.line.cancel(*self._workers.values())
        self._workers.clear()
        if self._run:
            try:
                self.line.unregister(self._run)
            except (ResumableError, ValueError) as error:
                # never registered, a worker hangs, or all is gone; when the connection closes the scheduler sees to it
                log.debug("unregistering from Dask: %s", error)
        self._run = ""


def unfit(answer: Answer) -> str:
    """Why a worker can't work on the job, other than for the want of a GPU."""
    own = dask_shards.version()
    if answer.version != own:
        return f"it has gpuem {answer.version}, here is {own}"
    return "" if answer.device else answer.why


def refuse_unfit(answers: list[Answer], device: str) -> None:
    """Raise what keeps workers from the job, by their names; see `DaskCrew.settle`."""
    without = [f"{a.who} ({a.why})" for a in answers if a.device == "cpu" or (not a.device and a.kind == "DeviceError")]
    if without and (device == "cuda" or (device == "auto" and len(without) < len(answers))):
        hint = "" if device == "cuda" else '; device = "cpu" uses none of the GPUs'
        raise DeviceError(
            f"{len(without)} of {len(answers)} workers see no GPU: {some(without)}. "
            f"Start them with one (dask cuda worker){hint}"
        )
    for answer in answers:
        if why := unfit(answer):
            raise _KINDS.get(answer.kind, DeviceError)(f"worker {answer.who}: {why}")
        if answer.cuts != answers[0].cuts:
            raise DeviceError(f"worker {answer.who}: {_otherwise(answer)}; {answers[0].who} is one of these")


def _otherwise(answer: Answer) -> str:
    if answer.device == "cpu" and answer.why:
        return f"it sees no GPU ({answer.why}), or cuts the data otherwise than the others"
    return "it cuts the data otherwise than the others do: another gpuem, or another kind of device"


def _welcome(worker: Worker, report: Report) -> None:
    for place in range(worker.places):
        report("worker", worker=f"{worker.who}:{place}")
