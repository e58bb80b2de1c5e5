from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference

import gpuem
from gpuem import recipe
from gpuem.formats import remote

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
    said = schema["$defs"]["Input"]["properties"]
    assert said["each"]["items"] == {"type": "string"}
    assert {"type": "string"} in said["path"]["anyOf"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("", "[input] path: is missing"),
        ("path = []", "[input] path: is missing"),
        ("each = []", "[input] each: needed is a list of files and patterns"),
        ('each = "a.npy"', "[input] each: needed is a list of files and patterns"),
        ('each = ["a.npy", 3]', "[input] each: needed is a path or a URL, as text in quotes (found 3)"),
        ("path = 3", "[input] path: needed is a path or a URL, as text in quotes (found 3)"),
        ('path = ""', "[input] path: needed is a path or a URL"),
        ('path = ["data.npy", ""]', "[input] path: needed is a path or a URL"),
        ('path = "ftp://host/a.npy"', "not a URL that gpuem reads; it may begin with s3,"),
        ('path = "data.npy"\neach = ["data.npy"]', "[input]: path is one data set or a pattern, each is a list"),
        ('each = ["s3://bucket/*.npy"]', "patterns are for files on this machine; list the URLs"),
        ('each = ["data.npy"]', '[input] names data sets to be run one by one (1); [output] path needs "{name}" in it'),
        ('path = "*.npy"', 'as "{name}.out.zarr"'),
    ],
)
def test_mistakes_in_what_the_data_is(folder, said, message):
    assert message in refused(GOOD.replace('path = "data.npy"', said), folder)


def test_one_mistake_is_told_once(folder):
    assert refused(GOOD.replace('path = "data.npy"', "path = 3"), folder).count("path or a URL") == 1
    assert "is missing" not in refused(GOOD.replace('path = "data.npy"', "each = 3"), folder)


def test_urls_stay_what_they_are(folder):
    text = GOOD.replace('path = "data.npy"', 'each = ["s3://bucket/a//b.npy", "data.npy", "https://host/c.npy?key=x"]')
    (folder / "urls.toml").write_text(text.replace("out.zarr", "{name}.zarr"))
    asked, _ = recipe.load(folder / "urls.toml")
    alone = recipe.one_by_one(asked)
    assert {name: remote.address(one.input.path) for name, one in alone.items()} == {
        "b": "s3://bucket/a//b.npy",
        "data": str(folder / "data.npy"),
        "c": "https://host/c.npy?key=x",
    }
    assert alone["c"].output.path == folder / "c.zarr"
    asked, _ = recipe.load_one(folder / "urls.toml", input="s3://bucket/d.npy")
    assert (str(asked.input.path), asked.output.path) == ("s3://bucket/d.npy", folder / "d.zarr")


def test_the_name_stands_for_the_first_file_of_one_data_set(folder, monkeypatch):
    (folder / "named.toml").write_text(GOOD.replace("out.zarr", "maps of {name}/{name}.zarr"))
    _, where = gpuem.run_recipe(folder / "named.toml")
    assert where == folder / "maps of data/data.zarr"
    several = GOOD.replace('"data.npy"', '["b.x.bin", "a.bin"]').replace("out.zarr", "{name}.zarr")
    (folder / "several.toml").write_text(several)
    assert recipe.load_one(folder / "several.toml")[0].output.path == folder / "b.x.zarr"
    # on the command line paths count from the current folder, and patterns are patterns
    monkeypatch.chdir(folder)
    np.save("[1] second.npy", np.load("data.npy"))
    assert recipe.load_one(folder / "named.toml", input="[1] second.npy")[0].input.path == folder / "[1] second.npy"
    with pytest.raises(gpuem.RecipeError, match="names data sets to be run one by one"):
        recipe.load_one(folder / "named.toml", input="*.npy")


def test_readme_recipe_is_valid():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = [b.split("```")[0] for b in readme.split("```toml\n")[1:]]
    assert blocks
    import tomllib

    for block in blocks:
        recipe.check(tomllib.loads(block), "README.md")
