"""The commands; the only module that prints."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import time
import tomllib
import traceback
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from gpuem import interrupts, streams
from gpuem.cli_report import (
    check_many,
    check_one,
    describe_data,
    describe_results,
    out,
    previews,
    report,
    report_many,
    say_outcome,
)
from gpuem.cli_slurm import slurm
from gpuem.cli_status import status
from gpuem.errors import GpuemError, InputError, RecipeError, ResumableError
from gpuem.messages import in_a_line
from gpuem.progress import Progress, duration, err
from gpuem.redaction import redact

if TYPE_CHECKING:
    from gpuem.many import Campaign, Outcome
    from gpuem.results import Results

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Stream detector frames once and leave maps behind: virtual detectors, centre of mass, strain.",
)
log = logging.getLogger("gpuem")
# EX_TEMPFAIL: try again later
RESUMABLE = 75


class _Console(logging.Handler):
    """Log lines above the progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            err.print(escape(self.format(record)))
        except Exception:  # noqa: BLE001 - a line of the log that can't be made must not end a run
            self.handleError(record)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"gpuem {version('gpuem')}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on the way.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, format="%(message)s", handlers=[_Console()])
    for noisy in ("numba", "matplotlib", "asyncio", "h5py", "zarr", "numcodecs", "PIL", "distributed", "tornado"):
        logging.getLogger(noisy).setLevel(logging.ERROR if noisy == "matplotlib" else logging.WARNING)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a result, forget an unfinished run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped; else begin.")] = False,
    workers: Annotated[str | None, typer.Option(metavar="N|all", help="Worker processes to start.")] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="ADDRESS|FILE", help="Use its Dask workers.")] = None,
    ranked: Annotated[
        bool, typer.Option("--rank-from-env", help="One of several processes that srun, mpirun or torchrun started.")
    ] = False,
    data: Annotated[str | None, typer.Option("--input", help="The data, instead of what the recipe says.")] = None,
) -> None:
    """Run a recipe and save its maps. What is finished is kept: exit code 75 says that --resume goes on."""
    count = int(workers) if workers and workers.isdigit() else workers
    changes = {"workers": count, "scheduler": scheduler, "input": data}
    if ranked:
        rank = _rank(recipe, changes)
        if rank is None:
            return
        changes["rank"] = rank
    else:
        from gpuem import many

        campaign = many.load(recipe, **changes)
        if campaign.several:
            _run_many(campaign, overwrite=overwrite, resume=resume)
            return
    found, where = _run(recipe, overwrite=overwrite, resume=resume, **changes)
    report(found, where)
    if failed := found.provenance.get("failed"):
        err.print(f"[bold red]error:[/bold red] {escape(', '.join(failed))}: without maps; all others are saved")
        raise typer.Exit(2)


def _run_many(campaign: Campaign, *, overwrite: bool, resume: bool) -> None:
    """Run all data sets of a recipe; the exit code says what became of them."""
    from gpuem import many

    ended: list[Outcome] = []
    stopped = False
    try:
        with closing(many.runs(campaign, overwrite=overwrite, resume=resume, watch=Progress)) as outcomes:
            for outcome in outcomes:
                ended.append(replace(outcome, found=None))
                stopped = many.was_stopped(outcome)
                say_outcome(outcome)
                if outcome.found is not None and not outcome.earlier and campaign.alone[outcome.name].output.previews:
                    previews(outcome.found, outcome.result)
                # its maps are saved, and must not fill the memory while the next ones are computed
                del outcome
    except KeyboardInterrupt:
        stopped = True
    rows = many.filled(campaign, ended)
    report_many(rows, campaign.summary)
    states = {row.state for row in rows}
    if stopped or "not begun" in states or ("kept" in states and "failed" not in states):
        err.print("[bold yellow]ended early:[/bold yellow] to go on: the same command with --resume")
        raise typer.Exit(RESUMABLE)
    if "failed" in states:
        failed = sum(row.state == "failed" for row in rows)
        err.print(f"[bold red]error:[/bold red] {failed:,} of {len(rows):,} data sets failed")
        raise typer.Exit(2)


