"""The joint fit of a lattice to all pixels of all its disks: what a backend must know, as plain arrays.

A pattern is modelled as mu(p) = sum over sites of I_k T_k(p - q_k) + b_k with q_k = center + h_k a + k_k b. The six
numbers of the lattice are fitted at once; every disk's intensity I_k, background b_k and a gradient across the disk
(thickness and bending move intensity inside a disk without moving the disk) are nuisances, eliminated in closed form.
Pixels are weighed by what is known of them, disks by what is known of their places. One step of Gauss and Newton:

    w         = 1 / (gain mu + read + (m_k I_k)^2)                     for every pixel of a window
    A_k, g_k  = information and score of the disk's place, nuisances eliminated (priors: background, gradient)
    W_k       = (1 + s_k^2 A_k)^-1 A_k                                 s_k: how far disks lie off their lattice
    H, r      = sum over disks of e e^T x W_k, e x (1 + s_k^2 A_k)^-1 g_k,    e = (1, h, k)
    theta    += H^-1 r,   covariance H^-1

The first steps use a blurred probe, for which the start may be off by half a disk's radius.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# phases per pixel in which the probe is tabulated, sharp and blurred
PHASES = 16
COARSE_PHASES = 4
# columns of `LatticeFit.priors`
MODEL_ERROR, GRADIENT, BACKGROUND, BACKGROUND_PRECISION, OFFSET = range(5)
# what is found for a frame
COLUMNS = (
    *("center_y", "center_x", "a_y", "a_x", "b_y", "b_x"),
    *("exx_sigma", "eyy_sigma", "exy_sigma", "rotation_sigma"),
    *("chi2", "disks", "counts", "grain"),
)


@dataclass(frozen=True, eq=False)
class LatticeFit:
    """A joint lattice fit of every frame.

    Parameters
    ----------
    probe : (17 * 17, n * n) float32
        The probe in 17 x 17 phases: value at pixel (i, j) of a window whose pixel (n / 2 - 1, n / 2 - 1) holds the
        disk's centre, shifted by phase / 16 px in y and x. 1 inside, 0 outside.
    coarse : (5 * 5, m * m) float32
        The same, blurred, in quarters of a pixel.
    modulation : (sites, n * n + n + 2) float32
        What every disk's inside looks like: a factor on a grid of pixels around the disk's centre, and padding.
    window, coarse_window : (n * n,), (m * m,) float32
        1 where a pixel belongs to the disk alone, 0 where another disk of the lattice may reach.
    sites : (sites, 2) float64
        Reflections (h, k), those of the first lattice first.
    first : (lattices + 1,) int64
        Where the sites of each lattice begin.
    priors : (sites, 5) float64
        For every disk: relative model error squared, variance of its gradient (change from centre to rim, relative),
        background and the inverse of its variance, variance of its place off the lattice in px^2.
    lattices : (lattices, 6) float64
        Where to start: center, a, b as (y, x) px; in every frame the one that explains most is taken.
    drift : (2, 2) float64
        How the centre (y, x) moves per scan position along y and x, in px.
    good : (y * x,) float32
        0 where a pixel is dead or hidden; empty where all are good.
    axes : (2, 2) float64
        From detector (x, y) to the axes in which strain is told.
    numbers : (7,) float64
        gain (counts per electron), read noise squared, counts from which on a pixel is saturated, radius of the disk
        in px, smallest number of disks, largest step of a site in px that still counts as converged, information of
        the start (1 / px^2).
    scan_width : int
        Scan positions in a row.
    steps : tuple of int
        Steps with the blurred and with the sharp probe; twice as many sharp ones where they don't converge.
    """

    probe: NDArray[np.float32]
    coarse: NDArray[np.float32]
    modulation: NDArray[np.float32]
    window: NDArray[np.float32]
    coarse_window: NDArray[np.float32]
    sites: NDArray[np.float64]
    first: NDArray[np.int64]
    priors: NDArray[np.float64]
    lattices: NDArray[np.float64]
    drift: NDArray[np.float64]
    good: NDArray[np.float32]
    axes: NDArray[np.float64]
    numbers: NDArray[np.float64]
    scan_width: int
    steps: tuple[int, int] = (2, 4)

    @property
    def columns(self) -> int:
        """Numbers found for a frame."""
        return len(COLUMNS)


def phases(image: NDArray[np.float64], oversampling: int, half: int) -> NDArray[np.float32]:
    """Cut an oversampled image of a probe into its phases on the pixel grid.

    Parameters
    ----------
    image : (s, s) float64
        The probe, centred in the middle, `oversampling` samples per pixel; s >= 2 * oversampling * (half + 1) + 1.
    oversampling : int
        Samples per pixel.
    half : int
        Pixels from the disk's centre to the edge of a window.

    Returns
    -------
    (phases + 1)^2, (2 * half + 2)^2 float32
        Row (p, q) holds the pixels around a disk that lies p / oversampling, q / oversampling px off a pixel's centre.
    """
    middle = (image.shape[0] - 1) // 2
    pixels = middle + (np.arange(2 * half + 2) - half) * oversampling
    shifted = [pixels - phase for phase in range(oversampling + 1)]
    planes = [image[np.ix_(y, x)].reshape(-1) for y in shifted for x in shifted]
    return np.array(planes, np.float32)


def window_size(table: NDArray[np.float32]) -> int:
    """Pixels along an edge of the windows of a table of phases."""
    return math.isqrt(table.shape[1])
