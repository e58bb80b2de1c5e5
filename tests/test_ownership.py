"""Users' files: gpuem removes and replaces only what its own records list."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer.testing

import gpuem
from gpuem import cli, ownership, panels, plot, run_folder
from gpuem.errors import GpuemError, OutputError
from gpuem.run_folder import RunFolder

RECIPE = """
[input]
path = "{data}"
format = "npy"
[[analysis]]
kind = "sum"
[[analysis]]
kind = "virtual"
name = "adf"
outer = 2.0
[run]
device = "cpu"
threads = 1
[output]
path = "{output}"
previews = {previews}
"""


def command(*arguments):
    """A command in this process: exit code, or the error that would be told."""
    done = typer.testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        assert isinstance(done.exception, GpuemError | OSError), done.exc_info
        return done.exception
    return done.exit_code


def write_scan(path, seed=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, np.random.default_rng(seed).integers(0, 9, (3, 4, 6, 7)).astype("u2"))
    return path


def write_recipe(path="recipe.toml", data="scan.npy", output="out.zarr", previews="false"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    up = "../" * (len(path.parts) - 1)
    path.write_text(RECIPE.format(data=up + data, output=up + output, previews=previews))
    return path


def put(name, content=b"mine"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def everything(folder="."):
    """All files, links and folders, and what is in them."""
    return {
        path.as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in Path(folder).rglob("*")
    }


# ---- records


def test_a_folder_is_left_as_it_was_found():
    put("d/mine/x")
    before = everything()
    ownership.claim(Path("d"), "a", "mine/y", "new/z")
    for name in ("a", "mine/y", "new/z"):
        put(f"d/{name}")
    put("d/new/other")
    assert ownership.written(Path("d")) == {"a", "mine/y", "new/z", "new/"}
    ownership.remove(Path("d"), "*", "*/*")
    assert everything() == before | {"d/new": None, "d/new/other": b"mine", "d/.gpuem-files.json": Path(
        "d/.gpuem-files.json").read_bytes()}  # fmt: skip
    Path("d/new/other").unlink()
    ownership.remove(Path("d"))
    assert everything() == before
    ownership.claim(Path("made/below"), "x")
    ownership.remove(Path("made/below"), "x")
    assert not Path("made/below").exists()


def test_what_is_gone_is_forgotten_and_then_somebody_elses():
    ownership.claim(Path("d"), "a", "b")
    for name in ("d/a", "d/b"):
        put(name)
    Path("d/a").unlink()
    ownership.remove(Path("d"))
    put("d/a", b"a user's")
    ownership.remove(Path("d"), "*")
    assert Path("d/a").read_bytes() == b"a user's"
    with pytest.raises(OutputError, match=r"d/a: exists, and no record in d says"):
        ownership.claim(Path("d"), "a")


@pytest.mark.parametrize(
    "content",
    [
        "", "{}", "[]", "null", '{"format": "gpuem files"}',
        '{"format": "gpuem files", "version": 1, "id": "%s", "files": ["a"], "more": 1}',
        '{"format": "gpuem files", "version": true, "id": "%s", "files": ["a"]}',
        '{"format": "gpuem files", "version": 1, "id": "%s", "files": ["../a"]}',
        '{"format": "gpuem files", "version": 1, "id": "%s", "files": ["/a", "a"]}',
        '{"format": "gpuem files", "version": 1, "id": "%s", "files": ["a/../b", "a"]}',
        '{"format": "gpuem files", "version": 1, "id": "%s", "files": ["a", 1]}',
        '{"format": "gpuem files", "version": 1, "id": "short", "files": ["a"]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_record_is_exactly_that_or_somebody_elses_file(content):
    put("d/.gpuem-files.json", content.replace("%s", "0" * 32).encode())
    put("d/a")
    put("a")
    before = everything()
    ownership.remove(Path("d"), "*")
    for name in ("a", "b"):
        with pytest.raises(OutputError, match=r"not a record of gpuem|no record"):
            ownership.claim(Path("d"), name)
    assert everything() == before


@pytest.mark.parametrize("link", ["d", "d/store", "d/store/x"])
def test_symlinks_are_not_followed(link):
    ownership.claim(Path("d"), "store/x")
    put("d/store/x")
    Path("elsewhere").mkdir()
    Path(link).rename("elsewhere/moved")
    Path(link).symlink_to(Path("elsewhere/moved").absolute())
    before = everything()
    ownership.remove(Path("d"), "store/x", "*")
    after = everything()
    # where the link stands for a file of the record, the record may forget it
    assert {name: what for name, what in after.items() if "gpuem-files" not in name} == {
        name: what for name, what in before.items() if "gpuem-files" not in name
    }
    with pytest.raises(OutputError, match="symbolic link"):
        ownership.claim(Path("d"), "store/x")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "a//b", "", "a\0b"])
def test_names_outside_of_the_folder_are_refused(name):
    with pytest.raises(OutputError, match="can't be the name of a file"):
        ownership.claim(Path("d"), name)


# ---- pictures


def test_pictures_of_others_stay(caplog):
    np.save("scan.npy", np.ones((3, 4, 6, 7), "u2"))
    found = gpuem.run(gpuem.open("scan.npy"), [gpuem.Sum(), gpuem.VirtualDetector(name="adf", outer=2)], device="cpu")
    put("pictures/holiday.png")
    for _ in range(2):
        plot.save_previews(found, Path("pictures"))
    plot.save_previews(gpuem.Results({"sum/mean": found["sum/mean"]}), Path("pictures"))
    assert sorted(os.listdir("pictures")) == [".gpuem-files.json", "holiday.png", "sum.png"]
    put("pictures/adf.png")
    before = everything("pictures")
    with pytest.raises(OutputError, match=r"adf.png: exists, and no record"):
        plot.save_previews(found, Path("pictures"))
    assert everything("pictures") == before
    os.symlink("pictures", "link")
    with pytest.raises(OutputError, match="symbolic link"):
        plot.save_previews(found, Path("link"))
    assert everything("pictures") == before


def test_pictures_that_can_not_be_saved_do_not_end_a_run():
    write_scan("scan.npy")
    put("Pictures/holiday.png")
    put("Pictures/sum.png")
    os.symlink("Pictures", "out.previews")
    before = everything("Pictures")
    assert command("run", write_recipe(previews="true")) == 0
    assert gpuem.load_results("out.zarr")["valid"].data.all()
    assert everything("Pictures") == before


def test_a_single_picture_replaces_only_one_of_gpuem(tmp_path):
    figure = panels.empty_figure(1, 1)
    path = Path("a/b/picture.png")
    for _ in range(2):
        panels.save_picture(figure, path, 50)
    own = path.read_bytes()
    import matplotlib.image

    matplotlib.image.imsave("other.png", np.zeros((3, 3)))
    for content in (
        Path("other.png").read_bytes(),
        b"",
        b"text",
        own[:40],
        own.replace(b"gpuem picture", b"gpuem picturf"),
    ):
        path.write_bytes(content)
        with pytest.raises(OutputError, match="gpuem did not draw it"):
            panels.save_picture(figure, path, 50)
        assert path.read_bytes() == content
    put("real.png", own)
    os.symlink("real.png", "link.png")
    for name in ("link.png", "picture.pdf", "a"):
        with pytest.raises(OutputError, match=r"gpuem did not draw it|ends with .png"):
            panels.save_picture(figure, Path(name), 50)
    assert os.readlink("link.png") == "real.png"


# ---- run folders


RUN_FILES = (
    "run.json", "events.jsonl", "alive", "lock", "looked.pkl", "launch.json", "store/masks.npy", "store/images.npy",
    "store/sums.bin", "store/done.jsonl", "rank-1", "store-1/done.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
def test_files_of_a_user_in_the_place_of_a_run_folder_are_refused(name):
    write_scan("scan.npy")
    recipe = write_recipe()
    put(f"out.run/{name}")
    put("out.run/notes.txt")
    before = everything()
    for options in ((), ("--overwrite",), ("--resume",)):
        error = command("run", recipe, *options)
        assert isinstance(error, OutputError), error
        assert f"out.run/{name}: exists, and no record" in str(error)
        assert everything() == before


def test_files_that_are_in_nobodys_way_stay(monkeypatch):
    write_scan("scan.npy")
    recipe = write_recipe()
    mine = {f"out.run/{name}": b"mine" for name in ("notes.txt", "store/scan.npy", "timeline.png", "other/run.json")}
    for name in mine:
        put(name)
    assert command("run", recipe) == 0
    assert command("run", recipe, "--overwrite") == 0
    assert everything().items() >= mine.items()
    # a run that fails at once removes what it made, and nothing else
    np.save("scan.npy", np.full((3, 4, 6, 7), np.nan, "f4"))
    shutil.rmtree("out.zarr")
    assert isinstance(command("run", recipe), GpuemError)
    assert everything("out.run").keys() == {
        "out.run/notes.txt", "out.run/store", "out.run/store/scan.npy", "out.run/timeline.png", "out.run/other",
        "out.run/other/run.json",
    }  # fmt: skip


def test_a_run_folder_that_gpuem_made_is_removed_whole():
    folder = RunFolder(Path("a.run"))
    run_folder.say_launch(folder.path, "launch")
    with pytest.raises(ZeroDivisionError), folder:
        raise ZeroDivisionError
    assert os.listdir() == []
    Path("b.run").mkdir()
    with pytest.raises(ZeroDivisionError), RunFolder(Path("b.run")):
        raise ZeroDivisionError
    assert os.listdir() == ["b.run"]
    assert os.listdir("b.run") == []


@pytest.mark.parametrize(
    ("data", "recipe"),
    [
        ("out.run/store/scan.npy", "recipe.toml"),
        ("out.run/scan.npy", "recipe.toml"),
        ("out.previews/sum.png", "recipe.toml"),
        ("out.zarr/scan.npy", "recipe.toml"),
        ("out.zarr", "recipe.toml"),
        ("scan.npy", "out.run/recipe.toml"),
        ("scan.npy", "out.zarr/recipe.toml"),
        ("link/scan.npy", "recipe.toml"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume",)])
def test_what_is_read_where_something_would_be_written_is_refused(data, recipe, options):
    if data == "link/scan.npy":
        write_scan("out.run/scan.npy")
        os.symlink("out.run", "link")
    else:
        write_scan(data)
    path = write_recipe(recipe, data, previews="true")
    before = everything()
    error = command("run", path, *options)
    assert isinstance(error, OutputError), error
    assert "would lie around" in str(error) or "the result is the input" in str(error)
    assert command("check", path) == 0
    # beside what was there, the picture of the detectors
    assert {name: content for name, content in everything().items() if not name.endswith(".detectors.png")} == before


def test_the_input_in_the_folder_of_an_older_result():
    write_scan("scan.npy")
    assert command("run", write_recipe()) == 0
    shutil.move("scan.npy", "out.zarr/scan.npy")
    before = everything("out.zarr")
    assert isinstance(command("run", write_recipe(data="out.zarr/scan.npy"), "--overwrite"), OutputError)
    assert everything("out.zarr") == before


# ---- the other commands


def test_the_timeline_replaces_no_picture_of_others():
    write_scan("scan.npy")
    recipe = write_recipe()
    assert command("run", recipe) == 0
    put("t.png")
    assert command("status", recipe, "--timeline", "t.png") == 0
    assert Path("t.png").read_bytes() == b"mine"
    for _ in range(2):
        assert command("status", recipe, "--timeline", "other/t.png") == 0
    assert Path("other/t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["demo.raw", "demo.toml", "demo.results.zarr/x", "demo.results.run/run.json"])
def test_the_demo_replaces_nothing(name):
    put(name)
    before = everything()
    assert isinstance(command("demo", "."), GpuemError)
    assert everything() == before


def test_the_demo_replaces_only_itself():
    assert command("demo", "d") == 0
    before = everything("d")
    assert command("demo", "d") == 0
    assert everything("d").keys() == before.keys()
    with open("d/demo.toml", "a") as file:
        file.write("# mine\n")
    before = everything("d")
    assert isinstance(command("demo", "d"), OutputError)
    assert everything("d") == before
    # a result of something else under the demo's name
    shutil.rmtree("d")
    write_scan("d/scan.npy")
    assert command("run", write_recipe("d/mine.toml", "d/scan.npy", "d/demo.results.zarr")) == 0
    before = everything("d")
    assert isinstance(command("demo", "d"), OutputError)
    assert everything("d") == before


@pytest.mark.parametrize("output", ["n" * 300, "n" * 250, "a\\u0000b", "/", "..", "file/x.zarr"])
def test_results_that_can_not_be_are_refused_at_once(output):
    write_scan("scan.npy")
    put("file")
    for options in ((), ("--overwrite",), ("--resume",)):
        assert isinstance(command("run", write_recipe(output=output, previews="true"), *options), GpuemError)
    assert sorted(os.listdir()) == ["file", "recipe.toml", "scan.npy"]


# ---- whatever is asked, in whatever tree


OUTPUTS = ("out.zarr", "out", "sub/out.zarr", "scan.npy", "sub")
PLACES = (
    *(f"out.run/{name}" for name in (*RUN_FILES, "timeline.png", "notes.txt", ".gpuem-files.json", "store/scan.npy")),
    *(f"out.previews/{name}" for name in ("sum.png", "adf.png", "mine.png", ".gpuem-files.json", "sub/x.png")),
    *(f"out.zarr/{name}" for name in ("zarr.json", "notes.txt", "sum/sum/mine", "sum/mine/x", "adf/adf/c/9", "x/y/z")),
    *(
        "sub/out.run/events.jsonl",
        "sub/out.zarr/x",
        "recipe.summary.json",
        "t.png",
        "demo.raw",
        "demo.toml",
        "demo.txt",
    ),
    *("demo.results.run/run.json", "demo.results.previews/sum.png", ".gpuem-save-mine/owner.json", "out.sum.look.png"),
    f".gpuem-save-{'0' * 32}/new/x",
)
CONTENTS = (
    b"mine",
    b"",
    b"{}",
    b'{"identity": {}}\n',
    json.dumps({"format": ownership.FORMAT, "version": 1, "id": "x", "files": ["mine.png", "notes.txt"]}).encode(),
    json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"gpuem": "0.1"}}).encode(),
    json.dumps({"attributes": {"gpuem": {"maps": [], "provenance": {}}}}).encode(),
    b"\x89PNG\r\n\x1a\n" + bytes(100),
)
COMMANDS = (
    *(("run", "{recipe}"), ("run", "{recipe}", "--overwrite"), ("run", "{recipe}", "--resume")) * 2,
    *(("check", "{recipe}"), ("status", "{recipe}", "--timeline", "t.png"), ("info", "out.zarr")) * 2,
    *(("demo", "."), "break", "mend", "mend"),
)


def scatter(rng, count):
    """Put files where gpuem may want to write, if nothing is there; they are to survive."""
    made = {}
    for _ in range(count):
        path = Path(rng.choice(PLACES))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                path.write_bytes(rng.choice(CONTENTS))
                made[path] = path.read_bytes()
        except OSError:
            # a file stands in the place of a folder, or a link
            continue
    return made


def link(rng):
    """A link in the place of a folder that gpuem would make, to a folder with files of all such names."""
    name = Path(rng.choice(("out.run", "out.previews", "out.zarr", "out.run/store")))
    if os.path.lexists(name) or not name.parent.is_dir():
        return {}
    made = [put(f"elsewhere/{file}") for file in ("sum.png", "run.json", "events.jsonl", "masks.npy", "zarr.json")]
    name.symlink_to(Path("elsewhere").absolute())
    return dict.fromkeys(made, b"mine")


def survive(seed):
    rng = random.Random(seed)
    data = Path(rng.choice(("scan.npy", "out.run/store/scan.npy", "out.zarr/scan.npy", "out.previews/x", "sub/s.npy")))
    kept = {write_scan(data): data.read_bytes()}
    place = rng.choice(("recipe.toml", "out.run/recipe.toml", "out.zarr/recipe.toml", "sub/recipe.toml"))
    recipe = write_recipe(place, data.as_posix(), rng.choice(OUTPUTS[:1] * 4 + OUTPUTS), rng.choice(("true", "false")))
    kept[recipe] = recipe.read_bytes()
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.2:
            kept |= link(rng)
        kept |= scatter(rng, rng.choice((0, 0, 1, 2, 5)))
        asked = rng.choice(COMMANDS)
        if asked == "break":
            with data.open("wb") as file:
                np.save(file, np.full((3, 4, 6, 7), np.nan, "f4"))
            kept[data] = data.read_bytes()
        elif asked == "mend":
            write_scan(data)
            kept[data] = data.read_bytes()
        else:
            links = {path for path in Path().rglob("*") if path.is_symlink()}
            command(*(word.format(recipe=recipe) for word in asked))
            for path, content in kept.items():
                assert path.is_file(), (seed, asked, path)
                assert path.read_bytes() == content, (seed, asked, path)
            assert links <= {path for path in Path().rglob("*") if path.is_symlink()}, (seed, asked)


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 80), marks=pytest.mark.slow)])
def test_every_file_that_gpuem_did_not_write_survives(tmp_path, monkeypatch, seeds):
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        survive(seed)
        shutil.rmtree(folder)
