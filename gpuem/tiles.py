"""How much fits where, and where the cuts are. Pure functions: no file, no array of pixels, no device.

A piece of the source is cut into tiles: boxes of its frames that are read, decoded and computed at once. A shard is a
contiguous range of a piece's tiles. Cuts depend on the data alone, never on threads or memory, so that sums of floats
are combined in the same order everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import PlanError
from gpuem.formats.source import Calls, Chunks, Part, Piece, Resident, Runs, Source, Stitched, part_of, stored_layout
from gpuem.storage.host import GAP_NBYTES
from gpuem.storage.remote import AHEAD_NBYTES

# a few times the per-call cost of Python, and small enough for the caches
TILE_NBYTES = 8 << 20
# frames that follow one another are read a few at a time, which need little scratch
RUNS_TILE_NBYTES = 16 << 20
SHARD_NBYTES = 64 << 20
# so many keep the last one to end from mattering, where shards don't become too small by it
BALANCED_SHARDS = 128
# frames of a shard at least: its images over frames must be small beside the frames they are made of
LEAST_FRAMES = 64
# data that is in a GPU's memory is computed with as it is: few large launches
RESIDENT_NBYTES = 2 << 30
# 10 TB still make a manageable number of shards
MOST_SHARDS = 1 << 14
# frames per tile and shard, unless one chunk holds more: results per frame stay small
MOST_FRAMES = 1 << 15
# so much of frames that follow one another is read at once: few calls, and it is used while it is in the caches
READ_NBYTES = 2 << 20
# a few frames at a time are corrected and used while they are in the caches
CORRECTED_NBYTES = 2 << 20
# bytes per scan position of the maps that an analysis makes of its sums, and of what it makes them from, where the
# analysis doesn't say
MAPS_NBYTES = 256
# the interpreter with its libraries and compiled kernels, measured on Linux x86-64
BASE_NBYTES = 400 << 20


@dataclass(frozen=True)
class Shard:
    """The unit of work: tiles [first, last) of one piece."""

    index: int
    piece: int
    first: int
    last: int
    frames: int


@dataclass(frozen=True)
class Sizes:
    """Bytes of decoded frames in a tile (of runs, of anything else) and in a shard that a backend works well with."""

    runs_tile: int = field(default_factory=lambda: RUNS_TILE_NBYTES)
    tile: int = field(default_factory=lambda: TILE_NBYTES)
    shard: int = field(default_factory=lambda: SHARD_NBYTES)


@dataclass(frozen=True)
class Limits:
    """What a run is allowed, and how large its results are.

    Parameters
    ----------
    positions : int
        Scan positions; there may be more of them than frames.
    map_nbytes : int
        Bytes of maps per scan position, of all analyses together.
    threads : int
        Most threads.
    memory : int
        Bytes of host memory that the whole process may take.
    device_memory : int, optional
        Bytes of a GPU's memory; by default what is free.
    sample_nbytes : int
        Bytes of the frames that analyses look at beforehand.
    """

    positions: int
    map_nbytes: int
    threads: int
    memory: int
    device_memory: int | None = None
    sample_nbytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Where the cuts are and what they cost.

    Parameters
    ----------
    shards : tuple of Shard
        The work, in file order.
    tiles : tuple of tuple of int
        For each piece, the shape of its tiles over its nav axes.
    threads : int
        How many shards are in work at once; on a GPU, how many threads read for the one that is.
    nbytes : dict of str to int
        Host memory by purpose; mapped files don't count, the system takes their pages back whenever it wants.
    device_nbytes : dict of str to int
        Memory of the GPU by purpose; empty on a CPU.
    """

    shards: tuple[Shard, ...]
    tiles: tuple[tuple[int, ...], ...]
    threads: int
    nbytes: dict[str, int]
    device_nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def total_nbytes(self) -> int:
        """All host memory the run takes."""
        return sum(self.nbytes.values())


