"""Finished shards on disk, as they end: what a run that was stopped has not to do again.

A store is a folder that one process writes:

    masks.npy, images.npy, moments.npy, fit-0.npy, ...   one row per scan position, written in place; NumPy opens them
    sums.bin       for each shard its positions and its images over frames, one shard after another
    pending.jsonl  one line per finished shard, with a checksum over all of that; written at once
    done.jsonl     the same lines, moved there when all that they tell of is on the disk

Whatever a crash tears, no line says it is finished or its checksum says that it isn't: such shards are run again. What
a process left that was killed counts, as the system still writes it; after a power loss ``done.jsonl`` names no shard
whose rows are not there. Syncing takes `SYNC_SHARE` of the time at most. No two processes write one file: network file
systems write whole pages, and would mix neighbours' rows.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import ownership, shard_records
from gpuem.array_files import Array, Bytes, bytes_of, npy_header, read_at, write_at
from gpuem.atomic import sync_folder
from gpuem.backends import Lost, Sums
from gpuem.engine import Job, Partial
from gpuem.errors import InputError, OutputError
from gpuem.regular_files import open_regular, read_regular

# stretches of rows; and how many times the rows themselves may be read and written for the sake of fewer calls
MANY = 16
# rows are synced so often, in seconds, or less often where that would take more than this share of the time
SYNC_SECONDS, SYNC_SHARE = 0.5, 0.05
_DONE, _PENDING, _SUMS = "done.jsonl", "pending.jsonl", "sums.bin"
_NOTHING = np.empty(0, np.int64)


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
        self._headers = {
            name: npy_header((job.wanted.size, *shape), dtype) for name, (shape, dtype) in self._rows.items()
        }
        self._images = _image_arrays(job)
        self._nbytes = nbytes(job)
        self._positions = job.wanted.size
        self._shards = tuple(shard.frames for shard in job.plan.shards)
        self._files: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        # lines that are not in the list of what is on the disk yet; and when they are brought there
        self._pending: dict[int, bytes] = {}
        self._due = 0.0
        self._syncing = threading.Lock()
        self._failure: OSError | None = None
        self.finished: dict[int, dict[str, Any]] = {}

    def begin(self) -> None:
        """Create the files, or open those that are there, to write on.

        Raises
        ------
        OutputError
            There is no room for them.
        """
        self._claim()
        free = shutil.disk_usage(self.folder).free
        if self._nbytes > free and not self.finished:
            raise OutputError(
                f"{self.folder}: finished shards need {self._nbytes / 1e6:,.0f} MB of disk and {free / 1e6:,.0f} MB "
                "are free; make room, or choose another [output] path"
            )
        pending = {shard: line for shard, line in self._pending.items() if shard in self.finished}
        # what was opened to be read is opened anew
        self._release()
        for name, (header, nbytes) in self._headers.items():
            file = self._open(f"{name}.npy", os.O_RDWR | os.O_CREAT)
            # always, whatever is there: then it is right. Of the rest the system reserves what is used
            write_at(file, header, 0)
            if os.fstat(file).st_size < len(header) + nbytes:
                os.ftruncate(file, len(header) + nbytes)
        done = self._open(_DONE, os.O_RDWR | os.O_CREAT)
        # what a crash left of a line is taken off, so that the next one begins at its place
        self._ends[_DONE] = read_regular(self.folder / _DONE).rfind(b"\n") + 1
        os.ftruncate(done, self._ends[_DONE])
        self._ends[_SUMS] = os.fstat(self._open(_SUMS, os.O_RDWR | os.O_CREAT)).st_size
        self._open(_PENDING, os.O_RDWR | os.O_CREAT)
        self._ends[_PENDING] = 0
        self._pending = pending
        if pending:
            self._sync()
        os.ftruncate(self._files[_PENDING], 0)
        sync_folder(self.folder)
        sync_folder(self.folder.parent)
        self._due = time.monotonic() + SYNC_SECONDS

    def look(self) -> None:
        """Find out which shards are finished, without checking them.

        Raises
        ------
        InputError
            The lists of finished shards can't be read.
        """
        total = self._positions + sum(self._shards)
        for name in (_DONE, _PENDING):
            path = self.folder / name
            try:
                lines = read_regular(path).rpartition(b"\n")[0].splitlines()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}; try again, or begin anew with --overwrite") from error
            for line in lines:
                record = shard_records.parse(line, self._shards, total)
                if record is not None:
                    self.finished[record["shard"]] = record
                    if name == _PENDING:
                        self._pending[record["shard"]] = line + b"\n"

    def verify(self) -> list[int]:
        """Drop shards whose checksum doesn't fit, or whose group isn't whole; returns them."""
        damaged = []
        for shard in sorted(self.finished):
            try:
                fits = _checksum(self.finished[shard], self.read(shard)) == self.finished[shard]["check"]
            except (OSError, ValueError, LookupError, TypeError, ArithmeticError):
                fits = False
            if not fits or any(member not in self.finished for member in self.finished[shard].get("group", ())):
                damaged.append(shard)
        return self.forget(damaged)

    def forget(self, shards: Iterable[int]) -> list[int]:
        """Take shards for unfinished, and all whose images were added up with theirs; returns them."""
        gone = {member for shard in shards for member in (shard, *self.finished[shard].get("group", ()))}
        for shard in gone:
            self.finished.pop(shard, None)
        return sorted(gone)

    def broken(self) -> list[int]:
        """Finished shards in which broken frames were masked."""
        return [shard for shard, record in self.finished.items() if any(broken for _, _, broken, _ in record["lost"])]

    def write(self, *partials: Partial) -> None:
        """Keep a finished shard, or a whole group.

        Raises
        ------
        OSError
            The disk is full or gone.
        """
        records = [self._written(partial) for partial in partials]
        lines = {record["shard"]: json.dumps(record).encode() + b"\n" for record in records}
        with self._syncing:
            self._append(_PENDING, b"".join(lines.values()))
            self._pending.update(lines)
        self.finished.update((record["shard"], record) for record in records)
        self.sync_if_due()
        if self._failure is not None:
            raise self._failure

    def sync_if_due(self) -> None:
        """Bring what is pending to the disk, unless that was done lately; any thread may ask. `write` raises errors."""
        with self._syncing:
            if self._ends and self._pending and time.monotonic() >= self._due:
                try:
                    self._sync()
                except OSError as error:
                    self._failure = error

    def _sync(self) -> None:
        """Bring rows to the disk, then list their shards as done."""
        began = time.monotonic()
        pending, self._pending = self._pending, {}
        for name in (*(f"{name}.npy" for name in self._rows), _SUMS):
            # where this fails, nobody knows what is on the disk: the lines stay where they are
            os.fdatasync(self._files[name])
        self._append(_DONE, b"".join(pending.values()))
        os.fdatasync(self._files[_DONE])
        os.ftruncate(self._files[_PENDING], 0)
        self._ends[_PENDING] = 0
        took = time.monotonic() - began
        self._due = began + max(SYNC_SECONDS, took / SYNC_SHARE)

    def _written(self, partial: Partial) -> dict[str, Any]:
        """Write what a shard found; what is to be said of it."""
        # totals of few frames come in a narrower type
        wide = self._images[0][1]
        sums = replace(partial.sums, total=partial.sums.total.astype(wide, copy=False))
        partial = replace(partial, sums=sums)
        for name, rows in _arrays_of(sums).items():
            self._write_rows(name, partial.positions, rows)
        at = self._append(_SUMS, *(bytes_of(array) for array in (partial.positions, sums.total, sums.maximum)))
        record: dict[str, Any] = {
            "shard": partial.shard,
            "at": at,
            "frames": partial.positions.size,
            "lost": [[_runs(item.indices), item.message, item.broken, item.reading] for item in partial.lost],
            "seconds": {stage: round(seconds, 6) for stage, seconds in partial.seconds.items()},
            "worker": partial.worker,
            "began": partial.began,
            "ended": partial.ended,
        }
        if partial.group:
            # one object for all of them: there may be many
            record["group"] = partial.group
        record["check"] = _checksum(record, partial)
        return record

    def read(self, shard: int) -> Partial:
        """A finished shard, as it was when it ended."""
        record = self.finished[shard]
        at, frames = int(record["at"]), int(record["frames"])
        if not 0 <= frames <= self._shards[shard]:
            raise ValueError(f"shard {shard}: {frames} frames, but it has {self._shards[shard]}")
        log = self._open(_SUMS)
        positions = read_at(log, at, (frames,), np.dtype(np.int64))
        if frames and not 0 <= positions.min() <= positions.max() < self._positions:
            raise ValueError(f"shard {shard}: positions outside the scan")
        at += positions.nbytes
        group = tuple(record.get("group", ()))
        images = []
        for shape, dtype in self._images:
            # the first of a group has the images of all
            shape = (0, 0) if group and shard != group[0] else shape
            images.append(read_at(log, at, shape, dtype))
            at += images[-1].nbytes
        rows = {name: self._read_rows(name, positions) for name in self._rows}
        fits = tuple(rows[name] for name in self._rows if name.startswith("fit-"))
        sums = Sums(rows["masks"], rows["images"], rows["moments"], images[0], images[1], fits)
        lost = tuple(
            Lost(np.concatenate([_NOTHING, *(np.arange(a, b) for a, b in runs)]), message, broken, reading)
            for runs, message, broken, reading in record["lost"]
        )
        times = record["worker"], record["began"], record["ended"]
        return Partial(shard, positions, sums, lost, dict(record["seconds"]), *times, group)

    def close(self) -> None:
        """Bring all that was written to the disk, close the files.

        Raises
        ------
        OSError
            Some of it didn't reach the disk.
        """
        with self._syncing:
            try:
                if self._ends and self._pending:
                    self._sync()
            finally:
                self._release()

    def _release(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        self._ends.clear()
        self._pending.clear()

    def _append(self, name: str, *data: Bytes) -> int:
        """Add to the end of a file; returns where that begins. What failed to be added is written over by the next."""
        start = at = self._ends[name]
        for part in data:
            write_at(self._files[name], part, at)
            at += len(part)
        self._ends[name] = at
        return start

    def _write_rows(self, name: str, positions: NDArray[np.int64], rows: Array) -> None:
        if not rows.size:
            return
        start, width = len(self._headers[name][0]), rows[0].nbytes
        file, stretches = self._files[f"{name}.npy"], _stretches(positions)
        if _close_together(positions, len(stretches)):
            # one call for all; between them nothing changes
            low = int(positions.min())
            around = read_at(file, start + low * width, (int(positions.max()) + 1 - low, *rows.shape[1:]), rows.dtype)
            around[positions - low] = rows
            write_at(file, bytes_of(around), start + low * width)
            return
        for first, last in stretches:
            write_at(file, bytes_of(rows[first:last]), start + int(positions[first]) * width)

    def _read_rows(self, name: str, positions: NDArray[np.int64]) -> Array:
        shape, dtype = self._rows[name]
        out = np.empty((positions.size, *shape), dtype)
        if out.size:
            start, file, stretches = len(self._headers[name][0]), self._open(f"{name}.npy"), _stretches(positions)
            if _close_together(positions, len(stretches)):
                low = int(positions.min())
                at, count = start + low * out[0].nbytes, int(positions.max()) + 1 - low
                return np.asarray(read_at(file, at, (count, *shape), dtype)[positions - low])
            for first, last in stretches:
                at = start + int(positions[first]) * out[0].nbytes
                out[first:last] = read_at(file, at, out[first:last].shape, dtype)
        return out

    def _claim(self, *names: str) -> None:
        """Files of these names are about to be written; raises OutputError where somebody else's are there."""
        try:
            ownership.claim(self.folder, *names)
        except OutputError as error:
            # a disk that is full or gone may pass
            raise error.__cause__ if isinstance(error.__cause__, OSError) else error from None

    def _open(self, name: str, flags: int = os.O_RDONLY) -> int:
        if name not in self._files:
            if flags & os.O_CREAT:
                self._claim(name)
            self._files[name] = open_regular(self.folder / name, flags)
        return self._files[name]


