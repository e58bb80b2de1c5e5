"""The commands as a user meets them: in their own process, with exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference

import gpuem

RECIPE = """
[input]
path = "data.npy"
[[analysis]]
kind = "sum"
[[analysis]]
kind = "com"
[output]
path = "out.zarr"
"""


def gpuem_command(*arguments, code=0):
    done = subprocess.run([sys.executable, "-m", "gpuem.cli", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def recipe():
    np.save("data.npy", reference.planted((4, 5, 9, 9), "u2"))
    with open("recipe.toml", "w") as stream:
        stream.write(RECIPE)


def test_check_run_info_and_run_again(recipe):
    out, _ = gpuem_command("check", "recipe.toml")
    assert "nothing was streamed" in out
    assert "shards" in out
    assert not os.path.exists("out.zarr")
    out, err = gpuem_command("run", "recipe.toml")
    assert "read             20 frames" in out
    assert "device: cpu" in err
    assert sorted(os.listdir("out.previews")) == [".gpuem-files.json", "com.png", "sum.detectors.png", "sum.png"]
    out, _ = gpuem_command("info", "out.zarr")
    assert "com/divergence" in out
    out, _ = gpuem_command("info", "data.npy")
    assert "4 x 5" in out
    _, err = gpuem_command("run", "recipe.toml", code=2)
    assert "exists; choose another name, or say --overwrite" in err
    gpuem_command("run", "recipe.toml", "--overwrite")


def test_demo_finds_its_truth():
    out, _ = gpuem_command("demo", "here")
    assert "WRONG" not in out
    assert out.count("ok") >= 7
    assert {"demo.raw", "demo.toml", "demo.results.zarr", "demo.results.previews"} <= set(os.listdir("here"))


def test_devices_and_version():
    assert "cpu" in gpuem_command("devices")[0]
    assert gpuem.__name__ in gpuem_command("--version")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.toml"), "no such recipe"),
        (("info", "none.npy"), "no such file"),
        (("info", "recipe.toml"), "not supported"),
        (("check", "bad.toml"), "did you mean 'path'"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(recipe, arguments, message):
    with open("bad.toml", "w") as stream:
        stream.write(RECIPE.replace('path = "data.npy"', "pth = 'data.npy'"))
    _, err = gpuem_command(*arguments, code=2)
    assert message in err
    assert err.startswith("error:")


def test_nothing_is_half_written_when_the_data_is_bad(recipe):
    data = np.load("data.npy").astype("f4")
    data[2, 2, 0, 0] = np.nan
    np.save("data.npy", data)
    _, err = gpuem_command("run", "recipe.toml", code=2)
    assert "frame 12: NaN" in err
    assert 'on_error = "mask"' in err
    assert sorted(os.listdir()) == ["data.npy", "recipe.toml"]
    with open("recipe.toml", "a") as stream:
        stream.write('[run]\non_error = "mask"\n')
    out, _ = gpuem_command("run", "recipe.toml")
    assert "masked           1 of 20 positions" in out
    assert "frame 12: NaN" in out


def test_ctrl_c_stops_soon_and_keeps_what_is_finished(recipe):
    with open("big.raw", "wb") as stream:
        stream.truncate(40 << 30)
    with open("recipe.toml", "w") as stream:
        stream.write(RECIPE.replace('"data.npy"', '"big.raw"\nframe = [256, 256]\ndtype = "<u2"'))
    process = subprocess.Popen(
        [sys.executable, "-m", "gpuem.cli", "run", "recipe.toml"], stderr=subprocess.PIPE, text=True
    )
    log = Path("out.run/events.jsonl")
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by Ctrl-C" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert sorted(os.listdir()) == ["big.raw", "data.npy", "out.run", "recipe.toml"]
    _, err = gpuem_command("run", "recipe.toml", code=2)
    assert "of an unfinished run lie there" in err
