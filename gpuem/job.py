"""A run from beginning to end. Newcomers: read this file first, then what it calls."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from gpuem import backends, dataset, engine, recipe, results, tiles
from gpuem.analyses import Analysis, Looking, Map, View
from gpuem.backends import Device, Sums, Weights
from gpuem.dataset import Dataset
from gpuem.errors import DataError, PlanError, RecipeError
from gpuem.executors import local
from gpuem.look import sample, sample_nbytes
from gpuem.provenance import provenance
from gpuem.region import Roi, region, summary
from gpuem.results import Results

log = logging.getLogger("gpuem")
Progress = Callable[[int], None]
Asked = Analysis | Looking


class Options(TypedDict, total=False):
    """The other arguments of `run`; what ``[run]`` says in a recipe."""

    threads: int | None
    memory: str | int | None
    device_memory: str | int | None
    transfer: Literal["auto", "pinned", "gds"]
    on_error: engine.OnError


def run(
    data: Any,
    analyses: Sequence[Asked] | Asked,
    *,
    roi: Roi = None,
    device: Device = "auto",
    progress: Progress | None = None,
    **options: Unpack[Options],
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
    progress : callable
        Called with the number of frames of every shard that is done; on a CPU from worker threads.
    threads : int
        Threads that compute, or that read for a GPU; default all processors of this process.
    memory : str or int
        Most memory the process may take, ``"4 GB"``; default 80 % of what is available.
    device_memory : str or int
        Most memory of the GPU; default 90 % of what is free.
    transfer : {"auto", "pinned", "gds"}
        How bytes reach a GPU: through page-locked memory, by GPUDirect, or as suits the files.
    on_error : {"stop", "mask"}
        Broken frames stop the run, or are masked and counted.

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
    chosen = list(analyses) if isinstance(analyses, Sequence) else [analyses]
    asked = recipe.run_section(device=device, **options)
    resolved, job = begin(ds, chosen, asked, roi)
    totals = engine.combine(job, local.run(job, progress))
    maps = finish(view_of(ds), resolved, job, totals)
    facts = provenance(ds, chosen, job, totals, time.perf_counter() - started)
    facts["roi"] = summary(job.wanted, roi)
    return Results(maps, facts)


def run_recipe(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    watch: Callable[[Dataset, int], AbstractContextManager[Progress | None]] = lambda ds, frames: nullcontext(),
) -> tuple[Results, Path]:
    """Run a recipe file and save its results; what ``gpuem run`` calls.

    Parameters
    ----------
    path : path
        The recipe.
    overwrite : bool
        Replace a result that is there.
    watch : callable
        Called with the data set and the number of frames that are wanted before the first is read; the context it
        returns gives the `progress` of `run`.

    Returns
    -------
    results : Results
        The maps.
    path : Path
        Where they were saved.
    """
    asked, text = recipe.load(Path(path))
    results.check_writable(asked.output.path, overwrite=overwrite)
    ds = open_input(asked)
    wanted = int(region(ds.scan_shape, asked.input.roi).sum())
    with watch(ds, wanted) as progress:
        found = run(ds, asked.analysis, roi=asked.input.roi, progress=progress, **asked.run.model_dump())
    found.provenance["recipe"] = text
    return found, found.save(asked.output.path, overwrite=overwrite)


def open_input(asked: recipe.Recipe) -> Dataset:
    """Open the data of a recipe, corrected where it says so."""
    options = asked.input.model_dump(exclude={"path", "roi"})
    ds = dataset.open(asked.input.path, calibration=asked.calibration.model_dump(), **options)
    correction = asked.correction.model_dump(exclude_none=True)
    return ds.corrected(**correction) if correction else ds


def begin(
    ds: Dataset, analyses: Sequence[Asked], options: recipe.Run, roi: Roi = None
) -> tuple[list[Analysis], engine.Job]:
    """All of a run before it streams: look, then prepare. ``gpuem check`` stops here."""
    resolved = look(ds, analyses, region(ds.scan_shape, roi), _allowed(options))
    looked = any(isinstance(analysis, Looking) for analysis in analyses)
    return resolved, prepare(ds, resolved, options, roi, sample_nbytes(ds) if looked else 0)


def look(
    ds: Dataset, analyses: Sequence[Asked], wanted: NDArray[np.bool_], memory: int | None = None
) -> list[Analysis]:
    """Let the analyses that want to look at a sample of frames; without them nothing is read.

    Parameters
    ----------
    ds : Dataset
        The frames.
    analyses : sequence of analyses
        As they were asked for.
    wanted : (positions,) bool
        The region of interest.
    memory : int
        Bytes that the process may take; default 80 % of what is available.

    Returns
    -------
    list of Analysis
        All of them, in their order, with what they found out.

    Raises
    ------
    DataError
        No frame could be read.
    PlanError
        The sample doesn't fit into memory.
    """
    _check(analyses)
    if not any(isinstance(analysis, Looking) for analysis in analyses):
        return [a for a in analyses if not isinstance(a, Looking)]
    nbytes, allowed = tiles.BASE_NBYTES + sample_nbytes(ds), local.available_memory() if memory is None else memory
    if nbytes > allowed:
        raise PlanError(
            f"looking at a sample of the frames needs {nbytes / 1e6:,.0f} MB and the run may take {allowed / 1e6:,.0f} "
            "MB. Allow more ([run] memory)"
        )
    view, frames = view_of(ds), sample(ds, wanted)
    log.info("look: %d frames, spread over the scan", frames.positions.size)
    return [a.look(view, frames) if isinstance(a, Looking) else a for a in analyses]


def prepare(
    ds: Dataset, analyses: Sequence[Analysis], options: recipe.Run, roi: Roi = None, sample_nbytes: int = 0
) -> engine.Job:
    """Weights, plan and open files of a run; no frame is read.

    Parameters
    ----------
    ds : Dataset
        The frames.
    analyses : sequence of Analysis
        They have looked, if they had to.
    options : recipe.Run
        Where and how.
    roi
        Scan positions to read; see `run`.
    sample_nbytes : int
        Bytes of the frames that were looked at.
    """
    _check(analyses)
    backend = backends.select(options.device)
    if backend.NAME == "cpu" and (options.transfer, options.device_memory) != ("auto", None):
        log.info("transfer and device_memory mean nothing on the CPU")
    view = view_of(ds)
    weights = [a.weights(view) for a in analyses]
    prepared = backend.prepare(sum(weights, Weights()), ds.frame_shape, ds.dtype)
    allowed = _allowed(options)
    asked = options.device_memory
    on_device = recipe.parse_memory(asked, "device_memory") if asked is not None else None
    maps = sum(_map_nbytes(analysis, view) for analysis in analyses)
    limits = tiles.Limits(ds.positions, maps, options.threads or local.cpus(), allowed, on_device, sample_nbytes)
    plan = backend.plan(ds.source, prepared, limits)
    if ds.source.in_files:
        ds.files.check()
    # mappings of files that could fill the memory are given back as soon as they are used
    give_back = 2 * sum(file.size for file in ds.source.files) > allowed
    wanted = region(ds.scan_shape, roi)
    return engine.Job(
        ds.source, ds.files, plan, backend, tuple(weights), prepared, ds.skip, wanted, options.on_error, give_back,
        transfer=options.transfer,
    )  # fmt: skip


def _check(analyses: Sequence[Asked]) -> None:
    if not analyses:
        raise RecipeError("analyses: give at least one")
    recipe.check_names([analysis.name for analysis in analyses])


def _allowed(options: recipe.Run) -> int:
    """Bytes of host memory that the run may take."""
    return recipe.parse_memory(options.memory) if options.memory is not None else local.available_memory()


def _map_nbytes(analysis: Analysis, view: View) -> int:
    own = getattr(analysis, "map_nbytes", None)
    return int(own(view)) if own else tiles.MAPS_NBYTES


def finish(view: View, analyses: Sequence[Analysis], job: engine.Job, totals: engine.Totals) -> dict[str, Map]:
    """Hand every analysis its own columns of the sums, collect the maps."""
    if not totals.valid.any():
        why = "; ".join(item.message for item in totals.lost[:3]) or "no frame of the file lies inside the scan"
        raise DataError(f"not one frame could be read: {why}")
    maps: dict[str, Map] = {}
    masks = images = moments = fits = 0
    for analysis, own in zip(analyses, job.weights, strict=True):
        sums = Sums(
            totals.sums.masks[:, masks : (masks := masks + len(own.masks))],
            totals.sums.images[:, images : (images := images + len(own.images))],
            totals.sums.moments[:, moments : (moments := moments + len(own.moments))],
            totals.sums.total,
            totals.sums.maximum,
            totals.sums.fits[fits : (fits := fits + len(own.fits))],
        )
        for name, item in analysis.finish(view, sums, totals.valid).items():
            maps[f"{analysis.name}/{name}" if name else analysis.name] = item
    valid = totals.valid.reshape(view.scan_shape)
    maps["valid"] = Map(valid, view.scan, "", "a frame was read at this scan position")
    return maps


def view_of(ds: Dataset) -> View:
    """What analyses may know of a data set."""
    return View(ds.scan, ds.detector, ds.dtype)
