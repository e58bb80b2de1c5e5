"""Lattices from the places of single disks, for registrations that find disks one by one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.lattice_model import Model
from gpuem.backends import Fit
from gpuem.backends.lattice_fit import COLUMNS
from gpuem.backends.peaks import GuidedFit, PeakSearch, soft_disk, wrapped, zero_mean_kernel
from gpuem.errors import RecipeError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# a disk off its lattice by more standard deviations than this pulls no harder
HUBER = 3.0
# rounds of fitting and weighing
ROUNDS = 4
# phase correlation is smoothed by this part of the radius of a disk
SMOOTH = 0.25
# the place of a disk is never known better than this, in px
FLOOR = 0.01
# variance of a disk's place times its counts, in units of its radius in px (see `gpuem.synthetic`)
PER_COUNT = 0.35
# heights of a frame's peaks are scaled to so many counts in all, where they are none
_NO_COUNTS = 1e6
_CHUNK = 1 << 12


def registration_of(kind: str, model: Model, power: float, scan_shape: tuple[int, ...]) -> Fit:
    """What is computed of every frame; where disks are expected, the centre is that in the middle of the scan."""
    if kind == "lattice":
        return model.fit()
    radius, edge = model.probe.radius, max(model.probe.edge, 1.0)
    half = math.ceil(1.5 * radius + edge)
    rings = radius + edge / 2, 1.5 * radius + edge
    kernel = zero_mean_kernel(soft_disk(radius, edge, half), *rings)
    start, wander = _middle(model, scan_shape)
    if kind == "guided":
        places = start[:2] + model.sites @ start[2:].reshape(2, 2)
        return GuidedFit(places, kernel, search=max(4, math.ceil(radius / 2)) + math.ceil(wander))
    if kind == "correlation":
        if min(model.shape) < kernel.shape[0]:
            raise RecipeError(
                f'registration = "correlation": a disk of radius {radius:.1f} px with its ring takes {kernel.shape[0]} '
                f"px, the detector has {model.shape[0]} x {model.shape[1]}; give a smaller radius, or use "
                '"lattice" or "guided"'
            )
        return PeakSearch(
            # noise of faint frequencies counts as much as signal where all weigh alike
            wrapped(kernel, model.shape), power=power, sigma=SMOOTH * (1 - power) * radius, spacing=radius,
            edge=int(radius), min_relative=1e-4, max_peaks=2 * len(model.sites),
        )  # fmt: skip
    from gpuem.backends.cpu_blobfinder import BlobfinderFit

    return BlobfinderFit.of(start, model.sites, radius)


def _middle(model: Model, scan_shape: tuple[int, ...]) -> tuple[NDArray[np.float64], float]:
    """The lattice in the middle of the scan, and how far the centre wanders from there to its ends, in px."""
    half = np.array([math.prod(scan_shape[:-1]) - 1, (scan_shape[-1] if scan_shape else 1) - 1]) / 2
    start = model.lattices[0].copy()
    start[:2] += model.drift @ half
    return start, float(np.hypot(*(np.abs(model.drift) @ half)))


def lattices_of(
    kind: str, found: NDArray[np.float32], valid: NDArray[np.bool_], model: Model, power: float = 1.0
) -> NDArray[np.float32]:
    """Rows of `gpuem.backends.lattice_fit.COLUMNS` from the places of disks.

    Weights are 1 / (s^2 + c^2 / N) for N counts in a disk, with robust ones besides: a disk at more than 3 standard
    deviations pulls no harder than at 3. Where the heights of peaks are no counts (`power` below 1; blobfinder's
    elevations), sigma is taken from how disks scatter about their lattices, and there is no chi^2 to be told.

    Parameters
    ----------
    kind : {"guided", "correlation", "blobfinder"}
        Where the places are from.
    found : (n, columns) float32
        What the fit found.
    valid : (n,) bool
        Where a frame was read.
    model : Model
        Lattice and reflections.
    power : float
        Of the correlation.
    """
    rows = np.full((len(found), len(COLUMNS)), np.nan, np.float32)
    counted = kind == "guided" or power == 1
    for start in range(0, len(found), _CHUNK):
        part = slice(start, start + _CHUNK)
        here = np.flatnonzero(valid[part]) + start
        if here.size == 0:
            continue
        some = found[here].astype(np.float64)
        if kind == "blobfinder":
            rows[here] = _of_distances(some, model)
            continue
        places, counts = _guided(some) if kind == "guided" else _matched(some, here, model, counted=counted)
        rows[here] = _solved(places, counts, model, counted=counted)
    if not counted:
        rows[:, 10] = np.nan
    return rows


def _of_distances(found: NDArray[np.float64], model: Model) -> NDArray[np.float32]:
    """Lattices of blobfinder, with errors from the mean distance of the disks from their sites."""
    fitted = np.isfinite(found[:, :7]).all(axis=1) & (found[:, 7] >= model.minimum)
    lattice, distance = np.where(fitted[:, None], found[:, :6], np.nan), np.where(fitted, found[:, 6], 0.0)
    disks = np.where(np.isfinite(found[:, 7]), found[:, 7], 0.0)
    design = np.column_stack([np.ones(len(model.sites)), model.sites])
    # the mean of a distance in two dimensions is sqrt(pi / 2) standard deviations; three numbers were fitted
    variance = (distance**2 * 2 / math.pi) * disks / np.maximum(disks - 3, 1)
    share = len(model.sites) / np.maximum(disks, 1)
    covariance = np.zeros((len(found), 6, 6))
    inverse = np.linalg.inv(design.T @ design)
    covariance[:, ::2, ::2] = inverse * (variance * share)[:, None, None]
    covariance[:, 1::2, 1::2] = covariance[:, ::2, ::2]
    return _told(lattice, covariance, np.full(len(found), np.nan), disks, model, np.nan)


def _guided(found: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places (n, sites, 2) and counts (n, sites) of disks, NaN and 0 where there is none."""
    disks = found.reshape(len(found), -1, 4)
    good = np.isfinite(disks[..., :3]).all(axis=-1) & (disks[..., 2] > 0) & (disks[..., 3] > 0)
    return np.where(good[..., None], disks[..., :2], np.nan), np.where(good, disks[..., 2], 0.0)


