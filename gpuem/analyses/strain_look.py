"""The look at sampled frames before a strain run: probe, lattice, reflections, noise; what was given is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample, View
from gpuem.analyses.deformation import axes_matrix, ellipse_matrix
from gpuem.analyses.lattice_finding import FoundLattice, find_lattice
from gpuem.analyses.lattice_model import Model
from gpuem.analyses.lattice_origin import Origin, rank_origins
from gpuem.analyses.lattice_sites import Sites, centre_plane, describe, measure_sites, sites
from gpuem.analyses.learning import FRAMES, frames_of, learn, noise_of, untaught
from gpuem.analyses.positions import registration_of
from gpuem.analyses.probe import Probe
from gpuem.analyses.probe_finding import FoundProbe
from gpuem.analyses.reference_lattice import crystal_angle
from gpuem.analyses.strain_errors import NO_ERRORS, strain_errors
from gpuem.analyses.strain_given import given_centre, given_lattices
from gpuem.analyses.strain_maps import Picture, StrainFit
from gpuem.analyses.strain_pixels import good_pixels, read_noise, saturation_of, without_defects
from gpuem.analyses.strain_probe import measured, probe_of
from gpuem.analyses.strain_reference import described_alike, reference_of
from gpuem.backends import cpu_lattice
from gpuem.errors import DataError

if TYPE_CHECKING:
    from gpuem.analyses.strain import Strain

log = logging.getLogger("gpuem")
# a centre that moves less than this over the scan needs no plane, in px
STEADY = 0.3
# reduced chi^2 that is no crystal: so many times what is usual, and at least so much
UNUSUAL, LEAST_CHI2 = 4.0, 4.0
# that much of it in the sample is strange
STRANGE = 8.0
# a lattice that explains less than this part of what the best one does is chance among noise
CHANCE = 0.8
# a frame whose vectors differ from those of most by this part of their length isn't that lattice
WRONG = 0.1
# a lattice that was given and has less than this part of its disks may be a wrong one
FEW_FOUND = 0.6
# part of the rims of disks that must be free of neighbours
LEAST_ALONE = 0.1
# frames from which a plane through the centres is told
ENOUGH = 8


def look(asked: Strain, view: View, sample: Sample) -> StrainFit:
    """Find in the sample what wasn't given."""
    good = good_pixels(asked, view.frame_shape)
    region, reference = reference_of(asked, view.scan_shape, sample.wanted)
    mean = sample.mean
    good = without_defects(asked, mean, good, len(sample.frames))
    probe, disk = probe_of(asked, sample, mean, good)
    lattices = _lattices(asked, sample, probe, good)
    used = _grains(asked, lattices)
    plane = _plane(asked, used[0], sample, view.scan_shape)
    used, plane, origin = _placed(asked, used, probe, (mean, good), sample, (plane, view.scan_shape))
    parts = [_sites(asked, lattice, probe, (mean, good), sample, (plane, view.scan_shape)) for lattice in used]
    model = _model(asked, view, sample, good, disk, used, parts, plane)
    if reference is not None and len(used) == 1:
        reference = described_alike(reference, model.lattices[0, 2:].reshape(2, 2))
    _rims_alone(asked, model)
    shown = _of_crystal(sample, used)
    model, usual = _taught(asked, model, shown, view.scan_shape)
    model, used = _measured_lattices(asked, model, shown, used)
    found = _refined(asked, probe, model, used[0].center, origin)
    lines = _lines(asked, found, lattices, used, parts, _wander(model.drift, view.scan_shape))
    second = next((lattice for lattice in lattices if lattice.kind == "second"), None)
    picture = Picture(
        mean,
        tuple(lines),
        (second.center, second.a, second.b, second.score) if second else None,
        tuple(lattice.score for lattice in used),
        origin.runner,
    )
    limit = asked.max_chi2
    if limit is None:
        # of places of disks nobody knows what is usual: structure inside them moves them
        limit = max(UNUSUAL * usual, LEAST_CHI2) if asked.registration == "lattice" else np.inf
        if usual > STRANGE and asked.registration == "lattice":
            log.warning(
                "%s: reduced chi^2 is %.1f in the sample, 1 where the model explains the pixels: is it the right "
                "lattice (picture of gpuem check), are there %g counts per electron (gain=)?",
                asked.name, usual, asked.gain,
            )  # fmt: skip
    for line in lines:
        log.info("%s: %s", asked.name, line)
    facts = {
        "registration": asked.registration,
        "probe_radius_px": float(model.probe.radius),
        "probe_edge_px": float(model.probe.width),
        "disks_fitted": len(model.sites),
        "max_chi2": float(limit) if np.isfinite(limit) else None,
        "axes_deg": _angle(asked, model.lattices[0, 2:].reshape(2, 2)),
        **_of_origin(asked, origin),
        "found": lines,
    }
    fit = registration_of(asked.registration, model, asked.power, view.scan_shape)
    errors = NO_ERRORS
    if asked.registration == "lattice":
        errors = strain_errors(model, shown)
        facts["sigma_counting_factor"], facts["sigma_model"] = errors.counting**0.5, np.sqrt(errors.model).tolist()
    return StrainFit(asked, model, fit, float(limit), region, reference, picture, facts, errors)


