"""Files that files name: they lie in the data set's folder, or the user allows more."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import reference
from test_empad import NEW
from test_empad import write as write_empad
from web_server import Web

import gpuem
from gpuem.errors import InputError
from gpuem.formats.named import Named, RefusedError, find
from gpuem.formats.remote import place

SHAPE = (6, 8, 9)


@pytest.fixture
def data():
    return reference.planted(SHAPE, "u2")


@pytest.fixture
def folders(tmp_path, data):
    """A folder of the data set, and one outside that holds frames as HDF5 and raw."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    with h5py.File(outside / "frames.h5", "w") as file:
        file["data"] = data
        file["deep/data"] = data
    data.tofile(outside / "frames.raw")
    return inside, outside


def link(path, name, target="data"):
    with h5py.File(path, "w") as file:
        file["entry/frames"] = h5py.ExternalLink(name, target)


def soft_link(path, name):
    with h5py.File(path, "w") as file:
        file["hidden"] = h5py.ExternalLink(name, "deep")
        file["entry/frames"] = h5py.SoftLink("/hidden/data")


def dectris(path, name):
    with h5py.File(path, "w") as file:
        file["entry/data/data_000001"] = h5py.ExternalLink(name, "data")


def virtual(path, name):
    layout = h5py.VirtualLayout(SHAPE, "u2")
    layout[:] = h5py.VirtualSource(name, "data", SHAPE)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("frames", layout)


def stitched(path, name):
    """A virtual data set that only HDF5 itself can read."""
    layout = h5py.VirtualLayout(SHAPE, "u2")
    layout[:, :4] = h5py.VirtualSource(name, "data", SHAPE)[:, :4]
    layout[:, 4:] = h5py.VirtualSource(name, "data", SHAPE)[:, 4:]
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("frames", layout)


def external(path, name):
    with h5py.File(path, "w") as file:
        size = int(np.prod(SHAPE)) * 2
        file.create_dataset("frames", SHAPE, "<u2", external=[(name.replace(".h5", ".raw"), 0, size)])


def chained(path, name):
    """A virtual data set of a file in the folder, which is one of a file elsewhere."""
    virtual(path.with_name("between.h5"), name)
    layout = h5py.VirtualLayout(SHAPE, "u2")
    layout[:] = h5py.VirtualSource("between.h5", "frames", SHAPE)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("frames", layout)


KINDS = (link, soft_link, dectris, virtual, stitched, external, chained)


@pytest.mark.parametrize("how", ["absolute", "up", "through a link"])
@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_files_elsewhere_are_refused_by_name_and_read_where_allowed(folders, data, write, how):
    inside, outside = folders
    (inside / "way").symlink_to(outside)
    name = {
        "absolute": f"{outside}/frames.h5",
        "up": "../outside/frames.h5",
        "through a link": "way/../outside/frames.h5",
    }
    write(inside / "a.h5", name[how])
    for options in ({}, {"fit": True}):
        with pytest.raises(InputError, match=r"frames\.(h5|raw)'.*outside the folder of .*follow_links = true"):
            gpuem.open(inside / "a.h5", **options)
    assert np.array_equal(gpuem.open(inside / "a.h5", follow_links=True)[...], data)


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_files_in_the_folder_are_read_however_they_are_named(folders, data, write):
    inside, outside = folders
    for name in ("frames.h5", "frames.raw"):
        (outside / name).rename(inside / name)
    names = ["frames.h5", "./frames.h5", f"{inside}/frames.h5", "../inside/frames.h5"]
    for k, name in enumerate(names):
        write(inside / f"{k}.h5", name)
        assert np.array_equal(gpuem.open(inside / f"{k}.h5")[...], data), name


@pytest.mark.parametrize("write", [link, dectris, virtual, external])
def test_symbolic_links_are_the_users_own(folders, tmp_path, data, write):
    """A data file that is a link to elsewhere, and a master that is one: data beside the link, or beside the file."""
    inside, outside = folders
    for name in ("frames.h5", "frames.raw"):
        (inside / name).symlink_to(outside / name)
    write(inside / "a.h5", "frames.h5")
    assert np.array_equal(gpuem.open(inside / "a.h5")[...], data)
    write(outside / "b.h5", "frames.h5")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/b.h5").symlink_to(outside / "b.h5")
    assert np.array_equal(gpuem.open(tmp_path / "alone/b.h5")[...], data)


def test_the_working_directory_is_no_folder_of_the_data_set(folders, monkeypatch):
    inside, outside = folders
    monkeypatch.chdir(outside)
    virtual(inside / "a.h5", "frames.h5")
    for follow in (False, True):
        with pytest.raises(InputError, match="which is missing"):
            gpuem.open(inside / "a.h5", follow_links=follow)


def test_moved_files_are_found_by_their_names_alone(folders, data):
    inside, outside = folders
    (outside / "frames.h5").rename(inside / "frames.h5")
    virtual(inside / "a.h5", "/nowhere/at/all/frames.h5")
    assert np.array_equal(gpuem.open(inside / "a.h5")[...], data)


def test_numbered_sources_are_checked_too(folders, data):
    inside, outside = folders
    for k in range(2):
        with h5py.File(outside / f"frames{k}.h5", "w") as file:
            file["data"] = data[3 * k : 3 * k + 3]
    layout = h5py.h5s.create_simple((6, 8, 9), (h5py.h5s.UNLIMITED, 8, 9))
    for name in ("../outside/frames%b.h5", str(outside / "frames%b.h5")):
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), (3, 1, 1), (3, 8, 9))
        plist.set_virtual(layout, name.encode(), b"data", h5py.h5s.create_simple((3, 8, 9)))
        layout.select_all()
        with h5py.File(inside / "a.h5", "w", libver="latest") as file:
            h5py.h5d.create(file.id, b"frames", h5py.h5t.STD_U16LE, layout, plist)
        with pytest.raises(InputError, match="outside the folder"):
            gpuem.open(inside / "a.h5")
        assert np.array_equal(gpuem.open(inside / "a.h5", follow_links=True)[...], data)


