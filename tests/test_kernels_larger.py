"""Kernels on frames that take more than one round of a block: what small frames can't show.

The fixture `machine` brings the variant with mark.gpu along.
"""

from __future__ import annotations

import numpy as np
import pytest
import reference
from test_kernels import ALL, check_all_sums, check_images, machine, masks_of, on_device

from gpuem.backends import cuda_kernels as kernels

__all__ = ["machine"]


@pytest.mark.parametrize("dtype", ALL)
def test_all_sums_over_several_strips(machine, dtype):
    """A block of floats goes through all strips itself; a whole strip may lie outside of a mask."""
    frames = reference.planted((3, 75, 120), dtype, 21)
    lower = np.zeros((75, 120), bool)
    lower[50:, 3:] = True
    check_all_sums(machine, frames, [lower, np.ones_like(lower)], [lower, np.ones_like(lower)])
    # without images: what no mask chooses isn't read, whichever of a thread's rows it is
    for masks in ([lower], [~lower], [lower & ~lower]):
        check_all_sums(machine, frames, masks, masks, images=False)


@pytest.mark.parametrize("dtype", ALL)
def test_images_go_on_from_what_is_there(machine, dtype):
    """Sum and maximum over two blocks of frames; of neighbours one has its maximum in the first, one in the second."""
    frames = reference.planted((8, 9, 13), dtype, 22)[3:7]
    smaller, larger = np.minimum(frames[:2], frames[2:]), np.maximum(frames[:2], frames[2:])
    first = np.indices((9, 13)).sum(axis=0) % 2 == 0
    frames = np.concatenate([np.where(first, larger, smaller), np.where(first, smaller, larger)])
    wide = np.float64 if frames.dtype.kind == "f" else np.int64
    lowest = -np.inf if frames.dtype.kind == "f" else np.iinfo(dtype).min
    total = machine.put(np.zeros(117, wide))
    maximum = machine.put(np.full(117, lowest, kernels.maximum_type(frames.dtype)))
    for part in (frames[:2], frames[2:]):
        kernels.all_sums(on_device(machine, part), (None, 0, 0), None, (total, maximum))
    np.testing.assert_array_equal(machine.get(total).reshape(9, 13), reference.frame_sum(frames))
    np.testing.assert_array_equal(machine.get(maximum).reshape(9, 13), reference.frame_max(frames))


def test_single_precision_is_added_up_in_double_precision(machine):
    frames = np.ones((3, 8, 16), "f4")
    frames[:, ::2, ::3] = 2.0**24
    frames[:, 1::2, ::5] = 0.25
    check_all_sums(machine, frames, [np.ones((8, 16), bool)], [np.ones((8, 16), bool)])


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "i4", "f8"])
def test_image_sums_over_several_panels(machine, dtype):
    """Both halves of a block have two panels, the last of them cut off."""
    frames = reference.planted((5, 123, 137), dtype, 23)
    images = np.random.default_rng(23).normal(size=(3, 123, 137)) + 1
    out = machine.put(np.full((5, 3), np.nan))
    weights = kernels.weight_images(images, frames.dtype)
    kernels.image_sums(on_device(machine, frames), machine.put(weights), 3, out)
    check_images(machine.get(out), frames, images, weights.dtype)


def test_products_of_image_sums_are_fused(machine):
    """4097 (1 + 2^-12) lies halfway between two numbers; what rounding it would lose is all that is left."""
    frames = np.array([[[1, 4097]]], "u2")
    weights = kernels.weight_images([np.array([[-4098, 1 + 2.0**-12]])], frames.dtype)
    out = machine.put(np.full((1, 1), np.nan))
    kernels.image_sums(on_device(machine, frames), machine.put(weights), 1, out)
    assert machine.get(out)[0, 0] == 2.0**-12


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_image_sums_on_tensor_cores_over_several_panels(machine, dtype):
    """Every warp has two panels, one of them cut off; weights keep all bits of single precision."""
    frames = reference.planted((2, 61, 107), dtype, 24)
    images = np.random.default_rng(24).normal(size=(2, 61, 107)) + 1
    # the third of the three parts is never zero and never averages out
    images[1] = 1 + 2.0**-9 + 0.9 * 2.0**-17
    out = machine.put(np.full((2, 2), np.nan))
    kernels.image_sums_tensor(on_device(machine, frames), machine.put(kernels.weight_parts(images)), 2, out)
    check_images(machine.get(out), frames, images, np.float32)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("shape", [(40, 64), (53, 97)])
