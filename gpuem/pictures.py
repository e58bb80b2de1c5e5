"""Pictures are extra: whatever goes wrong with one is a warning, never the end of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from gpuem.messages import in_a_line

log = logging.getLogger("gpuem")


@contextlib.contextmanager
def drawing(what: str) -> Iterator[None]:
    """Where pictures are drawn: a failure of any kind becomes one warning; the settings of matplotlib are its own.

    Parameters
    ----------
    what : str
        What is missing then, for the message: ``picture out.com.look.png``.
    """
    try:
        with warnings.catch_warnings():
            # as of a font that lacks a character of a name
            warnings.simplefilter("ignore")
            import_matplotlib()
            import matplotlib as mpl

            # what a user sets for other figures, such as usetex, may need programs that are not here
            with mpl.rc_context():
                mpl.rcdefaults()
                yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] == "matplotlib" and "matplotlib" not in sys.modules
        why = (
            "matplotlib is not installed (pip install 'gpuem[plot]', or matplotlib itself)"
            if missing
            else f"matplotlib can't be used ({in_a_line(error)})"
        )
        log.warning("no %s: %s", what, why)
    except Exception as error:
        log.warning("no %s: %s; nothing else is lost by that", what, in_a_line(error))
        log.debug("%s", what, exc_info=True)


def import_matplotlib() -> None:
    """Import matplotlib whatever ``MPLBACKEND`` says: figures are drawn into files, and need no backend of a screen.

    Jupyter sets one for all that it starts, and matplotlib can't be imported where that is not installed.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib as mpl
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        # for figures of others in this process
        with contextlib.suppress(ValueError):
            mpl.rcParams["backend"] = backend
