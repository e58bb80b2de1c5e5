"""How far a run is, as its log says: who works on it, how fast, what went wrong, whether it is still alive.

Only files of the run folder are read, so that it can be asked from any shell, while the run goes on or years later.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gpuem.regular_files import read_regular

# signs of life come every few seconds; a network file system shows them up to a minute late
SILENT_SECONDS = 90.0
# the same of a process on this machine that doesn't exist any more
_GONE_SECONDS = 15.0
# the rate "now" is that of so many last seconds
_NOW_SECONDS = 30.0
_ENDS = {"finish": "finished", "stop": "stopped", "error": "failed"}
# numbers and times of an honest log are smaller
_MOST, _LATEST = 1 << 53, 1e11
_FAULTS = ("retry", "lost", "hang", "excluded", "masked", "damaged", "error", "stop")


@dataclass(frozen=True)
class Ran:
    """One shard that was run, from its line in the log."""

    shard: int
    worker: str
    began: float
    ended: float
    frames: int
    nbytes: int
    seconds: dict[str, float]
    attempt: int
    t: float

    @classmethod
    def of(cls, event: dict[str, Any]) -> Ran:
        """From an event; raises ValueError, TypeError, KeyError or OverflowError where a field is wrong."""
        began, ended = float(event["began"]), float(event["ended"])
        seconds = {printable(stage): float(value) for stage, value in event["seconds"].items()}
        if not all(map(_is_time, (began, ended, *seconds.values()))):
            raise ValueError("not a time")
        # clocks that were set back in between
        ended = max(began, ended)
        numbers = [int(event.get(key, 1)) for key in ("shard", "frames", "nbytes", "attempt")]
        if not all(0 <= number < _MOST for number in numbers) or "shard" not in event:
            raise ValueError("not a number of anything")
        shard, frames, nbytes, attempt = numbers
        return cls(shard, printable(event["worker"]), began, ended, frames, nbytes, seconds, attempt, event["t"])


@dataclass
class Log:
    """The events of a run folder; `read` takes in what came since it was last called.

    Parameters
    ----------
    folder : Path
        The run folder.
    events : list of (str, dict)
        File and content of every event but those of shards, in the order of time.
    shards : list of Ran
        The shards, in the order of files and lines.
    broken : int
        Lines that are no events. A last line without an end is still being written.
    unreadable : dict of str to str
        Files of the log that are there and can't be read, and why.
    """

    folder: Path
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    shards: list[Ran] = field(default_factory=list)
    broken: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)

    def read(self) -> Log:
        """Take in what is new."""
        self.unreadable = {}
        for path in sorted(self.folder.glob("events*.jsonl")):
            place = self._places.get(path.name, 0)
            try:
                if place > path.stat().st_size:
                    # another run writes here now
                    self.events, self.shards, self.broken, self._places = [], [], 0, {}
                    return self.read()
                whole, _, _ = read_regular(path, place).rpartition(b"\n")
            except FileNotFoundError:
                # removed since it was listed
                continue
            except OSError as error:
                self.unreadable[path.name] = error.strerror or str(error)
                continue
            if whole:
                self._places[path.name] = place + len(whole) + 1
                for line in whole.split(b"\n"):
                    self._take(path.name, line.decode("utf-8", "replace"))
        self.events.sort(key=lambda item: item[1]["t"])
        return self

    def _take(self, name: str, line: str) -> None:
        if not line.strip():
            return
        event = _parsed(line)
        if event is None:
            # a process died while it wrote, and the next one went on in the same line
            self.broken += 1
            event = _parsed(line[line.rfind('{"t"') :]) if line.rfind('{"t"') > 0 else None
        if event is not None and event["event"] == "shard":
            try:
                self.shards.append(Ran.of(event))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
                self.broken += 1
        elif event is not None:
            self.events.append((name, event))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What run.json says; nothing where it can't be read."""
        try:
            found = json.loads(read_regular(self.folder / "run.json"))
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def named(self, *names: str) -> list[dict[str, Any]]:
        """Events of these names, in the order of time."""
        return [event for _, event in self.events if event["event"] in names]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return event if _is_time(event.get("t")) else None


def _is_time(value: Any) -> bool:
    # false for NaN, and for integers that are no float
    return isinstance(value, int | float) and -_LATEST < value < _LATEST


