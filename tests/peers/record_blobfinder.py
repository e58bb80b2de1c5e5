"""Record what libertem-blobfinder finds in small seeded patterns, as ``blobfinder.json`` beside this file.

Run by hand, in an environment of its own with ``libertem`` and ``libertem-blobfinder``; no test imports them.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

SHAPE = (88, 96)
CENTER, A, B = (43.4, 47.8), (1.5, 17.2), (16.6, -2.1)
ORDERS = [(h, k) for h in range(-2, 3) for k in range(-2, 3)]
RADIUS = 4.0


def patterns(seed=4, frames=4):
    """Disks of falling intensity on a sloping background, counting noise; uint16 (frames, y, x)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    found = []
    for f in range(frames):
        deform = np.eye(2) + rng.uniform(-0.015, 0.015, (2, 2))
        center = np.array(CENTER) + rng.uniform(-0.6, 0.6, 2)
        image = 2.0 + 0.02 * x + 0.01 * f * y
        for h, k in ORDERS:
            p = center + deform @ (h * np.array(A) + k * np.array(B))
            strength = 180 / (1 + h * h + k * k) * rng.uniform(0.5, 1.5)
            image = image + strength * np.clip(RADIUS + 0.5 - np.hypot(y - p[0], x - p[1]), 0, 1)
        # uniform numbers are the same in all versions of NumPy
        noise = rng.random((6, *SHAPE)).sum(axis=0) * np.sqrt(2) - 3 * np.sqrt(2)
        found.append(np.clip(np.rint(image + noise * np.sqrt(image)), 0, 65535))
    return np.array(found).astype(np.uint16)


def expected():
    """Where the disks are looked for, (y, x)."""
    return np.array([np.array(CENTER) + h * np.array(A) + k * np.array(B) for h, k in ORDERS])


def record():
    """All templates through the fast correlation, and the lattice fitted to it."""
    import libertem.api as lt
    from libertem_blobfinder.common import gridmatching
    from libertem_blobfinder.common import patterns as templates
    from libertem_blobfinder.udf.correlation import FastCorrelationUDF
    from libertem_blobfinder.udf.refinement import run_refine

    data = patterns()
    ctx = lt.Context.make_with("inline")
    dataset = ctx.load("memory", data=data[None], sig_dims=2, num_partitions=1)
    chosen = {
        "circular": templates.Circular(radius=RADIUS),
        "circular, search 6.5": templates.Circular(radius=RADIUS, search=6.5),
        "radial gradient": templates.RadialGradient(radius=RADIUS),
        "background subtraction": templates.BackgroundSubtraction(radius=RADIUS),
        "radial gradient, radius 4.6": templates.RadialGradient(radius=4.6),
    }
    found = {
        "version": version("libertem-blobfinder"),
        "numpy": np.__version__,
        "sum": int(data.sum()),
        "templates": {},
    }
    for name, template in chosen.items():
        udf = FastCorrelationUDF(peaks=np.round(expected()).astype(int), match_pattern=template)
        result = ctx.run_udf(dataset=dataset, udf=udf)
        one = {key: result[key].data[0].tolist() for key in ("centers", "refineds", "peak_values", "peak_elevations")}
        lattice, indices = run_refine(
            ctx, dataset, np.array(CENTER), np.array(A), np.array(B), template, gridmatching.Matcher(),
            indices=np.mgrid[-2:3, -2:3],
        )  # fmt: skip
        one["lattice"] = {key: lattice[key].data[0].tolist() for key in ("zero", "a", "b", "error", "selector")}
        one["indices"] = np.asarray(indices).tolist()
        found["templates"][name] = one
    return found


if __name__ == "__main__":
    Path(__file__).with_name("blobfinder.json").write_text(json.dumps(record()) + "\n")
