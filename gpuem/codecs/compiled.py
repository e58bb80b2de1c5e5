"""Compiled functions: one place that says how Numba compiles and where it keeps the result."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.core.caching import IndexDataCacheFile

Function = TypeVar("Function", bound=Callable[..., Any])
log = logging.getLogger("gpuem")
# versions of Numba whose cache was tested
OLDEST, NEWEST = (0, 61), (0, 68)


class _OwnNames(IndexDataCacheFile):  # type: ignore[misc, no-any-unimported, unused-ignore]
    """Numba's cache of one function, with a name of its own for every compiled version.

    Numba numbers the files and writes the index first. A process that is killed in between, or two that compile at
    once, leave an index that points at another version's machine code, which is then run without a word. With names
    that are never used twice the file is missing instead, and the function is compiled again.
    """

    def _data_name(self, number: int) -> str:
        base = str(self._data_name_pattern).partition(".{number")[0]
        return f"{base}.{uuid.uuid4().hex[:16]}.nbc"


def compiled(function: Function, **options: Any) -> Function:
    """Compile for use in threads: no interpreter lock, no bounds checks, kept on disk for the next process.

    Where neither the package nor the user's cache folder can be written, every process compiles anew, and that is
    said in the log.
    """
    common = {"nogil": True, "boundscheck": False, "error_model": "numpy", **options}
    try:
        kept: Any = numba.njit(cache=True, **common)(function)
    except RuntimeError as error:
        if "locator" not in str(error):
            raise
        log.info("compiled kernels can't be kept (%s); set NUMBA_CACHE_DIR to a folder that can be written", error)
        made: Function = numba.njit(**common)(function)
        return made
    if _is_tested():
        kept._cache._cache_file.__class__ = _OwnNames
    return kept  # type: ignore[no-any-return]


@functools.cache
def _is_tested(version: str = numba.__version__) -> bool:
    """Whether the cache of this version of Numba, which is private to it, is the one that `_OwnNames` changes."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if OLDEST <= numbers <= NEWEST:
        return True
    log.info(
        "Numba %s: gpuem's names for cached kernels are tested with %d.%d to %d.%d; this version's own are used. "
        "A process that is killed while it compiles may then leave a stale cache: remove it in that case",
        *(version, *OLDEST, *NEWEST),
    )
    return False
