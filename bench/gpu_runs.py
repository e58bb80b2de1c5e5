"""Part of bench/gpu.py: whole runs, streamed from the page cache, by GPUDirect, on resident data; and compiling."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_kernels
import numpy as np
from gpu_data import Bench, NotMeasuredError
from gpu_measure import SLOT, by_clock, host_to_device, pinned, read_file, row

import gpuem
from gpuem import engine, job, recipe
from gpuem.analyses import Map
from gpuem.backends import cuda_compile, cuda_plan
from gpuem.executors import local
from gpuem.storage import gds
from gpuem.storage.residency import cached_share


@dataclass
class Run:
    """A run and how long its parts took."""

    job: engine.Job
    totals: engine.Totals
    maps: dict[str, Map]
    seconds: dict[str, float]


def run(ds: gpuem.Dataset, chosen: list[Any], **options: Any) -> Run:
    """What `gpuem.run` does, part by part; only the note of how the results came about is left out."""
    times = [time.perf_counter()]
    made = job.prepare(ds, chosen, recipe.run_section(**options))
    times.append(time.perf_counter())
    totals = engine.combine(made, local.run(made))
    times.append(time.perf_counter())
    maps, _ = job.finish(job.view_of(ds), chosen, made, totals)
    times.append(time.perf_counter())
    parts = dict(zip(("prepare", "stream", "finish"), np.diff(times).tolist(), strict=True))
    return Run(made, totals, maps, {**parts, "total": times[-1] - times[0]})


def on_cpu(ds: gpuem.Dataset, chosen: list[Any]) -> Run:
    """The reference."""
    return run(ds, chosen, device="cpu")


def checked(bench: Bench, name: str, ds: gpuem.Dataset, reference: gpuem.Dataset, **options: Any) -> Run:
    """One run on the GPU that gave the same bits as the CPU."""
    chosen = gpu_kernels.three(bench.shape)
    expected, found = on_cpu(reference, chosen), run(ds, chosen, device="cuda", **options)
    bench.check(f"{name}: names of maps", expected.maps.keys() == found.maps.keys())
    for key, item in expected.maps.items():
        bench.check(f"{name}: {key}", np.array_equal(item.data, found.maps[key].data, equal_nan=True))
    return found


def timed(bench: Bench, name: str, ds: gpuem.Dataset, reference: gpuem.Dataset, **options: Any) -> dict[str, Any]:
    """A run with all three analyses: checked, with its peak of device memory, then timed."""
    first = checked(bench, name, ds, reference, **options)
    peak = peak_memory(lambda: run(ds, gpu_kernels.three(bench.shape), device="cuda", **options))
    runs = [run(ds, gpu_kernels.three(bench.shape), device="cuda", **options) for _ in range(bench.repeats)]
    parts = {part: statistics.median(one.seconds[part] for one in runs) for part in runs[0].seconds}
    planned = sum(first.job.plan.device_nbytes.values())
    return row(
        [one.seconds["total"] for one in runs], ds.source.nbytes, parts=parts, transfer=first.job.facts.get("transfer"),
        why=first.job.facts.get("transfer_reason"), readers=first.job.plan.threads, peak_device_bytes=peak,
        planned_device_bytes=planned, within_plan=peak <= planned, stored_bytes=sum(f.size for f in ds.source.files),
    )  # fmt: skip


def peak_memory(work: Callable[[], Any]) -> int:
    """Most device memory that CuPy's pool held for `work`, beyond what it held before."""
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    work()
    # the pool gives nothing back by itself: what it holds now is the most it ever did
    return int(pool.total_bytes() - before)


def streamed(bench: Bench) -> dict[str, Any]:
    """Files from the page cache to maps."""
    ds, encoder = bench.compressed
    return {
        "plain uint16": timed(bench, "streamed, plain", bench.plain, bench.plain, transfer="pinned"),
        "bitshuffle-LZ4": {**timed(bench, "streamed, bslz4", ds, ds, transfer="pinned"), "encoder": encoder},
    }


def direct(bench: Bench) -> dict[str, Any]:
    """A cold plain file by GPUDirect, and the same through page-locked memory."""
    mode = gds.mode()
    if not mode.available:
        raise NotMeasuredError(f"GPUDirect isn't available: {mode.reason}")
    # a file that no process has mapped: of mapped files the system forgets nothing
    path = bench.folder / "cold.raw"
    shutil.copyfile(bench.raw, path)
    ds = gpuem.open(path, scan=bench.plain.scan_shape, frame=bench.shape, dtype="uint16")
    found = {}
    for transfer in ("gds", "pinned"):
        checked(bench, f"cold file, {transfer}", ds, bench.plain, transfer=transfer)
        times, shares = [], []
        for _ in range(3):
            make_cold(path)
            shares.append(cached_share(path))
            one = run(ds, gpu_kernels.three(bench.shape), device="cuda", transfer=transfer)
            times.append(one.seconds["total"])
        found[f"cold file, {transfer}"] = row(times, bench.nbytes, cached_before=shares, mode=mode.reason)
    path.unlink()
    return found


