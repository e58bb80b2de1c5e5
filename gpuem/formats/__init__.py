"""One module per format: it reads a header and returns a `Source`. This table says which."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from gpuem.errors import InputError, RecipeError
from gpuem.formats.remote import Place, Url
from gpuem.formats.source import Source

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
    for path in paths:
        check_readable(path)
    name = format or find_format(paths[0])
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, 1)
        raise RecipeError(f"format {name!r} is unknown; {f'did you mean {near[0]!r}? ' if near else ''}"
                          f"known: {', '.join(FORMATS)}")  # fmt: skip
    if len(paths) > 1 and name not in SEVERAL:
        raise RecipeError(f"{paths[0]} and {len(paths) - 1} more: {name} files are read one at a time")
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
    source: Source = read(paths, **options)
    return source


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
        near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 1) if path.parent.is_dir() else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{path}: no such file{hint}")
    if path.is_dir():
        raise InputError(f"{path}: a folder, not a file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: empty file (0 bytes)")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
