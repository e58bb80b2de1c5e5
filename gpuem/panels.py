"""What all pictures share: an empty figure, positions without an answer, a scale bar."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem import atomic, ownership
from gpuem.axes import Axis
from gpuem.errors import OutputError
from gpuem.pictures import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def empty_figure(width: float, height: float) -> Figure:
    """A figure of so many inches that is drawn into a file and needs no screen."""
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, dpi: int) -> bytes:
    """A figure as a PNG file that says that gpuem drew it."""
    file = io.BytesIO()
    mark = {ownership.PICTURE: ownership.picture_mark()}
    figure.savefig(file, format="png", dpi=dpi, metadata=mark, pil_kwargs={"compress_level": 3})
    return file.getvalue()


def save_picture(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as a PNG file, in the place of one that gpuem drew, but of nothing else.

    Raises
    ------
    OutputError
        Something else is there, the name isn't that of a PNG file, or it can't be written.
    """
    ownership.refuse_picture(path)
    picture = png(figure, dpi)
    try:
        atomic.make_folder(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: not written: {atomic.format_error(error)}") from error
    atomic.write_file(path, picture)


def hatch_unknown(axes: Axes) -> None:
    """Let what an image leaves open (NaN) look hatched: no colour of any map."""
    axes.patch.set(facecolor="0.9", edgecolor="0.4", hatch="////", linewidth=0)


def beyond(lower: bool, higher: bool) -> str:
    """The ends of a colour bar that get a tip: there are values below or above."""
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[lower, higher]


def scale_bar(axes: Axes, shape: tuple[int, ...], step: float, unit: str) -> None:
    """A bar of a round length near a fifth of the width, in a box that can be read on any colour."""
    from matplotlib.patches import Rectangle

    height, width = shape
    length = round_length(width * step / 5)
    extent = length / step
    left, bottom = 0.03 * width - 0.5, 0.97 * height - 0.5
    box = (max(extent, 0.16 * width) + 0.04 * width, 0.13 * height)
    axes.add_patch(Rectangle((left, bottom - box[1]), *box, facecolor="black", alpha=0.55, linewidth=0))
    middle = left + box[0] / 2
    axes.add_patch(Rectangle((middle - extent / 2, bottom - 0.04 * height), extent, 0.02 * height, facecolor="white"))
    text = f"{length:g} {unit}"
    axes.text(middle, bottom - 0.05 * height, text, color="white", fontsize=8, ha="center", va="bottom")


def scale_bar_below(axes: Axes, width: int, step: float, unit: str) -> None:
    """A bar of a round length near a third of the width, below an image, where it hides nothing."""
    from matplotlib.transforms import ScaledTranslation

    length = round_length(width * step / 3)
    end, below = length / step - 0.5, axes.get_xaxis_transform()
    place: dict[str, Any] = {"xycoords": below, "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(f"{length:g} {unit}", (end, 0), (4, -8), va="center", fontsize=8, **place)
    # in points, whatever the height of the panel
    offset = ScaledTranslation(0, -8 / 72, axes.figure.dpi_scale_trans)
    axes.plot([-0.5, end], [0, 0], transform=below + offset, color="black", linewidth=3, clip_on=False,
              solid_capstyle="butt", scalex=False, scaley=False)  # fmt: skip


def round_length(target: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that isn't above the target."""
    power = 10.0 ** math.floor(math.log10(target))
    return max((k * power for k in (1, 2, 5) if k * power <= target), default=power)


@dataclass(frozen=True)
class Grid:
    """Panels of one shape in rows, or one below the other where the scan is wide; lengths in inches.

    Places are computed, not negotiated: an automatic layout draws everything several times.

    Parameters
    ----------
    rows : list of list of bool
        For every panel whether a colour bar follows it.
    width, height : float
        Of a panel.
    across : bool
        Rows are rows; else all panels lie in one column.
    aspect : float
        Height of a pixel over its width.
    axis : Axis
        The scale bar's.
    """

    rows: list[list[bool]]
    width: float
    height: float
    across: bool
    aspect: float
    axis: Axis

    @classmethod
    def of(cls, axes: Sequence[Axis], rows: list[list[bool]]) -> Grid:
        """Panels for a scan with these axes (y, x)."""
        y, x = axes
        aspect = y.step / x.step if y.unit == x.unit else 1.0
        ratio = y.size * aspect / x.size
        across = ratio > 0.4
        width = min(2.7, max(1.1, 3.6 / ratio)) if across else min(9.0, max(4.0, 1.2 / ratio))
        # what is extremely long is drawn too thick: its pixels can be seen then
        height = min(max(width * ratio, 0.7), 5.0)
        return cls(
            rows, width, height, across, aspect if height == width * ratio else aspect * height / width / ratio, x
        )

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure."""
        if not self.across:
            return 1.0 + self.width + 1.1, 0.4 + sum(map(len, self.rows)) * (self.height + 0.45)
        widest = max(len(row) * (self.width + 0.2) + sum(row) * 0.75 for row in self.rows)
        return 1.0 + widest, 0.4 + len(self.rows) * (self.height + 0.55)

    def figure(self) -> Figure:
        """An empty figure that holds all panels."""
        return empty_figure(*self.size)

    def corner(self, row: int, k: int) -> tuple[float, float]:
        """Left and lower end of a panel."""
        if not self.across:
            above = sum(map(len, self.rows[:row])) + k + 1
            return 0.9, self.size[1] - 0.4 - above * (self.height + 0.45) + 0.1
        left = 0.9 + k * (self.width + 0.2) + sum(self.rows[row][:k]) * 0.75
        return left, self.size[1] - 0.4 - (row + 1) * (self.height + 0.55) + 0.2

    def add(self, figure: Figure, row: int, k: int) -> Axes:
        """Axes of a panel."""
        return self._axes(figure, *self.corner(row, k), self.width, self.height)

    def bar(self, figure: Figure, row: int, first: int, last: int) -> Axes:
        """Axes of the colour bar of panels `first` to `last` of a row."""
        left, bottom = self.corner(row, last)
        top = self.corner(row, first)[1] + self.height
        return self._axes(figure, left + self.width + 0.08, bottom, 0.12, top - bottom)

    def glyph(self, figure: Figure) -> Axes:
        """Axes for a small drawing at the left."""
        return self._axes(figure, 0.05, self.corner(0, 0)[1] + self.height - 0.8, 0.8, 0.8)

    def _axes(self, figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
        w, h = self.size
        return figure.add_axes((left / w, bottom / h, width / w, height / h))


def column_of_lines(axis: Axis, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Plots one below the other that share the scan axis."""
    width, height = 8.5, 0.9 + 1.35 * len(labels)
    figure = empty_figure(width, height)
    found: list[Axes] = []
    for k, label in enumerate(labels):
        bottom = height - 0.4 - 1.35 * (k + 1) + 0.1
        place = (0.9 / width, bottom / height, (width - 1.05) / width, 1.2 / height)
        axes = figure.add_axes(place, sharex=found[0] if found else None)
        axes.set_ylabel(label, fontsize=9)
        axes.tick_params(labelsize=8, labelbottom=k == len(labels) - 1)
        found.append(axes)
    found[-1].set_xlabel(f"{axis.name} ({axis.unit})", fontsize=9)
    found[0].set_xlim(*(axis.origin + axis.step * np.array([-0.5, axis.size - 0.5])))
    return figure, found


def draw_line(
    axes: Axes, axis: Axis, values: NDArray[np.float64], sigma: NDArray[np.float64] | None, color: str
) -> None:
    """A line with a band of one sigma; hatched where there is no value."""
    x = axis.coordinates
    if sigma is not None:
        axes.fill_between(x, values - sigma, values + sigma, color=color, alpha=0.3, linewidth=0)
    # a value between two gaps is no line, but seen as a point
    axes.plot(x, values, color=color, linewidth=0.9, marker=".", markersize=2)
    shade(axes, axis, ~np.isfinite(values), facecolor="0.9", edgecolor="0.4", hatch="////", linewidth=0)


def shade(axes: Axes, axis: Axis, where: NDArray[np.bool_], **style: object) -> None:
    """Shade the parts of a scan along a line that are marked."""
    edges = np.flatnonzero(np.diff(np.pad(where.astype(np.int8), 1)))
    for first, last in edges.reshape(-1, 2).tolist():
        axes.axvspan(*(axis.origin + axis.step * np.array([first - 0.5, last - 0.5])), zorder=0, **style)  # type: ignore[arg-type]
