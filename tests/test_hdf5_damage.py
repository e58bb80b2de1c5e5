"""HDF5 files that HDF5 itself does not survive: cut off, in a circle, with damaged tables."""

from __future__ import annotations

import subprocess
import sys

import fuzz_hdf5
import h5py
import numpy as np
import pytest

import gpuem
from gpuem.errors import InputError
from gpuem.formats import helper
from gpuem.formats.hdf5_check import check_superblock, checksum

SHAPE = (6, 8, 9)


@pytest.fixture
def data():
    return np.random.default_rng(3).integers(0, 900, SHAPE, dtype=np.uint16)


def growing(path, data, libver="latest", **options):
    with h5py.File(path, "w", libver=libver, **options) as file:
        file.create_dataset("data", data=data, chunks=(1, 8, 9), maxshape=(None, 8, 9))
    return path.read_bytes()


# ---------------------------------------------------------------- the superblock


@pytest.mark.parametrize("userblock", [0, 512, 4096])
@pytest.mark.parametrize(("libver", "version"), [("earliest", 0), ("v108", 2), ("v110", 3), ("latest", 3)])
def test_the_superblock_says_where_the_file_ends(tmp_path, data, libver, version, userblock):
    path = tmp_path / "a.h5"
    whole = growing(path, data, libver, userblock_size=userblock)
    block = check_superblock(path)
    assert (block.at, block.version, block.end) == (userblock, version, len(whole))
    assert not block.swmr
    # who puts a block before it moves all of it
    path.write_bytes(bytes(max(512, userblock)) + whole)
    assert check_superblock(path).end == len(whole) + max(512, userblock)
    assert np.array_equal(gpuem.open(path)[...], data)


def test_version_1_has_four_bytes_more(tmp_path):
    path = tmp_path / "a.h5"
    addresses = np.array([0, 2**64 - 1, 500, 2**64 - 1], "<u8").tobytes()
    for version, more in ((0, b""), (1, bytes([32, 0, 0, 0]))):
        head = b"\x89HDF\r\n\x1a\n" + bytes([version, 0, 0, 0, 0, 8, 8, 0, 4, 0, 16, 0, 0, 0, 0, 0]) + more
        path.write_bytes((head + addresses).ljust(500, b"\0"))
        assert (check_superblock(path).version, check_superblock(path).end) == (version, 500)
        path.write_bytes((head + addresses).ljust(499, b"\0"))
        with pytest.raises(InputError, match="it has 499 bytes, its header promises 500"):
            check_superblock(path)


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_cut_files_are_refused_with_their_sizes(tmp_path, data, libver, fit):
    path = tmp_path / "a.h5"
    whole = growing(path, data, libver)
    for part in range(1, 32):
        size = len(whole) * part // 32
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"cut off: it has {size} bytes, its header promises {len(whole)}"):
            gpuem.open(path, fit=fit)


def test_what_a_superblock_may_not_say(tmp_path, data):
    path = tmp_path / "a.h5"
    for libver in ("earliest", "latest"):
        whole = growing(path, data, libver)
        for at, value, words in (
            (8, 9, "version 9 is unknown"),
            (13 if libver == "earliest" else 9, 3, "addresses of 3 bytes"),
            (16, 255, "checksum" if libver == "latest" else None),
        ):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            if words is not None:
                with pytest.raises(InputError, match=f"superblock at byte 0 is damaged: .*{words}"):
                    gpuem.open(path)
        for size in (8, 12, 20, 40):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"cut off within its header|is unknown|are known"):
                gpuem.open(path)


def test_the_checksum_is_that_of_hdf5():
    assert checksum(b"") == 0xDEADBEEF
    assert checksum(b"Four score and seven years ago") == 0x17770551


