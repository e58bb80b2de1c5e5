"""Strain end to end: error against the Cramer-Rao bound, signs, every way of asking, results saved and loaded."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import samples
from crystal import SCAN, STRAINS, deformed, judged, maps_of, moved, planted, run, small
from numpy.testing import assert_allclose, assert_array_equal

import gpuem
from gpuem import recipe, synthetic, tiles
from gpuem.analyses.deformation import MEASURES, ellipse_matrix, strain
from gpuem.analyses.strain_reference import described_alike

# ---- against the bound


@pytest.mark.parametrize(
    ("dose", "most", "pulls"),
    [(None, 1.25, 1.15), (1e6, 1.25, 1.15), (1e5, 1.25, 1.15), (1e4, 1.25, 1.15), (1e3, 1.45, 1.35)],
)
def test_set_k_is_measured_at_the_bound_and_its_errors_are_true(dose, most, pulls):
    # 128 patterns tell the ratio to 3 %: bench/strain.py holds it to 1.2
    # at 1e3 electrons Fisher scoring from the truth has 1.31: the bound looks at the true lattice only
    pattern = synthetic.Pattern(dose=dose)
    frames, truth = synthetic.generate(pattern, (4, 32), seed=2)
    valid, ratio, pull = judged(frames, pattern, truth)
    assert valid > (0.95 if dose == 1e3 else 0.99)
    assert ratio < most
    assert 0.9 < pull < pulls


def test_error_does_not_depend_on_where_disks_lie_between_pixels():
    phases = (np.arange(8) + 0.5) / 8
    frames, thetas, bounds, each = [], [], [], 24
    for k, x in enumerate(phases):
        pattern = small(center=(47 + phases[(3 * k) % 8], 48 + x))
        part, truth = synthetic.generate(pattern, (each,), k, gradient=np.tile(np.eye(2), (each, 1, 1)))
        frames.append(part)
        thetas.append(truth["theta"])
        bounds.append(truth["bound"])
    found = maps_of(run(np.stack(frames)))
    assert found["valid"].all()
    off = np.concatenate([found["a"], found["b"]], axis=1) - np.concatenate(thetas)[:, 2:]
    off = off.reshape(8, each, 4)
    # where all disks are cut alike the bound itself varies
    error = np.sqrt((off**2).mean(axis=(1, 2))) / np.array(bounds)
    # 96 numbers tell their spread to 7 %: twice that, beside the 20 % that are allowed
    assert error.max() / error.mean() < 1.34
    bias = np.abs(off.mean(axis=1)) / np.array(bounds)[:, None]
    assert bias.max() < 4 * error.mean() / math.sqrt(each)


def test_without_noise_hardly_an_error_is_left():
    pattern, _, truth = planted()
    theta = truth["theta"].reshape(-1, 6)
    frames = np.array([np.rint(100 * synthetic.expectation(pattern, one)) for one in theta]).astype(np.uint16)
    for options in ({}, {"learn": "nothing", "radius": 5.0, "edge": 1.0}):
        # of electrons there are as many as before: the noise alone is missing
        valid, ratio, pull = judged(frames, pattern, truth, gain=100.0, **options)
        assert valid == 1
        assert ratio < 0.35
        assert pull < 0.35


def polar(f):
    """U and the rotation in degrees of F = R U, (x, y) order."""
    left, values, right = np.linalg.svd(f)
    turn = left @ right
    return right.T @ np.diag(values) @ right, math.degrees(math.atan2(turn[1, 0], turn[0, 0]))


@pytest.mark.parametrize(
    ("gradient", "name"),
    [
        ([[1.01, 0], [0, 1]], "exx"),
        ([[1, 0], [0, 1.01]], "eyy"),
        ([[1, 0.01], [0.01, 1]], "exy"),
        ([[math.cos(0.01), -math.sin(0.01)], [math.sin(0.01), math.cos(0.01)]], "rotation"),
    ],
    ids=STRAINS,
)
def test_each_component_has_its_sign_and_its_axis(gradient, name):
    _, frames = deformed(gradient)
    found = maps_of(run(frames, reference=(0, 8)))
    expected = dict.fromkeys(STRAINS, 0.0) | {name: math.degrees(0.01) if name == "rotation" else 0.01}
    for key, value in expected.items():
        assert found[key][8:].mean() == pytest.approx(value, abs=4e-4 * (57.3 if key == "rotation" else 1))


@pytest.mark.parametrize(
    ("changes", "options", "most", "pulls"),
    [
        ({"tilt": 1.0}, {}, 1.3, (0.9, 1.15)),
        ({"background": 10.0}, {}, 1.25, (0.9, 1.15)),
        ({"structure": 0.3}, {}, 1.25, (0.8, 1.15)),
        ({"structure": 0.3, "drift": 1.0}, {}, 1.6, (0.5, 1.15)),
        ({"ellipse": (1.2, 30.0)}, {"ellipticity": (1.2, 30.0)}, 1.2, (0.85, 1.15)),
        ({"dead": 60}, {}, 1.35, (0.9, 1.2)),
        ({"saturation": 150}, {}, 1.3, (0.9, 1.15)),
        ({"frame": (72, 72), "center": (35.3, 36.6)}, {}, 1.45, (0.9, 1.2)),
        ({"rings": 2, "radius": 7.0}, {}, 1.55, (0.85, 1.2)),
        ({"rings": 2, "radius": 7.0}, {"learn": "measured"}, 1.6, (0.8, 1.2)),
        ({}, {"learn": "measured"}, 1.8, (0.8, 1.2)),
        ({}, {"learn": "disk"}, 1.3, (0.9, 1.15)),
        ({}, {"learn": "nothing"}, 1.3, (0.9, 1.15)),
        ({}, {"radius": 5.0, "edge": 1.0}, 1.3, (0.9, 1.15)),
        ({}, {"registration": "guided"}, 2.2, (0.8, 1.2)),
        ({}, {"registration": "correlation"}, 2.0, (0.8, 1.2)),
        ({}, {"registration": "correlation", "power": 0.5}, 8.0, (0.7, 1.3)),
        ({}, {"registration": "blobfinder"}, 6.0, (0.7, 1.3)),
        ({"wander": 5.0}, {}, 1.4, (0.9, 1.2)),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_error_over_bound(changes, options, most, pulls):
    pattern, frames, truth = planted(**changes)
    valid, ratio, pull = judged(frames, pattern, truth, **options)
    # a start may be off by half a radius: where the centre wanders in a circle, its plane isn't always that near
    assert valid > (0.9 if "wander" in changes else 0.99)
    assert ratio < most
    assert pulls[0] < pull < pulls[1]


@pytest.mark.parametrize("thickness", ["41 A", "8 A"])
def test_multislice_gold_with_default_parameters(thickness):
    folder = samples.sample_data() / "sim"
    names = {"41 A": "strainA_Au001", "8 A": "strainA_Au001_thin8A"}
    path = folder / f"{names[thickness]}_16x16x128x128_poisson1e6_u16.npy"
    if not path.exists():
        pytest.skip(f"no {path.name} among the sample data")
    block = np.zeros((16, 16), bool)
    block[:4, :4] = True
    found = maps_of(gpuem.run(gpuem.open(path), gpuem.Strain(reference=block), device="cpu"))
    truth = np.load(folder / "strainA_Au001_F_true.npy").reshape(-1, 2, 2)
    u = np.array([polar(f)[0] - np.eye(2) for f in truth])
    off = np.stack([found["exx"] - u[:, 0, 0], found["eyy"] - u[:, 1, 1], found["exy"] - u[:, 0, 1]])
    assert found["valid"].all()
    assert np.sqrt((off**2).mean()) < {"41 A": 2.1e-4, "8 A": 2.7e-4}[thickness]


# ---- every way of asking


def test_a_vacuum_image_gives_the_probe(tmp_path):
    vacuum = synthetic.Pattern(frame=(40, 40), center=(19.4, 20.2), radius=7.0, rings=2, order=0)
    image = np.random.default_rng(0).poisson(100 * synthetic.expectation(vacuum)).astype(np.float64)
    np.save(tmp_path / "vacuum.npy", image)
    pattern, frames, truth = planted(rings=2, radius=7.0)
    valid, ratio, _ = judged(frames, pattern, truth, probe=tmp_path / "vacuum.npy")
    assert valid == 1
    assert ratio < 2.4
    same = run(frames, probe=image)["strain/exx"].data
    assert_array_equal(same, run(frames, probe=tmp_path / "vacuum.npy")["strain/exx"].data)


@pytest.mark.parametrize("by", [(10, 0), (7, 7)])
@pytest.mark.parametrize("registration", ["lattice", "guided", "correlation"])
def test_a_centre_that_wanders_over_the_scan_is_followed(by, registration):
    pattern = small(frame=(112, 112), center=(50.3, 50.6))
    frames, truth = moved(pattern, SCAN, by)
    results = run(frames, registration=registration)
    found = maps_of(results)
    assert found["valid"].all()
    assert np.abs(found["center"] - truth["theta"].reshape(-1, 6)[:, :2]).max() < 0.05
    assert any("wanders by" in line for line in results["strain/exx"].attributes["found"])


def test_grains_are_told_apart_and_have_references_of_their_own():
    turn = math.radians(25)
    f = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    _, frames = deformed(f, count=32, a=(0.0, 18.0), b=(19.0, 2.0))
    found = run(frames)
    grain = found["strain/grain"].data
    assert len(np.unique(grain[:16])) == len(np.unique(grain[16:])) == 1
    assert grain[0] != grain[-1]
    for name in ("exx", "eyy", "exy"):
        assert np.abs(found[f"strain/{name}"].data).max() < 1e-3
    attributes = found["strain/exx"].attributes
    assert not np.allclose(attributes["reference_a_0"], attributes["reference_a_1"], atol=0.5)
    given = attributes["reference_a_0"], attributes["reference_b_0"]
    second = tuple(map(tuple, (attributes["reference_a_1"], attributes["reference_b_1"])))
    again = run(frames, a=tuple(given[0]), b=tuple(given[1]), lattices=(second,))["strain/grain"].data
    assert_array_equal(again, grain)


def test_the_reference_may_be_region_mask_file_vectors_or_result(tmp_path):
    _, frames = deformed([[1.01, 0], [0, 1]])
    region = run(frames, reference=(0, 8))
    mask = np.zeros(16, bool)
    mask[:8] = True
    np.save(tmp_path / "mask.npy", mask)
    saved = region.save(tmp_path / "first.zarr")
    attributes = region["strain/exx"].attributes
    assert attributes["reference"] == "region"
    assert attributes["reference_region"] == [0, 8]
    vectors = tuple(attributes["reference_a"]), tuple(attributes["reference_b"])
    for reference in (mask, tmp_path / "mask.npy", vectors, saved):
        assert_allclose(run(frames, reference=reference)["strain/exx"].data, region["strain/exx"].data, atol=1e-6)
    middle = run(frames)["strain/exx"]
    assert middle.attributes["reference"] == "median"
    assert abs(np.median(middle.data)) < 6e-3


def test_reference_vectors_may_describe_the_lattice_by_another_basis():
    _, frames = deformed([[1.01, 0], [0, 1]])
    first = run(frames, reference=((0.0, 17.0), (17.0, 0.0)))["strain/exx"].data
    for other in (((17.0, 0.0), (0.0, 17.0)), ((0.0, -17.0), (17.0, 0.0)), ((17.0, 17.0), (17.0, 0.0))):
        assert_allclose(run(frames, reference=other)["strain/exx"].data, first, atol=1e-6)
    assert_allclose(described_alike(np.array([[0, -9.0], [9, 0]]), np.array([[0, 9.1], [9, 0.1]])), [[0, 9], [9, 0]])


@pytest.mark.parametrize("measure", MEASURES)
def test_measures_are_those_of_the_lattices_that_are_told(measure):
    _, frames, _ = planted()
    results = run(frames, measure=measure)
    found, attributes = maps_of(results), results["strain/exx"].attributes
    reference = np.array([attributes["reference_a"], attributes["reference_b"]])
    expected = strain(found["a"], found["b"], reference, measure=measure)
    assert_allclose(np.stack([found[name] for name in STRAINS], axis=1), expected, rtol=1e-5, atol=1e-6)
    assert MEASURES[measure] in results["strain/exx"].description


def test_axes_turn_by_an_angle_or_to_a_reflection():
    _, frames = deformed([[1.01, 0], [0, 1]])
    turned = maps_of(run(frames, reference=(0, 8), axes=90.0))
    assert turned["eyy"][8:].mean() == pytest.approx(0.01, abs=4e-4)
    assert turned["exx"][8:].mean() == pytest.approx(0.0, abs=4e-4)
    results = run(frames, reference=(0, 8), axes=(1, 1))
    assert abs(abs(results["strain/exx"].attributes["axes_deg"]) % 90 - 45) < 0.5
    along = maps_of(results)
    assert along["exx"][8:].mean() == pytest.approx(0.005, abs=4e-4)
    assert abs(along["exy"][8:].mean()) == pytest.approx(0.005, abs=4e-4)


def test_distortion_of_the_camera_is_undone():
    f = np.array([[1.01, 0.004], [0.004, 0.995]])
    _, frames = deformed(f, distortion=(1.06, 20.0))
    found = maps_of(run(frames, reference=(0, 8), distortion=(1.06, 20.0)))
    for name, true in (("exx", 0.01), ("eyy", -0.005), ("exy", 0.004)):
        assert found[name][8:].mean() == pytest.approx(true, abs=4e-4)
    # what is told of the detector stays as it was seen
    seen = np.linalg.inv(ellipse_matrix(1.06, 20.0)) @ [17.0, 0.0]
    assert_allclose(np.median(found["a"][:8], axis=0), seen[::-1], atol=0.02)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (1, 1), (64,), (2, 2, 16)])
def test_scans_of_any_number_of_axes(shape):
    _, frames, truth = planted()
    count = math.prod(shape)
    found = run(frames.reshape(64, 96, 96)[:count].reshape(*shape, 96, 96))
    # a single pattern is a scan of one position
    assert found["strain/exx"].data.shape == (shape or (1,))
    assert found["strain/valid"].data.all()
    lattice = np.concatenate([found["strain/a"].data, found["strain/b"].data], axis=-1).reshape(count, 4)
    assert np.abs(lattice - truth["theta"].reshape(64, 6)[:count, 2:]).max() < 0.03


def test_only_the_region_of_interest_is_told():
    _, frames, _ = planted()
    found = run(frames, roi=(0, 2, 4, 12))
    inside = np.zeros(SCAN, bool)
    inside[:2, 4:12] = True
    assert_array_equal(found["strain/valid"].data, inside)
    assert_array_equal(np.isfinite(found["strain/exx"].data), inside)
    assert_array_equal(np.isfinite(found["strain/chi2"].data), inside)


def test_float_frames_with_a_gain_and_read_noise():
    pattern, frames, truth = planted()
    rng = np.random.default_rng(0)
    analog = (frames * 37.5 + rng.normal(0, 12, frames.shape)).astype(np.float32)
    for read_noise in (None, 12.0):
        valid, ratio, pull = judged(analog, pattern, truth, gain=37.5, read_noise=read_noise)
        assert valid == 1
        assert ratio < 1.35
        assert 0.9 < pull < 1.2


def test_several_analyses_in_one_pass():
    _, frames, _ = planted()
    many = [
        gpuem.Strain(), gpuem.CenterOfMass(), gpuem.Strain(name="guided", registration="guided"),
        gpuem.VirtualDetector(name="bf", outer=5.0),
    ]  # fmt: skip
    found = gpuem.run(frames, many, device="cpu")
    alone = run(frames)
    for name in STRAINS:
        assert_array_equal(found[f"strain/{name}"].data, alone[f"strain/{name}"].data)
        assert np.isfinite(found[f"guided/{name}"].data).all()
    assert "bf" in found


def test_any_number_of_threads_and_any_cut_give_the_same_bits(monkeypatch):
    _, frames, _ = planted()
    first = run(frames, threads=1)
    monkeypatch.setattr(tiles, "SHARD_NBYTES", 5 * 96 * 96 * 2)
    monkeypatch.setattr(tiles, "TILE_NBYTES", 3 * 96 * 96 * 2, raising=False)
    for threads in (1, 2, 3):
        other = run(frames, threads=threads)
        for key in first:
            assert_array_equal(first[key].data, other[key].data, err_msg=key)


# ---- results


def test_results_are_saved_and_loaded_with_all_that_was_found(tmp_path):
    _, frames, _ = planted()
    found = run(frames)
    assert {f"strain/{n}" for n in (*STRAINS, "a", "b", "center", "chi2", "disks", "counts", "valid")} < set(found)
    assert {f"strain/{n}_sigma" for n in STRAINS} < set(found)
    assert found["strain/rotation"].units == "deg"
    assert found["strain/a"].data.shape == (*SCAN, 2)
    path = found.save(tmp_path / "out.zarr")
    again = gpuem.load_results(path)
    assert set(again) == set(found)
    for key in found:
        assert_array_equal(again[key].data, found[key].data)
    attributes = again["strain/exx"].attributes
    json.dumps(dict(attributes))
    assert attributes["disks_fitted"] == 25
    assert "probe radius 5.0" in attributes["found"][0]
    xarray = pytest.importorskip("xarray")
    opened = xarray.open_zarr(path, group="strain", consolidated=False)
    assert opened["exx"].shape == SCAN
    assert_array_equal(opened["exx"].values, found["strain/exx"].data)


RECIPE = """
[input]
path = "data.npy"

