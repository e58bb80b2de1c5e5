"""Fourier transforms: cupy.fft by NumPy, as operations in the current stream, with the memory that cuFFT takes.

Only what runs through cuFFT alone: a type that has to be converted, a scale, a transpose would be kernels of CuPy's
own, which gpuem doesn't use.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from standin.device import Device, Operation
from standin.memory import Block, empty, ndarray
from standin.streams import current_stream, device


class CuFFTError(RuntimeError):
    """An error of cuFFT."""

    def __init__(self, result: int) -> None:
        self.result = result
        super().__init__({2: "CUFFT_ALLOC_FAILED", 5: "CUFFT_INTERNAL_ERROR", 8: "CUFFT_INVALID_SIZE"}[result])


# device -> (transform, shape) -> scratch, which lives as long as CuPy's cache of plans does; of one size that cuFFT's
# manual allows: a complex number per pixel
_plans: weakref.WeakKeyDictionary[Device, dict[tuple[str, tuple[int, ...]], Block]] = weakref.WeakKeyDictionary()


def getVersion() -> int:  # noqa: N802
    return 12000


def plans() -> list[tuple[str, tuple[int, ...]]]:
    """The plans of the device of this test."""
    return list(_plans.get(device(), {}))


def _work(kind: str, shape: tuple[int, ...]) -> Block:
    kept = _plans.setdefault(device(), {})
    if (kind, shape) not in kept:
        kept[kind, shape] = Block(8 * math.prod(shape))
    return kept[kind, shape]


def _seen(array: ndarray) -> np.ndarray:
    """The bytes of a device array as NumPy sees them; while an operation runs."""
    content = (ctypes.c_uint8 * array.nbytes).from_address(array.data.ptr)
    return np.frombuffer(content, array.dtype).reshape(array.shape)


def _enqueue(source: ndarray, out: ndarray, work: Block, transform: Any) -> ndarray:
    # views hold no blocks: only the operation's bytes live on until it has run
    given, found = _seen(source), _seen(out)

    def run() -> None:
        ctypes.memset(work.storage.address, 0xEE, work.nbytes)
        with np.errstate(all="ignore"):
            found[...] = transform(given)
        if source_is_lost:
            given.view(np.uint8)[...] = 0xEE

    source_is_lost = given.dtype.kind == "c"
    touched = (*source.data._storages, *out.data._storages, work.storage)
    device().enqueue(current_stream()._queue, Operation(run, touched))
    return out


def rfft2(a: ndarray, s: Any = None, axes: tuple[int, int] = (-2, -1), norm: str | None = None) -> ndarray:
    if not isinstance(a, ndarray) or a.dtype != np.float32 or a.ndim != 3 or s is not None or norm or axes != (-2, -1):
        raise TypeError("the stand-in has only rfft2 of float32 (n, y, x), unscaled: all else is more than cuFFT")
    out = empty((*a.shape[:2], a.shape[2] // 2 + 1), np.complex64)
    return _enqueue(a, out, _work("R2C", a.shape), lambda given: np.fft.rfft2(given).astype(np.complex64, copy=False))


def irfft2(
    a: ndarray, s: tuple[int, int] | None = None, axes: tuple[int, int] = (-2, -1), norm: str | None = None
) -> ndarray:
    fits = isinstance(a, ndarray) and a.dtype == np.complex64 and a.ndim == 3 and axes == (-2, -1)
    if not fits or norm != "forward" or s is None or (a.shape[1], a.shape[2]) != (s[0], s[1] // 2 + 1):
        raise TypeError("the stand-in has only irfft2 of complex64 (n, y, x // 2 + 1) to s, unscaled: norm='forward'")
    # cuFFT spoils what it is given: CuPy gives it a copy
    copy = empty(a.shape, a.dtype)
    copy.data.copy_from_device_async(a.data, a.nbytes)
    out = empty((a.shape[0], *s), np.float32)
    scale = math.prod(s)
    return _enqueue(copy, out, _work("C2R", out.shape), lambda given: np.fft.irfft2(given, s=s) * np.float32(scale))
