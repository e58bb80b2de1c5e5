"""The look at sampled frames before a strain run: probe, lattice, reflections, noise; what was given is kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample, View
from gpuem.analyses.deformation import axes_matrix, ellipse_matrix
from gpuem.analyses.lattice_finding import FoundLattice, find_lattice
from gpuem.analyses.lattice_sites import centre_plane, describe, sites
from gpuem.analyses.learning import FRAMES, Model, frames_of, learn, noise_of
from gpuem.analyses.positions import registration_of
from gpuem.analyses.probe import Disk, Picture as ProbePicture, Probe
from gpuem.analyses.probe_finding import FoundProbe, find_probe
from gpuem.analyses.reference_lattice import check_reference, crystal_angle
from gpuem.analyses.strain_maps import Picture, StrainFit
from gpuem.backends import cpu_lattice
from gpuem.errors import DataError, InputError, RecipeError
from gpuem.formats.array import read_array

if TYPE_CHECKING:
    from gpuem.analyses.strain import Strain

log = logging.getLogger("gpuem")
# a centre that moves less than this over the scan needs no plane, in px
STEADY = 0.3
# reduced chi^2 that is no crystal: so many times what is usual, and at least so much
UNUSUAL, LEAST_CHI2 = 4.0, 4.0


def look(asked: Strain, view: View, sample: Sample) -> StrainFit:
    """Find in the sample what wasn't given."""
    shape = view.frame_shape
    good = _good(asked, shape)
    region, reference = _reference(asked, view)
    # wide enough for sums of any pixels
    mean = sample.frames.mean(axis=0, dtype=np.float64)
    probe, picture = _probe(asked, mean, good)
    center = asked.center or probe.center
    lattices = _lattices(asked, sample, probe, good, center)
    used = [lattice for lattice in lattices if lattice.kind == "grain"]
    parts = [sites(lattice, shape, probe, mean, good, sample.frames) for lattice in used]
    _enough(asked, parts)
    hk = [part.hk.astype(np.float64) for part in parts]
    starts = np.array([[*lattice.center, *lattice.a, *lattice.b] for lattice in used])
    if asked.center is not None:
        starts[:, :2] = asked.center
    saturation = _saturation(asked, sample)
    axes = _axes(asked, starts[0, 2:].reshape(2, 2))
    width = view.scan_shape[-1] if view.scan_shape else 1
    model = Model(
        picture,
        np.concatenate(hk),
        np.concatenate([[0], np.cumsum([len(part) for part in hk])]).astype(np.int64),
        starts,
        np.zeros((2, 2)),
        np.zeros(0, np.float32) if good.all() else good.astype(np.float32).reshape(-1),
        axes,
        width,
        shape,
        gain=asked.gain,
        read=asked.read_noise if asked.read_noise is not None else _read_noise(view, sample),
        saturation=saturation,
        minimum=asked.min_disks,
    )
    model, usual = _taught(asked, model, sample, view.scan_shape)
    second = next((lattice for lattice in lattices if lattice.kind == "second"), None)
    lines = describe(_refined(probe, model), lattices, parts[0])
    shown = Picture(
        mean,
        tuple(lines),
        (second.center, second.a, second.b, second.score) if second else None,
        tuple(lattice.score for lattice in used),
    )
    limit = asked.max_chi2 if asked.max_chi2 is not None else max(UNUSUAL * usual, LEAST_CHI2)
    for line in lines:
        log.info("%s: %s", asked.name, line)
    facts = {
        "registration": asked.registration,
        "probe_radius_px": float(model.probe.radius),
        "probe_edge_px": float(model.probe.edge),
        "disks_fitted": len(model.sites),
        "max_chi2": float(limit),
        "axes_deg": float(np.degrees(np.arctan2(-axes[1, 0], axes[0, 0]))),
        "found": lines,
    }
    if isinstance(asked.reference, tuple) and region is not None:
        facts["reference_region"] = list(asked.reference)
    fit = registration_of(asked.registration, model, asked.power)
    return StrainFit(asked, model, fit, float(limit), region, reference, shown, facts)


