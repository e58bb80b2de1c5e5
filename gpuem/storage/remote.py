"""Bytes of remote files in host memory: ranges that will be needed are fetched beforehand, many at a time.

What is announced is cut into pieces, which are fetched in the order in which they were announced while there is room
for them, and let go when they are used up. What was not announced is fetched when it is asked for.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.errors import GpuemError
from gpuem.formats import stores
from gpuem.formats.remote import address
from gpuem.formats.source import File

# between two ranges, so much is fetched along rather than asked for apart
GAP_NBYTES = 1 << 20
# one connection alone is slow: a large range is fetched in pieces
PIECE_NBYTES = 8 << 20
AT_ONCE = 16
# of pieces that were fetched and not yet used
ROOM_NBYTES = 256 << 20
# with those that readers wait for, which don't wait for room
AHEAD_NBYTES = ROOM_NBYTES + AT_ONCE * PIECE_NBYTES


@dataclass(eq=False)
class _Piece:
    """Bytes [start, stop) of a file: announced, under way or there.

    How many of them were used, when last, and whether who used them went on to others.
    """

    file: int
    start: int
    stop: int
    used: int = 0
    stamp: int = 0
    left: bool = False
    data: Future[NDArray[np.uint8]] | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass
class Ahead:
    """Reads remote files of one source; safe to share between threads.

    Parameters
    ----------
    files : tuple of File
        All files of the source.
    """

    files: tuple[File, ...]
    _keys: list[tuple[int, int]] = field(default_factory=list)
    _pieces: dict[tuple[int, int], _Piece] = field(default_factory=dict)
    _waiting: deque[_Piece] = field(default_factory=deque)
    _held: int = 0
    # in bytes that were read
    _clock: int = 0
    _lock: Any = field(default_factory=threading.Lock)
    _pool: ThreadPoolExecutor | None = None
    _mine: threading.local = field(default_factory=threading.local)

    def announce(self, k: int, offset: NDArray[np.int64], length: NDArray[np.int64]) -> None:
        """Say that ranges of file `k` will be read soon."""
        offset, ends = np.atleast_1d(offset), np.minimum(np.atleast_1d(offset + length), self.files[k].size)
        order = np.argsort(offset, kind="stable")
        offset, ends = offset[order], np.maximum.accumulate(ends[order])
        cuts = np.flatnonzero(offset[1:] - ends[:-1] > GAP_NBYTES) + 1
        firsts, lasts = np.concatenate([[0], cuts]), np.concatenate([cuts, [offset.size]]) - 1
        with self._lock:
            for start, stop in zip(offset[firsts].tolist(), ends[lasts].tolist(), strict=True):
                self._announce(k, start, stop)
            self._start_waiting()

    def read_into(self, k: int, offset: int, out: NDArray[np.uint8]) -> None:
        """Copy bytes from `offset` of file `k` on, as many as `out` holds; raises like `gpuem.formats.stores.fetch`."""
        at, stop = offset, offset + out.size
        while at < stop:
            with self._lock:
                piece, until = self._find(k, at, stop)
                self._clock += until - at
                if piece is None:
                    # nobody announced it: all that is missing is fetched now, in pieces
                    self._announce(k, at, until)
                    self._start_waiting()
                    piece, until = self._find(k, at, stop)
                assert piece is not None
                data = self._begin(piece)
                self._use(piece)
            try:
                found = data.result()
            except GpuemError:
                with self._lock:
                    self._drop(piece)
                raise
            out[at - offset : until - offset] = found[at - piece.start : until - piece.start]
            with self._lock:
                piece.used += until - at
                if piece.used >= piece.size:
                    self._drop(piece)
                self._start_waiting()
            at = until

    def forget(self) -> None:
        """Let go of everything; what is under way ends unseen."""
        with self._lock:
            self._keys.clear()
            self._pieces.clear()
            self._waiting.clear()
            self._held = 0
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def _find(self, k: int, at: int, stop: int) -> tuple[_Piece | None, int]:
        """The piece that holds byte `at`, and how far it reaches; without one, how far there is none."""
        next_key = bisect.bisect_right(self._keys, (k, at))
        if next_key:
            piece = self._pieces[self._keys[next_key - 1]]
            if piece.file == k and at < piece.stop:
                return piece, min(stop, piece.stop)
        if next_key < len(self._keys) and self._keys[next_key][0] == k:
            return None, min(stop, self._keys[next_key][1])
        return None, stop

    def _announce(self, k: int, start: int, stop: int) -> None:
        while start < stop:
            piece, until = self._find(k, start, stop)
            if piece is None:
                for first in range(start, until, PIECE_NBYTES):
                    made = _Piece(k, first, min(first + PIECE_NBYTES, until), stamp=self._clock)
                    bisect.insort(self._keys, (k, first))
                    self._pieces[k, first] = made
                    self._waiting.append(made)
            start = until

    def _start_waiting(self) -> None:
        """Begin to fetch what was announced, as far as there is room."""
        while self._waiting:
            piece = self._waiting[0]
            if piece.data is None and self._pieces.get((piece.file, piece.start)) is piece:
                self._make_room(piece.size)
                if self._held + piece.size > ROOM_NBYTES:
                    return
                self._begin(piece)
            self._waiting.popleft()

    def _use(self, piece: _Piece) -> None:
        """Note who reads where: a thread that goes on to another piece is through with the one before, gaps and all."""
        before = getattr(self._mine, "piece", None)
        if before is not None and before is not piece:
            before.left = True
        self._mine.piece = piece
        piece.stamp, piece.left = self._clock, False

    def _make_room(self, size: int) -> None:
        """Let go of pieces that were left, and of those that nobody asked for while a lot of others were read."""
        if self._held + size <= ROOM_NBYTES:
            return
        for piece in sorted((p for p in self._pieces.values() if p.data is not None), key=lambda p: p.stamp):
            if piece.left or self._clock - piece.stamp > ROOM_NBYTES:
                self._drop(piece)
            if self._held + size <= ROOM_NBYTES:
                return

    def _begin(self, piece: _Piece) -> Future[NDArray[np.uint8]]:
        if piece.data is None:
            self._make_room(piece.size)
            self._pool = self._pool or ThreadPoolExecutor(AT_ONCE, thread_name_prefix="gpuem-fetch")
            self._held += piece.size
            piece.data = self._pool.submit(self._fetch, piece.file, piece.start, piece.stop)
        return piece.data

    def _fetch(self, k: int, start: int, stop: int) -> NDArray[np.uint8]:
        file = self.files[k]
        known = stores.Facts(file.size, file.mtime_ns, file.etag)
        return stores.fetch(address(file.path), start, stop, known)

    def _drop(self, piece: _Piece) -> None:
        key = piece.file, piece.start
        if self._pieces.get(key) is piece:
            del self._pieces[key]
            self._keys.remove(key)
            self._held -= piece.size if piece.data is not None else 0
