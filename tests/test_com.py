"""Centre of mass: golden values of LiberTEM 0.16, physical ground truth for signs, closed form against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuem
from gpuem.analyses.com import divergence_and_curl, guess_rotation, turn


@pytest.fixture(scope="module")
def golden_data():
    """One bright pixel per frame over a fixed one, and one frame without counts."""
    ny, nx, sy, sx = 5, 6, 9, 11
    d = np.zeros((ny, nx, sy, sx), np.float32)
    for y in range(ny):
        for x in range(nx):
            d[y, x, (y + 2 * x) % sy, (3 * x + y) % sx] = 1 + y + x
            d[y, x, 4, 5] += 2
    d[2, 3] = 0
    return d


# options; at (1, 2): com, shift, field, divergence, curl, magnitude; field at the empty frame (2, 3); regression
GOLDEN = [
    ({}, (4.6666665, 6.3333335), (0.6666665, 1.3333335), (0.66666651, 1.33333349),
     (2.799999713897705, 0.5999999046325684, 1.4907120560825617), (0, 0), None),
    ({"center": (3.3, 4.2), "radius": 4.0}, (4.6666665, 6.3333335), (1.3666666, 2.1333337), (1.36666656, 2.13333368),
     (0.2999999523162842, 0.5999999046325684, 2.5335528565126415), (0, 0), None),
    ({"center": (3.3, 4.2), "radius": 4.0, "inner_radius": 1.5}, (5.0, 7.0), (1.7, 2.8000002), (1.70000005, 2.80000019),
     (-0.3500000238418579, 0.9000000953674316, 3.2756680586164264), (0, 0), None),
    ({"rotation": 30.0, "flip": True}, (4.6666665, 6.3333335), (0.6666665, 1.3333335), (0.08931661, 1.48803393),
     (2.2591204489097603, -1.1700544185593975, 1.490712056082562), (0, 0), None),
    ({"descan": "mean"}, (4.6666665, 6.3333335), (0.6666665, 1.3333335), (0.91102918, 1.28280921),
     (2.799999713897705, 0.5999999046325682, 1.5733955749972885), (0.24436267, -0.05052428),
     [[-0.2444, 0.0505], [0, 0], [0, 0]]),
    ({"descan": "plane"}, (4.6666665, 6.3333335), (0.6666665, 1.3333335), (0.96112782, 1.61172728),
     (2.551481789634342, 0.9824108631270272, 1.876547765531534), (0.30544368, -0.11919342),
     [[-0.1613, -0.8133], [0.1112, 0.2602], [-0.1222, 0.1373]]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "com", "shift", "vector", "derived", "empty", "regression"), GOLDEN)
@pytest.mark.parametrize("dtype", ["f4", "u2"])
def test_libertem_golden_values(golden_data, options, com, shift, vector, derived, empty, regression, dtype):
    found = gpuem.run(golden_data.astype(dtype), [gpuem.CenterOfMass(compatible="libertem", **options)])

    def at(*names):
        return [found[f"com/{name}"].data[1, 2] for name in names]

    assert at("y", "x") == pytest.approx(com, abs=1e-6)
    assert at("shift_y", "shift_x") == pytest.approx(shift, abs=1e-6)
    assert at("field_y", "field_x") == pytest.approx(vector, abs=1e-6)
    assert at("divergence", "curl", "magnitude") == pytest.approx(derived, abs=1e-6)
    center = options.get("center", (4.0, 5.0))
    assert [found[f"com/{n}"].data[2, 3] for n in ("y", "x")] == pytest.approx(center)
    assert [found[f"com/{n}"].data[2, 3] for n in ("shift_y", "shift_x")] == [0, 0]
    assert [found[f"com/{n}"].data[2, 3] for n in ("field_y", "field_x")] == pytest.approx(empty, abs=1e-6)
    assert not found["com/valid"].data[2, 3]
    assert np.array_equal(found["com/valid"].data, found["com/counts"].data > 0)
    if regression is not None:
        assert np.allclose(found["com/regression"].data, regression, atol=5e-5)


def test_default_centre_is_the_geometric_one_unless_compatible(golden_data):
    ours = gpuem.run(golden_data[..., :8, :10], [gpuem.CenterOfMass()])["com/shift_y"].attributes
    theirs = gpuem.run(golden_data[..., :8, :10], [gpuem.CenterOfMass(compatible="libertem")])["com/shift_y"].attributes
    assert (ours["center_y"], ours["center_x"]) == (3.5, 4.5)
    assert (theirs["center_y"], theirs["center_x"]) == (4.0, 5.0)


def test_frames_without_counts_stay_out_of_the_descan_fit(golden_data):
    found = gpuem.run(golden_data, [gpuem.CenterOfMass(descan="plane")])
    valid = found["com/valid"].data
    y, x = np.nonzero(valid)
    design = np.column_stack([np.ones(len(y)), y, x])
    shift = np.stack([found["com/shift_y"].data[valid], found["com/shift_x"].data[valid]], axis=-1)
    plane = np.linalg.lstsq(design, shift, rcond=None)[0]
    assert np.allclose(found["com/regression"].data, plane)
    given_plane = gpuem.run(golden_data, [gpuem.CenterOfMass(descan=tuple(map(tuple, plane.tolist())))])
    assert np.allclose(found["com/field_y"].data, given_plane["com/field_y"].data)


def test_rotation_turns_x_towards_y():
    # a beam deflected along the detector's +x; the detector's x axis is the scan's y axis after +90 degrees
    frames = np.zeros((2, 2, 5, 5), "u1")
    frames[..., 2, 4] = 1
    found = gpuem.run(frames, [gpuem.CenterOfMass(rotation=90.0)])
    assert found["com/field_y"].data == pytest.approx(np.full((2, 2), 2.0))
    assert found["com/field_x"].data == pytest.approx(np.zeros((2, 2)), abs=1e-12)
    frames = np.zeros((2, 2, 5, 5), "u1")
    frames[..., 4, 2] = 1
    found = gpuem.run(frames, [gpuem.CenterOfMass(rotation=90.0, flip=True)])
    assert found["com/field_x"].data == pytest.approx(np.full((2, 2), 2.0))


def attracted(scan=(23, 29)):
    """Deflection towards three atoms: minus the gradient of three wells, without curl."""
    y, x = np.indices(scan).astype(float)
    field = np.zeros((*scan, 2))
    for cy, cx, s in ((6, 7, 2.5), (15, 12, 3.0), (10, 22, 2.0)):
        bell = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s * s))
        field -= np.stack([(y - cy) * bell, (x - cx) * bell], axis=-1)
    return field


@given(angle=st.floats(-179, 180), flip=st.booleans())
def test_closed_form_finds_rotation_and_flip_with_its_sign(angle, flip):
    true = attracted()
    # what a detector turned by -angle (and mirrored) records
    seen = turn(true, -angle, False)
    if flip:
        seen = seen * [-1, 1]
    found = min((guess_rotation(seen, f, None, "gpuem") for f in (False, True)), key=lambda g: g[0])
    assert found[1] == flip
    assert abs((found[2] - angle + 180) % 360 - 180) < 0.5
    back = turn(seen, found[2], found[1])
    assert np.allclose(back, true, atol=0.05)


@pytest.mark.parametrize("angle", [0, 30, -75, 120])
def test_libertem_guess_is_on_its_grid_of_degrees(angle):
    seen = turn(attracted(), -angle, False)
    residual, _, degrees, _ = guess_rotation(seen, False, None, "libertem")
    assert degrees == angle
    grid = []
    for theta in range(360):
        _, curl = divergence_and_curl(turn(seen, theta, False))
        grid.append(np.mean(curl[:-1, :-1] ** 2))
    assert residual == pytest.approx(min(grid), abs=1e-12)


def test_auto_through_the_engine_and_its_limits():
    field = turn(attracted(), -33.0, False)
    y, x = np.indices((33, 33))
    frames = np.zeros((*field.shape[:2], 33, 33), "u4")
    for index in np.ndindex(*field.shape[:2]):
        cy, cx = field[index] + 16
        frames[index] = np.rint(1e5 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 18))
    frames[3, 3] = 0
    found = gpuem.run(frames, [gpuem.CenterOfMass(rotation="auto", flip="auto")])
    assert found["com/field_y"].attributes["rotation_deg"] == pytest.approx(33, abs=0.5)
    assert found["com/field_y"].attributes["flip"] is False
    assert found["com/field_y"].attributes["curl_to_divergence"] < 0.2
    noise = np.random.default_rng(0).poisson(5, (20, 20, 16, 16)).astype("u2")
    lost = gpuem.run(noise, [gpuem.CenterOfMass(rotation="auto")])
    assert lost["com/field_y"].attributes["curl_to_divergence"] > 0.8
    fixed = gpuem.run(frames, [gpuem.CenterOfMass(rotation=33.0, flip="auto")])
    assert fixed["com/field_y"].attributes["flip"] is False
    with pytest.raises(gpuem.RecipeError, match="2-D scan"):
        gpuem.run(frames.reshape(-1, 33, 33), [gpuem.CenterOfMass(rotation="auto")])


def test_scans_of_one_line_have_no_divergence_but_everything_else():
    frames = np.random.default_rng(0).poisson(3, (1, 7, 6, 6)).astype("u2")
    for data in (frames, frames[0]):
        found = gpuem.run(data, [gpuem.CenterOfMass(descan="mean")])
        assert "com/divergence" not in found
        assert found["com/field_x"].data.mean() == pytest.approx(0, abs=1e-12)
    lost = gpuem.run(frames, [gpuem.CenterOfMass(descan="plane"), gpuem.Sum()])
    assert np.isnan(lost["com/field_x"].data).all()
    assert np.isfinite(lost["com/x"].data).all()
    assert lost["sum/sum"].data.sum() == frames.sum()


def test_bad_arguments():
    data = np.ones((2, 2, 8, 8), "u1")
    with pytest.raises(ValueError, match="smaller than radius"):
        gpuem.CenterOfMass(radius=2, inner_radius=3)
    with pytest.raises(ValueError, match="needs radius"):
        gpuem.CenterOfMass(inner_radius=3)
    with pytest.raises(gpuem.RecipeError, match="outside the detector of 8x8"):
        gpuem.run(data, [gpuem.CenterOfMass(center=(9, 3))])
    with pytest.raises(gpuem.RecipeError, match="calibrated in px, not mrad"):
        gpuem.run(data, [gpuem.CenterOfMass(radius=5, unit="mrad")])
    with pytest.raises(gpuem.RecipeError, match="covers no pixel"):
        gpuem.run(data, [gpuem.CenterOfMass(radius=0.1)])


# ---- frames without counts, and frames that contradict the others


def camera(scan=(12, 12), blank=((5, 7),), seed=0, field=None, noise=2.0):
    """A disk that descan moves on a camera with read noise and an offset of 100; blank frames hold only noise."""
    rng = np.random.default_rng(seed)
    i, j = np.indices(scan)
    y, x = np.indices((40, 40))
    cy, cx = 19.5 + 0.05 * i, 19.5 - 0.04 * j
    if field is not None:
        cy, cx = cy + field[..., 0], cx + field[..., 1]
    disk = np.clip(8.5 - np.hypot(y - cy[..., None, None], x - cx[..., None, None]), 0, 1)
    frames = rng.poisson(40 * disk) + rng.normal(100, noise, (*scan, 40, 40))
    for at in blank:
        frames[at] = rng.normal(100, noise, (40, 40))
    return np.rint(frames).astype("u2")


def corrected(frames):
    return gpuem.dataset.of_array(frames).corrected(dark=np.full(frames.shape[2:], 100.0))


BLANKS = {
    "one": [(5, 7)],
    "some": [(0, 0), (3, 4), (3, 5), (11, 2), (7, 7), (8, 7)],
    "a line": [(4, j) for j in range(12)],
    "half": [(i, j) for i in range(12) for j in range(6)],
}


@pytest.mark.parametrize("which", BLANKS)
@pytest.mark.parametrize("descan", ["plane", "mean"])
def test_blank_frames_of_a_noisy_camera_are_in_no_fit(which, descan):
    blank = BLANKS[which]
    for seed in range(3):
        ds = corrected(camera(blank=blank, seed=seed))
        lit = np.ones((12, 12), bool)
        lit[tuple(np.transpose(blank))] = False
        found = gpuem.run(ds, gpuem.CenterOfMass(descan=descan, rotation="auto"))
        alone = gpuem.run(ds, gpuem.CenterOfMass(descan=descan, rotation="auto"), roi=lit)
        assert np.array_equal(found["com/valid"].data, lit)
        assert np.array_equal(found["com/regression"].data, alone["com/regression"].data)
        assert np.array_equal(found["com/field_y"].data[lit], alone["com/field_y"].data[lit])
        assert (found["com/shift_y"].data[~lit] == 0).all()
        facts = found["com/field_y"].attributes
        assert facts["frames_without_counts"] == len(blank)
        # five times the noise of 1600 pixels of a standard deviation of 2
        assert facts["least_counts"] == pytest.approx(5 * 40 * 2, rel=0.25)
        assert facts["least_counts"] < 0.1 * found["com/counts"].data[lit].min()


def test_what_is_left_out_is_said(caplog):
    with caplog.at_level("INFO", "gpuem"):
        gpuem.run(corrected(camera()), gpuem.CenterOfMass(descan="plane"))
    assert any("1 of 144 frames have no counts above the noise" in line for line in caplog.messages)


def test_dim_frames_are_no_blank_ones():
    frames = camera(blank=())
    # a fiftieth of the beam goes through half of the scan: 9 counts in each pixel of noise 2
    rng = np.random.default_rng(1)
    y, x = np.indices((40, 40))
    dim = np.clip(8.5 - np.hypot(y - 19.5, x - 19.5), 0, 1)
    frames[6:] = np.rint(rng.poisson(4 * dim, (6, 12, 40, 40)) + rng.normal(100, 2, (6, 12, 40, 40)))
    found = gpuem.run(corrected(frames), gpuem.CenterOfMass())
    assert found["com/valid"].data.all()


@pytest.mark.parametrize("dtype", ["u2", "i4", "f4", "f8"])
def test_few_electrons_count_whatever_the_type(dtype):
    # single electrons on a dark detector: every frame that has one has a centre of mass
    rng = np.random.default_rng(2)
    data = rng.poisson(0.002, (20, 20, 24, 24)).astype(dtype)
    found = gpuem.run(data, gpuem.CenterOfMass())
    assert np.array_equal(found["com/valid"].data, data.sum(axis=(2, 3)) > 0)
    assert 0.4 < found["com/valid"].data.mean() < 0.9


def test_negative_sums_and_a_centre_off_the_detector_are_not_valid():
    data = np.zeros((1, 3, 5, 5), "i4")
    data[0, 0, 2, 2] = 7
    data[0, 1, 2, 2] = -7
    # 10 in one corner, -9 in the other one: the centre of mass lies 40 px away
    data[0, 2, 0, 0], data[0, 2, 4, 4] = 10, -9
    for kind in ("i4", "f8"):
        found = gpuem.run(data.astype(kind), gpuem.CenterOfMass())
        assert found["com/valid"].data.tolist() == [[True, False, False]]
        assert found["com/shift_x"].data.tolist() == [[0, 0, 0]]
        theirs = gpuem.run(data.astype(kind), gpuem.CenterOfMass(compatible="libertem"))
        assert theirs["com/valid"].data.all()
        assert theirs["com/x"].data[0, 2] == -36


def test_outliers_hardly_move_a_fit_and_are_counted():
    ds = camera(blank=(), seed=4)
    lit = np.ones((12, 12), bool)
    for at in ((2, 3), (7, 8), (9, 1)):
        # a frame that somebody else's beam went through
        ds[at] = np.roll(ds[at], (9, -7), (0, 1))
        lit[at] = False
    found = gpuem.run(corrected(ds), gpuem.CenterOfMass(descan="plane", rotation="auto"))
    alone = gpuem.run(corrected(ds), gpuem.CenterOfMass(descan="plane", rotation="auto"), roi=lit)
    facts = found["com/field_y"].attributes
    assert (facts["descan_left_out"], facts["rotation_left_out"]) == (3, 3)
    assert facts["rotation_deg"] == pytest.approx(alone["com/field_y"].attributes["rotation_deg"], abs=1e-9)
    assert np.allclose(found["com/regression"].data, alone["com/regression"].data, rtol=0, atol=1e-12)
    # their own values stay
    assert found["com/valid"].data.all()
    assert found["com/shift_y"].data[2, 3] > 5


def test_fields_of_atoms_stay_in_all_fits():
    field = attracted((23, 29))
    y, x = np.indices((41, 41))
    frames = np.zeros((23, 29, 41, 41), "u4")
    for index in np.ndindex(23, 29):
        # up to 3 px on a beam that nothing else moves
        cy, cx = 2 * field[index] + 20
        frames[index] = np.rint(1e4 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 18))
    found = gpuem.run(frames, gpuem.CenterOfMass(descan="plane", rotation="auto"))
    facts = found["com/field_y"].attributes
    assert facts["rotation_left_out"] == 0
    assert abs(facts["rotation_deg"]) < 0.5
    assert facts["descan_left_out"] < 0.01 * field[..., 0].size
    shift = np.stack([found[f"com/shift_{axis}"].data.ravel() for axis in "yx"], axis=-1)
    i, j = np.indices((23, 29))
    plain = np.linalg.lstsq(np.column_stack([np.ones(i.size), i.ravel(), j.ravel()]), shift, rcond=None)[0]
    assert np.allclose(turn(plain, facts["rotation_deg"], False), found["com/regression"].data, atol=0.02)


@given(seed=st.integers(0, 10**6), width=st.floats(0.01, 5), scan=st.tuples(st.integers(2, 12), st.integers(2, 12)))
def test_normal_errors_are_fitted_as_by_plain_least_squares(seed, width, scan):
    from gpuem.analyses.robust import lonely, outliers_of_fit

    rng = np.random.default_rng(seed)
    y, x = np.indices(scan)
    design = np.column_stack([np.ones(y.size), y.ravel(), x.ravel()])
    vectors = design @ rng.normal(0, 1, (3, 2)) + np.clip(rng.normal(0, width, (y.size, 2)), -4 * width, 4 * width)
    few = y.size < 30
    assert few or not outliers_of_fit(design, vectors).any()
    assert few or not lonely(vectors.reshape(*scan, 2)).any()
