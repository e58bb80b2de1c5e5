"""What is asked for when disks are to be found: everywhere in a frame, or near sites where they are expected.

Both correlate frames with a kernel, an image of the disk minus a ring around it, so that a constant background gives
nothing: a flat disk alone is pulled towards its neighbours and up every slope of the background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Subpixel = Literal["none", "parabola", "upsample"]
# frequencies at which the kernel has less than this part of its largest amplitude carry rounding errors, no signal
FAINT = 1e-6


@dataclass(frozen=True, eq=False)
class PeakSearch:
    """Maxima of the correlation of whole frames with a kernel.

    With m = FFT(frame - mean) conj(FFT(kernel)) the correlation is IFFT(m |m|^(power - 1)), periodic in the frame: a
    kernel that crosses the edge sees the opposite side. A maximum is larger than its four neighbours above and to the
    left and not smaller than the four below and to the right, of those that lie on the frame; it must be positive.
    Maxima then pass, in this order: distance from the edge, absolute height, height relative to one of the brightest,
    spacing (the brightest first, each removes those nearer than `spacing`), number. Equally bright ones count in the
    order of rows, then of columns.

    Parameters
    ----------
    kernel : (y, x) float32
        As large as the frame, its centre wrapped to pixel (0, 0), its sum 0; see `zero_mean_kernel` and `wrapped`.
    power : float
        1: cross-correlation; 0: phase correlation; between: hybrid. Heights are counts for 1 only.
    sigma : float
        Standard deviation, in px, of a Gaussian that smooths the correlation; 0: none.
    subpixel : {"upsample", "parabola", "none"}
        "parabola": one along each axis, through the maximum and its neighbours. "upsample": the trigonometric
        polynomial through all pixels of the correlation, on a grid of 1/`factor` px, climbed from the parabola's
        maximum; then parabolas on that grid. This is the real part of the zero-padded Fourier transform of
        Guizar-Sicairos, Thurman & Fienup, Opt. Lett. 33 (2008) 156.
    factor : int
        Points per pixel of the upsampled grid.
    edge : int
        Maxima whose pixel is nearer than this to the border pixels, 0 on them, are left out.
    min_absolute : float
        Least height.
    min_relative : float
        Least height as a part of that of the `relative_to`-th brightest, of those that passed so far.
    relative_to : int
        1: the brightest; 2: the second brightest, and so on; the faintest where there are fewer.
    spacing : float
        Least distance, in px, from a brighter maximum.
    max_peaks : int
        The brightest of them that are kept.
    """

    kernel: NDArray[np.float32]
    power: float = 1.0
    sigma: float = 0.0
    subpixel: Subpixel = "upsample"
    factor: int = 16
    edge: int = 0
    min_absolute: float = 0.0
    min_relative: float = 0.0
    relative_to: int = 1
    spacing: float = 0.0
    max_peaks: int = 64

    @property
    def columns(self) -> int:
        """Results of a frame: the number of peaks, then (y, x, height) of each, NaN where there are fewer."""
        return 1 + 3 * self.max_peaks

    @cached_property
    def spectrum(self) -> NDArray[np.complex64]:
        """Conjugate Fourier transform of the kernel, (y, x // 2 + 1); exact zeros where it is faint."""
        found = np.conj(np.fft.rfft2(self.kernel.astype(np.float64)))
        size = np.abs(found)
        found[size <= FAINT * size.max(initial=0.0)] = 0
        return found.astype(np.complex64)

    @cached_property
    def smoothing(self) -> NDArray[np.float32]:
        """Fourier transform of the Gaussian, (y, x // 2 + 1)."""
        height, width = self.kernel.shape
        f2 = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.rfftfreq(width)[None, :] ** 2
        return np.exp(-2 * (np.pi * self.sigma) ** 2 * f2).astype(np.float32)


@dataclass(frozen=True, eq=False)
class GuidedFit:
    """Correlation with a kernel at whole shifts around the sites where disks are expected.

    Parameters
    ----------
    sites : (n, 2) float64
        Expected positions (y, x) in px.
    kernel : (m, m) float32
        Zero-mean kernel, m odd, its centre in the middle.
    search : int
        Shifts up to this many px along each axis.
    normalised : bool
        Divide by the standard deviation of the frame under the kernel and by that of the kernel: 1 is a perfect match.
    logarithm : bool
        Correlate log(1 + pixel - least pixel of the window): strong disks weigh little more than weak ones.
    """

    sites: NDArray[np.float64]
    kernel: NDArray[np.float32]
    search: int
    normalised: bool = False
    logarithm: bool = False

    @property
    def columns(self) -> int:
        """Results of a frame: (y, x, height, elevation) of each site."""
        return 4 * len(self.sites)


def soft_disk(radius: float, edge: float, half: int) -> NDArray[np.float64]:
    """A disk of (2 half + 1)^2 px, 1 inside, 0 outside, with a linear edge of full width `edge` at `radius`."""
    y, x = np.ogrid[-half : half + 1, -half : half + 1]
    return np.clip((radius - np.hypot(y, x)) / max(edge, 1e-6) + 0.5, 0.0, 1.0)


def zero_mean_kernel(disk: NDArray[Any], inner: float, outer: float) -> NDArray[np.float32]:
    """The disk minus a ring around it, so that the sum is zero.

    Scaled so that the correlation with the disk itself, times c and on any constant background, is c times the
    disk's sum: its counts.

    Parameters
    ----------
    disk : (m, m) array
        Image of the disk, m odd, its centre in the middle; need not be round or flat.
    inner, outer : float
        Radii of the ring in px, each with an edge of 1 px; there the disk should have fallen to zero.

    Raises
    ------
    ValueError
        The image isn't square and odd, has no positive sum, or the ring has no pixel in it.
    """
    size = disk.shape[0]
    if disk.ndim != 2 or disk.shape != (size, size) or size % 2 == 0:
        raise ValueError(f"image of the disk: {disk.shape} px; must be square with an odd number of pixels")
    half = size // 2
    y, x = np.ogrid[-half : half + 1, -half : half + 1]
    d = np.hypot(y, x)
    ring = np.clip(d - inner + 0.5, 0, 1) * np.clip(outer - d + 0.5, 0, 1)
    values = disk.astype(np.float64)
    if not (ring.sum() > 0 and values.sum() > 0):
        raise ValueError(
            f"ring from {inner:g} to {outer:g} px around a disk of {size}x{size} px: nothing in one of them"
        )
    balanced = values - ring * (values.sum() / ring.sum())
    kernel = np.asarray(balanced * (values.sum() / (balanced * values).sum()), np.float32)
    # what rounding left over
    kernel -= np.float32(kernel.sum(dtype=np.float64)) * (ring / ring.sum()).astype(np.float32)
    return kernel


def wrapped(image: NDArray[Any], shape: tuple[int, int]) -> NDArray[np.float32]:
    """An (m, m) image with its centre in the middle, on a frame of `shape`, its centre at (0, 0), wrapped around.

    Raises
    ------
    ValueError
        The frame is smaller than the image.
    """
    if image.shape[0] > shape[0] or image.shape[1] > shape[1]:
        raise ValueError(f"kernel of {image.shape[0]}x{image.shape[1]} px on a frame of {shape[0]}x{shape[1]} px")
    whole = np.zeros(shape, np.float32)
    whole[: image.shape[0], : image.shape[1]] = image
    turned: NDArray[np.float32] = np.roll(whole, (-(image.shape[0] // 2), -(image.shape[1] // 2)), (0, 1))
    return turned
