"""Pictures of strain, in the style of the field, and of what a strain measurement will fit.

Strain is drawn in percent, rotation in degrees, both in diverging colours around 0: red is tension or a turn from x
towards y. The three strains share one range, that can be compared; positions without an answer are hatched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Map
from gpuem.panels import Grid, beyond, column_of_lines, draw_line, hatch_unknown, scale_bar_below, shade

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

STRAINS = ("exx", "eyy", "exy")
SYMBOLS = {"exx": r"$\varepsilon_{xx}$", "eyy": r"$\varepsilon_{yy}$", "exy": r"$\varepsilon_{xy}$",
           "rotation": "rotation"}  # fmt: skip
_COLORS = {"exx": "tab:red", "eyy": "tab:blue", "exy": "tab:green", "rotation": "tab:purple"}

Maps = Mapping[str, Map]
Values = NDArray[np.float64]


def strain_figures(maps: Maps, name: str) -> dict[str, Figure]:
    """The pictures of one strain analysis.

    Parameters
    ----------
    maps : mapping of str to Map
        All maps of a run.
    name : str
        Name of the analysis: its maps are ``name/exx`` and so on.

    Returns
    -------
    dict of str to Figure
        By what follows the name in the name of the file: ``""`` for strain, ``"_quality"`` for its errors. Empty where
        the scan has neither one nor two dimensions, or one position.
    """
    shape = maps[f"{name}/exx"].data.shape
    if len(shape) not in (1, 2) or math.prod(shape) < 2:
        return {}
    return {"": strain_figure(maps, name), "_quality": quality_figure(maps, name)}


def strain_figure(maps: Maps, name: str) -> Figure:
    """exx, eyy, exy in one range and the rotation in its own: maps, or lines with error bands for a scan along a line.

    Parameters
    ----------
    maps, name
        As in `strain_figures`. Needed are ``exx``, ``eyy``, ``exy``, ``rotation``; used where they are there:
        ``*_sigma``, ``valid``, and ``reference`` (scan shape, bool), whose border is drawn. Attributes of ``exx`` that
        are told: ``measure``, ``axes_deg`` (from x, along columns, towards y), ``reference_region`` (y0, y1, x0, x1;
        half-open).
    """
    shown = [key for key in (*STRAINS, "rotation") if f"{name}/{key}" in maps]
    if maps[f"{name}/exx"].data.ndim == 1:
        return _lines(maps, name, shown)
    grid = Grid.of(maps[f"{name}/exx"].axes, [_bars(shown)])
    figure = grid.figure()
    for keys in _groups(shown):
        values = [_values(maps, name, key) for key in keys]
        most = symmetric_range(*values)
        for key, data in zip(keys, values, strict=True):
            axes = grid.add(figure, 0, shown.index(key))
            image = _draw(axes, data, grid, cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_title(SYMBOLS[key], fontsize=12, y=1.01)
            _outline(axes, _reference(maps, name))
        bar = grid.bar(figure, 0, shown.index(keys[0]), shown.index(keys[-1]))
        _bar(bar, image, values, "deg" if keys == ["rotation"] else "%")
    scale_bar_below(figure.axes[0], grid.axis.size, grid.axis.step, grid.axis.unit)
    _directions(grid.glyph(figure), float(_attribute(maps, name, "axes_deg", 0.0)))
    _heading(figure, _about(maps, name))
    return figure


def quality_figure(maps: Maps, name: str) -> Figure:
    """How far the strain can be trusted: one-sigma errors, reduced chi^2, number of disks, beside the virtual image."""
    item = maps[f"{name}/exx"]
    sigmas = [key for key in (*STRAINS, "rotation") if f"{name}/{key}_sigma" in maps]
    panels = _image(maps, name, item.data.shape)
    panels += [(title, maps[f"{name}/{key}"]) for key, title in _TITLES.items() if f"{name}/{key}" in maps]
    if item.data.ndim == 1:
        return _quality_lines(maps, name, panels, sigmas)
    grid = Grid.of(item.axes, [row for row in (_bars(sigmas), [True] * len(panels)) if row])
    figure = grid.figure()
    for keys in _groups(sigmas):
        values = [_values(maps, name, key, "_sigma") for key in keys]
        for key, data in zip(keys, values, strict=True):
            axes = grid.add(figure, 0, sigmas.index(key))
            image = _draw(axes, data, grid, cmap="viridis", vmin=0, vmax=upper(*values))
            axes.set_title(rf"$\sigma$ of {SYMBOLS[key]}", fontsize=11, y=1.01)
        bar = grid.bar(figure, 0, sigmas.index(keys[0]), sigmas.index(keys[-1]))
        _bar(bar, image, values, "deg" if keys == ["rotation"] else "%")
    for k, (title, panel) in enumerate(panels):
        row, data = len(grid.rows) - 1, _numbers(panel)
        axes = grid.add(figure, row, k)
        image = _draw(axes, data, grid, cmap=_COLORMAPS.get(title, "gray"), **_span(data, title))
        axes.set_title(title, fontsize=11, y=1.01)
        _bar(grid.bar(figure, row, k, k), image, [data], panel.units)
    if figure.axes:
        scale_bar_below(figure.axes[0], grid.axis.size, grid.axis.step, grid.axis.unit)
    _heading(figure, f"{name}: errors and quality of the fit")
    return figure


def _groups(keys: Sequence[str]) -> list[list[str]]:
    """Panels that share a range: the strains, and the rotation."""
    groups = [[key for key in keys if key != "rotation"], [key for key in keys if key == "rotation"]]
    return [group for group in groups if group]


def _bars(keys: Sequence[str]) -> list[bool]:
    """After which panels there is a colour bar: the last of each group."""
    return [key in [group[-1] for group in _groups(keys)] for key in keys]


# ---- values


def symmetric_range(*values: Values, floor: float = 1e-3) -> float:
    """Half width of a range around 0 that holds 99 % of the values, rounded up to two digits; at least `floor`."""
    known = np.concatenate([np.abs(v[np.isfinite(v)]) for v in values]) if values else np.empty(0)
    return rounded_up(max(float(np.percentile(known, 99)) if known.size else 0.0, floor))


def upper(*values: Values) -> float:
    """Upper end of a range from 0 that holds 98 % of the values; never 0."""
    known = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.empty(0)
    most = float(np.percentile(known, 98)) if known.size else 0.0
    return rounded_up(most) if most > 0 else 1.0


def rounded_up(value: float) -> float:
    """A positive number rounded up to two digits: what a colour bar can be read with."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.3g}")


