"""A recipe for many data sets: one result each, whatever becomes of the others, and a summary."""

from __future__ import annotations

import datetime
import json
import logging
import os
import time
from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gpuem import atomic, executors, job, outputs, ownership, recipe, results, run_folder
from gpuem.errors import GpuemError, OutputError, ResumableError
from gpuem.executors import Crew
from gpuem.identity import version
from gpuem.job import Watch
from gpuem.messages import in_a_line
from gpuem.paths import local_path
from gpuem.recipe import NAME, Recipe
from gpuem.results import Results, SavedResults

log = logging.getLogger("gpuem")
State = Literal["done", "kept", "failed", "not begun"]
# how often the summary is written on the way, in seconds
SUMMARY_SECONDS = 5.0
SUMMARY_FORMAT, SUMMARY_VERSION = "gpuem summary", 1


@dataclass(frozen=True)
class Campaign:
    """A recipe of several data sets, or of one.

    Parameters
    ----------
    path : Path
        The recipe's file.
    text : str
        The same, verbatim.
    alone : dict of str to Recipe
        A recipe for each data set, by its name.
    several : bool
        Whether the recipe is of several, be it that only one was found.
    summary : Path
        Where the summary goes.
    """

    path: Path
    text: str
    alone: dict[str, Recipe]
    several: bool
    summary: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a data set.

    Parameters
    ----------
    name : str
        Its name.
    data : str
        Its file, or the first of them.
    result : Path
        Where its maps are, or would be.
    state : {"done", "kept", "failed", "not begun"}
        kept: it ended early; its finished shards are kept, and a resumed run goes on with them.
    error : GpuemError
        Why it isn't done.
    found : Results
        The maps, where it is done; with how many frames, how many of them masked, and bytes of them.
    seconds : float
        How long that took.
    earlier : bool
        It was done before this run.
    """

    name: str
    data: str
    result: Path
    state: State
    error: GpuemError | None = field(default=None, repr=False)
    found: Results | None = field(default=None, repr=False)
    frames: int = 0
    masked: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    earlier: bool = False

    @property
    def row(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "name": self.name,
            "input": self.data,
            "result": str(self.result),
            "state": self.state,
            "earlier": self.earlier,
            "frames": self.frames,
            "masked": self.masked,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "why": None if self.error is None else str(self.error),
        }


def load(path: str | os.PathLike[str], **changes: Any) -> Campaign:
    """Read a recipe, find its data sets.

    Parameters
    ----------
    path : path
        The recipe.
    **changes
        What is said otherwise than in the recipe: ``workers``, ``scheduler``, ``input``.

    Raises
    ------
    RecipeError
        The recipe is wrong, a pattern finds nothing, or two data sets can't be told apart by their names.
    """
    asked, text = recipe.load(local_path(path), **changes)
    parts = asked.output.path.parts
    sure = next((k for k, part in enumerate(parts) if NAME in part), len(parts) - 1)
    summary = Path(*parts[:sure]) / f"{Path(path).stem}.summary.json"
    return Campaign(Path(path), text, recipe.one_by_one(asked), asked.input.each is not None, summary)


def runs(
    campaign: Campaign,
    *,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch = lambda ds, frames: nullcontext(),
) -> Generator[Outcome]:
    """Run the data sets one after another, with the same workers; yield what became of each.

    A data set that fails doesn't stop the rest. Ctrl-C and SIGTERM do: the data set in work is kept as far as it is,
    and no further one is begun. The summary is written on the way.

    Parameters
    ----------
    campaign : Campaign
        What `load` returned.
    overwrite : bool
        Replace results that are there, forget unfinished runs.
    resume : bool
        Pass over what is finished, go on with what was stopped.
    watch : callable
        See `gpuem.run_recipe`; called for each data set.

    Raises
    ------
    OutputError
        Something would be written on, in or around what is read, or would replace what gpuem did not write.
    GpuemError
        Workers can't be started.
    """
    if campaign.several:
        check_outputs(campaign)
    told: dict[str, dict[str, Any]] = {}
    written = -SUMMARY_SECONDS
    options = next(iter(campaign.alone.values())).run
    try:
        with closing(_Hands(options)) as hands:
            for number, name in enumerate(campaign.alone, 1):
                if campaign.several:
                    log.info("%d of %d: %s", number, len(campaign.alone), name)
                outcome = _run(campaign, name, hands, overwrite=overwrite, resume=resume, watch=watch)
                told[name] = outcome.row
                if time.monotonic() - written > SUMMARY_SECONDS:
                    _write_summary(campaign, told)
                    written = time.monotonic()
                yield outcome
                if outcome.state == "not begun" or was_stopped(outcome):
                    return
                # its maps must not fill the memory while the next ones are computed
                del outcome
    finally:
        _write_summary(campaign, told)


def _run(campaign: Campaign, name: str, hands: _Hands, *, overwrite: bool, resume: bool, watch: Watch) -> Outcome:
    """Run one data set."""
    asked = campaign.alone[name]
    data, result, began = first_of(asked), asked.output.path, time.monotonic()
    state: State
    error: GpuemError
    earlier = resume and results.is_result(result) and not run_folder.is_begun(run_folder.beside(result))
    try:
        # what is finished needs nobody
        crew = None if earlier else hands.crew()
    except GpuemError as nobody:
        if not hands.started:
            raise
        return Outcome(name, data, result, "not begun", nobody)
    except KeyboardInterrupt as stop:
        return Outcome(name, data, result, "not begun", _stopped(stop))
    try:
        found, where = job.run_asked(
            asked, campaign.text, path=campaign.path, overwrite=overwrite, resume=resume, watch=watch, crew=crew
        )
        facts = found.provenance
        frames, seconds = facts["frames"], facts["seconds"]["total"] if earlier else time.monotonic() - began
        failed = "; ".join(f"{analysis}: {why}" for analysis, why in facts.get("failed", {}).items())
        return Outcome(
            name, data, where, "failed" if failed else "done",
            GpuemError(f"{failed}; all other maps are saved") if failed else None,
            found, frames["read"], frames["masked"], facts["bytes"], seconds, earlier,
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        state, error = "kept", _stopped(stop)
    except ResumableError as early:
        state, error = "kept", early
        hands.drop()
    except GpuemError as wrong:
        state, error = "failed", wrong
    except Exception as unforeseen:
        # a night's worth of other data sets must not be lost by it
        expected = isinstance(unforeseen, OSError | MemoryError)
        log.debug("%s", name, exc_info=True)
        more = "" if expected else " (a fault of gpuem; gpuem --verbose tells its place)"
        state, error = "failed", GpuemError(f"{type(unforeseen).__name__}: {in_a_line(unforeseen)}{more}")
    return Outcome(name, data, result, state, _bare(error), seconds=time.monotonic() - began)


def _stopped(stop: KeyboardInterrupt) -> ResumableError:
    error = ResumableError(f"{stop or 'stopped by Ctrl-C'}; run it again with --resume")
    error.__cause__ = stop
    return error


def _bare(error: GpuemError) -> GpuemError:
    """An error without the frames it came through, which would keep open files and arrays alive."""
    item: BaseException | None = error
    while item is not None:
        item.__traceback__ = None
        item = item.__cause__ or item.__context__
    return error


def first_of(asked: Recipe) -> str:
    """The file of a data set, or the first of them."""
    paths = asked.input.path
    return str(paths[0] if isinstance(paths, list) else paths)


def was_stopped(outcome: Outcome) -> bool:
    """Whether somebody stopped the run there, by Ctrl-C or SIGTERM."""
    return outcome.error is not None and isinstance(outcome.error.__cause__, KeyboardInterrupt)


class _Hands:
    """Who runs the shards of all data sets: started when first needed, and anew after an early end."""

    def __init__(self, options: recipe.Run) -> None:
        self._options = options
        self._crew: Crew | None = None
        self.started = False
        self._ending = ExitStack()

    def crew(self) -> Crew:
        """The crew; raises GpuemError where it can't be had."""
        if self._crew is None:
            self._crew = self._ending.enter_context(executors.crew(self._options))
            self.started = True
        return self._crew

    def drop(self) -> None:
        """End this crew: it may be why a run ended early."""
        self._crew = None
        self._ending.close()

    def close(self) -> None:
        """End the crew."""
        self.drop()


