"""Shards on Dask workers: the same bits as here, whoever runs them and whatever goes wrong on the way."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import crystal
import numpy as np
import pytest
import small_shards
import standin
from emulation import needs_compiler
from small_shards import fault, started

import gpuem
from gpuem import executors, job, recipe, tiles
from gpuem.backends import cuda_plan
from gpuem.errors import DataError, DeviceError, InputError, PlanError, ReadError, RecipeError, ResumableError

pytest.importorskip("distributed")

import dask
from distributed import LocalCluster

from gpuem.executors import dask_crew, dask_line, dask_shards, dask_workers
from gpuem.executors.dask_shards import Answer
from gpuem.executors.dispatch import Task

HERE = Path(__file__).parent
FRAME = (16, 16)
SCAN = (12, 10)
NBYTES = 512
QUIET = {"scheduler_kwargs": {"dashboard": False, "dashboard_address": "127.0.0.1:0"}}
# floats are twice as large
SHARDS = {"ints": 60, "floats": 120}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in small_shards.cuts(NBYTES).items():
        monkeypatch.setattr(tiles, name, value)


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    """The folder in which workers find what is to happen to them."""
    folder = tmp_path_factory.mktemp("orders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(small_shards.FOLDER, str(folder))
        patch.setenv("GPUEM_TEST_FRAME_NBYTES", str(NBYTES))
        yield folder


@pytest.fixture(scope="module")
def cluster(orders):
    """Two workers, 0 and 1, that stay for all tests of this file."""
    preload = {"distributed.worker.preload": [str(HERE / "small_shards.py")]}
    with (
        dask.config.set({**dask_workers.SETTINGS, **preload}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None, **QUIET) as made,
    ):
        yield made


@pytest.fixture(autouse=True)
def _no_orders(request):
    """What was ordered is over; workers that died of it are there again."""
    yield
    if "orders" in request.fixturenames:
        for path in request.getfixturevalue("orders").iterdir():
            path.unlink()
    if "cluster" in request.fixturenames:
        made = request.getfixturevalue("cluster")
        until(lambda: alive(made) == {worker.pid for worker in made.workers.values()} and len(alive(made)) == 2)


def alive(cluster):
    """Processes of the workers that the scheduler knows."""

    def there(dask_scheduler):
        return {state.metrics.get("pid") or state.pid for state in dask_scheduler.workers.values()}

    return there(cluster.scheduler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One scan as counts and as floats of very different sizes, so that the order of sums shows."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(7)
    np.save(folder / "ints.npy", rng.integers(0, 60_000, (*SCAN, *FRAME), dtype=np.uint16))
    np.save(folder / "floats.npy", rng.lognormal(0, 5, (*SCAN, *FRAME)).astype("f4"))
    return folder


def analyses():
    mask = np.random.default_rng(1).random(FRAME)
    return [
        gpuem.Sum(),
        gpuem.VirtualDetector(name="disk", center=(8, 8), outer=5.5),
        gpuem.VirtualDetector(name="weights", shape="mask", mask=mask),
        gpuem.CenterOfMass(name="com"),
    ]


def maps(found):
    return {name: np.asarray(item.data) for name, item in found.maps.items()}


def assert_same(found, wanted):
    found, wanted = maps(found), maps(wanted)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].tobytes() == array.tobytes(), name


def run(ds, where=None, **options):
    """On these workers, or here."""
    if where is not None:
        options["scheduler"] = getattr(where, "scheduler_address", where)
    return gpuem.run(ds, options.pop("analyses", None) or analyses(), device=options.pop("device", "cpu"), **options)


def events(folder, name=None):
    found = [json.loads(line) for line in (Path(folder) / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == name] if name else found


# ---- the same bits


@pytest.mark.parametrize("name", ["ints", "floats"])
@pytest.mark.parametrize("roi", [None, (1, 11, 2, 7), "mask"])
def test_the_same_bits_on_workers_and_on_any_number_of_threads(cluster, data, name, roi):
    ds = gpuem.open(data / f"{name}.npy")
    roi = np.random.default_rng(2).random(SCAN) > 0.5 if roi == "mask" else roi
    wanted = run(ds, roi=roi, threads=1)
    for threads in (2, 3, 8):
        assert_same(run(ds, roi=roi, threads=threads), wanted)
    assert_same(run(ds, cluster, roi=roi), wanted)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_same_bits_of_any_number_of_workers(data, count):
    ds = gpuem.open(data / "floats.npy")
    with LocalCluster(n_workers=count, threads_per_worker=2, processes=False, dashboard_address=None, **QUIET) as made:
        found = run(ds, made, folder="run")
        assert found.provenance["workers"] == count
        assert found.provenance["threads"] == 2 * count
    assert_same(found, run(ds))
    # workers that are threads are told apart
    ran = {event["worker"] for event in events("run", "shard")}
    assert ran <= {event["worker"] for event in events("run", "worker")}
    assert len({event["worker"] for event in events("run", "worker")}) == 2 * count


def test_workers_that_are_started_here(data, orders):
    ds = gpuem.open(data / "floats.npy")
    with dask.config.set({"distributed.worker.preload": [str(HERE / "small_shards.py")]}):
        found = run(ds, workers=2, folder="run")
    assert_same(found, run(ds))
    assert events("run", "start")[0]["executor"] == "dask"
    assert {event["shard"] for event in events("run", "shard")} == set(range(SHARDS["floats"]))


def test_strain_has_the_same_bits(cluster):
    _pattern, frames, _ = crystal.planted()
    np.save("strain.npy", frames)
    ds = gpuem.open("strain.npy")
    wanted = gpuem.run(ds, gpuem.Strain(), device="cpu")
    assert_same(run(ds, cluster, analyses=gpuem.Strain()), wanted)


def test_masked_frames_are_the_same(cluster, data):
    frames = np.load(data / "floats.npy")
    frames[3, 4, 5, 6] = np.nan
    frames[9, 1] = np.inf
    np.save("bad.npy", frames)
    ds = gpuem.open("bad.npy")
    with pytest.raises(DataError, match=r"frame 34.*NaN"):
        run(ds, cluster)
    found = run(ds, cluster, on_error="mask")
    assert_same(found, run(ds, on_error="mask"))
    assert found.provenance["frames"]["masked"] == 2


def test_a_run_that_was_stopped_goes_on_where_it_was_and_elsewhere(cluster, data):
    ds = gpuem.open(data / "floats.npy")

    def stop(frames):
        stop.count += 1
        if stop.count == 20:
            raise KeyboardInterrupt

    stop.count = 0
    with pytest.raises(ResumableError, match="--resume"):
        run(ds, cluster, folder="run", progress=stop)
    assert_same(run(ds, folder="run", resume=True), run(ds))
    again = [event["shard"] for event in events("run", "shard")]
    assert sorted(again) == list(range(SHARDS["floats"]))


def test_many_runs_one_after_another_leave_nothing_on_workers(cluster, data):
    options = recipe.run_section(device="cpu", scheduler=cluster.scheduler_address)
    wanted = {name: run(gpuem.open(data / f"{name}.npy")) for name in ("ints", "floats")}
    with executors.crew(options) as crew:
        for name in ("ints", "floats", "ints"):
            ds = gpuem.open(data / f"{name}.npy")
            found = job._run(ds, analyses(), options, None, None, crew)
            assert_same(found, wanted[name])
            assert left_over(crew.line.client) == []


def until(found, seconds=60):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it didn't come"
        time.sleep(0.05)


def left_over(client):
    """Jobs of gpuem that workers still have, or the scheduler would give to new ones."""

    def there(dask_worker):
        return [name for name in dask_worker.plugins if name.startswith("gpuem")]

    def to_come(dask_scheduler):
        return [name for name in (*dask_scheduler.worker_plugins, *dask_scheduler.plugins) if "gpuem" in str(name)]

    return sum(client.run(there).values(), client.run_on_scheduler(to_come))


def test_two_clients_of_one_scheduler_at_once(cluster, data, orders):
    (orders / "seconds").write_text("0.01")
    found = {}

    def one(name):
        found[name] = run(gpuem.open(data / f"{name}.npy"), cluster)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("ints", "floats")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for name in ("ints", "floats"):
        assert_same(found[name], run(gpuem.open(data / f"{name}.npy")))


# ---- who may work


def test_data_in_this_process_is_refused(cluster):
    with pytest.raises(InputError, match=r"array in this process.*save it"):
        run(np.ones((4, 4, *FRAME), np.uint16), cluster)


def test_a_gpu_is_wanted_and_workers_have_none(cluster, data, monkeypatch):
    if not dask_workers.why_no_gpu():
        pytest.skip("there is a GPU")
    ds = gpuem.open(data / "ints.npy")
    options = recipe.run_section(device="cuda", scheduler=cluster.scheduler_address)
    made = job.prepare(ds, analyses(), recipe.run_section(device="cpu"))
    with executors.crew(options) as crew, pytest.raises(DeviceError, match="2 of 2 workers see no GPU") as caught:
        crew.settle(made)
    for worker in cluster.workers.values():
        assert f"{platform.node()}:{worker.pid}" in str(caught.value)
    with executors.crew(options) as crew:
        assert left_over(crew.line.client) == []


def answer(k, **changes):
    return Answer(
        **{
            "who": f"n{k}:1",
            "host": f"n{k}",
            "version": dask_shards.version(),
            "device": "cpu",
            "threads": 1,
            "cuts": "a",
        }
        | changes
    )


@pytest.mark.parametrize(
    ("device", "answers", "error", "said"),
    [
        (
            "auto",
            [{"device": "cuda"}, {"why": "no driver"}],
            DeviceError,
            "1 of 2 workers see no GPU: n1:1 .no driver.*cpu",
        ),
        ("cuda", [{"device": "cuda"}, {"why": "none"}], DeviceError, "n1:1"),
        ("cuda", [{"device": "cuda"}, {"device": "", "kind": "DeviceError", "why": "old"}], DeviceError, "n1:1 .old."),
        ("cpu", [{}, {"device": "", "kind": "PlanError", "why": "needs 9 GB"}], PlanError, "worker n1:1: needs 9 GB"),
        ("cpu", [{}, {"device": "", "kind": "InputError", "why": "no copy"}], InputError, "worker n1:1: no copy"),
        ("cpu", [{}, {"version": "0.0.1"}], DeviceError, "n1:1: it has gpuem 0.0.1"),
        ("auto", [{}, {"cuts": "b"}], DeviceError, "worker n1:1: it cuts"),
    ],
)
def test_workers_that_do_not_suit_are_named(device, answers, error, said):
    with pytest.raises(error, match=said):
        dask_crew.refuse_unfit([answer(k, **changes) for k, changes in enumerate(answers)], device)
    dask_crew.refuse_unfit([answer(0), answer(1)], "auto")
    dask_crew.refuse_unfit([answer(0, device="cuda"), answer(1, device="cuda")], "cuda")


def test_another_version_on_workers_is_refused(cluster, data, monkeypatch):
    monkeypatch.setattr(dask_shards, "version", lambda: "99.0")
    with pytest.raises(DeviceError, match=r"2 of 2 workers have another gpuem than 99.0 here: tcp://.* has gpuem"):
        run(gpuem.open(data / "ints.npy"), cluster)


def test_a_late_worker_of_another_version_is_left_out(cluster, data):
    options = recipe.run_section(device="cpu", scheduler=cluster.scheduler_address)
    said = []
    with executors.crew(options) as crew:
        crew._cuts = "a"
        for k, changes in enumerate([{"version": "1"}, {"cuts": "b"}, {"device": "", "why": "no"}, {}]):
            worker = dask_line.Worker(f"tcp://{k}", "")
            crew._workers[worker.address] = worker
            crew._hire(worker, answer(k, **changes), lambda event, **facts: said.append((event, facts["worker"])))
        assert [worker.room for worker in crew._hired()] == [2]
        crew._workers.clear()
    assert said == [("excluded", "n0:1"), ("excluded", "n1:1"), ("excluded", "n2:1"), ("worker", "n3:1:0")]


def test_memory_that_does_not_suffice_is_told_by_name(cluster, data):
    ds = gpuem.open(data / "ints.npy")
    made = job.prepare(ds, analyses(), recipe.run_section(device="cpu"))
    options = recipe.run_section(device="cpu", scheduler=cluster.scheduler_address, memory="100 MB")
    with executors.crew(options) as crew, pytest.raises(PlanError, match=rf"worker {platform.node()}:\d+: .*memory"):
        crew.settle(made)


def test_workers_of_one_machine_share_its_memory_and_processors(data):
    ds = gpuem.open(data / "ints.npy")
    made = job.prepare(ds, analyses(), recipe.run_section(device="cpu"))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dask_shards.memory, "available_memory", lambda processes: 800 // processes)
        patch.setattr(dask_shards.tiles, "Limits", lambda *given: seen.append(given) or SimpleNamespace())
        backend = SimpleNamespace(NAME="cuda", prepare=lambda *_: None, plan=lambda *_: None)
        patch.setattr(dask_shards.backends, "select", lambda device: backend)
        patch.setattr(dask_shards.local, "cpus", lambda: 32)
        dask_shards.unpacked(dask_shards.pickle.loads(dask_shards.pack(made, recipe.Run())), 1, 4)
        dask_shards.unpacked(dask_shards.pickle.loads(dask_shards.pack(made, recipe.Run(threads=3, memory=5))), 1, 4)
    assert [(limits[2], limits[3]) for limits in seen] == [(8, 200), (3, 5)]


# ---- schedulers


@pytest.mark.parametrize("content", [None, "", '{"address": "tcp', "[]", '{"id": 3}'])
def test_a_scheduler_file_that_never_names_a_scheduler(data, content):
    if content is not None:
        Path("scheduler.json").write_text(content)
    with pytest.raises(ResumableError, match=r"scheduler.json: (no such file|this file is none of a scheduler)"):
        run(gpuem.open(data / "ints.npy"), "scheduler.json", patience=0.5)


def test_a_scheduler_file_that_is_written_a_little_later(cluster, data):
    def write():
        time.sleep(0.3)
        Path("scheduler.json").write_text('{"addr')
        time.sleep(0.5)
        Path("scheduler.json").write_text(json.dumps({"address": cluster.scheduler_address}))

    Path("scheduler.json").write_text("")
    writing = threading.Thread(target=write)
    writing.start()
    ds = gpuem.open(data / "ints.npy")
    assert_same(run(ds, "scheduler.json", patience=30), run(ds))
    writing.join()


def test_a_scheduler_is_named_by_host_and_port_alone(cluster, data):
    ds = gpuem.open(data / "ints.npy")
    assert_same(run(ds, cluster.scheduler_address.removeprefix("tcp://")), run(ds))


def test_nobody_answers_there(data, monkeypatch):
    monkeypatch.setattr(dask_workers, "LEAST_PATIENCE", 0.5)
    with pytest.raises(
        ResumableError, match=r"scheduler 127.0.0.1:1: tcp://127.0.0.1:1 doesn't answer .*, for 0 s .patience"
    ):
        run(gpuem.open(data / "ints.npy"), "127.0.0.1:1", patience=0.5)
    with pytest.raises(RecipeError, match="not an address"):
        run(gpuem.open(data / "ints.npy"), "nonsense://1.2.3.4:5", patience=0.5)


# ---- faults


def test_a_worker_whose_gpu_throws_is_left_out(cluster, data, orders):
    # the others take a little: they must not have done all before it has failed
    (orders / "seconds").write_text("0.03")
    fault(orders, "gpu", "DeviceError", worker="1")
    ds = gpuem.open(data / "ints.npy")
    assert_same(run(ds, cluster, folder="run"), run(ds))
    bad = f"{platform.node()}:{cluster.workers[1].pid}"
    (excluded,) = events("run", "excluded")
    assert excluded["worker"] == bad
    assert "ordered DeviceError" in excluded["why"]
    assert {event["worker"] for event in events("run", "retry")} == {bad}
    assert not [event for event in events("run", "shard") if event["worker"].startswith(bad)]


@pytest.mark.parametrize("kind", ["ReadError", "MemoryError", "OSError", "InputError"])
def test_what_fails_on_one_worker_is_done_by_the_other(cluster, data, orders, kind):
    fault(orders, "one", kind, worker="0", shards=[3, 30])
    ds = gpuem.open(data / "floats.npy")
    assert_same(run(ds, cluster, folder="run"), run(ds))
    assert all(f"ordered {kind}" in event["why"] for event in events("run", "retry"))


@pytest.mark.parametrize("kind", ["ReadError", "DeviceError"])
def test_what_fails_once_is_tried_again(cluster, data, orders, kind):
    times = 2 if kind == "ReadError" else 1
    fault(orders, "once", kind, shards=[7], times=times)
    ds = gpuem.open(data / "ints.npy")
    assert_same(run(ds, cluster, folder="run"), run(ds))
    assert [event["shard"] for event in events("run", "retry")] == [7] * times
    assert started(orders).count(7) == times + 1


def test_bytes_that_never_come_end_the_run_resumably(cluster, data, orders):
    fault(orders, "ever", "ReadError", shards=[7])
    ds = gpuem.open(data / "ints.npy")
    with pytest.raises(ResumableError, match=r"shard 7 failed \d+ times.*ordered ReadError"):
        run(ds, cluster, folder="run", patience=1)
    (orders / "fault-ever.json").unlink()
    assert_same(run(ds, cluster, folder="run", resume=True), run(ds))


def test_a_device_error_of_all_workers_is_one(cluster, data, orders):
    fault(orders, "all", "DeviceError", shards=[7])
    with pytest.raises(DeviceError, match="ordered DeviceError"):
        run(gpuem.open(data / "ints.npy"), cluster)


def test_an_error_that_nobody_expected_names_its_place(cluster, data, orders):
    fault(orders, "bug", "ZeroDivisionError", shards=[7])
    with pytest.raises(ZeroDivisionError) as caught:
        run(gpuem.open(data / "ints.npy"), cluster)
    assert "small_shards.py" in "".join(caught.value.__notes__)


def test_an_error_that_can_not_travel(cluster, data, orders):
    fault(orders, "strange", "strange", shards=[7])
    with pytest.raises(RuntimeError, match="StrangeError: strange"):
        run(gpuem.open(data / "ints.npy"), cluster)
    ds = gpuem.open(data / "ints.npy")
    (orders / "fault-strange.json").unlink()
    assert_same(run(ds, cluster), run(ds))


def test_errors_travel_whole():
    for error in (DataError("broken", (1, 2)), ReadError("gone", (3,)), gpuem.TruncatedError("short", 4)):
        found = dask_shards.pickle.loads(dask_shards.pickle.dumps(dask_shards.sendable(error)))
        assert type(found) is type(error)
        assert (str(found), vars(found)) == (str(error), vars(error))


# ---- workers that come and go; more of that, by the hard way, in test_dask_kills.py


def in_threads(count):
    """Workers that are threads of this process: they start at once."""
    return LocalCluster(
        n_workers=count, threads_per_worker=1, processes=False, dashboard_address=None, memory_limit=None, **QUIET
    )


def test_a_worker_that_joins_late_gets_work(data):
    ds = gpuem.open(data / "floats.npy")
    with in_threads(1) as made:

        def grow(frames):
            grow.count += 1
            if grow.count == 5:
                made.scale(3)
            time.sleep(0.02)

        grow.count = 0
        assert_same(run(ds, made, folder="run", progress=grow), run(ds))
    joined = [event["worker"] for event in events("run", "worker")]
    assert len(joined) == 3
    assert {event["worker"] for event in events("run", "shard")} == set(joined)


def test_the_only_worker_hangs_until_another_one_joins(data, orders, monkeypatch):
    for name, value in {"LEAST_HANG": 0.5, "SLOWER": 1.0}.items():
        monkeypatch.setattr(sys.modules["gpuem.executors.dispatch"], name, value)
    fault(orders, "hang", "hang", worker="0", times=1)
    ds = gpuem.open(data / "floats.npy")
    small_shards.install()
    try:
        with in_threads(1) as made:
            timer = threading.Timer(2, made.scale, (2,))
            timer.start()
            assert_same(run(ds, made, folder="run", patience=0.5), run(ds))
            (orders / "fault-hang.json").unlink()
    finally:
        small_shards.uninstall()
    assert len(events("run", "worker")) == 2
    assert events("run", "hang")


def test_a_worker_that_dies_is_started_again_and_its_shards_are_run_elsewhere(cluster, data, orders):
    (orders / "seconds").write_text("0.03")
    ds = gpuem.open(data / "floats.npy")
    victim = cluster.workers[1].pid

    def kill(frames):
        kill.count += 1
        if kill.count == 10:
            os.kill(victim, 9)

    kill.count = 0
    assert_same(run(ds, cluster, folder="run", progress=kill), run(ds))
    (lost,) = events("run", "lost")
    assert lost["worker"] == f"{platform.node()}:{victim}"
    begun = started(orders)
    # what was in work there, and what a task of it had done before
    assert len(begun) - len(set(begun)) <= len(lost["shards"])
    assert len([event["shard"] for event in events("run", "shard")]) == SHARDS["floats"]


def test_a_shard_that_kills_every_worker_is_named_and_others_are_not(cluster, data, orders):
    fault(orders, "kill", "kill", shards=[7])
    ds = gpuem.open(data / "ints.npy")
    with pytest.raises(ResumableError, match="shard 7 was running on each of 3 workers that died"):
        run(ds, cluster, folder="run")
    (orders / "fault-kill.json").unlink()
    assert_same(run(ds, cluster, folder="run", resume=True), run(ds))


def test_a_worker_that_dies_while_its_results_are_fetched_costs_nothing_else(cluster, data, orders, monkeypatch):
    ds = gpuem.open(data / "floats.npy")
    (orders / "seconds").write_text("0.02")
    come, killed = dask_line.Line._come, []

    async def late(self, worker, future):
        if not killed and worker.answer is not None and len(started(orders)) > 10:
            killed.append(worker.answer.who)
            await future
            os.kill(int(worker.answer.who.rpartition(":")[2]), 9)
            await dask_line.asyncio.sleep(0.5)
        await come(self, worker, future)

    monkeypatch.setattr(dask_line.Line, "_come", late)
    assert_same(run(ds, cluster, folder="run"), run(ds))
    assert [event["worker"] for event in events("run", "lost")] == killed


def test_a_worker_that_is_left_alone_does_not_keep_the_run(cluster, data, orders):
    # one shard hangs for ever on one worker: another one does it
    fault(orders, "hang", "hang", worker="0", times=1)
    ds = gpuem.open(data / "ints.npy")
    dispatch = sys.modules["gpuem.executors.dispatch"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "LEAST_HANG", 0.5)
        patch.setattr(dispatch, "SLOWER", 1.0)
        assert_same(run(ds, cluster, folder="run", patience=0.5), run(ds))
    assert {event["worker"] for event in events("run", "hang")} == {f"{platform.node()}:{cluster.workers[0].pid}"}


def test_all_hang(cluster, data, orders, monkeypatch):
    fault(orders, "hang", "hang", times=2)
    monkeypatch.setattr(dask_crew, "LEAST_SILENCE", 2.0)
    with pytest.raises(ResumableError, match="no Dask worker has finished anything for"):
        run(gpuem.open(data / "ints.npy"), cluster, patience=0.5)


def test_nobody_is_left(data, orders, monkeypatch):
    monkeypatch.setattr(dask_crew, "LEAST_PATIENCE", 1.0)
    ds = gpuem.open(data / "floats.npy")
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None, **QUIET) as made:

        def leave(frames):
            leave.count += 1
            if leave.count == 10:
                made.scale(0)

        leave.count = 0
        with pytest.raises(ResumableError, match=r"all Dask workers are gone for \d+ s.*--resume"):
            run(ds, made, folder="run", progress=leave, patience=0)
    assert len(events("run", "lost")) == 2
    assert_same(run(ds, folder="run", resume=True), run(ds))


# ---- order and cost


def test_quick_shards_go_many_at_a_time_and_single_at_the_end(cluster, data):
    options = recipe.run_section(device="cpu", scheduler=cluster.scheduler_address)
    with executors.crew(options) as crew:
        crew._workers = {str(k): dask_line.Worker(str(k), "", answer(k)) for k in range(2)}
        waiting = SimpleNamespace(waiting=1000)
        assert crew._at_once(waiting) == 1
        crew._seconds.extend([0.001] * 10)
        assert crew._at_once(waiting) == dask_crew.MOST_SHARDS
        assert [crew._at_once(SimpleNamespace(waiting=n)) for n in (0, 15, 32, 160)] == [1, 1, 2, 10]
        crew._seconds.extend([1.0] * 100)
        assert crew._at_once(waiting) == 1
        crew._workers.clear()


CLIENT = """
import json, sys
import numpy as np, dask
import gpuem
from gpuem import tiles
def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
class Watch:
    count, seen = 0, {}
    def __call__(self, frames):
        self.count += 1
        if self.count in (2000, 10000):
            self.seen[self.count] = resident()
