"""HDF5 layouts at random: what gpuem reads, and which frames it says are missing, against what h5py reads."""

from __future__ import annotations

import itertools

import h5py
import numpy as np
import pytest
from assemble import assemble, covered

import gpuem
from gpuem.errors import InputError
from gpuem.formats import hdf5
from gpuem.formats.source import Calls, Chunks, layouts
from gpuem.formats.stitch import written

VERSIONS = ("earliest", "v108", "v110", "v112", "latest")
FEW, MANY = range(40), range(40, 700)
FILL = 7


def chunked(path, rng):
    """A dataset with any chunks and any axes that may grow, resized and written in part, and the numbers in it."""
    shape = tuple(int(n) for n in rng.integers(1, 6, rng.integers(3, 6)))
    limits = [n + int(rng.integers(0, 4)) for n in shape]
    endless = rng.random(len(shape)) < 0.35
    if rng.random() < 0.5:
        endless = np.arange(len(shape)) == rng.integers(len(shape))
    limits = tuple(None if free else n for n, free in zip(limits, endless, strict=True))
    first = tuple(int(rng.integers(1, n + 1)) for n in shape)
    # h5py makes no chunks that hang over where an axis can't grow
    most = [n if limit else n + 3 for n, limit in zip(first, limits, strict=True)]
    chunks = tuple(int(rng.integers(1, n + 1)) for n in most)
    filters = {"shuffle": rng.random() < 0.3, "fletcher32": rng.random() < 0.2}
    filters |= {"compression": "gzip"} if rng.random() < 0.4 else {}
    if rng.random() < 0.1:
        filters |= {"scaleoffset": 0, "fletcher32": False}
    dtype = str(rng.choice(["u1", "<u2", ">u2", "<i4"] if "scaleoffset" in filters else ["u1", ">u2", "<i4", ">f4"]))
    # frames that are all alike can be taken for each other
    data = rng.integers(8, 100, shape).astype(dtype) if rng.random() < 0.9 else np.full(shape, 9, dtype)
    block = int(rng.choice([0, 0, 512]))
    with h5py.File(path, "w", libver=str(rng.choice(VERSIONS)), userblock_size=block) as file:
        dset = file.create_dataset("d", first, dtype, chunks=chunks, maxshape=limits, fillvalue=FILL, **filters)
        if rng.random() < 0.5:
            dset[...] = 1
        if rng.random() < 0.3:
            dset.resize(tuple(m or n + 3 for n, m in zip(shape, limits, strict=True)))
            dset[...] = 2
        dset.resize(shape)
        whole = rng.random() < 0.6
        for _ in range(1 if whole else rng.integers(0, 4)):
            low = [0 if whole else int(rng.integers(0, n)) for n in shape]
            high = [n if whole else int(rng.integers(a + 1, n + 1)) for a, n in zip(low, shape, strict=True)]
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            dset[box] = data[box]
    return chunks


def written_frames(path, chunks):
    """What h5py reads, and which frames have all their chunks: every one is asked for by itself."""
    with h5py.File(path) as file:
        dset = file["d"]
        there = np.ones(dset.shape, bool)
        for corner in itertools.product(*(range(0, n, c) for n, c in zip(dset.shape, chunks, strict=True))):
            try:
                dset.id.read_direct_chunk(corner)
            except (OSError, RuntimeError):
                there[tuple(slice(a, a + c) for a, c in zip(corner, chunks, strict=True))] = False
        return dset[...], there.all(axis=(-2, -1)).reshape(-1)


def check_chunked(folder, seed):
    path = folder / f"{seed}.h5"
    chunks = chunked(path, np.random.default_rng(seed))
    expected, there = written_frames(path, chunks)
    source = hdf5.read_header((path,), dataset="d")
    frames = (source.frames, *source.frame_shape)
    held = np.zeros(source.frames, bool)
    for piece in source.pieces:
        found = written(piece, source.frame_shape)
        held[piece.start : piece.start + piece.frames] = True if found is None else found
    np.testing.assert_array_equal(held, there, err_msg=f"seed {seed}")
    got = assemble(source).reshape(frames)
    np.testing.assert_array_equal(got[there], expected.reshape(frames)[there], err_msg=f"seed {seed}")


def test_chunked_datasets_at_random(tmp_path):
    for seed in FEW:
        check_chunked(tmp_path, seed)


@pytest.mark.slow
def test_many_chunked_datasets_at_random(tmp_path):
    for seed in MANY:
        check_chunked(tmp_path, seed)
        (tmp_path / f"{seed}.h5").unlink()


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("version", VERSIONS)
def test_one_axis_that_may_grow(tmp_path, version, axis):
    """HDF5 reports chunks of the newer kinds of file in another order, unless it is the first axis."""
    data = np.arange(1, 4 * 3 * 8 * 8 + 1, dtype="u4").reshape(4, 3, 8, 8)
    limits = tuple(None if k == axis else n + 1 for k, n in enumerate(data.shape))
    for k, part in enumerate((np.s_[:], np.s_[:1], np.s_[:, 1:], np.s_[2:, :1])):
        path = tmp_path / f"{k}.h5"
        with h5py.File(path, "w", libver=version) as file:
            dset = file.create_dataset("d", data.shape, "u4", chunks=(1, 1, 8, 3), maxshape=limits)
            dset[part] = data[part]
        expected = np.zeros_like(data)
        expected[part] = data[part]
        np.testing.assert_array_equal(assemble(hdf5.read_header((path,))), expected)


