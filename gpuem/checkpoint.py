"""Finished shards on disk, as they end: what a run that was stopped has not to do again.

A store is a folder that one process writes:

    masks.npy, images.npy, moments.npy, fit-0.npy, ...   one row per scan position, written in place; NumPy opens them
    sums.bin      for each shard its positions and its images over frames, one shard after another
    done.jsonl    one line per finished shard, with a checksum over all of that; written last

Whatever a crash tears, no line says it is finished or its checksum says that it isn't: such shards are run again. No
two processes write one file: network file systems write whole pages, and would mix neighbours' rows.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Lost, Sums
from gpuem.engine import Job, Partial
from gpuem.errors import OutputError

Array = NDArray[Any]


class Store:
    """The finished shards that one process wrote.

    Parameters
    ----------
    folder : path
        The store; it is created by `begin`.
    job : Job
        The run they belong to.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder
        self._rows = _row_arrays(job)
        self._images = job.prepared.shape
        self._dtype = job.prepared.dtype
        self._positions = job.wanted.size
        self._files: dict[str, BinaryIO] = {}
        self._starts: dict[str, int] = {}
        self.finished: dict[int, dict[str, Any]] = {}

    def begin(self) -> None:
        """Create the files, or open those that are there, to write on.

        Raises
        ------
        OutputError
            There is no room for the maps.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        needed = sum(self._positions * math.prod(shape) * dtype.itemsize for shape, dtype in self._rows.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free and not self.finished:
            raise OutputError(
                f"{self.folder}: finished shards need {needed / 1e6:,.0f} MB of disk and {free / 1e6:,.0f} MB are free; "
                "make room, or choose another [output] path"
            )
        for name, (shape, dtype) in self._rows.items():
            path = self.folder / f"{name}.npy"
            if not path.exists():
                _create(path, (self._positions, *shape), dtype)
        for name in (*(f"{name}.npy" for name in self._rows), "sums.bin", "done.jsonl"):
            path = self.folder / name
            path.touch()
            # what a crash left of a line is taken off, so that the next one begins at its place
            if name == "done.jsonl":
                os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
            self._open(name, "r+b")
        for name in ("sums.bin", "done.jsonl"):
            self._files[name].seek(0, os.SEEK_END)

    def look(self) -> None:
        """Find out which shards are finished, without checking them."""
        path = self.folder / "done.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self.finished[int(record["shard"])] = record
            except (ValueError, KeyError, TypeError):
                continue

    def verify(self) -> list[int]:
        """Drop shards whose checksum doesn't fit; returns them."""
        damaged = []
        for shard in sorted(self.finished):
            try:
                fits = _checksum(self.read(shard)) == self.finished[shard]["check"]
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                fits = False
            if not fits:
                damaged.append(shard)
                del self.finished[shard]
        return damaged

    def write(self, partial: Partial) -> None:
        """Keep a finished shard.

        Raises
        ------
        OSError
            The disk is full or gone.
        """
        sums = partial.sums
        for name, rows in _arrays_of(sums).items():
            self._write_rows(name, partial.positions, rows)
        log = self._files["sums.bin"]
        at = log.tell()
        for array in (partial.positions, sums.total, sums.maximum):
            log.write(_bytes(array))
        log.flush()
        record = {
            "shard": partial.shard,
            "check": _checksum(partial),
            "at": at,
            "frames": partial.positions.size,
            "total": [list(sums.total.shape), sums.total.dtype.str],
            "maximum": [list(sums.maximum.shape), sums.maximum.dtype.str],
            "lost": [[_runs(item.indices), item.message, item.broken, item.reading] for item in partial.lost],
            "seconds": {stage: round(seconds, 6) for stage, seconds in partial.seconds.items()},
            "worker": partial.worker,
            "began": partial.began,
            "ended": partial.ended,
        }
        done = self._files["done.jsonl"]
        done.write(json.dumps(record).encode() + b"\n")
        done.flush()
        self.finished[partial.shard] = record

    def read(self, shard: int) -> Partial:
        """A finished shard, as it was when it ended."""
        record = self.finished[shard]
        log = self._open("sums.bin")
        at, frames = int(record["at"]), int(record["frames"])
        positions = _from(log, at, (frames,), np.dtype(np.int64))
        at += positions.nbytes
        images = []
        for name in ("total", "maximum"):
            shape, dtype = record[name]
            images.append(_from(log, at, tuple(shape), np.dtype(dtype)))
            at += images[-1].nbytes
        rows = {name: self._read_rows(name, positions) for name in self._rows}
        fits = tuple(rows[name] for name in self._rows if name.startswith("fit-"))
        sums = Sums(rows["masks"], rows["images"], rows["moments"], images[0], images[1], fits)
        lost = tuple(
            Lost(np.concatenate([np.arange(a, b) for a, b in runs]), message, broken, reading)
            for runs, message, broken, reading in record["lost"]
        )
        times = record["worker"], record["began"], record["ended"]
        return Partial(shard, positions, sums, lost, dict(record["seconds"]), *times)

    def close(self) -> None:
        """Bring all that was written to the disk, close the files."""
        for file in self._files.values():
            if file.writable():
                file.flush()
                os.fsync(file.fileno())
            file.close()
        self._files.clear()

    def _write_rows(self, name: str, positions: NDArray[np.int64], rows: Array) -> None:
        if not rows.size:
            return
        descriptor, width = self._files[f"{name}.npy"].fileno(), rows[0].nbytes
        for first, last in _stretches(positions):
            data = _bytes(rows[first:last])
            at = self._starts[name] + int(positions[first]) * width
            written = 0
            while written < len(data):
                count = os.pwrite(descriptor, data[written:], at + written)
                if count == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += count

    def _read_rows(self, name: str, positions: NDArray[np.int64]) -> Array:
        shape, dtype = self._rows[name]
        out = np.empty((positions.size, *shape), dtype)
        if out.size:
            file = self._open(f"{name}.npy")
            for first, last in _stretches(positions):
                at = self._starts[name] + int(positions[first]) * out[0].nbytes
                out[first:last] = _from(file, at, out[first:last].shape, dtype)
        return out

    def _open(self, name: str, mode: str = "rb") -> BinaryIO:
        if name not in self._files:
            file = cast(BinaryIO, (self.folder / name).open(mode))
            self._files[name] = file
            if name.endswith(".npy"):
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                self._starts[name.removesuffix(".npy")] = file.tell()
        return self._files[name]


