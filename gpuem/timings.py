"""Which stage of a run takes the time, and the picture of it as numbers: from the log, as `gpuem.status` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpuem.status import Log, Ran, busy, natural, printable

STAGES = ("read", "copy", "decode", "compute", "wait")
_WORK = STAGES[:4]
# a pause looks no longer than this share of the work
PAUSE_LOOKS = 0.02
_Knots = tuple[list[float], list[float]]
_LIMITS = {
    "read": ("reading", "faster storage, or workers on more nodes, would help"),
    "copy": ("copying to the GPU", "more GPUs would help, or files that are compressed and decoded on the GPU"),
    "decode": ("decoding", "more workers would help, or files that are compressed less"),
    "compute": ("computing", "more workers would help, or fewer analyses"),
    "wait": ("waiting", "workers stood still with a shard in hand: too few processors, or shared ones"),
    "idle": ("having no shard", "the workers wait for work: more and smaller shards, or fewer workers"),
    "tail": ("having no shard at the end", "some workers end long before the last: smaller shards, or fewer workers"),
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Seconds of a stage, summed over workers, and their share of the workers' time."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Stages:
    """Where the time went.

    Parameters
    ----------
    rows : tuple of Stage
        Stages that took time, and ``no shard``: a worker had nothing to do.
    worker_seconds : float
        The workers' time: from a worker's first shard to the end of the last shard of all that worked beside it.
    limit : str
        The stage that limits the run, or ``idle``, ``tail``; empty where nothing was measured.
    sentence : str
        What that means.
    overlapping : bool
        Stages were at work at the same time, so that shares are more than 100 % together.
    """

    rows: tuple[Stage, ...]
    worker_seconds: float
    limit: str
    sentence: str
    overlapping: bool


def stages(log: Log) -> Stages:
    """Where the time of a run went, as its log says."""
    mine: dict[str, list[Ran]] = {}
    for ran in log.shards:
        mine.setdefault(ran.worker, []).append(ran)
    totals = dict.fromkeys(STAGES, 0.0)
    for ran in log.shards:
        for stage, value in ran.seconds.items():
            # a stage that another version knows is none of these
            totals[stage if stage in totals else "wait"] += max(value, 0.0)
        if "wait" not in ran.seconds:
            totals["wait"] += max(ran.ended - ran.began - sum(ran.seconds.values()), 0.0)
    worked, idle, tail = _beside_work(log, mine)
    whole = worked + idle + tail
    if whole <= 0:
        return Stages((), 0.0, "", "no shard is done yet: nothing was measured", False)
    rows = [Stage(name, value, value / whole) for name, value in totals.items() if value > 0]
    rows.append(Stage("no shard", idle + tail, (idle + tail) / whole))
    limit = _limit(totals, idle, tail, whole)
    value = {**totals, "idle": idle, "tail": idle + tail}[limit]
    doing, remedy = _LIMITS[limit]
    sentence = f"{doing} limits: {100 * value / whole:.0f} % of the workers' time; {remedy}"
    return Stages(tuple(rows), whole, limit, sentence, sum(totals.values()) > 1.05 * worked)


def _beside_work(log: Log, mine: dict[str, list[Ran]]) -> tuple[float, float, float]:
    """Seconds with a shard in work, between shards, and after a worker's last one; summed over workers."""
    out = pauses(log)
    cut = _cut(busy(log.shards), out, 0.0)
    spans = {name: np.interp(busy(own), *cut).tolist() for name, own in mine.items()}
    worked = sum(b - a for found in spans.values() for a, b in found)
    idle = sum(found[-1][1] - found[0][0] for found in spans.values()) - worked
    gone = {printable(event.get("worker")) for event in log.named("lost", "excluded")}
    order = sorted(spans, key=lambda name: spans[name][0][0])
    firsts = np.array([spans[name][0][0] for name in order])
    lasts = np.array([spans[name][-1][1] for name in order])
    # of those that came before it ended: workers of a run that was resumed later are none of them
    together = np.maximum.accumulate(lasts)[np.searchsorted(firsts, lasts, "right") - 1] if order else lasts
    stops = np.append(np.interp([first for first, _ in out], *cut), np.inf)
    together = np.minimum(together, stops[np.searchsorted(stops, lasts - 1e-6)])
    stayed = np.array([not {name, name.rpartition(":")[0]} & gone for name in order], np.bool_)
    return worked, idle, float((together - lasts)[stayed].sum())


def _limit(totals: dict[str, float], idle: float, tail: float, whole: float) -> str:
    busiest = max(_WORK, key=lambda stage: totals[stage])
    beside = {"wait": totals["wait"], "idle" if idle >= tail else "tail": idle + tail}
    most = max(beside, key=lambda name: beside[name])
    # stages that work at the same time may each be busy most of the time, and waiting beside
    return busiest if totals[busiest] >= min(beside[most], 0.5 * whole) else most


