"""The buffers, streams and reader threads of one run on the GPU: allocated once, given back at its end."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Sums, cuda, cuda_plan, sums_fit
from gpuem.backends.cuda import DeviceSums, Prepared
from gpuem.backends.cuda_load import Tile
from gpuem.errors import DataError
from gpuem.formats.source import Source
from gpuem.storage import gds
from gpuem.storage.host import Files
from gpuem.storage.pinned import Arrived, Load, Ring, Times, page_locked
from gpuem.tiles import Plan

log = logging.getLogger("gpuem")
Array = Any
# clocks of host and device drift: they are compared again after so long
_SAME_CLOCK_SECONDS = 60.0


@dataclass
class Returning:
    """Sums of a shard on their way back to the host."""

    sums: DeviceSums
    host: NDArray[np.uint8]
    event: Any

    def result(self) -> tuple[Sums, bool]:
        """The sums once they are there, and whether all that went into them was good."""
        self.event.synchronize()
        return cuda.unpack(self.sums, self.host), self._all_good()

    def _all_good(self) -> bool:
        sums = self.sums

        def array(name: str, count: int) -> NDArray[Any]:
            at, shape, dtype = sums.places[name]
            return self.host[at : at + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)[:count]

        broken = array("codes", sums.chunks).any() or not array("good", sums.checked).all()
        return not broken and bool(sums_fit(array("magnitudes", sums.checked), sums.prepared.shape).all())


@dataclass
class Passage:
    """One tile on its way through the device, as events; read when the sums of its shard are back.

    Parameters
    ----------
    times : Times
        Its reading and copying, and `used`, where the next tile's decoding can begin.
    before : event
        The compute stream was free for it.
    decoded : event
        Its frames are there.
    """

    times: Times
    before: Any
    decoded: Any

    def seconds(self, end: Any) -> dict[str, float]:
        """Seconds by stage; `end` stands for what comes after its last kernel."""
        # decoding begins when the bytes are there and the tile before is done, whichever is later
        ready = (self.times.copied, self.before)
        return {
            "decode": min(_elapsed(event, self.decoded) for event in ready),
            "compute": _elapsed(self.decoded, end),
        }


def copying(times: Times) -> float:
    """Seconds that a load took from host to device."""
    return 0.0 if times.began is None else _elapsed(times.began, times.copied)


def _elapsed(first: Any, last: Any) -> float:
    import cupy

    return max(float(cupy.cuda.get_elapsed_time(first, last)) / 1e3, 0.0)


class _Clock:
    """The host's time of events on the device."""

    def __init__(self) -> None:
        import cupy

        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._compare()

    def at(self, event: Any) -> float:
        """When an event that is over took place, in seconds of the epoch."""
        import cupy

        # negative where the clocks were compared later than that
        found = self._host + float(cupy.cuda.get_elapsed_time(self._event, event)) / 1e3
        if time.time() - self._host > _SAME_CLOCK_SECONDS:
            self._compare()
        return min(found, time.time())

    def _compare(self) -> None:
        import cupy

        self._event = cupy.cuda.Event()
        # nothing else is in this stream: the event takes place at once
        self._event.record(self._stream)
        self._event.synchronize()
        self._host = time.time()


