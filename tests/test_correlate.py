"""Peaks of the correlation of whole frames, and disks near expected sites, against slow and plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gpuem.backends import Frames, cpu_correlate, cpu_fits, cpu_guided
from gpuem.backends.peaks import GuidedFit, PeakSearch, soft_disk, wrapped, zero_mean_kernel

SHAPES = [(16, 16), (17, 13), (12, 31), (31, 12), (13, 13), (8, 9)]
TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]


def find(frames, search):
    frames = np.asarray(frames)
    out = np.empty((len(frames), search.columns), np.float32)
    starts = np.arange(len(frames), dtype=np.int64) * frames[0].size
    at = Frames(frames.reshape(-1), starts, frames.shape[1:])
    cpu_fits.run(search, at, np.arange(len(frames)), out)
    assert np.isnan(out[:, 1:]).sum() == 3 * (search.max_peaks * len(out) - out[:, 0].sum())
    return [row[1 : 1 + 3 * int(row[0])].reshape(-1, 3) for row in out]


def guide(frames, fit):
    frames = np.asarray(frames)
    out = np.empty((len(frames), fit.columns), np.float32)
    starts = np.arange(len(frames), dtype=np.int64) * frames[0].size
    cpu_fits.run(fit, Frames(frames.reshape(-1), starts, frames.shape[1:]), np.arange(len(frames)), out)
    return out.reshape(len(frames), -1, 4)


def direct(frame, kernel):
    """Periodic correlation, pixel by pixel."""
    height, width = frame.shape
    out = np.empty(frame.shape)
    for y in range(height):
        for x in range(width):
            out[y, x] = (frame * np.roll(kernel, (y, x), (0, 1))).sum()
    return out


def correlation(frame, search):
    """In double precision, with the whole complex spectrum."""
    m = np.fft.fft2(frame.astype(float) - frame.mean()) * np.conj(np.fft.fft2(search.kernel.astype(float)))
    size = np.abs(m)
    with np.errstate(divide="ignore", invalid="ignore"):
        m = np.where(size > 1e-9 * size.max(), m * size ** (search.power - 1), 0)
    fy, fx = (np.fft.fftfreq(n) for n in frame.shape)
    return m * np.exp(-2 * (np.pi * search.sigma) ** 2 * (fy[:, None] ** 2 + fx[None, :] ** 2))


def between(spectrum, y, x):
    """Real part of the Fourier series at (y, x): the value of the zero-padded transform there."""
    fy, fx = (np.fft.fftfreq(n) for n in spectrum.shape)
    return (np.exp(2j * np.pi * fy * y) @ spectrum @ np.exp(2j * np.pi * fx * x)).real / spectrum.size


def listed(image, search):
    """The filters one after another, in plain Python."""
    height, width = image.shape
    found = []
    for y in range(height):
        for x in range(width):
            earlier = [(y - 1, x - 1), (y - 1, x), (y - 1, x + 1), (y, x - 1)]
            later = [(y, x + 1), (y + 1, x - 1), (y + 1, x), (y + 1, x + 1)]
            on = [[image[p] for p in some if 0 <= p[0] < height and 0 <= p[1] < width] for some in (earlier, later)]
            if all(image[y, x] > v for v in on[0]) and all(image[y, x] >= v for v in on[1]) and image[y, x] > 0:
                found.append((y, x, image[y, x]))
    e = search.edge
    found = [p for p in found if e <= p[0] < height - e and e <= p[1] < width - e and p[2] > search.min_absolute]
    found.sort(key=lambda p: -p[2])
    if found:
        least = np.float32(search.min_relative) * found[min(search.relative_to, len(found)) - 1][2]
        found = [p for p in found if p[2] >= least]
    kept = []
    for p in found:
        if all((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 >= search.spacing**2 for q in kept):
            kept.append(p)
    return kept[: search.max_peaks]


def lopsided(half=3):
    """No symmetry at all: mirrored, turned or transposed it is found elsewhere."""
    image = np.zeros((2 * half + 1, 2 * half + 1))
    image[0:4, 1] = 3
    image[3, 1:6] = 2
    image[5, 5] = 4
    return (image - image.mean()).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_correlation_is_the_sum_over_pixels(shape):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 200, (3, *shape)).astype(np.uint16)
    search = PeakSearch(wrapped(lopsided(), shape))
    got = cpu_correlate.correlate(frames.ravel(), np.arange(3) * math.prod(shape), shape, search)
    want = np.array([direct(frame.astype(float), search.kernel.astype(float)) for frame in frames])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("power", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("sigma", [0.0, 1.1])
def test_hybrid_phase_and_smoothing(power, sigma):
    frame = np.random.default_rng(1).integers(0, 200, (1, 15, 22))
    search = PeakSearch(wrapped(lopsided(), (15, 22)), power=power, sigma=sigma)
    got = cpu_correlate.correlate(frame.ravel(), np.zeros(1, np.int64), (15, 22), search)[0]
    want = np.fft.ifft2(correlation(frame[0], search)).real
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", TYPES)
def test_all_types_of_pixels(dtype):
    rng = np.random.default_rng(2)
    frames = rng.integers(0, 120, (3, 19, 23))
    search = PeakSearch(wrapped(lopsided(), (19, 23)), max_peaks=9)
    sites = np.array([[9.0, 9.0], [3.0, 15.0], [16.0, 5.0]])
    for got, want in zip(find(frames.astype(dtype), search), find(frames.astype(float), search), strict=True):
        np.testing.assert_array_equal(got, want)
    fit = GuidedFit(sites, lopsided(), 2)
    np.testing.assert_array_equal(guide(frames.astype(dtype), fit), guide(frames.astype(float), fit))


@pytest.mark.parametrize("where", [(20, 31), (7, 40), (33, 6)])
@pytest.mark.parametrize("power", [0.0, 0.7, 1.0])
def test_a_lopsided_probe_is_found_where_its_centre_is(where, power):
    frame = wrapped(lopsided(), (41, 53))
    frame = np.roll(frame, where, (0, 1))[None] * 100 + 700
    search = PeakSearch(wrapped(lopsided(), (41, 53)), power=power, max_peaks=1)
    got = find(frame, search)[0][0]
    np.testing.assert_allclose(got[:2], where, atol=2e-3)


FILTERS = [
    {},
    {"edge": 2},
    {"edge": 40},
    {"min_absolute": 30.0},
    {"min_relative": 0.4},
    {"min_relative": 0.9, "relative_to": 5},
    {"min_relative": 1.0, "relative_to": 10_000},
    {"spacing": 5.0},
    {"spacing": 5.0, "min_relative": 0.3, "edge": 1, "max_peaks": 4, "relative_to": 2},
    {"max_peaks": 1},
]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_maxima_and_filters(shape, filters):
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 200, (4, *shape)).astype(np.uint16)
    search = PeakSearch(wrapped(lopsided(), shape), subpixel="none", **{"max_peaks": 64, **filters})
    images = cpu_correlate.correlate(frames.ravel(), np.arange(4) * math.prod(shape), shape, search)
    for got, image in zip(find(frames, search), images, strict=True):
        want = listed(image, search)
        assert len(got) == len(want)
        np.testing.assert_array_equal(got, np.array(want, np.float32).reshape(-1, 3))


def test_ties_and_plateaus_are_settled_by_the_order_of_pixels():
    image = np.zeros((1, 9, 11), np.float32)
    image[0, 2, 2:5] = 5
    image[0, 6, 6:8] = 5
    image[0, 7, 6:8] = 5
    image[0, 0, 10] = 5
    search = PeakSearch(np.zeros((9, 11), np.float32), subpixel="none", max_peaks=8)
    space = cpu_correlate._Workspace(search, (9, 11))
    out = np.empty((1, search.columns), np.float32)
    cpu_correlate._peaks(image, space.numbers, space.candidates, space.fine, out)
    assert out[0, 0] == 3
    np.testing.assert_array_equal(out[0, 1:10].reshape(3, 3), [[0, 10, 5], [2, 2, 5], [6, 6, 5]])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", [4, 16, 7])
def test_upsampling_is_the_zero_padded_transform(shape, factor):
    """The height is that of the Fourier series near the position, and none of the neighbours on the grid is higher."""
    rng = np.random.default_rng(4)
    frames = rng.integers(0, 200, (3, *shape)).astype(np.uint16)
    search = PeakSearch(wrapped(lopsided(), shape), factor=factor, sigma=0.8, max_peaks=6)
    for got, frame in zip(find(frames, search), frames, strict=True):
        spectrum = correlation(frame, search)
        scale = max(abs(between(spectrum, y, x)) for y, x, _ in got)
        for y, x, height in got:
            top = between(spectrum, y, x)
            assert abs(top - height) < 2e-2 / factor**2 * 16 * scale
            fy, fx = round(float(y) * factor) / factor, round(float(x) * factor) / factor
            around = [between(spectrum, fy + a / factor, fx + b / factor) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            assert around[4] >= max(around) - 2e-6 * scale


@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 16, 17, 256])
@pytest.mark.parametrize("at", [0.0, 0.3, -0.5, 2.75, 7.5, 15.9999, 300.2])
def test_weights_between_pixels(n, at):
    weights = np.empty(n, np.float32)
    cpu_correlate._between(at, weights)
    f = np.fft.fftfreq(n) * n
    want = np.exp(2j * np.pi * f[:, None] * (at - np.arange(n))[None, :] / n).real.mean(axis=0)
    np.testing.assert_allclose(weights, want, atol=2e-6)


def test_parabola():
    image = np.zeros((1, 8, 8), np.float32)
    y, x = np.mgrid[:8, :8]
    image[0] = 50 - 2 * (y - 3.3) ** 2 - (x - 4.25) ** 2
    search = PeakSearch(np.zeros((8, 8), np.float32), subpixel="parabola", max_peaks=2)
    space = cpu_correlate._Workspace(search, (8, 8))
    out = np.empty((1, search.columns), np.float32)
    cpu_correlate._peaks(image, space.numbers, space.candidates, space.fine, out)
    np.testing.assert_allclose(out[0, :4], [1, 3.3, 4.25, 50], rtol=1e-6)


@pytest.mark.parametrize("subpixel", ["none", "parabola", "upsample"])
@pytest.mark.parametrize("power", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("level", [0, 7, 4_000_000_000])
def test_frames_without_anything_have_no_peaks(subpixel, power, level):
    frames = np.full((2, 37, 41), level, np.uint32)
    search = PeakSearch(wrapped(lopsided(), (37, 41)), subpixel=subpixel, power=power)
    assert [len(peaks) for peaks in find(frames, search)] == [0, 0]


def test_peaks_of_a_frame_do_not_depend_on_the_others(monkeypatch):
    rng = np.random.default_rng(5)
    frames = rng.integers(0, 50, (11, 37, 26)).astype(np.uint16)
    for power in (1.0, 0.7):
        search = PeakSearch(wrapped(lopsided(), (37, 26)), power=power)
        together = find(frames, search)
        for size in (1, 3 * 4 * 37 * 26):
            monkeypatch.setattr(cpu_correlate, "BLOCK_NBYTES", size)
            for got, want in zip(find(frames, search), together, strict=True):
                np.testing.assert_array_equal(got, want)


def test_kernel_sums_to_zero_and_measures_counts():
    kernel = zero_mean_kernel(soft_disk(6, 1.4, 13), 6.7, 12)
    assert abs(kernel.sum(dtype=np.float64)) < 1e-6 * np.abs(kernel).sum()
    frame = np.full((64, 64), 11.0)
    frame[7:34, 19:46] += 5 * soft_disk(6, 1.4, 13)
    peak = find(frame[None], PeakSearch(wrapped(kernel, (64, 64)), max_peaks=1))[0][0]
    np.testing.assert_allclose(peak, [20, 32, 5 * soft_disk(6, 1.4, 13).sum()], rtol=1e-4)
    sloping = np.mgrid[:64, :64][1] * 3.0
    got = cpu_correlate.correlate(
        sloping.ravel(), np.zeros(1, np.int64), (64, 64), PeakSearch(wrapped(kernel, (64, 64)))
    )
    assert np.abs(got[0, 16:48, 16:48]).max() < 1e-2


@pytest.mark.parametrize("bad", [(np.ones((4, 4)), 1, 2), (np.ones((5, 7)), 1, 2), (np.zeros((5, 5)), 1, 2)])
def test_kernels_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="disk"):
        zero_mean_kernel(*bad)
    with pytest.raises(ValueError, match="frame of 5x9"):
        wrapped(np.ones((7, 7)), (5, 9))


def disk(position, radius, size, edge=1.4):
    """Logistic edge, as of a real probe."""
    y, x = np.ogrid[: size[0], : size[1]]
    return 1 / (1 + np.exp(4 * (np.hypot(y - position[0], x - position[1]) - radius) / edge))


def bound(radius, counts, size=64):
    """Least standard deviation of a disk's position along an axis, for its counts and 2 % background."""
    e, half = 1e-3, size / 2
    at = [counts * p / p.sum() for p in (disk((half + d, half), radius, (size, size)) for d in (-e, 0, e))]
    slope, expected = (at[2] - at[0]) / (2 * e), at[1] + 0.02 * at[1].max()
    return (slope**2 / expected).sum() ** -0.5


