"""Who runs which shard next: against a naive model that looks at every shard, with a clock that tests wind."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpuem.errors import DataError, DeviceError, InputError, PlanError, ReadError, ResumableError
from gpuem.executors import dispatch
from gpuem.executors.dispatch import ATTEMPTS, FAILURES, LEAST_HANG, LONGEST_PAUSE, PAUSE, SLOWER, Dispatch, Task

WORKERS = ["a", "b", "c", "d"]
HOST = {"a": "left", "b": "left", "c": "right", "d": ""}
ERRORS = {
    "reading": ReadError("EIO"),
    "broken": DataError("a broken chunk"),
    "gpu": DeviceError("fell off the bus"),
    "gone": InputError("is gone"),
    "memory": MemoryError("no memory"),
    "mistake": ZeroDivisionError("a mistake in the code"),
}


class Model(RuleBasedStateMachine):
    """Every rule, said once more in the plainest way: sets and loops over all shards."""

    @initialize(
        count=st.integers(1, 9),
        first=st.integers(0, 3),
        step=st.integers(1, 3),
        ahead=st.one_of(st.none(), st.integers(1, 6)),
        patience=st.sampled_from([0.0, 3.0, 20.0, 120.0]),
        mask=st.booleans(),
        near=st.lists(st.sampled_from(["left", "right", "both", ""]), min_size=9, max_size=9),
    )
    def begin(self, count, first, step, ahead, patience, mask, near):
        self.shards = list(range(first, first + count * step, step))
        self.ahead, self.patience, self.mask = ahead, patience, mask
        hosts = {"left": ["left"], "right": ["right"], "both": ["left", "right"], "": []}
        self.near = {shard: hosts[where] for shard, where in zip(self.shards, near, strict=False)}
        self.told = []
        self.real = Dispatch(
            reversed(self.shards), ahead=ahead, patience=patience, mask=mask, near=self.near, report=self.report
        )
        self.now, self.over = 1000.0, False
        self.open, self.running, self.late = set(self.shards), {}, {}
        self.attempts = dict.fromkeys(self.shards, 0)
        self.since, self.due, self.tried = {}, dict.fromkeys(self.shards, -math.inf), {s: set() for s in self.shards}
        self.deaths, self.last = dict.fromkeys(self.shards, 0), set()
        self.workers, self.excluded, self.in_a_row, self.times = set(), set(), {}, []
        self.done_once = []

    def report(self, event, **facts):
        self.told.append((event, facts))

    # ---- what is expected

    def limit(self):
        usual = SLOWER * statistics.median(self.times[-200:]) if self.times else 0.0
        return max(self.patience, LEAST_HANG, usual)

    def where(self, shard):
        return {worker: t for (s, worker), t in self.running.items() if s == shard}

    def hung(self):
        at = [(worker, t) for (_, worker), t in self.running.items()] + list(self.late.items())
        return {worker for worker, t in at if self.now - t > self.limit()}

    def in_window(self, shard):
        return self.ahead is None or self.shards.index(shard) < self.shards.index(min(self.open)) + self.ahead

    def for_this(self, shard, worker):
        if shard not in self.open or self.where(shard) or self.due[shard] > self.now or not self.in_window(shard):
            return False
        others = self.workers - self.tried[shard] - self.excluded - self.hung()
        return worker not in self.tried[shard] or not others

    def expected(self, worker):
        if worker in self.excluded and self.workers - self.excluded:
            return None
        fitting = [shard for shard in self.shards if self.for_this(shard, worker)]
        mine = [shard for shard in fitting if HOST[worker] and HOST[worker] in self.near[shard]]
        return min(mine or fitting, default=None)

    def hanging(self, worker):
        return {
            shard
            for shard in self.open
            if len(self.where(shard)) == 1
            and worker not in self.where(shard)
            and self.now - min(self.where(shard).values()) > self.limit()
            and self.due[shard] <= self.now
        }

    def given_up(self, shard, reading=True):
        enough = self.attempts[shard] >= ATTEMPTS
        return enough and (not reading or self.now - self.since[shard] >= self.patience)

    def again(self, shard, worker):
        self.since.setdefault(shard, self.now)
        self.attempts[shard] += 1
        self.tried[shard].add(worker)
        self.due[shard] = self.now + min(PAUSE * 4 ** (self.attempts[shard] - 1), LONGEST_PAUSE)

    # ---- what happens

    @precondition(lambda self: not self.over)
    @rule(worker=st.sampled_from(WORKERS))
    def take(self, worker):
        self.workers.add(worker)
        self.late.pop(worker, None)
        expected, hanging = self.expected(worker), self.hanging(worker)
        excluded = worker in self.excluded and self.workers - self.excluded
        task = self.real.take(worker, self.now, HOST[worker])
        if expected is None and hanging and not excluded:
            assert task is not None
            assert task.shard in hanging
            assert self.told[-1][0] == "hang"
        elif expected is None:
            assert task is None
            return
        else:
            assert task is not None
            assert task.shard == expected
        shard = task.shard
        last = self.mask and self.attempts[shard] > 0 and self.given_up(shard)
        assert task == Task(shard, self.attempts[shard] + 1, last)
        if self.attempts[shard]:
            self.last = self.last | {shard} if last else self.last - {shard}
        self.running[shard, worker] = self.now

    @precondition(lambda self: not self.over and self.running)
    @rule(data=st.data())
    def done(self, data):
        shard, worker = data.draw(st.sampled_from(sorted(self.running)))
        first = shard in self.open
        assert self.real.done(shard, worker, self.now) is first
        self.in_a_row.pop(worker, None)
        self.late.pop(worker, None)
        started = self.running.pop((shard, worker))
        if first:
            self.times.append(self.now - started)
            self.open.discard(shard)
            self.done_once.append(shard)
            self.late |= self.where(shard)

    @precondition(lambda self: not self.over and self.running)
    @rule(data=st.data(), kind=st.sampled_from(["reading"] * 4 + ["gpu"] * 3 + ["gone", "memory", "broken", "mistake"]))
    def failed(self, data, kind):
        shard, worker = data.draw(st.sampled_from(sorted(self.running)))
        error, reading = ERRORS[kind], kind == "reading"
        del self.running[shard, worker]
        self.late.pop(worker, None)
        before = len(self.told)
        raised = None
        try:
            self.real.failed(shard, worker, error, self.now)
        except BaseException as caught:  # noqa: BLE001
            raised = caught
        if shard not in self.open:
            assert raised is None
            assert len(self.told) == before
            return
        if kind in ("broken", "mistake"):
            assert raised is error
            self.over = True
            return
        if kind in ("gpu", "memory"):
            self.in_a_row[worker] = self.in_a_row.get(worker, 0) + 1
            if self.in_a_row[worker] >= FAILURES and self.workers - self.excluded - {worker}:
                self.excluded.add(worker)
        self.again(shard, worker)
        assert "retry" in [event for event, _ in self.told[before:]]
        nobody = not reading and not self.workers - self.tried[shard] - self.excluded
        enough = self.given_up(shard, reading) and not (self.mask and reading and shard not in self.last)
        if nobody or (enough and kind == "gone"):
            assert raised is error
        elif enough:
            assert isinstance(raised, ResumableError)
            assert raised.__cause__ is error
        else:
            assert raised is None
        self.over = raised is not None

    @precondition(lambda self: not self.over and self.workers)
    @rule(data=st.data())
    def lost(self, data):
        worker = data.draw(st.sampled_from(sorted(self.workers)))
        mine = sorted(s for s, w in self.running if w == worker and s in self.open)
        self.running = {key: t for key, t in self.running.items() if key[1] != worker}
        self.workers.discard(worker)
        self.late.pop(worker, None)
        deadly = [s for s in mine if self.deaths[s] + 1 >= ATTEMPTS]
        if deadly:
            with pytest.raises(ResumableError, match="workers that died"):
                self.real.lost(worker, self.now)
            self.over = True
            return
        assert sorted(self.real.lost(worker, self.now)) == mine
        for shard in mine:
            self.deaths[shard] += 1
            self.again(shard, worker)

    @precondition(lambda self: not self.over and self.running)
    @rule(data=st.data())
    def give_back(self, data):
        shard, worker = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[shard, worker]
        self.late.pop(worker, None)
        self.real.give_back([shard], worker)

    @precondition(lambda self: not self.over)
    @rule(seconds=st.sampled_from([0.1, 0.6, 3.0, 10.0, 40.0, 130.0, 3000.0]))
    def wait(self, seconds):
        assert 0.01 <= self.real.pause(self.now) <= 1.0
        self.now += seconds

    @precondition(lambda self: self.over)
    @rule()
    def nothing_more(self):
        """The run was ended."""

    @invariant()
    def each_shard_is_done_once(self):
        if hasattr(self, "open") and not self.over:
            assert sorted([*self.done_once, *self.open]) == self.shards
            assert self.real.finished == (not self.open)
            assert set(self.real.running) == {shard for shard, _ in self.running if shard in self.open}
            assert all(len(where) <= 2 for where in self.real.running.values())
            assert self.real.excluded == self.excluded

    def teardown(self):
        """Nothing is lost: whoever is at work comes to an end, then one healthy worker finishes what is left."""
        if not hasattr(self, "open") or self.over:
            return
        for shard, worker in list(self.running):
            if self.real.done(shard, worker, self.now):
                self.done_once.append(shard)
        for _ in range(10 * len(self.shards)):
            self.now += LONGEST_PAUSE + 1
            if (task := self.real.take("healthy", self.now)) is not None:
                assert self.real.done(task.shard, "healthy", self.now)
                self.done_once.append(task.shard)
        assert sorted(self.done_once) == self.shards
        assert self.real.finished


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(30))
def test_a_run_with_faults_everywhere_ends_with_every_shard_done_once(seed):
    """Workers that fail, hang, die and come back, played event by event."""
    rng = random.Random(seed)
    real = Dispatch(range(60), ahead=rng.choice([None, 7]), patience=50.0, mask=True)
    workers, now = [f"w{k}" for k in range(4)], 0.0
    busy, finished, tasks = {}, [], 0
    while not real.finished:
        now += 0.3
        assert now < 3e4, "it stands still"
        for worker in list(workers):
            if worker not in busy:
                if (task := real.take(worker, now)) is not None:
                    tasks += 1
                    fate = "good" if task.last_try else rng.choices(["good", "eio", "hang", "dies"], [88, 8, 2, 2])[0]
                    if fate == "dies" and real.lost.__name__ and worker != "w0":
                        busy[worker] = (task, now + 1, "dies")
                    else:
                        # w0 is healthy, so that nothing can hang at all of them
                        fate = "good" if worker == "w0" or fate == "dies" else fate
                        busy[worker] = (task, now + rng.uniform(0.1, 2.0) + 1e9 * (fate == "hang"), fate)
            elif busy[worker][1] <= now:
                task, _, fate = busy.pop(worker)
                if fate == "eio":
                    real.failed(task.shard, worker, ERRORS["reading"], now)
                elif fate == "dies":
                    try:
                        real.lost(worker, now)
                    except ResumableError:
                        return
                    workers[workers.index(worker)] = f"{worker}'"
                elif real.done(task.shard, worker, now):
                    finished.append(task.shard)
    assert sorted(finished) == list(range(60))
    assert tasks < 60 * 3


def test_what_may_pass():
    for error, expected in (
        (ReadError("EIO"), True), (DeviceError("lost"), True), (InputError("gone"), True), (OSError(5, "EIO"), True),
        (MemoryError(), True), (DataError("broken"), False), (PlanError("too large"), False), (ValueError(), False),
    ):  # fmt: skip
        assert dispatch.may_pass(error) is expected


def test_reading_is_tried_for_the_patience_with_growing_pauses():
    told = []
    real = Dispatch([0], patience=20.0, report=lambda event, **facts: told.append(facts["again_in"]))
    now, times = 0.0, []
    with pytest.raises(ResumableError, match=r"failed 5 times in 40 s, at last on only: EIO"):  # noqa: PT012
        while True:
            if real.take("only", now):
                times.append(now)
                real.failed(0, "only", ERRORS["reading"], now)
            now += 0.5
    assert times == [0.0, 0.5, 2.5, 10.5, 40.5]
    assert told == [0.5, 2.0, 8.0, 30.0, 30.0]


def test_patience_of_nothing_still_tries_three_times():
    real, now = Dispatch([0], patience=0.0), 0.0
    for attempt in (1, 2, 3):
        now += 100
        assert real.take("only", now) == Task(0, attempt)
        if attempt < 3:
            real.failed(0, "only", ERRORS["reading"], now)
    with pytest.raises(ResumableError, match="3 times"):
        real.failed(0, "only", ERRORS["reading"], now)


def test_frames_that_never_come_are_masked_and_a_file_that_never_opens_ends_the_run():
    """The last try masks what it can't read; where even that fails, trying on would never end."""
    real, now = Dispatch([0], patience=10.0, mask=True), 0.0
    with pytest.raises(ResumableError):  # noqa: PT012
        for _ in range(100):
            now += 31.0
            task = real.take("only", now)
            real.failed(0, "only", ERRORS["reading"], now)
    assert task.last_try
    assert task.attempt <= 5


