from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference

import gpuem
from gpuem import recipe

GOOD = """
[input]
path = "data.npy"

[[analysis]]
kind = "virtual"
name = "adf"
inner = 1.0
outer = 3.0

[[analysis]]
kind = "com"

[output]
path = "out.zarr"
"""


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "data.npy", reference.planted((4, 5, 9, 9), "u2"))
    (tmp_path / "good.toml").write_text(GOOD)
    return tmp_path


def refused(text, folder):
    path = folder / "bad.toml"
    path.write_text(text)
    with pytest.raises(gpuem.RecipeError) as error:
        recipe.load(path)
    return str(error.value)


def test_a_recipe_runs_and_its_paths_count_from_its_folder(folder, monkeypatch):
    monkeypatch.chdir("/")
    found, where = gpuem.run_recipe(folder / "good.toml")
    assert where == folder / "out.zarr"
    assert set(found) > {"adf", "com/x", "valid"}
    assert gpuem.load_results(where).provenance["recipe"] == GOOD


def test_every_mistake_at_once_with_place_and_nearest_word(folder):
    text = GOOD.replace("inner = 1.0", "inner = -1.0\ncentre = [3, 4]").replace('kind = "com"', 'kind = "comm"')
    message = refused(
        text.replace("[output]", "[outptu]").replace('path = "data.npy"', "path = 'data.npy'\nscam = [2, 2]"), folder
    )
    assert "bad.toml: 6 mistakes" in message
    assert "[[analysis]] 1 (virtual), centre: unknown key; did you mean 'center'?" in message
    assert "[[analysis]] 1 (virtual), inner: Input should be greater than or equal to 0 (found -1.0)" in message
    assert (
        "[[analysis]] 2 (comm): kind 'comm' is unknown; did you mean 'com'? (kinds: sum, virtual, com, strain, bragg)"
        in message
    )
    assert "[input] scam: unknown key; did you mean 'scan'?" in message
    assert "[outptu]: unknown key; did you mean 'output'?" in message
    assert "[output]: is missing" in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "com"', "", 'kind = "..." is missing'),
        ("outer = 3.0", "", 'shape "annulus" needs outer'),
        ("outer = 3.0", 'outer = "wide"', "valid number"),
        ('kind = "com"', 'kind = "com"\nname = "adf"', '"adf" is used 2 times'),
        ("[input]", "[input", "not TOML"),
        ('path = "data.npy"', "", "[input] path: is missing"),
        ("[output]", '[run]\ndevice = "gpu"\n[output]', "'gpu' is not one of auto, cuda, cpu"),
        ("[output]", "[run]\nthreads = 0\n[output]", "greater than or equal to 1"),
    ],
)
def test_mistakes(folder, old, new, message):
    assert message in refused(GOOD.replace(old, new), folder)


def test_missing_and_unreadable_recipes(folder):
    with pytest.raises(gpuem.RecipeError, match="no such recipe"):
        recipe.load(folder / "none.toml")
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(gpuem.RecipeError, match="not a text file"):
        recipe.load(folder / "binary.toml")


def test_all_options_reach_the_run(folder):
    np.save(folder / "roi.npy", np.eye(4, 5, dtype=bool))
    text = """
[input]
path = ["raw1.bin", "raw2.bin"]
scan = [4, 5]
frame = [9, 9]
dtype = ">u2"
offset = 3
header = 2
footer = 1
skip = 1
fit = true
roi = "roi.npy"

[calibration]
scan_step = [0.5, 0.25]
scan_unit = "nm"
detector_step = 1.5
detector_unit = "mrad"

[[analysis]]
kind = "virtual"
outer = 4.5
unit = "mrad"

[run]
device = "cpu"
threads = 2
memory = "1 GB"
on_error = "mask"

[output]
path = "deep/er/out.zarr"
previews = false
"""
    data = np.load(folder / "data.npy").reshape(-1, 9, 9)
    body = [b"hh" + f.astype(">u2").tobytes() + b"f" for f in data]
    (folder / "raw1.bin").write_bytes(b"off" + b"".join(body[:7]))
    (folder / "raw2.bin").write_bytes(b"off" + b"".join(body[7:]))
    (folder / "all.toml").write_text(text)
    found, where = gpuem.run_recipe(folder / "all.toml")
    assert where == folder / "deep/er/out.zarr"
    valid = found["valid"].data
    # one frame is skipped, so the last of the twenty positions has none
    assert np.array_equal(valid, np.eye(4, 5, dtype=bool))
    ring = reference.annulus((9, 9), (4, 4), 3.0)
    expected = np.append(reference.mask_sums(data[1:], ring), 0).reshape(4, 5)
    assert np.array_equal(found["virtual"].data[valid], expected[valid])
    assert [(a.step, a.unit) for a in found["virtual"].axes] == [(0.5, "nm"), (0.25, "nm")]
    assert found.provenance["threads"] <= 2


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [(5, 5), ("5", 5), ("4 GB", 4 * 10**9), ("1.5GiB", 3 << 29), ("500 mb", 5 * 10**8), ("2 KiB", 2048)],
)
def test_memory_sizes(text, nbytes):
    assert recipe.parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "4 XB", "-1 GB", 0, "four"])
def test_bad_memory_sizes(text):
    with pytest.raises(gpuem.RecipeError, match="memory"):
        recipe.parse_memory(text)


def test_schema_for_editors():
    schema = recipe.Recipe.model_json_schema()
    assert {"input", "analysis", "output"} <= set(schema["properties"])
    assert "VirtualDetector" in schema["$defs"]


def test_readme_recipe_is_valid():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [b.split("```")[0] for b in readme.split("```toml\n")[1:]]
    assert blocks
    import tomllib

    for block in blocks:
        recipe.check(tomllib.loads(block), "README.md")
