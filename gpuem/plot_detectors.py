"""Where virtual detectors and masks lie, drawn over the mean pattern, with the direct beam as it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Map
from gpuem.panels import empty_figure
from gpuem.plot_look import draw_pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpuem.analyses.direct_beam import DirectBeam

_COLORS = ("deepskyblue", "lime", "orange", "violet", "yellow", "tomato", "turquoise", "white")
_BEAM = "#ff4040"
# lines of text beside the picture
_MOST_LINES = 30

Place = Mapping[str, Any]


def places_of_maps(maps: Mapping[str, Map]) -> dict[str, Place]:
    """Where the detectors of a result lie, by the names of their analyses."""
    places: dict[str, Place] = {}
    for name, item in maps.items():
        if "shape" in item.attributes and "center_y" in item.attributes:
            places.setdefault(name.split("/")[0], item.attributes)
    return places


def detectors_figure(mean: NDArray[Any], places: Mapping[str, Place], beam: DirectBeam | None = None) -> Figure:
    """Outlines of detectors over a mean pattern.

    Parameters
    ----------
    mean : (y, x) array
        The pattern.
    places : mapping
        By name what ``place`` of an analysis, or the attributes of its maps, say: ``shape``, ``center_y``,
        ``outer_px`` and so on.
    beam : DirectBeam, optional
        As it was measured; else what the places say of it is drawn.
    """
    height, width = mean.shape
    tall = float(np.clip(6.5 * height / width, 3.0, 9.0))
    figure = empty_figure(11.0, tall + 0.8)
    axes = figure.add_axes((0.6 / 11.0, 0.4 / (tall + 0.8), 6.5 / 11.0, tall / (tall + 0.8)))
    axes.set_anchor("NW")
    draw_pattern(axes, mean)
    left, step = 7.3 / 11.0, 0.17 / (tall + 0.8)
    top = 1 - 0.45 / (tall + 0.8)
    lines: list[tuple[str, str]] = []
    for k, (name, place) in enumerate(places.items()):
        color = _COLORS[k % len(_COLORS)]
        _outline(axes, place, color)
        lines += [(text, color) for text in _told(name, place)]
    drawn = _beam_of(places) if beam is None else (beam.center, beam.sigma, beam.radius)
    if drawn is not None:
        _draw_beam(axes, *drawn)
        (y, x), sigma, radius = drawn
        lines += [("direct beam (red +)", _BEAM), (f"  ({y:.2f}, {x:.2f}) +- {max(sigma):.2g} px", _BEAM),
                  (f"  radius {radius:.2f} px (dotted)", _BEAM)]  # fmt: skip
    for k, (text, color) in enumerate(lines[:_MOST_LINES]):
        patch = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}
        figure.text(
            left, top - k * 1.35 * step, text, color=color, fontsize=8.5, family="monospace", va="top", bbox=patch
        )
    figure.text(0.6 / 11.0, 1 - 0.1 / (tall + 0.8), "detectors over the mean pattern", fontsize=11, va="top")
    return figure


def _told(name: str, place: Place) -> list[str]:
    """A detector in words: two or three short lines."""
    lengths = [
        f"{key} {place[f'{key}_px']:.2f}" for key in ("inner", "outer", "height", "width") if place.get(f"{key}_px")
    ]
    unit = place.get("unit", "px")
    given = f"{', '.join(lengths)} px" + (f" (given in {unit})" if unit != "px" else "") if lengths else ""
    lines = [
        f"{name}: {place['shape']}",
        f"  ({place['center_y']:.2f}, {place['center_x']:.2f}) {place['center_from']}",
    ]
    return lines + ([f"  {given}"] if given else [])


def _beam_of(places: Mapping[str, Place]) -> tuple[tuple[float, float], tuple[float, float], float] | None:
    for place in places.values():
        if "direct_beam_y" in place:
            y, x, sy, sx, r = (float(place[f"direct_beam_{key}"]) for key in ("y", "x", "sigma_y", "sigma_x", "radius"))
            return (y, x), (sy, sx), r
    return None


def _draw_beam(axes: Axes, center: tuple[float, float], sigma: tuple[float, float], radius: float) -> None:
    from matplotlib.patches import Circle

    y, x = center
    axes.plot([x], [y], marker="+", color=_BEAM, markersize=12, markeredgewidth=1.4, scalex=False, scaley=False)
    if radius > 0:
        axes.add_patch(Circle((x, y), radius, fill=False, edgecolor=_BEAM, linestyle=":", linewidth=1.2))


def _outline(axes: Axes, place: Place, color: str) -> None:
    """Circles, a rectangle, the borders of sectors; a cross where there is only a centre."""
    from matplotlib.patches import Circle, Rectangle
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.4, foreground="black")]
    style: dict[str, Any] = {"fill": False, "edgecolor": color, "linewidth": 1.3, "path_effects": halo}
    y, x, shape = float(place["center_y"]), float(place["center_x"]), place["shape"]
    outer, inner = float(place.get("outer_px", 0)), float(place.get("inner_px", 0))
    if shape == "rectangle":
        high, wide = float(place["height_px"]), float(place["width_px"])
        axes.add_patch(Rectangle((x - wide / 2, y - high / 2), wide, high, **style))
    for radius in (outer, inner):
        if radius > 0:
            axes.add_patch(Circle((x, y), radius, **style))
    for k in range(int(place.get("sectors", 0))):
        turn = math.radians(float(place.get("start_deg", 0)) + 360 * k / int(place["sectors"]))
        ends = np.array([inner, outer])
        axes.plot(x + ends * math.cos(turn), y + ends * math.sin(turn), color=color, linewidth=1.0, scalex=False,
                  scaley=False)  # fmt: skip
    if not outer or shape == "point":
        axes.plot([x], [y], marker="x", color=color, markersize=8, scalex=False, scaley=False)