def _matched(
    found: NDArray[np.float64], positions: NDArray[np.int64], model: Model, *, counted: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The brightest peak near every site of the lattice, which is followed from the inner sites to the outer ones."""
    peaks = found[:, 1:].reshape(len(found), -1, 3)
    count = len(model.sites)
    places, counts = np.full((len(found), count, 2), np.nan), np.zeros((len(found), count))
    lattice = np.tile(model.lattices[0], (len(found), 1))
    lattice[:, :2] += np.column_stack(np.divmod(positions, model.scan_width)) @ model.drift.T
    reach = 0.35 * model.spacing
    order = np.abs(model.sites).sum(axis=1)
    for stage in (order <= 1, order <= 2, np.ones(count, np.bool_)):
        for s in np.flatnonzero(stage):
            h, k = model.sites[s]
            expected = lattice[:, :2] + h * lattice[:, 2:4] + k * lattice[:, 4:6]
            distance = np.hypot(*np.moveaxis(peaks[..., :2] - expected[:, None], -1, 0))
            bright = np.where(distance <= reach, peaks[..., 2], -np.inf)
            best = np.argmax(np.where(np.isnan(bright), -np.inf, bright), axis=1)
            height = np.take_along_axis(bright, best[:, None], 1)[:, 0]
            there = np.isfinite(height) & (height > 0)
            places[:, s] = np.where(there[:, None], np.take_along_axis(peaks, best[:, None, None], 1)[:, 0, :2], np.nan)
            counts[:, s] = np.where(there, height, 0.0)
        fitted = _solved(places, counts, model, counted=counted)[:, :6].astype(np.float64)
        known: NDArray[np.bool_] = np.asarray(np.isfinite(fitted).all(axis=1))
        lattice = np.where(known[:, None], fitted, lattice)
    return places, counts


def _solved(
    places: NDArray[np.float64], counts: NDArray[np.float64], model: Model, *, counted: bool
) -> NDArray[np.float32]:
    """Weighted least squares with robust weights, all frames at once."""
    design = np.column_stack([np.ones(len(model.sites)), model.sites])
    there = counts > 0
    # heights that are no counts have no scale: their mean is as good as any
    scale_of = model.gain if counted else np.maximum(counts.sum(axis=1, keepdims=True), 1e-30) / _NO_COUNTS
    electrons = np.maximum(counts / scale_of, 1e-9)
    own = max(float(model.priors[:, 4].mean()) if len(model.priors) else 0.0, FLOOR**2)
    variance = own + PER_COUNT * model.probe.radius / electrons
    weight = np.where(there, 1 / variance, 0.0)
    target = np.where(there[..., None], places, 0.0)
    robust = np.ones_like(weight)
    for _ in range(ROUNDS):
        w = weight * robust
        normal = np.einsum("ni,ij,ik->njk", w, design, design)
        right = np.einsum("ni,ij,nid->njd", w, design, target)
        size = np.maximum(np.trace(normal, axis1=1, axis2=2), 1e-300)
        spread: NDArray[np.float64] = np.asarray(np.linalg.det(normal / size[:, None, None]), np.float64)
        enough: NDArray[np.bool_] = np.asarray((there.sum(axis=1) >= model.minimum) & (spread > 1e-12))
        safe = np.where(enough[:, None, None], normal, np.eye(3))
        inverse = np.linalg.inv(safe)
        solution = inverse @ right
        off = target - np.einsum("ij,njd->nid", design, solution)
        square = (off**2).sum(axis=-1) * weight / 2
        if not counted:
            square /= np.maximum(
                square.sum(axis=1, keepdims=True) / np.maximum(there.sum(axis=1) - 3, 1)[:, None], 1e-30
            )
        distance = np.sqrt(np.maximum(square, 1e-30))
        robust = np.minimum(1.0, HUBER / distance)
    number = 2 * there.sum(axis=1) - 6
    chi2 = (w[..., None] * off**2).sum(axis=(1, 2)) / np.maximum(number, 1)
    scale = np.maximum(chi2, 1.0) if counted else chi2
    covariance = np.zeros((len(places), 6, 6))
    covariance[:, ::2, ::2] = inverse * scale[:, None, None]
    covariance[:, 1::2, 1::2] = inverse * scale[:, None, None]
    lattice = np.where(enough[:, None], solution.reshape(len(places), 6), np.nan)
    disks = (there & (robust > 0.5)).sum(axis=1)
    return _told(lattice, covariance, chi2, disks, model, counts.sum(axis=1))


def _told(
    lattice: NDArray[np.float64], covariance: NDArray[np.float64], chi2: NDArray[np.float64], disks: ArrayLike,
    model: Model, counts: ArrayLike = 0.0,
) -> NDArray[np.float32]:  # fmt: skip
    """Rows of `COLUMNS`."""
    from gpuem.analyses.deformation import strain_sigma

    rows = np.zeros((len(lattice), len(COLUMNS)), np.float32)
    rows[:, :6] = lattice
    reference = model.lattices[0, 2:].reshape(2, 2)
    if np.isfinite(covariance).any():
        rows[:, 6:10] = strain_sigma(
            lattice[:, 2:4], lattice[:, 4:6], covariance[:, 2:, 2:], reference, matrix=model.axes
        )
    rows[:, 10], rows[:, 11], rows[:, 12] = chi2, disks, counts
    return rows
