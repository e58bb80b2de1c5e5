"""Shards in threads of this process; the kernels release the GIL."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from gpuem.engine import Job, Partial, run_shard


def run(job: Job, progress: Callable[[int], None] | None = None) -> Iterator[Partial]:
    """Run all shards of a job, yield their results in the order of shards.

    Parameters
    ----------
    job : Job
        The job; `job.plan.threads` shards are in work at once.
    progress : callable
        Called from a worker with the number of frames of every shard that is done.
    """
    count = len(job.plan.shards)
    ahead = 2 * job.plan.threads
    waiting: deque[Future[Partial]] = deque()

    def work(index: int) -> Partial:
        partial = run_shard(job, index)
        if progress:
            progress(job.plan.shards[index].frames)
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


def cpus() -> int:
    """Number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