@pytest.mark.parametrize("counts", [1e2, 1e3, 1e4, 1e5])
def test_accuracy_of_single_disks(counts):
    """Within 1.25 times the Cramer-Rao bound, from 100 electrons to 100 000."""
    rng = np.random.default_rng(6)
    where = 32 + rng.uniform(-0.5, 0.5, (300, 2))
    profiles = np.array([disk(p, 6, (64, 64)) for p in where])
    scale = counts / profiles[0].sum()
    frames = rng.poisson(scale * (profiles + 0.02)).astype(np.uint16)
    kernel = zero_mean_kernel(soft_disk(6, 1.4, 9), 6.7, 9)
    got = np.array([p[0, :2] for p in find(frames, PeakSearch(wrapped(kernel, (64, 64)), max_peaks=1))])
    assert np.sqrt(((got - where) ** 2).mean()) < 1.25 * bound(6, counts)
    near = np.array([guide(frame[None], GuidedFit(np.array([[32.0, 32.0]]), kernel, 3))[0, 0, :2] for frame in frames])
    assert np.sqrt(((near - where) ** 2).mean()) < 1.25 * bound(6, counts) + 0.01


@pytest.mark.parametrize("edge", ["top", "bottom", "left", "right"])
@pytest.mark.parametrize(
    "distance, within", [(-0.3, 0.3), (1.7, 0.3), (4.6, 0.2), (8.2, 0.03), (11.4, 0.03), (20.1, 0.03)]
)
def test_a_disk_cut_by_the_edge(edge, distance, within):
    """Half of the disk, less of it, only of the ring: found where it is; the four edges are alike."""
    where = {
        "top": (distance, 40.2),
        "bottom": (72 - distance, 40.2),
        "left": (35.7, distance),
        "right": (35.7, 90 - distance),
    }
    frame = 300 * disk(where[edge], 7, (73, 91)) + 5
    kernel = zero_mean_kernel(soft_disk(7, 1.4, 14), 7.7, 14)
    fit = GuidedFit(np.maximum(np.round(np.array([where[edge]])), 0), kernel, 3)
    y, x, height, elevation = guide(frame[None], fit)[0, 0]
    assert abs(y - where[edge][0]) < within
    assert abs(x - where[edge][1]) < within
    assert elevation > 0.02 * height


