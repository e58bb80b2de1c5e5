"""Shards in this process: on its threads, where the kernels release the GIL, or on its GPU."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gpuem.engine import Job, Partial, run_shard


def run(job: Job, progress: Callable[[int], None] | None = None) -> Iterator[Partial]:
    """Run all shards of a job, yield their results in the order of shards.

    Parameters
    ----------
    job : Job
        The job; on a CPU `job.plan.threads` shards are in work at once, on a GPU one.
    progress : callable
        Called with the number of wanted frames of every shard that is done; on a CPU from its worker.
    """
    if job.backend.NAME == "cuda":
        yield from _on_device(job, progress)
        return
    count = len(job.plan.shards)
    ahead = 2 * job.plan.threads
    waiting: deque[Future[Partial]] = deque()

    def work(index: int) -> Partial:
        partial = run_shard(job, index)
        _tell(progress, partial)
        return partial

    with ThreadPoolExecutor(job.plan.threads, thread_name_prefix="gpuem") as pool:
        try:
            for index in range(min(ahead, count)):
                waiting.append(pool.submit(work, index))
            for index in range(ahead, count + ahead):
                if not waiting:
                    break
                yield waiting.popleft().result()
                if index < count:
                    waiting.append(pool.submit(work, index))
        except BaseException:
            # an error or Ctrl-C: shards in work stop at their next tile
            job.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _on_device(job: Job, progress: Callable[[int], None] | None) -> Iterator[Partial]:
    """One GPU, driven by this thread; reader threads feed it."""
    from gpuem import stream

    for partial in stream.run(job, range(len(job.plan.shards))):
        _tell(progress, partial)
        yield partial


def _tell(progress: Callable[[int], None] | None, partial: Partial) -> None:
    if progress:
        progress(partial.positions.size + sum(item.indices.size for item in partial.lost))


def cpus() -> int:
    """Number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """80 % of the memory that is free for new use, the control group's limit respected, in bytes."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    # version 2 of control groups, and version 1, which writes a huge number for "no limit"
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        text = limit.read_text(encoding="ascii").strip() if os.access(limit, os.R_OK) else "max"
        free = min(free, int(text)) if text.isdigit() else free
    return int(0.8 * free)
