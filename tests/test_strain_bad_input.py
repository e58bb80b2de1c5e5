"""What goes wrong with strain: each with a message that says what, where, the numbers and what to do; no NaN storms."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from crystal import SCAN, STRAINS, halo, judged, maps_of, planted, run, small

import gpuem
from gpuem.synthetic import generate

GIVEN = {"center": (47.3, 48.6), "a": (0.0, 17.0), "b": (17.0, 0.0), "radius": 5.0}


def told(frames, error, *words, **options):
    with pytest.raises(error) as caught:
        run(frames, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert len(message) > 40
    return message


def masked_half(frames):
    found = maps_of(run(frames))
    half = np.repeat([True, True, False, False], 16)
    np.testing.assert_array_equal(found["valid"].astype(bool), half)
    for name in (*STRAINS, "exx_sigma", "a", "center"):
        np.testing.assert_array_equal(np.isfinite(found[name]).reshape(64, -1).all(axis=1), half, err_msg=name)
    return found


# ---- positions without a crystal


def test_amorphous_positions_are_masked_by_chi2_and_teach_nothing():
    _, frames, truth = planted()
    frames = frames.copy()
    frames[2:] = halo()[2:]
    found = masked_half(frames)
    assert found["chi2"][32:].min() > 4 * found["chi2"][:32].max()
    off = found["a"][:32] - truth["theta"].reshape(-1, 6)[:32, 2:4]
    assert np.abs(off).max() < 0.03


@pytest.mark.parametrize("counts", [0.0, 0.02])
def test_empty_positions_are_masked(counts):
    _, frames, _ = planted()
    frames = frames.copy()
    frames[2:] = np.random.default_rng(0).poisson(counts, frames[2:].shape)
    found = masked_half(frames)
    assert found["counts"][32:].max() < 0.01 * found["counts"][:32].min()


def test_a_lattice_that_is_lost_for_a_while_is_found_again():
    _, frames, _ = planted()
    frames = frames.copy().reshape(64, 96, 96)
    frames[20:40] = halo().reshape(64, 96, 96)[20:40]
    found = maps_of(run(frames))["valid"]
    assert found[:20].all()
    assert not found[20:40].any()
    assert found[40:].all()


def test_nothing_but_an_amorphous_halo():
    told(halo(), gpuem.DataError, "probe", "amorphous halo?", "give center= and radius=")


def test_nothing_at_all():
    told(np.zeros((4, 4, 64, 64), np.uint16), gpuem.DataError, "is empty", "4096 good pixels, all 0")
    told(np.full((4, 64, 64), -3, np.float32), gpuem.DataError, "all -3")


def test_one_disk_is_no_lattice():
    _, frames, _ = planted(order=0)
    told(frames, gpuem.DataError, "none of 64 frames shows one", "Vacuum or amorphous?", "give a= and b=")
    told(frames, gpuem.DataError, "1 of 25 reflections", **GIVEN)


def test_more_disks_are_asked_for_than_there_are():
    _, frames, _ = planted()
    told(frames, gpuem.DataError, "25 disks of the lattice", "26 that span a plane", "min_disks", min_disks=26)


# ---- disks that are hidden, cut or overlap


def test_disks_that_overlap():
    pattern, frames, truth = planted(a=(0.0, 9.8), b=(9.8, 0.0))
    assert judged(frames, pattern, truth)[0] > 0.95
    _, frames, _ = planted(a=(0.0, 8.5), b=(8.5, 0.0))
    given = {"a": (0.0, 8.5), "b": (8.5, 0.0), "radius": 5.0, "center": (47.3, 48.6)}
    told(frames, gpuem.DataError, "overlap", "8.5 px apart", "registration =", **given)


def test_a_beam_stop_over_the_centre():
    pattern, frames, truth = planted(stop=6.0)
    valid, ratio, pull = judged(frames, pattern, truth, mask=~pattern.counted)
    assert valid == 1
    assert ratio < 1.4
    assert 0.9 < pull < 1.2
    # without the mask it is seen to be there
    results = run(frames)
    assert "beam stop?" in results["strain/exx"].attributes["found"][0]
    assert results["strain/valid"].data.all()


def test_dead_and_hot_pixels_are_left_out_or_masked(caplog):
    caplog.set_level(logging.INFO, "gpuem")
    pattern, frames, truth = planted()
    frames = frames.copy()
    rng = np.random.default_rng(1)
    y, x = rng.integers(0, 96, (2, 60))
    frames[..., y[:30], x[:30]] = 0
    frames[..., y[30:], x[30:]] = 5000
    hidden = np.zeros((96, 96), bool)
    hidden[y, x] = True
    assert judged(frames, pattern, truth, mask=hidden)[1] < 1.4
    valid, ratio, _ = judged(frames, pattern, truth)
    assert valid == 1
    assert ratio < 1.6
    assert "pixels are dead or hot and left out" in caplog.text


@pytest.mark.parametrize("options", [{}, {"saturation": 150}])
def test_saturated_pixels(caplog, options):
    caplog.set_level(logging.INFO, "gpuem")
    pattern, frames, truth = planted(saturation=150)
    assert judged(frames, pattern, truth, **options)[1] < 1.35
    assert options or "of 150 counts are saturated" in caplog.text


def test_disks_cut_by_the_edge_are_told():
    _, frames, _ = planted(frame=(72, 72), center=(35.3, 36.6))
    results = run(frames)
    assert "cut by the edge" in results["strain/exx"].attributes["found"][1]
    assert results["strain/valid"].data.all()


# ---- what was given is wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": (10, 12, 0, 4)}, ("(10, 12, 0, 4)", "must lie inside the scan of 4 x 16")),
        ({"reference": (2, 5, 0, 4)}, ("(2, 5, 0, 4)", "must lie inside the scan of 4 x 16")),
        ({"reference": (2, 4, 0, 4), "roi": (0, 2, 0, 16)}, ("none of its 8", "region of interest", "4 x 16")),
        ({"reference": (2, 2, 0, 4)}, ("holds none of the 64",)),
        ({"reference": (0, 2)}, ("4 numbers", "4 x 16")),
        ({"reference": (-2, 2, 0, 4)}, ("count from 0",)),
        ({"reference": np.zeros(SCAN, bool)}, ("holds none of the 64",)),
        ({"reference": np.ones((3, 3), bool)}, ("(3, 3)", "(4, 16)")),
        ({"reference": Path("gone.npy")}, ("gone.npy", "can't be read")),
        ({"reference": ((0.0, 1.0), (0.0, 2.0))}, ("parallel",)),
        ({"reference": ((0.0, 7.0), (9.0, 0.0))}, ("isn't that of the lattice in the data", "stretches")),
        ({"mask": np.zeros((5, 5), bool)}, ("mask has the shape (5, 5)", "(96, 96)")),
        ({"mask": np.ones((96, 96), bool)}, ("hides every pixel", "True where pixels are hidden")),
        ({"probe": np.zeros((3, 4, 5))}, ("(3, 4, 5)", "an image (y, x)")),
        ({"probe": np.zeros((40, 40), complex)}, ("complex128", "real numbers")),
        ({"probe": np.zeros((40, 40))}, ("no disk is seen", "40 x 40")),
        ({"probe": np.full((40, 40), np.nan)}, ("no disk is seen",)),
        ({"probe": Path("gone.npy")}, ("gone.npy",)),
        ({"radius": 60.0}, ("120 px doesn't fit the detector of 96 x 96",)),
        ({"center": (300.0, 30.0)}, ("center = (300.0, 30.0)", "outside the detector of 96 x 96")),
        ({"a": (0.0, 13.0), "b": (0.0, 14.0)}, ("parallel",)),
        ({"a": (0.0, 0.3), "b": (0.3, 0.0)}, ("0.3 px apart", "can't be told apart")),
        ({"axes": (0, 0)}, ("no direction",)),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run(options, words):
    told(planted()[1], gpuem.RecipeError, *words, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"a": (0.0, 17.0)}, {"edge": 1.0}, {"radius": 0.2}, {"min_disks": 2}, {"gain": 0.0},
        {"a": (0, np.nan), "b": (1, 0)},
        {"lattices": (((0, 1), (1, 0)),)}, {"power": 2.0}, {"registration": "fast"}, {"distortion": (-1.0, 0.0)},
        {"registration": "guided", "lattices": (((0, 1), (1, 0)),), "a": (0, 1), "b": (1, 0)},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_when_it_is_said(options):
    with pytest.raises(ValueError, match="Strain"):
        gpuem.Strain(**options)


def test_a_reference_that_is_no_strain_result(tmp_path):
    frames = planted()[1]
    told(frames, gpuem.InputError, "gone.zarr", "it doesn't exist", reference=tmp_path / "gone.zarr")
    other = gpuem.run(frames, gpuem.Sum(), device="cpu").save(tmp_path / "sum.zarr")
    told(frames, gpuem.InputError, "sum.zarr", "the result of a strain analysis", reference=other)


def test_a_reference_region_without_a_lattice_costs_no_run(caplog):
    _, frames, _ = planted()
    frames = frames.copy()
    frames[3] = halo()[3]
    results = run(frames, reference=(3, 4, 0, 16))
    assert "none of its 16 scan positions has a valid lattice" in caplog.text
    assert results["strain/exx"].attributes["reference"] == "median, as no lattice was found in the region"
    assert results["strain/valid"].data[:3].all()


def test_lattices_that_are_not_that_of_the_data(caplog):
    frames = planted()[1]
    for a, b in (((0.0, 400.0), (500.0, 0.0)), ((0.0, 13.0), (14.0, 3.0)), ((0.0, 11.5), (11.5, 0.0))):
        told(frames, gpuem.RecipeError, "explains", "the data show", "|a| 17 px", a=a, b=b)
    assert not caplog.text


def test_vectors_that_are_a_little_off_do_no_harm():
    frames = planted()[1]
    right, off = run(frames), run(frames, a=(0.0, 17.9), b=(17.9, 0.0))
    for name in ("a", "b"):
        np.testing.assert_allclose(right[f"strain/{name}"].data, off[f"strain/{name}"].data, atol=4e-3)


@pytest.mark.parametrize("radius", [2.0, 8.0])
def test_a_wrong_radius(radius):
    told(planted()[1], gpuem.DataError, "radius", radius=radius)


# ---- frames


@pytest.mark.parametrize("size", [1, 3])
def test_frames_without_room_for_disks(size):
    frames = planted()[1][..., :size, :size]
    told(frames, gpuem.InputError, f"frames of {size} x {size} px", "at least 12", "the right way round")
    told(frames, gpuem.InputError, "no room", **{**GIVEN, "center": (0.0, 0.0)})


def test_frames_with_nan_stop_the_run_or_are_masked():
    frames = planted()[1].astype(np.float32)
    frames[0, 0, 3, 3] = np.nan
    told(frames, gpuem.DataError, "frame 0", "NaN or infinity", 'on_error = "mask"')
    found = maps_of(run(frames, on_error="mask"))
    assert not found["valid"][0]
    assert found["valid"][1:].all()
    assert np.isnan(found["chi2"][0])


def test_a_dark_level_below_zero_is_warned_of(caplog):
    frames = planted()[1].astype(np.float32) - 5
    results = run(frames)
    assert "the darkest pixels have -4" in caplog.text
    assert "dark image" in caplog.text
    assert results["strain/valid"].data.all()


def test_huge_counts_are_no_harm():
    pattern, frames, truth = planted()
    large = frames.astype(np.float32) * 1e6
    valid, ratio, pull = judged(large, pattern, truth, gain=1e6)
    assert valid == 1
    assert ratio < 1.3
    assert 0.9 < pull < 1.15


def test_few_frames_and_hardly_any_electrons():
    pattern = small(dose=300.0)
    frames, _ = generate(pattern, (2, 8), 0)
    try:
        found = run(frames)
    except gpuem.DataError as error:
        assert "give" in str(error)  # noqa: PT017
    else:
        assert np.isfinite(found["strain/exx"].data).sum() == found["strain/valid"].data.sum()
