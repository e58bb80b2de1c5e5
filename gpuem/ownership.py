"""Which files are gpuem's own. Only those are removed or replaced; anything else is left alone, or refused beforehand.

A folder that gpuem writes into (the folder of a run, the pictures) holds a record, ``.gpuem-files.json``, with a
format, a random id and the names of all files that gpuem wrote there. A name enters the record before its file is
created (`claim`), and only where no such file is there yet. Ranks of one run each have a record of their own: what they
write ends with their number, as ``events-3.jsonl`` or ``store-3/``, and so does their record.

Symlinks are never followed inside such a folder, and the folder itself must not be one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import json
import os
import re
import stat
import struct
import uuid
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from gpuem import atomic
from gpuem.errors import OutputError

FORMAT, VERSION = "gpuem files", 1
# the text field of a PNG file
PICTURE = "gpuem picture"
_RECORD = re.compile(r"\.gpuem-files(-[0-9]+)?\.json")
_NUMBER = re.compile(r"-[0-9]+(?=\.|$)")
# what processes of a run create and remove again, maybe at this moment
_TRANSIENT = re.compile(r"(lock|alive|rank)(-[0-9]+)?")
_ID = re.compile(r"[0-9a-f]{32}")
# a record of more than this was written by somebody else
_MOST_NBYTES = 1 << 20


def claim(folder: Path, *names: str) -> None:
    """Record files that are about to be written into a folder, which is created where it is missing.

    Parameters
    ----------
    folder : Path
        The folder.
    *names : str
        Files in it, with ``/`` between folders; a name that ends with ``/`` is a folder, which is created.

    Raises
    ------
    OutputError
        A file of this name is there and gpuem did not write it, there is a symlink on the way, or the record can't be
        written.
    """
    for name in names:
        if not is_name(name.removesuffix("/")):
            raise OutputError(f"{folder}: {name!r} can't be the name of a file in it; rename what is written there")
    refuse_foreign(folder, *names)
    made = _make_folder(folder)
    try:
        for path, more in _by_record(folder, names or ("./",)).items():
            _record(folder, path, more, made=made)
    except OutputError:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _record(folder: Path, path: Path, more: Iterable[str], *, made: bool) -> None:
    known = read_record(path)
    if known is None and os.path.lexists(path):
        raise OutputError(f"{path}: not a record of gpuem, though named like one; move it away")
    folders = {f"{parent}/" for name in more for parent in _parents(name) if not is_folder(folder / parent)}
    files = {name for name in more if not name.endswith("/")}
    wanted = (known or set()) | folders | files | ({"./"} if made else set())
    if wanted != known:
        _write(path, wanted)
    _make_folders(folder, folders)


def _make_folder(folder: Path) -> bool:
    """Create a folder and those above it; whether it was missing."""
    _refuse_symlink(folder, folder)
    if is_folder(folder):
        return False
    try:
        atomic.make_folder(folder)
    except FileExistsError:
        raise OutputError(f"{folder}: a file; a folder of this name is needed; move it away") from None
    except OSError as error:
        raise OutputError(f"{folder}: not created: {atomic.format_error(error)}") from error
    return True


def _make_folders(folder: Path, names: Iterable[str]) -> None:
    try:
        for name in sorted(names):
            (folder / name).mkdir(exist_ok=True)
            atomic.sync_folder((folder / name).parent)
    except OSError as error:
        raise OutputError(f"{folder}: not created: {atomic.format_error(error)}") from error


def refuse_foreign(folder: Path, *names: str) -> None:
    """Raise OutputError where a file of one of these names (or patterns) lies in a folder and gpuem didn't write it."""
    _refuse_symlink(folder, folder)
    recorded: set[str] | None = None
    for name in _expand(folder, names):
        for part in (*_parents(name), name.rstrip("/")):
            path = folder / part
            _refuse_symlink(path, folder)
            if part != name.rstrip("/") or name.endswith("/"):
                if os.path.lexists(path) and not is_folder(path):
                    raise OutputError(f"{path}: not a folder; gpuem writes one of this name: move it away")
            elif os.path.lexists(path):
                recorded = written(folder) if recorded is None else recorded
                if name not in recorded or not is_plain_file(folder, name):
                    raise OutputError(
                        f"{path}: exists, and no record in {folder} says that gpuem wrote it, so it is neither "
                        "replaced nor removed; move it away, or choose another [output] path"
                    )


def _refuse_symlink(path: Path, folder: Path) -> None:
    if stat.S_ISLNK(_mode(path)):
        what = "the folder" if path == folder else "a file or folder"
        raise OutputError(
            f"{path}: a symbolic link where gpuem writes {what} of its own; links are not followed there: move it "
            "away, or choose another [output] path"
        )


def written(folder: Path) -> set[str]:
    """Names of all that gpuem wrote into a folder, by its records there; folders end with ``/``, ``./`` is itself."""
    return set().union(*(read_record(path) or () for path in _records(folder)))


