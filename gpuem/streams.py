"""Standard output and error that never end a command: whatever their encoding, a closed pipe, a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Any, TextIO, cast


class Guarded:
    """A text stream whose writing never fails: what can't be written is dropped from then on.

    Parameters
    ----------
    stream : text stream or None
        The stream; None where there is none, as under ``>&-``.

    Attributes
    ----------
    failure : OSError or None
        Why nothing is written any more, unless the reader just went away.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lost = stream is None
        self.failure: Exception | None = None
        with contextlib.suppress(AttributeError, ValueError, OSError):
            cast(Any, stream).reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write as far as possible."""
        self._try("write", text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write as far as possible."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Flush as far as possible."""
        self._try("flush")

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            return getattr(_NOTHING, name)
        return getattr(self._stream, name)

    def _try(self, method: str, *given: str) -> None:
        if self._lost:
            return
        try:
            getattr(self._stream, method)(*given)
        except BlockingIOError:
            # a terminal or a pipe that others made non-blocking; what was not taken stays in the buffer
            try:
                os.set_blocking(self.fileno(), True)
                self.flush()
            except (OSError, ValueError) as error:
                self._lose(error)
        except UnicodeError:
            # of a stream that could not be reconfigured
            self._try(method, *(text.encode("ascii", "backslashreplace").decode() for text in given))
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Drop all that comes, also what is left in the buffer: the end of Python would write it once more."""
        self._lost = True
        if getattr(error, "errno", None) != errno.EPIPE:
            self.failure = error
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)


_NOTHING = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 - stands for a stream, as long as the process


def protect() -> None:
    """Put `Guarded` in place of standard output and error, and open those that are closed.

    Where descriptor 1 or 2 is free, the next file that is opened would get it, and what a library prints.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
    sys.stdout, sys.stderr = cast(TextIO, Guarded(sys.stdout)), cast(TextIO, Guarded(sys.stderr))


def failure(stream: Any) -> str:
    """Why what was printed to a stream is lost; empty where it isn't, or where nobody wanted to read on."""
    found = getattr(stream, "failure", None)
    return "" if found is None else getattr(found, "strerror", None) or str(found)
