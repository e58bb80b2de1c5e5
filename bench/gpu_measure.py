"""Part of bench/gpu.py: how things are timed, and the ceilings that everything is compared with."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gpu_data import Bench, same

SLOT = 32 << 20
PIECE = 4 << 20
THREADS = (1, 2, 4, 8, 16)
READ = """
__global__ void add_words(const uint4* words, long long count, unsigned* sums) {
    const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    long long i = first;
    unsigned sum = 0;
    for (; i + 3 * step < count; i += 4 * step) {
        const uint4 a = words[i], b = words[i + step], c = words[i + 2 * step], d = words[i + 3 * step];
        sum += a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w + c.x + c.y + c.z + c.w + d.x + d.y + d.z + d.w;
    }
    for (; i < count; i += step) {
        const uint4 a = words[i];
        sum += a.x + a.y + a.z + a.w;
    }
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (threadIdx.x % 32 == 0) sums[first / 32] = sum;
}
"""


def on_device(launch: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds that the GPU needs for what `launch` enqueues on the current stream; the first runs don't count.

    All repeats are enqueued at once, with events between them, so that the GPU never waits for the host.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        launch()
        stream.synchronize()
        if not hasattr(cupy.cuda, "get_elapsed_time"):
            return by_clock(lambda: (launch(), stream.synchronize()), repeats)
        launch()
        events = [cupy.cuda.Event() for _ in range(repeats + 1)]
        events[0].record(stream)
        for event in events[1:]:
            launch()
            event.record(stream)
        stream.synchronize()
    return [cupy.cuda.get_elapsed_time(*pair) / 1e3 for pair in itertools.pairwise(events)]


def by_clock(work: Callable[[], Any], repeats: int, *, warm: bool = True) -> list[float]:
    """Seconds that `work` takes by the clock; once before for warming up."""
    if warm:
        work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def row(times: Sequence[float], nbytes: int, **more: Any) -> dict[str, Any]:
    """What is recorded of repeated times for so many bytes: the median counts."""
    seconds = statistics.median(times)
    spread = {"fastest": min(times), "slowest": max(times), "repeats": len(times)}
    return {"GB_s": nbytes / seconds / 1e9, "seconds": seconds, **spread, "bytes": nbytes, **more}


def pinned(nbytes: int) -> np.ndarray:
    """Page-locked memory."""
    import cupy

    return np.frombuffer(cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)


def ceilings(bench: Bench) -> dict[str, Any]:
    """What the machine can do at best, each by the simplest code that can show it."""
    return {
        "device read": read_ceiling(bench),
        "device copy": copy_ceiling(bench),
        "pinned to device": host_to_device(bench, min(bench.nbytes, 2 << 30), check=True),
        **file_ceiling(bench),
    }


class Adder:
    """Adds up all 32-bit words of device memory, modulo 2^32, with a grid of so many blocks for a multiprocessor."""

    def __init__(self) -> None:
        import cupy

        self._function = _compiled(READ, "add_words")
        self._multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        self._sums = cupy.zeros(64 * 8 * self._multiprocessors, np.uint32)

    def launch(self, data: Any, blocks: int) -> None:
        """Enqueue the kernel for a whole number of 16 bytes."""
        grid = (blocks * self._multiprocessors,)
        self._function(grid, (256,), (data, np.int64(data.nbytes // 16), self._sums))

    def total(self, data: Any, blocks: int) -> int:
        """The sum."""
        self._sums.data.memset_async(0, self._sums.nbytes)
        self.launch(data, blocks)
        return int(self._sums.get().sum(dtype=np.uint32))


def _compiled(source: str, name: str) -> Any:
    import cupy
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    nvrtc.addNameExpression(program, name)
    nvrtc.compileProgram(program, ("-std=c++17", f"-arch=sm_{cupy.cuda.Device().compute_capability}"))
    code, symbol = nvrtc.getCUBIN(program), nvrtc.getLoweredName(program, name)
    nvrtc.destroyProgram(program)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.cubin"
        path.write_bytes(code)
        return cupy.RawModule(path=str(path)).get_function(symbol)


def read_ceiling(bench: Bench) -> dict[str, Any]:
    """Reading device memory once; the best of several grids."""
    adder, found = Adder(), []
    expected = int(bench.truth.reshape(-1).view(np.uint32).sum(dtype=np.uint32))
    for blocks in (4, 8, 16, 32, 64):
        bench.check(f"device read, {blocks} blocks a multiprocessor", adder.total(bench.pixels, blocks) == expected)
        times = on_device(lambda blocks=blocks: adder.launch(bench.pixels, blocks), bench.repeats)
        found.append(row(times, bench.nbytes, blocks_per_multiprocessor=blocks))
    return max(found, key=lambda one: one["GB_s"])


def copy_ceiling(bench: Bench) -> dict[str, Any]:
    """Copying within device memory: bytes read and bytes written."""
    import cupy

    half = bench.frames // 2 * bench.frame_nbytes
    target = cupy.empty(half, np.uint8)
    times = on_device(lambda: target.data.copy_from_device_async(bench.pixels.data, half), bench.repeats)
    first = bench.truth[: bench.frames // 2]
    bench.check("device copy", same(target.view(np.uint16).reshape(first.shape), first))
    return row(times, 2 * half)


def host_to_device(bench: Bench, nbytes: int, *, check: bool = False) -> dict[str, Any]:
    """Copying page-locked slots to the device, one after another, as many bytes as asked for."""
    import cupy

    slot = min(SLOT, bench.nbytes // 4)
    hosts = [pinned(slot) for _ in range(4)]
    device = [cupy.empty(slot, np.uint8) for _ in range(4)]
    stored = bench.truth.reshape(-1).view(np.uint8)
    for k, host in enumerate(hosts):
        host[:] = stored[k * slot : (k + 1) * slot]

    def launch() -> None:
        for k in range(-(-nbytes // slot)):
            count = min(slot, nbytes - k * slot)
            device[k % 4].data.copy_from_host_async(hosts[k % 4].ctypes.data, count)

    times = on_device(launch, bench.repeats)
    if check:
        for k in range(4):
            bench.check(f"pinned to device, slot {k}", np.array_equal(device[k].get(), hosts[k]))
    return row(times, nbytes)


def file_ceiling(bench: Bench) -> dict[str, Any]:
    """Reading the file from the page cache into page-locked memory, with several numbers of threads."""
    slots = [pinned(min(SLOT, bench.nbytes)) for _ in range(4)]
    nbytes = min(bench.nbytes, 4 << 30)
    read_file(bench.raw, slots[0].size, 4, slots)
    bench.check("file read", np.array_equal(slots[0], bench.truth.reshape(-1).view(np.uint8)[: slots[0].size]))
    found = {
        f"file read, {n} threads": row(by_clock(lambda n=n: read_file(bench.raw, nbytes, n, slots), 3), nbytes)
        for n in THREADS
    }
    return {**found, "file read": max(found.values(), key=lambda one: one["GB_s"])}


def read_file(path: Path, nbytes: int, threads: int, slots: Sequence[np.ndarray]) -> None:
    """Read the first bytes of a file into slots, over and over, in pieces."""
    size = slots[0].size
    descriptor = os.open(path, os.O_RDONLY)

    def read(start: int) -> None:
        slot, at = slots[start // size % len(slots)], start % size
        end = min(start + PIECE, (start // size + 1) * size, nbytes)
        done = start
        while done < end:
            got = os.preadv(descriptor, [slot[at + done - start : at + end - start]], done)
            if not got:
                raise EOFError(f"{path}: ends at byte {done}, {nbytes} were to be read")
            done += got

    starts = [s + p for s in range(0, nbytes, size) for p in range(0, min(size, nbytes - s), PIECE)]
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, starts))
    finally:
        os.close(descriptor)
