"""Small data in many shards, runs of it that can be stopped anywhere, and `gpuem run` in a process that can be killed.

As a program it is gpuem's command line with shards of few frames and storage that is slow or fails, as told by

    KILLING_SHARD   bytes of a shard
    KILLING_SLOW    seconds that every read takes
    KILLING_BEGUN   a file to which the number of every shard is added that is begun
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import h5py
import numpy as np
import reference

import gpuem
from gpuem import job, recipe, tiles

FRAME = (6, 7)


def shrink(patch, nbytes):
    """Shards of so many bytes, each of two tiles."""
    patch.setattr(tiles, "SHARD_NBYTES", nbytes)
    patch.setattr(tiles, "LEAST_FRAMES", 1)
    patch.setattr(tiles, "BALANCED_SHARDS", 1)
    for name in ("TILE_NBYTES", "RUNS_TILE_NBYTES"):
        patch.setattr(tiles, name, nbytes // 2)


def chosen(frame=FRAME, dtype="u2", seed=0):
    """Analyses that leave every kind of array behind, but fits."""
    rng = np.random.default_rng(seed)
    mask = rng.random(frame) > 0.5
    mask[0, 0] = True
    return [
        gpuem.Sum(),
        gpuem.VirtualDetector(name="ring", center=(2, 3), inner=0.5, outer=2.5),
        gpuem.VirtualDetector(name="mask", shape="mask", mask=mask),
        gpuem.VirtualDetector(name="weights", shape="mask", mask=rng.standard_normal(frame)),
        # reads no sample of floats beforehand: what fails is to fail in the run
        gpuem.CenterOfMass(compatible="libertem"),
    ]


def ints(folder, scan=(12, 8), dtype="u2"):
    np.save(folder / "ints.npy", reference.planted((*scan, *FRAME), dtype))
    return gpuem.open(folder / "ints.npy")


def floats(folder, scan=(12, 8), bad=()):
    """Of very different sizes, so that the order of sums shows; frames `bad` hold NaN."""
    frames = np.random.default_rng(3).lognormal(0, 5, (*scan, *FRAME)).astype("f4")
    for k in bad:
        frames.reshape(-1, *FRAME)[k, 2, 3] = np.nan
    np.save(folder / "floats.npy", frames)
    return gpuem.open(folder / "floats.npy")


def boxes(folder, scan=(9, 10)):
    """Chunks over both axes of the scan: shards are boxes, their positions don't follow one another. One is missing."""
    with h5py.File(folder / "boxes.h5", "w") as file:
        made = file.create_dataset("data", (*scan, *FRAME), "u2", chunks=(3, 2, *FRAME), compression="gzip")
        frames = reference.planted((*scan, *FRAME), "u2", 5)
        made[:6] = frames[:6]
        made[6:, :8] = frames[6:, :8]
    return gpuem.open(folder / "boxes.h5")


def prepared(ds, analyses, roi=None, **options):
    """A job on the CPU."""
    return job.prepare(ds, analyses, recipe.run_section(device="cpu", **options), roi)


def stopping(after):
    """A `progress` that presses Ctrl-C when so many shards are done."""
    seen = 0

    def progress(frames):
        nonlocal seen
        seen += 1
        if seen >= after:
            raise KeyboardInterrupt

    return progress


def watching(progress):
    return lambda ds, frames: nullcontext(progress)


def assert_same(found, expected):
    """The same maps, bit for bit."""
    assert list(found) == list(expected)
    for name in expected:
        one, other = found[name].data, expected[name].data
        assert one.dtype == other.dtype, name
        assert one.tobytes() == other.tobytes(), name
        assert found[name].attributes == expected[name].attributes, name


def events(folder, *names):
    """Lines of the log of a run."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if not names or line["event"] in names]


def runs_of_shards(folder):
    """How many times each shard was run."""
    return Counter(event["shard"] for event in events(folder, "shard"))


RECIPE = """
[input]
path = "{data}"
{input}
[[analysis]]
kind = "sum"
[[analysis]]
kind = "virtual"
outer = 3
[[analysis]]
kind = "com"
[run]
device = "cpu"
threads = {threads}
{run}
[output]
path = "{output}"
previews = false
"""


def write_recipe(folder, data, name="recipe", **changes):
    given = {"input": "", "run": "", "threads": 2, "output": f"{name}.zarr", "data": Path(data).name, **changes}
    path = folder / f"{name}.toml"
    path.write_text(RECIPE.format(**given))
    return path


def start(recipe_path, *arguments, shard=8 * 6 * 7 * 2, slow=0.0, begun="", **options):
    """`gpuem run` in a process of its own."""
    environment = {**os.environ, "KILLING_SHARD": str(shard), "KILLING_SLOW": str(slow), "KILLING_BEGUN": str(begun)}
    environment["NO_COLOR"] = "1"
    source = Path(gpuem.__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(source), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).resolve()), "run", str(recipe_path), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, process, seconds=120.0):
    """Wait until something is so; the process must not end before."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def kept(folder):
    """How many shards a run has finished so far."""
    store = folder / "store"
    # those that are not synced yet stand in a list of their own
    files = [store / name for name in ("done.jsonl", "pending.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


if __name__ == "__main__":
    import pytest

    shrink(pytest.MonkeyPatch(), int(os.environ["KILLING_SHARD"]))
    slow, preadv = float(os.environ["KILLING_SLOW"]), os.preadv

    def slowly(descriptor, buffers, offset, *more):
        # what a store reads is not meant
        if slow and os.readlink(f"/proc/self/fd/{descriptor}").endswith((".npy", ".raw")):
            time.sleep(slow)
        return preadv(descriptor, buffers, offset, *more)

    os.preadv = slowly
    from gpuem.executors import local

    run_shard = local.run_shard

    def counted(job, index, **options):
        if os.environ["KILLING_BEGUN"]:
            with Path(os.environ["KILLING_BEGUN"]).open("a") as file:
                file.write(f"{index}\n")
        return run_shard(job, index, **options)

    local.run_shard = counted
    from gpuem.cli import main

    main()
