"""Corrections of a detector: dark, gain, dead pixels; read, checked, and turned into tables for the backends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import RecipeError
from gpuem.formats.array import as_array, read_array
from gpuem.formats.source import Correction
from gpuem.paths import local_path

Image = NDArray[Any] | str | os.PathLike[str] | None
Dead = NDArray[Any] | Sequence[Sequence[int]] | str | os.PathLike[str] | None
# the gaps of a detector of 16 megapixels need 22 million; every frame pays for each of them
MOST_NEIGHBOURS = 1 << 25
# pairs of pixels that are looked at together while neighbours are sought
PAIRS_AT_ONCE = 1 << 20
AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def of(dark: Image, gain: Image, dead: Dead, shape: tuple[int, int], dtype: np.dtype[Any]) -> Correction:
    """Read and check what is to be corrected.

    Parameters
    ----------
    dark, gain : path or (y, x) array
        A .npy or .tif file, or an array: what is subtracted from a pixel, and what the difference is multiplied with.
    dead : path, (y, x) array or list of (y, x)
        Pixels to replace by the mean of their good neighbours: a mask (True or 1 is dead), or their positions.
    shape : tuple of int
        Detector shape (y, x).
    dtype : numpy.dtype
        Type of the pixels before, in native byte order.

    Raises
    ------
    RecipeError
        Nothing is given, a file can't be read, a shape differs from the detector's, a pixel that isn't dead has no
        finite dark or gain, all pixels are dead or too many too far from good ones.
    """
    given = {"dark": dark, "gain": gain, "dead": dead}
    origin = {name: _origin(value) for name, value in given.items() if value is not None}
    if not origin:
        raise RecipeError("correction: nothing is given; give dark, gain or dead")
    mask = np.zeros(shape, np.bool_) if dead is None else _mask(dead, origin["dead"], shape)
    after = corrected_type(dtype, scaled=dark is not None or gain is not None)
    return Correction(
        dtype,
        after,
        None if dark is None else _image("dark", dark, origin["dark"], after, mask),
        None if gain is None else _image("gain", gain, origin["gain"], after, mask),
        None if dead is None else mask,
        neighbours(mask),
        origin,
    )


def corrected_type(dtype: np.dtype[Any], *, scaled: bool) -> np.dtype[Any]:
    """Type of corrected pixels: `dtype` itself unless they are `scaled` by dark or gain, then a float.

    Single precision for pixels of up to 16 bits and for single precision, double precision for all others.
    """
    if not scaled:
        return dtype
    return np.dtype(np.float32 if dtype.itemsize <= 2 or dtype == np.float32 else np.float64)


def neighbours(dead: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """The good pixels whose mean replaces each dead one: all in the smallest square around it that holds any.

    Squares are 3x3, 5x5, ... pixels, cut off at the edges of the detector.

    Returns
    -------
    pixels : (k,) int32
        Flat indices of the dead pixels, ascending.
    offsets : (k + 1,) int32
        Those that replace pixel j are found from offsets[j] to offsets[j + 1].
    neighbours : (m,) int32
        Flat indices of good pixels, ascending for each dead one.

    Raises
    ------
    RecipeError
        No pixel is good, or so many are dead so far from good ones that every frame would take too long.
    """
    if dead.all():
        raise RecipeError(
            f"dead: all {dead.size:,} pixels of the detector are dead, none is left to replace them from; True or 1 "
            "marks a dead pixel: turn the mask round if it marks the good ones"
        )
    # with a border that is never reached, so that a step to the side needs no check
    reached, waiting = np.pad(~dead, 1).reshape(-1), np.flatnonzero(np.pad(dead, 1))
    width = dead.shape[1] + 2
    pairs, count, radius = [np.empty((2, 0), np.int32)], 0, 0
    while waiting.size:
        radius += 1
        near = np.any([reached[waiting + y * width + x] for y, x in AROUND], axis=0)
        for part in _on_square(dead, waiting[near] // width - 1, waiting[near] % width - 1, radius):
            pairs.append(part)
            count += part.shape[1]
            if count > MOST_NEIGHBOURS:
                raise RecipeError(
                    f"dead: of {dead.size:,} pixels {np.count_nonzero(dead):,} are dead, {waiting.size:,} of them "
                    f"{radius} or more pixels from a good one: to replace them takes more than {MOST_NEIGHBOURS:,} "
                    "values of every frame. Leave large areas to the masks of the analyses; True or 1 marks dead pixels"
                )
        reached[waiting[near]] = True
        waiting = waiting[~near]
    of_pixel, good = np.concatenate(pairs, axis=1)
    # those of one pixel ascend already
    order = np.argsort(of_pixel, kind="stable")
    pixels = np.flatnonzero(dead)
    offsets = np.append(0, np.cumsum(np.bincount(of_pixel, minlength=dead.size)[pixels]))
    return pixels.astype(np.int32), offsets.astype(np.int32), good[order]


def _on_square(
    dead: NDArray[np.bool_], y: NDArray[np.int64], x: NDArray[np.int64], radius: int
) -> Iterator[NDArray[np.int32]]:
    """Flat indices (2, n) of dead pixels (y, x) and of each good one on the edge of the square around them."""
    height, width = dead.shape
    step_y, step_x = np.indices((2 * radius + 1, 2 * radius + 1)) - radius
    edge = np.maximum(abs(step_y), abs(step_x)) == radius
    at_once = max(1, PAIRS_AT_ONCE // int(edge.sum()))
    for first in range(0, y.size, at_once):
        own_y, own_x = y[first : first + at_once, None], x[first : first + at_once, None]
        at_y, at_x = own_y + step_y[edge], own_x + step_x[edge]
        good = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        good[good] = ~dead[at_y[good], at_x[good]]
        own = np.broadcast_to(own_y * width + own_x, good.shape)
        yield np.stack([own[good], (at_y * width + at_x)[good]]).astype(np.int32)


def summary(correction: Correction | None) -> dict[str, Any] | None:
    """A correction as plain values: where dark, gain and dead come from, how many pixels are dead, the type after."""
    if correction is None:
        return None
    return {**correction.origin, "dead_pixels": int(correction.neighbours[0].size), "dtype": correction.dtype.name}


def _origin(given: Any) -> str:
    if isinstance(given, str | os.PathLike):
        return str(local_path(given))
    return "list" if isinstance(given, list | tuple) else "array"


def _read(what: str, given: Any, where: str, shape: tuple[int, int]) -> NDArray[Any]:
    """An array of numbers of detector shape."""
    array = read_array(local_path(given), what) if isinstance(given, str | os.PathLike) else as_array(given, what)
    if array.shape != shape:
        raise RecipeError(f"{what} {where} has shape {array.shape}, the detector {shape}; they must be equal")
    if array.dtype.kind not in "buif":
        raise RecipeError(f"{what} {where} holds {array.dtype}, not real numbers")
    return array


def _image(what: str, given: Any, where: str, dtype: np.dtype[Any], dead: NDArray[np.bool_]) -> NDArray[Any]:
    """Dark or gain in the corrected type; what it says of dead pixels doesn't matter."""
    with np.errstate(over="ignore"):
        image = np.array(_read(what, given, where, dead.shape), dtype, order="C")
    image[dead] = 0
    unusable = np.argwhere(~np.isfinite(image))
    if len(unusable):
        raise RecipeError(
            f"{what} {where}: NaN, infinity or too large for {dtype} at {len(unusable):,} of {dead.size:,} pixels, the "
            f"first at (y, x) = {tuple(unusable[0].tolist())}; give finite numbers there, or name these pixels in dead"
        )
    return image


