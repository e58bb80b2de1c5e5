"""Where the bytes of an HDF5 dataset lie: contiguous, chunked, in raw files beside it, or in other HDF5 files."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from gpuem.errors import InputError, TruncatedError
from gpuem.formats.hdf5_file import Files, calls, located, opened, pixel_type
from gpuem.formats.named import find
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import Chunks, Layout, Piece, Runs, Step

_PLAIN = {1: "deflate", 3: "fletcher32", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32015: "zstd"}
_MOST_CHUNKS = 1 << 28
_CHECKSUM = ("shuffle", "fletcher32")


def describe(dset: Any, files: Files, *, fit: bool) -> list[Piece]:
    """Pieces of a dataset whose last two axes are the frame; frames are counted from its first one.

    Parameters
    ----------
    dset : h5py.Dataset
        Open; at least two axes.
    files : Files
        Takes up the files that are met and the notes for the user.
    fit : bool
        Go on without the frames of missing or cut-off files.

    Raises
    ------
    InputError
        A file that holds frames is missing, the pixels aren't real numbers, a filter isn't installed.
    TruncatedError
        A file ends before its last frame.
    """
    stored, exact = pixel_type(dset)
    nav = dset.shape[:-2] or (1,)
    plist = dset.id.get_create_plist()
    if dset.is_virtual:
        pieces = _virtual(dset, files, fit=fit)
        if pieces is None:
            files.note(f"{dset.name}: virtual, but not whole frames in order; read through h5py, by one thread")
    elif not exact:
        pieces = None
        files.note(f"{dset.name}: its numbers have unused bits, so it is read through h5py, by one thread")
    elif dset.external:
        pieces = _external(dset, stored, files, fit=fit)
    elif dset.chunks:
        pieces = _chunked(dset, stored, files, fit=fit)
    elif plist.get_layout() == 1:
        pieces = _contiguous(dset, stored, files, fit=fit)
    else:
        pieces = None
    if pieces is None and isinstance(_path(dset), Url) and (dset.is_virtual or dset.external):
        raise InputError(
            f"{_path(dset)}: {dset.name} is put together from other files in a way that only HDF5 itself can follow, "
            "and it can't over a network; copy all of them to a disk"
        )
    if pieces is None:
        layout: Layout = calls(dset, stored)
        files.index(_path(dset))
        return [Piece(0, nav, layout, stored.newbyteorder("="))]
    return pieces


def _path(dset: Any) -> Place:
    return located(dset.file)


def _contiguous(dset: Any, stored: np.dtype[Any], files: Files, *, fit: bool) -> list[Piece]:
    """Frames one after another in the HDF5 file itself."""
    import h5py

    nav = dset.shape[:-2] or (1,)
    frame_bytes = math.prod(dset.shape[-2:]) * stored.itemsize
    if dset.id.get_space_status() == h5py.h5d.SPACE_STATUS_NOT_ALLOCATED:
        files.note(f"{dset.name}: none of its {math.prod(nav)} frames was ever written")
        return []
    number, offset = files.index(_path(dset)), dset.id.get_offset()
    there = max(0, files.size(number) - offset) // frame_bytes
    whole = _whole(dset, math.prod(nav), there, files, fit=fit)
    shape = nav if whole == math.prod(nav) else (whole,)
    return [Piece(0, shape, Runs.one(offset, whole, frame_bytes, frame_bytes, number), stored)] if whole else []


def _whole(dset: Any, promised: int, there: int, files: Files, *, fit: bool, what: str = "") -> int:
    """How many of the promised frames can be read; raises TruncatedError where some can't and `fit` isn't set."""
    if there >= promised:
        return promised
    message = f"{what or _path(dset)}: holds {there} of the {promised} frames that {dset.name} promises"
    if not fit:
        raise TruncatedError(f"{message}; set fit = true to go on with them", there)
    files.note(message)
    return there


def steps(dset: Any) -> tuple[tuple[Step, ...], list[str]]:
    """The filters of a dataset in the order in which they are undone, and those that can't be undone without HDF5."""
    plist = dset.id.get_create_plist()
    undo, alien = [], []
    for k in range(plist.get_nfilters()):
        number, _, values, name = plist.get_filter(k)
        if number in _PLAIN:
            undo.append(Step(_PLAIN[number]))
        elif number == 2 and values:
            undo.append(Step("shuffle", (values[0],)))
        elif (
            number == 32008 and len(values) > 2 and values[2] in (1, 2, 4, 8) and values[4:5] in ((), (0,), (2,), (3,))
        ):
            undo.append(Step("bitshuffle", (values[2], values[3] if len(values) > 3 else 0, (*values[4:5], 0)[0])))
        else:
            alien.append(f"{number} ({name.decode(errors='replace')})")
    # of two compressors the size in between isn't known
    packers = [
        s.name for s in undo if s.name not in _CHECKSUM and not (s.name == "bitshuffle" and s.parameters[2] == 0)
    ]
    if len(packers) > 1:
        alien.append(" after ".join(packers))
    return tuple(reversed(undo)), alien


