"""How far sigma of a joint lattice fit must be trusted less than counting alone says, measured on sampled frames.

The covariance of the fit is right where its model is. Two things are missing where it isn't, and neither shows in the
residuals of a single frame, since displacements that all disks share in proportion to their distance look like strain.

Counting: every sampled frame is split at random into two halves whose noise is independent. The halves show the same
crystal, so half the difference of their strains has the variance that counting gives the whole frame.

Model: the same halves are fitted once more under other assumptions about the insides of disks: flat ones, and gradients
across them that are larger than was found. What the estimates change by from frame to frame, in both halves alike, is
neither noise nor strain: it is how much the answer depends on the assumption. Its variance is the covariance of the
two halves' changes, summed over the assumptions. Assumptions that the data overrule (a structure that is the same
everywhere moves all frames alike, a gradient that is well seen needs no prior) add little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Sample
from gpuem.analyses.deformation import strain
from gpuem.analyses.lattice_model import Model
from gpuem.backends import Frames, cpu_lattice
from gpuem.backends.lattice_fit import BACKGROUND, BACKGROUND_PRECISION, COLUMNS, GRADIENT

Array = NDArray[np.float64]

# frames that are split
FRAMES = 128
# fewer frames tell no variance
ENOUGH = 12
# the variance of gradients is assumed so many times larger
MORE_GRADIENT = 25.0
# what lies so many standard deviations (of most frames) off is cut to that
OUTLIER = 4.0
SIGMAS, GRAIN = COLUMNS.index("exx_sigma"), COLUMNS.index("grain")


@dataclass(frozen=True, eq=False)
class StrainErrors:
    """What the variance of a fit becomes: the larger of itself and `counting` times it plus `model`.

    Parameters
    ----------
    counting : float
        Variance that counting really gives, over that of the fit.
    model : (4,) float64
        Variance of exx, eyy, exy and the rotation (deg) through the model.
    """

    counting: float
    model: Array

    def sigma(self, fitted: NDArray[np.float32]) -> NDArray[np.float32]:
        """Sigma (n, 4) of exx, eyy, exy and the rotation (deg) from those of the fit."""
        out = np.square(fitted)
        out *= np.float32(self.counting)
        out += self.model.astype(np.float32)
        np.sqrt(out, out=out)
        return np.maximum(out, fitted, out=out)


NO_ERRORS = StrainErrors(1.0, np.zeros(4))


def strain_errors(model: Model, sample: Sample) -> StrainErrors:
    """Measure on sampled frames what sigma of the fit leaves out.

    Parameters
    ----------
    model : Model
        As it will be fitted, priors included.
    sample : Sample
        Frames that show the lattice; at most `FRAMES` of them are used, evenly spread.
    """
    count = len(sample.frames)
    chosen = np.unique(np.linspace(0, max(count - 1, 0), min(count, FRAMES)).round().astype(int))
    some = Sample(sample.frames[chosen], sample.positions[chosen])
    fitted = _fitted(model, some.frames, some.positions)
    variance = fitted[:, SIGMAS : SIGMAS + 4] ** 2
    halves, half_model = _halves(model, some.frames)
    usual = [_strains(half_model, half, some.positions) for half in halves]
    known = np.isfinite(variance).all(axis=1) & np.isfinite(usual[0] + usual[1]).all(axis=1)
    if known.sum() < ENOUGH:
        return NO_ERRORS
    apart = _cut(0.5 * (usual[0] - usual[1])[known] / np.sqrt(variance[known]))
    counting = float((apart**2).mean() * known.sum() / (known.sum() - 1))
    total = np.zeros(4)
    for other in _other_assumptions(half_model):
        changes = [_strains(other, half, some.positions) - start for half, start in zip(halves, usual, strict=True)]
        total += _common(*changes)
    return StrainErrors(counting, total)


def _common(first: Array, second: Array) -> Array:
    """Covariance (4,) of two (n, 4) changes, over the rows where both are known; not below 0."""
    known = np.isfinite(first + second).all(axis=1)
    if known.sum() < ENOUGH:
        return np.zeros(4)
    covariance = (_cut(first[known]) * _cut(second[known])).sum(axis=0) / (known.sum() - 1)
    return np.asarray(np.maximum(covariance, 0.0), np.float64)


def _cut(values: Array) -> Array:
    """Values about their mean, column by column, outliers cut: one frame that went wrong must not decide."""
    middle = np.median(values, axis=0)
    most = OUTLIER * 1.4826 * np.median(np.abs(values - middle), axis=0)
    cut = np.clip(values, middle - most, middle + most)
    return np.asarray(cut - cut.mean(axis=0))


def _other_assumptions(model: Model) -> list[Model]:
    """The model with flat disks, and with larger gradients across them."""
    flat = np.zeros_like(model.insides)
    flat[:, 0] = 1.0
    priors = model.priors.copy()
    priors[:, GRADIENT] = np.minimum(MORE_GRADIENT * priors[:, GRADIENT], 1.0)
    return [replace(model, insides=flat), replace(model, priors=priors)]


def _halves(model: Model, frames: NDArray[Any]) -> tuple[list[NDArray[Any]], Model]:
    """Frames split into two parts of half the counts and independent noise, and the model for these."""
    # the same sample gives the same maps, whichever process looks at it
    rng = np.random.default_rng(0)
    counted = frames.dtype.kind in "ui" and model.gain == 1
    values = np.asarray(frames, np.float64)
    usable = np.isfinite(values) & (values < model.saturation)
    values = np.where(usable, values, 0.0)
    if counted:
        first = rng.binomial(np.maximum(values, 0.0).astype(np.int64), 0.5).astype(np.float64)
    else:
        # a normal variable splits into independent ones by noise of its own variance
        spread = np.sqrt(model.gain * np.maximum(values, 0.0) + model.read**2)
        first = 0.5 * (values + spread * rng.standard_normal(values.shape))
    priors = model.priors.copy()
    priors[:, BACKGROUND] /= 2
    priors[:, BACKGROUND_PRECISION] *= 4
    read = model.read if counted else model.read / np.sqrt(2)
    # saturated pixels stay as they are; the type too where it can, for which the fit is compiled anyway
    kept = frames.dtype if counted or frames.dtype.kind == "f" else np.dtype(np.float32)
    halves = [np.where(usable, half, frames).astype(kept) for half in (first, values - first)]
    return halves, replace(model, priors=priors, read=read)


def _strains(model: Model, frames: NDArray[Any], positions: NDArray[np.int64]) -> Array:
    """Strain and rotation (n, 4) of frames against the lattice that the fit starts from; NaN where there is none."""
    rows = _fitted(model, frames, positions)
    out = np.full((len(rows), 4), np.nan)
    for grain, lattice in enumerate(model.lattices):
        mine = np.isfinite(rows[:, 0]) & (rows[:, GRAIN] == grain)
        if mine.any():
            reference = lattice[2:].reshape(2, 2)
            out[mine] = strain(rows[mine, 2:4], rows[mine, 4:6], reference, matrix=model.axes, out=out[mine])
    return out


def _fitted(model: Model, frames: NDArray[Any], positions: NDArray[np.int64]) -> Array:
    """Rows of the fit (n, columns)."""
    height, width = frames.shape[1:]
    starts = np.arange(len(frames), dtype=np.int64) * (height * width)
    pixels = Frames(np.ascontiguousarray(frames).reshape(-1), starts, (height, width))
    return cpu_lattice.details(model.fit(), pixels, positions)[0]
