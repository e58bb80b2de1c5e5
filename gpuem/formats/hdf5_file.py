"""An HDF5 file opened for looking: what lies in it, of what type, and the way around byte extents through h5py."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import DataError, InputError, ReadError
from gpuem.formats.hdf5_check import Superblock, check_superblock
from gpuem.formats.helper import give_time
from gpuem.formats.remote import Place, Stream, Url
from gpuem.formats.source import Box, Calls, File

# HDF5 is not made for several threads; one call at a time, over all files
_LOCK = threading.Lock()
# by the names under which h5py has them open
_URLS: dict[str, Url] = {}
# what HDF5 says of a file that is being written, and no other message contains
_WRITTEN = re.compile(r"unable to lock file|already open for")
# what h5py raises where tables are damaged, other than OSError
_DAMAGE = (RuntimeError, KeyError, ValueError, TypeError, OverflowError, AttributeError, SystemError)


@dataclass
class Files:
    """The files a Source reads, numbered in the order in which they are met, and what there is to say about them."""

    met: dict[Place, File] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    # virtual datasets whose mappings are being followed
    virtual: list[tuple[Place, str]] = field(default_factory=list)

    def index(self, path: Place) -> int:
        """Number of the file at `path`."""
        if path not in self.met:
            self.met[path] = File.of(path)
        return list(self.met).index(path)

    def at(self, number: int) -> File:
        """File of that number."""
        return list(self.met.values())[number]

    def size(self, number: int) -> int:
        """Bytes of a file."""
        return list(self.met.values())[number].size

    def note(self, text: str) -> None:
        """Tell the user something, once."""
        if text not in self.notes:
            self.notes.append(text)


@contextlib.contextmanager
def opened(path: Place, notes: Files | None = None) -> Iterator[Any]:
    """An ``h5py.File`` for reading, also while another program writes it.

    Raises
    ------
    InputError
        It isn't there, isn't HDF5, or is cut off; with the sizes.
    """
    import h5py

    if isinstance(path, Url):
        with _remote(path) as file:
            yield file
        return
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    superblock = check_superblock(path)
    give_time(path)
    try:
        file = h5py.File(path, "r")
    except (OSError, *_DAMAGE) as error:
        file = _without_lock(path, error, superblock)
        if notes is not None:
            notes.note(f"{path}: another program has it open; it was read without a lock, as it was then")
    with file:
        yield file


@contextlib.contextmanager
def _remote(url: Url) -> Iterator[Any]:
    """An object of a store as an ``h5py.File``; what goes wrong on the way is told as it was."""
    import h5py

    try:
        stream = Stream(url)
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    _URLS[repr(stream)] = url
    # HDF5 makes errors of its own of those that the network makes, and some it takes for a missing link
    try:
        check_superblock(url, cast(BinaryIO, stream))
        try:
            file = h5py.File(stream, "r")
        except (OSError, *_DAMAGE) as error:
            raise InputError(_why(url, error)) from None
        with file:
            yield file
    except Exception:
        if stream.error is not None:
            raise stream.error from None
        raise
    if stream.error is not None:
        raise stream.error


def located(file: Any) -> Place:
    """Where an open file lies: h5py knows URLs by what it could print of them only."""
    return _URLS.get(file.filename) or Path(file.filename)


def _without_lock(path: Path, error: Exception, superblock: Superblock) -> Any:
    """A file that another program is writing: without the lock, then as one of a single writer and many readers."""
    import h5py

    # with swmr HDF5 waits for tables that will never come where the file is cut off: only for files that are marked so
    for options in ({"locking": False}, *([{"locking": False, "swmr": True}] if superblock.swmr else [])):
        if not _WRITTEN.search(str(error)):
            break
        try:
            return h5py.File(path, "r", **options)
        except (OSError, *_DAMAGE) as again:
            error = again
    raise InputError(_why(path, error)) from None


def _why(path: Place, error: Exception) -> str:
    """Why a file can't be opened though its superblock is sound."""
    if "already open" in str(error):
        return (
            f"{path}: another program has it open for writing, or left it so; close that program, or clear the mark: "
            f"h5clear -s {path}"
        )
    return f"{path}: HDF5 can't open it ({path.stat().st_size} bytes): {error}"


def type_name(dset: Any) -> str:
    """The type of a dataset's elements in words; anything that h5py knows, for messages and listings."""
    try:
        dtype = dset.dtype
    except TypeError:
        return "a type NumPy lacks"
    if dtype.names:
        return f"compound of {', '.join(dtype.names)}"
    return "string" if dtype.kind in "SOU" else str(dtype)


