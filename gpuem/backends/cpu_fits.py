"""Fits on the processor: which function computes which kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.backends import Fit, Frames, cpu_blobfinder, cpu_correlate, cpu_guided, cpu_lattice
from gpuem.backends.cpu_blobfinder import BlobfinderFit
from gpuem.backends.lattice_fit import LatticeFit
from gpuem.backends.peaks import GuidedFit, PeakSearch

# kind of a fit -> function(fit, frames, positions, out); a module that computes a kind enters it here
KINDS: dict[type, Callable[[Any, Frames, NDArray[np.int64], NDArray[np.float32]], None]] = {
    LatticeFit: cpu_lattice.run,
    BlobfinderFit: cpu_blobfinder.run,
    PeakSearch: cpu_correlate.run,
    GuidedFit: cpu_guided.run,
}


def run(fit: Fit, frames: Frames, positions: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """Compute a fit of a block of frames.

    Several threads call this at once with different frames. What is found for a frame must not depend on the others
    in its block: blocks are cut otherwise on other devices.

    Parameters
    ----------
    fit : Fit
        What to compute.
    frames : Frames
        Native pixels.
    positions : (n,) int64
        Flat scan positions of the frames.
    out : (n, columns) float32
        The results; every value is written.
    """
    KINDS[type(fit)](fit, frames, positions, out)