def test_many_attempts_keep_their_pause():
    real, now = Dispatch([0], patience=1e9), 0.0
    for _ in range(2000):
        now += LONGEST_PAUSE
        assert real.take("only", now) is not None
        real.failed(0, "only", ERRORS["reading"], now)


def test_a_shard_that_failed_comes_back_to_who_failed_where_the_others_hang():
    real = Dispatch([0, 1], patience=10.0)
    assert real.take("a", 0.0).shard == 0
    assert real.take("b", 0.0).shard == 1
    real.failed(0, "a", ERRORS["reading"], 0.1)
    # it is for b, which seems to be only slow
    assert real.take("a", 5.0) is None
    # b hangs: first its own shard is doubled or the other one taken, in any case both end
    shards = set()
    for now in (11.0, 12.0):
        task = real.take("a", now)
        shards.add(task.shard)
        assert real.done(task.shard, "a", now)
    assert shards == {0, 1}
    assert real.finished
    assert real.hung(100.0) == {"b"}
    assert not real.done(1, "b", 101.0)
    assert real.hung(200.0) == set()


def test_who_is_late_with_a_shard_that_others_finished_still_hangs():
    real = Dispatch([0, 1], patience=10.0)
    real.take("a", 0.0)
    real.take("b", 0.0)
    real.done(1, "b", 1.0)
    assert real.take("b", 21.0).shard == 0
    assert real.done(0, "b", 21.5)
    # a is not in the way of anybody, but is still at work
    assert real.hung(22.0) == {"a"}