def test_a_file_that_a_killed_writer_left_and_that_is_cut(tmp_path, monkeypatch):
    """Its superblock is of the time when writing began: it can't say that anything is missing."""
    code = (
        "import h5py, os, signal, sys\n"
        "file = h5py.File(sys.argv[1], 'w', libver='latest')\n"
        "data = file.create_dataset('data', (0, 16, 16), '<u2', chunks=(1, 16, 16), maxshape=(None, 16, 16))\n"
        "file.swmr_mode = True\n"
        "for k in range(200):\n"
        "    data.resize(k + 1, axis=0); data[k] = k; data.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "a.h5"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert check_superblock(path).swmr
    assert gpuem.open(path).shape == (200, 16, 16)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 4)
    monkeypatch.setattr(helper, "NAP_SECONDS", 1)
    with pytest.raises(InputError, match="waits for tables that don't come"):
        gpuem.open(path)


# ---------------------------------------------------------------- circles


def virtual(path, *sources):
    layout = h5py.VirtualLayout((3 * len(sources), 8, 9), "u2")
    for k, (name, dset) in enumerate(sources):
        layout[3 * k : 3 * k + 3] = h5py.VirtualSource(name, dset, SHAPE)[:3]
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("frames", layout)


@pytest.mark.parametrize("name", ["a.h5", ".", "./a.h5", "other.h5"])
def test_a_virtual_data_set_that_takes_frames_from_itself(tmp_path, data, name):
    (tmp_path / "other.h5").symlink_to("a.h5")
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["data"] = data
    virtual(tmp_path / "a.h5", ("plain.h5", "data"), (name, "frames"))
    for options in ({}, {"fit": True}, {"dataset": "frames"}, {"follow_links": True}):
        with pytest.raises(InputError, match=r"takes frames from itself: .*frames -> .*frames"):
            gpuem.open(tmp_path / "a.h5", **options)


def test_circles_over_several_files_links_and_numbered_names(tmp_path, data):
    for k in range(5):
        virtual(tmp_path / f"{k}.h5", (f"{(k + 1) % 5}.h5", "frames"))
    with pytest.raises(InputError, match=r"itself: .*0\.h5.*4\.h5.*0\.h5"):
        gpuem.open(tmp_path / "0.h5")
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file["entry/data/data_000001"] = h5py.ExternalLink("3.h5", "frames")
    with pytest.raises(InputError, match=r"takes frames from itself"):
        gpuem.open(tmp_path / "master.h5", fit=True)
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["way"] = h5py.SoftLink("/frames")
    virtual(tmp_path / "soft.h5", ("soft.h5", "way"))
    with pytest.raises(InputError, match=r"takes frames from itself"):
        gpuem.open(tmp_path / "soft.h5")
    space = h5py.h5s.create_simple((6, 8, 9), (h5py.h5s.UNLIMITED, 8, 9))
    space.select_hyperslab((0, 0, 0), (h5py.h5s.UNLIMITED, 1, 1), (3, 1, 1), (3, 8, 9))
    for number, (name, dset) in enumerate([("n%b.h5", b"frames"), ("n1.h5", b"fr%bames")]):
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_virtual(space, name.encode(), dset, h5py.h5s.create_simple((3, 8, 9)))
        with h5py.File(tmp_path / f"n{number}.h5", "w", libver="latest") as file:
            h5py.h5d.create(file.id, dset.replace(b"%b", b"0"), h5py.h5t.STD_U16LE, space, plist)
        with pytest.raises(InputError, match=r"takes frames from itself"):
            gpuem.open(tmp_path / f"n{number}.h5", dataset=dset.decode().replace("%b", "0"))


def test_one_source_may_be_mapped_often(tmp_path, data):
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["data"] = data
    virtual(tmp_path / "b.h5", ("plain.h5", "data"), ("plain.h5", "data"))
    virtual(tmp_path / "a.h5", ("b.h5", "frames"), ("plain.h5", "data"), ("b.h5", "frames"))
    assert np.array_equal(gpuem.open(tmp_path / "a.h5")[...], np.concatenate([data[:3]] * 3))