def slow_guided(frame, site, kernel, search):
    """Products at all shifts, in double precision, for windows that lie on the frame."""
    half = len(kernel) // 2
    y, x = (math.floor(v + 0.5) for v in site)
    found = np.empty((2 * search + 1,) * 2)
    for dy in range(-search, search + 1):
        for dx in range(-search, search + 1):
            part = frame[y + dy - half : y + dy + half + 1, x + dx - half : x + dx + half + 1].astype(float)
            found[dy + search, dx + search] = (part * kernel).sum()
    return found, (y - search, x - search)


@pytest.mark.parametrize("search", [0, 1, 2, 3, 4, 7])
def test_guided_heights_positions_and_elevations(search):
    rng = np.random.default_rng(7)
    kernel = zero_mean_kernel(soft_disk(3, 1, 7), 3.5, 6)
    frame = rng.integers(0, 100, (60, 70)) + (400 * disk((30.3, 33.8), 3, (60, 70))).astype(int)
    sites = np.array([[29.4, 34.4], [20.0, 45.0], [40.0, 20.0]])
    got = guide(frame[None], GuidedFit(sites, kernel, search))[0]
    for site, (y, x, height, elevation) in zip(sites, got, strict=True):
        found, corner = slow_guided(frame, site, kernel.astype(float), search)
        top = np.array(np.unravel_index(found.argmax(), found.shape))
        assert np.abs(np.array([y, x]) - top - corner).max() <= 1
        if (top == 0).any() or (top == 2 * search).any():
            np.testing.assert_allclose([y, x, height, elevation], [*(top + corner), found.max(), 0], rtol=1e-4)
            continue
        d = np.hypot(*(np.mgrid[: 2 * search + 1, : 2 * search + 1] - top[:, None, None]))
        slopes = ((found.max() - found) / np.maximum(d, 1))[d >= 1.5]
        want = max(slopes.min(), 0) if slopes.size else 0
        np.testing.assert_allclose(elevation, want, rtol=1e-3, atol=1e-4 * found.max())
        assert found.max() <= height * (1 + 1e-6)