def _values(maps: Maps, name: str, key: str, suffix: str = "") -> Values:
    """Strain in percent or rotation in degrees, NaN where it isn't valid."""
    item = maps[f"{name}/{key}{suffix}"]
    valid = maps.get(f"{name}/valid")
    data = _numbers(item)
    if valid is not None:
        data = np.where(valid.data.astype(bool), data, np.nan)
    return data if key == "rotation" or item.units == "%" else 100 * data


def _numbers(item: Map) -> Values:
    data = item.data.astype(np.float64)
    return np.where(np.isfinite(data), data, np.nan)


def _image(maps: Maps, name: str, shape: tuple[int, ...]) -> list[tuple[str, Map]]:
    """A virtual image of the scan: the first virtual detector of the run, else the counts that were fitted."""
    for key, item in maps.items():
        if "/" not in key and key != "valid" and item.data.shape == shape:
            return [(key, item)]
    counts = maps.get(f"{name}/counts")
    return [] if counts is None else [("counts", counts)]


_TITLES = {"chi2": r"reduced $\chi^2$", "disks": "disks used", "grain": "grain"}
_WHOLE = ("disks", "number", "index")  # units of what is counted
_COLORMAPS = {_TITLES["chi2"]: "magma", _TITLES["disks"]: "cividis", _TITLES["grain"]: "turbo"}


def _span(data: Values, title: str) -> dict[str, float]:
    """Range of the colours; 0.5 to 99.5 percent of an image, all of a number of disks."""
    known = data[np.isfinite(data)]
    if not known.size:
        return {"vmin": 0.0, "vmax": 1.0}
    whole = title in (_TITLES["disks"], _TITLES["grain"])
    low, high = (float(v) for v in np.percentile(known, (0, 100) if whole else (0.5, 99.5)))
    low = 0.0 if title == _TITLES["chi2"] else low
    return {"vmin": low, "vmax": high} if high > low else {"vmin": low - 0.5, "vmax": low + 0.5}


def _attribute(maps: Maps, name: str, key: str, default: Any = None) -> Any:
    return maps[f"{name}/exx"].attributes.get(key, default)


def _about(maps: Maps, name: str) -> str:
    """What a reader must know of the numbers: the measure, the reference."""
    parts = [name]
    measure = _attribute(maps, name, "measure")
    if measure is not None:
        parts.append(f"measure: {measure}")
    if _reference(maps, name) is not None:
        parts.append("outlined: the reference region")
    elif isinstance(_attribute(maps, name, "reference"), str):
        parts.append(f"reference: {_attribute(maps, name, 'reference')}")
    angle = float(_attribute(maps, name, "axes_deg", 0.0))
    if angle:
        parts.append(f"x at {angle:.1f} deg from columns to rows")
    return "   |   ".join(parts)


def _reference(maps: Maps, name: str) -> NDArray[np.bool_] | None:
    """Scan positions that the strain refers to, where they are a region."""
    if f"{name}/reference" in maps:
        mask: NDArray[np.bool_] = maps[f"{name}/reference"].data.astype(bool)
        return mask
    region = _attribute(maps, name, "reference_region")
    if region is None:
        return None
    shape = maps[f"{name}/exx"].data.shape
    mask = np.zeros(shape, dtype=np.bool_)
    bounds = [int(v) for v in region]
    mask[tuple(slice(*bounds[2 * k : 2 * k + 2]) for k in range(len(shape)))] = True
    return mask