# ---- lattices


def _lattices(asked: Strain, sample: Sample, probe: FoundProbe, good: NDArray[np.bool_]) -> list[FoundLattice]:
    """Lattices to fit, and the second choice."""
    if asked.a is None or asked.b is None:
        return find_lattice(sample.frames, probe, good, center=asked.center)
    return given_lattices(asked, ((asked.a, asked.b), *asked.lattices), sample, probe, good)


def _grains(asked: Strain, lattices: Sequence[FoundLattice]) -> list[FoundLattice]:
    """The lattices to fit: a basis that was found in amorphous frames is chance, and explains less."""
    grains = [lattice for lattice in lattices if lattice.kind == "grain"]
    best = max(lattice.share for lattice in grains)
    kept = [lattice for lattice in grains if lattice.share >= CHANCE * best]
    if asked.registration != "lattice":
        # the others know one lattice
        kept = kept[:1]
    for lattice in grains:
        if lattice not in kept:
            log.info("%s: not fitted: %s", asked.name, lattice.describe())
    return kept


def _plane(asked: Strain, lattice: FoundLattice, sample: Sample, scan: tuple[int, ...]) -> NDArray[np.float64]:
    """How the centre of a found lattice wanders over the scan, as `centre_plane` tells it."""
    still = np.array([asked.center or lattice.center, (0.0, 0.0), (0.0, 0.0)])
    if not scan or lattice.frames.size < ENOUGH:
        return still
    return _moving(centre_plane(sample.positions[lattice.frames], scan, lattice.centers), scan, still)


def _moving(plane: NDArray[np.float64], scan: tuple[int, ...], still: NDArray[np.float64]) -> NDArray[np.float64]:
    """The plane, where the centre moves enough over the scan to need one."""
    moves = np.abs(plane[1:] * np.array([[math.prod(scan[:-1])], [scan[-1]]])).max()
    return plane if np.isfinite(plane).all() and moves > STEADY else still


def _placed(
    asked: Strain, used: list[FoundLattice], probe: FoundProbe, pixels: tuple[NDArray[np.float64], NDArray[np.bool_]],
    sample: Sample, wander: tuple[NDArray[np.float64], tuple[int, ...]],
) -> tuple[list[FoundLattice], NDArray[np.float64], Origin]:  # fmt: skip
    """The lattices, and the plane of their centre, about the site that is the direct beam."""
    (mean, good), (plane, scan), lattice = pixels, wander, used[0]
    here, mean, frames = _still(lattice, lattice.center, mean, sample, plane, scan)
    found = measure_sites(here, good.shape, probe, mean, good, frames)
    others = [(np.array(one.center), np.array([one.a, one.b])) for one in used[1:]]
    ranked = rank_origins(found, good.shape, others)
    moved = plane.copy()
    if asked.center is not None:
        origin = given_centre(asked, ranked, lattice, _wander(plane[1:].T, scan), probe.radius)
        return [_about(one, asked.center) for one in used], moved, origin
    origin = ranked[0]
    if not origin.sure:
        log.warning(
            "%s: which disk is the direct beam isn't sure: (%.1f, %.1f) px, %s. Strain hardly depends on it; center= "
            "says which", asked.name, *origin.place, origin.describe(),
        )  # fmt: skip
    moved[0] += np.array(origin.place) - lattice.center
    return [_about(one, origin.place) for one in used], moved, origin