def make_cold(path: Path) -> None:
    """Ask the system to forget what it has cached of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def on_resident(bench: Bench) -> dict[str, Any]:
    """Data brought to the GPU once; then runs on it."""
    found = {}
    ds, _ = bench.compressed
    for name, source, packed in (("plain uint16", bench.plain, False), ("bitshuffle-LZ4, packed", ds, True)):
        started = time.perf_counter()
        there = source.to_device(packed=packed)
        seconds = time.perf_counter() - started
        bringing = {"to_device_seconds": seconds, "to_device_GB_s": source.source.nbytes / seconds / 1e9}
        found[name] = {**timed(bench, f"resident, {name}", there, source), **bringing}
    return found


def overlap(bench: Bench) -> dict[str, Any]:
    """Wall time of a run against the longest of its stages, each measured alone."""
    ds, _ = bench.compressed
    return {
        "plain uint16": stages(bench, bench.plain, packed=False),
        "bitshuffle-LZ4": stages(bench, ds, packed=True),
    }


def stages(bench: Bench, ds: gpuem.Dataset, *, packed: bool) -> dict[str, Any]:
    """Reading alone, copying alone, kernels alone; and all of them at once, which is what a run does."""
    chosen = gpu_kernels.three(bench.shape)
    one = checked(bench, "overlap", ds, ds, transfer="pinned")
    readers, stored = one.job.plan.threads, ds.source.files[0].size
    slots = [pinned(SLOT) for _ in range(cuda_plan.SLOTS)]
    read = statistics.median(by_clock(lambda: read_file(ds.source.files[0].path, stored, readers, slots), 3))
    alone = {"read": read, "copy": host_to_device(bench, stored)["seconds"]}
    alone["kernels"] = gpu_kernels.tile_by_tile(bench, ds, packed=packed)
    runs = [run(ds, chosen, device="cuda", transfer="pinned") for _ in range(bench.repeats)]
    longest = max(alone.values())
    wall, streaming = (statistics.median(r.seconds[part] for r in runs) for part in ("total", "stream"))
    return {
        "seconds": wall, "GB_s": ds.source.nbytes / wall / 1e9, "alone": alone, "wall_to_longest": wall / longest,
        "streaming_to_longest": streaming / longest, "wall_to_sum": wall / sum(alone.values()),
    }  # fmt: skip


def compiling(bench: Bench) -> dict[str, Any]:
    """Everything on few frames with an empty folder of kernels; and what the next process would still compile."""
    few = Bench(bench.folder / "few", 32, bench.shape, 1)
    few.folder.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("GPUEM_KERNEL_CACHE")
        os.environ["GPUEM_KERNEL_CACHE"] = folder
        try:
            found = {"cold": compiling_in_runs(few), "warm": compiling_in_runs(few)}
        finally:
            cuda_compile._loaded.clear()
            del os.environ["GPUEM_KERNEL_CACHE"]
            if before is not None:
                os.environ["GPUEM_KERNEL_CACHE"] = before
    bench.check("compiling: there was something to compile", found["cold"]["kernels"])
    return found


def compiling_in_runs(few: Bench) -> dict[str, Any]:
    """Runs with kernels that have still to be loaded, and the compiling in them."""
    compiled = cuda_compile.compile_kernel
    times: dict[str, float] = {}

    @functools.wraps(compiled)
    def watched(name: str, wanted: str, architecture: str) -> cuda_compile.Compiled:
        started = time.perf_counter()
        made = compiled(name, wanted, architecture)
        times[wanted] = time.perf_counter() - started
        return made

    cuda_compile._loaded.clear()
    cuda_compile.compile_kernel = watched
    try:
        started = time.perf_counter()
        for chosen in gpu_kernels.cases(few).values():
            run(few.plain, chosen, device="cuda")
        run(few.compressed[0], gpu_kernels.three(few.shape), device="cuda")
        seconds = time.perf_counter() - started
    finally:
        cuda_compile.compile_kernel = compiled
    return {"compile_seconds": sum(times.values()), "kernels": len(times), "each": times, "runs_seconds": seconds}
