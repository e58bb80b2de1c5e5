"""Finished shards on disk: what comes back is what was kept, and whatever a crash or a disk did to it is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from crystal import planted
from hypothesis import given
from hypothesis import strategies as st
from killing import boxes, chosen, floats, ints, prepared, shrink

import gpuem
from gpuem import checkpoint, engine, errors, job, recipe, run_folder
from gpuem.checkpoint import Store
from gpuem.executors import local
from gpuem.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch, 8 * 6 * 7 * 2)
    # nobody cuts the power
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


def masked(folder):
    ds = floats(folder, bad=(0, 17, 18, 95))
    return prepared(ds, chosen(), on_error="mask")


def roi(folder):
    mask = np.random.default_rng(1).random((12, 8)) > 0.6
    mask[4] = False
    return prepared(ints(folder), chosen(), mask)


def few_frames(folder):
    np.save(folder / "few.npy", np.ones((10, 6, 7), "u2"))
    ds = gpuem.open(folder / "few.npy", scan=(3, 4), skip=-1, fit=True)
    return prepared(ds, chosen())


SCENES = {
    "ints": lambda folder: prepared(ints(folder), chosen()),
    "signed": lambda folder: prepared(ints(folder, dtype="i4"), chosen()),
    "floats": lambda folder: prepared(floats(folder), chosen()),
    "boxes": lambda folder: prepared(boxes(folder), chosen()),
    "only sums": lambda folder: prepared(ints(folder), [gpuem.Sum()]),
    "only maps": lambda folder: prepared(ints(folder), [gpuem.CenterOfMass()]),
    "region": roi,
    "masked": masked,
    "few frames": few_frames,
}


def keep(folder, made):
    """A store of all shards, and they themselves."""
    store, partials = Store(folder, made), list(local.run(made))
    store.begin()
    for partial in partials:
        store.write(partial)
    store.close()
    return {partial.shard: partial for partial in partials}


def opened(folder, made):
    store = Store(folder, made)
    store.look()
    return store


def assert_equal(found, expected):
    """Bit for bit, but for the type of sums, which may be wider."""
    assert found.shard == expected.shard
    assert np.array_equal(found.positions, expected.positions)
    one, other = found.sums, expected.sums
    for a, b in zip(
        (one.masks, one.images, one.moments, one.maximum, *one.fits),
        (other.masks, other.images, other.moments, other.maximum, *other.fits),
        strict=True,
    ):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    assert one.total.tobytes() == other.total.astype(one.total.dtype).tobytes()
    assert len(found.lost) == len(expected.lost)
    for a, b in zip(found.lost, expected.lost, strict=True):
        assert a.indices.dtype == b.indices.dtype
        assert np.array_equal(a.indices, b.indices)
        assert (a.message, a.broken, a.reading) == (b.message, b.broken, b.reading)
    assert (found.worker, found.began, found.ended) == (expected.worker, expected.began, expected.ended)


@pytest.mark.parametrize("scene", SCENES)
def test_what_comes_back_is_what_was_kept(tmp_path, scene):
    made = SCENES[scene](tmp_path)
    partials = keep(tmp_path / "store", made)
    assert len(partials) > 1
    store = opened(tmp_path / "store", made)
    assert sorted(store.finished) == sorted(partials)
    assert store.verify() == []
    for shard, partial in partials.items():
        assert_equal(store.read(shard), partial)
    if scene == "masked":
        assert store.broken() == [shard for shard, partial in sorted(partials.items()) if partial.lost]
        assert len(store.broken()) == 3
    if scene == "region":
        assert any(partial.positions.size == 0 for partial in partials.values())
    if scene == "boxes":
        assert any((np.diff(partial.positions) != 1).any() for partial in partials.values())
        assert any(partial.lost for partial in partials.values())


def test_fits_come_back():
    _, frames, _ = planted((2, 16))
    np.save("crystal.npy", frames)
    options = recipe.run_section(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, 8 * frames[0, 0].nbytes)
        _, made = job.begin(gpuem.open("crystal.npy"), [gpuem.Strain()], options)
    partials = keep(Path("store"), made)
    store = opened(Path("store"), made)
    assert len(partials) > 2
    assert store.verify() == []
    for shard, partial in partials.items():
        assert partial.sums.fits[0].size
        assert_equal(store.read(shard), partial)


def test_numpy_opens_the_maps(tmp_path):
    made = SCENES["ints"](tmp_path)
    partials = keep(tmp_path / "store", made)
    maps = np.load(tmp_path / "store" / "masks.npy", mmap_mode="r")
    assert maps.shape == (96, 2)
    for partial in partials.values():
        assert np.array_equal(maps[partial.positions], partial.sums.masks)
    assert np.load(tmp_path / "store" / "moments.npy").dtype == np.int64


@pytest.mark.parametrize("many", [0, 3, 16, 10**6])
@pytest.mark.parametrize("scene", ["region", "boxes", "floats"])
def test_rows_that_lie_apart_leave_those_between_them_alone(tmp_path, monkeypatch, scene, many):
    monkeypatch.setattr(checkpoint, "MANY", many)
    made = SCENES[scene](tmp_path)
    partials = {partial.shard: partial for partial in local.run(made)}
    store = Store(tmp_path / "store", made)
    store.begin()
    for shard in sorted(partials, key=lambda k: (k * 7) % len(partials)):
        store.write(partials[shard])
    store.close()
    for other in (many, 16):
        monkeypatch.setattr(checkpoint, "MANY", other)
        store = opened(tmp_path / "store", made)
        assert store.verify() == []
        for shard, partial in partials.items():
            assert_equal(store.read(shard), partial)


def test_a_store_is_written_on_after_it_was_read(tmp_path):
    """As every resumed run does."""
    made = SCENES["ints"](tmp_path)
    partials = {partial.shard: partial for partial in local.run(made)}
    store = Store(tmp_path / "store", made)
    for shard in (7, 2, 11):
        store = opened(tmp_path / "store", made)
        assert store.verify() == []
        store.begin()
        store.write(partials[shard])
        store.close()
    store = opened(tmp_path / "store", made)
    assert store.verify() == []
    assert list(store.finished) == [7, 2, 11]
    for shard in (7, 2, 11):
        assert_equal(store.read(shard), partials[shard])


def grouped(folder, made, sizes=(3, 1, 4)):
    """A store of shards whose images were added up in groups, and the partial results before that."""
    partials = sorted(local.run(made), key=lambda partial: partial.shard)
    store = Store(folder, made)
    store.begin()
    first = 0
    for size in sizes:
        store.write(*engine.folded(made, partials[first : first + size]))
        first += size
    store.close()
    return partials[:first]


@pytest.mark.parametrize("scene", ["ints", "signed", "region", "few frames", "only sums"])
def test_images_that_were_added_up_make_the_same_totals(tmp_path, scene):
    made = SCENES[scene](tmp_path)
    partials = grouped(tmp_path / "store", made, (2, 100))
    store = opened(tmp_path / "store", made)
    assert store.verify() == []
    assert sorted(store.finished) == [partial.shard for partial in partials]
    found = engine.combine(made, [store.read(shard) for shard in reversed(range(len(partials)))]).sums
    expected = engine.combine(made, partials).sums
    for name in ("masks", "images", "moments", "total", "maximum"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert expected.total.any()
    assert sum(store.read(shard).sums.total.size > 0 for shard in store.finished) == 1 + (len(partials) > 2)


def test_sums_of_floats_are_never_added_up_out_of_turn(tmp_path):
    made = SCENES["floats"](tmp_path)
    partials = list(local.run(made))
    assert engine.folded(made, partials) == partials


def test_a_group_is_whole_or_nothing_of_it_counts(tmp_path):
    """The image of one is the image of all: a shard that is missing must not be added to it once more."""
    made = SCENES["ints"](tmp_path)
    grouped(tmp_path / "store", made)
    path = tmp_path / "store" / "done.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for gone in range(8):
        path.write_bytes(b"".join(line for k, line in enumerate(lines) if k != gone))
        store = opened(tmp_path / "store", made)
        store.verify()
        mates = {0, 1, 2} if gone < 3 else {3} if gone == 3 else {4, 5, 6, 7}
        assert sorted(store.finished) == sorted(set(range(8)) - mates)
        store.close()
    path.write_bytes(b"".join(lines))
    store = opened(tmp_path / "store", made)
    assert store.forget([5]) == [4, 5, 6, 7]
    assert sorted(store.finished) == [0, 1, 2, 3]


def test_a_line_torn_at_any_byte_is_no_line(tmp_path):
    made = SCENES["masked"](tmp_path)
    partials = keep(tmp_path / "whole", made)
    whole = (tmp_path / "whole" / "done.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    begins = np.cumsum([0, *map(len, lines)])
    order = [json.loads(line)["shard"] for line in lines]
    # of the last two lines every byte, of the others some
    torn = [*range(int(begins[-3]), len(whole) + 1), *range(0, int(begins[-3]), 97)]
    shutil.copytree(tmp_path / "whole", tmp_path / "store")
    for at in torn:
        (tmp_path / "store" / "done.jsonl").write_bytes(whole[:at])
        store = opened(tmp_path / "store", made)
        expected = order[: int(np.searchsorted(begins, at, "right")) - 1]
        assert list(store.finished) == expected
        if at % 50 == 0 or at == len(whole) - 1:
            # what is written next begins at its place
            assert store.verify() == []
            store.begin()
            rest = [shard for shard in order if shard not in expected]
            for shard in rest:
                store.write(partials[shard])
            store.close()
            again = opened(tmp_path / "store", made)
            assert sorted(again.finished) == sorted(order)
            assert again.verify() == []


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, 24 * 6 * 7 * 2)
        folder = tmp_path_factory.mktemp("flipped")
        made = masked(folder)
        yield folder / "store", made, keep(folder / "store", made)


def test_a_bit_that_flipped_in_what_is_said_of_a_shard_is_found(flipped):
    folder, made, _ = flipped
    file = folder / "done.jsonl"
    whole = file.read_bytes()
    record = json.loads(whole.splitlines()[0])
    first, length, same = record["shard"], whole.index(b"\n"), 0
    try:
        for at in range(length):
            for bit in range(8):
                changed = bytearray(whole)
                changed[at] ^= 1 << bit
                file.write_bytes(changed)
                store = opened(folder, made)
                store.verify()
                # 1e-05 and 1E-05 are the same
                assert store.finished.get(first) in (None, record), changed[:length]
                same += first in store.finished
                assert len(store.finished) >= len(made.plan.shards) - 2
                store.close()
    finally:
        file.write_bytes(whole)
    assert same < 5


@given(
    name=st.sampled_from(["masks.npy", "images.npy", "moments.npy", "sums.bin", "done.jsonl"]),
    at=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
)
def test_a_byte_that_changed_anywhere_is_found_or_says_nothing(flipped, name, at, flip):
    whole, made, partials = flipped
    folder = whole.with_name("changed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    changed = bytearray((folder / name).read_bytes())
    changed[int(at * len(changed))] ^= flip
    (folder / name).write_bytes(changed)
    store = opened(folder, made)
    store.verify()
    missing = set(partials) - set(store.finished)
    # a byte between two lines belongs to both
    assert len(missing) <= 2
    for shard in store.finished:
        assert_equal(store.read(shard), partials[shard])
    # and the run can go on
    store.begin()
    for shard in missing:
        store.write(partials[shard])
    store.close()
    store = opened(folder, made)
    assert store.verify() == []
    for shard, partial in partials.items():
        assert_equal(store.read(shard), partial)


@pytest.mark.parametrize("name", ["masks.npy", "images.npy", "moments.npy", "sums.bin", "done.jsonl"])
@pytest.mark.parametrize("damage", ["gone", "empty", "half", "header"])
def test_a_file_that_is_not_what_it_was(tmp_path, name, damage):
    made = SCENES["floats"](tmp_path)
    partials = keep(tmp_path / "store", made)
    file = tmp_path / "store" / name
    if damage == "gone":
        file.unlink()
    elif damage == "header":
        file.write_bytes(b"\xff" * 20 + file.read_bytes()[20:])
    else:
        os.truncate(file, 0 if damage == "empty" else file.stat().st_size // 2)
    store = opened(tmp_path / "store", made)
    store.verify()
    left = set(store.finished)
    assert len(left) < len(partials) or (damage == "header" and name.endswith(".npy"))
    store.begin()
    for shard in set(partials) - left:
        store.write(partials[shard])
    store.close()
    store = opened(tmp_path / "store", made)
    assert store.verify() == []
    for shard in partials:
        assert_equal(store.read(shard), partials[shard])
    if name.endswith(".npy"):
        assert np.load(file).shape[0] == 96


def test_no_room_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    made = SCENES["ints"](tmp_path)
    store = Store(tmp_path / "store", made)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=checkpoint.nbytes(made) - 1))
    with pytest.raises(errors.OutputError, match="make room"):
        store.begin()


def test_the_room_that_is_asked_for_is_enough(tmp_path):
    for scene in ("ints", "only sums", "boxes"):
        made = SCENES[scene](tmp_path)
        keep(tmp_path / scene, made)
        used = sum(file.stat().st_size for file in (tmp_path / scene).iterdir())
        assert used <= checkpoint.nbytes(made) + 2000


FULL = """
    import resource, signal, sys
    sys.path.insert(0, {tests!r})
    import pytest, killing
    from pathlib import Path
    from gpuem.checkpoint import Store
    from gpuem.executors import local
    killing.shrink(pytest.MonkeyPatch(), 8 * 6 * 7 * 2)
    made = killing.prepared(killing.ints(Path(".")), killing.chosen())
    partials = list(local.run(made))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in range(0, {most}, {step}):
        store = Store(Path(f"store{{limit}}"), made)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        count = 0
        try:
            store.begin()
            for partial in partials:
                store.write(partial)
                count += 1
        except OSError as error:
            assert error.errno == 27, error
        try:
            store.close()
        except OSError:
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store = Store(Path(f"store{{limit}}"), made)
        store.look()
        assert store.verify() == [], limit
        assert len(store.finished) == count, (limit, count, len(store.finished))
        # there is room again
        store.begin()
        for partial in partials:
            if partial.shard not in store.finished:
                store.write(partial)
        store.close()
        store = Store(Path(f"store{{limit}}"), made)
        store.look()
        assert store.verify() == []
        assert len(store.finished) == len(partials)
        print(count)
