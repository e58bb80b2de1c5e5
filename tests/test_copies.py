"""Machines that have the data on their own disks read it there, if it is the same, and get its shards first."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import small_shards

import gpuem
from gpuem import dataset, job, recipe, tiles
from gpuem.errors import InputError, RecipeError
from gpuem.executors import Here, copies

FRAME = (16, 16)
HOST = platform.node()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in small_shards.cuts(512).items():
        monkeypatch.setattr(tiles, name, value)


@pytest.fixture
def series(tmp_path):
    """Three raw files of 20 frames each, one data set."""
    frames = np.random.default_rng(1).integers(0, 99, (3, 20, *FRAME), dtype=np.uint16)
    paths = [tmp_path / f"scan_{k:03}.raw" for k in range(3)]
    for path, some in zip(paths, frames, strict=True):
        path.write_bytes(some.tobytes())
    return paths


def opened(paths, *rules):
    return gpuem.open(paths, scan=(6, 10), frame=FRAME, dtype="uint16", copies=rules)


def local_copy(paths, folder="nvme", **changes):
    Path(folder).mkdir(exist_ok=True)
    for path in paths:
        shutil.copy2(path, folder)
    return {"hosts": [HOST], "folder": Path(folder).absolute(), **changes}


def prepared(ds):
    return job.prepare(ds, [gpuem.Sum()], recipe.run_section(device="cpu", threads=1))


def read(made):
    return [str(file.path) for file in made.source.files]


def test_files_are_read_where_the_machine_has_them(series, tmp_path):
    rule = local_copy(series, files=["*_00[12].raw"])
    ds = opened(series, rule)
    wanted = gpuem.run(ds, gpuem.Sum(), device="cpu")
    made = Here().settle(prepared(ds))
    assert read(made) == [str(series[0]), *(str(Path("nvme").absolute() / path.name) for path in series[1:])]
    # what isn't read can't be missed
    for path in series[1:]:
        path.rename(path.with_suffix(".gone"))
    found = [partial.sums.total for partial in Here().run(made, range(len(made.plan.shards)), lambda *a, **b: None)]
    np.testing.assert_array_equal(np.sum(found, axis=0), wanted["sum/sum"].data)


@pytest.mark.parametrize(
    ("hosts", "matches"),
    [
        (["localhost"], True),
        (["*"], True),
        ([HOST[:1] + "*"], True),
        (["elsewhere", HOST], True),
        (["elsewhere*"], False),
        ([HOST + "1"], False),
        (["node0[1-4]"], False),
    ],
)
def test_machines_are_named_by_patterns(series, hosts, matches):
    made = prepared(opened(series, local_copy(series, hosts=hosts)))
    assert (read(copies.at_home(made)) != read(made)) == matches


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("node01", "node0[1-4]"),
        ("node01.cluster.example", "node0[1-4]"),
        ("node07", ""),
        ("gpu3", "gpu*"),
        ("Gpu3", ""),
    ],
)
def test_whole_names_and_short_ones(series, host, place):
    source = opened(series, {"hosts": ["node0[1-4]"], "folder": "/a"}, {"hosts": ["gpu*"], "folder": "/b"}).source
    assert copies.place_of(source, host) == place


def damaged(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_what_is_no_copy_is_refused_and_both_are_named(series):
    rule = local_copy(series)
    copy = Path("nvme").absolute() / series[1].name
    ds = opened(series, rule)
    both = rf"{copy} on {HOST}.*{series[1]}"
    for at in (0, -1):
        shutil.copy(series[1], copy)
        damaged(copy, at)
        with pytest.raises(InputError, match=f"{both}.*its beginning or its end differ"):
            copies.at_home(prepared(ds))
    copy.write_bytes(b"short")
    with pytest.raises(InputError, match=f"{both}: 5 bytes there, 10240 here"):
        copies.at_home(prepared(ds))
    copy.unlink()
    with pytest.raises(InputError, match=f"{both}: No such file"):
        copies.at_home(prepared(ds))
    # another time alone is no harm: not every program keeps it
    shutil.copy(series[1], copy)
    os.utime(copy, (1, 1))
    assert read(copies.at_home(prepared(ds)))[1] == str(copy)


def test_a_copy_that_changes_while_it_is_read_is_told(series):
    made = copies.at_home(prepared(opened(series, local_copy(series))))
    with (Path("nvme") / series[2].name).open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"nvme.*changed since it was opened"):
        list(Here().run(made, range(len(made.plan.shards)), lambda *a, **b: None))


def naive_near(source, made):
    """For every shard, frame by frame, which files it needs."""
    stops = np.cumsum([20, 20, 20])
    out = {}
    for shard in made.plan.shards:
        piece, cut = source.pieces[shard.piece], made.plan.tiles[shard.piece]
        frames = np.concatenate([tiles.frames_of(piece, box) for box in tiles.boxes(piece, cut, shard)])
        out[shard.index] = {int(np.searchsorted(stops, frame, "right")) for frame in frames}
    return out


def test_shards_go_first_where_their_files_are(series):
    rules = [
        {"hosts": ["a*"], "folder": "/x", "files": ["*_000.raw"]},
        {"hosts": ["b*"], "folder": "/x", "files": ["*_00[12].raw"]},
    ]
    source = opened(series, *rules).source
    made = prepared(opened(series))
    held = {"a*": {0}, "b*": {1, 2}}
    wanted = {
        shard: {place for place, files in held.items() if needed <= files}
        for shard, needed in naive_near(source, made).items()
    }
    found = copies.near(source, made.plan.shards, made.plan.tiles)
    assert found == {shard: places for shard, places in wanted.items() if places}
    assert {frozenset(places) for places in found.values()} == {frozenset({"a*"}), frozenset({"b*"})}
    assert copies.near(opened(series).source, made.plan.shards, made.plan.tiles) == {}


def test_chunks_know_their_files(tmp_path):
    with h5py.File("scan.h5", "w") as file:
        file.create_dataset("data", (9, 10, *FRAME), "u2", chunks=(3, 2, *FRAME), compression="gzip")[:6] = 1
    source = gpuem.open("scan.h5", copies=[{"hosts": ["a"], "folder": "/x"}]).source
    made = prepared(gpuem.open("scan.h5"))
    found = copies.near(source, made.plan.shards, made.plan.tiles)
    # the last rows were never written: nobody has to be near
    first = [shard.index for shard in made.plan.shards if shard.index < len(made.plan.shards) * 2 // 3]
    assert set(found) == set(first)


def test_arrays_have_no_files():
    made = prepared(dataset.of_array(np.ones((4, 4, *FRAME), np.uint16)))
    assert copies.at_home(made) is made


def test_a_recipe_names_them(series, tmp_path):
    text = """
