"""The whole path, from files to maps, on a GPU; and on the stand-in, so that these tests don't rot without one.

They need nothing but what gpuem itself needs: compressed files are written by `chunk_writer`.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import reference
from chunk_writer import bitshuffle_lz4, lz4, write_hdf5
from merlin_writer import write_mib
from standin import installed
from test_cuda import analyses, binary, check_same, raw, weights

import gpuem
from gpuem import job, recipe


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    with installed("late") if request.param == "stand-in" else nullcontext():
        yield request.param


TYPES = ["u1", "i1", "<u2", ">u2", "i2", "u4", ">i4", "u8", "f2", "f4", ">f8"]


@pytest.mark.parametrize("dtype", TYPES)
def test_raw_files(device, tmp_path, dtype):
    native = np.dtype("f4") if dtype == "f2" else np.dtype(dtype).newbyteorder("=")
    frames = reference.planted((300, 33, 30), native, 1)
    for header, gap in ((0, 0), (6, 4), (5, 2)):
        path = raw(tmp_path / f"{header}.raw", frames, np.dtype(dtype), header=header, gap=gap)
        ds = gpuem.open(path, scan=(15, 20), frame=(33, 30), dtype=dtype, header=header, footer=gap)
        check_same(ds)


def test_many_tiles_go_round_the_ring(device, tmp_path):
    """Several times as much data as the ring holds, every frame another one."""
    count = 3000 if device == "gpu" else 40
    rng = np.random.default_rng(2)
    with (tmp_path / "a.raw").open("wb") as stream:
        for _ in range(count):
            stream.write(rng.integers(0, 65535, 131072 // 2, np.uint16).tobytes())
    ds = gpuem.open(tmp_path / "a.raw", scan=(count,), frame=(256, 256), dtype="u2")
    check_same(ds, [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=30, outer=80), gpuem.CenterOfMass()])


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
def test_merlin(device, tmp_path, bits):
    frames = np.random.default_rng(bits).integers(0, 1 << bits, (12, 8, 512)).astype(np.int64)
    ds = gpuem.open(write_mib(tmp_path / "a.mib", frames, kind="R64", bits=bits, chips=(2, 2)), scan=(3, 4))
    check_same(ds)
    check_same(ds, on=ds.to_device(packed=True))


@pytest.mark.parametrize("encode", [bitshuffle_lz4, lz4])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
@pytest.mark.parametrize("chunk", [(1, 1, 48, 50), (2, 3, 24, 25)])
def test_compressed_chunks(device, tmp_path, encode, dtype, chunk):
    data = reference.planted((4, 6, 48, 50), dtype, 3) % 13
    data[1, 2] = np.random.default_rng(3).integers(0, np.iinfo(dtype).max, (48, 50), dtype)
    write_hdf5(tmp_path / "a.h5", data, chunk, encode)
    ds = gpuem.open(tmp_path / "a.h5")
    np.testing.assert_array_equal(ds[...], data)
    check_same(ds)
    for packed in (False, True):
        check_same(ds, on=ds.to_device(packed=packed))


@pytest.mark.parametrize("encode", [bitshuffle_lz4, lz4])
def test_broken_chunks(device, tmp_path, encode):
    data = reference.planted((4, 6, 48, 50), "u2", 4) % 13
    write_hdf5(tmp_path / "a.h5", data, (1, 1, 48, 50), encode)
    import h5py

    with h5py.File(tmp_path / "a.h5") as file:
        at = file["data"].id.get_chunk_info(9).byte_offset
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[at + 12 : at + 16] = b"\xff" * 4
    (tmp_path / "a.h5").write_bytes(content)
    ds = gpuem.open(tmp_path / "a.h5")
    with pytest.raises(gpuem.DataError, match="frame 9: "):
        gpuem.run(ds, [gpuem.Sum()], device="cuda")
    check_same(ds, on_error="mask")


def test_masks_weights_and_corrections(device, tmp_path):
    frames = reference.planted((70, 32, 40), "u2", 5)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(7, 10), frame=(32, 40), dtype="u2")
    check_same(ds, [*binary((32, 40), 33), *weights((32, 40), 5), gpuem.CenterOfMass()])
    check_same(ds, [gpuem.Sum(), *weights((32, 40), 40)], roi=(1, 6, 2, 9))
    rng = np.random.default_rng(5)
    dark, gain = rng.normal(3, 1, (32, 40)), rng.normal(1, 0.1, (32, 40))
    cpu, gpu = check_same(ds.corrected(dark=dark, gain=gain, dead=[(0, 0), (7, 8), (7, 9)]))
    np.testing.assert_array_equal(cpu["sum/max"].data, gpu["sum/max"].data)


def test_frames_that_can_t_be_summed(device, tmp_path):
    frames = reference.planted((40, 12, 14), "f4", 6)
    frames[7, 3, 3], frames[30, 0, 0] = np.nan, np.inf
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(5, 8), frame=(12, 14), dtype="f4")
    _, gpu = check_same(ds, on_error="mask")
    assert np.flatnonzero(~gpu["valid"].data.ravel()).tolist() == [7, 30]


def test_the_same_floats_twice_give_the_same_bits(device, tmp_path):
    frames = np.random.default_rng(7).normal(size=(200, 32, 40)).astype("f4")
    ds = gpuem.open(raw(tmp_path / "a.raw", frames), scan=(10, 20), frame=(32, 40), dtype="f4")
    chosen = [*analyses(), *weights((32, 40), 9)]
    first, second = (gpuem.run(ds, chosen, device="cuda") for _ in range(2))
    for name, item in first.maps.items():
        np.testing.assert_array_equal(item.data, second[name].data, err_msg=name)


def test_arrays_on_the_gpu_are_used_where_they_are(device):
    import cupy

    data = reference.planted((4, 5, 12, 14), "u2", 8)
    array = cupy.empty(data.shape, data.dtype)
    array.set(data)
    found = gpuem.run(array, [gpuem.Sum()])
    np.testing.assert_array_equal(found["sum/sum"].data, reference.frame_sum(data.reshape(-1, 12, 14)))


def test_the_peak_stays_below_the_plan(device, tmp_path):
    import cupy

    frames = reference.planted((300, 64, 64), ">u2", 9)
    ds = gpuem.open(raw(tmp_path / "a.raw", frames, ">u2"), scan=(300,), frame=(64, 64), dtype=">u2")
    planned = job.prepare(ds, analyses(), recipe.run_section(device="cuda")).plan.device_nbytes
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    gpuem.run(ds, analyses(), device="cuda")
    # what the pool took from the device is the peak; it rounds every buffer up to 512 bytes
    assert pool.total_bytes() - before <= sum(planned.values()) + 64 * 512
