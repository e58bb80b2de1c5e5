"""GPUDirect Storage: bytes of files straight into the memory of a GPU, through kvikio and NVIDIA's cuFile.

kvikio takes a detour through host memory, without a word, wherever cuFile or a file system isn't up to the direct way.
Nothing here does so silently: `mode` asks cuFile itself, `Reader` opens files with that detour forbidden, and `choose`
says in words what it took and why.

The direct way itself has not been run on a GPU yet: kvikio has been run into host memory only, and cuFile's answers
have been played by a stand-in.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, DeviceError, GpuemError, InputError, RecipeError
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import File
from gpuem.storage import gds_remote
from gpuem.storage.gds_errors import failure, words
from gpuem.storage.host import Files
from gpuem.storage.residency import cached_share

# a GPU's page; reads that start elsewhere are split by kvikio and take the detour in part
_PAGE = 4096
# below this, the cost of a read counts more than the way it takes
_LARGE = 1 << 20
# bytes that one of kvikio's threads reads at a time; its own 4 MiB are a quarter slower for large blocks
_TASK = 16 << 20
# kvikio's own default is a single thread, which leaves most of a fast device unused
_THREADS = 8
_COLD = 0.5
_FILES_LOOKED_AT = 16
_PATIENCE_SECONDS = 30.0
_DRIVER = Path("/proc/driver/nvidia/version")
_UDEV = Path("/run/udev")
_NOT_AVAILABLE = "GPUDirect Storage isn't available: {}. Ask for auto or for pinned memory to do without it"

# kvikio's setting is one for the whole process, so only one file is opened at a time
_setting = threading.Lock()

# What is asked of cuFile in a process of its own. The features behind byte 32 of CUfileDrvProps_t (bit 4: PCI P2PDMA,
# the direct way without the nvidia-fs module) are not among what kvikio hands on.
_QUESTION = """
import ctypes, json
import kvikio.cufile_driver as driver
driver.driver_open()
known = driver.properties
properties, p2pdma = ctypes.create_string_buffer(512), False
try:
    cufile = ctypes.CDLL("libcufile.so.0")
    cufile.cuFileDriverGetProperties.restype = ctypes.c_int64
    if cufile.cuFileDriverGetProperties(properties) & 0xFFFFFFFF == 0:
        p2pdma = bool(int.from_bytes(properties.raw[32:36], "little") >> 4 & 1)
except (OSError, AttributeError):
    pass
nvidia_fs = "%d.%d" % (known.major_version, known.minor_version) if known.is_gds_available else ""
print(json.dumps(["%d.%d" % driver.libcufile_version(), nvidia_fs, p2pdma, bool(known.allow_compat_mode)]))
"""


@dataclass(frozen=True)
class Mode:
    """Whether GPUDirect Storage works here, with what or why not, and a `Reader`'s threads (0 without kvikio)."""

    available: bool
    reason: str
    threads: int


def mode() -> Mode:
    """Whether GPUDirect Storage truly works on this machine; kvikio's compatibility mode doesn't count.

    Never raises and never hangs: cuFile is asked only where there is a driver, in a process of its own that gets half a
    minute, because opening cuFile without a GPU never ends. What it said is kept for the life of the process.
    """
    try:
        importlib.import_module("kvikio")
        defaults = importlib.import_module("kvikio.defaults")
        threads = _threads(defaults)
        obstacle = _obstacle(defaults)
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError, KeyError) as error:
        if getattr(error, "name", "") == "kvikio":
            return Mode(False, "kvikio isn't installed; install kvikio-cu13 (CUDA 13) or kvikio-cu12 (CUDA 12)", 0)
        return Mode(False, f"kvikio can't be used: {words(error)}", 0)
    if obstacle:
        return Mode(False, obstacle, threads)
    available, reason = _cufile()
    return Mode(available, reason, threads)


class Reading:
    """A read that is under way; made by `Reader.read`. One thread waits for it."""

    def __init__(self, reader: Reader, future: Any, target: Any, what: tuple[Place, int, int]) -> None:
        self._reader = reader
        self._future = future
        # kvikio writes to an address: the memory has to stay allocated for as long as it does
        self._target = target
        self._what = what
        self._error: GpuemError | None = None

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._future is None or bool(self._future.done())

    def wait(self) -> None:
        """Return when all bytes lie in the target; they may be used by any stream from then on.

        Raises
        ------
        DataError
            The device fails (ReadError), or the file ends too early.
        DeviceError
            The GPU fails.
        """
        if self._future is not None:
            path, offset, length = self._what
            try:
                got = self._future.get()
                if got != length:
                    self._error = DataError(
                        f"{path}: only {got} of {length} bytes at {offset} could be read; the file is truncated"
                    )
            except (RuntimeError, OSError) as error:
                self._error = failure(self._what, error)
                self._error.__cause__ = error
            self._future = self._target = None
            self._reader._under_way.discard(self)
        if self._error is not None:
            raise self._error