def test_a_doubled_shard_that_fails_is_not_doubled_again_at_once():
    told = []
    real = Dispatch([0], patience=10.0, report=lambda event, **facts: told.append(event))
    real.take("a", 0.0)
    now, doubled = 10.5, 0
    for _ in range(1000):
        now += 0.001
        if real.take("b", now):
            doubled += 1
            real.failed(0, "b", ERRORS["reading"], now)
    assert doubled == 2, "after half a second once more, then not for two"
    assert told.count("hang") == 2
    assert told.count("retry") == 2


def test_a_bad_worker_is_left_out_as_long_as_others_are_there():
    told = []
    real = Dispatch(range(9), report=lambda event, **facts: told.append((event, facts.get("worker"))))
    real.take("good", 0.0)
    for k in range(FAILURES):
        task = real.take("bad", float(k))
        real.failed(task.shard, "bad", ERRORS["gpu"], float(k))
    assert ("excluded", "bad") in told
    assert real.take("bad", 100.0) is None
    real.lost("good", 101.0)
    assert real.take("bad", 200.0) is not None, "it is all that is left"


def test_the_last_worker_is_never_left_out():
    real = Dispatch(range(9))
    real.take("a", 0.0)
    with pytest.raises(DeviceError, match="bus"):
        real.failed(0, "a", ERRORS["gpu"], 0.0)
    assert real.excluded == set()


