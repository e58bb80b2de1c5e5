"""Who runs the shards: this process, Dask workers, or processes that a scheduler numbered."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from gpuem.engine import Job, Partial
from gpuem.errors import RecipeError
from gpuem.executors import copies, local
from gpuem.executors.dispatch import Report
from gpuem.recipe import Run


class Crew(Protocol):
    """Who runs the shards of a job."""

    name: str

    def settle(self, job: Job) -> Job:
        """The job with the cuts of where it will run; nothing is read yet."""

    def run(self, job: Job, shards: Iterable[int], report: Report) -> Generator[Partial]:
        """Run shards, yield their results as they end.

        Raises
        ------
        ResumableError
            What failed may pass, or nobody is left to work.
        GpuemError
            A shard failed for good.
        """

    def workers(self, job: Job) -> int:
        """How many shards are in work at once."""


class Here:
    """Nobody but this process."""

    name = "local"

    def settle(self, job: Job) -> Job:
        """The job with this machine's own files."""
        return copies.at_home(job)

    def run(self, job: Job, shards: Iterable[int], report: Report) -> Generator[Partial]:
        """See `gpuem.executors.local.run`."""
        return local.run(job, shards, report)

    def workers(self, job: Job) -> int:
        """Threads that compute, or one GPU."""
        return 1 if job.backend.NAME == "cuda" else job.plan.threads


def crew(options: Run) -> AbstractContextManager[Crew]:
    """Who runs the shards, as ``[run]`` says; workers that are started here end with the context.

    Raises
    ------
    RecipeError
        Dask is not installed.
    """
    if options.workers is None and options.scheduler is None:
        return nullcontext(Here())
    try:
        from gpuem.executors import dask_workers
    except ImportError as error:
        raise RecipeError(
            f"[run] workers and scheduler need Dask ({error}): pip install 'gpuem[dask]', "
            "or 'gpuem[dask-cuda13]' for one worker per GPU"
        ) from error
    return dask_workers.crew(options)