def test_paraboloid():
    y, x = np.mgrid[-1:2, -1:2]
    near = (9 - 2 * (y - 0.3) ** 2 - (x + 0.2) ** 2 - 0.8 * (y - 0.3) * (x + 0.2)).astype(np.float32)
    np.testing.assert_allclose(cpu_guided._paraboloid(near)[:2], [0.3, -0.2], atol=1e-5)
    assert cpu_guided._paraboloid(np.zeros((3, 3), np.float32)) == (0, 0, 0)
    assert cpu_guided._paraboloid(-near) == (0, 0, 0)


def test_normalised_is_pearsons_correlation_and_knows_no_scale():
    rng = np.random.default_rng(8)
    kernel = lopsided(4)
    kernel = kernel[:, :].copy()
    frame = rng.integers(0, 100, (40, 40))
    fit = GuidedFit(np.array([[20.0, 20.0], [18.0, 25.0]]), kernel, 3, normalised=True)
    got = guide(frame[None], fit)[0]
    half = 4
    for site, row in zip(fit.sites, got, strict=True):
        best = max(
            np.corrcoef(
                frame[int(site[0]) + a - half : int(site[0]) + a + half + 1,
                      int(site[1]) + b - half : int(site[1]) + b + half + 1].ravel(),
                kernel.ravel(),
            )[0, 1]
            for a in range(-3, 4)
            for b in range(-3, 4)
        )  # fmt: skip
        assert row[2] >= best - 1e-4
    np.testing.assert_allclose(guide(frame[None] * 37 + 1000, fit)[0], got, rtol=1e-3, atol=1e-4)
    perfect = np.full((40, 40), 50.0)
    perfect[16:25, 15:24] += 3 * kernel
    np.testing.assert_allclose(guide(perfect[None], fit)[0, 0, :3], [20, 19, 1], atol=0.2)


