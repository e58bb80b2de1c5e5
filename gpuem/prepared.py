"""The analyses of a run after their look at a sample, on disk, so that a resumed run has the very same.

    prepared.json   what each analysis is made of, its arrays by their names, and checksums
    prepared.npz    the arrays

Both hold data, never code: only analyses and what they consist of (frozen dataclasses, models) are made of them, of the
classes of `gpuem.analyses` and `gpuem.backends` or of the class of the analysis itself. An analysis that consists of
anything else looks again when the run is resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from gpuem import atomic, ownership
from gpuem.analyses import Analysis, Looking, View
from gpuem.errors import InputError, RecipeError
from gpuem.regular_files import read_regular

Asked = Analysis | Looking
NAMES = ("prepared.json", "prepared.npz")
_FORMAT = 1
_MODULES = re.compile(r"gpuem\.(axes|analyses|backends)(\.[a-z][a-z0-9_]*)?")
log = logging.getLogger("gpuem")


class _UnknownTypeError(Exception):
    """A value that can't be stored."""


# what reading a file that was made up may end in
_WRONG = (
    *(_UnknownTypeError, LookupError, ValueError, TypeError, AttributeError, ImportError, RecursionError),
    *(zipfile.BadZipFile, EOFError, MemoryError),
)


def save(folder: Path, asked: Sequence[Asked], looked: Sequence[Analysis], view: View) -> None:
    """Keep the analyses as they are after their look; say which of them can't be kept.

    Parameters
    ----------
    folder : path
        The run folder.
    asked, looked : sequence of analyses
        Before and after their look.
    view : View
        Axes and pixel type.

    Raises
    ------
    OutputError
        They can't be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    entries = [_entry(one, other, arrays, view) for one, other in zip(asked, looked, strict=True)]
    made = io.BytesIO()
    np.savez(made, allow_pickle=False, **arrays)
    ownership.claim(folder, *NAMES)
    atomic.write_file(folder / NAMES[1], made.getvalue())
    content = {
        "format": _FORMAT,
        "arrays": hashlib.sha256(made.getvalue()).hexdigest(),
        "checksum": _checksum(entries),
        "analyses": entries,
    }
    atomic.write_file(folder / NAMES[0], json.dumps(content, indent=1, allow_nan=False).encode())


def load(
    folder: Path, asked: Sequence[Asked], view: View, look_again: Callable[[list[Asked]], list[Analysis]]
) -> list[Analysis]:
    """The analyses as they were after their look.

    Parameters
    ----------
    folder : path
        The run folder.
    asked : sequence of analyses
        The same as before their look.
    view : View
        Axes and pixel type.
    look_again : callable
        Lets analyses look that could not be kept.

    Raises
    ------
    InputError
        They are not there, or damaged.
    RecipeError
        One that looked again found something else.
    """
    entries, arrays = _read(folder)
    if [entry["name"] for entry in entries] != [one.name for one in asked]:
        raise _damaged(folder / NAMES[0])
    again = [one for one, entry in zip(asked, entries, strict=True) if entry["state"] == "look again"]
    for one in again:
        log.info("%s: looks at the sample again", one.name)
    anew = iter(look_again(again) if again else [])
    out: list[Analysis] = []
    for one, entry in zip(asked, entries, strict=True):
        if entry["state"] == "as given":
            found = _analysis(folder, one)
        elif entry["state"] == "look again":
            found = next(anew)
            if _digest(found.weights(view)) != entry["weights"]:
                raise RecipeError(
                    f"{folder}: {one.name} looked at the sample again and found something else than the first time, "
                    "so this run can't go on; begin anew with --overwrite"
                )
        else:
            found = _checked(folder, entry, arrays, one)
        out.append(found)
    return out


def _entry(asked: Asked, looked: Analysis, arrays: dict[str, NDArray[Any]], view: View) -> dict[str, Any]:
    """What is kept of an analysis."""
    if looked is asked:
        return {"name": asked.name, "state": "as given"}
    own = {_name(type(asked)): type(asked)}
    try:
        value = _encode(looked, arrays, own)
        if _digest(_decode(value, arrays, own), own) == _digest(looked, own):
            return {"name": asked.name, "state": "kept", "value": value}
        reason = "it doesn't come back as it was"
    except (_UnknownTypeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    log.warning(
        "%s: what it found in the sample can't be kept (%s): a resumed run lets it look again", asked.name, reason
    )
    return {"name": asked.name, "state": "look again", "weights": _digest(looked.weights(view))}


def _read(folder: Path) -> tuple[list[dict[str, Any]], dict[str, NDArray[Any]]]:
    """What both files hold; raises InputError where that is not what was written."""
    about, body = folder / NAMES[0], folder / NAMES[1]
    try:
        found, content = json.loads(read_regular(about)), read_regular(body)
        entries = found["analyses"]
        if found["format"] != _FORMAT or found["checksum"] != _checksum(entries):
            raise ValueError("format or checksum")
        if hashlib.sha256(content).hexdigest() != found["arrays"]:
            raise ValueError("arrays")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return [_known(entry) for entry in entries], {name: file[name] for name in file.files}
    except OSError as error:
        raise InputError(f"{error.filename or about}: {error.strerror}; begin anew with --overwrite") from error
    except _WRONG as error:
        raise _damaged(about) from error


def _known(entry: Any) -> dict[str, Any]:
    """An entry whose keys are there."""
    needed = {"as given": set(), "look again": {"weights"}, "kept": {"value"}}[entry["state"]]
    if set(entry) != {"name", "state"} | needed:
        raise ValueError("keys")
    return dict(entry)


def _checked(folder: Path, entry: dict[str, Any], arrays: dict[str, NDArray[Any]], asked: Asked) -> Analysis:
    try:
        found = _decode(entry["value"], arrays, {_name(type(asked)): type(asked)})
    except _WRONG as error:
        raise _damaged(folder / NAMES[0]) from error
    if getattr(found, "name", None) != asked.name:
        raise _damaged(folder / NAMES[0])
    return _analysis(folder, found)


def _analysis(folder: Path, found: Any) -> Analysis:
    """The same, where it is an analysis that knows all it needs."""
    if not (hasattr(found, "weights") and hasattr(found, "finish")):
        raise _damaged(folder / NAMES[0])
    analysis: Analysis = found
    return analysis


def _damaged(file: Path) -> InputError:
    return InputError(f"{file}: damaged; begin anew with --overwrite")


def _checksum(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _digest(value: Any, own: Mapping[str, type] | None = None) -> str | None:
    """A checksum of a value and its arrays; None where it consists of something unknown."""
    arrays: dict[str, NDArray[Any]] = {}
    try:
        made = hashlib.sha256(json.dumps(_encode(value, arrays, own or {})).encode())
    except _UnknownTypeError:
        return None
    for array in arrays.values():
        made.update(f"{array.dtype.str}{array.shape}".encode())
        made.update(array.tobytes())
    return made.hexdigest()


# ---- values


def _encode(value: Any, arrays: dict[str, NDArray[Any]], own: Mapping[str, type]) -> Any:
    """A value as JSON has it; its arrays are added to `arrays`."""

    def inner(part: Any) -> Any:
        return _encode(part, arrays, own)

    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if np.isfinite(value) else {"float": str(value)}
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        arrays[f"a{len(arrays)}"] = np.asarray(value)
        return {"array" if isinstance(value, np.ndarray) else "scalar": f"a{len(arrays) - 1}"}
    if isinstance(value, Path):
        return {"path": str(value)}
    if type(value) is list:
        return [inner(part) for part in value]
    if type(value) is tuple:
        return {"tuple": [inner(part) for part in value]}
    if isinstance(value, Mapping):
        return {"dict": [[inner(key), inner(part)] for key, part in value.items()]}
    _class_of(_name(type(value)), own)
    if isinstance(value, BaseModel):
        fields = {name: inner(getattr(value, name)) for name in sorted(value.model_fields_set)}
        private = {name: inner(part) for name, part in (value.__pydantic_private__ or {}).items()}
        return {"model": _name(type(value)), "fields": fields, "private": private}
    fields = {field.name: inner(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    return {"dataclass": _name(type(value)), "fields": fields}


def _decode(value: Any, arrays: Mapping[str, NDArray[Any]], own: Mapping[str, type]) -> Any:
    """What `_encode` was given; raises ValueError, KeyError or TypeError where it never gave that."""

    def inner(part: Any) -> Any:
        return _decode(part, arrays, own)

    if isinstance(value, list):
        return [inner(part) for part in value]
    if not isinstance(value, dict):
        return value
    content: Any
    kind, content = next(iter(value.items()), ("", None))
    if kind in ("model", "dataclass"):
        found, fields = _class_of(content, own), {name: inner(part) for name, part in value["fields"].items()}
        made = found(**fields)
        for name, part in value.get("private", {}).items():
            if name not in found.__private_attributes__:  # type: ignore[attr-defined]
                raise ValueError(name)
            object.__getattribute__(made, "__pydantic_private__")[name] = inner(part)
        return made
    if kind in ("array", "scalar"):
        return arrays[content] if kind == "array" else arrays[content][()]
    if kind == "dict":
        return {inner(key): inner(part) for key, part in content}
    plain: dict[str, Callable[[Any], Any]] = {"tuple": lambda parts: tuple(map(inner, parts)), "path": Path}
    return {**plain, "float": float}[kind](content)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _class_of(name: str, own: Mapping[str, type]) -> type:
    """The class of a value, where it is one that analyses consist of; else raises an error."""
    module, _, qualname = name.partition(":")
    found = own.get(name)
    if found is None and _MODULES.fullmatch(module):
        found = vars(importlib.import_module(module)).get(qualname)
    if not isinstance(found, type) or _name(found) != name or not _is_plain(found):
        raise _UnknownTypeError(f"type {name}")
    return found


def _is_plain(kind: type) -> bool:
    """Whether its values consist of their fields."""
    frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    return frozen or issubclass(kind, BaseModel)
