"""From lattice vectors to strain and rotation, with their errors.

A crystal is deformed by r = F r0. Its reciprocal lattice, G = [a b] (vectors as columns), then follows G = F^-T G0, so
F = (G0 G^-1)^T exactly. Tensors here are in (x, y) order, x along columns and y along rows of the detector, while
vectors are handed over as (y, x) in px. Angles are positive from x towards y.

The detector's axes are taken to the wanted ones by a 2x2 matrix M acting on (x, y): `axes_matrix` turns the axes,
`ellipse_matrix` undoes an elliptical distortion; both: axes_matrix(t) @ ellipse_matrix(e, p). G and G0 become M G and
M G0.

In scalars, for kernels; ax, ay, bx, by of M G and a0x, a0y, b0x, b0y of M G0:

    det = ax by - bx ay
    px, py = by / det, -bx / det        dual vectors, the columns of G^-T: p.a = 1, p.b = 0
    qx, qy = -ay / det, ax / det        q.a = 0, q.b = 1
    Fij = pi a0j + qi b0j               i, j = x, y

    n = hypot(Fxx + Fyy, Fyx - Fxy)     trace of the stretch; det F > 0, else there is no answer (NaN)
    c, s = (Fxx + Fyy) / n, (Fyx - Fxy) / n;   rotation = atan2(s, c), R = (c -s; s c)
    right stretch U = R^T F:  Uxx = c Fxx + s Fyx,  Uxy = c Fxy + s Fyy,  Uyy = c Fyy - s Fxy
    left stretch  V = F R^T:  Vxx = c Fxx - s Fxy,  Vxy = s Fxx + c Fxy,  Vyy = s Fyx + c Fyy

Errors: dF = L F with L = -(M dG G^-1 M^-1)^T. A change of one component of a or b, along the detector's axis j, gives
L = -p m^T or -q m^T with m = M[:, j]; hence, with f = F^T m,

    dFij = -pi fj  (component of a)     dFij = -qi fj  (component of b)
    dw   = (c (dFyx - dFxy) - s (dFxx + dFyy)) / n                          rotation, in radians
    right: dUxx = c dFxx + s dFyx + dw Uxy,  dUyy = c dFyy - s dFxy - dw Uxy,  dUxy = c dFxy + s dFyy + dw Uyy
    left:  dVxx = c dFxx - s dFxy - dw Vxy,  dVyy = s dFyx + c dFyy + dw Vxy,  dVxy = s dFxx + c dFxy + dw Vxx

These are the columns of the 4x4 matrix J from (a_y, a_x, b_y, b_x) to (exx, eyy, exy, rotation), and
sigma = sqrt(diag(J C J^T)). Nothing is neglected but what is of second order in the errors; the reference counts as
known.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses.reference_lattice import PARALLEL, check_reference
from gpuem.errors import RecipeError

Measure = Literal["stretch", "left", "infinitesimal", "hencky", "green-lagrange", "py4dstem", "pyxem"]

MEASURES: dict[str, str] = {
    "stretch": "right stretch U - 1 (F = R U), in the frame of the reference crystal",
    "left": "left stretch V - 1 (F = V R), in the frame of the deformed crystal",
    "infinitesimal": "symmetric part of F - 1; a rotation t reads as a dilation of -t^2/2",
    "hencky": "logarithmic strain ln U",
    "green-lagrange": "(F^T F - 1) / 2",
    "py4dstem": "py4DSTEM's 1 - sym(G G0^-1), infinitesimal in reciprocal space; its x are rows: its e_yy is exx here",
    "pyxem": "pyxem's e11, e22, e12, of V^-1; e12 is compression's sign, opposite to that of e11 and e22",
}
"""What each measure means, in words for a map's description."""

CHUNK = 1 << 14
"""Positions worked on at a time: temporaries of some megabytes, whatever the size of the scan."""

Array = NDArray[np.float64]


class Tensor(NamedTuple):
    """Components of 2x2 tensors, one per position."""

    xx: Array
    xy: Array
    yx: Array
    yy: Array


class Symmetric(NamedTuple):
    """Components of symmetric 2x2 tensors, one per position."""

    xx: Array
    yy: Array
    xy: Array


# ---- axes


def axes_matrix(angle: float) -> Array:
    """Turn the axes: (x, y) components along axes whose x lies at `angle` degrees from x towards y.

    At 90 degrees, what pointed along y points along the new x.
    """
    t = math.radians(angle)
    return np.array([[math.cos(t), math.sin(t)], [-math.sin(t), math.cos(t)]])