[input]
path = ["scan_000.raw", "scan_001.raw", "scan_002.raw"]
scan = [6, 10]
frame = [16, 16]
dtype = "uint16"
[[input.copy]]
hosts = ["{host}"]
folder = "{folder}"
[[input.copy]]
hosts = ["node0[1-4]", "gpu*"]
folder = "/nvme/scan7"
files = ["*_00?.raw"]
[[analysis]]
kind = "sum"
[run]
device = "cpu"
[output]
path = "scan.zarr"
previews = false
"""
    rule = local_copy(series)
    Path("scan.toml").write_text(text.format(host=HOST, folder=rule["folder"]))
    ds = job.open_input(recipe.load_one(Path("scan.toml"))[0])
    assert [copy.files for copy in ds.source.copies] == [("*",), ("*_00?.raw",)]
    found, _ = gpuem.run_recipe("scan.toml")
    np.testing.assert_array_equal(found["sum/sum"].data, ds[...].sum((0, 1)))
    # the result says what was asked for, not where this machine read it
    assert [file["path"] for file in found.provenance["input"]["files"]] == [str(path) for path in series]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ('folder = "nvme"\nhosts = ["a"]', "give the whole path"),
        ('folder = "/nvme"', "hosts.*required|Field required|missing"),
        ('folder = "/nvme"\nhosts = []', "copy: .*at least 1"),
        ('folder = "/nvme"\nhosts = ["a"]\nfile = ["x"]', "did you mean 'files'"),
    ],
)
def test_mistakes_in_it_are_told(tmp_path, wrong, said):
    Path("scan.toml").write_text(
        f'[input]\npath = "a.npy"\n[[input.copy]]\n{wrong}\n[[analysis]]\nkind = "sum"\n[output]\npath = "o.zarr"\n'
    )
    with pytest.raises(RecipeError, match=rf"(?s)\[input\].*({said})"):
        recipe.load(Path("scan.toml"))


def test_near_mistakes_of_the_section_itself(tmp_path):
    Path("scan.toml").write_text(
        '[input]\npath = "a.npy"\n[[input.copies]]\nhosts = ["a"]\nfolder = "/x"\n[[analysis]]\nkind = "sum"\n'
        '[output]\npath = "o.zarr"\n'
    )
    with pytest.raises(RecipeError, match="did you mean 'copy'"):
        recipe.load(Path("scan.toml"))
