"""The small linear systems of the joint lattice fit on the processor: one disk's, one lattice's; float64.

Columns of `note` are those of `gpuem.backends.lattice_fit`.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# sums of floats may be reordered into vector lanes
FAST = {"reassoc", "nsz", "contract", "arcp"}
helper: Any = numba.njit(nogil=True, boundscheck=False, error_model="numpy", fastmath=FAST)
# disks that lie so many standard deviations off their lattice pull no harder than at that distance
HUBER = 3.0


@helper  # type: ignore[untyped-decorator, unused-ignore]
def _equations(sums: Any) -> Any:
    """Sums of a window as a matrix (6, 6) and its right-hand side beside it."""
    local = np.empty((6, 7))
    n = 0
    for i in range(6):
        for j in range(i, 6):
            local[i, j] = local[j, i] = sums[n]
            n += 1
        local[i, 6] = sums[21 + i]
    return local


@helper  # type: ignore[untyped-decorator, unused-ignore]
def eliminate(sums: Any, prior: Any, note: Any, numbers: Any, first: Any) -> Any:
    """From a window's normal equations to the information and score of the disk's place; its chi^2.

    Background, gradient and intensity are eliminated in this order, with their priors; the intensity and background of
    the next step are noted.
    """
    local = _equations(sums)
    level = note[0]
    if local[0, 0] <= 0 or local[3, 3] <= 0:
        return 0.0
    determinant = local[0, 0] * local[3, 3] - local[0, 3] ** 2
    note[12] = local[3, 3] / determinant if determinant > 0 else np.inf
    added = 0.0
    if not first:
        local[0, 0] += prior[3]
        local[0, 6] += prior[3] * (prior[2] - note[1])
    if first or level <= 0 or prior[1] <= 0:
        for c in range(1, 3):
            local[c, :] = 0.0
            local[:, c] = 0.0
            local[c, c] = 1.0
    else:
        added = 1 / (prior[1] * level * level)
        local[1, 1] += added
        local[2, 2] += added
    explained = 0.0
    for p in range(4):
        pivot = local[p, p]
        if not pivot > 0:
            return 0.0
        if p == 2:
            note[10] = 1 / max((pivot - added) * level * level, 1e-30) if added > 0 else np.inf
        explained += local[p, 6] ** 2 / pivot
        for i in range(p + 1, 6):
            factor = local[i, p] / pivot
            for j in range(p + 1, 7):
                local[i, j] -= factor * local[p, j]
    change = np.empty(4)
    for p in range(3, -1, -1):
        rest = local[p, 6]
        for j in range(p + 1, 4):
            rest -= local[p, j] * change[j]
        change[p] = rest / local[p, p]
    note[8], note[9] = (change[1] / level, change[2] / level) if level > 0 else (0.0, 0.0)
    note[0] = max(level + change[3], 0.0)
    note[1] = max(note[1] + change[0], 0.0)
    scale = 1.0
    if first:
        # all pixels counted alike: their variance is about that in the middle of the rim
        scale, level = 1 / max(numbers[0] * (0.5 * note[0] + note[1]) + numbers[1], 1e-6), note[0]
    note[11] = 1 / (local[3, 3] * scale)
    note[2], note[3], note[4] = (local[4, 4] * level * level * scale, local[4, 5] * level * level * scale,
                                 local[5, 5] * level * level * scale)  # fmt: skip
    note[5], note[6] = local[4, 6] * level * scale, local[5, 6] * level * scale
    return (sums[27] - explained) * scale


@helper  # type: ignore[untyped-decorator, unused-ignore]
def lattice_step(theta: Any, start: Any, of: Any, numbers: Any, note: Any, normal: Any, step: Any, blurred: Any) -> Any:
    """Solve for the change of the lattice; False where the disks don't determine it."""
    sites, priors, _ = of
    for turn in range(1 if blurred else 2):
        normal[:] = 0.0
        step[:] = 0.0
        for p in range(6):
            normal[p, p] = numbers[6]
            step[p] = numbers[6] * (start[p] - theta[p])
        for k in range(sites.shape[0]):
            a, b, c = note[k, 2], note[k, 3], note[k, 4]
            if not a + c > 0:
                continue
            if turn == 0:
                note[k, 7] = 1.0
            robust, own = note[k, 7], priors[k, 4]
            determinant = (1 + own * a) * (1 + own * c) - own * own * b * b
            m, o, q = (1 + own * c) / determinant, -own * b / determinant, (1 + own * a) / determinant
            w00, w01, w11 = robust * (m * a + o * b), robust * (m * b + o * c), robust * (o * b + q * c)
            r0, r1 = robust * (m * note[k, 5] + o * note[k, 6]), robust * (o * note[k, 5] + q * note[k, 6])
            for p in range(3):
                e = 1.0 if p == 0 else sites[k, p - 1]
                step[2 * p] += e * r0
                step[2 * p + 1] += e * r1
                for s in range(p + 1):
                    f = e * (1.0 if s == 0 else sites[k, s - 1])
                    normal[2 * p, 2 * s] += f * w00
                    normal[2 * p + 1, 2 * s] += f * w01
                    normal[2 * p, 2 * s + 1] += f * w01
                    normal[2 * p + 1, 2 * s + 1] += f * w11
        if not solve(normal, step):
            return False
        if not blurred and turn == 0:
            outliers(sites, priors, note, step)
    return True


