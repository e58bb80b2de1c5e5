"""The sample that analyses look at: evenly spread, cheap to read, always the same; and what becomes of who looked."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import reference
from chunk_writer import bitshuffle_lz4, write_hdf5
from standin import installed
from test_cuda import raw

import gpuem
from gpuem import dataset, job, look, recipe, tiles
from gpuem.analyses import Map
from gpuem.analyses.model import Model
from gpuem.backends import Weights, cpu


def everywhere(ds):
    return np.ones(ds.positions, bool)


def check(ds, data, wanted=None):
    """The sample of a data set whose scan positions hold `data` (positions, y, x)."""
    wanted = everywhere(ds) if wanted is None else wanted
    found = look.sample(ds, wanted)
    assert found.positions.dtype == np.int64
    assert np.unique(found.positions).size == found.positions.size == len(found.frames) > 0
    assert wanted[found.positions].all()
    assert found.frames.dtype == ds.dtype
    np.testing.assert_array_equal(found.frames, data[found.positions])
    again = look.sample(ds, wanted)
    np.testing.assert_array_equal(again.positions, found.positions)
    return found


def evenly(positions, positions_of_scan, shape, most):
    """No hole in either direction of the scan is much larger than it has to be."""
    for at, n in zip(np.unravel_index(positions, shape), shape, strict=True):
        holes = np.diff(np.concatenate([[-1], np.unique(at), [n]]))
        assert holes.max() <= most, holes


@pytest.mark.parametrize("scan", [(1,), (37,), (512,), (513,), (5000,), (64, 64), (70, 90), (2, 3, 500)])
def test_any_scan(scan):
    data = reference.planted((*scan, 3, 4), "u2", 1)
    found = check(dataset.of_array(data), data.reshape(-1, 3, 4))
    assert found.positions.size == min(512, np.prod(scan))
    assert (np.diff(found.positions) > 0).all()
    evenly(found.positions, np.prod(scan), scan, 1 + 2 * max(1, np.prod(scan) // 512))


def test_columns_of_a_scan_are_all_seen():
    data = np.zeros((256, 256, 1, 2), "u1")
    found = look.sample(dataset.of_array(data), np.ones(65536, bool))
    y, x = np.unravel_index(found.positions, (256, 256))
    assert np.unique(x).size > 100
    assert np.histogram2d(y, x, 8, [(0, 256)] * 2)[0].min() >= 4


def test_single_pattern_and_few_large_frames(monkeypatch):
    data = reference.planted((1, 30, 40), "f4")
    check(dataset.of_array(data[0]), data)
    data = reference.planted((90, 10, 10), "f4")
    monkeypatch.setattr(look, "SAMPLE_NBYTES", 3900)
    assert check(dataset.of_array(data), data).positions.size == 9
    monkeypatch.setattr(look, "SAMPLE_NBYTES", 1)
    assert check(dataset.of_array(data), data).positions.size == 1


def test_regions(tmp_path):
    data = reference.planted((4000, 3, 4), "u2", 2)
    ds = gpuem.open(raw(tmp_path / "a.raw", data), scan=(40, 100), frame=(3, 4), dtype="u2")
    wanted = np.zeros((40, 100), bool)
    wanted[30:, 5:95] = True
    found = check(ds, data, wanted.ravel())
    assert found.positions.size == 512
    wanted = np.random.default_rng(1).random(4000) < 0.01
    assert check(ds, data, wanted).positions.size == wanted.sum()


@pytest.mark.parametrize("block", [7, 1 << 16])
def test_spread_takes_one_out_of_each_part(monkeypatch, block):
    monkeypatch.setattr(look, "_BLOCK", block)
    there = np.random.default_rng(block).random(1000) < 0.3
    all_there = np.flatnonzero(there)
    for count in (1, 2, 10, 299, 5000):
        found = look.spread(there, count)
        n = min(count, all_there.size)
        rank = np.searchsorted(all_there, found)
        assert (all_there[rank] == found).all()
        edges = np.arange(n + 1) * all_there.size // n
        assert ((edges[:-1] <= rank) & (rank < edges[1:])).all()


@pytest.mark.parametrize("skip", [-13, 17])
def test_scans_that_begin_elsewhere_than_the_file(tmp_path, skip):
    data = reference.planted((100, 6, 7), "u2", 3)
    path = raw(tmp_path / "a.raw", data)
    ds = gpuem.open(path, frame=(6, 7), dtype="u2", scan=(9, 10), skip=skip, fit=True)
    at = np.clip(np.arange(90) + skip, 0, 99)
    found = check(ds, data[at])
    assert found.positions.size == (77 if skip < 0 else 83)


def test_corrected_frames(tmp_path):
    data = reference.planted((50, 6, 7), "u2", 4)
    ds = gpuem.open(raw(tmp_path / "a.raw", data), frame=(6, 7), dtype="u2", scan=(5, 10))
    ds = ds.corrected(dark=np.full((6, 7), 2.5), dead=[(1, 1)])
    check(ds, ds[...].reshape(50, 6, 7))


def test_data_on_the_gpu(tmp_path):
    data = reference.planted((50, 6, 7), "u2", 5)
    with installed():
        import cupy

        ds = gpuem.open(raw(tmp_path / "a.raw", data), frame=(6, 7), dtype="u2", scan=(5, 10))
        check(ds.to_device(), data)
        array = cupy.empty(data.shape, data.dtype)
        array.set(data)
        check(dataset.of_array(array), data)


def test_arrays_in_other_orders(tmp_path):
    data = reference.planted((200, 30, 3, 4), "u2", 6)
    np.save(tmp_path / "a.npy", np.asfortranarray(data))
    ds = gpuem.open(tmp_path / "a.npy")
    found = check(ds, data.reshape(-1, 3, 4))
    # the last neighbours along an axis may be fewer
    assert found.positions.size > 400
    dask = pytest.importorskip("dask.array", reason="dask is not installed")
    check(dataset.of_array(dask.from_array(data, chunks=(50, 7, 3, 4))), data.reshape(-1, 3, 4))


def counted(monkeypatch):
    """Frames that are decoded, counted."""
    decoded = []
    load = cpu.load

    def counting(source, files, piece, box, keep):
        decoded.append(int(np.prod([s.stop - s.start for s in box])))
        return load(source, files, piece, box, keep)

    monkeypatch.setattr(look.cpu, "load", counting)
    return decoded


@pytest.mark.parametrize(
    ("chunk", "places"), [((1, 1), 512), ((1, 4), 128), ((4, 16), 16), ((1, 128), 16), ((64, 2), 16)]
)
def test_chunks_are_decoded_once_and_few_of_them(monkeypatch, tmp_path, chunk, places):
    data = reference.planted((64, 128, 4, 8), "u1", 7) % 5
    write_hdf5(tmp_path / "a.h5", data, (*chunk, 4, 8), bitshuffle_lz4)
    ds = gpuem.open(tmp_path / "a.h5")
    decoded = counted(monkeypatch)
    found = look.sample(ds, everywhere(ds))
    np.testing.assert_array_equal(found.frames, data.reshape(-1, 4, 8)[found.positions])
    assert found.positions.size > 450
    assert len(decoded) <= places
    assert sum(decoded) <= max(512, 16 * np.prod(chunk))
    y, x = np.unravel_index(found.positions, (64, 128))
    assert np.unique(y * 4 // 64).size == 4
    assert np.unique(x * 4 // 128).size == 4


def test_huge_chunks_are_not_all_decoded(monkeypatch, tmp_path):
    data = reference.planted((64, 128, 4, 8), "u1", 7) % 5
    write_hdf5(tmp_path / "a.h5", data, (4, 128, 4, 8), bitshuffle_lz4)
    ds = gpuem.open(tmp_path / "a.h5")
    monkeypatch.setattr(look, "MOST_DECODED", 3 * 4 * 128 * 32)
    decoded = counted(monkeypatch)
    found = check(ds, data.reshape(-1, 4, 8))
    assert len(decoded) == 2 * 3
    assert found.positions.size == 512


def test_chunks_that_were_never_written_are_not_tried(monkeypatch, tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = file.create_dataset("data", (20, 10, 4, 8), "u2", chunks=(1, 3, 4, 8))
        made[3, :5] = made[7:9] = 3
    ds = gpuem.open(tmp_path / "a.h5")
    decoded = counted(monkeypatch)
    found = look.sample(ds, everywhere(ds))
    assert sorted(found.positions.tolist()) == [*range(30, 36), *range(70, 90)]
    assert len(decoded) == 2 + 8


def test_frames_that_cannot_be_read_are_passed_over(tmp_path):
    data = reference.planted((4000, 3, 4), "f4", 8)
    data[::2, 1, 1] = np.nan
    ds = gpuem.open(raw(tmp_path / "a.raw", data), scan=(40, 100), frame=(3, 4), dtype="f4")
    found = check(ds, data)
    assert (found.positions % 2 == 1).all()
    assert found.positions.size >= 200
    data[:3900, 1, 1] = np.inf
    ds = gpuem.open(raw(tmp_path / "b.raw", data), scan=(40, 100), frame=(3, 4), dtype="f4")
    assert check(ds, data).positions.min() > 3900


def test_no_frame_at_all_is_an_error(tmp_path):
    ds = dataset.of_array(np.full((3, 4, 2, 2), np.nan))
    with pytest.raises(gpuem.DataError, match=r"no frame could be read .* 12 were tried: .*NaN or infinity"):
        look.sample(ds, everywhere(ds))
    ds = gpuem.open(raw(tmp_path / "a.raw", np.ones((10, 2, 2), "u1")), frame=(2, 2), dtype="u1", scan=(30,), fit=True)
    wanted = np.arange(30) > 20
    with pytest.raises(gpuem.DataError, match="0 were tried: no frame of the file lies inside the wanted part"):
        look.sample(ds, wanted)


class Found:
    """What became of an analysis that looked: no model, and no look of its own."""

    def __init__(self, name, brightest):
        self.name, self.brightest = name, brightest

    def weights(self, view):
        mask = np.zeros(view.frame_shape, bool)
        mask[self.brightest] = True
        return Weights(masks=(mask,))

    def finish(self, view, sums, valid):
        values = view.scan_map(sums.masks[:, 0], valid)
        return {"": Map(values, view.scan, "counts", "the pixel that is brightest in the sample")}


class Brightest(Model):
    """Looks for the brightest pixel."""

    kind: Literal["brightest"] = "brightest"
    name: str = "brightest"

    def look(self, view, sample):
        mean = sample.frames.mean(axis=0, dtype=float)
        assert mean.shape == view.frame_shape
        return Found(self.name, np.unravel_index(mean.argmax(), mean.shape))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_was_found_is_what_runs(device):
    data = reference.planted((6, 7, 8, 9), "u1", 9) % 100
    data[..., 5, 3] += 150
    with installed():
        found = gpuem.run(data, [gpuem.Sum(), Brightest(), Brightest(name="other")], device=device, roi=(1, 5, 0, 7))
    for name in ("brightest", "other"):
        np.testing.assert_array_equal(found[name].data[1:5], data[1:5, :, 5, 3])
        assert np.isnan(found[name].data[5]).all()
    assert found.provenance["analyses"][1] == {"kind": "brightest", "name": "brightest"}


def test_nothing_is_read_where_nobody_looks(monkeypatch):
    monkeypatch.setattr(look, "sample", None)
    ds = dataset.of_array(np.ones((3, 4, 5), "u1"))
    chosen = [gpuem.Sum(), gpuem.CenterOfMass()]
    assert job.look(ds, chosen, everywhere(ds)) == chosen
    _, made = job.begin(ds, chosen, recipe.run_section())
    assert "sample of frames" not in made.plan.nbytes


def test_the_sample_is_counted_and_refused_beforehand(monkeypatch):
    ds = dataset.of_array(np.ones((3, 4, 5), "u1"))
    resolved, made = job.begin(ds, [Brightest()], recipe.run_section())
    assert isinstance(resolved[0], Found)
    assert made.plan.nbytes["sample of frames"] == 3 * 20
    monkeypatch.setattr(look, "sample", None)
    with pytest.raises(gpuem.PlanError, match=r"looking at a sample of the frames needs [\d,]+ MB .* 50 MB"):
        gpuem.run(ds, [Brightest()], memory="50 MB")
    assert tiles.BASE_NBYTES > 50e6


def test_mistakes_are_told_before_frames_are_read(monkeypatch):
    monkeypatch.setattr(look, "sample", None)
    with pytest.raises(gpuem.RecipeError, match="used 2 times"):
        gpuem.run(np.ones((3, 4, 5), "u1"), [Brightest(), Brightest()])
