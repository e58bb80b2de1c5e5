"""The numbers of LiberTEM-blobfinder, recorded by tests/peers/record_blobfinder.py, from other code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gpuem.backends import cpu_blobfinder as blobfinder

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))
import record_blobfinder as recorded  # noqa: E402

FOUND = json.loads((PEERS / "blobfinder.json").read_text())
TEMPLATES = {
    "circular": ("circular", 4.0, None),
    "circular, search 6.5": ("circular", 4.0, 6.5),
    "radial gradient": ("radial gradient", 4.0, None),
    "background subtraction": ("background subtraction", 4.0, None),
    "radial gradient, radius 4.6": ("radial gradient", 4.6, None),
}


def register(data, sites, name):
    pattern, radius, search = TEMPLATES[name]
    out = np.empty((len(data), len(sites), 6))
    starts = np.arange(len(data)) * data[0].size
    image = blobfinder.template(pattern, radius, search)
    blobfinder.register(data.ravel(), starts, data.shape[1:], sites, image, out)
    return out


def test_the_patterns_are_those_that_were_recorded():
    assert int(recorded.patterns().sum()) == FOUND["sum"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_registration(name):
    theirs = FOUND["templates"][name]
    ours = register(recorded.patterns(), np.round(recorded.expected()).astype(int), name)
    np.testing.assert_array_equal(ours[..., :2], theirs["centers"])
    np.testing.assert_allclose(ours[..., 2:4], theirs["refineds"], atol=1e-3, rtol=0)
    np.testing.assert_allclose(ours[..., 4], theirs["peak_values"], rtol=1e-4)
    np.testing.assert_allclose(ours[..., 5], theirs["peak_elevations"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEMPLATES)
def test_lattices(name):
    theirs = FOUND["templates"][name]
    start = np.array([recorded.CENTER, recorded.A, recorded.B])
    sites = start[0] + np.array(theirs["indices"]) @ start[1:]
    ours, used = blobfinder.fit_lattices(register(recorded.patterns(), sites.astype(int), name), start.ravel())
    want = theirs["lattice"]
    np.testing.assert_array_equal(used, want["selector"])
    for k, key in enumerate(("zero", "a", "b")):
        np.testing.assert_allclose(ours[:, 2 * k : 2 * k + 2], want[key], atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours[:, 6], np.ravel(want["error"]), rtol=1e-3)


def test_fewer_disks_than_needed_and_disks_in_a_row_have_no_lattice():
    found = np.zeros((2, 5, 6))
    found[:, :, 2] = [0, 10, 20, 30, 40]
    found[0, :, 5] = 1.0
    found[1, :2, 5] = 1.0
    lattices, used = blobfinder.fit_lattices(found, np.array([0, 0, 10.0, 0, 0, 10]))
    assert np.isnan(lattices[:, :6]).all()
    assert np.isinf(lattices[:, 6]).all()
    assert not used.any()