def cut(source: Source, sizes: Sizes) -> tuple[tuple[Shard, ...], tuple[tuple[int, ...], ...]]:
    """Shards of a source, and the shape of the tiles of each of its pieces."""
    tiles = tuple(tile_shape(piece, source.frame_nbytes, sizes) for piece in source.pieces)
    return tuple(_shards(source, tiles, sizes)), tiles


def plan(source: Source, limits: Limits, position_nbytes: int, image_nbytes: int, fit_nbytes: int = 0) -> Plan:
    """Cut a source into shards and tiles for the threads of a CPU.

    Parameters
    ----------
    source : Source
        The frames.
    limits : Limits
        What the run is allowed; fewer threads are taken where memory is short.
    position_nbytes : int
        Bytes of sums per scan position.
    image_nbytes : int
        Bytes of the images reduced over frames (sum, maximum), per shard.
    fit_nbytes : int
        Bytes of what fits find, per scan position; of these nobody makes copies but the maps.

    Raises
    ------
    PlanError
        Not even one thread fits; with the numbers.
    """
    # many shards keep all workers busy to the end; fits take far longer than reading, so theirs are smaller
    balanced = min(SHARD_NBYTES, max(RUNS_TILE_NBYTES, source.nbytes // BALANCED_SHARDS))
    # and over a network a shard is what is asked for at once
    balanced = TILE_NBYTES if fit_nbytes else SHARD_NBYTES if source.remote else balanced
    shards, tiles = cut(source, Sizes(shard=balanced))
    shard_frames = max((shard.frames for shard in shards), default=0)
    tile_nbytes = max(
        (
            scratch_nbytes(piece, tile, source) + _corrected(tile, source)
            for piece, tile in zip(source.pieces, tiles, strict=True)
        ),
        default=0,
    )
    fixed = {
        "Python, libraries, kernels": BASE_NBYTES,
        "sums and maps": limits.positions * (2 * position_nbytes + fit_nbytes + limits.map_nbytes),
        "images": 2 * image_nbytes,
        **({"sample of frames": limits.sample_nbytes} if limits.sample_nbytes else {}),
        **({"read ahead": min(AHEAD_NBYTES, sum(f.size for f in source.files))} if source.remote else {}),
        **({"correction": source.correction.nbytes} if source.correction is not None else {}),
    }
    # beside the shard in work one may wait to be combined, and images of two more for their turn
    per_thread = tile_nbytes + 3 * shard_frames * (position_nbytes + fit_nbytes) + 4 * image_nbytes
    room = limits.memory - sum(fixed.values())
    fitting = min(limits.threads, room // max(per_thread, 1), max(len(shards), 1))
    if fitting < 1:
        raise PlanError(
            f"the run needs {_mb(sum(fixed.values()) + per_thread)} with one thread and may take {_mb(limits.memory)}: "
            f"{', '.join(f'{name} {_mb(n)}' for name, n in fixed.items())}, a thread {_mb(per_thread)} "
            f"(tile of {tiles[0]} frames: {_mb(tile_nbytes)}). Allow more ([run] memory), or store the data in chunks "
            "of fewer frames"
        )
    return Plan(
        shards, tiles, fitting, {**fixed, f"{fitting} thread{'s' if fitting > 1 else ''}": fitting * per_thread}
    )


def tile_shape(piece: Piece, frame_nbytes: int, sizes: Sizes | None = None) -> tuple[int, ...]:
    """Shape of a tile over the nav axes of a piece: whole chunks, near the size that suits."""
    sizes = sizes or Sizes()
    layout = stored_layout(piece.layout)
    if isinstance(layout, Runs):
        target = RESIDENT_NBYTES if _used_in_place(piece) else sizes.runs_tile
        return (max(1, min(target // frame_nbytes, MOST_FRAMES, piece.frames)),)
    nav = piece.nav
    if isinstance(layout, Chunks | Calls | Stitched):
        tile = list(together(piece))
        grow = range(len(nav) - 1, -1, -1)
    else:
        # Fortran order: the first axis is the fastest, neighbours along it share cache lines
        tile, grow = [1] * len(nav), range(len(nav))
    tile = [min(t, n) for t, n in zip(tile, nav, strict=True)]
    for axis in grow:
        fits = min(sizes.tile // frame_nbytes, MOST_FRAMES) // math.prod(tile)
        tile[axis] = min(nav[axis], tile[axis] * max(1, fits))
        if tile[axis] < nav[axis]:
            break
    return tuple(tile)


def together(piece: Piece) -> tuple[int, ...]:
    """Shape, over the nav axes of a piece, of frames that can only be had together."""
    layout = stored_layout(piece.layout)
    if isinstance(layout, Chunks):
        return layout.shape[: len(piece.nav)]
    if isinstance(layout, Calls):
        return layout.chunk
    if isinstance(layout, Stitched):
        shapes = [together(part.piece) for part in layout.parts if not isinstance(part.piece.layout, Runs)]
        return tuple(max(sizes) for sizes in zip((1,) * len(piece.nav), *shapes, strict=True))
    return (1,) * len(piece.nav)


def part_box(part: Part, box: Sequence[slice]) -> tuple[slice, ...]:
    """A tile of a stitched piece as a box over the nav axes of one of its parts."""
    rows = part.first // math.prod(part.piece.nav[1:])
    return slice(box[0].start + rows, box[0].stop + rows), *box[1:]


def part_tile(part: Part, tile: tuple[int, ...]) -> tuple[int, ...]:
    """A tile of a stitched piece, so large that whole chunks of one of its parts hold it wherever it begins."""
    if not isinstance(part.piece.layout, Chunks):
        return tile
    shift = [part.first // math.prod(part.piece.nav[1:]), *[0] * (len(tile) - 1)]
    chunk = part.piece.layout.shape
    return tuple(
        t if s % c == 0 and (t % c == 0 or (s == 0 and t >= n)) else t + c - 1
        for t, s, c, n in zip(tile, shift, chunk, part.piece.nav, strict=False)
    )


def grid(piece: Piece, tile: tuple[int, ...]) -> tuple[int, ...]:
    """Number of tiles along each nav axis."""
    return tuple(-(-n // t) for n, t in zip(nav_shape(piece), tile, strict=True))


def corrected_frames(source: Source) -> int:
    """Number of frames that are corrected at once: whole fours, in which the kernels take them."""
    return max(4, CORRECTED_NBYTES // source.corrected_nbytes // 4 * 4)


def read_distance(length: int, stride: int) -> int:
    """Bytes that one of many frames of `length` bytes takes where they are read to."""
    return stride if stride - length <= GAP_NBYTES else length


def read_frames(piece: Piece, source: Source, stride: int) -> int:
    """Number of frames of a run that are read at once: whole fours, in which the kernels take them."""
    layout = stored_layout(piece.layout)
    assert isinstance(layout, Runs)
    # what is read and what it is decoded to share the caches
    each = read_distance(layout.frame_bytes, stride) + (0 if _plain(piece, source, stride) else source.frame_nbytes)
    return max(4, READ_NBYTES // each // 4 * 4)


def nav_shape(piece: Piece) -> tuple[int, ...]:
    """The arrangement in which a piece is cut: frames that follow one another have one axis only."""
    return (piece.frames,) if isinstance(stored_layout(piece.layout), Runs) else piece.nav


def boxes(piece: Piece, tile: tuple[int, ...], shard: Shard) -> Iterator[tuple[slice, ...]]:
    """The tiles of a shard, as boxes over the nav axes of its piece."""
    for number in range(shard.first, shard.last):
        yield box(piece, tile, number)


def box(piece: Piece, tile: tuple[int, ...], number: int) -> tuple[slice, ...]:
    """Tile `number`, in C order of the grid of tiles, as a box over the nav axes."""
    corner = np.unravel_index(number, grid(piece, tile))
    return tuple(
        slice(int(c) * t, min((int(c) + 1) * t, n)) for c, t, n in zip(corner, tile, nav_shape(piece), strict=True)
    )


def tile_of(piece: Piece, tile: tuple[int, ...], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of the tile that holds each frame, given by flat indices in file order."""
    index = np.unravel_index(indices - piece.start, nav_shape(piece))
    return np.ravel_multi_index(tuple(i // t for i, t in zip(index, tile, strict=True)), grid(piece, tile)).astype(
        np.int64
    )


def frames_of(piece: Piece, where: Sequence[slice]) -> NDArray[np.int64]:
    """Flat indices, in file order, of the frames in a box, in C order of the box."""
    axes = [np.arange(s.start, s.stop) for s in where]
    if len(axes) == 1:
        return piece.start + axes[0]
    return piece.start + np.ravel_multi_index(np.ix_(*axes), nav_shape(piece)).reshape(-1).astype(np.int64)


def _used_in_place(piece: Piece) -> bool:
    return isinstance(piece.layout, Resident) and not piece.codec


def _shards(source: Source, tiles: tuple[tuple[int, ...], ...], sizes: Sizes) -> Iterator[Shard]:
    usual = max(sizes.shard, source.nbytes // MOST_SHARDS, LEAST_FRAMES * source.frame_nbytes)
    index = 0
    for k, (piece, tile) in enumerate(zip(source.pieces, tiles, strict=True)):
        target = max(usual, RESIDENT_NBYTES) if _used_in_place(piece) else usual
        tile_frames = math.prod(tile)
        count = math.prod(grid(piece, tile))
        fits = min(target // source.frame_nbytes, MOST_FRAMES)
        step = max(1, fits // tile_frames)
        for first in range(0, count, step):
            last = min(first + step, count)
            frames = min((last - first) * tile_frames, piece.frames)
            yield Shard(index, k, first, last, frames)
            index += 1


def scratch_nbytes(piece: Piece, tile: tuple[int, ...], source: Source) -> int:
    """Bytes of decoded frames, and of what they are decoded from, that a thread holds at once."""
    decoded = math.prod(tile) * source.frame_nbytes
    layout = stored_layout(piece.layout)
    if isinstance(layout, Runs):
        return _read_nbytes(piece, math.prod(tile), source)
    if isinstance(layout, Chunks):
        # chunks hang over the edges; all chunks of a tile are read, decoded and put in place together
        around = [-(-t // c) * c for t, c in zip((*tile, *source.frame_shape), layout.shape, strict=True)]
        chunks = math.prod(around) * piece.stored.itemsize
        number = math.prod(around) // math.prod(layout.shape)
        return decoded + 2 * chunks + number * int(layout.length.max(initial=0))
    if isinstance(layout, Stitched):
        parts = [(part_of(source, piece, part), part_tile(part, tile)) for part in layout.parts]
        return decoded + max(scratch_nbytes(inner, cut, own) for (own, inner), cut in parts)
    return 2 * decoded


def _read_nbytes(piece: Piece, frames: int, source: Source) -> int:
    """Bytes of frames of runs that are read at once, and of what they are decoded to."""
    layout = stored_layout(piece.layout)
    assert isinstance(layout, Runs)
    least = -(-layout.frame_bytes // 64) * 64
    most = 0
    for stride in set(layout.stride.tolist()):
        each = max(read_distance(layout.frame_bytes, stride), least) + (
            0 if _plain(piece, source, stride) else source.frame_nbytes
        )
        # each of two arrays is rounded up to cache lines
        most = max(most, min(read_frames(piece, source, stride), frames) * each + 128)
    # from a GPU they come by way of another array
    return 2 * most if isinstance(piece.layout, Resident) else most


def _plain(piece: Piece, source: Source, stride: int) -> bool:
    """Whether stored pixels are native ones and aligned."""
    return not piece.codec and piece.stored == source.raw_dtype and stride % piece.stored.itemsize == 0


def _corrected(tile: tuple[int, ...], source: Source) -> int:
    """Bytes of corrected frames that a thread holds at once."""
    if source.correction is None:
        return 0
    return min(math.prod(tile), corrected_frames(source)) * source.corrected_nbytes


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
