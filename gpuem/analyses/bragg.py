"""Bragg disks of every frame, wherever they are: positions and counts, for patterns whose lattice is not known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, InstanceOf, model_validator
from pydantic.json_schema import SkipJsonSchema

from gpuem.analyses import Map, Sample, View
from gpuem.analyses.model import ALL_FRAMES, Centered, Name
from gpuem.axes import Axis
from gpuem.backends import Sums, Weights
from gpuem.backends.peaks import PeakSearch, Subpixel, soft_disk, wrapped, zero_mean_kernel
from gpuem.errors import RecipeError
from gpuem.formats.array import read_array

# the ring that is subtracted ends here, in radii of the disk: of the sizes that were tried the most precise one, with
# about the area of the disk
RING = 1.5
# scan positions whose peaks are put into the histogram at once
_ROWS = 1 << 14


class Bragg(Centered):
    """Positions and counts of the Bragg disks of every frame, by correlation with the probe's disk.

    The correlation is with the disk minus a ring around it. Maps of scan shape: ``count``; with a further axis
    ``peak``, brightest first and NaN where there are fewer: ``y``, ``x`` (px) and ``intensity`` (counts of the disk
    above its surroundings, for ``power = 1``). Of detector shape: ``vectors``, the intensities of all peaks of all
    frames at their positions, each shared among the four nearest pixels.

    Parameters
    ----------
    name : str
        Name of the maps: ``name/count`` and so on.
    center : tuple of float or "auto"
        The direct beam (y, x) in px; "auto": measured in a sample of frames. With it the axes of ``vectors`` count from
        there, so that they are scattering vectors, and the attributes of ``count`` tell it; ``y`` and ``x`` stay pixels
        of the detector.
    radius : float
        Radius of the disks in px; found in the data where neither it nor `probe` is given.
    edge : float
        Full width of the disks' soft edge in px.
    probe : path or array
        An image (y, x) of the probe, .npy or .tif, such as the pattern without a specimen; any shape of aperture.
    power : float
        1: cross-correlation; 0: phase correlation; between: hybrid. Below 1 helps with structure inside the disks
        at high dose, and hurts where there are few counts.
    sigma : float
        Standard deviation of a Gaussian that smooths the correlation, in px.
    subpixel : {"upsample", "parabola", "none"}
        How positions between pixels are found; "parabola" is faster and pulls towards whole pixels by some 0.01 px.
    min_intensity : float
        Least intensity, as a part of that of the brightest disk of the frame.
    min_counts : float
        Least intensity in counts.
    min_spacing : float
        Least distance from a brighter disk in px; default the radius.
    margin : int
        Disks whose centre is nearer than this to the detector's edge are left out, in px; default the radius, rounded
        up.
    max_peaks : int
        Most disks of a frame, the brightest.
    """

    kind: Literal["bragg"] = "bragg"
    name: Name = "bragg"
    radius: float | None = Field(default=None, ge=1)
    edge: float = Field(default=1.0, gt=0)
    probe: Path | SkipJsonSchema[InstanceOf[np.ndarray[Any, Any]]] | None = None
    power: float = Field(default=1.0, ge=0, le=1)
    sigma: float = Field(default=0.0, ge=0)
    subpixel: Subpixel = "upsample"
    min_intensity: float = Field(default=0.01, ge=0, le=1)
    min_counts: float = Field(default=0.0, ge=0)
    min_spacing: float | None = Field(default=None, ge=0)
    margin: int | None = Field(default=None, ge=0)
    max_peaks: int = Field(default=64, ge=1, le=4096)

    @model_validator(mode="after")
    def _one_probe(self) -> Bragg:
        if self.radius is not None and self.probe is not None:
            raise ValueError("radius and probe: give one of them; the radius of a probe is measured")
        return self

    def sample_frames(self, view: View) -> int:
        """All that there are, unless everything was given."""
        return ALL_FRAMES if self.center == "auto" or (self.radius is None and self.probe is None) else 0

    def look(self, view: View, sample: Sample) -> Bragg:
        """With the direct beam, the radius and the edge of the disks as the sample shows them, where not given."""
        centered = super().look(view, sample)
        if self.radius is not None or self.probe is not None:
            return centered
        from gpuem.analyses.probe_finding import find_probe

        mean = sample.frames.mean(axis=0, dtype=np.float64)
        found = find_probe(mean, np.isfinite(mean))
        return centered.model_copy(update={"radius": float(found.radius), "edge": float(found.edge)})

    def weights(self, view: View) -> Weights:
        """A search for peaks in the correlation of whole frames."""
        return Weights(fits=(self._search(view),))

    def map_nbytes(self, view: View) -> int:
        """Bytes per scan position: the maps are views of what was found, but for one that is being written."""
        return 4 * self.max_peaks + 64

    def finish(self, view: View, sums: Sums, valid: NDArray[np.bool_]) -> dict[str, Map]:
        """Peaks of every frame, and their histogram."""
        rows = sums.fits[0]
        axes = (*view.scan, Axis("peak", self.max_peaks))
        shape = (*view.scan_shape, self.max_peaks)
        counts = "counts" if self.power == 1 else ""
        search = self._search(view)
        facts: dict[str, Any] = {"power": self.power, "spacing_px": search.spacing, "margin_px": search.edge}
        facts |= {} if self.radius is None else {"radius_px": self.radius, "edge_px": self.edge}
        detector = view.detector
        if self.center is not None:
            place = self.center_in(view)
            facts |= self.center_facts(view)
            y, x = (replace(a, origin=-c * a.step) for a, c in zip(detector, place, strict=True))
            detector = (y, x)
        return {
            "count": Map(rows[:, 0].reshape(view.scan_shape), view.scan, "", "number of Bragg disks", facts),
            "y": Map(rows[:, 1::3].reshape(shape), axes, "px", "y of the Bragg disks, brightest first"),
            "x": Map(rows[:, 2::3].reshape(shape), axes, "px", "x of the Bragg disks, brightest first"),
            "intensity": Map(
                rows[:, 3::3].reshape(shape), axes, counts, "counts of the disks above their surroundings"
            ),
            "vectors": Map(
                vector_map(rows, view.frame_shape), detector, counts, "intensities of all disks of all frames"
            ),
        }

    def _search(self, view: View) -> PeakSearch:
        disk, radius, inner = self._disk()
        shape = view.frame_shape
        outer = RING * radius if RING * radius >= inner + 1 else inner + 1
        half = math.ceil(outer)
        if 2 * half + 1 > min(shape):
            raise RecipeError(
                f"{self.name}: a disk of radius {radius:g} px and the ring around it need {2 * half + 1} px, the "
                f"detector has {shape[0]}x{shape[1]}; check the radius, or bin the data less"
            )
        return PeakSearch(
            wrapped(zero_mean_kernel(disk(half), inner, outer), shape),
            power=self.power,
            sigma=self.sigma,
            subpixel=self.subpixel,
            edge=math.ceil(radius) if self.margin is None else self.margin,
            min_absolute=self.min_counts,
            min_relative=self.min_intensity,
            spacing=radius if self.min_spacing is None else self.min_spacing,
            max_peaks=self.max_peaks,
        )

    def _disk(self) -> tuple[Any, float, float]:
        """A function that draws the disk on (2 half + 1)^2 px, its radius, and where the ring may begin."""
        if self.probe is None:
            if self.radius is None:
                raise RecipeError(f"{self.name}: give the disks' radius in px, or an image of the probe")
            radius, edge = self.radius, self.edge
            return (lambda half: soft_disk(radius, edge, half)), radius, radius + edge / 2
        if isinstance(self.probe, np.ndarray):
            image: NDArray[Any] = self.probe
            what = f"{self.name}: probe"
        else:
            image = read_array(self.probe, f"{self.name}: probe")
            what = f"{self.name}: probe {self.probe}"
        if image.ndim != 2 or image.dtype.kind not in "uif" or not np.isfinite(image).all() or not image.any():
            raise RecipeError(f"{what}: {image.dtype} {image.shape} isn't an image (y, x) with counts in it")
        return _measured(image, what)


def _measured(image: NDArray[Any], what: str) -> tuple[Any, float, float]:
    """The disk of a probe's image as a function that draws it centred, its radius, and where a ring may begin.

    The background is the median; the disk is what reaches half of the median of all pixels that reach a fifth of the
    largest; its centre is their centre of mass.
    """
    values = image.astype(np.float64) - np.median(image)
    # a flat image has nothing above its median
    level = float(np.median(values[values > 0.2 * values.max()])) if values.max() > 0 else np.inf
    bright = values > 0.5 * level
    if bright.mean() > 0.5 or bright.sum() < 4:
        raise RecipeError(
            f"{what}: no disk on a dark background; {int(bright.sum())} of {bright.size} pixels are bright"
        )
    y, x = np.nonzero(bright)
    weight = values[bright]
    cy, cx = float((y * weight).sum() / weight.sum()), float((x * weight).sum() / weight.sum())
    # the rim decides, so that patterned apertures count as what they are enclosed by
    radius = float(np.percentile(np.hypot(y - cy, x - cx), 98)) + 0.5

    def draw(half: int) -> NDArray[np.float64]:
        reach = np.arange(-half, half + 1)
        drawn = _bilinear(values, cy + reach, cx + reach)
        drawn[np.hypot(reach[:, None], reach[None, :]) > radius + 1] = 0
        return np.asarray(np.maximum(drawn, 0) / level)

    return draw, radius, radius + 1


def _bilinear(image: NDArray[np.float64], y: NDArray[Any], x: NDArray[Any]) -> NDArray[np.float64]:
    """Values of an image on a grid of rows y and columns x, 0 off the image."""
    found = image
    for axis, at in ((0, y), (1, x)):
        low = np.floor(at).astype(int)
        part = np.reshape(at - low, (-1, 1) if axis == 0 else (1, -1))
        padded = np.pad(found, [(1, 1) if axis == k else (0, 0) for k in range(2)])
        size = found.shape[axis]
        first = np.take(padded, np.clip(low + 1, 0, size + 1), axis)
        second = np.take(padded, np.clip(low + 2, 0, size + 1), axis)
        found = np.asarray((1 - part) * first + part * second)
    return found


def vector_map(rows: NDArray[np.float32], shape: tuple[int, int]) -> NDArray[np.float64]:
    """Histogram of peaks on the detector, weighted by their heights, each shared among the four nearest pixels.

    Parameters
    ----------
    rows : (n, 1 + 3 peaks) float32
        Of each frame what `PeakSearch` found.
    shape : tuple of int
        Detector shape (y, x).
    """
    height, width = shape
    total = np.zeros(height * width)
    for first in range(0, len(rows), _ROWS):
        peaks = rows[first : first + _ROWS, 1:].reshape(-1, 3)
        y, x, weight = peaks[np.isfinite(peaks[:, 0])].astype(np.float64).T
        y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
        y0, x0 = np.minimum(y.astype(np.int64), height - 2), np.minimum(x.astype(np.int64), width - 2)
        dy, dx = y - y0, x - x0
        for below, part_y in ((0, 1 - dy), (1, dy)):
            for right, part_x in ((0, 1 - dx), (1, dx)):
                place = (y0 + below) * width + x0 + right
                total += np.bincount(place, weight * part_y * part_x, minlength=total.size)
    return total.reshape(shape)
