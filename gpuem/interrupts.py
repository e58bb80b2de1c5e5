"""Ctrl-C, SIGTERM and SIGHUP on the command line: each ends the run early, none is lost.

A signal raises KeyboardInterrupt in the main thread. Where that happens within a callback from C code, such as those of
Numba's compiler, Python prints the exception and goes on as if nothing had happened; the hook for such exceptions sends
the signal again until it arrives.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

# seconds until a signal that a callback swallowed is sent again
AGAIN = 0.1
# the signal that ended this process early, 0 before that
_received = 0
_default_hook = sys.unraisablehook


def install() -> None:
    """Handle signals from now on; those that the parent process chose to ignore stay ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _repeat


def received() -> int:
    """The signal that was received; 0 if none."""
    return _received


def describe(error: KeyboardInterrupt | None = None) -> str:
    """What stopped this process, in words."""
    if error is not None and str(error):
        return str(error)
    return f"stopped by {'Ctrl-C' if _received in (0, signal.SIGINT) else signal.Signals(_received).name}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _received
    # schedulers send SIGTERM before the time limit, perhaps twice: what is being saved then is saved
    if number != signal.SIGINT and _received:
        return
    _received = number
    raise KeyboardInterrupt(describe())


def _repeat(unraisable: sys.UnraisableHookArgs) -> None:
    """Send a signal again whose exception was ignored; show other ignored exceptions as Python does."""
    global _received
    if unraisable.exc_type is not KeyboardInterrupt or not _received:
        _default_hook(unraisable)
        return
    number, _received = _received, 0
    timer = threading.Timer(AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
