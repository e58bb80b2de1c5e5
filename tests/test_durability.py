"""Power cuts and full disks: what was said to be kept is there, and the run goes on to the same bits."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import killing
import numpy as np
import pytest
from killing import assert_same, chosen, floats, ints, prepared, shrink, stopping, watching
from power_loss import Disk

import gpuem
from gpuem import atomic, checkpoint, errors, run_folder
from gpuem.checkpoint import Store
from gpuem.executors import local

SHARD = 8 * 6 * 7 * 2


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch, SHARD)


def always(monkeypatch):
    """Sync after every shard."""
    monkeypatch.setattr(checkpoint, "SYNC_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SYNC_SHARE", 1e9)


# ---- power


def test_a_power_cut_after_any_sync_of_a_run(tmp_path, monkeypatch):
    """After each sync of a run the disk is copied as it would be found; from each copy the run goes on."""
    always(monkeypatch)
    ds = floats(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu", threads=2)
    place = tmp_path / "site"
    place.mkdir()
    states = []

    def cut(disk):
        target = tmp_path / f"cut{disk.syncs}"
        disk.restore(target)
        said = len(listed(disk.root / "run")) if (disk.root / "run").exists() else 0
        states.append((target, said))

    with monkeypatch.context() as patch:
        Disk(place, patch, cut)
        gpuem.run(ds, chosen(), device="cpu", threads=2, folder=place / "run")
    assert len(states) > 50
    kept = []
    for target, said in [*states[:: len(states) // 9], states[-1]]:
        folder = target / "run"
        there = listed(folder)
        # all that had been listed as done when the power was cut is there, and right
        assert len(there) >= said
        kept.append(len(there))
        found = gpuem.run(ds, chosen(), device="cpu", folder=folder, resume=True)
        assert_same(found, expected)
        again = [event["shard"] for event in killing.events(folder, "shard")]
        assert not set(again) & there
        assert not killing.events(folder, "damaged")
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] >= 22


def listed(folder):
    """Shards that are listed as done."""
    file = folder / "store" / "done.jsonl"
    lines = file.read_bytes().rpartition(b"\n")[0].splitlines() if file.exists() else []
    return {json.loads(line)["shard"] for line in lines}


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_no_line_is_written_before_its_rows_are_on_the_disk(tmp_path, monkeypatch, seconds):
    """Whatever else is lost: with every line that was ever written to the list, synced or not, all checksums fit."""
    monkeypatch.setattr(checkpoint, "SYNC_SECONDS", seconds)
    monkeypatch.setattr(checkpoint, "SYNC_SHARE", 1e9)
    made, place = prepared(ints(tmp_path), chosen()), tmp_path / "site"
    partials = list(local.run(made))
    place.mkdir()
    disk, pwrite, seen = Disk(place, monkeypatch), os.pwrite, []

    def writing(descriptor, data, at):
        count = pwrite(descriptor, data, at)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("done.jsonl") and len(data):
            target = tmp_path / f"cut{len(seen)}"
            disk.restore(target, also=("done.jsonl",))
            store = Store(target / "store", made)
            store.look()
            seen.append(len(store.finished))
            assert store.verify() == []
            store.close()
        return count

    monkeypatch.setattr(os, "pwrite", writing)
    store = Store(place / "store", made)
    store.begin()
    for partial in partials:
        store.write(partial)
    store.close()
    # one by one, or all at the end
    assert seen == (list(range(1, 13)) if seconds == 0 else [12])


def test_lines_that_reach_the_disk_without_their_rows_are_not_believed(tmp_path, monkeypatch):
    """Those that are not listed as done yet: the system writes what it likes first."""
    monkeypatch.setattr(checkpoint, "SYNC_SECONDS", 1e9)
    made, place = prepared(ints(tmp_path), chosen()), tmp_path / "site"
    place.mkdir()
    partials = list(local.run(made))
    disk = Disk(place, monkeypatch)
    store = Store(place / "store", made)
    store.begin()
    for partial in partials[:6]:
        store.write(partial)
    disk.restore(tmp_path / "cut", also=("pending.jsonl",))
    killed = shutil.copytree(place, tmp_path / "killed")
    store.close()
    store = Store(tmp_path / "cut" / "store", made)
    store.look()
    assert len(store.finished) == 6
    assert len(store.verify()) == 6
    store.begin()
    for partial in partials:
        if partial.shard not in store.finished:
            store.write(partial)
    store.close()
    # a process that was killed loses nothing
    store = Store(killed / "store", made)
    store.look()
    assert store.verify() == []
    assert len(store.finished) == 6
    store.begin()
    assert len(listed(killed)) == 6
    store.close()


def test_what_is_run_is_on_the_disk_before_the_first_shard_counts(tmp_path, monkeypatch):
    always(monkeypatch)
    ds, place, seen = ints(tmp_path), tmp_path / "site", []
    place.mkdir()

    def cut(disk):
        target = tmp_path / f"cut{disk.syncs}"
        disk.restore(target)
        if (target / "run" / "store").exists():
            seen.append(disk.syncs)
            assert run_folder.description(target / "run")["shards"] == 12
            assert json.loads((target / "run" / "prepared.json").read_text())["format"] == 1
            assert (target / "run" / "prepared.npz").stat().st_size > 0
        shutil.rmtree(target)

    Disk(place, monkeypatch, cut)
    gpuem.run(ds, chosen(), device="cpu", folder=place / "run")
    assert len(seen) > 20


def test_syncing_takes_a_share_of_the_time_at_most(tmp_path, monkeypatch):
    """On a disk that takes a second to sync: the clock is one that only syncing moves, and a shard a tenth."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    made = prepared(ints(tmp_path), chosen())
    partials, spent = list(local.run(made)), [0.0]

    def slow(descriptor):
        now[0] += 0.2
        spent[0] += 0.2

    monkeypatch.setattr(os, "fdatasync", slow)
    store = Store(tmp_path / "store", made)
    store.begin()
    now[0], spent[0] = 1000.0, 0.0
    for _ in range(100):
        for partial in partials:
            now[0] += 0.1
            store.write(partial)
    assert spent[0] <= 1.2 * checkpoint.SYNC_SHARE * (now[0] - 1000.0) + 1
    assert spent[0] > 0
    store.close()


