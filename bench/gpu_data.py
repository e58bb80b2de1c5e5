"""Part of bench/gpu.py: the data. One file of sparse counts, half of it as bitshuffle-LZ4 HDF5, and all on the GPU."""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import gpuem
from gpuem.executors import local

BLOCK = 256
# pixels of a block of bitshuffle as its library makes them
SHUFFLED = 4096
FILTER, MAJOR, MINOR, LZ4 = 32008, 0, 4, 2


class NotMeasuredError(Exception):
    """Something that a section needs isn't there; the record says what."""


@dataclass
class Bench:
    """What all sections share.

    Parameters
    ----------
    folder : Path
        Where data are written.
    frames : int
        Number of frames, uint16.
    shape : tuple of int
        Detector shape (y, x).
    repeats : int
        How often each thing is timed.
    """

    folder: Path
    frames: int
    shape: tuple[int, int]
    repeats: int
    checks: list[str] = field(default_factory=list)

    @property
    def frame_nbytes(self) -> int:
        """Bytes of a frame."""
        return 2 * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all frames."""
        return self.frames * self.frame_nbytes

    def check(self, what: str, passed: Any) -> None:
        """Note a check that passed; nothing is timed after one that didn't."""
        if not passed:
            raise AssertionError(f"wrong result: {what}")
        self.checks.append(what)

    @functools.cached_property
    def raw(self) -> Path:
        """All frames, one after another."""
        path = self.folder / "frames.raw"
        write_counts(path, self.frames, self.shape)
        return path

    @functools.cached_property
    def truth(self) -> np.ndarray:
        """All frames, mapped."""
        return np.memmap(self.raw, np.uint16, "r").reshape(self.frames, *self.shape)

    @functools.cached_property
    def plain(self) -> gpuem.Dataset:
        """The raw file as a data set."""
        return gpuem.open(self.raw, scan=(self.frames // 16, 16), frame=self.shape, dtype="uint16")

    @functools.cached_property
    def compressed(self) -> tuple[gpuem.Dataset, str]:
        """The first half of the frames in HDF5, bitshuffle-LZ4, and what encoded them."""
        path = self.folder / "frames.h5"
        encoder = write_bitshuffle_lz4(path, self.truth[: self.frames // 2])
        return gpuem.open(path), encoder

    @functools.cached_property
    def pixels(self) -> Any:
        """All pixels on the device, in one flat array."""
        return upload(self.truth.reshape(-1))


def upload(values: np.ndarray) -> Any:
    """A flat array on the device."""
    import cupy

    array = cupy.empty(values.shape, values.dtype)
    step = (256 << 20) // values.itemsize
    for start in range(0, values.size, step):
        part = np.ascontiguousarray(values[start : start + step])
        array[start : start + part.size].set(part)
    cupy.cuda.Stream.null.synchronize()
    return array


def same(device_array: Any, expected: np.ndarray) -> bool:
    """Whether rows on the device equal those in host memory, compared a part at a time."""
    step = max(1, (256 << 20) // (expected.nbytes // len(expected)))
    return all(
        np.array_equal(device_array[k : k + step].get(), expected[k : k + step]) for k in range(0, len(expected), step)
    )


def write_counts(path: Path, frames: int, shape: tuple[int, int]) -> None:
    """Sparse Poisson counts around a bright middle; every block is the first one shifted by another distance."""
    y, x = np.indices(shape)
    distance2 = ((y / shape[0] - 0.45) ** 2 + (x / shape[1] - 0.55) ** 2) * 40
    block = np.random.default_rng(1).poisson(0.2 + 3 * np.exp(-distance2), (min(BLOCK, frames), *shape))
    flat = block.astype(np.uint16).reshape(-1)
    with path.open("wb") as stream:
        for k in range(0, frames, BLOCK):
            shifted = np.roll(flat, 10007 * (k // BLOCK))
            # a hot pixel, which is where sums in too few bits go wrong
            shifted[k // BLOCK % shifted.size] = 65535
            stream.write(shifted[: (frames - k) * shape[0] * shape[1]].tobytes())


def write_bitshuffle_lz4(path: Path, frames: np.ndarray) -> str:
    """Frames as chunks of an HDF5 file; returns what encoded them: hdf5plugin, or the encoder below."""
    import h5py

    try:
        import hdf5plugin
    except ImportError:
        return _write_with_own_encoder(path, frames)
    with h5py.File(path, "w") as file:
        options = dict(hdf5plugin.Bitshuffle())
        data = file.create_dataset("data", frames.shape, np.uint16, chunks=(1, *frames.shape[1:]), **options)
        for k in range(0, len(frames), BLOCK):
            data[k : k + BLOCK] = frames[k : k + BLOCK]
    return f"hdf5plugin {hdf5plugin.version}"


def _write_with_own_encoder(path: Path, frames: np.ndarray) -> str:
    import h5py

    name, compress = lz4()
    # where the filter itself is there, it puts version and size in front of what it is given
    parameters = (0, LZ4) if h5py.h5z.filter_avail(FILTER) else (MAJOR, MINOR, 2, 0, LZ4)
    with h5py.File(path, "w") as file, ThreadPoolExecutor(local.cpus()) as pool:
        data = file.create_dataset(
            "data", frames.shape, np.uint16, chunks=(1, *frames.shape[1:]), compression=FILTER,
            compression_opts=parameters, allow_unknown_filter=True,
        )  # fmt: skip
        for first in range(0, len(frames), BLOCK):
            some = frames[first : first + BLOCK]
            for k, chunk in enumerate(pool.map(lambda frame: bitshuffle_lz4(frame, compress), some)):
                data.id.write_direct_chunk((first + k, 0, 0), chunk)
    return f"the encoder of this benchmark, LZ4 by {name}"


def lz4() -> tuple[str, Callable[[bytes], bytes]]:
    """Name of a library that is there, and its function that compresses one LZ4 block without a header."""
    known: dict[str, Callable[[Any, bytes], bytes]] = {
        "imagecodecs": lambda library, data: library.lz4_encode(data),
        # the length in front of the block is numcodecs' own
        "numcodecs.lz4": lambda library, data: bytes(library.compress(data))[4:],
        "pyarrow": lambda library, data: library.compress(data, codec="lz4_raw", asbytes=True),
    }
    for name, compress in known.items():
        try:
            return name, functools.partial(compress, importlib.import_module(name))
        except ImportError:
            continue
    raise NotMeasuredError(f"nothing here writes LZ4: install hdf5plugin, or one of {', '.join(known)}")


def bitshuffle_lz4(frame: np.ndarray, compress: Callable[[bytes], bytes]) -> bytes:
    """One uint16 frame, of whole eights of pixels, as HDF5 filter 32008 stores it."""
    flat = frame.reshape(-1)
    parts = [struct.pack(">QI", flat.nbytes, 2 * SHUFFLED)]
    for start in range(0, flat.size, SHUFFLED):
        pixels = flat[start : start + SHUFFLED]
        bits = np.unpackbits(pixels.view(np.uint8).reshape(-1, 2), axis=1, bitorder="little")
        packed = compress(np.packbits(bits.T, axis=1, bitorder="little").tobytes())
        parts += [struct.pack(">I", len(packed)), packed]
    return b"".join(parts)


def merlin_12bit(frames: np.ndarray) -> np.ndarray:
    """Frames of one chip as a Merlin detector writes them raw: big-endian words of four pixels, the last one first."""
    count, height, width = frames.shape
    words = frames.reshape(count, height, width // 4, 4)[..., ::-1]
    return np.ascontiguousarray(words).astype(">u2").view(np.uint8).reshape(-1)
