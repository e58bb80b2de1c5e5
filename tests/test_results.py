from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest
import reference
import zarr

import gpuem
from gpuem import plot, result_store

xarray = pytest.importorskip("xarray", reason="xarray is not installed")


@pytest.fixture
def found():
    np.save("data.npy", reference.planted((6, 7, 8, 9), "u2"))
    calibration = {"scan_step": 0.5, "scan_unit": "nm", "detector_step": 2.0, "detector_unit": "mrad"}
    ds = gpuem.open("data.npy", calibration=calibration)
    return gpuem.run(
        ds, [gpuem.Sum(), gpuem.VirtualDetector(name="adf", outer=3), gpuem.CenterOfMass()], roi=(0, 6, 0, 5)
    )


def test_what_is_saved_is_what_is_loaded(found):
    path = found.save("out.zarr")
    again = gpuem.load_results(path)
    assert list(again) == list(found)
    for name in found:
        assert np.array_equal(again[name].data, found[name].data, equal_nan=True)
        assert again[name].data.dtype == found[name].data.dtype
        assert again[name].axes == found[name].axes
        assert (again[name].units, again[name].description) == (found[name].units, found[name].description)
    assert again.provenance == json.loads(json.dumps(found.provenance))
    assert again.provenance["input"]["files"][0]["size"] == os.path.getsize("data.npy")
    assert again["com/field_y"].attributes["rotation_deg"] == 0.0


def test_xarray_and_plain_zarr_open_it(found):
    found.save("out.zarr")
    adf = xarray.open_zarr("out.zarr", group="adf", consolidated=False)["adf"]
    assert adf.dims == ("scan_y", "scan_x")
    assert adf.units == "counts"
    assert adf.scan_y.values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert adf.scan_y.units == "nm"
    assert np.array_equal(adf.values, found["adf"].data, equal_nan=True)
    mean = xarray.open_zarr("out.zarr", group="sum", consolidated=False)["mean"]
    assert mean.dims == ("detector_y", "detector_x")
    assert mean.detector_x.units == "mrad"
    valid = xarray.open_zarr("out.zarr", consolidated=False)["valid"]
    assert valid.dtype == bool
    plain = zarr.open_group("out.zarr", mode="r")
    assert plain["com/x"].metadata.zarr_format == 3
    assert plain["com/x"].metadata.dimension_names == ("scan_y", "scan_x")


def test_existing_results_are_only_replaced_on_request(found):
    found.save("out.zarr")
    with pytest.raises(gpuem.OutputError, match="exists; choose another name, or say --overwrite"):
        found.save("out.zarr")
    found.save("out.zarr", overwrite=True)
    os.mkdir("mine.zarr")
    with open("mine.zarr/precious.txt", "w") as stream:
        stream.write("x")
    with pytest.raises(gpuem.OutputError, match="never overwritten"):
        found.save("mine.zarr", overwrite=True)
    assert os.path.exists("mine.zarr/precious.txt")


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_what_was_there(found, monkeypatch, there, number):
    if there:
        found.save("out.zarr")
    before = sorted(os.listdir())
    written = []

    def fail(root, path, *rest):
        written.append(path)
        if len(written) > 5:
            raise OSError(number, os.strerror(number))
        real(root, path, *rest)

    real = result_store.add
    monkeypatch.setattr(result_store, "add", fail)
    message = "the disk is full" if number == errno.ENOSPC else "Input/output error"
    with pytest.raises(gpuem.OutputError, match=message):
        found.save("out.zarr", overwrite=True)
    assert sorted(os.listdir()) == before
    if there:
        assert list(gpuem.load_results("out.zarr")) == list(found)


def test_no_permission(found):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    os.mkdir("closed", 0o500)
    with pytest.raises(gpuem.OutputError, match="no permission"):
        found.save("closed/out.zarr")


def test_a_file_where_a_folder_is_needed(found):
    with open("file", "w") as stream:
        stream.write("x")
    with pytest.raises(gpuem.OutputError, match="a folder can't be created in it"):
        found.save("file/out.zarr")


def test_alien_folders_are_not_results():
    zarr.open_group("other.zarr", mode="w")
    os.mkdir("list.zarr")
    with open("list.zarr/zarr.json", "w") as stream:
        stream.write("[]")
    for name in ("other.zarr", "nothing.zarr", ".", "list.zarr"):
        with pytest.raises(gpuem.InputError, match="not a gpuem result"):
            gpuem.load_results(name)


def test_a_damaged_result_is_told(found):
    found.save("out.zarr")
    shutil.rmtree("out.zarr/com/x")
    with pytest.raises(gpuem.InputError, match="damaged gpuem result: map 'com/x': com/x/c/0/0: No such file"):
        gpuem.load_results("out.zarr")


def test_names(found):
    with pytest.raises(KeyError, match="there are: sum/sum"):
        found["adx"]
    assert "adf" in found
    assert "com/x" in repr(found)


def test_pictures(found):
    from pathlib import Path

    from matplotlib.image import imread

    paths = plot.save_previews(found, Path("pictures"))
    assert [p.name for p in paths] == ["sum.png", "adf.png", "com.png", "sum.detectors.png"]
    for path in paths:
        assert imread(path).std() > 0.05
    # constant, empty and one-line maps must not break a run at its very end
    flat = gpuem.run(np.zeros((4, 5, 6, 7), "u1"), [gpuem.Sum(), gpuem.VirtualDetector(outer=2)])
    plot.save_previews(flat, Path("pictures"))
    line = gpuem.run(np.ones((40, 6, 7), "u1"), [gpuem.Sum(), gpuem.VirtualDetector(outer=2)])
    assert [p.name for p in plot.save_previews(line, Path("pictures"))] == ["sum.png", "sum.detectors.png"]
    assert sorted(os.listdir("pictures")) == [".gpuem-files.json", "sum.detectors.png", "sum.png"]
