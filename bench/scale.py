"""How runs scale: threads, Dask workers, cost of a shard, of keeping it, and of a worker that is killed, in one run.

    python bench/scale.py --out bench/records/scale.json

All files lie in the page cache. Results are compared, bit for bit, with those of one thread before anything is timed;
what is compared with each other runs in turns, so that all see the same machine. `scale_model.py` fits a model to the
record and predicts larger machines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu
import dask
import numpy as np

import gpuem
from gpuem import checkpoint, engine, executors, job, keeping, recipe, synthetic, tiles
from gpuem.backends import cuda_device
from gpuem.executors import local
from gpuem.executors.dispatch import no_report
from gpuem.run_folder import RunFolder

SECTIONS = ("scaling", "shards", "kept", "killed")
# cuts of one frame each: what is timed then is handing them out
TINY = {"RUNS_TILE_NBYTES": 1, "TILE_NBYTES": 1, "SHARD_NBYTES": 1, "LEAST_FRAMES": 1}
# client and kept store are also timed with results that are large for their shard: an image of 256x256
TINY_FRAME, LARGE_FRAME = (16, 16), (256, 256)
# shards after which the client's memory is looked at: buffers of the network are there by then
SETTLED = 2000
WORKS = ("masks", "strain", "light")


@dataclass
class Hands:
    """Somebody who runs shards, and how they were asked for."""

    name: str
    count: int
    options: recipe.Run
    crew: executors.Crew
    startup: float = 0.0


@dataclass
class Timed:
    """One run."""

    seconds: float
    maps: dict[str, np.ndarray]
    job: engine.Job


# ---- what runs


def analyses(work):
    """What is computed: far more than the memory gives (masks), fits (strain), or hardly anything (light)."""
    if work == "strain":
        return [gpuem.Strain()]
    if work == "light":
        return [gpuem.Sum()]
    found = cpu.analyses()
    return [*found["three"], *found["masks16"]]


def write_parts(folder, parts, frames, work):
    """Files of `frames` frames each; the first n of them are the data of n workers in weak scaling."""
    paths = [folder / f"{work}-{k}.raw" for k in range(parts)]
    shape = cpu.FRAME
    if work == "strain":
        few = min(frames, 512)
        made, _ = synthetic.generate(synthetic.Pattern(), (few // 32, 32), seed=1)
        shape, block = made.shape[2:], made.tobytes()
    for path in paths:
        if work == "strain":
            path.write_bytes(block * (frames // few))
        else:
            cpu.write_raw(path, frames)
    # so that nothing is written to the disk while runs are timed
    os.sync()
    return paths, shape


def opened(paths, frames, shape):
    return gpuem.open([str(path) for path in paths], scan=(frames // 32, 32), frame=shape, dtype="uint16")


@contextmanager
def hands(kind, count, device):
    """Threads of this process, or Dask workers with one thread (or GPU) each."""
    threads = {"threads": count} if device == "cpu" else {}
    workers = {"workers": count} if kind == "workers" else {}
    options = recipe.run_section(device=device, **threads, **workers)
    started = time.perf_counter()
    with executors.crew(options) as crew:
        yield Hands(kind, count, options, crew, time.perf_counter() - started)


def look(ds, chosen):
    """Analyses after their look at a sample: that is done once per run, by one thread, and isn't what is timed."""
    return job.look(ds, chosen, np.ones(ds.positions, np.bool_))


def run(ds, resolved, who, folder=None, progress=None):
    """One run, from the plan to the maps; finished shards are kept if there is a folder."""
    started = time.perf_counter()
    made = who.crew.settle(job.prepare(ds, resolved, who.options))
    if folder is None:
        with closing(who.crew.run(made, range(len(made.plan.shards)), no_report)) as partials:
            totals = engine.combine(made, keeping.told(partials, progress))
    else:
        with RunFolder(folder) as kept:
            kept.clear()
            kept.describe(ds.source.frame_nbytes, made, {})
            totals = keeping.run(made, who.crew, kept, progress)
    maps = job.finish(job.view_of(ds), resolved, made, totals)
    seconds = time.perf_counter() - started
    return Timed(seconds, {name: np.asarray(item.data) for name, item in maps.items()}, made)


