"""Diffraction patterns of known strain, and how well it can be known at all: the Cramer-Rao bound.

A pattern is a lattice of disks over a flat background. The expectation of a pixel at r is

    mu(r) = scale (background + sum over (h, k) of I_hk T(r - center - h a - k b))

with T the probe's disk, 1 inside with a linear edge, times what structure the disk has; scale makes the expectation sum
to the dose. The defaults are "set K": 256 x 256 px, 25 disks of radius 9 px, I_hk = 200 / (1 + h^2 + k^2) counts per
pixel over a background of 0.3, 3.7e5 electrons in all.

The bound: for Poisson counts, no unbiased estimator of theta has a covariance smaller than the inverse of

    F = sum over pixels of (d mu / d theta) (d mu / d theta)^T / mu

(Fisher information), with the intensity of every disk and the background as parameters too. These are eliminated by a
Schur complement, F_tt - F_tn F_nn^-1 F_nt. Derivatives are exact. What the bound takes for known is the probe, and the
structure inside the disks: where that is unknown, the bound is lower than anything that can be reached.

A strain error is the RMS over the four components of G G0^-1, G = [a b] against the undeformed G0. The bound depends on
where pixels cut the edges of the disks. For set K it is 4.3e-5 at the undeformed crystal, all of whose disks are cut
alike, and 4.9e-5 to 5.6e-5 at deformed ones; over a scan (RMS) with the deformation below 5.2e-5, whatever its size
down to 1 %. A quoted 4.9e-5 lies between, where a scan with undeformed parts would. One disk over a
background of 0.46 of its intensity has 2.26 / sqrt(N) px for a radius of 6 px and 2.93 / sqrt(N) px for 10 px, N being
the electrons of the disk alone; over less background a linear edge says more.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.deformation import ellipse_matrix
from gpuem.errors import RecipeError
from gpuem.synthetic_kernels import add_disks, products

Array = NDArray[np.float64]
Noise = Literal["poisson", "gaussian"]
Place = tuple[float, float]

BOUND_POSITIONS = 256
"""Positions of a scan at which its bound is worked out: enough for 1 %."""

SINGULAR = 1e-12
"""Information, relative to that of single parameters, below which rounding errors are all there is."""


@dataclass(frozen=True)
class Pattern:
    """What a detector sees of a crystal; the defaults are set K.

    Lengths in px, vectors (y, x), angles in degrees from x towards y.

    Parameters
    ----------
    frame : (int, int)
        Detector shape (y, x).
    center, a, b : (float, float)
        Beam centre and lattice vectors of the undeformed crystal, before `distortion`.
    order : int
        Disks h, k = -order..order.
    radius, edge : float
        Of a disk; its value is clip((radius - d) / edge + 0.5, 0, 1).
    peak, falloff : float
        A disk has peak / (1 + falloff (h^2 + k^2)) counts per pixel.
    background : float
        Counts per pixel.
    dose : float, optional
        Electrons per pattern: all of the above is scaled so that the expectation, before `stop`, `dead` and
        `saturation`, sums to it.
    structure, period, drift : float
        Fringes inside the disks, as of a thick crystal: relative amplitude (below 1), period in radii, other direction
        and phase for every reflection. They move by `drift` periods over the scan; 0: the same at every position.
    tilt : float
        Friedel pairs differ: intensities times exp(tilt (h t_y + k t_x) / order), (t_y, t_x) turning over the scan.
    distortion : (float, float)
        Elliptical distortion of the detector plane about the centre, disks and lattice alike: axis ratio and direction
        of the axis, as `deformation.ellipse_matrix` takes them to undo it.
    ellipse : (float, float)
        Axis ratio and direction of an elliptical probe.
    rings : int
        Dark rings of a patterned (bullseye) probe.
    stop : float
        Radius of a beam stop over the centre, its arm reaching to the upper edge; no counts there.
    dead : int
        Number of dead pixels: no counts there, always in the same places.
    saturation : int, optional
        Counts above are cut to it.
    wander : float
        The centre moves by so much over the scan.
    """

    frame: tuple[int, int] = (256, 256)
    center: tuple[float, float] = (127.3, 128.6)
    a: tuple[float, float] = (0.0, 38.0)
    b: tuple[float, float] = (38.0, 0.0)
    order: int = 2
    radius: float = 9.0
    edge: float = 1.0
    peak: float = 200.0
    falloff: float = 1.0
    background: float = 0.3
    dose: float | None = None
    structure: float = 0.0
    period: float = 1.5
    drift: float = 0.0
    tilt: float = 0.0
    distortion: tuple[float, float] = (1.0, 0.0)
    ellipse: tuple[float, float] = (1.0, 0.0)
    rings: int = 0
    stop: float = 0.0
    dead: int = 0
    saturation: int | None = None
    wander: float = 0.0

    def __post_init__(self) -> None:
        for name in ("radius", "edge", "peak", "background", "period"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"Pattern: {name} = {getattr(self, name)}; give a number above 0")
        if not 0 <= self.structure < 1:
            raise RecipeError(f"Pattern: structure = {self.structure}; its relative amplitude is in 0 <= s < 1")
        if self.dose is not None and not self.dose > 0:
            raise RecipeError(f"Pattern: dose = {self.dose}; give electrons per pattern, above 0")

    @cached_property
    def orders(self) -> Array:
        """(disks, 2) h, k."""
        n = np.arange(-self.order, self.order + 1, dtype=np.float64)
        return np.stack(np.meshgrid(n, n, indexing="ij"), axis=-1).reshape(-1, 2)

    @cached_property
    def distorted(self) -> Array:
        """(2, 2) what takes undistorted (x, y) to the detector's."""
        return np.asarray(np.linalg.inv(ellipse_matrix(*self.distortion)), dtype=np.float64)

    @cached_property
    def lattice(self) -> Array:
        """(2, 2) the undeformed G0 as seen on the detector: columns a, b, in (x, y) order."""
        seen: Array = self.distorted @ np.array([self.a[::-1], self.b[::-1]], dtype=np.float64).T
        return seen

    @cached_property
    def theta(self) -> Array:
        """(6,) lattice of the undeformed crystal on the detector: center, a, b, each (y, x)."""
        return theta_of(self, np.eye(2))

    @cached_property
    def probe(self) -> Array:
        """What the kernels read of the probe, and the half sizes (y, x) of a box that holds it."""
        matrix = ellipse_matrix(*self.ellipse) @ ellipse_matrix(*self.distortion)
        # of the ellipse |M u| = r the half extents are r sqrt(diag((M^T M)^-1))
        reach = (self.radius + self.edge / 2) * np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)))
        return np.array(
            [self.radius, self.edge, self.rings, self.structure, *matrix.ravel(), *(np.floor(reach[::-1]) + 1)]
        )

    @cached_property
    def counted(self) -> NDArray[np.bool_]:
        """(y, x) which pixels count electrons: not those behind the beam stop, nor dead ones."""
        y, x = np.ogrid[: self.frame[0], : self.frame[1]]
        dy, dx = y - self.center[0], x - self.center[1]
        good = (dy**2 + dx**2 > self.stop**2) & ~((dy < 0) & (np.abs(dx) <= self.stop / 3) & (self.stop > 0))
        places = np.random.default_rng(0).permutation(good.size)[: self.dead]
        good.ravel()[places] = False
        return good

    def intensities(self, at: Place = (0.0, 0.0)) -> Array:
        """(disks,) counts per pixel inside each disk, before the scaling to the dose."""
        h, k = self.orders.T
        y, x = (2 * math.pi * v for v in at)
        lean = (h * math.sin(x + y) + k * math.cos(x - 0.5 * y)) / max(self.order, 1)
        values: Array = self.peak / (1 + self.falloff * (h**2 + k**2)) * np.exp(self.tilt * lean)
        return values

    def waves(self, at: Place = (0.0, 0.0)) -> Array:
        """(disks, 3) structure of each disk: wave vector (y, x) in rad/px, phase in rad."""
        n = np.arange(len(self.orders))
        q = 2 * math.pi / (self.period * self.radius)
        phase = 1.7 * n + 2 * math.pi * self.drift * (at[1] + 0.5 * at[0])
        return np.stack([q * np.sin(2.4 * n), q * np.cos(2.4 * n), phase], axis=-1)


