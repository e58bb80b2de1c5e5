"""``gpuem slurm``: write a job script, or submit it."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from gpuem import streams
from gpuem.cli_status import out
from gpuem.errors import InputError, OutputError, RecipeError
from gpuem.progress import err

if TYPE_CHECKING:
    from gpuem.recipe import Recipe
    from gpuem.slurm import Ask, Mode
    from gpuem.slurm_site import Site


def slurm(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a TOML file.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILES...]", help="Further files of --array.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs on each; 0: the processors compute.")] = 1,
    time: Annotated[
        str, typer.Option(metavar="H:MM:SS", help="Time limit, after which the job runs again.")
    ] = "1:00:00",
    array: Annotated[
        list[str] | None, typer.Option(metavar="FILES", help="A job array: one task for each file, as data/*.mib.")
    ] = None,
    mode: Annotated[
        str, typer.Option(metavar="dask|rank|single", help="dask, or rank (srun alone), or single (one process).")
    ] = "",
    site: Annotated[Path | None, typer.Option(help="What the cluster wants, a TOML file.")] = None,
    name: Annotated[str, typer.Option(help="Of the job; default the recipe's.")] = "",
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="Processors of every task.")] = None,
    check: Annotated[bool, typer.Option(help="Look now whether the data can be opened.")] = True,
    submit: Annotated[bool, typer.Option("--submit", help="Hand the script to sbatch.")] = False,
) -> None:
    """Write a job script for Slurm: many GPUs, many nodes, or a job array over many files."""
    from gpuem import recipe as recipes
    from gpuem import slurm as jobs
    from gpuem import slurm_site

    chosen = _mode(mode, nodes, gpus_per_node)
    loaded, _ = recipes.load(recipe)
    files = _files(array, more, loaded.input.format)
    where = slurm_site.load(site)
    ask = jobs.Ask(
        recipe.absolute(), time, nodes, gpus_per_node, chosen, name or recipe.stem, cpus_per_task, tuple(files)
    )  # fmt: skip
    output = jobs.output_of(ask, loaded)
    text = jobs.script(ask, output, where)
    if check:
        _check_input(loaded, ask.files)
    _check_programs(ask, where, submit)
    _make_folder(jobs.log_pattern(ask, output).parent, submit)
    if not submit:
        sys.stdout.write(text)
        sys.stdout.flush()
        if why := streams.failure(sys.stdout):
            raise OutputError(f"the script can't be written to standard output: {why}")
        return
    _say(jobs.submit(text), ask, output)


def _make_folder(folder: Path, submitting: bool) -> None:
    """Make the folder of the log: Slurm ends a job without a word where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{folder}: the folder of the result can't be made: {error.strerror}"
        if submitting:
            raise OutputError(message) from error
        err.print(f"note: {escape(message)}; Slurm ends a job without a word where the folder of its log is missing")


def _mode(asked: str, nodes: int, gpus: int) -> Mode:
    from gpuem.slurm import best_mode

    if not asked:
        return best_mode(nodes, gpus)
    if asked not in ("dask", "rank", "single"):
        raise RecipeError(f"--mode {asked}: there are dask, rank and single")
    if asked == "single" and (nodes > 1 or gpus > 1):
        raise RecipeError(f"--mode single is one process on one GPU; for {nodes} x {gpus} GPUs take dask or rank")
    return asked  # type: ignore[return-value]


def _files(array: list[str] | None, more: list[str] | None, format: str | None) -> tuple[str, ...]:  # noqa: A002
    """Files of an array: as one pattern in quotes, or as many words that the shell made of it."""
    from gpuem.slurm import find_files

    if array is None and more:
        raise RecipeError(f"{shlex.join(more)}: one recipe, please; files to run it on one by one go after --array")
    return find_files([*(array or []), *(more or [])], format)


def _check_input(loaded: Recipe, files: tuple[str, ...]) -> None:
    from gpuem import job
    from gpuem.formats import remote
    from gpuem.recipe import one_by_one

    # one stands for all: reading thousands of headers takes its time
    if files:
        first = loaded.model_copy(
            update={"input": loaded.input.model_copy(update={"path": remote.place(files[0]), "each": None})}
        )
    else:
        first = next(iter(one_by_one(loaded).values()))
    try:
        job.open_input(first)
    except InputError as error:
        raise InputError(f"{error}\nIf only the cluster's nodes see the data, use --no-check") from error


def _check_programs(ask: Ask, site: Site, submitting: bool) -> None:
    """In dask mode say what this Python lacks; a container or the site's own lines may bring another one."""
    if ask.mode != "dask" or site.container is not None or site.setup:
        return
    wanted = ["distributed", *(["dask_cuda"] * bool(ask.gpus))]
    missing = " and ".join(module.replace("_", "-") for module in wanted if find_spec(module) is None)
    if not missing:
        return
    message = f"dask mode needs {missing}, which is not installed here: install it with pip, or use --mode rank"
    if submitting:
        raise RecipeError(message)
    err.print(f"note: {escape(message)}")


def _say(job: str, ask: Ask, output: Path) -> None:
    from gpuem.recipe import NAME
    from gpuem.run_folder import beside
    from gpuem.slurm import log_pattern

    log = str(log_pattern(ask, output)).replace("%%", "%")
    _print(f"submitted        job {job}" + f", {len(ask.files)} tasks" * bool(ask.files))
    _print(f"in the queue     squeue --jobs={job}")
    if ask.files:
        log = log.replace("%A", job)
        _print(f"its logs         {shlex.quote(log.replace('%a', '0'))}, ...")
    else:
        _print(f"its log          tail -F {shlex.quote(log.replace('%j', job))}")
    _print(f"how far          gpuem status {shlex.quote(str(ask.recipe if NAME in str(output) else beside(output)))}")
    _print(f"stop             scancel {job}")


def _print(text: str) -> None:
    out.print(escape(text))
