"""What is given for a strain measurement is compared with the data, and what was used is what captions tell."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from crystal import deformed, halo, maps_of, planted, run

import gpuem
from gpuem import dataset, job
from gpuem.analyses.deformation import ellipse_matrix
from gpuem.analyses.lattice_finding import FoundLattice
from gpuem.analyses.strain_given import _steps
from gpuem.look import sample
from gpuem.plot_look import figure_of_look
from gpuem.plot_strain import strain_figure

FOUND = np.array([[0.1, 17.0], [17.1, -0.2]])


@functools.cache
def scan():
    return planted(scan=(2, 8))[1]


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts)


# ---- vectors


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (((1, 0), (0, 1)), 1),
        (((1, 0), (1, 1)), 1),
        (((0, -1), (1, 3)), 1),
        (((1, 1), (1, -1)), 2),
        (((2, 0), (0, 2)), 4),
        (((0.5, 0.5), (0.5, -0.5)), 0.5),
        (((1 / 3, 1 / 3), (-1 / 3, 2 / 3)), 1 / 3),
        (((2 / 3, 0), (0, 2 / 3)), None),
        (((1.3, 0), (0, 1)), None),
        (((0.8, 0.2), (-0.2, 0.8)), None),
        (((1, 0), (0.5, 0.5)), 0.5),
    ],
)
@pytest.mark.parametrize("off", [0.0, 0.03])
def test_lattices_that_are_the_found_one_or_a_part_of_it(steps, times, off):
    given = np.array(steps, float) @ FOUND @ np.array([[1 + off, off], [-off, 1 - off / 2]])
    found = _steps(given, FOUND)
    if times is None:
        assert found is None
    else:
        np.testing.assert_allclose(found, steps, atol=1e-9)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((17.0, 0.0), (17.0, -17.0), ""),
        ((17.0, 17.0), (17.0, -17.0), "span every 2. disk"),
        ((0.0, 18.5), (18.5, 0.0), "9 % off the lattice in the data"),
    ],
)
def test_bases_of_the_lattice_and_of_a_part_of_it_are_taken(caplog, a, b, words):
    results = run(scan(), a=a, b=b)
    assert results["strain/valid"].data.all()
    assert (words in caplog.text) if words else not caplog.text
    shown = np.median(results["strain/a"].data.reshape(-1, 2), axis=0)
    assert shown == pytest.approx(np.array(a) * (17 / 18.5 if "%" in words else 1), abs=0.5)
    assert any("as given" in line for line in results["strain/exx"].attributes["found"])


@pytest.mark.parametrize("third", [11.33, 11.5, 25.5])
def test_another_lattice_is_refused_with_that_of_the_data(third):
    with pytest.raises(gpuem.RecipeError, match=r"explains \d+ % of the brightness.*the data show a = .*\|a\| 1[67]"):
        run(scan(), a=(0.0, third), b=(third, 0.0))


def test_where_no_lattice_is_found_what_is_given_is_taken(caplog):
    frames = scan().copy()
    frames[:] = planted(scan=(2, 8), order=0)[1]
    with pytest.raises(gpuem.DataError, match="1 of 25 reflections"):
        run(frames, a=(0.0, 17.0), b=(17.0, 0.0), radius=5.0)
    # what little is found by chance refuses nothing
    assert "no lattice to compare with" in caplog.text or "is it the right lattice" in caplog.text


def test_a_given_lattice_of_few_frames_is_no_other_lattice():
    frames = scan().copy()
    turned = planted(scan=(2, 8), a=(7.0, 16.0), b=(16.0, -7.0))[1]
    frames[1] = turned[1]
    results = run(frames, a=(7.0, 16.0), b=(16.0, -7.0))
    assert results["strain/valid"].data[1].all()


def test_the_second_choice_is_shown_where_vectors_are_given():
    view = gpuem.Strain(a=(0.0, 17.0), b=(17.0, 0.0))
    ds = dataset.of_array(scan())
    found = view.look(job.view_of(ds), sample(ds, np.ones(16, bool)))
    assert found.picture.second is not None
    assert any(line.startswith("second choice") for line in found.picture.lines)
    assert found.picture.runner is not None
    assert "direct beam: red cross; else, orange" in texts(figure_of_look(found))


def test_found_lattices_have_centres_on_one_site_wherever_the_start_is():
    from gpuem.analyses.lattice_finding import find_lattice
    from gpuem.analyses.probe_finding import FoundProbe

    frames = scan().reshape(-1, 96, 96)
    for start in ((47.3 + 8.5, 48.6 + 8.5), (47.3 - 8.5, 48.6)):
        found: FoundLattice = find_lattice(frames, FoundProbe(start, 5.0, 1.0), np.ones((96, 96), bool))[0]
        assert np.ptp(found.centers, axis=0).max() < 1


# ---- centre


def test_a_centre_on_another_disk_is_warned_of(caplog):
    results = run(scan(), center=(47.3, 65.6))
    assert "is taken as given (confidence 0.0" in caplog.text
    assert "direct beam at (47." in caplog.text
    assert results["strain/valid"].data.all()
    attributes = results["strain/exx"].attributes
    assert attributes["center_from"] == "given"
    assert attributes["center_px"] == [47.3, 65.6]
    assert attributes["center_second_px"] == pytest.approx((47.3, 48.6), abs=0.1)
    assert attributes["center_confidence"] < 0.1 < 0.6 < attributes["center_second_confidence"]


def test_a_centre_between_disks_is_refused():
    with pytest.raises(
        gpuem.RecipeError, match=r"center = \(55.8, 48.6\).*no disk is there.*direct beam at \(47.3, 48"
    ):
        run(scan(), center=(55.8, 48.6))


def test_a_centre_beside_its_disk_is_warned_of(caplog):
    results = run(scan(), center=(47.3, 52.1))
    assert "lies 3.5 px from the nearest disk" in caplog.text
    assert results["strain/valid"].data.all()


def test_auto_is_what_is_found_anyway(caplog):
    auto, none = run(scan(), center="auto"), run(scan())
    np.testing.assert_array_equal(auto["strain/exx"].data, none["strain/exx"].data)
    assert "strain along x (columns)" in auto["strain/exx"].description
    assert not caplog.text
    assert gpuem.Strain(center="auto").center is None
    with pytest.raises(ValueError, match="center"):
        gpuem.Strain(center="middle")


# ---- reference


def test_a_reference_partly_outside_the_region_of_interest_is_told(caplog):
    results = run(scan(), reference=(0, 2, 0, 4), roi=(0, 1, 0, 8))
    assert "4 of its 8 scan positions lie in the region of interest" in caplog.text
    assert results["strain/exx"].attributes["reference"] == "region"


def test_captions_tell_the_reference_that_was_used():
    frames = planted()[1][:, :8].copy()
    frames[3] = halo()[0, :8]
    good, bad = run(frames, reference=(0, 1, 0, 8)), run(frames, reference=(3, 4, 0, 8))
    assert good["strain/exx"].attributes["reference_region"] == [0, 1, 0, 8]
    assert "reference_region" not in bad["strain/exx"].attributes
    shown = [texts(strain_figure({k: r[k] for k in r}, "strain")) for r in (good, bad)]
    assert "outlined: the reference region" in shown[0]
    assert "outlined" not in shown[1]
    assert "no lattice was found in the region" in shown[1]


def test_descriptions_and_captions_tell_the_axes():
    turned, along = (run(scan(), axes=axes) for axes in (30.0, (1, 1)))
    for results, words in (
        (turned, "x at 30.0 deg from the detector's columns"),
        (along, "the reflection (1, 1), at 4"),
    ):
        for name in ("exx", "eyy", "exy"):
            assert words in results[f"strain/{name}"].description
            assert "(columns)" not in results[f"strain/{name}"].description
        assert "deg from columns to rows" in texts(strain_figure({k: results[k] for k in results}, "strain"))


@pytest.mark.parametrize("frame", ["undistorted", "detector"])
def test_the_frame_of_given_reference_vectors(frame):
    distortion = (1.1, 25.0)
    _, frames = deformed([[1.02, 0.01], [0.01, 0.99]], noise=False, distortion=distortion)
    true = np.array([[0.0, 17.0], [17.0, 0.0]])
    seen = true[:, ::-1] @ np.linalg.inv(ellipse_matrix(*distortion)).T
    given = true if frame == "undistorted" else seen[:, ::-1]
    found = maps_of(
        run(frames, reference=tuple(map(tuple, given)), reference_frame=frame, distortion=distortion, gain=100.0)
    )
    for name, want in (("exx", 0.02), ("eyy", -0.01), ("exy", 0.01)):
        assert np.abs(found[name][:8]).max() < 3e-4
        assert np.abs(found[name][8:] - want).max() < 3e-4
