"""A run from beginning to end. Newcomers: read this file first, then what it calls."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from gpuem import (
    backends,
    dataset,
    engine,
    executors,
    identity,
    keeping,
    outputs,
    prepared,
    recipe,
    results,
    run_folder,
    sampling,
    tiles,
)
from gpuem import resume as resume_of
from gpuem.analyses import Analysis, Sample, View, listed
from gpuem.backends import Device, Weights
from gpuem.dataset import Dataset
from gpuem.errors import OutputError, RecipeError, ResumableError
from gpuem.executors import Crew, local
from gpuem.executors.dispatch import no_report
from gpuem.executors.memory import available_memory
from gpuem.identity import version
from gpuem.keeping import Progress
from gpuem.look import sample_nbytes
from gpuem.maps import finish
from gpuem.messages import shown
from gpuem.paths import local_path
from gpuem.provenance import provenance
from gpuem.redaction import redact
from gpuem.region import Roi, region, summary
from gpuem.results import Results
from gpuem.run_folder import RunFolder
from gpuem.sampling import Asked, frames_wanted, look, view_of

log = logging.getLogger("gpuem")
Watch = Callable[[Dataset, int], AbstractContextManager[Progress | None]]


class Options(TypedDict, total=False):
    """The other arguments of `run`; what ``[run]`` says in a recipe."""

    threads: int | None
    memory: str | int | None
    device_memory: str | int | None
    transfer: Literal["auto", "pinned", "gds"]
    on_error: engine.OnError
    workers: int | Literal["all"] | None
    scheduler: str | None
    patience: float


def run(
    data: Any,
    analyses: Sequence[Asked] | Asked,
    *,
    roi: Roi = None,
    device: Device = "auto",
    progress: Progress | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
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
        Called with the number of frames of every shard that is done.
    folder : path
        Keep finished shards in this folder, and the log of the run; remove it when the result is saved.
    resume : bool
        Go on where a run of the same was stopped that kept its shards in `folder`.
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
    workers : int or "all"
        Start so many worker processes here, one per GPU on GPUs; default: this process does it.
    scheduler : str
        Use the Dask workers of this scheduler: its address, or its scheduler file.
    patience : float
        Seconds for which a shard is tried again where storage fails.

    Returns
    -------
    Results
        The maps.

    Raises
    ------
    RecipeError, InputError, DataError, PlanError, DeviceError
        What, where, the numbers, the remedy.
    ResumableError
        It ended early for what may pass; with `folder`, finished shards are kept.
    """
    if isinstance(data, str | os.PathLike):
        raise RecipeError(f"run({str(data)!r}): open the file first: gpuem.run(gpuem.open({str(data)!r}), ...)")
    ds = data if isinstance(data, Dataset) else dataset.of_array(data)
    chosen = listed(analyses)
    _check(chosen)
    if progress is not None and not callable(progress):
        raise RecipeError(f"progress {shown(progress)}: needed is a function of the number of frames")
    if resume and folder is None:
        raise RecipeError("resume: needs folder, in which a run before this one kept its shards")
    asked = recipe.run_section(device=device, **options)
    with executors.crew(asked) as crew:
        if folder is None:
            return _run(ds, chosen, asked, roi, progress, crew)
        with RunFolder(local_path(folder)) as kept:
            return _run(ds, chosen, asked, roi, progress, crew, kept, resume)


def _run(
    ds: Dataset,
    analyses: Sequence[Asked],
    options: recipe.Run,
    roi: Roi,
    progress: Progress | None,
    crew: Crew,
    kept: RunFolder | None = None,
    resume: bool = False,
) -> Results:
    """`run`, once its arguments are in order and there is somebody to do it."""
    started = time.perf_counter()
    if kept is None:
        resolved, job = begin(ds, analyses, _planning(options, crew), roi)
        job = crew.settle(job)
        with closing(crew.run(job, range(len(job.plan.shards)), no_report)) as partials:
            totals = engine.combine(job, keeping.told(partials, progress))
    else:
        resolved, job = _begin_kept(ds, analyses, options, roi, crew, kept, resume)
        totals = keeping.run(job, crew, kept, progress)
    maps, failed = finish(view_of(ds), resolved, job, totals)
    if sum(job.weights, Weights()).total and not frames_wanted(ds, analyses):
        sampling.glance_at_sum(view_of(ds), resolved, totals.sums.total, int(totals.valid.sum()))
    facts = provenance(ds, analyses, job, totals, time.perf_counter() - started)
    facts["roi"] = summary(job.wanted, roi)
    if failed:
        facts["failed"] = failed
        for name, why in failed.items():
            log.error("%s: its maps could not be made: %s", name, why)
    if kept is not None:
        facts["run"], facts["identity"] = kept.id, kept.identity
    return Results(maps, facts)


def _planning(options: recipe.Run, crew: Crew) -> recipe.Run:
    """How this process plans: where others compute it needs no GPU itself, they plan and check that."""
    elsewhere = {"device": "cpu", "transfer": "auto", "device_memory": None}
    return options.model_copy(update=elsewhere) if crew.name == "dask" else options


