"""A look beforehand: a sample of frames, spread evenly over the wanted scan positions and cheap to read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from gpuem import tiles
from gpuem.analyses import Sample
from gpuem.backends import Lost, cpu
from gpuem.dataset import Dataset
from gpuem.engine import describe
from gpuem.errors import DataError
from gpuem.formats.source import Box, Piece, Strided
from gpuem.formats.stitch import written

SAMPLE_FRAMES = 512
SAMPLE_NBYTES = 256 * 10**6
# frames that can be read only many at a time come from so many places at least ...
LEAST_PLACES = 16
# ... unless more than this would have to be decoded for them
MOST_DECODED = 4 * SAMPLE_NBYTES
# where a frame's pixels aren't adjacent, those of so many frames share the pages of a file
NEIGHBOURS = 64
# where many frames can't be read, others are tried: so many times in all
ROUNDS = 4
# its multiples, modulo one, lie as evenly as can be: the sample sees all columns of the scan, whatever their number
GOLDEN = (5**0.5 - 1) / 2
_BLOCK = 1 << 16


def sample_frames(ds: Dataset, most: int = SAMPLE_FRAMES) -> int:
    """Most frames of a sample: few, and not too many bytes."""
    return max(1, min(SAMPLE_FRAMES, most, SAMPLE_NBYTES // ds.source.corrected_nbytes, ds.positions))


def sample_nbytes(ds: Dataset, most: int = SAMPLE_FRAMES) -> int:
    """Bytes of the largest sample."""
    return sample_frames(ds, most) * ds.source.corrected_nbytes


def glance_nbytes(ds: Dataset, most: int) -> int:
    """Bytes that have to be decoded at most for a sample of `most` frames."""
    largest = max((math.prod(unit(piece)) for piece in ds.source.pieces), default=1)
    return most * largest * ds.source.frame_nbytes


def sample(ds: Dataset, wanted: NDArray[np.bool_], most: int = SAMPLE_FRAMES) -> Sample:
    """Read a sample; the same data and region give the same one.

    Frames that are missing, broken or hold NaN are passed over: what becomes of them is for the run to say.

    Parameters
    ----------
    ds : Dataset
        The frames, corrected where they are to be.
    wanted : (positions,) bool
        The region of interest.
    most : int
        Most frames.

    Raises
    ------
    DataError
        None of the frames that were tried can be read; with the reason.
    """
    there = promised(ds, wanted)
    count = min(sample_frames(ds, most), int(np.count_nonzero(there)))
    frames, positions = np.empty((count, *ds.frame_shape), ds.dtype), np.empty(count, np.int64)
    done = tried = 0
    reasons: dict[str, None] = {}
    if ds.source.in_files:
        ds.files.check()
    for _ in range(ROUNDS):
        # half of it is enough; what is missing of it is taken from frames that were not tried before
        if 2 * done >= count or not there.any():
            break
        chosen = choose(ds, there, count - done)
        there[chosen] = False
        tried += chosen.size
        found = _apart(ds, chosen, frames[done:], reasons)
        positions[done : done + found.size] = found
        done += found.size
    if not done:
        why = "; ".join(list(reasons)[:3]) or "no frame of the file lies inside the wanted part of the scan"
        raise DataError(f"no frame could be read to look at beforehand, {tried} were tried: {why}")
    return Sample(frames[:done], positions[:done], wanted, ds.scan_shape)


def promised(ds: Dataset, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the wanted positions have a frame as far as headers and indexes of chunks say."""
    there = np.zeros(wanted.size, np.bool_)
    for piece in ds.source.pieces:
        first, end = max(piece.start - ds.skip, 0), min(piece.start + piece.frames - ds.skip, wanted.size)
        if first < end:
            held = written(piece, ds.frame_shape)
            own = slice(first + ds.skip - piece.start, end + ds.skip - piece.start)
            there[first:end] = wanted[first:end] if held is None else wanted[first:end] & held[own]
    return there