def _about(lattice: FoundLattice, place: tuple[float, float]) -> FoundLattice:
    """A lattice about that of its sites which is nearest to a place."""
    off = np.array(place) - lattice.center
    steps = np.rint(off @ np.linalg.inv(np.array([lattice.a, lattice.b])))
    y, x = (lattice.center + steps @ np.array([lattice.a, lattice.b])).tolist()
    return replace(lattice, center=(y, x), centers=lattice.centers + steps @ lattice.bases)


def _still(
    lattice: FoundLattice, center: tuple[float, float], mean: NDArray[np.float64], sample: Sample,
    plane: NDArray[np.float64], scan: tuple[int, ...],
) -> tuple[FoundLattice, NDArray[np.float64], NDArray[Any]]:  # fmt: skip
    """The lattice's frames and their mean, moved so that its centre stays where the beam wanders."""
    frames = sample.frames
    if np.abs(plane[1:]).any():
        # those that show the lattice are few
        rows = np.column_stack(np.divmod(sample.positions[lattice.frames], scan[-1]))
        shifts = np.rint(center - plane[0] - rows @ plane[1:]).astype(int)
        frames = np.stack(
            [_shifted(sample.frames[f], *s) for f, s in zip(lattice.frames, shifts.tolist(), strict=True)]
        )
        mean = frames.mean(axis=0, dtype=np.float64)
        lattice = replace(lattice, frames=np.arange(len(frames)))
    return lattice, mean, frames


def _sites(
    asked: Strain, lattice: FoundLattice, probe: FoundProbe, pixels: tuple[NDArray[np.float64], NDArray[np.bool_]],
    sample: Sample, wander: tuple[NDArray[np.float64], tuple[int, ...]],
) -> Sites:  # fmt: skip
    """Reflections that are there, in frames moved so that the direct beam stays."""
    good, center = pixels[1], asked.center or lattice.center
    here, mean, frames = _still(lattice, center, pixels[0], sample, *wander)
    found = sites(replace(here, center=center), good.shape, probe, mean, good, frames)
    rank = np.linalg.matrix_rank(np.column_stack([np.ones(len(found.hk)), found.hk]))
    if len(found.hk) < asked.min_disks or rank < 3:
        raise DataError(
            f"{asked.name}: {len(found.hk)} disks of the lattice stand out of the background; {asked.min_disks} that "
            "span a plane are needed (min_disks). Is the beam on a crystal, are a, b and radius right?"
        )
    return found