"""


def test_files_that_may_grow_no_more_at_any_size(tmp_path):
    """A limit on the size of files stands for a full disk: writes end in the middle of anything."""
    made = SCENES["ints"](tmp_path)
    keep(tmp_path / "store", made)
    most = max(file.stat().st_size for file in (tmp_path / "store").iterdir())
    code = FULL.format(tests=os.path.dirname(__file__), most=most + 200, step=max(1, most // 60))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 12
    assert len(set(counts)) > 6


# ---- the folder


def test_two_processes_are_refused(tmp_path):
    with RunFolder(tmp_path / "run"), pytest.raises(errors.OutputError) as error:
        RunFolder(tmp_path / "run")
    assert f"process {os.getpid()} on" in str(error.value)
    assert "wait for it, end it" in str(error.value)
    with RunFolder(tmp_path / "run"):
        pass
    ranks = [RunFolder(tmp_path / "run", rank=k) for k in range(3)]
    for rank in ranks:
        with rank:
            pass


def test_what_others_keep_in_the_folder_is_never_touched(tmp_path):
    """Somebody may give the folder that holds all of a thesis."""
    theirs = [
        "thesis.tex", "store/groceries.txt", "store-x/done.jsonl", "stores.npy", "events.txt", "locksmith", "alive.mp3",
        "rank-and-file.doc", "store/sub/masks.npy",
    ]  # fmt: skip
    for name in theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("precious")
    frames = np.ones((4, 5, 6, 7), "u2")
    frames_bad = frames.astype("f4")
    frames_bad[0, 0, 0, 0] = np.nan
    with pytest.raises(errors.DataError):
        gpuem.run(frames_bad, [gpuem.Sum()], device="cpu", folder=tmp_path)
    with pytest.raises(errors.RecipeError):
        gpuem.run(frames, [gpuem.Sum()], device="cpu", folder=tmp_path, roi=(0, 0, 0, 0))
    gpuem.run(frames, [gpuem.Sum()], device="cpu", folder=tmp_path)
    gpuem.run(frames, [gpuem.Sum()], device="cpu", folder=tmp_path)
    with RunFolder(tmp_path) as folder:
        folder.clear()
        folder.finish()
    for name in theirs:
        assert (tmp_path / name).read_text() == "precious", name


def test_a_run_that_failed_at_once_leaves_nothing(tmp_path):
    frames = np.full((4, 5, 6, 7), np.nan, "f4")
    with pytest.raises(errors.DataError):
        gpuem.run(frames, [gpuem.Sum()], device="cpu", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_log_can_not_be_written_and_the_run_goes_on(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    write, fail = os.write, [None]

    def failing(descriptor, data):
        if descriptor != folder._log or fail[0] is None:
            return write(descriptor, data)
        if fail[0] == "half":
            return write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", failing)
    with folder:
        folder.report("start", k=1)
        for how in ("full", "half", "full", "half", None):
            fail[0] = how
            folder.report("retry", how=how)
        folder.report("finish")
    folder.report("late", after="the end")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line)["event"])
        except ValueError:
            continue
    assert whole == ["start", "retry", "finish"]


def test_a_description_that_can_not_be_read_is_not_taken_for_none(tmp_path):
    """Else hours of finished shards would be forgotten because a server didn't answer."""
    assert run_folder.description(tmp_path) is None
    file = tmp_path / "run.json"
    for text in ("{", "[]", '{"identity": 3}', "\xff"):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(errors.InputError, match=r"run.json: damaged, or begin anew with --overwrite"):
            run_folder.description(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(errors.InputError, match="try again"):
        run_folder.description(tmp_path)
