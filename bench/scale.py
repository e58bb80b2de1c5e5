"""How runs scale: threads, Dask workers, cost of a shard, of keeping it, and of a worker that is killed, in one run.

    python bench/scale.py --out bench/records/scale.json

All files lie in the page cache. All results are compared, bit for bit, with those of one thread: a wrong one is an
error, not a number. What is compared with each other runs in turns, so that all see the same machine. `scale_model.py`
fits a model to the record and predicts larger machines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import cpu
from scale_runs import (
    Data,
    analyses,
    empty_data,
    hands,
    look,
    map_seconds,
    resident_nbytes,
    result_sizes,
    run,
    same,
    tiny_data,
    tiny_shards,
)

from gpuem import checkpoint
from gpuem.backends import cuda_device
from gpuem.executors import local

SECTIONS = ("scaling", "shards", "maps", "kept", "killed")
WORKS = ("masks", "strain", "light")
# frames of tiny shards: results that are small, and results with an image of 512 kB
TINY_FRAME, LARGE_FRAME = (16, 16), (256, 256)
# shards after which the client's memory is looked at: buffers of the network are there by then
SETTLED = 2000


class Spent(NamedTuple):
    """Seconds of a run, and of the processor in this process."""

    seconds: float
    own: float


def row(what, name, count, made, spent, **more):
    """A line of the record: what ran where, every single time, medians; `own` is processor time of this process."""
    times, own = ([getattr(one, name) for one in spent] for name in ("seconds", "own"))
    return {
        "what": what, "by": name, "count": count, "shards": len(made.plan.shards),
        "nbytes": made.source.nbytes, "partial_nbytes": checkpoint.nbytes(made) // len(made.plan.shards),
        "kept": False, **more, "times": times, "seconds": statistics.median(times),
        "own": statistics.median(own),
    }  # fmt: skip


def add(record, found):
    record["runs"].append(found)
    told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items() if not isinstance(v, list | dict)}
    print(", ".join(f"{k} {v}" for k, v in told.items()), flush=True)


# ---- sections


def scaling(record, data, folder, given, counts):
    """Strong scaling: the same data for 1 to n. Weak: n times the data for n."""
    kinds = ("threads", "workers") if given.device == "cpu" else ("workers",)
    works = given.work or WORKS
    resolved = {work: look(data.opened(work, data.parts), analyses(work)) for work in works}
    spent: dict[tuple[Any, ...], list[Spent]] = {}
    jobs, wanted = {}, {}
    for _ in range(given.repeats):
        for kind, count in itertools.product(kinds, counts):
            # workers that wait take processor time too: there are none but those that are timed
            with hands(kind, count, given.device) as who:
                for work in works:
                    for how, done in one_turn(data, work, resolved[work], who, wanted):
                        key = work, who.name, who.count, how
                        spent.setdefault(key, []).append(Spent(done.seconds, done.own))
                        jobs[key] = done.job
            record["startup"].append({"by": who.name, "count": who.count, "seconds": who.startup})
    for key in sorted(spent, key=lambda key: (works.index(key[0]), *key[1:])):
        work, name, count, how = key
        add(record, row(work, name, count, jobs[key], spent[key], scaling=how))
    for work in works:
        record["results"][work] = result_sizes(data.opened(work, data.parts), resolved[work], given.device)


def one_turn(data, work, resolved, who, wanted):
    """Yield a run on all data, and one on the share of so many workers, both checked."""
    # loads kernels
    run(data.opened(work, 1), resolved, who)
    for parts, how in ((data.parts, "strong"), (who.count, "weak")):
        if how == "strong" or parts < data.parts:
            done = run(data.opened(work, parts), resolved, who)
            # the first one ran on one thread
            same(done.maps, wanted.setdefault((work, parts), done.maps))
            yield how, done


def shards(record, data, folder, given, counts):
    """Seconds per shard of the scheduler and the client, with and without the kept store; memory of the client."""
    with tiny_shards(folder), hands("threads", 1, "cpu") as one, hands("workers", counts[-1], "cpu") as workers:
        for frame, number in ((TINY_FRAME, given.shards), (LARGE_FRAME, given.shards // 5)):
            ds = tiny_data(folder / f"{frame[0]}.raw", number, frame)
            resolved = look(ds, analyses("tiny"))
            wanted = run(ds, resolved, one).maps
            # tasks are made larger when it is known how quick shards are
            same(run(ds, resolved, workers).maps, wanted)
            cases = [(one, False), (workers, False), (workers, True)]
            times: list[list[Spent]] = [[] for _ in cases]
            memory: list[dict[str, int]] = [{} for _ in cases]
            for k in list(range(len(cases))) * given.repeats:
                who, kept = cases[k]
                watch = Watch(number)
                done = run(ds, resolved, who, folder / "tiny.run" if kept else None, watch)
                if len(done.job.plan.shards) != number:
                    raise AssertionError(f"{len(done.job.plan.shards)} shards, {number} wanted")
                same(done.maps, wanted)
                times[k].append(Spent(done.seconds, done.own))
                memory[k] = watch.seen
            if frame == LARGE_FRAME:
                record["results"]["tiny"] = result_sizes(ds, resolved, "cpu")
            for (who, kept), spent, seen in zip(cases, times, memory, strict=True):
                # all runs had the same cuts
                found = row(
                    "tiny", who.name, who.count, done.job, spent, kept=kept, frame=list(frame), client_memory=seen
                )
                add(record, {**found, "ms_per_shard": 1e3 * found["seconds"] / number})


class Watch:
    """Called for every finished shard: notes the memory of this process, which holds scheduler and client."""

    def __init__(self, number: int) -> None:
        self._at = {min(SETTLED, number), number}
        self._done = 0
        self.seen: dict[str, int] = {}

    def __call__(self, frames: int) -> None:
        """A shard is finished."""
        self._done += 1
        if self._done in self._at:
            self.seen[str(self._done)] = resident_nbytes()


def maps(record, data, folder, given, counts):
    """What the client does once per run, by itself: from sums to maps on the disk."""
    ds = empty_data(folder / "empty.raw", given.side, TINY_FRAME)
    resolved = look(ds, analyses("tiny"))
    found = [map_seconds(ds, resolved, folder) for _ in range(given.repeats)]
    spent = [Spent(seconds, seconds) for _, seconds in found]
    add(record, row("maps", "threads", 1, found[0][0], spent, positions=ds.positions))


def kept(record, data, folder, given, counts):
    """What keeping finished shards costs a run of ordinary shards: with and without, in turns."""
    with _warm(data, given, counts) as (ds, resolved, wanted, who):
        times: tuple[list[Spent], list[Spent]] = ([], [])
        for _ in range(given.repeats):
            for k, path in enumerate((None, folder / "kept.run")):
                done = run(ds, resolved, who, path)
                same(done.maps, wanted)
                times[k].append(Spent(done.seconds, done.own))
        for k, spent in enumerate(times):
            add(record, row("masks", who.name, who.count, done.job, spent, kept=bool(k), section="kept"))


def killed(record, data, folder, given, counts):
    """Kill -9 one of the workers at a third of a run: seconds more than undisturbed, shards run again."""
    if counts[-1] < 2:
        record["skipped"]["killed"] = "needs two workers"
        return
    with _warm(data, given, counts) as (ds, resolved, wanted, who):
        times: tuple[list[Spent], list[Spent]] = ([], [])
        again = []
        for _ in range(given.repeats):
            calm = run(ds, resolved, who, folder / "calm.run")
            here = [line["workers"] for line in events(folder / "calm.run") if line["event"] == "start"]
            if here != [who.count]:
                raise AssertionError(f"{here} workers at the start, {who.count} wanted")
            kill = Kill(folder / "killed.run", len(calm.job.plan.shards))
            done = run(ds, resolved, who, folder / "killed.run", kill)
            same(done.maps, wanted)
            times[0].append(Spent(calm.seconds, calm.own))
            times[1].append(Spent(done.seconds, done.own))
            again.append(shards_again(folder / "killed.run"))
            # a run begins when a worker has taken its place, which then loads its kernels
            run(ds, resolved, who)
        add(record, row("masks", who.name, who.count, done.job, times[0], kept=True, section="calm"))
        add(record, row("masks", who.name, who.count, done.job, times[1], kept=True, section="killed", again=again))


def shards_again(folder):
    """How many shards were handed out again, from the log of a run."""
    return sum(len(line["shards"]) for line in events(folder) if line["event"] == "lost")


def events(folder):
    """The log of a run."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


