"""The scaling benchmark runs, checks what it times, and kills whom it says; the model tells what it was made of."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuem
from gpuem import tiles
from gpuem.backends import cuda_plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
pytest.importorskip("distributed")
import scale  # noqa: E402
import scale_model  # noqa: E402
import scale_runs  # noqa: E402
from scale_model import Client, Data, Machine  # noqa: E402

QUICK_SHARDS = 100


# ---- the benchmark


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The record of a quick run, and as it was written."""
    out = tmp_path_factory.mktemp("record") / "scale.json"
    record = scale.main(["--quick", "--out", str(out)])
    return record, json.loads(out.read_text())


def test_the_record_holds_every_section_and_every_single_time(quick):
    record, written = quick
    assert json.loads(json.dumps(record)) == written
    assert {one["what"] for one in record["runs"]} == {*scale.WORKS, "tiny", "maps"}
    assert {one.get("section") for one in record["runs"]} == {None, "kept", "calm", "killed"} or record["skipped"]
    for one in record["runs"]:
        assert len(one["times"]) == 1
        assert one["seconds"] > 0
        assert one["shards"] > 0
    assert {"cpu", "processors", "commit", "date", "load_before", "load_after"} <= record["machine"].keys()


def test_tiny_shards_are_tiny_in_the_workers_too_and_only_there(quick):
    record, _ = quick
    tiny = [one for one in record["runs"] if one["what"] == "tiny"]
    assert [one["shards"] for one in tiny] == [QUICK_SHARDS] * 3 + [QUICK_SHARDS // 5] * 3
    assert [one["kept"] for one in tiny] == [False, False, True] * 2
    # the image of the large ones is in their results
    assert tiny[-1]["partial_nbytes"] - tiny[0]["partial_nbytes"] > 8 * 256 * 250
    assert tiles.SHARD_NBYTES == 64 << 20


def test_weak_scaling_has_as_much_for_each_worker(quick):
    record, _ = quick
    for work in scale.WORKS:
        rows = [one for one in record["runs"] if one["what"] == work and one.get("scaling")]
        most = max(one["count"] for one in rows)
        (whole,) = {one["nbytes"] for one in rows if one["scaling"] == "strong"}
        assert {one["nbytes"] * most for one in rows if one["scaling"] == "weak"} <= {
            whole * one["count"] for one in rows if one["scaling"] == "weak"
        }


def test_one_worker_was_killed_and_only_its_shards_ran_again(quick):
    record, _ = quick
    if record["skipped"]:
        pytest.skip(record["skipped"]["killed"])
    (killed,) = [one for one in record["runs"] if one.get("section") == "killed"]
    # what it had in work and waiting
    assert 0 <= killed["again"][0] < killed["shards"]


def test_tiny_data_meet_no_target(quick):
    record, _ = quick
    assert all(one["met"] is None for one in record["targets"])


def test_targets_are_judged_where_they_were_measured():
    def one(count, seconds):
        return {"what": "masks", "by": "workers", "count": count, "scaling": "strong", "seconds": seconds}

    def tiny(ms, last):
        memory = {"2000": 100, "10000": last}
        return {"what": "tiny", "by": "workers", "frame": [16, 16], "kept": False, "ms_per_shard": ms} | {
            "client_memory": memory, "seconds": 1.0,
        }  # fmt: skip

    def judged(*runs):
        found = scale.targets({"runs": list(runs), "arguments": {"quick": False}})
        return {row["what"]: (row["found"], row["met"]) for row in found}

    good = judged(one(1, 1.9), one(2, 1.0), tiny(0.7, 101))
    assert good["masks: 2 workers, times 1 worker"] == (1.9, True)
    assert good["strain: 2 workers, times 1 worker"] == (None, None)
    assert good["ms per shard, 16x16, not kept"] == (0.7, True)
    assert [met for what, (_, met) in good.items() if "memory" in what] == [True]
    bad = judged(one(1, 1.7), one(2, 1.0), tiny(2.1, 200))
    assert [met for _, met in bad.values() if met is not None] == [False, False, False]


def test_a_wrong_result_is_not_timed(monkeypatch):
    maps = {"sum": np.arange(6.0)}

    def run(ds, resolved, who):
        found = {name: array + (who.count == 2) for name, array in maps.items()}
        return SimpleNamespace(seconds=1.0, own=1.0, maps=found, job=None)

    monkeypatch.setattr(scale, "run", run)
    data = SimpleNamespace(parts=2, opened=lambda work, parts: None)
    wanted = {}
    one, two = (SimpleNamespace(name="workers", count=n) for n in (1, 2))
    assert [how for how, _ in scale.one_turn(data, "masks", [], one, wanted)] == ["strong", "weak"]
    assert [how for how, _ in scale.one_turn(data, "masks", [], one, wanted)] == ["strong", "weak"]
    with pytest.raises(AssertionError, match="wrong result: sum"):
        next(scale.one_turn(data, "masks", [], two, wanted))


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"a": np.zeros(3)},
        {"a": np.array([0, 0, 1], np.int32)},
        {"a": np.zeros(3, np.uint32)},
        {"a": np.zeros(3, np.int32), "b": np.zeros(1)},
    ],
)
def test_same_means_all_bits_of_all_maps(found):
    wanted = {"a": np.zeros(3, np.int32)}
    scale_runs.same({"a": np.zeros(3, np.int32)}, wanted)
    with pytest.raises(AssertionError, match="wrong result"):
        scale_runs.same(found, wanted)
    nan = {"a": np.array([np.nan])}
    scale_runs.same(nan, {"a": np.array([np.nan])})