def nbytes(job: Job) -> int:
    """Bytes of disk that the finished shards of a run take, at most."""
    rows = sum(math.prod(shape) * dtype.itemsize for shape, dtype in _row_arrays(job).values()) + 8
    image = sum(math.prod(shape) * dtype.itemsize for shape, dtype in _image_arrays(job))
    return int(job.wanted.size * rows + len(job.plan.shards) * (image + 512))


def _image_arrays(job: Job) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]:
    """Shape and type of the images over frames of a shard: their sum, their maximum."""
    weights, shape = job.prepared.weights, job.prepared.shape
    wide, own = np.dtype(job.prepared.wide), np.dtype(job.prepared.dtype)
    return (shape if weights.total else (0, 0), wide), (shape if weights.maximum else (0, 0), own)


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


def _close_together(positions: NDArray[np.int64], stretches: int) -> bool:
    """Whether there are so many stretches of rows that one call for all and what lies between them is quicker."""
    return stretches > MANY and int(np.ptp(positions)) <= MANY * positions.size


def _stretches(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and end row of positions that follow one another."""
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    ends = [0, *cuts.tolist(), positions.size]
    return [(a, b) for a, b in itertools.pairwise(ends) if b > a]


def _runs(indices: NDArray[np.int64]) -> list[list[int]]:
    return [[int(indices[a]), int(indices[b - 1]) + 1] for a, b in _stretches(indices)]


def _checksum(record: dict[str, Any], partial: Partial) -> int:
    """Checksum of all that a shard found, and of what is said of it."""
    sums = partial.sums
    check = zlib.crc32(json.dumps({key: value for key, value in record.items() if key != "check"}).encode())
    for array in (partial.positions, *_arrays_of(sums).values(), sums.total, sums.maximum):
        check = zlib.crc32(bytes_of(array), check)
    return check
