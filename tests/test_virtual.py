from __future__ import annotations

import numpy as np
import pytest
import reference
import tifffile
from hypothesis import given
from hypothesis import strategies as st

import gpuem

FRAME = (13, 17)


@pytest.fixture(scope="module")
def data():
    return reference.planted((3, 4, *FRAME), "u2")


def one(data, **options):
    return gpuem.run(data, [gpuem.VirtualDetector(name="v", **options)])


@given(
    center=st.tuples(st.floats(0, 12), st.floats(0, 16)), outer=st.floats(1, 20), ratio=st.floats(0, 0.8)
)  # fmt: skip
def test_disk_and_annulus_take_the_pixels_of_the_definition(data, center, outer, ratio):
    mask = reference.annulus(FRAME, center, outer, ratio * outer)
    shape = {"shape": "disk"} if ratio == 0 else {"inner": ratio * outer}
    if not mask.any():
        return
    found = one(data, center=center, outer=outer, **shape)["v"]
    assert np.array_equal(found.data.ravel(), reference.mask_sums(data.reshape(-1, *FRAME), mask))
    assert found.units == "counts"
    assert [a.name for a in found.axes] == ["scan_y", "scan_x"]


def test_circles_are_inclusive_and_centred_on_pixels():
    frame = np.ones((1, 7, 7), "u1")
    assert one(frame, shape="disk", outer=1.0)["v"].data[0] == 5
    assert one(frame, inner=1.0, outer=2.0)["v"].data[0] == 13 - 5
    even = np.ones((1, 8, 8), "u1")
    assert one(even, shape="disk", outer=0.75)["v"].data[0] == 4


def test_rectangle_point_and_sectors(data):
    frames = data.reshape(-1, *FRAME)
    found = one(data, shape="rectangle", center=(5, 8), height=4, width=6)["v"]
    assert np.array_equal(found.data.ravel(), frames[:, 3:8, 5:12].sum(axis=(1, 2)))
    found = one(data, shape="point", center=(11.6, 2.2))["v"]
    assert np.array_equal(found.data.ravel(), frames[:, 12, 2])
    names = {"v/0", "v/1", "v/2", "v/3"}
    found = one(data, shape="sectors", outer=9, inner=2, sectors=4, start=-45)
    assert names <= set(found)
    ring = one(data, inner=2, outer=9)["v"].data
    assert np.array_equal(sum(found[name].data for name in names), ring)


def test_sectors_turn_from_x_towards_y():
    frame = np.zeros((1, 9, 9), "u1")
    frame[0, 4, 7], frame[0, 7, 4] = 1, 2
    found = one(frame, shape="sectors", outer=4, sectors=4, start=-45)
    assert [found[f"v/{k}"].data[0] for k in range(4)] == [1, 2, 0, 0]


def test_masks_from_files_and_arrays(data):
    frames = data.reshape(-1, *FRAME)
    mask = np.random.default_rng(0).random(FRAME) > 0.5
    np.save("mask.npy", mask)
    tifffile.imwrite("mask.tif", mask.astype("u1"))
    expected = reference.mask_sums(frames, mask)
    for given_mask in (mask, mask.astype(int), mask.astype(float), "mask.npy", "mask.tif"):
        assert np.array_equal(one(data, shape="mask", mask=given_mask)["v"].data.ravel(), expected)
    weights = np.random.default_rng(1).standard_normal(FRAME)
    np.save("weights.npy", weights)
    found = one(data, shape="mask", mask="weights.npy")["v"].data.ravel()
    exact = reference.image_sums(frames, weights)
    assert np.abs(found - exact).max() < 1e-6 * np.abs(frames.astype(float)).sum(axis=(1, 2)).max()


def test_many_weight_images_do_not_mix(data):
    images = np.random.default_rng(2).standard_normal((7, *FRAME))
    chosen = [gpuem.VirtualDetector(name=f"w{k}", shape="mask", mask=m) for k, m in enumerate(images)]
    found = gpuem.run(data.astype("f8"), chosen)
    for k, image in enumerate(images):
        assert np.allclose(
            found[f"w{k}"].data.ravel(), reference.image_sums(data.reshape(-1, *FRAME), image), rtol=1e-9
        )


def test_mrad_needs_and_uses_the_calibration(data):
    np.save("a.npy", data)
    ds = gpuem.open("a.npy", calibration={"detector_step": 2.0, "detector_unit": "mrad"})
    by_angle = gpuem.run(ds, [gpuem.VirtualDetector(inner=4, outer=10, unit="mrad")])["virtual"].data
    assert np.array_equal(by_angle, one(data, inner=2, outer=5)["v"].data)
    with pytest.raises(gpuem.RecipeError, match="calibrated in mrad, not 1/A"):
        gpuem.run(ds, [gpuem.VirtualDetector(outer=10, unit="1/A")])
    uneven = gpuem.open("a.npy", calibration={"detector_step": (2.0, 2.5), "detector_unit": "mrad"})
    with pytest.raises(gpuem.RecipeError, match="square pixels"):
        gpuem.run(uneven, [gpuem.VirtualDetector(outer=10, unit="mrad")])
    with pytest.raises(gpuem.RecipeError, match="unit 'mad' is unknown"):
        gpuem.run(ds, [gpuem.VirtualDetector(outer=10, unit="mad")])


def test_bad_arguments(data):
    for options, message in (
        ({}, "needs outer"),
        ({"outer": 2, "inner": 3}, "smaller than outer"),
        ({"shape": "disk", "outer": 2, "inner": 1}, "has no inner"),
        ({"shape": "mask"}, "needs mask"),
        ({"shape": "point"}, "needs center"),
        ({"shape": "sectors", "outer": 2}, "needs sectors"),
        ({"outer": -1}, "greater than 0"),
        ({"outer": 1, "name": "a/b"}, "pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            gpuem.VirtualDetector(**options)
    np.save("pickled.npy", np.array([None]), allow_pickle=True)
    for options, message in (
        ({"outer": 2, "center": (50, 2)}, "outside the detector of 13x17"),
        ({"inner": 40, "outer": 50}, "covers no pixel"),
        ({"shape": "mask", "mask": np.ones((3, 3))}, r"shape \(3, 3\), the detector \(13, 17\)"),
        ({"shape": "mask", "mask": np.zeros(FRAME)}, "selects no pixel"),
        ({"shape": "mask", "mask": np.full(FRAME, np.nan)}, "NaN"),
        ({"shape": "mask", "mask": "pickled.npy"}, "can't be read"),
        ({"shape": "mask", "mask": "none.npy"}, "can't be read"),
        ({"shape": "mask", "mask": "mask.jpg"}, r"\.npy or \.tif"),
    ):
        with pytest.raises(gpuem.RecipeError, match=message):
            one(data, **options)
    with pytest.raises(gpuem.RecipeError, match="used 2 times"):
        gpuem.run(data, [gpuem.Sum(), gpuem.Sum()])
    with pytest.raises(gpuem.RecipeError, match="at least one"):
        gpuem.run(data, [])