# ---- the crystal


def places(scan_shape: Sequence[int]) -> Array:
    """(n, 2) relative place (0..1) of every scan position along the slow axes and along the last axis."""
    last = scan_shape[-1] if scan_shape else 1
    n = math.prod(scan_shape)
    index = np.arange(n)
    return np.stack([index // last / max(n // last, 1), index % last / last], axis=-1)


def deformation(scan_shape: Sequence[int], strain: float = 0.02, rotation: float = 0.01) -> Array:
    """A deformation gradient F = R U that varies smoothly over a scan.

    Parameters
    ----------
    scan_shape : tuple of int
        Any number of dimensions.
    strain : float
        Amplitude of exx and eyy; that of exy is half of it.
    rotation : float
        Amplitude of the rotation, in rad.

    Returns
    -------
    (scan..., 2, 2) float64
        In (x, y) order.
    """
    v, u = 2 * math.pi * places(scan_shape).T
    exx, eyy = strain * np.sin(u + 0.5 * v), strain * np.cos(0.5 * u + v)
    exy, turn = 0.5 * strain * np.sin(1.5 * u - v + 1), rotation * np.cos(u - 0.5 * v + 0.5)
    stretch = np.array([[1 + exx, exy], [exy, 1 + eyy]])
    rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    gradient: Array = np.einsum("ijn,jkn->nik", rotate, stretch).reshape(*scan_shape, 2, 2)
    return gradient


def theta_of(pattern: Pattern, gradient: NDArray[Any], at: Place = (0.0, 0.0)) -> Array:
    """Lattice on the detector, (center, a, b) each (y, x), of a crystal deformed by F (2, 2): F^-T G0, distorted."""
    seen = pattern.distorted @ np.linalg.inv(gradient).T @ np.array([pattern.a[::-1], pattern.b[::-1]]).T
    moved = pattern.wander * np.array([math.sin(2 * math.pi * (at[0] + at[1])), math.cos(2 * math.pi * at[1])])
    return np.concatenate([np.asarray(pattern.center) + moved, seen[::-1, 0], seen[::-1, 1]])


# ---- the pattern


def expectation(pattern: Pattern, theta: NDArray[Any] | None = None, at: Place = (0.0, 0.0)) -> Array:
    """Expected electrons per pixel, before beam stop, dead pixels and saturation.

    Parameters
    ----------
    pattern : Pattern
        Probe, intensities, dose.
    theta : (6,) array, optional
        Lattice on the detector; that of the undeformed crystal by default.
    at : (float, float)
        Relative place (0..1) in the scan, where tilt or structure varies over it.

    Returns
    -------
    (y, x) float64
    """
    return _expected(pattern, pattern.theta if theta is None else np.asarray(theta, np.float64), at)[0]


def _sites(pattern: Pattern, theta: Array) -> Array:
    """(disks, 2) centres (y, x)."""
    sites: Array = theta[:2] + pattern.orders @ theta[2:].reshape(2, 2)
    return sites


def _expected(pattern: Pattern, theta: Array, at: Place, out: Array | None = None) -> tuple[Array, float]:
    """The expectation, and what background and intensities were scaled by."""
    mu = np.empty(pattern.frame) if out is None else out
    mu.fill(pattern.background)
    add_disks(_sites(pattern, theta), pattern.intensities(at), pattern.probe, pattern.waves(at), mu)
    scale = 1.0 if pattern.dose is None else pattern.dose / float(mu.sum())
    mu *= scale
    return mu, scale


def generate(
    pattern: Pattern, scan_shape: Sequence[int], seed: int = 0, noise: Noise = "poisson", gradient: Array | None = None
) -> tuple[NDArray[np.uint16], dict[str, Any]]:
    """Patterns of a scan over a deformed crystal.

    Every position has its own random numbers, so that frames don't depend on the number of threads, nor on whether
    others were made.

    Parameters
    ----------
    pattern : Pattern
        What is seen.
    scan_shape : tuple of int
        Any number of dimensions.
    seed : int
        The same seed gives the same frames.
    noise : {"poisson", "gaussian"}
        Counting noise, or normal noise of the same variance, rounded and cut at 0.
    gradient : (scan..., 2, 2) array, optional
        F in (x, y) order; `deformation(scan_shape)` by default.

    Returns
    -------
    frames : (scan..., y, x) uint16
        Counts.
    truth : dict
        ``F`` (scan..., 2, 2); ``theta`` (scan..., 6), the lattice on the detector; ``bound``, from `scan_bound`.
    """
    if noise not in ("poisson", "gaussian"):
        raise RecipeError(f"noise = {noise!r}; allowed: 'poisson', 'gaussian'")
    shape = tuple(scan_shape)
    found = deformation(shape) if gradient is None else np.asarray(gradient, dtype=np.float64)
    if found.shape != (*shape, 2, 2):
        raise RecipeError(f"gradient has shape {found.shape}; a scan of {shape} needs {(*shape, 2, 2)}")
    at = places(shape)
    flat = found.reshape(-1, 2, 2)
    thetas = np.array([theta_of(pattern, f, (v, u)) for f, (v, u) in zip(flat, at, strict=True)]).reshape(-1, 6)
    frames = np.empty((len(at), *pattern.frame), np.uint16)

    def fill(part: range) -> None:
        work = np.empty(pattern.frame)
        for i in part:
            mu, _ = _expected(pattern, thetas[i], (at[i, 0], at[i, 1]), work)
            frames[i] = _counts(pattern, mu, np.random.default_rng([seed, i]), noise)

    parts = [range(i, min(i + 64, len(at))) for i in range(0, len(at), 64)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(fill, parts))
    theta = thetas.reshape(*shape, 6)
    return frames.reshape(*shape, *pattern.frame), {"F": found, "theta": theta, "bound": scan_bound(pattern, theta)}


def _counts(pattern: Pattern, mu: Array, rng: np.random.Generator, noise: Noise) -> NDArray[Any]:
    """What the detector counts where `mu` is expected."""
    drawn = rng.poisson(mu) if noise == "poisson" else np.rint(mu + np.sqrt(mu) * rng.standard_normal(mu.shape))
    most = np.iinfo(np.uint16).max if pattern.saturation is None else pattern.saturation
    np.clip(drawn, 0, most, out=drawn)
    if pattern.stop or pattern.dead:
        drawn *= pattern.counted
    return drawn


# ---- the bound


def cramer_rao(pattern: Pattern, theta: NDArray[Any] | None = None, at: Place = (0.0, 0.0)) -> Array:
    """The least covariance that an unbiased estimator of the lattice can have on one pattern.

    Pixels behind the stop, dead, or expected above the saturation tell nothing.

    Parameters
    ----------
    pattern, theta, at
        As in `expectation`.

    Returns
    -------
    (6, 6) float64
        Of (center, a, b), each (y, x), in px^2. Infinite where the pattern says nothing of a parameter (of a and b for
        one disk only), and for all where some combination of them is left open.
    """
    lattice = pattern.theta if theta is None else np.asarray(theta, np.float64)
    mu, scale = _expected(pattern, lattice, at)
    weights = np.where(pattern.counted & (mu <= (pattern.saturation or math.inf)), 1 / mu, 0.0)
    count = len(pattern.orders)
    sums = products(_sites(pattern, lattice), pattern.probe, pattern.waves(at), weights)
    # columns: center, a, b; then the intensity of each disk and the background
    chain = np.zeros((3 * count + 1, 6 + count + 1))
    factors = np.column_stack([np.ones(count), pattern.orders]) * (scale * pattern.intensities(at))[:, None]
    chain[1:-1:3, 0:6:2] = factors
    chain[2::3, 1:6:2] = factors
    chain[0:-1:3, 6:-1] = np.eye(count)
    chain[-1, -1] = 1
    full = chain.T @ sums @ chain
    own, seen = np.diag(full)[:6] > 0, 6 + np.flatnonzero(np.diag(full)[6:] > 0)
    mixed = full[np.ix_(seen, np.arange(6))]
    information = full[:6, :6] - mixed.T @ np.linalg.pinv(full[np.ix_(seen, seen)], hermitian=True) @ mixed
    covariance = np.diag(np.full(6, math.inf))
    size = np.sqrt(np.maximum(np.diag(information)[own], 0))
    scaled = information[np.ix_(own, own)] / np.maximum(np.outer(size, size), 1e-300)
    if own.any() and np.linalg.eigvalsh(scaled)[0] > SINGULAR:
        covariance[np.ix_(own, own)] = np.linalg.inv(scaled) / np.outer(size, size)
    return covariance


def strain_bound(pattern: Pattern, theta: NDArray[Any] | None = None, at: Place = (0.0, 0.0)) -> float:
    """The bound as a strain: RMS over the four components of G G0^-1, of one pattern."""
    # d(G G0^-1) = dG G0^-1: each row (x and y alike) of G has (a, b) times the same 2x2 matrix
    inverse = np.linalg.inv(pattern.lattice)
    covariance = cramer_rao(pattern, theta, at)[2:, 2:].reshape(2, 2, 2, 2)
    if not np.isfinite(covariance).all():
        return math.inf
    return math.sqrt(float(np.einsum("kimi,kj,mj->", covariance, inverse, inverse)) / 4)


def scan_bound(pattern: Pattern, theta: NDArray[Any]) -> float:
    """RMS of `strain_bound` over the positions of a scan, at most `BOUND_POSITIONS` of them, evenly spread.

    Parameters
    ----------
    pattern : Pattern
        What is seen.
    theta : (scan..., 6) array
        Lattices on the detector, as in `generate`'s truth.
    """
    lattices, at = np.reshape(theta, (-1, 6)), places(np.shape(theta)[:-1])
    chosen = np.unique(np.linspace(0, len(at) - 1, min(len(at), BOUND_POSITIONS)).astype(np.int64))
    squares = [strain_bound(pattern, lattices[i], (at[i, 0], at[i, 1])) ** 2 for i in chosen]
    return math.sqrt(float(np.mean(squares)))
