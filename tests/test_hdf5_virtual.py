"""Virtual HDF5 datasets: modules, interleaved frames, numbered files. What is missing is said, never a fill value."""

from __future__ import annotations

import os
import pickle

import h5py
import numpy as np
import pytest
from assemble import assemble, covered
from standin import installed

import gpuem
from gpuem import tiles
from gpuem.errors import InputError, TruncatedError
from gpuem.formats import hdf5
from gpuem.formats.source import Calls, Chunks, Runs, Stitched, layouts

hdf5plugin = pytest.importorskip("hdf5plugin")

SHAPE = (4, 6, 16, 20)
CORNERS = ((0, 0), (0, 10), (8, 0), (8, 10))
ENDLESS = h5py.h5s.UNLIMITED


def counts(shape=SHAPE, dtype="<u2", seed=0):
    return np.random.default_rng(seed).integers(1, 90, shape).astype(dtype)


def source(path, data, name="data", **options):
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=data, **options)
    return h5py.VirtualSource(path.name, name, data.shape)


def write(path, layout, fill=None):
    with h5py.File(path, "w", libver="latest") as file:
        file.create_virtual_dataset("data", layout, fillvalue=fill)
    return path


def h5py_reads(path):
    with h5py.File(path) as file:
        return file["data"][...]


STORED = (
    {},
    {"chunks": (2, 4, 8, 10), **hdf5plugin.Bitshuffle()},
    {"chunks": (1, 1, 5, 4), "compression": "gzip", "shuffle": True},
    {"chunks": (3, 6, 8, 10)},
)