def test_what_is_pending_is_synced_while_nothing_ends(tmp_path, monkeypatch):
    """The last of a burst of shards must not wait for the next, which may be long in coming."""
    monkeypatch.setattr(run_folder, "BEAT", 0.01)
    monkeypatch.setattr(checkpoint, "SYNC_SECONDS", 0.02)
    listed_then = []

    def progress(frames):
        until = time.monotonic() + 30
        while len(listed(tmp_path / "run")) < len(listed_then) + 1 and time.monotonic() < until:
            time.sleep(0.005)
        listed_then.append(len(listed(tmp_path / "run")))

    gpuem.run(ints(tmp_path), chosen(), device="cpu", threads=1, folder=tmp_path / "run", progress=progress)
    assert all(count > k for k, count in enumerate(listed_then))
    assert len(listed_then) == 12


def test_a_sync_that_fails_ends_the_run_and_lists_nothing(tmp_path, monkeypatch):
    sync, failing = os.fdatasync, []

    def fail(descriptor):
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail)
    always(monkeypatch)
    with pytest.raises(errors.ResumableError, match=r"can't be kept in .*: Input/output error"):
        gpuem.run(
            ints(tmp_path), chosen(), device="cpu", folder=tmp_path / "run", progress=lambda frames: failing.append(1)
        )
    assert len(listed(tmp_path / "run")) == 1
    failing.clear()
    monkeypatch.undo()
    shrink(monkeypatch, SHARD)
    found = gpuem.run(gpuem.open(tmp_path / "ints.npy"), chosen(), device="cpu", folder=tmp_path / "run", resume=True)
    assert found.provenance["kept_shards"] >= 1


