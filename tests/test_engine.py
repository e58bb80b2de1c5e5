"""Any tiling, any number of threads, shards and blocks: the same bits as the naive reference."""

from __future__ import annotations

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import gpuem
from gpuem import tiles
from gpuem.backends import Frames, Weights, cpu

DTYPES = ["u1", "u2", "u4", "i2", "f4"]


@pytest.fixture
def cuts(monkeypatch):
    """Set sizes of tiles, shards and blocks in frames."""

    def set_cuts(frame_nbytes, tile, shard, block):
        monkeypatch.setattr(tiles, "TILE_NBYTES", tile * frame_nbytes)
        monkeypatch.setattr(tiles, "RUNS_TILE_NBYTES", tile * frame_nbytes)
        monkeypatch.setattr(tiles, "SHARD_NBYTES", shard * frame_nbytes)
        monkeypatch.setattr(tiles, "LEAST_FRAMES", 1)
        monkeypatch.setattr(cpu, "BLOCK_NBYTES", block * frame_nbytes)

    return set_cuts


def analyses(frame, rng):
    mask = rng.random(frame) > 0.5
    mask[0, 0] = True
    return [
        gpuem.Sum(),
        gpuem.VirtualDetector(name="ring", center=(frame[0] / 3, frame[1] / 2), inner=0.5, outer=2.0 + min(frame) / 3),
        gpuem.VirtualDetector(name="mask", shape="mask", mask=mask),
        gpuem.VirtualDetector(name="weights", shape="mask", mask=rng.standard_normal(frame)),
        # planted pixels are noise about 0, which com doesn't take for counts, but where it is as LiberTEM's
        gpuem.CenterOfMass(compatible="libertem"),
        gpuem.CenterOfMass(
            name="inner", radius=1 + min(frame) / 2, center=(frame[0] / 2, frame[1] / 3), compatible="libertem"
        ),
    ], mask


def assert_equals_reference(found, data, mask, weights):
    frames = data.reshape(-1, *data.shape[-2:])
    frame, scan = data.shape[-2:], data.shape[:-2]
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(frames))
    assert np.array_equal(found["sum/max"].data, reference.frame_max(frames))
    assert found["sum/max"].data.dtype == data.dtype.newbyteorder("=")
    ring = reference.annulus(frame, (frame[0] / 3, frame[1] / 2), 2.0 + min(frame) / 3, 0.5)
    assert np.array_equal(found["ring"].data, reference.mask_sums(frames, ring).reshape(scan))
    assert np.array_equal(found["mask"].data, reference.mask_sums(frames, mask).reshape(scan))
    exact = reference.image_sums(frames, weights)
    scale = np.abs(frames.astype(float)).sum(axis=(1, 2)).max() + 1
    assert np.abs(found["weights"].data.ravel() - exact).max() < 1e-5 * scale
    center = frame[0] // 2, frame[1] // 2
    shift = reference.com(frames, center).reshape(*scan, 2)
    assert np.array_equal(found["com/shift_y"].data, shift[..., 0])
    assert np.array_equal(found["com/shift_x"].data, shift[..., 1])
    center = frame[0] / 2, frame[1] / 3
    inner = reference.annulus(frame, center, 1 + min(frame) / 2)
    shift = reference.com(frames, center, inner).reshape(*scan, 2)
    assert np.array_equal(found["inner/shift_y"].data, shift[..., 0])
    assert np.array_equal(found["inner/shift_x"].data, shift[..., 1])


