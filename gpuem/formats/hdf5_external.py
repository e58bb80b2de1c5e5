"""HDF5 datasets whose bytes lie in raw files: frames in one file each, frames that go on in the next one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, InputError, ReadError, TruncatedError
from gpuem.formats.hdf5_file import Files, located
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import Box, Calls, File, Part, Piece, Runs
from gpuem.formats.stitch import stitched, taken


@dataclass(frozen=True)
class Segment:
    """Bytes [start, stop) of a dataset, and where they lie: `number` of the file, -1 where it is missing."""

    start: int
    stop: int
    number: int
    offset: int


def read(
    dset: Any, stored: np.dtype[Any], files: Files, *, fit: bool, beside: Callable[[Any, str], Place]
) -> tuple[list[Piece], NDArray[np.bool_]]:
    """Pieces of a dataset in raw files, and which of its frames can't be had.

    Raises
    ------
    InputError, TruncatedError
        A file is missing or too short, and `fit` isn't set.
    """
    files.index(located(dset.file))
    frames, frame_nbytes = math.prod(dset.shape[:-2]), math.prod(dset.shape[-2:]) * stored.itemsize
    segments, lost = [], np.ones(frames, np.bool_)
    start = 0
    for name, offset, size in dset.external:
        length = min(size, frames * frame_nbytes - start)
        if length > 0:
            path = beside(dset, name if isinstance(name, str) else name.decode())
            touched = slice(start // frame_nbytes, -(-(start + length) // frame_nbytes))
            have = _have(dset, path, offset, (start, start + length), frame_nbytes, files, fit)
            number = files.index(path) if have else -1
            segments += [Segment(start, start + have, number, offset)] if have else []
            # of a frame that began in another file, all parts must be there
            whole = np.arange(touched.start, touched.stop)
            good = np.minimum((whole + 1) * frame_nbytes, start + length) <= start + have
            first = touched.start if start % frame_nbytes == 0 else touched.start + 1
            broken = lost[touched.start] if first > touched.start else False
            lost[touched] = ~good
            lost[touched.start] |= broken
            start += length
    if start < frames * frame_nbytes:
        lost[start // frame_nbytes :] = True
        message = (
            f"{located(dset.file)}: the raw files of {dset.name} end after {int((~lost).sum())} of {frames} frames"
        )
        if not fit:
            raise TruncatedError(f"{message}; set fit = true to go on with them", int((~lost).sum()))
        files.note(message)
    return _pieces(dset, stored, files, segments, lost), lost


def _have(dset: Any, path: Place, offset: int, where: tuple[int, int], frame: int, files: Files, fit: bool) -> int:
    """How many of a dataset's bytes [first, stop) a raw file holds; an error where these aren't all."""
    first, stop = where
    count = -(-stop // frame) - first // frame
    if not path.is_file():
        message = f"{located(dset.file)}: {dset.name} keeps {count} frames in {path}, which is missing"
        if not fit:
            raise InputError(f"{message}; set fit = true to go on without them")
        files.note(message)
        return 0
    have = min(stop - first, max(0, files.size(files.index(path)) - offset))
    if have < stop - first:
        whole = max(0, (first + have) // frame - first // frame)
        message = f"{path}: holds {whole} of the {count} frames that {dset.name} promises"
        if not fit:
            raise TruncatedError(f"{message}; set fit = true to go on with them", whole)
        files.note(message)
    return have


def _pieces(
    dset: Any, stored: np.dtype[Any], files: Files, segments: list[Segment], lost: NDArray[np.bool_]
) -> list[Piece]:
    shape = (int(dset.shape[-2]), int(dset.shape[-1]))
    frame = math.prod(shape) * stored.itemsize
    found = []
    for segment in segments:
        first, stop = -(-segment.start // frame), segment.stop // frame
        if stop > first:
            at = segment.offset + first * frame - segment.start
            found.append(
                Piece(first, (stop - first,), Runs.one(at, stop - first, frame, frame, segment.number), stored)
            )
    borders = {s.start // frame for s in segments if s.start % frame}
    for k in sorted(k for k in borders if not lost[k]):
        mine = [s for s in segments if s.start < (k + 1) * frame and s.stop > k * frame]
        piece = _spanning(k, mine, shape, stored)
        if piece is None:
            files.note(f"{dset.name}: a pixel spans two raw files; frame {k} is put together by one thread")
            reader = Joined(
                tuple((files.at(s.number), s.offset, s.start, s.stop) for s in mine), k * frame, shape, stored
            )
            piece = Piece(k, (1,), Calls(reader, (1,)), stored.newbyteorder("="))
        found.append(piece)
    return sorted(found, key=lambda piece: piece.start)


def _spanning(k: int, segments: list[Segment], shape: tuple[int, int], stored: np.dtype[Any]) -> Piece | None:
    """A frame that lies in several files, as boxes of pixels; None where a pixel does."""
    item, frame = stored.itemsize, math.prod(shape) * stored.itemsize
    made = []
    for segment in segments:
        low, high = max(segment.start - k * frame, 0), min(segment.stop - k * frame, frame)
        if low % item or high % item:
            return None
        for y, x, rows, columns in _boxes(low // item, high // item, shape[1]):
            at = segment.offset + k * frame + (y * shape[1] + x) * item - segment.start
            size = rows * columns * item
            piece = Piece(0, (1,), Runs.one(at, 1, size, size, segment.number), stored)
            box = (rows, columns)
            made.append(taken(piece, box, 0, 1, Part(piece, box, 0, (0, 0), box, (y, x))))
    return stitched(k, 1, made, shape, 0, stored.newbyteorder("="))


def _boxes(first: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Pixels [first, stop) of a frame as boxes (y, x, rows, columns), the pixels of each one after another."""
    top, bottom = -(-first // width) * width, stop // width * width
    edges = [first, min(top, stop), max(bottom, min(top, stop)), stop]
    for low, high in itertools.pairwise(edges):
        if high > low:
            columns = width if low % width == 0 and high - low >= width else high - low
            yield low // width, low % width, (high - low) // columns, columns


@dataclass(frozen=True)
class Joined:
    """Reads one frame whose bytes lie in several files: (file, offset, start, stop) in bytes of the dataset."""

    parts: tuple[tuple[File, int, int, int], ...]
    begin: int
    shape: tuple[int, int]
    stored: np.dtype[Any]

    def __call__(self, box: Box) -> NDArray[Any]:
        """The frame, shape (1, y, x); raises DataError where a file ends too early."""
        size = math.prod(self.shape) * self.stored.itemsize
        raw = b""
        for file, offset, start, stop in self.parts:
            low, high = max(start, self.begin), min(stop, self.begin + size)
            raw += _bytes(file, offset + low - start, high - low)
        frame = np.frombuffer(raw, self.stored).astype(self.stored.newbyteorder("=")).reshape(1, *self.shape)
        return np.asarray(frame[box])


def _bytes(file: File, offset: int, length: int) -> bytes:
    if isinstance(file.path, Url):
        raise InputError(f"{file.path}: a pixel spans two raw files, which can't be read over a network; copy them")
    try:
        if File.of(file.path) != file:
            raise InputError(f"{file.path}: changed since it was opened; open it again")
        with file.path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(length)
    except FileNotFoundError:
        raise InputError(f"{file.path}: is gone since it was opened") from None
    except OSError as error:
        raise ReadError(f"{file.path}: reading {length} bytes at {offset}: {error.strerror}") from error
    if len(data) < length:
        raise DataError(f"{file.path}: ends {length - len(data)} bytes before the end of a frame")
    return data
