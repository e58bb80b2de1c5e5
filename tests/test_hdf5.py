"""HDF5 files: every layout and filter against h5py, sample files against other readers, and files that are broken."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import pickle
import subprocess
import sys

import h5py
import numpy as np
import pytest
from assemble import assemble, covered
from samples import assert_reads_as, entries, find_samples, sample_data

import gpuem
from gpuem.errors import DataError, GpuemError, InputError, RecipeError, TruncatedError
from gpuem.formats import hdf5
from gpuem.formats.source import Calls, Chunks, Runs, Step

hdf5plugin = pytest.importorskip("hdf5plugin")

READERS = ("h5py+hdf5plugin", "libertem:hdf5")
FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip"},
    "shuffle+gzip": {"compression": "gzip", "shuffle": True},
    "lzf": {"compression": "lzf"},
    "shuffle+lzf+fletcher32": {"compression": "lzf", "shuffle": True, "fletcher32": True},
    "fletcher32": {"fletcher32": True},
    "bitshuffle": hdf5plugin.Bitshuffle(cname="none"),
    "bitshuffle-lz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "bitshuffle-lz4 small blocks": hdf5plugin.Bitshuffle(nelems=64, cname="lz4"),
    "bitshuffle-zstd": hdf5plugin.Bitshuffle(cname="zstd"),
    "lz4": hdf5plugin.LZ4(),
    "lz4 small blocks": hdf5plugin.LZ4(nbytes=100),
    "zstd": hdf5plugin.Zstd(),
    "blosc-lz4": hdf5plugin.Blosc(cname="lz4", shuffle=hdf5plugin.Blosc.SHUFFLE),
    "blosc-zstd-bits": hdf5plugin.Blosc(cname="zstd", shuffle=hdf5plugin.Blosc.BITSHUFFLE),
}
CHUNKS = ((1, 1, 11, 13), (2, 3, 11, 13), (1, 5, 11, 13), (3, 2, 4, 13), (2, 2, 5, 6), (3, 5, 11, 13))
SHAPE = (3, 5, 11, 13)


def counts(dtype="<u2", shape=SHAPE, seed=0):
    """Frames that are none of them alike: counts, negative and fractional where the type allows."""
    rng = np.random.default_rng(seed)
    data = rng.poisson(rng.uniform(0.2, 90, (*shape[:-2], 1, 1)), shape)
    if np.dtype(dtype).kind == "i":
        data = data - 40
    if np.dtype(dtype).kind == "f":
        data = data * 0.37 - 1
    return data.astype(dtype)


def write(path, data, name="data", **options):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=data, **options)
    return path


def read(path, **options):
    return hdf5.read_header((path,), **options)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", ">u4", "<i2", ">i2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("name", FILTERS)
def test_round_trip(tmp_path, name, dtype):
    data = counts(dtype)
    for k, chunks in enumerate(CHUNKS):
        path = write(tmp_path / f"{k}.h5", data, chunks=chunks, **FILTERS[name])
        source = read(path)
        (piece,) = source.pieces
        assert isinstance(piece.layout, Chunks)
        assert piece.stored == np.dtype(dtype)
        assert source.dtype == np.dtype(dtype).newbyteorder("=")
        assert source.dtype.isnative
        assert (source.scan_shape, source.frame_shape, source.frames) == (SHAPE[:2], SHAPE[2:], 15)
        assert piece.layout.shape == chunks
        np.testing.assert_array_equal(assemble(source), data)


@pytest.mark.parametrize("shape", [(7, 11, 13), (2, 3, 5, 4, 3), (1, 1, 257, 129), (13, 1, 1)])
@pytest.mark.parametrize("name", ["none", "bitshuffle-lz4", "shuffle+gzip"])
def test_other_numbers_of_axes(tmp_path, shape, name):
    data = counts(shape=shape)
    chunks = tuple(-(-n // 2) for n in shape)
    source = read(write(tmp_path / "a.h5", data, chunks=chunks, **FILTERS[name]))
    assert source.scan_shape == shape[:-2]
    np.testing.assert_array_equal(assemble(source), data)


@pytest.mark.parametrize("layout", [{}, {"chunks": (4, 5)}, {"chunks": (4, 5), "compression": "gzip"}])
def test_a_single_frame_must_be_named(tmp_path, layout):
    data = counts(shape=(9, 11))
    path = write(tmp_path / "a.h5", data, name="dark", **layout)
    with pytest.raises(InputError, match=r"/dark \(9, 11\) uint16.*must be named"):
        read(path)
    source = read(path, dataset="dark")
    assert source.scan_shape == (1,)
    np.testing.assert_array_equal(assemble(source)[0], data)


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i4", "<f8"])
@pytest.mark.parametrize("userblock", [0, 512])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_contiguous_and_user_block(tmp_path, dtype, userblock, libver):
    data = counts(dtype)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=userblock, libver=libver) as file:
        file["plain"] = data
        file.create_dataset("cut", data=data, chunks=(2, 3, 5, 7))
    for name, kind in (("plain", Runs), ("cut", Chunks)):
        source = read(tmp_path / "a.h5", dataset=name)
        assert isinstance(source.pieces[0].layout, kind)
        np.testing.assert_array_equal(assemble(source), data)


def test_skipped_filters_are_kept_per_chunk(tmp_path):
    data = counts()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dset = file.create_dataset("data", SHAPE, "<u2", chunks=(1, 5, 11, 13), shuffle=True, compression="gzip")
        dset[0] = data[0]
        dset.id.write_direct_chunk((1, 0, 0, 0), data[1].tobytes(), filter_mask=0b11)
        mixed = data[2].reshape(-1).view("u1").reshape(-1, 2).T.tobytes()
        dset.id.write_direct_chunk((2, 0, 0, 0), mixed, filter_mask=0b10)
        np.testing.assert_array_equal(dset[...], data)
    source = read(tmp_path / "a.h5")
    assert source.pieces[0].codec == (Step("deflate"), Step("shuffle", (2,)))
    assert source.pieces[0].layout.skipped.tolist() == [0, 3, 2]
    np.testing.assert_array_equal(assemble(source), data)


def test_unwritten_chunks_have_length_zero_and_are_said(tmp_path):
    data = counts()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dset = file.create_dataset("data", SHAPE, "<u2", chunks=(1, 2, 11, 13), **FILTERS["bitshuffle-lz4"])
        dset[1, 2:4] = data[1, 2:4]
    source = read(tmp_path / "a.h5")
    lengths = source.pieces[0].layout.length
    assert np.flatnonzero(lengths).tolist() == [4]
    assert any("8 of its 9 chunks were never written" in note for note in source.notes)
    found = assemble(source, missing=7)
    np.testing.assert_array_equal(found[1, 2:4], data[1, 2:4])
    assert (np.delete(found.reshape(15, -1), (7, 8), axis=0) == 7).all()


@pytest.mark.parametrize("userblock", [0, 512])
def test_unwritten_contiguous_data_is_no_piece(tmp_path, userblock):
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=userblock) as file:
        file.create_dataset("data", SHAPE, "<u2")
    source = read(tmp_path / "a.h5")
    assert source.pieces == ()
    assert source.frames == 15
    assert "none of its 15 frames was ever written" in source.notes[0]


def test_a_grown_and_shrunk_dataset(tmp_path):
    data = counts()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dset = file.create_dataset("data", (1, 5, 11, 13), "<u2", chunks=(1, 2, 4, 13), maxshape=(None,) * 4)
        dset.resize((9, 9, 12, 14))
        dset[...] = 3
        dset.resize(SHAPE)
        dset[...] = data
    np.testing.assert_array_equal(assemble(read(tmp_path / "a.h5")), data)


def test_compact_data_and_alien_filters_go_through_h5py(tmp_path):
    data = counts(shape=(2, 3, 5, 7))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(data.shape)
        compact = h5py.Dataset(h5py.h5d.create(file.id, b"compact", h5py.h5t.STD_U16LE, space, plist))
        compact[...] = data
        file.create_dataset("offset", data=data, chunks=(1, 2, 5, 7), scaleoffset=0)
        file.create_dataset("blosc2", data=data, chunks=(1, 2, 5, 7), **hdf5plugin.Blosc2())
        file.create_dataset("image", data=data[0, 0], chunks=(2, 7), scaleoffset=0)
    for name, chunk in (("compact", (1, 3)), ("offset", (1, 2)), ("blosc2", (1, 2))):
        source = read(tmp_path / "a.h5", dataset=name)
        layout = source.pieces[0].layout
        assert isinstance(layout, Calls)
        assert (layout.chunk, layout.concurrent) == (chunk, False)
        np.testing.assert_array_equal(assemble(source), data)
        again = pickle.loads(pickle.dumps(layout.read))
        np.testing.assert_array_equal(again(np.s_[1:2, 0:2, 1:4, 2:7]), data[1:2, 0:2, 1:4, 2:7])
    np.testing.assert_array_equal(assemble(read(tmp_path / "a.h5", dataset="image"))[0], data[0, 0])
    assert "scaleoffset" in read(tmp_path / "a.h5", dataset="offset").notes[0]


def test_two_compressors_go_through_h5py(tmp_path):
    data = counts()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((1, 5, 11, 13))
        plist.set_deflate(4)
        plist.set_fletcher32()
        plist.set_deflate(1)
        dset = h5py.h5d.create(file.id, b"twice", h5py.h5t.STD_U16LE, h5py.h5s.create_simple(SHAPE), plist)
        h5py.Dataset(dset)[...] = data
    source = read(tmp_path / "a.h5")
    assert isinstance(source.pieces[0].layout, Calls)
    np.testing.assert_array_equal(assemble(source), data)


def test_a_missing_filter_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.h5", counts(), chunks=(1, 5, 11, 13), **hdf5plugin.Blosc2())
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda number: number != 32026)
    with pytest.raises(InputError, match=r"32026.*pip install hdf5plugin"):
        hdf5.read_tables(path)


def test_damage_behind_h5py_is_a_data_error(tmp_path):
    path = write(tmp_path / "a.h5", counts(), chunks=(1, 5, 11, 13), **hdf5plugin.Blosc2())
    source = read(path)
    with h5py.File(path, "a") as file:
        file["data"].id.write_direct_chunk((0, 0, 0, 0), b"nonsense" * 8)
    with pytest.raises(DataError, match="can't be read"):
        source.pieces[0].layout.read(np.s_[0:1, 0:1, 0:11, 0:13])


# ---------------------------------------------------------------- types


def test_booleans_and_enums_are_integers_and_halves_become_floats(tmp_path):
    data = counts()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["bool"] = data > 9
        file.create_dataset("enum", data=data, dtype=h5py.enum_dtype({"A": 1}, "<u2"))
        file["half"] = counts("<f4").astype("<f2")
    source = read(tmp_path / "a.h5", dataset="bool")
    assert (source.pieces[0].stored, source.dtype) == (np.dtype("u1"), np.dtype("u1"))
    np.testing.assert_array_equal(assemble(source), data > 9)
    np.testing.assert_array_equal(assemble(read(tmp_path / "a.h5", dataset="enum")), data)
    source = read(tmp_path / "a.h5", dataset="half")
    assert (source.pieces[0].stored, source.dtype) == (np.dtype("f2"), np.dtype("f4"))
    np.testing.assert_array_equal(assemble(source), counts("<f4").astype("<f2").astype("f4"))


def test_integers_with_unused_bits_go_through_h5py(tmp_path):
    data = counts()
    with h5py.File(tmp_path / "a.h5", "w") as file:
        kind = h5py.h5t.STD_U16LE.copy()
        kind.set_precision(12)
        kind.set_offset(4)
        dset = h5py.h5d.create(file.id, b"data", kind, h5py.h5s.create_simple(SHAPE))
        h5py.Dataset(dset)[...] = data
    source = read(tmp_path / "a.h5")
    assert isinstance(source.pieces[0].layout, Calls)
    np.testing.assert_array_equal(assemble(source), data)


@pytest.mark.parametrize(
    "data, what",
    [
        (np.zeros(SHAPE, "c8"), "complex"),
        (np.zeros((2, 3, 4), [("r", "u1"), ("g", "u1")]), "compound of r, g"),
        (np.full((2, 3, 4), b"abc"), "string"),
        (np.zeros((2, 3, 4), "f16"), "float128|longdouble"),
    ],
)
def test_what_is_not_a_real_number_is_said(tmp_path, data, what):
    path = write(tmp_path / "a.h5", data)
    with pytest.raises(InputError, match=what):
        read(path)
    with pytest.raises(InputError, match=what):
        read(path, dataset="data")


# ---------------------------------------------------------------- which dataset


def test_the_largest_dataset_with_four_axes_is_taken(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/stack"] = counts(shape=(90, 11, 13))
        file["b/small"] = counts(shape=(1, 2, 3, 4))
        file["b/scan"] = counts()
        file["b/link"] = h5py.SoftLink("/b/scan")
        file["b/same"] = file["b/scan"]
        file["names"] = ["x"] * 9
        file["empty"] = np.zeros((9, 0, 900, 900), "u1")
        file["nothing"] = h5py.Empty("u1")
    source = read(tmp_path / "a.h5")
    assert source.metadata["dataset"] in ("/b/scan", "/b/same")
    np.testing.assert_array_equal(assemble(source), counts())
    np.testing.assert_array_equal(assemble(read(tmp_path / "a.h5", dataset="/b/link")), counts())
    np.testing.assert_array_equal(assemble(read(tmp_path / "a.h5", dataset="a")), counts(shape=(90, 11, 13)))
    names = [entry[0] for entry in hdf5.datasets(tmp_path / "a.h5")]
    assert names[0] == "/a/stack"
    with pytest.raises(InputError, match="no pixels"):
        read(tmp_path / "a.h5", dataset="empty")
    for name in ("names", "nothing"):
        with pytest.raises(RecipeError, match="two axes"):
            read(tmp_path / "a.h5", dataset=name)


def test_ambiguous_and_wrong_names_list_what_is_there(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["scan/frames"] = counts()
        file["scan/copies"] = counts()
    with pytest.raises(RecipeError, match=r'dataset = ".*/scan/copies \(3, 5, 11, 13\), /scan/frames \(3, 5, 11, 13\)'):
        read(tmp_path / "a.h5")
    with pytest.raises(RecipeError, match=r"nearest: /scan/frames"):
        read(tmp_path / "a.h5", dataset="scan/frame")
    with pytest.raises(RecipeError, match="2 HDF5 files"):
        hdf5.read_header((tmp_path / "a.h5", tmp_path / "a.h5"))


# ---------------------------------------------------------------- other files


def test_external_raw_files(tmp_path):
    data = counts()
    data[:2].tofile(tmp_path / "one.raw")
    (tmp_path / "two.raw").write_bytes(b"header!" + data[2].tobytes())
    parts = [("one.raw", 0, data[:2].nbytes), ("two.raw", 7, h5py.h5f.UNLIMITED)]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", SHAPE, "<u2", external=parts)
    source = read(tmp_path / "a.h5")
    assert [piece.frames for piece in source.pieces] == [10, 5]
    assert [file.path.name for file in source.files] == ["a.h5", "one.raw", "two.raw"]
    np.testing.assert_array_equal(assemble(source), data)
    # a file that ends too early, then none
    (tmp_path / "two.raw").write_bytes(b"header!" + data[2].tobytes()[:-1])
    with pytest.raises(TruncatedError, match="holds 4 of the 5 frames") as caught:
        read(tmp_path / "a.h5")
    assert caught.value.whole == 4
    source = read(tmp_path / "a.h5", fit=True)
    assert covered(source).tolist() == [True] * 14 + [False]
    (tmp_path / "two.raw").unlink()
    with pytest.raises(InputError, match=r"two\.raw, which is missing"):
        read(tmp_path / "a.h5")
    source = read(tmp_path / "a.h5", fit=True)
    assert covered(source).sum() == 10
    assert "5 frames" in source.notes[0]


@pytest.mark.parametrize(
    "cuts", [[1001], [2, 4, 288], [26, 290, 300], [1000, 1002, 1004, 2288], [286 * 3, 286 * 5 + 26 * 4]]
)
def test_external_raw_files_that_cut_a_frame(tmp_path, cuts):
    """Frames go on in the next file; only one whose pixel does is put together by a function."""
    data = counts()
    raw = data.tobytes()
    edges = [0, *cuts, len(raw)]
    parts = []
    for k, (first, stop) in enumerate(itertools.pairwise(edges)):
        (tmp_path / f"{k}.raw").write_bytes(b"?" * k + raw[first:stop])
        parts.append((f"{k}.raw", k, stop - first if stop < len(raw) else h5py.h5f.UNLIMITED))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("data", SHAPE, "<u2", external=parts)
    source = read(tmp_path / "a.h5")
    assert len(source.files) == len(parts) + 1
    assert any(isinstance(piece.layout, Calls) for piece in source.pieces) == any(cut % 2 for cut in cuts)
    np.testing.assert_array_equal(assemble(source), data)
    np.testing.assert_array_equal(gpuem.open(tmp_path / "a.h5")[...], data)
    # without one of the files, the frames that it holds a part of can't be had
    frame = data[0, 0].nbytes
    (tmp_path / "1.raw").unlink()
    with pytest.raises(InputError, match=r"1\.raw, which is missing"):
        read(tmp_path / "a.h5")
    expected = np.ones(15, bool)
    expected[edges[1] // frame : -(-edges[2] // frame)] = False
    source = read(tmp_path / "a.h5", fit=True)
    np.testing.assert_array_equal(covered(source), expected)
    np.testing.assert_array_equal(
        assemble(source).reshape(15, *SHAPE[2:])[expected], data.reshape(15, *SHAPE[2:])[expected]
    )


def virtual(tmp_path, data, rows=None):
    """A virtual dataset whose row k lies in part k: contiguous, compressed, or cut from a longer one."""
    layout = h5py.VirtualLayout(data.shape, data.dtype)
    for k in range(data.shape[0]):
        path = tmp_path / f"part{k}.h5"
        if k == 0:
            write(path, data[k])
        elif k == 1:
            write(path, data[k], chunks=(2, 11, 13), **FILTERS["bitshuffle-lz4"])
        else:
            write(path, np.concatenate([data[k], data[k]]), chunks=(5, 4, 13), compression="gzip")
        source = h5py.VirtualSource(path.name, "data", (len(data[k]) * (1 if k < 2 else 2), *data.shape[2:]))
        layout[k] = source[len(data[k]) :] if k > 1 else source
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("data", layout)
    return tmp_path / "all.h5"


def test_virtual_datasets_are_pieces_of_their_sources(tmp_path):
    data = counts()
    path = virtual(tmp_path, data)
    source = read(path)
    assert [(p.start, p.frames, type(p.layout)) for p in source.pieces] == [
        (0, 5, Runs),
        (5, 5, Chunks),
        (10, 5, Chunks),
    ]
    assert [piece.codec for piece in source.pieces][1:] == [(Step("bitshuffle", (2, 0, 2)),), (Step("deflate"),)]
    assert source.scan_shape == (3, 5)
    assert [file.path.name for file in source.files] == ["all.h5", "part0.h5", "part1.h5", "part2.h5"]
    np.testing.assert_array_equal(assemble(source), data)


def test_virtual_dataset_with_a_missing_source(tmp_path):
    data = counts()
    path = virtual(tmp_path, data)
    (tmp_path / "part1.h5").unlink()
    with pytest.raises(InputError, match=r"5 frames from .*part1\.h5, which is missing"):
        read(path)
    source = read(path, fit=True)
    assert covered(source).tolist() == [True] * 5 + [False] * 5 + [True] * 5
    assert "part1.h5" in source.notes[0]
    np.testing.assert_array_equal(assemble(source)[::2], data[::2])


def test_other_virtual_datasets(tmp_path):
    """Ranges are pieces, crops, steps and cut chunks parts of frames; what turns axes round goes through h5py."""
    data = counts(shape=(15, 11, 13))
    write(tmp_path / "plain.h5", data)
    write(tmp_path / "cut.h5", data, chunks=(4, 11, 13))
    plain = h5py.VirtualSource("plain.h5", "data", data.shape)
    cut = h5py.VirtualSource("cut.h5", "data", data.shape)
    cases = {
        "range": ((6, 11, 13), [(np.s_[0:2], plain[3:5]), (np.s_[2:6], plain[7:11])], 2),
        "aligned": ((8, 11, 13), [(np.s_[0:4], cut[8:12]), (np.s_[4:8], cut[4:8])], 2),
        "end": ((3, 11, 13), [(np.s_[0:3], cut[12:15])], 1),
        "partly": ((6, 11, 13), [(np.s_[4:6], plain[3:5])], 1),
        "crop": ((15, 5, 13), [(np.s_[:], plain[:, 2:7])], 1),
        "step": ((5, 11, 13), [(np.s_[:], plain[::3])], 5),
        "turned": ((11, 15, 13), [(np.s_[:, k], plain[k]) for k in range(15)], 0),
        "cut": ((4, 11, 13), [(np.s_[:], cut[3:7])], 1),
    }
    for name, (shape, maps, pieces) in cases.items():
        layout = h5py.VirtualLayout(shape, "<u2")
        for target, origin in maps:
            layout[target] = origin
        with h5py.File(tmp_path / f"{name}.vds.h5", "w") as file:
            file.create_virtual_dataset("data", layout)
        source = read(tmp_path / f"{name}.vds.h5")
        with h5py.File(tmp_path / f"{name}.vds.h5") as file:
            np.testing.assert_array_equal(assemble(source), file["data"][...], err_msg=name)
        if pieces:
            assert len(source.pieces) == pieces, name
            assert not any(isinstance(piece.layout, Calls) for piece in source.pieces), name
        else:
            assert [type(piece.layout) for piece in source.pieces] == [Calls], name
            assert "read through h5py" in source.notes[0]
    assert covered(read(tmp_path / "partly.vds.h5")).tolist() == [False] * 4 + [True] * 2
    assert "4 of its frames are mapped to no file" in read(tmp_path / "partly.vds.h5").notes[0]


def master(tmp_path, data, files=3, nimages=None, **options):
    """A DECTRIS-like master: /entry/data with external links to data files."""
    per = -(-len(data) // files)
    with h5py.File(tmp_path / "x_master.h5", "w") as file:
        for k in range(files):
            part = data[k * per : (k + 1) * per]
            with h5py.File(tmp_path / f"x_data_{k + 1:06d}.h5", "w") as target:
                dset = target.create_dataset("entry/data/data", data=part, chunks=(1, *data.shape[1:]), **options)
                dset.attrs["image_nr_low"] = k * per + 1
            link = h5py.ExternalLink(f"x_data_{k + 1:06d}.h5", "/entry/data/data")
            file[f"entry/data/data_{k + 1:06d}"] = link
        file["entry/instrument/detector/detectorSpecific/nimages"] = 1
        file["entry/instrument/detector/detectorSpecific/ntrigger"] = nimages or len(data)
        file["entry/instrument/detector/detectorSpecific/flatfield"] = np.ones((2, *data.shape[1:]), "f4")
    return tmp_path / "x_master.h5"


@pytest.mark.parametrize("files", [1, 3, 12])
def test_dectris_master(tmp_path, files):
    data = counts("<u4", shape=(12, 11, 13))
    path = master(tmp_path, data, files, **FILTERS["bitshuffle-lz4"])
    source = read(path)
    assert len(source.pieces) == files
    assert source.files[0].path.name == "x_master.h5"
    assert len(source.files) == files + 1
    assert (source.frames, source.scan_shape) == (12, (12,))
    assert source.metadata["ntrigger"] == 12
    np.testing.assert_array_equal(assemble(source), data)
    one = read(path, dataset="entry/data/data_000001")
    np.testing.assert_array_equal(assemble(one), data[: 12 // files])


@pytest.mark.parametrize("lost, gap", [(1, slice(0, 4)), (2, slice(4, 8)), (3, slice(8, 12))])
def test_dectris_master_with_a_broken_link(tmp_path, lost, gap):
    data = counts(shape=(12, 11, 13))
    path = master(tmp_path, data)
    (tmp_path / f"x_data_{lost:06d}.h5").unlink()
    with pytest.raises(InputError, match=rf"x_data_{lost:06d}\.h5, which is missing"):
        read(path)
    if lost != 3:
        with pytest.raises(InputError):
            read(path, fit=False)
    source = read(path, fit=True)
    held = covered(source)
    assert source.frames == 12
    assert held.sum() == 8
    assert not held[gap].any()
    assert any(f"x_data_{lost:06d}.h5" in note for note in source.notes)
    np.testing.assert_array_equal(assemble(source)[held], data[held])


def test_dectris_master_without_any_data_file(tmp_path):
    path = master(tmp_path, counts(shape=(12, 11, 13)))
    for file in tmp_path.glob("x_data_*"):
        file.unlink()
    for fit in (False, True):
        with pytest.raises(InputError, match=r"missing|none of its 3 data files"):
            read(path, fit=fit)


def test_dectris_master_of_an_aborted_acquisition(tmp_path):
    data = counts(shape=(12, 11, 13))
    path = master(tmp_path, data, nimages=16)
    with pytest.raises(TruncatedError, match="12 of the 16 frames"):
        read(path)
    source = read(path, fit=True)
    assert (source.frames, covered(source).sum()) == (16, 12)
    with h5py.File(path, "a") as file:
        file["entry/instrument/detector/detectorSpecific/ntrigger"][...] = 10
    source = read(path)
    assert source.frames == 12
    assert "2 more" in source.notes[0]


def test_links_to_other_files(tmp_path):
    data = counts()
    write(tmp_path / "far.h5", data, name="deep/data", chunks=(1, 2, 11, 13), compression="gzip")
    with h5py.File(tmp_path / "near.nxs", "w") as file:
        file["entry/frames"] = h5py.ExternalLink("far.h5", "/deep/data")
    for name in (None, "entry/frames", "entry"):
        source = read(tmp_path / "near.nxs", dataset=name)
        assert source.files[source.pieces[0].layout.file[0]].path.name == "far.h5"
        np.testing.assert_array_equal(assemble(source), data)
    (tmp_path / "far.h5").unlink()
    with pytest.raises(InputError, match=r"other files.*far\.h5"):
        read(tmp_path / "near.nxs")


# ---------------------------------------------------------------- calibration


def test_hyperspy_axes(tmp_path):
    path = write(tmp_path / "a.hspy", counts(), name="Experiments/x/data")
    with h5py.File(path, "a") as file:
        for k, (scale, offset, units) in enumerate(
            [(2.0, 1.0, "nm"), (3.0, 0.0, "nm"), (0.5, -3.0, "1/nm"), (1, 0, "")]
        ):
            axis = file.create_group(f"Experiments/x/axis-{k}")
            axis.attrs.update({"scale": scale, "offset": offset, "units": units})
    source = read(path)
    assert [(a.name, a.step, a.origin, a.unit) for a in source.scan] == [("scan_y", 2, 1, "nm"), ("scan_x", 3, 0, "nm")]
    assert source.detector == ()
    with h5py.File(path, "a") as file:
        file["Experiments/x/axis-3"].attrs.update({"scale": 0.5, "units": "1/nm"})
    y, x = read(path).detector
    assert (y.step, y.origin, y.unit, x.step) == (pytest.approx(0.05), pytest.approx(-0.3), "1/A", pytest.approx(0.05))


def test_emd_dim_vectors(tmp_path):
    path = write(tmp_path / "a.emd", counts(), name="g/data")
    with h5py.File(path, "a") as file:
        vectors = [np.arange(3) * 0.2, [0, 0.3], np.arange(11) * 0.02 - 0.1, np.arange(13) * 0.02]
        for k, (values, unit) in enumerate(zip(vectors, ["[n_m]", "[n_m]", "A^-1", "A^-1"], strict=True)):
            file[f"g/dim{k}"] = values
            file[f"g/dim{k}"].attrs["units"] = unit
    source = read(path)
    assert [(a.step, a.unit) for a in source.scan] == [(pytest.approx(0.2), "nm"), (pytest.approx(0.3), "nm")]
    assert [(a.step, a.origin, a.unit) for a in source.detector] == [
        (pytest.approx(0.02), pytest.approx(-0.1), "1/A"),
        (pytest.approx(0.02), 0, "1/A"),
    ]
    with h5py.File(path, "a") as file:
        file["g/dim2"][4] += 0.01
    assert read(path).detector == ()


# ---------------------------------------------------------------- broken files


def test_files_that_are_not_hdf5(tmp_path):
    path = write(tmp_path / "a.h5", counts())
    whole = path.read_bytes()
    cases = {"empty": b"", "alien": b"GIF89a" + bytes(5000), "half": whole[: len(whole) // 2], "short": whole[:7]}
    words = {"empty": "0 bytes", "alien": "not an HDF5 file", "half": "cut off.*promises", "short": "7 bytes"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=words[name]):
            read(tmp_path / name)
        with pytest.raises(InputError, match=words[name]):
            hdf5.datasets(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "absent.h5")
    write(tmp_path / "scalar.h5", 3)
    with pytest.raises(InputError, match="no dataset with two axes"):
        read(tmp_path / "scalar.h5")


def test_damaged_headers_raise_nothing_else(tmp_path):
    """Overwritten bytes in HDF5's own tables: a clear error or a description, never another exception."""
    good = np.frombuffer(
        write(tmp_path / "a.h5", counts(), chunks=(1, 5, 11, 13), compression="gzip").read_bytes(), "u1"
    )
    rng = np.random.default_rng(5)
    for _ in range(150):
        bad = good.copy()
        place = rng.integers(min(4000, bad.size), size=3)
        bad[place] = rng.integers(0, 256, 3)
        (tmp_path / "b.h5").write_bytes(bad.tobytes())
        try:
            source = read(tmp_path / "b.h5")
        except GpuemError:
            continue
        for piece in source.pieces:
            layout = piece.layout
            if isinstance(layout, Chunks):
                assert (layout.offset + layout.length <= bad.size).all()
                assert (layout.length >= 0).all()


