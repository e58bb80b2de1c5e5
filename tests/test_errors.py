"""Whatever is asked wrongly ends in an error of gpuem's own: in Python, in recipes, on the command line."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpuem
from gpuem import cli, patterns, recipe, toml_file
from gpuem.analyses import Map
from gpuem.backends import Weights
from gpuem.errors import GpuemError, InputError, OutputError, PositionError, RecipeError, ResumableError
from gpuem.paths import local_path

ONES = np.ones((3, 4, 8, 8), "u2")
RECIPE = """[input]
path = "{path}"
[[analysis]]
kind = "sum"
{more}
[output]
path = "{out}"
"""


def refused(call, *words, kind=GpuemError):
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


# ---- Python


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gpuem.VirtualDetector(radius=3), "did you mean 'outer'?"),
        (lambda: gpuem.VirtualDetector(ouuter=3), "did you mean 'outer'?"),
        (lambda: gpuem.VirtualDetector("v", 3), "give fields by their names"),
        (lambda: gpuem.CenterOfMass(radius=-1, unit=3), "CenterOfMass: radius: Input should be greater than 0"),
        (lambda: gpuem.Sum(name=10**5000), "a number of 16,610 bits"),
        (lambda: setattr(gpuem.Sum(), "name", "x"), "doesn't change"),
        (lambda: gpuem.run(ONES, gpuem.Sum), "write Sum()"),
        (lambda: gpuem.run(ONES, "sum"), "no analysis"),
        (lambda: gpuem.run(ONES, None), "no analysis"),
        (lambda: gpuem.run(ONES, []), "at least one"),
        (lambda: gpuem.run(ONES, [gpuem.Sum(), gpuem.Sum()]), "used 2 times"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), workers=1, scheduler="a:1"), "give one of them"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), memory="lots"), "4 GB"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), on_eror="mask"), "did you mean 'on_error'?"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), device="gpu"), "did you mean 'cuda'?"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), roi=[[1], [2, 3]]), "roi"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), roi="no\0where.npy"), "NUL"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), progress=3), "progress 3"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), resume=True), "folder"),
        (lambda: gpuem.run(ONES, gpuem.Sum(), folder=3), "path 3"),
        (lambda: gpuem.run(None, gpuem.Sum()), "NoneType"),
        (lambda: gpuem.open(None), "path None"),
        (lambda: gpuem.open("a\0b.npy"), "NUL"),
        (lambda: gpuem.open("~nosuchuser/x.npy"), "no user 'nosuchuser'"),
        (lambda: gpuem.open("x.npy", scan=5), "scan 5"),
        (lambda: gpuem.open("x.npy", scan=(2.5, 3)), "scan 2.5"),
        (lambda: gpuem.open("x.npy", skip="two"), "skip 'two'"),
        (lambda: gpuem.open("x.npy", format=3), "format 3"),
        (lambda: gpuem.open("x.npy", copies=[{"host": "a"}]), "copies"),
        (lambda: gpuem.open("x.npy", calibration={"scan_stepp": 3}), "did you mean 'scan_step'?"),
        (lambda: gpuem.open("x.npy", calibration=[3]), "calibration [3]"),
        (lambda: gpuem.open("x.npy").corrected(dark=[[1], [2, 3]]), "dark"),
        (lambda: gpuem.open("x.npy").corrected(dead="no.npy"), "no.npy"),
        (lambda: gpuem.open("x.npy")[99, 0], "out of bounds"),
        (lambda: gpuem.open("x.npy")["a"], "'a'"),
        (lambda: gpuem.open("x.npy")[0, 0, 99], "out of bounds"),
        (lambda: gpuem.open("x.npy")[0, 0, 0, 0, 0], "5 indices"),
        (lambda: gpuem.load_results(5), "path 5"),
        (lambda: gpuem.load_results("x.npy"), "not a gpuem result"),
        (lambda: gpuem.run_recipe(None), "path None"),
        (lambda: gpuem.run_recipe("r.toml", imput="x"), "unknown"),
        (lambda: gpuem.run_recipes("r.toml", scheduler=3), "scheduler 3"),
        (lambda: gpuem.run(ONES, gpuem.Sum()).save("a" * 300), "too long"),
        (lambda: gpuem.run(ONES, gpuem.Sum()).save("/"), "not a name"),
    ],
)  # fmt: skip
def test_mistakes_in_python(call, words):
    np.save("x.npy", ONES)
    Path("r.toml").write_text(RECIPE.format(path="x.npy", more="", out="o.zarr"))
    refused(call, words)


def test_the_end_of_a_data_set_is_an_index_error_too():
    np.save("x.npy", ONES)
    ds = gpuem.open("x.npy")
    assert len(list(ds)) == 3
    refused(lambda: ds[7], kind=PositionError)
    assert issubclass(PositionError, IndexError)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e-320, 1e300, 10**400, "one", [1, 2, 3], True])
@pytest.mark.parametrize("part", ["scan", "detector"])
def test_steps_that_are_none(part, value):
    np.save("x.npy", ONES)
    refused(lambda: gpuem.open("x.npy", calibration={f"{part}_step": value}), "pixel size")


def test_lengths_that_no_detector_has():
    refused(lambda: gpuem.run(ONES, gpuem.VirtualDetector(outer=1e200)), "no detector is that large")
    refused(lambda: gpuem.run(ONES, gpuem.CenterOfMass(radius=1e200)), "no detector is that large")


def test_an_array_of_unknown_shape():
    da = pytest.importorskip("dask.array")
    frames = da.from_array(ONES.reshape(12, 8, 8), chunks=(4, 8, 8))
    refused(
        lambda: gpuem.run(frames[da.from_array(np.arange(12) % 2 == 0, chunks=4)], gpuem.Sum()), "compute_chunk_sizes"
    )


@pytest.mark.parametrize(("dtype", "level", "warned"), [
    ("u1", 255, True), ("f4", 255, True), ("i4", 7, True), ("f4", 7, False), ("u1", 1, False), ("f4", 0.5, False)
])  # fmt: skip
def test_a_mask_as_programs_for_images_write_it(dtype, level, warned, caplog):
    mask = np.zeros((8, 8), dtype)
    mask[2:4, 2:4] = level
    found = gpuem.run(ONES, gpuem.VirtualDetector(name="m", shape="mask", mask=mask), device="cpu")
    assert found["m"].data[0, 0] == 4 * level
    assert ("weights" in caplog.text) == warned


# ---- paths


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
    np.save("~x.npy", ONES)
    assert gpuem.open("~x.npy").shape == ONES.shape
    refused(lambda: gpuem.open("~y.npy"), "no such file; did you mean ~x.npy?", kind=InputError)
    assert local_path("~y.zarr") == Path("~y.zarr")
    assert local_path("~/y") == Path.home() / "y"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/~here").touch()
    assert local_path("~here", tmp_path / "deep") == tmp_path / "deep/~here"
    refused(lambda: local_path("\ud800"), "no file name")


def test_links_that_lead_nowhere():
    Path("gone.npy").symlink_to("nothing.npy")
    Path("loop.npy").symlink_to("loop.npy")
    for name, words in (("gone.npy", "a symbolic link to"), ("loop.npy", "leads to itself")):
        refused(lambda name=name: gpuem.open(name), words, kind=InputError)
        with pytest.raises(InputError) as caught:
            gpuem.open(name)
        assert "did you mean" not in str(caught.value)


# ---- recipes


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (f"name = {'9' * 5000}", "digits"),
        (f"name = {'9' * 30}", "100 bits"),
        (f"name = {'[' * 800}{']' * 3000}", "brackets within brackets"),
        (f"name = {'[' * 200}{']' * 200}", "deeper than 50"),
        ("[" + ".".join("a" * 1500) + "]", "deeper than 50"),
        ("name = 1979-05-27", "valid string"),
        ("[calibration]\nscan_step = 0", "pixel size"),
        ("[calibration]\nscan_step = nan", "scan_step"),
        ("[calibration]\ndetector_step = [1.0, -inf]", "detector_step"),
        ("[correction]\ndark = '~nosuchuser/x'", "no user"),
        ('[correction]\ndark = "a\\u0000"', "NUL"),
        ("[run]\nthreads = true\nmemory = -5\npatience = nan", "patience"),
    ],
)
def test_odd_recipes(more, words):
    np.save("x.npy", ONES)
    Path("r.toml").write_text(RECIPE.format(path="x.npy", more=more, out="o.zarr"))
    refused(lambda: gpuem.run_recipe("r.toml"), words)


@pytest.mark.parametrize(
    ("out", "kind"), [("/", RecipeError), ("a" * 300, OutputError), ("~nosuchuser/x.zarr", RecipeError)]
)
def test_odd_places_of_results(out, kind):
    np.save("x.npy", ONES)
    Path("r.toml").write_text(RECIPE.format(path="x.npy", more="", out=out))
    refused(lambda: gpuem.run_recipe("r.toml"), kind=kind)


def test_a_recipe_without_an_end():
    refused(lambda: toml_file.read(Path("/dev/zero")), "no recipe")


WORDS = [
    "a",
    "",
    "auto",
    "all",
    "mean",
    "*",
    "~",
    "~x/y",
    "a\0b",
    "://",
    "x" * 300,
    "µ",
    "1/A",
    "4 GB",
    "cuda",
    "{name}",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.just(2**62),
    st.floats(),
    st.sampled_from(WORDS),
    st.binary(max_size=3),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=2),
    max_leaves=4,
)
LITERALS = [
    "disk",
    "rectangle",
    "point",
    "sectors",
    "annulus",
    "libertem",
    "plane",
    "none",
    "stop",
    "gds",
    "px",
    "mrad",
]
PLAUSIBLE = st.one_of(
    st.floats(),
    st.integers(-3, 20),
    st.lists(st.floats(), min_size=2, max_size=2),
    st.lists(st.integers(-3, 12), min_size=1, max_size=4),
    st.sampled_from(LITERALS),
    VALUES,
)
ANALYSES = [gpuem.Sum, gpuem.VirtualDetector, gpuem.CenterOfMass, gpuem.Bragg, gpuem.Strain]


def section(model, *without):
    return st.dictionaries(
        st.sampled_from([n for n in model.model_fields if n not in ("kind", *without)]), VALUES, max_size=3
    )


def attempt(call):
    """Success or an error of gpuem; anything else is raised."""
    try:
        return call()
    except GpuemError:
        return None


@st.composite
def recipes(draw):
    models = [draw(st.sampled_from(ANALYSES)) for _ in range(draw(st.integers(1, 2)))]
    found = {
        "input": {"path": "x.npy", **draw(section(recipe.Input, "path", "each"))},
        "analysis": [
            {"kind": m.model_fields["kind"].default, "name": f"a{k}", **draw(section(m))} for k, m in enumerate(models)
        ],
        "output": {"path": "o.zarr", **draw(section(recipe.Output, "path"))},
        "run": {
            "device": "cpu",
            "threads": 1,
            **draw(section(recipe.Run, "scheduler", "workers", "device", "threads")),
        },
        "calibration": draw(section(recipe.Calibration)),
        "correction": draw(section(recipe.Correction)),
    }
    if draw(st.integers(0, 3)) == 0:
        found[draw(st.sampled_from([*found, "ruin"]))] = draw(VALUES)
    return found


def run_odd_recipe(raw):
    """What `gpuem check` and the first steps of a run do with a recipe."""
    from gpuem import job

    asked = recipe.only(recipe._found(recipe._absolute(recipe.check(raw, "fuzz"), Path.cwd())))
    ds = job.open_input(asked)
    job.begin(ds, asked.analysis, asked.run, asked.input.roi)


SLOW = [pytest.param(40), pytest.param(800, marks=pytest.mark.slow)]


@pytest.mark.parametrize("examples", SLOW)
def test_any_recipe_is_run_or_refused(examples):
    np.save("x.npy", reference.planted((3, 4, 8, 8), "u2"))

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(recipes())
    def fuzz(raw):
        attempt(lambda: run_odd_recipe(raw))

    fuzz()


@pytest.mark.parametrize("examples", SLOW)
def test_any_arguments_are_taken_or_refused(examples):
    np.save("x.npy", reference.planted((3, 4, 8, 8), "u2"))
    opening = st.dictionaries(
        st.sampled_from(["scan", "skip", "fit", "calibration", "format", "copies", "dtype", "frame"]),
        VALUES,
        max_size=2,
    )
    running = st.dictionaries(
        st.sampled_from(["roi", "memory", "threads", "device_memory", "transfer", "on_error", "patience", "folder"]),
        VALUES, max_size=2,
    )  # fmt: skip
    chosen = st.one_of(
        VALUES, st.lists(st.sampled_from([gpuem.Sum(), gpuem.Sum, gpuem.CenterOfMass(), 3, None]), max_size=3)
    )

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(ANALYSES), st.dictionaries(st.sampled_from([*WORDS, "outer", "center"]), VALUES, max_size=2),
           opening, running, chosen, VALUES)  # fmt: skip
    def fuzz(model, fields, opened, options, analyses, index):
        attempt(lambda: model(**fields))
        attempt(lambda: gpuem.open("x.npy", **opened))
        attempt(lambda: gpuem.open("x.npy")[tuple(index) if isinstance(index, list) else index])
        attempt(lambda: gpuem.open("x.npy").corrected(dark=index))
        attempt(lambda: gpuem.open("x.npy").corrected(dead=index))
        attempt(lambda: gpuem.run(gpuem.open("x.npy"), analyses, device="cpu"))
        attempt(lambda: gpuem.run(gpuem.open("x.npy"), gpuem.Sum(), device="cpu", **options))

    fuzz()


# ---- analyses that fail, or are no models


class Plain:
    """An analysis that has what the protocol asks for, and nothing else."""

    def __init__(self, name="plain", error=None, made=None):
        self.name, self.error, self.made = name, error, made
        self.scale, self.function = np.float32(2), len

    def weights(self, view):
        return Weights(masks=(np.ones(view.frame_shape, bool),))

    def finish(self, view, sums, valid):
        if self.error:
            raise self.error
        if self.made is not None:
            return self.made
        return {
            "all": Map(view.scan_map(self.scale * sums.masks[:, 0], valid), view.scan, "counts", "twice the counts")
        }


def test_an_analysis_that_is_no_model(tmp_path):
    found = gpuem.run(ONES, [Plain(), gpuem.Sum()], device="cpu")
    assert (found["plain/all"].data == 128).all()
    assert found.provenance["analyses"][0] == {
        "kind": "Plain", "name": "plain", "error": None, "made": None, "scale": 2.0, "function": "<len>"
    }  # fmt: skip
    found.save(tmp_path / "o.zarr")
    assert (gpuem.load_results(tmp_path / "o.zarr")["plain/all"].data == 128).all()
    refused(lambda: gpuem.run(ONES, Plain(name="a/../b")), "name of a folder")
    refused(lambda: gpuem.run(ONES, Plain(name=3)), "needed is a text")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (Plain("bad", error=RecipeError("no crystal")), "no crystal"),
        (Plain("bad", error=ZeroDivisionError("by nobody")), "ZeroDivisionError: by nobody"),
        (Plain("bad", made=[1]), "needed is a dictionary"),
        (Plain("bad", made={"x": 3}), "gpuem.Map"),
        (Plain("bad", made={"x": Map(np.ones(3), (), "", "")}), "axes"),
        (Plain("bad", made={"x": Map(np.float64(1), (), "", "", {"x": object()})}), "serializable"),
    ],
)
def test_one_analysis_that_fails_leaves_the_maps_of_the_others(bad, why, caplog):
    found = gpuem.run(ONES, [gpuem.Sum(), bad, Plain()], device="cpu")
    assert (found["sum/sum"].data == 12).all()
    assert (found["plain/all"].data == 128).all()
    assert why in found.provenance["failed"]["bad"]
    assert [r.levelname for r in caplog.records if "bad: its maps could not be made" in r.getMessage()] == ["ERROR"]
    found.save("o.zarr")
    assert "bad" in gpuem.load_results("o.zarr").provenance["failed"]
    refused(lambda: gpuem.run(ONES, bad, device="cpu"), why)


def test_the_exit_code_tells_of_an_analysis_that_failed(monkeypatch, capsys):
    np.save("x.npy", ONES)
    Path("r.toml").write_text(RECIPE.format(path="x.npy", more='[[analysis]]\nkind = "com"', out="o.zarr"))
    monkeypatch.setattr(gpuem.CenterOfMass, "finish", lambda *given: 1 / 0)
    monkeypatch.setattr("sys.argv", ["gpuem", "run", "r.toml"])
    monkeypatch.setattr(cli.streams, "protect", lambda: None)
    before = logging.getLogger().handlers[:]
    with pytest.raises(SystemExit) as ended:
        cli.main()
    logging.getLogger().handlers[:] = before
    assert ended.value.code == 2
    assert "com: without maps" in capsys.readouterr().err
    assert (gpuem.load_results("o.zarr")["sum/sum"].data == 12).all()
    assert json.loads(json.dumps(gpuem.load_results("o.zarr").provenance["failed"]))["com"].startswith(
        "ZeroDivisionError"
    )


def test_what_nobody_foresaw_is_one_line_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpuem", "devices"])
    monkeypatch.setattr(cli, "_describe_processor", lambda: {}["https://host/x?secret"])
    monkeypatch.setattr(cli.streams, "protect", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "a fault of gpuem" in said
    assert "KeyError at test_errors.py" in said
    assert "secret" not in said


# ---- patterns and schedulers


def test_patterns_find_what_glob_finds(tmp_path):
    import glob

    for name in ("a/b/c.npy", "a/.hidden/d.npy", "a/b/.e.npy", "f.npy", "g/h/i/j.npy", "[x]/k.npy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for pattern in (
        "*.npy",
        "**/*.npy",
        "a/**",
        "*/*",
        "**/b/*.npy",
        ".*",
        "a/.h*/*",
        "[[]x]/*",
        "g/**/j.npy",
        "no/*",
        "?/b/c.npy",
    ):
        wanted = {n for n in glob.glob(pattern, root_dir=tmp_path, recursive=True) if not (tmp_path / n).is_dir()}
        found = patterns.find(tmp_path, pattern)
        assert found == sorted(found)
        assert {n for n in found if not (tmp_path / n).is_dir()} == wanted, pattern
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    assert len(patterns.find(tmp_path, "**/c.npy")) == 1


def test_a_tree_that_is_too_large_is_refused_with_numbers(tmp_path, monkeypatch, caplog):
    for k in range(30):
        (tmp_path / f"{k}/x").mkdir(parents=True)
    monkeypatch.setattr(patterns, "MOST_NAMES", 50)
    monkeypatch.setattr(patterns, "TELL", 0.0)
    caplog.set_level("INFO")
    Path("r.toml").write_text(RECIPE.format(path=f"{tmp_path}/**/*.npy", more="", out="{name}.zarr"))
    refused(lambda: recipe.load(Path("r.toml")), "looked at 50 names in", "begin the pattern in a folder further down")
    assert "folders looked at, now in" in caplog.text


@pytest.mark.parametrize("content", [None, "[[[", '{"address": 3}'])
def test_a_scheduler_that_does_not_answer_is_waited_for_aloud(content, caplog):
    pytest.importorskip("distributed")
    if content:
        Path("s.json").write_text(content)
    caplog.set_level("INFO", logger="gpuem")
    levels = [logging.getLogger(name).level for name in ("distributed", "distributed.client")]
    np.save("x.npy", ONES)
    where = "s.json" if content else "127.0.0.1:1"
    refused(lambda: gpuem.run(gpuem.open("x.npy"), gpuem.Sum(), scheduler=where, patience=0.2),
            "0 s (patience)", kind=(ResumableError, RecipeError))  # fmt: skip
    assert [logging.getLogger(name).level for name in ("distributed", "distributed.client")] == levels
    if content == "[[[":
        assert "waiting for the Dask scheduler s.json: this file is none of a scheduler" in caplog.text


def test_a_fault_of_ours_is_not_a_lost_scheduler():
    distributed = pytest.importorskip("distributed")
    from gpuem.executors.dask_line import Line

    async def wrong():
        raise ValueError("a fault")

    with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
        line = Line(client)
        with pytest.raises(ValueError, match="a fault"):
            line.answer(wrong)
    with pytest.raises(ResumableError, match="scheduler is lost"):
        line.answer(wrong)
