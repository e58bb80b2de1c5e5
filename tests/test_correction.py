"""Dark, gain and dead pixels: the bits of the naive reference for every type, byte order and layout."""

from __future__ import annotations

import tracemalloc

import h5py
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from merlin_writer import write_mib

import gpuem
from gpuem import correction, job, recipe, tiles
from gpuem.backends import cpu, cpu_load
from gpuem.dataset import of_array

DTYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"]
WHICH = [("dark",), ("gain",), ("dead",), ("dark", "gain"), ("dark", "gain", "dead")]


def images(frame, seed=0, share=0.2):
    """Dark, gain and dead pixels that no two pixels share; some dark larger than the counts, some gain negative."""
    rng = np.random.default_rng(seed)
    dead = rng.random(frame) < share
    # corners, and a cluster that no square of 3x3 gets out of
    dead[0, 0] = dead[-1, -1] = True
    dead[frame[0] // 3 : frame[0] // 3 + 4, frame[1] // 3 : frame[1] // 3 + 5] = True
    dead[frame[0] // 2, -1] = False
    return {"dark": rng.normal(3, 50, frame), "gain": rng.normal(1, 0.3, frame), "dead": dead}


def some(frame, which, seed=0):
    return {name: image for name, image in images(frame, seed).items() if name in which}


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    # the sign of zero counts
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_and_byte_order(dtype, order, which):
    data = reference.planted((3, 5, 13, 11), "f4" if dtype == "f2" else dtype).astype(order + dtype)
    data.tofile("data.raw")
    given = some((13, 11), which)
    ds = gpuem.open("data.raw", scan=(3, 5), frame=(13, 11), dtype=order + dtype).corrected(**given)
    expected = reference.correct(data.reshape(15, 13, 11), **given).reshape(data.shape)
    assert_same_bits(ds[...], expected)
    assert ds.dtype == expected.dtype


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [("u1", "f4"), ("i2", "f4"), ("u2", "f4"), ("f2", "f4"), ("f4", "f4"), ("u4", "f8"), ("i8", "f8"), ("f8", "f8")],
)
def test_the_type_that_corrected_pixels_have(dtype, scaled):
    ds = of_array(np.ones((2, 3, 4), dtype))
    assert ds.corrected(dark=np.zeros((3, 4))).dtype == scaled
    assert ds.corrected(gain=np.ones((3, 4)), dead=[(0, 0)]).dtype == scaled
    assert ds.corrected(dead=[(0, 0)]).dtype == ds.dtype


@given(
    dtype=st.sampled_from(["u1", "u2", "i4", "f4"]),
    layout=st.sampled_from(
        ["runs", "unaligned", "files", "swapped", "fortran", "chunks", "chunks2d", "array", "single"]
    ),
    which=st.sampled_from(WHICH),
    scan=st.sampled_from([(1, 1), (7,), (5, 3)]),
    frame=st.sampled_from([(1, 2), (3, 2), (7, 11), (13, 5), (17, 19)]),
    cut=st.tuples(*[st.integers(1, 9)] * 2),
    seed=st.integers(0, 2**16),
)
def test_every_layout_and_cut(tmp_path_factory, dtype, layout, which, scan, frame, cut, seed):
    folder = tmp_path_factory.mktemp("data")
    data = reference.planted((*scan, *frame), dtype, seed)
    given = some(frame, which, seed)
    with pytest.MonkeyPatch.context() as patch:
        nbytes = data.dtype.itemsize * frame[0] * frame[1]
        cut_small(patch, nbytes, tile=cut[0], shard=2 * cut[0], corrected=cut[1])
        ds = stored(folder, data, layout).corrected(**given)
        expected = reference.correct(data.reshape(-1, *frame), **given).reshape(data.shape)
        assert_same_bits(ds[...], expected)
        assert tiles.tile_shape(ds.source.pieces[0], nbytes)[0] <= max(cut[0], 2)
        found = gpuem.run(ds, [gpuem.Sum()], threads=2)
        assert np.array_equal(found["sum/max"].data, reference.frame_max(expected.reshape(-1, *frame)))


def cut_small(patch, frame_nbytes, tile, shard, corrected):
    """Set the sizes of tiles, of shards, and of what is corrected at once, in frames."""
    nbytes = {"runs_tile": tile * frame_nbytes, "tile": tile * frame_nbytes, "shard": shard * frame_nbytes}
    real = tiles.Sizes

    def sizes(**given):
        return real(**nbytes)

    patch.setattr(tiles, "Sizes", sizes)
    patch.setattr(tiles, "LEAST_FRAMES", 1)
    patch.setattr(tiles, "CORRECTED_NBYTES", corrected * frame_nbytes)


def stored(folder, data, layout):
    """The data in a file of some layout."""
    scan, frame, path = data.shape[:-2], data.shape[-2:], folder / "data"
    if layout in ("array", "single"):
        return of_array(data if layout == "array" else data[..., ::-1][..., ::-1])
    if layout == "fortran":
        np.save(path.with_suffix(".npy"), np.asfortranarray(data))
        return gpuem.open(path.with_suffix(".npy"))
    if layout.startswith("chunks"):
        chunk = (2,) * len(scan) + (frame if layout == "chunks" else (2, 2))
        with h5py.File(path.with_suffix(".h5"), "w") as file:
            file.create_dataset("data", data.shape, data.dtype, data, maxshape=(None,) * data.ndim, chunks=chunk,
                                compression="gzip", shuffle=True)  # fmt: skip
        return gpuem.open(path.with_suffix(".h5"))
    order = ">" if layout == "swapped" else "<"
    flat = [f.astype(data.dtype.newbyteorder(order)).tobytes() for f in data.reshape(-1, *frame)]
    header, paths = (3, 1) if layout == "unaligned" else (0, 0), [path.with_suffix(".raw")]
    if layout == "files" and len(flat) > 1:
        paths.append(folder / "more.raw")
    for k, one in enumerate(paths):
        part = flat if len(paths) == 1 else flat[:1] if k == 0 else flat[1:]
        one.write_bytes(b"".join(bytes(header[0]) + f + bytes(header[1]) for f in part))
    kind = order + data.dtype.str[1:]
    return gpuem.open(paths, scan=scan, frame=frame, dtype=kind, header=header[0], footer=header[1])


@pytest.mark.parametrize(("kind", "bits"), [("R64", 1), ("R64", 6), ("R64", 12), ("R64", 24), ("U16", 12)])
def test_packed_merlin_frames(tmp_path, kind, bits):
    data = np.random.default_rng(bits).integers(0, 2**bits, (3, 256, 256), np.uint32)
    data = data.astype({1: "u1", 6: "u1", 12: "u2", 24: "u4"}[bits])
    path = write_mib(tmp_path / "scan.mib", data, kind=kind, bits=bits)
    given = images((256, 256), share=0.001)
    ds = gpuem.open(path, scan=(3,))
    assert ds.dtype == data.dtype
    assert_same_bits(ds.corrected(**given)[...], reference.correct(data, **given))
    assert_same_bits(ds.corrected(dead=given["dead"])[...], reference.correct(data, dead=given["dead"]))


@pytest.mark.parametrize("frame", [(1, 2), (2, 1), (1, 37), (31, 1), (13, 17), (40, 23)])
def test_neighbours_are_those_of_the_smallest_square_with_a_good_pixel(frame):
    rng = np.random.default_rng(frame[0])
    for share in (0.0, 0.05, 0.5, 0.97):
        dead = rng.random(frame) < share
        dead[-1, 0] = False
        pixels, offsets, found = correction.neighbours(dead)
        assert (pixels.dtype, offsets.dtype, found.dtype) == (np.int32,) * 3
        assert pixels.tolist() == np.flatnonzero(dead).tolist()
        index = np.arange(dead.size).reshape(frame)
        assert offsets[0] == 0
        assert offsets[-1] == found.size
        for k, (y, x) in enumerate(np.argwhere(dead)):
            assert found[offsets[k] : offsets[k + 1]].tolist() == reference.around(index, dead, y, x)


def test_neighbours_of_large_gaps_are_sought_in_parts(monkeypatch):
    dead = np.zeros((150, 131), bool)
    dead[20:57] = dead[:, 40:51] = True
    whole = correction.neighbours(dead)
    monkeypatch.setattr(correction, "PAIRS_AT_ONCE", 100)
    for one, other in zip(whole, correction.neighbours(dead), strict=True):
        assert np.array_equal(one, other)
    index = np.arange(dead.size).reshape(dead.shape)
    at = int(np.searchsorted(whole[0], 38 * 131 + 45))
    assert whole[2][whole[1][at] : whole[1][at + 1]].tolist() == reference.around(index, dead, 38, 45)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"])
def test_means_of_integers_are_rounded_half_up_and_never_overflow(dtype):
    info = np.iinfo(dtype)
    dead = np.zeros((3, 3), bool)
    dead[1, 1] = True
    frames = np.full((6, 3, 3), info.max, dtype)
    frames[1] = info.min
    frames[2, 0] = info.min
    # sums of 4 and 12 over 8 pixels: the means 0.5 and 1.5
    frames[3], frames[4] = 0, 1
    frames[3:5, 0], frames[3:5, 2, 0] = np.arange(3, dtype=dtype), 1
    frames[5] = 0 if info.min == 0 else -1
    frames[5, 0] = 0
    found = of_array(frames).corrected(dead=dead)[...]
    assert_same_bits(found, reference.correct(frames, dead=dead))
    assert found[0, 1, 1] == info.max
    assert found[1, 1, 1] == info.min
    assert found[3, 1, 1] == 1
    halves = np.array([[[-1, 0, 0]], [[-3, 0, -2]], [[1, 0, 2]], [[0, 0, 1]]], "i2")
    means = of_array(halves).corrected(dead=[(0, 1)])[:, 0, 1]
    # -0.5, -2.5, 1.5, 0.5
    assert means.tolist() == [0, -2, 2, 1]


def test_steps_are_rounded_one_by_one_to_single_precision():
    rng = np.random.default_rng(5)
    data = rng.integers(0, 65536, (7, 64, 61), np.uint16)
    dark, gain = rng.normal(100, 30, (64, 61)), rng.lognormal(0, 2, (64, 61))
    found = of_array(data).corrected(dark, gain)[...]
    assert_same_bits(found, (data.astype("f4") - dark.astype("f4")) * gain.astype("f4"))
    # in double precision it would be something else
    assert (found != ((data - dark) * gain).astype("f4")).any()


def chosen(frame):
    mask = np.random.default_rng(9).random(frame) > 0.5
    return [
        gpuem.Sum(),
        gpuem.VirtualDetector(inner=1, outer=min(frame) / 2),
        gpuem.VirtualDetector(name="mask", shape="mask", mask=mask),
        gpuem.VirtualDetector(name="weights", shape="mask", mask=np.random.default_rng(8).normal(size=frame)),
        gpuem.CenterOfMass(),
        gpuem.CenterOfMass(name="inner", radius=min(frame) / 3),
    ]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("dtype", ["u1", ">u2", "i4", "f4"])
def test_analyses_see_what_numpy_would_have_corrected_beforehand(dtype, which):
    frame = (37, 41)
    data = reference.planted((5, 7, *frame), dtype.strip(">")).astype(dtype)
    data.tofile("data.raw")
    given = some(frame, which)
    ds = gpuem.open("data.raw", scan=(5, 7), frame=frame, dtype=dtype).corrected(**given)
    found = gpuem.run(ds, chosen(frame), threads=2)
    beforehand = gpuem.run(reference.correct(data.reshape(-1, *frame), **given).reshape(data.shape), chosen(frame))
    assert set(found) == set(beforehand)
    for name in found:
        assert_same_bits(found[name].data, beforehand[name].data)
    few = gpuem.run(ds, chosen(frame), roi=(1, 4, 2, 5))
    assert np.array_equal(few["mask"].data[1:4, 2:5], found["mask"].data[1:4, 2:5])


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    data = reference.planted((61, 9, 11), "u2")
    ds = of_array(data).corrected(**images((9, 11)))
    runs = []
    for threads, at_once in ((1, 4), (2, 4), (5, 8), (3, 1000)):
        with monkeypatch.context() as patch:
            cut_small(patch, 9 * 11 * 2, tile=3, shard=7, corrected=2 * at_once)
            plan = job.prepare(ds, [gpuem.Sum()], recipe.run_section()).plan
            assert len(plan.shards) > 1
            runs.append(gpuem.run(ds, chosen((9, 11)), threads=threads))
    for other in runs[1:]:
        for name in runs[0]:
            assert_same_bits(other[name].data, runs[0][name].data)


def test_dead_pixels_may_hold_nan_and_have_neither_dark_nor_gain():
    data = reference.planted((4, 6, 7), "f4")
    dead = np.zeros((6, 7), bool)
    dead[2, 3] = dead[0, 6] = True
    expected = reference.correct(data, np.full((6, 7), 2.0), np.full((6, 7), 3.0), dead)
    data[:, dead] = np.nan
    dark, gain = np.full((6, 7), 2.0), np.full((6, 7), 3.0)
    dark[dead], gain[dead] = np.nan, np.inf
    ds = of_array(data).corrected(dark, gain, dead)
    assert_same_bits(ds[...], expected)
    assert gpuem.run(ds, [gpuem.Sum()])["valid"].data.all()
    data[1, 0, 0] = np.inf
    found = gpuem.run(of_array(data).corrected(dark, gain, dead), [gpuem.Sum()], on_error="mask")
    assert found["valid"].data.tolist() == [True, False, True, True]


def test_frames_that_overflow_are_refused_not_saturated():
    data = np.array([[[1, 2]], [[1, 40000]]], "u2")
    ds = of_array(data).corrected(gain=np.array([[1, 1e34]]))
    assert np.isinf(ds[1, 0, 1])
    with pytest.raises(gpuem.DataError, match="frame 1: NaN or infinity"):
        gpuem.run(ds, [gpuem.Sum()])


def test_broken_frames_are_still_told(tmp_path):
    with h5py.File("data.h5", "w") as file:
        data = file.create_dataset("data", (6, 4, 5), "u2", chunks=(1, 4, 5))
        data[:5] = 7
    ds = gpuem.open("data.h5").corrected(dark=np.ones((4, 5)))
    found = gpuem.run(ds, [gpuem.Sum()])
    assert found["valid"].data.tolist() == [True] * 5 + [False]
    assert (found["sum/sum"].data == 30).all()


def test_without_a_correction_frames_are_used_where_they_were_read_to():
    reference.planted((6, 4, 5), "u2").tofile("data.raw")
    ds = gpuem.open("data.raw", scan=(6,), frame=(4, 5), dtype="u2")
    piece = ds.source.pieces[0]
    for source, there in ((ds.source, True), (ds.corrected(dead=[(0, 0)]).source, False)):
        (block,) = cpu.load(source, ds.files, piece, (slice(0, 6),), np.ones(6, bool))
        assert np.shares_memory(block.frames.pixels, cpu_load._memory.raw) == there


def test_data_that_was_handed_over_is_not_changed():
    data = reference.planted((4, 6, 7), "f4")
    given = images((6, 7))
    before = data.copy(), {name: image.copy() for name, image in given.items()}
    gpuem.run(of_array(data).corrected(**given), [gpuem.Sum()])
    assert np.array_equal(data, before[0])
    assert all(np.array_equal(given[name], image) for name, image in before[1].items())


@pytest.mark.parametrize("stored", ["<u2", ">u2", "<f8", "chunks"])
@pytest.mark.parametrize("frame", [(64, 64), (1024, 1000)])
def test_the_plan_counts_what_a_corrected_run_holds(stored, frame):
    if stored == "chunks":
        with h5py.File("data.h5", "w") as file:
            made = file.create_dataset("data", (64, *frame), "u2", chunks=(3, 50, 50), compression="gzip")
            made[...] = 1
        plain = gpuem.open("data.h5")
    else:
        with open("data.raw", "wb") as stream:
            stream.truncate(40 * frame[0] * frame[1] * 8)
        count = 40 * 8 // np.dtype(stored).itemsize
        plain = gpuem.open("data.raw", scan=(count,), frame=frame, dtype=stored)
    dead = np.zeros(frame, bool)
    dead[10:40, 10:40] = True
    ds = plain.corrected(np.zeros(frame), np.ones(frame), dead)
    # without a sample beforehand
    com = gpuem.CenterOfMass(compatible="libertem")
    asked = recipe.run_section(threads=1, memory="4 GB")
    alone, plan = (job.prepare(one, [com], asked).plan for one in (plain, ds))
    tables = ds.source.correction.nbytes
    assert plan.nbytes["correction"] == tables
    # whole tiles are planned where they are smaller than what is corrected at once
    extra = plan.total_nbytes - alone.total_nbytes - tables
    assert 0 < extra <= max(tiles.CORRECTED_NBYTES, 4 * ds.source.corrected_nbytes)
    gpuem.run(ds, [com], threads=1, memory="4 GB")
    tracemalloc.start()
    try:
        gpuem.run(ds, [com], threads=1, memory="4 GB")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # a little for Python's own objects; the tables were there before
    assert peak <= plan.total_nbytes - tiles.BASE_NBYTES - tables + 500_000


def test_recipe_section(tmp_path, monkeypatch):
    data, given = reference.planted((4, 5, 9, 8), "u2"), images((9, 8))
    np.save(tmp_path / "data.npy", data)
    for name, image in given.items():
        np.save(tmp_path / f"{name}.npy", image)
    text = '[input]\npath = "data.npy"\n[[analysis]]\nkind = "sum"\n[output]\npath = "out.zarr"\n[correction]\n'
    (tmp_path / "a.toml").write_text(text + 'dark = "dark.npy"\ngain = "gain.npy"\ndead = "dead.npy"\n')
    monkeypatch.chdir("/")
    found, where = gpuem.run_recipe(tmp_path / "a.toml")
    expected = reference.correct(data.reshape(-1, 9, 8), **given)
    assert np.array_equal(found["sum/max"].data, reference.frame_max(expected))
    facts = gpuem.load_results(where).provenance
    assert facts["correction"] == {
        **{name: str(tmp_path / f"{name}.npy") for name in given},
        "dead_pixels": int(given["dead"].sum()),
        "dtype": "float32",
    }
    assert facts["input"]["dtype"] == "<u2"
    assert facts["bytes"] == data.nbytes
    (tmp_path / "b.toml").write_text(text.replace("out.zarr", "other.zarr") + "dead = [[0, 0], [8, 7]]\n")
    found, _ = gpuem.run_recipe(tmp_path / "b.toml")
    dead = np.zeros((9, 8), bool)
    dead[0, 0] = dead[8, 7] = True
    assert np.array_equal(found["sum/sum"].data, reference.correct(data.reshape(-1, 9, 8), dead=dead).sum(axis=0))
    assert found.provenance["correction"] == {"dead": "list", "dead_pixels": 2, "dtype": "uint16"}
    (tmp_path / "c.toml").write_text(text.replace("out.zarr", "plain.zarr"))
    found, _ = gpuem.run_recipe(tmp_path / "c.toml")
    assert found.provenance["correction"] is None
    assert found["sum/sum"].data.dtype == np.int64


def test_check_and_info_say_what_is_corrected(tmp_path, capsys):
    from gpuem import cli

    np.save("data.npy", reference.planted((4, 5, 9, 8), "u2"))
    np.save("dark.npy", np.zeros((9, 8)))
    np.save("dead.npy", images((9, 8))["dead"])
    text = '[input]\npath = "data.npy"\n[[analysis]]\nkind = "sum"\n[output]\npath = "out.zarr"\npreviews = false\n'
    (tmp_path / "a.toml").write_text(text + '[correction]\ndark = "dark.npy"\ndead = "dead.npy"\n')
    count = int(images((9, 8))["dead"].sum())
    cli.check(tmp_path / "a.toml")
    said = capsys.readouterr().out
    cli.run(tmp_path / "a.toml")
    cli.info(tmp_path / "out.zarr")
    for one in (said, capsys.readouterr().out):
        assert f"dark             {tmp_path / 'dark.npy'}\n" in one
        assert f"dead             {tmp_path / 'dead.npy'} ({count} dead pixels)\n" in one
        assert "corrected        as float32\n" in one
    assert "pixels           uint16" in said
    assert "MB correction" in said


def test_mistakes_in_the_recipe():
    raw = {"input": {"path": "a.npy"}, "analysis": [{"kind": "sum"}], "output": {"path": "b.zarr"}}
    with pytest.raises(gpuem.RecipeError, match=r"\[correction\] drak: unknown key; did you mean 'dark'\?"):
        recipe.check({**raw, "correction": {"drak": "dark.npy"}}, "a.toml")
    with pytest.raises(gpuem.RecipeError, match=r"\[correctoin\]: unknown key; did you mean 'correction'\?"):
        recipe.check({**raw, "correctoin": {}}, "a.toml")
    with pytest.raises(gpuem.RecipeError, match=r"\[correction\] gain: .*\(found 3\)"):
        recipe.check({**raw, "correction": {"gain": 3}}, "a.toml")


HOLE = np.ones((3, 4))
HOLE[1, 2] = np.nan


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "correction: nothing is given; give dark, gain or dead"),
        ({"dark": np.ones((4, 3))}, r"dark array has shape \(4, 3\), the detector \(3, 4\); they must be equal"),
        ({"gain": 2.0}, r"gain array has shape \(\), the detector \(3, 4\)"),
        ({"dead": np.zeros((3, 4, 1), bool)}, r"dead array has shape \(3, 4, 1\)"),
        ({"dark": np.ones((3, 4), complex)}, "dark array holds complex128, not real numbers"),
        ({"gain": HOLE}, r"gain array: NaN, .* at 1 of 12 pixels, the first at \(y, x\) = \(1, 2\); give"),
        ({"dark": HOLE, "dead": [(1, 1)]}, "dark array: NaN, .* or name these pixels in dead"),
        ({"dark": np.full((3, 4), 1e39)}, "dark array: .* too large for float32 at 12 of 12 pixels"),
        ({"dead": np.ones((3, 4), bool)}, "dead: all 12 pixels of the detector are dead.* turn the mask round"),
        ({"dead": HOLE}, "dead array holds other numbers than 0 and 1"),
        (
            {"dead": [(1, 4), (0, 0), (-1, 0)]},
            r"dead: 2 of 3 positions lie outside .* 3x4 pixels, .* \(y, x\) = \(1, 4\)",
        ),
        ({"dead": [1, 2]}, "dead: needed are positions"),
        ({"dead": [(1, 2), (1,)]}, "dead: needed are positions"),
        ({"dead": [(1.5, 2.0)]}, "dead: needed are positions"),
        ({"dark": "none.npy"}, "dark none.npy: can't be read"),
        ({"gain": "gain.mat"}, "gain gain.mat: write it as .npy or .tif"),
        ({"dead": "wrong.npy"}, r"dead wrong.npy has shape \(2, 2\)"),
    ],
)
def test_every_mistake_is_told(given, message):
    np.save("wrong.npy", np.zeros((2, 2), bool))
    with pytest.raises(gpuem.RecipeError, match=message):
        of_array(np.ones((2, 3, 4), "u2")).corrected(**given)


