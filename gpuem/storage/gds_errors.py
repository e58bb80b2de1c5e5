"""What kvikio's errors mean, in words."""

from __future__ import annotations

import re

from gpuem.errors import DataError, DeviceError, GpuemError, ReadError
from gpuem.formats.remote import Place


def failure(what: tuple[Place, int, int], error: Exception) -> GpuemError:
    """What kvikio's error means: it knows only one kind, for files and for GPUs."""
    path, offset, length = what
    said = words(error)
    message = f"{path}: reading {length} bytes at {offset} through kvikio: {said}"
    if "cuda" in said.lower():
        return DeviceError(f"{message}; the GPU or its driver fails")
    # what is missing at the end doesn't come by trying again
    kind = DataError if "EOF" in said else ReadError
    return kind(f"{message}; the file is truncated or its device fails")


def words(error: Exception | str) -> str:
    """An error's message without the place in kvikio's sources."""
    return re.sub(r"^.* at: \S+: ", "", str(error), flags=re.DOTALL) or repr(error)