def _shifted(frame: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """A frame moved by whole pixels; nothing comes in from beyond the edge."""
    out = np.zeros_like(frame)
    height, width = frame.shape
    if abs(down) < height and abs(right) < width:
        to = np.s_[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
        source = np.s_[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]
        out[to] = frame[source]
    return out


# ---- the model


def _model(
    asked: Strain, view: View, sample: Sample, good: NDArray[np.bool_], probe: Probe, used: Sequence[FoundLattice],
    parts: Sequence[Sites], plane: NDArray[np.float64],
) -> Model:  # fmt: skip
    """All that was found and given, before anything is learned."""
    starts = np.array([[*lattice.center, *lattice.a, *lattice.b] for lattice in used])
    if asked.center is not None or np.abs(plane[1:]).any():
        starts[:, :2] = plane[0]
    return Model(
        probe,
        np.concatenate([part.hk for part in parts]).astype(np.float64),
        np.concatenate([[0], np.cumsum([len(part.hk) for part in parts])]).astype(np.int64),
        starts,
        plane[1:].T.copy(),
        np.zeros(0, np.float32) if good.all() else good.astype(np.float32).reshape(-1),
        _axes(asked, starts[0, 2:].reshape(2, 2)),
        view.scan_shape[-1] if view.scan_shape else 1,
        view.frame_shape,
        gain=asked.gain,
        read=read_noise(asked, view, sample),
        saturation=saturation_of(asked, sample),
        minimum=asked.min_disks,
    )


def _rims_alone(asked: Strain, model: Model) -> None:
    """Refuse disks that overlap so much that hardly any of their rims is seen alone."""
    fit = model.fit()
    distance = np.hypot(*(fit.pixels - 0.5))
    rim = np.abs(distance - model.probe.radius) <= 0.5 * max(model.probe.edge, 1.0) + 0.5
    alone = float(fit.window[rim].mean())
    if alone < LEAST_ALONE and asked.registration == "lattice":
        raise DataError(
            f"{asked.name}: disks of radius {model.probe.radius:.3g} px overlap, {model.spacing:.3g} px apart: of "
            f"their rims {100 * alone:.0f} % are free of neighbours, the lattice fit needs {100 * LEAST_ALONE:.0f} %; "
            'use registration = "correlation" or "guided" (less exact), or record with a smaller convergence angle'
        )


def _axes(asked: Strain, lattice: NDArray[np.float64]) -> NDArray[np.float64]:
    """From detector (x, y) to the axes of the strain: distortion undone, then turned."""
    return np.asarray(axes_matrix(_angle(asked, lattice)) @ ellipse_matrix(*asked.distortion))


def _angle(asked: Strain, lattice: NDArray[np.float64]) -> float:
    """Angle of the strain's x axis, in degrees from the detector's x towards y, distortion undone."""
    if isinstance(asked.axes, tuple):
        return crystal_angle(lattice, asked.axes, ellipse_matrix(*asked.distortion))
    return float(asked.axes)


def _of_crystal(sample: Sample, used: Sequence[FoundLattice]) -> Sample:
    """The frames from which is learned: those that show a lattice, unless nearly all do."""
    shown = np.unique(np.concatenate([lattice.frames for lattice in used]))
    if shown.size >= 0.95 * used[0].looked:
        count = len(sample.frames)
        shown = np.unique(np.linspace(0, count - 1, min(count, 2 * FRAMES)).round().astype(int))
    return Sample(sample.frames[shown], sample.positions[shown])


def _taught(asked: Strain, model: Model, sample: Sample, scan: tuple[int, ...]) -> tuple[Model, float]:
    """The model as the sample teaches it, and the reduced chi^2 that is usual."""
    model = untaught(model)
    rows = cpu_lattice.details(model.fit(), frames_of(sample), sample.positions)[0]
    fitted = np.isfinite(rows[:, 0])
    if not fitted.any():
        a, b = model.lattices[0, 2:4].tolist(), model.lattices[0, 4:6].tolist()
        raise DataError(
            f"{asked.name}: the lattice a = ({a[0]:.4g}, {a[1]:.4g}), b = ({b[0]:.4g}, {b[1]:.4g}) px (y, x) around "
            f"({model.lattices[0, 0]:.4g}, {model.lattices[0, 1]:.4g}) with disks of radius {model.probe.radius:.3g} "
            f"px fits none of {len(rows)} sampled frames with {asked.min_disks} disks (min_disks); the picture of "
            "gpuem check shows where they are expected. Give other center, a, b and radius, or leave them out"
        )
    if scan and fitted.sum() >= ENOUGH:
        still = np.concatenate([model.lattices[:1, :2], model.drift.T])
        moving = _moving(centre_plane(sample.positions[fitted], scan, rows[fitted, :2]), scan, still)
        if moving is not still:
            lattices = model.lattices.copy()
            lattices[:, :2] = moving[0]
            model = replace(model, lattices=lattices, drift=moving[1:].T.copy())
    few = Sample(sample.frames[fitted], sample.positions[fitted])
    if asked.learn == "measured":
        model = replace(model, probe=measured(model, few))
    if asked.learn in ("nothing", "measured"):
        model = noise_of(model, few)
    else:
        model = learn(model, few, rim=asked.edge is None, insides=asked.learn == "reflections")
    rows = cpu_lattice.details(model.fit(), frames_of(few), few.positions)[0]
    rows = rows[np.isfinite(rows[:, 0])]
    chi2, most = rows[:, 10], int(np.diff(model.first).min())
    if asked.a is not None and len(rows) and np.median(rows[:, 11]) < FEW_FOUND * most:
        log.warning(
            "%s: of %d disks of the given lattice a frame shows %.0f (median): is it the right lattice (picture of "
            "gpuem check)?", asked.name, most, np.median(rows[:, 11])
        )  # fmt: skip
    return model, float(np.median(chi2)) if chi2.size else 1.0


def _measured_lattices(
    asked: Strain, model: Model, sample: Sample, used: list[FoundLattice]
) -> tuple[Model, list[FoundLattice]]:
    """Lattices that were found, as the fit measures them: correlation is drawn to the bright sides of disks."""
    if asked.a is not None:
        return model, used
    rows = cpu_lattice.details(model.fit(), frames_of(sample), sample.positions)[0]
    at = np.column_stack(np.divmod(sample.positions, model.scan_width))
    rows[:, :2] -= at @ model.drift.T
    lattices, found = model.lattices.copy(), list(used)
    for grain in range(len(lattices)):
        mine = rows[np.isfinite(rows[:, 0]) & (rows[:, 13] == grain), :6]
        if len(mine) == 0:
            continue
        # the mean, as it lies over the mean pattern; a frame that went wrong must not move it
        off = np.abs(mine - np.median(mine, axis=0))[:, 2:].max(axis=1)
        mean = mine[off <= WRONG * model.spacing].mean(axis=0)
        center, a, b = ((float(v[0]), float(v[1])) for v in mean.reshape(3, 2))
        found[grain] = replace(found[grain], center=asked.center or center, a=a, b=b)
        # where the centre wanders, the mean of the frames that could be fitted is no better start than before
        lattices[grain, 2:] = mean[2:]
    return replace(model, lattices=lattices, axes=_axes(asked, lattices[0, 2:].reshape(2, 2))), found


# ---- in words


def _refined(asked: Strain, found: FoundProbe, model: Model, center: tuple[float, float], origin: Origin) -> FoundProbe:
    """The probe in words, with the radius that was learned and the place that was chosen."""
    # what was told of a place among disks whose lattice wasn't known
    notes = [note.partition("; ")[2] if note.startswith("direct beam hidden") else note for note in found.notes]
    chosen = "as given" if asked.center is not None else ""
    told = tuple(note for note in (*notes, chosen, origin.doubt(), origin.describe()) if note)
    return replace(found, radius=float(model.probe.radius), edge=float(model.probe.width), center=center, notes=told)


def _of_origin(asked: Strain, origin: Origin) -> dict[str, Any]:
    """The choice of the direct beam, for the result's attributes."""
    facts: dict[str, Any] = {
        "center_from": "sample" if asked.center is None else "given",
        "center_px": [*(asked.center or origin.place)],
        "center_confidence": origin.confidence,
        "center_seen": origin.state,
    }
    if origin.runner is not None:
        facts |= {"center_second_px": [*origin.runner[:2]], "center_second_confidence": origin.runner[2]}
    return facts


def _wander(drift: NDArray[np.float64], scan: tuple[int, ...]) -> float:
    """How far the centre moves over the scan, in px."""
    return float(np.hypot(*(drift @ [math.prod(scan[:-1]) - 1, scan[-1] - 1]))) if scan else 0.0


def _lines(
    asked: Strain, probe: FoundProbe, lattices: Sequence[FoundLattice], used: Sequence[FoundLattice],
    parts: Sequence[Sites], wander: float,
) -> list[str]:  # fmt: skip
    """What was found."""
    second = [lattice for lattice in lattices if lattice.kind == "second"]
    lines = describe(probe, [*used, *second], parts[0])
    if asked.a is not None:
        count = len(used)
        told = [line.partition(", explains")[0] + ", as given" for line in lines[1 : 1 + count]]
        lines = [lines[0], f"{told[0]}, {parts[0].describe()}", *told[1:], *lines[1 + count :]]
    if wander > STEADY:
        lines.append(f"the beam wanders by {wander:.1f} px over the scan, which is followed")
    return lines