def test_a_shard_that_kills_workers_ends_the_run():
    real, now = Dispatch(range(3)), 0.0
    for k in range(ATTEMPTS):
        now += 100
        real.take(f"w{k}", now)
        if k == ATTEMPTS - 1:
            with pytest.raises(
                ResumableError, match=r"shard 0 .* each of 3 workers that died, at last w2 \(signal 9\)"
            ):
                real.lost(f"w{k}", now, "signal 9")
        else:
            assert real.lost(f"w{k}", now, "signal 9") == [0]


def test_bad_input_is_told_as_it_is_after_it_failed_everywhere():
    real = Dispatch([0], patience=1000.0)
    for worker in "abcdefgh":
        real.take(worker, 0.0)
    with pytest.raises(InputError, match="is gone"):  # noqa: PT012
        for now in range(0, 1000, 100):
            for worker in "abcdefgh":
                if real.take(worker, float(now)) is not None or now == 0:
                    real.failed(0, worker, ERRORS["gone"], float(now))


def test_a_shard_that_is_given_back_keeps_its_pause():
    real = Dispatch([0], patience=0.0)
    assert real.take("a", 0.0) == Task(0)
    assert real.take("b", 10.0) == Task(0), "it seems to hang at a"
    real.failed(0, "b", ERRORS["reading"], 10.0)
    real.give_back([0], "a")
    assert real.take("a", 10.1) is None
    assert real.take("a", 10.6) == Task(0, 2)


def test_further_shards_are_asked_for_when_all_are_handed_out():
    batches = [[4, 5], [9], []]
    real = Dispatch([1], more=lambda: batches.pop(0), ahead=2)
    assert real.take("a", 0.0).shard == 1
    assert real.take("b", 0.0).shard == 4
    # 5 comes two places after 1, which isn't done
    assert real.take("c", 0.0) is None
    assert real.done(1, "a", 1.0)
    assert real.take("a", 1.0).shard == 5
    for shard, worker in ((4, "b"), (5, "a")):
        assert real.done(shard, worker, 2.0)
    assert not real.finished
    assert real.take("a", 2.0).shard == 9
    assert real.done(9, "a", 3.0)
    assert not real.finished
    assert real.take("b", 3.0) is None
    assert real.finished
    assert (real.count, batches) == (4, [])
