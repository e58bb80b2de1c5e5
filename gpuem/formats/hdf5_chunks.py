"""Where the chunks of an HDF5 dataset lie: HDF5's index of them, checked against the dataset before it is believed.

With an extensible array as index (libver v110 or later, exactly one unlimited axis) `chunk_iter` of HDF5 up to 2.0
counts chunks in the order of the axes, while the index keeps the unlimited axis first: offsets are wrong unless that
axis is the first one. `get_chunk_info_by_coord` searches the same iteration and is wrong, too. What reads chunks,
`read_direct_chunk` among it, is right: it is what offsets are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import InputError
from gpuem.formats.hdf5_file import located
from gpuem.formats.remote import Url

_MOST_CHUNKS = 1 << 28
# chunks that are compared with what HDF5 reads: so many, and so many bytes of them, but two at least
_SAMPLES = 24
_SAMPLE_NBYTES = 8 << 20
_REMOTE_NBYTES = 1 << 20

Table = NDArray[Any]


def chunk_tables(dset: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32]]:
    """Byte offset, stored bytes and filters left out of every chunk, in C order of the grid; 0 bytes: never written.

    Raises
    ------
    InputError
        The index contradicts itself, the dataset, or what HDF5 reads; or there are too many chunks.
    """
    grid = tuple(-(-n // c) for n, c in zip(dset.shape, dset.chunks, strict=True))
    total = math.prod(grid)
    where = f"{located(dset.file)}: {dset.name}"
    if total > _MOST_CHUNKS:
        raise InputError(f"{where} {dset.shape} has {total} chunks {dset.chunks}; {_MOST_CHUNKS} can be indexed")
    offset, length, skipped = np.zeros(total, np.int64), np.zeros(total, np.int64), np.zeros(total, np.uint32)
    entries: list[Any] = []
    dset.id.chunk_iter(entries.append)
    if not entries:
        return offset, length, skipped
    at = np.array([entry.byte_offset for entry in entries], np.int64) + _shift(dset, entries[0])
    size = np.array([entry.size for entry in entries], np.int64)
    mask = np.array([entry.filter_mask for entry in entries], np.uint32)
    flat = _chosen(dset, grid, np.array([entry.chunk_offset for entry in entries], np.int64), at, size)
    if isinstance(flat, str):
        raise InputError(
            f"{where}: the index of its {len(entries)} chunks can't be believed: {flat}; it is damaged, or this HDF5 "
            "reports it wrongly: write the dataset anew (h5repack)"
        )
    offset[flat], length[flat], skipped[flat] = at, size, mask
    return offset, length, skipped


def _shift(dset: Any, entry: Any) -> int:
    """What is missing from the offsets of `chunk_iter` in a file with a user block: some HDF5 releases leave it out."""
    if not dset.file.userblock_size:
        return 0
    return int(dset.id.get_chunk_info_by_coord(entry.chunk_offset).byte_offset - entry.byte_offset)


def _chosen(dset: Any, grid: tuple[int, ...], reported: Table, at: Table, size: Table) -> Table | str:
    """Place of each chunk in the grid (C order), by the first reading of the index that holds, or what is wrong."""
    order = np.argsort(at, kind="stable")
    if (size <= 0).any():
        return f"chunk {int(np.argmax(size <= 0))} of it has {int(size.min())} bytes"
    if (at[order][1:] < (at + size)[order][:-1]).any():
        return "chunks overlap in the file"
    readings = [_placed(scaled, grid) for scaled in _scaled(dset, reported)]
    problems = [found if isinstance(found, str) else "" for found in readings]
    sound = [found for found in readings if not isinstance(found, str)]
    for flat in sound:
        others = [other for other in sound if other is not flat]
        problem = _compared(dset, grid, flat, at, size, others)
        if not problem:
            return flat
        problems.append(problem)
    return next(problem for problem in problems if problem)


def _scaled(dset: Any, reported: Table) -> Iterator[Table]:
    """Coordinates of the chunks, in chunks: as they are reported, and as an extensible array means them."""
    chunk = np.array(dset.chunks, np.int64)
    yield np.where(reported % chunk == 0, reported // chunk, -1)
    unlimited = [axis for axis, n in enumerate(dset.maxshape) if n is None]
    if len(unlimited) == 1 and unlimited[0] > 0:
        axis = unlimited[0]
        most = [1 if n is None else -(-n // c) for n, c in zip(dset.maxshape, dset.chunks, strict=True)]
        behind = math.prod(most[axis + 1 :])
        scaled = reported // chunk
        number = scaled[:, axis].copy()
        for k in range(axis + 1, len(most)):
            number = number * most[k] + scaled[:, k]
        # axes before the unlimited one are never counted up; in the index they follow it
        if scaled[:, :axis].any():
            return
        before = math.prod(most[:axis])
        rest = number % (before * behind)
        columns = np.unravel_index(rest, [*most[:axis], *most[axis + 1 :]])
        yield np.stack([*columns[:axis], number // (before * behind), *columns[axis:]], axis=1)


def _placed(scaled: Table, grid: tuple[int, ...]) -> Table | str:
    """Places in the grid, in C order, or what is wrong."""
    if (scaled < 0).any():
        return "an offset is no multiple of the shape of a chunk"
    outside = (scaled >= grid).any(axis=1)
    if outside.any():
        first = scaled[np.argmax(outside)].tolist()
        return f"{int(outside.sum())} lie outside of the grid {grid}, such as {first}"
    flat: Table = np.ravel_multi_index(tuple(scaled.T), grid).astype(np.int64)
    seen = np.zeros(math.prod(grid), np.bool_)
    seen[flat] = True
    if np.count_nonzero(seen) < flat.size:
        return "a chunk is reported twice"
    return flat


def _compared(dset: Any, grid: tuple[int, ...], flat: Table, at: Table, size: Table, others: list[Table]) -> str:
    """What differs where HDF5 itself reads some of the chunks; empty where nothing does."""
    path = located(dset.file)
    # what lies beyond the end of a file that was cut off is for the caller to say
    there = np.flatnonzero(at + size <= path.stat().st_size)
    if not there.size:
        return ""
    placed, flat, at, size = flat, flat[there], at[there], size[there]
    most = _REMOTE_NBYTES if isinstance(path, Url) else _SAMPLE_NBYTES
    count = min(_SAMPLES, max(2, most // int(size.max())), flat.size)
    some = np.linspace(0, flat.size - 1, count).astype(np.int64)
    # where readings differ, one look decides
    for other in others:
        differ = np.flatnonzero(flat != other[there])
        some = np.concatenate([np.flatnonzero(~np.isin(flat, other))[:2], differ[:4], some])
    for k in dict.fromkeys(some.tolist()):
        corner = _corner(dset, grid, int(flat[k]))
        stored = _read(dset, corner)
        if stored is None:
            return f"HDF5 has no chunk at {corner}, where the index says that there is one"
        if not isinstance(path, Url):
            with path.open("rb") as stream:
                stream.seek(int(at[k]))
                told = stream.read(int(size[k]))
            if told != stored:
                return f"HDF5 reads other bytes at {corner} than lie at byte {int(at[k])} of the file"
    empty = np.setdiff1d(np.arange(min(math.prod(grid), 1 << 16)), placed)
    for k in empty[np.linspace(0, empty.size - 1, min(4, empty.size)).astype(np.int64)].tolist():
        corner = _corner(dset, grid, k)
        if _read(dset, corner) is not None:
            return f"HDF5 reads a chunk at {corner}, where the index has none"
    return ""


def _corner(dset: Any, grid: tuple[int, ...], flat: int) -> tuple[int, ...]:
    return tuple(int(k) * c for k, c in zip(np.unravel_index(flat, grid), dset.chunks, strict=True))


def _read(dset: Any, corner: tuple[int, ...]) -> bytes | None:
    """The stored bytes of a chunk; None where it isn't there or can't be read."""
    try:
        return bytes(dset.id.read_direct_chunk(corner)[1])
    except (OSError, ValueError, RuntimeError):
        return None
