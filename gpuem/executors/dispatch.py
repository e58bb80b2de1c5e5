"""Who runs which shard next, and what becomes of shards that fail: decisions alone, no thread, no clock, no network.

A shard is to do, running (perhaps on two workers, where one of them seems to hang), or done. What may pass (storage, a
GPU, a worker that died) is tried again elsewhere, a little later each time, for `patience` seconds and at least
`ATTEMPTS` times; what won't pass (broken bytes) is not.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpuem.errors import DataError, DeviceError, InputError, ReadError, ResumableError

# a shard that ended so many workers is at fault itself; others are tried at least so often
ATTEMPTS = 3
# a worker that failed so many times in a row, while others didn't, gets no more shards
FAILURES = 3
# seconds before a shard is tried again, times 4 each time, at most
PAUSE, LONGEST_PAUSE = 0.5, 30.0
# a shard hangs that takes so many times longer than others do, and longer than the patience
SLOWER = 20.0
# and longer than so many seconds, however short the patience is
LEAST_HANG = 5.0

Report = Callable[..., None]


def no_report(event: str, **facts: Any) -> None:
    """Report nothing."""


def may_pass(error: BaseException) -> bool:
    """Whether trying again, or on another machine, may help: hardware, storage and memory against bad input."""
    if isinstance(error, ReadError):
        return True
    # a file that is missing or another one here may be there, and right, on other machines
    return isinstance(error, DeviceError | InputError | OSError | MemoryError) and not isinstance(error, DataError)


@dataclass(frozen=True)
class Task:
    """A shard to be run, for the how-manieth time, and whether it is tried no more after that."""

    shard: int
    attempt: int = 1
    last_try: bool = False


@dataclass
class _Trouble:
    """What a shard went through: when it first failed, how often, where, how many workers died on it.

    It isn't tried again before `until`; `last`, where it was handed out for the last time.
    """

    since: float
    attempts: int = 0
    deaths: int = 0
    workers: set[str] = field(default_factory=set)
    why: str = ""
    until: float = 0.0
    last: bool = False


class Dispatch:
    """The state of all shards of a run. Whoever shares it between threads guards it.

    Parameters
    ----------
    shards : iterable of int
        What is to be done.
    ahead : int
        No shard is begun that comes so many of these shards after the first unfinished one: what must be combined in
        order stays small.
    patience : float
        Seconds for which a shard is tried again.
    mask : bool
        At the end of the patience, frames that can't be read are masked; else the run ends.
    near : mapping of int to set of str
        Hosts that hold the data of a shard; they get it first.
    report : callable
        Told of everything that goes wrong: ``report("retry", shard=3, ...)``.
    more : callable
        Asked for further shards, larger ones than before, when all that are known are handed out; returns none where
        there are no more.
    """

    def __init__(
        self,
        shards: Iterable[int],
        *,
        ahead: int | None = None,
        patience: float = 120.0,
        mask: bool = False,
        near: Mapping[int, Iterable[str]] | None = None,
        report: Report = no_report,
        more: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        self._order = sorted(shards)
        self._more = more
        self._ahead, self._patience, self._mask, self._report = ahead, patience, mask, report
        self._open = set(self._order)
        self._place = {shard: k for k, shard in enumerate(self._order)}
        self.count = len(self._order)
        self._ready: dict[str, list[int]] = {"": list(self._order)}
        self._near = {shard: frozenset(hosts) for shard, hosts in (near or {}).items()}
        for shard in self._order:
            for host in self._near.get(shard, ()):
                self._ready.setdefault(host, []).append(shard)
        self._waiting = set(self._order)
        self._later: list[tuple[float, int]] = []
        self._first = 0
        self._trouble: dict[int, _Trouble] = {}
        self._failures: dict[str, int] = {}
        self._times: list[float] = []
        self.running: dict[int, dict[str, float]] = {}
        # workers that are still at a shard which another one finished meanwhile, and since when
        self._late: dict[str, float] = {}
        self.excluded: set[str] = set()
        self.workers: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether every shard is done, and no more come."""
        return not self._open and self._more is None

    @property
    def waiting(self) -> int:
        """How many shards wait for a worker."""
        return len(self._waiting)

    def take(self, worker: str, now: float, host: str = "") -> Task | None:
        """The next shard for a worker; None where there is none for it now."""
        self.workers.add(worker)
        self._late.pop(worker, None)
        # where nobody else is left, a bad worker is better than none
        if worker in self.excluded and self.workers - self.excluded:
            return None
        while self._later and self._later[0][0] <= now:
            self._wait(heapq.heappop(self._later)[1])
        shard = self._next(worker, host, now) if host else None
        shard = self._next(worker, "", now) if shard is None else shard
        if shard is None and not self._waiting and self._add_more():
            shard = self._next(worker, "", now)
        shard = self._hanging(worker, now) if shard is None else shard
        if shard is None:
            return None
        self._waiting.discard(shard)
        self.running.setdefault(shard, {})[worker] = now
        trouble = self._trouble.get(shard)
        if trouble is None:
            return Task(shard)
        trouble.last = self._mask and self._given_up(trouble, now)
        return Task(shard, trouble.attempts + 1, trouble.last)

    def is_open(self, shard: int) -> bool:
        """Whether a shard isn't done yet."""
        return shard in self._open

    def done(self, shard: int, worker: str, now: float) -> bool:
        """A worker finished a shard; False where another one did before it."""
        started = self.running.get(shard, {}).get(worker)
        self._late.pop(worker, None)
        self._failures.pop(worker, None)
        if shard not in self._open:
            return False
        if started is not None:
            self._times = [*self._times[-199:], now - started]
        self._open.discard(shard)
        self._waiting.discard(shard)
        others = self.running.pop(shard, {})
        self._late.update({other: since for other, since in others.items() if other != worker})
        return True

    def failed(self, shard: int, worker: str, error: BaseException, now: float) -> None:
        """A shard failed on a worker: it will be tried again, or the error is raised.

        Raises
        ------
        ResumableError
            It was tried long enough, and what is wrong may pass one day.
        Exception
            `error` itself, where trying again won't help, or every worker failed at it.
        """
        self._leave(shard, worker)
        self._late.pop(worker, None)
        if shard not in self._open:
            return
        if not may_pass(error):
            raise error
        if not isinstance(error, InputError | ReadError):
            self._blame(worker, str(error))
        trouble = self._again(shard, worker, str(error), now)
        reading = isinstance(error, ReadError)
        if not reading and not self._others(trouble):
            raise error
        if self._given_up(trouble, now, reading) and not (self._mask and reading and not trouble.last):
            if isinstance(error, InputError):
                raise error
            raise ResumableError(
                f"shard {shard} failed {trouble.attempts} times in {now - trouble.since:.0f} s, at last on {worker}: "
                f"{error}"
            ) from error

    def lost(self, worker: str, now: float, why: str = "it is gone") -> list[int]:
        """A worker died; its shards go to others. Returns them.

        Raises
        ------
        ResumableError
            One of them ended `ATTEMPTS` workers.
        """
        mine = [shard for shard, where in self.running.items() if worker in where]
        self.workers.discard(worker)
        self._late.pop(worker, None)
        self._report("lost", worker=worker, shards=mine, why=why)
        for shard in mine:
            self._leave(shard, worker)
            trouble = self._again(shard, worker, f"{worker}: {why}", now)
            trouble.deaths += 1
            if trouble.deaths >= ATTEMPTS:
                raise ResumableError(
                    f"shard {shard} was running on each of {trouble.deaths} workers that died, at last {worker} ({why})"
                    ". Perhaps it needs more memory than they have"
                )
        return mine

    def give_back(self, shards: Iterable[int], worker: str) -> None:
        """A worker didn't get to these shards, and is not to blame."""
        for shard in shards:
            self._leave(shard, worker)
            self._late.pop(worker, None)
            trouble = self._trouble.get(shard)
            if trouble is None:
                self._wait(shard)
            elif not self.running.get(shard):
                # it failed on another worker before; that pause still holds
                heapq.heappush(self._later, (trouble.until, shard))

    def hung(self, now: float) -> set[str]:
        """Workers that have been at one shard for so long that they seem to hang."""
        at = [pair for where in self.running.values() for pair in where.items()] + list(self._late.items())
        limit = self._longest()
        return {worker for worker, since in at if now - since > limit}

    def pause(self, now: float, longest: float = 1.0) -> float:
        """Seconds until something may be due that nobody tells of."""
        due = self._later[0][0] - now if self._later else longest
        return min(max(due, 0.01), longest)

    def _add_more(self) -> bool:
        """Take in further shards; False where there are none, now and for ever."""
        shards = [] if self._more is None else sorted(self._more())
        if not shards:
            self._more = None
            return False
        self._place.update({shard: k for k, shard in enumerate(shards, start=self.count)})
        self._order += shards
        self.count += len(shards)
        self._open.update(shards)
        for shard in shards:
            self._wait(shard)
        return True

    def _next(self, worker: str, host: str, now: float) -> int | None:
        """The first shard in a queue that waits, may begin, and didn't just fail on this worker."""
        queue = self._ready.get(host, [])
        passed: list[int] = []
        found = None
        while queue and found is None:
            shard = heapq.heappop(queue)
            if shard not in self._waiting:
                continue
            if self._ahead is not None and self._place[shard] >= self._lowest() + self._ahead:
                passed.append(shard)
                break
            trouble = self._trouble.get(shard)
            # elsewhere, unless all who are left hang
            if trouble and worker in trouble.workers and self._others(trouble) - self.hung(now):
                passed.append(shard)
            else:
                found = shard
        for shard in passed:
            heapq.heappush(queue, shard)
        return found

    def _lowest(self) -> int:
        """How many shards come before the first unfinished one."""
        while self._order[self._first] not in self._open:
            self._first += 1
        return self._first

    def _hanging(self, worker: str, now: float) -> int | None:
        """A shard that seems to hang on another worker, and on no more than one."""
        limit = self._longest()
        for shard, where in self.running.items():
            trouble = self._trouble.get(shard)
            if len(where) == 1 and worker not in where and (trouble is None or trouble.until <= now):
                (other, started), *_ = where.items()
                if now - started > limit:
                    self._report("hang", shard=shard, worker=other, seconds=now - started)
                    return shard
        return None

    def _longest(self) -> float:
        """Seconds after which a shard seems to hang."""
        usual = SLOWER * statistics.median(self._times) if self._times else 0.0
        return max(self._patience, usual, LEAST_HANG)

    def _others(self, trouble: _Trouble) -> set[str]:
        """Who has not tried that shard."""
        return self.workers - trouble.workers - self.excluded

    def _again(self, shard: int, worker: str, why: str, now: float) -> _Trouble:
        trouble = self._trouble.setdefault(shard, _Trouble(now))
        trouble.attempts += 1
        trouble.workers.add(worker)
        trouble.why = why
        # a float to so high a power would overflow
        pause = min(PAUSE * 4.0 ** min(trouble.attempts - 1, 10), LONGEST_PAUSE)
        trouble.until = now + pause
        if not self.running.get(shard):
            heapq.heappush(self._later, (trouble.until, shard))
        self._report("retry", shard=shard, worker=worker, why=why, again_in=pause)
        return trouble

    def _given_up(self, trouble: _Trouble, now: float, reading: bool = True) -> bool:
        """Whether a shard was tried often enough; where reading failed, also for long enough."""
        return trouble.attempts >= ATTEMPTS and (not reading or now - trouble.since >= self._patience)

    def _blame(self, worker: str, why: str) -> None:
        """Count failures in a row of a worker; leave it out where others are there."""
        self._failures[worker] = self._failures.get(worker, 0) + 1
        # what it was given before may fail after that
        news = worker not in self.excluded and self._failures[worker] >= FAILURES
        if news and self.workers - self.excluded - {worker}:
            self.excluded.add(worker)
            self._report("excluded", worker=worker, why=f"failed {FAILURES} times in a row: {why}")

    def _leave(self, shard: int, worker: str) -> None:
        where = self.running.get(shard, {})
        where.pop(worker, None)
        if not where:
            self.running.pop(shard, None)

    def _wait(self, shard: int) -> None:
        if shard not in self._open or self.running.get(shard):
            return
        self._waiting.add(shard)
        for host in ("", *self._near.get(shard, ())):
            heapq.heappush(self._ready.setdefault(host, []), shard)
