"""The probe of a strain measurement: as given, as an image of it shows, as found in the sample, or its mean disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample
from gpuem.analyses.lattice_model import Model
from gpuem.analyses.learning import frames_of
from gpuem.analyses.probe import Disk, Picture, Probe, blurred
from gpuem.analyses.probe_finding import FoundProbe, find_probe
from gpuem.backends import cpu_lattice
from gpuem.errors import DataError, RecipeError
from gpuem.formats.array import read_array

if TYPE_CHECKING:
    from gpuem.analyses.strain import Strain

# where the beam wanders, the mean pattern of so many parts of the sample is sharper; so many parts are tried
PARTS, TRIED = (4, 16, 64), 4
# an oversampled cell of a measured probe holds about so many disks at least
LEAST_DISKS = 8
# a measured probe is smoothed by so much, in px: noise between its samples looks like edges
SMOOTH = 0.2


def probe_of(
    asked: Strain, sample: Sample, mean: NDArray[np.float64], good: NDArray[np.bool_]
) -> tuple[FoundProbe, Probe]:
    """The direct beam's disk: as found, and as it is fitted."""
    # a distorted camera makes ellipses of round disks, too
    ratio, angle = asked.ellipticity if asked.ellipticity[0] != 1 else asked.distortion
    if asked.probe is not None:
        own, picture = _of_image(asked, good.shape)
        place = asked.center or _place(sample, mean, good)
        return FoundProbe(place, own.radius, own.edge, ("shape from the image of the probe",)), picture
    if asked.radius is not None:
        _fits_on(f"{asked.name}: radius = {asked.radius:g} px", asked.radius, good.shape)
        edge = asked.edge if asked.edge is not None else 1.0
        found = FoundProbe(asked.center or _place(sample, mean, good), asked.radius, edge, ("radius as given",))
    else:
        found = _found(sample, mean, good)
        if asked.center is not None:
            found = replace(found, center=asked.center)
    return found, Disk(found.radius, found.edge, "ramp", ratio, angle)


def _fits_on(what: str, radius: float, shape: tuple[int, ...]) -> None:
    """Refuse a disk that is larger than the detector."""
    if 2 * radius + 1 >= min(shape):
        raise RecipeError(
            f"{what}: a disk of {2 * radius:.4g} px doesn't fit the detector of {' x '.join(map(str, shape))} px with "
            "its neighbours; radius is half its diameter, in px of the frames as they are read (binned?)"
        )


def _of_image(asked: Strain, shape: tuple[int, ...]) -> tuple[FoundProbe, Picture]:
    """The disk in an image of the probe, without the background around it."""
    what = f"{asked.name}: probe{f' {asked.probe}' if isinstance(asked.probe, Path) else ''}"
    read = read_array(asked.probe, f"{asked.name}: probe") if isinstance(asked.probe, Path) else asked.probe
    values = np.asarray(read)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise RecipeError(
            f"{what}: an image (y, x) of real numbers is needed, found {values.dtype} of the shape {values.shape}; "
            "take the mean of a vacuum scan, or leave probe out"
        )
    image = values.astype(np.float64)
    try:
        own = find_probe(image, np.isfinite(image))
    except DataError as error:
        raise RecipeError(
            f"{what}: no disk is seen in this image of {image.shape[0]} x {image.shape[1]} px ({error}); it must show "
            "the direct beam alone, in px of the frames"
        ) from error
    _fits_on(f"{what}: radius {own.radius:.1f} px", own.radius, shape)
    y, x = np.indices(image.shape)
    distance = np.hypot(y - own.center[0], x - own.center[1])
    around = image[(distance > own.radius + 3) & (distance < own.radius + 8) & np.isfinite(image)]
    ground = float(np.median(around)) if around.size else 0.0
    return own, Picture(np.nan_to_num(image - ground), own.center, own.radius, own.edge)