class Reader:
    """Reads blocks of the files of one source into the memory of a GPU; safe to share between threads.

    A target is written to from the moment `read` is called, by threads that know nothing of CUDA streams: whoever
    reuses one has to wait (an event, a synchronised stream) until the GPU is done with what it held before. kvikio
    itself waits for the null stream only. Blocks under 16 KiB are read before `read` returns, through host memory.

    Parameters
    ----------
    files : tuple of File
        Files as they were when their headers were read.
    direct : bool, optional
        Refuse what can't be read directly; of local files. Without it kvikio may, file by file and without saying so,
        read through host memory; that is for tests and measurements.

    Raises
    ------
    DeviceError
        GPUDirect isn't available.
    """

    def __init__(self, files: tuple[File, ...], *, direct: bool = True) -> None:
        self._files = files
        remote = all(file.remote for file in files)
        self._direct = direct and not remote
        self._handles: dict[int, Any] = {}
        self._under_way: set[Reading] = set()
        self._lock = threading.Lock()
        now = mode()
        # forbidding the detour where cuFile doesn't work would end in a loop inside cuFile
        if not now.threads or (self._direct and not now.available):
            raise DeviceError(_NOT_AVAILABLE.format(now.reason))
        self._kvikio = importlib.import_module("kvikio")
        self._defaults = importlib.import_module("kvikio.defaults")
        threads = max(now.threads, gds_remote.THREADS) if remote else now.threads
        if int(self._defaults.get("num_threads")) != threads:
            self._defaults.set("num_threads", threads)

    def __del__(self) -> None:
        self.close()

    def read(self, k: int, offset: int, length: int, target: Any) -> Reading:
        """Start to read `length` bytes at `offset` of file `k`; fast where both are multiples of 4096.

        Parameters
        ----------
        k, offset, length : int
            Which bytes.
        target : device array or numpy.ndarray
            Contiguous memory of at least `length` bytes, filled from its beginning.

        Raises
        ------
        InputError
            The file is gone, unreadable, or changed since its header was read.
        DataError
            The file doesn't hold these bytes, or the device fails.
        DeviceError
            cuFile can't read this file directly, or the GPU fails.
        """
        file = self._files[k]
        if offset < 0 or length < 0 or offset + length > file.size:
            raise DataError(
                f"{file.path}: a block of {length} bytes at {offset} isn't within its {file.size} bytes; the file is "
                "truncated or its index is damaged"
            )
        what = (file.path, offset, length)
        try:
            future = self.open(k).pread(target, size=length, file_offset=offset, task_size=_TASK)
        except (RuntimeError, OSError) as error:
            raise failure(what, error) from error
        reading = Reading(self, future, target, what)
        self._under_way.add(reading)
        return reading

    def close(self) -> None:
        """Wait for what is under way, then close all files. What a read that nobody waits for ends with is dropped."""
        for reading in tuple(self._under_way):
            with contextlib.suppress(GpuemError):
                reading.wait()
        with self._lock:
            for handle in self._handles.values():
                handle.close()
            self._handles.clear()

    def open(self, k: int) -> Any:
        """Open file `k`, as `read` does by itself: tells beforehand whether that works.

        Raises
        ------
        InputError
            The file is gone, unreadable, or changed since its header was read.
        DeviceError
            cuFile can't read this file directly.
        """
        with self._lock:
            if k not in self._handles:
                self._handles[k] = self._opened(self._files[k])
            return self._handles[k]

    def _opened(self, file: File) -> Any:
        if isinstance(file.path, Url):
            Files((file,)).check()
            return gds_remote.open_file(file, self._kvikio)
        try:
            # kvikio's own message doesn't say which file it is
            os.close(os.open(file.path, os.O_RDONLY))
        except OSError as error:
            raise InputError(f"{file.path}: {error.strerror}") from error
        compatibility = self._kvikio.CompatMode.OFF if self._direct else self._kvikio.CompatMode.AUTO
        try:
            with _setting, self._defaults.set({"compat_mode": compatibility}):
                handle = self._kvikio.CuFile(file.path, "r")
        except (RuntimeError, OSError) as error:
            raise DeviceError(
                f"{file.path}: cuFile can't read it straight into a GPU: {words(error)}; gdscheck -p lists the file "
                "systems from which it can"
            ) from error
        try:
            Files((file,)).check()
        except InputError:
            handle.close()
            raise
        return handle


def aligned(offset: NDArray[np.int64], length: NDArray[np.int64]) -> bool:
    """Whether blocks suit GPUDirect: all start on multiples of 4 KiB, and they are 1 MiB or larger on average."""
    return bool(offset.size and not (offset % _PAGE).any() and length.mean() >= _LARGE)


