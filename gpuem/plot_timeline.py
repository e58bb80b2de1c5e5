"""A run as a picture: a row for each worker, its shards as bars in the colours of the stages, the throughput below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem import atomic, ownership
from gpuem.panels import empty_figure, png, save_picture
from gpuem.progress import duration
from gpuem.status import Log
from gpuem.timings import PAUSE_LOOKS, STAGES, Timeline, overlaps, throughput, timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# told apart by people who don't see red and green as well, and in grey
COLORS = {"read": "#4477AA", "copy": "#66CCEE", "decode": "#CCBB44", "compute": "#228833", "wait": "#BBBBBB"}
_NAMES = {
    "read": "reading", "copy": "copying to the GPU", "decode": "decoding", "compute": "computing", "wait": "waiting",
}  # fmt: skip
_MARKS: dict[str, tuple[str, str, str]] = {
    "retry": ("X", "#EE6677", "tried again"),
    "lost": ("v", "black", "worker lost"),
    "hang": ("s", "#AA3377", "hangs"),
    "excluded": ("D", "#AA3377", "worker excluded"),
}
_MOST_ROWS, _MOST_BARS, _BINS = 64, 4000, 900
# rows so high that the stages of a bar can be told apart one above the other
_SPLIT_ROWS = 16
_MOST_LINES = 320
_WIDTH = 11.0


def save_timeline(folder: Path, path: Path | None = None) -> Path:
    """Draw the timeline of a run folder.

    Parameters
    ----------
    folder : Path
        The run folder.
    path : Path
        The picture; default ``timeline.png`` in the run folder.

    Returns
    -------
    Path
        The picture.

    Raises
    ------
    OutputError
        Something is there that gpuem did not draw, or it can't be written.
    """
    target = path or folder / "timeline.png"
    figure = timeline_figure(timeline(Log(folder).read()), title=folder.name.removesuffix(".run"))
    if path is None:
        ownership.claim(folder, target.name)
        atomic.write_file(target, png(figure, 110))
    else:
        save_picture(figure, target, 110)
    return target


def timeline_figure(found: Timeline, title: str = "") -> Figure:
    """The picture of a run.

    Parameters
    ----------
    found : Timeline
        The run as bars.
    title : str
        Said above.
    """
    rows = len(found.workers)
    tall = float(np.clip(0.34 * rows, 1.0, 6.0)) if rows <= _MOST_ROWS else 6.0
    height = tall + 3.55
    names = _labels(found.workers)
    # room for names of nodes
    left = 0.75 + 0.06 * max((len(name) for name in names), default=0) if rows <= _MOST_ROWS else 1.15
    left = min(left, 4.0)
    figure = empty_figure(_WIDTH, height)

    def axes(bottom: float, up: float, **shared: Any) -> Axes:
        return figure.add_axes((left / _WIDTH, bottom / height, (_WIDTH - left - 0.3) / _WIDTH, up / height), **shared)

    above = axes(2.85, tall)
    middle, below = axes(1.78, 0.95, sharex=above), axes(0.55, 1.1, sharex=above)
    scale, unit = _time_unit(found.seconds)
    heading = f"{title}: {len(found.row):,} shards on {rows:,} worker{'s' if rows != 1 else ''}"
    figure.text(left / _WIDTH, 1 - 0.12 / height, heading.lstrip(": "), fontsize=11, va="top")
    if rows:
        condensed = rows > _MOST_ROWS or len(found.row) > _MOST_BARS
        _draw_density(above, found, scale) if condensed else _draw_bars(above, found, scale)
        # no finer than shards are long: what they did in between isn't known
        typical = float(np.median(found.ended - found.began))
        count = int(np.clip(found.seconds / max(typical, 1e-9), 20, 300))
        edges = np.linspace(0, found.seconds or 1.0, count + 1)
        _draw_shares(middle, found, scale, edges)
        _draw_rate(below, found, scale, edges)
        _draw_pauses((above, middle, below), found, scale)
        _draw_marks(above, found, scale)
    else:
        above.text(0.5, 0.5, "no shard is done yet", transform=above.transAxes, ha="center", va="center")
    _rows(above, names)
    _legend(figure, found, (left / _WIDTH, 1 - 0.36 / height))
    for axes_above in (above, middle):
        axes_above.tick_params(labelbottom=False, labelsize=8)
    middle.set_ylabel("workers\nat work", fontsize=9)
    below.set_xlabel(f"time ({unit}){', pauses cut' if found.pauses else ''}", fontsize=9)
    below.set_ylabel("GB/s", fontsize=9)
    below.tick_params(labelsize=8)
    below.set_xlim(0, found.seconds * scale or 1)
    below.set_ylim(bottom=0)
    return figure


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 300:
        return 1.0, "s"
    return (1 / 60, "min") if seconds < 4 * 3600 else (1 / 3600, "h")


def _labels(workers: Sequence[str]) -> list[str]:
    """Names without what they all have in common: the host, and ``gpuem-`` of threads."""
    parts = [worker.split(":") for worker in workers]
    hosts = {part[0] for part in parts}
    short = [part[1:] if len(hosts) == 1 and len(part) > 1 else part for part in parts]
    return [" ".join(part)[-40:] for part in short]


def _rows(axes: Axes, names: list[str]) -> None:
    rows = len(names)
    axes.set_ylim(max(rows, 1) - 0.5, -0.5)
    if rows > _MOST_ROWS:
        axes.set_ylabel("worker", fontsize=9)
        return
    step = 1 if rows <= 30 else 2
    axes.set_yticks(range(0, rows, step), names[::step], fontsize=8 if rows <= 24 else 6.5)
    axes.tick_params(axis="y", length=0)


def _draw_bars(axes: Axes, found: Timeline, scale: float) -> None:
    """Every shard by itself; in few rows its stages one above the other, else in the colour of the longest."""
    from matplotlib.collections import PolyCollection

    split = len(found.workers) <= _SPLIT_ROWS
    shares = found.shares if split else np.eye(len(STAGES))[found.shares.argmax(1)]
    tops = np.cumsum(shares, axis=1)
    began, ended = found.began * scale, np.maximum(found.ended, found.began + found.seconds / 5000) * scale
    for k, stage in enumerate(STAGES):
        some = shares[:, k] > 0
        # the first stage is the uppermost
        high, low = (
            found.row[some] - 0.42 + 0.84 * (tops - shares)[some, k],
            found.row[some] - 0.42 + 0.84 * tops[some, k],
        )
        corners = [(began[some], high), (ended[some], high), (ended[some], low), (began[some], low)]
        boxes: Any = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
        axes.add_collection(PolyCollection(boxes, facecolors=COLORS[stage], linewidths=0), autolim=False)
    # seams between shards, where there is room for them
    wide = float(np.median(ended - began)) / (found.seconds * scale or 1)
    if wide > 0.004:
        for edge in (began, ended):
            axes.vlines(edge, found.row - 0.42, found.row + 0.42, colors="white", linewidth=0.6)


def _draw_density(axes: Axes, found: Timeline, scale: float) -> None:
    """Pixels instead of bars, paler where nothing was in work; in few rows stages one above the other, as bars have."""
    from matplotlib.colors import to_rgb

    rows = len(found.workers)
    lines = min(rows, _MOST_LINES)
    edges = np.linspace(0, found.seconds or 1.0, _BINS + 1)
    bars, bins, seconds = overlaps(found, edges)
    cell = found.row[bars] * lines // rows * _BINS + bins
    spent = np.stack(
        [np.bincount(cell, seconds * found.shares[bars, k], lines * _BINS) for k in range(len(STAGES))], axis=-1
    ).reshape(lines, _BINS, len(STAGES))
    # where workers are many, several share a line
    members = np.bincount(np.arange(rows) * lines // rows, minlength=lines)
    filled = np.clip(spent.sum(2) / (members[:, None] * (edges[1] - edges[0])), 0, 1)
    palette = np.array([to_rgb(COLORS[stage]) for stage in STAGES])
    if rows <= _SPLIT_ROWS:
        depth = np.linspace(0, 1, 40)[None, :, None, None]
        reached = np.cumsum(spent, axis=2)[:, None] / np.maximum(spent.sum(2), 1e-12)[:, None, :, None]
        stage = np.minimum((reached < depth).sum(3), len(STAGES) - 1)
        image = 1 - filled[:, None, :, None] * (1 - palette[stage])
        image[:, [0, 1, 2, -3, -2, -1]] = 1.0
    else:
        image = 1 - filled[..., None] * (1 - palette[spent.argmax(2)])
    place = (0, found.seconds * scale or 1, rows - 0.5, -0.5)
    axes.imshow(image.reshape(-1, _BINS, 3), extent=place, aspect="auto", interpolation="nearest")


def _draw_shares(axes: Axes, found: Timeline, scale: float, edges: NDArray[np.float64]) -> None:
    """How many workers were at work, and at what."""
    bars, bins, seconds = overlaps(found, edges)
    low = np.zeros(edges.size - 1)
    # the first stage is the uppermost, as in the rows
    for k, stage in reversed(list(enumerate(STAGES))):
        spent = np.bincount(bins, seconds * found.shares[bars, k], edges.size - 1)
        high = low + spent / (edges[1] - edges[0])
        axes.stairs(high, edges * scale, baseline=low, fill=True, color=COLORS[stage])
        low = high
    axes.set_ylim(0, 1.12 * float(low.max(initial=0.0)) or 1.0)


def _draw_rate(axes: Axes, found: Timeline, scale: float, edges: NDArray[np.float64]) -> None:
    rate = throughput(found, edges) / 1e9
    axes.stairs(rate, edges * scale, fill=True, color="0.75")
    axes.stairs(rate, edges * scale, color="0.25", linewidth=1.0)
    worked = found.seconds - _pause_width(found) * len(found.pauses)
    mean = found.nbytes.sum() / 1e9 / max(worked, 1e-9)
    axes.axhline(mean, color="black", linestyle="--", linewidth=0.8)
    axes.annotate(f"mean {mean:.3g} GB/s", (1, mean), (-4, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", fontsize=8, ha="right", va="bottom",
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
    axes.set_ylim(0, 1.35 * max(float(rate.max(initial=0.0)), mean) or 1.0)


def _pause_width(found: Timeline) -> float:
    """How long every cut pause looks, in seconds of the picture."""
    return PAUSE_LOOKS * (found.seconds / (1 + PAUSE_LOOKS * len(found.pauses)))


def _draw_pauses(panels: Sequence[Axes], found: Timeline, scale: float) -> None:
    half = _pause_width(found) / 2
    for at, lasted in found.pauses:
        for axes in panels:
            axes.axvspan((at - half) * scale, (at + half) * scale, facecolor="white", edgecolor="0.55", hatch="////",
                         linewidth=0, zorder=3)  # fmt: skip
        style: dict[str, Any] = {"rotation": 90, "fontsize": 7, "ha": "center", "va": "center", "zorder": 4}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        panels[-1].text(at * scale, 0.5, f"stopped {duration(lasted)}", transform=panels[-1].get_xaxis_transform(),
                       bbox=box, **style)  # fmt: skip


def _draw_marks(axes: Axes, found: Timeline, scale: float) -> None:
    for kind, (marker, color, _) in _MARKS.items():
        mine = np.array([(t, row) for name, t, row in found.marks if name == kind], np.float64).reshape(-1, 2)
        if len(mine):
            # a worker that never finished a shard has no row: above all rows
            height = np.where(mine[:, 1] < 0, -0.5, mine[:, 1])
            axes.scatter(mine[:, 0] * scale, height, marker=marker, s=34, color=color, edgecolors="white",
                         linewidths=0.7, zorder=5, clip_on=False)  # fmt: skip


def _legend(figure: Figure, found: Timeline, corner: tuple[float, float]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    there = found.shares.sum(0) > 1e-3 * max(found.row.size, 1)
    shown: list[Any] = [
        Patch(facecolor=COLORS[stage], label=_NAMES[stage]) for stage, some in zip(STAGES, there, strict=True) if some
    ]
    kinds = {kind for kind, _, _ in found.marks}
    shown += [
        Line2D([], [], linestyle="", marker=marker, color=color, markeredgecolor="white", markersize=7, label=label)
        for kind, (marker, color, label) in _MARKS.items() if kind in kinds
    ]  # fmt: skip
    if shown:
        figure.legend(handles=shown, loc="upper left", bbox_to_anchor=corner, ncols=len(shown), fontsize=8,
                      frameon=False, borderaxespad=0, borderpad=0, handlelength=1.2, columnspacing=1.4)  # fmt: skip
