"""Bragg disks through a whole run: known patterns in, positions and counts out."""

from __future__ import annotations

import numpy as np
import pytest

import gpuem
from gpuem.analyses import Sample, View
from gpuem.analyses.bragg import Bragg, vector_map
from gpuem.axes import detector_axes, scan_axes
from gpuem.backends.peaks import soft_disk
from gpuem.errors import RecipeError
from gpuem.results import load_results

SHAPE = (61, 83)
PLACES = np.array([[12.3, 18.8], [30.6, 40.1], [41.2, 62.5], [15.0, 60.25]])
COUNTS = np.array([4000.0, 9000.0, 2000.0, 3000.0])


def pattern(places=PLACES, counts=COUNTS, radius=5.0, background=3.0, shape=SHAPE):
    y, x = np.ogrid[: shape[0], : shape[1]]
    image = np.full(shape, background)
    for (cy, cx), count in zip(places, counts, strict=True):
        disk = np.clip(radius - np.hypot(y - cy, x - cx) + 0.5, 0, 1)
        image += count * disk / disk.sum()
    return image


def scan(positions=(3, 4), dtype=np.float32):
    """Every frame its own shift, and one disk less than the frame before it, from four to none and again."""
    frames, truth = [], []
    for k in range(int(np.prod(positions))):
        shift = np.array([0.13 * k, -0.21 * k])
        chosen = np.arange(k % 5, 4)
        truth.append((PLACES[chosen] + shift, COUNTS[chosen]))
        frames.append(pattern(*truth[-1]))
    return np.array(frames).reshape(*positions, *SHAPE).astype(dtype), truth


def check(found, truth, within=0.03, part=0.02):
    for k, (places, counts) in enumerate(truth):
        order = np.argsort(-counts)
        n = len(counts)
        y, x, intensity = (found[f"bragg/{name}"].data.reshape(len(truth), -1)[k] for name in ("y", "x", "intensity"))
        assert found["bragg/count"].data.ravel()[k] == n
        np.testing.assert_allclose(np.column_stack([y, x])[:n], places[order], atol=within)
        np.testing.assert_allclose(intensity[:n], counts[order], rtol=part)
        assert np.isnan(y[n:]).all()
        assert np.isnan(x[n:]).all()
        assert np.isnan(intensity[n:]).all()


@pytest.mark.parametrize("subpixel", ["parabola", "upsample"])
def test_disks_are_found_where_they_are_with_their_counts(subpixel):
    data, truth = scan()
    found = gpuem.run(data, Bragg(radius=5, min_intensity=0.1, subpixel=subpixel, max_peaks=6), device="cpu")
    # a parabola on the cone that the correlation of a hard-edged disk is pulls towards whole pixels
    check(found, truth, within=0.015 if subpixel == "upsample" else 0.05)
    assert [axis.name for axis in found["bragg/y"].axes] == ["scan_y", "scan_x", "peak"]
    assert found["bragg/y"].data.shape == (3, 4, 6)
    assert found["bragg/y"].data.dtype == np.float32
    assert found["bragg/vectors"].data.shape == SHAPE
    np.testing.assert_allclose(found["bragg/vectors"].data.sum(), np.nansum(found["bragg/intensity"].data), rtol=1e-6)
    assert found["bragg/count"].attributes["radius_px"] == 5


@pytest.mark.parametrize("positions", [(1,), (7,), (1, 1), (2, 2, 3)])
def test_scans_of_any_number_of_axes(positions):
    data, truth = scan(positions)
    found = gpuem.run(data, Bragg(radius=5, min_intensity=0.1), device="cpu")
    check(found, truth)
    assert found["bragg/y"].data.shape == (*positions, 64)


def test_threads_and_cuts_make_no_difference(monkeypatch):
    data, _ = scan((10, 10), np.uint16)
    one = gpuem.run(data, Bragg(radius=5), device="cpu", threads=1)
    monkeypatch.setattr("gpuem.tiles.SHARD_NBYTES", 1 << 16)
    monkeypatch.setattr("gpuem.tiles.TILE_NBYTES", 1 << 15)
    two = gpuem.run(data, Bragg(radius=5), device="cpu", threads=2)
    for name in one:
        np.testing.assert_array_equal(one[name].data, two[name].data)


def test_positions_without_a_frame_are_nan():
    data, truth = scan()
    data[1, 2, 5, 5] = np.nan
    found = gpuem.run(data, Bragg(radius=5, min_intensity=0.1), device="cpu", on_error="mask", roi=(0, 2, 1, 4))
    count = found["bragg/count"].data
    assert np.isnan(count[1, 2])
    assert np.isnan(count[2]).all()
    assert np.isnan(count[:, 0]).all()
    assert count[0, 1] == len(truth[1][1])
    assert np.isnan(found["bragg/y"].data[1, 2]).all()
    assert np.isfinite(found["bragg/vectors"].data).all()


def test_saved_and_read_again(tmp_path):
    data, _ = scan()
    found = gpuem.run(data, Bragg(radius=5, max_peaks=5), device="cpu")
    again = load_results(found.save(tmp_path / "bragg.zarr"))
    for name in found:
        np.testing.assert_array_equal(found[name].data, again[name].data)
        assert found[name].axes == again[name].axes


def test_empty_frames():
    data = np.zeros((2, 3, *SHAPE), np.uint16)
    data[1] = 40_000
    found = gpuem.run(data, Bragg(radius=5), device="cpu")
    assert (found["bragg/count"].data == 0).all()
    assert np.isnan(found["bragg/y"].data).all()
    assert not found["bragg/vectors"].data.any()


