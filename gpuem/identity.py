"""What two runs must agree in, for one to go on where the other stopped."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpuem
from gpuem.analyses import Analysis, Looking, fields, plain
from gpuem.dataset import Dataset
from gpuem.engine import Job
from gpuem.errors import RecipeError
from gpuem.storage.host import Files

# bytes at both ends of a file that are looked at, beside its size and its time
END_NBYTES = 1 << 16
# of longer values a part is shown
_LONG = 160
_SOURCES = {".py", ".cu", ".cuh", ".h", ".hpp"}
# of so many files the ends are looked at; of more, every n-th
MOST_FILES = 64


def version(name: str = "gpuem") -> str:
    """Of gpuem, or of a library, in this process."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # a checkout on the path, or a library that this run didn't need
        return "not installed"


def of_data(
    ds: Dataset, analyses: Sequence[Analysis | Looking], wanted: NDArray[np.bool_], version: str
) -> dict[str, Any]:
    """What is asked of which data, as plain values: what is different is found by its name.

    Parameters
    ----------
    ds : Dataset
        The frames, corrected where they are to be.
    analyses : sequence of analyses
        As they were asked for, before they looked.
    wanted : (positions,) bool
        The region of interest.
    version : str
        Of gpuem.
    """
    correction = ds.source.correction
    tables = () if correction is None else (correction.dark, correction.gain, correction.dead)
    axes = [[axis.name, axis.size, axis.step, axis.unit, axis.origin] for axis in ds.axes]
    return {
        **of_analyses(analyses, version),
        # nobody can tell whether an array is the same one again
        "files": [{"path": str(file.path), "size": file.size, "mtime_ns": file.mtime_ns} for file in ds.source.files]
        or [f"an array in memory ({uuid.uuid4().hex})"],
        "ends of the files": _ends(ds),
        "data": {
            "format": ds.source.format,
            "shape": list(ds.shape),
            "dtype": ds.source.raw_dtype.str,
            "skip": ds.skip,
        },
        "axes": axes,
        "region of interest": digest(np.packbits(wanted)),
        "correction": {
            name: None if table is None else digest(table)
            for name, table in zip(("dark", "gain", "dead"), tables, strict=False)
        },
    }


def of_analyses(analyses: Sequence[Analysis | Looking], version: str) -> dict[str, Any]:
    """What is asked for, and the code that computes it."""
    others = {type(analysis).__module__ for analysis in analyses} - {"__main__"}
    return {
        "gpuem": version,
        # of a checkout the version never changes
        "code": {"gpuem": code(), **{name: code(name) for name in sorted(others) if name.split(".")[0] != "gpuem"}},
        "analyses": [_of_analysis(analysis) for analysis in analyses],
    }


@functools.cache
def code(module: str = "gpuem") -> str:
    """A checksum of gpuem's sources, kernels among them, or of another module's file, as they are now on the disk.

    It is computed once per process. Where no sources are there (a frozen program) only names count.
    """
    made = hashlib.blake2b(digest_size=12)
    if module == "gpuem":
        package = Path(gpuem.__file__).parent
        files = [path for path in sorted(package.rglob("*")) if path.suffix in _SOURCES]
        if not (package / "kernels").is_dir():
            # a checkout
            files += [path for path in sorted((package.parent / "kernels").rglob("*")) if path.suffix in _SOURCES]
    else:
        named = getattr(sys.modules.get(module), "__file__", None)
        files = [Path(named)] if named and Path(named).is_file() else []
    for path in files:
        made.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return made.hexdigest()


def of_cuts(job: Job) -> dict[str, Any]:
    """How a job is cut into shards, and on what kind of device it runs."""
    shards = np.array([(s.piece, s.first, s.last, s.frames) for s in job.plan.shards], np.int64)
    return {
        "device": job.facts.get("device", job.backend.NAME),
        "cuts": [digest(shards), list(map(list, job.plan.tiles))],
    }


def refuse_another(where: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RecipeError, which says what is different, where a run can't go on with what is there."""
    found = differences(then, now)
    if found:
        raise RecipeError(
            f"{where}: of another run, so this one can't go on there:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nBegin anew with --overwrite, or choose another [output] path"
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was: the key, where it is inside of others, and both values."""
    out = []
    for name in now:
        found = next(_inside("", then.get(name, _MISSING), now[name]), None)
        if found is not None:
            key, before, after = found
            out.append(f"{name}: {key}{': ' if key else ''}{' then, '.join(_cut_alike(before, after))} now")
    return out


def _inside(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys at which two values differ, and what is there."""
    if type(before) is type(after) and before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**after, **before}:
            here = f"{key}{'.' if key else ''}{name}"
            yield from _inside(here, before.get(name, _MISSING), after.get(name, _MISSING))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for k, (one, other) in enumerate(zip(before, after, strict=True)):
            # a file goes by its path, not by its number
            path = other.get("path") if isinstance(other, dict) and isinstance(one, dict) else None
            yield from _inside(f"{path}" if path and one.get("path") == path else f"{key}[{k}]", one, other)
    elif isinstance(before, list) and isinstance(after, list):
        same = next((k for k, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
        k = min(len(before), len(after)) if same is None else same
        one, other = (
            f"{len(item)} entries, [{k}] {item[k] if k < len(item) else _MISSING}" for item in (before, after)
        )
        yield key, one, other
    else:
        yield key, before, after


class _Missing:
    def __str__(self) -> str:
        return "nothing"


_MISSING = _Missing()


def _cut_alike(before: Any, after: Any) -> tuple[str, str]:
    """Two values as text; of long ones the part in which they differ."""
    one, other = _text(before), _text(after)
    if max(len(one), len(other)) <= _LONG:
        return one, other
    differ = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, differ - _LONG // 4)
    return _part(one, start), _part(other, start)


def _part(text: str, start: int) -> str:
    part = text[start : start + _LONG]
    return f"{'...' if start else ''}{part}{'...' if start + _LONG < len(text) else ''}"


def _text(value: Any) -> str:
    return str(value).replace("\n", " ")


def digest(array: NDArray[Any]) -> str:
    """A short checksum of an array, its type and its shape."""
    made = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=12)
    made.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return made.hexdigest()


def _ends(ds: Dataset) -> list[str]:
    """Checksums of both ends of files."""
    files = ds.source.files
    return [of_ends(ds.files, k, files[k].size) for k in range(0, len(files), max(1, len(files) // MOST_FILES))]


def of_ends(files: Files, k: int, size: int) -> str:
    """A checksum of both ends of file `k`, which is so long."""
    made = hashlib.blake2b(digest_size=12)
    for at in sorted({0, max(0, size - END_NBYTES)}):
        made.update(files.read(k, at, min(END_NBYTES, size - at)).data)
    return made.hexdigest()


def _of_analysis(analysis: Any) -> dict[str, Any]:
    """All that was asked of an analysis; arrays and files by what is in them."""
    own = {name: _content(v) if _by_content(v) else plain(v) for name, v in fields(analysis).items()}
    return own if "kind" in own else {"kind": f"{type(analysis).__module__}.{type(analysis).__qualname__}", **own}


def _by_content(value: Any) -> bool:
    return isinstance(value, np.ndarray | Path)


def _content(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return digest(value)
    made = hashlib.blake2b(digest_size=12)
    for path in sorted(value.rglob("*")) if value.is_dir() else [value]:
        if path.is_file():
            made.update(path.read_bytes())
    return made.hexdigest()
