"""Bytes of files in host memory, wherever the files are.

Local ones are read with `preadv` into memory that stays in the caches, and mapped for Fortran order only; remote ones
are fetched ahead (`gpuem.storage.remote`).
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, GpuemError, InputError, ReadError
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import File
from gpuem.formats.stores import Facts, refuse_changed
from gpuem.storage.remote import Ahead

# over a gap of so many bytes two reads cost more than one
GAP_NBYTES = 1 << 16
# the file isn't there, or isn't for us: nothing changes by trying again
_FOR_GOOD = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP})
_REMEDY = "the device, the network or the server fails; try again, or copy the file elsewhere"


class Files:
    """The files of one source, opened when first used; safe to share between threads.

    Nothing but `files` travels to another process: there they are opened anew.

    Parameters
    ----------
    files : tuple of File
        Files as they were when their headers were read.

    Attributes
    ----------
    one_at_a_time : threading.Lock
        For sources that only one thread may ask.
    """

    def __init__(self, files: tuple[File, ...]) -> None:
        self._files = files
        self._open_files: dict[int, _Descriptor] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._ahead = Ahead(files)
        self._lock = threading.Lock()
        self._spent = threading.local()
        self.one_at_a_time = threading.Lock()

    def __reduce__(self) -> tuple[type[Files], tuple[tuple[File, ...]]]:
        return Files, (self._files,)

    def check(self) -> None:
        """Raise InputError where a file is gone or changed since its header was read."""
        for file in self._files:
            try:
                _refuse_changed(file, file.path.stat())
            except OSError as error:
                raise _unopened(file.path, error) from error

    def path(self, k: int) -> Place:
        """Path or URL of file `k`."""
        return self._files[k].path

    def remote(self, k: int) -> bool:
        """Whether file `k` comes over the network: all of a read fails there, or nothing."""
        return self._files[k].remote

    def view(self, k: int) -> NDArray[np.uint8]:
        """All bytes of file `k`, mapped read-only: nothing is read before it is touched.

        Where the file becomes shorter, or its device fails, touching them ends the process.

        Raises
        ------
        InputError
            The file is gone, unreadable, or changed since its header was read.
        ReadError
            The device or the network fails.
        """
        descriptor = self._descriptor(k)
        with self._lock:
            if k not in self._maps:
                self._maps[k] = mmap.mmap(descriptor.number, 0, prot=mmap.PROT_READ)
            return np.frombuffer(self._maps[k], np.uint8)

    def read(self, k: int, offset: int, length: int) -> NDArray[np.uint8]:
        """Copy `length` bytes at `offset` of file `k`; raises like `read_into`."""
        out = np.empty(length, np.uint8)
        self.read_into(k, offset, out)
        return out

    def read_into(self, k: int, offset: int, out: NDArray[np.uint8]) -> None:
        """Copy bytes from `offset` of file `k` on, as many as `out` holds.

        Raises
        ------
        InputError
            The file is gone, unreadable, or changed since its header was read.
        ReadError
            The device or the network fails.
        DataError
            The file ends too early.
        """
        started = time.perf_counter()
        try:
            if self._files[k].remote:
                self._ahead.read_into(k, offset, out)
            else:
                self._read_local(k, offset, out)
        finally:
            self._spent.seconds = self.read_seconds() + time.perf_counter() - started

    def read_seconds(self) -> float:
        """Seconds that the calling thread has spent in reading so far; it only grows."""
        return float(getattr(self._spent, "seconds", 0.0))

    def will_need(self, k: int, offset: int, length: int) -> None:
        """Ask for these bytes to be fetched in the background, so that reading overlaps computing."""
        if self._files[k].remote:
            self._ahead.announce(k, np.array([offset]), np.array([length]))
            return
        descriptor = self._descriptor(k)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor.number, offset, length, os.POSIX_FADV_WILLNEED)

    def announce(self, k: int, offset: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Say which ranges of file `k` will be read next: remote ones are fetched together, many at a time."""
        if self._files[k].remote:
            self._ahead.announce(k, offset, length)

    def release(self, k: int, offset: int, length: int) -> None:
        """Give back mapped pages that were used; the page cache keeps them, this process doesn't."""
        mapped = self._maps.get(k)
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if mapped is not None and last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def reopen(self) -> None:
        """Let the next read open its file anew, as it must where a server came back and old handles are stale.

        Reads that are under way end with the handle they have. Arrays handed out by `view` keep their mapping alive.
        """
        with self._lock:
            self._open_files.clear()
            self._maps.clear()
        self._ahead.forget()

    def close(self) -> None:
        """Close all files; the next read would open them anew."""
        self.reopen()

    def _descriptor(self, k: int) -> _Descriptor:
        with self._lock:
            if k not in self._open_files:
                file = self._files[k]
                assert not isinstance(file.path, Url)
                try:
                    opened = _Descriptor(file.path)
                    now = os.fstat(opened.number)
                except OSError as error:
                    raise _unopened(file.path, error) from error
                _refuse_changed(file, now)
                self._open_files[k] = opened
            return self._open_files[k]

    def _read_local(self, k: int, offset: int, out: NDArray[np.uint8]) -> None:
        descriptor = self._descriptor(k)
        length, done = out.size, 0
        while done < length:
            try:
                got = os.preadv(descriptor.number, [out[done:].data], offset + done)
            except OSError as error:
                raise ReadError(
                    f"{self._files[k].path}: reading {length} bytes at {offset}: {error.strerror}; {_REMEDY}"
                ) from error
            if got == 0:
                raise DataError(
                    f"{self._files[k].path}: ends {length - done} bytes before the end of a block of {length} bytes "
                    f"at {offset}; the file is truncated or its index is damaged"
                )
            done += got


class _Descriptor:
    """An open file, closed when nobody holds it any more: who is reading still does when it is let go."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # at the end of the process modules are gone before the last of these
        if hasattr(self, "number"):
            close(self.number)


def _unopened(path: Place, error: OSError) -> GpuemError:
    """Why a file can't be opened: for good, or as things are now."""
    if error.errno == errno.ENOENT:
        return InputError(f"{path}: is gone since it was opened")
    if error.errno in _FOR_GOOD:
        return InputError(f"{path}: {error.strerror}")
    return ReadError(f"{path}: can't be opened: {error.strerror}; {_REMEDY}")


def _refuse_changed(file: File, now: os.stat_result | Facts) -> None:
    if isinstance(now, Facts):
        refuse_changed(str(file.path), Facts(file.size, file.mtime_ns, file.etag), now)
        return
    if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
        raise InputError(
            f"{file.path}: changed since it was opened ({file.size} bytes then, {now.st_size} now); "
            "wait until it is written completely and open it again"
        )
