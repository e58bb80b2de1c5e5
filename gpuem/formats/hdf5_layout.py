"""Where the bytes of an HDF5 dataset lie: contiguous, chunked, in raw files beside it, or in other HDF5 files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import InputError, TruncatedError
from gpuem.formats import hdf5_external, hdf5_virtual
from gpuem.formats.hdf5_chunks import chunk_tables
from gpuem.formats.hdf5_file import Files, calls, located, pixel_type
from gpuem.formats.hdf5_selection import promised_shape
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import Chunks, Layout, Piece, Runs, Step
from gpuem.formats.stitch import without, written

_PLAIN = {1: "deflate", 3: "fletcher32", 32000: "lzf", 32001: "blosc", 32004: "lz4", 32015: "zstd"}
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
    plist = dset.id.get_create_plist()
    missing = np.zeros(0, np.bool_)
    if dset.is_virtual:
        pieces, missing = hdf5_virtual.read(dset, files, fit=fit, describe=describe, beside=beside)
        if pieces is None:
            files.note(f"{dset.name}: virtual, but not of boxes of frames; read through h5py, by one thread")
    elif dset.external:
        pieces, missing = hdf5_external.read(dset, stored, files, fit=fit, beside=beside)
    elif not exact:
        pieces = None
        files.note(f"{dset.name}: its numbers have unused bits, so it is read through h5py, by one thread")
    elif dset.chunks:
        pieces = _chunked(dset, stored, files, fit=fit)
    elif plist.get_layout() == 1:
        pieces = _contiguous(dset, stored, files, fit=fit)
    else:
        pieces = None
    if dset.external and not exact:
        raise InputError(
            f"{_path(dset)}: {dset.name} has numbers with unused bits in raw files, which gpuem doesn't read; copy it "
            "into one file (h5repack)"
        )
    if pieces is None and isinstance(_path(dset), Url) and dset.is_virtual:
        raise InputError(
            f"{_path(dset)}: {dset.name} is put together from other files in a way that only HDF5 itself can follow, "
            "and it can't over a network; copy all of them to a disk"
        )
    if pieces is None:
        files.index(_path(dset))
        if dset.chunks and not missing.size and hasattr(dset.id, "chunk_iter"):
            missing = _unwritten(dset, files)
        layout: Layout = calls(dset, stored, tuple(files.met.values()) if dset.is_virtual else ())
        piece = Piece(0, promised_shape(dset)[:-2] or (1,), layout, stored.newbyteorder("="))
        return [without(piece, dset.shape[-2:], missing)]
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


def _unwritten(dset: Any, files: Files) -> NDArray[np.bool_]:
    """Frames of a dataset that HDF5 reads which lie in chunks that were never written."""
    shape, chunk = ((1,) * (dset.ndim == 2) + tuple(v) for v in (dset.shape, dset.chunks))
    offset, length, skipped = chunk_tables(dset)
    _note_unwritten(dset, length, files)
    there = written(Piece(0, shape[:-2], Chunks(chunk, offset, offset, length, skipped), np.dtype("u1")), shape[-2:])
    return np.zeros(0, np.bool_) if there is None else ~there


def _note_unwritten(dset: Any, length: NDArray[np.int64], files: Files) -> None:
    gone = int((length == 0).sum())
    if gone:
        files.note(f"{dset.name}: {gone} of its {length.size} chunks were never written")


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
    offset, length, skipped = chunk_tables(dset)
    number, total = files.index(_path(dset)), offset.size
    _note_unwritten(dset, length, files)
    cut = (offset > files.size(number) - length) & (length > 0)
    if cut.any():
        message = f"{_path(dset)}: {files.size(number)} bytes; {int(cut.sum())} of {total} chunks lie beyond its end"
        if not fit:
            raise InputError(f"{message}; set fit = true to go on without them")
        files.note(message)
        length[cut] = 0
    layout = Chunks(chunk, np.full(total, number, np.int64), offset, length, skipped)
    return [Piece(0, shape[:-2], layout, stored, codec)]


def beside(dset: Any, name: str) -> Place:
    """A file that an HDF5 file names, looked for beside it first, else as HDF5 does; it may be missing.

    HDF5 takes the last part of an absolute name that leads nowhere, the working directory, and the folder that a
    symbolic link leads to; for sources of virtual datasets the folders in HDF5_VDS_PREFIX before all others. From the
    working directory only what lies with the file is taken: another file of that name may be of other data.
    """
    folder = _path(dset).parent
    if isinstance(folder, Url):
        return folder / name
    short = Path(name).name if Path(name).is_absolute() else name
    prefixes = os.environ.get("HDF5_VDS_PREFIX", "").split(os.pathsep) if getattr(dset, "is_virtual", False) else []
    places = [Path(prefix.replace("${ORIGIN}", str(folder))) / short for prefix in prefixes if prefix]
    places = [*places, folder / name] if short == name else [folder / name, *places, folder / short]
    real = (folder / _path(dset).name).resolve().parent
    places += [real / short, *([Path(short)] if Path(short).resolve().is_relative_to(folder.resolve()) else [])]
    return next((place for place in places if place.exists()), folder / name)
