"""Frames put together from parts: which of them are missing, and how the pixels of a part get to their place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Frames, Lost
from gpuem.formats.source import Part, Piece, Stitched


def without(piece: Piece, layout: Stitched, indices: NDArray[np.int64]) -> Lost | None:
    """Those of the frames that can't be had because something of them lies in no file."""
    if layout.missing is None:
        return None
    gone = indices[layout.missing[indices - piece.start]]
    return Lost(gone, "a part of it lies in no file", broken=False) if gone.size else None


def place_part(frames: Frames, rows: NDArray[np.int64], part: Part, out: NDArray[Any]) -> None:
    """Copy the box that a part takes from its frames into stitched ones.

    Parameters
    ----------
    frames : Frames
        Of the part, native pixels.
    rows : (n,) int64
        Which of the stitched frames each belongs to.
    part : Part
        What is taken, and where it goes.
    out : (m, y, x) array
        The stitched frames.
    """
    (top, left), (height, width) = part.inside, part.size
    target = out[:, part.at[0] : part.at[0] + height, part.at[1] : part.at[1] + width]
    size = part.shape[0] * part.shape[1]
    taken = slice(top, top + height), slice(left, left + width)
    if frames.starts.size and (np.diff(frames.starts) == size).all():
        begin = int(frames.starts[0])
        whole = frames.pixels[begin : begin + frames.starts.size * size]
        target[rows] = whole.reshape(-1, *part.shape)[:, *taken]
        return
    for row, start in zip(rows.tolist(), frames.starts.tolist(), strict=True):
        target[row] = frames.pixels[start : start + size].reshape(part.shape)[taken]
