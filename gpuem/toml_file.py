"""TOML files that people write: read within limits, so that no text ends in an error of Python's own."""

from __future__ import annotations

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gpuem.errors import RecipeError
from gpuem.paths import local_path

# a recipe that lists a million files
MOST_BYTES = 64 << 20
# tables within tables; a recipe needs 4
DEEPEST = 50
_INT64 = 2**63
_NAMES_DATA = " and names the data in [input]"


def read(path: Path, what: str = "recipe") -> tuple[str, dict[str, Any]]:
    """The text of a TOML file, and what it says.

    Parameters
    ----------
    path : path
        The file.
    what : str
        What it is, for messages.

    Raises
    ------
    RecipeError
        It is missing, can't be read, isn't TOML, is nested deeper than `DEEPEST`, or holds a whole number that TOML
        has no room for.
    """
    path = local_path(path)
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        there = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, there, 1)
        raise RecipeError(f"{path.absolute()}: no such {what}{f'; did you mean {near[0]}?' if near else ''}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder, not a {what}; to look at a result use gpuem info") from None
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise RecipeError(f"{path}: larger than {MOST_BYTES >> 20} MB; that is no {what}")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise RecipeError(
            f"{path}: not a text file; a {what} is TOML{_NAMES_DATA if what == 'recipe' else ''}"
        ) from None
    return text.replace("\r\n", "\n"), parse(text, str(path))


def parse(text: str, where: str) -> dict[str, Any]:
    """What a TOML text says; raises RecipeError as `read`."""
    try:
        found = tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        hint = (
            "; every analysis begins with [[analysis]], in double brackets" if "Cannot overwrite" in str(error) else ""
        )
        raise RecipeError(f"{where}: not TOML: {error}{hint}") from error
    except RecursionError:
        raise RecipeError(f"{where}: brackets within brackets, deeper than {DEEPEST}; no key needs that") from None
    except (ValueError, OverflowError) as error:
        # as of a whole number with thousands of digits
        raise RecipeError(f"{where}: not TOML: {error}") from None
    _refuse_odd(found, where)
    return found


def _refuse_odd(found: dict[str, Any], where: str) -> None:
    """Raise RecipeError where tables are nested too deep, or numbers too large; without recursion."""
    waiting: list[tuple[str, Any, int]] = [("", found, 0)]
    while waiting:
        place, value, depth = waiting.pop()
        if depth > DEEPEST:
            raise RecipeError(
                f"{where}: {place[:60]}...: tables within tables, deeper than {DEEPEST}; no key needs that"
            )
        if isinstance(value, dict):
            waiting += [(f"{place}.{key}".lstrip("."), item, depth + 1) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(place, item, depth + 1) for item in value]
        elif isinstance(value, int) and not -_INT64 <= value < _INT64:
            raise RecipeError(f"{where}: {place}: a whole number of {value.bit_length():,} bits; TOML has 64")