def same(found, wanted):
    """Raise unless all maps are the same, bit for bit."""
    if found.keys() != wanted.keys():
        raise AssertionError(f"wrong result: {sorted(found.keys() ^ wanted.keys())}")
    for name, array in wanted.items():
        if found[name].dtype != array.dtype or found[name].tobytes() != array.tobytes():
            raise AssertionError(f"wrong result: {name}")


def row(what, who, made, times, **more):
    """A line of the record: what ran where, every single time, the median."""
    return {
        "what": what, "by": who.name, "count": who.count, "shards": len(made.plan.shards),
        "nbytes": made.source.nbytes, "partial_nbytes": checkpoint.nbytes(made) // len(made.plan.shards),
        "kept": False, **more, "times": times, "seconds": statistics.median(times),
    }  # fmt: skip


def show(found):
    told = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items() if not isinstance(v, list | dict)}
    print(", ".join(f"{k} {v}" for k, v in told.items()), flush=True)


def add(record, found):
    record["runs"].append(found)
    show(found)
    return found


# ---- sections


def scaling(record, folder, given, counts):
    """Strong scaling: the same data for 1 to n. Weak: n times the data for n."""
    most = counts[-1]
    for work in given.work or WORKS:
        frames = given.frames if work != "strain" else given.patterns
        each = max(64, frames // most // 32 * 32)
        paths, shape = write_parts(folder, most, each, work)
        whole = opened(paths, each * most, shape)
        resolved = look(whole, analyses(work))
        sizes = [(whole, n, "strong") for n in counts]
        sizes += [(opened(paths[:n], each * n, shape), n, "weak") for n in counts[:-1]]
        with hands("threads", 1, "cpu") as one:
            wanted = {id(ds): run(ds, resolved, one).maps for ds, _, _ in sizes} if given.device == "cpu" else {}
        with ExitStack() as stack:
            kinds = ("threads", "workers") if given.device == "cpu" else ("workers",)
            crews = {key: stack.enter_context(hands(*key, given.device)) for key in itertools.product(kinds, counts)}
            cases = [(ds, crews[kind, n], how) for kind in kinds for ds, n, how in sizes]
            _time_in_turns(record, given, work, resolved, cases, wanted)
            for who in crews.values():
                record["startup"].append({"by": who.name, "count": who.count, "seconds": who.startup})
        _note_results(record, work, whole, resolved, given)
        for path in paths:
            path.unlink()


def _time_in_turns(record, given, work, resolved, cases, wanted):
    times = [[] for _ in cases]
    made = [None] * len(cases)
    for ds, who, _ in cases:
        first = run(ds, resolved, who)
        same(first.maps, wanted.setdefault(id(ds), first.maps))
    for _ in range(given.repeats):
        for k, (ds, who, _) in enumerate(cases):
            done = run(ds, resolved, who)
            times[k].append(done.seconds)
            made[k] = done.job
    for (_, who, how), spent, one in zip(cases, times, made, strict=True):
        add(record, row(work, who, one, spent, scaling=how))


def _note_results(record, work, ds, resolved, given):
    """How large results are, for the model."""
    made = job.prepare(ds, resolved, recipe.run_section(device=given.device))
    total, maximum = made.prepared.weights.total, made.prepared.weights.maximum
    pixels = ds.frame_shape[0] * ds.frame_shape[1]
    image = pixels * (total * np.dtype(made.prepared.wide).itemsize + maximum * np.dtype(made.prepared.dtype).itemsize)
    record["results"][work] = {
        "image_nbytes": int(image),
        "row_nbytes": (checkpoint.nbytes(made) - len(made.plan.shards) * (image + 512)) // ds.positions,
        "position_nbytes": made.plan.nbytes["sums and maps"] // ds.positions,
        "frame_nbytes": ds.source.frame_nbytes,
    }


@contextmanager
def tiny_shards(folder):
    """One frame a shard, here and in workers that are started within."""
    preload = folder / "tiny_shards.py"
    preload.write_text("from gpuem import tiles\n" + "".join(f"tiles.{k} = {v}\n" for k, v in TINY.items()))
    before = {name: getattr(tiles, name) for name in TINY}
    try:
        for name, value in TINY.items():
            setattr(tiles, name, value)
        with dask.config.set({"distributed.worker.preload": [str(preload)]}):
            yield
    finally:
        for name, value in before.items():
            setattr(tiles, name, value)


def shards(record, folder, given, counts):
    """Seconds per shard of the scheduler and the client, with and without the kept store; memory of the client."""
    with tiny_shards(folder), ExitStack() as stack:
        one = stack.enter_context(hands("threads", 1, "cpu"))
        dask_workers = stack.enter_context(hands("workers", counts[-1], "cpu"))
        for frame, number in ((TINY_FRAME, given.shards), (LARGE_FRAME, given.shards // 5)):
            path = folder / "tiny.raw"
            path.write_bytes(b"".join(cpu.counts(1, k)[0, : frame[0], : frame[1]].tobytes() for k in range(number)))
            ds = gpuem.open(path, scan=(number // 5, 5), frame=frame, dtype="uint16")
            resolved = look(ds, cpu.analyses()["three"])
            wanted = run(ds, resolved, one).maps
            cases = [(one, False), (dask_workers, False), (dask_workers, True)]
            times: list[list[float]] = [[] for _ in cases]
            memory: list[dict[str, int]] = [{} for _ in cases]
            for k, (who, kept) in enumerate(cases * given.repeats):
                watch = Watch(number)
                done = run(ds, resolved, who, folder / "tiny.run" if kept else None, watch)
                assert len(done.job.plan.shards) == number, f"{len(done.job.plan.shards)} shards, {number} wanted"
                same(done.maps, wanted)
                times[k % len(cases)].append(done.seconds)
                memory[k % len(cases)] = watch.seen
            for (who, kept), spent, seen in zip(cases, times, memory, strict=True):
                # `_job` of the last run: all have the same cuts
                found = row("tiny", who, done.job, spent, kept=kept, per_shard_ms=1e3 * statistics.median(spent) / number)
                add(record, {**found, "frame": list(frame), "client_memory": seen})
            path.unlink()


class Watch:
    """Told of every finished shard: the memory of this process, which holds scheduler and client, as they go on."""

    def __init__(self, number: int) -> None:
        self._at = {min(SETTLED, number), number}
        self._done = 0
        self.seen: dict[str, int] = {}

    def __call__(self, frames: int) -> None:
        self._done += 1
        if self._done in self._at:
            self.seen[str(self._done)] = resident_nbytes()


def resident_nbytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept(record, folder, given, counts):
    """What keeping finished shards costs a run of ordinary shards: with and without, in turns."""
    with _one_of_each(folder, given, counts) as (ds, resolved, wanted, who):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(given.repeats):
            for k, path in enumerate((None, folder / "kept.run")):
                done = run(ds, resolved, who, path)
                same(done.maps, wanted)
                times[k].append(done.seconds)
        for k, spent in enumerate(times):
            add(record, row("masks", who, done.job, spent, kept=bool(k), section="kept"))


def killed(record, folder, given, counts):
    """Kill -9 one of the workers at a third of a run: seconds more than undisturbed, shards run again."""
    if counts[-1] < 2:
        record["skipped"]["killed"] = "needs two workers"
        return
    with _one_of_each(folder, given, counts) as (ds, resolved, wanted, who):
        times: tuple[list[float], list[float]] = ([], [])
        again = []
        for _ in range(given.repeats):
            times[0].append(run(ds, resolved, who, folder / "calm.run").seconds)
            kill = Kill(who.crew, len(engine_shards(ds, resolved, who)))
            done = run(ds, resolved, who, folder / "killed.run", kill)
            times[1].append(done.seconds)
            same(done.maps, wanted)
            again.append(shards_again(folder / "killed.run"))
            who.crew.client.wait_for_workers(who.count, timeout=120)
            # the new worker loads its kernels
            run(ds, resolved, who)
        for k, spent in enumerate(times):
            more = {"again": again} if k else {}
            add(record, row("masks", who, done.job, spent, kept=True, section="killed" if k else "calm", **more))


def engine_shards(ds, resolved, who):
    return job.prepare(ds, resolved, who.options).plan.shards


def shards_again(folder):
    """How many shards were handed out again, from the log of a run."""
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return sum(len(line["shards"]) for line in lines if line["event"] == "lost")


class Kill:
    """Told of every finished shard: at a third of them it ends a worker that was started here."""

    def __init__(self, crew: Any, number: int) -> None:
        self._left = max(1, number // 3)
        self._pid = next(iter(crew.client.run(os.getpid).values()))

    def __call__(self, frames: int) -> None:
        self._left -= 1
        if self._left == 0:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)


@contextmanager
def _one_of_each(folder, given, counts):
    """Data, analyses, the right result, and all workers, warm."""
    paths, shape = write_parts(folder, 1, given.frames // 32 * 32, "masks")
    ds = opened(paths, given.frames // 32 * 32, shape)
    resolved = look(ds, analyses("masks"))
    with hands("workers", counts[-1], given.device) as who:
        wanted = run(ds, resolved, who).maps
        if given.device == "cpu":
            with hands("threads", 1, "cpu") as one:
                same(wanted, run(ds, resolved, one).maps)
        yield ds, resolved, wanted, who
    paths[0].unlink()


# ---- the record


def seconds_of(record, **wanted):
    """Median of the one run that is like that; None where it wasn't measured."""
    found = [one for one in record["runs"] if all(one.get(key) == value for key, value in wanted.items())]
    return found[0]["seconds"] if len(found) == 1 else None


def speedup(record, work, by, count):
    one = seconds_of(record, what=work, by=by, count=1, scaling="strong")
    many = seconds_of(record, what=work, by=by, count=count, scaling="strong")
    return one / many if one and many else None


def targets(record):
    """What was promised, each with what was found; null where it wasn't measured."""
    rows = [(f"{work}: 2 workers, times 1 worker", speedup(record, work, "workers", 2), 1.8, None) for work in WORKS[:2]]
    dask_rows = [one for one in record["runs"] if one["what"] == "tiny" and one["by"] == "workers"]
    for one in dask_rows:
        how = f"{one['frame'][0]}x{one['frame'][1]}, {'kept' if one['kept'] else 'not kept'}"
        rows.append((f"ms per shard, {how}", one["per_shard_ms"], None, 2.0))
        seen = one["client_memory"]
        if len(seen) == 2:
            first, last = (seen[key] for key in sorted(seen, key=int))
            rows.append((f"memory of the client, {how}: last shard / shard {SETTLED}", last / first, None, 1.05))
    found = []
    for what, value, low, high in rows:
        met = None
        if value is not None and not record["arguments"]["quick"]:
            met = bool((low is None or value >= low) and (high is None or value <= high))
        found.append({"what": what, "from": low, "to": high, "found": value, "met": met})
    return found


def measure(given):
    """All sections that were asked for."""
    number = cuda_device_count() if given.device == "cuda" else local.cpus()
    counts = sorted({*(2**k for k in range(number.bit_length())), number})
    record = {
        "machine": {**cpu.machine(), "load_before": os.getloadavg()[0], "device": given.device, "counts": counts},
        "arguments": {key: value for key, value in vars(given).items() if key not in ("out", "folder")},
        "runs": [], "startup": [], "results": {}, "skipped": {},
    }  # fmt: skip
    named = {"scaling": scaling, "shards": shards, "kept": kept, "killed": killed}
    for name in given.only or SECTIONS:
        with tempfile.TemporaryDirectory(dir=given.folder) as made:
            named[name](record, Path(made), given, counts)
    record["machine"]["load_after"] = os.getloadavg()[0]
    record["targets"] = targets(record)
    return record


def cuda_device_count():
    why = cuda_device.why_not()
    if why:
        raise SystemExit(f"--device cuda: {why}")
    import cupy

    return cupy.cuda.runtime.getDeviceCount()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=32768, help="of 256x256 uint16, 128 KiB each")
    parser.add_argument("--patterns", type=int, default=8192, help="of the data for strain")
    parser.add_argument("--shards", type=int, default=10_000, help="tiny ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: one worker per GPU")
    parser.add_argument("--work", choices=WORKS, action="append", help="some of scaling only")
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--folder", help="where data are written; default the temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny data: tries the benchmark out and measures nothing")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    if given.quick:
        given.frames, given.patterns, given.shards, given.repeats = 1024, 256, 100, 1
    record = measure(given)
    for one in record["targets"]:
        print(f"{one['what']:60} from {one['from']} to {one['to']}: {one['found']}, met: {one['met']}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
