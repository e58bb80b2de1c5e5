"""The direct beam: known centres at several doses, hidden, cut, spotlike, wandering; and what is refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from samples import sample_data

import gpuem
from gpuem.analyses import Sample
from gpuem.analyses.direct_beam import measure_direct_beam
from gpuem.errors import DataError, RecipeError

BOX = (48, 56)


def disk(center, radius, box=BOX, edge=1.0):
    y, x = np.ogrid[: box[0], : box[1]]
    return np.clip((radius - np.hypot(y - center[0], x - center[1])) / edge + 0.5, 0, 1)


def bell(center, width, box=BOX, fine=8):
    """A Gaussian, integrated over pixels."""
    inside = (np.arange(fine) + 0.5) / fine - 0.5
    y, x = ((np.arange(n)[:, None] + inside).ravel() for n in box)
    image = np.exp(-((y[:, None] - center[0]) ** 2 + (x[None] - center[1]) ** 2) / (2 * width**2))
    return image.reshape(box[0], fine, box[1], fine).mean(axis=(1, 3))


def counted(image, dose, frames=40, seed=0, dtype="u2"):
    """Frames with so many electrons each."""
    part = image / image.sum()
    return np.random.default_rng(seed).poisson(dose * part, (frames, *image.shape)).astype(dtype)


def anywhere(rng, box=BOX, off=4.0):
    return np.array(box) / 2 - 0.5 + rng.uniform(-off, off, 2)


SHAPES = {
    "disk": (lambda c: disk(c, 10) + 0.02, "edge", 10.0),
    "soft": (lambda c: bell(c, 5.0) + 0.002, "mass", 10.0),
    "spot": (lambda c: bell(c, 0.6) + 2e-5, "mass", 1.0),
    "cut": (lambda c: disk((c[0] - 20, c[1]), 14) + 0.02, "edge", 14.0),
}


@pytest.mark.parametrize("dose", [40, 1e3, 5e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_centre_is_known_at_every_dose_and_sigma_is_honest(shape, dose):
    make, method, radius = SHAPES[shape]
    rng = np.random.default_rng(5)
    errors, pulls = [], []
    for k in range(8):
        center = anywhere(rng)
        beam = measure_direct_beam(counted(make(center), dose, seed=k))
        error = np.array(beam.center) - center + np.array([20.0 if shape == "cut" else 0.0, 0.0])
        errors.append(error)
        pulls.append(error / np.array(beam.sigma))
        assert beam.method == method
        assert beam.radius == pytest.approx(radius, rel=0.35 if method == "mass" else 0.05)
        assert beam.spread == (0.0, 0.0)
    assert np.abs(pulls).max() < 4.5
    # of 16 numbers the standard deviation is known to 18 %; what many repetitions give lies between 0.65 and 1.25
    assert 0.4 < np.sqrt(np.mean(np.square(pulls))) < 1.7
    assert np.abs(errors).max() < {40: 0.6, 1e3: 0.15, 5e4: 0.1}[dose]


def lattice(center, box=(96, 96), spacing=17.0, radius=4.5, direct=1.0):
    image = np.full(box, 0.004)
    image += 0.05 * np.exp(-np.hypot(*(np.indices(box) - np.reshape(center, (2, 1, 1)))) / 25)
    rng = np.random.default_rng(3)
    for h in range(-4, 5):
        for k in range(-4, 5):
            place = center + spacing * np.array([h * 0.96 + k * 0.28, -h * 0.28 + k * 0.96])
            strength = 0.3 * np.exp(-(h * h + k * k) / 6 + rng.normal(0, 0.2)) if (h, k) != (0, 0) else direct
            image += strength * disk(place, radius, box)
    return image


def test_among_bragg_disks_it_is_the_one_with_the_counts():
    center = np.array([49.3, 44.8])
    for direct in (1.0, 0.45):
        beam = measure_direct_beam(counted(lattice(center, direct=direct), 5e3))
        assert beam.center == pytest.approx(center, abs=0.1)
        assert beam.radius == pytest.approx(4.5, abs=0.2)


def test_beam_stops_given_and_seen():
    center = np.array([49.3, 44.8])
    y, x = np.indices((96, 96))
    hidden = np.hypot(y - center[0] - 1, x - center[1] + 1) < 8
    image = lattice(center)
    for frames, mask in (
        (counted(image, 1e4), hidden),
        (counted(image * ~hidden, 1e4), None),
    ):
        beam = measure_direct_beam(frames, mask)
        assert beam.method == "symmetry"
        assert "hidden" in beam.describe()
        assert beam.center == pytest.approx(center, abs=0.2)
    # inside the disk, and an arm across its rim
    bright = disk(center, 14, (96, 96)) + 0.02
    for stop in (np.hypot(y - center[0] + 2, x - center[1] - 1) < 6, (abs(y - center[0] - 3) < 3) & (x < center[1])):
        beam = measure_direct_beam(counted(bright * ~stop, 1e4))
        assert beam.center == pytest.approx(center, abs=0.08)
        assert beam.radius == pytest.approx(14, abs=0.1)


def test_hot_pixels_do_not_win():
    center = (21.3, 30.6)
    for image, radius in ((disk(center, 8) + 0.02, 8.0), (bell(center, 0.5) + 1e-4, 1.2)):
        frames = counted(image, 2e3)
        frames[:, 5, 9] = 60000
        frames[:, 40, 40:42] = 30000
        frames[:, :, 50] += 500
        beam = measure_direct_beam(frames)
        assert beam.center == pytest.approx(center, abs=0.05)
        assert beam.radius == pytest.approx(radius, abs=0.3)


def test_wandering_is_told_apart_from_the_error_of_the_mean():
    rng = np.random.default_rng(0)
    scan = (12, 12)
    y, x = np.indices(scan)
    centers = np.stack([24.2 + 0.15 * (y - 5.5), 27.7 - 0.08 * (x - 5.5)], axis=-1).reshape(-1, 2)
    frames = np.array([rng.poisson(8 * (disk(c, 9) + 0.02)) for c in centers]).astype("u2")
    beam = Sample(frames, np.arange(144), scan).direct_beam
    assert beam.center == pytest.approx(centers.mean(axis=0), abs=0.05)
    assert beam.spread == pytest.approx(centers.std(axis=0), rel=0.2)
    assert max(beam.sigma) < 0.03
    assert "wanders" in beam.describe()


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((3, 20, 20), "u2"), "is empty .400 good pixels, all 0"),
        (np.full((3, 20, 20), np.nan), "is empty .0 good pixels"),
        (np.random.default_rng(0).poisson(5, (30, 40, 40)), "no disk rises 8 standard errors"),
        (np.random.default_rng(0).normal(0, 1, (30, 40, 40)), "no disk rises 8 standard errors"),
    ],
)
def test_nothing_to_measure_is_refused_with_numbers(frames, words):
    with pytest.raises(DataError, match=words) as error:
        measure_direct_beam(frames)
    assert "give center = [y, x]" in str(error.value)


def test_multislice_pattern_has_its_centre_where_the_simulation_put_it():
    folder = sample_data() / "sim"
    truth = json.loads((folder / "strainA_Au001.json").read_text())["detector"]["zero_beam_px_rowcol"]
    for path in sorted(folder.glob("*poisson1e6*.npy")):
        beam = measure_direct_beam(np.load(path, mmap_mode="r").reshape(-1, 128, 128)[::4])
        assert beam.center == pytest.approx(truth, abs=0.05)
        assert np.abs((np.array(beam.center) - truth) / beam.sigma).max() < 3


def test_real_scan_gives_the_same_centre_in_parts():
    frames = gpuem.open(sample_data() / "real4d" / "rotavirus_crop64x64_bin2_128x128_u16.h5")[::16].reshape(
        -1, 128, 128
    )
    parts = [measure_direct_beam(frames[k::4]) for k in range(2)]
    centers = np.array([part.center for part in parts])
    assert np.ptp(centers, axis=0).max() < 4 * max(parts[0].sigma)
    assert parts[0].radius == pytest.approx(30.4, abs=0.2)


# ---- through a run


def test_all_analyses_share_one_measurement(monkeypatch):
    from gpuem.analyses import direct_beam

    calls = []
    real = direct_beam.measure_direct_beam
    monkeypatch.setattr(direct_beam, "measure_direct_beam", lambda *a, **k: calls.append(1) or real(*a, **k))
    center = (21.3, 30.6)
    data = counted(disk(center, 8) + 0.02, 2e3, 36).reshape(6, 6, *BOX)
    found = gpuem.run(data, [
        gpuem.VirtualDetector(name="bf", shape="disk", outer=9, center="auto"),
        gpuem.VirtualDetector(name="s", shape="sectors", sectors=2, outer=9, center="auto"),
        gpuem.CenterOfMass(center="auto", radius=12),
        gpuem.Bragg(center="auto", radius=5),
    ])  # fmt: skip
    assert calls == [1]
    for name in ("bf", "s/0", "com/shift_y", "bragg/count"):
        facts = found[name].attributes
        assert (facts["center_y"], facts["center_x"]) == pytest.approx(center, abs=0.05)
        assert facts["center_from"] == "measured"
        assert 0 < facts["direct_beam_sigma_y"] < 0.05
        assert facts["direct_beam_radius"] == pytest.approx(8, abs=0.1)
    given = gpuem.run(data, gpuem.VirtualDetector(name="bf", shape="disk", outer=9, center=(
        found["bf"].attributes["center_y"], found["bf"].attributes["center_x"])))  # fmt: skip
    assert np.array_equal(given["bf"].data, found["bf"].data)
    axis = found["bragg/vectors"].axes[0]
    assert axis.origin == pytest.approx(-center[0], abs=0.05)
    assert found["com/shift_y"].data.mean() == pytest.approx(0, abs=0.05)


def test_auto_survives_saving_and_a_resumed_run(tmp_path):
    np.save(tmp_path / "a.npy", counted(disk((21.3, 30.6), 8) + 0.02, 2e3, 36).reshape(6, 6, *BOX))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[input]\npath = "a.npy"\n[[analysis]]\nkind = "virtual"\nname = "bf"\nouter = 9\ncenter = "auto"\n'
        '[output]\npath = "r.zarr"\n'
    )
    found, where = gpuem.run_recipe(recipe)
    again = gpuem.load_results(where)
    assert again["bf"].attributes["direct_beam_y"] == found["bf"].attributes["direct_beam_y"]
    assert again["bf"].attributes["outer_px"] == 9


def test_auto_without_a_beam_is_an_error_with_numbers():
    noise = np.random.default_rng(0).poisson(5, (6, 6, 40, 40)).astype("u2")
    with pytest.raises(DataError, match="no disk rises"):
        gpuem.run(noise, gpuem.VirtualDetector(name="bf", outer=9, center="auto"))
    with pytest.raises(ValueError, match="center"):
        gpuem.VirtualDetector(name="bf", outer=9, center="middle")
    with pytest.raises(RecipeError, match="measured in a sample"):
        gpuem.CenterOfMass(center="auto").center_in(gpuem.job.view_of(gpuem.dataset.of_array(noise)))


def test_a_default_centre_beside_the_beam_is_a_warning(tmp_path, caplog, monkeypatch):
    frames = counted(disk((28.2, 20.1), 8) + 0.02, 2e3, 36).reshape(6, 6, *BOX)
    np.save(tmp_path / "a.npy", frames)
    ds = gpuem.open(tmp_path / "a.npy")
    adf = gpuem.VirtualDetector(name="adf", inner=9, outer=20)
    with caplog.at_level(logging.WARNING, "gpuem"):
        gpuem.run(ds, [adf, gpuem.CenterOfMass(descan="plane")])
    assert len(caplog.messages) == 1
    assert (
        "adf: annulus at the default centre (23.5, 27.5); the direct beam is measured at (28.2, 20.1) +- 0."
        in (caplog.messages[0])
    )
    assert 'give center or center = "auto"' in caplog.messages[0]
    # where all frames are summed nothing is read for it
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "gpuem"):
        patch.setattr("gpuem.look.sample", None)
        gpuem.run(ds, [adf, gpuem.Sum()])
    assert len(caplog.messages) == 1
    assert "the direct beam is measured at (28.2, 20.1) +- 0." in caplog.messages[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "gpuem"):
        gpuem.run(ds, [adf.model_copy(update={"center": (28.0, 20.0)}), gpuem.CenterOfMass(compatible="libertem")])
        # a default centre that is right enough
        np.save(tmp_path / "b.npy", counted(disk((23.9, 27.3), 8) + 0.02, 2e3, 36).reshape(6, 6, *BOX))
        gpuem.run(gpuem.open(tmp_path / "b.npy"), adf)
        # and a pattern without a beam
        np.save(tmp_path / "c.npy", np.random.default_rng(0).poisson(5, (6, 6, *BOX)).astype("u2"))
        gpuem.run(gpuem.open(tmp_path / "c.npy"), adf)
    assert caplog.messages == []


def test_check_and_previews_draw_detectors_over_the_mean_pattern(tmp_path, capsys):
    from gpuem.cli_report import check_one
    from gpuem.plot import save_previews
    from gpuem.recipe import load_one

    np.save(tmp_path / "a.npy", counted(disk((28.2, 20.1), 8) + 0.02, 2e3, 36).reshape(6, 6, *BOX))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[input]\npath = "a.npy"\n[[analysis]]\nkind = "virtual"\nname = "adf"\ninner = 9\nouter = 20\n'
        '[[analysis]]\nkind = "virtual"\nname = "box"\nshape = "rectangle"\nheight = 4\nwidth = 6\ncenter = "auto"\n'
        '[[analysis]]\nkind = "com"\ncenter = [28, 20]\nradius = 10\n'
        '[[analysis]]\nkind = "sum"\n[output]\npath = "r.zarr"\n'
    )
    check_one(load_one(recipe)[0], recipe)
    said = capsys.readouterr().out
    assert "direct beam      at (28." in said
    assert "adf              annulus, centre (23.50, 27.50) px, geometric, inner 9.00 px, outer 20.00 px" in said
    assert "com              disk, centre (28.00, 20.00) px, given, outer 10.00 px" in said
    assert (tmp_path / "r.detectors.png").stat().st_size > 5000
    found, _ = gpuem.run_recipe(recipe)
    names = [path.name for path in save_previews(found, tmp_path / "pictures")]
    assert "sum.detectors.png" in names
    facts = found["box"].attributes
    assert (facts["shape"], facts["height_px"], facts["width_px"], facts["unit"]) == ("rectangle", 4, 6, "px")