if __name__ == "__main__":
    (scheduler,) = sys.argv[1:]
    watch = Watch()
    ds = gpuem.open("many.npy")
    asked = [gpuem.Sum(), gpuem.CenterOfMass()]
    found = gpuem.run(ds, asked, device="cpu", scheduler=scheduler, progress=watch)
    assert watch.count == 10000
    np.save("sum.npy", found["sum/sum"].data)
    print(json.dumps(watch.seen))
"""


def test_ten_thousand_shards_leave_the_memory_of_the_client_flat(cluster):
    frames = np.random.default_rng(3).integers(0, 99, (200, 100, 16, 16), dtype=np.uint16)
    np.save("many.npy", frames)
    Path("client.py").write_text(CLIENT)
    done = subprocess.run(
        [sys.executable, "client.py", cluster.scheduler_address], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seen = {int(n): nbytes for n, nbytes in json.loads(done.stdout.splitlines()[-1]).items()}
    # a kilobyte for every shard more would be 8 MB
    assert seen[10000] < seen[2000] + (4 << 20)
    np.testing.assert_array_equal(np.load("sum.npy"), frames.sum((0, 1)))


# ---- GPUs


@needs_compiler
def test_a_worker_keeps_its_session_on_the_gpu_and_drops_it_after_an_error(data, monkeypatch):
    """On a stand-in for the GPU, with a worker that is a thread of this process."""
    from gpuem import stream

    opened, closed, sizes, failing = [], [], [], [3]
    session, on_device = stream.session, stream.run

    @contextmanager
    def counted(made):
        opened.append(threading.current_thread().name)
        with session(made) as found:
            yield found
        closed.append(1)

    def fails_once(made, shards, held, **options):
        shards = list(shards)
        sizes.append(len(shards))
        for partial in on_device(made, shards, held, **options):
            if failing == [partial.shard]:
                failing.clear()
                raise DeviceError("it fell off the bus")
            yield partial

    monkeypatch.setattr(cuda_plan, "SIZES", tiles.Sizes(2 * NBYTES, 2 * NBYTES, 2 * NBYTES))
    ds = gpuem.open(data / "ints.npy")
    with standin.installed("late"):
        wanted = run(ds, device="cuda")
    monkeypatch.setattr(stream, "session", counted)
    monkeypatch.setattr(stream, "run", fails_once)
    with standin.installed("late"), in_threads(2) as made:
        found = run(ds, made, device="cuda", folder="run")
        until(lambda: len(closed) == len(opened))
    assert_same(found, wanted)
    # one for each worker, and a new one after the error
    assert len(opened) == 3
    assert len(sizes) > 10
    assert [event["shard"] for event in events("run", "retry")] == [3]
    facts = found.provenance
    assert facts["device"] == "cuda"
    assert facts["transfer"]["kind"] == "pinned"
    assert facts["gpu"]["name"]
    assert facts["device_bytes"]


@needs_compiler
def test_gpus_and_processors_do_not_work_together(data, monkeypatch):
    ds = gpuem.open(data / "ints.npy")
    select, chosen = dask_shards.backends.select, []

    def every_other(device):
        chosen.append(device)
        return select("cpu" if len(chosen) % 2 else device)

    with standin.installed("late"), in_threads(2) as made:
        made_job = job.prepare(ds, analyses(), recipe.run_section(device="cuda"))
        monkeypatch.setattr(dask_shards.backends, "select", every_other)
        options = recipe.run_section(device="auto", scheduler=made.scheduler_address)
        with executors.crew(options) as crew, pytest.raises(DeviceError, match="1 of 2 workers see no GPU"):
            crew.settle(made_job)


DASK_CUDA = """
import json, os
from gpuem import recipe
from gpuem.executors import dask_workers
if __name__ == "__main__":
    dask_workers.why_no_gpu = lambda: ""
    with dask_workers.crew(recipe.run_section(workers=WORKERS)) as crew:
        client = crew.line.client
        client.wait_for_workers(NUMBER, timeout=60)
        def seen(dask_worker):
            manager = dask_worker.memory_manager
            memory = type(dask_worker.data).__name__, manager.memory_limit, manager.memory_spill_fraction
            return os.environ["CUDA_VISIBLE_DEVICES"], dask_worker.state.nthreads, memory
        print(json.dumps(sorted(client.run(seen).values())))
