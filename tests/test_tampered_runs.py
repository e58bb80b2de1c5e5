"""Run folders that somebody changed: a resumed run leaves the right maps, or says what is wrong; never a traceback.

Somebody: a disk, an editor, another program, or one who wishes others ill.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import time

import killing
import numpy as np
import pytest
import typer
from killing import assert_same, ints, shrink, stopping, watching
from typer.testing import CliRunner

import gpuem
from gpuem import cli_status, errors, run_folder, shard_records
from gpuem.executors import ranks
from gpuem.executors.ranks import Rank

DEEP = b"[" * 100_000
WHOLE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b'"x"',
    b"true",
    b"\xff\xfe\0",
    DEEP,
    b'{"a":' * 100_000,
    b"1" * 5000,
    b"\n\n\n",
]
VALUES = [
    None, True, 0, -1, 5, 2**31, 2**63, -(2**63), 10**400, 1e9, 1e308, -0.5, float("inf"), float("nan"), "", "x",
    "\ud800", "\x1b[2J", "../../x", [], {}, [[]], [None], [1, 2, 3], {"a": None}, [[0, 10**9]], [[0, 10**18]],
]  # fmt: skip


class Site:
    """A recipe whose run was stopped half way, to be changed and put back."""

    def __init__(self, folder):
        self.ds = ints(folder)
        self.asked = [gpuem.Sum(), gpuem.VirtualDetector(outer=3), gpuem.CenterOfMass()]
        data = self.ds.source.files[0].path
        self.truth, _ = gpuem.run_recipe(killing.write_recipe(folder, data, "truth"))
        self.recipe, self.run, self.clean = killing.write_recipe(folder, data), folder / "recipe.run", folder / "clean"
        with pytest.raises(errors.ResumableError):
            gpuem.run_recipe(self.recipe, watch=watching(stopping(7)))
        # as processes that were killed leave it
        run_folder.say_launch(self.run, "job")
        mark = json.dumps({"launch": "job", "why": "", "kind": "DataError"})
        run_folder.write_file(self.run / "rank-1", mark.encode())
        shutil.copyfile(self.run / "store" / "done.jsonl", self.run / "store" / "pending.jsonl")
        self.run.rename(self.clean)

    def put_back(self):
        for path in (self.run, self.recipe.with_suffix(".zarr")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copytree(self.clean, self.run, symlinks=True)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch, 8 * 6 * 7 * 2)
        yield Site(tmp_path_factory.mktemp("site"))


@pytest.fixture
def site(half, monkeypatch):
    shrink(monkeypatch, 8 * 6 * 7 * 2)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)
    half.put_back()
    return half


def interrupt(seconds):
    """Whoever follows a run that doesn't go on has enough of it."""
    raise KeyboardInterrupt


APP = typer.Typer()
APP.command()(cli_status.status)


def check(site, *, recipe=False):
    """Ask for its state and go on with it; returns the maps, or why there are none."""
    ask(str(site.run))
    ranks_look(site)
    try:
        if recipe:
            found, _ = gpuem.run_recipe(site.recipe, resume=True)
        else:
            found = gpuem.run(site.ds, site.asked, device="cpu", threads=2, folder=site.run, resume=True)
    except errors.GpuemError as error:
        return str(error)
    assert_same(found, site.truth)
    return found