def test_limits_on_counts_number_and_margin():
    data = pattern()[None].astype(np.float32)
    run = lambda **how: gpuem.run(data, Bragg(radius=5, min_intensity=0.0, **how), device="cpu")  # noqa: E731
    assert run(min_counts=2500)["bragg/count"].data[0] == 3
    assert run(max_peaks=2)["bragg/count"].data[0] == 2
    np.testing.assert_allclose(run(max_peaks=2)["bragg/intensity"].data[0], [9000, 4000], rtol=0.02)
    assert run(min_counts=1500, margin=14)["bragg/count"].data[0] == 3
    assert run(min_counts=1500, margin=29)["bragg/count"].data[0] == 1
    assert run(min_counts=1500, min_spacing=27.0)["bragg/count"].data[0] == 2


def test_probe_from_an_image():
    """A bullseye aperture off the image's centre, on a background."""
    y, x = np.ogrid[:41, :47]
    d = np.hypot(y - 17.3, x - 25.6)
    bullseye = np.clip(7.5 - d, 0, 1) * (1 - 0.7 * np.clip(1.5 - abs(d - 4), 0, 1))
    y, x = np.ogrid[: SHAPE[0], : SHAPE[1]]
    data = np.full((1, *SHAPE), 2.0)
    for place in PLACES:
        d = np.hypot(y - place[0], x - place[1])
        data[0] += 50 * np.clip(7.5 - d, 0, 1) * (1 - 0.7 * np.clip(1.5 - abs(d - 4), 0, 1))
    found = gpuem.run(data, Bragg(probe=100 * bullseye + 7, min_intensity=0.5), device="cpu")
    assert found["bragg/count"].data[0] == 4
    got = np.column_stack([found["bragg/y"].data[0, :4], found["bragg/x"].data[0, :4]])
    nearest = np.abs(got[:, None] - PLACES[None]).sum(axis=2).argmin(axis=1)
    assert sorted(nearest) == [0, 1, 2, 3]
    # the probe's own centre is known to some hundredths of a pixel; all disks are shifted alike
    np.testing.assert_allclose(got, PLACES[nearest], atol=0.12)
    np.testing.assert_allclose(
        got - PLACES[nearest], np.mean(got - PLACES[nearest], axis=0)[None].repeat(4, 0), atol=0.03
    )
    np.testing.assert_allclose(found["bragg/intensity"].data[0, :4], 50 * bullseye.sum(), rtol=0.05)


def test_probe_from_a_file(tmp_path):
    np.save(tmp_path / "probe.npy", np.pad(soft_disk(5, 1, 8), 5) * 30)
    data, truth = scan()
    found = gpuem.run(data, Bragg(probe=tmp_path / "probe.npy", min_intensity=0.1), device="cpu")
    check(found, truth, within=0.05, part=0.05)


@pytest.mark.parametrize(
    "probe, words",
    [
        (np.zeros((9, 9)), "counts"),
        (np.zeros((3, 9, 9)), "image"),
        (np.full((9, 9), np.nan), "image"),
        (np.full((9, 9), "a"), "image"),
        (np.ones((30, 30)), "no disk"),
        ((np.arange(30) == 4) * (np.arange(30)[:, None] == 4) * 9.0, "no disk"),
        (np.full((30, 30), -3.0), "no disk"),
    ],
)
def test_images_that_show_no_probe(probe, words):
    with pytest.raises(RecipeError, match=words):
        gpuem.run(pattern()[None], Bragg(probe=probe), device="cpu")


def test_disks_too_large_for_the_detector():
    with pytest.raises(RecipeError, match=r"radius 25 px .* 77 px.* 61x83"):
        gpuem.run(pattern()[None], Bragg(radius=25), device="cpu")


def test_radius_or_probe():
    with pytest.raises(ValueError, match="one of them"):
        Bragg(radius=3, probe=np.ones((9, 9)))
    view = View(scan_axes((2, 2)), detector_axes(SHAPE), np.dtype(np.uint16))
    with pytest.raises(RecipeError, match="radius"):
        Bragg().weights(view)


def test_the_radius_is_found_where_none_is_given():
    view = View(scan_axes((2, 2)), detector_axes(SHAPE), np.dtype(np.uint16))
    sample = Sample(np.array([pattern(), 3 * pattern()]), np.arange(2))
    found = Bragg(name="disks", power=0.9).look(view, sample)
    assert (found.name, found.power) == ("disks", 0.9)
    assert found.radius == pytest.approx(5.0, abs=0.05)
    assert Bragg(radius=4).look(view, sample).radius == 4


def test_vector_map_shares_a_peak_among_four_pixels():
    rows = np.full((3, 7), np.nan, np.float32)
    rows[0, :4] = [1, 2.25, 3.5, 80]
    rows[1, :7] = [2, 0, 0, 10, 4, 5, 20]
    rows[2, :4] = [1, -0.4, 5.4, 40]
    got = vector_map(rows, (5, 6))
    want = np.zeros((5, 6))
    want[2, 3] = want[2, 4] = 80 * 0.75 * 0.5
    want[3, 3] = want[3, 4] = 80 * 0.25 * 0.5
    want[0, 0], want[4, 5], want[0, 5] = 10, 20, 40
    np.testing.assert_allclose(got, want, atol=1e-5)
