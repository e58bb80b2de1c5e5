"""What two runs must agree in, for one to go on where the other stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.analyses import Analysis, Looking, fields, plain
from gpuem.dataset import Dataset
from gpuem.engine import Job
from gpuem.errors import RecipeError
from gpuem.storage.host import Files

# bytes at both ends of a file that are looked at, beside its size and its time
END_NBYTES = 1 << 16
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
        "gpuem": version,
        # nobody can tell whether an array is the same one again
        "files": [[str(file.path), file.size, file.mtime_ns] for file in ds.source.files]
        or [f"an array in memory ({uuid.uuid4().hex})"],
        "ends of the files": _ends(ds),
        "data": [ds.source.format, list(ds.shape), ds.source.raw_dtype.str, ds.skip],
        "axes": axes,
        "region of interest": digest(np.packbits(wanted)),
        "correction": [None if table is None else digest(table) for table in tables],
        "analyses": [_of_analysis(analysis) for analysis in analyses],
    }


def of_cuts(job: Job) -> dict[str, Any]:
    """How a job is cut into shards, and on what kind of device it runs."""
    shards = np.array([(s.piece, s.first, s.last, s.frames) for s in job.plan.shards], np.int64)
    return {
        "device": job.facts.get("device", job.backend.NAME),
        "cuts": [digest(shards), list(map(list, job.plan.tiles))],
    }


def refuse_another(where: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RecipeError, which says what is different, where a run can't go on with what is there."""
    found = _differences(then, now)
    if found:
        raise RecipeError(
            f"{where}: of another run, so this one can't go on there:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nBegin anew with --overwrite, or choose another [output] path"
        )


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, in words."""
    out = []
    for name in now:
        before, after = then.get(name), now[name]
        if before == after:
            continue
        if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
            pairs = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
            before, after = pairs[0]
        out.append(f"{name}: {_short(before)} then, {_short(after)} now")
    return out


def digest(array: NDArray[Any]) -> str:
    """A short checksum of an array, its type and its shape."""
    made = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=12)
    made.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return made.hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


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