@dataclass(frozen=True)
class Timeline:
    """Shards as bars.

    Parameters
    ----------
    workers : tuple of str
        Rows, workers of one host and process side by side.
    row : (n,) int
        Row of each bar.
    began, ended : (n,) float
        In seconds of work: pauses between the runs that made the result together are cut.
    shares : (n, stages) float
        Of each bar, by stage; together 1.
    nbytes : (n,) float
        Bytes of each bar.
    pauses : tuple of (float, float)
        Where a pause was cut, in seconds of work, and how long it was.
    marks : tuple of (str, float, int)
        Kind, second and row of what went wrong; row -1: no worker of the picture.
    """

    workers: tuple[str, ...]
    row: NDArray[np.int64]
    began: NDArray[np.float64]
    ended: NDArray[np.float64]
    shares: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    pauses: tuple[tuple[float, float], ...]
    marks: tuple[tuple[str, float, int], ...]

    @property
    def seconds(self) -> float:
        """Length of the picture."""
        return float(self.ended.max(initial=0.0))


def timeline(log: Log) -> Timeline:
    """The shards of a run as bars, as its log says."""
    ran = log.shards
    workers = sorted({item.worker for item in ran}, key=natural)
    rows = {name: k for k, name in enumerate(workers)}
    times = np.array([(item.began, item.ended) for item in ran], np.float64).reshape(-1, 2)
    spans, out = busy(ran), pauses(log)
    shown = PAUSE_LOOKS * (sum(b - a for a, b in spans) or 1.0)
    knots, values = _cut(spans, out, shown)
    began, ended = np.interp(times, knots, values).T
    seconds = np.array([[max(item.seconds.get(s, 0.0), 0.0) for s in STAGES] for item in ran], np.float64)
    seconds = seconds.reshape(-1, len(STAGES))
    seconds[:, -1] += np.maximum(times[:, 1] - times[:, 0] - seconds.sum(1), 0.0)
    seconds[seconds.sum(1) <= 0, -1] = 1.0
    cut = [(float(np.interp((a + b) / 2, knots, values)), b - a) for a, b in out if b - a > shown]
    marks = [
        (
            str(event["event"]),
            float(np.interp(event["t"], knots, values)),
            _row(printable(event.get("worker", "")), rows),
        )
        for event in log.named("retry", "lost", "hang", "excluded")
    ]
    return Timeline(
        tuple(workers), np.array([rows[item.worker] for item in ran], np.int64), began, ended,
        seconds / seconds.sum(1, keepdims=True), np.array([item.nbytes for item in ran], np.float64), tuple(cut),
        tuple(marks),
    )  # fmt: skip


def _row(worker: str, rows: dict[str, int]) -> int:
    """Row of a worker; of a process the first of its threads."""
    if worker in rows:
        return rows[worker]
    return next((row for name, row in rows.items() if worker and name.startswith(f"{worker}:")), -1)


def pauses(log: Log) -> list[tuple[float, float]]:
    """Spans in which no shard was in work because the run had ended, until it was started again."""
    spans = busy(log.shards)
    starts = np.array([event["t"] for event in log.named("start")], np.float64)
    gaps = [(one[1], other[0]) for one, other in pairwise(spans)]
    return [(first, last) for first, last in gaps if ((starts > first) & (starts <= last)).any()]


def _cut(spans: Sequence[tuple[float, float]], out: Sequence[tuple[float, float]], shown: float) -> _Knots:
    """Seconds of work at which spans and pauses begin and end: a pause lasts `shown` seconds at most."""
    if not spans:
        return [0.0], [0.0]
    knots, values = [spans[0][0]], [0.0]
    for first, last in [*out, (spans[-1][1], spans[-1][1])]:
        values.append(values[-1] + first - knots[-1])
        values.append(values[-1] + min(last - first, shown))
        knots += [first, last]
    return knots, values


def throughput(found: Timeline, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bytes per second between edges, each shard's spread over the time it took."""
    bars, bins, seconds = overlaps(found, edges)
    lasting = np.bincount(bars, seconds, found.row.size)[bars]
    # a shard without length is in one bin, with all its bytes
    share = np.divide(seconds, lasting, out=np.ones_like(seconds), where=lasting > 0)
    spread = np.bincount(bins, found.nbytes[bars] * share, edges.size - 1)
    return np.asarray(spread / np.diff(edges), np.float64)


def overlaps(
    found: Timeline, edges: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Which bar reaches into which bin between even edges, for how many seconds: one entry for each pair."""
    last = edges.size - 2
    low = np.clip(np.searchsorted(edges, found.began, "right") - 1, 0, last)
    high = np.clip(np.searchsorted(edges, found.ended, "left") - 1, low, last)
    count = high - low + 1
    bars = np.repeat(np.arange(count.size), count)
    bins = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + low[bars]
    seconds = np.minimum(found.ended[bars], edges[bins + 1]) - np.maximum(found.began[bars], edges[bins])
    return bars, bins, np.maximum(seconds, 0.0)
