"""The folder of a run: who may work in it, what a resumed run must agree in, what becomes of one that is removed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time

import killing
import numpy as np
import pytest
from killing import assert_same, chosen, ints, shrink, stopping, watching
from typer.testing import CliRunner

import gpuem
from gpuem import cli, cli_status, errors, identity, run_folder
from gpuem.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shrink(monkeypatch, 8 * 6 * 7 * 2)
    monkeypatch.setattr(run_folder, "_without_locks", set())


def half(tmp_path, **options):
    with pytest.raises(errors.ResumableError):
        gpuem.run(ints(tmp_path), chosen(), device="cpu", folder=tmp_path / "run", progress=stopping(5), **options)
    return gpuem.open(tmp_path / "ints.npy")


# ---- locks


def test_a_lock_that_was_removed_meanwhile_keeps_nobody_away(tmp_path, monkeypatch):
    """Between opening and locking, the one that held it ends and removes it: the file that is there counts."""
    flock, first = fcntl.flock, RunFolder(tmp_path / "run")
    first.__enter__()
    ended = []

    def slowly(descriptor, how):
        if not ended:
            ended.append(first.__exit__(None, None, None))
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slowly)
    with RunFolder(tmp_path / "run"):
        monkeypatch.undo()
        assert ended
        with pytest.raises(errors.OutputError, match=f"process {os.getpid()} on"):
            RunFolder(tmp_path / "run")


def test_a_lock_in_the_place_of_another_is_locked_too(tmp_path, monkeypatch):
    flock, exchanged = fcntl.flock, []

    def exchanging(descriptor, how):
        flock(descriptor, how)
        if not exchanged:
            exchanged.append(os.fstat(descriptor).st_ino)
            (tmp_path / "run" / "lock").rename(tmp_path / "old")
            (tmp_path / "run" / "lock").touch()

    monkeypatch.setattr(fcntl, "flock", exchanging)
    with RunFolder(tmp_path / "run"):
        monkeypatch.undo()
        assert (tmp_path / "run" / "lock").stat().st_ino != exchanged[0]
        with pytest.raises(errors.OutputError, match="works on this run"):
            RunFolder(tmp_path / "run")


def test_what_a_rank_holds_is_not_removed(tmp_path):
    with RunFolder(tmp_path / "run") as leader, RunFolder(tmp_path / "run", rank=1):
        (tmp_path / "run" / "lock-2").touch()
        leader.finish()
        assert (tmp_path / "run" / "lock-1").exists()
        assert not (tmp_path / "run" / "lock-2").exists()
        for rank in (None, 1):
            with pytest.raises(errors.OutputError, match="works on this run"):
                RunFolder(tmp_path / "run", rank=rank)
    assert not list((tmp_path / "run").glob("lock*"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of_once(tmp_path, monkeypatch, caplog, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for name in ("one", "two", "one"):
        gpuem.run(ints(tmp_path), [gpuem.Sum()], device="cpu", folder=tmp_path / name)
    told = [record for record in caplog.records if "locks are not supported here" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]
    assert "nothing keeps a second process" in told[0].message


@pytest.mark.parametrize("name", ["lock", "events.jsonl"])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_files_of_another_kind_are_refused(tmp_path, name, kind):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "run" / name
    {"folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "precious"), "pipe": lambda: os.mkfifo(path)}[
        kind
    ]()
    with pytest.raises(errors.OutputError, match=f"run/{name}: (a symbolic link|exists, and no record)"):
        gpuem.run(ints(tmp_path), [gpuem.Sum()], device="cpu", folder=tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


# ---- removed meanwhile


@pytest.mark.parametrize("how", ["removed", "moved", "another in its place", "the store", "emptied"])
def test_a_result_is_saved_though_its_run_folder_is_gone(tmp_path, caplog, how):
    path, folder = killing.write_recipe(tmp_path, ints(tmp_path).source.files[0].path), tmp_path / "recipe.run"
    truth, _ = gpuem.run_recipe(killing.write_recipe(tmp_path, "ints.npy", "truth"))
    shards = [0]

    def progress(frames):
        shards[0] += 1
        if shards[0] != 4:
            return
        if how == "moved":
            folder.rename(tmp_path / "elsewhere")
        elif how == "the store":
            shutil.rmtree(folder / "store")
        elif how == "emptied":
            shutil.rmtree(folder / "store")
            for item in folder.iterdir():
                item.unlink()
        else:
            shutil.rmtree(folder)
        if how.startswith("another"):
            (folder / "store").mkdir(parents=True)
            (folder / "run.json").write_text("somebody else's")
            (folder / "store" / "done.jsonl").write_text("somebody else's\n")

    found, where = gpuem.run_recipe(path, watch=watching(progress))
    assert_same(found, truth)
    assert_same(gpuem.load_results(where), truth)
    assert found.provenance["identity"]["data"]["format"] == "npy"
    told = [record.message for record in caplog.records if "removed meanwhile" in record.message]
    assert len(told) == (0 if how in ("the store", "emptied") else 1)
    if how.startswith("another"):
        assert (folder / "run.json").read_text() == "somebody else's"
        assert (folder / "store" / "done.jsonl").read_text() == "somebody else's\n"
        with pytest.raises(errors.OutputError, match=r"no record in .* says that gpuem wrote it"):
            gpuem.run_recipe(path, resume=True)
        return
    assert_same(gpuem.run_recipe(path, resume=True)[0], truth)


@pytest.mark.parametrize("what", ["run", "run/store"])
def test_a_run_that_is_stopped_without_its_folder_does_not_promise_anything(tmp_path, what):
    def progress(frames):
        shutil.rmtree(tmp_path / what)
        raise KeyboardInterrupt

    with pytest.raises(errors.ResumableError, match="was removed meanwhile: nothing is kept; run it again"):
        gpuem.run(ints(tmp_path), chosen(), device="cpu", folder=tmp_path / "run", progress=progress)


def test_status_follows_files_that_vanish(tmp_path, monkeypatch):
    now = time.time()
    (tmp_path / "x.run").mkdir()
    for k in range(3):
        line = {"t": now, "event": "start", "shards": 9}
        (tmp_path / "x.run" / f"events-{k}.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / "x.run" / f"alive-{k}").touch()
    steps = iter([lambda: (tmp_path / "x.run" / "events-1.jsonl").unlink(), lambda: shutil.rmtree(tmp_path / "x.run")])
    monkeypatch.setattr(cli_status.time, "sleep", lambda seconds: next(steps)())
    answer = CliRunner().invoke(cli.app, ["status", str(tmp_path / "x.run"), "--follow"])
    assert answer.exit_code == 0, answer.output
    assert "the folder of the run is gone" in answer.output
    assert answer.exception is None


def test_a_log_that_vanishes_between_listing_and_reading(tmp_path, monkeypatch):
    from gpuem import status

    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "events-1.jsonl").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(status, "read_regular", lambda *arguments: (_ for _ in ()).throw(FileNotFoundError(2, "gone")))
    log = status.Log(tmp_path).read()
    assert (log.events, log.shards, log.broken, log.unreadable) == ([], [], 0, {})


# ---- what must be the same


def test_code_that_changed_is_refused_by_name(tmp_path, monkeypatch):
    ds = half(tmp_path)
    real = identity.code

    def changed(module="gpuem"):
        return "0123456789abcdef" if module == "gpuem" else real(module)

    monkeypatch.setattr(identity, "code", changed)
    with pytest.raises(errors.RecipeError, match=rf"code: gpuem: {real()} then, 0123456789abcdef now"):
        gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True)
    monkeypatch.undo()
    shrink(monkeypatch, 8 * 6 * 7 * 2)
    gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True)


def test_the_checksum_of_the_code_is_that_of_all_sources(tmp_path, monkeypatch):
    from pathlib import Path

    package = Path(gpuem.__file__).parent
    copy = tmp_path / "gpuem"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(package.parent / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(identity.gpuem, "__file__", str(copy / "__init__.py"))
    seen = set()
    for name in ("", "gpuem/engine.py", "gpuem/analyses/com.py", "gpuem/executors/local.py", "gpuem/new.py", "kernels"):
        if name == "kernels":
            name = str(next(iter(sorted((tmp_path / "kernels").glob("*.cu")))).relative_to(tmp_path))
        if name:
            with (tmp_path / name).open("a") as file:
                file.write("\n# changed\n")
        identity.code.cache_clear()
        seen.add(identity.code())
    assert len(seen) == 6
    # what is compiled or kept beside it is none of it
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "engine.cpython-311.pyc").write_bytes(b"x")
    identity.code.cache_clear()
    assert identity.code() in seen
    identity.code.cache_clear()


def test_old_folders_are_refused_with_a_word(tmp_path):
    ds = half(tmp_path)
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    for number in (None, 1, 3, "x", [1]):
        content.pop("format", None)
        file.write_text(json.dumps(content if number is None else {**content, "format": number}))
        with pytest.raises(
            errors.InputError, match=r"another version of gpuem \(format .*, this one knows 2\).*--overwrite"
        ):
            gpuem.run(ds, chosen(), device="cpu", folder=tmp_path / "run", resume=True)


@pytest.mark.parametrize("then, now, words", [
    ({"k": {"a": 1, "b": 2}}, {"k": {"a": 1, "b": 3}}, "k: b: 2 then, 3 now"),
    ({"k": [{"a": {"c": 1}}]}, {"k": [{"a": {"c": None}}]}, "k: [0].a.c: 1 then, None now"),
    ({}, {"k": "x"}, "k: nothing then, x now"),
    ({"k": {"a": 1}}, {"k": {}}, "k: a: 1 then, nothing now"),
    ({"k": [1, 2]}, {"k": [1, 3, 4]}, "k: 2 entries, [1] 2 then, 3 entries, [1] 3 now"),
    ({"k": [1]}, {"k": [1, 4]}, "k: 1 entries, [1] nothing then, 2 entries, [1] 4 now"),
    ({"k": 1}, {"k": True}, "k: 1 then, True now"),
    ({"k": 5 * ["same"]}, {"k": 4 * ["same"] + ["other"]}, "k: [4]: same then, other now"),
])  # fmt: skip
def test_differences_name_the_key_and_both_values(then, now, words):
    assert identity.differences(then, now) == [words]


def test_long_values_are_cut_where_they_differ(tmp_path):
    one = "/data/" + 300 * "a" + "/x.raw" + 300 * "b"
    found = identity.differences({"k": [one]}, {"k": [one.replace("x.raw", "y.raw")]})
    before, after = found[0].removeprefix("k: [0]: ").removesuffix(" now").split(" then, ")
    assert before != after
    assert "x.raw" in before
    assert "y.raw" in after
    assert len(found[0]) < 400
    # one that is the beginning of the other
    before, after = identity.differences({"k": 500 * "a"}, {"k": 500 * "a" + "b"})[0].split(" then, ")
    assert "b" in after
    assert "b" not in before


def test_a_recipe_says_which_key_differs(tmp_path):
    path = killing.write_recipe(tmp_path, ints(tmp_path).source.files[0].path)
    with pytest.raises(errors.ResumableError):
        gpuem.run_recipe(path, watch=watching(stopping(5)))
    path.write_text(path.read_text().replace("outer = 3", "outer = 2"))
    with pytest.raises(errors.RecipeError, match=r"analyses: \[1\]\.outer: 3\.0 then, 2\.0 now"):
        gpuem.run_recipe(path, resume=True)


# ---- an older result, and an unfinished run that is to replace it


def replaced(tmp_path, change=lambda text: text, stop=5):
    """An older result, and a run with --overwrite that was stopped; the recipe, the older maps."""
    ints(tmp_path)
    path = killing.write_recipe(tmp_path, "ints.npy")
    older, _ = gpuem.run_recipe(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(errors.ResumableError, match="to go on: the same command with --resume"):
        gpuem.run_recipe(path, overwrite=True, watch=watching(stopping(stop)))
    return path, older


@pytest.mark.parametrize("change", [lambda text: text, lambda text: text.replace("outer = 3", "outer = 2")])
def test_an_unfinished_run_wins_over_an_older_result(tmp_path, change):
    path, older = replaced(tmp_path, change)
    found, where = gpuem.run_recipe(path, resume=True)
    assert set(killing.runs_of_shards(tmp_path / "recipe.run").values()) == {1}
    assert found.provenance["kept_shards"] == 5
    assert gpuem.load_results(where).provenance["run"] == found.provenance["run"] != older.provenance["run"]
    other = killing.write_recipe(tmp_path, "ints.npy", "other")
    other.write_text(change(other.read_text()))
    assert_same(found, gpuem.run_recipe(other)[0])
    # and then it is finished
    again, _ = gpuem.run_recipe(path, resume=True)
    assert again.provenance["run"] == found.provenance["run"]


def test_stopped_several_times_it_goes_on(tmp_path):
    path, _ = replaced(tmp_path, stop=3)
    with pytest.raises(errors.ResumableError):
        gpuem.run_recipe(path, resume=True, watch=watching(stopping(6)))
    found, _ = gpuem.run_recipe(path, resume=True)
    assert set(killing.runs_of_shards(tmp_path / "recipe.run").values()) == {1}
    assert found.provenance["kept_shards"] > 3


def test_the_recipe_of_the_older_result_finds_it_finished(tmp_path):
    path, older = replaced(tmp_path, lambda text: text.replace("outer = 3", "outer = 2"))
    changed = path.read_text()
    path.write_text(changed.replace("outer = 2", "outer = 3"))
    found, _ = gpuem.run_recipe(path, resume=True)
    assert_same(found, older)


def test_a_third_recipe_is_told_what_differs_and_loses_nothing(tmp_path):
    path, _ = replaced(tmp_path, lambda text: text.replace("outer = 3", "outer = 2"))
    kept = path.read_text()
    path.write_text(kept.replace("outer = 2", "outer = 1"))
    with pytest.raises(errors.RecipeError, match=r"analyses: \[1\]\.outer: 3\.0 then, 1\.0 now"):
        gpuem.run_recipe(path, resume=True)
    path.write_text(kept)
    found, _ = gpuem.run_recipe(path, resume=True)
    assert found.provenance["kept_shards"] == 5


def test_saved_and_not_tidied_up_it_is_finished(tmp_path, monkeypatch):
    """The process ends between saving the result and removing what it kept."""
    ints(tmp_path)
    path = killing.write_recipe(tmp_path, "ints.npy")
    gpuem.run_recipe(path)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda folder: None)
        found, _ = gpuem.run_recipe(path, overwrite=True)
    assert killing.kept(tmp_path / "recipe.run") == 12
    again, _ = gpuem.run_recipe(path, resume=True)
    assert again.provenance["run"] == found.provenance["run"]
    assert len(killing.events(tmp_path / "recipe.run", "start")) == 1
    assert not (tmp_path / "recipe.run" / "store").exists()


def test_a_result_that_nobody_said_to_replace_stays(tmp_path):
    """It came there after the run was stopped."""
    ints(tmp_path)
    path = killing.write_recipe(tmp_path, "ints.npy")
    with pytest.raises(errors.ResumableError):
        gpuem.run_recipe(path, watch=watching(stopping(5)))
    other, where = gpuem.run_recipe(killing.write_recipe(tmp_path, "ints.npy", "other"))
    shutil.copytree(where, tmp_path / "recipe.zarr")
    found, _ = gpuem.run_recipe(path, resume=True)
    assert found.provenance["run"] == other.provenance["run"]


def test_a_batch_goes_on_with_what_it_was_to_replace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in range(3):
        np.save(f"scan{k}.npy", np.random.default_rng(k).integers(0, 99, (12, 8, 6, 7)).astype("u2"))
    path = killing.write_recipe(tmp_path, "scan*.npy", output="{name}.zarr")
    gpuem.run_recipes(path)
    with pytest.raises(errors.ResumableError):
        gpuem.run_recipes(path, overwrite=True, watch=watching(stopping(12 + 5)))
    before = {name: gpuem.load_results(f"{name}.zarr").provenance["run"] for name in ("scan0", "scan1", "scan2")}
    found = gpuem.run_recipes(path, resume=True)
    after = {name: found[name].load().provenance for name in before}
    assert after["scan0"]["run"] == before["scan0"]
    assert after["scan2"]["run"] == before["scan2"]
    assert after["scan1"]["run"] != before["scan1"]
    assert after["scan1"]["kept_shards"] == 5
