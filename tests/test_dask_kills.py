"""Workers, client and scheduler die, at any moment: nothing is lost, and hardly anything is done twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import small_shards
from small_shards import started

import gpuem
from gpuem import tiles

pytest.importorskip("distributed")

from distributed import Client

HERE = Path(__file__).parent
# 12 x 10 positions of 11 x 11 float32, two of them a shard
NBYTES = 484
SHARDS = 60
RECIPE = """
[input]
path = "data.npy"
scan = [12, 10]
[run]
device = "cpu"
patience = {patience}
[[analysis]]
kind = "sum"
[[analysis]]
kind = "com"
[[analysis]]
kind = "virtual"
name = "disk"
center = [8, 8]
outer = 5.5
[output]
path = "out/scan.zarr"
previews = false
"""
NO_DASHBOARD = ("--no-dashboard",)
# tasks of many shards, and one that waits, on each of two workers
IN_FLIGHT = 2 * 2 * 32


class Place:
    """A folder with a scan, its recipe, and what is ordered; processes that work on it."""

    def __init__(self, folder: Path, stack: ExitStack, patience: float = 10) -> None:
        self.folder, self._stack = folder, stack
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.run = folder / "out/scan.run"
        frames = np.random.default_rng(5).lognormal(0, 5, (12, 10, 11, 11)).astype("f4")
        np.save(folder / "data.npy", frames)
        (folder / "scan.toml").write_text(RECIPE.format(patience=patience))
        self.scheduler = folder / "scheduler.json"
        self.environment = {
            **os.environ,
            small_shards.FOLDER: str(self.orders),
            "GPUEM_TEST_FRAME_NBYTES": str(NBYTES),
            "DASK_DISTRIBUTED__WORKER__PRELOAD": str(HERE / "small_shards.py"),
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s",
        }

    def start(self, *command: str, log: str = "log") -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            made = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self._stack.callback(end, made)
        return made

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        self.scheduler.unlink(missing_ok=True)
        made = self.start(
            sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0",
            "--scheduler-file", str(self.scheduler), *NO_DASHBOARD, log="scheduler.log",
        )  # fmt: skip
        until(self.scheduler.exists)
        return made

    def start_worker(self, *more: str) -> subprocess.Popen[bytes]:
        return self.start(
            sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(self.scheduler),
            "--nthreads", "1", "--memory-limit", "0", *NO_DASHBOARD, *more, log="worker.log",
        )  # fmt: skip

    def gpuem(self, *more: str) -> subprocess.Popen[bytes]:
        return self.start(
            sys.executable, str(HERE / "small_shards.py"), "run", "scan.toml", "--scheduler", str(self.scheduler), *more
        )

    def go_on(self) -> None:
        done = self.gpuem("--resume")
        assert done.wait(120) == 0, self.log()

    def log(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    def events(self, name: str) -> list[dict]:
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [event for event in found if event["event"] == name]

    def done(self, count: int):
        """Something to wait for: so many shards."""
        return lambda: len(self.events("shard")) >= count

    def maps(self) -> dict[str, bytes]:
        found = gpuem.load_results(self.folder / "out/scan.zarr")
        return {name: np.asarray(item.data).tobytes() for name, item in found.maps.items()}

    def workers(self) -> dict[str, int]:
        """Processes of the workers that are there."""

        def there(dask_scheduler):
            return {address: state.pid for address, state in dask_scheduler.workers.items()}

        with Client(scheduler_file=str(self.scheduler), set_as_default=False) as client:
            return client.run_on_scheduler(there)


def end(process: subprocess.Popen[bytes]) -> None:
    """And all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def until(found, seconds: float = 60) -> None:
    last = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < last, "it didn't come"
        time.sleep(0.02)


@contextmanager
def place(folder: Path, seconds: float = 0.01, **options):
    with ExitStack() as stack:
        made = Place(folder, stack, **options)
        (made.orders / "seconds").write_text(str(seconds))
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with place(tmp_path_factory.mktemp("site")) as made:
        made.server, made.hands = None, []
        yield made


@pytest.fixture
def site(shared):
    """A scheduler with two workers that come back when they die, and nothing done yet."""
    if shared.server is None or shared.server.poll() is not None:
        revive(shared)
    until(lambda: len(shared.workers()) == 2)
    for path in (*shared.orders.iterdir(), shared.folder / "log"):
        path.unlink(missing_ok=True)
    (shared.orders / "seconds").write_text("0.01")
    shutil.rmtree(shared.folder / "out", ignore_errors=True)
    return shared


def revive(made):
    """A new scheduler, with new workers."""
    for hand in made.hands:
        end(hand)
    made.server = made.start_scheduler()
    made.hands = [made.start_worker("--name", str(k)) for k in range(2)]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """The maps of a run that nobody disturbed, with the same cuts, in this process."""
    folder = tmp_path_factory.mktemp("truth")
    with pytest.MonkeyPatch.context() as patch, place(folder) as made:
        for name, value in small_shards.cuts(NBYTES).items():
            patch.setattr(tiles, name, value)
        gpuem.run_recipe(folder / "scan.toml")
        return made.maps()


