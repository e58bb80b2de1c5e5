"""How stored bytes become pixels.

A format module names the steps (`gpuem.formats.source.Step`); this package knows how each is undone on the host.
Frame codecs unpack whole frames (`merlin`), chunk codecs are chains of filters (`chunks`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpuem.formats.source import Step


def unpack(steps: tuple[Step, ...], data: NDArray[np.uint8], at: NDArray[np.int64], out: NDArray[Any]) -> None:
    """Unpack frames that are stored one by one.

    Parameters
    ----------
    steps : tuple of Step
        The frame codec: one step.
    data : (m,) uint8
        Bytes of the file.
    at : (n,) int64
        Byte offset of each frame's data.
    out : (n, y, x) array
        The unpacked frames.
    """
    from gpuem.codecs import merlin

    (step,) = steps
    assert step.name == "merlin", step
    merlin.decode(data, at, out, *step.parameters)


def decode_many(
    steps: tuple[Step, ...],
    skipped: NDArray[np.uint32],
    raw: NDArray[np.uint8],
    at: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> dict[int, str]:
    """Undo the filters of chunks; see `gpuem.codecs.chunks.decode_many`."""
    from gpuem.codecs import chunks

    return chunks.decode_many(steps, skipped, raw, at, lengths, out)
