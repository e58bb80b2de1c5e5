"""Paths as people write them: ``~`` at the start, and characters that the encoding of file names lacks."""

from __future__ import annotations

import os
from pathlib import Path

from gpuem.errors import RecipeError
from gpuem.messages import shown


def local_path(path: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """A path of this machine as somebody gave it.

    ``~`` at its start is the home folder, unless a file of this very name is there: ``~backup.npy`` is a file name.

    Parameters
    ----------
    path : path
        As it was given.
    folder : Path
        Where relative paths begin; default the current folder, and the path stays relative.

    Raises
    ------
    RecipeError
        No file can have this name, or it names the home folder of a user who doesn't exist.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise RecipeError(f"path {shown(path)}: needed is a path, as text or pathlib.Path")
    text = os.fspath(path)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if "\0" in text:
        raise RecipeError(f"path {text[:200]!r}: holds a NUL character, which no file name can")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = _as_bytes(text)
    here = Path(text) if folder is None else folder / text
    if not text.startswith("~") or os.path.lexists(here):
        return here
    try:
        return Path(text).expanduser()
    except RuntimeError:
        head, slash, _ = text.partition("/")
        if not slash and head != "~":
            return here
        why = f"there is no user {head[1:]!r}" if head != "~" else "this account has no home folder"
        raise RecipeError(
            f"path {text!r}: {why}; write the whole path, or ./{text} for a name that begins with ~"
        ) from None


def _as_bytes(text: str) -> str:
    """A name that the encoding of file names here (LANG=C) lacks characters for: as its bytes in UTF-8."""
    try:
        return os.fsdecode(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise RecipeError(f"path {ascii(text)[:200]}: holds characters that no file name can") from None