def _begin_kept(
    ds: Dataset, analyses: Sequence[Asked], options: recipe.Run, roi: Roi, crew: Crew, kept: RunFolder, resume: bool
) -> tuple[list[Analysis], engine.Job]:
    """`begin`, where a run goes on that was stopped, or will be able to."""
    now = identity.of_data(ds, analyses, region(ds.scan_shape, roi), version())
    then = run_folder.begun(kept.path) if resume else None
    if then is None:
        kept.clear()
        resolved, job = begin(ds, analyses, _planning(options, crew), roi)
        job = crew.settle(job)
        prepared.save(kept.path, analyses, resolved, view_of(ds))
        kept.describe(ds.source.frame_nbytes, job, {**now, **identity.of_cuts(job)}, None)
        return resolved, job
    identity.refuse_another(kept.path, then["identity"], now)
    wanted, allowed = region(ds.scan_shape, roi), allowed_memory(options)
    resolved = prepared.load(kept.path, analyses, view_of(ds), lambda some: look(ds, some, wanted, allowed))
    job = crew.settle(prepare(ds, resolved, _planning(options, crew), roi))
    identity.refuse_another(kept.path, then["identity"], identity.of_cuts(job))
    try:
        # the same run, worked on by another process
        kept.describe(ds.source.frame_nbytes, job, then["identity"], then)
    except OutputError as error:
        raise ResumableError(f"{error}. What is finished is kept; to go on: the same command with --resume") from error
    return resolved, job


def run_recipe(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch = lambda ds, frames: nullcontext(),
    crew: Crew | None = None,
    **changes: Any,
) -> tuple[Results, Path]:
    """Run a recipe file and save its results; what ``gpuem run`` calls.

    Every shard goes to a folder beside the result as it ends (``scan.results.run`` for ``scan.results.zarr``), so that
    a run that was stopped can go on; what is large in it is removed once the result is saved.

    Parameters
    ----------
    path : path
        The recipe.
    overwrite : bool
        Replace a result that is there, forget an unfinished run.
    resume : bool
        Go on with an unfinished run. Where there is none, begin; where there is a result of the same, return it.
    watch : callable
        Called with the data set and the number of frames that are wanted before the first is read; the context it
        returns gives the `progress` of `run`.
    crew : Crew
        Who runs the shards; by default whom ``[run]`` says.
    **changes
        What is said otherwise than in the recipe: ``workers``, ``scheduler``, ``input``.

    Returns
    -------
    results : Results
        The maps.
    path : Path
        Where they were saved.

    Raises
    ------
    ResumableError
        The run ended early; finished shards are kept.
    """
    path = local_path(path)
    asked, text = recipe.load_one(path, **changes)
    return run_asked(asked, text, path=path, overwrite=overwrite, resume=resume, watch=watch, crew=crew)


def run_asked(
    asked: recipe.Recipe, text: str, *, path: Path, overwrite: bool, resume: bool, watch: Watch, crew: Crew | None
) -> tuple[Results, Path]:
    """`run_recipe`, once the recipe is read from `path`, and is of one data set."""
    output, folder = asked.output.path, run_folder.beside(asked.output.path)
    outputs.begin(asked, path, overwrite=overwrite, resume=resume)
    # only now: a result whose replacement was cut off has been restored
    there = results.is_result(output)
    if not resume:
        run_folder.refuse_unfinished(folder, overwrite=overwrite)
    ds = open_input(asked)
    outputs.refuse_overlaps(outputs.places(asked), outputs.inputs(asked, ds))
    wanted = region(ds.scan_shape, asked.input.roi)
    text = redact(text)
    if resume and there:
        now = identity.of_data(ds, asked.analysis, wanted, version())
        if not resume_of.replaces(folder, output, now):
            return resume_of.finished(folder, output, now), output
        overwrite = True
    about = {"recipe": text, "output": str(output), "overwrite": overwrite}
    with (
        executors.crew(asked.run) if crew is None else nullcontext(crew) as hands,
        RunFolder(folder, about) as kept,
        watch(ds, int(wanted.sum())) as progress,
    ):
        found = _run(ds, asked.analysis, asked.run, asked.input.roi, progress, hands, kept, resume)
        found.provenance["recipe"] = text
        with keeping.saving(kept, output):
            found.save(output, overwrite=overwrite)
            kept.finish()
    return found, output


def open_input(asked: recipe.Recipe) -> Dataset:
    """Open the data of a recipe, corrected where it says so."""
    options = asked.input.model_dump(exclude={"path", "each", "roi"})
    ds = dataset.open(asked.input.path, calibration=asked.calibration.model_dump(), **options)
    correction = asked.correction.model_dump(exclude_none=True)
    return ds.corrected(**correction) if correction else ds


def begin(
    ds: Dataset, analyses: Sequence[Asked], options: recipe.Run, roi: Roi = None, seen: Sample | None = None
) -> tuple[list[Analysis], engine.Job]:
    """All of a run before it streams: look, unless a sample was `seen`, then prepare. ``gpuem check`` stops here."""
    _check(analyses)
    wanted, most = region(ds.scan_shape, roi), frames_wanted(ds, analyses)
    seen = sampling.take_wanted(ds, analyses, wanted, allowed_memory(options), seen)
    resolved = look(ds, analyses, wanted, seen=seen)
    sampling.glance(ds, resolved, wanted, seen)
    return resolved, prepare(ds, resolved, options, roi, sample_nbytes(ds, most) if most else 0)


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
    allowed = allowed_memory(options)
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
        transfer=options.transfer, patience=options.patience,
    )  # fmt: skip


def _check(analyses: Sequence[Asked]) -> None:
    if not analyses:
        raise RecipeError("analyses: give at least one")
    recipe.check_names([analysis.name for analysis in analyses])


def allowed_memory(options: recipe.Run) -> int:
    """Bytes of host memory that the run may take."""
    return recipe.parse_memory(options.memory) if options.memory is not None else available_memory()


def _map_nbytes(analysis: Analysis, view: View) -> int:
    own = getattr(analysis, "map_nbytes", None)
    return int(own(view)) if own else tiles.MAPS_NBYTES