def test_no_dead_pixel_at_all_is_fine_and_twice_is_not():
    data = reference.planted((2, 3, 4), "u2")
    for none in ([], np.zeros((3, 4), bool), np.zeros((3, 4), "u1")):
        ds = of_array(data).corrected(dead=none)
        assert_same_bits(ds[...], data)
    with pytest.raises(gpuem.RecipeError, match="corrected already; give dark, gain and dead together"):
        ds.corrected(dark=np.ones((3, 4)))
    assert "corrected" in repr(ds)


def test_areas_too_large_to_replace_are_refused(monkeypatch):
    monkeypatch.setattr(correction, "MOST_NEIGHBOURS", 1000)
    dead = np.zeros((64, 64), bool)
    dead[:, 20:] = True
    with pytest.raises(
        gpuem.RecipeError, match=r"of 4,096 pixels 2,816 are dead, 2,\d+ of them \d+ or more pixels from"
    ):
        of_array(np.ones((2, 64, 64), "u2")).corrected(dead=dead)


def test_tif_files_and_lists(tmp_path):
    import tifffile

    data, given = reference.planted((2, 9, 8), "u2"), images((9, 8))
    for name, image in given.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", image.astype("u1" if name == "dead" else "f4"))
    ds = of_array(data).corrected(*[tmp_path / f"{name}.tif" for name in given])
    assert_same_bits(ds[...], reference.correct(data, **given))
    pairs = [tuple(where) for where in np.argwhere(given["dead"]).tolist()]
    assert_same_bits(of_array(data).corrected(dead=pairs)[...], reference.correct(data, dead=given["dead"]))
