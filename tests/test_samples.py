"""Files of real instruments through the whole engine, against independent readers and a naive reference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import reference
from samples import assert_reads_as, entries, sample_data
from standin import installed

import gpuem


@pytest.mark.parametrize("entry", entries("npy", "npy-sim"))
def test_npy_files_read_as_numpy_reads_them(entry):
    ds = gpuem.open(sample_data() / entry["path"])
    assert_reads_as(ds[...], entry)


def test_the_real_crop_gives_the_maps_of_the_reference():
    folder = sample_data() / "real4d"
    ds = gpuem.open(folder / "rotavirus_crop64x64_bin2_128x128_u16.h5")
    assert ds.shape == (64, 64, 128, 128)
    assert json.loads((folder / "rotavirus.json").read_text())
    found = gpuem.run(ds, [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=30, outer=60), gpuem.CenterOfMass()])
    frames = ds[...].reshape(-1, 128, 128)
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(frames))
    ring = reference.annulus((128, 128), (63.5, 63.5), 60, 30)
    assert np.array_equal(found["adf"].data.ravel(), reference.mask_sums(frames, ring))
    shift = reference.com(frames, (63.5, 63.5)).reshape(64, 64, 2)
    assert np.array_equal(found["com/shift_y"].data, shift[..., 0])
    assert np.array_equal(found["com/shift_x"].data, shift[..., 1])


def test_a_corrupt_chunk_in_the_middle_names_its_frames(tmp_path):
    path = tmp_path / "crop.h5"
    path.write_bytes((sample_data() / "real4d" / "rotavirus_crop64x64_bin2_128x128_u16.h5").read_bytes())
    source = gpuem.open(path).source
    chunks = source.pieces[0].layout
    hit = len(chunks.offset) // 2
    with path.open("r+b") as stream:
        stream.seek(int(chunks.offset[hit]) + 12)
        stream.write(b"\xff" * 64)
    ds = gpuem.open(path)
    with pytest.raises(gpuem.DataError, match=r"frames? \d+.*chunk at byte") as error:
        gpuem.run(ds, [gpuem.Sum()])
    lost = error.value.frames
    found = gpuem.run(ds, [gpuem.Sum(), gpuem.CenterOfMass()], on_error="mask")
    valid = found["valid"].data.ravel()
    assert not valid[list(lost)].any()
    assert valid.sum() == 64 * 64 - len(lost)
    assert found.provenance["frames"]["masked"] == len(lost)
    with pytest.raises(gpuem.DataError):
        ds[...]


REAL = [
    "real4d/rotavirus_crop64x64_bin2_128x128_u16.h5",
    "dectris/eiger1_testmode10_2datafiles_4images_bslz4_data_000001.h5",
    "dectris/eiger1_testmode10_2datafiles_4images_lz4_data_000001.h5",
    "dectris/test_master.h5",
    "derived/empad/map4x4.xml",
    "derived/mib_r64/single_9_frames_R64_6bit.mib",
    "mib/Merlin_Single_Quad/Quad_1_Frame_CounterDepth_12_Rows_256.mib",
    "mib/Merlin_Single_Quad/Quad_1_Frame_CounterDepth_1_Rows_256RAW.mib",
    "mib/Merlin_navigation4x2_ROI/001_4x2_6bit.mib",
]


@pytest.mark.parametrize("path", REAL)
def test_the_gpu_s_path_gives_the_cpu_s_bits_on_real_files(path):
    ds = gpuem.open(sample_data() / path)
    chosen = [gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=5, outer=30), gpuem.CenterOfMass()]
    cpu = gpuem.run(ds, chosen, device="cpu")
    with installed("late"):
        found = gpuem.run(ds, chosen, device="cuda"), gpuem.run(ds.to_device(packed=True), chosen)
    for gpu in found:
        assert gpu.provenance["device"] == "cuda"
        for name, item in cpu.maps.items():
            if ds.dtype.kind == "f":
                np.testing.assert_allclose(gpu[name].data, item.data, rtol=1e-12, atol=1e-9, err_msg=name)
            else:
                np.testing.assert_array_equal(gpu[name].data, item.data, err_msg=name)