# ---- maps


def _draw(axes: Axes, data: Values, grid: Grid, **options: Any) -> AxesImage:
    image = axes.imshow(data, aspect=grid.aspect, interpolation="nearest", **options)
    hatch_unknown(axes)
    axes.set_xticks([])
    axes.set_yticks([])
    return image


def _bar(axes: Axes, image: AxesImage, drawn: Sequence[Values], unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = image.get_clim()
    known = np.concatenate([v[np.isfinite(v)] for v in drawn])
    outside = bool((known < (low or 0.0)).any()), bool((known > (high or 0.0)).any())
    whole = MaxNLocator(nbins=6, integer=True) if unit in _WHOLE else None
    axes.figure.colorbar(image, cax=axes, format="%.6g", ticks=whole, extend=beyond(*outside))
    # above the tip, which reaches beyond the axes
    tip = 0.05 * axes.get_window_extent().height * 72 / axes.figure.dpi if outside[1] else 0.0
    axes.set_title(unit, fontsize=8, y=1.0, pad=3 + tip, loc="left")
    axes.tick_params(labelsize=8)
    axes.minorticks_off()


def _outline(axes: Axes, mask: NDArray[np.bool_] | None) -> None:
    """Draw the border of a region along the edges of its pixels."""
    from matplotlib.collections import LineCollection

    if mask is None:
        return
    padded = np.pad(mask, 1)
    y, x = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
    lines = [((j - 0.5, i - 0.5), (j + 0.5, i - 0.5)) for i, j in zip(y.tolist(), x.tolist(), strict=True)]
    y, x = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
    lines += [((j - 0.5, i - 0.5), (j - 0.5, i + 0.5)) for i, j in zip(y.tolist(), x.tolist(), strict=True)]
    axes.add_collection(LineCollection(lines, colors="black", linewidths=2.2), autolim=False)
    axes.add_collection(LineCollection(lines, colors="gold", linewidths=1.0), autolim=False)


def _directions(axes: Axes, degrees: float) -> None:
    """Arrows along x and y of the strain, y down as in the maps; positive angles turn x towards y."""
    axes.set(xlim=(-1.5, 1.5), ylim=(1.5, -1.5))
    axes.set_axis_off()
    for label, angle in (("x", degrees), ("y", degrees + 90)):
        dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        axes.annotate("", (dx, dy), (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 0})
        axes.text(1.3 * dx, 1.3 * dy, label, fontsize=10, ha="center", va="center", style="italic")


# ---- a scan along a line


def _lines(maps: Maps, name: str, shown: Sequence[str]) -> Figure:
    """Strain and rotation along the scan, each with a band of one sigma."""
    axis = maps[f"{name}/exx"].axes[0]
    values = {key: _values(maps, name, key) for key in shown}
    figure, rows = column_of_lines(axis, [SYMBOLS[key] + (" (deg)" if key == "rotation" else " (%)") for key in shown])
    strain = symmetric_range(*(values[key] for key in shown if key != "rotation"))
    turn = symmetric_range(*(values[key] for key in shown if key == "rotation"), floor=1e-3)
    region = _reference(maps, name)
    for key, axes in zip(shown, rows, strict=True):
        sigma = _values(maps, name, key, "_sigma") if f"{name}/{key}_sigma" in maps else None
        draw_line(axes, axis, values[key], sigma, color=_COLORS[key])
        axes.axhline(0, color="0.5", linewidth=0.6)
        most = 1.1 * (turn if key == "rotation" else strain)
        axes.set_ylim(-most, most)
        if region is not None:
            shade(axes, axis, region, color="gold", alpha=0.3)
    _heading(figure, f"{_about(maps, name)}   |   bands: one sigma".replace("outlined", "yellow"))
    return figure


def _quality_lines(maps: Maps, name: str, panels: Sequence[tuple[str, Map]], sigmas: Sequence[str]) -> Figure:
    axis = maps[f"{name}/exx"].axes[0]
    labels = [rf"$\sigma$ of {SYMBOLS[key]}" + (" (deg)" if key == "rotation" else " (%)") for key in sigmas]
    lines = [_values(maps, name, key, "_sigma") for key in sigmas]
    figure, rows = column_of_lines(axis, labels + [title for title, _ in panels])
    for values, axes in zip([*lines, *(_numbers(item) for _, item in panels)], rows, strict=True):
        draw_line(axes, axis, values, None, color="black")
        axes.set_ylim(bottom=0)
    _heading(figure, f"{name}: errors and quality of the fit")
    return figure


def _heading(figure: Figure, text: str) -> None:
    width, height = figure.get_size_inches().tolist()
    figure.text(0.15 / width, 1 - 0.1 / height, text, fontsize=10, va="top")