def choose(asked: str, files: tuple[File, ...], extents_aligned: bool) -> tuple[str, str]:
    """How bytes should reach the GPU, and why: to be said to the user.

    Parameters
    ----------
    asked : {"auto", "pinned", "gds"}
        "auto" takes GPUDirect where it is available, the files are cold and the blocks suit it: what lies in the page
        cache is faster through pinned memory, and small or unaligned blocks take the detour in any case.
    files : tuple of File
        The files to be read.
    extents_aligned : bool
        What `aligned` says of the blocks to be read.

    Returns
    -------
    kind, reason : str
        "pinned", "gds" or "kvikio" (remote files), and why in words.

    Raises
    ------
    DeviceError
        GPUDirect was asked for and isn't available.
    InputError
        A file is gone or changed.
    """
    if asked not in ("auto", "pinned", "gds"):
        raise RecipeError(f"the way to the GPU is {asked!r}; auto, pinned and gds are known")
    if asked == "pinned":
        return "pinned", "pinned memory was asked for"
    if any(file.remote for file in files):
        return gds_remote.choose(asked, files)
    now = mode()
    looked_at = files[:: max(1, len(files) // _FILES_LOOKED_AT)]
    obstacle = _refusal(looked_at) if now.available else now.reason
    if asked == "gds":
        if obstacle:
            raise DeviceError(_NOT_AVAILABLE.format(obstacle))
        return "gds", f"GPUDirect was asked for: {now.reason}"
    if obstacle:
        return "pinned", f"GPUDirect isn't available: {obstacle}"
    if not extents_aligned:
        return "pinned", "the blocks to be read are small or don't start on multiples of 4096 bytes"
    share = _cached(looked_at)
    if share is None:
        return "pinned", "the system doesn't say how much of the files lies in the page cache"
    if share >= _COLD:
        return "pinned", f"{share:.0%} of the files lie in the page cache, from where pinned memory is faster"
    return "gds", f"{share:.0%} of the files lie in the page cache, and GPUDirect works: {now.reason}"


def _threads(defaults: Any) -> int:
    """Threads to read with: as many as the user says, else at least `_THREADS`."""
    now = int(defaults.get("num_threads"))
    return now if "KVIKIO_NTHREADS" in os.environ else max(now, _THREADS)


def _obstacle(defaults: Any) -> str:
    """Why kvikio wouldn't even try GPUDirect; empty where it would. Nothing here starts cuFile."""
    if not _DRIVER.exists():
        return f"there is no NVIDIA driver ({_DRIVER} is missing)"
    if not defaults.is_compat_mode_preferred():
        return ""
    if getattr(defaults.get("compat_mode"), "name", "") == "ON":
        return "kvikio's compatibility mode is switched on; unset KVIKIO_COMPAT_MODE"
    if not os.access(_UDEV, os.R_OK):
        return f"cuFile needs {_UDEV}, which can't be read; into a container mount it by --volume {_UDEV}:{_UDEV}:ro"
    if importlib.import_module("kvikio.cufile_driver").libcufile_version() == (0, 0):
        return "kvikio finds no libcufile.so.0; install nvidia-cufile, or GPUDirect Storage with the CUDA toolkit"
    return "kvikio prefers its compatibility mode here, as it does in the Windows Subsystem for Linux"


@functools.cache
def _cufile() -> tuple[bool, str]:
    """What cuFile says of itself: whether the direct way is open, and by what."""
    # a relative path would mean another folder there
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)}
    command = [sys.executable, "-c", _QUESTION]
    try:
        # cuFile writes its log to the folder it is started in
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_PATIENCE_SECONDS
            )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return False, f"cuFile can't be opened: {words(last)}; gdscheck -p says more"
        version, nvidia_fs, p2pdma, may_detour = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return False, f"cuFile didn't answer within {_PATIENCE_SECONDS:g} s; gdscheck -p says more"
    except (OSError, ValueError, IndexError) as error:
        return False, f"cuFile can't be asked: {error}"
    if not (nvidia_fs or p2pdma):
        return False, "cuFile finds neither the nvidia-fs module nor PCI P2PDMA; load nvidia-fs, gdscheck -p says more"
    way = f"nvidia-fs {nvidia_fs}" if nvidia_fs else "PCI P2PDMA"
    detour = "; cuFile itself may still read through host memory (allow_compat_mode is on)"
    return True, f"cuFile {version} with {way}{detour if may_detour else ''}"


def _refusal(files: tuple[File, ...]) -> str:
    """Why one of the files can't be read directly; empty where all can."""
    try:
        with contextlib.closing(Reader(files)) as reader:
            for k in range(len(files)):
                reader.open(k)
    except DeviceError as error:
        return str(error)
    return ""


def _cached(files: tuple[File, ...]) -> float | None:
    """Share of the files' bytes that lie in the page cache; None where it can't be known."""
    shares = [cached_share(str(file.path)) for file in files]
    if None in shares:
        return None
    return float(np.average(np.array(shares, float), weights=[max(1, file.size) for file in files]))
