"""Storage that fails, hangs or is full, threads and GPUs that fail: a run ends complete, or can go on, and says why."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
import time

import killing
import numpy as np
import pytest
from emulation import needs_compiler
from killing import assert_same, boxes, chosen, events, floats, ints, runs_of_shards, shrink
from standin import installed

import gpuem
from gpuem import engine, errors, job, recipe, stream
from gpuem.backends import cuda_plan
from gpuem.executors import dispatch, local
from gpuem.storage.host import Files
from gpuem.tiles import Sizes

FRAME_NBYTES = 6 * 7 * 2
SHARD = 8 * FRAME_NBYTES
HEADER = 128


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    shrink(monkeypatch, SHARD)
    monkeypatch.setattr(dispatch, "PAUSE", 0.01)
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(dispatch, "LEAST_HANG", 0.2)
    monkeypatch.setattr(local, "LEAST_HANG", 0.2)
    monkeypatch.setattr(local, "LOOK", 0.05)
    monkeypatch.setattr(local, "ENDING", 1.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _ends():
    """A run that hangs fails, instead of the whole suite hanging."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it hangs"))
    signal.alarm(150)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def disk(monkeypatch):
    """Reads of data files that meet `disk.bad(frame)` raise `disk.error`, or whatever it does."""
    made, preadv = Disk(), os.preadv

    def reading(descriptor, buffers, offset, *more):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(("ints.npy", "floats.npy", "boxes.h5")) and offset:
            length = sum(len(buffer) for buffer in buffers)
            nbytes = FRAME_NBYTES * (2 if "floats" in name else 1)
            first = (offset - HEADER) // nbytes
            last = (offset + length - HEADER - 1) // nbytes
            made.met(first, last, offset, offset + length)
        return preadv(descriptor, buffers, offset, *more)

    monkeypatch.setattr(os, "preadv", reading)
    return made


# frames that are read together are tried one by one before their shard fails: to know which it is
ONE_FAILURE = 2


class Disk:
    """What goes wrong where."""

    def __init__(self):
        self.frames, self.bytes, self.number, self.times, self.until = set(), set(), errno.EIO, 10**9, None
        self.count, self.act, self.lock = 0, None, threading.Lock()

    def met(self, first, last, low, high):
        with self.lock:
            touched = any(first <= frame <= last for frame in self.frames) or any(low <= b < high for b in self.bytes)
            over = self.until is not None and time.monotonic() > self.until
            if not touched or self.count >= self.times or over:
                return
            self.count += 1
        if self.act is not None:
            self.act()
            return
        raise OSError(self.number, os.strerror(self.number))


def run(ds, folder, **options):
    given = {"device": "cpu", "threads": 2, "patience": 0.3, "folder": folder, **options}
    return gpuem.run(ds, chosen(), **given)


# ---- reading fails


def len_of(ds):
    """Frames of a shard."""
    return SHARD // ds.source.frame_nbytes


def test_a_read_that_fails_only_once_is_not_even_noticed(tmp_path, disk):
    ds = ints(tmp_path)
    disk.frames, disk.times = {13}, 1
    run(ds, tmp_path / "run")
    assert disk.count == 1
    assert events(tmp_path / "run", "retry") == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("make", [ints, floats])
