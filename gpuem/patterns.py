"""Files that a pattern finds: as `glob` does, but within limits, and not without a word on the way."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from gpuem.errors import RecipeError

log = logging.getLogger("gpuem")
MAGIC = re.compile(r"[*?[]")
# names of files and folders that a pattern may have to look at; a campaign of 10,000 series of 100 files fits
MOST_NAMES = 2_000_000
# how often it is told how far it is, in seconds
TELL = 5.0


class _Search:
    """What was looked at so far."""

    def __init__(self, folder: Path, pattern: str, most: int) -> None:
        self.what, self.most = folder / pattern, most
        self.names = self.folders = 0
        self.told = time.monotonic()

    def listed(self, folder: str) -> list[os.DirEntry[str]]:
        """What lies in a folder, sorted; nothing where it can't be read.

        Raises
        ------
        RecipeError
            There is too much to look at.
        """
        found: list[os.DirEntry[str]] = []
        self.folders += 1
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self.names += 1
                    if self.names > self.most:
                        raise RecipeError(
                            f"[input] {self.what}: looked at {self.most:,} names in {self.folders:,} folders, in "
                            f"{folder} at last, and there are more: begin the pattern in a folder further down"
                        )
                    found.append(entry)
        except OSError:
            return []
        if time.monotonic() - self.told > TELL:
            self.told = time.monotonic()
            log.info("%s: %d names in %d folders looked at, now in %s", self.what, self.names, self.folders, folder)
        return sorted(found, key=lambda entry: entry.name)


def find(folder: Path, pattern: str, most: int | None = None) -> list[str]:
    """Paths below a folder that fit a pattern, relative to it and sorted.

    ``**`` stands for folders at any depth. Hidden names are found only where the pattern names the dot. Folders that
    are reached a second time, by symbolic links, are passed over.

    Parameters
    ----------
    folder : Path
        Where the pattern begins.
    pattern : str
        Parts with ``*``, ``?``, ``[...]``, and ``**``.
    most : int
        Names that may be looked at; default `MOST_NAMES`.

    Raises
    ------
    RecipeError
        The tree is larger than that; with the numbers.
    """
    search = _Search(folder, pattern, MOST_NAMES if most is None else most)
    return sorted(set(_found(search, folder, "", Path(pattern).parts)))


def _found(search: _Search, root: Path, inside: str, parts: tuple[str, ...]) -> Iterator[str]:
    if not parts:
        yield inside
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in _below(search, root, inside):
            yield from _found(search, root, below, rest) if rest else _entries(search, root, below, "*")
    elif not MAGIC.search(part):
        path = str(Path(inside, part))
        if os.path.lexists(root / path):
            yield from _found(search, root, path, rest)
    else:
        for path in _entries(search, root, inside, part):
            if not rest or (root / path).is_dir():
                yield from _found(search, root, path, rest)


def _entries(search: _Search, root: Path, inside: str, part: str) -> Iterator[str]:
    fits = re.compile(fnmatch.translate(part)).match
    for entry in search.listed(str(root / inside)):
        if fits(entry.name) and (part.startswith(".") or not entry.name.startswith(".")):
            yield str(Path(inside, entry.name))


def _below(search: _Search, root: Path, inside: str) -> Iterator[str]:
    """A folder and all folders below it, each once; without recursion, for trees may be deep."""
    waiting, seen = [inside], set[tuple[int, int]]()
    while waiting:
        now = waiting.pop()
        try:
            status = (root / now).stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield now
        waiting += [
            str(Path(now, entry.name))
            for entry in reversed(search.listed(str(root / now)))
            if not entry.name.startswith(".") and _is_folder(entry)
        ]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # a link that leads to itself
        return False
