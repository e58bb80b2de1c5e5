"""Random lattices that peers are given: strains of some percent, rotations of some degrees."""

import numpy as np


def random_lattices(n=12):
    """Vectors a, b (n, 2) and their reference a0, b0, as (y, x) px."""
    random = np.random.default_rng(4)
    a0, b0 = np.array([3.1, 37.6]), np.array([34.2, -9.7])
    change = np.eye(2) + random.normal(scale=0.03, size=(n, 2, 2))
    turn = random.normal(scale=0.06, size=n)
    turn[0], change[0] = 0, np.diag([1 / 1.05, 1 / 0.99])  # 5 % along y, no rotation
    turn[1], change[1] = np.radians(2), np.eye(2)  # a rotation only
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]).transpose(2, 0, 1) @ change
    return turned @ a0, turned @ b0, a0, b0
