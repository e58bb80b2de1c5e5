"""Bytes of files in host memory: mapped where they can be used in place, read with `preadv` where they are decoded."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, InputError
from gpuem.formats.source import File


class Files:
    """The files of one source, opened when first used; safe to share between threads.

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
        self._descriptors: dict[int, int] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self.one_at_a_time = threading.Lock()

    def __del__(self) -> None:
        self.close()

    def check(self) -> None:
        """Raise InputError where a file is gone or changed since its header was read."""
        for file in self._files:
            _refuse_changed(file, file.path.stat() if file.path.exists() else None)

    def path(self, k: int) -> Path:
        """Path of file `k`."""
        return self._files[k].path

    def view(self, k: int) -> NDArray[np.uint8]:
        """All bytes of file `k`, mapped read-only: nothing is read before it is touched.

        Raises
        ------
        InputError
            The file is gone, unreadable, or changed since its header was read.
        """
        with self._lock:
            if k not in self._maps:
                self._maps[k] = mmap.mmap(self._open(k), 0, prot=mmap.PROT_READ)
            return np.frombuffer(self._maps[k], np.uint8)

    def read(self, k: int, offset: int, length: int) -> NDArray[np.uint8]:
        """Copy `length` bytes at `offset` of file `k`.

        Raises
        ------
        InputError
            The file is gone, unreadable, or changed since its header was read.
        DataError
            The device fails, or the file ends too early.
        """
        out = np.empty(length, np.uint8)
        self.read_into(k, offset, out)
        return out

    def read_into(self, k: int, offset: int, out: NDArray[np.uint8]) -> None:
        """Copy bytes from `offset` of file `k` on, as many as `out` holds; raises like `read`."""
        with self._lock:
            descriptor = self._open(k)
        length, done = out.size, 0
        while done < length:
            try:
                got = os.preadv(descriptor, [out[done:].data], offset + done)
            except OSError as error:
                raise DataError(
                    f"{self._files[k].path}: reading {length} bytes at {offset}: {error.strerror}"
                ) from error
            if got == 0:
                raise DataError(
                    f"{self._files[k].path}: ends {length - done} bytes before the end of a block of {length} bytes "
                    f"at {offset}; the file is truncated or its index is damaged"
                )
            done += got

    def will_need(self, k: int, offset: int, length: int) -> None:
        """Ask the system to fetch these bytes in the background, so that reading overlaps computing."""
        with self._lock:
            descriptor = self._open(k)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def release(self, k: int, offset: int, length: int) -> None:
        """Give back mapped pages that were used; the page cache keeps them, this process doesn't."""
        mapped = self._maps.get(k)
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if mapped is not None and last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Close all files. Arrays handed out by `view` keep their mapping alive for as long as they live."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._maps.clear()

    def _open(self, k: int) -> int:
        if k not in self._descriptors:
            file = self._files[k]
            try:
                descriptor = os.open(file.path, os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{file.path}: {error.strerror}") from error
            self._descriptors[k] = descriptor
            _refuse_changed(file, os.fstat(descriptor))
        return self._descriptors[k]


def _refuse_changed(file: File, now: os.stat_result | None) -> None:
    if now is None:
        raise InputError(f"{file.path}: is gone since it was opened")
    if (now.st_size, now.st_mtime_ns) != (file.size, file.mtime_ns):
        raise InputError(
            f"{file.path}: changed since it was opened ({file.size} bytes then, {now.st_size} now); "
            "wait until it is written completely and open it again"
        )