def test_who_is_killed_ran_the_last_shard_and_dies_once(tmp_path, monkeypatch):
    lines = [{"event": "shard", "worker": f"host:{pid}:0"} for pid in (11, 22, 33)]
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, how: killed.append((pid, how)))
    kill = scale.Kill(tmp_path, 6)
    for k in range(6):
        text = "".join(json.dumps(line) + "\n" for line in lines[: k + 1])
        (tmp_path / "events.jsonl").write_text(text)
        kill(1)
    assert killed == [(22, signal.SIGKILL)]


def test_shards_that_ran_again_are_those_of_lost_workers(tmp_path):
    lines = [{"event": "lost", "shards": [3, 4]}, {"event": "shard", "shard": 3}, {"event": "lost", "shards": [7]}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scale.shards_again(tmp_path) == 3


# ---- the model

TRUE = {
    "fixed_seconds": 0.05, "shard_seconds": 7e-4, "result_seconds": 2e-9, "kept_shard_seconds": 2e-4,
    "kept_result_seconds": 1e-9,
}  # fmt: skip


def made_up(noise=0.0, **changed):
    """A record that the model tells exactly."""
    true = {**TRUE, **changed}
    random = np.random.default_rng(5)
    cases = [
        ("masks", 1, 64, 4e9, 7e5, False), ("masks", 2, 64, 4e9, 7e5, False), ("masks", 1, 32, 2e9, 7e5, False),
        ("masks", 2, 64, 4e9, 7e5, True), ("tiny", 2, 10000, 5e6, 3e3, False), ("tiny", 2, 10000, 5e6, 3e3, True),
        ("tiny", 2, 2000, 3e8, 6e5, False), ("tiny", 2, 2000, 3e8, 6e5, True), ("masks", 2, 10, 1e8, 7e5, False),
    ]  # fmt: skip
    runs = []
    for what, count, shards, nbytes, partial, kept in cases:
        own = true["fixed_seconds"] + shards * (true["shard_seconds"] + kept * true["kept_shard_seconds"])
        own += shards * partial * (true["result_seconds"] + kept * true["kept_result_seconds"])
        seconds = own + (nbytes / count * 3e-10 + nbytes * 5e-11 if what == "masks" else 0)
        one = {"what": what, "by": "workers", "count": count, "shards": shards, "nbytes": nbytes, "kept": kept}
        scatter = 1 + noise * random.standard_normal()
        runs.append({**one, "partial_nbytes": partial, "own": own * scatter, "seconds": seconds * scatter})
    # neither is fitted: another crew, and a run that was disturbed
    runs.append({**runs[0], "by": "threads", "seconds": 99.0, "own": 99.0})
    runs.append({**runs[0], "section": "killed", "seconds": 99.0, "own": 99.0})
    runs.append({**runs[0], "what": "maps", "by": "threads", "positions": 1000, "seconds": 2.0})
    return {"runs": runs, "results": {}}


def test_the_fit_finds_what_a_record_was_made_of():
    client, values, points = scale_model.fit(made_up())
    for name, value in TRUE.items():
        assert getattr(client, name) == pytest.approx(value, rel=1e-6)
    assert client.position_seconds == 2.0 / 1000
    assert values["seconds"]["masks: s/byte of a worker"] == pytest.approx(3e-10, rel=1e-6)
    assert values["seconds"]["all workers: s/byte"] == pytest.approx(5e-11, rel=1e-6)
    assert all(model == pytest.approx(measured) for rows in points for _, measured, model in rows)


def test_a_noisy_record_gives_no_negative_times():
    for changed in ({}, {"kept_result_seconds": 0.0}, {"fixed_seconds": 0.0, "result_seconds": 0.0}):
        _, values, _ = scale_model.fit(made_up(noise=0.3, **changed))
        assert all(value >= 0 for group in values.values() for value in group.values())


@given(st.integers(0, 10**6))
def test_non_negative_least_squares_are_near_the_best_of_all_subsets(seed):
    random = np.random.default_rng(seed)
    table, wanted = random.random((6, 3)), random.random(6)
    found = scale_model.non_negative(table, wanted)
    assert found.min() >= 0
    best = float(wanted @ wanted)
    for count in (1, 2, 3):
        for columns in itertools.combinations(range(3), count):
            part = np.linalg.lstsq(table[:, columns], wanted, rcond=None)[0]
            if part.min() >= 0:
                best = min(best, float(np.sum((table[:, columns] @ part - wanted) ** 2)))
    assert np.sum((table @ found - wanted) ** 2) == pytest.approx(best, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("side", [64, 400, 1024, 4096, 8000])
def test_shards_are_cut_as_gpuem_cuts_them(tmp_path, side):
    frames = side * side
    path = tmp_path / "frames.raw"
    path.touch()
    os.truncate(path, frames * 2 * 256 * 256)
    ds = gpuem.open(path, scan=(side, side), frame=(256, 256), dtype="uint16")
    shards, _ = tiles.cut(ds.source, cuda_plan.SIZES)
    data = Data(frames * 2.0 * 256 * 256)
    each = scale_model.shard_frames(data)
    assert shards[0].frames == min(each, frames)
    assert scale_model.predict(Machine(1, 1), CLIENT, data).shards == len(shards)


CLIENT = Client(**TRUE, position_seconds=1e-6)
RATES = {
    "disks": "disks of the nodes", "copy": "bus", "decode": "decoding and kernels", "kernels": "decoding and kernels",
    "client_network": "network of the client", "client_disk": "disk of the client",
}  # fmt: skip


@pytest.mark.parametrize(("rate", "stage"), [*RATES.items(), ("storage", "shared storage"), ("network", "network")])
def test_whatever_is_slow_is_named(rate, stage):
    machine = Machine(4, 8, disks=0.0 if rate in ("storage", "network") else 50e9)
    found = scale_model.predict(replace(machine, **{rate: 1e6}), CLIENT, Data(1e12, ratio=6.0))
    assert found.limit == stage
    assert found.seconds > found.stages[stage]


def test_the_clients_time_is_named_and_grows_with_the_number_of_shards():
    machine, data = Machine(64, 8, disks=50e9), Data(1e12)
    slow = scale_model.predict(machine, replace(CLIENT, shard_seconds=1.0), data)
    assert slow.limit == "client"
    assert slow.stages["client"] == pytest.approx(slow.shards, rel=0.01)
    fewer = scale_model.predict(machine, replace(CLIENT, shard_seconds=1.0), replace(data, shard_nbytes=1 << 30))
    assert fewer.shards < slow.shards / 4
    assert fewer.seconds < slow.seconds / 4


@given(
    rate=st.sampled_from([f.name for f in fields(Machine) if f.name not in ("nodes", "gpus", "disks")]),
    factor=st.floats(1.0, 100.0),
    nodes=st.integers(1, 64),
    ratio=st.sampled_from([1.0, 6.0]),
)
def test_nothing_gets_slower_by_being_faster(rate, factor, nodes, ratio):
    machine, data = Machine(nodes, 8), Data(1e12, ratio=ratio)
    better = 1 / factor if rate.startswith("startup") else factor
    faster = replace(machine, **{rate: getattr(machine, rate) * better})
    one, other = (scale_model.predict(m, CLIENT, data).seconds for m in (machine, faster))
    assert other <= one * (1 + 1e-12)


def test_many_data_sets_start_once():
    machine = Machine(1, 8)
    one, many = (scale_model.predict(machine, CLIENT, Data(1e12, sets=n)) for n in (1, 10))
    start = one.stages["start"]
    assert many.seconds - start == pytest.approx(10 * (one.seconds - start))
    assert many.shards == 10 * one.shards
    assert many.client_nbytes == one.client_nbytes


# ---- the document


def test_the_document_takes_the_tables_of_a_record_and_keeps_the_rest(quick):
    record, _ = quick
    text = (ROOT / "docs" / "scaling.md").read_text()
    made = scale_model.tables(record)
    new = scale_model.renew(text, made)
    assert scale_model.renew(new, made) == new
    for name, content in made.items():
        assert content in new, name
    changed = dict.fromkeys(made, "x")
    assert scale_model.renew(new, changed) == scale_model.renew(text, changed)


def test_the_document_says_what_the_model_assumes():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert scale_model.assumptions() in text
    assert {f.name for f in fields(Machine)} - {"nodes", "gpus", "disks"} == scale_model.SOURCES.keys()
