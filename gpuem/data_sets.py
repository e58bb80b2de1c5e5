"""Which data sets a recipe names: what patterns find, which files belong together, and a name for each."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

from gpuem import patterns
from gpuem.errors import GpuemError, RecipeError
from gpuem.formats import FORMATS, read_header, remote, stores
from gpuem.formats.remote import Place, Url
from gpuem.messages import shown

log = logging.getLogger("gpuem")
# what follows a name in a numbered series, and what stands between the two
_NUMBER = re.compile(r"[0-9]+$")
_SEPARATORS = "_-. "
# DECTRIS: a master file, and the files that it links
_MASTER, _LINKED = "_master", "_data_"


def _one_or_several(value: Any, info: ValidationInfo) -> Place | list[Place]:
    """What `path` of ``[input]`` says; nothing where ``each`` says it."""
    if value is None or value == []:
        if info.data.get("each", True):
            return []
        raise PydanticCustomError("missing", "is missing")
    return [_place_of(item) for item in value] if isinstance(value, list) else _place_of(value)


def _several(value: Any) -> list[Place] | None:
    """What `each` of ``[input]`` says."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f'needed is a list of files and patterns, each = ["a.mib", "b*.mib"] (found {shown(value)})')
    return [_place_of(item) for item in value]


def _place_of(value: Any) -> Place:
    """A path or a URL, as a recipe says it."""
    if isinstance(value, Url):
        return value
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"needed is a path or a URL, as text in quotes (found {shown(value)})")
    found = remote.url_of(str(value))
    if isinstance(value, str) and "://" in value and found is None:
        raise ValueError(f"{value!r}: not a URL that gpuem reads; it may begin with {', '.join(stores.EXAMPLES)}")
    # what ~ stands for depends on the folder of the recipe
    return Path(value) if found is None else found


