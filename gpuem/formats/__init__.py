"""One module per format: it reads a header and returns a `Source`. This table says which."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from gpuem.errors import GpuemError, InputError, RecipeError
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import Source
from gpuem.messages import shown

FORMATS = {
    "mib": (".mib", ".hdr"),
    "npy": (".npy",),
    "hdf5": (".h5", ".hdf5", ".hdf", ".he5", ".hspy", ".nxs", ".emd"),
    "empad": (".xml",),
    "raw": (".raw", ".bin", ".dat"),
}
# formats whose files follow one another
SEVERAL = ("raw", "mib")


def read_header(
    paths: tuple[Place, ...],
    format: str | None = None,  # noqa: A002
    scan: Sequence[int] | None = None,
    *,
    follow_links: bool = False,
    **options: Any,
) -> Source:
    """Describe files by their headers.

    Parameters
    ----------
    paths : tuple of Path or Url
        One file, or several that belong together in this order.
    format : str
        Name of the format; by default found by the file's name.
    scan : sequence of int
        Shape of the scan, for formats whose header may say another.
    follow_links : bool
        Whether files that these name may lie outside their folder, for formats that name any.
    **options
        What the file doesn't say; those of the format's own `read_header`.

    Raises
    ------
    RecipeError
        The format is unknown or has no such option.
    InputError
        A file is missing, empty, alien or truncated.
    """
    name = _name_of_format(paths, format)
    read = import_module(f"gpuem.formats.{name}").read_header
    allowed = inspect.signature(read).parameters
    if scan is not None and "scan" in allowed:
        options["scan"] = tuple(scan)
    if follow_links and "follow_links" in allowed:
        options["follow_links"] = True
    for key in options:
        if key not in allowed:
            raise RecipeError(
                f"{paths[0]}: format {name!r} has no option {key!r} (the file itself says that); "
                f"its options: {', '.join(k for k in allowed if k not in ('paths', 'scan', 'follow_links'))}"
            )
    try:
        source: Source = read(paths, **options)
    except (GpuemError, OSError, MemoryError):
        raise
    except Exception as error:
        told = ", ".join(f"{key} = {shown(value)}" for key, value in options.items() if key != "fit")
        raise InputError(
            f"{paths[0]}: can't be read as {name}{f' with {told}' if told else ''} "
            f"({type(error).__name__}: {error}); damaged, or an option doesn't fit it"
        ) from error
    return source


def _name_of_format(paths: tuple[Place, ...], given: str | None) -> str:
    """The format of files that can be read; raises RecipeError or InputError where it can't be."""
    for path in paths:
        check_readable(path)
    if given is not None and not isinstance(given, str):
        raise RecipeError(f"format {shown(given)}: needed is a name; known: {', '.join(FORMATS)}")
    name = given or find_format(paths[0])
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, 1)
        raise RecipeError(f"format {name!r} is unknown; {f'did you mean {near[0]!r}? ' if near else ''}"
                          f"known: {', '.join(FORMATS)}")  # fmt: skip
    if len(paths) > 1 and name not in SEVERAL:
        raise RecipeError(f"{paths[0]} and {len(paths) - 1} more: {name} files are read one at a time")
    return name


def find_format(path: Place) -> str:
    """Name of the format by the file's name; raises InputError where none fits."""
    suffix = path.suffix.lower()
    for name, suffixes in FORMATS.items():
        if suffix in suffixes:
            if name == "raw" and suffix == ".raw" and import_module("gpuem.formats.empad").claims(path):
                return "empad"
            return name
    known = ", ".join(s for suffixes in FORMATS.values() for s in suffixes)
    raise InputError(
        f"{path}: this kind of file is not supported; supported: {known}. "
        'If it is one of those under another name, say format = "..."'
    )


def _missing(path: Path) -> str:
    """Why a path leads to nothing, and what lies near it."""
    if path.is_symlink():
        target = path.parent / path.readlink()
        try:
            target.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return "a symbolic link that leads to itself"
        return f"a symbolic link to {target}, which isn't there"
    try:
        names = [p.name for p in path.parent.iterdir() if p.name != path.name]
    except OSError:
        return "no such file" if path.parent.is_dir() else f"no such file; there is no folder {path.parent}"
    near = get_close_matches(path.name, names, 1)
    return "no such file" + (f"; did you mean {near[0]}?" if near else "")


def check_readable(path: Place) -> None:
    """Raise InputError unless `path` is a readable file with something in it."""
    if isinstance(path, Url):
        try:
            facts = path.stat()
        except FileNotFoundError:
            raise InputError(f"{path}: no such object, or no such bucket") from None
        if facts.st_size == 0:
            raise InputError(f"{path}: empty file (0 bytes)")
        return
    try:
        there = path.exists()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not there:
        raise InputError(f"{path}: {_missing(path)}")
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: empty file (0 bytes)")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
