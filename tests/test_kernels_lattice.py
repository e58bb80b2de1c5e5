"""The kernel of the joint lattice fit, against a naive reference and against its twin on the CPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import reference
from standin import installed
from test_cuda import raw
from test_kernels import ALL, machine, on_device

import gpuem
from gpuem import synthetic
from gpuem.analyses import Map
from gpuem.analyses.learning import Model
from gpuem.analyses.model import Model as Analysis
from gpuem.analyses.modes import number_of
from gpuem.analyses.probe import Disk
from gpuem.backends import Frames, Weights, cpu_fits, cuda_compile, cuda_fits, cuda_lattice, lattice_fit
from gpuem.backends.lattice_fit import COLUMNS

__all__ = ["machine"]

PATTERN = synthetic.Pattern(
    frame=(64, 67), center=(31.4, 33.2), a=(0.4, 17.0), b=(17.0, -0.3), order=1, radius=5.0, peak=110.0, structure=0.2
)
PRIORS = (0.03**2, 0.1**2, 0.3, 10.0, 0.01**2, 0.08**2)
COLUMNS_OF_PRIORS = ("model_error", "gradient", "background", "precision", "offset", "inside_error")
SIGMAS = slice(6, 10)


def model_of(pattern, seed=0, **changes):
    """A model that is near the pattern: insides of disks that aren't quite theirs, axes turned by 20 degrees."""
    count = len(pattern.orders)
    insides = 0.04 * np.random.default_rng(seed).normal(size=(count, number_of(4)))
    insides[:, 0] = 1
    c, s = np.cos(0.35), np.sin(0.35)
    model = Model(
        Disk(pattern.radius, 1.2),
        pattern.orders,
        np.array([0, count]),
        pattern.theta[None],
        np.zeros((2, 2)),
        np.zeros(0, np.float32),
        np.array([[c, s], [-s, c]]),
        4,
        pattern.frame,
        insides=insides,
        priors=np.tile(PRIORS, (count, 1)),
    )
    return replace(model, **changes)


def several(*models):
    """One model that tries all lattices."""
    counts = [len(model.sites) for model in models]
    return replace(
        models[0],
        sites=np.concatenate([model.sites for model in models]),
        first=np.cumsum([0, *counts]),
        lattices=np.concatenate([model.lattices for model in models]),
        insides=np.concatenate([model.insides for model in models]),
        priors=np.concatenate([model.priors for model in models]),
    )


def patterns(pattern, count=3, seed=5, **how):
    frames, _ = synthetic.generate(pattern, (count,), seed, **how)
    return np.minimum(frames, 120)


def on_cpu(fit, frames, positions=None):
    out = np.empty((len(frames), fit.columns), np.float32)
    starts = np.arange(len(frames), dtype=np.int64) * frames[0].size
    at = Frames(np.ascontiguousarray(frames).reshape(-1), starts, frames.shape[1:])
    cpu_fits.run(fit, at, np.arange(len(frames)) if positions is None else positions, out)
    return out


