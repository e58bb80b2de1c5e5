"""Smooth modes inside a disk: Zernike polynomials, of which what dynamical diffraction paints into disks is made."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def number_of(order: int) -> int:
    """How many modes there are up to an order."""
    return (order + 1) * (order + 2) // 2


def order_of(modes: int) -> int:
    """The order up to which there are so many modes."""
    return next(order for order in range(20) if number_of(order) == modes)


def zernike(y: NDArray[np.float64], x: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Zernike polynomials of unit mean square on the unit disk, (modes, ...); beyond it as at its rim.

    The first is constant, the next two are y and x times 2 (Noll, J. Opt. Soc. Am. 66, 207 (1976), in another order).
    """
    distance = np.hypot(y, x)
    radius = np.minimum(distance, 1.0)
    angle = np.arctan2(y, x)
    modes = []
    for n in range(order + 1):
        for m in range(-n, n + 1, 2):
            terms = [
                (-1) ** s * math.comb(n - s, s) * math.comb(n - 2 * s, (n - abs(m)) // 2 - s)
                for s in range((n - abs(m)) // 2 + 1)
            ]
            radial = sum(c * radius ** (n - 2 * s) for s, c in enumerate(terms))
            norm = math.sqrt((n + 1) * (1 if m == 0 else 2))
            modes.append(norm * radial * (np.sin(-m * angle) if m < 0 else np.cos(m * angle)))
    return np.array(modes)