def test_a_read_that_fails_once_is_tried_again_elsewhere(tmp_path, disk, number, make):
    ds = make(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    disk.frames, disk.number, disk.times = {13}, number, ONE_FAILURE
    found = run(ds, tmp_path / "run")
    assert_same(found, expected)
    (retry,) = events(tmp_path / "run", "retry")
    assert retry["shard"] == 13 // len_of(ds)
    assert os.strerror(number) in retry["why"]
    worker = retry["worker"]
    (again,) = [event for event in events(tmp_path / "run", "shard") if event["shard"] == retry["shard"]]
    assert not again["worker"].endswith(worker), "elsewhere"
    assert set(runs_of_shards(tmp_path / "run").values()) == {1}


def test_chunks_whose_bytes_do_not_come_are_tried_again(tmp_path, disk):
    ds = boxes(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    layout = ds.source.pieces[0].layout
    # chunks that lie apart are read one by one
    disk.bytes, disk.times = {int(layout.offset[4])}, 2
    assert_same(run(ds, tmp_path / "run", patience=20.0), expected)
    assert disk.count == 2
    assert len(events(tmp_path / "run", "retry")) == 2
    # the chunk that was never written
    assert found_masked(tmp_path / "run") == 6


def found_masked(folder):
    return sum(event["frames"] for event in events(folder, "masked"))


def test_storage_that_comes_back_in_time(tmp_path, disk):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    disk.frames, disk.until = set(range(96)), time.monotonic() + 0.5
    assert_same(run(ds, tmp_path / "run", patience=20.0), expected)
    assert len(events(tmp_path / "run", "retry")) >= 4
    assert events(tmp_path / "run")[-1]["event"] == "finish"


def test_files_are_opened_anew_after_a_stale_handle(tmp_path, disk, monkeypatch):
    ds, opened = ints(tmp_path), []
    reopen = Files.reopen
    monkeypatch.setattr(Files, "reopen", lambda files: (opened.append(1), reopen(files))[1])
    disk.frames, disk.times, disk.number = {13}, ONE_FAILURE, errno.ESTALE
    run(ds, tmp_path / "run")
    assert opened


@pytest.mark.parametrize("make", [ints, floats])
def test_storage_that_stays_away_ends_a_run_that_can_go_on(tmp_path, disk, make):
    ds = make(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    disk.frames = {50}
    with pytest.raises(errors.ResumableError, match=r"failed \d times in .* Input/output error") as error:
        run(ds, tmp_path / "run")
    assert "to go on: the same command with --resume" in str(error.value)
    assert events(tmp_path / "run")[-1]["event"] == "stop"
    attempts = len(events(tmp_path / "run", "retry"))
    assert 3 <= attempts <= 20
    disk.frames = set()
    assert_same(run(ds, tmp_path / "run", resume=True), expected)
    assert set(runs_of_shards(tmp_path / "run").values()) == {1}


@pytest.mark.parametrize("make", [ints, floats])
def test_storage_that_stays_away_masks_exactly_what_it_holds(tmp_path, disk, make):
    ds, bad = make(tmp_path), {3, 50, 51, 95}
    disk.frames = bad
    found = run(ds, tmp_path / "run", on_error="mask")
    assert set(np.flatnonzero(~found["valid"].data)) == bad
    assert found_masked(tmp_path / "run") == 4
    assert "Input/output error" in found.provenance["lost"][0]["reason"]
    roi = np.ones(96, bool)
    roi[list(bad)] = False
    disk.frames = set()
    assert_same(found, gpuem.run(ds, chosen(), device="cpu", roi=roi.reshape(12, 8)))


def test_masked_and_stopped_and_gone_on_with(tmp_path, disk):
    ds = floats(tmp_path)
    disk.frames = {3, 50, 51, 95}
    expected = run(ds, tmp_path / "other", on_error="mask", patience=0.1)
    for k in (1, 5, 9):
        with pytest.raises(errors.ResumableError):
            run(ds, tmp_path / "run", on_error="mask", patience=0.1, resume=k > 1, progress=killing.stopping(k))
    found = run(ds, tmp_path / "run", on_error="mask", patience=0.1, resume=True, threads=3)
    assert_same(found, expected)
    assert found.provenance["frames"] == expected.provenance["frames"]


def test_a_file_that_can_not_even_be_opened_any_more_ends_the_run(tmp_path, disk, monkeypatch):
    """Also where frames may be masked: it must not be tried for ever."""
    ds, open_file = ints(tmp_path), os.open
    armed = threading.Event()

    def failing(path, *arguments, **options):
        if armed.is_set() and str(path).endswith("ints.npy"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    disk.frames, disk.act, disk.times = {50}, lambda: stale(armed), ONE_FAILURE
    for on_error in ("stop", "mask"):
        armed.clear()
        disk.count = 0
        with pytest.raises(errors.ResumableError, match="Stale file handle"):
            run(ds, tmp_path / on_error, on_error=on_error)


def stale(armed):
    armed.set()
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("threads", [1, 5])
def test_a_file_that_changed_is_told_at_once_and_is_no_reason_to_try_again(tmp_path, disk, threads):
    ds = ints(tmp_path)
    path = tmp_path / "ints.npy"

    def changed():
        os.utime(path, ns=(5, 5))
        raise OSError(errno.EIO, "once, so that it is opened again")

    disk.frames, disk.act, disk.times = {50}, changed, ONE_FAILURE
    with pytest.raises(errors.InputError, match="changed since it was opened"):
        run(ds, tmp_path / "run", threads=threads, patience=100.0)
    # for its bytes only
    assert len(events(tmp_path / "run", "retry")) == 1
    assert events(tmp_path / "run")[-1]["event"] == "error"
    assert killing.kept(tmp_path / "run") > 0


def test_broken_bytes_are_not_tried_again(tmp_path):
    ds = floats(tmp_path, bad=(50,))
    with pytest.raises(errors.DataError, match="frame 50: NaN"):
        run(ds, tmp_path / "run")
    assert events(tmp_path / "run", "retry") == []
    assert events(tmp_path / "run")[-1]["event"] == "error"


# ---- reading hangs


@pytest.fixture
def gate():
    """What opens at the end of the test, for those who hang at it."""
    made = threading.Event()
    yield made
    made.set()


@pytest.mark.parametrize("make", [ints, floats])
def test_a_read_that_hangs_is_done_by_another_thread(tmp_path, disk, gate, make, monkeypatch):
    monkeypatch.setattr(local, "ENDING", 90.0)
    ds = make(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    disk.frames, disk.times, disk.act = {13}, 1, gate.wait
    began = time.monotonic()
    found = run(ds, tmp_path / "run", patience=0.3)
    seconds = time.monotonic() - began
    assert_same(found, expected)
    (hang,) = events(tmp_path / "run", "hang")
    assert hang["shard"] == 13 // len_of(ds)
    assert hang["seconds"] > 0.3
    assert set(runs_of_shards(tmp_path / "run").values()) == {1}
    assert any(thread.name.startswith("gpuem-") for thread in threading.enumerate()), "it still hangs"
    assert seconds < 60, "nobody waits for it"


def test_who_comes_back_from_hanging_adds_nothing(tmp_path, disk, monkeypatch):
    """The shard was done by another one meanwhile; of floats, so that others wait for it to be combined."""
    ds, back, done = floats(tmp_path), threading.Event(), dispatch.Dispatch.done
    expected = gpuem.run(ds, chosen(), device="cpu")
    answers = []

    def noticed(self, shard, worker, now):
        first = done(self, shard, worker, now)
        if shard == 3:
            answers.append(first)
            back.set()
        return first

    monkeypatch.setattr(dispatch.Dispatch, "done", noticed)
    disk.frames, disk.times, disk.act = {13}, 1, lambda: back.wait(60)
    found = run(ds, tmp_path / "run", patience=0.2, progress=lambda frames: time.sleep(0.02))
    assert answers == [True, False]
    assert_same(found, expected)
    assert set(runs_of_shards(tmp_path / "run").values()) == {1}


@pytest.mark.parametrize("threads", [1, 2])
def test_where_every_thread_hangs_the_run_ends_and_can_go_on(tmp_path, disk, gate, threads):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    disk.frames, disk.act = set(range(40, 96)), gate.wait
    with pytest.raises(errors.ResumableError, match="storage doesn't answer: every thread"):
        run(ds, tmp_path / "run", threads=threads)
    assert events(tmp_path / "run")[-1]["event"] == "stop"
    assert killing.kept(tmp_path / "run") >= 3
    disk.frames = set()
    assert_same(run(ds, tmp_path / "run", resume=True), expected)


def test_slow_is_not_hanging(tmp_path, disk):
    """Every read takes half the patience; a shard takes longer than all of it."""
    ds = ints(tmp_path)
    disk.frames, disk.act = set(range(96)), lambda: time.sleep(0.15)
    run(ds, tmp_path / "run", patience=0.3, threads=1)
    assert events(tmp_path / "run")[-1]["event"] == "finish"


def test_computing_for_long_is_not_hanging_at_a_read(tmp_path, monkeypatch):
    ds, run_shard = ints(tmp_path), local.run_shard

    def long(job, index, **options):
        found = run_shard(job, index, **options)
        time.sleep(0.8 if index == 0 else 0.0)
        return found

    monkeypatch.setattr(local, "run_shard", long)
    run(ds, tmp_path / "run", threads=1, patience=0.2)
    assert events(tmp_path / "run", "stop", "hang") == []


def test_ctrl_c_does_not_wait_for_who_hangs(tmp_path, disk, gate):
    ds = ints(tmp_path)
    disk.frames, disk.times, disk.act = {3}, 1, gate.wait
    began = time.monotonic()
    with pytest.raises(errors.ResumableError, match="5 of 12 shards"):
        run(ds, tmp_path / "run", patience=1000.0, progress=killing.stopping(5))
    assert time.monotonic() - began < 60


# ---- threads fail


def failing_shards(monkeypatch, faults):
    """Let shards fail as often as `faults` says: {shard: [error, ...]}."""
    run_shard, lock = local.run_shard, threading.Lock()

    def run(job, index, **options):
        with lock:
            error = faults[index].pop(0) if faults.get(index) else None
        if error is not None:
            raise error
        return run_shard(job, index, **options)

    monkeypatch.setattr(local, "run_shard", run)


@pytest.mark.parametrize("error", [errors.DeviceError("the GPU fell off the bus"), MemoryError("no memory")])
def test_hardware_that_fails_once(tmp_path, monkeypatch, error):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    failing_shards(monkeypatch, {4: [error]})
    assert_same(run(ds, tmp_path / "run"), expected)
    (retry,) = events(tmp_path / "run", "retry")
    assert retry["shard"] == 4
    assert str(error) in retry["why"]


def test_hardware_that_fails_for_good_after_shards_were_finished_can_be_left(tmp_path, monkeypatch):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    with monkeypatch.context() as patch:
        failing_shards(patch, {7: [errors.DeviceError("fell off the bus")] * 9})
        with pytest.raises(errors.ResumableError, match="fell off the bus"):
            run(ds, tmp_path / "run", threads=1)
    assert killing.kept(tmp_path / "run") == 7
    assert_same(run(ds, tmp_path / "run", resume=True), expected)


def test_hardware_that_never_worked_is_an_error(tmp_path, monkeypatch):
    """Else a scheduler would start the job again and again."""
    failing_shards(monkeypatch, {k: [errors.DeviceError("fell off the bus")] * 9 for k in range(12)})
    with pytest.raises(errors.DeviceError):
        run(ints(tmp_path), tmp_path / "run", threads=1)


def test_a_mistake_in_the_code_is_told_and_what_is_finished_stays(tmp_path, monkeypatch):
    failing_shards(monkeypatch, {7: [ZeroDivisionError("a mistake")]})
    with pytest.raises(ZeroDivisionError):
        run(ints(tmp_path), tmp_path / "run", threads=1)
    assert events(tmp_path / "run")[-1]["event"] == "error"
    assert killing.kept(tmp_path / "run") == 7
    assert events(tmp_path / "run", "retry") == []


def test_a_mistake_where_shards_are_chosen_does_not_hang(tmp_path, monkeypatch):
    take = dispatch.Dispatch.take

    def failing(self, worker, now, host=""):
        if not self._open >= {0, 1, 2, 3}:
            raise ZeroDivisionError("a mistake")
        return take(self, worker, now, host)

    monkeypatch.setattr(dispatch.Dispatch, "take", failing)
    with pytest.raises(ZeroDivisionError):
        run(ints(tmp_path), tmp_path / "run")


# ---- the disk is full


def test_a_disk_that_fills_while_shards_are_kept(tmp_path, monkeypatch):
    ds = ints(tmp_path)
    expected = gpuem.run(ds, chosen(), device="cpu")
    pwrite, room = os.pwrite, [9000]

    def filling(descriptor, data, offset):
        # the last write is cut short, as they are
        count = min(len(data), room[0])
        room[0] -= count
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[:count], offset)

    def full_log(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        with pytest.raises(errors.ResumableError, match=r"can't be kept in .*the disk is full; make room") as error:
            run(ds, tmp_path / "run")
    done = killing.kept(tmp_path / "run")
    assert 0 < done < 12
    assert f"{done} of 12 shards are finished" in str(error.value)
    with monkeypatch.context() as patch:
        # neither is there room for the log
        room[0] = 3000
        patch.setattr(os, "pwrite", filling)
        patch.setattr(os, "write", full_log)
        with pytest.raises(errors.ResumableError, match="the disk is full"):
            run(ds, tmp_path / "run", resume=True)
    assert_same(run(ds, tmp_path / "run", resume=True), expected)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, which root may make."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(tmp_path, small_disk, monkeypatch):
    ds = ints(tmp_path, scan=(96, 8))
    data = ds.source.files[0].path
    path = killing.write_recipe(tmp_path, data, output="disk/made.zarr")
    truth, _ = gpuem.run_recipe(killing.write_recipe(tmp_path, data, "truth"))
    monkeypatch.setattr("gpuem.checkpoint.nbytes", lambda job: 0)
    filler = small_disk / "filler"

    def progress(frames):
        # somebody else fills it while the run is under way
        if not filler.exists() and killing.kept(small_disk / "made.run") >= 5:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)

    with pytest.raises(errors.ResumableError, match="the disk is full"):
        gpuem.run_recipe(path, watch=killing.watching(progress))
    done = killing.kept(small_disk / "made.run")
    assert 5 <= done < 96
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    found, _ = gpuem.run_recipe(path, resume=True)
    assert_same(found, truth)


# ---- one GPU


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A job on the stand-in for a GPU, of twelve shards."""
    monkeypatch.setattr(cuda_plan, "SIZES", Sizes(runs_tile=SHARD // 2, tile=SHARD // 2, shard=SHARD))
    monkeypatch.setattr("gpuem.tiles.LEAST_FRAMES", 1)
    with installed("late"):
        yield lambda ds, **options: job.prepare(
            ds, [gpuem.Sum(), gpuem.CenterOfMass()], recipe.run_section(device="cuda", threads=1, **options)
        )


def total_of(made, report=dispatch.no_report):
    partials = list(local.run(made, report=report))
    assert sorted(partial.shard for partial in partials) == list(range(len(made.plan.shards)))
    return engine.combine(made, partials)


@needs_compiler
@pytest.mark.parametrize("make", [ints, floats])
def test_a_gpu_goes_on_after_a_read_that_failed(tmp_path, disk, on_gpu, make, monkeypatch):
    ds, sessions, told = make(tmp_path), [], []
    expected = total_of(on_gpu(ds))
    session = stream.session
    monkeypatch.setattr(stream, "session", lambda made: (sessions.append(1), session(made))[1])
    found = total_of(on_gpu(ds))
    assert len(sessions) == 1, "one for all, however few may wait to be combined"
    # through the ring as well
    disk.frames, disk.times = {40}, 1 + ONE_FAILURE
    found = total_of(on_gpu(ds, patience=5.0), lambda event, **facts: told.append((event, facts["shard"])))
    assert len(sessions) == 2
    assert len(told) == 1
    assert told[0][0] == "retry"
    for name in ("total", "moments"):
        assert getattr(found.sums, name).tobytes() == getattr(expected.sums, name).tobytes()
    assert found.valid.all()


@needs_compiler
def test_a_gpu_masks_what_never_comes_or_ends_the_run(tmp_path, disk, on_gpu):
    ds = floats(tmp_path)
    disk.frames = {40, 41}
    found = total_of(on_gpu(ds, patience=0.3, on_error="mask"))
    assert np.flatnonzero(~found.valid).tolist() == [40, 41]
    with pytest.raises(errors.ResumableError, match="shard 10 failed"):
        total_of(on_gpu(ds, patience=0.3))


@needs_compiler
def test_nothing_to_do_needs_no_gpu(tmp_path, on_gpu, monkeypatch):
    made = on_gpu(ints(tmp_path))
    monkeypatch.setattr(stream, "session", lambda made: pytest.fail("a session"))
    assert list(local.run(made, [])) == []
