"""Functions that a helper process is asked to call: what damaged files make of it."""

from __future__ import annotations

import os
import signal
import sys
import time

from gpuem.errors import TruncatedError


def echo(path, **options):
    return str(path), os.getpid(), os.getcwd(), options


def crash(path):
    os.kill(os.getpid(), signal.SIGSEGV)


def compute(path):
    while True:
        pass


def nap(path):
    print("naps", file=sys.stderr, flush=True)
    while True:
        time.sleep(1000)


def refuse(path):
    raise TruncatedError(f"{path}: too short", 7)


def fail(path):
    raise ZeroDivisionError("our own mistake")


def leave(path):
    os._exit(0)