def _chunked(dset: Any, stored: np.dtype[Any], files: Files, *, fit: bool) -> list[Piece] | None:
    """Chunks, from one pass over HDF5's index; None where they need h5py."""
    codec, alien = steps(dset)
    if alien or not hasattr(dset.id, "chunk_iter"):
        why = f"filter {', '.join(alien)}" if alien else "an h5py without chunk_iter"
        files.note(f"{dset.name}: read through h5py, by one thread, because of {why}")
        return None
    shape, chunk = ((1,) * (dset.ndim == 2) + tuple(v) for v in (dset.shape, dset.chunks))
    grid = tuple(-(-n // c) for n, c in zip(shape, chunk, strict=True))
    number, total = files.index(_path(dset)), math.prod(grid)
    if total > _MOST_CHUNKS:
        raise InputError(
            f"{_path(dset)}: {dset.name} {shape} has {total} chunks {chunk}; {_MOST_CHUNKS} can be indexed"
        )
    offset, length, skipped = np.zeros(total, np.int64), np.zeros(total, np.int64), np.zeros(total, np.uint32)
    entries: list[Any] = []
    dset.id.chunk_iter(entries.append)
    if entries:
        at = np.array([entry.chunk_offset for entry in entries], np.int64) // np.array(dset.chunks)
        at = np.concatenate([np.zeros((len(at), int(dset.ndim == 2)), np.int64), at], axis=1)
        inside = (at < grid).all(axis=1)
        flat = np.ravel_multi_index(tuple(at[inside].T), grid)
        offset[flat] = np.array([entry.byte_offset for entry in entries], np.int64)[inside] + _shift(dset, entries[0])
        length[flat] = np.array([entry.size for entry in entries], np.int64)[inside]
        skipped[flat] = np.array([entry.filter_mask for entry in entries], np.uint32)[inside]
    gone = int((length == 0).sum())
    if gone:
        files.note(f"{dset.name}: {gone} of its {total} chunks were never written")
    cut = (offset > files.size(number) - length) & (length > 0)
    if cut.any():
        message = f"{_path(dset)}: {files.size(number)} bytes; {int(cut.sum())} of {total} chunks lie beyond its end"
        if not fit:
            raise InputError(f"{message}; set fit = true to go on without them")
        files.note(message)
        length[cut] = 0
    layout = Chunks(chunk, np.full(total, number, np.int64), offset, length, skipped)
    return [Piece(0, shape[:-2], layout, stored, codec)]


def _shift(dset: Any, entry: Any) -> int:
    """What is missing from the offsets of `chunk_iter` in a file with a user block: some HDF5 releases leave it out."""
    if not dset.file.userblock_size:
        return 0
    return int(dset.id.get_chunk_info_by_coord(entry.chunk_offset).byte_offset - entry.byte_offset)


def beside(dset: Any, name: str) -> Place:
    """A file that an HDF5 file names, beside it or where HDF5 would look for it, too; it may be missing."""
    return find(_path(dset), name)


def _external(dset: Any, stored: np.dtype[Any], files: Files, *, fit: bool) -> list[Piece] | None:
    """Raw files beside the HDF5 file, when each holds whole frames; else None."""
    frame_bytes = math.prod(dset.shape[-2:]) * stored.itemsize
    left, start, pieces = math.prod(dset.shape[:-2]), 0, []
    for name, offset, size in dset.external:
        frames, rest = divmod(min(size, left * frame_bytes), frame_bytes)
        if rest:
            files.note(f"{dset.name}: a frame spans two raw files, so it is read through h5py, by one thread")
            return None
        path = beside(dset, name if isinstance(name, str) else name.decode())
        if not path.is_file():
            message = f"{_path(dset)}: {dset.name} keeps {frames} frames in {path}, which is missing"
            if not fit:
                raise InputError(f"{message}; set fit = true to go on without them")
            files.note(message)
        elif frames:
            number = files.index(path)
            there = max(0, files.size(number) - offset) // frame_bytes
            whole = _whole(dset, frames, there, files, fit=fit, what=str(path))
            layout = Runs.one(offset, whole, frame_bytes, frame_bytes, number)
            pieces += [Piece(start, (whole,), layout, stored)] if whole else []
        start, left = start + frames, left - frames
    return pieces


def _virtual(dset: Any, files: Files, *, fit: bool) -> list[Piece] | None:
    """Frames that lie in other datasets, when each is mapped as a range of whole frames in order; else None."""
    dtype, covered, pieces = pixel_type(dset)[0], 0, []
    for entry in dset.virtual_sources():
        here = _range(entry.vspace, dset.shape)
        if here is None or "%" in entry.file_name or "%" in entry.dset_name:
            return None
        path = _path(dset) if entry.file_name == "." else beside(dset, entry.file_name)
        covered += here[1]
        if not path.is_file():
            message = f"{_path(dset)}: {dset.name} takes {here[1]} frames from {path}, which is missing"
            if not fit:
                raise InputError(f"{message}; set fit = true to go on without them")
            files.note(message)
            continue
        with opened(path, files) as file:
            if entry.dset_name not in file:
                raise InputError(f"{path}: has no dataset {entry.dset_name}, from which {_path(dset)} takes frames")
            source = file[entry.dset_name]
            there = _range(entry.src_space, source.shape)
            same = source.ndim > 1 and source.shape[-2:] == dset.shape[-2:]
            if (
                not same
                or there is None
                or there[1] != here[1]
                or not np.can_cast(pixel_type(source)[0], dtype, "safe")
            ):
                return None
            for piece in describe(source, files, fit=fit):
                part = cut(piece, there[0], sum(there))
                if part is None:
                    return None
                pieces += [replace(part, start=part.start - there[0] + here[0])] if part.frames else []
    if covered < math.prod(dset.shape[:-2]):
        files.note(f"{dset.name}: {math.prod(dset.shape[:-2]) - covered} of its frames are mapped to no file")
    return sorted(pieces, key=lambda piece: piece.start)


def _range(space: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """First frame and number of frames of a selection; None unless it is whole frames one after another."""
    import h5py

    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return 0, math.prod(shape[:-2])
    if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        return None
    # HDF5 stores of a source's shape only what the selection needs, so `shape` is the dataset's own
    start, stride, count, block = space.get_regular_hyperslab()
    if len(start) != len(shape) or any(c > 1 and s != b for s, c, b in zip(stride, count, block, strict=True)):
        return None
    extent = [c * b for c, b in zip(count, block, strict=True)]
    if any(s + e > n for s, e, n in zip(start, extent, shape, strict=True)):
        return None
    # behind the first axis that isn't a single index, every axis must be taken whole
    first = next((k for k, e in enumerate(extent) if e > 1), len(shape))
    if any(e != n for e, n in list(zip(extent, shape, strict=True))[min(first + 1, len(shape) - 2) :]):
        return None
    nav = shape[:-2] or (1,)
    at = int(np.ravel_multi_index(start[:-2] or (0,), nav))
    return at, math.prod(extent[:-2])


def cut(piece: Piece, first: int, stop: int) -> Piece | None:
    """The frames of `piece` within ``[first, stop)``, counted as its `start` is; None where chunks would be cut."""
    low, high = max(first, piece.start), min(stop, piece.start + piece.frames)
    if high <= low:
        return replace(piece, nav=(0,))
    if high - low == piece.frames:
        return piece
    if isinstance(piece.layout, Runs) and len(piece.layout.file) == 1:
        runs = piece.layout
        offset = int(runs.offset[0] + (low - piece.start) * runs.stride[0])
        part = Runs.one(offset, high - low, int(runs.stride[0]), runs.frame_bytes, int(runs.file[0]))
        return replace(piece, start=low, nav=(high - low,), layout=part)
    if not isinstance(piece.layout, Chunks):
        return None
    chunks, row = piece.layout, math.prod(piece.nav[1:])
    a, b = (low - piece.start) / row, (high - piece.start) / row
    if a % chunks.shape[0] or (b % chunks.shape[0] and b != piece.nav[0]):
        return None
    size = len(chunks.file) // -(-piece.nav[0] // chunks.shape[0])
    rows = slice(int(a) // chunks.shape[0] * size, -(-int(b) // chunks.shape[0]) * size)
    part_of = {name: getattr(chunks, name)[rows] for name in ("file", "offset", "length", "skipped")}
    return replace(piece, start=low, nav=(int(b - a), *piece.nav[1:]), layout=replace(chunks, **part_of))