def ask(*arguments):
    """`gpuem status`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        answer = CliRunner().invoke(APP, arguments)
    assert answer.exception is None or isinstance(answer.exception, errors.GpuemError), answer.exception
    # any terminal takes it
    assert "\x1b[2J" not in answer.output
    return answer.output


def ranks_look(site):
    """What other processes of a launch read."""
    said = run_folder.read_launch(site.run)
    assert said is None or isinstance(said[0], str)
    mark = ranks._mark(site.run, 1, "job")
    assert mark is None or issubclass(ranks._error(mark), errors.GpuemError)
    run_folder.finished_shards(site.run)


def begin_anew(site):
    """Whatever lies there, a new run makes a good one of it, or says what it is that it does not touch."""
    try:
        found = gpuem.run(site.ds, site.asked, device="cpu", threads=2, folder=site.run)
    except errors.GpuemError as error:
        return str(error)
    assert_same(found, site.truth)
    return found


def test_untouched_it_goes_on(site):
    assert check(site).provenance["kept_shards"] == 7
    site.put_back()
    found = check(site, recipe=True)
    assert not isinstance(found, str), found
    assert found.provenance["kept_shards"] == 7


# ---- all that was found


NAMES = ("run.json", "launch.json", "rank-1", "events.jsonl", "prepared.json", "prepared.npz", "store/done.jsonl")


MANY = (*NAMES, "store/pending.jsonl", "store/masks.npy", "store/sums.bin")


@pytest.mark.parametrize("name", MANY)
def test_files_that_hold_something_else(site, name):
    for content in WHOLE[MANY.index(name) % 3 :: 3]:
        (site.run / name).write_bytes(content)
        found = check(site)
        if name in (
            "launch.json",
            "rank-1",
            "events.jsonl",
            "store/masks.npy",
            "store/sums.bin",
            "store/pending.jsonl",
        ):
            assert not isinstance(found, str), found
        elif name != "store/done.jsonl":
            assert "--overwrite" in found
        site.put_back()


@pytest.mark.parametrize("kind", ["folder", "nothing", "link", "pipe"])
def test_files_of_another_kind(site, tmp_path, kind):
    for name in (*MANY, "store", "alive"):
        site.put_back()
        of_another_kind(site, tmp_path, site.run / name, kind)


def of_another_kind(site, tmp_path, path, kind):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "inside").write_text("inside")
    elif kind == "link":
        path.symlink_to(precious)
    elif kind == "pipe":
        os.mkfifo(path)
    check(site)
    begin_anew(site)
    assert precious.read_text() == "precious"


RECORDS = [
    {"shard": float("inf")}, {"shard": -1}, {"shard": 10**400}, {"shard": True}, {"shard": None}, {"shard": "0"},
    {"group": 5}, {"group": [5]}, {"group": [0, 10**9]}, {"group": None}, {"group": [None]}, {"group": [0, 0]},
    {"lost": 1e9}, {"lost": [[[[0, 10**9]], "x", True, False]]}, {"lost": [[[[0, 10**18]], "x", True, False]]},
    {"lost": None}, {"lost": [5]}, {"lost": [[[5], "x", True, False]]}, {"lost": [[[[3, 1]], "x", True, False]]},
    {"at": -5}, {"at": 2**62}, {"at": 2**70}, {"at": None}, {"frames": 10**12}, {"frames": -1}, {"frames": 0},
    {"frames": 7.0}, {"check": None}, {"check": "x"}, {"seconds": 5}, {"seconds": {"read": None}}, {"worker": None},
    {"began": float("nan")}, {"ended": [1]}, {"began": 10**400},
]  # fmt: skip


def test_records_of_shards_that_can_not_be(site):
    file = site.run / "store" / "done.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    whole = [json.dumps(line).encode() for line in lines]
    assert all(shard_records.parse(line, [8] * 12, 200) for line in whole)
    for change in RECORDS:
        line = json.dumps({**lines[0], **change}).encode()
        assert shard_records.parse(line, [8] * 12, 200) is None or change in ({"at": 2**62 - 1}, {"frames": 0}), change
    for k in range(0, len(RECORDS), 7):
        site.put_back()
        (site.run / "store" / "pending.jsonl").unlink()
        changed = [{**line, **change} for line, change in zip(lines, RECORDS[k : k + 7], strict=False)]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
        assert "kept_shards" not in check(site).provenance


def test_a_record_with_a_checksum_that_fits_is_checked_all_the_same(site):
    """One who wishes ill computes checksums, too: positions outside the scan are no positions."""
    body = bytearray((site.run / "store" / "sums.bin").read_bytes())
    record = json.loads((site.run / "store" / "done.jsonl").read_text().splitlines()[0])
    body[record["at"] : record["at"] + 8] = np.int64(10**12).tobytes()
    (site.run / "store" / "sums.bin").write_bytes(body)
    from gpuem import checkpoint

    original = checkpoint._checksum
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_checksum", lambda said, partial: said.get("check", original(said, partial)))
        assert check(site).provenance["kept_shards"] == 6


EVENTS = [
    {"t": 10**400}, {"t": None}, {"t": 1e308}, {"t": float("nan")}, {"t": "x"}, {"event": None}, {"event": "shard"},
    {"shard": 10**400}, {"frames": 10**400}, {"nbytes": 10**400}, {"nbytes": -1}, {"began": 1e308, "ended": -1e308},
    {"seconds": None}, {"seconds": {"read": 10**400}}, {"seconds": {"read": 1e308}}, {"worker": None},
    {"worker": [1]}, {"worker": "\ud800"}, {"worker": "\x1b[2J"}, {"worker": "²:9" + 5000 * "9"}, {"attempt": 10**400},
    {"event": "start", "shards": 10**400, "done": 10**400}, {"event": "retry", "again_in": 10**400, "why": {"a": [1]}},
    {"event": "stop", "why": ["\ud800"]}, {"event": "lost", "worker": {}, "shards": {}}, {"event": "error", "why": 5},
    {"event": "hang", "seconds": "\x1b[2J"}, {"event": "masked", "frames": "\ud800"}, {"event": "excluded"},
    {"event": "damaged", "count": 10**400}, {"event": "worker", "worker": 10**400}, {"event": "finish", "t": -1e10},
]  # fmt: skip


@pytest.mark.parametrize("follow", [[], ["--follow"]])
def test_events_that_can_not_be(site, follow):
    file = site.run / "events.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    shard = next(k for k, line in enumerate(lines) if line["event"] == "shard")
    for change in EVENTS:
        changed = [*lines[:shard], {**lines[shard], **change}, *lines[shard + 1 :]]
        file.write_text("".join(json.dumps(line) + "\n" for line in changed))
        assert "of 12 done" in ask(str(site.run), *follow), change
    with file.open("a") as log:
        log.writelines(json.dumps({**lines[shard], **change}) + "\n" for change in EVENTS)
    assert check(site).provenance["kept_shards"] == 7
    assert "of 12 done" in ask(str(site.recipe))


def test_a_timeline_of_events_that_can_not_be(site, tmp_path):
    pytest.importorskip("matplotlib")
    lines = (site.run / "events.jsonl").read_text().splitlines()
    shard = next(json.loads(line) for line in lines if json.loads(line)["event"] == "shard")
    with (site.run / "events.jsonl").open("a") as file:
        for change in EVENTS:
            file.write(json.dumps({**shard, **change}) + "\n")
    assert "picture" in ask(str(site.run), "--timeline", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").stat().st_size > 0


@pytest.mark.parametrize("change", [
    {"identity": None}, {"identity": 5}, {"identity": []}, {"identity": {}}, {"id": 10**400}, {"id": None},
    {"shards": 10**400}, {"shards": -1}, {"shards": None}, {"frames": "x"}, {"started": None}, {"host": []},
    {"pid": 10**400}, {"pid": -1}, {"pid": "x"}, {"pid": True}, {"format": None}, {"format": {}}, {"recipe": 5},
    {"overwrite": "yes"}, {"output": None},
])  # fmt: skip
def test_descriptions_that_can_not_be(site, change):
    file = site.run / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    check(site)
    if set(change) & {"identity", "id", "overwrite"}:
        # with an older result in place, too
        site.put_back()
        file.write_text(json.dumps({**json.loads(file.read_text()), "overwrite": True, **change}))
        shutil.copytree(site.recipe.with_name("truth.zarr"), site.recipe.with_suffix(".zarr"))
        check(site, recipe=True)


@pytest.mark.parametrize("content", WHOLE, ids=lambda content: repr(content[:12]))
def test_a_launch_that_can_not_be_read_is_no_launch(site, content):
    (site.run / "launch.json").write_bytes(content)
    with pytest.raises(errors.ResumableError, match="rank 0"):
        ranks.wait_for_launch(site.run, Rank(1, 2, "job"), 0.0, sleep=Clock().sleep)
    run_folder.say_over(site.run)
    (site.run / "rank-1").write_bytes(content)
    assert ranks._mark(site.run, 1, "job") is None


class Clock:
    """Waiting takes no time."""

    def __init__(self):
        self.left = 3

    def sleep(self, seconds):
        self.left -= 1
        if not self.left:
            raise errors.ResumableError("rank 0 doesn't say anything")


@pytest.mark.parametrize("kind", ["annotations", "Any", "GpuemError", "SystemExit", "__doc__", "", "TruncatedError"])
def test_the_kind_of_a_mark_is_one_of_gpuems_errors(kind):
    assert issubclass(ranks._error({"launch": "", "why": "", "kind": kind}), errors.GpuemError)
    ranks._error({"launch": "", "why": "", "kind": kind})("words")


# ---- at random


def places(value, path=()):
    """Paths of all values inside of one."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def mutated(rng, value):
    """A value with one of the values in it changed, removed, or doubled."""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    how = rng.random()
    if how < 0.15 and isinstance(holder, dict):
        del holder[path[-1]]
    elif how < 0.25 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "\ud800", "shard", "t"])] = rng.choice(VALUES)
    else:
        holder[path[-1]] = rng.choice(VALUES)
    return value


