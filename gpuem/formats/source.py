"""What a format module returns: where the frames lie and how their bytes are to be read. A description, no pixels.

A Source is one or more pieces. A piece holds a box of frames (its `nav` shape) stored in one way:

Runs      frames one after another at a fixed distance: raw, npy, mib, empad, contiguous HDF5
Chunks    a regular grid of separately stored (and compressed) boxes: HDF5, Zarr
Strided   one array whose pixels of a frame aren't adjacent: Fortran order
Calls     what can't be described by byte extents: arrays in memory, lazy arrays; a function returns a box
Stitched  frames put together from parts, each with a layout of its own: modules of a tiled camera
Resident  runs or chunks whose bytes lie in the memory of a GPU

Codecs are data too: a tuple of steps, each a name with parameters, in the order in which they are undone. So is the
correction of pixels once they are decoded: stored type -> `Source.raw_dtype` -> correction -> `Source.dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.axes import Axis
from gpuem.formats.remote import Place, Url

Box = tuple[slice, ...]


@dataclass(frozen=True)
class File:
    """A file, or an object of a store, as it was when its header was read; a run refuses one that changed since."""

    path: Place
    size: int
    mtime_ns: int
    etag: str = ""

    @classmethod
    def of(cls, path: Place) -> File:
        """The file at `path` as it is now."""
        stat = path.stat()
        return cls(path, stat.st_size, stat.st_mtime_ns, getattr(stat, "etag", ""))

    @property
    def remote(self) -> bool:
        """Whether it comes over the network, by its URL."""
        return isinstance(self.path, Url)


@dataclass(frozen=True)
class Copy:
    """Files that lie also elsewhere, on the disks of some machines.

    Parameters
    ----------
    hosts : tuple of str
        Patterns of the names of those machines.
    folder : Path
        Where the files lie there, under their own names.
    files : tuple of str
        Patterns of the names of those files.
    """

    hosts: tuple[str, ...]
    folder: Path
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Step:
    """One step of a codec, to be undone: a name that `gpuem.codecs` knows and its parameters."""

    name: str
    parameters: tuple[int, ...] = ()


@dataclass(frozen=True)
class Runs:
    """Frames one after another: all arrays have one entry per run.

    Parameters
    ----------
    file : (n,) int64
        Index into `Source.files`.
    offset : (n,) int64
        Byte offset of the first frame's data.
    frames : (n,) int64
        Number of frames in the run.
    stride : (n,) int64
        Bytes from one frame's data to the next one's.
    frame_bytes : int
        Bytes of one frame's data as stored, headers and gaps left out.
    """

    file: NDArray[np.int64]
    offset: NDArray[np.int64]
    frames: NDArray[np.int64]
    stride: NDArray[np.int64]
    frame_bytes: int

    @classmethod
    def one(cls, offset: int, frames: int, stride: int, frame_bytes: int, file: int = 0) -> Runs:
        """A single run in a single file."""
        first, second, third, fourth = (np.array([v], np.int64) for v in (file, offset, frames, stride))
        return cls(first, second, third, fourth, frame_bytes)


@dataclass(frozen=True)
class Chunks:
    """A regular grid of chunks over (nav..., y, x); `file`, `offset`, `length`, `skipped` in C order of the grid.

    Parameters
    ----------
    shape : tuple of int
        Shape of a chunk; chunks at the upper edges are stored whole and hang over.
    file, offset, length : (n,) int64
        Where each chunk's bytes lie; length 0 says that it was never written.
    skipped : (n,) uint32
        Bit k set: step k of the codec was not applied to this chunk (in the order of writing, as HDF5 counts).
    """

    shape: tuple[int, ...]
    file: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    skipped: NDArray[np.uint32]


@dataclass(frozen=True)
class Strided:
    """One array of shape (nav..., y, x) in one file, with a byte stride for every axis."""

    file: int
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Calls:
    """An array that answers for itself: ``read(box)`` returns the box (nav..., y, x) as a NumPy array.

    `chunk` is the nav shape that is cheapest to ask for at once; `concurrent` says whether several threads may ask.
    """

    read: Callable[[Box], NDArray[Any]]
    chunk: tuple[int, ...]
    concurrent: bool = True


@dataclass(frozen=True)
class Resident:
    """Frames that lie in the memory of a GPU, as pixels or as a file stores them.

    Parameters
    ----------
    data : (m,) uint8 device array
        The bytes.
    inner : Runs or Chunks
        Where the frames are in them; its `file` is not used.
    """

    data: Any
    inner: Runs | Chunks


@dataclass(frozen=True)
class Part:
    """A box of a stitched frame, and the stored frames that it is taken from.

    Parameters
    ----------
    piece : Piece
        Where those lie; its `start` is not used. Not stitched itself. Unless its layout is `Runs`, its nav shape
        ends as that of the stitched piece does behind the first axis, and `first` is a whole number of its rows.
    shape : tuple of int
        Shape (y, x) of the frames of `piece`.
    first : int
        Frame of `piece`, in its flat order, that belongs to the first stitched frame.
    inside : tuple of int
        First row and column of them that are taken.
    size : tuple of int
        Rows and columns that are taken.
    at : tuple of int
        Row and column of the stitched frame where they begin.
    """

    piece: Piece
    shape: tuple[int, int]
    first: int
    inside: tuple[int, int]
    size: tuple[int, int]
    at: tuple[int, int]


@dataclass(frozen=True)
class Stitched:
    """Frames put together from parts that don't overlap.

    Parameters
    ----------
    parts : tuple of Part
        What covers the frame.
    gaps : tuple of (y, x, rows, columns)
        Boxes of the frame that no part covers.
    fill : int or float
        Value of the pixels in gaps.
    missing : (frames,) bool or None
        Frames that can't be had, because something of them lies in no file.
    """

    parts: tuple[Part, ...]
    gaps: tuple[tuple[int, int, int, int], ...] = ()
    fill: float = 0
    missing: NDArray[np.bool_] | None = None


Layout = Runs | Chunks | Strided | Calls | Stitched | Resident


def stored_layout(layout: Layout) -> Runs | Chunks | Strided | Calls | Stitched:
    """How frames are laid out, wherever they are."""
    return layout.inner if isinstance(layout, Resident) else layout


@dataclass(frozen=True)
class Piece:
    """Frames stored in one way.

    Parameters
    ----------
    start : int
        Flat index, in file order, of its first frame.
    nav : tuple of int
        How the frames are arranged where they are stored; their flat order is C order of this shape.
    layout : Runs, Chunks, Strided, Calls or Resident
        Where the bytes are.
    stored : numpy.dtype
        Type of a pixel as it is stored once the codec is undone, byte order included.
    codec : tuple of Step
        How bytes become frames, in the order in which the steps are undone; empty for plain pixels.
    """

    start: int
    nav: tuple[int, ...]
    layout: Layout
    stored: np.dtype[Any]
    codec: tuple[Step, ...] = ()

    @property
    def frames(self) -> int:
        """Number of frames."""
        return math.prod(self.nav)


def layouts(piece: Piece) -> Iterator[Runs | Chunks | Strided | Calls | Resident]:
    """The layout of a piece, or those of the parts that it is stitched of."""
    if isinstance(piece.layout, Stitched):
        for part in piece.layout.parts:
            yield from layouts(part.piece)
    else:
        yield piece.layout


@dataclass(frozen=True, eq=False)
class Correction:
    """What becomes of every decoded pixel: (pixel - dark) * gain, then dead pixels from their good neighbours.

    Made and checked by `gpuem.correction.of`. Every step is rounded to the type after: the pixel is converted,
    dark is subtracted, gain multiplies. Then each dead pixel becomes the mean of corrected good ones: floats are added
    in float64 in the order of `neighbours`, divided and converted; the mean of integers is rounded half up,
    floor((2 * sum + n) / (2 * n)).

    Parameters
    ----------
    raw_dtype, dtype : numpy.dtype
        Type of a pixel before and after, in native byte order.
    dark, gain : (y, x) float or None
        In the type after, C order; None where nothing is subtracted, or multiplied.
    dead : (y, x) bool or None
        Which pixels are replaced.
    neighbours : tuple of (k,), (k + 1,), (m,) int32
        Flat indices of the dead pixels, ascending; where in the third array those that replace pixel j begin and end
        (offsets j and j + 1); their flat indices, ascending for each dead pixel. All are good. Without dead pixels
        k = m = 0.
    origin : mapping
        Where dark, gain and dead come from: a path, ``"array"`` or ``"list"``; only what was given.
    """

    raw_dtype: np.dtype[Any]
    dtype: np.dtype[Any]
    dark: NDArray[Any] | None
    gain: NDArray[Any] | None
    dead: NDArray[np.bool_] | None
    neighbours: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
    origin: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in (self.dark, self.gain, self.dead, *self.neighbours) if table is not None)


@dataclass(frozen=True)
class Source:
    """Detector frames as files hold them.

    Parameters
    ----------
    format : str
        Name of the format.
    files : tuple of File
        All files that are read.
    pieces : tuple of Piece
        The frames; flat indices that no piece covers are missing.
    frames : int
        Number of frames the source promises, in file order.
    frame_shape : tuple of int
        Detector shape (y, x).
    dtype : numpy.dtype
        Type of a pixel as gpuem hands it out, in native byte order; the corrected type where there is a correction.
    scan_shape : tuple of int
        The scan as the file gives it; (frames,) where it doesn't say.
    scan, detector : tuple of Axis
        Calibrated axes where the file calibrates them, else empty.
    metadata : mapping
        What the header says, as plain values.
    notes : tuple of str
        What a user should be told about this file (a rest at the end, an aborted acquisition).
    correction : Correction, optional
        What becomes of every pixel between decoding and computing.
    copies : tuple of Copy
        Machines that have files on their own disks, too.
    """

    format: str
    files: tuple[File, ...]
    pieces: tuple[Piece, ...]
    frames: int
    frame_shape: tuple[int, int]
    dtype: np.dtype[Any]
    scan_shape: tuple[int, ...]
    scan: tuple[Axis, ...] = ()
    detector: tuple[Axis, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    correction: Correction | None = None
    copies: tuple[Copy, ...] = ()

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """Type of a decoded pixel before it is corrected, in native byte order; `dtype` where nothing is corrected."""
        return self.dtype if self.correction is None else self.correction.raw_dtype

    @property
    def in_files(self) -> bool:
        """Whether anything has to be read from files; not so for data that is in memory or on a GPU."""
        return bool(self.files) and any(not isinstance(piece.layout, Resident) for piece in self.pieces)

    @property
    def remote(self) -> bool:
        """Whether any of its files comes over the network, by its URL."""
        return any(file.remote for file in self.files)

    @property
    def frame_nbytes(self) -> int:
        """Bytes of a decoded frame, before it is corrected."""
        return math.prod(self.frame_shape) * self.raw_dtype.itemsize

    @property
    def corrected_nbytes(self) -> int:
        """Bytes of a frame as gpuem hands it out."""
        return math.prod(self.frame_shape) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all frames, decoded, before they are corrected."""
        return self.frames * self.frame_nbytes


def part_of(source: Source, piece: Piece, part: Part) -> tuple[Source, Piece]:
    """A part of a stitched piece as uncorrected frames of its own: source and piece, numbered as the whole ones are."""
    own = replace(source, frame_shape=part.shape, dtype=source.raw_dtype, correction=None, pieces=())
    return own, replace(part.piece, start=piece.start - part.first)