def remove(folder: Path, *patterns: str) -> None:
    """Remove files that gpuem wrote into a folder, then folders that it made and that are empty.

    Parameters
    ----------
    folder : Path
        The folder; where it is a symlink nothing is removed.
    *patterns : str
        Names or patterns of names; ``*`` doesn't stand for ``/``.

    Raises
    ------
    OSError
        A file can't be removed.
    """
    if not is_folder(folder):
        return
    recorded = written(folder)
    removed = False
    for name in sorted(recorded):
        if not name.endswith("/") and _fits(name, patterns) and is_plain_file(folder, name):
            (folder / name).unlink(missing_ok=True)
            removed = True
    for name in sorted((name for name in recorded if name.endswith("/") and name != "./"), reverse=True):
        if all(is_folder(folder / part) for part in _parents(name)):
            with contextlib.suppress(OSError):
                (folder / name).rmdir()
    _forget_missing(folder, patterns)
    if removed:
        with contextlib.suppress(OSError):
            atomic.sync_folder(folder)
    if "./" in recorded:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _forget_missing(folder: Path, patterns: Iterable[str]) -> None:
    """Take names that fit patterns off the records where the files are gone; without patterns all such names.

    Other names stay: another process may have recorded one and be about to create its file. Records that name nothing
    any more are removed.
    """
    patterns = tuple(patterns)
    for path in _records(folder):
        known = read_record(path)
        if known is None:
            continue
        missing = {name for name in known if name != "./" and not os.path.lexists(folder / name.rstrip("/"))}
        if known - missing <= {"./"} and not patterns:
            path.unlink(missing_ok=True)
            continue
        gone = {
            name
            for name in missing
            if not patterns or name.endswith("/") or (_fits(name, patterns) and not _TRANSIENT.fullmatch(name))
        }
        if known - gone <= {"./"}:
            path.unlink(missing_ok=True)
        elif gone:
            # what can't be written stays as it was: it names more than is there
            with contextlib.suppress(OutputError):
                _write(path, known - gone)


def remove_others(folder: Path, names: Iterable[str]) -> None:
    """Remove all files that gpuem wrote into a folder but these; what can't be removed stays."""
    kept = set(names)
    with contextlib.suppress(OSError):
        remove(folder, *(glob.escape(name) for name in written(folder) - kept))


def is_plain_file(folder: Path, name: str) -> bool:
    """Whether a file is there, regular, with no symlink between the folder and it."""
    return stat.S_ISREG(_mode(folder / name)) and all(is_folder(folder / part) for part in _parents(name))


def is_folder(path: Path) -> bool:
    """Whether a folder is there, and no symlink to one."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """Kind of what is there, itself where it is a symlink; 0 where nothing is, or can be."""
    try:
        return os.lstat(path).st_mode
    except (OSError, ValueError):
        return 0


def read_record(path: Path) -> set[str] | None:
    """The names that a record lists; None where the file isn't exactly such a record."""
    found = read_json(path)
    if found is None or found.keys() != {"format", "version", "id", "files"}:
        return None
    names = found["files"]
    if not has_format(found, FORMAT, VERSION) or not isinstance(names, list):
        return None
    return set(names) if all(name == "./" or is_name(name) for name in names) else None


def read_json(path: Path, most_nbytes: int = _MOST_NBYTES) -> dict[str, Any] | None:
    """The object that a regular JSON file holds; None where there is none, or it is too large."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most_nbytes:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def has_format(found: dict[str, Any], kind: str, version: int) -> bool:
    """Whether a record is exactly of this kind and version, with a random id."""
    identity = found.get("id")
    return (
        found.get("format") == kind
        and type(found.get("version")) is int
        and found["version"] == version
        and isinstance(identity, str)
        and _ID.fullmatch(identity) is not None
    )


def is_name(name: Any) -> bool:
    """Whether a record may name this: a path inside its folder, in the one spelling that it has."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name.rstrip("/") == str(path) != "."


def picture_mark() -> str:
    """What a picture says in its text field `PICTURE`, so that gpuem knows it for its own."""
    return f"1 {new_id()}"


def refuse_picture(path: Path) -> None:
    """Raise OutputError where a picture can't be drawn: no name of a PNG file, or something that gpuem didn't draw."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path}: pictures are PNG files; give it a name that ends with .png")
    if os.path.lexists(path) and not _is_own_picture(path):
        raise OutputError(f"{path}: exists and gpuem did not draw it, so it is not replaced; choose another name")


def _is_own_picture(path: Path) -> bool:
    """Whether a file is a PNG with gpuem's mark in its text fields, which come before the pixels."""
    if not stat.S_ISREG(_mode(path)):
        return False
    try:
        with path.open("rb") as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                return False
            while True:
                nbytes, kind = struct.unpack(">I4s", file.read(8))
                if kind in (b"IDAT", b"IEND") or nbytes > _MOST_NBYTES:
                    return False
                key, _, text = file.read(nbytes + 4)[:-4].partition(b"\0")
                if kind == b"tEXt" and key == PICTURE.encode():
                    return re.fullmatch(rb"1 [0-9a-f]{32}", text) is not None
    except (OSError, struct.error):
        return False


def new_id() -> str:
    """A random id."""
    return uuid.uuid4().hex


def _write(path: Path, names: set[str]) -> None:
    content = {"format": FORMAT, "version": VERSION, "id": new_id(), "files": sorted(names)}
    atomic.write_file(path, json.dumps(content, indent=1).encode())


def _records(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _RECORD.fullmatch(path.name))
    except OSError:
        return []


def _by_record(folder: Path, names: Iterable[str]) -> dict[Path, list[str]]:
    """Names by the record they belong to: that of the rank whose number ends the first part of the name."""
    found: dict[Path, list[str]] = {}
    for name in names:
        number = _NUMBER.search(name.split("/")[0])
        found.setdefault(folder / f".gpuem-files{number[0] if number else ''}.json", []).append(name)
    return found


def _parents(name: str) -> list[str]:
    """``a/b/c`` is in ``a`` and ``a/b``; the folder ``a/b/`` stands for itself, too."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: k + 1]) for k in range(len(parts))]


def _expand(folder: Path, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if "*" in name or "[" in name:
            yield from sorted(path.relative_to(folder).as_posix() for path in folder.glob(name))
        else:
            yield name


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(pattern.count("/") == name.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