def tamper(rng, run):
    """Change one file of a run folder."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    if not files:
        return "nothing left"
    path = rng.choice(files)
    body, how = path.read_bytes(), rng.random()
    if path.suffix in (".json", ".jsonl") or path.name == "rank-1":
        if how < 0.7 and body:
            lines = body.splitlines() if path.suffix == ".jsonl" else [body]
            k = rng.randrange(len(lines))
            try:
                lines[k] = json.dumps(mutated(rng, json.loads(lines[k]))).encode()
            except (ValueError, RecursionError):
                lines[k] = rng.choice(WHOLE)
            path.write_bytes(b"\n".join(lines) + b"\n")
        elif how < 0.8:
            path.write_bytes(rng.choice(WHOLE))
        else:
            path.write_bytes(body[: rng.randrange(len(body) + 1)])
    elif how < 0.5 and body:
        changed = bytearray(body)
        for _ in range(rng.choice((1, 8, 64))):
            changed[rng.randrange(len(body))] = rng.randrange(256)
        path.write_bytes(changed)
    elif how < 0.7:
        os.truncate(path, rng.randrange(2 * len(body) + 2))
    elif how < 0.85:
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    return path.name


def tampered(site, seed):
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tamper(rng, site.run)
    older = rng.random() < 0.2
    if older:
        shutil.copytree(site.recipe.with_name("truth.zarr"), site.recipe.with_suffix(".zarr"))
    check(site, recipe=older)
    if rng.random() < 0.3:
        begin_anew(site)


def test_any_change_leaves_the_right_maps_or_a_message(site):
    for seed in range(30):
        site.put_back()
        tampered(site, seed)


@pytest.mark.slow
def test_many_changes_leave_the_right_maps_or_a_message(site):
    for seed in range(1000, 1150):
        site.put_back()
        tampered(site, seed)


def test_honest_records_are_never_refused(half):
    frames = [8] * 12
    lines = (half.clean / "store" / "done.jsonl").read_bytes().splitlines()
    assert all(shard_records.parse(line, frames, 200) for line in lines)
