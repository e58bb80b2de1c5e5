"""What `scale.py` times: data in files, who runs them, and one run from the plan to the maps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import cpu
import dask
import numpy as np

import gpuem
from gpuem import checkpoint, engine, executors, job, keeping, recipe, synthetic, tiles
from gpuem.executors.dispatch import no_report
from gpuem.results import Results
from gpuem.run_folder import RunFolder

# cuts of one frame each: what is timed then is handing them out
TINY = {"RUNS_TILE_NBYTES": 1, "TILE_NBYTES": 1, "SHARD_NBYTES": 1, "LEAST_FRAMES": 1}
# scan positions along x; frames of a file are multiples of it
ROW = 32
# patterns that differ; a file repeats them
PATTERNS = 512


@dataclass
class Hands:
    """Somebody who runs shards, how they were asked for, and seconds until they were there."""

    name: str
    count: int
    options: recipe.Run
    crew: executors.Crew
    startup: float


@dataclass
class Timed:
    """One run: by the clock, and processor time of this process, the client."""

    seconds: float
    own: float
    maps: dict[str, np.ndarray]
    job: engine.Job


def analyses(work):
    """What is computed: fits (strain), hardly anything (light), or far more than the memory gives (masks)."""
    if work == "strain":
        return [gpuem.Strain()]
    if work == "light":
        return [gpuem.Sum()]
    if work == "tiny":
        return [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=3, outer=6), gpuem.CenterOfMass()]
    found = cpu.analyses()
    return [*found["three"], *found["masks16"]]


class Data:
    """Files of equal size, written when they are first asked for. Weak scaling takes the first n for n workers.

    Parameters
    ----------
    folder : path
        Where they lie.
    parts : int
        Number of files.
    frames, patterns : int
        Of all files together: frames of counts, patterns for strain.
    """

    def __init__(self, folder: Path, parts: int, frames: int, patterns: int) -> None:
        self._folder, self.parts = folder, parts
        self._each = {"counts": frames // parts // ROW * ROW, "patterns": patterns // parts // ROW * ROW}
        self._shape: dict[str, tuple[int, ...]] = {}

    def opened(self, work: str, parts: int) -> gpuem.Dataset:
        """The data set of the first files."""
        kind = "patterns" if work == "strain" else "counts"
        paths = [self._folder / f"{kind}-{k}.raw" for k in range(self.parts)]
        if kind not in self._shape:
            self._write(kind, paths)
        frames = self._each[kind] * parts
        names = [str(path) for path in paths[:parts]]
        return gpuem.open(names, scan=(frames // ROW, ROW), frame=self._shape[kind], dtype="uint16")

    def _write(self, kind: str, paths: list[Path]) -> None:
        frames = self._each[kind]
        if kind == "patterns":
            made, _ = synthetic.generate(synthetic.Pattern(), (min(frames, PATTERNS) // ROW, ROW), seed=1)
            block = made.reshape(-1, *made.shape[2:])
        for path in paths:
            if kind == "counts":
                cpu.write_raw(path, frames)
                os.truncate(path, frames * 2 * cpu.FRAME[0] * cpu.FRAME[1])
            else:
                path.write_bytes(b"".join(block[k % len(block)].tobytes() for k in range(frames)))
        self._shape[kind] = cpu.FRAME if kind == "counts" else block.shape[1:]
        # so that nothing is written to the disk while runs are timed
        os.sync()


def tiny_data(path, number, frame):
    """A data set of frames that are a shard each."""
    block = np.random.default_rng(7).poisson(0.7, (100, *frame)).astype(np.uint16)
    path.write_bytes(b"".join(block[k % 100].tobytes() for k in range(number)))
    return gpuem.open(path, scan=(number // 5, 5), frame=frame, dtype="uint16")


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
    """Analyses after their look at a sample: one thread does that, once per run, and it isn't what is timed."""
    return job.look(ds, chosen, np.ones(ds.positions, np.bool_))


def run(ds, resolved, who, folder=None, progress: Callable[[int], None] | None = None):
    """One run, from the plan to the maps; finished shards are kept if there is a folder."""
    started, own = time.perf_counter(), time.process_time()
    made = who.crew.settle(job.prepare(ds, resolved, who.options))
    if folder is None:
        with closing(who.crew.run(made, range(len(made.plan.shards)), no_report)) as partials:
            totals = engine.combine(made, keeping.told(partials, progress))
    else:
        with RunFolder(folder) as kept:
            kept.clear()
            kept.describe(ds.source.frame_nbytes, made, {}, None)
            totals = keeping.run(made, who.crew, kept, progress)
    maps, _ = job.finish(job.view_of(ds), resolved, made, totals)
    seconds, own = time.perf_counter() - started, time.process_time() - own
    return Timed(seconds, own, {name: np.asarray(item.data) for name, item in maps.items()}, made)


def same(found, wanted):
    """Raise unless all maps are the same, bit for bit."""
    if found.keys() != wanted.keys():
        raise AssertionError(f"wrong result: {sorted(found.keys() ^ wanted.keys())}")
    for name, array in wanted.items():
        if found[name].dtype != array.dtype or found[name].tobytes() != array.tobytes():
            raise AssertionError(f"wrong result: {name}")


@contextmanager
def tiny_shards(folder: Path) -> Iterator[None]:
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


def map_seconds(ds, resolved, folder):
    """Seconds from the sums of all shards to the result on disk; the sums are random numbers."""
    made = job.prepare(ds, resolved, recipe.run_section(device="cpu"))
    totals = engine.combine(made, ())
    totals.valid[:] = True
    for array in (totals.sums.masks, totals.sums.moments, totals.sums.total):
        array[:] = np.random.default_rng(3).integers(1, 1000, array.shape)
    started = time.perf_counter()
    Results(job.finish(job.view_of(ds), resolved, made, totals)[0], {}).save(folder / "maps.zarr", overwrite=True)
    return made, time.perf_counter() - started


def empty_data(path, side, frame):
    """A data set of side x side frames of zeros that takes no room."""
    path.touch()
    os.truncate(path, side * side * 2 * frame[0] * frame[1])
    return gpuem.open(path, scan=(side, side), frame=frame, dtype="uint16")


def result_sizes(ds, resolved, device):
    """How large results are, for the model: of a shard, of a scan position on disk and in the client's memory."""
    made = job.prepare(ds, resolved, recipe.run_section(device=device))
    weights, pixels = made.prepared.weights, ds.frame_shape[0] * ds.frame_shape[1]
    wide, own = np.dtype(made.prepared.wide).itemsize, np.dtype(made.prepared.dtype).itemsize
    image = pixels * (bool(weights.total) * wide + bool(weights.maximum) * own)
    lines = len(made.plan.shards) * (image + 512)
    return {
        "image_nbytes": image,
        "row_nbytes": (checkpoint.nbytes(made) - lines) // ds.positions,
        "position_nbytes": made.plan.nbytes["sums and maps"] // ds.positions,
        "frame_nbytes": ds.source.frame_nbytes,
    }


def resident_nbytes():
    """Bytes of this process that are in memory: client, scheduler and, without workers, all the rest."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