def _good(asked: Strain, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels that count."""
    if asked.mask is None:
        return np.ones(shape, np.bool_)
    hidden = np.asarray(read_array(asked.mask, f"{asked.name}: mask") if isinstance(asked.mask, Path) else asked.mask).astype(np.bool_)
    if hidden.shape != shape:
        raise RecipeError(f"{asked.name}: mask has the shape {hidden.shape}, the detector {shape}")
    if hidden.all():
        raise RecipeError(f"{asked.name}: mask hides every pixel; it must be True where pixels are hidden")
    return ~hidden


def _reference(asked: Strain, view: View) -> tuple[NDArray[np.bool_] | None, NDArray[np.float64] | None]:
    """Scan positions of the reference, or its vectors."""
    given = asked.reference
    if isinstance(given, str):
        return None, None
    if isinstance(given, Path) and given.suffix != ".npy":
        return None, _of_result(asked, given)
    if isinstance(given, tuple) and isinstance(given[0], tuple):
        return None, check_reference(np.array(given, np.float64), f"{asked.name}: reference")
    region = np.zeros(view.scan_shape, np.bool_)
    if isinstance(given, tuple):
        ends = [int(v) for v in given]  # type: ignore[arg-type]
        if len(ends) != 2 * region.ndim:
            raise RecipeError(
                f"{asked.name}: reference {given}: needed are first and end for each of the {region.ndim} scan axes"
            )
        region[tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(ends[::2], ends[1::2], strict=True))] = True
    else:
        mask = np.asarray(read_array(given, f"{asked.name}: reference") if isinstance(given, Path) else given).astype(np.bool_)
        if mask.shape != region.shape:
            raise RecipeError(f"{asked.name}: reference has the shape {mask.shape}, the scan {region.shape}")
        region = mask
    if not region.any():
        raise RecipeError(
            f"{asked.name}: reference region {given if isinstance(given, tuple) else ''} holds none of the "
            f"{region.size} scan positions of {' x '.join(map(str, region.shape))}; give (y0, y1, x0, x1) inside it"
        )
    return region.reshape(-1), None


def _of_result(asked: Strain, path: Path) -> NDArray[np.float64]:
    """The reference lattice of another result."""
    import zarr

    try:
        root: Any = zarr.open_group(path, mode="r")
        names = [name for name in root.group_keys() if "exx" in root[name]]
        attributes = root[asked.name if asked.name in names else names[0]]["exx"].attrs
        return check_reference(np.array([attributes["reference_a"], attributes["reference_b"]]), str(path))
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{path}: no reference lattice in it ({type(error).__name__}); it must be the result of a strain analysis "
            "with one lattice (.zarr), or a mask of the scan (.npy)"
        ) from error


def _probe(asked: Strain, mean: NDArray[np.float64], good: NDArray[np.bool_]) -> tuple[FoundProbe, Probe]:
    """The direct beam's disk: as found, and as it is fitted."""
    ratio, angle = asked.ellipticity
    if asked.probe is not None:
        image = np.asarray(read_array(asked.probe, f"{asked.name}: probe") if isinstance(asked.probe, Path) else asked.probe, np.float64)
        if image.ndim != 2:
            raise RecipeError(f"{asked.name}: probe: an image (y, x) is needed, found the shape {image.shape}")
        own = find_probe(image, np.isfinite(image))
        y, x = np.indices(image.shape)
        distance = np.hypot(y - own.center[0], x - own.center[1])
        around = image[(distance > own.radius + 3) & (distance < own.radius + 8)]
        ground = float(np.median(around)) if around.size else 0.0
        picture = ProbePicture(np.nan_to_num(image) - ground, own.center, own.radius, own.edge)
        place = asked.center or _place(mean, good, own)
        return FoundProbe(place, own.radius, own.edge, ("shape from the image of the probe",)), picture
    if asked.radius is not None:
        edge = asked.edge if asked.edge is not None else 1.0
        found = FoundProbe(asked.center or (0.0, 0.0), asked.radius, edge, ("radius as given",))
        if asked.center is None:
            found = replace(found, center=_place(mean, good, found))
    else:
        found = find_probe(mean, good)
    return found, Disk(found.radius, found.edge, "ramp", ratio, angle)


def _place(mean: NDArray[np.float64], good: NDArray[np.bool_], known: FoundProbe) -> tuple[float, float]:
    """Where the direct beam is, of a probe whose shape is known."""
    try:
        return find_probe(mean, good).center
    except DataError:
        height, width = mean.shape
        smooth = np.where(good, mean, 0.0)
        y, x = np.indices(mean.shape)
        total = smooth.sum()
        if total <= 0:
            return (height - 1) / 2, (width - 1) / 2
        return float((smooth * y).sum() / total), float((smooth * x).sum() / total)


def _lattices(
    asked: Strain, sample: Sample, probe: FoundProbe, good: NDArray[np.bool_], center: tuple[float, float]
) -> list[FoundLattice]:
    """Lattices to fit, and the second choice."""
    if asked.a is None or asked.b is None:
        return find_lattice(sample.frames, replace(probe, center=center), good, center=asked.center)
    every = np.arange(len(sample.frames))
    given = [(asked.a, asked.b), *asked.lattices]
    for a, b in given:
        check_reference(np.array([a, b], np.float64), f"{asked.name}: lattice")
    return [FoundLattice(center, a, b, 1.0, 1.0, every, len(every), "grain") for a, b in given]


def _enough(asked: Strain, parts: list[Any]) -> None:
    """Refuse a lattice with too few disks."""
    for part in parts:
        rank = np.linalg.matrix_rank(np.column_stack([np.ones(len(part.hk)), part.hk])) if len(part.hk) else 0
        if len(part.hk) < asked.min_disks or rank < 3:
            raise DataError(
                f"{asked.name}: {len(part.hk)} disk{'' if len(part.hk) == 1 else 's'} of the lattice stand out of the "
                f"background{' on one line' if len(part.hk) >= asked.min_disks else ''}; {asked.min_disks} that span "
                "a plane are needed (min_disks). Is the beam on a crystal, are a, b and radius right?"
            )


def _saturation(asked: Strain, sample: Sample) -> float:
    """Counts from which a pixel is saturated: the largest that the type holds, where it occurs."""
    if asked.saturation is not None:
        return asked.saturation
    kind = sample.frames.dtype
    if kind.kind in "ui" and kind.itemsize <= 4:
        top = np.iinfo(kind).max
        if sample.frames.max() == top:
            log.info("%s: pixels of %d counts are saturated and left out", asked.name, top)
            return float(top)
    return float("inf")


def _read_noise(view: View, sample: Sample) -> float:
    """Noise of a pixel without electrons: none for counts; for real numbers from the darkest pixels' spread."""
    if view.dtype.kind != "f":
        return 0.05
    flat = sample.frames.reshape(len(sample.frames), -1)
    dark = np.argsort(flat.mean(axis=0))[: max(16, flat.shape[1] // 50)]
    spread = flat[:, dark].astype(np.float64)
    return max(float(np.sqrt(max(spread.var() - max(spread.mean(), 0.0), 0.0))), 0.05)


def _axes(asked: Strain, lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """From detector (x, y) to the axes of the strain: distortion undone, then turned."""
    undone = ellipse_matrix(*asked.distortion)
    angle = crystal_angle(lattice, asked.axes, undone) if isinstance(asked.axes, tuple) else asked.axes
    return np.asarray(axes_matrix(angle) @ undone)


def _taught(asked: Strain, model: Model, sample: Sample, scan: tuple[int, ...]) -> tuple[Model, float]:
    """The model as the sample teaches it, and the reduced chi^2 that is usual."""
    count = len(model.sites)
    model = replace(
        model, insides=np.ones((count, 1)), priors=np.tile([0.05**2, 0.2**2, 0.0, 0.0, 0.0], (count, 1))
    )
    some = np.unique(np.linspace(0, len(sample.frames) - 1, min(len(sample.frames), 2 * FRAMES)).round().astype(int))
    few = Sample(sample.frames[some], sample.positions[some])
    rows = cpu_lattice.details(model.fit(), frames_of(few), few.positions)[0]
    fitted = np.isfinite(rows[:, 0])
    if not fitted.any():
        raise DataError(
            f"{asked.name}: the lattice that was found fits none of {len(rows)} sampled frames; give center, a, b and "
            "radius, and look at the picture of gpuem check"
        )
    if len(scan) and fitted.sum() >= 8:
        plane = centre_plane(few.positions, scan, np.where(fitted[:, None], rows[:, :2], np.nan))
        moves = float(np.abs(plane[1:] * np.array([[np.prod(scan[:-1])], [scan[-1]]])).max())
        if np.isfinite(plane).all() and moves > STEADY:
            lattices = model.lattices.copy()
            lattices[:, :2] = plane[0]
            model = replace(model, lattices=lattices, drift=plane[1:].T.copy())
    if asked.learn == "measured":
        model = replace(model, probe=_measured(model, few, rows))
    if asked.learn == "nothing":
        model = noise_of(model, few)
    else:
        rim = asked.learn in ("reflections", "disk") and asked.edge is None
        model = learn(model, few, rim=rim, insides=asked.learn == "reflections")
    rows = cpu_lattice.details(model.fit(), frames_of(few), few.positions)[0]
    chi2 = rows[np.isfinite(rows[:, 0]), 10]
    return model, float(np.median(chi2)) if chi2.size else 1.0


def _measured(model: Model, sample: Sample, rows: NDArray[np.float64]) -> Probe:
    """The probe as the mean of all disks of a sample, each moved to the middle."""
    noted = cpu_lattice.details(model.fit(), frames_of(sample), sample.positions)[1]
    radius = model.probe.radius
    half = int(np.ceil(radius + 4))
    step = 2
    size = 2 * half * step + 1
    total, weight = np.zeros((size, size)), np.zeros((size, size))
    height, width = model.shape
    for f in np.flatnonzero(np.isfinite(rows[:, 0])):
        grain = int(rows[f, 13])
        for s in range(model.first[grain], model.first[grain + 1]):
            level, ground = noted[f, s, 0], noted[f, s, 1]
            y, x = rows[f, :2] + model.sites[s, 0] * rows[f, 2:4] + model.sites[s, 1] * rows[f, 4:6]
            top, left = round(y) - half + 1, round(x) - half + 1
            if level <= 0 or top < 0 or left < 0 or top + 2 * half - 2 >= height or left + 2 * half - 2 >= width:
                continue
            part = sample.frames[f, top : top + 2 * half - 2, left : left + 2 * half - 2].astype(np.float64) - ground
            for array, values in ((total, part), (weight, np.full(part.shape, level))):
                _splat(array, values, (top - y + half) * step, (left - x + half) * step, step)
    known = weight > 0
    image = np.where(known, total / np.where(known, weight, 1.0), 0.0)
    # back to whole pixels: the image is smooth on that scale where it was filled
    pixels = image[::step, ::step]
    return ProbePicture(np.maximum(pixels, 0.0), (float(half), float(half)), radius, model.probe.edge)


def _splat(array: NDArray[np.float64], values: NDArray[np.float64], y: float, x: float, step: int) -> None:
    """Add values to an image with `step` samples a pixel, each shared by its four neighbours."""
    rows = y + step * np.arange(values.shape[0])
    columns = x + step * np.arange(values.shape[1])
    r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
    for dr in (0, 1):
        wr = np.where(dr, rows - r, 1 - rows + r)
        for dc in (0, 1):
            wc = np.where(dc, columns - c, 1 - columns + c)
            ok_r, ok_c = (r + dr >= 0) & (r + dr < len(array)), (c + dc >= 0) & (c + dc < len(array))
            array[np.ix_(r[ok_r] + dr, c[ok_c] + dc)] += (wr[:, None] * wc * values)[np.ix_(ok_r, ok_c)]


def _refined(found: FoundProbe, model: Model) -> FoundProbe:
    """The probe in words, with the radius that was learned."""
    return replace(found, radius=float(model.probe.radius), edge=float(model.probe.edge), center=tuple(model.lattices[0, :2]))
