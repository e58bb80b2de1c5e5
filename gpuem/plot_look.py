"""What a strain measurement will fit, drawn over the mean pattern, so that it is seen before an hour is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpuem.panels import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpuem.analyses.strain_maps import StrainFit

# of the lattice that is fitted, the second candidate, and further grains
_FITTED, _SECOND = ("deepskyblue", "lime"), "orange"
# of the direct beam; that of its second choice is that of a second choice
_BEAM = "red"
_GRAINS = ("violet", "yellow", "tomato", "turquoise")
_MOST_GRAINS = len(_GRAINS)

Vector = tuple[float, float]
Array = NDArray[np.float64]


class Disk(NamedTuple):
    """The probe: where its image lies (y, x), radius and full width of the edge, in px."""

    center: Vector
    radius: float
    edge: float


class Lattice(NamedTuple):
    """A centre and two vectors, (y, x) in px, with what speaks for it."""

    center: Vector
    a: Vector
    b: Vector
    score: float


def figure_of_look(found: StrainFit) -> Figure:
    """What a strain analysis found in its sample, over the mean pattern."""
    model, picture = found.model, found.picture
    parts = []
    for grain, lattice in enumerate(model.lattices):
        mine = model.sites[model.first[grain] : model.first[grain + 1]]
        center, a, b = ((float(v[0]), float(v[1])) for v in lattice.reshape(3, 2))
        score = picture.scores[grain] if grain < len(picture.scores) else 1.0
        parts.append((Lattice(center, a, b, score), lattice[:2] + mine @ lattice[2:].reshape(2, 2)))
    lattices = [parts[0][0]]
    if picture.second is not None:
        lattices.append(Lattice(*picture.second))
    disk = Disk(parts[0][0].center, float(model.probe.radius), float(model.probe.width))
    return look_figure(
        picture.mean, disk, lattices, parts[0][1], grains=parts[1:], runner=picture.runner, title=found.name
    )


def look_figure(
    mean: NDArray[Any],
    disk: Disk,
    lattices: Sequence[Lattice],
    sites: NDArray[Any],
    *,
    grains: Sequence[tuple[Lattice, NDArray[Any]]] = (),
    runner: tuple[float, float, float] | None = None,
    title: str = "",
) -> Figure:
    """Mean pattern with what will be fitted, profile of the probe, and the numbers.

    Parameters
    ----------
    mean : (y, x) array
        Mean of the frames that were looked at.
    disk : Disk
        The probe, and a disk of the mean pattern that shows it.
    lattices : sequence of Lattice
        The one that is fitted, then candidates that are not, the best first.
    sites : (n, 2) array
        Centres (y, x) in px of the disks that are fitted.
    grains : sequence of (Lattice, (n, 2) array)
        Further lattices that are fitted, each with its sites.
    runner : tuple of float
        Second choice of the direct beam: y, x in px, confidence.
    title : str
        Said above the picture.
    """
    height, width = mean.shape
    told = _told(disk, lattices, len(sites), grains, runner)
    # the text needs room below the profile
    tall = max(min(6.5 * height / width, 9.0), 3.0 + 0.17 * told.count("\n"))
    figure = empty_figure(11.0, tall + 0.8)

    def axes(left: float, bottom: float, across: float, up: float) -> Axes:
        return figure.add_axes((left / 11.0, bottom / (tall + 0.8), across / 11.0, up / (tall + 0.8)))

    pattern = axes(0.6, 0.4, 6.5, tall)
    pattern.set_anchor("NW")
    draw_pattern(pattern, mean)
    for (lattice, own), color in zip(grains[:_MOST_GRAINS], _GRAINS, strict=False):
        _circles(pattern, own, disk.radius, color)
        _arrows(pattern, lattice, (color, color), "-")
    _circles(pattern, sites, disk.radius, "white")
    for place, color in ((disk.center, _BEAM), (runner, _SECOND)):
        if place is not None:
            pattern.plot(place[1], place[0], "+", color=color, markersize=12, markeredgewidth=1.6, scalex=False,
                         scaley=False, clip_on=True)  # fmt: skip
    for lattice in lattices[1:2]:
        _arrows(pattern, lattice, (_SECOND, _SECOND), "--")
    for lattice in lattices[:1]:
        _arrows(pattern, lattice, _FITTED, "-")
        _orders(pattern, lattice, sites, disk.radius)
    _profile(axes(7.8, tall - 1.9, 3.0, 2.1), np.asarray(mean, np.float64), disk)
    style: dict[str, Any] = {"fontsize": 8.5, "va": "top", "family": "monospace", "linespacing": 1.35}
    figure.text(7.3 / 11.0, (tall - 2.5) / (tall + 0.8), told, **style)
    heading = title or "what will be fitted, over the mean pattern"
    figure.text(0.6 / 11.0, 1 - 0.1 / (tall + 0.8), heading, fontsize=11, va="top")
    return figure


def draw_pattern(axes: Axes, mean: NDArray[Any]) -> None:
    """Counts in logarithmic colours; the axes are detector pixels, as in a recipe."""
    from matplotlib.colors import LogNorm

    data = np.where(np.isfinite(mean), mean, 0).astype(np.float64)
    options: dict[str, Any] = {"cmap": "gray", "interpolation": "nearest"}
    if (data > 0).any():
        # a few electrons in a corner shall not take most of the range
        high = float(np.percentile(data, 99.9)) or float(data.max())
        low = max(float(np.percentile(data[data > 0], 5)), high / 3e3)
        options["norm"] = LogNorm(min(low, high / 1.01), high, clip=True)
    axes.imshow(data, **options)
    axes.set_xlim(-0.5, mean.shape[1] - 0.5)
    axes.set_ylim(mean.shape[0] - 0.5, -0.5)
    axes.set_xlabel("detector x (px)", fontsize=8, labelpad=1)
    axes.set_ylabel("detector y (px)", fontsize=8, labelpad=1)
    axes.tick_params(labelsize=7)


def _circles(axes: Axes, sites: NDArray[Any], radius: float, color: str) -> None:
    from matplotlib.collections import EllipseCollection

    places = np.asarray(sites, np.float64).reshape(-1, 2)[:, ::-1]
    size, turn = np.full(len(places), 2 * radius), np.zeros(len(places))
    circles = EllipseCollection(
        size, size, turn, units="xy", offsets=places, offset_transform=axes.transData, facecolors="none",
        edgecolors=color, linewidths=0.9,
    )  # fmt: skip
    axes.add_collection(circles, autolim=False)


def _arrows(axes: Axes, lattice: Lattice, colors: tuple[str, str], style: str) -> None:
    """Arrows a and b from the centre, named at their tips."""
    from matplotlib.patheffects import withStroke

    (y, x), a, b, _ = lattice
    for label, (dy, dx), color in (("a", a, colors[0]), ("b", b, colors[1])):
        end = (x + dx, y + dy)
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, (x, y), arrowprops=arrow)
        if style == "-":
            # beside the middle of the arrow, where no disk hides it
            length = math.hypot(dy, dx) or 1.0
            beside = (x + 0.55 * dx - 9 * dy / length, y + 0.55 * dy + 9 * dx / length)
            effects = [withStroke(linewidth=2.5, foreground="black")]
            axes.text(*beside, label, color=color, fontsize=12, weight="bold", style="italic", ha="center", va="center",
                      path_effects=effects, clip_on=True)  # fmt: skip


def _orders(axes: Axes, lattice: Lattice, sites: NDArray[Any], radius: float) -> None:
    """Names (h k) of the sites around the centre."""
    from matplotlib.patheffects import withStroke

    effects = [withStroke(linewidth=2, foreground="black")]
    center, basis = np.array(lattice.center), np.array([lattice.a, lattice.b])
    if abs(np.linalg.det(basis)) < 1e-9:
        return
    for site in np.asarray(sites, np.float64).reshape(-1, 2):
        h, k = np.rint(np.linalg.solve(basis.T, site - center)).astype(int).tolist()
        if max(abs(h), abs(k)) == 1:
            axes.text(site[1], site[0] - radius - 2, _order(h, k), color="white", fontsize=7, ha="center", va="bottom",
                      path_effects=effects, clip_on=True)  # fmt: skip


def _order(h: int, k: int) -> str:
    """(h k) as crystallographers write it, with a bar over negative numbers."""
    numbers = [rf"\bar{{{-n}}}" if n < 0 else str(n) for n in (h, k)]
    return rf"$({numbers[0]}\,{numbers[1]})$"


def _profile(axes: Axes, mean: Array, disk: Disk) -> None:
    """Mean over circles around the disk's centre, and the fitted disk."""
    radius, values = radial_profile(mean, disk.center, 2 * disk.radius + 2)
    axes.plot(radius, values, ".", color="black", markersize=4, label="mean pattern")
    fine = np.linspace(0, 2 * disk.radius, 400)
    inside, outside = values[radius <= 0.7 * disk.radius], values[radius >= 1.3 * disk.radius]
    top = float(inside.mean()) if inside.size else 1.0
    floor = float(outside.mean()) if outside.size else 0.0
    model = floor + (top - floor) * np.clip((disk.radius - fine) / max(disk.edge, 1e-6) + 0.5, 0, 1)
    axes.plot(fine, model, color="tab:red", linewidth=1.2, label="disk that is fitted")
    axes.axvline(disk.radius, color="tab:red", linewidth=0.8, linestyle=":")
    axes.annotate(f"radius {disk.radius:.2f} px", (disk.radius, 0.55), (4, 0), xycoords=axes.get_xaxis_transform(),
                  textcoords="offset points", fontsize=8, color="tab:red")  # fmt: skip
    axes.set_xlim(0, 2 * disk.radius)
    axes.set_ylim(bottom=min(0.0, float(values.min(initial=0.0))))
    axes.set_xlabel("distance from the centre of the disk (px)", fontsize=8, labelpad=1)
    axes.set_ylabel("counts per pixel", fontsize=8, labelpad=2)
    axes.tick_params(labelsize=7)
    axes.set_title("the probe", fontsize=10)
    axes.legend(fontsize=7, loc="upper right", frameon=False)


