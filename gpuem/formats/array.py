"""Arrays that are already there: NumPy, CuPy, Dask, HDF5 and Zarr arrays, anything with a shape, a dtype and slices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import InputError, RecipeError
from gpuem.formats.raw import native_type, pixel_type
from gpuem.formats.source import Box, Calls, Piece, Resident, Runs, Source
from gpuem.messages import shown


@dataclass(frozen=True, eq=False)
class Reader:
    """Slices of an array, as NumPy arrays; travels to other processes as far as the array does."""

    array: Any

    def __call__(self, box: Box) -> NDArray[Any]:
        """The box (nav..., y, x)."""
        part = self.array[box] if len(self.array.shape) > 2 else self.array[box[1:]][None]
        if hasattr(part, "compute"):
            part = part.compute(scheduler="synchronous")
        return np.asarray(part.get() if hasattr(part, "get") and not isinstance(part, np.ndarray) else part)


def describe(array: Any) -> Source:
    """Describe an array (scan..., y, x) as a Source whose extents are slices of it.

    Raises
    ------
    InputError
        It has no frames, or is no array of plain numbers.
    RecipeError
        Its pixels aren't real numbers.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise InputError("a masked array: say roi = ~array.mask for scan positions, or fill it first")
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise InputError(f"{type(array).__name__} is neither a data set nor an array; open a file with gpuem.open")
    shape = _shape(array)
    if len(shape) < 2 or 0 in shape:
        raise InputError(f"an array of shape {shape} has no frames; (scan..., y, x) is needed")
    stored = pixel_type(np.dtype(array.dtype).str)
    if hasattr(array, "__cuda_array_interface__") and array.__cuda_array_interface__.get("strides") is None:
        return _on_device(array, shape, stored)
    nav, frame = shape[:-2] or (1,), (shape[-2], shape[-1])

    chunks = getattr(array, "chunks", None)
    if chunks and isinstance(chunks[0], tuple):
        chunks = tuple(max(sizes) for sizes in chunks)
    chunk = tuple(int(c) for c in chunks[: len(nav)]) if chunks and len(shape) > 2 else (1,) * len(nav)
    piece = Piece(0, nav, Calls(Reader(array), chunk, concurrent=True), stored)
    return Source(type(array).__name__, (), (piece,), piece.frames, frame, native_type(stored), nav)


def _shape(array: Any) -> tuple[int, ...]:
    """Its shape; raises InputError where that isn't known yet."""
    try:
        if not any(n != n for n in array.shape):
            return tuple(int(n) for n in array.shape)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{type(array).__name__} of shape {shown(array.shape)}: no array of frames") from None
    raise InputError(
        f"an array of unknown shape {tuple(array.shape)} (Dask, after a choice by values): call "
        ".compute_chunk_sizes() first, or choose positions by roi"
    )


def _on_device(array: Any, shape: tuple[int, ...], stored: np.dtype[Any]) -> Source:
    """A contiguous CuPy array, used where it is."""
    nav, frame = shape[:-2] or (1,), (shape[-2], shape[-1])
    count, nbytes = math.prod(nav), math.prod(frame) * stored.itemsize
    layout = Resident(array.reshape(-1).view(np.uint8), Runs.one(0, count, nbytes, nbytes))
    piece = Piece(0, nav, layout, stored)
    return Source(type(array).__name__, (), (piece,), count, frame, native_type(stored), nav)


def as_array(given: Any, what: str) -> NDArray[Any]:
    """An argument as an array; raises RecipeError where it is none."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{what} {shown(given)}: no array ({error})") from None


def read_array(path: Path, what: str) -> NDArray[Any]:
    """A small array (a mask, a region) from a .npy or .tif file.

    Raises
    ------
    RecipeError
        The file can't be read, whatever the reason; `what` says what it was for.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".tif", ".tiff"):
        raise RecipeError(f"{what} {path}: write it as .npy or .tif")
    try:
        if suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        import tifffile

        return np.asarray(tifffile.imread(path))
    except Exception as error:
        raise RecipeError(f"{what} {path}: can't be read: {error}") from error