def test_mask_sums_in_several_parts(machine, dtype, shape):
    """Several warps share the pixels of a frame and add to the same columns."""
    frames = reference.planted((3, *shape), dtype, 25)
    chosen = masks_of(shape, 17)
    columns = machine.put(np.zeros((3, 17), np.int64))
    kernels.mask_sums(on_device(machine, frames), machine.put(kernels.mask_bits(chosen, shape)), 17, columns)
    expected = np.stack([reference.mask_sums(frames, mask) for mask in chosen], axis=1)
    np.testing.assert_array_equal(machine.get(columns), expected)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("bad", [0, 255, 256, 300, 511, 512, 712])
def test_one_bad_pixel_of_a_large_frame(machine, dtype, bad):
    frames = np.ones((3, 23, 31), dtype)
    frames[1].reshape(-1)[bad] = np.nan
    good = machine.put(np.full(3, 9, np.uint8))
    kernels.all_finite(on_device(machine, frames), good)
    np.testing.assert_array_equal(machine.get(good), [1, 0, 1])


@pytest.mark.parametrize("stored", ["u1", ">u2", "<i4", ">f8"])
def test_convert_of_large_frames(machine, stored):
    """More pixels than threads; parts of a grid take several rounds."""
    native = np.dtype(stored).newbyteorder("=")
    frames = reference.planted((2, 51, 67), native, 26)
    raw = np.ascontiguousarray(frames.astype(stored)).reshape(-1).view(np.uint8)
    at = np.arange(2, dtype=np.int64) * raw.size // 2
    out = machine.put(np.zeros((2, 51 * 67), native))
    kernels.convert(machine.put(raw), machine.put(at), np.dtype(stored), (None, None), out)
    np.testing.assert_array_equal(machine.get(out).reshape(frames.shape), frames)


@pytest.mark.parametrize("dtype", ["u1", "f8"])
def test_place_chunks_of_large_frames(machine, dtype):
    extent, chunk, begin = (3, 51, 67), (2, 20, 32), (1, 7, 5)
    counts = [-(-(b + n) // c) for n, c, b in zip(extent, chunk, begin, strict=True)]
    whole = reference.planted([n * c for n, c in zip(counts, chunk, strict=True)], dtype, 27)
    tile = whole[tuple(slice(b, b + n) for b, n in zip(begin, extent, strict=True))]
    out = machine.put(np.zeros((3, 51 * 67), dtype))
    geometry = np.array([extent, chunk, counts, begin], np.int64)
    kernels.place_chunks(machine.put(reference.cut_into_chunks(whole, chunk)), machine.put(geometry), out)
    np.testing.assert_array_equal(machine.get(out).reshape(extent), tile)


@pytest.mark.parametrize("dtype", ["u2", "i4", "u8", "f4", "f8"])
def test_patch_of_many_dead_pixels_between_extreme_ones(machine, dtype):
    """More dead pixels than threads; sums that 64 bits, or single precision, can't hold."""
    frames = reference.planted((2, 20, 40), dtype, 28)
    if frames.dtype.kind == "f":
        # one by one in single precision, the small ones would be lost
        frames[:, :, 1::2] = 1.0
        frames[:, :, 1::4] = 2.0**25
    else:
        frames[0] = np.iinfo(dtype).max
        frames[1, :, 1::4] = np.iinfo(dtype).max
        frames[1, :, 3::4] = np.iinfo(dtype).min
    dead = range(0, 800, 2)
    neighbours = {p: [q for q in (p + 1, p + 3, p - 1, p - 3) if 0 <= q < 800] for p in dead}
    offsets = np.cumsum([0, *map(len, neighbours.values())]).astype(np.int32)
    given = on_device(machine, frames)
    kernels.patch_dead(
        given, machine.put(np.array(list(neighbours), np.int32)), machine.put(offsets),
        machine.put(np.concatenate(list(neighbours.values())).astype(np.int32)),
    )  # fmt: skip
    found = machine.get(given.pixels).reshape(frames.shape)
    np.testing.assert_array_equal(found, reference.patch_dead(frames, neighbours))
