"""Runs that keep what is finished: every shard goes to the run folder as it ends, and is not run again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from gpuem.atomic import format_error
from gpuem.checkpoint import Store
from gpuem.engine import Job, Partial, Totals, combine
from gpuem.errors import DeviceError, OutputError, ResumableError
from gpuem.executors import Crew
from gpuem.run_folder import RunFolder, finished_shards

Progress = Callable[[int], None]


def run(job: Job, crew: Crew, folder: RunFolder, progress: Progress | None = None) -> Totals:
    """Run the shards that are not in the folder yet, keep each as it ends, combine all.

    Parameters
    ----------
    job : Job
        The run.
    crew : Crew
        Who runs what is missing.
    folder : RunFolder
        Where finished shards are kept.
    progress : callable
        Called with the number of frames of every shard.

    Raises
    ------
    ResumableError
        It ended early: stopped, out of workers, out of disk. What is finished is in the folder.
    """
    store = Store(folder.store, job)
    store.look()
    damaged = store.verify()
    if damaged:
        folder.report("damaged", shards=damaged[:100], count=len(damaged))
    if job.on_error == "stop":
        # a run before this one masked them
        store.forget(store.broken())
    done, began = len(store.finished), time.monotonic()
    folder.report("start", **_facts(job), executor=crew.name, workers=crew.workers(job), done=done)
    with resumable(folder, job, store), closing(_partials(job, crew, folder, store)) as partials:
        with _writing(store):
            store.begin()
        # results may be long in coming
        folder.on_beat.append(store.sync_if_due)
        totals = combine(job, told(partials, progress), store.read)
    if done:
        job.facts["kept_shards"] = done
    folder.report("finish", seconds=round(time.monotonic() - began, 3), done=len(job.plan.shards))
    return totals


def _partials(job: Job, crew: Crew, folder: RunFolder, store: Store) -> Generator[Partial]:
    """The results of all shards: those that are kept, and those that are missing, which are run and kept."""
    count, kept = len(job.plan.shards), set(store.finished)
    missing = [shard for shard in range(count) if shard not in kept]
    with closing(crew.run(job, missing, folder.report)) as computed:
        for shard in range(count):
            if shard in kept:
                yield _kept(store, shard)
            while shard not in store.finished:
                group = _group(computed)
                with _writing(store):
                    store.write(*group)
                for partial in group:
                    report_shard(folder, job, partial)
                yield from group


def _kept(store: Store, shard: int) -> Partial:
    try:
        return store.read(shard)
    except (ValueError, LookupError, ArithmeticError) as error:
        raise ResumableError(f"{store.folder}: shard {shard} was changed since it was checked: {error}") from error


def _group(computed: Iterator[Partial]) -> list[Partial]:
    """The next result, with those that are of no use without it: they follow one another."""
    group: list[Partial] = []
    while not group or len(group) < len(group[0].group):
        partial = next(computed, None)
        if partial is None:
            raise ResumableError("nobody is left to work")
        group.append(partial)
    return group


def told(partials: Iterator[Partial], progress: Progress | None) -> Iterator[Partial]:
    """The same partial results; `progress` is told of each."""
    for partial in partials:
        if progress:
            progress(partial.positions.size + sum(item.indices.size for item in partial.lost))
        yield partial


@contextmanager
def _writing(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResumableError(
            f"finished shards can't be kept in {store.folder}: {format_error(error)}{_remedy(error)}"
        ) from error


def _remedy(error: OSError) -> str:
    return "; make room" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""


@contextmanager
def resumable(folder: RunFolder, job: Job, store: Store) -> Iterator[None]:
    """Whatever ends the run early: keep what is finished, and say how to go on."""
    before = len(store.finished)
    try:
        yield
    except (KeyboardInterrupt, ResumableError, OutputError, OSError, MemoryError, DeviceError) as error:
        if isinstance(error, OutputError) and not store.finished:
            # no room to begin with
            folder.report("error", why=str(error), done=0)
            raise
        if isinstance(error, DeviceError) and len(store.finished) == before:
            # a GPU that never worked here won't do so the next time
            folder.report("error", why=str(error), done=before)
            raise
        why = _why(error)
        folder.report("stop", why=why, done=len(store.finished), shards=len(job.plan.shards))
        if not store.finished:
            raise ResumableError(f"{why}. No shard was finished yet; run it again") from error
        if not folder.is_in_place() or not finished_shards(folder.path):
            raise ResumableError(
                f"{why}. {folder.path} was removed meanwhile: nothing is kept; run it again"
            ) from error
        raise ResumableError(
            f"{why}. {len(store.finished):,} of {len(job.plan.shards):,} shards are finished and kept in "
            f"{folder.path}; to go on: the same command with --resume"
        ) from error
    except Exception as error:
        folder.report("error", why=str(error) or repr(error), done=len(store.finished))
        raise
    finally:
        job.stop.set()
        try:
            store.close()
        except OSError as error:
            # what didn't reach the disk has no valid checksum
            folder.report("error", why=f"{store.folder}: {format_error(error)}")


@contextmanager
def saving(folder: RunFolder, output: Path) -> Iterator[None]:
    """Whatever keeps a result from being saved: its shards are all finished and kept."""
    try:
        yield
    except (KeyboardInterrupt, OutputError, OSError, MemoryError) as error:
        why = _why(error)
        folder.report("stop", why=f"{output} is not saved: {why}")
        if not folder.is_in_place():
            raise ResumableError(
                f"{why}. {folder.path} was removed meanwhile: nothing is kept; run it again"
            ) from error
        raise ResumableError(
            f"{why}. All shards are finished and kept in {folder.path}; to save the result: the same command with "
            "--resume"
        ) from error


def report_shard(folder: RunFolder, job: Job, partial: Partial) -> None:
    """A line of the log for a finished shard."""
    frames = partial.positions.size
    folder.report(
        "shard",
        shard=partial.shard,
        worker=partial.worker,
        began=round(partial.began, 4),
        ended=round(partial.ended, 4),
        frames=frames,
        nbytes=frames * job.source.frame_nbytes,
        seconds={stage: round(seconds, 5) for stage, seconds in partial.seconds.items()},
    )
    broken = sum(item.indices.size for item in partial.lost)
    if broken:
        folder.report("masked", shard=partial.shard, frames=broken, why=partial.lost[0].message)


def _facts(job: Job) -> dict[str, object]:
    wanted = int(job.wanted.sum())
    return {
        "shards": len(job.plan.shards),
        "frames": wanted,
        "nbytes": wanted * job.source.frame_nbytes,
        "device": job.facts.get("device", job.backend.NAME),
    }


def _why(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "stopped by Ctrl-C"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError):
        return f"{error.filename}: {format_error(error)}" if error.filename else format_error(error)
    return str(error) or type(error).__name__
