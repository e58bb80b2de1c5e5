"""Job scripts for Slurm: one recipe on many nodes, or many files one by one, going on by themselves after a time limit.

A script is plain bash that its reader may change. It starts what is there already, a Dask scheduler with a worker for
every GPU or just ``srun``, and `gpuem run --resume` in it. Of Slurm it asks two things: a SIGTERM some time before the
end, upon which gpuem saves what is finished and ends with 75, and to run the job again then.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpuem import data_sets
from gpuem.errors import GpuemError, InputError, RecipeError
from gpuem.formats import remote
from gpuem.recipe import NAME, Recipe, only
from gpuem.redaction import holds_secrets
from gpuem.run_folder import beside
from gpuem.slurm_parts import ASKED_AGAIN, DASK_SETTINGS, RUN_AND_WAIT, SCHEDULER, SEND_HOME, TELL, Step
from gpuem.slurm_site import Site

Mode = Literal["single", "dask", "rank"]

# seconds between the SIGTERM and the time limit; Slurm may be up to a minute early
GRACE = 120


@dataclass(frozen=True)
class Ask:
    """What is asked of Slurm.

    Parameters
    ----------
    recipe : Path
        The recipe's file.
    nodes, gpus : int
        Nodes, and GPUs on each; 0 GPUs: the processors compute.
    time : str
        Time limit as Slurm writes it: ``2:00:00``, ``1-12:00:00``, ``90``.
    mode : {"single", "dask", "rank"}
        One process; a Dask scheduler and workers; or ranks under ``srun`` that share the shards out among themselves.
    name : str
        Of the job.
    cpus : int
        Processors of every task; None: what suits.
    files : tuple of str
        A job array, one task for each of these files; empty: the recipe's own input.
    """

    recipe: Path
    time: str
    nodes: int = 1
    gpus: int = 1
    mode: Mode = "single"
    name: str = "gpuem"
    cpus: int | None = None
    files: tuple[str, ...] = ()

    @property
    def tasks(self) -> int:
        """Tasks on every node: Dask's workers of a node have one parent, every rank has one GPU."""
        return max(self.gpus, 1) if self.mode == "rank" else 1

    @property
    def whole(self) -> bool:
        """Without GPUs several nodes are taken whole."""
        return self.nodes > 1 and not self.gpus and self.cpus is None


def best_mode(nodes: int, gpus: int) -> Mode:
    """One process can do it, or Dask."""
    return "single" if nodes == 1 and gpus <= 1 else "dask"


def with_site(ask: Ask, site: Site) -> Ask:
    """The same, with the site's number of processors where none was given, or with one that suits most machines."""
    cpus = ask.cpus if ask.cpus is not None else site.cpus_per_task
    if cpus is None and not (ask.nodes > 1 and not ask.gpus):
        cpus = 8 * max(ask.gpus // ask.tasks, 1)
    return Ask(ask.recipe, ask.time, ask.nodes, ask.gpus, ask.mode, ask.name, cpus, ask.files)


def seconds(time: str) -> int:
    """Seconds of a time limit in Slurm's notation; raises RecipeError."""
    found = re.fullmatch(
        r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?)|(?:(\d+)(?::(\d+))?(?::(\d+))?)", time.strip(), re.ASCII
    )
    if not found:
        raise RecipeError(f"--time {time}: write hours:minutes:seconds, days-hours or minutes, as 2:00:00, 1-12 or 90")
    days, *rest = found.groups()
    if days is not None:
        hours, minutes, secs = (int(part or 0) for part in rest[:3])
        total = int(days) * 86400 + hours * 3600 + minutes * 60 + secs
    else:
        first, second, third = rest[3:]
        parts = [int(part) for part in (first, second, third) if part is not None]
        total = parts[0] * 3600 + parts[1] * 60 + parts[2] if len(parts) == 3 else parts[0] * 60 + sum(parts[1:])
    if total < 60:
        raise RecipeError(f"--time {time}: Slurm counts whole minutes; give at least one")
    return total


def find_files(names: Sequence[str], format: str | None = None) -> tuple[str, ...]:  # noqa: A002
    """Absolute paths of the data sets that files and patterns name, each once; addresses (``s3://...``) as they are.

    Parameters
    ----------
    names : sequence of str
        Files, patterns, addresses.
    format : str
        Of the files, where the recipe says it.

    Raises
    ------
    InputError
        A file is not there.
    RecipeError
        A pattern finds nothing.
    """
    places = [place.absolute() if isinstance(place, Path) else place for place in map(remote.place, names)]
    for place in places:
        if isinstance(place, Path) and not data_sets.split(place)[1] and not place.exists():
            raise InputError(f"--array {place}: no such file")
    found = tuple(map(remote.address, data_sets.expand(places, format)))
    for file in found:
        if holds_secrets(file):
            raise RecipeError(
                f"--array {file}: a signed address, or one with a password, must not stand in a job script, which "
                "others can read; write it into a recipe of its own ([input] path), readable for you alone"
            )
    return found


