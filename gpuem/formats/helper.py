"""A second process that calls functions for this one: what they do to it, they don't do to this one.

Libraries trust the files that they parse. A damaged file may end the process in which it is parsed, or never let go of
it; here that ends the helper, and becomes an error. It is started when first used and stays for further calls; after a
minute without any, or with the process it serves, it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from gpuem.errors import GpuemError, InputError

log = logging.getLogger("gpuem")
IDLE_SECONDS = 60
# of the processor, for the tables of one file: those of a million chunks take some seconds, and many bytes
CPU_SECONDS = 3
CPU_BYTES_PER_SECOND = 5_000_000
# in naps, as HDF5 waits for tables that never come; or waiting for something else that is no disk
NAP_SECONDS = 10
ASLEEP_SECONDS = 120
_HEADER = struct.Struct("<Q")
_START = "import sys; sys.path[:] = sys.argv[1:]; from gpuem.formats.helper import serve; serve()"
_REMEDY = "the file is damaged: copy it again, or repair it with the tools of HDF5"


class _Helper:
    """The process and the pipes to it."""

    def __init__(self) -> None:
        self.said = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
        )
        self.owner = os.getpid()
        self.environment = _environment()

    def usable(self) -> bool:
        """Whether it is alive, this process's own, and looks for files where this process would."""
        return self.owner == os.getpid() and self.process.poll() is None and self.environment == _environment()

    def close(self) -> int:
        """End it; its exit status."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            with contextlib.suppress(OSError):
                cast(BinaryIO, stream).close()
        return self.process.wait()


_lock = threading.Lock()
_helper: _Helper | None = None
_serving = False


def call(function: Callable[..., Any], path: Path, **options: Any) -> Any:
    """``function(path, **options)`` in the helper: what it returns, or the gpuem error that it raises.

    Parameters
    ----------
    function : callable
        Of a module of gpuem; its arguments and its result travel by pickle.
    path : Path
        The file that it parses.

    Raises
    ------
    InputError
        The file ended the helper, or took it longer than a file of this size can.
    GpuemError
        What the function raises.
    """
    request = pickle.dumps((_folder(), function, path, options))
    with _lock:
        try:
            fine, value = _ask(path, request)
        except BaseException:
            # nobody will read the answer
            _close()
            raise
    if not fine:
        raise value
    return value


def _ask(path: Path, request: bytes) -> tuple[bool, Any]:
    """Send a request and wait for the answer; once more where the helper had just ended itself."""
    global _helper
    for _ in range(2):
        if _helper is None or not _helper.usable():
            _close()
            _helper = _Helper()
        process = _helper.process
        try:
            _send(cast(BinaryIO, process.stdin), request)
            asleep = _wait(process)
            answer = None if asleep else _receive(cast(BinaryIO, process.stdout))
        except (BrokenPipeError, ConnectionError):
            asleep, answer = False, None
        if answer is not None:
            found: tuple[bool, Any] = pickle.loads(answer)
            return found
        if asleep:
            raise InputError(
                f"{path}: HDF5 waits for tables that don't come: the file is cut off or its writer gone; copy it again"
            )
        status = process.wait()
        if status == -getattr(signal, "SIGHUP", 0):
            # the thread that started it has ended
            continue
        if status == -getattr(signal, "SIGXCPU", 0):
            raise InputError(f"{path}: HDF5 hangs in its tables, or in those of a file that it names; {_REMEDY}")
        if status < 0:
            raise InputError(f"{path}: HDF5 crashed over its tables (signal {-status}); {_REMEDY}")
        _helper.said.seek(0)
        said = _helper.said.read().decode(errors="replace").strip().splitlines()[-1:]
    raise InputError(f"{path}: the process that reads its tables ended ({status}) {' '.join(said)}")


def _close() -> None:
    global _helper
    if _helper is not None and _helper.owner == os.getpid():
        _helper.close()
    _helper = None


def _forget() -> None:
    """In a forked child: the helper is the parent's."""
    global _lock
    _lock = threading.Lock()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _folder() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        # it was deleted; whole paths work nevertheless
        return os.sep


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith("HDF5_")}


def _wait(process: subprocess.Popen[bytes]) -> bool:
    """Wait for an answer, or for the end of the helper; True where it sleeps and sleeps."""
    stream = cast(BinaryIO, process.stdout)
    if sys.platform == "win32":
        return False
    asleep, before = 0, ""
    while not select.select([stream], [], [], 1.0)[0]:
        now = _activity(process.pid)
        asleep = asleep + 1 if now and now == before else 0
        before = now
        if asleep >= (NAP_SECONDS if "nanosleep" in now else ASLEEP_SECONDS):
            return True
    return False


def _activity(pid: int) -> str:
    """What changes when a sleeping process has done anything; empty where it isn't asleep, or that can't be known."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        counts = Path(f"/proc/{pid}/io").read_text() + Path(f"/proc/{pid}/wchan").read_text()
    except (OSError, ValueError):
        return ""
    # a process that waits for a disk is in state D
    return f"{fields[10:12]} {counts}" if state == "S" else ""


def _send(stream: BinaryIO, data: bytes) -> None:
    stream.write(_HEADER.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes | None:
    """One message; None at the end of the stream."""
    head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    data = stream.read(_HEADER.unpack(head)[0])
    return data if len(data) == _HEADER.unpack(head)[0] else None


def serve() -> None:
    """What the helper does: answer requests from standard input on standard output, until there is none for a while."""
    global _serving
    _serving = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # what libraries print, and what they read, is not part of the conversation
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    _no_core()
    _end_with_parent()
    while sys.platform == "win32" or select.select([requests], [], [], IDLE_SECONDS)[0]:
        message = _receive(cast(BinaryIO, requests))
        if message is None:
            return
        folder, function, path, options = pickle.loads(message)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        give_time(path)
        try:
            answer = (True, function(path, **options))
        except GpuemError as error:
            answer = (False, error)
        _send(cast(BinaryIO, answers), pickle.dumps(answer, 5))


def _no_core() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _end_with_parent() -> None:
    """Where the parent is killed while HDF5 hangs here, nobody else would end this process."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(set_death_signal, signal.SIGHUP)


def give_time(path: Path) -> None:
    """Let the helper compute on: as long as it may take over one more file; nothing in other processes."""
    if not _serving:
        return
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        # the system ends a process that goes beyond
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        soft = int(time.process_time()) + 1 + CPU_SECONDS + path.stat().st_size // CPU_BYTES_PER_SECOND
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
