"""Probe, lattice, grains, reflections and descan, found from nothing but frames."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from samples import sample_data

from gpuem.analyses.lattice_finding import find_lattice
from gpuem.analyses.lattice_sites import centre_plane, describe, sites
from gpuem.analyses.lattice_voting import canonical, distance
from gpuem.analyses.probe_finding import FoundProbe, find_probe
from gpuem.errors import DataError
from gpuem.synthetic import Pattern, deformation, generate

K = Pattern()
TURN = math.radians(17)


def frames_of(pattern, n=32, strain=0.02, rotation=0.01, seed=0):
    frames, truth = generate(pattern, (n,), seed, gradient=deformation((n,), strain, rotation))
    return frames, truth["theta"].reshape(n, 3, 2)


def everything(shape):
    return np.ones(shape, np.bool_)


def probe_of(frames, good=None):
    mean = frames.mean(axis=0, dtype=np.float64)
    return find_probe(mean, everything(mean.shape) if good is None else good)


def check_lattice(frames, truth, part=0.02, good=None, probe=None, members=None):
    """The first lattice is the true one in every frame, none is half or double of it; return what was found."""
    good = everything(frames.shape[1:]) if good is None else good
    probe = probe or probe_of(frames, good)
    found = find_lattice(frames, probe, good)
    first = found[0]
    assert [lattice.kind for lattice in found[1:]] in ([], ["second"])
    assert first.frames.tolist() == (list(range(len(frames))) if members is None else list(members))
    for index, basis, center in zip(first.frames, first.bases, first.centers, strict=True):
        assert distance(basis, truth[index, 1:]) < part
        assert np.abs(center - truth[index, 0]).max() < 0.6
    return probe, found


def halo(n, background=0.3):
    y, x = np.mgrid[:256, :256]
    q = np.hypot(y - 127.3, x - 128.6)
    expected = np.clip(9.5 - q, 0, 1) * 200 + 8 * np.exp(-((q / 40) ** 2) / 2) + background
    return np.random.default_rng(1).poisson(np.broadcast_to(expected, (n, 256, 256)))


# ---- the probe


@pytest.mark.parametrize(
    "radius, edge, order, far", [(2, 1, 2, 0.03), (3, 0.5, 2, 0.05), (5, 2, 2, 0.03), (9, 1, 2, 0.02), (17, 1, 2, 0.03),
                                 (2, 1, 0, 0.03), (30, 6, 0, 0.03), (60, 1, 0, 0.03)]
)  # fmt: skip
def test_probe_to_hundredths_of_a_pixel(radius, edge, order, far):
    frames, _ = frames_of(replace(K, radius=radius, edge=edge, order=order))
    found = probe_of(frames)
    assert found.radius == pytest.approx(radius, abs=far)
    assert found.edge == pytest.approx(edge, abs=0.15)
    assert found.center == pytest.approx(K.center, abs=0.03)
    assert not found.notes


@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5, 1e6])
def test_probe_at_any_dose(dose):
    found = probe_of(frames_of(replace(K, dose=dose))[0])
    assert found.radius == pytest.approx(9, abs=0.05)
    assert found.center == pytest.approx(K.center, abs=0.06)


@pytest.mark.parametrize(
    "change, far",
    [
        ({"a": (0.0, 15.0), "b": (15.0, 0.0)}, 0.03),
        ({"a": (0.0, 12.0), "b": (12.0, 0.0)}, 0.06),
        ({"background": 20.0}, 0.03),
        ({"tilt": 1.5}, 0.03),
        ({"dead": 300}, 0.03),
        ({"stop": 6.0}, 0.05),
        ({"structure": 0.6}, 0.15),
        ({"rings": 3}, 0.2),
        ({"ellipse": (1.05, 30.0)}, 0.1),
        ({"frame": (211, 173), "center": (101.2, 88.7)}, 0.03),
    ],
    ids=str,
)
def test_probe_among_difficulties(change, far):
    pattern = replace(K, **change)
    found = probe_of(frames_of(pattern)[0])
    assert found.radius == pytest.approx(9, abs=far)
    assert found.center == pytest.approx(pattern.center, abs=0.06)


def test_probe_beside_hot_pixels():
    frames = frames_of(K)[0].astype(np.float64)
    frames[:, 50, 60] = 1e5
    frames[:, 128, 130] = 1e4
    frames[:, 20, 20:22] = 1e5
    assert probe_of(frames).radius == pytest.approx(9, abs=0.03)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stop", [12.0, 20.0])
def test_direct_beam_behind_a_stop_is_the_centre_of_friedel_pairs(stop, masked):
    pattern = replace(K, stop=stop)
    frames, truth = frames_of(pattern)
    good = pattern.counted if masked else everything(pattern.frame)
    found, _ = check_lattice(frames, truth, good=good)
    assert found.radius == pytest.approx(9, abs=0.1)
    assert found.center == pytest.approx(K.center, abs=0.3)
    assert "hidden" in found.describe()


def test_saturated_beam():
    frames, truth = frames_of(replace(K, saturation=60))
    found, _ = check_lattice(frames, truth)
    assert found.radius == pytest.approx(9, abs=0.25)
    assert "saturated" in found.describe()


@pytest.mark.parametrize("kind", ["empty", "constant", "halo", "ring", "noise", "sparse", "ramp", "masked"])
def test_nothing_like_a_disk_is_told(kind):
    y, x = np.mgrid[:256, :256]
    rng = np.random.default_rng(0)
    q = np.hypot(y - 127, x - 128)
    mean = {
        "empty": np.zeros((64, 64)),
        "constant": np.full((64, 64), 3),
        "halo": rng.poisson(1600 * np.exp(-((q / 30) ** 2) / 2)) / 16,
        "ring": rng.poisson(320 * np.exp(-(((q - 50) / 10) ** 2) / 2)) / 16,
        "noise": rng.poisson(3, (256, 256)),
        "sparse": rng.poisson(0.01, (256, 256)),
        "ramp": x.astype(np.float64),
        "masked": q,
    }[kind]
    with pytest.raises(DataError, match="give center= and radius="):
        find_probe(mean, np.full(mean.shape, kind != "masked"))


# ---- the lattice


@pytest.mark.parametrize("dose", [1e3, 1e4, 1e5, 1e6])
def test_set_k_at_any_dose(dose):
    frames, truth = frames_of(replace(K, dose=dose))
    probe, found = check_lattice(frames, truth)
    mean = frames.mean(axis=0, dtype=np.float64)
    shown = sites(found[0], mean.shape, probe, mean, everything(mean.shape), frames)
    expected = {(h, k) for h in range(-2, 3) for k in range(-2, 3)}
    assert expected == {tuple(v) for v in shown.hk.tolist()}
    assert shown.hk[0].tolist() == [0, 0]
    assert (shown.covered > 0.6).all()
    assert shown.overlap == 0
    (ay, ax), (by, bx) = found[0].a, found[0].b
    assert ax > abs(ay)
    assert by > abs(bx)
    assert ax * by - ay * bx > 0
    lines = describe(probe, found, shown)
    assert "25 disks" in lines[1]
    assert "explains 100 %" in lines[1]
    assert lines[2].startswith("second choice: ")


@pytest.mark.parametrize(
    "change",
    [
        {"frame": (211, 173), "center": (101.2, 88.7), "a": (0.0, 30.0), "b": (26.0, 15.0), "radius": 6.0},
        {"a": (5.0, 31.0), "b": (28.0, 12.0), "radius": 6.0, "order": 3},
        {"a": (0.0, 20.0), "b": (60.0, 0.0), "radius": 6.0, "order": 3},
        {"a": (5.0, 58.0), "b": (19.0, -3.0), "radius": 6.0, "order": 4},
        {"a": (0.0, 22.0), "b": (22.0, 0.0), "radius": 5.0, "order": 5, "dose": 1e5},
        {"a": (0.0, 12.0), "b": (12.0, 0.0), "radius": 2.0, "order": 8},
        {"a": (0.0, 15.0), "b": (15.0, 0.0)},
        {"order": 1},
        {"structure": 0.6, "drift": 2.0},
        {"tilt": 1.5},
        {"rings": 3},
        {"dead": 300},
    ],
    ids=str,
)
def test_lattices_of_many_kinds(change):
    frames, truth = frames_of(replace(K, **change))
    probe, found = check_lattice(frames, truth, part=0.03)
    mean = frames.mean(axis=0, dtype=np.float64)
    shown = sites(found[0], mean.shape, probe, mean, everything(mean.shape), frames)
    assert (shown.overlap > 0) == ("a" in change and math.hypot(*change["b"]) < 2 * probe.radius)


def test_large_strain_and_rotation_are_one_grain():
    frames, truth = frames_of(K, 64, 0.05, 0.087)
    check_lattice(frames, truth)


def test_weak_superlattice_is_not_the_lattice():
    strong, truth = frames_of(K)
    weak, _ = generate(
        replace(K, a=(0.0, 19.0), order=4, peak=3.0, background=0.01), (32,), 1, gradient=deformation((32,))
    )
    check_lattice(strong + weak, truth)


def test_missing_disks():
    frames, truth = frames_of(K)
    y, x = np.mgrid[:256, :256]
    for h, k in ((1, 0), (0, -1), (1, 1), (-2, 1), (2, 2), (-1, -2)):
        gone = np.hypot(y - 127.3 - 38 * k, x - 128.6 - 38 * h) < 14
        frames[:, gone] = 0
    check_lattice(frames, truth)


def test_a_radius_that_is_given_need_not_be_exact():
    frames, truth = frames_of(K)
    for radius in (7.0, 11.0):
        check_lattice(frames, truth, probe=FoundProbe(K.center, radius, 1.0))


def test_amorphous_frames_belong_to_no_grain():
    frames, truth = frames_of(K)
    frames[::2] = halo(16)
    check_lattice(frames, truth, members=range(1, 32, 2))


def test_two_grains():
    n = 60
    frames, truth = frames_of(K, n)
    turned = (38 * math.cos(TURN), 38 * math.sin(TURN))
    second, other = frames_of(replace(K, a=turned[::-1], b=(turned[0], -turned[1])), n)
    chosen = np.random.default_rng(0).permutation(n)[:18]
    frames[chosen], truth[chosen] = second[chosen], other[chosen]
    found = find_lattice(frames, probe_of(frames), everything(frames.shape[1:]))
    grains = [lattice for lattice in found if lattice.kind == "grain"]
    assert [lattice.frames.size for lattice in grains] == [42, 18]
    assert grains[1].frames.tolist() == sorted(chosen.tolist())
    for lattice in grains:
        for index, basis in zip(lattice.frames, lattice.bases, strict=True):
            assert distance(basis, truth[index, 1:]) < 0.02
    assert describe(probe_of(frames), found)[2].startswith("grain 2: ")


@pytest.mark.parametrize("kind", ["vacuum", "amorphous"])
def test_one_disk_is_no_lattice(kind):
    frames = frames_of(replace(K, order=0))[0] if kind == "vacuum" else halo(16)
    with pytest.raises(DataError, match="Vacuum or amorphous"):
        find_lattice(frames, probe_of(frames), everything(frames.shape[1:]))


@pytest.mark.parametrize("n", [1, 2])
def test_few_frames(n):
    frames, truth = frames_of(K, n)
    probe, found = check_lattice(frames, truth)
    mean = frames.mean(axis=0, dtype=np.float64)
    assert len(sites(found[0], mean.shape, probe, mean, everything(mean.shape), frames).hk) >= 25


def test_floats_give_the_same_lattice():
    frames, truth = frames_of(K, 8)
    check_lattice((frames * 0.01).astype(np.float32), truth)


def test_canonical_basis():
    hexagonal = np.array([[0.0, 30.0], [30 * math.sin(math.pi / 3), 15.0]])
    for n in ([[1, 0], [1, 1]], [[2, 1], [1, 1]], [[0, 1], [1, 0]], [[-1, 0], [0, 1]]):
        assert canonical(np.array(n) @ hexagonal) == pytest.approx(hexagonal)


def test_the_look_takes_less_than_three_seconds():
    frames = np.repeat(frames_of(K, 64)[0], 8, axis=0)
    good = everything(frames.shape[1:])
    find_lattice(frames[:2], probe_of(frames[:2]), good)
    start = time.process_time()
    mean = frames.mean(axis=0, dtype=np.float64)
    probe = find_probe(mean, good)
    first = find_lattice(frames, probe, good)[0]
    sites(first, mean.shape, probe, mean, good, frames)
    assert time.process_time() - start < 6


# ---- descan


def test_centre_plane_forgets_wrong_centres():
    rng = np.random.default_rng(0)
    at = np.sort(rng.permutation(40 * 30)[:200])
    true = np.array([[60.0, 64.0], [0.1, -0.05], [0.02, 0.2]])
    centers = true[0] + (at // 30)[:, None] * true[1] + (at % 30)[:, None] * true[2] + rng.normal(0, 0.05, (200, 2))
    centers[::5] += rng.uniform(-20, 20, (40, 2))
    centers[3] = np.nan
    assert centre_plane(at, (40, 30), centers) == pytest.approx(true, abs=0.05)
    line = centre_plane(np.arange(20), (20,), np.arange(20)[:, None] * [0.5, -0.1])
    assert line == pytest.approx(np.array([[0, 0], [0, 0], [0.5, -0.1]]), abs=1e-6)
    assert centre_plane(np.arange(1), (), np.array([[3.0, 4.0]]))[0].tolist() == [3, 4]
    with pytest.raises(DataError, match="center="):
        centre_plane(np.arange(2), (2,), np.full((2, 2), np.nan))


# ---- data of others


@pytest.mark.parametrize("name", ["strainA_Au001_16x16", "strainA_Au001_thin8A_16x16"])
def test_multislice_gold(name):
    folder = sample_data() / "sim"
    path = folder / f"{name}x128x128_poisson1e6_u16.npy"
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the sample data")
    frames = np.load(path).reshape(-1, 128, 128)
    about = json.loads((folder / "strainA_Au001.json").read_text())
    probe = probe_of(frames)
    assert probe.radius == pytest.approx(about["disk_radius_px"], abs=0.15)
    assert probe.center == pytest.approx(about["detector"]["zero_beam_px_rowcol"], abs=0.05)
    found = find_lattice(frames, probe, everything(frames.shape[1:]))
    assert [lattice.kind for lattice in found] == ["grain", "second"]
    assert found[0].frames.size == found[0].looked
    assert distance(np.array([found[0].a, found[0].b]), np.eye(2) * about["g_200_px_unstrained"]) < 0.02


def test_real_pattern_without_a_lattice():
    path = sample_data() / "real4d" / "rotavirus_crop64x64_bin2_128x128_u16.h5"
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("hdf5plugin")
    if not path.is_file():
        pytest.skip(f"{path.name} is not among the sample data")
    with h5py.File(path) as file:
        frames = file["data"][::4, ::4].reshape(-1, 128, 128)
    probe = probe_of(frames)
    assert probe.radius == pytest.approx(30.3, abs=1)
    with pytest.raises(DataError, match="lattice: none of 64 frames"):
        find_lattice(frames, probe, everything(frames.shape[1:]))