def assert_nothing_was_lost(made: Place, truth, times: int = 1) -> None:
    assert made.maps() == truth
    begun = started(made.orders)
    assert set(begun) == set(range(SHARDS))
    assert len(begun) - len(set(begun)) <= times * IN_FLIGHT
    kept = [event["shard"] for event in made.events("shard")]
    # what is in the log was kept, and never run again
    assert len(kept) == len(set(kept))


def test_the_scheduler_dies(site, truth):
    client = site.gpuem()
    until(site.done(10))
    end(site.server)
    assert client.wait(90) == 75, site.log()
    assert "the Dask scheduler is lost" in site.log()
    assert "--resume" in site.log()
    kept = len(site.events("shard"))
    revive(site)
    site.go_on()
    assert site.events("start")[-1]["done"] >= kept
    assert_nothing_was_lost(site, truth)


def test_the_client_dies_and_workers_let_go_of_its_run(site, truth):
    client = site.gpuem()
    until(site.done(10))
    client.send_signal(signal.SIGKILL)
    client.wait()

    def over():
        def left(dask_worker):
            return [name for name in dask_worker.plugins if name.startswith("gpuem")]

        def coming(dask_scheduler):
            return [name for name in (*dask_scheduler.worker_plugins, *dask_scheduler.plugins) if "gpuem" in str(name)]

        with Client(scheduler_file=str(site.scheduler), set_as_default=False) as found:
            return not any(found.run(left).values()) and not found.run_on_scheduler(coming)

    until(over)
    begun = len(started(site.orders))
    time.sleep(0.3)
    # they don't work for nobody
    assert len(started(site.orders)) == begun
    site.go_on()
    assert_nothing_was_lost(site, truth)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_client_is_told_to_stop(site, truth, number):
    client = site.gpuem()
    until(site.done(10))
    client.send_signal(number)
    assert client.wait(60) == 75, site.log()
    assert site.events("stop")
    site.go_on()
    assert_nothing_was_lost(site, truth)


def test_ctrl_c_reaches_also_the_workers_that_were_started_here(tmp_path, truth):
    with place(tmp_path, 0.02) as made:
        program = [sys.executable, str(HERE / "small_shards.py"), "run", "scan.toml"]
        client = made.start(*program, "--workers", "2")
        until(made.done(5))
        # as a terminal does it
        os.killpg(client.pid, signal.SIGINT)
        assert client.wait(60) == 75, made.log()
        assert "Traceback" not in made.log()
        assert made.start(*program, "--workers", "2", "--resume").wait(90) == 0, made.log()
        assert_nothing_was_lost(made, truth)


def test_all_workers_die_and_nobody_starts_them_again(tmp_path, truth):
    with place(tmp_path, patience=1) as made:
        made.start_scheduler()
        hands = [made.start_worker("--no-nanny") for _ in range(2)]
        client = made.gpuem()
        until(made.done(10))
        for hand in hands:
            hand.kill()
        assert client.wait(90) == 75, made.log()
        assert "all Dask workers are gone" in made.log()
        assert len(made.events("lost")) == 2
        made.start_worker("--no-nanny")
        made.go_on()
        assert_nothing_was_lost(made, truth)


def test_all_workers_die_and_are_started_again(site, truth):
    client = site.gpuem()
    until(site.done(10))
    for pid in site.workers().values():
        os.kill(pid, signal.SIGKILL)
    assert client.wait(90) == 0, site.log()
    assert len(site.events("lost")) == 2
    assert_nothing_was_lost(site, truth)


def test_a_worker_that_stands_still_does_not_keep_the_run(tmp_path, truth):
    with place(tmp_path, patience=2) as made:
        made.start_scheduler()
        for k in range(2):
            made.start_worker("--name", str(k))
        client = made.gpuem()
        until(made.done(5))
        stopped = next(iter(made.workers().values()))
        os.kill(stopped, signal.SIGSTOP)
        try:
            assert client.wait(90) == 0, made.log()
        finally:
            os.kill(stopped, signal.SIGKILL)
        assert made.events("hang")
        assert_nothing_was_lost(made, truth)


def disturb(site: Place, who: str, seed: int, truth) -> None:
    """Kill one of them at a random moment; go on until all is done."""
    chance = random.Random(seed)
    client = site.gpuem("--resume")
    if chance.random() < 0.8:
        until(site.done(1))
    time.sleep(chance.uniform(0, 0.9))
    if who == "worker":
        pids = list(site.workers().values())
        os.kill(chance.choice(pids), signal.SIGKILL)
        assert client.wait(120) == 0, site.log()
    elif who == "client":
        client.kill()
        client.wait()
        site.go_on()
    else:
        end(site.server)
        assert client.wait(120) in (0, 75), site.log()
        revive(site)
        site.go_on()
    assert_nothing_was_lost(site, truth)


KILLED = ["worker", "client", "scheduler"]


@pytest.mark.parametrize(("who", "seed"), [(KILLED[k % 3], k) for k in range(8)])
def test_killed_at_a_random_moment(site, truth, who, seed):
    disturb(site, who, seed, truth)


@pytest.mark.slow
@pytest.mark.parametrize(("who", "seed"), [(KILLED[k % 3], k) for k in range(8, 28)])
def test_killed_at_many_more_random_moments(site, truth, who, seed):
    disturb(site, who, seed, truth)