def test_chunks_beyond_the_end_of_the_file(tmp_path):
    data = counts()
    path = write(tmp_path / "a.h5", data, chunks=(1, 5, 11, 13))
    source = read(path)
    size = int(source.pieces[0].layout.offset[2]) + 100
    whole = path.read_bytes()
    # the address of the end stands in the superblock; a file whose tables agree with its size opens
    cut = bytearray(whole[:size])
    cut[40:48] = size.to_bytes(8, "little")
    path.write_bytes(cut)
    with pytest.raises(InputError, match="1 of 3 chunks lie beyond its end"):
        read(path)
    np.testing.assert_array_equal(assemble(read(path, fit=True))[:2], data[:2])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks files for all readers")
@pytest.mark.parametrize("mode", ["swmr", "locked", "marked"])
def test_a_file_that_is_being_written(tmp_path, mode):
    data = counts(shape=(15, 11, 13))
    code = (
        "import h5py, sys, numpy as np\n"
        "f = h5py.File(sys.argv[1], 'w', libver=sys.argv[4])\n"
        "d = f.create_dataset('data', (15, 11, 13), '<u2', chunks=(1, 11, 13), maxshape=(None, 11, 13))\n"
        "f.swmr_mode = sys.argv[2] == 'swmr'\n"
        "d[...] = np.load(sys.argv[3]); d.flush(); f.flush(); print('ready', flush=True); sys.stdin.read()\n"
    )
    if mode != "swmr":
        code = code.replace("f.swmr_mode = sys.argv[2] == 'swmr'\n", "")
    libver = "earliest" if mode == "locked" else "latest"
    np.save(tmp_path / "data.npy", data)
    command = [sys.executable, "-c", code, str(tmp_path / "a.h5"), mode, str(tmp_path / "data.npy"), libver]
    environment = {k: v for k, v in os.environ.items() if k != "HDF5_USE_FILE_LOCKING"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout.readline() == "ready\n"
        if mode == "marked":
            with pytest.raises(InputError, match="open for writing"):
                read(tmp_path / "a.h5")
        else:
            source = read(tmp_path / "a.h5")
            assert "without a lock" in source.notes[0]
            np.testing.assert_array_equal(assemble(source), data)
        writer.stdin.close()


# ---------------------------------------------------------------- sample files


def hdf5_entries():
    return [e for e in entries("dectris", "ebsd", "emd_ncem", "empad_g2", "nexus", "dm", "py4dstem", "hdf5", "hspy")
            if not e.values[0] or e.values[0]["reader"] in READERS]  # fmt: skip


@pytest.mark.parametrize("entry", hdf5_entries())
def test_sample_files_read_as_other_readers_read_them(entry):
    """The manifest doesn't name the dataset, so it is the one that reads as the entry says; one must."""
    if len(entry["shape"]) < 2:
        pytest.skip("fewer than two axes")
    path = sample_data() / entry["path"]
    expected = np.dtype(entry["dtype"]).newbyteorder("=")
    for name, shape, _ in hdf5.datasets(path):
        if list(shape) != entry["shape"]:
            continue
        array = assemble(read(path, dataset=name)).reshape(shape)
        if hashlib.md5(array.astype(expected).tobytes(), usedforsecurity=False).hexdigest() == entry["array_md5"]:
            assert array.dtype == expected
            assert_reads_as(array, entry)
            return
    pytest.fail(f"no dataset of {path} reads as the manifest says")


def test_a_real_dectris_master():
    source = read(sample_data() / "dectris" / "test_master.h5")
    assert (source.frames, source.frame_shape, source.dtype) == (5, (13, 11), np.dtype("u2"))
    other = read(sample_data() / "dectris" / "test_data_000001.h5")
    np.testing.assert_array_equal(assemble(source), assemble(other))


def test_real_calibrations():
    y, x = read(sample_data() / "derived/rsciio/crop.hspy").detector
    assert (y.unit, y.step, y.origin, x.origin) == ("mrad", 0.0161, -0.87, -1.03)
    source = read(sample_data() / "py4dstem/py4DSTEM_size2x3x4x5.h5")
    assert [(a.unit, a.step) for a in source.scan] == [("nm", 0.126796875)] * 2
    assert {a.unit for a in source.detector} == {"1/A"}


def test_velox_files_are_refused():
    with pytest.raises(InputError, match="Velox"):
        read(sample_data() / "velox" / "STEM HAADF Diffraction Micro.emd")


def test_every_sample_file_is_read_or_refused_clearly():
    """No file of any kind makes anything but a GpuemError."""
    if find_samples() is None:
        pytest.skip("no sample data: set GPUEM_SAMPLE_DATA")
    seen = 0
    for path in sorted(p for p in sample_data().rglob("*") if p.is_file() and p.stat().st_size < 5e6):
        try:
            source = read(path)
        except GpuemError as error:
            told = str(error)
        else:
            told = str(path)
            seen += 1
            assert source.frames == math.prod(source.scan_shape)
        assert str(path) in told
    assert seen > 10
