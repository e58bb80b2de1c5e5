"""Device arrays and pinned memory: CuPy's classes, as far as they are used."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from standin.device import CUDARuntimeError, Device, Operation, Storage
from standin.streams import Stream, Strict, current_stream, device


class Block:
    """Device memory with an owner: when the last array that holds it dies, it is given back."""

    def __init__(self, nbytes: int) -> None:
        self.device, self.nbytes = device(), nbytes
        self.storage = self.device.allocate(nbytes)
        weakref.finalize(self, self.device.free, self.storage, current_stream()._queue).atexit = False


class MemoryPointer(Strict):
    """A place in device memory. What it enqueues holds the bytes, never the block: nobody else keeps memory alive."""

    def __init__(self, block: Block | None, offset: int = 0) -> None:
        self._block, self._offset = block, offset
        self.ptr = block.storage.address + offset if block else 0

    @property
    def _storages(self) -> tuple[Storage, ...]:
        return (self._block.storage,) if self._block else ()

    def copy_from_host_async(self, mem: Any, size: int, stream: Stream | None = None) -> None:
        target, source = self.ptr, _address(mem)
        pinned = self._checked(size).pinned(source, size)
        if pinned:
            self._enqueue(stream, lambda: ctypes.memmove(target, source, size), pinned)
            return
        # what isn't pinned is copied aside during the call, as the driver does
        device().pageable_bytes += size
        aside = ctypes.string_at(source, size)
        self._enqueue(stream, lambda: ctypes.memmove(target, aside, size))

    def copy_to_host_async(self, mem: Any, size: int, stream: Stream | None = None) -> None:
        source, target = self.ptr, _address(mem)
        pinned = self._checked(size).pinned(target, size)
        self._enqueue(stream, lambda: ctypes.memmove(target, source, size), *((pinned,) if pinned else ()))
        if not pinned:
            # into memory that isn't pinned the driver copies before it returns
            device().pageable_bytes += size
            (stream or current_stream()).synchronize()

    def copy_from_device_async(self, src: MemoryPointer, size: int, stream: Stream | None = None) -> None:
        source, target = src.ptr, self.ptr
        src._checked(size)
        self._checked(size)
        self._enqueue(stream, lambda: ctypes.memmove(target, source, size), *src._storages)

    def memset_async(self, value: int, size: int, stream: Stream | None = None) -> None:
        target = self.ptr
        self._checked(size)
        self._enqueue(stream, lambda: ctypes.memset(target, value, size))

    def _checked(self, size: int) -> Device:
        """The device; refuses what reaches beyond the memory."""
        if not 0 <= size <= (self._block.nbytes - self._offset if self._block else 0):
            raise CUDARuntimeError(1)
        return device()

    def _enqueue(self, stream: Stream | None, work: Callable[[], Any], *more: Storage) -> None:
        device().enqueue((stream or current_stream())._queue, Operation(work, (*self._storages, *more)))


class ndarray(Strict):  # noqa: N801
    """A contiguous array in device memory."""

    def __init__(self, shape: Any, dtype: Any, data: MemoryPointer | None = None) -> None:
        self.shape = tuple(int(n) for n in (shape if isinstance(shape, tuple | list) else (shape,)))
        self.dtype = np.dtype(dtype)
        self.ndim, self.itemsize, self.size = len(self.shape), self.dtype.itemsize, math.prod(self.shape)
        self.nbytes = self.size * self.itemsize
        if self.dtype.kind not in "biufc" or any(n < 0 for n in self.shape):
            raise ValueError(f"no device array of shape {self.shape} and type {self.dtype}")
        self.data = data or MemoryPointer(Block(self.nbytes) if self.nbytes else None)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        place = (self.data.ptr, False)
        return {"shape": self.shape, "typestr": self.dtype.str, "data": place, "strides": None, "version": 3}

    def __getitem__(self, key: slice) -> ndarray:
        if not isinstance(key, slice) or key.step not in (None, 1) or not self.ndim:
            raise TypeError(f"the stand-in slices only the first axis, as [i:j], not [{key}]")
        start, stop, _ = key.indices(self.shape[0])
        count = max(0, stop - start)
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return self._at(start * row if count else 0, (count, *self.shape[1:]), self.dtype)

    def view(self, dtype: Any) -> ndarray:
        dtype = np.dtype(dtype)
        if dtype.itemsize == self.itemsize:
            return self._at(0, self.shape, dtype)
        last = self.shape[-1] * self.itemsize if self.ndim else 1
        if last % dtype.itemsize:
            raise ValueError(f"the last axis of {last} bytes can't be seen as {dtype}")
        return self._at(0, (*self.shape[:-1], last // dtype.itemsize), dtype)

    def reshape(self, *shape: Any) -> ndarray:
        wanted = [int(n) for n in (shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape)]
        if wanted.count(-1) == 1:
            wanted[wanted.index(-1)] = self.size // max(1, -math.prod(wanted))
        if math.prod(wanted) != self.size or min(wanted, default=0) < 0:
            raise ValueError(f"cannot reshape array of size {self.size} into shape {shape}")
        return self._at(0, tuple(wanted), self.dtype)

    def get(
        self, stream: Stream | None = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True
    ) -> np.ndarray:
        if order != "C" or not blocking or not (stream is None or isinstance(stream, Stream)):
            raise TypeError("the stand-in has only get(stream=None, out=None)")
        if out is None:
            out = np.empty(self.shape, self.dtype)
        elif out.dtype != self.dtype or out.shape != self.shape or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, the array {self.dtype} {self.shape}; both contiguous")
        target = stream or current_stream()
        if self.nbytes:
            self.data.copy_to_host_async(out.ctypes.data, self.nbytes, target)
        target.synchronize()
        return out

    def set(self, arr: np.ndarray, stream: Stream | None = None) -> None:
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype or arr.shape != self.shape:
            what = f"{arr.dtype} {arr.shape}" if isinstance(arr, np.ndarray) else type(arr).__name__
            raise ValueError(f"a device array {self.dtype} {self.shape} can't be set to {what}")
        arr = np.ascontiguousarray(arr)
        if self.nbytes:
            self.data.copy_from_host_async(arr.ctypes.data, self.nbytes, stream)

    def _at(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ndarray:
        return ndarray(shape, dtype, MemoryPointer(self.data._block, self.data._offset + offset))


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(shape, dtype)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    array = ndarray(shape, dtype)
    # in the current stream, as CuPy does: another stream must wait for it
    array.data.memset_async(0, array.nbytes)
    return array


def alloc_pinned_memory(size: int) -> Any:
    """Memory with the buffer protocol; longer than asked for, as CuPy's pool makes it."""
    rounded = 1 << max(ALIGNED_BITS, (size - 1).bit_length())
    storage = device().allocate_pinned(rounded)
    kind = type("PinnedMemoryPointer", (_Pinned, ctypes.c_uint8 * rounded), {"__len__": None, "__getitem__": None})
    pinned = kind.from_address(storage.address)
    pinned.ptr = storage.address
    weakref.finalize(pinned, device().free, storage, None).atexit = False
    return pinned


ALIGNED_BITS = 9


class _Pinned(Strict):
    """What pinned memory offers besides its buffer."""

    ptr: int


class MemoryPool(Strict):
    """What the default memory pool says."""

    def used_bytes(self) -> int:
        with device().locked():
            return device().live_bytes

    def total_bytes(self) -> int:
        with device().locked():
            return device().pool_bytes

    def free_all_blocks(self) -> None:
        device().free_pool()


def get_default_memory_pool() -> MemoryPool:
    device().require()
    return MemoryPool()


def _address(mem: Any) -> int:
    if isinstance(mem, ctypes.c_void_p):
        return mem.value or 0
    if type(mem) is int:
        return mem
    raise TypeError(f"host memory is an int or ctypes.c_void_p, not {type(mem).__name__}")
