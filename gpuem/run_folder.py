"""The folder of a run: what it is, how far it is, and the log of all that happened; it lies beside the result.

    run.json       what is run: the recipe, what a resumed run must agree in, how much there is to do
    events.jsonl   the log, one JSON object a line, flushed: shards with their times, retries, losses, the end
    alive          touched every few seconds for as long as a process works on the run
    looked.pkl     the analyses after their look at a sample, so that a resumed run has the very same
    store/         finished shards, see `gpuem.checkpoint`

The last two are removed when the result is saved.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pickle
import platform
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpuem.analyses import Analysis
from gpuem.engine import Job
from gpuem.errors import InputError, OutputError
from gpuem.redaction import redact

# how often a process says that it is alive, in seconds
BEAT = 2.0
# all that a run leaves in its folder, beside finished shards
_LASTING = (
    *("run.json", "looked.pkl", "launch.json", "timeline.png", "events.jsonl", "events-[0-9]*.jsonl"),
    *("alive", "alive-[0-9]*", "lock", "lock-[0-9]*", "rank-[0-9]*"),
)
log = logging.getLogger("gpuem")


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
            self._events = path / f"events{suffix}.jsonl"
            self._log = _open_log(self._events)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}: the folder of the run can't be written") from error
        self._writing = threading.Lock()
        self._torn = self._started = self._ended = False

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
        self._beating = threading.Thread(target=self._beat, name="gpuem-alive", daemon=True)
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        # it may hang where the file system does
        self._beating.join(BEAT)
        if error is not None and self._started and not self._ended:
            # such as: the result could not be saved
            self.report("stop" if isinstance(error, KeyboardInterrupt) else "error", why=str(error) or repr(error))
        with self._writing:
            os.close(self._log)
            self._log = -1
        with contextlib.suppress(OSError):
            self._alive.unlink(missing_ok=True)
            if error is not None and self._rank is None and not finished_shards(self.path):
                # nothing to go on with
                self._remove(*_LASTING)
        with contextlib.suppress(OSError):
            self._lock.close()

    def report(self, event: str, **facts: Any) -> None:
        """Add a line to the log; a disk that is full, or gone, must not end the run by this."""
        line = redact(json.dumps({"t": round(time.time(), 3), "event": event, **facts}, default=str)).encode() + b"\n"
        self._started |= event == "start"
        self._ended |= event in ("stop", "error")
        with self._writing:
            if self._log < 0:
                return
            try:
                # what is left of a line ends there
                whole = b"\n" + line if self._torn else line
                self._torn = os.write(self._log, whole) != len(whole)
            except OSError as error:
                log.debug("%s: %s", self._events, error)

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
        # what says how to go on first: whatever stops this, nothing half removed is taken for a run
        self._remove("run.json", "looked.pkl", "events.jsonl", "events-[0-9]*.jsonl", "rank-[0-9]*", "launch.json")
        with self._writing:
            os.close(self._log)
            self._log = _open_log(self._events)

    def finish(self) -> None:
        """Remove what only a resumed run would need."""
        with contextlib.suppress(OSError, OutputError):
            say_over(self.path)
            self._remove("looked.pkl", "lock", "lock-[0-9]*", "rank-[0-9]*")

    def _remove(self, *patterns: str) -> None:
        """Remove finished shards and these files, and the folder unless somebody else's lie in it."""
        for pattern in patterns:
            for path in self.path.glob(pattern):
                path.unlink(missing_ok=True)
        for store in (self.path / "store", *self.path.glob("store-[0-9]*")):
            for path in (*store.glob("*.npy"), *(store / name for name in ("sums.bin", "done.jsonl"))):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                store.rmdir()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _beat(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):
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
    """What was said to be run in a folder; None where there is no run.

    Raises
    ------
    InputError
        It can't be read, or is damaged: finished shards may be there all the same.
    """
    file = path / "run.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("identity"), dict):
            return found
        reason = "damaged"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        reason = f"{error.strerror}; try again"
    except ValueError:
        reason = "damaged"
    raise InputError(f"{file}: {reason}, or begin anew with --overwrite")


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
    try:
        made.write_bytes(content)
        made.replace(path)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise OutputError(f"{path}: {error.strerror}: the folder of the run can't be written") from error


def _open_log(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