[[analysis]]
kind = "strain"
center = [47.3, 48.6]
a = [0, 17]
b = [17, 0]
reference = [0, 2, 0, 16]
axes = [1, 0]
measure = "hencky"
mask = "mask.npy"

[output]
path = "out.zarr"
"""


def test_a_recipe_measures_strain(tmp_path):
    _, frames, _ = planted()
    np.save(tmp_path / "data.npy", frames)
    np.save(tmp_path / "mask.npy", np.zeros((96, 96), bool))
    (tmp_path / "a.toml").write_text(RECIPE)
    found, where = gpuem.run_recipe(tmp_path / "a.toml")
    assert where == tmp_path / "out.zarr"
    assert found["strain/valid"].data.all()
    options = {"center": (47.3, 48.6), "a": (0, 17), "b": (17, 0), "axes": (1, 0), "measure": "hencky"}
    expected = run(frames, reference=(0, 2, 0, 16), **options)
    assert_array_equal(found["strain/exx"].data, expected["strain/exx"].data)


def test_recipes_say_reference_vectors_and_grains_as_nested_lists(tmp_path):
    text = RECIPE.replace("[0, 2, 0, 16]", "[[0, 17], [17, 0]]").replace(
        "axes = [1, 0]", "axes = 30\nlattices = [[[0, 12], [12, 0]], [[3, 12], [12, -3]]]"
    )
    np.save(tmp_path / "data.npy", planted()[1])
    (tmp_path / "a.toml").write_text(text)
    asked = recipe.load(tmp_path / "a.toml")[0].analysis[0]
    assert asked.reference == ((0, 17), (17, 0))
    assert asked.lattices == (((0, 12), (12, 0)), ((3, 12), (12, -3)))
    assert asked.axes == 30


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("raduis = 5", "did you mean 'radius'"),
        ("radius = -5", "radius"),
        ("registration = 'latice'", "registration"),
        ("edge = 1.0", "edge needs radius"),
        ("ellipticity = [0.0, 3.0]", "the ratio of the axes must be positive, found 0"),
        ("probe = 'p.npy'\nradius = 5", "radius and probe"),
        ("min_disks = 2", "min_disks"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, line, told):
    np.save(tmp_path / "data.npy", planted()[1][:1])
    (tmp_path / "a.toml").write_text(RECIPE.replace('measure = "hencky"', line))
    with pytest.raises(gpuem.RecipeError) as error:
        recipe.load(tmp_path / "a.toml")
    assert told in str(error.value)
