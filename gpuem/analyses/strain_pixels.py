"""Which pixels count for a strain measurement, and the noise of one: mask, defects, saturation, read noise."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample, View
from gpuem.analyses.probe_finding import plausible
from gpuem.errors import InputError, RecipeError
from gpuem.formats.array import read_array

if TYPE_CHECKING:
    from gpuem.analyses.strain import Strain

log = logging.getLogger("gpuem")
# frames from which dead and hot pixels are told from chance
ENOUGH = 8
# a pixel is saturated where so many more have the largest value than the values below; not at few counts
PILED_UP, FEW_COUNTS = 5.0, 30
# more defects than this part of the pixels are no defects
MOST_DEFECTS = 0.02
# a detector on which no lattice of disks has room, in px
SMALLEST = 12


def good_pixels(asked: Strain, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels that count."""
    if min(shape) < SMALLEST:
        raise InputError(
            f"{asked.name}: frames of {shape[0]} x {shape[1]} px have no room for a lattice of disks (at least "
            f"{SMALLEST} px); are scan and detector axes the right way round, (scan..., y, x)?"
        )
    if asked.center is not None and not all(0 <= c <= n - 1 for c, n in zip(asked.center, shape, strict=True)):
        raise RecipeError(
            f"{asked.name}: center = {asked.center} px (y, x) lies outside the detector of {shape[0]} x {shape[1]} px"
        )
    if asked.mask is None:
        return np.ones(shape, np.bool_)
    what = f"{asked.name}: mask"
    hidden = np.asarray(read_array(asked.mask, what) if isinstance(asked.mask, Path) else asked.mask).astype(np.bool_)
    if hidden.shape != shape:
        raise RecipeError(
            f"{what} has the shape {hidden.shape}, the detector {shape} (y, x); it must be True where pixels are hidden"
        )
    if hidden.all():
        raise RecipeError(f"{what} hides every pixel; it must be True where pixels are hidden")
    return ~hidden


def without_defects(
    asked: Strain, mean: NDArray[np.float64], good: NDArray[np.bool_], frames: int
) -> NDArray[np.bool_]:
    """Leave out single pixels that are dead or hot all over the scan."""
    low = float(np.quantile(mean[good], 0.02))
    if low < -0.5 * asked.gain:
        log.warning(
            "%s: the darkest pixels have %.3g counts: negative backgrounds aren't fitted, sigma will be wrong; correct "
            "the frames with a dark image that fits them", asked.name, low
        )  # fmt: skip
    if frames < ENOUGH:
        return good
    usable = plausible(np.where(good, mean, 0.0), good)
    left_out = int(np.count_nonzero(good & ~usable))
    if left_out > MOST_DEFECTS * good.size:
        # that many aren't defects but how the data are
        return good
    if left_out:
        log.info("%s: %d pixels are dead or hot and left out (mask= says which for sure)", asked.name, left_out)
    return usable


def saturation_of(asked: Strain, sample: Sample) -> float:
    """Counts from which a pixel is saturated: the largest value, where the pixels that have it pile up."""
    if asked.saturation is not None:
        return asked.saturation
    frames = sample.frames
    if frames.dtype.kind not in "ui":
        return math.inf
    top = int(frames.max())
    full = frames.dtype.itemsize <= 4 and top == np.iinfo(frames.dtype).max
    if not full and top < FEW_COUNTS:
        return math.inf
    near = max(3, top // 50)
    at_top, below = (int(np.count_nonzero(frames >= v)) for v in (top, top - near))
    if full or at_top > 10 + PILED_UP * (below - at_top) / near:
        log.info("%s: %d pixels of %d counts are saturated and left out", asked.name, at_top, top)
        return float(top)
    return math.inf


def read_noise(asked: Strain, view: View, sample: Sample) -> float:
    """Noise of a pixel without electrons: none for counts; for real numbers from the darkest pixels' spread."""
    if asked.read_noise is not None:
        return asked.read_noise
    if view.dtype.kind != "f":
        return 0.05
    flat = sample.frames.reshape(len(sample.frames), -1)
    dark = np.argsort(flat.mean(axis=0, dtype=np.float64))[: max(16, flat.shape[1] // 50)]
    spread = flat[:, dark].astype(np.float64)
    counted = asked.gain * max(float(spread.mean()), 0.0)
    return max(math.sqrt(max(float(spread.var()) - counted, 0.0)), 0.05 * min(asked.gain, 1.0))