@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("<>"),
    scan=st.sampled_from([(1, 1), (5,), (7, 3), (2, 3, 5), (1, 13)]),
    frame=st.sampled_from([(1, 1), (3, 2), (7, 11), (13, 5), (17, 19)]),
    cut=st.tuples(*[st.integers(1, 9)] * 3),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_any_cut_gives_the_bits_of_the_reference(tmp_path_factory, dtype, order, scan, frame, cut, threads, seed):
    data = reference.planted((*scan, *frame), dtype, seed).astype(order + dtype)
    path = tmp_path_factory.mktemp("raw") / "data.raw"
    path.write_bytes(data.tobytes())
    rng = np.random.default_rng(seed)
    chosen, mask = analyses(frame, rng)
    with pytest.MonkeyPatch.context() as patch:
        nbytes = data[..., :, :].dtype.itemsize * frame[0] * frame[1]
        for module, name, count in (
            (tiles, "TILE_NBYTES", cut[0]), (tiles, "RUNS_TILE_NBYTES", cut[0]),
            (tiles, "SHARD_NBYTES", cut[1]), (cpu, "BLOCK_NBYTES", cut[2]),
        ):  # fmt: skip
            patch.setattr(module, name, count * nbytes)
        ds = gpuem.open(path, scan=scan, frame=frame, dtype=order + dtype)
        found = gpuem.run(ds, chosen, threads=threads)
    assert_equals_reference(found, data, mask, chosen[3].mask)


@pytest.mark.parametrize("dtype", [*DTYPES, "i4", "i8", "f8"])
@pytest.mark.parametrize("frame", [(300, 517), (257, 256), (4, 1031)])
def test_frames_larger_than_strips_and_bands(dtype, frame):
    data = reference.planted((5, *frame), dtype)
    mask = np.random.default_rng(1).random(frame) > 0.3
    mask[2, :] = True
    prepared = cpu.prepare(Weights(True, True, (mask,), (), (None, mask)), frame, np.dtype(dtype))
    sums = cpu.new_sums(prepared, 5)
    starts = np.arange(5, dtype=np.int64) * frame[0] * frame[1]
    cpu.add_frames(Frames(data.ravel(), starts, frame), prepared, sums, 0, np.arange(5))
    assert np.array_equal(sums.total, reference.frame_sum(data))
    assert np.array_equal(sums.maximum, reference.frame_max(data))
    assert np.array_equal(sums.masks[:, 0], reference.mask_sums(data, mask))
    assert np.array_equal(sums.moments[:, 0], reference.moments(data))
    assert np.array_equal(sums.moments[:, 1], reference.moments(data, mask))


@pytest.mark.parametrize("value", [65535, 0])
def test_full_scale_16_bit_frames_do_not_overflow(value):
    data = np.full((3, 512, 700), value, np.uint16)
    found = gpuem.run(data, [gpuem.Sum(), gpuem.CenterOfMass(), gpuem.VirtualDetector(shape="disk", outer=1000)])
    assert found["virtual"].data.tolist() == [value * 512 * 700] * 3
    assert found["com/y"].data.tolist() == [255.5] * 3
    assert found["com/x"].data.tolist() == [349.5] * 3
    assert (found["sum/sum"].data == 3 * value).all()


@pytest.mark.parametrize("most", [tiles.MOST_FRAMES, 10**6])
def test_many_frames_do_not_overflow_the_shard_total(monkeypatch, most):
    monkeypatch.setattr(tiles, "MOST_FRAMES", most)
    data = np.full((70000, 1, 2), 65535, np.uint16)
    found = gpuem.run(data, [gpuem.Sum()], threads=1)
    assert found["sum/sum"].data.tolist() == [[70000 * 65535] * 2]


def test_wide_integers_that_would_overflow_are_refused():
    data = np.full((3, 64, 64), 5, np.int64)
    data[1, 2, 3] = -(2**61)
    with pytest.raises(gpuem.DataError, match="frame 1: counts too large for exact sums in 64 bits"):
        gpuem.run(data, [gpuem.Sum()])
    found = gpuem.run(data, [gpuem.Sum()], on_error="mask")
    assert found["valid"].data.tolist() == [True, False, True]


