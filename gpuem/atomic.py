"""Atomic and durable writes: after a crash or a power loss a file has its old or its new content, never a part.

`rename` alone orders nothing on most file systems: the new name can survive a power loss without the new bytes. A file
is therefore synced before it is renamed, and its folder afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from gpuem.errors import OutputError


def write_file(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably.

    A symlink at `path` is replaced, not followed.

    Parameters
    ----------
    path : path
        The file; its folder exists.
    content : bytes
        Its new content.

    Raises
    ------
    OutputError
        The file can't be written, with the reason; the old content is untouched.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: not written: {format_error(error)}") from error


def make_folder(path: Path) -> None:
    """Create a folder, and those above it that are missing, durably.

    Raises
    ------
    OSError
        It can't be created, or a file of this name is there.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Make renames, new names and removals in a folder durable; where a file system can't, do nothing."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network and FUSE file systems refuse fsync of a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Sync all regular files and folders below a folder, and the folder itself."""
    for folder, _, files in os.walk(path):
        for name in files:
            fd = os.open(Path(folder, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(folder))


def format_error(error: OSError) -> str:
    """The reason of an OSError in words."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
