"""Frames put together from parts, on the device: all parts of a tile arrive together, each is decoded and placed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.backends import Lost, cuda_load
from gpuem.backends import cuda_kernels as kernels
from gpuem.backends.chunk_grid import chunk_grid
from gpuem.backends.cuda_kernels import DeviceFrames
from gpuem.backends.cuda_load import Array, Tile, Workspace
from gpuem.backends.stitch import without
from gpuem.formats.source import Box, Chunks, Part, Piece, Runs, Source, Stitched, part_of
from gpuem.storage.host import Files
from gpuem.storage.pinned import ALIGNED, Arrived, Extent, Load


@dataclass
class _PartWork:
    """A workspace in which parts are decoded: memory of its own, and nothing is corrected."""

    work: Workspace

    def scratch(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return self.work.scratch(f"part {purpose}", shape, dtype)

    def even(self, frame: int) -> Array:
        return self.work.even(frame)

    def tables(self) -> dict[str, Array]:
        return {}


def describe(source: Source, files: Files, piece: Piece, box: Box, keep: NDArray[np.bool_], copy: bool) -> Tile:
    """What has to be read for the wanted frames of a tile; see `cuda_load.describe`."""
    layout = piece.layout
    assert isinstance(layout, Stitched)
    indices, left = tiles.frames_of(piece, box), keep
    parts = [(*part_of(source, piece, part), part) for part in layout.parts]
    if any(_odd(own, inner, part, box, keep) for own, inner, part in parts):
        return cuda_load.by_host(source, files, piece, box, keep, copy)
    lost = []
    gone = without(piece, layout, indices[keep])
    for item in [] if gone is None else [gone]:
        lost.append(item)
        left = left & ~np.isin(indices, item.indices)
    for own, inner, part in parts:
        if isinstance(inner.layout, Chunks):
            for frames in chunk_grid(own, inner, inner.layout, tiles.part_box(part, box), left).unwritten():
                lost.append(Lost(frames, "chunk was never written", broken=False))
                left = left & ~np.isin(indices, frames)
    if not left.any():
        return Tile(Load(), indices[left], cuda_load.nothing, lost)
    made = []
    for own, inner, part in parts:
        if isinstance(inner.layout, Runs):
            made.append(cuda_load.of_runs(own, inner, inner.layout, indices[left], False))
        else:
            assert isinstance(inner.layout, Chunks)
            which = (tiles.part_box(part, box), left)
            made.append(cuda_load.of_chunks(own, files, inner, inner.layout, which, False))
    load, begins = _together(made)
    row = np.full(source.frame_shape[1], layout.fill, source.raw_dtype)
    load.tables = (*load.tables, row)
    count = int(np.count_nonzero(left))

    def decode(arrived: Arrived, work: Workspace, codes: Array) -> DeviceFrames:
        out = work.scratch("stitched", (count, math.prod(source.frame_shape)), source.raw_dtype)
        tables, done = 0, 0
        for tile, begin, (_, _, part) in zip(made, begins, parts, strict=True):
            own = arrived.tables[tables : tables + len(tile.load.tables)]
            data = arrived.data[begin : begin + tile.load.nbytes]
            frames = tile.decode(Arrived(data, own), _PartWork(work), codes[done : done + tile.chunks])
            place_part(frames, (*part.inside, *part.size), out, part.at, source.frame_shape)
            tables, done = tables + len(tile.load.tables), done + tile.chunks
        # a row of fill values, again and again
        same = DeviceFrames(arrived.tables[-1], work.even(0)[:count], count, (source.frame_shape[0], 0), 1)
        for y, x, rows, columns in layout.gaps:
            place_part(same, (0, 0, rows, columns), out, (y, x), source.frame_shape)
        return cuda_load.finish_even(source, work, out, copy)

    return Tile(load, indices[left], decode, lost, sum(tile.chunks for tile in made))


def _odd(own: Source, inner: Piece, part: Part, box: Box, keep: NDArray[np.bool_]) -> bool:
    """Whether the processor must look at some of the chunks of a part."""
    if not isinstance(inner.layout, Chunks):
        return False
    grid = chunk_grid(own, inner, inner.layout, tiles.part_box(part, box), keep)
    return cuda_load.odd_chunks(inner, inner.layout, grid.index[grid.needed & grid.written])


def _together(made: list[Tile]) -> tuple[Load, list[int]]:
    """The loads of all parts side by side in one slot, and where each begins."""
    extents: list[Extent] = []
    begins, at = [], 0
    for tile in made:
        begins.append(at)
        extents += [Extent(e.file, e.offset, e.length, e.at + at) for e in tile.load.extents]
        at += -(-tile.load.nbytes // ALIGNED) * ALIGNED
    return Load(tuple(extents), at, tuple(table for tile in made for table in tile.load.tables)), begins


def needs(source: Source, piece: Piece, tile: tuple[int, ...]) -> dict[str, int]:
    """Bytes of the device by purpose for a tile of stitched frames; see `cuda_load.needs`."""
    layout = piece.layout
    assert isinstance(layout, Stitched)
    found = {"slot": 0, "tables": 8 * source.frame_shape[1] + ALIGNED}
    frames = math.prod(tile) * source.frame_nbytes
    odd = False
    for part in layout.parts:
        own, inner = part_of(source, piece, part)
        wanted = cuda_load.needs_of(own, inner, tiles.part_tile(part, tile))
        found["slot"] += wanted.pop("slot", 0) + ALIGNED
        found["tables"] += wanted.pop("tables", 0) + 4 * ALIGNED
        for purpose, nbytes in wanted.items():
            found[f"part {purpose}"] = max(found.get(f"part {purpose}", 0), nbytes)
        odd |= isinstance(inner.layout, Chunks) and cuda_load.odd_chunks(inner, inner.layout, slice(None))
    found["slot"] = max(found["slot"], frames if odd else 0)
    return {**found, "stitched": frames}


def chunks_of_tile(piece: Piece, tile: tuple[int, ...]) -> int:
    """Most chunks of a tile of stitched frames that report a code."""
    assert isinstance(piece.layout, Stitched)
    total = 0
    for part in piece.layout.parts:
        layout = part.piece.layout
        if isinstance(layout, Chunks) and cuda_load.reporting(part.piece):
            extent = (*tiles.part_tile(part, tile), *part.shape)
            total += math.prod(-(-t // c) for t, c in zip(extent, layout.shape, strict=True))
    return total


def place_part(
    frames: DeviceFrames, taken: tuple[int, int, int, int], out: Array, at: tuple[int, int], shape: tuple[int, int]
) -> None:
    """Frames of a part of the detector to their place in whole frames.

    Parameters
    ----------
    frames : DeviceFrames
        Native pixels of the part; with rows of 0 pixels they all repeat the first one.
    taken : tuple of int
        First row and column that are taken of them, number of rows and columns.
    out : (n, pixels of a frame) device array
        Of whole frames this box is overwritten.
    at : tuple of int
        Row and column of the whole frame where it begins.
    shape : tuple of int
        Shape (y, x) of the whole frame.
    """
    y, x, rows, columns = taken
    pitch = frames.shape[1]
    kernels.kernel("place_part", (f"u{8 * out.dtype.itemsize}",))(
        (frames.count, max(1, min(-(-rows * columns // 1024), 64))), (256,),
        (frames.pixels, frames.starts, np.int64(y * pitch + x), np.int32(pitch), np.int32(rows), np.int32(columns), out,
         np.int64(out.shape[1]), np.int64(at[0] * shape[1] + at[1]), np.int32(shape[1])),
    )  # fmt: skip