@pytest.mark.parametrize("version", ["earliest", "latest"])
def test_chunks_that_overlap_in_the_file_are_not_believed(tmp_path, version):
    data = np.arange(6 * 8 * 8, dtype="u4").reshape(6, 8, 8)
    path = tmp_path / "a.h5"
    with h5py.File(path, "w", libver=version) as file:
        file.create_dataset("d", data=data, chunks=(1, 8, 8))
    (piece,) = hdf5.read_header((path,)).pieces
    assert isinstance(piece.layout, Chunks)
    first, second = (int(n).to_bytes(8, "little") for n in piece.layout.offset[:2])
    raw = path.read_bytes()
    assert raw.count(second) == 1
    path.write_bytes(raw.replace(second, first))
    # where HDF5 keeps a checksum of its tables it finds that itself
    with pytest.raises(InputError, match=r"overlap in the file|damaged"):
        hdf5.read_header((path,))


# ---------------------------------------------------------------- virtual datasets


def module(folder, name, data, rng):
    options = {}
    if rng.random() < 0.7:
        options["chunks"] = tuple(int(rng.integers(1, n + 1)) for n in data.shape)
        if rng.random() < 0.5:
            options["chunks"] = (1,) * (data.ndim - 2) + data.shape[-2:]
        options |= {"compression": "gzip"} if rng.random() < 0.5 else {}
    with h5py.File(folder / name, "w", libver=str(rng.choice(VERSIONS))) as file:
        file.create_dataset("data", data=data, **options)
    return h5py.VirtualSource(name, "data", data.shape)


def virtual(folder, rng):
    """A virtual dataset of modules, each in one file or several, in order or not; the names of the files."""
    nav = tuple(int(n) for n in rng.integers(1, 7, rng.integers(1, 3)))
    ys, xs = ([0, *np.cumsum(rng.integers(1, 5, rng.integers(1, 3))).tolist()] for _ in range(2))
    frame = (ys[-1] + int(rng.random() < 0.2), xs[-1])
    dtype = str(rng.choice(["<u2", ">u2", "u1", "<f4"]))
    data = rng.integers(FILL + 1, 90, (*nav, *frame)).astype(dtype)
    layout = h5py.VirtualLayout(data.shape, "<u4" if dtype[1] == "u" and rng.random() < 0.3 else dtype)
    kind = str(rng.choice(["whole", "ranges", "interleaved", "cropped", "shuffled"]))
    files = 0
    for a, b in itertools.product(range(len(ys) - 1), range(len(xs) - 1)):
        box = (slice(ys[a], ys[a + 1]), slice(xs[b], xs[b + 1]))
        own = data[..., *box]
        step = int(rng.integers(1, nav[0] + 1))
        if kind == "whole":
            parts = [(np.s_[:], own, np.s_[:])]
        elif kind == "ranges":
            parts = [(np.s_[k : k + step], own[k : k + step], np.s_[:]) for k in range(0, nav[0], step)]
        elif kind == "interleaved":
            parts = [(np.s_[k::step], own[k::step], np.s_[:]) for k in range(step)]
        elif kind == "cropped":
            around = [(2, 1)] + [(0, 0)] * (len(nav) - 1) + [(1, 2), (2, 1)]
            inside = (slice(2, -1), ..., slice(1, -2), slice(2, -1))
            parts = [(np.s_[:], np.pad(own, around, constant_values=99), inside)]
        else:
            parts = []
            flat = own.reshape(-1, *own.shape[-2:])
            origin = module(folder, f"{files}.h5", flat, rng)
            files += 1
            for k, other in enumerate(rng.permutation(len(flat)).tolist()):
                index = np.unravel_index(k, nav)
                layout[*index, *box] = origin[other]
        for target, stored, inside in parts:
            origin = module(folder, f"{files}.h5", np.ascontiguousarray(stored), rng)
            files += 1
            layout[target, ..., *box] = origin[inside] if inside != np.s_[:] else origin
    with h5py.File(folder / "all.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("data", layout, fillvalue=FILL)
    return [f"{k}.h5" for k in range(files)]


def check_virtual(folder, seed):
    rng = np.random.default_rng(seed)
    folder.mkdir()
    names = virtual(folder, rng)
    with h5py.File(folder / "all.h5") as file:
        expected = file["data"][...]
    source = gpuem.open(folder / "all.h5").source
    assert {file.path.name for file in source.files} == {"all.h5", *names}
    assert covered(source).all(), f"seed {seed}"
    assert not any(isinstance(layout, Calls) for piece in source.pieces for layout in layouts(piece)), f"seed {seed}"
    np.testing.assert_array_equal(assemble(source), expected, err_msg=f"seed {seed}")
    ds = gpuem.open(folder / "all.h5")
    np.testing.assert_array_equal(ds[...], expected, err_msg=f"seed {seed}")
    # without one of its files no frame is what h5py makes of it, unless it has nothing in that file
    (folder / str(rng.choice(names))).unlink()
    with pytest.raises(InputError, match="missing"):
        gpuem.open(folder / "all.h5")
    source = gpuem.open(folder / "all.h5", fit=True).source
    held = covered(source)
    with h5py.File(folder / "all.h5") as file:
        filled = file["data"][...].reshape(-1, *source.frame_shape)
    frames = expected.reshape(filled.shape)
    np.testing.assert_array_equal(held, (filled == frames).all(axis=(1, 2)), err_msg=f"seed {seed}")
    np.testing.assert_array_equal(assemble(source).reshape(filled.shape)[held], frames[held], err_msg=f"seed {seed}")


def test_virtual_datasets_at_random(tmp_path):
    for seed in range(30):
        check_virtual(tmp_path / str(seed), seed)


@pytest.mark.slow
def test_many_virtual_datasets_at_random(tmp_path):
    for seed in range(30, 180):
        check_virtual(tmp_path / str(seed), seed)