def printable(value: Any) -> str:
    """A value as text that any terminal takes: no control characters, no halves of characters."""
    try:
        words = str(value)
    except RecursionError:
        return "?"
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in words)


@dataclass(frozen=True)
class Worker:
    """A worker, how much it did, and whether it is out: ``lost`` or ``excluded``, and why."""

    name: str
    shards: int
    nbytes: int
    busy: float
    out: str = ""


@dataclass(frozen=True)
class Fault:
    """Something that went wrong, in words."""

    t: float
    kind: str
    worker: str
    words: str


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Parameters
    ----------
    state : {"running", "silent", "finished", "stopped", "failed", "empty"}
        What it does; silent where no process shows that it is alive, though none has said that it ends.
    words : str
        The same for people.
    done, shards : int
        Shards that are done, of so many.
    nbytes : int
        Bytes of decoded frames that were worked through.
    now, average : float
        Bytes per second in the last half minute, and in all the time in which there was work.
    seconds : float
        Time in which there was work.
    left : float or None
        Seconds until the end at the rate of now; None where that can't be known.
    sign : float
        Last sign of life, seconds of the epoch; 0 where there was none.
    workers : tuple of Worker
        Who did how much.
    faults : tuple of Fault
        What went wrong, in the order of time.
    broken : int
        Lines of the log that can't be read.
    """

    state: str
    words: str
    done: int
    shards: int
    nbytes: int
    now: float
    average: float
    seconds: float
    left: float | None
    sign: float
    workers: tuple[Worker, ...]
    faults: tuple[Fault, ...]
    broken: int


def progress(log: Log, now: float | None = None) -> Progress:
    """How far a run is, as its log says.

    Parameters
    ----------
    log : Log
        Its log.
    now : float
        The time, in seconds of the epoch; by default that of the clock.
    """
    clock = time.time() if now is None else now
    once = {ran.shard: ran for ran in reversed(log.shards)}
    starts = log.named("start")
    shards = _count(log.facts, "shards") or max(
        [_count(s, "shards") for s in starts] + [s + 1 for s in once], default=0
    )
    last = starts[-1] if starts else {"t": 0.0}
    # a line may have been lost with the process that wrote it
    done = max(len(once), _count(last, "done") + sum(ran.t >= last["t"] for ran in once.values()))
    done = min(done, shards)
    sign = _sign(log)
    state, words = _state(log, sign, clock, done >= shards > 0)
    nbytes = sum(ran.nbytes for ran in once.values())
    seconds = sum(b - a for a, b in busy(log.shards))
    average = nbytes / seconds if seconds > 0 else 0.0
    recent = _recent(list(once.values()), clock) if state == "running" else 0.0
    todo = (shards - done) * (nbytes / len(once)) if once else 0.0
    rate = recent or average
    left = todo / rate if state == "running" and rate > 0 else None
    faults = tuple(_fault(event) for event in log.named(*_FAULTS))
    return Progress(
        state, words, done, shards, nbytes, recent, average, seconds, left, sign, _workers(log), faults, log.broken
    )


def _count(facts: dict[str, Any], key: str) -> int:
    value = facts.get(key)
    return value if isinstance(value, int) and 0 < value < _MOST else 0


def _sign(log: Log) -> float:
    """When a process last showed that it was alive."""
    times = [event["t"] for _, event in log.events[-1:]] + [ran.t for ran in log.shards]
    for path in log.folder.glob("alive*"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _state(log: Log, sign: float, now: float, complete: bool) -> tuple[str, str]:
    turns = [(name, event) for name, event in log.events if event["event"] == "start" or event["event"] in _ENDS]
    # every rank has a file of its own and ends by itself
    latest = dict(turns)
    going = {name: event["t"] for name, event in latest.items() if event["event"] == "start"}
    ended = sorted((event for event in latest.values() if event["event"] in _ENDS), key=lambda event: float(event["t"]))
    finished = [event["t"] for event in ended if event["event"] == "finish"]
    # a rank that was killed never says so: that a later run has finished says it
    newest = max(going.values(), default=0.0)
    if finished and (len(finished) == len(latest) or (complete and finished[-1] >= newest)):
        return "finished", "finished"
    living = [name for name in going if now - _beat(log, name) < SILENT_SECONDS]
    if "events.jsonl" in going:
        quiet = now - sign
        living = [] if quiet >= SILENT_SECONDS or (quiet > _GONE_SECONDS and _is_gone(log.facts)) else ["events.jsonl"]
    if living:
        return "running", "running"
    early = [event for event in ended if event["event"] != "finish"]
    if early:
        state = _ENDS[early[-1]["event"]]
        why = f": {printable(early[-1]['why'])}" if early[-1].get("why") else ""
        return state, f"failed{why}" if state == "failed" else f"ended early{why}. --resume goes on"
    if not turns and not log.shards:
        return "empty", "nothing was done yet"
    return "silent", f"no sign of life since {when(sign)}: killed, or its node is lost. --resume goes on"


def _beat(log: Log, name: str) -> float:
    """When the process that writes a log last showed that it was alive, or began."""
    try:
        beat = (log.folder / name.replace("events", "alive", 1).removesuffix(".jsonl")).stat().st_mtime
    except OSError:
        beat = 0.0
    return max(beat, *(float(event["t"]) for file, event in log.events if file == name))


def _is_gone(facts: dict[str, Any]) -> bool:
    """Whether the run's process was one of this machine and doesn't exist any more."""
    if facts.get("host") != platform.node() or not _count(facts, "pid"):
        return False
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def when(t: float) -> str:
    """A time of the epoch for people, in the clock of this machine."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(t))
    except (ValueError, OverflowError, OSError):
        return "?"