def choose(ds: Dataset, there: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """About `count` of the positions that are `there`, ascending: evenly spread, in whole chunks as far as possible."""
    indices = spread(there, count) + ds.skip
    chosen = [
        _together(ds, piece, there, mine, MOST_DECODED * mine.size // indices.size)
        for piece in ds.source.pieces
        if (mine := indices[(indices >= piece.start) & (indices < piece.start + piece.frames)]).size
    ]
    return np.sort(np.concatenate(chosen)) - ds.skip


def spread(there: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """`count` of the True positions of a mask, ascending: one out of each of as many equal parts of them."""
    # a block at a time: the numbers of all positions of a large scan would be larger than the sample
    blocks = np.add.reduceat(there, np.arange(0, there.size, _BLOCK), dtype=np.int64)
    ends = np.cumsum(blocks)
    edges = np.arange(min(count, int(ends[-1])) + 1) * ends[-1] // max(1, min(count, int(ends[-1])))
    inside = np.arange(edges.size - 1) * GOLDEN % 1
    ranks = edges[:-1] + (inside * np.diff(edges)).astype(np.int64)
    where = np.searchsorted(ends, ranks, side="right")
    found = np.empty(ranks.size, np.int64)
    for block in np.unique(where).tolist():
        own = where == block
        at = np.flatnonzero(there[block * _BLOCK : (block + 1) * _BLOCK])
        found[own] = block * _BLOCK + at[ranks[own] - (ends[block] - blocks[block])]
    return found


def unit(piece: Piece) -> tuple[int, ...]:
    """Shape, over the nav axes of a piece, of the frames that cost hardly more to read than one of them."""
    shape = tiles.together(piece)
    if isinstance(piece.layout, Strided):
        # in Fortran order neighbours along the first axis share pages
        shape = (NEIGHBOURS, *shape[1:])
    nav = tiles.nav_shape(piece)
    return tuple(min(size, n) for size, n in zip(shape[-len(nav) :], nav, strict=True))


def _together(
    ds: Dataset, piece: Piece, there: NDArray[np.bool_], mine: NDArray[np.int64], nbytes: int
) -> NDArray[np.int64]:
    """As many frames as `mine`, near some of them, so that no more than `nbytes` of a piece have to be decoded."""
    shape = unit(piece)
    size = math.prod(shape)
    first = max(piece.start - ds.skip, 0)
    own = there[first : piece.start + piece.frames - ds.skip]
    if size == 1 or mine.size == np.count_nonzero(own):
        return mine
    least = min(LEAST_PLACES, nbytes // (size * ds.source.frame_nbytes))
    places = spread(own, min(max(1, least, mine.size // size), mine.size)) + first
    chosen = []
    for number in np.unique(tiles.tile_of(piece, shape, places + ds.skip)).tolist():
        frames = tiles.frames_of(piece, tiles.box(piece, shape, number))
        frames = frames[(frames >= ds.skip) & (frames < ds.skip + there.size)]
        chosen.append(frames[there[frames - ds.skip]])
    return _evenly(np.concatenate(chosen), mine.size)


def _evenly(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the values, at equal distances."""
    count = min(count, values.size)
    return values[(2 * np.arange(count) + 1) * values.size // (2 * max(count, 1))]


def _apart(
    ds: Dataset, chosen: NDArray[np.int64], out: NDArray[np.generic], reasons: dict[str, None]
) -> NDArray[np.int64]:
    """Read in a thread of its own, which takes what it needed for decoding with it."""
    if not ds.source.in_files:
        # arrays on a GPU may still be written to by this thread's stream
        return _read(ds, chosen, out, reasons)
    with ThreadPoolExecutor(1, thread_name_prefix="gpuem-look") as pool:
        return pool.submit(_read, ds, chosen, out, reasons).result()


def _read(
    ds: Dataset, chosen: NDArray[np.int64], out: NDArray[np.generic], reasons: dict[str, None]
) -> NDArray[np.int64]:
    """Read the frames at the chosen positions one after another into `out`; the positions of those that are good."""
    found: list[int] = []
    size = math.prod(ds.frame_shape)
    for piece, box, keep in _boxes(ds, chosen + ds.skip):
        for item in cpu.load(ds.source, ds.files, piece, box, keep):
            if isinstance(item, Lost):
                reasons[f"{describe(item.indices)}: {item.message}"] = None
                continue
            good, why = cpu.usable(item.frames)
            if not good.all():
                reasons[f"{describe(item.indices[~good])}: {why}"] = None
            for start, index in zip(item.frames.starts[good].tolist(), item.indices[good].tolist(), strict=True):
                out[len(found)] = item.frames.pixels[start : start + size].reshape(ds.frame_shape)
                found.append(index - ds.skip)
    return np.array(found, np.int64)


def _boxes(ds: Dataset, indices: NDArray[np.int64]) -> Iterator[tuple[Piece, Box, NDArray[np.bool_]]]:
    """The units that hold frames, given by ascending flat indices in file order, and which frames of each they are."""
    for piece in ds.source.pieces:
        mine = indices[(indices >= piece.start) & (indices < piece.start + piece.frames)]
        shape = unit(piece)
        for number in np.unique(tiles.tile_of(piece, shape, mine)).tolist() if mine.size else ():
            box = tiles.box(piece, shape, number)
            yield piece, box, np.isin(tiles.frames_of(piece, box), mine)