def test_the_logarithm_lets_weak_disks_count():
    frame = 5 + 4000 * disk((20, 14), 4, (48, 48)) + 40 * disk((20, 34), 4, (48, 48))
    kernel = zero_mean_kernel(soft_disk(4, 1, 8), 4.5, 8)
    sites = np.array([[20.0, 15.0], [21.0, 33.0]])
    plain, logarithm = (guide(frame[None], GuidedFit(sites, kernel, 3, logarithm=flag))[0] for flag in (False, True))
    np.testing.assert_allclose(logarithm[:, :2], [[20, 14], [20, 34]], atol=0.15)
    assert plain[0, 2] / plain[1, 2] > 50
    assert logarithm[0, 2] / logarithm[1, 2] < 5


@pytest.mark.parametrize("how", [{}, {"normalised": True}, {"logarithm": True}])
def test_sites_where_nothing_is(how):
    """Off the frame, nowhere, in a constant frame: NaN or no elevation, never a crash."""
    kernel = zero_mean_kernel(soft_disk(3, 1, 6), 3.5, 6)
    sites = np.array([[-50.0, 3], [5, 1e9], [np.nan, 5], [5, np.inf], [10, 10], [0, 0], [19, 22]])
    got = guide(np.full((2, 20, 23), 9, np.uint16), GuidedFit(sites, kernel, 2, **how))
    np.testing.assert_array_equal(got[0], got[1])
    assert np.isnan(got[0, :4]).all()
    np.testing.assert_allclose(got[0, 4, 2:], 0, atol=1e-3)
    assert not (got[0, 5:, 3] > 1e-3).any()