def _rank(recipe: Path, changes: dict[str, Any]) -> Any:
    """The rank of this process, if it is the one that makes the result; any other one does its share here."""
    from gpuem import rank_job
    from gpuem.executors import ranks

    if changes["workers"] is not None or changes["scheduler"] is not None:
        raise RecipeError("--rank-from-env: the ranks are the workers; leave out --workers and --scheduler")
    rank = ranks.from_environment()
    ranks.choose_gpu(os.environ)
    if rank.number == 0:
        return rank
    try:
        rank_job.assist(recipe, rank, **changes)
    except KeyboardInterrupt as error:
        raise ResumableError(
            f"rank {rank.number}: {error or 'stopped by Ctrl-C'}; its finished shards are kept"
        ) from None
    return None


@app.command()
def check(recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")]) -> None:
    """Do everything `run` does before it streams the data: shards, bytes, memory, estimated time."""
    from gpuem import many

    campaign = many.load(recipe)
    if campaign.several:
        check_many(campaign)
    else:
        check_one(next(iter(campaign.alone.values())), recipe)


@app.command()
def selftest(
    what: Annotated[str, typer.Argument(help="What to test: strain.")] = "strain",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    quick: Annotated[bool, typer.Option(help="Plain patterns only.")] = False,
) -> None:
    """Measure synthetic patterns of known strain: error over the Cramer-Rao bound, and patterns per second, here."""
    from gpuem import selftest as tests

    if what != "strain" or device not in ("auto", "cuda", "cpu"):
        raise RecipeError(f"selftest {what} --device {device}: there is strain, on auto, cuda or cpu")
    cases = ("plain",) if quick else tuple(tests.CASES)
    with err.status("synthetic patterns of set K") as status:
        rows = tests.strain(
            cases=cases,
            device=device,  # type: ignore[arg-type]
            progress=lambda row: status.update(f"{row.case}, {row.dose:g} electrons per pattern"),
        )
    out.print("Strain of synthetic patterns: 256 x 256 pixels, 25 disks")
    out.print(tests.table(rows))
    out.print(tests.LEGEND)


app.command()(slurm)
app.command()(status)


@app.command()
def info(path: Annotated[Path, typer.Argument(help="A detector file, or a result.")]) -> None:
    """Say what a detector file or a result holds."""
    from gpuem import results

    if path.is_dir() and results.is_readable(path):
        try:
            describe_results(results.load_results(path), path)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path}: a damaged gpuem result: how it came about can't be read: {error!r}") from error
        return
    from gpuem.formats import check_readable, find_format, read_header

    check_readable(path)
    if find_format(path) == "raw":
        out.print(f"{escape(str(path))}: raw, {path.stat().st_size:,} bytes")
        out.print(
            'A raw file says nothing of itself; a recipe must: scan = [256, 256], frame = [256, 256], dtype = "uint16"'
        )
        return
    from gpuem.dataset import arrange

    ds = arrange(read_header((path,), fit=True), None, 0, True, None)
    describe_data(ds)
    for key, value in ds.metadata.items():
        out.print(f"{escape(str(key)):<16} {escape(str(value))}")


@app.command()
def devices(
    compiling: Annotated[
        bool, typer.Option("--compile", help="Compile the usual kernels for the GPU of this machine and keep them.")
    ] = False,
    architectures: Annotated[
        str,
        typer.Option(
            metavar="80,90", help="Compile for GPUs of these compute capabilities (without the point); needs no GPU."
        ),
    ] = "",
) -> None:
    """List what gpuem can compute on; compile kernels ahead of their first use."""
    from gpuem.backends import cuda_report

    _describe_processor()
    for label, words in cuda_report.facts():
        out.print(f"{label:<16} {escape(words)}")
    if compiling or architectures:
        _compile_kernels(architectures)


def _describe_processor() -> None:
    import platform

    from gpuem.executors.local import cpus

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text(errors="replace").splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    out.print(f"cpu              {escape(model)}, {cpus()} processors for this process")


