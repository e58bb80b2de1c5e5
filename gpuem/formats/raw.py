"""Raw frames: any type and byte order, an offset, headers, footers and gaps per frame, one file or several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gpuem.errors import InputError, RecipeError, TruncatedError
from gpuem.formats import empad
from gpuem.formats.remote import Place
from gpuem.formats.source import File, Piece, Runs, Source

# no detector is larger along one axis
LARGEST_AXIS = 1 << 20
# offsets and headers beyond this are mistakes, and would not fit 64-bit file offsets
_MOST_BYTES = 1 << 60


def read_header(
    paths: tuple[Place, ...],
    *,
    frame: tuple[int, int] | None = None,
    dtype: str | None = None,
    offset: int = 0,
    header: int = 0,
    footer: int = 0,
    fit: bool = False,
) -> Source:
    """Describe raw frames.

    Parameters
    ----------
    paths : tuple of Path or Url
        The files, read one after another.
    frame : tuple of int
        Detector shape (y, x).
    dtype : str
        Type of a pixel as NumPy writes it: ``"uint16"``, ``">u2"``, ``"<f4"``.
    offset : int
        Bytes before the first frame's header, in every file.
    header, footer : int
        Bytes before and after every frame that aren't pixels.
    fit : bool
        Go on with the whole frames of a file that ends within a frame.

    Raises
    ------
    RecipeError
        `frame` or `dtype` is missing or impossible.
    TruncatedError
        A file ends within a frame.
    """
    if frame is None or dtype is None:
        raise RecipeError(
            f'{paths[0]}: a raw file says nothing of itself; give frame = [256, 256], dtype = "uint16"' + _hint(paths)
        )
    stored = pixel_type(dtype)
    frame = _frame_shape(frame)
    for key, value in (("offset", offset), ("header", header), ("footer", footer)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 0 <= value <= _MOST_BYTES:
            raise RecipeError(f"{key} {value!r}: needed is a number of bytes, 0 to {_MOST_BYTES:,}")
    frame_bytes = math.prod(frame) * stored.itemsize
    stride = header + frame_bytes + footer
    files = tuple(File.of(path) for path in paths)
    what = f"{frame[0]}x{frame[1]} {stored.name}"
    pieces, notes, total = [], [], 0
    for k, file in enumerate(files):
        whole, cut, note = _whole_frames(file, what, offset, stride, header + frame_bytes, fit)
        layout = Runs.one(offset + header, whole, stride, frame_bytes, file=k)
        pieces.append(Piece(total, (whole,), layout, stored))
        notes += [note] if note else []
        # a frame that is cut keeps its place, or all that follow would be shifted
        total += whole + (cut and k + 1 < len(files))
    pieces = [piece for piece in pieces if piece.frames]
    if not pieces:
        raise InputError(f"{paths[0]}: {files[0].size} bytes, not one whole frame of {frame_bytes} bytes")
    return Source("raw", files, tuple(pieces), total, frame, native_type(stored), (total,), notes=tuple(notes))


def _frame_shape(frame: Sequence[int]) -> tuple[int, int]:
    """The detector shape as it is given; raises RecipeError unless it is one."""
    whole = isinstance(frame, Sequence) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in frame
    )
    if not whole or len(frame) != 2:
        raise RecipeError(f"frame {frame!r}: needed are two whole numbers, (y, x), such as (256, 256)")
    y, x = (int(n) for n in frame)
    if not (1 <= y <= LARGEST_AXIS and 1 <= x <= LARGEST_AXIS):
        raise RecipeError(f"frame ({y}, {x}): each axis needs 1 to {LARGEST_AXIS:,} pixels")
    return y, x


def _hint(paths: Sequence[Place]) -> str:
    """What else a file of unknown content may be, by its size."""
    frames, scan = empad.lone_frames(paths[0]) if len(paths) == 1 else (0, None)
    if not frames:
        return ""
    given = f"scan = [{scan[0]}, {scan[1]}] as its name says" if scan else f"scan = [y, x] of {frames} positions"
    return (
        f'. It has the size of {frames} EMPAD frames (130x128 float32): if it is one, give format = "empad" and {given}'
    )


def _whole_frames(file: File, what: str, offset: int, stride: int, needed: int, fit: bool) -> tuple[int, bool, str]:
    """Number of whole frames in a file, whether another one is cut, and a note where something is left over."""
    whole, rest = divmod(max(file.size - offset, 0), stride)
    # the last frame is whole without its footer
    if rest >= needed:
        whole, rest = whole + 1, 0
    if rest == 0 and file.size >= offset:
        return whole, False, ""
    message = (
        f"{file.path}: {file.size} bytes hold {whole} whole frames of {what} after {offset} bytes, "
        f"and {rest} bytes more"
    )
    if not fit:
        raise TruncatedError(f"{message}; check frame, dtype and offset, or set fit = true to go on", whole)
    return whole, rest > 0, message


def pixel_type(name: str) -> np.dtype[np.generic]:
    """The type of a pixel by its NumPy name; raises RecipeError unless it is a real number."""
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError, RecursionError):
        # NumPy reads more than names of types: "(2,)u1", "u1,f4", ","
        raise RecipeError(f'dtype {name!r} is not a type; write it as NumPy does: "uint16", ">u2", "<f4"') from None
    if dtype.kind not in "uifb" or dtype.itemsize > 8:
        raise RecipeError(f"dtype {name!r}: pixels must be integers or floats of at most 8 bytes")
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype


def native_type(stored: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """The type in which stored pixels are handed out: native byte order, half precision widened to single."""
    return np.dtype(np.float32) if stored.kind == "f" and stored.itemsize == 2 else stored.newbyteorder("=")
