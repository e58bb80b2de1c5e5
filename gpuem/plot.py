"""Pictures of results: one PNG per analysis, with axes in physical units, a scale bar and a colour bar."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpuem import atomic, ownership
from gpuem.analyses import Map
from gpuem.messages import in_a_line
from gpuem.panels import beyond, empty_figure, hatch_unknown, png, scale_bar
from gpuem.plot_detectors import detectors_figure, places_of_maps
from gpuem.plot_strain import strain_figures
from gpuem.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("gpuem")
# what a person looks at first; the rest is in the result file
_SHOWN = {"sum": ("mean", "max"), "com": ("field_y", "field_x", "divergence", "curl")}
_SIGNED = ("shift_y", "shift_x", "field_y", "field_x", "divergence", "curl")


def save_previews(results: Results, folder: Path) -> list[Path]:
    """Write one PNG per analysis into `folder`, replacing the pictures that gpuem wrote there before.

    Returns
    -------
    list of Path
        The pictures.

    Raises
    ------
    OutputError
        Somebody else's picture of such a name is there, or the folder can't be written. Nothing was changed then.
    """
    pictures: dict[str, bytes] = {}
    failed: dict[str, Exception] = {}

    def draw_all(name: str, figures: Callable[[], dict[str, Figure]]) -> None:
        try:
            pictures.update({f"{name}{suffix}.png": png(figure, 100) for suffix, figure in figures().items()})
        except ImportError:
            raise
        except Exception as error:  # noqa: BLE001 - the other pictures are drawn all the same
            failed[name or "detectors"] = error

    groups: dict[str, dict[str, Map]] = {}
    strains = [name.removesuffix("/exx") for name in results.maps if name.endswith("/exx")]
    for name in strains:
        draw_all(name, partial(strain_figures, results.maps, name))
    for name, item in results.maps.items():
        group, _, last = name.rpartition("/")
        if group in strains:
            continue
        if item.data.ndim == 2 and item.data.size > 6 and name != "valid":
            groups.setdefault(group or name, {})[last or name] = item
    for group, maps in groups.items():
        kinds = [kind for kind in _SHOWN.values() if set(kind) & set(maps)]
        shown = {k: m for k, m in maps.items() if not kinds or k in kinds[0]}
        draw_all(group, partial(_figures_of, group, shown))
    draw_all("", partial(_detectors, results))
    if failed:
        first = next(iter(failed))
        log.warning("no picture of %s: %s; the maps are complete", ", ".join(failed), in_a_line(failed[first]))
    ownership.claim(folder, *pictures)
    for name, picture in pictures.items():
        atomic.write_file(folder / name, picture)
    ownership.remove_others(folder, pictures)
    return [folder / name for name in pictures]


def _detectors(results: Results) -> dict[str, Figure]:
    """Where the detectors lie, over the mean pattern, where the run made one."""
    places = places_of_maps(results.maps)
    for name, item in results.maps.items():
        if places and name.endswith("/mean") and [axis.name for axis in item.axes] == ["detector_y", "detector_x"]:
            return {f"{name.removesuffix('/mean')}.detectors": detectors_figure(item.data, places)}
    return {}


def _figures_of(title: str, maps: dict[str, Map]) -> dict[str, Figure]:
    return {"": figure_of(title, maps)}


def figure_of(title: str, maps: dict[str, Map]) -> Figure:
    """A figure with one panel per map."""
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure = empty_figure(4.2 * columns, 3.7 * rows)
    for k, (name, item) in enumerate(maps.items()):
        # places are computed, not negotiated: an automatic layout draws everything several times
        left, bottom = (k % columns) / columns, 1 - (k // columns + 1) / rows
        panel = figure.add_axes((left + 0.03 / columns, bottom + 0.04 / rows, 0.76 / columns, 0.86 / rows))
        bar = figure.add_axes((left + 0.80 / columns, bottom + 0.10 / rows, 0.03 / columns, 0.74 / rows))
        draw(panel, bar, f"{title}/{name}" if name != title else name, item)
    return figure


def draw(axes: Axes, bar: Axes, title: str, item: Map) -> None:
    """Draw one map: diverging colours around 0 for signed maps, log counts for diffraction patterns.

    Parameters
    ----------
    axes, bar : matplotlib axes
        Where the map and its colour bar go.
    title : str
        Title of the panel, by convention the name of the map.
    item : Map
        A map of two dimensions.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    data = item.data.astype(np.float64)
    y, x = item.axes
    options: dict[str, Any] = {"cmap": "gray", "interpolation": "nearest"}
    low, high = _limits(data)
    if title.rpartition("/")[2] in _SIGNED:
        largest = max(abs(low), abs(high)) or 1.0
        options.update(cmap="RdBu_r", vmin=-largest, vmax=largest)
    elif y.name.startswith("detector") and data.max(initial=0.0) > 0:
        # clip keeps pixels without counts at the lowest colour instead of leaving holes
        lowest = float(data[data > 0].min())
        options.update(cmap="magma", norm=LogNorm(lowest, max(float(data.max()), 1.001 * lowest), clip=True))
    else:
        options.update(vmin=low, vmax=high)
    image = axes.imshow(data, aspect=y.step / x.step, **options)
    hatch_unknown(axes)
    axes.set_title(title, fontsize=10, y=1.01)  # a given height spares a search for a free one
    axes.set_xticks([])
    axes.set_yticks([])
    logarithmic = LogLocator(subs=(1, 2, 5)) if isinstance(options.get("norm"), LogNorm) else None
    drawn = data[np.isfinite(data)]
    lowest_drawn, highest_drawn = image.get_clim()
    outside = bool((drawn < (lowest_drawn or 0.0)).any()), bool((drawn > (highest_drawn or 0.0)).any())
    axes.figure.colorbar(image, cax=bar, format="%.6g", ticks=logarithmic, extend=beyond(*outside))
    bar.set_title(item.units, fontsize=8, y=1.02, loc="left")
    bar.tick_params(labelsize=7)
    bar.minorticks_off()
    scale_bar(axes, data.shape, x.step, x.unit)


def _limits(data: NDArray[np.float64]) -> tuple[float, float]:
    """Range of the colours: 0.5 to 99.5 percent of the values, so that one hot pixel doesn't hide the rest."""
    known = data[np.isfinite(data)]
    if known.size == 0:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(known, (0.5, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)
