"""Seconds by stage: those of a GPU belong to their shard, and what a log of them says is what a naive count says."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import reference
from emulation import needs_compiler
from standin import SCHEDULES, installed, streams
from standin.device import Operation

import gpuem
from gpuem import engine, errors, job, recipe, stream, timings
from gpuem.backends import cuda, cuda_kernels, cuda_plan
from gpuem.backends.cuda_session import Session
from gpuem.plot_timeline import save_timeline, timeline_figure
from gpuem.status import Log
from gpuem.storage.host import Files
from gpuem.storage.pinned import Ring
from gpuem.tiles import Sizes

LONG = 0.03
CHOSEN = (gpuem.Sum(), gpuem.VirtualDetector(name="adf", inner=2, outer=7))


@pytest.fixture
def small(monkeypatch):
    """Shards of few tiles of few frames."""
    monkeypatch.setattr(cuda_plan, "SIZES", Sizes(runs_tile=4096, tile=4096, shard=16384))
    monkeypatch.setattr("gpuem.tiles.LEAST_FRAMES", 1)
    monkeypatch.setattr("gpuem.storage.pinned.PIECE_NBYTES", 1000)


@pytest.fixture
def ds(tmp_path):
    frames = reference.planted((211, 16, 24), "u2", 1)
    # big-endian: frames are converted on the device, which is the decoding here
    frames.astype(">u2").tofile(tmp_path / "a.raw")
    return gpuem.open(tmp_path / "a.raw", scan=(211,), frame=(16, 24), dtype=">u2")


def prepared(ds, chosen=CHOSEN):
    return job.prepare(ds, chosen, recipe.run_section(device="cuda", threads=3))


def sleeping(seconds):
    """Put a kernel that takes so long into the current stream."""
    streams.device().enqueue(streams.current_stream()._queue, Operation(lambda: time.sleep(seconds)))


def same(one, other):
    assert one.shard == other.shard
    np.testing.assert_array_equal(one.positions, other.positions)
    for name in ("masks", "total", "maximum"):
        np.testing.assert_array_equal(getattr(one.sums, name), getattr(other.sums, name))


@pytest.fixture(params=SCHEDULES)
def device(request):
    with installed(request.param) as simulated:
        yield simulated


# ---- on the device


@needs_compiler
def test_every_shard_has_its_times(device, small, ds):
    made, before = prepared(ds), time.time()
    found = list(stream.run(made, range(len(made.plan.shards))))
    after = time.time()
    assert len(found) > 10
    assert {tuple(p.seconds) for p in found} == {("read", "copy", "decode", "compute", "wait")}
    for partial in found:
        assert min(partial.seconds.values()) >= 0
        assert partial.seconds["read"] > 0
        assert before - 1e-3 <= partial.began <= partial.ended <= after + 1e-3
        assert partial.worker == engine.here()
    # one after the other, so that a picture can show them in one row
    for one, other in pairwise(found):
        assert one.ended <= other.began


@needs_compiler
@pytest.mark.parametrize("schedule", ["late", "early"])
@pytest.mark.parametrize("stage", ["read", "copy", "decode", "compute"])
def test_what_takes_long_is_told_of_its_stage_and_its_shard(small, ds, monkeypatch, schedule, stage):
    with installed(schedule):
        made = prepared(ds)
        slow = made.plan.shards[5]
        assert slow.first < slow.last
        first = sum(shard.frames for shard in made.plan.shards[:5])
        wanted = range(first, first + slow.frames)
        slow_down(monkeypatch, stage, ds, wanted)
        found = list(stream.run(made, range(len(made.plan.shards))))
    tiles = slow.last - slow.first
    spent = np.array([partial.seconds[stage] for partial in found])
    assert spent[5] >= 0.9 * LONG * tiles
    assert np.delete(spent, 5).max() < LONG
    for other in {"read", "copy", "decode", "compute"} - {stage}:
        assert found[5].seconds[other] < LONG * tiles / 2, other
    # reading is ahead: it may have been over before the shard's turn came
    assert stage == "read" or found[5].ended - found[5].began >= 0.9 * LONG


def slow_down(monkeypatch, stage, ds, wanted):
    """Let one stage of every tile with frames of a shard take long."""
    if stage == "read":
        read = Files.read_into

        def slowly(self, file, offset, target):
            # several pieces of a tile are read at once, and one of them alone is slow
            if offset // ds.source.frame_nbytes in wanted and offset % 4096 < 1000:
                time.sleep(2 * LONG)
            return read(self, file, offset, target)

        monkeypatch.setattr(Files, "read_into", slowly)
        return
    now = {"slow": False}
    add, arrive = Session.add, Ring._arrive

    def adding(self, tile, arrived, sums, at, positions):
        now["slow"] = int(positions[0]) in wanted
        return add(self, tile, arrived, sums, at, positions)

    monkeypatch.setattr(Session, "add", adding)
    if stage == "copy":
        from standin.memory import MemoryPointer

        copy = MemoryPointer.copy_from_host_async

        def copying(self, mem, size, stream=None):
            copy(self, mem, size, stream)
            if now["copying"]:
                with stream:
                    sleeping(LONG)

        def arriving(self, tag, load, slot, tasks):
            (_, tile) = tag
            now["copying"] = tile is not None and int(tile.indices[0]) in wanted
            yield from arrive(self, tag, load, slot, tasks)

        now["copying"] = False
        monkeypatch.setattr(MemoryPointer, "copy_from_host_async", copying)
        monkeypatch.setattr(Ring, "_arrive", arriving)
        return
    module, name = (cuda_kernels, "convert") if stage == "decode" else (cuda, "add_device_frames")
    work = getattr(module, name)

    def working(*arguments):
        work(*arguments)
        if now["slow"]:
            sleeping(LONG)

    monkeypatch.setattr(module, name, working)


@needs_compiler
def test_times_cost_two_events_for_a_tile(small, ds, monkeypatch):
    with installed("late") as simulated:
        made, recorded = prepared(ds), Counter()
        record = type(simulated).record

        def counted(self, queue):
            recorded["all"] += 1
            return record(self, queue)

        monkeypatch.setattr(type(simulated), "record", counted)
        count = sum(shard.last - shard.first for shard in made.plan.shards)
        list(stream.run(made, range(len(made.plan.shards))))
    # without times: that a tile is copied, and that it is used; sums of a shard are back
    assert recorded["all"] <= 4 * count + 2 * len(made.plan.shards) + 20


@needs_compiler
def test_a_shard_that_is_run_again_keeps_its_times(small, ds, monkeypatch):
    with installed("late"):
        made = prepared(ds)
        expected = list(stream.run(made, [0, 1, 2, 3]))
        failing(monkeypatch, {1: 1})
        found = list(stream.run(made, [0, 1, 2, 3]))
    for one, other in zip(expected, found, strict=True):
        same(one, other)
    assert found[0].ended <= found[1].began <= found[1].ended <= found[2].began
    assert {"read", "decode", "compute", "wait"} <= set(found[1].seconds)


def failing(monkeypatch, times, shard_nbytes=16384 // 768 * 768):
    """Let reads of some shards fail so many times."""
    read, left = Files.read_into, dict(times)
    lock = threading.Lock()

    def reads(self, file, offset, target):
        with lock:
            shard = offset // shard_nbytes
            if left.get(shard, 0) > 0:
                left[shard] -= 1
                raise errors.ReadError(f"a.raw: byte {offset} can't be read: Input/output error")
        return read(self, file, offset, target)

    monkeypatch.setattr(Files, "read_into", reads)


@needs_compiler
def test_bytes_that_do_not_come_end_the_run_at_their_shard(small, ds, monkeypatch):
    with installed("late"):
        made = prepared(ds)
        expected = list(stream.run(made, range(6)))
        # a shard begins where its first frame does
        sizes = {shard.frames for shard in made.plan.shards[:5]}
        assert len(sizes) == 1
        with stream.session(made) as session:
            with monkeypatch.context() as broken:
                failing(broken, {2: 10**9}, sizes.pop() * 768)
                running = stream.run(made, range(6), session)
                came = [next(running), next(running)]
                with pytest.raises(errors.ReadError, match="can't be read"):
                    next(running)
            # the session is as good as new
            rest = list(stream.run(made, range(2, 6), session))
    for one, other in zip(expected, came + rest, strict=True):
        same(one, other)


# ---- a session that is kept


@needs_compiler
def test_a_session_serves_one_run_after_another(device, small, ds):
    made = prepared(ds)
    expected = list(stream.run(made, range(len(made.plan.shards))))
    found = []
    with stream.session(made) as session:
        assert made.facts["gpu"]["name"]
        assert made.facts["transfer"]["kind"] == "pinned"
        held = set()
        for index in range(len(made.plan.shards)):
            found += list(stream.run(made, [index], session))
            held.add((device.live_bytes, device.pinned_bytes))
        assert len(held) == 1
        assert readers()
    assert not readers()
    for one, other in zip(expected, found, strict=True):
        same(one, other)


@needs_compiler
@pytest.mark.parametrize("come", [0, 1, 3])
def test_a_run_that_is_left_in_the_middle_spoils_nothing(device, small, ds, come):
    made = prepared(ds)
    expected = list(stream.run(made, range(8)))
    with stream.session(made) as session:
        for _ in range(3):
            running = stream.run(made, range(len(made.plan.shards)), session)
            for _ in range(come):
                next(running)
            running.close()
        found = list(stream.run(made, range(8), session))
    for one, other in zip(expected, found, strict=True):
        same(one, other)


@needs_compiler
def test_a_run_that_is_stopped_in_a_shard_spoils_nothing(small, ds):
    with installed("late"):
        made = prepared(ds)
        expected = list(stream.run(made, range(4)))
        with stream.session(made) as session:
            for _ in range(3):
                made.stop.clear()
                with pytest.raises(engine.StoppedError):
                    list(stream.run(made, stopping(made), session))
            made.stop.clear()
            found = list(stream.run(made, range(4), session))
    for one, other in zip(expected, found, strict=True):
        same(one, other)


def stopping(made):
    yield 0
    yield 1
    made.stop.set()
    yield from range(2, 8)


@needs_compiler
def test_a_run_begins_when_the_device_is_done_with_the_one_before(small, ds, monkeypatch):
    with installed("late"):
        made = prepared(ds)
        left, fill = [], Ring._fill

        def filling(self, load, slot):
            left.append(len(self.compute._queue.operations))
            return fill(self, load, slot)

        with stream.session(made) as session:
            running = stream.run(made, range(6), session)
            next(running)
            running.close()
            assert session.compute._queue.operations
            monkeypatch.setattr(Ring, "_fill", filling)
            next(stream.run(made, range(6), session))
    assert left[0] == 0


@needs_compiler
def test_reading_by_several_threads_counts_once(small, ds, monkeypatch):
    with installed("late"):
        made, calls, read = prepared(ds), [], Files.read_into

        def slowly(self, file, offset, target):
            calls.append(offset)
            time.sleep(LONG)
            return read(self, file, offset, target)

        monkeypatch.setattr(Files, "read_into", slowly)
        (found,) = stream.run(made, [0])
    assert len(calls) > 10
    # three threads
    assert LONG * len(calls) / 3 * 0.95 < found.seconds["read"] < LONG * len(calls) * 0.75


@needs_compiler
def test_slots_are_not_filled_by_who_left(small, ds, monkeypatch):
    """Readers of a run that was left must not write into slots of the next one."""
    with installed("late"):
        made = prepared(ds)
        expected = list(stream.run(made, [8]))
        read, tile, new = Files.read_into, 5 * ds.source.frame_nbytes, 8 * made.plan.shards[0].frames * 768
        # the third slot of the run that is left is written late, when the next run has filled its own and still waits
        pauses = {2 * tile: 0.3, new + 3 * tile: 0.6}

        def late(self, file, offset, target):
            time.sleep(pauses.get(offset, 0))
            return read(self, file, offset, target)

        with stream.session(made) as session:
            monkeypatch.setattr(Files, "read_into", late)
            running = session.stream(stream._tiles(made, range(4)))
            next(running)
            running.close()
            found = list(stream.run(made, [8], session))
    same(expected[0], found[0])


@needs_compiler
def test_a_failing_device_is_explained_in_a_session_as_well(small, ds):
    with installed("late") as device:
        made = prepared(ds)
        with stream.session(made) as session:
            list(stream.run(made, [0], session))
            device.fail_launch()
            with pytest.raises(errors.DeviceError, match="the GPU failed"):
                list(stream.run(made, [1], session))


@needs_compiler
def test_without_a_gpu_there_is_no_session(ds, small):
    with installed("late") as device:
        made = prepared(ds)
        device.devices = 0
        with pytest.raises(errors.DeviceError, match="no GPU"), stream.session(made):
            pass


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("gpuem-read")]


# ---- sums of times


def line(shard, worker, began, ended, nbytes=10**9, **seconds):
    return {
        "t": ended, "event": "shard", "shard": shard, "worker": worker, "began": began, "ended": ended, "frames": 10,
        "nbytes": nbytes, "seconds": seconds, "attempt": 1,
    }  # fmt: skip


def log_of(folder, events, name="events.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(event) + "\n" for event in events))
    return Log(folder).read()


def start(t, **more):
    return {"t": t, "event": "start", "shards": 4, "done": 0, **more}


def rows(found):
    return {row.name: row.seconds for row in found.rows}


def test_stages_are_sums_over_workers(tmp_path):
    log = log_of(tmp_path / "a.run", [
        start(0),
        line(0, "n:1:a", 0, 10, read=8.0, compute=2.0),
        line(1, "n:1:b", 0, 6, read=4.0, decode=1.0, compute=1.0),
        line(2, "n:1:b", 8, 12, read=3.0, compute=0.5),
    ])  # fmt: skip
    found = timings.stages(log)
    # wait: what the third shard doesn't explain; no shard: 2 s of b in between, 2 s of a at the end
    assert rows(found) == pytest.approx({"read": 15, "decode": 1, "compute": 3.5, "wait": 0.5, "no shard": 4})
    assert found.worker_seconds == pytest.approx(24)
    assert (found.limit, found.overlapping) == ("read", False)
    assert found.sentence.startswith("reading limits: 62 % of the workers' time; faster storage")


@pytest.mark.parametrize("seconds, limit, said", [
    ({"compute": 6.0, "read": 4.0}, "compute", "computing limits: 60 %"),
    ({"decode": 6.0, "read": 4.0}, "decode", "decoding limits: 60 %"),
    ({"read": 1.0}, "wait", "waiting limits: 90 %"),
    ({"read": 2.0, "wait": 8.0}, "wait", "waiting limits: 80 %"),
    # on a GPU stages are at work at the same time: the busiest limits, however long the others waited for it
    ({"read": 3.0, "copy": 9.0, "decode": 1.0, "compute": 4.0, "wait": 1.0}, "copy", "copying to the GPU limits: 90 %"),
    ({"read": 2.0, "copy": 2.0, "compute": 2.0, "wait": 8.0}, "wait", "waiting limits: 80 %"),
    ({"read": 5.5, "copy": 5.0, "compute": 2.0, "wait": 6.0}, "read", "reading limits: 55 %"),
])  # fmt: skip
def test_what_limits(tmp_path, seconds, limit, said):
    found = timings.stages(log_of(tmp_path / "a.run", [line(0, "n:1:a", 0, 10, **seconds)]))
    assert found.limit == limit
    assert found.sentence.startswith(said)
    assert found.overlapping == (sum(seconds.values()) > 10.5)


def test_workers_without_work_are_told(tmp_path):
    waiting = [line(k, "n:1:a", 10 * k, 10 * k + 1, read=1.0) for k in range(4)]
    assert timings.stages(log_of(tmp_path / "a.run", waiting)).limit == "idle"
    straggler = [line(0, "n:1:a", 0, 1, read=1.0), line(1, "n:1:b", 0, 1, read=1.0), line(2, "n:1:c", 0, 9, read=9.0)]
    found = timings.stages(log_of(tmp_path / "a.run", straggler))
    assert (found.limit, rows(found)["no shard"]) == ("tail", 16)
    # one that died had no time in which it could have worked
    lost = {"t": 1, "event": "lost", "worker": "n:1:b", "shards": [], "why": "killed"}
    assert rows(timings.stages(log_of(tmp_path / "a.run", [*straggler, lost])))["no shard"] == 8


def test_the_night_between_two_runs_is_nobodys_time(tmp_path):
    first = [line(0, "n:1:a", 0, 10, read=10.0), line(1, "n:1:b", 0, 8, read=8.0)]
    again = [line(2, "n:9:a", 50_000, 50_010, read=10.0), line(3, "n:1:b", 50_001, 50_010, read=9.0)]
    log = log_of(tmp_path / "a.run", [start(0), *first, start(49_000), *again])
    found = timings.stages(log)
    assert timings.pauses(log) == [(10, 50_000)]
    # b lives through the pause: 2 s before and 1 s behind it
    assert rows(found) == pytest.approx({"read": 37, "no shard": 3})
    # a gap in which nobody started anything is one of the run
    assert rows(timings.stages(log_of(tmp_path / "a.run", [start(0), *first, *again])))["no shard"] > 49_000
    later = [start(90_000), line(4, "n:1:b", 90_001, 90_002, read=1.0)]
    log = log_of(tmp_path / "a.run", [start(0), *first, *again, *later])
    assert timings.pauses(log) == [(50_010, 90_001)]


def test_nothing_was_measured(tmp_path):
    for events in ([], [start(0)], [line(0, "n:1:a", 5, 5)]):
        found = timings.stages(log_of(tmp_path / "a.run", events))
        assert (found.rows, found.limit, found.worker_seconds) == ((), "", 0)
        assert "nothing was measured" in found.sentence


# ---- the picture


def many(count, workers, seed=0):
    rng = np.random.default_rng(seed)
    free, events = rng.random(workers), [start(0)]
    for shard in range(count):
        k = int(free.argmin())
        began, lasts = free[k], float(rng.gamma(20, 1 / 20))
        free[k] = began + lasts + 0.01
        parts = dict(zip(timings.STAGES, (lasts * rng.dirichlet([4, 1, 2, 2, 1])).tolist(), strict=True))
        events.append(line(shard, f"node{k // 8}:{k // 2}:gpuem-{k % 2}", began, began + lasts, **parts))
    return events


def test_bars_are_the_shards(tmp_path):
    found = timings.timeline(log_of(tmp_path / "a.run", many(50, 12)))
    assert len(found.workers) == 12
    assert found.workers[2:4] == ("node0:1:gpuem-0", "node0:1:gpuem-1")
    assert found.workers[-1] == "node1:5:gpuem-1"  # node1:10 doesn't come before node1:2
    np.testing.assert_allclose(found.shares.sum(1), 1)
    assert found.began.min() == 0
    for row in range(12):
        mine = found.row == row
        assert (found.began[mine][1:] >= found.ended[mine][:-1]).all()


@pytest.mark.parametrize("count", [1, 7, 100])
def test_throughput_is_what_a_naive_sum_says(tmp_path, count):
    found = timings.timeline(log_of(tmp_path / "a.run", many(60, 5)))
    edges = np.linspace(0, found.seconds, count + 1)
    expected = np.zeros(count)
    for began, ended, nbytes in zip(found.began, found.ended, found.nbytes, strict=True):
        for k in range(count):
            inside = min(ended, edges[k + 1]) - max(began, edges[k])
            expected[k] += max(inside, 0) / (ended - began) * nbytes / (edges[k + 1] - edges[k])
    np.testing.assert_allclose(timings.throughput(found, edges), expected, rtol=1e-9)


def test_shards_that_take_no_time_keep_their_bytes(tmp_path):
    log = log_of(tmp_path / "a.run", [line(0, "n:1:a", 0, 4), line(1, "n:1:a", 2, 2), line(2, "n:1:a", 4, 4)])
    edges = np.linspace(0, 4, 9)
    assert (timings.throughput(timings.timeline(log), edges) * 0.5).sum() == pytest.approx(3e9)


def test_pauses_are_cut_and_marks_stay_at_their_place(tmp_path):
    log = log_of(tmp_path / "a.run", [
        start(0), line(0, "n:1:a", 0, 50), {"t": 25, "event": "retry", "shard": 1, "worker": "n:1:a", "why": "EIO"},
        start(9_000), line(1, "n:2:a", 10_000, 10_050),
        {"t": 10_025, "event": "lost", "worker": "n:2", "shards": [1], "why": "killed"},
        {"t": 10_026, "event": "lost", "worker": "elsewhere", "shards": [], "why": "killed"},
    ])  # fmt: skip
    found = timings.timeline(log)
    assert found.pauses == ((51, 9_950),)
    assert found.seconds == 102
    assert found.began.tolist() == [0, 52]
    assert found.marks == (("retry", 25, 0), ("lost", 77, 1), ("lost", 78, -1))


@pytest.mark.parametrize("count, workers", [(0, 0), (1, 1), (30, 2), (200, 40), (5000, 3), (3000, 200)])
def test_pictures_of_all_sizes(tmp_path, count, workers):
    pytest.importorskip("matplotlib")
    log_of(tmp_path / "a.run", many(count, workers) if count else [start(0)])
    path = save_timeline(tmp_path / "a.run")
    assert path == tmp_path / "a.run" / "timeline.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("count, workers", [(30, 2), (5000, 3), (200, 40), (3000, 200)])
def test_colours_are_those_of_the_stages(tmp_path, count, workers):
    """Where every shard only computes, the rows are of that one colour, whichever way they are drawn."""
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb

    from gpuem.plot_timeline import COLORS

    events = many(count, workers)
    for event in events[1:]:
        event["seconds"] = {"compute": event["ended"] - event["began"]}
    figure = timeline_figure(timings.timeline(log_of(tmp_path / "a.run", events)))
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    image = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    height = image.shape[0]
    rows_only = image[int(height - box.y1) + 3 : int(height - box.y0) - 3, int(box.x0) + 5 : int(box.x1) - 5]
    green = np.abs(rows_only - to_rgb(COLORS["compute"])).max(-1) < 0.02
    others = [np.abs(rows_only - to_rgb(COLORS[s])).max(-1) < 0.02 for s in ("read", "copy", "decode")]
    assert green.mean() > 0.5
    assert not any(other.any() for other in others)
