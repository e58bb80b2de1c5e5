"""NumPy's .npy: C and Fortran order, both byte orders; never pickled objects."""

from __future__ import annotations

import math
import tokenize

import numpy as np
from numpy.lib import format as npy

from gpuem.errors import InputError, TruncatedError
from gpuem.formats.raw import native_type, pixel_type
from gpuem.formats.remote import Place
from gpuem.formats.source import File, Piece, Runs, Source, Strided

# more can't be counted in 64-bit file offsets
_MOST_PIXELS = 1 << 58


def read_header(paths: tuple[Place, ...], *, fit: bool = False) -> Source:
    """Describe a .npy file whose last two axes are the detector (y, x).

    Parameters
    ----------
    paths : tuple of Path or Url
        One file.
    fit : bool
        Go on with the whole frames of a truncated file (C order only).

    Raises
    ------
    InputError
        Not a .npy file, pickled objects, fewer than two axes.
    TruncatedError
        The file is shorter than its header says.
    """
    (path,) = paths
    file = File.of(path)
    shape, fortran, stored, offset = _parse(path)
    # NumPy's reader accepts negative and boolean entries
    if any(isinstance(n, bool) or n < 0 for n in shape) or math.prod(shape) > _MOST_PIXELS:
        raise InputError(f"{path}: its header is damaged: shape {shape}")
    if len(shape) < 2:
        raise InputError(f"{path}: shape {shape} has no frames; at least (y, x) is needed")
    nav, frame = shape[:-2] or (1,), (shape[-2], shape[-1])
    frames, frame_bytes = math.prod(nav), math.prod(frame) * stored.itemsize
    if frames * frame_bytes == 0:
        raise InputError(f"{path}: shape {shape} holds no pixels")
    notes: tuple[str, ...] = ()
    whole = frames
    if file.size > offset + frames * frame_bytes:
        rest = file.size - offset - frames * frame_bytes
        message = f"{path}: {rest} bytes more than its header {shape} {stored.name} promises"
        if not fit:
            raise InputError(f"{message}; its header is wrong, or set fit = true to leave them out")
        notes = (message,)
    if file.size < offset + frames * frame_bytes:
        whole = (file.size - offset) // frame_bytes
        message = f"{path}: {file.size} bytes hold {whole} of the {frames} frames that its header {shape} promises"
        if not fit or fortran:
            raise TruncatedError(f"{message}; set fit = true to go on with them (C order only)", whole)
        notes = (message,)
    if fortran and file.remote:
        raise InputError(
            f"{path}: in Fortran order the pixels of a frame lie all over the file, too far apart for a network: "
            "copy it to a disk, or save it in C order"
        )
    if fortran:
        strides = tuple(stored.itemsize * math.prod(shape[:k]) for k in range(len(shape)))
        strides = strides if len(shape) > 2 else (frame_bytes, *strides)
        piece = Piece(0, nav, Strided(0, offset, strides), stored)
    else:
        piece = Piece(0, (whole,), Runs.one(offset, whole, frame_bytes, frame_bytes), stored)
    return Source("npy", (file,), (piece,), frames, frame, native_type(stored), nav, notes=notes)


def _parse(path: Place) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Shape, Fortran order, stored type and data offset."""
    with path.open("rb") as stream:
        try:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except (
            ValueError,
            SyntaxError,
            KeyError,
            TypeError,
            tokenize.TokenError,
            RecursionError,
            MemoryError,
        ) as error:
            raise InputError(f"{path}: not a .npy file, or its header is damaged ({error})") from error
        if dtype.hasobject:
            raise InputError(f"{path}: holds pickled Python objects; gpuem never unpickles data")
        if dtype.kind not in "uifb" or dtype.itemsize > 8:
            raise InputError(f"{path}: holds {dtype}, not integers or floats of at most 8 bytes")
        return shape, fortran, pixel_type(dtype.str), stream.tell()
