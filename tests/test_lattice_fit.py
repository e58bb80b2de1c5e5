"""The joint lattice fit on the processor against the same equations written plainly in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crystal import planted, small
from numpy.testing import assert_allclose, assert_array_equal

from gpuem.analyses import Sample
from gpuem.analyses.deformation import strain_sigma
from gpuem.analyses.lattice_model import Model
from gpuem.analyses.learning import frames_of
from gpuem.analyses.probe import Disk
from gpuem.backends import cpu_lattice
from gpuem.backends.lattice_fit import COARSE_PHASES, COLUMNS, PHASES, phases, window_pixels
from gpuem.synthetic import generate

HK = np.array([(h, k) for h in range(-2, 3) for k in range(-2, 3)], np.float64)


def model(pattern, **changes):
    """The model that made the patterns, with priors that say nothing."""
    priors = np.zeros((25, 6))
    priors[:, 1] = 1e-12
    given = {
        "probe": Disk(pattern.radius, pattern.edge), "sites": HK, "first": np.array([0, 25]),
        "lattices": pattern.theta[None], "drift": np.zeros((2, 2)), "good": np.zeros(0, np.float32), "axes": np.eye(2),
        "scan_width": 16, "shape": pattern.frame, "read": 0.05, "insides": np.ones((25, 1)), "priors": priors,
    }  # fmt: skip
    return Model(**{**given, **changes})


def fitted(model, frames):
    sample = Sample(np.reshape(frames, (-1, *model.shape)), np.arange(len(np.reshape(frames, (-1, *model.shape)))))
    return cpu_lattice.details(model.fit(), frames_of(sample), sample.positions)[0]


def naive(pattern, frame, theta, rounds=8):
    """Iterated weighted least squares of the lattice, every disk with an intensity and a background of its own.

    The disk is the oversampled image, interpolated between its samples, as in the kernel's tables.
    """
    theta = theta.copy()
    level, ground = np.full(25, 100.0), np.full(25, 1.0)
    reach = pattern.radius + 0.5 + 1.5
    image = Disk(pattern.radius, pattern.edge).image(12)
    for turn in range(rounds):
        information, score = np.zeros((6, 6)), np.zeros(6)
        for s, (h, k) in enumerate(HK):
            cy, cx = theta[:2] + h * theta[2:4] + k * theta[4:6]
            y, x = window_pixels(reach).astype(np.int64)
            keep = np.ones(y.size, bool)
            keep[np.flatnonzero((y == 0) & (x == 0))[1:]] = False
            y, x = y[keep] + math.floor(cy), x[keep] + math.floor(cx)
            disk, along_y, along_x = bilinear(image, (y - cy) * PHASES, (x - cx) * PHASES)
            data = frame[y, x].astype(float)
            for _ in range(3 if turn == 0 else 1):
                # intensity and background, the lattice held
                w = 1 / (np.maximum(level[s] * disk + ground[s], 0) + 0.05**2)
                design = np.array([disk, np.ones_like(disk)])
                level[s], ground[s] = np.maximum(np.linalg.solve(design * w @ design.T, design * w @ data), 0)
            w = 1 / (level[s] * disk + ground[s] + 0.05**2)
            full = np.array([disk, np.ones_like(disk), -level[s] * PHASES * along_y, -level[s] * PHASES * along_x])
            normal = full * w @ full.T
            right = full * w @ (data - level[s] * disk - ground[s])
            mixed = normal[2:, :2] @ np.linalg.inv(normal[:2, :2])
            own, pull = normal[2:, 2:] - mixed @ normal[:2, 2:], right[2:] - mixed @ right[:2]
            e = np.kron(np.array([1.0, h, k]), np.eye(2))
            information += e.T @ own @ e
            score += e.T @ pull
        theta += np.linalg.solve(information, score)
    return theta, np.linalg.inv(information)


def bilinear(image, y, x):
    """Values at (y, x) samples from the middle, and their slopes per sample."""
    y, x = y + image.shape[0] // 2, x + image.shape[1] // 2
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    u, v = y - i, x - j
    a, b, c, d = image[i, j], image[i, j + 1], image[i + 1, j], image[i + 1, j + 1]
    value = (1 - u) * ((1 - v) * a + v * b) + u * ((1 - v) * c + v * d)
    return value, (1 - v) * (c - a) + v * (d - b), (1 - u) * (b - a) + u * (d - c)


def test_the_fit_is_that_of_the_equations_written_plainly():
    pattern, frames, truth = planted()
    frames, start = frames.reshape(-1, 96, 96)[:12], truth["theta"].reshape(-1, 6)[:12]
    one = model(pattern)
    found = fitted(one, frames)
    assert np.isfinite(found[:, :6]).all()
    off = []
    for frame, row, near in zip(frames, found, start, strict=True):
        theta, covariance = naive(pattern, frame, near)
        sigma = np.sqrt(np.diag(covariance))
        # edges are kinks, on which the two may end at different places; Huber's weights are the kernel's alone
        off.append((row[:6] - theta) / sigma)
        expected = strain_sigma(
            theta[None, 2:4], theta[None, 4:6], covariance[None, 2:, 2:], pattern.theta[2:].reshape(2, 2)
        )
        assert_allclose(row[6:10], expected[0], rtol=0.25)
    assert np.sqrt(np.mean(np.square(off))) < 0.6
    assert np.abs(off).max() < 2.5


def test_columns_and_quality_of_a_perfect_model():
    pattern, frames, truth = planted()
    found = fitted(model(pattern), frames)
    assert found.shape == (64, len(COLUMNS))
    assert (np.abs(found[:, :6] - truth["theta"].reshape(-1, 6)) < 0.05).all()
    assert_allclose(found[:, COLUMNS.index("chi2")].mean(), 1, atol=0.05)
    assert (found[:, COLUMNS.index("disks")] == 25).all()
    assert_allclose(found[:, COLUMNS.index("counts")], pattern.intensities().sum(), rtol=0.03)
    assert (found[:, COLUMNS.index("grain")] == 0).all()


def test_the_start_may_be_off_by_a_third_of_a_radius():
    pattern, frames, _ = planted()
    right = fitted(model(pattern), frames[:1])
    off = pattern.theta.copy()
    off[:2] += (1.2, -1.2)
    moved = fitted(model(pattern, lattices=off[None]), frames[:1])
    assert_allclose(moved[:, :6], right[:, :6], atol=5e-3)


def test_of_two_lattices_the_one_that_explains_more_is_taken():
    pattern, frames, _ = planted()
    other = np.array([*pattern.theta[:2], 4.0, 20.0, 21.0, -3.0])
    both = model(
        pattern, sites=np.concatenate([HK, HK]), first=np.array([0, 25, 50]), lattices=np.array([other, pattern.theta]),
        insides=np.ones((50, 1)), priors=np.tile(model(pattern).priors, (2, 1)),
    )  # fmt: skip
    found = fitted(both, frames)
    assert (found[:, COLUMNS.index("grain")] == 1).all()
    # windows are cut where disks of either lattice might lie
    assert_allclose(found[:, :6], fitted(model(pattern), frames)[:, :6], atol=0.06)


def test_drift_moves_the_start_with_the_scan():
    pattern = small(frame=(112, 112), center=(50.0, 50.0))
    frames, _ = generate(pattern, (1,), 0, gradient=np.eye(2)[None])
    far = np.roll(frames[0], (6, 9), (0, 1))
    one = model(pattern, drift=np.array([[2.0, 0.0], [0.0, 3.0]]), scan_width=4)
    sample = Sample(np.stack([frames[0], far]), np.array([0, 3 * 4 + 3]))
    rows = cpu_lattice.details(one.fit(), frames_of(sample), sample.positions)[0]
    assert_allclose(rows[1, :2] - rows[0, :2], (6, 9), atol=5e-3)
    assert_allclose(rows[1, 2:6], rows[0, 2:6], atol=5e-3)


def test_hidden_and_saturated_pixels_do_not_matter():
    pattern, frames, _ = planted()
    frame = frames[0, :1].copy()
    good = np.ones((96, 96), np.float32)
    y, x = np.random.default_rng(0).integers(0, 96, (2, 40))
    good[y, x] = 0
    dirty = frame.copy()
    dirty[:, y, x] = 60000
    masked = model(pattern, good=good.reshape(-1))
    # what the first step guesses is another sum: equal but for rounding
    assert_array_equal(fitted(masked, frame)[:, :6], fitted(masked, dirty)[:, :6])
    assert_allclose(fitted(model(pattern, saturation=60000.0), dirty)[:, :6], fitted(masked, frame)[:, :6], atol=1e-9)


@pytest.mark.parametrize("frame", [np.zeros, lambda shape, dtype: np.full(shape, 7, dtype)])
def test_frames_without_disks_have_no_lattice(frame):
    pattern = small()
    found = fitted(model(pattern), frame((2, 96, 96), np.uint16))
    assert np.isnan(found[:, :10]).all()
    assert (found[:, COLUMNS.index("disks")] < 4).all()


def test_a_disk_off_its_place_pulls_little():
    pattern, frames, _ = planted()
    frame = frames[0, :1].astype(np.int64)
    right = fitted(model(pattern), frame.astype(np.uint16))
    y, x = np.rint(right[0, :2] + 2 * right[0, 2:4]).astype(int)
    box = np.s_[:, y - 8 : y + 9, x - 8 : x + 9]
    frame[box] = np.roll(frame[box], 2, axis=1)
    off = fitted(model(pattern), frame.astype(np.uint16))

    assert_allclose(off[:, 2:6], right[:, 2:6], atol=0.03)
    assert off[0, COLUMNS.index("exx_sigma")] > right[0, COLUMNS.index("exx_sigma")]


def test_windows_hold_whole_disks_and_phases_move_them():
    pixels = window_pixels(6.5)
    assert pixels.shape[1] % 16 == 0
    assert (np.abs(pixels) <= 8).all()
    image = Disk(5.0, 1.0).image(int(pixels.max()), PHASES)
    planes = phases(image, PHASES, pixels)
    assert planes.shape == ((PHASES + 1) ** 2, pixels.shape[1])
    row = 5 * (PHASES + 1) + 11
    expected = np.clip((5.0 - np.hypot(pixels[0] - 5 / PHASES, pixels[1] - 11 / PHASES)) + 0.5, 0, 1)
    assert_allclose(planes[row], expected, atol=1e-6)
    assert COARSE_PHASES < PHASES
