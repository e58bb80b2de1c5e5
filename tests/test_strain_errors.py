"""Sigma of strain holds the error of the model, on dynamical and ideal patterns; the lattice that is printed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from crystal import STRAINS, judged, maps_of, planted, run, small
from numpy.testing import assert_allclose, assert_array_equal
from samples import sample_data

from gpuem import synthetic
from gpuem.analyses.strain_errors import StrainErrors, _common, _halves

GOLD = {
    "41 A": "strainA_Au001_16x16x128x128_poisson1e6_u16.npy",
    "8 A": "strainA_Au001_thin8A_16x16x128x128_poisson1e6_u16.npy",
}
SPACING = 19.309978811953968


def gold(which, dose):
    """64 multislice patterns of 16 states, thinned to a dose, and the true deformation gradients."""
    folder = sample_data() / "sim"
    if not (folder / GOLD[which]).is_file():
        pytest.skip("no multislice patterns among the sample data")
    frames = np.load(folder / GOLD[which], mmap_mode="r")[::2, ::2]
    # a part of Poisson counts, taken at random, is Poisson
    thinned = np.random.default_rng(0).binomial(frames, dose / 1e6).astype(np.uint16)
    return thinned, np.load(folder / "strainA_Au001_F_true.npy")[::2, ::2].reshape(-1, 2, 2)


def true_strain(gradient):
    """exx, eyy, exy, rotation (deg) of F = R U, by singular values."""
    left, values, right = np.linalg.svd(gradient)
    turn, stretch = left @ right, np.swapaxes(right, 1, 2) @ (values[:, :, None] * right)
    angle = np.degrees(np.arctan2(turn[:, 1, 0], turn[:, 0, 0]))
    return np.stack([stretch[:, 0, 0] - 1, stretch[:, 1, 1] - 1, stretch[:, 0, 1], angle], axis=1)


@pytest.mark.parametrize(("which", "dose"), [("41 A", 1e6), ("8 A", 1e5), ("41 A", 2e4)])
def test_sigma_is_true_on_dynamical_patterns(which, dose):
    frames, gradient = gold(which, dose)
    results = run(frames)
    found = maps_of(results)
    assert found["valid"].all()
    error = np.stack([found[name] for name in STRAINS], axis=1) - true_strain(gradient)
    sigma = np.stack([found[f"{name}_sigma"] for name in STRAINS], axis=1)
    # the reference is the median over the scan
    pulls = (error - np.median(error, axis=0)) / sigma
    # 256 numbers that hang together in fours tell their spread to 7 %
    assert 0.85 < np.sqrt((pulls**2).mean()) < 1.25


def test_the_lattice_that_is_printed_is_that_of_the_disks():
    frames, gradient = gold("41 A", 1e6)
    line = run(frames)["strain/exx"].attributes["found"][1]
    found = re.search(r"\|a\| ([\d.]+), \|b\| ([\d.]+)", line)
    true = np.mean(np.hypot(*(np.linalg.inv(gradient).swapaxes(1, 2) @ [SPACING, 0]).T))
    other = np.mean(np.hypot(*(np.linalg.inv(gradient).swapaxes(1, 2) @ [0, SPACING]).T))
    assert_allclose([float(v) for v in found.groups()], [true, other], rtol=1e-3)


@pytest.mark.parametrize("dose", [1e5, 1e6])
def test_sigma_of_ideal_patterns_is_not_inflated(dose):
    pattern = small(dose=dose)
    frames, truth = synthetic.generate(pattern, (4, 24), seed=5)
    _, _, pull = judged(frames, pattern, truth)
    assert 0.87 < pull < 1.15


def test_sigma_is_the_larger_of_the_fit_and_what_was_measured():
    fitted = np.array([[3.0, 3.0, 3.0, 3.0], [np.nan] * 4], np.float32)
    more = StrainErrors(2.0, np.array([0.0, 7.0, 0.0, 0.0])).sigma(fitted)
    assert_allclose(more[0], [18**0.5, 5.0, 18**0.5, 18**0.5], rtol=1e-6)
    assert np.isnan(more[1]).all()
    assert_array_equal(StrainErrors(0.5, np.zeros(4)).sigma(fitted)[0], fitted[0])


def model_of(**changes):
    from gpuem.analyses.lattice_model import Model
    from gpuem.analyses.probe import Disk

    given = {
        "probe": Disk(5.0, 1.0),
        "sites": np.zeros((1, 2)),
        "first": np.array([0, 1]),
        "lattices": np.zeros((1, 6)),
        "drift": np.zeros((2, 2)),
        "good": np.zeros(0, np.float32),
        "axes": np.eye(2),
        "scan_width": 1,
        "shape": (64, 64),
        "priors": np.ones((1, 6)),
    }
    return Model(**{**given, **changes})


@pytest.mark.parametrize(
    ("dtype", "gain", "read"), [(np.uint16, 1.0, 0.05), (np.float32, 1.0, 2.0), (np.int32, 20.0, 3.0)]
)
def test_halves_add_up_and_their_noise_is_independent(dtype, gain, read):
    rng = np.random.default_rng(3)
    electrons = rng.poisson(30.0, (4, 64, 64))
    noise = 0 if dtype == np.uint16 else rng.normal(0, read, electrons.shape)
    frames = (gain * electrons + noise).astype(dtype)
    (first, second), _ = _halves(model_of(gain=gain, read=read), frames)
    assert_allclose(first + second, frames, rtol=1e-5, atol=1e-3)
    spread = np.cov(first.ravel(), second.ravel())
    expected = gain * gain * 15 if dtype == np.uint16 else (gain * gain * 30 + read * read) / 2
    # 16384 pixels tell a variance to 1 %
    assert_allclose(np.diag(spread), expected, rtol=0.06)
    assert abs(spread[0, 1]) < 0.05 * expected


def test_a_saturated_pixel_stays_one_in_both_halves():
    frames = np.full((1, 64, 64), 10, np.uint16)
    frames[0, 3, 4] = 4095
    halves, _ = _halves(model_of(saturation=4095.0), frames)
    for half in halves:
        assert half[0, 3, 4] >= 4095
        assert (half >= 4095).sum() == 1


def test_common_changes_are_told_from_noise_and_one_wrong_frame_does_not_decide():
    rng = np.random.default_rng(1)
    common = rng.normal(0, 2.0, (4000, 4))
    first, second = (common + rng.normal(0, 3.0, common.shape) for _ in range(2))
    first[7] = second[7] = 1e4
    first[9] = np.nan
    assert_allclose(_common(first, second), 4.0, rtol=0.15)


def test_every_process_that_looks_finds_the_same_sigma():
    _, frames, _ = planted()
    assert_array_equal(maps_of(run(frames))["exx_sigma"], maps_of(run(frames))["exx_sigma"])
