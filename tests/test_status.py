"""What is said of a run from its folder: states, rates, workers, faults; broken logs; the command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest
import typer
from typer.testing import CliRunner

from gpuem import cli_status, status
from gpuem.errors import GpuemError, InputError, RecipeError
from gpuem.status import Log, progress

app = typer.Typer()
app.command()(cli_status.status)
T = 1_700_000_000.0


def start(t=0.0, shards=10, done=0):
    return {"t": T + t, "event": "start", "shards": shards, "frames": 100, "done": done, "device": "cpu"}


def shard(number, began=0.0, ended=1.0, worker="n:1:a", nbytes=10**9):
    return {
        "t": T + ended, "event": "shard", "shard": number, "worker": worker, "began": T + began, "ended": T + ended,
        "frames": 10, "nbytes": nbytes, "seconds": {"read": 0.5 * (ended - began)}, "attempt": 1,
    }  # fmt: skip


def end(event, t, **more):
    return {"t": T + t, "event": event, **more}


def write(folder, events, name="events.jsonl", alive=None, **facts):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(event) + "\n" for event in events))
    about = {"shards": 10, "frames": 100, "host": "elsewhere", "pid": 1, **facts}
    (folder / "run.json").write_text(json.dumps(about))
    if alive is not None:
        path = folder / name.replace("events", "alive").removesuffix(".jsonl")
        path.touch()
        os.utime(path, (T + alive, T + alive))
    return Log(folder).read()


@pytest.fixture
def run(tmp_path):
    return tmp_path / "scan.results.run"


# ---- states


@pytest.mark.parametrize("events, alive, now, state", [
    ([], None, 0, "empty"),
    ([start()], 1, 2, "running"),
    ([start(), shard(0)], 40, 45, "running"),
    # a log that is written to is a sign of life as well
    ([start(), shard(0, 0, 40)], 1, 45, "running"),
    ([start(), shard(0)], 1, 1 + status.SILENT_SECONDS, "silent"),
    ([start(), shard(0)], None, 500, "silent"),
    ([start(), *map(shard, range(10)), end("finish", 9, done=10)], None, 1e6, "finished"),
    ([start(), shard(0), end("stop", 3, why="SIGTERM", done=1)], None, 4, "stopped"),
    ([start(), shard(0), end("stop", 3), start(8)], 9, 10, "running"),
    ([start(), shard(0), end("stop", 3), start(8), end("error", 9, why="broken")], None, 10, "failed"),
    ([start(), shard(0), end("error", 3), start(8), end("finish", 9)], None, 10, "finished"),
])  # fmt: skip
def test_states(run, events, alive, now, state):
    found = progress(write(run, events, alive=alive), T + now)
    assert found.state == state, found.words


def test_states_in_words(run):
    assert progress(write(run, [start(), end("stop", 3, why="SIGTERM")])).words == (
        "ended early: SIGTERM. --resume goes on"
    )
    assert progress(write(run, [start(), end("error", 3, why="the disk is full")])).words == "failed: the disk is full"
    silent = progress(write(run, [start()]))
    assert "no sign of life since 20" in silent.words
    assert "--resume" in silent.words


def test_a_process_of_this_machine_that_is_gone(run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    for pid, state in ((gone.pid, "silent"), (os.getpid(), "running")):
        log = write(run, [start()], alive=0, host=platform.node(), pid=pid)
        assert progress(log, T + 30).state == state
        # right after its last beat it may be another process that goes on
        assert progress(log, T + 5).state == "running"
    assert progress(write(run, [start()], alive=0, host=platform.node(), pid=2**80), T + 30).state == "running"


def test_ranks_end_each_by_itself(run):
    half = [shard(k, worker="n:1:a") for k in range(5)], [shard(k, 0, 2, "m:1:a") for k in range(5, 10)]
    write(run, [start(), *half[0], end("finish", 5)], "events-0.jsonl")
    assert progress(write(run, [start(), half[1][0]], "events-1.jsonl", alive=6), T + 7).state == "running"
    assert progress(write(run, [start(), *half[1], end("finish", 9)], "events-1.jsonl"), T + 10).state == "finished"
    # one that died is not finished, though the other one is
    assert progress(write(run, [start(), half[1][0]], "events-1.jsonl", alive=6), T + 700).state == "silent"
    stopped = write(run, [start(), half[1][0], end("stop", 9, why="time")], "events-1.jsonl")
    (run / "alive-1").unlink()
    assert progress(stopped, T + 10).state == "stopped"


def test_a_rank_that_was_killed_does_not_hide_that_the_next_run_ended(run):
    write(run, [start(), shard(0)], "events-7.jsonl")
    found = progress(write(run, [start(50), *map(shard, range(1, 10)), end("finish", 60)], "events-0.jsonl"), T + 61)
    assert (found.state, found.done) == ("finished", 10)


# ---- numbers


def test_shards_count_once(run):
    events = [start(), *(shard(k) for k in (0, 1, 2, 1, 1)), start(50, done=3), shard(3, 50, 51), shard(2, 50, 52)]
    found = progress(write(run, events, alive=52), T + 52)
    assert (found.done, found.shards, found.nbytes) == (4, 10, 4 * 10**9)


def test_a_lost_line_is_not_a_lost_shard(run):
    # two shards were there, of which the log knows one
    found = progress(write(run, [start(), shard(0), start(50, done=2), shard(2, 50, 51)], alive=51), T + 51)
    assert found.done == 3


def test_rates_and_time_left(run):
    events = [start(shards=100), *(shard(k, k, k + 1) for k in range(60))]
    found = progress(write(run, events, alive=60, shards=100), T + 60)
    assert found.average == pytest.approx(1e9)
    assert found.now == pytest.approx(1e9, rel=0.05)
    assert found.left == pytest.approx(40, rel=0.05)
    # pauses are not work
    later = [start(9000, 100, 60), *(shard(k, 9000 + k, 9000 + k + 0.5) for k in range(60, 80))]
    found = progress(write(run, events + later, alive=9080, shards=100), T + 9080)
    assert found.average == pytest.approx(80e9 / 70)
    assert found.seconds == pytest.approx(70)
    assert progress(write(run, [start()], alive=0), T + 1).left is None


def test_workers_and_faults(run):
    log = write(run, [
        start(), end("worker", 0, worker="n:10:a"), end("worker", 0, worker="n:2:a"),
        shard(0, worker="n:2:a"), shard(1, 0, 2, worker="n:2:b"), shard(2, 1, 3, worker="n:2:a"),
        end("retry", 2, shard=3, worker="n:2:a", why="EIO", again_in=1.5),
        end("lost", 3, worker="n:2", shards=[4, 5], why="killed"), end("hang", 4, shard=6, worker="n:10:a", seconds=99),
        end("excluded", 5, worker="n:10:a", why="failed 3 times"), end("masked", 6, shard=1, frames=2, why="NaN"),
    ])  # fmt: skip
    found = progress(log)
    assert [(w.name, w.shards, w.busy, w.out) for w in found.workers] == [
        ("n:2:a", 2, 3.0, "lost"), ("n:2:b", 1, 2.0, "lost"), ("n:10:a", 0, 0, "excluded"),
    ]  # fmt: skip
    assert [fault.words for fault in found.faults] == [
        "shard 3 on n:2:a: EIO, again in 1.5 s",
        "n:2: killed; it had 2 shards in work",
        "shard 6 on n:10:a shows nothing for 99 s",
        "n:10:a: failed 3 times",
        "shard 1: 2 frames: NaN",
    ]


def test_many_shards_of_many_workers_are_quickly_told(run):
    from gpuem import timings

    events = [start(shards=16384), *(shard(k, k // 512, k // 512 + 0.9, f"n{k % 512}:1:a") for k in range(16384))]
    log = write(run, events, shards=16384)
    began = time.process_time()
    found = progress(Log(log.folder).read())
    timings.stages(log)
    timings.timeline(log)
    assert (found.done, len(found.workers)) == (16384, 512)
    # generous: it is told again and again while it is followed
    assert time.process_time() - began < 20


# ---- logs that are broken


def test_a_line_that_is_still_being_written_comes_later(run):
    log = write(run, [start(), shard(0)])
    text = json.dumps(shard(1)) + "\n"
    with (run / "events.jsonl").open("a") as file:
        for part in (text[:30], text[30:-1]):
            file.write(part)
            file.flush()
            assert (len(log.read().shards), log.broken) == (1, 0)
        file.write("\n")
    assert (len(log.read().shards), log.broken) == (2, 0)
    assert len(log.read().shards) == 2


@pytest.mark.parametrize("garbage", [
    b"nonsense", b"{", b"[1, 2]", b"null", b'{"t": 1}', b'{"event": "shard"}', b'{"t": "now", "event": "x"}',
    b'{"t": NaN, "event": "x"}', b"\xff\xfe\x00", b"\0" * 5000, b"[" * 100_000, b'{"t": 1, "event": 7}',
    b'{"t": 1, "event": "shard"}',
    b'{"t": 1, "event": "shard", "shard": 0, "worker": "w", "began": "x", "ended": 1, "frames": 1, "nbytes": 1, '
    b'"seconds": {}}',
    b'{"t": 1, "event": "shard", "shard": 0, "worker": "w", "began": 0, "ended": Infinity, "frames": 1, "nbytes": 1, '
    b'"seconds": {}}',
    b'{"t": 1, "event": "shard", "shard": 0, "worker": "w", "began": 0, "ended": 1, "frames": 1, "nbytes": 1, '
    b'"seconds": [1]}',
    b'{"t": 1, "event": "shard", "shard": 0, "worker": "w", "began": 0, "ended": 1e999, "frames": 1, "nbytes": 1, '
    b'"seconds": {"read": "much"}}',
])  # fmt: skip
def test_garbage_is_counted_and_left_out(run, garbage):
    write(run, [start(), shard(0)])
    content = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(content + garbage + b"\n" + json.dumps(shard(1)).encode() + b"\n\n")
    found = progress(Log(run).read())
    assert (found.done, found.broken) == (2, 1)


def test_what_follows_a_torn_line_is_saved(run):
    write(run, [start(), shard(0)])
    torn = json.dumps(shard(1))[:50] + json.dumps(shard(2)) + "\n" + "\0" * 4096 + json.dumps(shard(3)) + "\n"
    with (run / "events.jsonl").open("a") as file:
        file.write(torn)
    log = Log(run).read()
    assert ([ran.shard for ran in log.shards], log.broken) == ([0, 2, 3], 2)


@pytest.mark.parametrize("event", [
    {"event": "start", "shards": "many", "done": None}, {"event": "start", "done": -5}, {"event": "retry"},
    {"event": "lost", "shards": 3, "worker": ["a"]}, {"event": "worker", "worker": {"a": 1}}, {"event": "masked"},
    {"event": "stop", "why": 7}, {"event": "hang", "again_in": "x"}, {"event": "retry", "again_in": "soon"},
    {"event": "finish", "done": "all"}, {"event": "what is new in the next version", "x": 1}, {"event": "damaged"},
])  # fmt: skip
def test_events_with_odd_fields_are_told_nevertheless(run, event):
    write(run, [start(), shard(0), {"t": T + 2, **event}])
    answer = CliRunner().invoke(app, [str(run)])
    assert answer.exit_code == 0, answer.output
    assert "1 of 10 done" in answer.output


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": "x"}', '{"shards": -1, "host": 3, "pid": "x"}', "\0\0"])
def test_a_broken_run_json(run, text):
    write(run, [start(shards=4), shard(0)])
    (run / "run.json").write_text(text)
    found = progress(Log(run).read())
    assert (found.done, found.shards) == (1, 4)


def test_a_log_that_was_begun_anew(run):
    log = write(run, [start(), *map(shard, range(5))])
    write(run, [start(100)])
    assert (len(log.read().shards), len(log.events)) == (0, 1)


def test_clocks_that_were_set_back(run):
    log = write(run, [start(), shard(0, 5, 1), shard(1, 3, 9), shard(2, 30, 2)], alive=9)
    found = progress(log, T + 2)
    assert all(ran.began <= ran.ended for ran in log.shards)
    assert found.done == 3
    assert found.seconds == pytest.approx(6)
    assert found.now >= 0


# ---- the command


def tell(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def recipe(path, output):
    path.write_text(f"[input]\npath = 'a.raw'\n[output]\npath = '{output}'\n")
    return path


def test_run_result_and_recipe_stand_for_the_same(run, tmp_path):
    write(run, [start(), shard(0), end("retry", 2, shard=3, worker="n:2:a", why="[Errno 5] EIO"), end("stop", 3)])
    result = tmp_path / "scan.results.zarr"
    made = recipe(tmp_path / "a.toml", "scan.results.zarr")
    answers = [tell(path).output for path in (run, result, made)]
    result.mkdir()
    answers.append(tell(result).output)
    assert len(set(answers)) == 1
    for words in (
        "ended early. --resume goes on", "1 of 10 done (10.0 %)", "n:1:a: 1 shard, 1000.0 MB/s while at work",
        "shards tried again: 1",
        "[Errno 5] EIO", "reading limits: 50 % of the workers' time", "no shard",
    ):  # fmt: skip
        assert words in answers[0], words


def test_a_recipe_for_many_files(tmp_path):
    made = recipe(tmp_path / "a.toml", "out [1]/{name}.zarr")
    with pytest.raises(InputError, match="not run yet"):
        cli_status.find_runs(made)
    (tmp_path / "out [1]").mkdir()
    for name in ("one", "two"):
        write(tmp_path / "out [1]" / f"{name}.run", [start(), shard(0), end("stop", 3)])
    (tmp_path / "out [1]" / "none.run").mkdir()
    answer = tell(made)
    assert answer.exit_code == 0
    lines = [line for line in answer.output.splitlines() if line]
    assert [line.split()[0] for line in lines] == ["one.run", "two.run"]
    assert "1 of 10 shards (10 %), 1000.0 MB/s, ended early" in lines[0]


@pytest.mark.parametrize("make", [
    lambda p: p / "nothing", lambda p: p / "nothing.run", lambda p: p / "nothing.zarr", lambda p: p,
    lambda p: recipe(p / "a.toml", "nowhere.zarr"),
])  # fmt: skip
def test_wrong_paths_are_told(tmp_path, make):
    with pytest.raises(InputError, match=r"no run is there|no such file"):
        cli_status.find_runs(make(tmp_path))


@pytest.mark.parametrize("text", ["", "[output]", "output = 3", "[output]\npath = 3", "\0", "[[["])
def test_files_that_are_no_recipes(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(RecipeError, match="no recipe that says where its result goes"):
        cli_status.find_runs(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(GpuemError):
        cli_status.find_runs(tmp_path / "b.toml")


def test_names_that_look_like_markup(tmp_path):
    run = tmp_path / "[red]x[bold].run"
    write(run, [start(), shard(0, worker="[bold]n:1:a"), end("error", 2, why="[/] is wrong")])
    answer = tell(run)
    assert answer.exit_code == 0
    for words in ("[red]x[bold].run", "[bold]n:1:a", "failed: [/] is wrong"):
        assert words in answer.output


def test_workers_that_stand_out_are_named(run):
    pace = [4.0 if worker == 7 else 1.0 for worker in range(40)]
    events = [shard(40 * k + w, k * pace[w], (k + 1) * pace[w], f"n{w}:1:a") for w in range(40) for k in range(10)]
    write(run, [start(shards=1600), *events, end("lost", 50, worker="n30:1:a", why="killed", shards=[])], shards=1600)
    lines = [line.strip() for line in tell(run).output.splitlines() if ":1:a: " in line]
    assert lines[:2] == [
        "n7:1:a: 10 shards, 250.0 MB/s while at work (slow)", "n30:1:a: 10 shards, 1000.0 MB/s while at work, lost",
    ]  # fmt: skip
    assert len(lines) == 3  # and the loss itself


def test_the_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    write(run, [start(), shard(0), end("finish", 2)])
    answer = tell(run, "--timeline", tmp_path / "new" / "t.png")
    assert answer.exit_code == 0
    assert (tmp_path / "new" / "t.png").read_bytes()[:4] == b"\x89PNG"
    # where there can be none that is said, and nothing fails
    (tmp_path / "file").touch()
    for name in (tmp_path / "file" / "t.png", tmp_path / "t.nonsense"):
        answer = tell(run, "--timeline", name)
        assert answer.exit_code == 0
        assert "1 of 10 done" in answer.output


def test_without_matplotlib(run, tmp_path, monkeypatch):
    write(run, [start(), shard(0), end("finish", 2)])
    monkeypatch.setitem(sys.modules, "gpuem.plot_timeline", None)
    assert tell(run, "--timeline", tmp_path / "t.png").exit_code == 0


def test_following_ends_with_the_run(run, monkeypatch):
    monkeypatch.setattr(cli_status, "FOLLOW_SECONDS", 0.02)
    log, moment = write(run, [start()]), time.time()
    (run / "alive").touch()

    def work():
        for k in range(10):
            time.sleep(0.03)
            line = {**shard(k), "t": time.time(), "began": moment + k, "ended": moment + k + 1}
            with (run / "events.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        with (run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"t": time.time(), "event": "finish", "done": 10}) + "\n")

    worker = threading.Thread(target=work)
    worker.start()
    answer = tell(run, "--follow")
    worker.join()
    assert answer.exit_code == 0
    assert "of 10 shards (" in answer.output
    assert "state            finished" in answer.output
    assert len(log.read().shards) == 10