def test_links_in_a_circle(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = h5py.SoftLink("/y")
        file["y"] = h5py.SoftLink("/x")
        file["far"] = h5py.ExternalLink("a.h5", "/far")
        file["up/again"] = file["/"]
    with pytest.raises(InputError, match=r"frames lie in other files|no dataset"):
        gpuem.open(tmp_path / "a.h5")
    with pytest.raises(gpuem.RecipeError, match="no dataset 'far'"):
        gpuem.open(tmp_path / "a.h5", dataset="far")


# ---------------------------------------------------------------- other things in their places


def test_groups_where_data_sets_are_expected(tmp_path, data):
    path = tmp_path / "x_master.h5"
    detector = "entry/instrument/detector/detectorSpecific"
    with h5py.File(path, "w") as file:
        file["entry/data/data_000001"] = data
        file.create_group(f"{detector}/nimages")
        file[f"{detector}/ntrigger"] = "six"
    assert np.array_equal(gpuem.open(path)[...], data)
    with h5py.File(path, "a") as file:
        file.create_group("entry/data/data_000002")
    with pytest.raises(InputError, match="data_000002 is a group"):
        gpuem.open(path)
    for name in ("entry/data/data_000001/x/y", "/", ".", "", "entry/data"):
        with pytest.raises((InputError, gpuem.RecipeError)):
            gpuem.open(path, dataset=name)
    with h5py.File(tmp_path / "a.emd", "w") as file:
        file["g/data"] = data
        file.create_group("g/dim0")
        for k in (1, 2):
            file[f"g/dim{k}"] = ["a", "b"]
    assert np.array_equal(gpuem.open(tmp_path / "a.emd")[...], data)


def test_a_number_that_maps_itself_is_not_read(tmp_path, data):
    layout = h5py.VirtualLayout((1,), "u2")
    layout[:] = h5py.VirtualSource(".", "entry/instrument/detector/detectorSpecific/nimages", (1,))
    with h5py.File(tmp_path / "x_master.h5", "w") as file:
        file["entry/data/data_000001"] = data
        file.create_virtual_dataset("entry/instrument/detector/detectorSpecific/nimages", layout)
    assert np.array_equal(gpuem.open(tmp_path / "x_master.h5")[...], data)


def test_data_files_of_a_master_that_are_no_hdf5(tmp_path, data):
    with h5py.File(tmp_path / "x_master.h5", "w") as file:
        for k in range(2):
            file[f"entry/data/data_{k + 1:06d}"] = h5py.ExternalLink(f"x_data_{k + 1}.h5", "entry/data/data")
    whole = growing(tmp_path / "x_data_1.h5", data)
    with h5py.File(tmp_path / "x_data_1.h5", "w") as file:
        file["entry/data/data"] = data
    half = whole[: len(whole) // 2]
    for content, why in ((b"", "0 bytes"), (b"text", "not an HDF5"), (half, "cut off: it has"), (whole, "")):
        (tmp_path / "x_data_2.h5").write_bytes(content)
        with pytest.raises(InputError, match=f"data_000002 lies in .*, which is damaged or without the dataset.*{why}"):
            gpuem.open(tmp_path / "x_master.h5")
        assert np.array_equal(gpuem.open(tmp_path / "x_master.h5", fit=True)[:6], data)


# ---------------------------------------------------------------- many


def surviving(count, seed, folder):
    seen = fuzz_hdf5.fuzz(count, seed, folder)
    assert sum(seen.values()) == count
    assert seen["read"] > count // 8
    assert [outcome for outcome in seen if outcome.startswith(("UNEXPECTED", "SIGNAL", "HANGS"))] == []


def test_damaged_files_end_in_errors_of_gpuem(tmp_path):
    surviving(250, 11, tmp_path)


@pytest.mark.slow
def test_many_more_damaged_files_end_in_errors_of_gpuem(tmp_path):
    surviving(1500, 12, tmp_path)


def test_a_filter_of_elements_without_a_size(tmp_path):
    from gpuem.codecs import chunks
    from gpuem.errors import DataError
    from gpuem.formats.source import Step

    with pytest.raises(DataError, match="elements of 0 bytes"):
        chunks.decode((Step("shuffle", (0,)),), 0, np.zeros(8, np.uint8), 8)
