"""How much of a file lies in the page cache already, asked of the system without reading anything."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np

from gpuem.errors import InputError

# the system reads ahead in larger steps than this, so that neighbouring pages say the same
_PAGES_OF_A_SAMPLE = 4


def cached_share(path_or_descriptor: str | os.PathLike[str] | int, samples: int = 64) -> float | None:
    """Share of a file's pages that lie in the page cache, estimated from samples at equal distances.

    The samples are mapped but never touched, so asking neither reads from the device nor changes what is cached; the
    size of the file doesn't matter. The first sample is the first pages, the last one the last, and a file of a few
    hundred pages is looked at as a whole.

    Parameters
    ----------
    path_or_descriptor : path or int
        The file, by its path or by an open descriptor.
    samples : int, optional
        Number of samples, at least 1, each of four pages.

    Returns
    -------
    float or None
        From 0 (all of it has to come from the device) to 1; an empty file is cached. None where the system doesn't
        tell: outside Linux, for what can't be mapped, and for files that this process neither owns nor may write,
        of which Linux claims that every page is cached.

    Raises
    ------
    InputError
        The file can't be opened.
    """
    if isinstance(path_or_descriptor, int):
        return _cached_share(path_or_descriptor, samples)
    try:
        descriptor = os.open(path_or_descriptor, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{Path(path_or_descriptor)}: {error.strerror}") from error
    try:
        return _cached_share(descriptor, samples)
    finally:
        os.close(descriptor)


def _cached_share(descriptor: int, samples: int) -> float | None:
    if sys.platform != "linux" or not _may_ask(descriptor):
        return None
    pages = -(-os.fstat(descriptor).st_size // mmap.PAGESIZE)
    cached = looked_at = 0
    for first, count in _windows(pages, samples):
        found = _cached_pages(descriptor, first, count)
        if found is None:
            return None
        cached, looked_at = cached + found, looked_at + count
    return cached / looked_at if looked_at else 1.0


def _may_ask(descriptor: int) -> bool:
    """Whether Linux tells the truth: since 5.2 it hides the page cache from those who could only read the file."""
    owner = os.fstat(descriptor).st_uid
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{descriptor}", os.W_OK, effective_ids=True)


def _windows(pages: int, samples: int) -> list[tuple[int, int]]:
    """First page and number of pages of every sample: the whole file where the samples would cover it."""
    if pages <= samples * _PAGES_OF_A_SAMPLE:
        return [(0, pages)] if pages else []
    last = pages - _PAGES_OF_A_SAMPLE
    return [(k * last // max(1, samples - 1), _PAGES_OF_A_SAMPLE) for k in range(max(1, samples))]


def _cached_pages(descriptor: int, first: int, count: int) -> int | None:
    """How many of `count` pages from page `first` on are cached; None where the system can't say."""
    size = os.fstat(descriptor).st_size
    start = first * mmap.PAGESIZE
    length = min(size - start, count * mmap.PAGESIZE)
    try:
        # each sample gets a mapping of its own: a file may be larger than the address space this process may use
        mapping = mmap.mmap(descriptor, length, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, offset=start)
    except (OSError, ValueError):
        return None
    states = np.zeros(count, np.uint8)
    view = np.frombuffer(mapping, np.uint8)
    refused = ctypes.CDLL(None).mincore(
        ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(view.size), ctypes.c_void_p(states.ctypes.data)
    )
    # a mapping can't be closed while an array still shows its memory
    del view
    mapping.close()
    return None if refused else int(np.count_nonzero(states & 1))
