"""Pictures of strain: ranges, what is hatched, where arrows and outlines lie, and that nothing breaks a run's end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpuem import plot, synthetic
from gpuem.analyses import Map
from gpuem.axes import Axis
from gpuem.panels import round_length
from gpuem.plot_look import Disk, Lattice, look_figure, radial_profile
from gpuem.plot_strain import quality_figure, rounded_up, strain_figure, strain_figures, symmetric_range, upper
from gpuem.results import Results

STRAINS = ("exx", "eyy", "exy", "rotation")


def strain_maps(shape, *, name="strain", values=None, **attributes):
    """Made-up maps that differ along y and x; the last position of the scan has no answer."""
    axes = tuple(Axis(n, s, 0.5, "nm") for n, s in zip(("scan_y", "scan_x")[-len(shape) :], shape, strict=True))
    x = np.broadcast_to(np.linspace(0, 1, shape[-1]), shape)
    y = np.linspace(0, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1)) * np.ones(shape)
    valid = np.ones(shape, bool)
    valid.ravel()[-1] = False
    planted = {"exx": 0.02 * (x > 0.6) * (y < 0.6), "eyy": -0.01 * y, "exy": 0.003 * x, "rotation": 0.8 * x}
    maps = {}
    for key in STRAINS:
        units = "deg" if key == "rotation" else ""
        data = (planted[key] if values is None else np.full(shape, values)).astype(np.float32)
        maps[f"{name}/{key}"] = Map(data, axes, units, "", attributes)
        maps[f"{name}/{key}_sigma"] = Map(np.full(shape, 2e-4, np.float32), axes, units, "")
    maps[f"{name}/chi2"] = Map(np.ones(shape, np.float32), axes, "", "")
    maps[f"{name}/disks"] = Map(np.full(shape, 25, np.int32), axes, "disks", "")
    maps[f"{name}/valid"] = Map(valid, axes, "", "")
    maps[f"{name}/center"] = Map(np.zeros((*shape, 2), np.float32), (*axes, Axis("vector", 2)), "px", "")
    maps["valid"] = Map(np.ones(shape, bool), axes, "", "")
    return maps


def images(figure):
    return {axes.get_title(): axes.images[0] for axes in figure.axes if axes.images}


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_the_strains_share_one_range_in_percent_and_the_rotation_has_its_own():
    found = images(strain_figure(strain_maps((12, 16)), "strain"))
    assert list(found) == [r"$\varepsilon_{xx}$", r"$\varepsilon_{yy}$", r"$\varepsilon_{xy}$", "rotation"]
    *strains, rotation = found.values()
    assert [image.get_clim() for image in strains] == [(-2.0, 2.0)] * 3
    low, high = rotation.get_clim()
    assert -low == high == pytest.approx(0.8, abs=0.02)
    exx = strains[0].get_array()
    assert exx[0, 15] == pytest.approx(2.0)
    assert exx[0, 0] == exx[11, 14] == 0  # drawn as it lies, y down
    assert {image.get_cmap().name for image in found.values()} == {"RdBu_r"}


def test_colour_bars_are_two_and_say_their_units():
    figure = strain_figure(strain_maps((12, 16)), "strain")
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")] == ["%", "deg"]


def test_positions_without_an_answer_are_left_open_and_hatched():
    figure = strain_figure(strain_maps((12, 16)), "strain")
    for image in images(figure).values():
        data = np.ma.masked_invalid(image.get_array())
        assert np.flatnonzero(np.ma.getmaskarray(data)).tolist() == [12 * 16 - 1]
        assert image.axes.patch.get_hatch() == "////"


def test_a_scale_bar_of_a_round_length():
    figure = strain_figure(strain_maps((12, 16)), "strain")
    assert [text.get_text() for axes in figure.axes for text in axes.texts if "nm" in text.get_text()] == ["2 nm"]
    first = next(axes for axes in figure.axes if axes.images)
    assert first.lines[0].get_xdata().tolist() == [-0.5, 3.5]  # 2 nm are 4 steps of 0.5 nm


@pytest.mark.parametrize(("degrees", "x", "y"), [(0.0, (1, 0), (0, 1)), (30.0, (0.866, 0.5), (-0.5, 0.866))])
def test_arrows_along_the_axes_of_the_strain(degrees, x, y):
    figure = strain_figure(strain_maps((12, 16), axes_deg=degrees), "strain")
    (glyph,) = [axes for axes in figure.axes if {"x", "y"} <= {text.get_text() for text in axes.texts}]
    tips = [text.xy for text in glyph.texts if text.get_text() == ""]
    assert np.allclose(tips, [x, y], atol=1e-3)
    top, bottom = glyph.get_ylim()
    assert top > bottom  # y points down, as in the maps


def test_what_the_numbers_mean_is_said():
    assert texts(strain_figure(strain_maps((12, 16), measure="hencky", reference="median"), "strain")) == [
        "strain   |   measure: hencky   |   reference: median"
    ]


@pytest.mark.parametrize("how", ["map", "attribute"])
def test_the_reference_region_is_outlined(how):
    maps = strain_maps((12, 16), **({"reference_region": (2, 5, 3, 7)} if how == "attribute" else {}))
    if how == "map":
        mask = np.zeros((12, 16), bool)
        mask[2:5, 3:7] = True
        maps["strain/reference"] = Map(mask, maps["valid"].axes, "", "")
    figure = strain_figure(maps, "strain")
    assert "outlined: the reference region" in texts(figure)[0]
    for image in images(figure).values():
        points = np.concatenate(image.axes.collections[0].get_segments())
        assert points.min(axis=0).tolist() == [2.5, 1.5]
        assert points.max(axis=0).tolist() == [6.5, 4.5]
        assert len(points) == 2 * 2 * (3 + 4)


def test_the_quality_figure_has_errors_the_fit_and_a_virtual_image():
    maps = strain_maps((12, 16))
    titles = list(images(quality_figure(maps, "strain")))
    assert titles[-2:] == [r"reduced $\chi^2$", "disks used"]
    assert len(titles) == 6
    maps["strain/counts"] = Map(np.ones((12, 16)), maps["valid"].axes, "counts", "")
    assert "counts" in images(quality_figure(maps, "strain"))
    maps["haadf"] = Map(np.ones((12, 16)), maps["valid"].axes, "counts", "")
    found = images(quality_figure(maps, "strain"))
    assert "haadf" in found
    assert "counts" not in found
    assert found[r"$\sigma$ of $\varepsilon_{xx}$"].get_clim() == (0, 0.02)
    assert found[r"$\sigma$ of rotation"].get_clim() == (0, 2e-4)


def test_a_scan_along_a_line_gives_lines_with_bands():
    figure = strain_figure(strain_maps((40,), reference_region=(4, 10)), "strain")
    assert [axes.get_ylabel() for axes in figure.axes][-1] == "rotation (deg)"
    assert len(figure.axes) == 4
    assert len({axes.get_ylim() for axes in figure.axes[:3]}) == 1
    for axes in figure.axes:
        assert len(axes.collections) == 1  # the band
        low, high = axes.get_ylim()
        assert low == -high
        edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        assert np.allclose(edges, [(19.25, 19.75), (1.75, 4.75)])  # no answer; the reference
    band = figure.axes[1].collections[0].get_paths()[0].vertices
    line = figure.axes[1].lines[0].get_ydata()
    assert np.nanmax(band[:, 1]) == pytest.approx(np.nanmax(line) + 0.02, abs=1e-6)
    assert "bands: one sigma" in texts(figure)[0]
    assert len(quality_figure(strain_maps((40,)), "strain").axes) == 6


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (3, 400), (400, 3), (2,), (1, 64)])
@pytest.mark.parametrize("values", [None, 0.0, np.nan])
def test_no_scan_breaks_the_pictures(tmp_path, shape, values):
    for figure in strain_figures(strain_maps(shape, values=values), "strain").values():
        figure.savefig(tmp_path / "x.png", dpi=50)
        assert max(figure.get_size_inches()) < 25


def test_other_scans_have_no_pictures():
    assert strain_figures(strain_maps((1, 1)), "strain") == {}
    assert strain_figures({"s/exx": Map(np.zeros((2, 3, 4)), (), "", "")}, "s") == {}


def test_previews_of_a_run_with_strain(tmp_path):
    maps = strain_maps((12, 16), name="grain")
    maps["adf"] = Map(np.ones((12, 16)), maps["valid"].axes, "counts", "")
    written = plot.save_previews(Results(maps), tmp_path)
    assert sorted(path.name for path in written) == ["adf.png", "grain.png", "grain_quality.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".gpuem-files.json", "adf.png", "grain.png", "grain_quality.png")
    ]


def test_ranges():
    assert symmetric_range(np.array([-0.5, 0.1, np.nan])) == 0.5
    assert symmetric_range(np.full(5, np.nan)) == symmetric_range() == symmetric_range(np.zeros(4)) == 1e-3
    one_wild = np.concatenate([np.linspace(-1, 1, 1000), [500]])
    assert symmetric_range(one_wild) == pytest.approx(1.0)
    assert upper(np.zeros(3)) == upper(np.full(2, np.nan)) == upper() == 1.0
    assert [rounded_up(v) for v in (0.0123, 2.0, 0.31, 99.1, 7e-9)] == [0.013, 2.0, 0.31, 100.0, 7e-9]
    assert [round_length(v) for v in (1.0, 4.9, 5.0, 0.03, 999.9999999999999)] == [1, 2, 5, 0.02, 1000]


# ---- what will be fitted


@pytest.fixture(scope="module")
def seen():
    pattern = synthetic.Pattern(a=(6.0, 36.0), b=(33.0, -12.0))
    basis = np.array([pattern.a, pattern.b])
    sites = np.array(pattern.center) + pattern.orders @ basis
    lattice = Lattice(pattern.center, pattern.a, pattern.b, 0.97)
    return synthetic.expectation(pattern), Disk(pattern.center, 9.0, 1.0), lattice, sites


def test_the_look_shows_sites_arrows_and_names(seen):
    mean, disk, lattice, sites = seen
    second = Lattice(lattice.center, (39.0, 24.0), lattice.b, 0.8)
    figure = look_figure(mean, disk, [lattice, second], sites)
    pattern, profile = figure.axes
    (circles,) = pattern.collections
    assert np.allclose(circles.get_offsets(), sites[:, ::-1])
    arrows = {text.xy: text.arrow_patch.get_linestyle() for text in pattern.texts if getattr(text, "arrow_patch", None)}
    y, x = lattice.center
    tip = next(style for (px, py), style in arrows.items() if np.allclose((px, py), (x + 36, y + 6)))
    assert tip == "-"
    assert arrows[x + 24.0, y + 39.0] == "--"
    named = {text.get_text(): text.get_position() for text in pattern.texts}
    assert named[r"$(1\,\bar{1})$"] == pytest.approx((x + 36 + 12, y + 6 - 33 - 11))
    assert sum(name.startswith("$(") for name in named) == 8
    told = "\n".join(texts(figure))
    for part in ("radius 9.00 px", "center  (127.30, 128.60) px", "a       (6.00, 36.00) px", "25 disks", "score 0.8"):
        assert part in told
    assert "radius 9.00 px" in [text.get_text() for text in profile.texts]


def test_the_profile_is_that_of_the_disk(seen):
    mean, disk, _, _ = seen
    radius, values = radial_profile(mean, disk.center, 15)
    assert np.allclose(values[radius < 8], 200.3)
    assert np.allclose(values[(radius > 10) & (radius < 14)], 0.3)
    assert np.interp(9.0, radius, values) == pytest.approx(100, abs=25)


def test_grains_have_circles_of_their_own(seen):
    mean, disk, lattice, sites = seen
    grains = [(Lattice(lattice.center, (20.0, 31.0), (31.0, -20.0), 0.5), sites[:3])] * 6
    figure = look_figure(mean, disk, [lattice], sites, grains=grains)
    assert [len(c.get_offsets()) for c in figure.axes[0].collections] == [3, 3, 3, 3, 25]
    assert "grain 7, not drawn: 3 disks" in "\n".join(texts(figure))


@pytest.mark.parametrize("shape", [(64, 64), (32, 256), (256, 32)])
def test_nothing_seen_is_drawn_too(tmp_path, shape):
    nothing = look_figure(np.zeros(shape), Disk((30.0, 30.0), 5.0, 1.0), [], np.empty((0, 2)), title="empty")
    nothing.savefig(Path(tmp_path) / "x.png")
    assert texts(nothing)[-1] == "empty"
    unknown = look_figure(np.full(shape, np.nan), Disk((300.0, 30.0), 5.0, 0.0), [], np.empty((0, 2)))
    unknown.savefig(Path(tmp_path) / "y.png")
