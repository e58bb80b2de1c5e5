"""Results on disk: whole or as they were, whatever ends the process; checked values; only gpuem's own files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import gpuem
from gpuem import atomic, result_store, results, staging
from gpuem.analyses import Map
from gpuem.axes import Axis
from gpuem.results import Results

xarray = pytest.importorskip("xarray", reason="xarray is not installed")


def a_map(data, *names, step=1.0):
    data = np.asarray(data)
    axes = tuple(Axis(name, size, step, "nm") for name, size in zip(names, data.shape, strict=True))
    return Map(data, axes, "counts", "a test")


def some(value=1, more=()):
    maps = {
        "adf": a_map(np.full((3, 4), value), "scan_y", "scan_x"),
        "com/x": a_map(np.full((3, 4), value * 0.5), "scan_y", "scan_x"),
        "valid": a_map(np.ones((3, 4), bool), "scan_y", "scan_x"),
    }
    return Results({**maps, **dict.fromkeys(more, maps["adf"])}, {"value": value})


def files_below(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def assert_is(path, results):
    found = gpuem.load_results(path)
    assert list(found) == list(results)
    for name in results:
        assert np.array_equal(found[name].data, results[name].data, equal_nan=True)
    assert found.provenance == results.provenance


# ---- values are checked


@pytest.mark.parametrize("damage", ["gone", "empty", "short", "flipped"])
@pytest.mark.parametrize("name", ["adf", "com/x", "valid"])
def test_a_damaged_chunk_is_named_with_its_map(name, damage):
    some().save("out.zarr")
    file = {"adf": "adf/adf/c/0/0", "com/x": "com/x/c/0/0", "valid": "valid/c/0/0"}[name]
    path = Path("out.zarr", file)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes({"empty": b"", "short": content[:-1], "flipped": flipped}[damage])
    with pytest.raises(gpuem.InputError, match="damaged gpuem result") as error:
        gpuem.load_results("out.zarr")
    assert f"map {name!r}" in str(error.value)
    assert file in str(error.value)


@pytest.mark.parametrize("value", [0, -0.0, np.nan, False])
def test_maps_of_one_value_are_stored_and_checked_as_any(value):
    # Zarr leaves chunks of the fill value away, and then nobody can tell them from lost ones
    data = np.full((6, 7), value)
    Results({"flat": a_map(data, "y", "x")}).save("out.zarr")
    back = gpuem.load_results("out.zarr")["flat"].data
    assert back.tobytes() == data.tobytes()
    Path("out.zarr/flat/flat/c/0/0").unlink()
    with pytest.raises(gpuem.InputError, match="map 'flat': flat/flat/c/0/0: No such file"):
        gpuem.load_results("out.zarr")


@settings(max_examples=15)
@given(
    st.sampled_from(["u1", ">u2", "i8", "f4", ">f8", "c16", "bool"]),
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(0, 1 << 16),
)
def test_any_type_and_shape_comes_back(tmp_path_factory, dtype, shape, seed):
    path = tmp_path_factory.mktemp("any") / "out.zarr"
    data = np.random.default_rng(seed).integers(0, 99, shape).astype(dtype)
    Results({"a/b": a_map(data, *"wzyx"[: len(shape)])}).save(path)
    back = gpuem.load_results(path)["a/b"].data
    assert back.shape == data.shape
    assert back.dtype == data.dtype.newbyteorder("=")
    assert np.array_equal(back, data)


def test_large_maps_are_chunked_and_compressed(monkeypatch):
    monkeypatch.setattr(result_store, "CHUNK_NBYTES", 4000)
    data = np.arange(60 * 50 * 3.0).reshape(60, 50, 3) // 100
    small = np.arange(100.0).reshape(10, 10)
    Results({"m/large": a_map(data, "y", "x", "k"), "m/small": a_map(small, "v", "u")}).save("out.zarr")
    array = zarr.open_array("out.zarr/m/large")
    assert array.chunks == (15, 7, 3) or np.prod(array.chunks) * 8 <= 4000
    stored = sum(p.stat().st_size for p in Path("out.zarr/m/large/c").rglob("*") if p.is_file())
    assert stored < data.nbytes / 2
    assert zarr.open_array("out.zarr/m/small").chunks == (10, 10)
    assert np.array_equal(gpuem.load_results("out.zarr")["m/large"].data, data)
    next(p for p in Path("out.zarr/m/large/c").rglob("*") if p.is_file()).unlink()
    with pytest.raises(gpuem.InputError, match="map 'm/large': m/large/c/"):
        gpuem.load_results("out.zarr")


@given(st.lists(st.integers(0, 10**6), max_size=5), st.sampled_from([1, 2, 8, 16]))
def test_chunks_are_small_enough_and_as_large_as_may_be(shape, itemsize):
    chunks = result_store.chunk_shape(tuple(shape), itemsize)
    nbytes = int(np.prod(chunks, dtype=object)) * itemsize
    whole = int(np.prod([max(1, size) for size in shape], dtype=object)) * itemsize
    assert nbytes <= result_store.CHUNK_NBYTES
    assert nbytes == whole or 3 * nbytes > result_store.CHUNK_NBYTES


# ---- axes


def test_equally_named_axes_of_other_sizes_do_not_collide():
    maps = {
        "m/a": a_map(np.ones((3, 4)), "scan_y", "k"),
        "m/b": a_map(np.ones((3, 5)), "scan_y", "k"),
        "m/c": a_map(np.ones((3, 4)), "scan_y", "k", step=2.0),
        "m/square": a_map(np.ones((4, 4)), "k", "k"),
        "m/n": a_map(np.ones(2), "a"),
        "other": a_map(np.ones((7, 4)), "scan_y", "k"),
        "valid": a_map(np.ones((3, 9), bool), "scan_y", "scan_x"),
    }
    Results(maps).save("out.zarr")
    found = gpuem.load_results("out.zarr")
    for name, item in maps.items():
        assert found[name].axes == item.axes
    group = xarray.open_zarr("out.zarr", group="m", consolidated=False)
    assert group["a"].dims[1] == "k"
    assert {group[name].dims[1] for name in "abc"} == {"k", "k_2", "k_3"}
    for name in ("a", "b", "c"):
        assert np.array_equal(group[group[name].dims[1]].values, maps[f"m/{name}"].axes[1].coordinates)
    assert group["n"].dims == ("a_2",), "a is a map"
    tree = xarray.open_datatree("out.zarr", engine="zarr", consolidated=False)
    assert tree["other"]["other"].dims == ("scan_y_2", "k")
    assert tree["valid"].dims == ("scan_y", "scan_x")


@pytest.mark.filterwarnings("error")
def test_other_readers_see_no_alien_files():
    some().save("out.zarr")
    list(zarr.open_group("out.zarr", mode="r").members(max_depth=None))
    xarray.open_datatree("out.zarr", engine="zarr", consolidated=False).load()


@pytest.mark.parametrize("name", ["../x", "a/../b", "/a", "a//b", "", "a/", "x\0y", "zarr.json", "a/" + "n" * 300])
def test_names_that_no_file_can_have(name):
    Path("inside").mkdir()
    with pytest.raises(gpuem.OutputError, match="can't be the name"):
        Results({name: a_map(np.ones(3), "x")}).save("inside/out.zarr")
    assert os.listdir("inside") == []


@pytest.mark.parametrize("names", [("a", "a/a"), ("valid", "valid/x"), ("m/a", "m/a/b")])
def test_maps_that_would_lie_in_one_place(names):
    with pytest.raises(gpuem.OutputError, match="would lie in one place"):
        Results({name: a_map(np.ones(3), "x") for name in names}).save("out.zarr")


# ---- only gpuem's own files


def test_other_files_in_a_result_stay_and_its_own_are_replaced():
    some(1, more=["old"]).save("out.zarr")
    mine = {"notes.txt": b"1", "adf/mine.py": b"2", "adf/adf/c/0/extra": b"3", "sub/deep/data.npy": b"4"}
    for name, content in mine.items():
        path = Path("out.zarr", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    some(2, more=["new"]).save("out.zarr", overwrite=True)
    assert_is("out.zarr", some(2, more=["new"]))
    after = files_below("out.zarr")
    assert {name: after[name] for name in mine} == mine
    assert not Path("out.zarr/old").exists()
    assert os.listdir() == ["out.zarr"]


def test_a_file_in_the_way_is_not_replaced():
    some(1).save("out.zarr")
    Path("out.zarr/new/new").mkdir(parents=True)
    Path("out.zarr/new/new/zarr.json").write_text("mine")
    before = files_below("out.zarr")
    with pytest.raises(gpuem.OutputError, match=r"new/new/zarr.json: in the way, and not written by gpuem"):
        some(2, more=["new"]).save("out.zarr", overwrite=True)
    assert files_below("out.zarr") == before
    assert os.listdir() == ["out.zarr"]


@pytest.mark.parametrize("what", ["adf", "adf/adf/zarr.json", "adf/adf/c"])
def test_symlinks_in_a_result_are_not_followed(what):
    some(1).save("out.zarr")
    Path("elsewhere").mkdir()
    link = Path("out.zarr", what)
    link.rename(Path("elsewhere", "moved"))
    link.symlink_to(Path("elsewhere/moved").absolute())
    before = files_below("elsewhere")
    with pytest.raises(gpuem.OutputError):
        some(2).save("out.zarr", overwrite=True)
    assert files_below("elsewhere") == before
    assert link.is_symlink()


ALIEN = [
    {"gpuem": "0.1"}, {"gpuem": ["maps"]}, {"gpuem": None}, {"gpuem": {}}, {"gpuem": {"maps": [], "provenance": {}}},
    {"made by": "gpuem"}, {"gpuem": {"format": "gpuem result", "version": 1, "id": "0" * 32, "record": "zarr.json"}},
    {"gpuem": {"format": "gpuem result", "version": True, "id": "0" * 32, "record": "../zarr.json"}},
]  # fmt: skip


@pytest.mark.parametrize("attributes", ALIEN)
def test_a_folder_that_mentions_gpuem_is_no_result(attributes):
    group = zarr.open_group("mine.zarr", mode="w", zarr_format=3)
    group.create_array("valid", data=np.arange(5.0))
    group.attrs.update(attributes)
    before = files_below("mine.zarr")
    assert not results.is_result(Path("mine.zarr"))
    with pytest.raises(gpuem.OutputError, match="never overwritten"):
        some().save("mine.zarr", overwrite=True)
    assert files_below("mine.zarr") == before


def test_what_xarray_copies_from_a_result_is_no_result():
    some().save("out.zarr")
    xarray.open_zarr("out.zarr", consolidated=False).to_zarr("mine.zarr", consolidated=False, zarr_format=3)
    assert "gpuem" in json.loads(Path("mine.zarr/zarr.json").read_text())["attributes"]
    before = files_below("mine.zarr")
    with pytest.raises(gpuem.OutputError, match="never overwritten"):
        some().save("mine.zarr", overwrite=True)
    assert files_below("mine.zarr") == before


def test_results_without_a_record_are_read_and_never_replaced(caplog):
    some().save("out.zarr")
    root = zarr.open_group("out.zarr")
    about = root.attrs["gpuem"]
    root.attrs["gpuem"] = {"maps": about["maps"], "provenance": about["provenance"]}
    Path("out.zarr/valid", result_store.RECORD).unlink()
    assert_is("out.zarr", some())
    assert "kept no checksums" in caplog.text
    with pytest.raises(gpuem.OutputError, match=r"earlier version of gpuem.* never overwritten.* move it away"):
        some().save("out.zarr", overwrite=True)


def test_a_result_whose_record_is_gone_is_damaged():
    some().save("out.zarr")
    Path("out.zarr/valid", result_store.RECORD).unlink()
    with pytest.raises(gpuem.InputError, match="its record is missing or damaged"):
        gpuem.load_results("out.zarr")
    with pytest.raises(gpuem.OutputError, match="record is missing or damaged, so it is never overwritten"):
        some().save("out.zarr", overwrite=True)


def test_the_input_inside_of_a_result_keeps_it_from_being_replaced():
    some().save("out.zarr")
    np.save("out.zarr/scan.npy", np.ones((3, 4, 5, 6), "u1"))
    found = gpuem.run(gpuem.open("out.zarr/scan.npy"), [gpuem.Sum()], device="cpu")
    os.symlink("out.zarr", "link.zarr")
    for name in ("out.zarr", "link.zarr", "link.zarr/../out.zarr"):
        with pytest.raises(gpuem.OutputError):
            found.save(name, overwrite=True)
    assert Path("out.zarr/scan.npy").exists()


# ---- names of results


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "/", "..", "x/..", "", "."])
@pytest.mark.parametrize("overwrite", [False, True])
def test_places_where_no_result_can_be(name, overwrite):
    # of a NUL the path itself is refused
    with pytest.raises(gpuem.RecipeError if "\0" in name else gpuem.OutputError):
        some().save(name, overwrite=overwrite)
    assert os.listdir() == []


def test_loops_and_dangling_links():
    os.symlink("loop", "loop")
    os.symlink("nothing", "dangling")
    for name in ("loop", "loop/out.zarr", "dangling"):
        for overwrite in (False, True):
            with pytest.raises(gpuem.OutputError):
                some().save(name, overwrite=overwrite)
    assert sorted(os.listdir()) == ["dangling", "loop"]


# ---- whatever ends the process


CANARY = {"notes.txt": b"mine", "a/deep/x": b"y"}
OLD = {"a/c/0": b"old", "a/zarr.json": b"old", "gone/c": b"old", "gone/zarr.json": b"old", "zarr.json": b"old"}
NEW = {"a/c/0": b"new", "a/zarr.json": b"new", "more/c": b"new", "more/zarr.json": b"new", "zarr.json": b"new"}
CALLS = ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")


def write_files(folder, files):
    for name, content in files.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Path(folder, name).write_bytes(content)


def replace_it():
    """What `Results.save` does, with files that cost nothing."""
    target = Path("out.zarr").absolute()
    with staging.staged(target) as place:
        write_files(place / "new", NEW)
        staging.exchange(place, target, list(OLD), list(NEW))


def at_call(step, act, names=CALLS):
    """Call `act` with something that happens at the n-th call of these functions; how often they were called."""
    calls = [0]

    def counted(function):
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == step:
                act()
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counted(getattr(os, name)))
        replace_it()
    return calls[0]


def start_again():
    shutil.rmtree("out.zarr", ignore_errors=True)
    write_files("out.zarr", OLD | CANARY)


def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_the_next_one_clears_up():
    start_again()
    count, seen = at_call(0, None), []
    start_again()
    for step in range(1, count + 1):
        pid = os.fork()
        if pid == 0:
            try:
                at_call(step, lambda: os._exit(9))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        staging.restore(Path.cwd())
        now = files_below("out.zarr")
        assert now in (OLD | CANARY, NEW | CANARY), step
        seen.append(now == OLD | CANARY)
        # killed before it could say whose it is, a process leaves an empty folder
        assert not [name for name in os.listdir() if name.startswith(".") and os.listdir(name)], step
        if not seen[-1]:
            start_again()
    assert count > 30
    # first always the old ones, then always the new ones
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 2


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_an_error_at_any_step_leaves_what_was_there(kind):
    start_again()
    count, seen = at_call(0, None), []
    start_again()

    def fail():
        raise kind(errno.EIO, os.strerror(errno.EIO))

    for step in range(1, count + 1):
        try:
            at_call(step, fail)
        except (kind, gpuem.OutputError):
            seen.append(files_below("out.zarr"))
        if files_below("out.zarr") != OLD | CANARY:
            assert files_below("out.zarr") == NEW | CANARY
            start_again()
        staging.restore(Path.cwd())
        leftovers = [name for name in os.listdir() if name.startswith(".")]
        # what could not be removed is not from a dead process
        for name in leftovers:
            shutil.rmtree(name)
    assert seen.count(OLD | CANARY) > 20


@pytest.mark.parametrize("there", [False, True])
def test_a_save_that_fails_leaves_nothing(monkeypatch, there):
    if there:
        some(1).save("out.zarr")
    before = files_below(".")

    def failing(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic, "sync_tree", failing)
    with pytest.raises(gpuem.OutputError, match="Input/output error; what was there before is as it was"):
        some(2).save("out.zarr", overwrite=True)
    assert files_below(".") == before
    assert os.listdir() == (["out.zarr"] if there else [])


def leave(**changes):
    """A staging folder as a killed process leaves it."""
    pid = os.fork()
    if pid == 0:
        with staging.staged(Path("out.zarr").absolute()) as place:
            (place / "new").mkdir()
            (place / "new" / "x").write_text("x")
            os._exit(0)
    os.waitpid(pid, 0)
    (place,) = Path.cwd().glob(f"{staging.PREFIX}*")
    owner = json.loads((place / "owner.json").read_text())
    (place / "owner.json").write_text(json.dumps({**owner, **changes}))
    return place


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({}, False),
        ({"boot": "another"}, False),
        ({"host": "another"}, True),
        ({"id": "0" * 32}, True),
        ({"format": "mine"}, True),
        ({"more": 1}, True),
        ({"target": "../x"}, True),
    ],
)
def test_only_what_a_dead_process_of_this_machine_left_is_removed(changes, stays, caplog):
    place = leave(**changes)
    some().save("other.zarr")
    assert place.exists() == stays
    if "host" in changes:
        assert "on another saves out.zarr, or was ended" in caplog.text


def test_what_a_living_process_writes_stays():
    with staging.staged(Path("out.zarr").absolute()) as place:
        some().save("other.zarr")
        assert place.exists()
        # in a container its number means nothing, but the lock does
        owner = json.loads((place / "owner.json").read_text())
        child = subprocess.Popen(["true"])
        child.wait()
        with (place / "owner.json").open("r+") as file:
            file.write(json.dumps({**owner, "pid": child.pid}))
            file.truncate()
        some().save("other.zarr", overwrite=True)
        assert place.exists()
    assert not place.exists()


def test_folders_that_only_look_like_it_stay():
    for name in (".out.zarr.partial-123", f"{staging.PREFIX}{'0' * 32}", f"{staging.PREFIX}mine"):
        Path(name).mkdir()
        Path(name, "mine").write_text("x")
    before = files_below(".")
    some().save("out.zarr")
    after = files_below(".")
    assert {name: after[name] for name in before} == before


# ---- power loss


def recorded(monkeypatch, act):
    """What happens to names and bytes, in its order: (call, path)."""
    told = []

    def tell(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            if name in ("fsync", "fdatasync"):
                told.append(("sync", os.readlink(f"/proc/self/fd/{arguments[0]}")))
            else:
                told.append((name, *(os.path.abspath(a) for a in arguments[:2])))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    with monkeypatch.context() as monkeypatch:
        for name in ("fsync", "fdatasync", "rename", "replace", "unlink", "rmdir"):
            tell(name)
        act()
    return told


@pytest.mark.parametrize("there", [False, True])
def test_bytes_are_on_the_disk_before_their_names_and_old_ones_go_last(monkeypatch, there):
    if there:
        some(1).save("out.zarr")
    told = recorded(monkeypatch, lambda: some(2).save("out.zarr", overwrite=there))
    target = os.path.abspath("out.zarr")
    moves = [(k, *call[1:]) for k, call in enumerate(told) if call[0] in ("rename", "replace")]
    into = [(k, a, b) for k, a, b in moves if f"{b}/".startswith(f"{target}/")]
    first, last = min(k for k, *_ in into), max(k for k, *_ in into)
    synced = {call[1]: k for k, call in reversed(list(enumerate(told))) if call[0] == "sync"}
    new = os.path.dirname(into[0][1]) if not there else into[0][1].partition("/new/")[0] + "/new"
    new = into[0][1] if not there else new
    for name in files_below(target):
        assert synced[os.path.join(new, name)] < first, name
    # the folder that holds the new name
    parent = os.path.dirname(target) if not there else target
    after = [k for k, call in enumerate(told) if call == ("sync", parent) and k > last]
    assert after
    if there:
        # the old files are only moved until then
        old = [k for k, call in enumerate(told) if call[0] == "unlink" and "/replaced/" in call[1]]
        assert not old or min(old) > after[0]


# ---- a disk that is really full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"a small file system can't be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_what_was_there(small_disk, there):
    path = small_disk / "out.zarr"
    if there:
        some(1).save(path)
    before = sorted(os.listdir(small_disk)), files_below(small_disk)
    large = Results({"large": a_map(np.random.default_rng(1).random((200, 400)), "y", "x")})
    with pytest.raises(gpuem.OutputError, match="the disk is full"):
        large.save(path, overwrite=True)
    assert (sorted(os.listdir(small_disk)), files_below(small_disk)) == before


def test_the_record_says_what_is_there():
    some().save("out.zarr")
    record = result_store.read_record(Path("out.zarr"))
    found = files_below("out.zarr")
    assert set(result_store.own_files(record)) == set(found)
    for name, (size, check) in record["files"].items():
        assert (len(found[name]), zlib.crc32(found[name])) == (size, check)


def test_folders_are_made_durably(monkeypatch):
    told = recorded(monkeypatch, lambda: atomic.make_folder(Path("a/b").absolute()))
    assert {call[1] for call in told} == {os.getcwd(), os.path.abspath("a")}
