"""The line to a Dask scheduler: what is asked over it, and answers that come when they come.

Results are small: they travel over plain TCP, by way of the scheduler, to the process that combines them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future

from gpuem.errors import DeviceError, ResumableError
from gpuem.executors import dask_shards
from gpuem.executors.dask_shards import Answer, Farewell, Hands
from gpuem.executors.dispatch import Task

log = logging.getLogger("gpuem")
# shards that wait at a worker while others are in work there: it must not wait for the network
WAITING = 1
# the scheduler answers within so many seconds, or is lost
ANSWER = 30.0
# workers have so many seconds to let go of a job, before nobody waits for them
FAREWELL = 3.0
# workers may be away for the patience, but at least for so many seconds: they are started again
LEAST_PATIENCE = 10.0
# what Dask raises where a scheduler or its connection is gone ...
_GONE = (OSError, TimeoutError, concurrent.futures.CancelledError, asyncio.CancelledError)
# ... and what it may raise then, too, but so does whatever is wrong with a question
_PERHAPS_GONE = (RuntimeError, ValueError)
# seconds after which it is told what is waited for
TELL = 3.0


@dataclass(eq=False)
class Worker:
    """A process of Dask that runs shards, as this process sees it."""

    address: str
    number: str
    answer: Answer | None = None
    refused: bool = False
    under_way: dict[Future, list[Task]] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """As the log names it."""
        return self.answer.who if self.answer else self.address

    @property
    def places(self) -> int:
        """How many shards it runs at once."""
        return self.answer.threads if self.answer else 0

    @property
    def room(self) -> int:
        """How many tasks more it may have."""
        if self.answer is None or self.refused:
            return 0
        return self.places + WAITING - len(self.under_way)


@dataclass(frozen=True)
class Ended:
    """What came of something that a worker was asked."""

    worker: Worker
    future: Future
    outcome: Any


class Line:
    """The connection to a scheduler. Nothing here waits for a worker.

    Parameters
    ----------
    client : distributed.Client
        The connection, open.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()

    def ask(self, worker: Worker, tasks: list[Task], function: Callable[..., Any], run: str, *given: Any) -> None:
        """Have something run on a worker; what comes of it arrives in the queue."""
        key = f"{run}-{function.__name__}-{uuid.uuid4().hex[:12]}"
        future = self.client.submit(function, run, *given, key=key, workers=[worker.address], pure=False)
        worker.under_way[future] = tasks
        self._begin(self._come(worker, future))

    async def _come(self, worker: Worker, future: Future) -> None:
        """Wait for a result, and fetch it: on the loop of the client, so that no other one waits for it."""
        try:
            outcome = await self.client.gather(future, asynchronous=True)
        except BaseException as error:  # noqa: BLE001 - who reads the queue decides what it means
            outcome = error
        self._ended.put(Ended(worker, future, outcome))

    def there(self) -> dict[str, tuple[str, str, str]]:
        """By address the number, the machine and the state of all workers."""

        def there(dask_scheduler: Any) -> dict[str, tuple[str, str, str]]:
            # this function travels as it is: the scheduler need not have gpuem
            return {a: (w.server_id, w.host, w.status.name) for a, w in dask_scheduler.workers.items()}

        found: dict[str, tuple[str, str, str]] = self.answer(lambda: self.client.run_on_scheduler(there))
        return found

    def cuts(self, worker: Worker, run: str) -> Any:
        """How a worker that knows the job cuts the data."""

        async def ask() -> Any:
            asked = self.client.submit(dask_shards.cuts, run, workers=[worker.address], pure=False)
            return await self.client.gather(asked, asynchronous=True)

        return self.answer(ask)

    def register(self, hands: Hands) -> None:
        """Bring a job to all workers, also those that come later, until `unregister` or until this process is gone."""

        async def both() -> None:
            await self.client.register_plugin(hands, name=hands.run)
            await self.client.register_plugin(Farewell(self.client.id, hands.run), name=f"{hands.run}-farewell")

        self.answer(both)

    def unregister(self, run: str) -> None:
        """Let all workers forget a job."""

        async def both() -> None:
            await self.client.unregister_worker_plugin(run)
            await self.client.unregister_scheduler_plugin(f"{run}-farewell")

        self.answer(both, FAREWELL)

    def answer(self, question: Callable[[], Awaitable[Any]], longest: float = ANSWER) -> Any:
        """What the scheduler answers.

        Raises
        ------
        ResumableError
            It doesn't.
        """

        async def ask() -> Any:
            return await asyncio.wait_for(question(), longest)

        try:
            if self.client.status != "running":
                raise OSError("the connection is closed")
            return self._begin(ask()).result()
        except _GONE as error:
            raise ResumableError(f"the Dask scheduler is lost: {words(error)}") from error
        except _PERHAPS_GONE as error:
            if self._answers(min(longest, FAREWELL)):
                raise
            raise ResumableError(f"the Dask scheduler is lost: {words(error)}") from error

    def _answers(self, longest: float) -> bool:
        """Whether the scheduler is there."""

        async def ask() -> Any:
            return await asyncio.wait_for(self.client.scheduler.identity(), longest)

        try:
            return self.client.status == "running" and bool(self._begin(ask()).result(2 * longest))
        except (*_GONE, *_PERHAPS_GONE, AttributeError):
            return False

    def _begin(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.client.loop.asyncio_loop)

    def drained(self, longest: float) -> Iterator[Ended]:
        """All that ended by now; waits for the first. What ends meanwhile is for the next time."""
        try:
            yield self._ended.get(timeout=longest)
        except queue.Empty:
            return
        for _ in range(self._ended.qsize()):
            yield self._ended.get_nowait()

    def cancel(self, *workers: Worker) -> None:
        """Take back what is under way; nobody waits for that."""
        futures = [future for worker in workers for future in worker.under_way]
        for worker in workers:
            worker.under_way = {}
        if futures and self.client.status == "running":

            async def cancel() -> None:
                await self.client.cancel(futures, force=True)

            self._begin(cancel())

    def wait_for_workers(self, wanted: int, patience: float) -> None:
        """Wait until so many are there, and say so; raises ResumableError where they don't come."""
        what = f"{wanted} Dask worker{'s' if wanted > 1 else ''}"
        for longest, last in ((min(TELL, patience), False), (max(patience - TELL, 0.0), True)):
            try:
                self.client.wait_for_workers(wanted, timeout=longest)
                return
            except _PERHAPS_GONE:
                if self._answers(FAREWELL):
                    raise
                raise ResumableError(f"the Dask scheduler is lost while {what} were waited for") from None
            except _GONE as error:
                if last:
                    raise ResumableError(
                        f"{what} wanted, not there after {patience:.0f} s (patience); look at the workers' logs"
                    ) from error
                log.info("waiting for %s, for at most %.0f s (patience)", what, patience)

    def refuse_strangers(self) -> None:
        """Workers with another gpuem, or none, find other results, or break later in ways that are hard to read."""
        own = dask_shards.version()

        def version() -> str:
            # it travels as it is: the worker need not have gpuem
            import importlib.metadata

            return importlib.metadata.version("gpuem")

        found = self.answer(lambda: self.client.run(version, on_error="return"))
        others = [
            f"{address} has {f'gpuem {said}' if isinstance(said, str) else f'no gpuem ({words(said)})'}"
            for address, said in found.items()
            if said != own
        ]
        if others:
            raise DeviceError(
                f"{len(others)} of {len(found)} workers have another gpuem than {own} here: {some(others)}. Start "
                "them in the same environment"
            )


def words(error: Any) -> str:
    """An error, and what kind of error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def some(names: list[str]) -> str:
    """Not too many names."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