class Kill:
    """Called for every finished shard: at a third of them it kills the worker that ran the last one, started here."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._left = folder, max(1, number // 3)

    def __call__(self, frames: int) -> None:
        """A shard is finished."""
        self._left -= 1
        if self._left == 0:
            # the name of a worker is host:process:thread
            (*_, worker) = [line["worker"] for line in events(self._folder) if line["event"] == "shard"]
            with suppress(ProcessLookupError):
                os.kill(int(worker.split(":")[1]), signal.SIGKILL)


@contextmanager
def _warm(data, given, counts):
    """Data, analyses, the right result, and all workers."""
    ds = data.opened("masks", data.parts)
    resolved = look(ds, analyses("masks"))
    with hands("workers", counts[-1], given.device) as who:
        wanted = run(ds, resolved, who).maps
        if given.device == "cpu":
            with hands("threads", 1, "cpu") as one:
                same(wanted, run(ds, resolved, one).maps)
        yield ds, resolved, wanted, who


# ---- the record


def median_of(record, **wanted):
    """Median of the one run that is like that; None where it wasn't measured."""
    found = [one for one in record["runs"] if all(one.get(key) == value for key, value in wanted.items())]
    return found[0]["seconds"] if len(found) == 1 else None


def ratio(above, below):
    return above / below if above and below else None