def test_one_dead_pixel_at_full_scale_of_a_large_detector_is_summed():
    data = np.ones((2, 2162, 2068), np.uint32)
    data[0, 2000, 3] = 2**32 - 1
    found = gpuem.run(data, [gpuem.Sum(), gpuem.CenterOfMass()])
    assert found["com/counts"].data.tolist() == [2162 * 2068 - 1 + 2**32 - 1, 2162 * 2068]
    assert found["com/y"].data[0] == reference.com(data[:1], (0, 0))[0, 0]


def test_floats_give_the_same_bits_for_any_number_of_threads(cuts):
    data = np.random.default_rng(3).lognormal(0, 5, (61, 9, 11)).astype("f4")
    cuts(9 * 11 * 4, tile=3, shard=7, block=2)
    runs = [gpuem.run(data, [gpuem.Sum(), gpuem.CenterOfMass()], threads=n) for n in (1, 2, 3, 8)]
    for name in runs[0]:
        for other in runs[1:]:
            assert np.array_equal(runs[0][name].data, other[name].data, equal_nan=True), name
    assert np.allclose(runs[0]["sum/sum"].data, data.astype("f8").sum(axis=0), rtol=1e-13)


def test_region_of_interest_masks_everything_else(tmp_path):
    data = reference.planted((6, 7, 8, 9), "u2")
    np.save("data.npy", data)
    ds = gpuem.open("data.npy")
    mask = np.random.default_rng(0).random((6, 7)) > 0.6
    np.save("roi.npy", mask)
    for roi, wanted in (((1, 4, 2, 7), np.s_[1:4, 2:7]), (mask, mask), ("roi.npy", mask)):
        found = gpuem.run(ds, [gpuem.Sum(), gpuem.CenterOfMass(), gpuem.VirtualDetector(outer=3)], roi=roi)
        inside = np.zeros((6, 7), bool)
        inside[wanted] = True
        assert np.array_equal(found["valid"].data, inside)
        assert np.array_equal(np.isfinite(found["virtual"].data), inside)
        assert np.array_equal(np.isfinite(found["com/x"].data), inside)
        assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[inside]))
        assert found["sum/sum"].attributes["frames"] == inside.sum()


def test_region_errors():
    data = np.ones((4, 5, 3, 3), "u1")
    for roi in ((0, 5, 0, 5), (2, 2, 0, 5), (0, 4), np.ones((5, 4), bool), np.zeros((4, 5), bool), "nothing.npy"):
        with pytest.raises(gpuem.RecipeError, match="roi"):
            gpuem.run(data, [gpuem.Sum()], roi=roi)


