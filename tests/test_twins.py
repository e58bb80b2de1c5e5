"""Every kernel exists four times under one name: its source, the function that launches it, a CPU twin, a reference."""

from __future__ import annotations

import inspect
from importlib import import_module

import numpy as np
import pytest
import reference
from merlin_writer import raw_frame

from gpuem.backends import cpu, cuda, cuda_compile, cuda_correlate, cuda_kernels, cuda_lattice, cuda_stitch
from gpuem.codecs import bitshuffle, chunks
from gpuem.formats.source import Step


def test_every_kernel_has_its_twins():
    assert sorted(cuda.KERNELS) == cuda_compile.names() == sorted(cpu.TWINS)
    for name in cuda.KERNELS:
        assert "__global__ void" in cuda_compile.source(name)
        modules = (cuda_kernels, cuda_correlate, cuda_lattice, cuda_stitch)
        assert any(callable(getattr(module, name, None)) for module in modules), name
        assert callable(getattr(reference, name)), f"tests/reference.py has no {name}"
        module, _, function = cpu.TWINS[name].partition(":")
        assert callable(getattr(import_module(f"gpuem.{module}"), function))


def test_both_backends_have_the_same_functions():
    own = {name for name in cpu.__all__ if callable(getattr(cpu, name)) and name[0].islower()}
    assert own == {name for name in cuda.__all__ if callable(getattr(cuda, name)) and name[0].islower()}
    for name in own:
        assert list(inspect.signature(getattr(cpu, name)).parameters) == list(
            inspect.signature(getattr(cuda, name)).parameters
        ), name


def compressed(data, **filters):
    """The one chunk that the filter's own library makes of an array."""
    import h5py

    with h5py.File("one.h5", "w") as file:
        made = file.create_dataset("d", data=data, chunks=data.shape, **filters)
        file.flush()
        return made.id.read_direct_chunk((0,) * data.ndim)[1]


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 101, 3), (3, 64, 64)])
def test_the_reference_decoders_agree_with_the_filters_and_with_the_cpu(tmp_path, dtype, shape):
    import hdf5plugin

    data = reference.planted((1, *shape, 1), dtype, 3).reshape(shape) % 11
    chunk = compressed(data, **hdf5plugin.Bitshuffle())
    assert reference.bitshuffle_lz4(chunk, data.itemsize) == data.tobytes()
    out = np.empty(data.nbytes, np.uint8)
    assert bitshuffle.bitshuffle_lz4(np.frombuffer(chunk, np.uint8), out, data.itemsize) == 0
    assert out.tobytes() == data.tobytes()
    chunk = compressed(data, **hdf5plugin.LZ4(nbytes=1000))
    assert reference.lz4(chunk) == data.tobytes()
    raw = np.frombuffer(chunk, np.uint8)
    assert chunks.decode((Step("lz4"),), 0, raw, data.nbytes).tobytes() == data.tobytes()


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
@pytest.mark.parametrize("chips", [(1, 1), (2, 2), (1, 3)])
def test_the_reference_of_packed_pixels_undoes_the_writer(bits, chips):
    image = np.random.default_rng(bits).integers(0, 1 << bits, (2 * chips[0], 64 * chips[1]))
    stored = raw_frame(image, bits, *chips)
    np.testing.assert_array_equal(reference.merlin(stored, bits, image.shape, chips), image)
