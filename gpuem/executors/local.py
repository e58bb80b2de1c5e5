"""Shards in this process: on its threads, where the kernels release the GIL, or on its GPU."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from types import FrameType

from gpuem.engine import Job, Partial, StoppedError, in_order, run_shard
from gpuem.errors import InputError, ReadError, ResumableError
from gpuem.executors.dispatch import LEAST_HANG, Dispatch, Report, Task, no_report

# how often it is looked whether all threads are stuck, in seconds
LOOK = 1.0
# so long shards in work may take to come to their next tile where the run ends; those that take longer are left behind
ENDING = 10.0
_READING = ("gpuem.storage.", "gpuem.formats.")


def run(
    job: Job,
    shards: Iterable[int] | None = None,
    report: Report = no_report,
    more: Callable[[], Iterable[int]] | None = None,
) -> Generator[Partial]:
    """Run shards of a job, yield their results as they end.

    Parameters
    ----------
    job : Job
        The job; on a CPU `job.plan.threads` shards are in work at once, on a GPU one.
    shards : iterable of int
        Which; by default all.
    report : callable
        Told of shards that are tried again and the like; see `gpuem.executors.dispatch.Dispatch`.
    more : callable
        Asked for further shards when all are handed out; see there.

    Raises
    ------
    GpuemError
        A shard failed for good. Those in work were dropped.
    """
    wanted = range(len(job.plan.shards)) if shards is None else shards
    dispatch = Dispatch(
        wanted,
        ahead=2 * job.plan.threads if in_order(job) and job.backend.NAME == "cpu" else None,
        patience=job.patience,
        mask=job.on_error == "mask",
        report=report,
        more=more,
    )
    if job.backend.NAME == "cuda":
        yield from _on_device(job, dispatch)
    else:
        yield from _on_threads(job, dispatch, more is not None)


def _on_threads(job: Job, dispatch: Dispatch, more: bool) -> Generator[Partial]:
    # bounded: who computes waits for who combines
    outcomes: queue.Queue[Partial | BaseException] = queue.Queue(job.plan.threads)
    changed = threading.Condition()
    # a thread that hangs in a read must not keep the process from ending
    threads = [
        threading.Thread(target=_work, args=(job, dispatch, changed, outcomes), name=f"gpuem-{k}", daemon=True)
        for k in range(job.plan.threads if more else min(job.plan.threads, dispatch.count))
    ]
    for thread in threads:
        thread.start()
    stuck: dict[int, tuple[FrameType, float]] = {}
    done = 0
    try:
        while _unfinished(dispatch, changed, done):
            try:
                # a thread that asks for further shards is not waited for long
                outcome = outcomes.get(timeout=0.01 if done == dispatch.count else LOOK)
            except queue.Empty:
                if job.stop.is_set():
                    raise StoppedError from None
                _refuse_stuck(threads, stuck, max(job.patience, LEAST_HANG))
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            done += 1
            yield outcome
    finally:
        # shards in work stop at their next tile: after an error, Ctrl-C, or where two threads had the same shard
        job.stop.set()
        until = time.monotonic() + ENDING
        while time.monotonic() < until:
            with changed:
                changed.notify_all()
                hung = dispatch.hung(time.monotonic())
            if not any(thread.is_alive() and thread.name not in hung for thread in threads):
                break
            # who waits for room to hand over a shard is let go
            with contextlib.suppress(queue.Empty):
                outcomes.get(timeout=0.005)


def _unfinished(dispatch: Dispatch, changed: threading.Condition, done: int) -> bool:
    """Whether results are still to come beyond those that were handed over."""
    with changed:
        return done < dispatch.count or not dispatch.finished


def _refuse_stuck(threads: list[threading.Thread], stuck: dict[int, tuple[FrameType, float]], patience: float) -> None:
    """Raise ResumableError where all threads have been in one and the same read each for longer than the patience."""
    now, frames = time.monotonic(), sys._current_frames()
    reads = {thread.ident or 0: _read_of(frames.get(thread.ident or 0)) for thread in threads}
    for ident, read in reads.items():
        if read is None:
            stuck.pop(ident, None)
        elif ident not in stuck or stuck[ident][0] is not read:
            stuck[ident] = read, now
    if len(stuck) == len(threads) and all(now - since > patience for _, since in stuck.values()):
        raise ResumableError(f"storage doesn't answer: every thread has been waiting for a read for {patience:.0f} s")


def _read_of(frame: FrameType | None) -> FrameType | None:
    """The call that reads which a thread is in."""
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(_READING):
        frame = frame.f_back
    return frame


def _work(
    job: Job, dispatch: Dispatch, changed: threading.Condition, outcomes: queue.Queue[Partial | BaseException]
) -> None:
    """A thread: take a shard, run it, until none is left."""
    name = threading.current_thread().name
    try:
        while not job.stop.is_set():
            with changed:
                task = None if dispatch.finished else dispatch.take(name, time.monotonic())
                if task is None:
                    if dispatch.finished:
                        return
                    changed.wait(dispatch.pause(time.monotonic()))
                    continue
            partial = _outcome(job, dispatch, changed, task)
            if partial is not None:
                _put(job, outcomes, partial)
    except StoppedError:
        return
    except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that combines must raise it
        _put(job, outcomes, error)


def _put(job: Job, outcomes: queue.Queue[Partial | BaseException], outcome: Partial | BaseException) -> None:
    """Hand an outcome over, as long as somebody may be there to take it."""
    while not job.stop.is_set():
        try:
            outcomes.put(outcome, timeout=LOOK)
        except queue.Full:
            continue
        return


def _outcome(job: Job, dispatch: Dispatch, changed: threading.Condition, task: Task) -> Partial | None:
    """Run a shard; None where another thread was faster or it will be tried again."""
    name = threading.current_thread().name
    try:
        partial = run_shard(job, task.shard, last_try=task.last_try)
    except (StoppedError, InputError):
        # all threads see the same files
        raise
    except BaseException as error:  # noqa: BLE001 - what may pass is not for this thread to know
        if isinstance(error, ReadError):
            job.files.reopen()
        with changed:
            dispatch.failed(task.shard, name, error, time.monotonic())
        return None
    with changed:
        first = dispatch.done(task.shard, name, time.monotonic())
        changed.notify_all()
    return partial if first else None


def _on_device(job: Job, dispatch: Dispatch) -> Generator[Partial]:
    """One GPU, driven by this thread; reader threads feed it. Results come in the order of shards."""
    from gpuem import stream

    if dispatch.finished:
        return
    name = threading.current_thread().name
    last: list[Task] = []
    with stream.session(job) as session:
        while not dispatch.finished:
            task = last.pop() if last else dispatch.take(name, time.monotonic())
            if task is None:
                time.sleep(dispatch.pause(time.monotonic()))
                continue
            begun: list[int] = []
            shards = _following(task, dispatch, begun, last)
            try:
                for partial in stream.run(job, shards, session, last_try=task.last_try):
                    begun.remove(partial.shard)
                    dispatch.done(partial.shard, name, time.monotonic())
                    yield partial
            except ReadError as error:
                job.files.reopen()
                # the first that didn't come is the one that failed
                failed = begun.pop(0)
                dispatch.give_back(begun, name)
                dispatch.failed(failed, name, error, time.monotonic())


def _following(task: Task, dispatch: Dispatch, begun: list[int], last: list[Task]) -> Iterator[int]:
    """A shard and those after it, taken as the device comes to them; one that is tried for the last time goes alone."""
    name = threading.current_thread().name
    following: Task | None = task
    while following is not None:
        begun.append(following.shard)
        yield following.shard
        following = None if task.last_try else dispatch.take(name, time.monotonic())
        if following is not None and following.last_try:
            last.append(following)
            return


def cpus() -> int:
    """Number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
