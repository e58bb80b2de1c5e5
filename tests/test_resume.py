"""Runs that are stopped or killed at any moment and go on: the bits of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import killing
import numpy as np
import pytest
from crystal import planted
from killing import assert_same, boxes, chosen, events, floats, ints, runs_of_shards, shrink, stopping, watching

import gpuem
from gpuem import errors, identity, result_store, results, run_folder
from gpuem.executors import local

SHARD = 8 * 6 * 7 * 2


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch, SHARD)
    # nobody cuts the power
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


@pytest.fixture
def begun(monkeypatch):
    """Numbers of shards that were begun."""
    seen, run_shard = [], local.run_shard

    def counted(job, index, **options):
        seen.append(index)
        return run_shard(job, index, **options)

    monkeypatch.setattr(local, "run_shard", counted)
    return seen


def scene(name, folder):
    """A data set and what else is said of its run."""
    if name == "region":
        mask = np.random.default_rng(1).random((12, 8)) > 0.6
        return ints(folder), {"roi": mask}
    if name == "masked":
        return floats(folder, bad=(0, 17, 18, 95)), {"on_error": "mask"}
    return {"ints": ints, "floats": floats, "boxes": boxes}[name](folder), {}


# ---- in this process


@pytest.mark.parametrize("name", ["ints", "floats", "boxes", "region", "masked"])
def test_stopped_after_any_number_of_shards(tmp_path, begun, name):
    ds, options = scene(name, tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu", threads=2, **options)
    count = len(set(begun))
    assert count >= 10
    for k in range(1, count + 1, 1 if name in ("ints", "floats") else 4):
        folder = tmp_path / f"run{k}"
        begun.clear()
        with pytest.raises(errors.ResumableError, match=f"stopped by Ctrl-C. {k} of {count} shards are finished"):
            gpuem.run(ds, chosen(), device="cpu", threads=2, folder=folder, progress=stopping(k), **options)
        assert events(folder)[-1]["event"] == "stop"
        assert events(folder)[-1]["done"] == k
        found = gpuem.run(ds, chosen(), device="cpu", threads=1 + k % 4, folder=folder, resume=True, **options)
        assert_same(found, expected)
        assert set(runs_of_shards(folder).values()) == {1}, "what was kept is not run again"
        # two in work and four that wait to be combined
        assert len(begun) - count <= 6
        assert found.provenance["lost"] == expected.provenance["lost"]
        assert found.provenance["frames"] == expected.provenance["frames"]
        assert [event["done"] for event in events(folder, "start")] == [0, k]


def test_stopped_after_every_single_shard(tmp_path):
    ds, options = scene("floats", tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu", threads=3, **options)
    threads = 1
    for resume in (False, *[True] * 100):
        threads = threads % 4 + 1
        done = killing.kept(tmp_path / "run")
        try:
            found = gpuem.run(
                ds, chosen(), device="cpu", threads=threads, folder=tmp_path / "run", resume=resume,
                # shards that were there already are told of too
                progress=stopping(done + 1), **options,
            )  # fmt: skip
            break
        except errors.ResumableError:
            continue
    else:
        # the last one is stopped as well, when all is there
        found = gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True, **options)
    assert_same(found, expected)
    assert set(runs_of_shards(tmp_path / "run").values()) == {1}


def test_strain_goes_on_with_what_it_saw_at_first(tmp_path, monkeypatch):
    _, frames, _ = planted((2, 16))
    np.save(tmp_path / "crystal.npy", frames)
    shrink(monkeypatch, 4 * frames[0, 0].nbytes)
    ds, asked = gpuem.open(tmp_path / "crystal.npy"), [gpuem.Strain(), gpuem.Sum()]
    expected = gpuem.run(ds, asked, device="cpu", threads=2)
    for k in (1, 4):
        with pytest.raises(errors.ResumableError):
            gpuem.run(ds, asked, device="cpu", threads=2, folder=tmp_path / "run", resume=k > 1, progress=stopping(k))
    found = gpuem.run(ds, asked, device="cpu", threads=1, folder=tmp_path / "run", resume=True)
    assert_same(found, expected)


def test_damaged_shards_are_run_again(tmp_path):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    with pytest.raises(errors.ResumableError):
        gpuem.run(ds, chosen(), device="cpu", threads=2, folder=tmp_path / "run", progress=stopping(8))
    file = tmp_path / "run" / "store" / "moments.npy"
    body = bytearray(file.read_bytes())
    first = json.loads((tmp_path / "run" / "store" / "done.jsonl").read_text().splitlines()[0])["shard"]
    body[128 + 8 * 24 * first] ^= 4
    file.write_bytes(body)
    assert_same(gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True), expected)
    assert events(tmp_path / "run", "damaged")[0]["shards"] == [first]
    assert runs_of_shards(tmp_path / "run")[first] == 2


def half(tmp_path, ds, analyses=None, **options):
    with pytest.raises(errors.ResumableError):
        gpuem.run(
            ds, analyses or chosen(), **{"device": "cpu", "threads": 2, "folder": tmp_path / "run", **options},
            progress=stopping(5),
        )  # fmt: skip


def rewritten(path, change):
    """Write a file anew with its old time."""
    stat = path.stat()
    body = bytearray(path.read_bytes())
    change(body)
    path.write_bytes(body)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_must_be_as_it_was(tmp_path, monkeypatch):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    half(tmp_path, ds)

    def refused(match, ds=ds, analyses=None, **options):
        with pytest.raises(errors.RecipeError, match=match) as error:
            gpuem.run(ds, analyses or chosen(), **{"device": "cpu", "folder": tmp_path / "run", **options}, resume=True)
        assert "--overwrite" in str(error.value)
        assert str(tmp_path / "run") in str(error.value)

    refused("analyses: ", analyses=chosen()[:-1])
    refused("analyses: ", analyses=[*chosen()[:-1], gpuem.CenterOfMass(radius=2)])
    refused("analyses: ", analyses=chosen(seed=1))
    refused("region of interest: ", roi=(0, 12, 0, 7))
    refused("data: ", ds=gpuem.open(tmp_path / "ints.npy", scan=(96,)))
    refused("axes: ", ds=gpuem.open(tmp_path / "ints.npy", calibration={"scan_step": 2.0, "scan_unit": "nm"}))
    refused("correction: ", ds=ds.corrected(dead=[(1, 1)]))
    monkeypatch.setattr("gpuem.job.version", lambda: "99.0")
    refused("gpuem: .* then, 99.0 now")
    monkeypatch.undo()
    shrink(monkeypatch, SHARD // 2)
    refused("cuts: ")
    shrink(monkeypatch, SHARD)

    path = tmp_path / "ints.npy"
    rewritten(path, lambda body: body.__setitem__(len(body) - 1, body[-1] ^ 1))
    refused("ends of the files: ", ds=gpuem.open(path))
    rewritten(path, lambda body: body.__setitem__(len(body) - 1, body[-1] ^ 1))
    os.utime(path, ns=(1, 1))
    refused("files: ", ds=gpuem.open(path))
    os.utime(path, ns=(ds.source.files[0].mtime_ns,) * 2)
    # and it is still there to go on with
    assert events(tmp_path / "run")[-1]["event"] == "stop"
    assert_same(
        gpuem.run(ds, chosen(), device="cpu", threads=3, memory="2 GB", folder=tmp_path / "run", resume=True,
                  patience=3.0, on_error="mask"),
        expected,
    )  # fmt: skip


def test_a_device_of_another_kind_is_refused(tmp_path):
    made = killing.prepared(ints(tmp_path), chosen())
    then = identity.of_cuts(made)
    made.facts["device"] = "cuda"
    with pytest.raises(errors.RecipeError, match="device: cpu then, cuda now"):
        identity.refuse_another(tmp_path, then, identity.of_cuts(made))


def test_arrays_in_memory_are_never_taken_for_the_same(tmp_path):
    frames = np.ones((12, 8, 6, 7), "u2")
    half(tmp_path, frames)
    with pytest.raises(errors.RecipeError, match="in memory"):
        gpuem.run(2 * frames, chosen(), device="cpu", folder=tmp_path / "run", resume=True)


def test_frames_that_were_masked_are_an_error_again_where_errors_stop_the_run(tmp_path):
    ds = floats(tmp_path, bad=(3,))
    half(tmp_path, ds, on_error="mask", threads=1)
    with pytest.raises(errors.DataError, match="frame 3: NaN"):
        gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True)
    found = gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True, on_error="mask")
    assert_same(found, gpuem.run(ds, chosen(), device="cpu", on_error="mask"))


def test_a_broken_frame_met_late_is_masked_without_beginning_anew(tmp_path):
    ds = floats(tmp_path, bad=(90,))
    with pytest.raises(errors.DataError, match="frame 90"):
        gpuem.run(ds, chosen(), device="cpu", threads=1, folder=tmp_path / "run")
    assert events(tmp_path / "run")[-1]["event"] == "error"
    assert killing.kept(tmp_path / "run") >= 8
    found = gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True, on_error="mask")
    assert set(runs_of_shards(tmp_path / "run").values()) == {1}
    assert_same(found, gpuem.run(ds, chosen(), device="cpu", on_error="mask"))


def test_a_description_that_is_unreadable_does_not_cost_what_is_finished(tmp_path):
    ds = ints(tmp_path)
    half(tmp_path, ds)
    whole = (tmp_path / "run" / "run.json").read_bytes()
    (tmp_path / "run" / "run.json").write_bytes(whole[:100])
    with pytest.raises(errors.InputError, match="damaged"):
        gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True)
    assert killing.kept(tmp_path / "run") == 5
    (tmp_path / "run" / "run.json").write_bytes(whole)
    assert_same(
        gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True),
        gpuem.run(ds, chosen(), device="cpu"),
    )


# ---- recipes


def half_recipe(tmp_path, **changes):
    ds = ints(tmp_path)
    path = killing.write_recipe(tmp_path, ds.source.files[0].path, **changes)
    with pytest.raises(errors.ResumableError, match="to go on: the same command with --resume"):
        gpuem.run_recipe(path, watch=watching(stopping(5)))
    return path


def test_a_recipe_goes_on_and_leaves_only_its_log(tmp_path):
    path = half_recipe(tmp_path)
    with pytest.raises(errors.OutputError, match=r"5 shards of an unfinished run .* --resume goes on .* --overwrite"):
        gpuem.run_recipe(path)
    assert killing.kept(tmp_path / "recipe.run") == 5
    found, where = gpuem.run_recipe(path, resume=True)
    left = {file.name for file in (tmp_path / "recipe.run").iterdir()}
    assert left == {".gpuem-files.json", "run.json", "events.jsonl"}
    assert [event["event"] for event in events(tmp_path / "recipe.run", "start", "stop", "finish")] == [
        "start", "stop", "start", "finish",
    ]  # fmt: skip
    # once more: it is there
    begun = where.stat().st_mtime_ns
    again, _ = gpuem.run_recipe(path, resume=True)
    assert_same(again, found)
    assert where.stat().st_mtime_ns == begun
    # but not where something else is asked for
    path.write_text(path.read_text().replace("outer = 3", "outer = 2"))
    with pytest.raises(errors.RecipeError, match="analyses"):
        gpuem.run_recipe(path, resume=True)
    other, _ = gpuem.run_recipe(path, overwrite=True)
    assert not np.array_equal(other["virtual"].data, found["virtual"].data)


def test_resume_without_anything_begins_and_overwrite_forgets(tmp_path):
    path = half_recipe(tmp_path)
    path.write_text(path.read_text().replace("outer = 3", "outer = 2"))
    found, where = gpuem.run_recipe(path, overwrite=True)
    assert len(events(tmp_path / "recipe.run", "start")) == 1
    assert results.is_result(where)
    fresh = killing.write_recipe(tmp_path, "ints.npy", "fresh")
    fresh.write_text(fresh.read_text().replace("outer = 3", "outer = 2"))
    assert_same(gpuem.run_recipe(fresh, resume=True)[0], found)


def test_another_process_on_the_same_run_is_refused(tmp_path):
    path, refused = killing.write_recipe(tmp_path, ints(tmp_path).source.files[0].path), []

    def progress(frames):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(errors.OutputError) as error:
                gpuem.run_recipe(path, **options)
            refused.append(str(error.value))

    found, _ = gpuem.run_recipe(path, watch=watching(progress))
    assert found.provenance["frames"]["read"] == 96
    assert "works on this run" in refused[1]


def test_a_result_that_can_not_be_saved_is_not_lost(tmp_path, monkeypatch):
    path = killing.write_recipe(tmp_path, ints(tmp_path).source.files[0].path)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(result_store, "write", full)
        with pytest.raises(errors.ResumableError, match=r"the disk is full.*All shards are finished.*--resume"):
            gpuem.run_recipe(path)
    assert killing.kept(tmp_path / "recipe.run") == 12
    last = events(tmp_path / "recipe.run")[-1]
    assert last["event"] == "stop"
    assert "disk is full" in last["why"]
    found, _ = gpuem.run_recipe(path, resume=True)
    assert set(runs_of_shards(tmp_path / "recipe.run").values()) == {1}
    other = killing.write_recipe(tmp_path, "ints.npy", "other")
    assert_same(found, gpuem.run_recipe(other)[0])


def test_the_folder_says_that_somebody_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.02)
    ds, seen = ints(tmp_path), set()

    def progress(frames):
        time.sleep(0.05)
        seen.add((tmp_path / "run" / "alive").stat().st_mtime_ns)

    gpuem.run(ds, [gpuem.Sum()], device="cpu", folder=tmp_path / "run", progress=progress)
    assert len(seen) > 6
    assert not (tmp_path / "run" / "alive").exists()
    assert "gpuem-alive" not in [thread.name for thread in threading.enumerate()]


# ---- processes


def data_and_truth(tmp_path):
    """A file of 48 shards of float pixels, and its undisturbed result."""
    frames = np.random.default_rng(5).lognormal(0, 5, (24, 8, 6, 7)).astype("f4")
    np.save(tmp_path / "data.npy", frames)
    truth, _ = gpuem.run_recipe(killing.write_recipe(tmp_path, "data.npy", "truth"))
    return killing.write_recipe(tmp_path, "data.npy"), truth


def kill_at_random(tmp_path, kills, seed):
    """Kill runs of one recipe one after the other; then let it end."""
    rng = random.Random(seed)
    path, truth = data_and_truth(tmp_path)
    folder, begun = tmp_path / "recipe.run", tmp_path / "begun"
    for _ in range(kills):
        process = killing.start(path, "--resume", slow=0.03, begun=begun)
        before = killing.kept(folder)
        if rng.random() < 0.7:
            # in the middle; else anywhere, also while it starts
            killing.wait_for(lambda: killing.kept(folder) > before or not alive(process), process)  # noqa: B023
        time.sleep(rng.uniform(0, 0.15) if killing.kept(folder) > before else rng.uniform(0, 2.0))
        process.kill()
        process.communicate()
    process = killing.start(path, "--resume", begun=begun)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same(gpuem.load_results(tmp_path / "recipe.zarr"), truth)
    count = json.loads((folder / "run.json").read_text())["shards"]
    assert count >= 40
    # two in work, four that wait to be kept
    assert len(begun.read_text().split()) - count <= 6 * kills
    assert not (folder / "store").exists()
    return out


def alive(process):
    return process.poll() is None


def test_killed_eight_times(tmp_path):
    kill_at_random(tmp_path, 8, seed=1)


@pytest.mark.slow
def test_killed_twenty_times(tmp_path):
    kill_at_random(tmp_path, 20, seed=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_that_can_go_on(tmp_path, number):
    path, truth = data_and_truth(tmp_path)
    folder = tmp_path / "recipe.run"
    process = killing.start(path, slow=0.03)
    killing.wait_for(lambda: killing.kept(folder) > 3, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"stopped by {name}" in err
    assert "to go on: the same command with --resume" in err
    assert "Traceback" not in err
    last = events(folder)[-1]
    assert last["event"] == "stop"
    assert name in last["why"]
    assert last["done"] == killing.kept(folder)
    assert not (folder / "alive").exists()
    process = killing.start(path, "--resume")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert_same(gpuem.load_results(tmp_path / "recipe.zarr"), truth)
    assert set(runs_of_shards(folder).values()) == {1}


def test_a_second_process_is_told_who_works_there(tmp_path):
    path, _ = data_and_truth(tmp_path)
    folder = tmp_path / "recipe.run"
    process = killing.start(path, slow=0.05)
    try:
        killing.wait_for(lambda: killing.kept(folder) > 1, process)
        with pytest.raises(errors.OutputError, match=f"process {process.pid} on"):
            gpuem.run_recipe(path, resume=True)
        assert alive(process)
        assert (folder / "alive").exists()
    finally:
        process.kill()
        process.communicate()
    assert Path(folder / "store" / "done.jsonl").exists()