def radial_profile(mean: Array, center: Vector, reach: float) -> tuple[Array, Array]:
    """Distance and mean of rings of half a pixel around a place; only rings with pixels, and pixels with numbers."""
    y, x = np.indices(mean.shape)
    distance = np.hypot(y - center[0], x - center[1])
    near = (distance < reach) & np.isfinite(mean)
    ring = np.rint(2 * distance[near]).astype(np.int64)
    count = np.bincount(ring)
    filled = count > 0
    count = count[filled]
    return (
        np.bincount(ring, distance[near])[filled] / count,
        np.bincount(ring, mean[near])[filled] / count,
    )


def _told(
    disk: Disk, lattices: Sequence[Lattice], sites: int, grains: Sequence[tuple[Lattice, NDArray[Any]]],
    runner: tuple[float, float, float] | None = None,
) -> str:  # fmt: skip
    """The numbers, as they could be given in a recipe."""
    lines = [f"disk    radius {disk.radius:.2f} px, edge {disk.edge:.2f} px"]
    if runner is not None:
        lines.append(
            f"direct beam: red cross; else, orange:\n        ({runner[0]:.2f}, {runner[1]:.2f}) px, {runner[2]:.2g}"
        )
    for k, lattice in enumerate(lattices[:2]):
        name = "fitted: blue a, green b" if k == 0 else "second candidate: orange, dashed; not fitted"
        lines += ["", name, *_numbers(lattice)]
        if k == 0:
            lines.append(f"sites   {sites} disks (white circles)")
    for k, (lattice, own) in enumerate(grains):
        color = f"in {_GRAINS[k]}" if k < _MOST_GRAINS else "not drawn"
        lines += ["", f"grain {k + 2}, {color}: {len(own)} disks", *_numbers(lattice)[1:3]]
    return "\n".join(lines)


def _numbers(lattice: Lattice) -> list[str]:
    center, a, b, score = lattice
    between = math.degrees(math.atan2(a[1] * b[0] - a[0] * b[1], a[1] * b[1] + a[0] * b[0]))
    return [
        f"center  ({center[0]:.2f}, {center[1]:.2f}) px",
        f"a       ({a[0]:.2f}, {a[1]:.2f}) px, length {math.hypot(*a):.2f}",
        f"b       ({b[0]:.2f}, {b[1]:.2f}) px, length {math.hypot(*b):.2f}",
        f"angle   {between:.2f} deg, score {score:.3g}",
    ]