def targets(record):
    """What was promised, each with what was found; null where it wasn't measured."""
    rows = []
    for work in WORKS[:2]:
        one, two = (median_of(record, what=work, by="workers", count=n, scaling="strong") for n in (1, 2))
        rows.append((f"{work}: 2 workers, times 1 worker", ratio(one, two), 1.8, None))
    for one in record["runs"]:
        if (one["what"], one["by"]) == ("tiny", "workers"):
            how = f"{one['frame'][0]}x{one['frame'][1]}, {'kept' if one['kept'] else 'not kept'}"
            rows.append((f"ms per shard, {how}", one["ms_per_shard"], None, 2.0))
            if len(one["client_memory"]) == 2:
                first, last = one["client_memory"].values()
                rows.append(
                    (f"memory of the client, {how}: at the end, times shard {SETTLED}", last / first, None, 1.05)
                )
    for what, calm, other in (("keeping shards", {"section": "kept", "kept": False}, {"section": "kept", "kept": True}),
                              ("a killed worker", {"section": "calm"}, {"section": "killed"})):  # fmt: skip
        rows.append(
            (f"{what}: times without", ratio(median_of(record, **other), median_of(record, **calm)), None, None)
        )
    found = []
    for what, value, low, high in rows:
        met = None
        if value is not None and (low or high) and not record["arguments"]["quick"]:
            met = bool((low is None or value >= low) and (high is None or value <= high))
        found.append({"what": what, "from": low, "to": high, "found": value, "met": met})
    return found


def measure(given):
    """All sections that were asked for."""
    number = gpus() if given.device == "cuda" else local.cpus()
    counts = sorted({*(2**k for k in range(number.bit_length())), number})
    record = {
        "machine": {**cpu.machine(), "load_before": os.getloadavg()[0], "device": given.device, "counts": counts},
        "arguments": {key: value for key, value in vars(given).items() if key not in ("out", "folder")},
        "runs": [], "startup": [], "results": {}, "skipped": {},
    }  # fmt: skip
    named = {"scaling": scaling, "shards": shards, "maps": maps, "kept": kept, "killed": killed}
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        data = Data(Path(made), counts[-1], given.frames, given.patterns)
        for name in given.only or SECTIONS:
            named[name](record, data, Path(made), given, counts)
    record["machine"]["load_after"] = os.getloadavg()[0]
    record["targets"] = targets(record)
    return record


def gpus():
    """How many GPUs there are."""
    why = cuda_device.why_not()
    if why:
        raise SystemExit(f"--device cuda: {why}")
    import cupy

    return cupy.cuda.runtime.getDeviceCount()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=65536, help="of 256x256 uint16, 128 KiB each")
    parser.add_argument("--patterns", type=int, default=16384, help="of the data for strain")
    parser.add_argument("--shards", type=int, default=10_000, help="tiny ones")
    parser.add_argument("--side", type=int, default=1000, help="of the square of scan positions whose maps are made")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: one worker per GPU")
    parser.add_argument("--work", choices=WORKS, action="append", help="some of scaling only")
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--folder", help="where data are written; default the temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny data: tries the benchmark out and measures nothing")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.quick:
        given.frames, given.patterns, given.shards, given.side, given.repeats = 1024, 256, 100, 50, 1
    record = measure(given)
    for one in record["targets"]:
        print(f"{one['what']:70} from {one['from']} to {one['to']}: {one['found']}, met: {one['met']}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