def outputs(template: Path, files: Iterable[str]) -> dict[str, Path]:
    """Where the result of each file goes; raises RecipeError where two would go to the same place."""
    if NAME not in str(template):
        raise RecipeError(
            f'[output] path = "{template}": an array of files needs "{NAME}" in it, which becomes the file\'s name '
            f'without its suffix, as "{NAME}.results.zarr"; else every result would go to the same place'
        )
    places: dict[Path, str] = {}
    for file in files:
        place = Path(str(template).replace(NAME, stem(file)))
        if place in places:
            raise RecipeError(
                f"--array: {places[place]} and {file} would both be saved as {place}; give them different names, or "
                "submit them with two recipes"
            )
        places[place] = file
    return {file: place for place, file in places.items()}


def stem(file: str) -> str:
    """Name of a file or an address without its folder and suffix."""
    return Path(file.rstrip("/").rsplit("/", 1)[-1]).stem


def output_of(ask: Ask, recipe: Recipe) -> Path:
    """Where the result goes; with ``{name}`` in it where there are several.

    Raises
    ------
    RecipeError
        An array whose results would go to one place; ranks for a recipe of several data sets.
    """
    if ask.files:
        outputs(recipe.output.path, ask.files)
        return recipe.output.path
    if recipe.input.each is None:
        return only(recipe).output.path
    if ask.mode == "rank":
        raise RecipeError(
            f"--mode rank runs one data set, and [input] of {ask.recipe.name} names {len(recipe.input.each):,}: "
            "give them by --array, or take --mode dask"
        )
    return recipe.output.path


def script(ask: Ask, output: Path, site: Site | None = None) -> str:
    """The job script.

    Parameters
    ----------
    ask : Ask
        What is asked of Slurm.
    output : Path
        Where the result goes; see `output_of`.
    site : Site
        What the cluster wants.

    Raises
    ------
    RecipeError
        A time limit Slurm would not take, or a name with a line break.
    """
    site = site or Site()
    ask = with_site(ask, site)
    for text in (str(ask.recipe), str(output), ask.name, *ask.files):
        if not text.isprintable():
            raise RecipeError(f"{text!r}: names with line breaks or control characters can't be written into a script")
    body = {"single": _single, "dask": _dask, "rank": _rank}[ask.mode](ask, site, output)
    blocks = [_head(ask, site, output), _environment(site), _names(ask, output), *body, ASKED_AGAIN]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _above(output: Path) -> Path:
    """The folder in which the results of all data sets lie, at whatever depth."""
    folder = output.parent
    while NAME in str(folder):
        folder = folder.parent
    return folder


def log_pattern(ask: Ask, output: Path) -> Path:
    """Where the job's log goes, in Slurm's notation (``%j``): beside the result, whose folder must be there."""
    folder = _above(output)
    name = ask.recipe.stem if NAME in str(output) else output.name.removesuffix(".zarr")
    # a single % begins a pattern of Slurm
    return Path(str(folder / name).replace("%", "%%") + (".slurm-%A_%a.log" if ask.files else ".slurm-%j.log"))