def pixel_type(dset: Any) -> tuple[np.dtype[Any], bool]:
    """Type of a pixel as it is stored, byte order included, and whether its bytes are exactly NumPy's.

    Raises
    ------
    InputError
        The elements aren't real numbers of at most 8 bytes.
    """
    import h5py

    try:
        dtype = dset.dtype
    except TypeError:
        dtype = np.dtype("V")
    if dtype.kind not in "uifb" or dtype.itemsize > 8:
        what = f"complex numbers ({dtype})" if dtype.kind == "c" else type_name(dset)
        raise InputError(f"{dset.file.filename}: {dset.name} holds {what}; pixels must be real numbers of 1 to 8 bytes")
    exact = bool(dset.id.get_type() == h5py.h5t.py_create(dtype, logical=True))
    if dtype.kind == "b":
        return np.dtype("u1"), exact
    if h5py.check_enum_dtype(dtype) is not None:
        return np.dtype(dtype.str), True
    return np.dtype(dtype.str), exact


def calls(dset: Any, stored: np.dtype[Any], files: tuple[File, ...] = ()) -> Calls:
    """Read a dataset through h5py, for what byte extents can't describe; `files` are those that HDF5 opens with it.

    Raises
    ------
    InputError
        It is compressed with a filter that isn't installed.
    """
    import h5py

    plist = dset.id.get_create_plist()
    filters = [plist.get_filter(k) for k in range(plist.get_nfilters())]
    if any(not h5py.h5z.filter_avail(entry[0]) for entry in filters):
        _plugins()
    missing = [f"{entry[0]} ({entry[3].decode()})" for entry in filters if not h5py.h5z.filter_avail(entry[0])]
    if missing:
        raise InputError(
            f"{dset.file.filename}: {dset.name} needs HDF5 filter {', '.join(missing)}, which isn't installed: "
            "pip install hdf5plugin"
        )
    nav = dset.shape[:-2] or (1,)
    if dset.chunks and dset.ndim > 2:
        chunk = tuple(min(c, n) for c, n in zip(dset.chunks[:-2], nav, strict=True))
    else:
        chunk = (1,) * (len(nav) - 1) + (nav[-1],)
    files = tuple(file if file.remote else replace(file, path=file.path.absolute()) for file in files)
    reader = Reader(located(dset.file).absolute(), dset.name, stored.newbyteorder("="), files)
    return Calls(reader, chunk, concurrent=False)


def _plugins() -> bool:
    """Register the filters of hdf5plugin where it is installed."""
    with contextlib.suppress(ImportError):
        import hdf5plugin  # type: ignore[import-untyped,unused-ignore]

        return bool(hdf5plugin)
    return False


@dataclass(frozen=True)
class Reader:
    """Reads boxes of a dataset through h5py; opens the file for each, so that it can travel to other processes."""

    path: Place
    name: str
    dtype: np.dtype[Any]
    files: tuple[File, ...] = ()

    def __call__(self, box: Box) -> NDArray[Any]:
        """The box (nav..., y, x); raises DataError where HDF5 can't read it, InputError where a file has changed."""
        with _LOCK:
            _plugins()
            try:
                with opened(self.path) as file:
                    dset = file[self.name]
                    data = dset[box] if dset.ndim == len(box) else dset[box[1:]][None][box[0]]
                    data = _grown(data, box)
            except (OSError, *_DAMAGE) as error:
                # HDF5 hands on what the system said; without that, it is the file that is broken
                failed = ReadError if re.search(r"errno = [1-9]", str(error)) else DataError
                raise failed(f"{self.path}: {self.name} can't be read through h5py: {error}") from None
        # of a file that has gone HDF5 reads fill values
        for file in self.files:
            if not file.path.exists() or File.of(file.path) != file:
                raise InputError(f"{file.path}: is gone or changed since it was opened; open {self.path} again")
        return np.asarray(data, self.dtype)


def _grown(data: NDArray[Any], box: Box) -> NDArray[Any]:
    """As large as was asked for: HDF5 ends a virtual dataset where a source is missing, frames that nobody uses."""
    lacking = [(0, s.stop - s.start - n) for s, n in zip(box, data.shape, strict=True)]
    return np.pad(data, lacking) if any(n for _, n in lacking) else data
