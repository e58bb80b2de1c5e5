"""Record pyxem's strain of random lattices; run by the Python of an environment with pyxem.

    PYTHON tests/peers/record_pyxem.py > tests/peers/strain_pyxem.json

Vectors are handed over as (y, x) px; pyxem's are (x, y), so they go in the other way round.
"""

import contextlib
import json
import sys
from importlib.metadata import version

import numpy as np
from lattices import random_lattices

with contextlib.redirect_stdout(sys.stderr):
    import hyperspy.api as hs
    from pyxem.generators.displacement_gradient_tensor_generator import get_DisplacementGradientMap


def main():
    a, b, a0, b0 = random_lattices()
    strained = hs.signals.Signal2D(np.stack([a[:, ::-1], b[:, ::-1]], axis=1)[:, None])
    with contextlib.redirect_stdout(sys.stderr):
        maps = get_DisplacementGradientMap(strained, np.array([a0[::-1], b0[::-1]])).get_strain_maps()
    found = {name: np.ravel(maps.data[i]).tolist() for i, name in enumerate(("e11", "e22", "e12", "theta"))}
    record = {"version": version("pyxem"), "a": a.tolist(), "b": b.tolist(), "a0": a0.tolist(), "b0": b0.tolist()}
    print(json.dumps({**record, "strain": found}, indent=1))


if __name__ == "__main__":
    main()