"""


@pytest.mark.parametrize(("workers", "number"), [('"all"', 4), ("9", 0)])
def test_a_worker_for_every_gpu(tmp_path, workers, number):
    """By dask-cuda, with a driver's library that lists four GPUs and has none."""
    pytest.importorskip("dask_cuda")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    source = HERE / "stubs/fake_nvml.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", source], check=True)
    Path("cluster.py").write_text(DASK_CUDA.replace("WORKERS", workers).replace("NUMBER", str(number)))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "DASK_CUDA_TEST_SINGLE_GPU": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "cluster.py"], capture_output=True, text=True, timeout=120, env=environment)
    if not number:
        assert "workers = 9: " in done.stderr
        assert "DeviceError" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [int(visible.split(",")[0]) for visible, _, _ in found] == list(range(number))
    assert all(threads == 1 for _, threads, _ in found)
    # nothing is ever spilled
    assert {memory[0] for _, _, memory in found} == {"dict"}


# ---- data near workers


def test_shards_go_to_workers_that_have_their_files(cluster, data):
    frames = np.load(data / "ints.npy")
    half = frames.reshape(2, -1, *FRAME)
    for k in range(2):
        Path(f"part_{k}.raw").write_bytes(half[k].tobytes())
    Path("nvme").mkdir()
    shutil.copy2("part_1.raw", "nvme")
    rule = {"hosts": ["localhost"], "folder": Path("nvme").absolute(), "files": ["part_1.raw"]}
    ds = gpuem.open(["part_0.raw", "part_1.raw"], scan=SCAN, frame=FRAME, dtype="uint16", copies=[rule])
    wanted = run(ds)
    with in_threads(1) as made:
        assert_same(run(ds, made, folder="run"), wanted)
    # those of the second file come first
    order = [event["shard"] for event in events("run", "shard")]
    assert set(order[:20]) <= set(range(30, 60))
    # and are read there
    options = recipe.run_section(device="cpu")
    made_job = job.prepare(ds, analyses(), options)
    parcel = dask_shards.pickle.loads(dask_shards.pack(made_job, options))
    found = dask_shards.unpacked(parcel, 1, 1)
    assert [str(file.path) for file in found.source.files] == [
        str(Path("part_0.raw").absolute()), str(Path("nvme/part_1.raw").absolute())
    ]  # fmt: skip
    Path("nvme/part_1.raw").write_bytes(b"short")
    with pytest.raises(InputError, match=r"worker .*: .*part_1.raw on .* is not a copy of"):
        run(ds, cluster)


