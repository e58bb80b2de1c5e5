"""What is looked at before a run: one sample for all analyses that want one, and a glance at where the beam is."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import look as reading
from gpuem import tiles
from gpuem.analyses import Analysis, Looking, Sample, View
from gpuem.analyses.direct_beam import DirectBeam, measure_direct_beam
from gpuem.analyses.model import Centered
from gpuem.dataset import Dataset
from gpuem.errors import DataError, GpuemError, PlanError
from gpuem.executors.memory import available_memory

log = logging.getLogger("gpuem")
Asked = Analysis | Looking

GLANCE_FRAMES = 16
"""Frames that tell where the beam is, where no analysis wants a sample and a detector stands at the default centre."""

GLANCE_NBYTES = 64 * 10**6
"""Where more than this had to be decoded for them there is no glance; `gpuem check` always looks."""


def view_of(ds: Dataset) -> View:
    """What analyses may know of a data set."""
    return View(ds.scan, ds.detector, ds.dtype)


def frames_wanted(ds: Dataset, analyses: Sequence[Asked]) -> int:
    """How many frames the analyses want to see, those that want most; 0: none."""
    return max((_wants(analysis, view_of(ds)) for analysis in analyses), default=0)


def _wants(analysis: Asked, view: View) -> int:
    if not isinstance(analysis, Looking):
        return 0
    own = getattr(analysis, "sample_frames", None)
    return reading.SAMPLE_FRAMES if own is None else min(int(own(view)), reading.SAMPLE_FRAMES)


def take(ds: Dataset, wanted: NDArray[np.bool_], most: int, memory: int | None = None) -> Sample:
    """Read a sample of at most so many frames, if it fits into memory.

    Raises
    ------
    DataError
        No frame could be read.
    PlanError
        The sample doesn't fit into memory.
    """
    nbytes = tiles.BASE_NBYTES + reading.sample_nbytes(ds, most)
    allowed = available_memory() if memory is None else memory
    if nbytes > allowed:
        raise PlanError(
            f"looking at a sample of the frames needs {nbytes / 1e6:,.0f} MB and the run may take {allowed / 1e6:,.0f} "
            "MB. Allow more ([run] memory)"
        )
    return reading.sample(ds, wanted, most)


def take_wanted(
    ds: Dataset,
    analyses: Sequence[Asked],
    wanted: NDArray[np.bool_],
    memory: int | None = None,
    seen: Sample | None = None,
) -> Sample | None:
    """The sample that the analyses want, unless one was `seen` already; None where they want none; raises as `take`."""
    most = frames_wanted(ds, analyses)
    if not most or seen is not None:
        return seen
    seen = take(ds, wanted, most, memory)
    log.info("look: %d frames, spread over the scan", seen.positions.size)
    return seen


def look(
    ds: Dataset,
    analyses: Sequence[Asked],
    wanted: NDArray[np.bool_],
    memory: int | None = None,
    seen: Sample | None = None,
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
    seen : Sample, optional
        A sample that was taken already.

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
    most, view = frames_wanted(ds, analyses), view_of(ds)
    seen = take_wanted(ds, analyses, wanted, memory, seen)
    if most and seen is not None and any(isinstance(one, Centered) and one.center == "auto" for one in analyses):
        log.info("%s", seen.direct_beam.describe())
    resolved: list[Any] = []
    for analysis in analyses:
        ready = seen is None or not _wants(analysis, view)
        resolved.append(analysis if ready or not isinstance(analysis, Looking) else analysis.look(view, seen))  # type: ignore[arg-type]
    return resolved


# ---- detectors beside the beam


def stands_by_default(analysis: Any) -> bool:
    """Whether it matters where the beam is, and nobody said it: a detector or a reference at the default centre."""
    if getattr(analysis, "center_from", "") != "geometric" or getattr(analysis, "compatible", "") == "libertem":
        return False
    kind = getattr(analysis, "kind", "")
    # without a mask, and with the mean taken off, the centre of mass does not care for the centre
    loose = kind == "com" and analysis.radius is None and analysis.descan != "none"
    return kind in ("virtual", "com") and not loose and getattr(analysis, "shape", "") not in ("mask", "point")


def misplaced(analysis: Any, view: View, beam: DirectBeam) -> str | None:
    """A sentence, where a detector stands at the default centre farther than 1 px, and 5 sigma, from the beam."""
    if not stands_by_default(analysis):
        return None
    y, x = analysis.center_in(view)
    away, sigma = math.dist((y, x), beam.center), math.hypot(*beam.sigma)
    if away <= max(1.0, 5 * sigma):
        return None
    what = getattr(analysis, "shape", "") or ("mask" if analysis.radius is not None else "reference")
    return (
        f"{analysis.name}: {what} at the default centre ({y:g}, {x:g}); the direct beam is measured at "
        f'({beam.center[0]:.1f}, {beam.center[1]:.1f}) +- {max(beam.sigma):.2g} px: give center or center = "auto"'
    )


def glance(ds: Dataset, analyses: Sequence[Any], wanted: NDArray[np.bool_], seen: Sample | None = None) -> None:
    """Warn of detectors that stand at the default centre, beside the beam, before a run.

    Costs no more than `GLANCE_FRAMES` frames (0.1 s of a processor at 128 x 128 pixels, 0.2 s at 256 x 256), and
    nothing where a sample was taken anyway, or where the run sums up all frames: `glance_at_sum` looks at these.
    """
    if not any(stands_by_default(analysis) for analysis in analyses):
        return
    if seen is None:
        sums = any(getattr(analysis, "kind", "") == "sum" for analysis in analyses)
        if sums or not ds.source.in_files or reading.glance_nbytes(ds, GLANCE_FRAMES) > GLANCE_NBYTES:
            return
    try:
        beam = (seen or reading.sample(ds, wanted, GLANCE_FRAMES)).direct_beam
    except (GpuemError, OSError, MemoryError) as error:
        # not knowing where the beam is never ends a run
        log.debug("the direct beam was not measured: %s", error)
        return
    _warn(view_of(ds), analyses, beam)


def glance_at_sum(view: View, analyses: Sequence[Any], total: NDArray[Any], frames: int) -> None:
    """Warn of detectors that stand at the default centre, beside the beam, from the sum of all frames of a run."""
    if not any(stands_by_default(analysis) for analysis in analyses):
        return
    try:
        beam = measure_direct_beam(np.asarray(total, np.float64) / max(frames, 1))
    except GpuemError as error:
        log.debug("the direct beam was not measured: %s", error)
        return
    _warn(view, analyses, beam)


def _warn(view: View, analyses: Sequence[Any], beam: DirectBeam) -> None:
    for analysis in analyses:
        said = misplaced(analysis, view, beam)
        if said:
            log.warning("%s", said)


def check_sample(
    ds: Dataset, analyses: Sequence[Asked], wanted: NDArray[np.bool_], memory: int
) -> tuple[Sample | None, str]:
    """The sample that ``gpuem check`` looks at: taken also where no analysis wants one.

    Returns
    -------
    sample : Sample or None
        None where none can be had and none is needed.
    why : str
        Why there is none.
    """
    try:
        return take(ds, wanted, reading.SAMPLE_FRAMES, memory), ""
    except (DataError, PlanError) as error:
        if frames_wanted(ds, analyses):
            raise
        return None, str(error)