# what a recipe may say in [input]: each, and path, which must be given where each is not
Each = Annotated[
    list[Place] | None,
    PlainValidator(_several),
    WithJsonSchema({"type": "array", "items": {"type": "string"}, "minItems": 1}),
]
Whole = Annotated[
    Place | list[Place],
    PlainValidator(_one_or_several),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


def expand(places: Iterable[Place], format: str | None = None, *, follow_links: bool = False) -> list[Place]:  # noqa: A002
    """The data sets that files, URLs and patterns name: sorted within a pattern, each once.

    Numbered files of a series, a header and its data, a master file and what it links are one data set.

    Parameters
    ----------
    places : iterable of Path or Url
        Absolute. A name with ``*``, ``?`` or ``[`` is a pattern, unless a file of this very name is there; ``**``
        stands for folders at any depth.
    format : str
        Of the files, where it is said; else patterns find only files whose names say that they can be read.
    follow_links : bool
        Whether a file may name another one outside its folder as a part of its data set.

    Raises
    ------
    RecipeError
        A pattern finds nothing.
    """
    found: dict[str, Place] = {}
    for place in places:
        if isinstance(place, Url) and "*" in place.text:
            raise RecipeError(f"[input] {place}: patterns are for files on this machine; list the URLs: each = [...]")
        folder, pattern = split(place) if isinstance(place, Path) else (place, "")
        several = _matches(folder, pattern, format) if isinstance(folder, Path) and pattern else [place]
        for one in several:
            found.setdefault(_key(one), one)
    return _without_parts(list(found.values()), format, follow_links)


def split(path: Path) -> tuple[Path, str]:
    """The folder that a pattern begins in, and the pattern; the path itself and "" where it is none."""
    sure = Path(path.anchor)
    parts = path.relative_to(sure).parts
    for k, part in enumerate(parts):
        # people do put brackets into the names of folders
        if patterns.MAGIC.search(part) and not os.path.lexists(sure / part):
            return sure, str(Path(*parts[k:]))
        sure = sure / part
    return path, ""


def named(places: Sequence[Place]) -> dict[str, Place]:
    """A name for each data set: that of its file without the suffix, with folders before it where names are the same.

    Raises
    ------
    RecipeError
        Two can't be told apart.
    """
    depths = [0] * len(places)
    while True:
        names = [_name(place, depth) for place, depth in zip(places, depths, strict=True)]
        # case is no difference everywhere
        counts = Counter(name.casefold() for name in names)
        clashes = [k for k, name in enumerate(names) if counts[name.casefold()] > 1]
        if not clashes:
            return dict(zip(names, places, strict=True))
        deeper = [k for k in clashes if depths[k] < len(_folders(places[k]))]
        if not deeper:
            first = clashes[0]
            second = next(k for k in clashes[1:] if names[k].casefold() == names[first].casefold())
            raise RecipeError(
                f'{places[first]} and {places[second]} would both be named "{_name(places[first], 0)}": rename one, or '
                "run them by two recipes"
            )
        for k in deeper:
            depths[k] += 1


def _name(place: Place, depth: int) -> str:
    if not place.stem:
        raise RecipeError(f"{place}: has no name that its result could get")
    return "_".join((*_folders(place)[len(_folders(place)) - depth :], place.stem))


def _folders(place: Place) -> tuple[str, ...]:
    if isinstance(place, Url):
        root, key, _ = stores.parts(place.text)
        return (root.partition("://")[2], *key.split("/")[:-1])
    return place.absolute().parent.parts[1:]


def _key(place: Place) -> str:
    """The same for all spellings of a place."""
    return place.text if isinstance(place, Url) else os.path.normpath(place.absolute())


def _matches(folder: Path, pattern: str, format: str | None) -> list[Place]:  # noqa: A002
    """Files that a pattern finds, sorted; hidden ones are not found, and folders are no data."""
    found = [folder / name for name in patterns.find(folder, pattern)]
    files = [path for path in found if not path.is_dir()]
    if not files:
        raise RecipeError(f"[input] {folder / pattern}: {_near_misses(folder, Path(pattern).parts)}")
    known = {suffix for suffixes in FORMATS.values() for suffix in suffixes}
    readable = [path for path in files if format or path.suffix.lower() in known]
    left = [path.name for path in files if path not in set(readable)]
    if not readable:
        raise RecipeError(
            f"[input] {folder / pattern}: finds {_some(left)}, by {'their names' if left[1:] else 'its name'} no "
            f'detector data; gpuem reads {", ".join(sorted(known))}. If it is one of those, say format = "..."'
        )
    if left:
        log.info("%s: left out, by their names no detector data: %s", folder / pattern, _some(left))
    return list(readable)


def _near_misses(folder: Path, parts: tuple[str, ...]) -> str:
    """Why a pattern finds nothing: the folder in which it fails, and what is there."""
    if not folder.is_dir():
        missing = folder
        while not missing.parent.is_dir():
            missing = missing.parent
        there = [path.name for path in missing.parent.iterdir() if path.is_dir()]
        near = get_close_matches(missing.name, there, 3, 0.5)
        return f"{missing}: no such folder{_or(near)}"
    part = parts[0]
    for k, part in enumerate(parts):
        if part == "**":
            break
        fitting = patterns.find(folder, part)
        inside = [name for name in fitting if (folder / name).is_dir()]
        if not inside or k == len(parts) - 1:
            break
        folder = folder / inside[0]
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"{folder}: no permission to read this folder"
    names = sorted(path.name for path in folder.iterdir())
    if fnmatch.filter(names, part) and part != "**":
        return f"in {folder} only folders fit, and data are files"
    words = f"nothing fits in {folder}"
    near = [name for name in names if fnmatch.fnmatchcase(name.lower(), part.lower())]
    near = near or get_close_matches(part, names, 3, 0.5)
    if near:
        return f"{words}{_or(near[:3])}"
    return f"{words}; {'it is empty' if not names else f'there is {_some(names)}'}"


def _or(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _without_parts(places: list[Place], format: str | None, follow_links: bool) -> list[Place]:  # noqa: A002
    """Data sets among files, in their order: what belongs to another one is left out."""
    paths = {_key(place): place for place in places if isinstance(place, Path)}
    series = Counter(_series(path) for path in paths.values())
    chosen, taken = {_key(place) for place in places if isinstance(place, Url)}, dict[str, str]()
    for key, path in sorted(paths.items(), key=lambda item: _turn(item[1], format)):
        if key in taken:
            continue
        # who stands alone needs no look into its header
        alone = series[_series(path)] == 1
        parts = [] if alone else [part for part in _parts(path, paths.values(), format, follow_links) if part in paths]
        if any(part in taken for part in parts):
            # a header whose data had their turn
            taken[key] = next(taken[part] for part in parts if part in taken)
            continue
        first = parts[0] if parts and _kind(path, format) == "mib" and path.suffix.lower() != ".hdr" else key
        chosen.add(first)
        taken.update(dict.fromkeys((key, *parts), first))
    dropped = [f"{Path(key).name} of {Path(first).name}" for key, first in sorted(taken.items()) if key != first]
    if dropped:
        log.info("parts of other data sets: %s", _some(dropped))
    return [place for place in places if _key(place) in chosen]


def _series(path: Path) -> tuple[str, str]:
    """The same for files that may belong together."""
    stem = path.stem
    if path.suffix.lower() in (".xml", ".raw"):
        # a header that names its data in any way
        return str(path.parent), "*.raw"
    if path.suffix.lower() in FORMATS["hdf5"]:
        return str(path.parent), re.sub(rf"({_MASTER}|{_LINKED}[0-9]+)$", "", stem)
    return str(path.parent), _NUMBER.sub("", stem).rstrip(_SEPARATORS)


def _kind(path: Path, format: str | None) -> str:  # noqa: A002
    suffix = path.suffix.lower()
    return format or next((name for name, suffixes in FORMATS.items() if suffix in suffixes), "")


def _turn(path: Path, format: str | None) -> int:  # noqa: A002
    """Who is asked first for its parts: headers that say more than the data before them, others after them."""
    suffix = path.suffix.lower()
    if suffix == ".xml" or path.stem.endswith(_MASTER):
        return 0
    return 2 if suffix == ".hdr" else 1


def _parts(path: Path, others: Iterable[Path], format: str | None, follow_links: bool) -> list[str]:  # noqa: A002
    """The files of a data set, in its order, as far as its header says so at once."""
    kind = _kind(path, format)
    if kind == "hdf5" and path.stem.endswith(_MASTER):
        linked = path.stem.removesuffix(_MASTER) + _LINKED
        return [_key(p) for p in others if p.parent == path.parent and p.name.startswith(linked)]
    if kind != "mib" and path.suffix.lower() != ".xml":
        return []
    # an .xml may not say the scan; any will do to learn which file it names
    scan = (1, 1) if path.suffix.lower() == ".xml" else None
    try:
        return [
            _key(file.path) for file in read_header((path,), format, scan, follow_links=follow_links, fit=True).files
        ]
    except (GpuemError, OSError):
        # it will be told when its turn comes to run
        return []