def tiled(folder, data, stored=STORED, gap=0, dtype=None):
    """Four modules with a gap between them, each stored in its own way, as every frame's quarters."""
    y, x = data.shape[-2] // 2, data.shape[-1] // 2
    layout = h5py.VirtualLayout((*data.shape[:-2], 2 * y + gap, 2 * x + gap), dtype or data.dtype)
    for k, options in enumerate(stored):
        top, left = k // 2 * y, k % 2 * x
        part = data[..., top : top + y, left : left + x]
        at = (k // 2 * (y + gap), k % 2 * (x + gap))
        layout[..., at[0] : at[0] + y, at[1] : at[1] + x] = source(folder / f"m{k}.h5", part, **options)
    return write(folder / "all.h5", layout, 7)


def run(ds, **options):
    chosen = [gpuem.Sum(), gpuem.CenterOfMass(), gpuem.VirtualDetector(name="v", inner=2, outer=7)]
    return gpuem.run(ds, chosen, **options)


def by_extents(ds):
    return not any(isinstance(layout, Calls) for piece in ds.source.pieces for layout in layouts(piece))


@pytest.mark.parametrize("gap", [0, 3])
def test_modules_are_parts_of_frames(tmp_path, gap):
    data = counts()
    path = tiled(tmp_path, data, gap=gap)
    ds = gpuem.open(path)
    (piece,) = ds.source.pieces
    assert isinstance(piece.layout, Stitched)
    assert {type(layout) for layout in layouts(piece)} == {Runs, Chunks}
    assert [file.path.name for file in ds.source.files] == ["all.h5", "m0.h5", "m1.h5", "m2.h5", "m3.h5"]
    expected = h5py_reads(path)
    np.testing.assert_array_equal(assemble(ds.source), expected)
    np.testing.assert_array_equal(ds[...], expected)
    np.testing.assert_array_equal(ds[1:3, 2, 3:9, 4:15], expected[1:3, 2, 3:9, 4:15])
    np.testing.assert_array_equal(run(ds)["sum/sum"].data, expected.sum((0, 1), dtype=np.int64))
    said = [note for note in ds.notes if "mapped to no file in any frame" in note or "fill value, 7" in note]
    assert bool(said) == bool(gap)
    if gap:
        assert str(ds.frame_shape[0] * ds.frame_shape[1] - 16 * 20) in said[0]
    assert pickle.loads(pickle.dumps(ds.source)).frames == 24


@pytest.mark.parametrize("schedule", ["late", "early"])
def test_modules_on_the_gpu_give_the_bits_of_the_cpu(tmp_path, schedule, monkeypatch):
    """Several tiles and shards, big-endian and chunked modules, a gap, frames without a chunk, and a correction."""
    from gpuem.backends import cuda_load, cuda_plan

    monkeypatch.setattr(cuda_plan, "SIZES", tiles.Sizes(runs_tile=4096, tile=4096, shard=16384))
    monkeypatch.setattr("gpuem.tiles.LEAST_FRAMES", 1)
    data = counts()
    packed = {"chunks": (2, 4, 8, 10), **hdf5plugin.Bitshuffle()}
    path = tiled(tmp_path, data, ({}, packed, {"chunks": (1, 1, 5, 4)}, {}), gap=2)
    source(tmp_path / "m0.h5", data[..., :8, :10].astype(">u2"))
    with h5py.File(tmp_path / "m3.h5", "w") as file:
        dset = file.create_dataset("data", (4, 6, 8, 10), "<u2", chunks=(1, 2, 8, 10), **hdf5plugin.LZ4())
        dset[:, :4] = data[:, :4, 8:, 10:]
    ds = gpuem.open(path)
    assert all(cuda_load.on_device(ds.source, piece) for piece in ds.source.pieces)
    frame = ds.frame_shape
    dark = np.random.default_rng(1).random(frame).astype("f4")
    for some in (ds, ds.corrected(dark=dark, dead=[(3, 4), (9, 11)])):
        cpu = run(some, device="cpu", on_error="mask")
        assert cpu["valid"].data.reshape(4, 6).tolist() == [[True] * 4 + [False] * 2] * 4
        with installed(schedule):
            found = [run(some, device="cuda", on_error="mask")]
            if schedule == "late":
                found += [run(some.to_device(packed=packed), on_error="mask") for packed in (False, True)]
        for gpu in found:
            for name, item in cpu.maps.items():
                if some is ds:
                    np.testing.assert_array_equal(gpu[name].data, item.data, err_msg=name)
                else:
                    np.testing.assert_allclose(gpu[name].data, item.data, rtol=2e-6, err_msg=name)


def test_a_region_of_interest_and_a_sample_read_only_their_frames(tmp_path):
    from gpuem import look

    data = counts()
    ds = gpuem.open(tiled(tmp_path, data, gap=1))
    expected = h5py_reads(tmp_path / "all.h5")
    wanted = np.zeros(24, bool)
    wanted[[3, 9, 10, 22]] = True
    sample = look.sample(ds, wanted)
    np.testing.assert_array_equal(sample.frames, expected.reshape(24, *ds.frame_shape)[wanted])
    found = run(ds, roi=(1, 3, 2, 5))["sum/sum"].data
    np.testing.assert_array_equal(found, expected[1:3, 2:5].sum((0, 1), dtype=np.int64))


@pytest.mark.parametrize("what", ["gone", "renamed", "short", "damaged"])
@pytest.mark.parametrize("module", [0, 3])
def test_a_module_that_is_missing_is_an_error_or_its_frames_are_masked(tmp_path, what, module):
    data = counts().reshape(24, 16, 20)
    stored = ({}, {"chunks": (5, 8, 10)}, {"chunks": (1, 8, 10)}, {"chunks": (4, 5, 6)})
    path = tiled(tmp_path, data, stored)
    victim = tmp_path / f"m{module}.h5"
    left = 0
    if what == "gone":
        victim.unlink()
    elif what == "renamed":
        source(victim, data[:, :8, :10], "images")
    elif what == "damaged":
        victim.write_bytes(b"nonsense" * 99)
    else:
        y, x = CORNERS[module]
        source(victim, data[:19, y : y + 8, x : x + 10])
        left = 19
    with pytest.raises((InputError, TruncatedError), match=victim.name):
        gpuem.open(path)
    ds = gpuem.open(path, fit=True)
    assert any(victim.name in note for note in ds.notes)
    np.testing.assert_array_equal(covered(ds.source), np.arange(24) < left)
    if left:
        found = run(ds)
        assert found["valid"].data.sum() == left
        np.testing.assert_array_equal(found["com/counts"].data[:left], data[:left].sum((1, 2)))
        assert np.isnan(found["com/counts"].data[left:]).all()


def interleaved(folder, data, **options):
    layout = h5py.VirtualLayout(data.shape, data.dtype)
    for k in range(3):
        layout[k::3] = source(folder / f"e{k}.h5", data[k::3], **options)
    return write(folder / "all.h5", layout)


@pytest.mark.parametrize("chunks", [None, (1, 16, 20), (1, 5, 7), (2, 16, 20)])
def test_interleaved_frames(tmp_path, chunks):
    data = counts((300, 16, 20))
    path = interleaved(tmp_path, data, chunks=chunks)
    ds = gpuem.open(path)
    # chunks of several frames can't be in order
    assert by_extents(ds) == (chunks is None or chunks[0] == 1)
    np.testing.assert_array_equal(assemble(ds.source), data)
    np.testing.assert_array_equal(run(ds)["com/counts"].data, data.sum((1, 2)))
    (tmp_path / "e1.h5").unlink()
    with pytest.raises(InputError, match=r"takes 100 frames from .*e1\.h5, which is missing"):
        gpuem.open(path)
    found = run(gpuem.open(path, fit=True))
    assert (found["valid"].data == (np.arange(300) % 3 != 1)).all()
    assert (found["com/counts"].data == data.sum((1, 2)))[found["valid"].data].all()


def numbered(path, names, block, shape, dtype="<u2", dataset="data"):
    """A virtual dataset of numbered files or datasets, each a block along the first axis; `names` by corner (y, x)."""
    file_space = h5py.h5s.create_simple(shape, (ENDLESS, *shape[1:]))
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    for (y, x), name in names.items():
        size = (block, shape[1] - y if len(names) < 2 else shape[1] // 2, shape[2] if len(names) < 3 else shape[2] // 2)
        file_space.select_hyperslab((0, y, x), (ENDLESS, 1, 1), (block, 1, 1), size)
        plist.set_virtual(file_space, name.encode(), dataset.encode(), h5py.h5s.create_simple(size))
    with h5py.File(path, "w", libver="latest") as file:
        made = h5py.h5s.create_simple(shape, (ENDLESS, *shape[1:]))
        h5py.h5d.create(file.id, b"data", h5py.h5t.py_create(np.dtype(dtype)), made, dcpl=plist)
    return path


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_numbered_files(tmp_path, lost):
    data = counts((24, 16, 20))
    for k in range(4):
        source(tmp_path / f"c{k}.h5", data[6 * k : 6 * k + 6])
    path = numbered(tmp_path / "all.h5", {(0, 0): "c%b.h5"}, 6, (24, 16, 20))
    ds = gpuem.open(path)
    assert len(ds.source.files) == 5
    assert by_extents(ds)
    np.testing.assert_array_equal(ds[...], data)
    # HDF5 itself ends the dataset where the first file is missing
    (tmp_path / f"c{lost}.h5").rename(tmp_path / "elsewhere.h5")
    assert h5py_reads(path).shape[0] == 6 * lost
    with pytest.raises(InputError, match=rf"c{lost}\.h5, which is missing"):
        gpuem.open(path)
    ds = gpuem.open(path, fit=True)
    assert ds.scan_shape == (24,)
    held = np.arange(24) // 6 != lost
    np.testing.assert_array_equal(covered(ds.source), held)
    np.testing.assert_array_equal(assemble(ds.source)[held], data[held])


def test_numbered_files_of_modules_that_grow(tmp_path):
    """More files than when the master was written belong to it; a module that ends early masks the frames behind."""
    data = counts((18, 16, 20))
    names = {(y, x): f"m{y}{x}_%b.h5" for y, x in CORNERS}
    path = numbered(tmp_path / "all.h5", names, 6, (6, 16, 20))
    for y, x in CORNERS:
        for k in range(3):
            source(tmp_path / f"m{y}{x}_{k}.h5", data[6 * k : 6 * k + 6, y : y + 8, x : x + 10])
    ds = gpuem.open(path)
    assert ds.shape == data.shape
    np.testing.assert_array_equal(ds[...], data)
    (tmp_path / "m80_2.h5").unlink()
    with pytest.raises(InputError, match=r"m80_2\.h5"):
        gpuem.open(path)
    assert covered(gpuem.open(path, fit=True).source).tolist() == [True] * 12 + [False] * 6


def test_datasets_with_numbers_in_their_names(tmp_path):
    data = counts((12, 16, 20))
    with h5py.File(tmp_path / "100%.h5", "w") as file:
        for k in range(3):
            file[f"part{k}"] = data[4 * k : 4 * k + 4]
    path = numbered(tmp_path / "all.h5", {(0, 0): "100%%.h5"}, 4, (12, 16, 20), dataset="part%b")
    ds = gpuem.open(path)
    np.testing.assert_array_equal(ds[...], data)
    with h5py.File(tmp_path / "100%.h5", "a") as file:
        file.move("part1", "other")
    with pytest.raises(InputError, match=r"has no dataset part1"):
        gpuem.open(path)


@pytest.mark.parametrize("frames", [24, 30, 20])
def test_unlimited_modules(tmp_path, frames):
    data = counts((30, 16, 20))
    layout = h5py.VirtualLayout((24, 16, 20), "<u2", maxshape=(None, 16, 20))
    for k, x in enumerate((0, 10)):
        own = data[: frames if k else max(frames, 24), :, x : x + 10]
        source(tmp_path / f"u{k}.h5", own, chunks=(1, 16, 10), maxshape=(None, 16, 10))
        origin = h5py.VirtualSource(f"u{k}.h5", "data", (24, 16, 10), maxshape=(None, 16, 10))
        layout[:ENDLESS, :, x : x + 10] = origin[:ENDLESS]
    path = write(tmp_path / "all.h5", layout)
    if frames < 24:
        with pytest.raises(TruncatedError, match=r"u1\.h5.*holds 20 of the 24 frames"):
            gpuem.open(path)
    ds = gpuem.open(path, fit=True)
    assert len(ds.scan_shape) == 1
    assert ds.source.frames == max(frames, 24)
    np.testing.assert_array_equal(covered(ds.source), np.arange(ds.source.frames) < frames)
    np.testing.assert_array_equal(assemble(ds.source)[:frames], data[:frames])


def test_frames_that_are_mapped_only_in_part_are_left_out(tmp_path):
    data = counts((10, 16, 20))
    layout = h5py.VirtualLayout((14, 16, 20), "<u2")
    layout[:10, :8] = source(tmp_path / "a.h5", data[:, :8])
    layout[:7, 8:] = source(tmp_path / "b.h5", data[:7, 8:])
    ds = gpuem.open(write(tmp_path / "all.h5", layout))
    assert covered(ds.source).tolist() == [True] * 7 + [False] * 7
    assert any("3 of its frames are mapped to files only in part" in note for note in ds.notes)
    assert any("4 of its frames are mapped to no file" in note for note in ds.notes)
    np.testing.assert_array_equal(assemble(ds.source)[:7], data[:7])


def test_frames_of_chunks_that_were_never_written_are_missing(tmp_path):
    """In a module, and behind a filter that only HDF5 undoes."""
    data = counts((12, 16, 20))
    path = tiled(tmp_path, data, ({}, {}, {}, {}))
    for options in ({"compression": "gzip"}, {"scaleoffset": 0}):
        with h5py.File(tmp_path / "m2.h5", "w") as file:
            dset = file.create_dataset("data", (12, 8, 10), "<u2", chunks=(4, 8, 5), fillvalue=3, **options)
            dset[:4], dset[8:, :, :5] = data[:4, 8:, :10], 1
        for opened in (path, tmp_path / "m2.h5"):
            ds = gpuem.open(opened)
            found = run(ds, on_error="mask")
            assert found["valid"].data.tolist() == [True] * 4 + [False] * 8
            expected = data if opened == path else data[:, 8:, :10]
            np.testing.assert_array_equal(found["com/counts"].data[:4], expected[:4].sum((1, 2)))


def odd(folder, kind, data):
    """Virtual datasets that byte extents don't describe."""
    layout = h5py.VirtualLayout(data.shape, "<u2")
    if kind == "type":
        layout[:6], layout[6:] = source(folder / "a.h5", data[:6].astype("<i4")), source(folder / "b.h5", data[6:])
    elif kind == "turned":
        turned = h5py.VirtualLayout((16, 12, 20), "<u2")
        for k in range(12):
            turned[:, k] = source(folder / f"{'b' if k == 5 else k}.h5", data[k])
        layout = turned
    elif kind == "columns":
        layout[:, :, ::2] = source(folder / "a.h5", data[:, :, ::2])
        layout[:, :, 1::2] = source(folder / "b.h5", data[:, :, 1::2])
    elif kind == "twice":
        layout[:6], layout[4:] = source(folder / "a.h5", data[:6]), source(folder / "b.h5", data[4:])
    elif kind == "flat":
        layout[:6] = source(folder / "a.h5", data[:6])
        layout[6:] = source(folder / "b.h5", data[6:].reshape(-1, 20))
    return write(folder / "all.h5", layout)


@pytest.mark.parametrize("kind", ["type", "turned", "columns", "twice", "flat"])
def test_what_only_hdf5_can_follow_is_read_through_it_with_all_files_known(tmp_path, kind):
    data = counts((12, 16, 20))
    path = odd(tmp_path, kind, data)
    ds = gpuem.open(path)
    expected = h5py_reads(path)
    assert not by_extents(ds)
    assert any("read through h5py" in note for note in ds.notes)
    assert {"all.h5", "b.h5"} <= {file.path.name for file in ds.source.files}
    np.testing.assert_array_equal(assemble(ds.source), expected)
    np.testing.assert_array_equal(run(ds)["com/counts"].data, expected.sum((1, 2)))
    # a source that goes after it was opened
    kept = (tmp_path / "b.h5").read_bytes()
    (tmp_path / "b.h5").unlink()
    for action in (lambda: run(ds), lambda: ds[3], lambda: ds.source.pieces[0].layout.read(np.s_[0:1, 0:16, 0:20])):
        with pytest.raises(InputError, match=r"b\.h5"):
            action()
    with pytest.raises(InputError, match=r"b\.h5, which is missing"):
        gpuem.open(path)
    masked = gpuem.open(path, fit=True)
    held = covered(masked.source)
    assert held.sum() == {"type": 6, "turned": 0, "columns": 0, "twice": 4, "flat": 6}[kind]
    np.testing.assert_array_equal(assemble(masked.source)[held], expected[held])
    (tmp_path / "b.h5").write_bytes(kept)
    np.testing.assert_array_equal(assemble(gpuem.open(path).source), expected)


def test_a_module_that_changes_is_noticed_by_a_run_and_by_resume(tmp_path):
    data = counts()
    path = tiled(tmp_path, data)
    ds = gpuem.open(path)
    stop = tmp_path / "run"
    run(ds, folder=stop)
    with h5py.File(tmp_path / "m1.h5", "a") as file:
        file["data"][0, 0] = 1
    os.utime(tmp_path / "m1.h5", ns=(1, 1))
    with pytest.raises(InputError, match=r"m1\.h5.*changed"):
        run(ds)
    with pytest.raises(gpuem.GpuemError, match=r"m1\.h5"):
        run(gpuem.open(path), folder=stop, resume=True)


def test_virtual_datasets_of_virtual_datasets(tmp_path):
    data = counts((12, 16, 20))
    for k in range(2):
        folder = tmp_path / f"part{k}"
        folder.mkdir()
        tiled(folder, data[6 * k : 6 * k + 6], ({}, {"chunks": (1, 8, 10)}, {}, {"chunks": (6, 3, 4)}), gap=1)
    layout = h5py.VirtualLayout((12, 15, 19), "<u2")
    for k in range(2):
        # a part of frames that are put together themselves
        layout[6 * k : 6 * k + 6] = h5py.VirtualSource(f"part{k}/all.h5", "data", (6, 17, 21))[:, 1:16, 2:21]
    path = write(tmp_path / "top.h5", layout, 7)
    ds = gpuem.open(path)
    assert by_extents(ds)
    assert len(ds.source.files) == 11
    np.testing.assert_array_equal(ds[...], h5py_reads(path))
    np.testing.assert_array_equal(assemble(ds.source), h5py_reads(path))
    (tmp_path / "part1" / "m2.h5").unlink()
    with pytest.raises(InputError, match=r"part1.*m2\.h5, which is missing"):
        gpuem.open(path)
    assert covered(gpuem.open(path, fit=True).source).tolist() == [True] * 6 + [False] * 6


def test_a_virtual_dataset_of_itself_is_refused(tmp_path):
    layout = h5py.VirtualLayout((4, 5, 6), "<u2")
    layout[...] = h5py.VirtualSource("b.h5", "data", (4, 5, 6))
    write(tmp_path / "a.h5", layout)
    layout = h5py.VirtualLayout((4, 5, 6), "<u2")
    layout[...] = h5py.VirtualSource("a.h5", "data", (4, 5, 6))
    write(tmp_path / "b.h5", layout)
    for fit in (False, True):
        with pytest.raises(InputError, match="takes frames from itself"):
            hdf5.read_header((tmp_path / "a.h5",), fit=fit)


def test_sources_in_the_file_itself_and_where_hdf5_looks_for_them(tmp_path, monkeypatch):
    data = counts((6, 16, 20))
    layout = h5py.VirtualLayout(data.shape, "<u2")
    layout[:3] = h5py.VirtualSource(".", "own", (3, 16, 20))
    layout[3:] = h5py.VirtualSource("/nowhere/b.h5", "data", (3, 16, 20))
    with h5py.File(tmp_path / "all.h5", "w", libver="latest") as file:
        file["own"] = data[:3]
        file.create_virtual_dataset("data", layout)
    source(tmp_path / "b.h5", data[3:])
    ds = gpuem.open(tmp_path / "all.h5", dataset="data")
    np.testing.assert_array_equal(ds[...], data)
    # a folder that the environment names comes before the master's own
    source(tmp_path / "other" / "b.h5", data[3:] + 1)
    monkeypatch.setenv("HDF5_VDS_PREFIX", str(tmp_path / "other"))
    np.testing.assert_array_equal(gpuem.open(tmp_path / "all.h5", dataset="data")[3:], data[3:] + 1)


def test_a_file_of_the_same_name_in_the_working_directory_is_another_one(tmp_path, monkeypatch):
    data = counts((6, 16, 20))
    folder = tmp_path / "scan"
    folder.mkdir()
    layout = h5py.VirtualLayout(data.shape, "<u2")
    layout[:3], layout[3:] = source(folder / "a.h5", data[:3]), source(folder / "b.h5", data[3:])
    path = write(folder / "all.h5", layout)
    monkeypatch.chdir(tmp_path)
    (folder / "b.h5").rename(tmp_path / "b.h5")
    with pytest.raises(InputError, match=r"scan/b\.h5, which is missing"):
        gpuem.open(path)
    # a name as seen from the working directory leads to a file that lies with the data
    layout[3:] = h5py.VirtualSource("scan/b.h5", "data", (3, 16, 20))
    path = write(folder / "all.h5", layout)
    (tmp_path / "b.h5").rename(folder / "b.h5")
    np.testing.assert_array_equal(gpuem.open(path)[...], data)


def test_many_files_of_modules_are_few_pieces(tmp_path):
    """Files that end at other frames in every module, with chunks across these ends."""
    data = counts((40, 16, 20))
    layout = h5py.VirtualLayout(data.shape, "<u2")
    for k, per in enumerate((7, 11)):
        for first in range(0, 40, per):
            part = data[first : first + per, :, 10 * k : 10 * k + 10]
            origin = source(tmp_path / f"{k}_{first}.h5", part, chunks=(3, 16, 10)[:1] + part.shape[1:])
            layout[first : first + per, :, 10 * k : 10 * k + 10] = origin
    ds = gpuem.open(write(tmp_path / "all.h5", layout))
    assert by_extents(ds)
    np.testing.assert_array_equal(ds[...], data)
    np.testing.assert_array_equal(run(ds)["com/counts"].data, data.sum((1, 2)))
