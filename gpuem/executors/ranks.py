"""Processes that a launcher numbers (srun, mpirun, torchrun), without any server: each runs shards until none is left.

They meet in the run folder, on a file system that all of them see. Rank 0 looks and plans, and says so in
``launch.json``; every rank then takes batches of shards (see `gpuem.executors.claims`) until none is left. Ranks other
than 0 write finished shards to a store of their own, ``store-3``, and at their end say in ``rank-3`` why they ended.
Rank 0 collects what the others finish, runs what lost ranks had taken, and makes the result.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpuem import errors, ownership
from gpuem.checkpoint import Store
from gpuem.engine import Job, Partial
from gpuem.errors import GpuemError, OutputError, RecipeError, ResumableError
from gpuem.executors import copies, local
from gpuem.executors.claims import Claims
from gpuem.executors.dispatch import Report
from gpuem.regular_files import read_regular
from gpuem.run_folder import RunFolder, read_launch, say_launch, write_file

log = logging.getLogger("gpuem")
# how often rank 0 looks what the others finished, in seconds
LOOK = 0.5
# a rank that gave no sign of life for so long is lost
SILENT = 60.0
# rank 0 said that it was alive, and doesn't any more: it ended, unless the file system is slow to tell
ENDED = 10.0


@dataclass(frozen=True)
class Launcher:
    """Names of the variables for the number of a process, of all, and on its machine; and of one that only it sets."""

    number: str
    count: str
    place: str
    own: str = ""


# the innermost first: in a Slurm job, mpirun and torchrun number processes that have Slurm's variables, too
LAUNCHERS = (
    Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"),
    Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Launcher("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK"),
)
# what is new for every launch, by itself, or together with a count of restarts
NAMES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PMI_JOBID", "TORCHELASTIC_RUN_ID")
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


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
    found = _launcher(environment)
    if found is None:
        known = ", ".join(dict.fromkeys(launcher.number for launcher in LAUNCHERS))
        raise RecipeError(f"--rank-from-env: none of {known} is set; start it with srun, mpirun or torchrun")
    said = f"{found.number}={environment[found.number]}, {found.count}={environment[found.count]}"
    try:
        number, count = int(environment[found.number]), int(environment[found.count])
    except ValueError:
        raise RecipeError(f"--rank-from-env: {said}: not numbers") from None
    if not 0 <= number < count:
        raise RecipeError(f"--rank-from-env: {said}: there is no such process")
    launch = environment.get("GPUEM_LAUNCH") or _launch(environment)
    if not launch and count > 1:
        raise RecipeError(
            f"--rank-from-env: {found.number} is set, but nothing names this launch: set GPUEM_LAUNCH to a word that "
            "is new for every start"
        )
    return Rank(number, count, launch)


def _launcher(environment: Mapping[str, str]) -> Launcher | None:
    for launcher in LAUNCHERS:
        needed = [launcher.number, launcher.count] + ([launcher.own] if launcher.own else [])
        if all(name in environment for name in needed):
            return launcher
    return None


def _launch(environment: Mapping[str, str]) -> str:
    """A word for this launch, the same for all of its processes; empty where nothing tells it from others."""
    # torchrun says "none" where nobody named the launch
    said = [environment[name] for name in NAMES if environment.get(name, "none") != "none"]
    again = [environment[name] for name in RESTARTS if name in environment]
    return "-".join(said + again) if said else ""


def choose_gpu(environment: MutableMapping[str, str], devices: Path = Path("/dev")) -> None:
    """Of several GPUs that all ranks of a machine see, leave this one its own."""
    launcher = _launcher(environment)
    if launcher is None or not environment.get(launcher.place, "").isdigit():
        return
    said = environment.get("CUDA_VISIBLE_DEVICES")
    visible = [name for name in (said or "").split(",") if name]
    if said is None:
        # all that the machine has, as the driver numbers them
        visible = [str(k) for k, _ in enumerate(devices.glob("nvidia[0-9]*"))]
    if len(visible) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(environment[launcher.place]) % len(visible)]


class Pulse:
    """Signs of life of another process, by the clock of this one: those of machines differ."""

    def __init__(self, alive: Path) -> None:
        self._alive, self._last = alive, 0
        self._heard = time.monotonic()
        self.there = self.was_there = False

    def silent(self) -> float:
        """Seconds since it last said that it is alive."""
        try:
            now = self._alive.stat().st_mtime_ns
        except OSError:
            now = 0
        self.there = now > 0
        self.was_there |= self.there
        if now not in (0, self._last):
            self._last, self._heard = now, time.monotonic()
        return time.monotonic() - self._heard


@dataclass
class Collector:
    """Rank 0: it runs its share, and gathers those of the others."""

    rank: Rank
    folder: Path
    name: str = "ranks"
    _pulses: dict[int, Pulse] = field(default_factory=dict)
    _seen: dict[Path, int] = field(default_factory=dict)

    def settle(self, job: Job) -> Job:
        """The job with this machine's own files; every rank plans it alike."""
        return copies.at_home(job)

    def workers(self, job: Job) -> int:
        """Ranks."""
        return self.rank.count

    def run(self, job: Job, shards: Iterable[int], report: Report) -> Generator[Partial]:
        """Yield the results of this rank as they end, and those of the others as they are found."""
        missing = set(shards)
        self._seen.clear()
        claims = self._claims(job)
        # also those of a launch of the same name, such as that of a single rank
        claims.begin()
        # the others may begin
        say_launch(self.folder, self.rank.launch)
        yield from self._collected(job, missing)
        yield from self._computed(job, missing, local.run(job, (), report, lambda: _claimed(claims, missing)))
        self._pulses = {n: Pulse(self.folder / f"alive-{n}") for n in range(1, self.rank.count)}
        while missing:
            # who ended is asked first: what it finished before that is then found
            ended = {number: _mark(self.folder, number, self.rank.launch) for number in self._pulses}
            before = len(missing)
            yield from self._collected(job, missing)
            if not missing or len(missing) < before:
                continue
            lost = self._lost(job, missing, ended, claims, report)
            if lost:
                # a run that ended sets its job's sign to stop
                again = replace(job, stop=threading.Event())
                yield from self._computed(again, missing, local.run(again, lost, report))
            else:
                time.sleep(LOOK)

    def _claims(self, job: Job) -> Claims:
        return Claims(self.folder, self.rank.launch, self.rank.number, self.rank.count, len(job.plan.shards))

    def _computed(self, job: Job, missing: set[int], computing: Generator[Partial]) -> Generator[Partial]:
        """What this rank computes, and meanwhile what the others finish."""
        looked = time.monotonic()
        with closing(computing):
            for partial in computing:
                if partial.shard in missing:
                    missing.discard(partial.shard)
                    yield partial
                if time.monotonic() - looked > LOOK:
                    yield from self._collected(job, missing)
                    looked = time.monotonic()

    def _collected(self, job: Job, missing: set[int]) -> Generator[Partial]:
        """What other ranks finished, also those of an earlier launch."""
        for path in sorted(self.folder.glob("store-*")):
            try:
                size = (path / "done.jsonl").stat().st_size
            except OSError:
                continue
            if size == self._seen.get(path):
                continue
            store = Store(path, job)
            store.look()
            records, whole = store.finished, True
            with closing(store):
                for shard in sorted(missing & set(records)):
                    store.finished = {shard: records[shard]}
                    if store.verify():
                        # damaged, or the file system hasn't brought all of it here yet
                        whole = False
                        continue
                    missing.discard(shard)
                    yield store.read(shard)
            if whole:
                self._seen[path] = size

    def _lost(
        self, job: Job, missing: set[int], ended: dict[int, dict[str, str] | None], claims: Claims, report: Report
    ) -> list[int]:
        """Missing shards of ranks that ended early or give no sign of life: this one runs them.

        Raises
        ------
        GpuemError
            A rank ended for what won't pass.
        """
        owners = claims.owners()
        # nobody else runs what this rank took, or what lost its claim
        lost = sorted(shard for shard in missing if owners.get(shard, self.rank.number) == self.rank.number)
        for number in sorted({owners[shard] for shard in missing.difference(lost)}):
            mine = sorted(shard for shard in missing if owners.get(shard) == number)
            mark = ended.get(number)
            silent = self._pulses[number].silent() if number in self._pulses else 0.0
            if mark is not None:
                why = mark["why"] or "its shards are not in its store"
                if mark["why"] and _error(mark) is not ResumableError:
                    raise _error(mark)(f"rank {number} ended: {why}")
                why = f"ended: {why}"
            elif silent > max(SILENT, job.patience):
                why = f"gave no sign of life for {silent:.0f} s"
            else:
                continue
            report("lost", worker=f"rank {number}", shards=mine, why=why)
            log.warning("rank %d %s; rank 0 runs the %d shards that it had taken", number, why, len(mine))
            lost += mine
        return lost