def nbytes(job: Job) -> int:
    """Bytes of disk that the finished shards of a run take, at most."""
    rows = sum(math.prod(shape) * dtype.itemsize for shape, dtype in _row_arrays(job).values()) + 8
    weights = job.prepared.weights
    image = math.prod(job.prepared.shape) * (8 * weights.total + job.prepared.dtype.itemsize * weights.maximum)
    return int(job.wanted.size * rows + len(job.plan.shards) * (image + 512))


def _row_arrays(job: Job) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and type of a row of everything that is kept per scan position."""
    weights, wide = job.prepared.weights, np.dtype(job.prepared.wide)
    return {
        "masks": ((len(weights.masks),), wide),
        "images": ((len(weights.images),), np.dtype(np.float64)),
        "moments": ((len(weights.moments), 3), wide),
        **{f"fit-{k}": ((fit.columns,), np.dtype(np.float32)) for k, fit in enumerate(weights.fits)},
    }


def _arrays_of(sums: Sums) -> dict[str, Array]:
    return {
        "masks": sums.masks,
        "images": sums.images,
        "moments": sums.moments,
        **{f"fit-{k}": rows for k, rows in enumerate(sums.fits)},
    }


def _create(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """An array on disk, of which nothing is written yet: the system reserves what is used."""
    made = path.with_suffix(".new")
    with made.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + math.prod(shape) * dtype.itemsize)
    made.rename(path)


def _from(file: BinaryIO, at: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    out = np.empty(shape, dtype)
    if out.size:
        data = os.pread(file.fileno(), out.nbytes, at)
        if len(data) != out.nbytes:
            raise ValueError(f"{file.name}: ends too early")
        out = np.frombuffer(data, dtype).reshape(shape)
    return out


def _bytes(array: Array) -> memoryview:
    """The bytes of an array, without a copy where that can be had."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _stretches(positions: NDArray[np.int64]) -> Iterable[tuple[int, int]]:
    """First and end row of positions that follow one another."""
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    ends = [0, *cuts.tolist(), positions.size]
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def _runs(indices: NDArray[np.int64]) -> list[list[int]]:
    return [[int(indices[a]), int(indices[b - 1]) + 1] for a, b in _stretches(indices)]


def _checksum(partial: Partial) -> int:
    """Checksum of all that a shard found."""
    sums, lost = partial.sums, [[item.indices.tolist(), item.message, item.broken] for item in partial.lost]
    check = zlib.crc32(json.dumps([partial.shard, lost]).encode())
    for array in (partial.positions, *_arrays_of(sums).values(), sums.total, sums.maximum):
        check = zlib.crc32(_bytes(array), check)
    return check