class Session:
    """Everything a run holds on the device; it may serve one run after another, of the same job.

    Parameters
    ----------
    source : Source
        The frames.
    files : Files
        Its files.
    plan : Plan
        The cuts, and how many readers.
    prepared : Prepared
        What to compute.
    transfer : {"auto", "pinned", "gds"}
        How bytes reach the device.
    """

    def __init__(self, source: Source, files: Files, plan: Plan, prepared: Prepared, transfer: str = "auto") -> None:
        import cupy

        self.source, self.prepared = source, prepared
        self.transfer, self.why = cuda_plan.way(source, transfer)
        log.info("transfer: %s (%s)", self.transfer, self.why)
        self.compute = cupy.cuda.Stream(non_blocking=True)
        # arrays that are there already may still be written to by the caller's stream
        before = cupy.cuda.Event(disable_timing=True)
        before.record()
        self.compute.wait_event(before)
        slot, scratch = cuda_plan.buffers(source, plan.tiles)
        direct = gds.Reader(source.files) if self.transfer in ("gds", "kvikio") else None
        self.ring: Ring[Any] = Ring(files, cuda_plan.SLOTS, slot, plan.threads, self.compute, direct)
        self._scratch = {purpose: cupy.empty(nbytes, np.uint8) for purpose, nbytes in scratch.items()}
        self._even: dict[int, Array] = {}
        self._most_frames = max((math.prod(tile) for tile in plan.tiles), default=0)
        frames = max((shard.frames for shard in plan.shards), default=0)
        self._chunks = cuda_plan.chunks_of_shard(source, plan.shards, plan.tiles)
        self._places, nbytes = cuda.places(prepared, frames, self._chunks)
        self._returning: dict[int, Returning] = {}
        self._idle = [self._new_sums(frames, nbytes) for _ in range(cuda_plan.SUMS)]
        with self.compute:
            self._tables = self._correction()
            _ = prepared.tables, prepared.fit_tables
        self.compute.synchronize()
        self.clock = _Clock()
        self._before: Any = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is under way and let go of everything."""
        self.ring.close()
        self.compute.synchronize()
        if isinstance(self.ring.direct, gds.Reader):
            self.ring.direct.close()

    def scratch(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array of undefined content in memory that is kept for this purpose."""
        nbytes = math.prod(shape) * dtype.itemsize
        return self._scratch[purpose][:nbytes].view(dtype).reshape(shape)

    def even(self, frame: int) -> Array:
        """Where frames begin that follow one another at a distance of `frame`."""
        if frame not in self._even:
            import cupy

            starts = cupy.empty(self._most_frames, np.int64)
            with self.compute:
                starts.set(np.arange(self._most_frames, dtype=np.int64) * frame)
            self._even[frame] = starts
        return self._even[frame]

    def tables(self) -> dict[str, Array]:
        """Dark, gain and dead pixels as far as they are given."""
        return self._tables

    def stream(
        self, tiles: Iterable[tuple[Any, Tile | None]]
    ) -> Iterator[tuple[Any, Tile | None, Arrived | DataError | None]]:
        """Bring tiles to the device in their order; see `gpuem.storage.pinned.Ring.stream`."""
        # a run before this one may have ended with shards in work
        self._idle = list(self._returning.values())

        def loads() -> Iterator[tuple[tuple[Any, Tile | None], Load | None]]:
            for tag, tile in tiles:
                yield (tag, tile), None if tile is None else tile.load

        for (tag, tile), arrived in self.ring.stream(loads()):
            yield tag, tile, arrived

    def begin(self) -> DeviceSums:
        """Empty accumulators for the next shard; those of one other shard may still be on their way back."""
        returning = self._idle.pop(0)
        sums = returning.sums
        sums.chunks = sums.checked = 0
        with self.compute:
            cuda.clear(sums)
        self._before = self._record()
        return sums

    def add(
        self, tile: Tile, arrived: Arrived, sums: DeviceSums, at: int, positions: NDArray[np.int64]
    ) -> Passage | None:
        """Decode a tile and add its frames, rows `at` and on; `positions` are those of the frames in the scan.

        Returns
        -------
        Passage or None
            How long that takes, to be asked when the sums are back; None where no frame came.
        """
        codes = sums.arrays["codes"][sums.chunks : sums.chunks + tile.chunks]
        sums.chunks += tile.chunks
        if not tile.indices.size:
            return None
        with self.compute:
            frames = tile.decode(arrived, self, codes)
            passage = Passage(tile.load.times, self._before, self._record())
            cuda.check_device_frames(frames, sums, at)
            if self.prepared.weights.fits:
                self._place(positions, sums, at)
            cuda.add_device_frames(frames, sums, at)
        self._before = tile.load.times.used
        return passage

    def _record(self) -> Any:
        import cupy

        event = cupy.cuda.Event()
        event.record(self.compute)
        return event

    def _place(self, positions: NDArray[np.int64], sums: DeviceSums, at: int) -> None:
        """Bring the positions of rows `at` and on to the device.

        They go through the page-locked twin of the sums, each row through its own place. Nothing else is written there
        before the sums are copied back, behind this on the same stream, and nothing anew before that is done.
        """
        start, _, dtype = sums.places["positions"]
        rows = slice(start + at * dtype.itemsize, start + (at + positions.size) * dtype.itemsize)
        host = self._returning[id(sums)].host[rows]
        host[:] = np.ascontiguousarray(positions, dtype).view(np.uint8)
        target = sums.arrays["positions"][at : at + positions.size]
        target.data.copy_from_host_async(host.ctypes.data, host.nbytes, self.compute)

    def end(self, sums: DeviceSums) -> Returning:
        """Begin to copy the sums back."""
        returning = self._returning[id(sums)]
        sums.buffer.data.copy_to_host_async(returning.host.ctypes.data, sums.buffer.nbytes, self.compute)
        returning.event.record(self.compute)
        self._idle.append(returning)
        return returning

    def _new_sums(self, frames: int, nbytes: int) -> Returning:
        import cupy

        sums = DeviceSums(self.prepared, frames, cupy.empty(nbytes, np.uint8), self._places)
        host = page_locked(nbytes)
        made = Returning(sums, host, cupy.cuda.Event())
        self._returning[id(sums)] = made
        return made

    def _correction(self) -> dict[str, Array]:
        import cupy

        correction = self.source.correction
        if correction is None:
            return {}
        given: dict[str, NDArray[Any] | None] = {"dark": correction.dark, "gain": correction.gain}
        if correction.neighbours[0].size:
            given |= dict(zip(("dead", "offsets", "neighbours"), correction.neighbours, strict=True))
        out = {}
        for name, table in given.items():
            if table is not None:
                out[name] = cupy.empty(table.size, table.dtype)
                out[name].set(np.ascontiguousarray(table).reshape(-1))
        return out