def _mask(given: Any, where: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Dead pixels as a mask."""
    if isinstance(given, list | tuple):
        return _mask_of_positions(given, shape)
    array = _read("dead", given, where, shape)
    if not np.isin(array, (0, 1)).all():
        raise RecipeError(f"dead {where} holds other numbers than 0 and 1; needed is a mask, True or 1 where dead")
    return array.astype(np.bool_)


def _mask_of_positions(given: Sequence[Any], shape: tuple[int, int]) -> NDArray[np.bool_]:
    try:
        positions = np.array(given) if given else np.empty((0, 2), np.int64)
    except ValueError:
        # rows of different lengths
        positions = np.empty(0)
    if positions.ndim != 2 or positions.shape[1] != 2 or positions.dtype.kind not in "iu":
        raise RecipeError(
            "dead: needed are positions [[y, x], ...] in whole numbers, or a mask of detector shape: an array or a file"
        )
    outside = ((positions < 0) | (positions >= shape)).any(axis=1)
    if outside.any():
        raise RecipeError(
            f"dead: {np.count_nonzero(outside)} of {len(positions)} positions lie outside the detector of "
            f"{shape[0]}x{shape[1]} pixels, the first at (y, x) = {tuple(positions[outside][0].tolist())}"
        )
    mask = np.zeros(shape, np.bool_)
    mask[tuple(positions.T)] = True
    return mask