def filled(campaign: Campaign, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """What became of all data sets, in their order: those that nothing was said of were not begun."""
    said = {outcome.name: outcome for outcome in outcomes}
    return [
        said.get(name) or Outcome(name, first_of(asked), asked.output.path, "not begun")
        for name, asked in campaign.alone.items()
    ]


def check_outputs(campaign: Campaign) -> None:
    """Raise OutputError where a campaign would write on what it reads, or over what gpuem did not write."""
    outputs.check_campaign(campaign.alone, campaign.path, campaign.summary)
    refuse_foreign_summary(campaign.summary)


def refuse_foreign_summary(path: Path) -> None:
    """Raise OutputError where something is there that isn't a summary that gpuem wrote."""
    found = ownership.read_json(path, most_nbytes=1 << 30)
    known = found is not None and ownership.has_format(found, SUMMARY_FORMAT, SUMMARY_VERSION)
    if os.path.lexists(path) and not known:
        raise OutputError(
            f"{path}: the summary goes there, but gpuem did not write what is there, so it is not replaced; move it "
            "away, or rename the recipe"
        )


def _write_summary(campaign: Campaign, told: dict[str, dict[str, Any]]) -> None:
    """Write what became of the data sets so far; a disk that is full must not end the run for that."""
    if not campaign.several:
        return
    rows = [told.get(outcome.name, outcome.row) for outcome in filled(campaign, ())]
    counts = {state: sum(row["state"] == state for row in rows) for state in ("done", "kept", "failed", "not begun")}
    content = {
        "format": SUMMARY_FORMAT,
        "version": SUMMARY_VERSION,
        "id": ownership.new_id(),
        "gpuem": version(),
        "recipe": str(campaign.path.absolute()),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "counts": counts,
        "data sets": rows,
    }
    try:
        atomic.make_folder(campaign.summary.parent)
        refuse_foreign_summary(campaign.summary)
        atomic.write_file(campaign.summary, json.dumps(content, indent=1).encode())
    except OutputError as error:
        log.warning("the summary: %s", error)
    except OSError as error:
        log.warning("the summary: %s: not written: %s", campaign.summary, atomic.format_error(error))


def run_recipes(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resume: bool = False,
    watch: Watch = lambda ds, frames: nullcontext(),
    **changes: Any,
) -> dict[str, SavedResults | GpuemError]:
    """Run a recipe on all its data sets, one after another, and save their results; failures don't stop the rest.

    Parameters
    ----------
    path : path
        The recipe: ``[input] each = ["a.mib", "b*.h5"]``, or ``path = "data/*.mib"``; ``[output] path`` holds
        ``{name}``.
    overwrite : bool
        Replace results that are there, forget unfinished runs.
    resume : bool
        Pass over what is finished, go on with what was stopped.
    watch : callable
        Called for each data set, as by `gpuem.run_recipe`.
    **changes
        What is said otherwise than in the recipe: ``workers``, ``scheduler``, ``input``.

    Returns
    -------
    dict
        By the name of each data set: its maps and where they were saved, ``results, path = found[name]``, or why there
        are none. Maps are loaded from there when they are asked for, so that no batch is too large for the memory:
        ``found[name].load()``; ``found[name].path`` loads nothing.

    Raises
    ------
    RecipeError
        The recipe is wrong, or a pattern finds nothing.
    ResumableError
        Ctrl-C, or nobody is left to work: what is finished is saved, and a resumed run goes on.
    """
    campaign = load(path, **changes)
    out: dict[str, SavedResults | GpuemError] = {}
    with closing(runs(campaign, overwrite=overwrite, resume=resume, watch=watch)) as outcomes:
        for outcome in outcomes:
            if outcome.state == "not begun" or was_stopped(outcome):
                done = sum(not isinstance(found, GpuemError) for found in out.values())
                raise ResumableError(
                    f"{outcome.name}: {outcome.error}. {done:,} of {len(campaign.alone):,} data sets are done; "
                    "to go on: the same with resume=True"
                ) from outcome.error
            if outcome.found is not None:
                out[outcome.name] = SavedResults(outcome.result)
            elif outcome.error is not None:
                out[outcome.name] = outcome.error
            # nor must its maps stay here while the next ones are computed
            del outcome
    return out
