"""How far a run is, on a terminal: a bar with GB/s and the time that is left; nothing elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from gpuem.dataset import Dataset

err = Console(stderr=True, highlight=False, soft_wrap=True)


def rate(nbytes: float) -> str:
    """Bytes per second for people."""
    return f"{nbytes / 1e9:.2f} GB/s" if nbytes > 1e9 else f"{nbytes / 1e6:.1f} MB/s"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# what was done in so many seconds tells how fast it goes now
RECENT = 15.0


class Progress:
    """A bar with GB/s, shards and time left on a terminal, nothing elsewhere; of all workers together."""

    def __init__(self, ds: Dataset, frames: int) -> None:
        for note in ds.notes:
            err.print(f"note: {escape(note)}")
        self.frame_nbytes, self.frames = ds.source.frame_nbytes, frames
        self.bar: Any = None
        self.done = self.shards = 0
        self.recent: deque[tuple[float, int]] = deque()

    def __enter__(self) -> Callable[[int], None]:
        if err.is_terminal:
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("reading"), BarColumn(), TextColumn("{task.percentage:3.0f} %")
            more = TextColumn("{task.fields[rate]}  {task.fields[shards]} shards")
            self.bar = Bar(*columns, more, TimeRemainingColumn(), console=err, transient=True)
            self.task = self.bar.add_task("frames", total=self.frames, rate="", shards=0)
            self.bar.start()
        return self.advance

    def __exit__(self, *exc: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, frames: int) -> None:
        """A shard more of so many frames is done."""
        self.done += frames
        self.shards += 1
        if self.bar:
            now = time.perf_counter()
            self.recent.append((now, self.done))
            while self.recent[0][0] < now - RECENT:
                self.recent.popleft()
            began, before = self.recent[0]
            speed = rate((self.done - before) * self.frame_nbytes / (now - began)) if now > began else ""
            self.bar.update(self.task, completed=self.done, rate=speed, shards=f"{self.shards:,}")
