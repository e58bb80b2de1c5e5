"""How results came about, as plain values."""

from __future__ import annotations

import datetime
import functools
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem import engine
from gpuem.analyses import Analysis, Looking, fields, plain
from gpuem.correction import summary
from gpuem.dataset import Dataset
from gpuem.identity import version


@functools.cache
def _versions() -> dict[str, Any]:
    libraries = ("numpy", "numba", "h5py", "imagecodecs", "zarr", "pydantic")
    return {
        "gpuem": version(),
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in libraries},
        "platform": platform.platform(),
    }


def provenance(
    ds: Dataset, analyses: Sequence[Analysis | Looking], job: engine.Job, totals: engine.Totals, seconds: float
) -> dict[str, Any]:
    """How the results came about, as plain values."""
    missing = int(job.wanted.sum() - totals.valid.sum())
    reasons: dict[str, list[NDArray[np.int64]]] = {}
    for item in totals.lost:
        reasons.setdefault(item.message, []).append(item.indices)
    return {
        **_versions(),
        # its arguments may hold what is nobody's business
        "command": Path(sys.argv[0]).name if sys.argv else "",
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": job.backend.NAME,
        **job.facts,
        "threads": job.plan.threads,
        "input": {
            "format": ds.source.format,
            "files": [{"path": str(f.path), "size": f.size, "mtime_ns": f.mtime_ns} for f in ds.source.files],
            "scan": list(ds.scan_shape),
            "frame": list(ds.frame_shape),
            "dtype": ds.source.raw_dtype.str,
            "skip": ds.skip,
        },
        "correction": summary(ds.source.correction),
        "analyses": [_plain(a) for a in analyses],
        "frames": {"wanted": int(job.wanted.sum()), "read": int(totals.valid.sum()), "masked": missing},
        "lost": [
            {"frames": engine.describe(np.concatenate(indices)), "reason": reason}
            for reason, indices in reasons.items()
        ],
        "notes": list(ds.notes),
        "seconds": {"total": seconds, **totals.seconds},
        "bytes": totals.nbytes,
    }


def _plain(analysis: Any) -> dict[str, Any]:
    """An analysis as plain values; of an array its shape, of a mask its number of pixels."""
    own = {name: _words(v) if isinstance(v, np.ndarray) else plain(v) for name, v in fields(analysis).items()}
    return own if "kind" in own else {"kind": type(analysis).__qualname__, **own}


def _words(array: NDArray[Any]) -> str:
    if array.ndim == 2:
        return f"array, {int(np.count_nonzero(array))} pixels"
    return f"array of {' x '.join(map(str, array.shape))}"