# ---- a disk that is full


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB; root may do that."""
    mounted = []

    def mount(kilobytes):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def grow(place, kilobytes):
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)


def fill(place):
    """Take all the room that is left."""
    with (place / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def recipe_on(place, tmp_path):
    ints(tmp_path)
    return killing.write_recipe(tmp_path, "ints.npy", output=f"{place}/scan.zarr")


def test_a_run_on_a_full_disk_of_any_size_can_go_on(tmp_path, small_disk):
    truth, _ = gpuem.run_recipe(recipe_on(tmp_path, tmp_path))
    outcomes = []
    for kilobytes in (8, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160):
        place = small_disk(kilobytes)
        path = recipe_on(place, tmp_path)
        outcome, error = "done", None
        try:
            gpuem.run_recipe(path)
        except (errors.ResumableError, errors.OutputError) as found:
            outcome, error = type(found).__name__, str(found)
        outcomes.append(outcome)
        if outcome != "done":
            assert "disk is full" in error or "make room" in error
        if outcome == "ResumableError":
            assert run_folder.finished_shards(place / "scan.run") or "No shard was finished yet" in error
        grow(place, 2000)
        found, _ = gpuem.run_recipe(path, resume=True)
        assert_same(found, truth)
    assert outcomes[0] == "OutputError"
    assert "ResumableError" in outcomes
    assert outcomes == sorted(outcomes, key=["OutputError", "ResumableError", "done"].index)


def test_a_disk_that_fills_up_during_a_run(tmp_path, small_disk):
    """It ends with exit code 75, as often as it is tried, until there is room."""
    place = small_disk(1000)
    path = recipe_on(place, tmp_path)
    shards = [0]

    def progress(frames):
        shards[0] += 1
        if shards[0] == 4:
            fill(place)

    with pytest.raises(errors.ResumableError, match=r"the disk is full.*make room.*shards are finished and kept"):
        gpuem.run_recipe(path, watch=watching(progress))
    kept = run_folder.finished_shards(place / "scan.run")
    assert kept >= 4
    for _ in range(2):
        process = killing.start(path, "--resume")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 75, err
        assert "disk is full" in err
        assert "Traceback" not in err
    assert run_folder.finished_shards(place / "scan.run") == kept
    (place / "filler").unlink()
    found, _ = gpuem.run_recipe(path, resume=True)
    assert_same(found, gpuem.run_recipe(recipe_on(tmp_path, tmp_path))[0])


def test_a_description_is_whole_on_a_full_disk(tmp_path, small_disk):
    place = small_disk(100)
    atomic.write_file(place / "file", b"old")
    fill(place)
    with pytest.raises(errors.OutputError, match="the disk is full"):
        atomic.write_file(place / "file", bytes(20000))
    assert (place / "file").read_bytes() == b"old"
    assert sorted(os.listdir(place)) == ["file", "filler"]


def test_a_rank_says_why_it_ended_unless_the_disk_is_full(tmp_path, small_disk):
    from gpuem.executors import ranks
    from gpuem.executors.ranks import Rank

    place = small_disk(200)
    with run_folder.RunFolder(place / "run", rank=1) as folder:
        fill(place)
        with pytest.raises(errors.DataError, match="broken"), ranks.marked(folder, Rank(1, 2, "job")):
            raise errors.DataError("broken")
    assert not (place / "run" / "rank-1").exists()


def test_resumes_on_a_disk_with_no_room_for_its_description(tmp_path, small_disk):
    ds, place = ints(tmp_path), small_disk(400)
    with pytest.raises(errors.ResumableError):
        gpuem.run(ds, chosen(), device="cpu", folder=place / "run", progress=stopping(5))
    fill(place)
    with pytest.raises(errors.ResumableError, match="the disk is full"):
        gpuem.run(ds, chosen(), device="cpu", folder=place / "run", resume=True)
    assert run_folder.finished_shards(place / "run") >= 5
    Path(place / "filler").unlink()
    found = gpuem.run(ds, chosen(), device="cpu", folder=place / "run", resume=True)
    assert_same(found, gpuem.run(ds, chosen(), device="cpu"))
    assert np.isfinite(found["com/y"].data).all()