def test_frames_missing_at_both_ends_are_masked_and_counted():
    data = reference.planted((10, 4, 5), "u2")
    np.save("data.npy", data)
    with pytest.raises(gpuem.InputError, match="2 too few"):
        gpuem.open("data.npy", scan=(3, 4))
    with pytest.raises(gpuem.InputError, match="1 too many"):
        gpuem.open("data.npy", scan=(3, 3))
    ds = gpuem.open("data.npy", scan=(3, 4), skip=-1, fit=True)
    found = gpuem.run(ds, [gpuem.Sum(), gpuem.VirtualDetector(shape="disk", outer=9)])
    assert found["valid"].data.ravel().tolist() == [False] + [True] * 10 + [False]
    assert np.isnan(found["virtual"].data.ravel()[[0, 11]]).all()
    assert np.array_equal(found["virtual"].data.ravel()[1:11], data.sum(axis=(1, 2)))
    assert found.provenance["frames"] == {"wanted": 12, "read": 10, "masked": 2}
    assert len(found.provenance["notes"]) == 2
    skipped = gpuem.run(gpuem.open("data.npy", scan=(3, 3), skip=1), [gpuem.VirtualDetector(shape="disk", outer=9)])
    assert np.array_equal(skipped["virtual"].data.ravel(), data[1:].sum(axis=(1, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_is_an_error_that_names_the_frame_or_masked(bad):
    data = reference.planted((3, 4, 5, 6), "f4")
    data[1, 2, 3, 4] = bad
    with pytest.raises(gpuem.DataError, match="frame 6: NaN or infinity") as error:
        gpuem.run(data, [gpuem.Sum()])
    assert error.value.frames == (6,)
    found = gpuem.run(data, [gpuem.Sum(), gpuem.CenterOfMass()], on_error="mask")
    valid = found["valid"].data
    assert not valid[1, 2]
    assert valid.sum() == 11
    assert np.array_equal(found["sum/sum"].data, reference.frame_sum(data[valid]))
    assert np.isnan(found["com/y"].data[1, 2])
    assert found.provenance["lost"] == [{"frames": "frame 6", "reason": "NaN or infinity among the pixels"}]


def test_all_frames_broken_is_an_error():
    with pytest.raises(gpuem.DataError, match="not one frame"):
        gpuem.run(np.full((3, 2, 2), np.nan), [gpuem.Sum()], on_error="mask")


def test_arrays_of_other_kinds():
    dask = pytest.importorskip("dask.array", reason="dask is not installed")
    data = reference.planted((6, 5, 7, 8), "i2")
    chosen = [gpuem.Sum(), gpuem.CenterOfMass()]
    plain = gpuem.run(data, chosen)
    others = [
        gpuem.run(dask.from_array(data, chunks=(4, 2, 3, 8)), chosen, threads=3),
        gpuem.run(np.asfortranarray(data), chosen),
        gpuem.run(data.astype(">i2"), chosen),
        gpuem.run(data[:, ::-1][:, ::-1], chosen),
    ]
    for other in others:
        for name in plain:
            assert np.array_equal(plain[name].data, other[name].data, equal_nan=True)
    single = gpuem.run(data[0, 0], [gpuem.Sum()])
    assert np.array_equal(single["sum/sum"].data, data[0, 0])


def test_cuda_is_never_a_silent_cpu_run():
    with pytest.raises(gpuem.DeviceError, match="CUDA"):
        gpuem.run(np.ones((2, 3, 3), "u1"), [gpuem.Sum()], device="cuda")


def test_too_little_memory_is_refused_with_numbers():
    data = np.ones((64, 3, 3), "u1")
    with pytest.raises(gpuem.PlanError, match=r"needs [\d,]+ MB with one thread and may take 50 MB"):
        gpuem.run(data, [gpuem.Sum()], memory="50 MB")
    ds = gpuem.run(data, [gpuem.Sum()], memory="2 GB")
    assert ds["sum/sum"].data.sum() == 64 * 9


@given(
    frames=st.integers(1, 3000), tile=st.integers(1, 70), shard=st.integers(1, 300), nav=st.sampled_from([1, 2])
)  # fmt: skip
def test_cuts_cover_every_frame_once(frames, tile, shard, nav):
    from gpuem.formats.array import describe

    shape = (frames, 2, 2) if nav == 1 else (-(-frames // 7), 7, 2, 2)
    source = describe(np.broadcast_to(np.uint8(0), shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_NBYTES", 4 * tile)
        patch.setattr(tiles, "SHARD_NBYTES", 4 * shard)
        patch.setattr(tiles, "LEAST_FRAMES", 1)
        plan = tiles.plan(source, tiles.Limits(source.frames, 8, threads=2, memory=2**33), 8, 8)
    assert len(plan.shards) >= frames // max(shard, 7 * tile + 7)
    piece = source.pieces[0]
    seen = []
    for one in plan.shards:
        own = [tiles.frames_of(piece, box) for box in tiles.boxes(piece, plan.tiles[0], one)]
        assert sum(map(len, own)) <= one.frames
        seen.extend(np.concatenate(own).tolist())
        for k, box in zip(range(one.first, one.last), own, strict=True):
            assert (tiles.tile_of(piece, plan.tiles[0], box) == k).all()
    assert sorted(seen) == list(range(source.frames))
