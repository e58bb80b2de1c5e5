"""Kernels that find peaks and disks, against naive references and against their twins on the CPU.

First one by one, on the CPU in five orders of threads or on a GPU; then whole fits on the stand-in for CuPy or a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import reference
from standin import SCHEDULES, fft, installed
from test_cuda import raw
from test_kernels import ALL, machine, on_device

import gpuem
from gpuem import job, recipe, tiles
from gpuem.analyses import Map
from gpuem.analyses.model import Model
from gpuem.backends import Frames, Weights, cpu_correlate, cpu_fits, cuda_correlate, cuda_fits, cuda_plan
from gpuem.backends.peaks import GuidedFit, PeakSearch, soft_disk, wrapped, zero_mean_kernel
from gpuem.errors import DeviceError

__all__ = ["machine"]


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.uint16)


def lopsided(half=3):
    """No symmetry at all: mirrored, turned or transposed it is found elsewhere."""
    image = np.zeros((2 * half + 1, 2 * half + 1))
    image[0:4, 1], image[3, 1:6], image[5, 5] = 3, 2, 4
    return (image - image.mean()).astype(np.float32)


def disks(count, shape, places, radius=4, seed=1):
    """Frames of Poisson counts with soft disks near `places`, on a background."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    frames = np.full((count, *shape), 3.0)
    for frame in frames:
        for k, place in enumerate(places):
            a, b = place + rng.uniform(-1.2, 1.2, 2)
            frame += (60 + 7 * k) / (1 + np.exp(3 * (np.hypot(y - a, x - b) - radius)))
    return rng.poisson(frames)


def on_cpu(fit, frames):
    out = np.empty((len(frames), fit.columns), np.float32)
    starts = np.arange(len(frames), dtype=np.int64) * frames[0].size
    at = Frames(np.ascontiguousarray(frames).reshape(-1), starts, frames.shape[1:])
    cpu_fits.run(fit, at, np.arange(len(frames)), out)
    return out


