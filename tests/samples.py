"""Sample files that instruments and other people's software wrote, and what independent readers make of them.

They are not part of the project: many are GPL or carry no licence. Tests that need them skip where they are absent.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def find_samples() -> Path | None:
    """The folder of sample data: GPUEM_SAMPLE_DATA, or ../shared/data beside the repository; None where absent."""
    named = os.environ.get("GPUEM_SAMPLE_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if (folder / "MANIFEST.json").is_file() else None


def sample_data() -> Path:
    """The folder of sample data; the test is skipped where there is none."""
    folder = find_samples()
    if folder is None:
        pytest.skip("no sample data: set GPUEM_SAMPLE_DATA to the folder that holds MANIFEST.json")
    return folder


@functools.cache
def _manifest() -> tuple[dict[str, Any], ...]:
    folder = find_samples()
    return tuple(json.loads((folder / "MANIFEST.json").read_text())) if folder else ()


def entries(*formats: str) -> list[Any]:
    """Entries of MANIFEST.json of some formats, as parameters of a test; one that skips where there are no samples."""
    found = [e for e in _manifest() if e["format"] in formats]
    if not found:
        return [pytest.param({}, marks=pytest.mark.skip(reason="no sample data: set GPUEM_SAMPLE_DATA"))]
    return [pytest.param(e, id=f"{e['path']}:{e['reader'].split(':')[0]}") for e in found]


def assert_reads_as(array: np.ndarray, entry: dict[str, Any]) -> None:
    """Check an array against what another reader made of the same file: shape, type, sum, values, every byte."""
    expected = np.dtype(entry["dtype"]).newbyteorder("=")
    array = np.ascontiguousarray(array.reshape(entry["shape"]).astype(expected))
    total = array.sum(dtype=np.float64 if expected.kind == "f" else np.int64)
    assert total == pytest.approx(entry["sum"], rel=1e-12)
    for index, value in entry["sample_values"]:
        assert array[tuple(index)] == value, index
    assert hashlib.md5(array.tobytes(), usedforsecurity=False).hexdigest() == entry["array_md5"]