def _recent(shards: list[Ran], now: float) -> float:
    """Bytes per second of late: what ended in a window that holds more than one shard of a worker."""
    if not shards:
        return 0.0
    lasting = sum(ran.ended - ran.began for ran in shards) / len(shards)
    first = min(ran.began for ran in shards)
    window = min(max(_NOW_SECONDS, 3 * lasting), now - first)
    return sum(ran.nbytes for ran in shards if ran.ended > now - window) / window if window > 0 else 0.0


def _fault(event: dict[str, Any]) -> Fault:
    kind, why = event["event"], printable(event.get("why", ""))
    shard, worker = printable(event.get("shard", "?")), printable(event.get("worker", ""))
    if kind == "retry":
        again = f", again in {event['again_in']:.3g} s" if _is_time(event.get("again_in")) else ""
        words = f"shard {shard} on {worker}: {why}{again}"
    elif kind == "lost":
        held = event.get("shards")
        words = f"{worker}: {why}; it had {len(held) if isinstance(held, list) else 0} shards in work"
    elif kind == "hang":
        words = f"shard {shard} on {worker} shows nothing for {printable(event.get('seconds', '?'))} s"
    elif kind == "damaged":
        words = f"{printable(event.get('count', '?'))} shards that were kept are damaged, and run again"
    elif kind == "masked":
        words = f"shard {shard}: {printable(event.get('frames', '?'))} frames: {why}"
    else:
        words = f"{worker}: {why}" if worker else why
    return Fault(event["t"], kind, worker, words)


def _workers(log: Log) -> tuple[Worker, ...]:
    mine: dict[str, list[Ran]] = {printable(event["worker"]): [] for event in log.named("worker") if "worker" in event}
    for ran in log.shards:
        mine.setdefault(ran.worker, []).append(ran)
    out = {printable(event.get("worker")): event["event"] for event in log.named("lost", "excluded")}
    return tuple(
        Worker(
            name, len(ran), sum(r.nbytes for r in ran), sum(b - a for a, b in busy(ran)),
            out.get(name, out.get(name.rpartition(":")[0], "")),
        )
        for name, ran in sorted(mine.items(), key=lambda item: natural(item[0]))
    )  # fmt: skip


def busy(shards: Iterable[Ran]) -> list[tuple[float, float]]:
    """Spans of time in which at least one of the shards was in work."""
    spans: list[tuple[float, float]] = []
    for began, ended in sorted((ran.began, ran.ended) for ran in shards):
        if spans and began <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], ended))
        else:
            spans.append((began, ended))
    return spans


def natural(name: str) -> list[tuple[int, str]]:
    """To sort names as people do: node 2 before node 10."""
    # more digits than those of any number of workers are a name
    return [
        (int(p), "") if p.isascii() and p.isdigit() and len(p) < 20 else (-1, p) for p in re.split(r"([0-9]+)", name)
    ]
