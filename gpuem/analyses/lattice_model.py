"""All that a joint lattice fit is made of, in the terms of physics, and the tables that the backends compute with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.modes import order_of, zernike
from gpuem.analyses.probe import Probe, blurred
from gpuem.backends.lattice_fit import COARSE_PHASES, PHASES, LatticeFit, phases, window_pixels

# where the last step moves a disk by more than this, in px, the lattice is not found; steps are small long before
CONVERGED = 0.3


@dataclass(frozen=True, eq=False)
class Model:
    """All that a lattice fit is made of, in the terms of physics.

    Parameters
    ----------
    probe : Disk or Picture
        The direct beam's disk.
    sites, first, lattices, drift, good, axes, scan_width
        As in `gpuem.backends.lattice_fit.LatticeFit`.
    shape : tuple of int
        Detector shape.
    gain, read, saturation : float
        Counts per electron, read noise in counts, counts from which on a pixel is saturated.
    minimum : int
        Smallest number of disks.
    insides : (sites, modes) float64
        Zernike coefficients of every disk's inside.
    priors : (sites, 6) float64
        As in `LatticeFit`.
    """

    probe: Probe
    sites: NDArray[np.float64]
    first: NDArray[np.int64]
    lattices: NDArray[np.float64]
    drift: NDArray[np.float64]
    good: NDArray[np.float32]
    axes: NDArray[np.float64]
    scan_width: int
    shape: tuple[int, int]
    gain: float = 1.0
    read: float = 0.05
    saturation: float = np.inf
    minimum: int = 4
    insides: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 1)))
    priors: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 6)))

    @property
    def rim(self) -> float:
        """Where a disk surely ends, in px."""
        return self.probe.radius + 0.5 * max(self.probe.edge, 1.0)

    @property
    def spacing(self) -> float:
        """Smallest distance of two disks, in px."""
        return float(min(_shortest(lattice) for lattice in self.lattices))

    def fit(self, *, minimum: int | None = None) -> LatticeFit:
        """The tables of the fit."""
        radius, edge = self.probe.radius, max(self.probe.edge, 1.0)
        near, wide = radius + 0.5 * edge + 1.5, radius + max(3.5, 0.5 * radius)
        pixels, coarse_pixels = window_pixels(near), window_pixels(wide)
        soft = blurred(self.probe.image(int(coarse_pixels.max()), COARSE_PHASES), radius / 3 * COARSE_PHASES)
        longest = 0.15 * self.spacing
        numbers = (self.gain, self.read**2, self.saturation, radius, minimum or self.minimum, CONVERGED, longest**-2.0)
        return LatticeFit(
            phases(self.probe.image(int(pixels.max())), PHASES, pixels),
            phases(soft, COARSE_PHASES, coarse_pixels),
            pixels,
            coarse_pixels,
            self._alone(pixels),
            self._alone(coarse_pixels),
            self._shading(pixels),
            self.sites,
            self.first,
            self.priors,
            self.lattices,
            self.drift,
            self.good,
            self.axes,
            np.array(numbers, np.float64),
            self.scan_width,
        )

    def _alone(self, pixels: NDArray[np.int32]) -> NDArray[np.float32]:
        """Where a disk's window holds no other disk: there alone the sum of two disks is known not to matter."""
        y, x = pixels - 0.5
        keep = np.ones(y.size, np.bool_)
        reach = self.rim + 1.0
        for lattice in self.lattices:
            for h, k in np.ndindex(5, 5):
                if (h, k) != (2, 2):
                    other = (h - 2) * lattice[2:4] + (k - 2) * lattice[4:6]
                    keep &= np.hypot(y - other[0], x - other[1]) > reach
        # what only fills up lies where the middle has been before
        middle = np.flatnonzero((pixels == 0).all(axis=0))
        keep[middle[1:]] = False
        return keep.astype(np.float32)

    def _shading(self, pixels: NDArray[np.int32]) -> NDArray[np.float32]:
        """Every disk's inside at the window's pixels, and a pixel before them."""
        out = np.ones((len(self.sites), 4, pixels.shape[1]), np.float32)
        modes = self.insides.shape[1]
        if modes > 1:
            for k, back in enumerate(((1, 1), (1, 0), (0, 1), (0, 0))):
                y, x = (pixels - np.array(back)[:, None]) / self.rim
                out[:, k] = np.maximum(self.insides @ zernike(y, x, order_of(modes)), 0.0)
        return out


def _shortest(lattice: NDArray[np.float64]) -> float:
    a, b = lattice[2:4], lattice[4:6]
    return float(min(np.hypot(*v) for v in (a, b, a + b, a - b)))
