"""Part of bench/gpu.py: strain of set K on the GPU, resident and streamed, against the same fit on the CPU."""

from __future__ import annotations

import statistics
from typing import Any

import gpu_runs
import numpy as np
from gpu_data import Bench

import gpuem
from gpuem import dataset, job, look, synthetic

# different patterns; they are repeated to make a long scan
PATTERNS = 512
SCAN = 16384
# how far CPU and GPU may differ in strain
AGREE = 1e-6
TINY = {"frame": (48, 48), "center": (23.3, 23.1), "a": (0.0, 11.0), "b": (11.0, 0.0), "order": 1, "radius": 3.0}


def strain(bench: Bench) -> dict[str, Any]:
    """Patterns per second of the lattice fit; what the look takes is told apart."""
    quick = bench.shape != (256, 256)
    pattern = synthetic.Pattern(**TINY) if quick else synthetic.Pattern()
    unique, scan = (32, 64) if quick else (PATTERNS, SCAN)
    frames, truth = synthetic.generate(pattern, (8, unique // 8), seed=1)
    frames = frames.reshape(unique, *pattern.frame)
    many = np.tile(frames, (scan // unique, 1, 1))
    small, data = dataset.of_array(frames), dataset.of_array(many)
    path = bench.folder / "setk.npy"
    np.save(path, many)
    everywhere = np.ones(unique, np.bool_)
    resolved = gpuem.Strain().look(job.view_of(data), look.sample(small, everywhere))
    expected = gpu_runs.run(small, [resolved], device="cpu").maps
    found = gpu_runs.run(small, [resolved], device="cuda").maps
    off = {}
    for name in ("exx", "eyy", "exy"):
        a, b = (maps[f"strain/{name}"].data for maps in (expected, found))
        bench.check(f"strain: {name} found at the same positions", np.array_equal(np.isnan(a), np.isnan(b)))
        off[name] = float(np.nanmax(np.abs(a - b)))
    bench.check(f"strain: agrees with the CPU to {AGREE}", max(off.values()) <= AGREE)
    out: dict[str, Any] = {}
    cases = {"resident": data.to_device(), "streamed": gpuem.open(path)}
    for name, ds in cases.items():
        gpu_runs.run(ds, [resolved], device="cuda")
        runs = [gpu_runs.run(ds, [resolved], device="cuda") for _ in range(bench.repeats)]
        seconds = statistics.median(one.seconds["stream"] for one in runs)
        total = statistics.median(one.seconds["total"] for one in runs)
        out[name] = {
            "seconds": seconds, "total_seconds": total, "patterns_per_s": scan / seconds,
            "GB_s": many.nbytes / seconds / 1e9, "stored_bytes": many.nbytes, "off_the_cpu": max(off.values()),
            "bound": float(truth["bound"]),
        }  # fmt: skip
    return out