def test_a_scheduler_file_counts_from_the_recipe_or_from_the_current_folder(tmp_path, monkeypatch):
    text = '[input]\npath = "a.npy"\n[[analysis]]\nkind = "sum"\n[run]\nscheduler = "{}"\n[output]\npath = "o.zarr"\n'
    (tmp_path / "of").mkdir()
    (tmp_path / "here").mkdir()
    path = tmp_path / "of/recipe.toml"
    monkeypatch.chdir(tmp_path / "here")
    for said, of_recipe, of_command in [
        ("s.json", str(tmp_path / "of/s.json"), str(tmp_path / "here/s.json")),
        ("/a/s.json", "/a/s.json", "/a/s.json"),
        ("tcp://h:1", "tcp://h:1", "tcp://h:1"),
        ("node1.cluster:8786", "node1.cluster:8786", "node1.cluster:8786"),
        ("[::1]:8786", "[::1]:8786", "[::1]:8786"),
    ]:
        path.write_text(text.format(said))
        assert recipe.load(path)[0].run.scheduler == of_recipe
        path.write_text(text.format("other.json"))
        assert recipe.load(path, scheduler=said)[0].run.scheduler == of_command


def test_a_worker_that_came_back_at_the_same_address_is_another_one(cluster, data):
    options = recipe.run_section(device="cpu", scheduler=cluster.scheduler_address)
    lost, given_back = [], []
    dispatch = SimpleNamespace(
        lost=lambda who, now: lost.append(who), give_back=lambda shards, who: given_back.extend(shards)
    )
    with executors.crew(options) as crew:
        worker = dask_line.Worker("tcp://n0:1", "first", answer(0))
        worker.under_way = {object(): [Task(1), Task(2)], object(): [Task(3)]}
        crew._workers[worker.address] = worker
        crew.line = SimpleNamespace(
            there=lambda: {"tcp://n0:1": ("second", "n0", "running")},
            cancel=lambda worker: None,
            ask=lambda worker, tasks, function, *given: given_back.append(function.__name__),
        )
        crew._heard = time.monotonic()
        crew._look(dispatch)
        assert lost == ["n0:1"]
        # what waited behind what was in work is not to blame
        assert given_back == [3, "plan"]
        assert crew._workers["tcp://n0:1"].number == "second"
        crew._workers.clear()
