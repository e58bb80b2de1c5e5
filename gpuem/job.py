"""A run from beginning to end. Newcomers: read this file first, then what it calls."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import backends, dataset, engine, recipe, results, tiles
from gpuem.analyses import Analysis, Map, View
from gpuem.backends import Device, Sums, Weights
from gpuem.dataset import Dataset
from gpuem.errors import DataError, RecipeError
from gpuem.executors import local
from gpuem.results import Results

Progress = Callable[[int], None]
Roi = Sequence[int] | NDArray[np.bool_] | str | os.PathLike[str] | None
log = logging.getLogger("gpuem")


def run(
    data: Any,
    analyses: Sequence[Analysis],
    *,
    roi: Roi = None,
    device: Device = "auto",
    threads: int | None = None,
    memory: str | int | None = None,
    on_error: engine.OnError = "stop",
    progress: Progress | None = None,
) -> Results:
    """Stream frames once and compute all analyses.

    Parameters
    ----------
    data : Dataset or array
        What `gpuem.open` returned, or a NumPy, CuPy or Dask array (scan..., y, x).
    analyses : sequence of analyses
        `Sum`, `VirtualDetector`, `CenterOfMass`; any number, each with its own name.
    roi : sequence of 4 int, bool array or path
        Scan positions to read: ``(y0, y1, x0, x1)`` with ends excluded, or a mask of scan shape (array or .npy).
    device : {"auto", "cuda", "cpu"}
        Where to compute.
    threads : int
        Threads; default all processors of this process.
    memory : str or int
        Most memory the process may take, ``"4 GB"``; default 80 % of what is available.
    on_error : {"stop", "mask"}
        Broken frames stop the run, or are masked and counted.
    progress : callable
        Called with the number of frames of every shard that is done, from worker threads.

    Returns
    -------
    Results
        The maps.

    Raises
    ------
    RecipeError, InputError, DataError, PlanError, DeviceError
        What, where, the numbers, the remedy.
    """
    started = time.perf_counter()
    if isinstance(data, str | os.PathLike):
        raise RecipeError(f"run({str(data)!r}): open the file first: gpuem.run(gpuem.open({str(data)!r}), ...)")
    ds = data if isinstance(data, Dataset) else dataset.of_array(data)
    analyses = [analyses] if hasattr(analyses, "weights") else list(analyses)
    prepared = prepare(ds, analyses, roi=roi, device=device, threads=threads, memory=memory, on_error=on_error)
    totals = engine.combine(prepared, local.run(prepared, progress))
    maps = finish(view_of(ds), analyses, totals)
    return Results(maps, provenance(ds, analyses, prepared, totals, time.perf_counter() - started))


def run_recipe(
    path: str | os.PathLike[str], *, overwrite: bool = False, progress: Progress | None = None
) -> tuple[Results, Path]:
    """Run a recipe file and save its results; what ``gpuem run`` calls.

    Returns
    -------
    results : Results
        The maps.
    path : Path
        Where they were saved.
    """
    job, text = recipe.load(Path(path))
    results.check_writable(job.output.path, overwrite=overwrite)
    found = run(open_input(job), job.analysis, roi=job.input.roi, progress=progress, **run_options(job))
    found.provenance["recipe"] = text
    return found, found.save(job.output.path, overwrite=overwrite)


def open_input(job: recipe.Recipe) -> Dataset:
    """Open the data of a recipe."""
    options = job.input.model_dump(exclude={"path", "roi"})
    return dataset.open(job.input.path, calibration=job.calibration.model_dump(), **options)


def run_options(job: recipe.Recipe) -> dict[str, Any]:
    """The ``[run]`` section as arguments of `run`."""
    return job.run.model_dump()


def prepare(
    ds: Dataset,
    analyses: Sequence[Analysis],
    *,
    roi: Roi = None,
    device: Device = "auto",
    threads: int | None = None,
    memory: str | int | None = None,
    on_error: engine.OnError = "stop",
) -> engine.Job:
    """All of a run but touching the data: weights, plan, open files. ``gpuem check`` stops here."""
    if threads is not None and threads < 1:
        raise RecipeError(f"threads {threads}: at least 1")
    if not analyses:
        raise RecipeError("analyses: give at least one")
    recipe.check_names([a.name for a in analyses])
    backend = backends.select(device)
    weights = sum((a.weights(view_of(ds)) for a in analyses), Weights())
    prepared = backend.prepare(weights, ds.frame_shape, ds.dtype)
    wanted = region(ds, roi)
    one = backend.new_sums(prepared, 1)
    allowed = recipe.parse_memory(memory) if memory is not None else available_memory()
    plan = tiles.plan(
        ds.source,
        frame_result_nbytes=one.masks.nbytes + one.images.nbytes + one.moments.nbytes + 8,
        image_nbytes=one.total.nbytes + one.maximum.nbytes,
        threads=threads or local.cpus(),
        memory=allowed,
    )
    ds.files.check()
    # mappings of files that could fill the memory are given back as soon as they are used
    give_back = 2 * sum(file.size for file in ds.source.files) > allowed
    return engine.Job(ds.source, ds.files, plan, backend, prepared, ds.skip, wanted, on_error, give_back)


def finish(view: View, analyses: Sequence[Analysis], totals: engine.Totals) -> dict[str, Map]:
    """Hand every analysis its own columns of the sums, collect the maps."""
    if not totals.valid.any():
        raise DataError("not one frame could be read: " + "; ".join(item.message for item in totals.lost[:3]))
    maps: dict[str, Map] = {}
    masks = images = moments = 0
    for analysis in analyses:
        own = analysis.weights(view)
        sums = Sums(
            totals.sums.masks[:, masks : (masks := masks + len(own.masks))],
            totals.sums.images[:, images : (images := images + len(own.images))],
            totals.sums.moments[:, moments : (moments := moments + len(own.moments))],
            totals.sums.total,
            totals.sums.maximum,
        )
        for name, item in analysis.finish(view, sums, totals.valid).items():
            maps[f"{analysis.name}/{name}" if name else analysis.name] = item
    valid = totals.valid.reshape(view.scan_shape)
    maps["valid"] = Map(valid, view.scan, "", "a frame was read at this scan position")
    return maps


def region(ds: Dataset, roi: Roi) -> NDArray[np.bool_]:
    """Which scan positions are wanted, flat; raises RecipeError where the region doesn't fit the scan."""
    shape = ds.scan_shape
    if roi is None:
        return np.ones(ds.positions, np.bool_)
    if isinstance(roi, str | os.PathLike):
        try:
            roi = np.load(roi, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RecipeError(f"roi {roi}: can't be read: {error}; write a boolean array with numpy.save") from error
    if isinstance(roi, np.ndarray) and roi.ndim == len(shape) and roi.shape != (4,):
        if roi.shape != shape or not np.isin(roi, (0, 1)).all():
            raise RecipeError(
                f"roi: a mask of shape {roi.shape} and type {roi.dtype}; needed: booleans of shape {shape}"
            )
        mask = roi.astype(np.bool_)
    else:
        edges = [int(v) for v in np.ravel(np.asarray(roi))]
        pairs = list(zip(edges[::2], edges[1::2], strict=False))
        if len(edges) != 2 * len(shape) or any(not 0 <= a < b <= n for (a, b), n in zip(pairs, shape, strict=False)):
            raise RecipeError(f"roi {edges}: needed are first and end (excluded) for every scan axis of {shape}")
        mask = np.zeros(shape, np.bool_)
        mask[tuple(slice(a, b) for a, b in pairs)] = True
    if not mask.any():
        raise RecipeError("roi: selects no scan position")
    return mask.reshape(-1)


def view_of(ds: Dataset) -> View:
    """What analyses may know of a data set."""
    return View(ds.scan, ds.detector, ds.dtype)


def available_memory() -> int:
    """80 % of the memory that is free for new use, the control group's limit respected, in bytes."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    # version 2 of control groups, and version 1, which writes a huge number for "no limit"
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = Path("/sys/fs/cgroup") / name
        text = limit.read_text(encoding="ascii").strip() if os.access(limit, os.R_OK) else "max"
        free = min(free, int(text)) if text.isdigit() else free
    return int(0.8 * free)


@functools.cache
def _versions() -> dict[str, Any]:
    libraries = ("numpy", "numba", "h5py", "imagecodecs", "zarr", "pydantic")
    return {
        "gpuem": version("gpuem"),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
        "platform": platform.platform(),
    }


def provenance(
    ds: Dataset, analyses: Sequence[Analysis], job: engine.Job, totals: engine.Totals, seconds: float
) -> dict[str, Any]:
    """How the results came about, as plain values."""
    missing = int(job.wanted.sum() - totals.valid.sum())
    reasons: dict[str, list[NDArray[np.int64]]] = {}
    for item in totals.lost:
        reasons.setdefault(item.message, []).append(item.indices)
    return {
        **_versions(),
        "command": sys.argv,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": job.backend.NAME,
        "threads": job.plan.threads,
        "input": {
            "format": ds.source.format,
            "files": [{"path": str(f.path), "size": f.size, "mtime_ns": f.mtime_ns} for f in ds.source.files],
            "scan": list(ds.scan_shape),
            "frame": list(ds.frame_shape),
            "dtype": ds.dtype.str,
            "skip": ds.skip,
        },
        "analyses": [a.model_dump(mode="json", exclude={"mask"}) for a in analyses if hasattr(a, "model_dump")],
        "frames": {"wanted": int(job.wanted.sum()), "read": int(totals.valid.sum()), "masked": missing},
        "lost": [
            {"frames": engine.describe(np.concatenate(indices)), "reason": reason}
            for reason, indices in reasons.items()
        ],
        "notes": list(ds.notes),
        "seconds": {"total": seconds, **totals.seconds},
        "bytes": totals.nbytes,
    }
