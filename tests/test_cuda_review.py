"""What differs on a real GPU from where the CUDA path was written: alignment, older GPUs, memory that CuPy keeps."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from standin import installed
from test_cuda import check_same, raw, weights

import gpuem
from gpuem.backends import Weights, cuda, cuda_device
from gpuem.backends import cuda_kernels as kernels


@pytest.fixture
def late():
    with installed("late") as simulated:
        yield simulated


@pytest.mark.parametrize("dtype", ["u2", "f4", "u8"])
def test_pixels_of_an_array_may_lie_at_odd_addresses(late, dtype, monkeypatch):
    """A GPU faults on a pixel that doesn't lie at a multiple of its size: no kernel may use such pixels in place."""
    import cupy

    seen = []
    launch = kernels.all_sums

    def watched(frames, *rest):
        seen.append(frames.pixels.data.ptr % frames.pixels.itemsize)
        launch(frames, *rest)

    monkeypatch.setattr(kernels, "all_sums", watched)
    data = reference.planted((6, 8, 15), dtype, 15)
    buffer = cupy.empty(1 + data.nbytes, np.uint8)
    buffer.set(np.concatenate([np.zeros(1, "u1"), data.reshape(-1).view("u1")]))
    array = buffer[1:].view(data.dtype).reshape(data.shape)
    assert array.data.ptr % data.itemsize
    found = gpuem.run(array, [gpuem.Sum()])
    assert found.provenance["device"].startswith("cuda")
    assert seen
    assert not any(seen)
    np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(data))


@pytest.mark.parametrize(("capability", "tensor"), [("75", False), ("80", True), ("90", True), ("120", True)])
def test_turing_has_no_tensor_cores_for_bfloat16(capability, tensor):
    images = tuple(np.full((4, 4), k, np.float32) for k in range(kernels.MANY))
    with installed("late", compute_capability=capability):
        prepared = cuda.prepare(Weights(images=images), (4, 4), np.dtype("u2"))
        assert prepared.tensor_images is tensor
        table = prepared.host_tables[-1]
        assert table.dtype == (np.uint16 if tensor else np.float32)
        assert not cuda.prepare(Weights(images=images[1:]), (4, 4), np.dtype("u2")).tensor_images


def test_many_weights_on_turing(tmp_path):
    frames = reference.planted((9, 8, 16), "u2", 4)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(9,), frame=(8, 16), dtype="u2")
    with installed("late", compute_capability="75") as simulated:
        check_same(ds, weights((8, 16), kernels.MANY))
        assert not any("tensor" in name for name in simulated.launches)


def test_memory_that_cupy_keeps_is_free():
    """CuPy keeps what was freed: without it a second data set in the place of the first would be refused."""
    with installed("late", memory_nbytes=64 << 20):
        import cupy

        before = cuda_device.gpu().free
        array = cupy.empty(40 << 20, np.uint8)
        assert cuda_device.gpu().free == before - (40 << 20)
        del array
        assert cupy.cuda.Device().mem_info[0] == before - (40 << 20)
        assert cuda_device.gpu().free == before


@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "i8", "f4"])
def test_maxima_of_many_blocks_onto_one_another(late, dtype):
    """Blocks raise the same maxima one after the other; what one of them saw before may be out of date."""
    frames = reference.planted((70, 9, 13), dtype, 8)
    frames[37, 4, 5] = 100
    import cupy

    array = cupy.empty(frames.shape, frames.dtype)
    array.set(frames)
    found = gpuem.run(array, [gpuem.Sum()])
    np.testing.assert_array_equal(found["sum/max"].data, frames.max(axis=0))
