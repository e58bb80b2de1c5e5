"""The folder of a run: what it is, how far it is, and the log of all that happened; it lies beside the result.

    run.json       what is run: the recipe, what a resumed run must agree in, how much there is to do
    events.jsonl   the log, one JSON object a line, flushed: shards with their times, retries, losses, the end
    alive          touched every few seconds for as long as a process works on the run
    prepared.*     the analyses after their look at a sample, see `gpuem.prepared`
    store/         finished shards, see `gpuem.checkpoint`

The last two are removed when the result is saved. Nothing of it is believed before it is checked: somebody else's
folder may hold anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gpuem import atomic, ownership
from gpuem.atomic import format_error
from gpuem.engine import Job
from gpuem.errors import InputError, OutputError
from gpuem.redaction import redact
from gpuem.regular_files import open_regular, read_regular

# how often a process says that it is alive, in seconds
BEAT = 2.0
# looked.pkl is of an earlier version; it is never read
_PREPARED = ("prepared.json", "prepared.npz", "looked.pkl")
# all that a run leaves in its folder, beside finished shards
_LASTING = (
    *("run.json", *_PREPARED, "launch.json", "events.jsonl", "events-[0-9]*.jsonl"),
    *("alive", "alive-[0-9]*", "rank-[0-9]*"),
)
# all that lies with finished shards
_STORED = ("masks.npy", "images.npy", "moments.npy", "fit-[0-9]*.npy", "*.bin", "*.jsonl")
# of run.json and of what lies beside it; 1 had pickled analyses and no number
FORMAT = 2
log = logging.getLogger("gpuem")
# file systems without locks that were told of
_without_locks: set[int] = set()


def beside(output: Path) -> Path:
    """The folder of the run whose result is `output`."""
    return output.parent / f"{output.name.removesuffix('.zarr')}.run"


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
        # done every few seconds
        self.on_beat: list[Callable[[], None]] = []
        self.id, self.identity = uuid.uuid4().hex, dict[str, Any]()
        self._lock_path = path / f"lock{suffix}"
        try:
            ownership.claim(path, self._lock_path.name, self._alive.name, f"events{suffix}.jsonl")
            self._lock = self._claim()
            self._events = path / f"events{suffix}.jsonl"
            self._log = _open_log(self._events)
            self._place = _inode(path)
            self._alive.touch()
        except OSError as error:
            raise OutputError(f"{path}: the folder of the run can't be written: {format_error(error)}") from error
        self._writing = threading.Lock()
        self._torn = self._started = self._ended = self._gone = False

    def _claim(self) -> int:
        """Keep others away: two processes that write one store would spoil it."""
        while True:
            lock = open_regular(self._lock_path, os.O_RDWR | os.O_CREAT)
            try:
                if not self._lock_file(lock):
                    return lock
                # whoever held it may have removed it meanwhile: then this one keeps nobody away
                if os.path.samestat(os.fstat(lock), self._lock_path.lstat()):
                    with contextlib.suppress(OSError):
                        # a disk that is full only keeps others from reading who it is
                        os.ftruncate(lock, 0)
                        os.pwrite(lock, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                    return lock
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _lock_file(self, lock: int) -> bool:
        """Lock a file; False where the file system has no locks. Raises OutputError where another process has it."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(lock, 200, 0).decode("utf-8", "replace") or "another process"
            raise OutputError(
                f"{self.path}: {who} works on this run; wait for it, end it, or choose another [output] path"
            ) from None
        except OSError as error:
            device = os.fstat(lock).st_dev
            if device not in _without_locks:
                _without_locks.add(device)
                log.warning(
                    "%s: locks are not supported here (%s): nothing keeps a second process from working on the same "
                    "run and spoiling it; see to it that there is only one", self.path, error.strerror,
                )  # fmt: skip
            return False
        return True

    def is_in_place(self) -> bool:
        """Whether the folder is still there; warns once where it isn't."""
        try:
            there = _inode(self.path) == self._place
        except OSError:
            there = False
        if not there and not self._gone:
            self._gone = True
            log.warning("%s: the folder of the run was removed meanwhile; nothing is kept to go on with", self.path)
        return there

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
            if self._log >= 0:
                os.close(self._log)
            self._log = -1
        # what lies at this path now may be another run's
        mine = self.is_in_place()
        # nothing to go on with
        nothing = error is not None and self._rank is None and mine and not finished_shards(self.path)
        with contextlib.suppress(OSError):
            if mine:
                ownership.remove(self.path, self._alive.name)
            if nothing:
                self._remove(*_LASTING, "claim-*", "timeline.png")
                self._remove_locks()
        with contextlib.suppress(OSError):
            # while it is held: others compare what they lock with what lies there
            _unlink_same(self._lock_path, self._lock)
        os.close(self._lock)
        if nothing:
            with contextlib.suppress(OSError):
                # the record, and the folder
                ownership.remove(self.path)

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

    def describe(self, frame_nbytes: int, job: Job, identity: dict[str, Any], then: dict[str, Any] | None) -> None:
        """Say what is run, and what a resumed run must agree in; `then` is what was said before, where it goes on.

        Raises
        ------
        OutputError
            It can't be written.
        """
        # the result says of which run it is
        self.id, self.identity = str((then or {}).get("id", self.id)), identity
        made = {
            "format": FORMAT,
            "id": self.id,
            **self._about,
            "shards": len(job.plan.shards),
            "frames": int(job.wanted.sum()),
            "frame_nbytes": frame_nbytes,
            "started": time.time(),
            "host": platform.node(),
            "pid": os.getpid(),
            "identity": identity,
        }
        write_file(self.path / "run.json", json.dumps(made, indent=1).encode())

    def clear(self) -> None:
        """Forget what an earlier run left here."""
        # what says how to go on first: whatever stops this, nothing half removed is taken for a run
        patterns = (
            *("run.json", *_PREPARED, "events.jsonl", "events-[0-9]*.jsonl"),
            *("rank-[0-9]*", "launch.json", "claim-*"),
        )
        with self._writing:
            try:
                self._remove(*patterns)
                ownership.claim(self.path, self._events.name)
                os.close(self._log)
                self._log = -1
                self._log = _open_log(self._events)
            except OSError as error:
                raise OutputError(
                    f"{error.filename or self.path}: not a file of a run, or it can't be removed ({error.strerror}); "
                    "remove it, or choose another [output] path"
                ) from error

    def finish(self) -> None:
        """Remove what only a resumed run would need."""
        if not self.is_in_place():
            return
        with contextlib.suppress(OSError, OutputError):
            say_over(self.path)
            self._remove(*_PREPARED, "rank-[0-9]*", "claim-*")
            self._remove_locks()
            # emptied by somebody, and thus removed here
            self._gone = not self.path.exists()

    def _remove(self, *patterns: str) -> None:
        """Remove finished shards and these files, and the folder, as far as gpuem wrote and made them."""
        for store in (self.path / "store", *self.path.glob("store-[0-9]*")):
            ownership.remove(store, "*")
        ownership.remove(self.path, *patterns)

    def _remove_locks(self) -> None:
        """Remove what ranks locked, unless they hold it still."""
        for path in self.path.glob("lock-[0-9]*"):
            lock = open_regular(path, os.O_RDWR)
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _unlink_same(path, lock)
            os.close(lock)

    def _beat(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):
                if self.is_in_place():
                    self._alive.touch()
                for action in self.on_beat:
                    action()
            self._over.wait(BEAT)


