"""The region of interest: which scan positions are wanted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import RecipeError
from gpuem.formats.array import as_array, read_array
from gpuem.paths import local_path

Roi = Sequence[int] | NDArray[np.bool_] | str | os.PathLike[str] | None


def region(shape: tuple[int, ...], roi: Roi) -> NDArray[np.bool_]:
    """Which scan positions are wanted.

    Parameters
    ----------
    shape : tuple of int
        Shape of the scan.
    roi : sequence of int, bool array, path or None
        First and end (excluded) for every scan axis, a mask of scan shape, a file that holds one, or None for all.

    Returns
    -------
    (positions,) bool
        The mask, flat.

    Raises
    ------
    RecipeError
        The region doesn't fit the scan or selects nothing.
    """
    if roi is None:
        return np.ones(shape, np.bool_).reshape(-1)
    given: NDArray[Any] = (
        read_array(local_path(roi), "roi") if isinstance(roi, str | os.PathLike) else as_array(roi, "roi")
    )
    if given.dtype == np.bool_ or given.ndim > 1 or isinstance(roi, str | os.PathLike):
        if given.shape != shape or not np.isin(given, (0, 1)).all():
            raise RecipeError(f"roi: a mask of shape {given.shape} and type {given.dtype}; needed: booleans of {shape}")
        mask = given.astype(np.bool_)
    else:
        if given.shape != (2 * len(shape),) or given.dtype.kind not in "iu":
            raise RecipeError(
                f"roi {given.tolist()}: needed are first and end (excluded) for every scan axis of {shape}"
            )
        pairs = [(int(first), int(end)) for first, end in given.reshape(-1, 2)]
        if any(not 0 <= first < end <= n for (first, end), n in zip(pairs, shape, strict=True)):
            raise RecipeError(f"roi {given.tolist()}: first and end (excluded) must lie inside the scan of {shape}")
        mask = np.zeros(shape, np.bool_)
        mask[tuple(slice(first, end) for first, end in pairs)] = True
    if not mask.any():
        raise RecipeError("roi: selects no scan position")
    return mask.reshape(-1)


def summary(wanted: NDArray[np.bool_], roi: Roi) -> dict[str, Any] | None:
    """The region as plain values: its edges or its file where there are any, and how many positions it has."""
    if roi is None:
        return None
    text = str(roi) if isinstance(roi, str | os.PathLike) else None
    edges = [int(v) for v in roi] if isinstance(roi, list | tuple) else None
    return {"positions": int(wanted.sum()), **({"file": text} if text else {}), **({"edges": edges} if edges else {})}