def _found(sample: Sample, mean: NDArray[np.float64], good: NDArray[np.bool_]) -> FoundProbe:
    """The disk in the mean pattern; where the beam wanders too far for it, in those of parts of the sample."""
    try:
        return find_probe(mean, good)
    except DataError as error:
        first = error
    count = len(sample.frames)
    levels: list[list[FoundProbe]] = []
    for parts in PARTS:
        edges = np.linspace(0, count, parts + 1).astype(int)
        found = []
        for k in np.linspace(0, parts - 1, TRIED).astype(int):
            part = sample.frames[edges[k] : edges[k + 1]]
            if 0 < len(part) < count:
                try:
                    found.append(find_probe(part.mean(axis=0, dtype=np.float64), good))
                except DataError:
                    continue
        # one alone may be a chance
        if len(found) > 1:
            levels.append(found)
    if not levels:
        raise first
    best = min((one for level in levels for one in level), key=lambda one: one.edge / one.radius)
    y, x = np.median([one.center for one in levels[-1]], axis=0).tolist()
    return replace(best, center=(y, x), notes=(*best.notes, "shape from a part of the scan, as the beam wanders"))


def _place(sample: Sample, mean: NDArray[np.float64], good: NDArray[np.bool_]) -> tuple[float, float]:
    """Where the direct beam is, of a probe whose shape is known."""
    try:
        return _found(sample, mean, good).center
    except DataError:
        height, width = mean.shape
        counts = np.where(good, np.maximum(mean, 0.0), 0.0)
        y, x = np.indices(mean.shape)
        total = counts.sum()
        if not total > 0:
            return (height - 1) / 2, (width - 1) / 2
        return float((counts * y).sum() / total), float((counts * x).sum() / total)


def measured(model: Model, sample: Sample) -> Picture:
    """The probe as the mean of all disks of a sample, each moved to the middle.

    The disks lie at all fractions of a pixel, so that many of them tell the probe on a finer grid than one does.

    Parameters
    ----------
    model : Model
        Lattice, and a probe of about the right radius.
    sample : Sample
        Frames that show it.
    """
    rows, noted = cpu_lattice.details(model.fit(), frames_of(sample), sample.positions)
    there = np.isfinite(rows[:, 0])
    disks = int((noted[there, :, cpu_lattice.INTENSITY] > 0).sum())
    step = int(np.clip(np.sqrt(disks / LEAST_DISKS), 1, 4))
    half = int(np.ceil(model.probe.radius + 4))
    size = 2 * half * step + 1
    total, weight = np.zeros((size, size)), np.zeros((size, size))
    good = model.good.reshape(model.shape) > 0 if model.good.size else np.ones(model.shape, np.bool_)
    wide = 2 * half - 1
    for f in np.flatnonzero(there):
        grain = int(rows[f, 13])
        for s in range(model.first[grain], model.first[grain + 1]):
            level, ground = noted[f, s, cpu_lattice.INTENSITY], noted[f, s, cpu_lattice.BACKGROUND]
            y, x = rows[f, :2] + model.sites[s, 0] * rows[f, 2:4] + model.sites[s, 1] * rows[f, 4:6]
            top, left = round(y) - half + 1, round(x) - half + 1
            inside = top >= 0 and left >= 0 and top + wide <= model.shape[0] and left + wide <= model.shape[1]
            if level <= 0 or not inside:
                continue
            cut = np.s_[top : top + wide, left : left + wide]
            values = sample.frames[f][cut].astype(np.float64)
            use = good[cut] & (values < model.saturation)
            at = (top - y + half) * step, (left - x + half) * step
            _share_out(total, np.where(use, values - ground, 0.0), at, step)
            _share_out(weight, level * use, at, step)
    image = np.maximum(np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), 0.0), 0.0)
    middle = float(half * step)
    return Picture(blurred(image, SMOOTH * step), (middle, middle), model.probe.radius, model.probe.edge, step)


def _share_out(array: NDArray[np.float64], values: NDArray[np.float64], at: tuple[float, float], step: int) -> None:
    """Add an image to another with `step` samples a pixel, each pixel shared by its four neighbours there."""
    rows, columns = at[0] + step * np.arange(values.shape[0]), at[1] + step * np.arange(values.shape[1])
    r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for dr in (0, 1):
        wr = 1 - np.abs(rows - r - dr)
        for dc in (0, 1):
            wc = 1 - np.abs(columns - c - dc)
            keep_r, keep_c = (r + dr >= 0) & (r + dr < len(array)), (c + dc >= 0) & (c + dc < len(array))
            part = wr[keep_r, None] * wc[keep_c] * values[np.ix_(keep_r, keep_c)]
            # no two pixels share a sample: they lie a whole step apart
            array[np.ix_(r[keep_r] + dr, c[keep_c] + dc)] += part
