"""LiberTEM's side of bench/cpu.py: runs in LiberTEM's own environment, prints JSON.

Every job is run once to warm up (and for its result), then `repeats` times; the best time counts. All executors that
work on CPUs are tried, so that the fastest one is compared.
"""

import json
import sys
import time

import libertem.api as lt
import numpy as np
from libertem.udf.com import CoMUDF
from libertem.udf.masks import ApplyMasksUDF
from libertem.udf.sum import SumUDF


def ring():
    y, x = np.ogrid[:256, :256]
    d2 = (y - 127.5) ** 2 + (x - 127.5) ** 2
    return (d2 <= 80**2) & (d2 > 30**2)


def dense():
    return np.random.default_rng(16).random((16, 256, 256)).astype(np.float32)


def jobs(which):
    made = {
        "sum": lambda: [SumUDF()],
        "annulus": lambda: [ApplyMasksUDF(mask_factories=[ring])],
        "com": lambda: [CoMUDF.with_params(cy=127.5, cx=127.5)],
        "three": lambda: [SumUDF(), ApplyMasksUDF(mask_factories=[ring]), CoMUDF.with_params(cy=127.5, cx=127.5)],
        "masks16": lambda: [ApplyMasksUDF(mask_factories=dense, mask_count=16, mask_dtype=np.float32)],
    }
    return {name: made[name] for name in which}


def main(path, format_, scan, repeats, which):
    executors = ["dask", "threads", "inline", "pipelined"]
    found = {}
    for executor in executors:
        try:
            context = lt.Context.make_with(executor)
        except Exception as error:  # noqa: BLE001 - an executor that can't start is told, not hidden
            found[executor] = {"error": str(error)[:200]}
            continue
        with context as ctx:
            if format_ == "raw":
                ds = ctx.load("raw", path=path, dtype="uint16", nav_shape=scan, sig_shape=(256, 256))
            else:
                ds = ctx.load("mib", path=path, nav_shape=scan)
            times = {}
            for name, make in jobs(which).items():
                result = ctx.run_udf(dataset=ds, udf=make())
                best = float("inf")
                for _ in range(repeats):
                    start = time.perf_counter()
                    result = ctx.run_udf(dataset=ds, udf=make())
                    best = min(best, time.perf_counter() - start)
                check = [
                    float(np.asarray(next(iter(r.values())).data, dtype=np.float64).sum())
                    for r in (result if isinstance(result, (list, tuple)) and not hasattr(result, "keys") else [result])
                ]
                times[name] = {"seconds": best, "check": check}
            found[executor] = times
    print("JSON" + json.dumps(found))


if __name__ == "__main__":
    path, format_, ny, nx, repeats, which = sys.argv[1:]
    main(path, format_, (int(ny), int(nx)), int(repeats), which.split(","))
