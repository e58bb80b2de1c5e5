"""``gpuem status``: how far a run is, from any shell, while it runs and after the fact."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gpuem import toml_file
from gpuem.errors import InputError, RecipeError
from gpuem.pictures import drawing
from gpuem.progress import duration, err, rate

if TYPE_CHECKING:
    from gpuem.status import Log, Progress, Worker

out = Console(highlight=False, soft_wrap=True)
FOLLOW_SECONDS = 2.0
# so many are told one by one
_FEW = 8
_COUNTED = {
    "retry": "shards tried again", "lost": "workers lost", "hang": "shards that hang", "excluded": "workers excluded",
    "masked": "shards with masked frames", "damaged": "times kept shards were damaged", "error": "errors",
    "stop": "ended early",
}  # fmt: skip


def status(
    run: Annotated[Path, typer.Argument(help="The folder of a run (.run), its result, or its recipe.")],
    timeline: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw who did what when into this file.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on telling until the run ends.")] = False,
) -> None:
    """Say how far a run is, who works on it, what went wrong, and which stage takes the time."""
    from gpuem.status import Log

    found = find_runs(run)
    if len(found) > 1:
        for folder in found:
            out.print(f"{escape(folder.name):<40} {_one_line(Log(folder).read())}")
        if timeline or follow:
            err.print("--timeline and --follow are for one run: name its folder")
        return
    log = Log(found[0]).read()
    if follow:
        _follow(log)
    _describe(log)
    if timeline:
        _draw(found[0], timeline)


def find_runs(path: Path) -> list[Path]:
    """Folders of the runs that a path stands for: one, or all those of a recipe for many files.

    Parameters
    ----------
    path : Path
        The folder of a run, a result or a recipe.

    Raises
    ------
    InputError
        There is no such path, or no run.
    """
    if not path.exists() and not path.name.endswith((".zarr", ".run")):
        raise InputError(f"{path}: no such file or folder; give the folder of a run (.run), a result, or a recipe")
    if path.is_file():
        return _of_recipe(path)
    if _is_run(path):
        return [path]
    from gpuem.run_folder import beside

    folder = beside(path)
    if not _is_run(folder):
        there = "" if path.exists() else ", nor is there a result"
        raise InputError(f"{folder}: no run is there{there}. A run leaves this folder beside its result")
    return [folder]


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").exists() or any(folder.glob("events*.jsonl"))


def _of_recipe(path: Path) -> list[Path]:
    from gpuem.run_folder import beside

    try:
        # no more than needed: a recipe may be wrong by now, and its run is to be seen nevertheless
        output = toml_file.read(path)[1]["output"]["path"]
        folder = beside(path.parent / output)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: no recipe that says where its result goes ([output] path): {error}") from error
    if "{name}" in str(folder):
        parts = [re.sub(r"([*?[])", r"[\1]", part) for part in str(folder).split("{name}")]
        anchor = Path(folder.anchor)
        found = sorted(p for p in anchor.glob(str(Path("*".join(parts)).relative_to(anchor))) if _is_run(p))
    else:
        found = [folder] if _is_run(folder) else []
    if not found:
        raise InputError(f"{folder}: no run is there: this recipe was not run yet, or its folders were removed")
    return found


def _one_line(log: Log) -> str:
    from gpuem.status import progress

    return _short(progress(log))


def _short(now: Progress) -> str:
    share = f" ({100 * now.done / now.shards:.0f} %)" if now.shards else ""
    words = [f"{now.done:,} of {now.shards:,} shards{share}", rate(now.now or now.average)]
    if now.left is not None:
        words.append(f"{duration(now.left)} left")
    return ", ".join([*words, escape(now.words)])


def _follow(log: Log) -> None:
    """Tell how far it is until it ends: in one line on a terminal, else a line whenever something is new."""
    from gpuem.status import progress

    told = ""
    try:
        with out.status("") as line:
            while (now := progress(log.read())).state in ("running", "empty"):
                words = _short(now)
                if out.is_terminal:
                    line.update(words)
                elif words.split(",")[0] != told:
                    out.print(words)
                    told = words.split(",")[0]
                if not log.folder.is_dir():
                    err.print(f"{escape(str(log.folder))}: the folder of the run is gone, so it can't be followed")
                    break
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        out.print("no longer followed; the run goes on")


def _describe(log: Log) -> None:
    from gpuem.status import progress, when

    now = progress(log)
    out.print(f"run              {escape(str(log.folder))}")
    out.print(f"state            {escape(now.words)}")
    share = f" ({100 * now.done / now.shards:.1f} %)" if now.shards else ""
    out.print(f"shards           {now.done:,} of {now.shards:,} done{share}, {now.nbytes / 1e9:,.3f} GB")
    if now.average:
        current = f"{rate(now.now)} now, " if now.now else ""
        out.print(f"speed            {current}{rate(now.average)} on average")
        left = f", {duration(now.left)} left" if now.left is not None else ""
        out.print(f"time             {duration(now.seconds)} of work{left}")
    if now.sign:
        out.print(f"sign of life     {when(now.sign)}")
    _describe_workers(now.workers)
    _describe_faults(now)
    for name, why in log.unreadable.items():
        out.print(f"log              {escape(name)} can't be read: {escape(why)}")
    if now.broken:
        out.print(f"log              {now.broken:,} lines can't be read and were left out")
    _describe_stages(log)


def _describe_workers(workers: tuple[Worker, ...]) -> None:
    if not workers:
        return
    counts = [worker.shards for worker in workers]
    each = (
        f"{min(counts):,} to {max(counts):,} shards each" if min(counts) < max(counts) else f"{_shards(counts[0])} each"
    )
    out.print(f"workers          {len(workers):,}, {each}")
    speeds = sorted(w.nbytes / w.busy for w in workers if w.busy > 0)
    usual = speeds[len(speeds) // 2] if speeds else 0.0

    def slow(worker: Worker) -> bool:
        # of one or two shards the first may have had to compile kernels
        return worker.shards > _FEW and worker.busy > 0 and worker.nbytes / worker.busy < usual / 2

    # of many those that stand out
    told = [worker for worker in workers if worker.out or len(workers) <= _FEW or slow(worker)]
    for worker in told[:_FEW]:
        speed = f", {rate(worker.nbytes / worker.busy)} while at work" if worker.busy > 0 else ""
        note = f", {worker.out}" if worker.out else ""
        words = f"{_shards(worker.shards)}{speed}{' (slow)' if slow(worker) else ''}{note}"
        out.print(f"                 {escape(worker.name)}: {words}")
    if len(told) > _FEW:
        out.print(f"                 and {len(told) - _FEW:,} more that are lost, excluded or slow")


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count:,} shards"


def _describe_faults(now: Progress) -> None:
    from gpuem.status import when

    if not now.faults:
        return
    counts = Counter(fault.kind for fault in now.faults)
    out.print(f"faults           {', '.join(f'{_COUNTED[kind]}: {count:,}' for kind, count in counts.items())}")
    shown = now.faults[-10:]
    if len(now.faults) > len(shown):
        out.print(f"                 the last {len(shown)}; all are in events*.jsonl")
    for fault in shown:
        out.print(f"                 {when(fault.t)[11:]} {fault.kind}: {escape(fault.words)}")


def _describe_stages(log: Log) -> None:
    from rich.table import Table

    from gpuem.timings import stages

    found = stages(log)
    if not found.rows:
        out.print(escape(found.sentence))
        return
    table = Table("stage", "time", "share of the workers' time", title="Where the time went", title_justify="left")
    for row in found.rows:
        table.add_row(row.name, duration(row.seconds), f"{100 * row.share:5.1f} %")
    out.print(table)
    if found.overlapping:
        out.print("Stages work at the same time on a GPU: their shares add up to more than 100 %.")
    out.print(escape(found.sentence))


def _draw(folder: Path, target: Path) -> None:
    with drawing("picture"):
        from gpuem.plot_timeline import save_timeline

        out.print(f"picture          {escape(str(save_timeline(folder, target)))}")
