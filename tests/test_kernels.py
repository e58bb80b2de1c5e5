"""Every CUDA kernel, its text unchanged, on the CPU against the naive reference, in several orders of threads.

With --require-gpu the same tests run the same functions on a GPU (see conftest.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
from machine import ORDERS, Machine

from gpuem.backends import Frames, cuda_stitch, stitch
from gpuem.backends import cuda_kernels as kernels
from gpuem.formats.source import Part

SMALL = ["u1", "i1", "u2", "i2"]
ALL = [*SMALL, "u4", "i4", "u8", "i8", "f4", "f8"]


@pytest.fixture(params=[*ORDERS, pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request, monkeypatch):
    return Machine(request.param, monkeypatch)


def place(frames, *, gap=0, before=0):
    """Frames (n, y, x) in one flat array with `gap` pixels between and `before` in front of them, and their starts."""
    size = math.prod(frames.shape[1:])
    starts = before + np.arange(len(frames)) * (size + gap)
    flat = np.full(before + len(frames) * (size + gap), 77, frames.dtype)
    for frame, start in zip(frames, starts, strict=True):
        flat[start : start + size] = frame.ravel()
    return flat, starts.astype(np.int64)


def on_device(machine, frames, **where):
    flat, starts = place(frames, **where)
    item = frames.dtype.itemsize
    aligned = kernels.alignment(*(int(s) * item for s in starts))
    pixels = machine.put(flat)
    return kernels.DeviceFrames(pixels, machine.put(starts), len(frames), frames.shape[1:], aligned)


def masks_of(shape, count, seed=3):
    """Masks: all, none, single pixels in corners, an annulus, then noise."""
    rng = np.random.default_rng(seed)
    masks = [np.ones(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)]
    masks[2][0, -1] = masks[3][-1, 0] = True
    masks.append(reference.annulus(shape, (shape[0] / 3, shape[1] / 2), min(shape) / 2, min(shape) / 5))
    masks += [rng.random(shape) < 0.3 for _ in range(max(0, count - len(masks)))]
    return masks[:count]


def wide_of(dtype):
    return np.float64 if np.dtype(dtype).kind == "f" else np.int64


def lowest(dtype):
    return -np.inf if np.dtype(dtype).kind == "f" else np.iinfo(dtype).min


def check_all_sums(machine, frames, masks, regions, *, images=True, **where):
    shape, wide = frames.shape[1:], wide_of(frames.dtype)
    given = on_device(machine, frames, **where)
    table = kernels.mask_bytes([*masks, *regions], shape)
    columns = machine.put(np.full((len(frames), len(masks) + 3 * len(regions)), 5, wide))
    total = machine.put(np.full(math.prod(shape), 7, wide))
    maximum = machine.put(np.full(math.prod(shape), lowest(frames.dtype), kernels.maximum_type(frames.dtype)))
    kernels.all_sums(
        given,
        (machine.put(table), len(masks), len(regions)),
        columns if masks or regions else None,
        (total, maximum) if images else None,
    )
    expected = [reference.mask_sums(frames, mask) for mask in masks]
    for region in regions:
        expected += list(reference.moments(frames, region).T)
    found = machine.get(columns) - wide(5)
    for column, values in zip(found.T, expected, strict=True):
        np.testing.assert_array_equal(column, values)
    if images:
        np.testing.assert_array_equal(machine.get(total).reshape(shape) - wide(7), reference.frame_sum(frames))
        np.testing.assert_array_equal(machine.get(maximum).reshape(shape), reference.frame_max(frames))


@pytest.mark.parametrize("dtype", ALL)
def test_all_sums(machine, dtype):
    frames = reference.planted((5, 13, 19), smaller(dtype), 1)
    masks = masks_of((13, 19), 5)
    check_all_sums(machine, frames, masks[:2] + masks[4:], [np.ones((13, 19), bool), masks[4]])


def smaller(dtype):
    """Pixels of 64 bits are refused beyond 2^32 before they come to a kernel; `planted` stays below."""
    return dtype


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (2, 7, 1), (37, 16, 16), (3, 40, 264), (2, 101, 103)])
def test_all_sums_of_odd_shapes(machine, shape):
    frames = reference.planted(shape, "u2", 2)
    check_all_sums(machine, frames, masks_of(shape[1:], 5)[3:], [np.ones(shape[1:], bool)])


@pytest.mark.parametrize("where", [{"gap": 1}, {"gap": 2, "before": 3}, {"gap": 8, "before": 8}])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_frames_at_any_alignment(machine, dtype, where):
    frames = reference.planted((4, 8, 32), dtype, 3)
    check_all_sums(machine, frames, masks_of((8, 32), 5)[4:], [masks_of((8, 32), 5)[4]], **where)


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_images_alone_and_sums_alone(machine, dtype):
    frames = reference.planted((6, 9, 24), dtype, 4)
    check_all_sums(machine, frames, [], [])
    check_all_sums(machine, frames, masks_of((9, 24), 5)[2:], [], images=False)
    check_all_sums(machine, frames, [], [masks_of((9, 24), 5)[4]], images=False)


def test_extremes_don_t_overflow(machine):
    for dtype in SMALL:
        for value in (np.iinfo(dtype).min, np.iinfo(dtype).max):
            frames = np.full((3, 64, 264), value, dtype)
            check_all_sums(machine, frames, [np.ones((64, 264), bool)], [np.ones((64, 264), bool)])


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize(("count", "masks", "shape"), [(1, 15, (7, 11)), (17, 16, (16, 16)), (33, 40, (13, 37))])
def test_mask_sums_on_tensor_cores(machine, dtype, count, masks, shape):
    frames = reference.planted((count, *shape), dtype, 5)
    chosen = masks_of(shape, masks)
    columns = machine.put(np.full((count, masks + 3), 9, np.int64))
    for where in ({}, {"gap": 3}):
        given = on_device(machine, frames, **where)
        kernels.mask_sums(given, machine.put(kernels.mask_bits(chosen, shape)), masks, columns)
    found = (machine.get(columns) - 9) // 2
    expected = np.stack([reference.mask_sums(frames, mask) for mask in chosen], axis=1)
    np.testing.assert_array_equal(found[:, :masks], expected)
    assert (found[:, masks:] == 0).all()


@pytest.mark.parametrize("dtype", ALL)
def test_image_sums(machine, dtype):
    frames = reference.planted((6, 17, 23), dtype, 6)
    images = np.random.default_rng(6).normal(size=(9, 17, 23))
    given = on_device(machine, frames)
    weights = kernels.weight_images(images, frames.dtype)
    out = machine.put(np.full((6, 9), np.nan))
    kernels.image_sums(given, machine.put(weights), 9, out)
    check_images(machine.get(out), frames, images, weights.dtype)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize(("count", "shape"), [(1, (3, 5)), (19, (40, 64))])
def test_image_sums_on_tensor_cores(machine, dtype, count, shape):
    frames = reference.planted((count, *shape), dtype, 7)
    images = np.random.default_rng(7).normal(size=(17, *shape)) * np.logspace(-6, 6, 17)[:, None, None]
    out = machine.put(np.full((count, 17), np.nan))
    kernels.image_sums_tensor(on_device(machine, frames), machine.put(kernels.weight_parts(images)), 17, out)
    check_images(machine.get(out), frames, images, np.float32)


def check_images(found, frames, images, real):
    """Against float64, in units of what rounding every weight and product can change."""
    for k, image in enumerate(images):
        exact = reference.image_sums(frames, image)
        scale = reference.image_sums(np.abs(frames.astype(np.float64)), np.abs(image)) + 1e-300
        assert (np.abs(found[:, k] - exact) <= (2e-6 if real == np.float32 else 1e-14) * scale).all()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_all_finite(machine, dtype):
    frames = reference.planted((6, 11, 17), dtype, 8)
    frames[1, 0, 0], frames[3, -1, -1], frames[4, 5, 5] = np.nan, np.inf, -np.inf
    good = machine.put(np.full(6, 9, np.uint8))
    kernels.all_finite(on_device(machine, frames), good)
    np.testing.assert_array_equal(machine.get(good), reference.all_finite(frames))


@pytest.mark.parametrize("dtype", ["u4", "i4", "u8", "i8"])
def test_magnitudes(machine, dtype):
    frames = reference.planted((4, 7, 50), dtype, 9)
    frames[3] = np.iinfo(dtype).min
    found = machine.put(np.full((4, 2), -1.0))
    kernels.magnitudes(on_device(machine, frames), found)
    np.testing.assert_allclose(machine.get(found), reference.magnitudes(frames), rtol=1e-12)


@pytest.mark.parametrize("stored", ["u1", "<u2", ">u2", ">i4", ">f4", "<f8", ">u8"])
def test_convert(machine, stored):
    frames = reference.planted((3, 5, 7), np.dtype(stored).newbyteorder("="), 10)
    raw = np.concatenate([np.r_[np.zeros(3, np.uint8), f.astype(stored).ravel().view(np.uint8)] for f in frames])
    at = 3 + np.arange(3) * (3 + 35 * frames.dtype.itemsize)
    out = machine.put(np.zeros((3, 35), frames.dtype))
    kernels.convert(machine.put(raw), machine.put(at.astype(np.int64)), np.dtype(stored), (None, None), out)
    np.testing.assert_array_equal(machine.get(out), frames.reshape(3, 35))


@pytest.mark.parametrize(("stored", "real"), [("<u2", "f4"), (">u2", "f4"), ("<i4", "f8")])
@pytest.mark.parametrize("which", ["dark", "gain", "both"])
def test_convert_with_dark_and_gain_gives_the_cpu_s_bits(machine, stored, real, which):
    frames = reference.planted((2, 9, 11), np.dtype(stored).newbyteorder("="), 11)
    rng = np.random.default_rng(11)
    dark = rng.normal(10, 3, (9, 11)).astype(real) if which != "gain" else None
    gain = rng.normal(1, 0.1, (9, 11)).astype(real) if which != "dark" else None
    raw = np.ascontiguousarray(frames.astype(stored)).reshape(-1).view(np.uint8)
    at = np.arange(2, dtype=np.int64) * raw.size // 2
    out = machine.put(np.zeros((2, 99), real))
    pair = tuple(None if a is None else machine.put(a.ravel()) for a in (dark, gain))
    kernels.convert(machine.put(raw), machine.put(at), np.dtype(stored), pair, out)
    np.testing.assert_array_equal(
        machine.get(out).reshape(frames.shape), reference.dark_and_gain(frames, dark, gain, real)
    )


@pytest.mark.parametrize(
    ("extent", "chunk", "begin"),
    [((5, 6, 7), (2, 4, 3), (1, 0, 0)), ((3, 4, 5, 9), (2, 3, 5, 4), (1, 2, 0, 0)), ((4, 8, 8), (1, 8, 8), (0, 0, 0))],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8"])
def test_place_chunks(machine, extent, chunk, begin, dtype):
    counts = [-(-(b + n) // c) for n, c, b in zip(extent, chunk, begin, strict=True)]
    whole = reference.planted([n * c for n, c in zip(counts, chunk, strict=True)], dtype, 12)
    chunks = reference.cut_into_chunks(whole, chunk)
    tile = whole[tuple(slice(b, b + n) for b, n in zip(begin, extent, strict=True))]
    out = machine.put(np.zeros((math.prod(extent[:-2]), math.prod(extent[-2:])), dtype))
    geometry = np.array([extent, chunk, counts, begin], np.int64)
    kernels.place_chunks(machine.put(chunks), machine.put(geometry), out)
    np.testing.assert_array_equal(machine.get(out), tile.reshape(machine.get(out).shape))


@pytest.mark.parametrize(
    ("frame", "inside", "size", "at"),
    [((4, 5), (0, 0), (4, 5), (3, 4)), ((9, 11), (2, 3), (4, 7), (5, 0)), ((40, 50), (1, 2), (39, 40), (0, 1))],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "f8"])
def test_place_part(machine, frame, inside, size, at, dtype):
    frames = reference.planted((3, *frame), dtype, 14)
    before = reference.planted((3, at[0] + size[0] + 1, at[1] + size[1] + 2), dtype, 15)
    expected = reference.place_part(frames, inside, size, before, at)
    out = machine.put(before.reshape(3, -1).copy())
    cuda_stitch.place_part(on_device(machine, frames, gap=3), (*inside, *size), out, at, before.shape[1:])
    np.testing.assert_array_equal(machine.get(out).reshape(before.shape), expected)
    # the twin on the processor, with frames that lie evenly and others
    part = Part(None, frame, 0, inside, size, at)
    for gap in (0, 3):
        found = before.copy()
        stitch.place_part(Frames(*place(frames, gap=gap), frame), np.arange(3), part, found)
        np.testing.assert_array_equal(found, expected)


def test_place_part_repeats_a_row_of_fill_values(machine):
    before = reference.planted((2, 6, 7), "u2", 16)
    out, row = machine.put(before.reshape(2, -1).copy()), machine.put(np.full(7, 9, "u2"))
    same = kernels.DeviceFrames(row, machine.put(np.zeros(2, np.int64)), 2, (6, 0), 2)
    cuda_stitch.place_part(same, (0, 0, 3, 4), out, (2, 1), (6, 7))
    expected = before.copy()
    expected[:, 2:5, 1:5] = 9
    np.testing.assert_array_equal(machine.get(out).reshape(before.shape), expected)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u8", "i8", "f4", "f8"])
def test_patch_dead(machine, dtype):
    frames = reference.planted((3, 6, 8), dtype, 13)
    neighbours = {0: [1, 8], 9: [10, 17, 1], 47: [38, 39, 46]}
    offsets = np.cumsum([0, *map(len, neighbours.values())]).astype(np.int32)
    given = on_device(machine, frames, gap=2)
    kernels.patch_dead(
        given, machine.put(np.array(list(neighbours), np.int32)), machine.put(offsets),
        machine.put(np.concatenate(list(neighbours.values())).astype(np.int32)),
    )  # fmt: skip
    found = machine.get(given.pixels).reshape(3, 50)[:, :48].reshape(frames.shape)
    np.testing.assert_array_equal(found, reference.patch_dead(frames, neighbours))
