"""Processes that a launcher numbered share a run out among themselves, and say so when one of them dies."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small_shards
from small_shards import fault, started

import gpuem
from gpuem import engine, errors, job, rank_job, recipe, run_folder, tiles
from gpuem.errors import DataError, RecipeError, ResumableError
from gpuem.executors import local, ranks
from gpuem.executors.claims import Claims, batches
from gpuem.executors.dispatch import Dispatch
from gpuem.executors.ranks import Collector, Pulse, Rank, choose_gpu, from_environment, wait_for_launch
from gpuem.run_folder import RunFolder

HERE = Path(__file__).parent
# 12 x 10 positions of 11 x 11 float32, two of them a shard
NBYTES = 484
SHARDS = 60
RECIPE = """
[input]
path = "data.npy"
[run]
device = "cpu"
threads = 1
patience = 5
{more}
[[analysis]]
kind = "sum"
[[analysis]]
kind = "com"
[output]
path = "out/scan.zarr"
previews = false
"""
LAUNCHES = itertools.count()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in small_shards.cuts(NBYTES).items():
        monkeypatch.setattr(tiles, name, value)


@pytest.fixture
def site(tmp_path):
    """A folder with a scan and its recipe; processes that were started there end with the test."""
    (tmp_path / "orders").mkdir()
    frames = np.random.default_rng(5).lognormal(0, 5, (12, 10, 11, 11)).astype("f4")
    np.save(tmp_path / "data.npy", frames)
    (tmp_path / "scan.toml").write_text(RECIPE.format(more=""))
    begun = []

    def start(number, count, launch, *more):
        environment = {
            **os.environ,
            small_shards.FOLDER: str(tmp_path / "orders"),
            "GPUEM_TEST_FRAME_NBYTES": str(NBYTES),
            "SLURM_PROCID": str(number),
            "SLURM_NTASKS": str(count),
            "SLURM_JOB_ID": launch,
        }
        command = [sys.executable, str(HERE / "small_shards.py"), "run", "scan.toml", "--rank-from-env", *more]
        with (tmp_path / f"log-{number}").open("wb") as log:
            begun.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def launch(start, count, *more, name=None, numbers=None):
    name = name or f"job{next(LAUNCHES)}"
    return [start(number, count, name, *more) for number in (range(count) if numbers is None else numbers)]


def codes(processes):
    return [process.wait(120) for process in processes]


def log(number=0):
    return Path(f"log-{number}").read_text()


def truth():
    return gpuem.run(gpuem.open("data.npy"), [gpuem.Sum(), gpuem.CenterOfMass()], device="cpu", threads=2)


def assert_right():
    found, wanted = gpuem.load_results("out/scan.zarr"), truth()
    assert found.maps.keys() == wanted.maps.keys()
    for name, item in wanted.maps.items():
        assert np.asarray(found.maps[name].data).tobytes() == np.asarray(item.data).tobytes(), name


def until(found, seconds=60):
    last = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < last, "it didn't come"
        time.sleep(0.02)


def kept(store):
    """How many finished shards lie in a store."""
    files = [Path("out/scan.run") / store / name for name in ("done.jsonl", "pending.jsonl")]
    return sum(file.read_bytes().count(b"\n") for file in files if file.exists())


def pids():
    """Who ran which shards."""
    path = Path("orders/started")
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return {pid: {int(shard) for shard, other in lines if other == pid} for _, pid in lines}


def test_three_ranks_find_the_same_bits_and_share_the_work(site):
    processes = launch(site, 3)
    assert codes(processes) == [0, 0, 0], log()
    assert_right()
    begun = started(Path("orders"))
    assert sorted(begun) == list(range(SHARDS))
    assert pids().keys() <= {str(process.pid) for process in processes}
    left = {path.name for path in Path("out/scan.run").iterdir()}
    assert not [name for name in left if name.startswith(("store", "rank-", "looked", "claim"))]
    # all is done: whoever comes late, or once more, says so
    assert codes(launch(site, 3, "--resume")) == [0, 0, 0], log()
    assert len(started(Path("orders"))) == SHARDS


def test_a_slow_rank_gets_fewer_shards(site):
    # the test's shards of one rank take long: the other one runs nearly all
    Path("orders/seconds").write_text("0.02")
    processes = launch(site, 2)
    until(lambda: len(pids()) == 2)
    os.kill(processes[1].pid, signal.SIGSTOP)
    until(lambda: kept("store") + kept("store-1") >= SHARDS - 16)
    os.kill(processes[1].pid, signal.SIGCONT)
    assert codes(processes) == [0, 0], log()
    assert sorted(started(Path("orders"))) == list(range(SHARDS))
    assert_right()


def test_all_ranks_are_stopped_and_another_number_of_ranks_goes_on(site):
    Path("orders/seconds").write_text("0.03")
    processes = launch(site, 3)
    until(lambda: len(started(Path("orders"))) > 20)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert codes(processes) == [75, 75, 75], log()
    assert "--resume" in log()
    before = started(Path("orders"))
    assert codes(launch(site, 2, "--resume")) == [0, 0], log()
    assert_right()
    begun = started(Path("orders"))
    # only what was in work when it was stopped is done again: of a thread one in work, one to be handed over, one held
    assert len(begun) - len(set(begun)) <= 3 * 3
    assert len(begun) - len(before) < SHARDS - 15


def test_shards_of_a_rank_that_is_stopped_are_taken_over(site):
    Path("orders/seconds").write_text("0.03")
    processes = launch(site, 3)
    until(lambda: len(started(Path("orders"))) > 20 and len(pids()) == 3)
    processes[2].send_signal(signal.SIGTERM)
    assert codes(processes) == [0, 0, 75], log()
    assert "rank 2 ended: stopped by SIGTERM" in " ".join(log().split())
    assert_right()
    begun = started(Path("orders"))
    assert len(begun) - len(set(begun)) <= 3


def test_a_rank_that_dies_without_a_word(site, monkeypatch, caplog):
    fault(Path("orders"), "kill", "kill", worker="1", shards=[3])
    (rank1,) = launch(site, 2, numbers=[1], name="silent")
    monkeypatch.setattr(ranks, "SILENT", 1.0)
    monkeypatch.setenv(small_shards.FOLDER, "orders")
    # rank 0 waits until rank 1 has taken its first shards
    taken = threading.Event()
    monkeypatch.setattr(
        ranks, "_claimed", after(ranks._claimed, lambda: until(lambda: rank1.poll() is not None), taken)
    )
    rank_job.lead("scan.toml", Rank(0, 2, "silent"))
    assert rank1.wait(30) == -signal.SIGKILL
    assert "rank 1 gave no sign of life" in caplog.text
    assert_right()


def after(function, wait, waited):
    """The function; before its first call, wait."""

    def call(*arguments):
        if not waited.is_set():
            wait()
            waited.set()
        return function(*arguments)

    return call


def test_a_rank_that_comes_late_finds_all_done(site):
    rank_job.lead("scan.toml", Rank(0, 2, "late"))
    assert codes(launch(site, 2, numbers=[1], name="late")) == [0]
    assert_right()


def test_a_rank_that_fails_for_good_ends_the_run_for_good(site):
    frames = np.load("data.npy")
    # of shard 31, which is one of rank 1
    frames.reshape(-1, 11, 11)[62, 3, 4] = np.nan
    np.save("data.npy", frames)
    processes = launch(site, 2)
    found = codes(processes)
    assert found[0] == 2, log()
    assert "NaN" in log()
    # whichever ran it
    assert found[1] in (0, 2)


def test_a_rank_that_can_not_plan_says_why_and_the_others_go_on(site):
    rank_job.lead("scan.toml", Rank(0, 2, "plan"))
    folder = Path("out/scan.run")
    with pytest.raises(RecipeError), RunFolder(folder, rank=1) as kept, ranks.marked(kept, Rank(1, 2, "plan")):
        raise RecipeError("cut otherwise")
    assert json.loads((folder / "rank-1").read_text())["why"] == "cut otherwise"
    assert_right()


def test_what_may_pass_is_resumable(site):
    Path("out/scan.run").mkdir(parents=True)
    for error in (OSError(28, "No space left on device", "store-1"), MemoryError("too much")):
        with (
            pytest.raises(ResumableError, match=r"rank 1: .*(No space left|too much).*kept"),
            RunFolder(Path("out/scan.run"), rank=1) as kept,
            ranks.marked(kept, Rank(1, 2, "x")),
        ):
            raise error
        said = json.loads(Path("out/scan.run/rank-1").read_text())
        assert said["kind"] == "ResumableError"
        assert said["launch"] == "x"


@pytest.mark.parametrize("name", ["DataError", "TruncatedError", "ResumableError", "KeyboardInterrupt", "OSError", ""])
def test_kinds_of_errors_cross_over(name):
    wanted = {"DataError": DataError, "TruncatedError": errors.InputError}.get(name, ResumableError)
    assert isinstance(ranks._error({"kind": name})("why"), wanted)


def test_the_word_of_an_earlier_launch_is_not_heard(tmp_path):
    run_folder.say_launch(tmp_path, "yesterday", over=True)
    later = threading.Timer(0.5, run_folder.say_launch, (tmp_path, "today"))
    later.start()
    assert wait_for_launch(tmp_path, Rank(1, 2, "today"), 60)
    run_folder.say_over(tmp_path)
    assert not wait_for_launch(tmp_path, Rank(1, 2, "today"), 60)


def test_rank_0_never_begins_or_ends_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "SILENT", 0.3)
    monkeypatch.setattr(ranks, "ENDED", 0.3)
    with pytest.raises(ResumableError, match="rank 0 hasn't begun"):
        wait_for_launch(tmp_path, Rank(1, 2, "x"), 0.1)
    monkeypatch.setattr(ranks, "SILENT", 60.0)
    (tmp_path / "alive").touch()
    threading.Timer(0.5, (tmp_path / "alive").unlink).start()
    with pytest.raises(ResumableError, match="rank 0 ended before it began"):
        wait_for_launch(tmp_path, Rank(1, 2, "x"), 60)


def test_signs_of_life_do_not_depend_on_the_clock(tmp_path):
    alive = tmp_path / "alive"
    pulse = Pulse(alive)
    assert not pulse.was_there
    for t in (1.0, 2.0, time.time() + 1e6):
        # of a machine whose clock is wrong by years
        alive.touch()
        os.utime(alive, (t, t))
        time.sleep(0.05)
        assert pulse.silent() < 0.04
    time.sleep(0.1)
    assert pulse.silent() > 0.09
    alive.unlink()
    assert pulse.silent() > 0.09
    assert pulse.was_there
    assert not pulse.there


def test_what_ranks_left_damaged_is_run_again_by_the_next_launch(site):
    Path("orders/seconds").write_text("0.03")
    processes = launch(site, 2)
    until(lambda: kept("store-1") > 3)
    for process in processes:
        process.kill()
    codes(processes)
    store = Path("out/scan.run/store-1")
    whole = bytearray((store / "sums.bin").read_bytes())
    whole[5] ^= 1
    (store / "sums.bin").write_bytes(whole)
    assert codes(launch(site, 2, "--resume")) == [0, 0], log()
    assert_right()


def test_finished_lines_are_not_read_again_and_again(site, monkeypatch):
    # by rank 1, all of them, before rank 0 begins
    made = job.prepare(gpuem.open("data.npy"), [gpuem.Sum()], recipe.run_section(device="cpu", threads=1))
    folder = Path("run")
    Claims(folder, "x", 0, 2, SHARDS).begin()
    with RunFolder(folder, rank=1) as kept:
        ranks.assist(made, Rank(1, 2, "x"), kept)
    looks = []
    look = ranks.Store.look
    monkeypatch.setattr(ranks.Store, "look", lambda self: (looks.append(self.folder.name), look(self))[1])
    made = job.prepare(gpuem.open("data.npy"), [gpuem.Sum()], recipe.run_section(device="cpu", threads=1))
    monkeypatch.setattr(ranks, "LOOK", 0.0)
    found = list(Collector(Rank(0, 2, "x"), folder).run(made, range(SHARDS), lambda *a, **b: None))
    assert sorted(partial.shard for partial in found) == list(range(SHARDS))
    assert looks == ["store-1"]


# ---- claims


def test_batches_cover_all_shards_and_end_with_single_ones():
    for shards, count in itertools.product((0, 1, 2, 7, 60, 1000, 160_000), (1, 2, 3, 16, 100)):
        made = batches(shards, count)
        assert [shard for batch in made for shard in batch] == list(range(shards))
        assert len(made) <= 2 * count * (np.log(max(shards, 1)) + 2)
        # nobody waits longer than for one shard of the last batches
        assert all(len(batch) == 1 for batch in made[-2 * count :])


@pytest.mark.parametrize("links", [True, False])
def test_every_batch_is_taken_once_by_threads_at_once(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    all_claims = [Claims(tmp_path, "job", rank, 8, 500) for rank in range(8)]
    all_claims[0].begin()
    taken = [[] for _ in all_claims]
    start = threading.Barrier(8)

    def take(rank):
        start.wait()
        while (batch := all_claims[rank].take()) is not None:
            taken[rank] += batch

    threads = [threading.Thread(target=take, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*taken)) == list(range(500))
    owners = all_claims[3].owners()
    assert owners == {shard: rank for rank, shards in enumerate(taken) for shard in shards}
    # of another launch, and what was left of one
    assert Claims(tmp_path, "another", 0, 8, 500).owners() == {}
    all_claims[0].begin()
    assert [path.name for path in tmp_path.iterdir()] == [".gpuem-files.json"]
    assert all_claims[0].owners() == {}


def refuse_links(self, target):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_link_that_was_made_though_the_server_said_otherwise(tmp_path, monkeypatch):
    real = Path.hardlink_to

    def link_twice(self, target):
        # as a client that sends its request again, because the first answer was lost
        real(self, target)
        real(self, target)

    monkeypatch.setattr(Path, "hardlink_to", link_twice)
    claims = Claims(tmp_path, "job", 3, 4, 10)
    claims.begin()
    assert claims.take() == range(1)
    assert claims.owners() == {0: 3}


def test_threads_of_a_rank_are_all_busy_though_it_has_few_of_the_shards(site):
    """Of float sums shards are begun in order, as far ahead as the threads of one rank need."""
    dispatch = Dispatch(range(0, SHARDS, 16), ahead=8)
    taken = [dispatch.take(f"thread-{k}", 0.0) for k in range(4)]
    assert [task.shard for task in taken] == [0, 16, 32, 48]


def test_images_that_wait_for_their_turn_are_read_again_from_disk(site, monkeypatch):
    monkeypatch.setattr(engine, "WAITING_NBYTES", 2000)
    made = job.prepare(gpuem.open("data.npy"), [gpuem.Sum()], recipe.run_section(device="cpu", threads=1))
    partials = {partial.shard: partial for partial in local.run(made)}
    in_memory = []

    def backwards():
        for shard in reversed(range(SHARDS)):
            yield partials[shard]
            in_memory.append(sum(pair is not None for pair in totals.waiting.values()))

    wanted = truth()["sum/sum"].data
    totals = engine._empty_totals(made)
    monkeypatch.setattr(engine, "_empty_totals", lambda job: totals)
    read = []
    found = engine.combine(made, backwards(), lambda shard: (read.append(shard), partials[shard])[1])
    assert found.sums.total.tobytes() == wanted.tobytes()
    assert max(in_memory) <= 3
    assert len(read) >= SHARDS - 5


# ---- launchers

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
TORCH = {
    "RANK": "5",
    "WORLD_SIZE": "6",
    "LOCAL_RANK": "2",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "1",
}
OMPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMIX_NAMESPACE": "p1"
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        (SLURM, Rank(3, 8, "77-0")),
        ({**SLURM, "SLURM_RESTART_COUNT": "2"}, Rank(3, 8, "77-0-2")),
        (OMPI, Rank(1, 2, "p1")),
        # inside a Slurm job, whose own numbers are those of the batch script
        ({**SLURM, "SLURM_PROCID": "0", **OMPI}, Rank(1, 2, "77-0-p1")),
        ({**SLURM, **TORCH}, Rank(5, 6, "77-0-abc-1")),
        ({**SLURM, **MPICH}, Rank(2, 4, "77-0")),
        ({**MPICH, "GPUEM_LAUNCH": "mine"}, Rank(2, 4, "mine")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Rank(0, 1, "")),
    ],
)
def test_launchers(environment, rank):
    assert from_environment(environment) == rank


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "none of RANK, OMPI.*, PMI_RANK, SLURM_PROCID is set"),
        ({"SLURM_PROCID": "0"}, "none of"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "nothing names this launch: set GPUEM_LAUNCH"),
        ({**TORCH, "TORCHELASTIC_RUN_ID": "none"}, "nothing names this launch"),
        ({**SLURM, "SLURM_PROCID": "8"}, "SLURM_PROCID=8, SLURM_NTASKS=8: there is no such process"),
        ({**SLURM, "SLURM_PROCID": "x"}, "not numbers"),
    ],
)
def test_what_no_launcher_says(environment, said):
    with pytest.raises(RecipeError, match=said):
        from_environment(environment)


@pytest.mark.parametrize(
    ("environment", "gpus", "chosen"),
    [
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "4,5,6"}, 8, "5"),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 0, "GPU-b"),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "7"}, 8, "7"),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": ""}, 8, ""),
        (OMPI, 4, "1"),
        ({**TORCH}, 2, "0"),
        (OMPI, 1, None),
        ({}, 4, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 4, None),
    ],
)
def test_every_rank_of_a_machine_has_its_own_gpu(tmp_path, environment, gpus, chosen):
    for name in [*(f"nvidia{k}" for k in range(gpus)), "nvidiactl", "nvidia-uvm"]:
        (tmp_path / name).touch()
    environment = dict(environment)
    choose_gpu(environment, tmp_path)
    assert environment.get("CUDA_VISIBLE_DEVICES") == chosen
