"""The joint fit of a lattice to all pixels of all its disks: what a backend must know, as plain arrays.

A pattern is modelled as mu(p) = sum over sites of I_k T_k(p - q_k) + b_k with q_k = center + h_k a + k_k b. The six
numbers of the lattice are fitted at once; every disk's intensity I_k, background b_k and a gradient across the disk
(thickness and bending move intensity inside a disk without moving the disk) are nuisances, eliminated in closed form.
Pixels are weighed by what is known of them, disks by what is known of their places. One step of Gauss and Newton:

    w         = 1 / (gain mu + read + (m_k I_k)^2 + (n_k I_k T_k)^2)   for every pixel of a window
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
MODEL_ERROR, GRADIENT, BACKGROUND, BACKGROUND_PRECISION, OFFSET, INSIDE_ERROR = range(6)
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
    probe : (17 * 17, n) float32
        The probe in 17 x 17 phases: its values at the pixels of a window, for a disk that lies phase / 16 px in y and x
        off the centre of the window's middle pixel. 1 inside, 0 outside.
    coarse : (5 * 5, m) float32
        The same, blurred, in quarters of a pixel.
    pixels, coarse_pixels : (2, n), (2, m) int32
        The pixels (y, x) of the windows, from the middle one; as many as a multiple of 16.
    window, coarse_window : (n,), (m,) float32
        1 where a pixel belongs to the disk alone, 0 where another disk of the lattice may reach, and for filling up.
    shading : (sites, 4, n) float32
        What every disk's inside looks like: a factor on a grid of pixels around the disk's centre, at the window's
        pixels and at those one before them: in y and x, in y, in x, not at all.
    sites : (sites, 2) float64
        Reflections (h, k), those of the first lattice first.
    first : (lattices + 1,) int64
        Where the sites of each lattice begin.
    priors : (sites, 6) float64
        For every disk: squared error of the model everywhere in the window, relative to the disk's intensity; variance
        of its gradient (change from centre to rim, relative); background and the inverse of its variance; variance of
        its place off the lattice in px^2; squared error of the model inside the disk, relative to what is there.
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
        Steps with the blurred and with the sharp probe; up to twice as many in all where they don't converge.
    """

    probe: NDArray[np.float32]
    coarse: NDArray[np.float32]
    pixels: NDArray[np.int32]
    coarse_pixels: NDArray[np.int32]
    window: NDArray[np.float32]
    coarse_window: NDArray[np.float32]
    shading: NDArray[np.float32]
    sites: NDArray[np.float64]
    first: NDArray[np.int64]
    priors: NDArray[np.float64]
    lattices: NDArray[np.float64]
    drift: NDArray[np.float64]
    good: NDArray[np.float32]
    axes: NDArray[np.float64]
    numbers: NDArray[np.float64]
    scan_width: int
    steps: tuple[int, int] = (1, 3)

    @property
    def columns(self) -> int:
        """Numbers found for a frame."""
        return len(COLUMNS)


def window_pixels(reach: float) -> NDArray[np.int32]:
    """The pixels (2, n) of a round window from its middle, filled up to a multiple of 16 with the middle.

    A disk's centre may lie up to a pixel further on in y and x.
    """
    half = math.ceil(reach) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].reshape(2, -1)
    inside = np.hypot(y - 0.5, x - 0.5) <= reach + 0.5
    found = np.array([y[inside], x[inside]], np.int32)
    return np.pad(found, ((0, 0), (0, -found.shape[1] % 16)))


def phases(image: NDArray[np.float64], oversampling: int, pixels: NDArray[np.int32]) -> NDArray[np.float32]:
    """Cut an oversampled image of a probe into its phases on the pixel grid.

    Parameters
    ----------
    image : (s, s) float64
        The probe, centred in the middle, `oversampling` samples per pixel, reaching a pixel beyond the window.
    oversampling : int
        Samples per pixel.
    pixels : (2, n) int32
        The window.

    Returns
    -------
    ((oversampling + 1)^2, n) float32
        Row (p, q) holds the window around a disk that lies p / oversampling, q / oversampling px off its middle.
    """
    middle = (image.shape[0] - 1) // 2
    y, x = middle + pixels * oversampling
    steps = range(oversampling + 1)
    return np.array([image[y - p, x - q] for p in steps for q in steps], np.float32)
