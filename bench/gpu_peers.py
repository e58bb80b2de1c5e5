"""Part of bench/gpu.py: the GPU paths of LiberTEM and py4DSTEM, in a process and, if asked, an environment of theirs.

    python bench/gpu_peers.py libertem|py4dstem FILE FRAMES Y X REPEATS

prints one line of JSON. Only `compare` needs gpuem.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

MODULES = {"libertem": "libertem", "py4dstem": "py4DSTEM"}
# frames that fit on the GPU in single precision, with as much again for products
FEW = 8192


def compare(bench: Any, python: str, patience: float) -> dict[str, Any]:
    """Every peer that imports there, against gpuem on the same frames; what doesn't is named."""
    import gpu_kernels
    import gpu_runs

    import gpuem

    found: dict[str, Any] = {}
    for name, chosen in (("libertem", gpu_kernels.three(bench.shape)), ("py4dstem", [gpuem.CenterOfMass()])):
        theirs = found[name] = ask(bench, python, name, patience)
        if "seconds" not in theirs:
            continue
        reference = gpu_runs.on_cpu(bench.plain, chosen).maps
        for key, value in theirs["check"].items():
            data = reference[key].data.reshape(-1)[: theirs["frames"] if key.startswith("com") else None]
            ours = float(data.sum() if key.startswith(("sum", "adf")) else data.mean())
            bench.check(f"{name}: {key}", abs(value - ours) <= 1e-3 * abs(ours))
        runs = [gpu_runs.run(bench.plain, chosen, device="cuda").seconds["total"] for _ in range(bench.repeats)]
        rate = bench.nbytes / statistics.median(runs) / 1e9
        theirs.update(gpuem_GB_s=rate, ratio=rate / theirs["GB_s"])
    return found


def ask(bench: Any, python: str, name: str, patience: float) -> dict[str, Any]:
    """What a peer found, or why there is nothing."""
    command = [python, str(Path(__file__)), name, str(bench.raw), str(bench.frames), *map(str, bench.shape), "3"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(patience, 1))
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {patience:.0f} s"}
    lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("JSON")]
    return json.loads(lines[0]) if lines else {"failed": done.stderr[-2000:]}


def timed(work: Any, repeats: int) -> tuple[Any, float]:
    """The result, and the median of the seconds; once before for warming up."""
    result, times = work(), []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - started)
    return result, statistics.median(times)


def libertem(path: str, frames: int, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Sum, annulus and centre of mass in one run, on GPU workers only; the fastest of several executors."""
    import libertem
    import libertem.api as lt
    from libertem.udf.com import CoMUDF
    from libertem.udf.masks import ApplyMasksUDF
    from libertem.udf.sum import SumUDF

    def ring() -> np.ndarray:
        y, x = np.ogrid[: shape[0], : shape[1]]
        d2 = (y - (shape[0] - 1) / 2) ** 2 + (x - (shape[1] - 1) / 2) ** 2
        return (d2 <= (80 * shape[0] / 256) ** 2) & (d2 > (30 * shape[0] / 256) ** 2)

    com = CoMUDF.with_params(cy=(shape[0] - 1) / 2, cx=(shape[1] - 1) / 2)
    udfs = [SumUDF(), ApplyMasksUDF(mask_factories=[ring]), com]
    tried: dict[str, Any] = {}
    best: dict[str, Any] = {}
    for executor, workers in (("dask", 1), ("dask", 4), ("pipelined", 1), ("pipelined", 4)):
        label = f"{executor}, {workers} GPU workers"
        try:
            with lt.Context.make_with(executor, cpus=1, gpus=[0] * workers) as ctx:
                ds = ctx.load("raw", path=path, dtype="uint16", nav_shape=(frames // 16, 16), sig_shape=shape)
                result, seconds = timed(lambda ctx=ctx, ds=ds: ctx.run_udf(ds, udfs, backends=("cupy",)), repeats)
        except Exception as error:  # noqa: BLE001 - what can't start is told, not hidden
            tried[label] = f"{type(error).__name__}: {error}"[:300]
            continue
        tried[label] = seconds
        if not best or seconds < best["seconds"]:
            totals = [float(np.asarray(next(iter(r.values())).data, np.float64).sum()) for r in result[:2]]
            best = {"seconds": seconds, "check": dict(zip(("sum/sum", "adf"), totals, strict=True)), "executor": label}
    if not best:
        return {"failed": "no executor ran on the GPU", "tried": tried}
    return {**best, "tried": tried, "version": libertem.__version__, "frames": frames}


def py4dstem(path: str, frames: int, shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    """Centre of mass as DPC measures it, of frames that are in memory; the first of them, as many as fit."""
    import py4DSTEM
    from py4DSTEM.process.phase import DPC

    frames = min(frames, FEW)
    data = np.fromfile(path, np.uint16, frames * shape[0] * shape[1]).reshape(frames // 16, 16, *shape)

    def work() -> Any:
        dpc = DPC(datacube=py4DSTEM.DataCube(data=data), energy=80e3, verbose=False, device="gpu")
        options = {"force_com_rotation": 0, "force_com_transpose": False}
        dpc.preprocess(**options, plot_center_of_mass=False, plot_rotation=False)
        return [float(values.mean()) for values in (dpc._com_measured_x, dpc._com_measured_y)]

    (down, right), seconds = timed(work, repeats)
    check = {"com/y": down, "com/x": right}
    return {"seconds": seconds, "check": check, "version": py4DSTEM.__version__, "frames": frames}


def main() -> None:
    name, path, frames, height, width, repeats = sys.argv[1:]
    shape = (int(height), int(width))
    if importlib.util.find_spec(MODULES[name]) is None:
        found: dict[str, Any] = {"not installed": f"{MODULES[name]} isn't there for Python {platform.python_version()}"}
    else:
        found = globals()[name](path, int(frames), shape, int(repeats))
        if "seconds" in found:
            found["GB_s"] = 2 * found["frames"] * shape[0] * shape[1] / found["seconds"] / 1e9
    print("JSON" + json.dumps(found))


if __name__ == "__main__":
    main()