def _claimed(claims: Claims, missing: set[int]) -> list[int]:
    """The next shards for this rank; none where all are taken."""
    while (batch := claims.take()) is not None:
        if shards := [shard for shard in batch if shard in missing]:
            return shards
    return []


def assist(job: Job, rank: Rank, folder: RunFolder) -> None:
    """Any other rank: run the shards that it comes to, keep them where rank 0 finds them.

    Raises
    ------
    ResumableError
        It ended early.
    """
    job = copies.at_home(job)
    missing = set(range(len(job.plan.shards)))
    own = Store(folder.store, job)
    for path in sorted(folder.path.glob("store*")):
        store = own if path == folder.store else Store(path, job)
        store.look()
        missing -= set(store.finished)
        store.close()
    claims = Claims(folder.path, rank.launch, rank.number, rank.count, len(job.plan.shards))
    own.begin()
    computing = local.run(job, (), folder.report, lambda: _claimed(claims, missing))
    folder.on_beat.append(own.sync_if_due)
    with closing(own), closing(computing):
        for partial in computing:
            own.write(partial)


@contextmanager
def marked(folder: RunFolder, rank: Rank) -> Iterator[None]:
    """However this rank ends: say so, and why, for rank 0.

    Raises
    ------
    ResumableError
        Instead of what may pass.
    """
    mark = folder.path / f"rank-{rank.number}"
    ownership.remove(folder.path, mark.name)
    error: BaseException | None = None
    try:
        yield
    except (OSError, MemoryError) as found:
        where = f"{found.filename}: " if isinstance(found, OSError) and found.filename else ""
        reason = (found.strerror if isinstance(found, OSError) else "") or str(found) or type(found).__name__
        error = ResumableError(f"rank {rank.number}: {where}{reason}; its finished shards are kept")
        raise error from found
    except BaseException as found:
        error = found
        raise
    finally:
        said = {"launch": rank.launch, "why": "", "kind": ""}
        if error is not None:
            said.update(why=str(error) or type(error).__name__, kind=type(error).__name__)
        # the disk may be full; then rank 0 waits for a sign of life
        with suppress(OutputError):
            write_file(mark, json.dumps(said).encode())


