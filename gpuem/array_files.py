"""Arrays at places of files: read and written whole, as bytes."""

from __future__ import annotations

import errno
import io
import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = bytes | memoryview


def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[bytes, int]:
    """How the file of an array begins, and bytes of the array itself."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, header)
    return made.getvalue(), math.prod(shape) * dtype.itemsize


def write_at(file: int, data: Bytes, at: int) -> None:
    """Write all bytes from a place of a file on; raises OSError where the disk is full."""
    written = 0
    while written < len(data):
        count = os.pwrite(file, data[written:], at + written)
        if count == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += count


def read_at(file: int, at: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """The array at a place of a file; raises ValueError where the file ends too early."""
    out = np.empty(shape, dtype)
    target, done = bytes_of(out), 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], at + done)
        if count == 0:
            raise ValueError(f"ends {len(target) - done} bytes too early")
        done += count
    return out


def bytes_of(array: Array) -> memoryview:
    """The bytes of an array, without a copy where that can be had."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
