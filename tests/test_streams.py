"""Whatever becomes of pictures, standard output and standard error: the maps are saved, and the exit code says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference

import gpuem
from gpuem import pictures, streams

RECIPE = '[input]\npath = "data.npy"\n[[analysis]]\nkind = "sum"\n[output]\npath = "{out}"\n[run]\ndevice = "cpu"\n'


@pytest.fixture
def data():
    frames = reference.planted((3, 4, 9, 9), "u2")
    np.save("data.npy", frames)
    return frames


def command(words, *, shell="", **env):
    """A gpuem command, its streams connected as a shell would."""
    line = f'"{sys.executable}" -m gpuem.cli {words} {shell}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=os.environ | env, check=False)
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert "Traceback" not in said, said
    assert "Exception ignored" not in said, said
    return done.returncode, said


@pytest.mark.parametrize(
    ("name", "env"),
    [
        ("µ 試料.zarr", {"MPLBACKEND": "module://no_such.backend", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}),
        ("µ.zarr", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "MPLBACKEND": "TkAgg"}),
    ],
)
def test_maps_are_saved_whatever_the_environment_says(data, name, env):
    Path("r.toml").write_text(RECIPE.format(out=name), encoding="utf-8")
    code, said = command("run r.toml", COLUMNS="20", **env)
    assert code == 0, said
    assert (gpuem.load_results(name)["sum/sum"].data == data.sum((0, 1), dtype=np.int64)).all()
    assert Path(name.replace(".zarr", ".previews"), "sum.png").exists()


@pytest.mark.parametrize("shell", [">&- 2>&-", "> /dev/full 2> /dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_maps_are_saved_when_nobody_listens(data, shell):
    Path("r.toml").write_text(RECIPE.format(out="o.zarr"))
    assert command("run r.toml", shell=shell)[0] == 0
    assert (gpuem.load_results("o.zarr")["sum/sum"].data == data.sum((0, 1), dtype=np.int64)).all()


def test_a_reader_who_goes_away_is_no_error(data):
    code, said = command("info data.npy", shell="| head -n 1; exit ${PIPESTATUS[0]}")
    assert code == 0, said
    assert said.count("\n") == 1


def test_a_job_script_that_is_lost_is_an_error(data):
    Path("r.toml").write_text(RECIPE.format(out="o.zarr"))
    code, said = command("slurm r.toml", shell="> /dev/full")
    assert code == 2
    assert "No space left" in said


class Broken:
    """A stream that can't take some characters, and then nothing."""

    def __init__(self):
        self.took, self.full = [], False

    def write(self, text):
        if self.full:
            raise OSError(28, "No space left on device")
        text.encode("ascii")
        self.took.append(text)

    def flush(self):
        if self.full:
            raise OSError(28, "No space left on device")

    def fileno(self):
        raise OSError("no number")


def test_a_guarded_stream_drops_what_it_can_not_write():
    broken = Broken()
    stream = streams.Guarded(broken)
    stream.write("µm")
    assert broken.took == ["\\xb5m"]
    assert not streams.failure(stream)
    broken.full = True
    stream.write("lost")
    broken.full = False
    stream.flush()
    assert broken.took == ["\\xb5m"]
    assert streams.failure(stream) == "No space left on device"
    streams.Guarded(None).write("to nobody")
    assert not streams.Guarded(None).isatty()


def test_a_picture_that_fails_is_one_warning(caplog):
    with pictures.drawing("picture"):
        raise RuntimeError("no such font\nof many lines")
    assert [record.getMessage() for record in caplog.records] == [
        "no picture: no such font of many lines; nothing else is lost by that"
    ]


def test_one_picture_that_fails_does_not_take_the_others_along(data, monkeypatch, caplog):
    from gpuem import plot

    draw = plot.figure_of
    monkeypatch.setattr(plot, "figure_of", lambda title, maps: draw(title, maps) if title != "sum" else 1 / 0)
    found = gpuem.run(data, [gpuem.Sum(), gpuem.CenterOfMass()], device="cpu")
    assert [path.name for path in plot.save_previews(found, Path("pictures"))] == ["com.png", "sum.detectors.png"]
    assert len(caplog.records) == 1
    assert "no picture of sum: division by zero" in caplog.text


def test_settings_of_a_user_do_not_reach_the_pictures(data):
    import matplotlib as mpl

    found = gpuem.run(data, gpuem.Sum(), device="cpu")
    with mpl.rc_context({"text.usetex": True, "font.family": "no such font"}):
        from gpuem import plot

        with pictures.drawing("pictures"):
            plot.save_previews(found, Path("pictures"))
        assert mpl.rcParams["text.usetex"]
    assert Path("pictures/sum.png").exists()
