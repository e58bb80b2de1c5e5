"""Chunked, packed and pieced sources through the whole engine: any chunk shape, any filter, any region."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from merlin_writer import write_mib

import gpuem
from gpuem import tiles

hdf5plugin = pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
FILTERS = {
    "none": {},
    "gzip": {"compression": "gzip", "shuffle": True},
    "bslz4": hdf5plugin.Bitshuffle(cname="lz4"),
    "zstd": hdf5plugin.Zstd(),
}
# planted pixels are noise about 0, which com doesn't take for counts, but where it is as LiberTEM's
COM = gpuem.CenterOfMass(compatible="libertem")
CHOSEN = [gpuem.Sum(), gpuem.VirtualDetector(name="all", shape="disk", outer=99), COM]


def assert_maps(found, data, valid):
    frames = data[valid]
    center = data.shape[-2] // 2, data.shape[-1] // 2
    assert np.array_equal(found["valid"].data, valid)
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(frames))
    assert np.array_equal(found["sum/max"].data, reference.frame_max(frames))
    assert np.array_equal(found["all"].data[valid], reference.mask_sums(frames, np.ones(data.shape[-2:], bool)))
    shift = reference.com(frames, center)
    assert np.array_equal(found["com/shift_y"].data[valid], shift[:, 0])
    assert np.array_equal(found["com/shift_x"].data[valid], shift[:, 1])
    assert np.isnan(found["all"].data[~valid]).all()


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(5, 7, 6, 9), (11, 4, 10), (3, 2, 5, 8, 8)]),
    cut=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    name=st.sampled_from(sorted(FILTERS)),
    dtype=st.sampled_from(["<u2", ">u2", "u1", "<f4", ">i4"]),
    tile=st.integers(1, 8),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_chunks_of_any_shape_give_the_maps_of_the_reference(
    tmp_path_factory, shape, cut, name, dtype, tile, threads, seed
):
    data = reference.planted(shape, dtype[-2:], seed).astype(dtype)
    chunk = tuple(min(c, n) for c, n in zip(cut, shape, strict=False))
    path = tmp_path_factory.mktemp("h5") / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=data, chunks=chunk, **FILTERS[name])
    region = np.random.default_rng(seed).random(shape[:-2]) > 0.4
    region.flat[0] = True
    with pytest.MonkeyPatch.context() as patch:
        nbytes = int(np.prod(shape[-2:])) * np.dtype(dtype).itemsize
        patch.setattr(tiles, "TILE_NBYTES", tile * nbytes)
        patch.setattr(tiles, "SHARD_NBYTES", 3 * tile * nbytes)
        ds = gpuem.open(path)
        assert np.array_equal(ds[...], data)
        assert_maps(gpuem.run(ds, CHOSEN, threads=threads), data, np.ones(shape[:-2], bool))
        assert_maps(gpuem.run(ds, CHOSEN, threads=threads, roi=region), data, region)


@pytest.mark.parametrize("chunk", [(1, 1, 8, 9), (2, 3, 8, 9), (1, 2, 3, 9), (6, 1, 5, 5)])
def test_chunks_that_were_never_written_are_masked_and_counted(chunk):
    data = reference.planted((6, 7, 8, 9), "u2")
    with h5py.File("a.h5", "w") as file:
        dataset = file.create_dataset("data", data.shape, "u2", chunks=chunk, **FILTERS["bslz4"])
        dataset[:, :4] = data[:, :4]
    valid = np.zeros((6, 7), bool)
    # frames of a chunk of which only a part was written hold what HDF5 fills in
    written = -(-4 // chunk[1]) * chunk[1]
    valid[:, :written] = True
    data[:, 4:] = 0
    found = gpuem.run(gpuem.open("a.h5"), CHOSEN)
    assert_maps(found, data, valid)
    assert found.provenance["frames"]["masked"] == (~valid).sum()
    assert "never written" in found.provenance["lost"][0]["reason"]


def test_a_chunk_cut_off_by_the_end_of_the_file_names_its_frames():
    data = np.random.default_rng(0).integers(0, 999, (9, 32, 32)).astype("u2")
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("data", data=data, chunks=(1, 32, 32), **FILTERS["gzip"])
    ds = gpuem.open("a.h5")
    last = int(np.argmax(ds.source.pieces[0].layout.offset))
    with open("a.h5", "r+b") as stream:
        stream.seek(int(ds.source.pieces[0].layout.offset[last]))
        stream.write(b"\0" * 20)
    ds = gpuem.open("a.h5")
    with pytest.raises(gpuem.DataError, match=f"frame {last}: .*chunk at byte"):
        gpuem.run(ds, CHOSEN)
    found = gpuem.run(ds, CHOSEN, on_error="mask")
    assert_maps(found, data, np.arange(9) != last)


@pytest.mark.parametrize("bits", [1, 6, 12, 24])
@pytest.mark.parametrize("chips", [(1, 1), (2, 2)])
def test_packed_merlin_frames_through_the_engine(tmp_path, bits, chips):
    shape = 256 * chips[0], 256 * chips[1]
    dtype = {1: "u1", 6: "u1", 12: "u2", 24: "u4"}[bits]
    data = np.random.default_rng(bits).integers(0, 2**bits, (5, *shape)).astype(dtype)
    data[1, 3, 7] = 2**bits - 1
    write_mib(tmp_path / "a.mib", data, kind="R64", bits=bits, chips=chips)
    ds = gpuem.open(tmp_path / "a.mib")
    assert np.array_equal(ds[...], data)
    chosen = [gpuem.Sum(), gpuem.VirtualDetector(name="all", shape="disk", outer=999), COM]
    assert_maps(gpuem.run(ds, chosen, threads=2), data, np.ones(5, bool))
    assert_maps(gpuem.run(ds, chosen, roi=(1, 4)), data, np.array([False, True, True, True, False]))
