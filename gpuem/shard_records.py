"""Lines of a store's list of finished shards, checked before anything is done with them: a file may hold anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeGuard

# no number of bytes, no time in seconds is larger
_BYTES, _TIME = 1 << 62, 1e12


def parse(line: bytes, frames: Sequence[int], total: int) -> dict[str, Any] | None:
    """The record of a finished shard; None where the line isn't one.

    Parameters
    ----------
    line : bytes
        A line of the list.
    frames : sequence of int
        Frames of every shard of the run.
    total : int
        No more frames than this can be lost.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_record(record, frames, total) else None


def _is_record(record: dict[str, Any], frames: Sequence[int], total: int) -> bool:
    shard = record.get("shard")
    if not _is_count(shard, len(frames)):
        return False
    seconds = record.get("seconds")
    return (
        _is_count(record.get("at"), _BYTES)
        and _is_count(record.get("frames"), frames[shard] + 1)
        and _is_count(record.get("check"), 1 << 32)
        and isinstance(record.get("worker"), str)
        and all(_is_time(record.get(name)) for name in ("began", "ended"))
        and isinstance(seconds, dict)
        and all(map(_is_time, seconds.values()))
        and _are_lost(record.get("lost"), total)
        and ("group" not in record or _is_group(record["group"], shard, len(frames)))
    )


def _is_count(value: Any, end: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < end


def _is_time(value: Any) -> bool:
    # also false for NaN
    return isinstance(value, int | float) and not isinstance(value, bool) and -_TIME < value < _TIME


def _are_lost(value: Any, total: int) -> bool:
    """Whether it lists lost frames, not more than there can be: of each kind the runs, a message and two flags."""
    if not isinstance(value, list):
        return False
    count = 0
    for item in value:
        if not (isinstance(item, list) and len(item) == 4 and isinstance(item[0], list) and isinstance(item[1], str)):
            return False
        if not all(isinstance(flag, bool) for flag in item[2:]):
            return False
        for run in item[0]:
            if not (isinstance(run, list) and len(run) == 2 and all(_is_count(end, _BYTES) for end in run)):
                return False
            if run[0] >= run[1]:
                return False
            count += run[1] - run[0]
    return count <= total


def _is_group(value: Any, shard: int, shards: int) -> bool:
    return (
        isinstance(value, list)
        and all(_is_count(member, shards) for member in value)
        and shard in value
        and len(set(value)) == len(value)
    )