def test_links_that_nobody_needs_are_told(folders, data):
    inside, outside = folders
    link(inside / "a.h5", f"{outside}/frames.h5")
    with h5py.File(inside / "a.h5", "a") as file:
        file["own"] = data[:3]
    ds = gpuem.open(inside / "a.h5")
    assert ds.shape == (3, 8, 9)
    assert any("outside the folder" in note for note in ds.notes)
    with pytest.raises(InputError, match="outside the folder"):
        gpuem.open(inside / "a.h5", dataset="entry/frames")
    assert gpuem.open(inside / "a.h5", follow_links=True).shape == SHAPE
    assert gpuem.open(inside / "a.h5", dataset="own").notes == ()


def test_calibration_from_elsewhere_is_not_read(folders, data):
    inside, outside = folders
    with h5py.File(outside / "axes.h5", "w") as file:
        file["dim"] = np.arange(6) * 0.5
        file["dim"].attrs["units"] = "nm"
    with h5py.File(inside / "a.emd", "w") as file:
        file["g/data"] = data
        for k, size in enumerate(SHAPE):
            file[f"g/dim{k}"] = np.arange(size) * 0.5
            file[f"g/dim{k}"].attrs["units"] = "nm"
        del file["g/dim0"]
        file["g/dim0"] = h5py.ExternalLink(str(outside / "axes.h5"), "dim")
    assert gpuem.open(inside / "a.emd").scan[0].unit == "px"
    assert gpuem.open(inside / "a.emd", follow_links=True).scan[0].unit == "nm"


def test_empad(folders):
    inside, outside = folders
    frames = write_empad(outside, NEW, 2, 3)
    for name in (f"{outside}/data.raw", "../outside/data.raw", "..\\outside\\data.raw"):
        (inside / "scan.xml").write_text(NEW.format(raw=name, y=2, x=3))
        with pytest.raises(InputError, match=r"data\.raw'.*outside the folder of .*follow_links = true"):
            gpuem.open(inside / "scan.xml")
        assert np.array_equal(gpuem.open(inside / "scan.xml", follow_links=True)[...].reshape(frames.shape), frames)
    # the folder is one of the camera's computer
    (outside / "data.raw").rename(inside / "data.raw")
    for name in (f"{outside}/data.raw", "../outside/data.raw", "D:\\camera\\data.raw"):
        (inside / "scan.xml").write_text(NEW.format(raw=name, y=2, x=3))
        assert gpuem.open(inside / "scan.xml").scan_shape == (2, 3)


def test_recipes_allow_it(folders, data):
    inside, outside = folders
    virtual(inside / "a.h5", f"{outside}/frames.h5")
    text = (
        '[input]\npath = "inside/a.h5"\n{}\n[[analysis]]\nkind = "sum"\n[output]\npath = "out.zarr"\npreviews = false\n'
        '[run]\ndevice = "cpu"\n'
    )
    recipe = Path("r.toml")
    recipe.write_text(text.format(""))
    with pytest.raises(InputError, match="follow_links = true"):
        gpuem.run_recipe(recipe)
    recipe.write_text(text.format("follow_links = true"))
    assert np.array_equal(gpuem.run_recipe(recipe)[0]["sum/sum"].data, data.sum(axis=0))
    # formats that name no files take it, too: a recipe may be for several
    np.save("a.npy", data)
    assert gpuem.open("a.npy", follow_links=True).shape == SHAPE


@pytest.fixture
def web(folders):
    with Web(folders[0].parent) as server:
        import threading

        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["../outside/frames.h5", "/outside/frames.h5", "{url}/outside/frames.h5"])
def test_over_the_network(folders, web, data, name):
    inside, _ = folders
    for k, write in enumerate((link, virtual)):
        write(inside / f"{k}.h5", name.format(url=web.url))
        with pytest.raises(InputError, match="follow_links = true"):
            gpuem.open(f"{web.url}/inside/{k}.h5")
        assert not any("frames" in path for _, path, *_ in web.asked)
        assert np.array_equal(gpuem.open(f"{web.url}/inside/{k}.h5", follow_links=True)[...], data)
        web.asked.clear()


def test_names_that_servers_would_turn_into_others():
    owner = place("https://host:8/data/run/a.h5?signed=yes")
    named = Named(owner)
    assert str(named.locate(owner, "sub/b.h5")) == "https://host:8/data/run/sub/b.h5"
    for name in ("../b.h5", "/b.h5", "//other/b.h5", "https://other/b.h5", "s3://bucket/b.h5", "sub/../../b.h5",
                 "%2e%2e/b.h5", "%252e%252e/b.h5", "..%2fb.h5", "..\\b.h5", "\\b.h5"):  # fmt: skip
        with pytest.raises(RefusedError, match="follow_links"):
            named.locate(owner, name)
    assert str(find(owner, "../b.h5")) == "https://host:8/data/b.h5"
    assert str(find(owner, "../../../../b.h5")) == "https://host:8/b.h5"
    assert str(find(owner, "s3://bucket/b.h5")) == "s3://bucket/b.h5"
