"""Signals end a command early, with exit code 75, wherever they arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

# a signal within a callback from C code, as Numba's compiler makes them: Python ignores the exception there
CALLBACK = """
import ctypes, os, signal, sys, threading, time
from gpuem import interrupts
interrupts.install()

def called():
    print("ready", flush=True)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass

@ctypes.CFUNCTYPE(None)
def callback():
    called()

try:
    callback()
    for _ in range(600):
        time.sleep(0.1)
    print("lost")
except KeyboardInterrupt as error:
    print("interrupted:", error, interrupts.received())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_within_a_callback_is_not_lost(number):
    command = [sys.executable, "-c", CALLBACK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate()
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert out == f"interrupted: stopped by {name} {int(number)}\n"
    assert err == ""


def test_other_ignored_exceptions_are_shown_as_python_does():
    code = """
        from gpuem import interrupts
        interrupts.install()
        class Bad:
            def __del__(self): raise ValueError("shown")
        Bad()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "ValueError: shown" in done.stderr


def test_signals_that_the_parent_ignores_stay_ignored():
    code = """
        import os, signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from gpuem import interrupts
        interrupts.install()
        os.kill(os.getpid(), signal.SIGHUP)
        print("goes on")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"


def test_repeated_sigterm_does_not_disturb_what_is_being_saved():
    code = """
        import os, signal
        from gpuem import interrupts
        interrupts.install()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)
            print("saved")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "saved\n"


# what a command imports takes longest; the module named here is where the signal arrives
START = """
import importlib.abc, os, signal, sys

class Send(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == wanted:
            os.kill(os.getpid(), {number})

wanted = sys.argv.pop()
sys.meta_path.insert(0, Send())
from gpuem.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("gpuem.cli", signal.SIGINT),
        ("typer", signal.SIGTERM),
        ("numpy", signal.SIGTERM),
        ("numba", signal.SIGINT),
        ("zarr", signal.SIGTERM),
    ],
)
def test_signals_while_modules_are_imported(module, number):
    np.save("a.npy", np.ones((4, 4, 8, 8), "u2"))
    with open("r.toml", "w") as stream:
        stream.write('[input]\npath="a.npy"\n[[analysis]]\nkind="sum"\n[output]\npath="o.zarr"\n')
    code = START.format(number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "r.toml", module], capture_output=True, text=True, check=False
    )
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopped by" in done.stderr


def handles_sigterm(pid):
    """Whether a process has come so far: before that, the interpreter itself is starting."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return caught >> (signal.SIGTERM - 1) & 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_signals_at_any_moment_of_a_run_that_compiles(tmp_path):
    np.save("a.npy", np.random.default_rng(0).integers(0, 9, (40, 40, 64, 64), np.uint16))
    with open("r.toml", "w") as stream:
        stream.write('[input]\npath="a.npy"\n[[analysis]]\nkind="com"\n[output]\npath="o.zarr"\npreviews=false\n')
    codes = set()
    for k, seconds in enumerate(np.linspace(0, 12, 16)):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / f"cache-{k}")}
        command = [sys.executable, "-m", "gpuem", "run", "r.toml", "--overwrite"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            while not handles_sigterm(process.pid):
                assert process.poll() is None
            time.sleep(seconds)
            process.send_signal(signal.SIGTERM if k % 2 else signal.SIGINT)
            _, err = process.communicate()
        codes.add(process.returncode)
        assert process.returncode in (0, 75), (seconds, err)
        assert "Traceback" not in err
        assert ("stopped by" in err) == (process.returncode == 75), err
    assert 75 in codes