def refuse_foreign(path: Path) -> None:
    """Raise OutputError where files lie in the place of a run folder that gpuem would replace and did not write."""
    ownership.refuse_foreign(path, *_LASTING)
    for store in (path / "store", *path.glob("store-[0-9]*")):
        ownership.refuse_foreign(store, *_STORED)


def finished_shards(path: Path) -> int:
    """How many finished shards are kept in a folder."""
    count = 0
    for file in (*path.glob("store*/done.jsonl"), *path.glob("store*/pending.jsonl")):
        # what can't be read is said where it is needed
        with contextlib.suppress(OSError):
            count += read_regular(file).count(b"\n")
    return count


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
        found = json.loads(read_regular(file).decode())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; try again, or begin anew with --overwrite") from error
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("identity"), dict):
        raise InputError(f"{file}: damaged, or begin anew with --overwrite")
    if found.get("format", 1) != FORMAT:
        raise InputError(
            f"{file}: of another version of gpuem (format {found.get('format', 1)!s:.20}, this one knows {FORMAT}): go "
            "on with that version, or begin anew with --overwrite"
        )
    return found


def begun(path: Path) -> dict[str, Any] | None:
    """`description` of a run that was begun and whose result was not saved yet; None where there is none.

    Raises
    ------
    InputError
        As by `description`.
    """
    return description(path) if is_begun(path) else None


def is_begun(path: Path) -> bool:
    """Whether a run was begun there whose result was not saved yet."""
    return finished_shards(path) > 0 or (path / _PREPARED[0]).exists()


def say_launch(path: Path, launch: str, *, over: bool = False) -> None:
    """Tell other ranks of this launch that the run is planned, or over."""
    write_file(path / "launch.json", json.dumps({"launch": launch, "over": over}).encode())


def read_launch(path: Path) -> tuple[str, bool] | None:
    """What `say_launch` said last; None where it said nothing that can be read."""
    try:
        found = json.loads(read_regular(path / "launch.json"))
        launch, over = found["launch"], found["over"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return (launch, over) if isinstance(launch, str) and isinstance(over, bool) else None


def say_over(path: Path) -> None:
    """Tell ranks that come late that all is done."""
    said = read_launch(path)
    if said is not None:
        say_launch(path, said[0], over=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a run folder atomically and durably, recorded as gpuem's own; raises OutputError."""
    ownership.claim(path.parent, path.name)
    atomic.write_file(path, content)


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _unlink_same(path: Path, file: int) -> None:
    """Remove a name where it still is that of an open file."""
    if os.path.samestat(path.lstat(), os.fstat(file)):
        path.unlink()


def _open_log(path: Path) -> int:
    return open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
