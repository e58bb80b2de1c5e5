"""Dask workers: those of a scheduler that is there, or started here, one per GPU or on the processors."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dask
import distributed.comm
from distributed import Client, LocalCluster

from gpuem.errors import DeviceError, RecipeError, ResumableError
from gpuem.executors import local
from gpuem.executors.dask_crew import DaskCrew
from gpuem.executors.dask_line import TELL
from gpuem.recipe import Run

log = logging.getLogger("gpuem")
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
    # looking on costs a few percent of a processor
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.worker.profile.enabled": False,
}
# a scheduler has at least so many seconds to answer
LEAST_PATIENCE = 5.0
# and after so many its file is looked at again
ATTEMPT = 10.0
# workers have so many seconds to end by themselves
CLOSING = 5.0
_QUIET: dict[str, Any] = {
    "dashboard_address": None,
    "silence_logs": logging.ERROR,
    # a web server starts in any case, on some port
    "scheduler_kwargs": {"dashboard": False, "dashboard_address": "127.0.0.1:0"},
}
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+|\[[0-9a-fA-F:]+\]:\d+")


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
        # it tells of every connection; what goes wrong with one is told in our words
        stack.enter_context(_at_level("distributed", logging.ERROR))
        stack.enter_context(_at_level("distributed.client", logging.CRITICAL))
        if options.scheduler is not None:
            client = _connect(options.scheduler, options.patience)
        else:
            cluster = stack.enter_context(_cluster(options))
            client = Client(cluster, set_as_default=False)
        stack.callback(_close, client)
        yield DaskCrew(client, options)


@contextmanager
def _at_level(logger: str, level: int) -> Iterator[None]:
    """Let a logger tell no less than this: what it warns of is dealt with here, and told in other words."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(level)
    try:
        yield
    finally:
        found.setLevel(before)


def _connect(scheduler: str, patience: float) -> Client:
    """The connection to a scheduler, which may come up a little later than this; what it waits for is told."""
    began = time.monotonic()
    until, why, told = began + patience, "", False
    while True:
        # asked again and again: a file of another time may name a scheduler that is gone
        address, why = _address(scheduler)
        if not told and (address is None or time.monotonic() - began > TELL):
            told = True
            log.info("waiting for the Dask scheduler %s: %s; for at most %.0f s (patience)", scheduler, why, patience)
        if address is not None:
            left = min(max(until - time.monotonic(), TELL), ATTEMPT if told else TELL)
            try:
                _knock(address, left)
                return Client(address, timeout=max(left, LEAST_PATIENCE), set_as_default=False)
            except ValueError as error:
                raise RecipeError(f"scheduler {scheduler!r}: not an address of a Dask scheduler: {error}") from error
            except Exception as error:  # noqa: BLE001 - what another server says may break anything in Dask
                why = f"{address} doesn't answer as a Dask scheduler ({_reason(error)})"
        if time.monotonic() > until:
            raise ResumableError(
                f"the Dask scheduler {scheduler}: {why}, for {patience:.0f} s (patience); is it running?"
            )
        time.sleep(0.2)


def _knock(address: str, longest: float) -> None:
    """Raise unless a scheduler answers: a client of Dask that finds none leaves a traceback behind when it is freed."""
    if not address.startswith("tcp://"):
        return
    answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    async def connect() -> None:
        comm = await asyncio.wait_for(distributed.comm.connect(address, timeout=longest), longest)
        await comm.close()

    def run() -> None:
        # in a thread: this one may have a loop of its own, as in a notebook
        try:
            asyncio.run(connect())
        except BaseException as error:  # noqa: BLE001 - it is raised below
            answer.put(error)
        else:
            answer.put(None)

    threading.Thread(target=run, name="gpuem-knock", daemon=True).start()
    try:
        error = answer.get(timeout=2 * longest)
    except queue.Empty:
        raise TimeoutError(f"no answer for {longest:.0f} s") from None
    if error is not None:
        raise error


def _address(scheduler: str) -> tuple[str | None, str]:
    """Its address, as it is given or as a scheduler file says it, None where that can't be had; and why not (yet)."""
    if "://" in scheduler:
        return scheduler, "no answer yet"
    if _HOST_AND_PORT.fullmatch(scheduler) and not Path(scheduler).exists():
        return f"tcp://{scheduler}", "no answer yet"
    try:
        address = json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"]
        if isinstance(address, str):
            return address, "no answer yet"
        raise TypeError
    except FileNotFoundError:
        return None, "no such file"
    except OSError as error:
        return None, f"this file can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        # or one that is being written
        return None, "this file is none of a scheduler: no JSON with an address"


def _reason(error: BaseException) -> str:
    """What is at the bottom of an error of Dask."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


@contextmanager
def _cluster(options: Run) -> Iterator[LocalCluster]:
    """Workers on this machine, started now and ended with the context."""
    reason = why_no_gpu() if options.device != "cpu" else "device is cpu"
    if reason and options.device == "cuda":
        raise DeviceError(f'device = "cuda": {reason}')
    try:
        cluster = _on_processors(options) if reason else _on_gpus(options)
    except (OSError, TimeoutError, RuntimeError) as error:
        raise DeviceError(
            f"[run] workers = {options.workers!r}: they don't start: {_reason(error)}. (In a Python script, what "
            'starts them must stand below if __name__ == "__main__": they import that script)'
        ) from error
    try:
        yield cluster
    finally:
        try:
            cluster.close(timeout=CLOSING)
        except (OSError, TimeoutError, RuntimeError) as error:
            log.debug("ending the Dask workers: %s", error)


def why_no_gpu() -> str:
    """Why this machine has no GPU for workers; empty where it has."""
    from gpuem.backends import cuda_device

    return cuda_device.why_not()


def _on_gpus(options: Run) -> LocalCluster:
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError as error:
        raise DeviceError(
            f"[run] workers with GPUs need dask-cuda ({error}): pip install 'gpuem[dask-cuda13]', or leave workers "
            "out for one GPU"
        ) from error
    count = None if options.workers == "all" else options.workers
    try:
        # with any limit to memory dask-cuda would spill
        return LocalCUDACluster(
            n_workers=count, threads_per_worker=1, device_memory_limit=None, memory_limit=None, **_QUIET
        )
    except ValueError as error:
        raise DeviceError(f"[run] workers = {options.workers!r}: {error}") from error


def _on_processors(options: Run) -> LocalCluster:
    cpus = options.threads or local.cpus()
    count = cpus if options.workers == "all" else int(options.workers or 1)
    threads = max(1, cpus // count)
    return LocalCluster(
        n_workers=count, threads_per_worker=threads, processes=True, memory_limit=None, host="127.0.0.1", **_QUIET
    )


def _close(client: Client) -> None:
    try:
        client.close(timeout=5)
    except (OSError, TimeoutError, RuntimeError) as error:
        log.debug("closing the Dask client: %s", error)
