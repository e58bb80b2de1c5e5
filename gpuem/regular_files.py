"""Files that anybody may have changed: opened only where they are regular files, never through a symlink."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file; returns its descriptor.

    Parameters
    ----------
    path : path
        The file.
    flags : int
        As of `os.open`.

    Raises
    ------
    OSError
        There is none, it can't be opened, or it is a symlink, a folder, a pipe or a device.
    """
    # a pipe would block without O_NONBLOCK, which means nothing for regular files
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def read_regular(path: Path, start: int = 0) -> bytes:
    """The content of a regular file from a byte on; raises OSError as `open_regular` does."""
    with os.fdopen(open_regular(path), "rb") as file:
        file.seek(start)
        return file.read()
