"""The probe: what a disk looks like, oversampled, from a model or from a picture.

A probe image is square, odd, centred in its middle and has `PHASES` samples per pixel; it is 1 inside and 0 outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpuem.backends.lattice_fit import PHASES

# how a disk ends: a linear ramp along the radius; or a sharp aperture averaged over square pixels, and blurred
Rim = Literal["ramp", "pixel"]


@dataclass(frozen=True)
class Disk:
    """A round or elliptical probe without structure.

    Parameters
    ----------
    radius : float
        Where the rim is half as bright as the middle, in px; for an ellipse the geometric mean of its half axes.
    edge : float
        "ramp": width of the rim, in px. "pixel": standard deviation of the blur beside that of the pixels, in px.
    rim : {"ramp", "pixel"}
        How the disk ends.
    ratio, angle : float
        Half axis along `angle` over half axis across; degrees from x towards y.
    """

    radius: float
    edge: float
    rim: Rim = "ramp"
    ratio: float = 1.0
    angle: float = 0.0

    @property
    def width(self) -> float:
        """Full width of the rim, in px: that of a ramp with the same standard deviation."""
        return self.edge if self.rim == "ramp" else math.sqrt(1 + 12 * self.edge**2)

    def image(self, half: int, oversampling: int = PHASES) -> NDArray[np.float64]:
        """The probe for windows that reach `half` px from its centre."""
        size = 2 * (half + 1) * oversampling + 1
        # a ramp is drawn well enough by its values, a step by the part of a sample that lies inside
        fine = 1 if self.rim == "ramp" else 2
        offset = ((np.arange(fine) + 0.5) / fine - 0.5) / oversampling
        grid = (np.arange(size) - size // 2) / oversampling
        distance = self._distance((grid[:, None] + offset).reshape(-1))
        if self.rim == "ramp":
            return np.asarray(np.clip((self.radius - distance) / max(self.edge, 1e-3) + 0.5, 0, 1))
        sharp = np.clip((self.radius - distance) * oversampling * fine + 0.5, 0, 1)
        image = sharp.reshape(size, fine, size, fine).mean(axis=(1, 3))
        return blurred(_over_pixels(image, oversampling), self.edge * oversampling)

    def _distance(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        """Distance from the centre, in units in which the rim lies at `radius`."""
        if self.ratio == 1.0:
            return np.hypot(places[:, None], places)
        c, s = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        along = c * places[None, :] + s * places[:, None]
        across = c * places[:, None] - s * places[None, :]
        root = math.sqrt(self.ratio)
        return np.hypot(along / root, across * root)


@dataclass(frozen=True, eq=False)
class Picture:
    """A probe as a picture: measured in vacuum, or averaged over disks of the data; patterned probes too.

    Parameters
    ----------
    pixels : (y, x) float64
        Counts above the background; only what lies within `radius` px of `center` is the probe.
    center : tuple of float
        The middle of the disk (y, x), in px.
    radius, edge : float
        Radius of its outer rim, and the width of that, in px of the detector.
    step : int
        Samples per pixel of the detector; `center` is in samples.
    """

    pixels: NDArray[np.float64]
    center: tuple[float, float]
    radius: float
    edge: float = 1.0
    step: int = 1

    @property
    def width(self) -> float:
        """Full width of the rim, in px."""
        return self.edge

    def image(self, half: int, oversampling: int = PHASES) -> NDArray[np.float64]:
        """The probe for windows that reach `half` px from its centre, by cubic interpolation; 1 on average inside."""
        size = 2 * (half + 1) * oversampling + 1
        grid = (np.arange(size) - size // 2) / oversampling
        rows = _cubic(self.center[0] + self.step * grid, self.pixels.shape[0])
        columns = _cubic(self.center[1] + self.step * grid, self.pixels.shape[1])
        image = np.maximum(rows @ self.pixels @ columns.T, 0.0)
        distance = np.hypot(grid[:, None], grid)
        image *= np.clip(self.radius + 2.0 - distance, 0, 1)
        inside = image[distance <= self.radius]
        return np.asarray(image / (inside.mean() if inside.size and inside.mean() > 0 else 1.0))


Probe = Disk | Picture


def _cubic(places: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Weights (places, size) of interpolation by the cubic of Catmull and Rom; zero beyond the ends."""
    whole = np.floor(places).astype(int)
    t = places - whole
    weights = (
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )
    out = np.zeros((places.size, size))
    row = np.arange(places.size)
    for shift, weight in zip((-1, 0, 1, 2), weights, strict=True):
        column = whole + shift
        there = (column >= 0) & (column < size)
        np.add.at(out, (row[there], column[there]), weight[there])
    return out


def _over_pixels(image: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """An image averaged over squares of a pixel, whose edges lie on half samples at either end."""
    half = samples // 2
    for _ in range(2):
        padded = np.pad(image, ((half + 1, half), (0, 0)))
        sums = np.cumsum(padded, axis=0)
        wide, narrow = sums[2 * half + 1 :] - sums[: -2 * half - 1], sums[2 * half : -1] - sums[1 : -2 * half]
        image = (0.5 * (wide + narrow) / samples).T
    return image


def smoothed(image: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """An image convolved with the same weights along both axes."""
    size = image.shape[0] + weights.size - 1
    length = 1 << (size - 1).bit_length()
    spectrum = np.fft.rfft(weights, length)
    first = weights.size // 2
    for _ in range(2):
        rows = np.fft.irfft(np.fft.rfft(image, length, axis=1) * spectrum, length, axis=1)
        image = rows[:, first : first + image.shape[1]].T
    return image


def blurred(image: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """An image convolved with a Gaussian of `sigma` samples."""
    if sigma <= 1e-3:
        return image
    places = np.arange(-int(4 * sigma) - 1, int(4 * sigma) + 2)
    weights = np.exp(-0.5 * (places / sigma) ** 2)
    return smoothed(image, weights / weights.sum())