def ellipse_matrix(ratio: float, angle: float) -> Array:
    """Undo an elliptical distortion: what maps the ellipse seen to a circle of the same area.

    Parameters
    ----------
    ratio : float
        Length of the ellipse's axis at `angle` over that of the axis across; above 1 it is the longer one.
    angle : float
        Direction of that axis, in degrees from x towards y.

    Returns
    -------
    (2, 2) float64
        Acts on (x, y); symmetric, of determinant 1, so that the mean camera length stays.
    """
    if not (math.isfinite(ratio) and ratio > 0 and math.isfinite(angle)):
        raise RecipeError(
            f"ellipse of axis ratio {ratio:g} at {angle:g} degrees: the ratio is length over length, a number above 0 "
            "(1 = a circle)"
        )
    turn = axes_matrix(angle)
    scaled: Array = turn.T @ np.diag([ratio**-0.5, ratio**0.5]) @ turn
    return scaled


# ---- deformation


def deformation(
    a: NDArray[Any], b: NDArray[Any], reference: NDArray[Any], matrix: NDArray[Any] | None = None
) -> NDArray[np.float64]:
    """The deformation gradient F, exact: r = F r0.

    Parameters
    ----------
    a, b : (n, 2) array
        Lattice vectors (y, x) in px.
    reference : (2, 2) array
        Rows a0, b0.
    matrix : (2, 2) array, optional
        M, from the detector's (x, y) to the wanted axes.

    Returns
    -------
    (n, 2, 2) float64
        In (x, y) order; NaN where a, b is not finite, parallel or of the other handedness than the reference.
    """
    return np.moveaxis(np.array(_gradient(a, b, reference, _axes(matrix))[0]).reshape(2, 2, -1), -1, 0)


