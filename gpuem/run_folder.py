"""The folder of a run: what it is, how far it is, and the log of all that happened; it lies beside the result.

    run.json       what is run: the recipe, what a resumed run must agree in, how much there is to do
    events.jsonl   the log, one JSON object a line, flushed: shards with their times, retries, losses, the end
    alive          touched every few seconds for as long as a process works on the run
    looked.pkl     the analyses after their look at a sample, so that a resumed run has the very same
    store/         finished shards, see `gpuem.checkpoint`

The last two are removed when the result is saved.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import platform
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpuem.analyses import Analysis
from gpuem.engine import Job
from gpuem.errors import InputError, OutputError

# how often a process says that it is alive, in seconds
BEAT = 2.0


def beside(output: Path) -> Path:
    """The folder of the run whose result is `output`."""
    return output.with_name(f"{output.name.removesuffix('.zarr')}.run")


class RunFolder:
    """The folder of a run, while a process works on it.

    Parameters
    ----------
    path : path
        The folder; it is created.
    about : dict
        What ``run.json`` says beside the rest: the recipe, the result.
    rank : int, optional
        Number of this process, where several work on one run without knowing each other.

    Raises
    ------
    OutputError
        Another process works on this run, or nothing can be written.
    """

    def __init__(self, path: Path, about: dict[str, Any] | None = None, rank: int | None = None) -> None:
        self.path, self._about, self._rank = path, about or {}, rank
        suffix = "" if rank is None else f"-{rank}"
        self.store = path / f"store{suffix}"
        self._alive = path / f"alive{suffix}"
        self._over = threading.Event()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / f"lock{suffix}").open("a+")
            self._claim()
            self._events = (path / f"events{suffix}.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}: the folder of the run can't be written") from error
        self._writing = threading.Lock()

    def _claim(self) -> None:
        """Keep others away: two processes that write one store would spoil it."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            who = self._lock.read() or "another process"
            raise OutputError(
                f"{self.path}: {who} works on this run; wait for it, end it, or choose another [output] path"
            ) from None
        except OSError:
            # some network file systems know no locks; there it is up to the user
            return
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()

    def __enter__(self) -> Self:
        threading.Thread(target=self._beat, name="gpuem-alive", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._alive.unlink(missing_ok=True)
        self._events.close()
        self._lock.close()
        if error is not None and self._rank is None and not finished_shards(self.path):
            # nothing to go on with
            shutil.rmtree(self.path, ignore_errors=True)

    def report(self, event: str, **facts: Any) -> None:
        """Add a line to the log."""
        line = json.dumps({"t": round(time.time(), 3), "event": event, **facts}, default=str)
        with self._writing:
            if not self._events.closed:
                self._events.write(line + "\n")
                self._events.flush()

    def describe(self, frame_nbytes: int, job: Job, identity: dict[str, Any]) -> None:
        """Say what is run, and what a resumed run must agree in."""
        made = {
            **self._about,
            "shards": len(job.plan.shards),
            "frames": int(job.wanted.sum()),
            "frame_nbytes": frame_nbytes,
            "started": time.time(),
            "host": platform.node(),
            "pid": os.getpid(),
            "identity": identity,
        }
        write_whole(self.path / "run.json", json.dumps(made, indent=1).encode())

    def clear(self) -> None:
        """Forget what an earlier run left here."""
        for path in self.path.glob("store*"):
            shutil.rmtree(path)
        stale = (*self.path.glob("events*.jsonl"), *self.path.glob("rank-*"), *self.path.glob("launch.json"))
        for path in (*stale, self.path / "looked.pkl", self.path / "run.json"):
            path.unlink(missing_ok=True)
        self._events.close()
        self._events = Path(self._events.name).open("a", encoding="utf-8")

    def finish(self) -> None:
        """Remove what only a resumed run would need."""
        for path in self.path.glob("store*"):
            shutil.rmtree(path, ignore_errors=True)
        say_over(self.path)
        for path in (self.path / "looked.pkl", *self.path.glob("lock*"), *self.path.glob("rank-*")):
            path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._over.is_set():
            self._alive.touch()
            self._over.wait(BEAT)


def finished_shards(path: Path) -> int:
    """How many finished shards are kept in a folder."""
    return sum(file.read_bytes().count(b"\n") for file in path.glob("store*/done.jsonl"))


def refuse_unfinished(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where an unfinished run lies that nobody said to go on with, or to forget."""
    done = finished_shards(path)
    if done and not overwrite:
        raise OutputError(
            f"{path}: {done:,} shards of an unfinished run lie there: --resume goes on with it, --overwrite forgets it"
        )


def description(path: Path) -> dict[str, Any] | None:
    """What was said to be run in a folder; None where there is no run."""
    try:
        found = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def keep_looked(path: Path, analyses: Sequence[Analysis]) -> None:
    """Keep the analyses as they are after their look."""
    body = pickle.dumps(list(analyses))
    write_whole(path / "looked.pkl", hashlib.sha256(body).digest() + body)


def looked(path: Path) -> list[Analysis]:
    """The analyses as they were after their look.

    Raises
    ------
    InputError
        They are not there, or damaged. (As with any pickle: a run folder is to be trusted like a program.)
    """
    file = path / "looked.pkl"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; begin anew with --overwrite") from error
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise InputError(f"{file}: damaged; begin anew with --overwrite")
    found: list[Analysis] = pickle.loads(content[32:])
    return found


def say_launch(path: Path, launch: str, *, over: bool = False) -> None:
    """Tell other ranks of this launch that the run is planned, or over."""
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / "launch.json", json.dumps({"launch": launch, "over": over}).encode())


def say_over(path: Path) -> None:
    """Tell ranks that come late that all is done."""
    file = path / "launch.json"
    if file.exists():
        say_launch(path, json.loads(file.read_text(encoding="utf-8"))["launch"], over=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that others see all of it or nothing."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.write_bytes(content)
    made.replace(path)