@helper  # type: ignore[untyped-decorator, unused-ignore]
def outliers(sites: Any, priors: Any, note: Any, step: Any) -> None:
    """How far every disk lies off the lattice after the step (chi^2 of two numbers), and its robust weight."""
    for k in range(sites.shape[0]):
        a, b, c = note[k, 2], note[k, 3], note[k, 4]
        note[k, 13] = 0.0
        area = a * c - b * b
        if not area > 1e-9 * a * c:
            continue
        move_y = step[0] + sites[k, 0] * step[2] + sites[k, 1] * step[4]
        move_x = step[1] + sites[k, 0] * step[3] + sites[k, 1] * step[5]
        y, x = note[k, 5] - a * move_y - b * move_x, note[k, 6] - b * move_y - c * move_x
        # the distance is A^-1 (y, x); its variance A^-1 + s^2
        off_y, off_x = (c * y - b * x) / area, (a * x - b * y) / area
        v00, v01, v11 = c / area + priors[k, 4], -b / area, a / area + priors[k, 4]
        square = (v11 * off_y * off_y - 2 * v01 * off_y * off_x + v00 * off_x * off_x) / (v00 * v11 - v01 * v01)
        note[k, 13] = square
        if square > HUBER * HUBER:
            note[k, 7] = HUBER / math.sqrt(square)


@helper  # type: ignore[untyped-decorator, unused-ignore]
def solve(normal: Any, step: Any) -> Any:
    """Replace `normal` (lower triangle) by its Cholesky factor and `step` by the solution; False if not positive."""
    for i in range(6):
        for j in range(i + 1):
            rest = normal[i, j]
            for k in range(j):
                rest -= normal[i, k] * normal[j, k]
            if i == j:
                if not rest > 0:
                    return False
                normal[i, i] = math.sqrt(rest)
            else:
                normal[i, j] = rest / normal[j, j]
    substitute(normal, step)
    return True


@helper  # type: ignore[untyped-decorator, unused-ignore]
def substitute(factor: Any, step: Any) -> None:
    """Solve with a Cholesky factor, in place."""
    for i in range(6):
        for k in range(i):
            step[i] -= factor[i, k] * step[k]
        step[i] /= factor[i, i]
    for i in range(5, -1, -1):
        for k in range(i + 1, 6):
            step[i] -= factor[k, i] * step[k]
        step[i] /= factor[i, i]


@helper  # type: ignore[untyped-decorator, unused-ignore]
def move(theta: Any, step: Any, sites: Any, longest: Any) -> Any:
    """Take the step, shortened where it moves a disk too far; how far it moves any disk."""
    far = 0.0
    for k in range(sites.shape[0]):
        y = step[0] + sites[k, 0] * step[2] + sites[k, 1] * step[4]
        x = step[1] + sites[k, 0] * step[3] + sites[k, 1] * step[5]
        far = max(far, math.sqrt(y * y + x * x))
    share = min(1.0, longest / far) if far > 0 else 1.0
    for p in range(6):
        theta[p] += share * step[p]
    return far


@helper  # type: ignore[untyped-decorator, unused-ignore]
def scatter(note: Any, of: Any, step: Any) -> Any:
    """How much more the disks scatter about their lattice than they should, as a factor of the variance, at least 1."""
    total, number = 0.0, 0
    for k in range(note.shape[0]):
        if note[k, 7] > 0 and note[k, 13] > 0:
            total += note[k, 13] * note[k, 7]
            number += 2
    return max(1.0, total / (number - 6)) if number > 8 else 1.0


@helper  # type: ignore[untyped-decorator, unused-ignore]
def sigmas(theta: Any, factor: Any, inverse: Any, axes: Any, scatter: Any, row: Any) -> None:
    """One sigma of exx, eyy, exy and the rotation in degrees, to first order.

    With G = [a b], columns in (x, y) in the axes of the strain, F = (G G0^-1)^-T gives dF F^-1 = -(dG G^-1)^T =: L;
    strain is its symmetric, rotation its antisymmetric part.
    """
    for c in range(6):
        inverse[c, :] = 0.0
        inverse[c, c] = 1.0
        substitute(factor, inverse[c])
    ax, ay = axes[0, 0] * theta[3] + axes[0, 1] * theta[2], axes[1, 0] * theta[3] + axes[1, 1] * theta[2]
    bx, by = axes[0, 0] * theta[5] + axes[0, 1] * theta[4], axes[1, 0] * theta[5] + axes[1, 1] * theta[4]
    area = ax * by - ay * bx
    slopes = np.zeros((4, 4))
    for vector in range(2):
        # rows of G^-1: what a change of a, of b contributes
        inv_x, inv_y = (by / area, -bx / area) if vector == 0 else (-ay / area, ax / area)
        for axis in range(2):
            # a change of the y (0) or x (1) component on the detector
            dx, dy = axes[0, 1 - axis], axes[1, 1 - axis]
            column = 2 * vector + axis
            slopes[0, column] = -dx * inv_x
            slopes[1, column] = -dy * inv_y
            # L_xy = -(dG G^-1)_yx
            xy, yx = -dy * inv_x, -dx * inv_y
            slopes[2, column] = 0.5 * (xy + yx)
            slopes[3, column] = 0.5 * (yx - xy) * 180 / math.pi
    for m in range(4):
        variance = 0.0
        for i in range(4):
            for j in range(4):
                variance += slopes[m, i] * inverse[2 + i, 2 + j] * slopes[m, j]
        row[6 + m] = math.sqrt(max(variance, 0.0) * scatter)