def on_machine(machine, fit, frames, positions=None, blocks=0, **where):
    """The rows of frames; scratch, where blocks use it, and results begin as garbage."""
    tables = {name: machine.put(table) for name, table in cuda_fits.host_tables(fit).items()}
    out = machine.put(np.full((len(frames), fit.columns), -5, np.float32))
    scratch = machine.put(np.full((blocks, cuda_lattice.block_nbytes(fit) // 8), np.nan))
    at = machine.put(np.arange(len(frames)) if positions is None else positions)
    given = (at, scratch if blocks else None)
    cuda_lattice.lattice_fit(on_device(machine, frames, **where), fit, tables, given, out)
    if blocks:
        # every block in a row of its own, which the disks of the largest lattice fill but for some padding
        filled = (np.diff(fit.first).max() * (8 * 17 + 4 * 29)) // 8
        written = ~np.isnan(machine.get(scratch)[: len(frames)])
        assert written[:, 0].all()
        assert written[:, filled - 1].all()
        assert not written[:, filled + 1 :].any()
    return machine.get(out)


def check_same(found, expected, pixels=1e-5, relative=1e-6, sigmas=1e-4):
    """Places of the centre to `pixels`, vectors to `relative`, the same disks and lattices, and the same unknown."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found[:, :2], expected[:, :2], rtol=0, atol=pixels)
    length = np.nanmax(np.abs(expected[:, 2:6]), initial=1e-30)
    np.testing.assert_allclose(found[:, 2:6], expected[:, 2:6], rtol=0, atol=relative * length)
    np.testing.assert_allclose(found[:, SIGMAS], expected[:, SIGMAS], rtol=sigmas)
    np.testing.assert_allclose(found[:, [10, 12]], expected[:, [10, 12]], rtol=sigmas, atol=1e-5)
    np.testing.assert_array_equal(found[:, [11, 13]], expected[:, [11, 13]])


def check_close(found, expected):
    """The same for a reference in double precision."""
    check_same(found, expected, pixels=1e-4, relative=1e-5, sigmas=1e-3)


def loose(pattern=PATTERN, off=(1.63, -1.27, 0.41, 0.33, -0.22, 0.47)):
    """A start that is off by far more than a pixel at the outermost disks."""
    return {"lattices": pattern.theta[None] + np.array(off)}


def dead(pattern=PATTERN, share=0.05):
    """Pixels that don't count, the whole direct beam among them."""
    good = np.random.default_rng(7).random(pattern.frame) > share
    y, x = np.ogrid[: pattern.frame[0], : pattern.frame[1]]
    good &= np.hypot(y - pattern.center[0], x - pattern.center[1]) > 9
    return {"good": good.astype(np.float32).reshape(-1)}


def priors(**columns):
    table = np.tile(PRIORS, (len(PATTERN.orders), 1))
    for column, value in columns.items():
        table[:, COLUMNS_OF_PRIORS.index(column)] = value
    return {"priors": table}


CUT = replace(PATTERN, frame=(41, 59), center=(14.2, 40.7))
WIDE = replace(PATTERN, order=2, frame=(58, 60), center=(29.3, 30.1))
CASES = {
    "as expected": (PATTERN, {}),
    "loose start": (PATTERN, loose()),
    "too loose a start": (PATTERN, loose(off=(8.16, -10.22, 0.84, -1.14, -0.91, -0.43))),
    "dead pixels": (PATTERN, dead()),
    "saturated": (PATTERN, {"saturation": 58.0}),
    "dead and saturated, cut by the edge": (CUT, {**dead(CUT, 0.2), "saturation": 60.0}),
    "cut by the edge": (CUT, {}),
    "mostly off the frame": (WIDE, {}),
    "no gradient, all on the lattice": (PATTERN, priors(gradient=0, offset=0)),
    "far off the lattice": (PATTERN, priors(offset=0.5)),
    "known background": (PATTERN, priors(precision=1e6, model_error=0.2, inside_error=0)),
    "gain and noise": (PATTERN, {"gain": 2.5, "read": 1.7}),
    "few electrons": (replace(PATTERN, dose=90.0), {}),
    "too few disks": (PATTERN, {"minimum": 10}),
    "sharp probe": (PATTERN, {"probe": Disk(5.0, 0.1, "pixel")}),
    "long probe": (PATTERN, {"probe": Disk(5.0, 1.0, ratio=1.12, angle=30.0)}),
}


def by_reference(fit, frames):
    return np.array([reference.lattice_fit(fit, frame, k) for k, frame in enumerate(frames)])


@functools.cache
def case_of(name):
    """Fit, frames, rows of the reference."""
    pattern, changes = CASES[name]
    fit, frames = model_of(pattern, **changes).fit(), patterns(pattern)
    return fit, frames, by_reference(fit, frames)


@pytest.mark.parametrize("name", CASES)
def test_lattices_of_the_cpu_are_those_of_the_reference(name):
    fit, frames, expected = case_of(name)
    check_close(on_cpu(fit, frames), expected)


@pytest.mark.parametrize("name", CASES)
def test_lattices_are_those_of_reference_and_cpu(machine, name):
    fit, frames, expected = case_of(name)
    found = on_machine(machine, fit, frames, gap=3, before=1)
    check_same(found, on_cpu(fit, frames))
    check_close(found, expected)


def test_what_the_cases_are_about():
    """That they don't all come out the same way."""
    rows = {}
    for name, (pattern, changes) in CASES.items():
        rows[name] = on_cpu(model_of(pattern, **changes).fit(), patterns(pattern))
    lost = {name for name, row in rows.items() if np.isnan(row[:, 0]).any()}
    assert lost == {"too loose a start", "too few disks", "few electrons"}
    assert (rows["as expected"][:, 11] == 9).all()
    assert (rows["dead pixels"][:, 11] == 8).all()
    assert (rows["mostly off the frame"][:, 11] < 25).all()


@pytest.mark.parametrize("steps", [(1, 0), (0, 1), (1, 1), (2, 1), (2, 4)])
def test_after_a_few_steps(machine, steps):
    fit = replace(model_of(PATTERN, **loose(off=(0.83, -0.91, 0.32, 0.23, -0.17, 0.29))).fit(), steps=steps)
    # whether the start was good enough isn't asked
    fit.numbers[5] = 100
    frames = patterns(PATTERN)
    found = on_machine(machine, fit, frames)
    assert not np.isnan(found).any()
    check_close(found, by_reference(fit, frames))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("where", [{}, {"gap": 1, "before": 3}])
def test_all_types_of_pixels(machine, dtype, where):
    frames = patterns(PATTERN, 2).astype(dtype)
    fit = model_of(PATTERN, saturation=119.0).fit()
    check_same(on_machine(machine, fit, frames, **where), on_cpu(fit, frames))


def test_the_lattice_that_explains_most_is_kept(machine):
    """Two crystals, turned and stretched, of which the second shows fewer disks; and both at once."""
    other = replace(PATTERN, a=(9.0, 18.5), b=(18.0, -10.0), center=(30.1, 34.0))
    few = model_of(other, 1)
    few = replace(few, sites=few.sites[1:-1], insides=few.insides[1:-1], priors=few.priors[1:-1] * 1.2)
    one, two = patterns(PATTERN, 2), patterns(other, 2)
    frames = np.concatenate([one, two, (one + two) // 2])
    for models, expected in (((model_of(PATTERN), few), [0, 0, 1, 1]), ((few, model_of(PATTERN)), [1, 1, 0, 0])):
        fit = several(*models).fit()
        found = on_machine(machine, fit, frames)
        check_same(found, on_cpu(fit, frames))
        np.testing.assert_array_equal(found[:4, 13], expected)
        for k, frame in enumerate(frames[:3]):
            check_close(found[k : k + 1], reference.lattice_fit(fit, frame, k)[None])


def test_the_beam_drifts_over_the_scan(machine):
    """Without the drift, the last start is too far off."""
    positions = np.array([0, 3, 9, 25, 26, 103])
    drift = np.array([[0.31, 0.85], [-0.4, 0.92]])
    rng = np.random.default_rng(8)
    frames = []
    for position in positions:
        theta = PATTERN.theta.copy()
        theta[:2] += drift @ divmod(position, 7)
        frames.append(rng.poisson(synthetic.expectation(PATTERN, theta)))
    frames = np.minimum(frames, 120).astype(np.uint8)
    model = model_of(PATTERN, drift=drift, scan_width=7)
    found = on_machine(machine, model.fit(), frames, positions)
    check_same(found, on_cpu(model.fit(), frames, positions))
    assert not np.isnan(found).any()
    np.testing.assert_allclose(found[:, :2] - PATTERN.center, np.array(divmod(positions, 7)).T @ drift.T, atol=0.1)
    row = reference.lattice_fit(model.fit(), frames[5], positions[5])
    check_close(found[5:], row[None])
    still = on_machine(machine, replace(model, drift=0 * drift).fit(), frames, positions)
    assert not np.allclose(still[-1, :2], found[-1, :2], atol=1)


def test_where_nothing_is(machine):
    """No counts, those of the background, noise; one disk alone says nothing of a lattice."""
    rng = np.random.default_rng(9)
    shape = PATTERN.frame
    frames = np.array([np.zeros(shape), np.full(shape, 0.3), rng.poisson(0.3, shape), rng.poisson(0.01, shape)])
    fit = model_of(PATTERN).fit()
    found = on_machine(machine, fit, frames.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found[:, :10]), True)
    assert np.isfinite(found[:, 10:]).all()
    assert (found[:, 11] < 4).all()
    np.testing.assert_array_equal(found[0, 10:], 0)
    alone = replace(PATTERN, order=0)
    fit = model_of(alone).fit()
    found = on_machine(machine, fit, patterns(alone))
    check_same(found, on_cpu(fit, patterns(alone)))
    np.testing.assert_array_equal(np.isnan(found[:, :10]), True)
    np.testing.assert_array_equal(found[:, 11], 1)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (12, 5)])
def test_frames_smaller_than_a_window(machine, shape):
    pattern = replace(PATTERN, frame=shape, center=(shape[0] / 2, shape[1] / 2))
    frames = np.random.default_rng(10).poisson(30.0, (2, *shape)).astype(np.uint16)
    found = on_machine(machine, model_of(pattern).fit(), frames, gap=1)
    np.testing.assert_array_equal(np.isnan(found[:, :10]), True)


def test_a_frame_that_is_not_finite_does_no_harm_to_others(machine):
    frames = patterns(PATTERN).astype(np.float32)
    fit = model_of(PATTERN).fit()
    expected = on_cpu(fit, frames)
    frames[1, 20:45, 20:45] = np.nan
    frames[1, 3, 5] = -np.inf
    found = on_machine(machine, fit, frames)
    check_same(found[[0, 2]], expected[[0, 2]])


def test_dead_pixels_may_hold_anything(machine):
    frames = patterns(PATTERN).astype(np.float32)
    fit = model_of(PATTERN, **dead()).fit()
    expected = on_machine(machine, fit, frames)
    frames[:, fit.good.reshape(PATTERN.frame) == 0] = np.nan
    np.testing.assert_array_equal(on_machine(machine, fit, frames), expected)


def test_all_orders_of_threads_give_the_same_bits(machine):
    """Sums are taken in a fixed order."""
    fit, frames = model_of(PATTERN).fit(), patterns(PATTERN)
    found = on_machine(machine, fit, frames)
    np.testing.assert_array_equal(on_machine(machine, fit, frames[::-1].copy(), gap=5)[::-1], found)
    if machine.order == "gpu":
        return
    machine.order = "ascending"
    np.testing.assert_array_equal(on_machine(machine, fit, frames), found)


@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_disks_kept_in_scratch(machine, blocks):
    """Blocks take frames in turn, and begin each one anew."""
    frames = np.concatenate([patterns(PATTERN), np.zeros((1, *PATTERN.frame), np.int64), patterns(PATTERN, 1, 6)])
    fit = several(model_of(PATTERN), model_of(replace(PATTERN, order=0))).fit()
    found = on_machine(machine, fit, frames.astype(np.uint16), blocks=blocks)
    np.testing.assert_array_equal(found, on_machine(machine, fit, frames.astype(np.uint16)))


def test_more_disks_than_a_block_has_threads(machine):
    """Most of them lie off the frame."""
    pattern = replace(PATTERN, order=6, peak=3000.0)
    frames = patterns(pattern, 1)
    fit = model_of(pattern).fit()
    assert cuda_lattice.scratch_nbytes(fit, pattern.frame) == 0
    check_same(on_machine(machine, fit, frames), on_cpu(fit, frames))


def test_memory_of_a_block():
    """As much as the kernel's constants say, and shared memory that every block may have."""
    text = (cuda_compile.folder() / "lattice.cuh").read_text()
    noted = text[text.index("LEVEL, GROUND") : text.index(", NOTED")].replace("\n", " ").split(",")
    assert "SUMS = 29" in text
    assert 8 * (len(noted) + 15) == cuda_lattice.DISK_NBYTES
    assert f"COLUMNS = {len(COLUMNS)}" in text
    priors = text[text.index("enum Priors { ") + 14 : text.index(", PRIORS }")].split(", ")
    assert [getattr(lattice_fit, name) for name in priors] == list(range(FITS[0].priors.shape[1]))
    fit = model_of(replace(PATTERN, order=6)).fit()
    assert cuda_lattice.block_nbytes(fit) == 169 * cuda_lattice.DISK_NBYTES <= 48 << 10
    many = model_of(replace(PATTERN, order=8)).fit()
    assert 0 < cuda_lattice.scratch_nbytes(many, (64, 64)) <= (64 << 20) + 512


# ---- whole runs -----------------------------------------------------------------------------------------------------


class Fits(Analysis):
    """The lattice of every frame, as it is found."""

    kind: Literal["fits"] = "fits"
    name: str = "fits"

    def weights(self, view):
        return Weights(fits=(FITS[0],))

    def finish(self, view, sums, valid):
        rows = sums.fits[0]
        return {name: Map(rows[:, c].reshape(view.scan_shape), view.scan, "", "") for c, name in enumerate(COLUMNS)}


FITS = [model_of(PATTERN, drift=np.array([[0.0, 0.01], [0.02, 0.0]])).fit()]


@pytest.fixture(params=["late", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu":
        yield None
    else:
        with installed(request.param) as simulated:
            yield simulated


@pytest.mark.parametrize("room", [cuda_lattice.SHARED_NBYTES, 0])
def test_a_run_finds_what_the_cpu_finds(device, monkeypatch, tmp_path, room):
    monkeypatch.setattr(cuda_lattice, "SHARED_NBYTES", room)
    monkeypatch.setattr(cuda_lattice, "SCRATCH_NBYTES", 3 * cuda_lattice.block_nbytes(FITS[0]))
    frames = patterns(PATTERN, 12).astype(np.uint16)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(3, 4), frame=PATTERN.frame, dtype="u2")
    found = gpuem.run(ds, [Fits()], device="cuda")
    rows = np.stack([found[f"fits/{name}"].data.ravel() for name in COLUMNS], axis=1)
    check_same(rows, on_cpu(FITS[0], frames))
