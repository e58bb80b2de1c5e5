"""Record py4DSTEM's strain of random lattices; run by the Python of an environment with py4DSTEM (and NumPy below 2).

    PYTHON tests/peers/record_py4dstem.py > tests/peers/strain_py4dstem.json

Vectors are handed over as (y, x) px; py4DSTEM's x is the row, so they go in as they are.
"""

import contextlib
import json
import sys
from importlib.metadata import version

import numpy as np
from lattices import random_lattices

with contextlib.redirect_stdout(sys.stderr):
    from py4DSTEM.data import RealSlice
    from py4DSTEM.process.strain.latticevectors import get_rotated_strain_map, get_strain_from_reference_g1g2


def main():
    a, b, a0, b0 = random_lattices()
    data = np.array([a[:, 0], a[:, 1], b[:, 0], b[:, 1], np.ones(len(a))])[:, :, None]
    lattices = RealSlice(data=data, slicelabels=["g1x", "g1y", "g2x", "g2y", "mask"], name="g1g2_map")
    with contextlib.redirect_stdout(sys.stderr):
        strain = get_strain_from_reference_g1g2(lattices, tuple(a0), tuple(b0))
        # an x axis at 30 degrees from theirs (rows) towards their y (columns)
        turned = get_rotated_strain_map(strain, np.cos(np.pi / 6), np.sin(np.pi / 6), False)
    names = ("e_xx", "e_yy", "e_xy", "theta")
    found = {name: strain.get_slice(name).data[:, 0].tolist() for name in names}
    rotated = {name: turned.get_slice(name).data[:, 0].tolist() for name in names}
    record = {"version": version("py4DSTEM"), "a": a.tolist(), "b": b.tolist(), "a0": a0.tolist(), "b0": b0.tolist()}
    print(json.dumps({**record, "strain": found, "x_at_30_degrees_from_rows": rotated}, indent=1))


if __name__ == "__main__":
    main()
