"""Processes that a launcher numbered (srun, mpirun, torchrun), without any server: each takes every n-th shard.

They meet in the run folder, on a file system that all of them see. Rank 0 looks and plans, and says so in
``launch.json``; every other rank then writes its finished shards to a store of its own, ``store-3``. Rank 0 computes its
own share, collects what the others finish, and makes the result.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from gpuem.checkpoint import Store
from gpuem.engine import Job, Partial
from gpuem.errors import RecipeError, ResumableError
from gpuem.executors import local
from gpuem.executors.dispatch import Report
from gpuem.run_folder import RunFolder, say_launch, write_whole

# how often rank 0 looks what the others finished, in seconds
LOOK = 0.5
# a rank that gave no sign of life for so long is lost
SILENT = 60.0
# number of this process, number of all, number on this machine, and what names this launch, as launchers say them
LAUNCHERS = (
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", ("PMIX_NAMESPACE",)),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("PMI_JOBID",)),
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")),
)


@dataclass(frozen=True)
class Rank:
    """Which process this is, of how many, in which launch."""

    number: int
    count: int
    launch: str


def from_environment(environment: Mapping[str, str] = os.environ) -> Rank:
    """The rank that the launcher gave this process.

    Raises
    ------
    RecipeError
        No launcher that is known, or none that names its launches.
    """
    for number, count, _, names in LAUNCHERS:
        if number in environment and count in environment:
            said = [environment[name] for name in names if name in environment]
            launch = environment.get("GPUEM_LAUNCH") or "-".join(said)
            if not launch and int(environment[count]) > 1:
                raise RecipeError(
                    f"--rank-from-env: {number} is set, but nothing names this launch: set GPUEM_LAUNCH to a word that is "
                    "new for every start"
                )
            return Rank(int(environment[number]), int(environment[count]), launch)
    known = ", ".join(number for number, *_ in LAUNCHERS)
    raise RecipeError(f"--rank-from-env: none of {known} is set; start it with srun, mpirun or torchrun")


def choose_gpu(environment: MutableMapping[str, str]) -> None:
    """Of several GPUs that all ranks of a machine see, leave this one its own."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    places = [environment[name] for _, _, name, _ in LAUNCHERS if name in environment]
    if len(visible) > 1 and places:
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(places[0]) % len(visible)]


@dataclass
class Collector:
    """Rank 0: it runs its share, and gathers those of the others."""

    rank: Rank
    folder: Path
    name: str = "ranks"
    _seen: dict[int, Store] = field(default_factory=dict)

    def settle(self, job: Job) -> Job:
        """The job as it is: every rank plans it alike."""
        return job

    def workers(self, job: Job) -> int:
        """Ranks."""
        return self.rank.count

    def run(self, job: Job, shards: Iterable[int], report: Report) -> Generator[Partial]:
        """Yield the results of this rank as they end, and those of the others as they are found."""
        missing = set(shards)
        # the others may begin
        say_launch(self.folder, self.rank.launch)
        mine = [shard for shard in sorted(missing) if shard % self.rank.count == 0]
        looked = 0.0
        with closing(local.run(job, mine, report)) as computing:
            for partial in computing:
                if partial.shard in missing:
                    missing.discard(partial.shard)
                    yield partial
                if time.monotonic() - looked > LOOK:
                    looked = time.monotonic()
                    yield from self._collected(job, missing)
        while missing:
            # who ended is asked first: what it finished before that is then found
            ended = {number: _mark(self.folder, number, self.rank.launch) for number in range(1, self.rank.count)}
            before = len(missing)
            yield from self._collected(job, missing)
            if missing and len(missing) == before:
                self._refuse_without(job, missing, ended)
                time.sleep(LOOK)

    def _collected(self, job: Job, missing: set[int]) -> Generator[Partial]:
        """What other ranks finished, also those of an earlier launch."""
        for path in sorted(self.folder.glob("store-*")):
            store = Store(path, job)
            store.look()
            for shard in sorted(missing & set(store.finished)):
                store.finished = {shard: store.finished[shard]}
                if store.verify():
                    continue
                missing.discard(shard)
                yield store.read(shard)
                store.look()
            store.close()

    def _refuse_without(self, job: Job, missing: set[int], ended: dict[int, dict[str, str] | None]) -> None:
        """Raise ResumableError where what is missing won't come."""
        for number in sorted({shard % self.rank.count for shard in missing} - {0}):
            mark = ended[number]
            if mark is not None:
                raise ResumableError(f"rank {number} ended: {mark['why'] or 'its shards are not in its store'}")
            silent = _silent(self.folder / f"alive-{number}")
            if silent > max(SILENT, job.patience):
                raise ResumableError(f"rank {number} gave no sign of life for {silent:.0f} s")


def assist(job: Job, rank: Rank, folder: RunFolder) -> None:
    """Any other rank: run its share, keep it where rank 0 finds it.

    Raises
    ------
    ResumableError
        It ended early.
    """
    done: set[int] = set()
    own = Store(folder.store, job)
    for path in sorted(folder.path.glob("store*")):
        store = own if path == folder.store else Store(path, job)
        store.look()
        store.finished = {s: record for s, record in store.finished.items() if s % rank.count == rank.number}
        store.verify()
        done |= set(store.finished)
    mine = [s for s in range(len(job.plan.shards)) if s % rank.count == rank.number and s not in done]
    why = "it was killed"
    try:
        own.begin()
        with closing(local.run(job, mine, folder.report)) as computing:
            for partial in computing:
                own.write(partial)
        own.close()
        why = ""
    except BaseException as error:
        why = str(error) or type(error).__name__
        raise
    finally:
        mark = {"launch": rank.launch, "why": why}
        write_whole(folder.path / f"rank-{rank.number}", json.dumps(mark).encode())


def wait_for_launch(folder: Path, rank: Rank, patience: float, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Wait until rank 0 has planned this launch; False where it has found that all is done.

    Raises
    ------
    ResumableError
        It gives no sign of life.
    """
    waited = time.monotonic()
    while True:
        try:
            said = json.loads((folder / "launch.json").read_text(encoding="utf-8"))
            if said["launch"] == rank.launch:
                return not said.get("over")
        except (OSError, ValueError, KeyError):
            pass
        if _silent(folder / "alive") < SILENT:
            waited = time.monotonic()
        if time.monotonic() - waited > max(patience, SILENT):
            raise ResumableError(f"{folder}: rank 0 hasn't begun for {time.monotonic() - waited:.0f} s")
        sleep(0.2)


def _mark(folder: Path, number: int, launch: str) -> dict[str, str] | None:
    """What a rank said at its end, if it ended."""
    try:
        found = json.loads((folder / f"rank-{number}").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("launch") == launch else None


def _silent(alive: Path) -> float:
    """Seconds since a process last said that it is alive."""
    try:
        return time.time() - alive.stat().st_mtime
    except OSError:
        return float("inf")