def submit(text: str) -> str:
    """Hand a script to ``sbatch``; returns the job's number.

    Raises
    ------
    GpuemError
        There is no Slurm here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise GpuemError(
            "there is no sbatch here, so nothing was submitted: do this on a login node of the cluster, or leave "
            "--submit away, keep the script (> job.sh) and take it there"
        )
    done = subprocess.run(["sbatch", "--parsable"], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise GpuemError(f"sbatch refuses the job: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]


def _head(ask: Ask, site: Site, output: Path) -> str:
    of = f"{ask.recipe.name}, {len(ask.files):,} files, each" if ask.files else ask.recipe.name
    where = "1 node" if ask.nodes == 1 else f"{ask.nodes} nodes"
    with_what = f" with {ask.gpus} GPU{'s' if ask.gpus > 1 else ''}{' each' if ask.nodes > 1 else ''}" * bool(ask.gpus)
    status = shlex.quote(str(ask.recipe if NAME in str(output) else beside(output)))
    # a login shell knows "module" where others may not
    return (
        f"#!/bin/bash{' -l' * bool(site.modules)}\n"
        f"# {of} on {where}{with_what}. Written by gpuem slurm; change it as you like.\n"
        f"# follow: gpuem status {status}\n"
        "# stop: scancel JOB; submitted again, it goes on where it stopped\n"
        f"{_sbatch(ask, site, log_pattern(ask, output))}"
    )


def _sbatch(ask: Ask, site: Site, log: Path) -> str:
    limit = seconds(ask.time)
    gpus = f"{site.gpu_type}:{ask.gpus}" if site.gpu_type else str(ask.gpus)
    asked: list[tuple[str, object]] = [
        ("job-name", ask.name),
        ("array", f"0-{len(ask.files) - 1}" if ask.files else None),
        ("account", site.account),
        ("partition", site.partition),
        ("qos", site.qos),
        ("constraint", site.constraint),
        ("nodes", ask.nodes),
        ("ntasks-per-node", ask.tasks),
        ("cpus-per-task", ask.cpus),
        ("gres" if site.gres else "gpus-per-node", (f"gpu:{gpus}" if site.gres else gpus) if ask.gpus else None),
        ("mem", site.memory if site.memory is not None else ("0" if ask.whole else None)),
        ("time", ask.time),
        ("output", log),
        ("open-mode", "append"),
        ("signal", f"B:TERM@{min(GRACE, limit // 4)}"),
    ]
    lines = [f"#SBATCH --{name}={shlex.quote(str(value))}" for name, value in asked if value is not None]
    # a node that is lost shall not end the job: the others do its shards
    flags = ["--requeue", *(["--exclusive"] * ask.whole), *(["--no-kill"] * (ask.nodes > 1))]
    return "\n".join(lines + [f"#SBATCH {flag}" for flag in [*flags, *site.sbatch]])


def _environment(site: Site) -> str:
    lines = []
    if site.container is None:
        lines.append(f'# the Python that wrote this script\nexport PATH={shlex.quote(site.programs)}:"$PATH"')
    lines += [f"module load {shlex.join(site.modules)}"] * bool(site.modules)
    return "\n".join([*lines, *site.setup])


def _names(ask: Ask, output: Path) -> str:
    lines = ["set -u", f"recipe={shlex.quote(str(ask.recipe.absolute()))}"]
    if ask.files:
        listed = "\n".join(f"    {shlex.quote(file)}" for file in ask.files)
        lines += [
            f"files=(\n{listed}\n)",
            "file=${files[$SLURM_ARRAY_TASK_ID]}",
            "name=${file%/}",
            "name=${name##*/}",
            '[[ "$name" != ?*.* ]] || name=${name%.*}',
            f"output={shlex.quote(str(output))}",
            f"output=${{output//'{NAME}'/\"$name\"}}",
            "run=${output%.zarr}.run",
            "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
        ]
    else:
        lines += [f"run={shlex.quote(str(_folder(ask, output)))}", "job=$SLURM_JOB_ID"]
    lines.append('mkdir -p "$run" && cd "$run" || exit 2')
    return "\n".join(lines)


def _folder(ask: Ask, output: Path) -> Path:
    """Where the job works: the run's folder, or of several data sets one for all of them."""
    return _above(output) / f"{ask.recipe.stem}.job" if NAME in str(output) else beside(output)


def _events(ask: Ask, output: Path) -> str:
    """The logs of the runs, as bash finds them."""
    if ask.files or NAME not in str(output):
        return "events*.jsonl"
    return "*".join(map(shlex.quote, str(beside(output)).split(NAME))) + "/events*.jsonl"


def _run(ask: Ask, more: str = "") -> str:
    return 'gpuem run "$recipe" --resume' + ' --input "$file"' * bool(ask.files) + more


def _single(ask: Ask, site: Site, output: Path) -> list[str]:
    client = Step(site, "client").beside(_run(ask))
    return [
        TELL["step" if site.steps_only else "process"],
        RUN_AND_WAIT.format(client=client, events=_events(ask, output)),
    ]


def _rank(ask: Ask, site: Site, output: Path) -> list[str]:
    # srun hands the processors of a job on only where it is told so
    bound = [f"--cpus-per-task={ask.cpus}"] if ask.cpus else []
    # a rank that fails, or is done long before the others, ends nobody else
    options = [*bound, *(["--gpus-per-task=1"] * bool(ask.gpus)), "--kill-on-bad-exit=0", "--wait=0"]
    client = Step(site, "client").everywhere(_run(ask, " --rank-from-env"), options)
    return [TELL["step"], RUN_AND_WAIT.format(client=client, events=_events(ask, output))]


def _dask(ask: Ask, site: Site, output: Path) -> list[str]:
    interface = f" --interface {shlex.quote(site.interface)}" if site.interface else ""
    common = f'--scheduler-file "$scheduler" --memory-limit 0 --no-dashboard --death-timeout 60{interface}'
    if ask.gpus:
        worker, what = f"dask cuda worker {common} --device-memory-limit 0", "on every node a worker for each GPU"
    else:
        threads = f" --nthreads {ask.cpus}" if ask.cpus else ""
        worker, what = f"dask worker {common} --nworkers 1{threads}", "a worker on every node"
    bound = [f"--cpus-per-task={ask.cpus}"] if ask.cpus else []
    options = [
        f"--nodes={ask.nodes}", f"--ntasks={ask.nodes}", "--ntasks-per-node=1", *bound, "--no-kill",
        "--kill-on-bad-exit=0", "--wait=0", "--output=workers-%N.log", "--open-mode=append",
    ]  # fmt: skip
    scheduler = f'dask scheduler --scheduler-file "$scheduler" --port 0 --no-dashboard{interface}'
    started = SCHEDULER.format(
        scheduler=Step(site, "scheduler").beside(scheduler),
        what=what,
        workers=Step(site, "workers").everywhere(worker, options),
    )
    client = Step(site, "client").beside(_run(ask, ' --scheduler "$scheduler"'))
    return [DASK_SETTINGS, TELL["named" if site.steps_only else "process"], started,
            RUN_AND_WAIT.format(client=client, events=_events(ask, output)) + "\n\n" + SEND_HOME]  # fmt: skip
