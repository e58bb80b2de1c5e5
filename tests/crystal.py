"""Small scans of synthetic crystals for tests of strain, and how results are compared with what was planted."""

from __future__ import annotations

import functools

import numpy as np

import gpuem
from gpuem import selftest
from gpuem.synthetic import Pattern, expectation, generate, theta_of

SCAN = (4, 16)
STRAINS = ("exx", "eyy", "exy", "rotation")


def small(**changes):
    """25 disks of radius 5 px on 96 x 96 px."""
    given = {"frame": (96, 96), "center": (47.3, 48.6), "a": (0.0, 17.0), "b": (17.0, 0.0), "radius": 5.0, **changes}
    return Pattern(**given)


@functools.cache
def planted(scan=SCAN, seed=1, **changes):
    """Pattern, frames (read-only) and truth."""
    pattern = small(**changes)
    frames, truth = generate(pattern, scan, seed)
    frames.flags.writeable = False
    return pattern, frames, truth


def deformed(gradient, count=16, seed=3, noise=True, **changes):
    """Frames of a crystal (count,), the first half of them undeformed, the others with r = F r0."""
    pattern = small(**changes)
    rng = np.random.default_rng(seed)
    frames = []
    for n in range(count):
        mu = expectation(pattern, theta_of(pattern, np.eye(2) if n < count // 2 else np.asarray(gradient, float)))
        frames.append(rng.poisson(mu) if noise else np.rint(100 * mu))
    return pattern, np.array(frames, np.uint16)


def moved(pattern, scan, by, seed=0):
    """A scan over which the centre moves evenly by `by` (y, x) px in each direction."""
    _, truth = generate(pattern, scan, seed)
    theta, rng = truth["theta"].copy(), np.random.default_rng(seed)
    frames = np.empty((*scan, *pattern.frame), np.uint16)
    for i, j in np.ndindex(scan):
        theta[i, j, :2] += np.array(by) * (i / max(scan[0] - 1, 1), j / max(scan[1] - 1, 1))
        frames[i, j] = rng.poisson(expectation(pattern, theta[i, j]))
    return frames, {**truth, "theta": theta}


def halo(scan=SCAN, seed=0):
    """What an amorphous region shows."""
    y, x = np.indices((96, 96)) - 48
    mu = 200 * np.exp(-(y * y + x * x) / 300) + 0.3
    return np.random.default_rng(seed).poisson(mu, (*scan, 96, 96)).astype(np.uint16)


def run(frames, *, device="cpu", roi=None, threads=None, on_error="stop", **options):
    return gpuem.run(frames, gpuem.Strain(**options), device=device, roi=roi, threads=threads, on_error=on_error)


def maps_of(results, name="strain"):
    """Maps of one analysis as flat arrays; vectors as (positions, 2)."""
    return selftest._named(results, name)


def judged(frames, pattern, truth, **options):
    """Fraction valid, error over bound, standard deviation of the pulls."""
    valid, error, pull = selftest.judge(maps_of(run(frames, **options)), truth["theta"].reshape(-1, 6), pattern)
    return valid, error / truth["bound"], pull