def strain(
    a: NDArray[Any],
    b: NDArray[Any],
    reference: NDArray[Any],
    *,
    matrix: NDArray[Any] | None = None,
    measure: Measure = "stretch",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Strain and rotation of every position.

    Parameters
    ----------
    a, b, reference, matrix
        As in `deformation`.
    measure : str
        One of `MEASURES`.
    out : (n, 4) float array, optional
        Where to write; float32 by default. All is computed in float64.

    Returns
    -------
    (n, 4)
        exx, eyy, exy, and the rotation in degrees: that of the polar decomposition, whatever the measure, except that
        py4DSTEM's is its own (half the antisymmetric part of G G0^-1). NaN where there is no answer.
    """
    _known(measure)
    axes = _axes(matrix)
    found = np.empty((len(a), 4), np.float32) if out is None else out
    for start in range(0, len(a), CHUNK):
        part = slice(start, start + CHUNK)
        f, _, _ = _gradient(a[part], b[part], reference, axes)
        with np.errstate(all="ignore"):
            for column, values in enumerate(_measured(f, measure)):
                found[part, column] = values
    return found


def strain_sigma(
    a: NDArray[Any],
    b: NDArray[Any],
    covariance: NDArray[Any],
    reference: NDArray[Any],
    *,
    matrix: NDArray[Any] | None = None,
    measure: Measure = "stretch",
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """One-sigma errors of what `strain` gives, to first order in the errors of the lattice.

    Parameters
    ----------
    a, b, reference, matrix, measure, out
        As in `strain`.
    covariance : (n, 4, 4) array
        Of (a_y, a_x, b_y, b_x), in px^2.

    Returns
    -------
    (n, 4)
        Errors of exx, eyy, exy and the rotation in degrees; NaN where there is no answer.
    """
    found = np.empty((len(a), 4), np.float32) if out is None else out
    for start in range(0, len(a), CHUNK):
        part = slice(start, start + CHUNK)
        j = jacobian(a[part], b[part], reference, matrix=matrix, measure=measure)
        with np.errstate(all="ignore"):
            found[part] = np.sqrt(((j @ covariance[part]) * j).sum(axis=2))
    return found


def jacobian(
    a: NDArray[Any],
    b: NDArray[Any],
    reference: NDArray[Any],
    *,
    matrix: NDArray[Any] | None = None,
    measure: Measure = "stretch",
) -> Array:
    """How strain follows the lattice vectors, exact.

    Parameters
    ----------
    a, b, reference, matrix, measure
        As in `strain`, but all positions at once: 128 bytes each.

    Returns
    -------
    (n, 4, 4) float64
        Derivative of (exx, eyy, exy, rotation in degrees), rows, by (a_y, a_x, b_y, b_x) in px, columns.
    """
    _known(measure)
    axes = _axes(matrix)
    f, p, q = _gradient(a, b, reference, axes)
    found = np.empty((len(a), 4, 4))
    with np.errstate(all="ignore"):
        for column, (dual, detector_axis) in enumerate(((p, 1), (p, 0), (q, 1), (q, 0))):
            mx, my = axes[:, detector_axis]
            along = f.xx * mx + f.yx * my, f.xy * mx + f.yy * my
            df = Tensor(*(-i * j for i in dual for j in along))
            for row, values in enumerate(_changed(f, df, measure)):
                found[:, row, column] = values
    return found


def _known(measure: str) -> None:
    """Refuse a measure that isn't one."""
    if measure not in MEASURES:
        raise RecipeError(f"strain measure {measure!r} is not known; there are {', '.join(MEASURES)}")


def _axes(matrix: NDArray[Any] | None) -> Array:
    """M, checked; the detector's own axes by default."""
    axes = np.eye(2) if matrix is None else np.asarray(matrix, dtype=np.float64)
    if axes.shape != (2, 2) or not np.isfinite(axes).all() or abs(np.linalg.det(axes)) < 1e-12:
        raise RecipeError(f"axes: an invertible 2x2 matrix is needed, found {axes.tolist()}")
    return axes


def _gradient(
    a: NDArray[Any], b: NDArray[Any], reference: NDArray[Any], axes: Array
) -> tuple[Tensor, tuple[Array, Array], tuple[Array, Array]]:
    """F and the dual vectors p, q, in the wanted axes; NaN where there is no answer."""
    (a0x, a0y), (b0x, b0y) = check_reference(reference)[:, ::-1] @ axes.T
    (ay, ax), (by, bx) = np.asarray(a, dtype=np.float64).T, np.asarray(b, dtype=np.float64).T
    with np.errstate(all="ignore"):
        ax, ay = axes[0, 0] * ax + axes[0, 1] * ay, axes[1, 0] * ax + axes[1, 1] * ay
        bx, by = axes[0, 0] * bx + axes[0, 1] * by, axes[1, 0] * bx + axes[1, 1] * by
        det = ax * by - bx * ay
        hand = math.copysign(1, a0x * b0y - b0x * a0y)
        fine = hand * det > PARALLEL * np.hypot(ax, ay) * np.hypot(bx, by)
        det = np.where(fine & np.isfinite(det), det, np.nan)
        p, q = (by / det, -bx / det), (-ay / det, ax / det)
        f = Tensor(p[0] * a0x + q[0] * b0x, p[0] * a0y + q[0] * b0y, p[1] * a0x + q[1] * b0x, p[1] * a0y + q[1] * b0y)
    return f, p, q


# ---- measures


def _rotation(f: Tensor) -> tuple[Array, Array, Array]:
    """Cosine and sine of the rotation R, and the trace of the stretch."""
    n = np.hypot(f.xx + f.yy, f.yx - f.xy)
    return (f.xx + f.yy) / n, (f.yx - f.xy) / n, n


def _stretch(f: Tensor, left: bool = False) -> Symmetric:
    """U of F = R U, or V of F = V R."""
    c, s, _ = _rotation(f)
    if left:
        return Symmetric(c * f.xx - s * f.xy, s * f.yx + c * f.yy, s * f.xx + c * f.xy)
    return Symmetric(c * f.xx + s * f.yx, c * f.yy - s * f.xy, c * f.xy + s * f.yy)


def _stretch_change(f: Tensor, d: Tensor, left: bool = False) -> tuple[Symmetric, Array]:
    """What a change d of F does to U or V, and to the rotation in radians."""
    c, s, n = _rotation(f)
    u = _stretch(f, left)
    turned = (c * (d.yx - d.xy) - s * (d.xx + d.yy)) / n
    if left:
        xx, yy, xy = c * d.xx - s * d.xy, s * d.yx + c * d.yy, s * d.xx + c * d.xy
        return Symmetric(xx - turned * u.xy, yy + turned * u.xy, xy + turned * u.xx), turned
    xx, yy, xy = c * d.xx + s * d.yx, c * d.yy - s * d.xy, c * d.xy + s * d.yy
    return Symmetric(xx + turned * u.xy, yy - turned * u.xy, xy + turned * u.yy), turned


def _logarithm(u: Symmetric) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Of U = m + (u, v; v, -u) with determinant d: m, u, v, d and, with r = |(u, v)|, two numbers for ln U.

    ln U = ln(d) / 2 + k (u, v; v, -u) with k = artanh(r / m) / r; the last is (m / d - k) / r^2. Both have series in
    r / m, since near the reference r goes to 0.
    """
    m, half, d = (u.xx + u.yy) / 2, (u.xx - u.yy) / 2, u.xx * u.yy - u.xy * u.xy
    r = np.hypot(half, u.xy)
    w = (r / m) ** 2
    near = w < 1e-4
    k = np.where(near, (1 + w * (1 / 3 + w * (1 / 5 + w / 7))) / m, np.arctanh(r / m) / r)
    bend = np.where(near, (2 / 3 + w * (4 / 5 + w * (6 / 7 + w * 8 / 9))) / m**3, (m / d - k) / r**2)
    return m, half, u.xy, d, k, bend


def _measured(f: Tensor, measure: Measure) -> tuple[Array, Array, Array, Array]:
    """Strain exx, eyy, exy and rotation in degrees of F."""
    c, s, _ = _rotation(f)
    angle = np.arctan2(s, c)
    det = f.xx * f.yy - f.xy * f.yx
    if measure in ("stretch", "left"):
        u = _stretch(f, measure == "left")
        e = Symmetric(u.xx - 1, u.yy - 1, u.xy)
    elif measure == "infinitesimal":
        e = Symmetric(f.xx - 1, f.yy - 1, (f.xy + f.yx) / 2)
    elif measure == "hencky":
        _, half, off, _, k, _ = _logarithm(_stretch(f))
        middle = np.log(det) / 2
        e = Symmetric(middle + k * half, middle - k * half, k * off)
    elif measure == "green-lagrange":
        xx, yy = f.xx * f.xx + f.yx * f.yx, f.xy * f.xy + f.yy * f.yy
        e = Symmetric((xx - 1) / 2, (yy - 1) / 2, (f.xx * f.xy + f.yx * f.yy) / 2)
    elif measure == "py4dstem":
        e = Symmetric(1 - f.yy / det, 1 - f.xx / det, (f.xy + f.yx) / 2 / det)
        angle = (f.yx - f.xy) / 2 / det
    else:
        v = _stretch(f, left=True)
        e = Symmetric(det / v.yy - 1, det / v.xx - 1, -v.xy / det)
    return e.xx, e.yy, e.xy, np.degrees(angle)


def _changed(f: Tensor, d: Tensor, measure: Measure) -> tuple[Array, Array, Array, Array]:
    """What a change d of F does to what `_measured` gives: its derivative."""
    left = measure in ("left", "pyxem")
    e, turned = _stretch_change(f, d, left)
    det = f.xx * f.yy - f.xy * f.yx
    grown = d.xx * f.yy + f.xx * d.yy - d.xy * f.yx - f.xy * d.yx
    if measure == "infinitesimal":
        e = Symmetric(d.xx, d.yy, (d.xy + d.yx) / 2)
    elif measure == "hencky":
        _, half, off, _, k, bend = _logarithm(_stretch(f))
        dm, dhalf = (e.xx + e.yy) / 2, (e.xx - e.yy) / 2
        far = bend * (half * dhalf + off * e.xy) - dm / det
        middle, slope = grown / det / 2, k * dhalf + half * far
        e = Symmetric(middle + slope, middle - slope, k * e.xy + off * far)
    elif measure == "green-lagrange":
        xy = d.xx * f.xy + f.xx * d.xy + d.yx * f.yy + f.yx * d.yy
        e = Symmetric(f.xx * d.xx + f.yx * d.yx, f.xy * d.xy + f.yy * d.yy, xy / 2)
    elif measure == "py4dstem":
        part = grown / det
        e = Symmetric(
            (f.yy * part - d.yy) / det, (f.xx * part - d.xx) / det, (d.xy + d.yx - (f.xy + f.yx) * part) / 2 / det
        )
        turned = (d.yx - d.xy - (f.yx - f.xy) * part) / 2 / det
    elif measure == "pyxem":
        v = _stretch(f, left=True)
        e = Symmetric(
            (grown - det * e.yy / v.yy) / v.yy, (grown - det * e.xx / v.xx) / v.xx, (v.xy * grown / det - e.xy) / det
        )
    return e.xx, e.yy, e.xy, np.degrees(turned)