def wait_for_launch(folder: Path, rank: Rank, patience: float, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Wait until rank 0 has planned this launch; False where it has found that all is done.

    Raises
    ------
    ResumableError
        It gives no sign of life.
    """
    pulse = Pulse(folder / "alive")
    while True:
        # asked first: rank 0 says that all is done before it goes
        silent = pulse.silent()
        said = read_launch(folder)
        if said is not None and said[0] == rank.launch:
            return not said[1]
        if silent > (ENDED if pulse.was_there and not pulse.there else max(patience, SILENT)):
            why = "ended before it began" if pulse.was_there and not pulse.there else "hasn't begun"
            raise ResumableError(f"{folder}: rank 0 {why}; no sign of life for {silent:.0f} s")
        sleep(0.2)


def _mark(folder: Path, number: int, launch: str) -> dict[str, str] | None:
    """What a rank said at its end, if it ended."""
    try:
        found = json.loads(read_regular(folder / f"rank-{number}"))
        said = {name: str(found[name]) for name in ("launch", "why", "kind")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return said if said["launch"] == launch else None


def _error(mark: dict[str, str]) -> type[GpuemError]:
    """The kind of error that ended a rank: what is wrong for good must not look as if it passed."""
    kind = vars(errors).get(mark["kind"])
    if not (isinstance(kind, type) and issubclass(kind, GpuemError)):
        return ResumableError
    return errors.InputError if kind is errors.TruncatedError else kind
