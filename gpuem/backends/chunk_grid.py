"""The chunks of one tile: which they are, which are needed, and which frames hang on each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.formats.source import Box, Chunks, Piece, Source


@dataclass(frozen=True, eq=False)
class ChunkGrid:
    """The chunks that a tile touches, in C order of their grid.

    Parameters
    ----------
    piece : Piece
        What the tile is cut from.
    shape : tuple of int
        Shape of a chunk.
    box : tuple of slice
        The tile, over the nav axes.
    whole : tuple of slice
        The tile, over all axes.
    extent : tuple of int
        Shape of the piece, over all axes.
    corners : (axes, n) int64
        Place of each chunk in the grid of all chunks.
    index : (n,) int64
        Its row in the tables of `Chunks`.
    wanted : bool array
        Which frames are wanted, in the shape of the tile.
    needed, written : (n,) bool
        Whether the chunk holds a wanted frame, and whether it is in the file.
    """

    piece: Piece
    shape: tuple[int, ...]
    box: Box
    whole: Box
    extent: tuple[int, ...]
    corners: NDArray[np.int64]
    index: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    needed: NDArray[np.bool_]
    written: NDArray[np.bool_]

    def place(self, k: int) -> tuple[slice, ...]:
        """The part of the tile that chunk `k` fills."""
        return _place(self.corners[:, k], self.shape, self.extent, self.whole)

    def inside(self, k: int) -> tuple[slice, ...]:
        """The part of chunk `k` that lies in the tile."""
        axes = zip(self.corners[:, k].tolist(), self.shape, self.whole, self.place(k), strict=True)
        begins = [(max(w.start - n * c, 0), s.stop - s.start) for n, c, w, s in axes]
        return tuple(slice(begin, begin + size) for begin, size in begins)

    def frames(self, k: int) -> NDArray[np.int64]:
        """Flat indices of the wanted frames that chunk `k` holds a part of."""
        where = self.place(k)[: len(self.box)]
        boxes = [slice(s.start + b.start, s.stop + b.start) for s, b in zip(where, self.box, strict=True)]
        return tiles.frames_of(self.piece, boxes)[self.wanted[where].reshape(-1)]

    def unwritten(self) -> Iterator[NDArray[np.int64]]:
        """The wanted frames of every needed chunk that was never written."""
        for k in np.flatnonzero(self.needed & ~self.written).tolist():
            yield self.frames(k)

    @property
    def follow_one_another(self) -> bool:
        """Whether chunks laid end to end are the tile: none hangs over, and before a cut axis all are 1 long."""
        return _follow(self.shape, _counts(self.corners), self.whole)

    def geometry(self) -> NDArray[np.int64]:
        """For every axis: extent of the tile, extent of a chunk, number of chunks, begin inside the first chunk."""
        extent = [s.stop - s.start for s in self.whole]
        begin = [s.start % c for s, c in zip(self.whole, self.shape, strict=True)]
        return np.array([extent, self.shape, _counts(self.corners), begin], np.int64)


def chunk_grid(source: Source, piece: Piece, chunks: Chunks, box: Box, keep: NDArray[np.bool_]) -> ChunkGrid:
    """The chunks of a tile; `keep` says which of its frames are wanted, in C order of the box."""
    nav, extent, shape = len(piece.nav), (*piece.nav, *source.frame_shape), chunks.shape
    whole = (*box, slice(0, source.frame_shape[0]), slice(0, source.frame_shape[1]))
    first = [s.start // c for s, c in zip(whole, shape, strict=True)]
    counts = [-(-s.stop // c) - f for s, c, f in zip(whole, shape, first, strict=True)]
    corners = np.indices(counts).reshape(len(counts), -1) + np.reshape(first, (-1, 1))
    index = np.ravel_multi_index(tuple(corners), [-(-n // c) for n, c in zip(extent, shape, strict=True)])
    wanted = keep.reshape([s.stop - s.start for s in box])
    if _follow(shape, counts, whole):
        needed = np.asarray(wanted.reshape(index.size, -1).any(axis=1))
    else:
        needed = np.array([wanted[_place(corner, shape, extent, whole)[:nav]].any() for corner in corners.T])
    written = np.asarray(chunks.length[index] > 0)
    return ChunkGrid(piece, shape, box, whole, extent, corners, index, wanted, needed, written)


def _counts(corners: NDArray[np.int64]) -> list[int]:
    return [int(n) for n in corners[:, -1] - corners[:, 0] + 1]


def _place(corner: NDArray[np.int64], shape: tuple[int, ...], extent: tuple[int, ...], whole: Box) -> tuple[slice, ...]:
    return tuple(
        slice(max(k * c - w.start, 0), min(k * c + c, n, w.stop) - w.start)
        for k, c, n, w in zip(corner.tolist(), shape, extent, whole, strict=True)
    )


def _follow(shape: tuple[int, ...], counts: list[int], whole: Box) -> bool:
    sizes = [s.stop - s.start for s in whole]
    fits = counts[-2:] == [1, 1] and all(n * c == size for n, c, size in zip(counts, shape, sizes, strict=True))
    return fits and all(n == 1 or math.prod(shape[:axis]) == 1 for axis, n in enumerate(counts))
