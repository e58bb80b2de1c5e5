"""py4DSTEM's side of the strain benchmark: runs in py4DSTEM's own environment (NumPy below 2), prints JSON.

    PYTHON bench/peer_py4dstem.py STACK.npy CENTER_Y CENTER_X A_Y A_X B_Y B_X RADIUS EDGE [subpixel,subpixel]

STACK is (n, y, x). Its own synthetic probe, of which the edge is EDGE px wide, its zero-sum sigmoid kernel, its disk
detection and its lattice fit, with the given lattice to index the disks. Detection and fit are timed, after one pattern
to warm up; vectors come back as (y, x) px, null where the fit had too few disks.
"""

import contextlib
import json
import sys
import time
from importlib.metadata import version

import numpy as np

with contextlib.redirect_stdout(sys.stderr):
    from emdfile import PointList
    from py4DSTEM.braggvectors.diskdetection import _find_Bragg_disks_stack
    from py4DSTEM.braggvectors.probe import Probe
    from py4DSTEM.process.strain.latticevectors import fit_lattice_vectors

FIELDS = [("qx", float), ("qy", float), ("intensity", float), ("g1_ind", int), ("g2_ind", int)]


def make_kernel(shape, radius, edge):
    probe = Probe.generate_synthetic_probe(radius, edge, shape)
    middle = (shape[0] / 2, shape[1] / 2)  # where its synthetic probe lies
    return probe.get_kernel(mode="sigmoid", radii=(0, 2 * radius), origin=middle, bilinear=False)


def find_disks(stack, kernel, subpixel, spacing, radius):
    return _find_Bragg_disks_stack(
        stack,
        np.conj(np.fft.fft2(kernel)),
        _template_space="fourier",
        sigma_cc=1,  # of 1 and 2 px (its default), and kernels from 0 or from the radius, the most exact on round disks
        subpixel=subpixel,
        upsample_factor=16,
        minRelativeIntensity=0.02,
        minPeakSpacing=spacing,
        edgeBoundary=int(radius),
        maxNumPeaks=100,
    )


def fit_lattice(disks, center, basis, reach):
    """Index disks by the nearest site within reach; a, b as (y, x), or None."""
    q = np.stack([disks.data["qx"], disks.data["qy"]], axis=1) - center
    index = np.rint(q @ np.linalg.inv(basis)).astype(int)
    near = np.hypot(*(q - index @ basis).T) < reach
    points = np.zeros(int(near.sum()), FIELDS)
    points["qx"], points["qy"] = (q + center)[near].T
    points["intensity"] = disks.data["intensity"][near]
    points["g1_ind"], points["g2_ind"] = index[near].T
    found = fit_lattice_vectors(PointList(data=points))
    return (None, None) if found[0] is None else (found[2:4], found[4:6])


def measure(stack, kernel, subpixel, center, basis, radius):
    lengths = np.hypot(*basis.T)

    def run(patterns):
        disks = find_disks(patterns, kernel, subpixel, 0.6 * lengths.min(), radius)
        return [fit_lattice(found, center, basis, 0.3 * lengths.min()) for found in disks]

    run(stack[:1])
    start = time.perf_counter()
    vectors = run(stack)
    seconds = time.perf_counter() - start
    return {
        "patterns_per_s": len(stack) / seconds,
        "a": [None if a is None else [float(v) for v in a] for a, _ in vectors],
        "b": [None if b is None else [float(v) for v in b] for _, b in vectors],
    }


def main(path, *numbers_and_modes):
    numbers, modes = [float(v) for v in numbers_and_modes[:8]], numbers_and_modes[8:]
    center, basis = np.array(numbers[:2]), np.reshape(numbers[2:6], (2, 2))
    radius, edge = numbers[6:]
    stack = np.load(path, mmap_mode="r")
    found = {"version": version("py4DSTEM")}
    with contextlib.redirect_stdout(sys.stderr):
        kernel = make_kernel(stack.shape[1:], radius, edge)
        for subpixel in modes[0].split(",") if modes else ["poly", "multicorr"]:
            found[subpixel] = measure(stack, kernel, subpixel, center, basis, radius)
    print("JSON" + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
