"""Strain from lattice vectors: physical ground truth, linear algebra by other means, and the numbers of the peers."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from gpuem.analyses import deformation as deform
from gpuem.analyses.deformation import axes_matrix, ellipse_matrix, jacobian, strain, strain_sigma
from gpuem.analyses.reference_lattice import check_reference, crystal_angle, median_reference, same_basis
from gpuem.errors import DataError, RecipeError

REFERENCE = np.array([[3.1, 37.6], [34.2, -9.7]])
PEERS = Path(__file__).parent / "peers"
TENSORS = [m for m in deform.MEASURES if m not in ("py4dstem", "pyxem")]

numbers = st.floats(-0.4, 0.4)
gradients = st.tuples(numbers, numbers, numbers, numbers).map(lambda v: np.eye(2) + np.reshape(v, (2, 2)))
angles = st.floats(-180, 180)


def turned_by(degrees):
    """R: turns a vector (x, y) from x towards y."""
    return axes_matrix(degrees).T


def deformed(f, reference=REFERENCE):
    """Reciprocal vectors a, b (n, 2), as (y, x), of crystals deformed by f (n, 2, 2)."""
    g = np.linalg.inv(f).swapaxes(-1, -2) @ reference[:, ::-1].T
    return g[..., ::-1, 0], g[..., ::-1, 1]


def exactly(f, **options):
    a, b = deformed(np.atleast_3d(np.asarray(f, float)) if np.ndim(f) == 3 else np.asarray(f, float)[None])
    return strain(a, b, REFERENCE, out=np.empty((len(a), 4)), **options)


# ---- what strain means


@pytest.mark.parametrize("measure", TENSORS)
def test_a_crystal_stretched_along_columns_has_positive_exx(measure):
    found = strain(*deformed(np.diag([1.001, 1.0])[None]), REFERENCE, measure=measure)
    assert found.dtype == np.float32
    assert found[0] == pytest.approx([0.001, 0, 0, 0], abs=1e-6)
    assert exactly(np.diag([1.0, 1.001]), measure=measure)[0] == pytest.approx([0, 0.001, 0, 0], abs=1e-6)
    assert exactly([[1, 1e-3], [1e-3, 1]], measure=measure)[0] == pytest.approx([0, 0, 1e-3, 0], abs=2e-6)


@pytest.mark.parametrize("measure", deform.MEASURES)
def test_rotation_is_positive_from_x_towards_y(measure):
    a, b = REFERENCE @ axes_matrix(-2)  # a turned lattice of (y, x) vectors, written out below
    x, y = REFERENCE[0, 1], REFERENCE[0, 0]
    c, s = np.cos(np.radians(2)), np.sin(np.radians(2))
    assert a == pytest.approx([s * x + c * y, c * x - s * y])
    *e, rotation = strain(a[None], b[None], REFERENCE, measure=measure, out=np.empty((1, 4)))[0]
    assert rotation == pytest.approx(2, abs=6e-4)
    dilation = {"infinitesimal": c - 1, "py4dstem": 1 - c}.get(measure, 0)
    assert e == pytest.approx([dilation, dilation, 0], abs=1e-15)


@given(gradients, angles, st.floats(1, 1.2))
def test_any_deformation_is_recovered(f, angle, ratio):
    assume(np.linalg.det(f) > 0.05)
    f = turned_by(angle) @ f
    a, b = deformed(f[None])
    assert_allclose(deform.deformation(a, b, REFERENCE)[0], f, rtol=0, atol=1e-12)
    m = axes_matrix(angle) @ ellipse_matrix(ratio, 20)
    seen = [v[:, ::-1] @ np.linalg.inv(m).T for v in (a, b)]  # as a detector with other axes and an ellipse sees it
    base = REFERENCE[:, ::-1] @ np.linalg.inv(m).T
    found = deform.deformation(*(v[:, ::-1] for v in seen), base[:, ::-1], m)
    assert_allclose(found[0], f, rtol=0, atol=1e-11)


def by_eigenvalues(f, measure):
    """The same by singular value decomposition and eigenvalues."""
    left, values, right = np.linalg.svd(f)
    r, u, v = left @ right, right.T @ np.diag(values) @ right, left @ np.diag(values) @ left.T
    e = {
        "stretch": u - np.eye(2),
        "left": v - np.eye(2),
        "infinitesimal": (f + f.T) / 2 - np.eye(2),
        "hencky": right.T @ np.diag(np.log(values)) @ right,
        "green-lagrange": (f.T @ f - np.eye(2)) / 2,
    }[measure]
    return [e[0, 0], e[1, 1], e[0, 1], np.degrees(np.arctan2(r[1, 0], r[0, 0]))]


@pytest.mark.parametrize("measure", TENSORS)
@given(f=gradients, angle=st.floats(-170, 170), small=st.sampled_from([1, 1e-2, 1e-3, 1e-6, 0]))
@example(f=np.array([[1.02, 0], [0, 1]]), angle=0, small=1)  # around the border of the series
@example(f=np.array([[1.0202, 1e-4], [0, 1]]), angle=10, small=1)
def test_measures_agree_with_eigenvalues(measure, f, angle, small):
    f = np.eye(2) + small * (f - np.eye(2))
    assume(np.linalg.det(f) > 0.05)
    f = turned_by(angle) @ f
    found, wanted = exactly(f, measure=measure)[0], by_eigenvalues(f, measure)
    assert abs((found[3] - wanted[3] + 180) % 360 - 180) < 1e-10
    assert_allclose(found[:3], wanted[:3], rtol=0, atol=2e-13)


@pytest.mark.parametrize("measure", TENSORS)
@given(f=gradients, angle=angles)
def test_turning_the_axes_turns_the_tensor(measure, f, angle):
    assume(np.linalg.det(f) > 0.05)
    q = axes_matrix(angle)
    here, there = exactly(f, measure=measure)[0], exactly(f, measure=measure, matrix=q)[0]
    tensor = q @ np.array([[here[0], here[2]], [here[2], here[1]]]) @ q.T
    assert_allclose(there, [tensor[0, 0], tensor[1, 1], tensor[0, 1], here[3]], rtol=0, atol=1e-11)


def test_left_and_right_stretch_differ_by_the_rotation():
    f = turned_by(30) @ np.diag([1.02, 0.99])
    assert exactly(f)[0] == pytest.approx([0.02, -0.01, 0, 30], abs=1e-12)
    u = turned_by(30) @ np.diag([0.02, -0.01]) @ turned_by(-30)
    assert exactly(f, measure="left")[0] == pytest.approx([u[0, 0], u[1, 1], u[0, 1], 30], abs=1e-12)


# ---- axes


def test_ellipse_becomes_a_circle_of_its_area():
    turn = turned_by(25)
    t = np.linspace(0, 2 * np.pi, 50)
    ellipse = turn @ np.array([30 * np.cos(t), 20 * np.sin(t)])  # the long axis at 25 degrees from x towards y
    assert_allclose(np.hypot(*ellipse_matrix(1.5, 25) @ ellipse), np.sqrt(30 * 20), rtol=1e-13)
    assert_allclose(ellipse_matrix(1.5, 25), ellipse_matrix(1 / 1.5, 115), rtol=0, atol=1e-15)
    assert_allclose(ellipse_matrix(1, 25), np.eye(2), rtol=0, atol=1e-15)
    for ratio, angle in [(0, 0), (-1, 0), (np.nan, 0), (np.inf, 3), (1.1, np.nan)]:
        with pytest.raises(RecipeError, match="ellipse of axis ratio"):
            ellipse_matrix(ratio, angle)


def test_axes_along_a_crystal_direction():
    angle = crystal_angle(REFERENCE, (0, 1))
    along = axes_matrix(angle) @ REFERENCE[1, ::-1]
    assert along == pytest.approx([np.hypot(*REFERENCE[1]), 0])
    assert crystal_angle(np.array([[0, 38.0], [38, 0]]), (1, 1)) == pytest.approx(45)
    assert crystal_angle(np.array([[0, 38.0], [38, 0]]), (1, -1)) == pytest.approx(-45)
    undone = ellipse_matrix(1.2, 10)
    angle = crystal_angle(REFERENCE, (1, 0), undone)
    assert (axes_matrix(angle) @ undone @ REFERENCE[0, ::-1])[1] == pytest.approx(0, abs=1e-13)
    with pytest.raises(RecipeError, match=r"direction \(0, 0\)"):
        crystal_angle(REFERENCE, (0, 0))


@pytest.mark.parametrize("matrix", [np.zeros((2, 2)), np.ones((2, 2)), np.eye(3), [[np.nan, 0], [0, 1]]])
def test_axes_that_are_none_are_refused(matrix):
    with pytest.raises(RecipeError, match="invertible 2x2 matrix"):
        strain(*deformed(np.eye(2)[None]), REFERENCE, matrix=matrix)


# ---- what has no answer


@pytest.mark.parametrize("measure", deform.MEASURES)
def test_what_has_no_strain_is_nan_without_a_warning(measure):
    a, b = (np.repeat(v, 10, axis=0).astype(np.float32) for v in deformed(np.eye(2)[None]))
    a[1] = np.nan
    b[2, 0] = np.inf
    a[3] = 0
    b[4] = 2 * a[4]
    b[5] = -a[5]
    a[6], b[6] = b[6].copy(), a[6].copy()  # mirrored
    a[7] = 1e30
    b[7] = -1e30
    a[8] *= 1e-38
    covariance = np.tile(np.eye(4), (10, 1, 1))
    covariance[9, 0, 0] = -5e3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = strain(a, b, REFERENCE, measure=measure)
        sigma = strain_sigma(a, b, covariance, REFERENCE, measure=measure)
    assert np.isnan(found[1:8]).all()
    assert np.isnan(sigma[1:8]).all()
    assert np.abs(found[[0, 9]]).max() < 1e-6
    assert np.isfinite(sigma[0]).all()
    assert np.isnan(sigma[9]).any()


def test_a_measure_that_is_not_known_is_refused():
    for call in (strain, jacobian):
        with pytest.raises(RecipeError, match=r"'strech' is not known; there are stretch, left"):
            call(*deformed(np.eye(2)[None]), REFERENCE, measure="strech")


def test_memory_does_not_grow_with_the_scan():
    n = 1 << 20
    a, b = (np.repeat(v.astype(np.float32), n, axis=0) for v in deformed(np.eye(2)[None]))
    covariance = np.broadcast_to(np.eye(4, dtype=np.float32), (n, 4, 4))
    out = np.empty((n, 4), np.float32)
    tracemalloc.start()
    strain(a, b, REFERENCE, out=out, measure="hencky")
    strain_sigma(a, b, covariance, REFERENCE, out=out, measure="hencky")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6


def test_chunks_are_one_whole():
    f = np.eye(2) + np.random.default_rng(1).normal(scale=0.02, size=(2 * deform.CHUNK + 7, 2, 2))
    found = exactly(f)
    for i in (0, deform.CHUNK - 1, deform.CHUNK, len(f) - 1):
        assert_allclose(found[i], by_eigenvalues(f[i], "stretch"), rtol=0, atol=1e-13)
    assert strain(np.empty((0, 2)), np.empty((0, 2)), REFERENCE).shape == (0, 4)


# ---- errors


@pytest.mark.parametrize("measure", deform.MEASURES)
@given(f=gradients, angle=st.floats(-60, 60), small=st.sampled_from([1, 0.03, 1e-4, 0]))
def test_the_jacobian_is_the_derivative(measure, f, angle, small):
    f = np.eye(2) + small * (f - np.eye(2))
    assume(np.linalg.det(f) > 0.3)
    m = axes_matrix(20) @ ellipse_matrix(1.1, 50)
    a, b = deformed((turned_by(angle) @ f)[None])
    step = 1e-4
    lattices = np.tile(np.concatenate([a, b], axis=1), (8, 1))
    for column, sign in product(range(4), (0, 1)):
        lattices[2 * column + sign, column] += step * (1 - 2 * sign)
    moved = strain(lattices[:, :2], lattices[:, 2:], REFERENCE, matrix=m, measure=measure, out=np.empty((8, 4)))
    wanted = (moved[0::2] - moved[1::2]).T / (2 * step)
    found = jacobian(a, b, REFERENCE, matrix=m, measure=measure)[0]
    assert_allclose(found, wanted, rtol=0, atol=1e-7 * np.abs(wanted).max())


def test_sigma_of_a_square_lattice_by_hand():
    reference = np.array([[0, 38.0], [38.0, 0]])  # a along x, b along y
    covariance = np.diag([0.01, 0.02, 0.03, 0.04])[None] ** 2  # of a_y, a_x, b_y, b_x
    found = strain_sigma(reference[:1], reference[1:], covariance, reference)[0]
    off = np.hypot(0.01, 0.04) / 38 / 2
    assert found == pytest.approx([0.02 / 38, 0.03 / 38, off, np.degrees(off)], rel=1e-6)


def test_sigma_is_the_scatter():
    random = np.random.default_rng(3)
    f = turned_by(20) @ np.array([[1.03, 0.01], [0.01, 0.98]])
    a, b = deformed(f[None])
    half = random.normal(size=(4, 4)) * 0.01
    drawn = np.concatenate([a, b], axis=1) + random.normal(size=(40_000, 4)) @ half.T
    scatter = strain(drawn[:, :2], drawn[:, 2:], REFERENCE, matrix=axes_matrix(15)).std(axis=0)
    sigma = strain_sigma(a, b, (half @ half.T)[None], REFERENCE, matrix=axes_matrix(15))[0]
    assert_allclose(scatter, sigma, rtol=0.015)


# ---- reference


def test_median_reference_stands_wrong_lattices():
    random = np.random.default_rng(2)
    a, b = (np.tile(v, (1001, 1)) + random.normal(scale=0.01, size=(1001, 2)) for v in REFERENCE)
    a[::5] *= 3
    b[1::7] = np.nan
    valid = np.ones(1001, bool)
    valid[::5] = False
    assert_allclose(median_reference(a, b, valid), REFERENCE, rtol=0, atol=2e-3)
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    assert_allclose(median_reference(a32, b32, np.ones(1001, bool)), REFERENCE, rtol=0, atol=1e-2)
    region = np.arange(1001) == 3
    assert_allclose(median_reference(a, b, valid, region), [a[3], b[3]])
    assert (a[::5] > 0).all()  # nothing handed in was sorted
    assert_allclose(a32, a.astype(np.float32))


def test_references_that_are_none_are_told():
    a, b = (np.tile(v, (6, 1)) for v in REFERENCE)
    valid = np.array([True, True, True, False, False, False])
    with pytest.raises(RecipeError, match="none of the 6 scan positions lies in it"):
        median_reference(a, b, valid, np.zeros(6, bool))
    with pytest.raises(DataError, match=r"none of its 3 scan positions has a valid lattice \(3 of 6"):
        median_reference(a, b, valid, ~valid)
    with pytest.raises(DataError, match=r"none of its 6 scan positions"):
        median_reference(a * np.nan, b, valid)
    with pytest.raises(RecipeError, match=r"median of 3 lattices .* parallel or zero"):
        median_reference(a, 2 * a, valid)
    for wrong in ([[1, 2], [2, 4]], [[0, 0], [1, 0]], [[np.nan, 1], [1, 0]], [[1, 2, 3], [1, 2, 4]]):
        with pytest.raises(RecipeError, match="reference lattice"):
            strain(a, b, np.array(wrong))
    assert check_reference([[0, 1], [1, 0]]).dtype == np.float64


# ---- one lattice, many bases


@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2)), max_size=5), st.booleans(), gradients, st.floats(-8, 8))
def test_same_basis_finds_the_reference_again(moves, swap, f, angle):
    f = np.eye(2) + 0.1 * (f - np.eye(2))
    near = np.array(deformed(turned_by(angle) @ f))
    n = np.eye(2, dtype=int)[::-1] if swap else np.eye(2, dtype=int)
    for which, times in moves:
        n = np.array([[1, times], [0, 1]] if which else [[-1, 0], [times, 1]]) @ n
    other = n @ near
    found = same_basis(*other, *REFERENCE)
    assert found.dtype == np.int64
    assert round(abs(np.linalg.det(found))) == 1
    assert_allclose(found @ other, near, rtol=0, atol=1e-9)


def test_same_basis_of_a_turned_square_lattice_is_the_nearest():
    square = np.array([[0, 38.0], [38, 0]])
    for angle in (-40, 0, 30, 44, 50, 100, 180):
        other = square[:, ::-1] @ turned_by(angle).T
        found = same_basis(*other[:, ::-1], *square) @ other[:, ::-1]
        left = (angle + 45) % 90 - 45
        assert_allclose(strain(found[:1], found[1:], square)[0], [0, 0, 0, left], rtol=0, atol=1e-5)


def test_same_basis_of_turned_long_cells():
    long = np.array([[0, 5.0], [38, 1]])
    for angle in range(-85, 86, 10):
        other = long[:, ::-1] @ turned_by(angle).T @ np.diag([1.02, 0.99])
        n = same_basis(*(other[0] + 7 * other[1], other[1])[::-1], *long[:, ::-1])
        assert_allclose(n @ [other[1], other[0] + 7 * other[1]], other, atol=1e-9)


def test_another_lattice_has_no_basis_in_common():
    with pytest.raises(DataError, match=r"stretches of 0.75 and 0.75"):
        same_basis((0, 28.5), (28.5, 0), (0, 38), (38, 0))
    with pytest.raises(DataError, match=r"cells of 722 and 1444 px\^2.*another lattice"):
        same_basis((19, 19), (19, -19), (0, 38), (38, 0))
    with pytest.raises(RecipeError, match=r"basis: a = .* parallel"):
        same_basis((1, 1), (2, 2), (0, 1), (1, 0))


# ---- the numbers of others


def recorded(name):
    record = json.loads((PEERS / f"strain_{name}.json").read_text())
    a, b = np.array(record["a"]), np.array(record["b"])
    return record, a, b, np.array([record["a0"], record["b0"]])


def test_py4dstem_numbers():
    record, a, b, reference = recorded("py4dstem")
    theirs = record["strain"]
    found = strain(a, b, reference, measure="py4dstem", out=np.empty((len(a), 4)))
    wanted = [theirs["e_yy"], theirs["e_xx"], theirs["e_xy"], np.degrees(theirs["theta"])]  # their x are rows
    assert_allclose(found.T, wanted, rtol=0, atol=1e-12)
    assert found[0, 1] == pytest.approx(1 - 1 / 1.05, abs=1e-12)  # 5 % read as 4.76 %
    assert found[1] == pytest.approx([6.1e-4, 6.1e-4, 0, 2], abs=1e-3)


def test_py4dstem_numbers_along_turned_axes():
    record, a, b, reference = recorded("py4dstem")
    theirs = record["x_at_30_degrees_from_rows"]
    found = strain(a, b, reference, matrix=axes_matrix(-30), measure="py4dstem", out=np.empty((len(a), 4)))
    wanted = [theirs["e_yy"], theirs["e_xx"], theirs["e_xy"], np.degrees(theirs["theta"])]
    assert_allclose(found.T, wanted, rtol=0, atol=1e-12)


def test_pyxem_numbers():
    record, a, b, reference = recorded("pyxem")
    theirs = record["strain"]
    found = strain(a, b, reference, measure="pyxem", out=np.empty((len(a), 4)))
    wanted = [theirs["e11"], theirs["e22"], theirs["e12"], np.degrees(theirs["theta"])]
    assert_allclose(found.T, wanted, rtol=0, atol=1e-12)


def test_peers_of_one_known_deformation():
    """F = R(2 degrees) U, with U = 2 %, -1 %, 0.5 % shear: what each of them prints for it, to their digits."""
    f = turned_by(2) @ np.array([[1.02, 0.005], [0.005, 0.99]])
    t = np.radians(2)
    ours = exactly(f)[0]
    assert ours == pytest.approx([0.02, -0.01, 0.005, 2], abs=1e-12)
    assert exactly(f, measure="infinitesimal")[0, :3] == pytest.approx([0.01920, -0.01043, 0.00552], abs=5e-6)
    assert exactly(f, measure="pyxem")[0, :3] == pytest.approx([0.01958, -0.00965, -0.00598], abs=5e-6)
    assert exactly(f, measure="py4dstem")[0, :3] == pytest.approx([0.02001, -0.00934, 0.00547], abs=5e-6)
    assert np.radians(exactly(f, measure="py4dstem")[0, 3]) == pytest.approx(0.03473, abs=5e-6)
    assert t == pytest.approx(np.radians(ours[3]))