def check_same(fit, found, expected, pixels=1e-4, relative=2e-5):
    """The same peaks in the same order, or disks, at the same places and of the same heights."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    if isinstance(fit, PeakSearch):
        np.testing.assert_array_equal(found[:, 0], expected[:, 0])
        found, expected = found[:, 1:], expected[:, 1:]
    width = 3 if isinstance(fit, PeakSearch) else 4
    for row, want in zip(found, expected, strict=True):
        peaks, others = row.reshape(-1, width), want.reshape(-1, width)
        np.testing.assert_allclose(peaks[:, :2], others[:, :2], rtol=0, atol=pixels)
        scale = np.nanmax(np.abs(others[:, 2:]), initial=1e-30)
        np.testing.assert_allclose(peaks[:, 2:], others[:, 2:], rtol=0, atol=relative * scale)


# ---- one by one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("where", [{}, {"gap": 1, "before": 3}])
def test_frames_without_their_mean(machine, dtype, where):
    frames = reference.planted((4, 23, 31), dtype, 31)
    frames[3] = frames[3, 0, 0]
    out = machine.put(np.full((4, 23, 31), np.nan, np.float32))
    cuda_correlate.level_frames(on_device(machine, frames, **where), out)
    found, wide = machine.get(out), frames.astype(np.float64)
    expected = wide - wide.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(wide).max())
    assert (found[0] == 0).all()
    assert (found[3] == 0).all()


@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(1, 3), (17, 12), (41, 70)])
def test_spectra_times_that_of_the_kernel(machine, shape, power):
    rng = np.random.default_rng(32)
    search = PeakSearch(rng.normal(size=shape).astype(np.float32), power=power, sigma=0.7)
    spectra = np.fft.rfft2(rng.normal(size=(3, *shape)).astype(np.float32)).astype(np.complex64)
    spectra[1, 0, 0] = 0
    given = machine.put(spectra)
    tables = {name: machine.put(table) for name, table in cuda_correlate.search_tables(search).items()}
    cuda_correlate.multiply_spectra(given, 2, search, tables)
    found = machine.get(given)
    m = spectra.astype(complex) * search.spectrum
    size = np.abs(m)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(size > 0, m * size ** (power - 1), 0) * search.smoothing / math.prod(shape)
    np.testing.assert_allclose(found[:2], expected[:2], atol=2e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(found[2], spectra[2])


def peaks_of(machine, images, search, extra=0):
    """`find_peaks` of images, as an array of rows; scratch and results begin as garbage."""
    shape, count = images.shape[1:], len(images)
    floats, places = cuda_correlate._peak_floats(search, shape), cuda_correlate._candidates(shape)
    scratch = (
        machine.put(np.full((count + extra, places), 7, np.uint64)),
        machine.put(np.full((count + extra, floats), np.nan, np.float32)),
    )
    out = machine.put(np.full((count, search.columns), -5, np.float32))
    cuda_correlate.find_peaks(machine.put(images.astype(np.float32)), search, scratch, out)
    return machine.get(out)


def listed(rows):
    return [row[1 : 1 + 3 * int(row[0])].reshape(-1, 3) for row in rows]


FILTERS = [
    {},
    {"edge": 2},
    {"edge": 40},
    {"min_absolute": 120.0, "relative_to": 3},
    {"min_relative": 0.4},
    {"min_relative": 0.95, "relative_to": 5},
    {"min_relative": 1.0, "relative_to": 10_000},
    {"min_relative": 1.0, "relative_to": 2},
    {"spacing": 5.0},
    {"spacing": 3.7, "min_relative": 0.3, "edge": 1, "max_peaks": 4, "relative_to": 2},
    {"max_peaks": 1},
    {"max_peaks": 3000},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shape", [(1, 1), (17, 13), (12, 71), (60, 33)])
def test_maxima_and_filters(machine, shape, filters):
    # every bit of a height counts
    images = np.random.default_rng(33).uniform(-40, 160, (3, *shape)).astype(np.float32)
    if shape[0] > 12:
        images[1] = np.round(images[1] / 60)  # many plateaus, many of equal height
    images[2] = -1
    search = PeakSearch(np.zeros(shape, np.float32), subpixel="none", **filters)
    found = peaks_of(machine, images, search)
    for row, peaks, image in zip(found, listed(found), images, strict=True):
        np.testing.assert_array_equal(peaks, reference.find_peaks(image, **{"max_peaks": 64, **filters}))
        assert np.isnan(row[1 + peaks.size :]).all()


def test_as_many_maxima_as_there_can_be(machine):
    images = np.zeros((2, 47, 39), np.float32)
    images[:, ::2, ::2] = 1
    search = PeakSearch(np.zeros((47, 39), np.float32), subpixel="parabola", max_peaks=1000)
    found = peaks_of(machine, images, search)
    np.testing.assert_array_equal(found[:, 0], 24 * 20)
    np.testing.assert_array_equal(listed(found)[1][:, 0], np.repeat(np.arange(0, 47, 2), 20))


@pytest.mark.parametrize("subpixel", ["parabola", "upsample"])
@pytest.mark.parametrize("shape", [(5, 40), (16, 16), (17, 13), (37, 70)])
@pytest.mark.parametrize("factor", [1, 7, 16])
def test_places_between_pixels_are_those_of_the_cpu(machine, shape, subpixel, factor):
    rng = np.random.default_rng(34)
    spectra = np.fft.rfft2(rng.normal(size=(3, *shape)))
    search = PeakSearch(np.zeros(shape, np.float32), subpixel=subpixel, factor=factor, sigma=1.2, max_peaks=9)
    images = np.fft.irfft2(spectra * search.smoothing, s=shape).astype(np.float32)
    images -= images.min() * np.float32(0.5)
    space = cpu_correlate._Workspace(search, shape)
    expected = np.empty((3, search.columns), np.float32)
    cpu_correlate._peaks(images, space.numbers, space.candidates, space.fine, expected)
    found = peaks_of(machine, images, search)
    check_same(search, found, expected)
    if subpixel == "upsample" and factor > 1:
        # those too far from a maximum of the series stay at the parabola's
        plain = listed(peaks_of(machine, images, replace(search, subpixel="parabola")))
        climbed = 0
        for peaks, first, image in zip(listed(found), plain, images, strict=True):
            for y, x, height in peaks:
                if not (first[:, :2] == (y, x)).all(axis=1).any():
                    climbed += 1
                    assert abs(reference.fourier_series(image, y, x) - height) < 0.2 / factor**2 * image.max()
        assert climbed > 0.5 * found[:, 0].sum()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 40)])
def test_frames_of_one_row(machine, shape):
    """Along an axis without any structure the place means nothing; the height does."""
    images = np.fft.irfft2(np.fft.rfft2(noise((2, *shape), 37)) + 1, s=shape).astype(np.float32)
    search = PeakSearch(np.zeros(shape, np.float32), max_peaks=5)
    for peaks, image in zip(listed(peaks_of(machine, images, search)), images, strict=True):
        assert len(peaks) > 0
        for y, x, height in peaks:
            assert abs(reference.fourier_series(image, y, x) - height) < 2e-3 * image.max()


def test_peaks_are_sorted_again_between_the_pixels(machine):
    """One lies on its pixel, the other, lower there, between four."""
    y, x = np.mgrid[:32, :40]
    image = np.exp(-((y - 8) ** 2 + (x - 9) ** 2) / 3) + 1.05 * np.exp(-((y - 20.5) ** 2 + (x - 30.5) ** 2) / 3)
    image = (np.stack([image, image[::-1, ::-1]]) * 100).astype(np.float32)
    assert image[0, 8, 9] > image[0, 20, 30]
    search = PeakSearch(np.zeros((32, 40), np.float32), max_peaks=2)
    first, second = listed(peaks_of(machine, image, search, extra=1))
    np.testing.assert_allclose(first[:, :2], [[20.5, 30.5], [8, 9]], atol=0.02)
    np.testing.assert_allclose(second[:, :2], [[10.5, 8.5], [23, 30]], atol=0.02)


def guided_on(machine, frames, fit, **where):
    tables = {name: machine.put(table) for name, table in cuda_fits.host_tables(fit).items()}
    scratch = machine.put(np.full((len(frames), cuda_correlate._guided_floats(fit)), np.nan, np.float32))
    out = machine.put(np.full((len(frames), fit.columns), -5, np.float32))
    cuda_correlate.guided(on_device(machine, frames, **where), fit, tables, scratch, out)
    return machine.get(out)


SITES = np.array(
    [[20.2, 15.1], [0, 0], [-0.4, 20], [39.4, 46.4], [33, 1], [1e9, 5], [np.nan, 5], [5, np.inf], [12, 40.5], [-3, 4]]
)
HOW = [{}, {"normalised": True}, {"logarithm": True}, {"normalised": True, "logarithm": True}]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("search", [0, 1, 3])
def test_guided_maps_are_those_of_the_reference(machine, search, how):
    """Heights of whole shifts: where the maximum is at the border, they are told as they are."""
    frames = noise((2, 40, 47), 35)
    fit = GuidedFit(SITES, zero_mean_kernel(soft_disk(2.5, 1, 5), 3, 5), search, **how)
    found = guided_on(machine, frames, fit).reshape(2, -1, 4)
    for frame, rows in zip(frames, found, strict=True):
        for site, (y, x, height, elevation) in zip(SITES, rows, strict=True):
            on = np.isfinite(site).all() and (site >= -0.5).all() and (site < (39.5, 46.5)).all()
            expected = reference.guided(frame, site, fit.kernel, search, **how) if on else None
            if expected is None:
                assert np.isnan([y, x, height, elevation]).all()
                continue
            top = np.array(np.unravel_index(expected.argmax(), expected.shape))
            place = np.floor(site + 0.5) - search + top
            if (top % (2 * search) == 0).any() if search else True:
                np.testing.assert_allclose([y, x, elevation], [*place, 0])
                np.testing.assert_allclose(height, expected.max(), rtol=1e-4, atol=1e-5)
            else:
                assert np.abs(place - [y, x]).max() <= 1
                assert height >= expected.max() * (1 - 1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [5, 8])
def test_guided_disks_are_those_of_the_cpu(machine, size, how):
    places = np.array([[12, 14], [13.4, 40], [30, 27.7], [44, 8], [46.2, 45]])
    frames = disks(3, (52, 57), places).astype(np.uint16)
    fit = GuidedFit(np.concatenate([places, SITES]), zero_mean_kernel(soft_disk(4, 1.4, size), 4.7, size), 3, **how)
    check_same(fit, guided_on(machine, frames, fit, gap=3), on_cpu(fit, frames))


@pytest.mark.parametrize("dtype", ALL)
def test_guided_takes_all_types_of_pixels(machine, dtype):
    frames = (noise((2, 30, 33), 36) % 120).astype(dtype)
    fit = GuidedFit(np.array([[9.0, 9.0], [2.0, 15.0], [25.0, 31.0], [14, 14], [15, 20]]), lopsided(), 2)
    check_same(fit, guided_on(machine, frames, fit), on_cpu(fit, frames))


@pytest.mark.parametrize("how", HOW)
def test_where_nothing_is(machine, how):
    frames = np.full((2, 20, 23), 9, np.uint16)
    fit = GuidedFit(np.array([[10.0, 10], [0, 9], [19, 9]]), zero_mean_kernel(soft_disk(3, 1, 6), 3.5, 6), 2, **how)
    found = guided_on(machine, frames, fit).reshape(2, 3, 4)
    assert (np.abs(found[..., 2:]) < 1e-3).all()
    # of equal ones the first shift
    np.testing.assert_array_equal(guided_on(machine, frames * 0, fit)[:, :4], [[8, 8, 0, 0]] * 2)
    small = GuidedFit(np.array([[1.0, 20]]), fit.kernel, 4, **how)
    check_same(small, guided_on(machine, noise((1, 3, 40)), small), on_cpu(small, noise((1, 3, 40))))


def test_kernels_of_even_size_are_refused(machine):
    with pytest.raises(ValueError, match="odd"):
        guided_on(machine, noise((1, 9, 9)), GuidedFit(np.zeros((1, 2)), np.zeros((4, 4), np.float32), 1))
    none = GuidedFit(np.zeros((0, 2)), lopsided(), 1)
    assert guided_on(machine, noise((2, 9, 9)), none).shape == (2, 0)


# ---- whole fits -----------------------------------------------------------------------------------------------------


PLACES = np.array([[14.0, 14], [13.4, 40], [32, 27.7], [48, 12], [47.2, 45]])
SHAPE = (60, 57)
KERNEL = zero_mean_kernel(soft_disk(4, 1.4, 7), 4.7, 7)
SEARCHES = [
    PeakSearch(wrapped(KERNEL, SHAPE), max_peaks=7, min_relative=0.4, spacing=4, edge=2),
    PeakSearch(wrapped(KERNEL, SHAPE), power=0.8, sigma=1.0, subpixel="parabola", max_peaks=5, spacing=6),
]
GUIDED = GuidedFit(PLACES, KERNEL, 3)


@dataclass(frozen=True, eq=False)
class Unknown:
    """A kind that nobody computes."""

    columns: int = 2


class Finds(Model):
    """Two searches and the disks near their places, as they are found."""

    kind: Literal["finds"] = "finds"
    name: str = "finds"

    def weights(self, view):
        return Weights(fits=(*SEARCHES, GUIDED))

    def finish(self, view, sums, valid):
        return {
            f"{k}_{c}": Map(rows[:, c].reshape(view.scan_shape), view.scan, "", "")
            for k, rows in enumerate(sums.fits)
            for c in range(rows.shape[1])
        }


class Asks(Finds):
    """Asks for a kind that nobody computes."""

    def weights(self, view):
        return Weights(fits=(Unknown(),))


@pytest.fixture(params=[*SCHEDULES, pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu":
        yield None
    else:
        with installed(request.param) as simulated:
            yield simulated


@pytest.fixture
def small(monkeypatch):
    """A few frames make many tiles and several batches."""
    monkeypatch.setattr(cuda_plan, "SIZES", tiles.Sizes(runs_tile=45_000, tile=45_000, shard=100_000))
    monkeypatch.setattr(cuda_correlate, "SCRATCH_NBYTES", 1_500_000)


def of_disks(path, count=23, dtype="u2"):
    frames = disks(count, SHAPE, PLACES).astype(dtype)
    return gpuem.open(raw(path / "a.raw", frames), scan=(count,), frame=SHAPE, dtype=dtype), frames


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_a_run_finds_what_the_cpu_finds(device, small, tmp_path, dtype):
    ds, frames = of_disks(tmp_path, dtype=dtype)
    found = gpuem.run(ds, [Finds(), gpuem.Sum()], device="cuda")
    np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(frames))
    for k, fit in enumerate([*SEARCHES, GUIDED]):
        expected = on_cpu(fit, frames)
        rows = np.stack([found[f"finds/{k}_{c}"].data.ravel() for c in range(fit.columns)], axis=1)
        check_same(fit, rows.astype(np.float32), expected)
        if k == 0:
            assert (rows[:, 0] >= 5).all()


def test_all_batches_are_of_one_size(small, tmp_path):
    with installed("late"):
        ds, _ = of_disks(tmp_path)
        gpuem.run(ds, [Finds()], device="cuda")
        batches = {cuda_correlate.batch_frames(search, SHAPE) for search in SEARCHES}
        assert max(batches) > 1
        assert sorted(fft.plans()) == sorted((kind, (b, *SHAPE)) for kind in ("C2R", "R2C") for b in batches)


def test_broken_frames_are_found_again(device, small, tmp_path):
    """The careful way computes fits a second time, one block at a time."""
    frames = disks(23, SHAPE, PLACES).astype("f4")
    frames[5, 3, 3], frames[17, 0, 0] = np.nan, np.inf
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(23,), frame=SHAPE, dtype="f4")
    found = gpuem.run(ds, [Finds()], device="cuda", on_error="mask")
    good = np.delete(np.arange(23), [5, 17])
    for k, fit in enumerate([*SEARCHES, GUIDED]):
        rows = np.stack([found[f"finds/{k}_{c}"].data.ravel() for c in range(fit.columns)], axis=1)
        check_same(fit, rows[good].astype(np.float32), on_cpu(fit, frames[good]))
        assert np.isnan(rows[[5, 17]]).all()


@pytest.mark.parametrize("scratch", [3 << 20, 256 << 20])
def test_the_peak_stays_below_the_plan(tmp_path, monkeypatch, scratch):
    monkeypatch.setattr(cuda_correlate, "SCRATCH_NBYTES", scratch)
    with installed("late") as simulated:
        ds, _ = of_disks(tmp_path, 40)
        planned = job.prepare(ds, [Finds()], recipe.run_section(device="cuda")).plan.device_nbytes
        gpuem.run(ds, [Finds()], device="cuda")
        assert simulated.peak_bytes <= sum(planned.values())
        assert planned["scratch of fits"] <= 3 * scratch * 1.2


@pytest.mark.parametrize("shape", [(8, 8), (57, 60), (256, 256), (251, 509), (2048, 2048), (4096, 4096)])
def test_scratch_is_bounded(shape):
    search = PeakSearch(np.zeros((1, 1), np.float32))
    batch, nbytes = cuda_correlate.batch_frames(search, shape), cuda_correlate.search_scratch_nbytes(search, shape)
    assert batch & (batch - 1) == 0
    assert nbytes <= (256 << 20) + cuda_correlate.ROUNDED_NBYTES or batch == 1
    assert batch >= {8: 1024, 256: 64, 2048: 1}.get(shape[0], 1)


def test_data_on_the_gpu(device, tmp_path):
    ds, frames = of_disks(tmp_path, 9)
    found = gpuem.run(ds.to_device(), [Finds()], device="cuda")
    rows = np.stack([found[f"finds/0_{c}"].data.ravel() for c in range(SEARCHES[0].columns)], axis=1)
    check_same(SEARCHES[0], rows.astype(np.float32), on_cpu(SEARCHES[0], frames))


def test_what_can_t_be_computed_is_told_before_anything_is_read(tmp_path, monkeypatch):
    with installed():
        import cupy

        ds, _ = of_disks(tmp_path, 3)
        with pytest.raises(DeviceError, match=r'Unknown can.t be computed on the GPU.*PeakSearch.*"cpu"'):
            job.prepare(ds, [Asks()], recipe.run_section(device="cuda"))
        monkeypatch.delattr(cupy.cuda, "cufft")
        with pytest.raises(DeviceError, match=r"PeakSearch: cuFFT.*can't be loaded.*pip install 'gpuem\[cuda13\]'"):
            job.prepare(ds, [Finds()], recipe.run_section(device="cuda"))
        cuda_fits.check([GUIDED])


def test_errors_of_cufft_are_told_in_words(tmp_path, monkeypatch):
    with installed():
        import cupy

        def fails(*given, **more):
            raise cupy.cuda.cufft.CuFFTError(8)

        monkeypatch.setattr(cupy.fft, "rfft2", fails)
        ds, _ = of_disks(tmp_path, 3)
        with pytest.raises(DeviceError, match=r"cuFFT failed on \d+ frames of 60x57 px: CUFFT_INVALID_SIZE"):
            gpuem.run(ds, [Finds()], device="cuda")