@pytest.mark.parametrize("shape", [(5, 9), (3, 3), (1, 40), (40, 1)])
def test_frames_smaller_than_the_window(shape):
    kernel = zero_mean_kernel(soft_disk(3, 1, 6), 3.5, 6)
    frame = np.random.default_rng(9).integers(0, 9, (1, *shape))
    got = guide(frame, GuidedFit(np.array([[0.0, 0.0], [shape[0] // 2, shape[1] // 2]]), kernel, 4))
    assert got.shape == (1, 2, 4)


def test_kernels_of_even_size_are_refused():
    with pytest.raises(ValueError, match="odd"):
        guide(np.zeros((1, 9, 9)), GuidedFit(np.zeros((1, 2)), np.zeros((4, 4), np.float32), 1))


def test_as_many_maxima_as_there_can_be():
    image = np.zeros((1, 7, 9), np.float32)
    image[0, ::2, ::2] = 1
    search = PeakSearch(np.zeros((7, 9), np.float32), subpixel="none", max_peaks=63)
    space = cpu_correlate._Workspace(search, (7, 9))
    assert space.candidates[0].size == 20
    out = np.empty((1, search.columns), np.float32)
    cpu_correlate._peaks(image, space.numbers, space.candidates, space.fine, out)
    assert out[0, 0] == 20


def test_maps_that_lie_in_another_memory_layout():
    """Frames apart from each other in one array, as tiles of a file with headers are."""
    rng = np.random.default_rng(10)
    pixels = rng.integers(0, 90, 4000).astype(np.uint16)
    starts = np.array([17, 1500, 900], np.int64)
    search, fit = PeakSearch(wrapped(lopsided(), (19, 23))), GuidedFit(np.array([[9.0, 9.0]]), lopsided(), 2)
    frames = np.array([pixels[s : s + 437].reshape(19, 23) for s in starts])
    for kind in (search, fit):
        apart, together = np.empty((3, kind.columns), np.float32), np.empty((3, kind.columns), np.float32)
        cpu_fits.run(kind, Frames(pixels, starts, (19, 23)), np.arange(3), apart)
        cpu_fits.run(kind, Frames(frames.ravel(), np.arange(3) * 437, (19, 23)), np.arange(3), together)
        np.testing.assert_array_equal(apart, together)