def _compile_kernels(asked: str) -> None:
    from rich.table import Table

    from gpuem.backends import cuda_report

    wanted, which = cuda_report.architectures(asked), cuda_report.usual()
    began = time.perf_counter()
    with err.status(f"compiling {len(which)} kernels for sm_{', sm_'.join(wanted)}"):
        rows = cuda_report.compile_all(wanted, which)
    columns = (f"sm_{architecture}" for architecture in wanted)
    table = Table("kernel", *columns, title="Registers of a thread, and bytes that had no room in them")
    for cells in cuda_report.table(rows):
        table.add_row(*cells)
    out.print(table)
    out.print(f"{len(rows):,} kernels compiled or found in {duration(time.perf_counter() - began)}")


@app.command()
def demo(folder: Annotated[Path, typer.Argument(help="Where to write the demo; it is created.")]) -> None:
    """Write a small 4D-STEM file with known truth and its recipe, run it, compare."""
    from gpuem import demo as demonstration

    recipe = demonstration.write(folder)
    out.print(f"wrote {escape(str(recipe.with_suffix('.raw')))} and {escape(str(recipe))}")
    found, where = _run(recipe, overwrite=True)
    report(found, where)
    from rich.table import Table

    table = Table("quantity", "truth", "found", "", title="Found against the truth", title_justify="left")
    rows = demonstration.compare(found)
    for quantity, true, value, good in rows:
        table.add_row(quantity, true, value, "ok" if good else "WRONG")
    out.print(table)
    if not all(row[3] for row in rows):
        raise typer.Exit(1)


def _run(recipe: Path, **options: Any) -> tuple[Results, Path]:
    from gpuem import job, rank_job

    run = rank_job.lead if "rank" in options else job.run_recipe
    try:
        found, where = run(recipe, watch=Progress, **options)
    except KeyboardInterrupt as error:
        err.print(f"{interrupts.describe(error)}; run it again with --resume")
        raise typer.Exit(RESUMABLE) from None
    # as it was run, not as the file may read by now
    asked = tomllib.loads(found.provenance["recipe"])
    if asked.get("output", {}).get("previews", True):
        previews(found, where)
    return found, where


def main() -> None:
    """Run a command: errors of gpuem become one message and exit code 2, signals exit code 75."""
    interrupts.install()
    # a short process makes hundreds of thousands of lasting objects by importing: looking through them again and again
    # for garbage, and once more at the end, takes a quarter of its time
    gc.set_threshold(500_000, 50, 100)
    atexit.register(gc.freeze)
    logging.raiseExceptions = False
    streams.protect()
    code = _main()
    if why := streams.failure(sys.stdout):
        err.print(f"note: standard output can't be written ({escape(why)}); what was to be printed is lost")
    sys.exit(code)


def _main() -> int:
    """Run the command; its exit code."""
    try:
        app(standalone_mode=True)
    except SystemExit as ended:
        if ended.code in (1, 130) and interrupts.received():
            # Click makes 1 of a KeyboardInterrupt that no command caught
            err.print(f"{interrupts.describe()} before anything was begun")
            return RESUMABLE
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except ResumableError as error:
        err.print(f"[bold yellow]ended early:[/bold yellow] {escape(str(error))}")
        return RESUMABLE
    except GpuemError as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}")
    except (OSError, MemoryError) as error:
        err.print(f"[bold red]error:[/bold red] {escape(redact(str(error) or type(error).__name__))}")
    except Exception as error:
        log.debug("", exc_info=True)
        err.print(f"[bold red]error:[/bold red] {escape(_unforeseen(error))}")
    return 2


def _unforeseen(error: Exception) -> str:
    """An error that is a fault of gpuem, with its place."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    return redact(
        f"a fault of gpuem: {in_a_line(error)} ({type(error).__name__} at {Path(at.filename).name}:{at.lineno}). "
        "Please report it with what gpuem --verbose prints"
    )


if __name__ == "__main__":
    main()
